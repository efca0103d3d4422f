// proxy_test.go: a network that fails on demand, between the program and a server.

package main

import (
	"bytes"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"
)

// A fault is what a proxy does to the connections through it.
type fault int

const (
	healthy fault = iota
	refused       // no connection is accepted, the open ones are reset
	swallow       // requests don't arrive; connections stay open and silent
	mute          // requests arrive, replies don't
	cut           // the first half of each reply arrives, then the connection is reset
	slow          // replies arrive 100 ms late, which is within the time-outs
	slower        // replies arrive 400 ms late, which isn't
	narrow        // all connections together carry 5 MB/s
)

func (f fault) String() string {
	return [...]string{"healthy", "refused", "requests swallowed", "replies swallowed", "replies cut", "replies slow", "replies too slow", "narrow"}[f]
}

type proxy struct {
	addr   string // where it listens
	target string // where it leads

	mu       sync.Mutex // guards what follows
	fault    fault
	listener net.Listener // nil while refused
	conns    map[net.Conn]bool
	trigger  []byte    // a request that holds it makes the proxy mute
	free     time.Time // when narrow has carried what it was given
}

// newProxy starts a proxy before target. It ends with the test.
func newProxy(t testing.TB, target string) *proxy {
	t.Helper()
	p := &proxy{addr: "127.0.0.1:0", target: target, conns: map[net.Conn]bool{}}
	if err := p.listen(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.set(t, refused) })
	return p
}

// listen opens the listener; callers hold mu, but for the first call.
func (p *proxy) listen() error {
	listener, err := net.Listen("tcp", p.addr)
	if err != nil {
		return err
	}
	p.addr, p.listener = listener.Addr().String(), listener
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go p.connect(client)
		}
	}()
	return nil
}

// set changes the fault. Connections that a fault has hurt are reset when it goes.
func (p *proxy) set(t testing.TB, f fault) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if f == refused || p.fault == swallow || p.fault == mute {
		for conn := range p.conns {
			reset1(conn)
		}
	}
	if f == refused && p.listener != nil {
		p.listener.Close()
		p.listener = nil
	}
	if f != refused && p.listener == nil {
		if err := p.listen(); err != nil {
			t.Fatal(err)
		}
	}
	p.fault = f
}

// muteAfter lets requests through up to one that holds trigger; no reply arrives after it.
func (p *proxy) muteAfter(trigger string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trigger = []byte(trigger)
}

func (p *proxy) now() fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fault
}

// reset1 closes a connection the hard way.
func reset1(conn net.Conn) {
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

// connect carries one connection's bytes, as the fault of the moment has it.
func (p *proxy) connect(client net.Conn) {
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		reset1(client)
		return
	}
	p.mu.Lock()
	p.conns[client], p.conns[server] = true, true
	if p.fault == refused {
		reset1(client)
	}
	p.mu.Unlock()
	var done sync.WaitGroup
	done.Go(func() {
		p.carry(server, client, func(request []byte) ([]byte, bool) {
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.trigger != nil && bytes.Contains(request, p.trigger) {
				p.fault, p.trigger = mute, nil
			}
			if p.fault == swallow {
				return nil, true
			}
			return request, true
		})
	})
	done.Go(func() {
		p.carry(client, server, func(reply []byte) ([]byte, bool) {
			switch p.now() {
			case swallow, mute:
				return nil, true
			case cut:
				return reply[:len(reply)/2], false
			case slow:
				time.Sleep(100 * time.Millisecond)
			case slower:
				time.Sleep(400 * time.Millisecond)
			}
			return reply, true
		})
	})
	done.Wait()
	p.mu.Lock()
	delete(p.conns, client)
	delete(p.conns, server)
	p.mu.Unlock()
}

// carry copies what from says to to, through a filter that may also end the connection.
func (p *proxy) carry(to, from net.Conn, filter func([]byte) ([]byte, bool)) {
	defer reset1(to)
	defer reset1(from)
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			time.Sleep(p.queue(n))
			bytes, goOn := filter(buffer[:n])
			if _, err := to.Write(bytes); err != nil || !goOn {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// queue returns how long n bytes take, after those that came before.
func (p *proxy) queue(n int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault != narrow {
		return 0
	}
	if now := time.Now(); p.free.Before(now) {
		p.free = now
	}
	p.free = p.free.Add(time.Duration(n) * time.Second / 5e6)
	return time.Until(p.free)
}

// withHost is a service's URL with another host and port.
func withHost(t testing.TB, rawURL, host string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = host
	return u.String()
}

// hostPort is where a service listens, for a proxy to stand before.
func hostPort(t testing.TB, rawURL string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	if u.Port() == "" {
		return u.Host + ":6379"
	}
	return u.Host
}

// checker_test.go: the promise, under load and faults: a GET that starts after a write was answered shows it.
//
// Each writer owns a listing whose price only grows. Each reader notes what was answered to all writers,
// then reads, and compares: a price below is stale.

package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/gomodule/redigo/redis"
)

const writers, readers = 3, 8 // per program

// A checker keeps readers and writers busy at one program or more.
type checker struct {
	programs []*program

	mu       sync.Mutex // guards what follows
	progress *sync.Cond // signals every read and write
	answered []int      // by listing: the highest price that a writer has an answer for
	reads    int
	writes   int
	stale    int // reads that show less than was answered before they began
	excused  int // of several programs: such reads while one of them couldn't reach Redis
	failed   []string
	writing  int  // writes under way
	paused   bool // no write begins
	stopping bool
	running  sync.WaitGroup
}

// check starts the readers and writers; stop ends them.
func check(t *testing.T, programs ...*program) *checker {
	t.Helper()
	c := &checker{programs: programs}
	c.progress = sync.NewCond(&c.mu)
	for range len(programs) * writers {
		e := programs[0].want(t, 201, "POST", "/properties/", titled("checked"))
		c.answered = append(c.answered, 1)
		if got := e.Header.Get("Location"); got != fmt.Sprintf("/properties/%d/", len(c.answered)) {
			t.Fatalf("Location: %s", got)
		}
	}
	for i, p := range programs {
		for n := range writers {
			c.running.Go(func() { c.loop(func() { c.write(p, i*writers+n) }) })
		}
		for n := range readers {
			c.running.Go(func() { c.loop(func() { c.read(p, []string{"identity", "gzip"}[n%2]) }) })
		}
	}
	t.Cleanup(c.end)
	return c
}

func (c *checker) loop(step func()) {
	for {
		c.mu.Lock()
		stopping := c.stopping
		c.mu.Unlock()
		if stopping {
			return
		}
		step()
		c.progress.Broadcast()
	}
}

func (c *checker) write(p *program, listing int) {
	c.mu.Lock()
	for c.paused && !c.stopping {
		c.progress.Wait()
	}
	next := c.answered[listing] + 1
	c.writing++
	c.mu.Unlock()
	body := fmt.Sprintf(`{"title":"checked","description":"","price":%d,"location":"Accra"}`, next)
	e, err := p.send("PUT", fmt.Sprintf("/properties/%d/", listing+1), body)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writing--
	if err != nil || e.StatusCode != 200 {
		c.failed = append(c.failed, fmt.Sprintf("PUT: %v %s", err, e.body))
		return
	}
	c.answered[listing] = next
	c.writes++
}

func (c *checker) read(p *program, encoding string) {
	c.mu.Lock()
	answered := append([]int(nil), c.answered...)
	c.mu.Unlock()
	excused := false
	for _, other := range c.programs {
		excused = excused || len(c.programs) > 1 && !other.trusted()
	}
	e, err := p.send("GET", "/properties/", "", "Accept-Encoding", encoding)
	var list []property
	var body io.Reader = bytes.NewReader(e.body)
	if err == nil && e.Header.Get("Content-Encoding") == "gzip" {
		body, err = gzip.NewReader(body)
	}
	if err == nil {
		err = json.NewDecoder(body).Decode(&list)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil || e.StatusCode != 200 {
		c.failed = append(c.failed, fmt.Sprintf("GET: %v %.200s", err, e.body))
		return
	}
	c.reads++
	for i, price := range answered {
		var shown int
		fmt.Sscanf(string(list[i].Price), "%d", &shown)
		if shown < price && excused {
			c.excused++
			return
		}
		if shown < price {
			c.stale++
			return
		}
	}
}

// wait lets n more reads happen and some writes, unless something goes wrong.
func (c *checker) wait(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	reads, writes := c.reads+n, c.writes+len(c.answered)
	for (c.reads < reads || c.writes < writes) && len(c.failed) == 0 && c.stale < 100 {
		c.progress.Wait()
	}
}

// pause waits for the writes under way and lets no further one begin: what the last one left in Redis, no other
// one takes away. resume ends that.
func (c *checker) pause() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.paused = true; c.writing > 0; {
		c.progress.Wait()
	}
}

func (c *checker) resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paused = false
	c.progress.Broadcast()
}

// end ends the load.
func (c *checker) end() {
	c.mu.Lock()
	c.stopping = true
	c.progress.Broadcast()
	c.mu.Unlock()
	c.running.Wait()
}

// stop ends the load and judges what it saw.
func (c *checker) stop(t *testing.T) {
	t.Helper()
	c.end()
	t.Logf("%d reads, %d writes, %d stale reads (and %d while a writer was cut off), %d failed requests",
		c.reads, c.writes, c.stale, c.excused, len(c.failed))
	if c.stale > 0 {
		t.Errorf("%d of %d reads were stale", c.stale, c.reads)
	}
	if len(c.failed) > 0 {
		t.Errorf("%d requests failed, the first: %s", len(c.failed), c.failed[0])
	}
}

// recover waits until every program trusts Redis and serves hits again. Call it while the writers pause: they
// can be so fast that no fill survives.
func (c *checker) recover(t *testing.T) {
	t.Helper()
	for _, p := range c.programs {
		hits := func() int64 { return p.cache.pages.requests[hit].Load() }
		eventually(t, "the cache is trusted", p.trusted)
		before := hits()
		eventually(t, "hits are back", func() bool { return hits() > before })
	}
}

// One program, no faults: the readers and writers race with each other alone. The queries are slowed down
// between their snapshot and their rows, where the races are.
func TestNeverStale(t *testing.T) {
	p := start(t, options{})
	p.countQueries(t)
	c := check(t, p)
	c.wait(1500)
	c.stop(t)
}

// Two programs on one Redis: what one writes, the other shows.
func TestNeverStaleTwoInstances(t *testing.T) {
	a, b := start(t, options{}), startAnother(t, options{})
	a.countQueries(t)
	c := check(t, a, b)
	c.wait(1500)
	c.stop(t)
}

// The network to Redis fails in every way it can. No read is stale, and no request fails.
func TestNeverStaleUnderNetworkFaults(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	c := check(t, start(t, options{redisURL: withHost(t, services.redisURL, network.addr)}))
	for f := refused; f <= slower; f++ {
		before := c.programs[0].cache.session.Load()
		network.set(t, f)
		c.wait(100)
		c.pause()
		network.set(t, healthy)
		c.recover(t)
		c.resume()
		if kept := c.programs[0].cache.session.Load() == before; kept != (f == slow) {
			t.Errorf("%s: trust was kept: %v", f, kept)
		}
	}
	c.stop(t)
}

// Of two programs one is cut off from Redis. What the other one serves may be old only until the writer is
// back.
func TestTwoInstancesOneCutOff(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	a := start(t, options{redisURL: withHost(t, services.redisURL, network.addr)})
	c := check(t, a, startAnother(t, options{}))
	for _, f := range []fault{refused, swallow, mute, cut} {
		network.set(t, f)
		c.wait(300)
		c.pause()
		network.set(t, healthy)
		c.recover(t)
		c.resume()
	}
	c.stop(t)
}

// Redis itself fails in every way it can: it stops, restarts with old data, loses its keys or its clients,
// has others' data at our keys, is out of memory, refuses writes.
func TestNeverStaleUnderRedisFaults(t *testing.T) {
	server := startRedis(t)
	p := start(t, options{redisURL: server.url})
	c := check(t, p)
	faults := []struct {
		about      string
		harm, mend func()
	}{
		{"stopped", func() { server.signal(syscall.SIGSTOP) }, func() { server.signal(syscall.SIGCONT) }},
		{"restarted with old data", func() {
			c.pause()
			c.recover(t) // the page is there
			server.do("SAVE")
			c.resume()
			c.wait(100)
			server.kill()
		}, func() { server.start() }},
		{"restarted empty", func() { server.kill(); os.Remove(server.snapshot) }, func() { server.start() }},
		{"flushed", func() { server.do("FLUSHALL") }, func() {}},
		{"without its clients", func() { server.do("CLIENT", "KILL", "TYPE", "normal") }, func() {}},
		{"text at every key", func() {
			for _, key := range []string{fenceKey, allPropertiesKey, pageKey("/properties/", false)} {
				server.do("SET", key, "garbage")
			}
		}, func() {}},
		{"lists at every key", func() {
			for _, key := range []string{fenceKey, allPropertiesKey, pageKey("/properties/", false)} {
				server.do("EVAL", "redis.call('DEL', KEYS[1]) return redis.call('RPUSH', KEYS[1], 'x')", 1, key)
			}
		}, func() {}},
		{"out of memory", func() { server.do("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "1") },
			func() { server.do("CONFIG", "SET", "maxmemory", "0") }},
		{"a read-only replica", func() { server.do("REPLICAOF", "127.0.0.1", "1") }, func() { server.do("REPLICAOF", "NO", "ONE") }},
	}
	for _, fault := range faults {
		c.mu.Lock()
		reads, stale := c.reads, c.stale
		c.mu.Unlock()
		fault.harm()
		c.wait(300)
		c.pause()
		fault.mend()
		c.recover(t)
		c.resume()
		c.wait(100)
		c.mu.Lock()
		t.Logf("%s: %d reads, %d stale", fault.about, c.reads-reads, c.stale-stale)
		c.mu.Unlock()
	}
	c.stop(t)
}

// A redisServer is a Redis of a test's own, to stop and kill.
type redisServer struct {
	t        *testing.T
	url      string
	port     string
	snapshot string // the file that it loads at start, if there is one
	process  *exec.Cmd
}

// startRedis needs redis-server itself. With Docker there may be none on this machine: what the network can
// do to us is tested all the same.
func startRedis(t *testing.T) *redisServer {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("needs a redis-server to stop and kill, and there is none in PATH")
	}
	free := newProxy(t, "127.0.0.1:1")
	_, port, _ := strings.Cut(free.addr, ":")
	free.set(t, refused)
	s := &redisServer{t: t, url: "redis://127.0.0.1:" + port, port: port, snapshot: filepath.Join(t.TempDir(), "dump.rdb")}
	s.start()
	t.Cleanup(s.kill)
	return s
}

// start returns when Redis answers.
func (s *redisServer) start() {
	s.t.Helper()
	s.process = exec.Command("redis-server", "--bind", "127.0.0.1", "--port", s.port, "--save", "", "--dir", filepath.Dir(s.snapshot))
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "redis-server answers", func() bool {
		conn, err := redis.DialURL(s.url)
		if err != nil {
			return false
		}
		defer conn.Close()
		_, err = conn.Do("PING")
		return err == nil
	})
}

func (s *redisServer) signal(sig os.Signal) {
	s.t.Helper()
	if err := s.process.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

func (s *redisServer) kill() {
	s.process.Process.Kill()
	s.process.Wait()
}

// do runs a command on a connection of its own.
func (s *redisServer) do(command string, args ...any) {
	s.t.Helper()
	conn, err := redis.DialURL(s.url)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Do(command, args...); err != nil {
		s.t.Fatal(err)
	}
}

// A connection that the pool dials anew may lead to a Redis that restarted with old data, while the only old
// connection is busy and hasn't noticed. So it is refused.
func TestNewConnectionAfterRestart(t *testing.T) {
	server := startRedis(t)
	p := start(t, options{redisURL: server.url})
	p.list(t, storedStatus)
	server.do("SAVE") // 1. the snapshot has the empty list
	p.want(t, 201, "POST", "/properties/", titled("new"))
	held := p.cache.session.Load().Get() // 2. every connection is in use, as during a slow fill
	for p.cache.session.Load().IdleCount() > 0 {
		t.Cleanup(func(c redis.Conn) func() { return func() { c.Close() } }(p.cache.session.Load().Get()))
	}
	server.kill()
	server.start() // 3. Redis has the empty list again
	if got := titles(p.list(t, bypassStatus)); got != "new" {
		t.Errorf("the list has %q", got)
	}
	held.Close()
	eventually(t, "the cache is trusted", p.trusted)
	if got := titles(p.list(t, storedStatus)); got != "new" {
		t.Errorf("the list has %q", got)
	}
}

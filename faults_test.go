// faults_test.go: what breaks: a network between the program and a server, servers of a test's
// own to stop and kill, and locks.

package main

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"database/sql"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	osuser "os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// Part 1: the network

// A fault is what a proxy does to the connections through it.
type fault string

const (
	healthy fault = "healthy"
	refused fault = "refused"            // no connection is accepted, the open ones are reset
	swallow fault = "requests swallowed" // connections stay open and silent
	mute    fault = "replies swallowed"
	cut     fault = "replies cut"      // half of a reply arrives, then the connection is reset
	slow    fault = "replies slow"     // by 100 ms, which is within the time-outs
	slower  fault = "replies too slow" // by 400 ms, which isn't
	narrow  fault = "narrow"           // all connections together carry 5 MB/s
)

// A proxy is a network that fails on demand.
type proxy struct {
	addr   string // where it listens
	target string // where it leads

	mu       sync.Mutex // guards the rest
	fault    fault
	listener net.Listener // nil while refused
	conns    map[net.Conn]bool
	trigger  []byte    // a request that holds it makes the proxy mute
	free     time.Time // when narrow has carried what it was given
}

// newProxy starts a proxy before target. It ends with the test.
func newProxy(t testing.TB, target string) *proxy {
	t.Helper()
	addr := "127.0.0.1:" + freePort(t)
	p := &proxy{addr: addr, target: target, fault: refused, conns: map[net.Conn]bool{}}
	p.set(t, healthy)
	t.Cleanup(func() { p.set(t, refused) })
	return p
}

// proxyToRedis is a network to the claimed Redis database, and the URL to use it.
func proxyToRedis(t testing.TB) (network *proxy, redisURL string) {
	t.Helper()
	network = newProxy(t, parseURL(t, services.redisURL).Host)
	return network, withHost(t, services.redisURL, network.addr)
}

// proxyToPostgres is a network to PostgreSQL, and the settings to use it.
func proxyToPostgres(t testing.TB) (*proxy, *pgx.ConnConfig) {
	t.Helper()
	network := newProxy(t, fmt.Sprintf("%s:%d", services.database.Host, services.database.Port))
	return network, databaseAt(t, network.addr)
}

// databaseAt is the tests' database at another address.
func databaseAt(t testing.TB, addr string) *pgx.ConnConfig {
	t.Helper()
	config := services.database.Copy()
	config.Host, config.Fallbacks = "127.0.0.1", nil
	if _, err := fmt.Sscanf(addr, "127.0.0.1:%d", &config.Port); err != nil {
		t.Fatal(err)
	}
	return config
}

// set changes the fault. Connections that a fault has hurt are reset when it goes.
func (p *proxy) set(t testing.TB, f fault) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if f == refused || p.fault == swallow || p.fault == mute {
		for conn := range p.conns {
			hangUp(conn)
		}
	}
	if f == refused && p.listener != nil {
		p.listener.Close()
		p.listener = nil
	}
	if f != refused && p.listener == nil {
		listener, err := net.Listen("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		p.listener = listener
		go p.accept(listener)
	}
	p.fault = f
}

// muteAfter lets requests through up to one that holds trigger. No reply arrives after it.
func (p *proxy) muteAfter(trigger string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trigger = []byte(trigger)
}

// vanish swallows what comes over the open connections, for ever. What it returns serves new ones
// at the same address.
func (p *proxy) vanish(t testing.TB) *proxy {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listener.Close()
	p.listener, p.fault = nil, swallow
	back := &proxy{addr: p.addr, target: p.target, fault: refused, conns: map[net.Conn]bool{}}
	back.set(t, healthy)
	t.Cleanup(func() { back.set(t, refused) })
	return back
}

func (p *proxy) accept(listener net.Listener) {
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		go p.connect(client)
	}
}

// connect carries one connection's bytes, as the fault of the moment has it.
func (p *proxy) connect(client net.Conn) {
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		hangUp(client)
		return
	}
	p.mu.Lock()
	p.conns[client], p.conns[server] = true, true
	if p.fault == refused {
		hangUp(client)
	}
	p.mu.Unlock()
	var done sync.WaitGroup
	done.Go(func() { p.carry(server, client, p.request) })
	done.Go(func() { p.carry(client, server, p.reply) })
	done.Wait()
	p.mu.Lock()
	delete(p.conns, client)
	delete(p.conns, server)
	p.mu.Unlock()
}

// carry copies what from says to to, through a filter that may also end the connection.
func (p *proxy) carry(to, from net.Conn, filter func([]byte) (through []byte, goOn bool)) {
	defer hangUp(to)
	defer hangUp(from)
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		time.Sleep(p.queue(n))
		through, goOn := filter(buffer[:n])
		if _, err := to.Write(through); err != nil || !goOn {
			return
		}
	}
}

func (p *proxy) request(bytesOf []byte) (through []byte, goOn bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.trigger != nil && bytes.Contains(bytesOf, p.trigger) {
		p.fault, p.trigger = mute, nil
	}
	if p.fault == swallow {
		return nil, true
	}
	return bytesOf, true
}

func (p *proxy) reply(bytesOf []byte) (through []byte, goOn bool) {
	p.mu.Lock()
	f := p.fault
	p.mu.Unlock()
	switch f {
	case swallow, mute:
		return nil, true
	case cut:
		return bytesOf[:len(bytesOf)/2], false
	case slow:
		time.Sleep(100 * time.Millisecond)
	case slower:
		time.Sleep(400 * time.Millisecond)
	}
	return bytesOf, true
}

// queue returns how long n bytes take, after those that came before.
func (p *proxy) queue(n int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault != narrow {
		return 0
	}
	// What a late sleep has lost is caught up with.
	if late := time.Now().Add(-100 * time.Millisecond); p.free.Before(late) {
		p.free = late
	}
	p.free = p.free.Add(time.Duration(n) * time.Second / 5e6)
	return time.Until(p.free)
}

// hangUp closes a connection with a reset.
func hangUp(conn net.Conn) {
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

// freePort is one that nobody listens on at the moment, and none that Linux gives to outgoing
// connections.
func freePort(t testing.TB) string {
	t.Helper()
	for {
		port := fmt.Sprint(20000 + rand.IntN(12000))
		listener, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err == nil {
			listener.Close()
			return port
		}
	}
}

// Part 2: servers of a test's own

// A server is a process to stop, kill and start again.
type server struct {
	t       testing.TB
	args    []string
	answers func() bool
	process *exec.Cmd
}

// start returns when the server answers. It ends with the test.
func (s *server) start() {
	s.t.Helper()
	s.process = exec.Command(s.args[0], s.args[1:]...)
	// Shown if the test fails.
	s.process.Stderr = s.t.Output()
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, s.args[0]+" answers", s.answers)
}

func (s *server) signal(sig os.Signal) {
	s.t.Helper()
	if err := s.process.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// end sends a signal that ends it, and waits until it has. It may have ended before.
func (s *server) end(sig os.Signal) {
	s.process.Process.Signal(sig)
	s.process.Wait()
}

// need returns where a program is. Where PostgreSQL and Redis run in Docker there may be none on
// this machine. Then a test that kills a server is skipped, and the others can be run all the same.
func need(t testing.TB, name, debian string) string {
	t.Helper()
	places, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	slices.Reverse(places)
	for _, place := range append([]string{name, "/usr/sbin/" + name}, places...) {
		if found, err := exec.LookPath(place); err == nil {
			return found
		}
	}
	t.Skipf("no %s to start and kill: apt-get install %s (.ci/run does so)", name, debian)
	return ""
}

// A redisServer is one to restart, reset and stall.
type redisServer struct {
	server
	url  string
	file string // that it loads at start, if it is there
}

func startRedis(t testing.TB) *redisServer {
	t.Helper()
	port := freePort(t)
	file := filepath.Join(t.TempDir(), "dump.rdb")
	s := &redisServer{url: "redis://127.0.0.1:" + port, file: file}
	s.server = server{t: t, answers: s.pong, args: []string{need(t, "redis-server", "redis-server"),
		"--bind", "127.0.0.1", "--port", port, "--save", "", "--dir", filepath.Dir(file)}}
	s.start()
	t.Cleanup(func() { s.end(os.Kill) })
	return s
}

func (s *redisServer) pong() bool {
	conn, err := redis.DialURL(s.url, redis.DialReadTimeout(time.Second))
	if err != nil {
		return false
	}
	defer conn.Close()
	_, err = conn.Do("PING")
	return err == nil
}

// do is a command that must succeed, on a connection of its own.
func (s *redisServer) do(command string, more ...any) any {
	s.t.Helper()
	conn := dialRedis(s.t, s.url)
	defer conn.Close()
	return do(s.t, conn, command, more...)
}

// calls is how often it has run a command since its statistics were reset.
func (s *redisServer) calls(command string) int {
	s.t.Helper()
	return calls(s.t, dialRedis(s.t, s.url), command)
}

// restart loses what came after the last SAVE.
func (s *redisServer) restart() {
	s.t.Helper()
	s.end(os.Kill)
	s.start()
}

// snapshot keeps all keys. What it returns restarts Redis with them.
func (s *redisServer) snapshot() (back func()) {
	s.t.Helper()
	s.do("SAVE")
	return s.restart
}

// copyAside keeps all keys in another database. What it returns swaps the two, under living
// connections.
func (s *redisServer) copyAside() (back func()) {
	s.t.Helper()
	const copyAll = `for _, key in ipairs(redis.call('KEYS', '*')) do
		redis.call('COPY', key, key, 'DB', 1, 'REPLACE') end`
	s.do("EVAL", copyAll, 0)
	return func() {
		s.t.Helper()
		s.do("SWAPDB 0 1")
	}
}

// save keeps all keys. What it returns restores them, under living connections.
func (s *redisServer) save() (back func()) {
	s.t.Helper()
	const all = `local all = {} for _, key in ipairs(redis.call('KEYS', '*')) do
		all[#all + 1] = key all[#all + 1] = redis.call('DUMP', key) end return all`
	const restore = `redis.call('FLUSHDB') for i = 1, #ARGV, 2 do
		redis.call('RESTORE', ARGV[i], 0, ARGV[i + 1]) end`
	kept := s.do("EVAL", all, 0).([]any)
	return func() {
		s.t.Helper()
		s.do("EVAL", append([]any{restore, 0}, kept...)...)
	}
}

// redisFaults begin with harm, while every key is there, and end with mend, while readers and
// writers are busy.
var redisFaults = []struct {
	about string
	harm  func(*redisServer) (mend func())
}{
	{"it goes back", (*redisServer).save},
	{"it goes back again and again", againAndAgain},
	{"its databases are swapped", (*redisServer).copyAside},
	{"it restarts with old data", (*redisServer).snapshot},
	{"it restarts empty", func(s *redisServer) func() {
		os.Remove(s.file)
		s.restart()
		return func() {}
	}},
	{"it stops for a moment", func(s *redisServer) func() {
		s.signal(syscall.SIGSTOP)
		return func() { s.signal(syscall.SIGCONT) }
	}},
	{"it loses its keys", doing("FLUSHALL")},
	{"it loses its clients", doing("CLIENT KILL TYPE normal")},
	{"text at every key", doing("EVAL", `for _, key in ipairs(redis.call('KEYS', '*')) do
		redis.call('SET', key, 'garbage') end`, 0)},
	{"a Redis list at every key", doing("EVAL", `for _, key in ipairs(redis.call('KEYS', '*')) do
		redis.call('DEL', key) redis.call('RPUSH', key, 'x') end`, 0)},
	{"it is out of memory", func(s *redisServer) func() {
		s.do("CONFIG SET maxmemory 1")
		return func() { s.do("CONFIG SET maxmemory 0") }
	}},
	{"it is a replica", func(s *redisServer) func() {
		s.do("REPLICAOF 127.0.0.1 1")
		return func() { s.do("REPLICAOF NO ONE") }
	}},
}

// doing is a fault that is one command, before and after the writes.
func doing(command string, args ...any) func(*redisServer) (mend func()) {
	return func(s *redisServer) func() {
		s.do(command, args...)
		return func() { s.do(command, args...) }
	}
}

// againAndAgain goes back to the same moment until it is mended.
func againAndAgain(s *redisServer) (mend func()) {
	back, stop, stopped := s.save(), make(chan bool), make(chan bool)
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
				back()
			}
		}
	}()
	mend = sync.OnceFunc(func() {
		close(stop)
		<-stopped
	})
	// If the test fails before.
	s.t.Cleanup(mend)
	return mend
}

// startPostgres starts a PostgreSQL with an empty database, and returns the settings to connect
// to it.
func startPostgres(t testing.TB) (*server, *pgx.ConnConfig) {
	t.Helper()
	data := postgresFolder(t)
	runAsPostgres(t, need(t, "initdb", "postgresql"), "--pgdata="+data, "--no-sync",
		"--username=postgres", "--auth=trust")
	return runPostgres(t, data)
}

// startStandby starts a standby of a server.
func startStandby(t testing.TB, primary *pgx.ConnConfig) (*server, *pgx.ConnConfig) {
	t.Helper()
	data := postgresFolder(t)
	runAsPostgres(t, need(t, "pg_basebackup", "postgresql"), "--pgdata="+data, "--no-sync",
		"--write-recovery-conf", "--checkpoint=fast", "--dbname="+primary.ConnString())
	return runPostgres(t, data)
}

func runPostgres(t testing.TB, data string) (*server, *pgx.ConnConfig) {
	t.Helper()
	port := freePort(t)
	const form = "postgres://postgres@127.0.0.1:%s/postgres?sslmode=disable"
	config, err := pgx.ParseConfig(fmt.Sprintf(form, port))
	if err != nil {
		t.Fatal(err)
	}
	db := stdlib.OpenDB(*config)
	t.Cleanup(func() { db.Close() })
	s := &server{t: t, answers: func() bool { return db.Ping() == nil }}
	s.args = asPostgres(need(t, "postgres", "postgresql"), "-D", data, "-p", port, "-F",
		"-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=")
	s.start()
	t.Cleanup(func() { s.end(os.Interrupt) })
	return s, config
}

// postgresFolder is an empty folder of the user that PostgreSQL runs as.
func postgresFolder(t testing.TB) string {
	t.Helper()
	folder := t.TempDir()
	// It insists on this, and must be able to get there.
	enter, own := os.Chmod(filepath.Dir(folder), 0o755), os.Chmod(folder, 0o700)
	if os.Getuid() == 0 {
		id, err := osuser.Lookup("postgres")
		if err != nil {
			t.Fatal(err)
		}
		uid, _ := strconv.Atoi(id.Uid)
		gid, _ := strconv.Atoi(id.Gid)
		own = os.Chown(folder, uid, gid)
	}
	if err := cmp.Or(enter, own); err != nil {
		t.Fatal(err)
	}
	return folder
}

// asPostgres is a command that runs as another user if we are root, because PostgreSQL refuses
// root.
func asPostgres(command ...string) []string {
	if os.Getuid() != 0 {
		return command
	}
	as := []string{"setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"}
	return append(as, command...)
}

func runAsPostgres(t testing.TB, command ...string) {
	t.Helper()
	command = asPostgres(command...)
	said, err := exec.Command(command[0], command[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", command, err, said)
	}
}

// startPooler starts a pgbouncer in transaction mode before PostgreSQL, and returns the settings
// to use it.
func startPooler(t testing.TB) *pgx.ConnConfig {
	t.Helper()
	file, port := filepath.Join(t.TempDir(), "pgbouncer.ini"), freePort(t)
	d := services.database
	err := os.WriteFile(file, fmt.Appendf(nil, `[databases]
* = host=%s port=%d user='%s' password='%s'
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %s
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
`, d.Host, d.Port, d.User, d.Password, port), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	addr := "127.0.0.1:" + port
	s := &server{t: t, args: []string{need(t, "pgbouncer", "pgbouncer"), file}}
	if os.Getuid() == 0 {
		// It refuses to be root once it has read the file.
		s.args = slices.Insert(s.args, 1, "-u", "postgres")
	}
	s.answers = func() bool {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}
	s.start()
	t.Cleanup(func() { s.end(os.Kill) })
	return databaseAt(t, addr)
}

// newCertificate returns a file that has the certificate of net/http for 127.0.0.1, and its key.
func newCertificate(t testing.TB) (file string) {
	t.Helper()
	borrowed := httptest.NewTLSServer(nil)
	borrowed.Close()
	pair := borrowed.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	both := slices.Concat(
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
	file = filepath.Join(t.TempDir(), "certificate")
	if err := os.WriteFile(file, both, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// Part 3: the database in use, and the log

// setDatabase sets what new sessions of the database begin with, until the test ends. db keeps its
// session, so it can undo it.
func setDatabase(t testing.TB, db *sql.DB, settings ...string) {
	t.Helper()
	db.SetMaxOpenConns(1)
	alter := `ALTER DATABASE ` + services.run
	for _, setting := range settings {
		runSQL(t, db, alter+` SET `+setting)
	}
	t.Cleanup(func() {
		if _, err := db.Exec(alter + ` RESET ALL`); err != nil {
			t.Error(err)
		}
	})
}

// endConnections ends all others to the database, and waits until they have ended.
func endConnections(t testing.TB, db *sql.DB) {
	t.Helper()
	db.SetMaxOpenConns(1)
	// All are told to end before one is waited for.
	for _, wait := range []int{0, 5000} {
		runSQL(t, db, fmt.Sprintf(`SELECT pg_terminate_backend(pid, %d) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid()`, wait))
	}
}

// lockProperties locks the table, and counts the statements that wait for it.
func lockProperties(t testing.TB, db *sql.DB) (lock *sql.Tx, waiters func() int) {
	t.Helper()
	lock, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	// Before the pool is closed, which would wait for it.
	t.Cleanup(func() { lock.Rollback() })
	if _, err := lock.Exec(`LOCK TABLE properties`); err != nil {
		t.Fatal(err)
	}
	return lock, func() (n int) {
		err := db.QueryRow(`SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`).Scan(&n)
		if err != nil {
			t.Error(err)
		}
		return n
	}
}

// A pipe is a log that may be read or not.
type pipe struct{ reader, writer *os.File }

// runPiped starts the program with a pipe as its log.
func runPiped(t testing.TB) (*process, pipe) {
	t.Helper()
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		reader.Close()
		writer.Close()
	})
	addr := "127.0.0.1:" + freePort(t)
	p := runLogging(t, writer, nil, "-addr", addr)
	p.url = "http://" + addr
	p.api().isWell(t)
	return p, pipe{reader, writer}
}

// fill leaves no room in the pipe.
func (p pipe) fill(t testing.TB) {
	t.Helper()
	// The process has the same end of the pipe, so it must block again.
	fd := int(p.writer.Fd())
	syscall.SetNonblock(fd, true)
	defer syscall.SetNonblock(fd, false)
	for {
		if _, err := syscall.Write(fd, []byte("x")); err == syscall.EAGAIN {
			return
		}
	}
}

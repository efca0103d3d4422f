// checker_test.go: the promise, under load and faults: a GET that starts after a write was answered shows it.
//
// Each writer owns a listing whose price only grows. Each reader notes what was answered to all writers, then reads,
// and compares: a lower price, or no such listing, is stale. The first such read ends the test, and is printed:
//
//	listing 2: PUT 7 was answered by program 1 at 12:01:02.003; a GET from program 1 that began 3.1ms later showed 6
//	(Cache-Status: redis; hit; ttl=900)
//
// scripts/break removes a rule and shows that a test here notices.

package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/jackc/pgx/v5/stdlib"
)

// A checker keeps readers and writers busy at one program or more.
type checker struct {
	programs []*program
	running  sync.WaitGroup

	mu               sync.Mutex // guards what follows
	changed          *sync.Cond // signals that a side has resumed or that all is stopping
	readers, writers side
	stopping         bool
	newest           []write                        // of each listing. The last listing is written by SQL only.
	excuse           func(by, reader *program) bool // whether a read that begins now may miss what by has written
	reads, writes    int
	excused          int    // reads that missed a write and were excused
	wrong            string // the first stale read or failed request
}

// A side is all readers or all writers.
type side struct {
	paused bool // none of them begins anything
	busy   int  // how many of them are at it
}

// A write is one that was answered: a GET that begins later must show its price, or a higher one.
type write struct {
	by    *program // nil: SQL, past the programs
	price int
	at    time.Time
}

// check starts the readers and writers; stop ends them.
func check(t *testing.T, programs ...*program) *checker {
	t.Helper()
	c := &checker{programs: programs, excuse: announcedOnly}
	c.changed = sync.NewCond(&c.mu)
	owners := slices.Repeat(programs, 3)
	for _, by := range append(owners, nil) {
		e := programs[0].want(t, 201, "POST", "/properties/", titled("checked"))
		c.newest = append(c.newest, write{by, 1, time.Now()})
		if got := e.Header.Get("Location"); got != fmt.Sprintf("/properties/%d/", len(c.newest)) {
			t.Fatalf("Location: %s", got)
		}
	}
	for i, p := range owners {
		c.running.Go(func() { c.loop(&c.writers, func() { c.put(p, i) }) })
	}
	for i, p := range slices.Repeat(programs, 8) {
		n := i / len(programs)
		c.running.Go(func() { c.loop(&c.readers, func() { c.read(p, []string{"identity", "gzip"}[n%2], n/2) }) })
	}
	t.Cleanup(func() { c.end(t) })
	return c
}

// announcedOnly excuses a read that misses a write for which Redis has no invalidation yet, only an announcement on its
// way: one past the programs, or one of another program as long as that one owes Redis the invalidation. A program's
// own writes have no excuse.
func announcedOnly(by, reader *program) bool {
	if by == nil || by == reader {
		return by == nil
	}
	by.cache.mu.Lock()
	defer by.cache.mu.Unlock()
	return by.cache.owes
}

func (c *checker) loop(s *side, step func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		for s.paused && !c.stopping {
			c.changed.Wait()
		}
		if c.stopping {
			return
		}
		s.busy++
		c.mu.Unlock()
		step()
		c.mu.Lock()
		s.busy--
	}
}

// put writes the next price of a listing.
func (c *checker) put(p *program, listing int) {
	c.mu.Lock()
	price := c.newest[listing].price + 1
	c.mu.Unlock()
	body := fmt.Sprintf(`{"title":"checked","description":"","price":%d,"location":"Accra"}`, price)
	e, err := p.send("PUT", fmt.Sprintf("/properties/%d/", listing+1), body)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil || e.StatusCode != 200 {
		c.blame(fmt.Sprintf("listing %d: PUT %d to program %d failed: %v %s", listing+1, price, c.number(p), err, e.body))
		return
	}
	c.newest[listing] = write{p, price, time.Now()}
	c.writes++
}

// commit writes the last listing past the programs.
func (c *checker) commit(t *testing.T, db *sql.DB) {
	t.Helper()
	c.mu.Lock()
	id := len(c.newest)
	price := c.newest[id-1].price + 1
	c.mu.Unlock()
	if _, err := db.Exec(`UPDATE properties SET price = $1 WHERE id = $2`, price, id); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.newest[id-1] = write{nil, price, time.Now()}
}

// read looks once, and counts what it sees. Before that, it makes other GETs. Otherwise the readers would keep step,
// because those who share a look-up have its answer at the same time, and none would ask while a look-up runs.
func (c *checker) read(p *program, encoding string, others int) {
	for range others {
		p.send("GET", "/properties/1/", "")
	}
	missed, excused, err := c.look(p, encoding)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reads++
	switch {
	case err != nil:
		c.blame(fmt.Sprintf("a GET from program %d failed: %v", c.number(p), err))
	case excused:
		c.excused++
	case missed != "":
		c.blame(missed)
	}
}

// look makes a GET and returns a write that it missed, in words: one without an excuse, if there is one; else "".
func (c *checker) look(p *program, encoding string) (missed string, excused bool, err error) {
	c.mu.Lock()
	newest, excuse := slices.Clone(c.newest), c.excuse
	c.mu.Unlock()
	excuses := make([]bool, len(newest))
	for i, w := range newest {
		excuses[i] = excuse(w.by, p)
	}
	began := time.Now()
	e, err := p.send("GET", "/properties/", "", "Accept-Encoding", encoding)
	if err != nil {
		return "", false, err
	}
	shown, err := e.prices()
	for i, w := range newest {
		if err != nil || shown[i+1] >= w.price || missed != "" && excuses[i] {
			continue
		}
		what := fmt.Sprintf("PUT %d was answered by program %d", w.price, c.number(w.by))
		if w.by == nil {
			what = fmt.Sprintf("SQL had committed %d", w.price)
		}
		missed = fmt.Sprintf("listing %d: %s at %s; a GET from program %d that began %v later showed %d (Cache-Status: %s)", i+1, what,
			w.at.Format("15:04:05.000"), c.number(p), began.Sub(w.at).Round(time.Microsecond), shown[i+1], e.Header.Get("Cache-Status"))
		if excused = excuses[i]; !excused {
			break
		}
	}
	return missed, excused, err
}

// prices are those of a list, by id. A listing that isn't there has the price 0.
func (e exchange) prices() (map[int]int, error) {
	var body io.Reader = bytes.NewReader(e.body)
	var err error
	if e.Header.Get("Content-Encoding") == "gzip" {
		if body, err = gzip.NewReader(body); err != nil {
			return nil, err
		}
	}
	var list []property
	if err := json.NewDecoder(body).Decode(&list); err != nil || e.StatusCode != 200 {
		return nil, fmt.Errorf("status %d: %.200s (%w)", e.StatusCode, e.body, err)
	}
	prices := map[int]int{}
	for _, p := range list {
		var whole int
		fmt.Sscan(string(p.Price), &whole) // up to the point
		prices[int(p.ID)] = whole
	}
	return prices, nil
}

func (c *checker) number(p *program) int { return slices.Index(c.programs, p) + 1 }

// blame keeps the first thing that went wrong. The caller holds mu.
func (c *checker) blame(wrong string) {
	if c.wrong == "" {
		c.wrong = fmt.Sprintf("after %d reads and %d writes: %s", c.reads, c.writes, wrong)
	}
}

// judge ends the test if something went wrong.
func (c *checker) judge(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wrong != "" {
		t.Fatal(c.wrong)
	}
}

// wait lets n more reads and some writes happen.
func (c *checker) wait(t *testing.T, n int) {
	t.Helper()
	c.mu.Lock()
	reads, writes := c.reads+n, c.writes+len(c.newest)
	c.mu.Unlock()
	eventually(t, "there were reads and writes", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.reads >= reads && c.writes >= writes || c.wrong != ""
	})
	c.judge(t)
}

// pause lets a side begin nothing more and waits until it has ended what it began. resume ends that. While the writers
// pause, what the last one left in Redis is not taken away by another one.
func (c *checker) pause(t *testing.T, s *side) {
	t.Helper()
	c.set(&s.paused, true)
	eventually(t, "what was under way has ended", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return s.busy == 0
	})
}

func (c *checker) resume(s *side) { c.set(&s.paused, false) }

func (c *checker) set(flag *bool, value bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	*flag = value
	c.changed.Broadcast()
}

// recover waits until every program uses Redis and serves hits again. Call it while the writers pause: they can be so
// fast that no fill survives.
func (c *checker) recover(t *testing.T) {
	t.Helper()
	for _, p := range c.programs {
		eventually(t, "the cache is in use", p.trusted)
		c.hit(t, p)
	}
}

// hit waits for a hit that begins now or later. (Each of the 8 readers may have begun one before.)
func (c *checker) hit(t *testing.T, p *program) {
	t.Helper()
	hits := func() int64 { return p.cache.pages.requests[hit].Load() }
	before := hits()
	eventually(t, "there are hits", func() bool { return hits() > before+8 })
	c.judge(t)
}

// settle waits until every program shows every write that has been answered or committed: no excuse lasts. What takes
// a millisecond has a third of all patience.
func (c *checker) settle(t *testing.T) {
	t.Helper()
	for _, p := range c.programs {
		deadline := time.Now().Add(patience / 3)
		for {
			missed, excused, err := c.look(p, "identity")
			if missed == "" && err == nil {
				break
			}
			if err != nil || !excused || time.Now().After(deadline) {
				t.Fatal(cmp.Or(missed, fmt.Sprint(err)))
			}
		}
	}
}

// end ends the load.
func (c *checker) end(t *testing.T) {
	t.Helper()
	c.set(&c.stopping, true)
	ended := make(chan bool)
	go func() { c.running.Wait(); close(ended) }()
	receive(t, ended)
}

// stop ends the load and judges what it saw.
func (c *checker) stop(t *testing.T) {
	t.Helper()
	c.end(t)
	c.judge(t)
	t.Logf("%d reads, %d writes, %d excused reads", c.reads, c.writes, c.excused)
}

// race lets the readers and writers race with each other alone. Now and then the writers pause, because a page that they
// leave alone is hit.
func (c *checker) race(t *testing.T) {
	t.Helper()
	for range 10 {
		c.wait(t, 150)
		c.pause(t, &c.writers)
		c.recover(t)
		c.resume(&c.writers)
	}
	c.stop(t)
}

// One program, no faults. The queries are slowed down between their snapshot and their rows, where the races are.
func TestNeverStale(t *testing.T) {
	p := start(t, options{})
	p.countQueries(t)
	check(t, p).race(t)
}

// Two programs on one Redis: what one writes, the other shows.
func TestNeverStaleTwoInstances(t *testing.T) {
	a, b := start(t, options{}), startAnother(t, options{})
	a.countQueries(t)
	check(t, a, b).race(t)
}

// What isn't promised: between its COMMIT and its invalidation, a write shows in one view and not yet in another. So
// of two GETs at that time, the later one may show the older state. (The list is a regular register, not an atomic
// one.) That ends before the write is answered.
func TestBetweenCommitAndInvalidation(t *testing.T) {
	p := start(t, options{})
	p.want(t, 201, "POST", "/properties/", titled("old"))
	p.list(t, storedStatus)
	goOn := sync.OnceFunc(p.cache.mu.Unlock)
	defer goOn()
	p.cache.mu.Lock() // every invalidation waits: that of the write's signal, and that of its announcement
	write := make(chan exchange, 1)
	go func() {
		e, _ := p.send("PUT", "/properties/1/", titled("new"))
		write <- e
	}()
	eventually(t, "the row is committed", func() bool {
		return bytes.Contains(p.want(t, 200, "GET", "/properties/1/", "").body, []byte("new"))
	})
	if got := titles(p.list(t, hitStatus)); got != "old" {
		t.Errorf("before the invalidation the list has %q", got)
	}
	if len(write) > 0 {
		t.Error("the write was answered before its invalidation")
	}
	goOn()
	if e := receive(t, write); e.Response == nil || e.StatusCode != 200 {
		t.Errorf("PUT: %s", e.body)
	}
	if got := titles(p.list(t, storedStatus)); got != "new" {
		t.Errorf("after the write was answered the list has %q", got)
	}
}

// Two programs, and SQL that changes a row past them. Both show it soon, and what goes through them stays fresh. In
// every other round their own writers pause, so that no invalidation but the announcement's comes to help.
func TestNeverStaleBesideSQL(t *testing.T) {
	db := stdlib.OpenDB(*services.database)
	defer db.Close()
	c := check(t, start(t, options{}), startAnother(t, options{}))
	for round := range 20 {
		if round%2 == 0 {
			c.pause(t, &c.writers)
			c.recover(t)
		}
		c.commit(t, db)
		c.settle(t)
		c.resume(&c.writers)
		c.wait(t, 50)
	}
	c.stop(t)
}

// The network to Redis fails in every way it can. No read is stale, and no request fails. A fault begins while a page
// is in Redis, which the writes during the fault may not be able to delete. And nothing is announced: rule 3 must do
// without the help of rule 4, as behind a pooler.
func TestNeverStaleUnderNetworkFaults(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	p := start(t, options{redisURL: withHost(t, services.redisURL, network.addr)})
	if _, err := p.db.Exec(`ALTER TABLE properties DISABLE TRIGGER properties_announce`); err != nil {
		t.Fatal(err)
	}
	c := check(t, p)
	for f := refused; f <= slower; f++ {
		c.pause(t, &c.writers)
		c.recover(t)
		session := p.cache.session.Load()
		network.set(t, f)
		c.resume(&c.writers)
		c.wait(t, map[bool]int{false: 200, true: 20}[f == slow]) // slow: about 7 reads a second
		c.pause(t, &c.writers)
		network.set(t, healthy)
		c.recover(t)
		if kept := p.cache.session.Load() == session; kept != (f == slow) {
			t.Errorf("%s: the session was kept: %v", f, kept)
		}
		network.set(t, f)
		c.put(p, 0) // one write, alone: no other one owes an invalidation
		network.set(t, healthy)
		c.recover(t)
		c.settle(t)
		c.resume(&c.writers)
	}
	c.stop(t)
}

// Of two programs one is cut off from Redis. What the other one serves may be old only until the announcements of the
// missed writes arrive; what the one that is cut off serves is fresh.
func TestTwoInstancesOneCutOff(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	a := start(t, options{redisURL: withHost(t, services.redisURL, network.addr)})
	b := startAnother(t, options{})
	c := check(t, a, b)
	for _, f := range []fault{refused, swallow, mute, cut} {
		c.pause(t, &c.writers)
		c.recover(t)
		network.set(t, f)
		c.resume(&c.writers)
		c.wait(t, 300)
		c.pause(t, &c.writers)
		c.hit(t, b)
		c.put(a, 0) // one write, alone: no other one invalidates
		c.settle(t)
		network.set(t, healthy)
		c.recover(t)
		c.resume(&c.writers)
	}
	c.stop(t)
}

// Redis itself fails in every way it can: it stops, restarts with old data, loses its keys or its clients,
// has others' data at our keys, is out of memory, refuses writes.
func TestNeverStaleUnderRedisFaults(t *testing.T) {
	server := startRedis(t)
	p := start(t, options{redisURL: server.url})
	c := check(t, p)
	save := func() {
		c.pause(t, &c.writers)
		c.recover(t) // the page is there
		server.do("SAVE")
		c.resume(&c.writers)
		c.wait(t, 100)
	}
	put := func(command string) {
		for _, key := range []string{fenceKey, allPropertiesKey, pageKey("/properties/"), gzipKey("/properties/")} {
			server.do("EVAL", "redis.call('DEL', KEYS[1]) return redis.call("+command+")", 1, key)
		}
	}
	text, list := func() { put("'SET', KEYS[1], 'garbage'") }, func() { put("'RPUSH', KEYS[1], 'x'") }
	faults := []struct {
		about      string
		harm, mend func() // before and after writes
	}{
		{"stopped", func() { server.signal(syscall.SIGSTOP) }, func() { server.signal(syscall.SIGCONT) }},
		{"restarted with old data", func() { save(); server.kill() }, func() { server.start() }},
		{"restarted with old data between writes", save, func() { server.kill(); server.start() }},
		{"restarted empty", func() { server.kill(); os.Remove(server.snapshot) }, func() { server.start() }},
		{"flushed", func() { server.do("FLUSHALL") }, func() {}},
		{"without its clients", func() { server.do("CLIENT", "KILL", "TYPE", "normal") }, func() {}},
		{"text at every key", text, func() { c.recover(t); text() }},
		{"a list at every key", list, func() { c.recover(t); list() }},
		{"out of memory", func() { server.do("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "1") },
			func() { server.do("CONFIG", "SET", "maxmemory", "0") }},
		{"a read-only replica", func() { server.do("REPLICAOF", "127.0.0.1", "1") }, func() { server.do("REPLICAOF", "NO", "ONE") }},
	}
	for _, fault := range faults {
		t.Log(fault.about)
		fault.harm()
		c.wait(t, 300)
		c.pause(t, &c.writers)
		fault.mend()
		c.recover(t)
		c.resume(&c.writers)
		c.wait(t, 100)
	}
	c.stop(t)
}

// The one exception: Redis becomes a replica of one with older data, takes those over (a full resync), and is promoted
// again, while all connections live on. A program notices that with its next beat. Until then its reads may be stale,
// afterwards none is.
func TestNeverStaleAfterResync(t *testing.T) {
	server, other := startRedis(t), startRedis(t)
	other.copies(server) // the first replica changes the replication id, so that one comes before the program
	p := start(t, options{redisURL: server.url})
	c := check(t, p)
	for _, read := range []bool{false, true} { // whether anybody reads before the program notices
		c.pause(t, &c.writers)
		c.recover(t)
		other.copies(server) // the older data: they include a page
		c.resume(&c.writers)
		c.wait(t, 100)
		c.pause(t, &c.writers)
		c.recover(t)
		c.pause(t, &c.readers)
		session := p.cache.session.Load()
		server.copies(other)
		replaced := time.Now()
		c.mu.Lock()
		c.excuse = func(_, reader *program) bool { // 8 beats, because a beat may have to wait for a processor
			return reader.cache.session.Load() == session && time.Since(replaced) < 8*beatInterval
		}
		c.mu.Unlock()
		c.set(&c.readers.paused, !read)
		eventually(t, "the program notices", func() bool { c.judge(t); return p.cache.session.Load() != session })
		t.Logf("noticed after %v", time.Since(replaced))
		c.resume(&c.readers)
		c.recover(t)
		c.resume(&c.writers)
		c.wait(t, 100)
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

// startRedis needs a redis-server in PATH. With Docker there may be none on this machine.
func startRedis(t *testing.T) *redisServer {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("no redis-server in PATH to stop and kill: apt-get install redis-server (.ci/run does so)")
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
	s.process = exec.Command("redis-server", "--bind", "127.0.0.1", "--port", s.port, "--save", "",
		"--repl-diskless-sync-delay", "0", "--dir", filepath.Dir(s.snapshot))
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
func (s *redisServer) do(command string, args ...any) string {
	s.t.Helper()
	conn, err := redis.DialURL(s.url)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	reply, err := conn.Do(command, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return fmt.Sprintf("%s", reply)
}

// copies makes s a replica of the other server until it has all its data, and promotes it again.
func (s *redisServer) copies(other *redisServer) {
	s.t.Helper()
	s.do("REPLICAOF", "127.0.0.1", other.port)
	eventually(s.t, "the replica has the data", func() bool {
		return infoField(s.do("INFO", "replication"), "master_link_status") == "up"
	})
	s.do("REPLICAOF", "NO", "ONE")
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
	for p.cache.session.Load() != nil && p.cache.session.Load().IdleCount() > 0 {
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

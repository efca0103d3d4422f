// cache_test.go: both levels, and each rule of cache.go as an interleaving, step by step. What holds under
// load and faults is in checker_test.go.

package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gomodule/redigo/redis"
)

// keyspace returns Redis's counts of look-ups, of keys found and not found.
func keyspace(t *testing.T, conn redis.Conn) (hits, misses string) {
	t.Helper()
	info, err := redis.String(conn.Do("INFO", "stats"))
	if err != nil {
		t.Fatal(err)
	}
	return infoField(info, "keyspace_hits"), infoField(info, "keyspace_misses")
}

// A cold GET consults both levels and finds nothing; a warm one finds the page and asks no further; one
// without the page is served from all_properties. Each level consulted is one look-up in Redis's own count.
func TestLevels(t *testing.T) {
	p := start(t, options{rows: 3})
	p.redis.Do("CONFIG", "RESETSTAT")
	wantCounts := func(hits, misses string) {
		t.Helper()
		if h, m := keyspace(t, p.redis); h != hits || m != misses {
			t.Errorf("keyspace: %s hits and %s misses, want %s and %s", h, m, hits, misses)
		}
	}
	p.list(t, storedStatus)
	wantCounts("0", "2")
	p.list(t, hitStatus)
	wantCounts("1", "2")

	for key, ttl := range map[string]int{"all_properties": 3600, "page:/properties/": 900} {
		if left, err := redis.Int(p.redis.Do("TTL", key)); err != nil || left > ttl || left < ttl-60 {
			t.Errorf("TTL %s: %d (%v), want %d or a little less", key, left, err, ttl)
		}
	}
	if left, err := redis.Int(p.redis.Do("TTL", fenceKey)); err != nil || left != -1 {
		t.Errorf("TTL of the fence: %d (%v), want none", left, err)
	}

	p.redis.Do("DEL", "page:/properties/")
	queries := p.countQueries(t)
	p.list(t, storedStatus)
	if n := queries(); n != 0 {
		t.Errorf("%d queries, want the list from all_properties", n)
	}
	page, list := p.cache.pages.metrics(), p.cache.lists.metrics()
	if page["hits"] != 1 || page["misses"] != 2 || list["hits"] != 1 || list["misses"] != 1 {
		t.Errorf("levels: page %v, all_properties %v", page, list)
	}
}

// countQueries makes PostgreSQL itself count the queries of the list: a view takes the table's name, and
// whoever reads it advances a sequence. A second sequence counts those that ran while another one did.
func (p *program) countQueries(t *testing.T) (count func() int) {
	t.Helper()
	_, err := p.db.Exec(`
		CREATE SEQUENCE list_queries;
		CREATE SEQUENCE list_queries_at_once;
		CREATE FUNCTION count_query() RETURNS boolean LANGUAGE plpgsql AS $$
		BEGIN
			PERFORM nextval('list_queries');
			IF NOT pg_try_advisory_xact_lock(1) THEN
				PERFORM nextval('list_queries_at_once');
			END IF;
			PERFORM pg_sleep(0.005);
			RETURN true;
		END $$;
		ALTER TABLE properties RENAME TO property_rows;
		CREATE VIEW properties AS SELECT * FROM property_rows WHERE (SELECT count_query())`)
	if err != nil {
		t.Fatal(err)
	}
	return func() int { return p.sequence(t, "list_queries") }
}

func (p *program) sequence(t *testing.T, name string) (n int) {
	t.Helper()
	if err := p.db.QueryRow(`SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM ` + name).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// After a POST, a PUT and a DELETE was answered, the next GET shows it, at both levels. The signal sees to it, before
// any announcement.
func TestWriteThenRead(t *testing.T) {
	p := start(t, options{})
	runSQL(t, p.db, unannounced)
	for _, step := range []struct {
		status             int
		method, path, body string
		want               string
	}{
		{201, "POST", "/properties/", titled("a"), "a"},
		{201, "POST", "/properties/", titled("b"), "a, b"},
		{200, "PUT", "/properties/1/", titled("c"), "c, b"},
		{204, "DELETE", "/properties/2/", "", "c"},
	} {
		p.list(t, "redis")
		p.list(t, hitStatus)
		p.want(t, 200, "GET", "/properties/", "", "Accept-Encoding", "gzip")
		p.want(t, step.status, step.method, step.path, step.body)
		if left, err := redis.Int(p.redis.Do("EXISTS", allPropertiesKey, pageKey("/properties/"), gzipKey("/properties/"))); err != nil || left != 0 {
			t.Errorf("after %s: %d keys left (%v)", step.method, left, err)
		}
		if got := titles(p.list(t, storedStatus)); got != step.want {
			t.Errorf("after %s: %s, want %s", step.method, got, step.want)
		}
	}
}

// A gate holds up the program's list query after it has read the rows, which is the moment that all the races are
// about. reading receives when a query has read; it returns when release is sent to.
type gate struct{ reading, release chan struct{} }

// newGate returns a gate, and the option that puts it into a program.
func newGate() (gate, func(listQuery) listQuery) {
	g := gate{make(chan struct{}, 10), make(chan struct{}, 10)}
	return g, func(query listQuery) listQuery {
		return func(ctx context.Context) ([]property, error) {
			list, err := query(ctx)
			g.reading <- struct{}{}
			<-g.release
			return list, err
		}
	}
}

// get makes a GET of the list in the background.
func (p *program) get() <-chan exchange {
	got := make(chan exchange, 1)
	go func() {
		e, err := p.send("GET", "/properties/", "")
		if err != nil {
			e.body = []byte(err.Error())
		}
		got <- e
	}()
	return got
}

// Rule 1: a reader that read before the commit must not store after the invalidation. Nor may it if the fence is gone:
// Redis may have evicted it after a write.
func TestLateFillLosesToWrite(t *testing.T) {
	for about, write := range map[string]func(*program){
		"a write":          func(p *program) { p.want(t, 201, "POST", "/properties/", titled("new")) },
		"a commit in psql": func(p *program) { runSQL(t, p.db, inserting("new")); p.heard(t) },
		"an evicted fence": func(p *program) { runSQL(t, p.db, unannounced+`;`+inserting("new")); p.redis.Do("DEL", fenceKey) },
	} {
		t.Run(about, func(t *testing.T) {
			log := keepLog(t)
			gate, query := newGate()
			p := start(t, options{query: query})
			reader := p.get()
			receive(t, gate.reading)   // 1. the reader has read the old rows
			write(p)                   // 2. the writer commits and invalidates
			gate.release <- struct{}{} // 3. the reader wants to store
			e := receive(t, reader)
			if e.Header.Get("Cache-Status") != missStatus || string(e.body) != "[]\n" {
				t.Errorf("the reader has %s %s, want the old list, not stored", e.Header.Get("Cache-Status"), e.body)
			}
			if n, err := redis.Int(p.redis.Do("EXISTS", allPropertiesKey, pageKey("/properties/"))); err != nil || n != 0 {
				t.Fatalf("the late fill stored %d keys (%v)", n, err)
			}
			for _, key := range []string{allPropertiesKey, pageKey("/properties/")} {
				if n := log.count("fill discarded, because a write came", "key="+key); n != 1 {
					t.Errorf("the log says %d times that %s was discarded: %s", n, key, log)
				}
			}
			gate.release <- struct{}{}
			if got := titles(p.list(t, storedStatus)); got != "new" {
				t.Errorf("the next GET has %s", got)
			}
		})
	}
}

// EXEC succeeds even if one of its commands fails: then nothing counts as stored, and Redis is owed an invalidation.
func TestCommandFailsInExec(t *testing.T) {
	log := keepLog(t)
	gate, query := newGate()
	p := start(t, options{query: query})
	p.heard(t)
	reader := p.get()
	receive(t, gate.reading)
	p.redis.Do("RPUSH", pageKey("/properties/"), "somebody's")
	gate.release <- struct{}{}
	if e := receive(t, reader); e.Header.Get("Cache-Status") != missStatus {
		t.Errorf("the reader has %s", e.Header.Get("Cache-Status"))
	}
	gate.release <- struct{}{}
	eventually(t, "the next session starts", func() bool { return log.count("cache: Redis is in use", "invalidated=true") == 2 })
	p.list(t, storedStatus)
}

// heard waits until the program has heard of all commits so far, and of its own start.
func (p *program) heard(t *testing.T) {
	t.Helper()
	transaction := rand.Text()
	runSQL(t, p.db, `NOTIFY properties, '`+transaction+`'`)
	eventually(t, "it is heard", func() bool {
		n, err := redis.Int(p.redis.Do("EXISTS", "properties:invalidated:"+transaction))
		return err == nil && n == 1
	})
}

// A logbook is what the program has logged, line by line.
type logbook struct {
	mu    sync.Mutex
	lines []string
}

// keepLog keeps the log until the test ends.
func keepLog(t *testing.T) *logbook {
	l, before := new(logbook), slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(l, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	return l
}

func (l *logbook) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(line))
	return len(line), nil
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return "\n" + strings.Join(l.lines, "")
}

// count returns how many lines hold all parts.
func (l *logbook) count(parts ...string) (n int) {
	for line := range strings.Lines(l.String()) {
		if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
			n++
		}
	}
	return n
}

// waits reports whether a call of key is to begin after the one that runs.
func (l *level) waits(key string) bool {
	g, ok := l.groups.Load(key)
	if !ok {
		return false
	}
	g.(*group).mu.Lock()
	defer g.(*group).mu.Unlock()
	return g.(*group).next != nil
}

// Rule 2: a reader that asks after the write must not share a load that began before it.
func TestLateJoinerGetsTheNextLoad(t *testing.T) {
	gate, query := newGate()
	p := start(t, options{query: query})

	early := p.get()
	receive(t, gate.reading)                              // 1. the early reader's load has read the old rows
	p.want(t, 201, "POST", "/properties/", titled("new")) // 2. the write is answered
	late := p.get()                                       // 3. the late reader asks, while that load runs
	eventually(t, "the late reader waits", func() bool {
		return p.cache.pages.waits(pageKey("/properties/"))
	})
	gate.release <- struct{}{}
	if e := receive(t, early); string(e.body) != "[]\n" {
		t.Errorf("the early reader has %s", e.body)
	}
	receive(t, gate.reading)
	gate.release <- struct{}{}
	if e := receive(t, late); !bytes.Contains(e.body, []byte("new")) {
		t.Errorf("the late reader has %s, want the new row", e.body)
	}
}

// Rule 3: an invalidation that never reached Redis leaves old data there. It is not served: neither while
// Redis is away nor when it is back.
func TestLostInvalidation(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	p := start(t, options{redisURL: withHost(t, services.redisURL, network.addr)})
	runSQL(t, p.db, unannounced)
	p.heard(t)
	p.list(t, storedStatus)

	network.set(t, swallow)
	p.want(t, 201, "POST", "/properties/", titled("new"))
	if old, err := redis.String(p.redis.Do("GET", allPropertiesKey)); err != nil || old != "[]\n" {
		t.Fatalf("the DEL was to be lost; Redis has %q (%v)", old, err)
	}
	if got := titles(p.list(t, bypassStatus)); got != "new" {
		t.Errorf("while Redis is away: %q", got)
	}
	network.set(t, healthy)
	eventually(t, "the cache is trusted", p.trusted)
	if got := titles(p.list(t, storedStatus)); got != "new" {
		t.Errorf("when Redis is back: %q", got)
	}
	p.list(t, hitStatus)
}

// Whatever lies at our keys that we didn't put there is not served, and is gone soon.
func TestGarbageInRedis(t *testing.T) {
	page, list := pageKey("/properties/"), allPropertiesKey
	tests := []struct {
		about   string
		command []any
	}{
		{"text for the list", []any{"SET", list, "garbage"}},
		{"nothing for the list", []any{"SET", list, ""}},
		{"half a list", []any{"SET", list, `[{"id":1,`}},
		{"another JSON value for the list", []any{"SET", list, `{}`}},
		{"a Redis list for the list", []any{"RPUSH", list, "x"}},
		{"text for the page", []any{"SET", page, "garbage"}},
		{"a Redis list for the page", []any{"RPUSH", page, "x"}},
		{"a page with another body", []any{"HSET", page, "id", "x", "header", `{"Etag":["\"x\""]}`, "body", "[]"}},
		{"a page without a body", []any{"HSET", page, "id", "x"}},
		{"a page with broken headers", []any{"HSET", page, "id", "x", "header", "{", "body", "[]"}},
		{"a page of another form", []any{"HSET", page, "x", "y"}},
		{"a list for the fence", []any{"RPUSH", fenceKey, "x"}},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			p := start(t, options{rows: 1})
			p.redis.Do("DEL", test.command[1])
			if _, err := p.redis.Do(test.command[0].(string), test.command[1:]...); err != nil {
				t.Fatal(err)
			}
			if got := p.list(t, "redis"); len(got) != 1 {
				t.Errorf("the list has %d rows", len(got))
			}
			p.want(t, 201, "POST", "/properties/", titled("new"))
			eventually(t, "the cache is used again", func() bool {
				e := p.want(t, 200, "GET", "/properties/", "")
				if !bytes.Contains(e.body, []byte("new")) {
					t.Fatalf("stale: %s", e.body)
				}
				return strings.HasPrefix(e.Header.Get("Cache-Status"), hitStatus)
			})
		})
	}
}

// What makes an instance owe Redis an invalidation, and what doesn't: then the keys that others have filled stay.
func TestDebt(t *testing.T) {
	server := startRedis(t)
	network := newProxy(t, hostPort(t, server.url))
	const page, list = "page:/properties/", "all_properties"
	set := func(f fault) func(*program) { return func(*program) { network.set(t, f) } }
	do := func(command string, args ...any) func(*program) {
		return func(*program) { server.do(command, args...) }
	}
	nothing := func(*program) {}
	tests := []struct {
		about      string
		harm, mend func(*program)
		owes       bool
	}{
		{"a slow line", set(slower), set(healthy), false},
		{"a hung line", set(swallow), set(healthy), false},
		{"connections that Redis ends", do("CLIENT", "KILL", "TYPE", "normal"), nothing, false},
		{"maxclients", func(p *program) {
			admin := dialRedis(t, server.url)
			admin.Do("CONFIG", "SET", "maxclients", 1)
			for pool := p.cache.session.Load(); pool.IdleCount() > 0; {
				t.Cleanup(func(c redis.Conn) func() { return func() { c.Close() } }(pool.Get()))
			}
			eventually(t, "it is noticed", func() bool { p.list(t, "redis"); return !p.trusted() })
			admin.Do("CONFIG", "SET", "maxclients", 1000)
		}, nothing, false},
		{"an invalidation that failed", func(p *program) {
			network.set(t, swallow)
			p.want(t, 200, "PUT", "/properties/1/", titled("new"))
		}, set(healthy), true},
		{"an invalidation during a bypass", func(p *program) {
			network.set(t, refused)
			eventually(t, "it is noticed", func() bool { p.list(t, "redis"); return !p.trusted() })
			p.want(t, 200, "PUT", "/properties/1/", titled("new"))
		}, set(healthy), true},
		{"garbage", func(p *program) { server.do("DEL", page); server.do("SET", list, "garbage") }, nothing, true},
		{"another type", func(p *program) { server.do("DEL", page); server.do("RPUSH", page, "x") }, nothing, true},
		{"a restart with old data", func(*program) { server.do("SAVE"); server.kill(); server.start() }, nothing, true},
		{"a replica for a moment", func(*program) {
			server.do("REPLICAOF", "127.0.0.1", "1")
			server.do("REPLICAOF", "NO", "ONE")
		}, nothing, true},
		{"a replica", do("REPLICAOF", "127.0.0.1", "1"), do("REPLICAOF", "NO", "ONE"), true},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			log := keepLog(t)
			p := start(t, options{rows: 1, redisURL: withHost(t, server.url, network.addr)})
			eventually(t, "it listens", func() bool { return log.count("announcements are heard") == 1 }) // after the start's own announcement
			runSQL(t, p.db, unannounced)
			p.want(t, 200, "GET", "/properties/", "", "Accept-Encoding", "gzip") // fills a key that the harm leaves alone
			p.list(t, storedStatus)
			session := p.cache.session.Load()
			test.harm(p)
			p.list(t, "redis")
			eventually(t, "the session ends", func() bool { return p.cache.session.Load() != session })
			test.mend(p)
			eventually(t, "the next one starts", p.trusted)
			if n, err := redis.Int(dialRedis(t, server.url).Do("EXISTS", gzipKey("/properties/"))); err != nil || (n == 0) != test.owes {
				t.Errorf("the key exists: %d (%v), want it owed an invalidation: %v: %s", n, err, test.owes, log)
			}
		})
	}
}

// Why Redis is bypassed is named once in the log, and in /healthz.
func TestWhyBypassed(t *testing.T) {
	server := startRedis(t)
	user := []any{"ACL", "SETUSER", "weak", "on", ">secret", "~*", "+@all", "-@dangerous"}
	tests := []struct {
		about, login string
		harm, mend   []any
		why          string
	}{
		{"out of memory", "", []any{"CONFIG", "SET", "maxmemory", "1"}, []any{"CONFIG", "SET", "maxmemory", "0"}, "OOM "},
		{"read-only", "", []any{"REPLICAOF", "127.0.0.1", "1"}, []any{"REPLICAOF", "NO", "ONE"}, "READONLY "},
		{"a user without INFO", "weak:secret@", user, []any{"ACL", "SETUSER", "weak", "+info"}, "NOPERM "},
		{"a wrong password", "weak:wrong@", user, []any{"ACL", "SETUSER", "weak", ">wrong", "+info"}, "WRONGPASS "},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			log := keepLog(t)
			server.do(test.harm[0].(string), test.harm[1:]...)
			p := start(t, options{redisURL: strings.Replace(server.url, "//", "//"+test.login, 1)})
			for range 3 {
				p.cache.beat()
				p.list(t, bypassStatus)
			}
			if n := log.count("cache: Redis is bypassed", "why=\""+test.why); n != 1 {
				t.Errorf("the log says it %d times: %s", n, log)
			}
			if e := p.want(t, 200, "GET", "/healthz", ""); !bytes.Contains(e.body, []byte(`"cache":"bypassed: `+test.why)) || !bytes.Contains(e.body, []byte(`"redis":"up"`)) {
				t.Errorf("/healthz: %s", e.body)
			}
			server.do(test.mend[0].(string), test.mend[1:]...)
			p.warm(t)
		})
	}
}

// A Redis that closes idle connections costs no session, also after a burst that filled the pool.
func TestIdleConnections(t *testing.T) {
	server := startRedis(t)
	server.do("CONFIG", "SET", "timeout", "1")
	p := start(t, options{rows: 1, redisURL: server.url})
	p.list(t, storedStatus)
	session := p.cache.session.Load()
	burst := make([]redis.Conn, 8)
	for i := range burst {
		burst[i] = session.Get()
	}
	for _, conn := range burst {
		conn.Close()
	}
	eventually(t, "the idle ones are closed", func() bool {
		conn, err := redis.DialURL(server.url)
		if err != nil {
			return false
		}
		defer conn.Close()
		clients, err := redis.String(conn.Do("CLIENT", "LIST"))
		return err == nil && strings.Count(clients, "\n") <= 2 // the one that each beat uses, and conn
	})
	p.list(t, hitStatus)
	server.do("DEL", pageKey("/properties/"), allPropertiesKey)
	p.list(t, storedStatus) // uses a connection for each level
	if p.cache.session.Load() != session {
		t.Error("the session has ended")
	}
}

// Bursts on the metrics and /healthz, under Redis's limit of clients, cost neither hits nor the session.
func TestBurstUnderMaxclients(t *testing.T) {
	server := startRedis(t)
	server.do("CONFIG", "SET", "maxclients", 25)
	p := start(t, options{rows: 1, redisURL: server.url})
	p.list(t, storedStatus)
	session := p.cache.session.Load()
	var burst sync.WaitGroup
	for i := range 200 {
		burst.Go(func() {
			for range 5 {
				path := []string{"/cache/metrics/", "/healthz"}[i%2]
				if e, err := p.send("GET", path, ""); err != nil || bytes.Contains(e.body, []byte("null")) || bytes.Contains(e.body, []byte("bypassed: ")) {
					t.Errorf("%s: %v %s", path, err, e.body)
				}
			}
		})
	}
	for range 50 {
		p.list(t, hitStatus)
	}
	burst.Wait()
	if p.cache.session.Load() != session {
		t.Error("the session has ended")
	}
}

// A line of 5 MB/s carries a list of 10,000 listings: to Redis, and to another instance.
func TestNarrowLine(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	o := options{rows: 10000, redisURL: withHost(t, services.redisURL, network.addr)}
	a, b := start(t, o), startAnother(t, o)
	sessions := [2]*redis.Pool{a.cache.session.Load(), b.cache.session.Load()}
	network.set(t, narrow)
	a.list(t, storedStatus)
	b.list(t, hitStatus)
	a.list(t, hitStatus)
	if sessions != [2]*redis.Pool{a.cache.session.Load(), b.cache.session.Load()} {
		t.Error("a session has ended")
	}
}

// One transaction invalidates once, however often it is told.
func TestInvalidateOnce(t *testing.T) {
	p := start(t, options{})
	for i, want := range []bool{true, false, false} {
		p.list(t, "redis")
		fence, _ := redis.String(p.redis.Do("GET", fenceKey))
		first, err := invalidateOnce(p.redis, "a test's")
		after, _ := redis.String(p.redis.Do("GET", fenceKey))
		left, _ := redis.Int(p.redis.Do("EXISTS", allPropertiesKey, pageKey("/properties/")))
		if err != nil || first != want || (fence != after) != want || (left == 0) != want {
			t.Errorf("time %d: %v (%v), the fence was %s and is %s, %d keys are left", i+1, first, err, fence, after, left)
		}
	}
	if ttl, err := redis.Int(p.redis.Do("TTL", "properties:invalidated:a test's")); err != nil || ttl < 1 || ttl > 60 {
		t.Errorf("it is remembered for %d s (%v), want a minute", ttl, err)
	}
}

// A page of an instance whose clock is ahead is not of a negative age.
func TestClockAhead(t *testing.T) {
	p := start(t, options{})
	e := &entry{body: []byte("[]\n"), header: http.Header{"Etag": {etag([]byte("[]\n"))}, "Date": {time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)}}}
	p.cache.storePage(p.redis, pageKey("/properties/"), e, 15*time.Minute)
	p.redis.Do("")
	p.list(t, hitStatus)
	if got := p.want(t, 200, "GET", "/properties/", "").Header; got.Get("Age") != "0" || got.Get("Cache-Status") != hitStatus+"900" {
		t.Errorf("Age: %s, Cache-Status: %s", got.Get("Age"), got.Get("Cache-Status"))
	}
}

// The log tells the story: one line for each fact, none for a hit.
func TestLog(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	log := keepLog(t)
	p := start(t, options{redisURL: withHost(t, services.redisURL, network.addr)})
	lines := 0
	say := func(about string, want ...string) { // since the last call
		t.Helper()
		var got []string
		eventually(t, about+" is logged", func() bool {
			got = strings.Split(strings.TrimSpace(log.String()), "\n")[lines:]
			return len(got) >= len(want)
		})
		lines += len(got)
		if len(got) != len(want) {
			t.Errorf("%s: %d lines, want %d:\n%s", about, len(got), len(want), strings.Join(got, "\n"))
		}
		for _, part := range want {
			if !slices.ContainsFunc(got, func(line string) bool { return strings.Contains(line, part) }) {
				t.Errorf("%s: no line with %s:\n%s", about, part, strings.Join(got, "\n"))
			}
		}
	}
	eventually(t, "it listens", func() bool { return log.count("announcements are heard: the commits of others invalidate") == 1 })
	say("start", `msg="cache: Redis is in use" invalidated=true`, "announcements are heard", "cache: invalidated\" transaction=listen@")
	p.list(t, storedStatus)
	say("a cold GET", `msg="cache: filled" key=all_properties bytes=3 took=`, `msg="cache: filled" key=page:/properties/ bytes=3 took=`)
	for range 10 {
		p.list(t, hitStatus)
	}
	say("hits")
	runSQL(t, p.db, inserting("a"))
	p.heard(t)
	say("a commit in psql, and another announcement", "cache: invalidated", "cache: invalidated")
	p.want(t, 200, "PUT", "/properties/1/", titled("b"))
	p.want(t, 204, "DELETE", "/properties/1/", "")
	p.heard(t)
	say("writes", "property saved", "cache: invalidated", "property deleted", "cache: invalidated", "cache: invalidated")
	network.set(t, refused)
	eventually(t, "it is noticed", func() bool { return !p.trusted() })
	p.list(t, bypassStatus)
	say("no Redis", `level=WARN msg="cache: Redis is bypassed" why="Redis does not answer"`)
	p.want(t, 201, "POST", "/properties/", titled("c"))
	p.want(t, 201, "POST", "/properties/", titled("d"))
	say("writes without Redis", "property saved", "property saved", "cache: Redis is bypassed, and owed an invalidation")
	network.set(t, healthy)
	eventually(t, "the next session starts", p.trusted)
	say("Redis again", `"cache: Redis is in use" invalidated=true`)
}

// Two instances share what is in Redis: what one fills the other hits, and what one writes both show. One that starts
// owes an invalidation: it may have died between its COMMIT and the invalidation.
func TestTwoInstances(t *testing.T) {
	a := start(t, options{rows: 2})
	runSQL(t, a.db, unannounced)
	a.list(t, storedStatus)
	b := startAnother(t, options{})
	a.list(t, storedStatus)
	b.list(t, hitStatus)
	b.list(t, hitStatus)
	b.want(t, 201, "POST", "/properties/", titled("new"))
	if n := len(a.list(t, storedStatus)); n != 3 {
		t.Errorf("%d rows, want 3", n)
	}
	if n := len(b.list(t, hitStatus)); n != 3 {
		t.Errorf("%d rows, want 3", n)
	}
}

// Only a 200 without a cookie is stored, and the view sees nothing that isn't in the key.
func TestCachePage(t *testing.T) {
	tests := []struct {
		about  string
		view   http.HandlerFunc
		status int
		stored bool
	}{
		{"an answer", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") }, 200, true},
		{"headers", func(w http.ResponseWriter, r *http.Request) { w.Header().Set("X-Kind", "of its own") }, 200, true},
		{"nothing", func(w http.ResponseWriter, r *http.Request) {}, 200, true},
		{"a cookie", func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Set-Cookie", "a=b") }, 500, false},
		{"an error", func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusServiceUnavailable) }, 500, false},
		{"a redirect", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/", http.StatusFound) }, 500, false},
		{"a part", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(206) }, 500, false},
		{"an error with a tag", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"a"`)
			w.WriteHeader(http.StatusNotFound)
		}, 500, false},
		{"a panic", func(w http.ResponseWriter, r *http.Request) { panic("in a view") }, 500, false},
		{"a part, then a panic", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "part"); panic("in a view") }, 500, false},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			p := start(t, options{})
			p.url = newServer(t, p.cache.cachePage(15*time.Minute, func(w http.ResponseWriter, r *http.Request) error {
				if r.URL.RawQuery != "" || len(r.Header) > 0 || r.Host != "" || r.RemoteAddr != "" || r.Method != "GET" {
					t.Errorf("the view sees %+v", r)
				}
				if body, err := io.ReadAll(r.Body); err != nil || len(body) > 0 {
					t.Errorf("the view reads %q (%v)", body, err)
				}
				test.view(w, r)
				return nil
			}))
			first := p.want(t, test.status, "GET", "/properties/?a=b", "", "Cookie", "c=d")
			second := p.want(t, test.status, "GET", "/properties/?a=c", "", "Authorization", "Bearer e")
			p.want(t, test.status, "GET", "/properties/", "", "If-None-Match", `"a"`) // a tag that no page of ours has
			if got := strings.HasPrefix(second.Header.Get("Cache-Status"), hitStatus); got != test.stored {
				t.Errorf("stored: %v, want %v (%s)", got, test.stored, second.Header.Get("Cache-Status"))
			}
			for _, name := range []string{"X-Kind", "Set-Cookie", "Content-Type", "Location", "Etag", "Content-Length"} {
				if a, b := first.Header.Get(name), second.Header.Get(name); a != b {
					t.Errorf("%s: %q, then %q", name, a, b)
				}
			}
			if !bytes.Equal(first.body, second.body) {
				t.Errorf("body %q, then %q", first.body, second.body)
			}
			if keys, err := redis.Strings(p.redis.Do("KEYS", "page:*")); err != nil || len(keys) > 1 || len(keys) == 1 && keys[0] != "page:/properties/" {
				t.Errorf("keys: %v (%v)", keys, err)
			}
		})
	}
}

// An error of a view goes to all who wait for it, each with an answer of their own.
func TestWaitersShareAnError(t *testing.T) {
	p := start(t, options{})
	arrived := make(chan struct{}, 100)
	resume := make(chan struct{})
	p.url = newServer(t, p.cache.cachePage(time.Minute, func(w http.ResponseWriter, r *http.Request) error {
		arrived <- struct{}{}
		<-resume
		w.Header().Set("ETag", `"a part"`)
		return &problem{Status: http.StatusTeapot, Detail: "No coffee."}
	}))
	waiting := []<-chan exchange{p.get()}
	receive(t, arrived)
	for range 8 {
		waiting = append(waiting, p.get())
	}
	eventually(t, "some wait for the next load", func() bool {
		return p.cache.pages.waits(pageKey("/properties/"))
	})
	close(resume)
	for _, got := range waiting {
		if e := receive(t, got); e.Response == nil || e.StatusCode != http.StatusTeapot || e.Header.Get("ETag") != "" {
			t.Errorf("%+v: %s", e.Response, e.body)
		} else {
			checkProblem(t, e)
		}
	}
}

// The headers of GET /properties/, and of the conditional GETs and HEADs that come back with them.
func TestConditionalRequests(t *testing.T) {
	p := start(t, options{rows: 3})
	p.list(t, storedStatus)
	e := p.want(t, 200, "GET", "/properties/", "")
	tag := e.Header.Get("ETag")
	if strings.HasPrefix(tag, "W/") || len(tag) < 10 {
		t.Errorf("ETag: %s, want a strong one", tag)
	}
	for name, want := range map[string]string{
		"Content-Type": "application/json", "Vary": "Accept-Encoding", "Cache-Control": "no-cache",
		"Age": e.Header.Get("Age"), "Content-Length": fmt.Sprint(len(e.body)), "Content-Encoding": "",
	} {
		if got := e.Header.Get(name); got != want || name == "Age" && got == "" {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	tests := []struct {
		about   string
		headers []string
		status  int
	}{
		{"the tag", []string{"If-None-Match", tag}, 304},
		{"the tag, weak", []string{"If-None-Match", "W/" + tag}, 304},
		{"a list with the tag", []string{"If-None-Match", `"a", ` + tag}, 304},
		{"any", []string{"If-None-Match", "*"}, 304},
		{"another tag", []string{"If-None-Match", `"a"`}, 200},
		{"no tag at all", []string{"If-None-Match", "a"}, 200},
		{"the tag, for gzip", []string{"If-None-Match", tag, "Accept-Encoding", "gzip"}, 200},
		{"If-Match is not ours to judge", []string{"If-Match", `"a"`}, 200},
		{"nor with the tag", []string{"If-Match", `"a"`, "If-None-Match", tag}, 304},
		{"a range is ignored", []string{"Range", "bytes=0-1"}, 200},
		{"a range is ignored, with another tag", []string{"Range", "bytes=0-1", "If-None-Match", `"a"`}, 200},
		{"a date is ignored", []string{"If-Modified-Since", "Fri, 01 Jan 2100 00:00:00 GMT"}, 200},
		{"an unmet date is ignored", []string{"If-Unmodified-Since", "Thu, 01 Jan 1970 00:00:00 GMT"}, 200},
	}
	for _, test := range tests {
		for _, method := range []string{"GET", "HEAD"} {
			t.Run(method+" "+test.about, func(t *testing.T) {
				got := p.want(t, test.status, method, "/properties/", "", test.headers...)
				if !strings.HasPrefix(got.Header.Get("Cache-Status"), "redis; ") || got.Header.Get("Vary") != "Accept-Encoding" || got.Header.Get("ETag") == "" {
					t.Errorf("headers: %v", got.Header)
				}
				empty := test.status == 304 || method == "HEAD"
				if empty != (len(got.body) == 0) {
					t.Errorf("a body of %d bytes", len(got.body))
				}
				gzipped := got.Header.Get("Content-Encoding") != ""
				if length := got.Header.Get("Content-Length"); test.status == 200 && !gzipped && length != fmt.Sprint(len(e.body)) {
					t.Errorf("Content-Length: %s, want %d", length, len(e.body))
				}
			})
		}
	}
}

// Who accepts gzip gets it, with a tag of its own, and it is the same list.
func TestGzip(t *testing.T) {
	p := start(t, options{rows: 3})
	plain := p.want(t, 200, "GET", "/properties/", "")
	for range 2 {
		zipped := p.want(t, 200, "GET", "/properties/", "", "Accept-Encoding", "gzip")
		if zipped.Header.Get("Content-Encoding") != "gzip" || zipped.Header.Get("ETag") == plain.Header.Get("ETag") {
			t.Errorf("headers: %v", zipped.Header)
		}
		r, err := gzip.NewReader(bytes.NewReader(zipped.body))
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(r); err != nil || !bytes.Equal(body, plain.body) {
			t.Errorf("unzipped: %.100s (%v)", body, err)
		}
		p.want(t, 304, "GET", "/properties/", "", "Accept-Encoding", "gzip", "If-None-Match", zipped.Header.Get("ETag"))
	}
}

func TestAcceptsGzip(t *testing.T) {
	tests := []struct {
		header string
		want   bool
	}{
		{"", false},
		{"gzip", true},
		{"GZIP", true},
		{"deflate, gzip, br", true},
		{"deflate,gzip;q=0.5", true},
		{"gzip;q=1.0", true},
		{"gzip ; q=0.001", true},
		{"gzip;q=0", false},
		{"gzip;q=0.000", false},
		{"gzip;Q=0", false},
		{"gzip;q=nonsense", false},
		{"gzip;q=", false},
		{"*", true},
		{"*;q=0", false},
		{"br, *;q=0.1", true},
		{"gzip;q=0, *", false},
		{"identity", false},
		{"identity;q=1, gzip;q=0.5", false},
		{"identity;q=0.5, gzip;q=0.5", true},
		{"identity;q=0, *", true},
		{"gzipped", false},
		{"br", false},
		{",,", false},
	}
	for _, test := range tests {
		if got := acceptsGzip(http.Header{"Accept-Encoding": {test.header}}); got != test.want {
			t.Errorf("%q: %v", test.header, got)
		}
	}
	if !acceptsGzip(http.Header{"Accept-Encoding": {"br", "gzip"}}) {
		t.Error("the second header line is not read")
	}
}

// A stampede on a cold cache costs one query.
func TestStampede(t *testing.T) {
	p := start(t, options{rows: 10})
	queries := p.countQueries(t)
	const clients = 500
	failed := make(chan error, clients)
	for range clients {
		go func() {
			e, err := p.send("GET", "/properties/", "")
			if err == nil && (e.StatusCode != 200 || len(e.body) < 1000) {
				err = fmt.Errorf("status %d: %.100s", e.StatusCode, e.body)
			}
			failed <- err
		}()
	}
	for range clients {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	if n := queries(); n != 1 {
		t.Errorf("%d queries, want 1", n)
	}
	// Each is counted by its outcome, and those who shared a look-up as coalesced besides.
	if m := p.cache.pages.metrics(); m["misses"] < 1 || m["hits"]+m["misses"] != clients || m["bypassed"] != 0 || m["coalesced"] < clients/2 {
		t.Errorf("page: %+v", m)
	}
}

// While Redis is away, PostgreSQL sees one list query at a time, and every client has its answer.
func TestOutage(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	p := start(t, options{rows: 10, redisURL: withHost(t, services.redisURL, network.addr)})
	queries := p.countQueries(t)
	network.set(t, refused)
	const clients, each = 64, 10
	failed := make(chan error, clients)
	for range clients {
		go func() {
			for range each {
				if e, err := p.send("GET", "/properties/", ""); err != nil || e.StatusCode != 200 {
					failed <- fmt.Errorf("status %v: %w", e.Response, err)
					return
				}
			}
			failed <- nil
		}()
	}
	for range clients {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	n, atOnce := queries(), p.sequence(t, "list_queries_at_once")
	t.Logf("%d requests cost %d queries", clients*each, n)
	if atOnce != 0 {
		t.Errorf("%d queries ran while another one did", atOnce)
	}
	if n > clients*each/2 {
		t.Errorf("%d queries for %d requests: they do not share", n, clients*each)
	}
	network.set(t, healthy)
	eventually(t, "hits are back", func() bool {
		return strings.HasPrefix(p.want(t, 200, "GET", "/properties/", "").Header.Get("Cache-Status"), hitStatus)
	})
}

// A hung Redis delays those who wait for it at that moment; whoever comes after doesn't ask it.
func TestHungRedis(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	p := start(t, options{rows: 1, redisURL: withHost(t, services.redisURL, network.addr)})
	p.list(t, storedStatus)
	network.set(t, swallow)
	p.list(t, bypassStatus) // this one has waited
	for range 20 {
		p.list(t, bypassStatus)
		if p.cache.session.Load() != nil {
			t.Error("a later request may ask Redis")
		}
	}
}

// A client that leaves neither fails nor delays those who wait for the same look-up.
func TestClientLeaves(t *testing.T) {
	gate, query := newGate()
	p := start(t, options{rows: 1, query: query})
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		r, _ := http.NewRequestWithContext(ctx, "GET", p.url+"/properties/", nil)
		_, err := client.Do(r)
		left <- err
	}()
	receive(t, gate.reading)
	stays := p.get()
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	gate.release <- struct{}{} // the load that it started goes on: it fills all_properties and the page
	if e := receive(t, stays); e.Response == nil || e.StatusCode != 200 {
		t.Errorf("the one who stayed: %s", e.body)
	}
	p.list(t, hitStatus)
}

// A load that panics is an error for those who waited for it; the key works at the next request.
func TestPanicInLoad(t *testing.T) {
	var panics atomic.Bool
	p := start(t, options{rows: 1, query: func(query listQuery) listQuery {
		return func(ctx context.Context) ([]property, error) {
			if panics.Load() {
				panic("in a load")
			}
			return query(ctx)
		}
	}})
	panics.Store(true)
	checkProblem(t, p.want(t, 500, "GET", "/properties/", ""))
	panics.Store(false)
	p.list(t, storedStatus)
	p.list(t, hitStatus)
}

// A client has its answer within 5 s, whatever a call does.
func TestGroupWaitsNoLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g group
		release, begun := make(chan struct{}), time.Now()
		_, _, err := g.do(answerTimeout, func(context.Context) (result, error) { <-release; return result{}, nil })
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) >= 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(begun))
		}
		close(release)
	})
}

// A call has its own deadline, and a panic in it wakes its waiters.
func TestGroupEndsEveryCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g group
		_, _, err := g.do(answerTimeout, func(ctx context.Context) (result, error) {
			<-ctx.Done()
			return result{}, ctx.Err()
		})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a call that hangs: %v", err)
		}
		_, _, err = g.do(answerTimeout, func(context.Context) (result, error) { panic("in a call") })
		if err == nil || !strings.Contains(err.Error(), "in a call") {
			t.Errorf("a call that panics: %v", err)
		}
		if a, _, err := g.do(answerTimeout, func(context.Context) (result, error) { return result{outcome: hit}, nil }); a.outcome != hit || err != nil {
			t.Errorf("the call after: %v, %v", a, err)
		}
	})
}

// What keeps it fast, without a clock: allocations and look-ups per hit, compressions per fill.
func TestCostOfHits(t *testing.T) {
	p := start(t, options{rows: 1000})
	p.list(t, storedStatus)
	if n, err := redis.Int(p.redis.Do("EXISTS", gzipKey("/properties/"))); err != nil || n != 0 {
		t.Errorf("the plain fill has compressed, too (%v)", err)
	}
	handler := p.routes()
	hit := func() {
		r := httptest.NewRequest("GET", "http://localhost/properties/", nil)
		handler.ServeHTTP(discard{http.Header{}}, r)
	}
	allocations := testing.AllocsPerRun(200, hit)
	request := testing.AllocsPerRun(200, func() { httptest.NewRequest("GET", "http://localhost/properties/", nil) })
	t.Logf("a hit costs %v allocations", allocations-request)
	if allocations-request > 60 {
		t.Errorf("%v allocations for a hit, besides the %v of its request", allocations-request, request)
	}

	const clients, each = 64, 50
	before := p.cache.pages.metrics()
	p.redis.Do("CONFIG", "RESETSTAT")
	var done sync.WaitGroup
	for range clients {
		done.Go(func() {
			for range each {
				if e, err := p.send("GET", "/properties/", "", "Accept-Encoding", "gzip"); err != nil || e.StatusCode != 200 {
					t.Errorf("status %v (%v)", e.Response, err)
				}
			}
		})
	}
	done.Wait()
	hits, misses := keyspace(t, p.redis)
	after := p.cache.pages.metrics()
	lookUps, err := strconv.Atoi(hits)
	t.Logf("%d requests cost %d look-ups that hit", clients*each, lookUps)
	if err != nil || lookUps > clients*each/4 {
		t.Errorf("%d requests cost %d look-ups (%v): they do not share", clients*each, lookUps, err)
	}
	if misses != "1" || after["hits"]+after["misses"]-before["hits"]-before["misses"] != clients*each {
		t.Errorf("keyspace misses: %s, want the gzip page's only; page %+v, then %+v", misses, before, after)
	}
}

// discard is a client that throws its answer away.
type discard struct{ header http.Header }

func (d discard) Header() http.Header         { return d.header }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(int)             {}

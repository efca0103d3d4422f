// cache_test.go: both levels, the bypass, what a hit costs, what the log says, and the tests' own
// claims.

package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// A cold GET consults both levels and finds nothing; a warm one finds the page and asks no
// further; one without the page is served from all_properties. Each level consulted is one
// look-up in Redis's own count, or two where a body must be fetched.
func TestLookUps(t *testing.T) {
	server := startRedis(t)
	a := start(t, options{rows: 3, redisURL: server.url})
	b := startAnother(t, options{redisURL: server.url})
	queries := a.countQueries()
	for _, step := range []struct {
		about        string
		p            *program
		harm         string // a key to delete
		status       string
		hits, misses int64
	}{
		{"cold", a, "", storedStatus, 0, 2},
		{"warm", a, "", hitStatus, 1, 0},
		{"another instance's first hit", b, "", hitStatus, 2, 0},
		{"its next one", b, "", hitStatus, 1, 0},
		{"without the page", a, pageKey, storedStatus, 1, 1},
	} {
		if step.harm != "" {
			server.do("DEL", step.harm)
		}
		server.do("CONFIG", "RESETSTAT")
		step.p.list(t, step.status)
		m := a.cache.getRedisCacheMetrics()
		if *m.KeyspaceHits != step.hits || *m.KeyspaceMisses != step.misses {
			t.Errorf("%s: %d hits and %d misses, want %d and %d", step.about,
				*m.KeyspaceHits, *m.KeyspaceMisses, step.hits, step.misses)
		}
	}
	if n := queries.n.Load(); n != 1 {
		t.Errorf("%d queries, want 1", n)
	}
	for key, ttl := range map[string]int64{listKey: 3600, pageKey: 900} {
		if left := server.do("TTL", key).(int64); left > ttl || left < ttl-60 {
			t.Errorf("TTL %s: %d, want %d or a little less", key, left, ttl)
		}
	}
	a.want(t, 201, "POST", propertiesPath, titled("new"))
	if left := server.do("TTL", fenceKey).(int64); left != -1 {
		t.Errorf("TTL of the fence: %d, want none", left)
	}
}

// What keeps it fast, without a clock: allocations and look-ups for a hit, compressions for a fill.
func TestCostOfHits(t *testing.T) {
	server := startRedis(t)
	p := start(t, options{rows: 1000, redisURL: server.url})
	p.list(t, storedStatus)
	if server.do("EXISTS", gzipKey).(int64) != 0 {
		t.Error("the plain fill has compressed, too")
	}
	// Both forms are kept.
	p.ask(t, 1, 2, "Accept-Encoding", "gzip")
	request := func() *http.Request {
		return httptest.NewRequest("GET", "http://localhost/properties/", nil)
	}
	hit := func() { p.handler.ServeHTTP(discard{http.Header{}}, request()) }
	n := testing.AllocsPerRun(200, hit) - testing.AllocsPerRun(200, func() { request() })
	t.Logf("a hit costs %v allocations", n)
	if n > 60 {
		t.Errorf("%v allocations for a hit", n)
	}
	server.do("CONFIG", "RESETSTAT")
	const clients, each = 64, 25
	p.ask(t, clients, each, "Accept-Encoding", "gzip")
	m := p.cache.getRedisCacheMetrics()
	t.Logf("%d hits cost %d look-ups", clients*each, *m.KeyspaceHits)
	if *m.KeyspaceHits > clients*each/4 || *m.KeyspaceMisses > 0 {
		t.Errorf("%d hits cost %d look-ups, and %d misses: they do not share",
			clients*each, *m.KeyspaceHits, *m.KeyspaceMisses)
	}
}

// discard is a client that throws its answer away.
type discard struct{ header http.Header }

func (d discard) Header() http.Header         { return d.header }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(int)             {}

// An idle program sends Redis nothing.
func TestIdleProgram(t *testing.T) {
	server := startRedis(t)
	p := start(t, options{redisURL: server.url})
	p.warm(t)
	conn := dialRedis(t, server.url)
	do(t, conn, "CONFIG", "RESETSTAT")
	// Each of its loops comes round.
	time.Sleep(2 * time.Second)
	var said []string
	for line := range strings.Lines(fmt.Sprintf("%s", do(t, conn, "INFO", "commandstats"))) {
		if strings.HasPrefix(line, "cmdstat_") && !strings.HasPrefix(line, "cmdstat_config") {
			said = append(said, line)
		}
	}
	if len(said) > 0 {
		t.Errorf("it sends %s", said)
	}
}

// A hung Redis delays those who wait for it at that moment; whoever comes after doesn't ask it.
func TestHungRedis(t *testing.T) {
	network, redisURL := proxyToRedis(t)
	p := start(t, options{redisURL: redisURL})
	p.list(t, storedStatus)
	network.set(t, swallow)
	// This one has waited.
	p.list(t, bypassStatus)
	for range 20 {
		p.list(t, bypassStatus)
		if !p.bypassed() {
			t.Error("a later request may ask Redis")
		}
	}
}

// Why Redis is bypassed is named once in the log, and steadily in /healthz, although each PING
// succeeds.
func TestWhyBypassed(t *testing.T) {
	server := startRedis(t)
	server.do("ACL", "SETUSER", "weak", "on", ">secret", "~*", "+@all", "-@transaction")
	for _, test := range []struct {
		about, login, why string
		harm, mend        redis.Args
	}{
		{"out of memory", "", "OOM ",
			redis.Args{"CONFIG", "SET", "maxmemory", "1"},
			redis.Args{"CONFIG", "SET", "maxmemory", "0"}},
		{"a replica", "", "READONLY ",
			redis.Args{"REPLICAOF", "127.0.0.1", "1"}, redis.Args{"REPLICAOF", "NO", "ONE"}},
		{"a missing right", "weak:secret@", "NOPERM ",
			redis.Args{"PING"}, redis.Args{"ACL", "SETUSER", "weak", "+@all"}},
		{"a wrong password", "weak:wrong@", "WRONGPASS ",
			redis.Args{"PING"}, redis.Args{"ACL", "SETUSER", "weak", ">wrong"}},
	} {
		t.Run(test.about, func(t *testing.T) {
			log := keepLog(t)
			server.do(test.harm[0].(string), test.harm[1:]...)
			p := start(t, options{redisURL: strings.Replace(server.url, "//", "//"+test.login, 1)})
			for range 3 {
				// Each of them has one request that finds out.
				p.list(t, "redis; fwd=")
				p.list(t, bypassStatus)
				health := p.health(t, 200)
				if !strings.HasPrefix(health, `{"announcements":"heard","cache":"bypassed"`) ||
					!strings.Contains(health, `"redis":"`+test.why) {
					t.Errorf("/healthz: %s", health)
				}
				p.cache.link.connect(t.Context())
			}
			if n := log.count("cache: Redis is bypassed", "why=\""+test.why); n != 1 {
				t.Errorf("the log says it %d times: %s", n, log)
			}
			server.do(test.mend[0].(string), test.mend[1:]...)
			p.warm(t)
		})
	}
}

// While nothing comes of it, the pause between two sessions doubles.
func TestPauseDoubles(t *testing.T) {
	server := startRedis(t)
	server.do("CONFIG", "SET", "maxmemory", "1")
	p := start(t, options{redisURL: server.url})
	sessions := map[*session]bool{}
	for begun := time.Now(); time.Since(begun) < 4*time.Second; time.Sleep(5 * time.Millisecond) {
		p.list(t, "redis; fwd=")
		sessions[p.cache.link.session.Load()] = true
	}
	// A session is one, and the bypass after it: 5 of both, and 17 if the pause stays the same.
	if len(sessions) > 11 {
		t.Errorf("%d sessions and bypasses", len(sessions))
	}
}

// What others do to Redis's connections costs no session: they are closed while they are idle, and
// there may be only a few of them while many ask.
func TestFewConnections(t *testing.T) {
	server := startRedis(t)
	server.do("CONFIG", "SET", "timeout", "1", "maxclients", "20")
	p := start(t, options{rows: 1, redisURL: server.url})
	p.list(t, storedStatus)
	session := p.cache.link.session.Load()
	var burst sync.WaitGroup
	for i := range 200 {
		burst.Go(func() {
			path := []string{"/cache/metrics/", "/healthz", propertiesPath}[i%3]
			e, err := p.send("GET", path, "")
			if err != nil || e.StatusCode != 200 || strings.Contains(string(e.body), "null") {
				t.Errorf("%s: %v %s", path, err, e.body)
			}
		})
	}
	burst.Wait()
	eventually(t, "the idle ones are closed", func() bool {
		return strings.Count(fmt.Sprintf("%s", server.do("CLIENT", "LIST")), "\n") == 1
	})
	p.list(t, hitStatus)
	if p.cache.link.session.Load() != session {
		t.Error("the session has ended")
	}
}

// A line of 5 MB/s carries a list of 10,000 listings: to Redis, and to another instance.
func TestNarrowLine(t *testing.T) {
	network, redisURL := proxyToRedis(t)
	o := options{rows: 10000, redisURL: redisURL}
	a, b := start(t, o), startAnother(t, o)
	network.set(t, narrow)
	a.list(t, storedStatus)
	b.list(t, hitStatus)
	a.list(t, hitStatus)
}

// The log tells the story: one line for each fact, none for a hit.
func TestLog(t *testing.T) {
	network, redisURL := proxyToRedis(t)
	log := keepLog(t)
	p := start(t, options{redisURL: redisURL})
	lines := 0
	// say compares the lines since the last call.
	say := func(about string, want ...string) {
		t.Helper()
		var got []string
		eventually(t, about+" is logged", func() bool {
			got = strings.Split(strings.TrimSpace(log.String()), "\n")[lines:]
			return len(got) >= len(want)
		})
		lines += len(got)
		lacks := func(part string) bool {
			return !strings.Contains(strings.Join(got, "\n"), part)
		}
		if len(got) != len(want) || slices.ContainsFunc(want, lacks) {
			t.Errorf("%s: want %q in\n%s", about, want, strings.Join(got, "\n"))
		}
	}
	p.list(t, storedStatus)
	say("a cold GET", `"cache: filled" key=all_properties fwd=uri-miss bytes=`,
		`"cache: Redis is in use"`, `"cache: filled" key=page:/properties/ fwd=uri-miss bytes=`)
	for range 10 {
		p.list(t, hitStatus)
	}
	runSQL(t, p.db, inserting("a"))
	p.knows(t)
	p.list(t, staleStatus)
	say("hits, a commit in psql, and an outdated page", `key=all_properties fwd=stale`,
		`key=page:/properties/ fwd=stale`)
	p.want(t, 200, "PUT", "/properties/1/", titled("b"))
	p.want(t, 204, "DELETE", "/properties/1/", "")
	say("writes", `"property saved" id=1`, "cache: invalidated", `"property deleted" id=1`,
		"cache: invalidated")
	network.set(t, refused)
	p.list(t, bypassStatus)
	p.want(t, 201, "POST", propertiesPath, titled("c"))
	say("no Redis", `level=WARN msg="cache: Redis is bypassed" why=`, "property saved",
		"cache: not invalidated, because Redis is bypassed")
	network.set(t, healthy)
	p.warm(t)
	say("Redis again", "cache: Redis is in use", "key=all_properties", "key=page:/properties/")
}

// Each run of the tests takes a database of its own in PostgreSQL and in Redis, and drops those
// of runs that have ended without that, but none of a run that lives.
func TestClaims(t *testing.T) {
	config := services.database.Copy()
	config.Database = "postgres"
	exists := func(run string) (there bool) {
		const query = `SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)`
		err := psql(t).QueryRow(query, run).Scan(&there)
		if err != nil {
			t.Fatal(err)
		}
		return there
	}
	server := startRedis(t)
	u := *parseURL(t, server.url)
	ended, next := newRun(), newRun()
	admin, err := claimDatabase(config, ended)
	if err != nil {
		t.Fatal(err)
	}
	claim, first, err := claimRedis(u, ended)
	if err != nil {
		t.Fatal(err)
	}
	do(t, claim, "SET", "left", "behind")
	_, second, err := claimRedis(u, next)
	if err != nil || second == first {
		t.Fatalf("%s, then %s (%v)", first, second, err)
	}
	admin.Close()
	claim.Close()
	eventually(t, "the run has ended", func() bool {
		claim, third, err := claimRedis(u, next)
		return err == nil && third == first && do(t, claim, "DBSIZE").(int64) == 1
	})
	eventually(t, "its database is dropped", func() bool {
		run := newRun()
		admin, err := claimDatabase(config, run)
		if err != nil {
			t.Fatal(err)
		}
		defer admin.Close()
		defer admin.Exec("DROP DATABASE " + run)
		return !exists(ended)
	})
	if !exists(services.run) {
		t.Error("ours is dropped")
	}
}

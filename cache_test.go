// cache_test.go: both levels, and each rule of cache.go as an interleaving, step by step. What holds under
// load and faults is in checker_test.go.

package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
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
	m := p.cache.pages.metrics()
	if l := p.cache.lists.metrics(); m != (levelMetrics{Hits: 1, Misses: 2}) || l != (levelMetrics{Hits: 1, Misses: 1}) {
		t.Errorf("levels: page %+v, all_properties %+v", m, l)
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

// After a POST, a PUT and a DELETE was answered, the next GET shows it, at both levels.
func TestWriteThenRead(t *testing.T) {
	p := start(t, options{})
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
		if left, err := redis.Int(p.redis.Do("EXISTS", allPropertiesKey, pageKey("/properties/", false), pageKey("/properties/", true))); err != nil || left != 0 {
			t.Errorf("after %s: %d keys left (%v)", step.method, left, err)
		}
		if got := titles(p.list(t, storedStatus)); got != step.want {
			t.Errorf("after %s: %s, want %s", step.method, got, step.want)
		}
	}
}

// gate holds up the program's list query after it has read the rows, which is the moment that all the races
// are about. reading receives when a query has read; it returns when release is sent to.
func (p *program) gate() (reading <-chan struct{}, release chan<- struct{}) {
	read, resume := make(chan struct{}, 10), make(chan struct{}, 10)
	query := p.cache.query
	p.cache.query = func(ctx context.Context) ([]property, error) {
		list, err := query(ctx)
		read <- struct{}{}
		<-resume
		return list, err
	}
	return read, resume
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

// Rule 1: a reader that read before the commit must not store after the invalidation.
func TestLateFillLosesToWrite(t *testing.T) {
	p := start(t, options{})
	reading, release := p.gate()

	reader := p.get()
	receive(t, reading)                                   // 1. the reader has read the old rows
	p.want(t, 201, "POST", "/properties/", titled("new")) // 2. the writer commits and invalidates
	release <- struct{}{}                                 // 3. the reader wants to store
	e := receive(t, reader)
	if e.Header.Get("Cache-Status") != missStatus || string(e.body) != "[]\n" {
		t.Errorf("the reader has %s %s, want the old list, not stored", e.Header.Get("Cache-Status"), e.body)
	}
	if n, err := redis.Int(p.redis.Do("EXISTS", allPropertiesKey, pageKey("/properties/", false))); err != nil || n != 0 {
		t.Fatalf("the late fill stored %d keys (%v)", n, err)
	}
	next := p.get()
	receive(t, reading)
	release <- struct{}{}
	if e := receive(t, next); !bytes.Contains(e.body, []byte("new")) {
		t.Errorf("the next GET has %s", e.body)
	}
}

// waits tells whether a load of key is to begin after the one that runs.
func (c *coalescer[T]) waits(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last[key] != nil && !c.last[key].begun
}

// Rule 2: a reader that asks after the write must not share a load that began before it.
func TestLateJoinerGetsTheNextLoad(t *testing.T) {
	p := start(t, options{})
	reading, release := p.gate()

	early := p.get()
	receive(t, reading)                                   // 1. the early reader's load has read the old rows
	p.want(t, 201, "POST", "/properties/", titled("new")) // 2. the write is answered
	late := p.get()                                       // 3. the late reader asks, while that load runs
	eventually(t, "the late reader waits", func() bool {
		return p.cache.pages.loads.waits(pageKey("/properties/", false))
	})
	release <- struct{}{}
	if e := receive(t, early); string(e.body) != "[]\n" {
		t.Errorf("the early reader has %s", e.body)
	}
	receive(t, reading)
	release <- struct{}{}
	if e := receive(t, late); !bytes.Contains(e.body, []byte("new")) {
		t.Errorf("the late reader has %s, want the new row", e.body)
	}
}

// Rule 3: an invalidation that never reached Redis leaves old data there. It is not served: neither while
// Redis is away nor when it is back.
func TestLostInvalidation(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	p := start(t, options{redisURL: withHost(t, services.redisURL, network.addr)})
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

// Trust that is lost while a load runs keeps its value from being stored: another instance would serve it.
func TestNothingIsStoredWithoutTrust(t *testing.T) {
	p := start(t, options{})
	reading, release := p.gate()
	reader := p.get()
	receive(t, reading)
	p.cache.end(p.cache.session.Load(), errors.New("a test's"))
	release <- struct{}{}
	if e := receive(t, reader); e.Header.Get("Cache-Status") != missStatus {
		t.Errorf("Cache-Status: %s", e.Header.Get("Cache-Status"))
	}
}

// A write that finds Redis bypassed leaves the invalidation to the next session, which is still to come. One
// that finds a session starting invalidates by itself, for the session may have done so before the commit.
func TestWriteWhileHealing(t *testing.T) {
	p := start(t, options{})
	fence := func() string {
		value, err := redis.String(p.redis.Do("GET", fenceKey))
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
	before := fence()
	c := newCache(services.redisURL, p.cache.query) // nobody heals it
	if err := c.invalidate(); err != nil || fence() != before {
		t.Errorf("bypassed: Redis was asked: %v (%v)", fence() != before, err)
	}
	s := c.newSession()
	c.session.Store(s)
	if err := c.invalidate(); err != nil || fence() == before {
		t.Errorf("starting: Redis was asked: %v (%v)", fence() != before, err)
	}
	c.end(s, errors.New("a test's"))
	if c.session.Load() != nil {
		t.Error("the session goes on")
	}
}

// So a session must be there before it invalidates: a write that finds none relies on an invalidation to come.
func TestSessionIsThereBeforeItsInvalidation(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	network.set(t, slow) // so that a session takes its time to start
	eventually(t, "a session is seen that hasn't started yet", func() bool {
		c := newCache(withHost(t, services.redisURL, network.addr), nil)
		healed := make(chan error, 1)
		go func() { healed <- c.heal() }()
		for {
			select {
			case err := <-healed:
				t.Logf("not seen (%v)", err)
				return false
			case <-time.After(time.Millisecond):
				if s := c.session.Load(); s != nil && !s.trusted() {
					<-healed
					s.Close()
					return true
				}
			}
		}
	})
}

// Whatever lies at our keys that we didn't put there is not served, and is gone soon.
func TestGarbageInRedis(t *testing.T) {
	page, list := pageKey("/properties/", false), allPropertiesKey
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
		{"a page with another body", []any{"HSET", page, "etag", `"x"`, "stored", "1", "header", "{}", "body", "[]"}},
		{"a page without a body", []any{"HSET", page, "etag", `"x"`}},
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

// A page whose time of storage can't be read is garbage too.
func TestGarbageInPageTime(t *testing.T) {
	p := start(t, options{rows: 1})
	p.list(t, storedStatus)
	p.redis.Do("HSET", pageKey("/properties/", false), "stored", "yesterday")
	p.list(t, bypassStatus)
}

// Two instances share what is in Redis: what one fills the other hits, and what one writes both show.
func TestTwoInstances(t *testing.T) {
	a := start(t, options{rows: 2})
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
		{"a cookie", func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Set-Cookie", "a=b") }, 200, false},
		{"an error", func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusServiceUnavailable) }, 503, false},
		{"a redirect", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/", http.StatusFound) }, 302, false},
		{"a part", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(206) }, 206, false},
		{"an error with a tag", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"a"`)
			w.WriteHeader(http.StatusNotFound)
		}, 404, false},
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
		return p.cache.pages.loads.waits(pageKey("/properties/", false))
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
	if m := p.cache.pages.metrics(); m.Misses < 1 || m.Hits+m.Misses != clients || m.Bypassed != 0 || m.Coalesced < clients/2 {
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

// A client that leaves stops waiting, and neither fails nor delays those who wait for the same load.
func TestClientLeaves(t *testing.T) {
	p := start(t, options{rows: 1})
	reading, release := p.gate()
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		r, _ := http.NewRequestWithContext(ctx, "GET", p.url+"/properties/", nil)
		_, err := client.Do(r)
		left <- err
	}()
	receive(t, reading)
	stays := p.get()
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	release <- struct{}{} // the load that it started goes on: it fills all_properties and the page
	if e := receive(t, stays); e.Response == nil || e.StatusCode != 200 {
		t.Errorf("the one who stayed: %s", e.body)
	}
	p.list(t, hitStatus)
}

// A load that panics is an error for those who waited for it; the key works at the next request.
func TestPanicInLoad(t *testing.T) {
	p := start(t, options{rows: 1})
	query := p.cache.query
	p.cache.query = func(context.Context) ([]property, error) { panic("in a load") }
	checkProblem(t, p.want(t, 500, "GET", "/properties/", ""))
	p.cache.query = query
	p.list(t, storedStatus)
	p.list(t, hitStatus)
}

// The coalescer alone, in synthetic time: while a load runs, all who come share the next one; it is theirs
// though the first who asked for it has left; and no load outlives its deadline unheard.
func TestCoalescer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c coalescer[int]
		var loads atomic.Int64
		release := make(chan struct{})
		run := func(context.Context) (int, error) {
			n := loads.Add(1)
			<-release
			return int(n), nil
		}
		type result struct {
			value  int
			shared bool
			err    error
		}
		results := make(chan result, 10)
		do := func(ctx context.Context) {
			go func() {
				value, shared, err := c.do(ctx, "key", run)
				results <- result{value, shared, err}
			}()
			synctest.Wait()
		}
		ctx, leave := context.WithCancel(t.Context())
		do(t.Context()) // runs
		do(ctx)         // waits for the next
		do(t.Context()) // shares it
		do(t.Context())
		leave()
		synctest.Wait()
		if r := <-results; !errors.Is(r.err, context.Canceled) {
			t.Errorf("who left: %+v", r)
		}
		release <- struct{}{}
		if r := <-results; r != (result{1, false, nil}) {
			t.Errorf("the first: %+v", r)
		}
		release <- struct{}{}
		for range 2 {
			if r := <-results; r != (result{2, true, nil}) {
				t.Errorf("who shared: %+v", r)
			}
		}
		synctest.Wait()
		if n := loads.Load(); n != 2 || len(c.last) != 0 {
			t.Errorf("%d loads, want 2; %d keys left, want 0", n, len(c.last))
		}
	})
}

// A load has its own deadline, and a panic in it wakes its waiters.
func TestCoalescerEndsEveryLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c coalescer[int]
		_, _, err := c.do(t.Context(), "key", func(ctx context.Context) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a load that hangs: %v", err)
		}
		_, _, err = c.do(t.Context(), "key", func(context.Context) (int, error) { panic("in a load") })
		if err == nil || !strings.Contains(err.Error(), "in a load") {
			t.Errorf("a load that panics: %v", err)
		}
		if value, _, err := c.do(t.Context(), "key", func(context.Context) (int, error) { return 7, nil }); value != 7 || err != nil {
			t.Errorf("the load after: %d, %v", value, err)
		}
	})
}

// What keeps it fast, without a clock: allocations and look-ups per hit, compressions per fill.
func TestCostOfHits(t *testing.T) {
	p := start(t, options{rows: 1000})
	p.list(t, storedStatus)
	if n, err := redis.Int(p.redis.Do("EXISTS", pageKey("/properties/", true))); err != nil || n != 0 {
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
	if err != nil || lookUps > clients*each/2 {
		t.Errorf("%d requests cost %d look-ups (%v): they do not share", clients*each, lookUps, err)
	}
	if misses != "1" || after.Hits+after.Misses-before.Hits-before.Misses != clients*each {
		t.Errorf("keyspace misses: %s, want the gzip page's only; page %+v, then %+v", misses, before, after)
	}
}

// discard is a client that throws its answer away.
type discard struct{ header http.Header }

func (d discard) Header() http.Header         { return d.header }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(int)             {}

// http_test.go: what a client sees: of its own requests, of the cached list, of a Redis that fails,
// and of a PostgreSQL that fails.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Part 1: requests

// A path has one form, and each method that isn't there is named. No proxy may keep any answer.
func TestPathsAndMethods(t *testing.T) {
	p := start(t, options{rows: 3})
	const json, refusal = "application/json", "application/problem+json"
	tests := []struct {
		method, path string
		status       int
		header, want string
	}{
		{"GET", "/properties/3/", 200, "Content-Type", json},
		{"GET", "/properties/%33/", 200, "Content-Type", json},
		{"HEAD", "/properties/3/", 200, "Content-Type", json},
		{"HEAD", "/properties/", 200, "Cache-Status", storedStatus},
		{"GET", "/properties/?page=2", 200, "Content-Type", json},
		{"GET", "/cache/metrics/", 200, "Content-Type", json},
		{"GET", "/metrics", 200, "Content-Type", "text/plain; version=0.0.4; charset=utf-8"},
		{"GET", "/healthz", 200, "Content-Type", json},
		{"GET", "/properties/4/", 404, "Content-Type", refusal},
		{"GET", "/properties/03/", 404, "Content-Type", refusal},
		{"GET", "/properties/3/4/", 404, "Content-Type", "text/plain; charset=utf-8"},
		{"GET", "/", 307, "Location", "/properties/"},
		{"POST", "/properties", 307, "Location", "/properties/"},
		{"PUT", "/properties/3", 307, "Location", "/properties/3/"},
		{"GET", "/cache/metrics", 307, "Location", "/cache/metrics/"},
		{"PATCH", "/properties/", 405, "Allow", "GET, HEAD, POST"},
		{"POST", "/properties/3/", 405, "Allow", "DELETE, GET, HEAD, PUT"},
		{"DELETE", "/properties/3/", 204, "Content-Type", ""},
	}
	for _, test := range tests {
		e := p.want(t, test.status, test.method, test.path, titled("Loft"))
		if got := e.Header.Get(test.header); got != test.want {
			t.Errorf("%s %s: %s: %s, want %s", test.method, test.path, test.header, got, test.want)
		}
		if got := e.Header.Get("Cache-Control"); got != "no-cache" {
			t.Errorf("%s %s: Cache-Control: %s", test.method, test.path, got)
		}
		if test.method == "HEAD" && (len(e.body) > 0 || e.ContentLength <= 0) {
			t.Errorf("HEAD %s: %d of %d bytes", test.path, len(e.body), e.ContentLength)
		}
	}
}

// A body says that it is JSON, and has at most 64 KiB.
func TestContentTypeAndSize(t *testing.T) {
	p := start(t, options{})
	for contentType, status := range map[string]int{
		"application/json": 201, "application/json; charset=utf-8": 201, "Application/JSON": 201,
		"": 415, "text/plain": 415, "application/x-www-form-urlencoded": 415,
		"application/problem+json": 415, "application/json, text/plain": 415,
	} {
		header := "Content-Type: " + contentType
		p.want(t, status, "POST", propertiesPath, with(``), header)
		if status == 415 {
			p.want(t, status, "PUT", "/properties/1/", with(``), header)
		}
	}
	blanks := strings.Repeat(" ", maxBody-len(with(``)))
	p.want(t, 201, "POST", propertiesPath, blanks+with(``))
	checkProblem(t, p.want(t, 413, "POST", propertiesPath, " "+blanks+with(``)))
	for framing, status := range map[string]int{
		// Chunks without an end, and half of a body.
		"Transfer-Encoding: chunked\r\n\r\n10001\r\n" + strings.Repeat(" ", maxBody+1): 413,
		"Content-Length: 500\r\n\r\n" + with(``):                                       400,
	} {
		e := p.talk(t, "POST /properties/ HTTP/1.1\r\nHost: localhost\r\n"+
			"Content-Type: application/json\r\n"+framing)
		if checkProblem(t, e); e.StatusCode != status {
			t.Errorf("%.40q: status %d", framing, e.StatusCode)
		}
	}
}

// Without a token, the program answers only to names that no DNS server can point at this machine.
// Others learn what a proxy can do about it.
func TestHost(t *testing.T) {
	p := start(t, options{})
	for host, status := range map[string]int{
		"127.0.0.2:8000": 200, "192.0.2.1": 200, "[::1]:8000": 200, "[2001:db8::1]": 200,
		"LOCALHOST": 200, "localhost.": 200, "app.localhost:8000": 200, "app.localhost.": 200,
		"evil.example:8000": 421, "localhost.evil.example": 421, "evillocalhost": 421,
		"127.0.0.1.evil.example": 421, "localhost..": 421,
	} {
		p.want(t, status, "GET", "/healthz", "", "Host: "+host)
	}
	// Load balancers may send none.
	for header, status := range map[string]int{"": 200, "Host: evil.example\r\n": 421} {
		if e := p.talk(t, "GET /healthz HTTP/1.0\r\n"+header+"\r\n"); e.StatusCode != status {
			t.Errorf("HTTP/1.0 %q: status %d", header, e.StatusCode)
		}
	}
	e := p.want(t, 421, "POST", propertiesPath, titled("Loft"), "Host: homes.example")
	checkProblem(t, e, "A proxy needs WRITE_TOKEN set")
}

// Without a token, another site's page may not write. With a token, it alone decides.
func TestWhoMayWrite(t *testing.T) {
	open, closed := start(t, options{rows: 1}), startAnother(t, options{writeToken: "sesame"})
	const list, item, none = propertiesPath, "/properties/1/", "Accept: */*"
	tests := []struct {
		about        string
		p            *program
		method, path string
		status       int
		header       string
	}{
		{"our own page", open, "POST", list, 201, "Sec-Fetch-Site: same-origin"},
		{"another site's read", open, "GET", list, 200, "Sec-Fetch-Site: cross-site"},
		{"another site's page", open, "POST", list, 403, "Sec-Fetch-Site: cross-site"},
		{"another origin's page", open, "POST", list, 403, "Origin: http://evil.example"},

		{"a read", closed, "GET", list, 200, none},
		{"a public name", closed, "GET", list, 200, "Host: homes.example"},
		{"no token", closed, "POST", list, 401, none},
		{"no token to PUT", closed, "PUT", item, 401, none},
		{"no token to DELETE", closed, "DELETE", item, 401, none},
		{"another token", closed, "POST", list, 401, "Authorization: Bearer sesamf"},
		{"a longer token", closed, "POST", list, 401, "Authorization: Bearer sesames"},
		{"another scheme", closed, "POST", list, 401, "Authorization: Basic sesame"},
		{"the token", closed, "POST", list, 201, "Authorization: Bearer sesame"},
		{"a scheme in small", closed, "POST", list, 201, "Authorization: bearer sesame"},
	}
	for _, test := range tests {
		e := test.p.want(t, test.status, test.method, test.path, titled("Loft"), test.header)
		if test.status >= 400 {
			checkProblem(t, e)
		}
		asks := e.Header.Get("WWW-Authenticate")
		if (asks == `Bearer realm="properties"`) != (test.status == 401) {
			t.Errorf("%s: WWW-Authenticate: %q", test.about, asks)
		}
	}
	closed.want(t, 201, "POST", list, titled("Loft"), "Authorization: Bearer sesame",
		"Origin: http://evil.example")
}

// What a client wants to be protected from can't be promised, so it is refused.
func TestPreconditions(t *testing.T) {
	p := start(t, options{rows: 1})
	for header, status := range map[string]int{
		"If-Match: *": 200, `If-Match: "a"`: 412, `If-Match: W/"a"`: 412,
		"If-None-Match: *": 412, `If-None-Match: "a"`: 200,
	} {
		e := p.want(t, status, "PUT", "/properties/1/", titled("Loft"), header)
		if status == 412 {
			checkProblem(t, e)
		}
	}
}

// A panic in a view is a 500 of its own, with the stack in the log only; the server goes on.
func TestPanicInView(t *testing.T) {
	log := keepLog(t)
	p := &program{url: newServer(t, view(func(http.ResponseWriter, *http.Request) error {
		panic("at the disco")
	}))}
	for range 2 {
		checkProblem(t, p.want(t, 500, "GET", "/", ""))
	}
	if n := log.count("status=500", "panic: at the disco", "http_test.go"); n != 2 {
		t.Errorf("the log has %d stacks: %s", n, log)
	}
}

// Browsers send all cookies of localhost, whichever program has set them. Headers have a limit.
func TestLargeHeaders(t *testing.T) {
	reset(t)
	p := runMain(t, nil, "-addr", "127.0.0.1:0").serving(t).api()
	for size, status := range map[int]int{21_000: 200, 100 << 10: 431} {
		p.want(t, status, "GET", propertiesPath, "", "Cookie: "+strings.Repeat("c", size))
	}
}

// A client that closes its sending side early, as printf | nc -N does, still reads: it gets a whole
// answer, however long that takes.
func TestHalfClose(t *testing.T) {
	p := start(t, options{rows: 3})
	lock, waiters := lockProperties(t, psql(t))
	var answers []<-chan exchange
	// Two reads, and a POST.
	for i, body := range []string{"", "", titled("Loft")} {
		answers = append(answers, p.begin(t, fmt.Sprintf("%s %s HTTP/1.1\r\nHost: localhost\r\n"+
			"Connection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
			requests[i].method, requests[i].path, len(body), body)))
	}
	eventually(t, "all of them wait", func() bool { return waiters() == len(answers) })
	lock.Rollback()
	for _, answer := range answers {
		e := receive(t, answer)
		if e.StatusCode/100 != 2 || len(e.body) == 0 || int64(len(e.body)) != e.ContentLength {
			t.Errorf("status %d, %d of %d bytes", e.StatusCode, len(e.body), e.ContentLength)
		}
	}
}

// A client that hangs up in the middle of a write leaves nothing stale: the write goes on, and its
// receivers run.
func TestClientLeavesDuringWrite(t *testing.T) {
	p := start(t, options{deaf: true})
	p.list(t, storedStatus)
	asked, sent := make(chan context.Context, 1), make(chan bool)
	committed, goOn := p.holdReceivers()
	p.properties.signals.postSave.connect(func(change) { sent <- true })
	create := func(w http.ResponseWriter, r *http.Request) error {
		asked <- r.Context()
		return p.properties.createView(w, r)
	}
	conn, body := (&program{url: newServer(t, view(create))}).dial(t), titled("new")
	fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n%s", len(body), body)
	request := receive(t, asked)
	receive(t, committed)
	conn.Close()
	receive(t, request.Done())
	goOn <- true
	receive(t, sent)
	p.lists(t, storedStatus, "new")
}

// Part 2: the list, and what is counted and logged of it

// The list has two forms. Unzipped they are the same, and each has headers and a tag of its own.
func TestFormsOfTheList(t *testing.T) {
	p := start(t, options{rows: 3})
	var lists, tags []string
	for _, coding := range []string{"", "gzip"} {
		p.want(t, 200, "HEAD", propertiesPath, "", "Accept-Encoding: "+coding)
		e := p.want(t, 200, "GET", propertiesPath, "", "Accept-Encoding: "+coding,
			"Range: bytes=0-1")
		age, err := strconv.Atoi(e.Header.Get("Age"))
		if err != nil {
			t.Error(err)
		}
		for name, want := range map[string]string{
			"Content-Type": "application/json", "Content-Encoding": coding,
			"Content-Length": fmt.Sprint(len(e.body)), "Vary": "Accept-Encoding", "Snapshot": "",
			"Accept-Ranges": "", "Cache-Status": fmt.Sprint(hitStatus, 900-age),
		} {
			if got := e.Header.Get(name); got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
		list, err := e.unzipped()
		if err != nil {
			t.Error(err)
		}
		lists, tags = append(lists, string(list)), append(tags, e.Header.Get("ETag"))
	}
	if lists[0] != lists[1] || tags[0] == tags[1] {
		t.Errorf("lists %q, tags %q", lists, tags)
	}
}

// A client that has a form of the list, by its tag, isn't sent it again.
func TestConditionalRequests(t *testing.T) {
	p := start(t, options{rows: 3})
	for coding, another := range map[string]string{"identity": "gzip", "gzip": "identity"} {
		accept := "Accept-Encoding: " + coding
		tag := p.want(t, 200, "GET", propertiesPath, "", accept).Header.Get("ETag")
		for _, method := range []string{"GET", "HEAD"} {
			e := p.want(t, 304, method, propertiesPath, "", accept, `If-None-Match: "b", W/`+tag)
			for name, want := range map[string]string{"ETag": tag, "Vary": "Accept-Encoding",
				"Content-Encoding": "", "Content-Type": "", "Cache-Control": "no-cache"} {
				if got := e.Header.Get(name); got != want {
					t.Errorf("304 with %s: %q, want %q", name, got, want)
				}
			}
			p.want(t, 200, method, propertiesPath, "", accept, `If-None-Match: "b"`)
			p.want(t, 200, method, propertiesPath, "", "Accept-Encoding: "+another,
				"If-None-Match: "+tag)
		}
	}
}

// A cached view sees nothing of the client's request. A HEAD fills, too.
func TestCachedViewSeesNoRequest(t *testing.T) {
	p := start(t, options{})
	seen := func(w http.ResponseWriter, r *http.Request) error {
		err := p.properties.listView(w, r)
		fmt.Fprint(w, r.Method, r.URL, r.Header, r.Host, r.RemoteAddr, r.Body == http.NoBody)
		return err
	}
	_, cached := p.cache.cachePage("/page/", time.Minute, seen)
	page := &program{url: newServer(t, cached)}
	for _, method := range []string{"HEAD", "GET"} {
		e := page.want(t, 200, method, "/page/?a", titled("Loft"), "Cookie: b=c")
		if method == "GET" && (string(e.body) != "[]\nGET/page/ map[]true" ||
			!strings.HasPrefix(e.Header.Get("Cache-Status"), hitStatus)) {
			t.Errorf("%s %v", e.body, e.Header)
		}
	}
}

// Only a 200 without a cookie that says what it has seen is stored.
func TestOnlyGoodAnswersAreStored(t *testing.T) {
	p := start(t, options{})
	answer := func(status int, name, value string) view {
		return func(w http.ResponseWriter, r *http.Request) error {
			w.WriteHeader(status)
			err := p.properties.listView(w, r)
			// It may replace what that view has seen.
			w.Header().Set(name, value)
			return err
		}
	}
	for i, test := range []struct {
		about  string
		view   view
		status int
	}{
		{"an answer", answer(200, "X-Kind", "of its own"), 200},
		{"a cookie", answer(200, "Set-Cookie", "a=b"), 500},
		{"an error", answer(503, "X-Kind", ""), 500},
		{"a redirect", answer(302, "Location", "/"), 500},
		{"a part", answer(206, "X-Kind", ""), 500},
		{"nothing seen", answer(200, "Snapshot", ""), 500},
		{"nonsense seen", answer(200, "Snapshot", "yesterday"), 500},
		{"a problem", func(http.ResponseWriter, *http.Request) error { return errNotFound }, 404},
		{"a panic", func(http.ResponseWriter, *http.Request) error { panic("in a view") }, 500},
	} {
		path := fmt.Sprintf("/%d/", i)
		_, cached := p.cache.cachePage(path, time.Minute, test.view)
		e := (&program{url: newServer(t, cached)}).want(t, test.status, "GET", path, "")
		if test.status != 200 {
			checkProblem(t, e)
		}
		if stored := p.exist(t, "page:"+path) == 1; stored != (test.status == 200) {
			t.Errorf("%s is stored: %v", test.about, stored)
		}
	}
}

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
		status       string
		hits, misses int64
	}{
		{"cold", a, storedStatus, 0, 2},
		{"warm", a, hitStatus, 1, 0},
		{"another instance's first hit", b, hitStatus, 2, 0},
		{"its next one", b, hitStatus, 1, 0},
		{"without the page", a, storedStatus, 1, 1},
	} {
		if step.about == "without the page" {
			server.do("DEL", pageKey)
		}
		server.do("CONFIG RESETSTAT")
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
}

// The page is kept for 15 minutes, the list for an hour, and the fence for ever (-1).
func TestTTLs(t *testing.T) {
	p := start(t, options{})
	p.post(t, "Loft")
	p.list(t, storedStatus)
	for key, ttl := range map[string]int64{listKey: 3600, pageKey: 900, fenceKey: -1} {
		if left := p.do(t, "TTL", key).(int64); left > ttl || left < ttl-60 {
			t.Errorf("TTL %s: %d, want %d or a little less", key, left, ttl)
		}
	}
}

// What keeps it fast, without a clock: allocations and look-ups for a hit, compressions for a fill.
func TestCostOfHits(t *testing.T) {
	server := startRedis(t)
	p := start(t, options{rows: 100, redisURL: server.url})
	p.list(t, storedStatus)
	if server.do("EXISTS", gzipKey) != int64(0) {
		t.Error("the plain fill has compressed, too")
	}
	ask := func() (http.ResponseWriter, *http.Request) {
		r := httptest.NewRequest("GET", "http://localhost/properties/", nil)
		return httptest.NewRecorder(), r
	}
	n := testing.AllocsPerRun(200, func() { p.handler.ServeHTTP(ask()) }) -
		testing.AllocsPerRun(200, func() { ask() })
	t.Logf("a hit costs %v allocations", n)
	if n > 60 {
		t.Errorf("%v allocations for a hit", n)
	}
	server.do("CONFIG RESETSTAT")
	const clients, each = 64, 25
	p.burst(t, clients, each, requests[0])
	m := p.cache.getRedisCacheMetrics()
	t.Logf("%d hits cost %d look-ups", clients*each, *m.KeyspaceHits)
	if *m.KeyspaceHits > clients*each/4 || *m.KeyspaceMisses > 0 {
		t.Errorf("%d hits cost %d look-ups, and %d misses: they do not share",
			clients*each, *m.KeyspaceHits, *m.KeyspaceMisses)
	}
}

// An idle program sends Redis nothing, and takes no new floor.
func TestIdleProgram(t *testing.T) {
	server := startRedis(t)
	p := start(t, options{redisURL: server.url})
	p.warm(t)
	floor := p.floor()
	// A new one would differ.
	runSQL(t, p.db, `CREATE TABLE others ()`)
	server.do("CONFIG RESETSTAT")
	// Nothing is to happen while each of its loops comes round, which takes a second at most.
	time.Sleep(2 * time.Second)
	stats := fmt.Sprintf("%s", server.do("INFO commandstats"))
	if n := strings.Count(stats, "cmdstat_"); n != strings.Count(stats, "cmdstat_config") {
		t.Errorf("it sends %s", stats)
	}
	if after := p.floor(); after != floor {
		t.Errorf("the floor was %s and is %s", floor, after)
	}
}

// The log tells the story: one line for each fact, none for a hit.
func TestLog(t *testing.T) {
	network, redisURL := proxyToRedis(t)
	log := keepLog(t)
	p := start(t, options{redisURL: redisURL})
	p.list(t, storedStatus)
	log.says(t, `"cache: filled" key=all_properties fwd=uri-miss bytes=`,
		`"cache: Redis is in use"`, `"cache: filled" key=page:/properties/ fwd=uri-miss bytes=`)
	for range 10 {
		p.list(t, hitStatus)
	}
	p.commit(t, inserting("a"))
	p.list(t, staleStatus)
	log.says(t, `key=all_properties fwd=stale`, `key=page:/properties/ fwd=stale`)
	p.put(t, "b")
	p.remove(t)
	log.says(t, `"property saved" id=1`, "cache: invalidated", `"property deleted" id=1`,
		"cache: invalidated")
	network.set(t, refused)
	p.list(t, bypassStatus)
	p.post(t, "c")
	log.says(t, `level=WARN msg="cache: Redis is bypassed" why=`, "property saved",
		"cache: not invalidated, because Redis is bypassed")
	network.set(t, healthy)
	p.warm(t)
	log.says(t, "cache: Redis is in use", "key=all_properties", "key=page:/properties/")
}

// A time has six decimals, so that a fixed pattern reads it, and is UTC.
func TestCreatedAt(t *testing.T) {
	p := start(t, options{})
	p.commit(t, `INSERT INTO properties (title, description, price, location, created_at)
		SELECT 'Loft', '', 1, 'Accra', unnest('{2026-01-02 03:04:05Z, 2026-01-02 03:04:05.5Z,
			0001-01-01 05:45+05:45}'::timestamptz[])`)
	want := "2026-01-02T03:04:05.000000Z 2026-01-02T03:04:05.500000Z 0001-01-01T00:00:00.000000Z"
	list := p.list(t, storedStatus)
	for i, created := range strings.Fields(want) {
		one := p.want(t, 200, "GET", fmt.Sprintf("/properties/%d/", i+1), "").body
		if list[i].CreatedAt != created || !strings.Contains(string(one), `"`+created+`"`) {
			t.Errorf("%+v, %s, want %s", list[i], one, created)
		}
	}
}

// Redis's counts and ours, in JSON and for Prometheus.
func TestMetrics(t *testing.T) {
	server := startRedis(t)
	p := start(t, options{rows: 1, redisURL: server.url})
	check := func(path, want string) {
		t.Helper()
		if got := p.want(t, 200, "GET", path, "").body; string(got) != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
	check("/cache/metrics/", `{"keyspace_hits":0,"keyspace_misses":0,"hit_ratio":0,"levels":{`+
		`"page":{"hits":0,"misses":0,"coalesced":0,"bypassed":0},`+
		`"all_properties":{"hits":0,"misses":0,"coalesced":0,"bypassed":0}}}`+"\n")
	p.list(t, storedStatus)
	for range 5 {
		p.list(t, hitStatus)
	}
	server.do("DEL", pageKey)
	p.list(t, storedStatus)
	check("/cache/metrics/", `{"keyspace_hits":6,"keyspace_misses":3,"hit_ratio":0.6667,"levels":{`+
		`"page":{"hits":5,"misses":2,"coalesced":0,"bypassed":0},`+
		`"all_properties":{"hits":1,"misses":1,"coalesced":0,"bypassed":0}}}`+"\n")
	check("/metrics", `# HELP properties_redis_up 1 if Redis answered INFO, else 0.
# TYPE properties_redis_up gauge
properties_redis_up 1
# HELP properties_cache_requests_total Requests to a level, by result.
# TYPE properties_cache_requests_total counter
properties_cache_requests_total{level="page",result="hit"} 5
properties_cache_requests_total{level="page",result="miss"} 2
properties_cache_requests_total{level="page",result="bypassed"} 0
properties_cache_requests_total{level="all_properties",result="hit"} 1
properties_cache_requests_total{level="all_properties",result="miss"} 1
properties_cache_requests_total{level="all_properties",result="bypassed"} 0
# HELP properties_cache_coalesced_requests_total Requests that shared another one's call.
# TYPE properties_cache_coalesced_requests_total counter
properties_cache_coalesced_requests_total{level="page"} 0
properties_cache_coalesced_requests_total{level="all_properties"} 0
`)
}

// Part 3: Redis fails

// Why Redis is bypassed is named once in the log, and steadily in /healthz, although each PING
// succeeds: in Redis's own words.
func TestWhyBypassed(t *testing.T) {
	server := startRedis(t)
	server.do("ACL SETUSER weak on >secret ~* +@all -@transaction")
	for _, test := range []struct{ why, login, harm, mend string }{
		{"OOM ", "", "CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"},
		{"READONLY ", "", "REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"},
		{"NOPERM ", "weak:secret@", "PING", "ACL SETUSER weak +@all"},
		{"WRONGPASS ", "weak:wrong@", "PING", "ACL SETUSER weak >wrong"},
	} {
		t.Run(test.why, func(t *testing.T) {
			log := keepLog(t)
			server.do(test.harm)
			p := start(t, options{redisURL: strings.Replace(server.url, "//", "//"+test.login, 1)})
			for range 3 {
				eventually(t, "it is bypassed", func() bool {
					p.list(t, "redis; fwd=")
					return p.bypassed()
				})
				want := `{"announcements":"heard","cache":"bypassed","postgresql":"up","redis":"`
				if got := p.health(t, 200); !strings.HasPrefix(got, want+test.why) {
					t.Errorf("/healthz: %s", got)
				}
				p.cache.link.connect(t.Context())
			}
			if n := log.count("cache: Redis is bypassed", "why=\""+test.why); n != 1 {
				t.Errorf("the log says it %d times: %s", n, log)
			}
			server.do(test.mend)
			p.warm(t)
		})
	}
}

// While nothing comes of it, the pause between two sessions doubles. (No clock can be faked here,
// because Redis is real. A slow machine only has fewer sessions.)
func TestPauseDoubles(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	server.do("CONFIG SET maxmemory 1")
	p := startAnother(t, options{redisURL: server.url, database: newDatabase(t)})
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
	server.do("CONFIG SET timeout 1 maxclients 20")
	p := start(t, options{rows: 1, redisURL: server.url})
	p.list(t, storedStatus)
	session := p.cache.link.session.Load()
	p.burst(t, 200, 5, request{"GET", "/cache/metrics/"}, requests[0])
	eventually(t, "the idle ones are closed", func() bool {
		return strings.Count(fmt.Sprintf("%s", server.do("CLIENT LIST")), "\n") == 1
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

// Without Redis, and without the right to its INFO, what this process counted is there all the
// same, because that is when bypassed matters.
func TestMetricsWithoutRedis(t *testing.T) {
	server := startRedis(t)
	server.do("ACL SETUSER weak on >secret ~* +@all -info")
	for _, test := range []struct{ redisURL, cacheStatus, counts, sample, health string }{
		{strings.Replace(server.url, "//", "//weak:secret@", 1), storedStatus,
			`{"hits":0,"misses":1,"coalesced":0,"bypassed":0}`, `result="miss"} 1`, `"up"`},
		{"redis://127.0.0.1:" + freePort(t), bypassStatus,
			`{"hits":0,"misses":0,"coalesced":0,"bypassed":1}`, "\nproperties_redis_up 0\n",
			`"connection refused"`},
	} {
		p := start(t, options{redisURL: test.redisURL})
		p.list(t, test.cacheStatus)
		for path, want := range map[string]string{
			"/cache/metrics/": `{"keyspace_hits":null,"keyspace_misses":null,"hit_ratio":null,` +
				`"levels":{"page":` + test.counts + `,"all_properties":` + test.counts + "}}\n",
			"/metrics": test.sample,
			"/healthz": `"redis":` + test.health,
		} {
			if got := p.want(t, 200, "GET", path, "").body; !strings.Contains(string(got), want) {
				t.Errorf("%s: %s, want %s", path, got, want)
			}
		}
	}
}

// Part 4: PostgreSQL fails

// An SQLSTATE says whether a later try may succeed, and the detail is true.
func TestProblemOf(t *testing.T) {
	tests := []struct {
		states, detail string
		status         int
	}{
		{"23502 23503 23505 23514 23P01", "would break one of its constraints", 409},
		// A right, a table, a column, a type, a password, a database, somebody's own RAISE.
		{"42501 42P01 42703 42883 22001 0A000 28P01 3D000 P0001 XX000", "on our side", 500},
		{"25006", "The database is read-only: nothing was changed", 503},
		{"08006 25P03 25P04 40001 40P01 53100 53200 53300 54000 55P03 55006 57014 57P01 57P02 " +
			"57P03 57P05 58030", "The database can't do this now: nothing was changed", 503},
	}
	check := func(about string, err error, status int, detail string) {
		t.Helper()
		got := problemOf(fmt.Errorf("write: %w", err))
		if got.Status != status || !strings.Contains(got.Detail, detail) {
			t.Errorf("%s is %d %s, want %d %s", about, got.Status, got.Detail, status, detail)
		}
	}
	for _, test := range tests {
		for state := range strings.FieldsSeq(test.states) {
			check(state, &pgconn.PgError{Code: state}, test.status, test.detail)
		}
	}
	check("a lost connection", io.ErrUnexpectedEOF, 503, "does not answer")
	check("no time", context.DeadlineExceeded, 503, "took longer than 4 s")
	check("a problem", errNotFound, 404, "no such property")
	check("doubt", fmt.Errorf("%w: %w", errInDoubt, io.EOF), 503, "may have been applied")
}

// The log has PostgreSQL's or the system's own word, and no address.
func TestCause(t *testing.T) {
	for _, text := range []string{"refused", "dial tcp 192.0.2.1:5432: connect: refused"} {
		if got := cause(errors.New(text)); got != "refused" {
			t.Errorf("%s: %s", text, got)
		}
	}
}

// While PostgreSQL is away, what is cached is served and the rest is 503; nothing of that is
// cached, nothing is written, and all is well when it is back.
func TestPostgresAway(t *testing.T) {
	for _, f := range []fault{refused, swallow} {
		t.Run(string(f), func(t *testing.T) {
			network, config := proxyToPostgres(t)
			p := start(t, options{database: config})
			p.post(t, "Loft")
			p.list(t, storedStatus)
			network.set(t, f)
			p.list(t, hitStatus)
			p.do(t, "DEL", pageKey)
			// From all_properties.
			p.list(t, storedStatus)
			p.forget(t)
			var answers []<-chan exchange
			for _, r := range requests {
				answers = append(answers, p.later(r.method, r.path, titled("lost")))
			}
			for _, answer := range answers {
				checkProblem(t, receive(t, answer), "does not answer")
			}
			if n := p.exist(t, pageKey, listKey); n != 0 {
				t.Errorf("%d keys were filled with errors", n)
			}
			network.set(t, healthy)
			p.isWell(t)
			p.lists(t, storedStatus, "Loft")
			p.list(t, hitStatus)
		})
	}
}

// A table that somebody locks holds up reads and writes, for 4 s at most. A write that was answered
// with 503 doesn't happen later.
func TestLockedTable(t *testing.T) {
	t.Parallel()
	server, config := startRedis(t), newDatabase(t)
	p := startAnother(t, options{database: config, redisURL: server.url})
	p.list(t, storedStatus)
	lock, waiters := lockProperties(t, openPast(t, config))
	p.list(t, hitStatus)
	server.do("FLUSHALL")
	answers := []<-chan exchange{p.get(), p.later("POST", propertiesPath, titled("late"))}
	eventually(t, "both wait", func() bool { return waiters() == 2 })
	for _, answer := range answers {
		checkProblem(t, receive(t, answer), "took longer than 4 s: nothing was changed")
	}
	lock.Rollback()
	// It queues behind the late one, if there is one.
	p.post(t, "next")
	p.lists(t, storedStatus, "next")
}

// A trigger makes PostgreSQL refuse an INSERT with the SQLSTATE in its title, or drop it.
func TestTriggerRefuses(t *testing.T) {
	log := keepLog(t)
	p := start(t, options{})
	runSQL(t, p.db, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF NEW.title = 'drop' THEN RETURN NULL; END IF;
			RAISE 'a test''s' USING ERRCODE = NEW.title; END $$;
		CREATE TRIGGER refuse BEFORE INSERT ON properties FOR EACH ROW EXECUTE FUNCTION refuse()`)
	// 54000 is a full queue of NOTIFY. checkProblem looks at Retry-After.
	for title, status := range map[string]int{
		"54000": 503, "23514": 409, "42501": 500, "drop": 500,
	} {
		checkProblem(t, p.want(t, status, "POST", propertiesPath, titled(title)))
	}
	if n := log.count("status=500", "does a BEFORE trigger drop it?"); n != 1 {
		t.Errorf("the log says %d times what to look for: %s", n, log)
	}
}

// What PostgreSQL refuses for good: a row that another table needs, rights, columns and tables.
func TestRefusedForGood(t *testing.T) {
	admin := start(t, options{rows: 1})
	config := newRole(t, "ALL")
	p := startAnother(t, options{database: config})
	for _, test := range []struct {
		harm     string
		status   int
		requests []request
	}{
		{`CREATE TABLE viewings (property bigint REFERENCES properties);
			INSERT INTO viewings VALUES (1)`, 409, writes[2:]},
		{`REVOKE ALL ON properties FROM ` + config.User, 500, requests},
		{`GRANT ALL ON properties TO ` + config.User + `;
			ALTER TABLE properties RENAME location TO place`, 500, requests[:4]},
		{`DROP TABLE properties CASCADE`, 500, requests},
	} {
		runSQL(t, admin.db, test.harm)
		p.forget(t)
		for _, r := range test.requests {
			checkProblem(t, p.want(t, test.status, r.method, r.path, titled("Loft")))
		}
	}
}

// A deferred constraint fails at COMMIT: PostgreSQL did answer, so nothing was changed.
func TestDeferredConstraint(t *testing.T) {
	p := start(t, options{})
	runSQL(t, p.db, `ALTER TABLE properties ADD UNIQUE (title) DEFERRABLE INITIALLY DEFERRED`)
	p.post(t, "one")
	p.post(t, "two")
	checkProblem(t, p.want(t, 409, "POST", propertiesPath, titled("two")))
	checkProblem(t, p.want(t, 409, "PUT", "/properties/2/", titled("one")))
	p.lists(t, storedStatus, "one, two")
}

// PostgreSQL without a connection to spare is a 503 for now.
func TestOutOfConnections(t *testing.T) {
	admin := start(t, options{})
	config := newRole(t, "ALL")
	p := startAnother(t, options{database: config})
	p.list(t, storedStatus)
	runSQL(t, admin.db, `ALTER ROLE `+config.User+` CONNECTION LIMIT 0`)
	// So that the next request dials.
	p.db.SetMaxIdleConns(0)
	p.list(t, hitStatus)
	for _, r := range requests[1:] {
		checkProblem(t, p.want(t, 503, r.method, r.path, with(``)), "can't do this now")
	}
	runSQL(t, admin.db, `ALTER ROLE `+config.User+` CONNECTION LIMIT -1`)
	p.post(t, "Loft")
}

// A server that is read-only for a while reads, says so to who writes, and is used at once when it
// isn't any more, although sessions are left that stay read-only.
func TestReadOnlyForAWhile(t *testing.T) {
	p, admin := start(t, options{rows: 1}), psql(t)
	setDatabase(t, admin, "default_transaction_read_only = on")
	endConnections(t, admin)
	for range 3 {
		checkProblem(t, p.want(t, 503, "POST", propertiesPath, with(``)), "is read-only")
		p.want(t, 200, "GET", "/properties/1/", "")
		p.list(t, "redis; ")
	}
	p.fillPool(t)
	setDatabase(t, admin, "default_transaction_read_only = off")
	p.burst(t, 16, 2, requests[2])
	p.isWell(t)
}

// What a database sets for its sessions, such as another encoding, changes no answer, and no entry
// in Redis.
func TestSessionSettings(t *testing.T) {
	usual := start(t, options{})
	setDatabase(t, psql(t), "client_encoding = 'LATIN1'", "datestyle = 'German'",
		"TimeZone = 'Asia/Kathmandu'")
	unusual := startAnother(t, options{})
	e := unusual.post(t, "é-Hội")
	for _, p := range []*program{usual, unusual} {
		if got := p.want(t, 200, "GET", "/properties/1/", "").body; string(got) != string(e.body) {
			t.Errorf("%s, want %s", got, e.body)
		}
	}
	list := unusual.list(t, storedStatus)
	if got := usual.list(t, hitStatus); titles(got) != "é-Hội" || got[0] != list[0] {
		t.Errorf("%+v, want %+v", got, list)
	}
}

// Connections that PostgreSQL, a pooler or a failover has ended fail no request; nor do those over
// which nothing comes any more, after a host has vanished without a word.
func TestLostConnections(t *testing.T) {
	network, config := proxyToPostgres(t)
	p := start(t, options{rows: 1, database: config})
	for _, lose := range []func(){
		func() { endConnections(t, psql(t)) },
		func() { network.vanish(t) },
	} {
		p.fillPool(t)
		lose()
		p.burst(t, 16, 2, requests[1:3]...)
	}
	p.isWell(t)
}

// A column's type changes while connections are open that have used it. Behind a pooler in
// transaction mode, each transaction meets another connection. Neither fails a request, because no
// statement is prepared under a name.
func TestNothingIsPrepared(t *testing.T) {
	direct := start(t, options{rows: 1})
	for _, p := range []*program{direct, startAnother(t, options{database: startPooler(t)})} {
		p.fillPool(t)
		p.burst(t, 16, 4, requests[1:4]...)
		runSQL(t, psql(t), `ALTER TABLE properties ALTER title TYPE varchar(300)`)
		p.burst(t, 16, 4, requests[1:4]...)
	}
}

// /healthz tells at once that PostgreSQL is up, although every pooled connection waits for a lock,
// and that it hangs: before those who wait have their answer. It says so in words for people.
func TestHealthAtOnce(t *testing.T) {
	network, config := proxyToPostgres(t)
	p := start(t, options{rows: 1, database: config})
	lock, waiters := lockProperties(t, psql(t))
	answers := make(chan exchange, 32)
	read := func() { answers <- <-p.later("GET", "/properties/1/", "") }
	for range cap(answers) {
		go read()
	}
	eventually(t, "every connection waits", func() bool { return waiters() == 16 })
	p.health(t, 200)
	if len(answers) > 0 {
		t.Error("a read had its answer before")
	}
	lock.Rollback()
	for range cap(answers) {
		if e := receive(t, answers); e.StatusCode != 200 {
			t.Errorf("a read: %s", e.body)
		}
	}
	network.set(t, swallow)
	go read()
	got := p.health(t, 503)
	if strings.Contains(got, "context") || !strings.Contains(got, "PostgreSQL does not answer") ||
		len(answers) > 0 {
		t.Errorf("after a read had its answer, or in Go's words: %s", got)
	}
	network.set(t, healthy)
	p.isWell(t)
}

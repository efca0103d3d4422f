// http_test.go: what HTTP says: paths, headers, who may do what, cached pages, metrics and health.

package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

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
		{"PUT", "/properties/4/", 404, "Content-Type", refusal},
		{"DELETE", "/properties/4/", 404, "Content-Type", refusal},
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
		p.want(t, status, "POST", propertiesPath, titled("Loft"), "Content-Type", contentType)
		if status == 415 {
			p.want(t, status, "PUT", "/properties/1/", titled("Loft"), "Content-Type", contentType)
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
		p.want(t, status, "GET", "/healthz", "", "Host", host)
	}
	// Load balancers may send none.
	for header, status := range map[string]int{"": 200, "Host: evil.example\r\n": 421} {
		if e := p.talk(t, "GET /healthz HTTP/1.0\r\n"+header+"\r\n"); e.StatusCode != status {
			t.Errorf("HTTP/1.0 %q: status %d", header, e.StatusCode)
		}
	}
	e := p.want(t, 421, "POST", propertiesPath, titled("Loft"), "Host", "homes.example")
	got := checkProblem(t, e).Detail
	if !strings.Contains(got, "A proxy needs WRITE_TOKEN set") {
		t.Errorf("421 doesn't help: %s", got)
	}
}

// Without a token, another site's page may not write. With a token, it alone decides. What a client
// wants to be protected from can't be promised, so it is refused.
func TestWhoMayWrite(t *testing.T) {
	open, closed := start(t, options{}), startAnother(t, options{writeToken: "sesame"})
	tests := []struct {
		about        string
		p            *program
		method, path string
		status       int
		header       string
	}{
		{"our own page", open, "POST", propertiesPath, 201, "Sec-Fetch-Site: same-origin"},
		{"another site's read", open, "GET", propertiesPath, 200, "Sec-Fetch-Site: cross-site"},
		{"another site's page", open, "POST", propertiesPath, 403, "Sec-Fetch-Site: cross-site"},
		{"another origin's page", open, "POST", propertiesPath, 403, "Origin: http://evil.example"},

		{"a read", closed, "GET", propertiesPath, 200, ""},
		{"a public name", closed, "GET", propertiesPath, 200, "Host: homes.example"},
		{"no token", closed, "POST", propertiesPath, 401, ""},
		{"no token to PUT", closed, "PUT", "/properties/1/", 401, ""},
		{"no token to DELETE", closed, "DELETE", "/properties/1/", 401, ""},
		{"another token", closed, "POST", propertiesPath, 401, "Authorization: Bearer sesamf"},
		{"a longer token", closed, "POST", propertiesPath, 401, "Authorization: Bearer sesames"},
		{"another scheme", closed, "POST", propertiesPath, 401, "Authorization: Basic sesame"},
		{"the token", closed, "POST", propertiesPath, 201, "Authorization: Bearer sesame"},
		{"a scheme in small", closed, "POST", propertiesPath, 201, "Authorization: bearer sesame"},
		{"the token, from another origin", closed, "POST", propertiesPath, 201,
			"Authorization: Bearer sesame, Origin: http://evil.example"},

		{"any tag", open, "PUT", "/properties/1/", 200, "If-Match: *"},
		{"a tag", open, "PUT", "/properties/1/", 412, `If-Match: "a"`},
		{"a weak tag", open, "DELETE", "/properties/1/", 412, `If-Match: W/"a"`},
		{"only where nothing is", open, "PUT", "/properties/1/", 412, "If-None-Match: *"},
		{"only where another tag is", open, "PUT", "/properties/1/", 200, `If-None-Match: "a"`},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			var header []string
			for field := range strings.SplitSeq(test.header, ", ") {
				name, value, _ := strings.Cut(field, ": ")
				header = append(header, cmp.Or(name, "Accept"), value)
			}
			e := test.p.want(t, test.status, test.method, test.path, titled("Loft"), header...)
			if test.status >= 400 {
				checkProblem(t, e)
			}
			asks := e.Header.Get("WWW-Authenticate") == `Bearer realm="properties"`
			if asks != (test.status == 401) {
				t.Errorf("WWW-Authenticate: %q", e.Header.Get("WWW-Authenticate"))
			}
		})
	}
}

// The headers of the list, and what a client gets that has a copy of it. Zipped, it is the same
// list with another tag.
func TestConditionalRequests(t *testing.T) {
	p := start(t, options{rows: 3})
	forms := map[string]exchange{"": {Response: &http.Response{}}}
	for _, coding := range []string{"", "gzip"} {
		get := func(status int, method, name, value string) exchange {
			t.Helper()
			return p.want(t, status, method, propertiesPath, "",
				"Accept-Encoding", coding, name, value)
		}
		// The other form's tag is none of this one's.
		get(200, "GET", "If-None-Match", forms[""].Header.Get("ETag"))
		e := get(200, "GET", "Range", "bytes=0-1")
		forms[coding] = e
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
		tag := e.Header.Get("ETag")
		for _, method := range []string{"GET", "HEAD"} {
			e := get(304, method, "If-None-Match", `"b", W/`+tag)
			if len(e.body) > 0 || e.Header.Get("ETag") != tag || tag[0] != '"' ||
				e.Header.Get("Vary") == "" || e.Header.Get("Content-Encoding") != "" ||
				e.Header.Get("Cache-Control") != "no-cache" {
				t.Errorf("304: %s %v", e.body, e.Header)
			}
			get(200, method, "If-None-Match", `"b"`)
		}
	}
	zipped, err := gzip.NewReader(bytes.NewReader(forms["gzip"].body))
	if err != nil {
		t.Fatal(err)
	}
	if list, err := io.ReadAll(zipped); err != nil || string(list) != string(forms[""].body) {
		t.Errorf("unzipped: %s (%v)", list, err)
	}
}

// Only a 200 without a cookie that says what it has seen is stored. The view sees nothing of the
// client's request.
func TestCachePage(t *testing.T) {
	p := start(t, options{})
	var snapshot string
	if err := p.db.QueryRow(`SELECT properties_snapshot()`).Scan(&snapshot); err != nil {
		t.Fatal(err)
	}
	answer := func(status int, name, value string) view {
		return func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Snapshot", snapshot)
			w.Header().Set(name, value)
			w.WriteHeader(status)
			fmt.Fprint(w, r.Method, r.URL, r.Header, r.Host, r.RemoteAddr, r.Body == http.NoBody)
			return nil
		}
	}
	tests := []struct {
		path   string
		view   view
		status int
	}{
		{"/an-answer/", answer(200, "X-Kind", "of its own"), 200},
		{"/a-cookie/", answer(200, "Set-Cookie", "a=b"), 500},
		{"/an-error/", answer(503, "X-Kind", ""), 500},
		{"/a-redirect/", answer(302, "Location", "/"), 500},
		{"/a-part/", answer(206, "X-Kind", ""), 500},
		{"/nothing-seen/", answer(200, "Snapshot", ""), 500},
		{"/nonsense-seen/", answer(200, "Snapshot", "yesterday"), 500},
		{"/a-problem/", func(http.ResponseWriter, *http.Request) error { return errNotFound }, 404},
		{"/a-panic/", func(http.ResponseWriter, *http.Request) error { panic("in a view") }, 500},
	}
	for _, test := range tests {
		_, cached := p.cache.cachePage(test.path, time.Minute, test.view)
		page := &program{url: newServer(t, cached)}
		for _, method := range []string{"HEAD", "GET"} {
			e := page.want(t, test.status, method, test.path+"?a", titled("Loft"), "Cookie", "b=c")
			if stored := p.exist(t, "page:"+test.path) == 1; stored != (test.status == 200) {
				t.Errorf("%s: stored: %v", test.path, stored)
			}
			switch {
			case method == "HEAD":
			case test.status != 200:
				checkProblem(t, e)
			case string(e.body) != "GET"+test.path+" map[]true" || e.Header.Get("X-Kind") == "" ||
				!strings.HasPrefix(e.Header.Get("Cache-Status"), hitStatus):
				t.Errorf("%s: %s %v", test.path, e.body, e.Header)
			}
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

// A time has six decimals, so that a fixed pattern reads it, and is UTC.
func TestCreatedAt(t *testing.T) {
	p := start(t, options{})
	runSQL(t, p.db, `INSERT INTO properties (title, description, price, location, created_at)
		SELECT 'Loft', '', 1, 'Accra', unnest('{2026-01-02 03:04:05Z, 2026-01-02 03:04:05.5Z,
			0001-01-01 05:45+05:45}'::timestamptz[])`)
	want := "2026-01-02T03:04:05.000000Z 2026-01-02T03:04:05.500000Z 0001-01-01T00:00:00.000000Z"
	p.knows(t)
	list := p.list(t, storedStatus)
	for i, created := range strings.Fields(want) {
		one := p.want(t, 200, "GET", fmt.Sprintf("/properties/%d/", i+1), "").body
		if list[i].CreatedAt != created || !strings.Contains(string(one), `"`+created+`"`) {
			t.Errorf("%+v, %s, want %s", list[i], one, created)
		}
	}
}

// Browsers send all cookies of localhost, whichever program has set them. Headers have a limit.
func TestLargeHeaders(t *testing.T) {
	reset(t)
	p := runMain(t, nil, "-addr", "127.0.0.1:0").serving(t).api()
	for size, status := range map[int]int{21_000: 200, 100 << 10: 431} {
		p.want(t, status, "GET", propertiesPath, "", "Cookie", strings.Repeat("c", size))
	}
}

// A client that closes its sending side early, as printf | nc -N does, still reads: it gets a whole
// answer, however long that takes.
func TestHalfClose(t *testing.T) {
	p := start(t, options{rows: 3})
	lock, waiters := lockProperties(t)
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

// A client that hangs up in the middle of a write leaves nothing outdated: the write goes on, and
// its receivers run.
func TestClientLeavesDuringWrite(t *testing.T) {
	p := start(t, options{deaf: true})
	p.list(t, storedStatus)
	asked, committed := make(chan context.Context, 1), make(chan bool)
	goOn, sent := make(chan bool), make(chan bool)
	s := &p.properties.signals.postSave
	s.receivers = slices.Insert(s.receivers, 0, func(change) {
		committed <- true
		<-goOn
	})
	s.connect(func(change) { sent <- true })
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
	if got := p.shown(t); got != "new" {
		t.Errorf("the list has %q", got)
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

// Without Redis, and without the right to its INFO, what this process counted is there all the
// same, because that is when bypassed matters.
func TestMetricsWithoutRedis(t *testing.T) {
	server := startRedis(t)
	server.do("ACL", "SETUSER", "weak", "on", ">secret", "~*", "+@all", "-info")
	for _, test := range []struct{ redisURL, cacheStatus, counts, sample string }{
		{strings.Replace(server.url, "//", "//weak:secret@", 1), storedStatus,
			`{"hits":0,"misses":1,"coalesced":0,"bypassed":0}`, `result="miss"} 1`},
		{"redis://127.0.0.1:" + freePort(t), bypassStatus,
			`{"hits":0,"misses":0,"coalesced":0,"bypassed":1}`, "\nproperties_redis_up 0\n"},
	} {
		p := start(t, options{redisURL: test.redisURL})
		p.list(t, test.cacheStatus)
		want := `{"keyspace_hits":null,"keyspace_misses":null,"hit_ratio":null,"levels":{"page":` +
			test.counts + `,"all_properties":` + test.counts + "}}\n"
		if got := p.want(t, 200, "GET", "/cache/metrics/", "").body; string(got) != want {
			t.Errorf("%s, want %s", got, want)
		}
		text := string(p.want(t, 200, "GET", "/metrics", "").body)
		if !strings.Contains(text, test.sample) {
			t.Errorf("%s", text)
		}
	}
}

// /healthz says why the cache isn't in use: in Redis's own words, or in the system's if Redis isn't
// there. PostgreSQL is up, so the program is healthy.
func TestHealthWithoutRedis(t *testing.T) {
	server := startRedis(t)
	start(t, options{redisURL: server.url}).isWell(t)
	for _, test := range []struct{ redisURL, setting, value, why string }{
		{"redis://127.0.0.1:" + freePort(t), "maxmemory", "1", "connection refused"},
		{server.url, "maxmemory", "1", "OOM command not allowed when used memory > 'maxmemory'."},
		{server.url, "requirepass", "x", "NOAUTH Authentication required."},
	} {
		server.do("CONFIG", "SET", test.setting, test.value)
		p := start(t, options{redisURL: test.redisURL})
		p.list(t, "redis; fwd=")
		want := `{"announcements":"heard","cache":"bypassed","postgresql":"up","redis":"` +
			test.why + `"}`
		if got := p.health(t, 200); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// /healthz tells at once that PostgreSQL is up, although every pooled connection waits for a lock,
// and that it hangs: before those who wait have their answer. It says so in words for people.
func TestHealthAtOnce(t *testing.T) {
	network, config := proxyToPostgres(t)
	p := start(t, options{rows: 1, database: config})
	lock, waiters := lockProperties(t)
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

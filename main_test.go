// main_test.go: PostgreSQL and Redis for all tests, and the tests of main.go.

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// services are the real servers that the tests run against: a database of their own, which TestMain creates
// and drops, and a Redis database that was empty.
var services struct {
	database *pgx.ConnConfig
	redisURL string
}

func TestMain(m *testing.M) {
	if os.Getenv("BENCH_CLIENT") != "" { // bench_test.go runs this binary again, for the load
		benchClient()
		return
	}
	os.Exit(withServices(m.Run))
}

func withServices(run func() int) int {
	databaseURL, redisURL := os.Getenv("DATABASE_URL"), os.Getenv("REDIS_URL")
	config, err := pgx.ParseConfig(databaseURL)
	if databaseURL == "" || redisURL == "" || err != nil {
		return refuse("DATABASE_URL and REDIS_URL are not both set")
	}
	ctx := context.Background()
	admin := stdlib.OpenDB(*config)
	defer admin.Close()
	database := "properties_test_" + strings.ToLower(rand.Text()[:8])
	if _, err := admin.ExecContext(ctx, "CREATE DATABASE "+database); err != nil {
		return refuse(err.Error())
	}
	defer admin.ExecContext(ctx, "DROP DATABASE "+database+" WITH (FORCE)")
	services.database, services.redisURL = config.Copy(), redisURL
	services.database.Database = database

	conn, err := redis.DialURL(redisURL)
	if err != nil {
		return refuse(err.Error())
	}
	defer conn.Close()
	if keys, err := redis.Int(conn.Do("DBSIZE")); err != nil || keys > 0 {
		return refuse(fmt.Sprintf("the Redis database of REDIS_URL holds %d keys (%v): the tests want an empty one", keys, err))
	}
	defer conn.Do("FLUSHDB")

	if os.Getenv("TEST_LOG") == "" { // set it to see the program's log
		slog.SetDefault(slog.New(slog.DiscardHandler))
	}
	return run()
}

func refuse(why string) int {
	fmt.Fprintf(os.Stderr, "The tests need PostgreSQL and Redis: %s.\nRun them with: scripts/with-services go test -race ./...\n", why)
	return 1
}

// A program is the whole of it, on an address of its own, with what a test looks at it through.
type program struct {
	*app
	url   string
	db    *sql.DB    // the program's
	redis redis.Conn // the test's own
}

// options differ from the defaults of a test's program.
type options struct {
	database   *pgx.ConnConfig
	redisURL   string
	writeToken string
	rows       uint // seeded
}

// start starts a program with an empty cache and no rows but those of the options.
func start(t testing.TB, o options) *program {
	t.Helper()
	reset(t)
	return startAnother(t, o)
}

// startAnother starts one more program on the same tables and keys.
func startAnother(t testing.TB, o options) *program {
	t.Helper()
	if o.database == nil {
		o.database = services.database
	}
	if o.redisURL == "" {
		o.redisURL = services.redisURL
	}
	db := stdlib.OpenDB(*o.database)
	t.Cleanup(func() { db.Close() })
	if err := prepare(t.Context(), db, o.rows); err != nil {
		t.Fatal(err)
	}
	a := newApp(db, o.redisURL, o.writeToken)
	a.cache.heal() // may fail: some tests start without Redis
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	go func() { a.cache.run(ctx); close(stopped) }()
	t.Cleanup(func() {
		cancel()
		<-stopped
		a.cache.pool.Load().Close()
	})
	return &program{app: a, url: newServer(t, a.routes()), db: db, redis: dialRedis(t, services.redisURL)}
}

// reset drops the tables and the keys of the test before.
func reset(t testing.TB) {
	t.Helper()
	db := stdlib.OpenDB(*services.database)
	defer db.Close()
	if _, err := db.Exec(`DROP SCHEMA public CASCADE; CREATE SCHEMA public`); err != nil {
		t.Fatal(err)
	}
	if _, err := dialRedis(t, services.redisURL).Do("FLUSHDB"); err != nil {
		t.Fatal(err)
	}
}

func dialRedis(t testing.TB, rawURL string) redis.Conn {
	t.Helper()
	conn, err := redis.DialURL(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// newServer serves handler until the test ends, and returns its URL.
func newServer(t testing.TB, handler http.Handler) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(func() {
		server.CloseClientConnections() // some tests leave requests behind that nobody reads
		server.Close()
	})
	return server.URL
}

// An exchange is a response with its body read.
type exchange struct {
	*http.Response
	body []byte
}

// client neither follows redirects nor asks for gzip by itself.
var client = &http.Client{
	Transport:     &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 1000},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// send makes a request; header holds names and values in turn.
func (p *program) send(method, path, body string, header ...string) (exchange, error) {
	r, err := http.NewRequest(method, p.url+path, strings.NewReader(body))
	if err != nil {
		return exchange{}, err
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			r.Host = header[i+1]
		}
		r.Header.Set(header[i], header[i+1])
	}
	response, err := client.Do(r)
	if err != nil {
		return exchange{}, err
	}
	defer response.Body.Close()
	read, err := io.ReadAll(response.Body)
	return exchange{response, read}, err
}

// want is send that insists on a status.
func (p *program) want(t testing.TB, status int, method, path, body string, header ...string) exchange {
	t.Helper()
	e, err := p.send(method, path, body, header...)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	if e.StatusCode != status {
		t.Fatalf("%s %s %.100s: status %d, want %d: %s", method, path, body, e.StatusCode, status, e.body)
	}
	return e
}

// list is a GET of all properties that insists on a Cache-Status that starts so.
func (p *program) list(t testing.TB, cacheStatus string) []property {
	t.Helper()
	e := p.want(t, 200, "GET", "/properties/", "")
	if got := e.Header.Get("Cache-Status"); !strings.HasPrefix(got, cacheStatus) {
		t.Fatalf("Cache-Status: %s, want %s", got, cacheStatus)
	}
	var list []property
	if err := json.Unmarshal(e.body, &list); err != nil {
		t.Fatal(err)
	}
	return list
}

const (
	hitStatus     = "redis; hit; ttl="
	storedStatus  = "redis; fwd=uri-miss; stored"
	missStatus    = "redis; fwd=uri-miss"
	bypassStatus  = "redis; fwd=bypass; detail=untrusted"
	validProperty = `{"title":"Loft","description":"Bright.","price":"1234.50","location":"Accra"}`
)

// titled is a valid property's JSON with another title.
func titled(title string) string {
	return fmt.Sprintf(`{"title":%q,"description":"","price":1,"location":"Accra"}`, title)
}

func titles(list []property) string {
	var all []string
	for _, p := range list {
		all = append(all, p.Title)
	}
	return strings.Join(all, ", ")
}

// eventually waits for what happens in the background; it gives up after 10 s.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: waited 10 s until %s", what)
		}
	}
}

// receive is <-c that gives up after 10 s.
func receive[T any](t testing.TB, c <-chan T) (value T) {
	t.Helper()
	select {
	case value = <-c:
	case <-time.After(10 * time.Second):
		t.Fatal("in vain: waited 10 s for what should come at once")
	}
	return value
}

// A bad setting is one line that names it, without the password, and status 1; a bad flag is 2.
func TestBadSettings(t *testing.T) {
	tests := []struct {
		about  string
		args   string
		env    map[string]string
		status int
		says   string
	}{
		{"not a URL", "", map[string]string{"DATABASE_URL": "postgres://u:s3cret@host:port/db"}, 1, "DATABASE_URL"},
		{"a bad parameter", "", map[string]string{"DATABASE_URL": "postgres://u:s3cret@host/db?sslmode=s3cret"}, 1, "DATABASE_URL"},
		{"an unknown keyword's form", "", map[string]string{"DATABASE_URL": "host=localhost port=s3cret"}, 1, "DATABASE_URL"},
		{"another scheme", "", map[string]string{"REDIS_URL": "http://:s3cret@localhost"}, 1, "REDIS_URL"},
		{"no host", "", map[string]string{"REDIS_URL": "redis:s3cret"}, 1, "REDIS_URL"},
		{"a bad port", "", map[string]string{"REDIS_URL": "redis://:s3cret@localhost:x"}, 1, "REDIS_URL"},
		{"a named database", "", map[string]string{"REDIS_URL": "redis://:s3cret@localhost/zero"}, 1, "REDIS_URL"},
		{"two numbers", "", map[string]string{"REDIS_URL": "redis://:s3cret@localhost/1/2"}, 1, "REDIS_URL"},
		{"a token with a blank", "", map[string]string{"WRITE_TOKEN": "s3cret s3cret"}, 1, "WRITE_TOKEN"},
		{"every address without a token", "-addr :8000", nil, 1, "WRITE_TOKEN"},
		{"an outer address without a token", "-addr 192.0.2.1:8000", nil, 1, "WRITE_TOKEN"},
		{"an address without a port", "-addr localhost", nil, 2, "-addr"},
		{"a negative seed", "-seed -1", nil, 2, "-seed"},
		{"an unknown flag", "-port 1", nil, 2, "-port"},
		{"an argument", "serve", nil, 2, "serve"},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			var status int
			printed := stderr(t, func() {
				status = run(strings.Fields(test.args), func(name string) string { return test.env[name] })
			})
			if status != test.status || !strings.Contains(printed, test.says) || strings.Contains(printed, "s3cret") {
				t.Errorf("status %d, want %d: %s", status, test.status, printed)
			}
			if lines := strings.Count(printed, "\n"); test.status == 1 && lines != 1 {
				t.Errorf("%d lines: %s", lines, printed)
			}
		})
	}
}

// stderr returns what f prints there.
func stderr(t *testing.T, f func()) string {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	saved := os.Stderr
	os.Stderr = write
	f()
	os.Stderr = saved
	write.Close()
	printed, err := io.ReadAll(read)
	if err != nil {
		t.Fatal(err)
	}
	return string(printed)
}

// The schema can be applied again and by many at once, and a seed only fills an empty table, once.
func TestPrepareTwiceAndAtOnce(t *testing.T) {
	reset(t)
	failed := make(chan error)
	for range 8 {
		go func() {
			db := stdlib.OpenDB(*services.database)
			defer db.Close()
			failed <- prepare(context.Background(), db, 100)
		}()
	}
	for range 8 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	p := startAnother(t, options{rows: 5})
	if n := len(p.list(t, storedStatus)); n != 100 {
		t.Errorf("%d properties, want 100", n)
	}
}

// Whoever reaches the server under another name than this machine's own, or writes from another site's
// page, or without the token, is refused.
func TestWhoMayDoWhat(t *testing.T) {
	open, closed := start(t, options{}), startAnother(t, options{writeToken: "sesame"})
	tests := []struct {
		about   string
		p       *program
		method  string
		headers []string
		status  int
	}{
		{"by IP", open, "POST", nil, 201},
		{"by name", open, "POST", []string{"Host", "localhost:8000"}, 201},
		{"by name in capitals", open, "GET", []string{"Host", "LOCALHOST"}, 200},
		{"by IPv6", open, "POST", []string{"Host", "[::1]:8000"}, 201},
		{"by a rebound name, read", open, "GET", []string{"Host", "evil.example"}, 421},
		{"by a rebound name, write", open, "POST", []string{"Host", "evil.example:8000"}, 421},
		{"by a name that starts well", open, "GET", []string{"Host", "localhost.evil.example"}, 421},
		{"same origin", open, "POST", []string{"Sec-Fetch-Site", "same-origin"}, 201},
		{"another site's read", open, "GET", []string{"Sec-Fetch-Site", "cross-site"}, 200},
		{"another site's write", open, "POST", []string{"Sec-Fetch-Site", "cross-site"}, 403},
		{"another origin's write", open, "POST", []string{"Origin", "http://evil.example"}, 403},
		{"a read without the token", closed, "GET", nil, 200},
		{"a public name with a token set", closed, "GET", []string{"Host", "homes.example"}, 200},
		{"a write without the token", closed, "POST", nil, 401},
		{"a write with another token", closed, "POST", []string{"Authorization", "Bearer sesamf"}, 401},
		{"a write with more than the token", closed, "POST", []string{"Authorization", "Bearer sesames"}, 401},
		{"a write with another scheme", closed, "POST", []string{"Authorization", "Basic sesame"}, 401},
		{"a write with the token", closed, "POST", []string{"Authorization", "Bearer sesame"}, 201},
		{"a write with the token, scheme in small", closed, "POST", []string{"Authorization", "bearer sesame"}, 201},
		{"another site's write with the token", closed, "POST", []string{"Authorization", "Bearer sesame", "Sec-Fetch-Site", "cross-site"}, 403},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			body := ""
			if test.method == "POST" {
				body = validProperty
			}
			e := test.p.want(t, test.status, test.method, "/properties/", body, test.headers...)
			if test.status >= 400 {
				checkProblem(t, e)
			}
			if (test.status == 401) != (e.Header.Get("WWW-Authenticate") == "Bearer") {
				t.Errorf("WWW-Authenticate: %q", e.Header.Get("WWW-Authenticate"))
			}
		})
	}
	for _, write := range []string{"PUT", "DELETE"} {
		closed.want(t, 401, write, "/properties/1/", "")
	}
}

// checkProblem insists that an error is RFC 9457 and tells nothing of our inside.
func checkProblem(t *testing.T, e exchange) problem {
	t.Helper()
	var p problem
	if err := json.Unmarshal(e.body, &p); err != nil {
		t.Fatalf("%v: %s", err, e.body)
	}
	if got := e.Header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("Content-Type: %s", got)
	}
	if p.Type != "about:blank" || p.Title != http.StatusText(e.StatusCode) || p.Status != e.StatusCode || p.Detail == "" {
		t.Errorf("problem: %+v", p)
	}
	for _, secret := range []string{"SELECT", "INSERT", "SQLSTATE", "pgconn", "127.0.0.1:", "goroutine", ".go:", "panic", "EOF"} {
		if bytes.Contains(e.body, []byte(secret)) {
			t.Errorf("the answer tells %q: %s", secret, e.body)
		}
	}
	if (e.StatusCode == 503) != (e.Header.Get("Retry-After") != "") {
		t.Errorf("status %d with Retry-After: %q", e.StatusCode, e.Header.Get("Retry-After"))
	}
	return p
}

// A panic in a view is a 500 of its own; the server goes on.
func TestPanicInView(t *testing.T) {
	p := start(t, options{})
	handler := recovered(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("at the disco") }))
	recorder := httptest.NewRecorder()
	handler.ServeHTTP(recorder, httptest.NewRequest("GET", "/", nil))
	e := exchange{recorder.Result(), recorder.Body.Bytes()}
	if e.StatusCode != 500 {
		t.Errorf("status %d", e.StatusCode)
	}
	checkProblem(t, e)
	p.list(t, storedStatus)
}

// /healthz is about PostgreSQL, and names Redis and the cache.
func TestHealth(t *testing.T) {
	up := start(t, options{})
	if e := up.want(t, 200, "GET", "/healthz", ""); string(e.body) != `{"cache":"in use","postgresql":"up","redis":"up"}`+"\n" {
		t.Errorf("all up: %s", e.body)
	}
	nobody := newProxy(t, "127.0.0.1:1")
	withoutRedis := startAnother(t, options{redisURL: "redis://" + nobody.addr})
	if e := withoutRedis.want(t, 200, "GET", "/healthz", ""); string(e.body) != `{"cache":"bypassed","postgresql":"up","redis":"down"}`+"\n" {
		t.Errorf("without Redis: %s", e.body)
	}
	up.db.Close()
	if e := up.want(t, 503, "GET", "/healthz", ""); !strings.Contains(string(e.body), `"postgresql":"down"`) {
		t.Errorf("without PostgreSQL: %s", e.body)
	}
}

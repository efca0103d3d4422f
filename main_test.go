// main_test.go: PostgreSQL and Redis for all tests, and the tests of main.go.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
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
	redis    redis.Conn
}

func TestMain(m *testing.M) {
	if os.Getenv("RUN_MAIN") != "" { // runMain starts this binary again, as the program
		main()
		return
	}
	if os.Getenv("BENCH_CLIENT") != "" { // bench_test.go runs this binary again, for the load
		benchClient()
		return
	}
	os.Exit(withServices(m.Run))
}

func withServices(run func() int) int {
	if os.Getenv("DATABASE_URL") == "" || os.Getenv("REDIS_URL") == "" {
		return giveUp("DATABASE_URL and REDIS_URL are not both set")
	}
	env := settings{addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}
	if err := env.readEnvironment(); err != nil {
		return giveUp(err.Error())
	}
	ctx := context.Background()
	admin := stdlib.OpenDB(*env.database)
	defer admin.Close()
	database := "properties_test_" + strings.ToLower(rand.Text()[:8])
	if _, err := admin.ExecContext(ctx, "CREATE DATABASE "+database); err != nil {
		return giveUp(err.Error())
	}
	defer admin.ExecContext(ctx, "DROP DATABASE "+database+" WITH (FORCE)")
	services.database = env.database.Copy()
	services.database.Database = database
	var err error
	if services.redisURL, services.redis, err = claimRedis(env.redisURL); err != nil {
		return giveUp(err.Error())
	}
	defer services.redis.Do("FLUSHDB")

	if os.Getenv("TEST_LOG") == "" { // set it to see the program's log
		slog.SetDefault(slog.New(slog.DiscardHandler))
	}
	return run()
}

const claimKey = "properties:tests"

// claimRedis finds a Redis database that the program in use doesn't have, the last one that is empty, and puts a key
// there. It looks and puts in one step, so that other tests at the same time take another one.
func claimRedis(rawURL string) (string, redis.Conn, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return "", nil, err
	}
	refusal := "each has keys"
	for n := 15; n > 0; n-- {
		u.Path = fmt.Sprintf("/%d", n)
		conn, err := redis.DialURL(u.String())
		if err != nil { // there may be fewer than 16
			refusal = err.Error()
			continue
		}
		const claim = `return redis.call('DBSIZE') == 0 and redis.call('SET', KEYS[1], ARGV[1])`
		if _, err = redis.String(conn.Do("EVAL", claim, 1, claimKey, os.Getpid())); err == nil {
			return u.String(), conn, nil
		}
		if conn.Close(); err != redis.ErrNil {
			refusal = err.Error()
		}
	}
	return "", nil, fmt.Errorf("none of Redis's databases 1 to 15 can be used: %s", refusal)
}

func giveUp(why string) int {
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

	// query wraps the query of the list.
	query func(listQuery) listQuery
}

// A listQuery is what a cache loads the list with.
type listQuery = func(context.Context) ([]property, error)

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
	db, health := openDB(o.database, 16), openDB(o.database, 1)
	t.Cleanup(func() { db.Close(); health.Close() })
	if err := prepare(t.Context(), db, o.rows); err != nil {
		t.Fatal(err)
	}
	a := newApp(db, health, &settings{database: o.database, redisURL: o.redisURL, writeToken: o.writeToken})
	if o.query != nil {
		a.cache.query = o.query(a.cache.query)
	}
	p := &program{app: a, db: db, redis: dialRedis(t, services.redisURL)}
	t.Cleanup(a.startBackground()) // Redis may be away: some tests start without it
	p.url = newServer(t, a.routes())
	return p
}

// trusted reports whether the program uses Redis.
func (p *program) trusted() bool { return p.cache.session.Load() != nil }

// reset drops the tables and the keys of the test before, but for the claim.
func reset(t testing.TB) {
	t.Helper()
	db := stdlib.OpenDB(*services.database)
	defer db.Close()
	if _, err := db.Exec(`DROP SCHEMA public CASCADE; CREATE SCHEMA public`); err != nil {
		t.Fatal(err)
	}
	conn := dialRedis(t, services.redisURL)
	conn.Send("MULTI")
	conn.Send("FLUSHDB")
	conn.Send("SET", claimKey, os.Getpid())
	if _, err := conn.Do("EXEC"); err != nil {
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

// patience is how long a test waits for what should come at once. (The program itself waits 10 s for
// PostgreSQL.)
const patience = 30 * time.Second

// eventually waits for what happens in the background.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: waited %v until %s", patience, what)
		}
	}
}

// receive is <-c that gives up.
func receive[T any](t testing.TB, c <-chan T) (value T) {
	t.Helper()
	select {
	case value = <-c:
	case <-time.After(patience):
		t.Fatalf("in vain: waited %v", patience)
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
		{"a port too high", "", map[string]string{"REDIS_URL": "redis://:s3cret@localhost:65536"}, 1, "REDIS_URL"},
		{"a database too high", "", map[string]string{"REDIS_URL": "redis://:s3cret@localhost/99999999999999999999"}, 1, "REDIS_URL"},
		{"two numbers", "", map[string]string{"REDIS_URL": "redis://:s3cret@localhost/1/2"}, 1, "REDIS_URL"},
		{"a parameter", "", map[string]string{"REDIS_URL": "redis://:s3cret@localhost/0?db=1"}, 1, "REDIS_URL"},
		{"a fragment", "", map[string]string{"REDIS_URL": "redis://:s3cret@localhost/0#1"}, 1, "REDIS_URL"},
		{"a missing host", "", map[string]string{"REDIS_URL": "redis://:s3cret@/0"}, 1, "REDIS_URL"},
		{"a socket", "", map[string]string{"REDIS_URL": "unix://:s3cret@/run/redis.sock"}, 1, "REDIS_URL"},
		{"a token with a blank", "", map[string]string{"WRITE_TOKEN": "s3cret s3cret"}, 1, "WRITE_TOKEN"},
		{"every address without a token", "-addr :8000", nil, 1, "WRITE_TOKEN"},
		{"an outer address without a token", "-addr 192.0.2.1:8000", nil, 1, "WRITE_TOKEN"},
		{"an address without a port", "-addr localhost", nil, 2, "-addr"},
		{"an address with a port too high", "-addr 127.0.0.1:99999", nil, 2, "-addr"},
		{"an address with a named port", "-addr 127.0.0.1:x", nil, 2, "-addr"},
		{"a negative seed", "-seed -1", nil, 2, "-seed"},
		{"an unknown flag", "-port 1", nil, 2, "-port"},
		{"an argument", "serve", nil, 2, "serve"},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			env := []string{"DATABASE_URL=", "REDIS_URL=", "WRITE_TOKEN="}
			for name, value := range test.env {
				env = append(env, name+"="+value)
			}
			p := runMain(t, env, strings.Fields(test.args)...)
			status, printed := p.wait(t), p.log(t)
			if status != test.status || !strings.Contains(printed, test.says) || strings.Contains(printed, "s3cret") {
				t.Errorf("status %d, want %d: %s", status, test.status, printed)
			}
			if lines := strings.Count(printed, "\n"); test.status == 1 && lines != 1 {
				t.Errorf("%d lines: %s", lines, printed)
			}
		})
	}
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
			if (test.status == 401) != (e.Header.Get("WWW-Authenticate") == `Bearer realm="properties"`) {
				t.Errorf("WWW-Authenticate: %q", e.Header.Get("WWW-Authenticate"))
			}
		})
	}
	for _, write := range []string{"PUT", "DELETE"} {
		closed.want(t, 401, write, "/properties/1/", "")
	}
}

// Load balancers may ask in HTTP/1.0 without Host. A proxy that sends another one learns what to do about it.
func TestHostOfLoadBalancers(t *testing.T) {
	p := start(t, options{})
	if e := p.talk(t, "GET /healthz HTTP/1.0\r\n\r\n"); e.StatusCode != 200 {
		t.Errorf("without Host: status %d", e.StatusCode)
	}
	got := checkProblem(t, p.want(t, 421, "GET", "/healthz", "", "Host", "homes.example"))
	for _, word := range []string{"proxy", "Host", "localhost", "WRITE_TOKEN"} {
		if !strings.Contains(got.Detail, word) {
			t.Errorf("421 doesn't tell of %s: %s", word, got.Detail)
		}
	}
}

// talk sends raw bytes, closes the sending side as nc -N does, and reads the answer to its end.
func (p *program) talk(t testing.TB, request string) exchange {
	t.Helper()
	return receive(t, p.begin(t, request))
}

// begin is talk in the background. Nobody sends or closes anything any more when it returns.
func (p *program) begin(t testing.TB, request string) <-chan exchange {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	fmt.Fprint(conn, request)
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got := make(chan exchange, 1)
	go func() {
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%q: %v", request, err)
			got <- exchange{Response: &http.Response{}}
			return
		}
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Errorf("%q: %v", request, err)
		}
		got <- exchange{response, body}
	}()
	return got
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
	if unknown := strings.Contains(p.Detail, "may have been applied"); (e.StatusCode == 503 && !unknown) != (e.Header.Get("Retry-After") != "") {
		t.Errorf("status %d with Retry-After: %q", e.StatusCode, e.Header.Get("Retry-After"))
	}
	return p
}

// A panic in a view is a 500 of its own; the server goes on.
func TestPanicInView(t *testing.T) {
	p := start(t, options{})
	handler := view(func(http.ResponseWriter, *http.Request) error { panic("at the disco") })
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
	if e := up.want(t, 200, "GET", "/healthz", ""); string(e.body) != `{"announcements":"heard","cache":"in use","postgresql":"up","redis":"up"}`+"\n" {
		t.Errorf("all up: %s", e.body)
	}
	nobody := newProxy(t, "127.0.0.1:1")
	withoutRedis := startAnother(t, options{redisURL: "redis://" + nobody.addr})
	if e := withoutRedis.want(t, 200, "GET", "/healthz", ""); string(e.body) != `{"announcements":"heard","cache":"bypassed: Redis does not answer","postgresql":"up","redis":"down"}`+"\n" {
		t.Errorf("without Redis: %s", e.body)
	}
	up.health.Close()
	if e := up.want(t, 503, "GET", "/healthz", ""); !strings.Contains(string(e.body), `"postgresql":"down"`) {
		t.Errorf("without PostgreSQL: %s", e.body)
	}
}

// A process is the program as its users run it.
type process struct {
	command *exec.Cmd
	stderr  *os.File
	url     string
}

// runMain starts the program as a process, which ends with the test.
func runMain(t testing.TB, env []string, args ...string) *process {
	t.Helper()
	stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	command := exec.Command(os.Args[0], args...)
	command.Env = append(os.Environ(), append([]string{"RUN_MAIN=1", "DATABASE_URL=" + databaseURL(t), "REDIS_URL=" + services.redisURL}, env...)...)
	command.Stderr = stderr
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { command.Process.Kill(); command.Wait() })
	return &process{command: command, stderr: stderr}
}

// databaseURL is the tests' database as a setting.
func databaseURL(t testing.TB) string {
	t.Helper()
	u, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil {
		t.Fatal(err)
	}
	u.Path = services.database.Database
	return u.String()
}

// log is what the process has said so far.
func (p *process) log(t testing.TB) string {
	t.Helper()
	said, err := os.ReadFile(p.stderr.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(said)
}

// serving waits until the process listens.
func (p *process) serving(t testing.TB) *process {
	t.Helper()
	eventually(t, "the program serves", func() bool {
		_, rest, found := strings.Cut(p.log(t), "url=")
		p.url, _, _ = strings.Cut(rest, "/properties/")
		return found
	})
	return p
}

// api is the process as a program that only answers requests.
func (p *process) api() *program { return &program{url: p.url} }

// wait returns the exit status.
func (p *process) wait(t testing.TB) int {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- p.command.Wait() }()
	receive(t, done)
	return p.command.ProcessState.ExitCode()
}

// SIGTERM under load: every request that was accepted has its whole answer, and the exit status is 0.
func TestStopUnderLoad(t *testing.T) {
	reset(t)
	p := runMain(t, nil, "-addr", "127.0.0.1:0", "-seed", "1000").serving(t)
	const clients = 16
	var answered atomic.Int64
	failed := make(chan error, clients)
	for range clients {
		go func() {
			// A connection for each request: on a kept one, the server may say goodbye while we ask.
			once := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}}
			for {
				response, err := once.Get(p.url + "/properties/")
				if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) {
					err = nil // not accepted any more. (EOF: net/http hangs up on what it reads after Shutdown has begun.)
				}
				if response == nil {
					failed <- err
					return
				}
				n, err := io.Copy(io.Discard, response.Body)
				response.Body.Close()
				if err == nil && (response.StatusCode != 200 || n != response.ContentLength) {
					err = fmt.Errorf("status %d, %d of %d bytes", response.StatusCode, n, response.ContentLength)
				}
				if err != nil {
					failed <- err
					return
				}
				answered.Add(1)
			}
		}()
	}
	eventually(t, "there is load", func() bool { return answered.Load() > 200 })
	if err := p.command.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for range clients {
		if err := receive(t, failed); err != nil {
			t.Error(err)
		}
	}
	if status := p.wait(t); status != 0 || !strings.Contains(p.log(t), "stopped") {
		t.Errorf("exit status %d: %s", status, p.log(t))
	}
}

// A request that is under way when SIGTERM comes is finished first.
func TestStopFinishesRequests(t *testing.T) {
	reset(t)
	p := runMain(t, nil, "-addr", "127.0.0.1:0").serving(t)
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	first, second := validProperty[:20], validProperty[20:]
	fmt.Fprintf(conn, "POST /properties/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", len(validProperty))
	answer := bufio.NewReader(conn)
	if line, err := answer.ReadString('\n'); err != nil || !strings.Contains(line, "100 Continue") { // the view is reading
		t.Fatalf("%q (%v)", line, err)
	}
	fmt.Fprint(conn, first)
	p.command.Process.Signal(os.Interrupt)
	eventually(t, "it is stopping", func() bool { return strings.Contains(p.log(t), "stopping") })
	fmt.Fprint(conn, second)
	answer.ReadString('\n')
	if line, err := answer.ReadString('\n'); err != nil || !strings.Contains(line, "201 Created") {
		t.Errorf("%q (%v)", line, err)
	}
	if status := p.wait(t); status != 0 {
		t.Errorf("exit status %d: %s", status, p.log(t))
	}
}

// Requests that never end are cut off before Docker would kill the program, which is after 10 s.
func TestStopCutsOff(t *testing.T) {
	reset(t)
	p := runMain(t, nil, "-addr", "127.0.0.1:0", "-seed", "10000").serving(t)
	for _, request := range []string{
		strings.Repeat("GET /properties/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 50), // answers for which no buffer is large enough
		"POST /properties/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n",
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprint(conn, request)
		if _, err := conn.Read(make([]byte, 1)); err != nil { // the answer has begun; its rest is never read
			t.Fatal(err)
		}
	}
	begin := time.Now()
	p.command.Process.Signal(syscall.SIGTERM)
	status := p.wait(t)
	if took := time.Since(begin); status != 0 || took > 10*time.Second || !strings.Contains(p.log(t), "requests were cut off") {
		t.Errorf("exit status %d after %v: %s", status, took, p.log(t))
	}
}

// -h tells what the program is, its settings and a URL to try.
func TestUsage(t *testing.T) {
	p := runMain(t, nil, "-h")
	if status := p.wait(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	for _, word := range []string{"property listings", "-addr", "-seed", "DATABASE_URL", defaultDatabaseURL, "REDIS_URL", defaultRedisURL, "WRITE_TOKEN", "http://localhost:8000/properties/"} {
		if !strings.Contains(p.log(t), word) {
			t.Errorf("nothing about %s: %s", word, p.log(t))
		}
	}
}

// What keeps it from serving, and what no waiting mends, is one line with the reason, at once, and exit status 1. The
// cache is left alone: another instance may use it.
func TestCannotServe(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	stranger, err := url.Parse(databaseURL(t))
	if err != nil {
		t.Fatal(err)
	}
	nowhere := *stranger
	stranger.User, nowhere.Path = url.UserPassword("nobody_at_all", "s3cret"), "nowhere"
	const anotherTable = `DROP TABLE properties; CREATE TABLE properties `
	tests := []struct {
		about, says string
		harm        string // done to the database before
		databaseURL string
	}{
		{"a port that is taken", "address already in use", ``, databaseURL(t)},
		{"a role that isn't there, or a wrong password", `"nobody_at_all"`, ``, stranger.String()},
		{"a database that isn't there", `database "nowhere" does not exist`, ``, nowhere.String()},
		{"a column is missing", `location`, `ALTER TABLE properties DROP COLUMN location`, databaseURL(t)},
		{"the dates are missing", `created_at`, `ALTER TABLE properties DROP COLUMN created_at`, databaseURL(t)},
		{"numbers for dates", `created_at`, `ALTER TABLE properties DROP COLUMN created_at, ADD created_at bigint`, databaseURL(t)},
		{"no number for a price", `price`, `ALTER TABLE properties DROP COLUMN price, ADD price boolean`, databaseURL(t)},
		{"text for ids", `id`, anotherTable + `(id text, title text, description text, price numeric, location text, created_at timestamptz)`, databaseURL(t)},
		{"text for dates", `created_at`, anotherTable + `(id bigint, title text, description text, price numeric, location text, created_at text)`, databaseURL(t)},
		{"a date that JSON can't say", "properties_created_at_fits_json", `
			ALTER TABLE properties DROP CONSTRAINT properties_created_at_fits_json;
			INSERT INTO properties (title, description, price, location, created_at) VALUES ('Loft', '', 1, 'Accra', 'infinity')`, databaseURL(t)},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			reset(t)
			db := openDB(services.database, 1)
			defer db.Close()
			if err := prepare(t.Context(), db, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := db.Exec(test.harm); err != nil {
				t.Fatal(err)
			}
			conn := dialRedis(t, services.redisURL)
			conn.Do("SET", allPropertiesKey, "another instance's")
			process := runMain(t, []string{"DATABASE_URL=" + test.databaseURL}, "-addr", taken.Addr().String())
			status, printed := process.wait(t), process.log(t)
			if status != 1 || !strings.Contains(printed, test.says) || strings.Contains(printed, "docker compose") || strings.Contains(printed, "s3cret") {
				t.Errorf("exit status %d, want 1 and %s: %s", status, test.says, printed)
			}
			if strings.Count(printed, "\n") != 1 { // and so it didn't wait
				t.Errorf("not one line: %s", printed)
			}
			if kept, err := redis.String(conn.Do("GET", allPropertiesKey)); kept != "another instance's" {
				t.Errorf("the cache has %q (%v)", kept, err)
			}
		})
	}
}

// What may pass is waited for, but not for ever: then it is exit status 1 and a line that says what to do, or whose
// fault it is.
func TestWaitsAtStart(t *testing.T) {
	reset(t)
	db := openDB(services.database, 2)
	defer db.Close()
	if err := prepare(t.Context(), db, 1); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	absent := runMain(t, []string{"DATABASE_URL=postgres://u:s3cret@127.0.0.1:1/db"})
	eventually(t, "it says that it waits", func() bool { return strings.Contains(absent.log(t), "waiting for PostgreSQL") })
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("it said that it waits after %v", took)
	}
	waited := make(chan time.Duration, 1)
	go func() {
		absent.command.Wait()
		waited <- time.Since(begin)
	}()
	ends := func(t *testing.T, p *process, took time.Duration, says ...string) {
		t.Helper()
		lines := strings.Split(strings.TrimSpace(p.log(t)), "\n")
		for _, word := range says {
			if !strings.Contains(lines[len(lines)-1], word) {
				t.Errorf("it doesn't say %s: %s", word, p.log(t))
			}
		}
		if status := p.command.ProcessState.ExitCode(); status != 1 || took > 15*time.Second || strings.Contains(p.log(t), "s3cret") {
			t.Errorf("exit status %d after %v: %s", status, took, p.log(t))
		}
	}
	for _, lock := range []string{
		`LOCK TABLE properties`,
		`SELECT pg_advisory_xact_lock(20260101)`,
		`UPDATE properties SET price = 2`, // which only a seed waits for
	} {
		t.Run(lock, func(t *testing.T) {
			tx, err := db.Begin()
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Rollback()
			if _, err := tx.Exec(lock); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			p := runMain(t, nil, "-addr", "127.0.0.1:0", "-seed", "1")
			p.wait(t)
			ends(t, p, time.Since(begin), "lock")
		})
	}
	took := receive(t, waited)
	ends(t, absent, took, "docker compose up -d --wait", "scripts/with-services go run .", "connection refused")
	if took < 9*time.Second {
		t.Errorf("it gave up after %v", took)
	}
}

// PostgreSQL comes up while the program waits: it serves.
func TestPostgresComesLate(t *testing.T) {
	reset(t)
	network, config := proxyToPostgres(t)
	network.set(t, refused)
	p := runMain(t, []string{"DATABASE_URL=" + withHost(t, databaseURL(t), fmt.Sprintf("127.0.0.1:%d", config.Port))}, "-addr", "127.0.0.1:0")
	eventually(t, "it waits", func() bool { return strings.Contains(p.log(t), "waiting for PostgreSQL") })
	network.set(t, healthy)
	p.serving(t).api().want(t, 201, "POST", "/properties/", validProperty)
}

// A REDIS_URL without a port means 6379, also for an IPv6 address, which redigo alone would misread.
func TestRedisPort(t *testing.T) {
	t.Setenv("DATABASE_URL", "")
	for given, want := range map[string]string{
		"": "redis://localhost:6379/0", "redis://localhost": "redis://localhost:6379", "redis://localhost:/1": "redis://localhost:6379/1",
		"rediss://a:b@[::1]/2": "rediss://a:b@[::1]:6379/2", "redis://[::1]:6380": "redis://[::1]:6380",
	} {
		t.Setenv("REDIS_URL", given)
		s := settings{addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}
		if err := s.readEnvironment(); err != nil || s.redisURL != want {
			t.Errorf("%q is %q, want %q (%v)", given, s.redisURL, want, err)
		}
	}
}

// REDIS_URL's password, user, database number and TLS are used; a certificate that nobody vouches for is not.
func TestRedisURL(t *testing.T) {
	reset(t)
	server := startRedis(t)
	borrowed := httptest.NewTLSServer(nil) // its certificate is for 127.0.0.1
	borrowed.Close()
	certificate := borrowed.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile := filepath.Join(t.TempDir(), "cert"), filepath.Join(t.TempDir(), "key")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}, keyFile: {Type: "PRIVATE KEY", Bytes: key}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, tlsPort, _ := strings.Cut(borrowed.Listener.Addr().String(), ":") // free again
	server.do("CONFIG", "SET", "tls-cert-file", certFile, "tls-key-file", keyFile, "tls-auth-clients", "no", "tls-port", tlsPort)
	server.do("ACL", "SETUSER", "someone", "on", ">s3cret2", "~*", "&*", "+@all")
	server.do("CONFIG", "SET", "requirepass", "s3cret")
	for _, test := range []struct{ about, url, certFile, cache string }{
		{"password and database", "redis://:s3cret@127.0.0.1:" + server.port + "/7", "", `"in use"`},
		{"user and password", "redis://someone:s3cret2@127.0.0.1:" + server.port, "", `"in use"`},
		{"TLS", "rediss://:s3cret@127.0.0.1:" + tlsPort + "/3", certFile, `"in use"`},
		{"TLS with a stranger", "rediss://:s3cret@127.0.0.1:" + tlsPort, "", `"bypassed: Redis does not answer"`},
		{"no password", server.url, "", `"bypassed: NOAUTH Authentication required."`},
		{"another password", "redis://:s3cret3@127.0.0.1:" + server.port, "", `"bypassed: WRONGPASS invalid username-password pair or user is disabled."`},
	} {
		t.Run(test.about, func(t *testing.T) {
			p := runMain(t, []string{"REDIS_URL=" + test.url, "SSL_CERT_FILE=" + test.certFile}, "-addr", "127.0.0.1:0").serving(t)
			p.api().want(t, 200, "GET", "/properties/", "")
			if health := p.api().want(t, 200, "GET", "/healthz", "").body; !strings.Contains(string(health), `"cache":`+test.cache) {
				t.Errorf("want %s: %s", test.cache, health)
			}
			if strings.Contains(p.log(t), "s3cret") {
				t.Errorf("the log tells a password: %s", p.log(t))
			}
		})
	}
	for _, database := range []string{"/7", "/0", "/3"} {
		conn := dialRedis(t, "redis://:s3cret@127.0.0.1:"+server.port+database)
		if n, err := redis.Int(conn.Do("EXISTS", allPropertiesKey, pageKey("/properties/"))); n != 2 {
			t.Errorf("database %s has %d of 2 keys (%v)", database, n, err)
		}
	}
}

// Tests that start at once take a Redis database each, and keep it.
func TestClaimRedis(t *testing.T) {
	reset(t) // which keeps the claim
	claimed := make(chan string, 2)
	for range cap(claimed) {
		go func() {
			claim, conn, err := claimRedis(services.redisURL)
			if err != nil {
				t.Error(err)
			} else {
				t.Cleanup(func() { conn.Do("DEL", claimKey); conn.Close() })
			}
			claimed <- claim
		}()
	}
	if a, b := receive(t, claimed), receive(t, claimed); a == b || a == services.redisURL || b == services.redisURL {
		t.Errorf("%s, %s and %s are not three", a, b, services.redisURL)
	}
}

// Clients that dawdle, idle or never end don't keep others from their answers.
func TestPressure(t *testing.T) {
	reset(t)
	p := runMain(t, nil, "-addr", "127.0.0.1:0", "-seed", "10000").serving(t)
	dial := func(n int, say string) {
		for range n {
			conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			fmt.Fprint(conn, say)
		}
	}
	dial(1000, "")                                                    // idle
	dial(100, "GET /properties/ HTTP/1.1\r\nHost: local")             // half a header
	dial(100, "GET /properties/ HTTP/1.1\r\nHost: localhost\r\n\r\n") // read nothing of the answer
	dial(100, "POST /properties/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n{")
	dial(100, "POST /properties/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n \r\n")
	for range 20 {
		for _, path := range []string{"/properties/", "/properties/1/", "/healthz", "/cache/metrics/"} {
			response, err := client.Get(p.url + path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != 200 {
				t.Errorf("GET %s: status %d (%v)", path, response.StatusCode, err)
			}
			response.Body.Close()
		}
	}
	response, err := client.Get(p.url + "/properties/?" + strings.Repeat("a", 100<<10))
	if err != nil || response.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("100 KiB of headers: %v (%v)", response, err)
	}
}

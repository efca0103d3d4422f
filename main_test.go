// main_test.go: PostgreSQL and Redis for all tests, and the tests of main.go.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
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
	})
	return &program{app: a, url: newServer(t, a.routes()), db: db, redis: dialRedis(t, services.redisURL)}
}

func (p *program) trusted() bool { return p.cache.session.Load().trusted() }

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
				if err != nil {
					failed <- nil // not accepted any more
					return
				}
				n, err := io.Copy(io.Discard, response.Body)
				response.Body.Close()
				if err != nil || response.StatusCode != 200 || n != response.ContentLength {
					failed <- fmt.Errorf("status %d, %d of %d bytes: %w", response.StatusCode, n, response.ContentLength, err)
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

// What keeps it from serving is one line and exit status 1.
func TestCannotServe(t *testing.T) {
	reset(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	tests := []struct {
		about string
		env   []string
		args  []string
		says  string
	}{
		{"a port that is taken", nil, []string{"-addr", taken.Addr().String()}, "address already in use"},
		{"no PostgreSQL", []string{"DATABASE_URL=postgres://u:s3cret@127.0.0.1:1/db"}, nil, "docker compose up -d --wait"},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			p := runMain(t, test.env, test.args...)
			status := p.wait(t)
			lines := strings.Split(strings.TrimSpace(p.log(t)), "\n")
			if last := lines[len(lines)-1]; status != 1 || !strings.Contains(last, test.says) || strings.Contains(p.log(t), "s3cret") {
				t.Errorf("exit status %d: %s", status, p.log(t))
			}
		})
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

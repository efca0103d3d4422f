// harness_test.go: what starts the program for the tests, asks it, and reads its log.
//
// The tests run beside a program that is in use: TestMain creates a PostgreSQL database, and
// claims an empty Redis database. Both carry the name of the run, and the run lives as long as it
// has a connection of that name. So the next run can tell what a killed one has left behind, and
// drops it.

package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"errors"
	"flag"
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
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// Part 1: services

// services are the real servers that the tests run against.
var services struct {
	run      string // its name, and that of its database
	database *pgx.ConnConfig
	redisURL string
}

// instead is what this binary can be in place of the tests, by the variable that asks for it.
var instead = map[string]func(){"RUN_MAIN": main}

func TestMain(m *testing.M) {
	for variable, run := range instead {
		if os.Getenv(variable) != "" {
			run()
			return
		}
	}
	status, err := withServices(m.Run)
	if err != nil {
		fmt.Fprintf(os.Stderr, "The tests need PostgreSQL and Redis: %v.\n"+
			"Run them with: scripts/with-services go test -race ./...\n", err)
		status = 1
	}
	os.Exit(status)
}

func withServices(run func() int) (status int, err error) {
	if os.Getenv("DATABASE_URL") == "" || os.Getenv("REDIS_URL") == "" {
		return 0, errors.New("DATABASE_URL and REDIS_URL are not both set")
	}
	env := settings{addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}
	if err := env.readEnvironment(); err != nil {
		return 0, err
	}
	services.run = newRun()
	services.database = env.database.Copy()
	services.database.Database = services.run
	admin, err := claimDatabase(env.database, services.run)
	if err != nil {
		return 0, err
	}
	defer admin.Close()
	defer admin.Exec("DROP DATABASE " + services.run + " WITH (FORCE)")
	claim, redisURL, err := claimRedis(*env.redisURL, services.run)
	if err != nil {
		return 0, err
	}
	defer claim.Close()
	defer claim.Do("FLUSHDB")
	services.redisURL = redisURL

	// Those that are parallel wait more than they work.
	flag.Set("test.parallel", "6")
	// TEST_LOG=1 shows the program's log.
	if os.Getenv("TEST_LOG") == "" {
		slog.SetDefault(slog.New(slog.DiscardHandler))
	}
	return run(), nil
}

const (
	runPrefix = "properties_test_run_"

	// claimKey has the name of the run that a Redis database belongs to.
	claimKey = "properties:test-run"
)

func newRun() string { return runPrefix + strings.ToLower(rand.Text()[:8]) }

// claimDatabase creates the run's database, and drops those of runs that have ended without that.
// The run keeps the connection.
func claimDatabase(config *pgx.ConnConfig, run string) (*sql.DB, error) {
	config = config.Copy()
	config.RuntimeParams["application_name"] = run
	admin := stdlib.OpenDB(*config)
	admin.SetMaxOpenConns(1)
	if _, err := admin.Exec("CREATE DATABASE " + run); err != nil {
		return nil, err
	}
	var ended string
	err := admin.QueryRow(`SELECT coalesce(string_agg(datname, ' '), '') FROM pg_database
		WHERE starts_with(datname, $1)
			AND datname NOT IN (SELECT application_name FROM pg_stat_activity)`,
		runPrefix).Scan(&ended)
	if err != nil {
		return nil, err
	}
	for run := range strings.FieldsSeq(ended) {
		// Two runs may do so at once, and another role's database is not ours to drop.
		admin.Exec("DROP DATABASE IF EXISTS " + run + " WITH (FORCE)")
		admin.Exec("DROP ROLE IF EXISTS " + roleOf(run))
	}
	return admin, nil
}

// newDatabase is an empty database of a test's own, so that the test can be parallel.
func newDatabase(t testing.TB) *pgx.ConnConfig {
	t.Helper()
	run, config := newRun(), services.database.Copy()
	config.Database = "postgres"
	admin, err := claimDatabase(config, run)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		admin.Exec("DROP DATABASE " + run + " WITH (FORCE)")
		admin.Close()
	})
	config.Database = run
	return config
}

// claimRedis finds the last Redis database that is empty, or belongs to a run that has ended. The
// run keeps the connection.
func claimRedis(u url.URL, run string) (claim redis.Conn, redisURL string, err error) {
	// It looks and takes in one step, because other runs may look at the same time.
	const take = `if redis.call('GET', KEYS[1]) == ARGV[2] then redis.call('FLUSHDB') end
		return redis.call('DBSIZE') == 0 and redis.call('SET', KEYS[1], ARGV[1])`
	refusal := errors.New("each has keys")
	for n := 15; n > 0; n-- {
		u.Path = fmt.Sprintf("/%d", n)
		conn, err := redis.DialURL(u.String(), redis.DialClientName(run),
			redis.DialReadTimeout(patience))
		if err != nil {
			// There may be fewer than 16.
			refusal = err
			continue
		}
		owner, _ := redis.String(conn.Do("GET", claimKey))
		living, err := redis.String(conn.Do("CLIENT", "LIST"))
		if err != nil || strings.Contains(living, "name="+owner+" ") {
			owner = ""
		}
		_, err = redis.String(conn.Do("EVAL", take, 1, claimKey, run, owner))
		if err == nil {
			return conn, u.String(), nil
		}
		conn.Close()
		if err != redis.ErrNil {
			refusal = err
		}
	}
	return nil, "", fmt.Errorf("none of Redis's databases 1 to 15 can be used: %w", refusal)
}

// reset drops the tables and the keys of the test before, but for the claim.
func reset(t testing.TB) {
	t.Helper()
	db := psql(t)
	runSQL(t, db, `DROP SCHEMA public CASCADE; CREATE SCHEMA public`)
	conn := dialRedis(t, services.redisURL)
	conn.Send("MULTI")
	conn.Send("FLUSHDB")
	conn.Send("SET", claimKey, services.run)
	if _, err := conn.Do("EXEC"); err != nil {
		t.Fatal(err)
	}
}

// psql writes past the program.
func psql(t testing.TB) *sql.DB { return openPast(t, services.database) }

func openPast(t testing.TB, config *pgx.ConnConfig) *sql.DB {
	db := stdlib.OpenDB(*config)
	t.Cleanup(func() { db.Close() })
	return db
}

// A listening is a session past the program that hears its own announcements.
type listening struct{ *pgx.Conn }

func listenPast(t testing.TB) listening {
	t.Helper()
	conn, err := pgx.ConnectConfig(t.Context(), services.database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	l := listening{conn}
	l.run(t, `LISTEN properties; LISTEN the_end`)
	return l
}

func (l listening) run(t testing.TB, statements string) {
	t.Helper()
	if _, err := l.Exec(t.Context(), statements); err != nil {
		t.Fatal(err)
	}
}

// announcements is how often what the statements do is announced.
func (l listening) announcements(t testing.TB, statements string) (n int) {
	t.Helper()
	l.run(t, statements)
	l.run(t, `NOTIFY the_end`)
	for ; ; n++ {
		heard, err := l.WaitForNotification(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if heard.Channel == "the_end" {
			return n
		}
	}
}

func runSQL(t testing.TB, db *sql.DB, statements string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := db.ExecContext(ctx, statements); err != nil {
		t.Fatal(err)
	}
}

func inserting(title string) string {
	return fmt.Sprintf(`INSERT INTO public.properties (title, description, price, location)
		VALUES ('%s', '', 1, 'Accra')`, title)
}

func roleOf(run string) string { return run + "_role" }

// newRole makes a role that has some rights on properties and no others, and returns the settings
// to connect as it.
func newRole(t *testing.T, rights string) *pgx.ConnConfig {
	t.Helper()
	role, admin := roleOf(services.run), psql(t)
	runSQL(t, admin, `CREATE ROLE `+role+` LOGIN PASSWORD 'x';
		GRANT USAGE ON SCHEMA public TO `+role+`; GRANT `+rights+` ON properties TO `+role)
	t.Cleanup(func() { admin.Exec(`DROP OWNED BY ` + role + ` CASCADE; DROP ROLE ` + role) })
	config := services.database.Copy()
	config.User, config.Password = role, "x"
	return config
}

func dialRedis(t testing.TB, rawURL string) redis.Conn {
	t.Helper()
	conn, err := redis.DialURL(rawURL, redis.DialReadTimeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// do is a command that must succeed, in words as redis-cli takes them, and more.
func do(t testing.TB, conn redis.Conn, command string, more ...any) any {
	t.Helper()
	words := redis.Args{}.AddFlat(strings.Fields(command))
	reply, err := conn.Do(words[0].(string), append(words[1:], more...)...)
	if err != nil {
		t.Fatalf("%s %.200v: %v", command, more, err)
	}
	return reply
}

// calls is how often Redis has run a command since its statistics were reset.
func calls(t testing.TB, conn redis.Conn, command string) (n int) {
	t.Helper()
	stats := fmt.Sprintf("%s", do(t, conn, "INFO commandstats"))
	_, count, _ := strings.Cut(stats, "cmdstat_"+command+":calls=")
	// It stays 0 if there were none.
	fmt.Sscan(count, &n)
	return n
}

// databaseURL is the tests' database as a setting.
func databaseURL(t testing.TB) string {
	t.Helper()
	u := parseURL(t, os.Getenv("DATABASE_URL"))
	u.Path = services.database.Database
	return u.String()
}

// withHost is a service's URL with another host and port.
func withHost(t testing.TB, rawURL, host string) string {
	t.Helper()
	u := parseURL(t, rawURL)
	u.Host = host
	return u.String()
}

func parseURL(t testing.TB, rawURL string) *url.URL {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// Part 2: the program

// A program is the whole of it, on an address of its own, with what a test looks at it through.
type program struct {
	*app
	handler http.Handler
	url     string
	db      *sql.DB    // the program's
	redis   redis.Conn // the test's own, to the claimed database
}

// options differ from the defaults of a test's program.
type options struct {
	database   *pgx.ConnConfig
	redisURL   string
	writeToken string
	rows       uint // seeded
	deaf       bool // it hears no announcement, so it takes a floor every 0.5 s
}

// start starts a program with an empty cache, and no rows but those of the options.
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
	db, reserved := openDB(o.database, 16), openDB(o.database, 1)
	t.Cleanup(func() {
		db.Close()
		reserved.Close()
	})
	if err := prepare(t.Context(), db, o.rows); err != nil {
		t.Fatal(err)
	}
	a := newApp(db, reserved, &settings{
		database:   o.database,
		redisURL:   parseURL(t, o.redisURL),
		writeToken: o.writeToken,
	})
	if o.deaf {
		a.listener.config = o.database.Copy()
		a.listener.config.DialFunc = func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("this program is deaf")
		}
	}
	p := &program{app: a, db: db, redis: dialRedis(t, services.redisURL), handler: a.routes()}
	stop := a.startBackground()
	// It takes up to a second, which nobody waits for here.
	t.Cleanup(func() { go stop() })
	if o.deaf {
		eventually(t, "it has a floor", func() bool {
			floor, _ := a.cache.known.get()
			return floor.Server != ""
		})
	}
	p.url = newServer(t, p.handler)
	return p
}

// newServer serves handler until the test ends, and returns its URL.
func newServer(t testing.TB, handler http.Handler) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(func() {
		// Some tests leave requests behind that nobody reads.
		server.CloseClientConnections()
		server.Close()
	})
	return server.URL
}

// do is a command to the claimed Redis database that must succeed.
func (p *program) do(t testing.TB, command string, more ...any) any {
	t.Helper()
	return do(t, p.redis, command, more...)
}

// forget empties both levels.
func (p *program) forget(t testing.TB) {
	t.Helper()
	for _, s := range p.cache.slots {
		p.do(t, "DEL", s.key)
	}
}

// exist returns how many of the keys Redis has.
func (p *program) exist(t testing.TB, keys ...any) int64 {
	t.Helper()
	return p.do(t, "EXISTS", keys...).(int64)
}

const (
	listKey = "all_properties"
	pageKey = "page:/properties/"
	gzipKey = "page:/properties/:gzip"
)

// bypassed reports whether the program does without Redis.
func (p *program) bypassed() bool { return p.cache.link.session.Load().pool == nil }

// heard reports whether the program hears announcements.
func (p *program) heard() bool { return p.listener.unheard.Load() == "" }

// floor is the program's floor.
func (p *program) floor() string {
	floor, _ := p.cache.known.get()
	return fmt.Sprint(floor)
}

// commit runs a statement past the program, and waits until the program knows of the commit.
func (p *program) commit(t testing.TB, statement string) {
	t.Helper()
	var id uint64
	tx, err := psql(t).Begin()
	if err == nil {
		_, err = tx.Exec(statement)
	}
	if err == nil {
		err = tx.QueryRow(`SELECT pg_current_xact_id()::text::bigint`).Scan(&id)
	}
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the program knows of the commit", func() bool {
		floor, writes := p.cache.known.get()
		return floor.saw(id) || slices.Contains(writes, id)
	})
}

// A gate holds up the query of the list after it has read the rows, which is the moment that all
// the races are about. reading receives when it has; it returns when release is sent to.
type gate struct{ reading, release chan struct{} }

func (p *program) gate() gate {
	g := gate{make(chan struct{}, 10), make(chan struct{}, 10)}
	p.wrapQuery(func(query view, w http.ResponseWriter, r *http.Request) error {
		err := query(w, r)
		g.reading <- struct{}{}
		<-g.release
		return err
	})
	return g
}

// queries counts the queries of the list, and those that began while another one ran.
type queries struct{ n, running, atOnce atomic.Int64 }

func (p *program) countQueries() *queries {
	q := new(queries)
	p.wrapQuery(func(query view, w http.ResponseWriter, r *http.Request) error {
		q.n.Add(1)
		if q.running.Add(1) > 1 {
			q.atOnce.Add(1)
		}
		defer q.running.Add(-1)
		return query(w, r)
	})
	return q
}

// wrapQuery puts something around the query of the list. No request may be under way.
func (p *program) wrapQuery(around func(query view, w http.ResponseWriter, r *http.Request) error) {
	query := p.cache.list.view
	p.cache.list.view = func(w http.ResponseWriter, r *http.Request) error {
		return around(query, w, r)
	}
}

// asking is how many wait in a group.
func asking() int {
	stacks := make([]byte, 1<<20)
	return bytes.Count(stacks[:runtime.Stack(stacks, true)], []byte(".(*group[...]).do("))
}

// fillPool opens every connection that the pool may have, and leaves all of them idle.
func (p *program) fillPool(t testing.TB) {
	t.Helper()
	for range 16 {
		conn, err := p.db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
}

// holdReceivers holds up each POST and PUT between its commit and its receivers. committed receives
// when one is there; it goes on when goOn is sent to.
func (p *program) holdReceivers() (committed, goOn chan bool) {
	committed, goOn = make(chan bool), make(chan bool)
	s := &p.properties.signals.postSave
	s.receivers = slices.Insert(s.receivers, 0, func(change) {
		committed <- true
		<-goOn
	})
	return committed, goOn
}

// A process is the program as its users run it.
type process struct {
	command *exec.Cmd
	ended   chan bool // closed when it has
	stderr  string    // the file that has it
	url     string
}

// runMain starts the program as a process, which ends with the test. A file has its log.
func runMain(t testing.TB, env []string, args ...string) *process {
	t.Helper()
	stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	return runLogging(t, stderr, env, args...)
}

// runLogging is runMain with another place for the log.
func runLogging(t testing.TB, stderr *os.File, env []string, args ...string) *process {
	t.Helper()
	command := exec.Command(os.Args[0], args...)
	command.Env = append(os.Environ(), "RUN_MAIN=1", "GORACE=atexit_sleep_ms=0",
		"DATABASE_URL="+databaseURL(t), "REDIS_URL="+services.redisURL)
	command.Env = append(command.Env, env...)
	command.Stderr = stderr
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{command: command, ended: make(chan bool), stderr: stderr.Name()}
	go func() {
		command.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		command.Process.Kill()
		<-p.ended
	})
	return p
}

// log is what the process has said so far.
func (p *process) log(t testing.TB) string {
	t.Helper()
	said, err := os.ReadFile(p.stderr)
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
		p.url, _, _ = strings.Cut(rest, propertiesPath)
		return found
	})
	return p
}

// api is the process as a program that only answers requests.
func (p *process) api() *program { return &program{url: p.url} }

func (p *process) signal(t testing.TB, sig os.Signal) {
	t.Helper()
	if err := p.command.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// wait returns the exit status.
func (p *process) wait(t testing.TB) int {
	t.Helper()
	receive(t, p.ended)
	return p.command.ProcessState.ExitCode()
}

// Part 3: requests

// An exchange is a response with its body read.
type exchange struct {
	*http.Response
	body []byte
}

// client neither follows redirects nor asks for gzip by itself.
var client = &http.Client{
	Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 1000},
	CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	},
	Timeout: patience,
}

// unzipped is the body as it was before any gzip.
func (e exchange) unzipped() ([]byte, error) {
	if e.Header.Get("Content-Encoding") != "gzip" {
		return e.body, nil
	}
	z, err := gzip.NewReader(bytes.NewReader(e.body))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

// send makes a request with header lines.
func (p *program) send(method, path, body string, header ...string) (exchange, error) {
	r, err := http.NewRequest(method, p.url+path, strings.NewReader(body))
	if err != nil {
		return exchange{}, err
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for _, line := range header {
		name, value, _ := strings.Cut(line, ": ")
		r.Header.Set(name, value)
	}
	// net/http takes it from here only.
	r.Host = r.Header.Get("Host")
	response, err := client.Do(r)
	if err != nil {
		return exchange{}, err
	}
	defer response.Body.Close()
	read, err := io.ReadAll(response.Body)
	return exchange{response, read}, err
}

// want is send that insists on a status.
func (p *program) want(t testing.TB, status int, method, path, body string, header ...string) (
	e exchange) {
	t.Helper()
	e, err := p.send(method, path, body, header...)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	if e.StatusCode != status {
		t.Fatalf("%s %s %.100s: status %d, want %d: %s",
			method, path, body, e.StatusCode, status, e.body)
	}
	return e
}

// A request is a method and a path.
type request struct{ method, path string }

// requests are one of each kind, reads first. All need PostgreSQL when nothing is cached.
var requests = []request{{"GET", propertiesPath}, {"GET", "/properties/1/"},
	{"POST", propertiesPath}, {"PUT", "/properties/1/"}, {"DELETE", "/properties/1/"}}

var writes = requests[2:]

// post, put and remove are writes that must succeed.
func (p *program) post(t testing.TB, title string) exchange {
	t.Helper()
	return p.want(t, 201, "POST", propertiesPath, titled(title))
}

func (p *program) put(t testing.TB, title string) {
	t.Helper()
	p.want(t, 200, "PUT", "/properties/1/", titled(title))
}

func (p *program) remove(t testing.TB) {
	t.Helper()
	p.want(t, 204, "DELETE", "/properties/1/", "")
}

// burst has clients at once send requests of these kinds in turn. Each must succeed, and lack
// nothing. (A null is what the metrics say for what Redis didn't tell.)
func (p *program) burst(t testing.TB, clients, each int, kinds ...request) {
	t.Helper()
	var running sync.WaitGroup
	for client := range clients {
		running.Go(func() {
			for i := range each {
				r := kinds[(client+i)%len(kinds)]
				e, err := p.send(r.method, r.path, titled("Loft"))
				if err != nil || e.StatusCode >= 300 || bytes.Contains(e.body, []byte("null")) {
					t.Errorf("%s: %v %.300s", r, err, e.body)
				}
			}
		})
	}
	running.Wait()
}

const (
	hitStatus    = "redis; hit; ttl="
	storedStatus = "redis; fwd=uri-miss; stored"
	missStatus   = "redis; fwd=uri-miss"
	staleStatus  = "redis; fwd=stale; stored"
	bypassStatus = "redis; fwd=bypass"
)

// list is a GET of all properties that insists on a Cache-Status that starts so.
func (p *program) list(t testing.TB, cacheStatus string) []property {
	t.Helper()
	e := p.want(t, 200, "GET", propertiesPath, "")
	if got := e.Header.Get("Cache-Status"); !strings.HasPrefix(got, cacheStatus) {
		t.Fatalf("Cache-Status: %s, want %s", got, cacheStatus)
	}
	var list []property
	if err := json.Unmarshal(e.body, &list); err != nil {
		t.Fatal(err)
	}
	return list
}

// lists insists that a GET of all properties has these titles, too.
func (p *program) lists(t testing.TB, cacheStatus, want string) {
	t.Helper()
	if got := titles(p.list(t, cacheStatus)); got != want {
		t.Fatalf("the list has %q, want %q", got, want)
	}
}

func titles(list []property) string {
	var all []string
	for _, p := range list {
		all = append(all, p.Title)
	}
	return strings.Join(all, ", ")
}

// titled is a valid property with another title.
func titled(title string) string { return with(fmt.Sprintf(`"title":%q`, title)) }

// with is a valid property with more members. Of a repeated name, the last one counts.
func with(members string) string {
	if members != "" {
		members = "," + members
	}
	return `{"title":"Loft","description":"","price":"1.00","location":"Accra"` + members + `}`
}

// warm waits until the list is a hit.
func (p *program) warm(t testing.TB) {
	t.Helper()
	eventually(t, "the list is a hit", func() bool {
		e := p.want(t, 200, "GET", propertiesPath, "")
		return strings.HasPrefix(e.Header.Get("Cache-Status"), hitStatus)
	})
}

// shows waits until the list shows exactly these titles. No read may fail.
func (p *program) shows(t testing.TB, want string) {
	t.Helper()
	eventually(t, "the list shows "+want, func() bool {
		return titles(p.list(t, "redis; ")) == want
	})
}

// later makes a request in the background.
func (p *program) later(method, path, body string) <-chan exchange {
	got := make(chan exchange, 1)
	go func() {
		e, err := p.send(method, path, body)
		if err != nil {
			e = exchange{&http.Response{Header: http.Header{}}, []byte(err.Error())}
		}
		got <- e
	}()
	return got
}

// get makes a GET of the list in the background.
func (p *program) get() <-chan exchange { return p.later("GET", propertiesPath, "") }

// health is what /healthz says, without blanks around.
func (p *program) health(t testing.TB, status int) string {
	t.Helper()
	return strings.TrimSpace(string(p.want(t, status, "GET", "/healthz", "").body))
}

// isWell waits until /healthz says that all is well.
func (p *program) isWell(t testing.TB) {
	t.Helper()
	const well = `{"announcements":"heard","cache":"in use","postgresql":"up","redis":"up"}`
	eventually(t, "all is well", func() bool {
		e, err := p.send("GET", "/healthz", "")
		return err == nil && strings.TrimSpace(string(e.body)) == well
	})
}

// talk sends raw bytes, closes the sending side as nc -N does, and reads the answer to its end.
func (p *program) talk(t testing.TB, request string) exchange {
	t.Helper()
	return receive(t, p.begin(t, request))
}

// begin is talk in the background. All is sent when it returns.
func (p *program) begin(t testing.TB, request string) <-chan exchange {
	t.Helper()
	conn := p.dial(t)
	fmt.Fprint(conn, request)
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got := make(chan exchange, 1)
	go func() {
		e := exchange{Response: &http.Response{}}
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil {
			e.Response = response
			e.body, err = io.ReadAll(response.Body)
		}
		if err != nil {
			t.Errorf("%q: %v", request, err)
		}
		got <- e
	}()
	return got
}

// dial is a raw connection to the program, which ends with the test, or after all patience.
func (p *program) dial(t testing.TB) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return conn.(*net.TCPConn)
}

// checkProblem insists that an error is RFC 9457, that its detail says all this, and that it tells
// nothing of our inside.
func checkProblem(t testing.TB, e exchange, says ...string) problem {
	t.Helper()
	var p problem
	if err := json.Unmarshal(e.body, &p); err != nil {
		t.Fatalf("%v: %s", err, e.body)
	}
	if got := e.Header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("Content-Type: %s", got)
	}
	want := refuse(e.StatusCode, p.Detail)
	if p.Type != want.Type || p.Title != want.Title || p.Status != want.Status || p.Detail == "" {
		t.Errorf("problem: %+v", p)
	}
	for _, words := range says {
		if !strings.Contains(p.Detail, words) {
			t.Errorf("the detail is %q, want %q", p.Detail, words)
		}
	}
	secrets := "SELECT INSERT SQLSTATE pgconn 127.0.0.1: goroutine .go: panic EOF"
	for secret := range strings.FieldsSeq(secrets) {
		if bytes.Contains(e.body, []byte(secret)) {
			t.Errorf("the answer tells %q: %s", secret, e.body)
		}
	}
	again := e.StatusCode == 503 && p.Detail != errInDoubt.Detail
	if got := e.Header.Get("Retry-After"); (got != "") != again {
		t.Errorf("status %d with Retry-After: %q", e.StatusCode, got)
	}
	return p
}

// Part 4: waiting, and the log

// patience is how long a test waits for what should come at once. (The program itself waits 10 s
// for PostgreSQL.)
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

// A logbook is what the program has logged, line by line.
type logbook struct {
	mu    sync.Mutex
	lines []string
	read  int // how many of them says has seen
}

// keepLog keeps the log until the test ends.
func keepLog(t testing.TB) *logbook {
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

// says insists that the lines since the last call hold these parts, one each.
func (l *logbook) says(t testing.TB, parts ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%q is logged", parts), func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.lines) >= l.read+len(parts)
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	got := strings.Join(l.lines[l.read:], "")
	lacks := func(part string) bool { return !strings.Contains(got, part) }
	if len(l.lines) != l.read+len(parts) || slices.ContainsFunc(parts, lacks) {
		t.Errorf("want %q in\n%s", parts, got)
	}
	l.read = len(l.lines)
}

// count returns how many lines hold all parts.
func (l *logbook) count(parts ...string) (n int) {
	for line := range strings.Lines(l.String()) {
		lacks := func(part string) bool { return !strings.Contains(line, part) }
		if !slices.ContainsFunc(parts, lacks) {
			n++
		}
	}
	return n
}

// Part 5: the claims that keep the runs of the tests apart

// Each run of the tests takes a database of its own in PostgreSQL and in Redis, and drops those
// of runs that have ended without that, but none of a run that lives.
func TestClaims(t *testing.T) {
	config, u := services.database.Copy(), *parseURL(t, startRedis(t).url)
	config.Database = "postgres"
	ended, next := newRun(), newRun()
	admin, err := claimDatabase(config, ended)
	if err != nil {
		t.Fatal(err)
	}
	claim, first, err := claimRedis(u, ended)
	if err != nil {
		t.Fatal(err)
	}
	do(t, claim, "SET left behind")
	_, second, err := claimRedis(u, next)
	if err != nil || second == first {
		t.Fatalf("%s, then %s (%v)", first, second, err)
	}
	admin.Close()
	claim.Close()
	eventually(t, "what the ended run had in Redis is dropped", func() bool {
		claim, third, err := claimRedis(u, next)
		return err == nil && third == first && do(t, claim, "DBSIZE") == int64(1)
	})
	eventually(t, "its database is dropped, and ours isn't", func() bool {
		run, left := newRun(), ""
		admin, err := claimDatabase(config, run)
		if err != nil {
			t.Fatal(err)
		}
		defer admin.Close()
		defer admin.Exec("DROP DATABASE " + run)
		admin.QueryRow(`SELECT string_agg(datname, ' ') FROM pg_database`).Scan(&left)
		return !strings.Contains(left, ended) && strings.Contains(left, services.run)
	})
}

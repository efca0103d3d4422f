// Command properties serves property listings from PostgreSQL through two levels of cache in Redis.
//
// Begin with routes and newApp below. README.md has the order in which to read the rest.
package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"database/sql"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	ossignal "os/signal" // signal is ours
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
)

//go:embed schema.sql
var schema string

const (
	defaultDatabaseURL = "postgres://postgres:postgres@localhost:5432/properties?sslmode=disable"
	defaultRedisURL    = "redis://localhost:6379/0"
	usage              = `properties serves property listings from PostgreSQL through two levels of cache in Redis.

  -addr host:port  where to listen (default 127.0.0.1:8000)
  -seed N          insert N listings if there are none
  DATABASE_URL     default ` + defaultDatabaseURL + `
  REDIS_URL        default ` + defaultRedisURL + `
  WRITE_TOKEN      if set, writes need "Authorization: Bearer" with it; needed to listen beyond this machine
Then try: curl -i http://localhost:8000/properties/
`
)

// settings are what the environment and the flags say. Django: settings.py.
type settings struct {
	database   *pgx.ConnConfig
	redisURL   string
	writeToken string // "": no token is asked for, and only this machine may connect
	addr       *net.TCPAddr
	seed       uint
}

// main exits with 0 after -h or a signal, 1 if something is wrong, and 2 if a flag is.
func main() {
	s := settings{addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 8000}}
	flag.Func("addr", "", func(addr string) (err error) { s.addr, err = net.ResolveTCPAddr("tcp", addr); return err })
	flag.UintVar(&s.seed, "seed", 0, "")
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "unexpected argument %q\n%s", flag.Arg(0), usage)
		os.Exit(2)
	}
	ctx, stop := ossignal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)                           // a second Ctrl-C ends us at once
	if err := s.run(ctx); err != nil && ctx.Err() == nil { // not if a signal came while we were starting
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// readEnvironment checks each setting. Its errors never quote one, because there may be a password in it.
func (s *settings) readEnvironment() (err error) {
	databaseURL := cmp.Or(os.Getenv("DATABASE_URL"), defaultDatabaseURL)
	if s.database, err = pgx.ParseConfig(databaseURL); err != nil {
		return errors.New("DATABASE_URL is not a PostgreSQL URL: want postgres://user:password@host:5432/database")
	}
	if !strings.Contains(databaseURL, "default_query_exec_mode") {
		s.database.DefaultQueryExecMode = pgx.QueryExecModeExec // named statements break behind poolers and after migrations
	}
	s.database.ConnectTimeout = cmp.Or(s.database.ConnectTimeout, answerTimeout/2)                     // so that a second host in the URL has its turn
	s.database.RuntimeParams["client_encoding"], s.database.RuntimeParams["datestyle"] = "UTF8", "ISO" // whatever the role has set
	s.redisURL = cmp.Or(os.Getenv("REDIS_URL"), defaultRedisURL)
	isNumber := func(s string) bool { _, err := strconv.ParseUint(s, 10, 16); return err == nil }
	u, err := url.Parse(s.redisURL)
	if err != nil || u.Scheme != "redis" && u.Scheme != "rediss" || u.Host == "" ||
		!isNumber(cmp.Or(u.Port(), "6379")) || !isNumber(cmp.Or(strings.TrimPrefix(u.Path, "/"), "0")) || u.RawQuery+u.Fragment != "" {
		return errors.New("REDIS_URL is not a Redis URL: want redis://user:password@host:6379/0 (rediss:// for TLS), without parameters")
	}
	u.Host = net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "6379")) // redigo misreads [::1] without a port
	s.redisURL = u.String()
	s.writeToken = os.Getenv("WRITE_TOKEN")
	if strings.ContainsFunc(s.writeToken, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return errors.New("WRITE_TOKEN has a character that no header can carry: want visible ASCII without blanks")
	}
	if s.writeToken == "" && !s.addr.IP.IsLoopback() {
		return fmt.Errorf("-addr %s reaches beyond this machine, where anyone could write: set WRITE_TOKEN, or listen on 127.0.0.1", s.addr)
	}
	return nil
}

// run runs the program until ctx is done, and then ends its parts in order.
func (s *settings) run(ctx context.Context) error {
	if err := s.readEnvironment(); err != nil {
		return err
	}
	db, health := openDB(s.database, 16), openDB(s.database, 1) // of PostgreSQL's 100, so that several instances have room
	defer db.Close()
	defer health.Close()
	if err := prepare(ctx, db, s.seed); err != nil {
		return err
	}
	socket, err := net.ListenTCP("tcp", s.addr) // before the cache is touched: another instance may have the port
	if err != nil {
		return fmt.Errorf("-addr: %w", err)
	}
	a := newApp(db, health, s)
	defer a.startBackground()() // starts now; what it returns stops it, at the end
	return serve(ctx, socket, a.routes())
}

// openDB opens a pool of at most n connections. It pings each before it is used, because PostgreSQL may have ended it.
func openDB(config *pgx.ConnConfig, n int) *sql.DB {
	db := stdlib.OpenDB(*config, stdlib.OptionShouldPing(func(_ context.Context, p stdlib.ShouldPingParams) bool {
		ctx, cancel := context.WithTimeout(context.Background(), pingTimeout)
		defer cancel()
		return p.Conn.Ping(ctx) != nil // true: pgx pings once more, fails at once, since it is closed by now, and takes another
	}))
	db.SetMaxOpenConns(n)
	db.SetMaxIdleConns(n)
	db.SetConnMaxLifetime(time.Minute) // so that a changed role, or a primary that moved behind its name, is met soon
	return db
}

// prepare waits up to 10 s for PostgreSQL, applies the schema, and seeds an empty table.
func prepare(ctx context.Context, db *sql.DB, seed uint) error {
	waiting, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err := db.ExecContext(waiting, schema)
	for first := true; err != nil; first = false {
		cause := strings.Join(strings.Fields(err.Error()), " ") // in one line
		switch refusal, refused := errors.AsType[*pgconn.PgError](err); {
		case refused && refusal.Code == "55P03": // lock_not_available
			return fmt.Errorf("PostgreSQL: somebody holds a lock on the table properties, or another instance is applying schema.sql: %s", cause)
		case refused && (!mayPass(refusal.Code) || waiting.Err() != nil):
			return fmt.Errorf("PostgreSQL refuses schema.sql: %s", cause)
		case waiting.Err() != nil:
			return fmt.Errorf("PostgreSQL does not answer at DATABASE_URL: start it with \"docker compose up -d --wait\", or use \"scripts/with-services go run .\" without DATABASE_URL and REDIS_URL set (%s)", cause)
		case first:
			slog.Info("waiting for PostgreSQL", "err", cause)
		}
		time.Sleep(beatInterval)
		if _, next := db.ExecContext(waiting, schema); next == nil || waiting.Err() == nil { // the deadline's error says less
			err = next
		}
	}
	if seed == 0 {
		return nil
	}
	var inserted int
	if err := db.QueryRowContext(ctx, `SELECT properties_seed($1)`, int64(seed)).Scan(&inserted); err != nil {
		return fmt.Errorf("-seed %d: %w", seed, err)
	}
	slog.Info("seeded; none are inserted if the table has rows", "inserted", inserted)
	return nil
}

// serve answers HTTP until ctx is done and every request has its answer, or 8 s have passed since.
func serve(ctx context.Context, socket net.Listener, handler http.Handler) error {
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second, // 64 KiB over a poor line
		WriteTimeout:      60 * time.Second, // 27 MB, which are 100,000 listings, over a fair one; far above answerTimeout
		IdleTimeout:       11 * time.Minute, // above a proxy's (60 s to 10 min), so that it never sends into a closing connection
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(socket) }() // until Shutdown begins
	slog.Info("serving", "url", "http://"+socket.Addr().String()+propertiesPath)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		slog.Info("stopping")
	}
	deadline, cancel := context.WithTimeout(context.Background(), 8*time.Second) // Docker kills after 10
	defer cancel()
	if err := server.Shutdown(deadline); err != nil {
		slog.Warn("requests were cut off", "err", err)
		server.Close()
	}
	slog.Info("stopped")
	return nil
}

// app is the program, wired. Django: INSTALLED_APPS.
type app struct {
	properties *properties
	signals    *signals
	cache      *cache
	listener   *listener
	writeToken string
	health     *sql.DB // one connection, which no slow statement keeps busy
	pings      group   // coalesces its pings
}

// newApp connects the parts: the views to the cache, the writes to their signals, and the signals to the cache.
func newApp(db, health *sql.DB, s *settings) *app {
	p, signals := &properties{db: db}, &signals{}
	c := newCache(s.redisURL, p.all)
	signals.connectReceivers(c)
	p.getAll, p.postSave, p.postDelete = c.getAllProperties, signals.postSave.send, signals.postDelete.send
	l := &listener{db: health, config: s.database, announced: signals.announced.send}
	return &app{properties: p, signals: signals, cache: c, listener: l, writeToken: s.writeToken, health: health}
}

// startBackground tries Redis and PostgreSQL once, so that the first request is a miss, and then goes on until stop.
func (a *app) startBackground() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	a.cache.beat()
	err := a.listener.listen(ctx)
	var running sync.WaitGroup
	running.Go(func() { a.listener.run(ctx, err) })
	running.Go(func() { a.cache.run(ctx) })
	return func() { cancel(); running.Wait() }
}

// routes is the table of contents. Django: urls.py.
func (a *app) routes() http.Handler {
	p, c := a.properties, a.cache
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", http.RedirectHandler(propertiesPath, http.StatusTemporaryRedirect))
	mux.Handle("GET /properties/{$}", c.cachePage(15*time.Minute, p.listView))
	mux.Handle("POST /properties/{$}", a.authorized(p.createView))
	mux.Handle("GET /properties/{id}/{$}", byID(p.detailView))
	mux.Handle("PUT /properties/{id}/{$}", a.authorized(byID(p.replaceView)))
	mux.Handle("DELETE /properties/{id}/{$}", a.authorized(byID(p.deleteView)))
	mux.Handle("GET /cache/metrics/{$}", view(c.metricsView))
	mux.Handle("GET /metrics", view(c.prometheusView))
	mux.Handle("GET /healthz", view(a.healthView))
	crossOrigin := http.NewCrossOriginProtection() // refuses writes that another site's page makes a browser send
	crossOrigin.SetDenyHandler(refuse(http.StatusForbidden, "Another site's page may not write here."))
	return a.localHost(crossOrigin.Handler(mux))
}

// authorized asks for WRITE_TOKEN, if there is one.
func (a *app) authorized(next view) view {
	return func(w http.ResponseWriter, r *http.Request) error {
		scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		want, got := sha256.Sum256([]byte(a.writeToken)), sha256.Sum256([]byte(token)) // equal lengths, so that time tells nothing
		if a.writeToken != "" && (!strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(want[:], got[:]) == 0) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="properties"`)
			return refuse(http.StatusUnauthorized, "Send Authorization: Bearer and the WRITE_TOKEN.")
		}
		return next(w, r)
	}
}

// localHost answers only to this machine's own names, unless there is a token. If evil.example resolves to 127.0.0.1, a
// browser takes its page for ours, but still sends its name as Host. (HTTP/1.0 checks send no Host; browsers do.)
func (a *app) localHost(next http.Handler) view {
	return func(w http.ResponseWriter, r *http.Request) error {
		host := strings.ToLower((&url.URL{Host: r.Host}).Hostname()) // without port and brackets
		if a.writeToken == "" && host != "localhost" && host != "127.0.0.1" && host != "::1" && r.Host != "" {
			return refuse(http.StatusMisdirectedRequest, "This server answers to localhost, 127.0.0.1 and [::1] only. A proxy on this machine must send the Host localhost, or WRITE_TOKEN must be set.")
		}
		next.ServeHTTP(w, r)
		return nil
	}
}

// healthView reports what answers and whether the cache is in use. Without PostgreSQL the program isn't healthy.
func (a *app) healthView(w http.ResponseWriter, r *http.Request) error {
	status, health := http.StatusOK, map[string]string{"postgresql": "up", "redis": "up", "cache": "in use",
		"announcements": cmp.Or(a.listener.unheard.get(), "heard")}
	_, _, err := a.pings.do(900*time.Millisecond, func(ctx context.Context) (result, error) { return result{}, a.health.PingContext(ctx) })
	if err != nil {
		health["postgresql"], status = "down", http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "1")
	}
	if why := a.cache.bypassed.get(); why != "" {
		health["cache"] = "bypassed: " + why
		if why == noAnswer {
			health["redis"] = "down"
		}
	}
	return writeJSON(w, status, "application/json", health)
}

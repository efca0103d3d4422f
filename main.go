// Command properties serves property listings from PostgreSQL through two levels of cache in Redis.
//
// Read schema.sql, property.go, cache.go, signals.go, metrics.go and then this file: each uses only what
// stands in the ones before it. README.md says why.
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
	"syscall"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

//go:embed schema.sql
var schema string

// settings are what the environment and the flags say. Django: settings.py.
type settings struct {
	database   *pgx.ConnConfig
	redisURL   string
	writeToken string // empty: no token is asked for, and only this machine may connect
	addr       string
	seed       uint
}

func main() {
	os.Exit(run(os.Args[1:], os.Getenv))
}

// run is main with an exit status: 0 after a signal, 1 if something is wrong, 2 if a flag is.
func run(args []string, getenv func(string) string) int {
	flags := flag.NewFlagSet("properties", flag.ContinueOnError)
	s := settings{addr: "127.0.0.1:8000"}
	flags.Func("addr", "`host:port` to listen on (default "+s.addr+")", func(addr string) error {
		s.addr = addr
		_, port, err := net.SplitHostPort(addr)
		if err == nil {
			_, err = strconv.ParseUint(port, 10, 16)
		}
		return err
	})
	flags.UintVar(&s.seed, "seed", 0, "insert `N` listings if there are none")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() > 0:
		fmt.Fprintf(os.Stderr, "unexpected argument %q: there are only -addr and -seed\n", flags.Arg(0))
		return 2
	}
	ctx, stop := ossignal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends us at once
	err := s.readEnvironment(getenv)
	if err == nil {
		err = s.serve(ctx)
	}
	if err != nil && ctx.Err() == nil { // not if a signal came while we were starting
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// readEnvironment checks each setting. Its errors never quote one, for there may be a password in it.
func (s *settings) readEnvironment(getenv func(string) string) (err error) {
	s.database, err = pgx.ParseConfig(cmp.Or(getenv("DATABASE_URL"), "postgres://postgres:postgres@localhost:5432/properties?sslmode=disable"))
	if err != nil {
		return errors.New("DATABASE_URL is not a PostgreSQL URL: want postgres://user:password@host:5432/database")
	}
	s.redisURL = cmp.Or(getenv("REDIS_URL"), "redis://localhost:6379/0")
	u, err := url.Parse(s.redisURL)
	if err != nil {
		u = &url.URL{} // which is refused
	}
	_, portErr := strconv.ParseUint(cmp.Or(u.Port(), "6379"), 10, 16)
	_, databaseErr := strconv.ParseUint(cmp.Or(strings.TrimPrefix(u.Path, "/"), "0"), 10, 16)
	if u.Scheme != "redis" && u.Scheme != "rediss" || u.Host == "" || portErr != nil || databaseErr != nil {
		return errors.New("REDIS_URL is not a Redis URL: want redis://:password@host:6379/0, or rediss:// for TLS")
	}
	s.writeToken = getenv("WRITE_TOKEN")
	if strings.ContainsFunc(s.writeToken, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return errors.New("WRITE_TOKEN has a character that no header can carry: want visible ASCII without blanks")
	}
	host, _, _ := net.SplitHostPort(s.addr)
	if ip := net.ParseIP(host); s.writeToken == "" && host != "localhost" && !ip.IsLoopback() {
		return fmt.Errorf("-addr %s reaches beyond this machine, where anyone could write: set WRITE_TOKEN, or listen on 127.0.0.1", s.addr)
	}
	return nil
}

// serve runs the program until ctx is done.
func (s *settings) serve(ctx context.Context) error {
	db := stdlib.OpenDB(*s.database)
	defer db.Close()
	if err := prepare(ctx, db, s.seed); err != nil {
		return err
	}
	a := newApp(db, s.redisURL, s.writeToken)
	if err := a.cache.heal(); err != nil { // now, so that the first request is a miss and not a bypass
		slog.Warn("Redis does not answer; serving without the cache until it does", "err", err)
	}
	healing, stopHealing := context.WithCancel(context.Background())
	healed := make(chan struct{})
	go func() { a.cache.run(healing); close(healed) }()
	err := s.listen(ctx, a.routes())
	stopHealing()
	<-healed
	return err
}

// prepare bounds the pool, waits up to 10 s for PostgreSQL, applies the schema, and seeds an empty table.
func prepare(ctx context.Context, db *sql.DB, seed uint) error {
	db.SetMaxOpenConns(16) // of PostgreSQL's 100, so that several instances have room
	db.SetMaxIdleConns(16)
	waiting, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for err := db.PingContext(waiting); err != nil; err = db.PingContext(waiting) {
		select {
		case <-waiting.Done():
			cause := strings.Join(strings.Fields(err.Error()), " ") // in one line
			return fmt.Errorf("PostgreSQL does not answer at DATABASE_URL: start it with \"docker compose up -d --wait\", or use \"scripts/with-services go run .\" (%s)", cause)
		case <-time.After(250 * time.Millisecond):
		}
	}
	if _, err := db.ExecContext(ctx, schema); err != nil {
		return fmt.Errorf("schema.sql: %w", err)
	}
	if seed == 0 {
		return nil
	}
	result, err := db.ExecContext(ctx, fmt.Sprintf(seedProperties, seed))
	if err != nil {
		return fmt.Errorf("-seed %d: %w", seed, err)
	}
	inserted, _ := result.RowsAffected() // pgx always knows
	slog.Info("seeded", "properties", inserted)
	return nil
}

// listen serves HTTP until ctx is done and every request has its answer, or 8 s have passed since.
func (s *settings) listen(ctx context.Context, handler http.Handler) error {
	listener, err := net.Listen("tcp", s.addr)
	if err != nil {
		return fmt.Errorf("-addr: %w", err)
	}
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second, // 64 KiB over a poor line
		WriteTimeout:      60 * time.Second, // 27 MB, which are 100,000 listings, over a fair one; far above answerWithin
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	slog.Info("serving", "url", "http://"+listener.Addr().String()+propertiesPath)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	slog.Info("stopping")
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
	cache      *cache
	signals    *signals
	writeToken string
}

// newApp connects the parts: the views to the cache that they read through, the writes to their signals,
// and the signals to the cache that they invalidate.
func newApp(db *sql.DB, redisURL, writeToken string) *app {
	p, s := &properties{db: db}, &signals{}
	c := newCache(redisURL, p.all)
	p.getAll = c.getAllProperties
	p.postSave, p.postDelete, p.postUnknown = s.postSave.send, s.postDelete.send, s.postUnknown.send
	s.connectReceivers(c)
	return &app{properties: p, cache: c, signals: s, writeToken: writeToken}
}

// routes is the table of contents. Django: urls.py.
func (a *app) routes() http.Handler {
	p, c := a.properties, a.cache
	mux := http.NewServeMux()
	mux.Handle("GET /properties/{$}", c.cachePage(15*time.Minute, p.listView))
	mux.Handle("POST /properties/{$}", a.authorized(p.createView))
	mux.Handle("GET /properties/{id}/{$}", byID(p.detailView))
	mux.Handle("PUT /properties/{id}/{$}", a.authorized(byID(p.replaceView)))
	mux.Handle("DELETE /properties/{id}/{$}", a.authorized(byID(p.deleteView)))
	mux.Handle("GET /cache/metrics/{$}", view(c.metricsView))
	mux.Handle("GET /metrics", view(c.prometheusView))
	mux.Handle("GET /healthz", view(a.healthView))

	crossOrigin := http.NewCrossOriginProtection() // refuses writes that another site's page makes a browser send
	crossOrigin.SetDenyHandler(view(func(http.ResponseWriter, *http.Request) error {
		return &problem{Status: http.StatusForbidden, Detail: "Another site's page may not write here."}
	}))
	return a.localHost(crossOrigin.Handler(mux))
}

// authorized asks for WRITE_TOKEN, if there is one.
func (a *app) authorized(next view) view {
	return func(w http.ResponseWriter, r *http.Request) error {
		scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		want, got := sha256.Sum256([]byte(a.writeToken)), sha256.Sum256([]byte(token)) // equal lengths, so that time tells nothing
		if a.writeToken != "" && (!strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(want[:], got[:]) == 0) {
			w.Header().Set("WWW-Authenticate", "Bearer")
			return &problem{Status: http.StatusUnauthorized, Detail: "Send Authorization: Bearer and the WRITE_TOKEN."}
		}
		return next(w, r)
	}
}

// localHost answers only to this machine's own names, unless there is a token. A page of evil.example whose
// name was made to resolve to 127.0.0.1 is, to a browser, of our origin; its Host header still tells.
func (a *app) localHost(next http.Handler) view {
	return func(w http.ResponseWriter, r *http.Request) error {
		host := strings.ToLower((&url.URL{Host: r.Host}).Hostname()) // without port and brackets
		if a.writeToken == "" && host != "localhost" && host != "127.0.0.1" && host != "::1" {
			return &problem{Status: http.StatusMisdirectedRequest, Detail: "This server answers to localhost, 127.0.0.1 and [::1] only."}
		}
		next.ServeHTTP(w, r)
		return nil
	}
}

// healthView says whether PostgreSQL and Redis answer and whether the cache is in use. Without PostgreSQL
// we aren't healthy; without Redis we are slower. (A PING that fails costs the trust, as any Redis error does.)
func (a *app) healthView(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	health := map[string]string{"postgresql": "up", "redis": "up", "cache": "in use"}
	status := http.StatusOK
	if err := a.properties.db.PingContext(ctx); err != nil {
		health["postgresql"], status = "down", http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "1")
	}
	if err := a.cache.do(func(conn redis.Conn) error { _, err := conn.Do("PING"); return err }); err != nil {
		health["redis"] = "down"
	}
	if !a.cache.session.Load().trusted() {
		health["cache"] = "bypassed"
	}
	writeJSON(w, status, "application/json", health)
	return nil
}

// seedProperties inserts %d listings into an empty table, the same ones every time, in one transaction (as
// PostgreSQL runs statements that arrive together); the lock is for two instances that start at once. i * 5
// % 9 and the like walk through all of a list, in steps that have no factor in common with its length.
const seedProperties = `
LOCK TABLE properties IN EXCLUSIVE MODE;
WITH words AS (SELECT
	ARRAY['Accra', 'Lisbon', 'Nairobi', 'Oslo', 'Kyoto', 'Montréal', 'Valparaíso', 'Ghent', 'Tallinn', 'Cape Town', 'Hội An'] AS cities,
	ARRAY['Old Town', 'Harbour', 'Riverside', 'Hillside', 'Station Quarter', 'University', 'Market Square'] AS quarters,
	ARRAY['Sunny', 'Quiet', 'Spacious', 'Renovated', 'Bright', 'Historic', 'Compact', 'Airy'] AS qualities,
	ARRAY['studio', 'one-bedroom flat', 'two-bedroom flat', 'loft', 'terraced house', 'family home', 'villa', 'penthouse', 'cottage'] AS kinds,
	ARRAY['balcony', 'garden', 'roof terrace', 'bay window', 'fireplace', 'workshop', 'view of the water'] AS extras,
	ARRAY['the tram stop', 'a bakery', 'the park', 'two schools', 'the market hall'] AS places)
INSERT INTO properties (title, description, price, location, created_at)
SELECT
	qualities[1 + i %% 8] || ' ' || kinds[1 + i * 5 %% 9] || ' with ' || extras[1 + i * 3 %% 7],
	'Built in ' || 1900 + i * 37 %% 125 || ', ' || 25 + i * 17 %% 190 || ' m², ' || 2 + i %% 20 || ' minutes on foot from '
		|| places[1 + i * 2 %% 5] || '. Viewing by appointment, on weekdays from ' || 8 + i %% 9 || ' o''clock.',
	(60000 + i * 7919 %% 940000) + (i * 31 %% 100) / 100.0,
	quarters[1 + i * 4 %% 7] || ', ' || cities[1 + i * 7 %% 11],
	timestamptz '2025-01-01 08:00:00Z' + i %% 300000 * interval '2 minutes'
FROM words, generate_series(1, %d::bigint) AS i
WHERE NOT EXISTS (SELECT FROM properties)
ORDER BY i`

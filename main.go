// Command properties serves property listings from PostgreSQL through two levels of cache in
// Redis.
//
// Begin with routes and newApp below. README.md has the order in which to read the rest.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/subtle"
	"database/sql"
	"database/sql/driver"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	ossignal "os/signal" // signal is ours
	"regexp"
	"runtime/debug"
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

	usage = `properties serves property listings from PostgreSQL, through two levels of cache.

  -addr host:port  where to listen (default 127.0.0.1:8000)
  -seed N          insert N listings if there are none
  -connections N   to PostgreSQL, for requests, at most (default 16; 0 is 1); two more are for the
                   rest
  DATABASE_URL     default ` + defaultDatabaseURL + `
  REDIS_URL        default ` + defaultRedisURL + `
  WRITE_TOKEN      if set, writes need "Authorization: Bearer" with it; needed to listen beyond
                   this machine
Then try: curl -i http://localhost:8000/properties/
`
	percentEncode = "; in a user or a password percent-encode # / % ? @: %23 %2F %25 %3F %40"
)

// settings are what the environment and the flags say. Django: settings.py.
type settings struct {
	database    *pgx.ConnConfig
	connections uint // to PostgreSQL, for requests, at most
	redisURL    *url.URL
	writeToken  string // "": only this machine may connect
	addr        *net.TCPAddr
	seed        uint
}

// main exits with 0 after -h or a signal, 1 if something is wrong, and 2 if a flag is.
func main() {
	s := settings{addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 8000}}
	flag.Func("addr", "", func(addr string) (err error) {
		s.addr, err = net.ResolveTCPAddr("tcp", addr)
		return err
	})
	flag.UintVar(&s.seed, "seed", 0, "")
	flag.UintVar(&s.connections, "connections", 16, "")
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "unexpected argument %q\n%s", flag.Arg(0), usage)
		os.Exit(2)
	}
	// A log whose reader is gone ends nothing.
	ossignal.Ignore(syscall.SIGPIPE)
	ctx, stop := ossignal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, func() {
		// A second Ctrl-C ends us at once.
		stop()
		// Requests that don't end are cut off, before Docker kills us after 10 s. Nothing is
		// logged then, because a log that nobody reads may be what holds us up.
		time.AfterFunc(8*time.Second, func() { os.Exit(0) })
	})
	// No error is told if a signal came while we were starting.
	if err := s.run(ctx); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// databaseForm and redisForm refuse a character that is special in a URL and stands in a user or a
// password as it is: redis://:a%23b@host fits, and redis://:a#b@host doesn't. (pgx also takes
// keyword=value.)
var (
	databaseForm = regexp.MustCompile(`^\w+ *=|` +
		`^\w+://(` + userForm + `@)?[^@/?#]*(/[^@?#]*)?(\?[^@#]*)?$`)
	redisForm = regexp.MustCompile(
		`^rediss?://(` + userForm + `@)?` + hostForm + portForm + `(/\d{0,5})?$`)

	notPrimary = regexp.MustCompile(`target_session_attrs *= *'?(standby|prefer-standby|read-only)`)
)

const (
	userForm = `([^@/?#%]|%[0-9A-Fa-f]{2})*`
	hostForm = `([^@/?#:[]+|\[[^@/?#]+\])`
	portForm = `(:(\d{0,4}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5]))?`
)

// readEnvironment checks each setting. Its errors quote none, because there may be a password in
// it.
func (s *settings) readEnvironment() error {
	if err := s.readDatabaseURL(); err != nil {
		return err
	}
	raw := cmp.Or(os.Getenv("REDIS_URL"), defaultRedisURL)
	u, err := url.Parse(raw)
	if err != nil || !redisForm.MatchString(raw) {
		return errors.New("REDIS_URL: want redis://user:password@host:6379/0 or rediss://…" +
			percentEncode)
	}
	// redigo misreads [::1] without a port.
	u.Host = net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "6379"))
	s.redisURL = u
	s.writeToken = strings.TrimSpace(os.Getenv("WRITE_TOKEN"))
	if s.writeToken == "" && !s.addr.IP.IsLoopback() {
		return fmt.Errorf("-addr %s reaches beyond this machine, where anyone could write: "+
			"set WRITE_TOKEN, or listen on 127.0.0.1", s.addr)
	}
	return nil
}

// readDatabaseURL takes a primary only, and sets what the program needs of a connection.
func (s *settings) readDatabaseURL() error {
	raw := cmp.Or(os.Getenv("DATABASE_URL"), defaultDatabaseURL)
	if !databaseForm.MatchString(raw) {
		return errors.New("DATABASE_URL: want postgres://user:password@host:5432/database" +
			percentEncode)
	}
	// A standby lags, so its rows may be older than what a client was told.
	session := " target_session_attrs=" + os.Getenv("PGTARGETSESSIONATTRS")
	if found := notPrimary.FindString(raw + session); found != "" {
		return fmt.Errorf("DATABASE_URL, or PG…: %s can't be used, want a primary", found)
	}
	config, err := pgx.ParseConfig(raw)
	if err != nil {
		// "cannot parse `the URL`: the cause"
		parts := strings.Split(err.Error(), "`")
		return errors.New("DATABASE_URL, or a PG… variable or file" + parts[len(parts)-1])
	}
	if config.ValidateConnect == nil {
		config.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsPrimary
	}
	if !strings.Contains(raw, "default_query_exec_mode") {
		// Named statements break behind poolers, and after migrations.
		config.DefaultQueryExecMode = pgx.QueryExecModeExec
	}
	// So that a second host in the URL has its turn.
	config.ConnectTimeout = cmp.Or(config.ConnectTimeout, queryTimeout/2)
	// Whatever the role has set.
	config.RuntimeParams["client_encoding"] = "UTF8"
	s.database = config
	return nil
}

// run runs the program until ctx is done, and then ends its parts in order.
func (s *settings) run(ctx context.Context) error {
	if err := s.readEnvironment(); err != nil {
		return err
	}
	db := openDB(s.database, int(max(1, s.connections)))
	reserved := openDB(s.database, 1)
	defer db.Close()
	defer reserved.Close()
	if err := prepare(ctx, db, s.seed); err != nil {
		return err
	}
	// Before the cache is touched: another instance may have the port.
	socket, err := net.ListenTCP("tcp", s.addr)
	if err != nil {
		return fmt.Errorf("-addr: %w", err)
	}
	a := newApp(db, reserved, s)
	handler := a.routes()
	stop := a.startBackground()
	defer stop()
	return serve(ctx, socket, handler)
}

// openDB opens a pool of at most n connections. One is used again only if it lives and may write.
// If it may not, its server has become a standby, or was read-only when it began, and a new
// connection may write again.
func openDB(config *pgx.ConnConfig, n int) *sql.DB {
	db := stdlib.OpenDB(*config,
		stdlib.OptionShouldPing(func(context.Context, stdlib.ShouldPingParams) bool {
			return false
		}),
		stdlib.OptionResetSession(func(_ context.Context, conn *pgx.Conn) error {
			ctx, cancel := context.WithTimeout(context.Background(), pingTimeout)
			defer cancel()
			if pgconn.ValidateConnectTargetSessionAttrsReadWrite(ctx, conn.PgConn()) != nil {
				return driver.ErrBadConn
			}
			return nil
		}))
	db.SetMaxOpenConns(n)
	db.SetMaxIdleConns(n)
	return db
}

// prepare waits up to 10 s for PostgreSQL, applies the schema, and inserts seed listings into an
// empty table, which may take 100 µs each.
func prepare(ctx context.Context, db *sql.DB, seed uint) error {
	ctx, cancel := context.WithTimeout(ctx,
		10*time.Second+time.Duration(seed)*100*time.Microsecond)
	defer cancel()
	script := fmt.Sprintf("SELECT set_config('properties.seed', '%d', true);\n%s", seed, schema)
	var why string
	for {
		_, err := db.ExecContext(ctx, script)
		if err == nil {
			return nil
		}
		refusal, refused := errors.AsType[*pgconn.PgError](err)
		// 55P03: somebody holds a lock on the table, or another instance is at it.
		if refused && (refusal.Code == "55P03" || !mayPass.MatchString(refusal.Code)) {
			return fmt.Errorf("PostgreSQL refuses: %s", refusal.Message)
		}
		if ctx.Err() != nil {
			return fmt.Errorf(`PostgreSQL does not answer at DATABASE_URL: start it with `+
				`"docker compose up -d --wait", or use "scripts/with-services go run ." without `+
				`DATABASE_URL and REDIS_URL set (%s)`, cmp.Or(why, cause(err)))
		}
		if why == "" {
			slog.Info("waiting for PostgreSQL", "why", cause(err))
		}
		why = cause(err)
		time.Sleep(firstPause)
	}
}

// serve answers HTTP until ctx is done and every request has its answer.
func serve(ctx context.Context, socket net.Listener, handler http.Handler) error {
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		// 64 KiB over a poor line.
		ReadTimeout: 10 * time.Second,
		// 28 MB, which are 100,000 listings, over a fair one; far above answerTimeout.
		WriteTimeout: 60 * time.Second,
		// Above a proxy's (60 s to 10 min), so that it never sends into a closing connection.
		IdleTimeout: 11 * time.Minute,
		// Browsers send all cookies of localhost, whichever program has set them.
		MaxHeaderBytes: 64 << 10,
	}
	failed := make(chan error, 1)
	// Until Shutdown begins.
	go func() { failed <- server.Serve(socket) }()
	slog.Info("serving", "url", "http://"+socket.Addr().String()+propertiesPath)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		slog.Info("stopping")
	}
	err := server.Shutdown(context.Background())
	slog.Info("stopped")
	return err
}

// app is the program, wired. Django: INSTALLED_APPS.
type app struct {
	properties *properties
	cache      *cache
	listener   *listener
	writeToken string
}

// newApp connects the parts: the views to the cache, the writes to their signals, and the signals
// to the cache. reserved is one connection, which no request keeps busy.
func newApp(db, reserved *sql.DB, s *settings) *app {
	p := &properties{db: db, signals: &signals{}}
	c := newCache(s.redisURL, p, reserved)
	p.list = c.getAllProperties
	connectReceivers(p.signals, c)
	l := &listener{config: s.database.Copy(), cache: c}
	// So that the second of two hosts has its turn.
	l.config.ConnectTimeout = min(l.config.ConnectTimeout, lineTimeout/2)
	// Until the first look, a second after the start at most.
	l.unheard.Store("")
	return &app{properties: p, cache: c, listener: l, writeToken: s.writeToken}
}

// startBackground tries Redis and PostgreSQL once, so that the first request can use Redis, and
// goes on until stop. It comes after routes, because each page needs connections to Redis.
func (a *app) startBackground() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	a.cache.link.connect(ctx)
	// If it fails, run tries again.
	a.listener.listen(ctx)
	var running sync.WaitGroup
	running.Go(func() { a.listener.run(ctx) })
	running.Go(func() { a.cache.link.run(ctx) })
	return func() {
		cancel()
		running.Wait()
	}
}

// routes is the table of contents. (cachePage returns a pattern, too: GET and its path.) Django:
// urls.py.
func (a *app) routes() http.Handler {
	p, c := a.properties, a.cache
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", http.RedirectHandler(propertiesPath, http.StatusTemporaryRedirect))
	mux.Handle(c.cachePage(propertiesPath, 15*time.Minute, p.listView))
	mux.Handle("POST /properties/{$}", a.mayWrite(p.createView))
	mux.Handle("GET /properties/{id}/{$}", byID(p.detailView))
	mux.Handle("PUT /properties/{id}/{$}", a.mayWrite(byID(p.replaceView)))
	mux.Handle("DELETE /properties/{id}/{$}", a.mayWrite(byID(p.deleteView)))
	mux.Handle("GET /cache/metrics/{$}", view(c.metricsView))
	mux.Handle("GET /metrics", view(c.prometheusView))
	mux.Handle("GET /healthz", view(a.healthView))
	return a.guard(mux)
}

// mayWrite asks for WRITE_TOKEN, if there is one, and refuses preconditions: a property has no ETag
// to compare. To ignore one would overwrite what the client wanted to protect (RFC 9110 §13.1).
func (a *app) mayWrite(next view) view {
	return func(w http.ResponseWriter, r *http.Request) error {
		scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		// The time that this takes tells the token's length at most.
		right := subtle.ConstantTimeCompare([]byte(token), []byte(a.writeToken)) == 1
		if a.writeToken != "" && !(right && strings.EqualFold(scheme, "Bearer")) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="properties"`)
			return refuse(401, "Send Authorization: Bearer and the WRITE_TOKEN.")
		}
		if cmp.Or(r.Header.Get("If-Match"), "*") != "*" || r.Header.Get("If-None-Match") == "*" {
			return refuse(412, "Writes take no precondition, because a property has no ETag.")
		}
		return next(w, r)
	}
}

// localNames can't be pointed at this machine by a DNS server: IP addresses, and localhost's own.
// (And none, which HTTP/1.0 may send, but no browser.)
var localNames = regexp.MustCompile(`(?i)^((.*\.)?localhost\.?|[\d.]+|\[[\da-f:.]+\])?(:\d*)?$`)

// guard stands before every view. Without a token it keeps other sites' pages from using a
// browser on this machine: if evil.example resolves to 127.0.0.1, the browser takes its page for
// ours, but still sends its name as Host.
func (a *app) guard(next http.Handler) http.Handler {
	crossOrigin := http.NewCrossOriginProtection()
	return view(func(w http.ResponseWriter, r *http.Request) error {
		// A client may keep a copy, but must ask before it uses it, because no server can recall
		// it. (Django: max-age=900.) That goes for errors too, or a proxy may apply a time of its
		// own.
		w.Header().Set("Cache-Control", "no-cache")
		switch {
		case a.writeToken != "":
		case !localNames.MatchString(r.Host):
			return refuse(421, "This answers to localhost and IP addresses only. A proxy needs "+
				"WRITE_TOKEN set, or must send the Host localhost, and change Origin with it.")
		case crossOrigin.Check(r) != nil:
			return refuse(403, "Another site's page may not write here.")
		}
		next.ServeHTTP(w, r)
		return nil
	})
}

// healthView reports what answers, and whether the cache is in use. It sends Redis nothing: what
// it says of Redis is as of the last use. Without PostgreSQL the program isn't healthy.
func (a *app) healthView(w http.ResponseWriter, r *http.Request) error {
	status, health := 200, map[string]string{
		"postgresql":    "up",
		"announcements": cmp.Or(a.listener.unheard.Load().(string), "heard"),
		"redis":         "up",
		"cache":         "in use",
	}
	ctx, cancel := context.WithTimeout(context.Background(), 900*time.Millisecond)
	defer cancel()
	if err := a.cache.reserved.PingContext(ctx); err != nil {
		status = 503
		health["postgresql"], health["announcements"] = cause(err), "PostgreSQL does not answer"
	}
	if why := a.cache.link.session.Load().bypassed(); why != "" {
		health["redis"], health["cache"] = why, "bypassed"
	}
	return writeJSON(w, status, "application/json", health)
}

// A view answers a request, or returns the error to answer with. Django: a view raises Http404.
type view func(http.ResponseWriter, *http.Request) error

// ServeHTTP also turns a panic into an answer: net/http would only hang up.
func (v view) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	err := safely(func() error { return v(w, r) })
	if err != nil {
		writeError(w, r, err)
	}
}

// safely runs f, and turns a panic into an error, with the stack for the log.
func safely(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: panic: %v\n%s", errInternal, p, debug.Stack())
		}
	}()
	return f()
}

// A problem is the answer to a request that fails (RFC 9457), and the error that leads to it.
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	// Errors says what is wrong with a field.
	Errors map[string]string `json:"errors,omitempty"`
}

// refuse returns the problem with the status and its standard title.
func refuse(status int, detail string) *problem {
	title := http.StatusText(status)
	return &problem{Type: "about:blank", Title: title, Status: status, Detail: detail}
}

func (p *problem) Error() string { return p.Detail }

var (
	errNotFound = refuse(404, "There is no such property.")
	errInternal = refuse(500, "Something is wrong on our side.")
	errInDoubt  = refuse(503, "The database did not confirm the write: it may have been "+
		"applied. Look before you repeat it.")
)

// writeError is the only place where an error becomes an answer. (A path or a method that isn't
// there is refused by ServeMux.) The client learns what it did wrong; the log learns what we did.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	p := problemOf(err)
	if p.Status >= 500 || p.Status == 409 {
		slog.Error("request failed", "method", r.Method, "path", r.URL.Path,
			"status", p.Status, "err", err)
	}
	if p.Status == 503 && p != errInDoubt {
		w.Header().Set("Retry-After", "1") // second
	}
	writeJSON(w, p.Status, "application/problem+json", p)
}

// problemOf says 503 where a later try may succeed.
func problemOf(err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	why := "does not answer"
	refusal, refused := errors.AsType[*pgconn.PgError](err)
	_, unreachable := errors.AsType[*pgconn.ConnectError](err)
	switch {
	case !unreachable && errors.Is(err, context.DeadlineExceeded):
		why = "took longer than 4 s"
	case !refused:
	case refusal.Code == "25006":
		why = "is read-only"
	case strings.HasPrefix(refusal.Code, "23"):
		return refuse(409, "The database refuses this: it would break one of its constraints.")
	case mayPass.MatchString(refusal.Code):
		why = "can't do this now"
	default:
		return errInternal
	}
	return refuse(503, fmt.Sprintf("The database %s: nothing was changed. Try again.", why))
}

// mayPass finds the SQLSTATEs after which a later try may succeed: connection, transaction state,
// rollback, resources, a full queue of NOTIFY, locks, shutdown, I/O.
var mayPass = regexp.MustCompile(`^(08|25|40|53|54000|55|57|58)`)

// cause returns an error's innermost reason, in the words of PostgreSQL, Redis or the system:
// errors put what they wrap at their end. So it names no address that these words don't have.
func cause(err error) string {
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time"
	}
	words := strings.Split(err.Error(), ": ")
	return words[len(words)-1]
}

// writeJSON answers with v. It returns nil, so that a view can end with it.
func writeJSON(w http.ResponseWriter, status int, contentType string, v any) error {
	body := encode(v)
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	// This fails only if the client has left.
	w.Write(body)
	return nil
}

// encode is json.Marshal that leaves <, > and & as they are, and ends in a newline for the
// terminal.
func encode(v any) []byte {
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false)
	// All our types can be encoded.
	encoder.Encode(v)
	return body.Bytes()
}

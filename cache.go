// cache.go: two levels of cache in Redis. Django: utils.py, @cache_page, django.core.cache.
//
//	GET /properties/ → page:/properties/ (15 minutes) → all_properties (1 hour) → PostgreSQL
//
// README.md has the four rules. Rule 2 is kept in part 2, rule 1 in part 3, rule 3 in part 4, and rule 4 in signals.go.

package main

import (
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

// Part 1: the levels and the page
//
// The page is the finished answer; the list below it spares PostgreSQL when a page is missing. README.md says more.

const (
	allPropertiesKey = "all_properties"
	allPropertiesTTL = time.Hour
	fenceKey         = "properties:fence" // what each invalidation changes: see part 3. It has no TTL; if it is evicted, a fill is lost.
	// redisTimeout bounds a connect and the reply to a small command: what a hung Redis costs the requests in flight, once.
	// Less would mistake a busy processor for a hung Redis: 500 steady clients on 2 cores never met this.
	redisTimeout = 250 * time.Millisecond
	bodyTimeout  = time.Second             // for what carries a list: 2.7 MB (10,000 listings) at 5 MB/s take half of it
	beatInterval = 250 * time.Millisecond  // how often Redis is looked at, and how long hits may stay away once it is back
	noAnswer     = "Redis does not answer" // why it is bypassed after an error of the connection
)

// pageKey is where the answer to GET path is stored; gzipKey is where its gzipped form is.
func pageKey(path string) string { return "page:" + path }
func gzipKey(path string) string { return pageKey(path) + ":gzip" }

// A cache is Redis with its two levels.
type cache struct {
	query func(context.Context) ([]property, error) // what lies below both levels: PostgreSQL
	pages level
	lists level
	kept  sync.Map // page key → the *entry last seen there, used only while Redis confirms its id

	url     string
	session atomic.Pointer[redis.Pool] // nil: Redis is bypassed
	history string                     // of Redis, when the session started; only beat uses it
	metrics sync.Mutex                 // held while Redis is asked for its metrics

	mu       sync.Mutex // held while an invalidation is sent, and when a session starts or ends; guards owes
	owes     bool       // Redis may hold outdated data: it is owed an invalidation
	bypassed reason     // why Redis is bypassed
}

// newCache returns a cache that bypasses Redis until beat has started a session.
func newCache(url string, query func(context.Context) ([]property, error)) *cache {
	c := &cache{url: url, query: query}
	c.lists = level{cache: c, find: findList, store: storeList}
	c.pages = level{cache: c, find: c.findPage, store: c.storePage}
	return c
}

// A level is one of the two caches: how Redis holds its entries, and what became of its requests.
type level struct {
	cache     *cache
	find      func(conn redis.Conn, key string) (*entry, error) // nil if Redis has none
	store     func(conn redis.Conn, key string, e *entry, ttl time.Duration)
	groups    sync.Map               // key → *group; keys are few, so they stay
	requests  [outcomes]atomic.Int64 // by outcome
	coalesced atomic.Int64           // requests that shared a look-up which another request had started
}

// An entry is what a level stores: a body and, for a page, its headers. A cached view writes its answer to one.
type entry struct {
	status int
	header http.Header
	body   []byte
}

func (e *entry) Header() http.Header         { return e.header }
func (e *entry) WriteHeader(status int)      { e.status = max(e.status, status) } // so that a later 200 hides no error
func (e *entry) Write(b []byte) (int, error) { e.body = append(e.body, b...); return len(b), nil }

// id names one fill. (The ETag alone would give an older fill's Date, and so a wrong Age.)
func (e *entry) id() string { return e.header.Get("ETag") + " " + e.header.Get("Date") }

// A result is the entry that a level found or loaded, and how.
type result struct {
	*entry
	outcome outcome
}
type outcome int

const (
	miss     outcome = iota // Redis did not have it, and still does not: the fill lost to a write, or failed
	stored                  // Redis did not have it, and has it now
	hit                     // Redis had it
	bypassed                // Redis was not asked, or did not answer
	outcomes
)

// getAllProperties returns all properties as a JSON array, from all_properties or PostgreSQL.
func (c *cache) getAllProperties() ([]byte, error) {
	a, err := c.lists.getOrSet(allPropertiesKey, allPropertiesTTL, func(ctx context.Context) (*entry, error) {
		list, err := c.query(ctx)
		return &entry{body: encode(list)}, err
	})
	if err != nil {
		return nil, err
	}
	return a.body, nil // bytes, because to decode 10,000 properties takes longer than to query them
}

// getOrSet returns the entry at key, or loads it and stores it for ttl. Django: cache.get_or_set.
func (l *level) getOrSet(key string, ttl time.Duration, load func(context.Context) (*entry, error)) (result, error) {
	g, _ := l.groups.LoadOrStore(key, new(group))
	a, shared, err := g.(*group).do(answerTimeout, func(ctx context.Context) (result, error) { return l.lookUp(ctx, key, ttl, load) })
	l.requests[a.outcome].Add(1)
	if shared {
		l.coalesced.Add(1)
	}
	return a, err
}

// cachePage wraps a view so that its answer to GET comes from Redis for ttl. Django: @cache_page(60 * 15).
// The path alone makes the key, so the view sees nothing else of the request: nobody can fill Redis with ?x=1, ?x=2, …
// or have their own variant stored for others. (Django's key has the whole URL, and the headers that Vary names.)
func (c *cache) cachePage(ttl time.Duration, v view) view {
	return func(w http.ResponseWriter, r *http.Request) error {
		path, gzipped := r.URL.Path, acceptsGzip(r.Header)
		key := pageKey(path)
		if gzipped {
			key = gzipKey(path)
		}
		a, err := c.pages.getOrSet(key, ttl, func(ctx context.Context) (*entry, error) { return render(ctx, v, path, gzipped) })
		if err == nil {
			writePage(w, r, a, ttl)
		}
		return err
	}
}

// render has v answer a GET of path. A page is for everybody, so v must answer 200 and set no cookie.
func render(ctx context.Context, v view, path string, gzipped bool) (*entry, error) {
	e := &entry{status: http.StatusOK, header: http.Header{}}
	r := &http.Request{Method: http.MethodGet, URL: &url.URL{Path: path}, Header: http.Header{}, Body: http.NoBody}
	if err := v(e, r.WithContext(ctx)); err != nil {
		return nil, err
	}
	if e.status != http.StatusOK || e.header["Set-Cookie"] != nil {
		return nil, fmt.Errorf("%w: %s can't be cached: its view answered %d with the headers %v", errInternal, path, e.status, e.header)
	}
	if gzipped {
		plain := e.body
		e.body = nil
		z := gzip.NewWriter(e) // whose Write doesn't fail
		z.Write(plain)
		z.Close()
		e.header.Set("Content-Encoding", "gzip")
	}
	e.header.Set("Content-Length", strconv.Itoa(len(e.body)))
	e.header.Set("Date", time.Now().UTC().Format(http.TimeFormat)) // Age counts from here
	e.header.Set("ETag", etag(e.body))
	e.header.Set("Vary", "Accept-Encoding")
	e.header.Set("Cache-Control", "no-cache") // keep a copy, but ask before using it: no server can recall it (Django: max-age=900)
	return e, nil
}

// etag is a strong validator (RFC 9110 §8.8.3): another body has another tag.
func etag(body []byte) string {
	sum := sha256.Sum256(body)
	return `"` + base64.RawURLEncoding.EncodeToString(sum[:16]) + `"` // 128 bits tell any two bodies apart
}

// writePage writes a page and says in Cache-Status (RFC 9211) where it came from.
func writePage(w http.ResponseWriter, r *http.Request, res result, ttl time.Duration) {
	h := w.Header()
	maps.Copy(h, res.header)
	status := [...]string{"fwd=uri-miss", "fwd=uri-miss; stored", "hit", "fwd=bypass; detail=untrusted"}[res.outcome]
	if res.outcome == hit {
		date, _ := http.ParseTime(res.header.Get("Date"))
		age := max(0, time.Since(date)) // the clock of the instance that filled it may be ahead
		h.Set("Age", strconv.Itoa(int(age.Seconds())))
		status += fmt.Sprintf("; ttl=%d", int(max(0, ttl-age).Seconds()))
	}
	h.Set("Cache-Status", "redis; "+status)
	if namesTag(r.Header["If-None-Match"], res.header.Get("ETag")) {
		h.Del("Content-Encoding") // net/http removes Content-Type and Content-Length
		w.WriteHeader(http.StatusNotModified)
		return
	}
	w.Write(res.body)
}

// namesTag reports whether If-None-Match names the tag, by weak comparison (RFC 9110 §13.1.2).
func namesTag(ifNoneMatch []string, tag string) bool {
	return slices.ContainsFunc(strings.Split(strings.Join(ifNoneMatch, ","), ","), func(name string) bool {
		name = strings.TrimSpace(name)
		return name == "*" || strings.TrimPrefix(name, "W/") == tag
	})
}

// acceptsGzip reports whether the client accepts gzip and does not prefer the plain form (RFC 9110 §12.5.3).
func acceptsGzip(h http.Header) bool {
	quality := map[string]float64{} // of each coding named
	for coding := range strings.SplitSeq(strings.ToLower(strings.Join(h["Accept-Encoding"], ",")), ",") {
		name, weight, _ := strings.Cut(coding+";q=1", ";") // if there are two, the first one counts
		weight, _, _ = strings.Cut(weight, ";")
		quality[strings.TrimSpace(name)], _ = strconv.ParseFloat(strings.TrimPrefix(strings.TrimSpace(weight), "q="), 64)
	}
	q, named := quality["gzip"]
	if !named {
		q = quality["*"]
	}
	return q > 0 && q >= quality["identity"]
}

// Part 2: the group
//
// Rule 2: a caller never gets data that was read before it asked. If callers shared the running look-up:
//
//  1. reader A's look-up reads the old rows
//  2. a writer commits, invalidates, and has its answer
//  3. reader B asks, joins A's look-up (as single-flight has it), and gets the old rows

// A group runs the look-ups of one key one at a time, and lets callers share the next one. The zero value works.
//
//	A asks  [== call 1 ==]
//	B, C ask    ..........[== call 2 ==]   begins after B and C asked: they share it
//	D asks                    ..........[== call 3 ==]
//
// So a stampede costs one query, and hits share their look-ups, too. A caller waits for two calls at most.
type group struct {
	mu      sync.Mutex // guards next
	next    *call      // the call that has not begun: whoever asks now shares it
	running sync.Mutex // held by the call that runs
}

// A call is one run of fn, here a look-up, and what it returned.
type call struct {
	result result
	err    error
	done   chan struct{} // closed when they are there
}

// do returns what fn returns, run for this caller or for another one that shares the call, or an error after limit. (A
// request's context would end too soon: when the client closes its sending side, and still reads.)
func (g *group) do(limit time.Duration, fn func(context.Context) (result, error)) (r result, shared bool, err error) {
	g.mu.Lock()
	c := g.next
	if shared = c != nil; !shared {
		c = &call{done: make(chan struct{})}
		g.next = c
		go g.doCall(c, fn)
	}
	g.mu.Unlock()
	select {
	case <-c.done:
		return c.result, shared, c.err
	case <-time.After(limit):
		return result{}, shared, context.DeadlineExceeded
	}
}

// doCall waits until no call runs, closes c to newcomers, and runs fn with a deadline. A panic becomes c's error.
func (g *group) doCall(c *call, fn func(context.Context) (result, error)) {
	g.running.Lock()
	defer g.running.Unlock()
	runtime.Gosched() // let those who are about to ask share c: 3,200 hits then cost 220 look-ups, not 1,080 (TestCostOfHits)
	g.mu.Lock()
	g.next = nil
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
	defer cancel()
	defer close(c.done)
	c.err = safely(func() (err error) { c.result, err = fn(ctx); return err })
}

// Part 3: the look-up
//
// Rule 1: a fill loses to a write. Otherwise a late fill would undo an invalidation:
//
//  1. reader: misses, and reads the old rows
//  2. writer: commits the new row, and deletes the key
//  3. reader: stores the old rows, for an hour
//
// So an invalidation also changes the fence. The reader WATCHes it before it reads the rows, and stores with EXEC, which
// does nothing if the fence has changed since. (WATCH on the key itself would not notice that a missing key is deleted.)

// lookUp is getOrSet for all who share it. Redis counts a hit as one look-up of a key, two if a page's body is sent.
func (l *level) lookUp(ctx context.Context, key string, ttl time.Duration, load func(context.Context) (*entry, error)) (result, error) {
	if pool := l.cache.session.Load(); pool != nil {
		conn := pool.Get()
		defer conn.Close() // undoes WATCH
		e, err := l.find(conn, key)
		if e != nil {
			return result{e, hit}, nil
		}
		if err == nil {
			_, err = conn.Do("WATCH", fenceKey)
		}
		if err == nil {
			return l.fill(ctx, pool, conn, key, ttl, load)
		}
		l.cache.end(pool, conn, err)
	}
	e, err := load(ctx)
	return result{e, bypassed}, err
}

// fill loads the entry and stores it, unless the fence has changed since WATCH.
func (l *level) fill(ctx context.Context, pool *redis.Pool, conn redis.Conn, key string, ttl time.Duration,
	load func(context.Context) (*entry, error)) (result, error) {
	start := time.Now()
	e, err := load(ctx)
	if err != nil {
		return result{nil, miss}, err
	}
	conn.Send("MULTI")
	l.store(conn, key, e, ttl)
	replies, err := redis.Values(redis.DoWithTimeout(conn, bodyTimeout, "EXEC"))
	if errors.Is(err, redis.ErrNil) { // the fence has changed
		slog.Info("cache: fill discarded, because a write came", "key", key)
		return result{e, miss}, nil
	}
	for _, reply := range replies { // EXEC succeeds even if its commands fail
		if refusal, ok := reply.(redis.Error); ok {
			err = refusal
		}
	}
	if err != nil {
		l.cache.end(pool, conn, err)
		return result{e, miss}, nil
	}
	slog.Info("cache: filled", "key", key, "bytes", len(e.body), "took", time.Since(start))
	return result{e, stored}, nil
}

// all_properties is a plain string, so that redis-cli get all_properties shows it.
func storeList(conn redis.Conn, key string, e *entry, ttl time.Duration) {
	conn.Send("SET", key, e.body, "EX", int(ttl.Seconds()))
}

func findList(conn redis.Conn, key string) (*entry, error) {
	reply, err := redis.DoWithTimeout(conn, bodyTimeout, "GET", key)
	if err != nil || reply == nil {
		return nil, err
	}
	list := reply.([]byte)
	if !json.Valid(list) || list[0] != '[' {
		return nil, redis.Error(key + " does not hold a JSON array")
	}
	return &entry{body: list}, nil
}

// A page is a hash. Keeping it here before EXEC is safe, because it is used only while Redis confirms its id.
func (c *cache) storePage(conn redis.Conn, key string, e *entry, ttl time.Duration) {
	conn.Send("HSET", key, "id", e.id(), "header", encode(e.header), "body", e.body)
	conn.Send("EXPIRE", key, int(ttl.Seconds()))
	c.kept.Store(key, e)
}

// findPage asks Redis for the page's id, and for the page only if it isn't the one that was kept. Redis still says
// which page is valid, but the body (2.7 MB for 10,000 listings) needn't travel: as with a browser's If-None-Match.
func (c *cache) findPage(conn redis.Conn, key string) (*entry, error) {
	id, err := conn.Do("HGET", key, "id")
	if err != nil || id == nil {
		return nil, err
	}
	if kept, ok := c.kept.Load(key); ok && kept.(*entry).id() == string(id.([]byte)) {
		return kept.(*entry), nil
	}
	fields, err := redis.ByteSlices(redis.DoWithTimeout(conn, bodyTimeout, "HMGET", key, "id", "header", "body"))
	if err != nil || fields[0] == nil { // deleted meanwhile
		return nil, err
	}
	e := &entry{body: fields[2]}
	if json.Unmarshal(fields[1], &e.header) != nil || etag(e.body) != e.header.Get("ETag") {
		return nil, redis.Error(key + " does not hold a page")
	}
	c.kept.Store(key, e)
	return e, nil
}

// Part 4: the session
//
// Rule 3: an instance that owes Redis an invalidation pays before it reads Redis again. Otherwise:
//
//  1. Redis hangs: a writer commits, and its invalidation is lost
//  2. Redis recovers, still with the old page, and serves it for 15 minutes
//
// A session is a time with one Redis and without an error. Any error ends it, and then reads and writes alike bypass
// Redis, until beat starts the next one: after an invalidation, if one is owed. It is owed when
//
//   - an invalidation failed, or was skipped in a bypass
//   - Redis has another history than before: it restarted, became a replica or was promoted; or the program restarted
//   - Redis refused a command, or held a value that this program did not store: a redis.Error
//
// but not after an error of the connection alone, because an instance with a bad line must not empty the cache of the
// others. (A look-up under way when a session ends may still hit: it began before the next write was answered.)

// dial connects to Redis and asks for its history.
func (c *cache) dial(known string) (conn redis.Conn, history string, err error) {
	conn, err = redis.DialURL(c.url, redis.DialConnectTimeout(redisTimeout), redis.DialTLSHandshakeTimeout(redisTimeout),
		redis.DialReadTimeout(redisTimeout), redis.DialWriteTimeout(bodyTimeout))
	if err == nil {
		if history, err = askHistory(conn, redisTimeout, known); err != nil {
			conn.Close()
		}
	}
	return conn, history, err
}

// askHistory returns what changes whenever Redis may hold other data. It fails if known is set and differs.
func askHistory(conn redis.Conn, timeout time.Duration, known string) (string, error) {
	info, err := redis.String(redis.DoWithTimeout(conn, timeout, "INFO"))
	history := infoField(info, "run_id") + infoField(info, "role") + infoField(info, "master_replid") // process, role, replication
	if err == nil && infoField(info, "run_id") == "" {
		err = redis.Error("INFO has no run_id, so a restart of Redis would go unnoticed")
	} else if err == nil && known != "" && known != history {
		err = redis.Error("Redis restarted, became a replica or was promoted: it may hold outdated data")
	}
	return history, err
}

// infoField finds a field in a reply to INFO; "" if it isn't there.
func infoField(info, name string) string {
	_, rest, _ := strings.Cut("\r\n"+info, "\r\n"+name+":")
	value, _, _ := strings.Cut(rest, "\r\n")
	return value
}

// run calls beat until ctx is done, and then closes the connections.
func (c *cache) run(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(beatInterval):
			c.beat()
		}
	}
	if pool := c.session.Swap(nil); pool != nil {
		pool.Close()
	}
}

// beat starts a session if there is none, and else ends one whose Redis has another history by now.
func (c *cache) beat() {
	pool := c.session.Load()
	if pool == nil {
		c.start()
		return
	}
	conn := pool.Get()
	defer conn.Close()
	if _, err := askHistory(conn, bodyTimeout, c.history); err != nil { // nobody waits for it: let it take its time
		c.end(pool, conn, err)
	}
}

// start starts a session, after it has paid what is owed. (Writes wait meanwhile, for twice redisTimeout at most.)
func (c *cache) start() {
	conn, history, err := c.dial("")
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		defer conn.Close()
		c.owes = c.owes || history != c.history
		if c.owes {
			_, err = invalidateOnce(conn, rand.Text())
		}
	}
	if err != nil {
		c.bypass(err)
		return
	}
	slog.Info("cache: Redis is in use", "invalidated", c.owes)
	c.owes, c.history = false, history
	c.bypassed.set("", "", nil)
	// Each key has one look-up at a time, and beat, an invalidation and the metrics take one connection each: about 6. The
	// pool closes those idle for 0.5 s, because Redis might: its own limit is never under 1 s.
	c.session.Store(&redis.Pool{MaxActive: 16, MaxIdle: 8, IdleTimeout: 2 * beatInterval, Dial: func() (redis.Conn, error) {
		conn, _, err := c.dial(history)
		return conn, err
	}})
}

// end ends pool's session because of err on conn. It does nothing if that session is over.
func (c *cache) end(pool *redis.Pool, conn redis.Conn, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session.Load() == pool {
		c.owes = c.owes || conn.Err() == nil // the connection is fine, so Redis refused a command, or its data are wrong
		c.bypass(err)
	}
}

// bypass closes the session, if there is one, and notes and logs why. The caller holds mu.
func (c *cache) bypass(err error) {
	if pool := c.session.Swap(nil); pool != nil {
		pool.Close()
	}
	why := noAnswer
	if refusal, ok := errors.AsType[redis.Error](err); ok {
		why = string(refusal)
	}
	c.bypassed.set("cache: Redis is bypassed", why, err)
}

// A reason is why something doesn't work, or "".
type reason struct{ atomic.Value }

func (r *reason) get() string { why, _ := r.Load().(string); return why }

// set notes a reason, and logs what doesn't work if the reason is new; "" clears it.
func (r *reason) set(what, why string, err error) {
	if before := r.Swap(why); why != "" && why != before {
		slog.Warn(what, "why", why, "err", err)
	}
}

// invalidate deletes the entries of both levels, once for each transaction. A write's own signal and each instance's
// announcement all call it: the first does the work, and the rest find it done, so they discard no later fill.
func (c *cache) invalidate(transaction string) {
	c.mu.Lock() // until Redis has the invalidation, or is owed it
	defer c.mu.Unlock()
	pool := c.session.Load()
	if pool == nil {
		if !c.owes {
			slog.Info("cache: Redis is bypassed, and owed an invalidation", "transaction", transaction)
		}
		c.owes = true
		return
	}
	conn := pool.Get()
	defer conn.Close()
	if first, err := invalidateOnce(conn, transaction); err != nil {
		c.owes = true
		c.bypass(err)
	} else if first {
		slog.Info("cache: invalidated", "transaction", transaction)
	}
}

// invalidation remembers a transaction for a minute, changes the fence and deletes both levels, all at once.
var invalidation = redis.NewScript(5, `
if not redis.call('SET', KEYS[1], '', 'NX', 'EX', 60) then return 0 end
redis.call('SET', KEYS[2], ARGV[1]) -- INCR would fail if somebody put another type there
redis.call('DEL', KEYS[3], KEYS[4], KEYS[5])
return 1`)

// invalidateOnce reports whether it was the first to invalidate for the transaction.
func invalidateOnce(conn redis.Conn, transaction string) (first bool, err error) {
	return redis.Bool(invalidation.Do(conn, "properties:invalidated:"+transaction, fenceKey,
		allPropertiesKey, pageKey(propertiesPath), gzipKey(propertiesPath), rand.Text()))
}

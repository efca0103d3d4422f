// cache.go: two levels of cache in Redis, and the rules that keep them right. Django: utils.py, @cache_page,
// django.core.cache.
//
//	GET /properties/ → page:/properties/ (15 minutes) → all_properties (1 hour) → PostgreSQL
//
// A cache that serves what is no longer so has lied. Three rules prevent that:
//
//  1. A fill loses to a write: see lookUp.
//  2. Nobody gets an answer whose reading began before they asked: see coalescer.
//  3. Redis is trusted only after an invalidation has succeeded since its last error: see session.

package main

import (
	"bytes"
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
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	allPropertiesKey = "all_properties"
	allPropertiesTTL = time.Hour

	// fenceKey holds a new value after every invalidation. It has no TTL; if Redis evicts it, that counts
	// as a change to it, and at most a fill is lost.
	fenceKey = "properties:fence"

	// redisTimeout bounds each connect, read and write. Redis answers in well under a millisecond, and a
	// hung one holds up the requests in flight this long, once. Much less would take a busy processor for
	// a hung Redis; with this, 500 steady clients on 2 cores never cost the trust.
	redisTimeout = 250 * time.Millisecond

	healEvery = 250 * time.Millisecond // hits may stay away this long after Redis is back
)

// pageKey is where the answer to GET path is stored, and its gzip form beside it.
func pageKey(path string, gzipped bool) string {
	if gzipped {
		return "page:" + path + ":gzip"
	}
	return "page:" + path
}

// cache is Redis with its two levels.
type cache struct {
	url     string
	query   func(context.Context) ([]property, error)
	session atomic.Pointer[session] // nil at first and after an error: Redis is bypassed

	lists  level[[]byte]
	pages  level[*page]
	inHand sync.Map // page key → the *page last seen there, used only if Redis has its ETag
}

// newCache is a cache that bypasses Redis until heal, which run calls, has reached it.
func newCache(url string, query func(context.Context) ([]property, error)) *cache {
	c := &cache{url: url, query: query}
	c.lists = level[[]byte]{cache: c, find: findList, store: storeList}
	c.pages = level[*page]{cache: c, find: c.findPage, store: c.storePage}
	return c
}

// A session is a time with one Redis process and without an error. Rule 3: it starts with an invalidation, and
// is trusted from then on, until its first error.
//
// For an error may mean that an invalidation was lost, or that Redis came back with old data. So reads and
// writes alike bypass Redis until the next session has started. That one mechanism covers a Redis that is
// down at start, dies, hangs, loses a DEL or holds garbage, and a program that crashed between its commit
// and its DEL, since it begins without a session.
type session struct {
	*redis.Pool
	started atomic.Bool
}

func (s *session) trusted() bool { return s != nil && s.started.Load() }

// newSession dials with timeouts (redigo's own are 30 s, or none) and stays with the process that it met first.
//
// A pool dials anew without telling, and a Redis that restarted may have loaded an old snapshot: such a
// connection is refused, so that it counts as an error like any other. TestOnBorrow would hide the error.
func (c *cache) newSession() *session {
	var meet sync.Once
	var met string // the run_id of the process
	dial := func() (redis.Conn, error) {
		conn, err := redis.DialURL(c.url, redis.DialConnectTimeout(redisTimeout), redis.DialReadTimeout(redisTimeout),
			redis.DialWriteTimeout(redisTimeout), redis.DialTLSHandshakeTimeout(redisTimeout))
		if err != nil {
			return nil, err
		}
		info, err := redis.String(conn.Do("INFO", "server"))
		if err != nil {
			conn.Close()
			return nil, err
		}
		id := infoField(info, "run_id")
		meet.Do(func() { met = id })
		if id != met {
			conn.Close()
			return nil, errors.New("redis has restarted")
		}
		return conn, nil
	}
	// MaxIdle: one for each of 16 writers, as many as PostgreSQL is asked to serve.
	return &session{Pool: &redis.Pool{Dial: dial, MaxIdle: 16}}
}

// infoField finds a field in a reply to INFO; "" if it isn't there.
func infoField(info, name string) string {
	_, rest, _ := strings.Cut("\r\n"+info, "\r\n"+name+":")
	value, _, _ := strings.Cut(rest, "\r\n")
	return value
}

// run heals the cache whenever Redis is bypassed, until ctx is done, and then closes it.
func (c *cache) run(ctx context.Context) {
	for ctx.Err() == nil {
		if c.session.Load() == nil {
			c.heal() // what went wrong is in the log since trust was lost
		}
		select {
		case <-ctx.Done():
		case <-time.After(healEvery):
		}
	}
	if s := c.session.Swap(nil); s != nil {
		s.Close()
	}
}

// heal starts a session.
func (c *cache) heal() error {
	s := c.newSession()
	conn := s.Get()
	defer conn.Close()
	if conn.Err() != nil {
		return conn.Err()
	}
	c.session.Store(s) // before the invalidation: see invalidate
	if err := sendInvalidation(conn); err != nil {
		c.end(s, err)
		return err
	}
	s.started.Store(true)
	slog.Info("cache: trusted")
	return nil
}

// end ends a session, which may have ended before.
func (c *cache) end(s *session, err error) {
	if c.session.CompareAndSwap(s, nil) && s.trusted() {
		slog.Warn("cache: trust lost, bypassing Redis", "err", err)
	}
	s.Close()
}

var errBypassed = errors.New("cache: Redis is bypassed")

// do runs f on a connection of the session, or returns errBypassed. An error of f ends the session.
func (c *cache) do(f func(redis.Conn) error) error {
	s := c.session.Load()
	if s == nil {
		return errBypassed
	}
	conn := s.Get()
	defer conn.Close()
	err := f(conn)
	if err != nil {
		c.end(s, err)
	}
	return err
}

// invalidate makes both levels forget, before the write that calls for it is answered.
//
// While Redis is bypassed, a write doesn't wait for it: the next session is yet to start, with an invalidation
// that comes after this write's commit. If one is just starting, its own may have come before the commit, so
// the write sends another.
func (c *cache) invalidate() error {
	err := c.do(sendInvalidation)
	if errors.Is(err, errBypassed) {
		return nil
	}
	return err
}

// sendInvalidation changes the fence and deletes both levels in one transaction. The fence is SET to
// something new and not INCRed: INCR fails on a wrong type, and EXEC would succeed all the same.
func sendInvalidation(conn redis.Conn) error {
	conn.Send("MULTI")
	conn.Send("SET", fenceKey, rand.Text())
	conn.Send("DEL", allPropertiesKey, pageKey(propertiesPath, false), pageKey(propertiesPath, true))
	_, err := execMulti(conn)
	return err
}

// execMulti runs what was sent since MULTI and tells whether it took effect: not if a watched key has changed.
func execMulti(conn redis.Conn) (done bool, err error) {
	replies, err := redis.Values(conn.Do("EXEC"))
	if errors.Is(err, redis.ErrNil) {
		return false, nil
	}
	for _, reply := range replies { // EXEC succeeds even if its commands fail
		if failed, ok := reply.(redis.Error); ok && err == nil {
			err = failed
		}
	}
	return err == nil, err
}

// A level is one of the two caches: how its values lie in Redis, and what became of its requests.
type level[T any] struct {
	cache *cache
	find  func(conn redis.Conn, key string) (value T, found bool, err error)
	store func(conn redis.Conn, key string, value T, ttl time.Duration) (bytes int) // Sends, after MULTI
	loads coalescer[answer[T]]

	requests  [outcomes]atomic.Int64 // by how they were answered
	coalesced atomic.Int64           // those of them that shared a look-up which another one had asked for
}

// An answer is what a level has for a key, and how it came by it.
type answer[T any] struct {
	value   T
	outcome outcome
	stored  bool // by this look-up
}

type outcome int

const (
	unanswered outcome = iota // the client left, or the load took too long or panicked
	hit                       // Redis had it
	miss                      // Redis was asked and did not have it
	bypassed                  // Redis was not trusted, or failed
	outcomes
)

// getOrSet answers with the value at key, or else with what load returns, which it stores for ttl. What load
// returns with an error is passed on with it, and not stored. Django: cache.get_or_set.
func (l *level[T]) getOrSet(ctx context.Context, key string, ttl time.Duration, load func(context.Context) (T, error)) (answer[T], error) {
	a, shared, err := l.loads.do(ctx, key, func(ctx context.Context) (answer[T], error) {
		return l.lookUp(ctx, key, ttl, load)
	})
	l.requests[a.outcome].Add(1)
	if shared && a.outcome != unanswered {
		l.coalesced.Add(1)
	}
	return a, err
}

// lookUp is getOrSet on behalf of everyone who waits for key.
//
// Rule 1, a fill loses to a write, is the order of WATCH, load and EXEC. Without it, a late fill would undo
// an invalidation:
//
//  1. reader: miss, reads the old rows
//  2. writer: commits the new row, deletes the key
//  3. reader: stores the old rows, for an hour
//
// With it, step 2 changes the fence that the reader has watched since before it read the rows, and step 3
// does nothing. (To watch the key itself would not do: deleting a key that isn't there changes nothing.)
func (l *level[T]) lookUp(ctx context.Context, key string, ttl time.Duration, load func(context.Context) (T, error)) (a answer[T], err error) {
	a.outcome = bypassed
	var conn redis.Conn
	s := l.cache.session.Load()
	if s.trusted() {
		conn = s.Get()
		defer conn.Close() // undoes WATCH
		var found bool
		if a.value, found, err = l.find(conn, key); found {
			a.outcome = hit
			return a, nil
		}
		if err == nil {
			_, err = conn.Do("WATCH", fenceKey)
		}
		if err == nil {
			a.outcome = miss
		} else {
			l.cache.end(s, err)
		}
	}
	start := time.Now()
	if a.value, err = load(ctx); err != nil || a.outcome == bypassed {
		return a, err
	}
	if s != l.cache.session.Load() { // a write may have come that couldn't tell Redis: others would get the old rows
		return a, nil
	}
	conn.Send("MULTI")
	bytes := l.store(conn, key, a.value, ttl)
	if a.stored, err = execMulti(conn); err != nil {
		l.cache.end(s, err)
	}
	slog.Info("cache: filled", "key", key, "bytes", bytes, "took", time.Since(start), "stored", a.stored)
	return a, nil
}

// A coalescer runs at most one load for each key at a time. The zero value works.
//
// Rule 2: a load is open to whoever asks until it begins; who asks while it runs shares the next one. To
// share the running one, as single-flight does, would break the promise to writers:
//
//  1. reader A's load reads the old rows
//  2. a writer commits, invalidates, and has its answer
//  3. reader B asks, joins A's load, and gets the old rows
type coalescer[T any] struct {
	mu   sync.Mutex          // guards last, and begun of its calls
	last map[string]*call[T] // the call that came last, until it has ended: it runs, or waits for the one that does
}

// A call is one run of a load, and what it returned.
type call[T any] struct {
	begun bool
	done  chan struct{} // closed when value and err are there
	value T
	err   error
}

// do returns what a load of key returns that begins after this call: run, or the run of another caller. It
// stops waiting when ctx is done, or after answerWithin; the load goes on, for it isn't this caller's alone.
func (c *coalescer[T]) do(ctx context.Context, key string, run func(context.Context) (T, error)) (value T, shared bool, err error) {
	c.mu.Lock()
	l := c.last[key]
	shared = l != nil && !l.begun
	if !shared {
		before := l
		l = &call[T]{done: make(chan struct{})}
		if c.last == nil {
			c.last = map[string]*call[T]{}
		}
		c.last[key] = l
		go c.start(key, l, before, run)
	}
	c.mu.Unlock()
	select {
	case <-l.done:
		return l.value, shared, l.err
	case <-ctx.Done():
		return value, shared, ctx.Err()
	case <-time.After(answerWithin):
		return value, shared, context.DeadlineExceeded
	}
}

// start waits for the call before l, closes l to newcomers, runs it under a deadline of its own, and wakes
// who waits for it. A panic becomes l's error.
func (c *coalescer[T]) start(key string, l, before *call[T], run func(context.Context) (T, error)) {
	if before != nil {
		<-before.done
	}
	runtime.Gosched() // let those join who are about to: under load it halves the look-ups
	c.mu.Lock()
	l.begun = true
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), answerWithin)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			l.err = panicked(p)
		}
		c.mu.Lock()
		if c.last[key] == l {
			delete(c.last, key)
		}
		c.mu.Unlock()
		close(l.done)
	}()
	l.value, l.err = run(ctx)
}

// getAllProperties returns all properties as a JSON array, from all_properties or PostgreSQL. (Bytes, since
// its caller only passes them on: to decode 10,000 properties takes longer than to query them.)
func (c *cache) getAllProperties(ctx context.Context) ([]byte, error) {
	a, err := c.lists.getOrSet(ctx, allPropertiesKey, allPropertiesTTL, func(ctx context.Context) ([]byte, error) {
		list, err := c.query(ctx)
		if err != nil {
			return nil, err
		}
		return encode(list), nil
	})
	return a.value, err
}

func findList(conn redis.Conn, key string) (list []byte, found bool, err error) {
	list, err = redis.Bytes(conn.Do("GET", key))
	if errors.Is(err, redis.ErrNil) {
		return nil, false, nil
	}
	if err == nil && !(bytes.HasPrefix(list, []byte("[")) && json.Valid(list)) {
		err = fmt.Errorf("%s does not hold a JSON array", key)
	}
	return list, err == nil, err
}

func storeList(conn redis.Conn, key string, list []byte, ttl time.Duration) int {
	conn.Send("SET", key, list, "EX", int(ttl.Seconds()))
	return len(list)
}

// A page is a view's answer. It is the http.ResponseWriter that the view writes to, too.
type page struct {
	status   int
	header   http.Header // a cacheable page's has the ETag of body
	body     []byte
	storedAt time.Time // from when its age counts; in Redis, in whole seconds
}

func (p *page) Header() http.Header { return p.header }

func (p *page) WriteHeader(status int) {
	if p.status == 0 {
		p.status = status
	}
}

func (p *page) Write(b []byte) (int, error) {
	p.WriteHeader(http.StatusOK)
	p.body = append(p.body, b...)
	return len(b), nil
}

// errUncacheable comes with a page that is for those who asked, and not for Redis.
var errUncacheable = errors.New("not a cacheable page")

// cachePage wraps a view so that its answer to GET comes from Redis for ttl. Django: @cache_page(60 * 15).
//
// The view gets a request that has nothing but the path: no query, no headers, no body. What it can't see
// it can't depend on, so the path alone makes the key, and nobody can fill Redis with /properties/?x=1,
// ?x=2, … or have their own variant stored for others. (Django makes the key of the whole URL and whatever
// headers Vary names.) Only gzip is chosen by a header, and by us.
func (c *cache) cachePage(ttl time.Duration, v view) view {
	return func(w http.ResponseWriter, r *http.Request) error {
		path, gzipped := r.URL.Path, acceptsGzip(r.Header)
		a, err := c.pages.getOrSet(r.Context(), pageKey(path, gzipped), ttl, func(ctx context.Context) (*page, error) {
			return render(ctx, v, path, gzipped)
		})
		if err != nil && !errors.Is(err, errUncacheable) {
			return err
		}
		serve(w, r, a, ttl)
		return nil
	}
}

// render has v answer a GET of path. Only a 200 without Set-Cookie is cacheable, and nothing of what v wrote
// before it failed.
func render(ctx context.Context, v view, path string, gzipped bool) (*page, error) {
	p := &page{header: http.Header{}}
	r := &http.Request{Method: http.MethodGet, URL: &url.URL{Path: path}, Header: http.Header{}, Body: http.NoBody}
	if err := v(p, r.WithContext(ctx)); err != nil {
		return nil, err
	}
	p.WriteHeader(http.StatusOK) // as net/http does for a view that wrote nothing
	if p.status != http.StatusOK || p.header["Set-Cookie"] != nil {
		return p, errUncacheable
	}
	if gzipped {
		p.header.Set("Content-Encoding", "gzip")
		p.body = compress(p.body)
	}
	p.header.Set("Content-Length", strconv.Itoa(len(p.body)))
	p.header.Set("ETag", etag(p.body))
	p.header.Set("Vary", "Accept-Encoding")
	// A browser may keep its copy but must ask before it uses it. (Django sends max-age=900, and nothing
	// that a server does can call such a copy back.)
	p.header.Set("Cache-Control", "no-cache")
	p.storedAt = time.Now()
	return p, nil
}

func compress(b []byte) []byte {
	var compressed bytes.Buffer
	w := gzip.NewWriter(&compressed)
	w.Write(b) // a Buffer doesn't fail
	w.Close()
	return compressed.Bytes()
}

// etag is a strong validator (RFC 9110 §8.8.3): other bytes, other tag.
func etag(body []byte) string {
	sum := sha256.Sum256(body)
	return `"` + base64.RawURLEncoding.EncodeToString(sum[:16]) + `"` // 128 bits tell any two bodies apart
}

// storePage keeps a page as a hash. It is in hand before EXEC; that does no harm, since only the ETag that
// Redis names makes it an answer.
func (c *cache) storePage(conn redis.Conn, key string, p *page, ttl time.Duration) int {
	conn.Send("HSET", key, "etag", p.header.Get("ETag"), "stored", p.storedAt.Unix(), "header", encode(p.header), "body", p.body)
	conn.Send("EXPIRE", key, int(ttl.Seconds()))
	c.inHand.Store(key, p)
	return len(p.body)
}

// findPage asks Redis for the ETag, and for the page only if it has another one than the page in hand: as
// If-None-Match does for a browser. What is fresh is still for Redis to say; the body (2.7 MB for 10,000
// listings) just needn't travel for it.
func (c *cache) findPage(conn redis.Conn, key string) (*page, bool, error) {
	fields, err := redis.ByteSlices(conn.Do("HMGET", key, "etag", "stored"))
	if err != nil || fields[0] == nil {
		return nil, false, err
	}
	p := page{status: http.StatusOK}
	if held, ok := c.inHand.Load(key); ok && held.(*page).header.Get("ETag") == string(fields[0]) {
		p = *held.(*page)
	} else {
		fields, err = redis.ByteSlices(conn.Do("HMGET", key, "etag", "stored", "header", "body"))
		if err != nil || fields[0] == nil {
			return nil, false, err
		}
		p.body = fields[3]
		if err := json.Unmarshal(fields[2], &p.header); err != nil || etag(p.body) != p.header.Get("ETag") {
			return nil, false, fmt.Errorf("%s does not hold a page", key)
		}
		c.inHand.Store(key, &p)
	}
	seconds, err := strconv.ParseInt(string(fields[1]), 10, 64)
	if err != nil {
		return nil, false, fmt.Errorf("%s does not say when it was stored", key)
	}
	p.storedAt = time.Unix(seconds, 0)
	return &p, true, nil
}

// serve writes a page and says in Cache-Status (RFC 9211) where it came from.
func serve(w http.ResponseWriter, r *http.Request, a answer[*page], ttl time.Duration) {
	p, h := a.value, w.Header()
	maps.Copy(h, p.header)
	status := "redis; fwd=uri-miss"
	switch {
	case a.outcome == bypassed:
		status = "redis; fwd=bypass; detail=untrusted"
	case a.outcome == hit:
		age := max(0, time.Since(p.storedAt))
		h.Set("Age", strconv.Itoa(int(age.Seconds())))
		status = "redis; hit; ttl=" + strconv.Itoa(int(max(0, ttl-age).Seconds()))
	case a.stored:
		status += "; stored"
	}
	h.Set("Cache-Status", status)
	if tags := r.Header["If-None-Match"]; len(tags) > 0 && p.status == http.StatusOK && p.header.Get("ETag") != "" {
		// ServeContent knows lists, weak tags and *. It gets to see no Range and no If-Match, which it
		// would answer too. Without a condition Write is faster: ServeContent copies in small pieces.
		conditional := &http.Request{Method: r.Method, Header: http.Header{"If-None-Match": {strings.Join(tags, ",")}}}
		http.ServeContent(w, conditional, "", time.Time{}, bytes.NewReader(p.body))
		return
	}
	w.WriteHeader(p.status)
	w.Write(p.body)
}

// acceptsGzip tells whether Accept-Encoding allows gzip and likes it no less than the plain form (RFC 9110
// §12.5.3).
func acceptsGzip(h http.Header) bool {
	quality := map[string]float64{} // of each coding named
	for coding := range strings.SplitSeq(strings.Join(h["Accept-Encoding"], ","), ",") {
		name, weight, weighted := strings.Cut(strings.ToLower(coding), ";")
		q := 1.0
		if weighted {
			q, _ = strconv.ParseFloat(strings.TrimPrefix(strings.TrimSpace(weight), "q="), 64) // 0 if it is no number
		}
		quality[strings.TrimSpace(name)] = q
	}
	q, named := quality["gzip"]
	if !named {
		q = quality["*"]
	}
	return q > 0 && q >= quality["identity"]
}

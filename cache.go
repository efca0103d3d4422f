// cache.go: two levels of cache in Redis. Django: utils.py, @cache_page, django.core.cache.
//
//	GET /properties/ → page:/properties/ (15 minutes) → all_properties (1 hour) → PostgreSQL
//
// Four rules keep stale data from the client. Next call, snapshot and fence are the parts 2 to
// 4 of this file, in this order; announcement is in signals.go.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/textproto"
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

// Part 1: levels, slots and pages

// A cache is Redis with its two levels, and what this instance knows of PostgreSQL.
type cache struct {
	link         link
	pages, lists level
	// slots are all keys. Each is added before the program serves.
	slots []*slot
	list  *slot

	known         known
	reserved      *sql.DB // where a floor is asked for
	floors        group[snapshot]
	invalidations group[bool]
}

// A level is one of the two caches.
type level struct {
	mu     sync.Mutex // guards counts
	counts levelMetrics
}

// A slot is a key: what is stored there, for how long, and the view that it is loaded from.
type slot struct {
	cache  *cache
	level  *level
	key    string
	ttl    time.Duration
	path   string // what the view is asked for
	view   view
	zipped bool
	calls  group[result]
	// kept is the entry last seen at the key. It is used only while Redis has the same head.
	kept atomic.Pointer[entry]
}

// A result is an entry, and how it was found.
type result struct {
	*entry
	outcome string
}

// The outcomes of a look-up are the words of Cache-Status (RFC 9211). A fill adds "; stored".
const (
	hit    = "hit"
	miss   = "uri-miss" // Redis has no entry
	stale  = "stale"    // Redis has an entry that has not seen all, or garbage
	bypass = "bypass"   // Redis was not asked, or did not answer
)

// newCache returns a cache that bypasses Redis until its link is connected.
func newCache(redisURL *url.URL, p *properties, reserved *sql.DB) *cache {
	// Besides one for each slot: one for an invalidation, and three more, for INFO.
	c := &cache{reserved: reserved, link: link{url: redisURL, connections: 4}}
	c.link.session.Store(&session{})
	c.list = c.addSlot(&slot{
		level: &c.lists,
		key:   "all_properties",
		ttl:   time.Hour,
		view:  p.allView,
	})
	return c
}

// addSlot adds a key, with its connection to Redis.
func (c *cache) addSlot(s *slot) *slot {
	s.cache = c
	c.slots = append(c.slots, s)
	// One call of each slot runs at a time.
	c.link.connections++
	return s
}

// getAllProperties returns all properties as a JSON array, from all_properties or PostgreSQL.
// (Decoding 10,000 of them takes longer than the query, so nobody does that.)
func (c *cache) getAllProperties() (*entry, error) {
	r, err := c.list.get()
	return r.entry, err
}

// cachePage wraps a view, so that its answer to GET path comes from Redis for ttl. (path ends in a
// slash and has no wildcard; ttl has whole seconds.) Every write invalidates it. Django:
// @cache_page(60 * 15). It also returns the pattern for ServeMux, which takes no pattern twice, so
// no two pages share a key.
//
// The view must set the header Snapshot to what its data has seen: that of getAllProperties, as
// listView does, or one that it has asked for before its rows, as allView does. It gets nothing of
// the client's request. A later version of the program takes its entries: see docs/operations.md.
func (c *cache) cachePage(path string, ttl time.Duration, v view) (pattern string, page view) {
	form := func(key string, zipped bool) *slot {
		return c.addSlot(&slot{
			level:  &c.pages,
			key:    key,
			ttl:    ttl,
			path:   path,
			view:   v,
			zipped: zipped,
		})
	}
	plain, zipped := form("page:"+path, false), form("page:"+path+":gzip", true)
	return "GET " + path + "{$}", func(w http.ResponseWriter, r *http.Request) error {
		s := plain
		if acceptsGzip(r.Header) {
			s = zipped
		}
		found, err := s.get()
		if err != nil {
			return err
		}
		writePage(w, r, found, ttl)
		return nil
	}
}

// writePage writes a page, and says in Cache-Status where it came from.
func writePage(w http.ResponseWriter, r *http.Request, page result, ttl time.Duration) {
	h := w.Header()
	maps.Copy(h, page.header)
	h.Del("Snapshot")
	status := "redis; fwd=" + page.outcome
	if page.outcome == hit {
		stored, _ := http.ParseTime(h.Get("Date"))
		// The clock of the instance that stored it may be ahead.
		age := max(0, int(time.Since(stored).Seconds()))
		h.Set("Age", strconv.Itoa(age))
		status = fmt.Sprintf("redis; hit; ttl=%d", max(0, int(ttl.Seconds())-age))
	}
	h.Set("Cache-Status", status)
	if namesTag(r.Header["If-None-Match"], h.Get("ETag")) {
		// net/http removes Content-Type and Content-Length.
		h.Del("Content-Encoding")
		w.WriteHeader(304)
		return
	}
	w.Write(page.body)
}

// namesTag reports whether If-None-Match names the tag, by weak comparison (RFC 9110 §13.1.2).
func namesTag(ifNoneMatch []string, tag string) bool {
	names := strings.Join(ifNoneMatch, ",")
	for name := range strings.SplitSeq(names, ",") {
		if strings.TrimPrefix(strings.TrimSpace(name), "W/") == tag {
			return true
		}
	}
	return strings.TrimSpace(names) == "*"
}

// acceptsGzip reports whether the client accepts gzip (RFC 9110 §12.5.3): it is named, or else *
// is, and its quality isn't 0.
func acceptsGzip(h http.Header) bool {
	codings := strings.ToLower(strings.Join(h["Accept-Encoding"], ","))
	accepts := map[string]bool{}
	for coding := range strings.SplitSeq(strings.ReplaceAll(codings, " ", ""), ",") {
		name, quality, weighted := strings.Cut(coding, ";q=")
		accepts[name] = !weighted || strings.Trim(quality, "0.") != ""
	}
	accepted, named := accepts["gzip"]
	return accepted || !named && accepts["*"]
}

// load has the slot's view answer, and makes an entry of that. The view sees nothing of the
// client's request, so nobody can fill Redis with ?x=1, ?x=2, … or have their own variant stored
// for others. (Django's key has the whole URL, and the headers that Vary names.)
func (s *slot) load(ctx context.Context) (*entry, error) {
	r, err := http.NewRequestWithContext(ctx, "GET", s.path, http.NoBody)
	if err != nil {
		return nil, err
	}
	a := &answer{header: http.Header{}}
	if err := s.view(a, r); err != nil {
		return nil, err
	}
	// An entry is for everybody.
	if a.status != 0 && a.status != 200 || a.header["Set-Cookie"] != nil {
		return nil, fmt.Errorf("%w: %s can't be cached: its view answered %d with the headers %v",
			errInternal, s.key, a.status, a.header)
	}
	if s.zipped {
		plain := a.Buffer
		a.Buffer = bytes.Buffer{}
		// Neither fails, because a Buffer doesn't.
		z := gzip.NewWriter(a)
		plain.WriteTo(z)
		z.Close()
		a.header.Set("Content-Encoding", "gzip")
	}
	a.header.Set("Content-Length", strconv.Itoa(a.Len()))
	a.header.Set("Vary", "Accept-Encoding")
	return a.seal()
}

// An answer is what a cached view writes.
type answer struct {
	status int // 0 is as good as 200
	header http.Header
	bytes.Buffer
}

func (a *answer) Header() http.Header { return a.header }

// WriteHeader takes the first status only, as net/http does.
func (a *answer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
}

// An entry is what a slot stores: an HTTP message, which is a head of header lines, a blank line,
// and a body.
type entry struct {
	message    []byte
	head, body []byte // its two parts
	header     http.Header
	snapshot   snapshot
}

// maxHead is how long a head may be, in bytes, and how much of an entry a look-up reads at first.
const maxHead = 4 << 10

// seal makes the entry. Its head begins with what a later reader judges it by.
func (a *answer) seal() (*entry, error) {
	var message bytes.Buffer
	fmt.Fprintf(&message, "Snapshot: %s\r\nDate: %s\r\nETag: %s\r\n", a.header.Get("Snapshot"),
		time.Now().UTC().Format(http.TimeFormat), etag(a.Bytes()))
	a.header.WriteSubset(&message, map[string]bool{"Snapshot": true, "Date": true, "Etag": true})
	message.WriteString("\r\n")
	message.Write(a.Bytes())
	e, err := parseEntry(message.Bytes())
	if err != nil {
		return nil, fmt.Errorf("%w: a cached view must set Snapshot: %w", errInternal, err)
	}
	return e, nil
}

// parseEntry reads an entry. Its head must be complete; its body is judged by its ETag.
func parseEntry(message []byte) (*entry, error) {
	lines := textproto.NewReader(bufio.NewReader(bytes.NewReader(message)))
	header, err := lines.ReadMIMEHeader()
	if err != nil {
		return nil, err
	}
	head, body, _ := bytes.Cut(message, []byte("\r\n\r\n"))
	e := &entry{message: message, head: head, body: body, header: http.Header(header)}
	return e, json.Unmarshal([]byte(e.header.Get("Snapshot")), &e.snapshot)
}

// etag is a strong validator (RFC 9110 §8.8.3): 128 bits tell any two bodies apart.
func etag(body []byte) string {
	sum := sha256.Sum256(body)
	return fmt.Sprintf(`"%x"`, sum[:16])
}

// Part 2: next call
//
// A caller never gets a look-up that began before it asked. If callers shared the running look-up:
//
//  1. reader A's look-up reads the old rows
//  2. a writer commits, invalidates, and has its answer
//  3. reader B asks, joins A's look-up, and gets the old rows

// answerTimeout is how long a request waits for its call. It suffices for a list that takes 2 s,
// even if nothing can be stored and readers of both forms of the page come at once. Then a page's
// call takes 4 s: it waits for the list's call that runs, and for the list's next one. And a
// request waits for two of the page's calls: the one that runs, and the next one, which is its own.
const answerTimeout = 9 * time.Second

// A group runs one call at a time, and lets callers share the next one. The zero value works.
//
//	A asks  [== call 1 ==]
//	B, C ask    ..........[== call 2 ==]   begins after B and C asked, so they share it
//	D asks                    ..........[== call 3 ==]
//
// So a stampede costs one query: those who come while it runs share one more look-up, a hit.
type group[T any] struct {
	mu      sync.Mutex // guards next
	next    *call[T]   // has not begun: whoever asks now shares it
	running sync.Mutex // held by the call that runs
}

type call[T any] struct {
	value T
	err   error
	done  chan struct{} // closed when value and err are there
}

// do returns what fn returns in a call that begins after now. shared says that somebody else has
// asked for this call first.
//
// It doesn't take the request's context, which ends when the client closes its sending side,
// although that client may still be reading.
func (g *group[T]) do(fn func(context.Context) (T, error)) (value T, shared bool, err error) {
	g.mu.Lock()
	c := g.next
	shared = c != nil
	if !shared {
		c = &call[T]{done: make(chan struct{})}
		g.next = c
		go g.doCall(c, fn)
	}
	g.mu.Unlock()
	select {
	case <-c.done:
		return c.value, shared, c.err
	case <-time.After(answerTimeout):
		return value, shared, context.DeadlineExceeded
	}
}

// doCall waits until no call runs, closes c to newcomers, and runs fn. A panic becomes c's error.
func (g *group[T]) doCall(c *call[T], fn func(context.Context) (T, error)) {
	g.running.Lock()
	defer g.running.Unlock()
	// Those who are about to ask can still share c: 3,200 hits then cost 220 look-ups, not 1,080.
	runtime.Gosched()
	g.mu.Lock()
	g.next = nil
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
	defer cancel()
	defer close(c.done)
	c.err = safely(func() (err error) {
		c.value, err = fn(ctx)
		return err
	})
}

// Part 3: snapshot
//
// An entry must have seen every write that the instance which uses it knows of. Otherwise Redis
// would have to be believed:
//
//  1. a writer commits, and its invalidation is lost, because Redis hangs
//  2. Redis recovers, still with the old page, and serves it for 15 minutes
//
// So an entry says in which snapshot of PostgreSQL its rows were read, and an instance uses it
// only if that snapshot has seen all that the instance knows of. Whatever Redis does, it costs
// one fill.

// A transaction is the name of a write: its id means something only within one run of the server.
type transaction struct {
	server string
	id     uint64
}

// A snapshot is what a read has seen: the transactions below Xmax, but for those that were
// running. It is JSON, as properties_snapshot() in schema.sql returns it. PostgreSQL:
// pg_current_snapshot().
type snapshot struct {
	Server  string
	Xmax    uint64
	Running []uint64
}

// saw reports whether s has seen the transaction.
func (s snapshot) saw(id uint64) bool { return id < s.Xmax && !slices.Contains(s.Running, id) }

// covers reports whether s has seen all that t has.
func (s snapshot) covers(t snapshot) bool {
	return s.Server == t.Server && s.Xmax >= t.Xmax && !slices.ContainsFunc(s.Running, t.saw)
}

// known is what an instance knows to be committed. An entry must have seen all of it.
type known struct {
	mu sync.Mutex // guards the rest; never held while anybody is asked

	// floor is a snapshot that this instance took itself; it has no server if there is none. Only
	// a new floor changes the server, because the name of an old server may come late.
	floor snapshot

	// writes are the ids that were learned of since, all of the floor's server.
	writes []uint64
}

// get returns what there is. Nobody changes the ids of the slice, but learn appends to it.
func (k *known) get() (floor snapshot, writes []uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.floor, k.writes
}

// manyWrites is when a new floor is to take their place. (An own write counts twice, because it is
// announced, too.)
const manyWrites = 100

// learn notes a write. It returns false if a new floor is wanted. Either there is none of the
// write's server, so that the write can't be noted: only a floor that is asked for from now on is
// sure to cover it. (A write in doubt may come later still. Then it is announced.) Or it is noted,
// and it is one of the manyWrites-th, each of which asks for one.
func (k *known) learn(t transaction) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.floor.Server != t.server {
		return false
	}
	k.writes = append(k.writes, t.id)
	return len(k.writes)%manyWrites > 0
}

// raise replaces the floor, and the first writes, which were known when floor was asked for. What
// was learned since then stays, because floor may not have seen it. (If floor is another server's,
// none stays, because all are the old server's.)
func (k *known) raise(floor snapshot, asked int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.floor.Server != floor.Server {
		asked = len(k.writes)
	}
	k.floor = floor
	k.writes = k.writes[asked:]
}

// seenBy reports whether s has seen all. Without a floor, nothing has.
func (k *known) seenBy(s snapshot) bool {
	floor, writes := k.get()
	unseen := func(id uint64) bool { return !s.saw(id) }
	return floor.Server != "" && s.covers(floor) && !slices.ContainsFunc(writes, unseen)
}

// learn notes a write, and takes a new floor where one is wanted. If that fails, so does learn,
// but nothing that lacks the write is a hit all the same.
func (c *cache) learn(t transaction) error {
	if c.known.learn(t) {
		return nil
	}
	err := c.raiseFloor()
	// Without one, it may be possible by now to note it: an earlier call may have brought a floor.
	if err != nil && !c.known.learn(t) {
		// Nobody can tell which entry has seen the write. So this id stands for it, which none has
		// seen. There are no hits until there is a floor that is asked for later.
		floor, _ := c.known.get()
		c.known.learn(transaction{floor.Server, math.MaxUint64})
	}
	return err
}

// raiseFloor takes a new floor: it asks PostgreSQL, once for all who wait, after now.
func (c *cache) raiseFloor() error {
	_, _, err := c.floors.do(func(ctx context.Context) (floor snapshot, err error) {
		// Enough to find the first of two hosts dead, and to connect to the second one.
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		_, writes := c.known.get()
		var text []byte
		err = c.reserved.QueryRowContext(ctx, `SELECT properties_snapshot()`).Scan(&text)
		if err == nil {
			err = json.Unmarshal(text, &floor)
		}
		if err == nil {
			c.known.raise(floor, len(writes))
		}
		return floor, err
	})
	return err
}

// Part 4: fence
//
// A fill loses to a write. This is for a write that another instance has answered, and that this
// one hasn't heard of yet. Otherwise a late fill would undo its invalidation:
//
//  1. reader: misses, and reads the old rows
//  2. writer: commits the new row, deletes the keys, and answers
//  3. reader: stores the old rows, and serves them until it hears of the write
//
// So an invalidation also changes the fence. The reader WATCHes it before it reads the rows, and
// stores with EXEC, which does nothing if the fence has changed since. (WATCH on the entry's key
// would not notice that a missing key is deleted.)

// fenceKey has no TTL. If Redis evicts it, that counts as a change, and a fill is lost.
const fenceKey = "properties:fence"

// get returns the slot's entry, from Redis or loaded anew. Django: cache.get_or_set.
func (s *slot) get() (result, error) {
	r, shared, err := s.calls.do(s.lookUp)
	s.level.mu.Lock()
	defer s.level.mu.Unlock()
	switch r.outcome {
	case hit:
		s.level.counts.Hits++
	case bypass:
		s.level.counts.Bypassed++
	default:
		s.level.counts.Misses++
	}
	if shared {
		s.level.counts.Coalesced++
	}
	return r, err
}

// lookUp is get for all who share the call. Redis counts it as one look-up, or two if it sends a
// body.
func (s *slot) lookUp(ctx context.Context) (result, error) {
	current := s.cache.link.session.Load()
	if current.pool != nil {
		conn := current.pool.Get()
		// This also ends the WATCH.
		defer conn.Close()
		e, outcome, err := s.find(conn)
		if outcome == hit {
			current.proves()
			return result{entry: e, outcome: hit}, nil
		}
		if err == nil {
			_, err = conn.Do("WATCH", fenceKey)
		}
		if err == nil {
			return s.fill(ctx, current, conn, outcome)
		}
		s.cache.link.end(current, err)
	}
	e, err := s.load(ctx)
	return result{entry: e, outcome: bypass}, err
}

// find looks for an entry that has seen all. It reads the head first: where that is the kept
// entry's, the body (2.8 MB for 10,000 listings) needn't travel, as with a browser's
// If-None-Match.
func (s *slot) find(conn redis.Conn) (e *entry, outcome string, err error) {
	start, err := redis.Bytes(conn.Do("GETRANGE", s.key, 0, maxHead-1))
	if refusal, ok := err.(redis.Error); ok && strings.HasPrefix(string(refusal), "WRONGTYPE") {
		return nil, miss, nil
	}
	if err != nil || len(start) == 0 {
		return nil, miss, err
	}
	e = s.kept.Load()
	if e == nil || !bytes.HasPrefix(start, e.head) {
		message, err := redis.Bytes(redis.DoWithTimeout(conn, bodyTimeout, "GET", s.key))
		if err != nil && err != redis.ErrNil {
			return nil, miss, err
		}
		e, err = parseEntry(message)
		if err != nil || etag(e.body) != e.header.Get("ETag") {
			return nil, stale, nil
		}
	}
	if !s.cache.known.seenBy(e.snapshot) {
		return nil, stale, nil
	}
	s.kept.Store(e)
	return e, hit, nil
}

// fill loads the entry and stores it, unless the fence has changed since WATCH.
func (s *slot) fill(ctx context.Context, current *session, conn redis.Conn, outcome string) (
	result, error) {
	began := time.Now()
	e, err := s.load(ctx)
	if err != nil {
		return result{outcome: outcome}, err
	}
	r := result{entry: e, outcome: outcome}
	// It isn't stored if its list of running transactions is too long for a look-up, or if
	// somebody has seen meanwhile that Redis fails.
	if len(e.head) > maxHead || s.cache.link.session.Load() != current {
		return r, nil
	}
	err = execute(conn, bodyTimeout,
		redis.Args{"SET", s.key, e.message, "EX", int(s.ttl.Seconds())})
	if err == redis.ErrNil {
		slog.Info("cache: fill discarded, because a write came", "key", s.key)
		return r, nil
	}
	if err != nil {
		s.cache.link.end(current, err)
		return r, nil
	}
	r.outcome += "; stored"
	s.kept.Store(e)
	current.proves()
	slog.Info("cache: filled", "key", s.key, "fwd", outcome, "bytes", len(e.message),
		"took", time.Since(began))
	return r, nil
}

// invalidate changes the fence and deletes every entry, in a call that begins after now: writers
// who wait share it. In a bypass it does nothing: then the others serve the old rows until they
// hear of the write.
func (c *cache) invalidate() {
	_, _, err := c.invalidations.do(func(context.Context) (bool, error) {
		current := c.link.session.Load()
		if current.pool == nil {
			slog.Info("cache: not invalidated, because Redis is bypassed")
			return false, nil
		}
		conn := current.pool.Get()
		defer conn.Close()
		del := redis.Args{"DEL"}
		for _, s := range c.slots {
			del = append(del, s.key)
		}
		// Not INCR, which would fail if somebody put another type there.
		err := execute(conn, redisTimeout, redis.Args{"SET", fenceKey, rand.Text()}, del)
		if err != nil {
			c.link.end(current, err)
			return false, nil
		}
		slog.Info("cache: invalidated")
		return true, nil
	})
	if err != nil {
		slog.Error("cache: the invalidation failed", "err", err)
	}
}

// execute runs commands in MULTI and EXEC; redis.ErrNil if a WATCHed key has changed.
func execute(conn redis.Conn, timeout time.Duration, commands ...redis.Args) error {
	conn.Send("MULTI")
	for _, command := range commands {
		conn.Send(command[0].(string), command[1:]...)
	}
	replies, err := redis.Values(redis.DoWithTimeout(conn, timeout, "EXEC"))
	if err != nil {
		// If a Send has failed, its error tells more, and the connection has it.
		return cmp.Or(conn.Err(), err)
	}
	// EXEC succeeds even if a command fails.
	for _, reply := range replies {
		if refusal, ok := reply.(redis.Error); ok {
			return refusal
		}
	}
	return nil
}

// Part 5: the link
//
// The bypass is a circuit breaker, nothing more: it keeps a Redis that fails from slowing each
// request.

const (
	// redisTimeout bounds a connect to one address and the reply to a small command: what a hung
	// Redis costs the requests in flight, once. Less would mistake a busy processor for a hung
	// Redis: 500 steady clients on 2 cores never met this.
	redisTimeout = 250 * time.Millisecond

	// bodyTimeout is for what carries a list: 2.8 MB (10,000 listings) at 5 MB/s take half of it.
	bodyTimeout = time.Second

	// The tries of a bypass are firstPause apart, and each time twice as long if nothing came of
	// it.
	firstPause   = 250 * time.Millisecond
	longestPause = 15 * time.Second
)

// A link is the way to Redis. Any error on it ends its session, and so begins a bypass.
type link struct {
	url         *url.URL
	connections int // at most
	session     atomic.Pointer[session]
}

// A session is a time without an error, or else a bypass.
type session struct {
	pool *redis.Pool // nil in a bypass
	// why is the reason of the last bypass, in Redis's or the system's own words; "" before the
	// first.
	why string
	// proven says that it has had a hit or stored an entry. A PING proves too little: a Redis that
	// answers small commands may still refuse large ones, or a right may be missing.
	proven atomic.Bool
}

// proves notes that the session is good for something.
func (s *session) proves() {
	if !s.proven.Swap(true) {
		slog.Info("cache: Redis is in use")
	}
}

// bypassed returns why Redis is bypassed, or "". After a bypass, a session must prove itself
// first, so that a Redis that fails again and again is one steady thing to the log and /healthz.
func (s *session) bypassed() string {
	if s.proven.Load() {
		return ""
	}
	return s.why
}

// end ends a session, or a bypass, because of err, unless it is over.
func (l *link) end(s *session, err error) {
	next := &session{why: cause(err)}
	if !l.session.CompareAndSwap(s, next) {
		return
	}
	if next.why != s.bypassed() {
		slog.Warn("cache: Redis is bypassed", "why", next.why)
	}
	if s.pool != nil {
		s.pool.Close()
	}
}

// connect ends a bypass with the first of Redis's addresses that answers. A slow nameserver may
// take seconds, so no request calls this.
func (l *link) connect(ctx context.Context) {
	before := l.session.Load()
	hosts, err := net.DefaultResolver.LookupHost(ctx, l.url.Hostname())
	for _, host := range hosts {
		pool := l.newPool(net.JoinHostPort(host, l.url.Port()))
		conn := pool.Get()
		_, err = conn.Do("PING")
		conn.Close()
		if err == nil {
			l.session.Store(&session{pool: pool, why: before.why})
			return
		}
		pool.Close()
	}
	l.end(before, err)
}

// newPool connects to one address. (The name in the URL is only for TLS.) It closes a connection
// that was idle for 0.5 s, because Redis may: its own limit is 1 s or more.
func (l *link) newPool(address string) *redis.Pool {
	dial := func(network, _ string) (net.Conn, error) {
		return net.DialTimeout(network, address, redisTimeout)
	}
	return &redis.Pool{
		Dial: func() (redis.Conn, error) {
			return redis.DialURL(l.url.String(),
				redis.DialNetDial(dial),
				redis.DialTLSHandshakeTimeout(redisTimeout),
				redis.DialReadTimeout(redisTimeout),
				redis.DialWriteTimeout(bodyTimeout))
		},
		IdleTimeout: 500 * time.Millisecond,
		MaxIdle:     l.connections,
		MaxActive:   l.connections,
		Wait:        true,
	}
}

// run ends each bypass, until ctx is done. While all is well it sends Redis nothing.
func (l *link) run(ctx context.Context) {
	pause, tried := firstPause, time.Now()
	for ; ctx.Err() == nil; time.Sleep(firstPause) {
		s := l.session.Load()
		if s.proven.Load() {
			pause = firstPause
		}
		if s.pool == nil && time.Since(tried) > pause {
			l.connect(ctx)
			pause, tried = min(2*pause, longestPause), time.Now()
		}
	}
	if pool := l.session.Load().pool; pool != nil {
		pool.Close()
	}
}

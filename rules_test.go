// rules_test.go: the four rules that keep stale data from the client, step by step. What holds
// under load is in checker_test.go.
//
// The helpers are in harness_test.go and faults_test.go. The ones to know:
//
//	p := start(t, options{})      one instance, on empty tables and keys; startAnother: one more
//	p.post, p.put, p.remove       a write that is answered with success
//	p.list, p.lists               a GET with this Cache-Status (and these titles), or failure
//	p.shows, p.warm               wait for a list, or a hit
//	p.commit                      writes past the program, and waits until it knows
//	gate := p.gate()              holds up the list's query after it has read its rows
//	network.set(t, fault)         from now on the network fails in this way
//	options{deaf: true}           hears no announcement

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/jackc/pgx/v5"
)

// The rule next call
//
// A caller never gets a look-up that began before it asked.

// A reader that asks after the write must not share a look-up that began before it.
func TestLateJoinerGetsTheNextCall(t *testing.T) {
	p := start(t, options{})
	gate := p.gate()
	// 1. The early reader's call has read the old rows.
	early := p.get()
	receive(t, gate.reading)
	// 2. The write is answered.
	p.post(t, "new")
	// 3. The late reader asks, while that call runs.
	late := p.get()
	// The early page, its list, and the late page.
	eventually(t, "the late reader waits", func() bool { return asking() == 3 })
	gate.release <- struct{}{}
	gate.release <- struct{}{}
	if e := receive(t, early); string(e.body) != "[]\n" {
		t.Errorf("the early reader has %s", e.body)
	}
	if e := receive(t, late); !strings.Contains(string(e.body), "new") {
		t.Errorf("the late reader has %s, want the new row", e.body)
	}
}

// A call has a deadline, a panic in it is an error, and nobody waits longer than 9 s.
func TestGroupEndsEveryCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g group[bool]
		panics := func(context.Context) (bool, error) { panic("in a call") }
		if _, _, err := g.do(panics); !errors.Is(err, errInternal) {
			t.Errorf("a call that panics: %v", err)
		}
		patient := func(ctx context.Context) (bool, error) {
			<-ctx.Done()
			return false, ctx.Err()
		}
		if _, _, err := g.do(patient); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a call that takes all its time: %v", err)
		}
		release, begun := make(chan bool), time.Now()
		hangs := func(context.Context) (bool, error) { return <-release, nil }
		_, _, err := g.do(hangs)
		took := time.Since(begun)
		if !errors.Is(err, context.DeadlineExceeded) || took > 9*time.Second {
			t.Errorf("a call that hangs: %v after %v", err, took)
		}
		release <- true
		works := func(context.Context) (bool, error) { return true, nil }
		if ok, _, err := g.do(works); !ok || err != nil {
			t.Errorf("the call after: %v (%v)", ok, err)
		}
	})
}

// A stampede on a cold cache costs one query.
func TestStampede(t *testing.T) {
	p := start(t, options{rows: 10})
	queries := p.countQueries()
	const clients = 500
	p.burst(t, clients, 1, requests[0])
	if n := queries.n.Load(); n != 1 {
		t.Errorf("%d queries, want 1", n)
	}
	m := p.cache.pages.metrics()
	if m.Misses < 1 || m.Hits+m.Misses != clients || m.Bypassed != 0 || m.Coalesced < clients/2 {
		t.Errorf("page: %+v", m)
	}
}

// While Redis is away, PostgreSQL sees one list query at a time, and every client has its answer.
func TestOutage(t *testing.T) {
	network, redisURL := proxyToRedis(t)
	p := start(t, options{rows: 10, redisURL: redisURL})
	queries := p.countQueries()
	network.set(t, refused)
	const clients, each = 64, 10
	p.burst(t, clients, each, requests[0])
	if n := queries.n.Load(); n > clients*each/2 || queries.atOnce.Load() > 0 {
		t.Errorf("%d requests cost %d queries, %d of them while another one ran",
			clients*each, n, queries.atOnce.Load())
	}
	network.set(t, healthy)
	p.warm(t)
}

// 60 writes at once, at a Redis that takes 100 ms for each reply, share a few invalidations.
func TestWritersShareInvalidations(t *testing.T) {
	log := keepLog(t)
	network, redisURL := proxyToRedis(t)
	p := start(t, options{redisURL: redisURL})
	network.set(t, slow)
	const writes = 60
	p.burst(t, writes, 1, requests[2])
	if n := log.count("cache: invalidated"); n < 1 || n > writes/3 {
		t.Errorf("%d writes cost %d invalidations", writes, n)
	}
}

// The rule snapshot
//
// An entry must have seen every write that the instance which uses it knows of.

// What an entry must have seen: the floor, and the writes that were learned of since.
func TestEntryMustHaveSeen(t *testing.T) {
	// 7 and 9 were running.
	floor := snapshot{"A", 10, []uint64{7, 9}}
	tests := []struct {
		about  string
		floor  snapshot
		writes []uint64
		entry  snapshot
		seen   bool
	}{
		{"the floor itself", floor, nil, floor, true},
		{"a later one", floor, nil, snapshot{"A", 12, nil}, true},
		{"an earlier one", floor, nil, snapshot{"A", 9, nil}, false},
		{"one of the floor's running ids runs", floor, nil, snapshot{"A", 12, []uint64{9}}, true},
		{"an id that the floor has seen runs", floor, nil, snapshot{"A", 12, []uint64{8}}, false},
		{"an id above the floor runs", floor, nil, snapshot{"A", 12, []uint64{10}}, true},
		{"of another server", floor, nil, snapshot{"B", 12, nil}, false},
		{"of no server", floor, nil, snapshot{"", 12, nil}, false},
		{"without a floor", snapshot{}, nil, snapshot{"A", 12, nil}, false},
		{"of no server, without a floor", snapshot{}, nil, snapshot{}, false},
		{"a write below its end", floor, []uint64{11}, snapshot{"A", 12, nil}, true},
		{"a write at its end", floor, []uint64{12}, snapshot{"A", 12, nil}, false},
		{"a write that runs", floor, []uint64{11}, snapshot{"A", 13, []uint64{11}}, false},
		{"a write that ran at the floor", floor, []uint64{9}, floor, false},
		{"a write that the floor has seen", floor, []uint64{5}, floor, true},
		{"one of two writes", floor, []uint64{11, 12}, snapshot{"A", 12, nil}, false},
	}
	for _, test := range tests {
		k := known{floor: test.floor}
		for _, id := range test.writes {
			if !k.learn(transaction{"A", id}) {
				t.Errorf("%s: it wants a new floor", test.about)
			}
		}
		if seen := k.seenBy(test.entry); seen != test.seen {
			t.Errorf("%s: seen %v, want %v", test.about, seen, test.seen)
		}
	}
}

// A new floor takes the place of the writes that were known when it was asked for. What was learned
// meanwhile stays, but for the writes of another server, and those are not learned.
func TestFloorIsRaisedWhileWritesAreLearned(t *testing.T) {
	var k known
	if k.learn(transaction{"A", 9}) {
		t.Error("a write is learned without a floor")
	}
	k.raise(snapshot{"A", 10, nil}, 0)
	k.learn(transaction{"A", 11})
	_, asked := k.get()
	k.learn(transaction{"A", 12})
	k.raise(snapshot{"A", 12, nil}, len(asked))
	if floor, writes := k.get(); floor.Xmax != 12 || !slices.Equal(writes, []uint64{12}) {
		t.Errorf("floor %v, writes %v", floor, writes)
	}
	if k.learn(transaction{"B", 5}) {
		t.Error("a write of another server is learned")
	}
	k.raise(snapshot{"B", 6, nil}, 0)
	if floor, writes := k.get(); floor.Server != "B" || len(writes) > 0 {
		t.Errorf("floor %v, writes %v", floor, writes)
	}
	// Many writes want a new floor. Without one, each is noted all the same.
	for id := range uint64(manyWrites + 1) {
		if last := id + 1; k.learn(transaction{"B", 6 + id}) != (last != manyWrites) {
			t.Errorf("after %d writes a new floor is wanted, or not wanted", last)
		}
	}
}

// A head that isn't complete, or doesn't say what it has seen, is no head.
func TestParseEntry(t *testing.T) {
	const head = `Snapshot: {"server":"A","xmax":10,"running":[7,9]}` + "\r\nETag: x"
	const whole = head + "\r\n\r\nbody"
	e, err := parseEntry([]byte(whole))
	want := snapshot{"A", 10, []uint64{7, 9}}
	if err != nil || fmt.Sprint(e.snapshot) != fmt.Sprint(want) || string(e.body) != "body" {
		t.Fatalf("%+v (%v)", e, err)
	}
	for n := range len(head) {
		if e, err := parseEntry([]byte(whole[:n])); err == nil {
			t.Errorf("%q has seen %v", whole[:n], e.snapshot)
		}
	}
	for _, seen := range []string{
		``, `0`, `"A"`, `{"server":1}`, `{"xmax":-1}`, `{"xmax":1e99}`, `{"running":["x"]}`,
		`{"server":"A","xmax":18446744073709551616}`, `{"server":"A"} {}`,
	} {
		if e, err := parseEntry([]byte("Snapshot: " + seen + "\r\n\r\nbody")); err == nil {
			t.Errorf("%q has seen %v", seen, e.snapshot)
		}
	}
}

// An invalidation that never reached Redis leaves old data there. It isn't served: neither while
// Redis is away nor when it is back.
func TestLostInvalidation(t *testing.T) {
	network, redisURL := proxyToRedis(t)
	p := start(t, options{redisURL: redisURL})
	p.list(t, storedStatus)
	network.set(t, swallow)
	p.post(t, "new")
	if p.exist(t, listKey, pageKey) != 2 {
		t.Fatal("the DEL was to be lost")
	}
	// Only the write has waited for Redis.
	for range 20 {
		p.lists(t, bypassStatus, "new")
		if !p.bypassed() {
			t.Error("a later request may ask Redis")
		}
	}
	network.set(t, healthy)
	eventually(t, "the bypass ends", func() bool { return !p.bypassed() })
	p.lists(t, staleStatus, "new")
	p.lists(t, hitStatus, "new")
}

// Redis goes back to what it held before a write, fence and all. That costs a fill.
func TestRedisGoesBack(t *testing.T) {
	server := startRedis(t)
	p := start(t, options{rows: 1, redisURL: server.url})
	ways := map[string]func(*redisServer) (back func()){
		"keys are restored":         (*redisServer).save,
		"databases are swapped":     (*redisServer).copyAside,
		"it restarts with old data": (*redisServer).snapshot,
	}
	for about, keep := range ways {
		t.Run(about, func(t *testing.T) {
			p.warm(t)
			back := keep(server)
			p.put(t, about)
			p.list(t, storedStatus)
			back()
			p.lists(t, "redis; ", about)
			p.warm(t)
			p.lists(t, hitStatus, about)
		})
	}
}

// Whatever lies at our keys that no view of ours has written is not served, and is replaced.
func TestGarbageInRedis(t *testing.T) {
	p := start(t, options{})
	p.post(t, "new")
	p.list(t, storedStatus)
	page := fmt.Sprintf("%s", p.do(t, "GET", pageKey))
	list := fmt.Sprintf("%s", p.do(t, "GET", listKey))
	head := page[:strings.Index(page, "\r\n\r\n")]
	const aList = "" // stands for one, Redis's own
	tests := []struct{ about, key, value, outcome string }{
		{"another type for the page", pageKey, aList, storedStatus},
		{"text for the page", pageKey, "garbage", staleStatus},
		{"a page cut in its head", pageKey, head[:len(head)/2], staleStatus},
		{"a page cut in its body", pageKey, page[:len(page)-1], staleStatus},
		{"a page without a body", pageKey, head + "\r\n\r\n", staleStatus},
		{"a page of two", pageKey, page + page, staleStatus},
		{"the list for the page, which is no page, but true", pageKey, list, hitStatus},
		{"another type for the list", listKey, aList, storedStatus},
		{"text for the list", listKey, "garbage", storedStatus},
		{"another type for the fence", fenceKey, aList, storedStatus},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			p.do(t, "DEL", pageKey, test.key)
			// So that no entry is known by its head.
			for _, s := range p.cache.slots {
				s.kept.Store(nil)
			}
			if test.value == aList {
				p.do(t, "RPUSH", test.key, "x")
			} else {
				p.do(t, "SET", test.key, test.value)
			}
			p.lists(t, test.outcome, "new")
			p.lists(t, hitStatus, "new")
		})
	}
	p.remove(t)
	p.lists(t, storedStatus, "")
}

// An entry with a longer head than a look-up reads isn't stored, because its running transactions
// are too many.
func TestLongHeadIsNotStored(t *testing.T) {
	p := start(t, options{})
	p.wrapQuery(func(query view, w http.ResponseWriter, r *http.Request) error {
		err := query(w, r)
		many := "[999999999999" + strings.Repeat(",999999999999", maxHead/13)
		w.Header().Set("Snapshot", strings.Replace(w.Header().Get("Snapshot"), "[", many, 1))
		return err
	})
	for range 2 {
		e := p.want(t, 200, "GET", propertiesPath, "")
		if got := e.Header.Get("Cache-Status"); got != missStatus {
			t.Errorf("Cache-Status: %s", got)
		}
	}
	if p.exist(t, listKey, pageKey) > 0 {
		t.Error("it is stored")
	}
}

// Ids mean something only within one run of the server, and after a crash they come again. An own
// write of another server than the floor's is answered after a new floor.
func TestOwnWriteOfAnotherServer(t *testing.T) {
	_, config := startPostgres(t)
	p := start(t, options{database: config, rows: 1, deaf: true})
	p.list(t, storedStatus)
	// 1. An old entry claims to have seen all ids that will ever come.
	floor, _ := p.cache.known.get()
	old := &answer{header: http.Header{"Content-Type": {"application/json"}}}
	old.header.Set("Snapshot", fmt.Sprintf(`{"server":%q,"xmax":999999999999}`, floor.Server))
	old.Write([]byte("[]\n"))
	e, err := old.seal()
	if err != nil {
		t.Fatal(err)
	}
	p.do(t, "SET", pageKey, e.message)
	p.list(t, hitStatus)
	// 2. The server's name changes, as after a crash.
	runSQL(t, p.db, `SELECT pg_stat_reset_shared('bgwriter')`)
	// 3. A write is answered. Its reader must not get the old entry.
	p.put(t, "new")
	p.do(t, "SET", pageKey, e.message)
	p.lists(t, staleStatus, "new")
}

// A write of another server is learned, and no floor can be had: no entry has surely seen it.
func TestWriteWithoutFloor(t *testing.T) {
	p := start(t, options{deaf: true})
	p.warm(t)
	p.cache.reserved.Close()
	if err := p.cache.learn(transaction{"another server", 5}); err == nil {
		t.Error("there is a floor")
	}
	p.list(t, staleStatus)
}

// A commit between the two statements of a fill, the snapshot and the rows, must not count as seen
// if the rows lack it. So the snapshot comes first. (slower lets the commit come between them.)
func TestSnapshotIsOlderThanRows(t *testing.T) {
	network, config := proxyToPostgres(t)
	p, past := start(t, options{database: config}), psql(t)
	network.set(t, slower)
	fill := p.get()
	eventually(t, "one statement has run", func() (has bool) {
		err := past.QueryRow(`SELECT EXISTS (SELECT FROM pg_stat_activity
			WHERE datname = current_database() AND state = 'idle in transaction'
				AND query LIKE 'SELECT %')`).Scan(&has)
		return has && err == nil
	})
	p.commit(t, inserting("new"))
	receive(t, fill)
	network.set(t, healthy)
	p.lists(t, "redis; ", "new")
}

// A standby that lags is among the hosts of DATABASE_URL, and the primary crashes: old rows are
// never shown. (503 is fine.)
func TestStandbyIsNotUsed(t *testing.T) {
	primary, config := startPostgres(t)
	_, standby := startStandby(t, config)
	t.Setenv("DATABASE_URL", fmt.Sprintf("postgres://postgres@127.0.0.1:%d,127.0.0.1:%d/postgres",
		config.Port, standby.Port))
	s := settings{}
	if err := s.readDatabaseURL(); err != nil {
		t.Fatal(err)
	}
	p, lagging := start(t, options{database: s.database, rows: 1}), openPast(t, standby)
	eventually(t, "the standby has the row", func() bool {
		_, err := lagging.Exec(`SELECT 1 / count(*) FROM properties`)
		return err == nil
	})
	runSQL(t, lagging, `SELECT pg_wal_replay_pause()`)
	p.put(t, "new")
	p.shows(t, "new")
	answers := func(r request) (status int) {
		e, err := p.send(r.method, r.path, "")
		if err != nil || e.StatusCode == 200 && !strings.Contains(string(e.body), "new") {
			t.Fatalf("%s: stale: %s (%v)", r, e.body, err)
		}
		return e.StatusCode
	}
	for range 2 {
		primary.end(syscall.SIGQUIT)
		p.forget(t)
		for i := range 20 {
			if status := answers(requests[i%2]); status != 503 {
				t.Errorf("without a primary: status %d", status)
			}
		}
		primary.start()
		eventually(t, "the list is back", func() bool { return answers(requests[0]) == 200 })
	}
}

// A fill whose session has ended doesn't try to store, because Redis is known to fail.
func TestFillOfAnEndedSession(t *testing.T) {
	p := start(t, options{})
	gate := p.gate()
	reader := p.get()
	receive(t, gate.reading)
	p.cache.link.end(p.cache.link.session.Load(), errors.New("over"))
	gate.release <- struct{}{}
	if e := receive(t, reader); e.Header.Get("Cache-Status") != missStatus {
		t.Errorf("Cache-Status: %s", e.Header.Get("Cache-Status"))
	}
	if n := p.exist(t, listKey, pageKey); n > 0 {
		t.Errorf("%d keys are stored", n)
	}
}

// The rule fence
//
// A fill loses to a write. This is for what another instance has answered, and this one hasn't
// heard of.

// A reader that read before the commit must not store after the invalidation. A fence that Redis
// has evicted counts as a write.
func TestLateFillLosesToWrite(t *testing.T) {
	for next, evict := range map[string]bool{"new": false, "old": true} {
		t.Run(fmt.Sprintf("evicted: %v", evict), func(t *testing.T) {
			log := keepLog(t)
			p := start(t, options{deaf: true})
			writer := startAnother(t, options{})
			writer.post(t, "old")
			gate := p.gate()
			// 1. The reader has read the old rows.
			reader := p.get()
			receive(t, gate.reading)
			// 2. Another instance commits, invalidates and answers.
			if evict {
				p.do(t, "DEL", fenceKey)
			} else {
				writer.put(t, "new")
			}
			// 3. The reader wants to store.
			gate.release <- struct{}{}
			e := receive(t, reader)
			if got := e.Header.Get("Cache-Status"); got != missStatus ||
				!strings.Contains(string(e.body), "old") {
				t.Errorf("the reader has %s %s, want the old list, not stored", got, e.body)
			}
			if n := p.exist(t, listKey, pageKey); n != 0 {
				t.Errorf("the late fill stored %d keys", n)
			}
			if n := log.count("fill discarded, because a write came"); n != 2 {
				t.Errorf("the log says it %d times, want once for each level: %s", n, log)
			}
			gate.release <- struct{}{}
			p.lists(t, storedStatus, next)
		})
	}
}

// The same with a commit in psql, which changes no fence: the fill is stored, but has not seen it.
func TestLateFillIsStale(t *testing.T) {
	p := start(t, options{})
	gate := p.gate()
	reader := p.get()
	receive(t, gate.reading)
	p.commit(t, inserting("new"))
	gate.release <- struct{}{}
	if e := receive(t, reader); e.Header.Get("Cache-Status") != storedStatus {
		t.Errorf("Cache-Status: %s", e.Header.Get("Cache-Status"))
	}
	gate.release <- struct{}{}
	p.lists(t, staleStatus, "new")
}

// EXEC succeeds even if one of its commands fails, and does nothing if a WATCHed key has changed.
func TestExecute(t *testing.T) {
	reset(t)
	a, b := dialRedis(t, services.redisURL), dialRedis(t, services.redisURL)
	set := redis.Args{"SET", "key", "value"}
	err := execute(a, time.Second, set, redis.Args{"RPUSH", "key", "x"})
	if err == nil || !strings.HasPrefix(err.Error(), "WRONGTYPE") {
		t.Errorf("a command fails: %v", err)
	}
	do(t, a, "WATCH", fenceKey)
	do(t, b, "SET", fenceKey, "another")
	if err := execute(a, time.Second, set); err != redis.ErrNil {
		t.Errorf("a WATCHed key has changed: %v", err)
	}
	if err := execute(a, time.Second, set); err != nil {
		t.Error(err)
	}
}

// Any number of pages can be cached, each by one line. An answered write deletes all of them if
// Redis answers, and any other write makes them stale.
func TestSecondPage(t *testing.T) {
	network, redisURL := proxyToRedis(t)
	p := start(t, options{redisURL: redisURL})
	_, page := p.cache.cachePage("/second/", time.Minute, p.properties.listView)
	second := &program{url: newServer(t, page)}
	for _, write := range []struct {
		about, status, shows string
		do                   func()
	}{
		{"POST", storedStatus, "a", func() { p.post(t, "a") }},
		{"PUT", storedStatus, "b", func() { p.put(t, "b") }},
		{"DELETE", storedStatus, "", func() { p.remove(t) }},
		{"psql", staleStatus, "c", func() { p.commit(t, inserting("c")) }},
		{"POST without Redis", staleStatus, "c, d", func() {
			network.set(t, refused)
			p.post(t, "d")
			network.set(t, healthy)
			eventually(t, "the bypass ends", func() bool { return !p.bypassed() })
		}},
	} {
		t.Run(write.about, func(t *testing.T) {
			p.warm(t)
			second.warm(t)
			write.do()
			p.lists(t, write.status, write.shows)
			second.lists(t, write.status, write.shows)
		})
	}
}

// Three instances share what is in Redis: what one fills the other hits, and what one writes both
// show. A write costs one invalidation, and its echoes undo none of the fills that follow.
func TestThreeInstances(t *testing.T) {
	log := keepLog(t)
	all := []*program{start(t, options{}), startAnother(t, options{}), startAnother(t, options{})}
	const writes = 30
	for i := range writes {
		writer, reader := all[i%3], all[(i+1)%3]
		writer.post(t, "new")
		if n := len(reader.list(t, storedStatus)); n != i+1 {
			t.Errorf("%d rows, want %d", n, i+1)
		}
		writer.list(t, hitStatus)
	}
	for _, p := range all {
		p.commit(t, `UPDATE properties SET title = title WHERE false`)
	}
	n, fills := log.count("cache: invalidated"), log.count("cache: filled")
	if n != writes || fills != 2*writes {
		t.Errorf("%d writes cost %d invalidations and %d fills", writes, n, fills)
	}
}

// The rule announcement
//
// Every commit is announced, whoever made it.

// Every commit past the program is announced once and shows in the list, whatever its session is
// set to; what is rolled back, or changes other tables, isn't announced. It costs no new floor.
func TestCommitsPastTheProgram(t *testing.T) {
	p, past := start(t, options{}), listenPast(t)
	role := newRole(t, "INSERT").User
	floor := p.floor()
	for _, test := range []struct {
		about, sql    string
		announcements int
		shows         string
	}{
		{"INSERT", inserting("a"), 1, "a"},
		{"UPDATE", `UPDATE properties SET title = 'b'`, 1, "b"},
		{"an import", `BEGIN;` + inserting("c") + `;` + inserting("d") + `; COMMIT`, 1, "b, c, d"},
		{"a rollback", `BEGIN; DELETE FROM properties; ROLLBACK`, 0, "b, c, d"},
		{"another table", `CREATE TABLE others AS SELECT`, 0, "b, c, d"},
		{"DELETE", `DELETE FROM properties WHERE title > 'b'`, 1, "b"},
		{"TRUNCATE", `TRUNCATE properties`, 1, ""},
		{"pg_restore", `SET search_path = ''; ` + inserting("e") + `; RESET search_path`, 1, "e"},
		{"a replica's session", `SET session_replication_role = replica; ` + inserting("f") +
			`; RESET session_replication_role`, 1, "e, f"},
		{"another role, elsewhere", `SET ROLE ` + role + `; SET TimeZone = 'Asia/Kathmandu'; ` +
			inserting("g") + `; RESET ROLE`, 1, "e, f, g"},
	} {
		p.warm(t)
		if n := past.announcements(t, test.sql); n != test.announcements {
			t.Errorf("%s: %d announcements, want %d", test.about, n, test.announcements)
		}
		p.shows(t, test.shows)
		if test.about == "TRUNCATE" {
			// It gives the table another file, and so the server another name.
			floor = p.floor()
		}
	}
	if after := p.floor(); after != floor {
		t.Errorf("the floor was %s and is %s", floor, after)
	}
}

// What an operator says is no transaction's name, so it costs a new floor.
func TestNotifyByHand(t *testing.T) {
	p := start(t, options{})
	floor := p.floor()
	runSQL(t, p.db, `NOTIFY properties, 'look!'`)
	eventually(t, "there is a new floor", func() bool { return p.floor() != floor })
}

// The start of an instance costs the others nothing, and its first request is a hit.
func TestAnotherStarts(t *testing.T) {
	p := start(t, options{})
	p.warm(t)
	startAnother(t, options{}).list(t, hitStatus)
	runSQL(t, p.db, `CREATE TABLE others ()`)
	for range 50 {
		p.list(t, hitStatus)
	}
}

// A rewritten table fires no trigger, but has another file: the next look sees that.
func TestRewrittenTable(t *testing.T) {
	p := start(t, options{})
	p.post(t, "a")
	p.warm(t)
	runSQL(t, p.db, `ALTER TABLE properties ALTER title TYPE text USING title || 'b'`)
	p.shows(t, "ab")
}

// Who can't hear asks: the commits of others show, and hits go on in between. When the reason has
// gone, announcements are heard again.
func TestAsking(t *testing.T) {
	direct := services.database
	tests := []struct {
		about, why string
		database   *pgx.ConnConfig
		harm, mend string
	}{
		{"the trigger is disabled", "asking: the trigger properties_announce is missing", direct,
			`ALTER TABLE properties DISABLE TRIGGER properties_announce`,
			`ALTER TABLE properties ENABLE ALWAYS TRIGGER properties_announce`},
		{"the trigger is dropped", "asking: the trigger properties_announce is missing", direct,
			`DROP TRIGGER properties_announce ON properties`, schema},
		{"a pooler", "asking: is there a pooler in transaction mode?", startPooler(t), ``, ``},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			log := keepLog(t)
			p := start(t, options{database: test.database})
			past := psql(t)
			runSQL(t, past, test.harm)
			eventually(t, "it is noticed", func() bool {
				return strings.Contains(p.health(t, 200), test.why)
			})
			runSQL(t, past, inserting("a"))
			p.shows(t, "a")
			p.warm(t)
			if n := log.count("announcements are not heard"); n != 1 {
				t.Errorf("the log says it %d times: %s", n, log)
			}
			if test.mend != "" {
				// The last commit that nobody announces.
				runSQL(t, past, inserting("b")+`; SET properties.seed = 0; `+test.mend)
				p.isWell(t)
				p.shows(t, "a, b")
			}
		})
	}
}

// In a gap, hits go on; a commit in it shows when it ends; the log says both once. A line that is
// dead without a word is noticed.
func TestGap(t *testing.T) {
	for _, f := range []fault{refused, swallow} {
		t.Run(string(f), func(t *testing.T) {
			log, past := keepLog(t), psql(t)
			network, config := proxyToPostgres(t)
			p := start(t, options{database: config})
			p.isWell(t)
			p.warm(t)
			network.set(t, f)
			eventually(t, "it is noticed", func() bool { return !p.heard() })
			runSQL(t, past, inserting("meanwhile"))
			for range 50 {
				p.list(t, hitStatus)
			}
			network.set(t, healthy)
			p.shows(t, "meanwhile")
			eventually(t, "announcements are heard again", p.heard)
			lost := log.count("announcements are not heard")
			found := log.count("announcements are heard")
			if lost != 1 || found != 1 {
				t.Errorf("the log says %d times that it is deaf, and %d times that it hears: %s",
					lost, found, log)
			}
		})
	}
}

// Each of two instances has a Redis of its own, as after a failover. Each shows the other's writes.
func TestTwoRedis(t *testing.T) {
	a := start(t, options{redisURL: startRedis(t).url})
	b := startAnother(t, options{redisURL: startRedis(t).url})
	want := ""
	for i, writer := range []*program{a, b, a} {
		reader := []*program{b, a, b}[i]
		reader.warm(t)
		writer.post(t, "new")
		want = strings.TrimPrefix(want+", new", ", ")
		reader.shows(t, want)
	}
}

// The writer is killed between its COMMIT and its invalidation. The other instance shows the write.
func TestWriterDies(t *testing.T) {
	network, redisURL := proxyToRedis(t)
	other, past := start(t, options{}), psql(t)
	writer := runMain(t, []string{"REDIS_URL=" + redisURL}, "-addr", "127.0.0.1:0").serving(t)
	other.warm(t)
	// From here on, an invalidation of the writer can only be lost.
	network.set(t, swallow)
	writer.api().later("POST", propertiesPath, titled("new"))
	eventually(t, "the write is committed", func() bool {
		var n int
		err := past.QueryRow(`SELECT count(*) FROM properties`).Scan(&n)
		return err == nil && n == 1
	})
	writer.command.Process.Kill()
	other.shows(t, "new")
}

// A COMMIT whose answer is lost took effect. Another instance shows it. The writer, which
// can't hear, knows that it may be there: it doesn't use what is older.
func TestCommitInDoubt(t *testing.T) {
	network, config := proxyToPostgres(t)
	writer, other := start(t, options{database: config}), startAnother(t, options{})
	other.warm(t)
	writer.list(t, hitStatus)
	old := other.do(t, "GET", pageKey)
	// 1. The writer's COMMIT arrives, and no reply to it.
	network.muteAfter("commit")
	write := writer.later("POST", propertiesPath, titled("new"))
	other.shows(t, "new")
	network.set(t, refused)
	checkProblem(t, receive(t, write), errInDoubt.Detail)
	// 2. Redis has an older page.
	other.do(t, "SET", pageKey, old)
	other.do(t, "DEL", listKey)
	writer.want(t, 503, "GET", propertiesPath, "")
	// 3. PostgreSQL is back.
	network.set(t, healthy)
	writer.shows(t, "new")
}

// Each write sends its signal once, after the commit; a refused one sends none. A receiver that
// panics keeps none of the others from hearing.
func TestSignals(t *testing.T) {
	p := start(t, options{})
	var heard []string
	note := func(what string) func(change) {
		return func(c change) {
			var n int
			// It stays 0 if that fails, which shows below.
			p.db.QueryRow(`SELECT count(*) FROM properties`).Scan(&n)
			heard = append(heard, fmt.Sprintln(what, c.property.Title, c.created, n))
			if c.write.server == "" || c.write.id == 0 {
				t.Errorf("%s: the write has no name: %+v", what, c.write)
			}
		}
	}
	s := p.properties.signals
	panics := func(change) { panic("in a receiver") }
	s.postSave.receivers = slices.Insert(s.postSave.receivers, 0, panics)
	s.postSave.connect(note("saved"))
	s.postDelete.connect(note("deleted"))
	p.post(t, "a")
	p.shows(t, "a")
	p.put(t, "b")
	p.want(t, 400, "PUT", "/properties/1/", titled(""))
	p.want(t, 404, "PUT", "/properties/2/", titled("c"))
	p.want(t, 404, "DELETE", "/properties/2/", "")
	p.remove(t)
	want := "saved a true 1\nsaved b false 1\ndeleted b false 0\n"
	if got := strings.Join(heard, ""); got != want {
		t.Errorf("heard %s, want %s", got, want)
	}
}

// Between its COMMIT and its invalidation a write shows in a view that isn't cached, and perhaps
// not yet in the list. That ends before the write is answered.
func TestBetweenCommitAndInvalidation(t *testing.T) {
	p := start(t, options{deaf: true})
	p.post(t, "old")
	p.list(t, storedStatus)
	committed, goOn := p.holdReceivers()
	write := p.later("PUT", "/properties/1/", titled("new"))
	receive(t, committed)
	row := p.want(t, 200, "GET", "/properties/1/", "").body
	if !strings.Contains(string(row), "new") {
		t.Errorf("the row is %s", row)
	}
	if len(write) > 0 {
		t.Error("the write was answered before its invalidation")
	}
	goOn <- true
	receive(t, write)
	p.lists(t, storedStatus, "new")
}

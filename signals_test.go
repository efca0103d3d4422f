// signals_test.go: who hears of a write, when, and what a receiver can't break; and rule 4, by which the list shows
// every commit, whoever made it.

package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/gomodule/redigo/redis"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// Receivers hear in the order in which they were connected. One that fails or panics doesn't keep the next
// one from hearing.
func TestSend(t *testing.T) {
	var s signal
	var heard []string
	hear := func(name string, err error) func(change) error {
		return func(c change) error {
			heard = append(heard, name+" "+c.transaction)
			return err
		}
	}
	s.send(change{transaction: "nobody is there"})
	s.connect("first", hear("first", errors.New("a failure")))
	s.connect("second", func(change) error { panic("in a receiver") })
	s.connect("third", hear("third", nil))
	s.send(change{transaction: "a"})
	s.send(change{transaction: "b"})
	if want := []string{"first a", "third a", "first b", "third b"}; !slices.Equal(heard, want) {
		t.Errorf("heard %q, want %q", heard, want)
	}
}

// Each write sends its signal once, after the commit and before the answer; a refused one sends none.
func TestSignals(t *testing.T) {
	p := start(t, options{})
	var heard []string
	note := func(what string, row property, rows int) error {
		var n int
		if err := p.db.QueryRow(`SELECT count(*) FROM properties`).Scan(&n); err != nil || n != rows {
			t.Errorf("%s: %d rows are committed, want %d (%v)", what, n, rows, err)
		}
		heard = append(heard, fmt.Sprintf("%s %d %s", what, row.ID, row.Title))
		return nil
	}
	p.signals.postSave.connect("test", func(c change) error {
		if c.created {
			return note("created", c.property, 1)
		}
		return note("replaced", c.property, 1)
	})
	p.signals.postDelete.connect("test", func(c change) error { return note("deleted", c.property, 0) })
	p.properties.postSave, p.properties.postDelete = p.signals.postSave.send, p.signals.postDelete.send
	p.want(t, 201, "POST", "/properties/", titled("a"))
	p.want(t, 200, "PUT", "/properties/1/", titled("b"))
	p.want(t, 400, "PUT", "/properties/1/", titled(""))
	p.want(t, 404, "PUT", "/properties/2/", titled("c"))
	p.want(t, 404, "DELETE", "/properties/2/", "")
	p.want(t, 204, "DELETE", "/properties/1/", "")
	if got, want := strings.Join(heard, ", "), "created 1 a, replaced 1 b, deleted 1 b"; got != want {
		t.Errorf("heard %s, want %s", got, want)
	}
}

// A receiver that panics neither fails the write nor keeps the caches from being invalidated.
func TestPanicInReceiver(t *testing.T) {
	p := start(t, options{})
	p.signals.postSave = slices.Insert(p.signals.postSave, 0,
		receiver{"test", func(change) error { panic("in a receiver") }})
	p.properties.postSave = p.signals.postSave.send
	runSQL(t, p.db, unannounced)
	p.list(t, storedStatus)
	p.want(t, 201, "POST", "/properties/", titled("new"))
	if got := titles(p.list(t, storedStatus)); got != "new" {
		t.Errorf("the list has %q", got)
	}
}

// unannounced is SQL that leaves the signals alone: what an announcement does a millisecond later would hide that they
// did nothing.
const unannounced = `ALTER TABLE properties DISABLE TRIGGER USER`

// psql writes past the program.
func psql(t *testing.T) *sql.DB {
	t.Helper()
	db := stdlib.OpenDB(*services.database)
	t.Cleanup(func() { db.Close() })
	return db
}

func runSQL(t *testing.T, db *sql.DB, statements string) {
	t.Helper()
	if _, err := db.Exec(statements); err != nil {
		t.Fatal(err)
	}
}

func inserting(title string) string {
	return fmt.Sprintf(`INSERT INTO properties (title, description, price, location) VALUES ('%s', '', 1, 'Accra')`, title)
}

// warm waits until the list is a hit.
func (p *program) warm(t *testing.T) {
	t.Helper()
	eventually(t, "the list is a hit", func() bool {
		return strings.HasPrefix(p.want(t, 200, "GET", "/properties/", "").Header.Get("Cache-Status"), hitStatus)
	})
}

// shows waits until the list shows exactly these titles. No read may fail.
func (p *program) shows(t *testing.T, want string) {
	t.Helper()
	eventually(t, "the list shows "+want, func() bool { return titles(p.list(t, "redis")) == want })
}

// Every commit past the program is announced once and shows in the list; what is rolled back, or changes other tables,
// isn't announced.
func TestCommitsPastTheProgram(t *testing.T) {
	p := start(t, options{})
	past := psql(t)
	hears, err := pgx.ConnectConfig(t.Context(), services.database)
	if err != nil {
		t.Fatal(err)
	}
	defer hears.Close(context.Background())
	if _, err := hears.Exec(t.Context(), "LISTEN properties"); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		about         string
		sql           string
		announcements int
		shows         string
	}{
		{"INSERT", inserting("a"), 1, "a"},
		{"UPDATE", `UPDATE properties SET title = 'b'`, 1, "b"},
		{"an import", `BEGIN;` + inserting("c") + `;` + inserting("d") + `; COMMIT`, 1, "b, c, d"},
		{"many rows", `INSERT INTO properties (title, description, price, location) SELECT 'e', '', 1, 'Accra' FROM generate_series(1, 2)`, 1, "b, c, d, e, e"},
		{"a rollback", `BEGIN; DELETE FROM properties; ROLLBACK`, 0, "b, c, d, e, e"},
		{"another table", `CREATE TABLE others (id int); INSERT INTO others VALUES (1)`, 0, "b, c, d, e, e"},
		{"DELETE", `DELETE FROM properties WHERE title > 'b'`, 1, "b"},
		{"TRUNCATE", `TRUNCATE properties`, 1, ""},
	}
	for _, test := range tests {
		p.warm(t)
		runSQL(t, past, test.sql)
		runSQL(t, past, `NOTIFY properties, 'the end'`)
		for n := 0; ; n++ {
			announcement, err := hears.WaitForNotification(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if announcement.Payload == "the end" {
				if n != test.announcements {
					t.Errorf("%s: %d announcements, want %d", test.about, n, test.announcements)
				}
				break
			}
		}
		p.shows(t, test.shows)
	}
}

// The writer is killed between its COMMIT and its invalidation. The other instance shows the write.
func TestWriterDies(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	other, past := start(t, options{}), psql(t)
	writer := runMain(t, []string{"REDIS_URL=" + withHost(t, services.redisURL, network.addr)}, "-addr", "127.0.0.1:0").serving(t)
	other.warm(t)
	network.set(t, swallow) // from here on, an invalidation of the writer can only be lost
	go (&program{url: writer.url}).send("POST", "/properties/", titled("new"))
	eventually(t, "the write is committed", func() bool {
		var n int
		err := past.QueryRow(`SELECT count(*) FROM properties`).Scan(&n)
		return err == nil && n == 1
	})
	writer.command.Process.Kill()
	other.shows(t, "new")
}

// The writer can't reach Redis. The other instance, which can, shows the write.
func TestWriterCutOff(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	writer := start(t, options{redisURL: withHost(t, services.redisURL, network.addr)})
	other := startAnother(t, options{})
	other.warm(t)
	network.set(t, swallow)
	writer.want(t, 201, "POST", "/properties/", titled("new"))
	other.shows(t, "new")
}

// After a failover of Redis, the connections of one instance to the old one stay open. Each shows the other's writes.
func TestTwoRedis(t *testing.T) {
	old := start(t, options{redisURL: startRedis(t).url})
	fresh := startAnother(t, options{redisURL: startRedis(t).url})
	old.warm(t)
	fresh.warm(t)
	old.want(t, 201, "POST", "/properties/", titled("a"))
	fresh.shows(t, "a")
	old.warm(t)
	fresh.want(t, 201, "POST", "/properties/", titled("b"))
	old.shows(t, "a, b")
}

// With three instances, a write costs Redis one invalidation. Its echoes undo none of the fills that follow.
func TestEchoes(t *testing.T) {
	all := []*program{start(t, options{}), startAnother(t, options{}), startAnother(t, options{})}
	calls := func(command string) int {
		info, _ := redis.String(all[0].redis.Do("INFO", "commandstats"))
		count, _, _ := strings.Cut(strings.TrimPrefix(infoField(info, "cmdstat_"+command), "calls="), ",")
		n, _ := strconv.Atoi(count)
		return n
	}
	eventually(t, "all have heard of their start", func() bool { return calls("evalsha")+calls("eval") >= 6 })
	all[0].redis.Do("CONFIG", "RESETSTAT")
	const writes = 100
	for i := range writes {
		reader := all[(i+1)%len(all)]
		all[i%len(all)].want(t, 201, "POST", "/properties/", titled("new"))
		reader.list(t, storedStatus)
		reader.list(t, hitStatus)
	}
	eventually(t, "all have heard of all", func() bool { return calls("evalsha") >= writes*(1+len(all)) })
	if n := calls("del"); n != writes {
		t.Errorf("%d writes cost %d invalidations", writes, n)
	}
	all[0].list(t, hitStatus)
}

// LISTEN comes before the invalidation that ends a gap: what is committed between them is heard.
func TestListenThenInvalidate(t *testing.T) {
	p, past := start(t, options{}), psql(t)
	l := &listener{db: p.db, config: services.database, announced: func(change) { runSQL(t, past, `NOTIFY properties, 'meanwhile'`) }}
	if err := l.listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer l.conn.Close(context.Background())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, want := range []string{l.probe, "meanwhile"} {
		if n, err := l.conn.WaitForNotification(ctx); err != nil || n.Payload != want {
			t.Errorf("heard %v (%v), want %s", n, err, want)
		}
	}
}

// In a gap, hits go on; a commit in it shows when it ends; the log says both once. A line that is silently dead is
// noticed, although nothing closes it.
func TestGap(t *testing.T) {
	for _, f := range []fault{refused, swallow} {
		t.Run(f.String(), func(t *testing.T) {
			log, past := keepLog(t), psql(t)
			network, config := proxyToPostgres(t)
			var dials atomic.Int64
			dial := config.DialFunc
			config.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
				dials.Add(1)
				return dial(ctx, network, addr)
			}
			p := start(t, options{database: config})
			heard := func() int { return log.count("announcements are heard: the commits of others invalidate") }
			eventually(t, "the commits of others are heard", func() bool { return heard() == 1 })
			p.warm(t)
			network.set(t, f)
			eventually(t, "it is noticed", func() bool { return p.listener.unheard.get() != "" })
			runSQL(t, past, inserting("meanwhile"))
			before := dials.Load()
			eventually(t, "it has tried again, twice", func() bool {
				p.list(t, hitStatus)
				return dials.Load() >= before+2
			})
			network.set(t, healthy)
			p.shows(t, "meanwhile")
			eventually(t, "the commits of others are heard again", func() bool { return p.listener.unheard.get() == "" })
			if lost := log.count("stay unseen", "the connection to PostgreSQL failed"); lost != 1 || heard() != 2 {
				t.Errorf("the log says %d times that nothing is heard, %d times that it is: %s", lost, heard(), log)
			}
		})
	}
}

// PostgreSQL ends every connection, and somebody commits before the listener is back. No request fails, and the list
// shows the commit.
func TestEveryConnectionEnds(t *testing.T) {
	p, past := start(t, options{rows: 1}), psql(t)
	past.SetMaxOpenConns(1)
	var idle []*sql.Conn
	for range 8 {
		conn, err := p.db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, conn)
	}
	for _, conn := range idle {
		conn.Close()
	}
	p.warm(t)
	runSQL(t, past, `CREATE TEMP TABLE ended AS SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid();
		UPDATE properties SET title = 'meanwhile'`)
	eventually(t, "they have ended", func() bool {
		var n int
		err := past.QueryRow(`SELECT count(*) FROM ended JOIN pg_stat_activity USING (pid)`).Scan(&n)
		return err == nil && n == 0
	})
	for range 4 {
		p.want(t, 200, "GET", "/properties/1/", "")
	}
	p.shows(t, "meanwhile")
	p.want(t, 201, "POST", "/properties/", titled("new"))
}

// A pooler in transaction mode swallows announcements. (Here, the probe goes to another database, so it doesn't come
// back either.) It is said once, with what to do.
func TestDeafness(t *testing.T) {
	log, p := keepLog(t), start(t, options{})
	config, err := pgx.ParseConfig(os.Getenv("DATABASE_URL"))
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := stdlib.OpenDB(*config)
	defer elsewhere.Close()
	l := &listener{db: elsewhere, config: services.database, announced: p.signals.announced.send}
	deaf := &program{url: newServer(t, view((&app{cache: p.cache, listener: l, health: p.health}).healthView))}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { l.run(ctx, l.listen(ctx)); close(done) }()
	eventually(t, "it is noticed", func() bool {
		return strings.Contains(string(deaf.want(t, 200, "GET", "/", "").body), "not heard: is there a pooler")
	})
	stop()
	receive(t, done)
	if n := log.count("announcements are not heard", "pooler"); n != 1 {
		t.Errorf("the log says it %d times: %s", n, log)
	}
}

// A COMMIT whose answer is lost took effect. Another instance shows it, while the writer is still in doubt.
func TestCommitInDoubt(t *testing.T) {
	network, config := proxyToPostgres(t)
	writer, other := start(t, options{database: config}), startAnother(t, options{})
	other.warm(t)
	network.muteAfter("commit")
	write := make(chan exchange, 1)
	go func() { e, _ := writer.send("POST", "/properties/", titled("new")); write <- e }()
	other.shows(t, "new")
	network.set(t, healthy) // ends the writer's connection
	if e := receive(t, write); e.Response == nil || e.StatusCode != 503 || e.Header.Get("Retry-After") != "" {
		t.Errorf("the writer was told %s", e.body)
	}
	writer.shows(t, "new")
}

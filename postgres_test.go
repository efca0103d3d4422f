// postgres_test.go: what a client is told when PostgreSQL fails, refuses or is away, and what it
// never notices.

package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

// An SQLSTATE says whether a later try may succeed, and the detail is true.
func TestProblemOf(t *testing.T) {
	tests := []struct {
		states, detail string
		status         int
	}{
		{"23502 23503 23505 23514 23P01", "would break one of its constraints", 409},
		// A right, a table, a column, a type, a password, a database, somebody's own RAISE.
		{"42501 42P01 42703 42883 22001 0A000 28P01 3D000 P0001 XX000", "on our side", 500},
		{"25006", "The database is read-only: nothing was changed", 503},
		{"08006 25P03 25P04 40001 40P01 53100 53200 53300 54000 55P03 55006 57014 57P01 57P02 " +
			"57P03 57P05 58030", "The database can't do this now: nothing was changed", 503},
	}
	check := func(about string, err error, status int, detail string) {
		t.Helper()
		got := problemOf(fmt.Errorf("write: %w", err))
		if got.Status != status || !strings.Contains(got.Detail, detail) {
			t.Errorf("%s is %d %s, want %d %s", about, got.Status, got.Detail, status, detail)
		}
	}
	for _, test := range tests {
		for state := range strings.FieldsSeq(test.states) {
			check(state, &pgconn.PgError{Code: state}, test.status, test.detail)
		}
	}
	check("a lost connection", io.ErrUnexpectedEOF, 503, "does not answer")
	check("no time", context.DeadlineExceeded, 503, "took longer than 4 s")
	check("a problem", errNotFound, 404, "no such property")
	check("doubt", fmt.Errorf("%w: %w", errInDoubt, io.EOF), 503, "may have been applied")
}

// The log has PostgreSQL's or the system's own word, and no address.
func TestCause(t *testing.T) {
	for _, text := range []string{"refused", "dial tcp 192.0.2.1:5432: connect: refused"} {
		if got := cause(errors.New(text)); got != "refused" {
			t.Errorf("%s: %s", text, got)
		}
	}
}

// A request is a method and a path.
type request struct{ method, path string }

// requests are one of each kind, reads first. All need PostgreSQL when nothing is cached.
var requests = []request{{"GET", propertiesPath}, {"GET", "/properties/1/"},
	{"POST", propertiesPath}, {"PUT", "/properties/1/"}, {"DELETE", "/properties/1/"}}

var writes = requests[2:]

// While PostgreSQL is away, what is cached is served and the rest is 503; nothing of that is
// cached, nothing is written, and all is well when it is back.
func TestPostgresAway(t *testing.T) {
	for _, f := range []fault{refused, swallow} {
		t.Run(string(f), func(t *testing.T) {
			network, config := proxyToPostgres(t)
			p := start(t, options{rows: 1, database: config})
			p.list(t, storedStatus)
			network.set(t, f)
			p.list(t, hitStatus)
			p.do(t, "DEL", pageKey)
			// From all_properties.
			p.list(t, storedStatus)
			p.do(t, "DEL", pageKey, listKey)
			var answers []<-chan exchange
			for _, r := range requests {
				answers = append(answers, p.later(r.method, r.path, titled("lost")))
			}
			for i, answer := range answers {
				e := receive(t, answer)
				got := checkProblem(t, e)
				if e.StatusCode != 503 || !strings.Contains(got.Detail, "does not answer") {
					t.Errorf("%s: %+v", requests[i], got)
				}
			}
			if n := p.exist(t, pageKey, listKey); n != 0 {
				t.Errorf("%d keys were filled with errors", n)
			}
			network.set(t, healthy)
			p.isWell(t)
			p.list(t, storedStatus)
			if n := len(p.list(t, hitStatus)); n != 1 {
				t.Errorf("%d rows, want 1: a write that failed was applied", n)
			}
		})
	}
}

// A table that somebody locks holds up reads and writes, for 4 s at most. A write that was answered
// with 503 doesn't happen later.
func TestLockedTable(t *testing.T) {
	p := start(t, options{rows: 1})
	p.list(t, storedStatus)
	lock, waiters := lockProperties(t)
	p.list(t, hitStatus)
	p.do(t, "DEL", listKey, pageKey)
	answers := []<-chan exchange{p.get(), p.later("POST", propertiesPath, titled("late"))}
	eventually(t, "both wait", func() bool { return waiters() == 2 })
	for _, answer := range answers {
		got := checkProblem(t, receive(t, answer))
		if !strings.Contains(got.Detail, "took longer than 4 s: nothing was changed") {
			t.Errorf("%+v", got)
		}
	}
	lock.Rollback()
	// It queues behind the late one, if there is one.
	p.want(t, 201, "POST", propertiesPath, titled("next"))
	if got := p.list(t, storedStatus); len(got) != 2 || got[1].Title != "next" {
		t.Errorf("the list has %s", titles(got))
	}
}

// A trigger makes PostgreSQL refuse an INSERT with the SQLSTATE in its title, or drop it.
func TestTriggerRefuses(t *testing.T) {
	log := keepLog(t)
	p := start(t, options{})
	runSQL(t, p.db, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF NEW.title = 'drop' THEN RETURN NULL; END IF;
			RAISE 'a test''s' USING ERRCODE = NEW.title; END $$;
		CREATE TRIGGER refuse BEFORE INSERT ON properties FOR EACH ROW EXECUTE FUNCTION refuse()`)
	// 54000 is a full queue of NOTIFY. checkProblem looks at Retry-After.
	for title, status := range map[string]int{
		"54000": 503, "23514": 409, "42501": 500, "drop": 500,
	} {
		checkProblem(t, p.want(t, status, "POST", propertiesPath, titled(title)))
	}
	if n := log.count("status=500", "does a BEFORE trigger drop it?"); n != 1 {
		t.Errorf("the log says %d times what to look for: %s", n, log)
	}
}

// What PostgreSQL refuses for good: a row that another table needs, rights, columns and tables.
func TestRefusedForGood(t *testing.T) {
	admin := start(t, options{rows: 1})
	config := newRole(t, "ALL")
	p := startAnother(t, options{database: config})
	for _, test := range []struct {
		harm     string
		status   int
		requests []request
	}{
		{`CREATE TABLE viewings (property bigint REFERENCES properties);
			INSERT INTO viewings VALUES (1)`, 409, writes[2:]},
		{`REVOKE ALL ON properties FROM ` + config.User, 500, requests},
		{`GRANT ALL ON properties TO ` + config.User + `;
			ALTER TABLE properties RENAME location TO place`, 500, requests[:4]},
		{`DROP TABLE properties CASCADE`, 500, requests},
	} {
		runSQL(t, admin.db, test.harm)
		p.do(t, "DEL", listKey, pageKey)
		for _, r := range test.requests {
			checkProblem(t, p.want(t, test.status, r.method, r.path, titled("Loft")))
		}
	}
}

// A deferred constraint fails at COMMIT: PostgreSQL did answer, so nothing was changed.
func TestDeferredConstraint(t *testing.T) {
	p := start(t, options{})
	runSQL(t, p.db, `ALTER TABLE properties ADD UNIQUE (title) DEFERRABLE INITIALLY DEFERRED`)
	p.want(t, 201, "POST", propertiesPath, titled("one"))
	p.want(t, 201, "POST", propertiesPath, titled("two"))
	checkProblem(t, p.want(t, 409, "POST", propertiesPath, titled("two")))
	checkProblem(t, p.want(t, 409, "PUT", "/properties/2/", titled("one")))
	if got := p.shown(t); got != "one, two" {
		t.Errorf("the list has %s", got)
	}
}

// PostgreSQL without a connection to spare is a 503 for now.
func TestOutOfConnections(t *testing.T) {
	admin := start(t, options{})
	config := newRole(t, "ALL")
	p := startAnother(t, options{database: config})
	p.list(t, storedStatus)
	runSQL(t, admin.db, `ALTER ROLE `+config.User+` CONNECTION LIMIT 0`)
	// So that the next request dials.
	p.db.SetMaxIdleConns(0)
	p.list(t, hitStatus)
	for _, r := range requests[1:] {
		got := checkProblem(t, p.want(t, 503, r.method, r.path, titled("Loft")))
		if !strings.Contains(got.Detail, "can't do this now") {
			t.Errorf("%s: %s", r, got.Detail)
		}
	}
	runSQL(t, admin.db, `ALTER ROLE `+config.User+` CONNECTION LIMIT -1`)
	p.want(t, 201, "POST", propertiesPath, titled("Loft"))
}

// A server that is read-only for a while reads, says so to who writes, and is used at once when it
// isn't any more, although sessions are left that stay read-only.
func TestReadOnlyForAWhile(t *testing.T) {
	p, admin := start(t, options{rows: 1}), psql(t)
	setDatabase(t, admin, "default_transaction_read_only = on")
	endConnections(t, admin)
	for range 3 {
		got := checkProblem(t, p.want(t, 503, "POST", propertiesPath, titled("lost")))
		if !strings.Contains(got.Detail, "is read-only") {
			t.Errorf("%s", got.Detail)
		}
		p.want(t, 200, "GET", "/properties/1/", "")
		p.list(t, "redis; ")
	}
	p.fillPool(t)
	setDatabase(t, admin, "default_transaction_read_only = off")
	p.succeed(t, 32, request{"POST", propertiesPath})
	p.isWell(t)
}

// What a database sets for its sessions, such as another encoding, changes no answer, and no entry
// in Redis.
func TestSessionSettings(t *testing.T) {
	usual := start(t, options{})
	setDatabase(t, psql(t), "client_encoding = 'LATIN1'", "datestyle = 'German'",
		"TimeZone = 'Asia/Kathmandu'")
	unusual := startAnother(t, options{})
	e := unusual.want(t, 201, "POST", propertiesPath, titled("é-Hội"))
	for _, p := range []*program{usual, unusual} {
		if got := p.want(t, 200, "GET", "/properties/1/", "").body; string(got) != string(e.body) {
			t.Errorf("%s, want %s", got, e.body)
		}
	}
	list := unusual.list(t, storedStatus)
	if got := usual.list(t, hitStatus); titles(got) != "é-Hội" || got[0] != list[0] {
		t.Errorf("%+v, want %+v", got, list)
	}
}

// Connections that PostgreSQL, a pooler or a failover has ended fail no request; nor do those over
// which nothing comes any more, after a host has vanished without a word.
func TestLostConnections(t *testing.T) {
	network, config := proxyToPostgres(t)
	p := start(t, options{rows: 1, database: config})
	for _, lose := range []func(){
		func() { endConnections(t, psql(t)) },
		func() { network.vanish(t) },
	} {
		p.fillPool(t)
		lose()
		p.succeed(t, 32, requests[1:3]...)
	}
	p.isWell(t)
}

// A column's type changes while connections are open that have used it. Behind a pooler in
// transaction mode, each transaction meets another connection. Neither fails a request, because no
// statement is prepared under a name.
func TestNothingIsPrepared(t *testing.T) {
	pooled := services.database.Copy()
	pooled.Host, pooled.Fallbacks = "127.0.0.1", nil
	fmt.Sscanf(startPooler(t), "127.0.0.1:%d", &pooled.Port)
	direct := start(t, options{rows: 1})
	for _, p := range []*program{direct, startAnother(t, options{database: pooled})} {
		p.fillPool(t)
		p.succeed(t, 64, requests[1:4]...)
		runSQL(t, psql(t), `ALTER TABLE properties ALTER title TYPE varchar(300)`)
		p.succeed(t, 64, requests[1:4]...)
	}
}

// setDatabase sets what new sessions of the database begin with, until the test ends. db keeps its
// session, so it can undo it.
func setDatabase(t *testing.T, db *sql.DB, settings ...string) {
	t.Helper()
	db.SetMaxOpenConns(1)
	alter := `ALTER DATABASE ` + services.run
	for _, setting := range settings {
		runSQL(t, db, alter+` SET `+setting)
	}
	t.Cleanup(func() {
		if _, err := db.Exec(alter + ` RESET ALL`); err != nil {
			t.Error(err)
		}
	})
}

// endConnections ends all others to the database, and waits until they have ended.
func endConnections(t *testing.T, db *sql.DB) {
	t.Helper()
	db.SetMaxOpenConns(1)
	// All are told to end before one is waited for.
	for _, wait := range []int{0, 5000} {
		runSQL(t, db, fmt.Sprintf(`SELECT pg_terminate_backend(pid, %d) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid()`, wait))
	}
}

// fillPool opens every connection that the pool may have, and leaves all of them idle.
func (p *program) fillPool(t *testing.T) {
	t.Helper()
	for range 16 {
		conn, err := p.db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
}

// succeed sends n requests, 16 at a time, which is what the pool holds. Every one must succeed.
func (p *program) succeed(t *testing.T, n int, each ...request) {
	t.Helper()
	turns := make(chan request)
	var running sync.WaitGroup
	for range 16 {
		running.Go(func() {
			for r := range turns {
				e, err := p.send(r.method, r.path, titled("Loft"))
				if err != nil || e.StatusCode >= 300 {
					t.Errorf("%s: %s (%v)", r, e.body, err)
				}
			}
		})
	}
	for i := range n {
		turns <- each[i%len(each)]
	}
	close(turns)
	running.Wait()
}

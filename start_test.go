// start_test.go: settings, what happens at the start, and how the program ends.

package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// A setting that can't be used is one line that names it and the cause, and no password.
func TestBadSettings(t *testing.T) {
	type row struct{ name, value, says string }
	tests := []row{
		{"DATABASE_URL", "postgres://u:s3cret@host:port/db", "invalid port"},
		{"DATABASE_URL", "host=localhost password=s3cret port=x", "invalid port"},
		{"DATABASE_URL", "postgres:s3cret@host/db", "want postgres://"},
		{"DATABASE_URL", "postgres://u:s3cret@h/db?sslmode=verifyfull", "sslmode is invalid"},
		{"DATABASE_URL", "postgres://u:s3cret@h/db?target_session_attrs=standby",
			"standby can't be used, want a primary"},
		{"DATABASE_URL", "host=h target_session_attrs=prefer-standby", "standby can't be used"},
		{"PGTARGETSESSIONATTRS", "read-only", "read-only can't be used"},
		{"PGSSLROOTCERT", "/nope", "open /nope: no such file or directory"},
		{"PGSERVICE", "nope", "failed to read service"},
	}
	for _, rest := range strings.Fields("http://:s3cret@host unix://:s3cret@/run/redis.sock " +
		"redis://:s3cret@/0 redis://:s3cret@host:x redis://:s3cret@host:65536 " +
		"redis://:s3cret@host/zero redis://:s3cret@host/1/2 redis://:s3cret@host/0?db=1") {
		tests = append(tests, row{"REDIS_URL", rest, "want redis://"})
	}
	for _, raw := range strings.Fields("s3#cret s3/cret s3%cret s3?cret s3@cret") {
		tests = append(tests,
			row{"DATABASE_URL", "postgres://u:" + raw + "@host/db", "percent-encode # / % ? @"},
			row{"REDIS_URL", "redis://u:" + raw + "@host/0", "percent-encode # / % ? @"})
	}
	for _, test := range tests {
		t.Run(test.name+" "+test.value, func(t *testing.T) {
			t.Setenv("DATABASE_URL", "")
			t.Setenv(test.name, test.value)
			s := settings{addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}
			said := fmt.Sprint(s.readEnvironment())
			names := strings.HasPrefix(said, test.name) ||
				strings.HasPrefix(test.name, "PG") && strings.HasPrefix(said, "DATABASE_URL, or")
			if !names || !strings.Contains(said, test.says) || strings.Contains(said, "\n") ||
				strings.Contains(said, "cret") {
				t.Errorf("%s, want %s, in one line without a password", said, test.says)
			}
		})
	}
}

// A bad setting is one line and status 1, a bad flag is status 2. Without a token, the program
// listens on this machine only.
func TestBadFlags(t *testing.T) {
	tests := []struct {
		about, args string
		status      int
		says        string
	}{
		{"every address without a token", "-addr :8000", 1, "set WRITE_TOKEN"},
		{"an outer address without a token", "-addr 192.0.2.1:8000", 1, "set WRITE_TOKEN"},
		{"no port", "-addr localhost", 2, "-addr"},
		{"a port too high", "-addr 127.0.0.1:99999", 2, "-addr"},
		{"a negative seed", "-seed -1", 2, "-seed"},
		{"connections below zero", "-connections -1", 2, "-connections"},
		{"an unknown flag", "-port 1", 2, "-port"},
		{"an argument", "serve", 2, "serve"},
		{"a call for help", "-h", 0, "curl -i http://localhost:8000/properties/"},
	}
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			p := runMain(t, []string{"WRITE_TOKEN="}, strings.Fields(test.args)...)
			status, said := p.wait(t), p.log(t)
			if status != test.status || !strings.Contains(said, test.says) {
				t.Errorf("status %d, want %d: %s", status, test.status, said)
			}
			if lines := strings.Count(said, "\n"); status == 1 && lines != 1 {
				t.Errorf("%d lines: %s", lines, said)
			}
			if test.args == "-h" && said != usage {
				t.Errorf("%s", said)
			}
		})
	}
}

// A REDIS_URL without a port means 6379, also for an IPv6 address, which redigo alone misreads. A
// DATABASE_URL may have any form that pgx reads.
func TestGoodSettings(t *testing.T) {
	for raw, want := range map[string]string{
		"":                           "redis://localhost:6379/0",
		"redis://localhost":          "redis://localhost:6379",
		"redis://localhost:/1":       "redis://localhost:6379/1",
		"rediss://a:b%40@[::1]/2":    "rediss://a:b%40@[::1]:6379/2",
		"redis://:s3%2Fcret@a:65535": "redis://:s3%2Fcret@a:65535",
	} {
		for _, database := range []string{
			"", "postgres://u:s3%23cret@host:5433/db", "postgresql:///db?host=/run",
			"host=h password=s3#cret@/ port=5434",
			"postgres://a:1,b:2/db?target_session_attrs=read-write",
		} {
			t.Setenv("REDIS_URL", raw)
			t.Setenv("DATABASE_URL", database)
			s := settings{addr: &net.TCPAddr{IP: net.IPv6loopback}}
			if err := s.readEnvironment(); err != nil || s.redisURL.String() != want {
				t.Errorf("%q is %v, want %q; %q: %v", raw, s.redisURL, want, database, err)
			}
		}
	}
}

// The schema can be applied again, and by many at once. A seed fills an empty table, once, and
// always with the same listings.
func TestPrepareTwiceAndAtOnce(t *testing.T) {
	first := start(t, options{rows: 100}).want(t, 200, "GET", propertiesPath, "").body
	reset(t)
	failed := make(chan error)
	for range 8 {
		db := psql(t)
		go func() { failed <- prepare(context.Background(), db, 100) }()
	}
	for range 8 {
		if err := receive(t, failed); err != nil {
			t.Error(err)
		}
	}
	second := startAnother(t, options{rows: 5}).want(t, 200, "GET", propertiesPath, "").body
	if n := strings.Count(string(second), `"id"`); n != 100 || string(first) != string(second) {
		t.Errorf("%d listings, want the same 100: %.500s", n, second)
	}
}

// What no waiting mends is an error at once, in PostgreSQL's own words.
func TestUnusableDatabase(t *testing.T) {
	for _, test := range []struct{ about, harm, says string }{
		{"no column", `ALTER TABLE properties DROP location`, "location"},
		{"no numbers", `ALTER TABLE properties DROP price, ADD price boolean NOT NULL`, "price"},
		{"text for times", `ALTER TABLE properties DROP created_at, ADD created_at text NOT NULL`,
			"created_at"},
		{"a column that may be NULL", `ALTER TABLE properties ALTER title DROP NOT NULL`, "title"},
		{"a time that JSON can't say", `
			ALTER TABLE properties DROP CONSTRAINT properties_created_at_fits_json;
			` + inserting("Loft") + `; UPDATE properties SET created_at = 'infinity'`,
			"properties_created_at_fits_json"},
	} {
		reset(t)
		log, db := keepLog(t), psql(t)
		if err := prepare(t.Context(), db, 0); err != nil {
			t.Fatal(err)
		}
		runSQL(t, db, test.harm)
		err := prepare(t.Context(), db, 0)
		if err == nil || !strings.Contains(err.Error(), test.says) || log.count("waiting") > 0 {
			t.Errorf("%s: %v %s, want %s", test.about, err, log, test.says)
		}
	}
}

// What keeps the program from serving is one line with the reason, at once, and exit status 1. The
// cache is left alone, because another instance may use it.
func TestCannotServe(t *testing.T) {
	p := start(t, options{})
	p.do(t, "SET", listKey, "another instance's")
	d := services.database
	server := fmt.Sprintf("%s:%d/%s?sslmode=disable", d.Host, d.Port, d.Database)
	for _, test := range []struct{ about, databaseURL, says string }{
		{"a port that is taken", databaseURL(t), "address already in use"},
		{"a role that isn't there, or a wrong password",
			"postgres://nobody_at_all:s3cret@" + server, `"nobody_at_all"`},
		{"a database that isn't there", strings.Replace(databaseURL(t), d.Database, "nowhere", 1),
			`database "nowhere" does not exist`},
	} {
		process := runMain(t, []string{"DATABASE_URL=" + test.databaseURL},
			"-addr", strings.TrimPrefix(p.url, "http://"))
		status, said := process.wait(t), process.log(t)
		if status != 1 || strings.Count(said, "\n") != 1 || !strings.Contains(said, test.says) ||
			strings.Contains(said, "s3cret") || strings.Contains(said, "docker compose") {
			t.Errorf("%s: exit status %d: %s, want %s", test.about, status, said, test.says)
		}
	}
	if kept := p.do(t, "GET", listKey); fmt.Sprintf("%s", kept) != "another instance's" {
		t.Errorf("the cache has %s", kept)
	}
}

// A PostgreSQL that is absent is waited for, but not for ever: then the program says how to start
// one. A signal ends the waiting without a word.
func TestPostgresAbsent(t *testing.T) {
	t.Parallel()
	nowhere := []string{"DATABASE_URL=postgres://u:s3cret@127.0.0.1:" + freePort(t) + "/db"}
	patient, interrupted := runMain(t, nowhere), runMain(t, nowhere)
	for _, p := range []*process{patient, interrupted} {
		eventually(t, "it says that it waits", func() bool {
			return strings.Contains(p.log(t), `waiting for PostgreSQL why="connection refused"`)
		})
	}
	interrupted.signal(t, os.Interrupt)
	status, said := interrupted.wait(t), interrupted.log(t)
	if status != 0 || strings.Count(said, "\n") != 1 {
		t.Errorf("interrupted: exit status %d: %s", status, said)
	}
	status, said = patient.wait(t), patient.log(t)
	if status != 1 || strings.Count(said, "\n") != 2 || strings.Contains(said, "s3cret") {
		t.Errorf("exit status %d: %s", status, said)
	}
	for _, words := range []string{"does not answer", "docker compose up -d --wait",
		"scripts/with-services go run .", "(connection refused)"} {
		if !strings.Contains(said, words) {
			t.Errorf("it doesn't say %s: %s", words, said)
		}
	}
}

// Who holds a lock on the table holds up the start, but not for ever.
func TestLockedAtStart(t *testing.T) {
	t.Parallel()
	db := openPast(t, newDatabase(t))
	if err := prepare(t.Context(), db, 0); err != nil {
		t.Fatal(err)
	}
	lockProperties(t, db)
	err := prepare(t.Context(), db, 0)
	const want = "PostgreSQL refuses: canceling statement due to lock timeout"
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// PostgreSQL comes up while the program waits: it serves.
func TestPostgresComesLate(t *testing.T) {
	reset(t)
	network, _ := proxyToPostgres(t)
	network.set(t, refused)
	late := "DATABASE_URL=" + withHost(t, databaseURL(t), network.addr)
	p := runMain(t, []string{late}, "-addr", "127.0.0.1:0")
	eventually(t, "it waits", func() bool {
		return strings.Contains(p.log(t), "waiting for PostgreSQL")
	})
	network.set(t, healthy)
	p.serving(t).api().post(t, "Loft")
}

// The first host of DATABASE_URL swallows all it gets; the second one is used.
func TestDeadFirstHost(t *testing.T) {
	t.Parallel()
	dead, _ := proxyToPostgres(t)
	dead.set(t, swallow)
	hosts := withHost(t, databaseURL(t), dead.addr+","+dead.target)
	hosts = strings.Replace(hosts, services.run, newDatabase(t).Database, 1)
	env := []string{"DATABASE_URL=" + hosts, "REDIS_URL=" + startRedis(t).url}
	p := runMain(t, env, "-addr", "127.0.0.1:0").serving(t).api()
	p.post(t, "Loft")
	p.isWell(t)
}

// A role that may not create anything can run the program, once the schema is there. What it may
// not do is a 500, because no later try can mend it. One that may not even read is refused.
func TestRoles(t *testing.T) {
	for rights, statuses := range map[string][]int{
		"SELECT, INSERT, UPDATE, DELETE": {201, 200, 204},
		"SELECT":                         {500, 500, 500},
		"INSERT":                         nil,
	} {
		t.Run(rights, func(t *testing.T) {
			start(t, options{rows: 1})
			role := newRole(t, rights)
			if statuses == nil {
				db := openDB(role, 1)
				defer db.Close()
				err := prepare(t.Context(), db, 0)
				if err == nil || !strings.Contains(err.Error(), "permission denied for table") {
					t.Errorf("without the right to read: %v", err)
				}
				return
			}
			p := startAnother(t, options{database: role})
			for i, r := range writes {
				p.want(t, statuses[i], r.method, r.path, titled("Loft"))
			}
			p.list(t, storedStatus)
			p.isWell(t)
		})
	}
}

// The functions are replaced where they differ from schema.sql, and the trigger of an earlier
// version becomes one that no session can silence. One that somebody disabled stays disabled. A
// role that may not replace a function is refused, with its name.
func TestSchemaIsMended(t *testing.T) {
	p := start(t, options{})
	role := newRole(t, "ALL")
	for before, after := range map[string]string{
		"ENABLE": "A", "ENABLE ALWAYS": "A", "DISABLE": "D",
	} {
		runSQL(t, p.db, `CREATE OR REPLACE FUNCTION properties_server() RETURNS text LANGUAGE sql
			AS 'SELECT current_user::text';
			ALTER TABLE properties `+before+` TRIGGER properties_announce`)
		limited := openDB(role, 1)
		err := prepare(t.Context(), limited, 0)
		limited.Close()
		if err == nil || !strings.Contains(err.Error(), "properties_server") {
			t.Errorf("a limited role: %v", err)
		}
		if err := prepare(t.Context(), p.db, 0); err != nil {
			t.Fatal(err)
		}
		var mended bool
		var enabled string
		err = p.db.QueryRow(`SELECT properties_server() <> current_user, tgenabled FROM pg_trigger
			WHERE tgname = 'properties_announce'`).Scan(&mended, &enabled)
		if err != nil || !mended || enabled != after {
			t.Errorf("%s: mended: %v, enabled: %s (%v)", before, mended, enabled, err)
		}
	}
}

// REDIS_URL's password, user, database number and TLS are used; a certificate that nobody vouches
// for is not.
func TestRedisURL(t *testing.T) {
	reset(t)
	server, tlsPort, certificate := startRedis(t), freePort(t), newCertificate(t)
	server.do("CONFIG SET tls-auth-clients no tls-cert-file", certificate,
		"tls-key-file", certificate, "tls-port", tlsPort)
	server.do("ACL SETUSER someone on >s3cret2 ~* &* +@all")
	server.do("CONFIG SET requirepass s3cret")
	plain := strings.TrimPrefix(server.url, "redis://")
	for _, test := range []struct{ about, url, trusted, keys, redis string }{
		{"a password and a database", "redis://:s3cret@" + plain + "/7", "", "/7", "up"},
		{"a user", "redis://someone:s3cret2@" + plain, "", "/0", "up"},
		{"TLS", "rediss://:s3cret@127.0.0.1:" + tlsPort + "/3", certificate, "/3", "up"},
		{"TLS with a stranger", "rediss://:s3cret@127.0.0.1:" + tlsPort + "/4", "", "/4",
			"certificate signed by unknown authority"},
	} {
		env := []string{"REDIS_URL=" + test.url, "SSL_CERT_FILE=" + test.trusted}
		p := runMain(t, env, "-addr", "127.0.0.1:0").serving(t)
		keys := dialRedis(t, "redis://:s3cret@"+plain+test.keys)
		eventually(t, test.about+": Redis is "+test.redis, func() bool {
			p.api().want(t, 200, "GET", propertiesPath, "")
			stored := do(t, keys, "EXISTS", pageKey) == int64(1)
			return stored == (test.redis == "up") &&
				strings.Contains(p.api().health(t, 200), `"redis":"`+test.redis+`"`)
		})
		if strings.Contains(p.log(t), "s3cret") {
			t.Errorf("%s: the log tells a password: %s", test.about, p.log(t))
		}
	}
}

// SIGTERM under load: every request that was accepted has its whole answer, and the exit status is
// 0.
func TestStopUnderLoad(t *testing.T) {
	reset(t)
	p := runMain(t, nil, "-addr", "127.0.0.1:0", "-seed", "1000").serving(t)
	var answered atomic.Int64
	var clients sync.WaitGroup
	for range 16 {
		clients.Go(func() {
			for {
				// On a connection that is kept, the server may say goodbye while we ask.
				e, err := p.api().send("GET", propertiesPath, "", "Connection: close")
				if e.Response == nil {
					// Not accepted any more.
					return
				}
				if err != nil || e.StatusCode != 200 || int64(len(e.body)) != e.ContentLength {
					t.Errorf("status %d, %d bytes: %v", e.StatusCode, len(e.body), err)
				}
				answered.Add(1)
			}
		})
	}
	eventually(t, "there is load", func() bool { return answered.Load() > 50 })
	p.signal(t, syscall.SIGTERM)
	clients.Wait()
	if status := p.wait(t); status != 0 || !strings.Contains(p.log(t), "stopped") {
		t.Errorf("exit status %d: %s", status, p.log(t))
	}
}

// A request that is under way when the signal comes is finished first.
func TestStopFinishesRequests(t *testing.T) {
	reset(t)
	p := runMain(t, nil, "-addr", "127.0.0.1:0").serving(t)
	conn, body := p.api().dial(t), titled("Loft")
	answer := bufio.NewReader(conn)
	fmt.Fprintf(conn, unfinished, len(body))
	if line, err := answer.ReadString('\n'); !strings.Contains(line, "100 Continue") {
		t.Fatalf("%q (%v)", line, err)
	}
	fmt.Fprint(conn, body[:20])
	p.signal(t, os.Interrupt)
	eventually(t, "it is stopping", func() bool { return strings.Contains(p.log(t), "stopping") })
	fmt.Fprint(conn, body[20:])
	answer.ReadString('\n')
	if line, err := answer.ReadString('\n'); !strings.Contains(line, "201 Created") {
		t.Errorf("%q (%v)", line, err)
	}
	if status := p.wait(t); status != 0 {
		t.Errorf("exit status %d: %s", status, p.log(t))
	}
}

// unfinished begins a POST. The answer "100 Continue" says that the view is reading.
const unfinished = "POST /properties/ HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n" +
	"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"

// What never ends is cut off: a request that nobody finishes, an answer that nobody reads, and a
// log that nobody reads. Such a log holds up a write, but only after its invalidation.
func TestStopCutsOff(t *testing.T) {
	t.Parallel()
	reset(t)
	busy := runMain(t, nil, "-addr", "127.0.0.1:0", "-seed", "10000").serving(t)
	// Answers for which no buffer is large enough.
	greedy := strings.Repeat("GET /properties/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 50)
	for _, request := range []string{greedy, fmt.Sprintf(unfinished, 100)} {
		conn := busy.api().dial(t)
		fmt.Fprint(conn, request)
		// The answer has begun. Its rest is never read.
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	unread, log := runPiped(t)
	unread.api().warm(t)
	log.fill(t)
	write := unread.api().later("PUT", "/properties/1/", titled("new"))
	conn := dialRedis(t, services.redisURL)
	eventually(t, "the write has invalidated", func() bool {
		return do(t, conn, "EXISTS", pageKey, listKey) == int64(0)
	})
	if len(write) > 0 {
		t.Error("the log doesn't hold up the write")
	}
	for _, p := range []*process{busy, unread} {
		p.signal(t, syscall.SIGTERM)
	}
	for _, p := range []*process{busy, unread} {
		if status := p.wait(t); status != 0 {
			t.Errorf("exit status %d", status)
		}
	}
}

// A log whose reader is gone, as after | head -1, ends nothing.
func TestLogWithoutReader(t *testing.T) {
	reset(t)
	p, log := runPiped(t)
	log.reader.Close()
	p.api().post(t, "Loft")
	p.api().put(t, "new")
	p.signal(t, syscall.SIGTERM)
	if status := p.wait(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

// Clients that dawdle, idle or never end don't keep others from their answers.
func TestPressure(t *testing.T) {
	reset(t)
	p := runMain(t, nil, "-addr", "127.0.0.1:0", "-seed", "10000").serving(t).api()
	const get, post = "GET /properties/ HTTP/1.1\r\nHost: local", "POST /properties/ HTTP/1.1\r\n" +
		"Host: localhost\r\nContent-Type: application/json\r\n"
	for _, test := range []struct {
		about, say string
		n          int
	}{
		{"idle", "", 1000},
		{"half a header", get, 100},
		{"read nothing of the answer", get + "host\r\n\r\n", 100},
		{"half a body", post + "Content-Length: 60000\r\n\r\n{", 100},
		{"chunks without an end", post + "Transfer-Encoding: chunked\r\n\r\n1\r\n \r\n", 100},
	} {
		for range test.n {
			fmt.Fprint(p.dial(t), test.say)
		}
	}
	for range 5 {
		for _, path := range []string{propertiesPath, "/properties/1/", "/healthz", "/metrics"} {
			p.want(t, 200, "GET", path, "")
		}
	}
}

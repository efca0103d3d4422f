// property_test.go: what the API takes, refuses and gives back, and what it does when PostgreSQL is away.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// with is a valid property's JSON with one field replaced, or added.
func with(field, value string) string {
	fields := map[string]string{"title": `"Loft"`, "description": `"Bright."`, "price": `"1234.50"`, "location": `"Accra"`}
	fields[field] = value
	var members []string
	for _, name := range []string{"title", "description", "price", "location", "id", "created_at", "Title", "colour", "", "título"} {
		if fields[name] != "" {
			members = append(members, fmt.Sprintf("%q: %s", name, fields[name]))
		}
	}
	return "{" + strings.Join(members, ", ") + "}"
}

// without is a valid property's JSON that lacks a field.
func without(field string) string { return with(field, "") }

// What is refused, with each wrong field named; nothing of it is stored.
func TestRefused(t *testing.T) {
	a := strings.Repeat
	tests := []struct {
		about  string
		body   string
		fields string // named in errors, sorted
	}{
		{"nothing", ` `, ""},
		{"text", `loft`, ""},
		{"an open object", `{"title": "Loft"`, ""},
		{"a trailing comma", `{"title": "Loft",}`, ""},
		{"single quotes", `{'title': 'Loft'}`, ""},
		{"a comment", `{} // empty`, ""},
		{"trailing data", without("") + `{}`, ""},
		{"trailing text", without("") + `x`, ""},
		{"a byte order mark", "\ufeff" + without(""), ""},
		{"an array", `[` + without("") + `]`, ""},
		{"a string", `"Loft"`, ""},
		{"a number", `1`, ""},
		{"null", `null`, ""},
		{"true", `true`, ""},
		{"an empty object", `{}`, "description location price title"},
		{"invalid UTF-8", with("title", "\"\xff\""), ""},
		{"cut UTF-8", with("title", "\"caf\xc3\""), ""},
		{"overlong UTF-8", with("title", "\"\xc0\x80\""), ""},
		{"a surrogate in UTF-8", with("title", "\"\xed\xa0\x80\""), ""},
		{"a control character", with("title", "\"a\x01b\""), ""},
		{"a NUL byte", with("title", "\"a\x00b\""), ""},
		{"a bad escape", with("title", `"\x41"`), ""},
		{"a short escape", with("title", `"\u12"`), ""},
		{"nested objects", with("title", a(`{"a":`, 9000)+`1`+a(`}`, 9000)), "title"},
		{"nested arrays", with("title", a(`[`, 9000)+a(`]`, 9000)), "title"},
		{"arrays too deep for the decoder", with("title", a(`[`, 20000)+a(`]`, 20000)), ""},
		{"open arrays", a(`[`, 60000), ""},

		{"id", with("id", `1`), "id"},
		{"created_at", with("created_at", `"2026-01-01T00:00:00Z"`), "created_at"},
		{"an unknown field", with("colour", `"red"`), "colour"},
		{"a field without a name", with("", `1`), ""},
		{"a field in another case", with("Title", `"Loft"`), "Title"},
		{"a field only in another case", strings.Replace(without(""), "title", "TITLE", 1), "TITLE title"},
		{"an unknown field in another script", with("título", `"Loft"`), "título"},
		{"a field twice", strings.Replace(without(""), "{", `{"price": "1", `, 1), "price"},
		{"a field twice, the same", strings.Replace(without(""), "{", `{"title": "Loft", `, 1), "title"},
		{"a field twice, once escaped", strings.Replace(without(""), "{", `{"\u0074itle": "Loft", `, 1), "title"},
		{"three wrong fields", `{"title":"","description":1,"price":"x","location":"Accra"}`, "description price title"},
		{"wrong fields of every kind", `{"title":null,"price":-1,"location":" ","id":7,"id":8}`, "description id location price title"},

		{"no title", without("title"), "title"},
		{"title null", with("title", `null`), "title"},
		{"title a number", with("title", `1`), "title"},
		{"title true", with("title", `true`), "title"},
		{"title an array", with("title", `["Loft"]`), "title"},
		{"title an object", with("title", `{"en": "Loft"}`), "title"},
		{"title empty", with("title", `""`), "title"},
		{"title blank", with("title", `"  "`), "title"},
		{"title tabs and newlines", with("title", `"\t\r\n\u000b\f"`), "title"},
		{"title no-break spaces", with("title", `"\u00a0\u202f"`), "title"},
		{"title em and ideographic spaces", with("title", `"\u2003\u3000"`), "title"},
		{"title next line, line separator", with("title", `"\u0085\u2028\u2029"`), "title"},
		{"title 201 letters", with("title", `"`+a("a", 201)+`"`), "title"},
		{"title 201 characters of 4 bytes", with("title", `"`+a("😀", 201)+`"`), "title"},
		{"title 200 letters and blanks", with("title", `"`+a("a", 200)+a(" ", 9)+`"`), "title"},
		{"title with NUL", with("title", `"a\u0000b"`), "title"},
		{"title only NUL", with("title", `"\u0000"`), "title"},
		{"title with a lone high surrogate", with("title", `"\ud83d"`), "title"},
		{"title with a lone low surrogate", with("title", `"\ude00"`), "title"},
		{"title with the pair swapped", with("title", `"\ude00\ud83d"`), "title"},
		{"title with two high surrogates", with("title", `"\ud83d\ud83d\ude00"`), "title"},
		{"title with a high surrogate and a letter", with("title", `"\ud83dx"`), "title"},
		{"title with a high surrogate and an escape", with("title", `"\ud83d\u0041"`), "title"},
		{"title with a high surrogate and a newline", with("title", `"\ud83d\n"`), "title"},
		{"title with a capital surrogate", with("title", `"\uD83D"`), "title"},

		{"no description", without("description"), "description"},
		{"description null", with("description", `null`), "description"},
		{"description a number", with("description", `0`), "description"},
		{"description with NUL", with("description", `"\u0000"`), "description"},
		{"description with a lone surrogate", with("description", `"\udfff"`), "description"},

		{"no location", without("location"), "location"},
		{"location blank", with("location", `"\u2009"`), "location"},
		{"location 101 letters", with("location", `"`+a("é", 101)+`"`), "location"},
		{"location a number", with("location", `1.5`), "location"},

		{"no price", without("price"), "price"},
	}
	for _, price := range []string{
		`null`, `true`, `""`, `" "`, `[]`, `{}`, `[1]`, `-1`, `"-1"`, `-0`, `"-0"`, `"-0.00"`, `"+1"`, `100000000`, `"100000000"`,
		`"99999999.991"`, `99999999.995`, `"99999999999999999999"`, `1.000`, `"1.000"`, `"0.001"`, `1.234`, `1e2`, `"1e2"`, `1E2`,
		`1e-2`, `"1E400"`, `"NaN"`, `"nan"`, `"Infinity"`, `"-Infinity"`, `"inf"`, `"1."`, `".5"`, `"."`, `"007"`, `"00"`, `"00.5"`,
		`"0x10"`, `"1_000"`, `"1,000"`, `"1,5"`, `" 1"`, `"1 "`, `"1\n"`, `"1.5.5"`, `"١٢"`, `"１"`, `"$1"`, `"1€"`, `"1\u0000"`, `"\ud83d"`,
	} {
		tests = append(tests, struct{ about, body, fields string }{"price " + price, with("price", price), "price"})
	}
	for _, price := range []string{`01`, `1.`, `.5`, `+1`, `NaN`, `0x1`} {
		tests = append(tests, struct{ about, body, fields string }{"price " + price + ", no JSON", with("price", price), ""})
	}
	t.Logf("%d refused bodies", len(tests))

	p := start(t, options{rows: 1})
	before := p.want(t, 200, "GET", "/properties/1/", "").body
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			for _, request := range []string{"POST /properties/", "PUT /properties/1/"} {
				method, path, _ := strings.Cut(request, " ")
				got := checkProblem(t, p.want(t, 400, method, path, test.body))
				var fields []string
				for name, wrong := range got.Errors {
					fields = append(fields, name)
					if wrong == "" {
						t.Errorf("%s is wrong, but why?", name)
					}
				}
				slices.Sort(fields)
				if strings.Join(fields, " ") != test.fields {
					t.Errorf("errors: %v, want %s", got.Errors, test.fields)
				}
			}
		})
	}
	if n := len(p.list(t, storedStatus)); n != 1 {
		t.Errorf("%d rows, want 1", n)
	}
	if after := p.want(t, 200, "GET", "/properties/1/", "").body; !bytes.Equal(before, after) {
		t.Errorf("the row was changed: %s", after)
	}
}

// What is accepted comes back as it was sent, and the price with two decimals.
func TestAccepted(t *testing.T) {
	a := strings.Repeat
	tests := []struct {
		about, field, value, want string
	}{
		{"200 characters of 4 bytes", "title", `"` + a("😀", 200) + `"`, `"` + a("😀", 200) + `"`},
		{"100 combining characters", "location", `"` + a("é", 50) + `"`, `"` + a("é", 50) + `"`},
		{"blanks around", "title", `" Loft\t"`, `" Loft\t"`},
		{"an escaped pair", "title", `"\ud83d\ude00\uD83D\uDE00"`, `"😀😀"`},
		{"escaped backslashes that look like a surrogate", "title", `"\\ud83d \\\\ud83d"`, `"\\ud83d \\\\ud83d"`},
		{"a replacement character", "title", `"\ufffd�"`, `"��"`},
		{"HTML", "description", `"<b> & 'c' \u003e"`, `"<b> & 'c' >"`},
		{"SQL", "description", `"'; DROP TABLE properties; --"`, `"'; DROP TABLE properties; --"`},
		{"an empty description", "description", `""`, `""`},
		{"right to left", "location", `"القاهرة"`, `"القاهرة"`},
		{"a zero-width space is no blank", "location", `"\u200b"`, "\"\u200b\""},
		{"U+007F and U+10FFFF", "description", `"\u007f\udbff\udfff"`, "\"\u007f\U0010ffff\""},
		{"a line of every kind", "description", `"a\r\nb\u2028c\u0085"`, `"a\r\nb\u2028c` + "\u0085" + `"`},
		{"60,000 characters", "description", `"` + a("a", 60000) + `"`, `"` + a("a", 60000) + `"`},
		{"price 0", "price", `0`, `"0.00"`},
		{"price 0.0", "price", `"0.0"`, `"0.00"`},
		{"price 0.01", "price", `0.01`, `"0.01"`},
		{"price with one decimal", "price", `1234.5`, `"1234.50"`},
		{"price without decimals", "price", `"1234"`, `"1234.00"`},
		{"price that no float holds", "price", `0.29`, `"0.29"`},
		{"price escaped", "price", `"\u0031"`, `"1.00"`},
		{"the highest price", "price", `99999999.99`, `"99999999.99"`},
	}
	p := start(t, options{})
	for _, test := range tests {
		t.Run(test.about, func(t *testing.T) {
			created := p.want(t, 201, "POST", "/properties/", with(test.field, test.value))
			location := created.Header.Get("Location")
			read := p.want(t, 200, "GET", location, "")
			replaced := p.want(t, 200, "PUT", location, with(test.field, test.value))
			if !bytes.Equal(created.body, read.body) || !bytes.Equal(created.body, replaced.body) {
				t.Errorf("created %.300s\nread %.300s\nreplaced %.300s", created.body, read.body, replaced.body)
			}
			var got map[string]json.RawMessage
			if err := json.Unmarshal(read.body, &got); err != nil || string(got[test.field]) != test.want {
				t.Errorf("%.300s, want %.300s (%v)", got[test.field], test.want, err)
			}
			if list := p.want(t, 200, "GET", "/properties/", "").body; !bytes.Contains(list, bytes.TrimSpace(read.body)) {
				t.Errorf("the list doesn't have %.300s", read.body)
			}
			var createdAt struct {
				T time.Time `json:"created_at"`
			}
			if err := json.Unmarshal(read.body, &createdAt); err != nil || time.Since(createdAt.T).Abs() > time.Hour || !strings.HasSuffix(string(got["created_at"]), `Z"`) {
				t.Errorf("created_at: %s (%v)", got["created_at"], err)
			}
		})
	}
}

// A path has one form, and a wrong one is 404; methods that aren't there are 405.
func TestPathsAndMethods(t *testing.T) {
	p := start(t, options{rows: 3})
	tests := []struct {
		method, path string
		status       int
		header, want string
	}{
		{"GET", "/properties/3/", 200, "Content-Type", "application/json"},
		{"HEAD", "/properties/3/", 200, "Content-Type", "application/json"},
		{"HEAD", "/properties/", 200, "Cache-Status", storedStatus},
		{"GET", "/properties/?page=2", 200, "Content-Type", "application/json"},
		{"GET", "/properties/4/", 404, "Content-Type", "application/problem+json"},
		{"GET", "/properties/0/", 404, "Content-Type", "application/problem+json"},
		{"GET", "/properties/-1/", 404, "", ""},
		{"GET", "/properties/+1/", 404, "", ""},
		{"GET", "/properties/01/", 404, "", ""},
		{"GET", "/properties/1.0/", 404, "", ""},
		{"GET", "/properties/1e0/", 404, "", ""},
		{"GET", "/properties/0x1/", 404, "", ""},
		{"GET", "/properties/1_0/", 404, "", ""},
		{"GET", "/properties/one/", 404, "", ""},
		{"GET", "/properties/%31/", 200, "", ""}, // the same path: %31 is 1
		{"GET", "/properties/1%20/", 404, "", ""},
		{"GET", "/properties/1%00/", 404, "", ""},
		{"GET", "/properties/%D9%A1/", 404, "", ""},
		{"GET", "/properties/1%2F/", 404, "", ""},
		{"GET", "/properties/9223372036854775807/", 404, "", ""},
		{"GET", "/properties/9223372036854775808/", 404, "", ""},
		{"GET", "/properties/99999999999999999999999/", 404, "", ""},
		{"PUT", "/properties/4/", 404, "", ""},
		{"PUT", "/properties/01/", 404, "", ""},
		{"DELETE", "/properties/4/", 404, "", ""},
		{"DELETE", "/properties/x/", 404, "", ""},
		{"GET", "/properties/1/2/", 404, "", ""},
		{"GET", "/", 404, "", ""},
		{"GET", "/properties", 307, "Location", "/properties/"},
		{"GET", "/properties/1", 307, "Location", "/properties/1/"},
		{"POST", "/properties", 307, "Location", "/properties/"},
		{"PUT", "/properties/1", 307, "Location", "/properties/1/"},
		{"GET", "/cache/metrics", 307, "Location", "/cache/metrics/"},
		{"DELETE", "/properties/", 405, "Allow", "GET, HEAD, POST"},
		{"PATCH", "/properties/", 405, "Allow", "GET, HEAD, POST"},
		{"OPTIONS", "/properties/", 405, "Allow", "GET, HEAD, POST"},
		{"POST", "/properties/1/", 405, "Allow", "DELETE, GET, HEAD, PUT"},
		{"PATCH", "/properties/1/", 405, "Allow", "DELETE, GET, HEAD, PUT"},
		{"POST", "/cache/metrics/", 405, "Allow", "GET, HEAD"},
	}
	for _, test := range tests {
		t.Run(test.method+" "+test.path, func(t *testing.T) {
			body := ""
			if test.method == "POST" || test.method == "PUT" {
				body = validProperty
			}
			e := p.want(t, test.status, test.method, test.path, body)
			if got := e.Header.Get(test.header); got != test.want {
				t.Errorf("%s: %s, want %s", test.header, got, test.want)
			}
			if test.method == "HEAD" && (len(e.body) > 0 || e.ContentLength <= 0) {
				t.Errorf("a body of %d bytes, Content-Length %d", len(e.body), e.ContentLength)
			}
		})
	}
	if keys, err := redis.Strings(p.redis.Do("KEYS", "*")); err != nil || len(keys) != 3 {
		t.Errorf("keys: %v (%v), want the page, the list and the fence", keys, err)
	}
}

// A body must say that it is JSON, and be no larger than 64 KiB.
func TestContentTypeAndSize(t *testing.T) {
	p := start(t, options{})
	for contentType, status := range map[string]int{
		"application/json": 201, "application/json; charset=utf-8": 201, "Application/JSON": 201, ` application/json ; a="b;c"`: 201,
		"": 415, "text/plain": 415, "application/x-www-form-urlencoded": 415, "multipart/form-data": 415, "application/jsonx": 415,
		"application/json; charset": 415, "application/json, text/plain": 415, "json": 415, "application/problem+json": 415, "*/*": 415,
	} {
		e := p.want(t, status, "POST", "/properties/", validProperty, "Content-Type", contentType)
		if status != 201 {
			checkProblem(t, e)
		}
	}
	body := with("description", `"`+strings.Repeat("a", maxBody)+`"`)
	checkProblem(t, p.want(t, 413, "POST", "/properties/", body))
	checkProblem(t, p.want(t, 413, "POST", "/properties/", strings.Repeat(" ", maxBody)+validProperty))
	padded := strings.Repeat(" ", maxBody-len(validProperty)) + validProperty
	p.want(t, 201, "POST", "/properties/", padded)
	checkProblem(t, p.want(t, 413, "POST", "/properties/", " "+padded))

	endless, err := http.NewRequest("POST", p.url+"/properties/", io.MultiReader(strings.NewReader(`{"title":"`), neverending('a')))
	if err != nil {
		t.Fatal(err)
	}
	endless.Header.Set("Content-Type", "application/json")
	response, err := client.Do(endless)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != 413 {
		t.Errorf("a body without an end: status %d", response.StatusCode)
	}
}

// neverending is a reader of one byte for ever.
type neverending byte

func (b neverending) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(b)
	}
	return len(p), nil
}

// PostgreSQL's own checks refuse what the program refuses, when somebody else writes.
func TestSchemaChecks(t *testing.T) {
	p := start(t, options{})
	const insert = `INSERT INTO properties (title, description, price, location) VALUES ($1, '', $2::text::numeric, $3)`
	tests := []struct {
		title, price, location string
		ok                     bool
	}{
		{"Loft", "1", "Accra", true},
		{"Loft", "99999999.99", "Accra", true},
		{"", "1", "Accra", false},
		{" \t\n\v\f\r\u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000", "1", "Accra", false},
		{"Loft", "1", "\u3000", false},
		{strings.Repeat("é", 201), "1", "Accra", false},
		{"Loft", "1", strings.Repeat("é", 101), false},
		{"Loft", "NaN", "Accra", false},
		{"Loft", "Infinity", "Accra", false},
		{"Loft", "-0.01", "Accra", false},
		{"Loft", "100000000", "Accra", false},
	}
	for _, test := range tests {
		if _, err := p.db.Exec(insert, test.title, test.price, test.location); (err == nil) != test.ok {
			t.Errorf("%+v: %v", test, err)
		}
	}
}

// proxyToPostgres is a network to PostgreSQL, and the settings to use it.
func proxyToPostgres(t *testing.T) (*proxy, *pgx.ConnConfig) {
	t.Helper()
	network := newProxy(t, fmt.Sprintf("%s:%d", services.database.Host, services.database.Port))
	config := services.database.Copy()
	config.Host, config.Fallbacks = "127.0.0.1", nil
	if _, err := fmt.Sscanf(network.addr, "127.0.0.1:%d", &config.Port); err != nil {
		t.Fatal(err)
	}
	return network, config
}

// While PostgreSQL is away, what is cached is served and the rest is 503; nothing of that is cached, and all
// is well when it is back.
func TestPostgresAway(t *testing.T) {
	network, config := proxyToPostgres(t)
	p := start(t, options{rows: 1, database: config})
	p.list(t, storedStatus)

	for _, f := range []fault{refused, swallow} {
		t.Run(f.String(), func(t *testing.T) {
			network.set(t, f)
			p.list(t, hitStatus)
			p.redis.Do("DEL", pageKey("/properties/", false))
			p.list(t, storedStatus) // from all_properties
			p.redis.Do("DEL", pageKey("/properties/", false), allPropertiesKey)
			var failures []<-chan exchange
			for _, request := range []string{"GET /properties/", "GET /properties/1/", "PUT /properties/1/", "POST /properties/", "DELETE /properties/1/", "GET /healthz"} {
				got := make(chan exchange, 1)
				failures = append(failures, got)
				go func() {
					method, path, _ := strings.Cut(request, " ")
					e, err := p.send(method, path, map[string]string{"POST": validProperty, "PUT": validProperty}[method])
					if err != nil || e.StatusCode != 503 {
						t.Errorf("%s: status %v (%v), want 503", request, e.Response, err)
					}
					got <- e
				}()
			}
			for i, got := range failures {
				if e := receive(t, got); i < 5 {
					checkProblem(t, e)
				}
			}
			if n, err := redis.Int(p.redis.Do("EXISTS", pageKey("/properties/", false), allPropertiesKey)); err != nil || n != 0 {
				t.Errorf("%d keys were filled with errors (%v)", n, err)
			}
			network.set(t, healthy)
			eventually(t, "the list is back", func() bool {
				e, err := p.send("GET", "/properties/", "")
				return err == nil && e.StatusCode == 200
			})
			p.list(t, hitStatus)
			if n := len(p.list(t, hitStatus)); n != 1 {
				t.Errorf("%d rows, want 1: a write that failed was applied", n)
			}
		})
	}
}

// A COMMIT that takes effect but whose answer is lost: the client learns of the doubt, and nobody reads
// the old list from a cache.
func TestUnknownOutcome(t *testing.T) {
	network, config := proxyToPostgres(t)
	p := start(t, options{database: config})
	p.list(t, storedStatus)
	network.muteAfter("commit")
	got := checkProblem(t, p.want(t, 503, "POST", "/properties/", titled("new")))
	if !strings.Contains(got.Detail, "may have been applied") {
		t.Errorf("detail: %s", got.Detail)
	}
	network.set(t, healthy)
	eventually(t, "PostgreSQL is back", func() bool { return p.db.Ping() == nil })
	if got := titles(p.list(t, storedStatus)); got != "new" {
		t.Errorf("the list has %q", got)
	}
}

// A table that somebody locks makes reads and writes wait, but nobody longer than the deadline; and a write
// that was answered with 503 doesn't happen later.
func TestLockedTable(t *testing.T) {
	p := start(t, options{rows: 1})
	p.list(t, storedStatus)
	lock, err := p.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock.Exec(`LOCK TABLE properties`); err != nil {
		t.Fatal(err)
	}
	p.list(t, hitStatus)
	write := make(chan exchange, 1)
	go func() {
		e, _ := p.send("POST", "/properties/", titled("late"))
		write <- e
	}()
	p.redis.Do("DEL", allPropertiesKey, pageKey("/properties/", false))
	checkProblem(t, p.want(t, 503, "GET", "/properties/", ""))
	if e := receive(t, write); e.Response == nil || e.StatusCode != 503 {
		t.Errorf("the write: %s", e.body)
	}
	if err := lock.Rollback(); err != nil {
		t.Fatal(err)
	}
	p.want(t, 201, "POST", "/properties/", titled("next")) // queues behind the late one, if there is one
	if got := p.list(t, storedStatus); len(got) != 2 || got[1].Title != "next" {
		t.Errorf("the list has %s", titles(got))
	}
}

// PostgreSQL without a connection to spare is a 503 for now.
func TestOutOfConnections(t *testing.T) {
	reset(t)
	admin := startAnother(t, options{})
	role := services.database.Database + "_poor"
	if _, err := admin.db.Exec(`CREATE ROLE ` + role + ` LOGIN PASSWORD 'x'; GRANT ALL ON SCHEMA public TO ` + role + `; GRANT ALL ON properties TO ` + role); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { admin.db.Exec(`DROP OWNED BY ` + role + ` CASCADE; DROP ROLE ` + role) })
	config := services.database.Copy()
	config.User, config.Password = role, "x"
	p := startAnother(t, options{database: config})
	t.Cleanup(func() { p.db.Close() })
	p.list(t, storedStatus)
	limit := func(n int) {
		if _, err := admin.db.Exec(fmt.Sprintf(`ALTER ROLE %s CONNECTION LIMIT %d`, role, n)); err != nil {
			t.Fatal(err)
		}
	}
	limit(0)
	p.db.SetMaxIdleConns(0) // so that the next request dials
	p.list(t, hitStatus)
	checkProblem(t, p.want(t, 503, "GET", "/properties/1/", ""))
	checkProblem(t, p.want(t, 503, "POST", "/properties/", validProperty))
	limit(-1)
	p.want(t, 201, "POST", "/properties/", validProperty)
}

// A client that hangs up in the middle of a write leaves nothing stale: the receivers run all the same.
func TestClientLeavesDuringWrite(t *testing.T) {
	p := start(t, options{})
	p.list(t, storedStatus)
	committed, resume := make(chan struct{}), make(chan struct{})
	send := p.properties.postSave
	p.properties.postSave = func(e saved) {
		committed <- struct{}{}
		<-resume
		send(e)
	}
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		r, _ := http.NewRequestWithContext(ctx, "POST", p.url+"/properties/", strings.NewReader(titled("new")))
		r.Header.Set("Content-Type", "application/json")
		_, err := client.Do(r)
		left <- err
	}()
	receive(t, committed)
	leave()
	if err := receive(t, left); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	resume <- struct{}{}
	eventually(t, "the list shows the row", func() bool { return titles(p.list(t, "redis")) == "new" })
}

// FuzzDecodeProperty: whatever decodes comes back from PostgreSQL as it was, byte for byte.
func FuzzDecodeProperty(f *testing.F) {
	for _, body := range []string{validProperty, `{}`, with("title", `"\ud83d\ude00"`), with("price", `0.1`), with("title", `"\ud83d"`), with("description", `"\\ud800\u0000"`)} {
		f.Add([]byte(body))
	}
	reset(f)
	db := stdlib.OpenDB(*services.database) // no Redis: the fuzzer's processes share it
	f.Cleanup(func() { db.Close() })
	if err := prepare(f.Context(), db, 0); err != nil {
		f.Fatal(err)
	}
	p := &properties{db: db, postSave: func(saved) {}}
	f.Fuzz(func(t *testing.T, body []byte) {
		sent, err := decodeProperty(body)
		if err != nil {
			return
		}
		var loose map[string]any
		if err := json.Unmarshal(body, &loose); err != nil || loose["title"] != sent.Title || loose["description"] != sent.Description || loose["location"] != sent.Location {
			t.Fatalf("%q was read as %+v (%v)", body, sent, err)
		}
		created, err := p.save(t.Context(), sent)
		if err != nil {
			t.Fatalf("PostgreSQL refuses %+v: %v", sent, err)
		}
		kept, err := p.get(t.Context(), created.ID)
		sent.ID, sent.CreatedAt = created.ID, created.CreatedAt
		if err != nil || kept != sent || created != sent {
			t.Fatalf("sent %+v, kept %+v (%v)", sent, kept, err)
		}
	})
}

// FuzzParsePrice: a price that parses is the number that was written, with two decimals and within bounds.
func FuzzParsePrice(f *testing.F) {
	for _, s := range []string{"0", "1.5", "99999999.99", "-0", "1e2", "007", "1.000", "NaN"} {
		f.Add(s)
	}
	highest, _ := new(big.Rat).SetString("99999999.99")
	f.Fuzz(func(t *testing.T, s string) {
		p, ok := parsePrice(s)
		if !ok {
			return
		}
		written, ok1 := new(big.Rat).SetString(s)
		parsed, ok2 := new(big.Rat).SetString(string(p))
		if !ok1 || !ok2 || written.Cmp(parsed) != 0 || parsed.Sign() < 0 || parsed.Cmp(highest) > 0 || string(p) != parsed.FloatString(2) {
			t.Errorf("%q is read as %q", s, p)
		}
	})
}

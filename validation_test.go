// validation_test.go: what a client may send. Tables without a server come first, then a few rows
// over HTTP and through PostgreSQL.

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
)

// A property is read, or refused with every wrong field named at once.
func TestDecodeProperty(t *testing.T) {
	deep := strings.Repeat(`[`, 9000) + strings.Repeat(`]`, 9000)
	tests := []struct{ about, body, wrong string }{
		{"a property", with(``), ""},
		{"what GET answered with", with(`"id":1,"created_at":"2026-01-02T03:04:05.678901Z"`), ""},
		{"id and created_at of any kind", with(`"id":"x","created_at":null`), ""},
		{"a byte order mark", "\ufeff" + with(``), ""},
		{"a name twice: the last one counts", with(`"title":1,"title":"Loft"`), ""},
		{"an escaped name", with(`"\u0074itle":"Loft"`), ""},

		{"arrays in arrays", with(`"title":` + deep), "title"},
		{"no field", `{}`, "description location price title"},
		{"a name twice, the last one wrong", with(`"title":"Loft","title":""`), "title"},
		{"an unknown field", with(`"colour":"red"`), "colour"},
		{"a field without a name", with(`"":1,"é":2`), " é"},
		{"a field in another case", with(`"Title":"Loft"`), "Title"},
		{"wrong fields of every kind", `{"title":"","price":"x","location":1,"ID":1}`,
			"ID description location price title"},
	}
	for _, test := range tests {
		_, err := decodeProperty([]byte(test.body))
		wrong := ""
		if refusal, refused := errors.AsType[*problem](err); refused {
			wrong = strings.Join(slices.Sorted(maps.Keys(refusal.Errors)), " ")
		}
		if wrong != test.wrong || (err == nil) != (wrong == "") {
			t.Errorf("%s: %q is wrong, want %q (%v)", test.about, wrong, test.wrong, err)
		}
	}
}

// What isn't one JSON object in UTF-8 is refused as a whole.
func TestNotAnObject(t *testing.T) {
	for _, body := range []string{
		``, `loft`, `null`, `[` + with(``) + `]`, with(``) + `{}`, "\ufeff\ufeff" + with(``),
		with("\"title\":\"\xff\""), strings.Repeat(`[`, 60000),
		// A surrogate.
		with("\"title\":\"\xed\xa0\x80\""),
	} {
		_, err := decodeProperty([]byte(body))
		if got := fmt.Sprint(err); got != "The body is not one valid JSON object in UTF-8." {
			t.Errorf("%.100q: %s", body, got)
		}
	}
}

// A text is a JSON string. Its length is in characters, and blanks are Unicode's.
func TestReadText(t *testing.T) {
	of := func(character string, n int) string { return `"` + strings.Repeat(character, n) + `"` }
	tests := []struct{ about, raw, want, wrong string }{
		{"blanks around are kept", `" ab\t"`, " ab\t", ""},
		{"5 characters of 4 bytes", of("😀", 5), "😀😀😀😀😀", ""},
		{"a pair", `"\ud83d\ude00"`, "😀", ""},
		{"half a pair", `"\ud83d"`, "\ufffd", ""},
		{"a space that is not blank", `"\u200b"`, "\u200b", ""},

		{"nothing", ``, "", "is required"},
		{"null", `null`, "", "must be a string"},
		{"a number", `1`, "", "must be a string"},
		{"an object", `{"en":"Loft"}`, "", "must be a string"},
		{"empty", `""`, "", "must not be blank"},
		{"blank", `" \t\r\n\u000b\f"`, "", "must not be blank"},
		{"Unicode's blanks", `"\u00a0\u2003\u3000\u0085\u2028"`, "", "must not be blank"},
		{"6 letters", of("é", 6), "", "must not be longer than 5 characters"},
		{"5 letters and a blank", `"Lofty "`, "", "must not be longer than 5 characters"},
		{"U+0000", `"a\u0000b"`, "", "must not contain U+0000"},
	}
	for _, test := range tests {
		var raw json.RawMessage
		if test.raw != "" {
			raw = json.RawMessage(test.raw)
		}
		var got string
		wrong := readText(raw, &got, 1, 5)
		if wrong != test.wrong || wrong == "" && got != test.want {
			t.Errorf("%s: %q %s, want %q %s", test.about, got, wrong, test.want, test.wrong)
		}
	}
	var empty string
	if wrong := readText(json.RawMessage(`""`), &empty, 0, 5); wrong != "" {
		t.Errorf("empty, which a description may be: %s", wrong)
	}
}

// A price is a decimal in JSON's form, as a string or a number, and comes out with two decimals.
func TestReadPrice(t *testing.T) {
	for raw, want := range map[string]string{
		`0`: "0.00", `"0.0"`: "0.00", `0.01`: "0.01", `1234.5`: "1234.50", `"1234"`: "1234.00",
		// No float holds this one.
		`0.29`:     "0.29",
		`"\u0031"`: "1.00", `99999999.99`: "99999999.99", `"99999999.99"`: "99999999.99",
	} {
		var got string
		if wrong := readPrice(json.RawMessage(raw), &got); wrong != "" || got != want {
			t.Errorf("%s is read as %q %s, want %q", raw, got, wrong, want)
		}
	}
	for _, raw := range []string{
		`null`, `true`, `""`, `" "`, `[]`, `{}`, `[1]`, `-1`, `"-1"`, `-0`, `"-0"`, `"-0.00"`,
		`"+1"`, `100000000`, `"100000000"`, `99999999.995`, `1.000`, `"1.000"`, `"0.001"`, `1e2`,
		`"1e2"`, `1E2`, `1e-2`, `"NaN"`, `"Infinity"`, `"-Infinity"`, `"inf"`, `"1."`, `".5"`,
		`"."`, `"007"`, `"00"`, `"0x10"`, `"1_000"`, `"1,000"`, `"1,5"`, `" 1"`, `"1 "`, `"1\n"`,
		`"1.5.5"`, `"١٢"`, `"１"`, `"$1"`, `"1\u0000"`, `"\ud83d"`,
	} {
		var got string
		wrong := readPrice(json.RawMessage(raw), &got)
		if !strings.Contains(wrong, "from 0 to 99999999.99") {
			t.Errorf("%s is read as %q %s", raw, got, wrong)
		}
	}
	if wrong := readPrice(nil, new(string)); wrong != "is required" {
		t.Errorf("no price %s", wrong)
	}
}

// An id has one form, so each property has one path.
func TestByID(t *testing.T) {
	var got int64
	detail := byID(func(_ http.ResponseWriter, _ *http.Request, id int64) error {
		got = id
		return nil
	})
	for text, want := range map[string]int64{
		"1": 1, "9223372036854775807": 1<<63 - 1,
		"0": 0, "-1": 0, "+1": 0, "01": 0, "1.0": 0, "1e0": 0, "0x1": 0, "1_0": 0, "one": 0,
		"": 0, "1 ": 0, "1\x00": 0, "1/": 0, "١": 0, "9223372036854775808": 0,
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.SetPathValue("id", text)
		got = 0
		err := detail(nil, r)
		if got != want || (err == errNotFound) != (want == 0) {
			t.Errorf("%q is the id %d (%v), want %d", text, got, err, want)
		}
	}
}

// Who names gzip, or *, without the quality 0 accepts it.
func TestAcceptsGzip(t *testing.T) {
	for header, want := range map[string]bool{
		"": false, "br": false, "gzipped": false, "identity": false, ",,": false,
		"gzip": true, "GZIP": true, "deflate, gzip, br": true, "br\ngzip": true,
		"gzip;q=1.0": true, "deflate,gzip;q=0.5": true, "gzip ; q=0.001": true,
		"gzip;q=0": false, "gzip;q=0.000": false, "GZIP;Q=0": false,
		"*": true, "br, *;q=0.1": true, "*;q=0": false,
		"gzip;q=0, *": false, "*;q=0, gzip": true, "identity;q=0, *": true,
	} {
		got := acceptsGzip(http.Header{"Accept-Encoding": strings.Split(header, "\n")})
		if got != want {
			t.Errorf("%q: %v, want %v", header, got, want)
		}
	}
}

// If-None-Match names a tag weakly or strongly, alone or in a list; * does only alone.
func TestNamesTag(t *testing.T) {
	for header, want := range map[string]bool{
		"": false, `*`: true, `"a"`: true, `W/"a"`: true, ` "b" , W/"a"`: true,
		"\"b\"\n\"a\"": true,
		`a`:            false, `"A"`: false, `"b"`: false, `w/"a"`: false,
		`"b", *`: false, `"b,*,c"`: false,
	} {
		if got := namesTag(strings.Split(header, "\n"), `"a"`); got != want {
			t.Errorf("%q: %v, want %v", header, got, want)
		}
	}
}

// FuzzReadPrice: a price that is read is the number that was written, with two decimals.
func FuzzReadPrice(f *testing.F) {
	for _, s := range []string{"0", "1.5", "99999999.99", "-0", "1e2", "007", "1.000", "NaN"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var price string
		raw, err := json.Marshal(s)
		if err != nil || readPrice(raw, &price) != "" {
			return
		}
		number, ok := new(big.Rat).SetString(s)
		if !ok || number.FloatString(2) != price || len(price) > len("99999999.99") {
			t.Errorf("%q is read as %q", s, price)
		}
	})
}

// FuzzDecodeProperty: what is read comes back from PostgreSQL as it was, byte for byte.
func FuzzDecodeProperty(f *testing.F) {
	for _, more := range []string{``, `"title":"\ud83d\ude00"`, `"title":"\ud83d"`, `"price":0.1`,
		`"description":"\\ud800\u0000"`} {
		f.Add([]byte(with(more)))
	}
	reset(f)
	// There is no Redis, because the fuzzer's processes would share it.
	db := openDB(services.database, 16)
	f.Cleanup(func() { db.Close() })
	if err := prepare(f.Context(), db, 0); err != nil {
		f.Fatal(err)
	}
	model := &properties{db: db, signals: &signals{}}
	f.Fuzz(func(t *testing.T, body []byte) {
		sent, err := decodeProperty(body)
		if err != nil {
			return
		}
		kept, err := model.save(sent)
		sent.ID, sent.CreatedAt = kept.ID, kept.CreatedAt
		if err != nil || kept != sent {
			t.Fatalf("sent %+v, kept %+v (%v)", sent, kept, err)
		}
	})
}

// A refused property is a problem that names each wrong field, and nothing of it is stored.
func TestRefusedOverHTTP(t *testing.T) {
	p := start(t, options{rows: 1})
	before := p.want(t, 200, "GET", propertiesPath, "").body
	title, location := strings.Repeat("😀", 201), strings.Repeat("é", 101)
	tests := []struct{ body, errors string }{
		{`[]`, `map[]`},
		{with(`"title":"` + title + `"`), `map[title:must not be longer than 200 characters]`},
		{with(`"location":"` + location + `"`),
			`map[location:must not be longer than 100 characters]`},
		{with(`"price":-1`), `map[price:must be from 0 to 99999999.99, ` +
			`with at most two decimals, such as "1250.00"]`},
		{with(`"title":" ","colour":"red"`),
			`map[colour:is not a field that can be set title:must not be blank]`},
	}
	for _, test := range tests {
		// POST and PUT.
		for _, r := range writes[:2] {
			got := checkProblem(t, p.want(t, 400, r.method, r.path, test.body))
			if errors := fmt.Sprint(got.Errors); errors != test.errors {
				t.Errorf("errors: %s, want %s", errors, test.errors)
			}
		}
	}
	if after := p.want(t, 200, "GET", propertiesPath, "").body; string(after) != string(before) {
		t.Errorf("the list has changed: %s", after)
	}
}

// What is accepted comes back as it was sent, from every view, and a client can PUT what it got.
func TestAcceptedOverHTTP(t *testing.T) {
	p := start(t, options{})
	tests := []struct{ about, sent, want string }{
		{"200 characters of 4 bytes", `"title":"` + strings.Repeat("😀", 200) + `"`, ""},
		{"60,000 characters", `"description":"` + strings.Repeat("a", 60000) + `"`, ""},
		{"HTML", `"description":"<b> & 'c'"`, ""},
		{"SQL", `"description":"'; DROP TABLE properties; --"`, ""},
		{"lines", `"description":"a\r\nb\u2028c"`, ""},
		{"right to left", `"location":"القاهرة"`, ""},
		{"half a pair", `"title":"\ud83d"`, `"title":"�"`},
		{"a number for a price", `"price":0.5`, `"price":"0.50"`},
	}
	for _, test := range tests {
		created := p.want(t, 201, "POST", propertiesPath, with(test.sent))
		path, want := created.Header.Get("Location"), string(created.body)
		replaced := p.want(t, 200, "PUT", path, want).body
		read := p.want(t, 200, "GET", path, "").body
		list := p.want(t, 200, "GET", propertiesPath, "").body
		if string(replaced) != want || string(read) != want ||
			!strings.Contains(string(list), strings.TrimSpace(want)) {
			t.Errorf("%s: created %s, replaced %s, read %s", test.about, want, replaced, read)
		}
		if !strings.Contains(want, cmp.Or(test.want, test.sent)) {
			t.Errorf("%s: sent %s, got %s", test.about, test.sent, want)
		}
	}
}

// PostgreSQL's own checks stop everybody else.
func TestSchemaChecks(t *testing.T) {
	p := start(t, options{})
	for values, accepted := range map[string]bool{
		`'Loft', 99999999.99, 'Accra', '0001-01-01 00:00Z'`: true,
		`'Loft', 0, 'Accra', '9999-12-31 23:59:59.999999Z'`: true,
		`' ', 1, 'Accra', now()`:                            false,
		`'Loft', 1, ' ', now()`:                             false,
		`repeat('é', 201), 1, 'Accra', now()`:               false,
		`'Loft', 1, repeat('é', 101), now()`:                false,
		`'Loft', 'NaN', 'Accra', now()`:                     false,
		`'Loft', 'Infinity', 'Accra', now()`:                false,
		`'Loft', -0.01, 'Accra', now()`:                     false,
		`'Loft', 100000000, 'Accra', now()`:                 false,
		`'Loft', 1, 'Accra', 'infinity'`:                    false,
		`'Loft', 1, 'Accra', '-infinity'`:                   false,
		`'Loft', 1, 'Accra', '10000-01-01 00:00Z'`:          false,
		`'Loft', 1, 'Accra', '0001-12-31 23:59:59Z BC'`:     false,
	} {
		_, err := p.db.Exec(`INSERT INTO properties
			(title, price, location, created_at, description) VALUES (` + values + `, '')`)
		if (err == nil) != accepted {
			t.Errorf("%s: %v", values, err)
		}
	}
	p.want(t, 200, "GET", propertiesPath, "")
}

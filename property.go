// property.go: the model, its SQL and its views. Django: models.py and views.py.
//
// Nothing here calls the cache: listView gets its list from a function, and a write ends in a
// signal. But what may be cached says what it has seen, in the header Snapshot.

package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgconn"
)

const (
	propertiesPath = "/properties/"

	// queryTimeout is what a read or a write may take in PostgreSQL.
	queryTimeout = 4 * time.Second

	// maxBody is how many bytes a client's property may have, as JSON.
	maxBody = 64 << 10

	// columns are in the order of query's fields. A new one also needs its place in property, in
	// both statements of save (where the id comes last), in decodeProperty, in schema.sql (the
	// table, its shape, the seed), and in with of harness_test.go. The entries of the version
	// before lack it: see docs/operations.md.
	columns = `id, title, description, price, location,
		to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')`

	// returning is what every write returns: the name of its transaction, and the row.
	returning = ` RETURNING properties_server(), pg_current_xact_id()::text::bigint, ` + columns
)

// A property is one listing: a row of schema.sql, and an object of the API.
type property struct {
	ID          int64  `json:"id"`
	Title       string `json:"title"`
	Description string `json:"description"`
	// A decimal such as "1234.50". It is text all the way, so that no float rounds it.
	Price     string `json:"price"`
	Location  string `json:"location"`
	CreatedAt string `json:"created_at"`
}

// properties is the model's manager and its views. Django: Property.objects, and views.py.
type properties struct {
	db *sql.DB
	// list returns all properties as a JSON array, and what it has seen.
	list    func() (*entry, error)
	signals *signals
}

// query returns the properties that a statement returns. What it returns before them goes to more.
func query(ctx context.Context, run func(context.Context, string, ...any) (*sql.Rows, error),
	statement string, args []any, more ...any) ([]property, error) {
	rows, err := run(ctx, statement, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var p property
	fields := append(more, &p.ID, &p.Title, &p.Description, &p.Price, &p.Location, &p.CreatedAt)
	// Not nil, because an empty table is [] in JSON.
	list := []property{}
	for rows.Next() {
		if err := rows.Scan(fields...); err != nil {
			return nil, fmt.Errorf("%w: scan property: %w", errInternal, err)
		}
		list = append(list, p)
	}
	return list, rows.Err()
}

// save inserts p if it has no id yet, else replaces that row, and returns the row.
func (s *properties) save(p property) (property, error) {
	args := []any{p.Title, p.Description, p.Price, p.Location}
	if p.ID != 0 {
		return s.write(&s.signals.postSave, false, `UPDATE properties
			SET title = $1, description = $2, price = $3::numeric, location = $4
			WHERE id = $5`, append(args, p.ID)...)
	}
	return s.write(&s.signals.postSave, true, `INSERT INTO properties
		(title, description, price, location) VALUES ($1, $2, $3::numeric, $4)`, args...)
}

// write runs one statement in a transaction, sends the signal, and returns the row; errNotFound if
// there is none.
//
//   - The client leaves: the write goes on, so a committed row always gets its signal.
//   - The statement fails, or is late: COMMIT isn't sent, so nothing was changed. (A statement
//     without BEGIN could still take effect after we have given it up.)
//   - COMMIT was sent and not confirmed: errInDoubt.
func (s *properties) write(on *signal, created bool, statement string, args ...any) (
	p property, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), queryTimeout)
	defer cancel()
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return p, err
	}
	// It does nothing after Commit.
	defer tx.Rollback()
	c := change{created: created}
	list, err := query(ctx, tx.QueryContext, statement+returning, args,
		&c.write.server, &c.write.id)
	switch {
	case err != nil:
		return p, err
	case len(list) == 0 && created:
		return p, fmt.Errorf("%w: INSERT returned no row: does a BEFORE trigger drop it?",
			errInternal)
	case len(list) == 0:
		return p, errNotFound
	}
	c.property = list[0]
	err = tx.Commit()
	if err == nil {
		on.send(c)
		return c.property, nil
	}
	if notCommitted(ctx, err) {
		return p, err
	}
	s.signals.inDoubt.send(c)
	return p, fmt.Errorf("%w: %w", errInDoubt, err)
}

// notCommitted reports whether Commit's error proves that nothing was changed.
func notCommitted(ctx context.Context, err error) bool {
	// database/sql returns these two when it has not sent COMMIT.
	if err == ctx.Err() || err == sql.ErrTxDone {
		return true
	}
	// ERROR is a refusal, such as a deferred constraint's. FATAL only ends the connection.
	refusal, refused := errors.AsType[*pgconn.PgError](err)
	return refused && refusal.SeverityUnlocalized == "ERROR"
}

// allView answers with all properties, ordered by id, from PostgreSQL. all_properties caches it.
//
// r is not a client's: its context has the time limit of the call that fills the cache.
func (s *properties) allView(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), queryTimeout)
	defer cancel()
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	var seen string
	var list []property
	// The snapshot comes first: the rows may have seen more than it says, but never less.
	err = tx.QueryRowContext(ctx, `SELECT properties_snapshot()`).Scan(&seen)
	if err == nil {
		list, err = query(ctx, tx.QueryContext,
			`SELECT `+columns+` FROM properties ORDER BY id`, nil)
	}
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	// A cached view must say what it has seen. No client gets this header.
	w.Header().Set("Snapshot", seen)
	w.Write(encode(list))
	return nil
}

// listView answers GET /properties/. cachePage caches it.
func (s *properties) listView(w http.ResponseWriter, r *http.Request) error {
	all, err := s.list()
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Snapshot", all.header.Get("Snapshot"))
	w.Write(all.body)
	return nil
}

// byID gives a view the id in the path. Django: <int:pk>. It refuses "01" and "+1", so that each
// property has one path.
func byID(v func(w http.ResponseWriter, r *http.Request, id int64) error) view {
	return func(w http.ResponseWriter, r *http.Request) error {
		text := r.PathValue("id")
		id, err := strconv.ParseInt(text, 10, 64)
		if err != nil || id < 1 || strconv.FormatInt(id, 10) != text {
			return errNotFound
		}
		return v(w, r, id)
	}
}

// detailView isn't cached: a primary-key read costs what a look-up in Redis costs.
func (s *properties) detailView(w http.ResponseWriter, r *http.Request, id int64) error {
	// Not the request's context, which ends when the client closes its sending side.
	ctx, cancel := context.WithTimeout(context.Background(), queryTimeout)
	defer cancel()
	list, err := query(ctx, s.db.QueryContext,
		`SELECT `+columns+` FROM properties WHERE id = $1`, []any{id})
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return errNotFound
	}
	return writeJSON(w, 200, "application/json", list[0])
}

// createView answers POST /properties/ with 201, the row, and where it is.
func (s *properties) createView(w http.ResponseWriter, r *http.Request) error {
	p, err := readProperty(w, r)
	if err != nil {
		return err
	}
	if p, err = s.save(p); err != nil {
		return err
	}
	w.Header().Set("Location", fmt.Sprintf("%s%d/", propertiesPath, p.ID))
	return writeJSON(w, 201, "application/json", p)
}

// replaceView answers PUT with the row.
func (s *properties) replaceView(w http.ResponseWriter, r *http.Request, id int64) error {
	p, err := readProperty(w, r)
	if err != nil {
		return err
	}
	p.ID = id
	if p, err = s.save(p); err != nil {
		return err
	}
	return writeJSON(w, 200, "application/json", p)
}

// deleteView answers DELETE with 204.
func (s *properties) deleteView(w http.ResponseWriter, r *http.Request, id int64) error {
	_, err := s.write(&s.signals.postDelete, false, `DELETE FROM properties WHERE id = $1`, id)
	if err != nil {
		return err
	}
	w.WriteHeader(204)
	return nil
}

// readProperty reads the client's property; its error is the *problem to answer with.
func readProperty(w http.ResponseWriter, r *http.Request) (p property, err error) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" {
		return p, refuse(415, "Send Content-Type: application/json.")
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return p, refuse(413, "The body is over 64 KiB.")
	}
	if err != nil {
		return p, refuse(400, "The body could not be read to its end.")
	}
	return decodeProperty(body)
}

// decodeProperty reports every wrong field at once. It reads a map, because encoding/json would
// take "Title" for a struct's title.
func decodeProperty(body []byte) (p property, err error) {
	body = bytes.TrimPrefix(body, []byte("\ufeff"))
	var fields map[string]json.RawMessage
	if !utf8.Valid(body) || json.Unmarshal(body, &fields) != nil || fields == nil {
		return p, refuse(400, "The body is not one valid JSON object in UTF-8.")
	}
	wrong := map[string]string{
		"title":       readText(fields["title"], &p.Title, 1, 200),
		"description": readText(fields["description"], &p.Description, 0, maxBody),
		"price":       readPrice(fields["price"], &p.Price),
		"location":    readText(fields["location"], &p.Location, 1, 100),
		// The database's own: ignored, so that a client can PUT what it got.
		"id":         "",
		"created_at": "",
	}
	for field := range fields {
		if _, ok := wrong[field]; !ok {
			wrong[field] = "is not a field that can be set"
		}
	}
	maps.DeleteFunc(wrong, func(_, problem string) bool { return problem == "" })
	if len(wrong) > 0 {
		refusal := refuse(400, "The property is refused; errors says why.")
		refusal.Errors = wrong
		return p, refusal
	}
	return p, nil
}

// readText reads a JSON string that has, in characters, least (without the blanks around it) to
// most, and returns what is wrong.
func readText(raw json.RawMessage, text *string, least, most int) (wrong string) {
	err := json.Unmarshal(raw, text)
	switch {
	case raw == nil:
		return "is required"
	case err != nil || string(raw) == "null":
		return "must be a string"
	case strings.Contains(*text, "\x00"):
		return "must not contain U+0000"
	case utf8.RuneCountInString(strings.TrimSpace(*text)) < least:
		return "must not be blank"
	case utf8.RuneCountInString(*text) > most:
		return fmt.Sprintf("must not be longer than %d characters", most)
	}
	return ""
}

// priceForm is JSON's form of a number, without sign and exponent.
var priceForm = regexp.MustCompile(`^(0|[1-9][0-9]{0,7})(?:\.([0-9]{1,2}))?$`)

// readPrice reads a JSON string or number, and returns what is wrong.
func readPrice(raw json.RawMessage, price *string) (wrong string) {
	if raw == nil {
		return "is required"
	}
	// It takes either, and stays empty if raw is no number.
	var number json.Number
	json.Unmarshal(raw, &number)
	parts := priceForm.FindStringSubmatch(string(number))
	if parts == nil {
		return `must be from 0 to 99999999.99, with at most two decimals, such as "1250.00"`
	}
	decimals := parts[2] + "00"
	*price = parts[1] + "." + decimals[:2]
	return ""
}

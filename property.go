// property.go: the model, its SQL, its views and its validation. Django: models.py and views.py.
//
// No cache here: listView reads through getAll, a write ends in a signal. On a first reading, stop at "type problem".

package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgconn"
)

const (
	answerTimeout  = 4 * time.Second        // what a request may wait for PostgreSQL. A client has its answer, if only a 503, within 5 s.
	pingTimeout    = 500 * time.Millisecond // for a ping to PostgreSQL
	propertiesPath = "/properties/"
	maxBody        = 64 << 10 // bytes in the body of a POST or PUT
	columns        = `id, title, description, price, location, created_at`
	returning      = ` RETURNING ` + columns + `, concat(pg_current_xact_id(), '@', extract(epoch FROM now()))` // named as in the trigger
)

// A property is one listing: a row of schema.sql, and an object of the API.
type property struct {
	ID          int64     `json:"id"`
	Title       string    `json:"title"`
	Description string    `json:"description"`
	Price       price     `json:"price"`
	Location    string    `json:"location"`
	CreatedAt   time.Time `json:"created_at"`
}

// A price has two decimals, "1234.50", and is text from PostgreSQL's numeric to the client's JSON: no float rounds it.
type price string

// A change is a committed write, as signals carry it. Django: the instance and created of post_save.
type change struct {
	property    property
	created     bool   // inserted, and not replaced or deleted
	transaction string // the name by which schema.sql's trigger announces it
}

// properties is the model's manager and its views. Django: Property.objects, and the functions of views.py.
type properties struct {
	db                   *sql.DB
	getAll               func() ([]byte, error) // all properties as a JSON array: getAllProperties in cache.go
	postSave, postDelete func(change)           // the signals, sent between the commit and the answer: see signals.go
}

// scan reads one row: the columns, and into more what else the statement returns; errNotFound if there is no row.
func scan(row interface{ Scan(...any) error }, more ...any) (p property, err error) {
	err = row.Scan(append([]any{&p.ID, &p.Title, &p.Description, &p.Price, &p.Location, &p.CreatedAt}, more...)...)
	if errors.Is(err, sql.ErrNoRows) {
		err = errNotFound
	}
	p.CreatedAt = p.CreatedAt.UTC() // the driver gives local time
	return p, err
}

// all reads every property, ordered by id.
func (s *properties) all(ctx context.Context) ([]property, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT `+columns+` FROM properties ORDER BY id`)
	if err != nil {
		return nil, fmt.Errorf("select properties: %w", err)
	}
	defer rows.Close()
	list := []property{} // not nil: an empty table is [] in JSON, not null
	for rows.Next() {
		p, err := scan(rows)
		if err != nil {
			return nil, fmt.Errorf("%w: scan property: %w", errInternal, err)
		}
		list = append(list, p)
	}
	return list, rows.Err()
}

// save inserts p if it has no id yet, else replaces that row (errNotFound if there is none), and returns the row.
func (s *properties) save(p property) (property, error) {
	statement := `INSERT INTO properties (title, description, price, location) VALUES ($1, $2, $3::numeric, $4)`
	args := []any{p.Title, p.Description, string(p.Price), p.Location}
	if p.ID != 0 {
		statement = `UPDATE properties SET title = $1, description = $2, price = $3::numeric, location = $4 WHERE id = $5`
		args = append(args, p.ID)
	}
	return s.write(s.postSave, p.ID == 0, statement, args...)
}

// write runs one statement in a transaction of its own, sends the signal, and returns the row that was written.
//
//   - The client leaves: the write goes on, so that a committed row always gets its signal.
//   - The statement fails or outlasts the deadline, so COMMIT isn't sent, or PostgreSQL refuses it: nothing was changed.
//   - COMMIT was sent and not confirmed: errUnknown. If it took effect, its announcement still comes.
func (s *properties) write(signal func(change), created bool, statement string, args ...any) (property, error) {
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
	defer cancel()
	tx, err := s.db.BeginTx(ctx, nil) // a lone statement could still take effect after its deadline
	if err != nil {
		return property{}, fmt.Errorf("begin: %w", err)
	}
	defer tx.Rollback() // does nothing after Commit
	c := change{created: created}
	if c.property, err = scan(tx.QueryRowContext(ctx, statement+returning, args...), &c.transaction); err != nil {
		return property{}, err
	}
	if err = tx.Commit(); err == nil {
		signal(c)
		return c.property, nil
	}
	// PostgreSQL refuses with ERROR (FATAL only ends the connection). The last two mean that COMMIT was never sent.
	refusal, refused := errors.AsType[*pgconn.PgError](err)
	if refused && refusal.SeverityUnlocalized == "ERROR" || err == ctx.Err() || err == sql.ErrTxDone {
		return property{}, fmt.Errorf("commit: %w", err)
	}
	return property{}, fmt.Errorf("%w: %w", errUnknown, err)
}

// A view answers a request, or returns the error to answer with. Django: a view raises Http404 and the like.
type view func(http.ResponseWriter, *http.Request) error

// ServeHTTP also turns a panic into an answer: net/http would only hang up.
func (v view) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := safely(func() error { return v(w, r) }); err != nil {
		writeError(w, r, err)
	}
}

// listView answers GET /properties/. cachePage wraps it, so it sees nothing of the client's request.
func (s *properties) listView(w http.ResponseWriter, r *http.Request) error {
	list, err := s.getAll()
	if err == nil {
		w.Header().Set("Content-Type", "application/json")
		w.Write(list)
	}
	return err
}

// byID gives a view the id in the path. Django: <int:pk>. It refuses "01" and "+1", so each property has one path.
func byID(v func(w http.ResponseWriter, r *http.Request, id int64) error) view {
	return func(w http.ResponseWriter, r *http.Request) error {
		id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
		if err != nil || id < 1 || strconv.FormatInt(id, 10) != r.PathValue("id") {
			return errNotFound
		}
		return v(w, r, id)
	}
}

// detailView answers GET /properties/{id}/. It isn't cached: a primary-key read costs what a look-up in Redis costs.
func (s *properties) detailView(w http.ResponseWriter, r *http.Request, id int64) error {
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout) // r's would end when the client closes its sending side, though it still reads
	defer cancel()
	p, err := scan(s.db.QueryRowContext(ctx, `SELECT `+columns+` FROM properties WHERE id = $1`, id))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, "application/json", p)
}

// createView answers POST, replaceView PUT. They differ in the id, the status and the Location.
func (s *properties) createView(w http.ResponseWriter, r *http.Request) error {
	return s.replaceView(w, r, 0)
}

func (s *properties) replaceView(w http.ResponseWriter, r *http.Request, id int64) error {
	p, err := readProperty(w, r)
	if err != nil {
		return err
	}
	p.ID = id
	if p, err = s.save(p); err != nil {
		return err
	}
	if id > 0 {
		return writeJSON(w, http.StatusOK, "application/json", p)
	}
	w.Header().Set("Location", fmt.Sprintf("%s%d/", propertiesPath, p.ID))
	return writeJSON(w, http.StatusCreated, "application/json", p)
}

func (s *properties) deleteView(w http.ResponseWriter, r *http.Request, id int64) error {
	_, err := s.write(s.postDelete, false, `DELETE FROM properties WHERE id = $1`, id)
	if err == nil {
		w.WriteHeader(http.StatusNoContent)
	}
	return err
}

// A problem is the answer to a request that fails, as RFC 9457 has it, and the error that leads to it.
type problem struct {
	Type   string            `json:"type"`
	Title  string            `json:"title"`
	Status int               `json:"status"`
	Detail string            `json:"detail"`
	Errors map[string]string `json:"errors,omitempty"` // field → what is wrong with it
}

func refuse(status int, detail string) *problem                     { return &problem{Status: status, Detail: detail} }
func (p *problem) Error() string                                    { return p.Detail }
func (p *problem) ServeHTTP(w http.ResponseWriter, r *http.Request) { writeError(w, r, p) }

var (
	errNotFound = refuse(http.StatusNotFound, "There is no such property.")
	errUnknown  = refuse(http.StatusServiceUnavailable, "The database did not confirm the write: it may have been applied. Look before you repeat it.")
	errInternal = refuse(http.StatusInternalServerError, "Something is wrong on our side.")
)

// safely runs f and turns a panic into an error, with the stack for the log.
func safely(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: panic: %v\n%s", errInternal, p, debug.Stack())
		}
	}()
	return f()
}

// writeError is the only place where an error becomes an answer: the client learns what it did wrong, the log why. The
// status is 503 if a later try may succeed, as it may after an error of a connection or a deadline.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	answer := *refuse(http.StatusServiceUnavailable, "The database does not answer: nothing was done. Try again.")
	p, ok := errors.AsType[*problem](err)
	refusal, refused := errors.AsType[*pgconn.PgError](err)
	switch {
	case ok:
		answer = *p
	case refused && strings.HasPrefix(refusal.Code, "23"): // integrity constraint violation
		answer = *refuse(http.StatusConflict, "The database refuses this: it would break one of its constraints.")
	case refused && !mayPass(refusal.Code):
		answer = *errInternal
	}
	if answer.Status >= 500 || answer.Status == http.StatusConflict {
		slog.Error("request failed", "method", r.Method, "path", r.URL.Path, "status", answer.Status, "err", err)
	}
	if answer.Status == http.StatusServiceUnavailable && !errors.Is(err, errUnknown) {
		w.Header().Set("Retry-After", "1") // second
	}
	answer.Type, answer.Title = "about:blank", http.StatusText(answer.Status)
	writeJSON(w, answer.Status, "application/problem+json", answer)
}

// mayPass reports whether a later try may succeed, by the class of PostgreSQL's SQLSTATE: connections, transaction states,
// rollbacks, resources, locks, shutdowns, I/O.
func mayPass(sqlState string) bool {
	return len(sqlState) == 5 && strings.Contains("08 25 40 53 55 57 58", sqlState[:2])
}

func writeJSON(w http.ResponseWriter, status int, contentType string, v any) error {
	body := encode(v)
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body) // fails only if the client has left
	return nil
}

// encode is json.Marshal that leaves <, > and & as they are, and ends in a newline for the terminal.
func encode(v any) []byte {
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		panic(err) // all our types can be encoded
	}
	return body.Bytes()
}

// readProperty reads the client's property; its error is the *problem to answer with.
func readProperty(w http.ResponseWriter, r *http.Request) (property, error) {
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		return property{}, refuse(http.StatusUnsupportedMediaType, "Send Content-Type: application/json.")
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return property{}, refuse(http.StatusRequestEntityTooLarge, "The body is over 64 KiB.")
	}
	if err != nil {
		return property{}, refuse(http.StatusBadRequest, "The body could not be read to its end.")
	}
	return decodeProperty(body)
}

// decodeProperty reports every wrong field at once, even a name given twice or as "Title", which encoding/json takes.
func decodeProperty(body []byte) (p property, err error) {
	if !utf8.Valid(body) || !json.Valid(body) || bytes.TrimSpace(body)[0] != '{' { // trailing data and nesting bombs included
		return p, refuse(http.StatusBadRequest, "The body is not one valid JSON object in UTF-8.")
	}
	fields, wrong := map[string]json.RawMessage{}, map[string]string{}
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.Token()      // the opening brace
	for decoder.More() { // body is a valid object, so no step can fail
		name, _ := decoder.Token()
		field, value := name.(string), json.RawMessage{}
		if fields[field] != nil {
			wrong[field] = "is given more than once"
		}
		decoder.Decode(&value)
		fields[field] = value
	}
	check := func(field, problem string) {
		if fields[field] == nil {
			wrong[field] = "is required"
		} else if problem != "" {
			wrong[field] = problem
		}
		delete(fields, field)
	}
	check("title", readText(fields["title"], &p.Title, 1, 200))
	check("description", readText(fields["description"], &p.Description, 0, maxBody))
	check("price", readPrice(fields["price"], &p.Price))
	check("location", readText(fields["location"], &p.Location, 1, 100))
	for field := range fields {
		wrong[field] = "is not a field that can be set"
	}
	if len(wrong) > 0 {
		err = &problem{Status: http.StatusBadRequest, Detail: "The property is refused; errors says why.", Errors: wrong}
	}
	return p, err
}

// readText reads a JSON string of min characters (not counting blanks around it) to max, and returns what is wrong.
func readText(raw []byte, text *string, min, max int) (wrong string) {
	switch err := json.Unmarshal(raw, text); {
	case err != nil || string(raw) == "null":
		return "must be a string"
	case strings.Contains(*text, "\x00") || !wholeCharacters.Match(raw):
		return "must not contain U+0000 or half a surrogate pair"
	case utf8.RuneCountInString(strings.TrimSpace(*text)) < min:
		return "must not be blank"
	case utf8.RuneCountInString(*text) > max:
		return fmt.Sprintf("must not be longer than %d characters", max)
	}
	return ""
}

// readPrice reads a JSON string or number, and returns what is wrong.
func readPrice(raw []byte, p *price) (wrong string) {
	var number json.Number // takes either, and stays empty if raw is no number
	json.Unmarshal(raw, &number)
	parts := priceForm.FindStringSubmatch(string(number))
	if parts == nil {
		return `must be from 0 to 99999999.99, with at most two decimals, such as "1250.00"`
	}
	*p = price(parts[1] + "." + (parts[2] + "00")[:2])
	return ""
}

var (
	priceForm = regexp.MustCompile(`^(0|[1-9][0-9]{0,7})(?:\.([0-9]{1,2}))?$`) // JSON's form of a number, without sign and exponent
	// wholeCharacters matches a JSON string that escapes no half of a UTF-16 pair: each character must be itself, a short
	// escape, a \u outside D800–DFFF, or a \u pair of high and low.
	wholeCharacters = regexp.MustCompile(`^(?:[^\\]|\\[^u]|\\u([^dD].|[dD][0-7])..|\\u[dD][89abAB]..\\u[dD][c-fC-F]..)*$`)
)

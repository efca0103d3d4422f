// property.go: the model, its SQL, its validation and its views. Django: models.py and views.py.
//
// Nothing here knows of a cache. The views read the list through a function that they were given, and every
// write ends in a signal; who caches what, and who hears the signal, is the business of the files below.

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
	"maps"
	"mime"
	"net/http"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// answerWithin bounds what a request may wait for PostgreSQL: 5 s, less one to hand the answer over.
	answerWithin = 4 * time.Second

	propertiesPath = "/properties/"
	maxBody        = 64 << 10 // bytes in the body of a POST or PUT
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

// A price is an exact decimal with two decimals, "1234.50", from PostgreSQL's numeric to the client's JSON.
// It stays text all the way: no float can round it, and nothing here computes with it.
type price string

// parsePrice reads a price from 0 to 99999999.99 with at most two decimals. It takes JSON's form of a
// number, without sign and exponent, so that nothing is left to guess or to round.
func parsePrice(s string) (p price, ok bool) {
	parts := regexp.MustCompile(`^(0|[1-9][0-9]{0,7})(?:\.([0-9]{1,2}))?$`).FindStringSubmatch(s)
	if parts == nil {
		return "", false
	}
	return price(parts[1] + "." + (parts[2] + "00")[:2]), true
}

// properties is the model's manager and its views. Django: Property.objects, and the functions of views.py.
type properties struct {
	db *sql.DB

	// getAll answers the list view with all properties as a JSON array. See getAllProperties in cache.go.
	getAll func(context.Context) ([]byte, error)

	// The signals, sent after the commit and before the client has its answer. See signals.go.
	postSave    func(saved)
	postDelete  func(property)
	postUnknown func(error) // a commit whose outcome is unknown. Django has no such signal.
}

// saved is what postSave carries. Django: the instance and created of post_save.
type saved struct {
	property property
	created  bool // false: replaced
}

const columns = `id, title, description, price, location, created_at`

// scan reads one row of columns; errNotFound if there is none.
func scan(row interface{ Scan(...any) error }) (property, error) {
	var p property
	err := row.Scan(&p.ID, &p.Title, &p.Description, &p.Price, &p.Location, &p.CreatedAt)
	if errors.Is(err, sql.ErrNoRows) {
		return p, errNotFound
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
			return nil, fmt.Errorf("scan property: %w", err)
		}
		list = append(list, p)
	}
	return list, rows.Err()
}

// get reads one property; errNotFound if there is none.
func (s *properties) get(ctx context.Context, id int64) (property, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	return scan(s.db.QueryRowContext(ctx, `SELECT `+columns+` FROM properties WHERE id = $1`, id))
}

// save inserts p if it has no id yet, else replaces the row of that id (errNotFound if there is none). It
// returns what the database keeps.
func (s *properties) save(ctx context.Context, p property) (property, error) {
	created := p.ID == 0
	statement, args := `INSERT INTO properties (title, description, price, location)
		VALUES ($1, $2, $3, $4) RETURNING `+columns, []any{p.Title, p.Description, p.Price, p.Location}
	if !created {
		statement, args = `UPDATE properties SET title = $1, description = $2, price = $3, location = $4
			WHERE id = $5 RETURNING `+columns, append(args, p.ID)
	}
	p, err := s.write(ctx, statement, args...)
	if err == nil {
		s.postSave(saved{p, created})
	}
	return p, err
}

// delete removes one property; errNotFound if there is none.
func (s *properties) delete(ctx context.Context, id int64) error {
	p, err := s.write(ctx, `DELETE FROM properties WHERE id = $1 RETURNING `+columns, id)
	if err == nil {
		s.postDelete(p)
	}
	return err
}

// write runs one statement that returns the row that it wrote, and commits.
//
// The client's leaving doesn't stop it: one that hangs up between the commit and the signal must not leave
// the caches stale. The transaction is there for the deadline: a statement that hangs past it can't take
// effect after the client was told that nothing was changed, because its COMMIT is never sent. An error of
// COMMIT itself leaves a doubt, and then the caches must go all the same.
func (s *properties) write(ctx context.Context, statement string, args ...any) (property, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerWithin)
	defer cancel()
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return property{}, fmt.Errorf("begin: %w", err)
	}
	defer tx.Rollback() // after Commit it does nothing
	p, err := scan(tx.QueryRowContext(ctx, statement, args...))
	if err != nil {
		return property{}, err
	}
	if err := tx.Commit(); err != nil {
		s.postUnknown(err)
		return property{}, fmt.Errorf("%w: %w", errUnknown, err)
	}
	return p, nil
}

var (
	errNotFound = errors.New("no such property")
	errUnknown  = errors.New("commit: outcome unknown")
	errPanic    = errors.New("panic")
)

// panicked is the error that a recovered panic becomes, with its stack for the log.
func panicked(p any) error { return fmt.Errorf("%w: %v\n%s", errPanic, p, debug.Stack()) }

// A view answers a request, or returns the error to answer with. Django: a view raises Http404 and the like.
type view func(http.ResponseWriter, *http.Request) error

// ServeHTTP also turns a panic into an answer: net/http would only hang up.
func (v view) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if p := recover(); p != nil {
			writeError(w, r, panicked(p))
		}
	}()
	if err := v(w, r); err != nil {
		writeError(w, r, err)
	}
}

// listView answers GET /properties/. cachePage wraps it: it sees nothing of the client's request.
func (s *properties) listView(w http.ResponseWriter, r *http.Request) error {
	list, err := s.getAll(r.Context())
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(list)
	return nil
}

// createView answers POST /properties/.
func (s *properties) createView(w http.ResponseWriter, r *http.Request) error {
	p, err := readProperty(w, r)
	if err != nil {
		return err
	}
	if p, err = s.save(r.Context(), p); err != nil {
		return err
	}
	w.Header().Set("Location", fmt.Sprintf("%s%d/", propertiesPath, p.ID))
	writeJSON(w, http.StatusCreated, "application/json", p)
	return nil
}

// byID is a view of the property that the path names. Django: <int:pk>. "01" and "+1" name none, so that each
// property has one path.
func byID(v func(w http.ResponseWriter, r *http.Request, id int64) error) view {
	return func(w http.ResponseWriter, r *http.Request) error {
		id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
		if err != nil || id < 1 || strconv.FormatInt(id, 10) != r.PathValue("id") {
			return errNotFound
		}
		return v(w, r, id)
	}
}

// detailView answers GET /properties/{id}/. It isn't cached: a primary-key read costs about what a round
// trip to Redis costs, so a cache would only add ways to be wrong.
func (s *properties) detailView(w http.ResponseWriter, r *http.Request, id int64) error {
	p, err := s.get(r.Context(), id)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, "application/json", p)
	return nil
}

// replaceView answers PUT /properties/{id}/.
func (s *properties) replaceView(w http.ResponseWriter, r *http.Request, id int64) error {
	p, err := readProperty(w, r)
	if err != nil {
		return err
	}
	p.ID = id
	if p, err = s.save(r.Context(), p); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, "application/json", p)
	return nil
}

// deleteView answers DELETE /properties/{id}/.
func (s *properties) deleteView(w http.ResponseWriter, r *http.Request, id int64) error {
	if err := s.delete(r.Context(), id); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// readProperty reads the client's property; its error is the *problem to answer with.
func readProperty(w http.ResponseWriter, r *http.Request) (property, error) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" {
		return property{}, &problem{Status: http.StatusUnsupportedMediaType, Detail: "Send Content-Type: application/json."}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return property{}, &problem{Status: http.StatusRequestEntityTooLarge, Detail: "The body is over 64 KiB."}
	}
	if err != nil {
		return property{}, badRequest("The body could not be read to its end.", nil)
	}
	return decodeProperty(body)
}

// decodeProperty checks all that a client may get wrong, and says all of it at once. encoding/json alone
// would let through what PostgreSQL refuses or what the client didn't mean: it takes the last of two equal
// names, matches names in any case, and puts U+FFFD where the text is broken.
func decodeProperty(body []byte) (p property, err error) {
	if !utf8.Valid(body) {
		return p, badRequest("The body is not valid UTF-8.", nil)
	}
	if !json.Valid(body) || bytes.TrimSpace(body)[0] != '{' { // trailing data and nesting bombs included
		return p, badRequest("The body is not one valid JSON object.", nil)
	}
	read := map[string]func(raw []byte) (wrong string){ // each reads its field
		"title":       func(raw []byte) string { return readText(&p.Title, raw, false, 200) },
		"description": func(raw []byte) string { return readText(&p.Description, raw, true, maxBody) },
		"price":       func(raw []byte) string { return readPrice(&p.Price, raw) },
		"location":    func(raw []byte) string { return readText(&p.Location, raw, false, 100) },
	}
	wrong := map[string]string{} // field → what is wrong with it; "" if nothing is
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.Token()      // {
	for decoder.More() { // body is a valid object: no step of this can fail
		name, _ := decoder.Token()
		var raw json.RawMessage
		decoder.Decode(&raw)
		field := name.(string)
		if _, given := wrong[field]; given {
			wrong[field] = "is given more than once"
		} else if read[field] == nil {
			wrong[field] = "is not a field that can be set"
		} else {
			wrong[field] = read[field](raw)
		}
	}
	for field := range read {
		if _, given := wrong[field]; !given {
			wrong[field] = "is required"
		}
	}
	maps.DeleteFunc(wrong, func(_, what string) bool { return what == "" })
	if len(wrong) > 0 {
		return p, badRequest("The property is refused; errors says why.", wrong)
	}
	return p, nil
}

// readText reads a JSON string of at most most characters into s, and tells what is wrong with it.
func readText(s *string, raw []byte, mayBeBlank bool, most int) (wrong string) {
	switch err := json.Unmarshal(raw, s); {
	case err != nil || string(raw) == "null":
		return "must be a string"
	case strings.Contains(*s, "\x00") || loneSurrogate(raw):
		return "must not contain U+0000 or half a surrogate pair"
	case !mayBeBlank && strings.TrimSpace(*s) == "":
		return "must not be blank"
	case utf8.RuneCountInString(*s) > most:
		return fmt.Sprintf("must not be longer than %d characters", most)
	}
	return ""
}

// readPrice reads a price, a JSON string or number, into p, and tells what is wrong with it.
func readPrice(p *price, raw []byte) (wrong string) {
	var number json.Number // takes either, and stays empty if raw is no number
	json.Unmarshal(raw, &number)
	var ok bool
	if *p, ok = parsePrice(string(number)); !ok {
		return `must be from 0 to 99999999.99, with at most two decimals, such as "1250.00"`
	}
	return ""
}

// loneSurrogate tells whether a JSON string escapes half of a UTF-16 pair, which is no character:
// encoding/json would decode it as U+FFFD, and so store what the client didn't send. All is well if each
// character is itself, a short escape, a \u outside D800–DFFF, or a \u pair of high and low.
func loneSurrogate(raw []byte) bool {
	const whole = `[^\\]|\\[^u]|\\u([^dD].|[dD][0-7])..|\\u[dD][89abAB]..\\u[dD][c-fC-F]..`
	return !regexp.MustCompile(`^(?:` + whole + `)*$`).Match(raw)
}

// A problem is the answer to a request that fails, as RFC 9457 has it, and the error that leads to it.
type problem struct {
	Type   string            `json:"type"`
	Title  string            `json:"title"`
	Status int               `json:"status"`
	Detail string            `json:"detail"`
	Errors map[string]string `json:"errors,omitempty"` // field → what is wrong with it
}

func (p *problem) Error() string { return p.Detail }

func badRequest(detail string, fields map[string]string) *problem {
	return &problem{Status: http.StatusBadRequest, Detail: detail, Errors: fields}
}

// writeError is the only place where an error becomes an answer. The client learns what it did wrong; the
// log learns what we did. An error that isn't told apart here is PostgreSQL's: no other reaches the views.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	var p *problem
	switch {
	case errors.As(err, &p):
	case errors.Is(err, context.Canceled) && r.Context().Err() != nil:
		return // the client has left: nobody to answer
	case errors.Is(err, errNotFound):
		p = &problem{Status: http.StatusNotFound, Detail: "There is no such property."}
	case errors.Is(err, errPanic):
		p = &problem{Status: http.StatusInternalServerError, Detail: "Something is wrong on our side."}
	case errors.Is(err, errUnknown):
		p = &problem{Status: http.StatusServiceUnavailable, Detail: "The database did not confirm the write: it may have been applied. Look before you repeat it."}
	default:
		p = &problem{Status: http.StatusServiceUnavailable, Detail: "The database does not answer. Nothing was changed; try again."}
	}
	if p.Status >= 500 {
		slog.Error("request failed", "method", r.Method, "path", r.URL.Path, "status", p.Status, "err", err)
	}
	if p.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1") // second
	}
	answer := *p // p may be shared: by those who wait for the same page
	answer.Type, answer.Title = "about:blank", http.StatusText(p.Status)
	writeJSON(w, p.Status, "application/problem+json", answer)
}

func writeJSON(w http.ResponseWriter, status int, contentType string, v any) {
	body := encode(v)
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body) // fails only if the client has left
}

// encode is json.Marshal that leaves <, > and & as they are, since no browser takes our JSON for HTML, and
// ends in a newline, which is kind to a terminal.
func encode(v any) []byte {
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		panic(err) // all our types can be encoded
	}
	return body.Bytes()
}

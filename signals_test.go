// signals_test.go: who hears of a write, when, and what a receiver can't break.

package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// Receivers hear in the order in which they were connected. One that fails or panics doesn't keep the next
// one from hearing.
func TestSend(t *testing.T) {
	var s signal[string]
	var heard []string
	hear := func(name string, err error) func(string) error {
		return func(event string) error {
			heard = append(heard, name+" "+event)
			return err
		}
	}
	s.send("nobody is there")
	s.connect("first", hear("first", errors.New("a failure")))
	s.connect("second", func(string) error { panic("in a receiver") })
	s.connect("third", hear("third", nil))
	s.connect("fourth", func(string) error {
		s.connect("fifth", hear("fifth", nil)) // hears from the next event on
		return nil
	})
	s.send("a")
	s.send("b")
	if want := []string{"first a", "third a", "first b", "third b", "fifth b"}; !slices.Equal(heard, want) {
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
	p.signals.postSave.connect("test", func(s saved) error {
		if s.created {
			return note("created", s.property, 1)
		}
		return note("replaced", s.property, 1)
	})
	p.signals.postDelete.connect("test", func(row property) error { return note("deleted", row, 0) })
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
	p.signals.postSave.receivers = slices.Insert(p.signals.postSave.receivers, 0,
		receiver[saved]{"test", func(saved) error { panic("in a receiver") }})
	p.list(t, storedStatus)
	p.want(t, 201, "POST", "/properties/", titled("new"))
	if got := titles(p.list(t, storedStatus)); got != "new" {
		t.Errorf("the list has %q", got)
	}
}

// signals.go: who hears of a write. Django: post_save, post_delete, @receiver, and Signal.send_robust.

package main

import (
	"log/slog"
	"slices"
	"sync"
)

// A signal is a list of receivers. The zero value has none.
//
// Receivers run one after the other, in the order in which they were connected, on the goroutine of the
// write and before its answer: what they do is done when the client has it. They aren't given the request's
// context, since a client that hangs up, or a write that took its time, must be heard of too.
type signal[T any] struct {
	mu        sync.Mutex // guards receivers
	receivers []receiver[T]
}

type receiver[T any] struct {
	name string // for the log
	hear func(T) error
}

// connect adds a receiver. Django: @receiver(post_save, sender=Property).
func (s *signal[T]) connect(name string, hear func(T) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.receivers = append(s.receivers, receiver[T]{name, hear})
}

// send calls every receiver. The row is committed: a receiver that fails or panics is logged, the next one
// runs, and the write stays a success.
func (s *signal[T]) send(event T) {
	s.mu.Lock()
	receivers := slices.Clone(s.receivers) // a receiver may connect another one
	s.mu.Unlock()
	for _, r := range receivers {
		if err := r.call(event); err != nil {
			slog.Error("signal: receiver failed", "receiver", r.name, "err", err)
		}
	}
}

// call is hear with a panic turned into an error.
func (r receiver[T]) call(event T) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = panicked(p)
		}
	}()
	return r.hear(event)
}

// signals are the ones that properties sends, all of them after the commit. (Django sends post_delete
// before it: a reader can fill the cache with the row again before the row is gone.)
type signals struct {
	postSave    signal[saved]
	postDelete  signal[property]
	postUnknown signal[error]
}

// connectReceivers says who hears of what. Django: @receiver, and AppConfig.ready(), which imports signals.py.
func (s *signals) connectReceivers(c *cache) {
	s.postSave.connect("invalidate", func(saved) error { return c.invalidate() })
	s.postDelete.connect("invalidate", func(property) error { return c.invalidate() })
	s.postUnknown.connect("invalidate", func(error) error { return c.invalidate() })
	s.postSave.connect("log", func(e saved) error {
		slog.Info("property saved", "id", e.property.ID, "created", e.created)
		return nil
	})
	s.postDelete.connect("log", func(p property) error {
		slog.Info("property deleted", "id", p.ID)
		return nil
	})
}

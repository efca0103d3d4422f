// signals.go: who hears of a write. Django: post_save, post_delete, @receiver, and Signal.send_robust.
//
// Rule 4: every commit invalidates, whoever made it. A process's own signals, sent before its write is answered, would
// not be enough. So PostgreSQL announces each commit (see schema.sql), and the listener sends a signal for it. Else:
//
//  1. psql changes a row, or a process dies between its COMMIT and its invalidation
//  2. a reader hits: the old list, for up to 75 minutes

package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A signal is a list of receivers, all connected before the program serves. They run in that order, before the answer.
type signal []receiver

type receiver struct {
	name string // for the log
	hear func(change) error
}

// connect adds a receiver. Django: @receiver(post_save, sender=Property).
func (s *signal) connect(name string, hear func(change) error) { *s = append(*s, receiver{name, hear}) }

// send calls every receiver. The row is committed, so one that fails or panics is only logged, and the next one runs.
func (s signal) send(c change) {
	for _, r := range s {
		if err := safely(func() error { return r.hear(c) }); err != nil {
			slog.Error("signal: a receiver failed; the write is committed", "receiver", r.name, "err", err)
		}
	}
}

// signals are the program's three. All are sent after the commit. (Django sends post_delete before it: a reader can
// fill the cache with the row again before the row is gone.)
type signals struct {
	postSave, postDelete signal // this process has written
	announced            signal // anybody has written, this process too; the change holds only the transaction's name
}

// connectReceivers says who hears of what. Django: @receiver, and AppConfig.ready(), which imports signals.py.
func (s *signals) connectReceivers(cache *cache) {
	logs := func(what string) func(change) error {
		return func(c change) error { slog.Info(what, "id", c.property.ID, "created", c.created); return nil }
	}
	invalidate := func(c change) error { cache.invalidate(c.transaction); return nil }
	s.postSave.connect("log", logs("property saved"))
	s.postSave.connect("invalidate", invalidate)
	s.postDelete.connect("log", logs("property deleted"))
	s.postDelete.connect("invalidate", invalidate)
	s.announced.connect("invalidate", invalidate)
}

const notHeard = "announcements are not heard: the commits of others stay unseen until they are, or until the TTLs end"

// A listener hears PostgreSQL's announcements on a connection of its own.
type listener struct {
	db        *sql.DB // for the probe; not the listener's own connection, and never busy
	config    *pgx.ConnConfig
	announced func(change)
	conn      *pgx.Conn
	probe     string // an announcement of our own that has not arrived yet; or ""
	unheard   reason // why announcements are not heard
}

// run hears until ctx is done, and listens anew after each failure. err is what the first listen returned.
func (l *listener) run(ctx context.Context, err error) {
	for {
		if err == nil {
			err = l.hear(ctx)
			l.conn.Close(context.Background())
		}
		if ctx.Err() != nil {
			return
		}
		l.unheard.set(notHeard, "not heard: the connection to PostgreSQL failed", err)
		time.Sleep(beatInterval)
		err = l.listen(ctx)
	}
}

// listen ends a gap: it connects, LISTENs, and only then invalidates, because announcements in the gap are lost. The
// invalidation is named and announced, too: other instances find it done, and if we don't hear it, we hear nothing.
func (l *listener) listen(ctx context.Context) error {
	conn, err := pgx.ConnectConfig(ctx, l.config)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*pingTimeout)
	defer cancel()
	l.conn, l.probe = conn, "listen@"+rand.Text()
	if _, err = conn.Exec(ctx, "LISTEN properties"); err == nil {
		_, err = l.db.ExecContext(ctx, "SELECT pg_notify('properties', $1)", l.probe)
	}
	if err != nil {
		conn.Close(ctx)
		return err
	}
	l.announced(change{transaction: l.probe})
	return nil
}

// hear passes announcements on until the line fails. A dead line is silent, so it pings after a second of silence.
func (l *listener) hear(ctx context.Context) error {
	for {
		wait, cancel := context.WithTimeout(ctx, time.Second)
		n, err := l.conn.WaitForNotification(wait)
		cancel()
		if pgconn.Timeout(err) && ctx.Err() == nil {
			if l.probe != "" {
				l.unheard.set(notHeard, "not heard: is there a pooler in transaction mode? Give DATABASE_URL a direct connection", nil)
			}
			ping, cancel := context.WithTimeout(ctx, pingTimeout)
			err = l.conn.Ping(ping)
			cancel()
		}
		if err != nil {
			return err
		}
		if n != nil && l.probe != "" && n.Payload == l.probe {
			l.probe = ""
			l.unheard.set("", "", nil)
			slog.Info("announcements are heard: the commits of others invalidate, too")
		}
		if n != nil { // nil: only silence
			l.announced(change{transaction: n.Payload})
		}
	}
}

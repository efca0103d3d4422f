// signals.go: who hears of a write. Django: post_save, post_delete, @receiver, and send_robust.
//
// The second half is the rule announcement: every commit that changes the table is announced,
// whoever made it. (docs/faults.md has what fires no trigger.)

package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A change is what a signal carries. Django: the instance and created of post_save.
type change struct {
	property property
	created  bool        // inserted, and not replaced or deleted
	write    transaction // the write's name
}

// A signal is a list of receivers. All are connected before the program serves.
type signal struct{ receivers []func(change) }

// connect adds a receiver. Django: @receiver(post_save, sender=Property).
func (s *signal) connect(receiver func(change)) {
	s.receivers = append(s.receivers, receiver)
}

// send calls the receivers, in the order in which they were connected. The write is committed, so
// one that panics is only logged, and the next one is called.
func (s *signal) send(c change) {
	for _, receiver := range s.receivers {
		err := safely(func() error {
			receiver(c)
			return nil
		})
		if err != nil {
			slog.Error("signal: a receiver failed", "err", err)
		}
	}
}

// signals are sent after the commit, and before the write is answered. They tell of this process's
// own writes: the listener hears of all others. (Django sends post_delete before the commit: a
// reader can fill the cache with the row again before it is gone.)
type signals struct {
	postSave, postDelete signal

	// inDoubt is sent when a COMMIT was not confirmed: the change may be there, or may still come.
	inDoubt signal
}

// connectReceivers says who hears of what. Django: @receiver, and AppConfig.ready().
func connectReceivers(s *signals, c *cache) {
	// If it fails, there are no hits until a floor comes, so nobody needs the error.
	learn := func(written change) { c.learn(written.write) }
	for name, on := range map[string]*signal{"saved": &s.postSave, "deleted": &s.postDelete} {
		on.connect(learn)
		on.connect(func(change) { c.invalidate() })
		// Last of all, because a log that nobody reads may hold up the rest.
		on.connect(func(written change) {
			slog.Info("property "+name, "id", written.property.ID, "created", written.created)
		})
	}
	// To delete the entries now would be too early, because the change may be still to come.
	s.inDoubt.connect(learn)
}

// A listener learns of the commits of others. Without it:
//
//  1. psql changes a row, or a process dies between its COMMIT and its invalidation
//  2. a reader hits: the old list, for up to 75 minutes
//
// So a trigger in schema.sql announces each commit with NOTIFY, and the listener hears of it on a
// connection of its own. While it can't hear, it asks: it takes a new floor about every second.
type listener struct {
	config *pgx.ConnConfig
	cache  *cache
	conn   *pgx.Conn

	// probe is a channel of our own, or "" once an announcement that we sent there came back.
	probe string
	// unheard is why they are not heard, or "".
	unheard atomic.Value
}

const (
	// silence is how long the line may be silent until the listener looks whether it hears, and
	// asks if it doesn't.
	silence = time.Second

	// lineTimeout is for listening anew. While that hangs nobody asks, so it is short.
	lineTimeout = time.Second

	// pingTimeout is for a question that costs PostgreSQL nothing.
	pingTimeout = 500 * time.Millisecond
)

// listen begins to hear, unless it has begun. What was announced before is lost, so it takes a
// floor after LISTEN.
func (l *listener) listen(ctx context.Context) error {
	if l.conn != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lineTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, l.config)
	if err != nil {
		return err
	}
	l.probe = rand.Text()
	if _, err = conn.Exec(ctx, `LISTEN properties; LISTEN "`+l.probe+`"`); err == nil {
		err = l.cache.raiseFloor()
	}
	// The probe comes last: a floor that has seen its transaction would make every entry stale. It
	// comes from elsewhere, because a pooler may run both statements of one client on one
	// connection.
	if err == nil {
		_, err = l.cache.reserved.ExecContext(ctx, "SELECT pg_notify($1, '')", l.probe)
	}
	if err != nil {
		conn.Close(ctx)
		return err
	}
	l.conn = conn
	return nil
}

// hear learns what is announced, until the line fails.
func (l *listener) hear(ctx context.Context) error {
	for {
		waiting, cancel := context.WithTimeout(ctx, silence)
		n, err := l.conn.WaitForNotification(waiting)
		cancel()
		switch {
		case pgconn.Timeout(err) && ctx.Err() == nil:
			err = l.look(ctx)
		case err != nil:
		case n.Channel == l.probe:
			l.probe = ""
			err = l.look(ctx)
		default:
			var write transaction
			// What is no name, such as an operator's, is as good as one of another server.
			fmt.Sscan(n.Payload, &write.server, &write.id)
			err = l.cache.learn(write)
		}
		if err != nil {
			return err
		}
	}
}

// look finds out whether announcements are heard: the trigger is there and enabled, and the probe
// came back. If not, or if the floor is none of this server's, it takes a new one. It fails if
// the line is dead, or leads to a server that is read-only, as a failover may leave one.
func (l *listener) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	var server string
	var announced bool
	err := l.conn.QueryRow(ctx, `SELECT properties_line(), EXISTS (SELECT FROM pg_trigger
		WHERE tgrelid = 'properties'::regclass AND tgname = 'properties_announce'
			AND tgenabled IN ('A', 'O'))`).Scan(&server, &announced)
	if err != nil {
		return err
	}
	why := ""
	switch {
	case !announced:
		why = "asking: the trigger properties_announce is missing or disabled"
	case l.probe != "":
		why = "asking: is there a pooler in transaction mode? It swallows announcements"
	}
	floor, _ := l.cache.known.get()
	// Once more when they are heard again: what was committed until now wasn't announced.
	if before := l.note(why); why+before != "" || floor.Server != server {
		return l.cache.raiseFloor()
	}
	return nil
}

// note says why announcements are not heard, or "", logs what is new, and returns what it was
// before.
func (l *listener) note(why string) (before string) {
	before = l.unheard.Swap(why).(string)
	switch {
	case why == before:
	case why == "":
		slog.Info("announcements are heard: the commits of others show at once")
	default:
		slog.Warn("announcements are not heard: PostgreSQL is asked about every second instead",
			"why", why)
	}
	return before
}

// run hears until ctx is done, and listens anew after each failure.
func (l *listener) run(ctx context.Context) {
	for {
		err := l.listen(ctx)
		if err == nil {
			err = l.hear(ctx)
			l.conn.Close(context.Background())
			l.conn = nil
		}
		if ctx.Err() != nil {
			return
		}
		l.note("asking: " + cause(err))
		// While this fails, nobody can commit as far as we can tell, so hits go on.
		l.cache.raiseFloor()
		// With lineTimeout, this makes it ask more often than every 2 s.
		time.Sleep(silence / 2)
	}
}

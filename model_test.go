// model_test.go: the four rules as a small state machine, and a search through all that it can do.
//
// checker_test.go meets the schedules that happen to come; this meets every one. There are two instances, two readers,
// and two writers: one at instance 1, the other is psql, which sends no signal. (A writer that dies after its COMMIT is
// like psql.) Each step of the model is one command to PostgreSQL or Redis and stands for the function it names. Any
// step may come after any other one, and every command to Redis may get lost.
//
// What a write's signal has invalidated counts as answered at once: that asks for more than the promise.
//
// Left out: the second level (a page is to its list what the list is to the table), time (TTLs and deadlines; a beat
// comes when it comes), what Redis refuses or evicts, a COMMIT in doubt, and the death of an instance. A session starts
// in one step. Where the model isn't exact, it allows more: a session's connections outlive it; Redis restarts with the
// oldest data, and yet with the names of all invalidations.

package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// rules are the four of cache.go; each can be turned off.
type rules struct {
	fence    bool // rule 1: EXEC stores only if no invalidation came after WATCH
	nextCall bool // rule 2: who asks while a call runs waits for the next one; else joins the running one
	debt     bool // rule 3: an instance that owes an invalidation sends it before its next session
	announce bool // rule 4: each instance hears of every commit
	naive    bool // nobody connects a receiver: nothing invalidates
}

// A version counts the commits. Each has one transaction, so it is also the transaction's name.
type version int8

const (
	nothing version = -1 // as the entry: Redis has none
	unique  version = 0  // as a name: one that no other invalidation has
)

// A world is a state of everything.
type world struct {
	table     version // the newest commit
	entry     version // what Redis holds at the key
	done      [3]bool // the transactions that it remembers to have invalidated for
	instances [2]instance
	readers   [2]reader
	written   version // by the writer at instance 1
	writer    phase   // idle, committed or answered
	psql      bool    // psql has written
	faults    int     // of Redis; counted only if the model limits them
	stale     version // an answer is older than this one, which its reader was promised; 0: none is
}

type instance struct {
	session, owes bool
	another       bool    // Redis has another history than when the session started
	excused       bool    // since its data changed, no beat has come: the one exception that is promised
	listener      phase   // listening, gap or deaf
	unheard       [3]bool // announcements on their way to it
	promised      version // whoever asks here now gets this version or a newer one
}

// A reader runs a call (waits to loaded), shares the one of the other reader, or is idle.
type reader struct {
	phase          phase
	at             int8    // its instance
	promised, rows version // promised to all who share the call; what it has read
	touched        bool    // the fence has changed since WATCH
}

type phase int8

const (
	idle      phase = iota
	waits           // a reader: its call has not begun
	shares          // a reader: the other one's call is its, too
	missed          // a reader, from here on in lookUp: find has found nothing
	watched         // a reader: has sent WATCH
	loaded          // a reader: has the rows
	committed       // the writer
	answered        // the writer
	listening       // a listener
	gap             // a listener: has no connection, and misses announcements
	deaf            // a listener: LISTENs, but has not yet invalidated for the gap
)

// A step is what happened: reader A misses (find).
type step struct {
	who, does string
	n         version // for %d in does
	where     string  // the function
}

// A model yields the worlds that can follow a world.
type model struct {
	rules
	limits
	yield func(step, world)
}

// limits keep the number of worlds small enough for a test.
type limits struct {
	about  string
	gaps   bool // the listeners may fail, as often as they like
	faults int  // of Redis: so many at most; or unlimited
}

const unlimited = -1

// fail yields a world in which Redis has failed.
func (m *model) fail(s step, w world) {
	if m.faults != unlimited {
		w.faults++
	}
	if m.faults == unlimited || w.faults <= m.faults {
		m.yield(s, w)
	}
}

var readerNames, instanceNames = [2]string{"reader A", "reader B"}, [2]string{"instance 1", "instance 2"}

// promise is the README's: a GET that starts after a write was answered shows it. And once nothing is on its way to
// the instance, it shows the table.
func (w *world) promise(i int) version {
	if in := w.instances[i]; in.listener == listening && in.unheard == [3]bool{} && w.writer != committed {
		return w.table
	}
	return w.instances[i].promised
}

// ask is group.do: a call is shared until it has begun.
func (m *model) ask(w world, r int) {
	for at := range w.instances {
		n, does := w, "asks instance %d"
		me, other := &n.readers[r], &n.readers[1-r]
		*me = reader{phase: waits, at: int8(at), promised: w.promise(at)}
		if other.phase != idle && other.at == me.at && (other.phase == waits || !m.nextCall) {
			other.promised = max(other.promised, me.promised)
			*me, does = reader{phase: shares, at: me.at}, "asks instance %d, and joins the other reader's call"
		}
		m.yield(step{readerNames[r], does, version(at + 1), "do"}, n)
	}
}

// read takes the next step of a reader's call: doCall begins it if no other one runs, and lookUp does the rest.
func (m *model) read(w world, r int) {
	me, other, s := &w.readers[r], w.readers[1-r], step{who: readerNames[r]}
	in := &w.instances[me.at]
	switch {
	case me.phase == waits && other.at == me.at && other.phase >= missed: // group.running
	case me.phase == waits && !in.session:
		me.rows = w.table
		m.answer(w, r, "bypasses Redis, and gets version %d", "lookUp, load", m.yield)
	case me.phase == waits && w.entry == nothing:
		n := w
		n.readers[r].phase = missed
		s.does, s.where = "misses", "find"
		m.yield(s, n)
		m.cutOff(w, r)
	case me.phase == waits:
		m.cutOff(w, r)
		if me.rows = w.entry; in.excused {
			me.promised = 0
		}
		m.answer(w, r, "hits, and gets version %d", "find", m.yield)
	case me.phase == missed:
		n := w
		n.readers[r].phase = watched
		s.does, s.where = "WATCHes the fence", "lookUp"
		m.yield(s, n)
		m.cutOff(w, r)
	case me.phase == watched:
		me.phase, me.rows = loaded, w.table
		s.does, s.n, s.where = "reads version %d from the table", w.table, "load"
		m.yield(s, w)
	case me.phase == loaded:
		m.exec(w, r)
	}
}

// exec is fill: it stores what was read, unless the fence has changed since WATCH.
func (m *model) exec(w world, r int) {
	n, does := w, "stores version %d, and answers with it"
	if m.fence && w.readers[r].touched {
		does = "stores nothing, because the fence has changed; answers with version %d"
	} else {
		n.entry = w.readers[r].rows
	}
	m.answer(n, r, does, "fill", m.yield)
	for _, n := range []world{n, w} { // the reply got lost, or EXEC itself
		n.end(int(w.readers[r].at))
		m.answer(n, r, "gets no reply to EXEC; answers with version %d", "fill, end", m.fail)
	}
}

// cutOff is GET or WATCH getting lost: the session ends, and the look-up bypasses Redis.
func (m *model) cutOff(w world, r int) {
	w.end(int(w.readers[r].at))
	w.readers[r].rows = w.table
	m.answer(w, r, "gets no reply from Redis, and version %d from the table", "end, load", m.fail)
}

// answer ends the call, for everyone who shares it. Here the promise is kept, or not.
func (m *model) answer(w world, r int, does, where string, yield func(step, world)) {
	me, other := w.readers[r], &w.readers[1-r]
	if me.rows < me.promised {
		w.stale = me.promised
	}
	if w.readers[r] = (reader{}); other.phase == shares {
		*other = reader{}
		does += ", for the other reader, too"
	}
	yield(step{readerNames[r], does, me.rows, where}, w)
}

// end ends the session of an instance, as end and bypass do. It owes nothing for that alone.
func (w *world) end(i int) { w.instances[i].session, w.instances[i].excused = false, false }

// write is save: COMMIT, the signal, the answer. psql only commits.
func (m *model) write(w world) {
	n, s := w, step{who: "the writer"}
	switch {
	case w.writer == idle:
		m.commit(&n)
		n.written, n.writer = n.table, committed
		s.does, s.n, s.where = "commits version %d", n.table, "save"
		m.yield(s, n)
	case w.writer == committed:
		n.writer, n.instances[0].promised = answered, max(w.instances[0].promised, w.written)
		m.invalidate(n, 0, w.written, step{s.who, "before its answer, ", 0, "send, invalidate"})
	}
	if !w.psql {
		m.commit(&w)
		w.psql = true
		m.yield(step{"psql", "commits version %d", w.table, "schema.sql"}, w)
	}
}

// commit is the trigger of schema.sql, too: PostgreSQL announces the commit to those who LISTEN.
func (m *model) commit(w *world) {
	w.table++
	for i := range w.instances {
		w.instances[i].unheard[w.table] = m.announce && w.instances[i].listener != gap
	}
}

// invalidate is what both signals lead to. When it returns, Redis has the invalidation, or this instance owes it: so
// from now on its readers are promised that version, and as soon as Redis has it, everyone is.
func (m *model) invalidate(w world, i int, name version, s step) {
	in, about, hears := &w.instances[i], name, s.does
	if about == unique {
		about = w.table
	}
	if m.naive {
		s.does += "tells no receiver"
		m.yield(s, w)
		return
	}
	in.promised = max(in.promised, about)
	lost := w
	lost.end(i)
	lost.instances[i].owes = m.debt
	if s.does = hears + "loses its invalidation"; !in.session {
		s.does = hears + "can't invalidate during a bypass"
		m.yield(s, lost)
		return
	}
	w.invalidateOnce(i, name)
	m.yield(step{s.who, hears + "invalidates", 0, s.where}, w)
	m.fail(s, lost)
	w.end(i)
	in.owes = m.debt
	s.does = hears + "invalidates, but gets no reply"
	m.fail(s, w)
}

// invalidateOnce is the script: it does nothing if the transaction is done, else it changes the fence and deletes the key.
func (w *world) invalidateOnce(i int, name version) {
	if w.done[name] {
		return
	}
	w.done[name], w.entry = name != unique, nothing
	w.instances[1-i].promised = max(w.instances[1-i].promised, w.instances[i].promised)
	w.touch()
}

// touch changes the fence: EXEC will do nothing for those who WATCH it.
func (w *world) touch() {
	for r := range w.readers {
		w.readers[r].touched = w.readers[r].phase == watched || w.readers[r].phase == loaded
	}
}

// listen is a listener: it hears announcements in their order, or falls into a gap and ends it: LISTEN, then invalidate.
func (m *model) listen(w world, i int) {
	in, s := &w.instances[i], step{who: instanceNames[i], where: "listen"}
	switch in.listener {
	case listening:
		if v := slices.Index(in.unheard[:], true); v >= 0 {
			n := w
			n.instances[i].unheard[v] = false
			m.invalidate(n, i, version(v), step{s.who, "hears of the commit, and ", 0, "hear, invalidate"})
		}
		if m.gaps {
			in.listener, in.unheard, s.does = gap, [3]bool{}, "loses PostgreSQL"
			m.yield(s, w)
		}
	case gap:
		in.listener, s.does = deaf, "LISTENs again"
		m.yield(s, w)
	case deaf:
		in.listener = listening
		m.invalidate(w, i, unique, s)
	}
}

// beat starts a session, after it has paid what is owed; or ends one because Redis has another history, or no reply.
func (m *model) beat(w world, i int) {
	in, s := &w.instances[i], step{instanceNames[i], "finds Redis as it was", 0, "beat"}
	in.excused = false
	if !in.session {
		if s.does, s.where = "starts a session", "beat, start"; m.debt && (in.owes || in.another) {
			w.invalidateOnce(i, unique)
			s.does = "invalidates, and starts a session"
		}
		in.session, in.owes, in.another = true, false, false
		m.yield(s, w)
		return
	}
	n := w
	n.end(i)
	m.fail(step{s.who, "gets no reply to INFO", 0, "beat, end"}, n)
	if in.another {
		w.end(i)
		in.owes = m.debt
		s.does, s.where = "sees that Redis has another history", "beat, end"
	}
	m.yield(s, w)
}

// lose gives Redis its oldest data back: by a restart, which ends every connection and with it every WATCH, or under
// living connections, as when it becomes a replica.
func (m *model) lose(w world) {
	w.entry = 0
	for i := range w.instances {
		w.instances[i].another, w.instances[i].excused = true, w.instances[i].session
	}
	m.fail(step{"Redis", "gets its oldest data back under living connections", 0, ""}, w)
	w.end(0)
	w.end(1)
	w.touch()
	m.fail(step{"Redis", "restarts with its oldest data", 0, ""}, w)
}

// next yields all worlds that can follow w.
func (m *model) next(w world) {
	m.write(w)
	for i := range w.instances {
		m.listen(w, i)
		m.beat(w, i)
	}
	m.lose(w)
	for r, reader := range w.readers {
		if reader.phase == idle {
			m.ask(w, r)
		} else if reader.phase != shares {
			m.read(w, r)
		}
	}
}

// key is w without what makes no difference: which reader is which, why the next session must begin with an
// invalidation, what a look-up was promised that will keep it, and names that nobody will send again.
func (w world) key() world {
	if a, b := w.readers[0], w.readers[1]; a.phase > b.phase || a.phase == b.phase && a.at > b.at {
		w.readers[0], w.readers[1] = b, a
	}
	for i := range w.instances {
		if in := &w.instances[i]; in.another && !in.session {
			in.owes, in.another = true, false
		}
	}
	for r := range w.readers {
		me, reads := &w.readers[r], w.table
		if me.phase == loaded {
			reads = me.rows
		}
		if me.phase >= missed && reads >= me.promised {
			me.promised = 0
		}
	}
	for v := version(1); v <= w.table; v++ {
		sent := w.instances[0].unheard[v] || w.instances[1].unheard[v] || w.writer == committed && w.written == v
		w.done[v] = w.done[v] || !sent
	}
	return w
}

// explore visits every world that can be reached, the nearest first. It returns how many there are and, if an answer
// is stale, the shortest schedule to that.
func explore(r rules, l limits) (count int, schedule []string) {
	warm := world{instances: [2]instance{{session: true, listener: listening}, {session: true, listener: listening}}}
	cold := warm
	cold.entry = nothing
	seen, worlds, parents := map[world]bool{warm.key(): true, cold.key(): true}, []world{warm, cold}, []int32{-1, -1}
	m, now := &model{rules: r, limits: l}, 0
	m.yield = func(_ step, w world) {
		if key := w.key(); !seen[key] {
			seen[key] = true
			worlds, parents = append(worlds, w), append(parents, int32(now))
		}
	}
	for ; now < len(worlds); now++ {
		if worlds[now].stale > 0 {
			return len(worlds), m.tell(worlds, parents, now)
		}
		m.next(worlds[now])
	}
	return len(worlds), nil
}

// tell numbers the steps that led to a stale answer, and joins those that one actor took in a row.
func (m *model) tell(worlds []world, parents []int32, at int) (lines []string) {
	var steps []step
	stale := worlds[at].stale
	for ; parents[at] >= 0; at = int(parents[at]) {
		var found step
		m.yield = func(s step, w world) {
			if w == worlds[at] {
				found = s
			}
		}
		m.next(worlds[parents[at]])
		steps = append(steps, found)
	}
	slices.Reverse(steps)
	lines = append(lines, map[version]string{0: "0. Redis holds version 0", nothing: "0. Redis is empty"}[worlds[at].entry])
	for i := 0; i < len(steps); {
		who, does, where := steps[i].who, []string(nil), []string(nil)
		for ; i < len(steps) && steps[i].who == who; i++ {
			does = append(does, strings.Replace(steps[i].does, "%d", fmt.Sprint(steps[i].n), 1))
			where = append(where, steps[i].where)
		}
		lines = append(lines, fmt.Sprintf("%d. %s %s (%s)", len(lines), who, strings.Join(does, "; "), strings.Join(slices.Compact(where), ", ")))
	}
	return append(lines, fmt.Sprintf("   Version %d was promised.", stale))
}

// With all rules no answer is stale, in any reachable world. Without one of them there is a schedule to a stale answer.
func TestModel(t *testing.T) {
	redisFails := limits{"Redis fails as often as it likes", false, unlimited}
	all := rules{fence: true, nextCall: true, debt: true, announce: true}
	for _, l := range []limits{redisFails, {"the listeners fail, and Redis does not", true, 0}, {"the listeners fail, and Redis does once", true, 1}} {
		t.Run("all rules, "+l.about, func(t *testing.T) {
			if l.gaps && l.faults > 0 && os.Getenv("MODEL") != "full" {
				t.Skip("4 million worlds: set MODEL=full")
			}
			t.Parallel()
			count, schedule := explore(all, l)
			t.Logf("%d worlds", count)
			if schedule != nil {
				t.Errorf("an answer is stale:\n%s", strings.Join(schedule, "\n"))
			}
		})
	}
	for name, without := range map[string]rules{
		"without rule 1":   {nextCall: true, debt: true, announce: true},
		"without rule 2":   {fence: true, debt: true, announce: true},
		"without rule 3":   {fence: true, nextCall: true, announce: true},
		"without rule 4":   {fence: true, nextCall: true, debt: true},
		"without receiver": {fence: true, nextCall: true, debt: true, announce: true, naive: true},
	} {
		t.Run(name, func(t *testing.T) {
			_, schedule := explore(without, redisFails)
			if schedule == nil {
				t.Fatal("no answer is stale: the model doesn't need the rule")
			}
			t.Logf("the shortest schedule to a stale answer:\n%s", strings.Join(schedule, "\n"))
		})
	}
}

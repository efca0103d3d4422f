// model_test.go: the four rules as a small state machine, and a search through all it can do.
//
// checker_test.go meets the schedules that happen to come; this meets every one, within its limits.
// There are two instances, A and B, and four transactions, which begin in any order: write a goes
// through A, b through B, c comes from psql; the fourth is unrelated, may stay open for ever, and
// rolls back. A is the instance whose readers we watch. B stands for all the others: it writes,
// invalidates and fills whenever it likes. So what holds at A holds at every instance.
//
// What needs no step of its own: A bypass is a look-up that doesn't ask Redis, or an invalidation
// that is lost. A late EXEC of A's is a fill of B's. An instance that is cut off takes no step for
// a while: an announcement may stay unheard, and a floor not asked for, as long as you like.
//
// Left out: the second level (a page has its list's snapshot), time ("within 2 s" is "once it has
// asked"), a COMMIT in doubt, a second restart of PostgreSQL, a second return of Redis to older
// data, and, because 20 million worlds are too many for a test, a restart with all four
// transactions.
//
// A search runs on one goroutine, so the race detector has nothing to find, and //go:norace makes
// it twice as fast.

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// A modelSet is a set of writes (bit 0 is a), or of transaction ids.
type modelSet uint8

const (
	writeA modelSet = 1 << iota
	writeB
	writeC
	unrelated
)

const everyWrite = writeA | writeB | writeC

// A modelSnapshot is PostgreSQL's: ids from xmax on had not begun, those of the list had not
// ended. The zero value is none.
type modelSnapshot struct {
	run, xmax uint8
	list      modelSet
}

// seen returns the ids that had ended.
func (s modelSnapshot) seen() modelSet { return (1<<s.xmax - 1) &^ s.list }

// A modelEntry is a list: the writes that its rows show, and what it says that it has seen.
type modelEntry struct {
	modelSnapshot
	rows modelSet
}

type modelRedis struct {
	entry modelEntry
	fence uint8
}

type modelPhase uint8

const (
	txIdle modelPhase = iota
	txRunning
	txRolledBack
	txCommitted
	txLearned // write a: A knows its id, or has a floor that was asked for later, or none
	txAnswered
)

type modelTransaction struct {
	phase   modelPhase
	id, run uint8
}

const (
	fillIdle modelPhase = iota
	fillWatches
	fillHalf // has taken the snapshot
	fillLoaded
	fillDone
)

// A modelFill is a look-up that missed. A schedule has one, because what a hit shows was stored by
// one fill, and all other steps of a schedule can be taken without the other fills.
type modelFill struct {
	phase modelPhase
	byA   bool
	fence uint8 // when it was WATCHed
	modelEntry
	owed modelSet // promised to those who joined the call
}

func (f modelFill) who() string {
	if f.byA {
		return "reader at A"
	}
	return "reader at B"
}

// A modelAsk is a floor on its way to A. Asking and PostgreSQL's reading are one step: what is
// learned between them stays known, which can only make a hit a miss.
type modelAsk struct {
	modelSnapshot
	drops modelSet // the ids that were known when it was asked for
	shows modelSet // the writes that were committed
}

const (
	lineGap     modelPhase = iota
	lineListens            // and has asked for a floor since
	lineHears
)

// A modelWorld is a state of everything.
type modelWorld struct {
	// PostgreSQL.
	run, next    uint8 // the server's name, and the next id
	transactions [4]modelTransaction

	redis   modelRedis
	old     modelRedis // what it may go back to; the zero value: nothing
	returns uint8
	fenced  modelSet // writes whose invalidation it got and keeps, and which are answered

	// Instance A.
	floor   modelSnapshot
	known   modelSet // ids
	ask     modelAsk
	line    modelPhase
	pending modelSet // writes that are announced to it and not heard
	told    modelSet // writes that it heard of, has in a floor asked for later, or answered itself

	fill  modelFill
	stale modelSet // promised, and missing in an answer
}

// table returns the writes that are committed.
func (w *modelWorld) table() (rows modelSet) {
	for i, x := range w.transactions {
		if x.phase >= txCommitted {
			rows |= 1 << i
		}
	}
	return rows
}

// wants returns the ids that an entry must have seen.
func (w *modelWorld) wants() modelSet { return w.floor.seen() | w.known }

// promise returns the writes which whoever asks A now must be shown: those that A was told of,
// those whose invalidation Redis keeps, and all, if A hears and nothing is on its way to it.
//
//go:norace
func (m *model) promise(w *modelWorld) modelSet {
	p := w.told | w.fenced
	if w.line == lineHears {
		p |= w.table() &^ w.pending
	}
	return p & m.watch
}

// modelLimits keep the number of worlds small enough for a test.
type modelLimits struct {
	present modelSet // the transactions that may begin
	watch   modelSet // the writes of which A is told; the others are only transactions
	runs    uint8    // of PostgreSQL
	returns uint8    // of Redis, to old data
	whole   bool     // key only does what is plain
}

// A model yields the worlds that can follow a world.
type model struct {
	modelLimits
	without string // what is off: a rule, or a detail of one
	yield   func(modelStep, *modelWorld)
	room    modelWorld

	before map[modelWorld]modelWorld // of each world that was found, the one that it followed
	now    modelWorld
	found  []modelWorld // that follow the nearest ones, and are new
	wrong  string       // with the model itself
}

// A modelStep is what happened: "psql", "commits". Its set stands for %s.
type modelStep struct {
	who, does string
	set       modelSet
}

// step yields what the effect makes of w, if the guard holds. Redis may go back to any state that
// it ever had; whether it is the one that ends here is chosen here.
//
//go:norace
func (m *model) step(w *modelWorld, s modelStep, guard bool, effect func(n *modelWorld)) {
	if !guard {
		return
	}
	n := &m.room
	*n = *w
	effect(n)
	if *n == *w {
		return
	}
	m.yield(s, n)
	if n.redis != w.redis && n.returns < m.returns {
		n.old = w.redis
		m.yield(s, n)
	}
}

// modelOutcomes are what can happen to a command to Redis.
var modelOutcomes = [3]struct {
	about   string
	arrives bool
}{{"", true}, {" (the command is lost)", false}, {" (the reply is lost)", true}}

var modelWriters = [4]string{"writer a", "writer b", "psql", "another transaction"}

// modelUnique is a fence that was never there before. (key gives it another number.)
const modelUnique = 9

// next yields all worlds that can follow w.
//
//go:norace
func (m *model) next(w *modelWorld) {
	for i := range w.transactions {
		m.transaction(w, i)
		m.hear(w, i)
	}
	m.restart(w)
	m.learnOwn(w)
	m.answer(w, 0)
	m.answer(w, 1)
	m.listen(w)
	m.takeFloor(w)
	m.lookUp(w)
	m.goOn(w)
	m.exec(w)
	m.step(w, modelStep{"Redis", "goes back to older data", 0}, w.old != modelRedis{},
		func(n *modelWorld) {
			n.redis, n.old = n.old, modelRedis{}
			n.fenced = 0
			n.returns++
		})
}

// transaction begins or ends one. Its commit is announced.
//
//go:norace
func (m *model) transaction(w *modelWorld, i int) {
	x, me, who := w.transactions[i], modelSet(1<<i), modelWriters[i]
	m.step(w, modelStep{who, "begins", 0}, x.phase == txIdle && me&m.present != 0,
		func(n *modelWorld) {
			n.transactions[i] = modelTransaction{txRunning, n.next, m.name(n)}
			n.next++
		})
	commits := x.phase == txRunning && (me != unrelated || m.other(i))
	m.step(w, modelStep{who, "commits", 0}, commits,
		func(n *modelWorld) {
			n.transactions[i].phase = txCommitted
			early := n.line == lineListens && m.without == "a floor after LISTEN"
			if n.line != lineGap && !early {
				n.pending |= me & m.watch
			}
		})
	rollsBack := x.phase == txRunning && (me == unrelated || m.other(i))
	m.step(w, modelStep{who, "rolls back", 0}, rollsBack,
		func(n *modelWorld) { n.transactions[i].phase = txRolledBack })
}

// restart keeps what is committed. Other ids come again, and A's line is cut.
//
//go:norace
func (m *model) restart(w *modelWorld) {
	m.step(w, modelStep{"PostgreSQL", "crashes and restarts", 0}, w.run < m.runs,
		func(n *modelWorld) {
			n.run++
			n.next = 0
			for i, x := range n.transactions {
				if x.phase >= txCommitted {
					n.next = max(n.next, x.id+1)
				}
				if x.phase == txRunning {
					n.transactions[i] = modelTransaction{}
				}
			}
			if n.fill.phase == fillHalf {
				n.fill = modelFill{phase: fillDone}
			}
			n.line = lineGap
		})
}

func (m *model) name(w *modelWorld) uint8 {
	if m.without == "the server's name" {
		return 1
	}
	return w.run
}

// snapshot is pg_current_snapshot, with the server's name.
//
//go:norace
func (m *model) snapshot(w *modelWorld) modelSnapshot {
	s := modelSnapshot{run: m.name(w), xmax: w.next}
	for _, x := range w.transactions {
		if x.phase == txRunning && m.without != "the running list" {
			s.list |= 1 << x.id
		}
	}
	return s
}

// learn notes an id at A. It reports false if the floor is of another server, or there is none.
func (m *model) learn(n *modelWorld, x modelTransaction) bool {
	if m.without == "only a floor changes the server" && n.floor.run != x.run {
		n.floor, n.known = modelSnapshot{run: x.run}, 0
	}
	if n.floor.run != x.run {
		return false
	}
	n.known |= 1 << x.id
	return true
}

// learnOwn comes between the commit of write a and its invalidation. Where its id says nothing, it
// waits for a floor (takeFloor), or gives up.
//
//go:norace
func (m *model) learnOwn(w *modelWorld) {
	a := w.transactions[0]
	mine := a.phase == txCommitted && m.watch&writeA != 0 && m.without != "naive"
	foreign := w.floor.run != a.run
	late := m.without == "only a floor changes the server"
	m.step(w, modelStep{modelWriters[0], "makes its id known at A", 0},
		mine && (!foreign || late),
		func(n *modelWorld) {
			m.learn(n, a)
			n.transactions[0].phase = txLearned
		})
	m.step(w, modelStep{modelWriters[0], "gets no new floor: A has none", 0}, mine && foreign,
		func(n *modelWorld) {
			n.floor, n.known = modelSnapshot{}, 0
			n.transactions[0].phase = txLearned
			if m.without != "giving up ends the ask" {
				n.noFloor()
			}
		})
}

// answer invalidates for write a or b, and answers it.
//
//go:norace
func (m *model) answer(w *modelWorld, i int) {
	me, who, phase := modelSet(1<<i), modelWriters[i], w.transactions[i].phase
	answered := func(n *modelWorld) {
		n.transactions[i].phase = txAnswered
		n.told |= me & writeA
	}
	if m.without == "naive" {
		m.step(w, modelStep{who, "is answered", 0}, phase == txCommitted, answered)
		return
	}
	ready := phase == txLearned || phase == txCommitted && me == writeB
	if !ready || m.watch&me == 0 {
		return
	}
	for _, o := range modelOutcomes {
		does := "invalidates" + o.about + "; is answered"
		m.step(w, modelStep{who, does, 0}, true,
			func(n *modelWorld) {
				answered(n)
				if o.arrives {
					n.redis = modelRedis{fence: modelUnique}
					n.fenced |= me
				}
			})
	}
}

// hear is an announcement that reaches A: late by any time, in any order. What was on its way when
// the line was lost may still be heard, until A LISTENs again.
//
//go:norace
func (m *model) hear(w *modelWorld, i int) {
	me := modelSet(1 << i)
	m.step(w, modelStep{"A", "hears of write %s", me}, w.pending&me != 0,
		func(n *modelWorld) {
			n.pending &^= me
			if m.without == "announcement" || m.without == "naive" {
				return
			}
			if m.learn(n, n.transactions[i]) {
				n.told |= me
			} else {
				n.line = lineGap
			}
		})
}

// listen is A's line: it fails, or LISTENs again. What is announced in the gap is lost.
//
//go:norace
func (m *model) listen(w *modelWorld) {
	m.step(w, modelStep{"A", "loses its line to PostgreSQL", 0}, w.line != lineGap,
		func(n *modelWorld) { n.line = lineGap })
	m.step(w, modelStep{"A", "LISTENs and asks for a floor", 0},
		w.line == lineGap && m.mayAsk(w),
		func(n *modelWorld) {
			m.askFloor(n)
			n.line, n.pending = lineListens, 0
		})
}

// mayAsk allows one ask at a time. "announcement" is off with the asking in its place.
func (m *model) mayAsk(w *modelWorld) bool {
	return w.ask == modelAsk{} && m.without != "announcement" && m.without != "naive"
}

func (m *model) askFloor(n *modelWorld) {
	n.ask = modelAsk{m.snapshot(n), n.known, n.table() & m.watch}
}

// takeFloor may come at any time: a hundred ids, a deaf instance and a new server are reasons.
//
//go:norace
func (m *model) takeFloor(w *modelWorld) {
	m.step(w, modelStep{"A", "asks for a floor", 0}, m.mayAsk(w), m.askFloor)
	m.step(w, modelStep{"A", "gets no floor", 0}, w.ask != modelAsk{}, (*modelWorld).noFloor)
	m.step(w, modelStep{"A", "gets the floor", 0}, w.ask != modelAsk{},
		func(n *modelWorld) {
			n.known &^= n.ask.drops
			if n.floor.run != n.ask.run || m.without == "what is learned meanwhile stays" {
				n.known = 0
			}
			n.floor = n.ask.modelSnapshot
			n.told |= n.ask.shows
			if a := &n.transactions[0]; a.phase == txCommitted && n.ask.shows&writeA != 0 {
				a.phase = txLearned
			}
			if n.line == lineListens {
				n.line = lineHears
			}
			n.ask = modelAsk{}
		})
}

func (w *modelWorld) noFloor() {
	w.ask = modelAsk{}
	if w.line == lineListens {
		w.line = lineGap
	}
}

// passes reports whether the entry in Redis is a hit at A. To have seen what the floor has seen is
// to have an xmax not below the floor's, and to list no id below that which the floor doesn't list.
func (m *model) passes(w *modelWorld) bool {
	e := w.redis.entry
	if m.without == "snapshot" || m.without == "naive" {
		return e.run > 0
	}
	return w.floor.run > 0 &&
		e.run == w.floor.run &&
		e.xmax >= w.floor.xmax &&
		w.wants()&^e.seen() == 0
}

// lookUp is a reader's. Who waits for the next call is one who asks later: it is promised no more.
// An answer from PostgreSQL alone shows all that was committed when it was asked for: no step.
//
//go:norace
func (m *model) lookUp(w *modelWorld) {
	hit := m.passes(w)
	runs := w.fill.byA && w.fill.phase != fillDone
	m.step(w, modelStep{"reader at A", "hits: the answer shows %s", w.redis.entry.rows},
		hit && !runs,
		func(n *modelWorld) { n.stale = m.promise(n) &^ n.redis.entry.rows })
	m.step(w, modelStep{"another reader at A", "joins the running call", 0},
		runs && m.without == "next call",
		func(n *modelWorld) { n.fill.owed |= m.promise(n) })
	for _, byA := range [2]bool{true, false} {
		f := modelFill{phase: fillWatches, byA: byA, fence: w.redis.fence}
		m.step(w, modelStep{f.who(), "misses; WATCHes the fence", 0},
			w.fill.phase == fillIdle && !(byA && hit),
			func(n *modelWorld) { n.fill = f })
	}
}

// goOn is a fill's way from WATCH to EXEC: first the snapshot, then the rows.
//
//go:norace
func (m *model) goOn(w *modelWorld) {
	first, second := fillWatches, fillHalf
	if m.without == "the snapshot before the rows" {
		first, second = second, first
	}
	m.step(w, modelStep{w.fill.who(), "takes the snapshot", 0}, w.fill.phase == first,
		func(n *modelWorld) {
			n.fill.modelSnapshot = m.snapshot(n)
			n.fill.phase++
		})
	m.step(w, modelStep{w.fill.who(), "reads the rows: they show %s", w.table()},
		w.fill.phase == second,
		func(n *modelWorld) {
			n.fill.rows = n.table()
			n.fill.phase++
		})
}

// exec stores what a fill has read, if the fence is unchanged, and answers.
//
//go:norace
func (m *model) exec(w *modelWorld) {
	f := w.fill
	if f.phase != fillLoaded {
		return
	}
	unchanged := f.fence == w.redis.fence || m.without == "fence"
	for _, o := range modelOutcomes {
		does := "stores them" + o.about + "; the answer shows %s"
		m.step(w, modelStep{f.who(), does, f.rows}, unchanged,
			func(n *modelWorld) {
				n.endFill()
				if o.arrives {
					n.redis.entry = f.modelEntry
				}
			})
	}
	m.step(w, modelStep{f.who(), "stores nothing; the answer shows %s", f.rows}, !unchanged,
		(*modelWorld).endFill)
}

func (w *modelWorld) endFill() {
	w.stale = w.fill.owed &^ w.fill.rows
	w.fill = modelFill{phase: fillDone}
}

// key returns w without what makes no difference. It reports false if no answer can be stale from
// here on, because Redis has no entry and no fill will store one.
//
//go:norace
func (m *model) key(w modelWorld) (modelWorld, bool) {
	if m.without == "" {
		// The floor asks for these anyway.
		w.known &^= w.floor.seen()
	}
	if !m.whole {
		m.forget(&w)
		m.sortOthers(&w)
	}
	w.ask.drops &= w.known
	if w.fill.phase < fillLoaded {
		// The rows will show all that is promised until they are read.
		w.fill.owed = 0
	}
	w.fill.owed &^= w.fill.rows
	if w.old.entry.run == 0 {
		w.old.fence = w.redis.fence
	}
	if w.fill.phase == fillIdle || w.fill.phase == fillDone {
		w.fill.fence = w.redis.fence
	}

	// Of the fences only matters which ones are the same.
	fences := make([]uint8, 0, 3)
	for _, f := range [3]*uint8{&w.redis.fence, &w.fill.fence, &w.old.fence} {
		if !slices.Contains(fences, *f) {
			fences = append(fences, *f)
		}
		*f = uint8(slices.Index(fences, *f))
	}
	over := w.fill.phase == fillDone && w.redis.entry.run == 0 && w.old.entry.run == 0
	return w, !over || w.stale != 0
}

// forget is for one watched write, and all rules on. An entry that shows the write can't be stale,
// and one that is outdated at A stays so, because A never wants less (explore looks): both are as
// good as none. Whose fill it is makes no difference, because B may do all that A may.
//
//go:norace
func (m *model) forget(w *modelWorld) {
	for _, e := range [2]*modelEntry{&w.redis.entry, &w.old.entry} {
		e.rows &= m.watch
		if e.rows == m.watch || w.outdated(e.modelSnapshot) {
			*e = modelEntry{}
		}
	}
	f := &w.fill
	f.byA = false
	f.rows &= m.watch
	shows := f.rows == m.watch || f.phase < fillLoaded && w.table()&m.watch != 0
	if shows || w.outdated(f.modelSnapshot) {
		*f = modelFill{phase: fillDone}
	}
	if w.told == m.watch {
		// It is promised whatever comes.
		w.fenced, w.pending, w.line = 0, 0, lineGap
	}
}

// outdated reports whether an entry with this snapshot is no hit at A, now and for ever.
//
//go:norace
func (w *modelWorld) outdated(s modelSnapshot) bool {
	if s.run == 0 || w.floor.run != s.run {
		return s.run != 0 && w.floor.run > s.run
	}
	return s.xmax < w.floor.xmax || w.wants()&^s.seen() != 0
}

// other reports whether A is told nothing of this transaction. That loses no stale answer: what A
// learns of one write and invalidates for it can't make an entry that lacks another write a hit.
//
//go:norace
func (m *model) other(i int) bool { return !m.whole && (m.watch|^m.present)&(1<<i) == 0 }

// sortOthers makes these transactions one kind, each of which may commit or roll back. Of one that
// has ended matters at most whether its id can come again.
//
//go:norace
func (m *model) sortOthers(w *modelWorld) {
	others := make([]modelTransaction, 0, 4)
	for i, x := range w.transactions {
		if m.other(i) {
			x.run = 0
			if x.phase == txRolledBack || x.phase == txCommitted && w.run == m.runs {
				x = modelTransaction{phase: txRolledBack}
			}
			others = append(others, x)
		}
	}
	slices.SortFunc(others, func(x, y modelTransaction) int {
		return cmp.Or(cmp.Compare(x.phase, y.phase), cmp.Compare(x.id, y.id))
	})
	for i := range w.transactions {
		if m.other(i) {
			w.transactions[i] = others[0]
			others = others[1:]
		}
	}
}

// explore visits every world that can be reached, the nearest first. It returns the shortest
// schedule to a stale answer, if there is one.
//
//go:norace
func (m *model) explore(t *testing.T) (schedule []string) {
	cold := modelWorld{run: 1}
	warm := cold
	warm.floor = m.snapshot(&warm)
	warm.redis.entry.modelSnapshot = warm.floor
	warm.line = lineHears
	m.before = map[modelWorld]modelWorld{warm: {}, cold: {}}
	m.yield = m.visit
	for nearest := []modelWorld{warm, cold}; len(nearest) > 0; nearest = m.found {
		m.found = nil
		for _, w := range nearest {
			if w.stale != 0 {
				return m.tell(w)
			}
			m.now = w
			m.next(&w)
		}
	}
	if m.wrong != "" {
		t.Error(m.wrong)
	}
	t.Logf("%d worlds", len(m.before))
	return nil
}

// visit notes a world that follows the present one, if it is new.
//
//go:norace
func (m *model) visit(s modelStep, n *modelWorld) {
	w := &m.now
	if !m.whole && n.floor.run == w.floor.run && w.wants()&^n.wants() != 0 {
		m.wrong = fmt.Sprintf("A wants less of an entry than before: %v, from %+v", s, *w)
	}
	k, open := m.key(*n)
	if _, seen := m.before[k]; open && !seen {
		m.before[k] = m.now
		m.found = append(m.found, k)
	}
}

// tell numbers the steps that led to a stale answer, and joins those that one actor took in a row.
func (m *model) tell(at modelWorld) (lines []string) {
	stale := at.stale
	var steps []modelStep
	for before := m.before[at]; before != (modelWorld{}); at, before = before, m.before[before] {
		var found modelStep
		m.yield = func(s modelStep, n *modelWorld) {
			if k, _ := m.key(*n); k == at && found.who == "" {
				found = s
			}
		}
		m.next(&before)
		steps = append(steps, found)
	}
	slices.Reverse(steps)
	who := ""
	for _, s := range steps {
		does := strings.Replace(s.does, "%s", s.set.String(), 1)
		if s.who == who {
			lines[len(lines)-1] += "; " + does
		} else {
			lines = append(lines, s.who+" "+does)
		}
		who = s.who
	}
	for i := range lines {
		lines[i] = fmt.Sprintf("%d. %s", i+1, lines[i])
	}
	end := fmt.Sprintf("   %s was promised. (%d steps)", stale, len(steps))
	return append(lines, end)
}

// String names the writes of a set.
func (s modelSet) String() string {
	var names []string
	for i, name := range [3]string{"a", "b", "c"} {
		if s&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if names == nil {
		return "nothing"
	}
	return strings.Join(names, " and ")
}

// With all rules no answer is stale in any world. A write of psql's is one of B's that stays
// unanswered, so it isn't watched alone.
func TestModel(t *testing.T) {
	// Beside tests that wait.
	t.Parallel()
	three := writeA | writeB | unrelated
	for about, l := range map[string]modelLimits{
		"a, four transactions": {everyWrite | unrelated, writeA, 1, 1, false},
		"b, four transactions": {everyWrite | unrelated, writeB, 1, 0, false},
		"a, three, a restart":  {three, writeA, 2, 1, false},
		"b, three, a restart":  {three, writeB, 2, 1, false},
		"a and b as a whole":   {writeA | writeB, writeA | writeB, 1, 0, true},
	} {
		t.Run("all rules, write "+about, func(t *testing.T) {
			t.Parallel()
			m := &model{modelLimits: l}
			if schedule := m.explore(t); schedule != nil {
				t.Errorf("an answer is stale:\n%s", strings.Join(schedule, "\n"))
			}
		})
	}
}

// Without a rule, or a detail of one, there is a schedule to a stale answer.
func TestModelNeedsEachRule(t *testing.T) {
	t.Parallel()
	calm := modelLimits{writeA | writeB, writeA | writeB, 1, 0, true}
	psql := modelLimits{writeC, writeC, 1, 0, true}
	crash := modelLimits{writeA | unrelated, writeA, 2, 0, true}
	for _, off := range []struct {
		rule string
		modelLimits
	}{
		{"next call", calm},
		{"snapshot", calm},
		{"fence", calm},
		{"announcement", psql},
		{"naive", calm},
		{"the running list", calm},
		{"the snapshot before the rows", calm},
		{"what is learned meanwhile stays", calm},
		{"a floor after LISTEN", calm},
		{"the server's name", crash},
		{"only a floor changes the server", crash},
		{"giving up ends the ask", crash},
	} {
		t.Run("without "+off.rule, func(t *testing.T) {
			t.Parallel()
			m := &model{modelLimits: off.modelLimits, without: off.rule}
			schedule := m.explore(t)
			if schedule == nil {
				t.Fatal("no answer is stale: the model doesn't need it")
			}
			t.Logf("the shortest schedule to a stale answer:\n%s", strings.Join(schedule, "\n"))
		})
	}
}

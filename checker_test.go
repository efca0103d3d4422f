// checker_test.go: the promise, under load and faults: a GET that starts after a write was answered
// shows it.
//
// Each writer owns a listing whose price only grows. Each reader notes what was answered to all
// writers, then reads, and compares: a lower price, or no such listing, is stale. The first such
// read ends the test, and is printed:
//
//	listing 2: PUT 7 was answered by program 1 at 12:01:02.003; a GET from program 1 that began
//	3.1ms later showed 6 (Cache-Status: redis; hit; ttl=900)
//
// scripts/break removes a rule and shows that a test here notices.

package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"
)

// soon is when an excuse ends. What shows within milliseconds, or within 2 s where a program
// asks, has all this time, because the machine may be busy.
const soon = 5 * time.Second

// A checker keeps readers and writers busy at one program or more.
type checker struct {
	programs []*program
	running  sync.WaitGroup

	mu            sync.Mutex // guards the rest
	forgets       bool       // Redis loses what it was told
	changed       *sync.Cond // signals that paused or stopping has changed
	paused        bool       // no writer begins anything
	busy          int        // how many writers are at it
	stopping      bool
	newest        []write // of each listing. The last listing is written by SQL only.
	reads, writes int
	excused       int    // reads that missed a write and were excused
	wrong         string // the first stale read or failed request
}

// A write is one that was answered: a GET that begins later must show its price, or a higher one.
type write struct {
	by    *program // nil: SQL, past the programs
	price int
	at    time.Time
	lost  bool // its invalidation may not have reached Redis
}

// check starts the readers and writers; stop ends them.
func check(t *testing.T, programs ...*program) *checker {
	t.Helper()
	c := &checker{programs: programs}
	c.changed = sync.NewCond(&c.mu)
	owners := slices.Repeat(programs, 3)
	for _, by := range append(owners, nil) {
		programs[0].want(t, 201, "POST", propertiesPath, titled("checked"))
		c.newest = append(c.newest, write{by: by, price: 1, at: time.Now()})
	}
	for i, p := range owners {
		c.running.Go(func() {
			for c.begin(1) {
				c.put(p, i)
				c.begin(-1)
			}
		})
	}
	for i := range 8 {
		encoding := []string{"identity", "gzip"}[i%2]
		for _, p := range programs {
			c.running.Go(func() {
				for c.begin(0) {
					c.read(p, encoding, i/2)
				}
			})
		}
	}
	t.Cleanup(func() { c.end(t) })
	return c
}

// excuses reports whether a read that begins now may miss a write, because Redis has no
// invalidation for it, only an announcement is on its way. A program's own writes have no excuse.
// The caller holds mu.
func (c *checker) excuses(w write, reader *program) bool {
	another := w.by == nil || w.by != reader && (w.lost || c.forgets)
	return another && time.Since(w.at) < soon
}

// begin counts a writer in or out, or waits with it, or has it end. Readers aren't counted.
func (c *checker) begin(writers int) (goOn bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for writers > 0 && c.paused && !c.stopping {
		c.changed.Wait()
	}
	if !c.stopping || writers < 0 {
		c.busy += writers
	}
	return !c.stopping
}

// put writes the next price of a listing.
func (c *checker) put(p *program, listing int) {
	c.mu.Lock()
	price := c.newest[listing].price + 1
	c.mu.Unlock()
	body := with(fmt.Sprintf(`"title":"checked","price":%d`, price))
	session := p.cache.link.session.Load()
	e, err := p.send("PUT", fmt.Sprintf("/properties/%d/", listing+1), body)
	lost := p.bypassed() || p.cache.link.session.Load() != session
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil || e.StatusCode != 200 {
		c.blame("listing %d: PUT %d to program %d failed: %v %s",
			listing+1, price, c.number(p), err, e.body)
		return
	}
	c.newest[listing] = write{p, price, time.Now(), lost}
	c.writes++
}

// commit writes the last listing past the programs.
func (c *checker) commit(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	id := len(c.newest)
	price := c.newest[id-1].price + 1
	c.mu.Unlock()
	runSQL(t, psql(t), fmt.Sprintf(`UPDATE properties SET price = %d WHERE id = %d`, price, id))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.newest[id-1] = write{price: price, at: time.Now()}
}

// read looks once, and counts what it sees. Before that, it makes other GETs. Otherwise the
// readers would keep step, because those who share a call have its answer at the same time, and
// none would ask while a call runs.
func (c *checker) read(p *program, encoding string, others int) {
	for range others {
		p.send("GET", "/properties/1/", "")
	}
	missed, excused, err := c.look(p, encoding)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reads++
	switch {
	case err != nil:
		c.blame("a GET from program %d failed: %v", c.number(p), err)
	case excused:
		c.excused++
	case missed != "":
		c.blame("%s", missed)
	}
}

// look makes a GET and returns a write that it missed, in words: one without an excuse, if there
// is one; else "".
func (c *checker) look(p *program, encoding string) (missed string, excused bool, err error) {
	c.mu.Lock()
	newest, excuses := slices.Clone(c.newest), make([]bool, len(c.newest))
	for i, w := range newest {
		excuses[i] = c.excuses(w, p)
	}
	c.mu.Unlock()
	began := time.Now()
	e, err := p.send("GET", propertiesPath, "", "Accept-Encoding: "+encoding)
	if err != nil {
		return "", false, err
	}
	shown, err := e.prices()
	if err != nil {
		return "", false, err
	}
	for i, w := range newest {
		if shown[i+1] >= w.price || missed != "" && excuses[i] {
			continue
		}
		what := fmt.Sprintf("PUT %d was answered by program %d", w.price, c.number(w.by))
		if w.by == nil {
			what = fmt.Sprintf("SQL had committed %d", w.price)
		}
		missed = fmt.Sprintf("listing %d: %s at %s; a GET from program %d that began %v later "+
			"showed %d (Cache-Status: %s)", i+1, what, w.at.Format("15:04:05.000"), c.number(p),
			began.Sub(w.at).Round(time.Microsecond), shown[i+1], e.Header.Get("Cache-Status"))
		if excused = excuses[i]; !excused {
			break
		}
	}
	return missed, excused, nil
}

// prices are those of a list, by id. A listing that isn't there has the price 0.
func (e exchange) prices() (map[int]int, error) {
	body, err := e.unzipped()
	if err != nil {
		return nil, err
	}
	var list []property
	if err := json.Unmarshal(body, &list); err != nil || e.StatusCode != 200 {
		return nil, fmt.Errorf("status %d: %.200s (%w)", e.StatusCode, body, err)
	}
	prices := map[int]int{}
	for _, p := range list {
		var whole int
		// Up to the point.
		fmt.Sscan(p.Price, &whole)
		prices[int(p.ID)] = whole
	}
	return prices, nil
}

func (c *checker) number(p *program) int { return slices.Index(c.programs, p) + 1 }

// blame keeps the first thing that went wrong. The caller holds mu.
func (c *checker) blame(form string, args ...any) {
	if c.wrong == "" {
		c.wrong = fmt.Sprintf("after %d reads and %d writes: ", c.reads, c.writes) +
			fmt.Sprintf(form, args...)
	}
}

// judge ends the test if something went wrong.
func (c *checker) judge(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wrong != "" {
		t.Fatal(c.wrong)
	}
}

// wait lets n more reads and some writes happen.
func (c *checker) wait(t *testing.T, n int) {
	t.Helper()
	c.mu.Lock()
	reads, writes := c.reads+n, c.writes+len(c.newest)
	c.mu.Unlock()
	eventually(t, "there were reads and writes", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.reads >= reads && c.writes >= writes || c.wrong != ""
	})
	c.judge(t)
}

// pause lets the writers begin nothing more, and waits until they have ended what they began.
// resume ends that.
func (c *checker) pause(t *testing.T) {
	t.Helper()
	c.set(&c.paused, true)
	eventually(t, "what was under way has ended", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.busy == 0
	})
}

func (c *checker) resume() { c.set(&c.paused, false) }

func (c *checker) set(flag *bool, value bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	*flag = value
	c.changed.Broadcast()
}

// recover waits until every program serves hits that began now or later. (Each of the 8 readers
// may have begun one before.) Call it while the writers pause.
func (c *checker) recover(t *testing.T) {
	t.Helper()
	for _, p := range c.programs {
		if p.bypassed() {
			// It needn't wait for the end of a pause.
			p.cache.link.connect(t.Context())
		}
		before := p.cache.pages.metrics().Hits
		eventually(t, "there are hits", func() bool {
			c.judge(t)
			return p.cache.pages.metrics().Hits > before+8
		})
	}
}

// settle waits until every program shows every write that has been answered or committed, because
// no excuse lasts.
func (c *checker) settle(t *testing.T) {
	t.Helper()
	for _, p := range c.programs {
		eventually(t, "every write shows", func() bool {
			missed, excused, err := c.look(p, "identity")
			if err != nil || missed != "" && !excused {
				t.Fatal(cmp.Or(missed, fmt.Sprint(err)))
			}
			return missed == ""
		})
	}
}

// end ends the load.
func (c *checker) end(t *testing.T) {
	t.Helper()
	c.set(&c.stopping, true)
	ended := make(chan bool)
	go func() {
		c.running.Wait()
		close(ended)
	}()
	receive(t, ended)
}

// stop ends the load and judges what it saw.
func (c *checker) stop(t *testing.T) {
	t.Helper()
	c.end(t)
	c.judge(t)
	t.Logf("%d reads, %d writes, %d excused reads", c.reads, c.writes, c.excused)
}

// race lets the readers and writers race with each other alone. Now and then the writers pause,
// because a page that they leave alone is hit.
func (c *checker) race(t *testing.T) {
	t.Helper()
	for range 6 {
		c.wait(t, 100)
		c.pause(t)
		c.recover(t)
		c.resume()
	}
	c.stop(t)
}

// dawdle slows the queries down after they have read the rows, which is where the races are.
func (p *program) dawdle() *program {
	p.wrapQuery(func(query view, w http.ResponseWriter, r *http.Request) error {
		defer time.Sleep(5 * time.Millisecond)
		return query(w, r)
	})
	return p
}

// One program, no faults. (Without: next call; naive.)
func TestNeverStale(t *testing.T) {
	check(t, start(t, options{}).dawdle()).race(t)
}

// Two programs on one Redis, no faults. One hears nothing, so what the other writes is known to
// Redis only. (Without: fence.)
func TestNeverStaleTwoInstances(t *testing.T) {
	a, b := start(t, options{}).dawdle(), startAnother(t, options{deaf: true}).dawdle()
	check(t, a, b).race(t)
}

// Two programs, and SQL that changes a row past them. Both show it soon, and what goes through them
// stays fresh. In every other round their own writers pause, so that no invalidation comes to help.
// (Without: announcement.)
func TestNeverStaleBesideSQL(t *testing.T) {
	for about, deaf := range map[string]bool{"heard": false, "asked": true} {
		t.Run(about, func(t *testing.T) {
			c := check(t, start(t, options{deaf: deaf}), startAnother(t, options{deaf: deaf}))
			for round := range 6 {
				if round%2 == 0 {
					c.pause(t)
					c.recover(t)
				}
				c.commit(t)
				c.settle(t)
				c.resume()
				c.wait(t, 30)
			}
			c.stop(t)
		})
	}
}

// The network between one of two programs and Redis fails in every way it can. A fault begins
// while a page is in Redis, which the writes during the fault may not be able to delete.
func TestNeverStaleUnderNetworkFaults(t *testing.T) {
	network, redisURL := proxyToRedis(t)
	a, b := start(t, options{redisURL: redisURL}), startAnother(t, options{})
	c := check(t, a, b)
	for _, f := range []fault{refused, swallow, mute, cut, slow, slower} {
		c.pause(t)
		c.recover(t)
		network.set(t, f)
		c.resume()
		c.wait(t, 100)
		c.pause(t)
		// One write, alone: no other one invalidates.
		c.put(a, 0)
		c.settle(t)
		network.set(t, healthy)
		c.recover(t)
		c.resume()
	}
	c.stop(t)
}

// Redis itself fails in every way it can: it goes back to older data at any moment, stops,
// restarts, loses its keys or its clients, has others' data at our keys, or refuses writes.
// (Without: snapshot.)
func TestNeverStaleUnderRedisFaults(t *testing.T) {
	server := startRedis(t)
	a := start(t, options{redisURL: server.url})
	b := startAnother(t, options{redisURL: server.url})
	c := check(t, a, b)
	c.set(&c.forgets, true)
	for _, fault := range redisFaults {
		t.Log(fault.about)
		c.pause(t)
		c.recover(t)
		mend := fault.harm(server)
		c.resume()
		c.wait(t, 50)
		mend()
		c.wait(t, 50)
		c.pause(t)
		// With the page of before, and no write that would delete it.
		c.recover(t)
		c.settle(t)
		c.resume()
	}
	c.stop(t)
}

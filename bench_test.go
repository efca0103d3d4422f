// bench_test.go: how fast it is, and how right, next to simpler ways to serve the same bytes.
//
//	scripts/with-services scripts/bench
//
// Requests per second tell more about the machine than about the program. So all ways are measured
// in turn, in several rounds: what else the machine does falls on all of them, and the ratios
// within a round hold elsewhere, too. Every figure is the median of the rounds.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	benchRounds = 9
	benchFor    = 500 * time.Millisecond // of load, for each way and round
)

func init() { instead["BENCH_CLIENT"] = benchClient }

// BenchmarkServing prints docs/measurements.md's tables.
func BenchmarkServing(b *testing.B) {
	b.Run("stale", benchStale)
	for _, listings := range []uint{100, 10_000, 100_000} {
		b.Run(fmt.Sprint(listings), func(b *testing.B) { benchWays(b, listings) })
	}
	b.Run("others", func(b *testing.B) {
		fmt.Print("\n\n| what | measured |\n| --- | --- |\n")
		for _, listings := range []uint{10_000, 100_000} {
			benchColdRead(b, listings)
		}
		benchStampede(b)
		benchWrite(b)
		benchHeard(b)
		benchAsking(b)
		benchSlowRedis(b)
		benchIdle(b)
		benchMemory(b, 10_000, "hits on 64 connections", hits)
		benchMemory(b, 100_000, "a fill, then 64 readers that stop reading", stalledReaders)
		for _, clients := range []string{"4", "16"} {
			benchTrigger(b, clients)
		}
	})
	b.Run("growth", func(b *testing.B) {
		fmt.Print("\n\n| listings | writes/s | hits | requests/s |\n",
			"| ---: | ---: | ---: | ---: |\n")
		for _, listings := range []uint{100, 10_000} {
			benchGrowth(b, listings)
		}
	})
}

// row prints a row of the table of others.
func row(what, format string, values ...any) {
	fmt.Printf("| %s | %s |\n", what, fmt.Sprintf(format, values...))
}

// A contender is a way to cache the list. It answers GET and PUT, and counts its list queries.
type contender struct {
	name, url string
	queries   *atomic.Int64
}

// benchStale counts the answers that lack a write which was answered before they began, for 8
// readers beside a writer.
func benchStale(b *testing.B) {
	fmt.Print("\n\n| way | writes/s | answers | stale in 10,000 | list queries/s |\n",
		"| --- | ---: | ---: | ---: | ---: |\n")
	for _, writes := range []int{10, 100} {
		p := start(b, options{rows: 100})
		queries := p.countQueries()
		for _, c := range []contender{
			rival(b, p, "the exercise: DEL of the list", "bench:list"),
			rival(b, p, "GET, else SET; DEL of both", "bench:list", "bench:page"),
			{"this program", p.url, &queries.n},
		} {
			c.measure(b, writes)
		}
	}
}

// rival caches the list for an hour and the page for 15 minutes. A write deletes the keys.
func rival(b *testing.B, p *program, name string, keys ...any) contender {
	c := contender{name: name, queries: new(atomic.Int64)}
	pool := &redis.Pool{MaxIdle: 128, Dial: func() (redis.Conn, error) {
		return redis.DialURL(services.redisURL, redis.DialReadTimeout(patience))
	}}
	b.Cleanup(func() { pool.Close() })
	getOrSet := func(conn redis.Conn, key string, ttl int, load func() []byte) []byte {
		if found, err := redis.Bytes(conn.Do("GET", key)); err == nil {
			return found
		}
		loaded := load()
		do(b, conn, "SET", key, loaded, "EX", ttl)
		return loaded
	}
	query := func() []byte {
		c.queries.Add(1)
		a := &answer{header: http.Header{}}
		r, _ := http.NewRequest("GET", "", http.NoBody)
		if err := p.properties.allView(a, r); err != nil {
			b.Error(err)
		}
		return a.Bytes()
	}
	c.url = newServer(b, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := pool.Get()
		defer conn.Close()
		if r.Method == "PUT" {
			put, _ := readProperty(w, r) // as measure sends it
			runSQL(b, p.db, `UPDATE properties SET price = `+put.Price+` WHERE id = 1`)
			do(b, conn, "DEL", keys...)
			return
		}
		writeBytes(w, getOrSet(conn, "bench:page", 900, func() []byte {
			return getOrSet(conn, "bench:list", 3600, query)
		}))
	}))
	return c
}

// measure lets 8 readers and a writer go for 5 s, and prints a row.
func (c contender) measure(b *testing.B, writes int) {
	b.Helper()
	var newest, answers, stale atomic.Int64
	var running sync.WaitGroup
	p := &program{url: c.url}
	end := time.Now().Add(5 * time.Second)
	before := c.queries.Load()
	running.Go(func() {
		for n := int64(1); time.Now().Before(end); n++ {
			p.want(b, 200, "PUT", "/properties/1/", with(fmt.Sprintf(`"price":"%d"`, n)))
			newest.Store(n)
			time.Sleep(time.Second / time.Duration(writes))
		}
	})
	for range 8 {
		running.Go(func() {
			for time.Now().Before(end) {
				want := newest.Load()
				shown, err := p.firstPrice()
				if err != nil {
					b.Error(err)
					return
				}
				// The listing starts with a higher price than any that is written.
				if want > 0 && (shown < want || shown > 50_000) {
					stale.Add(1)
				}
				answers.Add(1)
			}
		})
	}
	running.Wait()
	fmt.Printf("| %s | %d | %d | %.1f | %.1f |\n", c.name, writes, answers.Load(),
		1e4*float64(stale.Load())/float64(answers.Load()), float64(c.queries.Load()-before)/5)
}

var firstPrice = regexp.MustCompile(`^\[{"id":1,[^}]*"price":"(\d+)`)

// firstPrice is the one that the list shows for listing 1.
func (p *program) firstPrice() (int64, error) {
	e, err := p.send("GET", propertiesPath, "")
	if err != nil {
		return 0, err
	}
	found := firstPrice.FindSubmatch(e.body)
	if found == nil {
		return 0, fmt.Errorf("no price: %.100s", e.body)
	}
	return strconv.ParseInt(string(found[1]), 10, 64)
}

// A way is one to serve the list.
type way struct {
	name              string
	load              benchLoad
	rates, p50s, p99s []float64 // by round: requests/s, ms, ms
}

// benchWays compares two simple ways with the program's three, all of them hits.
func benchWays(b *testing.B, listings uint) {
	p := start(b, options{rows: listings})
	list := p.want(b, 200, "GET", propertiesPath, "")
	p.want(b, 200, "GET", propertiesPath, "", "Accept-Encoding: gzip")
	notModified := get(p.url, "If-None-Match: "+list.Header.Get("ETag")+"\r\n")
	notModified.Status = "304"
	memory := way{name: "memory", load: get(memoryServer(b, list.body), "")}
	obvious := way{name: "obvious", load: get(rival(b, p, "").url, "")}
	hit := way{name: "hit", load: get(p.url, "")}
	gzip := way{name: "gzip", load: get(p.url, "Accept-Encoding: gzip\r\n")}
	fmt.Printf("\n\n%d listings, %d bytes\n\n", listings, len(list.body))
	fmt.Println("| connections | way | requests/s | p50 ms | p99 ms " +
		"| of memory | of obvious | of hit |")
	fmt.Println("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
	for _, connections := range []int{1, 32, 128} {
		ways := []way{memory, obvious, hit, gzip, {name: "304", load: notModified}}
		if connections*len(list.body) > 200<<20 {
			// Redis counts replies that wait to be sent as memory in use. So many of them would
			// take it over its limit of 256 MB, and it would evict every key, this one too.
			ways = slices.Delete(ways, 1, 2)
		}
		before := p.cache.pages.metrics()
		for range benchRounds {
			for i := range ways {
				ways[i].measure(b, connections)
			}
		}
		after := p.cache.pages.metrics()
		if after.Misses+after.Bypassed > before.Misses+before.Bypassed {
			b.Errorf("not all were hits: %+v, then %+v", before, after)
		}
		for _, w := range ways {
			fmt.Printf("| %d | %s | %.0f | %.2f | %.2f | %s | %s | %s |\n", connections, w.name,
				median(w.rates), median(w.p50s), median(w.p99s),
				w.ratio("memory", ways), w.ratio("obvious", ways), w.ratio("hit", ways))
		}
	}
}

// measure is a round.
func (w *way) measure(b *testing.B, connections int) {
	b.Helper()
	w.load.Connections, w.load.For = connections, benchFor
	r := w.load.run(b)
	w.rates = append(w.rates, r.rate())
	w.p50s = append(w.p50s, r.P50)
	w.p99s = append(w.p99s, r.P99)
}

// ratio compares w's requests per second with those of the way named base.
func (w *way) ratio(base string, ways []way) string {
	i := slices.IndexFunc(ways, func(w way) bool { return w.name == base })
	if i < 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f", medianRatio(w.rates, ways[i].rates))
}

func median(all []float64) float64 { return slices.Sorted(slices.Values(all))[len(all)/2] }

// medianRatio is the median of the ratios, which is not the ratio of the medians.
func medianRatio(a, b []float64) float64 {
	ratios := make([]float64, len(a))
	for round := range a {
		ratios[round] = a[round] / b[round]
	}
	return median(ratios)
}

// memoryServer writes the bytes that it was given: as fast as net/http goes.
func memoryServer(b *testing.B, body []byte) (url string) {
	return newServer(b, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		writeBytes(w, body)
	}))
}

func writeBytes(w http.ResponseWriter, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Write(body)
}

// A benchLoad is what a process of its own is told to send. (What is measured must not schedule
// what measures it.)
type benchLoad struct {
	Address     string
	Request     string
	Status      string // of every response
	Connections int
	For         time.Duration // 0: one request on each connection
}

// A benchResult is what that process prints.
type benchResult struct {
	Requests          int
	Seconds, P50, P99 float64 // the last two in ms
}

func (r benchResult) rate() float64 { return float64(r.Requests) / r.Seconds }

// get is one GET of the list, with a header line.
func get(serverURL, header string) benchLoad {
	address := strings.TrimPrefix(serverURL, "http://")
	return benchLoad{
		Address: address,
		Request: "GET " + propertiesPath + " HTTP/1.1\r\nHost: " + address + "\r\n" +
			header + "\r\n",
		Status:      "200",
		Connections: 1,
	}
}

// run starts this test binary again, for TestMain to call benchClient there.
func (l benchLoad) run(b *testing.B) (result benchResult) {
	b.Helper()
	description, _ := json.Marshal(l) // it can be encoded
	runtime.GC()                      // nobody pays for the garbage of the one before
	ctx, cancel := context.WithTimeout(b.Context(), l.For+time.Minute)
	defer cancel()
	command := exec.CommandContext(ctx, os.Args[0])
	command.Env = append(os.Environ(), "BENCH_CLIENT="+string(description))
	command.Stderr = os.Stderr
	printed, err := command.Output()
	if err == nil {
		err = json.Unmarshal(printed, &result)
	}
	if err != nil {
		b.Fatalf("load %.70q: %v", l.Request, err)
	}
	return result
}

// benchClient is that other process: it connects, sends, and prints its result. An error ends it.
func benchClient() {
	var l benchLoad
	panicIf(json.Unmarshal([]byte(os.Getenv("BENCH_CLIENT")), &l))
	conns, took := make([]net.Conn, l.Connections), make([][]time.Duration, l.Connections)
	for i := range conns {
		var err error
		conns[i], err = net.Dial("tcp", l.Address)
		panicIf(err)
	}
	var senders sync.WaitGroup
	began := time.Now()
	for i := range conns {
		senders.Go(func() { took[i] = l.send(conns[i], began.Add(l.For)) })
	}
	senders.Wait()
	all := slices.Sorted(slices.Values(slices.Concat(took...)))
	panicIf(json.NewEncoder(os.Stdout).Encode(benchResult{
		Requests: len(all),
		Seconds:  time.Since(began).Seconds(),
		P50:      all[len(all)/2].Seconds() * 1000,
		P99:      all[len(all)*99/100].Seconds() * 1000,
	}))
}

func panicIf(err error) {
	if err != nil {
		panic(err)
	}
}

// send sends one request after the other until end, at least one, and returns how long each took.
func (l benchLoad) send(conn net.Conn, end time.Time) (took []time.Duration) {
	panicIf(conn.SetDeadline(end.Add(30 * time.Second)))
	request, responses := []byte(l.Request), bufio.NewReaderSize(conn, 64<<10)
	for {
		began := time.Now()
		_, err := conn.Write(request)
		panicIf(err)
		panicIf(l.readResponse(responses))
		now := time.Now()
		if took = append(took, now.Sub(began)); now.After(end) {
			return took
		}
	}
}

// readResponse does no more than it must, because it takes its time from the server's: it reads the
// status and the length, and throws the body away.
func (l benchLoad) readResponse(r *bufio.Reader) error {
	line, err := r.ReadSlice('\n')
	if !bytes.HasPrefix(line, []byte("HTTP/1.1 "+l.Status)) {
		return fmt.Errorf("want status %s, got %q, %w", l.Status, line, err)
	}
	length := 0 // a 304 doesn't give any
	for err == nil && len(line) > len("\r\n") {
		line, err = r.ReadSlice('\n')
		if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok && err == nil {
			length, err = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	if err == nil {
		_, err = r.Discard(length)
	}
	return err
}

// postgresTool finds a program in Debian's folder, because the ones in PATH are scripts there.
func postgresTool(name string) string {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	return append(found, name)[0]
}

// benchColdRead compares a read that finds neither level with psql. That one must start and connect
// first, but makes no JSON of the rows and stores it nowhere, let alone twice.
func benchColdRead(b *testing.B, listings uint) {
	p := start(b, options{rows: listings})
	psql := postgresTool("psql")
	var ours, theirs []float64 // ms
	for range benchRounds {
		p.forget(b)
		ours = append(ours, get(p.url, "").run(b).P50)
		began := time.Now()
		err := exec.CommandContext(b.Context(), psql, databaseURL(b), "--no-psqlrc", "-c",
			"COPY (SELECT * FROM properties ORDER BY id) TO STDOUT").Run()
		if err != nil {
			row("cold read", "no psql: not measured (%v)", err)
			return
		}
		theirs = append(theirs, time.Since(began).Seconds()*1000)
	}
	row(fmt.Sprintf("cold read of %d listings, psql's COPY of them, ratio", listings),
		"%.0f ms, %.0f ms, %.2f", median(ours), median(theirs), medianRatio(ours, theirs))
}

// benchStampede counts the list queries that 500 clients at once cause, who find neither level.
func benchStampede(b *testing.B) {
	p := start(b, options{rows: 10_000})
	load := get(p.url, "")
	load.Connections = 500
	var most int64
	for range benchRounds {
		p.forget(b)
		before := p.cache.lists.metrics()
		load.run(b)
		most = max(most, p.cache.lists.metrics().Misses-before.Misses)
	}
	row("list queries, 500 clients at once on a cold cache, 10000 listings", "%d at most", most)
}

// benchWrite times a write with the read after it, which has to fill both levels.
func benchWrite(b *testing.B) {
	p := start(b, options{rows: 10_000})
	post, body := get(p.url, ""), titled("Loft")
	post.Status = "201"
	post.Request = fmt.Sprintf("POST %s HTTP/1.1\r\nHost: localhost\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		propertiesPath, len(body), body)
	var took []float64 // ms
	for range benchRounds {
		took = append(took, post.run(b).P50+get(p.url, "").run(b).P50)
	}
	row("a write and the read after it, 10000 listings", "%.0f ms", median(took))
}

// untilShown commits past the program, and returns how many ms it took until the list showed it.
func (p *program) untilShown(b *testing.B, n int) float64 {
	b.Helper()
	p.list(b, "redis")
	title := fmt.Sprintf("fresh %d", n)
	runSQL(b, p.db, `UPDATE properties SET title = '`+title+`' WHERE id = 1`)
	began := time.Now()
	for p.list(b, "redis")[0].Title != title {
	}
	return time.Since(began).Seconds() * 1000
}

// benchHeard has three instances that listen, and a page that was warm. It also counts what writes
// cost Redis.
func benchHeard(b *testing.B) {
	server := startRedis(b)
	o := options{rows: 100, redisURL: server.url}
	programs := []*program{start(b, o), startAnother(b, o), startAnother(b, o)}
	var took []float64
	for n := range 300 {
		took = append(took, programs[n%3].untilShown(b, n))
	}
	sorted := slices.Sorted(slices.Values(took))
	row("from a commit in SQL to a list that shows it, 3 instances: median, 99th percentile",
		"%.1f ms, %.1f ms", median(took), sorted[len(sorted)*99/100])
	server.do("CONFIG RESETSTAT")
	for n := range 100 {
		programs[n%3].put(b, "Loft")
	}
	row("invalidations in Redis for 100 writes with 3 instances", "%d", server.calls("del"))
	server.do("CONFIG RESETSTAT")
	for n := range 100 {
		runSQL(b, programs[0].db, fmt.Sprintf(`UPDATE properties SET price = %d WHERE id = 2`, n))
	}
	row("the same for 100 by SQL", "%d", server.calls("del"))
}

// benchAsking has no trigger, so the program must ask.
func benchAsking(b *testing.B) {
	p := start(b, options{rows: 100})
	runSQL(b, p.db, `ALTER TABLE properties DISABLE TRIGGER properties_announce`)
	eventually(b, "it asks", func() bool { return p.listener.unheard.Load() != "" })
	var took []float64
	for n := range 20 {
		took = append(took, p.untilShown(b, n))
	}
	row("the same without the trigger: median, worst", "%.0f ms, %.0f ms", median(took),
		slices.Max(took))
}

// benchSlowRedis lets 60 clients write at once, while each reply of Redis takes 100 ms.
func benchSlowRedis(b *testing.B) {
	network, redisURL := proxyToRedis(b)
	p := start(b, options{redisURL: redisURL})
	p.list(b, storedStatus)
	network.set(b, slow)
	began := time.Now()
	p.burst(b, 60, 1, requests[2])
	row("60 writes at once, Redis's replies are slow: the slowest", "%d ms",
		time.Since(began).Milliseconds())
}

// benchIdle counts what Redis is sent when nobody asks anything, by the commands that it has run.
func benchIdle(b *testing.B) {
	server := startRedis(b)
	p := start(b, options{rows: 1, redisURL: server.url})
	p.list(b, storedStatus)
	commands := func() (n int) {
		info := fmt.Sprintf("%s", server.do("INFO stats"))
		_, count, _ := strings.Cut(info, "total_commands_processed:")
		fmt.Sscan(count, &n)
		return n
	}
	before := commands()
	time.Sleep(20 * time.Second)
	// Its own INFO is the one between them.
	row("commands to Redis in an idle minute", "%d", 3*(commands()-before-1))
}

// benchTrigger compares single-row updates with and without the trigger that announces them.
func benchTrigger(b *testing.B, clients string) {
	p := start(b, options{rows: 1000})
	script := filepath.Join(b.TempDir(), "update.sql")
	const update = "\\set id random(1, 1000)\n" +
		"UPDATE properties SET price = random() * 1000 WHERE id = :id;\n"
	if err := os.WriteFile(script, []byte(update), 0o600); err != nil {
		b.Fatal(err)
	}
	rate := func() (perSecond float64) {
		output, _ := exec.CommandContext(b.Context(), postgresTool("pgbench"), "-n", "-c", clients,
			"-T", "3", "-f", script, databaseURL(b)).Output()
		_, rest, _ := strings.Cut(string(output), "tps = ")
		// It stays 0 if there is no pgbench.
		fmt.Sscan(rest, &perSecond)
		return perSecond
	}
	var with, without []float64
	for range 5 {
		runSQL(b, p.db, `ALTER TABLE properties ENABLE ALWAYS TRIGGER properties_announce`)
		with = append(with, rate())
		runSQL(b, p.db, `ALTER TABLE properties DISABLE TRIGGER properties_announce`)
		without = append(without, rate())
	}
	var fsync string
	if err := p.db.QueryRow(`SHOW fsync`).Scan(&fsync); err != nil {
		b.Fatal(err)
	}
	row(fmt.Sprintf("updates/s, %s clients, fsync %s: without the trigger, with it, ratio", clients,
		fsync), "%.0f, %.0f, %.2f", median(without), median(with), medianRatio(with, without))
}

// benchMemory runs the program as a process, uses it, and asks Linux for its peak, seeding and
// filling included.
func benchMemory(b *testing.B, listings int, about string, use func(b *testing.B, url string)) {
	reset(b)
	p := runMain(b, nil, "-addr", "127.0.0.1:0", "-seed", strconv.Itoa(listings)).serving(b)
	use(b, p.url)
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.command.Process.Pid))
	_, peak, _ := strings.Cut(string(status), "VmHWM:")
	var kB int
	// It stays 0 without /proc.
	fmt.Sscan(peak, &kB)
	row(fmt.Sprintf("peak memory, %d listings, %s", listings, about), "%d MB", kB/1024)
	p.command.Process.Kill()
	p.wait(b)
}

func hits(b *testing.B, url string) {
	load := get(url, "")
	load.Connections, load.For = 64, 4*benchFor
	load.run(b)
}

// stalledReaders ask for the list and read its first bytes.
func stalledReaders(b *testing.B, url string) {
	for range 64 {
		load := get(url, "")
		conn, err := net.Dial("tcp", load.Address)
		if err == nil {
			b.Cleanup(func() { conn.Close() })
			fmt.Fprint(conn, load.Request)
			_, err = io.ReadFull(conn, make([]byte, 1024))
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// benchGrowth reads on 32 connections while one writes more and more often: fewer and fewer fills
// survive.
func benchGrowth(b *testing.B, listings uint) {
	p := start(b, options{rows: listings})
	load := get(p.url, "")
	load.Connections, load.For = 32, 4*benchFor
	for _, rate := range []int{0, 10, 30, 100, 300} {
		stop := make(chan struct{})
		var writer sync.WaitGroup
		if rate > 0 {
			writer.Go(func() { p.keepWriting(b, rate, stop) })
		}
		before := p.cache.pages.metrics()
		result := load.run(b)
		after := p.cache.pages.metrics()
		close(stop)
		writer.Wait()
		share := 100 * float64(after.Hits-before.Hits) / float64(result.Requests)
		fmt.Printf("| %d | %d | %.0f%% | %.0f |\n", listings, rate, share, result.rate())
	}
}

// keepWriting writes so often a second, until stop.
func (p *program) keepWriting(b *testing.B, rate int, stop <-chan struct{}) {
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		e, err := p.send("PUT", "/properties/1/", titled("Loft"))
		if err != nil || e.StatusCode != 200 {
			b.Errorf("PUT: %v", err)
		}
	}
}

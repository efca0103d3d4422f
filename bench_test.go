// bench_test.go: how fast it is, next to simpler ways to serve the same bytes.
//
//	scripts/with-services scripts/bench
//
// Requests per second tell more about the machine than about the program. So all ways are measured in turn,
// in several rounds: what else the machine does falls on all of them, and the ratios within a round hold
// elsewhere too. Every figure is the median of the rounds.

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

// BenchmarkServing prints a table for each number of listings, and one of other figures.
func BenchmarkServing(b *testing.B) {
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
		benchFreshness(b)
		benchTrigger(b)
		benchMemory(b, 10_000, "hits on 64 connections", hits)
		benchMemory(b, 100_000, "a fill and then 64 readers that stop reading", stalledReaders)
	})
	b.Run("growth", func(b *testing.B) {
		fmt.Print("\n\n| listings | writes/s | hits | requests/s |\n| ---: | ---: | ---: | ---: |\n")
		for _, listings := range []uint{100, 10_000} {
			benchGrowth(b, listings)
		}
	})
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
	p.want(b, 200, "GET", propertiesPath, "", "Accept-Encoding", "gzip")
	notModified := get(p.url, "If-None-Match: "+list.Header.Get("ETag")+"\r\n")
	notModified.Status = "304"
	memory := way{name: "memory", load: get(memoryServer(b, list.body), "")}
	obvious := way{name: "obvious", load: get(obviousServer(b, p.redis, list.body), "")}
	hit := way{name: "hit", load: get(p.url, "")}
	gzip := way{name: "gzip", load: get(p.url, "Accept-Encoding: gzip\r\n")}
	fmt.Printf("\n\n%d listings, %d bytes\n\n", listings, len(list.body))
	fmt.Println("| connections | way | requests/s | p50 ms | p99 ms | of memory | of obvious | of hit |")
	fmt.Println("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
	for _, connections := range []int{1, 32, 128} {
		ways := []way{memory, obvious, hit, gzip, {name: "304", load: notModified}}
		if connections*len(list.body) > 200<<20 {
			// Redis counts replies that wait to be sent as memory in use. So many of them would take it over
			// its limit of 256 MB, and it would evict every key, this one too.
			ways = slices.Delete(ways, 1, 2)
		}
		before := p.cache.pages.metrics()
		for range benchRounds {
			for i := range ways {
				ways[i].measure(b, connections)
			}
		}
		if after := p.cache.pages.metrics(); after["misses"]+after["bypassed"] > before["misses"]+before["bypassed"] {
			b.Errorf("not all were hits: %+v, then %+v", before, after)
		}
		for _, w := range ways {
			fmt.Printf("| %d | %s | %.0f | %.2f | %.2f | %s | %s | %s |\n", connections, w.name, median(w.rates),
				median(w.p50s), median(w.p99s), w.ratio("memory", ways), w.ratio("obvious", ways), w.ratio("hit", ways))
		}
	}
}

// measure is a round.
func (w *way) measure(b *testing.B, connections int) {
	b.Helper()
	w.load.Connections, w.load.For = connections, benchFor
	r := w.load.run(b)
	w.rates, w.p50s, w.p99s = append(w.rates, r.rate()), append(w.p50s, r.P50), append(w.p99s, r.P99)
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
	return newServer(b, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { writeList(w, body) }))
}

// obviousServer does what first comes to mind: it asks Redis for the bytes, for each request.
func obviousServer(b *testing.B, conn redis.Conn, body []byte) (url string) {
	const key = "bench:obvious"
	if _, err := conn.Do("SET", key, body); err != nil {
		b.Fatal(err)
	}
	pool := &redis.Pool{MaxIdle: 128, Dial: func() (redis.Conn, error) { return redis.DialURL(services.redisURL) }}
	b.Cleanup(func() { pool.Close(); conn.Do("DEL", key) })
	return newServer(b, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := pool.Get()
		defer conn.Close()
		body, err := redis.Bytes(conn.Do("GET", key))
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		writeList(w, body)
	}))
}

func writeList(w http.ResponseWriter, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Write(body)
}

// A benchLoad is what a process of its own is told to send. (What is measured must not schedule what
// measures it.)
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
	request := "GET " + propertiesPath + " HTTP/1.1\r\nHost: " + address + "\r\n" + header + "\r\n"
	return benchLoad{Address: address, Request: request, Status: "200", Connections: 1}
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

// readResponse does no more than it must, since it takes its time from the server's: it reads the status and
// the length, and throws the body away.
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

// forget empties both levels.
func (p *program) forget(b *testing.B) {
	b.Helper()
	if _, err := p.redis.Do("DEL", allPropertiesKey, pageKey(propertiesPath), gzipKey(propertiesPath)); err != nil {
		b.Fatal(err)
	}
}

// benchColdRead compares a read that finds neither level with psql. That one must start and connect first,
// but makes no JSON of the rows and stores it nowhere, let alone twice.
func benchColdRead(b *testing.B, listings uint) {
	p := start(b, options{rows: listings})
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/psql") // Debian's own psql is a script that looks for these
	psql := append(found, "psql")[0]
	var ours, theirs []float64 // ms
	for range benchRounds {
		p.forget(b)
		ours = append(ours, get(p.url, "").run(b).P50)
		began := time.Now()
		if err := exec.CommandContext(b.Context(), psql, databaseURL(b), "--no-psqlrc", "-c",
			"COPY (SELECT "+columns+" FROM properties ORDER BY id) TO STDOUT").Run(); err != nil {
			fmt.Printf("| cold read of %d listings | no psql: not measured (%v) |\n", listings, err)
			return
		}
		theirs = append(theirs, time.Since(began).Seconds()*1000)
	}
	fmt.Printf("| cold read of %d listings, psql's COPY of them (with its start), ratio | %.0f ms, %.0f ms, %.2f |\n",
		listings, median(ours), median(theirs), medianRatio(ours, theirs))
}

// benchStampede counts the list queries that 500 clients at once cause, who find neither level.
func benchStampede(b *testing.B) {
	var queries atomic.Int64
	p := start(b, options{rows: 10_000, query: func(query listQuery) listQuery {
		return func(ctx context.Context) ([]property, error) { queries.Add(1); return query(ctx) }
	}})
	load := get(p.url, "")
	load.Connections = 500
	var most int64
	for range benchRounds {
		p.forget(b)
		queries.Store(0)
		load.run(b)
		most = max(most, queries.Load())
	}
	fmt.Printf("| list queries, 500 clients at once on a cold cache, 10000 listings | %d at most |\n", most)
}

// benchWrite times a write with the read after it, which has to fill both levels.
func benchWrite(b *testing.B) {
	p := start(b, options{rows: 10_000})
	post := get(p.url, "")
	post.Status = "201"
	post.Request = fmt.Sprintf("POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		propertiesPath, len(validProperty), validProperty)
	var took []float64 // ms
	for range benchRounds {
		took = append(took, post.run(b).P50+get(p.url, "").run(b).P50)
	}
	fmt.Printf("| a write and the read after it, 10000 listings | %.0f ms |\n", median(took))
}

// benchFreshness times how long it takes from a commit past the program to a list that shows it, with three instances
// listening and a page that was warm; and it counts the invalidations in Redis that 100 writes through the program cost.
func benchFreshness(b *testing.B) {
	programs := []*program{start(b, options{rows: 100}), startAnother(b, options{}), startAnother(b, options{})}
	var took []float64 // ms
	for n := range 300 {
		p := programs[n%3]
		p.list(b, "redis")
		title := fmt.Sprintf("fresh %d", n)
		if _, err := p.db.Exec(`UPDATE properties SET title = $1 WHERE id = 1`, title); err != nil {
			b.Fatal(err)
		}
		began := time.Now()
		for p.list(b, "redis")[0].Title != title {
		}
		took = append(took, time.Since(began).Seconds()*1000)
	}
	sorted := slices.Sorted(slices.Values(took))
	fmt.Printf("| from a commit in SQL to a list that shows it, 3 instances: median, 99th percentile | %.1f ms, %.1f ms |\n", median(took), sorted[len(sorted)*99/100])

	programs[0].redis.Do("CONFIG", "RESETSTAT")
	for n := range 100 {
		programs[n%3].want(b, 200, "PUT", "/properties/1/", validProperty)
	}
	fmt.Printf("| invalidations in Redis for 100 writes with 3 instances | %d |\n", calls(b, programs[0].redis, "del"))
}

// calls returns how often Redis has run a command since RESETSTAT.
func calls(t testing.TB, conn redis.Conn, command string) (n int) {
	t.Helper()
	info, err := redis.String(conn.Do("INFO", "commandstats"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Sscanf(infoField(info, "cmdstat_"+command), "calls=%d,", &n)
	return n
}

// benchTrigger compares single-row updates with and without the trigger that announces them, with 4 clients of pgbench.
func benchTrigger(b *testing.B) {
	p := start(b, options{rows: 1000})
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pgbench")
	script := filepath.Join(b.TempDir(), "update.sql")
	if err := os.WriteFile(script, []byte("\\set id random(1, 1000)\nUPDATE properties SET price = random() * 1000 WHERE id = :id;\n"), 0o600); err != nil {
		b.Fatal(err)
	}
	rate := func() (perSecond float64) {
		output, err := exec.CommandContext(b.Context(), append(found, "pgbench")[0], "-n", "-c", "4", "-T", "2", "-f", script, databaseURL(b)).Output()
		_, rest, _ := strings.Cut(string(output), "tps = ")
		if _, scanErr := fmt.Sscan(rest, &perSecond); err != nil || scanErr != nil {
			return 0
		}
		return perSecond
	}
	var with, without []float64
	for range 3 {
		with = append(with, rate())
		p.db.Exec(`ALTER TABLE properties DISABLE TRIGGER properties_announce`)
		without = append(without, rate())
		p.db.Exec(`ALTER TABLE properties ENABLE TRIGGER properties_announce`)
	}
	if median(without) == 0 {
		fmt.Println("| updates per second with the trigger | no pgbench: not measured |")
		return
	}
	fmt.Printf("| single-row updates per second, 4 clients: with the trigger, without it, ratio | %.0f, %.0f, %.2f |\n",
		median(with), median(without), medianRatio(with, without))
}

// benchMemory runs the program as a process, uses it, and asks Linux for its peak, seeding and filling included.
func benchMemory(b *testing.B, listings int, about string, use func(b *testing.B, url string)) {
	reset(b)
	p := runMain(b, nil, "-addr", "127.0.0.1:0", "-seed", strconv.Itoa(listings)).serving(b)
	use(b, p.url)
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.command.Process.Pid))
	_, peak, _ := strings.Cut(string(status), "VmHWM:")
	var kB int
	if _, err := fmt.Sscan(peak, &kB); err != nil {
		fmt.Println("| peak memory | no /proc: not measured |")
	} else {
		fmt.Printf("| peak memory, %d listings, %s | %d MB |\n", listings, about, kB/1024)
	}
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

// benchGrowth reads on 32 connections while one writes more and more often: fewer and fewer fills survive.
func benchGrowth(b *testing.B, listings uint) {
	p := start(b, options{rows: listings})
	load := get(p.url, "")
	load.Connections, load.For = 32, 4*benchFor
	for _, rate := range []int{0, 10, 30, 100, 300} {
		stop := make(chan struct{})
		var writer sync.WaitGroup
		if rate > 0 {
			writer.Go(func() {
				tick := time.NewTicker(time.Second / time.Duration(rate))
				defer tick.Stop()
				for {
					select {
					case <-stop:
						return
					case <-tick.C:
						if e, err := p.send("PUT", "/properties/1/", validProperty); err != nil || e.StatusCode != 200 {
							b.Errorf("PUT: %v", err)
						}
					}
				}
			})
		}
		before := p.cache.pages.metrics()
		result := load.run(b)
		after := p.cache.pages.metrics()
		close(stop)
		writer.Wait()
		fmt.Printf("| %d | %d | %.0f%% | %.0f |\n", listings, rate, 100*float64(after["hits"]-before["hits"])/float64(result.Requests), result.rate())
	}
}

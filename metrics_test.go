// metrics_test.go: the counts that a client sees.

package main

import (
	"strings"
	"testing"
)

// Redis's counts and ours, in JSON and for Prometheus.
func TestMetrics(t *testing.T) {
	p := start(t, options{rows: 1})
	p.redis.Do("CONFIG", "RESETSTAT")
	const none = `{"hit_ratio":0,"keyspace_hits":0,"keyspace_misses":0,"levels":{"all_properties":{"bypassed":0,"coalesced":0,"hits":0,"misses":0},"page":{"bypassed":0,"coalesced":0,"hits":0,"misses":0}}}` + "\n"
	if got := string(p.want(t, 200, "GET", "/cache/metrics/", "").body); got != none {
		t.Errorf("before any request: %s", got)
	}
	p.list(t, storedStatus)
	for range 5 {
		p.list(t, hitStatus)
	}
	p.redis.Do("DEL", pageKey("/properties/"))
	p.list(t, storedStatus)
	const some = `{"hit_ratio":0.6667,"keyspace_hits":6,"keyspace_misses":3,"levels":{"all_properties":{"bypassed":0,"coalesced":0,"hits":1,"misses":1},"page":{"bypassed":0,"coalesced":0,"hits":5,"misses":2}}}` + "\n"
	if got := string(p.want(t, 200, "GET", "/cache/metrics/", "").body); got != some {
		t.Errorf("after 7 requests: %s", got)
	}
	e := p.want(t, 200, "GET", "/metrics", "")
	if got := e.Header.Get("Content-Type"); !strings.HasPrefix(got, "text/plain; version=0.0.4") {
		t.Errorf("Content-Type: %s", got)
	}
	for _, line := range []string{
		"# TYPE redis_keyspace_hits_total counter", "redis_keyspace_hits_total 6", "redis_keyspace_misses_total 3",
		"redis_keyspace_hit_ratio 0.6667",
		`cache_requests_total{level="page",result="hit"} 5`, `cache_requests_total{level="page",result="miss"} 2`,
		`cache_requests_total{level="all_properties",result="hit"} 1`, `cache_requests_total{level="page",result="bypassed"} 0`,
		`cache_coalesced_requests_total{level="page"} 0`,
	} {
		if !strings.Contains("\n"+string(e.body), "\n"+line+"\n") {
			t.Errorf("no line %q in\n%s", line, e.body)
		}
	}
}

// Without Redis the process's own counts are there all the same: that is when bypassed matters.
func TestMetricsWithoutRedis(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	p := start(t, options{redisURL: withHost(t, services.redisURL, network.addr)})
	network.set(t, refused)
	p.list(t, bypassStatus)
	const want = `{"hit_ratio":null,"keyspace_hits":null,"keyspace_misses":null,"levels":{"all_properties":{"bypassed":1,"coalesced":0,"hits":0,"misses":0},"page":{"bypassed":1,"coalesced":0,"hits":0,"misses":0}}}` + "\n"
	if got := string(p.want(t, 200, "GET", "/cache/metrics/", "").body); got != want {
		t.Errorf("%s", got)
	}
	text := string(p.want(t, 200, "GET", "/metrics", "").body)
	if !strings.Contains(text, "\nredis_up 0\n") || strings.Contains(text, "keyspace") || !strings.Contains(text, `{level="page",result="bypassed"} 1`) {
		t.Errorf("%s", text)
	}
	network.set(t, healthy)
	eventually(t, "the metrics are back", func() bool {
		return strings.Contains(string(p.want(t, 200, "GET", "/metrics", "").body), "\nredis_up 1\n")
	})
}

// In Prometheus's text each metric is there once: its HELP, its TYPE, and then its samples, none of them twice.
func TestPrometheusText(t *testing.T) {
	nobody := newProxy(t, "127.0.0.1:1")
	for _, p := range []*program{start(t, options{}), startAnother(t, options{redisURL: "redis://" + nobody.addr})} {
		text := strings.TrimSuffix(string(p.want(t, 200, "GET", "/metrics", "").body), "\n")
		seen := map[string]bool{}
		var helped, typed string
		for line := range strings.SplitSeq(text, "\n") {
			fields := strings.Fields(line)
			name, _, _ := strings.Cut(fields[0], "{")
			unique := fields[0]
			switch {
			case strings.HasPrefix(line, "# HELP "):
				helped, unique = fields[2], "HELP "+fields[2]
			case strings.HasPrefix(line, "# TYPE "):
				typed, unique = fields[2], "TYPE "+fields[2]
				if typed != helped {
					t.Errorf("TYPE without HELP: %s", line)
				}
			case len(fields) != 2 || name != typed:
				t.Errorf("not a sample of %s: %s", typed, line)
			}
			if seen[unique] {
				t.Errorf("twice: %s", unique)
			}
			seen[unique] = true
		}
	}
}

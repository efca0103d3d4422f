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
	const none = `{"keyspace_hits":0,"keyspace_misses":0,"hit_ratio":0,"levels":{"page":{"hits":0,"misses":0,"coalesced":0,"bypassed":0},"all_properties":{"hits":0,"misses":0,"coalesced":0,"bypassed":0}}}` + "\n"
	if got := string(p.want(t, 200, "GET", "/cache/metrics/", "").body); got != none {
		t.Errorf("before any request: %s", got)
	}
	p.list(t, storedStatus)
	for range 5 {
		p.list(t, hitStatus)
	}
	p.redis.Do("DEL", pageKey("/properties/", false))
	p.list(t, storedStatus)
	const some = `{"keyspace_hits":6,"keyspace_misses":3,"hit_ratio":0.6667,"levels":{"page":{"hits":5,"misses":2,"coalesced":0,"bypassed":0},"all_properties":{"hits":1,"misses":1,"coalesced":0,"bypassed":0}}}` + "\n"
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

// Without Redis there are no metrics, and the cache learns of it.
func TestMetricsWithoutRedis(t *testing.T) {
	network := newProxy(t, hostPort(t, services.redisURL))
	p := start(t, options{redisURL: withHost(t, services.redisURL, network.addr)})
	network.set(t, refused)
	checkProblem(t, p.want(t, 503, "GET", "/cache/metrics/", ""))
	checkProblem(t, p.want(t, 503, "GET", "/metrics", ""))
	p.list(t, bypassStatus)
	if got := p.cache.pages.metrics(); got != (levelMetrics{Bypassed: 1}) {
		t.Errorf("page: %+v", got)
	}
	network.set(t, healthy)
	eventually(t, "the metrics are back", func() bool {
		e, err := p.send("GET", "/cache/metrics/", "")
		return err == nil && e.StatusCode == 200
	})
}

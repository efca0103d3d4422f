// metrics.go: how often the caches were hit. Django: get_redis_cache_metrics() in utils.py.

package main

import (
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"strings"

	"github.com/gomodule/redigo/redis"
)

// cacheMetrics are Redis's counts of look-ups, and this process's counts of requests.
type cacheMetrics struct {
	up int // 1 if Redis answered INFO
	// Of all clients since Redis started; nil without Redis.
	KeyspaceHits   *int64 `json:"keyspace_hits"`
	KeyspaceMisses *int64 `json:"keyspace_misses"`
	// Hits per look-up, from 0 to 1, with four decimals; 0 if there were none.
	HitRatio *float64 `json:"hit_ratio"`
	Levels   struct {
		Page          levelMetrics `json:"page"`
		AllProperties levelMetrics `json:"all_properties"`
	} `json:"levels"`
}

// levelMetrics count a level's requests, of all pages together: each is a hit, a miss or bypassed.
// (One that fails is a miss or bypassed.) Coalesced are those that shared a call which another
// request had asked for.
type levelMetrics struct {
	Hits      int64 `json:"hits"`
	Misses    int64 `json:"misses"`
	Coalesced int64 `json:"coalesced"`
	Bypassed  int64 `json:"bypassed"`
}

// metrics returns the counts.
func (l *level) metrics() levelMetrics {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.counts
}

// getRedisCacheMetrics returns what this process and, if it answers, Redis have counted.
func (c *cache) getRedisCacheMetrics() cacheMetrics {
	var m cacheMetrics
	m.Levels.Page, m.Levels.AllProperties = c.pages.metrics(), c.lists.metrics()
	s := c.link.session.Load()
	if s.pool == nil {
		return m
	}
	conn := s.pool.Get()
	defer conn.Close()
	info, err := redis.String(conn.Do("INFO", "stats"))
	if err != nil {
		// The cache works without the right to INFO.
		return m
	}
	var hits, misses int64
	_, keyspace, _ := strings.Cut(info, "keyspace_")
	// keyspace_misses is the line after keyspace_hits. (For Sscanf \r\n is \n, too.) They stay 0 if
	// Redis doesn't tell.
	fmt.Sscanf(keyspace, "hits:%d\nkeyspace_misses:%d", &hits, &misses)
	ratio := math.Round(float64(hits)/float64(max(1, hits+misses))*1e4) / 1e4
	slog.Info("redis cache metrics", "hits", hits, "misses", misses, "hit_ratio", ratio)
	m.up, m.KeyspaceHits, m.KeyspaceMisses, m.HitRatio = 1, &hits, &misses, &ratio
	return m
}

// metricsView answers GET /cache/metrics/.
func (c *cache) metricsView(w http.ResponseWriter, r *http.Request) error {
	return writeJSON(w, 200, "application/json", c.getRedisCacheMetrics())
}

// prometheusText leaves Redis's own counts to redis_exporter: where both are scraped, sums would
// double.
const prometheusText = `# HELP properties_redis_up 1 if Redis answered INFO, else 0.
# TYPE properties_redis_up gauge
properties_redis_up %d
# HELP properties_cache_requests_total Requests to a level, by result.
# TYPE properties_cache_requests_total counter
properties_cache_requests_total{level="page",result="hit"} %d
properties_cache_requests_total{level="page",result="miss"} %d
properties_cache_requests_total{level="page",result="bypassed"} %d
properties_cache_requests_total{level="all_properties",result="hit"} %d
properties_cache_requests_total{level="all_properties",result="miss"} %d
properties_cache_requests_total{level="all_properties",result="bypassed"} %d
# HELP properties_cache_coalesced_requests_total Requests that shared another one's call.
# TYPE properties_cache_coalesced_requests_total counter
properties_cache_coalesced_requests_total{level="page"} %d
properties_cache_coalesced_requests_total{level="all_properties"} %d
`

// prometheusView answers GET /metrics.
func (c *cache) prometheusView(w http.ResponseWriter, r *http.Request) error {
	m := c.getRedisCacheMetrics()
	page, list := m.Levels.Page, m.Levels.AllProperties
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	fmt.Fprintf(w, prometheusText, m.up, page.Hits, page.Misses, page.Bypassed,
		list.Hits, list.Misses, list.Bypassed, page.Coalesced, list.Coalesced)
	return nil
}

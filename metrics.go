// metrics.go: how often the caches were hit. Django: get_redis_cache_metrics() in utils.py.

package main

import (
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"slices"
	"strconv"

	"github.com/gomodule/redigo/redis"
)

// metrics counts a level's requests: each is a hit, a miss or bypassed, and those that shared a look-up also coalesced.
func (l *level) metrics() map[string]int64 {
	n := func(o outcome) int64 { return l.requests[o].Load() }
	return map[string]int64{"hits": n(hit), "misses": n(miss) + n(stored), "bypassed": n(bypassed), "coalesced": l.coalesced.Load()}
}

// getRedisCacheMetrics returns Redis's counts of look-ups, by all its clients since it started, and hit_ratio: hits /
// (hits + misses), four decimals, 0 if there were none (all nil without Redis); and this process's counts by level.
func (c *cache) getRedisCacheMetrics() map[string]any {
	m := map[string]any{"keyspace_hits": nil, "keyspace_misses": nil, "hit_ratio": nil,
		"levels": map[string]any{"page": c.pages.metrics(), "all_properties": c.lists.metrics()}}
	c.metrics.Lock() // a burst of requests waits its turn, on one connection
	defer c.metrics.Unlock()
	pool := c.session.Load()
	if pool == nil {
		return m
	}
	conn := pool.Get()
	defer conn.Close()
	info, err := redis.String(conn.Do("INFO", "stats"))
	if err != nil {
		c.end(pool, conn, err)
		return m
	}
	hits, _ := strconv.ParseInt(infoField(info, "keyspace_hits"), 10, 64) // 0 if Redis doesn't tell
	misses, _ := strconv.ParseInt(infoField(info, "keyspace_misses"), 10, 64)
	ratio := math.Round(float64(hits)/float64(max(1, hits+misses))*1e4) / 1e4
	slog.Info("redis cache metrics", "hits", hits, "misses", misses, "hit_ratio", ratio)
	m["keyspace_hits"], m["keyspace_misses"], m["hit_ratio"] = hits, misses, ratio
	return m
}

func (c *cache) metricsView(w http.ResponseWriter, r *http.Request) error {
	return writeJSON(w, http.StatusOK, "application/json", c.getRedisCacheMetrics())
}

// prometheusView answers GET /metrics in Prometheus's text format.
func (c *cache) prometheusView(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	metric := func(name, kind, help string, samples ...any) { // labels and value in turn
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", name, help, kind)
		for pair := range slices.Chunk(samples, 2) {
			fmt.Fprintf(w, "%s%s %v\n", name, pair[0], pair[1])
		}
	}
	m := c.getRedisCacheMetrics()
	up := 0
	if m["hit_ratio"] != nil {
		up = 1
		metric("redis_keyspace_hits_total", "counter", "Look-ups of existing keys, by all clients of this Redis.", "", m["keyspace_hits"])
		metric("redis_keyspace_misses_total", "counter", "Look-ups of missing keys, by all clients of this Redis.", "", m["keyspace_misses"])
		metric("redis_keyspace_hit_ratio", "gauge", "Hits per look-up since Redis started, 0 to 1.", "", m["hit_ratio"])
	}
	metric("redis_up", "gauge", "1 if Redis answered, else 0.", "", up)
	page, list := c.pages.metrics(), c.lists.metrics()
	metric("cache_requests_total", "counter", "Requests to a cache level of this process, by how they were answered.",
		`{level="page",result="hit"}`, page["hits"], `{level="all_properties",result="hit"}`, list["hits"],
		`{level="page",result="miss"}`, page["misses"], `{level="all_properties",result="miss"}`, list["misses"],
		`{level="page",result="bypassed"}`, page["bypassed"], `{level="all_properties",result="bypassed"}`, list["bypassed"])
	metric("cache_coalesced_requests_total", "counter", "Requests to a cache level that shared another request's look-up.",
		`{level="page"}`, page["coalesced"], `{level="all_properties"}`, list["coalesced"])
	return nil
}

// metrics.go: how often the caches were hit. Django: get_redis_cache_metrics() in utils.py.

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"strconv"

	"github.com/gomodule/redigo/redis"
)

// redisMetrics are Redis's own counts since it started, of look-ups by all its clients, and what each of
// our levels made of its requests.
type redisMetrics struct {
	KeyspaceHits   int64   `json:"keyspace_hits"`
	KeyspaceMisses int64   `json:"keyspace_misses"`
	HitRatio       float64 `json:"hit_ratio"` // hits / (hits + misses), four decimals; 0 when there were none
	Levels         struct {
		Page          levelMetrics `json:"page"`
		AllProperties levelMetrics `json:"all_properties"`
	} `json:"levels"`
}

// levelMetrics are the counts of a level, in this process; see level for what they mean.
type levelMetrics struct {
	Hits      int64 `json:"hits"`
	Misses    int64 `json:"misses"`
	Coalesced int64 `json:"coalesced"`
	Bypassed  int64 `json:"bypassed"`
}

func (l *level[T]) metrics() levelMetrics {
	return levelMetrics{l.requests[hit].Load(), l.requests[miss].Load(), l.coalesced.Load(), l.requests[bypassed].Load()}
}

// getRedisCacheMetrics asks Redis for its counts, logs them and returns them with ours. Its error is the
// *problem to answer with.
func (c *cache) getRedisCacheMetrics() (m redisMetrics, err error) {
	err = c.do(func(conn redis.Conn) error {
		info, err := redis.String(conn.Do("INFO", "stats"))
		if err != nil {
			return err
		}
		var hitsErr, missesErr error
		m.KeyspaceHits, hitsErr = strconv.ParseInt(infoField(info, "keyspace_hits"), 10, 64)
		m.KeyspaceMisses, missesErr = strconv.ParseInt(infoField(info, "keyspace_misses"), 10, 64)
		return errors.Join(hitsErr, missesErr)
	})
	if err != nil {
		slog.Error("redis cache metrics", "err", err)
		return m, &problem{Status: http.StatusServiceUnavailable, Detail: "Redis does not answer."}
	}
	if lookUps := m.KeyspaceHits + m.KeyspaceMisses; lookUps > 0 {
		m.HitRatio = math.Round(float64(m.KeyspaceHits)/float64(lookUps)*1e4) / 1e4
	}
	m.Levels.Page, m.Levels.AllProperties = c.pages.metrics(), c.lists.metrics()
	slog.Info("redis cache metrics", "hits", m.KeyspaceHits, "misses", m.KeyspaceMisses, "hit_ratio", m.HitRatio)
	return m, nil
}

// metricsView answers GET /cache/metrics/ in JSON.
func (c *cache) metricsView(w http.ResponseWriter, r *http.Request) error {
	m, err := c.getRedisCacheMetrics()
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, "application/json", m)
	return nil
}

// prometheusView answers GET /metrics in Prometheus's text format.
func (c *cache) prometheusView(w http.ResponseWriter, r *http.Request) error {
	m, err := c.getRedisCacheMetrics()
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	fmt.Fprintf(w, `# HELP redis_keyspace_hits_total Look-ups of existing keys, by all clients of this Redis.
# TYPE redis_keyspace_hits_total counter
redis_keyspace_hits_total %d
# HELP redis_keyspace_misses_total Look-ups of missing keys, by all clients of this Redis.
# TYPE redis_keyspace_misses_total counter
redis_keyspace_misses_total %d
# HELP redis_keyspace_hit_ratio Hits per look-up since Redis started, 0 to 1.
# TYPE redis_keyspace_hit_ratio gauge
redis_keyspace_hit_ratio %g
# HELP cache_requests_total Requests answered by a cache level of this process.
# TYPE cache_requests_total counter
`, m.KeyspaceHits, m.KeyspaceMisses, m.HitRatio)
	page, list := m.Levels.Page, m.Levels.AllProperties
	const requests = "cache_requests_total{level=%q,result=\"hit\"} %d\n" +
		"cache_requests_total{level=%[1]q,result=\"miss\"} %[3]d\n" +
		"cache_requests_total{level=%[1]q,result=\"bypassed\"} %[4]d\n"
	fmt.Fprintf(w, requests, "page", page.Hits, page.Misses, page.Bypassed)
	fmt.Fprintf(w, requests, "all_properties", list.Hits, list.Misses, list.Bypassed)
	fmt.Fprintf(w, `# HELP cache_coalesced_requests_total Those of them that shared another request's look-up.
# TYPE cache_coalesced_requests_total counter
cache_coalesced_requests_total{level="page"} %d
cache_coalesced_requests_total{level="all_properties"} %d
`, page.Coalesced, list.Coalesced)
	return nil
}

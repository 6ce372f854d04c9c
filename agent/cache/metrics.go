package cache

import "github.com/prometheus/client_golang/prometheus"

// metrics count what the cache did; their names are in CONTRACT.md.
type metrics struct {
	evictions   *prometheus.CounterVec
	corruptions prometheus.Counter
	joined      prometheus.Counter
	bytes       *prometheus.CounterVec
}

// newMetrics registers with reg, unless that is nil.
func newMetrics(reg prometheus.Registerer, c *Cache) (*metrics, error) {
	counter := func(name, help string) prometheus.CounterOpts { return prometheus.CounterOpts{Name: name, Help: help} }
	gauge := func(name, help string, value func(Stats) int64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(value(c.Stats())) })
	}
	m := &metrics{
		evictions:   prometheus.NewCounterVec(counter("larder_cache_evictions_total", "Blobs deleted from the cache, by reason."), []string{"reason"}),
		corruptions: prometheus.NewCounter(counter("larder_cache_corruptions_total", "Blobs whose bytes did not match their digest, fetched or found by the scrub.")),
		joined:      prometheus.NewCounter(counter("larder_joined_fills_total", "Requests that joined a fill that somebody else had started.")),
		bytes:       prometheus.NewCounterVec(counter("larder_fetched_bytes_total", "Bytes that came over the network, kept or not, by where they came from."), []string{"from"}),
	}
	for _, why := range []reason{reasonMaxBytes, reasonMinFree, reasonFull, reasonScrub, reasonRemoved, reasonLost} {
		m.evictions.WithLabelValues(string(why))
	}
	for _, from := range []OriginKind{FromPeer, FromUpstream} {
		m.bytes.WithLabelValues(string(from))
	}
	if reg == nil {
		return m, nil
	}
	for _, collector := range []prometheus.Collector{
		m.evictions, m.corruptions, m.joined, m.bytes,
		gauge("larder_cache_bytes", "Bytes that the cache holds or has reserved on disk.", func(s Stats) int64 { return s.Bytes }),
		gauge("larder_cache_limit_bytes", "Most bytes the cache may hold; 0 is no limit.", func(s Stats) int64 { return s.Limit }),
		gauge("larder_fills_in_flight", "Blobs being fetched.", func(s Stats) int64 { return int64(s.Fills) }),
	} {
		if err := reg.Register(collector); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// FetchedBytes is the counter larder_fetched_bytes_total, whoever registered it.
func (c *Cache) FetchedBytes() prometheus.Collector { return c.metrics.bytes }

// Passed counts n bytes that were passed on and not kept.
func (c *Cache) Passed(from OriginKind, n int) { c.metrics.fetched(from, n) }

// fetched counts n bytes; only what crossed a network does.
func (m *metrics) fetched(from OriginKind, n int) {
	if from == FromPeer || from == FromUpstream {
		m.bytes.WithLabelValues(string(from)).Add(float64(n))
	}
}

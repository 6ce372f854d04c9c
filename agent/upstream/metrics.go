package upstream

import (
	"fmt"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics counts requests as sent over the wire: each redirect, token
// exchange and retry is one.
type metrics struct {
	requests  *prometheus.CounterVec
	remaining *prometheus.GaugeVec
	allowed   *prometheus.GaugeVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "larder_upstream_requests_total",
			Help: "HTTP requests sent to registries, redirect targets and token services.",
		}, []string{"registry", "kind", "code"}),
		remaining: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "larder_upstream_ratelimit_remaining",
			Help: "Pulls left in the registry's current window, as it said last.",
		}, []string{"registry"}),
		allowed: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "larder_upstream_ratelimit_limit",
			Help: "Pulls that the registry allows in a window, as it said last.",
		}, []string{"registry"}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.requests, m.remaining, m.allowed} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register upstream metrics: %w", err)
		}
	}
	return m, nil
}

// count adds one request; status 0 is one without an answer.
func (m *metrics) count(registry string, k kind, status int) {
	code := "error"
	if status >= 100 && status < 600 {
		code = strconv.Itoa(status)
	}
	m.requests.WithLabelValues(registry, string(k), code).Inc()
}

package proxy

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	requests  *prometheus.CounterVec   // kind, source, code
	served    *prometheus.CounterVec   // source
	firstByte *prometheus.HistogramVec // source
	stale     prometheus.Counter
	decisions *prometheus.CounterVec // decision
	unkept    prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		requests: f.NewCounterVec(prometheus.CounterOpts{
			Name: "larder_requests_total", Help: "Requests answered on the proxy's port.",
		}, []string{"kind", "source", "code"}),
		served: f.NewCounterVec(prometheus.CounterOpts{
			Name: "larder_served_bytes_total", Help: "Body bytes sent to runtimes; what this agent pulls for itself is not among them.",
		}, []string{"source"}),
		firstByte: f.NewHistogramVec(prometheus.HistogramOpts{
			Name: "larder_first_byte_seconds", Help: "Time from a request to its headers.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}, []string{"source"}),
		stale: f.NewCounter(prometheus.CounterOpts{
			Name: "larder_tag_stale_served_total", Help: "Tags answered with the last known digest because upstream could not be asked.",
		}),
		decisions: newDecisions(f),
		unkept: f.NewCounter(prometheus.CounterOpts{
			Name: "larder_unkept_total", Help: "Times that a blob or manifest was passed on and not kept, because the cache has no room for it.",
		}),
	}
}

// OwnUserAgent begins the User-Agent of requests that the agent makes to its own proxy: to
// warm the cache, for a pin, or as its watchdog. They are answered and audited like any
// other, but their bytes do not count as served to a runtime: those of the later pull do.
const OwnUserAgent = "larder-"

// ServedBytes is the counter larder_served_bytes_total, whoever registered it.
func (p *Proxy) ServedBytes() prometheus.Collector { return p.metrics.served }

// newDecisions makes the counter with all its label values, so that a rate of
// refusals is zero before the first.
func newDecisions(f promauto.Factory) *prometheus.CounterVec {
	c := f.NewCounterVec(prometheus.CounterOpts{
		Name: "larder_auth_decisions_total", Help: "Decisions whether a caller may read a repository.",
	}, []string{"decision"})
	for _, d := range decisions {
		c.WithLabelValues(string(d))
	}
	return c
}

// observe counts one finished exchange, but not its bytes: exchange.count has
// counted them while they were sent.
func (m *metrics) observe(x *exchange) {
	source := string(x.sourceLabel())
	if d := x.access.decision; d != "" {
		m.decisions.WithLabelValues(string(d)).Inc()
	}
	m.requests.WithLabelValues(string(x.route.kind), source, strconv.Itoa(x.status)).Inc()
	if x.answered.Load() && x.status < 300 {
		m.firstByte.WithLabelValues(source).Observe(x.firstByte.Seconds())
	}
}

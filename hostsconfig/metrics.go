package hostsconfig

import (
	"net/url"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	repaired *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		repaired: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "larder_hosts_drift_repaired_total",
			Help: "Host configuration files put back after someone changed or deleted them.",
		}, []string{"runtime"}),
	}
	for _, runtime := range []string{containerd, crio} {
		m.repaired.WithLabelValues(runtime)
	}
	if reg != nil {
		reg.MustRegister(m.repaired)
	}
	return m
}

// The values of every field and label named runtime.
const (
	containerd = "containerd"
	crio       = "crio"
)

// redactURL drops user, query and fragment of a URL that a user wrote.
func redactURL(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return "(unparsable URL)"
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return u.String()
}

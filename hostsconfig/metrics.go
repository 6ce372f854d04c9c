package hostsconfig

import "github.com/prometheus/client_golang/prometheus"

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

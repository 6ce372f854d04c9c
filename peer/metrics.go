package peer

import "github.com/prometheus/client_golang/prometheus"

// metrics of a Swarm. The gauges are set by those who know: gossip.settle, and index.gauge every
// batchEvery.
type metrics struct {
	members  prometheus.Gauge
	bans     *prometheus.CounterVec
	blobs    prometheus.Gauge
	holders  prometheus.Gauge
	uploaded prometheus.Counter
}

// RegisterLone registers the metrics of a node that has no Swarm: zeros.
func RegisterLone(reg prometheus.Registerer) error {
	_, err := newMetrics(reg)
	return err
}

// UploadedBytes is the counter larder_uploaded_bytes_total, whoever registered it.
func (s *Swarm) UploadedBytes() prometheus.Collector { return s.metrics.uploaded }

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		members: prometheus.NewGauge(prometheus.GaugeOpts{Name: "larder_peer_members",
			Help: "Live members of the swarm, this node included; 0 without peers."}),
		bans: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "larder_peer_bans_total",
			Help: "Peers this node stopped using for a while, by reason."}, []string{"reason"}),
		blobs: prometheus.NewGauge(prometheus.GaugeOpts{Name: "larder_index_blobs",
			Help: "Blobs, and tags that some member remembers, in the index of who holds what."}),
		holders: prometheus.NewGauge(prometheus.GaugeOpts{Name: "larder_index_holders",
			Help: "Postings (a member holds a blob, or remembers a tag) in the index."}),
		uploaded: prometheus.NewCounter(prometheus.CounterOpts{Name: "larder_uploaded_bytes_total",
			Help: "Bytes of blobs sent to peers."}),
	}
	if reg == nil {
		return m, nil
	}
	for _, r := range []banReason{banSlow, banDigest, banProtocol} {
		m.bans.WithLabelValues(string(r))
	}
	for _, c := range []prometheus.Collector{m.members, m.bans, m.blobs, m.holders, m.uploaded} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

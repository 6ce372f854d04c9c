package agent

import (
	"github.com/opencontainers/go-digest"
)

// swarm is the one place where package peer meets the rest of the agent: it
// gives the proxy a source, the peers a view of the cache, and the status API
// the members. A nil swarm is a node alone.
type swarm struct{}

// members lists the cluster as this node sees it, nil when alone.
func (s *swarm) members() []Member { return nil }

// holders names the peers that say they have d.
func (s *swarm) holders(digest.Digest) []string { return nil }

// describe is one line for `larder status`.
func (s *swarm) describe(p PeerConfig) string {
	switch {
	case !p.Enabled:
		return "off (peer.enabled = false)"
	case p.Alone():
		return "alone (no peer.key_file and no peer.join)"
	}
	return "alone"
}

package cluster

import (
	"slices"
	"testing"
)

// hosts are the numbers of nodes on their network.
func (c *cluster) hosts(nodes ...*node) (out []int) {
	for _, n := range nodes {
		out = append(out, slices.Index(c.nodes, n)+1)
	}
	return out
}

func names(nodes []*node) (out []string) {
	for _, n := range nodes {
		out = append(out, n.name)
	}
	return out
}

// TestSplitBrain is two halves that have lost sight of each other when they
// pull: each has homes of its own. They find each other again.
func TestSplitBrain(t *testing.T) {
	t.Parallel()
	w := newNetwork(t)
	c := newCluster(t, options{nodes: 6, net: w})
	left, right := c.nodes[:3], c.nodes[3:]
	w.part(t, c.hosts(left...), c.hosts(right...))
	c.awaitView(names(left), names(left)...)
	c.awaitView(names(right), names(right)...)
	c.pull(c.nodes...).wait(1)
	for _, host := range c.hosts(c.nodes...) {
		w.heal(t, host)
	}
	c.awaitMembers()
	c.finish()
}

// TestSplitInTheMiddle cuts the cluster in two while the blob is half there.
func TestSplitInTheMiddle(t *testing.T) {
	t.Parallel()
	w := newNetwork(t)
	c := newCluster(t, options{nodes: 6, net: w})
	s := c.pull(c.nodes...)
	home := c.awaitHome()
	others := c.but(home)
	w.part(t, c.hosts(home, others[0], others[1]), c.hosts(others[2:]...))
	s.wait(1)
	for _, host := range c.hosts(c.nodes...) {
		w.heal(t, host)
	}
	c.awaitMembers()
	c.finish()
}

// TestAsymmetricPartition is a home that one node cannot hear, and which cannot
// hear another.
func TestAsymmetricPartition(t *testing.T) {
	t.Parallel()
	w := newNetwork(t)
	c := newCluster(t, options{net: w})
	s := c.pull(c.nodes...)
	home := c.awaitHome()
	others := c.but(home)
	w.deaf(t, c.hosts(others[0])[0], c.hosts(home)[0])
	w.deaf(t, c.hosts(home)[0], c.hosts(others[1])[0])
	s.wait(1)
	for _, host := range c.hosts(c.nodes...) {
		w.heal(t, host)
	}
	c.awaitMembers()
	c.finish()
}

// TestPacketLoss drops packets wherever they go, gossip and the registry's
// included.
func TestPacketLoss(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		share  float64
		layers []int64
	}{
		"one of ten": {0.1, []int64{4 * mb, 1 * mb}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newNetwork(t)
			c := newCluster(t, options{layers: tc.layers, net: w})
			for host := range len(c.nodes) + 1 {
				w.lose(t, host, tc.share)
			}
			c.pull(c.nodes...).wait(1)
			for host := range len(c.nodes) + 1 {
				w.heal(t, host)
			}
			c.awaitMembers()
			c.finish()
		})
	}
}

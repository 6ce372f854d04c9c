package peer

import (
	"sync"
	"sync/atomic"
)

// traffic is what went to and came from one node since this one started, over
// all links with it: an idle link is closed after seconds, and who sent how
// much is asked for later.
type traffic struct{ sent, received atomic.Int64 } // bytes of blobs

// traffics is the traffic with every node. The zero value is empty.
type traffics struct {
	mu     sync.Mutex // guards byNode
	byNode map[string]*traffic
}

// maxTraffics is when nodes that are no longer members are forgotten.
const maxTraffics = 2 * maxLinks

// with returns the traffic with a node, which all links with it share.
func (t *traffics) with(node string) *traffic {
	t.mu.Lock()
	defer t.mu.Unlock()
	one := t.byNode[node]
	if one == nil {
		if t.byNode == nil {
			t.byNode = make(map[string]*traffic)
		}
		one = &traffic{}
		t.byNode[node] = one
	}
	return one
}

// tend keeps the traffic with members alone once there are too many nodes.
func (t *traffics) tend(members []*Member) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.byNode) <= maxTraffics {
		return
	}
	stay := make(map[string]*traffic, len(members))
	for _, m := range members {
		if one := t.byNode[m.Node]; one != nil {
			stay[m.Node] = one
		}
	}
	t.byNode = stay
}

// list returns the nodes that anything went to or came from.
func (t *traffics) list() map[string]Traffic {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make(map[string]Traffic)
	for node, one := range t.byNode {
		if sum := (Traffic{one.sent.Load(), one.received.Load()}); sum != (Traffic{}) {
			out[node] = sum
		}
	}
	return out
}

package peer

import (
	"cmp"
	"context"
	"crypto/sha256"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// lockedNode is a node that turns to its swarm whenever that calls it: with a lock of the
// swarm held, that would wait forever (I7).
type lockedNode struct {
	*testNode
	mu    sync.Mutex // guards calls
	calls map[string]int
}

// call notes that the swarm called, and takes each of its locks.
func (n *lockedNode) call(method string) {
	n.mu.Lock()
	n.calls[method]++
	n.mu.Unlock()
	free := make(chan struct{})
	go func() {
		defer close(free)
		s := n.s
		s.Status() // of the swarm, its blobs and meetings, the index and uploads
		s.Holders(digest.FromString("somebody's"))
		s.Announce(digest.FromString("own"))
		s.isCut("somebody", "another.test")
		for _, l := range s.allLinks() {
			l.forget(0)
		}
		s.answers.mu.Lock()
		defer s.answers.mu.Unlock()
	}()
	select {
	case <-free:
	case <-time.After(slow * 20 * time.Second):
		panic("peer: " + method + " is called with a lock held")
	}
}

func (n *lockedNode) Lookup(d digest.Digest) (StoredBlob, bool) {
	n.call("Lookup")
	b, ok := n.testNode.Lookup(d)
	if !ok {
		return nil, false
	}
	return lockedBlob{b.(*memBlob), n}, true
}

func (n *lockedNode) Gives(d digest.Digest, registry string) bool {
	n.call("Gives")
	return n.testNode.Gives(d, registry)
}

func (n *lockedNode) Fill(_ context.Context, w Want) error {
	n.call("Fill")
	n.start(w.Digest)
	return nil
}

func (n *lockedNode) Resolve(ctx context.Context, r Reference) (Descriptor, error) {
	n.call("Resolve")
	return n.testNode.Resolve(ctx, r)
}

func (n *lockedNode) May(ctx context.Context, r Reference) (time.Duration, error) {
	n.call("May")
	return n.testNode.May(ctx, r)
}

func (n *lockedNode) Admit(ctx context.Context, w Want) error {
	n.call("Admit")
	return n.testNode.Admit(ctx, w)
}

func (n *lockedNode) Connect(ctx context.Context, registry string) error {
	n.call("Connect")
	return n.testNode.Connect(ctx, registry)
}

func (n *lockedNode) Reaches(registry string) bool {
	n.call("Reaches")
	return n.testNode.Reaches(registry)
}

// start is testNode's, with a fill that turns to the swarm as well.
func (n *lockedNode) start(d digest.Digest) *testFill {
	n.testNode.mu.Lock()
	defer n.testNode.mu.Unlock()
	if f, ok := n.fills[d]; ok {
		return f
	}
	f, b := &testFill{done: make(chan struct{})}, newMemBlob(d)
	n.fills[d], n.blobs[d] = f, b
	go func() {
		defer close(f.done)
		w := Want{Digest: d, Registry: "registry.test", Repository: "app"}
		if f.err = n.s.Fetch(context.Background(), w, lockedBlob{b, n}, n.upstream(d)); f.err == nil {
			f.err = b.verify()
		}
		n.settled(d, b, f.err)
	}()
	return f
}

// lockedBlob is a blob of a lockedNode, in its store or on its way there.
type lockedBlob struct {
	*memBlob
	n *lockedNode
}

func (b lockedBlob) Close() error {
	b.n.call("Close")
	return b.memBlob.Close()
}

func (b lockedBlob) ReadAt(p []byte, off int64) (int, error) {
	b.n.call("ReadAt")
	return b.memBlob.ReadAt(p, off)
}

func (b lockedBlob) SetSize(size int64) error {
	b.n.call("SetSize")
	return b.memBlob.SetSize(size)
}

func (b lockedBlob) From(node string) io.WriterAt {
	b.n.call("From")
	return b.memBlob.From(node)
}

func (b lockedBlob) WritePiece(node string, i int, p []byte, from, to [sha256.Size]byte) error {
	b.n.call("WritePiece")
	return b.memBlob.WritePiece(node, i, p, from, to)
}

func (b lockedBlob) Attempt(n int) {
	b.n.call("Attempt")
	b.memBlob.Attempt(n)
}

// TestNoLockAcrossTheNode: whatever the swarm calls of its node may turn to the swarm.
func TestNoLockAcrossTheNode(t *testing.T) {
	t.Parallel()
	w := newTestWorld()
	var nodes []*lockedNode
	var inner []*testNode
	for _, name := range []string{"a", "b", "c"} {
		n := &lockedNode{calls: make(map[string]int)}
		w.node(t, name, func(c *Config) {
			n.testNode = c.Store.(*testNode)
			c.Store, c.Origin = n, n
		})
		nodes, inner = append(nodes, n), append(inner, n.testNode)
	}
	meet(inner...)
	for _, size := range []int{100, 2 << 20} {
		d := w.add(size, uint64(size))
		home, _ := homeOf(d, inner)
		slices.SortFunc(nodes, func(a, b *lockedNode) int { // the home last: it is told by others
			return cmp.Compare(flag(a.testNode == home, 1), flag(b.testNode == home, 1))
		})
		for _, n := range nodes {
			f := n.start(d)
			if <-f.done; f.err != nil {
				t.Error(f.err)
			}
		}
		for _, n := range nodes {
			n.s.Withdraw(d)
		}
	}
	r := Reference{Registry: "registry.test", Repository: "app", Tag: "v1"}
	for _, n := range nodes {
		if _, err := n.s.Resolve(t.Context(), r); err != nil {
			t.Error(err)
		}
		if _, err := n.s.May(t.Context(), r); err != nil {
			t.Error(err)
		}
		n.s.askWay(t.Context(), r.Registry)
	}
	calls := make(map[string]int)
	for _, n := range nodes {
		n.kill()
		for method, count := range n.calls {
			calls[method] += count
		}
	}
	for _, method := range []string{"Lookup", "Gives", "Fill", "Resolve", "May", "Admit", "Connect", "Reaches", "Close", "ReadAt", "SetSize", "From", "WritePiece", "Attempt"} {
		if calls[method] == 0 {
			t.Errorf("%s was not called", method)
		}
	}
}

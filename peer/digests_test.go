package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// TestSignerIsGone: what a member signed while it was there can be had of those who got it
// then, also by nodes that have never heard of it. A node that came after three of four had
// gone once got nothing, although the one that was left had all.
func TestSignerIsGone(t *testing.T) {
	for _, tt := range []struct {
		name  string
		nodes int
	}{
		{"the holder is a home", 3},
		{"the holder is no home", 6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newTestWorld()
			nodes := w.gossipCluster(t, tt.nodes)
			d := w.add(4<<20, 1)
			home, others := homeOf(d, nodes)
			slices.SortFunc(others, func(a, b *testNode) int { return b.rank(d) - a.rank(d) })
			holder := others[0] // the lowest by rank
			allOK(t, d, home, holder)
			home.kill()
			wantMembers(t, tt.nodes-1, others...)
			asker := w.node(t, "late", gossiping(holder))
			others = append(others, asker)
			wantMembers(t, tt.nodes, others...)
			for _, n := range others {
				waitFor(t, func() bool { return n == holder || len(n.s.Holders(d)) > 0 })
			}
			w.failFrom = 1 // the registry is down
			asker.wantOK(d)
			nobodyBanned(t, others)
		})
	}
}

// rank is how many members of a node's view would be home of a blob before it.
func (n *testNode) rank(d digest.Digest) int {
	k := sha256Of(d)
	seed := binary.BigEndian.Uint64(k[:])
	score := func(node string) uint64 { return mix(seed ^ hash64(node)) }
	before := 0
	for _, m := range n.s.roster.view.Load().all {
		if score(m.Node) > score(n.s.self.Node) {
			before++
		}
	}
	return before
}

// TestNewcomersAfterTheHome: the home is killed halfway, and nodes come that never saw it.
// What it signed is got once.
func TestNewcomersAfterTheHome(t *testing.T) {
	w := newTestWorld()
	w.delay = 10 * time.Millisecond // 64 KiB each: a copy takes 0.6 s
	nodes := w.gossipCluster(t, 4)
	d := w.add(4<<20, 1)
	home, others := homeOf(d, nodes)
	for _, n := range others {
		n.start(d)
	}
	for _, n := range others {
		n.held(d, 10) // of 16
	}
	home.kill()
	all := append(others, w.node(t, "late-1", gossiping(others[0])), w.node(t, "late-2", gossiping(others[0])))
	wantMembers(t, len(all), all...)
	allOK(t, d, all...)
	w.within(t, d, 1.1)
	nobodyBanned(t, all)
}

// TestOwnReadingCounts: a node that holds a blob signs what it has read itself, not what
// somebody else signed of bytes that it did not get by that.
func TestOwnReadingCounts(t *testing.T) {
	w := newTestWorld()
	n := w.node(t, "node-0")
	d := w.add(4<<20, 1)
	n.give(d)
	n.s.Announce(d)
	b := n.s.blob(blobID{key: sha256Of(d)})
	b.setSize(4 << 20)
	lie := &batch{blob: b.id, pieceSize: uint32(b.pieceSize), signer: startName("gone", 1)}
	for i := range b.n {
		lie.pieces = append(lie.pieces, pieceDigest{piece: uint32(i)})
	}
	b.mu.Lock()
	b.knowLocked(lie)
	b.mu.Unlock()
	if err := n.s.seedFromStore(b); err != nil {
		t.Fatal(err)
	}
	waitFor(t, b.whole)
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.n {
		if ts := b.batchesLocked(i); len(ts) != 1 || ts[0].signer != n.s.self.Name {
			t.Errorf("piece %d is given by the word of %s", i, ts[0].signer)
		}
	}
}

// cutBlob is a blob whose file ends too early.
type cutBlob struct {
	*memBlob
	end int64
}

func (b cutBlob) ReadAt(p []byte, off int64) (int, error) {
	if off >= b.end {
		return 0, io.EOF
	}
	return b.memBlob.ReadAt(p[:min(int64(len(p)), b.end-off)], off)
}

// TestCutShort: what is left of a piece is not signed as the piece. Who knows the digest of it
// would ban those that give the right bytes.
func TestCutShort(t *testing.T) {
	w := newTestWorld()
	n := w.node(t, "node-0")
	d := w.add(1<<20, 1)
	n.give(d)
	b := n.s.blob(blobID{key: sha256Of(d)})
	b.setSize(1 << 20)
	cut := cutBlob{n.blobs[d], b.pieceSize * 3 / 2}
	if err := b.sign(cut, b.lives(), []int{0}); err != nil {
		t.Error(err)
	}
	if err := b.sign(cut, b.lives(), []int{1}); !errors.Is(err, errWrongBlob) {
		t.Errorf("half a piece is signed: %v", err)
	}
}

// TestManySigners: a home that has vouched for as many members as may count, starts that are over
// among them, still vouches for those that it names.
func TestManySigners(t *testing.T) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 6)
	d := w.add(4<<20, 1)
	slices.SortFunc(nodes, func(a, b *testNode) int { return a.rank(d) - b.rank(d) })
	home, asker, holder := nodes[0], nodes[4], nodes[5]
	holder.give(d)
	holder.s.Announce(d)
	waitFor(t, func() bool { return len(home.s.Holders(d)) > 0 })
	var gone []string
	for i := range maxSigners {
		gone = append(gone, startName(fmt.Sprint("gone-", i), 1))
	}
	for _, n := range []*testNode{home, asker} {
		n.s.blob(blobID{key: sha256Of(d)}).vouch(gone)
	}
	asker.wantOK(d)
	if w.requests.Load() != 0 {
		t.Errorf("%d requests upstream for a blob that %s holds", w.requests.Load(), holder.s.self.Node)
	}
}

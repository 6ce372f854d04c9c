package peer

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

func bareIndex(members int) (*index, []Member) {
	s := &Swarm{self: Member{Name: startName("self", 0)}}
	x := newIndex(s)
	var ms []Member
	for i := range members {
		ms = append(ms, Member{Name: startName(fmt.Sprintf("node-%05d", i), 1), Zone: fmt.Sprint(i % 3)})
	}
	x.joined(ms)
	return x, ms
}

// TestIndexAtScale: 10,000 nodes that hold 2,000 blobs each, of 50,000 that
// there are, under the rule that nobody announces what 64 others have.
func TestIndexAtScale(t *testing.T) {
	nodes, each, blobs := 10000, 2000, 50000
	if testing.Short() {
		nodes, each, blobs = 1000, 200, 5000
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.GC() // what earlier tests left in pools goes with the second
	runtime.ReadMemStats(&before)
	x, ms := bareIndex(nodes)
	r := rand.New(rand.NewPCG(1, 1))
	announced := 0
	known := make([]int, blobs)
	for i := range ms {
		var ops []op
		for range each {
			b := r.IntN(blobs)
			if known[b] < enoughCopies {
				known[b]++
				ops = append(ops, op{true, mix(uint64(b))})
			}
		}
		announced += len(ops)
		seq := uint32(0)
		for c := range slices.Chunk(ops, opsPerMessage) {
			x.applyLocked(memberID(ms[i].Name), seq, c)
			seq += uint32(len(c))
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	mem := (float64(after.HeapAlloc) - float64(before.HeapAlloc)) / 1e6
	const looks = 20000
	began := time.Now()
	for i := range looks {
		if len(x.holders(mix(uint64(i%blobs)), "1", namedHolders)) == 0 && !testing.Short() {
			t.Fatal("a blob without holders")
		}
	}
	look := time.Since(began) / looks // the goal is 5 µs; printed, because a busy machine is no defect
	t.Logf("%d nodes x %d blobs of %d: %d of %d announced, %d postings, %.1f MB, %v a look-up",
		nodes, each, blobs, announced, nodes*each, x.postings, mem, look)
	if mem > 40 {
		t.Errorf("%.1f MB, the goal is 40", mem)
	}
	runtime.KeepAlive(x)
}

func TestIndexOrder(t *testing.T) {
	add, del := op{true, 7}, op{false, 7}
	cases := []struct {
		name string
		do   func(x *index, id uint64)
		held bool
		seq  uint32
	}{
		{"in order", func(x *index, id uint64) {
			x.applyLocked(id, 0, []op{add})
			x.applyLocked(id, 1, []op{del})
		}, false, 2},
		{"twice", func(x *index, id uint64) {
			x.applyLocked(id, 0, []op{add})
			x.applyLocked(id, 0, []op{add})
		}, true, 1},
		{"a gap is seen and closed", func(x *index, id uint64) {
			x.applyLocked(id, 1, []op{{true, 8}})
			x.applyLocked(id, 0, []op{add})
		}, true, 2},
		{"a removal waits for its addition", func(x *index, id uint64) {
			x.applyLocked(id, 1, []op{del})
			x.applyLocked(id, 0, []op{add})
		}, false, 2},
		{"a delta puts things in order", func(x *index, id uint64) {
			x.applyLocked(id, 1, []op{del})
			x.merge(x.slots[0].name, delta{seq: 2, ops: []op{add, del}}, true)
		}, false, 2},
		{"a whole set voids", func(x *index, id uint64) {
			x.applyLocked(id, 0, []op{add})
			x.merge(x.slots[0].name, delta{whole: true, seq: 9}, true)
		}, false, 9},
		{"a stranger is not heard", func(x *index, id uint64) {
			x.applyLocked(id+1, 0, []op{add})
		}, false, 0},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			x, ms := bareIndex(1)
			c.do(x, memberID(ms[0].Name))
			if held := len(x.holders(7, "", 8)) > 0; held != c.held || x.slots[0].seq != c.seq {
				t.Errorf("held %v at %d, want %v at %d", held, x.slots[0].seq, c.held, c.seq)
			}
		})
	}
}

// TestIndexForgetsTheDead: look-ups at once, memory after the tombstone.
func TestIndexForgetsTheDead(t *testing.T) {
	x, ms := bareIndex(3)
	for i, m := range ms {
		x.applyLocked(memberID(m.Name), 0, []op{{true, 5}, {true, uint64(i) << 52}})
	}
	x.fell(ms[1].Name)
	if got := len(x.holders(5, "", 8)); got != 2 {
		t.Errorf("%d holders after a death", got)
	}
	x.sweepSome(time.Now(), shardCount)
	if x.postings != 6 {
		t.Errorf("%d postings before the tombstone is over", x.postings)
	}
	for range 3 {
		x.sweepSome(time.Now().Add(2*tombstone), shardCount/2)
	}
	if x.postings != 4 || len(x.free) != 1 {
		t.Errorf("%d postings, %d free slots", x.postings, len(x.free))
	}
}

// TestMessageFits pins that a full message survives memberlist's packet with
// encryption and label: what does not fit vanishes without a word.
func TestMessageFits(t *testing.T) {
	m := appendMessage(nil, 1, 0, make([]op, opsPerMessage))
	if len(m) > maxMessage {
		t.Errorf("message of %d bytes, bound %d", len(m), maxMessage)
	}
	const overhead = 2 + 2 + 1 + 5 + len(gossipLabel) + 2 + 45 // compound, user type, CRC, label, encryption
	if c := memberlist.DefaultLANConfig(); maxMessage+overhead > c.UDPBufferSize {
		t.Errorf("%d+%d bytes in a packet of %d", maxMessage, overhead, c.UDPBufferSize)
	}
}

// TestGossipOfFiveHundred runs 500 real memberlist members in one process, on
// memberlist's own loopback sockets, while 200 of them get 50 blobs at once.
func TestGossipOfFiveHundred(t *testing.T) {
	if testing.Short() {
		t.Skip("a minute of CPU")
	}
	count := 30
	if os.Getenv("LARDER_SIM") != "" {
		count = 500
	}
	if n, err := strconv.Atoi(os.Getenv("LARDER_MEMBERS")); err == nil {
		count = n
	}
	var bytes atomic.Int64
	w := newTestWorld()
	var nodes []*testNode
	began := time.Now()
	for i := range count {
		change := []func(*Config){gossiping(), func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(io.Discard, nil)) }}
		if i > 0 {
			change[0] = gossiping(nodes[rand.IntN(i)])
		}
		nodes = append(nodes, w.node(t, fmt.Sprintf("node-%03d", i), change...))
	}
	// With so many on few cores some are always suspected by somebody.
	waitLong(t, func() bool {
		return slices.IndexFunc(nodes, func(n *testNode) bool { return n.members() < count*98/100 }) < 0
	})
	t.Logf("%d members know each other after %v", count, time.Since(began).Round(time.Millisecond))
	began = time.Now()
	for i := range 50 {
		d := w.add(10, uint64(i))
		for _, n := range nodes[:count*2/5] {
			n.s.Announce(d)
		}
	}
	full := func(n *testNode) bool {
		n.s.index.mu.RLock()
		defer n.s.index.mu.RUnlock()
		return n.s.index.blobs == 50
	}
	waitLong(t, func() bool { return slices.IndexFunc(nodes, func(n *testNode) bool { return !full(n) }) < 0 })
	took := time.Since(began)
	var said uint32
	for _, n := range nodes {
		n.s.index.own.mu.Lock()
		said += n.s.index.own.seq
		n.s.index.own.mu.Unlock()
		bytes.Add(n.s.gossip.told.Load())
	}
	t.Logf("%d members: 50 blobs at %d of them are known everywhere after %v; %d of %d postings announced; %.0f bytes of index gossip per node and second",
		count, count*2/5, took.Round(time.Millisecond), said, 50*count*2/5, float64(bytes.Load())/float64(count)/took.Seconds())
	killAll(nodes)
}

// killAll stops nodes side by side: each says goodbye for up to a second.
func killAll(nodes []*testNode) {
	var all sync.WaitGroup
	for _, n := range nodes {
		all.Go(n.kill)
	}
	all.Wait()
}

func waitLong(t *testing.T, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	for !ok() {
		if ctx.Err() != nil {
			t.Fatal("it did not come to pass within 4 minutes")
		}
		wait(ctx, 50*time.Millisecond)
	}
}

package peer

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/opencontainers/go-digest"
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
	t.Logf("%d nodes x %d blobs of %d: %d of %d announced, %d postings, %.1f MB",
		nodes, each, blobs, announced, nodes*each, x.postings, mem)
	// The goal is 5 µs; printed, because a busy machine is no defect.
	t.Logf("look-ups of what is held: %s", timeLookups(t, x, blobs, true))
	t.Logf("look-ups of what nobody holds: %s", timeLookups(t, x, blobs, false))
	if mem > 40 {
		t.Errorf("%.1f MB, the goal is 40", mem)
	}
	runtime.KeepAlive(x)
}

// timeLookups asks the index for each of many blobs as a home does, and says how
// long that took.
func timeLookups(t *testing.T, x *index, blobs int, held bool) string {
	const looks = 20000
	took := make([]time.Duration, looks)
	began := time.Now()
	for i := range looks {
		p := mix(uint64(i % blobs))
		if !held {
			p = ^p
		}
		start := time.Now()
		found := len(x.holders(p, "1", namedHolders))
		took[i] = time.Since(start)
		if held != (found > 0) && !testing.Short() {
			t.Fatalf("%d holders of blob %d", found, i%blobs)
		}
	}
	mean := time.Since(began) / looks
	slices.Sort(took)
	return fmt.Sprintf("half of them within %v, 99 in 100 within %v, mean %v", took[looks/2], took[looks*99/100], mean)
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

// TestBackWhileSwept: a member that was taken for dead, and is back while its postings are
// swept, is asked for all that it said.
func TestBackWhileSwept(t *testing.T) {
	x, ms := bareIndex(2)
	id := memberID(ms[0].Name)
	said := []op{{true, 1 << 52}, {true, 4000 << 52}} // of the first and of the last shards
	x.applyLocked(id, 0, said)
	x.fell(ms[0].Name)
	after := time.Now().Add(2 * tombstone)
	x.sweepSome(after, shardCount/2)
	x.joined(ms[:1])
	later := op{true, 2 << 52}
	x.applyLocked(id, 2, []op{later})
	if seq, _ := x.expects(ms[0].Name); seq != 0 || x.slots[0].known != 3 {
		t.Errorf("it is asked from %d on, of %d; want from 0 on, of 3", seq, x.slots[0].known)
	}
	x.merge(ms[0].Name, delta{seq: 3, ops: append(said, later)}, true)
	x.sweepSome(after, shardCount/2)
	for _, o := range append(said, later) {
		if len(x.holders(o.prefix, "", 8)) == 0 {
			t.Errorf("%x: not known any more", o.prefix)
		}
	}
	if x.postings != 3 || len(x.free) != 0 {
		t.Errorf("%d postings, %d free slots, want 3 and none", x.postings, len(x.free))
	}
}

// TestOneFillsNoIndex: a member that says it has more blobs than a node may does not keep
// out what others say; what it takes back makes room.
func TestOneFillsNoIndex(t *testing.T) {
	x, ms := bareIndex(2)
	loud, other := ms[0].Name, memberID(ms[1].Name)
	var ops []op
	for i := range uint64(maxIndexed + 1) {
		ops = append(ops, op{true, mix(i)})
	}
	x.applyLocked(memberID(loud), 0, ops)
	if x.postings != maxOwn {
		t.Errorf("%d postings of one member, want %d", x.postings, maxOwn)
	}
	x.applyLocked(other, 0, []op{{true, 7}})
	if len(x.holders(7, "", 8)) == 0 {
		t.Error("another member's blob is not known")
	}
	x.applyLocked(memberID(loud), maxIndexed+1, []op{{false, mix(0)}, {true, 8}, {true, 9}})
	if len(x.holders(8, "", 8)) == 0 || len(x.holders(9, "", 8)) != 0 {
		t.Error("one taken back makes room for another, not more, and not less")
	}
	x.merge(loud, delta{whole: true, seq: maxIndexed + 4, ops: []op{{true, 9}}}, true)
	if len(x.holders(9, "", 8)) == 0 || x.postings != 2 {
		t.Errorf("%d postings, want two: a whole set makes room for itself", x.postings)
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

// TestGossipOfFiveHundred runs 500 real members in one process on loopback
// sockets. They start as a DaemonSet's pods do: 20 a second, as many as its
// controller creates, and find each other by the addresses of those before them,
// which a headless Service lists. Then 200 of them get 50 blobs at once.
func TestGossipOfFiveHundred(t *testing.T) {
	count := 30
	if testing.Short() {
		count = 10
	}
	if os.Getenv("LARDER_SIM") != "" {
		count = 500
	}
	if n, err := strconv.Atoi(os.Getenv("LARDER_MEMBERS")); err == nil {
		count = n
	}
	// So many members make garbage for one collector; each of them alone makes little.
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	c := &crowd{t: t, w: newTestWorld()}
	c.rollOut(count, time.Second/20)
	c.phase("all know each other", func(n *testNode) bool { return n.members() == count })
	c.holdFor(time.Duration(count) * 20 * time.Millisecond) // 10 s for 500
	const blobs = 50
	pullers := c.nodes[:count*2/5]
	held := c.announce(pullers, blobs)
	c.phase("all know who holds what", func(n *testNode) bool { return knowsHolders(n, pullers, held) })
	c.memory()
	killAll(c.nodes)
}

// crowd is many members in this process.
type crowd struct {
	t     *testing.T
	w     *testWorld
	nodes []*testNode
	from  sample // where the present phase began
}

// sample is what all members together had done at some time.
type sample struct {
	at     time.Time
	gossip int64 // bytes sent
	cpu    time.Duration
}

func (c *crowd) sample() sample {
	s := sample{at: time.Now(), cpu: processorTime(c.t)}
	for _, n := range c.nodes {
		s.gossip += n.s.gossip.net.sent.Load()
	}
	return s
}

// report prints what a phase took, and begins the next.
func (c *crowd) report(what string) {
	now, n := c.sample(), float64(len(c.nodes))
	took := now.at.Sub(c.from.at)
	c.t.Logf("%s: %v, %v of processor; each sent %.1f kB/s of gossip", what, took.Round(10*time.Millisecond),
		(now.cpu - c.from.cpu).Round(10*time.Millisecond), float64(now.gossip-c.from.gossip)/n/took.Seconds()/1000)
	c.from = now
}

func (c *crowd) rollOut(count int, every time.Duration) {
	c.from = c.sample()
	var addrs []string
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := range count {
		n := c.w.node(c.t, fmt.Sprintf("node-%03d", i), gossiping(), func(cfg *Config) {
			cfg.Zone, cfg.Join, cfg.probe = fmt.Sprint(i%3), slices.Clone(addrs), 10*time.Second
		})
		c.nodes = append(c.nodes, n)
		addrs = append(addrs, n.gossipAddr())
		<-tick.C
	}
	c.report(fmt.Sprintf("%d members started", count))
}

// phase waits until every member has seen what ok asks for; with so many on few
// cores, some are always suspected by somebody.
func (c *crowd) phase(what string, ok func(*testNode) bool) {
	c.t.Helper()
	var took []time.Duration
	left := slices.Clone(c.nodes)
	waitLong(c.t, func() bool {
		left = slices.DeleteFunc(left, func(n *testNode) bool {
			done := ok(n)
			if done {
				took = append(took, time.Since(c.from.at))
			}
			return done
		})
		return len(left) == 0
	})
	c.t.Logf("%s: half of them after %v, 99 in 100 after %v", what, took[len(took)/2].Round(10*time.Millisecond), took[len(took)*99/100].Round(10*time.Millisecond))
	c.report(what)
}

func (c *crowd) holdFor(d time.Duration) {
	wait(c.t.Context(), d)
	c.report("nothing happens")
}

// announce has nodes hold blobs, all at once; it returns the blobs' prefixes.
func (c *crowd) announce(nodes []*testNode, blobs int) (held []uint64) {
	for i := range blobs {
		d := c.w.add(10, uint64(i))
		held = append(held, prefixOf(key(sha256Of(d))))
		for _, n := range nodes {
			n.s.Announce(d)
		}
	}
	return held
}

// knowsHolders reports whether a member knows of each blob every holder that
// announced it, or as many as are ever announced on purpose.
func knowsHolders(n *testNode, pullers []*testNode, held []uint64) bool {
	for _, p := range held {
		said := 0
		for _, other := range pullers {
			announced, pending := other.s.index.own.announced(p)
			if pending {
				return false
			}
			if announced && other != n {
				said++
			}
		}
		if all, _ := n.s.index.counts(p, ""); all < min(said, enoughCopies) {
			return false
		}
	}
	return true
}

// announced reports whether a blob was announced, or may yet be.
func (o *own) announced(p uint64) (yes, pending bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.held[p], slices.ContainsFunc(o.due, func(w waiting) bool { return w.prefix == p })
}

func (c *crowd) memory() {
	said := uint32(0)
	for _, n := range c.nodes {
		n.s.index.own.mu.Lock()
		said += n.s.index.own.seq
		n.s.index.own.mu.Unlock()
	}
	// What the collector found alive: the members go on, and HeapAlloc has what they
	// made and dropped while it worked (seen: up to four times as much).
	m := []runtimemetrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
	runtime.GC()
	runtimemetrics.Read(m)
	perNode := func(s runtimemetrics.Sample) float64 { return float64(s.Value.Uint64()) / 1e6 / float64(len(c.nodes)) }
	c.t.Logf("%d postings announced; a member has %.2f MB of heap and %.2f MB of stacks", said, perNode(m[0]), perNode(m[1]))
}

func processorTime(t *testing.T) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
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

// TestRestartIsQuiet: a node that starts with many blobs in a cluster of many does not tell
// of all of them at once, and of none until it knows what others have.
func TestRestartIsQuiet(t *testing.T) {
	const blobs = 1000
	x, ms := bareIndex(0)
	x.s.roster = newRoster()
	x.s.index = x
	x.s.roster.set(x.s.self)
	for i := range blobs {
		x.s.Announce(digest.FromString(fmt.Sprint(i)))
	}
	for i := range 1000 {
		ms = append(ms, Member{Name: startName(fmt.Sprint("node-", i), 1)})
	}
	x.s.roster.set(ms...)
	now := time.Now().Add(batchEvery)
	x.ripen(now)
	if said := len(x.own.pending); said > 0 {
		t.Errorf("%d of %d blobs are told of at once", said, blobs)
	}
	x.behind = len(ms)
	now = now.Add(11 * time.Second) // all are due
	x.ripen(now)
	if said := len(x.own.pending); said > 0 {
		t.Errorf("%d blobs are told of before it is known what others have", said)
	}
	x.behind = 0
	x.ripen(now)
	if said := len(x.own.pending); said != blobs {
		t.Errorf("%d blobs are told of after that, want all %d, which nobody else has", said, blobs)
	}
}

// TestNewsIsPassedOnOnce: a node that waits for what it missed, and has no room for what comes
// meanwhile, passes that on once, not each time it hears it: two of them would never stop.
func TestNewsIsPassedOnOnce(t *testing.T) {
	x, ms := bareIndex(1)
	id := memberID(ms[0].Name)
	for i := range uint32(maxAhead + 2) { // without the first operation
		for try := range 3 {
			if news := x.applyLocked(id, i+1, []op{{true, uint64(i)}}); news != (try == 0) {
				t.Errorf("operation %d, heard %d times before: passed on: %v", i+1, try, news)
			}
		}
	}
	if s := &x.slots[0]; len(s.ahead) != maxAhead || s.known != maxAhead+3 {
		t.Errorf("%d messages wait, of %d operations; want %d, of %d", len(s.ahead), s.known, maxAhead, maxAhead+3)
	}
}

// TestSnapshotVoids: what a member took back is not known from a time before a snapshot, of which
// it is no part.
func TestSnapshotVoids(t *testing.T) {
	x, ms := bareIndex(2)
	y, _ := bareIndex(2)
	id := memberID(ms[0].Name)
	for _, knows := range []*index{x, y} {
		knows.applyLocked(id, 0, []op{{true, 7}, {true, 8}})
	}
	y.applyLocked(id, 2, []op{{false, 7}, {true, 9}})
	_, members, err := parseMembersPage(y.page(pageAsk{pageMembers, 0}))
	if err != nil {
		t.Fatal(err)
	}
	_, postings, err := parseShardsPage(y.page(pageAsk{pageShards, 0}))
	if err != nil {
		t.Fatal(err)
	}
	who := make(map[uint16]indexed)
	for _, m := range members {
		who[m.slot] = m
	}
	x.adoptMembers(who)
	x.adoptPostings(postings, who)
	x.adoptSeqs(who)
	for p, held := range map[uint64]bool{7: false, 8: true, 9: true} {
		if got := len(x.holders(p, "", 8)) > 0; got != held {
			t.Errorf("%d is held: %v", p, got)
		}
	}
	if s := &x.slots[0]; x.postings != 2 || s.posts != 2 || s.seq != 4 {
		t.Errorf("%d postings, %d of the member at %d", x.postings, s.posts, s.seq)
	}
}

// TestWholeSetInPages: what a member says while the pages of all that it holds come is not lost, and
// they replace what came of it another way, such as by a snapshot that was cut off.
func TestWholeSetInPages(t *testing.T) {
	x, ms := bareIndex(1)
	name, id := ms[0].Name, memberID(ms[0].Name)
	x.adoptPostings([]posting{{6, []uint16{0}}}, map[uint16]indexed{0: {id: id, seq: 4}})
	x.merge(name, delta{whole: true, more: true, seq: 5, next: 8, ops: []op{{true, 7}}}, true)
	x.applyLocked(id, 5, []op{{false, 7}})
	x.merge(name, delta{whole: true, seq: 7, ops: []op{{true, 8}}}, false) // and 7 is held again
	if seq, _ := x.expects(name); seq != 6 || x.slots[0].known != 7 {
		t.Errorf("it is asked from %d on, of %d; want from 6 on, of 7", seq, x.slots[0].known)
	}
	for p, held := range map[uint64]bool{6: false, 7: false, 8: true} {
		if got := len(x.holders(p, "", 8)) > 0; got != held {
			t.Errorf("%d is held: %v", p, got)
		}
	}
	x.merge(name, delta{seq: 7, ops: []op{{true, 7}}}, true)
	if len(x.holders(7, "", 8)) == 0 || x.postings != 2 {
		t.Errorf("%d postings, want two", x.postings)
	}
}

// TestEachGapIsGivenTime: gossip gets some seconds to close a gap, also where there was one before
// that it has closed.
func TestEachGapIsGivenTime(t *testing.T) {
	x, ms := bareIndex(manyLate)
	x.s.roster = newRoster()
	x.s.roster.set(ms...)
	seq := uint32(0)
	gap := func() {
		seq += 2
		for _, m := range ms {
			x.applyLocked(memberID(m.Name), seq-1, []op{{true, 1}})
		}
	}
	now := time.Now()
	gap()
	x.chase(now)
	for _, m := range ms {
		x.applyLocked(memberID(m.Name), 0, []op{{true, 2}})
	}
	x.chase(now.Add(batchEvery))
	now = now.Add(time.Minute)
	gap()
	x.chase(now)
	if !x.adopted.IsZero() {
		t.Error("a snapshot is taken at once")
	}
	x.chase(now.Add(2*deltaPause + batchEvery))
	if x.adopted.IsZero() {
		t.Error("no snapshot is taken, though the gaps stay")
	}
}

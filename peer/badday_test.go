package peer

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/larder-cache/larder/test/logtest"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// The bad days of the swarm, with real TLS on loopback. In all of them pulls
// finish, no wrong byte is taken (testNode verifies the whole digest, and
// memBlob takes bytes once), and upstream stays within two copies.

func (w *testWorld) within(t *testing.T, d digest.Digest, copies float64) {
	t.Helper()
	if got, size := w.fetched.Load(), len(w.bytes(d)); float64(got) > copies*float64(size) {
		t.Errorf("upstream gave %.2f copies, want at most %.2f", float64(got)/float64(size), copies)
	}
}

func allOK(t *testing.T, d digest.Digest, nodes ...*testNode) {
	t.Helper()
	for _, n := range nodes {
		n.start(d)
	}
	for _, n := range nodes {
		n.wantOK(d)
	}
}

// held waits until a node has some of a blob.
func (n *testNode) held(d digest.Digest, pieces int) {
	n.t.Helper()
	waitFor(n.t, func() bool {
		n.mu.Lock()
		b := n.blobs[d]
		n.mu.Unlock()
		if b == nil || b.Size() < 0 {
			return false
		}
		got := 0
		for i := range pieceCount(b.Size(), PieceSize(b.Size())) {
			if b.Has(i) {
				got++
			}
		}
		return got >= pieces
	})
}

func TestHomeKilledInTheMiddle(t *testing.T) {
	w := newTestWorld()
	w.delay = 2 * time.Millisecond // 64 KiB each: 10 MiB take 0.3 s
	nodes := w.nodes(t, 5)
	d := w.add(10<<20, 1)
	home, others := homeOf(d, nodes)
	for _, n := range others {
		n.start(d)
	}
	for _, n := range others {
		n.held(d, 5)
	}
	home.kill()
	allOK(t, d, others...)
	w.within(t, d, 1.9)
}

// TestAllHomesKilledInTheMiddle pins that the nodes that are left agree on who
// goes on, although gossip still names the dead.
func TestAllHomesKilledInTheMiddle(t *testing.T) {
	w := newTestWorld()
	w.delay = 2 * time.Millisecond
	nodes := w.nodes(t, 8)
	d := w.add(10<<20, 1)
	var homes, others []*testNode
	for _, m := range nodes[0].s.roster.homes(sha256Of(d), "", false) {
		i := slices.IndexFunc(nodes, func(n *testNode) bool { return n.s.self.Name == m.Name })
		homes = append(homes, nodes[i])
	}
	for _, n := range nodes {
		if !slices.Contains(homes, n) {
			others = append(others, n)
		}
	}
	for _, n := range others {
		n.start(d)
	}
	for _, n := range others {
		n.held(d, 5)
	}
	for _, n := range homes {
		n.kill()
	}
	allOK(t, d, others...)
	w.within(t, d, 2)
}

func TestEveryHolderKilled(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 5)
	d := w.add(4<<20, 1)
	home, others := homeOf(d, nodes)
	allOK(t, d, home, others[0])
	home.kill()
	others[0].kill()
	allOK(t, d, others[1:]...)
	w.within(t, d, 2)
}

// TestWrongBytes: one node gives wrong bytes to whoever asks it.
func TestWrongBytes(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 5)
	d := w.add(8<<20, 1)
	_, others := homeOf(d, nodes)
	liar := others[0]
	liar.mu.Lock()
	liar.taint = func(_ digest.Digest, p []byte, off int64) {
		if off > 0 {
			p[0] ^= 1
		}
	}
	liar.mu.Unlock()
	for _, n := range nodes {
		if n != liar {
			n.start(d)
		}
	}
	f := liar.start(d)
	for _, n := range nodes {
		if n != liar {
			n.wantOK(d)
		}
	}
	<-f.done
	w.within(t, d, 2)
}

// TestWrongBytesAreBanned pins that one wrong piece ends the use of its sender.
func TestWrongBytesAreBanned(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 2)
	d := w.add(8<<20, 1)
	home, others := homeOf(d, nodes)
	home.give(d)
	b := home.s.blob(blobID{key: sha256Of(d)})
	_ = home.s.seedFromStore(b) // hashes in the background
	waitFor(t, b.whole)
	home.mu.Lock()
	home.blobs[d].mu.Lock()
	home.blobs[d].taint = func(p []byte, off int64) { p[0] ^= 1 } // the disk rots after the digests were made
	home.blobs[d].mu.Unlock()
	home.mu.Unlock()
	others[0].wantOK(d)
	if n := testutil.ToFloat64(others[0].s.metrics.bans.WithLabelValues(string(banDigest))); n == 0 {
		t.Error("nobody was banned")
	}
	if from := others[0].blobs[d].sources(); from[home.s.self.Node] != 0 {
		t.Errorf("%d bytes were taken of a node that only has wrong ones", from[home.s.self.Node])
	}
}

// TestRottenSeed: a holder whose file no longer matches offers nothing.
func TestRottenSeed(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 3)
	d := w.add(3<<20, 1)
	home, others := homeOf(d, nodes)
	home.give(d)
	home.blobs[d].data[1<<20] ^= 1
	allOK(t, d, others...)
	w.within(t, d, 2)
}

// TestSeedBesideLargeOnes: who hashes blobs of many gigabytes, which takes minutes, gives a
// small one meanwhile.
func TestSeedBesideLargeOnes(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 2)
	d := w.add(3<<20, 1)
	home, others := homeOf(d, nodes)
	ctx, cancel := context.WithCancel(t.Context())
	var hashed sync.WaitGroup
	for range 2 * hashersAtOnce {
		hashed.Go(func() {
			_ = home.s.hashing(ctx, 50<<30, func() error { <-ctx.Done(); return nil }) // ends with ctx
		})
	}
	waitFor(t, func() bool { return len(home.s.hashers)+len(home.s.bigHashers) == hashersAtOnce })
	home.give(d)
	others[0].wantOK(d)
	if n := w.requests.Load(); n > 0 {
		t.Errorf("%d requests to the registry for what a peer holds", n)
	}
	cancel()
	hashed.Wait()
}

func TestSlowSeed(t *testing.T) {
	w := newTestWorld()
	slow := w.node(t, "slow", func(c *Config) { c.MaxUploadBytesPerSecond = 64 << 10 })
	fast, taker := w.node(t, "fast"), w.node(t, "taker")
	meet(slow, fast, taker)
	d := w.add(6<<20, 1)
	slow.give(d)
	fast.give(d)
	for _, n := range []*testNode{slow, fast, taker} {
		k := prefixOf(sha256Of(d))
		for _, o := range []*testNode{slow, fast} {
			n.s.index.joined([]Member{o.s.self})
			n.s.index.heard(appendMessage(nil, memberID(o.s.self.Name), 0, []op{{true, k}}))
		}
	}
	began := time.Now()
	taker.wantOK(d)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("a slow seed beside a fast one held a pull for %v", took)
	}
	if w.requests.Load() > 0 {
		t.Error("upstream was asked for a blob that peers hold")
	}
}

// TestLimits: what a node may give, or take, a second holds for all of it together.
func TestLimits(t *testing.T) {
	const limit = 4 << 20
	for name, tt := range map[string]struct {
		givers, takers int
		set            func(*Config)
	}{
		"upload":   {1, 2, func(c *Config) { c.MaxUploadBytesPerSecond = limit }},
		"download": {2, 1, func(c *Config) { c.MaxDownloadBytesPerSecond = limit }},
	} {
		t.Run(name, func(t *testing.T) {
			w := newTestWorld()
			nodes := w.nodes(t, tt.givers+tt.takers, tt.set)
			givers, takers := nodes[:tt.givers], nodes[tt.givers:]
			var pulls sync.WaitGroup
			began := time.Now()
			for i := range 2 {
				giver, taker := givers[i%tt.givers], takers[i%tt.takers]
				d := w.add(3<<20, uint64(i))
				giver.give(d)
				taker.s.index.joined([]Member{giver.s.self})
				taker.s.index.heard(appendMessage(nil, memberID(giver.s.self.Name), uint32(i/tt.givers), []op{{true, prefixOf(sha256Of(d))}}))
				pulls.Go(func() { taker.wantOK(d) })
			}
			pulls.Wait()
			free := 4 * chunkSize // of the bucket
			if name == "download" {
				free = 1<<18 + int(savings.Seconds()*limit) // and the last piece is not paid for
			}
			if took, least := time.Since(began), time.Duration(6<<20-free)*time.Second/limit; took < least {
				t.Errorf("6 MiB took %v, want %v", took, least)
			}
			if n := w.requests.Load(); n > 0 {
				t.Errorf("%d requests to the registry for what a peer holds", n)
			}
		})
	}
}

// deafPeer proves that it is a member and then says nothing.
func deafPeer(t *testing.T, w *testWorld, name string) *testNode {
	n := w.node(t, name)
	n.kill()
	ln, err := net.Listen("tcp", n.s.self.Addr)
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				tc := tls.Server(c, n.s.trust.config())
				_ = tc.SetDeadline(time.Now().Add(20 * time.Second))
				_, _ = io.Copy(io.Discard, tc)
			})
		}
	})
	t.Cleanup(func() { ln.Close(); conns.Wait() })
	return n
}

// TestSilentHome: a home that takes the connection and never answers costs
// seconds, not the pull.
func TestSilentHome(t *testing.T) {
	w := newTestWorld()
	var nodes []*testNode
	deaf := deafPeer(t, w, "deaf")
	for i := range 3 {
		nodes = append(nodes, w.node(t, fmt.Sprintf("node-%d", i)))
	}
	meet(append(nodes, deaf)...)
	var d digest.Digest
	for seed := uint64(1); ; seed++ { // a blob whose home is the deaf one
		d = w.add(2<<20, seed)
		if home, _ := homeOf(d, append(nodes, deaf)); home == deaf {
			break
		}
	}
	began := time.Now()
	allOK(t, d, nodes...)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("a silent home cost %v", took)
	}
	w.within(t, d, 2)
}

// TestHomesUnreached: homes that find no way to the registry leave the blob to the next
// one, get it from there themselves, and refuse the blobs that come after; when nobody
// has a way, everybody waits for the one that has it first.
func TestHomesUnreached(t *testing.T) {
	for name, tc := range map[string]struct {
		cut   int           // homes
		until time.Duration // 0 = for good
		most  time.Duration
	}{
		"first":       {1, 0, 4 * time.Second},
		"two":         {2, 0, 8 * time.Second},
		"all for 3 s": {5, 3 * time.Second, 12 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newTestWorld()
			nodes := w.nodes(t, 5)
			d := w.add(4<<20, 1)
			k := sha256Of(d)
			ranked := nodes[0].s.roster.view.Load().homes(k, "", false, nil)
			for _, n := range nodes {
				rank := slices.IndexFunc(ranked, func(m *Member) bool { return m.Name == n.s.self.Name })
				n.cutOff.Store(rank >= 0 && rank < tc.cut || tc.cut == len(nodes))
			}
			if tc.until > 0 {
				time.AfterFunc(tc.until, func() {
					for _, n := range nodes {
						n.cutOff.Store(false)
					}
				})
			}
			begun := time.Now()
			allOK(t, d, nodes...)
			if took := time.Since(begun); took > slow*tc.most {
				t.Errorf("took %v", took)
			}
			if got := w.requests.Load(); got > 2 {
				t.Errorf("%d requests to the registry", got)
			}
			w.within(t, d, 1.1)
			if tc.until > 0 {
				return
			}
			begun = time.Now()
			for seed := range uint64(6) {
				allOK(t, w.add(1<<20, 10+seed), nodes...)
			}
			if took := time.Since(begun); took > slow*2*time.Second {
				t.Errorf("what came after took %v", took)
			}
		})
	}
}

// TestSlowHome: another node fetches from the far end what the home gets slowly.
func TestSlowHome(t *testing.T) {
	for name, most := range map[string]int{"everybody": 8, "one that is no home": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newTestWorld()
			nodes := w.nodes(t, 8)
			d := w.add(24<<20, 1)
			home, _ := homeOf(d, nodes)
			home.delay = 60 * time.Millisecond // 24 s in all
			if most == 1 {
				nodes = slices.DeleteFunc(nodes, func(n *testNode) bool { return home.s.mayBeHome(sha256Of(d), n.s.self.Name) })
			}
			begun := time.Now()
			allOK(t, d, nodes[:most]...)
			if took := time.Since(begun); took > slow*15*time.Second {
				t.Errorf("took %v", took)
			}
			w.within(t, d, 1.1)
		})
	}
}

// TestCorruptUpstream: a home whose upstream gives a wrong byte has passed on what
// it got: the caches' digests find that out, and nobody bans another for it.
func TestCorruptUpstream(t *testing.T) {
	for _, size := range []int{1000, 100 << 10, 3 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) { corruptUpstream(t, size) })
	}
}

func corruptUpstream(t *testing.T, size int) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 4)
	d := w.add(size, 21)
	w.mu.Lock()
	w.content[d][size/3] ^= 1
	w.mu.Unlock()
	var fills []*testFill
	for _, n := range nodes {
		fills = append(fills, n.start(d))
	}
	for i, n := range nodes {
		if <-fills[i].done; fills[i].err == nil {
			t.Errorf("%s has wrong bytes", n.s.self.Node)
		}
		if bans := testutil.ToFloat64(n.s.metrics.bans.WithLabelValues(string(banDigest))); bans != 0 {
			t.Errorf("%s banned %v nodes", n.s.self.Name, bans)
		}
	}
}

// TestFullDiskAtHome: a home that cannot take the blob sends askers on.
func TestFullDiskAtHome(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 4)
	d := w.add(3<<20, 1)
	home, others := homeOf(d, nodes)
	home.refuse = errors.New("no room")
	allOK(t, d, others...)
	w.within(t, d, 1)
}

// TestRegistryDiesHalfway: nothing can be done, and that is said in time.
func TestRegistryDiesHalfway(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 4)
	d := w.add(4<<20, 1)
	w.failFrom = 2 << 20
	began := time.Now()
	for _, n := range nodes {
		n.start(d)
	}
	for _, n := range nodes {
		f := n.start(d)
		<-f.done
		if f.err == nil {
			t.Error("a blob came from nowhere")
		}
	}
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("failing took %v", took)
	}
	w.within(t, d, 2)
}

// TestPromised: a node whose only neighbour has the whole blob and turns it away for long,
// with the registry down, has it when it is its turn. Storms of 19 nodes at 20 Mbit/s from
// one failed so: the last nodes got nothing of the smallest layer for 8 s.
func TestPromised(t *testing.T) {
	t.Parallel()
	for _, home := range []bool{true, false} {
		t.Run(fmt.Sprintf("home=%t", home), func(t *testing.T) {
			t.Parallel()
			w := newTestWorld()
			nodes := w.nodes(t, 2)
			d := w.add(1<<20, 1)
			w.failFrom = 1
			w.fetched.Store(1)
			taker, others := homeOf(d, nodes)
			holder := others[0]
			if !home {
				taker, holder = holder, taker
			}
			holder.give(d)
			turn := func(slots int) {
				q := holder.s.uploads
				q.mu.Lock()
				defer q.mu.Unlock()
				q.max = slots
			}
			turn(0)
			f := taker.start(d)
			waitFor(t, func() bool {
				select {
				case <-f.done:
					return true
				default:
					return w.failed.Load() >= 2
				}
			})
			turn(uploadSlots)
			taker.wantOK(d)
		})
	}
}

// TestHomeIsToldTheSize: who asks a home says what the manifest says, for the home may
// have seen none and believe another member that says otherwise.
func TestHomeIsToldTheSize(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 2)
	const size = 1 << 20
	d := w.add(size, 1)
	home, others := homeOf(d, nodes)
	b := newMemBlob(d)
	want := Want{Digest: d, Registry: "registry.test", Repository: "app", Size: size}
	if err := others[0].s.Fetch(t.Context(), want, b, others[0].upstream(d)); err != nil {
		t.Fatal(err)
	}
	if got := home.told.Load(); got != size {
		t.Errorf("the home was told %d bytes", got)
	}
	for _, absurd := range []int64{-1, maxBlobSize + 1} {
		if got := (joinAsk{Size: absurd}).want(home.s.blob(blobID{key: sha256Of(d)})).Size; got != 0 {
			t.Errorf("%d becomes %d", absurd, got)
		}
	}
}

// TestHomeLiesAboutSize: a node that knows the size from a manifest does not
// believe a home that says otherwise.
func TestHomeLiesAboutSize(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 3)
	d := w.add(1<<20, 1)
	home, others := homeOf(d, nodes)
	home.s.blob(blobID{key: sha256Of(d)}).setSize(5 << 20)
	n := others[0]
	b := newMemBlob(d)
	if err := b.SetSize(1 << 20); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	err := n.s.Fetch(ctx, Want{Digest: d}, b, n.upstream(d))
	if err == nil {
		err = b.verify()
	}
	if err != nil {
		t.Errorf("fetch: %v", err)
	}
}

// TestDivergingViews: two nodes that do not know of each other are both home
// for a third and a fourth; that costs a copy, never an error.
func TestDivergingViews(t *testing.T) {
	w := newTestWorld()
	var nodes []*testNode
	for i := range 4 {
		nodes = append(nodes, w.node(t, fmt.Sprintf("node-%d", i)))
	}
	d := w.add(2<<20, 1)
	meet(nodes[0], nodes[2])
	meet(nodes[1], nodes[3])
	allOK(t, d, nodes...)
	meet(nodes...)
	e := w.add(2<<20, 2)
	allOK(t, e, nodes...)
	if got := w.fetched.Load(); got > 3*2<<20 {
		t.Errorf("upstream gave %d bytes for two blobs of 2 MiB and one split", got)
	}
}

// TestAsymmetricPartition: a sees b, b does not see a.
func TestAsymmetricPartition(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 4)
	blind := nodes[1]
	blind.s.roster.remove(nodes[0].s.self.Name)
	for seed := range uint64(4) {
		d := w.add(1<<20, seed)
		allOK(t, d, nodes...)
	}
	if got := w.fetched.Load(); got > 8<<20 {
		t.Errorf("upstream gave %d bytes of 4 MiB", got)
	}
}

// hostile speaks the protocol by hand, as a member that means harm.
func hostile(t *testing.T, target *testNode, as *testNode) net.Conn {
	t.Helper()
	c, err := tls.Dial("tcp", target.s.self.Addr, as.s.trust.config())
	if err != nil {
		t.Fatal(err)
	}
	h := hello{name: as.s.self.Name}
	if _, err := c.Write(h.append(nil)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestHostileFrames: what does not follow the protocol ends the link and bans
// its sender, and the log says so; it does not end the node, nor take its memory.
func TestHostileFrames(t *testing.T) {
	frames := map[string][]byte{
		"huge frame":      {byte(frameOpen), 0xff, 0xff, 0xff},
		"no such type":    {0xee, 0, 0, 1, 0},
		"short open":      appendFrame(nil, frameOpen, func(b []byte) []byte { return append(b, 1, 2, 3) }),
		"too many bits":   open{size: maxBlobSize, pieceSize: 1}.append(nil),
		"piece too far":   want{id: 1, piece: maxPieces}.append(nil),
		"runs too far":    have{runs: []run{{maxPieces - 1, 2}}}.append(nil),
		"data, no head":   appendFrame(nil, frameData, func(b []byte) []byte { return append(b, 1) }),
		"no such attempt": open{blob: blobID{attempt: lastAttempt + 1}}.append(nil),
		"short digests":   appendFrame(nil, frameDigests, func(b []byte) []byte { return append(b, make([]byte, 70)...) }),
		"short question":  appendFrame(nil, frameCall, func(b []byte) []byte { return append(b, 1) }),
	}
	for name, frame := range frames {
		t.Run(name, func(t *testing.T) {
			w := newTestWorld()
			var log logtest.Buffer
			nodes := w.nodes(t, 2, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
			c := hostile(t, nodes[0], nodes[1])
			if _, err := c.Write(frame); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			_, err := io.Copy(io.Discard, c)
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Error("the link stays")
			}
			waitFor(t, func() bool { return nodes[0].s.bans.has(nodes[1].s.self.Node) })
			if says := `level=WARN msg="peer banned" peer=node-1 reason=protocol`; !strings.Contains(log.String(), says) {
				t.Errorf("the log says nothing of it: %s", &log)
			}
			if nodes[0].s.connectable() != nil {
				t.Error("the node does not take links any more")
			}
		})
	}
}

// TestOpensOfWhatNobodyHas: a member that opens one blob after the other, none of which
// is here, takes no room from those who join.
func TestOpensOfWhatNobodyHas(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 3)
	d := w.add(1<<20, 1)
	home, others := homeOf(d, nodes)
	c := hostile(t, home, others[0])
	const opens = maxBlobs + 1000
	var frames []byte
	for i := range uint64(opens) {
		o := open{}
		binary.BigEndian.PutUint64(o.blob.key[:], i)
		frames = o.append(frames)
	}
	go c.Write(frames)
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	refusal := len(appendClose(nil, blobID{}))
	if n, err := io.CopyN(io.Discard, c, int64(opens*refusal)); err != nil {
		t.Fatalf("after %d bytes of refusals: %v", n, err)
	}
	others[1].start(d)
	others[1].wantOK(d)
	home.mu.Lock()
	defer home.mu.Unlock()
	if home.blobs[d] == nil {
		t.Error("the home sent away who joined")
	}
}

// TestManyNames: blobs that others only name go soon when there are many.
func TestManyNames(t *testing.T) {
	n := newTestWorld().node(t, "node")
	began := time.Now()
	for i := range uint64(maxBlobs) {
		var id blobID
		binary.BigEndian.PutUint64(id.key[:], i)
		if _, err := n.s.guestBlob(id); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, func() bool { return len(n.s.allBlobs()) <= maxBlobs/2 })
	if took := time.Since(began); took > idleLink/2 {
		t.Errorf("it took %v", took)
	}
}

// TestUsedWhileDropped: a blob that a fetch takes up is not dropped for having been idle
// when that was looked at.
func TestUsedWhileDropped(t *testing.T) {
	n := newTestWorld().node(t, "node")
	b := n.s.blob(blobID{key: key{1}})
	since := time.Now().Add(time.Millisecond)
	waitFor(t, func() bool { return time.Now().After(since) })
	n.s.blob(b.id)
	n.s.dropBlob(b, since)
	if n.s.knownBlob(b.id) != b {
		t.Error("a blob was dropped under a fetch")
	}
	n.s.dropBlob(b, time.Now().Add(time.Millisecond))
	if n.s.knownBlob(b.id) != nil {
		t.Error("an idle blob was kept")
	}
}

// TestOtherVersion: a node of another release is refused and not banned, and
// others are homes in its place.
func TestOtherVersion(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 2)
	c, err := tls.Dial("tcp", nodes[0].s.self.Addr, nodes[1].s.trust.config())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h := hello{name: nodes[1].s.self.Name}.append(nil)
	h[frameHeader] = wireVersion + 1
	if _, err := c.Write(append(h, "and what this node cannot know"...)); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if got, err := io.ReadAll(c); len(got) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("answered %q, %v", got, err)
	}
	if nodes[0].s.bans.has(nodes[1].s.self.Node) {
		t.Error("banned")
	}

	// Seen from the other side: whoever hangs up without a word is passed over.
	refusing, err := tls.Listen("tcp", "127.0.0.1:0", nodes[1].s.trust.config())
	if err != nil {
		t.Fatal(err)
	}
	defer refusing.Close()
	go func() {
		for {
			conn, err := refusing.Accept()
			if err != nil {
				return
			}
			_ = conn.(*tls.Conn).Handshake() // the dialer sees what became of it
			conn.Close()
		}
	}()
	other := nodes[1].s.self
	other.Addr = refusing.Addr().String()
	nodes[0].s.roster.set(other)
	d := w.add(1<<20, 0)
	for seed := uint64(1); ; seed++ {
		if home, _ := homeOf(d, nodes); home == nodes[1] {
			break
		}
		d = w.add(1<<20, seed)
	}
	nodes[0].start(d)
	nodes[0].wantOK(d)
	waitFor(t, func() bool { return nodes[0].s.roster.isDown(other.Name) }) // no longer the home
}

// TestMute: one that hung up without a word is passed over, unless its own link is here a
// moment later, as where both dialed at once.
func TestMute(t *testing.T) {
	n := newTestWorld().node(t, "node-0")
	other := Member{Name: startName("other", 1), Node: "other", Home: true}
	n.s.roster.set(other)
	l := fuzzLink(n.s, nil)
	time.AfterFunc(muteWait/2, func() {
		n.s.mu.Lock()
		defer n.s.mu.Unlock()
		n.s.links[other.Name] = l
	})
	n.s.mute(t.Context(), other.Name)
	if n.s.roster.isDown(other.Name) {
		t.Error("passed over although its link is here")
	}
	n.s.mu.Lock()
	delete(n.s.links, other.Name)
	n.s.mu.Unlock()
	n.s.mute(t.Context(), other.Name)
	if !n.s.roster.isDown(other.Name) {
		t.Error("not passed over")
	}
}

// connectable dials the node's own port.
func (s *Swarm) connectable() error {
	c, err := net.Dial("tcp", s.self.Addr)
	if err == nil {
		c.Close()
	}
	return err
}

// TestUnaskedData: bytes nobody asked for are dropped.
func TestUnaskedData(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 2)
	c := hostile(t, nodes[0], nodes[1])
	p := make([]byte, frameHeader+dataHead+1000)
	for i := range 100 {
		putDataHead(p, uint32(i), 0, 1000)
		if _, err := c.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	q := call{id: 7, method: methodPermit, body: marshal(permitAsk{Digest: digest.FromString("x").String()})}
	if _, err := c.Write(q.append(nil, frameCall)); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 4096)
	if n, err := c.Read(buf); err != nil || n == 0 {
		t.Errorf("the link does not answer any more: %v", err)
	}
}

// TestRollingRestart restarts every node, one after the other, while blobs are
// pulled.
func TestRollingRestart(t *testing.T) {
	w := newTestWorld()
	w.delay = time.Millisecond
	nodes := w.gossipCluster(t, 5)
	for i := range nodes {
		d := w.add(3<<20, uint64(i))
		for _, n := range nodes {
			n.start(d)
		}
		nodes[i].kill()
		rest := slices.Delete(slices.Clone(nodes), i, i+1)
		for _, n := range rest {
			n.wantOK(d)
		}
		nodes[i] = w.node(t, nodes[i].s.self.Node, gossiping(rest[0]))
		wantMembers(t, len(nodes), nodes[i])
	}
	if got := w.fetched.Load(); got > 2*5*3<<20 {
		t.Errorf("upstream gave %d bytes for 15 MiB", got)
	}
}

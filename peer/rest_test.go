package peer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

// restNode is a simNode with a store like the cache: it loses blobs, may have no
// room for them, and counts what is open.
type restNode struct {
	*simNode
	full   bool          // fills fail when they hear the size
	broken bool          // fills are not kept
	commit time.Duration // that a fill takes after its last byte
	disk   time.Duration // that a read of the store takes
	stall  atomic.Int64  // nanoseconds that the next piece of a peer takes to write
	open   atomic.Int64
	fills  sync.WaitGroup

	mu   sync.Mutex // guards the following
	fill *simBlob   // under way
	kept *simBlob
}

type restBlob struct {
	*simBlob
	n *restNode
}

func (b restBlob) ReadAt(p []byte, off int64) (int, error) {
	if b.n.disk > 0 {
		wait(context.Background(), b.n.disk)
	}
	return b.simBlob.ReadAt(p, off)
}

func (b restBlob) Close() error {
	b.n.open.Add(-1)
	return nil
}

func (n *restNode) Lookup(digest.Digest) (StoredBlob, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b := n.kept
	if b == nil && n.fill != nil && n.fill.Size() >= 0 {
		b = n.fill
	}
	if b == nil {
		return nil, false
	}
	n.open.Add(1)
	return restBlob{b, n}, true
}

func (n *restNode) Fill(_ context.Context, w Want) error {
	n.start(w)
	return nil
}

// start fills the blob, unless it is here or on its way.
func (n *restNode) start(w Want) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fill != nil || n.kept != nil {
		return
	}
	b := &simBlob{simImage: n.w.images[0], size: -1, changed: make(chan struct{})}
	n.fill = b
	n.fills.Go(func() {
		err := n.fetch(w, b)
		n.mu.Lock()
		defer n.mu.Unlock()
		n.fill = nil
		if err == nil && !n.broken {
			n.kept = b
		}
	})
}

func (n *restNode) fetch(w Want, b *simBlob) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	up := func(ctx context.Context, into Sink) error { return n.upstream(ctx, b, into) }
	err := n.s.Fetch(ctx, w, restFill{b, n, cancel}, up)
	wait(ctx, n.commit)
	return err
}

func (n *restNode) lose(d digest.Digest) {
	n.s.Withdraw(d)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.kept = nil
}

type restFill struct {
	*simBlob
	n    *restNode
	stop context.CancelFunc
}

func (f restFill) SetSize(size int64) error {
	if f.n.full {
		f.stop()
		return errors.New("no room")
	}
	return f.simBlob.SetSize(size)
}

// From and WritePiece end the fill's context with its last byte, as the cache does.
func (f restFill) From(node string) io.WriterAt { return restWriter{f, f.simBlob.From(node)} }

func (f restFill) WritePiece(node string, i int, p []byte, from, to [sha256.Size]byte) error {
	defer f.stopIfWhole()
	wait(context.Background(), time.Duration(f.n.stall.Swap(0)))
	return f.simBlob.WritePiece(node, i, p, from, to)
}

func (f restFill) stopIfWhole() {
	if _, _, missing := f.Missing(0); !missing {
		f.stop()
	}
}

type restWriter struct {
	f  restFill
	to io.WriterAt
}

func (w restWriter) WriteAt(p []byte, off int64) (int, error) {
	defer w.f.stopIfWhole()
	return w.to.WriteAt(p, off)
}

func restWorld(t *testing.T, c sim) (*simWorld, []*restNode) {
	w := c.emptyWorld()
	var nodes []*restNode
	for i := range c.nodes {
		n := &restNode{simNode: &simNode{w: w}}
		n.host = w.net.host(fmt.Sprintf("10.0.0.%d:1", i), w.rate, w.rate)
		s, err := New(Config{Name: fmt.Sprintf("node-%04d", i), Home: true, Store: n, Origin: n, Network: n.host, Seed: c.seed,
			PieceSize: func(int64) int64 { return simPiece }})
		if err != nil {
			t.Fatal(err)
		}
		s.chunk = simPiece / 4
		n.s = s
		nodes = append(nodes, n)
		w.nodes = append(w.nodes, n.simNode)
	}
	for _, n := range nodes {
		for _, o := range nodes {
			if o != n {
				n.s.roster.set(o.s.self)
			}
		}
	}
	return w, nodes
}

// running runs nodes until the function that it returns is called.
func running(t *testing.T, nodes []*restNode) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for _, n := range nodes {
		all.Go(func() {
			if err := n.s.Run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	synctest.Wait()
	return func() { cancel(); all.Wait() }
}

// bubbled is the goroutines in the bubble. runtime.NumGoroutine counts the runtime's own
// as well, which come and go.
func bubbled() int {
	stacks := make([]byte, 1<<20)
	return bytes.Count(stacks[:runtime.Stack(stacks, true)], []byte("synctest bubble"))
}

// TestNothingIsKept: while a home has no room, and others lose the blob and fetch it
// again, files are opened and links made; a while after the last fetch all
// of them are closed.
func TestNothingIsKept(t *testing.T) {
	for seed := range uint64(20) {
		bubble(t, func(t *testing.T) {
			c := baseSim(6, 40)
			c.seed, c.origin = seed, 100*mbit
			w, nodes := restWorld(t, c)
			stop := running(t, nodes)
			before := bubbled()
			for _, n := range nodes {
				n.commit, n.broken = time.Duration(w.rng.Int64N(int64(3*time.Second))), w.rng.IntN(4) == 0
				n.full = n.simNode == w.top() || w.rng.IntN(6) == 0
			}
			const busy = 90 * time.Second
			within := func(d time.Duration, f func()) { time.AfterFunc(time.Duration(w.rng.Int64N(int64(d))), f) }
			want := Want{Digest: w.images[0].digest, Registry: "registry.test", Repository: "app"}
			for _, n := range nodes {
				within(time.Second, func() { n.start(want) })
				for range 20 {
					within(busy, func() { n.start(want) })
					within(busy, func() { n.lose(w.images[0].digest) })
				}
			}
			wait(t.Context(), busy)
			for _, n := range nodes {
				n.fills.Wait()
			}
			wait(t.Context(), lease+2*idleLink+time.Minute) // settle takes no longer than that
			synctest.Wait()                                 // for what ticks at this very moment
			for _, n := range nodes {
				if files, links := n.open.Load(), len(n.s.allLinks()); files != 0 || links != 0 {
					t.Errorf("seed %d: %s has %d files open and %d links", seed, n.s.self.Node, files, links)
				}
			}
			if got := bubbled(); got > before {
				t.Errorf("seed %d: %d goroutines, %d before", seed, got, before)
			}
			stop()
		})
	}
}

// TestWholeIsOffered: who has got a blob gives it from then on, although the fill
// ends its context with the last byte, and need not read it again for that.
func TestWholeIsOffered(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, nodes := restWorld(t, baseSim(4, 20))
		stop := running(t, nodes)
		d := w.images[0].digest
		for _, n := range nodes {
			n.start(Want{Digest: d, Registry: "registry.test", Repository: "app"})
		}
		for _, n := range nodes {
			n.fills.Wait()
		}
		synctest.Wait()
		for _, n := range nodes {
			k, err := parseKey(d.String())
			if err != nil {
				t.Fatal(err)
			}
			if b := n.s.blob(blobID{key: k}); !b.whole() {
				t.Errorf("%s offers %d of 20 pieces", n.s.self.Node, b.offered())
			}
		}
		stop()
	})
}

// TestHashedInAnOutage: a node that still has to hash what it holds, for seconds, is
// waited for while the registry is down, whoever is the blob's home.
func TestHashedInAnOutage(t *testing.T) {
	for holder := range 2 {
		bubble(t, func(t *testing.T) {
			w, nodes := restWorld(t, baseSim(2, 20))
			stop := running(t, nodes)
			d := w.images[0].digest
			want := Want{Digest: d, Registry: "registry.test", Repository: "app"}
			n, other := nodes[holder], nodes[1-holder]
			n.start(want)
			n.fills.Wait()
			other.fills.Wait() // perhaps the home
			other.lose(d)
			wait(t.Context(), keepBlob+time.Minute)
			n.disk = 150 * time.Millisecond // 3 s for all
			w.seeded = true                 // the registry is down
			other.start(want)
			other.fills.Wait()
			if other.kept == nil {
				t.Errorf("%s did not get what %s has", other.s.self.Node, n.s.self.Node)
			}
			stop()
		})
	}
}

// TestSizeToldEarly: a member's word about the size counts as soon as it is vouched
// for, also if it told it before.
func TestSizeToldEarly(t *testing.T) {
	n := newTestWorld().node(t, "node-0")
	l := fuzzLink(n.s, nil)
	b := n.s.blob(blobID{key: key{1}})
	if err := b.begin(newMemBlob(b.d), func(error) {}, 0); err != nil {
		t.Fatal(err)
	}
	const size = 3 << 20
	whole := newBitmap(pieceCount(size, PieceSize(size)))
	whole.set(0)
	b.opened(l, open{blob: b.id, size: size, pieceSize: PieceSize(size), have: whole})
	b.adopt(l)
	if got := b.sized(); got != 0 {
		t.Errorf("size %d by hearsay", got)
	}
	b.vouch([]string{l.peer})
	if got := b.sized(); got != size {
		t.Errorf("size %d, want %d", got, size)
	}
}

// fullFill is a fill whose node has no room.
type fullFill struct{ *memBlob }

func (fullFill) SetSize(int64) error { return errors.New("no room") }

// TestWhoseSize: a member is warned of that says another size than is known, and none
// because this node's disk is full.
func TestWhoseSize(t *testing.T) {
	const size = 3 << 20
	known := newMemBlob(key{1}.digest())
	if err := known.SetSize(size + 1); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		fill Fill
		says string // and nothing else
	}{
		{"another size", known, `level=WARN msg="size of a blob differs"`},
		{"a full disk", fullFill{newMemBlob(known.d)}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var log bytes.Buffer
			n := newTestWorld().node(t, "node-0", func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
			n.kill() // nobody else writes to the log
			l := fuzzLink(n.s, nil)
			b := n.s.blob(blobID{key: key{1}})
			if err := b.begin(tt.fill, func(error) {}, 0); err != nil {
				t.Fatal(err)
			}
			b.vouch([]string{l.peer})
			b.opened(l, open{blob: b.id, size: size, pieceSize: PieceSize(size), have: bitmap{0x80, 0}})
			b.adopt(l)
			if got := log.String(); !strings.Contains(got, tt.says) || tt.says == "" && got != "" {
				t.Errorf("the log says %q, want %q", got, tt.says)
			}
		})
	}
}

// TestNoPieceBeforeTheSize: a blob that is fetched again is not asked of neighbours before the
// new fill knows its size, although the first fetch found that out: the fill takes nothing yet.
func TestNoPieceBeforeTheSize(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, nodes := restWorld(t, baseSim(1, 4))
		defer nodes[0].s.Close()
		l := fuzzLink(nodes[0].s, nil)
		b := nodes[0].s.blob(blobID{key: key{1}})
		const size = 4 * simPiece
		b.setSize(size)
		f := newMemBlob(b.d)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if err := b.begin(f, func(error) {}, 0); err != nil {
			t.Fatal(err)
		}
		go b.exchange(ctx, f)
		go b.watch(ctx, f)
		b.opened(l, open{blob: b.id, size: size, pieceSize: simPiece, have: bitmap{0xf0}})
		asked := func() int {
			synctest.Wait()
			b.mu.Lock()
			defer b.mu.Unlock()
			return b.flying
		}
		if n := asked(); n != 0 {
			t.Errorf("%d pieces are asked for before the size is known", n)
		}
		if err := f.SetSize(size); err != nil {
			t.Fatal(err)
		}
		if n := asked(); n == 0 {
			t.Error("no piece is asked for once it is")
		}
	})
}

// TestAlone: a node that reaches nobody asks nobody for a while, and for longer each
// time; one member that is reached ends that.
func TestAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, nodes := restWorld(t, baseSim(8, 4))
		r := nodes[0].s.roster
		homes := func() int { return len(r.homes(key{}, "", false)) }
		fail := func(n int) { // the first n of the others
			for _, n := range nodes[1 : 1+n] {
				r.unreachable(n.s.self.Name)
				r.unreachable(n.s.self.Name) // counts once
			}
		}
		want := func(n int, when string) {
			t.Helper()
			if got := homes(); got != n {
				t.Errorf("%s: %d homes, want %d", when, got, n)
			}
		}
		fail(mostStrikes - 1)
		want(3, "some cannot be reached") // the two that are left, and itself
		wait(t.Context(), keepDown+time.Second)
		fail(mostStrikes)
		want(1, "nobody was reached")
		if !r.isDown(nodes[7].s.self.Name) || r.isDown(r.self) {
			t.Error("all others should count as down")
		}
		wait(t.Context(), leastAlone)
		want(3, "after a while")
		fail(1)
		wait(t.Context(), leastAlone+time.Second)
		want(1, "once more, and twice as long")
		r.reachable(nodes[3].s.self.Name)
		want(3, "one is reached")
		fail(mostStrikes - 1)
		wait(t.Context(), strikeMemory+time.Second)
		r.unreachable(nodes[mostStrikes].s.self.Name)
		want(3, "long ago does not count")
		for _, n := range nodes {
			if err := n.s.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestComing: a fetch alone brings nothing; bytes do, or a home's word that it gets
// them, for some seconds each. A home's word is believed for so long, and passed on by
// whoever waits for it half as long, if it was the source's own.
func TestComing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, nodes := restWorld(t, baseSim(1, 4))
		s := nodes[0].s
		b := s.blob(blobID{key: key{1}})
		want := func(coming, moves, idle bool, when string) {
			t.Helper()
			o := b.outlook(time.Now())
			if got, _ := s.Coming(b.d); got != coming {
				t.Errorf("%s: coming %t", when, got)
			}
			if got := o.moves(); got != moves {
				t.Errorf("%s: moves %t", when, got)
			}
			if got := o.idle() > stallFetch; got != idle {
				t.Errorf("%s: quiet for %v", when, o.idle())
			}
		}
		want(false, false, true, "nobody fetches it")
		if err := b.begin(newMemBlob(b.d), func(error) {}, 0); err != nil {
			t.Fatal(err)
		}
		wait(t.Context(), stallFetch-time.Second)
		want(false, false, false, "begun")
		b.told(time.Now(), false)
		wait(t.Context(), stallFetch-time.Second)
		want(true, false, false, "a home's word")
		wait(t.Context(), 2*time.Second)
		want(false, false, true, "a word of long ago")
		b.moved(1)
		want(true, true, false, "a byte")
		wait(t.Context(), sourceTime-time.Second)
		b.told(time.Now(), true)
		want(true, true, false, "a source's word")
		wait(t.Context(), 2*time.Second)
		b.told(time.Now(), true)
		want(true, false, false, "a source's word, for long")
		wait(t.Context(), wordTime-sourceTime-2*time.Second)
		b.told(time.Now(), true)
		want(true, false, false, "not long enough")
		wait(t.Context(), 2*time.Second)
		b.told(time.Now(), true)
		want(true, false, true, "for too long")
		if !b.outlook(time.Now()).talks() {
			t.Error("it still talks")
		}
		s.roster.set(Member{Name: startName("other", 1), Node: "other"})
		b.authority = true
		wait(t.Context(), stallFetch+time.Second)
		want(false, false, true, "goes upstream")
		b.asks()
		wait(t.Context(), wordTime-time.Second)
		want(true, true, true, "upstream was asked")
		wait(t.Context(), 2*time.Second)
		want(false, false, true, "it does not answer")
		b.end(nil)
		want(false, false, true, "over")
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestNothingForEachOther pins that two nodes that have nothing of a blob stop
// talking of it, also when one of them gave up before the other answered.
func TestNothingForEachOther(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, nodes := restWorld(t, baseSim(2, 40))
		stop := running(t, nodes)
		k, err := parseKey(w.images[0].digest.String())
		if err != nil {
			t.Fatal(err)
		}
		other := nodes[1].s.self
		l, err := nodes[0].s.connect(t.Context(), &other)
		if err != nil {
			t.Fatal(err)
		}
		b := nodes[0].s.blob(blobID{key: k})
		b.meet(l)
		b.withdraw()
		wait(t.Context(), time.Second)
		before := w.net.frames.Load()
		const quiet = 10 * time.Second
		wait(t.Context(), quiet)
		if got, most := w.net.frames.Load()-before, int64(2*quiet/pingEvery); got > most {
			t.Errorf("%d frames in %v, want at most %d pings", got, quiet, most)
		}
		stop()
	})
}

// TestNoNeighbourByADeadLink: that a link ended is told once; a neighbour met
// after that would stay forever.
func TestNoNeighbourByADeadLink(t *testing.T) {
	n := newTestWorld().node(t, "node-0")
	l := fuzzLink(n.s, nil)
	b := n.s.blob(blobID{key: key{1}})
	if !b.meet(l) || !b.left(l) {
		t.Error("not a neighbour while the link lives")
	}
	l.close(errIdle)
	if b.meet(l) {
		t.Error("a neighbour by a link that has ended")
	}
}

// TestLimitedIsNotSilent: a node that waits for its upload budget goes on to say that it
// is there, and to answer.
func TestLimitedIsNotSilent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, nodes := restWorld(t, baseSim(2, 40))
		stop := running(t, nodes)
		home, other := nodes[0], nodes[1]
		if w.top() != home.simNode {
			home, other = other, home
		}
		home.s.limiter = rate.NewLimiter(rate.Every(time.Second/20), 4*home.s.chunk) // a chunk takes 6 s
		other.start(Want{Digest: w.images[0].digest, Registry: "registry.test", Repository: "app"})
		wait(t.Context(), time.Second)
		links := other.s.allLinks()
		if len(links) != 1 {
			t.Fatalf("%d links, want 1", len(links))
		}
		wait(t.Context(), 4*time.Second) // then a node that gets nothing turns to the registry itself
		if links[0].over() {
			t.Errorf("the link ended while the home waited for its budget: %v", links[0].closed)
		}
		member := home.s.self
		began := time.Now()
		_, err := other.s.askMember(t.Context(), &member, methodPermit, permitAsk{Digest: w.images[0].digest.String()}, &permitReply{})
		if took := time.Since(began); err != nil || took > time.Second {
			t.Errorf("the answer took %v: %v", took, err)
		}
		other.fills.Wait()
		stop()
	})
}

// TestBodyWithoutSize: a home that has waited in vain for a small blob's size, and gets
// the blob while it writes its answer, is believed what it gives.
func TestBodyWithoutSize(t *testing.T) {
	world := newTestWorld()
	n := world.node(t, "node-0")
	d := world.add(1000, 1)
	f := newMemBlob(d)
	l := fuzzLink(n.s, nil)
	x := &fetch{s: n.s, b: n.s.blob(blobID{key: sha256Of(d)}), f: f, w: Want{Digest: d}, tried: make(map[string]bool)}
	if err := x.accept(&Member{Name: l.peer, Node: l.node}, l, joinReply{Body: world.bytes(d)}); err != nil {
		t.Error(err)
	}
	if !x.whole() || f.verify() != nil {
		t.Error("the blob was not taken")
	}
	if n.s.bans.has(l.node) {
		t.Error("the home is banned")
	}
}

// TestGoneAndLeft: a neighbour's word that it has a piece no more, which comes while the
// neighbour is dropped, takes the piece off what neighbours have once. Else a home would
// take it for held by 65,535 of them, and not fetch it.
func TestGoneAndLeft(t *testing.T) {
	n := newTestWorld().node(t, "node-0")
	l := fuzzLink(n.s, nil)
	b := n.s.blob(blobID{key: key{1}})
	if err := b.begin(newMemBlob(b.d), func(error) {}, 0); err != nil || !b.setSize(3<<20) {
		t.Fatal(err)
	}
	has := newBitmap(b.n)
	has.set(0)
	b.opened(l, open{blob: b.id, size: b.size, pieceSize: b.pieceSize, have: has})
	b.mu.Lock()
	b.idleLocked(time.Now())
	asked := b.askOne(0, nil, time.Now())
	b.mu.Unlock()
	r := l.forget(1) // as the link's reader does before it tells the blob
	if !asked || r == nil || !b.left(l) {
		t.Fatal("nothing was asked of a neighbour")
	}
	b.failed(r, true)
	if start, end := b.lost(0, b.size); start != 0 || end != b.size {
		t.Errorf("lost [%d, %d), want everything: piece 0 is with %d neighbours", start, end, b.avail[0])
	}
}

// TestNotAloneWithOneGone: that the same few members cannot be reached, time and again, says
// nothing about the others.
func TestNotAloneWithOneGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRoster()
		r.self = startName("self", 1)
		others := []string{startName("other-0", 1), startName("other-1", 1), startName("other-2", 1)}
		for _, name := range append(others, r.self) {
			r.set(Member{Name: name, Node: name, Home: true})
		}
		for range 3 {
			for _, name := range others[:2] {
				if r.unreachable(name) > 0 {
					t.Fatal("alone, though the third was never tried")
				}
			}
			wait(t.Context(), keepDown+time.Second)
		}
		r.remove(others[0])
		if r.unreachable(others[1]) > 0 {
			t.Error("alone, though of two that are left only one was tried")
		}
		if r.unreachable(others[2]) == 0 {
			t.Error("not alone, though no member can be reached")
		}
	})
}

// TestAloneAmongNewcomers: that members join, as they do all the time where an autoscaler
// is at work, reaches nobody. Only where there are few may the newcomer be the one that was missed.
func TestAloneAmongNewcomers(t *testing.T) {
	for others, stays := range map[int]bool{1: false, mostStrikes - 1: false, 20: true} {
		r := newRoster()
		r.self = "self~00000000001"
		r.set(Member{Name: r.self, Node: "self", Home: true})
		for i := range others {
			name := fmt.Sprint("other-", i)
			r.set(Member{Name: startName(name, 1), Node: name, Home: true})
		}
		for i := range min(others, mostStrikes) {
			r.unreachable(startName(fmt.Sprint("other-", i), 1))
		}
		if got := r.homes(key{}, "", false); len(got) != 1 {
			t.Errorf("%d others, none of them reached: %d homes, want this node alone", others, len(got))
		}
		r.set(Member{Name: startName("newcomer", 1), Node: "newcomer", Home: true})
		if got := r.homes(key{}, "", false); len(got) == 1 != stays {
			t.Errorf("%d others and a newcomer: %d homes, alone is to be %t", others, len(got), stays)
		}
	}
}

// TestBodyAtOnce: who waits at a home for a small blob gets it as soon as it can be given, which is
// after it came: it has to be read back first.
func TestBodyAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, nodes := restWorld(t, baseSim(1, 1))
		n := nodes[0]
		b := n.s.blob(blobID{key: key{1}})
		b.setSize(100)
		whole := make(chan struct{})
		go func() {
			defer close(whole)
			ctx, cancel := context.WithTimeout(t.Context(), sizeWait)
			defer cancel()
			b.awaitWhole(ctx)
		}()
		synctest.Wait()
		began := time.Now()
		b.mu.Lock()
		b.gotLocked(0)
		b.mu.Unlock()
		synctest.Wait()
		if err := b.offer(b.lives(), 0, 1); err != nil {
			t.Fatal(err)
		}
		<-whole
		if took := time.Since(began); took > 0 {
			t.Errorf("it is given %v after it is whole", took)
		}
		if err := n.s.Close(); err != nil {
			t.Error(err)
		}
	})
}

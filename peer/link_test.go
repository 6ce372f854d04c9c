package peer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// testNode is a node on loopback with a store in memory.
type testNode struct {
	t     *testing.T
	s     *Swarm
	world *testWorld
	stop  context.CancelFunc
	gone  chan struct{}
	told  atomic.Int64 // the size, when it was last asked to Fill
	// cutOff: what it sends to the registry is lost, and it knows since when it tries.
	cutOff   atomic.Bool
	tries    atomic.Int64
	connects atomic.Int64
	connect  time.Duration // takes so long

	mu     sync.Mutex // guards the following
	blobs  map[digest.Digest]*memBlob
	fills  map[digest.Digest]*testFill
	wrong  map[digest.Digest]int                      // fills in a row whose bytes did not match
	delay  time.Duration                              // per chunk, besides the world's
	refuse error                                      // of Fill, as a node without room
	tag    func() (Descriptor, error)                 // what Resolve says; nil = the tag's own digest
	taint  func(d digest.Digest, p []byte, off int64) // changes what peers read
	admit  func(Want) error                           // nil = everybody
	keep   func(Copy) error                           // nil = nothing
	gives  func(registry string) bool                 // nil = to everybody
}

type testFill struct {
	done chan struct{}
	err  error
}

// testWorld is the registry and the content.
type testWorld struct {
	mu       sync.Mutex
	content  map[digest.Digest][]byte
	fetched  atomic.Int64
	requests atomic.Int64
	resolves atomic.Int64
	memories atomic.Int64  // questions about what a node remembers
	delay    time.Duration // per chunk
	failFrom int64         // bytes after which the registry is down; 0 = never
	failed   atomic.Int64  // fetches because of that
	corrupt  atomic.Int32  // so many of the next answers have a wrong byte in the middle
	chunk    int
}

func newTestWorld() *testWorld {
	return &testWorld{content: make(map[digest.Digest][]byte), chunk: 64 << 10}
}

func (w *testWorld) add(size int, seed uint64) digest.Digest {
	p := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = r.Read(p) // never fails
	d := digest.FromBytes(p)
	w.mu.Lock()
	w.content[d] = p
	w.mu.Unlock()
	return d
}

func (w *testWorld) bytes(d digest.Digest) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.content[d]
}

// memBlob is a blob in memory: store and fill in one, as strict as the cache.
type memBlob struct {
	mu      sync.Mutex
	d       digest.Digest
	taint   func(p []byte, off int64)
	size    int64
	data    []byte
	got     []int64 // contiguous bytes of each piece
	from    map[string]int64
	changed chan struct{}
	bad     error
	attempt int
	chain   []key // chaining values at the starts of pieces
}

func newMemBlob(d digest.Digest) *memBlob {
	return &memBlob{d: d, size: -1, changed: make(chan struct{}), from: make(map[string]int64)}
}

func (b *memBlob) pieceSize() int64 { return PieceSize(b.size) }

func (b *memBlob) Size() int64 { b.mu.Lock(); defer b.mu.Unlock(); return b.size }

func (b *memBlob) lenOf(i int) int64 { return min(b.pieceSize(), b.size-int64(i)*b.pieceSize()) }

func (b *memBlob) Has(i int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return i < len(b.got) && b.got[i] == b.lenOf(i)
}

func (b *memBlob) ReadAt(p []byte, off int64) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if off >= b.size {
		return 0, io.EOF
	}
	n := copy(p, b.data[off:])
	if b.taint != nil {
		b.taint(p[:n], off)
	}
	return n, nil
}

func (b *memBlob) Changed() <-chan struct{} { b.mu.Lock(); defer b.mu.Unlock(); return b.changed }
func (b *memBlob) Close() error             { return nil }

func (b *memBlob) SetSize(n int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size >= 0 && b.size != n {
		b.bad = fmt.Errorf("size %d, then %d", b.size, n)
		return b.bad
	}
	if b.size < 0 {
		b.size, b.data = n, make([]byte, n)
		b.got = make([]int64, pieceCount(n, PieceSize(n)))
		b.changeLocked()
	}
	return nil
}

func (b *memBlob) Attempt(n int) { b.mu.Lock(); defer b.mu.Unlock(); b.attempt = n }

func (b *memBlob) changeLocked() { close(b.changed); b.changed = make(chan struct{}) }

func (b *memBlob) Missing(off int64) (int64, int64, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size < 0 {
		return 0, 0, true
	}
	ps := b.pieceSize()
	for i := int(off / ps); i < len(b.got); i++ {
		if b.got[i] < b.lenOf(i) {
			start := int64(i)*ps + b.got[i]
			end := min(int64(i+1)*ps, b.size)
			for j := i + 1; j < len(b.got) && b.got[j] == 0; j++ {
				end = min(int64(j+1)*ps, b.size)
			}
			return start, end, true
		}
	}
	return 0, 0, false
}

func (b *memBlob) Wanted() int64 {
	start, _, ok := b.Missing(0)
	if !ok {
		return max(b.Size(), 0)
	}
	return start
}

// resume is a SHA-256 that took off bytes, whole blocks, and carries v.
func resume(v key, off int64) hash.Hash {
	h := sha256.New()
	state := append(append([]byte("sha\x03"), v[:]...), make([]byte, sha256.BlockSize)...)
	if err := h.(encoding.BinaryUnmarshaler).UnmarshalBinary(binary.BigEndian.AppendUint64(state, uint64(off))); err != nil {
		panic(err)
	}
	return h
}

func (b *memBlob) WritePiece(node string, i int, p []byte, from, to [sha256.Size]byte) error {
	if b.Size() < 0 {
		return errors.New("a piece before the size")
	}
	off := int64(i) * b.pieceSize()
	h := resume(from, off)
	h.Write(p)
	right := chainValue(h) == to
	if off+int64(len(p)) == b.Size() {
		right = digest.NewDigest(digest.SHA256, h) == b.d
	}
	if !right {
		return ErrWrongPiece
	}
	_, err := b.From(node).WriteAt(p, off)
	return err
}

func (b *memBlob) Chain(i int) (v [sha256.Size]byte, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.chain) == 0 {
		b.chain = []key{chainStart}
	}
	for n := len(b.chain); n <= i && n < len(b.got) && b.got[n-1] == b.lenOf(n-1); n++ {
		ps := b.pieceSize()
		h := resume(b.chain[n-1], int64(n-1)*ps)
		h.Write(b.data[int64(n-1)*ps : int64(n)*ps])
		b.chain = append(b.chain, chainValue(h))
	}
	if i >= len(b.chain) {
		return v, false
	}
	return b.chain[i], true
}

type memWriter struct {
	b    *memBlob
	from string
}

func (b *memBlob) From(node string) io.WriterAt { return memWriter{b, node} }

func (w memWriter) WriteAt(p []byte, off int64) (int, error) {
	b := w.b
	b.mu.Lock()
	defer b.mu.Unlock()
	ps := b.pieceSize()
	for done := 0; done < len(p); {
		at := off + int64(done)
		i := int(at / ps)
		if i >= len(b.got) {
			return done, errors.New("past the end")
		}
		in := at - int64(i)*ps
		n := min(int64(len(p)-done), b.lenOf(i)-in)
		if in > b.got[i] {
			return done, fmt.Errorf("gap: %d > %d in piece %d", in, b.got[i], i)
		}
		if end := in + n; end > b.got[i] {
			copy(b.data[int64(i)*ps+b.got[i]:int64(i)*ps+end], p[done+int(b.got[i]-in):])
			b.from[w.from] += end - b.got[i]
			b.got[i] = end
		}
		done += int(n)
	}
	b.changeLocked()
	return len(p), nil
}

func (b *memBlob) verify() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bad != nil {
		return b.bad
	}
	if digest.FromBytes(b.data) != b.d {
		return errWrongBlob
	}
	return nil
}

func (b *memBlob) sources() map[string]int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make(map[string]int64)
	for k, v := range b.from {
		out[k] = v
	}
	return out
}

var testKey = bytes.Repeat([]byte{7}, keySize)

func (w *testWorld) node(t *testing.T, name string, change ...func(*Config)) *testNode {
	n := &testNode{t: t, world: w, blobs: make(map[digest.Digest]*memBlob), fills: make(map[digest.Digest]*testFill), wrong: make(map[digest.Digest]int), gone: make(chan struct{})}
	cfg := Config{Name: name, Home: true, Keys: [][]byte{testKey}, Data: "127.0.0.1:0", Store: n, Origin: n, TagTTL: func(string) time.Duration { return time.Minute }}
	for _, f := range change {
		f(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.s = s
	ctx, cancel := context.WithCancel(context.Background())
	n.stop = cancel
	go func() {
		defer close(n.gone)
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(n.kill)
	waitFor(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.run != nil })
	return n
}

func (n *testNode) kill() { n.stop(); <-n.gone }

// waitFor waits for a condition that other goroutines bring about.
func waitFor(t testing.TB, ok func() bool) {
	t.Helper()
	const most = slow * time.Minute
	deadline := time.Now().Add(most)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("it did not come to pass within %v", most)
		}
		<-tick.C
	}
}

// meet makes nodes members of each other's rosters, as gossip would.
func meet(nodes ...*testNode) {
	for _, a := range nodes {
		for _, b := range nodes {
			if a != b {
				a.s.roster.set(b.s.self)
			}
		}
	}
}

func (w *testWorld) nodes(t *testing.T, count int, change ...func(*Config)) []*testNode {
	var out []*testNode
	for i := range count {
		out = append(out, w.node(t, fmt.Sprintf("node-%d", i), change...))
	}
	meet(out...)
	return out
}

func (n *testNode) Lookup(d digest.Digest) (StoredBlob, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, ok := n.blobs[d]
	if !ok {
		return nil, false
	}
	return b, true
}

func (n *testNode) Fill(_ context.Context, w Want) error {
	if n.refuse != nil {
		return n.refuse
	}
	n.told.Store(w.Size)
	n.start(w.Digest)
	return nil
}

func (n *testNode) Resolve(_ context.Context, r Reference) (Descriptor, error) {
	if r.Memory {
		n.world.memories.Add(1)
	} else {
		n.world.resolves.Add(1)
	}
	if n.tag != nil {
		return n.tag()
	}
	return Descriptor{Digest: digest.FromString(r.Tag), MediaType: "test", Size: 7}, nil
}

func (n *testNode) May(context.Context, Reference) (time.Duration, error) {
	n.world.resolves.Add(1)
	return mayAge, nil
}

// mayAge is how old upstream's word on who may read is in tests.
const mayAge = time.Minute

func (n *testNode) Admit(_ context.Context, w Want) error {
	if n.admit == nil {
		return nil
	}
	return n.admit(w)
}

func (n *testNode) Connect(ctx context.Context, _ string) error {
	n.connects.Add(1)
	if n.cutOff.Load() {
		<-ctx.Done()
	}
	wait(ctx, n.connect)
	return ctx.Err()
}

func (n *testNode) Reaches(string) bool {
	since := n.tries.Load()
	return since == 0 || time.Since(time.Unix(0, since)) < 1500*time.Millisecond
}

// Keep takes whatever it is asked to.
func (n *testNode) Keep(_ context.Context, c Copy) error {
	if n.keep == nil {
		return errors.New("keeps nothing")
	}
	return n.keep(c)
}

func (n *testNode) Gives(_ digest.Digest, registry string) bool {
	return n.gives == nil || n.gives(registry)
}

// give puts a whole blob into the node's store.
func (n *testNode) give(d digest.Digest) {
	b := newMemBlob(d)
	p := n.world.bytes(d)
	if err := b.SetSize(int64(len(p))); err != nil {
		n.t.Fatal(err)
	}
	if _, err := b.From("").WriteAt(p, 0); err != nil {
		n.t.Fatal(err)
	}
	n.mu.Lock()
	b.taint = n.taintOf(d)
	n.blobs[d] = b
	n.mu.Unlock()
}

// lose takes a whole blob from the node's store, once nobody reads it.
func (n *testNode) lose(d digest.Digest) {
	waitFor(n.t, func() (idle bool) {
		n.s.ifBlob(blobID{key: sha256Of(d)}, func(b *blob) {
			b.mu.Lock()
			defer b.mu.Unlock()
			idle = b.haveN == b.n && (b.src == nil || b.src.refs == 1)
		})
		return idle
	})
	n.mu.Lock()
	delete(n.fills, d)
	delete(n.blobs, d)
	n.mu.Unlock()
	n.s.Withdraw(d)
}

func (n *testNode) taintOf(d digest.Digest) func([]byte, int64) {
	if n.taint == nil {
		return nil
	}
	f := n.taint
	return func(p []byte, off int64) { f(d, p, off) }
}

// start fetches a blob as the node's cache would: once, and anew after its bytes
// were wrong.
func (n *testNode) start(d digest.Digest) *testFill {
	n.mu.Lock()
	defer n.mu.Unlock()
	if f, ok := n.fills[d]; ok {
		return f
	}
	f := &testFill{done: make(chan struct{})}
	b := newMemBlob(d)
	b.taint = n.taintOf(d)
	n.fills[d], n.blobs[d] = f, b
	b.attempt = n.wrong[d]
	w := Want{Digest: d, Registry: "registry.test", Repository: "app", Attempt: b.attempt}
	go func() {
		defer close(f.done)
		ctx, cancel := context.WithTimeout(context.Background(), slow*40*time.Second)
		defer cancel()
		f.err = n.s.Fetch(ctx, w, b, n.upstream(d))
		if errors.Is(f.err, ErrDistrusted) {
			f.err = n.upstream(d)(ctx, alone{b})
		}
		if f.err == nil {
			f.err = b.verify()
		}
		n.settled(d, b, f.err)
	}()
	return f
}

// alone is a fill that comes from upstream without a swarm.
type alone struct{ *memBlob }

// Asked tells nobody: nobody waits.
func (a alone) Asked() {}

func (a alone) WriteAt(p []byte, off int64) (int, error) { return a.From("").WriteAt(p, off) }

// settled counts mismatches, and throws away what did not match.
func (n *testNode) settled(d digest.Digest, b *memBlob, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case errors.Is(err, errWrongBlob), errors.Is(err, ErrVoid):
		n.wrong[d] = b.attempt + 1
		delete(n.fills, d)
		delete(n.blobs, d)
		n.s.Void(d, n.wrong[d])
	case err == nil:
		delete(n.wrong, d)
		n.s.Announce(d)
	}
}

var errRegistryDown = errors.New("registry is down")

func (n *testNode) upstream(d digest.Digest) Upstream {
	return func(ctx context.Context, into Sink) error {
		p := n.world.bytes(d)
		for n.cutOff.Load() && ctx.Err() == nil {
			n.tries.CompareAndSwap(0, time.Now().UnixNano())
			wait(ctx, 10*time.Millisecond)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		n.tries.Store(0)
		into.Asked()
		n.world.requests.Add(1)
		if n.world.corrupt.Add(-1) >= 0 {
			p = bytes.Clone(p)
			p[len(p)/2] ^= 1
		}
		if err := into.SetSize(int64(len(p))); err != nil {
			return err
		}
		for off := int64(0); ctx.Err() == nil; {
			start, end, ok := into.Missing(off)
			if !ok && off > 0 {
				off = 0
				continue
			}
			if !ok {
				return nil
			}
			end = min(end, start+int64(n.world.chunk))
			if n.world.failFrom > 0 && n.world.fetched.Load() >= n.world.failFrom {
				n.world.failed.Add(1)
				return errRegistryDown
			}
			if delay := n.world.delay + n.delay; delay > 0 {
				wait(ctx, delay)
			}
			n.world.fetched.Add(end - start)
			if _, err := into.WriteAt(p[start:end], start); err != nil {
				return err
			}
			off = end
		}
		return ctx.Err()
	}
}

func (n *testNode) wantOK(d digest.Digest) {
	n.t.Helper()
	f := n.start(d)
	<-f.done
	if f.err != nil {
		n.t.Errorf("%s: %v", n.s.self.Node, f.err)
	}
}

// homeOf puts the blob's first home first.
func homeOf(d digest.Digest, nodes []*testNode) (home *testNode, others []*testNode) {
	k, _ := parseKey(d.String())
	top := nodes[0].s.roster.view.Load().homes(k, "", false, nil)[0].Name
	for _, n := range nodes {
		if n.s.self.Name == top {
			home = n
		} else {
			others = append(others, n)
		}
	}
	return home, others
}

func TestLoopbackStorm(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 6)
	for _, size := range []int{100, 200 << 10, 5 << 20, 20<<20 + 17} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			d := w.add(size, uint64(size))
			before := w.fetched.Load()
			for _, n := range nodes {
				n.start(d)
			}
			for _, n := range nodes {
				n.wantOK(d)
			}
			if got := w.fetched.Load() - before; got != int64(size) {
				t.Errorf("upstream gave %d bytes of %d", got, size)
			}
		})
	}
}

// TestThroughput shows what one link carries.
func TestThroughput(t *testing.T) {
	mib := 256
	if testing.Short() {
		mib = 16
	}
	w := newTestWorld()
	nodes := w.nodes(t, 2)
	d := w.add(mib<<20, 1)
	home, others := homeOf(d, nodes)
	home.give(d)
	b := home.s.blob(blobID{key: sha256Of(d)})
	_ = home.s.seedFromStore(b) // hashes in the background
	waitFor(t, b.whole)
	began := time.Now()
	others[0].wantOK(d)
	took := time.Since(began)
	t.Logf("%d MiB in %v: %.0f MB/s with hashing, TLS and both ends", mib, took, float64(mib)*1.048576/took.Seconds())
}

func sha256Of(d digest.Digest) [sha256.Size]byte {
	k, _ := parseKey(d.String())
	return k
}

// TestSlowDiskIsNotSilence: a peer is not silent while this node, which writes a piece of his for
// seconds, does not listen.
func TestSlowDiskIsNotSilence(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, nodes := restWorld(t, baseSim(2, 20))
		stop := running(t, nodes)
		n, other := nodes[0], nodes[1]
		n.start(wantOf(w))
		n.fills.Wait()
		other.fills.Wait() // perhaps the home
		other.lose(w.images[0].digest)
		w.seeded = true // the registry is down
		other.stall.Store(int64(2 * silence))
		other.start(wantOf(w))
		began := time.Now()
		for time.Since(began) < 2*silence+time.Second {
			wait(t.Context(), tendEvery)
			if other.s.roster.isDown(n.s.self.Name) {
				t.Fatalf("a peer counts as gone after %v", time.Since(began))
			}
		}
		other.fills.Wait()
		if other.kept == nil {
			t.Error("the node did not get what the other one has")
		}
		stop()
	})
}

// TestAfterADeadLink: a link that has ended, and whose end is yet to be told, turns no other away.
func TestAfterADeadLink(t *testing.T) {
	s := newTestWorld().node(t, "node-0").s
	for _, peer := range []string{"a", "z"} { // whose links stay if both dial, and whose do not
		for _, dialed := range []bool{false, true} {
			old, l := fuzzLink(s, nil), fuzzLink(s, nil)
			old.peer, old.dialed, l.peer, l.dialed = peer, dialed, peer, !dialed
			if err := s.attach(old); err != nil {
				t.Fatal(err)
			}
			old.close(errSilent)
			if err := s.attach(l); err != nil {
				t.Errorf("a link of %s, dialed here: %v: %v", peer, l.dialed, err)
			}
			s.mu.Lock()
			delete(s.links, peer)
			s.mu.Unlock()
		}
	}
}

// TestBackBeforeTheEnd: a member that was silent and has made another link by the time that the end
// of the silent one is told is not passed over.
func TestBackBeforeTheEnd(t *testing.T) {
	s := newTestWorld().node(t, "node-0").s
	old, l := fuzzLink(s, nil), fuzzLink(s, nil)
	s.roster.set(Member{Name: l.peer, Node: l.node})
	if err := s.attach(old); err != nil {
		t.Fatal(err)
	}
	old.close(errSilent)
	if err := s.attach(l); err != nil {
		t.Fatal(err)
	}
	s.serve(old)
	if s.roster.isDown(l.peer) || s.linkWith(l.peer) != l {
		t.Error("a member with a link counts as unreachable")
	}
	s.serve(l)
}

// TestManyFallAtOnce: a node whose links with many members end at once, as when a zone fails, does
// not count as alone while it hears others: it would turn to the registry for all that it pulls,
// and so would each node that is left. If it hears nobody, the fault is its own.
func TestManyFallAtOnce(t *testing.T) {
	for _, c := range []struct {
		name  string
		heard time.Duration // ago, of the one link that has not ended
		alone bool
	}{
		{"a zone fails", pingEvery, false},
		{"this node's network fails", silence - tendEvery, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newTestWorld().node(t, "node-0", func(c *Config) { c.Home = false }).s
			linked := func(node string) *link {
				l := fuzzLink(s, nil)
				l.peer, l.node = startName(node, 1), node
				s.roster.set(Member{Name: l.peer, Node: l.node})
				if err := s.attach(l); err != nil {
					t.Fatal(err)
				}
				return l
			}
			var fallen []*link
			for i := range mostStrikes {
				fallen = append(fallen, linked(fmt.Sprint("fallen-", i)))
			}
			left := linked("left")
			for _, l := range fallen {
				l.close(errSilent)
			}
			for _, l := range fallen {
				left.heard.set(time.Now().Add(-c.heard))
				s.unreached(l.peer)
			}
			if alone := s.roster.isDown(left.peer); alone != c.alone {
				t.Errorf("alone: %v, want %v", alone, c.alone)
			}
			for _, l := range append(fallen, left) {
				l.close(errIdle)
				s.serve(l)
			}
		})
	}
}

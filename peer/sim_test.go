package peer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

// A simulation runs the real package, wire format, hashing and signatures
// included, on simNet under testing/synctest: time passes only when everybody
// waits. Choices follow from the seed; what does not is the order in which
// goroutines that are ready at the same instant run, so a seed replays a run in
// its course but not to the last message.
type sim struct {
	nodes   int
	pieces  int
	layers  []int // pieces of further blobs, fetched at the same time
	seed    uint64
	rate    float64       // bytes per second, both ways
	origin  float64       // of the registry
	latency time.Duration // one way
	zones   int
	scope   bool // each zone fetches its own copy
	fifo    bool // see simNet

	limit   float64       // bytes per second that each takes from others, 0 = none
	slow    float64       // share of nodes with a tenth of the rate
	die     float64       // share of nodes killed while they fetch
	stagger time.Duration // nodes start at random within it
	killTop time.Duration // the home is killed then
	seeded  bool          // one node, not the home, has the blob, and the registry is down
	passing float64       // share of nodes without room, which keep nothing
	pause   time.Duration // for so long their readers take no more than is ahead
}

const (
	simPiece     = 512 // bytes in memory
	simRealPiece = 256 << 10
)

type simResult struct {
	bound, slowest, median, slowestOfSlow time.Duration
	copies                                float64
	requests                              int64
	frames                                float64       // control writes per node
	control                               float64       // control bytes per node, relative to the blob
	sent                                  float64       // piece bytes sent, relative to what had to be
	home                                  time.Duration // the home had everything
	failed                                []error
	real                                  time.Duration
}

func (r simResult) String() string {
	return fmt.Sprintf("bound %v slowest %v = %.2fx median %.2fx copies %.3f (requests %d) control writes/node %.0f overhead %.2f%% sent %.3f home %.2fx failed %d cpu-time %v",
		r.bound.Round(time.Millisecond), r.slowest.Round(time.Millisecond), r.slowest.Seconds()/r.bound.Seconds(),
		r.median.Seconds()/r.bound.Seconds(), r.copies, r.requests, r.frames, 100*r.control, r.sent, r.home.Seconds()/r.bound.Seconds(), len(r.failed), r.real.Round(time.Millisecond))
}

// simWorld is the running simulation.
type simWorld struct {
	sim
	net     *simNet
	rng     *rand.Rand
	images  []*simImage // the first has pieces, the others are layers
	nodes   []*simNode
	src     *simHost // the registry
	fetched atomic.Int64
	asks    atomic.Int64
}

// simImage is what a blob's bytes are.
type simImage struct {
	content []byte
	digest  digest.Digest
	chain   []key // chaining values at the starts of pieces
}

func newSimImage(pieces int, rng *rand.Rand) *simImage {
	x := &simImage{content: make([]byte, pieces*simPiece-100)}
	for i := range x.content {
		x.content[i] = byte(rng.Uint32())
	}
	x.digest = digest.FromBytes(x.content)
	h := sha256.New()
	for off := 0; off < len(x.content); off += simPiece {
		x.chain = append(x.chain, chainValue(h))
		h.Write(x.content[off:min(off+simPiece, len(x.content))])
	}
	return x
}

type simNode struct {
	w      *simWorld
	s      *Swarm
	host   *simHost
	blobs  map[digest.Digest]*simBlob
	cancel context.CancelFunc
	slow   bool
	dies   bool
	seeded bool
	passes bool
	once   sync.Once
	took   time.Duration // of all blobs
	done   sync.WaitGroup
	began  time.Time
	after  time.Duration // it starts so much later
	late   time.Duration // from the fourth second on, who asks this node as home is answered after it

	mu  sync.Mutex // guards err
	err error
}

// simBlob is a node's store and fill in one; the bytes are shared by all nodes
// and only whether a node has them is its own.
type simBlob struct {
	*simImage
	once    sync.Once // starts the fetch
	mu      sync.Mutex
	size    int64
	got     []int // bytes of each piece
	prefix  int   // pieces from the start
	changed chan struct{}
}

func (b *simBlob) Size() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.size
}

func (b *simBlob) Has(i int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.hasLocked(i)
}

func (b *simBlob) hasLocked(i int) bool {
	return i < len(b.got) && b.got[i] == int(min(simPiece, b.size-int64(i)*simPiece))
}

func (b *simBlob) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(b.content)) {
		return 0, io.EOF
	}
	return copy(p, b.content[off:]), nil
}

func (b *simBlob) Changed() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changed
}

func (b *simBlob) changeLocked() {
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *simBlob) SetSize(n int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size >= 0 {
		if b.size != n {
			return errors.New("size differs")
		}
		return nil
	}
	b.size, b.got = n, make([]int, (n+simPiece-1)/simPiece)
	b.changeLocked()
	return nil
}

func (b *simBlob) Missing(off int64) (int64, int64, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size < 0 {
		return 0, 0, true
	}
	if off >= b.size {
		return 0, 0, false
	}
	for i := int(off / simPiece); i < len(b.got); i++ {
		if !b.hasLocked(i) {
			j := i
			for j < len(b.got) && !b.hasLocked(j) {
				j++
			}
			return max(off, int64(i)*simPiece), min(int64(j)*simPiece, b.size), true
		}
	}
	return 0, 0, false
}

// Wanted is the position of a reader that takes every byte as it comes.
func (b *simBlob) Wanted() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.got {
		if !b.hasLocked(i) {
			return int64(i) * simPiece
		}
	}
	return max(b.size, 0)
}

type simWriter struct{ b *simBlob }

func (w simWriter) WriteAt(p []byte, off int64) (int, error) {
	b := w.b
	if string(b.content[off:off+int64(len(p))]) != string(p) {
		return 0, errors.New("wrong bytes were taken")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	i := int(off / simPiece)
	if i >= len(b.got) {
		return 0, errors.New("written before the size is known")
	}
	b.got[i] = max(b.got[i], int(off)%simPiece+len(p))
	b.changeLocked()
	return len(p), nil
}

func (b *simBlob) Attempt(int) {}

func (b *simBlob) From(string) io.WriterAt { return simWriter{b} }

func (b *simBlob) WritePiece(_ string, i int, p []byte, from, to [sha256.Size]byte) error {
	if from != b.chain[i] || i+1 < len(b.chain) && to != b.chain[i+1] {
		return ErrWrongPiece
	}
	_, err := simWriter{b}.WriteAt(p, int64(i)*simPiece)
	return err
}

func (b *simBlob) Chain(i int) (v [sha256.Size]byte, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.prefix < len(b.got) && b.hasLocked(b.prefix) {
		b.prefix++
	}
	if i > b.prefix || i >= len(b.chain) {
		return v, false
	}
	return b.chain[i], true
}
func (b *simBlob) Close() error { return nil }

// passedBlob is a simBlob on a node that keeps nothing, whose reader takes every byte as
// it comes.
type passedBlob struct {
	*simBlob
	until time.Time // nothing is read before
}

func (b passedBlob) Wanted() int64 {
	if time.Now().Before(b.until) {
		return 0
	}
	return b.simBlob.Wanted()
}

const simAhead = 16 * simPiece

func (b passedBlob) Has(int) bool                                 { return false }
func (b passedBlob) Chain(int) (v [sha256.Size]byte, passed bool) { return v, false }

func (b passedBlob) WritePiece(node string, i int, p []byte, from, to [sha256.Size]byte) error {
	if off := int64(i) * simPiece; off >= b.Wanted()+simAhead {
		return fmt.Errorf("piece at %d is too early, %d is wanted", off, b.Wanted())
	}
	return b.simBlob.WritePiece(node, i, p, from, to)
}

func (n *simNode) Lookup(d digest.Digest) (StoredBlob, bool) {
	b, ok := n.blobs[d]
	return b, ok && !n.passes
}

func (n *simNode) Fill(_ context.Context, w Want) error {
	if n.passes {
		return errors.New("no room")
	}
	n.start(w)
	return nil
}

func (n *simNode) Resolve(context.Context, Reference) (Descriptor, error) {
	return Descriptor{}, errors.ErrUnsupported
}

func (n *simNode) May(context.Context, Reference) (time.Duration, error) {
	return 0, errors.ErrUnsupported
}

func (n *simNode) Reaches(string) bool                   { return true }
func (n *simNode) Connect(context.Context, string) error { return nil }
func (n *simNode) Keep(context.Context, Copy) error      { return errors.ErrUnsupported }
func (n *simNode) Gives(digest.Digest, string) bool      { return true }

func (n *simNode) Admit(ctx context.Context, _ Want) error {
	if time.Since(n.began) > 4*time.Second {
		wait(ctx, n.late)
	}
	return nil
}

// start fetches a blob, once, as the node's cache would.
func (n *simNode) start(w Want) {
	if n.seeded {
		return
	}
	n.once.Do(func() { n.began = time.Now() })
	b := n.blobs[w.Digest]
	b.once.Do(func() {
		go func() {
			defer n.done.Done()
			f := Fill(b)
			if n.passes {
				f, w.Ahead = passedBlob{b, time.Now().Add(n.w.pause)}, simAhead
				time.AfterFunc(n.w.pause, func() {
					b.mu.Lock()
					defer b.mu.Unlock()
					b.changeLocked()
				})
			}
			up := func(ctx context.Context, into Sink) error { return n.upstream(ctx, b, into) }
			err := n.s.Fetch(context.Background(), w, f, up)
			n.mu.Lock()
			defer n.mu.Unlock()
			n.err = errors.Join(n.err, err)
			n.took = time.Since(n.began)
		}()
	})
}

// upstream is a registry client: one stream, bounded by the registry's uplink
// and the node's downlink.
func (n *simNode) upstream(ctx context.Context, b *simBlob, into Sink) error {
	n.w.asks.Add(1)
	if n.w.seeded {
		return errors.New("registry is down")
	}
	wait(ctx, 2*n.w.latency)
	if err := into.SetSize(int64(len(b.content))); err != nil {
		return err
	}
	for off := int64(0); ctx.Err() == nil; {
		start, end, ok := into.Missing(off)
		if !ok {
			return nil
		}
		end = min(end, start+simPiece/2)
		cost := (end - start) * n.w.net.scale
		n.w.fetched.Add(cost)
		wait(ctx, max(n.w.src.charge(cost, true), n.host.charge(cost, false)))
		if _, err := into.WriteAt(b.content[start:end], start); err != nil {
			return err
		}
		off = end
	}
	return ctx.Err()
}

// run simulates a storm, a smaller one with -short: at full size all of them take ten minutes
// and 7.5 GB under the race detector.
func (c sim) run(t testing.TB) (r simResult) {
	if testing.Short() {
		c.nodes, c.pieces = min(c.nodes, 16), min(c.pieces, 128)
	}
	began := time.Now()
	bubble(t.(*testing.T), func(t *testing.T) { r = c.world(t).play(t) })
	r.real = time.Since(began)
	return r
}

// emptyWorld has a registry and no nodes yet.
func (c sim) emptyWorld() *simWorld {
	w := &simWorld{sim: c, net: newSimNet(c.latency, simRealPiece/simPiece), rng: rand.New(rand.NewPCG(c.seed, 1))}
	w.net.fifo = c.fifo
	for _, n := range append([]int{c.pieces}, c.layers...) {
		w.images = append(w.images, newSimImage(n, w.rng))
	}
	w.src = w.net.host("registry", c.origin, c.origin)
	return w
}

func (c sim) world(t *testing.T) *simWorld {
	w := c.emptyWorld()
	var members []Member
	for i := range c.nodes {
		n := w.node(t, i)
		w.nodes = append(w.nodes, n)
		members = append(members, n.s.self)
	}
	if c.seeded {
		w.plant()
	}
	for i, n := range w.nodes {
		others := append(slices.Clone(members[:i]), members[i+1:]...)
		n.s.roster.set(others...)
		n.s.index.joined(others)
		if c.seeded {
			for i, x := range w.images {
				k, _ := parseKey(x.digest.String())
				n.s.index.heard(appendMessage(nil, memberID(members[c.nodes-1].Name), uint32(i), []op{{true, prefixOf(k)}}))
			}
		}
	}
	return w
}

// plant gives one node the blob, and tells all others by what the index would
// say.
func (w *simWorld) plant() {
	n := w.nodes[len(w.nodes)-1]
	for _, b := range n.blobs {
		_ = b.SetSize(int64(len(b.content))) // the first is never refused
		for i := range b.got {
			b.got[i] = int(min(simPiece, b.size-int64(i)*simPiece))
		}
		n.done.Done()
	}
	n.seeded, n.passes = true, false
}

func (w *simWorld) node(t *testing.T, i int) *simNode {
	n := &simNode{w: w, blobs: make(map[digest.Digest]*simBlob)}
	for _, x := range w.images {
		n.blobs[x.digest] = &simBlob{simImage: x, size: -1, changed: make(chan struct{})}
		n.done.Add(1)
	}
	rate := w.rate
	if n.slow = w.rng.Float64() < w.slow; n.slow {
		rate /= 10
	}
	n.dies = w.rng.Float64() < w.die
	n.passes = w.passing > 0 && w.rng.Float64() < w.passing // what was drawn before is not to change
	n.host = w.net.host(fmt.Sprintf("10.0.%d.%d:1", i>>8, i&255), rate, rate)
	s, err := New(Config{Name: fmt.Sprintf("node-%04d", i), Zone: fmt.Sprint("z", i%max(w.zones, 1)), ZoneScope: w.scope, Home: !n.slow,
		Store: n, Origin: n, Network: n.host, Seed: w.seed, MaxDownloadBytesPerSecond: int64(w.limit / float64(w.net.scale)),
		PieceSize: func(int64) int64 { return simPiece }})
	if err != nil {
		t.Fatal(err)
	}
	s.chunk = simPiece / 4
	n.s = s
	return n
}

func (w *simWorld) play(t *testing.T) simResult {
	var running sync.WaitGroup
	for _, n := range w.nodes {
		ctx, cancel := context.WithCancel(t.Context())
		n.cancel = cancel
		running.Go(func() {
			if err := n.s.Run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	synctest.Wait()
	expect := time.Duration(w.size() / w.rate * float64(time.Second))
	for _, n := range w.nodes {
		start := time.Duration(0)
		if w.stagger > 0 {
			start = time.Duration(w.rng.Int64N(int64(w.stagger)))
		}
		start += n.after
		die := start + time.Duration(w.rng.Float64()*float64(expect))
		for _, x := range w.images {
			time.AfterFunc(start, func() { n.start(Want{Digest: x.digest, Registry: "registry.test", Repository: "app"}) })
		}
		if n.dies {
			time.AfterFunc(die, func() { n.cancel(); n.host.kill() })
		}
	}
	if w.killTop > 0 {
		top := w.top()
		top.dies = true
		time.AfterFunc(w.killTop, func() { top.cancel(); top.host.kill() })
	}
	for _, n := range w.nodes {
		n.done.Wait()
	}
	r := w.result()
	for _, n := range w.nodes {
		n.cancel()
	}
	running.Wait()
	return r
}

// top is the blob's first home.
func (w *simWorld) top() *simNode {
	k, _ := parseKey(w.images[0].digest.String())
	name := w.nodes[0].s.roster.view.Load().homes(k, "", false, nil)[0].Name
	i := slices.IndexFunc(w.nodes, func(n *simNode) bool { return n.s.self.Name == name })
	return w.nodes[i]
}

// size of all blobs, as charged.
func (w *simWorld) size() (bytes float64) {
	for _, x := range w.images {
		bytes += float64((len(x.content) + simPiece - 1) / simPiece * simRealPiece)
	}
	return bytes
}

// crossed is how many copies went from one zone to another.
func (w *simWorld) crossed() float64 {
	zones := make(map[string]string)
	for _, n := range w.nodes {
		zones[n.s.self.Node] = n.s.self.Zone
	}
	var bytes int64
	for _, n := range w.nodes {
		for from, moved := range n.s.Status().Traffic {
			if zones[from] != n.s.self.Zone {
				bytes += moved.Received
			}
		}
	}
	return float64(bytes*w.net.scale) / w.size()
}

func (w *simWorld) result() simResult {
	size := w.size()
	var fast, slow []time.Duration
	var failed []error
	sumUp, minDown, n := 0.0, w.rate, 0.0
	for _, x := range w.nodes {
		switch {
		case x.dies:
			continue
		case x.seeded:
		case x.err != nil:
			failed = append(failed, fmt.Errorf("%s: %w", x.s.self.Node, x.err))
		case x.slow:
			slow = append(slow, x.took)
		default:
			fast = append(fast, x.took)
		}
		if !x.seeded {
			n++
		}
		sumUp += x.host.up
	}
	source := w.origin
	if w.seeded {
		source = 0
	}
	bound := max(size/w.origin, size/minDown, n*size/(source+sumUp))
	slices.Sort(fast)
	if len(fast) == 0 {
		return simResult{failed: failed}
	}
	r := simResult{
		bound: time.Duration(bound * float64(time.Second)), slowest: fast[len(fast)-1], median: fast[len(fast)/2],
		copies: float64(w.fetched.Load()) / size, requests: w.asks.Load(), failed: failed,
		frames:  float64(w.net.frames.Load()) / n,
		sent:    float64(w.net.data.Load()) / (n - 1) / size,
		home:    w.top().took,
		control: float64(w.net.control.Load()) / n / size,
	}
	if len(slow) > 0 {
		r.slowestOfSlow = slices.Max(slow)
	}
	return r
}

const mbit = 1e6 / 8

func baseSim(nodes, pieces int) sim {
	return sim{nodes: nodes, pieces: pieces, seed: 1, rate: 200 * mbit, origin: 1000 * mbit, latency: 250 * time.Microsecond, zones: 1}
}

// slowSim is a storm on links of 20 Mbit/s.
func slowSim(nodes int) sim {
	c := baseSim(nodes, 153)
	c.rate, c.origin = 20*mbit, 100*mbit
	return c
}

// TestStorm holds P2 and P3: for storms that are cheap to simulate, and for those of a thousand
// nodes, which take minutes of processor, in `make sim`.
func TestStorm(t *testing.T) {
	storms := []sim{baseSim(10, 256), baseSim(100, 256)}
	if os.Getenv("LARDER_SIM") != "" {
		storms = append(storms, baseSim(1000, 256), baseSim(1000, 1024))
	}
	for _, c := range storms {
		t.Run(fmt.Sprintf("%d nodes, %d pieces", c.nodes, c.pieces), func(t *testing.T) {
			r := c.run(t)
			t.Log(r)
			if r.copies > 1.02 || len(r.failed) > 0 || r.slowest.Seconds() > 1.4*r.bound.Seconds() {
				t.Errorf("%v %v", r, r.failed)
			}
		})
	}
}

// TestStormOfTroubles simulates what goes wrong in a real cluster, one at a
// time.
func TestStormOfTroubles(t *testing.T) {
	cases := []struct {
		name   string
		change func(*sim)
		ratio  float64
		copies float64
	}{
		{"one seed, registry down", func(c *sim) { c.seeded = true }, 1.7, 0},
		{"staggered starts", func(c *sim) { c.stagger = 2 * time.Second }, 2.2, 1.02},
		{"10 % slow nodes", func(c *sim) { c.slow = 0.1 }, 1.4, 1.05},
		{"20 % die", func(c *sim) { c.die = 0.2 }, 2, 2},
		{"home killed", func(c *sim) { c.killTop = time.Second }, 2, 1.2},
		{"uplinks without fair queues", func(c *sim) { c.fifo = true }, 1.5, 1.02},
		{"three layers", func(c *sim) { c.layers = []int{40, 5} }, 1.4, 1.02},
		{"30 % keep nothing", func(c *sim) { c.passing = 0.3 }, 3, 1.02},
		{"30 % keep nothing, and read nothing for 20 s", func(c *sim) { c.passing, c.pause = 0.3, 20*time.Second }, 19, 1.02},
		{"30 % keep nothing, one seed", func(c *sim) { c.passing, c.seeded = 0.3, true }, 3, 0},
		{"four zones", func(c *sim) { c.zones = 4 }, 2.5, 1.02},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := baseSim(40, 128)
			c.change(&s)
			r := s.run(t)
			t.Log(r, r.slowestOfSlow)
			if r.copies > c.copies || len(r.failed) > 0 || r.slowest.Seconds() > c.ratio*r.bound.Seconds() {
				t.Errorf("%v %v", r, r.failed)
			}
		})
	}
}

// TestZones: what crosses the lines between four zones is little more than a copy for each of
// the other three. Where each fetches its own copy nothing crosses them, whoever has the blob,
// as long as the registry gives it. If it does not, not each node goes over there.
func TestZones(t *testing.T) {
	cases := []struct {
		name          string
		scope, held   bool
		down          bool
		ratio         float64
		copies, cross float64
	}{
		{"one copy", false, false, false, 2.5, 1, 4},
		{"a copy a zone", true, false, false, 1.5, 4, 0},
		{"a copy a zone, one has it", true, true, false, 1.5, 3, 0},
		{"a copy a zone, one has it, registry down", true, true, true, 8, 0, 6},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := baseSim(40, 128)
				s.zones, s.scope, s.seeded = 4, c.scope, c.held
				w := s.world(t)
				w.seeded = c.down
				r := w.play(t)
				crossed := w.crossed()
				t.Log(r, crossed)
				if r.copies > c.copies+0.02 || crossed > c.cross+0.1 || len(r.failed) > 0 || r.slowest.Seconds() > c.ratio*r.bound.Seconds() {
					t.Errorf("%.2f copies crossed; %v %v", crossed, r, r.failed)
				}
			})
		})
	}
}

// TestZonesHomeHolds: who alone has the blob, and is its zone's first home but none of the
// cluster's, gives little more than a copy to its zone and one to all others.
// It gave seven copies: nothing but itself linked its zone with the others.
func TestZonesHomeHolds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := baseSim(40, 128)
		c.zones, c.seeded = 4, true
		homeOfZoneOnly := func(w *simWorld) bool {
			s, k := w.nodes[c.nodes-1].s, sha256Of(w.images[0].digest)
			return s.roster.homes(k, s.self.Zone, true)[0].Name == s.self.Name &&
				!slices.Contains(namesOf(s.roster.homes(k, "", false)), s.self.Name)
		}
		w := c.world(t)
		for ; !homeOfZoneOnly(w); w = c.world(t) {
			c.seed++
		}
		r := w.play(t)
		crossed := w.crossed()
		t.Log(r, crossed)
		if crossed > 6 || len(r.failed) > 0 || r.requests > 0 || r.slowest.Seconds() > 4*r.bound.Seconds() {
			t.Errorf("%.2f copies crossed; %v %v", crossed, r, r.failed)
		}
	})
}

// TestDownloadLimit: nodes that may take a piece in eight seconds from others wait for that,
// and nobody takes the others for gone, or turns to the registry.
func TestDownloadLimit(t *testing.T) {
	s := baseSim(10, 8)
	s.seeded, s.limit = true, simRealPiece/8.0
	r := s.run(t)
	t.Log(r)
	if least := 7 * 8 * time.Second; len(r.failed) > 0 || r.requests > 0 || r.slowest < least || r.slowest > least*5/4 {
		t.Errorf("%v %v", r, r.failed)
	}
}

// TestSlowLinks: where all take long for each piece, nobody asks twice for what is on its
// way, the homes' links bring first what they alone get, and no uplink is idle because all
// want the same pieces. 1.22 x the bound were seen; 1.28 to 1.31 where the piece was
// chosen before the neighbour, and 7 % of the bytes sent in vain before that.
func TestSlowLinks(t *testing.T) {
	s := slowSim(20)
	s.layers, s.fifo = []int{46, 6}, true
	r := s.run(t)
	t.Log(r)
	if r.sent > 1.02 || r.copies > 1.02 || len(r.failed) > 0 || r.slowest.Seconds() > 1.26*r.bound.Seconds() {
		t.Errorf("%v %v", r, r.failed)
	}
}

// TestLateAnswer: a home whose answers take longer than anybody waits, while its pieces
// come, is no reason to go upstream as the next one.
func TestLateAnswer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := slowSim(20).world(t)
		w.top().late = askHomeFor + time.Second
		r := w.play(t)
		t.Log(r)
		if r.requests != 1 || r.copies > 1.02 || len(r.failed) > 0 {
			t.Errorf("%v %v", r, r.failed)
		}
	})
}

// TestHomeSlowGoingOut: a home that may give no more than 1 MB/s, where all others have
// 100, gives each piece once, and they pass it on: in 10.5 s at best.
func TestHomeSlowGoingOut(t *testing.T) {
	const most = 1e6
	bubble(t, func(t *testing.T) {
		c := baseSim(20, 40)
		c.rate = 800 * mbit
		w := c.world(t)
		top := w.top()
		top.s.limiter = rate.NewLimiter(rate.Limit(most/w.net.scale), 4*top.s.chunk)
		r := w.play(t)
		t.Log(r)
		gave := 0.0
		for _, moved := range top.s.Status().Traffic {
			gave += float64(moved.Sent*w.net.scale) / w.size()
		}
		if gave > 2.3 || r.slowest.Seconds() > 2.3*w.size()/most || r.copies > 1.02 || len(r.failed) > 0 {
			t.Errorf("the home gave %.2f copies; %v %v", gave, r, r.failed)
		}
	})
}

// TestPermitIsKnown: where the home gives next to nothing, all learn soon that another node
// was let fetch the blob, and do not take its pieces in vain until they do. 8 to 9 s were
// seen, and 15 s where they learned it when they renewed their leases.
func TestPermitIsKnown(t *testing.T) {
	bubble(t, func(t *testing.T) {
		c := baseSim(30, 200)
		c.rate, c.origin = 800*mbit, 800*mbit
		w := c.world(t)
		top := w.top()
		top.s.limiter = rate.NewLimiter(rate.Every(time.Second/500), 4*top.s.chunk)
		r := w.play(t)
		t.Log(r)
		if r.slowest > 12*time.Second || r.sent > 1.1 || r.copies > 2 || len(r.failed) > 0 {
			t.Errorf("%v %v", r, r.failed)
		}
	})
}

// oneByOne is a cluster of two zones whose nodes pull one after the other, and the last of
// them, which knows who holds the blob.
func oneByOne(t *testing.T, seed uint64) (w *simWorld, last *simNode) {
	c := baseSim(6, 128)
	c.zones, c.seed = 2, seed
	w = c.world(t)
	last = w.nodes[c.nodes-1]
	for i, n := range w.nodes {
		n.after = time.Duration(i) * 4 * time.Second
		if n != last {
			last.s.index.heard(appendMessage(nil, memberID(n.s.self.Name), 0, []op{{true, prefixOf(sha256Of(w.images[0].digest))}}))
		}
	}
	return w, last
}

// TestZoneAfterZone: who pulls alone what nodes of its own zone hold takes next to nothing
// from other zones. It was a third of it, with two local holders.
func TestZoneAfterZone(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w, last := oneByOne(t, seed)
				r := w.play(t)
				far := 0.0
				for _, n := range w.nodes {
					if n.s.self.Zone != last.s.self.Zone {
						far += float64(last.s.Status().Traffic[n.s.self.Node].Received*w.net.scale) / w.size()
					}
				}
				t.Log(r, w.crossed())
				if far > 0.25 || len(r.failed) > 0 {
					t.Errorf("%.2f of the blob came from the other zone; %v %v", far, r, r.failed)
				}
			})
		})
	}
}

// TestSlowInTheZone: other zones are not spared if the holders of one's own are slow. At 1 MB/s
// each these would need 17 s.
func TestSlowInTheZone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, last := oneByOne(t, 3)
		for _, n := range w.nodes {
			if n != last && n.s.self.Zone == last.s.self.Zone {
				n.host.up = 1e6
			}
		}
		r := w.play(t)
		t.Log(r, last.took)
		if last.took > 4*time.Second || len(r.failed) > 0 {
			t.Errorf("it took %v; %v %v", last.took, r, r.failed)
		}
	})
}

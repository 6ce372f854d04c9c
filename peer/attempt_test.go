package peer

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/time/rate"
)

// pullAll is one pull on each node; err of those that failed.
func pullAll(d digest.Digest, nodes []*testNode) (failed []error) {
	var fills []*testFill
	for _, n := range nodes {
		fills = append(fills, n.start(d))
	}
	for _, f := range fills {
		if <-f.done; f.err != nil {
			failed = append(failed, f.err)
		}
	}
	return failed
}

func nobodyBanned(t *testing.T, nodes []*testNode) {
	t.Helper()
	for _, n := range nodes {
		for _, why := range []banReason{banDigest, banProtocol} {
			if bans := testutil.ToFloat64(n.s.metrics.bans.WithLabelValues(string(why))); bans != 0 {
				t.Errorf("%s banned %v nodes: %s", n.s.self.Node, bans, why)
			}
		}
	}
}

// TestCorruptOnce: one wrong byte of the registry costs it one copy more, however
// many nodes have got it.
func TestCorruptOnce(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 6)
	d := w.add(8<<20, 1)
	pulled := nodes[:5]
	w.corrupt.Store(1)
	for _, err := range pullAll(d, pulled) {
		if !errors.Is(err, errWrongBlob) && !errors.Is(err, ErrVoid) {
			t.Errorf("first pull: %v", err)
		}
	}
	for round := 2; ; round++ { // some may still have been in the first attempt
		failed := pullAll(d, pulled)
		if len(failed) == 0 {
			break
		}
		if round == 3 {
			t.Fatalf("pull %d: %v", round, errors.Join(failed...))
		}
	}
	allOK(t, d, nodes...) // one has heard nothing of all this
	w.within(t, d, 2)
	nobodyBanned(t, nodes)
}

// TestCorruptAfterItWasRight: what a node remembers of a blob that it has lost since is not
// held against the bytes that the registry gives now: nobody is banned for those, neither
// a home by who knows better, nor one that knows better itself.
func TestCorruptAfterItWasRight(t *testing.T) {
	for _, name := range []string{"the home had it", "another node had it"} {
		t.Run(name, func(t *testing.T) {
			w := newTestWorld()
			w.delay = 10 * time.Millisecond
			nodes := w.nodes(t, 4)
			d := w.add(3<<20, 1)
			home, others := homeOf(d, nodes)
			home.wantOK(d)
			if name != "the home had it" {
				others[0].wantOK(d)
				others[0].lose(d)
			}
			home.lose(d)
			w.corrupt.Store(1)
			for round := 1; len(pullAll(d, nodes)) > 0; round++ {
				if round == 3 {
					t.Fatal("the blob does not come")
				}
			}
			nobodyBanned(t, nodes)
		})
	}
}

// TestCorruptAlways: where each answer of the registry is wrong, each pull ends, with
// an error, and once the swarm has tried twice each node asks for itself.
func TestCorruptAlways(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 4)
	d := w.add(3<<20, 2)
	w.corrupt.Store(1 << 20)
	for round := range 4 {
		before := w.fetched.Load()
		if failed := pullAll(d, nodes); len(failed) != len(nodes) {
			t.Errorf("pull %d: %d nodes have wrong bytes", round, len(nodes)-len(failed))
		}
		if copies := float64(w.fetched.Load()-before) / (3 << 20); copies > float64(2+len(nodes)) {
			t.Errorf("pull %d cost %.2f copies", round, copies)
		}
	}
	nobodyBanned(t, nodes)
	w.corrupt.Store(0)
	allOK(t, d, nodes...)
}

// TestHomeHeardNothing: who has got wrong bytes alone asks a home that has not, and
// gets the blob by it.
func TestHomeHeardNothing(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 4)
	d := w.add(3<<20, 3)
	home, others := homeOf(d, nodes)
	others[0].wrong[d] = 1
	others[0].wantOK(d)
	if got := home.s.attempt(sha256Of(d), 0); got != 1 {
		t.Errorf("the home is in attempt %d", got)
	}
	allOK(t, d, nodes...)
	w.within(t, d, 1)
	nobodyBanned(t, nodes)
}

// TestHomeWasRight: a home that holds the blob gives it in either attempt.
func TestHomeWasRight(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 4)
	d := w.add(3<<20, 4)
	home, others := homeOf(d, nodes)
	home.wantOK(d)
	others[0].wrong[d] = 1
	allOK(t, d, others...)
	if home.s.knowsVoid(blobID{key: sha256Of(d)}) {
		t.Error("what the home has is void")
	}
	w.within(t, d, 1)
	nobodyBanned(t, nodes)
}

// TestHomeIsAboutToFindOut: a home that is still in the attempt that was wrong ends it
// before it begins the next.
func TestHomeIsAboutToFindOut(t *testing.T) {
	w := newTestWorld()
	w.delay = 5 * time.Millisecond // 64 KiB each: a copy takes 0.24 s
	nodes := w.nodes(t, 3)
	d := w.add(3<<20, 5)
	home, others := homeOf(d, nodes)
	w.corrupt.Store(1)
	first := home.start(d)
	home.held(d, 2)
	others[0].wrong[d] = 1
	others[0].wantOK(d)
	if <-first.done; !errors.Is(first.err, errWrongBlob) {
		t.Errorf("first pull: %v", first.err)
	}
	allOK(t, d, nodes...)
	w.within(t, d, 2)
	nobodyBanned(t, nodes)
}

// TestHomeTakesTooLong: whoever cannot wait for the end of the home's attempt gets the
// blob by another.
func TestHomeTakesTooLong(t *testing.T) {
	w := newTestWorld()
	w.delay = 60 * time.Millisecond // a copy takes 3 s
	nodes := w.nodes(t, 3)
	d := w.add(3<<20, 6)
	home, others := homeOf(d, nodes)
	first := home.start(d)
	home.held(d, 2)
	others[0].wrong[d] = 1
	others[0].wantOK(d)
	if <-first.done; first.err != nil {
		t.Errorf("first pull: %v", first.err)
	}
	w.within(t, d, 2)
	nobodyBanned(t, nodes)
}

// TestBehindTheHome: who has bytes of an attempt that is void at the home is told
// so, and not only after the last byte; the next fill is of the next attempt.
func TestBehindTheHome(t *testing.T) {
	w := newTestWorld()
	slow := func(c *Config) { c.MaxUploadBytesPerSecond = 1 << 20 }
	nodes := w.nodes(t, 4, slow)
	d := w.add(8<<20, 7)
	home, others := homeOf(d, nodes)
	home.give(d)
	asker := others[0]
	f := asker.start(d)
	asker.held(d, 3)
	home.s.blob(blobID{key: sha256Of(d)}).annul()
	if <-f.done; !errors.Is(f.err, ErrVoid) {
		t.Fatalf("fetch: %v", f.err)
	}
	asker.wantOK(d)
	if w.requests.Load() != 0 {
		t.Error("upstream was asked for a blob that the home has")
	}
	nobodyBanned(t, nodes)
}

// TestNoMoreAttempts: nodes that hold bytes of the last attempt, which was wrong too, pass
// no more of them on, and blame nobody who has got the right ones.
func TestNoMoreAttempts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newTestWorld()
		w.delay = 20 * time.Millisecond // 64 KiB each: a copy takes 2.6 s
		nodes := w.wayCluster(t, 6)
		for _, n := range nodes {
			n.s.limiter = rate.NewLimiter(1<<20, 4*chunkSize)
		}
		d := w.add(8<<20, 1)
		home, others := homeOf(d, nodes)
		w.corrupt.Store(2)
		for attempt := range lastAttempt + 1 {
			f := home.start(d)
			if attempt == lastAttempt {
				home.held(d, 1)
				for _, n := range others {
					n.start(d)
				}
			}
			if <-f.done; !errors.Is(f.err, errWrongBlob) {
				t.Fatalf("attempt %d at the home: %v", attempt, f.err)
			}
		}
		for _, err := range pullAll(d, others) {
			if !errors.Is(err, ErrVoid) {
				t.Errorf("first pull: %v", err)
			}
		}
		allOK(t, d, nodes...)
		nobodyBanned(t, nodes)
	})
}

// TestHolderKnowsBetter: where the homes have heard nothing and the registry is
// down, a blob that is left of the second attempt is still given.
func TestHolderKnowsBetter(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 4)
	d := w.add(3<<20, 8)
	_, others := homeOf(d, nodes)
	holder := others[2]
	holder.wrong[d] = 1
	id := blobID{key: sha256Of(d)}
	holder.give(d)
	holder.s.blob(id).annul()
	b := holder.s.blob(blobID{id.key, 1})
	_ = holder.s.seedFromStore(b) // hashes in the background
	waitFor(t, b.whole)
	for _, n := range nodes {
		n.s.index.joined([]Member{holder.s.self})
		n.s.index.heard(appendMessage(nil, memberID(holder.s.self.Name), 0, []op{{true, prefixOf(id.key)}}))
	}
	w.failFrom = 1
	w.fetched.Store(1)
	allOK(t, d, slices.DeleteFunc(slices.Clone(nodes), func(n *testNode) bool { return n == holder })...)
	nobodyBanned(t, nodes)
}

// TestAttemptsOthersClaim: a member can say that the first attempt was wrong, and
// nothing beyond that.
func TestAttemptsOthersClaim(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 2)
	d := w.add(1000, 9)
	l, err := nodes[0].s.connect(t.Context(), &nodes[1].s.self)
	if err != nil {
		t.Fatal(err)
	}
	for _, attempt := range []int{-1, lastAttempt + 1, 256} {
		for method, q := range map[byte]any{
			methodJoin:   joinAsk{Digest: d.String(), Registry: "registry.test", Attempt: attempt},
			methodPermit: permitAsk{Digest: d.String(), Attempt: attempt},
		} {
			var reply struct{}
			if err := l.ask(t.Context(), method, q, &reply); err == nil {
				t.Errorf("method %d was answered for attempt %d", method, attempt)
			}
		}
	}
	if n := len(nodes[1].s.allBlobs()); n != 0 {
		t.Errorf("%d blobs were made", n)
	}
}

// TestVoidIsRemembered: that an attempt is void is known as long as the next is.
func TestVoidIsRemembered(t *testing.T) {
	n := newTestWorld().node(t, "node-0")
	void, next := n.s.blob(blobID{key{1}, 0}), n.s.blob(blobID{key{1}, 1})
	void.annul()
	later := time.Now().Add(keepBlob + time.Minute)
	n.s.tendBlob(void, later, keepBlob)
	if got := n.s.attempt(key{1}, 0); got != 1 {
		t.Errorf("attempt %d while the next lives", got)
	}
	n.s.tendBlob(next, later, keepBlob)
	n.s.tendBlob(void, later, keepBlob)
	if got := n.s.attempt(key{1}, 0); got != 0 {
		t.Errorf("attempt %d after both are forgotten", got)
	}
}

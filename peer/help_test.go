package peer

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

func TestHelpPays(t *testing.T) {
	const before = 1_000_000 // bytes a second
	for name, tc := range map[string]struct {
		ours, theirs int64 // bytes within 10 s
		want         bool
	}{
		"a way of its own":                  {10_000_000, 9_000_000, true},
		"nearly nothing":                    {10_000_000, 1_000_000, false},
		"the same uplink":                   {5_000_000, 5_000_000, false},
		"an uplink that others use too":     {7_500_000, 7_500_000, false},
		"the home's link brings its pieces": {1_000_000, 90_000_000, true},
		"nothing comes any more":            {0, 0, false},
	} {
		h := helper{before: before, ours: 77, theirs: 5}
		if got := h.pays(77+tc.ours, 5+tc.theirs, 10*time.Second); got != tc.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

// TestWantsHelp: which member is let help, and until when.
func TestWantsHelp(t *testing.T) {
	const second, rate = time.Second, 1 << 20
	bubble(t, func(t *testing.T) {
		_, nodes := restWorld(t, baseSim(1, 4))
		s := nodes[0].s
		s.cfg.PieceSize = PieceSize
		for i := range 8 {
			name := fmt.Sprint("member-", i)
			s.roster.set(Member{Name: name, Node: name, Home: true})
		}
		k := key{1}
		b := s.blob(blobID{key: k})
		var homes []string
		for _, m := range s.roster.view.Load().homes(k, "", false, nil) {
			homes = append(homes, m.Name)
		}
		var stranger string
		for _, m := range s.roster.view.Load().all {
			if !s.mayBeHome(k, m.Name) {
				stranger = m.Name
			}
		}
		want := func(want bool, member, registry string, fetched int64, when string) {
			t.Helper()
			if got := b.wantsHelp(member, registry, fetched); (got > 0) != want || want && (got < rate*9/10 || got > rate*11/10) {
				t.Errorf("%s: %d", when, got)
			}
		}
		runs := func(d time.Duration, pace int) { // this node gets bytes
			for range int(d / second) {
				time.Sleep(second) // of the bubble
				b.moved(pace)
			}
		}
		if err := b.begin(newMemBlob(b.d), func(error) {}, 0); err != nil {
			t.Fatal(err)
		}
		if !b.setSize(1 << 30) {
			t.Fatal("no pieces")
		}
		b.moved(rate)
		runs(10*second, rate)
		want(false, homes[1], "r", 0, "somebody else gets it")
		b.goesUp(true)
		b.home.join(homes[1], "", b.newRand())
		want(false, stranger, "r", 0, "no home, and another one takes part")
		b.home.forget(homes[1])
		want(true, stranger, "r", 0, "no home, and none takes part")
		if !slices.Contains(b.vouched(nil), stranger) {
			t.Error("what it fetches does not count")
		}
		runs(5*second, rate)
		want(false, stranger, "r", 0, "it did not begin")
		want(true, homes[1], "r", 0, "slow")
		want(false, homes[2], "r", 0, "there is a helper")
		runs(5*second, rate)
		want(true, homes[1], "r", 20*rate, "it brings much")
		runs(5*second, rate)
		want(true, homes[1], "r", 40*rate, "it still does")
		runs(2*renewEvery+second, rate)
		want(true, homes[2], "r", 0, "the first one is gone")
		runs(5*second, rate/2)
		want(false, homes[2], "r", 5*rate/2, "they share an uplink")
		want(false, homes[1], "r", 0, "it was in vain")
		want(true, homes[1], "r2", 0, "of another registry")
		b.helper = helper{}
		time.Sleep(helpMemory + second) // of the bubble
		b.upSince, b.upBytes = time.Now().Add(-10*second), 10*rate
		want(true, homes[1], "r", 0, "long after")
		b.missing = 4 * rate / int(b.pieceSize)
		want(false, homes[1], "r", 0, "nearly done")
		b.missing, b.upBytes = b.n, 10*helpLeast/2
		want(false, homes[1], "r", 0, "a poor uplink")
		b.end(nil)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestFarSink: the far end first, then what comes before it, until near the home.
func TestFarSink(t *testing.T) {
	const mib = 1 << 20
	world := newTestWorld()
	n := world.node(t, "node")
	b := n.s.blob(blobID{key: key{1}})
	f := newMemBlob(b.d)
	if err := f.SetSize(64 * mib); err != nil || !b.setSize(64*mib) {
		t.Fatal(err)
	}
	x := &fetch{s: n.s, b: b, f: f}
	far := func(h *helping) *farSink {
		return &farSink{sink: sink{x: x, w: f.From("")}, h: h, near: 2 * mib, from: f.Size(), run: mib}
	}
	k := far(&helping{})
	edge, last := int64(64*mib), int64(0)
	for {
		start, end, ok := k.Missing(0)
		if !ok {
			break
		}
		if end != edge || k.Wanted() != start || end-start > max(2*last, mib) {
			t.Fatalf("run [%d, %d) after one of %d, to be joined at %d", start, end, last, edge)
		}
		if _, _, ok := k.Missing(end); ok {
			t.Fatal("there is something behind the end")
		}
		if _, err := k.WriteAt(make([]byte, end-start), start); err != nil {
			t.Fatal(err)
		}
		edge, last = start, end-start
	}
	if edge > 2*mib || edge < mib/2 || k.h.bytes.Load() != 64*mib-edge {
		t.Errorf("it ended at %d, with %d bytes", edge, k.h.bytes.Load())
	}

	f = newMemBlob(b.d)
	if err := f.SetSize(64 * mib); err != nil {
		t.Fatal(err)
	}
	x.f = f
	k = far(&helping{})
	start, end, ok := k.Missing(0)
	k.h.enough.Store(true)
	if again, _, still := k.Missing(0); !ok || !still || again != start {
		t.Error("the run under way was given up")
	}
	if _, err := k.WriteAt(make([]byte, end-start), start); err != nil {
		t.Fatal(err)
	}
	if _, _, ok := k.Missing(0); ok {
		t.Error("there is another run")
	}
}

package peer

import (
	"errors"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/time/rate"
)

// keepers counts who was asked to keep what.
type keepers struct {
	mu    sync.Mutex
	asked []string
	heard []Copy
}

// watch has nodes keep what they are asked to, or answer with an error.
func (k *keepers) watch(nodes []*testNode, answer func(n *testNode) error) {
	for _, n := range nodes {
		n.keep = func(c Copy) error {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.asked, k.heard = append(k.asked, n.s.self.Node), append(k.heard, c)
			return answer(n)
		}
	}
}

func (k *keepers) take() (asked []string, heard []Copy) {
	k.mu.Lock()
	defer k.mu.Unlock()
	asked, heard = k.asked, k.heard
	k.asked, k.heard = nil, nil
	return asked, heard
}

// rankOf lists nodes in the order in which they are homes of k.
func rankOf(k key, nodes []*testNode) (out []string) {
	r, passed := nodes[0].s.roster, map[string]bool{}
	for m := r.homeBut(k, "", false, passed); m != nil; m = r.homeBut(k, "", false, passed) {
		passed[m.Name] = true
		out = append(out, m.Node)
	}
	return out
}

// TestKeep: those are asked that would be asked for the blob, in that order, but not who
// has it; a no makes it the next one's turn, and the asker's credential goes to nobody.
func TestKeep(t *testing.T) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 5)
	var k keepers
	yes := func(*testNode) error { return nil }
	d := w.add(1000, 1)
	id, err := parseKey(d.String())
	if err != nil {
		t.Fatal(err)
	}
	blob := Copy{Want: Want{Digest: d, Registry: "r", Repository: "a", Size: 1000, Authorization: "Basic secret"}, Idle: time.Hour}
	tag := Copy{Want: Want{Registry: "r", Repository: "a"}, Tag: "v1", Stands: Descriptor{Digest: d}}
	for name, c := range map[string]Copy{"blob": blob, "tag": tag} {
		home := id
		if c.Tag != "" {
			home = Reference{Registry: "r", Repository: "a"}.home()
		}
		rank := rankOf(home, nodes)
		asker := nodes[slices.IndexFunc(nodes, func(n *testNode) bool { return n.s.self.Node == rank[0] })]
		others := rank[1:]

		k.watch(nodes, yes)
		if n, err := asker.s.Keep(t.Context(), c, 2); n != 2 || err != nil {
			t.Errorf("%s: %d, %v", name, n, err)
		}
		asked, heard := k.take()
		if !slices.Equal(asked, others[:2]) {
			t.Errorf("%s: %v were asked, want %v", name, asked, others[:2])
		}
		for _, got := range heard {
			want := c
			want.Authorization = ""
			if got != want {
				t.Errorf("%s: %#v was asked for, want %#v", name, got, want)
			}
		}

		k.watch(nodes, func(n *testNode) error {
			switch n.s.self.Node {
			case others[0]:
				return ErrBusy
			case others[1]:
				return &Refusal{Status: http.StatusUnauthorized, Text: "it is private"}
			}
			return nil
		})
		if n, err := asker.s.Keep(t.Context(), c, 1); n != 1 || err != nil {
			t.Errorf("%s, two say no: %d, %v", name, n, err)
		}
		if asked, _ := k.take(); !slices.Equal(asked, others[:3]) {
			t.Errorf("%s, two say no: %v were asked, want %v", name, asked, others[:3])
		}
		k.watch(nodes, func(*testNode) error { return &Refusal{Status: http.StatusUnauthorized, Text: "it is private"} })
		n, err := asker.s.Keep(t.Context(), c, 1)
		if no, ok := errors.AsType[*Refusal](err); n != 0 || !ok || no.Status != http.StatusUnauthorized {
			t.Errorf("%s, all say no: %d, %v", name, n, err)
		}
		k.take()

		k.watch(nodes, func(*testNode) error { return &Refusal{Status: http.StatusNotFound, Text: "gone"} })
		if n, err := asker.s.Keep(t.Context(), c, 1); n != 0 || !missing(err) {
			t.Errorf("%s, gone: %d, %v", name, n, err)
		}
		if asked, _ := k.take(); len(asked) != 1 {
			t.Errorf("%s, gone: %v were asked", name, asked)
		}

		holder := nodes[slices.IndexFunc(nodes, func(n *testNode) bool { return n.s.self.Node == others[0] })]
		holder.s.Announce(c.Entry())
		waitFor(t, func() bool { return asker.s.Others(c) == 1 })
		k.watch(nodes, yes)
		if n, err := asker.s.Keep(t.Context(), c, 1); n != 1 || err != nil {
			t.Errorf("%s, one has it: %d, %v", name, n, err)
		}
		if n, err := asker.s.Keep(t.Context(), c, 2); n != 2 || err != nil {
			t.Errorf("%s, one has it: %d, %v", name, n, err)
		}
		if asked, _ := k.take(); !slices.Equal(asked, others[1:2]) {
			t.Errorf("%s, one has it: %v were asked, want %v", name, asked, others[1:2])
		}
	}
}

// TestKeepAlone: where nobody else may be asked, that is said at once.
func TestKeepAlone(t *testing.T) {
	w := newTestWorld()
	d := w.add(1000, 1)
	c := Copy{Want: Want{Digest: d, Registry: "r", Repository: "a"}}
	alone := w.node(t, "alone", gossiping())
	if n, err := alone.s.Keep(t.Context(), c, 1); n != 0 || !errors.Is(err, ErrNobody) {
		t.Errorf("alone: %d, %v", n, err)
	}
	guest := w.node(t, "guest", gossiping(alone), func(c *Config) { c.Home = false })
	waitFor(t, func() bool { return alone.members() == 2 })
	if n, err := alone.s.Keep(t.Context(), c, 1); n != 0 || !errors.Is(err, ErrNobody) {
		t.Errorf("beside one that is no home: %d, %v", n, err)
	}
	guest.s.Announce(d)
	waitFor(t, func() bool { return alone.s.Others(c) == 1 })
	if n, err := alone.s.Keep(t.Context(), c, 1); n != 1 || err != nil {
		t.Errorf("that has it: %d, %v", n, err)
	}
}

// TestKeepInZone: where each zone is to do without the others, only its own nodes count.
func TestKeepInZone(t *testing.T) {
	w := newTestWorld()
	in := func(zone string) func(*Config) { return func(c *Config) { c.Zone, c.ZoneScope = zone, true } }
	asker := w.node(t, "asker", gossiping(), in("here"))
	near := w.node(t, "near", gossiping(asker), in("here"))
	far := w.node(t, "far", gossiping(asker), in("there"))
	waitFor(t, func() bool { return asker.members() == 3 })
	d := w.add(1000, 1)
	c := Copy{Want: Want{Digest: d, Registry: "r", Repository: "a"}}
	far.s.Announce(d)
	waitFor(t, func() bool { return len(asker.s.Holders(d)) == 1 })
	if n := asker.s.Others(c); n != 0 {
		t.Errorf("%d others", n)
	}
	var k keepers
	k.watch([]*testNode{near, far}, func(*testNode) error { return nil })
	if n, err := asker.s.Keep(t.Context(), c, 2); n != 1 || !errors.Is(err, ErrNobody) {
		t.Errorf("%d, %v", n, err)
	}
	if asked, _ := k.take(); !slices.Equal(asked, []string{"near"}) {
		t.Errorf("%v were asked", asked)
	}
}

// TestKeepNonsense: what no honest member asks for does not reach the node.
func TestKeepNonsense(t *testing.T) {
	w := newTestWorld()
	n := w.node(t, "node", gossiping())
	var k keepers
	k.watch([]*testNode{n}, func(*testNode) error { return nil })
	d := digest.FromString("x")
	for name, c := range map[string]Copy{
		"no digest":     {},
		"a bad digest":  {Want: Want{Digest: "sha256:00"}},
		"an empty tag":  {Want: Want{Registry: "r", Repository: "a"}, Tag: "v1"},
		"negative size": {Want: Want{Digest: d, Size: -1}},
		"huge size":     {Want: Want{Digest: d, Size: maxBlobSize + 1}},
		"the future":    {Want: Want{Digest: d}, Idle: -time.Second},
		"the Big Bang":  {Want: Want{Digest: d}, Idle: maxIdle + 1},
	} {
		if _, err := n.s.keeps(t.Context(), c); err == nil {
			t.Errorf("%s: kept", name)
		}
	}
	if asked, _ := k.take(); len(asked) > 0 {
		t.Errorf("the node was asked %d times", len(asked))
	}
}

// TestWorkIsNotIdle: a link over which nothing was asked for long is not idle while a question is
// being answered, nor while a piece is being sent.
func TestWorkIsNotIdle(t *testing.T) {
	t.Run("a question", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			w := newTestWorld()
			nodes := w.wayCluster(t, 3)
			d := w.add(1000, 1)
			var asked atomic.Int32
			for _, n := range nodes {
				n.keep = func(Copy) error {
					asked.Add(1)
					wait(t.Context(), keepTime-10*time.Second)
					return nil
				}
			}
			n, err := nodes[0].s.Keep(t.Context(), Copy{Want: Want{Digest: d, Registry: "r", Repository: "a"}}, 1)
			if n != 1 || err != nil || asked.Load() != 1 {
				t.Errorf("%d times somebody was asked: %d, %v", asked.Load(), n, err)
			}
		})
	})
	t.Run("a piece", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			const size = 200 << 10
			w := newTestWorld()
			nodes := w.wayCluster(t, 2)
			d := w.add(size, 1)
			holder, asker := nodes[0], nodes[1]
			holder.give(d)
			b := holder.s.blob(blobID{key: sha256Of(d)})
			b.admit(asker.s.self.Name, "r")
			if err := holder.s.seedFromStore(b); err != nil {
				t.Fatal(err)
			}
			waitFor(t, b.whole)
			holder.s.limiter = rate.NewLimiter(size/40, chunkSize)
			if err := askPiece(t, asker, holder, d); err != nil {
				t.Error(err)
			}
			if sent := testutil.ToFloat64(holder.s.metrics.uploaded); sent != size {
				t.Errorf("%v bytes were sent, want %d", sent, size)
			}
		})
	})
}

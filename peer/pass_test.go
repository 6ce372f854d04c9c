package peer

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func mustKey(t *testing.T, d digest.Digest) key {
	t.Helper()
	k, err := parseKey(d.String())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestPass pins what a pass is good for: this blob, this registry, this start of
// this member, by the word of another.
func TestPass(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 3)
	holder, home, asker := nodes[0].s, nodes[1].s, nodes[2].s
	k, other := key{1}, key{2}
	good := home.sign(k, "reg.test", asker.self.Name)
	with := func(change func(*pass)) pass {
		p := good
		change(&p)
		return p
	}
	for _, tc := range []struct {
		name   string
		pass   pass
		blob   key
		member string
		ok     bool
	}{
		{"as signed", good, k, asker.self.Name, true},
		{"none", pass{}, k, asker.self.Name, false},
		{"for another blob", good, other, asker.self.Name, false},
		{"of another member", good, k, holder.self.Name, false},
		{"of another start", good, k, startName(asker.self.Node, asker.self.Epoch+1), false},
		{"for another registry", with(func(p *pass) { p.registry = "evil.test" }), k, asker.self.Name, false},
		{"signed by somebody else", with(func(p *pass) { p.signer = holder.self.Name }), k, asker.self.Name, false},
		{"signed by a stranger", with(func(p *pass) { p.signer = "stranger~00000000001" }), k, asker.self.Name, false},
		{"signed by oneself", asker.sign(k, "reg.test", asker.self.Name), k, asker.self.Name, false},
		{"tampered with", with(func(p *pass) { p.sig[3] ^= 1 }), k, asker.self.Name, false},
	} {
		if got := holder.good(tc.pass, tc.blob, tc.member); got != tc.ok {
			t.Errorf("%s: good is %t", tc.name, got)
		}
	}
	home.roster.remove(home.self.Name)
	nodes[0].s.roster.remove(home.self.Name)
	if !holder.good(good, k, asker.self.Name) {
		t.Error("not good any more right after its signer left")
	}
}

// TestManyStarts: who is let in to a blob that others have been asking for since long ago,
// under ever new names, gets it.
func TestManyStarts(t *testing.T) {
	n := newTestWorld().node(t, "node-0")
	b := n.s.blob(blobID{key: key{1}})
	for i := range maxLeases + 1 {
		member := startName("node-1", uint64(i))
		b.admit(member, "reg.test")
		if !b.lets(member) {
			t.Fatalf("start %d is let in and gets nothing", i+1)
		}
	}
	if len(b.admitted) != maxLeases {
		t.Errorf("%d are remembered, want %d", len(b.admitted), maxLeases)
	}
}

var errNoVerdict = errors.New("the registry lets this credential read nothing")

// TestHomeRefusesWhomTheRegistryRefuses: a node without a verdict gets nothing from
// a home, and neither pieces from the holders that it finds by itself.
func TestHomeRefusesWhomTheRegistryRefuses(t *testing.T) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 4)
	d := w.add(3<<20, 4)
	home, others := homeOf(d, nodes)
	holder, stranger := others[0], others[1]
	holder.give(d)
	holder.s.Announce(d)
	for _, n := range nodes {
		n.admit = func(Want) error { return errNoVerdict }
		if n != holder {
			waitFor(t, func() bool { return len(n.s.Holders(d)) > 0 })
		}
	}
	w.failFrom = 1
	w.fetched.Store(1) // the registry is of no help
	for _, n := range []*testNode{stranger, home} {
		f := n.start(d)
		<-f.done
		if f.err == nil || len(n.blobs[d].sources()) != 0 {
			t.Errorf("%s: %v, got %v", n.s.self.Node, f.err, n.blobs[d].sources())
		}
	}
	if err := askPiece(t, stranger, holder, d); err == nil {
		t.Error("the holder gives a piece to who asks for it without a pass")
	}

	// The same node, with a verdict.
	for _, n := range nodes {
		n.admit = nil
	}
	stranger.mu.Lock()
	clear(stranger.fills)
	stranger.mu.Unlock()
	stranger.wantOK(d)
	if err := askPiece(t, stranger, holder, d); err != nil {
		t.Errorf("the holder does not give a piece to who has a pass: %v", err)
	}
	if got := stranger.blobs[d].sources()[holder.s.self.Node]; got != 3<<20 {
		t.Errorf("%d bytes from the holder", got)
	}
}

// askPiece asks a node for the first piece of a blob as if there were no rules:
// it takes part and asks, without having been let in by anybody.
func askPiece(t *testing.T, from, at *testNode, d digest.Digest) error {
	t.Helper()
	m, ok := from.s.roster.get(at.s.self.Name)
	if !ok {
		t.Fatal("no such member")
	}
	l, err := from.s.connect(t.Context(), m)
	if err != nil {
		return err
	}
	b := from.s.blob(blobID{key: mustKey(t, d)})
	b.setSize(int64(len(at.world.bytes(d))))
	before := testutil.ToFloat64(at.s.metrics.uploaded)
	b.meet(l)
	r := &request{blob: b, nb: &neighbour{l: l}, size: b.pieceLen(0), sent: time.Now(), buf: make([]byte, b.pieceLen(0))}
	if !l.request(r, want{blob: b.id, needDigest: true}) {
		return errLinkClosed
	}
	waitFor(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.wants[r.id] == nil // it has been answered
	})
	if testutil.ToFloat64(at.s.metrics.uploaded) == before {
		return errors.New("not given")
	}
	return nil
}

// TestForeignBytesAreNotGiven: what was given by one registry is not for those who
// ask in the name of another; these do not wait for it.
func TestForeignBytesAreNotGiven(t *testing.T) {
	for _, where := range []string{"at the home", "at a holder"} {
		t.Run(where, func(t *testing.T) {
			w := newTestWorld()
			nodes := w.gossipCluster(t, 4)
			d := w.add(3<<20, 5)
			home, others := homeOf(d, nodes)
			holder, asker := others[0], others[1]
			if where == "at the home" {
				holder = home
			}
			holder.gives = func(registry string) bool { return registry != "registry.test" }
			holder.give(d)
			holder.s.Announce(d)
			for _, n := range nodes {
				if n != holder {
					waitFor(t, func() bool { return len(n.s.Holders(d)) > 0 })
				}
			}
			start := time.Now()
			asker.wantOK(d)
			if took := time.Since(start); took > 1500*time.Millisecond {
				t.Errorf("it took %v", took)
			}
			if got := asker.blobs[d].sources()[holder.s.self.Node]; got != 0 {
				t.Errorf("%d bytes from %s", got, holder.s.self.Node)
			}
			if w.requests.Load() == 0 {
				t.Error("nobody asked the registry")
			}
		})
	}
}

// TestWantsCarryWhoAsks: what the proxy knows of its caller reaches the home, and
// only there.
func TestWantsCarryWhoAsks(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 2)
	d := w.add(100, 6)
	home, others := homeOf(d, nodes)
	seen := make(chan Want, 10)
	home.admit = func(w Want) error { seen <- w; return nil }
	want := Want{Digest: d, Registry: "r", Repository: "app", Manifest: true, Authorization: "Bearer secret", Node: true}
	b := newMemBlob(d)
	if err := others[0].s.Fetch(t.Context(), want, b, others[0].upstream(d)); err != nil {
		t.Fatal(err)
	}
	if got := <-seen; got != want {
		t.Errorf("the home was told %v, node %t, %d bytes of credential", got, got.Node, len(got.Authorization))
	}
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		for _, v := range []any{want, Reference{Registry: "r", Authorization: "Bearer secret"}} {
			if out := fmt.Sprintf(format, v); strings.Contains(out, "secret") {
				t.Errorf("%s prints %s", format, out)
			}
		}
	}
}

// TestRefusalsKeepTheChallenge: a client has to see how the registry asks for
// credentials, as far as it fits.
func TestRefusalsKeepTheChallenge(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 2)
	long := strings.Repeat("x", maxChallengeLen+1)
	refusal := &Refusal{Status: 401, Text: "no", Challenge: []string{`Bearer realm="x"`, long, "Basic", "a", "b"}}
	for _, n := range nodes {
		n.tag = func() (Descriptor, error) { return Descriptor{}, refusal }
	}
	for _, n := range nodes { // one of them is the home itself
		_, err := n.s.Resolve(t.Context(), Reference{Registry: "r", Repository: "app", Tag: "v1"})
		got, ok := errors.AsType[*Refusal](err)
		if !ok || got.Status != 401 || len(got.Challenge) == 0 || got.Challenge[0] != refusal.Challenge[0] {
			t.Errorf("%v, challenge %q", err, got.Challenge)
		}
	}
	if short := refusal.short(); len(short.Challenge) != 3 {
		t.Errorf("sent %q", short.Challenge)
	}
}

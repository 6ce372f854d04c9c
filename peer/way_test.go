package peer

import (
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// wayCluster is a cluster in a bubble. What a node announces all others know at the next
// tenth of a second, as they would by gossip.
func (w *testWorld) wayCluster(t *testing.T, count int) (nodes []*testNode) {
	net := newSimNet(250*time.Microsecond, 1)
	for i := range count {
		host := net.host(fmt.Sprintf("10.0.0.%d:1", i), 1000*mbit, 1000*mbit)
		nodes = append(nodes, w.node(t, fmt.Sprint("node-", i), func(c *Config) { c.Network, c.Seed, c.Keys = host, 1, nil }))
	}
	meet(nodes...)
	for _, a := range nodes {
		for _, b := range nodes {
			a.s.index.joined([]Member{b.s.self})
		}
	}
	go func() {
		for ctx := t.Context(); ctx.Err() == nil; wait(ctx, 100*time.Millisecond) {
			for _, a := range nodes {
				a.s.index.own.mu.Lock()
				first, ops := a.s.index.own.seq-uint32(len(a.s.index.own.log)), slices.Clone(a.s.index.own.log)
				a.s.index.own.mu.Unlock()
				for some := range slices.Chunk(ops, opsPerMessage) {
					for _, b := range nodes {
						b.s.index.heard(appendMessage(nil, memberID(a.s.self.Name), first, some))
					}
					first += uint32(len(some))
				}
			}
		}
	}()
	return nodes
}

// TestWay: one node of twelve reaches the registry, and is home of none of the blobs
// that the others pull. They find it, and the registry sends each blob once. When it is
// cut off too they find another one.
func TestWay(t *testing.T) { bubble(t, testWay) }

func testWay(t *testing.T) {
	w := newTestWorld()
	nodes := w.wayCluster(t, 12)
	way := nodes[3]
	others := slices.DeleteFunc(slices.Clone(nodes), func(n *testNode) bool { return n == way })
	for _, n := range others {
		n.cutOff.Store(true)
	}
	seed := uint64(0)
	// pull has the others fetch blobs that the first way out is no home of, until all get one.
	pull := func() (failed int) {
		for ; ; failed++ {
			var d digest.Digest
			for ok := false; !ok; ok = !nodes[0].s.mayBeHome(sha256Of(d), way.s.self.Name) {
				seed++
				d = w.add(1<<20, seed)
			}
			ok := true
			for _, n := range others {
				n.start(d)
			}
			for _, n := range others {
				f := n.start(d)
				<-f.done
				ok = ok && f.err == nil
			}
			if ok {
				return failed
			}
			if failed == 3 {
				t.Fatal("nobody finds the way")
			}
		}
	}
	if failed := pull(); failed > 1 {
		t.Errorf("%d blobs could not be had at first", failed)
	}
	before, begun := w.requests.Load(), time.Now()
	for range 10 {
		if pull() > 0 {
			t.Error("a blob could not be had")
		}
	}
	if got := w.requests.Load() - before; got != 10 {
		t.Errorf("%d requests to the registry for 10 blobs", got)
	}
	// At first each took the time in which its homes found out that they are cut off, 1.5 s.
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("10 blobs took %v", took)
	}

	way.cutOff.Store(true)
	next := others[7]
	next.cutOff.Store(false)
	next.tries.Store(0)
	if failed := pull(); failed > 1 {
		t.Errorf("%d blobs could not be had after the way was lost", failed)
	}
	waitFor(t, func() bool {
		for _, n := range nodes {
			if got := n.s.withWay(key{}, "registry.test"); len(got) != 1 || got[0].Node != next.s.self.Node {
				return false
			}
		}
		return true
	})
}

// TestNobodyLooksForAWay: where everybody reaches the registry, nobody asks for a way
// and the index knows of none.
func TestNobodyLooksForAWay(t *testing.T) {
	t.Parallel()
	w := newTestWorld()
	nodes := w.gossipCluster(t, 5)
	allOK(t, w.add(1<<20, 1), nodes...)
	for _, n := range nodes {
		if n.connects.Load() != 0 || len(n.s.withWay(key{}, "registry.test")) != 0 {
			t.Errorf("%s looked for a way", n.s.self.Node)
		}
	}
}

// TestSeekPauses: a node that finds no way asks ever more rarely, and one that found one
// looks soon whether it is still needed.
func TestSeekPauses(t *testing.T) {
	w := newWays()
	now := time.Now()
	seek := func(after time.Duration, want bool) {
		t.Helper()
		now = now.Add(after)
		if got := w.maySeek("r", now); got != want {
			t.Errorf("after %v: %t", after, got)
		}
	}
	seek(0, true)
	seek(wayAgain-1, false)
	seek(1, true)
	seek(wayAgain, false)
	seek(wayAgain, true)
	for range 5 {
		seek(wayRarely, true)
	}
	seek(wayRarely-1, false)
	seek(time.Hour, true) // another outage, which ends as the first did not
	seek(wayAgain, true)
	w.found("r")
	now = time.Now()
	seek(wayCheck+time.Second, true)
}

// TestNoWay: a member that tried in vain says so, and is passed over where others have a
// way.
func TestNoWay(t *testing.T) {
	t.Parallel()
	w := newTestWorld()
	nodes := w.nodes(t, 4)
	for _, n := range nodes {
		n.cutOff.Store(true)
	}
	if nodes[0].s.askWay(t.Context(), "registry.test") {
		t.Error("a way was found")
	}
	for _, n := range nodes[1:] {
		if n.connects.Load() != 1 || !nodes[0].s.isCut(n.s.self.Name, "registry.test") {
			t.Errorf("%s tried %d times, and it is not known that this was in vain", n.s.self.Node, n.connects.Load())
		}
	}
}

// TestNoWayWhenAskedAgain: a home that has no way to the registry when a lease is renewed is
// passed over like one that has none at first. It is asked once more only when those it left
// the blob to have none either.
func TestNoWayWhenAskedAgain(t *testing.T) {
	t.Parallel()
	w := newTestWorld()
	d := w.add(1<<20, 1)
	nodes := w.nodes(t, 3)
	home, others := homeOf(d, nodes)
	home.tries.Store(1) // in vain
	for _, n := range nodes {
		n.cutOff.Store(true) // else the home finds a way, and this node stands in for it
	}
	s, name := others[0].s, home.s.self.Name
	x := &fetch{s: s, b: s.blob(blobID{key: sha256Of(d)}), w: Want{Digest: d, Registry: "registry.test"}, tried: make(map[string]bool), joined: name}
	if x.rejoin(t.Context(), false) {
		t.Fatal("it is home although it has no way")
	}
	if m := x.next(x.tried); m == nil || m.Name == name {
		t.Errorf("the next home is %v", m)
	}
	if m := x.lastLeft(); m == nil || m.Name != name {
		t.Errorf("the blob was left to others by %v", m)
	}
}

// TestWaysAreBounded: registries and members come from outside.
func TestWaysAreBounded(t *testing.T) {
	n := newTestWorld().node(t, "a")
	n.s.roster.set(Member{Name: "b"}, Member{Name: "c"}, Member{Name: "d"}, Member{Name: "e"})
	w := n.s.ways
	for i := range 2 * maxCut {
		n.s.cutOff(fmt.Sprint("member-", i), fmt.Sprint("registry-", i), []string{"b", "c", "d", "e"})
		w.maySeek(fmt.Sprint("registry-", i), time.Now())
	}
	for i := range 2 * maxWays {
		if err := n.s.giveWay(t.Context(), fmt.Sprint("registry-", i)); err != nil {
			t.Fatal(err)
		}
	}
	if len(w.cut) != maxCut || len(w.sought) != maxWays || len(w.told) != maxWays || len(w.ours) != maxWays || len(w.sure) != maxWays {
		t.Errorf("%d members, %d registries looked for, %d heard of and %d told of are kept", len(w.cut), len(w.sought), len(w.told), len(w.ours))
	}
	if names := w.told["registry-0"].names; len(names) != homesPerBlob {
		t.Errorf("%q are kept for one registry", names)
	}
	n.s.ways = newWays()
	if n.s.cutOff("member", "r", []string{n.s.self.Name, "a stranger"}); len(n.s.ways.told) != 0 {
		t.Errorf("it is believed that %v have a way", n.s.ways.told)
	}
}

// TestHearsayIsOutlasted: what others say of a member that has found itself cut off does
// not count, not even when that is long enough ago for it to be asked again. The others
// have their word from an index that is seconds behind.
func TestHearsayIsOutlasted(t *testing.T) {
	n := newTestWorld().node(t, "a")
	n.s.roster.set(Member{Name: "b", Home: true}, Member{Name: "c", Home: true})
	n.s.cutOff("c", "r", []string{"b"})
	if got := namesOf(n.s.withWay(key{}, "r")); !slices.Equal(got, []string{"b"}) {
		t.Fatalf("by hearsay %q have a way", got)
	}
	n.s.cutOff("b", "r", nil)
	n.s.cutOff("c", "r", []string{"b"})
	clear(n.s.ways.cut)
	if got := namesOf(n.s.withWay(key{}, "r")); len(got) > 0 {
		t.Errorf("%q have a way by hearsay, against their own word", got)
	}
}

// TestAround: who is cut off is passed over only where somebody else has a way, and all
// who know the same put the same first.
func TestAround(t *testing.T) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 6)
	s := nodes[0].s
	k := key{1}
	homes := s.roster.homes(k, "", false)
	s.cutOff(homes[0].Name, "registry.test", nil)
	if got := s.around(homes, k, "registry.test"); !slices.Equal(got, homes) {
		t.Error("nobody has a way, and the homes are others")
	}
	for _, n := range nodes[2:] {
		if err := n.s.giveWay(t.Context(), "registry.test"); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		waitFor(t, func() bool { return len(n.s.index.holders(wayTo("registry.test"), "", maxHolders)) >= 3 })
	}
	waitFor(t, func() bool {
		return slices.Equal(namesOf(nodes[0].s.withWay(k, "registry.test")), namesOf(nodes[1].s.withWay(k, "registry.test")))
	})
	if got := namesOf(s.around(homes, k, "registry.test")); slices.Contains(got, homes[0].Name) || got[0] != homes[1].Name {
		t.Errorf("the homes are %v, without the first of %v", got, namesOf(homes))
	}
	if got := s.around(homes, k, "another"); !slices.Equal(got, homes) {
		t.Error("a way to one registry counts for another")
	}
}

func namesOf(ms []*Member) (out []string) {
	for _, m := range ms {
		out = append(out, m.Name)
	}
	return out
}

// TestWaysOfHealthy: members are still listed after a flaw that is over. All reach the
// registry, none is sure of it, and to try takes a while. Those that are listed do not
// say no: else each node would have to get each blob for itself.
func TestWaysOfHealthy(t *testing.T) { bubble(t, testWaysOfHealthy) }

func testWaysOfHealthy(t *testing.T) {
	w := newTestWorld()
	nodes := w.wayCluster(t, 12)
	for _, n := range nodes[:2] {
		if err := n.s.giveWay(t.Context(), "registry.test"); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		waitFor(t, func() bool { return len(n.s.withWay(key{}, "registry.test")) == 2 })
		n.s.ways.mu.Lock()
		clear(n.s.ways.sure)
		n.s.ways.mu.Unlock()
		n.connect = 300 * time.Millisecond
	}
	allOK(t, w.add(1<<20, 1), nodes...)
	if got := w.requests.Load(); got != 1 {
		t.Errorf("%d requests to the registry", got)
	}
}

// TestHomesDoNotWaitForEachOther: homes that pull at the same moment, and are not sure of their
// way while others are listed, leave the blob to these, and not to each other.
func TestHomesDoNotWaitForEachOther(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newTestWorld()
		nodes := w.wayCluster(t, 12)
		way := nodes[11]
		if err := way.s.giveWay(t.Context(), "registry.test"); err != nil {
			t.Fatal(err)
		}
		for _, n := range nodes {
			waitFor(t, func() bool { return len(n.s.withWay(key{}, "registry.test")) == 1 })
		}
		var d digest.Digest
		for seed := uint64(1); d == "" || way.s.mayBeHome(sha256Of(d), way.s.self.Name); seed++ {
			d = w.add(1<<20, seed)
		}
		begun := time.Now()
		for _, err := range pullAll(d, nodes) {
			t.Error(err)
		}
		if took := time.Since(begun); took > stallRejoin {
			t.Errorf("it took %v", took)
		}
		w.within(t, d, 1)
	})
}

// TestWayWasLost: the last way out is lost, and members still list it. Those that are
// homes say no, since somebody else seems to have a way, and so does he. Then one home
// tries for everybody, and when the registry is back it sends one copy.
func TestWayWasLost(t *testing.T) {
	t.Parallel()
	w := newTestWorld()
	nodes := w.nodes(t, 8)
	d := w.add(1<<20, 1)
	lost := nodes[slices.IndexFunc(nodes, func(n *testNode) bool { return !n.s.mayBeHome(sha256Of(d), n.s.self.Name) })]
	for _, n := range nodes {
		n.cutOff.Store(true)
		n.tries.Store(time.Now().Add(-time.Minute).UnixNano())
		n.s.index.joined([]Member{lost.s.self})
		n.s.index.heard(appendMessage(nil, memberID(lost.s.self.Name), 0, []op{{true, wayTo("registry.test")}}))
	}
	time.AfterFunc(3*time.Second, func() {
		for _, n := range nodes {
			n.cutOff.Store(false)
		}
	})
	allOK(t, d, nodes...)
	if got := w.requests.Load(); got != 1 {
		t.Errorf("%d requests to the registry", got)
	}
}

// TestPeekAtMany: more homes to look at than a blob has at a time, of the zone, the
// cluster, before this node came, and with a way to the registry. None answers in time, and
// the node can be stopped. It once waited forever for those past the ninth.
func TestPeekAtMany(t *testing.T) {
	t.Parallel()
	deaf, err := net.Listen("tcp", "127.0.0.1:0") // nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	n := newTestWorld().node(t, "node", func(c *Config) { c.Zone = "a" })
	s := n.s
	add := func(count int, zone string, since time.Duration) (out []Member) {
		for i := range count {
			node := fmt.Sprint(zone, i)
			epoch := s.self.Epoch + uint64(since.Milliseconds())
			out = append(out, Member{Name: startName(node, epoch), Node: node, Zone: zone, Addr: deaf.Addr().String(), Epoch: epoch, Home: true, Key: s.self.Key})
		}
		s.roster.set(out...)
		s.index.joined(out)
		return out
	}
	add(10, "a", time.Minute)
	add(200, "b", time.Minute)
	add(5, "c", -time.Minute)
	for _, m := range add(3, "d", time.Minute) {
		s.index.heard(appendMessage(nil, memberID(m.Name), 0, []op{{true, wayTo("r")}}))
	}
	x := &fetch{s: s, b: s.blob(blobID{}), w: Want{Digest: key{}.digest(), Registry: "r"}, tried: make(map[string]bool)}
	if homes := x.otherHomes(true); len(homes) != 4*homesPerBlob {
		t.Fatalf("%d homes to look at: this test needs others", len(homes))
	}
	if source, _ := x.peek(t.Context(), true); source {
		t.Error("somebody who does not answer has the blob")
	}
	n.stop()
	select {
	case <-n.gone:
	case <-time.After(10 * time.Second):
		t.Fatal("the node does not stop")
	}
}

// TestJustStarted: a node whose index knows of no way yet asks homes that are not sure of
// theirs. They name who has one, and it turns to him for a tag and for a blob, also where
// the next home would be the node itself.
func TestJustStarted(t *testing.T) {
	t.Parallel()
	w := newTestWorld()
	nodes := w.nodes(t, 8)
	way, fresh := nodes[3], nodes[5]
	if err := way.s.giveWay(t.Context(), "registry.test"); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if n != way {
			n.cutOff.Store(true)
			n.tag = func() (Descriptor, error) { return Descriptor{}, fmt.Errorf("%s asked the registry", n.s.self.Node) }
		}
		if n != way && n != fresh {
			n.s.index.joined([]Member{way.s.self})
			n.s.index.heard(appendMessage(nil, memberID(way.s.self.Name), 0, []op{{true, wayTo("registry.test")}}))
		}
	}
	rank := func(k key, m *testNode) int {
		return slices.Index(namesOf(fresh.s.roster.homes(k, "", false)), m.s.self.Name)
	}
	r := Reference{Registry: "registry.test", Tag: "v1"}
	for i := 0; r.Repository == "" || rank(r.home(), way) >= 0 || rank(r.home(), fresh) >= 0; i++ {
		r.Repository = fmt.Sprint("app-", i)
	}
	if got, err := fresh.s.Resolve(t.Context(), r); err != nil || got.Digest != digest.FromString("v1") {
		t.Errorf("the tag is %v, %v", got, err)
	}

	ways := fresh.s.ways
	ways.mu.Lock()
	clear(ways.cut)
	clear(ways.sure)
	clear(ways.sought)
	clear(ways.told)
	ways.mu.Unlock()
	var d digest.Digest
	for seed := uint64(1); d == "" || rank(sha256Of(d), way) >= 0 || rank(sha256Of(d), fresh) < 1; seed++ {
		d = w.add(1<<20, seed)
	}
	allOK(t, d, fresh)
	fresh.mu.Lock()
	defer fresh.mu.Unlock()
	if from := fresh.blobs[d].sources(); from[way.s.self.Node] != 1<<20 {
		t.Errorf("the blob came from %v", from)
	}
}

// TestWayIsTakenBack: a member stays listed as long as one that is cut off pulls, and no
// longer than a day after the last of these.
func TestWayIsTakenBack(t *testing.T) {
	t.Parallel()
	const registry = "registry.test"
	w := newTestWorld()
	nodes := w.gossipCluster(t, 3)
	cut, way := nodes[0], nodes[1]
	cut.tries.Store(1) // in vain
	if err := way.s.giveWay(t.Context(), registry); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		return len(cut.s.withWay(key{}, registry)) == 1 && len(nodes[2].s.withWay(key{}, registry)) == 1
	})
	way.s.ways.mu.Lock()
	way.s.ways.ours[registry] = time.Now().Add(-wayKept + time.Minute)
	way.s.ways.mu.Unlock()
	for range 3 {
		cut.s.seekWay(t.Context(), registry)
	}
	if got := way.connects.Load(); got != 2 {
		t.Errorf("the member tried %d times, want once when it was found and once since", got)
	}
	listed := func() bool {
		way.s.ways.mu.Lock()
		defer way.s.ways.mu.Unlock()
		return way.s.ways.givesLocked(registry)
	}
	if way.s.tendWays(time.Now().Add(2 * time.Minute)); !listed() {
		t.Fatal("the way is taken back while a member needs it")
	}

	cut.tries.Store(0)
	cut.s.ways.mu.Lock()
	clear(cut.s.ways.sought)
	cut.s.ways.mu.Unlock()
	cut.s.seekWay(t.Context(), registry)
	if got := way.connects.Load(); got != 2 {
		t.Error("a member that reaches the registry asks for a way")
	}
	if way.s.tendWays(time.Now().Add(wayKept - time.Minute)); !listed() {
		t.Error("the way is taken back before a day is over")
	}
	way.s.tendWays(time.Now().Add(wayKept + time.Minute))
	for _, n := range nodes {
		waitFor(t, func() bool { return len(n.s.withWay(key{}, registry)) == 0 })
	}
}

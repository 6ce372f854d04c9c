package peer

import (
	"bytes"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// gossiping gives a node a gossip port and whom to join.
func gossiping(join ...*testNode) func(*Config) {
	return func(c *Config) {
		c.Gossip = "127.0.0.1:0"
		for _, n := range join {
			c.Join = append(c.Join, n.gossipAddr())
		}
	}
}

func (n *testNode) gossipAddr() string {
	var addr string
	waitFor(n.t, func() bool {
		n.s.mu.Lock()
		defer n.s.mu.Unlock()
		if n.s.run == nil {
			return false
		}
		addr = n.s.gossip.list.LocalNode().Address()
		return true
	})
	return addr
}

func (n *testNode) members() int { return len(n.s.roster.view.Load().all) }

func wantMembers(t *testing.T, count int, nodes ...*testNode) {
	t.Helper()
	for _, n := range nodes {
		waitFor(t, func() bool { return n.members() == count })
	}
}

// gossipCluster starts nodes that find each other through the first.
func (w *testWorld) gossipCluster(t *testing.T, count int, change ...func(*Config)) []*testNode {
	nodes := []*testNode{w.node(t, "node-0", append(change, gossiping())...)}
	for i := 1; i < count; i++ {
		nodes = append(nodes, w.node(t, fmt.Sprintf("node-%d", i), append(change, gossiping(nodes[0]))...))
	}
	wantMembers(t, count, nodes...)
	return nodes
}

func TestGossipCluster(t *testing.T) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 4, func(c *Config) { c.Zone = "a-zone-with-29-bytes-in-name-" })
	d := w.add(3<<20, 3)
	for _, n := range nodes {
		n.start(d)
	}
	for _, n := range nodes {
		n.wantOK(d)
	}
	if got := w.fetched.Load(); got != 3<<20 {
		t.Errorf("upstream gave %d bytes", got)
	}
	st := nodes[1].s.Status()
	if len(st.Members) != 4 || len(st.Links) == 0 || st.Members[0].Zone != "a-zone-with-29-bytes-in-name-" {
		t.Errorf("status %+v", st)
	}
	var sent, received int64
	for _, n := range nodes {
		for _, l := range n.s.allLinks() {
			l.close(errIdle)
		}
		for _, moved := range n.s.Status().Traffic {
			sent, received = sent+moved.Sent, received+moved.Received
		}
	}
	if sent < 3*3<<20 || received < 3*3<<20 {
		t.Errorf("without links, %d bytes were sent and %d received; three nodes had 3 MiB each of others", sent, received)
	}
	nodes[3].kill()
	wantMembers(t, 3, nodes[:3]...)
}

// TestTrafficOfSmallBlobs: bytes count at both ends also where they ride in a home's answer.
func TestTrafficOfSmallBlobs(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 2)
	d := w.add(1000, 1)
	home, others := homeOf(d, nodes)
	asker := others[0]
	allOK(t, d, home)
	allOK(t, d, asker)
	if got := testutil.ToFloat64(home.s.metrics.uploaded); got != 1000 {
		t.Errorf("%v bytes count as uploaded, want 1000", got)
	}
	for _, tt := range []struct {
		at, with *testNode
		want     Traffic
	}{
		{home, asker, Traffic{Sent: 1000}},
		{asker, home, Traffic{Received: 1000}},
	} {
		if got := tt.at.s.Status().Traffic[tt.with.s.self.Node]; got != tt.want {
			t.Errorf("%s with %s: %+v, want %+v", tt.at.s.self.Node, tt.with.s.self.Node, got, tt.want)
		}
	}
}

// TestTrafficIsBounded holds that nodes that left are forgotten when there are
// too many, and members are not.
func TestTrafficIsBounded(t *testing.T) {
	var moved traffics
	for i := range maxTraffics + 1 {
		moved.with(fmt.Sprintf("gone-%d", i)).sent.Add(1)
	}
	stays := moved.with("stays")
	stays.received.Add(7)
	moved.tend([]*Member{{Node: "stays"}, {Node: "never met"}})
	if got := moved.list(); !maps.Equal(got, map[string]Traffic{"stays": {Received: 7}}) || moved.with("stays") != stays {
		t.Errorf("left: %v", got)
	}
}

// TestIPv6: nodes that have no other addresses find each other and exchange.
func TestIPv6(t *testing.T) {
	w := newTestWorld()
	six := func(join ...*testNode) func(*Config) {
		return func(c *Config) {
			gossiping(join...)(c)
			c.Gossip, c.Data = "[::1]:0", "[::1]:0"
		}
	}
	nodes := []*testNode{w.node(t, "node-0", six())}
	nodes = append(nodes, w.node(t, "node-1", six(nodes[0])), w.node(t, "node-2", six(nodes[0])))
	wantMembers(t, len(nodes), nodes...)
	d := w.add(3<<20, 6)
	var fills []*testFill
	for _, n := range nodes {
		fills = append(fills, n.start(d))
	}
	for _, f := range fills {
		if <-f.done; f.err != nil {
			t.Error(f.err)
		}
	}
	if got := w.fetched.Load(); got != 3<<20 {
		t.Errorf("%d bytes from upstream", got)
	}
}

// TestFewMeetAtOnce: in a small cluster a node tells all members of itself, also
// where no packet arrives that would tell them.
func TestFewMeetAtOnce(t *testing.T) {
	w := newTestWorld()
	nodes := []*testNode{w.node(t, "node-0", gossiping())}
	for i := range 5 {
		nodes[i].gossipAddr()
		nodes[i].s.gossip.net.udp.Close()
		nodes = append(nodes, w.node(t, fmt.Sprint("node-", i+1), gossiping(nodes[0])))
		wantMembers(t, i+2, nodes[i+1])
	}
	wantMembers(t, len(nodes), nodes...)
}

// TestGreet: a node that starts exchanges with all of few members, with some of
// many, and never with itself.
func TestGreet(t *testing.T) {
	g := newTestWorld().node(t, "node-0", gossiping()).s.gossip
	for n, want := range map[int]int{1: 0, 5: 4, fewMembers - 1: fewMembers - 2, fewMembers: greetAtOnce, 500: greetAtOnce} {
		g.mu.Lock()
		clear(g.addrs)
		g.addrs[g.s.self.Name] = "self"
		for i := range n - 1 {
			g.addrs[fmt.Sprint("other-", i)] = fmt.Sprint(i)
		}
		g.mu.Unlock()
		got := g.greet()
		slices.Sort(got)
		if len(slices.Compact(got)) != want || slices.Contains(got, "self") {
			t.Errorf("of %d: %q, want %d others", n, got, want)
		}
	}
}

// TestIndexByGossip: what one node announces others find, and no longer find
// once it is withdrawn or the node has left.
func TestIndexByGossip(t *testing.T) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 4)
	a, b := w.add(1000, 1), w.add(1000, 2)
	nodes[1].give(a)
	nodes[1].s.Announce(a)
	nodes[2].s.Announce(b)
	found := func(n *testNode, d digest.Digest) bool { return len(n.s.Holders(d)) > 0 }
	for _, n := range []*testNode{nodes[0], nodes[3]} {
		waitFor(t, func() bool { return found(n, a) && found(n, b) })
	}
	late := w.node(t, "late", gossiping(nodes[0]))
	waitFor(t, func() bool { return found(late, a) && found(late, b) })
	nodes[1].s.Withdraw(a)
	for _, n := range []*testNode{nodes[0], nodes[3], late} {
		waitFor(t, func() bool { return !found(n, a) })
	}
	nodes[2].kill()
	for _, n := range []*testNode{nodes[0], nodes[3], late} {
		waitFor(t, func() bool { return !found(n, b) })
	}
}

// TestHoldersBeforeUpstream: a blob that a member holds costs upstream nothing.
func TestHoldersBeforeUpstream(t *testing.T) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 4)
	d := w.add(2<<20, 9)
	home, others := homeOf(d, nodes)
	holder := others[0]
	holder.give(d)
	holder.s.Announce(d)
	for _, n := range nodes {
		if n != holder {
			waitFor(t, func() bool { return len(n.s.Holders(d)) > 0 })
		}
	}
	others[1].wantOK(d)
	home.wantOK(d)
	if w.requests.Load() != 0 {
		t.Errorf("%d requests upstream for a blob that %s holds", w.requests.Load(), holder.s.self.Node)
	}
}

// TestDeadHolder: a home does not wait for a holder that cannot be reached, even
// though the index still names it. It once cost every blob of an image a second.
func TestDeadHolder(t *testing.T) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 3)
	d := w.add(1000, 9)
	home, others := homeOf(d, nodes)
	holder := others[0]
	holder.give(d)
	holder.s.Announce(d)
	waitFor(t, func() bool { return len(home.s.Holders(d)) > 0 })
	_ = holder.s.gossip.net.Shutdown() // it says no word
	holder.kill()
	start := time.Now()
	home.wantOK(d)
	if took := time.Since(start); took > 800*time.Millisecond {
		t.Errorf("the home took %v", took)
	}
}

func TestRestartUnderAnotherAddress(t *testing.T) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 3)
	old := nodes[2]
	_ = old.s.gossip.net.Shutdown() // it says no word
	old.kill()
	fresh := w.node(t, "node-2", gossiping(nodes[0]))
	waitFor(t, func() bool {
		_, ok := nodes[1].s.roster.get(fresh.s.self.Name)
		return ok && fresh.members() >= 3
	})
	d := w.add(1<<20, 5)
	for _, n := range []*testNode{nodes[0], nodes[1], fresh} {
		n.wantOK(d)
	}
	if w.fetched.Load() > 2<<20 {
		t.Errorf("upstream gave %d bytes of 1 MiB", w.fetched.Load())
	}
}

// TestHeal joins two clusters that did not know each other: a third party is
// enough, and so is an address in Join that answers later than everything else.
func TestHeal(t *testing.T) {
	w := newTestWorld()
	spare, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	later := spare.Addr().String()
	spare.Close()
	a := w.node(t, "a", gossiping(), func(c *Config) { c.Join = []string{later} })
	b := w.node(t, "b", gossiping(a))
	wantMembers(t, 2, a, b)
	c := w.node(t, "c", gossiping(), func(c *Config) { c.Gossip = later })
	d := w.node(t, "d", gossiping(c))
	e := w.node(t, "e", gossiping(a, d))
	wantMembers(t, 5, a, b, c, d, e)
}

func TestStrangers(t *testing.T) {
	w := newTestWorld()
	nodes := w.gossipCluster(t, 2)
	stranger := w.node(t, "stranger", gossiping(nodes[0]), func(c *Config) { c.Keys = [][]byte{bytes.Repeat([]byte{9}, keySize)} })
	<-stranger.s.Joined()
	if stranger.members() != 1 || nodes[0].members() != 2 {
		t.Fatalf("a node with another key joined: it sees %d members, node-0 sees %d", stranger.members(), nodes[0].members())
	}
	target := nodes[0].s.self
	for _, trial := range []struct {
		name string
		dial func() (net.Conn, error)
	}{
		{"plain", func() (net.Conn, error) { return net.Dial("tcp", target.Addr) }},
		{"TLS without a certificate", func() (net.Conn, error) {
			return tls.Dial("tcp", target.Addr, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
		}},
		{"TLS under another key", func() (net.Conn, error) {
			c := stranger.s.trust.config()
			c.InsecureSkipVerify = true
			return tls.Dial("tcp", target.Addr, c)
		}},
	} {
		t.Run(trial.name, func(t *testing.T) {
			conn, err := trial.dial()
			if err != nil {
				return // refused in the handshake: just as good
			}
			defer conn.Close()
			h := hello{name: stranger.s.self.Name}.append(nil)
			_, _ = conn.Write(appendFrame(h, framePing, func(b []byte) []byte { return b })) // may be refused already
			_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			got, err := io.ReadAll(conn)
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Error("the connection stays open for a stranger")
			}
			if bytes.Contains(got, []byte(target.Node)) {
				t.Errorf("a stranger was told %q", got)
			}
		})
	}
}

// TestKeyRoll walks through a roll: at every step neighbours in the roll can
// talk.
func TestKeyRoll(t *testing.T) {
	a, b := bytes.Repeat([]byte{1}, keySize), bytes.Repeat([]byte{2}, keySize)
	with := func(keys ...[]byte) func(*Config) { return func(c *Config) { c.Keys = keys } }
	steps := []struct {
		name     string
		old, new func(*Config)
	}{
		{"second key added", with(a), with(a, b)},
		{"second key first", with(a, b), with(b, a)},
		{"first key removed", with(b, a), with(b)},
	}
	for _, s := range steps {
		t.Run(s.name, func(t *testing.T) {
			w := newTestWorld()
			x := w.node(t, "x", gossiping(), s.old)
			y := w.node(t, "y", gossiping(x), s.new)
			wantMembers(t, 2, x, y)
			d := w.add(1<<20, 1)
			x.wantOK(d)
			y.wantOK(d)
			if w.fetched.Load() != 1<<20 {
				t.Errorf("upstream gave %d bytes", w.fetched.Load())
			}
		})
	}
}

func TestNewRefuses(t *testing.T) {
	n := &testNode{world: newTestWorld()}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	cases := []struct {
		name   string
		change func(*Config)
		says   string
	}{
		{"no key off loopback", func(c *Config) { c.Data = "0.0.0.0:0" }, "peer.key_file"},
		{"no key, gossip everywhere", func(c *Config) { c.Gossip = ":0" }, "peer.key_file"},
		{"no key, advertised elsewhere", func(c *Config) { c.Advertise = "10.1.2.3" }, "peer.key_file"},
		{"short key", func(c *Config) { c.Keys = [][]byte{{1, 2, 3}} }, "3 bytes"},
		{"no name", func(c *Config) { c.Name = "" }, "name"},
		{"long zone", func(c *Config) { c.Zone = strings.Repeat("z", maxZone+1) }, "zone"},
		{"no port to be had", func(c *Config) { c.Network = deafNetwork{} }, "set another peer.data"},
		{"data port taken", func(c *Config) { c.Data = tcp.Addr().String() }, "another agent running on this node? (`ss -ltunp` says who listens) Stop it, or set another peer.data"},
		{"gossip port taken", func(c *Config) { c.Gossip = tcp.Addr().String() }, "or set another peer.gossip"},
		{"gossip port taken for packets", func(c *Config) { c.Gossip = udp.LocalAddr().String() }, "or set another peer.gossip"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			cfg := Config{Name: "x", Data: "127.0.0.1:0", Store: n, Origin: n}
			c.change(&cfg)
			s, err := New(cfg)
			if err == nil {
				s.Close()
				t.Fatal("New took it")
			}
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %q does not say %q", err, c.says)
			}
		})
	}
}

// TestUnnamedDataAddress: a node without a key whose data address is left out listens on
// loopback too (I1), not on every address, which an empty one means to the kernel.
func TestUnnamedDataAddress(t *testing.T) {
	n := &testNode{world: newTestWorld()}
	s, err := New(Config{Name: "x", Store: n, Origin: n})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if addr := s.listener.Addr().String(); !loopback(addr) {
		t.Errorf("listens on %s", addr)
	}
}

type deafNetwork struct{ tcp }

func (deafNetwork) Listen(string) (net.Listener, error) { return nil, io.ErrClosedPipe }

// lateNetwork's listener hands out one more connection while it is being closed.
type lateNetwork struct {
	tcp
	late net.Conn
}

func (n lateNetwork) Listen(addr string) (net.Listener, error) {
	l, err := n.tcp.Listen(addr)
	return &lateListener{Listener: l, late: n.late, closed: make(chan struct{})}, err
}

type lateListener struct {
	net.Listener
	late   net.Conn
	closed chan struct{}
	taken  bool
}

func (l *lateListener) Accept() (net.Conn, error) {
	<-l.closed
	if l.taken {
		return nil, net.ErrClosed
	}
	l.taken = true
	return l.late, nil
}

func (l *lateListener) Close() error {
	close(l.closed)
	return l.Listener.Close()
}

// TestAcceptedAtTheEnd: a connection that comes as Run ends is closed.
func TestAcceptedAtTheEnd(t *testing.T) {
	for range 20 {
		ours, theirs := net.Pipe()
		if err := theirs.SetReadDeadline(time.Now().Add(slow * 5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		newTestWorld().node(t, "node", func(c *Config) { c.Network = lateNetwork{late: ours} }).kill()
		if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("read from a swarm that is gone: %v, want EOF", err)
		}
	}
}

// TestCertificatesIgnoreClocks: nodes whose clocks are hours or years apart
// still trust each other, because nothing depends on the time.
func TestCertificatesIgnoreClocks(t *testing.T) {
	ca1, _, err := deriveCA(testKey)
	if err != nil {
		t.Fatal(err)
	}
	ca2, _, err := deriveCA(testKey)
	if err != nil || !bytes.Equal(ca1.Raw, ca2.Raw) {
		t.Fatalf("the same key makes different authorities (%v)", err)
	}
	_, signer, _ := ed25519.GenerateKey(nil)
	tr, err := newTrust([][]byte{testKey}, "x~00000000000", signer)
	if err != nil {
		t.Fatal(err)
	}
	if at := tr.config().Time(); at != verifyAt || tr.leaf.Leaf.NotBefore.Year() > 2000 || tr.leaf.Leaf.NotAfter.Year() < 2200 {
		t.Errorf("certificates are checked at %v, valid %v to %v", at, tr.leaf.Leaf.NotBefore, tr.leaf.Leaf.NotAfter)
	}
}

// TestResolveAsksTheNextHome holds that a home that cannot ask upstream does
// not end the question: another may be able to, or knows what the tag was. What
// upstream itself refuses is final.
func TestResolveAsksTheNextHome(t *testing.T) {
	type answer func() (Descriptor, error)
	down := func() (Descriptor, error) { return Descriptor{}, errors.New("no route to the registry") }
	failing := func() (Descriptor, error) { return Descriptor{}, &Refusal{Status: 503, Text: "busy"} }
	missing := func() (Descriptor, error) { return Descriptor{}, &Refusal{Status: 404, Text: "no such tag"} }
	stale := func() (Descriptor, error) { return Descriptor{Digest: digest.FromString("old"), Stale: true}, nil }
	older := func() (Descriptor, error) { return Descriptor{Digest: digest.FromString("older"), Stale: true}, nil }
	fresh := func() (Descriptor, error) { return Descriptor{Digest: digest.FromString("new")}, nil }
	tests := []struct {
		name  string
		homes [2]answer // in the order in which they are asked
		want  Descriptor
		asked int32
		fails string
	}{
		{"the first knows", [2]answer{fresh, missing}, Descriptor{Digest: digest.FromString("new")}, 1, ""},
		{"the second can ask", [2]answer{down, fresh}, Descriptor{Digest: digest.FromString("new")}, 2, ""},
		{"the second remembers", [2]answer{failing, stale}, Descriptor{Digest: digest.FromString("old"), Stale: true}, 2, ""},
		{"the first remembers, the second can ask", [2]answer{stale, fresh}, Descriptor{Digest: digest.FromString("new")}, 2, ""},
		{"the first remembers best", [2]answer{stale, older}, Descriptor{Digest: digest.FromString("old"), Stale: true}, 2, ""},
		{"the first remembers alone", [2]answer{stale, down}, Descriptor{Digest: digest.FromString("old"), Stale: true}, 2, ""},
		{"no such tag", [2]answer{missing, fresh}, Descriptor{}, 1, "no such tag"},
		{"nobody can ask", [2]answer{down, down}, Descriptor{}, 2, "no route"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newTestWorld()
			nodes := w.nodes(t, 2)
			r := Reference{Registry: "r", Repository: "app", Tag: "v1"}
			for i, m := range nodes[0].s.roster.view.Load().homes(r.home(), "", false, nil) {
				for _, n := range nodes {
					if n.s.self.Name == m.Name {
						n.tag = tt.homes[i]
					}
				}
			}
			got, err := nodes[0].s.Resolve(t.Context(), r)
			if tt.fails == "" && (err != nil || got != tt.want) {
				t.Errorf("%+v, %v; want %+v", got, err, tt.want)
			}
			if tt.fails != "" && (err == nil || !strings.Contains(err.Error(), tt.fails)) {
				t.Errorf("%+v, %v; want an error that says %q", got, err, tt.fails)
			}
			if asked := w.resolves.Load(); int32(asked) != tt.asked {
				t.Errorf("%d homes asked upstream, want %d", asked, tt.asked)
			}
		})
	}
}

// TestResolveByMemory: while upstream is down, the homes of a tag that none of them
// knows ask a member that remembers it, by what the index says. However many
// nodes want to know, that member is asked by each home once.
func TestResolveByMemory(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 9)
	r := Reference{Registry: "r", Repository: "app", Tag: "v1"}
	homes := nodes[0].s.roster.homes(r.home(), "", false)
	isHome := func(n *testNode) bool {
		return slices.ContainsFunc(homes, func(m *Member) bool { return m.Name == n.s.self.Name })
	}
	witness := nodes[slices.IndexFunc(nodes, func(n *testNode) bool { return !isHome(n) })]
	want := Descriptor{Digest: digest.FromString("v1"), Stale: true}
	k, err := parseKey(r.entry().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		n.tag = func() (Descriptor, error) { return Descriptor{}, errRegistryDown }
		if n != witness {
			n.s.index.joined([]Member{witness.s.self})
			n.s.index.heard(appendMessage(nil, memberID(witness.s.self.Name), 0, []op{{true, prefixOf(k)}}))
		}
	}
	witness.tag = func() (Descriptor, error) { return want, nil }
	var asking sync.WaitGroup
	for _, n := range nodes {
		asking.Go(func() {
			if got, err := n.s.Resolve(t.Context(), r); err != nil || got != want {
				t.Errorf("%s: %v, %v", n.s.self.Node, got, err)
			}
		})
	}
	asking.Wait()
	if got := w.memories.Load(); got < 1 || got > homesPerBlob {
		t.Errorf("the member was asked %d times", got)
	}
}

// TestResolveOnce holds P2 for what is too small for a swarm.
func TestResolveOnce(t *testing.T) {
	w := newTestWorld()
	nodes := w.nodes(t, 5)
	errs := make(chan error)
	for _, n := range nodes {
		go func() {
			d, err := n.s.Resolve(t.Context(), Reference{Registry: "r", Repository: "app", Tag: "v1"})
			if err == nil && d.Digest != digest.FromString("v1") {
				err = fmt.Errorf("resolved to %v", d)
			}
			errs <- err
			age, err := n.s.May(t.Context(), Reference{Registry: "r", Repository: "app"})
			if err == nil && age != mayAge {
				err = fmt.Errorf("a leave of %s ago", age)
			}
			errs <- err
		}()
	}
	for range 2 * len(nodes) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if got := w.resolves.Load(); got != 2 {
		t.Errorf("%d questions upstream from %d nodes, want one each of two kinds", got, len(nodes))
	}
	if n := testutil.ToFloat64(nodes[0].s.metrics.members); n != 1 {
		t.Logf("members gauge is %v without gossip", n)
	}
}

// TestAdvertisesWhatDataListensOn: on a host with several addresses, of which peer.data
// names one, others are told that one, for they find pieces where they find gossip.
func TestAdvertisesWhatDataListensOn(t *testing.T) {
	w := newTestWorld()
	first := w.node(t, "node-0", func(c *Config) { c.Gossip, c.Data = ":0", "127.0.0.2:0" })
	second := w.node(t, "node-1", gossiping(first))
	wantMembers(t, 2, first, second)
	m, _ := second.s.roster.get(first.s.self.Name)
	if _, err := second.s.connect(t.Context(), m); err != nil {
		t.Errorf("others are told %s: %v", m.Addr, err)
	}
}

// TestOwnAddress: a node that listens on every address says of itself what it tells others.
func TestOwnAddress(t *testing.T) {
	w := newTestWorld()
	first := w.node(t, "node-0", func(c *Config) { c.Gossip, c.Data, c.Advertise = ":0", ":0", "127.0.0.3" })
	second := w.node(t, "node-1", gossiping(first))
	wantMembers(t, 2, first, second)
	m, _ := second.s.roster.get(first.s.self.Name)
	st := first.s.Status()
	for _, own := range st.Members {
		if own.Name == st.Self.Name && (own.Addr != m.Addr || st.Self.Addr != m.Addr) {
			t.Errorf("this node says %s and %s, others are told %s", own.Addr, st.Self.Addr, m.Addr)
		}
	}
	if len(st.Members) != 2 {
		t.Errorf("members: %v", st.Members)
	}
}

// TestOtherFamily: of a member with two addresses only one is told, and the other, which a
// name leads to as well, is not knocked at again and again. A name may also lead to one
// member after another by one address, as a Service's that is not headless.
func TestOtherFamily(t *testing.T) {
	g := &gossip{addrs: map[string]string{"a": "10.0.0.1:5052", "b": "10.0.0.2:5052", "c": "[fd00::3]:5052"}}
	for _, tt := range []struct {
		name string
		has  []string
		want []string
	}{
		{"two families of members", []string{"10.0.0.1:5052", "10.0.0.2:5052", "[fd00::1]:5052", "[fd00::2]:5052"}, nil},
		{"IPv6 is told", []string{"[fd00::3]:5052", "10.0.0.3:5052"}, nil},
		{"a new node", []string{"10.0.0.1:5052", "10.0.0.9:5052", "[fd00::1]:5052", "[fd00::9]:5052"},
			[]string{"10.0.0.9:5052", "[fd00::1]:5052", "[fd00::9]:5052"}},
		{"one address for all", []string{"10.96.0.7:5052"}, []string{"10.96.0.7:5052"}},
		{"one family", []string{"10.0.0.1:5052", "10.0.0.9:5052"}, []string{"10.0.0.9:5052"}},
		{"nobody is known", []string{"10.0.0.9:5052", "[fd00::9]:5052"}, []string{"10.0.0.9:5052", "[fd00::9]:5052"}},
	} {
		if got := g.unknown([][]string{tt.has}); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q are knocked at, want %q", tt.name, got, tt.want)
		}
	}
}

// TestVerdictIsNoTag: however long a registry's tags are believed, what upstream said of
// one is not believed for as long of the credential that asked, nor of everybody.
func TestVerdictIsNoTag(t *testing.T) {
	n := &testNode{world: newTestWorld()}
	tagTTL := func(registry string) time.Duration {
		return map[string]time.Duration{"r": 24 * time.Hour, "short": time.Second}[registry]
	}
	s, err := New(Config{Name: "x", Data: "127.0.0.1:0", TagTTL: tagTTL, Store: n, Origin: n})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	for _, tt := range []struct {
		who  Reference
		want time.Duration
	}{
		{Reference{Registry: "r"}, publicMemory},
		{Reference{Registry: "r", Authorization: "Basic eDp5"}, grantMemory},
		{Reference{Registry: "r", Node: true}, grantMemory},
		{Reference{Registry: "short"}, time.Second},
		{Reference{Registry: "none", Node: true}, 0},
	} {
		tt.who.Repository, tt.who.Tag = "app", "v1"
		if _, ttl, err := s.askUpstream(t.Context(), methodResolve, tt.who); err != nil || ttl != tt.want {
			t.Errorf("%+v: remembered for %s, %v; want %s", tt.who, ttl, err, tt.want)
		}
	}
}

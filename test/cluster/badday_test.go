package cluster

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/test/registrytest"
)

// TestGoodDay is what the bad ones are measured by.
func TestGoodDay(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{short: true})
	c.pull(c.nodes...).wait(1)
	c.sentAtMost(1.02)
	c.finish()
}

// TestHomeKilled pins that the next home goes on from what the swarm has, and
// that the dead one, when it is back, takes the image from the others.
func TestHomeKilled(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	s := c.pull(c.nodes...)
	home := c.awaitHome()
	home.kill()
	s.abandon(home)
	s.wait(1)
	c.sentAtMost(1.5) // or the next home began anew
	home.up()
	c.awaitMembers()
	c.reg.Down()
	c.pull(home).wait(1)
	c.finish()
}

// TestHomeFrozen is a home that is there but does nothing: its connections stay
// open. What it held up goes on without it, and it goes on when it thaws.
func TestHomeFrozen(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	s := c.pull(c.nodes...)
	home := c.awaitHome()
	home.signal(syscall.SIGSTOP)
	t.Cleanup(func() {
		if home.alive() {
			home.signal(syscall.SIGCONT)
		}
	})
	frozen := s.pulls[home]
	delete(s.pulls, home) // nobody pulls through a frozen agent
	s.wait(1)
	home.signal(syscall.SIGCONT)
	s.pulls = map[*node]*pulling{home: frozen}
	s.wait(2)
	c.awaitMembers()
	c.finish()
}

// TestSlowToAnswer is a registry that fetches a blob itself before it answers, which
// takes longer than a request may wait for its first byte. It is asked once.
func TestSlowToAnswer(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{nodes: 4, layers: []int64{4 * mb, 1 * mb}})
	blobs := registrytest.Match{Kind: registrytest.Blob, Method: http.MethodGet}
	c.reg.Inject(blobs, registrytest.Delay(12*time.Second))
	s := c.pull(c.nodes...)
	c.calm()
	s.wait(1)
	c.sentAtMost(1.02)
	if got := c.reg.Count(blobs); got != len(c.img.Blobs) {
		t.Errorf("%d requests for %d blobs", got, len(c.img.Blobs))
	}
	c.finish()
}

// TestSlowHome is a home that gets from the registry a hundredth of what everybody else
// could: nothing stalls, and all would wait 41 s for what takes one of the others one.
func TestSlowHome(t *testing.T) {
	t.Parallel()
	w := newNetwork(t)
	c := newCluster(t, options{net: w, layers: []int64{40 * mb, 1 * mb}, uplink: 100 * mb})
	home := slices.MaxFunc(c.nodes, func(a, b *node) int { return cmp.Compare(score(c.layer(), a.name), score(c.layer(), b.name)) })
	w.narrow(t, c.hosts(home)[0], 1*mb)
	s := c.pull(c.nodes...)
	s.wait(1)
	s.within(25 * time.Second) // 5 s were seen
	c.sentAtMost(1.3)
	c.finish()
}

// TestPoorUplink is an uplink that brings three layers so slowly that a piece takes
// longer than a request may wait for its first byte, and longer than a body may stall:
// nobody who waits for the home goes to the registry as well.
func TestPoorUplink(t *testing.T) {
	t.Parallel()
	const layer = 520_000 // two pieces, each 22 s
	c := newCluster(t, options{nodes: 4, layers: []int64{layer, layer, layer}, uplink: 36_000})
	s := c.pull(c.nodes...)
	c.calm()
	s.wait(1)
	c.sentAtMost(1.02)
	c.finish()
}

// TestNewNodesBehindPoorUplink is nodes that come in the middle of a slow pull and start
// the same image. They are homes of some of its blobs, all three even, and wait for the
// one that was home before. Until they pull there is work to do: an agent that gets no processor
// for two seconds, while other tests and four more agents start, is taken for dead as home, and the
// next one fetches that layer too.
func TestNewNodesBehindPoorUplink(t *testing.T) {
	t.Parallel()
	const layer = 2 * mb
	c := newCluster(t, options{nodes: 4, layers: []int64{layer, layer, layer}, uplink: 240_000}) // 25 s
	s := c.pull(c.nodes...)
	c.awaitSent(0.2)
	var late []*node
	for range 4 {
		late = append(late, c.newcomer())
	}
	after := c.pull(late...)
	c.calm()
	after.wait(1)
	s.wait(1)
	c.sentAtMost(1.2)
	c.finish()
}

// TestEveryHolderKilled takes away all who had the image while others fetch it
// from them.
func TestEveryHolderKilled(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{flags: []string{"--peer.max_upload_bytes_per_second=4MiB"}})
	holders := c.nodes[:2]
	c.pull(holders...).wait(1)
	// Where the home is not a holder, it has the blob all the same.
	for _, n := range c.nodes[2:] {
		if n.has(c.layer()) {
			holders = append(slices.Clone(holders), n)
		}
	}
	s := c.pull(c.but(holders...)...)
	eventually(t, "fetching from the holders", func() error {
		for n := range s.pulls {
			if _, peers := n.fill(c.layer()); peers > 1*mb {
				return nil
			}
		}
		return errors.New("no bytes from peers")
	})
	for _, n := range holders {
		n.kill()
	}
	s.wait(1)
	c.finish()
}

// TestRegistryDiesAndComesBack interrupts the one copy in its middle.
func TestRegistryDiesAndComesBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	s := c.pull(c.nodes...)
	c.awaitSent(0.5)
	c.reg.Down()
	eventually(t, "missed", func() error {
		for _, n := range c.nodes {
			for _, u := range n.status().Upstreams {
				if u.Failures > 0 {
					return nil
				}
			}
		}
		return errors.New("no agent has noticed")
	})
	if err := c.reg.Up(); err != nil {
		t.Fatal(err)
	}
	s.wait(10) // a pull may fail while there is no registry
	c.finish()
}

// TestRegistryDiesForGood takes the registry away as soon as every byte is
// somewhere; the nodes have to get them from each other.
func TestRegistryDiesForGood(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{uplink: 24 * mb, flags: []string{"--peer.max_upload_bytes_per_second=3MiB"}})
	s := c.pull(c.nodes...)
	eventually(t, "all in the swarm", func() error {
		for d := range c.img.Blobs {
			if !slices.ContainsFunc(c.nodes, func(n *node) bool { return n.has(d) }) {
				return fmt.Errorf("nobody has all of %s", d)
			}
		}
		return nil
	})
	c.reg.Down()
	if n := s.underWay(); n < 3 {
		t.Errorf("only %d pulls were under way: nothing was tested", n)
	}
	s.wait(1)
	c.finish()
}

// TestDiskFullInTheMiddle fills the home's disk while it fetches for all. The
// cache has set the blob's blocks aside, so that it can go on.
func TestDiskFullInTheMiddle(t *testing.T) {
	t.Parallel()
	needRoot(t)
	c := newCluster(t, options{smallDisks: "64m"})
	s := c.pull(c.nodes...)
	home := c.awaitHome()
	fillDisk(t, home.cache())
	s.wait(1)
	c.finish()
}

// TestDiskFullFromTheStart is a home whose disk takes nothing more before anybody
// asks it.
func TestDiskFullFromTheStart(t *testing.T) {
	t.Parallel()
	needRoot(t)
	c := newCluster(t, options{smallDisks: "64m"})
	home := c.beginAgain()
	c.upAll()
	fillDisk(t, home.cache())
	c.pull(c.nodes...).wait(1)
	if home.has(c.layer()) {
		t.Error("the home found room; nothing was tested")
	}
	c.finish()
}

// beginAgain pulls once to find out who is the large layer's home, and stops all
// agents and has them forget it. Names decide, so it will be the home again.
func (c *cluster) beginAgain() (home *node) {
	c.t.Helper()
	s := c.pull(c.nodes...)
	home = c.awaitHome()
	s.wait(1)
	for _, n := range c.nodes {
		n.stop()
		n.forget()
	}
	c.reg.ResetCounts()
	return home
}

// fillDisk writes to dir until nothing more fits.
func fillDisk(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := io.Copy(f, zeroes{})
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("after %d bytes: %v", n, err)
	}
}

// zeroes never ends.
type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// TestNoRoomOnTheHome is a home whose cache is too small for the blob from the
// start: the next home takes over, and the home's own pulls pass through.
func TestNoRoomOnTheHome(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{})
	home := c.beginAgain()
	home.flags = append(home.flags, "--cache.max_bytes=4MiB")
	c.upAll()
	c.pull(c.nodes...).wait(1)
	if home.has(c.layer()) {
		t.Error("the home found room; nothing was tested")
	}
	c.finish()
}

// TestWrongKey is a node that knows where the others are, but not their secret.
func TestWrongKey(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{nodes: 4})
	members := c.nodes
	stranger := c.add()
	stranger.key = c.newKey("wrong")
	stranger.up()
	stranger.rest()
	c.pull(c.nodes...).wait(1)
	if st := stranger.status(); st.Fetched["peer"] != 0 || st.Uploaded != 0 || len(st.Members) != 1 {
		t.Errorf("the stranger got %v, gave %d bytes and sees %v", st.Fetched, st.Uploaded, st.Members)
	}
	for _, n := range members {
		if got := n.members(); slices.Contains(got, stranger.name) {
			t.Errorf("%s sees %v", n.name, got)
		}
	}
	c.finish()
}

// TestNewAddress pins that a node may come back under its name elsewhere, as
// pods do, and is found there: it is the only one that has the image, and that
// knows what the tag stood for.
func TestNewAddress(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{nodes: 4})
	owner := c.nodes[3]
	c.pull(owner).wait(1)
	for _, n := range c.nodes[:3] { // homes may have fetched for it
		n.stop()
		n.forget()
	}
	owner.kill()
	before := owner.ip
	c.place(owner, 100)
	c.upAll()
	for _, n := range c.nodes[:3] {
		for _, m := range n.status().Members {
			if m.Name == owner.name && m.Address != owner.addr(owner.ip, 1) {
				t.Errorf("%s believes that %s is at %s; it went from %s to %s", n.name, m.Name, m.Address, before, owner.ip)
			}
		}
	}
	for _, n := range c.nodes[:3] {
		n.awaitIndexed(1 + len(c.img.Blobs) + len(c.img.Manifests))
	}
	c.reg.Down()
	c.pull(c.nodes...).wait(1)
	c.finish()
}

// TestRollingRestart is an update of the DaemonSet in the middle of a storm of
// several images.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{layers: []int64{4 * mb, 1 * mb}, more: 7, uplink: 4 * mb})
	s := c.pull(c.nodes...)
	c.awaitSent(0.1)
	for i, n := range c.nodes {
		n.stop()
		t.Logf("%d agents stopped; %d pulls under way, %.2f copies", i+1, s.underWay(), c.copies())
		n.up()
	}
	s.wait(1)
	c.awaitMembers()
	c.finish()
}

// TestLateJoinerWithoutRegistry pins that the swarm alone is enough.
func TestLateJoinerWithoutRegistry(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{nodes: 4, uplink: 50 * mb})
	c.pull(c.nodes...).wait(1)
	c.reg.Down()
	late := c.newcomer()
	c.awaitMembers()
	c.pull(late).wait(1)
	if st := late.status(); st.Fetched["upstream"] != 0 || st.Fetched["peer"] < c.size {
		t.Errorf("the late node fetched %v", st.Fetched)
	}
	if got := c.reg.Count(registrytest.Match{Kind: registrytest.Blob}); got == 0 {
		t.Error("the registry was never asked; nothing was tested")
	}
	c.finish()
}

// TestNodeLost loses, for good, the one node that pulled or imported something: all of
// that is on one more node by then, tags too, and the others start from it without a
// registry.
func TestNodeLost(t *testing.T) {
	for name, bring := range map[string]func(c *cluster, n *node){
		"pulled": func(c *cluster, n *node) { c.pull(n).wait(1) },
		"imported": func(c *cluster, n *node) {
			c.reg.Down()
			if err := n.importTar(bytes.NewReader(c.bundle()), func(agent.ImportEvent) bool { return true }); err != nil {
				c.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, options{nodes: 4, uplink: 50 * mb, layers: []int64{5 * mb, 1 * mb, 200_000, 100_000, 20_000}, sent: 1})
			only := c.nodes[0]
			bring(c, only)
			c.calm()
			eventually(t, "all of it elsewhere too", func() error {
				if s := only.status().Replicas; s.Lacking > 0 || s.Made == 0 {
					return fmt.Errorf("%+v", s)
				}
				return nil
			})
			only.kill()
			c.reg.Down()
			c.awaitMembers()
			c.pull(c.but(only)...).wait(1)
			c.finish()
		})
	}
}

package cluster

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/test/registrytest"
)

// A test cannot make a real agent lie, but it can give it a disk, a registry or a
// link that makes it a bad peer.

// oneRequest is layers that a home asks its registry for in one request each.
var oneRequest = []int64{12 * mb, 4 * mb}

// TestRottenHolder is a disk that rots under a node that has the image and has
// signed for its pieces: those who take it from there notice, piece by piece, and
// turn to others, or to the registry where there are none.
func TestRottenHolder(t *testing.T) {
	for name, day := range map[string]struct{ beside, restarted bool }{
		"alone":            {},
		"alone, restarted": {restarted: true},
		"beside another":   {beside: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, options{layers: oneRequest})
			rotten := c.seedHome()
			others := c.but(rotten)
			if day.beside {
				c.pull(others[0]).wait(1)
				others = others[1:]
				c.withoutRegistry(others)
			}
			c.rot(rotten)
			if day.restarted {
				rotten.stop()
				rotten.up()
				c.awaitMembers()
			}
			c.pull(others...).wait(1)
			if banned := c.banned(rotten); banned == day.restarted {
				t.Errorf("banned by others: %v; want that unless it hashed the file again", banned)
			}
			c.rot(rotten) // back to what it was: finish looks at every blob
			c.finish()
		})
	}
}

// seedHome pulls on the large layer's home alone, so that it is the one holder.
func (c *cluster) seedHome() (home *node) {
	c.t.Helper()
	home = c.beginAgain()
	c.upAll()
	c.pull(home).wait(1)
	for _, n := range c.but(home) {
		if n.has(c.layer()) {
			c.t.Fatalf("%s holds the layer too; %s is not its home", n.name, home.name)
		}
	}
	return home
}

// rot flips one byte in each piece of the middle half of the large layer, on the
// disk of n. Twice is never.
func (c *cluster) rot(n *node) {
	c.t.Helper()
	name := filepath.Join(n.cache(), "blobs", "sha256", c.layer().Encoded())
	size := c.img.Layers[0].Size
	eventually(c.t, "committed", func() error { // the client has it a moment before
		if !n.has(c.layer()) {
			return errors.New("the layer is not there")
		}
		return nil
	})
	err := os.Chmod(name, 0o600)
	f, oerr := os.OpenFile(name, os.O_RDWR, 0)
	if err := errors.Join(err, oerr); err != nil {
		c.t.Fatal(err)
	}
	defer f.Close()
	var p [1]byte
	for off := size / 4; off < 3*size/4; off += cache.PieceSize(size) {
		_, err := f.ReadAt(p[:], off)
		p[0] ^= 0xff
		_, werr := f.WriteAt(p[:], off)
		if err := errors.Join(err, werr); err != nil {
			c.t.Fatal(err)
		}
	}
}

// withoutRegistry takes the registry away once these nodes know what others hold.
func (c *cluster) withoutRegistry(nodes []*node) {
	c.t.Helper()
	for _, n := range nodes {
		n.awaitIndexed(1 + len(c.img.Blobs) + len(c.img.Manifests))
	}
	c.reg.Down()
}

// banned reports whether any node has banned n.
func (c *cluster) banned(n *node) bool {
	for _, other := range c.but(n) {
		for _, m := range other.status().Members {
			if m.Name == n.name && !m.BannedUntil.IsZero() {
				return true
			}
		}
	}
	return false
}

// TestCorruptEnd is a home that gets a wrong byte from the registry, once, in what
// no runtime is given before the whole digest has matched: no pull notices. The
// registry's copies are counted with the wrong one.
func TestCorruptEnd(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{layers: oneRequest})
	corrupt := c.corruptOnce(c.img.Layers[0].Size - 1)
	c.pull(c.nodes...).wait(1)
	if n := corrupt.Hits(); n != 1 {
		t.Errorf("%d answers were corrupt", n)
	}
	c.finish()
}

// TestCorruptMiddle is the same where runtimes have the wrong byte before anybody can
// know. It ends their pull, as it would have without a mirror, and not the next, for
// which the layer is fetched once more for all of them.
func TestCorruptMiddle(t *testing.T) {
	t.Parallel()
	const nodes = 5
	c := newCluster(t, options{nodes: nodes, layers: oneRequest})
	corrupt := c.corruptOnce(c.img.Layers[0].Size / 2)
	failed := 0
	for _, err := range c.pullOnce() {
		if err == nil {
			continue
		}
		failed++
		if !strings.Contains(err.Error(), "unexpected commit digest") {
			t.Errorf("first pull: %v", err)
		}
	}
	if n := corrupt.Hits(); n != 1 || failed == 0 {
		t.Errorf("%d answers were corrupt and %d pulls failed; nothing was tested", n, failed)
	}
	if err := errors.Join(c.pullOnce()...); err != nil {
		t.Errorf("second pull: %v", err)
	}
	t.Logf("%d of %d first pulls failed; %.2f copies", failed, nodes, c.copies())
	c.finish()
}

// corruptOnce flips a byte of the large layer in the registry's first answer.
func (c *cluster) corruptOnce(off int64) *registrytest.Fault {
	return c.reg.Inject(registrytest.Match{Method: "GET", Reference: c.layer().String()},
		registrytest.Times(1), registrytest.CorruptAt(off))
}

// pullOnce pulls on all nodes, as a containerd whose garbage collection is done with
// what a failed pull left.
func (c *cluster) pullOnce() []error {
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	errs := make([]error, len(c.nodes))
	var pulls sync.WaitGroup
	for i, n := range c.nodes {
		pulls.Go(func() {
			runtime := n.containerd()
			runtime.KeepIngests = false
			_, errs[i] = runtime.Pull(ctx, c.refs[0], nil)
		})
	}
	pulls.Wait()
	return errs
}

// TestSlowHolder is a holder that gives right bytes, but so slowly that the large layer
// takes three minutes; another has the image too, and the registry is down.
func TestSlowHolder(t *testing.T) {
	t.Parallel()
	const rate = "64KiB" // more than a link needs that is not taken for dead
	// What is asked of the slow one before anybody knows takes longer than this.
	const most = 20 * time.Second
	c := newCluster(t, options{layers: oneRequest})
	slow := c.seedHome()
	fast := c.but(slow)[0]
	c.pull(fast).wait(1)
	slow.stop()
	slow.flags = append(slow.flags, "--peer.max_upload_bytes_per_second="+rate)
	slow.up()
	c.awaitMembers()
	others := c.but(slow, fast)
	c.withoutRegistry(others)
	s := c.pull(others...)
	s.wait(2)      // on a busy machine the slow one is found out after the proxies' 5 s
	s.within(most) // or it waited for the slow one
	if slow.status().Uploaded == 0 {
		t.Error("nobody asked the slow one; nothing was tested")
	}
	c.finish()
}

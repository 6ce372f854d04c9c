package cluster

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/test/registrytest"
)

// What everybody pulls. The name resolves nowhere: hosts.toml says where it is.
const (
	registryName = "registry.test"
	repository   = "library/app"
)

const mb = 1_000_000

// options of a cluster; the zero value is 5 nodes and 24 MB at 8 MB/s.
type options struct {
	nodes  int
	layers []int64
	// more images of the same size, with the tags 2, 3...; they are pulled one
	// after another.
	more   int
	uplink int64 // bytes per second of the registry
	flags  []string
	auth   registrytest.Auth
	net    *network      // nil: loopback
	try    time.Duration // after which a pull is ended and tried again; 0 = patience
	tries  int           // that the pulls of a node have time for, if try is set; 0 = those within patience
	sent   float64       // copies that the registry may send, if not copiesMost; -1 = any number
	// smallDisks, if set, gives each cache a file system of that size.
	smallDisks string
	short      bool // also with -short
	// program is run instead of larder, with the environment of each node.
	program string
	env     [][]string
}

// cluster is a registry with an image, and nodes that know each other.
type cluster struct {
	t    *testing.T
	opts options
	reg  *registrytest.Server
	img  *registrytest.Image // the first
	refs []string            // of all images
	size int64               // of all blobs
	// content is size and the manifests.
	content int64
	dir     string
	octet   int
	nodes   []*node
	rogues  []string // members that are no agents
	joined  int      // how many have been there
	calm    func()   // gives the token of busy back
}

// clusters numbers the tests' clusters, so that they can run side by side.
var clusters atomic.Int32

// busy holds a token for each cluster that has work to do. Every test is
// parallel; those that only wait for leases to run out need no processor.
var busy = make(chan struct{}, 3)

func newCluster(t *testing.T, o options) *cluster {
	t.Helper()
	if o.nodes == 0 {
		o.nodes = 5
	}
	if o.layers == nil {
		o.layers = []int64{20 * mb, 4 * mb}
	}
	if o.uplink == 0 {
		o.uplink = 8 * mb
	}
	if testing.Short() && !o.short {
		t.Skip("one day is enough for -short")
	}
	busy <- struct{}{}
	c := &cluster{t: t, opts: o, dir: t.TempDir(), octet: int(clusters.Add(1))}
	c.calm = sync.OnceFunc(func() { <-busy })
	t.Cleanup(c.calm)
	c.startRegistry()
	c.newKey("key")
	t.Cleanup(c.cleanup)
	for range o.nodes {
		c.add().up()
	}
	c.awaitMembers()
	for _, n := range c.nodes {
		n.rest()
	}
	return c
}

func (c *cluster) startRegistry() {
	c.t.Helper()
	opts := registrytest.Options{Auth: c.opts.auth}
	if c.opts.net != nil {
		opts.Listener = c.opts.net.listen(c.t, 0, net.JoinHostPort(address(0), "5000"))
	}
	c.reg = registrytest.Start(c.t, opts)
	c.reg.SetRate(0, c.opts.uplink)
	for i := range 1 + c.opts.more {
		img := registrytest.OCIImage(registrytest.ImageSpec{Seed: c.seed(i), Layers: c.opts.layers, Opaque: true})
		c.reg.Put(repository, img, strconv.Itoa(i+1))
		c.refs = append(c.refs, fmt.Sprintf("%s/%s:%d", registryName, repository, i+1))
		c.content += img.Size
		for _, b := range img.Blobs {
			c.size += b.Size()
		}
		if i == 0 {
			c.img = img
		}
	}
	c.content += c.size
}

// seed makes the images of each cluster its own; who is whose home goes with it.
// LARDER_CLUSTER_SEED gives others, for the one bad day in ten.
func (c *cluster) seed(image int) uint64 {
	c.t.Helper()
	base := 0
	if s := os.Getenv("LARDER_CLUSTER_SEED"); s != "" {
		var err error
		if base, err = strconv.Atoi(s); err != nil {
			c.t.Fatalf("LARDER_CLUSTER_SEED: %v", err)
		}
	}
	return uint64(base)<<20 + uint64(c.octet<<8+image)
}

// newKey writes a cluster key of its own to a file.
func (c *cluster) newKey(file string) string {
	c.t.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	file = filepath.Join(c.dir, file)
	if err := os.WriteFile(file, []byte(base64.StdEncoding.EncodeToString(key)+"\n"), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return file
}

// add prepares one more node, which is down.
func (c *cluster) add() *node {
	c.t.Helper()
	i := len(c.nodes) + 1
	n := &node{
		t: c.t, name: fmt.Sprintf("node-%d", i), dir: filepath.Join(c.dir, fmt.Sprintf("node-%d", i)),
		key: filepath.Join(c.dir, "key"), flags: slices.Clone(c.opts.flags),
		program: cmp.Or(c.opts.program, larder), try: c.opts.try,
	}
	if i <= len(c.opts.env) {
		n.env = c.opts.env[i-1]
	}
	c.place(n, i)
	n.admin = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: n.dial, DisableKeepAlives: true}}
	for _, other := range c.nodes[:min(2, len(c.nodes))] {
		n.join = append(n.join, other.gossip())
	}
	n.writeHosts(c.reg.URL())
	if c.opts.smallDisks != "" {
		n.mount(c.opts.smallDisks)
	}
	c.nodes = append(c.nodes, n)
	return n
}

// newcomer adds a node, which is up.
func (c *cluster) newcomer() *node {
	c.t.Helper()
	n := c.add()
	n.up()
	n.rest()
	return n
}

// upAll starts every agent and waits until they know each other.
func (c *cluster) upAll() {
	c.t.Helper()
	for _, n := range c.nodes {
		n.up()
	}
	c.awaitMembers()
}

// place gives n an address: one of 127.0.0.0/8, or a network namespace.
func (c *cluster) place(n *node, host int) {
	c.t.Helper()
	if w := c.opts.net; w != nil {
		w.attach(c.t, host)
		n.ip, n.local, n.port = address(host), "127.0.0.1", 5050
		n.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			return w.dial(ctx, host, network, addr)
		}
		n.start = func(cmd *exec.Cmd) error { return w.inside(host, cmd.Start) }
		return
	}
	// Other runs of these tests may be under way on this machine.
	pid := os.Getpid()
	n.ip = fmt.Sprintf("127.%d.%d.%d", 1+pid%250, c.octet, host)
	n.local, n.port = n.ip, 10000+pid/250%4000*4
	n.dial, n.start = new(net.Dialer).DialContext, (*exec.Cmd).Start
}

// cleanup ends what a failed test left running and shows the logs.
func (c *cluster) cleanup() {
	for _, n := range c.nodes {
		if n.alive() {
			_ = n.cmd.Process.Kill() // it may end by itself meanwhile
			<-n.exited
		}
		if c.t.Failed() {
			log := n.log()
			c.t.Logf("%s said last:\n%s", n.name, tail(log, 4000))
			c.keepLog(n.name, log)
		}
	}
}

// tail is the end of a log, without what says that the agent is there.
func tail(log string, size int) string {
	var said []string
	for line := range strings.Lines(log) {
		if !strings.Contains(line, "kind=ping") {
			said = append(said, line)
		}
	}
	log = strings.Join(said, "")
	return log[max(0, len(log)-size):]
}

// keepLog saves a whole log where LARDER_CLUSTER_LOGS says, if it does.
func (c *cluster) keepLog(name, log string) {
	dir := os.Getenv("LARDER_CLUSTER_LOGS")
	if dir == "" {
		return
	}
	file := filepath.Join(dir, strings.ReplaceAll(c.t.Name(), "/", "_")+"-"+name+".log")
	if err := os.WriteFile(file, []byte(log), 0o644); err != nil {
		c.t.Log(err)
	}
}

// awaitMembers waits until each node that is up sees all that are, and only those.
func (c *cluster) awaitMembers() {
	c.t.Helper()
	var want []string
	for _, n := range c.nodes {
		if n.alive() {
			want = append(want, n.name)
		}
	}
	c.awaitView(want, want...)
}

// awaitView waits until the nodes named see exactly those in want.
func (c *cluster) awaitView(want []string, of ...string) {
	c.t.Helper()
	for _, name := range of {
		n := c.node(name)
		eventually(c.t, name+" in a cluster", func() error {
			got := n.members()
			slices.Sort(got)
			if !slices.Equal(got, want) {
				return fmt.Errorf("%s sees %v, want %v", name, got, want)
			}
			return nil
		})
	}
}

func (c *cluster) node(name string) *node {
	c.t.Helper()
	i := slices.IndexFunc(c.nodes, func(n *node) bool { return n.name == name })
	if i < 0 {
		c.t.Fatalf("no %s", name)
	}
	return c.nodes[i]
}

// but lists the nodes without some.
func (c *cluster) but(without ...*node) (out []*node) {
	for _, n := range c.nodes {
		if !slices.Contains(without, n) {
			out = append(out, n)
		}
	}
	return out
}

// rest notes what the agent has open while it does nothing.
func (n *node) rest() {
	n.t.Helper()
	var err error
	if n.idle, err = n.resources(); err != nil {
		n.t.Fatalf("%s: %v", n.name, err)
	}
}

// storm is pulls under way on many nodes.
type storm struct {
	c     *cluster
	begun time.Time
	bytes int64 // of what each node pulls
	pulls map[*node]*pulling
}

type pulling struct {
	done   chan struct{}
	cancel context.CancelFunc
	// What came of it, after done.
	took  time.Duration
	tries int // for the image that needed most
	bytes int64
	err   error
	fails []error // of tries that failed
}

// pull starts pulling all images on each of the nodes. As kubelet does, each tries again
// when it fails.
func (c *cluster) pull(nodes ...*node) *storm { return c.pullRefs(c.refs, nodes...) }

func (c *cluster) pullRefs(refs []string, nodes ...*node) *storm {
	s := &storm{c: c, begun: time.Now(), bytes: c.content / int64(len(c.refs)) * int64(len(refs)), pulls: map[*node]*pulling{}}
	for _, n := range nodes {
		ctx, cancel := context.WithTimeout(c.t.Context(), max(patience, time.Duration(c.opts.tries)*c.opts.try))
		p := &pulling{done: make(chan struct{}), cancel: cancel}
		s.pulls[n] = p
		go func() {
			defer close(p.done)
			defer cancel()
			for _, ref := range refs {
				p.run(ctx, n, ref)
			}
			p.took = time.Since(s.begun)
		}()
	}
	c.t.Cleanup(func() {
		for _, p := range s.pulls {
			p.cancel()
			<-p.done
		}
	})
	return s
}

// retryPull is how long a pull that failed rests: kubelet begins with 10 s,
// which would only make the tests longer.
const retryPull = 500 * time.Millisecond

func (p *pulling) run(ctx context.Context, n *node, ref string) {
	for tries := 1; ; tries++ {
		p.tries = max(p.tries, tries)
		tctx, stop := context.WithTimeout(ctx, cmp.Or(n.try, patience))
		r, err := n.containerd().Pull(tctx, ref, nil)
		stop()
		if p.err = err; err == nil {
			p.bytes += r.Bytes
			return
		}
		if ctx.Err() != nil {
			return
		}
		p.fails = append(p.fails, err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryPull):
		}
	}
}

// abandon gives up the pull of a node that is gone.
func (s *storm) abandon(n *node) {
	if p := s.pulls[n]; p != nil {
		p.cancel()
		<-p.done
		delete(s.pulls, n)
	}
}

// underWay is how many pulls have not ended.
func (s *storm) underWay() (n int) {
	for _, p := range s.pulls {
		select {
		case <-p.done:
		default:
			n++
		}
	}
	return n
}

// wait returns when every pull has finished, each within so many tries.
func (s *storm) wait(tries int) {
	t := s.c.t
	t.Helper()
	for n, p := range s.pulls {
		<-p.done
		if p.err != nil {
			t.Errorf("%s: after %v and %d tries: %v", n.name, p.took, p.tries, p.err)
			continue
		}
		if p.bytes != s.bytes {
			t.Errorf("%s: %d of %d bytes", n.name, p.bytes, s.bytes)
		}
		if p.tries > tries {
			t.Errorf("%s needed %d tries, want %d: %v", n.name, p.tries, tries, errors.Join(p.fails...))
		}
		for _, err := range p.fails {
			if strings.Contains(err.Error(), "unexpected commit digest") {
				t.Errorf("%s: a wrong byte came through: %v", n.name, err)
			}
		}
	}
	s.report()
}

// within fails for each pull that took longer.
func (s *storm) within(most time.Duration) {
	s.c.t.Helper()
	for n, p := range s.pulls {
		if p.took > most {
			s.c.t.Errorf("%s took %v, want %v at most", n.name, p.took, most)
		}
	}
}

// report says what was seen.
func (s *storm) report() {
	var slowest time.Duration
	tries := 0
	for _, p := range s.pulls {
		slowest, tries = max(slowest, p.took), max(tries, p.tries)
	}
	s.c.t.Logf("%d pulls, slowest %.1f s, at most %d tries; %.2f copies so far", len(s.pulls), slowest.Seconds(), tries, s.c.copies())
}

// copies of the image that the registry has sent.
func (c *cluster) copies() float64 {
	return float64(c.reg.Bytes(registrytest.Match{Kind: registrytest.Blob})) / float64(c.size)
}

// sentAtMost fails if the registry has sent more copies.
func (c *cluster) sentAtMost(copies float64) {
	c.t.Helper()
	if got := c.copies(); got > copies {
		c.t.Errorf("the registry sent %.2f copies, want %.2f at most", got, copies)
	}
}

// awaitSent waits until the registry has sent so many copies.
func (c *cluster) awaitSent(copies float64) {
	c.t.Helper()
	eventually(c.t, "sent by the registry", func() error {
		if got := c.copies(); got < copies {
			return fmt.Errorf("%.2f of %.2f copies sent", got, copies)
		}
		return nil
	})
}

// layer is the digest of the large layer.
func (c *cluster) layer() digest.Digest { return c.img.Layers[0].Digest }

// awaitHome waits until a node has fetched some, but not most, of the large
// layer from the registry, and others have pieces of it too.
func (c *cluster) awaitHome() (home *node) {
	c.t.Helper()
	least := c.img.Layers[0].Size / 4
	eventually(c.t, "in the middle of a blob", func() error {
		home = nil
		spread := false
		for _, n := range c.nodes {
			upstream, peers := n.fill(c.layer())
			if upstream > least {
				home = n
			}
			spread = spread || peers > 0
		}
		if home == nil || !spread {
			return fmt.Errorf("home %v, pieces elsewhere: %v; %.2f copies sent", home != nil, spread, c.copies())
		}
		return nil
	})
	c.t.Logf("%s is home; %.2f copies sent", home.name, c.copies())
	return home
}

// copiesMost is two copies, each with the hundredth that one may cost on a good
// day: a range that is asked for, and given up when peers turn out to have it.
const copiesMost = 2 * 1.02

// finish checks that nothing is left behind, ends every agent, and looks at what
// they leave.
func (c *cluster) finish() {
	c.t.Helper()
	c.calm()
	if got, most := c.copies(), cmp.Or(c.opts.sent, copiesMost); most > 0 && got > most {
		c.t.Errorf("the registry sent %.3f copies", got)
	}
	for _, n := range c.nodes {
		if n.alive() {
			eventually(c.t, n.name+" as it was before", n.leaks)
		}
	}
	for _, n := range c.nodes {
		if n.alive() {
			n.stop()
		}
		n.checkLog()
		n.checkCache()
	}
}

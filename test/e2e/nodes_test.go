package e2e

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// clusterImages is the name under which images of the cluster's registry go.
const clusterImages = "plain.test"

// cluster is three nodes and a registry, each in its own network namespace on one
// bridge.
type cluster struct {
	t     *testing.T
	r     *registry
	nodes []*node
	key   string // peer.key_file
}

// node is a machine of a cluster: containerd and, once started, an agent.
type node struct {
	host
	name string
	c    *containerd
	a    *agent
}

const clusterSize = 3

func newCluster(t *testing.T) *cluster {
	t.Helper()
	return newClusterOf(t, func(h host) *registry { return startRegistryOn(t, h) })
}

// newClusterOf is a cluster with a registry of the caller's.
func newClusterOf(t *testing.T, start func(host) *registry) *cluster {
	t.Helper()
	network := newNetwork(t)
	dir := tempDir(t)
	c := &cluster{t: t, r: start(network.attach())}
	key := make([]byte, 32)
	rand.Read(key)
	c.key = writeFile(t, filepath.Join(dir, "key"), base64.StdEncoding.EncodeToString(key)+"\n")
	for i := range clusterSize {
		n := &node{host: network.attach(), name: fmt.Sprintf("node-%d", i+1)}
		bin := n.program(t, containerd2.bin(t))
		n.c = startContainerd(t, containerdVersion{
			name: containerd2.name + "-" + n.name, config: containerd2.config, bin: func(*testing.T) string { return bin },
		})
		writeHostsTOML(t, n.c.certs, clusterImages, c.r)
		c.nodes = append(c.nodes, n)
	}
	return c
}

// startRegistryOn runs a registry on a host that lets in everybody.
func startRegistryOn(t *testing.T, h host) *registry {
	t.Helper()
	dir := tempDir(t)
	r := &registry{t: t, kind: distV3.on(t, h), greets: http.StatusOK, addr: net.JoinHostPort(h.addr, "5000")}
	r.config = writeFile(t, filepath.Join(dir, "config.yml"), fmt.Sprintf(
		"version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: %s\nhttp:\n  addr: %s\n",
		filepath.Join(dir, "storage"), r.addr))
	r.start()
	return r
}

// startPrivateRegistryOn runs a registry on a host that lets in ann alone.
func startPrivateRegistryOn(t *testing.T, h host) *registry {
	t.Helper()
	return startGuarded(t, distV3.on(t, h), net.JoinHostPort(h.addr, "5000"), annAlone(t), basicAnn)
}

// on is a registry that runs on a host.
func (k registryKind) on(t *testing.T, h host) registryKind {
	t.Helper()
	bin := h.program(t, k.bin(t))
	k.bin, k.dial = func(*testing.T) string { return bin }, h.dial
	return k
}

// startAgents runs an agent on every node, with flags of the node's own, and
// waits until each sees all the others.
func (c *cluster) startAgents(flags func(*node) []string) {
	c.t.Helper()
	for _, n := range c.nodes {
		own := []string{"--peer.enabled=true", "--peer.name", n.name, "--peer.advertise", n.addr, "--peer.key_file", c.key,
			"--peer.gossip", n.addr + ":5052", "--peer.data", n.addr + ":5051",
			"--peer.join", c.nodes[0].addr + ":5052," + c.nodes[1].addr + ":5052"}
		n.a = startAgent(c.t, agentOptions{containerd: n.c, bin: n.program(c.t, run.larder), dial: n.dial,
			flags: append(own, flags(n)...)})
	}
	for _, n := range c.nodes {
		n.awaitMetric(c.t, "larder_peer_members", func(v float64) bool { return v == clusterSize })
	}
	c.t.Cleanup(c.report)
}

func (n *node) awaitMetric(t *testing.T, name string, enough func(float64) bool) {
	t.Helper()
	eventually(t, 30*time.Second, n.name+" knows the others", func() error {
		if v := n.a.metric(name); !enough(v) {
			return fmt.Errorf("%s is %v", name, v)
		}
		return nil
	})
}

// report shows how every agent sees the world when a test has failed; the
// processes' logs follow.
func (c *cluster) report() {
	if !c.t.Failed() {
		return
	}
	for _, n := range c.nodes {
		status, err := n.a.get("/api/v1/status")
		c.t.Logf("%s: %s %v", n.name, status, err)
	}
}

// on is a cluster whose failures belong to a subtest.
func (c cluster) on(t *testing.T) *cluster {
	c.t = t
	nodes := c.nodes
	c.nodes = nil
	for _, n := range nodes {
		own, here := *n, *n.c
		here.t, own.c = t, &here
		c.nodes = append(c.nodes, &own)
	}
	return &c
}

func (c *cluster) push(kind imageKind, repository string, seed uint64) (p pushed, ref string) {
	c.t.Helper()
	// One piece, just above one, and many: 12 MiB are 48 pieces.
	p = c.r.push(kind, repository, seed, 4<<10, 300<<10, 12<<20)
	return p, clusterImages + "/" + p.repository + ":" + p.tag
}

// during is what the registry was asked for while do ran, by others than the test.
func (c *cluster) during(do func()) accessList {
	c.t.Helper()
	return slices.DeleteFunc(c.r.during(do), func(a access) bool { return strings.HasPrefix(a.path, "/v2/?mark=") })
}

// pullAt pulls on these nodes (from 1) one after the other, and returns what the
// registry saw meanwhile.
func (c *cluster) pullAt(ref string, nodes ...int) accessList {
	c.t.Helper()
	return c.during(func() {
		for _, i := range nodes {
			n, start := c.nodes[i-1], time.Now()
			n.c.mustPull(ref)
			c.t.Logf("%s: %s in %v", n.name, ref, time.Since(start).Round(time.Millisecond))
		}
	})
}

// pullTogether pulls on these nodes (from 1) in the same moment.
func (c *cluster) pullTogether(ref string, nodes ...int) accessList {
	c.t.Helper()
	return c.during(func() {
		ctx, cancel := context.WithTimeout(c.t.Context(), pullTimeout)
		defer cancel()
		var pulls sync.WaitGroup
		for _, i := range nodes {
			n := c.nodes[i-1]
			pulls.Go(func() {
				start := time.Now()
				if err := n.c.pull(ctx, ref, nil); err != nil {
					c.t.Errorf("%s: pull %s: %v", n.name, ref, err)
				}
				c.t.Logf("%s: %s in %v", n.name, ref, time.Since(start).Round(time.Millisecond))
			})
		}
		pulls.Wait()
	})
}

// wantNothing: the registry must not have been asked at all.
func (c *cluster) wantNothing(seen accessList) {
	c.t.Helper()
	if len(seen) > 0 {
		c.t.Errorf("want no request at the registry, it saw %v", seen)
	}
}

// wantAskedOnce: the registry gave nothing, and agents asked it what a tag stands for,
// and once whether it has each of the rest in that repository (A13 in agent/proxy/DESIGN.md).
func (c *cluster) wantAskedOnce(seen accessList, tag string) {
	c.t.Helper()
	asked := map[string]int{}
	for _, a := range seen {
		path := strings.SplitN(a.path, "?", 2)[0]
		if !strings.HasSuffix(path, "/manifests/"+tag) {
			asked[path]++
		}
		if a.method != http.MethodHead || asked[path] > 1 {
			c.t.Errorf("want each asked for once by HEAD, the registry saw %v", a)
		}
	}
	c.wantThroughAgents(seen)
}

// wantOnce: the registry must have given each blob of one image, and each
// manifest, at most times times, and all of it to agents.
func (c *cluster) wantOnce(seen accessList, blobs, times int) {
	c.t.Helper()
	given := map[string]int{}
	for _, a := range seen {
		given[a.method+" "+strings.SplitN(a.path, "?", 2)[0]]++
	}
	different := 0
	for what, n := range given {
		if strings.Contains(what, "/blobs/") {
			different++
		}
		if n > times {
			c.t.Errorf("%d times %s, want at most %d", n, what, times)
		}
	}
	if different != blobs {
		c.t.Errorf("want each of the %d blobs from the registry: %v", blobs, seen)
	}
	c.wantThroughAgents(seen)
}

func (c *cluster) wantThroughAgents(seen accessList) {
	c.t.Helper()
	wantThroughAgent(c.t, "pull", seen)
}

// originsAt runs `larder explain` on a node: for each part of the image that
// containerd pulled, the nodes or registries that its bytes came from.
func (c *cluster) originsAt(node int, ref string) map[string][]string {
	c.t.Helper()
	n := c.nodes[node-1]
	out, err := exec.Command(n.a.bin, "explain", "--json", "--admin", "http://"+n.a.admin, ref).Output()
	if err != nil {
		c.t.Fatalf("explain on %s: %v", n.name, err)
	}
	origins := origins(c.t, string(out))
	c.t.Logf("explain on %s: %v", n.name, origins)
	return origins
}

// origins reads what `larder explain --json` printed.
func origins(t *testing.T, text string) map[string][]string {
	t.Helper()
	explained := decode[struct {
		Parts []struct {
			Kind, Digest string
			Origins      []struct{ Kind, Name string }
		}
	}](t, text)
	origins := map[string][]string{}
	for _, p := range explained.Parts {
		what := p.Kind + " " + p.Digest
		origins[what] = nil
		for _, o := range p.Origins {
			origins[what] = append(origins[what], o.Kind+" "+o.Name)
		}
	}
	return origins
}

// TestNodes is issue 3's proof with real runtimes: what one node has pulled, the
// others get from it, whether the registry is there or not.
func TestNodes(t *testing.T) {
	c := newCluster(t)
	c.startAgents(func(*node) []string { return []string{"--upstream.tag_ttl", "2m"} })
	t.Run("one after the other", func(t *testing.T) { c.on(t).oneAfterTheOther() })
	t.Run("registry down", func(t *testing.T) { c.on(t).registryDown() })
	t.Run("together", func(t *testing.T) { c.on(t).together() })
	t.Run("agent killed", func(t *testing.T) { c.on(t).agentKilled() })
}

func (c *cluster) oneAfterTheOther() {
	_, ref := c.push(multiArch, "nodes/again", 210)
	c.wantThroughAgents(c.pullAt(ref, 1))
	c.wantNothing(c.pullAt(ref, 2))
	c.wantNothing(c.pullAt(ref, 3))
	// A blob's home had it before node 2 asked: it fetched it for node 1.
	for what, from := range c.originsAt(2, ref) {
		for _, origin := range from {
			if origin == "peer node-2" || (origin != "upstream "+clusterImages && !strings.HasPrefix(origin, "peer node-")) {
				c.t.Errorf("node 2 got %s from %q", what, origin)
			}
		}
		if len(from) == 0 {
			c.t.Errorf("node 2 cannot tell where %s came from", what)
		}
	}
}

func (c *cluster) registryDown() {
	_, ref := c.push(ociImage, "nodes/outage", 220)
	c.wantThroughAgents(c.pullAt(ref, 1))
	c.r.stop()
	defer c.r.start()
	c.pullTogether(ref, 2, 3)
}

func (c *cluster) together() {
	img, ref := c.push(ociImage, "nodes/together", 230)
	c.wantOnce(c.pullTogether(ref, 1, 2, 3), len(img.layers)+1, 1)
}

func (c *cluster) agentKilled() {
	_, old := c.push(ociImage, "nodes/old", 240)
	img, fresh := c.push(ociImage, "nodes/fresh", 250)
	c.wantThroughAgents(c.pullAt(old, 1))
	c.nodes[0].a.kill()
	// Nobody has told the others yet; a blob whose home is gone may cost a second
	// request, and what only node 1 had must come from the registry once more.
	c.wantOnce(c.pullTogether(fresh, 2, 3), len(img.layers)+1, 2)
	c.wantThroughAgents(c.pullTogether(old, 2, 3))
	// containerd on node 1 has a dead mirror, and goes direct.
	if seen := c.pullAt(fresh, 1); len(byRuntime(blobReads(seen))) != len(img.layers)+1 {
		c.t.Errorf("want node 1 to go direct, the registry saw %v", seen)
	}
	c.nodes[0].a.start() // takes its host files back at the end
}

// TestNodesRuntimeStore: what containerd on node 1 holds since before there was
// Larder counts as held. Tags are asked for each time here, and nothing is fetched.
func TestNodesRuntimeStore(t *testing.T) {
	c := newCluster(t)
	img, ref := c.push(multiArch, "nodes/held", 310)
	c.pullAt(ref, 1)
	held := len(c.nodes[0].c.blobs())
	c.startAgents(func(n *node) []string { return append(runtimeStore(n.c), "--upstream.tag_ttl", "0s") })
	for _, n := range c.nodes[1:] {
		n.awaitMetric(t, "larder_index_blobs", func(v float64) bool { return int(v) >= held })
	}
	t.Run("registry up", func(t *testing.T) { c.on(t).heldByRuntime(img, ref) })
	t.Run("registry down", func(t *testing.T) { c.on(t).longOutage() })
}

func (c *cluster) heldByRuntime(img pushed, ref string) {
	c.wantAskedOnce(c.pullAt(ref, 2, 3), img.tag)
	origins := c.originsAt(2, ref)
	for what, from := range origins {
		if !slices.Equal(from, []string{"peer node-1"}) {
			c.t.Errorf("node 2 got %s from %v, want node 1 alone", what, from)
		}
	}
	if len(origins) < len(ordinarySizes)+2 {
		c.t.Errorf("explain on node 2 knows %d parts only", len(origins))
	}
	if n := c.nodes[0].a.metric("larder_cache_bytes"); n > 0 {
		c.t.Errorf("node 1 keeps %v bytes a second time", n)
	}
}

// longOutage: the registry is gone for longer than tags are believed. What node 1
// once pulled by tag has a last known digest, whichever node is the tag's home;
// what it pulled by digest is known to belong to its repository.
func (c *cluster) longOutage() {
	img, _ := c.push(ociImage, "nodes/other", 320)
	byDigest := clusterImages + "/" + img.repository + "@" + img.digest.String()
	c.wantThroughAgents(c.pullAt(byDigest, 1))
	var tagged []string
	for i := range 4 {
		_, ref := c.push(ociImage, fmt.Sprintf("nodes/stale-%d", i), uint64(400+10*i))
		c.wantThroughAgents(c.pullAt(ref, 1))
		tagged = append(tagged, ref)
	}
	c.r.stop()
	defer c.r.start()
	for _, ref := range append(tagged, byDigest) {
		c.pullTogether(ref, 2, 3)
	}
}

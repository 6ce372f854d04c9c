package e2e

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"
)

// upstreamName is how images call a registry and how the agent gets to know where
// it is: from a [[registry]] table, or from the hosts.toml that the node had.
func upstreamName(t *testing.T, c *containerd, r *registry) (host, config string) {
	t.Helper()
	switch r.kind.name {
	case docker28.name: // the address itself, no host directory: `_default` decides
		return r.addr, registryTable(r.addr, r)
	case distTLS.name: // a port in the name, and a CA that only the node knows
		host = "secure.test:8443"
	default:
		host = "plain.test"
	}
	writeHostsTOML(t, c.certs, host, r)
	return host, ""
}

// TestPull is a node's life: for every containerd, registry and shape of image the
// first pull comes through the agent, the second one moves no blob at the
// registry, and the pulls go on when the registry or the agent is down.
func TestPull(t *testing.T) {
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			c := startContainerd(t, v)
			for _, kind := range registryKinds {
				t.Run(kind.name, func(t *testing.T) { newNodeLife(t, c, startRegistry(t, kind)).run() })
			}
		})
	}
}

// nodeLife is the state of one row of TestPull.
type nodeLife struct {
	t      *testing.T
	c      *containerd
	r      *registry
	a      *agent
	before string // certs.d as the administrator left it
	refs   []string
}

func newNodeLife(t *testing.T, c *containerd, r *registry) *nodeLife {
	t.Helper()
	// c outlives this test; failures belong here.
	here := *c
	here.t = t
	host, config := upstreamName(t, &here, r)
	n := &nodeLife{t: t, c: &here, r: r, before: snapshot(t, c.certs)}
	for i, shape := range imageKinds {
		img := r.push(shape, "life/"+string(shape), uint64(100*i))
		n.refs = append(n.refs, host+"/"+img.repository+":"+img.tag)
	}
	n.a = startAgent(t, agentOptions{containerd: &here, config: config})
	return n
}

func (n *nodeLife) run() {
	n.pullAll("cold", n.cameThroughTheAgent)
	n.pullAll("warm", n.movedNoBlob)
	eventually(n.t, 30*time.Second, "the agent closes what it served", func() error {
		if open := n.a.openBlobs(); len(open) > 0 {
			return fmt.Errorf("open: %v", open)
		}
		return nil
	})

	n.r.stop()
	n.pullAll("registry down", func(string, accessList) {})
	n.r.start()

	n.a.stop()
	if after := snapshot(n.t, n.c.certs); after != n.before {
		n.t.Errorf("certs.d after SIGTERM:\n%s\nwant what was there before the agent:\n%s", after, n.before)
	}
	n.pullAll("agent stopped", n.wentDirect)

	n.a.start()
	n.pullAll("agent started again", n.movedNoBlob)

	n.a.kill()
	if after := snapshot(n.t, n.c.certs); after == n.before {
		n.t.Error("kill -9 removed the host configuration; the next pulls prove nothing")
	}
	n.pullAll("agent killed", n.wentDirect)

	n.a.start()
	n.a.stop()
	if after := snapshot(n.t, n.c.certs); after != n.before {
		n.t.Errorf("certs.d after kill -9, start and SIGTERM:\n%s\nwant:\n%s", after, n.before)
	}
}

// pullAll pulls and removes every image and shows check what the registry saw.
func (n *nodeLife) pullAll(phase string, check func(phase string, seen accessList)) {
	n.t.Helper()
	for _, ref := range n.refs {
		start := time.Now()
		seen := n.r.during(func() { n.c.mustPull(ref) })
		n.t.Logf("%-20s %-40s %7.0f ms, %d blob requests at the registry, %d by containerd itself", phase, ref,
			float64(time.Since(start).Microseconds())/1e3, len(blobReads(seen)), len(byRuntime(blobReads(seen))))
		check(phase+" "+ref, seen)
		n.c.remove(ref)
	}
}

func (n *nodeLife) cameThroughTheAgent(what string, seen accessList) {
	n.t.Helper()
	wantThroughAgent(n.t, what, seen)
	if len(blobReads(seen)) < len(ordinarySizes)+1 {
		n.t.Errorf("%s: want each layer and the config from the registry once: %v", what, seen)
	}
}

func (n *nodeLife) movedNoBlob(what string, seen accessList) {
	n.t.Helper()
	if blobs := blobReads(seen); len(blobs) > 0 {
		n.t.Errorf("%s: want no blob request, the registry saw %v", what, blobs)
	}
	wantThroughAgent(n.t, what, seen)
}

func (n *nodeLife) wentDirect(what string, seen accessList) {
	n.t.Helper()
	if len(byRuntime(blobReads(seen))) < len(ordinarySizes)+1 {
		n.t.Errorf("%s: want containerd to fetch each layer and the config itself: %v", what, seen)
	}
}

// interruption is something that befalls the agent in the middle of a pull of one
// layer.
type interruption struct {
	size  int // of the layer
	rate  int // bytes per second at which the agent fetches
	flags []string
	agent func(*agent)
	// resumed: the runtime must have fetched the rest from the registry by Range.
	resumed bool
}

// TestKillInTheMiddle kills the agent (-9) while a 500 MB layer streams through
// it: the same pull ends well, with the rest from the registry.
func TestKillInTheMiddle(t *testing.T) {
	const size = 500 << 20
	interruptedPull(t, interruption{size: size, rate: size / 4, agent: (*agent).kill, resumed: true})
}

// TestTerminateInTheMiddle stops the agent (SIGTERM) in the middle of a pull that
// can finish within the grace period.
func TestTerminateInTheMiddle(t *testing.T) {
	const size = 100 << 20
	interruptedPull(t, interruption{size: size, rate: size / 4, agent: (*agent).stop})
}

// TestTerminateBeforeTheEnd stops the agent (SIGTERM) in the middle of a pull that
// takes longer than the grace period.
func TestTerminateBeforeTheEnd(t *testing.T) {
	const size = 100 << 20
	interruptedPull(t, interruption{size: size, rate: size / 15, agent: (*agent).stop,
		flags: []string{"--proxy.drain_timeout", "1s"}, resumed: true})
}

// interruptedPull interrupts the agent when a fifth of the layer has arrived at
// containerd. The pull must end well, and the node must be as it was.
func interruptedPull(t *testing.T, in interruption) {
	r := startRegistry(t, distV3)
	img := r.push(ociImage, "big", 7, in.size)
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			c := startContainerd(t, v)
			host, config := upstreamName(t, c, r)
			before := snapshot(t, c.certs)
			a := startAgent(t, agentOptions{containerd: c, config: config,
				flags: append(in.flags, "--upstream.max_bytes_per_second", fmt.Sprint(in.rate))})
			seen := r.during(func() { pullAndInterrupt(t, c, host+"/"+img.repository+":"+img.tag, in, a) })
			if in.resumed && !resumedAtRegistry(seen) {
				t.Errorf("want containerd to resume at the registry by Range: %v", seen)
			}
			a.start()
			a.stop()
			if after := snapshot(t, c.certs); after != before {
				t.Errorf("certs.d:\n%s\nwant:\n%s", after, before)
			}
		})
	}
}

func pullAndInterrupt(t *testing.T, c *containerd, ref string, in interruption, a *agent) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*pullTimeout)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- c.pull(ctx, ref, nil) }()
	eventually(t, pullTimeout, "a fifth of the layer has arrived", func() error {
		if n := c.ingested(); n < int64(in.size/5) {
			return fmt.Errorf("%d bytes of %d", n, in.size)
		}
		return nil
	})
	start := time.Now()
	in.agent(a)
	t.Logf("agent ended in %v", time.Since(start).Round(time.Millisecond))
	if err := <-done; err != nil {
		t.Errorf("pull: %v", err)
	}
	t.Logf("pull ended %v after the interruption", time.Since(start).Round(time.Millisecond))
}

func resumedAtRegistry(seen accessList) bool {
	return slices.ContainsFunc(byRuntime(blobReads(seen)), func(a access) bool { return a.status == http.StatusPartialContent })
}

// TestTogether pulls one image on two containerds through one agent in the same
// moment: the registry sends each byte once.
func TestTogether(t *testing.T) {
	r := startRegistry(t, distV3)
	// Below 16 MiB a blob is one request; larger ones may be asked for in ranges.
	img := r.push(ociImage, "together", 31, 12<<20, 5<<20, 1<<20)
	first := startContainerd(t, containerd16)
	second := startContainerd(t, containerd2, func(c *containerdConfig) { c.configPath = first.certs })
	host, config := upstreamName(t, first, r)
	startAgent(t, agentOptions{containerd: first, config: config})
	ref := host + "/" + img.repository + ":" + img.tag
	seen := r.during(func() {
		var pulls sync.WaitGroup
		for _, c := range []*containerd{first, second} {
			pulls.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), pullTimeout)
				defer cancel()
				if err := c.pull(ctx, ref, nil); err != nil {
					t.Errorf("%s: %v", c.version.name, err)
				}
			})
		}
		pulls.Wait()
	})
	// One blob may come in several ranges, but not twice.
	var sent int64
	blobs := map[string]bool{}
	for _, b := range blobReads(seen) {
		blobs[b.path] = true
		sent += b.bytes
	}
	if copies := float64(sent) / float64(img.size); copies > 1.5 {
		t.Errorf("the registry sent %.2f copies, want one: %v", copies, seen)
	}
	if len(blobs) != 4 || len(byRuntime(seen)) > 0 {
		t.Errorf("want 3 layers and a config, all through the agent: %v", seen)
	}
}

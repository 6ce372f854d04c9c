package e2e

import (
	"context"
	"fmt"
	"net/url"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/larder-cache/larder/test/registrytest"
)

// faults are a registry's bad days that a node must survive: the agent hides them
// from containerd, or gets out of the way. With retry, containerd may need the second
// try that kubelet makes.
var faults = []struct {
	name    string
	match   registrytest.Match
	effects []registrytest.Effect
	retry   bool
}{
	{name: "cut in the body", match: aBlob, effects: []registrytest.Effect{registrytest.Times(1), registrytest.CutAfter(1 << 20)}},
	{name: "reset in the body", match: aBlob, effects: []registrytest.Effect{registrytest.Times(1), registrytest.ResetAfter(1 << 20)}},
	{name: "stall in the body", match: aBlob, effects: []registrytest.Effect{registrytest.Times(1), registrytest.StallAfter(1 << 20)}},
	{name: "stall before the headers", match: aBlob, effects: []registrytest.Effect{registrytest.Times(1), registrytest.Hold()}},
	{name: "503 on a manifest", match: aManifest, effects: []registrytest.Effect{registrytest.Times(1), registrytest.Status(503)}},
	{name: "503 on a blob", match: aBlob, effects: []registrytest.Effect{registrytest.Times(2), registrytest.Status(503)}},
	{name: "429 on a manifest", match: aManifest, effects: []registrytest.Effect{registrytest.Times(1), registrytest.TooManyRequests(time.Second)}},
	{name: "429 on a blob", match: aBlob, effects: []registrytest.Effect{registrytest.Times(1), registrytest.TooManyRequests(time.Second)}},
	{name: "ranges ignored", match: aBlob, effects: []registrytest.Effect{registrytest.IgnoreRange()}},
	{name: "web page once", match: aBlob, effects: []registrytest.Effect{registrytest.Times(1), registrytest.HTML()}},
	{name: "corrupt once", match: aBlob, retry: true, effects: []registrytest.Effect{registrytest.Times(1), registrytest.CorruptAt(1000)}},
}

var (
	aBlob     = registrytest.Match{Kind: registrytest.Blob, Method: "GET"}
	aManifest = registrytest.Match{Kind: registrytest.Manifest}
)

// TestFaultyRegistry pulls with real containerd through the agent from a registry
// that fails. The same faults, and many more, run against containerd's client code
// in the main module; here the daemon itself must agree.
func TestFaultyRegistry(t *testing.T) {
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			r := registrytest.Start(t, registrytest.Options{})
			u, err := url.Parse(r.URL())
			if err != nil {
				t.Fatal(err)
			}
			c := startContainerd(t, v)
			startAgent(t, agentOptions{containerd: c,
				config: "[[registry]]\nhost = \"" + u.Host + "\"\nupstreams = [\"" + r.URL() + "\"]\n"})
			for i, f := range faults {
				t.Run(f.name, func(t *testing.T) {
					image := registrytest.OCIImage(registrytest.ImageSpec{Seed: uint64(i), Layers: []int64{5 << 20, 100 << 10}})
					repository := "faulty/" + string(rune('a'+i))
					r.Put(repository, image, "v1")
					f.match.Repository = repository
					if f.match.Kind == registrytest.Blob {
						f.match.Reference = image.Layers[0].Digest.String() // the large one
					}
					fault := r.Inject(f.match, f.effects...)
					defer fault.Remove()
					start := time.Now()
					pullWithin(t, c, u.Host+"/"+repository+":v1", f.retry)
					t.Logf("%d requests failed, pulled in %v", fault.Hits(), time.Since(start).Round(time.Millisecond))
					if fault.Hits() == 0 {
						t.Error("no request suffered the fault")
					}
				})
			}
		})
	}
}

// pullWithin pulls once, or, as kubelet would, until it succeeds.
func pullWithin(t *testing.T, c *containerd, ref string, retry bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), pullTimeout)
	defer cancel()
	try := func() error { return c.pull(ctx, ref, nil) }
	err := try()
	if err != nil && retry {
		t.Logf("first try: %v", err)
		err = poll(pullTimeout, try)
	}
	if err != nil {
		t.Errorf("pull: %v", err)
	}
}

// TestSlowRegistry is a registry that takes longer to answer than a request may wait for
// its first byte. Two nodes pull: both kinds of containerd take an answer whose body
// comes late, and the registry is asked once.
func TestSlowRegistry(t *testing.T) {
	t.Parallel()
	r := registrytest.Start(t, registrytest.Options{})
	u, err := url.Parse(r.URL())
	if err != nil {
		t.Fatal(err)
	}
	image := registrytest.OCIImage(registrytest.ImageSpec{Seed: 77, Layers: []int64{5 << 20, 100 << 10}})
	r.Put("slow/app", image, "v1")
	r.Inject(aBlob, registrytest.Delay(8*time.Second))
	var join string
	var agents []*agent
	var runtimes []*containerd
	for _, v := range containerdVersions {
		c := startContainerd(t, v)
		gossip := "127.0.0.1:" + strconv.Itoa(freePort(t))
		agents = append(agents, startAgent(t, agentOptions{containerd: c,
			config: "[[registry]]\nhost = \"" + u.Host + "\"\nupstreams = [\"" + r.URL() + "\"]\n",
			flags: []string{"--peer.enabled=true", "--peer.name", v.name, "--peer.gossip", gossip, "--peer.join", join,
				"--peer.data", "127.0.0.1:" + strconv.Itoa(freePort(t))}}))
		runtimes, join = append(runtimes, c), gossip
	}
	for _, a := range agents {
		eventually(t, 30*time.Second, "the agents know each other", func() error {
			if n := a.metric("larder_peer_members"); n != 2 {
				return fmt.Errorf("%v members", n)
			}
			return nil
		})
	}
	var pulls sync.WaitGroup
	for _, c := range runtimes {
		pulls.Go(func() {
			start := time.Now()
			if err := c.pull(t.Context(), u.Host+"/slow/app:v1", nil); err != nil {
				t.Errorf("%s: %v", c.version.name, err)
			}
			t.Logf("%s pulled in %v", c.version.name, time.Since(start).Round(time.Millisecond))
		})
	}
	pulls.Wait()
	if got, want := r.Count(aBlob), len(image.Blobs); got != want {
		t.Errorf("the registry was asked for blobs %d times, want %d", got, want)
	}
}

package upstream

import (
	"strings"
	"sync"
	"testing"

	"github.com/larder-cache/larder/test/registrytest"
)

// TestSetRegistries holds that a change applies to what is asked afterwards,
// to nothing else, and not at all if any of it is wrong.
func TestSetRegistries(t *testing.T) {
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3})
	before, after := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	for _, s := range []*registrytest.Server{before, after} {
		s.Put(repo, img, "v1")
	}
	c := clientOf(t, before)
	same := c.Policy(target.Registry)
	resolve := func() {
		t.Helper()
		if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
			t.Error(err)
		}
	}
	asked := func(s *registrytest.Server) int { return s.Count(registrytest.Match{Kind: registrytest.Manifest}) }

	resolve()
	other := Registry{Host: "other.example", Upstreams: []string{after.URL()}}
	if err := c.SetRegistries([]Registry{same, other}); err != nil {
		t.Fatal(err)
	}
	if kept := c.Health(); len(kept) != 2 || kept[0].Registry == target.Registry && kept[0].LastOKAt.IsZero() || kept[1].Registry == target.Registry && kept[1].LastOKAt.IsZero() {
		t.Errorf("a registry that stayed as it was has lost its health: %+v", kept)
	}

	moved := same
	moved.Upstreams = []string{after.URL()}
	err := c.SetRegistries([]Registry{moved, {Host: "a.example", Upstreams: []string{"ftp://x"}}, {Host: "b.example", Upstreams: []string{"gopher://x"}}})
	if err == nil || !strings.Contains(err.Error(), "a.example") || !strings.Contains(err.Error(), "b.example") {
		t.Errorf("%v, want all problems", err)
	}
	resolve()
	if asked(after) != 0 || len(c.Health()) != 2 {
		t.Error("half of a wrong list was taken")
	}

	if err := c.SetRegistries([]Registry{moved}); err != nil {
		t.Fatal(err)
	}
	first := asked(before)
	resolve()
	if asked(before) != first || asked(after) != 1 {
		t.Errorf("%d requests to the former upstream, %d to the new one", asked(before)-first, asked(after))
	}
	if p := c.Policy("other.example"); len(p.Upstreams) != 0 {
		t.Errorf("a registry that was taken out is configured: %+v", p)
	}
}

// TestSetRegistriesUnderWay swaps upstreams while others ask: nobody fails, and
// the race detector is content.
func TestSetRegistriesUnderWay(t *testing.T) {
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{blobSize}, Opaque: true})
	one, two := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	for _, s := range []*registrytest.Server{one, two} {
		s.Put(repo, img, "v1")
	}
	c := clientOf(t, one)
	table := c.Policy(target.Registry)
	var pulls sync.WaitGroup
	for range 4 {
		pulls.Go(func() {
			sink := newSink(256 << 10)
			if err := c.Fetch(t.Context(), target, img.Layers[0].Digest, sink); err != nil {
				t.Error(err)
			}
			sink.check(t, img.Layers[0].Digest)
		})
	}
	for i := range 20 {
		table.Upstreams = []string{[]*registrytest.Server{one, two}[i%2].URL()}
		if err := c.SetRegistries([]Registry{table}); err != nil {
			t.Error(err)
		}
		c.Health()
	}
	pulls.Wait()
}

package agent

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
)

func noOrigins(digest.Digest) (cache.Fetched, bool) { return cache.Fetched{}, false }

// TestRecentPulls holds what is told of pulls of a whole agent: where each part
// came from, and who sent it. The canary of the doctor is not among them.
func TestRecentPulls(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	canary := Image{Registry: "docker.io", Repository: "larder.invalid/canary", Reference: "nonce"}
	if _, err := (Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client}).Pull(t.Context(), canary); err != nil {
		t.Fatal(err)
	}
	parts := a.pull(t)
	a.settle(t)
	again := a.pull(t)
	reg.Down()
	gone := Image{Registry: testRegistry, Repository: "team/gone", Reference: "v2"}
	if _, err := (Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client}).Pull(t.Context(), gone); err == nil {
		t.Fatal("pulled what is not there")
	}
	var got []RecentPull
	eventually(t, "recorded", func() error { // after the client has its last byte
		got = a.Status().Recent
		if len(got) != 3 || len(got[2].Parts) != len(parts)+1 || len(got[1].Parts) != len(again)+1 {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	failed, warm, cold := got[0], got[1], got[2]
	if cold.Registry != testRegistry || cold.Repository != "team/app" || cold.Reference != "v1" || cold.Failed != 0 || cold.UserAgent == "" {
		t.Errorf("cold: %+v", cold)
	}
	if !maps.Equal(cold.Served, sources(parts)) || !maps.Equal(warm.Served, sources(again)) {
		t.Errorf("served %v and %v, pulled %v and %v", cold.Served, warm.Served, sources(parts), sources(again))
	}
	if tag := cold.Parts[0]; tag.Kind != "tag" || tag.Reference != "v1" || !maps.Equal(tag.Served, map[string]int64{"upstream": 0}) {
		t.Errorf("the tag: %+v", tag)
	}
	for d, blob := range img.Blobs {
		i := slices.IndexFunc(cold.Parts, func(p PulledPart) bool { return p.Reference == d.String() })
		if i < 0 {
			t.Fatalf("%s is not in %+v", d, cold.Parts)
		}
		p := cold.Parts[i]
		if p.Kind != "blob" || p.Served["upstream"] != blob.Size() || p.Error != "" ||
			len(p.Origins) != 1 || p.Origins[0].Name != testRegistry || p.Origins[0].Bytes != blob.Size() {
			t.Errorf("part: %+v", p)
		}
	}
	if failed.Repository != "team/gone" || failed.Failed == 0 || len(failed.Parts) != 1 || failed.Parts[0].Error == "" || len(failed.Served) != 0 {
		t.Errorf("failed: %+v", failed)
	}
}

// TestRecentPullsOfPeers holds that a part from the swarm says which nodes sent it.
func TestRecentPullsOfPeers(t *testing.T) {
	nodes, reg, img, _ := newCluster(t, 2)
	nodes[0].pull(t)
	nodes[0].settle(t)
	reg.Down()
	nodes[1].pull(t)
	nodes[1].settle(t)
	eventually(t, "recorded", func() error {
		got := nodes[1].Status().Recent
		if len(got) != 1 {
			return fmt.Errorf("%+v", got)
		}
		for _, p := range got[0].Parts {
			layer := p.Reference == img.Layers[0].Digest.String()
			if layer && len(p.Origins) == 1 && p.Origins[0].Kind == "peer" && p.Origins[0].Name == "node-1" && p.Origins[0].Bytes == img.Layers[0].Size {
				return nil
			}
		}
		return fmt.Errorf("%+v", got[0].Parts)
	})
	// The members say the same, and still do when there is no link any more.
	i := slices.IndexFunc(nodes[1].Members(), func(m Member) bool { return m.Name == "node-1" })
	if m := nodes[1].Members()[i]; m.Received < img.Layers[0].Size || m.Sent >= img.Layers[0].Size { // small blobs may have gone the other way
		t.Errorf("%+v", m)
	}
}

// TestPullsAreTakenApart holds which requests make one pull.
func TestPullsAreTakenApart(t *testing.T) {
	begin := time.Now()
	ask := func(second int, repository string, kind proxy.Kind, method, reference string) proxy.Event {
		return proxy.Event{Time: begin.Add(time.Duration(second) * time.Second), Duration: time.Second, Kind: kind, Method: method,
			Registry: "reg.example", Repository: repository, Reference: reference, Source: "disk", Status: 200, Bytes: 10}
	}
	d := func(s string) string { return digest.FromString(s).String() }
	resolve := func(at int, tag string) proxy.Event { return ask(at, "app", proxy.KindManifest, "HEAD", tag) }
	manifest := func(at int, name string) proxy.Event {
		return ask(at, "app", proxy.KindManifest, "GET", d(name))
	}
	blob := func(at int, name string) proxy.Event { return ask(at, "app", proxy.KindBlob, "GET", d(name)) }
	head := func(at int, name string) proxy.Event { return ask(at, "app", proxy.KindManifest, "HEAD", d(name)) }
	missing := func(method string) proxy.Event {
		e := ask(0, "app", proxy.KindManifest, method, "v1")
		e.Status = 404
		return e
	}
	pinned := func(e proxy.Event) proxy.Event {
		e.UserAgent = pinUserAgent
		return e
	}
	tests := []struct {
		name   string
		events []proxy.Event
		want   []string // reference and number of parts, the latest first
	}{
		{"containerd, an index", []proxy.Event{resolve(0, "v1"), manifest(1, "index"), manifest(2, "m"), blob(3, "a"), blob(3, "b")}, []string{"v1 5"}},
		{"by digest", []proxy.Event{manifest(0, "m"), manifest(0, "m"), blob(1, "a")}, []string{d("m") + " 2"}},
		{"the same again", []proxy.Event{resolve(0, "v1"), manifest(0, "m"), blob(1, "a"), resolve(5, "v1"), manifest(5, "m"), blob(6, "a")}, []string{"v1 3", "v1 3"}},
		{"by digest again", []proxy.Event{manifest(0, "m"), blob(1, "a"), manifest(2, "m"), blob(3, "a")}, []string{d("m") + " 2", d("m") + " 2"}},
		{"another tag", []proxy.Event{resolve(0, "v1"), resolve(0, "v2"), manifest(1, "m"), blob(2, "a")}, []string{"v2 3", "v1 1"}},
		{"containerd, by digest after a tag that failed", []proxy.Event{missing("HEAD"), head(1, "m"), manifest(1, "m"), blob(2, "a")}, []string{d("m") + " 2", "v1 1"}},
		{"containerd, a tag from the registry, the rest from here", []proxy.Event{missing("HEAD"), manifest(1, "m"), blob(2, "a")}, []string{"v1 3"}},
		{"containerd, by digest after its tag", []proxy.Event{resolve(0, "v1"), head(1, "m"), manifest(1, "m"), blob(2, "a")}, []string{"v1 3"}},
		{"podman, by digest after a tag that failed", []proxy.Event{missing("GET"), manifest(1, "m"), blob(2, "a")}, []string{d("m") + " 2", "v1 1"}},
		{"a tag that failed once", []proxy.Event{missing("GET"), ask(1, "app", proxy.KindManifest, "GET", "v1"), blob(2, "a")}, []string{"v1 2"}},
		{"a pin meanwhile", []proxy.Event{resolve(0, "v1"), pinned(manifest(1, "p")), manifest(1, "m"), pinned(blob(2, "b")), blob(3, "a")}, []string{"v1 3", d("p") + " 2"}},
		{"ranges of a layer", []proxy.Event{manifest(0, "m"), blob(1, "a"), blob(2, "a"), blob(3, "a")}, []string{d("m") + " 2"}},
		{"a long pause", []proxy.Event{blob(0, "a"), blob(40, "b")}, []string{" 1", " 1"}},
		{"a slow layer beside", []proxy.Event{resolve(0, "v1"), func() proxy.Event { e := blob(1, "a"); e.Duration = time.Hour; return e }(), blob(1800, "b")}, []string{"v1 3"}},
		{"another repository", []proxy.Event{resolve(0, "v1"), ask(0, "other", proxy.KindManifest, "HEAD", "v1"), blob(1, "a")}, []string{"v1 2", "v1 1"}},
		{"no pulls", []proxy.Event{ask(0, "app", proxy.KindTags, "GET", ""), ask(0, "", proxy.KindPing, "GET", ""), ask(0, "app", proxy.KindBlob, "HEAD", d("a"))}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var r recentPulls
			for _, e := range tt.events {
				r.record(e)
			}
			var got []string
			for _, p := range r.all(noOrigins) {
				got = append(got, fmt.Sprintf("%s %d", p.Reference, len(p.Parts)))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}

// TestRecentPullsAreBounded holds that clients and registries do not decide how
// much is remembered.
func TestRecentPullsAreBounded(t *testing.T) {
	var r recentPulls
	begin := time.Now()
	for repository := range 3 * maxRecent {
		for blob := range 2 * maxRecentParts {
			r.record(proxy.Event{
				Time: begin, Kind: proxy.KindBlob, Method: "GET", Registry: "reg.example", Repository: fmt.Sprintf("app-%d", repository),
				Reference: digest.FromString(fmt.Sprint(blob)).String(), Source: "none", Status: 502,
				UserAgent: strings.Repeat("ü", 1000), Err: errors.New(strings.Repeat("é", 1000)),
			})
		}
	}
	got := r.all(noOrigins)
	if len(got) != maxRecent || got[0].Repository != fmt.Sprintf("app-%d", 3*maxRecent-1) {
		t.Errorf("%d pulls, the first of %s", len(got), got[0].Repository)
	}
	for _, p := range got {
		if len(p.Parts) != maxRecentParts || p.More != maxRecentParts || p.Failed != 2*maxRecentParts || len(p.UserAgent) > maxUserAgent {
			t.Errorf("%d parts and %d more, %d failed, user agent %q", len(p.Parts), p.More, p.Failed, p.UserAgent)
		}
		if e := p.Parts[0].Error; len(e) > maxErrorText || !strings.HasSuffix(e, "é...") {
			t.Errorf("error %q", e)
		}
	}
}

// TestHungUp holds that a runtime that goes away is not taken for an error of ours.
func TestHungUp(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	layer := img.Layers[0].Digest
	fault := reg.Inject(registrytest.Match{Kind: registrytest.Blob, Reference: layer.String()}, registrytest.Hold())
	defer fault.Remove()
	a := start(t, c)
	got := make(chan error, 1)
	client := *a.client
	client.Timeout = time.Second
	go func() {
		_, err := client.Get("http://" + a.ProxyAddr() + "/v2/" + testImage.Repository + "/blobs/" + layer.String() + "?ns=" + testRegistry)
		got <- err
	}()
	if err := <-got; err == nil {
		t.Fatal("an answer from a registry that holds it back")
	}
	eventually(t, "recorded", func() error {
		recent := a.Status().Recent
		if len(recent) != 1 || recent[0].Parts[0].Error != "the runtime hung up" {
			return fmt.Errorf("%+v", recent)
		}
		return nil
	})
}

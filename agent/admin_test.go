package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
)

// contractMetrics are the names and labels users' dashboards depend on. Names
// may be added; none of these may change.
var contractMetrics = map[string][]string{
	"larder_requests_total":               {"kind", "source", "code"},
	"larder_served_bytes_total":           {"source"},
	"larder_fetched_bytes_total":          {"from"},
	"larder_uploaded_bytes_total":         {},
	"larder_upstream_requests_total":      {"registry", "kind", "code"},
	"larder_first_byte_seconds":           {"source"},
	"larder_cache_bytes":                  {},
	"larder_cache_limit_bytes":            {},
	"larder_cache_evictions_total":        {"reason"},
	"larder_cache_corruptions_total":      {},
	"larder_fills_in_flight":              {},
	"larder_joined_fills_total":           {},
	"larder_peer_members":                 {},
	"larder_peer_bans_total":              {"reason"},
	"larder_index_blobs":                  {},
	"larder_index_holders":                {},
	"larder_tag_stale_served_total":       {},
	"larder_auth_decisions_total":         {"decision"},
	"larder_upstream_ratelimit_remaining": {"registry"},
	"larder_upstream_ratelimit_limit":     {"registry"},
	"larder_hosts_drift_repaired_total":   {"runtime"},
	"larder_pinned_bytes":                 {},
	"larder_pins":                         {"state"},
}

// describedMetrics lists what is registered, used yet or not: "name{label,...}".
func describedMetrics(t *testing.T, a *Agent) map[string][]string {
	t.Helper()
	descs := make(chan *prometheus.Desc)
	go func() {
		a.registry.Describe(descs)
		close(descs)
	}()
	out := map[string][]string{}
	for d := range descs {
		// Desc has no accessors; its String is stable in shape.
		_, rest, ok := strings.Cut(d.String(), `fqName: "`)
		name, rest, ok2 := strings.Cut(rest, `"`)
		_, labels, ok3 := strings.Cut(rest, "variableLabels: {")
		labels, _, ok4 := strings.Cut(labels, "}")
		if !ok || !ok2 || !ok3 || !ok4 {
			t.Fatalf("cannot read %s", d)
		}
		out[name] = splitList(labels)
	}
	return out
}

func TestMetricsAreTheContract(t *testing.T) {
	c := testConfig(t)
	c.Hosts.Containerd = t.TempDir()
	a := start(t, c)
	got := describedMetrics(t, a.Agent)
	for name, want := range contractMetrics {
		labels, ok := got[name]
		if !ok || !slices.Equal(slices.Sorted(slices.Values(labels)), slices.Sorted(slices.Values(want))) {
			t.Errorf("%s: labels %v (registered: %v), want %v", name, labels, ok, want)
		}
	}
	for name := range got {
		ours := strings.HasPrefix(name, "larder_")
		if !ours && !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") && !strings.HasPrefix(name, "promhttp_") {
			t.Errorf("%s: a name of nobody's", name)
		}
	}
}

// TestNoPeersNoMembers holds that agents without peers do not look like members that
// have not found each other.
func TestNoPeersNoMembers(t *testing.T) {
	if _, body := start(t, testConfig(t)).admin(t, "GET", "/metrics", ""); !strings.Contains(body, "\nlarder_peer_members 0\n") {
		t.Errorf("members without peers:\n%s", body)
	}
}

// TestBytesAddUp holds that what the metrics count is what was pulled: served are the bytes
// of clients, and not of what the agent pulls for itself; fetched are those of both.
func TestBytesAddUp(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	for seed, repository := range []string{"team/warmed", "team/pinned"} {
		reg.Put(repository, registrytest.Platforms(registrytest.ImageSpec{Seed: uint64(20 + seed), Layers: []int64{1000}}, false), "v1")
	}
	a := start(t, c)
	for path, repository := range map[string]string{"/api/v1/warm": "team/warmed", "/api/v1/pins": "team/pinned"} {
		code, answer := a.admin(t, "POST", path, `{"images":["`+testRegistry+"/"+repository+`:v1"]}`, "Content-Type", "application/json")
		if code != 200 || strings.Contains(answer, `"error"`) {
			t.Fatalf("%s: %d %s", path, code, answer)
		}
	}
	pulled := sources(a.pull(t))
	for source, n := range sources(a.pull(t)) {
		pulled[source] += n
	}
	a.settle(t)
	status, body := a.admin(t, "GET", "/metrics", "")
	if status != 200 || !strings.Contains(body, "larder_served_bytes_total") || !strings.Contains(body, "go_goroutines") {
		t.Fatalf("/metrics: %d\n%s", status, body)
	}
	eventually(t, "counted", func() error { // after the client has its last byte
		if served := a.counted()["larder_served_bytes_total"]; !maps.Equal(served, pulled) {
			return fmt.Errorf("served %v, pulled %v", served, pulled)
		}
		return nil
	})
	fetched := a.counted()["larder_fetched_bytes_total"]
	if stats := a.cache.Stats(); fetched["upstream"] != stats.Bytes || fetched["peer"] != 0 {
		t.Errorf("fetched %v, the cache has %d bytes", fetched, stats.Bytes)
	}
}

// TestPassedBytesCount: a full disk must not look like a cache that always hits.
func TestPassedBytesCount(t *testing.T) {
	c := testConfig(t)
	c.Cache.MaxBytes = cache.Bytes(1)
	startRegistry(t, &c)
	a := start(t, c)
	var pulled int64
	for range 2 {
		pulled += sources(a.pull(t))["upstream"]
	}
	if fetched := a.counted()["larder_fetched_bytes_total"]; pulled == 0 || fetched["upstream"] != pulled {
		t.Errorf("fetched %v, pulled %d bytes from the registry", fetched, pulled)
	}
}

func TestStatus(t *testing.T) {
	c := testConfig(t)
	_, img := startRegistry(t, &c)
	a := start(t, c, WithBuild(Build{Version: "v1.2.3"}))
	a.pull(t)
	a.settle(t)
	code, body := a.admin(t, "GET", "/api/v1/status", "")
	var s Status
	if err := json.Unmarshal([]byte(body), &s); err != nil || code != 200 {
		t.Fatalf("%d %v\n%s", code, err, body)
	}
	if s.Version != "v1.2.3" || s.Node != "node-1" || !s.Ready || s.Proxy != a.ProxyAddr() || s.Started.IsZero() {
		t.Errorf("status: %+v", s)
	}
	if want := len(img.Blobs) + len(img.Manifests); s.Cache.Blobs != want || s.Cache.Dir != c.Cache.Dir {
		t.Errorf("cache: %+v, want %d blobs", s.Cache, want)
	}
	if !slices.ContainsFunc(s.Upstreams, func(h upstream.Health) bool { return h.Registry == testRegistry }) {
		t.Errorf("upstreams: %+v", s.Upstreams)
	}
	if strings.Contains(body, "null") {
		t.Errorf("a list is null:\n%s", body)
	}
}

// TestNothingIsKept: a disk that others have filled shows in the status of a node that is
// as ready as ever, and as long as anything may be evicted does not.
func TestNothingIsKept(t *testing.T) {
	const gib = 1 << 30
	for name, tt := range map[string]struct {
		stats cache.Stats
		want  string
	}{
		"room":                {stats: cache.Stats{Free: 30 * gib, MinFree: 20 * gib}},
		"less than min_free":  {stats: cache.Stats{Free: 15 * gib, MinFree: 20 * gib}, want: "min_free keeps 20.0 GiB free, and the disk has 15.0 GiB"},
		"to be evicted":       {stats: cache.Stats{Free: 15 * gib, MinFree: 20 * gib, Bytes: 6 * gib}},
		"on its way":          {stats: cache.Stats{Free: 15 * gib, MinFree: 20 * gib, Bytes: 6 * gib, Reserved: 6 * gib}},
		"too little to evict": {stats: cache.Stats{Free: 15 * gib, MinFree: 20 * gib, Bytes: 4 * gib}, want: "cache.min_free"},
		"pinned":              {stats: cache.Stats{Free: 15 * gib, MinFree: 20 * gib, Bytes: 9 * gib, Pinned: 8 * gib}, want: "cache.min_free"},
		"full":                {want: "the disk is full"},
		"not known":           {stats: cache.Stats{Free: -1, MinFree: 20 * gib}},
	} {
		if got := cacheProblem(tt.stats); !strings.Contains(got, tt.want) || (got == "") != (tt.want == "") {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
	c := testConfig(t)
	c.Cache.MinFree = cache.Percent(99.999)
	if s := start(t, c).Status(); !s.Ready || !strings.HasPrefix(s.Cache.Problem, "keeps nothing new: cache.min_free") {
		t.Errorf("ready: %t, %+v", s.Ready, s.Cache)
	}
}

func TestExplain(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	path := "/api/v1/explain?platform=linux/amd64&image=" + testImage.String()
	if code, body := a.admin(t, "GET", path, ""); code != 404 || !strings.Contains(body, "larder warm") {
		t.Errorf("before the pull: %d %s", code, body)
	}
	a.pull(t)
	a.settle(t)
	reg.Down() // explaining asks no registry
	code, body := a.admin(t, "GET", path, "")
	var e Explanation
	if err := json.Unmarshal([]byte(body), &e); err != nil || code != 200 {
		t.Fatalf("%d %v\n%s", code, err, body)
	}
	if e.Digest != img.Digest || e.Here != e.Bytes || e.Bytes == 0 || e.Checked.IsZero() {
		t.Errorf("explanation: %+v", e)
	}
	if want := len(img.Blobs) + len(img.Manifests); len(e.Parts) != want {
		t.Errorf("%d parts, want %d", len(e.Parts), want)
	}
	for _, p := range e.Parts {
		if p.Where != "disk" || len(p.Origins) != 1 || p.Origins[0].Kind != "upstream" || p.Origins[0].Name != testRegistry || p.Origins[0].Bytes != p.Size || p.Origins[0].When.IsZero() {
			t.Errorf("part: %+v", p)
		}
	}
	if err := a.cache.Remove(img.Layers[0].Digest); err != nil {
		t.Fatal(err)
	}
	after, err := a.Explain(testImage, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(after.Parts, func(p Part) bool { return p.Digest == img.Layers[0].Digest })
	if p := after.Parts[i]; p.Where != "upstream" || p.Present != 0 || len(p.Origins) == 0 {
		t.Errorf("an evicted layer: %+v", p)
	}
}

// TestExplainArriving: a root that is on its way is no image that nobody pulled.
func TestExplainArriving(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	held := reg.Inject(registrytest.Match{Kind: registrytest.Manifest, Method: http.MethodGet}, registrytest.Hold())
	a := start(t, c)
	pulled := make(chan error, 1)
	go func() {
		_, err := (Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client, Platform: "linux/amd64"}).Pull(t.Context(), testImage)
		pulled <- err
	}()
	<-held.Held()
	e, err := a.Explain(testImage, "linux/amd64")
	held.Release()
	if err != nil || e.Digest != img.Digest || len(e.Parts) != 1 || e.Parts[0].Where != "arriving" || e.Parts[0].Digest != img.Digest || e.Parts[0].Size >= 0 || e.Bytes != 0 {
		t.Errorf("%+v, %v", e, err)
	}
	if err := <-pulled; err != nil {
		t.Error(err)
	}
}

// TestExplainWithoutLists: what only a client that takes no lists asked for is known too.
func TestExplainWithoutLists(t *testing.T) {
	c := testConfig(t)
	_, img := startRegistry(t, &c)
	a := start(t, c)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+a.ProxyAddr()+"/v2/"+testImage.Repository+"/manifests/"+testImage.Reference+"?ns="+testRegistry, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest)
	resp, err := a.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.Body.Close() != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v", resp.Status, err)
	}
	a.settle(t)
	e, err := a.Explain(testImage, "linux/amd64")
	if err != nil || e.Digest != img.Digest || e.Checked.IsZero() {
		t.Errorf("%+v, %v", e, err)
	}
}

// TestExplainPlatforms: that an image is not made for a platform is an answer, and no
// fault of the agent's.
func TestExplainPlatforms(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	reg.Put("team/multi", registrytest.Platforms(registrytest.ImageSpec{Seed: 9, Layers: []int64{1000}}, false), "v1")
	a := start(t, c)
	multi := Image{Registry: testRegistry, Repository: "team/multi", Reference: "v1"}
	if _, err := (Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.self, Platform: "linux/amd64"}).Pull(t.Context(), multi); err != nil {
		t.Fatal(err)
	}
	a.settle(t)
	for platform, want := range map[string]struct {
		code int
		text string
	}{
		"all":         {200, "linux/arm64"},
		"linux/amd64": {200, "linux/amd64"},
		"plan9/mips":  {404, "has no manifest for plan9/mips; try --platform all"},
		"linux//":     {400, "write os/arch, such as linux/arm64"},
	} {
		code, body := a.admin(t, "GET", "/api/v1/explain?platform="+platform+"&image="+multi.String(), "")
		if code != want.code || !strings.Contains(body, want.text) {
			t.Errorf("%s: %d %s", platform, code, body)
		}
	}
}

func TestWarm(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	reg.Put("team/multi", registrytest.Platforms(registrytest.ImageSpec{Seed: 9, Layers: []int64{1000}}, false), "v1")
	a := start(t, c)
	body := `{"images": ["` + testImage.String() + `", "` + testRegistry + `/team/multi:v1", "` + testRegistry + `/team/gone:v1"], "platform": "all"}`
	code, answer := a.admin(t, "POST", "/api/v1/warm", body, "Content-Type", "application/json")
	if code != 200 {
		t.Fatalf("%d %s", code, answer)
	}
	done, failed := 0, ""
	for lines := bufio.NewScanner(strings.NewReader(answer)); lines.Scan(); {
		var e WarmEvent
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		if e.Done {
			done++
			failed += e.Error
		}
	}
	if done != 3 || !strings.Contains(failed, "team/gone") {
		t.Errorf("%d images done, errors %q:\n%s", done, failed, answer)
	}
	for d := range img.Blobs {
		// A reader has the last byte once the digest matches; the commit follows.
		eventually(t, "commit "+d.String(), func() error {
			if !a.cache.Has(d) {
				return errors.New("not in the cache")
			}
			return nil
		})
	}
	reg.ResetCounts()
	a.pull(t)
	if n := reg.Count(registrytest.Match{Kind: registrytest.Blob}); n != 0 {
		t.Errorf("%d blob requests after warming", n)
	}
}

// TestWarmPlatform: what is no platform is refused before anything is fetched.
func TestWarmPlatform(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	a := start(t, c)
	code, answer := a.admin(t, "POST", "/api/v1/warm", `{"images": ["`+testImage.String()+`"], "platform": "linux//"}`, "Content-Type", "application/json")
	if code != 400 || !strings.Contains(answer, "write os/arch, such as linux/arm64") {
		t.Errorf("%d %s", code, answer)
	}
	if n := reg.Count(registrytest.Match{}); n != 0 {
		t.Errorf("%d requests to the registry", n)
	}
}

// TestWarmOfNothing: nobody can run an image that is empty, and that it was fetched helps
// nobody. What is here of it can be explained all the same.
func TestWarmOfNothing(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	reg.Put("team/index", registrytest.Index(), "v1")
	reg.PutManifest("team/json", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion": 2, "mediaType": "`+ocispec.MediaTypeImageManifest+`"}`), "v1")
	a := start(t, c)
	for _, name := range []string{"/team/index:v1", "/team/json:v1"} {
		code, answer := a.admin(t, "POST", "/api/v1/warm", `{"images": ["`+testRegistry+name+`"], "platform": "all"}`, "Content-Type", "application/json")
		if code != 200 || !strings.Contains(answer, "the image is empty") {
			t.Errorf("%s: %d %s", name, code, answer)
		}
		code, answer = a.admin(t, "GET", "/api/v1/explain?image="+testRegistry+name, "")
		if code != 200 || !strings.Contains(answer, `"kind": "manifest"`) {
			t.Errorf("%s: %d %s", name, code, answer)
		}
	}
}

// TestWarmSaysWhy: that a registry cannot be reached is not in the proxy's answer
// to HEAD, and is what a user has to know.
func TestWarmSaysWhy(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	c.Proxy.FirstByteBudget = time.Second
	a := start(t, c)
	warm := func() (int, string) {
		return a.admin(t, "POST", "/api/v1/warm", `{"images": ["`+testImage.String()+`"]}`, "Content-Type", "application/json")
	}
	throttled := reg.Inject(registrytest.Match{Kind: registrytest.Manifest}, registrytest.TooManyRequests(30*time.Second))
	if code, answer := warm(); code != 200 || !strings.Contains(answer, "503") || !strings.Contains(answer, "429") {
		t.Errorf("throttled: %d %s", code, answer)
	}
	throttled.Remove()
	reg.Down()
	c.Cache.Dir = t.TempDir()
	a = start(t, c)
	if code, answer := warm(); code != 200 || !strings.Contains(answer, "503") || !strings.Contains(answer, "connection refused") {
		t.Errorf("gone: %d %s", code, answer)
	}
}

// TestWarmSaysWhatIsConfigured: nor is it that this node may not ask.
func TestWarmSaysWhatIsConfigured(t *testing.T) {
	c := testConfig(t)
	startRegistry(t, &c)
	c.Registries[0].Deny = []string{"secret/*"}
	a := start(t, c)
	for name, why := range map[string]string{
		"10.1.2.3/app:v1":               "add a [[registry]] table",
		testRegistry + "/secret/app:v1": "this repository is not served here",
	} {
		code, answer := a.admin(t, "POST", "/api/v1/warm", `{"images": ["`+name+`"]}`, "Content-Type", "application/json")
		if code != 200 || !strings.Contains(answer, why) {
			t.Errorf("warm: %d %s, want %q", code, answer, why)
		}
		if e := a.pin(t, name)[name]; !strings.Contains(e.Error, why) {
			t.Errorf("pin: %s, want %q", e.Error, why)
		}
	}
}

// TestWarmSaysWhatWasWrong: a body that ends early says nothing to its client.
func TestWarmSaysWhatWasWrong(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	big := registrytest.OCIImage(registrytest.ImageSpec{Seed: 5, Layers: []int64{3_000_000}, Opaque: true})
	reg.Put("team/big", big, "v1")
	reg.SetRate(0, 4_000_000) // the body begins before anybody can know
	reg.Inject(registrytest.Match{Reference: big.Layers[0].Digest.String(), Method: "GET"}, registrytest.CorruptAt(10))
	a := start(t, c)
	code, answer := a.admin(t, "POST", "/api/v1/warm", `{"images": ["`+testRegistry+`/team/big:v1"], "platform": "linux/amd64"}`, "Content-Type", "application/json")
	if code != 200 || !strings.Contains(answer, "unexpected EOF: ") || !strings.Contains(answer, "content does not match its digest") {
		t.Errorf("%d %s", code, answer)
	}
}

// TestExplainAfterARefusal: that a pull failed, and why, is not that nobody pulled.
func TestExplainAfterARefusal(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	reg.Inject(registrytest.Match{Kind: registrytest.Manifest}, registrytest.Status(http.StatusForbidden))
	byDigest := testImage
	byDigest.Reference = img.Digest.String()
	for _, image := range []Image{testImage, byDigest} {
		if _, err := a.Explain(image, ""); err == nil || !strings.Contains(err.Error(), "try `larder warm") {
			t.Errorf("before: %v", err)
		}
		if _, err := (Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client}).Pull(t.Context(), image); err == nil {
			t.Fatal("the registry does not refuse: this test shows nothing")
		}
		_, err := a.Explain(image, "")
		if !errors.Is(err, errUnknownImage) || !strings.Contains(err.Error(), "its last pull failed: ") || !strings.Contains(err.Error(), "the registry refuses this") {
			t.Errorf("after: %v", err)
		}
	}
}

// TestWarmIsKept: an image that only passed through is not warm, and neither is one whose
// first half went for its second.
func TestWarmIsKept(t *testing.T) {
	for name, tt := range map[string]struct {
		maxBytes, minFree cache.Limit
		want              string
	}{
		"no room on the disk": {minFree: cache.Percent(99.999), want: " are not kept: the cache keeps nothing new: cache.min_free keeps"},
		"no room for a layer": {maxBytes: cache.Bytes(200 << 10), want: "fetched, but 301.5 KiB of 309.0 KiB are not kept"},
		"no room for both":    {maxBytes: cache.Bytes(303 << 10), want: " are not kept: there was no room for them"},
	} {
		t.Run(name, func(t *testing.T) {
			c := testConfig(t)
			startRegistry(t, &c)
			c.Cache.MaxBytes, c.Cache.MinFree = tt.maxBytes, tt.minFree
			a := start(t, c)
			code, answer := a.admin(t, "POST", "/api/v1/warm", `{"images": ["`+testImage.String()+`"], "platform": "linux/amd64"}`, "Content-Type", "application/json")
			if code != 200 || !strings.Contains(answer, tt.want) {
				t.Errorf("%d %s", code, answer)
			}
		})
	}
}

func TestCanary(t *testing.T) {
	a := start(t, testConfig(t))
	seen := func() (c Canary) {
		t.Helper()
		code, body := a.admin(t, "GET", "/api/v1/canary?nonce=abc123", "")
		if err := json.Unmarshal([]byte(body), &c); err != nil || code != 200 {
			t.Fatalf("%d %v %s", code, err, body)
		}
		return c
	}
	if seen().Seen {
		t.Error("seen before it was pulled")
	}
	_, err := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client}.
		Pull(t.Context(), Image{Registry: "docker.io", Repository: "larder.invalid/canary", Reference: "abc123"})
	if err != nil {
		t.Fatal(err)
	}
	if c := seen(); !c.Seen || c.Registry != "docker.io" {
		t.Errorf("canary: %+v", c)
	}
}

// TestAdminRefusesBrowsers holds what a web page elsewhere cannot do.
func TestAdminRefusesBrowsers(t *testing.T) {
	c := testConfig(t)
	startRegistry(t, &c)
	a := start(t, c)
	warm := `{"images": ["` + testImage.String() + `"]}`
	tests := []struct {
		name, method, path, body string
		header                   []string
		want                     int
	}{
		{"rebound name", "GET", "/api/v1/status", "", []string{"Host", "evil.example:5053"}, 403},
		{"other address", "GET", "/metrics", "", []string{"Host", "10.1.2.3:5053"}, 403},
		{"localhost", "GET", "/healthz", "", []string{"Host", "localhost:5053"}, 200},
		{"IPv6 loopback", "GET", "/healthz", "", []string{"Host", "[::1]:5053"}, 200},
		{"foreign origin", "GET", "/api/v1/status", "", []string{"Origin", "https://evil.example"}, 403},
		{"no origin", "GET", "/api/v1/status", "", []string{"Origin", "null"}, 403},
		{"own origin", "GET", "/api/v1/status", "", []string{"Origin", "http://" + a.AdminAddr()}, 200},
		{"warm by GET", "GET", "/api/v1/warm", "", nil, 405},
		{"warm by form", "POST", "/api/v1/warm", warm, []string{"Content-Type", "text/plain"}, 415},
		{"warm from elsewhere", "POST", "/api/v1/warm", warm, []string{"Content-Type", "application/json", "Origin", "http://evil.example"}, 403},
		{"warm nothing sensible", "POST", "/api/v1/warm", "[", []string{"Content-Type", "application/json"}, 400},
		{"warm no image", "POST", "/api/v1/warm", `{"images": ["UPPER"]}`, []string{"Content-Type", "application/json"}, 400},
		{"warm by another key", "POST", "/api/v1/warm", `{"image": "` + testImage.String() + `"}`, []string{"Content-Type", "application/json"}, 400},
		{"pin no image", "POST", "/api/v1/pins", `{"images": []}`, []string{"Content-Type", "application/json"}, 400},
		{"warm too much", "POST", "/api/v1/warm", `{"images": ["` + strings.Repeat("a", maxImagesRequest) + `"]}`, []string{"Content-Type", "application/json"}, 400},
		{"explain nothing", "GET", "/api/v1/explain?image=", "", nil, 400},
		{"canary without nonce", "GET", "/api/v1/canary", "", nil, 400},
		{"profiles", "GET", "/debug/pprof/", "", nil, 200},
		{"page", "GET", "/", "", nil, 200},
		{"script", "GET", "/page.js", "", nil, 200},
		{"script, rebound", "GET", "/page.js", "", []string{"Host", "evil.example:5053"}, 403},
		{"events, rebound", "GET", "/api/v1/events", "", []string{"Host", "evil.example:5053"}, 403},
		{"events from elsewhere", "GET", "/api/v1/events", "", []string{"Origin", "http://evil.example"}, 403},
		{"image elsewhere", "GET", "/debug/pprof/profile?seconds=1", "", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Dest", "image"}, 403},
		{"another port", "GET", "/api/v1/status", "", []string{"Sec-Fetch-Site", "same-site", "Sec-Fetch-Dest", "script"}, 403},
		{"link elsewhere", "GET", "/debug/pprof/trace?seconds=1", "", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Dest", "document"}, 403},
		{"link to the page", "GET", "/", "", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Dest", "document"}, 200},
		{"typed", "GET", "/metrics", "", []string{"Sec-Fetch-Site", "none", "Sec-Fetch-Dest", "document"}, 200},
		{"the page's own", "GET", "/api/v1/status", "", []string{"Sec-Fetch-Site", "same-origin", "Sec-Fetch-Dest", "empty"}, 200},
		{"no such page", "GET", "/index.php", "", nil, 404},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if code, body := a.admin(t, tt.method, tt.path, tt.body, tt.header...); code != tt.want {
				t.Errorf("%d, want %d: %.200s", code, tt.want, body)
			}
		})
	}
	if a.cache.Stats().Blobs != 0 {
		t.Error("a refused request filled the cache")
	}
}

// TestMetricsListener holds that only metrics and probes are there, for every
// host name.
func TestMetricsListener(t *testing.T) {
	c := testConfig(t)
	c.Metrics.Listen = "127.0.0.1:0"
	a := start(t, c)
	for path, want := range map[string]int{"/metrics": 200, "/healthz": 200, "/readyz": 200, "/api/v1/status": 404, "/debug/pprof/": 404, "/": 404} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+a.listeners.metrics.Addr().String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "node-7.cluster.example"
		resp, err := a.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, resp.StatusCode, want)
		}
	}
}

// TestPage holds what the page says without a script, and that it is text, from
// whomever; test/page looks at it in a browser.
func TestPage(t *testing.T) {
	c := testConfig(t)
	c.Peer.Enabled = true
	c.Hosts.Containerd = filepath.Join(t.TempDir(), "certs.d")
	a := start(t, c)
	eventually(t, "in place", func() error { return a.hostsInPlace() })
	a.setHostsErr(errors.New("<script>alert(1)</script>"))
	code, body := a.admin(t, "GET", "/", "")
	if code != 200 || !strings.Contains(body, "Larder on node-1") || !strings.Contains(body, "alone (no peer.key_file and no peer.join)") {
		t.Errorf("%d\n%s", code, body)
	}
	if strings.Contains(body, "<script>") || !strings.Contains(body, "&lt;script&gt;alert(1)") {
		t.Errorf("an error is taken for HTML:\n%s", body)
	}
}

// TestPagePolicy holds that a browser is told to run and load only what the
// agent itself serves, and to make no HTML of text.
func TestPagePolicy(t *testing.T) {
	a := start(t, testConfig(t))
	for path, kind := range map[string]string{"/": "text/html; charset=utf-8", "/page.js": "text/javascript; charset=utf-8",
		"/page.css": "text/css; charset=utf-8", "/icon.svg": "image/svg+xml"} {
		resp, err := a.client.Get("http://" + a.AdminAddr() + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		policy := resp.Header.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "require-trusted-types-for 'script'"} {
			if !strings.Contains(policy, want) {
				t.Errorf("%s: policy %q lacks %q", path, policy, want)
			}
		}
		if strings.Contains(policy, "unsafe") || resp.Header.Get("Content-Type") != kind || resp.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %v", path, resp.Header)
		}
	}
}

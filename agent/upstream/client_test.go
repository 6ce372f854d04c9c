package upstream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/larder-cache/larder/test/registrytest"
)

func TestFailover(t *testing.T) {
	t.Parallel()
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{blobSize}, Opaque: true})
	cases := []struct {
		name          string
		first, second func(*registrytest.Server)
		wrong         func(error) bool
	}{
		{name: "mirror lacks it", first: func(s *registrytest.Server) { s.Delete(repo, "v1"); s.Delete(repo, img.Layers[0].Digest.String()) }},
		{name: "mirror down", first: func(s *registrytest.Server) { s.Down() }},
		{name: "mirror 500", first: func(s *registrytest.Server) { s.Inject(registrytest.Match{}, registrytest.Status(500)) }},
		{name: "mirror 401", first: func(s *registrytest.Server) { s.Inject(registrytest.Match{}, registrytest.Status(401)) }},
		{name: "mirror 429", first: func(s *registrytest.Server) {
			s.Inject(registrytest.Match{}, registrytest.TooManyRequests(time.Minute))
		}},
		{name: "mirror hangs", first: func(s *registrytest.Server) { s.Inject(registrytest.Match{}, registrytest.Hold()) }},
		{name: "mirror is a web page", first: func(s *registrytest.Server) { s.Inject(registrytest.Match{}, registrytest.HTML()) }},
		{name: "mirror cuts", first: func(s *registrytest.Server) { s.Inject(blobGet, registrytest.CutAfter(500_000)) }},
		{name: "origin down, mirror has it", second: func(s *registrytest.Server) { s.Down() }},
		{name: "neither has it", wrong: IsNotFound,
			first:  func(s *registrytest.Server) { s.Inject(registrytest.Match{}, registrytest.Status(404)) },
			second: func(s *registrytest.Server) { s.Inject(registrytest.Match{}, registrytest.Status(404)) }},
		{name: "mirror lacks it, origin down", wrong: IsUnavailable,
			first:  func(s *registrytest.Server) { s.Inject(registrytest.Match{}, registrytest.Status(404)) },
			second: func(s *registrytest.Server) { s.Down() }},
		{name: "mirror down, origin lacks it", wrong: IsNotFound,
			first:  func(s *registrytest.Server) { s.Down() },
			second: func(s *registrytest.Server) { s.Inject(registrytest.Match{}, registrytest.Status(404)) }},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			mirror, origin := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
			for s, harm := range map[*registrytest.Server]func(*registrytest.Server){mirror: tc.first, origin: tc.second} {
				s.Put(repo, img, "v1")
				if harm != nil {
					harm(s)
				}
			}
			c := clientOf(t, mirror, origin)
			_, err := c.Resolve(t.Context(), target, "v1", nil)
			sink := newSink(256 << 10)
			ferr := c.Fetch(t.Context(), target, img.Layers[0].Digest, sink)
			if tc.wrong != nil {
				if !tc.wrong(err) || !tc.wrong(ferr) {
					t.Errorf("Resolve: %v; Fetch: %v", err, ferr)
				}
				return
			}
			if err != nil || ferr != nil {
				t.Fatalf("Resolve: %v; Fetch: %v", err, ferr)
			}
			sink.check(t, img.Layers[0].Digest)
		})
	}
}

// TestFailoverWithinBudget pins that a hanging mirror leaves time for the origin.
func TestFailoverWithinBudget(t *testing.T) {
	t.Parallel()
	mirror, origin := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	origin.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
	mirror.Inject(registrytest.Match{}, registrytest.Hold())
	c := newClient(t, func(cfg *Config) { cfg.FirstByte = time.Minute }, registryOf(mirror, origin))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := c.Resolve(ctx, target, "v1", nil); err != nil {
		t.Error(err)
	}
}

// TestDeadRegistryFailsFast pins that the breaker spares later requests the
// wait, and that the endpoint is found again.
func TestDeadRegistryFailsFast(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
	hang := reg.Inject(registrytest.Match{}, registrytest.Hold())
	c := newClient(t, func(cfg *Config) { cfg.FirstByte = 200 * time.Millisecond }, registryOf(reg))
	for range 2 {
		if _, err := c.Resolve(t.Context(), target, "v1", nil); err == nil {
			t.Fatal("a registry that hangs answered")
		}
	}
	before := reg.Count(registrytest.Match{})
	_, err := c.Resolve(t.Context(), target, "v1", nil)
	if e, _ := errors.AsType[*Error](err); !errors.Is(err, ErrCircuitOpen) || !IsUnavailable(err) || e.RetryAfter <= 0 {
		t.Fatalf("Resolve: %v, want an open circuit", err)
	}
	if n := reg.Count(registrytest.Match{}); n != before {
		t.Errorf("%d requests through an open circuit", n-before)
	}
	if h := c.Health()[0]; h.State != "open" || h.RetryAt.IsZero() || h.LastError == "" {
		t.Errorf("health: %+v", h)
	}
	hang.Remove()
	endPause(c)
	if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
		t.Errorf("after the pause: %v", err)
	}
	if h := c.Health()[0]; h.State != "ok" || h.Latency <= 0 {
		t.Errorf("health: %+v", h)
	}
}

// endPause lets the next request through an open circuit.
func endPause(c *Client) {
	b := &(*c.configured.Load())["test"].endpoints[0].breaker
	b.mu.Lock()
	defer b.mu.Unlock()
	b.until = time.Now()
}

// TestProbeIsALongBlob: a registry is back once a blob gets on, not once it is whole.
// Its end says nothing any more of a registry that has gone again.
func TestProbeIsALongBlob(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
	d := reg.PutBlob(repo, registrytest.Random(7, blobSize)).Digest
	reg.Inject(blobGet, registrytest.StallAfter(2*minProgress))
	c := clientOf(t, reg)
	fail := func() {
		t.Helper()
		down := reg.Inject(registrytest.Match{Kind: registrytest.Manifest}, registrytest.Status(503))
		defer down.Remove()
		for range breakAfter {
			c.Resolve(t.Context(), target, "v1", nil)
		}
		if h := c.Health()[0]; h.State != "open" {
			t.Fatalf("health after %d failures: %+v", breakAfter, h)
		}
	}
	fail()
	endPause(c)
	body, _, err := c.Blob(t.Context(), target, d, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if _, err := c.Resolve(t.Context(), target, "v1", nil); !errors.Is(err, ErrCircuitOpen) {
		t.Errorf("before the first byte: %v, want an open circuit", err)
	}
	if _, err := io.ReadFull(body, make([]byte, minProgress)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
		t.Errorf("while the blob is under way: %v", err)
	}
	fail()
	body.Close()
	if h := c.Health()[0]; h.State != "open" || h.Connections != 0 {
		t.Errorf("health after the blob: %+v", h)
	}
}

// TestAnErrorIsNoOK: a registry that answers nothing but 500 was never well.
func TestAnErrorIsNoOK(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	reg.Inject(registrytest.Match{}, registrytest.Status(500))
	c := clientOf(t, reg)
	if _, err := c.Resolve(t.Context(), target, "v1", nil); !IsUnavailable(err) {
		t.Fatalf("Resolve: %v", err)
	}
	if h := c.Health()[0]; !h.LastOKAt.IsZero() || h.State != "failing" || h.LastErrorAt.IsZero() {
		t.Errorf("health: %+v", h)
	}
}

// TestThrottledRegistryIsLeftAlone pins the answer to 429: no further request
// of that kind before Retry-After, while blobs go on.
func TestThrottledRegistryIsLeftAlone(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	d := reg.PutBlob(repo, registrytest.Random(7, 1000)).Digest
	manifests := registrytest.Match{Kind: registrytest.Manifest}
	reg.Inject(manifests, registrytest.TooManyRequests(30*time.Second))
	c := clientOf(t, reg)
	for range 3 {
		_, err := c.Resolve(t.Context(), target, "v1", nil)
		e, _ := errors.AsType[*Error](err)
		if !IsUnavailable(err) || e.Status != http.StatusTooManyRequests || e.RetryAfter < 28*time.Second {
			t.Errorf("Resolve: %v", err)
		}
	}
	if n := reg.Count(manifests); n != 1 {
		t.Errorf("%d requests, want 1", n)
	}
	if err := c.Fetch(t.Context(), target, d, newSink(1024)); err != nil {
		t.Errorf("a blob meanwhile: %v", err)
	}
	if h := c.Health()[0]; h.State != "paused" {
		t.Errorf("health: %+v", h)
	}
}

// TestThrottledCallerIsAlone: a registry limits each account by itself, so what one client
// is told of its own holds for no other's.
func TestThrottledCallerIsAlone(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
	reg.Inject(registrytest.Match{}, registrytest.Times(1), registrytest.TooManyRequests(30*time.Second))
	c := clientOf(t, reg)
	for i, tc := range []struct {
		authorization string
		throttled     bool
	}{{"Bearer ann", true}, {"Bearer bob", false}, {"Bearer ann", true}, {"", false}} {
		_, err := c.Resolve(t.Context(), Target{Registry: "test", Repository: repo, Authorization: tc.authorization}, "v1", nil)
		if e, ok := errors.AsType[*Error](err); ok != tc.throttled || ok && e.Status != http.StatusTooManyRequests {
			t.Errorf("request %d: %v", i, err)
		}
	}
}

func TestNoContact(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	r := registryOf(reg)
	r.ContactUpstream = new(bool)
	c := newClient(t, nil, r)
	_, err := c.Resolve(t.Context(), target, "v1", nil)
	ferr := c.Fetch(t.Context(), target, reg.PutBlob(repo, registrytest.Bytes([]byte("x"))).Digest, newSink(1024))
	if !errors.Is(err, ErrNoContact) || !IsUnavailable(err) || !errors.Is(ferr, ErrNoContact) {
		t.Errorf("Resolve: %v; Fetch: %v", err, ferr)
	}
	if n := reg.Count(registrytest.Match{}); n != 0 {
		t.Errorf("%d requests", n)
	}
	if c.Policy("test").Contact() || !c.Policy("other.test").Contact() || c.Health()[0].State != "no-contact" {
		t.Error("policy or health say otherwise")
	}
}

func TestConnectionsAreShared(t *testing.T) {
	for _, tc := range []struct{ max, bulk, slots int64 }{{1, 1, 2}, {2, 1, 2}, {4, 3, 4}, {16, 12, 16}} {
		if slots, bulk := bulkShare(int(tc.max)); slots != tc.slots || bulk != tc.bulk {
			t.Errorf("max_connections %d: %d, %d for blobs", tc.max, slots, bulk)
		}
	}
	reg := registrytest.Start(t, registrytest.Options{})
	reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
	d := reg.PutBlob(repo, registrytest.Random(7, blobSize)).Digest
	stall := reg.Inject(blobGet, registrytest.Hold())
	r := registryOf(reg)
	r.MaxConnections = 2
	c := newClient(t, func(cfg *Config) { cfg.FirstByte = time.Minute }, r)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 3)
	for range cap(done) {
		go func() { done <- c.Fetch(ctx, target, d, newSink(256<<10)) }()
	}
	<-stall.Held()
	if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
		t.Errorf("a manifest while blobs have their connections: %v", err)
	}
	if n := reg.Count(blobGet); n != 1 {
		t.Errorf("%d blob requests at once, want 1", n)
	}
	cancel()
	for range cap(done) {
		if err := <-done; err == nil {
			t.Error("a fetch without its end succeeded")
		}
	}
}

func TestByteRates(t *testing.T) {
	t.Parallel()
	reg := registrytest.Start(t, registrytest.Options{})
	d := reg.PutBlob(repo, registrytest.Random(7, blobSize)).Digest
	for name, edit := range map[string]func(*Config){
		"registry": func(cfg *Config) { cfg.Registries[0].MaxBytesPerSecond = 1 << 20 },
		"all":      func(cfg *Config) { cfg.MaxBytesPerSecond = 1 << 20 },
	} {
		c := newClient(t, edit, registryOf(reg))
		began := time.Now()
		if err := c.Fetch(t.Context(), target, d, newSink(256<<10)); err != nil {
			t.Fatal(err)
		}
		// A burst of 256 KiB is free, the rest comes at 1 MiB/s.
		if took := time.Since(began); took < 700*time.Millisecond {
			t.Errorf("%s: 1 MiB at 1 MiB/s took %v", name, took)
		}
	}
}

func TestTLS(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{TLS: true, ClientCerts: true})
	reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
	dir := t.TempDir()
	ca, err := reg.CAFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := reg.ClientCertFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	with := func(edit func(*Registry)) error {
		r := registryOf(reg)
		edit(&r)
		_, err := newClient(t, nil, r).Resolve(t.Context(), target, "v1", nil)
		return err
	}
	if err := with(func(r *Registry) { r.CAFile, r.ClientCertFile, r.ClientKeyFile = ca, cert, key }); err != nil {
		t.Errorf("with CA and certificate: %v", err)
	}
	if err := with(func(r *Registry) { r.SkipVerify, r.ClientCertFile, r.ClientKeyFile = true, cert, key }); err != nil {
		t.Errorf("with skip_verify: %v", err)
	}
	if err := with(func(r *Registry) { r.CAFile = ca }); !IsUnavailable(err) {
		t.Errorf("without certificate: %v", err)
	}
	if err := with(func(r *Registry) {}); err == nil || !strings.Contains(err.Error(), `set ca_file for registry "test"`) {
		t.Errorf("without CA: %v", err)
	}
	if err := with(func(r *Registry) { r.Upstreams[0] = strings.Replace(reg.URL(), "https", "http", 1) }); err == nil {
		t.Error("http to an https port: no error")
	}
	open := registrytest.Start(t, registrytest.Options{})
	_, err = newClient(t, nil, Registry{Host: "test", Upstreams: []string{"https://" + open.Host()}}).Resolve(t.Context(), target, "v1", nil)
	if err == nil || !strings.Contains(err.Error(), "write http://") {
		t.Errorf("https to an http port: %v", err)
	}
}

// TestCertificateAppears starts without the CA file, which a Secret brings later.
func TestCertificateAppears(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{TLS: true})
	reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
	ca, err := reg.CAFile(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	late := filepath.Join(t.TempDir(), "ca.pem")
	r := registryOf(reg)
	r.CAFile = late
	c := newClient(t, nil, r)
	if _, err := c.Resolve(t.Context(), target, "v1", nil); !IsUnavailable(err) || !strings.Contains(err.Error(), "ca_file") {
		t.Errorf("without the file: %v", err)
	}
	ep := (*c.configured.Load())["test"].endpoints[0]
	ep.breaker.done(good, time.Now())
	write := func(content []byte) {
		if err := os.WriteFile(late, content, 0o600); err != nil {
			t.Fatal(err)
		}
		ep.mu.Lock()
		if ep.transports != nil {
			ep.transports.checked = time.Time{}
		}
		ep.mu.Unlock()
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	write(pem)
	if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
		t.Errorf("with the file: %v", err)
	}
	write([]byte("half a file"))
	if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
		t.Errorf("with a broken file after a good one: %v", err)
	}
}

func TestLists(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3})
	reg.Put(repo, img, "a", "b", "c")
	reg.Put(repo, registrytest.Artifact(img.Descriptor, "application/vnd.test", 1))
	c := clientOf(t, reg)
	page, err := c.Tags(t.Context(), target, "n=2")
	if err != nil || !strings.Contains(string(page.Body), `"a"`) || !strings.Contains(page.Next, "last=b") {
		t.Errorf("Tags: %s, next %q, %v", page.Body, page.Next, err)
	}
	if page, err = c.Tags(t.Context(), target, page.Next); err != nil || page.Next != "" || !strings.Contains(string(page.Body), `"c"`) {
		t.Errorf("Tags after b: %s, next %q, %v", page.Body, page.Next, err)
	}
	page, err = c.Referrers(t.Context(), target, img.Digest, "artifactType=application%2Fvnd.test")
	if err != nil || !strings.Contains(string(page.Body), "application/vnd.test") || page.ContentType != "application/vnd.oci.image.index.v1+json" {
		t.Errorf("Referrers: %s (%s), %v", page.Body, page.ContentType, err)
	}
	for name, fault := range map[string]registrytest.Effect{"404": registrytest.Status(404), "405": registrytest.Status(405), "web page": registrytest.HTML()} {
		f := reg.Inject(registrytest.Match{Kind: registrytest.Referrers}, fault)
		if _, err := c.Referrers(t.Context(), target, img.Digest, ""); !IsNotFound(err) {
			t.Errorf("Referrers, %s: %v, want not found", name, err)
		}
		f.Remove()
	}
	reg.Inject(registrytest.Match{Kind: registrytest.Tags}, registrytest.Body("application/json", registrytest.Bytes(bytes.Repeat([]byte("[]"), 3<<20))))
	if _, err := c.Tags(t.Context(), target, ""); !errors.Is(err, ErrBadAnswer) {
		t.Errorf("6 MiB of tags: %v", err)
	}
}

func TestMetrics(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: registrytest.Bearer, Anonymous: []string{repo}}})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{100}})
	reg.Put(repo, img, "v1")
	reg.Inject(registrytest.Match{Kind: registrytest.Manifest}, registrytest.Header("ratelimit-limit", "100;w=21600"), registrytest.Header("ratelimit-remaining", "76;w=21600"))
	prom := prometheus.NewRegistry()
	c := newClient(t, func(cfg *Config) { cfg.Registerer = prom }, registryOf(reg))
	if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Fetch(t.Context(), target, img.Layers[0].Digest, newSink(1024)); err != nil {
		t.Fatal(err)
	}
	err := testutil.GatherAndCompare(prom, strings.NewReader(`
# HELP larder_upstream_ratelimit_limit Pulls that the registry allows in a window, as it said last.
# TYPE larder_upstream_ratelimit_limit gauge
larder_upstream_ratelimit_limit{registry="test"} 100
# HELP larder_upstream_ratelimit_remaining Pulls left in the registry's current window, as it said last.
# TYPE larder_upstream_ratelimit_remaining gauge
larder_upstream_ratelimit_remaining{registry="test"} 76
# HELP larder_upstream_requests_total HTTP requests sent to registries, redirect targets and token services.
# TYPE larder_upstream_requests_total counter
larder_upstream_requests_total{code="206",kind="blob",registry="test"} 1
larder_upstream_requests_total{code="200",kind="manifest",registry="test"} 1
larder_upstream_requests_total{code="200",kind="token",registry="test"} 1
larder_upstream_requests_total{code="401",kind="manifest",registry="test"} 1
`))
	if err != nil {
		t.Error(err)
	}
	if l := c.Health()[0].RateLimit; l == nil || *l != (RateLimit{100, 76, 6 * time.Hour}) {
		t.Errorf("rate limit: %+v", l)
	}
	if _, err := New(Config{Registerer: prom}); err == nil {
		t.Error("metrics registered twice without an error")
	}
}

// TestUnconfiguredAreBounded pins that clients cannot grow the client by naming
// registries.
func TestUnconfiguredAreBounded(t *testing.T) {
	c := newClient(t, nil)
	for i := range 3 * maxOthers {
		if _, err := c.lookup("r" + strings.Repeat("x", i%50) + string(rune('a'+i%26)) + ".test"); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(c.Health()); n > maxOthers {
		t.Errorf("%d registries remembered", n)
	}
}

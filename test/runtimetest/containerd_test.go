package runtimetest_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/larder-cache/larder/test/registrytest"
	"github.com/larder-cache/larder/test/runtimetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	host = "registry.test"
	repo = "library/app"
)

// mirrored is a registry named registry.test and another that is its mirror.
type mirrored struct {
	mirror, upstream *registrytest.Server
	containerd       *runtimetest.Containerd
	certs            string
}

func newMirrored(t *testing.T, opts registrytest.Options) mirrored {
	t.Helper()
	m := mirrored{
		mirror:   registrytest.Start(t, opts),
		upstream: registrytest.Start(t, registrytest.Options{}),
		certs:    t.TempDir(),
	}
	m.containerd = &runtimetest.Containerd{CertsDir: m.certs, Root: filepath.Join(t.TempDir(), "content")}
	writeHosts(t, m.certs, host, m.upstream.URL(), m.mirror.URL())
	return m
}

func writeHosts(t *testing.T, certs, dir, server, mirror string) {
	t.Helper()
	toml := fmt.Sprintf("server = %q\n\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", server, mirror)
	if err := os.MkdirAll(filepath.Join(certs, dir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(certs, dir, "hosts.toml"), []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
}

// put adds an image to both registries.
func (m mirrored) put(img *registrytest.Image, tag string) {
	m.mirror.Put(repo, img, tag)
	m.upstream.Put(repo, img, tag)
}

var layers = registrytest.ImageSpec{Seed: 1, Layers: []int64{1000, 2_000_000}}

func TestPull(t *testing.T) {
	for name, tc := range map[string]struct {
		img     *registrytest.Image
		content int
	}{
		"oci":    {registrytest.OCIImage(layers), 4},
		"docker": {registrytest.DockerImage(layers), 4},
		"index":  {registrytest.Platforms(layers, false), 5},
		"list":   {registrytest.Platforms(layers, true), 5},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMirrored(t, registrytest.Options{})
			m.put(tc.img, "v1")
			r, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", nil)
			if err != nil {
				t.Fatal(err)
			}
			if r.Target.Digest != tc.img.Digest || len(r.Content) != tc.content {
				t.Errorf("got %s with %d parts", r.Target.Digest, len(r.Content))
			}
			if m.upstream.Count(registrytest.Match{}) != 0 || r.From(m.mirror.Host()) < tc.content {
				t.Errorf("not all from the mirror: %v", r.Exchanges)
			}
			for _, q := range m.mirror.Requests(registrytest.Match{}) {
				if !strings.HasSuffix(q.Path, "?ns="+host) {
					t.Errorf("%s without ns", q.Path)
				}
			}
		})
	}
}

// TestStoreBetweenPulls pins that a pull fetches no blob twice, and everything
// after Wipe.
func TestStoreBetweenPulls(t *testing.T) {
	m := newMirrored(t, registrytest.Options{})
	m.put(registrytest.OCIImage(layers), "v1")
	blobs := registrytest.Match{Kind: registrytest.Blob}
	for i, want := range []int{3, 3, 6} {
		if i == 2 {
			if err := m.containerd.Wipe(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
			t.Fatal(err)
		}
		if n := m.mirror.Count(blobs); n != want {
			t.Errorf("after pull %d: %d blob requests, want %d", i, n, want)
		}
	}
}

// TestFaultsOfAMirror pins what containerd does with a broken mirror, so that
// the tests that rest on this client mean what they say.
func TestFaultsOfAMirror(t *testing.T) {
	big := registrytest.OCIImage(layers).Layers[1].Digest.String()
	for name, tc := range map[string]struct {
		match    registrytest.Match
		effects  []registrytest.Effect
		ok       bool
		upstream int // answers 200 or 206
	}{
		"down":                      {registrytest.Match{}, []registrytest.Effect{registrytest.Status(503)}, true, 5},
		"no manifest":               {registrytest.Match{Kind: registrytest.Manifest}, []registrytest.Effect{registrytest.Status(404)}, true, 2},
		"no blob":                   {registrytest.Match{Reference: big}, []registrytest.Effect{registrytest.Status(404)}, true, 1},
		"cut once":                  {registrytest.Match{Reference: big}, []registrytest.Effect{registrytest.Times(1), registrytest.CutAfter(1000)}, true, 0},
		"reset":                     {registrytest.Match{Reference: big}, []registrytest.Effect{registrytest.ResetAfter(1000)}, false, 0},
		"corrupt":                   {registrytest.Match{Reference: big}, []registrytest.Effect{registrytest.CorruptAt(1000)}, false, 0},
		"cut before the first byte": {registrytest.Match{Reference: big}, []registrytest.Effect{registrytest.CutAfter(0)}, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMirrored(t, registrytest.Options{})
			m.put(registrytest.OCIImage(layers), "v1")
			m.mirror.Inject(tc.match, tc.effects...)
			r, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", nil)
			if (err == nil) != tc.ok || r.From(m.upstream.Host()) != tc.upstream {
				t.Errorf("got %v and %d answers from upstream; want ok %v, %d", err, r.From(m.upstream.Host()), tc.ok, tc.upstream)
			}
		})
	}
}

// TestWayOut is the seamless fallback: a body that ends short, then 503 on the
// resume, sends containerd upstream for the rest in the same pull.
func TestWayOut(t *testing.T) {
	m := newMirrored(t, registrytest.Options{})
	img := registrytest.OCIImage(layers)
	m.put(img, "v1")
	big := registrytest.Match{Reference: img.Layers[1].Digest.String()}
	m.mirror.Inject(big, registrytest.Times(1), registrytest.CutAfter(1000))
	m.mirror.Inject(big, registrytest.Skip(1), registrytest.Status(503))
	if _, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
		t.Fatal(err)
	}
	rest := m.upstream.Requests(big)
	if len(rest) != 1 || rest[0].Header.Get("Range") != "bytes=1000-" {
		t.Errorf("upstream saw %+v", rest)
	}
}

// TestIngestsAreResumed pins both ways: kept, the next pull asks for the rest
// alone; not kept, for everything.
func TestIngestsAreResumed(t *testing.T) {
	for _, keep := range []bool{false, true} {
		t.Run(fmt.Sprint(keep), func(t *testing.T) {
			m := newMirrored(t, registrytest.Options{})
			img := registrytest.OCIImage(layers)
			m.put(img, "v1")
			big := registrytest.Match{Reference: img.Layers[1].Digest.String()}
			m.mirror.Inject(big, registrytest.Times(1), registrytest.ResetAfter(1_500_000))
			m.containerd.KeepIngests = keep
			if _, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", nil); err == nil {
				t.Fatal("the first pull succeeded")
			}
			m.mirror.ResetCounts()
			if _, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
				t.Fatal(err)
			}
			requests := m.mirror.Requests(big)
			if len(requests) != 1 || (requests[0].Header.Get("Range") != "") != keep {
				t.Errorf("second pull sent %+v", requests)
			}
		})
	}
}

func TestChunks(t *testing.T) {
	m := newMirrored(t, registrytest.Options{})
	img := registrytest.OCIImage(layers)
	m.put(img, "v1")
	m.containerd.ChunkSize = 500_000
	if _, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
		t.Fatal(err)
	}
	ranges := map[string]bool{}
	for _, q := range m.mirror.Requests(registrytest.Match{Reference: img.Layers[1].Digest.String()}) {
		ranges[q.Header.Get("Range")] = true
	}
	if !ranges["bytes=0-"] || !ranges["bytes=500000-"] || len(ranges) != 5 {
		t.Errorf("asked for %v", ranges)
	}
}

// TestCredentials pins that a mirror that challenges gets the pod's credentials,
// unless they are meant for another server.
func TestCredentials(t *testing.T) {
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		for name, tc := range map[string]struct {
			auth     *runtimetest.Auth
			fallback bool
		}{
			"as kubelet":     {&runtimetest.Auth{Username: "user", Password: "secret"}, false},
			"wrong":          {&runtimetest.Auth{Username: "user", Password: "wrong"}, true},
			"other server":   {&runtimetest.Auth{Username: "user", Password: "secret", ServerAddress: "https://other.test"}, true},
			"no credentials": {nil, true},
		} {
			t.Run(string(scheme)+" "+name, func(t *testing.T) {
				m := newMirrored(t, registrytest.Options{Auth: registrytest.Auth{
					Scheme: scheme, Users: map[string]string{"user": "secret"},
				}})
				m.put(registrytest.OCIImage(layers), "v1")
				r, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", tc.auth)
				if err != nil {
					t.Fatal(err)
				}
				if got := r.From(m.upstream.Host()) > 0; got != tc.fallback {
					t.Errorf("went upstream: %v, want %v", got, tc.fallback)
				}
			})
		}
	}
}

// TestTLSMirror pins that the CA beside hosts.toml's mirror is used.
func TestTLSMirror(t *testing.T) {
	m := newMirrored(t, registrytest.Options{TLS: true})
	m.put(registrytest.OCIImage(layers), "v1")
	ca, err := m.mirror.CAFile(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	toml := fmt.Sprintf("server = %q\n\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\nca = %q\n", m.upstream.URL(), m.mirror.URL(), ca)
	if err := os.WriteFile(filepath.Join(m.certs, host, "hosts.toml"), []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", nil)
	if err != nil || r.From(m.upstream.Host()) != 0 {
		t.Errorf("got %v, %v", err, r.Exchanges)
	}
}

// TestRoots pins that the first root with something for the host wins.
func TestRoots(t *testing.T) {
	m := newMirrored(t, registrytest.Options{})
	m.put(registrytest.OCIImage(layers), "v1")
	first := t.TempDir()
	writeHosts(t, first, "_default", m.upstream.URL(), m.upstream.URL())
	m.containerd.CertsDir = first + ":" + m.certs
	r, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", nil)
	if err != nil || r.From(m.mirror.Host()) != 0 {
		t.Errorf("got %v from the mirror in the second root, %v", r.From(m.mirror.Host()), err)
	}
}

func TestExchangesSayWhatHappened(t *testing.T) {
	m := newMirrored(t, registrytest.Options{})
	m.put(registrytest.OCIImage(layers), "v1")
	m.mirror.Down()
	r, err := m.containerd.Pull(t.Context(), host+"/"+repo+":v1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if e := r.Exchanges[0]; e.Status != 0 || e.Err == nil || e.Method != http.MethodHead {
		t.Errorf("first exchange %+v", e)
	}
}

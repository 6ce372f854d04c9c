package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/larder-cache/larder/test/runtimetest"
)

const (
	host = "registry.test"
	repo = "library/app"
)

var testRepository = cache.Repository{Registry: host, Name: repo}

// node is a whole one: registry, upstream client, cache and proxy on a real port.
type node struct {
	t        *testing.T
	registry *registrytest.Server
	cache    *cache.Cache
	proxy    *Proxy
	metrics  *prometheus.Registry
	addr     string
	stop     context.CancelFunc // SIGTERM
	served   chan error         // what Serve returned
	ran      chan error         // what Run returned
	client   *http.Client
}

// setup is what a test changes about its node.
type setup struct {
	registry registrytest.Options
	upstream upstream.Config
	policy   upstream.Registry
	cache    cache.Options
	proxy    Options
}

func startNode(t *testing.T, change func(*setup)) *node {
	t.Helper()
	s := setup{
		upstream: upstream.Config{FirstByte: 2 * time.Second, Stall: time.Second},
		proxy:    Options{FirstByteBudget: 2 * time.Second, StallTimeout: 3 * time.Second, TagTTL: 0, Grace: 2 * time.Second},
	}
	if change != nil {
		change(&s)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	n := &node{t: t, registry: registrytest.Start(t, s.registry), metrics: prometheus.NewRegistry(), served: make(chan error, 1), ran: make(chan error, 1)}
	s.policy.Host, s.policy.Upstreams = host, []string{n.registry.URL()}
	s.upstream.Registries, s.upstream.Logger = []upstream.Registry{s.policy}, log
	client, err := upstream.New(s.upstream)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	if s.cache.Dir == "" {
		s.cache.Dir = t.TempDir()
	}
	s.cache.Logger = log
	if n.cache, err = cache.New(s.cache); err != nil {
		t.Fatal(err)
	}
	s.proxy.Cache, s.proxy.Upstream, s.proxy.Registerer = n.cache, client, n.metrics
	if s.proxy.Logger == nil {
		s.proxy.Logger = log
	}
	if n.proxy, err = New(s.proxy); err != nil {
		t.Fatal(err)
	}
	n.run()
	return n
}

// run starts everything, and ends it in order with the test.
func (n *node) run() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	n.addr = l.Addr().String()
	n.client = &http.Client{Transport: &http.Transport{DisableCompression: true}}
	caching, stopCache := context.WithCancel(context.Background())
	running, stopRun := context.WithCancel(context.Background())
	serving, stop := context.WithCancel(context.Background())
	n.stop = stop
	cached, served, ran := make(chan error, 1), make(chan struct{}), make(chan struct{})
	go func() { cached <- n.cache.Run(caching) }()
	go func() { n.ran <- n.proxy.Run(running); close(ran) }()
	go func() { n.served <- n.proxy.Serve(serving, l); close(served) }()
	n.t.Cleanup(func() {
		n.client.CloseIdleConnections()
		n.proxy.mu.Lock()
		n.proxy.lastBound = time.Time{} // nobody asks again
		n.proxy.mu.Unlock()
		stop()
		<-served
		stopRun()
		<-ran
		stopCache()
		if err := errors.Join(<-cached, n.cache.Close()); err != nil {
			n.t.Errorf("cache: %v", err)
		}
	})
}

// answer is a whole answer in memory.
type answer struct {
	status int
	header http.Header
	body   []byte
	err    error // of reading the body
}

func (n *node) do(method, path string, header ...string) answer {
	n.t.Helper()
	resp := n.open(n.t.Context(), method, path, header...)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, body, err}
}

func (n *node) open(ctx context.Context, method, path string, header ...string) *http.Response {
	n.t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+n.addr+path, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := n.client.Do(req)
	if err != nil {
		n.t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp
}

// attempt is get where there may be no answer: then that is the error.
func (n *node) attempt(path string) answer {
	n.t.Helper()
	resp, err := n.client.Get("http://" + n.addr + path)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, body, err}
}

func (n *node) get(path string, header ...string) answer {
	n.t.Helper()
	return n.do(http.MethodGet, path, header...)
}

// put publishes an image at the registry, under the tag v1.
func (n *node) put(img *registrytest.Image) *registrytest.Image {
	n.registry.Put(repo, img, "v1")
	return img
}

// image is a published image with layers of the given sizes.
func (n *node) image(layers ...int64) *registrytest.Image {
	if len(layers) == 0 {
		layers = []int64{2_000_000}
	}
	return n.put(registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: layers, Opaque: true}))
}

func blobPath(d digest.Digest) string {
	return "/v2/" + repo + "/blobs/" + d.String() + "?ns=" + host
}
func manifestPath(reference string) string {
	return "/v2/" + repo + "/manifests/" + reference + "?ns=" + host
}
func pathBlob(d digest.Digest) string {
	return "/v2/" + host + "/" + repo + "/blobs/" + d.String()
}
func pathManifest(reference string) string {
	return "/v2/" + host + "/" + repo + "/manifests/" + reference
}

// bytesOf is the true content of a blob.
func bytesOf(t testing.TB, img *registrytest.Image, d digest.Digest) []byte {
	t.Helper()
	c := img.Blobs[d]
	b := make([]byte, c.Size())
	if _, err := c.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return b
}

// containerd is a runtime that has the proxy as mirror of registry.test and the
// registry behind it.
func (n *node) containerd() *runtimetest.Containerd { return n.containerdTo(n.registry.URL()) }

// containerdTo is one that reaches the registry at another place than the proxy does.
func (n *node) containerdTo(server string) *runtimetest.Containerd {
	n.t.Helper()
	certs := n.t.TempDir()
	dir := filepath.Join(certs, host)
	toml := "server = \"" + server + "\"\n\n[host.\"http://" + n.addr + "\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(toml), 0o644)); err != nil {
		n.t.Fatal(err)
	}
	return &runtimetest.Containerd{CertsDir: certs, Root: filepath.Join(n.t.TempDir(), "content")}
}

// crio is a runtime that has the proxy as path-encoded mirror.
func (n *node) crio() *runtimetest.CRIO {
	return &runtimetest.CRIO{Sources: []string{n.addr + "/" + host, n.registry.Host()}}
}

// await waits for what another goroutine does.
func await(t testing.TB, what string, done func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

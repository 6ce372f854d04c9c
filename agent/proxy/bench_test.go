package proxy

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
)

// warmServer serves one blob and its manifest out of the cache over real TCP.
func warmServer(b *testing.B, size int64) (url string, img *registrytest.Image) {
	log := slog.New(slog.DiscardHandler)
	c, err := cache.New(cache.Options{Dir: b.TempDir(), Logger: log})
	if err != nil {
		b.Fatal(err)
	}
	running := make(chan error, 1)
	go func() { running <- c.Run(b.Context()) }()
	b.Cleanup(func() {
		if err := <-running; err != nil {
			b.Errorf("cache: %v", err)
		}
		_ = c.Close()
	})
	reg, err := registrytest.New(registrytest.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(reg.Close)
	up, err := upstream.New(upstream.Config{Logger: log, Registries: []upstream.Registry{{Host: host, Upstreams: []string{reg.URL()}}}})
	if err != nil {
		b.Fatal(err)
	}
	p, err := New(Options{Cache: c, Upstream: up, Logger: log})
	if err != nil {
		b.Fatal(err)
	}
	img = registrytest.OCIImage(registrytest.ImageSpec{Seed: 1, Layers: []int64{size}, Opaque: true})
	reg.Put(repo, img, "v1")
	s := httptest.NewServer(p)
	b.Cleanup(s.Close)
	for _, path := range []string{manifestPath("v1"), blobPath(img.Layers[0].Digest)} {
		resp, err := http.Get(s.URL + path)
		if err != nil || resp.StatusCode != http.StatusOK {
			b.Fatal(resp, err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			b.Fatal(err)
		}
		_ = resp.Body.Close()
	}
	await(b, "commit", func() bool { return c.Has(img.Layers[0].Digest) })
	return s.URL, img
}

func benchGet(b *testing.B, url string, size int64) {
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		resp, err := http.Get(url)
		if err != nil {
			b.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, resp.Body); n != size || err != nil {
			b.Fatal(n, err)
		}
		_ = resp.Body.Close()
	}
	http.DefaultClient.CloseIdleConnections()
}

func BenchmarkWarmBlob(b *testing.B) {
	url, img := warmServer(b, 256<<20)
	benchGet(b, url+blobPath(img.Layers[0].Digest), 256<<20)
}

// BenchmarkWarmSmallBlob is where what is not the bytes shows.
func BenchmarkWarmSmallBlob(b *testing.B) {
	url, img := warmServer(b, 4<<10)
	benchGet(b, url+blobPath(img.Layers[0].Digest), 4<<10)
}

func BenchmarkWarmManifest(b *testing.B) {
	url, img := warmServer(b, 1000)
	benchGet(b, url+manifestPath(img.Digest.String()), img.Size)
}

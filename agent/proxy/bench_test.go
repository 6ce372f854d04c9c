package proxy

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/opencontainers/go-digest"

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
	up, err := upstream.New(upstream.Config{Logger: log})
	if err != nil {
		b.Fatal(err)
	}
	p, err := New(Options{Cache: c, Upstream: up, Logger: log})
	if err != nil {
		b.Fatal(err)
	}
	img = registrytest.OCIImage(registrytest.ImageSpec{Seed: 1, Layers: []int64{size}, Opaque: true})
	put := func(d digest.Digest, body []byte) {
		if err := c.Put(b.Context(), d, cache.Origin{Kind: cache.FromUpstream}, body); err != nil {
			b.Fatal(err)
		}
	}
	put(img.Layers[0].Digest, bytesOf(b, img, img.Layers[0].Digest))
	put(img.Digest, img.Manifests[0].Data)
	s := httptest.NewServer(p)
	b.Cleanup(s.Close)
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

func BenchmarkWarmManifest(b *testing.B) {
	url, img := warmServer(b, 1000)
	benchGet(b, url+manifestPath(img.Digest.String()), img.Size)
}

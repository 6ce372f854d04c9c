package proxy

import (
	"bytes"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
)

// TestSignaturesWithUpstreamDown: a path-encoded client, whose pull fails on any error but
// 404 of a signature, is told that there is none if nobody knows one and the registry
// cannot say, and gets a known one without its config, which it does not read. Others, which
// go on to the registry, are told that it cannot say.
func TestSignaturesWithUpstreamDown(t *testing.T) {
	signatures := func(d digest.Digest) string { return "sha256-" + d.Encoded() + ".sig" }
	outages := map[string]func(*node){
		"down":  func(n *node) { n.registry.Down() },
		"hangs": func(n *node) { n.registry.Inject(registrytest.Match{}, registrytest.Hold()) },
		"429":   func(n *node) { n.registry.Inject(registrytest.Match{}, registrytest.TooManyRequests(time.Hour)) },
	}
	for name, outage := range outages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startNode(t, func(s *setup) { s.proxy.FirstByteBudget = 200 * time.Millisecond })
			img := n.image(10)
			signature := registrytest.Artifact(img.Descriptor, "application/vnd.example.signature", 1)
			n.registry.Put(repo, signature, signatures(img.Digest))
			if _, err := n.crio().Pull(t.Context(), repo, "v1"); err != nil {
				t.Fatal(err)
			}
			checkOCIError(t, n.get(pathManifest(signatures(signature.Digest))), 404, "MANIFEST_UNKNOWN")
			if a := n.get(pathManifest(signatures(img.Digest))); a.status != 200 {
				t.Fatalf("signature: %d %s", a.status, a.body)
			}
			n.get(pathBlob(signature.Layers[0].Digest)) // but not the config, which nobody reads
			target := upstream.Target{Registry: host, Repository: repo}
			n.proxy.deliverable.forget(keyOf(target, ocispec.DescriptorEmptyJSON.Digest))
			outage(n)
			if a := n.get(pathManifest(signatures(img.Digest))); a.status != 200 || a.header.Get(headerSource) != "stale" {
				t.Errorf("known signature: %d from %q", a.status, a.header.Get(headerSource))
			}
			checkOCIError(t, n.get(pathManifest(signatures(signature.Digest))), 404, "MANIFEST_UNKNOWN")
			checkOCIError(t, n.get(manifestPath(signatures(signature.Digest))), 503, "UNAVAILABLE")
			checkOCIError(t, n.get(pathManifest("v2")), 503, "UNAVAILABLE")
		})
	}
}

// TestCRIO pulls by the path-encoded mirror with a client as strict as CRI-O:
// a 200 on the manifest commits the proxy to every blob.
func TestCRIO(t *testing.T) {
	get := registrytest.Match{Kind: registrytest.Blob, Method: "GET"}
	layer := registrytest.Match{Reference: smallImage(2_000_000).Layers[0].Digest.String()} // by HEAD, then by GET
	times := registrytest.Times
	for name, tc := range map[string]struct {
		match   registrytest.Match
		effects []registrytest.Effect
		direct  bool // the pull goes past the proxy
	}{
		"all well":                         {registrytest.Match{Kind: registrytest.Other}, []registrytest.Effect{registrytest.Status(500)}, false},
		"manifest fails once":              {registrytest.Match{Kind: registrytest.Manifest}, []registrytest.Effect{times(1), registrytest.Status(404)}, true},
		"a blob is not there at first":     {layer, []registrytest.Effect{times(2), registrytest.Status(404)}, true},
		"a blob fails when it is fetched":  {get, []registrytest.Effect{times(2), registrytest.Status(500)}, false},
		"every body is cut":                {get, []registrytest.Effect{registrytest.CutAfter(700_000)}, false},
		"a body stalls once":               {get, []registrytest.Effect{times(1), registrytest.StallAfter(700_000)}, false},
		"headers do not come once":         {get, []registrytest.Effect{times(1), registrytest.Hold()}, false},
		"429 for a while":                  {get, []registrytest.Effect{times(3), registrytest.TooManyRequests(0)}, false},
		"a web page instead of every blob": {get, []registrytest.Effect{times(2), registrytest.HTML()}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startNode(t, nil)
			n.image(2_000_000)
			n.registry.Inject(tc.match, tc.effects...)
			r, err := n.crio().Pull(t.Context(), repo, "v1")
			if err != nil {
				t.Fatal(err)
			}
			if direct := r.From(n.registry.Host()) > 0; direct != tc.direct {
				t.Errorf("went direct: %v, want %v", direct, tc.direct)
			}
		})
	}
}

// TestOneImageOfSeveral: an index has several for this platform, of which this node has one.
// While the registry cannot be asked for the others, or has them no more, a path-encoded
// client gets the index if the one that is here may be its choice, and not if it would take
// another. Once that one fails the index is withheld again.
func TestOneImageOfSeveral(t *testing.T) {
	image := func(seed uint64, variant string, annotations map[string]string) *registrytest.Image {
		platform := ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH, Variant: variant}
		img := registrytest.OCIImage(registrytest.ImageSpec{Seed: seed, Layers: []int64{1000}, Platform: platform})
		img.Annotations = annotations
		return img
	}
	zstd := map[string]string{"io.github.containers.compression.zstd": "true"}
	chart := registrytest.Artifact(ocispec.DescriptorEmptyJSON, "application/vnd.example.chart", 33)
	for name, tc := range map[string]struct {
		here, other *registrytest.Image
		given       bool
	}{
		"zstd":                      {image(31, "", zstd), image(32, "", nil), true},
		"gzip":                      {image(31, "", nil), image(32, "", zstd), false},
		"beside a chart":            {image(31, "", nil), chart, true},
		"a chart":                   {chart, image(31, "", nil), false},
		"a variant":                 {image(31, "v7", nil), image(32, "v6", nil), true},
		"a variant, another's zstd": {image(31, "v7", nil), image(32, "v6", zstd), true},
	} {
		for outage, begin := range map[string]func(*node){
			"down":    func(n *node) { n.registry.Down() },
			"hangs":   func(n *node) { n.registry.Inject(registrytest.Match{}, registrytest.Hold()) },
			"429":     func(n *node) { n.registry.Inject(registrytest.Match{}, registrytest.TooManyRequests(time.Hour)) },
			"deleted": func(n *node) { n.registry.Delete(repo, tc.other.Digest.String()) },
		} {
			t.Run(name+" "+outage, func(t *testing.T) {
				t.Parallel()
				n := startNode(t, func(s *setup) { s.proxy.FirstByteBudget = 200 * time.Millisecond })
				index := n.put(registrytest.Index(tc.other, tc.here))
				if a := n.get(manifestPath(tc.here.Digest.String())); a.status != 200 {
					t.Fatalf("image: %d", a.status)
				}
				n.whole(tc.here)
				begin(n)
				for _, ref := range []string{"v1", index.Digest.String()} {
					if a := n.get(pathManifest(ref)); (a.status == 200) != tc.given {
						t.Errorf("%s: %d %s", ref, a.status, a.body)
					}
				}
				n.proxy.undelivered.put(keyOf(n.target(), tc.here.Layers[0].Digest), struct{}{}, time.Hour)
				if a := n.get(pathManifest("v1")); a.status == 200 {
					t.Error("given although a blob of what is here failed")
				}
			})
		}
	}
}

// TestPromiseIsRemembered: after a blob could not be delivered, the manifest and
// the index above it answer 404 for a while, so that the next try goes direct.
func TestPromiseIsRemembered(t *testing.T) {
	n := startNode(t, nil)
	img := n.put(registrytest.Platforms(registrytest.ImageSpec{Seed: 5, Layers: []int64{3_000_000}, Opaque: true}, false))
	layer, child := img.Layers[0].Digest, img.Manifests[0].Digest
	if a := n.get(pathManifest("v1")); a.status != 200 {
		t.Fatalf("before: %d", a.status)
	}
	n.registry.Inject(registrytest.Match{Reference: layer.String(), Method: "GET"}, registrytest.Status(404))
	checkOCIError(t, n.get(pathBlob(layer)), 404, "BLOB_UNKNOWN")
	for _, ref := range []string{"v1", img.Digest.String(), child.String()} {
		checkOCIError(t, n.get(pathManifest(ref)), 404, "MANIFEST_UNKNOWN")
	}
	if a := n.get(manifestPath(child.String())); a.status != 200 {
		t.Errorf("a client that can go on by itself got %d", a.status)
	}
	n.registry.ClearFaults()
	n.proxy.undelivered.forget(keyOf(n.target(), layer))
	if a := n.get(pathManifest("v1")); a.status != 200 {
		t.Errorf("after: %d", a.status)
	}
}

// TestPromiseCosts: blobs that are here cost no question, others one each.
func TestPromiseCosts(t *testing.T) {
	n := startNode(t, nil)
	img := n.image(1000, 2000, 3000, 4000, 5000)
	for range 3 {
		if a := n.get(pathManifest("v1")); a.status != 200 {
			t.Fatal(a.status)
		}
	}
	if got, want := n.registry.Count(registrytest.Match{Kind: registrytest.Blob, Method: "HEAD"}), len(img.Layers)+1; got != want {
		t.Errorf("%d questions for %d blobs", got, want)
	}
}

// TestPathManifestDoesNotWait: on a manifest such a client can still go on.
func TestPathManifestDoesNotWait(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.upstream.FirstByte = time.Minute
		s.proxy.FirstByteBudget = 200 * time.Millisecond
	})
	n.image()
	n.registry.Inject(registrytest.Match{}, registrytest.Hold())
	begin := time.Now()
	checkOCIError(t, n.get(pathManifest("v1")), 503, "UNAVAILABLE")
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("answered after %s", d)
	}
}

// TestPathBlobWaits: longer than the first-byte budget, for there is no second
// place to send the client to.
func TestPathBlobWaits(t *testing.T) {
	n := startNode(t, func(s *setup) { s.proxy.FirstByteBudget = 100 * time.Millisecond })
	img := n.image(1_000_000)
	d := img.Layers[0].Digest
	f := n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.Delay(500*time.Millisecond))
	a := n.get(pathBlob(d))
	if a.status != 200 || !bytes.Equal(a.body, bytesOf(t, img, d)) || f.Hits() == 0 {
		t.Error(fmt.Errorf("status %d, %w", a.status, a.err))
	}
}

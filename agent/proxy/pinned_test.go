package proxy

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
)

// pinning says that img is pinned under the tag v1 of repo.
func pinning(img *registrytest.Image) func(cache.Repository, string) (digest.Digest, bool) {
	return func(r cache.Repository, ref string) (digest.Digest, bool) {
		if r != (cache.Repository{Registry: host, Name: repo}) {
			return "", false
		}
		d := digest.Digest(ref)
		switch _, blob := img.Blobs[d]; {
		case ref == "v1":
			return img.Digest, true
		case blob, d == img.Digest:
			return d, true
		}
		return "", false
	}
}

// smallImage is what node.image publishes with layers of that size.
func smallImage(layer int64) *registrytest.Image {
	return registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{layer}, Opaque: true})
}

// whole reads an image through n and waits until all of it is committed.
func (n *node) whole(img *registrytest.Image, header ...string) {
	n.t.Helper()
	digests := []digest.Digest{img.Digest}
	if a := n.get(manifestPath("v1"), header...); a.status != 200 {
		n.t.Fatalf("manifest: %d %s", a.status, a.body)
	}
	for d := range img.Blobs {
		if a := n.get(blobPath(d), header...); a.status != 200 {
			n.t.Fatalf("%s: %d", d, a.status)
		}
		digests = append(digests, d)
	}
	for _, d := range digests {
		if err := n.cache.Settled(n.t.Context(), d); err != nil || !n.cache.Has(d) {
			n.t.Fatalf("%s is not here: %v", d, err)
		}
	}
}

// vanish deletes all of an image at the registry.
func (n *node) vanish(img *registrytest.Image) {
	n.registry.Delete(repo, "v1")
	n.registry.Delete(repo, img.Digest.String())
	for d := range img.Blobs {
		n.registry.Delete(repo, d.String())
	}
}

// TestPinnedOutlivesItsRegistry: what the registry has no more is served to whom it
// showed it before, by every route and kind of client. A no is a no all the same, and
// ends for good what was public.
func TestPinnedOutlivesItsRegistry(t *testing.T) {
	open := registrytest.Auth{}
	basic := registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "secret"}}
	ann := []string{"Authorization", "Basic YW5uOnNlY3JldA=="}
	refuse := func(status int) func(*node) {
		return func(n *node) {
			f := n.registry.Inject(registrytest.Match{}, registrytest.Status(status))
			n.get(manifestPath("v1"))
			f.Remove()
		}
	}
	hide := func(n *node) {
		n.registry.Inject(registrytest.Match{}, registrytest.Status(404), registrytest.EvenUnauthorized())
	}
	forget := func(n *node) { // as ten minutes do
		n.proxy.auth.verdicts.forget(verdictKey{host, repo, anyone})
	}
	for name, tc := range map[string]struct {
		auth   registrytest.Auth
		puller []string // header of who pulled it before
		pinned bool
		then   []func(*node) // beside vanishing
		status int           // to anybody who asks then
	}{
		"public":                           {auth: open, pinned: true, status: 200},
		"public, some time later":          {auth: open, pinned: true, then: []func(*node){forget}, status: 200},
		"public, refused by 401 meanwhile": {auth: open, pinned: true, then: []func(*node){refuse(401), forget}, status: 404},
		"public, refused by 403 meanwhile": {auth: open, pinned: true, then: []func(*node){refuse(403), forget}, status: 404},
		"private":                          {auth: basic, puller: ann, pinned: true, status: 401},
		"private, and hidden by 404":       {auth: basic, puller: ann, pinned: true, then: []func(*node){hide}, status: 404},
		"not pinned":                       {auth: open, status: 404},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			img := smallImage(300_000)
			n := startNode(t, func(s *setup) {
				s.registry.Auth = tc.auth
				if tc.pinned {
					s.proxy.Pinned = pinning(img)
				}
			})
			n.put(img)
			n.whole(img, tc.puller...)
			n.vanish(img)
			for _, then := range tc.then {
				then(n)
			}
			layer := img.Layers[0].Digest
			for path, body := range map[string][]byte{
				manifestPath("v1"):                img.Manifests[0].Data,
				manifestPath(img.Digest.String()): img.Manifests[0].Data,
				blobPath(layer):                   bytesOf(t, img, layer),
				pathManifest("v1"):                img.Manifests[0].Data,
				pathBlob(layer):                   bytesOf(t, img, layer),
			} {
				want := tc.status
				if want == 401 && path[:8+len(host)] == pathManifest("v1")[:8+len(host)] {
					want = 404 // who cannot answer a challenge
				}
				for _, method := range []string{"HEAD", "GET"} {
					a := n.do(method, path)
					if !tc.pinned && a.status == 200 && path != manifestPath("v1") && path != pathManifest("v1") {
						continue // by the verdict that still holds
					}
					if a.status != want || want == 200 && method == "GET" && !bytes.Equal(a.body, body) {
						t.Errorf("%s %s: %d %s, want %d", method, path, a.status, a.header.Get(headerSource), want)
					}
				}
			}
			if a := n.get(manifestPath("v1")); a.status == 200 && a.header.Get(headerSource) != "stale" {
				t.Errorf("from %q", a.header.Get(headerSource))
			}
			if a := n.get(manifestPath("v2")); a.status == 200 {
				t.Error("a tag that is not pinned is served")
			}
		})
	}
}

// TestNoStale: who asks for what is current gets the registry's no, or hears that it
// cannot be asked, and never what is pinned or was known.
func TestNoStale(t *testing.T) {
	img := smallImage(1000)
	n := startNode(t, func(s *setup) { s.proxy.Pinned = pinning(img) })
	n.put(img)
	n.whole(img)
	ask := func(want, current int) {
		t.Helper()
		for range 2 { // the second has the first's stale answer to avoid
			if a := n.do("HEAD", manifestPath("v1")); a.status != want {
				t.Errorf("%d, want %d", a.status, want)
			}
			if a := n.do("HEAD", manifestPath("v1"), "Cache-Control", NoStale); a.status != current {
				t.Errorf("current: %d, want %d", a.status, current)
			}
		}
	}
	ask(200, 200)
	n.vanish(img)
	ask(200, 404)
	n.put(img)
	ask(200, 200)
	n.registry.Down()
	ask(200, 503)
}

// TestPinnedTagDuringAnOutage: with the registry down a pinned tag stands for what is
// pinned, and not for a newer image of which nothing more than its name is known.
func TestPinnedTagDuringAnOutage(t *testing.T) {
	img := smallImage(1000)
	n := startNode(t, func(s *setup) { s.proxy.Pinned = pinning(img) })
	n.put(img)
	n.whole(img)
	newer := n.put(registrytest.OCIImage(registrytest.ImageSpec{Seed: 99, Layers: []int64{10}}))
	if a := n.do("HEAD", manifestPath("v1")); a.header.Get(headerDigest) != newer.Digest.String() {
		t.Errorf("a tag that has moved is %s", a.header.Get(headerDigest))
	}
	n.registry.Down()
	if a := n.get(manifestPath("v1")); a.header.Get(headerDigest) != img.Digest.String() || !bytes.Equal(a.body, img.Manifests[0].Data) {
		t.Errorf("%d, %s", a.status, a.header.Get(headerDigest))
	}
}

// TestCopyRuntime: a copy is served as the runtime's own was, to callers of this node
// and for that registry, also when the runtime has deleted it; other nodes get it only
// if it is known where it came from.
func TestCopyRuntime(t *testing.T) {
	for _, sourced := range []bool{false, true} {
		store := &runtimeDir{dir: t.TempDir()}
		n := startNode(t, func(s *setup) { s.proxy.Runtime = store })
		img := n.image(5_000_000)
		layer := img.Layers[0].Digest
		store.put(t, layer, bytesOf(t, img, layer))
		if sourced {
			n.cache.Meta().AddGiver(layer, RuntimeGiver(host))
		}
		n.get(manifestPath("v1"))
		if err := n.proxy.CopyRuntime(t.Context(), host, layer); err != nil || !n.proxy.Holds(layer, host) {
			t.Fatalf("%v, held: %v", err, n.proxy.Holds(layer, host))
		}
		if err := os.Remove(filepath.Join(store.dir, layer.Encoded())); err != nil {
			t.Fatal(err)
		}
		n.registry.Inject(registrytest.Match{Kind: registrytest.Blob}, registrytest.Status(500))
		for _, path := range []string{blobPath(layer), pathBlob(layer)} {
			if a := n.get(path); a.status != 200 || a.header.Get(headerSource) != "disk" || !bytes.Equal(a.body, bytesOf(t, img, layer)) {
				t.Errorf("%d from %q", a.status, a.header.Get(headerSource))
			}
			if a := n.do("HEAD", path); a.status != 200 || a.header.Get(headerSource) != "disk" {
				t.Errorf("HEAD: %d from %q", a.status, a.header.Get(headerSource))
			}
		}
		if n.proxy.Gives(layer, host) != sourced || n.proxy.Holds(layer, "other.test") {
			t.Errorf("sourced %v: to other nodes %v, for another registry %v", sourced, n.proxy.Gives(layer, host), n.proxy.Holds(layer, "other.test"))
		}
		if err := n.proxy.CopyRuntime(t.Context(), host, digest.FromString("nowhere")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("of nothing: %v", err)
		}
	}
}

// TestCopyRuntimeIsNoWayRound: whose bytes are known to be another registry's are not
// copied for one that merely lists them, and a bad copy is none.
func TestCopyRuntimeIsNoWayRound(t *testing.T) {
	store := &runtimeDir{dir: t.TempDir(), bad: true}
	n := startNode(t, func(s *setup) { s.proxy.Runtime = store })
	img := n.image(1000)
	layer := img.Layers[0].Digest
	store.put(t, layer, bytesOf(t, img, layer))
	if err := n.proxy.CopyRuntime(t.Context(), host, layer); !errors.Is(err, errBadDigest) || n.cache.Has(layer) {
		t.Errorf("a bad copy: %v", err)
	}
	store.bad = false
	n.cache.Meta().AddGiver(layer, RuntimeGiver("private.test"))
	if err := n.proxy.CopyRuntime(t.Context(), host, layer); !errors.Is(err, fs.ErrNotExist) || n.proxy.has(upstream.Target{Registry: host}, layer) {
		t.Errorf("another registry's: %v", err)
	}
}

package proxy

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
)

// pinning says that img is pinned under the tag v1 of repo, and was public or not.
func pinning(img *registrytest.Image, public bool) func(cache.Repository, string) (Pinned, bool) {
	return func(r cache.Repository, ref string) (Pinned, bool) {
		if r != testRepository {
			return Pinned{}, false
		}
		d := digest.Digest(ref)
		switch _, blob := img.Blobs[d]; {
		case ref == "v1":
			return Pinned{img.Digest, true, public}, true
		case blob, d == img.Digest:
			return Pinned{d, !blob, public}, true
		}
		return Pinned{}, false
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
// ends for good what was public: but not of a pin that was.
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
		n.proxy.auth.verdicts.forget(verdictKey{testRepository, anyone})
	}
	refuseAll := func(status int) func(*node) {
		return func(n *node) {
			n.registry.Inject(registrytest.Match{}, registrytest.Status(status), registrytest.EvenUnauthorized())
			forget(n)
		}
	}
	down := func(n *node) { n.registry.Down() }
	for name, tc := range map[string]struct {
		auth   registrytest.Auth
		puller []string // header of who pulled it before
		asker  []string // header of who asks at the end
		pinned bool
		public bool          // the pin
		then   []func(*node) // beside vanishing
		status int           // to anybody who asks then
	}{
		"open":                                {auth: open, pinned: true, status: 200},
		"open, some time later":               {auth: open, pinned: true, then: []func(*node){forget}, status: 200},
		"open, refused by 401 meanwhile":      {auth: open, pinned: true, then: []func(*node){refuse(401), forget}, status: 404},
		"open, refused by 403 meanwhile":      {auth: open, pinned: true, then: []func(*node){refuse(403), forget}, status: 404},
		"open, refused by 401":                {auth: open, pinned: true, then: []func(*node){refuseAll(401)}, status: 401},
		"open, refused by 403":                {auth: open, pinned: true, then: []func(*node){refuseAll(403)}, status: 403},
		"public":                              {auth: open, pinned: true, public: true, status: 200},
		"public, refused by 401 meanwhile":    {auth: open, pinned: true, public: true, then: []func(*node){refuse(401), forget}, status: 200},
		"public, refused by 403 meanwhile":    {auth: open, pinned: true, public: true, then: []func(*node){refuse(403), forget}, status: 200},
		"public, refused by 401 a moment ago": {auth: open, pinned: true, public: true, then: []func(*node){refuse(401)}, status: 200},
		"public, refused by 401":              {auth: open, pinned: true, public: true, then: []func(*node){refuseAll(401)}, status: 200},
		"public, refused by 403":              {auth: open, pinned: true, public: true, then: []func(*node){refuseAll(403)}, status: 200},
		"public, a credential is refused":     {auth: open, pinned: true, public: true, asker: ann, then: []func(*node){refuseAll(401)}, status: 200},
		"public, all else is private now":     {auth: basic, puller: ann, pinned: true, public: true, status: 200},
		"public, a wrong password":            {auth: basic, puller: ann, asker: []string{"Authorization", "Basic YW5uOmd1ZXNz"}, pinned: true, public: true, status: 200},
		"public, refused, and then down":      {auth: open, pinned: true, public: true, then: []func(*node){refuse(401), forget, down}, status: 200},
		"open, refused, and then down":        {auth: open, pinned: true, then: []func(*node){refuse(401), forget, down}, status: 503},
		"public, and hidden by 404":           {auth: basic, puller: ann, pinned: true, public: true, then: []func(*node){hide}, status: 200},
		"private":                             {auth: basic, puller: ann, pinned: true, status: 401},
		"private, and hidden by 404":          {auth: basic, puller: ann, pinned: true, then: []func(*node){hide}, status: 404},
		"not pinned":                          {auth: open, status: 404},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			img := smallImage(300_000)
			n := startNode(t, func(s *setup) {
				s.registry.Auth = tc.auth
				if tc.pinned {
					s.proxy.Pinned = pinning(img, tc.public)
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
				if (want == 401 || want == 403) && path[:8+len(host)] == pathManifest("v1")[:8+len(host)] {
					want = 404 // who cannot answer a challenge
				}
				for _, method := range []string{"HEAD", "GET"} {
					a := n.do(method, path, tc.asker...)
					if !tc.pinned && a.status == 200 && path != manifestPath("v1") && path != pathManifest("v1") {
						continue // by the verdict that still holds
					}
					if a.status != want || want == 200 && method == "GET" && !bytes.Equal(a.body, body) {
						t.Errorf("%s %s: %d %s, want %d", method, path, a.status, a.header.Get(headerSource), want)
					}
				}
			}
			if a := n.get(manifestPath("v1"), tc.asker...); a.status == 200 && a.header.Get(headerSource) != "stale" {
				t.Errorf("from %q", a.header.Get(headerSource))
			}
			if a := n.get(manifestPath("v2"), tc.asker...); a.status == 200 {
				t.Error("a tag that is not pinned is served")
			}
		})
	}
}

// TestPublicPinOpensNothingElse: of a repository that was made private a public pin opens
// its own image, to callers of this node, and nothing to other nodes; by what is asked
// first, by a no that is remembered, and while the registry is down after it.
func TestPublicPinOpensNothingElse(t *testing.T) {
	img, other := smallImage(1000), registrytest.OCIImage(registrytest.ImageSpec{Seed: 8, Layers: []int64{2000}, Opaque: true})
	swarm := &swarmFunc{}
	n := startNode(t, func(s *setup) { s.proxy.Pinned, s.proxy.Swarm = pinning(img, true), swarm })
	n.put(other)
	n.whole(other)
	n.registry.Tag(repo, "v2", other.Digest)
	if a := n.get(manifestPath("v2")); a.status != 200 {
		t.Fatalf("v2: %d", a.status)
	}
	n.put(img)
	n.whole(img)
	n.registry.Inject(registrytest.Match{}, registrytest.Status(401))
	decided := func() decision { // of the last exchange
		acc := access{target: upstream.Target{Registry: host, Repository: repo, Anonymous: true}}
		v, _ := n.proxy.auth.verdicts.get(acc.key())
		return v.decision
	}
	closed := []string{
		manifestPath("v2"), manifestPath(other.Digest.String()), blobPath(other.Layers[0].Digest), pathManifest("v2"), pathBlob(other.Layers[0].Digest),
		"/v2/" + repo + "/tags/list?ns=" + host, "/v2/" + repo + "/referrers/" + img.Digest.String() + "?ns=" + host,
	}
	forget := func() { n.proxy.auth.verdicts.forget(verdictKey{testRepository, anyone}) }
	nobody, stranger := n.target(), n.target()
	nobody.Anonymous, stranger.Authorization = true, "Basic bm86Ym9keQ=="
	swarm.may = func(t upstream.Target, q Question) error {
		_, err := n.proxy.MayFor(context.Background(), t, q)
		return err
	}
	for _, when := range []string{"asked", "remembered", "down"} {
		forget()
		for _, who := range []upstream.Target{nobody, stranger} {
			n.notFor(who, img)
			if err := n.proxy.Admit(t.Context(), who, KindBlob, img.Layers[0].Digest); err == nil {
				t.Errorf("%s: another node gets a pass", when)
			}
		}
		if when == "down" {
			n.registry.Down()
		}
		for _, path := range closed {
			if when != "remembered" {
				forget()
			}
			if a := n.get(path); a.status == 200 {
				t.Errorf("%s: %s: 200 from %q", when, path, a.header.Get(headerSource))
			}
			if when != "remembered" {
				forget()
			}
			for _, pin := range []string{manifestPath("v1"), pathManifest(img.Digest.String()), blobPath(img.Layers[0].Digest)} {
				if a := n.get(pin); a.status != 200 {
					t.Errorf("%s: the pin's %s: %d", when, pin, a.status)
				}
			}
			if d := decided(); d != "" {
				t.Errorf("%s: anyone may read the repository: %s", when, d)
			}
		}
	}
	n.notFor(nobody, img)
	n.notFor(stranger, img)
}

// notFor checks that this node tells others nothing about what img is to a target.
func (n *node) notFor(t upstream.Target, img *registrytest.Image) {
	n.t.Helper()
	ctx, d := n.t.Context(), img.Layers[0].Digest
	if desc, stale, err := n.proxy.ResolveFor(ctx, t, "v1", acceptAll); err == nil {
		n.t.Errorf("another node is told the tag: %s, stale %v", desc.Digest, stale)
	}
	if desc, err := n.proxy.RememberedFor(t, "v1", acceptAll); err == nil {
		n.t.Errorf("another node is told what the tag was: %s", desc.Digest)
	}
	for _, known := range []bool{false, true} {
		q := Question{Reference: d.String(), Blob: true, Known: known}
		if _, err := n.proxy.MayFor(ctx, t, q); err == nil {
			n.t.Error("another node may read")
		}
		if err := n.proxy.MayByMemory(t, q); err == nil {
			n.t.Error("another node may read by memory")
		}
	}
}

// TestPublicPinAndPrivateVersion: when the tag went on in private, who may read it gets
// what the registry says, and the others what is pinned, whoever asked first. For both a
// client that takes other media types is answered for itself.
func TestPublicPinAndPrivateVersion(t *testing.T) {
	img := smallImage(1000)
	n := startNode(t, func(s *setup) {
		s.proxy.Pinned, s.proxy.TagTTL = pinning(img, true), time.Hour
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "secret"}}
	})
	ann := []string{"Authorization", "Basic YW5uOnNlY3JldA=="}
	n.put(img)
	n.whole(img, ann...)
	n.proxy.fresh.forget(tagKey{Repository: testRepository, tag: "v1"}) // pulled and pinned an hour ago
	n.proxy.fresh.forget(tagKey{Repository: testRepository, tag: "v1", lists: true})
	newer := n.put(registrytest.OCIImage(registrytest.ImageSpec{Seed: 99, Layers: []int64{10}}))
	stranger := []string{"Accept", "application/vnd.example.other"}
	for range 3 { // asked, and remembered
		for _, method := range []string{"HEAD", "GET"} {
			if a := n.do(method, manifestPath("v1")); a.header.Get(headerDigest) != img.Digest.String() || a.header.Get(headerSource) != "stale" {
				t.Errorf("nobody: %d, %s from %q", a.status, a.header.Get(headerDigest), a.header.Get(headerSource))
			}
			if a := n.do(method, manifestPath("v1"), stranger...); a.status != 404 {
				t.Errorf("nobody, of another type: %d", a.status)
			}
			if a := n.do(method, manifestPath("v1"), ann...); a.header.Get(headerDigest) != newer.Digest.String() || a.header.Get(headerSource) == "stale" {
				t.Errorf("ann: %d, %s from %q", a.status, a.header.Get(headerDigest), a.header.Get(headerSource))
			}
			if a := n.do(method, manifestPath(newer.Digest.String())); a.status != 401 {
				t.Errorf("nobody, the new version: %d", a.status)
			}
		}
	}
	if a := n.do("HEAD", manifestPath("v1"), "Cache-Control", NoStale); a.status != 401 {
		t.Errorf("nobody, what is current: %d", a.status)
	}
}

// TestNoStaleIsAsked: what is current of a tag or a manifest, for somebody without a
// credential, is not what others with one were told a moment ago, nor what a verdict of
// before lets him have: a version that came after a repository had been made private is
// not public.
func TestNoStaleIsAsked(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.proxy.TagTTL = time.Hour
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "secret"}}
	})
	img := n.image(1000)
	n.whole(img, "Authorization", "Basic YW5uOnNlY3JldA==")
	for _, ref := range []string{"v1", img.Digest.String()} {
		n.proxy.auth.accept(&access{target: upstream.Target{Registry: host, Repository: repo, Anonymous: true}}, 0) // it was public some minutes ago
		if a := n.do("HEAD", manifestPath(ref)); a.status != 200 {
			t.Fatalf("%s: %d; the test shows nothing", ref, a.status)
		}
		for range 2 {
			if a := n.do("HEAD", manifestPath(ref), "Cache-Control", NoStale); a.status != 401 {
				t.Errorf("%s: %d", ref, a.status)
			}
		}
	}
	n.registry.Down()
	if a := n.do("HEAD", manifestPath(img.Digest.String()), "Authorization", "Basic YW5uOnNlY3JldA==", "Cache-Control", NoStale); a.status != 503 {
		t.Errorf("while nobody can say: %d", a.status)
	}
}

// TestNoStale: who asks for what is current gets the registry's no, or hears that it
// cannot be asked, and never what is pinned or was known.
func TestNoStale(t *testing.T) {
	img := smallImage(1000)
	n := startNode(t, func(s *setup) { s.proxy.Pinned = pinning(img, false) })
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
	n := startNode(t, func(s *setup) { s.proxy.Pinned = pinning(img, false) })
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

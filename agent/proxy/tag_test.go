package proxy

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
)

var heads = registrytest.Match{Kind: registrytest.Manifest, Method: "HEAD"}

// TestTagIsAskedOncePerTTL also holds that asking at once is asking once.
func TestTagIsAskedOncePerTTL(t *testing.T) {
	n := startNode(t, func(s *setup) { s.proxy.TagTTL = time.Hour })
	img := n.image()
	n.registry.SetLatency(100 * time.Millisecond)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if a := n.do("HEAD", manifestPath("v1")); a.status != 200 || a.header.Get(headerDigest) != img.Digest.String() {
				t.Errorf("status %d", a.status)
			}
		})
	}
	wg.Wait()
	if got := n.registry.Count(heads); got != 1 {
		t.Errorf("%d requests upstream for 16 at once, want 1", got)
	}
}

func TestTagIsRevalidated(t *testing.T) {
	short := upstream.Duration(0)
	n := startNode(t, func(s *setup) { s.proxy.TagTTL = time.Hour; s.policy.TagTTL = &short })
	n.image(1000)
	n.get(manifestPath("v1"))
	other := n.put(registrytest.OCIImage(registrytest.ImageSpec{Seed: 99, Layers: []int64{10}}))
	if a := n.get(manifestPath("v1")); a.header.Get(headerDigest) != other.Digest.String() {
		t.Error("the registry's own tag_ttl of 0 was not followed")
	}
}

// TestStaleTag: whatever keeps upstream from answering, the last known digest is
// served, within the budget; a plain no is believed.
func TestStaleTag(t *testing.T) {
	for name, tc := range map[string]struct {
		effect registrytest.Effect
		status int
	}{
		"500":            {registrytest.Status(500), 200},
		"503":            {registrytest.Status(503), 200},
		"429":            {registrytest.TooManyRequests(time.Minute), 200},
		"never answers":  {registrytest.Hold(), 200},
		"web page":       {registrytest.HTML(), 200},
		"404":            {registrytest.Status(404), 404},
		"401":            {registrytest.Status(401), 401},
		"403":            {registrytest.Status(403), 403},
		"redirect cycle": {registrytest.RedirectLoop(), 0}, // either way, but an answer
	} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t, func(s *setup) { s.proxy.FirstByteBudget = time.Second })
			img := n.image()
			if a := n.get(manifestPath("v1")); a.status != 200 {
				t.Fatalf("cold: %d", a.status)
			}
			n.registry.Inject(registrytest.Match{Kind: registrytest.Manifest}, tc.effect)
			for _, method := range []string{"HEAD", "GET"} {
				begin := time.Now()
				a := n.do(method, manifestPath("v1"))
				if d := time.Since(begin); d > 1500*time.Millisecond {
					t.Errorf("%s: answered after %s", method, d)
				}
				if tc.status != 0 && a.status != tc.status {
					t.Errorf("%s: status %d, want %d", method, a.status, tc.status)
				}
				if a.status == 200 && (a.header.Get(headerSource) != "stale" || a.header.Get(headerDigest) != img.Digest.String()) {
					t.Errorf("%s: from %s: %s", method, a.header.Get(headerSource), a.header.Get(headerDigest))
				}
			}
			if tc.status == 200 {
				if got := testutil.ToFloat64(n.proxy.metrics.stale); got != 2 {
					t.Errorf("tag_stale_served_total = %v, want 2", got)
				}
			}
		})
	}
}

// TestDeletedTagIsForgotten: after a 404 the tag is not served stale either.
func TestDeletedTagIsForgotten(t *testing.T) {
	n := startNode(t, nil)
	n.image()
	n.get(manifestPath("v1"))
	n.registry.Delete(repo, "v1")
	checkOCIError(t, n.get(manifestPath("v1")), 404, "MANIFEST_UNKNOWN")
	n.registry.Down()
	if a := n.get(manifestPath("v1")); a.status == 200 {
		t.Error("a deleted tag was served from memory")
	}
}

// TestTagDoesNotGoBack: who asks in vain, or is told by another node what a tag was, does
// not undo what the registry has told another caller meanwhile.
func TestTagDoesNotGoBack(t *testing.T) {
	old, newer := smallImage(1000).Descriptor, smallImage(2000).Descriptor
	for name, tc := range map[string]struct {
		budget  time.Duration
		answers bool // while bob still waits
	}{
		"no answer in time":   {budget: time.Second},
		"another node's word": {budget: 10 * time.Second, answers: true},
	} {
		t.Run(name, func(t *testing.T) {
			says := func(d ocispec.Descriptor) func(string) (ocispec.Descriptor, error) {
				return func(string) (ocispec.Descriptor, error) { return d, nil }
			}
			swarm := &swarmFunc{resolve: says(old)}
			n := startNode(t, func(s *setup) {
				s.proxy.Swarm, s.proxy.TagTTL, s.proxy.FirstByteBudget = swarm, time.Hour, tc.budget
			})
			ask := func(who string) (string, string) {
				a := n.do("HEAD", manifestPath("v1"), "Authorization", "Bearer "+who)
				return a.header.Get(headerDigest), a.header.Get(headerSource)
			}
			ask("ann")
			ask("bob")
			n.proxy.fresh.forget(tagKey{Repository: testRepository, tag: "v1", lists: true}) // tag_ttl later
			asked, release, told := make(chan struct{}), make(chan struct{}), make(chan string)
			swarm.resolve = func(string) (ocispec.Descriptor, error) {
				close(asked)
				<-release
				return ocispec.Descriptor{}, &StaleTag{old}
			}
			go func() {
				got, _ := ask("bob")
				told <- got
			}()
			<-asked
			swarm.resolve = says(newer)
			ask("ann")
			if tc.answers {
				close(release)
			}
			if got := <-told; tc.answers && got != newer.Digest.String() {
				t.Errorf("bob was told %s, want %s", got, newer.Digest)
			}
			if got, from := ask("ann"); got != newer.Digest.String() || from == "stale" {
				t.Errorf("ann is told %s from %q, want %s as before", got, from, newer.Digest)
			}
			if !tc.answers {
				close(release)
			}
		})
	}
}

// TestOneStaleTag: while the registry cannot be asked, a tag stands for what this node knows of
// it, for each caller, whatever other nodes know.
func TestOneStaleTag(t *testing.T) {
	own, other := smallImage(1000).Descriptor, smallImage(2000).Descriptor
	swarm := &swarmFunc{resolve: func(string) (ocispec.Descriptor, error) { return own, nil }}
	n := startNode(t, func(s *setup) { s.proxy.Swarm, s.proxy.TagTTL = swarm, time.Hour })
	n.do("HEAD", manifestPath("v1"))
	n.proxy.fresh.forget(tagKey{Repository: testRepository, tag: "v1", lists: true}) // tag_ttl later
	swarm.resolve = func(string) (ocispec.Descriptor, error) { return ocispec.Descriptor{}, &StaleTag{other} }
	for i := range 2 {
		a := n.do("HEAD", manifestPath("v1"))
		if got := a.header.Get(headerDigest); got != own.Digest.String() || a.header.Get(headerSource) != "stale" {
			t.Errorf("caller %d: %d, %s from %q, want %s", i, a.status, got, a.header.Get(headerSource), own.Digest)
		}
	}
}

// TestAcceptByTag: a stored answer of a type that the client cannot read is not
// served, and what one kind of client gets does not become the other's answer.
func TestAcceptByTag(t *testing.T) {
	spec := registrytest.ImageSpec{Seed: 3, Layers: []int64{1000}}
	n := startNode(t, func(s *setup) { s.proxy.TagTTL = time.Hour })
	n.registry.Put(repo, registrytest.Platforms(spec, false), "list")
	n.registry.Put(repo, registrytest.DockerImage(spec), "one")
	for _, tc := range []struct {
		tag, accept string
		status      int
		mediaType   string
	}{
		{"list", "", 200, ocispec.MediaTypeImageIndex},
		{"list", "*/*", 200, ocispec.MediaTypeImageIndex},
		{"list", "application/*", 200, ocispec.MediaTypeImageIndex},
		{"list", ocispec.MediaTypeImageIndex + ";q=0.5, text/html", 200, ocispec.MediaTypeImageIndex},
		{"list", ocispec.MediaTypeImageManifest, 404, ""},
		{"list", strings.Join(acceptAll, ", "), 200, ocispec.MediaTypeImageIndex},
		{"one", dockerManifest, 200, dockerManifest},
		{"one", ocispec.MediaTypeImageManifest, 404, ""},
		{"one", "*/*", 200, dockerManifest},
	} {
		for _, method := range []string{"HEAD", "GET"} {
			var header []string
			if tc.accept != "" {
				header = []string{"Accept", tc.accept}
			}
			a := n.do(method, manifestPath(tc.tag), header...)
			if a.status != tc.status || a.status == 200 && a.header.Get("Content-Type") != tc.mediaType {
				t.Errorf("%s %s, Accept %q: %d %s", method, tc.tag, tc.accept, a.status, a.header.Get("Content-Type"))
			}
		}
	}
}

// TestNothingLongIsKept: clients and registries fill memories that are bounded in number
// only with what has a bound itself.
func TestNothingLongIsKept(t *testing.T) {
	long := strings.Repeat("x", 20<<10)
	n := startNode(t, func(s *setup) { s.proxy.TagTTL = time.Hour })
	n.image(1000)
	n.do("HEAD", manifestPath("v1"), "Accept", "application/"+long)
	n.get("/v2/larder.invalid/canary/manifests/nonce", "User-Agent", long)
	seen, _ := n.proxy.Canary("nonce")
	if size := len(seen.UserAgent); size != maxUserAgent {
		t.Errorf("a canary keeps %d bytes of User-Agent", size)
	}
	n.registry.PutManifest(repo, "application/vnd."+long, []byte(`{"schemaVersion":2,"layers":[]}`), "typed")
	n.do("HEAD", manifestPath("typed"))
	if len(n.proxy.fresh.items) == 0 {
		t.Fatal("no tag is remembered")
	}
	for key, e := range n.proxy.fresh.items {
		found := e.Value.(remembered[tagKey, resolved]).value
		if size := len(fmt.Sprint(key, found)); size > 1000 {
			t.Errorf("%s: %d bytes are remembered", key.tag, size)
		}
	}
	if _, err := parseOutline([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.` + long + `","layers":[]}`)); err == nil {
		t.Errorf("a media type of %d bytes is one", len(long))
	}
}

// TestManifestWithoutMetadata: the media type is found in the bytes when the
// metadata was lost.
func TestManifestWithoutMetadata(t *testing.T) {
	spec := registrytest.ImageSpec{Seed: 3, Layers: []int64{1000}}
	for name, img := range map[string]*registrytest.Image{
		"oci": registrytest.OCIImage(spec), "schema 2": registrytest.DockerImage(spec),
		"index": registrytest.Platforms(spec, false), "manifest list": registrytest.Platforms(spec, true),
	} {
		root := img.Manifests[len(img.Manifests)-1]
		o, err := parseOutline(root.Data)
		if err != nil || o.infer() != root.MediaType {
			t.Errorf("%s: inferred %q, %v", name, o.infer(), err)
		}
		o.MediaType = ""
		if got := o.infer(); strings.Contains(root.MediaType, "oci") && got != root.MediaType {
			t.Errorf("%s without mediaType: inferred %q", name, got)
		}
	}
	for _, body := range []string{``, `[]`, `{}`, `{"architecture":"amd64","rootfs":{}}`, `{"schemaVersion":2,"config":{"digest":"../x"}}`} {
		if o, err := parseOutline([]byte(body)); err == nil && o.infer() != "" {
			t.Errorf("%s taken for %s", body, o.infer())
		}
	}
}

// TestLostMetadataIsWrittenAgain: an image that is pulled again after the metadata of a running
// agent was lost is served by the next agent while the registry is down. What spares a second
// write of the same facts kept them from being written at all.
func TestLostMetadataIsWrittenAgain(t *testing.T) {
	dir := t.TempDir()
	var n *node
	n = startNode(t, func(s *setup) {
		s.cache.Dir, s.proxy.TagTTL = dir, time.Minute
		s.cache.Events.Renewed = func() { n.proxy.ForgetFacts(nil) }
	})
	img := n.image()
	pull := func() {
		t.Helper()
		for _, path := range []string{manifestPath("v1"), manifestPath(img.Digest.String()), blobPath(img.Layers[0].Digest)} {
			if got := n.get(path); got.status != 200 {
				t.Fatalf("%s: %d", path, got.status)
			}
		}
		if err := n.cache.Meta().Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	pull()
	if err := os.Remove(filepath.Join(dir, "metadata.db")); err != nil {
		t.Fatal(err)
	}
	if err := n.cache.Meta().Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	pull()

	n.registry.Down()
	opts := n.proxy.opts
	opts.Registerer = prometheus.NewRegistry()
	next, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(next.background.stop)
	for _, path := range []string{manifestPath("v1"), manifestPath(img.Digest.String()), blobPath(img.Layers[0].Digest)} {
		w := httptest.NewRecorder()
		next.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		if w.Code != 200 {
			t.Errorf("%s of the next agent: %d %s", path, w.Code, w.Body)
		}
	}
}

// TestBlobIsNoManifest: bytes that are cached as a blob do not become a
// manifest by being asked for as one.
func TestBlobIsNoManifest(t *testing.T) {
	n := startNode(t, nil)
	img := n.image(1000)
	d := img.Layers[0].Digest
	n.get(blobPath(d))
	await(t, "commit", func() bool { return n.cache.Has(d) })
	checkOCIError(t, n.get(manifestPath(d.String())), 404, "MANIFEST_UNKNOWN")
}

// TestMembership: a served manifest leaves behind what its repository holds.
func TestMembership(t *testing.T) {
	n := startNode(t, nil)
	img := n.image()
	n.get(manifestPath("v1"))
	for _, d := range img.Layers {
		if !n.cache.Meta().Member(testRepository, d.Digest) {
			t.Errorf("layer %s is no member", d.Digest)
		}
	}
}

func TestRecentForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newRecent[string, int](2)
		m.put("a", 1, time.Minute)
		m.put("b", 2, time.Hour)
		time.Sleep(time.Minute)
		if m.has("a") || !m.has("b") {
			t.Error("not by time")
		}
		m.put("c", 3, time.Hour)
		m.put("d", 4, time.Hour)
		if m.has("b") || !m.has("c") || !m.has("d") || len(m.items) != 2 || m.order.Len() != 2 {
			t.Error("not bounded")
		}
		m.forget("c")
		if m.has("c") {
			t.Error("not forgotten")
		}
	})
}

// TestMediaTypeOfAnotherRegistry: what one registry calls a manifest does not become
// what another one's clients are told of the same bytes. A runtime that is told a
// type it does not know fails the pull and asks nobody else.
func TestMediaTypeOfAnotherRegistry(t *testing.T) {
	spec := registrytest.ImageSpec{Seed: 7, Layers: []int64{1000}, Opaque: true}
	for name, img := range map[string]*registrytest.Image{
		"oci": registrytest.OCIImage(spec), "schema 2": registrytest.DockerImage(spec),
		"index": registrytest.Platforms(spec, false), "manifest list": registrytest.Platforms(spec, true),
	} {
		for _, told := range []string{"application/vnd.other.thing", dockerList, ocispec.MediaTypeImageManifest, dockerSchema1Jws} {
			t.Run(name+" as "+told, func(t *testing.T) {
				n := startNode(t, nil)
				n.put(img)
				other := registrytest.Start(t, registrytest.Options{})
				other.Put(repo, img, "v1")
				other.Inject(registrytest.Match{Kind: registrytest.Manifest}, registrytest.Header("Content-Type", told))
				err := n.proxy.upstream.SetRegistries([]upstream.Registry{
					{Host: host, Upstreams: []string{n.registry.URL()}}, {Host: "other.test", Upstreams: []string{other.URL()}},
				})
				if err != nil {
					t.Fatal(err)
				}
				at := "/v2/" + repo + "/manifests/" + img.Digest.String()
				if a := n.get(at + "?ns=other.test"); a.status != 200 {
					t.Fatalf("other.test: %d %s", a.status, a.body)
				}
				for range 2 { // from the registry, which has to give it once, and from disk
					if a := n.get(at + "?ns=" + host); a.status != 200 || a.header.Get("Content-Type") != img.MediaType {
						t.Errorf("status %d, Content-Type %q", a.status, a.header.Get("Content-Type"))
					}
				}
			})
		}
	}
}

// TestManifestThatListsWhatIsNotIts: what a manifest says where its registry does not
// look when it is pushed makes nothing a part of the repository. Else who may push to
// one repository could read another's blobs from here, by their digests.
func TestManifestThatListsWhatIsNotIts(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "x"}, Anonymous: []string{"my/*"}}
	})
	secret := n.image(1000)
	layer := secret.Layers[0]
	for _, path := range []string{manifestPath("v1"), manifestPath(secret.Digest.String()), blobPath(layer.Digest)} {
		if a := n.get(path, "Authorization", "Basic YW5uOng="); a.status != 200 {
			t.Fatalf("%s: %d %s", path, a.status, a.body)
		}
	}
	for _, d := range []digest.Digest{secret.Digest, layer.Digest} {
		await(t, "commit", func() bool { return n.cache.Has(d) })
	}
	config := digest.FromString("{}")
	const other = `"mediaType":"application/vnd.oci.image.layer.v1.tar","size":1000,"digest":`
	mine := fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.config.v1+json","size":2,"digest":%q}`, config)
	theirs := fmt.Sprintf(`{%s%q}`, other, layer.Digest)
	both := fmt.Sprintf(`{%s%q,"Digest":%q}`, other, config, layer.Digest)
	child := fmt.Sprintf(`{"mediaType":%q,"size":%d,"digest":%q}`, secret.MediaType, secret.Size, secret.Digest)
	for name, fields := range map[string]string{
		"blobs of an image":     `"config":` + mine + `,"layers":[],"blobs":[` + theirs + `]`,
		"manifests of an image": `"config":` + mine + `,"layers":[],"manifests":[` + child + `]`,
		"layers of an index":    `"manifests":[],"layers":[` + theirs + `]`,
		"a second LAYERS":       `"config":` + mine + `,"layers":[],"LAYERS":[` + theirs + `]`,
		"a second Config":       `"config":` + mine + `,"layers":[],"Config":` + theirs,
		"a second Digest":       `"config":` + mine + `,"layers":[` + both + `]`,
	} {
		mediaType := ocispec.MediaTypeImageManifest
		if strings.HasPrefix(fields, `"manifests"`) {
			mediaType = ocispec.MediaTypeImageIndex
		}
		mine := "my/" + strings.ReplaceAll(strings.ToLower(name), " ", "-")
		n.registry.PutBlob(mine, registrytest.Bytes([]byte("{}")))
		n.registry.PutManifest(mine, mediaType, []byte(`{"schemaVersion":2,"mediaType":"`+mediaType+`",`+fields+`}`), "v1")
		got := n.get("/v2/" + mine + "/manifests/v1?ns=" + host)
		for _, path := range []string{"blobs/" + layer.Digest.String(), "manifests/" + secret.Digest.String()} {
			if a := n.get("/v2/" + mine + "/" + path + "?ns=" + host); a.status != 404 {
				t.Errorf("%s (%d): %s: %d", name, got.status, path, a.status)
			}
		}
	}
}

// TestListedIsNotHad: a manifest that its registry has not checked (distribution serves
// blobs as manifests, others take indexes of what they have not) opens nothing of another
// repository that is here for those who may read that.
func TestListedIsNotHad(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "x"}, Anonymous: []string{"my/*"}}
	})
	secret := n.image(1000)
	n.whole(secret, "Authorization", "Basic YW5uOng=")
	layer, config := secret.Layers[0], digest.FromString("{}")
	for mine, doc := range map[string][2]string{
		"my/image": {ocispec.MediaTypeImageManifest, fmt.Sprintf(`"config":{"size":2,"digest":%q},"layers":[{"size":%d,"digest":%q}]`, config, layer.Size, layer.Digest)},
		"my/index": {ocispec.MediaTypeImageIndex, fmt.Sprintf(`"manifests":[{"mediaType":%q,"size":%d,"digest":%q}]`, secret.MediaType, secret.Size, secret.Digest)},
	} {
		n.registry.PutBlob(mine, registrytest.Bytes([]byte("{}")))
		n.registry.PutManifest(mine, doc[0], []byte(`{"schemaVersion":2,"mediaType":"`+doc[0]+`",`+doc[1]+`}`), "v1")
		at := func(path string) string { return "/v2/" + mine + "/" + path + "?ns=" + host }
		if a := n.get(at("manifests/v1")); a.status != 200 {
			t.Fatalf("%s: %d %s", mine, a.status, a.body)
		}
		for _, path := range []string{"blobs/" + layer.Digest.String(), "blobs/" + secret.Digest.String(), "manifests/" + secret.Digest.String()} {
			if a := n.get(at(path)); a.status != 404 {
				t.Errorf("%s: %s: %d", mine, path, a.status)
			}
		}
	}
}

// TestSharedIsAskedOnce: what two repositories have in common costs one question in the
// second, and none where anybody may have it.
func TestSharedIsAskedOnce(t *testing.T) {
	for _, open := range []bool{false, true} {
		n := startNode(t, func(s *setup) {
			s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "x"}}
			if open {
				s.registry.Auth = registrytest.Auth{}
			}
		})
		header := []string{"Authorization", "Basic YW5uOng="}
		if open {
			header = nil
		}
		img := n.image(1000)
		n.whole(img, header...)
		n.registry.Put("team/other", img, "v1")
		layer := img.Layers[0].Digest
		n.get("/v2/team/other/manifests/v1?ns="+host, header...)
		n.registry.ResetCounts()
		for range 3 {
			if a := n.get("/v2/team/other/blobs/"+layer.String()+"?ns="+host, header...); a.status != 200 || a.header.Get(headerSource) != "disk" {
				t.Fatalf("open %v: %d from %s", open, a.status, a.header.Get(headerSource))
			}
		}
		if got := n.registry.Count(registrytest.Match{}); open && got != 0 || !open && got != 1 {
			t.Errorf("open %v: %d questions", open, got)
		}
	}
}

// TestBlobThatLooksLikeAManifest: registries look into no blob that is pushed, so what one
// lists is no part of its repository either, however it is asked for. That the blob is
// pinned, as a layer of some image, changes nothing.
func TestBlobThatLooksLikeAManifest(t *testing.T) {
	for _, pinned := range []bool{false, true} {
		t.Run(fmt.Sprintf("pinned=%v", pinned), func(t *testing.T) {
			const mine = "my/app"
			n := startNode(t, func(s *setup) {
				s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "x"}, Anonymous: []string{"my/*"}}
				s.proxy.Pinned = func(r cache.Repository, ref string) (Pinned, bool) {
					return Pinned{Digest: digest.Digest(ref), Public: true}, pinned && r.Name == mine
				}
			})
			secret := n.image(1000)
			layer := secret.Layers[0]
			for _, path := range []string{manifestPath("v1"), manifestPath(secret.Digest.String()), blobPath(layer.Digest)} {
				if a := n.get(path, "Authorization", "Basic YW5uOng="); a.status != 200 {
					t.Fatalf("%s: %d %s", path, a.status, a.body)
				}
			}
			body := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"size":2,"digest":%q},"layers":[{"size":1000,"digest":%q}]}`,
				ocispec.MediaTypeImageManifest, digest.FromString("{}"), layer.Digest)
			blob := digest.FromBytes(body)
			n.registry.PutBlob(mine, registrytest.Bytes(body))
			if a := n.get("/v2/" + mine + "/blobs/" + blob.String() + "?ns=" + host); a.status != 200 {
				t.Fatalf("the blob: %d %s", a.status, a.body)
			}
			for _, d := range []digest.Digest{layer.Digest, blob} {
				await(t, "commit", func() bool { return n.cache.Has(d) })
			}
			if a := n.get("/v2/" + mine + "/manifests/" + blob.String() + "?ns=" + host); a.status != 404 {
				t.Errorf("the blob as a manifest: %d", a.status)
			}
			if place := (cache.Repository{Registry: host, Name: mine}); pinned {
				if n.cache.Meta().Member(place, layer.Digest) {
					t.Error("what it lists became a part of the repository")
				}
				return // for the pin of this test, every digest is
			}
			if a := n.get("/v2/" + mine + "/blobs/" + layer.Digest.String() + "?ns=" + host); a.status != 404 {
				t.Errorf("what it lists: %d", a.status)
			}
		})
	}
}

package proxy

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/test/registrytest"
)

const mine = "my/image"

var ann = []string{"Authorization", "Basic YW5uOng="}

// besides is a node, and a registry that has a private image and lets anybody list its
// layers in an image of the repository mine, where they are not.
func besides(t *testing.T, layers ...int64) (*node, *registrytest.Image) {
	t.Helper()
	n := startNode(t, func(s *setup) {
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "x"}, Anonymous: []string{"my/*"}}
		s.upstream.StreamsPerBlob = 1
	})
	secret := n.image(layers...)
	n.registry.PutBlob(mine, registrytest.Bytes([]byte("{}")))
	list := ""
	for _, l := range secret.Layers {
		list += fmt.Sprintf(`,{"mediaType":%q,"size":%d,"digest":%q}`, l.MediaType, l.Size, l.Digest)
	}
	n.registry.PutManifest(mine, ocispec.MediaTypeImageManifest, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"size":2,"digest":%q},"layers":[%s]}`,
		ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, digest.FromString("{}"), list[1:]), "v1")
	if a := n.get("/v2/" + mine + "/manifests/v1?ns=" + host); a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	if a := n.get(manifestPath("v1"), ann...); a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	return n, secret
}

func myBlob(d digest.Digest) string { return "/v2/" + mine + "/blobs/" + d.String() + "?ns=" + host }

func (n *node) quiet() {
	n.t.Helper()
	await(n.t, "the end of the fills", func() bool { return len(n.cache.Fills()) == 0 })
}

// TestListedIsNotHadInPart: what a fill for another repository left behind is here, too.
func TestListedIsNotHadInPart(t *testing.T) {
	n, secret := besides(t, 9_000_000)
	layer := secret.Layers[0].Digest
	get := registrytest.Match{Reference: layer.String(), Repository: repo, Method: "GET"}
	cut := n.registry.Inject(get, registrytest.Times(1), registrytest.CutAfter(7_000_000))
	down := n.registry.Inject(get, registrytest.Skip(1), registrytest.Status(404))
	a := n.get(blobPath(layer), ann...)
	n.quiet()
	cut.Remove()
	down.Remove()
	if a.err == nil || len(a.body) < 4_000_000 || n.cache.Stats().Bytes < 9_000_000 {
		t.Fatalf("%d: %d bytes, %v; %d are kept", a.status, len(a.body), a.err, n.cache.Stats().Bytes)
	}
	slow := n.registry.Inject(registrytest.Match{Repository: mine, Method: "GET"}, registrytest.Delay(300*time.Millisecond))
	if a := n.get(myBlob(layer), "Range", "bytes=0-999"); a.status != 404 {
		t.Errorf("%d, %d bytes", a.status, len(a.body))
	}
	slow.Remove()
	n.proxy.failed.forget(keyOf(n.target(), layer))
	if a := n.get(blobPath(layer), ann...); a.status != 200 || len(a.body) != 9_000_000 {
		t.Errorf("the owner: %d, %d bytes, %v", a.status, len(a.body), a.err)
	}
}

// TestHangingUpIsNoProof: who hangs up before anything was asked has not been told anything.
func TestHangingUpIsNoProof(t *testing.T) {
	n, secret := besides(t, 1000)
	layer := secret.Layers[0].Digest
	target := n.target()
	target.Repository = mine
	gone, hangUp := context.WithCancel(t.Context())
	hangUp()
	for range 30 {
		if _, err := n.proxy.open(gone, target, layer, KindBlob); err == nil {
			t.Fatal("open did not notice")
		}
		n.quiet()
		if n.proxy.auth.said(keyOf(target, layer)) {
			t.Fatal("the registry is believed to have it there")
		}
	}
}

// TestJoiningIsNoProof: who waits for a fill that fails for want of the blob in his
// repository does not get it from the next one, for another.
func TestJoiningIsNoProof(t *testing.T) {
	sizes := make([]int64, 12)
	for i := range sizes {
		sizes[i] = 100_000 + int64(i)
	}
	n, secret := besides(t, sizes...)
	for _, l := range secret.Layers {
		n.quiet()
		held := n.registry.Inject(registrytest.Match{Repository: mine, Reference: l.Digest.String(), Method: "GET"}, registrytest.Times(1), registrytest.Hold())
		var asked sync.WaitGroup
		stolen := make(chan answer, 3)
		steal := func() { stolen <- n.get(myBlob(l.Digest)) }
		waiting := func(readers int) func() bool {
			return func() bool {
				n.proxy.mu.Lock()
				defer n.proxy.mu.Unlock()
				return len(n.proxy.exchanges) == readers
			}
		}
		asked.Go(steal)
		await(t, "the fill", func() bool { return len(n.cache.Fills()) == 1 })
		asked.Go(steal)
		asked.Go(steal)
		await(t, "the others", waiting(3))
		asked.Go(func() { n.get(blobPath(l.Digest), ann...) })
		await(t, "the owner", waiting(4))
		held.Remove()
		asked.Wait()
		for range 3 {
			if a := <-stolen; a.status == http.StatusOK {
				t.Errorf("given %d bytes of %s", len(a.body), l.Digest)
			}
		}
	}
}

// TestBegunMeanwhile: a fill that begins in the repository, at whatever moment of another
// caller's look, is that caller's proof as well. Nodes that pull together cost no question.
func TestBegunMeanwhile(t *testing.T) {
	n, secret := besides(t, 1000, 1001, 1002, 1003)
	auth, target := n.proxy.auth, n.target()
	target.Repository = mine
	nothing := func(blobKey) {}
	for i, began := range []struct {
		what   string
		before func(key blobKey)
		here   bool
		want   bool
	}{
		{"nothing", nothing, false, false},
		{"another repository's", nothing, true, true},
		{"about to ask", func(key blobKey) { auth.willAsk.begin(key) }, true, false},
		{"asking", func(key blobKey) { auth.asking.begin(key) }, true, false},
	} {
		key := keyOf(target, secret.Layers[i].Digest)
		if got := auth.unproven(key, func(digest.Digest) bool { began.before(key); return began.here }); got != began.want {
			t.Errorf("%s: the registry is asked: %v", began.what, got)
		}
	}
	told := digest.FromString("told")
	if auth.unproven(keyOf(target, told), func(digest.Digest) bool { auth.say(target, told); return true }) {
		t.Error("the registry is asked what it has just told")
	}
}

// TestHeadTellsLess: Harbor as a cache for another registry says to a HEAD that a blob is
// not there which it has not fetched yet, and gives it to a GET. An image that shares its
// base with another is had all the same, by clients that can go nowhere else too.
func TestHeadTellsLess(t *testing.T) {
	head := registrytest.Match{Kind: registrytest.Blob, Method: "HEAD"}
	open := startNode(t, nil)
	open.image(1000, 2000)
	open.registry.Inject(head, registrytest.Status(404))
	if a := open.get(pathManifest("v1")); a.status != 200 {
		t.Errorf("to a client that is promised its blobs: %d", a.status)
	}
	n := startNode(t, func(s *setup) {
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "x"}}
	})
	img := n.image(1000, 2000)
	n.registry.Inject(head, registrytest.Status(404))
	n.whole(img, ann...)
	const other = "team/other"
	n.registry.Put(other, img, "v1")
	n.get("/v2/"+other+"/manifests/v1?ns="+host, ann...)
	for _, l := range img.Layers {
		if a := n.get("/v2/"+other+"/blobs/"+l.Digest.String()+"?ns="+host, ann...); a.status != 200 || a.header.Get(headerSource) != "disk" {
			t.Errorf("shared: %d from %s", a.status, a.header.Get(headerSource))
		}
	}
}

// TestOncePublicIsNoWord: what was pulled with a credential since a repository stopped being
// public was shown to nobody else, also where nobody has heard of that yet (A8): the home of a
// blob asks as the one that it fetches it for.
func TestOncePublicIsNoWord(t *testing.T) {
	n, secret := besides(t, 1000)
	layer := secret.Layers[0].Digest
	n.cache.Meta().SetVerdict(testRepository, cache.Anyone)
	n.proxy.learned.clear()
	n.whole(secret, ann...)
	for _, d := range []digest.Digest{layer, secret.Digest} {
		if _, shown := n.proxy.auth.shown(d); shown {
			t.Errorf("anybody may have %s", d)
		}
	}
	if a := n.get(myBlob(layer)); a.status != 404 {
		t.Errorf("from another repository: %d, %d bytes", a.status, len(a.body))
	}
}

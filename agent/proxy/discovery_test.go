package proxy

import (
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/test/registrytest"
)

func tagsOf(t *testing.T, a answer) []string {
	t.Helper()
	var list struct {
		Name string
		Tags []string
	}
	if err := json.Unmarshal(a.body, &list); err != nil || a.status != 200 || list.Name != repo {
		t.Fatalf("status %d: %s", a.status, a.body)
	}
	return list.Tags
}

func TestTags(t *testing.T) {
	n := startNode(t, nil)
	img := n.image(10)
	for _, tag := range []string{"a", "b", "c"} {
		n.registry.Tag(repo, tag, img.Digest)
	}
	for _, base := range []string{"/v2/" + repo + "/tags/list?ns=" + host, "/v2/" + host + "/" + repo + "/tags/list?"} {
		if got := tagsOf(t, n.get(base)); !slices.Equal(got, []string{"a", "b", "c", "v1"}) {
			t.Errorf("all: %v", got)
		}
		if got := tagsOf(t, n.get(base+"&last=b")); !slices.Equal(got, []string{"c", "v1"}) {
			t.Errorf("after b: %v", got)
		}
		none := n.get(base + "&n=0")
		if got := tagsOf(t, none); len(got) != 0 || none.header.Get("Link") != "" {
			t.Errorf("n=0: %v, Link %q", got, none.header.Get("Link"))
		}
		if got := followTags(t, n, base+"&n=2"); !slices.Equal(got, []string{"a", "b", "c", "v1"}) {
			t.Errorf("by pages: %v", got)
		}
	}
	checkOCIError(t, n.get("/v2/"+repo+"/tags/list?n=x&ns="+host), 400, "UNSUPPORTED")
}

// followTags goes on by Link as clients do, which must stay on the proxy.
func followTags(t *testing.T, n *node, path string) (tags []string) {
	t.Helper()
	for range 10 {
		a := n.get(path)
		tags = append(tags, tagsOf(t, a)...)
		link := a.header.Get("Link")
		if link == "" {
			return tags
		}
		next, ok := strings.CutSuffix(strings.TrimPrefix(link, "<"), `>; rel="next"`)
		if !ok || strings.Contains(path, "ns=") != strings.Contains(next, "ns=") || !strings.HasPrefix(next, path[:strings.Index(path, "?")]) {
			t.Fatalf("Link %q after %s", link, path)
		}
		path = next
	}
	t.Fatal("the pages do not end")
	return nil
}

// TestPagesAsTheRegistryCountsThem: the next page is asked for by whatever the
// registry's link says, as Quay's next_page, and not by n and last alone. Else the
// first page would come again, without end.
func TestPagesAsTheRegistryCountsThem(t *testing.T) {
	n := startNode(t, nil)
	n.image(10)
	tags := registrytest.Match{Kind: registrytest.Tags}
	first := n.registry.Inject(tags, registrytest.Header("Link", "</v2/"+repo+`/tags/list?n=1&next_page=gAA%2B%3D>; rel="next"`))
	path := "/v2/" + repo + "/tags/list?n=1&ns=" + host
	link := n.get(path).header.Get("Link")
	next, ok := strings.CutSuffix(strings.TrimPrefix(link, "<"), `>; rel="next"`)
	if !ok {
		t.Fatalf("Link %q", link)
	}
	first.Remove()
	if a := n.get(next); a.status != 200 || a.header.Get("Link") != "" {
		t.Errorf("%s: %d, Link %q", next, a.status, a.header.Get("Link"))
	}
	asked := n.registry.Requests(tags)
	u, err := url.Parse(asked[len(asked)-1].Path)
	if err != nil || len(asked) != 2 || u.Query().Get("next_page") != "gAA+=" || u.Query().Get("n") != "1" {
		t.Errorf("%d requests, the last for %s, %v", len(asked), asked[len(asked)-1].Path, err)
	}
}

func TestTagsWithUpstreamDown(t *testing.T) {
	n := startNode(t, nil)
	n.image(10)
	path := "/v2/" + repo + "/tags/list?ns=" + host
	n.get(path)
	n.get(manifestPath("v1")) // which shows that anyone may read it
	n.registry.Down()
	a := n.get(path)
	if got := tagsOf(t, a); !slices.Equal(got, []string{"v1"}) || a.header.Get(headerSource) != "stale" {
		t.Errorf("%v from %s", got, a.header.Get(headerSource))
	}
	checkOCIError(t, n.get("/v2/other/tags/list?ns="+host), 503, "UNAVAILABLE")
}

// TestReferrers is about registries with the API.
func TestReferrers(t *testing.T) {
	n := startNode(t, nil)
	img := n.image(10)
	sbom := registrytest.Artifact(img.Descriptor, "application/vnd.example.sbom", 1)
	signature := registrytest.Artifact(img.Descriptor, "application/vnd.example.signature", 2)
	n.registry.Put(repo, sbom, "sbom")
	n.registry.Put(repo, signature, "signature")
	if got := referrersOf(t, n.get(referrersPath(img.Digest))); len(got) != 2 {
		t.Error(got)
	}
	filtered := n.get(referrersPath(img.Digest) + "&artifactType=application/vnd.example.sbom")
	if got := referrersOf(t, filtered); len(got) != 1 || got[0].Digest != sbom.Digest || filtered.header.Get("OCI-Filters-Applied") != "artifactType" {
		t.Errorf("filtered: %v %v", got, filtered.header)
	}
	if got := referrersOf(t, n.get(referrersPath(sbom.Digest))); len(got) != 0 {
		t.Errorf("of an artifact: %v", got)
	}
}

// TestNoReferrers: where the registry has no such API, clients are told so of every digest,
// and look for the tag: one that once got a list looks no more. That holds in an outage, too.
func TestNoReferrers(t *testing.T) {
	n := startNode(t, func(s *setup) { s.registry.NoReferrers = true })
	img := n.image(10)
	sbom := registrytest.Artifact(img.Descriptor, "application/vnd.example.sbom", 1)
	n.registry.Put(repo, sbom, "sbom")
	index := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[` +
		`{"mediaType":"` + ocispec.MediaTypeImageManifest + `","digest":"` + sbom.Digest.String() + `","size":4}]}`
	tag := "sha256-" + img.Digest.Encoded()
	n.registry.PutManifest(repo, ocispec.MediaTypeImageIndex, []byte(index), tag)
	for _, when := range []string{"", "down"} {
		for _, d := range []digest.Digest{img.Digest, sbom.Digest} {
			checkOCIError(t, n.get(referrersPath(d)), 404, "MANIFEST_UNKNOWN")
		}
		if got := referrersOf(t, n.get(manifestPath(tag), "Accept", ocispec.MediaTypeImageIndex)); len(got) != 1 || got[0].Digest != sbom.Digest {
			t.Errorf("%s: %v", when, got)
		}
		n.registry.Down()
	}
	checkOCIError(t, n.get("/v2/other/referrers/"+img.Digest.String()+"?ns="+host), 503, "UNAVAILABLE")
}

func referrersPath(d digest.Digest) string {
	return "/v2/" + repo + "/referrers/" + d.String() + "?ns=" + host
}

func referrersOf(t *testing.T, a answer) []ocispec.Descriptor {
	t.Helper()
	var index ocispec.Index
	if err := json.Unmarshal(a.body, &index); err != nil || a.status != 200 || a.header.Get("Content-Type") != ocispec.MediaTypeImageIndex {
		t.Fatalf("status %d, %s: %s", a.status, a.header.Get("Content-Type"), a.body)
	}
	return index.Manifests
}

// TestCanary: the image can be pulled under any registry and by both kinds of
// client, with no registry at all, and the proxy knows.
func TestCanary(t *testing.T) {
	n := startNode(t, nil)
	n.registry.Down()
	if _, ok := n.proxy.Canary("n1"); ok {
		t.Error("seen before")
	}
	c := n.containerd()
	if r, err := c.Pull(t.Context(), host+"/larder.invalid/canary:n1", nil); err != nil || len(r.Content) < 4 {
		t.Errorf("containerd: %v, %d parts", err, len(r.Content))
	}
	if _, err := n.crio().Pull(t.Context(), "larder.invalid/canary", "n2"); err != nil {
		t.Errorf("CRI-O: %v", err)
	}
	crio := n.crio()
	crio.Sources = []string{n.addr + "/larder.invalid"}
	if _, err := crio.Pull(t.Context(), "canary", "n3"); err != nil {
		t.Errorf("CRI-O, by its own name: %v", err)
	}
	for nonce, registry := range map[string]string{"n1": host, "n2": host, "n3": "larder.invalid"} {
		if seen, ok := n.proxy.Canary(nonce); !ok || seen.Registry != registry || seen.UserAgent == "" {
			t.Errorf("%s: %+v, %v", nonce, seen, ok)
		}
	}
	checkOCIError(t, n.get("/v2/larder.invalid/canary/tags/list?ns="+host), 404, "NAME_UNKNOWN")
}

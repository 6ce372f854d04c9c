package registrytest_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	. "github.com/larder-cache/larder/test/registrytest"
)

func TestTagsInPages(t *testing.T) {
	s := Start(t, Options{})
	var want []string
	for i := range 10 {
		tag := fmt.Sprintf("v%02d", i)
		want = append(want, tag)
		s.PutManifest(repo, "x/y", []byte("{}"), tag)
	}
	r, err := name.NewRepository(s.Host() + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	got, err := remote.List(r, remote.WithPageSize(3), remote.WithTransport(client(t, s).Transport))
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
	if n := s.Count(Match{Kind: Tags}); n != 4 {
		t.Errorf("%d pages", n)
	}
	for _, tc := range []struct{ query, want, link string }{
		{"n=0", `"tags":[]`, ""},
		{"last=v08", `"tags":["v09"]`, ""},
		{"last=v085", `"tags":["v09"]`, ""},
		{"n=1&last=v07", `"tags":["v08"]`, `</v2/library/app/tags/list?n=1&last=v08>; rel="next"`},
	} {
		o := fetch(t, s, "/v2/"+repo+"/tags/list?"+tc.query, "")
		if !strings.Contains(string(o.body), tc.want) || o.header.Get("Link") != tc.link {
			t.Errorf("%s: %s, Link %q", tc.query, o.body, o.header.Get("Link"))
		}
	}
	if o := fetch(t, s, "/v2/unknown/tags/list", ""); o.status != 404 || !strings.Contains(string(o.body), "NAME_UNKNOWN") {
		t.Errorf("unknown repository: %d %s", o.status, o.body)
	}
}

// TestReferrers lets go-containerregistry find referrers, by API and by fallback
// tag.
func TestReferrers(t *testing.T) {
	for _, noAPI := range []bool{false, true} {
		t.Run(fmt.Sprintf("no API %v", noAPI), func(t *testing.T) {
			s := Start(t, Options{NoReferrers: noAPI})
			img := OCIImage(ImageSpec{Seed: 1, Layers: []int64{10}})
			sbom := Artifact(img.Descriptor, "application/spdx+json", 1)
			signature := Artifact(img.Descriptor, "application/signature", 2)
			for _, i := range []*Image{img, sbom, signature} {
				s.Put(repo, i)
			}
			d, err := name.NewDigest(s.Ref(repo, img.Digest.String()))
			if err != nil {
				t.Fatal(err)
			}
			index, err := remote.Referrers(d, remote.WithTransport(client(t, s).Transport))
			if err != nil {
				t.Fatal(err)
			}
			m, err := index.IndexManifest()
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, desc := range m.Manifests {
				got = append(got, desc.Digest.String()+" "+desc.ArtifactType)
			}
			want := []string{sbom.Digest.String() + " application/spdx+json", signature.Digest.String() + " application/signature"}
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

func TestReferrersAPI(t *testing.T) {
	s := Start(t, Options{})
	img := OCIImage(ImageSpec{Seed: 1})
	s.Put(repo, img)
	s.Put(repo, Artifact(img.Descriptor, "a/b", 1))
	for _, tc := range []struct {
		path    string
		status  int
		entries int
		filters string
	}{
		{img.Digest.String(), 200, 1, ""},
		{img.Digest.String() + "?artifactType=a/b", 200, 1, "artifactType"},
		{img.Digest.String() + "?artifactType=c/d", 200, 0, "artifactType"},
		{"sha256:" + strings.Repeat("0", 64), 200, 0, ""},
		{"sha256:short", 400, 0, ""},
	} {
		o := fetch(t, s, "/v2/"+repo+"/referrers/"+tc.path, "")
		var index ocispec.Index
		if err := json.Unmarshal(o.body, &index); err != nil {
			t.Fatal(err)
		}
		if o.status != tc.status || len(index.Manifests) != tc.entries || o.header.Get("OCI-Filters-Applied") != tc.filters {
			t.Errorf("%s: %d %s %v", tc.path, o.status, o.body, o.header)
		}
		if o.status == http.StatusOK && o.header.Get("Content-Type") != ocispec.MediaTypeImageIndex {
			t.Errorf("%s: type %q", tc.path, o.header.Get("Content-Type"))
		}
	}
}

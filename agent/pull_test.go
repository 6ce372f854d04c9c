package agent

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
)

func TestParseImage(t *testing.T) {
	d := digest.FromString("x").String()
	tests := []struct{ in, registry, repository, reference, text string }{
		{"nginx", "docker.io", "library/nginx", "latest", "docker.io/library/nginx:latest"},
		{"nginx:1.29", "docker.io", "library/nginx", "1.29", "docker.io/library/nginx:1.29"},
		{"docker.io/team/app", "docker.io", "team/app", "latest", "docker.io/team/app:latest"},
		{"registry-1.docker.io/team/app:v1", "docker.io", "team/app", "v1", "docker.io/team/app:v1"},
		{"quay.io/a/b@" + d, "quay.io", "a/b", d, "quay.io/a/b@" + d},
		{"reg.example.com:5000/a:v1", "reg.example.com:5000", "a", "v1", "reg.example.com:5000/a:v1"},
		{"localhost:5000/a:v1", "localhost:5000", "a", "v1", "localhost:5000/a:v1"},
	}
	for _, tt := range tests {
		got, err := ParseImage(tt.in)
		if want := (Image{tt.registry, tt.repository, tt.reference}); err != nil || got != want || got.String() != tt.text {
			t.Errorf("%s: %+v (%s), %v; want %+v", tt.in, got, got, err, want)
		}
	}
	for _, bad := range []string{"", "UPPER", "a b", "nginx:", "quay.io/a@sha256:12"} {
		if got, err := ParseImage(bad); err == nil {
			t.Errorf("%q became %+v", bad, got)
		}
	}
}

func TestPullPlatforms(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	index := registrytest.Platforms(registrytest.ImageSpec{Seed: 11, Layers: []int64{1000}}, true)
	reg.Put("team/multi", index, "v1")
	a := start(t, c)
	image := Image{Registry: testRegistry, Repository: "team/multi", Reference: "v1"}
	for platform, want := range map[string]int{"linux/amd64": 4, "linux/arm64": 4, "all": 7} {
		parts, err := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client, Platform: platform}.Pull(t.Context(), image)
		if err != nil || len(parts) != want {
			t.Errorf("%s: %d parts, %v; want %d", platform, len(parts), err, want)
		}
	}
	for platform, want := range map[string]string{"plan9/386": "no manifest for plan9/386", "a/b/c/d": "linux/arm64"} {
		_, err := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client, Platform: platform}.Pull(t.Context(), image)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", platform, err, want)
		}
	}
	// An image without an index is taken for whatever platform, but not for what is none.
	for platform, want := range map[string]bool{"plan9/386": true, "a/b/c/d": false} {
		_, err := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client, Platform: platform}.Pull(t.Context(), testImage)
		if (err == nil) != want || !want && !errors.Is(err, errNoPlatform) {
			t.Errorf("one manifest, %s: %v", platform, err)
		}
	}
}

// TestPullVerifies holds that a puller believes no bytes that do not match.
func TestPullVerifies(t *testing.T) {
	layer := []byte("layer")
	m, err := json.Marshal(map[string]any{"layers": []map[string]any{{"digest": digest.FromString("another layer"), "size": 5}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, manifest := range map[string][]byte{"manifest": []byte("{}"), "blob": m, "nothing like a manifest": []byte("<html>")} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body := layer
			if strings.Contains(r.URL.Path, "/manifests/") {
				body = manifest
			}
			d := digest.FromBytes(manifest)
			if name == "manifest" {
				d = digest.FromString("another manifest")
			}
			w.Header().Set("Docker-Content-Digest", d.String())
			_, _ = w.Write(body)
		}))
		parts, err := Puller{Proxy: server.URL, Client: server.Client()}.Pull(t.Context(), testImage)
		if err == nil {
			t.Errorf("%s: pulled %v", name, parts)
		}
		server.Close()
	}
}

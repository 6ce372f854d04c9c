package agent

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestWalkImage: indexes that list the one below twice make 2^n ways down. Each part
// comes once all the same, the root first, and there is an end to how many.
func TestWalkImage(t *testing.T) {
	for _, tt := range []struct {
		name    string
		indexes int
		hidden  int // depth of a manifest that is left out; 0 = none
		more    int // bytes of each manifest, beside what it lists
		visits  int
		blobs   int
		want    string // of the error
	}{
		{"deep", 64, 0, 0, 65, 1, ""},
		{"as many as there may be", maxManifests - 1, 0, 0, maxManifests, 1, ""},
		{"one more", maxManifests, 0, 0, maxManifests, 0, fmt.Sprintf("more than %d manifests", maxManifests)},
		{"large", 10, 0, maxManifestBytes / 8, 7, 0, fmt.Sprintf("more than %d bytes of manifests", maxManifestBytes)},
		{"left out below", 64, 10, 0, 10, 0, ""},
	} {
		config := digest.FromString("config")
		more := strings.Repeat("x", tt.more)
		body := fmt.Appendf(nil, `{"config":{"digest":%q,"size":2},"layers":[{"digest":%q,"size":2}],"x":%q}`, config, config, more)
		store := map[digest.Digest][]byte{}
		var order []digest.Digest // the root last
		for range tt.indexes + 1 {
			d := digest.FromBytes(body)
			store[d], order = body, append(order, d)
			body = fmt.Appendf(nil, `{"manifests":[{"digest":%q,"size":1},{"digest":%q,"size":1}],"x":%q}`, d, d, more)
		}
		slices.Reverse(order)
		var visited []digest.Digest
		listed := 0
		err := walkImage(ocispec.Descriptor{Digest: order[0]}, "all", func(d ocispec.Descriptor) ([]byte, error) {
			if tt.hidden > 0 && d.Digest == order[tt.hidden] {
				return nil, errNotBelow
			}
			return store[d.Digest], nil
		}, func(d ocispec.Descriptor, m manifest, blobs []blob) error {
			if d.Size != int64(len(store[d.Digest])) || m.isIndex() && len(blobs) > 0 {
				t.Errorf("%s: %+v lists %d blobs", tt.name, d, len(blobs))
			}
			visited, listed = append(visited, d.Digest), listed+len(blobs)
			return nil
		})
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if !slices.Equal(visited, order[:tt.visits]) || listed != tt.blobs {
			t.Errorf("%s: %d manifests and %d blobs, want %d and %d", tt.name, len(visited), listed, tt.visits, tt.blobs)
		}
	}
}

// TestChoose: an index may also list what has no platform, such as a chart; runtimes take
// that only if nothing is for theirs.
func TestChoose(t *testing.T) {
	entry := func(name, os, architecture, variant string) ocispec.Descriptor {
		d := ocispec.Descriptor{Digest: digest.FromString(name)}
		if os != "" {
			d.Platform = &ocispec.Platform{OS: os, Architecture: architecture, Variant: variant}
		}
		return d
	}
	var (
		chart       = entry("chart", "", "", "")
		attestation = entry("attestation", "unknown", "unknown", "")
		amd64       = entry("amd64", "linux", "amd64", "")
		armv6       = entry("armv6", "linux", "arm", "v6")
		armv7       = entry("armv7", "linux", "arm", "v7")
	)
	for _, tt := range []struct {
		name     string
		index    []ocispec.Descriptor
		platform string
		want     []ocispec.Descriptor // none: an error
	}{
		{"a chart first", []ocispec.Descriptor{chart, amd64, armv7}, "linux/amd64", []ocispec.Descriptor{amd64}},
		{"a chart between", []ocispec.Descriptor{armv6, chart, armv7}, "linux/arm/v7", []ocispec.Descriptor{armv7}},
		{"charts alone", []ocispec.Descriptor{chart}, "linux/amd64", []ocispec.Descriptor{chart}},
		{"a chart and others' images", []ocispec.Descriptor{amd64, chart}, "linux/arm/v7", []ocispec.Descriptor{chart}},
		{"an attestation first", []ocispec.Descriptor{attestation, amd64}, "linux/amd64", []ocispec.Descriptor{amd64}},
		{"an attestation and others' images", []ocispec.Descriptor{attestation, amd64}, "linux/arm64", nil},
		{"all", []ocispec.Descriptor{chart, attestation, amd64}, "all", []ocispec.Descriptor{chart, attestation, amd64}},
	} {
		got, err := manifest{Manifests: tt.index}.choose(tt.platform)
		same := slices.EqualFunc(got, tt.want, func(a, b ocispec.Descriptor) bool { return a.Digest == b.Digest })
		if !same || (err == nil) != (tt.want != nil) {
			t.Errorf("%s: %v, %v, want %v", tt.name, got, err, tt.want)
		}
	}
}

// FuzzManifest feeds foreign bytes to the reader of manifests: whatever it
// accepts names valid digests only.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"mediaType":"x","config":{"digest":"sha256:` + strings.Repeat("a", 64) + `"},"layers":[{"digest":"sha256:` + strings.Repeat("b", 64) + `","urls":["x"]}]}`))
	f.Add([]byte(`{"manifests":[{"digest":"sha256:` + strings.Repeat("a", 64) + `","platform":{"os":"linux","architecture":"arm64","variant":"v8"}}]}`))
	f.Add([]byte(`{"manifests":[{"digest":"../../etc"}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		m, err := parseManifest(body)
		if err != nil {
			return
		}
		for _, b := range m.blobs() {
			if b.Digest.Validate() != nil {
				t.Errorf("names %q", b.Digest)
			}
		}
		for _, platform := range []string{"", "all", "linux/arm64"} {
			chosen, err := m.choose(platform)
			if err == nil && platform != "all" && m.isIndex() && len(chosen) != 1 {
				t.Errorf("%q chooses %d", platform, len(chosen))
			}
			for _, d := range chosen {
				if d.Digest.Validate() != nil {
					t.Errorf("chooses %q", d.Digest)
				}
			}
		}
	})
}

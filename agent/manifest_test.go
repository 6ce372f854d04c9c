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
		err := walkImage(ocispec.Descriptor{Digest: order[0]}, selection{platform: "all"}, func(d ocispec.Descriptor) ([]byte, error) {
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
		got, err := manifest{Manifests: tt.index}.choose(selection{platform: tt.platform})
		if !slices.EqualFunc(got, tt.want, sameDigest) || (err == nil) != (tt.want != nil) {
			t.Errorf("%s: %v, %v, want %v", tt.name, got, err, tt.want)
		}
	}
}

// TestChooseInstances: of images for one platform that differ in compression CRI-O takes the
// one in zstd and containerd the first, and never one that fits less for how it is compressed.
func TestChooseInstances(t *testing.T) {
	entry := func(name, variant, zstd string) ocispec.Descriptor {
		d := ocispec.Descriptor{Digest: digest.FromString(name), Platform: &ocispec.Platform{OS: "linux", Architecture: "arm", Variant: variant}}
		if zstd != "" {
			d.Annotations = map[string]string{zstdAnnotation: zstd}
		}
		return d
	}
	var (
		gzip, zstd  = entry("gzip", "v7", ""), entry("zstd", "v7", "true")
		second      = entry("second", "v7", "true")
		annotated   = entry("annotated", "v7", "false")
		older       = entry("older", "v6", "true")
		chart, file = entry("chart", "", ""), entry("file", "", "true")
	)
	chart.Platform, file.Platform = nil, nil
	for _, tt := range []struct {
		name        string
		index       []ocispec.Descriptor
		first, zstd ocispec.Descriptor
	}{
		{"zstd last", []ocispec.Descriptor{gzip, zstd, second}, gzip, zstd},
		{"zstd first", []ocispec.Descriptor{zstd, gzip}, zstd, zstd},
		{"zstd alone", []ocispec.Descriptor{zstd}, zstd, zstd},
		{"no zstd", []ocispec.Descriptor{gzip, annotated}, gzip, gzip},
		{"zstd for an older variant", []ocispec.Descriptor{older, gzip}, gzip, gzip},
		{"without a platform", []ocispec.Descriptor{chart, file}, chart, file},
		{"zstd without a platform", []ocispec.Descriptor{file, gzip}, gzip, gzip},
	} {
		m := manifest{Manifests: tt.index}
		for instances, want := range map[Instances][]ocispec.Descriptor{
			FirstInstance: {tt.first},
			ZstdInstance:  {tt.zstd},
			EveryInstance: slices.CompactFunc([]ocispec.Descriptor{tt.first, tt.zstd}, sameDigest),
		} {
			if got, err := m.choose(selection{"linux/arm/v7", instances}); err != nil || !slices.EqualFunc(got, want, sameDigest) {
				t.Errorf("%s, %d: %v, %v, want %v", tt.name, instances, got, err, want)
			}
		}
	}
}

func sameDigest(a, b ocispec.Descriptor) bool { return a.Digest == b.Digest }

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
			for instances, most := range map[Instances]int{FirstInstance: 1, ZstdInstance: 1, EveryInstance: 2} {
				chosen, err := m.choose(selection{platform, instances})
				if err == nil && platform != "all" && m.isIndex() && (len(chosen) < 1 || len(chosen) > most) {
					t.Errorf("%q, %d chooses %d", platform, instances, len(chosen))
				}
				for _, d := range chosen {
					if d.Digest.Validate() != nil {
						t.Errorf("chooses %q", d.Digest)
					}
				}
			}
		}
	})
}

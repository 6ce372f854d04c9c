package agent

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// sameTwice is an image of this machine's platform in gzip and, second in its index, in
// zstd, as podman marks it.
func sameTwice() (index, gzip, zstd *registrytest.Image) {
	platform := thisPlatform()
	gzip = registrytest.OCIImage(registrytest.ImageSpec{Seed: 90, Layers: []int64{20 << 10}, Platform: platform})
	zstd = registrytest.OCIImage(registrytest.ImageSpec{Seed: 91, Layers: []int64{10 << 10}, Platform: platform})
	zstd.Annotations = map[string]string{zstdAnnotation: "true"}
	return registrytest.Index(gzip, zstd), gzip, zstd
}

func thisPlatform() ocispec.Platform {
	p, _ := parsePlatform("")
	return p
}

// asks as containerd does, or as CRI-O and podman do, with the registry in the path.
func (r *running) asks(t *testing.T, crio bool, kind, reference string) error {
	t.Helper()
	url := fmt.Sprintf("http://%s/v2/team/app/%s/%s?ns=%s", r.ProxyAddr(), kind, reference, testRegistry)
	if crio {
		url = fmt.Sprintf("http://%s/v2/%s/team/app/%s/%s", r.ProxyAddr(), testRegistry, kind, reference)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", strings.Join(manifestTypes, ", "))
	resp, err := r.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s", kind, reference, resp.Status)
	}
	return nil
}

// takes pulls v1 as a runtime does that chooses that instance of it.
func (r *running) takes(t *testing.T, crio bool, instance *registrytest.Image) error {
	t.Helper()
	for _, reference := range []string{"v1", instance.Digest.String()} {
		if err := r.asks(t, crio, "manifests", reference); err != nil {
			return err
		}
	}
	for d := range instance.Blobs {
		if err := r.asks(t, crio, "blobs", d.String()); err != nil {
			return err
		}
	}
	return nil
}

// TestWhatThisNodesRuntimesTake: with its registry down, a pinned or warmed image is whole
// for the runtimes that the configuration names, explain shows what these pull, and nothing
// is held for others.
func TestWhatThisNodesRuntimesTake(t *testing.T) {
	for _, how := range []string{"pinned", "warmed"} {
		for _, tt := range []struct {
			name       string
			crio       bool
			containerd bool
			gzip, zstd bool // are held
		}{
			{"no runtime", false, false, true, false},
			{"containerd", false, true, true, false},
			{"CRI-O", true, false, false, true},
			{"both", true, true, true, true},
		} {
			t.Run(how+", "+tt.name, func(t *testing.T) {
				t.Parallel()
				c := testConfig(t)
				reg, _ := startRegistry(t, &c)
				index, gzip, zstd := sameTwice()
				reg.Put("team/app", index, "v1")
				if tt.crio {
					c.Hosts.CRIO = t.TempDir()
				}
				if tt.containerd {
					c.Hosts.Containerd = t.TempDir()
				}
				a := start(t, c)
				if how == "pinned" {
					if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
						t.Fatal(e.Error)
					}
				} else if code, body := a.admin(t, "POST", "/api/v1/warm", fmt.Sprintf(`{"images":[%q]}`, pinnedName), "Content-Type", "application/json"); code != 200 {
					t.Fatalf("%d %s", code, body)
				}
				a.settle(t)
				reg.Down()
				explained, err := a.Explain(testImage, "")
				if err != nil {
					t.Fatal(err)
				}
				listed := map[digest.Digest]bool{}
				for _, p := range explained.Parts {
					listed[p.Digest] = true
				}
				for instance, want := range map[*registrytest.Image]bool{gzip: tt.gzip, zstd: tt.zstd} {
					if err := a.takes(t, instance == zstd, instance); (err == nil) != want {
						t.Errorf("%v: can be pulled: %v", instance.Annotations, err)
					}
					if listed[instance.Digest] != want {
						t.Errorf("%v: explained as %+v", instance.Annotations, explained.Parts)
					}
				}
				if explained.Here != explained.Bytes {
					t.Errorf("%d bytes of %d are here", explained.Here, explained.Bytes)
				}
			})
		}
	}
}

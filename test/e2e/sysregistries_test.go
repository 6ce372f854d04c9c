package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/larder-cache/larder/hostsconfig"
	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	"go.podman.io/image/v5/types"
)

const someDigest = "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// TestDropInReadByContainersImage reads the CRI-O drop-in with the code that
// CRI-O, podman and skopeo read it with: for every image the sources are ours,
// then exactly what they were without us.
func TestDropInReadByContainersImage(t *testing.T) {
	tests := []struct {
		name  string
		files map[string]string // below /etc/containers
		// ours are images that go to the mirror first, and where; direct ones
		// stay as they were.
		ours   map[string]string
		direct []string
	}{
		{
			name:  "nothing before us",
			files: map[string]string{"registries.conf": "unqualified-search-registries = [\"docker.io\"]\n"},
			ours: map[string]string{
				"docker.io/library/nginx:1":                     "127.0.0.1:5050/docker.io/library/nginx:1",
				"quay.io/org/app" + someDigest:                  "127.0.0.1:5050/quay.io/org/app" + someDigest,
				"docker.io/larder.invalid/canary:4f1c":          "127.0.0.1:5050/docker.io/larder.invalid/canary:4f1c",
				"reg.example.com:5000/team/app:v1":              "127.0.0.1:5050/reg.example.com_5000/team/app:v1",
				"registry.access.redhat.com/ubi9/ubi:latest":    "127.0.0.1:5050/registry.access.redhat.com/ubi9/ubi:latest",
				"public.ecr.aws/docker/library/busybox:1.36.1":  "127.0.0.1:5050/public.ecr.aws/docker/library/busybox:1.36.1",
				"mcr.microsoft.com/dotnet/runtime:9.0" + "-arm": "127.0.0.1:5050/mcr.microsoft.com/dotnet/runtime:9.0-arm",
			},
			direct: []string{"unknown.example.com/a:1", "quay.io:443/org/app:1", "reg.example.com/a:1"},
		},
		{
			name: "an OpenShift node",
			files: map[string]string{
				"registries.conf": `
[[registry]]
  prefix = ""
  location = "quay.io/openshift-release-dev/ocp-release"
  [[registry.mirror]]
    location = "mirror.corp:8443/ocp"
    pull-from-mirror = "digest-only"
[[registry]]
  prefix = ""
  location = "registry.redhat.io"
  blocked = true
  [[registry.mirror]]
    location = "mirror.corp:8443/rh"
    insecure = true
    pull-from-mirror = "tag-only"
  [[registry.mirror]]
    location = "mirror.corp:8443/rh2"
`,
				"registries.conf.d/01-image-searchRegistries.conf": "unqualified-search-registries = [\"registry.access.redhat.com\", \"docker.io\"]\nshort-name-mode = \"\"\n",
			},
			ours: map[string]string{
				"quay.io/openshift-release-dev/ocp-release" + someDigest: "127.0.0.1:5050/quay.io/openshift-release-dev/ocp-release" + someDigest,
				"quay.io/openshift-release-dev/ocp-release:4":            "127.0.0.1:5050/quay.io/openshift-release-dev/ocp-release:4",
				"quay.io/other/app:1":                                    "127.0.0.1:5050/quay.io/other/app:1",
				"registry.redhat.io/ubi9:1":                              "127.0.0.1:5050/registry.redhat.io/ubi9:1",
				"registry.redhat.io/ubi9" + someDigest:                   "127.0.0.1:5050/registry.redhat.io/ubi9" + someDigest,
			},
		},
		{
			name: "limits, rewrites, wildcards, blocks",
			files: map[string]string{
				"registries.conf.d/10-a.conf": `
[[registry]]
prefix = "docker.io"
location = "hub.corp/docker"
mirror-by-digest-only = true
[[registry.mirror]]
location = "m.corp/d"
[[registry]]
prefix = "*.gitlab.com"
location = "gl.corp"
[[registry]]
location = "ghcr.io"
blocked = true
`,
				"registries.conf.d/20-b.conf": "[[registry]]\nlocation = \"docker.io/library\"\ninsecure = true\n" +
					"[[registry]]\nprefix = \"docker.io/same\"\nlocation = \"hub.corp/docker/same\"\n",
			},
			ours: map[string]string{
				"docker.io/org/app:1":            "127.0.0.1:5050/docker.io/org/app:1",
				"docker.io/org/app" + someDigest: "127.0.0.1:5050/docker.io/org/app" + someDigest,
				"docker.io/same/app:1":           "127.0.0.1:5050/docker.io/same/app:1",
			},
			// Of these Larder would ask hub.corp and registry.gitlab.com, and what is there is
			// another image.
			direct: []string{"ghcr.io/org/app:1", "other.gitlab.com/a:1", "docker.io/library/nginx:1", "registry.gitlab.com/group/project/a:1"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			etc := tempDir(t)
			dropIns := filepath.Join(etc, "registries.conf.d")
			if err := os.MkdirAll(dropIns, 0o755); err != nil {
				t.Fatal(err)
			}
			if tt.files["registries.conf"] == "" {
				tt.files["registries.conf"] = "\n" // or the machine's own is read
			}
			for name, text := range tt.files {
				if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			sys := &types.SystemContext{SystemRegistriesConfPath: filepath.Join(etc, "registries.conf"), SystemRegistriesConfDirPath: dropIns}
			images := slices.Clone(tt.direct)
			for image := range tt.ours {
				images = append(images, image)
			}
			before := map[string][]string{}
			for _, image := range images {
				before[image] = pullSources(t, sys, image)
			}
			hosts, err := hostsconfig.New(hostsconfig.Options{CRIO: dropIns, ProxyAddr: "127.0.0.1:5050", Registries: []string{"*", "reg.example.com:5000"}})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := hosts.Apply(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, image := range images {
				want := before[image]
				if us := tt.ours[image]; us != "" {
					want = append([]string{us + " insecure"}, want...)
				}
				if got := pullSources(t, sys, image); !slices.Equal(got, want) {
					t.Errorf("%s\n  is pulled from %q\n  want           %q", image, got, want)
				}
			}
		})
	}
}

// pullSources is where containers-image would look for an image, in order.
func pullSources(t *testing.T, sys *types.SystemContext, image string) []string {
	t.Helper()
	sysregistriesv2.InvalidateCache()
	ref, err := reference.ParseNamed(image)
	if err != nil {
		t.Fatal(err)
	}
	registry, err := sysregistriesv2.FindRegistry(sys, image)
	if err != nil {
		t.Fatalf("containers-image refuses the configuration: %v", err)
	}
	if registry == nil {
		return []string{image}
	}
	sources, err := registry.PullSourcesFromReference(ref)
	if err != nil {
		t.Fatalf("%s: %v", image, err)
	}
	var out []string
	for i, s := range sources {
		text := s.Reference.String()
		if s.Endpoint.Insecure {
			text += " insecure"
		}
		if registry.Blocked && i == len(sources)-1 {
			text += " blocked"
		}
		out = append(out, strings.TrimSpace(text))
	}
	return out
}

package e2e

import (
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/larder-cache/larder/test/registrytest"
)

// TestConformance runs the distribution specification's own conformance suite
// for registries that take no pushes against an agent, cold and warm, and with
// the registry down.
func TestConformance(t *testing.T) {
	suite := needBuilt(t, "conformance")
	const repo = "conformance/repo1"
	reg := registrytest.Start(t, registrytest.Options{})
	image := registrytest.OCIImage(registrytest.ImageSpec{Seed: 1, Layers: []int64{1000, 3_000_000}})
	index := registrytest.Platforms(registrytest.ImageSpec{Seed: 2, Layers: []int64{1000}}, false)
	sbom := registrytest.Artifact(image.Descriptor, "application/spdx+json", 3)
	reg.Put(repo, image, "v1")
	reg.Put(repo, index, "v2")
	reg.Put(repo, sbom)

	var manifests, blobs []string
	for _, img := range []*registrytest.Image{image, index, sbom} {
		for _, m := range img.Manifests {
			manifests = append(manifests, m.Digest.String())
		}
		for d := range img.Blobs {
			blobs = append(blobs, d.String())
		}
	}
	a := startAgent(t, agentOptions{
		config: "[[registry]]\nhost = \"registry.test\"\nupstreams = [\"" + reg.URL() + "\"]\n",
		flags:  []string{"--proxy.default_registry", "registry.test"},
	})
	conform := func(filter string) func(*testing.T) {
		return func(t *testing.T) {
			cmd := exec.Command(suite)
			cmd.Dir = tempDir(t)
			cmd.Env = append(offline(), "OCI_VERSION=1.1", "OCI_FILTER_TEST="+filter,
				"OCI_REGISTRY="+a.proxy, "OCI_TLS=disabled", "OCI_REPO1="+repo, "OCI_RESULTS_DIR="+cmd.Dir,
				"OCI_API_PUSH=false", "OCI_API_BLOBS_DELETE=false", "OCI_API_MANIFESTS_DELETE=false", "OCI_API_TAGS_DELETE=false",
				"OCI_RO_DATA_TAGS=v1 v2", "OCI_RO_DATA_MANIFESTS="+strings.Join(manifests, " "),
				"OCI_RO_DATA_BLOBS="+strings.Join(blobs, " "), "OCI_RO_DATA_REFERRERS="+image.Digest.String())
			// The exit code says nothing: the suite ends well whatever it found, and
			// badly where it writes its report of content that it did not make.
			out, _ := cmd.CombinedOutput()
			passed, failed, wrong := outcomes(out, "Pass"), outcomes(out, "FAIL"), outcomes(out, "Error")
			t.Logf("%d passed, %d failed, %d errors", passed, failed, wrong)
			if failed != 0 || wrong != 0 || passed < len(manifests)+len(blobs) {
				t.Errorf("not conformant:\n%s", out)
			}
		}
	}
	t.Run("cold", conform(""))
	t.Run("warm", conform(""))
	reg.Down()
	t.Run("registry down", conform("OCI Conformance Test/read-only")) // what does not exist cannot be known now
}

// outcomes reads a count of the suite's summary, -1 if it is not there.
func outcomes(report []byte, name string) int {
	m := regexp.MustCompile(`(?m)^  ` + name + `\.+: +(\d+)$`).FindSubmatch(report)
	if m == nil {
		return -1
	}
	n, err := strconv.Atoi(string(m[1]))
	if err != nil {
		return -1
	}
	return n
}

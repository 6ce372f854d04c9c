package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
)

// TestDirect proves the harness without Larder: every runtime pulls every shape of
// image from every registry, and the registry's access log shows the blobs. If
// this fails, nothing that the other tests say counts.
func TestDirect(t *testing.T) {
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			c := startContainerd(t, v)
			for i, kind := range registryKinds {
				t.Run(kind.name, func(t *testing.T) {
					r := startRegistry(t, kind)
					host := fmt.Sprintf("direct%d.test", i)
					writeHostsTOML(t, c.certs, host, r)
					for j, shape := range imageKinds {
						img := r.push(shape, "direct/"+string(shape), uint64(10*i+j))
						ref := host + "/" + img.repository + ":" + img.tag
						seen := r.during(func() { c.mustPull(ref) })
						if got := len(byRuntime(blobReads(seen))); got < len(ordinarySizes)+1 {
							t.Errorf("%s: %d blob requests, want one for each layer and the config: %v", shape, got, seen)
						}
						c.remove(ref)
					}
				})
			}
		})
	}
}

// TestDirectOutage proves that the harness sees failures: without Larder, a
// registry that is down fails the pull, and containerd's content survives its own
// restart.
func TestDirectOutage(t *testing.T) {
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			c, r := startContainerd(t, v), startRegistry(t, docker28)
			writeHostsTOML(t, c.certs, "outage.test", r)
			img := r.push(ociImage, "outage", 1)
			ref := "outage.test/outage:" + img.tag
			c.mustPull(ref)
			held := len(c.blobs())
			c.restart()
			if got := len(c.blobs()); got != held {
				t.Errorf("%d blobs after the restart, want %d", got, held)
			}
			c.remove(ref)
			r.stop()
			ctx, cancel := context.WithTimeout(t.Context(), pullTimeout)
			defer cancel()
			if err := c.pull(ctx, ref, nil); err == nil {
				t.Error("a pull succeeded without its registry")
			}
			r.start()
			c.mustPull(ref)
		})
	}
}

// writeHostsTOML is what an administrator has on the node before Larder comes:
// where a registry really is, and the CA that signs it.
func writeHostsTOML(t *testing.T, certs, host string, r *registry) string {
	t.Helper()
	content := fmt.Sprintf("# kept by the administrator\nserver = %q\n", r.url())
	if r.caFile != "" {
		content += fmt.Sprintf("ca = %q\n", r.caFile)
	}
	// containerd 1.6 refuses a file without a [host] table.
	content += fmt.Sprintf("\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", r.url())
	if r.caFile != "" {
		content += fmt.Sprintf("  ca = %q\n", r.caFile)
	}
	return writeFile(t, filepath.Join(certs, host, "hosts.toml"), content)
}

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"
)

// TestDiscardUnpackedLayers is a node that keeps no layers (the default of some
// distributions): containerd's own store is no source there, Larder's cache is.
func TestDiscardUnpackedLayers(t *testing.T) {
	t.Parallel()
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			r := startRegistry(t, docker28)
			img := r.push(ociImage, "discard", 41)
			c := startContainerd(t, v, func(c *containerdConfig) { c.discardUnpacked = true })
			startAgent(t, agentOptions{containerd: c, config: registryTable(r.addr, r), flags: runtimeStore(c)})
			ref := r.addr + "/discard:" + img.tag
			c.mustPull(ref)
			eventually(t, 30*time.Second, "containerd discards the layers", func() error {
				if n := len(c.blobs()); n != 2 { // manifest and config
					return fmt.Errorf("it holds %d blobs", n)
				}
				return nil
			})
			c.remove(ref)
			seen := r.during(func() { c.mustPull(ref) })
			if len(blobReads(seen)) > 0 || len(byRuntime(seen)) > 0 {
				t.Errorf("second pull: want no blob request, the registry saw %v", seen)
			}
		})
	}
}

// runtimeStore lets the agent serve what containerd holds.
func runtimeStore(c *containerd) []string {
	return []string{"--runtime.content_dir", c.contentDir(), "--runtime.containerd_socket", c.socket()}
}

// TestContentStore: what containerd holds already, from before there was an agent,
// is served from there, is not stored a second time, and is still served when
// containerd has been restarted and the registry is gone.
func TestContentStore(t *testing.T) {
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			r := startRegistry(t, docker28)
			img := r.push(ociImage, "held", 51)
			holder := startContainerd(t, v)
			ref := r.addr + "/held:" + img.tag
			holder.mustPull(ref)

			reader := startContainerd(t, v)
			a := startAgent(t, agentOptions{containerd: reader, config: registryTable(r.addr, r), flags: runtimeStore(holder)})
			seen := r.during(func() { reader.mustPull(ref) })
			if len(blobReads(seen)) > 0 || len(byRuntime(seen)) > 0 {
				t.Errorf("want no blob request, the registry saw %v", seen)
			}
			for _, l := range img.layers {
				if a.stores(l.Hex) {
					t.Errorf("%s is stored twice", l)
				}
				if source := a.source(r.addr, img.repository, l.String()); source != "runtime" {
					t.Errorf("%s comes from %q, want runtime", l, source)
				}
			}

			reader.remove(ref)
			holder.restart()
			r.stop()
			reader.mustPull(ref)
			for _, l := range img.layers {
				if a.stores(l.Hex) {
					t.Errorf("%s is stored twice after the restart", l)
				}
			}
		})
	}
}

// source reads a blob from the proxy and says where it came from.
func (a *agent) source(registry, repository, digest string) string {
	a.t.Helper()
	client := &http.Client{Timeout: pullTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(fmt.Sprintf("http://%s/v2/%s/blobs/%s?ns=%s", a.proxy, repository, digest, registry))
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
		a.t.Fatal(errors.Join(err, fmt.Errorf("GET %s: %s", digest, resp.Status)))
	}
	return resp.Header.Get("X-Larder-Source")
}

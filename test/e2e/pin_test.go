package e2e

import (
	"os"
	"path/filepath"
	"testing"
)

// TestPinnedOutlivesItsRegistry pins an image that containerd has pulled and deletes
// later, as it does with what its own images need no more. Then the registry deletes it:
// containerd pulls it by its tag all the same, also from an agent that was killed and
// started anew, and asks nobody else.
func TestPinnedOutlivesItsRegistry(t *testing.T) {
	for i, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			r := startRegistry(t, distV3)
			img := r.push(multiArch, "pinned", 121+10*uint64(i))
			c := startContainerd(t, v)
			a := startAgent(t, agentOptions{containerd: c, config: registryTable(r.addr, r), flags: append(runtimeStore(c), "--upstream.tag_ttl", "0s")})
			ref := r.addr + "/pinned:" + img.tag
			admin := "http://" + a.admin
			c.mustPull(ref)

			pin := func() {
				if out, code := larder(t, "pin", "--admin", admin, ref); code != 0 {
					t.Fatalf("pin: exit %d: %s", code, out)
				}
			}
			if seen := r.during(pin); len(blobReads(seen)) > 0 {
				t.Errorf("what containerd has is read from the registry: %v", seen)
			}
			c.remove(ref)
			if err := os.RemoveAll(filepath.Join(filepath.Dir(r.config), "storage", "docker", "registry", "v2", "repositories", "pinned")); err != nil {
				t.Fatal(err)
			}
			for _, when := range []string{"deleted", "deleted, and the agent was killed"} {
				seen := r.during(func() { c.mustPull(ref) })
				wantThroughAgent(t, when, seen)
				c.remove(ref)
				a.kill()
				a.start()
			}
			out, code := larder(t, "pin", "--admin", admin, "--json")
			list := decode[struct {
				Pins []struct {
					Bytes, Present int64
				}
			}](t, out)
			if code != 0 || len(list.Pins) != 1 || list.Pins[0].Bytes == 0 || list.Pins[0].Present != list.Pins[0].Bytes {
				t.Errorf("exit %d: %s", code, out)
			}
			if out, code := larder(t, "unpin", "--admin", admin, ref); code != 0 {
				t.Errorf("unpin: exit %d: %s", code, out)
			}
		})
	}
}

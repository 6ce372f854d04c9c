package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestCRIODropIn pulls with podman and skopeo, which read the drop-in with the code
// that CRI-O has: by tag and by digest, with the registry down, and with the agent
// stopped and killed.
func TestCRIODropIn(t *testing.T) {
	t.Parallel()
	needRoot(t)
	clients := []imageClient{newPodman(t), newSkopeo(t)}
	for _, shape := range imageKinds {
		t.Run(string(shape), func(t *testing.T) {
			home, r := tempDir(t), startRegistry(t, docker28)
			dropIns := writeContainersConfig(t, home, r)
			img := r.push(shape, "library/"+string(shape), 900)
			refs := []string{
				r.addr + "/" + img.repository + ":" + img.tag,
				r.addr + "/" + img.repository + "@" + img.digest.String(),
			}
			before := snapshot(t, home)
			a := startAgent(t, agentOptions{crio: dropIns, config: registryTable(r.addr, r),
				flags: []string{"--hosts.registries", r.addr}})
			pullAll := func(phase string) accessList {
				t.Helper()
				return r.during(func() {
					for _, ref := range refs {
						for _, client := range clients {
							start := time.Now()
							if out, err := client.pull(t, home, ref); err != nil {
								t.Errorf("%s: %s: %v\n%s", phase, client.name, err, out)
							}
							t.Logf("%-14s %-6s %s in %v", phase, client.name, ref, time.Since(start).Round(time.Millisecond))
						}
					}
				})
			}
			viaAgent := func(phase string, wantBlobs bool) {
				t.Helper()
				seen := pullAll(phase)
				wantThroughAgent(t, phase, seen)
				if blobs := blobReads(seen); (len(blobs) > 0) != wantBlobs {
					t.Errorf("%s: blob requests at the registry: %v", phase, blobs)
				}
			}
			direct := func(phase string) {
				t.Helper()
				want := len(refs) * len(clients) * (len(ordinarySizes) + 1)
				if seen := pullAll(phase); len(byRuntime(blobReads(seen))) < want {
					t.Errorf("%s: want %d blobs straight from the registry: %v", phase, want, seen)
				}
			}
			viaAgent("cold", true)
			viaAgent("warm", false)
			r.stop()
			viaAgent("registry down", false)
			r.start()
			a.kill()
			if snapshot(t, home) == before {
				t.Error("kill -9 removed the drop-in; the next pulls prove nothing")
			}
			direct("agent killed")
			a.start()
			a.stop()
			if after := snapshot(t, home); after != before {
				t.Errorf("configuration after SIGTERM:\n%s\nwant:\n%s", after, before)
			}
			direct("agent stopped")
		})
	}
}

// writeContainersConfig is what an administrator has for podman, skopeo and CRI-O.
// A file in the home directory hides /etc/containers. It returns the directory for
// drop-ins.
func writeContainersConfig(t *testing.T, home string, r *registry) (dropIns string) {
	t.Helper()
	dir := filepath.Join(home, ".config", "containers")
	writeFile(t, filepath.Join(dir, "registries.conf"),
		fmt.Sprintf("[[registry]]\nprefix = %[1]q\nlocation = %[1]q\ninsecure = true\n", r.addr))
	writeFile(t, filepath.Join(dir, "policy.json"), `{"default": [{"type": "insecureAcceptAnything"}]}`)
	dropIns = filepath.Join(dir, "registries.conf.d")
	if err := os.MkdirAll(dropIns, 0o755); err != nil {
		t.Fatal(err)
	}
	return dropIns
}

// imageClient is a program that pulls with the code CRI-O has.
type imageClient struct {
	name string
	// pull fetches all of ref, whatever was pulled before, with the configuration
	// below home.
	pull func(t *testing.T, home, ref string) (output []byte, err error)
}

func newSkopeo(t *testing.T) imageClient {
	t.Helper()
	bin := needTool(t, "skopeo")
	return imageClient{"skopeo", func(t *testing.T, home, ref string) ([]byte, error) {
		return runClient(t, home, bin, "copy", "docker://"+ref, "dir:"+tempDir(t))
	}}
}

func newPodman(t *testing.T) imageClient {
	t.Helper()
	bin := needTool(t, "podman")
	return imageClient{"podman", func(t *testing.T, home, ref string) ([]byte, error) {
		dir := tempDir(t) // a store of its own for each pull
		return runClient(t, home, bin, "--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"),
			"--tmpdir", filepath.Join(dir, "tmp"), "--storage-driver", "vfs", "--events-backend", "none",
			"--cgroup-manager", "cgroupfs", "pull", ref)
	}}
}

// runClient runs a command to its end in a mount namespace of its own, because
// podman leaves mounts behind.
func runClient(t *testing.T, home, bin string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(t.Context(), pullTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Env = append(offline(), "HOME="+home, "XDG_CONFIG_HOME="+filepath.Join(home, ".config"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	return cmd.CombinedOutput()
}

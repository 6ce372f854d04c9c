package e2e

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestFullDisk gives the cache a file system that is smaller than one layer: pulls
// go through the agent all the same, and nothing is asked for twice.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	needRoot(t)
	r := startRegistry(t, distV3)
	img := r.push(ociImage, "large", 61, 40<<20, 1<<20)
	c := startContainerd(t, containerd2)
	dir := tempDir(t)
	if err := syscall.Mount("larder-e2e", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	startAgent(t, agentOptions{containerd: c, config: registryTable(r.addr, r), cacheDir: dir,
		flags: []string{"--cache.min_free", "1MiB", "--cache.max_bytes", "100%"}})
	ref := r.addr + "/large:" + img.tag
	for range 2 {
		seen := r.during(func() { c.mustPull(ref) })
		wantThroughAgent(t, "pull", seen)
		c.remove(ref)
	}
}

// TestPortTaken: an agent that cannot listen says why, and leaves the node as it
// is - its pulls would otherwise go to whoever holds the port.
func TestPortTaken(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := tempDir(t)
	certs := filepath.Join(dir, "certs.d")
	if err := os.Mkdir(certs, 0o755); err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, "larder", exec.Command(run.larder, "agent", "--proxy.listen", l.Addr().String(),
		"--admin.listen", "127.0.0.1:0", "--cache.dir", filepath.Join(dir, "cache"), "--peer.enabled=false",
		"--hosts.containerd", certs))
	eventually(t, 20*time.Second, "agent gives up", func() error {
		if p.alive() {
			return errors.New("it is running")
		}
		return nil
	})
	if p.err == nil || !strings.Contains(string(p.output()), l.Addr().String()) {
		t.Errorf("exit: %v; want a failure that names %s:\n%s", p.err, l.Addr(), p.output())
	}
	if files, err := os.ReadDir(certs); err != nil || len(files) > 0 {
		t.Errorf("certs.d holds %v, %v; want nothing", files, err)
	}
}

// TestTagMoves: a tag that was pushed anew is pulled anew.
func TestTagMoves(t *testing.T) {
	t.Parallel()
	r := startRegistry(t, distV3)
	c := startContainerd(t, containerd2)
	startAgent(t, agentOptions{containerd: c, config: registryTable(r.addr, r), flags: []string{"--upstream.tag_ttl", "0s"}})
	for seed := range uint64(2) {
		img := r.push(ociImage, "moving", 70+10*seed)
		seen := r.during(func() { c.mustPull(r.addr + "/moving:" + img.tag) })
		wantThroughAgent(t, "pull", seen)
		if !c.holds(img.digest.Hex) {
			t.Errorf("push %d: containerd did not get %s", seed+1, img.digest)
		}
	}
}

func (c *containerd) holds(hex string) bool {
	_, err := os.Stat(filepath.Join(c.contentDir(), "blobs", "sha256", hex))
	return err == nil
}

// TestWedged is an agent that takes requests and answers none. It must notice and
// get out of the way by itself: containerd 1.6 would wait forever.
func TestWedged(t *testing.T) {
	t.Parallel()
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			r := startRegistry(t, distV3)
			img := r.push(ociImage, "wedged", 81)
			c := startContainerd(t, v)
			before := snapshot(t, c.certs)
			a := startAgent(t, agentOptions{containerd: c, config: registryTable(r.addr, r), bin: run.wedged, mayFail: true})
			ref := r.addr + "/wedged:" + img.tag
			if seen := r.during(func() { c.mustPull(ref) }); len(byRuntime(seen)) > 0 {
				t.Fatalf("before it is wedged, the agent is not asked: %v", seen)
			}
			c.remove(ref)
			wedge(t, a)
			start := time.Now()
			seen := r.during(func() { c.mustPull(ref) })
			took := time.Since(start)
			t.Logf("pulled in %v through a wedged agent", took.Round(time.Millisecond))
			if took > 15*time.Second {
				t.Errorf("the pull took %v; want seconds", took)
			}
			if len(byRuntime(blobReads(seen))) < len(ordinarySizes)+1 {
				t.Errorf("want a direct pull, the registry saw %v", seen)
			}
			eventually(t, 60*time.Second, "the agent ends, to be started anew", func() error {
				if a.proc.alive() {
					return errors.New("it is running")
				}
				return nil
			})
			if after := snapshot(t, c.certs); after != before {
				t.Errorf("certs.d:\n%s\nwant:\n%s", after, before)
			}
		})
	}
}

// wedge makes an agent that runs test/wedged stop answering.
func wedge(t *testing.T, a *agent) {
	t.Helper()
	if err := a.proc.signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the agent is wedged", func() error {
		if !strings.Contains(string(a.proc.output()), "\nwedged\n") {
			return errors.New("it has not said so")
		}
		return nil
	})
}

// TestHungDisk is a disk that stops answering under the cache: pulls of what the
// cache does not have succeed within seconds, past the agent if need be.
func TestHungDisk(t *testing.T) {
	t.Parallel()
	needRoot(t)
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			r := startRegistry(t, distV3)
			img := r.push(ociImage, "hung", 91)
			c := startContainerd(t, v)
			disk := mountDisk(t)
			a := startAgent(t, agentOptions{containerd: c, config: registryTable(r.addr, r), cacheDir: disk,
				flags: []string{"--cache.min_free", "1MiB"}})
			// The agent can end only when the disk answers again.
			t.Cleanup(func() { thaw(t, disk, a.proc) })
			command(t, "fsfreeze", "--freeze", disk)
			start := time.Now()
			c.mustPull(r.addr + "/hung:" + img.tag)
			took := time.Since(start)
			t.Logf("pulled in %v with a hung disk", took)
			// Each request may use up the first-byte budget of 5 s.
			if took > 40*time.Second {
				t.Errorf("the pull took %v; want seconds", took)
			}
		})
	}
}

// mountDisk is a small file system of its own.
func mountDisk(t *testing.T) (dir string) {
	t.Helper()
	base := tempDir(t)
	image, dir := filepath.Join(base, "disk"), filepath.Join(base, "mnt")
	command(t, "truncate", "--size", "200M", image)
	command(t, "mkfs.ext4", "-q", image)
	command(t, "mkdir", dir)
	command(t, "mount", "-o", "loop", image, dir)
	t.Cleanup(func() { command(t, "umount", dir) })
	return dir
}

// thaw lets the disk answer again and waits for the agent to end, so that the disk
// can be unmounted.
func thaw(t *testing.T, disk string, p *process) {
	command(t, "fsfreeze", "--unfreeze", disk)
	if err := p.stop(30 * time.Second); err != nil {
		t.Errorf("agent after the disk came back: %v", err)
	}
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

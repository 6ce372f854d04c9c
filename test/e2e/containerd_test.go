package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// containerdVersion is one of the containerd releases that nodes run.
type containerdVersion struct {
	name   string // the distribution's containerd is 1.6 on Debian 12, later elsewhere
	bin    func(*testing.T) string
	config func(containerdConfig) string
}

var (
	containerd16 = containerdVersion{
		name:   "containerd-apt",
		bin:    func(t *testing.T) string { return needTool(t, "containerd") },
		config: configVersion2,
	}
	containerd2 = containerdVersion{
		name:   "containerd-2",
		bin:    func(t *testing.T) string { return needBuilt(t, "containerd") },
		config: configVersion3,
	}
	containerdVersions = []containerdVersion{containerd16, containerd2}
)

// containerdConfig is what tests vary; the zero value of the rest is containerd's
// default.
type containerdConfig struct {
	dir             string // root, state and socket lie below it
	configPath      string // registry.config_path; "" leaves it unset
	discardUnpacked bool
}

// configVersion2 is for containerd 1.x. Neither version needs a network for
// pulling, so CNI points nowhere; NRI has one socket for the whole machine.
func configVersion2(c containerdConfig) string {
	const criPlugin = `plugins."io.containerd.grpc.v1.cri"`
	return fmt.Sprintf(`version = 2
root = %q
state = %q
[grpc]
  address = %q
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.internal.v1.opt"]
  path = %q
[%[5]s]
  restrict_oom_score_adj = true
[%[5]s.cni]
  conf_dir = %[6]q
[%[5]s.containerd]
  snapshotter = "overlayfs"
  discard_unpacked_layers = %[7]t
%[8]s`,
		filepath.Join(c.dir, "root"), filepath.Join(c.dir, "state"), filepath.Join(c.dir, "sock"),
		filepath.Join(c.dir, "opt"), criPlugin, filepath.Join(c.dir, "cni"), c.discardUnpacked,
		registrySection(criPlugin, c.configPath))
}

// configVersion3 is for containerd 2.x.
func configVersion3(c containerdConfig) string {
	const images, runtime = `plugins."io.containerd.cri.v1.images"`, `plugins."io.containerd.cri.v1.runtime"`
	return fmt.Sprintf(`version = 3
root = %q
state = %q
[grpc]
  address = %q
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.internal.v1.opt"]
  path = %q
[%[5]s]
  restrict_oom_score_adj = true
[%[5]s.cni]
  conf_dir = %[6]q
[%[7]s]
  snapshotter = "overlayfs"
  discard_unpacked_layers = %[8]t
%[9]s`,
		filepath.Join(c.dir, "root"), filepath.Join(c.dir, "state"), filepath.Join(c.dir, "sock"),
		filepath.Join(c.dir, "opt"), runtime, filepath.Join(c.dir, "cni"), images, c.discardUnpacked,
		registrySection(images, c.configPath))
}

func registrySection(plugin, configPath string) string {
	if configPath == "" {
		return ""
	}
	return fmt.Sprintf("[%s.registry]\n  config_path = %q\n", plugin, configPath)
}

// containerd is a running containerd, driven over CRI as kubelet does.
type containerd struct {
	t          *testing.T
	version    containerdVersion
	dir        string
	certs      string // the certs.d directory that config_path names
	configFile string
	proc       *process
	images     cri.ImageServiceClient
	runtime    cri.RuntimeServiceClient
}

// startContainerd runs containerd; vary may change its configuration first.
func startContainerd(t *testing.T, v containerdVersion, vary ...func(*containerdConfig)) *containerd {
	t.Helper()
	needRoot(t)
	bin := v.bin(t)
	needTool(t, "runc") // containerd 1.6 does not load CRI without it
	dir := tempDir(t)
	c := &containerd{t: t, version: v, dir: dir, certs: filepath.Join(dir, "certs.d")}
	if err := os.Mkdir(c.certs, 0o755); err != nil {
		t.Fatal(err)
	}
	config := containerdConfig{dir: dir, configPath: c.certs}
	for _, f := range vary {
		f(&config)
	}
	if roots := filepath.SplitList(config.configPath); len(roots) > 0 {
		c.certs = roots[0]
	}
	c.configFile = writeFile(t, filepath.Join(dir, "config.toml"), v.config(config))
	conn, err := grpc.NewClient("unix://"+c.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c.images, c.runtime = cri.NewImageServiceClient(conn), cri.NewRuntimeServiceClient(conn)
	c.start(bin)
	return c
}

func (c *containerd) start(bin string) {
	c.t.Helper()
	cmd := exec.Command(bin, "--config", c.configFile)
	tmp := filepath.Join(c.dir, "tmp") // containerd mounts layers here to unpack them
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		c.t.Fatal(err)
	}
	cmd.Env = append(offline(), "TMPDIR="+tmp)
	c.proc = startProcess(c.t, c.version.name, cmd)
	eventually(c.t, 60*time.Second, "containerd answers CRI", func() error {
		ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Second)
		defer cancel()
		_, err := c.images.ListImages(ctx, &cri.ListImagesRequest{})
		return errors.Join(c.proc.dead(), err)
	})
}

// restart stops containerd as its service does and starts it again.
func (c *containerd) restart() {
	c.t.Helper()
	if err := c.proc.stop(30 * time.Second); err != nil {
		c.t.Fatal(err)
	}
	c.start(c.version.bin(c.t))
}

func (c *containerd) socket() string { return filepath.Join(c.dir, "sock") }

func (c *containerd) contentDir() string {
	return filepath.Join(c.dir, "root", "io.containerd.content.v1.content")
}

// pull is kubelet's PullImage: credentials, if any, carry no server address.
func (c *containerd) pull(ctx context.Context, ref string, auth *cri.AuthConfig) error {
	_, err := c.images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: auth})
	return err
}

// pullTimeout is far beyond what a pull takes here and far below the minutes
// that a runtime waits for a mirror that hangs.
const pullTimeout = 60 * time.Second

func (c *containerd) mustPull(ref string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), pullTimeout)
	defer cancel()
	if err := c.pull(ctx, ref, nil); err != nil {
		c.t.Fatalf("%s: pull %s: %v", c.version.name, ref, err)
	}
}

// remove deletes the image and waits until containerd has collected its content,
// so that the next pull needs every byte again.
func (c *containerd) remove(ref string) {
	c.t.Helper()
	if _, err := c.images.RemoveImage(c.t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		c.t.Fatalf("remove %s: %v", ref, err)
	}
	eventually(c.t, 30*time.Second, "content is collected", func() error {
		if left := c.blobs(); len(left) > 0 {
			return fmt.Errorf("%d blobs left: %s", len(left), strings.Join(left, " "))
		}
		return nil
	})
}

// blobs names what containerd's content store holds.
func (c *containerd) blobs() []string {
	entries, err := os.ReadDir(filepath.Join(c.contentDir(), "blobs", "sha256"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		c.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// ingested is how many bytes the pulls in progress have written so far.
func (c *containerd) ingested() int64 {
	files, err := filepath.Glob(filepath.Join(c.contentDir(), "ingest", "*", "data"))
	if err != nil {
		c.t.Fatal(err)
	}
	var n int64
	for _, f := range files {
		if info, err := os.Stat(f); err == nil { // commits rename files away meanwhile
			n += info.Size()
		}
	}
	return n
}

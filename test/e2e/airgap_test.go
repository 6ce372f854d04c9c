package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// airGap is a connected side with a registry, and archives of one image of it.
type airGap struct {
	t    *testing.T
	home string
	reg  *registry
	ref  string
	at   string // the connected agent's admin API
	dir  string // of archives
}

// TestAirGap carries images in archives that Larder, containerd, skopeo and podman wrote to
// a node that reaches no registry, and pulls them there with real containerd; and has
// those programs read what Larder wrote.
func TestAirGap(t *testing.T) {
	t.Parallel()
	needRoot(t)
	for _, kind := range []imageKind{ociImage, schema2, multiArch} {
		t.Run(string(kind), func(t *testing.T) {
			g := newAirGap(t, kind)
			archives := g.write()
			g.readByOthers(kind, g.file("larder"))
			g.reg.stop()
			for _, v := range containerdVersions {
				for _, file := range archives {
					t.Run(v.name+" "+file, func(t *testing.T) { g.on(t).carry(v, file) })
				}
			}
		})
	}
}

func newAirGap(t *testing.T, kind imageKind) *airGap {
	g := &airGap{t: t, home: tempDir(t), reg: startRegistry(t, docker28), dir: tempDir(t)}
	writeContainersConfig(t, g.home, g.reg)
	img := g.reg.push(kind, "library/"+string(kind), 1700)
	g.ref = g.reg.addr + "/" + img.repository + ":" + img.tag
	return g
}

// on is the same for a test below.
func (g airGap) on(t *testing.T) *airGap {
	g.t = t
	return &g
}

// write makes one archive with each program.
func (g *airGap) write() []string {
	g.t.Helper()
	c := startContainerd(g.t, containerd16)
	a := startAgent(g.t, agentOptions{containerd: c, config: registryTable(g.reg.addr, g.reg)})
	g.at = a.admin
	g.larder("export", g.ref, "-o", g.file("larder"), "--admin", "http://"+a.admin)
	c.mustPull(g.ref)
	g.client("ctr", "--address", c.socket(), "--namespace", "k8s.io", "images", "export", g.file("ctr"), g.ref)
	g.client("skopeo", "copy", "docker://"+g.ref, "oci-archive:"+g.file("skopeo-oci")+":"+g.ref)
	g.client("skopeo", "copy", "docker://"+g.ref, "docker-archive:"+g.file("skopeo-docker")+":"+g.ref)
	g.podman("pull", g.ref)
	g.podman("save", "--format", "oci-archive", "-o", g.file("podman-oci"), g.ref)
	g.podman("save", "--format", "docker-archive", "-o", g.file("podman-docker"), g.ref)
	return []string{"larder", "ctr", "skopeo-oci", "skopeo-docker", "podman-oci", "podman-docker"}
}

func (g *airGap) file(name string) string { return filepath.Join(g.dir, name+".tar") }

func (g *airGap) larder(args ...string) string {
	g.t.Helper()
	out, code := larder(g.t, args...)
	if code != 0 {
		g.t.Fatalf("larder %s: exit %d", strings.Join(args, " "), code)
	}
	return out
}

func (g *airGap) client(bin string, args ...string) string {
	g.t.Helper()
	out, err := runClient(g.t, g.home, needTool(g.t, bin), args...)
	if err != nil {
		g.t.Fatalf("%s %s: %v\n%s", bin, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// podman runs with one store for all calls.
func (g *airGap) podman(args ...string) string {
	g.t.Helper()
	return g.client("podman", append([]string{"--root", filepath.Join(g.home, "root"), "--runroot", filepath.Join(g.home, "run"),
		"--tmpdir", filepath.Join(g.home, "tmp"), "--storage-driver", "vfs", "--events-backend", "none", "--cgroup-manager", "cgroupfs"}, args...)...)
}

// readByOthers has containerd, skopeo and podman read an archive of Larder's, under the
// image's name.
func (g *airGap) readByOthers(kind imageKind, file string) {
	g.t.Helper()
	for _, v := range containerdVersions {
		c := startContainerd(g.t, v)
		ctr := []string{"--address", c.socket(), "--namespace", "k8s.io", "images"}
		g.client("ctr", append(ctr, "import", file)...)
		if out := g.client("ctr", append(ctr, "list", "-q")...); !strings.Contains(out, g.ref) {
			g.t.Errorf("ctr of %s imported %q, want %s", v.name, out, g.ref)
		}
	}
	format := "oci-archive:"
	if kind == schema2 { // which skopeo does not look for in an OCI layout
		format = "docker-archive:"
	}
	if out := g.client("skopeo", "inspect", format+file+":"+g.ref); !strings.Contains(out, "Layers") {
		g.t.Errorf("skopeo: %s", out)
	}
	g.podman("rmi", g.ref)
	if out := g.podman("load", "-i", file); !strings.Contains(out, g.ref) {
		g.t.Errorf("podman loaded %q, want %s", out, g.ref)
	}
}

// carry imports an archive on a node without a registry, and pulls the image.
func (g *airGap) carry(v containerdVersion, file string) {
	g.t.Helper()
	c := startContainerd(g.t, v)
	a := startAgent(g.t, agentOptions{containerd: c, config: fmt.Sprintf("[[registry]]\nhost = %q\ncontact_upstream = false\n", g.reg.addr)})
	if out := g.larder("import", g.file(file), "--admin", "http://"+a.admin); !strings.Contains(out, g.ref+": imported: sha256:") {
		g.t.Fatalf("%s: %s", file, out)
	}
	c.mustPull(g.ref)
	if n := a.metric("larder_served_bytes_total", `source="disk"`); n < 3<<20 {
		g.t.Errorf("%s: %.0f bytes from disk", file, n)
	}
}

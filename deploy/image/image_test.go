package main

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// goBuild builds a package for a platform; without a source it is this one,
// which has modules in it.
func goBuild(t *testing.T, arch, source string, env ...string) string {
	t.Helper()
	dir := t.TempDir()
	out := filepath.Join(dir, "larder-"+arch)
	target := "."
	if source != "" {
		target = filepath.Join(dir, "main.go")
		if err := os.WriteFile(target, []byte(source), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, target)
	cmd.Env = append(os.Environ(), append([]string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + arch}, env...)...)
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, msg)
	}
	return out
}

const tiny = "package main\n\nfunc main() {}\n"

// otherArch is the one of the two platforms that this machine is not.
func otherArch() string {
	if runtime.GOARCH == "arm64" {
		return "amd64"
	}
	return "arm64"
}

func TestImage(t *testing.T) {
	dir := t.TempDir()
	o := options{name: "reg.example.com/larder:v1", version: "v1", out: filepath.Join(dir, "a.tar"), most: 40e6,
		binaries: []string{goBuild(t, runtime.GOARCH, ""), goBuild(t, otherArch(), tiny)}}
	if err := o.run(); err != nil {
		t.Fatal(err)
	}
	index := unpack(t, o.out)
	if err := validate.Index(index); err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil || len(m.Manifests) != 2 {
		t.Fatalf("%d platforms, %v", len(m.Manifests), err)
	}
	for i, arch := range []string{runtime.GOARCH, otherArch()} {
		if p := m.Manifests[i].Platform; p.Architecture != arch || p.OS != "linux" {
			t.Errorf("platform %+v", p)
		}
		img, err := index.Image(m.Manifests[i].Digest)
		if err != nil {
			t.Fatal(err)
		}
		checkImage(t, img, arch, o.binaries[i], filepath.Join(dir, "a-linux-"+arch+".cdx.json"))
	}

	again := o
	again.out = filepath.Join(dir, "b.tar")
	if err := again.run(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(t, o.out), read(t, again.out)) {
		t.Error("a second build has other bytes")
	}
	// What a Docker that knows no layouts reads.
	if img, err := tarball.ImageFromPath(o.out, nil); err != nil {
		t.Error(err)
	} else if err := validate.Image(img); err != nil {
		t.Error(err)
	}
}

func checkImage(t *testing.T, img v1.Image, arch, program, sbomFile string) {
	t.Helper()
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if c.Architecture != arch || c.Config.User != "65532:65532" || c.Config.Entrypoint[0] != "/usr/bin/larder" || c.Config.Labels["org.opencontainers.image.version"] != "v1" {
		t.Errorf("config %+v", c)
	}
	flat := mutate.Extract(img)
	defer flat.Close()
	files := map[string][]byte{}
	for r := tar.NewReader(flat); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.ModTime.Unix() != 0 || h.Mode&0o022 != 0 {
			t.Errorf("%s: %+v", h.Name, h)
		}
		if h.Typeflag == tar.TypeReg {
			files[h.Name] = body
		}
	}
	if len(files) != 3 || !bytes.Equal(files["usr/bin/larder"], read(t, program)) {
		t.Errorf("%d files", len(files))
	}
	if pool := x509.NewCertPool(); !pool.AppendCertsFromPEM(files["etc/ssl/certs/ca-certificates.crt"]) {
		t.Error("no certificate authorities")
	}
	sbom := files["usr/share/sbom/larder.cdx.json"]
	if !bytes.Equal(sbom, read(t, sbomFile)) {
		t.Error("the SBOM in the image is another than the one beside it")
	}
	var b bom
	if err := json.Unmarshal(sbom, &b); err != nil {
		t.Fatal(err)
	}
	if b.Components[0].Name != "std" || "go"+b.Components[0].Version != runtime.Version() {
		t.Errorf("first component %+v", b.Components[0])
	}
	if arch != runtime.GOARCH {
		return // the tiny program has no modules
	}
	for _, c := range b.Components {
		if c.Name == "github.com/google/go-containerregistry" && strings.HasPrefix(c.Version, "v") && len(c.Hashes) == 1 && c.PURL == "pkg:golang/"+c.Name+"@"+c.Version {
			return
		}
	}
	t.Errorf("a module is missing: %+v", b.Components)
}

// unpack reads the archive as an OCI image layout; it returns the one index in it.
func unpack(t *testing.T, archive string) v1.ImageIndex {
	t.Helper()
	dir := t.TempDir()
	r := tar.NewReader(bytes.NewReader(read(t, archive)))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(path, 0o755)
		} else {
			var body []byte
			if body, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(path, body, 0o600)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := top.IndexManifest()
	if err != nil || len(m.Manifests) != 1 {
		t.Fatalf("%d entries, %v", len(m.Manifests), err)
	}
	if a := m.Manifests[0].Annotations; a["io.containerd.image.name"] != "reg.example.com/larder:v1" || a["org.opencontainers.image.ref.name"] != "v1" {
		t.Errorf("named %v", a)
	}
	index, err := top.ImageIndex(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return index
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	body, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// TestDockerfile holds that whoever builds with docker gets the same image as far
// as the chart is concerned.
func TestDockerfile(t *testing.T) {
	text := string(read(t, "../../Dockerfile"))
	img, err := options{name: "larder:v1", most: 40e6, out: filepath.Join(t.TempDir(), "x.tar")}.image(mustBinary(t, goBuild(t, runtime.GOARCH, tiny)))
	if err != nil {
		t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	_, final, _ := strings.Cut(text, "FROM scratch\n")
	for _, line := range []string{
		"USER " + c.Config.User, `ENTRYPOINT ["` + c.Config.Entrypoint[0] + `"]`, `CMD ["` + c.Config.Cmd[0] + `"]`,
		" " + c.Config.Entrypoint[0] + "\n", " /etc/ssl/certs/ca-certificates.crt\n",
	} {
		if !strings.Contains(final, line) {
			t.Errorf("the Dockerfile lacks %q", line)
		}
	}
}

func mustBinary(t *testing.T, path string) binary {
	t.Helper()
	b, err := readBinary(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRefused(t *testing.T) {
	good := goBuild(t, runtime.GOARCH, tiny)
	// A position-independent program names an interpreter without a C compiler.
	dynamic := goBuild(t, runtime.GOARCH, tiny, "GOFLAGS=-buildmode=pie")
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("no program"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		o    options
		want string
	}{
		{"no tag", options{name: "reg.example.com:5000/larder", most: 40e6, binaries: []string{good}}, "NAME:TAG"},
		{"no binary", options{name: "larder:v1", most: 40e6}, "binary"},
		{"no program", options{name: "larder:v1", most: 40e6, binaries: []string{text}}, "text"},
		{"a dynamic one", options{name: "larder:v1", most: 40e6, binaries: []string{dynamic}}, "CGO_ENABLED=0"},
		{"too large", options{name: "larder:v1", most: 1000, binaries: []string{good}}, "more than 1000"},
	} {
		tt.o.out = filepath.Join(t.TempDir(), "x.tar")
		if err := tt.o.run(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want it to say %q", tt.name, err, tt.want)
		}
		if _, err := os.Stat(tt.o.out); err == nil {
			t.Errorf("%s: an archive was written", tt.name)
		}
	}
}

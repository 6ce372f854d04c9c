package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"encoding/pem"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// file is one file of a layer or of an archive.
type file struct {
	name string // relative to the root
	mode int64
	data []byte
}

// epoch is the time of everything, so that a build repeats byte for byte.
var epoch = time.Unix(0, 0).UTC()

// authorities is Mozilla's list of certificate authorities as PEM.
func authorities() []byte {
	var out bytes.Buffer
	for root := range bundle.Roots() {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}) // into memory
	}
	return out.Bytes()
}

func layerOf(files []file) (v1.Layer, error) {
	var out bytes.Buffer
	if err := writeTar(&out, files); err != nil {
		return nil, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(out.Bytes())), nil }
	return tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer))
}

// writeTar writes files, each after the directories it is in.
func writeTar(w io.Writer, files []file) error {
	t := tar.NewWriter(w)
	var made []string
	for _, f := range files {
		for _, dir := range parents(f.name) {
			if slices.Contains(made, dir) {
				continue
			}
			made = append(made, dir)
			if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: epoch}); err != nil {
				return err
			}
		}
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: f.mode, Size: int64(len(f.data)), ModTime: epoch}); err != nil {
			return err
		}
		if _, err := t.Write(f.data); err != nil {
			return err
		}
	}
	return t.Close()
}

// parents are the directories above name, outermost first.
func parents(name string) []string {
	var out []string
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		out = append(out, dir)
	}
	slices.Reverse(out)
	return out
}

// writeArchive writes index as an OCI image layout in a tar. oldest is the image
// that a Docker before 25, which reads no layouts, is given.
func writeArchive(out, name string, index v1.ImageIndex, oldest v1.Image) error {
	dir, err := os.MkdirTemp("", "larder-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) // a temporary directory
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	// containerd, Docker and podman take the name from the first annotation; the
	// second is the specification's, and has the tag alone.
	names := map[string]string{
		"io.containerd.image.name":          name,
		"org.opencontainers.image.ref.name": name[strings.LastIndex(name, ":")+1:],
	}
	if err := p.AppendIndex(index, layout.WithAnnotations(names)); err != nil {
		return err
	}
	files, err := readTree(dir)
	if err != nil {
		return err
	}
	docker, err := dockerManifest(name, oldest)
	if err != nil {
		return err
	}
	return writeFile(out, append(files, docker))
}

// dockerManifest is the table of contents of `docker save`.
func dockerManifest(name string, img v1.Image) (file, error) {
	m, err := img.Manifest()
	if err != nil {
		return file{}, err
	}
	at := func(h v1.Hash) string { return path.Join("blobs", h.Algorithm, h.Hex) }
	entry := struct {
		Config   string
		RepoTags []string
		Layers   []string
	}{Config: at(m.Config.Digest), RepoTags: []string{name}}
	for _, l := range m.Layers {
		entry.Layers = append(entry.Layers, at(l.Digest))
	}
	body, err := json.Marshal([]any{entry})
	return file{"manifest.json", 0o644, body}, err
}

// readTree reads every file below dir, in the order of their names.
func readTree(dir string) ([]file, error) {
	var files []file
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, name))
		files = append(files, file{name, 0o644, data})
		return err
	})
	return files, err
}

func writeFile(name string, files []file) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	if err := writeTar(f, files); err != nil {
		_ = f.Close() // the first error counts
		return err
	}
	return f.Close()
}

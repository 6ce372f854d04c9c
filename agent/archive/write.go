package archive

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Root is an image as a Writer lists it.
type Root struct {
	Name string // in full; its reference is a tag or digest
	ocispec.Descriptor
	// Config and Layers are those of the one image that docker's manifest.json can
	// have, for programs that read nothing else; without a Config it has none.
	Config digest.Digest
	Layers []digest.Digest
}

// Writer writes an OCI image layout as a tar. The same calls make the same bytes. It is for
// one goroutine.
type Writer struct {
	tar *tar.Writer
	has map[digest.Digest]bool
}

// NewWriter begins with what names the images, so that who reads the stream knows what
// comes: index.json, with names in the annotations that containerd and Docker, and skopeo
// and podman read, and manifest.json, for `docker load` before version 25, and because
// skopeo and podman take no images of Docker's own types from an OCI layout.
func NewWriter(w io.Writer, roots []Root) (*Writer, error) {
	out := &Writer{tar: tar.NewWriter(w), has: map[digest.Digest]bool{}}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	docker := []dockerImage{}
	for _, r := range roots {
		index.Manifests = append(index.Manifests, named(r.Descriptor, r.Name))
		if r.Config != "" {
			docker = append(docker, r.docker())
		}
	}
	for _, file := range []struct {
		name  string
		value any
	}{{ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}}, {ocispec.ImageIndexFile, index}, {dockerManifest, docker}} {
		if err := out.json(file.name, file.value); err != nil {
			return nil, fmt.Errorf("write %s: %w", file.name, err)
		}
	}
	return out, nil
}

func named(d ocispec.Descriptor, name string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size,
		Annotations: map[string]string{annotationName: name, annotationRef: name}}
}

func (r Root) docker() dockerImage {
	i := dockerImage{Config: blobName(r.Config), Layers: []string{}}
	if !strings.Contains(r.Name, "@") { // docker would take a digest for a tag
		i.RepoTags = []string{r.Name}
	}
	for _, l := range r.Layers {
		i.Layers = append(i.Layers, blobName(l))
	}
	return i
}

func (w *Writer) json(name string, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := w.entry(name, int64(len(body))); err != nil {
		return err
	}
	_, err = w.tar.Write(body)
	return err
}

// Has reports whether d was written.
func (w *Writer) Has(d digest.Digest) bool { return w.has[d] }

// Blob writes size bytes of r, a blob or manifest. It fails if they do not match d; the
// tar is of no use then.
func (w *Writer) Blob(d digest.Digest, size int64, r io.Reader) error {
	if err := w.entry(blobName(d), size); err != nil {
		return fmt.Errorf("write %s: %w", d, err)
	}
	v := d.Verifier()
	if _, err := io.CopyN(io.MultiWriter(w.tar, v), r, size); err != nil {
		return fmt.Errorf("write %s: %w", d, err)
	}
	if !v.Verified() {
		return fmt.Errorf("write %s: the bytes have another digest", d)
	}
	w.has[d] = true
	return nil
}

// entry has no time and no owner: they would differ from one time to the next. Its format
// is USTAR, which everybody reads, where that can say it.
func (w *Writer) entry(name string, size int64) error {
	return w.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o444})
}

// Close ends the tar. It does not close what is below.
func (w *Writer) Close() error {
	if err := w.tar.Close(); err != nil {
		return fmt.Errorf("end the archive: %w", err)
	}
	return nil
}

func blobName(d digest.Digest) string {
	return ocispec.ImageBlobsDir + "/" + d.Algorithm().String() + "/" + d.Encoded()
}

package archive

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Named returns root as index.json lists it: under a full name, in the annotations that
// containerd and Docker, and skopeo and podman read.
func Named(root ocispec.Descriptor, name string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: root.MediaType, Digest: root.Digest, Size: root.Size,
		Annotations: map[string]string{annotationName: name, annotationRef: name}}
}

// Writer writes an OCI image layout as a tar. The same calls make the same bytes.
type Writer struct {
	tar *tar.Writer
	has map[digest.Digest]bool
}

// NewWriter begins with index.json, so that who reads the stream knows what comes.
// images are roots as Named makes them.
func NewWriter(w io.Writer, images []ocispec.Descriptor) (*Writer, error) {
	out := &Writer{tar: tar.NewWriter(w), has: map[digest.Digest]bool{}}
	layout := ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: images}
	for _, file := range []struct {
		name  string
		value any
	}{{ocispec.ImageLayoutFile, layout}, {ocispec.ImageIndexFile, index}} {
		body, err := json.Marshal(file.value)
		if err == nil {
			err = out.entry(file.name, int64(len(body)))
		}
		if err == nil {
			_, err = out.tar.Write(body)
		}
		if err != nil {
			return nil, fmt.Errorf("write %s: %w", file.name, err)
		}
	}
	return out, nil
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

// entry has no time and no owner: they would differ from one time to the next.
func (w *Writer) entry(name string, size int64) error {
	return w.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o444, Format: formatOf(size)})
}

// formatOf is USTAR, which everybody reads, for what fits into it.
func formatOf(size int64) tar.Format {
	if size < 8<<30 {
		return tar.FormatUSTAR
	}
	return tar.FormatPAX
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

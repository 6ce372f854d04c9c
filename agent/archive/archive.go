// Package archive reads and writes images in files: tars that hold an OCI image layout,
// as containerd, skopeo, podman, buildx and Docker write them, and reads what
// `docker save` wrote before its version 25.
//
// Reading is one pass over a stream, so that a pipe will do, and takes memory for names
// and digests alone: content goes to a [Store] as it comes. Nothing is ever written
// under a name that an archive gives; names are only compared.
package archive

import (
	"bufio"
	"bytes"
	"compress/gzip"
	_ "crypto/sha256" // digests find them by registration
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// MaxManifest bounds manifests and indexes, in bytes, as the distribution
	// specification lets registries do.
	MaxManifest = 4 << 20
	// maxEntries and maxName bound what is remembered of a tar: some 200 bytes an
	// entry, and never more than 80 MB.
	maxEntries = 1 << 16
	maxName    = 1 << 10
	// maxImages bounds the names of an archive. Each may have an image that shares with
	// the others what is large, so what is read of manifests, and what the images list,
	// has bounds of its own: 16 KB and 256 blobs for each of so many.
	maxImages    = 4096
	maxDocuments = 64 << 20
	maxListed    = 1 << 20
	// maxDepth bounds indexes of indexes; tools write one index, of platforms.
	maxDepth = 4
	// maxWindow bounds the memory that a zstd stream asks for; --ultra has 128 MiB.
	maxWindow = 128 << 20
)

// Names of an image in the annotations of index.json. containerd and Docker write the
// first; skopeo and podman the second, which elsewhere is but a tag.
const (
	annotationName = "io.containerd.image.name"
	annotationRef  = ocispec.AnnotationRefName
)

// ErrInvalid marks an archive that is not one of images, or whose content is not what
// it says. The message says what is wrong and where.
var ErrInvalid = errors.New("not a valid image archive")

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...)
}

// Image is one image that an archive names.
type Image struct {
	// Name is the image's own, as annotated; "" if it carries none.
	Name string
	Root ocispec.Descriptor
	// Manifests are Root and the manifests below it whose content is all here, Blobs
	// what those list. Each digest is in one of them, once.
	Manifests []ocispec.Descriptor
	Blobs     []ocispec.Descriptor
	// Missing names the platforms of an index that are not here, or not whole.
	Missing []string
	// Err says why the image cannot be used, nil if it can.
	Err error
}

// decompress reads plain tars, gzip and zstd.
func decompress(r io.Reader) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, _ := b.Peek(4) // a shorter file fails as a tar
	switch compression(magic) {
	case "gzip":
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, nil, invalid("%v", err)
		}
		return z, func() {}, nil
	case "zstd":
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, invalid("%v", err)
		}
		return z, z.Close, nil
	}
	return b, func() {}, nil
}

// compression names what begins with magic; "" if that is nothing known.
func compression(magic []byte) string {
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return "gzip"
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return "zstd"
	}
	return ""
}

// nameOf is the full name that a descriptor of index.json carries.
func nameOf(d ocispec.Descriptor) string {
	if name := d.Annotations[annotationName]; name != "" {
		return name
	}
	// A reference is a name only with its registry: others write a bare tag there.
	ref := d.Annotations[annotationRef]
	host, _, ok := strings.Cut(ref, "/")
	if ok && (strings.ContainsAny(host, ".:") || host == "localhost") {
		return ref
	}
	return ""
}

// validDigest accepts what caches keep: the algorithms of the OCI image specification
// that are in use.
func validDigest(d digest.Digest) error {
	switch err := d.Validate(); {
	case errors.Is(err, digest.ErrDigestUnsupported), err == nil && d.Algorithm() == digest.SHA384:
		return invalid("names %.100q: images with digests other than sha256 and sha512 are not supported", string(d))
	case err != nil:
		return invalid("names %.100q: %v", string(d), err)
	}
	return nil
}

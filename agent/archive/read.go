package archive

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Store takes the content of an archive. Read makes one call at a time. Errors end the
// reading, and come back wrapped.
type Store interface {
	// Put keeps size bytes of r, which are to have digest d. It reads all of them, or
	// fails.
	Put(d digest.Digest, size int64, r io.Reader) error
	// Add keeps size bytes of r and says which digest they have.
	Add(size int64, r io.Reader) (digest.Digest, error)
	// Get returns what was kept, of at most MaxManifest bytes.
	Get(d digest.Digest) ([]byte, error)
	// Index is called with the names in index.json as soon as that has been read, which
	// is before any content in archives that begin with it. "" is an image without one.
	Index(names []string) error
}

// Read hands the content of an archive to s, and returns the images that it names once
// all of it has been read. The bytes of r beyond the end of the tar are left. An error is
// ErrInvalid, or one of r or s; what is wrong with one image alone is in its Err.
func Read(r io.Reader, s Store) ([]Image, error) {
	plain, done, err := decompress(r)
	if err != nil {
		return nil, err
	}
	defer done()
	in := reader{store: s, tar: tar.NewReader(plain), content: map[digest.Digest]int64{}, files: map[string]file{}, walked: map[digest.Digest]Image{}}
	if err := in.entries(); err != nil {
		return nil, err
	}
	return in.images()
}

// reader is one Read under way.
type reader struct {
	store   Store
	tar     *tar.Reader
	content map[digest.Digest]int64 // sizes of what the store has
	files   map[string]file         // what docker's manifest.json may name
	index   *ocispec.Index          // of index.json
	docker  []dockerImage           // of manifest.json
	parsed  int64                   // bytes of manifests and configurations
	walked  map[digest.Digest]Image // by root, without their names
}

// file is an entry of docker's layout: content, or a link to one.
type file struct {
	digest digest.Digest
	magic  string // see compression
	link   string // cleaned
}

func (in *reader) entries() error {
	for n := 0; ; n++ {
		h, err := in.tar.Next()
		switch {
		case errors.Is(err, io.EOF):
			if n == 0 {
				return invalid("there is nothing in it")
			}
			return nil
		case err != nil:
			return broken("entry", n, err)
		case n == maxEntries:
			return invalid("more than %d entries", maxEntries)
		}
		if err := in.entry(h); err != nil {
			return err
		}
	}
}

// broken says where a tar breaks off, or is none.
func broken(what string, at any, err error) error {
	damaged, short := errors.Is(err, tar.ErrHeader), errors.Is(err, io.ErrUnexpectedEOF)
	switch {
	case at == 0 && (damaged || short):
		return invalid("no tar; it takes one with images in it, as `larder export` or `docker save` write it, plain or compressed with gzip or zstd")
	case damaged:
		return invalid("%s %v: no tar, or a damaged one", what, at)
	case short:
		return invalid("%s %v: the archive ends too early (%w): copy or write it anew", what, at, err)
	}
	return fmt.Errorf("read %s %v of the archive: %w", what, at, err)
}

// entry looks at one entry. What has no meaning in an image's layout is passed over, so
// that it can do nothing; what would lead out of it is refused, for nobody writes such a
// name by accident.
func (in *reader) entry(h *tar.Header) error {
	if len(h.Name) > maxName || len(h.Linkname) > maxName {
		return invalid("an entry's name has more than %d bytes", maxName)
	}
	name := path.Clean(h.Name)
	if path.IsAbs(name) || name == ".." || strings.HasPrefix(name, "../") {
		return invalid("entry %.200q leads out of it", h.Name)
	}
	switch {
	case h.Typeflag == tar.TypeSymlink:
		return in.setFile(name, file{link: path.Join(path.Dir(name), h.Linkname)})
	case h.Typeflag == tar.TypeLink:
		return in.setFile(name, file{link: path.Clean(h.Linkname)})
	case h.Typeflag != tar.TypeReg:
		return nil
	case name == ocispec.ImageIndexFile:
		return in.readIndex(h)
	case name == dockerManifest:
		return in.readDocker(h)
	case strings.HasPrefix(name, ocispec.ImageBlobsDir+"/"):
		return in.blob(name, h)
	case dockerFile(name):
		return in.add(name, h)
	}
	return nil
}

func (in *reader) setFile(name string, f file) error {
	if _, twice := in.files[name]; twice {
		return invalid("entry %.200q is in it twice", name)
	}
	in.files[name] = f
	return nil
}

// blob hands on what has its digest as its name; one that cannot be kept is passed over,
// unless an image names it. The same blob twice is harmless: both are checked.
func (in *reader) blob(name string, h *tar.Header) error {
	algorithm, hex, _ := strings.Cut(strings.TrimPrefix(name, ocispec.ImageBlobsDir+"/"), "/")
	d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hex)
	if validDigest(d) != nil {
		return nil
	}
	sniffed := &sniffer{r: in.tar}
	if err := in.store.Put(d, h.Size, sniffed); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	in.content[d] = h.Size
	in.files[name] = file{digest: d, magic: compression(sniffed.head)}
	return nil
}

// add hands on what docker's layout holds under names that say nothing.
func (in *reader) add(name string, h *tar.Header) error {
	sniffed := &sniffer{r: in.tar}
	d, err := in.store.Add(h.Size, sniffed)
	if err != nil {
		return fmt.Errorf("%.200s: %w", name, err)
	}
	in.content[d] = h.Size
	return in.setFile(name, file{digest: d, magic: compression(sniffed.head)})
}

// sniffer keeps the first bytes of what is read through it.
type sniffer struct {
	r    io.Reader
	head []byte
}

func (s *sniffer) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if len(s.head) < 4 {
		s.head = append(s.head, p[:min(n, 4-len(s.head))]...)
	}
	return n, err
}

// readIndex reads index.json, and has the store say at once whether it wants what that names.
func (in *reader) readIndex(h *tar.Header) error {
	if in.index != nil {
		return invalid("index.json is in it twice")
	}
	in.index = &ocispec.Index{}
	if err := in.json(h, in.index); err != nil {
		return err
	}
	if len(in.index.Manifests) > maxImages {
		return invalid("index.json names more than %d images", maxImages)
	}
	names := make([]string, len(in.index.Manifests))
	for i, d := range in.index.Manifests {
		if err := validDigest(d.Digest); err != nil {
			return err
		}
		names[i] = nameOf(d)
	}
	return in.store.Index(names)
}

// json reads a file of the layout's own.
func (in *reader) json(h *tar.Header, v any) error {
	if h.Size > MaxManifest {
		return invalid("%s has %d bytes, more than %d", h.Name, h.Size, MaxManifest)
	}
	body, err := io.ReadAll(in.tar)
	if err != nil {
		return broken("file", h.Name, err)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return invalid("%s: %v", h.Name, err)
	}
	return nil
}

// images says what the archive named: by index.json if that names anything, for newer
// versions of docker write manifest.json beside it.
func (in *reader) images() ([]Image, error) {
	var out []Image
	switch {
	case in.index != nil && len(in.index.Manifests) > 0:
		for _, root := range in.index.Manifests {
			out = append(out, in.image(nameOf(root), root))
		}
	case len(in.docker) > 0:
		var err error
		if out, err = in.dockerImages(); err != nil {
			return nil, err
		}
	default:
		return nil, invalid("neither index.json (an OCI layout) nor manifest.json (docker save) names an image")
	}
	if err := unambiguous(out); err != nil {
		return nil, err
	}
	listed := 0
	for _, i := range out {
		if listed += len(i.Manifests) + len(i.Blobs) + len(i.Missing); listed > maxListed {
			return nil, invalid("its images list more than %d manifests and blobs in all", maxListed)
		}
	}
	return out, nil
}

// unambiguous refuses one name for two images.
func unambiguous(images []Image) error {
	roots := map[string]digest.Digest{}
	for _, i := range images {
		if old, ok := roots[i.Name]; i.Name != "" && ok && old != i.Root.Digest {
			return invalid("%.200q is the name of two images, %s and %s", i.Name, old, i.Root.Digest)
		}
		roots[i.Name] = i.Root.Digest
	}
	return nil
}

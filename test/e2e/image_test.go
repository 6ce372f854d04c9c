package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// imageKind is one of the shapes in which registries hold images.
type imageKind string

const (
	ociImage  imageKind = "oci"
	schema2   imageKind = "schema2"
	multiArch imageKind = "multi-arch"
)

// The sizes of an ordinary image's layers: below, at about and above the size of
// one piece.
var ordinarySizes = []int{4 << 10, 300 << 10, 3 << 20}

var imageKinds = []imageKind{ociImage, schema2, multiArch}

// pushed is an image that a registry holds.
type pushed struct {
	repository string
	tag        string
	digest     v1.Hash
	layers     []v1.Hash // not set for an index, nor is size
	size       int64     // of layers and config together
}

// push builds an image of layers with these sizes and pushes it. The same seed
// gives the same bytes in every run.
func (r *registry) push(kind imageKind, repository string, seed uint64, sizes ...int) pushed {
	r.t.Helper()
	if len(sizes) == 0 {
		sizes = ordinarySizes
	}
	if kind != multiArch {
		return r.pushImage(repository, buildImage(r.t, kind, runtime.GOARCH, seed, sizes))
	}
	index := buildIndex(r.t, seed, sizes)
	digest, err := index.Digest()
	if err == nil {
		err = remote.WriteIndex(r.reference(repository), index, remote.WithTransport(r.pushTransport(repository)))
	}
	if err != nil {
		r.t.Fatalf("push %s: %v", repository, err)
	}
	return pushed{repository: repository, tag: tag, digest: digest}
}

func (r *registry) pushImage(repository string, image v1.Image) pushed {
	r.t.Helper()
	p := pushed{repository: repository, tag: tag}
	p.layers, p.size = contents(r.t, image)
	var err error
	if p.digest, err = image.Digest(); err == nil {
		err = remote.Write(r.reference(repository), image, remote.WithTransport(r.pushTransport(repository)))
	}
	if err != nil {
		r.t.Fatalf("push %s: %v", repository, err)
	}
	return p
}

// pushTransport is the way of who may push: ann, where a registry asks for credentials.
func (r *registry) pushTransport(repository string) http.RoundTripper {
	if r.pusher == nil {
		return r.transport()
	}
	return authorized{r.pusher(repository), r.transport()}
}

// tag is the one that every pushed image has.
const tag = "v1"

func (r *registry) reference(repository string) name.Reference {
	r.t.Helper()
	var scheme []name.Option
	if !r.kind.tls {
		scheme = append(scheme, name.Insecure)
	}
	ref, err := name.ParseReference(r.addr+"/"+repository+":"+tag, scheme...)
	if err != nil {
		r.t.Fatal(err)
	}
	return ref
}

func contents(t *testing.T, image v1.Image) (layers []v1.Hash, size int64) {
	t.Helper()
	m, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	size = m.Config.Size
	for _, l := range m.Layers {
		layers = append(layers, l.Digest)
		size += l.Size
	}
	return layers, size
}

func buildIndex(t *testing.T, seed uint64, sizes []int) v1.ImageIndex {
	t.Helper()
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for i, arch := range []string{"s390x", runtime.GOARCH} {
		image := buildImage(t, ociImage, arch, seed+uint64(i)*1000, sizes)
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	return index
}

func buildImage(t *testing.T, kind imageKind, arch string, seed uint64, sizes []int) v1.Image {
	t.Helper()
	manifest, config, layer := types.OCIManifestSchema1, types.OCIConfigJSON, types.OCILayer
	if kind == schema2 {
		manifest, config, layer = types.DockerManifestSchema2, types.DockerConfigJSON, types.DockerLayer
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, manifest), config)
	for i, size := range sizes {
		l, err := tarball.LayerFromOpener(layerOpener(seed+uint64(i), size), tarball.WithMediaType(layer), tarball.WithCompressionLevel(gzip.NoCompression))
		if err != nil {
			t.Fatal(err)
		}
		if image, err = mutate.AppendLayers(image, l); err != nil {
			t.Fatal(err)
		}
	}
	file, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", arch
	if image, err = mutate.ConfigFile(image, file); err != nil {
		t.Fatal(err)
	}
	return image
}

// layerOpener gives a layer with one file of incompressible bytes.
func layerOpener(seed uint64, size int) tarball.Opener {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return fileOpener(path.Join("data", fmt.Sprint(seed)), 0o644, size, func() io.Reader { return rand.NewChaCha8(key) })
}

// fileOpener gives a layer with one file, the first size bytes of content.
func fileOpener(name string, mode int64, size int, content func() io.Reader) tarball.Opener {
	return func() (io.ReadCloser, error) {
		var head, foot bytes.Buffer
		w := tar.NewWriter(&head)
		err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(size)})
		if err != nil {
			return nil, err
		}
		foot.Write(make([]byte, (512-size%512)%512+1024)) // padding, then the end of the archive
		return io.NopCloser(io.MultiReader(&head, io.LimitReader(content(), int64(size)), &foot)), nil
	}
}

// buildProgram makes an image that runs a program, a static one.
func buildProgram(t *testing.T, program string, seed uint64, sizes ...int) v1.Image {
	t.Helper()
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	file := fmt.Sprintf("program-%d", seed) // no two images share the layer
	layer, err := tarball.LayerFromOpener(fileOpener(file, 0o755, len(content), func() io.Reader { return bytes.NewReader(content) }),
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.NoCompression))
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(buildImage(t, ociImage, runtime.GOARCH, seed, sizes), layer)
	if err == nil {
		image, err = mutate.Config(image, v1.Config{Entrypoint: []string{"/" + file}})
	}
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// saveImage writes an image as `docker save` does, for `ctr images import`.
func saveImage(t *testing.T, ref string, image v1.Image) (file string) {
	t.Helper()
	tag, err := name.NewTag(ref)
	file = filepath.Join(tempDir(t), "image.tar")
	if err == nil {
		err = tarball.WriteToFile(file, tag, image)
	}
	if err != nil {
		t.Fatal(err)
	}
	return file
}

func certPool(t *testing.T, caFile string) *x509.CertPool {
	t.Helper()
	pem, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		t.Fatalf("%s holds no certificate", caFile)
	}
	return pool
}

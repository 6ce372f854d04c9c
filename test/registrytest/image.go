package registrytest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types of Docker's schema 2.
const (
	DockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	DockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	DockerConfig       = "application/vnd.docker.container.image.v1+json"
	DockerLayer        = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// Image is an image, index or artifact with everything it consists of.
type Image struct {
	ocispec.Descriptor // of the root, with its platform if it has one
	// Manifests has the root last, each with its bytes in Data.
	Manifests []ocispec.Descriptor
	Blobs     map[digest.Digest]Content
	// Layers in order; of an index, those of all its images.
	Layers []ocispec.Descriptor
}

// ImageSpec is what an image depends on; equal specs make equal images.
type ImageSpec struct {
	Seed uint64
	// Layers are the sizes of the layers' files. A layer that can be unpacked is
	// larger by about 0.01 % and 2 KiB.
	Layers []int64
	// Opaque layers are nothing but random bytes of exactly that size. They can
	// be pulled but not unpacked. Otherwise a layer is a valid tar.gz with one
	// file of random bytes.
	Opaque bool
	// Platform defaults to linux/amd64.
	Platform ocispec.Platform
}

// OCIImage builds an image with OCI media types.
func OCIImage(spec ImageSpec) *Image {
	return buildImage(spec, mediaTypes{
		ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerGzip,
	})
}

// DockerImage builds an image of Docker's schema 2.
func DockerImage(spec ImageSpec) *Image {
	return buildImage(spec, mediaTypes{DockerManifest, DockerConfig, DockerLayer})
}

type mediaTypes struct{ manifest, config, layer string }

func buildImage(spec ImageSpec, types mediaTypes) *Image {
	if spec.Platform.OS == "" {
		spec.Platform = ocispec.Platform{OS: "linux", Architecture: "amd64"}
	}
	img := &Image{Blobs: map[digest.Digest]Content{}}
	config := ocispec.Image{
		Created:  &epoch,
		Platform: spec.Platform,
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}},
	}
	for i, size := range spec.Layers {
		c, diffID := buildLayer(spec, i, size)
		d := img.add(types.layer, c)
		img.Layers = append(img.Layers, d)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
		config.History = append(config.History, ocispec.History{Created: &epoch, CreatedBy: fmt.Sprintf("layer %d of seed %d", i, spec.Seed)})
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: types.manifest,
		Config:    img.add(types.config, Bytes(mustJSON(config))),
		Layers:    append([]ocispec.Descriptor{}, img.Layers...),
	}
	img.addRoot(types.manifest, mustJSON(m))
	img.Platform = &spec.Platform
	return img
}

// epoch is when all images were made.
var epoch = time.Date(2026, time.January, 2, 3, 4, 5, 0, time.UTC)

// add puts a blob into the image.
func (img *Image) add(mediaType string, c Content) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: sum(c), Size: c.Size()}
	img.Blobs[d.Digest] = c
	return d
}

// addRoot puts a manifest into the image as its root.
func (img *Image) addRoot(mediaType string, body []byte) {
	img.Descriptor = ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	d := img.Descriptor
	d.Data = body
	img.Manifests = append(img.Manifests, d)
}

// buildLayer returns a layer and the digest of what it unpacks to. Seeds of
// layers are far apart, so that no two images share one by accident.
func buildLayer(spec ImageSpec, i int, size int64) (Content, digest.Digest) {
	data := Random(spec.Seed<<16+uint64(i), size)
	if spec.Opaque {
		return data, sum(data)
	}
	var head bytes.Buffer
	w := tar.NewWriter(&head)
	err := w.WriteHeader(&tar.Header{
		Name:     fmt.Sprintf("data/%d-%d", spec.Seed, i),
		Typeflag: tar.TypeReg, Mode: 0o644, Size: size, ModTime: epoch,
	})
	if err != nil {
		panic(fmt.Sprintf("tar header: %v", err)) // a buffer takes everything
	}
	const block = 512
	end := (block-size%block)%block + 2*block
	archive := concat{Bytes(head.Bytes()), data, fill{0, end}}
	return newStoredGzip(archive), sum(archive)
}

// Index builds an OCI index over images.
func Index(images ...*Image) *Image {
	return buildIndex(ocispec.MediaTypeImageIndex, images)
}

func buildIndex(mediaType string, images []*Image) *Image {
	index := &Image{Blobs: map[digest.Digest]Content{}}
	list := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType}
	for _, img := range images {
		list.Manifests = append(list.Manifests, img.Descriptor)
		index.Manifests = append(index.Manifests, img.Manifests...)
		index.Layers = append(index.Layers, img.Layers...)
		for d, c := range img.Blobs {
			index.Blobs[d] = c
		}
	}
	index.addRoot(mediaType, mustJSON(list))
	return index
}

// Platforms builds images for linux/amd64 and linux/arm64 and the list of both:
// OCI, or Docker's schema 2.
func Platforms(spec ImageSpec, docker bool) *Image {
	other := spec
	other.Seed = spec.Seed + 1<<32
	other.Platform = ocispec.Platform{OS: "linux", Architecture: "arm64"}
	if docker {
		return buildIndex(DockerManifestList, []*Image{DockerImage(spec), DockerImage(other)})
	}
	return Index(OCIImage(spec), OCIImage(other))
}

// Artifact builds a manifest of the given type with one small blob, which refers
// to subject as signatures and SBOMs do.
func Artifact(subject ocispec.Descriptor, artifactType string, seed uint64) *Image {
	img := &Image{Blobs: map[digest.Digest]Content{}}
	subject = ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size}
	img.Blobs[ocispec.DescriptorEmptyJSON.Digest] = Bytes(ocispec.DescriptorEmptyJSON.Data)
	img.Layers = []ocispec.Descriptor{img.add(artifactType, Random(seed, 1000))}
	img.addRoot(ocispec.MediaTypeImageManifest, mustJSON(ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: artifactType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       img.Layers,
		Subject:      &subject,
	}))
	return img
}

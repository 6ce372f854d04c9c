package archive

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// dockerManifest is the file in which `docker save` names its images (Docker Image
// Specification v1.2, "Combined Image JSON + Filesystem Changeset Format").
const dockerManifest = "manifest.json"

// dockerImage is an entry of the manifest.json of `docker save`: names of files in the
// tar. There is no manifest in it, so an image has another digest than in its registry.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func (in *reader) readDocker(h *tar.Header) error {
	if in.docker != nil {
		return invalid("manifest.json is in it twice")
	}
	in.docker = []dockerImage{}
	if err := in.json(h, &in.docker); err != nil {
		return err
	}
	names := 0
	for _, i := range in.docker {
		names += 1 + len(i.RepoTags)
	}
	if names > maxImages {
		return invalid("manifest.json names more than %d images", maxImages)
	}
	return nil
}

// dockerFile reports whether a file may be one that manifest.json names: a layer, or a
// configuration. Others' tools name a configuration by its digest.
func dockerFile(name string) bool {
	for _, end := range []string{".tar", ".tar.gz", ".tgz", ".json"} {
		if strings.HasSuffix(name, end) {
			return true
		}
	}
	return strings.HasPrefix(name, "sha256:")
}

func (in *reader) dockerImages() ([]Image, error) {
	var out []Image
	for _, i := range in.docker {
		root, err := in.convert(i)
		if err != nil {
			return nil, err
		}
		names := i.RepoTags
		if len(names) == 0 {
			names = []string{""}
		}
		for _, name := range names {
			out = append(out, in.image(name, root))
		}
	}
	return out, nil
}

// convert makes the manifest that the image would have, pushed with layers as they are.
func (in *reader) convert(i dockerImage) (ocispec.Descriptor, error) {
	config, err := in.resolve(i.Config)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	diffs, err := in.diffIDs(config.digest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(diffs) != len(i.Layers) {
		return ocispec.Descriptor{}, invalid("%.200s has %d layers, manifest.json %d", i.Config, len(diffs), len(i.Layers))
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: config.digest, Size: in.content[config.digest]},
		Layers: []ocispec.Descriptor{},
	}
	for n, name := range i.Layers {
		layer, err := in.resolve(name)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		if layer.magic == "" && layer.digest != diffs[n] {
			return ocispec.Descriptor{}, invalid("layer %.200s is %s, not %s as the configuration says", name, layer.digest, diffs[n])
		}
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: layerType(layer.magic), Digest: layer.digest, Size: in.content[layer.digest]})
	}
	return in.keep(m)
}

// keep puts a made manifest beside what the archive held.
func (in *reader) keep(m ocispec.Manifest) (ocispec.Descriptor, error) {
	body, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("make a manifest: %w", err)
	}
	d := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	if d.Size > MaxManifest {
		return d, invalid("an image has %d layers", len(m.Layers))
	}
	if err := in.store.Put(d.Digest, d.Size, bytes.NewReader(body)); err != nil {
		return d, fmt.Errorf("keep a manifest: %w", err)
	}
	in.content[d.Digest] = d.Size
	return d, nil
}

func layerType(magic string) string {
	switch magic {
	case "gzip":
		return ocispec.MediaTypeImageLayerGzip
	case "zstd":
		return ocispec.MediaTypeImageLayerZstd
	}
	return ocispec.MediaTypeImageLayer
}

// resolve finds a file by its name, through links: docker wrote a layer that several
// images share once. A link is a name in this tar and nothing else; a chain of more than
// eight, where docker makes one, goes in a circle.
func (in *reader) resolve(name string) (file, error) {
	at := path.Clean(name)
	for range 8 {
		f, ok := in.files[at]
		if !ok {
			break
		}
		if f.digest != "" {
			return f, nil
		}
		at = f.link
	}
	return file{}, invalid("manifest.json names %.200q, which is not in it", name)
}

// diffIDs are the digests of the unpacked layers.
func (in *reader) diffIDs(config digest.Digest) ([]digest.Digest, error) {
	var doc ocispec.Image
	if err := in.parse("configuration", config, &doc); err != nil {
		return nil, err
	}
	return doc.RootFS.DiffIDs, nil
}

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxManifests and maxManifestBytes bound the manifests and indexes of one image, by number
// and by total length. Images for all platforms have some dozens, of a few KiB each,
// attestations included. Without these bounds a registry could go on forever, and what the
// manifests list, which is kept until the end, could fill the memory.
const (
	maxManifests     = 1000
	maxManifestBytes = 16 << 20
)

// errNotBelow is what the reader of walkImage returns to have what is below a manifest
// left out.
var errNotBelow = errors.New("not below this manifest")

// errNothing is an image of which its manifests list nothing that could be pulled: an empty
// index, or a document that is no manifest that Larder reads.
var errNothing = errors.New("the image is empty: its manifests list no config and no layers")

// Instances says which image of an index is wanted if it has several for one platform, as
// podman and buildah push them with --add-compression: the same with layers in gzip and in
// zstd. The second has an annotation, and is listed after the first.
type Instances int

const (
	FirstInstance Instances = iota // what containerd and Docker pull
	ZstdInstance                   // what CRI-O (since 1.28), podman and skopeo pull, if there is one
	EveryInstance                  // both
)

// instances are those that the runtimes of this node pull.
func (c HostsConfig) instances() Instances {
	switch {
	case c.CRIO == "":
		return FirstInstance
	case c.Containerd == "":
		return ZstdInstance
	}
	return EveryInstance
}

// selection is what choose picks from an index.
type selection struct {
	platform  string // "linux/arm64", "" for this machine's, "all"
	instances Instances
}

// walkImage goes through an image for one platform as choose understands it: first the
// root, then what each index chooses, depth first. No digest comes twice, for platforms
// share layers, and indexes of indexes could name one another without end. More than
// maxManifests or maxManifestBytes is an error, and so is what is no platform, of an image
// without an index too. One without config and layers ends with errNothing, after all of it
// was visited.
//
// read returns the bytes of a manifest, whose digest and length (archive.MaxManifest) it
// has seen to. visit is told what they say: the descriptor with its true size, the
// manifest, and those of its blobs that none before it listed; an index has none. An
// error of either ends the walk, and comes back as it is.
func walkImage(root ocispec.Descriptor, want selection, read func(ocispec.Descriptor) ([]byte, error), visit func(ocispec.Descriptor, manifest, []blob) error) error {
	if _, err := parsePlatform(want.platform); err != nil {
		return err
	}
	seen, manifests, bytes := map[digest.Digest]bool{}, 0, 0
	empty := true // as far as was read
	first := func(d digest.Digest) bool {
		known := seen[d]
		seen[d] = true
		return !known
	}
	var walk func(ocispec.Descriptor) error
	walk = func(d ocispec.Descriptor) error {
		if !first(d.Digest) {
			return nil
		}
		if manifests++; manifests > maxManifests {
			return fmt.Errorf("the image has more than %d manifests", maxManifests)
		}
		body, err := read(d)
		if errors.Is(err, errNotBelow) {
			empty = false
			return nil
		}
		if err != nil {
			return err
		}
		if bytes += len(body); bytes > maxManifestBytes {
			return fmt.Errorf("the image has more than %d bytes of manifests", maxManifestBytes)
		}
		m, err := parseManifest(body)
		if err != nil {
			return fmt.Errorf("manifest %s: %w", d.Digest, err)
		}
		d.Size = int64(len(body))
		empty = empty && m.Config.Digest == "" && len(m.Layers) == 0
		if !m.isIndex() {
			return visit(d, m, slices.DeleteFunc(m.blobs(), func(b blob) bool { return !first(b.Digest) }))
		}
		if err := visit(d, m, nil); err != nil {
			return err
		}
		chosen, err := m.choose(want)
		if err != nil {
			return err
		}
		for _, child := range chosen {
			if err := walk(child); err != nil {
				return err
			}
		}
		return nil
	}
	err := walk(root)
	if err == nil && empty {
		err = errNothing
	}
	return err
}

// manifest is what Larder reads of an image manifest or index, OCI or Docker
// schema 2; the fields have the same names in all four. It is for what the proxy gave or
// the cache holds. Two others read by rules of their own: proxy.outline decides who may
// have what, so it refuses whatever can be read in two ways, and archive.document is of an
// image that may lack platforms, and of which an import keeps all that it lists.
type manifest struct {
	Manifests []ocispec.Descriptor `json:"manifests"`
	Config    ocispec.Descriptor   `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
}

// blob is a descriptor and what it is of: config or layer; in an export, manifest too.
type blob struct {
	ocispec.Descriptor
	kind string
}

// parseManifest fails on what is no JSON object, or lists a digest that is none.
func parseManifest(body []byte) (manifest, error) {
	var m manifest
	if err := json.Unmarshal(body, &m); err != nil {
		return m, fmt.Errorf("not a manifest: %w", err)
	}
	for _, d := range slices.Concat(m.Manifests, m.Layers) {
		if err := d.Digest.Validate(); err != nil {
			return m, fmt.Errorf("names %q: %w", d.Digest, err)
		}
	}
	if m.Config.Digest != "" {
		if err := m.Config.Digest.Validate(); err != nil {
			return m, fmt.Errorf("names config %q: %w", m.Config.Digest, err)
		}
	}
	return m, nil
}

func (m manifest) isIndex() bool { return len(m.Manifests) > 0 }

// blobs lists config and layers, a digest as often as the manifest does.
func (m manifest) blobs() []blob {
	var out []blob
	add := func(d ocispec.Descriptor, kind string) {
		if d.Digest != "" && len(d.URLs) == 0 { // with URLs: foreign layers, not in the registry
			out = append(out, blob{d, kind})
		}
	}
	add(m.Config, "config")
	for _, l := range m.Layers {
		add(l, "layer")
	}
	return out
}

// platformError is an image that is made for others.
type platformError struct{ want string }

func (e *platformError) Error() string { return "the image has no manifest for " + e.want }

var errNoPlatform = errors.New("not a platform")

// parsePlatform is this machine's platform for "" and "all"; else errNoPlatform, unless
// text names one.
func parsePlatform(text string) (ocispec.Platform, error) {
	if text == "" || text == "all" {
		return platforms.DefaultSpec(), nil
	}
	p, err := platforms.Parse(text)
	if err != nil {
		return p, fmt.Errorf("%w: %q: write os/arch, such as linux/arm64, or all", errNoPlatform, text)
	}
	return p, nil
}

// choose picks the manifests of an index that are wanted. Attestations (platform
// unknown/unknown) are in "all" only. What names no platform, such as a Helm chart under
// the tag of its image, comes last, as in containerd and CRI-O.
func (m manifest) choose(want selection) ([]ocispec.Descriptor, error) {
	if want.platform == "all" {
		return m.Manifests, nil
	}
	platform, err := parsePlatform(want.platform)
	if err != nil {
		return nil, err
	}
	matcher := platforms.Only(platform)
	var fits []ocispec.Descriptor
	for _, d := range m.Manifests {
		if d.Platform == nil || matcher.Match(*d.Platform) {
			fits = append(fits, d)
		}
	}
	if len(fits) == 0 {
		return nil, &platformError{platforms.Format(platform)}
	}
	order := func(a, b ocispec.Descriptor) int {
		switch {
		case a.Platform == nil && b.Platform == nil:
			return 0
		case a.Platform == nil:
			return 1
		case b.Platform == nil:
			return -1
		case matcher.Less(*a.Platform, *b.Platform):
			return -1
		case matcher.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	}
	slices.SortStableFunc(fits, order)
	first := fits[0]
	zstd := slices.IndexFunc(fits, func(d ocispec.Descriptor) bool {
		return d.Annotations[zstdAnnotation] == "true" && order(first, d) == 0
	})
	switch {
	case zstd <= 0 || want.instances == FirstInstance:
		return fits[:1], nil
	case want.instances == ZstdInstance:
		return fits[zstd : zstd+1], nil
	}
	return []ocispec.Descriptor{first, fits[zstd]}, nil
}

// zstdAnnotation marks an instance with layers in zstd (go.podman.io/image,
// internal/manifest, oci_index.go).
const zstdAnnotation = "io.github.containers.compression.zstd"

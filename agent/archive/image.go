package archive

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// document is what is read of a manifest or index, of any kind. Its digests are looked at
// one by one, see has: an image may lack what it lists, and only what is here counts.
type document struct {
	MediaType string               `json:"mediaType"`
	Config    *ocispec.Descriptor  `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
	// Blobs are of application/vnd.oci.artifact.manifest.v1+json, of release candidates
	// of image-spec 1.1 alone; runtimes do not pull these, but archives hold them.
	Blobs []ocispec.Descriptor `json:"blobs"`
}

// blobs are those that a registry has too: layers with URLs of their own are elsewhere.
func (d document) blobs() []ocispec.Descriptor {
	var out []ocispec.Descriptor
	if d.Config != nil {
		out = append(out, *d.Config)
	}
	for _, l := range slices.Concat(d.Layers, d.Blobs) {
		if len(l.URLs) == 0 {
			out = append(out, l)
		}
	}
	return out
}

// errAbsent marks content that an archive names and has not.
var errAbsent = errors.New("not in the archive")

// image finds out what of an image is here, once for all names that it has.
func (in *reader) image(name string, root ocispec.Descriptor) Image {
	i, walked := in.walked[root.Digest]
	if !walked {
		i = in.walk(root)
		in.walked[root.Digest] = i
	}
	if err := in.has(root); err != nil { // another size may be listed with each name
		i.Err = err
	}
	i.Name = name
	return i
}

func (in *reader) walk(root ocispec.Descriptor) (i Image) {
	t := tree{in: in, manifests: map[digest.Digest]bool{}, blobs: map[digest.Digest]bool{}}
	i.Root, i.Err = t.manifest(root, 0)
	i.Manifests, i.Blobs, i.Missing = t.list, t.leaves, t.missing
	return i
}

// tree is an image as far as it was walked.
type tree struct {
	in        *reader
	manifests map[digest.Digest]bool // seen; whether they are whole
	blobs     map[digest.Digest]bool
	list      []ocispec.Descriptor
	leaves    []ocispec.Descriptor
	missing   []string
}

// manifest adds d and what is below it, if all of that is here; of an index, at least
// one image. It returns d with the media type and size that its content has.
func (t *tree) manifest(d ocispec.Descriptor, depth int) (ocispec.Descriptor, error) {
	if depth > maxDepth {
		return d, invalid("indexes more than %d deep", maxDepth)
	}
	if err := t.in.has(d); err != nil {
		return d, err
	}
	if whole, seen := t.manifests[d.Digest]; seen { // looked at before it is read again: it may be named 50,000 times
		if !whole {
			return d, fmt.Errorf("%s: %w", d.Digest, errAbsent)
		}
		return d, nil
	}
	doc, d, err := t.in.document(d)
	if err != nil {
		return d, err
	}
	t.manifests[d.Digest] = false // until it is known; an index that names itself ends here
	if len(doc.Manifests) > 0 {
		err = t.index(doc, depth)
	} else {
		err = t.leavesOf(doc)
	}
	if err != nil {
		return d, err
	}
	t.manifests[d.Digest] = true
	t.list = append(t.list, d)
	return d, nil
}

// index walks the images of an index. Most archives have one platform of several.
func (t *tree) index(doc document, depth int) error {
	whole := 0
	for _, child := range doc.Manifests {
		if err := validDigest(child.Digest); err != nil {
			return err
		}
		_, err := t.manifest(child, depth+1)
		switch {
		case errors.Is(err, errAbsent) && attestation(child):
		case errors.Is(err, errAbsent):
			t.missing = append(t.missing, platformOf(child))
		case err != nil:
			return err
		case !attestation(child):
			whole++
		}
	}
	if whole == 0 {
		return fmt.Errorf("no platform of it is whole: %w", errAbsent)
	}
	return nil
}

// attestation reports whether d describes other images, as buildx writes them.
func attestation(d ocispec.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] == "attestation-manifest"
}

func platformOf(d ocispec.Descriptor) string {
	if p := d.Platform; p != nil {
		return strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/")
	}
	return d.Digest.String()
}

// leavesOf adds the blobs of a manifest, if all are here.
func (t *tree) leavesOf(doc document) error {
	blobs := doc.blobs()
	for _, b := range blobs {
		if err := t.in.has(b); err != nil {
			return err
		}
	}
	for _, b := range blobs {
		if !t.blobs[b.Digest] {
			t.blobs[b.Digest] = true
			t.leaves = append(t.leaves, b)
		}
	}
	return nil
}

// has holds a descriptor against the content.
func (in *reader) has(d ocispec.Descriptor) error {
	if err := validDigest(d.Digest); err != nil {
		return err
	}
	size, ok := in.content[d.Digest]
	switch {
	case !ok:
		return fmt.Errorf("%s: %w", d.Digest, errAbsent)
	case d.Size != size && d.Size != 0:
		return invalid("%s has %d bytes, not %d as listed", d.Digest, size, d.Size)
	}
	return nil
}

// document reads a manifest that is here.
func (in *reader) document(d ocispec.Descriptor) (document, ocispec.Descriptor, error) {
	var doc document
	if err := in.parse("manifest", d.Digest, &doc); err != nil {
		return doc, d, err
	}
	if len(doc.Manifests) == 0 && doc.Config == nil && len(doc.Blobs) == 0 {
		return doc, d, invalid("%s is no manifest: it lists nothing", d.Digest)
	}
	out := ocispec.Descriptor{Digest: d.Digest, Size: in.content[d.Digest], MediaType: cmp.Or(doc.MediaType, d.MediaType, inferType(doc))}
	return doc, out, nil
}

// parse reads JSON that is here.
func (in *reader) parse(what string, d digest.Digest, v any) error {
	size := in.content[d]
	if size > MaxManifest {
		return invalid("%s %s has %d bytes, more than %d", what, d, size, MaxManifest)
	}
	if in.parsed += size; in.parsed > maxDocuments {
		return invalid("more than %d bytes of manifests and configurations in all", maxDocuments)
	}
	body, err := in.store.Get(d)
	if err != nil {
		return fmt.Errorf("%s %s: %w", what, d, err)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return invalid("%s %s: %v", what, d, err)
	}
	return nil
}

// inferType is the type of OCI documents that do not say it.
func inferType(doc document) string {
	if len(doc.Manifests) > 0 {
		return ocispec.MediaTypeImageIndex
	}
	return ocispec.MediaTypeImageManifest
}

package proxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's media types of manifests; the OCI's are in image-spec.
const (
	dockerManifest   = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList       = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerSchema1    = "application/vnd.docker.distribution.manifest.v1+json"
	dockerSchema1Jws = "application/vnd.docker.distribution.manifest.v1+prettyjws"
	maxManifest      = 4 << 20 // bytes; what the distribution spec asks registries to take
	maxMediaType     = 255     // bytes (RFC 6838, 4.2); they are kept
)

// What upstream is asked for. The two forms are the two answers that a tag can
// have: registries give a list to clients that accept lists and one image to the
// others.
var (
	acceptAll = []string{dockerManifest, dockerList, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, "*/*"}
	acceptOne = []string{dockerManifest, ocispec.MediaTypeImageManifest}
)

// accepted are the media types that a request names; empty means any.
func accepted(h http.Header) []string {
	var types []string
	for _, line := range h.Values("Accept") {
		for part := range strings.SplitSeq(line, ",") {
			if t := bareType(part); t != "" {
				types = append(types, t)
			}
		}
	}
	return types
}

// bareType is a media type without its parameters, in lower case; "" if it is none.
func bareType(s string) string {
	t, _, _ := strings.Cut(s, ";")
	return strings.ToLower(strings.TrimSpace(t))
}

// acceptable is generous with a media type that is not known yet.
func acceptable(types []string, mediaType string) bool {
	if mediaType == "" || len(types) == 0 || slices.Contains(types, "*/*") {
		return true
	}
	major, _, _ := strings.Cut(mediaType, "/")
	return slices.Contains(types, mediaType) || slices.Contains(types, major+"/*")
}

// acceptsLists says which of the two answers of a tag a client wants.
func acceptsLists(types []string) bool {
	return acceptable(types, dockerList) || acceptable(types, ocispec.MediaTypeImageIndex)
}

// ofManifest reports whether mediaType is one of a manifest, and not what servers send
// when they do not know: text/plain, application/json, application/octet-stream.
func ofManifest(mediaType string) bool {
	t, _, err := mime.ParseMediaType(mediaType)
	return err == nil && len(mediaType) <= maxMediaType && strings.HasPrefix(t, "application/") && strings.Contains(t, ".")
}

// outline is what the proxy reads of a manifest, of any kind. It leaves out whatever
// registries do not check when a manifest is pushed, for what it lists counts as part
// of its repository.
type outline struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	FSLayers      []json.RawMessage    `json:"fsLayers"` // schema 1
	Signatures    []json.RawMessage    `json:"signatures"`
}

// parseOutline refuses what is not a manifest, and what others may read as a
// different manifest.
func parseOutline(body []byte) (outline, error) {
	var o outline
	if err := json.Unmarshal(body, &o); err != nil {
		return o, fmt.Errorf("not a manifest: %w", err)
	}
	if err := unambiguous(body); err != nil {
		return o, err
	}
	if len(o.MediaType) > maxMediaType {
		return o, fmt.Errorf("manifest has a media type of %d bytes", len(o.MediaType))
	}
	// As containerd and containers-image do: a registry that checked one reading has not
	// checked the other.
	if o.Manifests != nil && (o.Config != nil || o.Layers != nil || o.FSLayers != nil) {
		return o, errors.New("manifest is both an index and an image")
	}
	for _, d := range slices.Concat(o.children(), o.Manifests) {
		if err := d.Digest.Validate(); err != nil {
			return o, fmt.Errorf("manifest lists %q: %w", d.Digest, err)
		}
	}
	return o, nil
}

// unambiguous refuses the name of a field in another case: encoding/json takes
// "Layers" for "layers", and registries that are not written in Go do not.
func unambiguous(body []byte) error {
	var lists struct {
		Config            json.RawMessage
		Layers, Manifests []json.RawMessage
	}
	if err := json.Unmarshal(body, &lists); err != nil {
		return fmt.Errorf("not a manifest: %w", err)
	}
	err := exactFields(body, "schemaVersion", "mediaType", "config", "layers", "manifests", "fsLayers", "signatures")
	for _, d := range slices.Concat([]json.RawMessage{lists.Config}, lists.Layers, lists.Manifests) {
		err = errors.Join(err, exactFields(d, "mediaType", "digest", "size", "urls", "platform"))
	}
	return err
}

func exactFields(object json.RawMessage, names ...string) error {
	var fields map[string]json.RawMessage
	if json.Unmarshal(object, &fields) != nil {
		return nil // it is none
	}
	for field := range fields {
		if i := slices.IndexFunc(names, func(name string) bool { return strings.EqualFold(name, field) }); i >= 0 && names[i] != field {
			return fmt.Errorf("manifest has a field %q beside or instead of %q", field, names[i])
		}
	}
	return nil
}

// children are the blobs that a manifest lists, without those that no
// registry serves (layers with URLs of their own).
func (o *outline) children() []ocispec.Descriptor {
	var out []ocispec.Descriptor
	if o.Config != nil {
		out = append(out, *o.Config)
	}
	for _, d := range o.Layers {
		if len(d.URLs) == 0 {
			out = append(out, d)
		}
	}
	return out
}

// mediaType is the type of a manifest that a registry called said, "" if it is none.
// The bytes' own word counts, for which their digest vouches: one registry's
// Content-Type must not change what another's clients get. said decides only where
// the bytes leave it open, and between the OCI's and Docker's names of one form.
func (o *outline) mediaType(said string) string {
	found := o.infer()
	said = bareType(said)
	if twin := twins[said]; found == "" && ofManifest(said) || found == twin && o.MediaType == "" && twin != "" {
		return said
	}
	return found
}

// twins are the OCI's names of what Docker's types are.
var twins = map[string]string{dockerManifest: ocispec.MediaTypeImageManifest, dockerList: ocispec.MediaTypeImageIndex}

// infer finds the media type of a manifest in its bytes, "" if they are no manifest.
// What an OCI manifest need not say, its fields do.
func (o *outline) infer() string {
	switch {
	case o.MediaType != "":
		return bareType(o.MediaType)
	case o.SchemaVersion == 1 && len(o.Signatures) > 0:
		return dockerSchema1Jws
	case o.SchemaVersion == 1 && len(o.FSLayers) > 0:
		return dockerSchema1
	case o.SchemaVersion != 2:
		return ""
	case o.Manifests != nil:
		return ocispec.MediaTypeImageIndex
	case o.Config != nil:
		return ocispec.MediaTypeImageManifest
	}
	return ""
}

package registrytest

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// store is what the registry holds. Contents are never copied.
type store struct {
	mu    sync.RWMutex // guards repos and everything below it
	repos map[string]*repository
}

type repository struct {
	blobs     map[digest.Digest]Content
	manifests map[digest.Digest]manifest
	tags      map[string]digest.Digest
}

type manifest struct {
	mediaType string
	body      []byte
}

// repository returns the named one, made if need be. The caller holds mu.
func (s *store) repository(name string) *repository {
	r := s.repos[name]
	if r == nil {
		r = &repository{
			blobs:     map[digest.Digest]Content{},
			manifests: map[digest.Digest]manifest{},
			tags:      map[string]digest.Digest{},
		}
		s.repos[name] = r
	}
	return r
}

// PutBlob adds c to a repository and returns its descriptor (with no media
// type). It reads all of c once for the digest.
func (s *Server) PutBlob(repo string, c Content) ocispec.Descriptor {
	d := ocispec.Descriptor{Digest: sum(c), Size: c.Size()}
	s.PutBlobAs(repo, d.Digest, c)
	return d
}

// PutBlobAs adds c under d without looking at c: the way to serve what does not
// match its digest, and to add a large blob whose digest is known.
func (s *Server) PutBlobAs(repo string, d digest.Digest, c Content) {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	s.store.repository(repo).blobs[d] = c
}

// PutManifest adds a manifest, byte for byte, and points tags at it.
func (s *Server) PutManifest(repo, mediaType string, body []byte, tags ...string) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	r := s.store.repository(repo)
	r.manifests[d.Digest] = manifest{mediaType, body}
	for _, tag := range tags {
		r.tags[tag] = d.Digest
	}
	return d
}

// Put adds everything an image consists of and points tags at it.
func (s *Server) Put(repo string, img *Image, tags ...string) {
	for d, c := range img.Blobs {
		s.PutBlobAs(repo, d, c)
	}
	for _, m := range img.Manifests {
		s.PutManifest(repo, m.MediaType, m.Data)
	}
	for _, tag := range tags {
		s.Tag(repo, tag, img.Digest)
	}
}

// Tag points a tag at a manifest, which need not be there.
func (s *Server) Tag(repo, tag string, d digest.Digest) {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	s.store.repository(repo).tags[tag] = d
}

// Delete takes a tag, a manifest or a blob out of a repository.
func (s *Server) Delete(repo, reference string) {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	r := s.store.repository(repo)
	delete(r.tags, reference)
	delete(r.manifests, digest.Digest(reference))
	delete(r.blobs, digest.Digest(reference))
}

func (s *store) blob(repo string, d digest.Digest) (Content, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if r := s.repos[repo]; r != nil {
		c, ok := r.blobs[d]
		return c, ok
	}
	return nil, false
}

func (s *store) manifest(repo, reference string) (manifest, digest.Digest, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := s.repos[repo]
	if r == nil {
		return manifest{}, "", false
	}
	d, ok := r.tags[reference]
	if !ok {
		d = digest.Digest(reference)
	}
	m, ok := r.manifests[d]
	return m, d, ok
}

// tags are sorted, as the specification asks; ok is false for an unknown
// repository.
func (s *store) tags(repo string) (tags []string, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := s.repos[repo]
	if r == nil {
		return nil, false
	}
	return slices.Sorted(maps.Keys(r.tags)), true
}

// referrers is the index of the manifests whose subject is d, of one artifact
// type if given.
func (s *store) referrers(repo string, d digest.Digest, artifactType string) manifest {
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{},
	}
	s.mu.RLock()
	if r := s.repos[repo]; r != nil {
		for _, md := range slices.Sorted(maps.Keys(r.manifests)) {
			desc, subject := r.manifests[md].referrer(md)
			if subject == d && (artifactType == "" || artifactType == desc.ArtifactType) {
				index.Manifests = append(index.Manifests, desc)
			}
		}
	}
	s.mu.RUnlock()
	return manifest{index.MediaType, mustJSON(index)}
}

// referrer describes m as a referrers list does, and names its subject.
func (m manifest) referrer(d digest.Digest) (ocispec.Descriptor, digest.Digest) {
	var in struct {
		ArtifactType string
		Config       struct{ MediaType string }
		Annotations  map[string]string
		Subject      struct{ Digest digest.Digest }
	}
	if json.Unmarshal(m.body, &in) != nil {
		return ocispec.Descriptor{}, ""
	}
	if in.ArtifactType == "" {
		in.ArtifactType = in.Config.MediaType
	}
	return ocispec.Descriptor{
		MediaType:    m.mediaType,
		Digest:       d,
		Size:         int64(len(m.body)),
		ArtifactType: in.ArtifactType,
		Annotations:  in.Annotations,
	}, in.Subject.Digest
}

// fromFallbackTag is the subject of the tag under which clients look for
// referrers where there is no referrers API.
func fromFallbackTag(tag string) (digest.Digest, bool) {
	d := digest.Digest(strings.Replace(tag, "-", ":", 1))
	return d, d.Validate() == nil
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err)) // the package's own types
	}
	return b
}

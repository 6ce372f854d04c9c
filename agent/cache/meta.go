package cache

import (
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Meta is what the cache remembers besides blobs. Losing it loses nothing but
// warmth: every answer may be "don't know", no write can fail.
type Meta struct {
	log *slog.Logger

	mu       sync.Mutex // guards the maps
	tags     map[tagKey]Tag
	types    map[digest.Digest]Manifest
	members  map[memberKey]digest.Digest
	sizes    map[digest.Digest]int64
	fills    map[digest.Digest]Fetched
	accessed map[digest.Digest]int64
}

// Repository is a repository as images name it: Registry "docker.io", Name
// "library/nginx".
type Repository struct{ Registry, Name string }

// Tag is what a tag pointed to when it was last checked.
type Tag struct {
	Descriptor ocispec.Descriptor // media type, digest, size
	Checked    time.Time
}

// Manifest is what has to be known of a manifest to serve it from its bytes.
type Manifest struct{ MediaType string }

// Fetched says where a blob's bytes came from when it was filled.
type Fetched struct {
	When    time.Time
	Size    int64
	Origins map[Origin]int64 // bytes
}

type tagKey struct {
	Repository
	tag string
}

type memberKey struct {
	Repository
	digest digest.Digest
}

type use struct {
	digest digest.Digest
	when   int64
}

func openMeta(_ string, log *slog.Logger) (*Meta, error) {
	return &Meta{log: log,
		tags: map[tagKey]Tag{}, types: map[digest.Digest]Manifest{}, members: map[memberKey]digest.Digest{},
		sizes: map[digest.Digest]int64{}, fills: map[digest.Digest]Fetched{}, accessed: map[digest.Digest]int64{}}, nil
}

func (m *Meta) close() error { return nil }
func (m *Meta) flush()       {}

// Tag returns what repository's tag pointed to.
func (m *Meta) Tag(r Repository, tag string) (Tag, bool) { return lookup(m, m.tags, tagKey{r, tag}) }

// SetTag remembers what repository's tag points to.
func (m *Meta) SetTag(r Repository, tag string, t Tag) { store(m, m.tags, tagKey{r, tag}, t) }

// DeleteTag forgets a tag that upstream no longer has.
func (m *Meta) DeleteTag(r Repository, tag string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.tags, tagKey{r, tag})
}

// Manifest returns what is known of manifest d.
func (m *Meta) Manifest(d digest.Digest) (Manifest, bool) { return lookup(m, m.types, d) }

// SetManifest remembers a manifest's media type.
func (m *Meta) SetManifest(d digest.Digest, man Manifest) { store(m, m.types, d, man) }

// AddMembers remembers that repository's manifest parent lists children, and
// their sizes. A parent of "" is for content that upstream served under the
// repository by digest.
func (m *Meta) AddMembers(r Repository, parent digest.Digest, children ...ocispec.Descriptor) {
	for _, child := range children {
		store(m, m.members, memberKey{r, child.Digest}, parent)
		if child.Size > 0 {
			store(m, m.sizes, child.Digest, child.Size)
		}
	}
}

// Member reports whether d was seen in repository, and in which manifest.
func (m *Meta) Member(r Repository, d digest.Digest) (parent digest.Digest, ok bool) {
	return lookup(m, m.members, memberKey{r, d})
}

// Size returns the size that a manifest gave for d. It is a hint: what it says
// has not been verified.
func (m *Meta) Size(d digest.Digest) (int64, bool) { return lookup(m, m.sizes, d) }

// Fetched returns where d's bytes came from when it was last filled. It
// outlives the blob's eviction.
func (m *Meta) Fetched(d digest.Digest) (Fetched, bool) { return lookup(m, m.fills, d) }

func (m *Meta) recordFill(d digest.Digest, size int64, from map[Origin]int64) {
	store(m, m.fills, d, Fetched{When: time.Now(), Size: size, Origins: maps.Clone(from)})
}

func (m *Meta) recordUse(uses []use) {
	for _, u := range uses {
		store(m, m.accessed, u.digest, u.when)
	}
}

func (m *Meta) committedSize(d digest.Digest) (int64, bool) {
	f, ok := m.Fetched(d)
	return f.Size, ok
}

func (m *Meta) lastUsed(d digest.Digest) (int64, bool) { return lookup(m, m.accessed, d) }

func lookup[K comparable, V any](m *Meta, in map[K]V, key K) (V, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := in[key]
	return v, ok
}

func store[K comparable, V any](m *Meta, in map[K]V, key K, value V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	in[key] = value
}

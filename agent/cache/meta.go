package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Meta is what the cache remembers besides blobs. Losing it costs only warmth: every
// answer may be "don't know", and no write fails or waits for the disk. What is written
// is seen at once and durable some seconds later.
//
// Each kind of fact is bounded; the oldest tenth goes when there are too many, and
// facts that decide who may have a blob that is here go last.
type Meta struct{ db *database }

// Repository is a repository as images name it: Registry "docker.io", Name
// "library/nginx".
type Repository struct{ Registry, Name string }

// Tag is what a tag pointed to when it was last checked.
type Tag struct {
	Descriptor ocispec.Descriptor // media type, digest, size
	Checked    time.Time
}

// Manifest is what must be known about a manifest to serve it from its bytes.
type Manifest struct{ MediaType string }

// Fetched says where a blob's bytes came from when it was filled. Bytes that a
// fill found on disk, left by an earlier process, are in no Origin.
type Fetched struct {
	When    time.Time
	Size    int64
	Origins map[Origin]int64 // bytes
}

// use is when a blob was last read, and its size for the next start to check.
type use struct {
	digest digest.Digest
	when   int64
	size   int64
}

func openMeta(path string, log *slog.Logger) (*Meta, error) {
	db, err := openDatabase(path, log)
	return &Meta{db}, err
}

func (m *Meta) close() error { return m.db.close() }
func (m *Meta) flush()       { m.db.flush() }

// Sync returns once all facts that wait to be written are durable, or the error that kept
// them from it. It waits, until ctx ends, for Run. Earlier losses are reported by Facts
// only.
func (m *Meta) Sync(ctx context.Context) error { return m.Begin().Sync(ctx) }

// Facts are the facts that are written from Begin on.
type Facts struct {
	db     *database
	losses int
}

// Begin is called before the first of some facts by a caller that has to know that all
// of them are durable: a write behind may already have failed when it asks.
func (m *Meta) Begin() Facts { return Facts{m.db, m.db.losses()} }

// Sync returns once all facts that were written before are durable, or with why some may
// be lost. It waits, until ctx ends, for Run.
func (f Facts) Sync(ctx context.Context) error {
	if err := f.db.sync(ctx, f.losses); err != nil {
		return fmt.Errorf("write cache metadata: %w", err)
	}
	return nil
}

// key joins parts so that different parts make different keys. It is nil, which
// is never stored nor found, for anything no registry would use as a name.
func key(parts ...string) []byte {
	joined := strings.Join(parts, "\x00")
	if strings.Count(joined, "\x00") != len(parts)-1 || len(joined) > 1024 {
		return nil
	}
	return []byte(joined)
}

// Tag returns what repository's tag pointed to.
func (m *Meta) Tag(r Repository, tag string) (Tag, bool) {
	var t Tag
	ok := m.decode(bucketTags, key(r.Registry, r.Name, tag), &t)
	if !ok || checkDigest(t.Descriptor.Digest) != nil {
		return Tag{}, false
	}
	return t, true
}

// SetTag remembers what repository's tag points to.
func (m *Meta) SetTag(r Repository, tag string, t Tag) {
	m.encode(bucketTags, key(r.Registry, r.Name, tag), t)
}

// DeleteTag forgets a tag that upstream no longer has.
func (m *Meta) DeleteTag(r Repository, tag string) {
	m.db.delete(bucketTags, key(r.Registry, r.Name, tag))
}

// WalkTags calls f with every remembered tag until it returns false; what was
// remembered in the last seconds may be left out. f must not call the Meta.
func (m *Meta) WalkTags(f func(r Repository, tag string) bool) {
	m.walk(bucketTags, f)
}

// walk is WalkTags for a bucket whose keys are a repository and something in it; longer
// keys are passed over.
func (m *Meta) walk(b bucket, f func(r Repository, in string) bool) {
	m.db.walk(b, func(k []byte) bool {
		parts := strings.Split(string(k), "\x00")
		return len(parts) != 3 || f(Repository{Registry: parts[0], Name: parts[1]}, parts[2])
	})
}

// MaxPins is how many images may be pinned: some 300 bytes each in the file.
const MaxPins = 1000

// PinnedImage is what outlives a restart about an image that is kept on this
// node.
type PinnedImage struct {
	// Digest is that of the version whose blobs are kept, "" while none is
	// whole.
	Digest  digest.Digest `json:"digest,omitempty"`
	Since   time.Time     `json:"since"`
	Checked time.Time     `json:"checked,omitzero"`
	// Public says that the registry showed that version to a request without any
	// credential when it last confirmed it.
	Public bool `json:"public,omitempty"`
	// Signatures are what is kept of that version's, by tag.
	Signatures map[string]digest.Digest `json:"signatures,omitempty"`
	// Command says that somebody asked for it, not only the configuration.
	Command bool `json:"command,omitempty"`
}

// SetPinnedImage remembers a pin under the image's name.
func (m *Meta) SetPinnedImage(name string, p PinnedImage) { m.encode(bucketPins, key(name), p) }

// DeletePinnedImage forgets it.
func (m *Meta) DeletePinnedImage(name string) { m.db.delete(bucketPins, key(name)) }

// PinnedImages returns all that were remembered, perhaps without those of the last
// seconds.
func (m *Meta) PinnedImages() map[string]PinnedImage {
	var names []string
	m.db.walk(bucketPins, func(k []byte) bool {
		names = append(names, string(k))
		return true
	})
	all := map[string]PinnedImage{}
	for _, name := range names {
		var p PinnedImage
		if m.decode(bucketPins, key(name), &p) && (p.Digest == "" || checkDigest(p.Digest) == nil) {
			maps.DeleteFunc(p.Signatures, func(_ string, d digest.Digest) bool { return checkDigest(d) != nil })
			all[name] = p
		}
	}
	return all
}

// Manifest returns what is known of manifest d.
func (m *Meta) Manifest(d digest.Digest) (Manifest, bool) {
	v, ok := m.db.get(bucketManifests, key(string(d)))
	return Manifest{MediaType: string(v)}, ok
}

// SetManifest remembers a manifest's media type.
func (m *Meta) SetManifest(d digest.Digest, man Manifest) {
	m.db.put(bucketManifests, key(string(d)), []byte(man.MediaType))
}

// AddMembers remembers what belongs to a repository: a manifest there lists it, or
// upstream served it there by digest.
func (m *Meta) AddMembers(r Repository, members ...ocispec.Descriptor) {
	for _, d := range members {
		m.db.put(bucketMembers, key(r.Registry, r.Name, string(d.Digest)), nil)
	}
}

// manifestMember ends the key of a member that is a manifest.
const manifestMember = "manifest"

// AddManifests is AddMembers for manifests on the registry's word: it served them as
// such, or they are the images of an index. A blob may have the same bytes, and
// registries look into no blob.
func (m *Meta) AddManifests(r Repository, manifests ...ocispec.Descriptor) {
	m.AddMembers(r, manifests...)
	for _, d := range manifests {
		m.db.put(bucketMembers, key(r.Registry, r.Name, string(d.Digest), manifestMember), nil)
	}
}

// MemberManifest reports whether AddManifests was called, or whether d is a manifest and
// was a member before AddManifests existed: an upgrade must not forget what is cached.
func (m *Meta) MemberManifest(r Repository, d digest.Digest) bool {
	if _, ok := m.db.get(bucketMembers, key(r.Registry, r.Name, string(d), manifestMember)); ok {
		return true
	}
	stamped, ok := m.db.stamped(bucketMembers, key(r.Registry, r.Name, string(d)))
	if !ok || m.db.marks(stamped) {
		return false
	}
	_, ok = m.Manifest(d)
	return ok
}

// saidMember ends the key of a member that the registry itself has told of.
const saidMember = "said"

// SetSaid remembers that the registry itself said that d is in a repository: it gave it
// there, or answered that it has it.
func (m *Meta) SetSaid(r Repository, d digest.Digest) {
	m.db.put(bucketMembers, key(r.Registry, r.Name, string(d), saidMember), nil)
}

// Said reports whether SetSaid was called.
func (m *Meta) Said(r Repository, d digest.Digest) bool {
	_, ok := m.db.get(bucketMembers, key(r.Registry, r.Name, string(d), saidMember))
	return ok
}

// Member reports whether AddMembers was called.
func (m *Meta) Member(r Repository, d digest.Digest) bool {
	_, ok := m.db.get(bucketMembers, key(r.Registry, r.Name, string(d)))
	return ok
}

// WalkMembers calls f with everything that was seen in some repository, until it returns
// false; what was seen in the last seconds may be left out. f must not call the Meta.
func (m *Meta) WalkMembers(f func(r Repository, d digest.Digest) bool) {
	m.walk(bucketMembers, func(r Repository, in string) bool { return f(r, digest.Digest(in)) })
}

// AnyGiver is the giver of what anybody is known to have given.
const AnyGiver = ""

// AddGiver remembers that giver has given all of d, verified.
func (m *Meta) AddGiver(d digest.Digest, giver string) {
	for _, g := range []string{giver, AnyGiver} {
		m.db.put(bucketGivers, key(string(d), g), nil)
	}
}

// Given reports whether AddGiver was called.
func (m *Meta) Given(d digest.Digest, giver string) bool {
	_, ok := m.db.get(bucketGivers, key(string(d), giver))
	return ok
}

// SetShown remembers a repository that anybody may read and that d is in.
func (m *Meta) SetShown(d digest.Digest, r Repository) {
	m.db.put(bucketShown, key(string(d)), key(r.Registry, r.Name))
}

// Shown returns the repository of the last SetShown.
func (m *Meta) Shown(d digest.Digest) (r Repository, ok bool) {
	v, ok := m.db.get(bucketShown, key(string(d)))
	if !ok {
		return r, false
	}
	r.Registry, r.Name, ok = strings.Cut(string(v), "\x00")
	return r, ok
}

// Anyone is the who of a verdict about everybody. It has room of its own: no
// number of other verdicts displaces it.
const Anyone = ""

func verdictsOf(who string) bucket {
	if who == Anyone {
		return bucketPublic
	}
	return bucketVerdicts
}

// SetVerdict remembers that who, a name or hash of somebody, was allowed to
// read the repository just now.
func (m *Meta) SetVerdict(r Repository, who string) {
	m.db.put(verdictsOf(who), key(r.Registry, r.Name, who), binary.BigEndian.AppendUint64(nil, uint64(time.Now().Unix())))
}

// Verdict returns when who was last allowed to read the repository, to the
// second.
func (m *Meta) Verdict(r Repository, who string) (when time.Time, ok bool) {
	v, ok := m.db.get(verdictsOf(who), key(r.Registry, r.Name, who))
	if !ok || len(v) != 8 {
		return time.Time{}, false
	}
	return time.Unix(int64(binary.BigEndian.Uint64(v)), 0), true
}

// DeleteVerdict forgets the verdict: who was refused.
func (m *Meta) DeleteVerdict(r Repository, who string) {
	m.db.delete(verdictsOf(who), key(r.Registry, r.Name, who))
}

// SetImported remembers that an operator gave these tags and digests of a repository
// for everybody to read.
func (m *Meta) SetImported(r Repository, references ...string) {
	repository := key(r.Registry, r.Name)
	generation, ok := m.db.get(bucketImports, repository)
	if !ok {
		generation = binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixNano()))
	}
	m.db.put(bucketImports, repository, generation)
	for _, ref := range references {
		m.db.put(bucketImported, key(r.Registry, r.Name, ref), generation)
	}
}

// Imported reports whether SetImported was called, and DeleteImported not since.
func (m *Meta) Imported(r Repository, reference string) bool {
	generation, ok := m.db.get(bucketImports, key(r.Registry, r.Name))
	if !ok {
		return false
	}
	own, ok := m.db.get(bucketImported, key(r.Registry, r.Name, reference))
	return ok && bytes.Equal(own, generation)
}

// DeleteImported forgets all that was imported of a repository: what is imported from now
// on is another generation.
func (m *Meta) DeleteImported(r Repository) { m.db.delete(bucketImports, key(r.Registry, r.Name)) }

// forgottenFor is how long SetForgotten holds.
const forgottenFor = time.Hour

// SetForgotten remembers for an hour that an operator wants d off this node. It takes no
// fact about d back: whoever fetches it anew may have what he might before.
func (m *Meta) SetForgotten(d digest.Digest) { m.db.put(bucketForgotten, key(string(d)), nil) }

// Forgotten reports whether SetForgotten was called within the last hour.
func (m *Meta) Forgotten(d digest.Digest) bool {
	v, ok := m.db.stamped(bucketForgotten, key(string(d)))
	return ok && time.Since(time.Unix(int64(stamp(v)), 0)).Abs() < forgottenFor // a clock may have been wrong
}

// SetChallenge remembers how the repository asks for credentials: the values of
// WWW-Authenticate.
func (m *Meta) SetChallenge(r Repository, challenge []string) {
	m.encode(bucketChallenge, key(r.Registry, r.Name), challenge)
}

// Challenge returns what SetChallenge stored, nil if nothing.
func (m *Meta) Challenge(r Repository) (challenge []string) {
	m.decode(bucketChallenge, key(r.Registry, r.Name), &challenge)
	return challenge
}

// origin is an entry of Fetched as it is stored: JSON has no struct keys.
type origin struct {
	Kind  OriginKind `json:"kind"`
	Name  string     `json:"name"`
	Bytes int64      `json:"bytes"`
}

type fetched struct {
	When    time.Time `json:"when"`
	Size    int64     `json:"size"`
	Origins []origin  `json:"origins"`
}

// Fetched returns where d's bytes came from when it was last filled. It
// outlives the blob's eviction.
func (m *Meta) Fetched(d digest.Digest) (Fetched, bool) {
	var stored fetched
	if !m.decode(bucketFetched, key(string(d)), &stored) {
		return Fetched{}, false
	}
	f := Fetched{When: stored.When, Size: stored.Size, Origins: map[Origin]int64{}}
	for _, o := range stored.Origins {
		f.Origins[Origin{o.Kind, o.Name}] += o.Bytes
	}
	return f, true
}

func (m *Meta) recordFill(d digest.Digest, size int64, from map[Origin]int64) {
	stored := fetched{When: time.Now(), Size: size}
	for o, n := range from {
		stored.Origins = append(stored.Origins, origin{o.Kind, o.Name, n})
	}
	m.encode(bucketFetched, key(string(d)), stored)
}

func (m *Meta) recordUse(uses []use) {
	for _, u := range uses {
		v := binary.BigEndian.AppendUint64(nil, uint64(u.when))
		m.db.put(bucketUsed, key(string(u.digest)), binary.BigEndian.AppendUint64(v, uint64(u.size)))
	}
}

// lastUse returns what recordUse stored for d.
func (m *Meta) lastUse(d digest.Digest) (u use, ok bool) {
	v, ok := m.db.get(bucketUsed, key(string(d)))
	if !ok || len(v) != 16 {
		return use{}, false
	}
	return use{d, int64(binary.BigEndian.Uint64(v)), int64(binary.BigEndian.Uint64(v[8:]))}, true
}

func (m *Meta) forgetUse(d digest.Digest) { m.db.delete(bucketUsed, key(string(d))) }

// scrubbed and setScrubbed keep the place of the scrub across a restart.
func (m *Meta) scrubbed() string {
	v, _ := m.db.get(bucketState, key("scrubbed"))
	return string(v)
}

func (m *Meta) setScrubbed(place string) { m.db.put(bucketState, key("scrubbed"), []byte(place)) }

func (m *Meta) encode(b bucket, k []byte, v any) {
	if data, err := json.Marshal(v); err == nil {
		m.db.put(b, k, data)
	}
}

func (m *Meta) decode(b bucket, k []byte, v any) bool {
	data, ok := m.db.get(b, k)
	return ok && json.Unmarshal(data, v) == nil
}

package proxy

import (
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/upstream"
)

// member is what may be in a repository, as a manifest or else as a blob. Every manifest
// in it may be had as a blob too. The converse does not hold: what a blob lists would be
// believed, although no registry has checked it.
type member struct {
	blobKey
	manifest bool
}

func memberOf(t upstream.Target, kind Kind, d digest.Digest) member {
	return member{keyOf(t, d), kind == KindManifest}
}

// membershipMemory spares the metadata a write for each hit.
const membershipMemory = time.Hour

// belongs reports whether m is known to be in its repository.
func (a *authorizer) belongs(m member) bool {
	if a.members.has(m) {
		return true
	}
	var ok bool
	if m.manifest {
		ok = a.meta.MemberManifest(m.Repository, m.digest)
	} else {
		ok = a.meta.Member(m.Repository, m.digest)
	}
	if !ok {
		ok = a.pins(m.Repository, Question{Reference: m.digest.String(), Blob: !m.manifest}) // by its manifest
	}
	if ok {
		a.members.put(m, struct{}{}, membershipMemory)
	}
	return ok
}

// belongsTo is belongs for what a question names by digest.
func (a *authorizer) belongsTo(t upstream.Target, q Question) bool {
	d, err := digest.Parse(q.Reference)
	return err == nil && a.belongs(memberOf(t, q.kind(), d))
}

// enlist notes that the registry says that d is in a repository, as that kind.
func (a *authorizer) enlist(t upstream.Target, kind Kind, d ocispec.Descriptor) {
	m := memberOf(t, kind, d.Digest)
	if d.Digest.Validate() != nil || a.belongs(m) {
		return
	}
	add := a.meta.AddMembers
	if m.manifest {
		add = a.meta.AddManifests
	}
	add(m.Repository, d)
	a.members.put(m, struct{}{}, membershipMemory)
}

// enlistAsked enlists what a question names by digest.
func (a *authorizer) enlistAsked(t upstream.Target, q Question) {
	if d, err := digest.Parse(q.Reference); err == nil {
		a.enlist(t, q.kind(), ocispec.Descriptor{Digest: d})
	}
}

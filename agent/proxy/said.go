package proxy

import (
	"context"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// That a manifest of a repository lists a blob is no proof that the registry has the
// blob there: distribution, and whatever is built on it, gives under manifests/ what was
// pushed under blobs/, and has looked into none of that. So what is here for another
// repository's sake is asked for once in each that lists it (A13).

// said reports whether the registry itself has told that something is in its repository,
// or is being asked for it there by a fill of this node.
func (a *authorizer) said(key blobKey) bool {
	if a.told.has(key) {
		return true
	}
	if !a.meta.Said(cache.Repository{Registry: key.registry, Name: key.repository}, key.digest) {
		return false
	}
	a.told.put(key, struct{}{}, membershipMemory)
	return true
}

// say notes the registry's word.
func (a *authorizer) say(key blobKey) {
	repository := cache.Repository{Registry: key.registry, Name: key.repository}
	if !a.meta.Said(repository, key.digest) {
		a.meta.SetSaid(repository, key.digest)
	}
	a.told.put(key, struct{}{}, membershipMemory)
	if a.wasPublic(repository) {
		a.show(repository, ocispec.Descriptor{Digest: key.digest})
	}
}

// sayAsked notes the registry's yes to a question.
func (a *authorizer) sayAsked(t upstream.Target, q Question) {
	if d, err := digest.Parse(q.Reference); err == nil {
		a.say(keyOf(t, d))
	}
}

// unproven reports whether the registry's own word is needed for something: it is around
// already, not because of this repository, and not for everybody to have. A registry that
// is never asked gives no word.
func (a *authorizer) unproven(key blobKey, around func(digest.Digest) bool) bool {
	if a.said(key) || !a.upstream.Policy(key.registry).Contact() {
		return false
	}
	if _, public := a.shown(key.digest); public {
		return false
	}
	return around(key.digest)
}

// here reports whether this node's cache has d, or is getting it.
func (p *Proxy) here(d digest.Digest) bool {
	return p.cache.Has(d) || slices.ContainsFunc(p.cache.Fills(), func(f cache.Progress) bool { return f.Digest == d })
}

// willAsk notes, before a fill that is not there yet, that it will ask for d in the
// repository: those who join it there need no other word. undo takes that back.
func (p *Proxy) willAsk(key blobKey) (undo func()) {
	if p.auth.said(key) || p.here(key.digest) {
		return func() {}
	}
	p.auth.told.put(key, struct{}{}, membershipMemory)
	return func() { p.auth.told.forget(key) }
}

// around is here for a home, which leads others to what other nodes have.
func (p *Proxy) around(d digest.Digest) bool { return p.here(d) || p.swarm.Holds(d) }

// Fetch asks for d in its repository, and what comes is the registry's word.
func (s fill) Fetch(ctx context.Context, f *cache.Fill) error {
	if s.held { // on a node's word
		return s.fetch(ctx, f)
	}
	key := keyOf(s.t, f.Digest())
	err := s.fetch(ctx, f)
	if err != nil {
		s.p.auth.told.forget(key)
		return err
	}
	s.p.auth.say(key)
	return nil
}

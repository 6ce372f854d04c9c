package proxy

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// That a manifest of a repository lists a blob is no proof that the registry has the
// blob there: distribution, and whatever is built on it, serves under manifests/ what
// was pushed under blobs/, unchecked. So for what is here because of another repository
// the registry is asked once in each repository that lists it (A13).

// said reports whether the registry itself has said that something is in the repository,
// or a fill of this node is asking for it there now.
func (a *authorizer) said(key blobKey) bool {
	if a.told.has(key) || a.asking.has(key) {
		return true
	}
	// Last: a fill that was asking a moment ago has left its answer here.
	if !a.meta.Said(key.Repository, key.digest) {
		return false
	}
	a.told.put(key, struct{}{}, membershipMemory)
	return true
}

// counted counts what is under way, by key.
type counted struct {
	mu    sync.Mutex // guards count
	count map[blobKey]int
}

// begin counts key until end is called.
func (c *counted) begin(key blobKey) (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.count == nil {
		c.count = map[blobKey]int{}
	}
	c.count[key]++
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.count[key]--; c.count[key] == 0 {
			delete(c.count, key)
		}
	}
}

func (c *counted) has(key blobKey) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.count[key] > 0
}

// say notes the registry's word, which it gave to t.
func (a *authorizer) say(t upstream.Target, d digest.Digest) {
	key := keyOf(t, d)
	if !a.meta.Said(key.Repository, d) {
		a.meta.SetSaid(key.Repository, d)
	}
	a.told.put(key, struct{}{}, membershipMemory)
	if a.shows(t) {
		a.show(key.Repository, ocispec.Descriptor{Digest: d})
	}
}

// shows reports whether anybody may have what the registry gives t: that the repository was
// public is no word on what a credential has opened since (A8).
func (a *authorizer) shows(t upstream.Target) bool {
	return t.Anonymous && a.wasPublic(repositoryOf(t))
}

// sayAsked notes the registry's yes to a question.
func (a *authorizer) sayAsked(t upstream.Target, q Question) {
	if d, err := digest.Parse(q.Reference); err == nil {
		a.say(t, d)
	}
}

// unproven reports whether the registry's own word is needed for something that a caller
// asks for: it is around already, not because of this repository now or soon, and not
// everybody may have it.
func (a *authorizer) unproven(key blobKey, around func(digest.Digest) bool) bool {
	// In this order: a fill names its repository before it puts anything around, and all
	// of that can happen between two of these checks.
	return around(key.digest) && !a.willAsk.has(key) && a.unsaid(key)
}

// unsaid reports whether what is around still needs the registry's own word. A registry
// that must not be asked gives none.
func (a *authorizer) unsaid(key blobKey) bool {
	if a.said(key) || !a.upstream.Policy(key.Registry).Contact() {
		return false
	}
	_, public := a.shown(key.digest)
	return !public
}

// proven returns nil if a caller that was let in may have what was opened for it. That
// may have changed hands: a caller whose fill fails gets the next one, which may be for
// the repository of another caller that waited too.
func (a *authorizer) proven(ctx context.Context, acc access, kind Kind, d digest.Digest) error {
	if !a.here(d) || !a.unsaid(keyOf(acc.target, d)) {
		return nil
	}
	return a.ask(ctx, &acc, kind, Question{Reference: d.String(), Blob: kind == KindBlob, Known: true, Stored: true})
}

// here reports whether this node's cache has any of d, or is getting it.
func (a *authorizer) here(d digest.Digest) bool { return a.cache.Has(d) || a.cache.Begun(d) }

// willAsk notes, before a fill begins, that it will ask for d in the repository:
// callers that come for d there until it does need no other word. end takes that
// back.
func (p *Proxy) willAsk(key blobKey) (end func()) {
	if p.auth.said(key) || p.auth.here(key.digest) {
		return func() {}
	}
	return p.auth.willAsk.begin(key)
}

// around is here for a home, which leads others to what other nodes have.
func (p *Proxy) around(d digest.Digest) bool { return p.auth.here(d) || p.swarm.Holds(d) }

// shown reports whether anybody may have d, in whatever repository: it is in a
// public one, whose registry has given it.
func (a *authorizer) shown(d digest.Digest) (registry string, ok bool) {
	r, ok := a.meta.Shown(d)
	return r.Registry, ok && a.meta.Given(d, r.Registry) && a.wasPublic(r)
}

// show notes what a public repository holds.
func (a *authorizer) show(r cache.Repository, blobs ...ocispec.Descriptor) {
	for _, b := range blobs {
		if _, ok := a.shown(b.Digest); !ok {
			a.meta.SetShown(b.Digest, r)
		}
	}
}

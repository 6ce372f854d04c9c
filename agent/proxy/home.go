package proxy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// What a node does as home of a repository or blob, for other nodes. They are
// trusted to have authorized their own callers; this node still asks the registry
// before private bytes leave it (A10).

// homePatience is how long a registry may take to say what a tag stands for
// before another node is told what is known here: part of the five seconds that
// its client waits. admitPatience is shorter: the asker waits for a home to
// answer, and takes one that does not for dead.
const (
	homePatience  = 2 * time.Second
	admitPatience = time.Second
)

var (
	errDeniedHere   = errors.New("this repository is denied here")
	errNotKnownHere = errors.New("this is not known here")
	errNotNode      = errors.New("this node has no credentials of its own for this repository")
)

// homeAccess returns what memory alone knows of the caller for which another node
// asks this one. t has the caller's Authorization, or is Anonymous; if it is
// neither, the other node opens the repository with its node credentials, and this
// one must have some too. An error is final.
func (p *Proxy) homeAccess(t upstream.Target) (access, error) {
	policy := p.upstream.Policy(t.Registry)
	acc := access{target: t, relay: true}
	if !policy.Allows(t.Repository) {
		return acc, errDeniedHere
	}
	switch {
	case t.Authorization != "":
		acc.who = p.auth.secret.sum(t.Authorization)
	case t.Anonymous:
	case policy.NodeAuth(t.Repository):
		acc.who = theNode
	default:
		return acc, errNotNode
	}
	if v, ok := p.auth.verdicts.get(acc.key()); ok {
		acc.decision, acc.said = v.decision, v.said
		if !v.decision.allows() {
			return acc, v.refusal
		}
	}
	return acc, nil
}

// ResolveFor asks the registry what a tag stands for, on behalf of another node's
// caller. When the registry cannot be asked, it says what this node knows (stale), if
// that caller may know.
func (p *Proxy) ResolveFor(ctx context.Context, t upstream.Target, tag string, accept []string) (desc ocispec.Descriptor, stale bool, err error) {
	acc, err := p.homeAccess(t)
	if err != nil {
		return desc, false, err
	}
	last, known := p.knownFor(acc, tag, accept)
	if known {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, homePatience)
		defer cancel()
	}
	desc, err = p.upstream.Resolve(ctx, t, tag, accept)
	if known && (mayServeStale(err) || ctx.Err() != nil) {
		return last, true, nil
	}
	err = p.auth.withChallenge(ctx, t, tag, err)
	p.auth.learn(&acc, Question{Reference: tag}, 0, err)
	if err == nil {
		p.auth.enlist(t, KindManifest, desc)
		p.auth.say(t, desc.Digest)
	}
	return desc, false, err
}

// RememberedFor tells a home what this node knows of a tag, if the home's caller
// would be told that here. It asks nobody.
func (p *Proxy) RememberedFor(t upstream.Target, tag string, accept []string) (ocispec.Descriptor, error) {
	acc, err := p.homeAccess(t)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	last, known := p.knownFor(acc, tag, accept)
	if !known {
		return ocispec.Descriptor{}, errNotKnownHere
	}
	return last, nil
}

// knownFor is what a tag stands for by memory, for another node's caller that accepts
// these types, if the caller would be told that while the registry cannot be asked.
func (p *Proxy) knownFor(acc access, tag string, accept []string) (ocispec.Descriptor, bool) {
	last, known := p.lastKnown(tagKey{Repository: acc.repository(), tag: tag, lists: acceptsLists(accept)})
	_, in := p.auth.stands(acc, last.desc.Digest.String())
	return last.desc, known && in && acceptable(accept, last.desc.MediaType)
}

// MayByMemory is MayFor by what is known here alone: that the repository was public, or
// that q is about what was imported. A verdict on a credential is not passed on: going
// from node to node, it would never end.
func (p *Proxy) MayByMemory(t upstream.Target, q Question) error {
	acc, err := p.homeAccess(t)
	switch {
	case err != nil:
		return err
	case !q.Known && !p.auth.belongsTo(t, q), q.Stored && !p.auth.said(keyOf(t, digest.Digest(q.Reference))):
		return errNotKnownHere
	}
	return p.auth.wasOpen(acc.repository(), q.Reference)
}

// MayFor asks the registry whether another node's caller may read what q is about;
// nil is yes, and age how long ago the registry said so. What offline allows here is
// no yes: the other node would take it for the registry's.
func (p *Proxy) MayFor(ctx context.Context, t upstream.Target, q Question) (age time.Duration, err error) {
	acc, err := p.homeAccess(t)
	if err != nil {
		return 0, err
	}
	known := q.Known || p.auth.belongsTo(t, q)
	key := keyOf(t, digest.Digest(q.Reference))
	stored := p.deliverable.has(key) || q.Known && p.auth.meta.Said(acc.repository(), key.digest)
	if acc.told() && (known && !q.Stored || q.Stored && stored) {
		return acc.age(), nil
	}
	open := p.auth.wasOpen(acc.repository(), q.Reference)
	fallback := !errors.Is(open, errNotKnownHere) && known && !q.Stored
	if fallback {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, homePatience/2)
		defer cancel()
	}
	_, err = p.auth.homeAsks.do(ctx, askKey{acc.key(), q}, func(ctx context.Context) (struct{}, error) {
		ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
		defer cancel()
		err := p.auth.askRegistry(ctx, t, q)
		p.auth.learn(&acc, q, 0, err)
		if err == nil && q.Stored {
			p.deliverable.put(key, struct{}{}, deliverableMemory)
		}
		return struct{}{}, err
	})
	if fallback && mayServeStale(err) {
		err = open
	}
	return 0, err
}

// Keep fetches a blob from other nodes, to hold a copy for them, if this node may have it
// by itself: t has no client's credential, and unlike in Admit nobody's word stands for a
// verdict. It returns once the blob is committed.
func (p *Proxy) Keep(ctx context.Context, t upstream.Target, kind Kind, d digest.Digest, size int64) error {
	if err := p.mayKeep(ctx, t, kind, d); err != nil {
		return err
	}
	if p.Listed(t, d) == 0 {
		p.list(t, ocispec.Descriptor{Digest: d, Size: size})
	}
	r, err := p.cache.Open(ctx, d, fill{p: p, t: t, kind: kind, giver: p.giver(t, d), held: true})
	if err != nil {
		return err
	}
	defer r.Close()
	if err := p.cache.Settled(ctx, d); err != nil {
		return err
	}
	if !p.cache.Has(d) {
		return fmt.Errorf("keep %s: %w", d, errNotKept)
	}
	if kind == KindManifest { // from then on what it lists belongs to the repository
		_, err = p.manifest(ctx, t, d)
	}
	return err
}

// mayKeep asks whether this node may have d by itself, and notes that it belongs to the
// repository, so that it can ask others in turn.
func (p *Proxy) mayKeep(ctx context.Context, t upstream.Target, kind Kind, d digest.Digest) error {
	acc, err := p.homeAccess(t)
	if err == nil && !acc.decision.allows() {
		err = p.look(ctx, &acc, kind, d, false)
	}
	if err != nil && !errors.Is(err, ErrImported) {
		return err
	}
	p.auth.enlist(t, kind, ocispec.Descriptor{Digest: d})
	return nil
}

// KeepTag remembers for others what a tag stood for, unless this node knows the tag
// already. The registry is not asked: what it says now may be an image that nobody has
// yet.
func (p *Proxy) KeepTag(ctx context.Context, t upstream.Target, tag string, desc ocispec.Descriptor) error {
	if err := p.mayKeep(ctx, t, KindManifest, desc.Digest); err != nil {
		return err
	}
	key := tagKey{Repository: repositoryOf(t), tag: tag, lists: true}
	if _, known := p.KnownTag(key.Repository, tag); known {
		p.swarm.Remember(t, tag)
		return nil
	}
	p.keepTag(key, cache.Tag{Descriptor: desc})
	if !acceptsLists([]string{desc.MediaType}) {
		p.keepTag(key.other(), cache.Tag{Descriptor: desc})
	}
	return nil
}

// errNotKept is the error of a fill whose end nobody else heard of.
var errNotKept = errors.New("it could not be had, or not be stored")

// Admit reports, as home of a blob, whether another node's caller may read the
// repository: nil is yes. What the repository's home has found out before costs the
// registry nothing.
func (p *Proxy) Admit(ctx context.Context, t upstream.Target, kind Kind, d digest.Digest) error {
	acc, err := p.homeAccess(t)
	if err != nil {
		return err
	}
	key := keyOf(t, d)
	unproven := p.auth.unproven(key, p.around)
	if acc.decision.allows() && !unproven {
		p.auth.enlist(t, kind, ocispec.Descriptor{Digest: d}) // so that this node can ask others to keep it
		return nil
	}
	err = p.look(ctx, &acc, kind, d, unproven)
	if errors.Is(err, ErrImported) {
		return nil
	}
	if err != nil && !final(err) && (acc.decision.allows() || t.Anonymous || p.auth.offline(&acc, d.String())) {
		// On a bad network nobody may know in time. Then the asker's word that the
		// registry shows the repository to anyone counts: refusing would drive every
		// node to the registry.
		return nil
	}
	return err
}

// look asks the repository's home whether what acc stands for may read the repository
// that d is in, as another node says.
func (p *Proxy) look(ctx context.Context, acc *access, kind Kind, d digest.Digest, stored bool) error {
	ctx, cancel := context.WithTimeout(ctx, admitPatience)
	defer cancel()
	q := Question{Reference: d.String(), Blob: kind == KindBlob, Known: true, Stored: stored}
	age, err := p.swarm.May(ctx, acc.target, q)
	p.auth.learn(acc, q, age, err)
	return err
}

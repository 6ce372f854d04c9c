package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// Swarm gets what other nodes have, or what the home of a digest may fetch
// for all of them.
type Swarm interface {
	// Fetch fills f. kind tells a manifest from a blob, which registries
	// serve at different endpoints. An error that is final for upstream too
	// (see upstream.IsNotFound, IsUnauthorized) ends the fill; after any other
	// the node asks upstream itself, unless what f has is known to be wrong
	// (cache.ErrDigestMismatch).
	Fetch(ctx context.Context, t upstream.Target, kind Kind, f *cache.Fill) error
	// FetchHeld is Fetch from other nodes alone: this node does not turn to the
	// registry.
	FetchHeld(ctx context.Context, t upstream.Target, kind Kind, f *cache.Fill) error
	// Through is a blob from the byte at off on, from other nodes, for one that has no room
	// for it. It returns once the first byte is here; that ends with ctx. Whether all of it
	// is right is the caller's to check.
	Through(ctx context.Context, t upstream.Target, kind Kind, d digest.Digest, off int64) (body io.ReadCloser, size int64, err error)
	// Resolve asks the home of the repository, which collapses and caches. It returns a
	// *StaleTag if the registry cannot be asked and some node knows what it said.
	Resolve(ctx context.Context, t upstream.Target, tag string, accept []string) (ocispec.Descriptor, error)
	// May asks that home whether t may read what q is about: nil is yes, and age how
	// long ago the registry said so. A refusal is an *upstream.Error with the
	// registry's challenge; ErrImported is a yes to this question alone; other
	// errors mean that nobody knows.
	May(ctx context.Context, t upstream.Target, q Question) (age time.Duration, err error)
	// Holds reports whether another node says that it has d. It asks nobody.
	Holds(d digest.Digest) bool
	// Coming reports whether Fetch is getting d at this moment: bytes come, or go to
	// the node that passes them on, or that has asked the registry. Ours: that node is
	// this one.
	Coming(d digest.Digest) (coming, ours bool)
	// Remember announces that this node knows what a tag stood for, which other
	// nodes may want to know while the registry cannot be asked; Forget takes that
	// back.
	Remember(t upstream.Target, tag string)
	Forget(t upstream.Target, tag string)
}

// open is the one chain of sources: this cache, the runtime's store, a fill.
// A committed blob goes first because it is verified and open already.
func (p *Proxy) open(ctx context.Context, t upstream.Target, d digest.Digest, kind Kind) (content, error) {
	if !p.cache.Has(d) {
		if c := p.openRuntime(t, d); c != nil {
			return c, nil
		}
	}
	return p.openCache(ctx, t, d, kind)
}

// openCache opens the cache's blob, or what fills it.
func (p *Proxy) openCache(ctx context.Context, t upstream.Target, d digest.Digest, kind Kind) (content, error) {
	if p.tooLarge(t, d) {
		return nil, cache.ErrNoRoom
	}
	defer p.willAsk(keyOf(t, d))()
	r, err := p.cache.Open(ctx, d, fill{p: p, t: t, kind: kind, giver: p.giver(t, d)})
	if errors.Is(err, cache.ErrForeign) {
		p.log.Debug("here, but not from this registry", "digest", d, "registry", t.Registry, "repository", t.Repository)
	}
	if errors.Is(err, cache.ErrInvalidDigest) { // an algorithm that the cache does not keep
		return nil, fmt.Errorf("%w: %w", cache.ErrNoRoom, err)
	}
	if err != nil {
		return nil, err
	}
	return cached{r}, nil
}

// tooLarge reports whether d is known to exceed the cache's room, so that no request is
// needed to find out.
func (p *Proxy) tooLarge(t upstream.Target, d digest.Digest) bool {
	size := p.Listed(t, d)
	if size == 0 || p.auth.here(d) {
		return false
	}
	room, err := p.cache.Room()
	return err == nil && size > room
}

// fill gets a missing blob: from the swarm, which knows whether this node is
// the home, and from upstream if that fails.
type fill struct {
	p     *Proxy
	t     upstream.Target
	kind  Kind
	giver string
	held  bool // only what other nodes have: a copy is worth no byte of an uplink
}

var _ cache.Given = fill{}

func (s fill) Giver() string { return s.giver }

// Fetch asks for d in its repository, and what comes is the registry's word.
func (s fill) Fetch(ctx context.Context, f *cache.Fill) error {
	if s.held { // on a node's word
		return s.fetch(ctx, f)
	}
	key := keyOf(s.t, f.Digest())
	defer s.p.auth.asking.begin(key)()
	if err := s.fetch(ctx, f); err != nil {
		return err
	}
	s.p.auth.say(s.t, f.Digest())
	return nil
}

func (s fill) fetch(ctx context.Context, f *cache.Fill) error {
	p, t := s.p, s.t
	if s.held {
		err := p.swarm.FetchHeld(ctx, t, s.kind, f)
		if err == nil || ctx.Err() != nil || errors.Is(err, cache.ErrDigestMismatch) || !p.pulled(f.Digest()) {
			return err
		}
	}
	if p.swarm != nil {
		err := p.swarm.Fetch(ctx, t, s.kind, f)
		if err == nil || final(err) || errors.Is(err, cache.ErrDigestMismatch) || ctx.Err() != nil {
			return err
		}
		p.log.Debug("swarm gave up on a blob", "digest", f.Digest(), "registry", t.Registry, "err", err)
	}
	return p.FetchUpstream(ctx, t, s.kind, f.Digest(), f.Writer(cache.Origin{Kind: cache.FromUpstream, Name: t.Registry}))
}

// pulled reports whether a fill has a reader other than the one that keeps a copy: then
// it is a pull like any other.
func (p *Proxy) pulled(d digest.Digest) bool {
	return slices.ContainsFunc(p.cache.Fills(), func(f cache.Progress) bool { return f.Digest == d && f.Readers > 1 })
}

// final reports whether another source would fail with the same error.
func final(err error) bool {
	return errors.Is(err, ErrImported) || upstream.IsNotFound(err) || upstream.IsUnauthorized(err) || errors.Is(err, cache.ErrNoRoom) || errors.Is(err, cache.ErrClosed)
}

// FetchUpstream fetches a blob from the registry alone, as a home does for
// the swarm, and every node when there is no swarm.
func (p *Proxy) FetchUpstream(ctx context.Context, t upstream.Target, kind Kind, d digest.Digest, into upstream.Sink) error {
	if kind != KindManifest {
		return p.upstream.Fetch(ctx, t, d, sizeNoter{into, p, keyOf(t, d)})
	}
	desc, body, err := p.upstream.Manifest(ctx, t, d.String(), acceptAll)
	if err != nil {
		return err
	}
	if o, err := parseOutline(body); err == nil {
		p.cache.Meta().SetManifest(d, cache.Manifest{MediaType: o.mediaType(desc.MediaType)})
	}
	if err := into.SetSize(int64(len(body))); err != nil {
		return err
	}
	_, err = into.WriteAt(body, 0)
	return err
}

// sizeNoter is a sink that keeps the size of a blob for which there is no room, for the
// caller that passes it through next.
type sizeNoter struct {
	upstream.Sink
	p   *Proxy
	key blobKey
}

// SetSize is the sink's.
func (s sizeNoter) SetSize(n int64) error {
	err := s.Sink.SetSize(n)
	if errors.Is(err, cache.ErrNoRoom) && !s.p.listed.has(s.key) {
		s.p.listed.put(s.key, n, passMemory)
	}
	return err
}

// passMemory is how long a registry's word alone counts for a size; the size in a manifest
// that lists the blob takes precedence.
const passMemory = time.Minute

// Prefetch starts the fill of a blob that nobody asked this node for, or joins
// it, and does not wait: this is what a home does for other nodes. They may have
// seen a manifest that this node has not: size is what it says, 0 if unknown, see
// Listed. cache.ErrNoRoom says that another node has to be the home.
func (p *Proxy) Prefetch(t upstream.Target, kind Kind, d digest.Digest, size int64) error {
	if p.Listed(t, d) == 0 {
		p.list(t, ocispec.Descriptor{Digest: d, Size: size})
	}
	if p.tooLarge(t, d) {
		return cache.ErrNoRoom
	}
	return p.background.run(func(ctx context.Context) {
		if err := p.prefetch(ctx, t, kind, d); err != nil {
			p.log.Debug("prefetch failed", "digest", d, "registry", t.Registry, "repository", t.Repository, "err", err)
		}
	})
}

// prefetch reads a manifest, even if it comes from other nodes, so that this node knows
// its kind and what it lists.
func (p *Proxy) prefetch(ctx context.Context, t upstream.Target, kind Kind, d digest.Digest) error {
	if kind == KindManifest {
		m, err := readAll(ctx, d, func() (content, error) { return p.open(ctx, t, d, kind) })
		if err != nil {
			return err
		}
		return p.learn(t, &m)
	}
	c, err := p.open(ctx, t, d, kind)
	if err != nil {
		return err
	}
	return c.Close()
}

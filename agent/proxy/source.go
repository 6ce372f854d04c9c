package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// RuntimeStore is the container runtime's own content store, as a source that
// costs nothing and is not stored twice.
type RuntimeStore interface {
	// Open returns the blob the runtime holds. The error wraps
	// fs.ErrNotExist when it holds none.
	Open(d digest.Digest) (RuntimeBlob, error)
	// Has is Open without opening.
	Has(d digest.Digest) bool
}

// RuntimeBlob is one open blob of a RuntimeStore. Its ReadAt never returns the
// last bytes before the blob's digest has matched; Ready waits until it can.
type RuntimeBlob interface {
	Ready(ctx context.Context, off int64) error
	ReadAt(p []byte, off int64) (int, error)
	Close() error
	Size() int64
	// File is the blob's file, with an offset of its own, once its digest has
	// matched; ok is false until then.
	File() (file *os.File, ok bool)
}

// Swarm brings what other nodes have, or what the home of a digest may fetch
// for all of them.
type Swarm interface {
	// Fetch fills f. kind tells a manifest from a blob, which registries
	// serve at different endpoints. An error that is final for upstream too
	// (see upstream.IsNotFound, IsUnauthorized) ends the fill; after any other
	// the node asks upstream itself, unless what f has is known to be wrong
	// (cache.ErrDigestMismatch).
	Fetch(ctx context.Context, t upstream.Target, kind Kind, f *cache.Fill) error
	// FetchHeld is Fetch from other nodes alone: this one does not turn to the registry.
	FetchHeld(ctx context.Context, t upstream.Target, kind Kind, f *cache.Fill) error
	// Resolve asks the home of the repository, which collapses and caches. It returns a
	// *StaleTag if the registry cannot be asked and some node knows what it said.
	Resolve(ctx context.Context, t upstream.Target, tag string, accept []string) (ocispec.Descriptor, error)
	// May asks that home whether t may read what q is about: nil is yes. A refusal
	// is an *upstream.Error with the registry's challenge, ErrImported a yes to this
	// question alone; other errors mean that nobody knows.
	May(ctx context.Context, t upstream.Target, q Question) error
	// Holds reports whether another node says that it has d. It asks nobody.
	Holds(d digest.Digest) bool
	// Coming reports whether Fetch is getting d at this moment: bytes come, or go to
	// the node that passes them on, or that has asked the registry. Ours: that node is
	// this one.
	Coming(d digest.Digest) (coming, ours bool)
	// Remember says that this node knows what a tag stood for, which other nodes may
	// want to know while the registry cannot be asked; Forget, that it does not.
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

// tooLarge reports whether d is known to be more than the cache has room for: then it need
// not be asked for to find out.
func (p *Proxy) tooLarge(t upstream.Target, d digest.Digest) bool {
	size := p.Listed(t, d)
	if size == 0 || p.here(d) {
		return false
	}
	room, err := p.cache.Room()
	return err == nil && size > room
}

func (p *Proxy) openRuntime(t upstream.Target, d digest.Digest) content {
	if p.runtime == nil || !p.mayTakeRuntime(t, d) {
		return nil
	}
	blob, err := p.runtime.Open(d)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			p.log.Debug("runtime's store cannot give a blob", "digest", d, "err", err)
		}
		return nil
	}
	return held{blob}
}

// mayTakeRuntime reports whether a caller who may read what the target's registry
// gives may also have the runtime's copy of d. If it is known which registry d
// came from, that must be the target's. If nothing is known, the proxy does as
// containerd does, which lets all images of the node share a blob.
func (p *Proxy) mayTakeRuntime(t upstream.Target, d digest.Digest) bool {
	return p.gives(d, t.Registry) || !p.cache.Meta().Given(d, cache.AnyGiver)
}

// RuntimeGiver is the name under which the metadata keeps that the container
// runtime has a blob from a registry. The runtime does not tell its port.
func RuntimeGiver(registry string) string {
	if host, _, err := net.SplitHostPort(registry); err == nil {
		registry = host
	}
	return "runtime " + registry
}

// Gives reports whether a caller who may read from registry may have d: that
// registry gave this node these bytes once, or they are public. It looks at what
// is remembered and asks nobody.
func (p *Proxy) Gives(d digest.Digest, registry string) bool {
	if p.cache.GivenBy(d, registry) || p.cache.GivenBy(d, RuntimeGiver(registry)) {
		return true
	}
	_, shown := p.auth.shown(d)
	return shown
}

// copyGiver is the giver of what was copied from the runtime's store for images of a
// registry, where nobody knows which registry gave it to the runtime: callers on this
// node have it as they had it from there, other nodes do not.
func copyGiver(registry string) string { return "copied " + registry }

// gives is Gives for callers on this node.
func (p *Proxy) gives(d digest.Digest, registry string) bool {
	return p.Gives(d, registry) || p.cache.GivenBy(d, copyGiver(registry))
}

// Holds reports whether d is in this node's cache, committed, for callers on this node
// who may read from registry: the runtime's store does not count.
func (p *Proxy) Holds(d digest.Digest, registry string) bool {
	return p.cache.Has(d) && p.gives(d, registry)
}

// CopyRuntime copies d from the runtime's store, where it may be deleted, into the
// cache, on behalf of somebody who may read from registry and has found d there.
// The error wraps fs.ErrNotExist if the runtime has nothing for him, and
// cache.ErrNoRoom if the cache cannot take it. It waits for the commit.
func (p *Proxy) CopyRuntime(ctx context.Context, registry string, d digest.Digest) error {
	t := upstream.Target{Registry: registry}
	if p.runtime == nil || !p.runtime.Has(d) || !p.mayTakeRuntime(t, d) {
		return fmt.Errorf("copy %s from the runtime's store: %w", d, fs.ErrNotExist)
	}
	giver := copyGiver(registry)
	for _, known := range []string{registry, RuntimeGiver(registry)} {
		if p.cache.GivenBy(d, known) {
			giver = known
		}
	}
	r, err := p.cache.Open(ctx, d, runtimeCopy{p.runtime, d, giver})
	if err == nil {
		err = errors.Join(r.Close(), p.cache.Settled(ctx, d), r.Err())
	}
	if err != nil {
		return fmt.Errorf("copy %s from the runtime's store: %w", d, err)
	}
	return nil
}

// runtimeCopy fills a blob of the cache from the runtime's store.
type runtimeCopy struct {
	store  RuntimeStore
	digest digest.Digest
	giver  string
}

var _ cache.Given = runtimeCopy{}

func (s runtimeCopy) Giver() string { return s.giver }

func (s runtimeCopy) Fetch(ctx context.Context, f *cache.Fill) error {
	blob, err := s.store.Open(s.digest)
	if err != nil {
		return err
	}
	defer func() { _ = blob.Close() }() // was only read
	w := f.Writer(cache.Origin{Kind: cache.FromRuntime})
	if err := w.SetSize(blob.Size()); err != nil {
		return err
	}
	buf := make([]byte, copyBlock)
	for {
		start, end, missing := w.Missing(0)
		if !missing || ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := blob.Ready(ctx, start); err != nil {
			return err
		}
		n, err := blob.ReadAt(buf[:min(int64(len(buf)), end-start)], start)
		if n == 0 && err != nil {
			return err
		}
		if _, err := w.WriteAt(buf[:n], start); err != nil {
			return err
		}
	}
}

// copyBlock is the buffer of one copy.
const copyBlock = 256 << 10

// lookup is cache.Lookup, limited to what may be had for the target's registry.
func (p *Proxy) lookup(t upstream.Target, d digest.Digest) (*cache.Reader, bool) {
	if !p.gives(d, t.Registry) {
		return nil, false
	}
	return p.cache.Lookup(d)
}

// giver is the name under which the cache is asked for d; it hits only if that
// giver gave d. It is the target's registry, unless d is here and gives allows it
// for another reason: then it is that other giver.
func (p *Proxy) giver(t upstream.Target, d digest.Digest) string {
	if !p.cache.Has(d) {
		return t.Registry
	}
	for _, giver := range []string{t.Registry, RuntimeGiver(t.Registry), copyGiver(t.Registry)} {
		if p.cache.GivenBy(d, giver) {
			return giver
		}
	}
	if registry, ok := p.auth.shown(d); ok {
		return registry
	}
	return t.Registry
}

// errRuntime marks what is wrong with the runtime's store alone.
var errRuntime = errors.New("runtime's store")

// notOurs reports whether err says nothing about this request's own source: a
// fill for another repository failed under this reader, or the runtime's copy
// is bad. One more try through the cache then asks the own source.
func notOurs(err error) bool {
	fill, ok := errors.AsType[*cache.FillError](err)
	return ok && fill.Joined && !errors.Is(err, cache.ErrNoRoom) || errors.Is(err, errRuntime)
}

// fill is how a missing blob comes: from the swarm, which knows whether this
// node is the home, and if that fails from upstream.
type fill struct {
	p     *Proxy
	t     upstream.Target
	kind  Kind
	giver string
	held  bool // only what other nodes have: a copy is worth no byte of an uplink
}

var _ cache.Given = fill{}

func (s fill) Giver() string { return s.giver }

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

// pulled reports whether somebody reads a fill beside who keeps a copy: then it is a pull
// like any other.
func (p *Proxy) pulled(d digest.Digest) bool {
	return slices.ContainsFunc(p.cache.Fills(), func(f cache.Progress) bool { return f.Digest == d && f.Readers > 1 })
}

// final reports whether another source would fail with the same error.
func final(err error) bool {
	return errors.Is(err, ErrImported) || upstream.IsNotFound(err) || upstream.IsUnauthorized(err) || errors.Is(err, cache.ErrNoRoom) || errors.Is(err, cache.ErrClosed)
}

// FetchUpstream brings a blob from the registry alone: what a home does for
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

// sizeNoter is a sink that keeps the size of a blob for which there is no room, for who
// passes it through next.
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

// passMemory is how long the word of a registry alone counts for a size: that of what
// lists a blob is verified, and goes before.
const passMemory = time.Minute

// Prefetch starts the fill of a blob that nobody asked this node for, or joins
// it, and does not wait: what a home does for other nodes. They may have seen the
// manifest when this one has not: size is what it says, 0 if unknown, see Listed.
func (p *Proxy) Prefetch(t upstream.Target, kind Kind, d digest.Digest, size int64) error {
	if p.Listed(t, d) == 0 {
		p.list(t, ocispec.Descriptor{Digest: d, Size: size})
	}
	started := p.background.run(func(ctx context.Context) {
		if err := p.prefetch(ctx, t, kind, d); err != nil {
			p.log.Debug("prefetch failed", "digest", d, "registry", t.Registry, "repository", t.Repository, "err", err)
		}
	})
	if !started {
		return errShutdown
	}
	return nil
}

// prefetch reads a manifest, so that it is known here for what it is, and what it lists,
// also if it comes from other nodes.
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

// healer finds another place for a blob when the one it came from fails.
//
// Clients that name the registry with ns go to the registry themselves once the
// answer has ended, so for them it works around only what is no fault of the
// registry: a disk without room, a fill that was begun for another repository.
// Path-encoded clients go nowhere else, so for them the proxy tries again until
// pathPatience is over.
type healer struct {
	p *Proxy
	x *exchange

	off   int64     // where the last failure was
	since time.Time // when the first failure at off was
	tries int       // at off
	again bool      // the one more try that notOurs asks for has been made
}

const (
	// pathPatience is how long a blob of a path-encoded client may make no
	// progress. Such clients have no timeout for headers, and an error on a
	// blob fails their pull.
	pathPatience = 60 * time.Second
	healBackoff  = time.Second
)

func (h *healer) next(err error, off int64) (content, error) {
	if off != h.off || h.since.IsZero() {
		h.off, h.since, h.tries = off, time.Now(), 0
	}
	for h.x.ctx.Err() == nil {
		var c content
		switch {
		case errors.Is(err, cache.ErrNoRoom):
			c, err = h.pass(off)
		case !h.again && notOurs(err) && !(wrongBytes(err) && h.x.sent.Load() > 0):
			h.again = true
			c, err = h.p.openProven(h.x, h.p.openCache)
		case h.mayRetry(err):
			c, err = h.retry()
		default:
			return nil, err
		}
		if err == nil {
			return c, nil
		}
	}
	return nil, context.Cause(h.x.ctx)
}

func (h *healer) mayRetry(err error) bool {
	_, refused := errors.AsType[*apiError](err)
	return h.x.route.pathEncoded && !refused && !final(err) && !(wrongBytes(err) && h.x.sent.Load() > 0) &&
		time.Since(h.since) < pathPatience
}

// wrongBytes: what was read so far cannot be trusted, and no other place makes
// it good.
func wrongBytes(err error) bool {
	return errors.Is(err, cache.ErrDigestMismatch) || errors.Is(err, errRuntime)
}

func (h *healer) retry() (content, error) {
	if err := sleep(h.x.ctx, healBackoff<<min(h.tries, 3)); err != nil {
		return nil, err
	}
	h.tries++
	return h.p.openProven(h.x, h.p.open)
}

// pass streams past the cache. Where the size is known, the registry is asked for
// nothing but what is sent.
func (h *healer) pass(off int64) (content, error) {
	x, t, d := h.x, h.x.access.target, h.x.route.digest
	h.p.log.Debug("passing through", "digest", d, "registry", t.Registry)
	s := &stream{upstream: h.p.upstream, target: t, digest: d, total: cmp.Or(x.sizeToSend(), h.p.Listed(t, d))}
	s.whole = func() { h.p.cache.Meta().AddGiver(d, t.Registry) }
	s.ctx, s.cancel = context.WithCancelCause(x.ctx)
	s.reposition(off)
	if s.total == 0 {
		if err := s.open(); err != nil {
			s.cancel(nil)
			return nil, err
		}
	}
	return s, nil
}

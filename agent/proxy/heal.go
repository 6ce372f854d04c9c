package proxy

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// healer finds another place for a blob when the one it came from fails.
//
// Clients that name the registry with ns go to the registry themselves once the
// answer has ended, so for them it works around only what is not the registry's
// fault: a disk without room, a fill that was begun for another repository.
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
		case wrongBytes(err) && h.x.sent.Load() > 0:
			return nil, err
		case errors.Is(err, cache.ErrNoRoom):
			h.p.sayUnkept(h.x.access.target, h.x.route.digest, err)
			c, err = h.pass(off)
		case !h.again && notOurs(err):
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
	return h.x.route.pathEncoded && !refused && !final(err) && time.Since(h.since) < pathPatience
}

func (h *healer) retry() (content, error) {
	if err := sleep(h.x.ctx, healBackoff<<min(h.tries, 3)); err != nil {
		return nil, err
	}
	h.tries++
	return h.p.openProven(h.x, h.p.open)
}

// unkeptEvery is how often the log says that there is no room.
const unkeptEvery = time.Hour

// sayUnkept tells an operator that this node's disk takes no blobs: pulls go on as ever,
// from other nodes or the registry, and what nobody else has costs the registry what it
// would without a cache.
func (p *Proxy) sayUnkept(t upstream.Target, d digest.Digest, err error) {
	if errors.Is(err, cache.ErrForeign) || errors.Is(err, cache.ErrInvalidDigest) {
		return // of which the disk knows nothing
	}
	p.metrics.unkept.Inc()
	now, last := time.Now(), p.saidUnkept.Load()
	if last != nil && now.Sub(*last) < unkeptEvery || !p.saidUnkept.CompareAndSwap(last, &now) {
		return
	}
	s := p.cache.Stats()
	p.log.Warn("no room in the cache: a blob is passed through and not kept", "digest", d, "registry", t.Registry,
		"free", s.Free, "min_free", s.MinFree, "max_bytes", s.Limit, "err", err)
}

// pass streams past the cache. Where the size is known, and other nodes are not asked,
// the registry is asked for nothing but what is sent.
func (h *healer) pass(off int64) (content, error) {
	x, t, d := h.x, h.x.access.target, h.x.route.digest
	h.p.log.Debug("passing through", "digest", d, "registry", t.Registry)
	s := &stream{swarm: h.p.swarm, upstream: h.p.upstream, target: t, digest: d, total: cmp.Or(x.sizeToSend(), h.p.Listed(t, d)), passed: h.p.cache.Passed}
	s.until = func(off int64) int64 { return endOf(x.r, s.total, etag(d), off) }
	s.whole = func() { h.p.cache.Meta().AddGiver(d, t.Registry) }
	s.ctx, s.cancel = context.WithCancelCause(x.ctx)
	s.reposition(off)
	if s.total == 0 || s.swarm != nil {
		if err := s.open(); err != nil {
			s.cancel(nil)
			return nil, err
		}
	}
	return s, nil
}

// errRuntime marks what is wrong with the runtime's store alone.
var errRuntime = errors.New("runtime's store")

// notOurs reports whether err says nothing about this request's own source: a
// fill for another repository failed under this reader, or the runtime's copy
// is bad. One more try through the cache then asks this request's own source.
func notOurs(err error) bool {
	fill, ok := errors.AsType[*cache.FillError](err)
	return ok && fill.Joined && !errors.Is(err, cache.ErrNoRoom) || errors.Is(err, errRuntime)
}

// wrongBytes: what was read so far cannot be trusted, and no other place makes
// it good.
func wrongBytes(err error) bool {
	return errors.Is(err, cache.ErrDigestMismatch) || errors.Is(err, errRuntime)
}

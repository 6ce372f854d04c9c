package proxy

import (
	"context"
	"errors"
	"io"
	"net/http"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

const (
	// failureMemory is how long a blob that ended short is refused to clients
	// that can take the rest from the registry (I4): longer than any runtime's
	// immediate retries, shorter than kubelet's back-off gets.
	failureMemory = 30 * time.Second
	// wrongMemory is the same for a blob whose bytes were wrong, and may be again:
	// longer than kubelet backs off.
	wrongMemory = 10 * time.Minute
	// undeliverableMemory is how long manifests that list a blob which could not be
	// delivered to a path-encoded client answer 404 (I5).
	undeliverableMemory = 5 * time.Minute
	immutable           = "max-age=31536000, immutable"
)

// blobKey is a blob under the name that its bytes are asked for.
type blobKey struct {
	registry, repository string
	digest               digest.Digest
}

func keyOf(t upstream.Target, d digest.Digest) blobKey {
	return blobKey{t.Registry, t.Repository, d}
}

// serveBlob answers GET and HEAD of a blob: the straight line of I1.
func (p *Proxy) serveBlob(x *exchange) error {
	then := x.start.Add(p.patience(x))
	stop := x.within(time.Until(then), errBudget)
	defer stop()
	if err := p.auth.permit(x.ctx, &x.access, KindBlob, x.route.digest); err != nil {
		return err
	}
	if x.r.Method == http.MethodHead {
		return p.headBlob(x)
	}
	key := keyOf(x.access.target, x.route.digest)
	if !x.route.pathEncoded && p.refuses(x, key) {
		return errRecent
	}
	stop()
	err := p.sendBlob(x, then)
	p.judge(x, key, err)
	return err
}

// failure is what is refused of a blob that could not be delivered: all of it, or what
// a body of wrong bytes lacks.
type failure struct {
	wrong bool  // the bytes did not match, and are fetched anew once
	size  int64 // of the body
	from  int64 // its first byte that was not sent; 0 = nothing was sent
}

// failureOf says what of a blob clients are to take from the registry, and for how
// long. Of bytes that did not match at most all but the last piece was sent: who asks
// for that is in the same pull, and gets it sooner there.
func failureOf(x *exchange, err error) (failure, time.Duration) {
	if !wrongBytes(err) {
		return failure{}, failureMemory
	}
	if _, ok := errors.AsType[*cache.FillError](err); !ok {
		return failure{}, wrongMemory
	}
	f := failure{wrong: true}
	if x.sent.Load() > 0 {
		f.size = x.sizeToSend()
		f.from = (f.size - 1) / cache.PieceSize(f.size) * cache.PieceSize(f.size)
	}
	return f, wrongMemory
}

// refuses reports whether the client is to take what it asks for from the registry.
func (p *Proxy) refuses(x *exchange, key blobKey) bool {
	f, failed := p.failed.get(key)
	switch {
	case !failed || p.cache.Has(key.digest):
		return false
	case !f.wrong || p.cache.Mismatches(key.digest) > 1:
		return true
	case f.from == 0:
		return false
	}
	off, ok := firstOffset(x.r, f.size, etag(key.digest))
	return !ok || off >= f.from
}

// sendBlob answers before then, with an error at least.
func (p *Proxy) sendBlob(x *exchange, then time.Time) error {
	b, err := p.openBody(x, then)
	if err != nil {
		return err
	}
	defer func() { _ = b.Close() }() // was only read
	size := b.at.size()
	setBlobHeaders(x.Header(), x.route.digest)
	refuseEmptyRange(x.r, size)
	x.describe(b.at.source(), size, 0)
	if off, ok := firstOffset(x.r, size, etag(x.route.digest)); ok {
		if err := b.readyAt(off, then); err != nil {
			return err
		}
	}
	http.ServeContent(x, x.r, "", time.Time{}, b)
	return b.failure()
}

const (
	// swarmPatience is how long a body may wait for a byte that is on its way from
	// another node, where a poor uplink brings a piece in more time than StallTimeout:
	// less than the minute after which containerd 1.6 gives up the pull, more than it
	// takes the swarm to find out that a node lied, and to do without it.
	swarmPatience = 50 * time.Second
	// swarmPathPatience is the same for path-encoded clients, which can go nowhere else
	// and have no such deadline.
	swarmPathPatience = 5 * time.Minute
)

// patience is how long a client may wait for the first byte.
func (p *Proxy) patience(x *exchange) time.Duration {
	if x.route.pathEncoded {
		return max(p.opts.FirstByteBudget, pathPatience)
	}
	return p.opts.FirstByteBudget
}

func (p *Proxy) openBody(x *exchange, then time.Time) (*body, error) {
	h := &healer{p: p, x: x}
	c, err := p.openBy(x, then)
	if err != nil {
		stop := x.within(time.Until(then), errBudget)
		defer stop()
		if c, err = h.next(err, 0); err != nil {
			return nil, err
		}
	}
	b := &body{x: x, stall: p.opts.StallTimeout, swarm: swarmPatience, heal: h.next, at: c}
	if x.route.pathEncoded {
		b.stall, b.swarm = max(b.stall, pathPatience), swarmPathPatience
	}
	b.coming = func() (coming, ours bool) {
		if p.swarm != nil {
			coming, ours = p.swarm.Coming(x.route.digest)
		}
		return coming, ours
	}
	return b, nil
}

// openBy is open, until then. If the registry has not told the blob's size by then but
// the manifest did, and the swarm waits for the registry, the blob is promised.
func (p *Proxy) openBy(x *exchange, then time.Time) (content, error) {
	t, d := x.access.target, x.route.digest
	if p.swarm == nil || x.route.pathEncoded || p.cache.Has(d) {
		stop := x.within(time.Until(then), errBudget)
		defer stop()
		return p.openProven(x, p.open)
	}
	c := &promised{opened: make(chan struct{})}
	go func() {
		defer close(c.opened)
		c.at, c.err = p.openProven(x, p.open)
	}()
	timer := time.NewTimer(time.Until(then))
	defer timer.Stop()
	select {
	case <-c.opened:
		return c.at, c.err
	case <-timer.C:
	}
	c.length = p.Listed(t, d)
	if coming, _ := p.swarm.Coming(d); coming && c.length > 0 {
		return c, nil
	}
	x.cancel(errBudget)
	_ = c.Close() // nothing was read
	return nil, errBudget
}

// judge remembers how the blob went, unless the client or this agent's end
// decided it.
func (p *Proxy) judge(x *exchange, key blobKey, err error) {
	p.discard(key.digest, err)
	switch {
	case err == nil && x.err == nil:
		p.undelivered.forget(key)
		p.doubt(x, key.digest)
		return
	case x.r.Context().Err() != nil || err == nil:
		return
	case upstream.IsUnauthorized(err) && !x.route.pathEncoded:
		// A token that ended, most likely: the client gets another and goes on.
		p.auth.doubt(&x.access)
		return
	case x.route.pathEncoded:
		p.undelivered.put(key, struct{}{}, undeliverableMemory)
		p.deliverable.forget(key)
	case wrongBytes(err), x.status != 0:
		f, ttl := failureOf(x, err)
		p.failed.put(key, f, ttl)
	}
	p.log.Debug("blob not delivered", "digest", key.digest, "registry", key.registry, "repository", key.repository,
		"bytes", x.sent.Load(), "err", err)
}

// errRot is what became of bytes that were right when the cache committed them.
var errRot = errors.New("the cache's copy is not what it was")

// discard deletes the cache's copy of what its disk could not give, or gave wrong, and
// reports whether it did: the bytes are to be fetched anew.
func (p *Proxy) discard(d digest.Digest, err error) bool {
	if !errors.Is(err, errRot) && !errors.Is(err, syscall.EIO) || !p.cache.Has(d) {
		return false
	}
	p.log.Warn("deleting what the cache's disk cannot give any more", "digest", d, "err", err)
	return p.cache.Remove(d) == nil
}

const (
	// againMemory is longer than kubelet backs off between two tries of a pull.
	againMemory = 10 * time.Minute
	// doubtMemory is how long a blob is not doubted again.
	doubtMemory = time.Hour
)

// doubt has the cache's copy of a blob read again if runtimes got all of it twice within a
// short time. A runtime keeps what it got, unless the digest did not match, which it
// tells nobody: it would get the same wrong bytes at each try, and never ask the registry.
func (p *Proxy) doubt(x *exchange, d digest.Digest) {
	if x.sourceLabel() != sourceDisk || x.sent.Load() != x.sizeToSend() {
		return
	}
	switch doubted, again := p.again.get(d); {
	case !again:
		p.again.put(d, false, againMemory)
	case !doubted:
		p.cache.Suspect(d)
		p.again.put(d, true, doubtMemory)
	}
}

// headBlob needs the size alone, and starts no fill.
func (p *Proxy) headBlob(x *exchange) error {
	size, from, err := p.stat(x.ctx, x.access.target, x.route.digest)
	if err != nil {
		return err
	}
	setBlobHeaders(x.Header(), x.route.digest)
	x.describe(from, size, 0)
	http.ServeContent(x, x.r, "", time.Time{}, io.NewSectionReader(nil, 0, size))
	return nil
}

// stat finds a blob's size where that is cheapest.
func (p *Proxy) stat(ctx context.Context, t upstream.Target, d digest.Digest) (int64, source, error) {
	if r, ok := p.lookup(t, d); ok {
		defer func() { _ = r.Close() }() // nothing was read
		return r.Size(), sourceDisk, nil
	}
	if c := p.openRuntime(t, d); c != nil {
		defer func() { _ = c.Close() }() // nothing was read
		return c.size(), sourceRuntime, nil
	}
	size, err := p.stats.do(ctx, keyOf(t, d), func(ctx context.Context) (int64, error) {
		ctx, cancel := context.WithTimeout(ctx, pathPatience)
		defer cancel()
		return p.upstream.Stat(ctx, t, d)
	})
	return size, sourceUpstream, err
}

func setBlobHeaders(h http.Header, d digest.Digest) {
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Accept-Ranges", "bytes")
	h.Set("Cache-Control", immutable)
	setDigest(h, d)
}

func setDigest(h http.Header, d digest.Digest) {
	h.Set(headerDigest, d.String())
	h.Set("Etag", etag(d))
}

func etag(d digest.Digest) string { return `"` + d.String() + `"` }

package proxy

import (
	"context"
	"io"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// blobKey is a blob under the name that its bytes are asked for.
type blobKey struct {
	cache.Repository
	digest digest.Digest
}

func keyOf(t upstream.Target, d digest.Digest) blobKey { return blobKey{repositoryOf(t), d} }

func repositoryOf(t upstream.Target) cache.Repository {
	return cache.Repository{Registry: t.Registry, Name: t.Repository}
}

// statAsk asks how large a blob is, on one caller's behalf: a refusal is about that
// caller alone.
type statAsk struct {
	blobKey
	who caller
}

// serveBlob answers GET and HEAD of a blob: the straight line of I1.
func (p *Proxy) serveBlob(x *exchange) error {
	then := x.start.Add(p.patience(x.route.pathEncoded))
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

// sendBlob answers before then, with an error at least.
func (p *Proxy) sendBlob(x *exchange, then time.Time) error {
	b, err := p.openBody(x, then)
	if err != nil {
		return err
	}
	defer func() { _ = b.Close() }() // was only read
	size := b.at.size()
	setBlobHeaders(x.Header(), x.route.digest)
	refuseEmptyRange(x.r, size) // before it is read here
	x.describe(b.at.source(), size, 0)
	if off, ok := firstOffset(x.r, size, etag(x.route.digest)); ok {
		b.chunk = p.inChunks(x, off)
		if b.part = namesEnd(x.r.Header.Get("Range")) && !b.chunk && !p.cache.Has(x.route.digest); b.part {
			p.parts.put(keyOf(x.access.target, x.route.digest), wrongEnd(size), partMemory)
		}
		if err := b.readyAt(off, then); err != nil {
			return err
		}
	}
	x.serveContent(size, b)
	return b.failure()
}

// inChunks reports whether the answer to x, which begins at off, is a chunk after the
// first that containerd fetches at the same time (concurrent_layer_fetch_buffer). It asks
// for the first by "bytes=0-", goes to another host on an error status to that alone,
// and goes on elsewhere from any chunk that ends short.
func (p *Proxy) inChunks(x *exchange, off int64) bool {
	key := keyOf(x.access.target, x.route.digest)
	if x.route.pathEncoded || !p.chunked.has(key) && x.r.Header.Get("Range") != "bytes=0-" {
		return false
	}
	p.chunked.put(key, struct{}{}, chunkedMemory)
	return off > 0
}

// chunkedMemory is how long after a chunk the next may be asked for.
const chunkedMemory = 5 * time.Minute

const (
	// swarmPatience is how long a body may wait for a byte that is on its way from
	// another node, since a poor uplink may take longer than StallTimeout for a piece:
	// less than the minute after which containerd 1.6 gives up the pull, more than it
	// takes the swarm to find out that a node lied, and to do without it.
	swarmPatience = 50 * time.Second
	// swarmPathPatience is the same for path-encoded clients, which cannot go elsewhere
	// and have no such deadline.
	swarmPathPatience = 5 * time.Minute
)

// patience is how long a client may wait for the first byte of a blob.
func (p *Proxy) patience(pathEncoded bool) time.Duration {
	if pathEncoded {
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

// openProven opens a blob for a client.
func (p *Proxy) openProven(x *exchange, open func(context.Context, upstream.Target, digest.Digest, Kind) (content, error)) (content, error) {
	acc, d := x.access, x.route.digest
	c, err := open(x.ctx, acc.target, d, KindBlob)
	if err != nil {
		return nil, err
	}
	if err := p.auth.proven(x.ctx, acc, KindBlob, d); err != nil {
		_ = c.Close() // nothing was read
		return nil, err
	}
	return c, nil
}

// headBlob needs the size alone, and starts no fill.
func (p *Proxy) headBlob(x *exchange) error {
	size, from, err := p.stat(x.ctx, x.access.target, x.route.digest)
	if err != nil {
		return err
	}
	setBlobHeaders(x.Header(), x.route.digest)
	x.describe(from, size, 0)
	x.serveContent(size, io.NewSectionReader(nil, 0, size))
	return nil
}

// stat finds a blob's size where it is cheapest.
func (p *Proxy) stat(ctx context.Context, t upstream.Target, d digest.Digest) (int64, source, error) {
	if r, ok := p.lookup(t, d); ok {
		defer func() { _ = r.Close() }() // nothing was read
		return r.Size(), sourceDisk, nil
	}
	if c := p.openRuntime(t, d); c != nil {
		defer func() { _ = c.Close() }() // nothing was read
		return c.size(), sourceRuntime, nil
	}
	size, err := p.stats.do(ctx, statAsk{keyOf(t, d), p.auth.askedAs(t)}, func(ctx context.Context) (int64, error) {
		ctx, cancel := context.WithTimeout(ctx, pathPatience)
		defer cancel()
		return p.upstream.Stat(ctx, t, d)
	})
	return size, sourceUpstream, err
}

const immutable = "max-age=31536000, immutable"

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

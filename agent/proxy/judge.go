package proxy

import (
	"errors"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// What is remembered of how serving a blob went, so that a runtime that asks again fares
// better (I4, I5).

const (
	// failureMemory is how long a blob that ended short is refused to clients
	// that can take the rest from the registry: longer than any runtime's
	// immediate retries, shorter than kubelet's back-off gets.
	failureMemory = 30 * time.Second
	// wrongMemory is the same for a blob whose bytes were wrong, and may be again:
	// longer than kubelet backs off.
	wrongMemory = 10 * time.Minute
	// partMemory gives a fill time to find out that its bytes are wrong, for clients
	// that have read parts of it meanwhile.
	partMemory = 6 * time.Hour
	// undeliverableMemory is how long manifests that list a blob which could not be
	// delivered to a path-encoded client answer 404.
	undeliverableMemory = 5 * time.Minute
)

// failure is what is refused of a blob that could not be delivered: all of it, or what
// a body of wrong bytes lacks.
type failure struct {
	wrong bool  // the bytes did not match, and are fetched anew once
	size  int64 // of the body
	from  int64 // its first byte that was not sent; 0 = nothing was sent
}

// failureOf says which part of a blob clients are to take from the registry, and for
// how long. If the bytes did not match, at most all but the last piece was sent: a
// client that asks for that piece is in the same pull, and gets it sooner there.
func failureOf(x *exchange, err error) (failure, time.Duration) {
	if !wrongBytes(err) {
		return failure{}, failureMemory
	}
	if _, ok := errors.AsType[*cache.FillError](err); !ok {
		return failure{}, wrongMemory
	}
	if x.sent.Load() > 0 {
		return wrongEnd(x.sizeToSend()), wrongMemory
	}
	return failure{wrong: true}, wrongMemory
}

// wrongEnd refuses the last piece of a blob.
func wrongEnd(size int64) failure {
	piece := cache.PieceSize(size)
	return failure{wrong: true, size: size, from: (size - 1) / piece * piece}
}

// refuses reports whether the client is to take what it asks for from the registry.
func (p *Proxy) refuses(x *exchange, key blobKey) bool {
	f, failed := p.failed.get(key)
	if !failed {
		f, failed = p.readWrong(key)
	}
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

// readWrong says what is refused of a blob of wrong bytes to a client that read parts of
// it, and so has seen no body cut short.
func (p *Proxy) readWrong(key blobKey) (failure, bool) {
	if p.cache.Mismatches(key.digest) == 0 {
		return failure{}, false
	}
	return p.parts.get(key)
}

// undeliverable reports whether a path-encoded client recently got the blob short or
// wrong.
func (p *Proxy) undeliverable(key blobKey) bool {
	_, wrong := p.readWrong(key)
	return wrong || p.undelivered.has(key)
}

// judge remembers how serving the blob went, unless the client or this
// agent's shutdown ended it.
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
		// A token that ended, most likely: the client gets another and goes on. The registry
		// is asked again, for it has refused something that the verdict allows.
		p.auth.verdicts.forget(x.access.key())
		return
	case x.route.pathEncoded:
		p.undelivered.put(key, struct{}{}, undeliverableMemory)
		p.deliverable.forget(key)
	case wrongBytes(err), x.status != 0:
		f, ttl := failureOf(x, err)
		p.failed.put(key, f, ttl)
	}
	p.log.Debug("blob not delivered", "digest", key.digest, "registry", key.Registry, "repository", key.Name,
		"bytes", x.sent.Load(), "err", err)
}

// errRot is the error for bytes that were right when the cache committed them
// and no longer are.
var errRot = errors.New("the cache's copy is not what it was")

// discard deletes the cache's copy if its disk could not give it, or gave it wrong. It
// reports whether it did: then the bytes are to be fetched anew.
func (p *Proxy) discard(d digest.Digest, err error) bool {
	if !errors.Is(err, errRot) && !errors.Is(err, syscall.EIO) || !p.cache.Has(d) {
		return false
	}
	p.log.Warn("deleting what the cache's disk cannot give any more", "digest", d, "err", err)
	return p.cache.Remove(d) == nil
}

// againMemory is longer than kubelet backs off between two tries of a pull. A blob is not
// doubted again for as long, but after that it is: what was right may rot a minute later.
const againMemory = 10 * time.Minute

// doubt has the cache's copy of a blob verified again if runtimes got all of it twice
// within a short time. A runtime keeps what it got, unless the digest did not match, which
// it tells nobody: it would get the same wrong bytes at each try, and never ask the
// registry. A new copy counts as not doubted yet.
func (p *Proxy) doubt(x *exchange, d digest.Digest) {
	switch from := x.sourceLabel(); {
	case from == sourcePeer || from == sourceUpstream:
		p.again.forget(d)
		return
	case from != sourceDisk || x.sent.Load() != x.sizeToSend():
		return
	}
	switch doubted, again := p.again.get(d); {
	case !again:
		p.again.put(d, false, againMemory)
	case !doubted:
		p.cache.Suspect(d)
		p.again.put(d, true, againMemory)
	}
}

package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// manifest is one manifest in memory, at most maxManifest bytes.
type manifest struct {
	desc ocispec.Descriptor
	body []byte
	from source
}

// serveManifest answers GET and HEAD of a manifest by tag or digest.
func (p *Proxy) serveManifest(x *exchange) error {
	defer x.within(p.manifestPatience(x.route.pathEncoded), errBudget)()
	found, err := p.findManifest(x)
	if err != nil {
		return err
	}
	if x.r.Method == http.MethodHead && !x.route.pathEncoded && found.complete() { // by tag
		p.sendManifest(x, found, manifest{desc: found.desc, from: sourceUpstream}, io.NewSectionReader(nil, 0, found.desc.Size))
		return nil
	}
	d := found.desc.Digest
	m, err := p.manifest(x.ctx, x.access.target, d)
	if err != nil {
		if errors.Is(context.Cause(x.ctx), errBudget) {
			p.learnLate(x.access.target, d)
		}
		return err
	}
	if x.route.tag == "" {
		if err := p.auth.proven(x.ctx, x.access, KindManifest, d); err != nil {
			return err
		}
	}
	if err := p.promiseTo(x, m); err != nil {
		return err
	}
	p.sendManifest(x, found, m, bytes.NewReader(m.body))
	return nil
}

// findManifest finds which manifest a request means, and whether its caller may have it.
// By digest nothing else is known of it, so the result is never complete.
func (p *Proxy) findManifest(x *exchange) (resolved, error) {
	d := x.route.digest
	asked := resolved{desc: ocispec.Descriptor{Digest: d}}
	switch {
	case x.route.tag != "":
		found, err := p.resolve(x.ctx, &x.access, queryOf(x))
		if x.route.ofSignatures() && (mayServeStale(err) || errors.Is(err, errBudget)) {
			err = errNoSignature
		}
		return found, err
	case current(x.r):
		return asked, p.confirm(x.ctx, &x.access, d)
	}
	return asked, p.auth.permit(x.ctx, &x.access, KindManifest, d)
}

// manifestPatience: on a manifest path-encoded clients do go on to the registry,
// so they wait only for the extra questions that promise asks.
func (p *Proxy) manifestPatience(pathEncoded bool) time.Duration {
	if pathEncoded {
		return 3 * p.opts.FirstByteBudget
	}
	return p.opts.FirstByteBudget
}

// sendManifest answers with the bytes in body; a HEAD needs no more than their number.
func (p *Proxy) sendManifest(x *exchange, found resolved, m manifest, body io.ReadSeeker) {
	if found.stale {
		m.from = sourceStale
		p.metrics.stale.Inc()
	}
	h := x.Header()
	h.Set("Content-Type", m.desc.MediaType)
	h.Set("Cache-Control", cacheControl(x))
	setDigest(h, m.desc.Digest)
	x.describe(m.from, m.desc.Size, 0)
	x.serveContent(m.desc.Size, body)
}

func cacheControl(x *exchange) string {
	if x.route.tag != "" {
		return "no-cache"
	}
	return immutable
}

// manifest reads a manifest by the same chain as a blob, and learns from it.
func (p *Proxy) manifest(ctx context.Context, t upstream.Target, d digest.Digest) (manifest, error) {
	m, err := p.readManifest(ctx, t, d)
	if err != nil {
		return m, err
	}
	return m, p.learn(t, &m)
}

// lateManifest is how long a manifest may take once nobody waits for it any
// more.
const lateManifest = time.Minute

// learnLate reads a manifest that came too late for its client. The client goes on
// with the registry's copy, and next asks here for what it lists.
func (p *Proxy) learnLate(t upstream.Target, d digest.Digest) {
	_, _ = p.late.join(keyOf(t, d), func(ctx context.Context) (struct{}, error) {
		ctx, cancel := context.WithTimeout(ctx, lateManifest)
		defer cancel()
		_, err := p.manifest(ctx, t, d)
		if err != nil {
			p.log.Debug("manifest not learned", "digest", d, "registry", t.Registry, "repository", t.Repository, "err", err)
		}
		return struct{}{}, err
	}) // not begun, at the end of the agent
}

func (p *Proxy) readManifest(ctx context.Context, t upstream.Target, d digest.Digest) (manifest, error) {
	m, err := readAll(ctx, d, func() (content, error) { return p.open(ctx, t, d, KindManifest) })
	if p.discard(d, err) || err != nil && notOurs(err) {
		m, err = readAll(ctx, d, func() (content, error) { return p.openCache(ctx, t, d, KindManifest) })
	}
	if errors.Is(err, cache.ErrNoRoom) {
		p.sayUnkept(t, d, err)
		return p.passManifest(ctx, t, d)
	}
	return m, err
}

func readAll(ctx context.Context, d digest.Digest, open func() (content, error)) (manifest, error) {
	c, err := open()
	if err != nil {
		return manifest{}, err
	}
	defer func() { _ = c.Close() }() // was only read
	body, err := readSmall(ctx, c)
	if err == nil && c.source() == sourceDisk && d.Algorithm().FromBytes(body) != d {
		err = errRot
	}
	return manifest{desc: ocispec.Descriptor{Digest: d, Size: c.size()}, body: body, from: c.source()}, err
}

// passManifest gets a manifest that the cache cannot take.
func (p *Proxy) passManifest(ctx context.Context, t upstream.Target, d digest.Digest) (manifest, error) {
	if p.swarm != nil {
		m, err := p.manifestThrough(ctx, t, d)
		if err == nil || ctx.Err() != nil {
			return m, err
		}
		p.log.Debug("no manifest from other nodes", "digest", d, "registry", t.Registry, "err", err)
	}
	desc, body, err := p.upstream.Manifest(ctx, t, d.String(), acceptAll)
	if err == nil {
		p.cache.Passed(cache.FromUpstream, len(body))
		p.cache.Meta().AddGiver(d, t.Registry)
	}
	return manifest{desc: desc, body: body, from: sourceUpstream}, err
}

func (p *Proxy) manifestThrough(ctx context.Context, t upstream.Target, d digest.Digest) (manifest, error) {
	r, size, err := p.swarm.Through(ctx, t, KindManifest, d, 0)
	if err != nil {
		return manifest{}, err
	}
	defer func() { _ = r.Close() }() // was only read
	if size > maxManifest {
		return manifest{}, fmt.Errorf("manifest of %d bytes", size)
	}
	body := make([]byte, size)
	n, err := io.ReadFull(r, body)
	p.cache.Passed(cache.FromPeer, n)
	if err != nil {
		return manifest{}, err
	}
	if d.Algorithm().FromBytes(body) != d {
		return manifest{}, cache.ErrDigestMismatch
	}
	p.cache.Meta().AddGiver(d, t.Registry)
	return manifest{desc: ocispec.Descriptor{Digest: d, Size: size}, body: body, from: sourcePeer}, nil
}

// readSmall reads all of a manifest. A blob that is too large to be one is
// not, whatever the path says.
func readSmall(ctx context.Context, c content) ([]byte, error) {
	if c.size() > maxManifest {
		return nil, &apiError{status: http.StatusNotFound, code: codeManifestUnknown, message: "too large for a manifest"}
	}
	body := make([]byte, c.size())
	for off := int64(0); off < c.size(); {
		if err := c.ready(ctx, off); err != nil {
			return nil, err
		}
		n, err := c.read(body[off:], off)
		if err != nil {
			return nil, err
		}
		off += int64(n)
	}
	return body, nil
}

// learn completes m with its media type, and records what its repository holds
// according to m. That costs a parse, so each manifest and repository is
// remembered.
func (p *Proxy) learn(t upstream.Target, m *manifest) error {
	key := keyOf(t, m.desc.Digest)
	meta := p.cache.Meta()
	facts, _ := meta.Manifest(m.desc.Digest)
	if m.desc.MediaType == "" {
		m.desc.MediaType = facts.MediaType
	}
	if m.desc.MediaType != "" && p.learned.has(key) {
		return nil
	}
	o, err := parseOutline(m.body)
	if err != nil {
		return &apiError{status: http.StatusNotFound, code: codeManifestUnknown, message: err.Error()}
	}
	if m.desc.MediaType = o.mediaType(m.desc.MediaType); m.desc.MediaType == "" {
		return &apiError{status: http.StatusNotFound, code: codeManifestUnknown, message: fmt.Sprintf("%s is no manifest", m.desc.Digest)}
	}
	if facts.MediaType != m.desc.MediaType {
		meta.SetManifest(m.desc.Digest, cache.Manifest{MediaType: m.desc.MediaType})
	}
	repository := key.Repository
	children := slices.Concat(o.children(), o.Manifests)
	meta.AddManifests(repository, m.desc)
	meta.AddManifests(repository, o.Manifests...)
	meta.AddMembers(repository, o.children()...)
	p.list(t, children...)
	if p.auth.shows(t) {
		p.auth.show(repository, slices.DeleteFunc(append(children, m.desc), func(d ocispec.Descriptor) bool { return !p.auth.said(keyOf(t, d.Digest)) })...)
	}
	p.learned.put(key, struct{}{}, membershipMemory)
	return nil
}

// list keeps the sizes that a manifest or a tag gives.
func (p *Proxy) list(t upstream.Target, ds ...ocispec.Descriptor) {
	for _, d := range ds {
		if d.Size > 0 {
			p.listed.put(keyOf(t, d.Digest), d.Size, membershipMemory)
		}
	}
}

// Listed is how many bytes d has by the manifest or tag that led to it in the
// target's repository lately, or by the registry if there was no room for it; 0 if
// that is not known. Nobody has verified it, but the runtime expects it.
func (p *Proxy) Listed(t upstream.Target, d digest.Digest) int64 {
	size, _ := p.listed.get(keyOf(t, d))
	return size
}

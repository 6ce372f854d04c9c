package proxy

import (
	"cmp"
	"context"
	"errors"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/larder-cache/larder/agent/upstream"
)

const (
	// deliverableMemory is how long upstream's word that it has a blob counts.
	deliverableMemory = 5 * time.Minute
	// promiseParallel bounds the questions to upstream for one manifest.
	promiseParallel = 4
	// promiseDepth bounds indexes of indexes.
	promiseDepth = 3
)

// promiseTo returns nil if m may be given to the client of x: if it is no path-encoded one,
// or all that it will take of m can be delivered.
func (p *Proxy) promiseTo(x *exchange, m manifest) error {
	t := x.access.target
	switch {
	case !x.route.pathEncoded:
		return nil
	case !x.route.ofSignatures():
		return p.promise(x.ctx, t, m, promiseDepth)
	}
	o, err := parseOutline(m.body)
	if err != nil {
		return errUndeliverable
	}
	o.Config = nil
	return p.promiseOutline(x.ctx, t, o, promiseDepth)
}

// promise returns nil if every blob of m can be delivered: a client that gets the
// manifest by a path-encoded mirror takes all its blobs from there or fails (I5). Of
// an index, it checks what this node's platform needs, and of the other images only
// whether one of their blobs failed a moment ago. depth is how many more levels of
// nested indexes are allowed.
func (p *Proxy) promise(ctx context.Context, t upstream.Target, m manifest, depth int) error {
	o, err := parseOutline(m.body)
	if err != nil || depth == 0 {
		return errUndeliverable
	}
	return p.promiseOutline(ctx, t, o, depth)
}

// promiseOutline is promise for what a manifest lists. An index may have several images for
// this node's platform. The client takes the best for its CPU, which is not known here, so
// each must do; but one that nobody can give, the registry included, it could not have anyway.
func (p *Proxy) promiseOutline(ctx context.Context, t upstream.Target, o outline, depth int) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(promiseParallel)
	for _, blob := range o.children() {
		g.Go(func() error { return p.canDeliver(ctx, t, blob) })
	}
	var whole atomic.Bool // one of this node's
	absent := make([]error, len(o.Manifests))
	for i, child := range o.Manifests {
		if !ours(child.Platform) || slices.ContainsFunc(o.Manifests, func(d ocispec.Descriptor) bool { return preferred(d, child) }) {
			g.Go(func() error { return p.promiseOther(ctx, t, child) })
			continue
		}
		g.Go(func() error {
			err := p.promiseOurs(ctx, t, child, depth-1)
			if _, ok := errors.AsType[*absentError](err); ok {
				absent[i], err = err, nil
			} else if err == nil {
				whole.Store(true)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil || whole.Load() {
		return err
	}
	return cmp.Or(absent...)
}

// absentError is something that nobody can give now. The registry cannot either, as far as
// it says.
type absentError struct{ error }

func (e *absentError) Unwrap() error { return e.error }

func (p *Proxy) promiseOurs(ctx context.Context, t upstream.Target, child ocispec.Descriptor, depth int) error {
	m, err := p.manifest(ctx, t, child.Digest)
	if err != nil {
		return &absentError{err}
	}
	return p.promise(ctx, t, m, depth)
}

func (p *Proxy) promiseOther(ctx context.Context, t upstream.Target, child ocispec.Descriptor) error {
	if !p.cache.Has(child.Digest) {
		return nil
	}
	m, err := p.manifest(ctx, t, child.Digest)
	if err != nil {
		return err
	}
	o, err := parseOutline(m.body)
	if err != nil {
		return nil // not ours, and cached under a media type of its own
	}
	failed := func(blob ocispec.Descriptor) bool { return p.undeliverable(keyOf(t, blob.Digest)) }
	if slices.ContainsFunc(o.children(), failed) {
		return errUndeliverable
	}
	return nil
}

// ours reports whether this node's runtime might choose an image of an index.
func ours(platform *ocispec.Platform) bool {
	return platform == nil || platform.Architecture == runtime.GOARCH && platform.OS == runtime.GOOS
}

// preferred reports whether CRI-O (since 1.28), podman and skopeo take a rather than b, which
// is ours, of an index on any CPU (go.podman.io/image, internal/manifest, oci_index.go).
func preferred(a, b ocispec.Descriptor) bool {
	switch {
	case !ours(a.Platform):
		return false
	case a.Platform == nil || b.Platform == nil:
		if a.Platform != b.Platform {
			return b.Platform == nil
		}
	case a.Platform.Variant != b.Platform.Variant:
		return false
	}
	return inZstd(a) && !inZstd(b)
}

// inZstd reports whether the layers of an image are marked as compressed with zstd.
func inZstd(d ocispec.Descriptor) bool {
	return d.Annotations["io.github.containers.compression.zstd"] == "true"
}

// has reports whether d is here for callers that may have what the target's
// registry gives.
func (p *Proxy) has(t upstream.Target, d digest.Digest) bool {
	return p.Holds(d, t.Registry) || p.runtime != nil && p.runtime.Has(d) && p.mayTakeRuntime(t, d)
}

func (p *Proxy) canDeliver(ctx context.Context, t upstream.Target, blob ocispec.Descriptor) error {
	key := keyOf(t, blob.Digest)
	switch {
	case p.undeliverable(key):
		return errUndeliverable
	case p.has(t, blob.Digest), p.deliverable.has(key):
		return nil
	}
	err := p.askStored(ctx, t, blob.Digest)
	if mayServeStale(err) && p.swarm != nil && p.swarm.Holds(blob.Digest) {
		return nil // the index may be wrong, but the registry cannot help either
	}
	if err != nil {
		p.log.Debug("manifest withheld: a blob cannot be delivered", "digest", blob.Digest,
			"registry", t.Registry, "repository", t.Repository, "err", err)
		if mayServeStale(err) {
			return &absentError{errUndeliverable}
		}
		return errUndeliverable
	}
	p.deliverable.put(key, struct{}{}, deliverableMemory)
	return nil
}

// askStored returns nil if the registry says that it has d. The repository's home asks, for
// all nodes; failing that, this node does.
func (p *Proxy) askStored(ctx context.Context, t upstream.Target, d digest.Digest) error {
	if p.swarm != nil {
		_, err := p.swarm.May(ctx, t, Question{Reference: d.String(), Blob: true, Stored: true})
		err = p.auth.believable(t.Registry, err)
		switch {
		case err == nil, errors.Is(err, ErrImported): // then another node has it
			return nil
		case final(err):
			return err
		}
	}
	_, _, err := p.stat(ctx, t, d)
	return err
}

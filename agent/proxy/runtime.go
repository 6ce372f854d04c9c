package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/opencontainers/go-digest"

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

// CopyRuntime copies d from the runtime's store, where it may be deleted, into the
// cache, on behalf of a caller that may read from registry and has found d there.
// The error wraps fs.ErrNotExist if the runtime has nothing for that caller, and
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

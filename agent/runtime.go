package agent

import (
	"fmt"
	"io"
	"io/fs"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/runtimestore"
	"github.com/opencontainers/go-digest"
)

// runtimeSource lets the proxy read containerd's store.
type runtimeSource struct{ *runtimestore.Store }

// Open returns an interface that is nil where the blob is.
func (s runtimeSource) Open(d digest.Digest) (proxy.RuntimeBlob, error) {
	b, err := s.Store.Open(d)
	if err != nil {
		return nil, err
	}
	return b, nil
}

func (a *Agent) openRuntime() error {
	r := a.config.Runtime
	if r.ContentDir == "" {
		return nil
	}
	store, err := runtimestore.New(runtimestore.Options{
		ContentDir: r.ContentDir, Socket: r.ContainerdSocket, Logger: a.log,
		Events: runtimestore.Events{Added: a.announce, Removed: a.runtimeRemoved, Sourced: a.runtimeSourced},
	})
	if err != nil {
		return fmt.Errorf("runtime.content_dir = %q: %w", r.ContentDir, err)
	}
	a.runtime = store
	return nil
}

// runtimeSourced keeps from whom containerd has a blob: what decides who else may
// have it. It is told so again and again, and writes what the metadata does not have.
func (a *Agent) runtimeSourced(d digest.Digest, registry string) {
	if giver := proxy.RuntimeGiver(registry); !a.cache.Meta().Given(d, giver) {
		a.cache.Meta().AddGiver(d, giver)
	}
}

// keep says what a blob is worth to the cache: one that containerd holds too is the
// first to go, one that would be missed if this node were lost the last.
func (a *Agent) keep(d digest.Digest) cache.KeepHint {
	switch {
	case a.runtime != nil && a.runtime.Knows(d): // not Has: all blobs are asked about while a pull waits
		return cache.EvictFirst
	case a.swarm.few(d, max(a.replicas.others, 1)):
		return cache.EvictLast
	}
	return cache.Normal
}

// inRuntime says whether the container runtime's own store has d.
func (a *Agent) inRuntime(d digest.Digest) bool { return a.runtime != nil && a.runtime.Has(d) }

// readRuntime reads a blob of at most limit bytes out of the runtime's store.
func (a *Agent) readRuntime(d digest.Digest, limit int64) ([]byte, error) {
	if a.runtime == nil {
		return nil, fs.ErrNotExist
	}
	b, err := a.runtime.Open(d)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	if b.Size() > limit {
		return nil, fmt.Errorf("read %s: %d bytes are more than %d", d, b.Size(), limit)
	}
	body := make([]byte, b.Size())
	if _, err := io.ReadFull(io.NewSectionReader(b, 0, b.Size()), body); err != nil {
		return nil, fmt.Errorf("read %s from the runtime's store: %w", d, err)
	}
	return body, nil
}

func (a *Agent) runtimeStatus() RuntimeStatus {
	s := RuntimeStatus{ContentDir: a.config.Runtime.ContentDir, Socket: a.config.Runtime.ContainerdSocket}
	if a.runtime == nil {
		return s
	}
	if err := a.runtime.Problem(); err != nil {
		s.Problem = err.Error()
	}
	a.runtime.Walk(func(_ digest.Digest, size int64) bool {
		s.Blobs++
		s.Bytes += size
		return true
	})
	return s
}

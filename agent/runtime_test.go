package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/runtimestore"
	"github.com/opencontainers/go-digest"
)

// TestEvictionLooksAtNoFile: what containerd has goes first, by what is known of its store
// and not by a look at it: one for every blob of the cache would keep a pull waiting.
func TestEvictionLooksAtNoFile(t *testing.T) {
	dir, body := t.TempDir(), []byte("a layer")
	d := digest.FromBytes(body)
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := errors.Join(os.MkdirAll(blobs, 0o755), os.WriteFile(filepath.Join(blobs, d.Encoded()), body, 0o444)); err != nil {
		t.Fatal(err)
	}
	store, err := runtimestore.New(runtimestore.Options{ContentDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{runtime: store, replicas: &replicas{}}
	if hint := a.keep(d); !a.inRuntime(d) || hint != cache.Normal {
		t.Errorf("hint %d of a blob that nobody has seen yet", hint)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- store.Run(ctx) }()
	eventually(t, "the first to go", func() error {
		if a.keep(d) != cache.EvictFirst {
			return errors.New("not yet")
		}
		return nil
	})
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestWithdrawnWhatTheIndexNeverHad: a blob that containerd has for so short a time that the
// index of its store misses it is not left in the index of the cluster.
func TestWithdrawnWhatTheIndexNeverHad(t *testing.T) {
	c := clusterConfigs(t)()
	c.Runtime.ContentDir = t.TempDir()
	blobs := filepath.Join(c.Runtime.ContentDir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	a, err := New(c, WithLogger(testLogger(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}()
	body := []byte("a layer")
	d := digest.FromBytes(body)
	a.announce(d, int64(len(body))) // the cache has it
	if err := os.WriteFile(filepath.Join(blobs, d.Encoded()), body, 0o444); err != nil {
		t.Fatal(err)
	}
	a.cacheRemoves(d)
	if held := a.swarm.Status().Index.Held; held != 0 {
		t.Errorf("%d blobs are said to be here; nothing takes that back when containerd deletes its own", held)
	}
}

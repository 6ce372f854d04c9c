package proxy

import (
	"context"
	"sync"
	"time"
)

// background owns the work that outlives the request that began it. stop ends
// and waits for all of it.
type background struct {
	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex // guards stopped, and Add against Wait
	stopped bool
	wg      sync.WaitGroup
}

func newBackground() *background {
	ctx, cancel := context.WithCancel(context.Background())
	return &background{ctx: ctx, cancel: cancel}
}

// run starts fn, or returns errShutdown after stop.
func (b *background) run(fn func(context.Context)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.stopped {
		return errShutdown
	}
	b.wg.Go(func() { fn(b.ctx) })
	return nil
}

func (b *background) stop() {
	b.mu.Lock()
	b.stopped = true
	b.mu.Unlock()
	b.cancel()
	b.wg.Wait()
}

// flights collapses concurrent calls for one key into one that belongs to none
// of the callers: whoever hangs up changes nothing for the others.
type flights[K comparable, V any] struct {
	owner *background

	mu     sync.Mutex // guards flying
	flying map[K]*flight[V]
}

type flight[V any] struct {
	done  chan struct{} // closed when value and err are set
	value V
	err   error
}

func newFlights[K comparable, V any](owner *background) *flights[K, V] {
	return &flights[K, V]{owner: owner, flying: map[K]*flight[V]{}}
}

// do waits for the flight of key, started with fn if there is none, or for ctx.
func (g *flights[K, V]) do(ctx context.Context, key K, fn func(context.Context) (V, error)) (V, error) {
	var none V
	f, err := g.join(key, fn)
	if err != nil {
		return none, err
	}
	select {
	case <-f.done:
		return f.value, f.err
	case <-ctx.Done():
		return none, context.Cause(ctx)
	}
}

func (g *flights[K, V]) join(key K, fn func(context.Context) (V, error)) (*flight[V], error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if f, ok := g.flying[key]; ok {
		return f, nil
	}
	f := &flight[V]{done: make(chan struct{})}
	err := g.owner.run(func(ctx context.Context) {
		f.value, f.err = fn(ctx)
		g.mu.Lock()
		delete(g.flying, key)
		g.mu.Unlock()
		close(f.done)
	})
	if err != nil {
		return nil, err
	}
	g.flying[key] = f
	return f, nil
}

// sleep waits for d or returns why ctx ended.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
)

var errNoSwarm = errors.New("nobody there")

// swarmFunc is a swarm of functions; without one nobody has anything.
type swarmFunc struct {
	fetch   func(context.Context, *cache.Fill) error // blobs, and manifests with small
	through func(off int64) (io.ReadCloser, int64, error)
	small   bool
	resolve func(tag string) (ocispec.Descriptor, error)
	may     func(upstream.Target, Question) error
	mayAge  time.Duration // of its yes
	holds   func(digest.Digest) bool
	coming  func(digest.Digest) bool
}

func (s *swarmFunc) FetchHeld(ctx context.Context, t upstream.Target, kind Kind, f *cache.Fill) error {
	return s.Fetch(ctx, t, kind, f)
}

func (s *swarmFunc) Fetch(ctx context.Context, _ upstream.Target, kind Kind, f *cache.Fill) error {
	if s.fetch == nil || kind != KindBlob && !s.small {
		return errNoSwarm
	}
	return s.fetch(ctx, f)
}

func (s *swarmFunc) Through(_ context.Context, _ upstream.Target, _ Kind, _ digest.Digest, off int64) (io.ReadCloser, int64, error) {
	if s.through == nil {
		return nil, 0, errNoSwarm
	}
	return s.through(off)
}

func (s *swarmFunc) Resolve(_ context.Context, _ upstream.Target, tag string, _ []string) (ocispec.Descriptor, error) {
	if s.resolve == nil {
		return ocispec.Descriptor{}, errNoSwarm
	}
	return s.resolve(tag)
}

func (s *swarmFunc) May(_ context.Context, t upstream.Target, q Question) (time.Duration, error) {
	if s.may == nil {
		return 0, errNoSwarm
	}
	return s.mayAge, s.may(t, q)
}

func (s *swarmFunc) Holds(d digest.Digest) bool { return s.holds != nil && s.holds(d) }
func (s *swarmFunc) Coming(d digest.Digest) (coming, ours bool) {
	return s.coming != nil && s.coming(d), false
}

func (s *swarmFunc) Remember(upstream.Target, string) {}
func (s *swarmFunc) Forget(upstream.Target, string)   {}

func (n *node) target() upstream.Target { return upstream.Target{Registry: host, Repository: repo} }

// give writes a whole body into a fill, as a peer's bytes.
func give(f *cache.Fill, body []byte) error {
	w := f.Writer(cache.Origin{Kind: cache.FromPeer, Name: "other"})
	if err := w.SetSize(int64(len(body))); err != nil {
		return err
	}
	_, err := w.WriteAt(body, 0)
	return err
}

// TestSwarm: peers go before upstream, upstream stands in for peers, and a fill
// that the swarm found to be wrong is not completed by it.
func TestSwarm(t *testing.T) {
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{1_000_000}, Opaque: true})
	d := img.Layers[0].Digest
	want := bytesOf(t, img, d)
	wrong := bytes.Clone(want)
	wrong[10] ^= 1
	var calls atomic.Int32
	for name, tc := range map[string]struct {
		fetch    func(context.Context, *cache.Fill) error
		source   string // of the first answer
		upstream int    // GETs
		calls    int32  // after a second request
	}{
		"peers have it": {func(_ context.Context, f *cache.Fill) error { return give(f, want) }, "peer", 0, 1},
		"nobody has it": {func(context.Context, *cache.Fill) error { return errNoSwarm }, "upstream", 1, 1},
		"peers stop":    {func(_ context.Context, f *cache.Fill) error { return errors.Join(halfOf(f, want), errNoSwarm) }, "peer", 1, 1},
		"peers lie":     {func(_ context.Context, f *cache.Fill) error { return give(f, [][]byte{wrong, want}[f.Mismatches()]) }, "", 0, 2},
		"peers know": {func(_ context.Context, f *cache.Fill) error {
			if f.Mismatches() > 0 {
				return give(f, want)
			}
			return errors.Join(halfOf(f, wrong), cache.ErrDigestMismatch)
		}, "", 0, 2},
	} {
		t.Run(name, func(t *testing.T) {
			calls.Store(0)
			n := startNode(t, func(s *setup) {
				s.upstream.StreamsPerBlob = 1
				s.proxy.Swarm = &swarmFunc{fetch: func(ctx context.Context, f *cache.Fill) error {
					calls.Add(1)
					return tc.fetch(ctx, f)
				}}
			})
			n.put(img)
			a := n.attempt(blobPath(d)) // none, if nothing was sent when the bytes turned out to be wrong
			if tc.source != "" && (a.header.Get(headerSource) != tc.source || a.err != nil || !bytes.Equal(a.body, want)) {
				t.Errorf("%d from %q, %v", a.status, a.header.Get(headerSource), a.err)
			}
			if tc.source == "" && a.status == 200 && a.err == nil {
				t.Error("wrong bytes were delivered whole")
			}
			n.proxy.failed.forget(keyOf(n.target(), d))
			if a := n.get(blobPath(d)); a.status != 200 || !bytes.Equal(a.body, want) {
				t.Errorf("again: %d, %d bytes", a.status, len(a.body))
			}
			if got := n.registry.Count(registrytest.Match{Reference: d.String(), Method: "GET"}); got != tc.upstream || calls.Load() != tc.calls {
				t.Errorf("%d requests upstream, %d to the swarm; want %d, %d", got, calls.Load(), tc.upstream, tc.calls)
			}
		})
	}
}

func halfOf(f *cache.Fill, body []byte) error {
	w := f.Writer(cache.Origin{Kind: cache.FromPeer, Name: "other"})
	if err := w.SetSize(int64(len(body))); err != nil {
		return err
	}
	_, err := w.WriteAt(body[:len(body)/2], 0)
	return err
}

// TestPromiseBySwarm: a node without a way to the registry gives a manifest to a client
// that goes nowhere else if the home says that the registry has what it lists, and only
// then.
func TestPromiseBySwarm(t *testing.T) {
	for _, has := range []bool{true, false} {
		var asked atomic.Int32
		swarm := &swarmFunc{may: func(_ upstream.Target, q Question) error {
			if !q.Stored {
				return nil // to the caller
			}
			if asked.Add(1); has {
				return nil
			}
			return &upstream.Error{Status: http.StatusNotFound}
		}}
		n := startNode(t, func(s *setup) { s.proxy.Swarm = swarm })
		img := n.image(1000, 2000)
		n.get(manifestPath("v1"))
		n.registry.Inject(registrytest.Match{Kind: registrytest.Blob}, registrytest.Status(503))
		for range 2 {
			if a := n.get(pathManifest("v1")); (a.status == 200) != has {
				t.Errorf("has %v: %d", has, a.status)
			}
		}
		if got, want := int(asked.Load()), len(img.Layers)+1; has && got != want {
			t.Errorf("%d questions for %d blobs", got, want)
		}
	}
}

// TestSwarmResolves: the home's word on a tag is taken, its silence is not.
func TestSwarmResolves(t *testing.T) {
	swarm := &swarmFunc{}
	n := startNode(t, func(s *setup) { s.proxy.Swarm = swarm })
	img := n.image(1000)
	swarm.resolve = func(string) (ocispec.Descriptor, error) { return img.Descriptor, nil }
	for _, asked := range []int{0, 1} {
		if a := n.do("HEAD", manifestPath("v1")); a.status != 200 || a.header.Get(headerDigest) != img.Digest.String() {
			t.Errorf("status %d", a.status)
		}
		if got := n.registry.Count(heads); got != asked {
			t.Errorf("%d requests upstream, want %d", got, asked)
		}
		swarm.resolve = func(string) (ocispec.Descriptor, error) {
			return ocispec.Descriptor{Digest: digest.Digest("")}, errNoSwarm
		}
	}
}

// TestSwarmRemembersTag: when the registry cannot be asked, what another node
// knows of a tag is served, marked as stale, and the registry is left alone.
func TestSwarmRemembersTag(t *testing.T) {
	swarm := &swarmFunc{may: func(upstream.Target, Question) error { return nil }}
	n := startNode(t, func(s *setup) { s.proxy.Swarm = swarm })
	img := n.image(1000)
	swarm.resolve = func(string) (ocispec.Descriptor, error) {
		return ocispec.Descriptor{}, &StaleTag{img.Descriptor}
	}
	for range 2 {
		a := n.do("HEAD", manifestPath("v1"))
		if a.status != 200 || a.header.Get(headerDigest) != img.Digest.String() || a.header.Get(headerSource) != "stale" {
			t.Errorf("status %d, %v", a.status, a.header)
		}
	}
	if got := n.registry.Count(heads); got != 0 {
		t.Errorf("%d requests upstream", got)
	}
	last, ok := n.proxy.lastKnown(tagKey{Repository: testRepository, tag: "v1", lists: true})
	if !ok || last.desc.Digest != img.Digest {
		t.Errorf("last known: %v, %t", last, ok)
	}
}

// TestLateManifest: a manifest that comes after its client has gone to the registry still
// tells the sizes of the blobs that the client asks for next.
func TestLateManifest(t *testing.T) {
	const budget = 100 * time.Millisecond
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{1_000_000}, Opaque: true})
	layer := img.Layers[0]
	there := make(chan struct{})
	n := startNode(t, func(s *setup) {
		s.proxy.FirstByteBudget = budget
		s.proxy.Swarm = &swarmFunc{
			fetch: func(ctx context.Context, f *cache.Fill) error {
				select {
				case <-there:
					return give(f, img.Manifests[0].Data)
				case <-ctx.Done():
					return ctx.Err()
				}
			},
			small:  true,
			coming: func(digest.Digest) bool { return true },
		}
	})
	n.put(img)
	for range 2 {
		resp := n.open(t.Context(), "GET", manifestPath(img.Manifests[0].Digest.String()))
		if err := resp.Body.Close(); err != nil || resp.StatusCode != http.StatusServiceUnavailable {
			t.Fatalf("manifest: %d, %v", resp.StatusCode, err)
		}
	}
	close(there)
	await(t, "size learned", func() bool { return n.proxy.Listed(n.target(), layer.Digest) == layer.Size })
}

// TestComing: a byte that takes longer than the first-byte budget, and then than the
// stall deadline, while the swarm says that it is on its way. The headers go out within
// the budget, and the body waits; when the swarm says so no longer, it ends.
func TestComing(t *testing.T) {
	const budget, stall = 200 * time.Millisecond, 300 * time.Millisecond
	for name, tc := range map[string]struct {
		coming time.Duration // the swarm says so
		bytes  time.Duration // when they are there
		size   int64         // in the manifest that the client has seen; 0 = it has seen none, and the swarm says it at once
		status int
		whole  bool
	}{
		"in time":              {0, budget / 4, 0, 200, true},
		"never":                {0, time.Minute, 0, 503, false},
		"late":                 {time.Minute, budget + stall/2, 0, 200, true},
		"very late":            {time.Minute, budget + 6*stall, 0, 200, true},
		"given up":             {budget + 6*stall, time.Minute, 0, 200, false},
		"size in time":         {0, budget / 4, 1_000_000, 200, true},
		"size never":           {0, time.Minute, 1_000_000, 503, false},
		"size very late":       {time.Minute, budget + 6*stall, 1_000_000, 200, true},
		"size given up":        {budget + 6*stall, time.Minute, 1_000_000, 200, false},
		"another size":         {time.Minute, budget + stall/2, 999_999, 200, false},
		"another size in time": {time.Minute, budget / 4, 999_999, 200, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{1_000_000}, Opaque: true})
			d := img.Layers[0].Digest
			want := bytesOf(t, img, d)
			begun := time.Now()
			n := startNode(t, func(s *setup) {
				s.proxy.FirstByteBudget, s.proxy.StallTimeout = budget, stall
				s.proxy.Swarm = &swarmFunc{
					fetch: func(ctx context.Context, f *cache.Fill) error {
						if tc.size == 0 {
							if err := f.Writer(cache.Origin{Kind: cache.FromPeer}).SetSize(int64(len(want))); err != nil {
								return err
							}
						}
						select {
						case <-time.After(tc.bytes):
							return give(f, want)
						case <-ctx.Done():
							return ctx.Err()
						}
					},
					coming: func(asked digest.Digest) bool { return asked == d && time.Since(begun) < tc.coming },
				}
			})
			n.put(img)
			if tc.size != 0 {
				n.proxy.list(n.target(), ocispec.Descriptor{Digest: d, Size: tc.size})
			}
			begun = time.Now()
			resp := n.open(t.Context(), "GET", blobPath(d))
			headers := time.Since(begun)
			body, err := io.ReadAll(resp.Body)
			if err := resp.Body.Close(); err != nil {
				t.Error(err)
			}
			if resp.StatusCode != tc.status || (tc.status == 200) != (resp.Header.Get(headerSource) == "peer") {
				t.Errorf("%d from %q", resp.StatusCode, resp.Header.Get(headerSource))
			}
			if headers > budget+stall/2 {
				t.Errorf("headers after %v", headers)
			}
			if whole := err == nil && bytes.Equal(body, want); whole != tc.whole {
				t.Errorf("%d bytes, %v", len(body), err)
			}
			if got := n.registry.Count(registrytest.Match{Kind: registrytest.Blob, Method: "GET"}); got != 0 {
				t.Errorf("%d requests upstream", got)
			}
		})
	}
}

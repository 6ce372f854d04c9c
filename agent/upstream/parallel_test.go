package upstream

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/test/registrytest"
)

const mib = 1 << 20

// connections counts those that blobs came over: streams cannot share one.
func connections(reg *registrytest.Server) int {
	seen := map[string]bool{}
	for _, r := range reg.Requests(blobGet) {
		seen[r.RemoteAddr] = true
	}
	return len(seen)
}

// TestStreamsFollowTheLimit pins the reason for parallel ranges: a registry
// that limits each connection is asked over several, one that limits the whole
// node is not, and in both cases no byte comes twice beyond what was in flight
// when a stream was cut.
func TestStreamsFollowTheLimit(t *testing.T) {
	const size = 96 * mib
	cases := []struct {
		name            string
		perConn, uplink int64
		streams         int // configured
		least, most     int // connections used
		atMost          time.Duration
		ignoresRange    bool
	}{
		{name: "each connection limited", perConn: 12 * mib, streams: 4, least: 3, most: 6, atMost: 7 * time.Second},
		{name: "the node limited", uplink: 48 * mib, streams: 4, least: 1, most: 4, atMost: 8 * time.Second},
		{name: "one stream configured", perConn: 64 * mib, streams: 1, least: 1, most: 1},
		{name: "no limit", streams: 4, least: 1, most: 2},
		{name: "ranges ignored", perConn: 64 * mib, streams: 4, ignoresRange: true, least: 1, most: 2},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			d := reg.PutBlob(repo, registrytest.Random(9, size)).Digest
			reg.SetRate(tc.perConn, tc.uplink)
			if tc.ignoresRange {
				reg.Inject(blobGet, registrytest.IgnoreRange())
			}
			c := newClient(t, func(cfg *Config) { cfg.StreamsPerBlob = tc.streams; cfg.Stall = 5 * time.Second }, registryOf(reg))
			sink := newSink(mib / 2)
			began := time.Now()
			if err := c.Fetch(t.Context(), target, d, sink); err != nil {
				t.Fatal(err)
			}
			took := time.Since(began)
			sink.check(t, d)
			// The race detector makes the processor the limit, which streams do share out.
			if n := connections(reg); n < tc.least || (n > tc.most && !raceEnabled) {
				t.Errorf("%d connections, want %d to %d", n, tc.least, tc.most)
			}
			if tc.atMost > 0 && took > tc.atMost && !raceEnabled {
				t.Errorf("took %v, want at most %v (one stream alone: %v)", took, tc.atMost, time.Second*size/time.Duration(max(tc.perConn, tc.uplink)))
			}
			// One stream was cut short: what is in socket buffers then is lost.
			if sent := reg.Bytes(blobGet); sent > size+16*mib {
				t.Errorf("the registry sent %d MiB for a blob of %d", sent/mib, size/mib)
			}
			if sink.total > size+4*mib {
				t.Errorf("%d MiB written for a blob of %d", sink.total/mib, size/mib)
			}
			t.Logf("%v, %d connections, %d requests, %d bytes more than needed", took, connections(reg), reg.Count(blobGet), reg.Bytes(blobGet)-size)
		})
	}
}

// TestWiden pins the policy itself, without a clock or a network: one more
// stream where the last one added a fifth, one less and no more where it did not.
func TestWiden(t *testing.T) {
	for name, tc := range map[string]struct {
		rate func(streams int) int64 // MiB/s
		want int
	}{
		"each connection limited": {func(n int) int64 { return 20 * int64(n) }, 4},
		"the node limited":        {func(int) int64 { return 40 }, 1},
		"two help":                {func(n int) int64 { return 20 * int64(min(n, 2)) }, 2},
	} {
		c := newClient(t, nil, Registry{Host: "test"})
		src, err := c.newSource(target, "sha256:"+digest.Digest(strings.Repeat("a", 64)), "fetch")
		if err != nil {
			t.Fatal(err)
		}
		src.size = 1 << 30
		f := &fetch{src: src, sink: newSinkOf(t, src.size), claims: map[*claim]struct{}{}, running: 1, target: 1}
		now := time.Unix(1e9, 0)
		for range 20 * time.Second / tick {
			now = now.Add(tick)
			f.bytes += tc.rate(f.running) * mib / int64(time.Second/tick)
			f.widen(now)
			f.running, f.opening = f.target, 0 // as if streams came and went at once
		}
		if f.running != tc.want {
			t.Errorf("%s: %d streams, want %d", name, f.running, tc.want)
		}
	}
}

// TestFollowsReader pins that a reader far ahead is served long before the
// first stream would come there.
func TestFollowsReader(t *testing.T) {
	for _, streams := range []int{1, 4} {
		t.Run(map[int]string{1: "one stream", 4: "four streams"}[streams], func(t *testing.T) {
			const size = 256 * mib
			reg := registrytest.Start(t, registrytest.Options{})
			d := reg.PutBlob(repo, registrytest.Random(9, size)).Digest
			reg.SetRate(8*mib, 0) // 32 s for all of it
			c := newClient(t, func(cfg *Config) { cfg.StreamsPerBlob = streams }, registryOf(reg))
			sink := newSink(mib)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			sink.at = func(written int64) {
				if written > 2*mib {
					sink.wanted = 200*mib + 5
				}
				if len(sink.have) > 200 && sink.have[200] > 0 {
					cancel()
				}
			}
			began := time.Now()
			err := c.Fetch(ctx, target, d, sink)
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("Fetch: %v, want the cancellation at the wanted byte", err)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("the wanted byte came after %v", took)
			}
		})
	}
}

// TestResumesWhatIsMissing pins that bytes which are there are not fetched again.
func TestResumesWhatIsMissing(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	blob := registrytest.Random(7, blobSize)
	d := reg.PutBlob(repo, blob).Digest
	want := content(t, blob)
	sink := newSink(256 << 10)
	if err := sink.SetSize(blobSize); err != nil {
		t.Fatal(err)
	}
	for _, have := range [][2]int{{0, 300_000}, {768 << 10, blobSize}} {
		if _, err := sink.WriteAt(want[have[0]:have[1]], int64(have[0])); err != nil {
			t.Fatal(err)
		}
	}
	if err := clientOf(t, reg).Fetch(t.Context(), target, d, sink); err != nil {
		t.Fatal(err)
	}
	sink.check(t, d)
	reg.Close() // its counters lag behind what a client has read
	if n, missing := reg.Bytes(blobGet), int64(768<<10-300_000); n != missing {
		t.Errorf("the registry sent %d bytes, %d were missing", n, missing)
	}
}

// TestSinkFails pins that the sink's error ends a fetch at once, unchanged.
func TestSinkFails(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	d := reg.PutBlob(repo, registrytest.Random(7, blobSize)).Digest
	sink := newSink(256 << 10)
	sink.fail = errors.New("disk on fire")
	err := clientOf(t, reg).Fetch(t.Context(), target, d, sink)
	if !errors.Is(err, sink.fail) || IsUnavailable(err) {
		t.Fatalf("Fetch: %v, want %v", err, sink.fail)
	}
	if n := reg.Count(blobGet); n != 1 {
		t.Errorf("%d requests, want 1", n)
	}
	if err := clientOf(t, reg).Fetch(t.Context(), target, d, &lyingSink{memorySink: newSink(256 << 10)}); err == nil {
		t.Error("a sink that forgets what it was given: no error")
	}
}

// lyingSink forgets everything.
type lyingSink struct{ *memorySink }

func (l *lyingSink) Missing(int64) (int64, int64, bool) { return 0, blobSize, true }

// TestSizeChanges pins that upstreams which disagree about a blob's size are
// not mixed into one.
func TestSizeChanges(t *testing.T) {
	good, bad := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	blob := registrytest.Random(7, blobSize)
	d := good.PutBlob(repo, blob).Digest
	bad.PutBlobAs(repo, d, registrytest.Random(8, blobSize-1))
	sink := newSink(256 << 10)
	if err := sink.SetSize(blobSize); err != nil {
		t.Fatal(err)
	}
	if err := clientOf(t, bad, good).Fetch(t.Context(), target, d, sink); err != nil {
		t.Fatal(err)
	}
	sink.check(t, d)
	if err := clientOf(t, bad).Fetch(t.Context(), target, d, newSinkOf(t, blobSize)); !errors.Is(err, ErrBadAnswer) {
		t.Fatalf("Fetch from the liar alone: %v", err)
	}
}

func newSinkOf(t *testing.T, size int64) *memorySink {
	t.Helper()
	s := newSink(256 << 10)
	if err := s.SetSize(size); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestFetchIntoCache fills the real cache over parallel streams, with cuts.
func TestFetchIntoCache(t *testing.T) {
	const size = 64*mib + 777
	reg := registrytest.Start(t, registrytest.Options{CDN: true})
	d := reg.PutBlob(repo, registrytest.Random(9, size)).Digest
	reg.SetRate(16*mib, 0)
	reg.Inject(registrytest.Match{Role: registrytest.CDN}, registrytest.CutAfter(5*mib+3), registrytest.Times(3))
	client := clientOf(t, reg)
	store, err := cache.New(cache.Options{Dir: t.TempDir(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := store.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	defer func() { cancel(); running.Wait(); store.Close() }()
	r, err := store.Open(t.Context(), d, cache.SourceFunc(func(ctx context.Context, f *cache.Fill) error {
		return client.Fetch(ctx, target, d, f.Writer(cache.Origin{Kind: "upstream", Name: "test"}))
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	verifier := d.Verifier()
	if n, err := r.WriteTo(verifier); err != nil || n != size || !verifier.Verified() {
		t.Fatalf("read %d bytes, %v, verified %t", n, err, verifier.Verified())
	}
}

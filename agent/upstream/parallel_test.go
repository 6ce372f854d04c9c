package upstream

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"runtime"
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

// TestStreamsFollowTheLimit pins the reason for parallel ranges, and that they
// are free: a registry that limits each connection is asked over several, and
// whoever is the limit, no byte is sent or written twice (I7). When streams are
// added is TestWiden's business: here the machine's mood would decide.
func TestStreamsFollowTheLimit(t *testing.T) {
	const size = 40 * mib
	cases := []struct {
		name            string
		perConn, uplink int64
		streams         int // configured
		least, most     int // connections used
		ignoresRange    bool
	}{
		{name: "each connection limited", perConn: 8 * mib, streams: 4, least: 2, most: 4},
		{name: "the node limited", uplink: 24 * mib, streams: 4, least: 1, most: 4},
		{name: "one stream configured", perConn: 32 * mib, streams: 1, least: 1, most: 1},
		{name: "ranges ignored", perConn: 32 * mib, streams: 4, ignoresRange: true, least: 1, most: 1},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			reg := registrytest.Start(t, registrytest.Options{})
			d := reg.PutBlob(repo, registrytest.Random(9, size)).Digest
			reg.SetRate(tc.perConn, tc.uplink)
			if tc.ignoresRange {
				reg.Inject(blobGet, registrytest.IgnoreRange())
			}
			c := newClient(t, func(cfg *Config) { cfg.StreamsPerBlob = tc.streams; cfg.Stall = 5 * time.Second }, registryOf(reg))
			sink := newSink(mib / 2)
			if err := c.Fetch(t.Context(), target, d, sink); err != nil {
				t.Fatal(err)
			}
			sink.check(t, d)
			if n := connections(reg); n < tc.least || n > tc.most {
				t.Errorf("%d connections, want %d to %d", n, tc.least, tc.most)
			}
			reg.Close() // its counters lag behind what a client has read
			if sent := reg.Bytes(blobGet); sent != size || sink.total != size {
				t.Errorf("%d bytes sent and %d written for a blob of %d", sent, sink.total, size)
			}
		})
	}
}

// TestWiden pins the policy itself, without a clock or a network: twice the
// streams, soon, where the last ones added a fifth, and back to before where
// they did not.
func TestWiden(t *testing.T) {
	const ms = time.Millisecond
	for _, tc := range []struct {
		name  string
		rate  func(streams int, at time.Duration) int64 // MiB/s
		want  int
		by    time.Duration // since the first byte; 0 = whenever
		piece int64         // MiB
		claim int64         // MiB: of a blob as large, which the first request asked for; 0 = of a large one, nothing
	}{
		{"each connection limited", func(n int, _ time.Duration) int64 { return 20 * int64(n) }, 4, 900 * ms, 1, 0},
		{"the node limited", func(int, time.Duration) int64 { return 40 }, 1, 0, 1, 0},
		{"two help", func(n int, _ time.Duration) int64 { return 20 * int64(min(n, 2)) }, 2, 0, 1, 0},
		{"coming up to speed", func(_ int, at time.Duration) int64 { return min(int64(1)<<(at/(100*ms)), 40) }, 1, 0, 1, 0},
		{"a hiccup in the baseline", func(_ int, at time.Duration) int64 {
			if at > 200*ms && at < 300*ms {
				return 5
			}
			return 40
		}, 1, 0, 1, 0},
		{"each limited, with a hiccup in the trial", func(n int, at time.Duration) int64 {
			if at > 350*ms && at < 600*ms {
				return 1
			}
			return 20 * int64(n)
		}, 4, 0, 1, 0},
		{"done within a second", func(n int, _ time.Duration) int64 { return 900 * int64(n) }, 1, 0, 1, 0},
		{"a stream brings a piece in 16 s", func(n int, _ time.Duration) int64 { return int64(n) }, 1, 0, 16, 0},
		{"a stream brings a piece in 8 s", func(n int, _ time.Duration) int64 { return int64(n) }, 4, 0, 8, 0},
		{"one request for all, each connection slow", func(n int, _ time.Duration) int64 { return int64(n) }, 4, 2500 * ms, 1, 60},
		{"one request for all, the node limited", func(int, time.Duration) int64 { return 2 }, 1, 0, 1, 60},
		{"one request for all, done within 30 s", func(n int, _ time.Duration) int64 { return int64(n) }, 1, 0, 1, 25},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newClient(t, nil, Registry{Host: "test"})
			src, err := c.newSource(target, "sha256:"+digest.Digest(strings.Repeat("a", 64)), "fetch")
			if err != nil {
				t.Fatal(err)
			}
			src.size = cmp.Or(tc.claim*mib, 1<<30)
			sink := newSink(tc.piece * mib)
			sink.discard = true
			if err := sink.SetSize(src.size); err != nil {
				t.Fatal(err)
			}
			f := &fetch{src: src, sink: sink, claims: map[*claim]struct{}{}, running: 1, target: 1}
			began, reached := time.Unix(1e9, 0), time.Duration(0)
			first := &claim{end: tc.claim * mib, since: began}
			f.claims[first] = struct{}{}
			for at := tick; at < 8*time.Second && f.remaining() > 0; at += tick {
				n := tc.rate(f.running, at) * mib / int64(time.Second/tick)
				sink.fill(f.bytes, f.bytes+n)
				f.bytes += n
				first.off = f.bytes
				f.widen(began.Add(at))
				f.running, f.opening = f.target, 0 // as if streams came and went at once
				if f.running >= tc.want && reached == 0 {
					reached = at
				}
			}
			if f.running != tc.want || (tc.by > 0 && reached > tc.by) {
				t.Errorf("%d streams, after %v; want %d by %v", f.running, reached, tc.want, tc.by)
			}
		})
	}
}

// TestSlowSmallBlob pins that a blob which one request would bring is fetched over several
// connections too, where each is slow, and what that costs.
func TestSlowSmallBlob(t *testing.T) {
	t.Parallel()
	const size = 6 * mib // 41 s over one connection
	reg := registrytest.Start(t, registrytest.Options{})
	d := reg.PutBlob(repo, registrytest.Random(9, size)).Digest
	reg.SetRate(150<<10, 0)
	sink := newSink(256 << 10)
	if err := clientOf(t, reg).Fetch(t.Context(), target, d, sink); err != nil {
		t.Fatal(err)
	}
	sink.check(t, d)
	reg.Close() // its counters lag behind what a client has read
	t.Logf("%d connections, %d bytes sent for %d", connections(reg), reg.Bytes(blobGet), size)
	if n := connections(reg); n < 2 { // how many is TestWiden's business
		t.Errorf("%d connections, want at least 2", n)
	}
	if sent := reg.Bytes(blobGet); sent > size+size/20 || sink.total != size {
		t.Errorf("%d bytes sent and %d written for a blob of %d", sent, sink.total, size)
	}
}

// TestSlowNodeSplitsNothing pins that no run is asked for again whose bytes are here and
// wait for this node: they would have been sent in vain (I7).
func TestSlowNodeSplitsNothing(t *testing.T) {
	for name, opts := range map[string]registrytest.Options{"plain": {}, "TLS": {TLS: true}} {
		t.Run(name, func(t *testing.T) {
			const size, sent = 40 * mib, 8 * mib
			reg := registrytest.Start(t, opts)
			d := digest.FromString("any") // nobody looks
			reg.PutBlobAs(repo, d, registrytest.Random(9, size))
			reg.Inject(blobGet, registrytest.StallAfter(sent))
			r := registryOf(reg)
			if opts.TLS {
				var err error
				if r.CAFile, err = reg.CAFile(t.TempDir()); err != nil {
					t.Fatal(err)
				}
			}
			c := newClient(t, func(cfg *Config) { cfg.Stall = time.Minute }, r)
			src, err := c.newSource(target, d, "fetch")
			if err != nil {
				t.Fatal(err)
			}
			f := &fetch{src: src, sink: newSinkOf(t, size), claims: map[*claim]struct{}{}, running: 2, target: 2}
			st, cl := &stream{src: src, op: "fetch", end: -1}, &claim{end: size}
			defer st.close()
			f.claims[cl] = struct{}{}
			read := func(n int) {
				t.Helper()
				if _, err := io.ReadFull(&blobBody{t.Context(), st}, make([]byte, n)); err != nil {
					t.Fatal(err)
				}
			}
			read(sent / 2) // so the kernel has seen a reader who keeps up, and takes more
			f.begin(st, cl)
			slow := cl.since.Add(time.Minute) // for not a byte
			for end := time.Now().Add(10 * time.Second); !cl.heldUp() && time.Now().Before(end); {
				runtime.Gosched() // until more has come
			}
			if far, ok := f.split(st, 1, slow); ok {
				t.Errorf("%v is asked for again, with %d bytes here", far, cl.body.unread())
			}
			read(sent / 2)
			if _, ok := f.split(st, 1, slow); !ok {
				t.Error("nothing waits here, and nobody else fetches the rest")
			}
		})
	}
}

// TestFollowsReader pins that a reader far ahead is served long before the
// first stream would come there.
func TestFollowsReader(t *testing.T) {
	for _, streams := range []int{1, 4} {
		t.Run(map[int]string{1: "one stream", 4: "four streams"}[streams], func(t *testing.T) {
			const size = 256 * mib
			t.Parallel()
			reg := registrytest.Start(t, registrytest.Options{})
			d := digest.FromString("any") // nobody looks
			reg.PutBlobAs(repo, d, registrytest.Random(9, size))
			reg.SetRate(8*mib, 0) // 32 s for all of it
			c := newClient(t, func(cfg *Config) { cfg.StreamsPerBlob = streams }, registryOf(reg))
			sink := newSink(mib)
			sink.discard = true
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

// TestLastStreamIsNotSpare pins that a stream which began beside another brings the rest
// by itself once it is alone, even if its connection breaks and the registry then ignores
// Range.
func TestLastStreamIsNotSpare(t *testing.T) {
	const size, far, left = 18 * mib, 17 * mib, 1000
	reg := registrytest.Start(t, registrytest.Options{})
	d := reg.PutBlob(repo, registrytest.Random(9, size)).Digest
	first := reg.Inject(blobGet, registrytest.Hold(), registrytest.Times(1))
	second := reg.Inject(blobGet, registrytest.Skip(1), registrytest.Times(1), registrytest.StallAfter(size-far-left), registrytest.CutAfter(size-far-left+1))
	reg.Inject(blobGet, registrytest.Skip(2), registrytest.IgnoreRange())
	sink := newSinkOf(t, size)
	sink.at = func(written int64) {
		if written == size-left { // nothing is left for the first stream
			second.Release()
		}
	}
	go func() {
		<-first.Held()
		sink.mu.Lock()
		sink.wanted = far // starts the second
		sink.mu.Unlock()
		<-second.Held()
		first.Release()
	}()
	c := newClient(t, func(cfg *Config) { cfg.Stall, cfg.FirstByte = time.Minute, time.Minute }, registryOf(reg))
	if err := c.Fetch(t.Context(), target, d, sink); err != nil {
		t.Fatal(err)
	}
	sink.check(t, d)
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
	t.Parallel()
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
	reg.SetRate(24*mib, 0)
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
	if n, err := io.Copy(verifier, r); err != nil || n != size || !verifier.Verified() {
		t.Fatalf("read %d bytes, %v, verified %t", n, err, verifier.Verified())
	}
}

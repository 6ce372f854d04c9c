package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/time/rate"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// content returns n bytes that are the same for the same seed.
func content(seed uint64, n int) ([]byte, digest.Digest) {
	b := make([]byte, n)
	var key [32]byte
	key[0] = byte(seed)
	key[1] = byte(seed >> 8)
	if _, err := rand.NewChaCha8(key).Read(b); err != nil {
		panic(err)
	}
	return b, digest.FromBytes(b)
}

// open makes a cache in dir, not running, and closes it with the test.
func open(t testing.TB, opts Options) *Cache {
	t.Helper()
	if opts.Dir == "" {
		opts.Dir = t.TempDir()
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	c, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		checkBooks(t, c)
	})
	return c
}

// checkBooks holds the equation of the accounting (I7), once c has stopped.
func checkBooks(t testing.TB, c *Cache) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	var sum, pinned int64
	for d, b := range c.blobs {
		sum += b.size
		if c.pins[d] > 0 {
			pinned += b.size
		}
	}
	for _, i := range c.idle {
		sum += i.size
	}
	if c.used != sum || c.pinned != pinned || c.reserved != 0 || c.unbacked != 0 || len(c.filling) != 0 || c.lru.Len() != len(c.blobs) {
		t.Errorf("books: pinned %d of %d, used %d, sum %d, reserved %d, unbacked %d, filling %d, listed %d of %d blobs",
			c.pinned, pinned, c.used, sum, c.reserved, c.unbacked, len(c.filling), c.lru.Len(), len(c.blobs))
	}
}

// run runs c until stop is called or the test ends.
func run(t testing.TB, c *Cache) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	<-c.started
	var stopped bool
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// start is open and run.
func start(t testing.TB, opts Options) *Cache {
	t.Helper()
	c := open(t, opts)
	run(t, c)
	return c
}

// all is a source that brings body.
func all(body []byte) Source {
	return SourceFunc(func(_ context.Context, f *Fill) error {
		return feed(f.Writer(Origin{FromUpstream, "registry.test"}), body)
	})
}

func feed(w *Writer, body []byte) error {
	return copyMissing(w, io.NewSectionReader(bytes.NewReader(body), 0, int64(len(body))))
}

// mustRead reads d to the end through c.
func mustRead(t testing.TB, c *Cache, d digest.Digest, src Source) []byte {
	t.Helper()
	r, err := c.Open(context.Background(), d, src)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// settle waits for the fill of d to be booked.
func settle(c *Cache, d digest.Digest) {
	c.mu.Lock()
	f := c.filling[d]
	c.mu.Unlock()
	if f != nil {
		<-f.done
	}
	c.mu.Lock()
	var busy chan struct{} // of what was booked, and is not yet told of
	if b := c.blobs[d]; b != nil {
		busy = b.busy
	}
	c.mu.Unlock()
	if busy != nil {
		<-busy
	}
}

// TestBookedIsWrittenSoon: what is known of a blob, as who gave it, is on disk long
// before other metadata has to be.
func TestBookedIsWrittenSoon(t *testing.T) {
	c := start(t, Options{})
	for seed := range uint64(3) { // a flush is followed by another one
		begun := time.Now()
		body, d := content(seed, minPiece)
		mustRead(t, c, d, all(body))
		settle(c, d)
		written := func() bool {
			c.meta.db.mu.Lock()
			defer c.meta.db.mu.Unlock()
			return c.meta.db.waiting == 0 && len(c.meta.db.writing) == 0
		}
		for !written() && time.Since(begun) < flushInterval/2 {
			<-time.After(10 * time.Millisecond)
		}
		if !written() {
			t.Fatalf("blob %d: facts wait after %v", seed, time.Since(begun))
		}
	}
}

func TestOpenFillsOnceThenHits(t *testing.T) {
	for name, size := range map[string]int{"empty": 0, "one byte": 1, "one piece": minPiece, "a byte more": minPiece + 1, "many pieces": 5*minPiece + 77} {
		t.Run(name, func(t *testing.T) {
			c := start(t, Options{})
			body, d := content(1, size)
			if got := mustRead(t, c, d, all(body)); !bytes.Equal(got, body) {
				t.Fatalf("first read: %d bytes, want %d, or other bytes", len(got), len(body))
			}
			settle(c, d)
			if !c.Has(d) {
				t.Fatal("not committed")
			}
			r, err := c.Open(t.Context(), d, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if r.Origin().Kind != FromDisk {
				t.Errorf("a hit came from %q", r.Origin().Kind)
			}
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, body) {
				t.Fatalf("hit: %d bytes, %v", len(got), err)
			}
			if info, err := os.Stat(c.dir.blob(d)); err != nil || info.Mode().Perm() != blobMode {
				t.Errorf("blob file: %v, %v", info, err)
			}
		})
	}
}

func TestWrongBytes(t *testing.T) {
	c := start(t, Options{})
	body, d := content(2, 3*minPiece)
	wrong := bytes.Clone(body)
	wrong[10] ^= 1
	r, err := c.Open(t.Context(), d, all(wrong))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	if !errors.Is(err, ErrDigestMismatch) {
		t.Fatalf("read wrong bytes: %v", err)
	}
	if len(got) > 2*minPiece {
		t.Fatalf("%d bytes shown; the last piece must be held back", len(got))
	}
	settle(c, d)
	if got := mustRead(t, c, d, counting(all(body), 1, t)); !bytes.Equal(got, body) {
		t.Fatal("the next open did not start anew")
	}
}

// TestWrongBytesHaveASource: who reads in the log of wrong bytes learns who gave them. Of
// what rotted here that is no source of wrong bytes, only where the right ones came from.
func TestWrongBytesHaveASource(t *testing.T) {
	var said bytes.Buffer
	c := open(t, Options{Logger: slog.New(slog.NewTextHandler(&said, nil))})
	stop := run(t, c)
	body, d := content(2, 3*minPiece)
	from := func(body []byte) Source {
		return SourceFunc(func(_ context.Context, f *Fill) error {
			if err := f.SetSize(int64(len(body))); err != nil {
				return err
			}
			if _, err := f.Writer(Origin{FromPeer, "node-7"}).WriteAt(body[:2*minPiece], 0); err != nil {
				return err
			}
			return feed(f.Writer(registry), body)
		})
	}
	wrong := bytes.Clone(body)
	wrong[10] ^= 1
	if r, err := c.Open(t.Context(), d, from(wrong)); err == nil {
		_, _ = io.ReadAll(r)
		r.Close()
	}
	settle(c, d)
	mustRead(t, c, d, from(body))
	settle(c, d)
	stop()
	tear(t, c.dir.blob(d), 10)
	c.scrubBlob(t.Context(), c.blobs[d], rate.NewLimiter(rate.Inf, readBlock))
	for want, key := range map[string]string{"fetched blob does not match": "source", "scrub found a bad blob": "origins"} {
		i := slices.IndexFunc(strings.Split(said.String(), "\n"), func(line string) bool {
			return strings.Contains(line, want) && strings.Contains(line, d.String()) && strings.Contains(line, " "+key+`="peer node-7, upstream registry.test"`)
		})
		if i < 0 {
			t.Errorf("no %q with its %s in %s", want, key, said.String())
		}
	}
}

func TestSources(t *testing.T) {
	many := map[Origin]int64{}
	for i := range 9 {
		many[Origin{FromPeer, fmt.Sprint("node-", i)}] = 10
	}
	many[registry] = 1
	for want, tt := range map[string]struct {
		size int64
		from map[Origin]int64
	}{
		"unknown":                      {0, nil},
		"runtime":                      {10, map[Origin]int64{{Kind: FromRuntime}: 10}},
		"disk, upstream registry.test": {10, map[Origin]int64{registry: 4}},
		"upstream registry.test, disk": {10, map[Origin]int64{registry: 6}},
		"peer node-0, peer node-1, peer node-2, peer node-3 and 6 more": {91, many},
	} {
		if got := sources(tt.size, tt.from); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// counting is src, which must be told of so many mismatches.
func counting(src Source, want int, t *testing.T) Source {
	return SourceFunc(func(ctx context.Context, f *Fill) error {
		if got := f.Mismatches(); got != want {
			t.Errorf("the source was told of %d mismatches, want %d", got, want)
		}
		return src.Fetch(ctx, f)
	})
}

// TestMismatchesAreCounted pins what sources are told: how many fills in a row ended
// with wrong bytes, those that other nodes saw included.
func TestMismatchesAreCounted(t *testing.T) {
	var told []int
	c := start(t, Options{Events: Events{Mismatched: func(_ digest.Digest, times int) { told = append(told, times) }}})
	body, d := content(2, 3*minPiece)
	wrong := bytes.Clone(body)
	wrong[10] ^= 1
	fails := func(src Source) {
		t.Helper()
		if r, err := c.Open(t.Context(), d, src); errors.Is(err, ErrDigestMismatch) {
			// the fill was over before this goroutine looked
		} else if err != nil {
			t.Fatal(err)
		} else if _, err := io.ReadAll(r); !errors.Is(err, ErrDigestMismatch) {
			t.Errorf("read wrong bytes: %v", err)
		} else if err := r.Close(); err != nil {
			t.Error(err)
		}
		settle(c, d)
	}
	fails(counting(all(wrong), 0, t))
	fails(counting(all(wrong), 1, t))
	if got := mustRead(t, c, d, counting(all(body), 2, t)); !bytes.Equal(got, body) {
		t.Fatal("not what the source gave")
	}
	settle(c, d)
	if err := c.Remove(d); err != nil {
		t.Fatal(err)
	}
	fails(SourceFunc(func(ctx context.Context, f *Fill) error {
		if f.Mismatches() != 0 {
			t.Error("a success is not the end of it")
		}
		f.RaiseMismatches(1)
		return all(wrong).Fetch(ctx, f)
	}))
	mustRead(t, c, d, counting(all(body), 2, t))
	if !slices.Equal(told, []int{1, 2, 2}) {
		t.Errorf("told of %v", told)
	}
}

// TestMismatchIsCountedWhenHeard: a reader that fails for wrong bytes finds that counted,
// however long the fill takes to be cleared away. Else a blob that was wrong twice would
// be offered a third time to the client that has just been told of the second.
func TestMismatchIsCountedWhenHeard(t *testing.T) {
	c := start(t, Options{})
	body, d := content(3, 3*minPiece)
	writing, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	c.faults = func(s step, _ digest.Digest) error {
		if s == stepWrite {
			once.Do(func() {
				close(writing)
				<-release
			})
		}
		return nil
	}
	for times := 1; times <= 2; times++ {
		r, err := c.Open(t.Context(), d, SourceFunc(func(_ context.Context, f *Fill) error {
			if err := f.SetSize(int64(len(body))); err != nil {
				return err
			}
			writer := f.Writer(Origin{Kind: FromPeer})
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = writer.WriteAt(body[:minPiece], 0)
			}()
			defer func() { <-done }()
			<-writing
			f.fail(ErrDigestMismatch)
			return ErrDigestMismatch
		}))
		if err == nil {
			_, err = io.ReadAll(r)
			_ = r.Close()
		}
		if !errors.Is(err, ErrDigestMismatch) {
			t.Fatal(err)
		}
		if got := c.Mismatches(d); got != times {
			t.Errorf("heard of %d, counted %d", times, got)
		}
		if times == 1 {
			close(release)
		}
		settle(c, d)
		if got := c.Mismatches(d); got != times {
			t.Errorf("in the end %d, counted %d", times, got)
		}
	}
}

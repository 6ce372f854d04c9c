package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestStorm races opens, removals, pins, look-ups and evictions of a few blobs
// in too little room; every reader gets the right bytes or a good reason.
func TestStorm(t *testing.T) {
	var here sync.Map // what the events say is here
	c := start(t, Options{MaxBytes: Bytes(3 << 20), Events: Events{
		Committed: func(d digest.Digest, _ int64) {
			if _, twice := here.LoadOrStore(d, true); twice {
				t.Errorf("%s committed twice", d)
			}
		},
		Removing: func(d digest.Digest) {
			if _, was := here.LoadAndDelete(d); !was {
				t.Errorf("%s withdrawn without having been committed", d)
			}
		},
	}})
	const blobs = 12
	rounds := 300
	if testing.Short() {
		rounds = 60
	}
	bodies, digests := make([][]byte, blobs), make([]digest.Digest, blobs)
	for i := range blobs {
		bodies[i], digests[i] = content(uint64(300+i), 100_000+i*70_000)
	}
	var clients sync.WaitGroup
	for k := range 8 {
		clients.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(k), 1))
			for range rounds {
				i := rnd.IntN(blobs)
				switch rnd.IntN(10) {
				case 0:
					if err := c.Remove(digests[i]); err != nil {
						t.Error(err)
					}
				case 1:
					c.Pin(digests[i])
					c.Unpin(digests[i])
				case 2:
					if r, ok := c.Lookup(digests[i]); ok {
						r.Close()
					}
				default:
					checkedRead(t, c, digests[i], bodies[i])
				}
			}
		})
	}
	clients.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for d := range c.blobs {
		if _, known := here.Load(d); !known && c.blobs[d].busy == nil {
			t.Errorf("%s was never announced", d)
		}
	}
}

func checkedRead(t *testing.T, c *Cache, d digest.Digest, body []byte) {
	r, err := c.Open(context.Background(), d, all(body))
	if errors.Is(err, ErrNoRoom) {
		return
	}
	if err != nil {
		t.Error(err)
		return
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes of %d, %v", len(got), len(body), err)
	}
}

// zeros is a blob that costs no memory: size zero bytes.
func zeros(size int64) digest.Digest {
	h := sha256.New()
	_, _ = io.CopyN(h, zeroReader{}, size)
	return digest.NewDigest(digest.SHA256, h)
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// pour is a source of size zero bytes, in order.
func pour(size int64) Source {
	return SourceFunc(func(_ context.Context, f *Fill) error {
		if err := f.SetSize(size); err != nil {
			return err
		}
		w, block := f.Writer(registry), make([]byte, 64<<10)
		for off := int64(0); off < size; off += int64(len(block)) {
			if _, err := w.WriteAt(block[:min(int64(len(block)), size-off)], off); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestConstantMemory streams a huge blob through eight readers and watches the
// heap (I8).
func TestConstantMemory(t *testing.T) {
	size := int64(4 << 30)
	if testing.Short() {
		size = 96 << 20
	}
	const most = 8 << 20
	c := start(t, Options{})
	d := zeros(size)
	var before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var peak atomic.Uint64
	watch := func() {
		var now runtime.MemStats
		runtime.ReadMemStats(&now)
		for old := peak.Load(); now.HeapAlloc > old && !peak.CompareAndSwap(old, now.HeapAlloc); old = peak.Load() {
		}
	}
	var readers sync.WaitGroup
	for k := range 8 {
		readers.Go(func() {
			r, err := c.Open(context.Background(), d, pour(size))
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Close()
			block := make([]byte, 32<<10)
			var read int64
			for n := 0; err == nil; n++ {
				var got int
				got, err = r.Read(block)
				read += int64(got)
				if k == 0 && n%500 == 0 {
					watch()
				}
			}
			if !errors.Is(err, io.EOF) || read != size {
				t.Errorf("read %d bytes, %v", read, err)
			}
		})
	}
	readers.Wait()
	settle(c, d)
	if grown := int64(peak.Load()) - int64(before.HeapAlloc); grown > most {
		t.Errorf("the heap grew by %d bytes; want at most %d", grown, most)
	} else {
		t.Logf("the heap grew by %d KiB", grown>>10)
	}
	if err := c.Remove(d); err != nil {
		t.Error(err)
	}
}

// TestStateIsSmall pins the memory that the largest blob's pieces take.
func TestStateIsSmall(t *testing.T) {
	if n := pieceCount(20 << 30); n != 2560 {
		t.Errorf("20 GiB has %d pieces", n)
	}
	const perPiece = 4 + 4 + 1 + sha256.Size // pieces, and the chaining value
	if n := pieceCount(maxBlob) * perPiece; n > 6<<20 {
		t.Errorf("the largest blob takes %d bytes of state", n)
	}
}

// TestSlowReaderBlocksNobody leaves one reader at its first byte while the
// blob fills and others read it.
func TestSlowReaderBlocksNobody(t *testing.T) {
	c := start(t, Options{})
	body, d := content(400, 5*minPiece)
	slow, err := c.Open(t.Context(), d, all(body))
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	one := make([]byte, 1)
	if _, err := slow.Read(one); err != nil {
		t.Fatal(err)
	}
	if got := mustRead(t, c, d, nil); !bytes.Equal(got, body) {
		t.Error("wrong bytes")
	}
	settle(c, d)
	if !c.Has(d) {
		t.Error("not committed")
	}
}

func BenchmarkHit(b *testing.B) {
	c := start(b, Options{})
	body, d := content(500, 4<<10)
	if err := c.Put(context.Background(), d, registry, body); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, len(body))
	b.ReportAllocs()
	for b.Loop() {
		r, err := c.Open(context.Background(), d, nil)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := r.ReadAt(buf, 0); err != nil {
			b.Fatal(err)
		}
		r.Close()
	}
}

func BenchmarkFill(b *testing.B) {
	for _, readers := range []int{1, 8} {
		b.Run(fmt.Sprintf("readers=%d", readers), func(b *testing.B) {
			const size = 128 << 20
			c := start(b, Options{})
			d := zeros(size)
			b.SetBytes(size)
			for b.Loop() {
				var all sync.WaitGroup
				for range readers {
					r, err := c.Open(context.Background(), d, pour(size))
					if err != nil {
						b.Fatal(err)
					}
					all.Go(func() {
						defer r.Close()
						if _, err := io.Copy(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}); err != nil {
							b.Error(err)
						}
					})
				}
				all.Wait()
				settle(c, d)
				if err := c.Remove(d); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

var registry = Origin{FromUpstream, "registry.test"}

// manual is a source that the test drives: it hands out the fill and ends
// when the test says so, or with ctx.
type manual struct {
	fills chan *Fill
	end   chan error
	calls atomic.Int32
}

func newManual() *manual { return &manual{fills: make(chan *Fill, 1), end: make(chan error, 1)} }

func (m *manual) Fetch(ctx context.Context, f *Fill) error {
	m.calls.Add(1)
	m.fills <- f
	select {
	case err := <-m.end:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// begin opens d with a manual source and announces size.
func begin(t *testing.T, c *Cache, d digest.Digest, size int64) (*manual, *Fill, *Reader) {
	t.Helper()
	m := newManual()
	opened := make(chan *Reader, 1)
	go func() {
		r, err := c.Open(t.Context(), d, m)
		if err != nil {
			t.Error(err)
		}
		opened <- r
	}()
	f := <-m.fills
	if err := f.SetSize(size); err != nil {
		t.Fatal(err)
	}
	r := <-opened
	if r == nil {
		t.FailNow()
	}
	t.Cleanup(func() { r.Close() })
	return m, f, r
}

// put writes body[from:to] into f.
func put(t *testing.T, f *Fill, body []byte, from, to int) {
	t.Helper()
	if n, err := f.Writer(registry).WriteAt(body[from:to], int64(from)); err != nil || n != to-from {
		t.Fatalf("write %d..%d: %d, %v", from, to, n, err)
	}
}

func TestPiecesInAnyOrderFromManyWriters(t *testing.T) {
	c := start(t, Options{})
	body, d := content(3, 20*minPiece+999)
	src := SourceFunc(func(_ context.Context, f *Fill) error {
		if err := f.SetSize(int64(len(body))); err != nil {
			return err
		}
		order := rand.New(rand.NewPCG(3, 3)).Perm(f.Pieces())
		var writers sync.WaitGroup
		for k := range 4 {
			writers.Go(func() {
				w := f.Writer(Origin{FromPeer, fmt.Sprint("node", k)})
				for n, i := range order {
					if n%3 != k%3 { // two writers share a third of the pieces: the endgame
						continue
					}
					from := i * minPiece
					piece := body[from:min(from+minPiece, len(body))]
					for off := 0; off < len(piece); off += 50_000 {
						if _, err := w.WriteAt(piece[off:min(off+50_000, len(piece))], int64(from+off)); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		writers.Wait()
		return nil
	})
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() {
			r, err := c.Open(context.Background(), d, src)
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Close()
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, body) {
				t.Errorf("read %d bytes, %v", len(got), err)
			}
		})
	}
	readers.Wait()
	settle(c, d)
	got, _ := c.Meta().Fetched(d)
	var sum int64
	for _, n := range got.Origins {
		sum += n
	}
	if sum != int64(len(body)) {
		t.Errorf("origins add up to %d bytes of %d: %v", sum, len(body), got.Origins)
	}
}

func TestOneFillForAll(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := start(t, Options{Registerer: reg})
	body, d := content(4, 2*minPiece)
	m, f, _ := begin(t, c, d, int64(len(body)))
	const clients = 20
	var all sync.WaitGroup
	for range clients {
		r, err := c.Open(context.Background(), d, m)
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			defer r.Close()
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, body) {
				t.Errorf("read %d bytes, %v", len(got), err)
			}
		})
	}
	put(t, f, body, 0, len(body))
	all.Wait()
	settle(c, d)
	if n := m.calls.Load(); n != 1 {
		t.Errorf("the source was asked %d times", n)
	}
	if n := testutil.ToFloat64(c.metrics.joined); n != clients {
		t.Errorf("joined_fills_total = %v, want %d", n, clients)
	}
	if n := testutil.ToFloat64(c.metrics.bytes.WithLabelValues("upstream")); n != float64(len(body)) {
		t.Errorf("fetched_bytes_total = %v, want %d", n, len(body))
	}
	if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
		t.Errorf("metrics: %v, %v", problems, err)
	}
}

// TestBytesShowInsideAPiece pins that a slow upstream delays readers by
// nothing: not by pieces of up to 8 MiB.
func TestBytesShowInsideAPiece(t *testing.T) {
	c := start(t, Options{})
	body, d := content(5, 3*minPiece)
	_, f, r := begin(t, c, d, int64(len(body)))
	buf := make([]byte, 4096)
	for off := 0; off < 3000; off += 1000 {
		put(t, f, body, off, off+1000)
		n, err := r.Read(buf)
		if err != nil || n != 1000 || !bytes.Equal(buf[:n], body[off:off+n]) {
			t.Fatalf("read %d bytes, %v after 1000 arrived", n, err)
		}
	}
	if r.Origin() != registry {
		t.Errorf("origin %v", r.Origin())
	}
}

func TestLastPieceIsHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, Options{})
		stop := run(t, c)
		defer stop()
		body, d := content(6, 2*minPiece+5)
		_, f, r := begin(t, c, d, int64(len(body)))
		put(t, f, body, minPiece, len(body)) // everything but the first piece
		synctest.Wait()
		if _, n, err := r.Extent(minPiece); n != minPiece || err != nil {
			t.Errorf("the middle piece shows %d bytes, %v", n, err)
		}
		if _, n, err := r.Extent(2 * minPiece); n != 0 || err != nil {
			t.Errorf("the last piece shows %d bytes, %v", n, err)
		}
		if r.HasPiece(2) || !r.HasPiece(1) || !f.Has(2) {
			t.Error("HasPiece and Has disagree with the hold-back")
		}
		put(t, f, body, 0, minPiece)
		if err := r.Ready(t.Context(), 2*minPiece); err != nil {
			t.Error(err)
		}
		if !r.Complete() {
			t.Error("last piece shown before the digest matched")
		}
		settle(c, d)
	})
}

func TestClientsDoNotDecide(t *testing.T) {
	c := start(t, Options{})
	body, d := content(7, 4*minPiece)
	_, f, r := begin(t, c, d, int64(len(body)))
	ctx, hangUp := context.WithCancelCause(t.Context())
	other, err := c.Open(ctx, d, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	hung := errors.New("client hung up")
	hangUp(hung)
	if _, err := other.Read(make([]byte, 1)); !errors.Is(err, hung) {
		t.Errorf("read after hang-up: %v", err)
	}
	r.Close() // the one who started the fill goes, too
	put(t, f, body, 0, len(body))
	settle(c, d)
	if !c.Has(d) {
		t.Error("the fill died with its clients")
	}
}

func TestSizeLies(t *testing.T) {
	body, d := content(8, 2*minPiece)
	for name, tt := range map[string]struct {
		lie  func(f *Fill) error
		want error
	}{
		"longer": {func(f *Fill) error {
			_, err := f.Writer(registry).WriteAt(append(bytes.Clone(body), 1), 0)
			return err
		}, ErrSizeMismatch},
		"shorter":   {func(f *Fill) error { _, err := f.Writer(registry).WriteAt(body[:1000], 0); return err }, io.ErrUnexpectedEOF},
		"different": {func(f *Fill) error { return f.SetSize(int64(len(body)) + 1) }, ErrSizeMismatch},
	} {
		t.Run(name, func(t *testing.T) {
			c := start(t, Options{})
			src := SourceFunc(func(_ context.Context, f *Fill) error {
				if err := f.SetSize(int64(len(body))); err != nil {
					return err
				}
				_ = tt.lie(f)
				return nil
			})
			r, err := c.Open(t.Context(), d, src)
			if err == nil {
				_, err = io.ReadAll(r)
				r.Close()
			}
			var fe *FillError
			if !errors.Is(err, tt.want) || !errors.As(err, &fe) || fe.Digest != d {
				t.Errorf("got %v, want a FillError with %v", err, tt.want)
			}
			settle(c, d)
			if got := mustRead(t, c, d, all(body)); !bytes.Equal(got, body) {
				t.Error("the next fill got something else")
			}
		})
	}
	for name, size := range map[string]int64{"negative": -1, "absurd": maxBlob + 1, "nothing": 0} {
		t.Run(name, func(t *testing.T) {
			c := start(t, Options{})
			if _, err := c.Open(t.Context(), d, SourceFunc(func(_ context.Context, f *Fill) error { return f.SetSize(size) })); err == nil {
				t.Error("accepted")
			}
		})
	}
}

func TestSourceErrors(t *testing.T) {
	body, d := content(9, 3*minPiece)
	broken := errors.New("upstream is broken")
	c := start(t, Options{})
	t.Run("before the size", func(t *testing.T) {
		_, err := c.Open(t.Context(), d, SourceFunc(func(context.Context, *Fill) error { return broken }))
		if !errors.Is(err, broken) {
			t.Errorf("got %v", err)
		}
		settle(c, d)
	})
	t.Run("of a fill that was joined", func(t *testing.T) {
		m := newManual()
		first, second := make(chan error, 1), make(chan error, 1)
		open := func(to chan error) {
			_, err := c.Open(t.Context(), d, m)
			to <- err
		}
		go open(first)
		<-m.fills
		go open(second)
		for testutil.ToFloat64(c.metrics.joined) == 0 {
			runtime.Gosched()
		}
		m.end <- broken
		var mine, theirs *FillError
		if !errors.As(<-first, &mine) || mine.Joined {
			t.Errorf("the one who started it got %+v", mine)
		}
		if !errors.As(<-second, &theirs) || !theirs.Joined || !errors.Is(theirs, broken) {
			t.Errorf("the one who joined got %+v", theirs)
		}
		settle(c, d)
	})
	t.Run("of a fill that was joined, in the middle", func(t *testing.T) {
		body, d := content(11, 3*minPiece)
		m, f, mine := begin(t, c, d, int64(len(body)))
		theirs, err := c.Open(t.Context(), d, m)
		if err != nil {
			t.Fatal(err)
		}
		put(t, f, body, 0, minPiece)
		m.end <- broken
		for r, joined := range map[*Reader]bool{mine: false, theirs: true} {
			_, read := io.ReadAll(r)
			_, _, extent := r.Extent(minPiece)
			for name, err := range map[string]error{"Read": read, "Ready": r.Ready(t.Context(), minPiece), "Extent": extent, "Err": r.Err()} {
				if fe, ok := errors.AsType[*FillError](err); !ok || fe.Joined != joined || !errors.Is(err, broken) {
					t.Errorf("%s, joined %v: %#v", name, joined, err)
				}
			}
			_ = r.Close()
		}
		settle(c, d)
	})
	t.Run("without a size", func(t *testing.T) {
		_, err := c.Open(t.Context(), d, SourceFunc(func(context.Context, *Fill) error { return nil }))
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("got %v", err)
		}
		settle(c, d)
	})
	t.Run("in the middle, then resumed", func(t *testing.T) {
		m, f, r := begin(t, c, d, int64(len(body)))
		put(t, f, body, 0, minPiece+100)
		m.end <- broken
		got, err := io.ReadAll(r)
		if !errors.Is(err, broken) || !bytes.Equal(got, body[:minPiece+100]) {
			t.Errorf("%d bytes, then %v", len(got), err)
		}
		settle(c, d)
		from := int64(-1)
		src := SourceFunc(func(ctx context.Context, f *Fill) error {
			from, _, _ = f.Missing(0)
			return all(body).Fetch(ctx, f)
		})
		if got := mustRead(t, c, d, src); !bytes.Equal(got, body) {
			t.Error("wrong bytes")
		}
		if from != minPiece {
			t.Errorf("the next fill began at %d; the first piece was there", from)
		}
	})
	t.Run("after everything was written", func(t *testing.T) {
		body, d := content(10, 100)
		src := SourceFunc(func(ctx context.Context, f *Fill) error {
			return errors.Join(all(body).Fetch(ctx, f), broken)
		})
		if got := mustRead(t, c, d, src); !bytes.Equal(got, body) {
			t.Error("wrong bytes")
		}
	})
}

func TestWritesInTheWrongPlace(t *testing.T) {
	c := start(t, Options{})
	body, d := content(11, 2*minPiece)
	m := newManual()
	go func() {
		if r, err := c.Open(t.Context(), d, m); err == nil {
			r.Close()
		}
	}()
	f := <-m.fills
	w := f.Writer(registry)
	if _, err := w.WriteAt(body[:10], 0); !errors.Is(err, errGap) {
		t.Errorf("write before the size: %v", err)
	}
	if f.Size() != -1 || f.Pieces() != 0 || f.Has(0) {
		t.Error("size known too early")
	}
	if err := w.SetSize(int64(len(body))); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt(body[100:200], 100); !errors.Is(err, errGap) {
		t.Errorf("write that leaves a gap: %v", err)
	}
	put(t, f, body, 0, 150)
	garbage := append(make([]byte, 150), body[150:300]...)
	if n, err := w.WriteAt(garbage, 0); n != 300 || err != nil {
		t.Errorf("write over present bytes: %d, %v", n, err)
	}
	if start, end, ok := f.Missing(200); start != 300 || end != int64(len(body)) || !ok {
		t.Errorf("Missing(200) = %d, %d, %v", start, end, ok)
	}
	put(t, f, body, 300, len(body))
	settle(c, d)
	if got := mustRead(t, c, d, nil); !bytes.Equal(got, body) {
		t.Error("present bytes were overwritten")
	}
	if _, err := w.WriteAt(body[:1], 0); err != nil && !errors.Is(err, errGap) {
		t.Logf("late write: %v", err)
	}
}

func TestWantedFollowsReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, Options{})
		stop := run(t, c)
		defer stop()
		body, d := content(12, 8*minPiece)
		m, f, r := begin(t, c, d, int64(len(body)))
		if got := f.Wanted(); got != 0 {
			t.Errorf("nobody reads: Wanted = %d", got)
		}
		changed := f.Changed()
		second, err := c.Open(t.Context(), d, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer second.Close()
		var blocked sync.WaitGroup
		for _, at := range []struct {
			r   *Reader
			off int64
		}{{r, 6 * minPiece}, {second, 3*minPiece + 7}} {
			blocked.Go(func() { _, _ = at.r.ReadAt(make([]byte, 1), at.off) })
		}
		synctest.Wait()
		select {
		case <-changed:
		default:
			t.Error("Changed did not tell of blocked readers")
		}
		if got := f.Wanted(); got != 3*minPiece+7 {
			t.Errorf("Wanted = %d, want the lowest blocked offset", got)
		}
		put(t, f, body, 3*minPiece, 4*minPiece)
		put(t, f, body, 6*minPiece, 7*minPiece)
		blocked.Wait()
		if got := f.Wanted(); got != 3*minPiece+7 {
			t.Errorf("Wanted = %d, want the slowest reader's cursor", got)
		}
		m.end <- errors.New("over")
		<-f.done
	})
}

// TestWriterWaitsForAClaim: nobody writes a piece that an earlier process recorded before
// it has been re-read (I11).
func TestWriterWaitsForAClaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, Options{})
		body, d := content(15, 2*minPiece)
		f := newFill(c, d, nil, 0)
		p := newPieces(int64(len(body)))
		p.claim(0, 1)
		f.adopt(p, nil, nil) // writing would fail
		written := make(chan error, 1)
		go func() {
			_, err := f.write(body[:minPiece], 0, registry, nil)
			written <- err
		}()
		synctest.Wait()
		select {
		case err := <-written:
			t.Fatalf("it has not waited: %v", err)
		default:
		}
		f.settleClaim(0, true, 1)
		if err := <-written; err != nil || !p.full(0) {
			t.Errorf("%v; %d bytes there", err, p.have[0])
		}
	})
}

func TestServeContentWhileFilling(t *testing.T) {
	c := start(t, Options{})
	body, d := content(13, 6*minPiece+321)
	_, f, r := begin(t, c, d, int64(len(body)))
	r.Close()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r, err := c.Open(req.Context(), d, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer r.Close()
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, req, "", time.Time{}, r)
	}))
	defer srv.Close()
	var clients sync.WaitGroup
	for i := range 16 { // containerd's concurrent_layer_fetch_buffer: open-ended, overlapping
		clients.Go(func() {
			from := i * len(body) / 16
			req, _ := http.NewRequest("GET", srv.URL, nil)
			req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
			res, err := srv.Client().Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer res.Body.Close()
			got, err := io.ReadAll(res.Body)
			if err != nil || res.StatusCode != http.StatusPartialContent || !bytes.Equal(got, body[from:]) {
				t.Errorf("range from %d: %s, %d bytes, %v", from, res.Status, len(got), err)
			}
		})
	}
	for i := range f.Pieces() {
		i = f.Pieces() - 1 - i // worst order
		put(t, f, body, i*minPiece, min((i+1)*minPiece, len(body)))
	}
	clients.Wait()
	settle(c, d)
}

func TestReaderSurvives(t *testing.T) {
	c := start(t, Options{})
	body, d := content(14, 3*minPiece)
	_, f, r := begin(t, c, d, int64(len(body)))
	put(t, f, body, 0, minPiece)
	got := make([]byte, 100)
	if _, err := io.ReadFull(r, got); err != nil {
		t.Fatal(err)
	}
	put(t, f, body, minPiece, len(body))
	settle(c, d)
	hit, err := c.Open(t.Context(), d, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer hit.Close()
	if err := c.Remove(d); err != nil || c.Has(d) {
		t.Fatalf("remove: %v", err)
	}
	rest, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(append(got, rest...), body) {
		t.Errorf("across commit and removal: %d bytes, %v", len(rest), err)
	}
	if file, n, err := r.Extent(0); err != nil || n != r.Size() {
		t.Errorf("extent after the commit: %d bytes, %v", n, err)
	} else if all, err := io.ReadAll(file); err != nil || !bytes.Equal(all, body) {
		t.Errorf("file of the extent: %d bytes, %v", len(all), err)
	}
	if all, err := io.ReadAll(hit); err != nil || !bytes.Equal(all, body) {
		t.Errorf("hit after removal: %d bytes, %v", len(all), err)
	}
	if err := errors.Join(r.Close(), hit.Close()); err != nil {
		t.Error(err)
	}
	if _, err := r.Read(got); err == nil {
		t.Error("read after Close")
	}
	if _, _, err := r.Extent(0); err == nil {
		t.Error("extent after Close")
	}
}

func TestExtentsOfAFill(t *testing.T) {
	c := start(t, Options{})
	body, d := content(15, 4*minPiece+1)
	_, f, r := begin(t, c, d, int64(len(body)))
	sent := make(chan []byte, 1)
	go func() {
		var out bytes.Buffer
		defer func() { sent <- out.Bytes() }()
		for off := int64(0); off < r.Size(); off = int64(out.Len()) {
			if err := r.Ready(t.Context(), off); err != nil {
				t.Errorf("ready at %d: %v", off, err)
				return
			}
			file, n, err := r.Extent(off)
			if n == 0 || err != nil {
				t.Errorf("extent at %d, which is ready: %d bytes, %v", off, n, err)
				return
			}
			_, _ = io.Copy(&out, io.NewSectionReader(file, off, n)) // what it lacks shows below
		}
	}()
	for i := range f.Pieces() {
		put(t, f, body, i*minPiece, min((i+1)*minPiece, len(body)))
	}
	if out := <-sent; !bytes.Equal(out, body) {
		t.Errorf("sent %d bytes", len(out))
	}
	settle(c, d)
}

func TestLookupWaitsForNothing(t *testing.T) {
	c := start(t, Options{})
	body, d := content(16, 3*minPiece)
	if _, ok := c.Lookup(d); ok {
		t.Error("found what is not there")
	}
	_, f, _ := begin(t, c, d, int64(len(body)))
	r, ok := c.Lookup(d)
	if !ok {
		t.Fatal("a running fill was not found")
	}
	defer r.Close()
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, ErrMissing) {
		t.Errorf("read of missing bytes: %v", err)
	}
	changed := r.Changed()
	put(t, f, body, 0, minPiece)
	<-changed
	if !r.HasPiece(0) || r.HasPiece(1) || r.HasPiece(3) || r.HasPiece(-1) {
		t.Error("HasPiece")
	}
	for bits := range 63 { // none is an offset once more when it is multiplied
		if i := 1 << bits; r.HasPiece(math.MaxInt-i) || i > 2 && r.HasPiece(i) {
			t.Errorf("HasPiece of one about 1<<%d", bits)
		}
	}
	piece := make([]byte, minPiece)
	if n, err := r.ReadAt(piece, 0); err != nil || !bytes.Equal(piece[:n], body[:minPiece]) {
		t.Errorf("piece: %d bytes, %v", n, err)
	}
	if f.Wanted() != minPiece {
		t.Error("a peer's reader moved Wanted")
	}
	put(t, f, body, minPiece, len(body))
	settle(c, d)
	if again, ok := c.Lookup(d); !ok {
		t.Error("a committed blob was not found")
	} else {
		again.Close()
	}
}

// TestLookupPiecesShowsTheLastPiece: other nodes check each piece by its own
// digest, so the end of a blob spreads before anybody has all of it, while
// readers for runtimes still wait for the whole digest.
func TestLookupPiecesShowsTheLastPiece(t *testing.T) {
	c := start(t, Options{})
	body, d := content(18, 3*minPiece)
	_, f, _ := begin(t, c, d, int64(len(body)))
	put(t, f, body, 2*minPiece, len(body))
	for _, lookup := range []struct {
		name string
		open func(digest.Digest) (*Reader, bool)
		want bool
	}{{"Lookup", c.Lookup, false}, {"LookupPieces", c.LookupPieces, true}} {
		r, ok := lookup.open(d)
		if !ok {
			t.Fatal("a running fill was not found")
		}
		defer r.Close()
		_, err := r.ReadAt(make([]byte, minPiece), 2*minPiece)
		if r.HasPiece(2) != lookup.want || (err == nil) != lookup.want {
			t.Errorf("%s: has the last piece %t, read %v", lookup.name, r.HasPiece(2), err)
		}
	}
	put(t, f, body, 0, 2*minPiece)
	settle(c, d)
}

// TestLastPieceForPart: who reads a part of a blob does not wait for all of it, and is
// shown the end no longer once the rest is here.
func TestLastPieceForPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, Options{})
		stop := run(t, c)
		defer stop()
		body, d := content(19, 2*minPiece+5)
		_, f, whole := begin(t, c, d, int64(len(body)))
		r, err := c.Open(t.Context(), d, newManual())
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		r.ForPart()
		ready := make(chan error, 1)
		go func() { ready <- r.Ready(t.Context(), 2*minPiece) }()
		synctest.Wait()
		put(t, f, body, 2*minPiece, len(body)-1)
		synctest.Wait()
		select {
		case err := <-ready:
			if err != nil {
				t.Error(err)
			}
		default:
			t.Error("a part of the blob waits for all of it")
		}
		for _, tt := range []struct {
			name string
			r    *Reader
			want int64
		}{{"part", r, 4}, {"whole", whole, 0}} {
			if _, n, err := tt.r.Extent(2 * minPiece); n != tt.want || err != nil {
				t.Errorf("%s: the last piece shows %d bytes, %v; want %d", tt.name, n, err, tt.want)
			}
		}
		put(t, f, body, 0, 2*minPiece)
		if _, n, err := r.Extent(2 * minPiece); n != 0 || err != nil {
			t.Errorf("the rest is here: the last piece shows %d bytes, %v", n, err)
		}
		put(t, f, body, len(body)-1, len(body))
		settle(c, d)
	})
}

func TestPut(t *testing.T) {
	c := start(t, Options{})
	body, d := content(17, 700)
	if err := c.Put(t.Context(), d, registry, append(body, 1)); !errors.Is(err, ErrDigestMismatch) {
		t.Errorf("wrong body: %v", err)
	}
	if err := c.Put(t.Context(), "sha256:../../x", registry, body); !errors.Is(err, ErrInvalidDigest) {
		t.Errorf("path escape: %v", err)
	}
	for range 2 {
		if err := c.Put(t.Context(), d, registry, body); err != nil {
			t.Fatal(err)
		}
	}
	if got := mustRead(t, c, d, nil); !bytes.Equal(got, body) {
		t.Error("wrong bytes")
	}
	body, d = content(18, 3*minPiece)
	_, f, r := begin(t, c, d, int64(len(body)))
	put(t, f, body, 0, 500)
	if err := c.Put(t.Context(), d, Origin{FromPeer, "n"}, body); err != nil || !c.Has(d) {
		t.Errorf("put into a running fill: %v", err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, body) {
		t.Errorf("its reader: %d bytes, %v", len(got), err)
	}
	sum := digest.SHA512.FromBytes(body)
	if err := c.Put(t.Context(), sum, registry, body); err != nil || !bytes.Equal(mustRead(t, c, sum, nil), body) {
		t.Errorf("sha512: %v", err)
	}
}

func TestStop(t *testing.T) {
	c := open(t, Options{})
	stop := run(t, c)
	body, d := content(19, 3*minPiece)
	_, f, r := begin(t, c, d, int64(len(body)))
	put(t, f, body, 0, 10)
	stop()
	got, err := io.ReadAll(r)
	if !errors.Is(err, ErrClosed) || len(got) != 10 {
		t.Errorf("%d bytes, then %v", len(got), err)
	}
	if _, err := c.Open(t.Context(), d, all(body)); !errors.Is(err, ErrClosed) {
		t.Errorf("open after the end: %v", err)
	}
	if err := c.Run(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("second run: %v", err)
	}
}

func TestOpenWaitsForRun(t *testing.T) {
	c := open(t, Options{})
	body, d := content(20, 10)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Open(ctx, d, all(body)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	got := make(chan []byte)
	go func() { got <- mustRead(t, c, d, all(body)) }()
	run(t, c)
	if !bytes.Equal(<-got, body) {
		t.Error("wrong bytes")
	}
}

// TestReaderConforms runs the standard library's reader test on each state.
func TestReaderConforms(t *testing.T) {
	c := start(t, Options{})
	body, d := content(21, 20_000)
	_, f, r := begin(t, c, d, int64(len(body)))
	put(t, f, body, 0, len(body))
	settle(c, d)
	hit, err := c.Open(t.Context(), d, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer hit.Close()
	peer, ok := c.Lookup(d)
	if !ok {
		t.Fatal("not found")
	}
	defer peer.Close()
	for name, r := range map[string]*Reader{"joined": r, "hit": hit, "looked up": peer} {
		if err := iotest.TestReader(r, body); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if r.Size() != int64(len(body)) || r.Err() != nil || !r.Complete() {
			t.Errorf("%s: size %d, err %v", name, r.Size(), r.Err())
		}
		if _, n, err := r.Extent(r.Size()); n != 0 || err != nil {
			t.Errorf("%s: extent at the end: %d, %v", name, n, err)
		}
		for _, off := range []int64{-1, r.Size() + 1} {
			if _, _, err := r.Extent(off); !errors.Is(err, errOffset) {
				t.Errorf("%s: extent at %d: %v", name, off, err)
			}
		}
		if _, err := r.Seek(-1, io.SeekStart); !errors.Is(err, errOffset) {
			t.Errorf("%s: seek: %v", name, err)
		}
	}
}

func TestProgress(t *testing.T) {
	c := start(t, Options{})
	body, d := content(22, 3*minPiece)
	_, f, _ := begin(t, c, d, int64(len(body)))
	put(t, f, body, 0, 1000)
	all := c.Fills()
	if len(all) != 1 {
		t.Fatalf("%d fills", len(all))
	}
	p := all[0]
	if p.Digest != d || p.Size != int64(len(body)) || p.Present != 1000 || p.Readers != 1 || p.Origins[registry] != 1000 {
		t.Errorf("%+v", p)
	}
	if s := c.Stats(); s.Fills != 1 || s.Reserved != int64(len(body)) || s.Bytes != s.Reserved {
		t.Errorf("%+v", s)
	}
	if f.Digest() != d || f.PieceSize() != minPiece || f.Pieces() != 3 {
		t.Errorf("fill of %d pieces of %d", f.Pieces(), f.PieceSize())
	}
}

// TestOriginsAreBounded pins that thousands of peers cannot grow a fill.
func TestOriginsAreBounded(t *testing.T) {
	c := start(t, Options{})
	body, d := content(23, 2*minPiece)
	_, f, _ := begin(t, c, d, int64(len(body)))
	for i := range 3 * maxOrigins {
		if _, err := f.Writer(Origin{FromPeer, fmt.Sprint(i)}).WriteAt(body[i:i+1], int64(i)); err != nil {
			t.Fatal(err)
		}
	}
	p := c.Fills()[0]
	if other := p.Origins[Origin{FromPeer, "other"}]; len(p.Origins) > maxOrigins+1 || other != 2*maxOrigins {
		t.Errorf("%d origins, %d bytes by others", len(p.Origins), other)
	}
}

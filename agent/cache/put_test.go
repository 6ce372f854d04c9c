package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

var archive = Origin{FromImport, "bundle"}

// Put is PutFile of body.
func (c *Cache) Put(ctx context.Context, d digest.Digest, origin Origin, body []byte) error {
	return c.PutFile(ctx, d, origin, io.NewSectionReader(bytes.NewReader(body), 0, int64(len(body))))
}

// committed holds that body is a blob.
func committed(t *testing.T, c *Cache, body []byte) {
	t.Helper()
	d := digest.FromBytes(body)
	r, ok := c.Lookup(d)
	if !ok {
		t.Fatalf("%s is not here", d)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes, %v; want %d", len(got), err, len(body))
	}
}

// TestPutStream holds what becomes of streams that are right, wrong and cut: only what
// matches is kept, nothing of the rest is left, and no mismatch is held against others.
func TestPutStream(t *testing.T) {
	body, d := content(1, 3<<20)
	wrong := bytes.Clone(body)
	wrong[len(wrong)-1]++
	for name, tc := range map[string]struct {
		r    io.Reader
		size int
		want error
	}{
		"right":    {bytes.NewReader(body), len(body), nil},
		"wrong":    {bytes.NewReader(wrong), len(body), ErrDigestMismatch},
		"cut":      {bytes.NewReader(body[:1<<20]), len(body), io.ErrUnexpectedEOF},
		"short":    {bytes.NewReader(body), len(body) - 1, ErrDigestMismatch},
		"empty":    {bytes.NewReader(nil), 0, ErrSizeMismatch},
		"too much": {bytes.NewReader(body), 1 << 40, ErrNoRoom},
	} {
		t.Run(name, func(t *testing.T) {
			c := start(t, Options{MaxBytes: Bytes(8 << 20)})
			err := c.PutStream(t.Context(), d, archive, int64(tc.size), tc.r)
			if !errors.Is(err, tc.want) {
				t.Fatalf("%v, want %v", err, tc.want)
			}
			if tc.want == nil {
				committed(t, c, body)
				return
			}
			if n := c.Mismatches(d); n > 0 || c.Has(d) {
				t.Errorf("%d mismatches, here: %v", n, c.Has(d))
			}
			left, err := os.ReadDir(c.dir.ingests())
			if err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
			if err := c.PutStream(t.Context(), d, archive, int64(len(body)), bytes.NewReader(body)); err != nil {
				t.Errorf("once more: %v", err)
			}
		})
	}
}

// TestPutStreamIsNobodysToRead: while bytes come that nobody has checked, a source with a
// giver does not get them, and neither do bytes of a fill under way come from a stream.
func TestPutStreamIsNobodysToRead(t *testing.T) {
	c := start(t, Options{})
	body, d := content(2, 3<<20)
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- c.PutStream(t.Context(), d, archive, int64(len(body)), r) }()
	if _, err := w.Write(body[:2<<20]); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Open(t.Context(), d, from{all(body), "registry.test"}); !errors.Is(err, ErrForeign) {
		t.Errorf("join: %v, want %v", err, ErrForeign)
	}
	if err := c.PutStream(t.Context(), d, archive, int64(len(body)), bytes.NewReader(body)); !errors.Is(err, ErrPresent) {
		t.Errorf("two at once: %v, want %v", err, ErrPresent)
	}
	if _, err := w.Write(body[2<<20:]); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := c.PutStream(t.Context(), d, archive, int64(len(body)), nil); !errors.Is(err, ErrPresent) {
		t.Errorf("once more: %v, want %v", err, ErrPresent)
	}
	if c.GivenBy(d, "registry.test") {
		t.Error("given by a registry")
	}
}

// TestPutFileCompletesAFill: checked content ends a fill that gets nowhere.
func TestPutFileCompletesAFill(t *testing.T) {
	c := start(t, Options{})
	body, d := content(3, 3<<20)
	stuck := SourceFunc(func(ctx context.Context, f *Fill) error {
		w := f.Writer(Origin{FromUpstream, "registry.test"})
		if err := w.SetSize(int64(len(body))); err != nil {
			return err
		}
		if _, err := w.WriteAt(body[:100_000], 0); err != nil {
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	})
	r, err := c.Open(t.Context(), d, from{stuck, "registry.test"})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	wrong := append(bytes.Clone(body[1:]), 0)
	section := func(b []byte) *io.SectionReader { return io.NewSectionReader(bytes.NewReader(b), 0, int64(len(b))) }
	if err := c.PutFile(t.Context(), d, archive, section(wrong)); !errors.Is(err, ErrDigestMismatch) {
		t.Errorf("wrong: %v", err)
	}
	if err := c.PutFile(t.Context(), d, archive, section(body)); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, body) {
		t.Errorf("the reader of the fill got %d bytes, %v", len(got), err)
	}
}

// TestPutStreamAndStop: a stream that stands still does not keep the cache from stopping.
func TestPutStreamAndStop(t *testing.T) {
	c := open(t, Options{})
	stop := run(t, c)
	_, d := content(4, 1<<20)
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- c.PutStream(t.Context(), d, archive, 1<<20, r) }()
	if _, err := w.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	stop()
	w.CloseWithError(errors.New("the client is gone"))
	if err := <-done; err == nil {
		t.Error("committed")
	}
}

// TestRoom: what may be evicted is room, what is pinned is not.
func TestRoom(t *testing.T) {
	c := start(t, Options{MaxBytes: Bytes(10_000)})
	ds := fillUp(t, c, 2, 3000)
	c.Pin(ds[0])
	if got, err := c.Room(); err != nil || got != 7000 {
		t.Errorf("%d bytes, %v; want 7000", got, err)
	}
}

// TestImported holds that facts of imports last, over a restart too, until their
// repository is refused once, and that a new import does not bring old ones back.
func TestImported(t *testing.T) {
	dir := t.TempDir()
	repo, other := Repository{"registry.test", "team/app"}, Repository{"registry.test", "team/other"}
	c := open(t, Options{Dir: dir})
	stop := run(t, c)
	c.Meta().SetImported(repo, "v1", "sha256:1")
	c.Meta().SetImported(repo, "v2")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := c.Meta().Sync(ctx); err != nil {
		t.Fatal(err)
	}
	c.meta.db.mu.Lock()
	pending := c.meta.db.waiting
	c.meta.db.mu.Unlock()
	if pending != 0 {
		t.Errorf("%d facts are not durable after Sync", pending)
	}
	for _, ref := range []string{"v1", "sha256:1", "v2"} {
		if !c.Meta().Imported(repo, ref) || c.Meta().Imported(other, ref) {
			t.Errorf("%s: %v, elsewhere %v", ref, c.Meta().Imported(repo, ref), c.Meta().Imported(other, ref))
		}
	}
	c.Meta().DeleteImported(repo)
	c.Meta().SetImported(repo, "v3")
	stop()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c = open(t, Options{Dir: dir})
	if c.Meta().Imported(repo, "v1") || !c.Meta().Imported(repo, "v3") {
		t.Errorf("v1 %v, v3 %v", c.Meta().Imported(repo, "v1"), c.Meta().Imported(repo, "v3"))
	}
}

// TestSyncFails: who waits for facts to be durable is told that they are lost.
func TestSyncFails(t *testing.T) {
	c := open(t, Options{})
	c.meta.db.fault = syscall.ENOSPC
	run(t, c)
	c.Meta().SetImported(Repository{"registry.test", "team/app"}, "v1")
	if err := c.Meta().Sync(t.Context()); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v, want %v", err, syscall.ENOSPC)
	}
}

// TestPutAfterABrokenFill pins that a blob can be put whose last fill broke off: its files
// were made anew while they were taken up, and that ended the process.
func TestPutAfterABrokenFill(t *testing.T) {
	c := start(t, Options{})
	for i := range 20 {
		body, d := content(uint64(i), 3*minPiece)
		m, f, r := begin(t, c, d, int64(len(body)))
		put(t, f, body, 0, minPiece)
		m.end <- io.ErrUnexpectedEOF
		_ = r.Close()
		settle(c, d)
		if err := c.PutStream(t.Context(), d, archive, int64(len(body)), bytes.NewReader(body)); err != nil {
			t.Fatal(i, err)
		}
		committed(t, c, body)
	}
}

// TestPutStreamLeavesNothingToResume: bytes of a stream that nobody has checked do not
// join, on disk, those that an earlier fill left for the next.
func TestPutStreamLeavesNothingToResume(t *testing.T) {
	c := start(t, Options{})
	body, d := content(5, 3*minPiece)
	m, f, _ := begin(t, c, d, int64(len(body)))
	put(t, f, body, 0, minPiece)
	m.end <- io.ErrUnexpectedEOF
	settle(c, d)
	wrong := append(bytes.Clone(body[:minPiece]), make([]byte, minPiece)...)
	if err := c.PutStream(t.Context(), d, archive, int64(len(body)), bytes.NewReader(wrong)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
	if got := mustRead(t, c, d, all(body)); !bytes.Equal(got, body) {
		t.Error("wrong bytes")
	}
}

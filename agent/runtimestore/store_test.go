package runtimestore

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/larder-cache/larder/test/logtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a directory that containerd's own code writes and a Store reads.
type fixture struct {
	dir        string
	containerd content.Store
	store      *Store
	changes    chan change
	logged     *logtest.Buffer
}

type change struct {
	digest digest.Digest
	size   int64 // -1 = removed
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{dir: filepath.Join(t.TempDir(), "content"), changes: make(chan change, 100), logged: &logtest.Buffer{}}
	f.setUpContainerd(t)
	f.store = f.newStore(t, "")
	return f
}

func (f *fixture) setUpContainerd(t *testing.T) {
	t.Helper()
	var err error
	if f.containerd, err = local.NewStore(f.dir); err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) newStore(t *testing.T, socket string) *Store {
	t.Helper()
	s, err := New(Options{
		ContentDir: f.dir,
		Socket:     socket,
		Logger:     slog.New(slog.NewTextHandler(f.logged, nil)),
		Events: Events{
			Added:   func(d digest.Digest, size int64) { f.changes <- change{d, size} },
			Removed: func(d digest.Digest) { f.changes <- change{d, -1} },
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// run runs the store until the test ends.
func run(t *testing.T, s *Store) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// commit lets containerd store a blob.
func (f *fixture) commit(t *testing.T, b []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(b)
	desc := ocispec.Descriptor{Digest: d, Size: int64(len(b))}
	if err := content.WriteBlob(t.Context(), f.containerd, d.String(), bytes.NewReader(b), desc); err != nil {
		t.Fatal(err)
	}
	return d
}

func (f *fixture) path(d digest.Digest) string {
	return filepath.Join(f.dir, blobsDir, d.Encoded())
}

// forge puts a file where a blob belongs.
func (f *fixture) forge(t *testing.T, d digest.Digest, b []byte, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(f.dir, blobsDir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.path(d), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(f.path(d), mode); err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) expect(t *testing.T, want change) {
	t.Helper()
	select {
	case got := <-f.changes:
		if got != want {
			t.Errorf("told of %+v, want %+v", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("not told of %+v", want)
	}
}

// pattern is n bytes that differ from place to place.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	return b
}

func readBlob(b *Blob) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(b, 0, b.Size()))
}

func TestReadsWhatContainerdCommitted(t *testing.T) {
	f := newFixture(t)
	run(t, f.store)
	for _, size := range []int{1, 1000, held - 1, held, held + 1, 3*held + 17} {
		want := pattern(size)
		d := f.commit(t, want)
		if !f.store.Has(d) {
			t.Errorf("%d bytes: not there", size)
		}
		for range 2 { // unverified, then from memory
			b, err := f.store.Open(d)
			if err != nil {
				t.Fatal(err)
			}
			got, err := readBlob(b)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes: read %d, %v", size, len(got), err)
			}
			if file, ok := b.File(); !ok || file == nil {
				t.Errorf("%d bytes: no file after reading all", size)
			}
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		}
		b, err := f.store.Open(d)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := b.File(); !ok || b.pending != nil {
			t.Errorf("%d bytes: verified again", size)
		}
		b.Close()
	}
}

// TestHoldsBackTheEnd has a verification that does not end by itself: all but
// the last bytes can be read meanwhile.
func TestHoldsBackTheEnd(t *testing.T) {
	want := pattern(held + 1000)
	path := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(path, want, 0o444); err != nil {
		t.Fatal(err)
	}
	for name, outcome := range map[string]error{"matches": nil, "does not": errMismatch} {
		t.Run(name, func(t *testing.T) {
			file, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			b := &Blob{file: file, size: int64(len(want)), pending: &verification{done: make(chan struct{})}, closed: make(chan struct{})}
			defer b.Close()
			head := make([]byte, 1000)
			if _, err := b.ReadAt(head, 0); err != nil || !bytes.Equal(head, want[:1000]) {
				t.Fatalf("the beginning: %v", err)
			}
			if err := b.Ready(t.Context(), 999); err != nil {
				t.Errorf("not ready before the end: %v", err)
			}
			gone, cancel := context.WithCancel(t.Context())
			cancel()
			if err := b.Ready(gone, 1000); !errors.Is(err, context.Canceled) {
				t.Errorf("ready at the end: %v", err)
			}
			if _, ok := b.File(); ok {
				t.Error("gave the file away")
			}
			all := make([]byte, len(want))
			read := make(chan int)
			go func() {
				n, err := b.ReadAt(all, 0)
				if !errors.Is(err, outcome) {
					t.Errorf("read %d, %v", n, err)
				}
				read <- n
			}()
			select {
			case n := <-read:
				t.Fatalf("read %d bytes too early", n)
			default:
			}
			b.pending.err = outcome
			close(b.pending.done)
			n, wantN := <-read, len(want)
			if outcome != nil {
				wantN = 1000
			}
			if n != wantN || !bytes.Equal(all[:n], want[:n]) {
				t.Errorf("read %d bytes, want %d", n, wantN)
			}
		})
	}
}

func TestCloseEndsAWait(t *testing.T) {
	path := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(path, pattern(10), 0o444); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	b := &Blob{file: file, size: 10, pending: &verification{done: make(chan struct{})}, closed: make(chan struct{})}
	got := make(chan error)
	go func() { got <- b.Ready(context.Background(), 5) }()
	b.Close()
	if err := <-got; !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

// TestMismatch pins that wrong bytes never look complete, and are tried once.
func TestMismatch(t *testing.T) {
	f := newFixture(t)
	bad := pattern(held + 5000)
	d := digest.FromBytes(bad)
	bad[2000] ^= 1
	f.forge(t, d, bad, 0o444)
	run(t, f.store)
	f.expect(t, change{d, int64(len(bad))})
	b, err := f.store.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	got, err := readBlob(b)
	if !errors.Is(err, fs.ErrNotExist) || len(got) > 5000 {
		t.Errorf("read %d bytes and %v", len(got), err)
	}
	f.expect(t, change{d, -1})
	if _, err := f.store.Open(d); !errors.Is(err, fs.ErrNotExist) || f.store.Has(d) {
		t.Errorf("opened again: %v, has %v", err, f.store.Has(d))
	}
	if n := strings.Count(f.logged.String(), "does not match"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	// Another file in its place gets another chance.
	if err := os.Remove(f.path(d)); err != nil {
		t.Fatal(err)
	}
	bad[2000] ^= 1
	f.commit(t, bad)
	f.expect(t, change{d, int64(len(bad))})
	again, err := f.store.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, err := readBlob(again); err != nil {
		t.Error(err)
	}
}

func TestSurvivesDeletion(t *testing.T) {
	f := newFixture(t)
	run(t, f.store)
	want := pattern(2 * held)
	d := f.commit(t, want)
	b, err := f.store.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := f.containerd.Delete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if got, err := readBlob(b); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	if _, err := f.store.Open(d); !errors.Is(err, fs.ErrNotExist) || f.store.Has(d) {
		t.Errorf("still there: %v", err)
	}
}

func TestOneVerificationForAll(t *testing.T) {
	f := newFixture(t)
	d := f.commit(t, pattern(4*held))
	var blobs []*Blob
	for range 20 {
		b, err := f.store.Open(d)
		if err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, b)
	}
	pending := map[*verification]bool{}
	for _, b := range blobs {
		if b.pending != nil {
			pending[b.pending] = true
		}
		b.Close()
	}
	if len(pending) > 1 {
		t.Errorf("%d verifications", len(pending))
	}
	run(t, f.store) // waits for them
}

func TestRefuses(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	secret := pattern(100)
	d := digest.FromBytes(secret)
	if err := os.WriteFile(outside, secret, 0o444); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		digest digest.Digest
		put    func(*testing.T, *fixture)
	}{
		"empty":            {d, func(t *testing.T, f *fixture) { f.forge(t, d, nil, 0o444) }},
		"not yet chmodded": {d, func(t *testing.T, f *fixture) { f.forge(t, d, secret, 0o644) }},
		"link to outside": {d, func(t *testing.T, f *fixture) {
			f.commit(t, []byte("x"))
			must(t, os.Symlink(outside, f.path(d)))
		}},
		"link to another blob": {d, func(t *testing.T, f *fixture) {
			must(t, os.Symlink(f.commit(t, []byte("x")).Encoded(), f.path(d)))
		}},
		"directory linked to outside": {d, func(t *testing.T, f *fixture) {
			must(t, os.RemoveAll(filepath.Join(f.dir, "blobs")))
			must(t, os.Mkdir(filepath.Join(filepath.Dir(outside), "sha256"), 0o755))
			must(t, os.Link(outside, filepath.Join(filepath.Dir(outside), "sha256", d.Encoded())))
			must(t, os.Symlink(filepath.Dir(outside), filepath.Join(f.dir, "blobs")))
		}},
		"directory": {d, func(t *testing.T, f *fixture) { must(t, os.MkdirAll(f.path(d), 0o555)) }},
		"pipe": {d, func(t *testing.T, f *fixture) {
			f.commit(t, []byte("x"))
			must(t, unix.Mkfifo(f.path(d), 0o444))
		}},
		"ingest": {d, func(t *testing.T, f *fixture) {
			w, err := content.OpenWriter(t.Context(), f.containerd, content.WithRef("r"), content.WithDescriptor(ocispec.Descriptor{Digest: d, Size: 100}))
			must(t, err)
			_, err = w.Write(secret)
			must(t, err)
			t.Cleanup(func() { w.Close() })
		}},
		"nothing":       {d, func(*testing.T, *fixture) {}},
		"no digest":     {"sha256:short", func(*testing.T, *fixture) {}},
		"path":          {"sha256:../../../outside", func(*testing.T, *fixture) {}},
		"sha512":        {digest.SHA512.FromBytes(secret), func(*testing.T, *fixture) {}},
		"no such store": {d, func(t *testing.T, f *fixture) { must(t, os.RemoveAll(f.dir)) }},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			tc.put(t, f)
			if b, err := f.store.Open(tc.digest); err == nil {
				b.Close()
				t.Error("opened")
			} else if !errors.Is(err, fs.ErrNotExist) && name != "directory linked to outside" {
				t.Errorf("got %v", err)
			}
			if f.store.Has(tc.digest) {
				t.Error("has it")
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestNew(t *testing.T) {
	if _, err := New(Options{ContentDir: "relative"}); err == nil {
		t.Error("took a relative directory")
	}
}

func TestStopEndsVerifications(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.store.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := f.store.Open(f.commit(t, pattern(10))); !errors.Is(err, errStopped) {
		t.Errorf("opened after the end: %v", err)
	}
	if err := f.store.copy(io.Discard, bytes.NewReader(pattern(10))); !errors.Is(err, errStopped) {
		t.Errorf("hashed after the end: %v", err)
	}
}

func TestMemoIsBounded(t *testing.T) {
	m := &memo{}
	first := file{ino: 1 << 40}
	m.put(first, true)
	for i := range uint64(5 * memoSize) {
		m.put(file{ino: i}, false)
		if good, known := m.get(first); !good || !known {
			t.Fatalf("forgot a file in use after %d", i)
		}
	}
	if n := len(m.new) + len(m.old); n > 2*memoSize {
		t.Errorf("remembers %d files", n)
	}
	if _, known := m.get(file{ino: 0}); known {
		t.Error("remembers a file from long ago")
	}
}

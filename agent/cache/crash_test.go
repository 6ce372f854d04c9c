package cache

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
)

// snapshot copies the cache as a kill -9 at this moment would leave it.
func snapshot(t *testing.T, from layout) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(string(from))); err != nil {
		t.Error(err)
	}
	err := filepath.WalkDir(to, func(path string, e fs.DirEntry, err error) error { // CopyFS makes all writable
		if err != nil || e.IsDir() {
			return err
		}
		info, err := os.Stat(filepath.Join(string(from), strings.TrimPrefix(path, to)))
		if err != nil {
			return err
		}
		return os.Chmod(path, info.Mode())
	})
	if err != nil {
		t.Error(err)
	}
	return to
}

// bareEnv tells this test binary to stop being root.
const bareEnv = "LARDER_CACHE_TEST_BARE"

// withoutCapabilities runs a test of root's in a process for which permissions hold,
// and reports whether it did: the chart's agent has no capabilities either.
func withoutCapabilities(t *testing.T) bool {
	t.Helper()
	if os.Getuid() != 0 {
		return false
	}
	if os.Getenv(bareEnv) != "" {
		const nobody = 65534
		if err := syscall.Setuid(nobody); err != nil { // of all threads
			t.Fatal(err)
		}
		return false
	}
	child := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	child.Env = append(os.Environ(), bareEnv+"=1")
	if out, err := child.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return true
}

// TestCrashBetweenCommitSteps copies the directory before each step, opens the
// copies, and finds in each either the whole blob or a resumable fill: nothing
// in between, and nothing left over. What commit makes read-only, a process
// that is killed before the rename leaves so.
func TestCrashBetweenCommitSteps(t *testing.T) {
	if withoutCapabilities(t) {
		return
	}
	body, d := content(30, 3*minPiece+17)
	c := open(t, Options{})
	snapshots := map[step]string{}
	var mu sync.Mutex // guards snapshots: steps are taken by several goroutines
	booked := make(chan struct{})
	c.faults = func(s step, _ digest.Digest) error {
		mu.Lock()
		defer mu.Unlock()
		if snapshots[s] == "" && s != stepWrite {
			snapshots[s] = snapshot(t, c.dir)
			if s == stepBooked {
				close(booked)
			}
		}
		return nil
	}
	run(t, c)
	mustRead(t, c, d, all(body))
	<-booked // the last step
	for _, tt := range []struct {
		before    step
		committed bool
		missing   int64 // bytes that the resumed fill has to fetch
	}{
		{stepCreate, false, int64(len(body))},
		{stepAllocate, false, int64(len(body))},
		{stepVerified, false, 0},
		{stepSync, false, 0},
		{stepRename, false, 0},
		{stepSyncDir, true, 0},
		{stepMap, true, 0},
		{stepBooked, true, 0},
	} {
		t.Run("before "+string(tt.before), func(t *testing.T) {
			dir := snapshots[tt.before]
			if dir == "" {
				t.Fatal("this step was not taken")
			}
			c := start(t, Options{Dir: dir})
			if c.Has(d) != tt.committed {
				t.Errorf("committed = %v, want %v", c.Has(d), tt.committed)
			}
			fetched := int64(0)
			src := SourceFunc(func(ctx context.Context, f *Fill) error {
				if err := f.SetSize(int64(len(body))); err != nil {
					return err
				}
				for from, end, ok := f.Missing(0); ok; from, end, ok = f.Missing(0) {
					fetched += end - from
					if _, err := f.Writer(registry).WriteAt(body[from:end], from); err != nil {
						return err
					}
				}
				return nil
			})
			if got := mustRead(t, c, d, src); !bytes.Equal(got, body) {
				t.Error("wrong bytes")
			}
			settle(c, d)
			if fetched != tt.missing {
				t.Errorf("fetched %d bytes, want %d", fetched, tt.missing)
			}
			if left := c.entries(c.dir.ingests()); len(left) > 0 {
				t.Errorf("left over: %v", left)
			}
		})
	}
}

// TestFailedCommitStep pins that a disk which fails after the bytes arrived
// costs the readers nothing.
func TestFailedCommitStep(t *testing.T) {
	for _, s := range []step{stepSync, stepRename, stepSyncDir, stepMap} {
		t.Run(string(s), func(t *testing.T) {
			body, d := content(31, 2*minPiece)
			c := open(t, Options{})
			c.faults = func(at step, _ digest.Digest) error {
				if at == s {
					return errors.New("disk is failing")
				}
				return nil
			}
			run(t, c)
			if got := mustRead(t, c, d, all(body)); !bytes.Equal(got, body) {
				t.Error("wrong bytes")
			}
			settle(c, d)
			if c.Has(d) || c.Stats().Bytes != 0 {
				t.Errorf("kept: %+v", c.Stats())
			}
			if left := append(c.entries(c.dir.blobs("sha256")), c.entries(c.dir.ingests())...); len(left) > 0 {
				t.Errorf("left over: %v", left)
			}
			if err := c.Put(t.Context(), d, registry, body); !errors.Is(err, ErrNoRoom) {
				t.Errorf("put: %v", err)
			}
			settle(c, d)
			c.faults = nil
			if got := mustRead(t, c, d, all(body)); !bytes.Equal(got, body) {
				t.Error("wrong bytes the second time")
			}
		})
	}
}

// childEnv tells this test binary to be the process that is killed.
const childEnv = "LARDER_CACHE_TEST_CHILD"

// TestKill kills a process in the middle of a fill and resumes without
// fetching again what it had.
func TestKill(t *testing.T) {
	body, d := content(32, 9*minPiece+5)
	if dir := os.Getenv(childEnv); dir != "" {
		fillHalfAndHang(t, dir, body, d)
	}
	dir := t.TempDir()
	child := exec.Command(os.Args[0], "-test.run=^TestKill$")
	child.Env = append(os.Environ(), childEnv+"="+dir)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "half" {
		t.Errorf("child said %q, %v", line, err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()

	torn := layout(dir)
	tear(t, torn.ingest(d), 2*minPiece+100)
	c := start(t, Options{Dir: dir})
	var again []int64
	src := SourceFunc(func(_ context.Context, f *Fill) error {
		for from, end, ok := f.Missing(0); ok; from, end, ok = f.Missing(end) {
			again = append(again, from)
			if _, err := f.Writer(registry).WriteAt(body[from:end], from); err != nil {
				return err
			}
		}
		return nil
	})
	if got := mustRead(t, c, d, src); !bytes.Equal(got, body) {
		t.Error("wrong bytes")
	}
	settle(c, d)
	// Pieces 0, 1, 2, 7 were whole, 8 was half there, 2 was torn meanwhile.
	for _, from := range again {
		if p := from / minPiece; p < 2 || p == 7 {
			t.Errorf("piece %d was fetched again", p)
		}
	}
	if !c.Has(d) {
		t.Error("not committed")
	}
}

// fillHalfAndHang is the child: it says "half" and waits to be killed.
func fillHalfAndHang(t *testing.T, dir string, body []byte, d digest.Digest) {
	c := start(t, Options{Dir: dir})
	_, f, _ := begin(t, c, d, int64(len(body)))
	put(t, f, body, 0, 3*minPiece)
	put(t, f, body, 7*minPiece, 8*minPiece)
	put(t, f, body, 3*minPiece, 3*minPiece+10)
	fmt.Println("half")
	select {}
}

// tear changes a byte as a power loss may.
func tear(t *testing.T, path string, off int64) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	b := make([]byte, 1)
	_, err = file.ReadAt(b, off)
	if err == nil {
		b[0] ^= 0xff
		_, err = file.WriteAt(b, off)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestForeignFiles pins that nothing found in the directory is fatal, that
// what cannot be whole is deleted, and that what is not ours stays.
func TestForeignFiles(t *testing.T) {
	whole, d := content(33, 1000)
	_, empty := content(34, 10)
	_, short := content(35, 10)
	_, lone := content(36, 10)
	_, garbage := content(37, 10)
	_, noData := content(38, 10)
	_, wrongSize := content(39, 10)
	_, link := content(40, 10)
	dir := layout(t.TempDir())
	c, err := New(Options{Dir: string(dir), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	c.meta.recordUse([]use{{short, 1, 10}})
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{
		dir.blob(d): whole, dir.blob(empty): {}, dir.blob(short): whole[:5],
		filepath.Join(dir.blobs("sha256"), "README"): []byte("mine"),
		dir.ingest(lone): whole, dir.ingest(garbage): whole, dir.ingestMap(garbage): []byte("garbage"),
		dir.ingestMap(noData): encodeMapHeader(noData, 3*minPiece, ""),
		dir.ingest(wrongSize): whole, dir.ingestMap(wrongSize): encodeMapHeader(wrongSize, 3*minPiece, ""),
		filepath.Join(dir.ingests(), "probe-123"): {}, filepath.Join(dir.ingests(), "notes.txt"): []byte("mine"),
	}
	for path, body := range files {
		if err := os.WriteFile(path, body, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("/etc/passwd", dir.blob(link)), os.Mkdir(filepath.Join(dir.ingests(), "dir"), 0o700)); err != nil {
		t.Fatal(err)
	}
	c = start(t, Options{Dir: string(dir)})
	if !c.Has(d) {
		t.Error("a blob without metadata was not recovered")
	}
	var left []string
	err = filepath.WalkDir(string(dir), func(path string, e fs.DirEntry, err error) error {
		if !e.IsDir() {
			left = append(left, filepath.Base(path))
		}
		return err
	})
	if want := []string{d.Encoded(), "README", "notes.txt", "metadata.db"}; err != nil || len(left) != len(want) {
		t.Errorf("left %v, want %v; %v", left, want, err)
	}
	if got := mustRead(t, c, d, nil); !bytes.Equal(got, whole) {
		t.Error("wrong bytes")
	}
}

// TestResumeDisagreesOnSize pins that a recorded size is no more believed than
// the source's: the fill fails, and the next starts with nothing.
func TestResumeDisagreesOnSize(t *testing.T) {
	body, d := content(41, 4*minPiece)
	dir := t.TempDir()
	first := open(t, Options{Dir: dir})
	stop := run(t, first)
	_, f, _ := begin(t, first, d, int64(len(body))+1) // a lie
	put(t, f, body, 0, minPiece)
	stop()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	c := start(t, Options{Dir: dir})
	r, err := c.Open(t.Context(), d, all(body))
	if err == nil {
		_, err = io.ReadAll(r)
		r.Close()
	}
	if !errors.Is(err, ErrSizeMismatch) {
		t.Errorf("got %v", err)
	}
	settle(c, d)
	if got := mustRead(t, c, d, all(body)); !bytes.Equal(got, body) {
		t.Error("wrong bytes")
	}
}

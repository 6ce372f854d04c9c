package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus/testutil"
	bolt "go.etcd.io/bbolt"
)

// TestDirectoryDeletedWhileRunning deletes everything under readers and fills
// (P7): those who have a file go on, the next open starts anew.
func TestDirectoryDeletedWhileRunning(t *testing.T) {
	for name, deleted := range map[string]func(layout) string{
		"all of it": func(l layout) string { return string(l) },
		"blobs":     func(l layout) string { return filepath.Join(string(l), "blobs") },
		"ingest":    func(l layout) string { return l.ingests() },
		"metadata":  func(l layout) string { return l.metadata() },
	} {
		t.Run(name, func(t *testing.T) {
			c := start(t, Options{MaxBytes: Percent(50), MinFree: Bytes(1)})
			old, oldDigest := content(200, 300*kib)
			if err := c.Put(t.Context(), oldDigest, registry, old); err != nil {
				t.Fatal(err)
			}
			hit, err := c.Open(t.Context(), oldDigest, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer hit.Close()
			body, d := content(201, 3*minPiece)
			_, f, r := begin(t, c, d, int64(len(body)))
			put(t, f, body, 0, minPiece)
			if err := os.RemoveAll(deleted(c.dir)); err != nil {
				t.Fatal(err)
			}
			put(t, f, body, minPiece, len(body))
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, body) {
				t.Errorf("reader of the fill: %d bytes, %v", len(got), err)
			}
			if got, err := io.ReadAll(hit); err != nil || !bytes.Equal(got, old) {
				t.Errorf("reader of the blob: %d bytes, %v", len(got), err)
			}
			settle(c, d)
			for d, body := range map[digest.Digest][]byte{d: body, oldDigest: old} {
				if got := mustRead(t, c, d, all(body)); !bytes.Equal(got, body) {
					t.Error("wrong bytes afterwards")
				}
				settle(c, d)
				if !c.Has(d) {
					t.Errorf("%s was not kept afterwards", d)
				}
			}
			c.Meta().SetManifest(d, Manifest{"x/y"})
			if err := c.Meta().Sync(t.Context()); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(c.dir.metadata()); err != nil {
				t.Errorf("metadata: %v", err)
			}
		})
	}
}

// TestDirectoryDeletedBelowItsMount: `rm -rf` on the host of a directory that a container has
// as a mount leaves one there in which nothing can be made, for as long as the container runs.
// The agent has to end, and start anew, or the node caches nothing until somebody notices.
func TestDirectoryDeletedBelowItsMount(t *testing.T) {
	host, dir := filepath.Join(t.TempDir(), "host"), t.TempDir()
	if err := os.Mkdir(host, 0o700); err != nil {
		t.Fatal(err)
	}
	mount(t, host, dir, "", syscall.MS_BIND, "")
	synctest.Test(t, func(t *testing.T) {
		c := open(t, Options{Dir: dir})
		ended := make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { ended <- c.Run(ctx) }()
		<-c.started
		fillUp(t, c, 1, 1000)
		if err := os.RemoveAll(host); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-ended:
			if err == nil || !strings.Contains(err.Error(), "mount it anew") {
				t.Errorf("ended with %v", err)
			}
		case <-time.After(time.Minute):
			t.Error("it runs on, and can keep nothing")
			cancel()
			<-ended
		}
	})
}

// mount is the system call, undone at the end of the test.
func mount(t *testing.T, from, to, kind string, flags uintptr, data string) {
	t.Helper()
	if err := syscall.Mount(from, to, kind, flags, data); err != nil {
		if os.Getenv("CI") == "true" && os.Getuid() == 0 {
			t.Fatalf("mount: %v", err)
		}
		t.Skipf("mounting needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(to, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// TestReconcile pins that the books heal without anybody asking for the blob.
func TestReconcile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		removed := 0
		c := open(t, Options{Events: Events{Removing: func(digest.Digest) { removed++ }}})
		stop := run(t, c)
		defer stop()
		ds := fillUp(t, c, 3, 1000)
		if err := os.Remove(c.dir.blob(ds[1])); err != nil {
			t.Fatal(err)
		}
		<-time.After(2 * tendInterval)
		synctest.Wait()
		if s := c.Stats(); s.Blobs != 2 || s.Bytes != 2000 || removed != 1 {
			t.Errorf("%+v, %d withdrawn", s, removed)
		}
		if n := evictions(c, reasonLost); n != 1 {
			t.Errorf("%d counted as lost", n)
		}
	})
}

func TestMetadataIsDisposable(t *testing.T) {
	repo := Repository{"docker.io", "library/nginx"}
	_, d := content(210, 10)
	tag := Tag{Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: d, Size: 10}, Checked: time.Now()}
	for name, ruin := range map[string]func(path string) error{
		"deleted":   os.Remove,
		"truncated": func(path string) error { return os.Truncate(path, 0) },
		"cut":       func(path string) error { return os.Truncate(path, 5000) },
		"garbage": func(path string) error {
			return os.WriteFile(path, bytes.Repeat([]byte("garbage!"), 8192), 0o600)
		},
		"a directory": func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
	} {
		t.Run(name+" while running", func(t *testing.T) {
			c := open(t, Options{})
			c.Meta().SetTag(repo, "latest", tag)
			c.meta.flush()
			if err := ruin(c.dir.metadata()); err != nil {
				t.Fatal(err)
			}
			for i := range 3 {
				_, _ = c.Meta().Tag(repo, "latest")
				_, _ = c.Meta().Tag(repo, "other")
				c.Meta().SetTag(repo, fmt.Sprint("tag", i), tag)
				c.meta.flush()
			}
			if _, ok := c.Meta().Tag(repo, "tag2"); !ok {
				t.Error("a new fact was lost")
			}
		})
		t.Run(name+" before the start", func(t *testing.T) {
			dir := t.TempDir()
			c := open(t, Options{Dir: dir})
			c.Meta().SetTag(repo, "latest", tag)
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if err := ruin(c.dir.metadata()); err != nil {
				t.Fatal(err)
			}
			c = open(t, Options{Dir: dir})
			c.Meta().SetTag(repo, "latest", tag)
			c.meta.flush()
			if got, ok := c.Meta().Tag(repo, "latest"); !ok || got.Descriptor.Digest != d {
				t.Errorf("got %+v, %v", got, ok)
			}
		})
	}
}

func TestMetadataLasts(t *testing.T) {
	dir := t.TempDir()
	c := open(t, Options{Dir: dir})
	repo, other := Repository{"docker.io", "library/nginx"}, Repository{"docker.io", "library"}
	_, d := content(211, 10)
	_, child := content(212, 10)
	now := time.Now().Round(0)
	check := func(c *Cache) {
		t.Helper()
		m := c.Meta()
		if got, ok := m.Tag(repo, "latest"); !ok || got.Descriptor.Digest != d || !got.Checked.Equal(now) {
			t.Errorf("tag %+v, %v", got, ok)
		}
		if _, ok := m.Tag(other, "nginx\x00latest"); ok {
			t.Error("one key for two tags")
		}
		if got, ok := m.Manifest(d); !ok || got.MediaType != "a/b" {
			t.Errorf("manifest %+v, %v", got, ok)
		}
		if !m.Member(repo, child) {
			t.Error("no member")
		}
		if m.Member(other, child) {
			t.Error("member of another repository")
		}
		if f, ok := m.Fetched(d); !ok || f.Origins[registry] != 10 || f.Size != 10 {
			t.Errorf("fetched %+v, %v", f, ok)
		}
		if _, ok := m.Tag(repo, "gone"); ok {
			t.Error("a deleted tag is back")
		}
	}
	m := c.Meta()
	m.SetTag(repo, "latest", Tag{ocispec.Descriptor{Digest: d}, now})
	m.SetTag(repo, "gone", Tag{ocispec.Descriptor{Digest: d}, now})
	m.SetManifest(d, Manifest{"a/b"})
	m.AddMembers(repo, ocispec.Descriptor{Digest: child})
	m.recordFill(d, 10, map[Origin]int64{registry: 10})
	c.meta.flush()
	m.DeleteTag(repo, "gone")
	check(c)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	check(open(t, Options{Dir: dir}))
}

// TestMetadataForgetsWhenTheDiskIsFull: that somebody may no longer read a
// repository is not lost because it could not be written at once.
func TestMetadataForgetsWhenTheDiskIsFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	m, err := openMeta(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	repo, other := Repository{"docker.io", "team/app"}, Repository{"docker.io", "team/other"}
	m.SetVerdict(repo, Anyone)
	m.flush()
	m.db.fault = syscall.ENOSPC
	m.DeleteVerdict(repo, Anyone)
	m.DeleteVerdict(other, Anyone) // was never there
	m.flush()
	if _, ok := m.Verdict(repo, Anyone); ok {
		t.Error("it is back")
	}
	if m.db.waiting != 1 {
		t.Errorf("%d facts wait, want the deletion of one that is in the file", m.db.waiting)
	}
	m.db.fault = nil
	m.flush()
	if err := m.close(); err != nil {
		t.Fatal(err)
	}
	if m, err = openMeta(path, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	defer m.close()
	if _, ok := m.Verdict(repo, Anyone); ok {
		t.Error("it is back after a restart")
	}
}

// TestMetadataOutlivesADiskThatTakesNoWrites: a file that cannot be written now, or by a
// process that has run out of descriptors or memory, is none the worse for it. Without its facts the blobs beside it are nobody's, while they can be read.
func TestMetadataOutlivesADiskThatTakesNoWrites(t *testing.T) {
	repo := Repository{"docker.io", "team/app"}
	for _, disk := range []error{syscall.EROFS, syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM} {
		m, err := openMeta(filepath.Join(t.TempDir(), "metadata.db"), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		defer m.close()
		m.SetVerdict(repo, Anyone)
		m.flush()
		m.db.fault = disk
		m.SetVerdict(repo, "somebody")
		m.flush()
		if _, ok := m.Verdict(repo, Anyone); !ok {
			t.Errorf("%v: what was known before is lost", disk)
		}
		m.db.fault = nil
		m.SetVerdict(repo, "somebody else")
		m.flush()
		if _, ok := m.Verdict(repo, "somebody else"); !ok {
			t.Errorf("%v: nothing is written afterwards", disk)
		}
	}
}

// TestStartOnAFullDisk: a start needs no room, which file systems that copy on write take
// even to change a page. Where it does, for a kind of fact that the version before did not
// have, the file is taken up once there is room, without what has been deleted meanwhile.
func TestStartOnAFullDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	log := slog.New(slog.DiscardHandler)
	m, err := openMeta(path, log)
	if err != nil {
		t.Fatal(err)
	}
	repo, refused := Repository{"docker.io", "team/app"}, Repository{"docker.io", "team/other"}
	m.SetVerdict(repo, Anyone)
	m.SetVerdict(refused, Anyone)
	m.flush()
	if err := m.close(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if m, err = openMeta(path, log); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the start wrote to the file, %v", err)
	}
	err = m.db.bolt.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte(bucketPins)) })
	if err != nil {
		t.Fatal(err)
	}
	if err := m.close(); err != nil {
		t.Fatal(err)
	}
	m.db.fault = syscall.ENOSPC
	m.flush()
	if _, ok := m.Verdict(repo, Anyone); ok {
		t.Fatal("the file could be opened: this test shows nothing")
	}
	m.DeleteVerdict(refused, Anyone)
	m.flush()
	m.db.fault = nil
	m.flush()
	defer m.close()
	if _, ok := m.Verdict(repo, Anyone); !ok {
		t.Error("what was known before is lost")
	}
	if _, ok := m.Verdict(refused, Anyone); ok {
		t.Error("what was forgotten meanwhile is back")
	}
	m.SetPinnedImage("docker.io/team/app:1", PinnedImage{Command: true})
	m.flush()
	if len(m.PinnedImages()) != 1 {
		t.Error("the new kind of fact is not kept")
	}
}

// TestMetadataThatComesToThePath: a file of facts that appears where another one was made, as
// when a disk is mounted late, is read and not deleted; not while another process has it either.
func TestMetadataThatComesToThePath(t *testing.T) {
	for name, locked := range map[string]bool{"free": false, "another process has it": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
				path, away := filepath.Join(dir, "metadata.db"), filepath.Join(dir, "away.db")
				repo := Repository{"docker.io", "team/app"}
				other, err := openMeta(away, log)
				if err != nil {
					t.Fatal(err)
				}
				other.SetVerdict(repo, Anyone)
				other.flush()
				m, err := openMeta(path, log)
				if err != nil {
					t.Fatal(err)
				}
				if !locked {
					err = other.close()
				}
				if err := errors.Join(err, os.Rename(away, path)); err != nil {
					t.Fatal(err)
				}
				m.flush()
				if locked {
					if _, ok := m.Verdict(repo, Anyone); ok {
						t.Error("another process's file is read")
					}
					if err := other.close(); err != nil {
						t.Fatal(err)
					}
				}
				m.SetVerdict(repo, "somebody")
				m.flush()
				if err := m.close(); err != nil {
					t.Fatal(err)
				}
				if m, err = openMeta(path, log); err != nil {
					t.Fatal(err)
				}
				defer m.close()
				for _, who := range []string{Anyone, "somebody"} {
					if _, ok := m.Verdict(repo, who); !ok {
						t.Errorf("what is known of %q is lost", who)
					}
				}
			})
		})
	}
}

// TestMetadataIsBounded pins that the oldest facts go first.
func TestMetadataIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, Options{})
		most := capacity[bucketState]
		for i := range most + 1 {
			c.meta.db.put(bucketState, key(fmt.Sprint(i)), []byte("x"))
			<-time.After(time.Second)
		}
		c.meta.flush()
		if n := c.meta.db.count[bucketState]; n != most*9/10 {
			t.Errorf("%d facts left of %d", n, most+1)
		}
		_, oldest := c.meta.db.get(bucketState, key("0"))
		_, newest := c.meta.db.get(bucketState, key(fmt.Sprint(most)))
		if oldest || !newest {
			t.Errorf("oldest %v, newest %v", oldest, newest)
		}
		for i := range 2 * maxPending {
			c.meta.db.put(bucketState, key(fmt.Sprint(i)), nil)
		}
		if n := c.meta.db.waiting; n > maxPending {
			t.Errorf("%d facts wait", n)
		}
	})
}

// TestFactsOfOneSecondAreNotAllPruned: no more go than have to, even if all are as old.
func TestFactsOfOneSecondAreNotAllPruned(t *testing.T) {
	c := open(t, Options{})
	most := capacity[bucketState]
	for i := range most + 1 {
		c.meta.db.put(bucketState, key(fmt.Sprint(i)), nil)
	}
	c.meta.flush()
	left := 0
	c.meta.db.walk(bucketState, func([]byte) bool {
		left++
		return true
	})
	if left < most*9/10 {
		t.Errorf("%d facts left of %d", left, most+1)
	}
}

// TestLRUOutlivesTheProcessAndTheClock pins the order of eviction over a
// restart, whatever the clock did meanwhile.
func TestLRUOutlivesTheProcessAndTheClock(t *testing.T) {
	dir := t.TempDir()
	c := open(t, Options{Dir: dir})
	stop := run(t, c)
	ds := fillUp(t, c, 3, 1000)
	c.mu.Lock()
	now := c.now()
	c.mu.Unlock()
	if err := c.Meta().Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	stop()
	// ds[1] was used by a clock a year ahead, ds[2] by one long behind.
	c.meta.recordUse([]use{{ds[0], now, 1000}, {ds[1], now + 365*86400, 1000}, {ds[2], 5, 1000}})
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c = open(t, Options{Dir: dir})
	run(t, c)
	mustRead(t, c, ds[0], nil)
	var order []digest.Digest
	c.Walk(func(i Info) bool {
		order = append(order, i.Digest)
		if i.Used.After(time.Now()) {
			t.Errorf("%s was used in the future: %s", i.Digest, i.Used)
		}
		return true
	})
	if len(order) != 3 || order[0] != ds[0] || order[2] != ds[2] {
		t.Errorf("order %v of %v", order, ds)
	}
}

func TestScrub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var withdrawn []digest.Digest
		c := open(t, Options{ScrubInterval: 24 * time.Hour, Events: Events{
			Removing: func(d digest.Digest) { withdrawn = append(withdrawn, d) },
		}})
		run(t, c)
		ds := fillUp(t, c, 4, 2<<20)
		tear(t, c.dir.blob(ds[1]), 1<<20)
		if err := os.Truncate(c.dir.blob(ds[2]), 100); err != nil {
			t.Fatal(err)
		}
		<-time.After(25 * time.Hour)
		synctest.Wait()
		if c.Has(ds[1]) || c.Has(ds[2]) || !c.Has(ds[0]) || !c.Has(ds[3]) {
			t.Errorf("left: %v", present(c, ds))
		}
		if len(withdrawn) != 2 || evictions(c, reasonScrub) != 2 || testutil.ToFloat64(c.metrics.corruptions) != 2 {
			t.Errorf("withdrawn %v, %d evicted", withdrawn, evictions(c, reasonScrub))
		}
		if r, ok := c.Lookup(ds[0]); !ok {
			t.Error("a good blob is gone")
		} else {
			r.Close()
		}
		tear(t, c.dir.blob(ds[0]), 1<<20)
		<-time.After(25 * time.Hour)
		synctest.Wait()
		if c.Has(ds[0]) || !c.Has(ds[3]) {
			t.Errorf("left after the next pass: %v", present(c, ds))
		}
	})
}

// TestSuspect: what somebody has reason to doubt is read out of its turn, and without a scrub.
func TestSuspect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, Options{})
		run(t, c)
		ds := fillUp(t, c, 2, 2<<20)
		tear(t, c.dir.blob(ds[1]), 1<<20)
		_, never := content(1, 1)
		for _, d := range append(ds, never) {
			c.Suspect(d)
		}
		for range 2 * maxSuspects { // too many are passed over
			c.Suspect(never)
		}
		<-time.After(time.Second)
		synctest.Wait()
		if !c.Has(ds[0]) || c.Has(ds[1]) || evictions(c, reasonScrub) != 1 {
			t.Errorf("left: %v", present(c, ds))
		}
	})
}

// TestScrubIsPaced pins that a pass is slow, and that it goes on after a
// restart where it was.
func TestScrubIsPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, Options{})
		run(t, c)
		ds := fillUp(t, c, 3, 10<<20)
		ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
		defer cancel()
		begun := time.Now()
		c.scrubAll(ctx, time.Hour)
		if took := time.Since(begun); took != 15*time.Second {
			t.Errorf("30 MiB took %s; want at most %d bytes a second", took, minScrubRate)
		}
		if place := c.meta.scrubbed(); place == "" {
			t.Error("the place was not remembered")
		}
		begun = time.Now()
		c.scrubAll(t.Context(), time.Hour)
		if took := time.Since(begun); took < 19*time.Second || took > 21*time.Second {
			t.Errorf("the two blobs that were left took %s", took)
		}
		if len(present(c, ds)) != 3 {
			t.Error("good blobs were deleted")
		}
	})
}

func TestDirectoryInUse(t *testing.T) {
	c := open(t, Options{})
	_, err := New(Options{Dir: c.opts.Dir, Logger: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "used by another process") || !strings.Contains(err.Error(), c.opts.Dir) {
		t.Errorf("got %v", err)
	}
}

func TestUnusableDirectory(t *testing.T) {
	base := t.TempDir()
	file := filepath.Join(base, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ dir, hint string }{
		"a file":       {file, "a file is in the way"},
		"below a file": {filepath.Join(file, "cache"), "a file is in the way"},
		"not writable": {"/proc/larder", "cache.dir"},
	} {
		_, err := New(Options{Dir: tt.dir})
		if err == nil || !strings.Contains(err.Error(), tt.hint) || !strings.Contains(err.Error(), tt.dir) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	for err, hint := range map[error]string{syscall.EACCES: "chown", syscall.EPERM: "chown", syscall.EROFS: "read-only"} {
		if got := layout("/x").explain(err).Error(); !strings.Contains(got, hint) {
			t.Errorf("%v: got %q", err, got)
		}
	}
}

// leave makes an idle ingest: a fill whose source fails after one piece.
func leave(t *testing.T, c *Cache, d digest.Digest, body []byte) {
	t.Helper()
	m, f, r := begin(t, c, d, int64(len(body)))
	put(t, f, body, 0, minPiece)
	m.end <- io.ErrUnexpectedEOF
	settle(c, d)
	r.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.idle[d]; !ok {
		t.Fatal("nothing was left to resume")
	}
}

func TestIdleIngests(t *testing.T) {
	body, d := content(220, 3*minPiece)
	t.Run("go first when room is needed", func(t *testing.T) {
		c := start(t, Options{MaxBytes: Bytes(5 * minPiece)})
		old := fillUp(t, c, 2, minPiece)
		leave(t, c, d, body)
		other, od := content(221, minPiece/2)
		if err := c.Put(t.Context(), od, registry, other); err != nil {
			t.Fatal(err)
		}
		if len(present(c, old)) != 2 || c.Stats().Bytes != 2*minPiece+minPiece/2 {
			t.Errorf("left %v, %+v", present(c, old), c.Stats())
		}
		if left := c.entries(c.dir.ingests()); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	})
	t.Run("expire", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := open(t, Options{})
			run(t, c)
			leave(t, c, d, body)
			<-time.After(idleFor - time.Minute)
			if c.Stats().Bytes != int64(len(body)) {
				t.Errorf("gone too early: %+v", c.Stats())
			}
			<-time.After(2 * time.Minute)
			synctest.Wait()
			if left := c.entries(c.dir.ingests()); len(left) > 0 || c.Stats().Bytes != 0 {
				t.Errorf("left %v, %+v", left, c.Stats())
			}
		})
	})
	t.Run("go with Remove", func(t *testing.T) {
		c := start(t, Options{})
		leave(t, c, d, body)
		if err := c.Remove(d); err != nil {
			t.Fatal(err)
		}
		if left := c.entries(c.dir.ingests()); len(left) > 0 || c.Begun(d) {
			t.Errorf("left over: %v", left)
		}
	})
	// The files of an ingest that is deleted have the names that the next fill's have.
	t.Run("a fill waits for their deletion", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := open(t, Options{})
			deleting, filled := false, make(chan []byte, 1)
			c.faults = func(s step, of digest.Digest) error {
				if s == stepPurge && of == d && !deleting {
					deleting = true
					go func() { filled <- mustRead(t, c, d, all(body)) }()
					synctest.Wait() // for as far as it gets
				}
				return nil
			}
			run(t, c)
			leave(t, c, d, body)
			if freed := c.expire(int64(len(body)), time.Now()); freed != int64(len(body)) {
				t.Errorf("freed %d bytes", freed)
			}
			if got := <-filled; !bytes.Equal(got, body) {
				t.Error("wrong bytes")
			}
			settle(c, d)
			if !c.Has(d) {
				t.Error("the fill's files were deleted with those of the one before")
			}
		})
	})
	t.Run("two evictions count it once", func(t *testing.T) {
		c := open(t, Options{})
		again := int64(-1)
		c.faults = func(s step, of digest.Digest) error {
			if s == stepPurge && of == d && again < 0 {
				again = 0
				again = c.expire(int64(len(body)), time.Now())
			}
			return nil
		}
		run(t, c)
		leave(t, c, d, body)
		if freed := c.expire(int64(len(body)), time.Now()); freed != int64(len(body)) || again != 0 {
			t.Errorf("freed %d bytes, and %d at the same time", freed, again)
		}
	})
	t.Run("what a fill is about to take up stays", func(t *testing.T) {
		c := start(t, Options{})
		leave(t, c, d, body)
		c.mu.Lock()
		c.filling[d] = newFill(c, d, all(body), 0)
		c.mu.Unlock()
		freed := c.expire(int64(len(body)), time.Now())
		c.mu.Lock()
		delete(c.filling, d)
		c.mu.Unlock()
		if freed != 0 || gone(c.dir.ingest(d)) {
			t.Errorf("freed %d bytes", freed)
		}
	})
	for name, ruin := range map[string]func(l layout) error{
		"map deleted":    func(l layout) error { return os.Remove(l.ingestMap(d)) },
		"data deleted":   func(l layout) error { return os.Remove(l.ingest(d)) },
		"data truncated": func(l layout) error { return os.Truncate(l.ingest(d), 10) },
		"data too long":  func(l layout) error { return os.Truncate(l.ingest(d), int64(len(body))+10) },
		"map of garbage": func(l layout) error { return os.WriteFile(l.ingestMap(d), []byte("garbage"), 0o600) },
		"map of another size": func(l layout) error {
			return os.WriteFile(l.ingestMap(d), encodeMapHeader(d, 4*minPiece, ""), 0o600)
		},
		"everything": func(l layout) error { return os.RemoveAll(string(l)) },
	} {
		t.Run("resume with "+name, func(t *testing.T) {
			c := start(t, Options{})
			leave(t, c, d, body)
			if err := ruin(c.dir); err != nil {
				t.Fatal(err)
			}
			if got := mustRead(t, c, d, all(body)); !bytes.Equal(got, body) {
				t.Error("wrong bytes")
			}
			settle(c, d)
			if !c.Has(d) || c.Stats().Bytes != int64(len(body)) {
				t.Errorf("has %v, %+v", c.Has(d), c.Stats())
			}
			if got := mustRead(t, c, d, nil); !bytes.Equal(got, body) {
				t.Error("wrong bytes from the disk")
			}
		})
	}
	t.Run("deleted behind the cache's back", func(t *testing.T) {
		c := start(t, Options{})
		leave(t, c, d, body)
		if err := os.RemoveAll(c.dir.ingests()); err != nil {
			t.Fatal(err)
		}
		c.reconcile(map[string]time.Time{})
		if s := c.Stats(); s.Bytes != 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestMismatchesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, Options{})
		for i := range 3 * maxMismatches {
			c.remember(digest.FromString(fmt.Sprint(i)), 2)
		}
		last := digest.FromString(fmt.Sprint(3*maxMismatches - 1))
		c.mu.Lock()
		if got := c.mismatched(last); len(c.mismatches) > maxMismatches || got != 2 {
			t.Errorf("%d digests, %d mismatches of the last", len(c.mismatches), got)
		}
		c.mu.Unlock()
		<-time.After(mismatchFor)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.mismatched(last) != 0 {
			t.Error("remembered forever")
		}
	})
}

// TestMetadataIsRenewedOnce: one who meets a broken file and the one who writes do not
// both replace it. Else facts went to a file that has no name any more.
func TestMetadataIsRenewedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	db, err := openDatabase(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		var broken sync.WaitGroup
		for range 4 {
			broken.Go(func() { _ = db.run(func(*bolt.DB) error { return errCorrupt }) })
			broken.Go(db.heal)
		}
		broken.Wait()
		fact := fmt.Sprintf("fact %d of many", i)
		db.put(bucketState, key("k"), []byte(fact))
		db.flush()
		if body, err := os.ReadFile(path); err != nil || !bytes.Contains(body, []byte(fact)) {
			t.Fatalf("round %d: the file has not what was written: %v", i, err)
		}
	}
	if err := db.close(); err != nil {
		t.Error(err)
	}
}

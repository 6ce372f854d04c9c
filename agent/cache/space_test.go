package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

const kib = 1 << 10

// fillUp commits n blobs of size bytes, oldest first.
func fillUp(t *testing.T, c *Cache, n, size int) []digest.Digest {
	t.Helper()
	var all []digest.Digest
	for i := range n {
		body, d := content(uint64(1000+i), size)
		if err := c.Put(t.Context(), d, registry, body); err != nil {
			t.Fatal(err)
		}
		all = append(all, d)
	}
	return all
}

// present says which of ds are committed.
func present(c *Cache, ds []digest.Digest) []int {
	var is []int
	for i, d := range ds {
		if c.Has(d) {
			is = append(is, i)
		}
	}
	return is
}

func evictions(c *Cache, why reason) int {
	return int(testutil.ToFloat64(c.metrics.evictions.WithLabelValues(string(why))))
}

func TestEvictionOrder(t *testing.T) {
	for name, tt := range map[string]struct {
		keep    func(all []digest.Digest) func(digest.Digest) KeepHint
		prepare func(t *testing.T, c *Cache, all []digest.Digest)
		left    []int // of ten, after room for two more was needed
	}{
		"least recently used": {left: []int{3, 4, 5, 6, 7, 8, 9}},
		"a hit is use": {
			prepare: func(t *testing.T, c *Cache, all []digest.Digest) { mustRead(t, c, all[0], nil) },
			left:    []int{0, 4, 5, 6, 7, 8, 9},
		},
		"a look-up is no use": {
			prepare: func(t *testing.T, c *Cache, all []digest.Digest) {
				if r, ok := c.Lookup(all[0]); ok {
					r.Close()
				}
			},
			left: []int{3, 4, 5, 6, 7, 8, 9},
		},
		"pins stay": {
			prepare: func(_ *testing.T, c *Cache, all []digest.Digest) {
				c.Pin(all[1])
				c.Pin(all[1])
				c.Unpin(all[1])
				c.Pin(all[2])
				c.Unpin(all[2])
			},
			left: []int{1, 4, 5, 6, 7, 8, 9},
		},
		"hints before age": {
			keep: func(all []digest.Digest) func(digest.Digest) KeepHint {
				return func(d digest.Digest) KeepHint {
					switch {
					case len(all) < 10:
					case d == all[0]:
						return EvictLast
					case d == all[9]:
						return EvictFirst
					}
					return Normal
				}
			},
			left: []int{0, 3, 4, 5, 6, 7, 8},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var all []digest.Digest
			opts := Options{MaxBytes: Bytes(1000 * kib)}
			if tt.keep != nil {
				opts.Keep = func(d digest.Digest) KeepHint { return tt.keep(all)(d) }
			}
			c := start(t, opts)
			all = fillUp(t, c, 10, 100*kib)
			if tt.prepare != nil {
				tt.prepare(t, c, all)
			}
			body, d := content(50, 200*kib)
			if err := c.Put(t.Context(), d, registry, body); err != nil {
				t.Fatal(err)
			}
			// Two make room, a third is the hysteresis of 5 %.
			if left := present(c, all); !slices.Equal(left, tt.left) {
				t.Errorf("left %v, want %v", left, tt.left)
			}
			if n := evictions(c, reasonMaxBytes); n != 3 {
				t.Errorf("%d evictions counted", n)
			}
			if s := c.Stats(); s.Bytes > s.Limit {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestWelcome: a blob is welcome where nothing goes for it that was used later, is pinned,
// or is to go last.
func TestWelcome(t *testing.T) {
	now := time.Now()
	last := map[digest.Digest]bool{}
	c := start(t, Options{MaxBytes: Bytes(10 * kib), Keep: func(d digest.Digest) KeepHint {
		if last[d] {
			return EvictLast
		}
		return Normal
	}})
	all := fillUp(t, c, 8, kib)
	c.mu.Lock()
	for i, d := range all { // used 8, 7... 1 hours ago
		c.blobs[d].used = now.Add(-time.Duration(8-i) * time.Hour).Unix()
	}
	c.mu.Unlock()
	last[all[1]] = true
	c.Pin(all[2])
	const slack = 10 * kib / 20
	for _, tt := range []struct {
		n    int64
		ago  time.Duration
		want bool
	}{
		{2 * kib, 100 * time.Hour, true}, // there is room
		{2*kib + 1, 8 * time.Hour, false},
		{3*kib - slack, 7 * time.Hour, true}, // the oldest goes
		{3*kib - slack + 1, 5*time.Hour + time.Minute, false},
		{4*kib - slack, 4*time.Hour + time.Minute, true}, // and the fourth
		{8*kib - slack, 0, true},
		{8*kib - slack + 1, 0, false},
	} {
		if got := c.Welcome(tt.n, now.Add(-tt.ago)); got != tt.want {
			t.Errorf("%d bytes, used %v ago: %v", tt.n, tt.ago, got)
		}
	}
}

// TestAge: a copy is evicted when what it is a copy of would be, also after a restart.
func TestAge(t *testing.T) {
	dir := t.TempDir()
	c := start(t, Options{Dir: dir, MaxBytes: Bytes(10 * kib)})
	all := fillUp(t, c, 4, kib)
	now := time.Now()
	for i, hours := range []int{1, 4, 2, 3} {
		c.Age(all[i], now.Add(-time.Duration(hours)*time.Hour))
	}
	c.Age(all[0], now) // no younger
	c.Age(digest.FromString("not here"), now)
	order := func() (got []digest.Digest) {
		c.Walk(func(i Info) bool {
			got = append(got, i.Digest)
			return true
		})
		return got
	}
	want := []digest.Digest{all[0], all[2], all[3], all[1]}
	if got := order(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if err := c.Meta().Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if u, ok := c.meta.lastUse(all[1]); !ok || u.when != now.Add(-4*time.Hour).Unix() {
		t.Errorf("stored: %+v, %v", u, ok)
	}
}

func TestNoRoom(t *testing.T) {
	body, d := content(51, 200*kib)
	try := func(t *testing.T, c *Cache) error {
		r, err := c.Open(t.Context(), d, all(body))
		if err == nil {
			r.Close()
		}
		settle(c, d)
		return err
	}
	t.Run("larger than the limit", func(t *testing.T) {
		c := start(t, Options{MaxBytes: Bytes(100 * kib)})
		old := fillUp(t, c, 1, 50*kib)
		if err := try(t, c); !errors.Is(err, ErrNoRoom) {
			t.Errorf("got %v", err)
		}
		if !c.Has(old[0]) {
			t.Error("evicted in vain")
		}
	})
	t.Run("a hostile size, without limits", func(t *testing.T) {
		c := start(t, Options{})
		old := fillUp(t, c, 1, 50*kib)
		c.faults = func(s step, _ digest.Digest) error {
			if s == stepAllocate {
				return syscall.ENOSPC
			}
			return nil
		}
		c.statfs = func() (int64, int64, error) { return 1 << 40, 1 << 30, nil }
		_, err := c.Open(t.Context(), d, SourceFunc(func(_ context.Context, f *Fill) error { return f.SetSize(100 << 30) }))
		if !errors.Is(err, ErrNoRoom) {
			t.Errorf("got %v", err)
		}
		settle(c, d)
		if !c.Has(old[0]) {
			t.Error("evicted in vain")
		}
	})
	t.Run("all pinned", func(t *testing.T) {
		c := start(t, Options{MaxBytes: Bytes(300 * kib)})
		for _, d := range fillUp(t, c, 2, 100*kib) {
			c.Pin(d)
		}
		if err := try(t, c); !errors.Is(err, ErrNoRoom) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("reserved by running fills", func(t *testing.T) {
		c := start(t, Options{MaxBytes: Bytes(300 * kib)})
		other, od := content(52, 200*kib)
		m, _, _ := begin(t, c, od, int64(len(other)))
		if err := try(t, c); !errors.Is(err, ErrNoRoom) {
			t.Errorf("got %v", err)
		}
		m.end <- errors.New("gone")
		settle(c, od)
		if err := try(t, c); err != nil {
			t.Errorf("after the other fill is gone: %v", err)
		}
	})
	t.Run("min_free", func(t *testing.T) {
		c := open(t, Options{MinFree: Percent(10)})
		total, free := int64(10_000*kib), int64(1_500*kib)
		var mu sync.Mutex
		c.statfs = func() (int64, int64, error) {
			mu.Lock()
			defer mu.Unlock()
			c.mu.Lock()
			defer c.mu.Unlock()
			return total, free - c.used + c.unbacked, nil
		}
		run(t, c)
		old := fillUp(t, c, 4, 100*kib)
		if err := try(t, c); err != nil { // 1500 - 400 - 200 is less than 1000
			t.Errorf("got %v", err)
		}
		if left := present(c, old); !slices.Equal(left, []int{2, 3}) {
			t.Errorf("left %v", left)
		}
		if n := evictions(c, reasonMinFree); n != 2 {
			t.Errorf("%d evictions counted", n)
		}
		mu.Lock()
		free -= 1_000 * kib // somebody else fills the disk
		mu.Unlock()
		c.balance()
		if n := c.Stats().Blobs; n != 0 {
			t.Errorf("%d blobs left on a full disk", n)
		}
		if err := c.Remove(d); err != nil {
			t.Error(err)
		}
		if err := try(t, c); !errors.Is(err, ErrNoRoom) {
			t.Errorf("got %v", err)
		}
	})
}

// TestMinFreeCountsPromises: bytes that a fill was promised are not there for the next,
// though the file system still has them.
func TestMinFreeCountsPromises(t *testing.T) {
	c := open(t, Options{MinFree: Bytes(100 * kib)})
	c.statfs = func() (int64, int64, error) { return 1000 * kib, 300 * kib, nil }
	first, d := content(53, 150*kib)
	allocating, goOn := make(chan struct{}), make(chan struct{})
	c.faults = func(s step, of digest.Digest) error {
		if s == stepAllocate && of == d {
			close(allocating)
			<-goOn
		}
		return nil
	}
	run(t, c)
	done := make(chan error)
	go func() { done <- c.Put(t.Context(), d, registry, first) }()
	<-allocating
	if n, err := c.Room(); err != nil || n != 50*kib {
		t.Errorf("room for %d bytes, %v; want %d", n, err, 50*kib)
	}
	second, sd := content(54, 100*kib)
	if err := c.Put(t.Context(), sd, registry, second); !errors.Is(err, ErrNoRoom) {
		t.Errorf("the second: %v, want %v", err, ErrNoRoom)
	}
	close(goOn)
	if err := <-done; err != nil {
		t.Errorf("the first: %v", err)
	}
}

// TestFileSystemFreesLater: XFS frees what was deleted some milliseconds later, btrfs when it
// commits. No more is evicted meanwhile than is needed, and nothing is passed by.
func TestFileSystemFreesLater(t *testing.T) {
	for name, commits := range map[string]bool{"soon": false, "when it commits": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := open(t, Options{MinFree: Percent(10)})
				const total = 10_000 * kib
				var mu sync.Mutex
				free, deleted := int64(1_500*kib), int64(0)
				c.faults = func(s step, d digest.Digest) error {
					mu.Lock()
					defer mu.Unlock()
					switch {
					case s == stepAllocate:
						free -= 100 * kib
					case s == stepUnlink && commits:
						deleted += 100 * kib
					case s == stepUnlink:
						time.AfterFunc(20*time.Millisecond, func() {
							mu.Lock()
							defer mu.Unlock()
							free += 100 * kib
						})
					}
					return nil
				}
				c.statfs = func() (int64, int64, error) {
					mu.Lock()
					defer mu.Unlock()
					return total, free, nil
				}
				c.syncfs = func() error {
					mu.Lock()
					defer mu.Unlock()
					free, deleted = free+deleted, 0
					return nil
				}
				run(t, c)
				all := fillUp(t, c, 20, 100*kib)
				if left := present(c, all); len(left) < 4 {
					t.Errorf("%v are left, where there is room for 5", left)
				}
				synctest.Wait()
			})
		})
	}
}

// TestConcurrentFillsStayWithinBounds lets many fills race for little room.
func TestConcurrentFillsStayWithinBounds(t *testing.T) {
	const limit = 1000 * kib
	c := start(t, Options{MaxBytes: Bytes(limit)})
	var clients sync.WaitGroup
	for i := range 30 {
		clients.Go(func() {
			body, d := content(uint64(60+i%20), (50+10*(i%20))*kib)
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
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if used := c.Stats().Bytes; used > limit {
				t.Errorf("%d bytes used of %d", used, limit)
			}
		})
	}
	clients.Wait()
}

// TestDiskFull makes each step report ENOSPC, once or forever.
func TestDiskFull(t *testing.T) {
	body, d := content(80, 3*minPiece)
	for _, s := range []step{stepCreate, stepAllocate, stepWrite} {
		for _, forever := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%v", s, forever), func(t *testing.T) {
				c := start(t, Options{})
				old := fillUp(t, c, 3, 400*kib)
				var mu sync.Mutex
				failed := 0
				c.faults = func(at step, of digest.Digest) error {
					mu.Lock()
					defer mu.Unlock()
					if at == s && of == d && (forever || failed == 0) {
						failed++
						return syscall.ENOSPC
					}
					return nil
				}
				r, err := c.Open(t.Context(), d, all(body))
				var got []byte
				if err == nil {
					got, err = io.ReadAll(r)
					r.Close()
				}
				settle(c, d)
				if forever && (!errors.Is(err, ErrNoRoom) || !errors.Is(err, syscall.ENOSPC)) {
					t.Errorf("got %v", err)
				}
				if !forever && (err != nil || !bytes.Equal(got, body)) {
					t.Errorf("one ENOSPC failed the fill: %v", err)
				}
				if evictions(c, reasonFull) == 0 || len(present(c, old)) == 3 {
					t.Error("nothing was evicted")
				}
				if left := c.entries(c.dir.ingests()); len(left) > 0 {
					t.Errorf("left over: %v", left)
				}
			})
		}
	}
}

// TestDiskErrors pins that a disk which fails in other ways is passed by, too.
func TestDiskErrors(t *testing.T) {
	for _, disk := range []error{syscall.EROFS, syscall.EIO, syscall.EACCES} {
		c := start(t, Options{})
		c.faults = func(at step, _ digest.Digest) error {
			if at == stepCreate {
				return disk
			}
			return nil
		}
		body, d := content(81, 10)
		if _, err := c.Open(t.Context(), d, all(body)); !errors.Is(err, ErrNoRoom) || !errors.Is(err, disk) {
			t.Errorf("%v: got %v", disk, err)
		}
		settle(c, d)
	}
}

// TestTinyDisk fills a real file system to the brim: no pull fails for it.
func TestTinyDisk(t *testing.T) {
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", 0, "size=4m")
	c := start(t, Options{Dir: filepath.Join(dir, "cache")})
	ballast := func(n int) {
		if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, n), 0o600); err != nil {
			t.Error(err)
		}
	}
	kept, passed := 0, 0
	for i := range 40 {
		body, d := content(uint64(100+i), 600*kib)
		if i == 20 {
			for _, info := range c.list() {
				if err := c.Remove(info.Digest); err != nil {
					t.Error(err)
				}
			}
			ballast(3500 * kib) // less is left than any blob
		}
		r, err := c.Open(t.Context(), d, all(body))
		if errors.Is(err, ErrNoRoom) {
			passed++
			continue
		}
		if err != nil {
			t.Fatalf("blob %d: %v", i, err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, body) {
			t.Errorf("blob %d: %d bytes, %v", i, len(got), err)
		}
		r.Close()
		settle(c, d)
		kept++
	}
	if kept != 20 || passed != 20 {
		t.Errorf("kept %d, passed %d; want 20 and 20", kept, passed)
	}
	if evictions(c, reasonFull) == 0 {
		t.Error("nothing was evicted for ENOSPC")
	}
}

// TestStartWithoutInodes: a disk on which not even an empty file can be made is as good as a
// full one, and a start there frees what is needed of its own. Else a cache that helped to
// fill the disk would stay, with nobody to shrink it.
func TestStartWithoutInodes(t *testing.T) {
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", 0, "size=4m,nr_inodes=40")
	c := open(t, Options{Dir: filepath.Join(dir, "cache")})
	stop := run(t, c)
	old := fillUp(t, c, 3, 100)
	stop()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600)
		if errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	c = start(t, Options{Dir: filepath.Join(dir, "cache")})
	if left := present(c, old); len(left) != 3 {
		t.Errorf("found %v", left)
	}
	body, d := content(1, 100)
	if err := c.Put(t.Context(), d, registry, body); err != nil {
		t.Errorf("nothing was evicted: %v", err)
	}
}

func TestEvents(t *testing.T) {
	var mu sync.Mutex
	var log []string
	note := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		log = append(log, fmt.Sprintf(format, args...))
	}
	var c *Cache
	body, d := content(90, 1000)
	c = start(t, Options{Events: Events{
		Committed: func(of digest.Digest, size int64) {
			_, err := os.Stat(c.dir.blob(of))
			note("committed %d bytes, there %v, has %v", size, err == nil, c.Has(of))
		},
		Removing: func(of digest.Digest) {
			_, err := os.Stat(c.dir.blob(of))
			note("removing, there %v, has %v", err == nil, c.Has(of))
		},
	}})
	if err := c.Put(t.Context(), d, registry, body); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.Remove(d), c.Remove(d)); err != nil {
		t.Fatal(err)
	}
	want := []string{"committed 1000 bytes, there true, has true", "removing, there true, has false"}
	if !slices.Equal(log, want) {
		t.Errorf("got %q, want %q", log, want)
	}
	if n := evictions(c, reasonRemoved); n != 1 {
		t.Errorf("%d removals counted", n)
	}
}

// TestUnlinkFails pins that a blob which cannot be deleted is still served and
// counted, and announced again.
func TestUnlinkFails(t *testing.T) {
	committed := 0
	c := start(t, Options{Events: Events{Committed: func(digest.Digest, int64) { committed++ }}})
	ds := fillUp(t, c, 1, 1000)
	c.faults = func(s step, _ digest.Digest) error {
		if s == stepUnlink {
			return syscall.EROFS
		}
		return nil
	}
	c.Pin(ds[0]) // see checkBooks
	if err := c.Remove(ds[0]); !errors.Is(err, syscall.EROFS) {
		t.Errorf("got %v", err)
	}
	if !c.Has(ds[0]) || committed != 2 || c.Stats().Bytes != 1000 {
		t.Errorf("has %v, committed %d, %+v", c.Has(ds[0]), committed, c.Stats())
	}
}

// TestLostBlobOnAReadOnlyDisk: a file system that turned read-only when it found errors
// may have cut a blob. That cannot be deleted, and the pull is passed through all the same.
func TestLostBlobOnAReadOnlyDisk(t *testing.T) {
	c := start(t, Options{})
	ds := fillUp(t, c, 1, 1000)
	if err := os.Truncate(c.dir.blob(ds[0]), 500); err != nil {
		t.Fatal(err)
	}
	c.faults = func(s step, _ digest.Digest) error {
		if s == stepUnlink {
			return syscall.EROFS
		}
		return nil
	}
	if _, err := c.Open(t.Context(), ds[0], nil); !errors.Is(err, ErrNoRoom) {
		t.Errorf("%v, want %v", err, ErrNoRoom)
	}
}

// TestOpenDuringRemoval opens a blob while its withdrawal is under way: it is
// still served, and the next fill waits until the unlink is over.
func TestOpenDuringRemoval(t *testing.T) {
	withdrawing, goOn := make(chan bool), make(chan bool)
	c := start(t, Options{Events: Events{Removing: func(digest.Digest) {
		withdrawing <- true
		<-goOn
	}}})
	body, d := content(91, 1000)
	if err := c.Put(t.Context(), d, registry, body); err != nil {
		t.Fatal(err)
	}
	removed := make(chan error)
	go func() { removed <- c.Remove(d) }()
	<-withdrawing
	if c.Has(d) {
		t.Error("Has during the withdrawal")
	}
	if got := mustRead(t, c, d, nil); !bytes.Equal(got, body) {
		t.Error("wrong bytes during the withdrawal")
	}
	if err := os.Remove(c.dir.blob(d)); err != nil { // as if the unlink had just happened
		t.Fatal(err)
	}
	again := make(chan []byte)
	go func() { again <- mustRead(t, c, d, all(body)) }()
	goOn <- true
	if err := <-removed; err != nil {
		t.Error(err)
	}
	if got := <-again; !bytes.Equal(got, body) {
		t.Error("wrong bytes after the removal")
	}
	settle(c, d)
	if !c.Has(d) {
		t.Error("the new fill was not kept")
	}
}

// TestMapOnAFullDisk: a map that cannot be written costs the fill its resumption, and
// leaves no file open.
func TestMapOnAFullDisk(t *testing.T) {
	c := start(t, Options{})
	body, d := content(60, 3*minPiece)
	if err := os.Symlink("/dev/full", c.dir.ingestMap(d)); err != nil {
		t.Fatal(err)
	}
	m, f, _ := begin(t, c, d, int64(len(body)))
	if open := openFiles(t, "/dev/full"); open > 0 {
		t.Errorf("%d descriptors of the map are open", open)
	}
	put(t, f, body, 0, len(body))
	close(m.end)
	settle(c, d)
	if !c.Has(d) {
		t.Error("not committed")
	}
	if left := c.entries(c.dir.ingests()); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// openFiles counts this process's descriptors of path.
func openFiles(t *testing.T, path string) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && to == path {
			n++
		}
	}
	return n
}

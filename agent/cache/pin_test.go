package cache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// TestPinnedBytes holds what Stats and Room say while pins and blobs come and go.
func TestPinnedBytes(t *testing.T) {
	c := start(t, Options{MaxBytes: Bytes(1000 * kib)})
	blobs := fillUp(t, c, 3, 100*kib)
	want := func(when string, pinned, room int64) {
		t.Helper()
		got, err := c.Room()
		if s := c.Stats(); s.Pinned != pinned*kib || got != room*kib || err != nil {
			t.Errorf("%s: %d bytes pinned, room for %d, %v; want %d KiB, %d KiB", when, s.Pinned, got, err, pinned, room)
		}
	}
	want("nothing is pinned", 0, 1000)
	body, later := content(70, 50*kib)
	for _, d := range []digest.Digest{blobs[0], blobs[0], blobs[1], later} {
		c.Pin(d)
	}
	want("two that are here", 200, 800)
	if err := c.Put(t.Context(), later, registry, body); err != nil {
		t.Fatal(err)
	}
	want("and one that came later", 250, 750)
	c.Unpin(blobs[0])
	c.Unpin(blobs[2])
	want("once of two, and what was not pinned", 250, 750)
	c.Unpin(blobs[0])
	want("the last of two", 150, 850)
	if err := c.Remove(later); err != nil {
		t.Fatal(err)
	}
	want("deleted, and still to be pinned", 100, 900)
	c.Unpin(later)
	want("no more", 100, 900)
}

// TestPinsSurvivePressure: neither bound evicts what is pinned, though all else goes.
func TestPinsSurvivePressure(t *testing.T) {
	c := open(t, Options{MaxBytes: Bytes(1000 * kib), MinFree: Percent(10)})
	var free atomic.Int64
	free.Store(1 << 30)
	c.statfs = func() (int64, int64, error) { return 1 << 30, free.Load(), nil }
	run(t, c)
	blobs := fillUp(t, c, 6, 100*kib)
	for _, d := range blobs[:3] {
		c.Pin(d)
	}
	for i := range 20 {
		body, d := content(uint64(200+i), 300*kib)
		if err := c.Put(t.Context(), d, registry, body); err != nil {
			t.Fatal(err)
		}
	}
	if left := present(c, blobs); len(left) != 3 || left[2] != 2 {
		t.Errorf("left %v, want the first three", left)
	}
	free.Store(0)
	c.balance()
	if left := present(c, blobs); len(left) != 3 || c.Stats().Blobs != 3 {
		t.Errorf("with a full disk %v of %d blobs are left", left, c.Stats().Blobs)
	}
	for _, d := range blobs[:3] {
		c.Unpin(d)
	}
	c.balance()
	if n := c.Stats().Blobs; n != 0 {
		t.Errorf("%d blobs are left after the pins went", n)
	}
}

// TestSettled: it returns when the blob is committed, not when its bytes are there.
func TestSettled(t *testing.T) {
	c := start(t, Options{})
	body, d := content(71, 100)
	if err := c.Settled(t.Context(), d); err != nil {
		t.Errorf("without a fill: %v", err)
	}
	syncing, hold := make(chan struct{}), make(chan struct{})
	c.faults = func(s step, _ digest.Digest) error {
		if s == stepSync {
			close(syncing)
			<-hold
		}
		return nil
	}
	mustRead(t, c, d, all(body))
	<-syncing
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Settled(ended, d); !errors.Is(err, context.Canceled) {
		t.Errorf("while the blob is synced: %v", err)
	}
	close(hold)
	if err := c.Settled(t.Context(), d); err != nil || !c.Has(d) {
		t.Errorf("%v, here: %v", err, c.Has(d))
	}
}

func openTestMeta(t *testing.T, path string) *Meta {
	t.Helper()
	m, err := openMeta(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.close() })
	return m
}

// TestPinIsNotDropped: what somebody wants kept is remembered, however many facts wait
// to be written.
func TestPinIsNotDropped(t *testing.T) {
	m := openTestMeta(t, filepath.Join(t.TempDir(), "metadata.db"))
	for i := range maxPending {
		m.SetVerdict(Repository{"reg.test", "app"}, fmt.Sprint(i))
	}
	m.SetVerdict(Repository{"reg.test", "app"}, "one too many")
	m.SetPinnedImage("docker.io/library/a:1", PinnedImage{Command: true})
	m.flush()
	_, kept := m.Verdict(Repository{"reg.test", "app"}, "one too many")
	if kept || len(m.PinnedImages()) != 1 {
		t.Errorf("%d images are pinned; one fact too many is kept: %v", len(m.PinnedImages()), kept)
	}
}

// whileFlushing calls f while a flush of m waits for the disk.
func whileFlushing(t *testing.T, m *Meta, f func()) {
	t.Helper()
	slow, err := m.db.bolt.Begin(true)
	if err != nil {
		t.Fatal(err)
	}
	flushed := make(chan struct{})
	go func() {
		defer close(flushed)
		m.flush()
	}()
	for writing := false; !writing; runtime.Gosched() {
		m.db.mu.Lock()
		writing = m.db.writing != nil
		m.db.mu.Unlock()
	}
	f()
	if err := slow.Rollback(); err != nil {
		t.Fatal(err)
	}
	<-flushed
}

// TestPinOutlivesAFailedUnpin: an image is unpinned, the disk takes no writes, and before
// that is known the image is pinned again. The older fact, tried once more, must not win.
func TestPinOutlivesAFailedUnpin(t *testing.T) {
	m := openTestMeta(t, filepath.Join(t.TempDir(), "metadata.db"))
	const image = "docker.io/library/a:1"
	m.SetPinnedImage(image, PinnedImage{Command: true})
	m.flush()
	m.DeletePinnedImage(image)
	m.db.fault = syscall.ENOSPC
	whileFlushing(t, m, func() { m.SetPinnedImage(image, PinnedImage{Command: true}) })
	m.db.fault = nil
	m.flush()
	if len(m.PinnedImages()) != 1 {
		t.Error("the pin is lost")
	}
}

// TestFactsAreSeenWhileTheyAreWritten: in particular, who was refused is not let in while
// that waits for the disk.
func TestFactsAreSeenWhileTheyAreWritten(t *testing.T) {
	m := openTestMeta(t, filepath.Join(t.TempDir(), "metadata.db"))
	r := Repository{"reg.test", "app"}
	m.SetVerdict(r, "alice")
	m.flush()
	m.DeleteVerdict(r, "alice")
	m.SetVerdict(r, "bob")
	whileFlushing(t, m, func() {
		_, alice := m.Verdict(r, "alice")
		_, bob := m.Verdict(r, "bob")
		if alice || !bob {
			t.Errorf("alice may read: %v, bob: %v", alice, bob)
		}
	})
}

// TestSync: what was set before is in the file, or the error says why not.
func TestSync(t *testing.T) {
	c := start(t, Options{})
	c.meta.SetPinnedImage("docker.io/library/a:1", PinnedImage{Since: time.Now()})
	if err := c.meta.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, pending := c.meta.db.recent(bucketPins, key("docker.io/library/a:1")); pending || len(c.meta.PinnedImages()) != 1 {
		t.Errorf("pending: %v, in the file: %v", pending, c.meta.PinnedImages())
	}
	idle := open(t, Options{})
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := idle.meta.Sync(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("with nobody to write: %v", err)
	}
	full := errors.New("disk full")
	m := openTestMeta(t, filepath.Join(t.TempDir(), "metadata.db"))
	m.db.fault = full
	m.SetPinnedImage("docker.io/library/a:1", PinnedImage{Since: time.Now()})
	facts := m.Begin()
	sync := func() error {
		failed := make(chan error, 1)
		go func() { failed <- facts.Sync(t.Context()) }()
		<-m.db.full
		m.flush()
		return <-failed
	}
	if err := sync(); !errors.Is(err, full) {
		t.Errorf("a write that fails: %v", err)
	}
	m.db.fault, facts = nil, m.Begin()
	for i := range maxPending + 1 {
		m.SetTag(Repository{Registry: "docker.io", Name: "library/a"}, strconv.Itoa(i), Tag{})
	}
	<-m.db.full
	if err := sync(); !errors.Is(err, errLost) {
		t.Errorf("more than there is room for: %v", err)
	}
	facts = m.Begin()
	if err := sync(); err != nil {
		t.Errorf("then nothing: %v", err)
	}
	for _, fault := range []error{full, nil} { // nobody waits for either write
		m.db.fault = fault
		m.SetPinnedImage("docker.io/library/a:1", PinnedImage{Since: time.Now()})
		m.flush()
	}
	if err := sync(); !errors.Is(err, errLost) {
		t.Errorf("after a write that failed before: %v", err)
	}
}

// TestPinnedImages keeps them over a restart, and nothing that is no pin.
func TestPinnedImages(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	m := openTestMeta(t, path)
	since := time.Now().UTC().Truncate(time.Second)
	_, d := content(72, 10)
	m.SetPinnedImage("docker.io/library/a:1", PinnedImage{Digest: d, Since: since, Checked: since, Public: true, Command: true,
		Signatures: map[string]digest.Digest{"sha256-a.sig": d, "sha256-b.sig": "../../etc"}})
	m.SetPinnedImage("docker.io/library/b:1", PinnedImage{Since: since})
	m.SetPinnedImage("docker.io/library/c:1", PinnedImage{Since: since})
	m.SetPinnedImage("docker.io/library/d:1", PinnedImage{Digest: "../../etc", Since: since})
	m.DeletePinnedImage("docker.io/library/c:1")
	m.flush()
	if err := m.close(); err != nil {
		t.Fatal(err)
	}
	got := openTestMeta(t, path).PinnedImages()
	if a := got["docker.io/library/a:1"]; len(got) != 2 || a.Digest != d || !a.Since.Equal(since) || !a.Public || !a.Command || got["docker.io/library/b:1"].Public ||
		!maps.Equal(a.Signatures, map[string]digest.Digest{"sha256-a.sig": d}) {
		t.Errorf("%+v", got)
	}
}

// TestForgotten holds for an hour, and over a restart.
func TestForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "metadata.db")
		m := openTestMeta(t, path)
		_, d := content(73, 10)
		_, other := content(74, 10)
		m.SetForgotten(d)
		m.flush()
		if err := m.close(); err != nil {
			t.Fatal(err)
		}
		m = openTestMeta(t, path)
		<-time.After(forgottenFor - time.Minute)
		if !m.Forgotten(d) || m.Forgotten(other) {
			t.Errorf("before the hour is over: %v, of another: %v", m.Forgotten(d), m.Forgotten(other))
		}
		<-time.After(2 * time.Minute)
		if m.Forgotten(d) {
			t.Error("held after the hour")
		}
		ahead := binary.BigEndian.AppendUint64(nil, uint64(time.Now().AddDate(1, 0, 0).Unix()))
		m.db.enqueue(bucketForgotten, key(string(d)), ahead)
		if m.Forgotten(d) {
			t.Error("forgotten for a year, because a clock ran ahead")
		}
	})
}

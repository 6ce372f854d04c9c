package proxy

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// rot changes one byte of a committed blob behind the cache's back.
func rot(t *testing.T, dir string, d digest.Digest) {
	t.Helper()
	path := filepath.Join(dir, "blobs", "sha256", d.Encoded())
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, 100); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, 100); err != nil {
		t.Fatal(err)
	}
}

// TestRotDoesNotOutlastThePull: kubelet tries a pull again and again, and each try gets a
// layer that has rotted on this node's disk, while the registry has the right one. The
// scrub may come to it a day later.
func TestRotDoesNotOutlastThePull(t *testing.T) {
	dir := t.TempDir()
	n := startNode(t, func(s *setup) { s.cache.Dir = dir })
	img := n.image(2_000_000)
	layer := img.Layers[0].Digest
	pull := func() error {
		_, err := n.containerd().Pull(t.Context(), host+"/"+repo+":v1", nil)
		return err
	}
	if err := pull(); err != nil {
		t.Fatal(err)
	}
	await(t, "the commit", func() bool { return n.cache.Has(layer) })
	for range 2 { // and the copy that comes for it rots as well
		rot(t, dir, layer)
		for range 2 {
			if err := pull(); err == nil {
				t.Fatal("the layer has not rotted: this test shows nothing")
			}
		}
		await(t, "the rot to be found", func() bool { return !n.cache.Has(layer) })
		if err := pull(); err != nil {
			t.Errorf("the pull goes on to fail: %v", err)
		}
		await(t, "the commit", func() bool { return n.cache.Has(layer) && !n.proxy.again.has(layer) })
	}
}

// TestDoubtIsCheap: whoever asks for a good blob again and again gets it from the disk.
func TestDoubtIsCheap(t *testing.T) {
	n := startNode(t, nil)
	img := n.image(2_000_000)
	layer := img.Layers[0].Digest
	n.get(blobPath(layer))
	await(t, "the commit", func() bool { return n.cache.Has(layer) })
	for range 5 {
		if a := n.get(blobPath(layer)); a.header.Get(headerSource) != "disk" || !bytes.Equal(a.body, bytesOf(t, img, layer)) {
			t.Errorf("status %d from %q", a.status, a.header.Get(headerSource))
		}
	}
	await(t, "the doubt", func() bool { doubted, _ := n.proxy.again.get(layer); return doubted })
	n.proxy.again.mu.Lock()
	defer n.proxy.again.mu.Unlock()
	until := n.proxy.again.items[layer].Value.(remembered[digest.Digest, bool]).until
	if left := time.Until(until); left > againMemory {
		t.Errorf("should it rot, a pull that is tried again finds out in %s", left)
	}
}

// TestRottenManifest: a manifest is read as a whole, so a wrong one is never sent.
func TestRottenManifest(t *testing.T) {
	dir := t.TempDir()
	n := startNode(t, func(s *setup) { s.cache.Dir = dir })
	img := n.image()
	n.get(manifestPath("v1"))
	await(t, "the commit", func() bool { return n.cache.Has(img.Digest) })
	rot(t, dir, img.Digest)
	for range 2 {
		if a := n.get(manifestPath(img.Digest.String())); a.status != http.StatusOK || !bytes.Equal(a.body, img.Manifests[0].Data) {
			t.Errorf("status %d, %d bytes", a.status, len(a.body))
		}
	}
}

// unreadable is a blob whose file the disk cannot read.
type unreadable struct {
	content
	file *os.File
}

func (u unreadable) extent(off int64) (*os.File, int64, error) { return u.file, u.size() - off, nil }

// TestDiskCannotRead: what the disk cannot give any more is deleted at once, and the
// runtime takes it from the registry in the same pull, instead of trying again here.
func TestDiskCannotRead(t *testing.T) {
	n := startNode(t, nil)
	layer := n.image(2_000_000).Layers[0].Digest
	n.get(blobPath(layer))
	await(t, "the commit", func() bool { return n.cache.Has(layer) })
	bad, err := os.Open("/proc/self/mem") // where nothing is mapped, reading is EIO
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := n.proxy.newExchange(w, r)
		good, err := n.proxy.open(x.ctx, n.target(), layer, KindBlob)
		if err != nil {
			t.Error(err)
			return
		}
		b := &body{x: x, at: unreadable{good, bad}}
		defer b.Close()
		http.ServeContent(x, r, "", time.Time{}, b)
		n.proxy.judge(x, keyOf(n.target(), layer), b.failure())
	}))
	defer s.Close()
	resp, err := http.Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("%d bytes were read", len(body))
	}
	if n.cache.Has(layer) {
		t.Error("it is still there")
	}
	checkOCIError(t, n.get(blobPath(layer), "Range", "bytes=1000000-"), http.StatusServiceUnavailable, "UNAVAILABLE")
}

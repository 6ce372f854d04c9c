package agent

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
)

// sign puts signatures of an image into the registry, the same for the same seed.
func sign(reg *registrytest.Server, of *registrytest.Image, seed uint64) *registrytest.Image {
	signatures := registrytest.Artifact(of.Descriptor, "application/vnd.dev.cosign.simplesigning.v1+json", seed)
	reg.Put("team/app", signatures, signatureTag(of.Digest))
	return signatures
}

// lookups counts the requests for signatures of d.
func lookups(reg *registrytest.Server, d digest.Digest) int {
	return reg.Count(registrytest.Match{Reference: signatureTag(d)})
}

// verifies reads the signatures of an image as CRI-O does before it runs it.
func (r *running) verifies(t *testing.T, image, signatures *registrytest.Image) error {
	t.Helper()
	if err := r.asks(t, true, "manifests", signatureTag(image.Digest)); err != nil {
		return err
	}
	return r.asks(t, true, "blobs", signatures.Layers[0].Digest.String())
}

// TestPinnedSignatures: of a pinned image CRI-O gets the signatures of what it runs while
// the registry is away, also after a restart, and when the registry has deleted all. They
// cost one question, and go with the image.
func TestPinnedSignatures(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL, c.Hosts.CRIO = 0, t.TempDir()
	reg, _ := startRegistry(t, &c)
	index, gzip, zstd := sameTwice()
	reg.Put("team/app", index, "v1")
	for i, unused := range []*registrytest.Image{index, gzip} {
		sign(reg, unused, 60+uint64(i))
	}
	signatures := sign(reg, zstd, 50)
	a := start(t, c)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	if err := a.again(t, pinnedName); err != nil {
		t.Fatal(err)
	}
	if one, none := lookups(reg, zstd.Digest), lookups(reg, index.Digest)+lookups(reg, gzip.Digest); one != 1 || none != 0 {
		t.Errorf("%d requests for signatures that are used, %d for others", one, none)
	}
	want := index.Manifests[2].Size + imageSize(zstd) + imageSize(signatures)
	if p := a.pinOf(t, pinnedName); p.State != PinHeld || p.Bytes != want || p.Present != want {
		t.Errorf("%+v, want %d bytes", p, want)
	}
	check := func(when string) {
		if err := a.verifies(t, zstd, signatures); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if err := a.takes(t, true, zstd); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	restart := func() {
		if err := a.stop(t); err != nil {
			t.Fatal(err)
		}
		a = start(t, c, atOnce)
	}
	reg.Down()
	check("down")
	restart()
	check("restarted")
	if err := reg.Up(); err != nil {
		t.Fatal(err)
	}
	for _, img := range []*registrytest.Image{index, signatures} {
		for _, m := range img.Manifests {
			reg.Delete("team/app", m.Digest.String())
		}
		for d := range img.Blobs {
			reg.Delete("team/app", d.String())
		}
	}
	reg.Delete("team/app", "v1")
	reg.Delete("team/app", signatureTag(zstd.Digest))
	_ = a.again(t, pinnedName) // 404
	check("deleted")
	restart()
	check("deleted, and restarted")
	if code, body := a.unpin(t, pinnedName); code != 200 || a.cache.Stats().Pinned != 0 {
		t.Errorf("%d %s, %d bytes pinned", code, body, a.cache.Stats().Pinned)
	}
}

// TestSignaturesAreNoPartOfAPin: whatever becomes of them, the image is held. That they are
// there and cannot be had is told; that there are none, or that nobody says, is not.
func TestSignaturesAreNoPartOfAPin(t *testing.T) {
	for _, tt := range []struct {
		name   string
		signed bool
		fault  []registrytest.Effect // of the question; else of a layer
		state  string
		again  bool // the next look at it brings them
	}{
		{"unsigned", false, nil, PinHeld, false},
		{"the question is refused", true, []registrytest.Effect{registrytest.Status(403)}, PinHeld, false},
		{"the question fails", true, []registrytest.Effect{registrytest.Status(500)}, PinHeld, true},
		{"a layer fails", true, nil, PinStale, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := testConfig(t)
			c.Upstream.TagTTL, c.Hosts.CRIO = 0, t.TempDir()
			reg, img := startRegistry(t, &c)
			signatures := registrytest.Artifact(img.Descriptor, "application/vnd.dev.cosign.simplesigning.v1+json", 50)
			if tt.signed {
				signatures = sign(reg, img, 50)
			}
			match, effects := registrytest.Match{Reference: signatureTag(img.Digest)}, tt.fault
			if effects == nil {
				match, effects = registrytest.Match{Reference: signatures.Layers[0].Digest.String()}, []registrytest.Effect{registrytest.Status(500)}
			}
			f := reg.Inject(match, effects...)
			a := start(t, c, unhurried)
			e := a.pin(t, pinnedName)[pinnedName]
			p := a.pinOf(t, pinnedName)
			if p.State != tt.state || !a.holds(img) || e.Error != "" && tt.state == PinHeld {
				t.Errorf("%q, %+v", e.Error, p)
			}
			why := "its signatures (tag " + signatureTag(img.Digest) + ") cannot be had, so it does not start without the registry where a policy demands them"
			if tt.state == PinStale && (!strings.Contains(p.Error, why) || !strings.Contains(e.Error, "pinned, and the agent goes on trying: "+why)) {
				t.Errorf("%q, %q", e.Error, p.Error)
			}
			f.Remove()
			a.pins.mu.Lock()
			due := a.pins.images[pinnedName].held.unasked()
			a.pins.mu.Unlock()
			if due != tt.again {
				t.Errorf("asked for again: %v", due)
			}
			if tt.again {
				eventually(t, "held again", func() error { return a.again(t, pinnedName) })
			}
			reg.Down()
			if err := a.verifies(t, img, signatures); (err == nil) != tt.again {
				t.Errorf("signatures: %v", err)
			}
		})
	}
}

// TestPinnedSignaturesChange: others under the same tag replace them, and what the cache
// loses of them comes again.
func TestPinnedSignaturesChange(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL, c.Hosts.CRIO = 0, t.TempDir()
	reg, img := startRegistry(t, &c)
	a := start(t, c, unhurried)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	for _, seed := range []uint64{50, 51} {
		signatures := sign(reg, img, seed)
		a.pins.mu.Lock()
		a.pins.images[pinnedName].held.asked = time.Time{} // as when it is time
		a.pins.mu.Unlock()
		if err := a.again(t, pinnedName); err != nil {
			t.Fatal(err)
		}
		if want := imageSize(img) + imageSize(signatures); a.cache.Stats().Pinned != want {
			t.Errorf("%d bytes pinned, want %d", a.cache.Stats().Pinned, want)
		}
		if err := a.cache.Remove(signatures.Layers[0].Digest); err != nil {
			t.Fatal(err)
		}
		eventually(t, "there again", func() error {
			if p := a.pinOf(t, pinnedName); p.State != PinHeld || p.Present != p.Bytes {
				return fmt.Errorf("%+v", p)
			}
			return nil
		})
		if err := a.verifies(t, img, signatures); err != nil {
			t.Error(err)
		}
	}
}

// TestPinnedSignaturesHeal: what the cache loses of them comes again though the registry has
// deleted the tag of the image.
func TestPinnedSignaturesHeal(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL, c.Hosts.CRIO = 0, t.TempDir()
	reg, img := startRegistry(t, &c)
	signatures := sign(reg, img, 50)
	a := start(t, c, unhurried)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	reg.Delete("team/app", "v1")
	if err := a.again(t, pinnedName); err == nil {
		t.Fatal("the tag is still there")
	}
	asked := lookups(reg, img.Digest)
	if err := a.cache.Remove(signatures.Layers[0].Digest); err != nil {
		t.Fatal(err)
	}
	eventually(t, "there again", func() error {
		if p := a.pinOf(t, pinnedName); p.State != PinStale || p.Present != p.Bytes {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	if n := lookups(reg, img.Digest) - asked; n != 0 {
		t.Errorf("asked %d times for what is known", n)
	}
}

// TestPinnedTagMovesBeforeAStop: an agent that ends while it still asks for signatures has
// the new version afterwards, of which it has let the old one go.
func TestPinnedTagMovesBeforeAStop(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL, c.Hosts.CRIO = 0, t.TempDir()
	reg, _ := startRegistry(t, &c)
	a := start(t, c)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	newer := registrytest.OCIImage(registrytest.ImageSpec{Seed: 70, Layers: []int64{200 << 10}})
	reg.Put("team/app", newer, "v1")
	f := reg.Inject(registrytest.Match{Reference: signatureTag(newer.Digest)}, registrytest.Hold())
	a.pins.mu.Lock()
	a.pins.images[pinnedName].due = time.Now()
	a.pins.wake()
	a.pins.mu.Unlock()
	<-f.Held()
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	reg.Down()
	a = start(t, c, unhurried)
	if p := a.pinOf(t, pinnedName); p.Digest != newer.Digest || !a.holds(newer) {
		t.Errorf("%+v, want %s", p, newer.Digest)
	}
}

// TestNobodyAsksForSignatures: without CRI-O nobody reads them.
func TestNobodyAsksForSignatures(t *testing.T) {
	c := testConfig(t)
	c.Hosts.Containerd = t.TempDir()
	reg, img := startRegistry(t, &c)
	sign(reg, img, 50)
	a := start(t, c)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" || lookups(reg, img.Digest) != 0 {
		t.Errorf("%q, %d questions", e.Error, lookups(reg, img.Digest))
	}
}

// TestSignaturesAreAskedForRarely: of all checks of a version on its first day and the ten
// after it, few ask, and the first ones most.
func TestSignaturesAreAskedForRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, perDay := newVersion(""), map[int]int{}
		begin := time.Now()
		for time.Since(begin) < 11*24*time.Hour {
			if v.unasked() {
				perDay[int(time.Since(begin).Hours()/24)]++
				v.answered()
			}
			<-time.After(pinInterval)
		}
		if perDay[0] < 3 || perDay[0] > 10 {
			t.Errorf("%d times on the first day", perDay[0])
		}
		for day := 2; day < 11; day++ {
			if perDay[day] != 1 {
				t.Errorf("%d times on day %d", perDay[day], day)
			}
		}
	})
}

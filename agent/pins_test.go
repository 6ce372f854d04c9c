package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// atOnce lets an agent look at its pins as soon as it runs.
func atOnce(o *options) { o.pins = 0 }

// unhurried keeps an agent from looking at its pins by itself while a test does.
func unhurried(o *options) { o.pins = 1000 * time.Hour }

const pinnedName = testRegistry + "/team/app:v1"

// pinOf is how it stands with one pin.
func (r *running) pinOf(t *testing.T, name string) Pin {
	t.Helper()
	pins := r.Pins().Pins
	i := slices.IndexFunc(pins, func(p Pin) bool { return p.Image == name })
	if i < 0 {
		t.Fatalf("%s is not among %+v", name, pins)
	}
	return pins[i]
}

// reaches waits for the state of a pin, and returns it.
func (r *running) reaches(t *testing.T, name, state string) (p Pin) {
	t.Helper()
	eventually(t, state, func() error {
		if p = r.pinOf(t, name); p.State != state {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	return p
}

// again has a pin looked after now.
func (r *running) again(t *testing.T, name string) error {
	t.Helper()
	r.pins.mu.Lock()
	p := r.pins.images[name]
	r.pins.mu.Unlock()
	if err := r.pins.claim(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	return r.pins.lookAfter(t.Context(), p, nil)
}

// pin runs POST /api/v1/pins and returns the last event of each image.
func (r *running) pin(t *testing.T, names ...string) map[string]WarmEvent {
	t.Helper()
	body, err := json.Marshal(PinRequest{Images: names})
	if err != nil {
		t.Fatal(err)
	}
	code, answer := r.admin(t, "POST", "/api/v1/pins", string(body), "Content-Type", "application/json")
	if code != http.StatusOK {
		t.Fatalf("%d %s", code, answer)
	}
	out := map[string]WarmEvent{}
	for line := range strings.Lines(answer) {
		var e WarmEvent
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		if e.Done {
			out[e.Image] = e
		}
	}
	return out
}

func (r *running) unpin(t *testing.T, names ...string) (int, string) {
	t.Helper()
	return r.admin(t, "DELETE", "/api/v1/pins?"+url.Values{"image": names}.Encode(), "")
}

// holds reports whether all of an image is in the cache, pinned.
func (r *running) holds(img *registrytest.Image) bool {
	want := map[digest.Digest]bool{img.Digest: true}
	for d := range img.Blobs {
		want[d] = true
	}
	r.cache.Walk(func(i cache.Info) bool {
		if i.Pinned {
			delete(want, i.Digest)
		}
		return true
	})
	return len(want) == 0
}

func imageSize(img *registrytest.Image) (n int64) {
	for _, m := range img.Manifests {
		n += m.Size
	}
	for _, b := range img.Blobs {
		n += b.Size()
	}
	return n
}

// TestConfiguredPin is fetched after the start, costs the registry one HEAD when it is
// looked at again, and is kept over a restart and a loss of the metadata.
func TestConfiguredPin(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	c.Cache.Pins = []string{pinnedName}
	a := start(t, c, atOnce)
	p := a.reaches(t, pinnedName, PinHeld)
	if p.Digest != img.Digest || p.Bytes != imageSize(img) || p.Present != p.Bytes || p.Source != "config" || p.Checked.IsZero() || p.Since.IsZero() || !a.holds(img) {
		t.Errorf("%+v, want %s of %d bytes", p, img.Digest, imageSize(img))
	}
	a.config.Upstream.TagTTL = 0
	before := reg.Count(registrytest.Match{})
	if err := a.again(t, pinnedName); err != nil || reg.Count(registrytest.Match{})-before > 1 {
		t.Errorf("%v, %d requests to look again", err, reg.Count(registrytest.Match{})-before)
	}
	if recent := a.Status().Recent; len(recent) != 1 || recent[0].Parts[0].Kind == partTag {
		t.Errorf("its questions count as pulls: %+v", recent)
	}
	since := p.Since
	for _, how := range []string{"restarted", "metadata deleted"} {
		if err := a.stop(t); err != nil {
			t.Fatal(err)
		}
		if how == "metadata deleted" {
			if err := os.Remove(filepath.Join(c.Cache.Dir, "metadata.db")); err != nil {
				t.Fatal(err)
			}
		}
		a = start(t, c, atOnce)
		p = a.reaches(t, pinnedName, PinHeld)
		if (how == "restarted") != p.Since.Equal(since) || !a.holds(img) {
			t.Errorf("%s: %+v", how, p)
		}
	}
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	c.Cache.Pins = nil
	a = start(t, c, atOnce)
	if pins := a.Pins(); len(pins.Pins) != 0 || pins.Bytes != 0 || a.holds(img) {
		t.Errorf("no longer configured: %+v", pins)
	}
}

// TestPinByCommand: what was pinned stays so over a restart, without the registry, and
// until it is unpinned.
func TestPinByCommand(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	reg.Down()
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	a = start(t, c, atOnce)
	if !a.holds(img) {
		t.Error("not held when the agent starts")
	}
	p := a.reaches(t, pinnedName, PinStale)
	if p.Source != "command" || p.Digest != img.Digest || !strings.Contains(p.Error, "503") || p.Retry.IsZero() {
		t.Errorf("%+v", p)
	}
	if got := sources(a.pull(t)); got["upstream"]+got["peer"] != 0 || got["disk"] == 0 {
		t.Errorf("pulled from %v", got)
	}
	if code, body := a.unpin(t, pinnedName, testRegistry+"/team/other:v1"); code != 404 || !strings.Contains(body, "team/other:v1 is not pinned") || !a.holds(img) {
		t.Errorf("one of two: %d %s, held %v", code, body, a.holds(img))
	}
	if code, body := a.unpin(t, pinnedName, pinnedName); code != 200 || a.cache.Stats().Pinned != 0 {
		t.Errorf("%d %s, %d bytes pinned", code, body, a.cache.Stats().Pinned)
	}
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	if a = start(t, c, atOnce); len(a.Pins().Pins) != 0 {
		t.Errorf("unpinned, and restarted: %+v", a.Pins())
	}
}

// TestPinnedTagMoves: the old version is kept until the new one is whole, whatever stops
// that on the way; then it may be evicted.
func TestPinnedTagMoves(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL = 0
	reg, old := startRegistry(t, &c)
	c.Cache.Pins = []string{pinnedName}
	a := start(t, c, atOnce)
	a.reaches(t, pinnedName, PinHeld)
	newer := registrytest.OCIImage(registrytest.ImageSpec{Seed: 70, Layers: []int64{200 << 10, 300 << 10}})
	reg.Put("team/app", newer, "v1")
	f := reg.Inject(registrytest.Match{Reference: newer.Layers[1].Digest.String()}, registrytest.Status(500))
	if err := a.again(t, pinnedName); err == nil {
		t.Fatal("half of the new version is enough")
	}
	p := a.pinOf(t, pinnedName)
	if p.State != PinStale || p.Digest != old.Digest || p.Next != newer.Digest || !a.holds(old) || !strings.Contains(p.Error, "stands for another image now") {
		t.Errorf("half of the new version is here: %+v", p)
	}
	f.Remove()
	eventually(t, "the new version is held", func() error {
		if p := a.pinOf(t, pinnedName); p.Digest != newer.Digest || p.State != PinHeld || p.Next != "" {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	if !a.holds(newer) || a.cache.Stats().Pinned != imageSize(newer) {
		t.Errorf("held %v, %d bytes pinned of %d", a.holds(newer), a.cache.Stats().Pinned, imageSize(newer))
	}
	reg.Tag("team/app", "v1", old.Digest)
	if err := a.again(t, pinnedName); err != nil || !a.holds(old) {
		t.Errorf("moved back: %v", err)
	}
}

// TestPinnedAndDeleted: after the registry has deleted an image it can be pulled by its
// tag, and is again when the cache lost a blob that others have; what was public also when
// the registry refuses it.
func TestPinnedAndDeleted(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL = 0
	reg, img := startRegistry(t, &c)
	c.Cache.Pins = []string{pinnedName}
	a := start(t, c, atOnce)
	a.reaches(t, pinnedName, PinHeld)
	reg.Delete("team/app", "v1")
	reg.Delete("team/app", img.Digest.String())
	for d := range img.Blobs {
		reg.Delete("team/app", d.String())
	}
	for _, when := range []string{"deleted", "deleted, and restarted"} {
		if err := a.again(t, pinnedName); err == nil {
			t.Fatal("the registry's 404 is not told")
		}
		p := a.pinOf(t, pinnedName)
		if p.State != PinStale || !strings.Contains(p.Error, "the registry has it no more, so it is kept and served as it was; `larder unpin "+pinnedName) {
			t.Errorf("%s: %+v", when, p)
		}
		if got := sources(a.pull(t)); got["upstream"] != 0 {
			t.Errorf("%s: pulled from %v", when, got)
		}
		if e, err := a.Explain(testImage, "linux/amd64"); err != nil || e.Digest != img.Digest || e.Here != e.Bytes {
			t.Errorf("%s: explained as %+v, %v", when, e, err)
		}
		if err := a.stop(t); err != nil {
			t.Fatal(err)
		}
		a = start(t, c, atOnce)
	}
	fault := reg.Inject(registrytest.Match{}, registrytest.Status(403))
	if err := a.again(t, pinnedName); err == nil || !strings.Contains(err.Error(), "made private, or deleted with its repository") {
		t.Errorf("refused: %v", err)
	}
	for _, when := range []string{"refused", "not found again"} {
		if got := sources(a.pull(t)); got["upstream"] != 0 {
			t.Errorf("%s: pulled from %v", when, got)
		}
		fault.Remove()
	}
	if !a.holds(img) {
		t.Error("it was let go")
	}
}

// pulls reports whether somebody without a credential can pull an image through r.
func (r *running) pulls(t *testing.T, reference string) error {
	t.Helper()
	image := testImage
	image.Reference = reference
	parts, err := Puller{Proxy: "http://" + r.ProxyAddr(), Client: r.client, Platform: "linux/amd64"}.Pull(t.Context(), image)
	if err == nil && sources(parts)["upstream"] != 0 {
		return fmt.Errorf("pulled from %v", sources(parts))
	}
	return err
}

// TestPublicPinOutlivesARefusal: what was public when it was pinned, by tag or digest, is
// served when the registry refuses the repository, also after a restart, and nothing else
// of the repository is. What it lost then cannot be had, which is said; when the registry
// shows it again all goes on as before, and unpinning ends it.
func TestPublicPinOutlivesARefusal(t *testing.T) {
	for _, by := range []string{"tag", "digest"} {
		for _, status := range []int{401, 403} {
			t.Run(fmt.Sprintf("%s, %d", by, status), func(t *testing.T) {
				t.Parallel()
				c := testConfig(t)
				c.Upstream.TagTTL = 0
				reg, img := startRegistry(t, &c)
				other := registrytest.OCIImage(registrytest.ImageSpec{Seed: 72, Layers: []int64{20 << 10}})
				reg.Put("team/app", other, "v2")
				name, reference := pinnedName, "v1"
				if by == "digest" {
					name, reference = testRegistry+"/team/app@"+img.Digest.String(), img.Digest.String()
				}
				a := start(t, c)
				if e := a.pin(t, name)[name]; e.Error != "" {
					t.Fatal(e.Error)
				}
				_ = a.pulls(t, "v2")
				a.settle(t)
				fault := reg.Inject(registrytest.Match{Repository: "team/app"}, registrytest.Status(status))
				for _, when := range []string{"refused", "restarted", "restarted, and looked at"} {
					if when == "restarted, and looked at" {
						err := a.again(t, name)
						if by == "tag" && (err == nil || !strings.Contains(err.Error(), "It was public, so it is kept and served to all of this node as it was; `larder unpin "+name)) {
							t.Errorf("the refusal is not told: %v", err)
						}
					}
					if p := a.pinOf(t, name); !p.Public || p.Present != p.Bytes || p.Digest != img.Digest {
						t.Errorf("%s: %+v", when, p)
					}
					for range 2 { // asked, and remembered
						for _, ref := range []string{reference, img.Digest.String()} {
							if err := a.pulls(t, ref); err != nil {
								t.Errorf("%s: %v", when, err)
							}
						}
						if by == "tag" {
							if err := a.pullByPath(t, img); err != nil {
								t.Errorf("%s: as CRI-O: %v", when, err)
							}
						}
						for _, ref := range []string{"v2", other.Digest.String()} {
							if err := a.pulls(t, ref); err == nil {
								t.Errorf("%s: %s is served too", when, ref)
							}
						}
					}
					if when == "refused" {
						a = a.restart(t)
					}
				}
				if err := a.cache.Remove(img.Layers[0].Digest); err != nil {
					t.Fatal(err)
				}
				if err := a.again(t, name); err == nil || !strings.Contains(err.Error(), "neither the registry nor another node gives it") || a.pinOf(t, name).State != PinMissing {
					t.Errorf("a blob is lost: %v, %+v", err, a.pinOf(t, name))
				}
				fault.Remove()
				a = a.restart(t)
				if err := errors.Join(a.again(t, name), a.pulls(t, reference)); err != nil {
					t.Errorf("shown again: %v", err)
				}
				if p := a.pinOf(t, name); p.State != PinHeld || !p.Public {
					t.Errorf("shown again: %+v", p)
				}
				reg.Inject(registrytest.Match{Repository: "team/app"}, registrytest.Status(status))
				a = a.restart(t)
				if code, body := a.unpin(t, name); code != 200 {
					t.Fatalf("%d %s", code, body)
				}
				for _, ref := range []string{reference, img.Digest.String()} {
					if err := a.pulls(t, ref); err == nil {
						t.Errorf("unpinned, and %s is served", ref)
					}
				}
			})
		}
	}
}

// TestPublicPinFollows: a repository that was refused and is shown again, with another
// image under the tag, is followed.
func TestPublicPinFollows(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL = 0
	reg, old := startRegistry(t, &c)
	c.Cache.Pins = []string{pinnedName}
	a := start(t, c, atOnce)
	a.reaches(t, pinnedName, PinHeld)
	fault := reg.Inject(registrytest.Match{}, registrytest.Status(401))
	if err := a.again(t, pinnedName); err == nil || a.pulls(t, "v1") != nil || !a.holds(old) {
		t.Fatalf("refused: %v", err)
	}
	newer := registrytest.OCIImage(registrytest.ImageSpec{Seed: 73, Layers: []int64{30 << 10}})
	reg.Put("team/app", newer, "v1")
	fault.Remove()
	a = a.restart(t)
	if err := a.again(t, pinnedName); err != nil {
		t.Fatal(err)
	}
	if p := a.pinOf(t, pinnedName); p.Digest != newer.Digest || !p.Public {
		t.Errorf("%+v", p)
	}
	reg.Inject(registrytest.Match{}, registrytest.Status(401))
	_ = a.again(t, pinnedName)
	if err := a.pulls(t, newer.Digest.String()); err != nil {
		t.Errorf("the new version: %v", err)
	}
	if err := a.pulls(t, old.Digest.String()); err == nil {
		t.Error("the old version is served, which is pinned no more")
	}
}

// TestWhatMakesAPinPublic: an answer of the registry to a question without a credential,
// and that alone. The node's own credentials, and a record of before, do not.
func TestWhatMakesAPinPublic(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL = 0
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	a.cache.Meta().SetPinnedImage(pinnedName, cache.PinnedImage{Digest: img.Digest, Since: time.Now(), Command: true})
	if err := a.pins.sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	refused := func(when string) {
		t.Helper()
		fault := reg.Inject(registrytest.Match{}, registrytest.Status(401))
		defer fault.Remove()
		if err := a.again(t, pinnedName); err == nil || strings.Contains(err.Error(), "It was public") {
			t.Errorf("%s: %v", when, err)
		}
		if _, err := (Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client}).Resolve(t.Context(), testImage); err == nil {
			t.Errorf("%s: the tag is told", when)
		}
		if p := a.pinOf(t, pinnedName); p.Public || a.pulls(t, img.Digest.String()) == nil {
			t.Errorf("%s: it is served: %+v", when, p)
		}
	}
	a = a.restart(t)
	refused("nobody knows whether it was")
	a = a.restart(t)
	if err := a.again(t, pinnedName); err != nil {
		t.Fatal(err)
	}
	if !a.pinOf(t, pinnedName).Public {
		t.Error("confirmed, and not public")
	}
	file := filepath.Join(t.TempDir(), "config.json")
	replace(t, file, `{"auths":{"`+testRegistry+`":{"username":"ann","password":"HUSH"}}}`)
	a.config.Registries = []upstream.Registry{{Host: testRegistry, Upstreams: []string{reg.URL()}, Auth: "node", CredentialsFile: file}}
	a = a.restart(t)
	if !a.pinOf(t, pinnedName).Public {
		t.Error("forgotten over a restart")
	}
	if err := a.again(t, pinnedName); err != nil || a.pinOf(t, pinnedName).Public {
		t.Errorf("confirmed to the node: %v, %+v", err, a.pinOf(t, pinnedName))
	}
	refused("the node's own")
}

// TestPublicPinIsItsNodesOwn: a node that pins what the registry refuses serves it to its
// own callers, and is no leave for those of another, also while the registry is down.
func TestPublicPinIsItsNodesOwn(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{300 << 10, 5 << 10}})
	reg.Put("team/app", img, "v1")
	next := clusterConfigs(t, upstream.Registry{Host: testRegistry, Upstreams: []string{reg.URL()}})
	nodes := startCluster(t, 3, func() Config {
		c := next()
		c.Upstream.TagTTL = 0
		return c
	})
	if e := nodes[0].pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	nodes[0].settle(t)
	reg.Inject(registrytest.Match{}, registrytest.Status(401))
	for _, when := range []string{"refused", "and down"} {
		for i, n := range nodes {
			for _, ref := range []string{"v1", img.Digest.String()} {
				if err := n.pulls(t, ref); (err == nil) != (i == 0) {
					t.Errorf("%s: node %d, %s: %v", when, i, ref, err)
				}
			}
			if _, err := n.readBlob(img.Layers[1].Digest); (err == nil) != (i == 0) {
				t.Errorf("%s: node %d, a blob: %v", when, i, err)
			}
		}
		reg.Down()
	}
}

// TestPinsAndPressure: pulls evict each other and no pin; what would take all of the
// cache is refused before a byte is fetched, and pulls go on.
func TestPinsAndPressure(t *testing.T) {
	c := testConfig(t)
	c.Cache.MaxBytes = cache.Bytes(1 << 20)
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	large := testRegistry + "/team/large:v1"
	reg.Put("team/large", registrytest.OCIImage(registrytest.ImageSpec{Seed: 80, Layers: []int64{300 << 10, 300 << 10}}), "v1")
	before := reg.Count(registrytest.Match{Kind: registrytest.Blob})
	if e := a.pin(t, large)[large]; !strings.HasPrefix(e.Error, "not pinned: ") || !strings.Contains(e.Error, "cache.max_bytes") {
		t.Errorf("too large: %+v", e)
	}
	if n := reg.Count(registrytest.Match{Kind: registrytest.Blob}) - before; n != 0 || len(a.Pins().Pins) != 1 {
		t.Errorf("%d blobs were fetched for %+v", n, a.Pins())
	}
	for i := range 8 {
		repo := fmt.Sprintf("team/other%d", i)
		reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 90 + uint64(i), Layers: []int64{400 << 10}}), "v1")
		puller := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client, Platform: "linux/amd64"}
		if _, err := puller.Pull(t.Context(), Image{testRegistry, repo, "v1"}); err != nil {
			t.Fatal(err)
		}
	}
	a.settle(t)
	if s := a.cache.Stats(); !a.holds(img) || s.Pinned != imageSize(img) || s.Bytes > s.Limit {
		t.Errorf("held %v, %+v", a.holds(img), s)
	}
}

// TestPullsWhileAPinComes: they evict none of it, nor its index and manifest, which are here
// before its layers are and older than whatever is pulled meanwhile.
func TestPullsWhileAPinComes(t *testing.T) {
	c := testConfig(t)
	c.Cache.MaxBytes = cache.Bytes(1 << 20)
	reg, _ := startRegistry(t, &c)
	img := registrytest.Platforms(registrytest.ImageSpec{Seed: 81, Layers: []int64{100 << 10}}, false)
	reg.Put("team/several", img, "v1")
	name := testRegistry + "/team/several:v1"
	fault := reg.Inject(registrytest.Match{Kind: registrytest.Blob, Repository: "team/several"}, registrytest.StallAfter(100))
	a := start(t, c, unhurried)
	last := make(chan WarmEvent, 1)
	go func() { last <- a.pin(t, name)[name] }()
	<-fault.Held()
	puller := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client, Platform: "linux/amd64"}
	for i := range 8 {
		repo := fmt.Sprintf("team/other%d", i)
		reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 90 + uint64(i), Layers: []int64{400 << 10}}), "v1")
		if _, err := puller.Pull(t.Context(), Image{testRegistry, repo, "v1"}); err != nil {
			t.Error(err)
		}
	}
	fault.Remove()
	if e := <-last; e.Error != "" {
		t.Error(e.Error)
	}
	a.reaches(t, name, PinHeld)
}

// TestPinsOverALimitThatShrank are kept, said to be too much, and fail no pull.
func TestPinsOverALimitThatShrank(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	c.Cache.Pins = []string{pinnedName}
	a := start(t, c, atOnce)
	a.reaches(t, pinnedName, PinHeld)
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	c.Cache.MaxBytes = cache.Bytes(100 << 10)
	a = start(t, c, atOnce)
	if s := a.Status().Pins; !strings.Contains(s.Problem, "unpin images or raise it") || !a.holds(img) {
		t.Errorf("%+v", s)
	}
	reg.Put("team/other", registrytest.OCIImage(registrytest.ImageSpec{Seed: 91, Layers: []int64{400 << 10}}), "v1")
	puller := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client, Platform: "linux/amd64"}
	if _, err := puller.Pull(t.Context(), Image{testRegistry, "team/other", "v1"}); err != nil {
		t.Error(err)
	}
	a.pull(t)
	if !a.holds(img) {
		t.Error("the pin was evicted")
	}
}

// TestPinsHeal: a blob that the scrub deletes, and a directory that somebody deleted,
// come again by themselves.
func TestPinsHeal(t *testing.T) {
	c := testConfig(t)
	_, img := startRegistry(t, &c)
	c.Cache.Pins, c.Cache.ScrubInterval = []string{pinnedName}, 200*time.Millisecond
	a := start(t, c, atOnce)
	a.reaches(t, pinnedName, PinHeld)
	layer := img.Layers[0].Digest
	file := filepath.Join(c.Cache.Dir, "blobs", "sha256", layer.Encoded())
	body, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	wrong := slices.Clone(body)
	wrong[1000] ^= 1
	if err := errors.Join(os.Chmod(file, 0o644), os.WriteFile(file, wrong, 0o644)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "scrubbed and fetched again", func() error {
		if now, err := os.ReadFile(file); err != nil || !slices.Equal(now, body) {
			return errors.Join(errors.New("the bytes are wrong"), err)
		}
		return nil
	})
	a.reaches(t, pinnedName, PinHeld)
	if err := a.cache.Remove(layer); err != nil {
		t.Fatal(err)
	}
	if p := a.pinOf(t, pinnedName); p.State != PinFetching || p.Present >= p.Bytes {
		t.Errorf("while a blob is gone: %+v", p)
	}
	a.reaches(t, pinnedName, PinHeld)
	if !a.holds(img) {
		t.Error("the blob is still gone")
	}
	if err := os.RemoveAll(c.Cache.Dir); err != nil {
		t.Fatal(err)
	}
	if err := a.again(t, pinnedName); err != nil {
		t.Fatal(err)
	}
	if !a.holds(img) {
		t.Error("the directory is still empty")
	}
	eventually(t, "remembered in the new metadata", func() error {
		if len(a.cache.Meta().PinnedImages()) == 0 {
			return errors.New("not yet")
		}
		return nil
	})
}

// TestPinOfManyPartsHeals: the parts that it holds already are not counted a second time.
func TestPinOfManyPartsHeals(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	layers := make([]int64, maxPinnedParts/2)
	for i := range layers {
		layers[i] = 8
	}
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 71, Opaque: true, Layers: layers})
	reg.Put("team/app", img, "v1")
	a := start(t, c, unhurried)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	if err := a.cache.Remove(img.Layers[0].Digest); err != nil {
		t.Fatal(err)
	}
	if err := a.again(t, pinnedName); err != nil || !a.holds(img) {
		t.Errorf("%v, held: %v", err, a.holds(img))
	}
}

// TestPinWhileTheRegistryIsAway: it is pinned, comes as soon as the registry does, and
// stays so over a kill in the middle.
func TestPinWhileTheRegistryIsAway(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	reg.Down()
	e := a.pin(t, pinnedName)[pinnedName]
	if !strings.HasPrefix(e.Error, "pinned, and the agent goes on trying: ") {
		t.Errorf("%+v", e)
	}
	if p := a.pinOf(t, pinnedName); p.State != PinMissing || p.Error == "" {
		t.Errorf("%+v", p)
	}
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	if err := reg.Up(); err != nil {
		t.Fatal(err)
	}
	half := reg.Inject(registrytest.Match{Reference: img.Layers[0].Digest.String(), Method: "GET"}, registrytest.StallAfter(100<<10))
	a = start(t, c, atOnce)
	<-half.Held()
	eventually(t, "half there", func() error {
		if p := a.pinOf(t, pinnedName); p.State != PinFetching || p.Digest != img.Digest || p.Present == 0 || p.Present >= p.Bytes {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	half.Remove()
	a = start(t, c, atOnce)
	a.reaches(t, pinnedName, PinHeld)
}

// TestPinsThatMakeNoSense are refused, say what to do, and leave nothing behind.
func TestPinsThatMakeNoSense(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 0, nil)
	p.lone()
	a := p.nodes[0]
	arm := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{10}})
	arm.Platform.Architecture = "mips"
	p.reg.Put("open/mips", registrytest.Index(arm), "v1")
	p.reg.Put("open/empty", registrytest.Index(), "v1")
	for name, want := range map[string]string{
		testRegistry + "/open/gone:v1":  "404",
		testRegistry + "/open/mips:v1":  "no manifest for",
		testRegistry + "/open/empty:v1": "the image is empty",
		testRegistry + "/team/a:v1":     `give the node credentials of its own (auth = "node")`,
	} {
		e := a.pin(t, name)[name]
		if !strings.HasPrefix(e.Error, "not pinned: ") || !strings.Contains(e.Error, want) {
			t.Errorf("%s: %+v, want %q", name, e, want)
		}
	}
	if pins := a.Pins(); len(pins.Pins) != 0 || a.cache.Stats().Pinned != 0 {
		t.Errorf("left: %+v", pins)
	}
	for body, want := range map[string]int{`{"images":["UPPER"]}`: 400, `[`: 400} {
		if code, _ := a.admin(t, "POST", "/api/v1/pins", body, "Content-Type", "application/json"); code != want {
			t.Errorf("%s: %d", body, code)
		}
	}
	for _, header := range [][]string{{"Content-Type", "text/plain"}, {"Content-Type", "application/json", "Origin", "http://evil.example"}, {"Content-Type", "application/json", "Host", "evil.example"}} {
		if code, _ := a.admin(t, "POST", "/api/v1/pins", `{"images":["a"]}`, header...); code != 415 && code != 403 {
			t.Errorf("%v: %d", header, code)
		}
		if code, _ := a.admin(t, "DELETE", "/api/v1/pins?image=a", "", header[2:]...); len(header) > 2 && code != 403 {
			t.Errorf("DELETE %v: %d", header, code)
		}
	}
	if code, _ := a.admin(t, "DELETE", "/api/v1/pins", ""); code != 400 {
		t.Errorf("DELETE of nothing: %d", code)
	}
}

// TestPrivateConfiguredPin says what is wrong until the node has credentials.
func TestPrivateConfiguredPin(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 0, func(c *Config) { c.Cache.Pins = []string{testRegistry + "/" + repoA + ":v1"} })
	p.lone(atOnce)
	got := p.nodes[0].reaches(t, testRegistry+"/"+repoA+":v1", PinMissing)
	if !strings.Contains(got.Error, `auth = "node"`) {
		t.Errorf("%+v", got)
	}
	if code, body := p.nodes[0].unpin(t, testRegistry+"/"+repoA+":v1"); code != 409 || !strings.Contains(body, "cache.pins") {
		t.Errorf("%d %s", code, body)
	}
	s := p.nodes[0].Status().Pins
	if s.Images != 1 || s.States[PinMissing] != 1 || len(s.Trouble) != 1 {
		t.Errorf("%+v", s)
	}
	if _, metrics := p.nodes[0].admin(t, "GET", "/metrics", ""); !strings.Contains(metrics, `larder_pins{state="missing"} 1`) || !strings.Contains(metrics, "larder_pinned_bytes 0") {
		t.Error("the metrics do not say so")
	}
}

// TestForeignPin: in a cluster of several architectures a pinned image need not be for all.
// A node that it is not for has nothing missing, until a version of it is for that node.
func TestForeignPin(t *testing.T) {
	p := newPrivate(t, registrytest.NoAuth, 0, func(c *Config) { c.Cache.Pins = []string{testRegistry + "/" + repoA + ":other"} })
	other := registrytest.OCIImage(registrytest.ImageSpec{Seed: 5, Layers: []int64{1000}, Platform: ocispec.Platform{OS: "plan9", Architecture: "mips"}})
	p.reg.Put(repoA, registrytest.Index(other), "other")
	p.lone(atOnce)
	got := p.nodes[0].reaches(t, testRegistry+"/"+repoA+":other", PinForeign)
	if !strings.Contains(got.Error, "no manifest for") {
		t.Errorf("%+v", got)
	}
	if s := p.nodes[0].Status().Pins; s.States[PinForeign] != 1 || s.States[PinMissing] != 0 || len(s.Trouble) != 0 {
		t.Errorf("%+v", s)
	}
	p.reg.Put(repoA, registrytest.Platforms(registrytest.ImageSpec{Seed: 6, Layers: []int64{1000}}, false), "other")
	if err := p.nodes[0].again(t, testRegistry+"/"+repoA+":other"); err != nil {
		t.Fatal(err)
	}
	p.nodes[0].reaches(t, testRegistry+"/"+repoA+":other", PinHeld)
}

// TestTooManyPins holds the bound, for commands and in a configuration.
func TestTooManyPins(t *testing.T) {
	c := testConfig(t)
	for i := range cache.MaxPins {
		c.Cache.Pins = append(c.Cache.Pins, fmt.Sprintf("registry.example.test/app%d:v1", i))
	}
	c.Registries = []upstream.Registry{{Host: "registry.example.test", ContactUpstream: new(false)}}
	a := start(t, c)
	code, body := a.admin(t, "POST", "/api/v1/pins", `{"images":["registry.example.test/one-more"]}`, "Content-Type", "application/json")
	if code != 409 || !strings.Contains(body, "no more than 1000") || len(a.Pins().Pins) != cache.MaxPins {
		t.Errorf("%d %s", code, body)
	}
	code, _ = a.admin(t, "POST", "/api/v1/pins", `{"images":["registry.example.test/app0:v1","registry.example.test/one-more"]}`, "Content-Type", "application/json")
	if p := a.pinOf(t, "registry.example.test/app0:v1"); code != 409 || p.Source != "config" {
		t.Errorf("%d, and of a command that pinned nothing: %+v", code, p)
	}
	if s := a.Status().Pins; len(s.Trouble) > maxShownPins {
		t.Errorf("%d pins in a status", len(s.Trouble))
	}
	c.Cache.Pins = append(c.Cache.Pins, "registry.example.test/one-more", "registry.example.test/app1:v1", "UPPER")
	err := c.Validate()
	for _, want := range []string{"at most 1000", "is listed twice", "want an image as pods name it"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
}

// TestUnpinInTheMiddle ends the fetch and leaves nothing pinned.
func TestUnpinInTheMiddle(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	fault := reg.Inject(registrytest.Match{Reference: img.Layers[0].Digest.String(), Method: "GET"}, registrytest.StallAfter(1000))
	a := start(t, c)
	last := make(chan WarmEvent, 1)
	go func() { last <- a.pin(t, pinnedName)[pinnedName] }()
	<-fault.Held()
	if code, body := a.unpin(t, pinnedName); code != 200 {
		t.Fatalf("%d %s", code, body)
	}
	select {
	case e := <-last:
		if e.Error != errUnpinned.Error() {
			t.Errorf("%+v", e)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the fetch goes on")
	}
	fault.Remove()
	a.settle(t)
	a.pins.mu.Lock()
	defer a.pins.mu.Unlock()
	if len(a.pins.parts) != 0 || len(a.pins.images) != 0 || a.cache.Stats().Pinned != 0 {
		t.Errorf("left: %d parts, %d bytes", len(a.pins.parts), a.cache.Stats().Pinned)
	}
}

// TestUnpinAtTheEnd: an image that is unpinned once all of it is here does not come back with
// the next start.
func TestUnpinAtTheEnd(t *testing.T) {
	c := testConfig(t)
	_, img := startRegistry(t, &c)
	a := start(t, c, unhurried)
	image, err := ParseImage(pinnedName)
	if err != nil {
		t.Fatal(err)
	}
	pinned, err := a.pins.addAll([]Image{image})
	if err != nil {
		t.Fatal(err)
	}
	p := pinned[0].pin
	if err := a.pins.claim(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	err = a.pins.lookAfter(t.Context(), p, func(puller *Puller) {
		left := atomic.Int64{}
		left.Store(int64(1 + len(img.Blobs)))
		puller.Done = func(Pulled) {
			if left.Add(-1) > 0 {
				return
			}
			a.settle(t)
			if err := a.pins.remove([]Image{image}); err != nil {
				t.Error(err)
			}
		}
	})
	if !errors.Is(err, errUnpinned) {
		t.Errorf("%v, want %v", err, errUnpinned)
	}
	if err := a.pins.sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if stored := a.cache.Meta().PinnedImages(); len(stored) != 0 || a.cache.Stats().Pinned != 0 {
		t.Errorf("left: %v, %d bytes", stored, a.cache.Stats().Pinned)
	}
}

// TestPinsOfACluster: what all nodes pin costs the registry one copy, and what one of
// them loses after the registry has deleted it comes from the others.
func TestPinsOfACluster(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{3 << 20, 5 << 10}})
	reg.Put("team/app", img, "v1")
	next := clusterConfigs(t, upstream.Registry{Host: testRegistry, Upstreams: []string{reg.URL()}})
	nodes := startCluster(t, 4, func() Config {
		c := next()
		c.Cache.Pins, c.Upstream.TagTTL = []string{pinnedName}, 0
		return c
	})
	for _, n := range nodes { // as when the delay of all is over
		n.pins.mu.Lock()
		for _, p := range n.pins.images {
			p.due = time.Now()
		}
		n.pins.wake()
		n.pins.mu.Unlock()
	}
	for _, n := range nodes {
		n.reaches(t, pinnedName, PinHeld)
	}
	for d := range img.Blobs {
		if n := reg.Count(registrytest.Match{Reference: d.String(), Method: "GET"}); n > 2 {
			t.Errorf("%d requests for %s", n, d)
		}
	}
	for _, m := range []string{"v1", img.Digest.String()} {
		reg.Delete("team/app", m)
	}
	for d := range img.Blobs {
		reg.Delete("team/app", d.String())
	}
	last := nodes[3]
	if err := last.cache.Remove(img.Layers[0].Digest); err != nil {
		t.Fatal(err)
	}
	eventually(t, "whole again", func() error {
		if !last.holds(img) {
			return fmt.Errorf("%+v", last.pinOf(t, pinnedName))
		}
		return nil
	})
	if p := last.reaches(t, pinnedName, PinStale); p.Present != p.Bytes {
		t.Errorf("%+v", p)
	}
	if got := sources(last.pull(t)); got["upstream"]+got["peer"] != 0 {
		t.Errorf("pulled from %v", got)
	}
}

// TestPinCopiesWhatTheRuntimeHas: containerd deletes what its own images need no more.
// Its blobs are copied, without the registry, and served when it has them no longer. What
// the cache loses comes from there again, also when the registry refuses the image.
func TestPinCopiesWhatTheRuntimeHas(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL = 0
	reg, img := startRegistry(t, &c)
	c.Runtime.ContentDir = t.TempDir()
	blobs := filepath.Join(c.Runtime.ContentDir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(d digest.Digest, body []byte) {
		if err := os.WriteFile(filepath.Join(blobs, d.Encoded()), body, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	write(img.Digest, img.Manifests[0].Data)
	for d, content := range img.Blobs {
		body := make([]byte, content.Size())
		if _, err := content.ReadAt(body, 0); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		write(d, body)
	}
	a := start(t, c)
	eventually(t, "containerd's store is known", func() error {
		if n := a.Status().Runtime.Blobs; n != len(img.Blobs)+1 {
			return fmt.Errorf("%d blobs", n)
		}
		return nil
	})
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	if n := reg.Count(registrytest.Match{Method: "GET"}); n != 0 || !a.holds(img) {
		t.Errorf("%d requests for what containerd has; held %v", n, a.holds(img))
	}
	fault := reg.Inject(registrytest.Match{}, registrytest.Status(401))
	if err := errors.Join(a.cache.Remove(img.Layers[0].Digest), a.cache.Remove(img.Digest)); err != nil {
		t.Fatal(err)
	}
	if err := a.again(t, pinnedName); err == nil || !a.holds(img) {
		t.Errorf("refused, and lost: %v, held %v", err, a.holds(img))
	}
	fault.Remove()
	if err := os.RemoveAll(blobs); err != nil {
		t.Fatal(err)
	}
	reg.Down()
	eventually(t, "containerd's store is empty", func() error {
		if n := a.Status().Runtime.Blobs; n != 0 {
			return fmt.Errorf("%d blobs", n)
		}
		return nil
	})
	if got := sources(a.pull(t)); got["runtime"]+got["upstream"] != 0 {
		t.Errorf("pulled from %v", got)
	}
}

// TestPinsOfARegistryThatIsNeverAsked stand for what is known here: that is how content
// that was brought by hand is pinned. Told so, an agent serves what a registry refuses.
func TestPinsOfARegistryThatIsNeverAsked(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL = 0
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	newer := registrytest.OCIImage(registrytest.ImageSpec{Seed: 71, Layers: []int64{100}})
	reg.Put("team/app", newer, "v1")
	a.pull(t) // which is known by its tag now, and not pinned
	a.settle(t)
	reg.Inject(registrytest.Match{}, registrytest.Status(401))
	if err := a.again(t, pinnedName); err == nil {
		t.Fatal("not refused")
	}
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	c.Registries = []upstream.Registry{{Host: testRegistry, ContactUpstream: new(false)}}
	a = start(t, c, atOnce)
	eventually(t, "what is known last is held", func() error {
		if p := a.pinOf(t, pinnedName); p.State != PinHeld || p.Digest != newer.Digest {
			return fmt.Errorf("%+v, not %s", p, newer.Digest)
		}
		return nil
	})
	a.pull(t)
	if a.holds(img) || !a.holds(newer) {
		t.Error("the old version is still pinned, or the new one is not")
	}
}

// TestPinOnAFullDisk is refused before a byte is fetched, and fetched when there is room.
func TestPinOnAFullDisk(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	c.Cache.MinFree = cache.Percent(99.999)
	c.Cache.Pins = []string{pinnedName}
	a := start(t, c, atOnce)
	if p := a.reaches(t, pinnedName, PinMissing); !strings.Contains(p.Error, "the disk has room for 0 B") {
		t.Errorf("%+v", p)
	}
	if n := reg.Count(registrytest.Match{Kind: registrytest.Blob, Method: "GET"}); n != 0 || a.cache.Stats().Pinned != 0 {
		t.Errorf("%d blobs were fetched, %d bytes are pinned", n, a.cache.Stats().Pinned)
	}
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	c.Cache.MinFree = cache.Bytes(0)
	a = start(t, c, atOnce)
	a.reaches(t, pinnedName, PinHeld)
}

// fetchInVain has a pin looked after with a disk that is full as soon as the manifest is
// here: nothing else of the image is kept.
func (r *running) fetchInVain(t *testing.T, name string) {
	t.Helper()
	images, err := parseImages([]string{name})
	if err != nil {
		t.Fatal(err)
	}
	pinned, err := r.pins.addAll(images)
	if err != nil {
		t.Fatal(err)
	}
	p := pinned[0].pin
	if err := r.pins.claim(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	err = r.pins.lookAfter(t.Context(), p, func(puller *Puller) {
		plan := puller.Choose
		puller.Choose = func(parts []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
			_, err := plan(parts)
			return nil, err
		}
	})
	if _, ok := errors.AsType[*notKeptError](err); !ok {
		t.Fatalf("fetched in vain: %v", err)
	}
}

// leaveRoom lets a fill that does not end before the agent does take all but n bytes of what
// there is room for.
func (r *running) leaveRoom(t *testing.T, n int64) {
	t.Helper()
	room, err := r.cache.Room()
	if err != nil {
		t.Fatal(err)
	}
	reader, err := r.cache.Open(t.Context(), digest.FromString("a large blob"), cache.SourceFunc(func(ctx context.Context, f *cache.Fill) error {
		if err := f.SetSize(room - n); err != nil {
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reader.Close() })
}

// TestPinThatWasNotKept: of an image that was pulled while the disk was full, nothing is said
// to be held before it is, and all of it is once a pod's pull has brought what was lacking.
func TestPinThatWasNotKept(t *testing.T) {
	for _, older := range []bool{false, true} {
		for _, freed := range []bool{false, true} {
			t.Run(fmt.Sprintf("older %v, freed %v", older, freed), func(t *testing.T) {
				t.Parallel()
				pinThatWasNotKept(t, older, freed)
			})
		}
	}
}

func pinThatWasNotKept(t *testing.T, older, freed bool) {
	c := testConfig(t)
	c.Upstream.TagTTL = 0
	c.Cache.MaxBytes = cache.Bytes(4 << 20)
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	want := img
	if older {
		if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
			t.Fatal(e.Error)
		}
		want = registrytest.OCIImage(registrytest.ImageSpec{Seed: 74, Layers: []int64{350 << 10}})
		reg.Put("team/app", want, "v1")
	}
	a.fetchInVain(t, pinnedName)
	if freed {
		a.pull(t)
		a.settle(t)
		if err := a.again(t, pinnedName); err != nil {
			t.Errorf("all is here: %v", err)
		}
		if p := a.pinOf(t, pinnedName); p.State != PinHeld || p.Digest != want.Digest || !a.holds(want) {
			t.Errorf("all is here: %+v, held %v", p, a.holds(want))
		}
		return
	}
	a.leaveRoom(t, 100<<10)
	for range 2 {
		err := a.again(t, pinnedName)
		if err == nil || !strings.Contains(err.Error(), "the disk has room for") {
			t.Errorf("no room: %v", err)
		}
		if p := a.pinOf(t, pinnedName); (p.State == PinStale) != older || (p.State == PinMissing) == older {
			t.Errorf("no room: %+v", p)
		}
	}
	if older && !a.holds(img) {
		t.Error("the former version was let go")
	}
}

// TestLostWhileLookedAfter: a part that vanishes while somebody looks after the pin is
// looked for at once, and not when the next look is due.
func TestLostWhileLookedAfter(t *testing.T) {
	c := testConfig(t)
	_, img := startRegistry(t, &c)
	a := start(t, c)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	a.pins.mu.Lock()
	p := a.pins.images[pinnedName]
	a.pins.mu.Unlock()
	if err := a.pins.claim(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if err := a.cache.Remove(img.Layers[0].Digest); err != nil {
		t.Fatal(err)
	}
	a.pins.mu.Lock()
	a.pins.note(p, nil, false) // as if all had been well before
	soon := time.Until(p.due) < 2*pinHeal
	p.stop = nil
	close(p.idle)
	a.pins.wake()
	a.pins.mu.Unlock()
	if !soon {
		t.Errorf("the next look is due at %v", p.due)
	}
	eventually(t, "whole again", func() error {
		if !a.holds(img) {
			return errors.New("not yet")
		}
		return nil
	})
}

// TestPinnedForTheNode: a private image that the node's own credentials open is pinned
// with them, and given to the node's pods after the registry has deleted it, also after
// a restart; until it refuses the node.
func TestPinnedForTheNode(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "HUSH"}}})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{300 << 10}})
	reg.Put("team/app", img, "v1")
	c := testConfig(t)
	c.Upstream.TagTTL = 0
	file := filepath.Join(t.TempDir(), "config.json")
	replace(t, file, `{"auths":{"`+testRegistry+`":{"username":"ann","password":"HUSH"}}}`)
	c.Registries = []upstream.Registry{{Host: testRegistry, Upstreams: []string{reg.URL()}, Auth: "node", CredentialsFile: file}}
	a := start(t, c)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	reg.Delete("team/app", "v1")
	reg.Delete("team/app", img.Digest.String())
	for d := range img.Blobs {
		reg.Delete("team/app", d.String())
	}
	for range 2 {
		if got := sources(a.pull(t)); got["upstream"] != 0 {
			t.Errorf("pulled from %v", got)
		}
		if err := a.stop(t); err != nil {
			t.Fatal(err)
		}
		a = start(t, c)
	}
	fault := reg.Inject(registrytest.Match{}, registrytest.Status(403))
	puller := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client, Platform: "linux/amd64"}
	for _, when := range []string{"refused", "not found again"} {
		if _, err := puller.Pull(t.Context(), testImage); err == nil {
			t.Errorf("%s: served to a node that was refused", when)
		}
		fault.Remove()
	}
}

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/peer"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// forget runs POST /api/v1/forget.
func (r *running) forget(t *testing.T, dry bool, names ...string) ForgetReport {
	t.Helper()
	code, answer := r.tryForget(t, dry, names...)
	var report ForgetReport
	if err := json.Unmarshal([]byte(answer), &report); code != http.StatusOK || err != nil || len(report.Images) != len(names) || report.DryRun != dry {
		t.Fatalf("%d %s, %v", code, answer, err)
	}
	return report
}

func (r *running) tryForget(t *testing.T, dry bool, names ...string) (code int, answer string) {
	t.Helper()
	body, err := json.Marshal(ForgetRequest{Images: names, DryRun: dry})
	if err != nil {
		t.Fatal(err)
	}
	return r.admin(t, "POST", "/api/v1/forget", string(body), "Content-Type", "application/json")
}

// pullAll pulls a tag of the test repository, for all platforms.
func (r *running) pullAll(t *testing.T, tag string) {
	t.Helper()
	image := testImage
	image.Reference = tag
	if _, err := (Puller{Proxy: "http://" + r.ProxyAddr(), Client: r.client, Platform: "all"}).Pull(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	r.settle(t)
}

// has counts the blobs of an image that are here.
func (r *running) has(img *registrytest.Image) (n int) {
	for _, here := range holding([]*running{r}, img) {
		n += here
	}
	return n
}

func blobsOf(img *registrytest.Image) int { return len(img.Manifests) + len(img.Blobs) }

func nameOf(d digest.Digest) string { return testRegistry + "/team/app@" + d.String() }

// TestForget: what no other image needs goes, with the tag, and comes again when it is
// pulled; a dry run says the same and removes nothing.
func TestForget(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL = 0
	reg, amd := startRegistry(t, &c)
	arm := registrytest.OCIImage(registrytest.ImageSpec{Seed: 8, Layers: []int64{20 << 10}})
	img := registrytest.Index(amd, arm)
	reg.Put("team/app", img, "v1")
	other := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{300 << 10}})
	shared := other.Layers[0]
	reg.Put("team/app", other, "v2")
	a := start(t, c)
	for _, tag := range []string{"v1", "v2"} {
		a.pullAll(t, tag)
	}
	if amd.Layers[0].Digest != shared.Digest {
		t.Fatal("the images do not share a layer")
	}
	want := Forgotten{Image: pinnedName, Digest: img.Digest, Blobs: blobsOf(img) - 1, Bytes: imageSize(img) - shared.Size, Kept: 1, KeptBytes: shared.Size}
	for _, dry := range []bool{true, false} {
		before := a.cache.Stats()
		got := a.forget(t, dry, pinnedName).Images[0]
		if got.Digest != want.Digest || got.Blobs != want.Blobs || got.Bytes != want.Bytes || got.Kept != want.Kept || got.KeptBytes != want.KeptBytes ||
			!slices.Equal(got.KeptBy, []string{testRegistry + "/team/app:v2"}) || len(got.Parts) != want.Blobs || got.Runtime != 0 {
			t.Errorf("dry %v: %+v, want %+v", dry, got, want)
		}
		if after := a.cache.Stats(); dry && (after.Blobs != before.Blobs || after.Bytes != before.Bytes) {
			t.Errorf("a dry run left %+v of %+v", after, before)
		}
	}
	if n := a.has(img); n != 1 || !a.cache.Has(shared.Digest) || a.has(other) != blobsOf(other) {
		t.Errorf("%d blobs of it are left, %d of the other image", n, a.has(other))
	}
	reg.Down()
	a = a.restart(t)
	unknown := statusOf(a.pulls(t, "v3"))
	for _, ref := range []string{"v1", img.Digest.String(), amd.Digest.String()} {
		if err := a.pulls(t, ref); statusOf(err) != unknown || unknown < 500 {
			t.Errorf("%s: %v, an unknown image: %d", ref, err, unknown)
		}
	}
	if _, err := a.Explain(testImage, ""); !errors.Is(err, errUnknownImage) {
		t.Errorf("explained: %v", err)
	}
	if err := a.pulls(t, "v2"); err != nil {
		t.Errorf("the other image: %v", err)
	}
	if got := a.forget(t, false, pinnedName).Images[0]; got.Digest != "" || got.Blobs != 0 || got.Kept != 0 {
		t.Errorf("forgotten again: %+v", got)
	}
	if err := reg.Up(); err != nil {
		t.Fatal(err)
	}
	a = a.restart(t) // it would not ask the registry for some seconds
	if a.pullAll(t, "v1"); a.has(img) != blobsOf(img) {
		t.Errorf("pulled again: %d blobs of %d are here", a.has(img), blobsOf(img))
	}
}

// TestForgetMisspelled: a request that says something else than what is known removes nothing.
func TestForgetMisspelled(t *testing.T) {
	c := testConfig(t)
	_, img := startRegistry(t, &c)
	a := start(t, c)
	a.pullAll(t, "v1")
	code, answer := a.admin(t, "POST", "/api/v1/forget", fmt.Sprintf(`{"images": [%q], "dryRun": true}`, pinnedName), "Content-Type", "application/json")
	if code != http.StatusBadRequest || !strings.Contains(answer, "dryRun") || a.has(img) != blobsOf(img) {
		t.Errorf("%d %s, %d blobs are left", code, answer, a.has(img))
	}
}

// TestForgetByName: what else stands for an image or lists it keeps it, except tags of the
// repository if its digest is named; signatures go with it.
func TestForgetByName(t *testing.T) {
	for name, tc := range map[string]struct {
		names  []string // of the image
		keeper string   // another name of it
		left   bool
	}{
		"one of two tags":        {[]string{pinnedName}, "team/app:latest", true},
		"the other is signed":    {[]string{testRegistry + "/team/app:latest"}, "team/app:v1", true},
		"both":                   {[]string{pinnedName, testRegistry + "/team/app:latest"}, "", false},
		"digest":                 {[]string{"digest"}, "", false},
		"digest, and other repo": {[]string{"digest"}, "team/copy:v1", true},
		"both repositories":      {[]string{testRegistry + "/team/copy:v1", pinnedName, testRegistry + "/team/app:latest"}, "", false},
		"a listed image":         {[]string{"digest", pinnedName}, "team/app:index", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := testConfig(t)
			reg, img := startRegistry(t, &c)
			signature := registrytest.Artifact(img.Descriptor, "application/vnd.example.signature", 1)
			reg.Put("team/app", img, "latest")
			reg.Put("team/app", signature, "sha256-"+img.Digest.Encoded()+".sig")
			reg.Put("team/app", registrytest.Index(img), "index")
			reg.Put("team/copy", img, "v1")
			a := start(t, c)
			images := []string{pinnedName, testRegistry + "/team/app:latest", testRegistry + "/team/app:sha256-" + img.Digest.Encoded() + ".sig"}
			if strings.Contains(tc.keeper, "copy") || strings.Contains(tc.keeper, "index") {
				images = append(images, testRegistry+"/"+tc.keeper)
			}
			if tc.names[0] == testRegistry+"/team/copy:v1" {
				images = append(images, tc.names[0])
			}
			for _, name := range images {
				image, err := ParseImage(name)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := (Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client, Platform: "all"}).Pull(t.Context(), image); err != nil {
					t.Fatal(err)
				}
			}
			a.settle(t)
			names := slices.Clone(tc.names)
			if names[0] == "digest" {
				names[0] = nameOf(img.Digest)
			}
			got := a.forget(t, false, names...).Images[0]
			image, sig := a.has(img), a.has(signature)
			if tc.left && (image != blobsOf(img) || sig != blobsOf(signature) || !slices.Contains(got.KeptBy, testRegistry+"/"+tc.keeper)) || !tc.left && image+sig > 0 {
				t.Errorf("%d blobs and %d of the signature are here: %+v", image, sig, got)
			}
			place := testImage.place()
			known := a.proxy.TagDigests(place, "v1")
			sigKnown := a.proxy.TagDigests(place, "sha256-"+img.Digest.Encoded()+".sig")
			if gone := !slices.Contains(tc.names, testRegistry+"/team/app:latest") || len(tc.names) > 1; gone == (len(known) > 0) || tc.left == (len(sigKnown) == 0) {
				t.Errorf("the tag stands for %v, that of the signature for %v", known, sigKnown)
			}
		})
	}
}

// TestForgetPinned: all of the images or none, until they are unpinned.
func TestForgetPinned(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	other := registrytest.OCIImage(registrytest.ImageSpec{Seed: 9, Layers: []int64{1000}})
	reg.Put("team/app", other, "v2")
	kept := registrytest.OCIImage(registrytest.ImageSpec{Seed: 10, Layers: []int64{1000}})
	reg.Put("team/app", kept, "v3")
	c.Cache.Pins = []string{testRegistry + "/team/app:v3"}
	a := start(t, c, atOnce)
	a.pullAll(t, "v2")
	a.reaches(t, testRegistry+"/team/app:v3", PinHeld)
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	v2 := testRegistry + "/team/app:v2"
	for name, want := range map[string]string{
		pinnedName:                    pinnedName + " is pinned: `larder unpin " + pinnedName + "` first",
		nameOf(img.Digest):            pinnedName + " is pinned: `larder unpin " + pinnedName + "` first",
		testRegistry + "/team/app:v3": "take it out there",
	} {
		if code, answer := a.tryForget(t, false, v2, name); code != http.StatusConflict || !strings.Contains(answer, want) || a.has(other) != blobsOf(other) {
			t.Errorf("%s: %d %s, %d blobs of the other image left", name, code, answer, a.has(other))
		}
	}
	if code, answer := a.unpin(t, pinnedName); code != http.StatusOK {
		t.Fatalf("%d %s", code, answer)
	}
	if a.forget(t, false, v2, pinnedName); a.has(img)+a.has(other) > 0 || !a.holds(kept) {
		t.Errorf("%d and %d blobs left, the pin is held: %v", a.has(img), a.has(other), a.holds(kept))
	}
}

// TestForgetInterrupted: wherever it ends, it can be taken up again, by the tag.
func TestForgetInterrupted(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	index := registrytest.Index(img)
	reg.Put("team/app", index, "v1")
	for _, stop := range []digest.Digest{img.Layers[1].Digest, img.Layers[0].Digest, img.Digest, index.Digest} {
		a := start(t, c)
		a.pullAll(t, "v1")
		path := filepath.Join(c.Cache.Dir, "blobs", "sha256", stop.Encoded())
		aside := filepath.Join(t.TempDir(), "blob")
		if err := errors.Join(os.Rename(path, aside), os.MkdirAll(filepath.Join(path, "x"), 0o755)); err != nil { // which cannot be unlinked
			t.Fatal(err)
		}
		if code, answer := a.tryForget(t, false, pinnedName); code != http.StatusInternalServerError || !strings.Contains(answer, "run it again") {
			t.Errorf("%s: %d %s", stop, code, answer)
		}
		if err := errors.Join(a.stop(t), os.RemoveAll(path), os.Rename(aside, path)); err != nil {
			t.Fatal(err)
		}
		a = start(t, c)
		if left := a.has(index); left == 0 {
			t.Fatalf("%s: nothing is left", stop)
		}
		if got := a.forget(t, false, pinnedName).Images[0]; got.Blobs == 0 || a.has(index) > 0 {
			t.Errorf("%s: %+v, %d blobs left", stop, got, a.has(index))
		}
		if known := a.proxy.TagDigests(testImage.place(), "v1"); len(known) > 0 {
			t.Errorf("%s: the tag stands for %v", stop, known)
		}
		if err := a.stop(t); err != nil {
			t.Fatal(err)
		}
	}
}

// TestForgetWhatIsPulled: a client that reads a blob gets the rest of it, and one that is on
// its way is refused.
func TestForgetWhatIsPulled(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 11, Layers: []int64{16 << 20}, Opaque: true})
	reg.Put("team/app", img, "v1")
	a := start(t, c)
	layer := img.Layers[0].Digest
	fault := reg.Inject(registrytest.Match{Reference: layer.String()}, registrytest.StallAfter(1000))
	pulled := make(chan error, 1)
	go func() { _, err := a.readBlob(layer); pulled <- err }()
	if err := a.pullManifest("*/*"); err != nil {
		t.Fatal(err)
	}
	<-fault.Held()
	if err := a.cache.Settled(t.Context(), img.Digest); err != nil {
		t.Fatal(err)
	}
	if code, answer := a.tryForget(t, false, pinnedName); code != http.StatusConflict || !strings.Contains(answer, pinnedName+" is being fetched: try again") || !a.cache.Has(img.Digest) {
		t.Errorf("on its way: %d %s", code, answer)
	}
	fault.Release()
	if err := <-pulled; err != nil {
		t.Error(err)
	}
	a.settle(t)
	resp, err := a.client.Get("http://" + a.ProxyAddr() + "/v2/" + testImage.Repository + "/blobs/" + layer.String() + "?ns=" + testImage.Registry)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	v := layer.Verifier()
	_, first := io.CopyN(v, resp.Body, 1000)
	if got := a.forget(t, false, pinnedName).Images[0]; got.Blobs != 2 || a.has(img) > 0 {
		t.Errorf("%+v", got)
	}
	if _, err := io.Copy(v, resp.Body); err != nil || first != nil || !v.Verified() {
		t.Errorf("%v, %v, verified %v", first, err, v.Verified())
	}
}

// pullManifest pulls that of testImage alone, for a client that accepts a type.
func (r *running) pullManifest(accept string) error {
	req, err := http.NewRequest(http.MethodGet, "http://"+r.ProxyAddr()+"/v2/"+testImage.Repository+"/manifests/v1?ns="+testImage.Registry, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", accept)
	resp, err := r.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %w", resp.Status, err)
	}
	return nil
}

// TestForgetInRuntime: what containerd has is counted, and stays.
func TestForgetInRuntime(t *testing.T) {
	c := testConfig(t)
	c.Runtime.ContentDir = t.TempDir()
	_, img := startRegistry(t, &c)
	a := start(t, c)
	a.pullAll(t, "v1")
	blobs := filepath.Join(c.Runtime.ContentDir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []digest.Digest{img.Digest, img.Layers[0].Digest} { // containerd's may be all that is left of the manifest
		body, err := os.ReadFile(filepath.Join(c.Cache.Dir, "blobs", "sha256", d.Encoded()))
		if err = errors.Join(err, os.WriteFile(filepath.Join(blobs, d.Encoded()), body, 0o444)); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.cache.Remove(img.Digest); err != nil {
		t.Fatal(err)
	}
	if got := a.forget(t, false, pinnedName).Images[0]; got.Runtime != 2 || got.Blobs != len(img.Blobs) || a.has(img) > 0 || !a.inRuntime(img.Digest) {
		t.Errorf("%+v, %d blobs left", got, a.has(img))
	}
}

// TestForgottenReplicas: a node that forgot an image gets no copy of it from one that has
// not, and offers none itself; a pull brings it back. What the other names as parts is
// forgotten here, where no manifest lists it.
func TestForgottenReplicas(t *testing.T) {
	reg, img, nodes := replicated(t, 2, 2)
	first, second := nodes[0], nodes[1]
	first.pullAll(t, "v1")
	layer := img.Layers[0]
	blob := peer.Copy{Want: peer.Want{Digest: layer.Digest, Size: layer.Size, Registry: testImage.Registry, Repository: testImage.Repository}}
	tag := peer.Copy{Want: peer.Want{Registry: testImage.Registry, Repository: testImage.Repository}, Tag: "v1",
		Stands: peer.Descriptor{MediaType: img.MediaType, Digest: img.Digest, Size: img.Size}}
	eventually(t, "told of", func() error {
		if !second.swarm.Holds(layer.Digest) {
			return errors.New("nobody holds it")
		}
		return nil
	})
	if err := second.replicas.keep(t.Context(), blob); err != nil || !second.cache.Has(layer.Digest) {
		t.Fatalf("kept: %v", err)
	}
	if err := second.cache.Remove(img.Digest); err != nil { // it may be home
		t.Fatal(err)
	}
	parts := first.forget(t, true, pinnedName).Images[0].Parts
	if len(parts) != blobsOf(img) || !slices.Contains(parts, nameOf(layer.Digest)) {
		t.Fatalf("parts: %v", parts)
	}
	second.forget(t, false, append(parts, pinnedName)...)
	if n := second.has(img); n > 0 {
		t.Errorf("%d blobs are left", n)
	}
	moved, renamed := tag, tag
	moved.Stands.Digest, renamed.Tag = digest.FromString("another image"), "latest"
	uploaded := first.Status().Uploaded
	for _, c := range []peer.Copy{blob, tag, moved, renamed} {
		if err := second.replicas.keep(t.Context(), c); !errors.Is(err, errForgotten) {
			t.Errorf("a copy of %s: %v", c.Entry(), err)
		}
	}
	if n := first.Status().Uploaded - uploaded; n > 0 {
		t.Errorf("%d bytes of a copy came", n)
	}
	r := newReplicas(first.Agent, time.Minute)
	eventually(t, "withdrawn", func() error {
		if len(r.find(time.Now())) != blobsOf(img)+1 {
			return fmt.Errorf("%v", r.find(time.Now()))
		}
		return nil
	})
	first.cache.Meta().SetForgotten(layer.Digest)
	if _, offered := r.find(time.Now())[layer.Digest]; offered {
		t.Error("a copy of what was forgotten is offered")
	}
	if second.pullAll(t, "v1"); second.has(img) != blobsOf(img) {
		t.Errorf("pulled again: %d blobs", second.has(img))
	}
	if err := second.replicas.keep(t.Context(), blob); err != nil {
		t.Errorf("asked to keep what it has: %v", err)
	}
	if n := reg.Count(registrytest.Match{Kind: registrytest.Blob, Reference: layer.Digest.String()}); n != 1 {
		t.Errorf("the layer was asked for %d times", n)
	}
}

// TestForgottenWhileItCame: a copy that was on its way is not kept.
func TestForgottenWhileItCame(t *testing.T) {
	_, img, nodes := replicated(t, 2, 2)
	nodes[0].pullAll(t, "v1")
	layer := img.Layers[0]
	blob := peer.Copy{Want: peer.Want{Digest: layer.Digest, Size: layer.Size, Registry: testImage.Registry, Repository: testImage.Repository}}
	eventually(t, "told of", func() error {
		if !nodes[1].swarm.Holds(layer.Digest) {
			return errors.New("nobody holds it")
		}
		return nil
	})
	if err := nodes[1].cache.Remove(layer.Digest); err != nil {
		t.Fatal(err)
	}
	nodes[1].cache.Meta().SetForgotten(layer.Digest)
	if err := nodes[1].replicas.fetch(t.Context(), blob); !errors.Is(err, errForgotten) || nodes[1].cache.Has(layer.Digest) {
		t.Errorf("%v, here: %v", err, nodes[1].cache.Has(layer.Digest))
	}
}

// TestTagForgottenWhileItCame: nor is a tag, about which the registry was being asked.
func TestTagForgottenWhileItCame(t *testing.T) {
	reg, img, nodes := replicated(t, 2, 2)
	reg.Put("team/other", img, "v1") // of which nobody knows who may read it
	fault := reg.Inject(registrytest.Match{Repository: "team/other"}, registrytest.Hold())
	c := peer.Copy{Want: peer.Want{Registry: testRegistry, Repository: "team/other"}, Tag: "v1",
		Stands: peer.Descriptor{MediaType: img.MediaType, Digest: img.Digest, Size: img.Size}}
	kept := make(chan error, 1)
	go func() { kept <- nodes[1].replicas.keep(t.Context(), c) }()
	<-fault.Held()
	nodes[1].forget(t, false, testRegistry+"/team/other:v1")
	fault.Remove()
	place := cache.Repository{Registry: testRegistry, Name: "team/other"}
	if err := <-kept; !errors.Is(err, errForgotten) || len(nodes[1].proxy.TagDigests(place, "v1")) > 0 {
		t.Errorf("%v, the tag stands for %v", err, nodes[1].proxy.TagDigests(place, "v1"))
	}
}

// TestForgetNames: an old image without a tag is named so that it can be forgotten too.
func TestForgetNames(t *testing.T) {
	c := testConfig(t)
	c.Upstream.TagTTL = 0
	reg, old := startRegistry(t, &c)
	a := start(t, c)
	a.pullAll(t, "v1")
	newer := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{300 << 10}})
	reg.Put("team/app", newer, "v1")
	a.pullAll(t, "v1")
	got := a.forget(t, false, pinnedName).Images[0]
	if got.Kept != 1 || !slices.Equal(got.KeptBy, []string{nameOf(old.Digest)}) {
		t.Errorf("%+v", got)
	}
	if got = a.forget(t, false, got.KeptBy...).Images[0]; got.Blobs != blobsOf(old) || a.cache.Stats().Blobs != 0 {
		t.Errorf("%+v, %d blobs left", got, a.cache.Stats().Blobs)
	}
}

// TestForgetWithoutLists: a tag is found that only clients that accept no lists asked for.
func TestForgetWithoutLists(t *testing.T) {
	c := testConfig(t)
	_, img := startRegistry(t, &c)
	a := start(t, c)
	if err := a.pullManifest(ocispec.MediaTypeImageManifest); err != nil {
		t.Fatal(err)
	}
	a.settle(t)
	if got := a.forget(t, false, pinnedName).Images[0]; got.Digest != img.Digest || got.Blobs != 1 || len(a.proxy.TagDigests(testImage.place(), "v1")) > 0 {
		t.Errorf("%+v", got)
	}
}

// TestForgetWhileImporting: what an import has put so far stays.
func TestForgetWhileImporting(t *testing.T) {
	c := testConfig(t)
	_, img := startRegistry(t, &c)
	a := start(t, c)
	a.pullAll(t, "v1")
	a.cache.Pin(img.Layers[0].Digest)
	got := a.forget(t, false, pinnedName).Images[0]
	if got.Kept != 1 || !a.cache.Has(img.Layers[0].Digest) || !slices.Equal(got.KeptBy, []string{"what is pinned or being imported"}) {
		t.Errorf("%+v", got)
	}
	var left []digest.Digest
	a.cache.Walk(func(i cache.Info) bool {
		left = append(left, i.Digest)
		return true
	})
	if len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

// TestForgetOrImport: an import finds a layer here only if that stays. Else its image would be
// reported whole, and lack what a forget that had begun before took away.
func TestForgetOrImport(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	slow := registrytest.OCIImage(registrytest.ImageSpec{Seed: 9, Layers: []int64{1000}})
	reg.Put("team/app", slow, "v2")
	a := start(t, c)
	a.pullAll(t, "v1")
	a.pullAll(t, "v2")
	manifest := filepath.Join(c.Cache.Dir, "blobs", "sha256", slow.Digest.Encoded())
	if err := errors.Join(os.Remove(manifest), syscall.Mkfifo(manifest, 0o400)); err != nil { // to open it takes until it is written
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := a.Forget(t.Context(), []Image{testImage}, false)
		done <- err
	}()
	eventually(t, "under way", func() error {
		w, err := os.OpenFile(manifest, os.O_WRONLY|syscall.O_NONBLOCK, 0)
		if err != nil { // nobody reads yet
			return err
		}
		defer w.Close()
		if len(a.importing) == 0 {
			t.Error("an import could begin while images are forgotten")
		}
		return os.Remove(manifest)
	})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	a.importing <- struct{}{}
	defer func() { <-a.importing }()
	if code, answer := a.tryForget(t, false, pinnedName); code != http.StatusConflict || !strings.Contains(answer, "an import, or another forget, is under way") {
		t.Errorf("%d %s", code, answer)
	}
	if got := a.forget(t, true, pinnedName).Images[0]; got.Blobs != 0 || a.has(img) > 0 {
		t.Errorf("%+v", got)
	}
}

package agent

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/archive"
	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
)

// bundle is an archive of one image under a name.
func bundle(t *testing.T, name string, img *registrytest.Image) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := archive.NewWriter(&out, []archive.Root{{Name: name, Descriptor: img.Descriptor}})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range img.Manifests {
		if err := w.Blob(m.Digest, m.Size, bytes.NewReader(m.Data)); err != nil {
			t.Fatal(err)
		}
	}
	for d, c := range img.Blobs {
		if err := w.Blob(d, c.Size(), io.NewSectionReader(c, 0, c.Size())); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestPinWhileAnImportRuns: what an import keeps from eviction until its end is no pin, and
// takes no room that is left to pins.
func TestPinWhileAnImportRuns(t *testing.T) {
	c := testConfig(t)
	c.Cache.MaxBytes = cache.Bytes(2 << 20)
	_, img := startRegistry(t, &c)
	a := start(t, c)
	in := newImporter(t.Context(), a.Agent, "", a.newEventStream(httptest.NewRecorder()), -1)
	defer in.close()
	body := bytes.Repeat([]byte("x"), 1650<<10)
	if err := in.Put(digest.FromBytes(body), int64(len(body)), bytes.NewReader(body)); err != nil {
		t.Fatal(err)
	}
	if pins := a.Pins(); pins.Problem != "" || pins.Bytes != 0 {
		t.Errorf("nothing is pinned: %+v", pins)
	}
	if e := a.pin(t, pinnedName)[pinnedName]; e.Error != "" {
		t.Fatal(e.Error)
	}
	if pins := a.Pins(); pins.Problem != "" || pins.Bytes != imageSize(img) {
		t.Errorf("one image of %d bytes is pinned: %+v", imageSize(img), pins)
	}
	if _, metrics := a.admin(t, "GET", "/metrics", ""); !strings.Contains(metrics, fmt.Sprintf("larder_pinned_bytes %d\n", imageSize(img))) {
		t.Error("the metrics do not say so")
	}
}

// importTar has the agent import an archive, and returns what it said of images, and how
// it ended.
func (r *running) importTar(t *testing.T, body io.Reader, name string) (images []ImportedImage, failed string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+r.AdminAddr()+"/api/v1/import?name="+url.QueryEscape(name), body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", tarType)
	req.Header.Set("Expect", "100-continue")
	client := &http.Client{Transport: &http.Transport{ExpectContinueTimeout: time.Minute}}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return nil, resp.Status + ": " + string(text)
	}
	for dec := json.NewDecoder(resp.Body); ; {
		var e ImportEvent
		if err := dec.Decode(&e); err != nil {
			t.Fatalf("the answer ends without an end: %v", err)
		}
		if e.Image != nil {
			images = append(images, *e.Image)
		}
		if e.Done {
			return images, e.Error
		}
	}
}

// mustImport imports one image.
func (r *running) mustImport(t *testing.T, name string, img *registrytest.Image) ImportedImage {
	t.Helper()
	images, failed := r.importTar(t, bytes.NewReader(bundle(t, name, img)), "")
	if failed != "" || len(images) != 1 || images[0].Error != "" {
		t.Fatalf("import: %v, %s", images, failed)
	}
	return images[0]
}

// pullRef pulls as a runtime does, every platform.
func (r *running) pullRef(t *testing.T, ref string) error {
	t.Helper()
	image, err := ParseImage(ref)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Puller{Proxy: "http://" + r.ProxyAddr(), Client: r.client, Platform: "all"}.Pull(t.Context(), image)
	return err
}

// mustPull pulls until what gossip brings has come.
func (r *running) mustPull(t *testing.T, ref string) {
	t.Helper()
	eventually(t, "pulled by "+r.config.Peer.Name, func() error { return r.pullRef(t, ref) })
}

// TestAirGap: what one node imported, every node pulls by its name, by tag and by digest,
// with every client and under every rule for outages; after restarts too, and when the
// node that imported is gone.
func TestAirGap(t *testing.T) {
	for _, mode := range []string{"", "remembered", "none"} {
		t.Run("offline="+mode, func(t *testing.T) {
			t.Parallel()
			img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 60, Layers: []int64{1 << 20, 5 << 10}})
			next := clusterConfigs(t, upstream.Registry{Host: testRegistry, ContactUpstream: new(false), Offline: mode})
			nodes := startCluster(t, 4, next)
			tag, byDigest := testRegistry+"/team/app:v1", testRegistry+"/team/app@"+img.Digest.String()
			got := nodes[0].mustImport(t, tag, img)
			if got.Name != tag || got.Digest != img.Digest || got.Blobs != 4 || got.There != 0 || got.Bytes < 1<<20 {
				t.Errorf("%+v", got)
			}
			if again := nodes[0].mustImport(t, tag, img); again.There != 4 || again.BytesThere != got.Bytes {
				t.Errorf("once more: %+v", again)
			}
			nodes[1].mustPull(t, tag)
			nodes[2].mustPull(t, byDigest)
			if err := nodes[3].pullByPath(t, img); err != nil {
				t.Errorf("path-encoded: %v", err)
			}
			nodes[0].config.Peer.Join = []string{nodes[1].config.Peer.Gossip} // the first had nobody to join
			nodes[0] = nodes[0].restart(t)
			nodes[2] = nodes[2].restart(t)
			for _, n := range []*running{nodes[0], nodes[2]} {
				n.awaitMembers(t, 4)
				n.mustPull(t, tag)
				n.mustPull(t, byDigest)
			}
			if err := nodes[0].stop(t); err != nil {
				t.Fatal(err)
			}
			c := next()
			c.Peer.Join = []string{nodes[1].config.Peer.Gossip}
			late := start(t, c)
			late.awaitMembers(t, 4)
			late.mustPull(t, tag)
			late.mustPull(t, byDigest)
		})
	}
}

// restart ends the agent and starts another on its directory.
func (r *running) restart(t *testing.T) *running {
	t.Helper()
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	return start(t, r.config, unhurried)
}

// pullByPath asks as CRI-O and podman do, which fail for good after the manifest.
func (r *running) pullByPath(t *testing.T, img *registrytest.Image) error {
	get := func(path string) error {
		resp, err := r.client.Get("http://" + r.ProxyAddr() + "/v2/" + testRegistry + "/team/app/" + path)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if _, err = io.Copy(io.Discard, resp.Body); err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", path, resp.Status)
		}
		return err
	}
	eventually(t, "promised", func() error { return get("manifests/v1") })
	for d := range img.Blobs {
		if err := get("blobs/" + d.String()); err != nil {
			return err
		}
	}
	return nil
}

// TestImportOpensNothingElse: in a repository of which one image was imported, that one
// is everybody's while the registry is down, and the other is not; and once the registry
// has refused somebody, neither is (A4).
func TestImportOpensNothingElse(t *testing.T) {
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		t.Run(string(scheme), func(t *testing.T) {
			t.Parallel()
			p := newPrivate(t, scheme, 3, nil)
			p.pull(0, ann, repoA) // v1, which stays private
			p.pull(1, ann, repoA)
			img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 61, Layers: []int64{1 << 20, 5 << 10}, Opaque: true})
			p.reg.Put(repoA, img, "v2")
			p.reg.Down()
			ref := testRegistry + "/" + repoA + ":v2"
			p.nodes[0].mustImport(t, ref, img)
			for _, n := range p.nodes {
				n.mustPull(t, ref)
			}
			for i := range p.nodes {
				for _, q := range content(repoA, p.images[repoA]) {
					for _, who := range []caller{nobody, guesser} {
						if r := p.ask(p.at(i), q, who.auth(p, repoA)); r.ok() {
							t.Errorf("node %d: %s of what was not imported for %s: %v", i, q.name, who.name, r)
						}
					}
				}
				if err := p.nodes[i].pullRef(t, testRegistry+"/"+repoB+"@"+img.Digest.String()); err == nil {
					t.Errorf("node %d: served in another repository", i)
				}
			}
			if err := p.reg.Up(); err != nil {
				t.Fatal(err)
			}
			for i, n := range p.nodes {
				eventually(t, "refused while the registry answers", func() error {
					if err := n.pullRef(t, ref); err == nil || !strings.Contains(err.Error(), "401") {
						return fmt.Errorf("node %d: %s", i, fmt.Sprint(err))
					}
					return nil
				})
			}
			p.reg.Down()
			// All are restarted: what they remember of a refusal in memory ends soon.
			for _, n := range p.nodes {
				if err := n.stop(t); err != nil {
					t.Fatal(err)
				}
			}
			for i, n := range p.nodes {
				p.nodes[i] = start(t, n.config)
			}
			for i, n := range p.nodes {
				n.awaitMembers(t, len(p.nodes))
				if err := n.pullRef(t, ref); err == nil {
					t.Errorf("node %d: served after the registry refused", i)
				}
			}
		})
	}
}

// TestImportAgain: a tag that comes again with other content is the new one where it was
// imported, for good, although other nodes know the old one.
func TestImportAgain(t *testing.T) {
	next := clusterConfigs(t, upstream.Registry{Host: testRegistry, ContactUpstream: new(false), Offline: "remembered"})
	nodes := startCluster(t, 3, func() Config {
		c := next()
		c.Upstream.TagTTL = 0 // others are asked each time
		return c
	})
	for _, repo := range []string{"team/a", "team/b", "team/c", "team/d"} { // of which other nodes are the homes
		ref := testRegistry + "/" + repo + ":v1"
		var img *registrytest.Image
		for _, seed := range []uint64{65, 66} {
			img = registrytest.OCIImage(registrytest.ImageSpec{Seed: seed, Layers: []int64{10 << 10}})
			nodes[0].mustImport(t, ref, img)
			for range 3 {
				nodes[0].mustPull(t, ref)
				nodes[0].sameAs(t, repo, img.Descriptor)
			}
			nodes[1].mustPull(t, ref)
			nodes[2].mustPull(t, ref)
		}
		nodes[1].mustImport(t, ref, img)
		nodes[1].sameAs(t, repo, img.Descriptor)
	}
}

// TestRegistryHasTheWord: an imported tag is what the registry says, as soon as it says.
func TestRegistryHasTheWord(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	old := registrytest.OCIImage(registrytest.ImageSpec{Seed: 62, Layers: []int64{10 << 10}})
	a.mustImport(t, testImage.String(), old)
	reg.Down()
	if parts := a.pull(t); parts[0].Digest != old.Digest {
		t.Errorf("down: %s, want the imported %s", parts[0].Digest, old.Digest)
	}
	if err := reg.Up(); err != nil {
		t.Fatal(err)
	}
	puller := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client}
	eventually(t, "what the registry says", func() error {
		parts, err := puller.Pull(t.Context(), testImage)
		if err == nil && parts[0].Digest != img.Digest {
			err = fmt.Errorf("%s", parts[0].Digest)
		}
		return err
	})
}

// TestExportThenImport: what is exported from one cluster and imported into another is
// the same, byte for byte, and twice the same archive.
func TestExportThenImport(t *testing.T) {
	var registries Config
	reg, _ := startRegistry(t, &registries)
	platforms := []*registrytest.Image{}
	for i, arch := range []string{"amd64", "arm64"} {
		platforms = append(platforms, registrytest.OCIImage(registrytest.ImageSpec{Seed: uint64(70 + i), Layers: []int64{200 << 10, 3 << 10},
			Platform: ocispec.Platform{OS: "linux", Architecture: arch}}))
	}
	index := registrytest.Index(platforms...)
	docker := registrytest.DockerImage(registrytest.ImageSpec{Seed: 70, Layers: []int64{200 << 10}})
	reg.Put("team/multi", index, "v1")
	reg.Put("team/docker", docker, "v1")
	connected := testConfig(t)
	connected.Registries = registries.Registries
	from := start(t, connected)
	images := []Image{{testRegistry, "team/multi", "v1"}, {testRegistry, "team/docker", "v1"}, {testRegistry, "team/app", "v1"}}
	for platform, parts := range map[string]int{"all": 2, "linux/arm64": 1} {
		t.Run(platform, func(t *testing.T) {
			var first, second bytes.Buffer
			for _, out := range []*bytes.Buffer{&first, &second} {
				p := Puller{Proxy: "http://" + from.ProxyAddr(), Client: from.client, Platform: platform}
				if err := p.Export(t.Context(), images, out); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(first.Bytes(), second.Bytes()) {
				t.Error("two exports differ")
			}
			apart := testConfig(t)
			apart.Registries = []upstream.Registry{{Host: testRegistry, ContactUpstream: new(false)}}
			to := start(t, apart)
			got, failed := to.importTar(t, &first, "")
			if failed != "" || len(got) != len(images) {
				t.Fatalf("%v, %s", got, failed)
			}
			if len(got[0].Missing) != 2-parts {
				t.Errorf("missing: %v", got[0].Missing)
			}
			to.sameAs(t, "team/multi", index.Descriptor)
			to.sameAs(t, "team/docker", docker.Descriptor)
			for _, image := range images {
				if _, err := (Puller{Proxy: "http://" + to.ProxyAddr(), Client: to.client, Platform: platform}).Pull(t.Context(), image); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// sameAs compares the manifest that a tag gives with the registry's.
func (r *running) sameAs(t *testing.T, repo string, want ocispec.Descriptor) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+r.ProxyAddr()+"/v2/"+repo+"/manifests/v1?ns="+testRegistry, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "*/*")
	resp, err := r.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || digest.FromBytes(body) != want.Digest || resp.Header.Get("Content-Type") != want.MediaType {
		t.Errorf("%s: %s, %s, %v; want %s of type %s", repo, resp.Status, resp.Header.Get("Content-Type"), err, want.Digest, want.MediaType)
	}
}

// TestImportRefusals: what cannot be imported is refused for a reason that helps, and
// leaves nothing behind.
func TestImportRefusals(t *testing.T) {
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 63, Layers: []int64{300 << 10, 200 << 10}, Opaque: true})
	good := bundle(t, testImage.String(), img)
	for name, tc := range map[string]struct {
		body   io.Reader
		rename string
		change func(*Config)
		want   []string
	}{
		"denied": {bytes.NewReader(good), "", func(c *Config) {
			c.Registries = []upstream.Registry{{Host: testRegistry, Deny: []string{"team/**"}}}
		}, []string{"denied", "registry.example.test/team/app:v1"}},
		"not allowed under another name": {bytes.NewReader(good), "quay.io/other/app:v1", func(c *Config) {
			c.Registries = []upstream.Registry{{Host: "quay.io", Allow: []string{"org/*"}}}
		}, []string{"denied", "quay.io/other/app:v1"}},
		"larger than the cache": {bytes.NewReader(good), "", func(c *Config) { c.Cache.MaxBytes = cache.Bytes(400 << 10) },
			[]string{"507", SizeText(int64(len(good))), "400.0 KiB", "cache.max_bytes"}},
		"larger than the cache, unknown before": {io.MultiReader(bytes.NewReader(good)), "", func(c *Config) { c.Cache.MaxBytes = cache.Bytes(400 << 10) },
			[]string{"no room", "needed", "400.0 KiB", "cache.max_bytes"}},
		"cut off":             {bytes.NewReader(good[:200<<10]), "", nil, []string{"EOF"}},
		"nothing":             {bytes.NewReader(nil), "", nil, []string{"nothing in it"}},
		"damaged":             {bytes.NewReader(flip(good)), "", nil, []string{"blobs/sha256/", "damaged"}},
		"no tar":              {strings.NewReader(strings.Repeat("no tar ", 1000)), "", nil, []string{"no tar"}},
		"no name":             {bytes.NewReader(bundle(t, "v1", img)), "", nil, []string{"not an image name", "v1"}},
		"another digest":      {bytes.NewReader(good), testRegistry + "/team/app@" + digest.FromString("x").String(), nil, []string{"1 of 1 images"}},
		"a name that is none": {bytes.NewReader(good), "a b", nil, []string{"400", "not an image name"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := testConfig(t)
			c.Registries = []upstream.Registry{{Host: testRegistry, ContactUpstream: new(false)}}
			if tc.change != nil {
				tc.change(&c)
			}
			a := start(t, c)
			images, failed := a.importTar(t, tc.body, tc.rename)
			if name == "no name" { // "v1" alone would be docker.io/library/v1
				if failed != "" || images[0].Name != "docker.io/library/v1:latest" {
					t.Errorf("%v %s", images, failed)
				}
				return
			}
			for _, w := range tc.want {
				if !strings.Contains(failed, w) {
					t.Errorf("%q does not say %q", failed, w)
				}
			}
			eventually(t, "as before", func() error {
				if s := a.cache.Stats(); s.Blobs+s.Fills != 0 || s.Bytes != 0 {
					return fmt.Errorf("%+v", s)
				}
				return nil
			})
			if err := a.pullRef(t, testImage.String()); err == nil {
				t.Error("the tag is known")
			}
		})
	}
}

// TestImportEndsWithItsClient: whoever hangs up once all of an archive is read has nothing
// more done for him.
func TestImportEndsWithItsClient(t *testing.T) {
	a := start(t, testConfig(t))
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 64, Layers: []int64{1000}})
	ctx, hangUp := context.WithCancel(t.Context())
	defer hangUp()
	in := newImporter(ctx, a.Agent, "", a.newEventStream(httptest.NewRecorder()), -1)
	body := bundle(t, testImage.String(), img)
	if _, err := archive.Read(bytes.NewReader(body), in); err != nil {
		t.Fatal(err)
	}
	hangUp()
	if _, err := in.Get(img.Digest); !errors.Is(err, context.Canceled) {
		t.Errorf("a manifest is read back: %v", err)
	}
	in.close()
	// With the last of what is told of the archive's content.
	ctx, hangUp = context.WithCancel(t.Context())
	defer hangUp()
	out := &hangsUp{ResponseRecorder: httptest.NewRecorder(), after: len(img.Manifests) + len(img.Blobs), end: hangUp}
	if err := newImporter(ctx, a.Agent, "", a.newEventStream(out), -1).run(bytes.NewReader(body)); !errors.Is(err, context.Canceled) {
		t.Errorf("images are adopted: %v", err)
	}
	if out.after != 0 {
		t.Errorf("%d blobs were not told of", out.after)
	}
	if s := a.cache.Stats(); s.Blobs != 0 {
		t.Errorf("left in the cache: %+v", s)
	}
}

// hangsUp calls end when it was told of so many whole blobs.
type hangsUp struct {
	*httptest.ResponseRecorder
	after int
	end   func()
}

func (h *hangsUp) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte(`"whole":true`)) {
		if h.after--; h.after == 0 {
			h.end()
		}
	}
	return len(p), nil
}

// TestImportMakesRoom: an archive of the older docker kind needs room beside the cache for a
// layer, and gets what the cache can give up.
func TestImportMakesRoom(t *testing.T) {
	c := testConfig(t)
	c.Cache.Dir = t.TempDir()
	if err := syscall.Mount("tmpfs", c.Cache.Dir, "tmpfs", 0, "size=64m"); err != nil {
		if os.Getenv("CI") == "true" && os.Getuid() == 0 {
			t.Fatalf("mount: %v", err)
		}
		t.Skipf("mounting needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(c.Cache.Dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	c.Registries = []upstream.Registry{{Host: testRegistry, ContactUpstream: new(false)}}
	c.Cache.MaxBytes, c.Cache.MinFree = cache.Percent(100), cache.Bytes(16<<20)
	a := start(t, c)
	for i := range 5 { // 24 MiB are left
		body := bytes.Repeat([]byte{byte(i)}, 8<<20)
		if err := a.cache.PutFile(t.Context(), digest.FromBytes(body), cache.Origin{Kind: cache.FromUpstream}, io.NewSectionReader(bytes.NewReader(body), 0, int64(len(body)))); err != nil {
			t.Fatal(err)
		}
	}
	layer := bytes.Repeat([]byte("layer"), 12<<20/5)
	config := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[%q]}}`, digest.FromBytes(layer))
	list := fmt.Appendf(nil, `[{"Config":"c.json","RepoTags":[%q],"Layers":["l/layer.tar"]}]`, testImage.String())
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, file := range []struct {
		name string
		body []byte
	}{{"l/layer.tar", layer}, {"c.json", config}, {"manifest.json", list}} {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: file.name, Size: int64(len(file.body)), Mode: 0o644})
		if err == nil {
			_, err = w.Write(file.body)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if images, failed := a.importTar(t, &out, ""); failed != "" {
		t.Fatalf("%+v: %s", images, failed)
	}
	if err := a.pullRef(t, testImage.String()); err != nil {
		t.Error(err)
	}
}

// flip changes a byte of the last blob.
func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)-10<<10]++
	return b
}

// TestImportIsNoForm: a web page cannot send one.
func TestImportIsNoForm(t *testing.T) {
	a := start(t, testConfig(t))
	for header, want := range map[[2]string]int{
		{"Content-Type", "text/plain"}:          http.StatusUnsupportedMediaType,
		{"Content-Type", "multipart/form-data"}: http.StatusUnsupportedMediaType,
		{"Content-Type", ""}:                    http.StatusUnsupportedMediaType,
		{"Origin", "http://evil.example"}:       http.StatusForbidden,
		{"Host", "evil.example"}:                http.StatusForbidden,
	} {
		if code, body := a.admin(t, "POST", "/api/v1/import", "x", header[0], header[1]); code != want {
			t.Errorf("%v: %d %s, want %d", header, code, body, want)
		}
	}
}

// TestImportDuringAFetch: an import completes a fetch of the same blob that gets nowhere,
// and who waits for it is served.
func TestImportDuringAFetch(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	layer := img.Layers[0].Digest
	stuck := reg.Inject(registrytest.Match{Kind: registrytest.Blob, Reference: layer.String()}, registrytest.StallAfter(100_000))
	a := start(t, c)
	if resp, err := a.client.Get("http://" + a.ProxyAddr() + "/v2/team/app/manifests/v1?ns=" + testRegistry); err != nil {
		t.Fatal(err)
	} else {
		resp.Body.Close()
	}
	got := make(chan error, 1)
	go func() {
		_, err := a.readBlob(layer)
		got <- err
	}()
	eventually(t, "fetching", func() error {
		if f := a.cache.Fills(); len(f) == 0 || f[0].Present < 50_000 {
			return fmt.Errorf("%+v", f)
		}
		return nil
	})
	a.mustImport(t, testImage.String(), img)
	select {
	case err := <-got:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(15 * time.Second):
		t.Error("who waited for the blob still waits")
	}
	stuck.Remove()
	stuck.Release()
}

// curt has an agent not wait for long for a client that hangs.
func curt(o *options) { o.patience = 2 * time.Second }

// TestImportOfAClientThatHangs: who stops sending is told so, and others can import.
func TestImportOfAClientThatHangs(t *testing.T) {
	c := testConfig(t)
	c.Registries = []upstream.Registry{{Host: testRegistry, ContactUpstream: new(false)}}
	a := start(t, c, curt)
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 67, Layers: []int64{1 << 20}})
	good := bundle(t, testImage.String(), img)
	hangs, w := io.Pipe()
	defer w.Close()
	go func() { _, _ = w.Write(good[:len(good)/2]) }()
	if _, failed := a.importTar(t, hangs, ""); !strings.Contains(failed, "nothing more of the archive came for 2s") {
		t.Errorf("ended with %q", failed)
	}
	if images, failed := a.importTar(t, bytes.NewReader(good), ""); failed != "" {
		t.Errorf("the next: %v, %s", images, failed)
	}
}

// TestImportWithAnAppendix: what follows the end of a tar is taken too. Else the connection
// would be closed on a client that is still sending, and it could miss the answer.
func TestImportWithAnAppendix(t *testing.T) {
	c := testConfig(t)
	c.Registries = []upstream.Registry{{Host: testRegistry, ContactUpstream: new(false)}}
	a := start(t, c)
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 68, Layers: []int64{1000}})
	body := append(bundle(t, testImage.String(), img), make([]byte, 32<<20)...) // more than sockets take
	conn, err := net.Dial("tcp", a.AdminAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = fmt.Fprintf(conn, "POST /api/v1/import HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", tarType, len(body), body)
	if err != nil {
		t.Fatalf("sending: %v", err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if answer, err := io.ReadAll(resp.Body); err != nil || !bytes.HasSuffix(answer, []byte("{\"done\":true}\n")) {
		t.Errorf("%s, %v", answer, err)
	}
}

// TestClientThatTakesNothing: it holds up what it is told of, a pin or an import, for so
// long and not forever.
func TestClientThatTakesNothing(t *testing.T) {
	done := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(done)
		out := (&Agent{patience: 10 * time.Millisecond}).newEventStream(w)
		out.send(WarmEvent{Error: strings.Repeat("more than sockets take ", 1<<20)})
		<-r.Context().Done()
	}))
	defer server.Close()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-done
}

// TestContainerdPullsWhatWasImported uses containerd's own resolver and fetcher, on the
// node that imported and on another.
func TestContainerdPullsWhatWasImported(t *testing.T) {
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 64, Layers: []int64{1 << 20, 5 << 10}})
	next := clusterConfigs(t, upstream.Registry{Host: testRegistry, ContactUpstream: new(false)})
	nodes := startCluster(t, 2, next)
	nodes[0].mustImport(t, testRegistry+"/team/app:v1", img)
	p := &private{t: t}
	for _, n := range nodes {
		n.mustPull(t, testRegistry+"/team/app:v1") // gossip has told of it
		for _, ref := range []string{testRegistry + "/team/app:v1", testRegistry + "/team/app@" + img.Digest.String()} {
			r, err := p.containerd(n).Pull(t.Context(), ref, nil)
			if err != nil || !slices.ContainsFunc(r.Content, func(d ocispec.Descriptor) bool { return d.Digest == img.Layers[0].Digest }) {
				t.Errorf("%s: %s: %v", n.config.Peer.Name, ref, err)
			}
		}
	}
}

// TestPinWhatWasImported: an import can be pinned while its registry is away, and is
// known to be no more than what was imported.
func TestPinWhatWasImported(t *testing.T) {
	c := testConfig(t)
	reg, _ := startRegistry(t, &c)
	a := start(t, c)
	reg.Down()
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 64, Layers: []int64{1 << 20}})
	a.mustImport(t, pinnedName, img)
	if e := a.pin(t, pinnedName)[pinnedName]; !strings.HasPrefix(e.Error, "pinned, and the agent goes on trying: ") {
		t.Errorf("%+v", e)
	}
	if p := a.pinOf(t, pinnedName); p.State != PinStale || p.Digest != img.Digest || p.Error == "" || !a.holds(img) {
		t.Errorf("%+v, held: %v", p, a.holds(img))
	}
}

// bundleOf is an archive of one image whose digests are of one algorithm.
func bundleOf(t *testing.T, algorithm digest.Algorithm) []byte {
	t.Helper()
	describe := func(mediaType string, body []byte) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mediaType, Digest: algorithm.FromBytes(body), Size: int64(len(body))}
	}
	config, layer := []byte(`{"os":"linux"}`), bytes.Repeat([]byte("layer"), 100_000)
	manifest, err := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest,
		Config: describe(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{describe(ocispec.MediaTypeImageLayer, layer)}})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w, err := archive.NewWriter(&out, []archive.Root{{Name: testImage.String(), Descriptor: describe(ocispec.MediaTypeImageManifest, manifest)}})
	for _, body := range [][]byte{manifest, config, layer} {
		if err == nil {
			err = w.Blob(algorithm.FromBytes(body), int64(len(body)), bytes.NewReader(body))
		}
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestImportAlgorithms: an image is served under the digests that it has, or it is said
// that Larder does not keep such.
func TestImportAlgorithms(t *testing.T) {
	for algorithm, kept := range map[digest.Algorithm]bool{digest.SHA256: true, digest.SHA512: true, digest.SHA384: false} {
		t.Run(string(algorithm), func(t *testing.T) {
			c := testConfig(t)
			c.Registries = []upstream.Registry{{Host: testRegistry, ContactUpstream: new(false)}}
			a := start(t, c)
			images, failed := a.importTar(t, bytes.NewReader(bundleOf(t, algorithm)), "")
			if !kept {
				if !strings.Contains(failed, "sha256 and sha512") {
					t.Errorf("not said: %v, %q", images, failed)
				}
				return
			}
			if failed != "" {
				t.Fatalf("%v, %s", images, failed)
			}
			if err := a.pullRef(t, testImage.String()); err != nil {
				t.Error(err)
			}
		})
	}
}

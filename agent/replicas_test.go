package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/peer"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// impatient makes an agent copy what it alone has after half a second.
func impatient(o *options) { o.look = 250 * time.Millisecond }

// copied waits until an agent finds everything on enough nodes.
func (r *running) copied(t *testing.T) {
	t.Helper()
	eventually(t, "copied", func() error {
		if s := r.Status().Replicas; s.Made == 0 || s.Lacking > 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// holding counts the nodes that have each of the blobs, manifests included.
func holding(nodes []*running, img *registrytest.Image) map[digest.Digest]int {
	count := map[digest.Digest]int{}
	for _, n := range nodes {
		for d := range img.Blobs {
			if n.cache.Has(d) {
				count[d]++
			}
		}
		for _, m := range img.Manifests {
			if n.cache.Has(m.Digest) {
				count[m.Digest]++
			}
		}
	}
	return count
}

// TestReplicas: what one node pulled is on another too, tag and all, and the registry was
// not asked for a byte of it twice. A copy that goes is made again, elsewhere.
func TestReplicas(t *testing.T) {
	reg, img, nodes := replicated(t, 4, 2, impatient)
	first := nodes[0]
	first.pull(t)
	first.settle(t)
	first.copied(t)
	for d, n := range holding(nodes, img) {
		if n < 2 {
			t.Errorf("%d nodes have %s", n, d)
		}
	}
	for d := range img.Blobs {
		if n := reg.Count(registrytest.Match{Kind: registrytest.Blob, Reference: d.String()}); n != 1 {
			t.Errorf("%s was asked for %d times", d, n)
		}
	}
	layer := img.Layers[0].Digest
	for _, n := range nodes[1:] {
		if n.cache.Has(layer) {
			if err := n.cache.Remove(layer); err != nil {
				t.Fatal(err)
			}
		}
	}
	eventually(t, "copied again", func() error {
		if n := holding(nodes, img)[layer]; n < 2 {
			return fmt.Errorf("%d have it", n)
		}
		return nil
	})
	if n := reg.Count(registrytest.Match{Kind: registrytest.Blob, Reference: layer.String()}); n != 1 {
		t.Errorf("the layer was asked for %d times", n)
	}
}

// TestReplicasOfSHA512: nodes do not share what has another digest than SHA-256, so nothing
// of it is missing, and nobody is asked to copy it.
func TestReplicasOfSHA512(t *testing.T) {
	reg, _, nodes := replicated(t, 2, 2)
	content := []byte("a layer")
	layer := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.SHA512.FromBytes(content), Size: int64(len(content))}
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 512})
	img.Blobs[layer.Digest] = registrytest.Bytes(content)
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Manifests[0].Data, &m); err != nil {
		t.Fatal(err)
	}
	m.Layers = []ocispec.Descriptor{layer}
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	img.Digest, img.Size = digest.FromBytes(body), int64(len(body))
	img.Manifests[0].Digest, img.Manifests[0].Size, img.Manifests[0].Data = img.Digest, img.Size, body
	reg.Put(testImage.Repository, img, testImage.Reference)
	nodes[0].pull(t)
	nodes[0].settle(t)
	if !nodes[0].cache.Has(layer.Digest) {
		t.Fatal("the layer is not cached")
	}
	if c, lacks := nodes[0].replicas.find(time.Now())[layer.Digest]; lacks {
		t.Errorf("lacks replicas: %+v", c)
	}
}

// TestReplicasWait: what was used a moment ago is copied when it is seen twice, what is
// older when the node that has it had ten minutes to come back.
func TestReplicasWait(t *testing.T) {
	_, img, nodes := replicated(t, 2, 2)
	r := newReplicas(nodes[0].Agent, time.Minute)
	nodes[0].pull(t)
	nodes[0].settle(t)
	for _, n := range nodes[1:] { // it may be home
		for d := range img.Blobs {
			if err := n.cache.Remove(d); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := nodes[0].cache.Meta().Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	one := peer.Copy{Want: peer.Want{Digest: img.Layers[0].Digest}}
	for old, wait := range map[time.Duration]time.Duration{time.Minute: time.Minute / 2, 2 * replicaFresh: replicaGrace} {
		eventually(t, "alone", func() error {
			if n := nodes[0].swarm.Others(one); n > 0 {
				return fmt.Errorf("%d others", n)
			}
			return nil
		})
		clear(r.lone)
		now := time.Now().Add(old)
		r.look(now)
		for _, at := range []time.Duration{0, wait - time.Second} {
			if due := r.take(now.Add(at)); len(due) > 0 {
				t.Errorf("used %v ago: %d are due after %v", old, len(due), at)
			}
		}
		if due := r.take(now.Add(wait)); len(due) == 0 {
			t.Errorf("used %v ago: nothing is due after %v", old, wait)
		}
	}
}

// replicated is a cluster with an image that nobody has, and a setting of cache.replicas.
func replicated(t *testing.T, nodes, replicas int, opts ...Option) (*registrytest.Server, *registrytest.Image, []*running) {
	t.Helper()
	var c Config
	reg, img := startRegistry(t, &c)
	next := clusterConfigs(t, c.Registries...)
	return reg, img, startCluster(t, nodes, func() Config {
		c := next()
		c.Cache.Replicas = replicas
		return c
	}, opts...)
}

// TestReplicasOfReplicas: what the first node had is on two nodes again after it is gone,
// though nobody else pulled it, and then after another one is.
func TestReplicasOfReplicas(t *testing.T) {
	reg, img, nodes := replicated(t, 5, 2, impatient)
	nodes[0].pull(t)
	nodes[0].settle(t)
	nodes[0].copied(t)
	tag := peer.Copy{Want: peer.Want{Registry: testImage.Registry, Repository: testImage.Repository}, Tag: testImage.Reference}
	for lost := range 2 {
		if err := nodes[lost].stop(t); err != nil {
			t.Fatal(err)
		}
		left := nodes[lost+1:]
		eventually(t, "on two nodes again", func() error {
			for d, n := range holding(left, img) {
				if n < 2 {
					return fmt.Errorf("%d lost: %d nodes have %s", lost+1, n, d)
				}
			}
			if len(holding(left, img)) < len(img.Blobs)+1 {
				return fmt.Errorf("%d lost: %v", lost+1, holding(left, img))
			}
			if n := left[0].swarm.Others(tag); n < 1 {
				return fmt.Errorf("%d others know the tag", n)
			}
			return nil
		})
	}
	reg.Down()
	if _, err := (Puller{Proxy: "http://" + nodes[4].ProxyAddr(), Client: nodes[4].client, Platform: "linux/amd64"}).Pull(t.Context(), testImage); err != nil {
		t.Error(err)
	}
}

// TestReplicaOfATag: what is kept of a tag is what its image was, which others have, and
// not what the registry says now, which nobody has.
func TestReplicaOfATag(t *testing.T) {
	reg, img, nodes := replicated(t, 3, 2)
	nodes[0].pull(t)
	nodes[0].settle(t)
	reg.Put(testImage.Repository, registrytest.OCIImage(registrytest.ImageSpec{Seed: 99, Layers: []int64{10}}), testImage.Reference)
	place := cache.Repository{Registry: testImage.Registry, Name: testImage.Repository}
	known, ok := nodes[0].proxy.KnownTag(place, testImage.Reference)
	if !ok {
		t.Fatal("the tag is not known where it was pulled")
	}
	stands := known.Descriptor
	c := peer.Copy{Want: peer.Want{Registry: place.Registry, Repository: place.Name}, Tag: testImage.Reference,
		Stands: peer.Descriptor{MediaType: stands.MediaType, Digest: stands.Digest, Size: stands.Size}}
	if err := nodes[1].replicas.keep(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if got, _ := nodes[1].proxy.KnownTag(place, testImage.Reference); got.Descriptor.Digest != stands.Digest {
		t.Errorf("kept as %s, want %s of %s", got.Descriptor.Digest, stands.Digest, img.Digest)
	}
}

// TestReplicasAreHeld: a copy of what no other node has is none, and asks the registry for
// not a byte.
func TestReplicasAreHeld(t *testing.T) {
	reg, img, nodes := replicated(t, 2, 2)
	layer := img.Layers[0]
	c := peer.Copy{Want: peer.Want{Digest: layer.Digest, Registry: testImage.Registry, Repository: testImage.Repository, Size: layer.Size}}
	if err := nodes[1].replicas.keep(t.Context(), c); err == nil || nodes[1].cache.Has(layer.Digest) {
		t.Errorf("%v, here: %v", err, nodes[1].cache.Has(layer.Digest))
	}
	if n := reg.Count(registrytest.Match{Kind: registrytest.Blob, Method: "GET"}); n > 0 {
		t.Errorf("the registry was asked %d times", n)
	}
}

// TestPulledReplica: who pulls what is being copied gets all of it, from the registry too,
// when the node that has it dies.
func TestPulledReplica(t *testing.T) {
	var c Config
	reg, _ := startRegistry(t, &c)
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 77, Layers: []int64{6 << 20}, Opaque: true})
	reg.Put(testImage.Repository, img, testImage.Reference)
	next := clusterConfigs(t, c.Registries...)
	nodes := startCluster(t, 2, func() Config {
		c := next()
		c.Peer.MaxUploadBytesPerSecond = 300 << 10
		return c
	})
	holder, keeper, layer := nodes[0], nodes[1], img.Layers[0]
	holder.pull(t)
	holder.settle(t)
	if err := keeper.cache.Remove(layer.Digest); err != nil { // it may be home
		t.Fatal(err)
	}
	eventually(t, "told of", func() error {
		if !keeper.swarm.Holds(layer.Digest) {
			return errors.New("nobody holds it")
		}
		return nil
	})
	reading := func(readers int) {
		t.Helper()
		eventually(t, "under way", func() error {
			if f := keeper.cache.Fills(); len(f) != 1 || f[0].Readers != readers || f[0].Present == 0 {
				return fmt.Errorf("%+v", f)
			}
			return nil
		})
	}
	one := peer.Copy{Want: peer.Want{Digest: layer.Digest, Registry: testImage.Registry, Repository: testImage.Repository, Size: layer.Size}}
	kept, pulled := make(chan error, 1), make(chan error, 1)
	go func() { kept <- keeper.replicas.keep(t.Context(), one) }()
	reading(1)
	go func() {
		n, err := keeper.readBlob(layer.Digest)
		if err == nil && n != layer.Size {
			err = fmt.Errorf("%d bytes", n)
		}
		pulled <- err
	}()
	reading(2)
	if err := holder.stop(t); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(<-pulled, <-kept); err != nil {
		t.Error(err)
	}
}

// asSeen looks as the first node does, after it has pulled an image with ann's credential
// and nobody has asked without one. Nothing else makes copies.
func (p *private) asSeen() *replicas {
	p.t.Helper()
	for _, q := range questions(repoA, p.images[repoA]) {
		p.ask(p.at(0), q, ann.auth(p, repoA))
	}
	p.nodes[0].settle(p.t)
	if err := p.nodes[0].cache.Meta().Sync(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	r := newReplicas(p.nodes[0].Agent, time.Second)
	r.look(time.Now())
	return r
}

// givesUp runs rounds for most of an hour, in which the registry is asked as often as the
// first of them had to, and says so.
func (p *private) givesUp(r *replicas, status string) {
	p.t.Helper()
	begun := time.Now()
	for minute := range 50 {
		p.reg.ResetCounts()
		r.round(p.t.Context(), begun.Add(time.Duration(minute)*time.Minute))
		switch asked := p.reg.Count(registrytest.Match{}); {
		case minute == 0 && asked > 0:
			p.t.Errorf("the registry was asked %d times before anything was due", asked)
		case minute == 1 && (asked == 0 || asked > 2*mostMissing+1): // with the tag; of a blob by HEAD and GET
			p.t.Errorf("the registry was asked %d times", asked)
		case minute > 1 && asked > 0:
			p.t.Errorf("minute %d: the registry was asked %d times more", minute, asked)
		}
	}
	if s := r.status(); s.Lacking == 0 || !strings.Contains(s.Problem, status) {
		p.t.Errorf("%+v", s)
	}
	if r.mayAsk(peer.Copy{Want: peer.Want{Registry: testRegistry, Repository: repoA}, Tag: "another"}) {
		p.t.Error("others would be asked for more of that repository")
	}
}

// TestHiddenReplicas: a registry that hides with 404 what it does not show is left alone
// after a few answers.
func TestHiddenReplicas(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 3, nil)
	r := p.asSeen()
	p.reg.Inject(registrytest.Match{}, registrytest.Status(404), registrytest.EvenUnauthorized())
	p.givesUp(r, "404")
}

// TestReplicasElsewhere: a blob of several repositories is copied though the first of them
// is gone from its registry, or its registry cannot be asked: base layers are in many.
func TestReplicasElsewhere(t *testing.T) {
	for name, elsewhere := range map[string]cache.Repository{
		"gone":        {Registry: testImage.Registry, Name: "aaa/gone"}, // the first, for names are in order
		"unreachable": {Registry: "127.0.0.1:1", Name: "aaa/gone"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, img, nodes := replicated(t, 3, 3)
			nodes[0].pull(t)
			nodes[0].settle(t)
			meta, layer := nodes[0].cache.Meta(), img.Layers[0].Digest
			meta.AddMembers(elsewhere, ocispec.Descriptor{Digest: layer})
			meta.AddGiver(layer, elsewhere.Registry)
			if err := meta.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			r, now := newReplicas(nodes[0].Agent, time.Second), time.Now()
			for range 4 {
				r.look(now)
				now = now.Add(replicaPatience / 2)
				r.round(t.Context(), now)
			}
			if n := holding(nodes, img)[layer]; n < 3 {
				t.Errorf("%d nodes have it: %+v", n, r.status())
			}
		})
	}
}

// TestReplicasOfWhatCameFromNodes: a home that got a manifest from other nodes has it
// copied on as a manifest. Asked for as a blob it is one that the registry has not.
func TestReplicasOfWhatCameFromNodes(t *testing.T) {
	_, img, nodes := replicated(t, 4, 2)
	nodes[0].pull(t)
	nodes[0].settle(t)
	var lacking []*running // one other node brought it in, as its home
	for _, n := range nodes[1:] {
		if !n.cache.Has(img.Digest) {
			lacking = append(lacking, n)
		}
	}
	home := lacking[0]
	want := peer.Want{Digest: img.Digest, Manifest: true, Registry: testImage.Registry, Repository: testImage.Repository}
	if err := (swarmOrigin{home.swarm}).Fill(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	eventually(t, "here", func() error {
		if !home.cache.Has(img.Digest) {
			return errors.New("it is not")
		}
		return nil
	})
	eventually(t, "known for what it is", func() error {
		if _, known := home.cache.Meta().Manifest(img.Digest); !known {
			return errors.New("nobody knows that it is a manifest")
		}
		if !home.cache.Meta().Member(cache.Repository{Registry: want.Registry, Name: want.Repository}, img.Layers[0].Digest) {
			return errors.New("nobody knows where its layers are from")
		}
		return nil
	})
}

// TestNoReplicas: with 1 no node makes any, nor keeps any for others.
func TestNoReplicas(t *testing.T) {
	_, img, nodes := replicated(t, 2, 1, impatient)
	nodes[0].pull(t)
	nodes[0].settle(t)
	c := peer.Copy{Want: peer.Want{Digest: img.Layers[0].Digest, Registry: testImage.Registry, Repository: testImage.Repository}}
	if _, err := nodes[0].swarm.Keep(t.Context(), c, 1); err == nil && !nodes[1].cache.Has(c.Digest) || err != nil && !strings.Contains(err.Error(), errNoReplicas.Error()) {
		t.Errorf("asked to keep a copy: %v", err)
	}
	if s := nodes[0].Status().Replicas; s.Wanted != 1 || s.Made+int64(s.Lacking) != 0 {
		t.Errorf("%+v", s)
	}
}

// TestPrivateReplicas: a copy is no way round a registry. What only a client's credential
// opens is not copied, and the node that has it says so and leaves the registry alone.
func TestPrivateReplicas(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 3, nil)
	r := p.asSeen()
	before := holding(p.nodes, p.images[repoA])
	p.givesUp(r, "401")
	if now := holding(p.nodes, p.images[repoA]); !maps.Equal(now, before) {
		t.Errorf("held by %v nodes, before by %v", now, before)
	}
}

// TestNodesReplicas: what the nodes' own credentials open is copied.
func TestNodesReplicas(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 3, func(c *Config) {
		file := filepath.Join(t.TempDir(), "config.json")
		replace(t, file, `{"auths":{"`+testRegistry+`":{"username":"ann","password":"HUSH-ann"}}}`)
		c.Registries = []upstream.Registry{{Host: testRegistry, Upstreams: c.Registries[0].Upstreams, Auth: "node", CredentialsFile: file}}
	}, impatient)
	p.pull(0, ann, repoA)
	p.nodes[0].copied(t)
	for d, n := range holding(p.nodes, p.images[repoA]) {
		if n < 2 {
			t.Errorf("%d nodes have %s", n, d)
		}
	}
}

// TestKeepRefuses: a node does not take a copy when it has better to do, or no room but
// what was used later.
func TestKeepRefuses(t *testing.T) {
	_, img, nodes := replicated(t, 2, 2)
	nodes[0].pull(t)
	nodes[0].settle(t)
	r := nodes[1].replicas
	c := peer.Copy{Want: peer.Want{Digest: img.Layers[0].Digest, Registry: testImage.Registry, Repository: testImage.Repository, Size: img.Layers[0].Size}}
	huge := c
	huge.Digest, huge.Size = digest.FromString("huge"), 1<<50
	if err := r.keep(t.Context(), huge); !errors.Is(err, cache.ErrNoRoom) {
		t.Errorf("a petabyte: %v", err)
	}
	for range replicaWorkers {
		r.fetching <- struct{}{}
	}
	if err := r.keep(t.Context(), c); !errors.Is(err, peer.ErrBusy) {
		t.Errorf("while busy: %v", err)
	}
	for range replicaWorkers {
		<-r.fetching
	}
	if err := r.keep(t.Context(), c); err != nil || !nodes[1].cache.Has(c.Digest) {
		t.Errorf("at last: %v", err)
	}
}

// TestReplicasInAnOutage: while the registry cannot be asked a node keeps what was public
// for others, and nobody's word opens what is private.
func TestReplicasInAnOutage(t *testing.T) {
	for repo, who := range map[string]caller{repoB: bob, repoC: nobody} {
		t.Run(repo, func(t *testing.T) {
			t.Parallel()
			p := newPrivate(t, registrytest.Basic, 4, nil)
			for _, q := range questions(repo, p.images[repo]) {
				p.ask(p.at(0), q, who.auth(p, repo))
			}
			p.nodes[0].settle(t)
			for d := range p.images[repo].Blobs {
				for _, n := range p.nodes[1:] {
					if !p.nodes[0].cache.Has(d) {
						continue // not among the questions
					}
					eventually(t, "told of", func() error {
						if !n.swarm.Holds(d) && !n.cache.Has(d) {
							return errors.New("nobody else holds it")
						}
						return nil
					})
				}
			}
			p.reg.Down()
			kept := 0
			for d, b := range p.images[repo].Blobs {
				c := peer.Copy{Want: peer.Want{Digest: d, Registry: testRegistry, Repository: repo, Size: b.Size()}}
				for _, n := range p.nodes[1:] {
					if n.cache.Has(d) || !p.nodes[0].cache.Has(d) {
						continue
					}
					err := n.replicas.keep(t.Context(), c)
					if open := repo == repoC; (err == nil) != open || n.cache.Has(d) != open {
						t.Errorf("%s on %s: %v, here: %v", d, n.nodeName(), err, n.cache.Has(d))
					}
					kept++
				}
			}
			if kept == 0 {
				t.Error("every node had all of it; nothing was tested")
			}
		})
	}
}

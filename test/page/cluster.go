package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	registryHost = "registry.example.test"
	hostileHost  = "hostile.example.test"
	nowhereHost  = "nowhere.example.test" // nothing listens there
	// markup is what others put into names and errors. A page that takes it for
	// HTML asks for an image that is not there, and runs a script.
	markup = `<img/src=x/onerror=pwned=1>`
	// hostileDir is the same as the name of a directory.
	hostileDir = `<img src=x onerror=pwned=1>`
	// zoneMarkup is the same in what a zone has room for.
	zoneMarkup = `<i/id=pwned>`
)

// cluster is what the page is looked at on.
type cluster struct {
	dir      string
	registry *registrytest.Server
	hostile  *httptest.Server // a registry that refuses everything; see refuse

	busy, peer, idle *node

	cancel context.CancelFunc // ends the load
	load   sync.WaitGroup
}

// startCluster starts everything; it must be closed whatever the error is.
func startCluster(ctx context.Context, larder, dir string) (*cluster, error) {
	c := &cluster{dir: dir, cancel: func() {}}
	var err error
	if c.registry, err = registrytest.New(registrytest.Options{}); err != nil {
		return c, err
	}
	c.registry.SetRate(0, 6<<20)
	c.hostile = httptest.NewServer(http.HandlerFunc(refuse))
	if err := c.makeNodes(larder); err != nil {
		return c, err
	}
	for _, n := range []*node{c.busy, c.peer, c.idle} {
		if err := n.start(ctx); err != nil {
			return c, err
		}
	}
	return c, c.startLoad(ctx)
}

// refuse says what a tag stands for, and answers the rest with markup; its rate
// limit is nearly used up.
func refuse(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("RateLimit-Limit", "100;w=21600")
	w.Header().Set("RateLimit-Remaining", "7;w=21600")
	if r.Method == http.MethodHead {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Content-Length", "1000")
		w.Header().Set("Docker-Content-Digest", digest.FromString(r.URL.Path).String())
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusForbidden)
	fmt.Fprintf(w, `{"errors": [{"code": "DENIED", "message": %q}]}`, markup)
}

func (c *cluster) makeNodes(larder string) error {
	key := make([]byte, 32)
	rand.Read(key) // never fails
	keyFile := filepath.Join(c.dir, "key")
	hosts := filepath.Join(c.dir, "certs.d")
	config := filepath.Join(c.dir, "larder.toml")
	meeting, err := freeAddr()
	if err != nil {
		return err
	}
	nowhere, err := freeAddr()
	if err != nil {
		return err
	}
	var tables string
	for host, upstream := range map[string]string{registryHost: c.registry.URL(), hostileHost: c.hostile.URL, nowhereHost: "http://" + nowhere} {
		tables += fmt.Sprintf("[[registry]]\nhost = %q\nupstreams = [%q]\n", host, upstream)
	}
	err = errors.Join(
		os.WriteFile(keyFile, []byte(base64.StdEncoding.EncodeToString(key)), 0o600),
		os.WriteFile(config, []byte(tables), 0o600),
		// What a runtime cannot read is a finding of the doctor.
		os.MkdirAll(filepath.Join(hosts, hostileDir), 0o755),
		os.WriteFile(filepath.Join(hosts, hostileDir, "hosts.toml"), []byte("no TOML"), 0o644),
	)
	if err != nil {
		return err
	}
	c.putFirst() // for the pin, which is looked at whenever the node likes to
	pins := registryHost + "/" + repository(0) + ":v1," + hostileHost + "/" + repository(0) + ":v1"
	shared := []string{"--config", config, "--peer.key_file", keyFile, "--peer.join", meeting, "--peer.data", loopbackAny}
	for _, n := range []struct {
		as    **node
		name  string
		flags []string
	}{
		{&c.busy, "node-1", append([]string{"--hosts.containerd", hosts, "--cache.pins", pins, "--peer.gossip", meeting, "--peer.zone", "zone-a"}, shared...)},
		{&c.peer, "node-2", append([]string{"--peer.gossip", loopbackAny, "--peer.zone", zoneMarkup}, shared...)},
		{&c.idle, "node-3", []string{"--config", os.DevNull, "--peer.enabled=false"}},
	} {
		if *n.as, err = newNode(larder, c.dir, n.name, n.flags...); err != nil {
			return err
		}
	}
	return nil
}

// startLoad has images pulled again and again until stopLoad: each from the
// registry on one node, in part from its peer on the other, and from disk.
func (c *cluster) startLoad(ctx context.Context) error {
	ctx, c.cancel = context.WithCancel(ctx)
	// The first pull fills each page with something to show.
	c.putFirst()
	if err := errors.Join(c.pull(ctx, c.peer, registryHost, 0), c.pull(ctx, c.busy, registryHost, 0), c.pull(ctx, c.busy, registryHost, 0)); err != nil {
		return err
	}
	for worker := range 3 {
		c.load.Go(func() { c.pullOn(ctx, worker) })
	}
	return nil
}

// workers pull different images: numbers below firstImage are taken.
const firstImage = 10

func (c *cluster) pullOn(ctx context.Context, worker int) {
	for i := firstImage; ctx.Err() == nil; i++ {
		n := 1000*worker + i
		c.put(n, 24<<20, 3<<20, 700<<10, int64(n))
		var pulls sync.WaitGroup
		for _, on := range []*node{c.busy, c.peer} {
			// What fails while the load ends, or at the hostile registry, is to be seen.
			pulls.Go(func() { _ = c.pull(ctx, on, registryHost, n) })
		}
		pulls.Wait()
		_ = c.pull(ctx, c.busy, registryHost, n)
		_ = c.pull(ctx, c.busy, hostileHost, n)
	}
}

func (c *cluster) putFirst() { c.put(0, 200<<10, 1<<20) }

func (c *cluster) put(n int, layers ...int64) {
	c.registry.Put(repository(n), registrytest.OCIImage(registrytest.ImageSpec{Seed: uint64(n), Layers: layers, Opaque: true}), "v1")
}

// longTag is as long as a tag may be.
var longTag = strings.Repeat("x", 128)

func (c *cluster) pullLongTag(ctx context.Context) error {
	c.registry.Put("team/long", registrytest.OCIImage(registrytest.ImageSpec{Layers: []int64{1 << 10}}), longTag)
	return pull(ctx, c.busy, agent.Image{Registry: registryHost, Repository: "team/long", Reference: longTag})
}

// pullFromNowhere fails until the registry is left alone for a while.
func (c *cluster) pullFromNowhere(ctx context.Context) error {
	for range 10 {
		if err := c.pull(ctx, c.peer, nowhereHost, 0); err == nil {
			return errors.New("pulled an image from nowhere")
		}
	}
	return nil
}

func repository(n int) string { return fmt.Sprintf("team/app-%d", n) }

func (c *cluster) pull(ctx context.Context, on *node, registry string, n int) error {
	return pull(ctx, on, agent.Image{Registry: registry, Repository: repository(n), Reference: "v1"})
}

func pull(ctx context.Context, on *node, image agent.Image) error {
	p := agent.Puller{Proxy: "http://" + on.proxy, Client: &http.Client{Transport: hostileAgent{}}, Platform: "linux/amd64"}
	_, err := p.Pull(ctx, image)
	return err
}

// hostileAgent is a client with markup for a name.
type hostileAgent struct{}

func (hostileAgent) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("User-Agent", "client/1 "+markup)
	return http.DefaultTransport.RoundTrip(r)
}

func (c *cluster) stopLoad() error {
	c.cancel()
	c.load.Wait()
	return nil
}

func (c *cluster) close() error {
	err := c.stopLoad()
	for _, n := range []*node{c.busy, c.peer, c.idle} {
		if n != nil {
			err = errors.Join(err, n.stop())
		}
	}
	if c.hostile != nil {
		c.hostile.Close()
	}
	if c.registry != nil {
		c.registry.Close()
	}
	return err
}

const loopbackAny = "127.0.0.1:0"

func listenLoopback() (net.Listener, error) { return net.Listen("tcp", loopbackAny) }

// freeAddr is a loopback address that was free a moment ago.
func freeAddr() (string, error) {
	l, err := listenLoopback()
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

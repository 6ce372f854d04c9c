package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
	"golang.org/x/sync/errgroup"
)

const (
	// demoRegistry is the name in the demo's image; no DNS knows it.
	demoRegistry = "registry.demo.test"
	demoRepo     = "demo/app"
	loopbackAny  = "127.0.0.1:0"
)

// demo is a cluster on loopback.
type demo struct {
	spec     demoSpec
	dir      string
	key      string // file with the cluster key
	meeting  string // gossip address of the first node
	registry *registrytest.Server
	image    agent.Image
	size     int64 // of its config and layers
	nodes    []*demoNode
	agents   errgroup.Group // their Runs
	client   *http.Client
}

// demoNode is one agent.
type demoNode struct {
	name  string
	agent *agent.Agent
	stop  context.CancelFunc
}

// demoPull is what one node's pull of the image came to.
type demoPull struct {
	node           string
	took           time.Duration
	bytes          int64 // of config, layers and manifest
	upstream, peer int64 // what the node fetched for it; the rest was there
}

// disk is what needed no fetching.
func (p demoPull) disk() int64 { return max(0, p.bytes-p.upstream-p.peer) }

// openDemo starts the registry and the agents. The demo must be closed
// whatever the error is.
func openDemo(spec demoSpec) (*demo, error) {
	d := &demo{spec: spec, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8}}}
	var err error
	if d.dir, err = os.MkdirTemp("", "larder-demo-"); err != nil {
		return d, fmt.Errorf("demo: %w", err)
	}
	d.key = filepath.Join(d.dir, "cluster.key")
	if err := os.WriteFile(d.key, []byte(newKey()), 0o600); err != nil {
		return d, fmt.Errorf("demo: %w", err)
	}
	if d.meeting, err = freeLoopback(); err != nil {
		return d, fmt.Errorf("demo: %w", err)
	}
	if err := d.openRegistry(); err != nil {
		return d, err
	}
	for range spec.nodes {
		if err := d.add(); err != nil {
			return d, err
		}
	}
	return d, nil
}

// freeLoopback is an address that was free a moment ago: the others must be
// told where the first node gossips before it does.
func freeLoopback() (string, error) {
	l, err := net.Listen("tcp", loopbackAny)
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

func (d *demo) openRegistry() (err error) {
	if d.registry, err = registrytest.New(registrytest.Options{}); err != nil {
		return fmt.Errorf("demo: start the registry: %w", err)
	}
	d.registry.SetRate(0, d.spec.registryLink)
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 1, Layers: d.spec.layers})
	d.registry.Put(demoRepo, img, "v1")
	for _, c := range img.Blobs {
		d.size += c.Size()
	}
	d.image = agent.Image{Registry: demoRegistry, Repository: demoRepo, Reference: "v1"}
	return nil
}

// add starts one more agent.
func (d *demo) add() error {
	n := &demoNode{name: "node-" + strconv.Itoa(len(d.nodes)+1)}
	var err error
	if n.agent, err = agent.New(d.config(n.name), agent.WithBuild(build()), agent.WithLogger(slog.New(slog.DiscardHandler))); err != nil {
		return fmt.Errorf("demo: start %s: %w", n.name, err)
	}
	// Not the command's context: Ctrl-C ends the pulls, then close ends the agents.
	ctx, cancel := context.WithCancel(context.Background())
	n.stop = cancel
	d.agents.Go(func() error { return n.agent.Run(ctx) })
	d.nodes = append(d.nodes, n)
	return nil
}

func (d *demo) config(name string) agent.Config {
	c := agent.Default()
	c.Proxy.Listen, c.Admin.Listen = loopbackAny, loopbackAny
	c.Proxy.DrainTimeout = time.Second // nobody pulls when a demo ends
	c.Cache.Dir = filepath.Join(d.dir, name)
	c.Peer.Name, c.Peer.KeyFile, c.Peer.Data = name, d.key, loopbackAny
	c.Peer.Gossip, c.Peer.Join = loopbackAny, []string{d.meeting}
	if len(d.nodes) == 0 {
		c.Peer.Gossip, c.Peer.Join = d.meeting, nil
	}
	c.Peer.MaxUploadBytesPerSecond = agent.Size(d.spec.nodeLink)
	c.Registries = []upstream.Registry{{Host: demoRegistry, Upstreams: []string{d.registry.URL()}}}
	c.Cache.MinFree, c.Cache.MaxBytes = cache.Bytes(0), cache.Bytes(1<<30) // a demo on a full laptop is still a demo
	return c
}

// close ends everything and leaves nothing behind.
func (d *demo) close() error {
	d.client.CloseIdleConnections()
	for _, n := range d.nodes {
		n.stop()
	}
	err := d.agents.Wait()
	if d.registry != nil {
		d.registry.Close()
	}
	if d.dir != "" {
		err = errors.Join(err, os.RemoveAll(d.dir))
	}
	return err
}

// gatherTimeout is more than gossip needs on a busy machine: who misses a message
// learns of it in a full exchange, every 30 s.
const gatherTimeout = 45 * time.Second

// gather waits until each of nodes sees all others.
func (d *demo) gather(ctx context.Context, nodes []*demoNode) error {
	ctx, cancel := context.WithTimeout(ctx, gatherTimeout)
	defer cancel()
	for _, n := range nodes {
		seen := 0
		err := until(ctx, func() bool {
			seen = len(n.agent.Members())
			return seen >= len(d.nodes)
		})
		if err != nil {
			return fmt.Errorf("demo: %s sees %d of %d nodes: %w", n.name, seen, len(d.nodes), err)
		}
	}
	return nil
}

// hear waits until a new node knows what the others have: it was told who they
// are a moment before.
func (d *demo) hear(ctx context.Context, n *demoNode) error {
	ctx, cancel := context.WithTimeoutCause(ctx, gatherTimeout, errors.New("demo: the new node does not hear what the others have"))
	defer cancel()
	parts := len(d.spec.layers) + 3 // config, manifest, and the tag, which counts as one
	return until(ctx, func() bool { return n.agent.Status().Index.Blobs >= parts })
}

// settle waits until every node has on disk what it pulled: a runtime has its
// last byte some milliseconds before the blob is synced and committed.
func (d *demo) settle(ctx context.Context) error {
	for _, n := range d.nodes {
		if err := until(ctx, func() bool { return len(n.agent.Status().Fills) == 0 }); err != nil {
			return fmt.Errorf("demo: %w", err)
		}
	}
	return nil
}

// pullAll lets nodes pull the image at the same moment.
func (d *demo) pullAll(ctx context.Context, out io.Writer, title string, nodes []*demoNode) ([]demoPull, error) {
	pulls := make([]demoPull, len(nodes))
	view := newDemoView(out, title, d.size)
	group, ctx := errgroup.WithContext(ctx)
	for i, n := range nodes {
		show := view.node(n.name)
		group.Go(func() error {
			var err error
			if pulls[i], err = d.pull(ctx, n, show); err == nil {
				show.done(pulls[i])
			}
			return err
		})
	}
	err := group.Wait()
	view.close()
	return pulls, err
}

// pull pulls as containerd would: see agent.Puller.
func (d *demo) pull(ctx context.Context, n *demoNode, show demoNodeView) (demoPull, error) {
	before, started := n.agent.Status().Fetched, time.Now()
	puller := agent.Puller{Proxy: "http://" + n.agent.ProxyAddr(), Client: d.client, Platform: "linux/amd64", Progress: show.progress}
	parts, err := puller.Pull(ctx, d.image)
	if err != nil {
		return demoPull{}, fmt.Errorf("demo: %s: %w", n.name, err)
	}
	out := demoPull{node: n.name, took: time.Since(started)}
	after := n.agent.Status().Fetched
	out.upstream, out.peer = after["upstream"]-before["upstream"], after["peer"]-before["peer"]
	for _, p := range parts {
		out.bytes += p.Bytes
	}
	return out, nil
}

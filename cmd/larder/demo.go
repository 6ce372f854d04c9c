package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

const (
	// demoRegistry is the name in the demo's image; no DNS knows it.
	demoRegistry = "registry.demo.test"
	demoRepo     = "demo/app"
	// maxDemoNodes agents of some 100 file descriptors each fit everywhere.
	maxDemoNodes = 64
)

// demoLayers are the sizes of the image's layers: one large, as images have.
var demoLayers = []int64{48 << 20, 12 << 20, 4 << 20}

func newDemo() *cobra.Command {
	var nodes int
	var stay bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run a registry and agents on loopback, pull an image cold and warm, and show what came from where",
		Long: `Run an embedded registry with a generated image, and one or more agents, all on
loopback and in temporary directories. The image is pulled through every agent:
cold, then warm with the registry stopped. A table shows what came from where,
and how fast. Nothing is left behind.

Agents run alone so far: each of several nodes fetches its own copy from the
registry.`,
		Example: `  larder demo
  larder demo --nodes 3 --stay`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if nodes < 1 || nodes > maxDemoNodes {
				return usageError{fmt.Errorf("--nodes %d: want 1 to %d", nodes, maxDemoNodes)}
			}
			return runDemo(cmd.Context(), cmd.OutOrStdout(), nodes, stay)
		},
	}
	cmd.Flags().IntVar(&nodes, "nodes", 1, "how many agents")
	cmd.Flags().BoolVar(&stay, "stay", false, "leave everything running until Ctrl-C")
	return cmd
}

// demo is a cluster on loopback.
type demo struct {
	out      io.Writer
	dir      string
	registry *registrytest.Server
	image    agent.Image
	size     int64 // of the whole image
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
	node     string
	took     time.Duration
	bySource map[string]int64
	bytes    int64
}

func runDemo(ctx context.Context, out io.Writer, nodes int, stay bool) (err error) {
	d := &demo{out: out, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8}}}
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.open(nodes); err != nil {
		return err
	}
	fmt.Fprintf(out, "A registry with %s (%s in %d layers) and %s, all on loopback.\n\n",
		d.image, size(d.size), len(demoLayers), plural(nodes, "agent"))
	cold, err := d.pullAll(ctx, "cold")
	if err != nil {
		return err
	}
	copies := float64(d.registry.Bytes(registrytest.Match{Kind: registrytest.Blob})) / float64(d.size)
	requests := d.registry.Count(registrytest.Match{})
	if err := d.settle(ctx); err != nil {
		return err
	}
	d.registry.Down()
	warm, err := d.pullAll(ctx, "warm, registry stopped")
	if err != nil {
		return err
	}
	d.print(cold, warm)
	fmt.Fprintf(out, "\nThe registry sent %.2f copies of the image for %s, in %d requests, and nothing while it was stopped.\n",
		copies, plural(2*nodes, "pull"), requests)
	if stay {
		return d.stay(ctx)
	}
	return nil
}

// open starts the registry and the agents.
func (d *demo) open(nodes int) error {
	var err error
	if d.dir, err = os.MkdirTemp("", "larder-demo-"); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	if d.registry, err = registrytest.New(registrytest.Options{}); err != nil {
		return fmt.Errorf("demo: start the registry: %w", err)
	}
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 1, Layers: demoLayers})
	d.registry.Put(demoRepo, img, "v1")
	for _, c := range img.Blobs {
		d.size += c.Size()
	}
	d.image = agent.Image{Registry: demoRegistry, Repository: demoRepo, Reference: "v1"}
	for i := range nodes {
		if err := d.add(i + 1); err != nil {
			return err
		}
	}
	return nil
}

// add starts one more agent.
func (d *demo) add(number int) error {
	n := &demoNode{name: "node-" + strconv.Itoa(number)}
	c := agent.Default()
	c.Proxy.Listen, c.Admin.Listen = "127.0.0.1:0", "127.0.0.1:0"
	c.Cache.Dir = filepath.Join(d.dir, n.name)
	// A demo on a full laptop is still a demo.
	if err := errors.Join(c.Cache.MinFree.UnmarshalText([]byte("0")), c.Cache.MaxBytes.UnmarshalText([]byte("1GiB"))); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	c.Peer.Enabled, c.Peer.Name = false, n.name
	c.Registries = []upstream.Registry{{Host: demoRegistry, Upstreams: []string{d.registry.URL()}}}
	var err error
	if n.agent, err = agent.New(c, agent.WithBuild(build()), agent.WithLogger(slog.New(slog.DiscardHandler))); err != nil {
		return fmt.Errorf("demo: start %s: %w", n.name, err)
	}
	// Not the command's context: Ctrl-C ends the pulls, then close ends the agents.
	ctx, cancel := context.WithCancel(context.Background())
	n.stop = cancel
	d.agents.Go(func() error { return n.agent.Run(ctx) })
	d.nodes = append(d.nodes, n)
	return nil
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

// pullAll lets every node pull the image at the same moment.
func (d *demo) pullAll(ctx context.Context, title string) ([]demoPull, error) {
	pulls := make([]demoPull, len(d.nodes))
	show := newDemoProgress(d.out, title, d.size*int64(len(d.nodes)))
	group, ctx := errgroup.WithContext(ctx)
	for i, n := range d.nodes {
		group.Go(func() error {
			var err error
			pulls[i], err = d.pull(ctx, n, show)
			return err
		})
	}
	err := group.Wait()
	show.close()
	return pulls, err
}

func (d *demo) pull(ctx context.Context, n *demoNode, show *demoProgress) (demoPull, error) {
	started := time.Now()
	puller := agent.Puller{Proxy: "http://" + n.agent.ProxyAddr(), Client: d.client, Platform: "linux/amd64", Progress: show.of()}
	parts, err := puller.Pull(ctx, d.image)
	if err != nil {
		return demoPull{}, fmt.Errorf("demo: %s: %w", n.name, err)
	}
	out := demoPull{node: n.name, took: time.Since(started), bySource: map[string]int64{}}
	for _, p := range parts {
		out.bySource[p.Source] += p.Bytes
		out.bytes += p.Bytes
	}
	return out, nil
}

// settlePoll is how often settle looks.
const settlePoll = 10 * time.Millisecond

// settle waits until every node has on disk what it pulled: a runtime has its
// last byte some milliseconds before the blob is synced and committed.
func (d *demo) settle(ctx context.Context) error {
	for _, n := range d.nodes {
		for len(n.agent.Status().Fills) > 0 {
			select {
			case <-ctx.Done():
				return fmt.Errorf("demo: %w", context.Cause(ctx))
			case <-time.After(settlePoll):
			}
		}
	}
	return nil
}

// print is the table of all pulls.
func (d *demo) print(cold, warm []demoPull) {
	sources := map[string]bool{}
	for _, p := range slices.Concat(cold, warm) {
		for s := range p.bySource {
			sources[s] = true
		}
	}
	names := slices.Sorted(maps.Keys(sources))
	t := newTable("pull", "node")
	for _, s := range names {
		t.header = append(t.header, ">from "+s)
	}
	t.header = append(t.header, ">time", ">speed")
	add := func(title string, pulls []demoPull) {
		for _, p := range pulls {
			row := []string{title, p.node}
			for _, s := range names {
				row = append(row, size(p.bySource[s]))
			}
			t.row(append(row, p.took.Round(time.Millisecond).String(), rate(p.bytes, p.took))...)
		}
	}
	add("cold", cold)
	add("warm", warm)
	t.print(d.out)
	fmt.Fprintf(d.out, "\nThe warm pulls ran with the registry stopped. Slowest: %s cold, %s warm.\n",
		slowest(cold).Round(time.Millisecond), slowest(warm).Round(time.Millisecond))
}

func slowest(pulls []demoPull) time.Duration {
	return slices.MaxFunc(pulls, func(a, b demoPull) int { return cmp.Compare(a.took, b.took) }).took
}

// stay says how to look around, and waits for Ctrl-C.
func (d *demo) stay(ctx context.Context) error {
	if err := d.registry.Up(); err != nil {
		return fmt.Errorf("demo: start the registry again: %w", err)
	}
	fmt.Fprintf(d.out, "\nRunning until Ctrl-C. The registry is at %s; look around:\n", d.registry.URL())
	for _, n := range d.nodes {
		admin := "http://" + n.agent.AdminAddr()
		fmt.Fprintf(d.out, "  %s  larder status --admin %s\n", n.name, admin)
		fmt.Fprintf(d.out, "  %s  larder explain --admin %s --platform linux/amd64 %s\n", n.name, admin, d.image)
	}
	<-ctx.Done()
	return nil
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// demoProgress shows one line for all pulls of a round, on terminals only.
type demoProgress struct {
	out   io.Writer
	title string
	total int64
	done  atomic.Int64
	quit  chan struct{}
	ended chan struct{}
}

// demoRedraw is how often a line on a terminal is drawn anew.
const demoRedraw = 100 * time.Millisecond

func newDemoProgress(out io.Writer, title string, total int64) *demoProgress {
	p := &demoProgress{out: out, title: title, total: total, quit: make(chan struct{}), ended: make(chan struct{})}
	if _, ok := terminal(out); !ok {
		close(p.ended)
		return p
	}
	go p.draw() // ended by close, which waits
	return p
}

// of returns the progress callback of one node's pull.
func (p *demoProgress) of() func(digest.Digest, int64, int64) {
	var mu sync.Mutex // guards last
	last := map[digest.Digest]int64{}
	return func(d digest.Digest, done, _ int64) {
		mu.Lock()
		defer mu.Unlock()
		p.done.Add(done - last[d])
		last[d] = done
	}
}

func (p *demoProgress) draw() {
	defer close(p.ended)
	ticker := time.NewTicker(demoRedraw)
	defer ticker.Stop()
	for {
		done := p.done.Load()
		fmt.Fprintf(p.out, "\r%-24s %s %s of %s ", p.title, bar(done, p.total, 30), size(done), size(p.total))
		select {
		case <-ticker.C:
		case <-p.quit:
			fmt.Fprint(p.out, "\r\x1b[K")
			return
		}
	}
}

func (p *demoProgress) close() {
	close(p.quit)
	<-p.ended
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/spf13/cobra"
)

const (
	// maxDemoNodes agents of some 100 file descriptors each fit everywhere.
	maxDemoNodes = 64
	// demoLink is 100 Mbit/s, in bytes per second: slow enough for two processors
	// to carry nine nodes, so that the links decide and not the machine.
	demoLink = 100e6 / 8
)

// demoSpec is the cluster of one demo.
type demoSpec struct {
	nodes  int
	layers []int64 // sizes
	// registryLink and nodeLink are what the registry and each node may send, in
	// bytes per second.
	registryLink, nodeLink int64
	stay                   bool
}

func newDemo() *cobra.Command {
	// One large layer among small ones, as images have.
	spec := demoSpec{layers: []int64{30 << 20, 8 << 20, 2 << 20}, registryLink: demoLink, nodeLink: demoLink}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run a whole cluster on loopback, and show what came from where",
		Long: `Run an embedded registry with a generated image, and several agents, all on
loopback, in this process and in temporary directories. Then:

  1. every node pulls the image at the same moment, cold;
  2. the registry is stopped, and one node pulls again, from its disk;
  3. a new node joins and pulls everything from the others.

A table shows what came from where and how fast, and how close the storm came to
what the links allow. Nothing is left behind.

What the registry and each node send is limited to 100 Mbit/s, as links would.
What nodes receive is not limited, there is no latency and no loss, and all nodes
share this machine's processors and disk. "make bench-storm" (root) measures
separate processes on shaped links.`,
		Example: `  larder demo
  larder demo --nodes 16
  larder demo --stay`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if spec.nodes < 1 || spec.nodes > maxDemoNodes {
				return usageError{fmt.Errorf("--nodes %d: want 1 to %d", spec.nodes, maxDemoNodes)}
			}
			outliveReader()
			err := runDemo(cmd.Context(), cmd.OutOrStdout(), spec)
			if err != nil && cmd.Context().Err() != nil {
				return errDemoInterrupted
			}
			return err
		},
	}
	cmd.Flags().IntVar(&spec.nodes, "nodes", 8, "how many agents")
	cmd.Flags().BoolVar(&spec.stay, "stay", false, "leave everything running until Ctrl-C")
	return cmd
}

var errDemoInterrupted = errors.New("demo: interrupted; nothing is left behind")

func runDemo(ctx context.Context, out io.Writer, spec demoSpec) (err error) {
	d, err := openDemo(spec)
	defer func() { err = errors.Join(err, d.close()) }()
	if err != nil {
		return err
	}
	if err := d.gather(ctx, d.nodes); err != nil {
		return err
	}
	d.introduce(out)
	report := demoReport{spec: spec, size: d.size}
	for _, step := range []func(context.Context, io.Writer, *demoReport) error{d.storm, d.again, d.latecomer} {
		if err := step(ctx, out, &report); err != nil {
			return err
		}
	}
	report.print(out)
	if spec.stay {
		return d.stay(ctx, out)
	}
	return nil
}

func (d *demo) introduce(out io.Writer) {
	fmt.Fprintf(out, "%s and a registry, all on loopback in this process.\n", agent.CountText(len(d.nodes), "node"))
	fmt.Fprintf(out, "The image is %s: %s in %s.\n", d.image, size(d.size), agent.CountText(len(d.spec.layers), "layer"))
	fmt.Fprintf(out, "The registry sends at most %s, and so does each node: %s.\n", mbit(d.spec.registryLink), mbit(d.spec.nodeLink))
	fmt.Fprint(out, "Not modelled: limits on receiving, latency, loss. All share this machine's processors and disk.\n\n")
}

// storm lets every node pull at the same moment.
func (d *demo) storm(ctx context.Context, out io.Writer, r *demoReport) (err error) {
	if r.storm, err = d.pullAll(ctx, out, "cold, all at once", d.nodes); err != nil {
		return err
	}
	r.registryBytes = d.registry.Bytes(registrytest.Match{Kind: registrytest.Blob})
	r.requests = d.registry.Count(registrytest.Match{})
	r.manifestRequests = d.registry.Count(registrytest.Match{Kind: registrytest.Manifest})
	r.blobRequests = d.registry.Count(registrytest.Match{Kind: registrytest.Blob})
	return d.settle(ctx)
}

// again stops the registry and pulls once more through the first node.
func (d *demo) again(ctx context.Context, out io.Writer, r *demoReport) (err error) {
	d.registry.Down()
	r.warm, err = d.pullAll(ctx, out, "warm, registry stopped", d.nodes[:1])
	return err
}

// latecomer adds a node while the registry is stopped.
func (d *demo) latecomer(ctx context.Context, out io.Writer, r *demoReport) error {
	if err := d.add(); err != nil {
		return err
	}
	n := d.nodes[len(d.nodes)-1]
	if err := d.gather(ctx, []*demoNode{n}); err != nil {
		return err
	}
	err := d.hear(ctx, n)
	if err == nil {
		r.late, err = d.pullAll(ctx, out, "new node, registry stopped", []*demoNode{n})
	}
	return err
}

// stay says how to look around, and waits for Ctrl-C.
func (d *demo) stay(ctx context.Context, out io.Writer) error {
	if err := d.registry.Up(); err != nil {
		return fmt.Errorf("demo: start the registry again: %w", err)
	}
	fmt.Fprintf(out, "\nRunning until Ctrl-C. The registry answers again, at %s.\n", d.registry.URL())
	t := newTable("node", "proxy", "status page")
	t.indent = "  "
	for _, n := range d.nodes {
		t.row(n.name, n.agent.ProxyAddr(), "http://"+n.agent.AdminAddr()+"/")
	}
	t.print(out)
	admin := "http://" + d.nodes[0].agent.AdminAddr()
	fmt.Fprintf(out, "\nLook around:\n  larder status --admin %s\n  larder explain --admin %s --platform linux/amd64 %s\n", admin, admin, d.image)
	fmt.Fprintf(out, "  curl -sI 'http://%s/v2/%s/manifests/%s?ns=%s'\n", d.nodes[0].agent.ProxyAddr(), d.image.Repository, d.image.Reference, d.image.Registry)
	<-ctx.Done()
	return nil
}

// demoPoll is how often the demo looks at its agents while it waits for them.
const demoPoll = 20 * time.Millisecond

// until waits for a condition that agents bring about.
func until(ctx context.Context, ok func() bool) error {
	tick := time.NewTicker(demoPoll)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	return nil
}

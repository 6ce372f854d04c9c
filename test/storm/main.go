// Command storm measures pull storms: many nodes that start the same image at
// once, each a network namespace with a shaped link, its own `larder agent`
// process and containerd's own client code, in front of a real distribution
// registry. Every scenario is run straight from the registry and through
// Larder, and printed side by side with the physical bound.
//
// It needs root, iproute2, and the two binaries; `make bench-storm` builds
// them. All traffic stays in namespaces that it makes and removes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
)

const megabit = 1e6 / 8 // bytes per second

// A scenario is one storm.
type scenario struct {
	name   string
	about  string
	nodes  int
	link   float64 // bytes per second of each node, each way
	uplink float64 // bytes per second of the registry, each way
	layers []int64
	// seeded: node 0 has the image and the registry is stopped before the rest
	// pull.
	seeded bool
	// goal is the slowest node's time over the bound.
	goal float64
}

const mb = 1_000_000

var scenarios = []scenario{
	{"cold-20", "20 nodes at 200 Mbit/s, registry at 1 Gbit/s, 53.5 MB", 20, 200 * megabit, 1000 * megabit, []int64{40 * mb, 12 * mb, 1.5 * mb}, false, 1.25},
	{"cold-4x500", "4 nodes at 1 Gbit/s, registry at 1 Gbit/s, 500 MB", 4, 1000 * megabit, 1000 * megabit, []int64{500 * mb}, false, 1.25},
	{"edge-8", "8 nodes at 1 Gbit/s behind a 50 Mbit/s uplink, 53.5 MB", 8, 1000 * megabit, 50 * megabit, []int64{40 * mb, 12 * mb, 1.5 * mb}, false, 1.25},
	{"seeded-19", "19 nodes at 200 Mbit/s from one seeded node, registry down, 53.5 MB", 20, 200 * megabit, 1000 * megabit, []int64{40 * mb, 12 * mb, 1.5 * mb}, true, 1.35},
	// Twenty agents, their clients and the kernel have more work at these rates than two
	// cores do in the time; a node has its own. With a tenth of the rates the links are the limit.
	{"cold-20-tenth", "20 nodes at 20 Mbit/s, registry at 100 Mbit/s, 53.5 MB", 20, 20 * megabit, 100 * megabit, []int64{40 * mb, 12 * mb, 1.5 * mb}, false, 1.25},
	{"cold-4x500-tenth", "4 nodes at 100 Mbit/s, registry at 100 Mbit/s, 500 MB", 4, 100 * megabit, 100 * megabit, []int64{500 * mb}, false, 1.25},
	{"seeded-19-tenth", "19 nodes at 20 Mbit/s from one seeded node, registry down, 53.5 MB", 20, 20 * megabit, 100 * megabit, []int64{40 * mb, 12 * mb, 1.5 * mb}, true, 1.35},
}

func (s scenario) bytes() (sum int64) {
	for _, n := range s.layers {
		sum += n
	}
	return sum
}

// pulling is the number of nodes that take part in the storm.
func (s scenario) pulling() int {
	if s.seeded {
		return s.nodes - 1
	}
	return s.nodes
}

// bound is the least time in seconds in which the last node can have the
// image: the source must send each byte once, each node must receive it all,
// and everybody's upload together must send it to everybody.
func (s scenario) bound() float64 {
	f, n := float64(s.bytes()), float64(s.pulling())
	source := s.uplink
	if s.seeded {
		source = s.link
	}
	return max(f/source, f/s.link, n*f/(source+n*s.link))
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "storm:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if err := coarseTimers(); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(args) > 0 {
		switch args[0] {
		case "pull": // in a node's namespace
			return pullMain(ctx, args[1:])
		case "push": // in the registry's namespace
			return pushMain(ctx, args[1:])
		case "copy": // in every namespace, see floor
			return copyMain(ctx, args[1:])
		}
	}
	return measure(ctx, args)
}

func measure(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("storm", flag.ContinueOnError)
	var b bench
	only := flags.String("only", "", "comma-separated scenarios (default all)")
	flags.StringVar(&b.larder, "larder", "bin/larder", "the larder binary")
	flags.StringVar(&b.registry, "registry", "", "the distribution registry binary")
	flags.BoolVar(&b.keepLogs, "keep-logs", false, "keep the agents' logs and say where")
	flags.StringVar(&b.agentFlags, "agent-flags", "", "more flags for every agent, separated by spaces")
	flags.StringVar(&b.profile, "profile", "", "directory for CPU profiles of all agents during the storm")
	flags.IntVar(&b.runs, "runs", 3, "storms through Larder of each scenario; the goals are held against the median")
	flags.BoolVar(&b.withFloor, "floor", false, "measure also the simplest copier on the same links")
	flags.BoolVar(&b.skipDirect, "skip-direct", false, "measure through Larder only")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if b.runs < 1 {
		return fmt.Errorf("runs %d: at least 1", b.runs)
	}
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root")
	}
	picked, err := pick(*only)
	if err != nil {
		return err
	}
	b.printMachine()
	var missed []string
	for _, s := range picked {
		met, err := b.compare(ctx, s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if !met {
			missed = append(missed, s.name)
		}
	}
	if len(missed) > 0 {
		fmt.Printf("\ngoals missed in: %s\n", strings.Join(missed, ", "))
	} else {
		fmt.Println("\nall goals met")
	}
	return nil
}

func pick(only string) ([]scenario, error) {
	if only == "" {
		return scenarios, nil
	}
	var out []scenario
	for name := range strings.SplitSeq(only, ",") {
		i := slices.IndexFunc(scenarios, func(s scenario) bool { return s.name == name })
		if i < 0 {
			return nil, fmt.Errorf("no scenario %q", name)
		}
		out = append(out, scenarios[i])
	}
	return out, nil
}

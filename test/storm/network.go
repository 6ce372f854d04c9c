package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// network is a switch with shaped links: one namespace with a bridge, and one
// more for each host on it.
type network struct {
	prefix string
	spaces []string // everything to remove, in order of creation
}

// Hosts are numbered within 10.77.0.0/24; the addresses exist only inside the
// namespaces.
func address(host int) string { return fmt.Sprintf("10.77.0.%d", host+1) }

const registryHost = 0

// newNetwork makes the switch. remove must be called, also after an error of
// attach.
func newNetwork(ctx context.Context, prefix string) (*network, error) {
	n := &network{prefix: prefix}
	n.spaces = append(n.spaces, n.hub())
	err := commands(ctx,
		"ip netns add "+n.hub(),
		"ip -n "+n.hub()+" link add br0 type bridge",
		"ip -n "+n.hub()+" link set br0 up")
	return n, err
}

func (n *network) hub() string           { return n.prefix + "-hub" }
func (n *network) space(host int) string { return fmt.Sprintf("%s-%d", n.prefix, host) }

// attach adds a host whose link carries rate bytes per second each way.
func (n *network) attach(ctx context.Context, host int, rate float64) error {
	ns, port := n.space(host), fmt.Sprintf("p%d", host)
	n.spaces = append(n.spaces, ns)
	// The burst is what a token bucket needs at 1 Gbit/s without starving, the
	// latency bound what a switch would buffer.
	shape := fmt.Sprintf("root tbf rate %dbit burst 256kb latency 50ms", int64(rate*8))
	return commands(ctx,
		"ip netns add "+ns,
		"ip link add eth0 netns "+ns+" type veth peer name "+port+" netns "+n.hub(),
		"ip -n "+n.hub()+" link set "+port+" master br0 up",
		"ip -n "+ns+" link set lo up",
		"ip -n "+ns+" addr add "+address(host)+"/24 dev eth0",
		"ip -n "+ns+" link set eth0 up",
		// With BBR, the default of some kernels, unshaped and shaped links behave
		// alike in misleading ways.
		"ip -n "+ns+" route replace 10.77.0.0/24 dev eth0 congctl cubic",
		"tc -n "+ns+" qdisc add dev eth0 "+shape,
		"tc -n "+n.hub()+" qdisc add dev "+port+" "+shape)
}

// remove deletes every namespace. Their processes must be gone.
func (n *network) remove() error {
	var errs []error
	for _, ns := range n.spaces {
		errs = append(errs, commands(context.Background(), "ip netns del "+ns))
	}
	return errors.Join(errs...)
}

// inside returns a command that will run on a host.
func (n *network) inside(ctx context.Context, host int, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", n.space(host), name}, args...)...)
}

func commands(ctx context.Context, lines ...string) error {
	for _, line := range lines {
		words := strings.Fields(line)
		if out, err := exec.CommandContext(ctx, words[0], words[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", line, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

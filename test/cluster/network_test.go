package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// network is a switch with a network namespace for each host: what goes wrong
// between machines can go wrong there. Host 0 is the registry's.
type network struct {
	prefix string
}

// address is a host's; it exists only inside the namespaces.
func address(host int) string { return fmt.Sprintf("10.78.0.%d", host+1) }

// newNetwork makes the switch, and the registry's host on it.
func newNetwork(t *testing.T) *network {
	t.Helper()
	needRoot(t)
	w := &network{prefix: fmt.Sprintf("larder-%d-%d", os.Getpid(), clusters.Add(1))}
	w.space(t, w.hub())
	w.must(t, "ip -n "+w.hub()+" link add br0 type bridge", "ip -n "+w.hub()+" link set br0 up")
	w.attach(t, 0)
	return w
}

// needRoot skips what needs root where there is none, but never in CI.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("this test needs root")
	}
	t.Skip("needs root, for network namespaces and file systems")
}

func (w *network) hub() string          { return w.prefix + "-hub" }
func (w *network) name(host int) string { return fmt.Sprintf("%s-%d", w.prefix, host) }
func (w *network) must(t *testing.T, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if err := command(line).Run(); err != nil {
			t.Fatal(err)
		}
	}
}

// runner is a command whose error says what it printed.
type runner struct{ *exec.Cmd }

func command(line string) runner {
	words := strings.Fields(line)
	return runner{exec.Command(words[0], words[1:]...)}
}

func (r runner) Run() error {
	if out, err := r.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", r, err, out)
	}
	return nil
}

// space makes a namespace for as long as the test.
func (w *network) space(t *testing.T, name string) {
	t.Helper()
	w.must(t, "ip netns add "+name)
	t.Cleanup(func() {
		if err := command("ip netns del " + name).Run(); err != nil {
			t.Error(err)
		}
	})
}

// attach plugs a host in.
func (w *network) attach(t *testing.T, host int) {
	t.Helper()
	ns, port := w.name(host), fmt.Sprintf("p%d", host)
	w.space(t, ns)
	w.must(t,
		"ip link add eth0 netns "+ns+" type veth peer name "+port+" netns "+w.hub(),
		"ip -n "+w.hub()+" link set "+port+" master br0 up",
		"ip -n "+ns+" link set lo up",
		"ip -n "+ns+" addr add "+address(host)+"/24 dev eth0",
		"ip -n "+ns+" link set eth0 up",
		// The default of most systems; BBR hardly notices packet loss.
		"ip -n "+ns+" route replace 10.78.0.0/24 dev eth0 congctl cubic")
}

// deaf makes a host hear nothing that another one says.
func (w *network) deaf(t *testing.T, host, to int) {
	t.Helper()
	w.filter(t, host, "-A INPUT -s "+address(to)+" -j DROP")
}

// part separates two groups of hosts.
func (w *network) part(t *testing.T, some, others []int) {
	t.Helper()
	for _, a := range some {
		for _, b := range others {
			w.deaf(t, a, b)
			w.deaf(t, b, a)
		}
	}
}

// lose drops a share of what arrives at a host, from wherever.
func (w *network) lose(t *testing.T, host int, share float64) {
	t.Helper()
	w.filter(t, host, fmt.Sprintf("-A INPUT -i eth0 -m statistic --mode random --probability %.2f -j DROP", share))
}

// narrow limits what the registry sends to a host to so many bytes a second. A network
// has one such host at most.
func (w *network) narrow(t *testing.T, host int, rate int64) {
	t.Helper()
	tc := "tc -n " + w.name(0)
	w.must(t,
		tc+" qdisc add dev eth0 root handle 1: htb default 1",
		tc+" class add dev eth0 parent 1: classid 1:1 htb rate 10gbit quantum 60000",
		tc+fmt.Sprintf(" class add dev eth0 parent 1: classid 1:2 htb rate %dbps", rate),
		tc+" filter add dev eth0 parent 1: protocol ip u32 match ip dst "+address(host)+"/32 flowid 1:2")
}

// heal ends everything that deaf, part and lose did to a host.
func (w *network) heal(t *testing.T, host int) {
	t.Helper()
	w.filter(t, host, "-F INPUT")
}

func (w *network) filter(t *testing.T, host int, rule string) {
	t.Helper()
	if err := w.inside(host, command("iptables -w "+rule).Run); err != nil {
		t.Fatal(err)
	}
}

// listen opens a port on a host.
func (w *network) listen(t *testing.T, host int, addr string) (l net.Listener) {
	t.Helper()
	err := w.inside(host, func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// dial connects from a host. The address must be a numeric one: a name would be
// looked up by another thread, elsewhere.
func (w *network) dial(ctx context.Context, host int, network, addr string) (c net.Conn, err error) {
	err = w.inside(host, func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// inside calls f on a thread in the host's namespace: sockets and processes that
// f makes belong there forever.
func (w *network) inside(host int, f func() error) error {
	there, err := os.Open("/run/netns/" + w.name(host))
	if err != nil {
		return err
	}
	defer there.Close()
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer here.Close()
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("enter %s: %w", w.name(host), err)
			return
		}
		err := f()
		back := unix.Setns(int(here.Fd()), unix.CLONE_NEWNET)
		if back == nil {
			runtime.UnlockOSThread() // else the thread ends with the goroutine
		}
		result <- errors.Join(err, back)
	}()
	return <-result
}

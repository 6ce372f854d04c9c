package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// dialer is the DialContext of a transport.
type dialer func(ctx context.Context, network, address string) (net.Conn, error)

// network is a bridge in a network namespace and hosts on it, each in its own.
// The namespaces have no names and are mounted nowhere: this process holds them
// open, and so do the processes on the hosts, which end with it. So they are gone
// when the tests are, even if those were killed.
type network struct {
	t     *testing.T
	hub   host
	hosts int
}

// host is one end of a link. Its loopback is its own.
type host struct {
	space *os.File
	addr  string // seen by the other hosts only
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	needRoot(t)
	needTool(t, "ip")
	needTool(t, "nsenter")
	n := &network{t: t, hub: newHost(t)}
	n.hub.command(t, "ip", "link", "add", "br0", "type", "bridge")
	n.hub.command(t, "ip", "link", "set", "br0", "up")
	return n
}

// attach adds a host.
func (n *network) attach() host {
	n.t.Helper()
	n.hosts++
	h, port := newHost(n.t), fmt.Sprintf("port%d", n.hosts)
	h.addr = fmt.Sprintf("10.78.0.%d", n.hosts)
	n.hub.command(n.t, "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", h.path())
	n.hub.command(n.t, "ip", "link", "set", port, "master", "br0", "up")
	h.command(n.t, "ip", "link", "set", "lo", "up")
	h.command(n.t, "ip", "addr", "add", h.addr+"/24", "dev", "eth0")
	h.command(n.t, "ip", "link", "set", "eth0", "up")
	return h
}

func newHost(t *testing.T) host {
	t.Helper()
	var space *os.File
	err := elsewhere(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		space, err = openSpace()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { space.Close() })
	return host{space: space}
}

// elsewhere runs do on a thread whose network namespace do may change.
func elsewhere(do func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		home, err := openSpace()
		if err != nil {
			result <- err
			return
		}
		defer home.Close()
		err = do()
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
			result <- errors.Join(err, back) // still locked, so the thread ends here
			return
		}
		runtime.UnlockOSThread()
		result <- err
	}()
	return <-result
}

// openSpace opens the network namespace of this thread.
func openSpace() (*os.File, error) { return os.Open("/proc/thread-self/ns/net") }

// path names the host's namespace to other processes.
func (h host) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), h.space.Fd()) }

func (h host) command(t *testing.T, name string, args ...string) {
	t.Helper()
	command(t, "nsenter", append([]string{"--net=" + h.path(), name}, args...)...)
}

// dial connects from this host. The address must be numeric: a look-up would
// leave the thread.
func (h host) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = elsewhere(func() error {
		if err := unix.Setns(int(h.space.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// listen accepts connections at the host's address.
func (h host) listen(t *testing.T, port string) (l net.Listener) {
	t.Helper()
	err := elsewhere(func() error {
		if err := unix.Setns(int(h.space.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		var err error
		l, err = net.Listen("tcp", net.JoinHostPort(h.addr, port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// program is a script that runs bin on this host. Only the network is the
// host's: `ip netns exec` would hide the machine's cgroups. The proxy that keeps
// other tests offline would here hide the other hosts, and there is no way out.
func (h host) program(t *testing.T, bin string) string {
	t.Helper()
	path := filepath.Join(tempDir(t), filepath.Base(bin))
	script := fmt.Sprintf("#!/bin/sh\nunset HTTP_PROXY HTTPS_PROXY\nexec nsenter --net=%s %s \"$@\"\n", h.path(), bin)
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

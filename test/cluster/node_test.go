package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/test/runtimetest"
)

// node is one machine of the cluster: a larder agent, which may be down, and
// containerd beside it.
type node struct {
	t    *testing.T
	name string
	dir  string
	ip   string // where peers reach it; on loopback one of 127.0.0.0/8
	port int    // the first of four
	join []string
	key  string // file
	// dial connects from inside the node's network.
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)
	start   func(*exec.Cmd) error
	flags   []string
	env     []string // beside the test's own
	program string
	try     time.Duration // of a pull
	local   string        // ip of the proxy and admin API

	admin  *http.Client
	cmd    *exec.Cmd
	exited chan struct{} // closed when cmd has been waited for
	err    error         // of Wait, after exited
	idle   resources     // before anything was pulled
}

// resources are what an agent must not lose.
type resources struct {
	goroutines, files, sockets, links int
	blobs                             []string // files of the cache's blobs, among files
}

func (n *node) addr(ip string, offset int) string {
	return net.JoinHostPort(ip, strconv.Itoa(n.port+offset))
}

func (n *node) gossip() string    { return n.addr(n.ip, 2) }
func (n *node) adminAddr() string { return n.addr(n.local, 3) }
func (n *node) certs() string     { return filepath.Join(n.dir, "certs.d") }
func (n *node) cache() string     { return filepath.Join(n.dir, "cache") }
func (n *node) logFile() string   { return filepath.Join(n.dir, "larder.log") }

// writeHosts says where the registry is; the agent takes it over as its
// upstream and puts itself before it.
func (n *node) writeHosts(server string) {
	n.t.Helper()
	dir := filepath.Join(n.certs(), registryName)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), fmt.Appendf(nil, "server = %q\n", server), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// mount gives the cache a file system of its own, for as long as the test.
func (n *node) mount(size string) {
	n.t.Helper()
	if err := os.MkdirAll(n.cache(), 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := command("mount -t tmpfs -o size=" + size + " larder-test " + n.cache()).Run(); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		if err := command("umount -l " + n.cache()).Run(); err != nil {
			n.t.Error(err)
		}
	})
}

// has reports whether the cache holds all of a blob.
func (n *node) has(d digest.Digest) bool {
	_, err := os.Stat(filepath.Join(n.cache(), "blobs", "sha256", d.Encoded()))
	return err == nil
}

// forget loses what the node has pulled. Its agent must be down.
func (n *node) forget() {
	n.t.Helper()
	kept, err := filepath.Glob(filepath.Join(n.cache(), "*")) // the directory may be a mount point
	for _, name := range kept {
		err = errors.Join(err, os.RemoveAll(name))
	}
	if err := errors.Join(err, n.containerd().Wipe()); err != nil {
		n.t.Fatal(err)
	}
}

// up starts the agent and waits until it is ready.
func (n *node) up() {
	n.t.Helper()
	args := append([]string{"agent", "--log.level=debug",
		"--proxy.listen", n.addr(n.local, 0), "--admin.listen", n.adminAddr(),
		"--cache.dir", n.cache(), "--cache.max_bytes=8GiB", "--cache.min_free=0",
		"--peer.name", n.name, "--peer.advertise", n.ip, "--peer.key_file", n.key,
		"--peer.gossip", n.gossip(), "--peer.data", n.addr(n.ip, 1), "--peer.join", strings.Join(n.join, ","),
		"--hosts.containerd", n.certs()}, n.flags...)
	log, err := os.OpenFile(n.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(n.program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(append(os.Environ(), "NO_PROXY=*", "no_proxy=*"), n.env...)
	if err := n.start(cmd); err != nil {
		n.t.Fatalf("start %s: %v", n.name, err)
	}
	exited := make(chan struct{})
	n.cmd, n.exited = cmd, exited
	go func() {
		defer close(exited)
		n.err = cmd.Wait()
	}()
	eventually(n.t, n.name+" ready", func() error {
		select {
		case <-exited:
			n.t.Fatalf("%s ended: %v\n%s", n.name, n.err, n.log())
		default:
		}
		return n.get("/readyz", nil)
	})
}

// alive reports whether the agent runs, or is frozen.
func (n *node) alive() bool {
	if n.cmd == nil {
		return false
	}
	select {
	case <-n.exited:
		return false
	default:
		return true
	}
}

func (n *node) signal(s syscall.Signal) {
	n.t.Helper()
	if err := n.cmd.Process.Signal(s); err != nil {
		n.t.Fatalf("%v to %s: %v", s, n.name, err)
	}
}

// kill is the end of a machine that lost its power.
func (n *node) kill() {
	n.t.Helper()
	n.signal(syscall.SIGKILL)
	<-n.exited
}

// stop ends the agent as kubelet does, and insists that it ends well.
func (n *node) stop() {
	n.t.Helper()
	n.signal(syscall.SIGTERM)
	select {
	case <-n.exited:
	case <-time.After(patience):
		n.signal(syscall.SIGQUIT) // the log will tell what hangs
		<-n.exited
		n.t.Errorf("%s did not end after SIGTERM", n.name)
		return
	}
	if n.err != nil {
		n.t.Errorf("%s ended with %v", n.name, n.err)
	}
}

// get asks the admin API.
func (n *node) get(path string, out any) error {
	resp, err := n.admin.Get("http://" + n.adminAddr() + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	switch text, isText := out.(*string); {
	case err != nil:
		return err
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("%s: %s: %s", path, resp.Status, body)
	case isText:
		*text = string(body)
	case out != nil:
		return json.Unmarshal(body, out)
	}
	return nil
}

// status is zero while the agent does not answer.
func (n *node) status() (s agent.Status) {
	if n.alive() {
		_ = n.get("/api/v1/status", &s) // conditions look again
	}
	return s
}

// awaitIndexed waits until the node knows of so many blobs and tags that others hold: the
// index is gossip, and late.
func (n *node) awaitIndexed(blobs int) {
	n.t.Helper()
	eventually(n.t, n.name+" knows what others hold", func() error {
		var metrics string
		if err := n.get("/metrics", &metrics); err != nil {
			return err
		}
		_, after, _ := strings.Cut(metrics, "\nlarder_index_blobs ")
		value, _, _ := strings.Cut(after, "\n")
		if got, err := strconv.ParseFloat(value, 64); err != nil || int(got) < blobs {
			return fmt.Errorf("%q of %d blobs in the index", value, blobs)
		}
		return nil
	})
}

// names of the members that the node sees, itself included.
func (n *node) members() (names []string) {
	for _, m := range n.status().Members {
		names = append(names, m.Name)
	}
	return names
}

// fill is the node's fetch of a blob, and how much of it came from the registry
// and from peers.
func (n *node) fill(d digest.Digest) (upstream, peers int64) {
	for _, f := range n.status().Fills {
		if f.Digest != d {
			continue
		}
		for _, o := range f.Origins {
			switch o.Kind {
			case "upstream":
				upstream += o.Bytes
			case "peer":
				peers += o.Bytes
			}
		}
	}
	return upstream, peers
}

func (n *node) log() string {
	text, err := os.ReadFile(n.logFile())
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// linksOf finds the number of links in a status' line on peers.
var linksOf = regexp.MustCompile(`, (\d+) links?, `)

// resources counts what the agent has open.
func (n *node) resources() (r resources, err error) {
	var goroutines string
	if err := n.get("/debug/pprof/goroutine?debug=1", &goroutines); err != nil {
		return r, err
	}
	if _, err := fmt.Sscanf(goroutines, "goroutine profile: total %d", &r.goroutines); err != nil {
		return r, fmt.Errorf("goroutine profile: %w", err)
	}
	peers := n.status().Peers
	if links := linksOf.FindStringSubmatch(peers); links != nil {
		if r.links, err = strconv.Atoi(links[1]); err != nil {
			return r, fmt.Errorf("links in %q: %w", peers, err)
		}
	} else if !strings.HasPrefix(peers, "alone") {
		return r, fmt.Errorf("no number of links in %q", peers)
	}
	dir := fmt.Sprintf("/proc/%d/fd", n.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		target, _ := os.Readlink(filepath.Join(dir, e.Name())) // fails for one closed since
		switch {
		case strings.HasPrefix(target, "socket:"):
			r.sockets++
		case strings.HasPrefix(target, "/"):
			r.files++
			if strings.Contains(target, "/sha256/") || strings.Contains(target, "/ingest/") {
				r.blobs = append(r.blobs, filepath.Base(target))
			}
		}
	}
	return r, err
}

// A link to a peer lives on for a while after its last use. This is what one
// costs at most: a reader, a writer and those who serve its requests.
const goroutinesOfLink = 6

// leaks compares with the time before the first pull.
func (n *node) leaks() error {
	if s := n.status(); len(s.Fills)+len(s.Pulls) > 0 {
		return fmt.Errorf("%d fills and %d pulls under way", len(s.Fills), len(s.Pulls))
	}
	now, err := n.resources()
	if err != nil {
		return err
	}
	links := max(now.links-n.idle.links, 0)
	const slack = 3 // a scrape, a probe of memberlist, an idle connection to the registry
	if now.files > n.idle.files || now.sockets > n.idle.sockets+links+slack ||
		now.goroutines > n.idle.goroutines+goroutinesOfLink*links+3*slack {
		return fmt.Errorf("before %+v, now %+v", n.idle, now)
	}
	return nil
}

// checkCache fails if the cache holds a blob that is not what its name says.
func (n *node) checkCache() {
	n.t.Helper()
	blobs, err := filepath.Glob(filepath.Join(n.cache(), "blobs", "sha256", "*"))
	if err != nil {
		n.t.Fatal(err)
	}
	for _, name := range blobs {
		f, err := os.Open(name)
		if err != nil {
			n.t.Fatal(err)
		}
		d, err := digest.FromReader(f)
		f.Close()
		if err != nil || d.Encoded() != filepath.Base(name) {
			n.t.Errorf("%s holds %s as %s: %v", n.name, d, filepath.Base(name), err)
		}
	}
}

// checkLog fails if the agent has said what it must never say.
func (n *node) checkLog() {
	n.t.Helper()
	log, err := os.ReadFile(n.logFile())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, never := range []string{"WARNING: DATA RACE", "panic:", "fatal error:"} {
		if i := bytes.Index(log, []byte(never)); i >= 0 {
			n.t.Errorf("%s logged %q:\n%.4000s", n.name, never, log[i:])
		}
	}
}

// containerd is the client of the node.
func (n *node) containerd() *runtimetest.Containerd {
	return &runtimetest.Containerd{
		CertsDir: n.certs(), Root: filepath.Join(n.dir, "content"), Dial: n.dial,
		KeepIngests: true, // kubelet tries again long before the garbage collection
	}
}

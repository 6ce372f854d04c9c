package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bench runs scenarios.
type bench struct {
	larder, registry     string
	agentFlags           string
	keepLogs, skipDirect bool
	withFloor            bool
	runs                 int    // of each scenario through Larder
	profile              string // directory for CPU profiles of the agents
}

// lab is one scenario's machinery.
type lab struct {
	*bench
	s       scenario
	net     *network
	dir     string
	mounted bool
	reg     *exec.Cmd
	agents  []*exec.Cmd
}

// storm builds a cluster, runs the storm and takes everything down again.
func (b *bench) storm(ctx context.Context, s scenario, through bool) (o outcome, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	l := &lab{bench: b, s: s}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.build(ctx, through); err != nil {
		return o, err
	}
	return l.run(ctx)
}

// build makes the network, the registry with the image, and the agents.
func (l *lab) build(ctx context.Context, through bool) error {
	if err := l.mount(ctx); err != nil {
		return err
	}
	prefix := fmt.Sprintf("storm%d", os.Getpid())
	var err error
	if l.net, err = newNetwork(ctx, prefix); err != nil {
		return err
	}
	if err := l.net.attach(ctx, registryHost, l.s.uplink); err != nil {
		return err
	}
	for i := 1; i <= l.s.nodes; i++ {
		if err := l.net.attach(ctx, i, l.s.link); err != nil {
			return err
		}
		if err := l.writeHosts(i); err != nil {
			return err
		}
	}
	if err := l.startRegistry(ctx); err != nil {
		return err
	}
	if through {
		return l.startAgents(ctx)
	}
	return nil
}

// mount puts everything on a tmpfs: all nodes share this machine's one disk,
// which nodes do not.
func (l *lab) mount(ctx context.Context) error {
	var err error
	if l.dir, err = os.MkdirTemp("", "larder-storm-"); err != nil {
		return err
	}
	err = commands(ctx, "mount -t tmpfs -o size=75% storm "+l.dir)
	l.mounted = err == nil
	return err
}

func (l *lab) nodeDir(host int, sub ...string) string {
	return filepath.Join(append([]string{l.dir, fmt.Sprintf("node-%d", host)}, sub...)...)
}

func registryAddr() string { return net.JoinHostPort(address(registryHost), "5000") }

// writeHosts says where registry.test is; the agent takes it over as its
// upstream.
func (l *lab) writeHosts(host int) error {
	dir := l.nodeDir(host, "certs.d", registryName)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("server = \"http://%s\"\n", registryAddr())
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644)
}

func (l *lab) startRegistry(ctx context.Context) error {
	config := filepath.Join(l.dir, "registry.yml")
	text := fmt.Sprintf("version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: %s\nhttp:\n  addr: %s\n",
		filepath.Join(l.dir, "registry"), registryAddr())
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return err
	}
	l.reg = l.net.inside(ctx, registryHost, l.registry, "serve", config)
	l.reg.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	if err := l.start(l.reg, "registry"); err != nil {
		return err
	}
	var sizes []string
	for _, n := range l.s.layers {
		sizes = append(sizes, strconv.FormatInt(n, 10))
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return eventually(ctx, 20*time.Second, func() error {
		out, err := l.net.inside(ctx, registryHost, self, "push", registryAddr(), strings.Join(sizes, ",")).CombinedOutput()
		if err != nil {
			return fmt.Errorf("push: %w: %s", err, out)
		}
		return nil
	})
}

// start starts cmd with its output in a log file of its own.
func (l *lab) start(cmd *exec.Cmd, label string) error {
	log, err := os.Create(filepath.Join(l.dir, label+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", label, err)
	}
	return nil
}

func (l *lab) startAgents(ctx context.Context) error {
	key := make([]byte, 32)
	copy(key, "a key for a benchmark on one host")
	keyFile := filepath.Join(l.dir, "key")
	if err := os.WriteFile(keyFile, []byte(base64.StdEncoding.EncodeToString(key)), 0o600); err != nil {
		return err
	}
	for i := 1; i <= l.s.nodes; i++ {
		args := []string{"agent",
			"--peer.name", fmt.Sprintf("node-%d", i), "--peer.advertise", address(i), "--peer.key_file", keyFile,
			"--peer.gossip", address(i) + ":5052", "--peer.data", address(i) + ":5051",
			"--peer.join", address(1) + ":5052," + address(2) + ":5052",
			"--cache.dir", l.nodeDir(i, "cache"), "--cache.min_free", "1%", "--cache.max_bytes", "90%",
			"--hosts.containerd", l.nodeDir(i, "certs.d")}
		cmd := l.net.inside(ctx, i, l.larder, append(args, strings.Fields(l.agentFlags)...)...)
		if err := l.start(cmd, fmt.Sprintf("agent-%d", i)); err != nil {
			return err
		}
		l.agents = append(l.agents, cmd)
	}
	return l.awaitMembers(ctx)
}

// awaitMembers waits until every agent sees all the others.
func (l *lab) awaitMembers(ctx context.Context) error {
	for i := 1; i <= l.s.nodes; i++ {
		err := eventually(ctx, 60*time.Second, func() error {
			out, err := l.net.inside(ctx, i, "curl", "-sf", "--max-time", "2", "http://127.0.0.1:5053/metrics").Output()
			if err != nil {
				return fmt.Errorf("agent %d does not answer: %w", i, err)
			}
			if n := sample(string(out), "larder_peer_members"); int(n) < l.s.nodes {
				return fmt.Errorf("agent %d sees %v of %d members", i, n, l.s.nodes)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// sample finds the value of a metric without labels; -1 if it is not there.
func sample(metrics, name string) float64 {
	for line := range strings.Lines(metrics) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			if f, err := strconv.ParseFloat(strings.TrimSpace(value), 64); err == nil {
				return f
			}
		}
	}
	return -1
}

// run pulls on every node at once.
func (l *lab) run(ctx context.Context) (outcome, error) {
	first := 1
	if l.s.seeded {
		if _, err := l.pull(ctx, 1, 1); err != nil {
			return outcome{}, fmt.Errorf("seed: %w", err)
		}
		if err := stopProcess(l.reg); err != nil {
			return outcome{}, err
		}
		l.reg, first = nil, 2
	}
	sent, logged := l.registrySent(ctx), l.registryAnswers()
	finish, err := l.startProfiles(ctx)
	if err != nil {
		return outcome{}, err
	}
	before := l.used()
	reports, err := l.pull(ctx, first, l.s.nodes)
	cost := l.used().since(before)
	err = errors.Join(err, finish())
	if err != nil {
		return outcome{}, err
	}
	given := l.registryAnswers()
	o := outcome{requests: given.requests - logged.requests, cost: cost, rss: l.peakRSS()}
	o.copies = float64(l.registrySent(ctx)-sent) / float64(l.s.bytes())
	o.answered = float64(given.bytes-logged.bytes) / float64(l.s.bytes())
	for _, r := range reports {
		o.times = append(o.times, r.Seconds)
		o.cost.clients += r.CPU
	}
	slices.Sort(o.times)
	return o, nil
}

// profileSeconds covers a storm that meets its goal.
const profileSeconds = 5

// startProfiles profiles every agent's CPU if that was asked for; finish waits
// for the files.
func (l *lab) startProfiles(ctx context.Context) (finish func() error, err error) {
	var running []*exec.Cmd
	finish = func() (err error) {
		for _, cmd := range running {
			err = errors.Join(err, cmd.Wait())
		}
		return err
	}
	if l.profile == "" {
		return finish, nil
	}
	if err := os.MkdirAll(l.profile, 0o755); err != nil {
		return finish, err
	}
	for i := range l.agents {
		cmd := l.net.inside(ctx, i+1, "curl", "-sf", "-o", filepath.Join(l.profile, fmt.Sprintf("%s-%d.pprof", l.s.name, i+1)),
			fmt.Sprintf("http://127.0.0.1:5053/debug/pprof/profile?seconds=%d", profileSeconds))
		if err := cmd.Start(); err != nil {
			return finish, err
		}
		running = append(running, cmd)
	}
	return finish, nil
}

// client is one pulling process.
type client struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// pull lets the nodes from..to pull together and returns what they report.
func (l *lab) pull(ctx context.Context, from, to int) ([]pulled, error) {
	var clients []client
	for i := from; i <= to; i++ {
		c, err := l.startClient(ctx, i)
		if err != nil {
			return nil, err
		}
		clients = append(clients, c)
	}
	for _, c := range clients {
		if _, err := io.WriteString(c.in, "go\n"); err != nil {
			return nil, err
		}
	}
	var reports []pulled
	for _, c := range clients {
		var report pulled
		err := json.NewDecoder(c.out).Decode(&report)
		err = errors.Join(err, c.cmd.Wait())
		switch {
		case err != nil:
			return nil, fmt.Errorf("client: %w", err)
		case report.Err != "":
			return nil, fmt.Errorf("pull: %s", report.Err)
		case report.Bytes < l.s.bytes():
			return nil, fmt.Errorf("a client got %d of %d bytes", report.Bytes, l.s.bytes())
		}
		reports = append(reports, report)
	}
	return reports, nil
}

func (l *lab) startClient(ctx context.Context, host int) (client, error) {
	self, err := os.Executable()
	if err != nil {
		return client{}, err
	}
	cmd := l.net.inside(ctx, host, self, "pull", "-certs", l.nodeDir(host, "certs.d"), "-root", l.nodeDir(host, "content"))
	return startReady(cmd)
}

// startReady starts one of this program's subcommands that waits for "go".
func startReady(cmd *exec.Cmd) (client, error) {
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return client{}, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return client{}, err
	}
	if err := cmd.Start(); err != nil {
		return client{}, err
	}
	c := client{cmd, in, bufio.NewReader(out)}
	if line, err := c.out.ReadString('\n'); err != nil || line != "ready\n" {
		return client{}, fmt.Errorf("%s said %q: %w", cmd, line, err)
	}
	return c, nil
}

// registrySent is what the registry's link has carried away, headers and all.
func (l *lab) registrySent(ctx context.Context) int64 {
	out, err := exec.CommandContext(ctx, "ip", "netns", "exec", l.net.space(registryHost),
		"cat", "/sys/class/net/eth0/statistics/tx_bytes").Output()
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	return n
}

// answers are what the registry's access log says that it answered.
type answers struct {
	requests int
	bytes    int64 // of bodies, as far as the registry wrote them
}

// accessLine is a line of the access log, in Apache's combined format.
var accessLine = regexp.MustCompile(`"(?:GET|HEAD) /v2/[^"]*" \d+ (\d+)`)

func (l *lab) registryAnswers() (a answers) {
	text, err := os.ReadFile(filepath.Join(l.dir, "registry.log"))
	if err != nil {
		return a
	}
	for _, m := range accessLine.FindAllSubmatch(text, -1) {
		n, _ := strconv.ParseInt(string(m[1]), 10, 64)
		a.requests++
		a.bytes += n
	}
	return a
}

// close ends every process and removes the network and the files.
func (l *lab) close() error {
	var errs []error
	for _, agent := range l.agents {
		errs = append(errs, agent.Process.Signal(syscall.SIGTERM))
	}
	for _, agent := range l.agents {
		errs = append(errs, stopProcess(agent))
	}
	if l.reg != nil {
		errs = append(errs, stopProcess(l.reg))
	}
	if l.net != nil {
		errs = append(errs, l.net.remove())
	}
	if l.keepLogs {
		errs = append(errs, l.saveLogs())
	}
	if l.mounted {
		errs = append(errs, commands(context.Background(), "umount -l "+l.dir))
	}
	return errors.Join(append(errs, os.RemoveAll(l.dir))...)
}

func (l *lab) saveLogs() error {
	to, err := os.MkdirTemp("", "larder-storm-logs-")
	if err != nil {
		return err
	}
	fmt.Println("  logs:", to)
	logs, err := filepath.Glob(filepath.Join(l.dir, "*.log"))
	if err != nil {
		return err
	}
	for _, from := range logs {
		text, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, filepath.Base(from)), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// stopProcess asks cmd to end and, if it does not, makes it.
func stopProcess(cmd *exec.Cmd) error {
	_ = cmd.Process.Signal(syscall.SIGTERM) // it may be gone already
	kill := time.AfterFunc(15*time.Second, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil // ended by our signal, or by its own error, which its log tells
	}
	return err
}

// eventually tries until try succeeds.
func eventually(ctx context.Context, within time.Duration, try func() error) error {
	deadline := time.Now().Add(within)
	for {
		err := try()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

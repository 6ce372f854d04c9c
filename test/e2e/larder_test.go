package e2e

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// agent is a running `larder agent`.
type agent struct {
	t     *testing.T
	proxy string // host:port
	admin string // host:port
	dir   string // cache.dir
	proc  *process
	args  []string
	env   []string
	bin   string
	dial  dialer

	mayFail bool
}

// agentOptions says how an agent differs from the default.
type agentOptions struct {
	containerd *containerd // manages its certs.d
	crio       string      // registries.conf.d to manage
	cacheDir   string      // "" is a directory of its own
	bin        string      // "" is larder
	config     string      // TOML, for [[registry]] tables
	flags      []string
	env        []string
	dial       dialer // how the tests reach it; nil = on loopback
	mayFail    bool   // an error in the log is what the test is about
}

// startAgent runs an agent that is alone (no peers) and waits until it is ready.
func startAgent(t *testing.T, o agentOptions) *agent {
	t.Helper()
	dir := tempDir(t)
	a := &agent{
		t:     t,
		proxy: "127.0.0.1:" + strconv.Itoa(freePort(t)),
		admin: "127.0.0.1:" + strconv.Itoa(freePort(t)),
		dir:   filepath.Join(dir, "cache"),
		env:   o.env,
		bin:   cmp.Or(o.bin, run.larder),
		dial:  o.dial,

		mayFail: o.mayFail,
	}
	if o.cacheDir != "" {
		a.dir = o.cacheDir
	}
	a.args = []string{"agent",
		"--config", writeFile(t, filepath.Join(dir, "larder.toml"), o.config),
		"--proxy.listen", a.proxy, "--admin.listen", a.admin,
		"--cache.dir", a.dir, "--cache.max_bytes", "8GiB", "--cache.min_free", "1GiB",
		"--peer.enabled=false", "--log.level", "debug",
	}
	if o.containerd != nil {
		a.args = append(a.args, "--hosts.containerd", o.containerd.certs)
	}
	if o.crio != "" {
		a.args = append(a.args, "--hosts.crio", o.crio)
	}
	a.args = append(a.args, o.flags...)
	a.start()
	return a
}

func (a *agent) start() {
	a.t.Helper()
	cmd := exec.Command(a.bin, a.args...)
	cmd.Env = append(offline(), a.env...)
	var p *process
	a.t.Cleanup(func() { checkLog(a.t, p, a.mayFail) }) // runs after p has ended
	p = startProcess(a.t, "larder", cmd)
	a.proc = p
	eventually(a.t, 30*time.Second, "agent is ready", func() error {
		_, err := a.get("/readyz")
		return errors.Join(a.proc.dead(), err)
	})
}

// checkLog fails the test if the agent has done what none ever may, whatever was
// done to it: raced, panicked, or (unless it may fail) called for an operator.
func checkLog(t *testing.T, p *process, mayFail bool) {
	if p == nil {
		return // startProcess has failed the test
	}
	log := p.output()
	nevers := []string{"WARNING: DATA RACE", "panic", "level=ERROR"}
	if mayFail {
		nevers = nevers[:2]
	}
	for _, never := range nevers {
		if i := bytes.Index(log, []byte(never)); i >= 0 {
			t.Errorf("agent logged %q:\n%.4000s", never, log[i:])
		}
	}
}

// openBlobs names the files of the cache that the agent has open.
func (a *agent) openBlobs() []string {
	a.t.Helper()
	fds := fmt.Sprintf("/proc/%d/fd", a.proc.cmd.Process.Pid)
	entries, err := os.ReadDir(fds)
	if err != nil {
		a.t.Fatal(err)
	}
	var open []string
	for _, e := range entries {
		file, err := os.Readlink(filepath.Join(fds, e.Name())) // fails for one closed since
		if err == nil && strings.HasPrefix(file, filepath.Join(a.dir, "blobs")) {
			open = append(open, file)
		}
	}
	return open
}

// stop is SIGTERM, as kubelet sends it; kill is `kill -9`.
func (a *agent) stop() {
	a.t.Helper()
	if err := a.proc.stop(30 * time.Second); err != nil {
		a.t.Fatal(err)
	}
	if a.proc.err != nil {
		a.t.Fatalf("agent after SIGTERM: %v", a.proc.err)
	}
}

func (a *agent) kill() { a.proc.kill() }

// get asks the admin API.
func (a *agent) get(path string) (string, error) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: a.dial}}
	resp, err := client.Get("http://" + a.admin + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", path, resp.Status, body)
	}
	return string(body), err
}

// metric sums the samples of a counter or gauge whose labels contain all of
// these, given as `name="value"`.
func (a *agent) metric(name string, labels ...string) float64 {
	a.t.Helper()
	text, err := a.get("/metrics")
	if err != nil {
		a.t.Fatal(err)
	}
	var sum float64
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest == "" || (rest[0] != '{' && rest[0] != ' ') || !containsAll(rest, labels) {
			continue
		}
		fields := strings.Fields(rest)
		v, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err != nil {
			a.t.Fatalf("metric line %q: %v", line, err)
		}
		sum += v
	}
	return sum
}

func containsAll(s string, parts []string) bool {
	for _, p := range parts {
		if !strings.Contains(s, p) {
			return false
		}
	}
	return true
}

// stores reports whether the agent keeps a copy of a blob of its own.
func (a *agent) stores(hex string) bool {
	_, err := os.Stat(filepath.Join(a.dir, "blobs", "sha256", hex))
	return err == nil
}

// larder runs a command of the binary under test to its end.
func larder(t *testing.T, args ...string) (stdout string, code int) {
	t.Helper()
	cmd := exec.Command(run.larder, args...)
	cmd.Env = offline()
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		t.Logf("larder %s: exit %d\n%s%s", strings.Join(args, " "), exit.ExitCode(), out, errs.String())
		return string(out), exit.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(out), 0
}

// snapshot describes every file below dir: kind, mode and content.
func snapshot(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %s\n", info.Mode(), rel)
		if info.Mode().IsRegular() {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, "%s\n", content)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// registryTable is the [[registry]] table that lets the agent reach r under the
// name by which images call it.
func registryTable(host string, r *registry) string {
	return fmt.Sprintf("[[registry]]\nhost = %q\nupstreams = [%q]\nca_file = %q\n", host, r.url(), r.caFile)
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

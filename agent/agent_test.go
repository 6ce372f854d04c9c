package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

// TestMain also checks that no test leaves a goroutine behind, but for memberlist's
// probes, which end by themselves up to a probe interval after Shutdown.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/hashicorp/memberlist.(*Memberlist).triggerFunc"))
}

// testRegistry is the name of the registry in tests' images.
const testRegistry = "registry.example.test"

// testConfig is an agent alone, on free ports, in a directory of its own.
func testConfig(t *testing.T) Config {
	t.Helper()
	c := Default()
	c.Proxy.Listen, c.Admin.Listen = "127.0.0.1:0", "127.0.0.1:0"
	c.Cache.Dir = filepath.Join(t.TempDir(), "cache")
	c.Peer.Enabled, c.Peer.Name = false, "node-1"
	c.Proxy.DrainTimeout = 5 * time.Second
	c.Cache.MinFree = cache.Bytes(0)
	return c
}

// startRegistry runs a registry that c's agent knows as testRegistry, with a
// small image app:v1.
func startRegistry(t *testing.T, c *Config) (*registrytest.Server, *registrytest.Image) {
	t.Helper()
	reg := registrytest.Start(t, registrytest.Options{})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{300 << 10, 5 << 10}})
	reg.Put("team/app", img, "v1")
	c.Registries = append(c.Registries, upstream.Registry{Host: testRegistry, Upstreams: []string{reg.URL()}})
	return reg, img
}

var testImage = Image{Registry: testRegistry, Repository: "team/app", Reference: "v1"}

// running is an agent whose Run is under way.
type running struct {
	*Agent
	cancel context.CancelFunc
	done   chan struct{}
	err    error // of Run, after done
	client *http.Client
}

// start runs an agent until the test ends.
func start(t *testing.T, c Config, opts ...Option) *running {
	t.Helper()
	a, err := New(c, append([]Option{WithLogger(testLogger(t))}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{Agent: a, cancel: cancel, done: make(chan struct{}), client: &http.Client{Transport: &http.Transport{}}}
	go func() {
		defer close(r.done)
		r.err = a.Run(ctx)
	}()
	t.Cleanup(func() {
		if err := r.stop(t); err != nil && !errors.Is(err, proxy.ErrWedged) {
			t.Errorf("Run: %v", err)
		}
	})
	eventually(t, "ready", func() error { return a.proxyCheck() })
	return r
}

// stop ends the agent and waits for it.
func (r *running) stop(t *testing.T) error {
	t.Helper()
	r.cancel()
	select {
	case <-r.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the agent does not stop")
	}
	r.client.CloseIdleConnections()
	return r.err
}

// eventually waits for a condition that other goroutines bring about.
func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not %s: %v", what, err)
		}
	}
}

func (r *running) pull(t *testing.T) []Pulled {
	t.Helper()
	parts, err := Puller{Proxy: "http://" + r.ProxyAddr(), Client: r.client, Platform: "linux/amd64"}.Pull(t.Context(), testImage)
	if err != nil {
		t.Fatal(err)
	}
	return parts
}

// readBlob reads one blob of testImage, as a runtime does in the middle of a pull.
func (r *running) readBlob(d digest.Digest) (int64, error) {
	resp, err := r.client.Get("http://" + r.ProxyAddr() + "/v2/" + testImage.Repository + "/blobs/" + d.String() + "?ns=" + testImage.Registry)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, errors.New(resp.Status)
	}
	v := d.Verifier()
	n, err := io.Copy(v, resp.Body)
	if err == nil && !v.Verified() {
		err = errors.New("wrong bytes")
	}
	return n, err
}

// settle waits until what was pulled is committed to disk.
func (r *running) settle(t *testing.T) {
	t.Helper()
	eventually(t, "committed", func() error {
		if n := len(r.cache.Fills()); n > 0 {
			return fmt.Errorf("%d fills run", n)
		}
		return nil
	})
}

// admin asks the admin API.
func (r *running) admin(t *testing.T, method, path, body string, header ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+r.AdminAddr()+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			req.Host = header[i+1]
		}
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := r.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func sources(parts []Pulled) map[string]int64 {
	out := map[string]int64{}
	for _, p := range parts {
		out[p.Source] += p.Bytes
	}
	return out
}

// TestColdThenWarm pulls through a whole agent, and again when the registry is
// gone and the agent has been restarted on the same directory.
func TestColdThenWarm(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	a := start(t, c)
	cold := sources(a.pull(t))
	if cold["disk"] != 0 || cold["upstream"] == 0 {
		t.Errorf("cold pull by source: %v, want upstream alone", cold)
	}
	for d := range img.Blobs {
		if n := reg.Count(registrytest.Match{Kind: registrytest.Blob, Reference: d.String()}); n != 1 {
			t.Errorf("blob %s was asked for %d times, want once", d, n)
		}
	}
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	reg.Down()
	a = start(t, c)
	warm := sources(a.pull(t))
	if warm["upstream"] != 0 || warm["disk"]+warm["stale"] != cold["upstream"] {
		t.Errorf("warm pull by source: %v, want %d from disk", warm, cold["upstream"])
	}
}

func TestReadiness(t *testing.T) {
	c := testConfig(t)
	c.Hosts.Containerd = filepath.Join(t.TempDir(), "certs.d")
	a := start(t, c)
	eventually(t, "ready", func() error { return a.hostsInPlace() })
	if status, body := a.admin(t, "GET", "/healthz", ""); status != 200 || body != "ok\n" {
		t.Errorf("/healthz: %d %q", status, body)
	}
	if status, body := a.admin(t, "GET", "/readyz", ""); status != 200 || body != "ready\n" {
		t.Errorf("/readyz: %d %q", status, body)
	}
	a.setHostsErr(errors.New("no such mount"))
	if status, body := a.admin(t, "GET", "/readyz", ""); status != 503 || body != "not ready: hosts: no such mount\n" {
		t.Errorf("/readyz: %d %q", status, body)
	}
	status, body := a.admin(t, "GET", "/readyz", "", "Accept", "application/json")
	var answer struct {
		Ready  bool
		Checks []Check
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || status != 503 || answer.Ready || len(answer.Checks) != 3 {
		t.Errorf("/readyz as JSON: %d %q %v", status, body, err)
	}
}

// TestHostsFollowTheProxy: host configuration is there while the
// agent serves, and what was there before is back afterwards.
func TestHostsFollowTheProxy(t *testing.T) {
	c := testConfig(t)
	dir := t.TempDir()
	c.Hosts.Containerd = dir
	before := "server = \"https://mine.example\"\n[host.\"https://mirror.example\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
	file := filepath.Join(dir, "mine.example", "hosts.toml")
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(before), 0o644)); err != nil {
		t.Fatal(err)
	}
	a := start(t, c)
	eventually(t, "in place", func() error { return a.hostsInPlace() })
	for _, name := range []string{"_default", "mine.example"} {
		body, err := os.ReadFile(filepath.Join(dir, name, "hosts.toml"))
		if err != nil || !strings.Contains(string(body), a.ProxyAddr()) {
			t.Errorf("%s does not name the proxy %s: %v\n%s", name, a.ProxyAddr(), err, body)
		}
	}
	if p := a.upstream.Policy("mine.example"); !slices.Contains(p.Upstreams, "https://mirror.example/v2") {
		t.Errorf("the existing mirror is no upstream: %v", p.Upstreams)
	}
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	if body, err := os.ReadFile(file); err != nil || string(body) != before {
		t.Errorf("the file is not what it was: %v\n%s", err, body)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// TestUpstreamsFollowTheHosts holds that a mirror which an operator writes into
// containerd's configuration while the agent runs becomes an upstream, and that
// one which is taken out is one no more; what the agent's own file says stays.
func TestUpstreamsFollowTheHosts(t *testing.T) {
	c := testConfig(t)
	c.Hosts.Containerd = t.TempDir()
	c.Registries = append(c.Registries, upstream.Registry{Host: "ours.example", Upstreams: []string{"https://fixed.example"}})
	mirror, img := startRegistry(t, &Config{})
	a := start(t, c)
	eventually(t, "in place", func() error { return a.hostsInPlace() })
	dir := filepath.Join(c.Hosts.Containerd, testRegistry)
	theirs := fmt.Sprintf("server = \"http://127.0.0.1:1\"\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", mirror.URL())
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(theirs), 0o644)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "followed", func() error {
		if p := a.upstream.Policy(testRegistry); len(p.Upstreams) != 2 {
			return fmt.Errorf("upstreams %v", p.Upstreams)
		}
		return nil
	})
	if got := sources(a.pull(t)); got["upstream"] == 0 || mirror.Count(registrytest.Match{Kind: registrytest.Blob}) < len(img.Blobs) {
		t.Errorf("the mirror was not used: %v", got)
	}
	if p := a.upstream.Policy("ours.example"); len(p.Upstreams) != 1 || p.Upstreams[0] != "https://fixed.example" {
		t.Errorf("a configured registry has become %v", p.Upstreams)
	}
}

// TestWedged: where the handlers of an agent answer nobody, the port is
// closed within seconds, host configuration goes, and Run ends with an error
// so that the process starts anew.
func TestWedged(t *testing.T) {
	c := testConfig(t)
	c.Hosts.Containerd = filepath.Join(t.TempDir(), "certs.d")
	release := make(chan struct{})
	wedge := func(*http.Request) { <-release }
	fast := proxy.Watch{Interval: 20 * time.Millisecond, Timeout: 100 * time.Millisecond, Slack: 100 * time.Millisecond}
	a := start(t, c, func(o *options) { o.wedge, o.watch = wedge, fast })
	select {
	case <-a.done:
	case <-time.After(10 * time.Second):
		t.Fatal("a wedged agent goes on")
	}
	if !errors.Is(a.err, proxy.ErrWedged) {
		t.Errorf("Run: %v, want ErrWedged", a.err)
	}
	if conn, err := net.Dial("tcp", a.ProxyAddr()); err == nil {
		conn.Close()
		t.Error("the port still takes connections")
	}
	if _, err := os.Stat(c.Hosts.Containerd); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("host configuration is left: %v", err)
	}
	close(release)
}

// TestPullsFinishOnStop stops the agent in the middle of a body: the pull ends
// well within the drain.
func TestPullsFinishOnStop(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	layer := img.Layers[0]
	fault := reg.Inject(registrytest.Match{Kind: registrytest.Blob, Reference: layer.Digest.String()}, registrytest.Hold())
	a := start(t, c)
	got := make(chan error, 1)
	go func() {
		_, err := a.readBlob(layer.Digest)
		got <- err
	}()
	<-fault.Held()
	a.cancel()
	eventually(t, "stopping", func() error {
		if a.state.Load() != stateStopping {
			return errors.New("serving")
		}
		return nil
	})
	fault.Release()
	if err := <-got; err != nil {
		t.Errorf("the pull: %v", err)
	}
	if err := a.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

// TestFailedStarts holds that a start that cannot work says why and what to
// do, leaves no port open, and takes back what a killed agent left.
func TestFailedStarts(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		change func(*Config)
		want   []string
	}{
		{"proxy port taken", func(c *Config) { c.Proxy.Listen = taken.Addr().String() }, []string{"proxy.listen", "address already in use", "another agent"}},
		{"admin port taken", func(c *Config) { c.Admin.Listen = taken.Addr().String() }, []string{"admin.listen", "address already in use"}},
		{"data port taken", func(c *Config) {
			c.Peer.Enabled, c.Peer.Data, c.Peer.Gossip = true, taken.Addr().String(), "127.0.0.1:0"
		},
			[]string{"peer.data", "address already in use", "another agent"}},
		{"gossip port taken", func(c *Config) {
			c.Peer.Enabled, c.Peer.Gossip, c.Peer.Data = true, taken.Addr().String(), "127.0.0.1:0"
		},
			[]string{"peer.gossip", "address already in use", "another agent"}},
		{"cache directory is a file", func(c *Config) { c.Cache.Dir = file }, []string{"cache.dir", file}},
		{"cache directory below a file", func(c *Config) { c.Cache.Dir = file + "/cache" }, []string{"cache.dir", file}},
		{"invalid configuration", func(c *Config) { c.Log.Level = "loud" }, []string{"log.level"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := testConfig(t)
			c.Hosts.Containerd = filepath.Join(t.TempDir(), "certs.d")
			if tt.name != "invalid configuration" {
				leaveHostsBehind(t, c)
			}
			tt.change(&c)
			_, err := New(c)
			if err == nil {
				t.Fatal("started")
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
			if _, err := os.Stat(c.Hosts.Containerd); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("host configuration is left: %v", err)
			}
		})
	}
}

// leaveHostsBehind writes host configuration as an agent that is then killed.
func leaveHostsBehind(t *testing.T, c Config) {
	t.Helper()
	c.Hosts.RemoveOnExit = false
	a := start(t, c)
	eventually(t, "in place", func() error { return a.hostsInPlace() })
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(c.Hosts.Containerd, "_default", "hosts.toml")); err != nil {
		t.Fatal(err)
	}
}

// TestSecondAgent holds that an agent that cannot start leaves the host
// configuration of the one that serves alone.
func TestSecondAgent(t *testing.T) {
	c := testConfig(t)
	c.Hosts.Containerd = filepath.Join(t.TempDir(), "certs.d")
	a := start(t, c)
	eventually(t, "in place", func() error { return a.hostsInPlace() })
	c.Proxy.Listen = a.ProxyAddr()
	if _, err := New(c); err == nil {
		t.Fatal("two agents on one port")
	}
	if _, err := os.Stat(filepath.Join(c.Hosts.Containerd, "_default", "hosts.toml")); err != nil {
		t.Errorf("the first agent's host configuration: %v", err)
	}
}

// TestHostsUnwritable holds that an agent which cannot point a runtime at
// itself serves all the same, and says why it is not ready.
func TestHostsUnwritable(t *testing.T) {
	c := testConfig(t)
	startRegistry(t, &c)
	c.Hosts.Containerd = "/proc/larder/certs.d"
	a := start(t, c)
	eventually(t, "noticed", func() error {
		if code, body := a.admin(t, "GET", "/readyz", ""); code != 503 || !strings.Contains(body, "/proc/larder") {
			return fmt.Errorf("/readyz: %d %s", code, body)
		}
		return nil
	})
	a.pull(t)
}

// TestProxyOnEveryAddress holds that runtimes on this node, and the agent
// itself, use loopback when the proxy listens everywhere.
func TestProxyOnEveryAddress(t *testing.T) {
	c := testConfig(t)
	startRegistry(t, &c)
	c.Proxy.Listen, c.Proxy.AllowRemote = ":0", true
	c.Hosts.Containerd = filepath.Join(t.TempDir(), "certs.d")
	a := start(t, c)
	eventually(t, "in place", func() error { return a.hostsInPlace() })
	_, port, err := net.SplitHostPort(a.ProxyAddr())
	if err != nil {
		t.Fatal(err)
	}
	body, err := os.ReadFile(filepath.Join(c.Hosts.Containerd, "_default", "hosts.toml"))
	if err != nil || !strings.Contains(string(body), "http://127.0.0.1:"+port) {
		t.Errorf("%v\n%s", err, body)
	}
	request := `{"images": ["` + testImage.String() + `"], "platform": "linux/amd64"}`
	if code, answer := a.admin(t, "POST", "/api/v1/warm", request, "Content-Type", "application/json"); code != 200 || strings.Contains(answer, "error") {
		t.Errorf("warm: %d %s", code, answer)
	}
}

// TestAudit holds that each pull of content is one line.
func TestAudit(t *testing.T) {
	c := testConfig(t)
	c.Audit.File = filepath.Join(t.TempDir(), "audit.jsonl")
	startRegistry(t, &c)
	a := start(t, c)
	parts := a.pull(t)
	if err := a.stop(t); err != nil {
		t.Fatal(err)
	}
	body, err := os.ReadFile(c.Audit.File)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.Split(bytes.TrimSpace(body), []byte("\n"))
	if len(lines) != len(parts) {
		t.Fatalf("%d lines for %d parts:\n%s", len(lines), len(parts), body)
	}
	for _, l := range lines {
		var line auditLine
		if err := json.Unmarshal(l, &line); err != nil {
			t.Fatal(err)
		}
		found := slices.ContainsFunc(parts, func(p Pulled) bool {
			return p.Digest.String() == line.Reference && p.Bytes == line.Bytes && p.Source == line.Source
		})
		if !found || line.Registry != testRegistry || line.Repository != "team/app" || line.Time.IsZero() {
			t.Errorf("line %s matches no part of the pull", l)
		}
	}
}

// testLogger shows what an agent says when its test fails.
func testLogger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// TestPortWaitsForTheDisk: as long as a start waits for the cache's directory, which
// another process has, or for a disk, nobody is kept waiting at the pull API's port.
func TestPortWaitsForTheDisk(t *testing.T) {
	first, second := testConfig(t), testConfig(t)
	start(t, first)
	second.Cache.Dir, second.Proxy.Listen = first.Cache.Dir, ownAddr(t)
	failed := make(chan error, 1)
	go func() {
		_, err := New(second)
		failed <- err
	}()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-failed:
			if err == nil {
				t.Error("two agents have one cache")
			}
			return
		case <-tick.C:
		}
		conn, err := net.Dial("tcp", second.Proxy.Listen)
		if err != nil {
			continue
		}
		err = conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		conn.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) { // and not closed at once, when the port was looked at
			t.Fatalf("the port accepts, and nobody answers: %v", <-failed)
		}
	}
}

// TestAddressThatIsNot: who names an address of another machine is not told to look for
// another agent.
func TestAddressThatIsNot(t *testing.T) {
	c := testConfig(t)
	c.Metrics.Listen = "192.0.2.1:0"
	_, err := New(c)
	if err == nil || !strings.Contains(err.Error(), "set another metrics.listen") || strings.Contains(err.Error(), "another agent") {
		t.Error(err)
	}
}

package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/hostsconfig"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// standIn answers every request to the admin API with one value: for golden
// files of what a real agent would not say twice.
func standIn(t *testing.T, v any) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if err := json.NewEncoder(w).Encode(v); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func TestStatusGolden(t *testing.T) {
	now := time.Now()
	d := digest.FromString("layer")
	s := agent.Status{
		Build: agent.Build{Version: "v1.2.3"}, Node: "node-1", Started: now.Add(-26 * time.Hour), Proxy: "127.0.0.1:5050",
		Checks: []agent.Check{{Name: "proxy", OK: true}, {Name: "hosts", Reason: "/etc/containerd/certs.d: read-only file system"}},
		Cache:  agent.CacheStatus{Dir: "/var/lib/larder", Blobs: 42, Bytes: 5 << 30, Limit: 20 << 30, Free: 100 << 30, MinFree: 40 << 30},
		Pins: agent.PinsStatus{Images: 12, Bytes: 2 << 30, Limit: 16 << 30, States: map[string]int{"held": 9, "fetching": 1, "missing": 2},
			Problem: "100.0 MiB are free on the disk", Trouble: []agent.Pin{{Image: "quay.io/org/app:v1", State: "missing", Error: "401 Unauthorized; the image is private"}}},
		Replicas: agent.ReplicasStatus{Wanted: 2, Lacking: 14, Stuck: 3, Made: 300, Problem: "cache has no room"},
		Pulls: []proxy.Pull{{Digest: d, Registry: "docker.io", Repository: "library/nginx", Reference: "1.29",
			Size: 40 << 20, Offset: 10 << 20, Source: "upstream", Started: now.Add(-3 * time.Minute)}},
		Fills: []agent.FillStatus{{Digest: d, Size: 40 << 20, Present: 30 << 20, Readers: 2, Started: now.Add(-4 * time.Minute),
			Origins: []agent.Origin{{Kind: "peer", Name: "node-2", Bytes: 20 << 20}, {Kind: "upstream", Name: "docker.io", Bytes: 10 << 20}}}},
		Served:  map[string]int64{"disk": 9 << 30, "upstream": 5 << 30, "stale": 0},
		Fetched: map[string]int64{"upstream": 3 << 30, "peer": 2 << 30}, Uploaded: 1 << 30,
		Upstreams: []upstream.Health{
			{Registry: "docker.io", Endpoint: "registry-1.docker.io", State: "ok", LastOKAt: now.Add(-12 * time.Minute), Latency: 84 * time.Millisecond,
				RateLimit: &upstream.RateLimit{Limit: 100, Remaining: 87}},
			{Registry: "quay.io", Endpoint: "quay.io", State: "open", RetryAt: now.Add(28*time.Second + 400*time.Millisecond), LastError: "connection refused"},
		},
		Peers: "5 members", Members: []agent.Member{
			{Name: "node-1", Address: "10.0.0.1:5051", Zone: "a", State: "alive", Self: true},
			{Name: "node-4", Address: "10.0.0.4:5051", Zone: "a", State: "alive"},
			{Name: "node-2", Address: "10.0.0.2:5051", Zone: "b", State: "alive", Linked: true, Sent: 3 << 20, Received: 40 << 20},
			{Name: "node-5", Address: "10.0.0.5:5051", Zone: "b", State: "unreachable"},
			{Name: "node-3", Address: "10.0.0.3:5051", Zone: "b", State: "banned", BannedUntil: now.Add(5*time.Minute + 500*time.Millisecond)},
		},
		Hosts:   agent.HostsStatus{Containerd: "/etc/containerd/certs.d", Problem: "/etc/containerd/certs.d: read-only file system"},
		Runtime: agent.RuntimeStatus{ContentDir: "/var/lib/containerd/io.containerd.content.v1.content", Blobs: 311, Bytes: 12 << 30},
		Recent: []agent.RecentPull{
			{Registry: "docker.io", Repository: "library/nginx", Reference: "1.29", Started: now.Add(-200 * time.Second), Ended: now.Add(-190*time.Second - 500*time.Millisecond),
				Served: map[string]int64{"peer": 60 << 20, "disk": 7 << 20}, Parts: make([]agent.PulledPart, 9)},
			{Registry: "quay.io", Repository: "org/app", Reference: d.String(), Started: now.Add(-time.Hour), Ended: now.Add(-time.Hour), Failed: 2,
				Parts: []agent.PulledPart{{Kind: "manifest", Reference: d.String(), Error: "DENIED: the registry refuses this"}, {Kind: "blob", Reference: d.String(), Error: "the runtime hung up"}}},
		},
		Doctor: agent.DoctorStatus{Checked: now, Findings: []hostsconfig.Finding{
			{ID: "containerd-other-directory", Severity: hostsconfig.Broken, What: "containerd looks in /other.", Where: "/etc/containerd/config.toml:9", Fix: "[hosts]"},
			{ID: "crio-no-auto-reload", Severity: hostsconfig.Note, What: "Nothing to do."},
		}},
	}
	code, out, errs := larder(t, "status", "--admin", standIn(t, s))
	if code != 0 || errs != "" {
		t.Fatalf("exit %d: %s", code, errs)
	}
	golden(t, "status", out)
}

// TestStatusOfALargeCluster holds that a screen is enough, and shows who matters.
func TestStatusOfALargeCluster(t *testing.T) {
	var members []agent.Member
	for i := range 500 {
		members = append(members, agent.Member{Name: fmt.Sprintf("node-%d", i), State: "alive", Self: i == 300, Linked: i%50 == 0})
	}
	members[499].State, members[499].BannedUntil = "banned", time.Now().Add(time.Hour)
	var out strings.Builder
	printMembers(&out, style{}, members, time.Now())
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != maxMembers+3 || !strings.Contains(lines[2], "this node") || !strings.Contains(lines[3], "banned for 1h0m0s") ||
		strings.Count(out.String(), "linked") != 9 || !strings.Contains(lines[len(lines)-1], "and 468 more") {
		t.Errorf("%d lines:\n%s", len(lines), out.String())
	}
}

// TestStatusFitsATerminal: the words of a registry that does not answer are long, and go below
// its row, broken where the terminal ends.
func TestStatusFitsATerminal(t *testing.T) {
	s := agent.Status{Upstreams: []upstream.Health{{Registry: "docker.io", Endpoint: "https://registry-1.docker.io/v2/", State: "failing",
		LastError: "resolve docker.io/library/nginx at registry-1.docker.io: dial tcp 127.0.0.1:5999: connect: connection refused"}}}
	var out strings.Builder
	printUpstreams(&out, style{width: 80}, s, time.Now())
	for line := range strings.Lines(out.String()) {
		if len(line) > 81 {
			t.Errorf("%d bytes: %s", len(line), line)
		}
	}
	out.Reset()
	if printUpstreams(&out, style{}, s, time.Now()); strings.Count(out.String(), "\n") != 5 {
		t.Errorf("where no terminal is, a line is a line:\n%s", out.String())
	}
	if got := cacheLine(style{}, agent.CacheStatus{Blobs: 1, Dir: "/d"}); got != "0 B in 1 blob; 0 B free on /d" {
		t.Error(got)
	}
}

func TestPinGolden(t *testing.T) {
	now := time.Now()
	list := agent.PinList{Bytes: 120 << 20, Limit: 16 << 30, Problem: "pins hold more than they may", Pins: []agent.Pin{
		{Image: "docker.io/library/nginx:1.29", State: agent.PinHeld, Source: "config", Digest: digest.FromString("nginx"), Bytes: 70 << 20, Present: 70 << 20,
			Since: now.Add(-50 * time.Hour), Checked: now.Add(-4 * time.Minute)},
		{Image: "quay.io/org/app:v1", State: agent.PinStale, Source: "both", Digest: digest.FromString("app"), Bytes: 50 << 20, Present: 50 << 20,
			Since: now.Add(-3 * time.Hour), Checked: now.Add(-3 * time.Hour), Error: "the registry has it no more", Retry: now.Add(5*time.Minute + 200*time.Millisecond)},
		{Image: "quay.io/org/big:v1", State: agent.PinFetching, Source: "command", Digest: digest.FromString("big"), Bytes: 2 << 30, Present: 1 << 30, Since: now.Add(-time.Minute)},
		{Image: "quay.io/org/private:v1", State: agent.PinMissing, Source: "command", Since: now.Add(-time.Minute), Error: "401 Unauthorized", Retry: now},
	}}
	code, out, errs := larder(t, "pin", "--admin", standIn(t, list))
	if code != 0 || errs != "" {
		t.Fatalf("exit %d: %s", code, errs)
	}
	golden(t, "pin", out)
	if code, out, _ = larder(t, "pin", "--admin", standIn(t, agent.PinList{})); code != 0 || !strings.Contains(out, "larder pin IMAGE") {
		t.Errorf("an empty list: exit %d, %q", code, out)
	}
}

// TestPinning pins, lists and unpins as a user would.
func TestPinning(t *testing.T) {
	n := startNode(t, nil)
	missing := testHost + "/team/gone:v1"
	code, out, errs := larder(t, "pin", testImage, missing, "--admin", n.admin)
	if code != exitFailed || !strings.Contains(out, testImage+": done: ") || !strings.Contains(out, missing+": failed: not pinned: ") || !strings.Contains(errs, "1 of 2 images") {
		t.Errorf("exit %d: %s\n%s", code, out, errs)
	}
	n.registry.Down()
	var list agent.PinList
	code, out, _ = larder(t, "pin", "--json", "--admin", n.admin)
	if err := json.Unmarshal([]byte(out), &list); err != nil || code != 0 || len(list.Pins) != 1 || list.Pins[0].State != agent.PinHeld || list.Pins[0].Digest != n.image.Digest {
		t.Errorf("exit %d, %v: %s", code, err, out)
	}
	if code, out, _ = larder(t, "status", "--admin", n.admin); code != 0 || !strings.Contains(out, "pins     1 image, ") {
		t.Errorf("status: exit %d\n%s", code, out)
	}
	if code, _, errs = larder(t, "unpin", missing, "--admin", n.admin); code != exitFailed || !strings.Contains(errs, "is not pinned") {
		t.Errorf("unpin of what is not: exit %d: %s", code, errs)
	}
	if code, out, errs = larder(t, "unpin", testImage, "--admin", n.admin); code != 0 || out != testImage+": unpinned\n" {
		t.Errorf("unpin: exit %d: %s %s", code, out, errs)
	}
	if code, out, _ = larder(t, "pin", "--admin", n.admin); code != 0 || !strings.Contains(out, "Nothing is pinned") {
		t.Errorf("the list then: exit %d: %s", code, out)
	}
}

// TestForgetting says what would go, what went, and that nothing is there any more.
func TestForgetting(t *testing.T) {
	n := startNode(t, nil)
	other := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{200 << 10}}) // shares a layer
	n.registry.Put("team/app", other, "v2")
	v2 := testHost + "/team/app:v2"
	if code, _, errs := larder(t, "warm", testImage, v2, "--admin", n.admin); code != 0 {
		t.Fatalf("warm: exit %d: %s", code, errs)
	}
	code, out, errs := larder(t, "pin", v2, "--admin", n.admin)
	if code != 0 {
		t.Fatalf("pin: exit %d: %s %s", code, out, errs)
	}
	if code, out, errs = larder(t, "forget", testImage, v2, "--admin", n.admin); code != exitFailed || out != "" || !strings.Contains(errs, "`larder unpin "+v2+"` first") {
		t.Errorf("pinned: exit %d: %s %s", code, out, errs)
	}
	var report agent.ForgetReport
	code, out, _ = larder(t, "forget", testImage, "--dry-run", "--json", "--admin", n.admin)
	if err := json.Unmarshal([]byte(out), &report); err != nil || code != 0 || !report.DryRun || len(report.Images) != 1 || len(report.Images[0].Parts) != 3 {
		t.Fatalf("--json: exit %d, %v: %s", code, err, out)
	}
	gone := fmt.Sprintf("removed 3 blobs, %s\n  stays: 1 blob, %s, also of %s\n", size(report.Images[0].Bytes), size(n.image.Layers[0].Size), v2)
	if code, out, _ = larder(t, "forget", testImage, "--dry-run", "--admin", n.admin); code != 0 || out != testImage+": would "+strings.Replace(gone, "removed", "remove", 1) {
		t.Errorf("--dry-run: exit %d: %s", code, out)
	}
	args := append([]string{"forget", testImage, "--admin", n.admin}, report.Images[0].Parts...)
	if code, out, errs = larder(t, args...); code != 0 || out != testImage+": "+gone+"3 others: nothing more is in the cache\n" {
		t.Errorf("exit %d: %s %s", code, out, errs)
	}
	if code, out, _ = larder(t, "forget", testImage, "--admin", n.admin); code != 0 || out != testImage+": nothing of it is in the cache\n" {
		t.Errorf("again: exit %d: %s", code, out)
	}
}

func TestForgetGolden(t *testing.T) {
	report := agent.ForgetReport{Images: []agent.Forgotten{
		{Image: "quay.io/org/app:v1", Blobs: 7, Bytes: 70 << 20, Kept: 2, KeptBytes: 30 << 20, KeptBy: []string{"quay.io/org/app:v2"}, Holders: []string{"node-2", "node-3", "node-4", "node-5"}},
		{Image: "quay.io/org/big:v1", Runtime: 1},
		{Image: "quay.io/org/gone:v1"},
	}}
	code, out, errs := larder(t, "forget", "quay.io/org/app:v1", "--admin", standIn(t, report))
	if code != 0 || errs != "" {
		t.Fatalf("exit %d: %s", code, errs)
	}
	golden(t, "forget", out)
}

// TestPinInterrupted: Ctrl-C takes no pin back.
func TestPinInterrupted(t *testing.T) {
	n := startNode(t, nil)
	fault := n.registry.Inject(registrytest.Match{Kind: registrytest.Blob}, registrytest.StallAfter(100))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out, errs bytes.Buffer
	code := make(chan int, 1)
	go func() { code <- run(ctx, []string{"pin", testImage, "--admin", n.admin}, &out, &errs) }()
	<-fault.Held()
	cancel()
	if code := <-code; code != exitFailed || !strings.Contains(errs.String(), "the images are pinned") {
		t.Errorf("exit %d: %s", code, errs.String())
	}
	fault.Remove()
	eventually(t, "held", func() error {
		if pins := n.Pins().Pins; len(pins) != 1 || pins[0].State != agent.PinHeld {
			return fmt.Errorf("%+v", pins)
		}
		return nil
	})
}

func TestExplainGolden(t *testing.T) {
	now := time.Now()
	from := func(kind, name string, n int64) []agent.Origin {
		return []agent.Origin{{Kind: kind, Name: name, Bytes: n, When: now.Add(-5 * time.Minute)}}
	}
	e := agent.Explanation{
		Image: "docker.io/library/nginx:1.29", Digest: digest.FromString("index"), Checked: now.Add(-30 * time.Minute), Bytes: 70<<20 + 9000, Here: 40 << 20,
		Parts: []agent.Part{
			{Kind: "index", Digest: digest.FromString("index"), Size: 2000, Where: "disk", Present: 2000, Origins: from("upstream", "docker.io", 2000)},
			{Kind: "manifest", Platform: "linux/amd64", Digest: digest.FromString("manifest"), Size: 1000, Where: "disk", Present: 1000, Origins: from("peer", "node-2", 1000)},
			{Kind: "config", Digest: digest.FromString("config"), Size: 6000, Where: "runtime", Present: 6000},
			{Kind: "layer", Digest: digest.FromString("one"), Size: 30 << 20, Where: "disk", Present: 30 << 20, Origins: append(from("peer", "node-2", 20<<20), from("upstream", "docker.io", 10<<20)...)},
			{Kind: "layer", Digest: digest.FromString("many"), Size: 21 << 20, Where: "disk", Present: 21 << 20, Origins: slices.Concat(from("peer", "node-2", 6<<20), from("peer", "node-3", 5<<20),
				from("peer", "node-4", 4<<20), from("peer", "node-5", 3<<20), from("upstream", "docker.io", 2<<20), from("peer", "node-6", 1<<20))},
			{Kind: "layer", Digest: digest.FromString("two"), Size: 20 << 20, Where: "arriving", Present: 10 << 20, Origins: from("peer", "node-3", 10<<20)},
			{Kind: "layer", Digest: digest.FromString("three"), Size: 20 << 20, Where: "peer", Holders: []string{"node-2", "node-3"}},
			{Kind: "layer", Digest: digest.FromString("four"), Size: 100, Where: "upstream"},
		},
	}
	code, out, errs := larder(t, "explain", "nginx:1.29", "--admin", standIn(t, e))
	if code != 0 || errs != "" {
		t.Fatalf("exit %d: %s", code, errs)
	}
	golden(t, "explain", out)
}

// TestTerminalIsNotCommanded: what a registry chose to say does not reach the terminal of
// who looks as anything but text.
func TestTerminalIsNotCommanded(t *testing.T) {
	const title = "\x1b]0;yours\a\u009b2J"
	n := startNode(t, nil)
	odd := registrytest.ImageSpec{Seed: 4, Layers: []int64{1000}, Platform: ocispec.Platform{OS: "linux" + title, Architecture: "amd64"}}
	n.registry.Put("team/odd", registrytest.Index(registrytest.OCIImage(odd)), "v1")
	image := testHost + "/team/odd:v1"
	unreadable := standIn(t, agent.Status{Upstreams: []upstream.Health{{Registry: "a.example", LastError: "malformed MIME header line: " + title}}})
	for _, args := range [][]string{
		{"warm", image, "--platform", "all", "--admin", n.admin},
		{"explain", image, "--platform", "all", "--admin", n.admin},
		{"status", "--admin", unreadable},
	} {
		code, out, errs := larder(t, args...)
		if said := out + errs; code != 0 || strings.ContainsAny(said, "\x1b\a\u009b") {
			t.Errorf("%s: exit %d: %q", args[0], code, said)
		}
	}
	// What fails says so in the registry's words, too.
	root := nodeRoot(t)
	through := pullThrough(n)
	(&criStandIn{name: "containerd", pull: func(ctx context.Context, image string) error {
		return errors.Join(through(ctx, image), errors.New("403 Forbidden: "+title))
	}}).serve(t, root)
	certs := filepath.Join(root, "etc/containerd/certs.d/odd.example/hosts.toml")
	if err := errors.Join(os.MkdirAll(filepath.Dir(certs), 0o755), os.WriteFile(certs, []byte("# "+title+"\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	refused := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, title, http.StatusForbidden) }))
	defer refused.Close()
	proxy := standIn(t, agent.Status{Proxy: strings.TrimPrefix(refused.URL, "http://")})
	for _, args := range [][]string{
		{"doctor", "--root", root, "--admin", n.admin, "--proxy.listen", n.ProxyAddr()},
		{"doctor", "--root", root, "--admin", n.admin, "--proxy.listen", n.ProxyAddr(), "--json"},
		{"export", image, "-o", filepath.Join(t.TempDir(), "x"), "--admin", proxy},
		{"hosts", "check", "--hosts.containerd", filepath.Dir(filepath.Dir(certs))},
	} {
		code, out, errs := larder(t, args...)
		if said := out + errs; code != exitFailed || strings.ContainsAny(said, "\x1b\a\u009b") {
			t.Errorf("%s: exit %d: %q", args, code, said)
		}
	}
}

// TestAgainstARealAgent runs the commands one after the other as a user would.
func TestAgainstARealAgent(t *testing.T) {
	n := startNode(t, nil)
	code, out, errs := larder(t, "explain", testImage, "--admin", n.admin)
	if code != exitFailed || out != "" || !strings.HasPrefix(errs, "larder: "+testImage+": not known on this node") || !strings.Contains(errs, "larder warm "+testImage) {
		t.Errorf("explain of an unknown image: exit %d, %q, %q", code, out, errs)
	}
	code, out, errs = larder(t, "warm", testImage, "--platform", "linux/amd64", "--admin", n.admin)
	if code != 0 {
		t.Fatalf("warm: exit %d: %s", code, errs)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 5 || !strings.HasPrefix(lines[4], testImage+": done: ") || !strings.HasSuffix(lines[4], "upstream") {
		t.Errorf("warm printed:\n%s", out)
	}
	n.registry.Down()
	eventually(t, "committed", func() error {
		code, out, errs = larder(t, "explain", testImage, "--platform", "linux/amd64", "--admin", n.admin)
		if code != 0 || strings.Count(out, "  disk ") != 4 || strings.Count(out, "upstream "+testHost) != 4 {
			return usageError{os.ErrInvalid}
		}
		return nil
	})
	var e agent.Explanation
	code, out, _ = larder(t, "explain", testImage, "--platform", "linux/amd64", "--json", "--admin", n.admin)
	if err := json.Unmarshal([]byte(out), &e); err != nil || code != 0 || len(e.Parts) != 4 || e.Digest != n.image.Digest {
		t.Errorf("explain --json: exit %d, %v\n%s", code, err, out)
	}
	code, out, _ = larder(t, "status", "--admin", n.admin)
	if code != 0 || !strings.Contains(out, "node-1  larder v1.2.3, ready") || !strings.Contains(out, "in 4 blobs") {
		t.Errorf("status: exit %d\n%s", code, out)
	}
	var s agent.Status
	code, out, _ = larder(t, "status", "--json", "--admin", strings.TrimPrefix(n.admin, "http://"))
	if err := json.Unmarshal([]byte(out), &s); err != nil || code != 0 || s.Cache.Blobs != 4 || s.Node != "node-1" {
		t.Errorf("status --json: exit %d, %v\n%s", code, err, out)
	}
	code, out, errs = larder(t, "warm", testHost+"/team/gone:v1", testImage, "--platform", "linux/amd64", "--admin", n.admin)
	if code != exitFailed || !strings.Contains(out, "team/gone:v1: failed: ") || !strings.Contains(errs, "1 of 2 images could not be fetched") {
		t.Errorf("warm of a missing image: exit %d, %q, %q", code, out, errs)
	}
}

// TestWarmInterrupted: Ctrl-C is no failure of the agent, which goes on.
func TestWarmInterrupted(t *testing.T) {
	n := startNode(t, nil)
	fault := n.registry.Inject(registrytest.Match{Kind: registrytest.Blob}, registrytest.StallAfter(100))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out, errs bytes.Buffer
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, []string{"warm", testImage, "--platform", "linux/amd64", "--admin", n.admin}, &out, &errs)
	}()
	eventually(t, "fetching", func() error {
		if len(n.Status().Fills) == 0 {
			return errors.New("no fill runs")
		}
		return nil
	})
	cancel()
	if code := <-code; code != exitFailed || !strings.Contains(errs.String(), "interrupted") || strings.Contains(errs.String(), "went away") {
		t.Errorf("exit %d: %s", code, errs.String())
	}
	fault.Remove()
	fault.Release()
	eventually(t, "fetched", func() error {
		if running := n.Status().Fills; len(running) > 0 {
			return fmt.Errorf("%d fills run", len(running))
		}
		return nil
	})
}

// TestMistakes holds that an error says what to do, and the exit codes.
func TestMistakes(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "larder.toml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	typo := filepath.Join(t.TempDir(), "typo.toml")
	if err := os.WriteFile(typo, []byte("[cache]\nmaxbytes = 3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		args []string
		code int
		want []string
	}{
		{"no agent", []string{"status", "--admin", "http://127.0.0.1:1"}, exitFailed,
			[]string{"cannot reach the agent at http://127.0.0.1:1", "connection refused", "is it running", "--admin"}},
		{"explain without agent", []string{"explain", "nginx", "--admin", "127.0.0.1:1"}, exitFailed, []string{"is it running"}},
		{"warm without agent", []string{"warm", "nginx", "--admin", "127.0.0.1:1"}, exitFailed, []string{"is it running"}},
		{"bad admin", []string{"status", "--admin", "https://x"}, exitUsage, []string{"--admin", "http://127.0.0.1:5053"}},
		{"bad image", []string{"explain", "NGINX:"}, exitUsage, []string{"NGINX:", "not an image name"}},
		{"bad image to warm", []string{"warm", "nginx", "a b"}, exitUsage, []string{"a b", "not an image name"}},
		{"no image", []string{"warm"}, exitUsage, []string{"larder warm --help"}},
		{"pins without agent", []string{"pin", "--admin", "127.0.0.1:1"}, exitFailed, []string{"is it running"}},
		{"bad image to pin", []string{"pin", "nginx", "a b"}, exitUsage, []string{"a b", "not an image name"}},
		{"a list of images", []string{"pin", "nginx", "--json"}, exitUsage, []string{"--json is for the list"}},
		{"nothing to unpin", []string{"unpin"}, exitUsage, []string{"larder unpin --help"}},
		{"nothing to forget", []string{"forget"}, exitUsage, []string{"larder forget --help"}},
		{"bad image to forget", []string{"forget", "nginx", "a b"}, exitUsage, []string{"a b", "not an image name"}},
		{"forget without agent", []string{"forget", "nginx", "--admin", "127.0.0.1:1"}, exitFailed, []string{"is it running"}},
		{"unknown flag", []string{"agent", "--proxy.listn=x"}, exitUsage, []string{"--proxy.listn", "did you mean --proxy.listen?"}},
		{"switch without =", []string{"agent", "--peer.enabled", "false"}, exitUsage, []string{"--peer.enabled=false"}},
		{"unknown command", []string{"statsu"}, exitUsage, []string{"statsu", "did you mean larder status?"}},
		{"unknown hosts command", []string{"hosts", "aply"}, exitUsage, []string{"aply", "did you mean larder hosts apply?\n"}},
		{"unknown shell", []string{"completion", "nope"}, exitUsage, []string{`unknown command "nope"; see larder completion --help`}},
		{"misspelt shell", []string{"completion", "bsh"}, exitUsage, []string{"did you mean larder completion bash?"}},
		{"help about nothing", []string{"help", "statsu"}, exitUsage, []string{"statsu", "did you mean larder status?\n"}},
		{"help about nothing in a group", []string{"help", "hosts", "aply"}, exitUsage, []string{"aply", "did you mean larder hosts apply?\n"}},
		{"help about an argument", []string{"help", "status", "me"}, exitUsage, []string{`unknown command "me" for "larder status"`, "larder help --help"}},
		{"two shells", []string{"completion", "bash", "zsh"}, exitUsage, []string{"larder completion bash --help"}},
		{"unknown key", []string{"agent", "--config", typo}, exitUsage, []string{"cache.maxbytes", "typo.toml:2", "did you mean cache.max_bytes?"}},
		{"two problems", []string{"agent", "--config", empty, "--log.level=x", "--cache.dir="}, exitUsage, []string{"log.level", "cache.dir"}},
		{"hosts without a directory", []string{"hosts", "apply", "--config", empty}, exitUsage, []string{"--hosts.containerd /etc/containerd/certs.d"}},
		{"too many nodes", []string{"demo", "--nodes=1000"}, exitUsage, []string{"1 to 64"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			code, out, errs := larder(t, tt.args...)
			if code != tt.code || out != "" {
				t.Errorf("exit %d, want %d; printed %q", code, tt.code, out)
			}
			for _, w := range tt.want {
				if !strings.Contains(errs, w) {
					t.Errorf("%q does not say %q", errs, w)
				}
			}
		})
	}
}

func TestAdminFromEnvironmentAndFile(t *testing.T) {
	n := startNode(t, nil)
	t.Setenv("LARDER_ADMIN", n.admin)
	if code, _, errs := larder(t, "status"); code != 0 {
		t.Errorf("LARDER_ADMIN: exit %d: %s", code, errs)
	}
	t.Setenv("LARDER_ADMIN", "")
	t.Setenv("LARDER_ADMIN_LISTEN", n.AdminAddr())
	if code, _, errs := larder(t, "status"); code != 0 {
		t.Errorf("LARDER_ADMIN_LISTEN: exit %d: %s", code, errs)
	}
}

// TestAdminIsSomethingElse: what else may answer there says 404, or 405, or a page; whoever
// reads that has to know that --admin is wrong.
func TestAdminIsSomethingElse(t *testing.T) {
	n := startNode(t, nil)
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "<html>Welcome</html>")
	}))
	t.Cleanup(page.Close)
	for _, admin := range []string{"http://" + n.ProxyAddr(), n.admin + "/admin", page.URL} {
		for _, args := range [][]string{{"status"}, {"explain", "nginx"}, {"pin"}, {"unpin", "nginx"}, {"export", "nginx", "-o", "-"}} {
			if code, _, errs := larder(t, append(args, "--admin", admin)...); code != exitFailed || !strings.Contains(errs, "with --admin") {
				t.Errorf("%s of %s: exit %d: %s", args, admin, code, errs)
			}
		}
	}
}

// TestAdminOfABrokenFile: where the address is not known because its file cannot be read,
// that is told beside the answer; what else is wrong with the file is the agent's matter.
func TestAdminOfABrokenFile(t *testing.T) {
	n, dir := startNode(t, nil), t.TempDir()
	for name, tc := range map[string]struct {
		file string // "" = none
		want string // of standard error; "" = nothing
	}{
		"none":            {"", "cannot read the configuration: open " + filepath.Join(dir, "none") + ": no such file or directory; so http://127.0.0.1:5053 is asked"},
		"no TOML":         {"[admin\n", "no TOML:1:7: not valid TOML"},
		"wrong address":   {"[admin]\nlisten = 5\n", "admin.listen"},
		"wrong key":       {"[admin]\nlisten_on = \"127.0.0.1:1\"\n", "admin.listen_on"},
		"something wrong": {"[admin]\nlisten = \"" + n.AdminAddr() + "\"\n[cache]\nmaxbytes = 3\n", ""},
	} {
		file := filepath.Join(dir, name)
		if tc.file != "" {
			if err := os.WriteFile(file, []byte(tc.file), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		t.Setenv("LARDER_CONFIG", file)
		for _, command := range [][]string{{"status"}, {"pin"}, {"explain", "nginx"}} {
			_, _, errs := larder(t, command...)
			if tc.want != "" && (!strings.Contains(errs, "note: ") || !strings.Contains(errs, tc.want)) || tc.want == "" && strings.Contains(errs, "note: ") {
				t.Errorf("%s: %s: %q does not say %q", name, command, errs, tc.want)
			}
		}
	}
}

func TestHostsCommands(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs.d")
	hosts := func(args ...string) (int, string, string) {
		t.Helper()
		return larder(t, append([]string{"hosts"}, append(args, "--hosts.containerd", dir, "--proxy.listen", "127.0.0.1:1")...)...)
	}
	code, out, _ := hosts("check")
	if code != exitFailed || !strings.Contains(out, "create") || !strings.Contains(out, "http://127.0.0.1:1") {
		t.Errorf("check before: exit %d\n%s", code, out)
	}
	golden(t, "hosts-apply-dry-run", strings.ReplaceAll(mustPrint(t, hosts, "apply", "--dry-run"), dir, "/etc/containerd/certs.d"))
	if _, err := os.Stat(dir); err == nil {
		t.Error("a dry run wrote something")
	}
	code, _, errs := hosts("apply")
	if code != 0 || !strings.Contains(errs, "nothing listens on 127.0.0.1:1") {
		t.Errorf("apply: exit %d: %s", code, errs)
	}
	if code, out, _ := hosts("check"); code != 0 || out != "nothing to change\n" {
		t.Errorf("check after: exit %d\n%s", code, out)
	}
	if code, out, _ := hosts("check", "--json"); code != 0 || out != "[]\n" {
		t.Errorf("check --json after: exit %d\n%s", code, out)
	}
	// A check that is not told where the agent listens says where its entries lead.
	if code, out, errs := larder(t, "hosts", "check", "--hosts.containerd", dir, "--proxy.listen", "127.0.0.1:2"); code != exitFailed ||
		!strings.Contains(out, "update") || !strings.Contains(errs, "add --proxy.listen 127.0.0.1:1,") || strings.Contains(errs, "add --proxy.listen 127.0.0.1:2") {
		t.Errorf("check for another proxy: exit %d: %s\n%s", code, errs, out)
	}
	foretold := mustPrint(t, hosts, "remove", "--dry-run")
	if code, out, _ := hosts("check"); code != 0 || out != "nothing to change\n" {
		t.Errorf("check after a dry run: exit %d\n%s", code, out)
	}
	if code, out, _ := hosts("remove"); code != 0 || !strings.Contains(out, "delete") || out != foretold {
		t.Errorf("remove: exit %d\n%s--dry-run said\n%s", code, out, foretold)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("remove left the directory")
	}
}

// TestHostsCheckOfAMalformedFile holds that a file which Larder can do nothing
// about is reported, and does not make the check fail forever.
func TestHostsCheckOfAMalformedFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "bad.example", "hosts.toml")
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, []byte("server = \"https://x\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	check := func(want int, words ...string) {
		t.Helper()
		code, out, errs := larder(t, "hosts", "check", "--hosts.containerd", dir)
		if code != want {
			t.Errorf("exit %d, want %d: %s", code, want, errs)
		}
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("does not say %q:\n%s", w, out)
			}
		}
	}
	check(exitFailed, "create", "_default/hosts.toml", "skip", file)
	if code, _, errs := larder(t, "hosts", "apply", "--hosts.containerd", dir); code != 0 {
		t.Fatalf("apply: exit %d: %s", code, errs)
	}
	check(0, "nothing to change", "skip", file, "strings")
	if err := os.WriteFile(filepath.Join(dir, "_default", "hosts.toml"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	check(exitFailed, "update")
	if code, _, errs := larder(t, "hosts", "remove", "--hosts.containerd", dir); code != 0 {
		t.Errorf("remove: exit %d: %s", code, errs)
	}
	if body, err := os.ReadFile(file); err != nil || string(body) != "server = \"https://x\n" {
		t.Errorf("the malformed file has changed: %q, %v", body, err)
	}
}

func mustPrint(t *testing.T, run func(...string) (int, string, string), args ...string) string {
	t.Helper()
	code, out, errs := run(args...)
	if code != 0 {
		t.Fatalf("%v: exit %d: %s", args, code, errs)
	}
	return out
}

// TestHostsThatCannotBeWritten holds that a failure is not told as a success too.
func TestHostsThatCannotBeWritten(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errs := larder(t, "hosts", "apply", "--hosts.containerd", filepath.Join(file, "certs.d"))
	if code != exitFailed || out != "" || !strings.Contains(errs, "not a directory") {
		t.Errorf("exit %d: %q, %q", code, out, errs)
	}
}

// TestHostsWhileTheAgentRuns holds that the agent's files are the agent's.
func TestHostsWhileTheAgentRuns(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs.d")
	startNode(t, func(c *agent.Config) { c.Hosts.Containerd = dir })
	code, _, errs := larder(t, "hosts", "remove", "--hosts.containerd", dir)
	if code != exitFailed || strings.Count(errs, "stop it first") != 1 || !strings.Contains(errs, "by itself") {
		t.Errorf("exit %d: %s", code, errs)
	}
	if _, err := os.Stat(filepath.Join(dir, "_default", "hosts.toml")); err != nil {
		t.Error(err)
	}
}

func TestKeygen(t *testing.T) {
	_, one, _ := larder(t, "keygen")
	_, two, _ := larder(t, "keygen")
	key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(one))
	if err != nil || len(key) != keyBytes || one == two {
		t.Errorf("%q, %q: %v", one, two, err)
	}
}

// TestOutputThatCannotBeWritten: a command that has shown nothing has failed, and says why
// once; one whose reader has gone ends without a word.
func TestOutputThatCannotBeWritten(t *testing.T) {
	n := startNode(t, nil)
	warmed := []string{testImage, "--admin", n.admin}
	for _, args := range [][]string{
		append([]string{"warm", "--platform=linux/amd64"}, warmed...), append([]string{"explain", "--platform=linux/amd64"}, warmed...),
		append([]string{"pin"}, warmed...), {"pin", "--admin", n.admin}, {"pin", "--json", "--admin", n.admin},
		append([]string{"unpin"}, warmed...), {"status", "--admin", n.admin}, {"doctor", "--skip-canary", "--root", t.TempDir(), "--admin", n.admin},
		{"version"}, {"keygen"}, {"--help"}, {"completion", "bash"},
	} {
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		var errs bytes.Buffer
		code := run(t.Context(), args, full, &errs)
		if code != exitFailed || strings.Count(errs.String(), "no space left on device") != 1 {
			t.Errorf("%s: exit %d: %s", args, code, errs.String())
		}
		full.Close()
	}
	nobody, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	var errs bytes.Buffer
	cmd := exec.Command(os.Args[0], "status", "--admin", n.admin)
	cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), asMain+"=1"), stdout, &errs
	err = cmd.Run()
	if state, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || state.Signal() != syscall.SIGPIPE || errs.Len() > 0 {
		t.Errorf("without a reader: %v, %s", err, errs.String())
	}
	stdout.Close()
}

func TestVersion(t *testing.T) {
	code, out, _ := larder(t, "version")
	if code != 0 || !strings.HasPrefix(out, "larder ") || !strings.Contains(out, "go1.") {
		t.Errorf("exit %d: %q", code, out)
	}
	if _, flag, _ := larder(t, "--version"); flag != out {
		t.Errorf("--version says %q, version %q", flag, out)
	}
	var b agent.Build
	code, out, _ = larder(t, "version", "--json")
	if err := json.Unmarshal([]byte(out), &b); err != nil || code != 0 || b.Version == "" || b.Go == "" {
		t.Errorf("exit %d: %v %q", code, err, out)
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if code, out, _ := larder(t, "completion", shell); code != 0 || !strings.Contains(out, "larder") {
			t.Errorf("%s: exit %d", shell, code)
		}
	}
}

// TestHelpNamesEveryKey compares --help with the configuration keys.
func TestHelpNamesEveryKey(t *testing.T) {
	_, out, _ := larder(t, "agent", "--help")
	for _, k := range agent.Keys() {
		line := ""
		for l := range strings.Lines(out) {
			if strings.Contains(l, "--"+k.Name+" ") {
				line = l
			}
		}
		if !strings.Contains(line, k.Help) {
			t.Errorf("--help does not say of %s: %q", k.Name, k.Help)
		}
		if k.Shown != "" && !strings.Contains(line, "(default: "+k.Shown+")") {
			t.Errorf("--help does not say that %s is %s by default, without quotes: %s", k.Name, k.Shown, line)
		}
		if def := k.Default; def != "" && def != "false" && def != "0" && !strings.Contains(line, def) {
			t.Errorf("--help does not say that %s is %s by default: %s", k.Name, def, line)
		}
	}
}

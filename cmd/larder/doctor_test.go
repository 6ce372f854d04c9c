package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/hostsconfig"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// criStandIn is a runtime that pulls as it is told: through a mirror, or past
// it. The real ones are in test/e2e.
type criStandIn struct {
	cri.UnimplementedRuntimeServiceServer
	cri.UnimplementedImageServiceServer
	name    string
	pull    func(ctx context.Context, image string) error
	removed []string
	has     []string // names of images
}

func (s *criStandIn) ListImages(context.Context, *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	return &cri.ListImagesResponse{Images: []*cri.Image{{RepoTags: s.has}}}, nil
}

func (s *criStandIn) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{RuntimeName: s.name, RuntimeVersion: "v2.1.4"}, nil
}

func (s *criStandIn) PullImage(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	if err := s.pull(ctx, r.Image.Image); err != nil {
		return nil, err
	}
	return &cri.PullImageResponse{ImageRef: "sha256:canary"}, nil
}

func (s *criStandIn) RemoveImage(_ context.Context, r *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	s.removed = append(s.removed, r.Image.Image)
	return &cri.RemoveImageResponse{}, nil
}

// serve listens where containerd does below root.
func (s *criStandIn) serve(t *testing.T, root string) {
	t.Helper()
	s.serveAt(t, filepath.Join(root, runtimeSockets[0]))
}

func (s *criStandIn) serveAt(t *testing.T, socket string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(server, s)
	cri.RegisterImageServiceServer(server, s)
	serveGRPC(t, server, socket)
}

func serveGRPC(t *testing.T, server *grpc.Server, socket string) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// shortDir is a temporary directory whose path leaves room for a socket name.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "larder")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// nodeRoot is a node's file system with a containerd 2.1 that is set up well.
func nodeRoot(t *testing.T) string {
	t.Helper()
	root := shortDir(t)
	for name, body := range map[string]string{
		"etc/containerd/config.toml": "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '/etc/containerd/certs.d'\n",
	} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(body), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// pullThrough is a runtime that uses the mirror.
func pullThrough(n *node) func(ctx context.Context, image string) error {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	return func(ctx context.Context, image string) error {
		ref, err := agent.ParseImage(image)
		if err != nil {
			return err
		}
		_, err = agent.Puller{Proxy: "http://" + n.ProxyAddr(), Client: client}.Pull(ctx, ref)
		return err
	}
}

func TestDoctor(t *testing.T) {
	root := nodeRoot(t)
	certs := filepath.Join(root, "etc/containerd/certs.d")
	n := startNode(t, func(c *agent.Config) { c.Hosts.Containerd = certs })
	through := pullThrough(n)
	past := func(context.Context, string) error {
		return errors.New("failed to resolve reference: lookup registry-1.docker.io: no such host")
	}
	tests := []struct {
		name string
		pull func(context.Context, string) error
		args []string
		code int
	}{
		{"seen", through, nil, 0},
		{"past-the-mirror", past, nil, exitFailed},
		{"agent-down", through, []string{"--admin", "127.0.0.1:1", "--proxy.listen", "127.0.0.1:1"}, exitFailed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			runtime := &criStandIn{name: "containerd", pull: tt.pull}
			runtime.serve(t, root)
			args := append([]string{"doctor", "--root", root, "--hosts.containerd", certs, "--proxy.listen", n.ProxyAddr(), "--admin", n.admin}, tt.args...)
			code, out, errs := larder(t, args...)
			if code != tt.code || errs != "" {
				t.Errorf("exit %d, want %d: %s", code, tt.code, errs)
			}
			golden(t, "doctor-"+tt.name, stable(nonces.ReplaceAllString(out, "canary:NONCE"), root, ""))
			if tt.name == "seen" && len(runtime.removed) != 1 {
				t.Errorf("removed %v, want the canary", runtime.removed)
			}
			var report doctorReport
			code, out, _ = larder(t, append(args, "--json")...)
			if err := json.Unmarshal([]byte(out), &report); err != nil || code != tt.code || report.OK != (tt.code == 0) {
				t.Errorf("--json: exit %d: %v\n%s", code, err, out)
			}
		})
	}
}

// TestSocketFix: only a socket that is kept from the caller calls for root.
func TestSocketFix(t *testing.T) {
	dir := shortDir(t)
	dead, mute := filepath.Join(dir, "dead.sock"), filepath.Join(dir, "mute.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	serveGRPC(t, grpc.NewServer(), mute)
	for socket, want := range map[string]string{
		filepath.Join(dir, "none.sock"): "larder doctor --socket ",
		dead:                            "systemctl status containerd ",
		mute:                            "journalctl -u containerd ",
	} {
		if got := socketFix(t.Context(), socket); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q", filepath.Base(socket), got)
		}
	}
	_, out, _ := larder(t, "doctor", "--json", "--skip-canary", "--root", nodeRoot(t), "--admin", "127.0.0.1:1", "--socket", dead)
	var report doctorReport
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatal(err)
	}
	found := func(f hostsconfig.Finding) bool {
		return f.ID == "runtime-unreachable" && f.Where == dead && strings.HasPrefix(f.Fix, "systemctl status")
	}
	if !slices.ContainsFunc(report.Findings, found) {
		t.Errorf("%+v", report.Findings)
	}
}

// TestNoRoomIsFound: the status says it, and the doctor finds it.
func TestNoRoomIsFound(t *testing.T) {
	s := agent.Status{Cache: agent.CacheStatus{Dir: "/var/lib/larder", Problem: "keeps nothing new: the disk is full"}}
	admin := standIn(t, s)
	code, out, errs := larder(t, "status", "--admin", admin)
	if code != 0 || errs != "" || !strings.Contains(out, "free on /var/lib/larder; keeps nothing new: the disk is full\n") {
		t.Errorf("status: exit %d: %s\n%s", code, errs, out)
	}
	_, out, _ = larder(t, "doctor", "--json", "--skip-canary", "--root", nodeRoot(t), "--admin", admin)
	var report doctorReport
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatal(err)
	}
	found := func(f hostsconfig.Finding) bool {
		return f.ID == "cache-no-room" && f.Severity == hostsconfig.Degraded && strings.Contains(f.Fix, "df -h /var/lib/larder ")
	}
	if !slices.ContainsFunc(report.Findings, found) {
		t.Errorf("doctor: %+v", report.Findings)
	}
}

// TestDoctorOfNoRegistry: a list without a registry is no mistake where no
// directory is named, since the agent says which it manages.
func TestDoctorOfNoRegistry(t *testing.T) {
	root := nodeRoot(t)
	n := startNode(t, func(c *agent.Config) { c.Hosts.Containerd = filepath.Join(root, "etc/containerd/certs.d") })
	(&criStandIn{name: "containerd", pull: func(_ context.Context, image string) error { return errors.New("no " + image) }}).serve(t, root)
	code, out, errs := larder(t, "doctor", "--root", root, "--admin", n.admin, "--hosts.registries=")
	if code != exitFailed || errs != "" || !strings.Contains(out, "A pull of docker.io/larder.invalid/canary:") {
		t.Errorf("exit %d: %s\n%s", code, errs, out)
	}
}

// TestDoctorKnowsTheAgentsRegistries: the doctor of `helm test` has no configuration of
// its own. Where the agent mirrors some registries, the canary is of one of them.
func TestDoctorKnowsTheAgentsRegistries(t *testing.T) {
	root := nodeRoot(t)
	certs := filepath.Join(root, "etc/containerd/certs.d")
	n := startNode(t, func(c *agent.Config) { c.Hosts.Containerd, c.Hosts.Registries = certs, []string{"quay.io"} })
	other := filepath.Join(certs, "docker.io") // not Larder's business then
	if err := errors.Join(os.MkdirAll(other, 0o755), os.WriteFile(filepath.Join(other, "hosts.toml"), []byte("[host.\"https://m.example\"]\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	(&criStandIn{name: "containerd", pull: func(ctx context.Context, image string) error {
		if !strings.HasPrefix(image, "quay.io/") {
			return errors.New("not mirrored: " + image)
		}
		ref, err := agent.ParseImage(image)
		if err != nil {
			return err
		}
		_, err = agent.Puller{Proxy: "http://" + n.ProxyAddr(), Client: client}.Pull(ctx, ref)
		return err
	}}).serve(t, root)
	if code, out, errs := larder(t, "doctor", "--root", root, "--admin", n.admin); code != 0 || !strings.Contains(out, "the canary was seen") || strings.Contains(out, "warning") {
		t.Errorf("exit %d: %s\n%s", code, errs, out)
	}
}

// TestDoctorOfTwoRuntimes: Docker's containerd beside CRI-O, or beside that of k3s, is
// not the kubelet's. It is no error that it goes past the mirror, and is said.
func TestDoctorOfTwoRuntimes(t *testing.T) {
	root := nodeRoot(t)
	n := startNode(t, func(c *agent.Config) { c.Hosts.Containerd = filepath.Join(root, "etc/containerd/certs.d") })
	through := pullThrough(n)
	past := func(context.Context, string) error { return errors.New("not found") }
	for _, tt := range []struct {
		name          string
		first, second func(context.Context, string) error
		code          int
	}{
		{"the first is the kubelet's", through, past, 0},
		{"the second is the kubelet's", past, through, 0},
		{"neither", past, past, exitFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sockets := []string{filepath.Join(shortDir(t), "a.sock"), filepath.Join(shortDir(t), "b.sock")}
			(&criStandIn{name: "containerd", pull: tt.first}).serveAt(t, sockets[0])
			(&criStandIn{name: "containerd", pull: tt.second}).serveAt(t, sockets[1])
			code, out, errs := larder(t, "doctor", "--root", root, "--admin", n.admin, "--socket", strings.Join(sockets, ","))
			if code != tt.code || !strings.Contains(out, "did not come through the mirror") {
				t.Errorf("exit %d, want %d: %s\n%s", code, tt.code, errs, out)
			}
		})
	}
}

// TestDoctorOfImages: what CRI-O has from a registry without an entry was pulled past
// the mirror, and nothing else would tell.
func TestDoctorOfImages(t *testing.T) {
	root := shortDir(t)
	crio := filepath.Join(root, "etc/containers/registries.conf.d")
	if err := os.MkdirAll(crio, 0o755); err != nil {
		t.Fatal(err)
	}
	n := startNode(t, func(c *agent.Config) { c.Hosts.CRIO = crio })
	runtime := &criStandIn{name: "cri-o", has: []string{"docker.io/library/nginx:1", "registry.corp/app:1"}, pull: func(context.Context, string) error { return errors.New("no") }}
	runtime.serveAt(t, filepath.Join(root, "run/crio/crio.sock"))
	_, out, _ := larder(t, "doctor", "--root", root, "--admin", n.admin)
	if !strings.Contains(out, "images of registry.corp") || strings.Contains(out, "images of docker.io") {
		t.Error(out)
	}
}

// TestDoctorWithoutCRI: Docker's containerd has its CRI plugin disabled, and answers
// that it knows no such service. No right to the socket is missing.
func TestDoctorWithoutCRI(t *testing.T) {
	root := nodeRoot(t)
	socket := filepath.Join(root, runtimeSockets[0])
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	serveGRPC(t, grpc.NewServer(), socket)
	n := startNode(t, func(c *agent.Config) { c.Hosts.Containerd = filepath.Join(root, "etc/containerd/certs.d") })
	_, out, errs := larder(t, "doctor", "--root", root, "--admin", n.admin)
	if !strings.Contains(out, "info     This containerd offers no CRI") || strings.Contains(out, "belongs to root") || !strings.Contains(out, "nothing is proven by a pull") {
		t.Errorf("%s\n%s", out, errs)
	}
}

// TestDoctorPrivateImages: what CRI-O does with private images is said, and no
// more once a registry's are the node's own.
func TestDoctorPrivateImages(t *testing.T) {
	n := startNode(t, nil)
	crio := filepath.Join(shortDir(t), "registries.conf.d")
	config := filepath.Join(t.TempDir(), "larder.toml")
	for _, tc := range []struct {
		config, crio string
		said         bool
	}{
		{"", crio, true},
		{"", "", false},
		{"[[registry]]\nhost = \"reg.example.com\"\nauth = \"node\"\ncredentials_file = \"" + filepath.Join(filepath.Dir(config), "none.json") + "\"\n", crio, false},
	} {
		if err := errors.Join(os.WriteFile(config, []byte(tc.config), 0o600), os.WriteFile(filepath.Join(filepath.Dir(config), "none.json"), []byte(`{"auths":{}}`), 0o600)); err != nil {
			t.Fatal(err)
		}
		_, out, errs := larder(t, "doctor", "--root", shortDir(t), "--admin", n.admin, "--config", config, "--hosts.crio", tc.crio)
		if said := strings.Contains(out, "CRI-O and podman send a mirror no credentials"); said != tc.said || errs != "" {
			t.Errorf("hosts.crio = %q, %q: %t\n%s%s", tc.crio, tc.config, said, out, errs)
		}
	}
}

func TestDoctorWithoutRuntime(t *testing.T) {
	n := startNode(t, nil)
	code, out, _ := larder(t, "doctor", "--root", shortDir(t), "--admin", n.admin)
	if code != exitFailed || !strings.Contains(out, "No runtime's CRI socket was found") || strings.Count(out, `containerd = "/etc/containerd/certs.d"`) != 1 {
		t.Errorf("exit %d\n%s", code, out)
	}
	if _, out, _ := larder(t, "doctor", "--root", shortDir(t), "--admin", n.admin, "--hosts.containerd", "/etc/containerd/certs.d"); !strings.Contains(out, "The agent manages no runtime's configuration") {
		t.Errorf("with a directory that the agent does not manage:\n%s", out)
	}
	code, out, _ = larder(t, "doctor", "--root", shortDir(t), "--socket", "/nonexistent.sock", "--admin", n.admin)
	if code != exitFailed || !strings.Contains(out, "cannot be asked") {
		t.Errorf("exit %d\n%s", code, out)
	}
}

// TestDoctorFindsTheAgentOfItsConfiguration: --config says where the admin API
// is, and an agent that is found by its proxy alone is no stranger on the port.
func TestDoctorFindsTheAgentOfItsConfiguration(t *testing.T) {
	n := startNode(t, nil)
	config := filepath.Join(t.TempDir(), "larder.toml")
	body := "[admin]\nlisten = \"" + n.AdminAddr() + "\"\n[proxy]\nlisten = \"" + n.ProxyAddr() + "\"\n"
	if err := os.WriteFile(config, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	_, out, errs := larder(t, "doctor", "--root", shortDir(t), "--config", config)
	if strings.Contains(out, "does not answer") || errs != "" {
		t.Errorf("with --config: %s\n%s", errs, out)
	}
	_, out, _ = larder(t, "doctor", "--root", shortDir(t), "--config", config, "--admin", "127.0.0.1:1")
	if !strings.Contains(out, "An agent serves pulls at "+n.ProxyAddr()) || strings.Contains(out, "taken by someone else") {
		t.Errorf("with another --admin:\n%s", out)
	}
	_, out, _ = larder(t, "doctor", "--root", shortDir(t), "--admin", "127.0.0.1:1", "--proxy.listen", n.AdminAddr())
	if !strings.Contains(out, "taken by someone else (an HTTP server)") {
		t.Errorf("with an HTTP server on the proxy's address:\n%s", out)
	}
}

// TestDoctorVerdict: an agent of which no more is known than that it serves is no proof
// that the runtime passes it by, and files alone are none that it does not.
func TestDoctorVerdict(t *testing.T) {
	elsewhere := hostsconfig.Finding{ID: adminElsewhere, Severity: hostsconfig.Broken}
	warning := hostsconfig.Finding{ID: "runtime-not-found", Severity: hostsconfig.Degraded}
	broken := hostsconfig.Finding{ID: "config-path", Severity: hostsconfig.Broken}
	seen, skipped := runtimeReport{Canary: "seen"}, runtimeReport{Canary: "skipped"}
	for want, r := range map[string]doctorReport{
		"Whether this node's runtime uses the mirror is not known.":                                             {Findings: []hostsconfig.Finding{elsewhere, warning}},
		"This node's runtime would not use the mirror.":                                                         {Findings: []hostsconfig.Finding{elsewhere, broken}},
		"This node's runtime uses the mirror.":                                                                  {OK: true, Findings: []hostsconfig.Finding{warning}, Runtimes: []runtimeReport{seen}},
		"Nothing was found that keeps this node's runtime from the mirror. No pull has proven that it uses it.": {OK: true, Runtimes: []runtimeReport{skipped}},
	} {
		if got := r.verdict(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

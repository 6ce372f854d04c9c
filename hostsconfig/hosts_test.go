package hostsconfig

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if childMain() || crioMain() {
		return
	}
	goleak.VerifyTestMain(m)
}

const testProxy = "127.0.0.1:5050"

// tree is a small file system in a test: path to content. A trailing slash
// makes a directory, "-> x" a symlink to x.
type tree map[string]string

func (t tree) write(tb testing.TB, root string) {
	tb.Helper()
	for _, name := range slices.Sorted(maps.Keys(t)) {
		path := filepath.Join(root, name)
		must(tb, os.MkdirAll(filepath.Dir(path), 0o755))
		target, isLink := strings.CutPrefix(t[name], "-> ")
		switch {
		case strings.HasSuffix(name, "/"):
			must(tb, os.MkdirAll(path, 0o755))
		case isLink:
			must(tb, os.Symlink(target, path))
		default:
			must(tb, os.WriteFile(path, []byte(t[name]), 0o640))
			old := time.Unix(1_700_000_000, 0)
			must(tb, os.Chtimes(path, old, old))
		}
	}
}

// snapshot lists everything below root with mode, owner, time and content.
func snapshot(tb testing.TB, root string) []string {
	tb.Helper()
	var out []string
	must(tb, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		info, err := d.Info()
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%s %v", rel, info.Mode())
		if info.Mode()&fs.ModeSymlink != 0 {
			target, _ := os.Readlink(path)
			line += " -> " + target
		} else if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			st := info.Sys().(*syscall.Stat_t)
			line += fmt.Sprintf(" %d:%d %s %q", st.Uid, st.Gid, info.ModTime().UTC().Format(time.RFC3339Nano), data)
		}
		out = append(out, line)
		return nil
	}))
	return out
}

func wantSame(tb testing.TB, what string, want, got []string) {
	tb.Helper()
	if slices.Equal(want, got) {
		return
	}
	tb.Errorf("%s\n--- want\n%s\n--- got\n%s", what, strings.Join(want, "\n"), strings.Join(got, "\n"))
}

func wantContent(tb testing.TB, path, want string) {
	tb.Helper()
	got, err := os.ReadFile(path)
	must(tb, err)
	if string(got) != want {
		tb.Errorf("%s holds\n%s\nwant\n%s", path, got, want)
	}
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func newHosts(tb testing.TB, opts Options) *Hosts {
	tb.Helper()
	opts.ProxyAddr = cmp.Or(opts.ProxyAddr, testProxy)
	h, err := New(opts)
	must(tb, err)
	return h
}

func apply(tb testing.TB, h *Hosts) []Change {
	tb.Helper()
	changes, err := h.Apply(tb.Context())
	must(tb, err)
	return changes
}

func remove(tb testing.TB, h *Hosts) []Change {
	tb.Helper()
	changes, err := h.Remove(context.Background())
	must(tb, err)
	return changes
}

// containerdHosts reads a certs.d with containerd's own parser.
func containerdHosts(tb testing.TB, root, registry string) []string {
	tb.Helper()
	hosts, err := config.ConfigureHosts(context.Background(), config.HostOptions{HostDir: config.HostDirFromRoot(root)})(registry)
	must(tb, err)
	var out []string
	for _, h := range hosts {
		out = append(out, describeHost(h))
	}
	return out
}

func describeHost(h docker.RegistryHost) string {
	caps := ""
	for _, c := range []struct {
		bit  docker.HostCapabilities
		name string
	}{{docker.HostCapabilityPull, "pull"}, {docker.HostCapabilityResolve, "resolve"}, {docker.HostCapabilityPush, "push"}} {
		if h.Capabilities.Has(c.bit) {
			caps += "," + c.name
		}
	}
	s := h.Scheme + "://" + h.Host + h.Path + " " + strings.TrimPrefix(caps, ",")
	if tr, ok := h.Client.Transport.(*http.Transport); ok && tr.TLSClientConfig != nil {
		if tr.TLSClientConfig.RootCAs != nil {
			s += " ca"
		}
		if n := len(tr.TLSClientConfig.Certificates); n > 0 {
			s += fmt.Sprintf(" client:%d", n)
		}
		if tr.TLSClientConfig.InsecureSkipVerify {
			s += " skip_verify"
		}
	} else if h.Client.Transport != nil && !ok {
		s += " http-fallback"
	}
	for _, k := range slices.Sorted(maps.Keys(h.Header)) {
		s += " " + k + "=" + strings.Join(h.Header[k], "|")
	}
	return s
}

const ours = "http://127.0.0.1:5050/v2 pull,resolve"

func wantHosts(tb testing.TB, root, registry string, want ...string) {
	tb.Helper()
	got := containerdHosts(tb, root, registry)
	if !slices.Equal(got, want) {
		tb.Errorf("containerd reads for %s:\n  %s\nwant:\n  %s", registry, strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func upstreamOf(host string) string { return "https://" + host + "/v2 pull,resolve,push" }

func TestApplyAndRemove(t *testing.T) {
	ca := string(testCA(t))
	tests := []struct {
		name string
		have tree
		opts Options
		want map[string][]string // registry -> hosts that containerd reads
		left tree                // content after Remove where it is not have
	}{
		{
			name: "empty directory",
			have: tree{"certs.d/": ""},
			want: map[string][]string{
				"docker.io":  {ours, upstreamOf("registry-1.docker.io")},
				"quay.io":    {ours, upstreamOf("quay.io")},
				"reg.x:5000": {ours, upstreamOf("reg.x:5000")},
			},
		},
		{
			name: "an empty host directory",
			have: tree{"certs.d/quay.io/": ""},
			want: map[string][]string{"quay.io": {ours, upstreamOf("quay.io")}},
		},
		{
			name: "no directory",
			have: tree{},
			want: map[string][]string{"quay.io": {ours, upstreamOf("quay.io")}},
		},
		{
			name: "existing mirror and server stay behind us",
			have: tree{"certs.d/docker.io/hosts.toml": "# mine\nserver = \"https://fallback.x\"\n\n# the good one\n[host.\"https://mirror.x\"]\n  capabilities = [\"pull\"] # no tags\n  [host.\"https://mirror.x\".header]\n    x-a = [\"b\", \"c\"]\n[host.\"https://second.x/v2/p\"]\noverride_path = true\n"},
			want: map[string][]string{
				"docker.io": {ours, "https://mirror.x/v2 pull x-a=b|c", "https://second.x/v2/p pull,resolve,push", "https://fallback.x/v2 pull,resolve,push"},
				"quay.io":   {ours, upstreamOf("quay.io")},
			},
		},
		{
			name: "certificates alone stay with the registry",
			have: tree{"certs.d/reg.x/ca.crt": ca, "certs.d/reg.x/z.crt": ca},
			want: map[string][]string{"reg.x": {ours, upstreamOf("reg.x") + " ca"}},
		},
		{
			name: "empty hosts.toml means certificates",
			have: tree{"certs.d/reg.x/ca.crt": ca, "certs.d/reg.x/hosts.toml": ""},
			want: map[string][]string{"reg.x": {ours, upstreamOf("reg.x") + " ca"}},
		},
		{
			name: "both spellings of a port",
			have: tree{"certs.d/a.x:5000/hosts.toml": "server = \"https://a.x:5000\"\n", "certs.d/b.x_5000_/hosts.toml": "server = \"http://b.x:5000\"\n"},
			want: map[string][]string{
				"a.x:5000": {ours, upstreamOf("a.x:5000")},
				"b.x:5000": {ours, "http://b.x:5000/v2 pull,resolve,push"},
			},
		},
		{
			name: "listed registries only",
			have: tree{"certs.d/other.x/hosts.toml": "server = \"https://o.x\"\n"},
			opts: Options{Registries: []string{"docker.io", "reg.x:5000"}},
			want: map[string][]string{
				"docker.io":  {ours, upstreamOf("registry-1.docker.io")},
				"reg.x:5000": {ours, upstreamOf("reg.x:5000")},
				"other.x":    {"https://o.x/v2 pull,resolve,push"},
				"quay.io":    {upstreamOf("quay.io")},
			},
		},
		{
			name: "a listed port, in the directory that is there",
			have: tree{"certs.d/reg.x_5000_/hosts.toml": "server = \"http://reg.x:5000\"\n"},
			opts: Options{Registries: []string{"reg.x:5000"}},
			want: map[string][]string{"reg.x:5000": {ours, "http://reg.x:5000/v2 pull,resolve,push"}},
		},
		{
			name: "a listed registry keeps what _default gave it",
			have: tree{"certs.d/_default/hosts.toml": "ca = \"ca.pem\"\n[host.\"https://all.x\"]\nca = [\"ca.pem\"]\n", "certs.d/_default/ca.pem": ca},
			opts: Options{Registries: []string{"quay.io"}},
			want: map[string][]string{
				"quay.io": {ours, "https://all.x/v2 pull,resolve,push ca", upstreamOf("quay.io") + " ca"},
				"ghcr.io": {"https://all.x/v2 pull,resolve,push ca", upstreamOf("ghcr.io") + " ca"},
			},
		},
		{
			name: "a hidden root keeps its certificates",
			have: tree{"docker/reg.x/ca.crt": ca, "docker/reg.y:5000/hosts.toml": "[host.\"https://y.x\"]\nskip_verify = true\n", "certs.d/": ""},
			opts: Options{hiddenRoots: []string{"docker"}},
			want: map[string][]string{
				"reg.x":      {ours, upstreamOf("reg.x") + " ca"},
				"reg.y:5000": {ours, "https://y.x/v2 pull,resolve,push skip_verify", upstreamOf("reg.y:5000")},
				"quay.io":    {ours, upstreamOf("quay.io")},
			},
		},
		{
			name: "a hidden root keeps the certificates of a registry with two names",
			have: tree{"docker/reg.x/ca.crt": ca, "docker/reg.x:443": "-> reg.x", "certs.d/": ""},
			opts: Options{hiddenRoots: []string{"docker"}},
			want: map[string][]string{
				"reg.x":     {ours, upstreamOf("reg.x") + " ca"},
				"reg.x:443": {ours, upstreamOf("reg.x:443") + " ca"},
			},
		},
		{
			name: "certificates of a listed registry with two names",
			have: tree{"certs.d/reg.x/ca.crt": ca, "certs.d/a.x": "-> reg.x", "certs.d/z.x": "-> reg.x"},
			opts: Options{Registries: []string{"a.x", "reg.x", "z.x"}},
			want: map[string][]string{"a.x": {ours, upstreamOf("a.x") + " ca"}, "reg.x": {ours, upstreamOf("reg.x") + " ca"}},
		},
		{
			name: "a listed registry by its second name",
			have: tree{"certs.d/reg.x/ca.crt": ca, "certs.d/z.x": "-> reg.x"},
			opts: Options{Registries: []string{"z.x"}},
			want: map[string][]string{"z.x": {ours, upstreamOf("z.x") + " ca"}},
		},
		{
			name: "_default is a link to another registry's directory",
			have: tree{"certs.d/docker.io/ca.crt": ca, "certs.d/_default": "-> docker.io"},
			want: map[string][]string{"quay.io": {ours, upstreamOf("quay.io") + " ca"}},
		},
		{
			name: "an earlier run's part is replaced, not stacked",
			have: tree{"certs.d/quay.io/hosts.toml": "server = \"https://s.x\"\n# BEGIN larder 0.0.1\n[host.\"http://127.0.0.1:4999\"]\n  capabilities = [\"pull\", \"resolve\"]\n# END larder\n[host.\"https://m.x\"]\n"},
			want: map[string][]string{"quay.io": {ours, "https://m.x/v2 pull,resolve,push", "https://s.x/v2 pull,resolve,push"}},
			left: tree{"certs.d/quay.io/hosts.toml": "server = \"https://s.x\"\n[host.\"https://m.x\"]\n"},
		},
		{
			name: "a hand-written entry for our address is taken over",
			have: tree{"certs.d/quay.io/hosts.toml": "[host.\"https://m.x\"]\n[host.\"http://localhost:5050\"]\ncapabilities = [\"pull\"]\n[host.\"http://localhost:5050\".header]\na = \"b\"\n[host.\"https://n.x\"]\n"},
			want: map[string][]string{"quay.io": {ours, "https://m.x/v2 pull,resolve,push", "https://n.x/v2 pull,resolve,push", upstreamOf("quay.io")}},
		},
		{
			name: "another proxy on loopback is the user's",
			have: tree{"certs.d/quay.io/hosts.toml": "[host.\"http://127.0.0.1:30020\"]\n"},
			want: map[string][]string{"quay.io": {ours, "http://127.0.0.1:30020/v2 pull,resolve,push", upstreamOf("quay.io")}},
		},
		{
			name: "inline and dotted hosts stay invisible to 2.x",
			have: tree{
				"certs.d/quay.io/hosts.toml": "host.\"https://a.x\".capabilities = [\"pull\"] # kept\nserver = \"https://s.x\"\n",
				"certs.d/ghcr.io/hosts.toml": "host = { \"https://a.x\" = { capabilities = [\"pull\"] }, \"https://b.x\" = {} }\n[host_like]\n",
			},
			want: map[string][]string{
				"quay.io": {ours, "https://s.x/v2 pull,resolve,push"},
			},
		},
		{
			name: "malformed files are left alone",
			have: tree{"certs.d/quay.io/hosts.toml": "server = \n", "certs.d/ghcr.io/hosts.toml": "[host.\"https://m.x\"]\ncapabilities = [\"fly\"]\n"},
			want: map[string][]string{"quay.io": {upstreamOf("quay.io")}, "docker.io": {ours, upstreamOf("registry-1.docker.io")}},
		},
		{
			name: "symlinked directories and files",
			have: tree{"certs.d/a.x": "-> b.x", "certs.d/b.x/hosts.toml": "-> ../../shared.toml", "shared.toml": "[host.\"https://m.x\"]\n", "elsewhere/hosts.toml": "[host.\"https://e.x\"]\n", "certs.d/c.x": "-> ../elsewhere"},
			want: map[string][]string{
				"a.x": {ours, "https://m.x/v2 pull,resolve,push", upstreamOf("a.x")},
				"b.x": {ours, "https://m.x/v2 pull,resolve,push", upstreamOf("b.x")},
				"c.x": {ours, "https://e.x/v2 pull,resolve,push", upstreamOf("c.x")},
			},
		},
		{
			name: "the colon link",
			have: tree{"certs.d/": ""},
			opts: Options{ColonLink: true},
			want: map[string][]string{"quay.io": {ours, upstreamOf("quay.io")}},
		},
		{
			name: "Windows line ends, no line end, odd names",
			have: tree{"certs.d/quay.io/hosts.toml": "server = \"https://s.x\"\r\n[host.\"https://m.x\"]\r\n", "certs.d/ghcr.io/hosts.toml": "server = \"https://s.x\"", "certs.d/README": "x", "certs.d/a b\"c/hosts.toml": ""},
			want: map[string][]string{
				"quay.io": {ours, "https://m.x/v2 pull,resolve,push", "https://s.x/v2 pull,resolve,push"},
				"ghcr.io": {ours, "https://s.x/v2 pull,resolve,push"},
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			tt.have.write(t, dir)
			before := snapshot(t, dir)
			opts := tt.opts
			opts.Containerd = filepath.Join(dir, "certs.d")
			for i, r := range opts.hiddenRoots {
				opts.hiddenRoots[i] = filepath.Join(dir, r)
			}
			h := newHosts(t, opts)
			imports := fmt.Sprint(h.Upstreams())

			planned, err := h.Plan(t.Context())
			must(t, err)
			wantSame(t, "Plan changed something", before, snapshot(t, dir))
			applied := apply(t, h)
			if a, b := fmt.Sprint(planned), fmt.Sprint(applied); a != b {
				t.Errorf("Plan said\n%s\nApply did\n%s", a, b)
			}
			for registry, want := range tt.want {
				wantHosts(t, opts.Containerd, registry, want...)
			}
			if opts.ColonLink {
				wantHosts(t, opts.Containerd+":/etc/docker/certs.d", "quay.io", ours, upstreamOf("quay.io"))
			}
			if got := fmt.Sprint(h.Upstreams()); got != imports {
				t.Errorf("Upstreams changed by Apply:\n%s\nwere\n%s", got, imports)
			}

			active := snapshot(t, dir)
			for _, c := range apply(t, h) {
				if c.Action != Skip {
					t.Errorf("second Apply changed %+v", c)
				}
			}
			wantSame(t, "second Apply changed a file", active, snapshot(t, dir))

			if planned, err = h.PlanRemove(t.Context()); err != nil {
				t.Error(err)
			}
			if a, b := fmt.Sprint(planned), fmt.Sprint(remove(t, h)); a != b {
				t.Errorf("PlanRemove said\n%s\nRemove did\n%s", a, b)
			}
			if tt.left != nil {
				before = snapshot(t, dir)
				for name, want := range tt.left {
					wantContent(t, filepath.Join(dir, name), want)
				}
			}
			wantSame(t, "not restored", before, snapshot(t, dir))
			if again := remove(t, h); len(again) > 0 {
				t.Errorf("second Remove changed %+v", again)
			}
			wantSame(t, "second Remove left a trace", before, snapshot(t, dir))
		})
	}
}

// TestPlansTheLink: whether Apply and Remove take the colon link away is in their plans.
func TestPlansTheLink(t *testing.T) {
	dir := t.TempDir()
	opts := Options{Containerd: filepath.Join(dir, "certs.d")}
	linked := opts
	linked.ColonLink = true
	link := opts.Containerd + ":" + secondRoot
	apply(t, newHosts(t, linked))
	h := newHosts(t, opts)
	planned, err := h.Plan(t.Context())
	must(t, err)
	if applied := apply(t, h); len(applied) != 1 || fmt.Sprint(planned) != fmt.Sprint(applied) {
		t.Errorf("without the link Plan said %v, Apply did %v", planned, applied)
	}

	apply(t, newHosts(t, linked))
	must(t, os.Remove(link))
	must(t, os.Symlink("/", link)) // the user's now
	planned, err = h.PlanRemove(t.Context())
	must(t, err)
	if removed := remove(t, h); fmt.Sprint(planned) != fmt.Sprint(removed) {
		t.Errorf("PlanRemove said %v, Remove did %v", planned, removed)
	}
}

// TestUnseenRoot: in a pod the second root of config_path may be there, on the node, with the
// certificates of a registry. A _default in the first would hide them, and that registry
// could not be pulled from any more.
func TestUnseenRoot(t *testing.T) {
	for name, tt := range map[string]struct {
		have      tree
		opts      Options
		isDefault bool
	}{
		"not mounted":            {opts: Options{Contained: true}},
		"mounted":                {have: tree{"docker/": ""}, opts: Options{Contained: true}, isDefault: true},
		"on the node":            {isDefault: true},
		"read by the link alone": {opts: Options{Contained: true, ColonLink: true}, isDefault: true},
		"hidden before us":       {have: tree{"certs.d/_default/hosts.toml": ""}, opts: Options{Contained: true}, isDefault: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			tree{"certs.d/m.x/hosts.toml": "server = \"https://m.x\"\n"}.write(t, dir)
			tt.have.write(t, dir)
			tt.opts.Containerd, tt.opts.hiddenRoots = filepath.Join(dir, "certs.d"), []string{filepath.Join(dir, "docker")}
			before := snapshot(t, dir)
			earlier := newHosts(t, Options{Containerd: tt.opts.Containerd, hiddenRoots: []string{}})
			apply(t, earlier) // with a _default, by an agent that was killed
			h := newHosts(t, tt.opts)
			refused := slices.ContainsFunc(apply(t, h), func(c Change) bool { return strings.Contains(c.Reason, "furtherRoots") })
			if _, err := os.Stat(filepath.Join(dir, "certs.d/_default")); (err == nil) != tt.isDefault || refused == tt.isDefault {
				t.Errorf("_default: %v; refused with a reason: %v", err, refused)
			}
			unknown := []string{upstreamOf("reg.x")}
			if tt.isDefault {
				unknown = []string{ours, upstreamOf("reg.x")}
			}
			wantHosts(t, tt.opts.Containerd, "reg.x", unknown...)
			wantHosts(t, tt.opts.Containerd, "quay.io", ours, upstreamOf("quay.io"))
			wantHosts(t, tt.opts.Containerd, "m.x", ours, "https://m.x/v2 pull,resolve,push")
			remove(t, h)
			wantSame(t, "not restored", before, snapshot(t, dir))
		})
	}
}

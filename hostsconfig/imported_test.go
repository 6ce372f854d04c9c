package hostsconfig

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// describe writes an import on one line, paths relative to root.
func (im Imported) describe(root string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s/%s", im.Runtime, im.Registry, im.Prefix)
	if im.Blocked {
		b.WriteString(" blocked")
	}
	for _, e := range im.Endpoints {
		fmt.Fprintf(&b, " | %s", e.Base)
		for _, f := range []struct {
			on   bool
			name string
		}{{e.Source, "source"}, {!e.Pull, "no-pull"}, {!e.Resolve, "no-resolve"}, {e.SkipVerify, "skip_verify"}, {e.AllowHTTP, "http"}, {len(e.Header) > 0, "header"}} {
			if f.on {
				b.WriteString(" " + f.name)
			}
		}
		if e.DialTimeout > 0 {
			fmt.Fprintf(&b, " dial=%v", e.DialTimeout)
		}
		fmt.Fprintf(&b, " %v%v", e.CAFiles, e.ClientPairs)
	}
	return strings.ReplaceAll(b.String(), root+"/", "")
}

func TestUpstreams(t *testing.T) {
	tests := []struct {
		name string
		have tree
		want []string
	}{
		{
			name: "hosts.toml: order, server, certificates, limits",
			have: tree{"etc/containerd/certs.d/docker.io/hosts.toml": `
server = "https://s.x/base"
ca = "ca.pem"
[host."https://a.x"]
capabilities = ["pull"]
dial_timeout = "3s"
client = [["a.cert", "/abs/a.key"]]
[host."http://b.x:80/v2/proxy/"]
override_path = true
skip_verify = true
[host."b.y".header]
authorization = "Basic secret"
[host."http://127.0.0.1:5050"]
`},
			want: []string{"containerd docker.io/ | https://a.x/v2 no-resolve dial=3s [][{etc/containerd/certs.d/docker.io/a.cert /abs/a.key}] | http://b.x:80/v2/proxy skip_verify [][] | https://b.y/v2 header [][] | https://s.x/base/v2 source [etc/containerd/certs.d/docker.io/ca.pem][]"},
		},
		{
			name: "_default, certificates, both spellings, malformed",
			have: tree{
				"etc/containerd/certs.d/_default/hosts.toml":    "[host.\"https://all.x\"]\n",
				"etc/containerd/certs.d/c.x/a.crt":              "x",
				"etc/containerd/certs.d/c.x/b.cert":             "x",
				"etc/containerd/certs.d/c.x/b.key":              "x",
				"etc/containerd/certs.d/d.x:5000/hosts.toml":    "server = \"https://second\"\n",
				"etc/containerd/certs.d/d.x_5000_/hosts.toml":   "server = \"https://first\"\n",
				"etc/containerd/certs.d/e.x/hosts.toml":         "bad",
				"etc/containerd/certs.d/e.x/ca.crt":             "x",
				"etc/containerd/certs.d/f.x/hosts.toml":         "bad",
				"etc/containerd/certs.d/empty.x/unrelated.file": "",
			},
			want: []string{
				"containerd */ | https://all.x/v2 [][] |  source [][]",
				"containerd c.x/ |  source [etc/containerd/certs.d/c.x/a.crt][{etc/containerd/certs.d/c.x/b.cert etc/containerd/certs.d/c.x/b.key}]",
				"containerd d.x:5000/ | https://first/v2 source [][]",
				"containerd e.x/ |  source [etc/containerd/certs.d/e.x/ca.crt][]",
			},
		},
		{
			name: "registries.conf",
			have: tree{
				"etc/containers/registries.conf": `
[[registry]]
location = "quay.io"
blocked = true
[[registry.mirror]]
location = "m.corp:5000/quay"
[[registry.mirror]]
location = "n.corp"
insecure = true
pull-from-mirror = "digest-only"
[[registry]]
prefix = "docker.io/library"
location = "hub.corp/lib"
[[registry]]
prefix = "*.corp"
insecure = true
`,
				"etc/containers/certs.d/m.corp:5000/ca.crt": "x",
				"etc/docker/certs.d/hub.corp/client.cert":   "x",
			},
			want: []string{
				"crio *.corp/ |  source skip_verify http [][]",
				"crio docker.io/library | https://hub.corp/v2/lib source [][{etc/docker/certs.d/hub.corp/client.cert }]",
				"crio quay.io/ blocked | https://m.corp:5000/v2/quay [etc/containers/certs.d/m.corp:5000/ca.crt][] | https://n.corp/v2 no-resolve skip_verify http [][]",
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			tt.have.write(t, root)
			h := newHosts(t, Options{Containerd: filepath.Join(root, "etc/containerd/certs.d"), CRIO: filepath.Join(root, "etc/containers/registries.conf.d"), HiddenRoots: []string{}})
			var got []string
			for _, im := range h.Upstreams() {
				got = append(got, im.describe(root))
			}
			wantSame(t, "imported", tt.want, got)
		})
	}
}

// TestNoSecrets: headers and passwords of existing mirrors are used, and shown
// nowhere.
func TestNoSecrets(t *testing.T) {
	root := t.TempDir()
	tree{
		"certs.d/a.x/hosts.toml": "[host.\"https://user:secret@m.x\"]\n[host.\"https://user:secret@m.x\".header]\nauthorization = \"secret\"\n",
		"certs.d/b.x/hosts.toml": "[host.\"https://user:secret@m.x\"]\ncapabilities = [\"secret-ish\"]\n",
	}.write(t, root)
	var logged strings.Builder
	h := newHosts(t, Options{Containerd: filepath.Join(root, "certs.d"), Logger: slog.New(slog.NewJSONHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	apply(t, h)
	list := h.Upstreams()
	h.log.Info("imported", "upstream", list[0].Endpoints[0])
	text, err := json.Marshal(list)
	must(t, err)
	if list[0].Endpoints[0].Header.Get("Authorization") == "" {
		t.Error("the header was not imported")
	}
	for what, s := range map[string]string{"log": logged.String(), "JSON": string(text)} {
		if strings.Contains(strings.ReplaceAll(s, "secret-ish", ""), "secret") {
			t.Errorf("%s shows a secret: %s", what, s)
		}
	}
}

// TestMergedText pins the bytes: one block is inserted and nothing else moves.
// Hosts without a header are the exception: containerd 1.x orders hosts by
// line, and inline tables before all others, so they become dotted keys.
func TestMergedText(t *testing.T) {
	block := blockBegin + "\n[host.\"http://127.0.0.1:5050\"]\n  capabilities = [\"pull\", \"resolve\"]\n" + blockEnd
	for _, tt := range []struct{ name, have, want string }{
		{"nothing", "", block + "\n"},
		{"root keys", "# a\nserver = \"https://s.x\" # b\n", "# a\nserver = \"https://s.x\" # b\n" + block + "\n"},
		{"no line end", "server = \"https://s.x\"", "server = \"https://s.x\"\n" + block},
		{"tables", "server = \"https://s.x\"\n\n  # c\n  [host.\"https://m.x\"] # d\n", "server = \"https://s.x\"\n\n  # c\n" + block + "\n  [host.\"https://m.x\"] # d\n"},
		{"dotted", "host.\"https://a.x\".skip_verify = true # e\nserver = \"https://s.x\"\n", "server = \"https://s.x\"\n" + block + "\n[host]\n\"https://a.x\".skip_verify = true # e\n"},
		{"inline", "host = { \"https://a.x\" = { skip_verify = true, header = { h = \"v\" } } }\n", block + "\n[host]\n\"https://a.x\".skip_verify = true\n\"https://a.x\".header = { h = \"v\" }\n"},
		{"dotted inline", "host.'https://a.x' = { skip_verify = true } # f\n", block + "\n[host]\n'https://a.x'.skip_verify = true # f\n"},
		{"host table", "[host]\n\"https://a.x\" = { skip_verify = true } # g\n", block + "\n[host]\n\"https://a.x\".skip_verify = true # g\n"},
		{"looks like a table", "header.x = \"\"\"\n[host.no]\n\"\"\"\n[other]\n", "header.x = \"\"\"\n[host.no]\n\"\"\"\n" + block + "\n[other]\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHosts(t, Options{})
			got, err := mergeHosts([]byte(tt.have), certFiles{}, h.proxy)
			must(t, err)
			if string(got) != tt.want {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

func TestQuoting(t *testing.T) {
	certs := certFiles{ca: []string{"a\"b\\c\n.crt"}, client: [][2]string{{"x y.cert", "x y.key"}, {"both.cert", ""}}}
	h := newHosts(t, Options{})
	doc, err := mergeHosts(nil, certs, h.proxy)
	must(t, err)
	f, err := parseHosts(doc)
	must(t, err)
	if got := fmt.Sprintf("%q %q", f.CA, f.Client); got != `["a\"b\\c\n.crt"] [["x y.cert" "x y.key"] ["both.cert" "both.cert"]]` {
		t.Errorf("read back as %s", got)
	}
}

func TestPlanRemove(t *testing.T) {
	dir := t.TempDir()
	crashTree.write(t, dir)
	opts := crashOptions(dir)
	h := newHosts(t, opts)
	apply(t, h)
	active := snapshot(t, dir)
	planned, err := h.PlanRemove(t.Context())
	must(t, err)
	wantSame(t, "PlanRemove changed something", active, snapshot(t, dir))
	if removed := remove(t, h); fmt.Sprint(planned) == "[]" || len(planned) != len(removed) {
		t.Errorf("planned %d changes, made %d", len(planned), len(removed))
	}
}

// TestMeta: a file that others may read or write stays so while it is ours.
func TestMeta(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "certs.d/a.x/hosts.toml")
	tree{"certs.d/a.x/hosts.toml": "server = \"https://s.x\"\n"}.write(t, dir)
	must(t, os.Chmod(path, 0o664))
	owner := os.Getuid()
	if owner == 0 {
		owner = 12345
		must(t, os.Chown(path, owner, owner))
	}
	apply(t, newHosts(t, Options{Containerd: filepath.Join(dir, "certs.d")}))
	info, err := os.Stat(path)
	must(t, err)
	if f := newFile(info); f.mode != 0o664 || f.uid != owner {
		t.Errorf("mode %v, owner %d", f.mode, f.uid)
	}
}

func TestExplain(t *testing.T) {
	d := directory{"/x", crio}
	for err, want := range map[error]string{
		&os.PathError{Op: "open", Path: "/x", Err: syscall.EROFS}:  "mount /x read-write",
		&os.PathError{Op: "open", Path: "/x", Err: syscall.EACCES}: "may write /x",
		syscall.ENOSPC: "hosts.crio: no space left",
	} {
		if got := explain(d, err).Error(); !strings.Contains(got, want) {
			t.Errorf("%v: %q does not say %q", err, got, want)
		}
	}
}

func TestUnifiedDiff(t *testing.T) {
	lines := func(s string) []byte { return []byte(strings.ReplaceAll(s, " ", "\n") + "\n") }
	for _, tt := range []struct {
		name     string
		from, to []byte
		want     string
	}{
		{"same", lines("a b"), lines("a b"), ""},
		{"from nothing", nil, lines("a b"), "--- /dev/null\n+++ /f\n@@ -0,0 +1,2 @@\n+a\n+b\n"},
		{"one of many", lines("1 2 3 4 5 6 7 8 9"), lines("1 2 3 4 x 6 7 8 9"), "--- /f\n+++ /f\n@@ -2,7 +2,7 @@\n 2\n 3\n 4\n-5\n+x\n 6\n 7\n 8\n"},
		{"far apart", lines("1 2 3 4 5 6 7 8 9 a"), lines("x 2 3 4 5 6 7 8 9 y"), "--- /f\n+++ /f\n@@ -1,4 +1,4 @@\n-1\n+x\n 2\n 3\n 4\n@@ -7,4 +7,4 @@\n 7\n 8\n 9\n-a\n+y\n"},
		{"no line end", []byte("a"), []byte("a\nb"), "--- /f\n+++ /f\n@@ -1 +1,2 @@\n-a\n\\ No newline at end of file\n+a\n+b\n\\ No newline at end of file\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := unifiedDiff("/f", tt.from, tt.to, tt.from == nil, false); got != tt.want {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

// TestCopyFile: where no hard link can be made, because a host directory is a
// symlink to another file system, a copy keeps what it can.
func TestCopyFile(t *testing.T) {
	dir := t.TempDir()
	tree{"a": "x", "b": "-> a"}.write(t, dir)
	must(t, os.Chmod(filepath.Join(dir, "a"), 0o604))
	for _, name := range []string{"a", "b"} {
		must(t, disk{}.copyFile(filepath.Join(dir, name), filepath.Join(dir, name+".copy")))
		was, err := os.Lstat(filepath.Join(dir, name))
		must(t, err)
		is, err := os.Lstat(filepath.Join(dir, name+".copy"))
		must(t, err)
		if was.Mode() != is.Mode() || name == "a" && !was.ModTime().Equal(is.ModTime()) {
			t.Errorf("%s: %v %v became %v %v", name, was.Mode(), was.ModTime(), is.Mode(), is.ModTime())
		}
	}
	wantContent(t, filepath.Join(dir, "a.copy"), "x")
}

package hostsconfig

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

var update = flag.Bool("update", false, "rewrite the golden files of the doctor")

// TestDiagnose runs the doctor over the nodes in testdata/doctor: a few facts,
// then the node's files, in one text each.
func TestDiagnose(t *testing.T) {
	cases, err := filepath.Glob("testdata/doctor/*.txt")
	must(t, err)
	if len(cases) < 20 {
		t.Fatalf("only %d cases found", len(cases))
	}
	for _, name := range cases {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			findings := Diagnose(readNode(t, name))
			for _, f := range findings {
				if f.ID == "" || f.Severity == "" || f.What == "" || f.Severity != Note && f.Fix == "" {
					t.Errorf("incomplete finding %+v", f)
				}
			}
			got := describeFindings(findings)
			golden := strings.TrimSuffix(name, ".txt") + ".golden"
			if *update {
				must(t, os.WriteFile(golden, []byte(got), 0o644))
			}
			wantContent(t, golden, got)
		})
	}
}

func describeFindings(findings []Finding) string {
	var b strings.Builder
	for _, f := range findings {
		fmt.Fprintf(&b, "%s %s %s\n  %s\n", f.Severity, f.ID, f.Where, f.What)
		for line := range strings.Lines(f.Fix) {
			fmt.Fprintf(&b, "    | %s\n", strings.TrimRight(line, "\n"))
		}
	}
	return b.String()
}

func readNode(t *testing.T, name string) DoctorOptions {
	t.Helper()
	text, err := os.ReadFile(name)
	must(t, err)
	files := fstest.MapFS{}
	opts := DoctorOptions{FS: files, Containerd: "/etc/containerd/certs.d", ProxyAddr: testProxy}
	var file string
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(line, "-- /"); ok {
			file = strings.TrimSuffix(strings.TrimSpace(path), " --")
			files[file] = &fstest.MapFile{Mode: 0o644}
			continue
		}
		if file == "" {
			setFact(t, &opts, line)
			continue
		}
		if target, ok := strings.CutPrefix(line, "-> "); ok {
			files[file] = &fstest.MapFile{Mode: fs.ModeSymlink | 0o777, Data: []byte(strings.TrimSpace(target))}
			continue
		}
		files[file].Data = append(files[file].Data, line...)
	}
	return opts
}

func setFact(t *testing.T, opts *DoctorOptions, line string) {
	t.Helper()
	key, value, _ := strings.Cut(line, "=")
	value = strings.TrimSpace(value)
	switch strings.TrimSpace(key) {
	case "version":
		opts.Facts.ContainerdVersion = value
	case "up":
		opts.Facts.ProxyUp = value == "true"
	case "taken":
		opts.Facts.PortTaken = value
	case "seen_only":
		opts.SeenOnly = value == "true"
	case "colon_link":
		opts.ColonLink = value == "true"
	case "image":
		opts.Facts.CRIOImages = append(opts.Facts.CRIOImages, value)
	case "containerd":
		opts.Containerd = value
	case "crio":
		opts.CRIO = value
	default:
		t.Fatalf("unknown fact %q", line)
	}
}

// TestDiagnoseAfterApply: what we write ourselves is never a finding.
func TestDiagnoseAfterApply(t *testing.T) {
	root := t.TempDir()
	tree{
		"etc/containerd/config.toml":                "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/etc/containerd/certs.d:/etc/docker/certs.d\"\n",
		"etc/containerd/certs.d/quay.io/hosts.toml": "[host.\"https://m.x\"]\n",
		"etc/containerd/certs.d/reg.x/ca.crt":       "x",
		"etc/containers/registries.conf":            "[[registry]]\nlocation = \"reg.x:5000\"\n",
		"etc/containers/registries.conf.d/":         "",
	}.write(t, root)
	h := newHosts(t, Options{
		Containerd: filepath.Join(root, "etc/containerd/certs.d"), CRIO: filepath.Join(root, "etc/containers/registries.conf.d"), ColonLink: true,
	})
	apply(t, h)
	opts := DoctorOptions{
		FS: os.DirFS(root), Containerd: "/etc/containerd/certs.d", CRIO: "/etc/containers/registries.conf.d", ProxyAddr: testProxy,
		Facts: Facts{ContainerdVersion: "2.3.4", ProxyUp: true},
	}
	if findings := Diagnose(opts); len(findings) > 0 {
		t.Errorf("findings on a good node:\n%s", describeFindings(findings))
	}
	opts.Facts.ProxyUp = false
	leftovers := 0
	for _, f := range Diagnose(opts) {
		if f.ID == "leftovers" {
			leftovers++
		}
	}
	if leftovers != 4 { // _default, quay.io, reg.x, 99-larder.conf
		t.Errorf("%d leftovers found, want 4", leftovers)
	}
}

// TestReadsOneRoot: with the link containerd reads our directory alone, except where it
// pulls without its transfer service, or may be a release that splits the path.
func TestReadsOneRoot(t *testing.T) {
	const images = "[plugins.'io.containerd.cri.v1.images']\n"
	for config, want := range map[string]bool{
		"version = 3\n": true,
		"version = 4\n" + images + "max_concurrent_downloads = 3\n":   true,
		"version = 3\n" + images + "discard_unpacked_layers = true\n": false,
		"version = 2\n": false,
		"":              false, // version 1
		"version = ":    false, // cannot be read
	} {
		if got := readsOneRoot(fstest.MapFS{"etc/containerd/config.toml": {Data: []byte(config)}}); got != want {
			t.Errorf("%q: %v, want %v", config, got, want)
		}
	}
	if !readsOneRoot(fstest.MapFS{}) {
		t.Error("a containerd without a file does not read one root")
	}
}

func TestHiddenRoots(t *testing.T) {
	const ours = "/etc/containerd/certs.d"
	config := func(path string) fstest.MapFS {
		return fstest.MapFS{"etc/containerd/config.toml": {Data: []byte("version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"" + path + "\"\n")}}
	}
	for _, tt := range []struct {
		name string
		node fstest.MapFS
		want string
	}{
		{"one root", config(ours), "[]"},
		{"two roots", config(ours + ":/a:/b"), "[/a /b]"},
		{"ours is last", config("/a:" + ours), "[]"},
		{"ours is not there", config("/a:/b"), "[]"},
		{"unset", config(""), "[" + secondRoot + "]"},
		{"not to be seen", fstest.MapFS{}, "[" + secondRoot + "]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := fmt.Sprint(hiddenRoots(tt.node, ours)); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

// TestImports: which config_path is in force where files import others, as `containerd
// config dump` of 2.4 says of the same files.
func TestImports(t *testing.T) {
	for name, tc := range map[string]struct {
		files map[string]string // imports of each; its config_path is its name
		want  string
	}{
		"an import of an import comes last": {map[string]string{"config.toml": `"a.toml", "b.toml"`, "a.toml": `"c.toml"`, "b.toml": "", "c.toml": ""}, "c.toml"},
		"in a circle":                       {map[string]string{"config.toml": `"a.toml"`, "a.toml": `"config.toml", "b.toml"`, "b.toml": `"a.toml"`}, "b.toml"},
		"named twice":                       {map[string]string{"config.toml": `"a.toml", "b.toml", "a.toml"`, "a.toml": "", "b.toml": ""}, "b.toml"},
		"a pattern":                         {map[string]string{"config.toml": `"conf.d/*.toml"`, "conf.d/a.toml": "", "conf.d/b.toml": ""}, "conf.d/b.toml"},
		"a pattern of directories":          {map[string]string{"config.toml": `"conf*/*/[x-z]?.toml"`, "conf.d/one/x1.toml": "", "conf.d/two/a2.toml": ""}, "conf.d/one/x1.toml"},
		"no pattern without *":              {map[string]string{"config.toml": `"[ab].toml"`, "[ab].toml": "", "a.toml": "", "b.toml": ""}, "[ab].toml"},
	} {
		t.Run(name, func(t *testing.T) {
			files := fstest.MapFS{}
			for file, imports := range tc.files {
				text := fmt.Sprintf("version = 4\nimports = [%s]\n[plugins.%q.registry]\nconfig_path = %q\n", imports, pluginNew, file)
				files["etc/containerd/"+file] = &fstest.MapFile{Data: []byte(text), Mode: 0o644}
			}
			d := &doctor{node: node{files}, opts: DoctorOptions{FS: files}}
			c := d.loadConfig()
			if got := c.registry()["config_path"]; got != tc.want || !strings.HasPrefix(c.where, "/etc/containerd/"+tc.want+":") {
				t.Errorf("%v of %s, want %s", got, c.where, tc.want)
			}
		})
	}
}

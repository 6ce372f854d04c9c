package hostsconfig

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// sources lists what our drop-in says for one prefix, in order.
func sources(tb testing.TB, doc []byte, prefix string) []string {
	tb.Helper()
	rules, err := parseRegistries(doc)
	must(tb, err)
	for _, r := range rules {
		if r.str("prefix") != prefix {
			continue
		}
		var out []string
		for _, m := range r.mirrors() {
			out = append(out, strings.TrimSpace(m.str("location")+flags(m)))
		}
		return append(out, strings.TrimSpace("= "+r.str("location")+flags(r)))
	}
	return nil
}

func flags(r rule) string {
	s := ""
	for _, k := range []string{"insecure", "blocked", "mirror-by-digest-only"} {
		if r.flag(k) {
			s += " " + k
		}
	}
	if by := r.str("pull-from-mirror"); by != "" {
		s += " " + by
	}
	return s
}

func TestDropIn(t *testing.T) {
	us := func(path string) string { return "127.0.0.1:5050/" + path + " insecure" }
	tests := []struct {
		name   string
		files  []string // registries.conf, then drop-ins
		listed []string
		want   map[string][]string // prefix -> mirrors, then "= location"; nil: no entry
	}{
		{
			name: "nothing before us",
			want: map[string][]string{
				"docker.io":     {us("docker.io"), "= docker.io"},
				"quay.io":       {us("quay.io"), "= quay.io"},
				"quay.io:443":   {"= quay.io:443"}, // the prefix quay.io must not rewrite quay.io:443/x
				"reg.corp":      nil,
				"docker.io:443": {"= docker.io:443"},
			},
		},
		{
			name:   "listed with port",
			listed: []string{"reg.corp:5000"},
			want: map[string][]string{
				"reg.corp:5000": {us("reg.corp_5000"), "= reg.corp:5000"},
				"docker.io":     nil,
			},
		},
		{
			name: "mirrors are kept behind us, with their limits",
			files: []string{`
[[registry]]
prefix = "quay.io/org"
location = "quay.io/org"
mirror-by-digest-only = true
future-key = "kept"
[[registry.mirror]]
location = "m.corp/q"
[[registry]]
location = "ghcr.io/"
insecure = true
mirror = [{location = "a.corp", pull-from-mirror = "tag-only"}, {location = "b.corp", insecure = true}]
`},
			want: map[string][]string{
				"quay.io/org": {us("quay.io/org"), "m.corp/q digest-only", "= quay.io/org"},
				"ghcr.io":     {us("ghcr.io"), "a.corp tag-only", "b.corp insecure", "= ghcr.io insecure"},
			},
		},
		{
			name: "blocked with mirrors stays blocked; blocked alone is left alone",
			files: []string{`
[[registry]]
location = "quay.io"
blocked = true
[[registry.mirror]]
location = "m.corp/q"
[[registry]]
location = "docker.io"
blocked = true
`},
			want: map[string][]string{
				"quay.io":   {us("quay.io"), "m.corp/q", "= quay.io blocked"},
				"docker.io": nil,
			},
		},
		{
			name:  "a part of a registry that is blocked is not asked by way of us",
			files: []string{"[[registry]]\nlocation = \"quay.io/acme\"\nblocked = true\n[[registry.mirror]]\nlocation = \"m.corp/acme\"\n"},
			want:  map[string][]string{"quay.io/acme": nil, "quay.io": {us("quay.io"), "= quay.io"}},
		},
		{
			name: "a later file replaces the whole rule",
			files: []string{
				"[[registry]]\nlocation = \"quay.io\"\n[[registry.mirror]]\nlocation = \"old.corp\"\n",
				"[[registry]]\nlocation = \"quay.io\"\n[[registry.mirror]]\nlocation = \"new.corp\"\n",
			},
			want: map[string][]string{"quay.io": {us("quay.io"), "new.corp", "= quay.io"}},
		},
		{
			name: "another location is a rewrite and stays one",
			files: []string{
				"[[registry]]\nprefix = \"docker.io\"\nlocation = \"hub.corp/docker\"\n[[registry]]\nprefix = \"docker.io/library\"\nlocation = \"hub.corp/lib\"\n",
			},
			want: map[string][]string{
				"docker.io":         {us("docker.io"), "= hub.corp/docker"},
				"docker.io/library": nil, // the agent would ask Docker Hub for it
			},
		},
		{
			name:  "wildcards are left alone, and what they say holds for the registries we name",
			files: []string{"[[registry]]\nprefix = \"*.redhat.io\"\nblocked = true\n[[registry.mirror]]\nlocation = \"m.corp/rh\"\n[[registry]]\nprefix = \"*.gitlab.com\"\nblocked = true\n"},
			want: map[string][]string{
				"*.redhat.io":         nil,
				"registry.redhat.io":  nil, // the agent would ask it
				"registry.gitlab.com": nil,
			},
		},
		{
			name:   "a listed path-less host inherits from nothing but itself",
			files:  []string{"[[registry]]\nprefix = \"reg.corp:5000/team\"\nlocation = \"other.corp/team\"\n"},
			listed: []string{"reg.corp:5000"},
			want: map[string][]string{
				"reg.corp:5000":      {us("reg.corp_5000"), "= reg.corp:5000"},
				"reg.corp:5000/team": nil,
			},
		},
		{
			name:  "settings that one file cannot hold leave the later prefix out",
			files: []string{"[[registry]]\nprefix = \"a.corp\"\nlocation = \"quay.io\"\ninsecure = true\n"},
			want: map[string][]string{
				"a.corp":  {us("a.corp"), "= quay.io insecure"},
				"quay.io": nil,
			},
		},
		{
			name:  "a host of the user's, whose ports its rule holds for too",
			files: []string{"[[registry]]\nlocation = \"reg.corp\"\ninsecure = true\n[[registry.mirror]]\nlocation = \"m.corp\"\n"},
			want: map[string][]string{
				"reg.corp":      {us("reg.corp"), "m.corp", "= reg.corp insecure"},
				"reg.corp:5000": {"m.corp:5000", "= reg.corp:5000 insecure"},
			},
		},
		{
			name: "keys in any case",
			files: []string{`
[[Registry]]
Location = "quay.io"
Blocked = true
[[Registry]]
LOCATION = "ghcr.io"
Mirror-By-Digest-Only = true
[[Registry.Mirror]]
Location = "m.corp"
INSECURE = true
`},
			want: map[string][]string{
				"quay.io": nil, // blocked
				"ghcr.io": {us("ghcr.io"), "m.corp insecure digest-only", "= ghcr.io"},
			},
		},
		{
			name:   "a port of a listed host, which is another registry",
			files:  []string{"[[registry]]\nlocation = \"reg.corp:5000\"\ninsecure = true\n[[registry]]\nlocation = \"reg.corp/team\"\n"},
			listed: []string{"reg.corp"},
			want: map[string][]string{
				"reg.corp":      {us("reg.corp"), "= reg.corp"},
				"reg.corp/team": {us("reg.corp/team"), "= reg.corp/team"},
				"reg.corp:5000": nil, // the user's rule is in force
				"reg.corp:5001": {"= reg.corp:5001"},
			},
		},
		{
			name:   "a listed port of a listed host, and of one of the user's",
			files:  []string{"[[registry]]\nlocation = \"reg.corp\"\ninsecure = true\n"},
			listed: []string{"reg.corp:5000", "reg.test", "reg.test:5000"},
			want: map[string][]string{
				"reg.corp:5000": {us("reg.corp_5000"), "= reg.corp:5000 insecure"},
				"reg.test":      {us("reg.test"), "= reg.test"},
				"reg.test:5000": {us("reg.test_5000"), "= reg.test:5000"},
				"reg.test:5001": {"= reg.test:5001"},
			},
		},
		{
			name:  "names that are no image path",
			files: []string{"[[registry]]\nlocation = \"Reg.Corp\"\n[[registry]]\nlocation = \"[::1]:5000\"\n"},
			want:  map[string][]string{"Reg.Corp": nil, "[::1]:5000": nil},
		},
		{
			name:  "our own mirror is not stacked",
			files: []string{"[[registry]]\nlocation = \"quay.io\"\n[[registry.mirror]]\nlocation = \"localhost:5050/quay.io\"\n"},
			want:  map[string][]string{"quay.io": {us("quay.io"), "= quay.io"}},
		},
		{
			name:  "version 1",
			files: []string{"[registries.search]\nregistries = [\"docker.io\"]\n[registries.insecure]\nregistries = [\"reg.corp:5000\"]\n[registries.block]\nregistries = [\"quay.io\"]\n"},
			want: map[string][]string{
				"reg.corp:5000": {us("reg.corp_5000"), "= reg.corp:5000 insecure"},
				"quay.io":       nil,
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			have := tree{"etc/containers/registries.conf.d/": ""}
			for i, f := range tt.files {
				name := "etc/containers/registries.conf"
				if i > 0 {
					name += fmt.Sprintf(".d/%02d.conf", i)
				}
				have[name] = f
			}
			have.write(t, root)
			before := snapshot(t, root)
			dir := filepath.Join(root, "etc/containers/registries.conf.d")
			h := newHosts(t, Options{CRIO: dir, Registries: tt.listed})
			for _, c := range apply(t, h) {
				if !c.ReloadNeeded {
					t.Errorf("%s: CRI-O does not see it without a reload", c.Path)
				}
			}
			doc, err := os.ReadFile(filepath.Join(dir, dropInName))
			must(t, err)
			for prefix, want := range tt.want {
				if got := sources(t, doc, prefix); fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("%s: %q, want %q", prefix, got, want)
				}
			}
			for i, line := range strings.Split(string(doc), "\n") {
				if strings.HasPrefix(line, "prefix = ") && strings.Count(string(doc), line+"\n") > 1 {
					t.Errorf("line %d: %s stands twice", i+1, line)
				}
			}
			if strings.Contains(strings.Join(tt.files, ""), "future-key") && !strings.Contains(string(doc), "future-key") {
				t.Error("an unknown key was lost")
			}
			remove(t, h)
			wantSame(t, "not restored", before, snapshot(t, root))
		})
	}
}

// TestBrokenRegistriesConf: a file that containers-image refuses is reported,
// and nothing is written beside it.
func TestBrokenRegistriesConf(t *testing.T) {
	for name, doc := range map[string]string{
		"syntax":             "[[registry]\n",
		"scheme":             "[[registry]]\nlocation = \"https://quay.io\"\n",
		"prefix alone":       "[[registry]]\nprefix = \"quay.io\"\n",
		"empty":              "[[registry]]\n",
		"conflict":           "[[registry]]\nlocation = \"a.x\"\n[[registry]]\nprefix = \"b.x\"\nlocation = \"a.x\"\nblocked = true\n",
		"both limits":        "[[registry]]\nlocation = \"a.x\"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = \"m.x\"\npull-from-mirror = \"all\"\n",
		"mirror nowhere":     "[[registry]]\nlocation = \"a.x\"\n[[registry.mirror]]\ninsecure = true\n",
		"wildcard with path": "[[registry]]\nprefix = \"*.a.x/b\"\n",
		"wrong type":         "[[registry]]\nlocation = \"a.x\"\nblocked = \"yes\"\n",
		"mirror no table":    "[[registry]]\nlocation = \"a.x\"\nmirror = [\"m.x\"]\n",
		"mirror's type":      "[[registry]]\nlocation = \"a.x\"\n[[registry.mirror]]\nlocation = \"m.x\"\ninsecure = \"yes\"\n",
		"limit of no mirror": "[[registry]]\nlocation = \"a.x\"\npull-from-mirror = \"all\"\n",
		"unknown limit":      "[[registry]]\nlocation = \"a.x\"\n[[registry.mirror]]\nlocation = \"m.x\"\npull-from-mirror = \"never\"\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			tree{"d/10-bad.conf": doc}.write(t, dir)
			h := newHosts(t, Options{CRIO: filepath.Join(dir, "d")})
			changes := apply(t, h)
			if len(changes) != 1 || changes[0].Action != Skip || !strings.Contains(changes[0].Reason, "10-bad.conf") {
				t.Errorf("got %+v, want a Skip that names the file", changes)
			}
			if _, err := os.Stat(filepath.Join(dir, "d", dropInName)); err == nil {
				t.Error("wrote a drop-in all the same")
			}

			// One that is there already stays: without it CRI-O reads no more than with it.
			must(t, os.Rename(filepath.Join(dir, "d/10-bad.conf"), filepath.Join(dir, "bad")))
			apply(t, h)
			must(t, os.Rename(filepath.Join(dir, "bad"), filepath.Join(dir, "d/10-bad.conf")))
			if changes := apply(t, h); len(changes) != 1 || changes[0].Action != Skip {
				t.Errorf("got %+v, want a Skip", changes)
			}
			if !fileHas(filepath.Join(dir, "d", dropInName), testProxy) {
				t.Error("took the drop-in away")
			}
		})
	}
}

// TestDropInFollowsOthers: what the drop-in copies is kept up to date.
func TestDropInFollowsOthers(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "registries.conf.d")
	tree{"registries.conf.d/10-a.conf": "[[registry]]\nlocation = \"quay.io\"\n[[registry.mirror]]\nlocation = \"old.corp\"\n"}.write(t, root)
	h := newHosts(t, Options{CRIO: dir})
	apply(t, h)
	must(t, os.WriteFile(filepath.Join(dir, "10-a.conf"), []byte("[[registry]]\nlocation = \"quay.io\"\nblocked = true\n[[registry.mirror]]\nlocation = \"new.corp\"\n"), 0o644))
	if changes := apply(t, h); len(changes) != 1 || changes[0].Action != Update {
		t.Fatalf("got %+v", changes)
	}
	doc, err := os.ReadFile(filepath.Join(dir, dropInName))
	must(t, err)
	if got := fmt.Sprint(sources(t, doc, "quay.io")); got != "[127.0.0.1:5050/quay.io insecure new.corp = quay.io blocked]" {
		t.Errorf("got %s", got)
	}
	for _, im := range h.Upstreams() {
		if im.Registry == "quay.io" && (!im.Blocked || len(im.Endpoints) != 1 || im.Endpoints[0].Base != "https://new.corp/v2") {
			t.Errorf("imported %+v", im)
		}
	}
}

// TestMaskedRegistriesConf: containers-image reads a link to /dev/null as an empty file.
func TestMaskedRegistriesConf(t *testing.T) {
	root := t.TempDir()
	tree{
		"etc/containers/registries.conf.d/10-a.conf": "-> /dev/null", "usr/share/containers/registries.conf.d/10-a.conf": "[[registry]]\nlocation = \"vendor.x\"\n",
		"etc/containers/registries.conf": "-> /dev/null", "usr/share/containers/registries.conf": "[[registry]]\nlocation = \"main.x\"\n",
		"etc/containers/registries.conf.d/20-b.conf": "[[registry]]\nlocation = \"b.x\"\n",
	}.write(t, root)
	dir := filepath.Join(root, "etc/containers/registries.conf.d")
	h := newHosts(t, Options{CRIO: dir})
	if changes := apply(t, h); len(changes) != 1 || changes[0].Action != Create {
		t.Fatalf("got %+v, want a new drop-in", changes)
	}
	for name, want := range map[string]bool{"b.x": true, "vendor.x": false, "main.x": false} {
		if got := fileHas(filepath.Join(dir, dropInName), testProxy+"/"+name); got != want {
			t.Errorf("an entry for %s: %v, want %v", name, got, want)
		}
	}
}

// TestBrokenLater: while a file is malformed CRI-O goes on with what it has read, and asks us
// for it. Its blocks and mirrors were forgotten then: the agent asked a blocked registry.
func TestBrokenLater(t *testing.T) {
	dir := t.TempDir()
	tree{"10-a.conf": "[[registry]]\nlocation = \"quay.io\"\nblocked = true\n[[registry.mirror]]\nlocation = \"m.corp\"\n"}.write(t, dir)
	h := newHosts(t, Options{CRIO: dir})
	apply(t, h)
	before := fmt.Sprint(h.Upstreams())
	tree{"20-b.conf": "[[registry]\n"}.write(t, dir)
	for range 2 {
		if got := fmt.Sprint(h.Upstreams()); got != before {
			t.Errorf("with a malformed drop-in: %s\nbefore: %s", got, before)
		}
	}
	must(t, os.WriteFile(filepath.Join(dir, "10-a.conf"), nil, 0o644))
	must(t, os.Remove(filepath.Join(dir, "20-b.conf")))
	if got := h.Upstreams(); len(got) > 0 {
		t.Errorf("after both were mended: %v", got)
	}
}

package hostsconfig

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker/config"
)

// FuzzMergeHosts: whatever a user's hosts.toml holds, containerd's parser sees
// us first and everything it saw before, in order; and we can be taken out to
// the byte (I3, I4).
func FuzzMergeHosts(f *testing.F) {
	for _, seed := range []string{
		"", "\n", "# only a comment", "server = \"https://s.x\"", "server = \"https://s.x\"\r\n[host.\"https://m.x\"]\r\n",
		"[host.\"https://m.x\"]\n  capabilities = [\"pull\"]\n  [host.\"https://m.x\".header]\n  a = [\"b\"]\n[host.\"https://n.x/v2/p\"]\noverride_path = true\n",
		"ca = \"a\"\nclient = [[\"a\", \"b\"]]\nskip_verify = true\n[host.\"http://127.0.0.1:5050\"]\n",
		"host.\"https://a.x\".capabilities = [\"pull\"]\n[host.\"https://b.x\"]\n", "host = { \"https://a.x\" = { header = { a = \"[host.x]\" } } }\nx = \"\"\"\n[host.\"no\"]\n\"\"\"\n",
		"[host]\n\"https://a.x\" = {}\n", "[[host]]\n", "host = 1\n", "[host.x.y.z]\n", "[ host . \"https://a.x\" ]\n[other]\n", "x = 1\n# BEGIN larder\n[host.\"http://127.0.0.1:1\"]\n# END larder\n",
		"# BEGIN larder", "[host.'https://a.x'] # BEGIN larder", "header.a = \"b\"\ndial_timeout = \"1s\"\n",
	} {
		f.Add([]byte(seed))
	}
	proxy := netip.MustParseAddrPort(testProxy)
	f.Fuzz(func(t *testing.T, user []byte) {
		merged, err := mergeHosts(user, certFiles{}, proxy)
		if err != nil {
			return // left alone
		}
		before, ok := readHosts(t, removeBlock(user)) // what an earlier run left, whole or torn, goes away
		if !ok {
			t.Fatalf("merged a file that containerd cannot read:\n%q", user)
		}
		after, ok := readHosts(t, merged)
		if !ok {
			t.Fatalf("containerd cannot read\n%s", merged)
		}
		before = slices.DeleteFunc(before, func(h string) bool { return isSelf(strings.Fields(h)[0], proxy) && h != before[len(before)-1] })
		if after[0] != ours || !slices.Equal(after[1:], before) {
			t.Fatalf("hosts %q became %q", before, after)
		}
		if again, err := mergeHosts(merged, certFiles{}, proxy); err != nil || bytes.Count(again, []byte(blockBegin)) != 1 {
			t.Fatalf("merging twice: %v\n%s", err, again)
		}
		applyFuzzed(t, user)
	})
}

// readHosts is containerd's view of one hosts.toml; false when it would ignore
// the file. Certificates are not there, so only their names are compared, in
// checkMerged.
func readHosts(t *testing.T, doc []byte) ([]string, bool) {
	t.Helper()
	if _, err := parseHosts(doc); err != nil {
		return nil, false
	}
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "x.y"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "x.y", hostsName), doc, 0o644))
	hosts, err := config.ConfigureHosts(context.Background(), config.HostOptions{HostDir: config.HostDirFromRoot(dir)})("x.y")
	if err != nil {
		t.Skip("it names certificates that are not there")
	}
	var out []string
	for _, h := range hosts {
		out = append(out, describeHost(h))
	}
	return out, true
}

// applyFuzzed takes the same text through the files.
func applyFuzzed(t *testing.T, user []byte) {
	t.Helper()
	dir := t.TempDir()
	tree{"certs.d/x.y/hosts.toml": string(user)}.write(t, dir)
	before := snapshot(t, dir)
	h := newHosts(t, Options{Containerd: filepath.Join(dir, "certs.d")})
	h.disk.unsynced = true
	apply(t, h)
	// Without the journal our part can still be taken out.
	path := filepath.Join(dir, "certs.d/x.y/hosts.toml")
	merged, err := os.ReadFile(path)
	must(t, err)
	exprs, err := outline(removeBlock(user))
	must(t, err)
	moves := slices.ContainsFunc(exprs, func(e expression) bool { return e.key[0] == "host" && (!isTable(e) || len(e.key) == 1) })
	if !hasBlock(user) && !bytes.Contains(user, []byte("5050")) && !moves {
		if got := removeBlock(merged); !bytes.Equal(got, user) {
			t.Fatalf("taken out: %q, was %q", got, user)
		}
	}
	remove(t, h)
	if !hasBlock(user) {
		wantSame(t, "not restored", before, snapshot(t, dir))
	}
}

// FuzzDropIn: whatever is in registries.conf, we either leave it alone or
// render a drop-in that reads well and loses none of its rules.
func FuzzDropIn(f *testing.F) {
	for _, seed := range []string{
		"", "unqualified-search-registries = [\"docker.io\"]\n", "[[registry]]\nlocation = \"quay.io\"\n[[registry.mirror]]\nlocation = \"m.x\"\npull-from-mirror = \"digest-only\"\n",
		"[[registry]]\nprefix = \"*.x\"\nblocked = true\n", "[[registry]]\nprefix = \"a.x:5000/b\"\nlocation = \"c.x\"\nmirror-by-digest-only = true\n",
		"registry = [{location = \"a.x\", mirror = [{location = \"b.x\"}]}]\n", "[registries.block]\nregistries = [\"a.x\"]\n", "[[registry]]\nlocation = \"Upper.X\"\nx = 2020-01-01\n",
	} {
		f.Add([]byte(seed))
	}
	proxy := netip.MustParseAddrPort(testProxy)
	f.Fuzz(func(t *testing.T, conf []byte) {
		file, err := readRegistries("registries.conf", conf)
		if err != nil {
			return
		}
		rules, _ := mergeRules([]registriesFile{file})
		d, err := renderDropIn(rules, []string{"*"}, proxy)
		if err != nil {
			t.Fatalf("%v\n%s", err, conf)
		}
		list, err := parseRegistries(d.data)
		must(t, err)
		for _, r := range list {
			checkRule(t, r, rules)
		}
		for prefix := range rules {
			if d.left[prefix] == "" && !slices.ContainsFunc(list, func(r rule) bool { return r.str("prefix") == prefix }) {
				t.Fatalf("%q has neither an entry nor a reason\n%s", prefix, d.data)
			}
		}
	})
}

// checkRule: an entry of ours blocks what was blocked, names the place that was
// named, and has the mirrors that were there behind ours.
func checkRule(t *testing.T, r rule, rules map[string]rule) {
	t.Helper()
	was := matchRule(rules, r.str("prefix"))
	if was == nil {
		return
	}
	mirrors := r.mirrors()
	if len(mirrors) > 0 && isSelf(strings.SplitN(mirrors[0].str("location"), "/", 2)[0], netip.MustParseAddrPort(testProxy)) {
		mirrors = mirrors[1:]
		if was.flag("blocked") && len(mirrors) == 0 {
			t.Fatalf("lifts the block of %q", r.str("prefix"))
		}
	}
	if r.flag("blocked") != was.flag("blocked") || r.flag("insecure") != was.flag("insecure") || len(mirrors) > len(was.mirrors()) {
		t.Fatalf("rule %v became %v", was, r)
	}
}

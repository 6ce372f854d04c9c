// Package test holds the rules of the repository as tests; the packages below
// it are the tools that other tests share.
package test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/larder-cache/larder/"

// allowed lists, for each package, which packages of this module its shipped
// code may import, directly or not. A package that is missing here may import
// none.
var allowed = map[string][]string{
	// The binary parses and prints; the agent owns everything else.
	"cmd/larder": {"agent", "agent/archive", "agent/cache", "agent/credentials", "agent/proxy", "agent/runtimestore", "agent/upstream", "hostsconfig", "peer",
		"test/registrytest"}, // `larder demo` embeds the test registry
	"agent": {"agent/archive", "agent/cache", "agent/credentials", "agent/proxy", "agent/runtimestore", "agent/upstream", "hostsconfig", "peer"},
	// The proxy joins cache and upstream; it sees peers and the runtime's
	// store only through interfaces it declares.
	"agent/proxy": {"agent/cache", "agent/upstream"},
	// test/... may look at whatever they test.
	"test/wedged":      {"agent", "agent/archive", "agent/cache", "agent/credentials", "agent/proxy", "agent/runtimestore", "agent/upstream", "hostsconfig", "peer"},
	"test/runtimetest": {"test/registrytest"},
}

// TestImportDirections keeps the packages that hold the hard parts (cache,
// upstream, credentials, peer, hostsconfig, runtimestore) free of each other, so that each
// can be read, tested and fuzzed alone.
func TestImportDirections(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}}{{range .Deps}} {{.}}{{end}}`, "../...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) < 2 {
		t.Fatalf("go list named %d packages; the test would check nothing", len(lines))
	}
	for _, line := range lines {
		words := strings.Fields(line)
		pkg := strings.TrimPrefix(words[0], module)
		if pkg == "test" || slices.Contains([]string{"test/bench", "test/cluster", "test/page", "test/storm"}, pkg) {
			continue
		}
		for _, dep := range words[1:] {
			inner, ours := strings.CutPrefix(dep, module)
			if ours && !slices.Contains(allowed[pkg], inner) {
				t.Errorf("%s imports %s; see the rules above", pkg, inner)
			}
		}
	}
}

// TestNoCatchAllPackages keeps out the names that say nothing of what is inside.
func TestNoCatchAllPackages(t *testing.T) {
	out, err := exec.Command("go", "list", "../...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for _, pkg := range strings.Fields(string(out)) {
		for _, part := range strings.Split(strings.TrimPrefix(pkg, module), "/") {
			if slices.Contains([]string{"pkg", "util", "utils", "common", "types", "interfaces", "mocks", "helpers"}, part) {
				t.Errorf("package %s: name it for what it does", pkg)
			}
		}
	}
}

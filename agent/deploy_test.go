package agent

import (
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/larder-cache/larder/agent/upstream"
)

var (
	flagInFile = regexp.MustCompile(`--([a-z]+\.[a-z_]+)\b`)
	envInFile  = regexp.MustCompile(`\b(LARDER_[A-Z0-9_]+)\b`)
	// toolEnv are variables of the repository's own tools.
	toolEnv = regexp.MustCompile(`^LARDER_(TOOLS|TEST|CI|BENCH)`)
)

// TestFilesNameKnownKeys holds that whatever tells users or clusters how to
// configure an agent names keys that exist.
func TestFilesNameKnownKeys(t *testing.T) {
	var names, envs []string
	for _, k := range Keys() {
		names, envs = append(names, k.Name), append(envs, k.Env())
	}
	for _, path := range deployFiles(t) {
		body, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range flagInFile.FindAllStringSubmatch(string(body), -1) {
			if !slices.Contains(names, m[1]) {
				t.Errorf("%s: unknown flag --%s", path, m[1])
			}
		}
		for _, m := range envInFile.FindAllStringSubmatch(string(body), -1) {
			if !slices.Contains(envs, m[1]) && !slices.Contains(otherEnv, m[1]) && !toolEnv.MatchString(m[1]) {
				t.Errorf("%s: unknown variable %s", path, m[1])
			}
		}
		for _, problem := range embeddedTOML(path, string(body)) {
			t.Error(problem)
		}
	}
}

// deployFiles are README.md and everything under deploy.
func deployFiles(t *testing.T) []string {
	t.Helper()
	files := []string{"../README.md"}
	err := filepath.WalkDir("../deploy", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return files
}

// embeddedTOML checks `larder.toml: |` blocks in YAML that are no templates.
func embeddedTOML(path, body string) []*Problem {
	_, rest, ok := strings.Cut(body, "larder.toml: |")
	if !ok || strings.Contains(rest, "{{") {
		return nil
	}
	var block strings.Builder
	indent := -1
	for line := range strings.Lines(rest[strings.Index(rest, "\n")+1:]) {
		text := strings.TrimLeft(line, " ")
		switch {
		case strings.TrimSpace(text) == "":
		case indent < 0:
			indent = len(line) - len(text)
		case len(line)-len(text) < indent:
			return tomlProblems(path, block.String())
		}
		block.WriteString(text)
	}
	return tomlProblems(path, block.String())
}

func tomlProblems(path, text string) []*Problem {
	l := loader{config: Default(), from: map[string]string{}}
	l.keys = keysOf(&l.config)
	l.toml(path, []byte(text))
	return l.problems
}

func TestEmbeddedTOML(t *testing.T) {
	yaml := "data:\n  larder.toml: |\n    [proxy]\n    listen = \"127.0.0.1:1\"\n\n    [peer]\n    joyn = []\nother: 1\n"
	problems := embeddedTOML("x.yaml", yaml)
	if len(problems) != 1 || !strings.Contains(problems[0].Error(), "peer.join") {
		t.Errorf("%v", problems)
	}
}

// chartKeys are what the chart's own values decide: paths, which are also
// mounts, ports, which are also declared, and what Kubernetes knows of the node.
var chartKeys = []string{
	"proxy.listen", "proxy.allow_remote", "cache.dir", "admin.listen", "metrics.listen", "audit.file",
	"peer.name", "peer.advertise", "peer.zone", "peer.gossip", "peer.data", "peer.key_file",
	"hosts.containerd", "hosts.containerd_colon_link", "hosts.crio", "hosts.crio_reload",
	"runtime.containerd_socket", "runtime.content_dir",
}

// TestChartKnowsEveryKey holds that the chart takes every key that it does not
// set itself, and no other.
func TestChartKnowsEveryKey(t *testing.T) {
	type object struct{ Properties map[string]json.RawMessage }
	var schema struct {
		Properties struct {
			Config     struct{ Properties map[string]object }
			Registries struct{ Items object }
		}
	}
	if err := json.Unmarshal(readDeployed(t, "values.schema.json"), &schema); err != nil {
		t.Fatal(err)
	}
	got := slices.Clone(chartKeys)
	for table, o := range schema.Properties.Config.Properties {
		for key := range o.Properties {
			got = append(got, table+"."+key)
		}
	}
	var want []string
	for _, k := range Keys() {
		want = append(want, k.Name)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the chart knows %v,\nthe agent %v;\nadd keys to deploy/chart/values.schema.json", got, want)
	}
	registry := reflect.TypeFor[upstream.Registry]()
	for i := range registry.NumField() {
		if key := registry.Field(i).Tag.Get("toml"); key != "-" && schema.Properties.Registries.Items.Properties[key] == nil {
			t.Errorf("the chart takes no %s in registries; add it to deploy/chart/values.schema.json", key)
		}
	}
}

func readDeployed(t *testing.T, name string) []byte {
	t.Helper()
	body, err := os.ReadFile(filepath.Join("../deploy/chart", name))
	if err != nil {
		t.Fatal(err)
	}
	return body
}

var (
	metricInFile = regexp.MustCompile(`\b(larder|process|go|promhttp)_[a-z_]+`)
	// ofHistogram are the series of a histogram beside its name.
	ofHistogram = regexp.MustCompile(`_(bucket|sum|count)$`)
	alertInFile = regexp.MustCompile(`alert: ([A-Za-z]+)`)
)

// TestQueriesNameMetricsThatExist holds that the dashboard and the alerts ask
// for what an agent has, and that the dashboard shows all of it.
func TestQueriesNameMetricsThatExist(t *testing.T) {
	c := testConfig(t)
	c.Hosts.Containerd = t.TempDir()
	c.Audit.File = filepath.Join(t.TempDir(), "audit.jsonl")
	have := describedMetrics(t, start(t, c).Agent)
	shown := map[string]bool{}
	for _, file := range []string{"files/dashboard.json", "files/alerts.yaml"} {
		for _, name := range metricInFile.FindAllString(string(readDeployed(t, file)), -1) {
			if base := ofHistogram.ReplaceAllString(name, ""); have[name] == nil && have[base] != nil {
				name = base
			}
			if _, ok := have[name]; !ok {
				t.Errorf("%s: no metric %s", file, name)
			}
			shown[name] = shown[name] || file == "files/dashboard.json"
		}
	}
	for _, name := range slices.Sorted(maps.Keys(contractMetrics)) {
		if !shown[name] {
			t.Errorf("%s is not on the dashboard", name)
		}
	}
}

// TestAlertsHaveARunbook holds that the README says of every alert what to do.
func TestAlertsHaveARunbook(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	names := alertInFile.FindAllStringSubmatch(string(readDeployed(t, "files/alerts.yaml")), -1)
	if len(names) < 8 {
		t.Fatalf("%d alerts", len(names))
	}
	for _, n := range names {
		if !strings.Contains(string(readme), "| `"+n[1]+"` |") {
			t.Errorf("README.md has no line on %s", n[1])
		}
	}
}

// TestInAPod holds that an agent in a pod knows that it does not see all of its node.
func TestInAPod(t *testing.T) {
	for host, want := range map[string]bool{"": false, "10.96.0.1": true} {
		t.Setenv("KUBERNETES_SERVICE_HOST", host)
		if got := HostsOptions(Default(), "127.0.0.1:5050", nil, nil).Contained; got != want {
			t.Errorf("KUBERNETES_SERVICE_HOST=%q: %v", host, got)
		}
	}
}

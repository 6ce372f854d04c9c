package agent

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
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

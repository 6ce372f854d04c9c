package credentials

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// configured is a keychain with one plugin, "acme", which runs script, in a
// directory of its own.
func configured(t testing.TB, fields, script string) (k *Keychain, dir string) {
	t.Helper()
	dir = t.TempDir()
	program(t, dir, "acme", "echo >>"+dir+"/runs\n"+script)
	config := filepath.Join(dir, "config.yaml")
	write(t, config, `
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: acme
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  defaultCacheDuration: 12h
  matchImages: ["*.acme.test", "*.*.acme.test:5000/team"]
`+fields)
	return newKeychain(t, Options{ProviderConfig: config, ProviderBinDir: dir}), dir
}

// response is a plugin's answer as a shell command, with more fields.
func response(auth string, fields ...string) string {
	all := append([]string{`"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1"`, `"auth":` + auth}, fields...)
	return "cat <<EOF\n{" + strings.Join(all, ",") + "}\nEOF\n"
}

const (
	registryScope = `"cacheKeyType":"Registry"`
	imageScope    = `"cacheKeyType":"Image"`
	globalScoped  = `"cacheKeyType":"Global"`
)

func TestProvider(t *testing.T) {
	cases := []struct {
		name, fields, script, image, want string
	}{
		{"one", "", response(`{"*.acme.test":{"username":"ann","password":"x"}}`, registryScope), "a.acme.test/app", "ann:x"},
		{"not for this image", "", response(`{"*.acme.test":{"username":"ann","password":"x"}}`, registryScope), "a.acme.test:5000/app", ""},
		{"port and path", "", response(`{"a.b.acme.test:5000":{"username":"ann","password":"x"}}`, registryScope), "a.b.acme.test:5000/team/app", "ann:x"},
		{"longest first", "", response(`{"a.acme.test":{"username":"a","password":"1"},"a.acme.test/app":{"username":"b","password":"2"},"b.acme.test":{"username":"c","password":"3"}}`, registryScope), "a.acme.test/app", "b:2 a:1"},
		{"none", "", response(`null`, registryScope), "a.acme.test/app", ""},
		{"empty user", "", response(`{"a.acme.test":{"username":"","password":"x"}}`, registryScope), "a.acme.test/app", ":x"},
		{"args and env", "  args: [get-credentials, \"two words\"]\n  env: [{name: REGION, value: eu}, {name: HOME, value: /mine}]\n",
			response(`{"a.acme.test":{"username":"$#:$1:$2","password":"$REGION:$HOME:${PATH:+path}"}}`, registryScope), "a.acme.test/app", "2:get-credentials:two words:eu:/mine:path"},
		{"token not required", "  tokenAttributes: {serviceAccountTokenAudience: x, cacheType: Token, requireServiceAccount: false}\n",
			response(`{"a.acme.test":{"username":"ann","password":"x"}}`, registryScope), "a.acme.test/app", "ann:x"},
		{"child that stays", "", "sleep 60 & echo $! >" + "$(dirname $0)/child\n" + response(`{"a.acme.test":{"username":"ann","password":"x"}}`, registryScope), "a.acme.test/app", "ann:x"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			k, dir := configured(t, tc.fields, tc.script)
			if got := find(t, k, names(tc.image)); got != tc.want {
				t.Errorf("found %q, want %q", got, tc.want)
			}
			if tc.name == "child that stays" {
				end(t, filepath.Join(dir, "child"))
			}
		})
	}
}

// end kills the process whose id is in a file.
func end(t *testing.T, file string) {
	t.Helper()
	body, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(body), &pid); err != nil {
		t.Fatal(err)
	}
	child, err := os.FindProcess(pid)
	if err == nil {
		err = child.Kill()
	}
	if err != nil {
		t.Errorf("the child that the plugin left: %v", err)
	}
}

// TestProviderRequest holds what a plugin reads.
func TestProviderRequest(t *testing.T) {
	for _, version := range apiVersions {
		t.Run(version, func(t *testing.T) {
			dir := t.TempDir()
			program(t, dir, "acme", "cat >"+dir+"/request\n"+strings.ReplaceAll(response(`{"a.acme.test":{"username":"ann","password":"x"}}`, registryScope), "k8s.io/v1", "k8s.io/"+version))
			// Tabs, which YAML refuses and JSON does not.
			write(t, filepath.Join(dir, "config.json"), `{
	"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/`+version+`",
	"providers": [{"name": "acme", "matchImages": ["a.acme.test"], "defaultCacheDuration": "0s", "apiVersion": "credentialprovider.kubelet.k8s.io/`+version+`"}]
}`)
			k := newKeychain(t, Options{ProviderConfig: filepath.Join(dir, "config.json"), ProviderBinDir: dir})
			if got := find(t, k, names("a.acme.test/team/app")); got != "ann:x" {
				t.Errorf("found %q", got)
			}
			body, err := os.ReadFile(filepath.Join(dir, "request"))
			if err != nil {
				t.Fatal(err)
			}
			var got map[string]string
			if err := json.Unmarshal(body, &got); err != nil {
				t.Fatalf("%s: %v", body, err)
			}
			want := map[string]string{"kind": "CredentialProviderRequest", "apiVersion": "credentialprovider.kubelet.k8s.io/" + version, "image": "a.acme.test/team/app"}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("it read %v, want %v", got, want)
			}
		})
	}
}

// TestProviderFails holds that a plugin's failure is told once, without its
// words, and not provoked again at once.
func TestProviderFails(t *testing.T) {
	good := response(`{"a.acme.test":{"username":"ann","password":"hunter2"}}`, registryScope)
	cases := []struct{ name, script, want string }{
		{"exit", "echo hunter2; echo hunter2 >&2; exit 3", `exit status 3; to see what it says, run it by hand with {"apiVersion":"credentialprovider.kubelet.k8s.io/v1","image":"a.acme.test/app","kind":"CredentialProviderRequest"} on its standard input`},
		{"killed", "kill -9 $$", "signal: killed"},
		{"nothing", "", "what it printed (0 bytes) is no CredentialProviderResponse"},
		{"words", "echo hunter2", "what it printed (8 bytes) is no"},
		{"other JSON", `echo '{"Username":"a","Secret":"hunter2"}'`, "is no CredentialProviderResponse"},
		{"other version", strings.ReplaceAll(good, "k8s.io/v1", "k8s.io/v1beta1"), "has not the apiVersion credentialprovider.kubelet.k8s.io/v1"},
		{"no cache key type", response(`{"a.acme.test":{"username":"ann","password":"hunter2"}}`), "cacheKeyType"},
		{"bad duration", response(`{}`, registryScope, `"cacheDuration":"hunter2"`), "is no CredentialProviderResponse"},
		{"negative duration", response(`{}`, registryScope, `"cacheDuration":"-1s"`), "negative cacheDuration"},
		{"flood", "yes hunter2", "it printed more than 1024 KiB"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			k, dir := configured(t, "", tc.script)
			var log bytes.Buffer
			k.programs.log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
			for range 3 {
				list, err := k.Find(t.Context(), names("a.acme.test/app"))
				if err == nil || !strings.HasPrefix(err.Error(), "credential provider acme: ") || !strings.Contains(err.Error(), tc.want) || len(list) > 0 {
					t.Errorf("%d credentials, %v; want %q", len(list), err, tc.want)
				}
			}
			if n := runs(t, dir); n != 1 {
				t.Errorf("%d runs", n)
			}
			if n := strings.Count(log.String(), "level=WARN"); n != 1 {
				t.Errorf("%d warnings", n)
			}
			if all := log.String(); strings.Contains(all, "hunter2") {
				t.Errorf("the log shows what the plugin printed: %s", all)
			}
			if n := testutil.ToFloat64(k.programs.runs.WithLabelValues("acme", "failed")); n != 1 {
				t.Errorf("%v failed runs counted", n)
			}
		})
	}
}

// TestHungProgram holds that a program and its children end with ctx, and that
// waiting for one ends with the caller's patience.
func TestHungProgram(t *testing.T) {
	k, dir := configured(t, "", "sleep 600 | cat\n")
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan error)
	go func() {
		_, err := k.Find(ctx, names("a.acme.test/app"))
		asked <- err
	}()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for runs(t, dir) == 0 { // until it hangs
		<-tick.C
	}
	cancel()
	if err := <-asked; !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that gives up: %v", err)
	}
	// Close kills it; the leak check of TestMain sees whether it waits.
	began := time.Now()
	k.Close()
	if took := time.Since(began); took > waitDelay {
		t.Errorf("closed after %s: a child held the output", took)
	}
	if _, err := k.Find(t.Context(), names("b.acme.test/app")); !errors.Is(err, errClosed) {
		t.Errorf("after Close: %v", err)
	}

	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := run(ctx, command{path: filepath.Join(dir, "acme")}); err == nil || !strings.Contains(err.Error(), "did not end within") {
		t.Errorf("past its time: %v", err)
	}
}

// TestCollapse asks for many images at once, before the plugin's kind is known.
func TestCollapse(t *testing.T) {
	for scope, want := range map[string]int{registryScope: 2, globalScoped: 2, imageScope: 8} {
		t.Run(scope, func(t *testing.T) {
			k, dir := configured(t, "", response(`{"*.acme.test":{"username":"ann","password":"x"}}`, scope))
			var all sync.WaitGroup
			for i := range 32 {
				all.Go(func() {
					image := fmt.Sprintf("%c.acme.test/app%d", 'a'+i%2, i%8)
					if list, err := k.Find(t.Context(), names(image)); err != nil || users(list) != "ann:x" {
						t.Errorf("%s: %q, %v", image, users(list), err)
					}
				})
			}
			all.Wait()
			if n := runs(t, dir); n > want {
				t.Errorf("%d runs, want at most %d", n, want)
			}
		})
	}
}

// fake is a question whose program is a function: what it answers, for how
// long, and how often it was asked.
type fake struct {
	auths map[string]authn.AuthConfig
	hold  time.Duration
	err   error
	asked int
}

func (f *fake) question(keys ...string) question {
	return question{
		program: "fake", keys: keys, wide: keys[0],
		ask: func(context.Context) (string, answer, error) {
			f.asked++
			return keys[0], answer{auths: f.auths, hold: f.hold}, f.err
		},
	}
}

// TestHold holds for how long an answer is used, and what makes it be asked
// for again.
func TestHold(t *testing.T) {
	old, new := map[string]authn.AuthConfig{"r": {Username: "old"}}, map[string]authn.AuthConfig{"r": {Username: "new"}}
	steps := []struct {
		name    string
		hold    time.Duration
		wait    time.Duration
		refresh bool
		fails   bool
		want    string
		asked   int // the second time
		err     bool
	}{
		{name: "within", hold: time.Hour, wait: 59 * time.Minute, want: "old"},
		{name: "past", hold: time.Hour, wait: time.Hour, want: "new", asked: 1},
		{name: "not to be cached, same pull", hold: 0, wait: minHold - 1, want: "old"},
		{name: "not to be cached, next pull", hold: 0, wait: minHold, want: "new", asked: 1},
		{name: "refused", hold: time.Hour, wait: refreshPause, refresh: true, want: "new", asked: 1},
		{name: "refused at once", hold: time.Hour, wait: refreshPause - 1, refresh: true, want: "old"},
		{name: "past, and the program fails", hold: time.Hour, wait: 2 * time.Hour, fails: true, want: "old", asked: 1, err: true},
		{name: "refused, and the program fails", hold: time.Hour, wait: time.Minute, refresh: true, fails: true, want: "old", asked: 1, err: true},
	}
	for _, tc := range steps {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, err := newPrograms(slog.New(slog.DiscardHandler), nil)
				if err != nil {
					t.Fatal(err)
				}
				defer p.close()
				f := &fake{auths: old, hold: tc.hold}
				if a := p.ask(t.Context(), f.question("k"), false); a.err != nil || a.auths["r"].Username != "old" {
					t.Fatalf("first: %+v", a)
				}
				time.Sleep(tc.wait) // of the bubble
				f.auths, f.asked = new, 0
				if tc.fails {
					f.err = errors.New("broken")
				}
				for range 3 {
					a := p.ask(t.Context(), f.question("k"), tc.refresh)
					if got := a.auths["r"].Username; got != tc.want || (a.err != nil) != tc.err {
						t.Errorf("%q, %v; want %q", got, a.err, tc.want)
					}
				}
				if f.asked != tc.asked {
					t.Errorf("asked %d times, want %d", f.asked, tc.asked)
				}
				if tc.fails {
					time.Sleep(failureHold)
					f.err = nil
					if a := p.ask(t.Context(), f.question("k"), false); a.err != nil || a.auths["r"].Username != "new" {
						t.Errorf("mended: %+v", a)
					}
				}
			})
		})
	}
}

// TestHangs holds that a program which hangs costs its first callers slowRun and the others
// nothing as long as there is an earlier answer. One that the registry refused is no use.
func TestHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := newPrograms(slog.New(slog.DiscardHandler), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer p.close()
		f := &fake{auths: map[string]authn.AuthConfig{"r": {Username: "old"}}}
		p.ask(t.Context(), f.question("k"), false)
		time.Sleep(minHold) // of the bubble
		hung := f.question("k")
		hung.ask = func(ctx context.Context) (string, answer, error) {
			f.asked++
			<-ctx.Done()
			return "k", answer{}, ctx.Err()
		}
		for _, tc := range []struct {
			refresh bool
			takes   time.Duration
		}{
			{takes: slowRun},
			{},
			{refresh: true, takes: runTimeout - slowRun},
			{}, // it has failed a moment ago
		} {
			began := time.Now()
			a := p.ask(t.Context(), hung, tc.refresh)
			if took := time.Since(began); took != tc.takes || a.err == nil || a.auths["r"].Username != "old" {
				t.Errorf("refresh %t: %q, %v, after %s; want the old one after %s", tc.refresh, a.auths["r"].Username, a.err, took, tc.takes)
			}
		}
		if f.asked != 2 {
			t.Errorf("asked %d times", f.asked)
		}
	})
}

// TestBounded holds that images, which callers choose, do not fill memory.
func TestBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := newPrograms(slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		defer p.close()
		f := &fake{hold: time.Hour}
		for i := range 2 * maxAnswers {
			p.ask(t.Context(), f.question(fmt.Sprint(i)), false)
			time.Sleep(time.Second) // of the bubble
		}
		if n := len(p.kept); n != maxAnswers {
			t.Errorf("%d answers are kept", n)
		}
		f.asked = 0
		p.ask(t.Context(), f.question(fmt.Sprint(2*maxAnswers-1)), false)
		p.ask(t.Context(), f.question("0"), false)
		if f.asked != 1 {
			t.Errorf("asked %d times: not the oldest was dropped", f.asked)
		}
	})
}

// TestProviderConfigProblems holds that all problems are told at once, with the
// file, and without values of env.
func TestProviderConfigProblems(t *testing.T) {
	dir := t.TempDir()
	program(t, dir, "acme", "")
	head := "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n"
	acme := "- {name: acme, apiVersion: credentialprovider.kubelet.k8s.io/v1, matchImages: [a.test], defaultCacheDuration: 1h}\n"
	cases := []struct {
		name, config string
		want         []string
	}{
		{"YAML", "a: [hunter2", []string{"neither the YAML", "line 1"}},
		{"JSON", `{"providers": "hunter2"`, []string{"neither the YAML"}},
		{"other kind", "apiVersion: v1\nkind: Pod\n", []string{`apiVersion "v1", kind "Pod"`}},
		{"other version", "apiVersion: kubelet.config.k8s.io/v2\nkind: CredentialProviderConfig\n", []string{"kubelet.config.k8s.io/v2"}},
		{"empty", "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\n", []string{"no providers"}},
		{"fields", head + "- {name: ../acme}\n", []string{`provider "../acme": name`, "apiVersion", "matchImages", "defaultCacheDuration"}},
		{"negative", head + "- {name: acme, apiVersion: credentialprovider.kubelet.k8s.io/v1, matchImages: [a.test], defaultCacheDuration: -1h}\n", []string{"defaultCacheDuration"}},
		{"duration without unit", head + "- {name: acme, defaultCacheDuration: 12}\n", []string{"neither the YAML"}},
		{"no such program", head + strings.ReplaceAll(acme, "acme", "absent"), []string{`provider "absent"`, filepath.Join(dir, "absent")}},
		{"not executable", head + strings.ReplaceAll(acme, "acme", "config.yaml"), []string{`provider "config.yaml"`, "permission denied"}},
		{"twice", head + acme + acme, []string{`provider "acme" is there twice`}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(dir, "config.yaml")
			write(t, file, tc.config)
			_, err := New(Options{ProviderConfig: file, ProviderBinDir: dir})
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range append(tc.want, file) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("shows a value: %v", err)
			}
		})
	}
	if _, err := New(Options{ProviderConfig: filepath.Join(dir, "no.yaml")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// TestProviderDirectory reads a directory of files as kubelet does, and leaves
// out the plugin that needs a pod's token.
func TestProviderDirectory(t *testing.T) {
	dir, bin := t.TempDir(), t.TempDir()
	if _, err := New(Options{ProviderConfig: dir, ProviderBinDir: bin}); err == nil {
		t.Error("an empty directory was accepted")
	}
	for _, name := range []string{"b", "a", "pod"} {
		program(t, bin, name, response(`{"r.test":{"username":"`+name+`","password":"x"}}`, registryScope))
	}
	head := "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n"
	entry := func(name, more string) string {
		return "- {name: " + name + ", apiVersion: credentialprovider.kubelet.k8s.io/v1, matchImages: [r.test], defaultCacheDuration: 1h" + more + "}\n"
	}
	write(t, filepath.Join(dir, "1.yml"), head+entry("b", "")+entry("pod", ", tokenAttributes: {serviceAccountTokenAudience: x, requireServiceAccount: true, cacheType: Token}"))
	write(t, filepath.Join(dir, "2.yaml"), head+entry("a", ""))
	write(t, filepath.Join(dir, "notes.txt"), "not read")
	var log bytes.Buffer
	k := newKeychain(t, Options{ProviderConfig: dir, ProviderBinDir: bin, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if got := find(t, k, names("r.test/app")); got != "b:x a:x" {
		t.Errorf("found %q", got)
	}
	if !strings.Contains(log.String(), "provider=pod") || !strings.Contains(log.String(), "service account token") {
		t.Errorf("the log says nothing of the plugin that was left out: %s", log.String())
	}
	write(t, filepath.Join(dir, "3.json"), `{"apiVersion":"kubelet.config.k8s.io/v1","kind":"CredentialProviderConfig","providers":[{"name":"a","apiVersion":"credentialprovider.kubelet.k8s.io/v1","matchImages":["x"],"defaultCacheDuration":"1h"}]}`)
	if _, err := New(Options{ProviderConfig: dir, ProviderBinDir: bin}); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("one name in two files: %v", err)
	}
}

// TestFileBeforeProviders holds the order of sources.
func TestFileBeforeProviders(t *testing.T) {
	k, dir := configured(t, "", response(`{"a.acme.test/app":{"username":"plugin","password":"x"}}`, registryScope))
	file := filepath.Join(dir, "docker.json")
	write(t, file, `{"auths":{"a.acme.test":{"username":"file","password":"x"}}}`)
	if got := find(t, k, Request{File: file, Names: []string{"a.acme.test/app"}}); got != "file:x plugin:x" {
		t.Errorf("found %q", got)
	}
}

func FuzzProvider(f *testing.F) {
	f.Add([]byte("apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders: [{name: a, matchImages: [\"*.b\"], defaultCacheDuration: 1h, apiVersion: credentialprovider.kubelet.k8s.io/v1}]\n"),
		[]byte(`{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image","cacheDuration":"1h","auth":{"*.b":{"username":"u","password":"p"}}}`), "a.b/c")
	f.Fuzz(func(t *testing.T, config, out []byte, image string) {
		list, err := parseProviderConfig(config)
		if err != nil {
			return
		}
		for _, fields := range list {
			p := &provider{providerFields: fields}
			p.serves(image)
			if r, err := p.parse(out); err == nil {
				if got := matching(r.auths(), image); len(got) > len(r.Auth) {
					t.Errorf("%d of %d credentials", len(got), len(r.Auth))
				}
			}
		}
	})
}

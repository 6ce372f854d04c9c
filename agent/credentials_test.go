package agent

import (
	"encoding/base64"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/logtest"
	"github.com/larder-cache/larder/test/registrytest"
)

// program writes a shell script; see the function of that name in package
// credentials for the lock.
func program(t *testing.T, path, body string) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
}

// replace puts body at path as Kubernetes and docker login do: at once.
func replace(t *testing.T, path, body string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// plugins configures kubelet's plugins: entries of providers in YAML's flow style.
func plugins(t *testing.T, c *Config, providers ...string) {
	t.Helper()
	config := filepath.Join(t.TempDir(), "credential-providers.yaml")
	replace(t, config, "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- "+strings.Join(providers, "\n- ")+"\n")
	c.Node = NodeConfig{ImageCredentialProviderConfig: config, ImageCredentialProviderBinDir: filepath.Dir(config)}
}

func provider(name, image string) string {
	return "{name: " + name + ", apiVersion: credentialprovider.kubelet.k8s.io/v1, matchImages: [" + image + "], defaultCacheDuration: 12h, env: [{name: EXTRA, value: HUSH-env}]}"
}

// answers is a plugin's script.
func answers(image, user, password string) string {
	return `cat >/dev/null; echo "HUSH-stderr" >&2
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","auth":{"` + image + `":{"username":"` + user + `","password":"` + password + `"}}}'`
}

// TestNodeCredentials pulls a private image with each source of credentials.
func TestNodeCredentials(t *testing.T) {
	users := map[string]string{"ann": "HUSH"}
	image := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{300 << 10}})
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		for _, source := range []string{"file", "helper", "plugin", "file, corrected later"} {
			t.Run(string(scheme)+", "+source, func(t *testing.T) {
				reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: scheme, Users: users}})
				reg.Put("team/app", image, "v1")
				c := testConfig(t)
				file := filepath.Join(t.TempDir(), "config.json")
				r := upstream.Registry{Host: testRegistry, Upstreams: []string{reg.URL()}, Auth: "node", CredentialsFile: file}
				auths := func(password string) string {
					return `{"auths":{"` + testRegistry + `/team":{"username":"ann","password":"` + password + `"}}}`
				}
				switch source {
				case "file":
					replace(t, file, auths("HUSH"))
				case "file, corrected later":
					replace(t, file, auths("GUESS"))
				case "helper":
					t.Setenv("PATH", filepath.Dir(file)+":"+os.Getenv("PATH"))
					program(t, filepath.Join(filepath.Dir(file), "docker-credential-acme"), `cat >/dev/null; echo '{"Username":"ann","Secret":"HUSH"}'`)
					replace(t, file, `{"credHelpers":{"`+testRegistry+`":"acme"}}`)
				case "plugin":
					r.CredentialsFile = ""
					plugins(t, &c, provider("acme", testRegistry))
					program(t, filepath.Join(c.Node.ImageCredentialProviderBinDir, "acme"), answers(testRegistry, "ann", "HUSH"))
				}
				c.Registries = []upstream.Registry{r}
				a := start(t, c)
				puller := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.client, Platform: "linux/amd64"}
				if source == "file, corrected later" {
					if _, err := puller.Pull(t.Context(), testImage); err == nil {
						t.Fatal("pulled with a wrong password")
					}
					replace(t, file, auths("HUSH"))
					eventually(t, "the refusal is forgotten", func() error { // after two seconds
						_, err := puller.Pull(t.Context(), testImage)
						return err
					})
				}
				if parts := a.pull(t); len(parts) != 3 {
					t.Errorf("pulled %+v", parts)
				}
			})
		}
	}
}

func TestNodeConfigProblems(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good.json"), filepath.Join(dir, "bad.json")
	replace(t, good, `{"auths":{}}`)
	replace(t, bad, `{"auths":{"reg.test":{"auth":"HUSH"}}}`)
	registry := func(lines string) string { return "[[registry]]\nhost = \"reg.test\"\n" + lines }
	for name, tc := range map[string]struct {
		file string
		want []string
	}{
		"config alone":    {"[node]\nimage_credential_provider_config = \"/x\"\n", []string{"node.image_credential_provider_config", ":2", "node.image_credential_provider_bin_dir"}},
		"directory alone": {"[node]\nimage_credential_provider_bin_dir = \"/x\"\n", []string{"node.image_credential_provider_bin_dir", ":2", "node.image_credential_provider_config"}},
		"no such config":  {"[node]\nimage_credential_provider_config = \"/no/such\"\nimage_credential_provider_bin_dir = \"/x\"\n", []string{"image_credential_provider_config", "/no/such", "no such file"}},
		"no source":       {registry("auth = \"node\"\n"), []string{"registry[0].auth", "set credentials_file, or node.image_credential_provider_config"}},
		"not for relay":   {registry("credentials_file = \"" + good + "\"\n"), []string{`credentials_file has no effect without auth = "node"`}},
		"malformed":       {registry("auth = \"node\"\ncredentials_file = \"" + bad + "\"\n"), []string{"registry[0].credentials_file", `"reg.test" is malformed`}},
		"repositories":    {registry("node_repositories = [\"team/**\"]\n"), []string{`node_repositories has no effect without auth = "node"`}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(Sources{File: writeFile(t, tc.file)})
			if err == nil || len(unjoin(err)) != 1 {
				t.Fatalf("want one problem: %v", err)
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
			if strings.Contains(err.Error(), "HUSH") {
				t.Errorf("shows a secret: %v", err)
			}
		})
	}
	if _, err := Load(Sources{File: writeFile(t, registry("auth = \"node\"\nnode_repositories = [\"team/**\"]\ncredentials_file = \""+good+"\"\n"))}); err != nil {
		t.Error(err)
	}
}

// carelessRegistry refuses everybody and repeats what they sent, in every place
// that a message could be made of.
func carelessRegistry(t *testing.T, scheme string) (base string) {
	t.Helper()
	var s *httptest.Server
	s = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead { // what it says then is in a body
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		_, password, _ := r.BasicAuth()
		said := r.Header.Get("Authorization") + " " + password
		if r.URL.Path == "/token" && password == "HUSH-granted" {
			fmt.Fprint(w, `{"token":"HUSH-token"}`)
			return
		}
		challenge := `Basic realm="careless"`
		if scheme == "bearer" {
			challenge = `Bearer realm="` + s.URL + `/token",service="careless",error="` + base64.StdEncoding.EncodeToString([]byte(said)) + `"`
		}
		w.Header().Set("WWW-Authenticate", challenge)
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":%q}]}`, "you sent "+said)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// TestNoSecretAnywhere plants secrets in every place where a credential comes
// from, lets them be taken, refused and repeated, and looks for them in all
// that the agent says and keeps.
func TestNoSecretAnywhere(t *testing.T) {
	users := map[string]string{"file": "HUSH-file", "helper": "HUSH-helper", "plugin": "HUSH-plugin"}
	image := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{300 << 10}})
	var servers []*registrytest.Server
	open := func(scheme registrytest.Scheme) string {
		reg := registrytest.Start(t, registrytest.Options{CDN: true, Auth: registrytest.Auth{Scheme: scheme, Users: users}})
		reg.Put("team/app", image, "v1")
		servers = append(servers, reg)
		return reg.URL()
	}
	c := testConfig(t)
	dir := t.TempDir()
	c.Audit.File = filepath.Join(t.TempDir(), "audit.log")
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	program(t, filepath.Join(dir, "docker-credential-acme"), `cat >/dev/null; echo HUSH-stderr >&2; echo '{"Username":"helper","Secret":"HUSH-helper"}'`)
	program(t, filepath.Join(dir, "docker-credential-broken"), `echo HUSH-stdout; echo HUSH-stderr >&2; exit 1`)
	file := filepath.Join(dir, "config.json")
	good := `{"auths":{"file.test":{"username":"file","password":"HUSH-file"},"careless.test":{"username":"u","password":"HUSH-refused"},
		"granted.test":{"username":"u","password":"HUSH-granted"},"identity.test":{"identitytoken":"HUSH-identity"},"registrytoken.test":{"registrytoken":"HUSH-registrytoken"}},
		"credHelpers":{"helper.test":"acme","broken.test":"broken"}}`
	replace(t, file, good)
	plugins(t, &c, provider("acme", "plugin.test"), provider("broken", "brokenplugin.test"), provider("odd", "oddplugin.test"))
	bin := c.Node.ImageCredentialProviderBinDir
	program(t, filepath.Join(bin, "acme"), answers("plugin.test", "plugin", "HUSH-plugin"))
	program(t, filepath.Join(bin, "broken"), `echo HUSH-stdout; echo HUSH-stderr >&2; exit 1`)
	program(t, filepath.Join(bin, "odd"), `echo '{"kind":"CredentialProviderResponse","apiVersion":"HUSH-stdout","auth":"HUSH-stdout"}'`)
	bearer, basic := registrytest.Bearer, registrytest.Basic
	hosts := map[string]string{
		"file.test": open(bearer), "helper.test": open(basic), "plugin.test": open(basic),
		"broken.test": open(bearer), "brokenplugin.test": open(basic), "oddplugin.test": open(basic),
		"careless.test": carelessRegistry(t, "basic"), "granted.test": carelessRegistry(t, "bearer"),
		"identity.test": carelessRegistry(t, "bearer"), "registrytoken.test": carelessRegistry(t, "bearer"),
	}
	for host, url := range hosts {
		c.Registries = append(c.Registries, upstream.Registry{Host: host, Auth: "node", CredentialsFile: file, Upstreams: []string{url}})
	}
	log := &logtest.Buffer{}
	a := start(t, c, WithLogger(slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))))

	var said strings.Builder // all but the log
	get := func(url string) int {
		resp, err := a.client.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		fmt.Fprintln(&said, resp.Status, resp.Header)
		if _, err := io.Copy(&said, resp.Body); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode
	}
	pulled := 0
	for host := range hosts {
		for range 2 {
			if get("http://"+a.ProxyAddr()+"/v2/team/app/manifests/v1?ns="+host) == http.StatusOK {
				pulled++
			}
			for _, d := range append(slices.Clone(image.Layers), image.Descriptor) {
				get("http://" + a.ProxyAddr() + "/v2/team/app/blobs/" + d.Digest.String() + "?ns=" + host)
			}
		}
		_, warmed := a.admin(t, "POST", "/api/v1/warm", `{"images":["`+host+`/team/app:v1"],"platform":"all"}`, "Content-Type", "application/json")
		said.WriteString(warmed)
		get("http://" + a.AdminAddr() + "/api/v1/explain?image=" + host + "/team/app:v1")
	}
	if pulled != 6 {
		t.Errorf("%d manifests were served, want those of three registries twice: the secrets were not used", pulled)
	}
	replace(t, file, good[:len(good)-1]) // malformed from now on
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(file, past, past); err != nil {
		t.Fatal(err)
	}
	get("http://" + a.ProxyAddr() + "/v2/team/other/manifests/v1?ns=file.test")
	for _, path := range []string{"/metrics", "/api/v1/status", "/", "/readyz", "/debug/pprof/goroutine?debug=2", "/debug/pprof/goroutine?debug=1", "/debug/pprof/cmdline"} {
		get("http://" + a.AdminAddr() + path)
	}
	a.settle(t)
	if err := a.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	for _, marker := range []string{"credential helper broken", "credential provider broken", "credential provider odd", "keeping the credentials", "refuses a credential"} {
		if !strings.Contains(log.String(), marker) {
			t.Errorf("the log says nothing of %q", marker)
		}
	}

	secrets := []string{"HUSH"}
	for _, who := range []string{"file:HUSH-file", "helper:HUSH-helper", "plugin:HUSH-plugin", "u:HUSH-refused", "u:HUSH-granted"} {
		secrets = append(secrets, base64.StdEncoding.EncodeToString([]byte(who)))
	}
	for _, reg := range servers {
		for _, sent := range reg.Seen(registrytest.Match{}) {
			if _, token, ok := strings.Cut(sent, " "); ok {
				secrets = append(secrets, token)
			}
		}
	}
	places := map[string]string{"the log": log.String(), "what it answered": said.String(), "the audit log and the cache": onDisk(t, filepath.Dir(c.Cache.Dir), filepath.Dir(c.Audit.File))}
	for place, text := range places {
		if len(text) < 1000 {
			t.Errorf("%s: %d bytes; the test would find nothing", place, len(text))
		}
		for _, secret := range secrets {
			if i := strings.Index(text, secret); i >= 0 {
				t.Errorf("%s shows %q: %q", place, secret, text[max(0, i-200):min(len(text), i+100)])
				break
			}
		}
	}
}

// onDisk is the content of every file below the directories.
func onDisk(t *testing.T, dirs ...string) string {
	t.Helper()
	var out strings.Builder
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			body, err := os.ReadFile(path)
			out.WriteString(path + "\n")
			out.Write(body)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out.String()
}

package credentials

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"sigs.k8s.io/yaml"
)

// The types below are those of kubelet.config.k8s.io (CredentialProviderConfig)
// and credentialprovider.kubelet.k8s.io (CredentialProviderRequest and
// -Response), whose versions v1alpha1, v1beta1 and v1 differ in nothing that
// matters here.

const (
	configGroup  = "kubelet.config.k8s.io/"
	requestGroup = "credentialprovider.kubelet.k8s.io/"
)

var apiVersions = []string{"v1", "v1beta1", "v1alpha1"}

type providerConfig struct {
	APIVersion string           `json:"apiVersion"`
	Kind       string           `json:"kind"`
	Providers  []providerFields `json:"providers"`
}

type providerFields struct {
	Name                 string    `json:"name"`
	MatchImages          []string  `json:"matchImages"`
	DefaultCacheDuration *duration `json:"defaultCacheDuration"`
	APIVersion           string    `json:"apiVersion"`
	Args                 []string  `json:"args"`
	Env                  []struct {
		Name  string `json:"name"`
		Value string `json:"value"`
	} `json:"env"`
	TokenAttributes *struct {
		RequireServiceAccount *bool `json:"requireServiceAccount"`
	} `json:"tokenAttributes"`
}

// duration is a metav1.Duration: "12h", "5m30s".
type duration time.Duration

func (d *duration) UnmarshalJSON(body []byte) error {
	var s string
	if err := json.Unmarshal(body, &s); err != nil {
		return errors.New("a duration is a string such as 12h")
	}
	v, err := time.ParseDuration(s)
	*d = duration(v)
	return err
}

// provider is one plugin.
type provider struct {
	providerFields
	path string
}

// readProviders reads kubelet's configuration of its plugins and checks that
// they are there. Those that cannot work here are left out, and logged.
func readProviders(config, binDir string, log *slog.Logger) ([]*provider, error) {
	if config == "" {
		return nil, nil
	}
	files, err := configFiles(config)
	if err != nil {
		return nil, err
	}
	var out []*provider
	var problems []error
	for _, file := range files {
		list, err := readProviderConfig(file)
		problems = append(problems, err)
		for _, fields := range list {
			if slices.ContainsFunc(out, func(p *provider) bool { return p.Name == fields.Name }) {
				problems = append(problems, fmt.Errorf("%s: provider %q is there twice", file, fields.Name))
				continue
			}
			p := &provider{providerFields: fields}
			if p.path, err = exec.LookPath(filepath.Join(binDir, fields.Name)); err != nil {
				problems = append(problems, fmt.Errorf("%s: provider %q: %w", file, fields.Name, err))
			}
			out = append(out, p)
		}
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(out, func(p *provider) bool { return p.needsPod(log) }), nil
}

// needsPod says that the plugin wants the token of a pod's service account,
// which kubelet has and we have not. One that can do without is asked without,
// as kubelet does for static pods.
func (p *provider) needsPod(log *slog.Logger) bool {
	if p.TokenAttributes == nil {
		return false
	}
	if needs := p.TokenAttributes.RequireServiceAccount; needs != nil && !*needs {
		return false
	}
	log.Warn("credential provider left out: it needs the pod's service account token (tokenAttributes), which only kubelet has; its images stay with the pods' own credentials",
		"provider", p.Name, "images", p.MatchImages)
	return true
}

// configFiles are path itself or, if it is a directory, what kubelet reads there.
func configFiles(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil || !info.IsDir() {
		return []string{path}, err
	}
	entries, err := os.ReadDir(path) // sorted
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); !e.IsDir() && slices.Contains([]string{".json", ".yaml", ".yml"}, ext) {
			out = append(out, filepath.Join(path, e.Name()))
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: no .json, .yaml or .yml file", path)
	}
	return out, nil
}

func readProviderConfig(path string) ([]providerFields, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	body, err := readBounded(f)
	var list []providerFields
	if err == nil {
		list, err = parseProviderConfig(body)
	}
	return list, wrap(err, "%s", path)
}

// parseProviderConfig reads a CredentialProviderConfig in YAML or JSON. Keys it
// does not know are kubelet's business.
func parseProviderConfig(body []byte) ([]providerFields, error) {
	var c providerConfig
	read := yaml.Unmarshal
	if bytes.HasPrefix(bytes.TrimSpace(body), []byte("{")) { // YAML is no superset of JSON with tabs
		read = func(b []byte, v any, _ ...yaml.JSONOpt) error { return json.Unmarshal(b, v) }
	}
	if err := read(body, &c); err != nil {
		// Of its words only the line: they may show a value of env.
		return nil, fmt.Errorf("neither the YAML nor the JSON of a CredentialProviderConfig %s", yamlLine.FindString(err.Error()))
	}
	if version, ok := strings.CutPrefix(c.APIVersion, configGroup); !ok || !slices.Contains(apiVersions, version) || c.Kind != "CredentialProviderConfig" {
		return nil, fmt.Errorf("apiVersion %q, kind %q: want %sv1, CredentialProviderConfig", c.APIVersion, c.Kind, configGroup)
	}
	var problems []error
	if len(c.Providers) == 0 {
		problems = append(problems, errors.New("no providers"))
	}
	for _, p := range c.Providers {
		problems = append(problems, wrap(p.check(), "provider %q", p.Name))
	}
	return c.Providers, errors.Join(problems...)
}

var yamlLine = regexp.MustCompile(`\bline [0-9]+`)

// check is kubelet's validation.
func (p providerFields) check() error {
	var problems []error
	if p.Name == "" || p.Name == "." || p.Name == ".." || strings.ContainsAny(p.Name, "/ ") {
		problems = append(problems, errors.New("name: want the name of a file in the plugins' directory"))
	}
	if version, ok := strings.CutPrefix(p.APIVersion, requestGroup); !ok || !slices.Contains(apiVersions, version) {
		problems = append(problems, fmt.Errorf("apiVersion %q: want %sv1", p.APIVersion, requestGroup))
	}
	if len(p.MatchImages) == 0 {
		problems = append(problems, errors.New("matchImages: want at least one"))
	}
	if p.DefaultCacheDuration == nil || *p.DefaultCacheDuration < 0 {
		problems = append(problems, errors.New("defaultCacheDuration: want 0 or more, such as 12h"))
	}
	return errors.Join(problems...)
}

func (p *provider) serves(name string) bool {
	return slices.ContainsFunc(p.MatchImages, func(pattern string) bool { return matches(pattern, name) })
}

// Keys under which a plugin's answers are kept; a name has no blank.
func (p *provider) keyOf(scope string) string { return "provider " + p.Name + " " + scope }

// globalScope is that of an answer for all images (cacheKeyType Global).
const globalScope = ""

// question is what to ask the plugin for an image. Questions for a registry wait
// for each other, unless its answers are for one image alone.
func (p *provider) question(image string) question {
	registry, _, _ := strings.Cut(image, "/")
	return question{
		program: p.Name,
		keys:    []string{p.keyOf(image), p.keyOf(registry), p.keyOf(globalScope)},
		wide:    p.keyOf(registry),
		ask:     func(ctx context.Context) (string, answer, error) { return p.run(ctx, image, registry) },
	}
}

// run asks the plugin; key is what its answer is good for.
func (p *provider) run(ctx context.Context, image, registry string) (key string, a answer, err error) {
	body, err := json.Marshal(map[string]string{"kind": "CredentialProviderRequest", "apiVersion": p.APIVersion, "image": image})
	if err != nil {
		return "", a, err
	}
	env := os.Environ()
	for _, e := range p.Env {
		env = append(env, e.Name+"="+e.Value)
	}
	out, err := run(ctx, command{path: p.path, args: p.Args, env: env, stdin: body})
	if err != nil {
		return "", a, fmt.Errorf("%w; to see what it says, run it by hand with %s on its standard input", err, body)
	}
	resp, err := p.parse(out)
	if err != nil {
		return "", a, err
	}
	scope := map[string]string{"Image": image, "Registry": registry, "Global": globalScope}[resp.CacheKeyType]
	hold := *p.DefaultCacheDuration
	if resp.CacheDuration != nil {
		hold = *resp.CacheDuration
	}
	return p.keyOf(scope), answer{auths: resp.auths(), hold: time.Duration(hold)}, nil
}

type providerResponse struct {
	APIVersion    string    `json:"apiVersion"`
	Kind          string    `json:"kind"`
	CacheKeyType  string    `json:"cacheKeyType"`
	CacheDuration *duration `json:"cacheDuration"`
	Auth          map[string]struct {
		Username string `json:"username"`
		Password string `json:"password"`
	} `json:"auth"`
}

// parse reads a CredentialProviderResponse. Its errors show nothing of it but
// what a plugin was configured with.
func (p *provider) parse(out []byte) (r providerResponse, err error) {
	switch {
	case json.Unmarshal(out, &r) != nil:
		return r, fmt.Errorf("what it printed (%d bytes) is no CredentialProviderResponse", len(out))
	case r.Kind != "CredentialProviderResponse":
		return r, errors.New("what it printed is no CredentialProviderResponse")
	case r.APIVersion != p.APIVersion:
		return r, fmt.Errorf("its response has not the apiVersion %s of its configuration", p.APIVersion)
	case !slices.Contains([]string{"Image", "Registry", "Global"}, r.CacheKeyType):
		return r, errors.New("its response has a cacheKeyType that is none of Image, Registry, Global")
	case r.CacheDuration != nil && *r.CacheDuration < 0:
		return r, errors.New("its response has a negative cacheDuration")
	}
	return r, nil
}

func (r providerResponse) auths() map[string]authn.AuthConfig {
	out := map[string]authn.AuthConfig{}
	for key, a := range r.Auth {
		out[key] = authn.AuthConfig{Username: a.Username, Password: a.Password}
	}
	return out
}

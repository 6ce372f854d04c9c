package agent

import (
	"bytes"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/hostsconfig"
	"github.com/larder-cache/larder/test/registrytest"
)

func TestMergeImported(t *testing.T) {
	no := false
	mirror := hostsconfig.Endpoint{Base: "https://mirror.example/v2", Pull: true, Resolve: true}
	source := hostsconfig.Endpoint{Source: true, Pull: true, Resolve: true}
	with := func(e hostsconfig.Endpoint, change func(*hostsconfig.Endpoint)) hostsconfig.Endpoint {
		change(&e)
		return e
	}
	tests := []struct {
		name  string
		found hostsconfig.Imported
		want  upstream.Registry // zero: stays the runtime's alone
		why   string            // said of what stays
	}{
		{name: "mirror before the source", found: hostsconfig.Imported{Registry: "docker.io", Endpoints: []hostsconfig.Endpoint{mirror, source}},
			want: upstream.Registry{Host: "docker.io", Upstreams: []string{"https://mirror.example/v2", "https://registry-1.docker.io"}}},
		{name: "source with a CA and a client certificate", found: hostsconfig.Imported{Registry: "reg.example:5000", Endpoints: []hostsconfig.Endpoint{
			with(source, func(e *hostsconfig.Endpoint) {
				e.CAFiles, e.ClientPairs = []string{"/ca"}, []hostsconfig.ClientPair{{Cert: "/cert", Key: "/key"}}
			})}},
			want: upstream.Registry{Host: "reg.example:5000", Upstreams: []string{"https://reg.example:5000"},
				TLS: map[string]upstream.TLS{"https://reg.example:5000": {CAFiles: []string{"/ca"}, ClientCertFile: "/cert", ClientKeyFile: "/key"}}}},
		{name: "certificate and key in one file", found: hostsconfig.Imported{Registry: "reg.example", Endpoints: []hostsconfig.Endpoint{
			with(source, func(e *hostsconfig.Endpoint) { e.ClientPairs = []hostsconfig.ClientPair{{Cert: "/both"}} })}},
			want: upstream.Registry{Host: "reg.example", Upstreams: []string{"https://reg.example"},
				TLS: map[string]upstream.TLS{"https://reg.example": {ClientCertFile: "/both", ClientKeyFile: "/both"}}}},
		{name: "insecure", found: hostsconfig.Imported{Registry: "reg.example", Runtime: "crio", Endpoints: []hostsconfig.Endpoint{
			with(mirror, func(e *hostsconfig.Endpoint) { e.AllowHTTP, e.SkipVerify = true, true })}},
			want: upstream.Registry{Host: "reg.example", Upstreams: []string{"https://mirror.example/v2", "http://mirror.example/v2"},
				TLS: map[string]upstream.TLS{"https://mirror.example/v2": {SkipVerify: true}}}},
		{name: "mirror by digest alone", found: hostsconfig.Imported{Registry: "quay.io", Endpoints: []hostsconfig.Endpoint{
			with(mirror, func(e *hostsconfig.Endpoint) { e.Resolve = false }), source}},
			want: upstream.Registry{Host: "quay.io", Upstreams: []string{"https://quay.io"}}},
		{name: "blocked with a mirror by digest", found: hostsconfig.Imported{Registry: "quay.io", Blocked: true, Endpoints: []hostsconfig.Endpoint{
			with(mirror, func(e *hostsconfig.Endpoint) { e.Resolve = false })}},
			want: upstream.Registry{Host: "quay.io", Upstreams: []string{"https://mirror.example/v2"}}},
		{name: "a mirror named twice", found: hostsconfig.Imported{Registry: "quay.io", Endpoints: []hostsconfig.Endpoint{mirror, mirror, source}},
			want: upstream.Registry{Host: "quay.io", Upstreams: []string{"https://mirror.example/v2", "https://quay.io"}}},
		{name: "blocked", found: hostsconfig.Imported{Registry: "quay.io", Blocked: true},
			want: upstream.Registry{Host: "quay.io", ContactUpstream: &no, Offline: "remembered"}},
		{name: "configured", found: hostsconfig.Imported{Registry: "mine.example", Endpoints: []hostsconfig.Endpoint{mirror}}},
		{name: "every registry", found: hostsconfig.Imported{Registry: "*", Endpoints: []hostsconfig.Endpoint{mirror}}, why: "every registry"},
		{name: "prefix", found: hostsconfig.Imported{Registry: "quay.io", Prefix: "team", Endpoints: []hostsconfig.Endpoint{mirror}}, why: "below team"},
		{name: "headers", found: hostsconfig.Imported{Registry: "quay.io", Endpoints: []hostsconfig.Endpoint{
			with(mirror, func(e *hostsconfig.Endpoint) { e.Header = http.Header{"X-Token": {"secret"}} })}}, why: "headers"},
		{name: "headers, in the place of the registry", found: hostsconfig.Imported{Registry: "quay.io", Endpoints: []hostsconfig.Endpoint{
			with(source, func(e *hostsconfig.Endpoint) {
				e.Base, e.Header = "https://harbor.example/v2/quay", http.Header{"X-Token": {"secret"}}
			})}},
			want: upstream.Registry{Host: "quay.io", ContactUpstream: &no, Offline: "remembered"}, why: "headers"},
		{name: "rewritten names", found: hostsconfig.Imported{Registry: "quay.io", Endpoints: []hostsconfig.Endpoint{
			with(mirror, func(e *hostsconfig.Endpoint) { e.Renames = true }), source}}, why: "rewrites repository names"},
		{name: "two CAs", found: hostsconfig.Imported{Registry: "quay.io", Endpoints: []hostsconfig.Endpoint{
			with(mirror, func(e *hostsconfig.Endpoint) { e.CAFiles = []string{"/a"} }),
			with(source, func(e *hostsconfig.Endpoint) { e.CAFiles = []string{"/b"} })}},
			want: upstream.Registry{Host: "quay.io", Upstreams: []string{"https://mirror.example/v2", "https://quay.io"},
				TLS: map[string]upstream.TLS{"https://mirror.example/v2": {CAFiles: []string{"/a"}}, "https://quay.io": {CAFiles: []string{"/b"}}}}},
		{name: "two client certificates", found: hostsconfig.Imported{Registry: "quay.io", Endpoints: []hostsconfig.Endpoint{
			with(mirror, func(e *hostsconfig.Endpoint) {
				e.ClientPairs = []hostsconfig.ClientPair{{Cert: "/a"}, {Cert: "/b"}}
			})}}, why: "several client certificates"},
		{name: "no URL", found: hostsconfig.Imported{Registry: "quay.io", Endpoints: []hostsconfig.Endpoint{
			with(mirror, func(e *hostsconfig.Endpoint) { e.Base = "ftp://x/v2" })}}, why: "scheme"},
		{name: "override_path to what is not below v2", found: hostsconfig.Imported{Registry: "quay.io", Endpoints: []hostsconfig.Endpoint{
			with(mirror, func(e *hostsconfig.Endpoint) { e.Base = "https://mirror.example/quay" }), source}}, why: "override_path"},
		{name: "override_path below v2", found: hostsconfig.Imported{Registry: "quay.io", Endpoints: []hostsconfig.Endpoint{
			with(mirror, func(e *hostsconfig.Endpoint) { e.Base = "https://mirror.example/api/v2/quay" })}},
			want: upstream.Registry{Host: "quay.io", Upstreams: []string{"https://mirror.example/api/v2/quay"}}},
	}
	mine := upstream.Registry{Host: "mine.example", Upstreams: []string{"https://elsewhere.example"}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var said bytes.Buffer
			got := mergeImported([]upstream.Registry{mine}, []hostsconfig.Imported{tt.found}, slog.New(slog.NewTextHandler(&said, nil)))
			if !reflect.DeepEqual(got[0], mine) {
				t.Errorf("the configured table became %+v", got[0])
			}
			if tt.want.Host == "" {
				if len(got) != 1 {
					t.Errorf("became %+v", got[1])
				}
			} else if len(got) != 2 || !reflect.DeepEqual(got[1], tt.want) {
				t.Errorf("became %+v, want %+v", got[1:], tt.want)
			}
			if !strings.Contains(said.String(), tt.why) || strings.Contains(said.String(), "secret") {
				t.Errorf("said %q, want %q", said.String(), tt.why)
			}
		})
	}
}

// TestOneTableForAllSpellings: certs.d may have directories for several names of
// one registry. The agent must start all the same, with what the runtime uses.
func TestOneTableForAllSpellings(t *testing.T) {
	from := func(registry, mirror string) hostsconfig.Imported {
		return hostsconfig.Imported{Registry: registry, Endpoints: []hostsconfig.Endpoint{{Base: mirror, Pull: true, Resolve: true}}}
	}
	mine := upstream.Registry{Host: "Mine.example", Upstreams: []string{"https://elsewhere.example"}}
	got := mergeImported([]upstream.Registry{mine}, []hostsconfig.Imported{
		from("Reg.example", "https://upper.example/v2"),
		from("index.docker.io", "https://other.example/v2"),
		from("docker.io", "https://mirror.example/v2"),
		from("mine.example", "https://mirror.example/v2"),
		from("reg.example", "https://lower.example/v2"),
	}, slog.New(slog.DiscardHandler))
	want := []upstream.Registry{mine,
		{Host: "docker.io", Upstreams: []string{"https://mirror.example/v2"}},
		{Host: "reg.example", Upstreams: []string{"https://lower.example/v2"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("became %+v, want %+v", got, want)
	}
	if _, err := upstream.New(upstream.Config{Registries: got}); err != nil {
		t.Error(err)
	}
}

// TestImportedTrustIsTheirsAlone: what a runtime does without for one mirror is not
// done without for the registry itself. Else whoever is between a node and a public
// registry could answer for it, since some mirror in the house has a certificate of its own.
func TestImportedTrustIsTheirsAlone(t *testing.T) {
	mirror, source := registrytest.Start(t, registrytest.Options{TLS: true}), registrytest.Start(t, registrytest.Options{TLS: true})
	ca, err := mirror.CAFile(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 1})
	mirror.Put("a", img, "v1")
	source.Put("a", img, "v1")
	source.Put("b", img, "v1")
	for name, trust := range map[string]hostsconfig.Endpoint{
		"skip_verify": {SkipVerify: true}, "ca": {CAFiles: []string{ca}}, "two CAs": {CAFiles: []string{ca, ca}},
	} {
		t.Run(name, func(t *testing.T) {
			trust.Base, trust.Pull, trust.Resolve = mirror.URL()+"/v2", true, true
			found := hostsconfig.Imported{Registry: "reg.example", Endpoints: []hostsconfig.Endpoint{
				trust, {Base: source.URL() + "/v2", Source: true, Pull: true, Resolve: true}}}
			list := mergeImported(nil, []hostsconfig.Imported{found}, slog.New(slog.DiscardHandler))
			c, err := upstream.New(upstream.Config{Registries: list})
			if err != nil || len(list) != 1 {
				t.Fatalf("%+v, %v", list, err)
			}
			defer c.Close()
			if _, err := c.Resolve(t.Context(), upstream.Target{Registry: "reg.example", Repository: "a"}, "v1", nil); err != nil {
				t.Errorf("by the mirror: %v", err)
			}
			unknown := x509.UnknownAuthorityError{}
			if _, err := c.Resolve(t.Context(), upstream.Target{Registry: "reg.example", Repository: "b"}, "v1", nil); !errors.As(err, &unknown) {
				t.Errorf("by the registry, whose certificate nobody vouches for: %v", err)
			}
		})
	}
}

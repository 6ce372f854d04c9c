package upstream

import (
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
)

func TestAllows(t *testing.T) {
	cases := []struct {
		allow, deny []string
		repository  string
		want        bool
	}{
		{nil, nil, "library/nginx", true},
		{[]string{"**"}, nil, "a/b/c", true},
		{[]string{"library/*"}, nil, "library/nginx", true},
		{[]string{"library/*"}, nil, "library/a/b", false},
		{[]string{"library/*"}, nil, "library", false},
		{[]string{"library/**"}, nil, "library/a/b", true},
		{[]string{"library/**"}, nil, "library", true},
		{[]string{"**/secret"}, nil, "a/b/secret", true},
		{[]string{"**/secret"}, nil, "secret", true},
		{[]string{"a/**/z"}, nil, "a/z", true},
		{[]string{"a/**/m/**/z"}, nil, "a/b/m/c/d/z", true},
		{[]string{"a/**/m/**/z"}, nil, "a/b/c/d/z", false},
		{[]string{"team-*/app"}, nil, "team-x/app", true},
		{[]string{"team-*/app"}, nil, "team-x/y/app", false},
		{[]string{"*"}, nil, "a", true},
		{[]string{"*"}, nil, "a/b", false},
		{nil, []string{"internal/**"}, "internal/x", false},
		{[]string{"**"}, []string{"internal/**"}, "public/x", true},
		{[]string{"internal/x"}, []string{"internal/*"}, "internal/x", false},
	}
	for _, tc := range cases {
		if got := (Registry{Allow: tc.allow, Deny: tc.deny}).Allows(tc.repository); got != tc.want {
			t.Errorf("allow %v, deny %v: %s = %t", tc.allow, tc.deny, tc.repository, got)
		}
	}
	hard := Registry{Allow: []string{strings.Repeat("**/a/", 50) + "b"}}
	if hard.Allows(strings.Repeat("a/", 100) + "c") {
		t.Error("a pattern with 50 stars matched what it should not")
	}
}

func TestNodeAuth(t *testing.T) {
	cases := []struct {
		auth       string
		globs      []string
		repository string
		want       bool
	}{
		{"", nil, "team/app", false},
		{"relay", nil, "team/app", false},
		{"anonymous", nil, "team/app", false},
		{"node", nil, "team/app", true},
		{"node", []string{"team/**"}, "team/app", true},
		{"node", []string{"team/**"}, "team/a/b", true},
		{"node", []string{"team/**"}, "teams/app", false},
		{"node", []string{"team/**"}, "other/team/app", false},
		{"node", []string{"team/*", "base"}, "base", true},
		{"relay", []string{"team/**"}, "team/app", false}, // Validate says so
	}
	for _, tc := range cases {
		r := Registry{Host: "reg.test", Auth: tc.auth, NodeRepositories: tc.globs}
		if got := r.NodeAuth(tc.repository); got != tc.want {
			t.Errorf("auth = %q, node_repositories = %q: %s = %t", tc.auth, tc.globs, tc.repository, got)
		}
	}
}

func TestValidateReportsAll(t *testing.T) {
	bad := Registry{
		Host: "https://x", Upstreams: []string{"x.test", "ftp://x.test", "https://u:p@x.test", "https://x.test/a/../b", "https://x.test?q=1"},
		Auth: "guess", Offline: "maybe", ClientCertFile: "c", Allow: []string{"a**/b", "["}, NodeRepositories: []string{"a//b"}, TokenRealms: []string{""},
		MaxConnections: -1, MaxBytesPerSecond: -1, TagTTL: new(Duration(10)),
	}
	err := bad.Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"host:", "x.test\" is not a URL", "scheme must be", "credentials", "dot segment", "no query",
		"auth =", "offline =", "client_key_file", "whole path segment", "node_repositories: \"a//b\": empty path segment", "node_repositories has no effect", "syntax error in pattern", "token_realms",
		"max_connections", "max_bytes_per_second", "tag_ttl"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("nothing about %q in:\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "u:p") {
		t.Error("the error repeats a password")
	}
	for _, host := range []string{"docker.io", "reg.example.com:5000", "127.0.0.1:5000", "[::1]:5000", "localhost"} {
		if err := (Registry{Host: host, Upstreams: []string{"http://" + host + "/proxy"}}).Validate(); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
}

func TestEndpointPaths(t *testing.T) {
	cases := []struct{ in, base, prefix string }{
		{"https://x.test", "/v2/", ""},
		{"https://x.test/", "/v2/", ""},
		{"https://x.test/proxy", "/v2/proxy/", "proxy/"},
		{"https://x.test/a/b/", "/v2/a/b/", "a/b/"},
		{"https://x.test/v2", "/v2/", ""},
		{"https://x.test/v2/proxy", "/v2/proxy/", "proxy/"},
		{"https://x.test/mirror/v2", "/mirror/v2/", ""},
	}
	for _, tc := range cases {
		a, err := parseEndpoint(tc.in)
		if err != nil || a.base != tc.base || a.prefix != tc.prefix {
			t.Errorf("%s: %+v, %v", tc.in, a, err)
		}
	}
}

func TestRegistryTable(t *testing.T) {
	var doc struct {
		Registry []Registry `toml:"registry"`
	}
	err := toml.Unmarshal([]byte(`
[[registry]]
host = "docker.io"
tag_ttl = "90s"
contact_upstream = false
max_bytes_per_second = "1.5MiB"
token_realms = ["auth.example.com"]
[[registry]]
host = "quay.io"
max_bytes_per_second = 1000
tag_ttl = 0
`), &doc)
	if err != nil {
		t.Fatal(err)
	}
	hub, quay := doc.Registry[0], doc.Registry[1]
	if hub.TTL(0) != 90*time.Second || hub.Contact() || hub.MaxBytesPerSecond != 3<<19 || len(hub.TokenRealms) != 1 {
		t.Errorf("docker.io: %+v", hub)
	}
	if quay.TTL(time.Minute) != 0 || !quay.Contact() || quay.MaxBytesPerSecond != 1000 {
		t.Errorf("quay.io: %+v", quay)
	}
	if ttl := (Registry{}).TTL(time.Minute); ttl != time.Minute {
		t.Errorf("inherited TTL: %v", ttl)
	}
}

func TestNewReportsAll(t *testing.T) {
	_, err := New(Config{Registries: []Registry{{Host: ""}, {Host: "a.test", Auth: "x"}, {Host: "docker.io"}, {Host: "index.docker.io"}}})
	if err == nil || !strings.Contains(err.Error(), "empty") || !strings.Contains(err.Error(), "auth =") || !strings.Contains(err.Error(), "twice") {
		t.Errorf("New: %v", err)
	}
}

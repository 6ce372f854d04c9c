package credentials

import (
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
)

// TestMatches holds kubelet's rule (the cases of TestURLsMatch and
// TestDockerKeyringForGlob in its keyring_test.go, and the examples of the
// documentation of matchImages).
func TestMatches(t *testing.T) {
	cases := []struct {
		pattern, name string
		want          bool
	}{
		{"*.kubernetes.io", "prefix.kubernetes.io", true},
		{"prefix.*.io", "prefix.kubernetes.io", true},
		{"prefix.kubernetes.*", "prefix.kubernetes.io", true},
		{"*-good.kubernetes.io", "prefix-good.kubernetes.io", true},
		{"app*.k8s.io", "app7.k8s.io/x", true},
		{"*.*.registry.io", "a.b.registry.io/x", true},
		{"*.kubernetes.io/blah", "prefix.kubernetes.io/blah", true},
		{"prefix.*.io/foo", "prefix.kubernetes.io/foo/bar", true},
		{"registry.io/foo", "registry.io/foobar", true}, // a string's prefix, not a path's
		{"*.kubernetes.io:1111/blah", "prefix.kubernetes.io:1111/blah", true},
		{"prefix.*.io:1111/foo", "prefix.kubernetes.io:1111/foo/bar", true},
		{"registry.io:8080/path", "registry.io:8080/path/app", true},
		{"123456789.dkr.ecr.us-east-1.amazonaws.com", "123456789.dkr.ecr.us-east-1.amazonaws.com/team/app", true},
		{"*.dkr.ecr.*.amazonaws.com", "123456789.dkr.ecr.us-east-1.amazonaws.com/team/app", true},
		{"*.dkr.ecr.*.amazonaws.com", "123456789.dkr.ecr.cn-north-1.amazonaws.com.cn/team/app", false},
		{"localhost", "localhost/x", true},
		{"*", "localhost/x", true},
		{"*.kubernetes.io", "kubernetes.io", false},
		{"*.io", "a.k8s.io", false},
		{"*.*.kubernetes.io", "prefix.kubernetes.io", false},
		{"kubernetes.io", "kubernetes.com", false},
		{"k*.io", "quay.io", false},
		{"*.kubernetes.io:1234/blah", "prefix.kubernetes.io:1111/blah", false},
		{"prefix.*.io/foo", "prefix.kubernetes.io:1111/foo/bar", false},
		{"registry.io:8080", "registry.io/x", false},
		{"registry.io:*", "registry.io:8080/x", false}, // no globs in ports
		{"registry.io/*", "registry.io/x", false},      // nor in paths
		{"registry.io/team/app", "registry.io/team", false},
		{"reg[.io", "reg.io/x", false},
		{"%zz", "%zz/x", false},
	}
	for _, tc := range cases {
		if got := matches(tc.pattern, tc.name); got != tc.want {
			t.Errorf("%s matches %s: %t", tc.pattern, tc.name, got)
		}
	}
}

func TestOrder(t *testing.T) {
	auths := map[string]authn.AuthConfig{}
	for _, key := range []string{"quay.io", "quay.io/coreos", "quay.io/coreos/etcd", "quay.io/core", "*.io", "*.io/coreos", "quay.io/other", "gcr.io"} {
		auths[key] = authn.AuthConfig{Username: key}
	}
	want := "quay.io/coreos/etcd: quay.io/coreos: quay.io/core: quay.io: *.io/coreos: *.io:"
	if got := users(matching(auths, "quay.io/coreos/etcd")); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestCanonical(t *testing.T) {
	for in, want := range map[string]string{
		"https://index.docker.io/v1/":      "docker.io",
		"index.docker.io":                  "docker.io",
		"docker.io":                        "docker.io",
		"registry-1.docker.io":             "docker.io",
		"docker.io/acme":                   "docker.io/acme",
		"https://reg.example.com/v2/":      "reg.example.com",
		"https://reg.example.com/v2":       "reg.example.com",
		"http://reg.example.com:5000/v1/":  "reg.example.com:5000",
		"https://reg.example.com/v1/team":  "reg.example.com/team",
		"REG.example.com/Team":             "reg.example.com/Team",
		"reg.example.com/v2-images":        "reg.example.com/v2-images",
		"quay.io/org/":                     "quay.io/org/",
		"*.dkr.ecr.*.amazonaws.com":        "*.dkr.ecr.*.amazonaws.com",
		"https://reg.example.com":          "reg.example.com",
		"123456789012.dkr.ecr.eu.test/v2/": "123456789012.dkr.ecr.eu.test",
	} {
		if got := canonicalKey(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

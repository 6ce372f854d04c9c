package proxy

import (
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

const hex64 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestParseRoute(t *testing.T) {
	sha256 := digest.Digest("sha256:" + hex64)
	sha512 := digest.Digest("sha512:" + hex64 + hex64)
	tests := []struct {
		name, target, fallback string
		want                   route
	}{
		{name: "ping", target: "/v2/", want: route{kind: KindPing}},
		{name: "ping without slash", target: "/v2", want: route{kind: KindPing}},
		{name: "ping with ns", target: "/v2/?ns=docker.io", want: route{kind: KindPing}},
		{name: "tag by ns", target: "/v2/library/nginx/manifests/1.27?ns=docker.io",
			want: route{kind: KindManifest, registry: "docker.io", repository: "library/nginx", tag: "1.27"}},
		{name: "digest by ns with a port", target: "/v2/a/manifests/sha256:" + hex64 + "?ns=reg.example.com:5000",
			want: route{kind: KindManifest, registry: "reg.example.com:5000", repository: "a", digest: sha256}},
		{name: "ns is compared without case", target: "/v2/a/manifests/x?ns=Docker.IO",
			want: route{kind: KindManifest, registry: "docker.io", repository: "a", tag: "x"}},
		{name: "other names of Docker Hub", target: "/v2/a/manifests/x?ns=registry-1.docker.io",
			want: route{kind: KindManifest, registry: "docker.io", repository: "a", tag: "x"}},
		{name: "ns goes before a host in the path", target: "/v2/quay.io/a/manifests/x?ns=docker.io",
			want: route{kind: KindManifest, registry: "docker.io", repository: "quay.io/a", tag: "x"}},
		{name: "blob", target: "/v2/a/b/c/blobs/sha256:" + hex64 + "?ns=quay.io",
			want: route{kind: KindBlob, registry: "quay.io", repository: "a/b/c", digest: sha256}},
		{name: "blob, colon escaped", target: "/v2/a/blobs/sha256%3A" + hex64 + "?ns=quay.io",
			want: route{kind: KindBlob, registry: "quay.io", repository: "a", digest: sha256}},
		{name: "sha512", target: "/v2/a/blobs/sha512:" + hex64 + hex64 + "?ns=quay.io",
			want: route{kind: KindBlob, registry: "quay.io", repository: "a", digest: sha512}},
		{name: "registry in the path", target: "/v2/quay.io/org/app/manifests/v1",
			want: route{kind: KindManifest, registry: "quay.io", repository: "org/app", tag: "v1", pathEncoded: true}},
		{name: "registry with a port in the path", target: "/v2/reg.example.com_5000/app/manifests/v1",
			want: route{kind: KindManifest, registry: "reg.example.com:5000", repository: "app", tag: "v1", pathEncoded: true}},
		{name: "registry with a colon in the path", target: "/v2/reg:5000/app/manifests/v1",
			want: route{kind: KindManifest, registry: "reg:5000", repository: "app", tag: "v1", pathEncoded: true}},
		{name: "host without a dot but with a port", target: "/v2/myreg_5000/app/manifests/v1",
			want: route{kind: KindManifest, registry: "myreg:5000", repository: "app", tag: "v1", pathEncoded: true}},
		{name: "localhost", target: "/v2/localhost/app/manifests/v1",
			want: route{kind: KindManifest, registry: "localhost", repository: "app", tag: "v1", pathEncoded: true}},
		{name: "default registry", target: "/v2/org/app/manifests/v1", fallback: "reg.example.com",
			want: route{kind: KindManifest, registry: "reg.example.com", repository: "org/app", tag: "v1"}},
		{name: "one dotted component is a repository", target: "/v2/my.app/manifests/v1", fallback: "reg.example.com",
			want: route{kind: KindManifest, registry: "reg.example.com", repository: "my.app", tag: "v1"}},
		{name: "repository named like an endpoint", target: "/v2/a/manifests/blobs/tags/list?ns=q.io",
			want: route{kind: KindTags, registry: "q.io", repository: "a/manifests/blobs"}},
		{name: "tag named list", target: "/v2/a/tags/manifests/list?ns=q.io",
			want: route{kind: KindManifest, registry: "q.io", repository: "a/tags", tag: "list"}},
		{name: "referrers", target: "/v2/a/referrers/sha256:" + hex64 + "?ns=q.io&artifactType=x",
			want: route{kind: KindReferrers, registry: "q.io", repository: "a", digest: sha256}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseRoute(parseTarget(t, tt.target), tt.fallback)
			if err != nil || got != tt.want {
				t.Errorf("parseRoute(%s) = %+v, %v; want %+v", tt.target, got, err, tt.want)
			}
		})
	}
}

func TestParseRouteRefuses(t *testing.T) {
	long := strings.Repeat("a", 256)
	tests := []struct {
		name, target, code string
		status             int
	}{
		{"root", "/", codeNameUnknown, 404},
		{"other API version", "/v1/_ping", codeNameUnknown, 404},
		{"prefix of another word", "/v2x/a/manifests/x", codeNameUnknown, 404},
		{"catalog", "/v2/_catalog", codeNameUnknown, 404},
		{"upload", "/v2/a/blobs/uploads/?ns=q.io", codeNameUnknown, 404},
		{"no registry", "/v2/a/manifests/x", codeNameUnknown, 404},
		{"no repository", "/v2//manifests/x?ns=q.io", codeNameInvalid, 400},
		{"host but no repository", "/v2/q.io/manifests/x", codeNameUnknown, 404},
		{"upper case", "/v2/Library/nginx/manifests/x?ns=q.io", codeNameInvalid, 400},
		{"dot segments", "/v2/../../etc/manifests/x?ns=q.io", codeNameInvalid, 400},
		{"escaped dots", "/v2/%2e%2e/a/manifests/x?ns=q.io", codeNameInvalid, 400},
		{"escaped slash", "/v2/a%2fb/manifests/x?ns=q.io", codeNameInvalid, 400},
		{"escaped backslash", "/v2/a%5cb/manifests/x?ns=q.io", codeNameInvalid, 400},
		{"escaped NUL", "/v2/a/manifests/x%00?ns=q.io", codeNameInvalid, 400},
		{"double slash", "/v2/a//b/manifests/x?ns=q.io", codeNameInvalid, 400},
		{"long name", "/v2/" + long + "/manifests/x?ns=q.io", codeNameInvalid, 400},
		{"long tag", "/v2/a/manifests/" + long + "?ns=q.io", codeManifestUnknown, 404},
		{"tag with a dot first", "/v2/a/manifests/.x?ns=q.io", codeManifestUnknown, 404},
		{"digest with a path", "/v2/a/blobs/sha256:..%2f..?ns=q.io", codeNameInvalid, 400},
		{"short digest", "/v2/a/blobs/sha256:abc?ns=q.io", codeDigestInvalid, 400},
		{"digest in upper case", "/v2/a/blobs/sha256:" + strings.ToUpper(hex64) + "?ns=q.io", codeDigestInvalid, 400},
		{"unknown algorithm", "/v2/a/manifests/md5:abc?ns=q.io", codeDigestInvalid, 400},
		{"blob by tag", "/v2/a/blobs/latest?ns=q.io", codeDigestInvalid, 400},
		{"ns with a path", "/v2/a/manifests/x?ns=q.io/evil", codeNameInvalid, 400},
		{"ns with a scheme", "/v2/a/manifests/x?ns=http://q.io", codeNameInvalid, 400},
		{"ns with user", "/v2/a/manifests/x?ns=u@q.io", codeNameInvalid, 400},
		{"ns with a bad port", "/v2/a/manifests/x?ns=q.io:99999", codeNameInvalid, 400},
		{"ns too long", "/v2/a/manifests/x?ns=" + long, codeNameInvalid, 400},
		{"two ns", "/v2/a/manifests/x?ns=q.io&ns=r.io", codeNameInvalid, 400},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rt, err := parseRoute(parseTarget(t, tt.target), "")
			var api *apiError
			if !errors.As(err, &api) || api.code != tt.code || api.status != tt.status {
				t.Errorf("parseRoute(%s) = %v; want %d %s", tt.target, err, tt.status, tt.code)
			}
			if rt != (route{kind: rt.kind}) {
				t.Errorf("a refused route carries %+v", rt)
			}
		})
	}
}

func parseTarget(t testing.TB, target string) *url.URL {
	t.Helper()
	u, err := url.ParseRequestURI(target)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// FuzzParseRoute holds that whatever passes is safe to put into a path and
// into a question to upstream, and that what does not has an OCI error.
func FuzzParseRoute(f *testing.F) {
	for _, seed := range []string{
		"/v2/", "/v2/library/nginx/manifests/latest?ns=docker.io", "/v2/quay.io/a/b/blobs/sha256:" + hex64,
		"/v2/reg_5000/a/tags/list?n=1", "/v2/a/referrers/sha256:" + hex64 + "?ns=[::1]:5000", "/v2/a%2f../manifests/x?ns=a%00",
		"/v2/a/b/../c/manifests/x?ns=q.io", "//v2/a/manifests/x", "/v2/a/manifests/sha256%3a" + hex64,
	} {
		f.Add(seed, "docker.io")
	}
	f.Fuzz(func(t *testing.T, target, fallback string) {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			t.Skip("not a request")
		}
		rt, err := parseRoute(u, fallback)
		if err != nil {
			if e := toAPIError(err, rt.kind, true); e.status != http.StatusNotFound && e.status != http.StatusBadRequest {
				t.Fatalf("%q: %v", target, e)
			}
			return
		}
		if rt.kind == KindPing {
			return
		}
		if !validHost(rt.registry) || rt.registry != strings.ToLower(rt.registry) || strings.ContainsAny(rt.registry, "/?#@% ") {
			t.Fatalf("%q: registry %q", target, rt.registry)
		}
		for part := range strings.SplitSeq(rt.repository, "/") {
			if part == "" || part == "." || part == ".." || strings.ContainsAny(part, `\%?#:`) {
				t.Fatalf("%q: repository %q", target, rt.repository)
			}
		}
		if (rt.digest != "" && rt.digest.Validate() != nil) || (rt.tag != "" && !tagRE.MatchString(rt.tag)) {
			t.Fatalf("%q: reference %+v", target, rt)
		}
	})
}

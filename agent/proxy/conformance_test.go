package proxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/test/registrytest"
)

func checkOCIError(t *testing.T, a answer, status int, code string) {
	t.Helper()
	var body struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.Unmarshal(a.body, &body); err != nil || len(body.Errors) != 1 || body.Errors[0].Code != code || body.Errors[0].Message == "" {
		t.Errorf("body %q is no OCI error %s", a.body, code)
	}
	if a.status != status || a.header.Get("Content-Type") != "application/json" {
		t.Errorf("status %d, Content-Type %q; want %d as JSON", a.status, a.header.Get("Content-Type"), status)
	}
	for _, name := range []string{"Etag", headerDigest, headerSource, "Content-Range"} {
		if v := a.header.Get(name); v != "" {
			t.Errorf("an error carries %s: %s", name, v)
		}
	}
}

func TestPing(t *testing.T) {
	n := startNode(t, nil)
	for _, method := range []string{"GET", "HEAD"} {
		for _, path := range []string{"/v2/", "/v2", "/v2/?ns=" + host} {
			a := n.do(method, path)
			if a.status != 200 || a.header.Get("Docker-Distribution-Api-Version") != "registry/2.0" {
				t.Errorf("%s %s: %d %v", method, path, a.status, a.header)
			}
		}
	}
}

func TestPushIsRefused(t *testing.T) {
	n := startNode(t, nil)
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE"} {
		for _, path := range []string{manifestPath("v1"), "/v2/a/blobs/uploads/", "/v2/"} {
			a := n.do(method, path)
			checkOCIError(t, a, http.StatusMethodNotAllowed, "UNSUPPORTED")
			if a.header.Get("Allow") != "GET, HEAD" {
				t.Errorf("Allow: %q", a.header.Get("Allow"))
			}
		}
	}
}

func TestUnknown(t *testing.T) {
	n := startNode(t, nil)
	n.image()
	unknown := digest.FromString("unknown")
	for name, tc := range map[string]struct {
		path   string
		status int
		code   string
	}{
		"tag":                 {manifestPath("nope"), 404, "MANIFEST_UNKNOWN"},
		"manifest":            {manifestPath(unknown.String()), 404, "MANIFEST_UNKNOWN"},
		"manifest, bad":       {manifestPath("sha256:zz"), 400, "DIGEST_INVALID"},
		"blob":                {blobPath(unknown), 404, "BLOB_UNKNOWN"},
		"tags":                {"/v2/none/tags/list?ns=" + host, 404, "NAME_UNKNOWN"},
		"referrers, bad":      {"/v2/a/referrers/sha256:x?ns=" + host, 400, "DIGEST_INVALID"},
		"no registry":         {"/v2/a/manifests/v1", 404, "NAME_UNKNOWN"},
		"upper case":          {"/v2/A/manifests/v1?ns=" + host, 400, "NAME_INVALID"},
		"a private address":   {"/v2/a/manifests/v1?ns=127.0.0.1:1", 502, "UNAVAILABLE"},
		"a metadata service":  {"/v2/a/blobs/" + unknown.String() + "?ns=169.254.169.254", 502, "UNAVAILABLE"},
		"path-encoded, local": {"/v2/localhost/a/manifests/v1", 502, "UNAVAILABLE"},
	} {
		t.Run(name, func(t *testing.T) { checkOCIError(t, n.get(tc.path), tc.status, tc.code) })
	}
}

// TestManifestBytes holds that manifests of every kind come byte by byte with
// the type they were pushed with, cold and warm, by tag and digest.
func TestManifestBytes(t *testing.T) {
	spec := registrytest.ImageSpec{Seed: 3, Layers: []int64{1000}}
	for name, img := range map[string]*registrytest.Image{
		"oci": registrytest.OCIImage(spec), "schema 2": registrytest.DockerImage(spec),
		"index": registrytest.Platforms(spec, false), "manifest list": registrytest.Platforms(spec, true),
	} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t, nil)
			n.put(img)
			want := img.Manifests[len(img.Manifests)-1]
			for _, ref := range []string{"v1", want.Digest.String(), "v1", want.Digest.String()} {
				for _, method := range []string{"HEAD", "GET"} {
					a := n.do(method, manifestPath(ref))
					h := a.header
					if a.status != 200 || h.Get("Content-Type") != want.MediaType || h.Get(headerDigest) != want.Digest.String() ||
						h.Get("Content-Length") != strconv.FormatInt(want.Size, 10) || h.Get("Etag") != `"`+want.Digest.String()+`"` || h.Get("OCI-Namespace") != host {
						t.Errorf("%s %s: %d %v", method, ref, a.status, h)
					}
					if method == "GET" && !bytes.Equal(a.body, want.Data) {
						t.Errorf("GET %s: other bytes", ref)
					}
				}
			}
		})
	}
}

// blobRanges is every way to ask for part of a blob of 1,000,000 bytes.
var blobRanges = []struct {
	name, header, ifRange string
	status                int
	from, to              int // what comes, unless multipart
	parts                 [][2]int
}{
	{name: "whole", status: 200, from: 0, to: 1e6},
	{name: "first bytes", header: "bytes=0-1", status: 206, from: 0, to: 2},
	{name: "middle", header: "bytes=300000-699999", status: 206, from: 300000, to: 700000},
	{name: "rest", header: "bytes=999000-", status: 206, from: 999000, to: 1e6},
	{name: "all, as a range", header: "bytes=0-", status: 206, from: 0, to: 1e6},
	{name: "last", header: "bytes=-10", status: 206, from: 999990, to: 1e6},
	{name: "clamped", header: "bytes=999990-2000000", status: 206, from: 999990, to: 1e6},
	{name: "beyond", header: "bytes=1000000-", status: 416},
	{name: "backwards", header: "bytes=500-0", status: 416},
	{name: "nothing", header: "bytes=-0", status: 416},
	{name: "If-Range of this blob", header: "bytes=5-6", ifRange: "match", status: 206, from: 5, to: 7},
	{name: "If-Range of another", header: "bytes=5-6", ifRange: `"other"`, status: 200, from: 0, to: 1e6},
	{name: "two", header: "bytes=10-19,900000-900009", status: 206, parts: [][2]int{{10, 20}, {900000, 900010}}},
	{name: "two, backwards", header: "bytes=900000-900009,10-19", status: 206, parts: [][2]int{{900000, 900010}, {10, 20}}},
}

// TestBlobRanges asks for the same of a blob that is here and of one that is
// only coming, in each of the ways that a registry must answer.
func TestBlobRanges(t *testing.T) {
	for _, warm := range []bool{false, true} {
		for _, tt := range blobRanges {
			t.Run(fmt.Sprintf("warm=%v/%s", warm, tt.name), func(t *testing.T) {
				t.Parallel()
				n := startNode(t, nil)
				img := n.image(1e6)
				d := img.Layers[0].Digest
				want := bytesOf(t, img, d)
				if warm {
					n.get(blobPath(d))
					await(t, "commit", func() bool { return n.cache.Has(d) })
				} else {
					n.registry.SetRate(4<<20, 0)
				}
				var header []string
				if tt.header != "" {
					header = append(header, "Range", tt.header)
				}
				if tt.ifRange == "match" {
					header = append(header, "If-Range", etag(d))
				} else if tt.ifRange != "" {
					header = append(header, "If-Range", tt.ifRange)
				}
				checkRange(t, n.get(blobPath(d), header...), d, want, tt.status, tt.from, tt.to, tt.parts)
			})
		}
	}
}

func checkRange(t *testing.T, a answer, d digest.Digest, want []byte, status, from, to int, parts [][2]int) {
	t.Helper()
	if a.status != status || a.err != nil {
		t.Fatalf("status %d, %v; want %d", a.status, a.err, status)
	}
	h := a.header
	switch {
	case status == 416:
		return
	case h.Get(headerDigest) != d.String() || h.Get("Accept-Ranges") != "bytes" || h.Get("Etag") != etag(d) || !strings.Contains(h.Get("Cache-Control"), "immutable"):
		t.Errorf("headers %v", h)
	case parts != nil:
		checkParts(t, a, want, parts)
		return
	}
	if !bytes.Equal(a.body, want[from:to]) {
		t.Errorf("%d other bytes than [%d, %d)", len(a.body), from, to)
	}
	if got, wanted := h.Get("Content-Range"), fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(want)); status == 206 && got != wanted {
		t.Errorf("Content-Range %q, want %q", got, wanted)
	}
}

func checkParts(t *testing.T, a answer, want []byte, parts [][2]int) {
	t.Helper()
	mediaType, params, err := mime.ParseMediaType(a.header.Get("Content-Type"))
	if err != nil || mediaType != "multipart/byteranges" {
		t.Fatalf("Content-Type %q", a.header.Get("Content-Type"))
	}
	r := multipart.NewReader(bytes.NewReader(a.body), params["boundary"])
	for _, p := range parts {
		part, err := r.NextPart()
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(part)
		if err != nil || !bytes.Equal(got, want[p[0]:p[1]]) {
			t.Errorf("part %v: %d bytes, %v", p, len(got), err)
		}
	}
}

func TestBlobHead(t *testing.T) {
	n := startNode(t, nil)
	img := n.image()
	d := img.Layers[0].Digest
	for _, warm := range []bool{false, true} {
		if warm {
			n.get(blobPath(d))
			await(t, "commit", func() bool { return n.cache.Has(d) })
		}
		a := n.do("HEAD", blobPath(d))
		if a.status != 200 || a.header.Get("Content-Length") != strconv.FormatInt(img.Layers[0].Size, 10) || a.header.Get(headerDigest) != d.String() {
			t.Errorf("warm %v: %d %v", warm, a.status, a.header)
		}
		if !warm && n.registry.Count(registrytest.Match{Kind: registrytest.Blob, Method: "GET"}) != 0 {
			t.Error("a HEAD started a download")
		}
	}
}

// TestLastNoBytes: a last zero bytes is no range of anything, see TestEmptyRange.
func TestLastNoBytes(t *testing.T) {
	n := startNode(t, nil)
	img := n.image()
	for _, path := range []string{blobPath(img.Layers[0].Digest), manifestPath("v1"), manifestPath(img.Digest.String()),
		"/v2/" + repo + "/tags/list?ns=" + host, "/v2/larder.invalid/canary/manifests/nonce?ns=" + host} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			if a := n.do(method, path, "Range", "bytes=-0"); a.status != http.StatusRequestedRangeNotSatisfiable {
				t.Errorf("%s %s: %d, %q", method, path, a.status, a.header.Get("Content-Range"))
			}
		}
	}
}

func TestNotModifiedOnlyWhenAsked(t *testing.T) {
	n := startNode(t, nil)
	img := n.image()
	for _, path := range []string{manifestPath("v1"), blobPath(img.Layers[0].Digest)} {
		first := n.get(path)
		for _, method := range []string{"GET", "HEAD"} {
			if a := n.do(method, path, "If-None-Match", first.header.Get("Etag")); a.status != 304 {
				t.Errorf("%s %s: %d", method, path, a.status)
			}
			if a := n.do(method, path, "If-Modified-Since", "Mon, 01 Jan 2046 00:00:00 GMT"); a.status != 200 {
				t.Errorf("%s %s, nobody asked by ETag: %d", method, path, a.status)
			}
		}
	}
}

func TestSources(t *testing.T) {
	n := startNode(t, nil)
	img := n.image()
	d := img.Layers[0].Digest
	for _, want := range []string{"upstream", "disk"} {
		a := n.get(blobPath(d))
		if a.status != 200 || a.header.Get(headerSource) != want {
			t.Errorf("%d from %q, want %s", a.status, a.header.Get(headerSource), want)
		}
		await(t, "commit", func() bool { return n.cache.Has(d) })
	}
}

func TestDefaultRegistryAndPaths(t *testing.T) {
	n := startNode(t, func(s *setup) { s.proxy.DefaultRegistry = host })
	img := n.image()
	for _, path := range []string{"/v2/" + repo + "/manifests/v1", pathManifest("v1"), manifestPath("v1")} {
		if a := n.get(path); a.status != 200 || a.header.Get(headerDigest) != img.Digest.String() || a.header.Get("OCI-Namespace") != host {
			t.Errorf("%s: %d %v", path, a.status, a.header)
		}
	}
}

func TestDeniedRepository(t *testing.T) {
	n := startNode(t, func(s *setup) { s.policy.Deny = []string{"library/**"} })
	img := n.image()
	for _, path := range []string{
		manifestPath("v1"), manifestPath(img.Digest.String()), blobPath(img.Layers[0].Digest),
		"/v2/" + repo + "/tags/list?ns=" + host, "/v2/" + repo + "/referrers/" + img.Digest.String() + "?ns=" + host, pathManifest("v1"),
	} {
		checkOCIError(t, n.get(path), 404, "NAME_UNKNOWN")
	}
	if got := n.registry.Count(registrytest.Match{}); got != 0 {
		t.Errorf("%d requests upstream for a denied repository", got)
	}
}

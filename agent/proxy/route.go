package proxy

import (
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/upstream"
)

// Kind says which endpoint of the distribution API a request names.
type Kind string

// The endpoints that the proxy answers. The values are label values of
// larder_requests_total.
const (
	KindPing      Kind = "ping"
	KindManifest  Kind = "manifest"
	KindBlob      Kind = "blob"
	KindTags      Kind = "tags"
	KindReferrers Kind = "referrers"
	KindOther     Kind = "other" // no endpoint: answered with an error
)

// route is a request path after the only place where it is parsed. Whatever a
// route holds is valid: no other code looks at the path again.
type route struct {
	kind       Kind
	registry   string        // as images name it: "docker.io", "reg.example.com:5000"
	repository string        // without the registry
	tag        string        // KindManifest by tag
	digest     digest.Digest // KindManifest by digest, KindBlob, KindReferrers
	// pathEncoded: the registry came from the path, as CRI-O and podman send
	// it. Such a client does not go on to upstream once it got a manifest, so
	// the proxy owes it every blob.
	pathEncoded bool
}

// maxName is the longest repository name that clients accept, in bytes.
const maxName = 255

var (
	repositoryRE = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagRE        = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
	// hostRE admits IP literals too: whether a host may be dialled is decided
	// where it is dialled, in package upstream.
	hostRE = regexp.MustCompile(`^(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?$`)
	// signatureTagRE matches the tag of an image's signatures in the scheme of cosign.
	signatureTagRE = regexp.MustCompile(`^sha256-[0-9a-f]{64}\.sig$`)
	hostPortRE     = regexp.MustCompile(`^(.*[a-zA-Z0-9])_([0-9]{1,5})$`)
)

// parseRoute reads the path and the ns parameter of a pull request. The
// registry is ns, else a first path segment that is a registry host, else
// defaultRegistry. Errors are *apiError.
func parseRoute(u *url.URL, defaultRegistry string) (route, error) {
	path, err := plainPath(u)
	if err != nil {
		return route{kind: KindOther}, err
	}
	rest, ok := strings.CutPrefix(path, "/v2")
	switch {
	case ok && (rest == "" || rest == "/"):
		return route{kind: KindPing}, nil
	case !ok || rest[0] != '/':
		return route{kind: KindOther}, &apiError{status: http.StatusNotFound, code: codeNameUnknown, message: "the pull API lives under /v2/"}
	}
	segments := strings.Split(rest[1:], "/")
	if len(segments) < 3 {
		return route{kind: KindOther}, errNoEndpoint
	}
	name := segments[:len(segments)-2]
	verb, ref := segments[len(segments)-2], segments[len(segments)-1]
	var rt route
	err = rt.setReference(verb, ref)
	if err == nil {
		err = rt.setName(name, u.Query()["ns"], defaultRegistry)
	}
	if err != nil {
		return route{kind: rt.kind}, err // nothing that is not valid
	}
	return rt, nil
}

var errNoEndpoint = &apiError{status: http.StatusNotFound, code: codeNameUnknown, message: "no such endpoint of the distribution API"}

// plainPath undoes the only escape that a valid path can need ("%3A" in a
// digest or a port) and refuses every other: an encoded slash or dot must not
// mean one thing here and another upstream.
func plainPath(u *url.URL) (string, error) {
	path := u.EscapedPath()
	if strings.Contains(path, "%") {
		path = strings.NewReplacer("%3A", ":", "%3a", ":").Replace(path)
	}
	if strings.Contains(path, "%") {
		return "", &apiError{status: http.StatusBadRequest, code: codeNameInvalid, message: "escaped characters in the path"}
	}
	return path, nil
}

func (rt *route) setReference(verb, ref string) error {
	switch {
	case verb == "manifests" && strings.Contains(ref, ":"):
		rt.kind = KindManifest
		return rt.setDigest(ref)
	case verb == "manifests":
		rt.kind, rt.tag = KindManifest, ref
		if !tagRE.MatchString(ref) {
			return &apiError{status: http.StatusNotFound, code: codeManifestUnknown, message: "not a valid tag"}
		}
		return nil
	case verb == "blobs":
		rt.kind = KindBlob
		return rt.setDigest(ref)
	case verb == "referrers":
		rt.kind = KindReferrers
		return rt.setDigest(ref)
	case verb == "tags" && ref == "list":
		rt.kind = KindTags
		return nil
	}
	rt.kind = KindOther
	return errNoEndpoint
}

func (rt *route) setDigest(ref string) error {
	d, err := digest.Parse(ref)
	if err != nil {
		return &apiError{status: http.StatusBadRequest, code: codeDigestInvalid, message: "not a valid digest"}
	}
	rt.digest = d
	return nil
}

func (rt *route) setName(name, ns []string, defaultRegistry string) error {
	switch {
	case len(ns) > 1:
		return &apiError{status: http.StatusBadRequest, code: codeNameInvalid, message: "more than one ns"}
	case len(ns) == 1 && ns[0] != "":
		rt.registry = ns[0]
	case len(name) > 1 && isRegistrySegment(name[0]):
		rt.registry, rt.pathEncoded = decodeRegistry(name[0]), true
		name = name[1:]
	case defaultRegistry != "":
		rt.registry = defaultRegistry
	default:
		return &apiError{status: http.StatusNotFound, code: codeNameUnknown, message: "the request names no registry: add ?ns=<registry>, put the registry first in the path, or set proxy.default_registry"}
	}
	rt.registry = upstream.CanonicalHost(rt.registry)
	rt.repository = strings.Join(name, "/")
	if len(rt.registry) > maxName || !validHost(rt.registry) {
		return &apiError{status: http.StatusBadRequest, code: codeNameInvalid, message: "not a valid registry host"}
	}
	if len(rt.repository) > maxName || !repositoryRE.MatchString(rt.repository) {
		return &apiError{status: http.StatusBadRequest, code: codeNameInvalid, message: "not a valid repository name"}
	}
	return nil
}

// isRegistrySegment tells a registry host from the first component of a
// repository, by the rule of image references plus the port form of
// decodeRegistry.
func isRegistrySegment(s string) bool {
	return strings.ContainsAny(s, ".:") || s == "localhost" || hostPortRE.MatchString(s)
}

// decodeRegistry turns reg.example.com_5000 into reg.example.com:5000: a colon
// inside a path makes an image reference unparsable, so mirrors for CRI-O are
// written with an underscore.
func decodeRegistry(s string) string {
	if m := hostPortRE.FindStringSubmatch(s); m != nil {
		return m[1] + ":" + m[2]
	}
	return s
}

func validHost(host string) bool {
	if !hostRE.MatchString(host) {
		return false
	}
	i := strings.LastIndex(host, ":")
	if i < 0 || strings.HasSuffix(host, "]") {
		return true
	}
	port, err := strconv.Atoi(host[i+1:])
	return err == nil && port > 0 && port < 1<<16
}

// reference is the tag or the digest, as upstream is asked for it.
func (rt *route) reference() string {
	if rt.tag != "" {
		return rt.tag
	}
	return rt.digest.String()
}

// content reports whether the route leads to a manifest or a blob.
func (rt *route) content() bool { return rt.kind == KindManifest || rt.kind == KindBlob }

// ofSignatures reports whether CRI-O or podman, set to use-sigstore-attachments, asks for
// an image's signatures. They ask wherever the image came from and nowhere else, read the
// layers alone, and take 404 for an image without signatures, which their policy may admit
// or not. Any other error fails the pull.
func (rt *route) ofSignatures() bool { return rt.pathEncoded && signatureTagRE.MatchString(rt.tag) }

package credentials

import (
	"cmp"
	"maps"
	"net"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
)

// hubNames are the hosts that credentials for Docker Hub are filed under; the
// usual key is https://index.docker.io/v1/.
var hubNames = []string{"index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"}

const (
	hubName = "docker.io"
	hubKey  = "https://index.docker.io/v1/"
)

// canonicalName spells the host of a host/repository in one way.
func canonicalName(name string) string {
	host, repository, found := strings.Cut(name, "/")
	host = strings.ToLower(host)
	if slices.Contains(hubNames, host) {
		host = hubName
	}
	if !found {
		return host
	}
	return host + "/" + repository
}

// canonicalKey does the same for a key of auths, which may have a scheme, and
// the path of an API, which kubelet and Docker ignore.
func canonicalKey(key string) string {
	for _, scheme := range []string{"https://", "http://"} {
		key = strings.TrimPrefix(key, scheme)
	}
	host, rest, _ := strings.Cut(key, "/")
	for _, api := range []string{"v1", "v2"} {
		if rest == api || strings.HasPrefix(rest, api+"/") {
			rest = strings.TrimPrefix(rest[len(api):], "/")
			break
		}
	}
	if rest == "" {
		return canonicalName(host)
	}
	return canonicalName(host + "/" + rest)
}

// matching lists the credentials whose key matches name. Keys are tried in
// reverse order, as in kubelet: a longer path before a shorter one, a host
// before a pattern for it. Several may be the same canonical key.
func matching(auths map[string]authn.AuthConfig, name string) []authn.AuthConfig {
	var out []authn.AuthConfig
	for _, key := range slices.SortedFunc(maps.Keys(auths), lastKeyFirst) {
		if matches(canonicalKey(key), name) {
			out = append(out, auths[key])
		}
	}
	return out
}

func lastKeyFirst(a, b string) int {
	return cmp.Or(cmp.Compare(canonicalKey(b), canonicalKey(a)), cmp.Compare(b, a))
}

// matches is kubelet's rule for matchImages and the keys of credentials
// (URLsMatch in pkg/credentialprovider/keyring.go, v1.36): as many labels in
// the host, each matched by a glob of its own; the same port, where none is a
// port too; and a path that begins the image's, also in the middle of a segment.
func matches(pattern, name string) bool {
	p, err := url.Parse("https://" + pattern)
	if err != nil {
		return false
	}
	n, err := url.Parse("https://" + name)
	if err != nil || !strings.HasPrefix(n.Path, p.Path) {
		return false
	}
	globs, port := splitHost(p.Host)
	labels, namePort := splitHost(n.Host)
	return port == namePort && slices.EqualFunc(globs, labels, func(glob, label string) bool {
		ok, err := path.Match(glob, label)
		return err == nil && ok
	})
}

func splitHost(hostport string) (labels []string, port string) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		host, port = hostport, ""
	}
	return strings.Split(host, "."), port
}

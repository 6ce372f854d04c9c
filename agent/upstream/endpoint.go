package upstream

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// address is where one entry of Registry.Upstreams points.
type address struct {
	scheme string // http or https
	host   string // host[:port], lower case
	base   string // path before the repository: "/v2/" or "/v2/proxy/"
	prefix string // what base adds to the repository, for token scopes: "" or "proxy/"
}

// parseEndpoint reads one entry of Registry.Upstreams.
func parseEndpoint(s string) (address, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "":
		return address{}, fmt.Errorf("%q is not a URL such as https://registry.example.com", redactURL(s))
	case u.Scheme != "http" && u.Scheme != "https":
		return address{}, fmt.Errorf("%q: scheme must be https, or http if you mean it", redactURL(s))
	case u.User != nil:
		return address{}, fmt.Errorf("%q: credentials do not belong into a URL; use credentials_file", redactURL(s))
	case u.RawQuery != "" || u.Fragment != "":
		return address{}, fmt.Errorf("%q: no query or fragment allowed", redactURL(s))
	}
	a := address{scheme: u.Scheme, host: strings.ToLower(u.Host)}
	if err := validHost(a.host); err != nil {
		return address{}, err
	}
	a.base, a.prefix, err = splitBase(u.Path)
	if err != nil {
		return address{}, fmt.Errorf("%q: %w", redactURL(s), err)
	}
	return a, nil
}

// splitBase turns a configured path into the path before the repository.
// Without a segment "v2" the path names a project: /proxy is /v2/proxy/. With
// one it is literal, which is how a runtime's own mirror settings name it:
// /proxy/v2 is /proxy/v2/, /v2/proxy is /v2/proxy/.
func splitBase(p string) (base, prefix string, err error) {
	p = strings.Trim(p, "/")
	var before []string
	segments := strings.Split(p, "/")
	for i, s := range segments {
		if s == "." || s == ".." || (s == "" && p != "") {
			return "", "", errors.New("the path has an empty or dot segment")
		}
		if s == "v2" {
			before, segments = segments[:i], segments[i+1:]
			break
		}
	}
	prefix = strings.Join(segments, "/")
	if prefix != "" {
		prefix += "/"
	}
	base = "/" + strings.Join(append(append([]string{}, before...), "v2"), "/") + "/" + prefix
	return base, prefix, nil
}

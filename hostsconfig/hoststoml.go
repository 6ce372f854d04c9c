package hostsconfig

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// hostFile is a hosts.toml as containerd reads it.
type hostFile struct {
	hostTable
	Server string               `toml:"server"`
	Hosts  map[string]hostTable `toml:"host"`
	// order is the file order of Hosts that have a header; the others, which
	// only containerd 1.x uses, are not in it.
	order []string
}

type hostTable struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   bool           `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
	Rewrite      any            `toml:"rewrite"` // k3s' and RKE2's containerd alone
}

// parseHosts reads a hosts.toml and fails on everything that makes containerd
// ignore the file.
func parseHosts(doc []byte) (*hostFile, error) {
	var f hostFile
	if err := toml.Unmarshal(doc, &f); err != nil {
		return nil, err
	}
	var err error
	if f.order, err = headerOrder(doc); err != nil {
		return nil, err
	}
	// Only what containerd reads can make it stumble: it decodes inline host
	// tables, but never looks inside.
	for _, name := range f.order {
		if name == "" {
			// containerd overlooks it in first place only, so ours before it
			// would change what it reads.
			return nil, fmt.Errorf("a host without a name")
		}
		if _, err := f.Hosts[name].endpoint(name, "/"); err != nil {
			return nil, fmt.Errorf("host %q: %w", redactURL(name), err)
		}
	}
	if _, err := f.endpoint(f.Server, "/"); err != nil {
		return nil, err
	}
	return &f, nil
}

// headerOrder lists the hosts of a hosts.toml as containerd 2.x sees them:
// those with a table header, in file order.
func headerOrder(doc []byte) ([]string, error) {
	exprs, err := outline(doc)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range exprs {
		if e.kind == unstable.Table && len(e.key) > 1 && e.key[0] == "host" && (len(out) == 0 || out[len(out)-1] != e.key[1]) {
			out = append(out, e.key[1])
		}
	}
	return out, nil
}

// endpoint converts a table the way containerd does. base is the directory
// that relative certificate paths start from.
func (t hostTable) endpoint(server, base string) (Endpoint, error) {
	e := Endpoint{}
	if err := t.setBase(&e, server); err != nil {
		return e, err
	}
	if err := t.setCapabilities(&e); err != nil {
		return e, err
	}
	var err error
	if e.CAFiles, err = caPaths(t.CA, base); err != nil {
		return e, err
	}
	if e.ClientPairs, err = clientPairs(t.Client, base); err != nil {
		return e, err
	}
	if e.Header, err = headers(t.Header); err != nil {
		return e, err
	}
	e.SkipVerify = t.SkipVerify
	t.setRewrite(&e)
	if t.DialTimeout != "" {
		if _, err := time.ParseDuration(t.DialTimeout); err != nil {
			return e, fmt.Errorf("dial_timeout: %w", err)
		}
	}
	return e, nil
}

func (t hostTable) setBase(e *Endpoint, server string) error {
	if server == "" {
		return nil
	}
	if !strings.HasPrefix(server, "http") {
		server = "https://" + server
	}
	u, err := url.Parse(server)
	if err != nil {
		return fmt.Errorf("unparsable URL")
	}
	if u.Path != "" {
		u.Path = path.Clean(u.Path)
	}
	if !strings.HasSuffix(u.Path, "/v2") && !t.OverridePath {
		u.Path += "/v2"
	}
	u.Path, u.RawPath, u.RawQuery, u.Fragment = strings.TrimSuffix(u.Path, "/"), "", "", ""
	if e.Base = u.String(); e.Base == hubSite+"/v2" {
		e.Base = "https://registry-1.docker.io/v2"
	}
	return nil
}

// hubSite redirects to Docker's web site, which answers a pull with 404 (docker/hub-feedback
// issue 1767). Who names it as a server, as is common, means Docker Hub.
const hubSite = "https://docker.io"

// everyName are the patterns of a rewrite that put a path before every name.
var everyName = []string{"^(.*)$", "^(.*)", "(.*)$", "(.*)", "^(.+)$", "^(.+)", "(.+)$", "(.+)"}

// rewritePrefix is a replacement that does so.
var rewritePrefix = regexp.MustCompile(`^/?([a-z0-9][a-z0-9._/-]*)/\$(?:1|\{1\})$`)

// setRewrite converts the names that the containerd of k3s and RKE2 asks a host for
// (rewrite in registries.yaml). Asked under the names that images have, Harbor
// answers with its own project "library" where its copy of Docker Hub is meant.
func (t hostTable) setRewrite(e *Endpoint) {
	rules, isTable := t.Rewrite.(map[string]any)
	if t.Rewrite == nil || isTable && len(rules) == 0 {
		return
	}
	for pattern, replacement := range rules {
		text, _ := replacement.(string)
		m := rewritePrefix.FindStringSubmatch(text)
		if len(rules) == 1 && m != nil && e.Base != "" && slices.Contains(everyName, pattern) {
			e.Base += "/" + m[1]
			return
		}
	}
	e.Renames = true
}

// setCapabilities: without any a host has all; of an unknown one containerd makes an
// error for the whole file. "referrers" is one before 2.2, which only doctor minds.
func (t hostTable) setCapabilities(e *Endpoint) error {
	if len(t.Capabilities) == 0 {
		e.Pull, e.Resolve = true, true
	}
	for _, c := range t.Capabilities {
		switch strings.ToLower(c) {
		case "pull":
			e.Pull = true
		case "resolve":
			e.Resolve = true
		case "push", "referrers":
		default:
			return fmt.Errorf("unknown capability %q", c)
		}
	}
	return nil
}

func caPaths(v any, base string) ([]string, error) {
	switch ca := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{absolute(ca, base)}, nil
	case []any:
		return absoluteAll(ca, base)
	}
	return nil, fmt.Errorf("ca: want a string or a list of strings")
}

func clientPairs(v any, base string) ([]ClientPair, error) {
	switch client := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []ClientPair{{Cert: absolute(client, base)}}, nil
	case []any:
		var out []ClientPair
		for _, item := range client {
			pair, err := clientPair(item, base)
			if err != nil {
				return nil, err
			}
			out = append(out, pair)
		}
		return out, nil
	}
	return nil, fmt.Errorf("client: want a string or a list")
}

func clientPair(v any, base string) (ClientPair, error) {
	switch p := v.(type) {
	case string:
		return ClientPair{Cert: absolute(p, base)}, nil
	case []any:
		files, err := absoluteAll(p, base)
		if err == nil && len(files) == 2 {
			return ClientPair{Cert: files[0], Key: files[1]}, nil
		}
	}
	return ClientPair{}, fmt.Errorf("client: want pairs of strings")
}

func headers(table map[string]any) (http.Header, error) {
	if table == nil {
		return nil, nil
	}
	out := http.Header{}
	for name, v := range table {
		switch v := v.(type) {
		case string:
			out.Add(name, v)
		case []any:
			for _, item := range v {
				s, ok := item.(string)
				if !ok {
					return nil, fmt.Errorf("header %q: want strings", name)
				}
				out.Add(name, s)
			}
		default:
			return nil, fmt.Errorf("header %q: want a string or a list of strings", name)
		}
	}
	return out, nil
}

func absolute(p, base string) string {
	if filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(base, p)
}

func absoluteAll(list []any, base string) ([]string, error) {
	out := make([]string, len(list))
	for i, v := range list {
		s, ok := v.(string)
		if !ok {
			return nil, fmt.Errorf("want a list of strings")
		}
		out[i] = absolute(s, base)
	}
	return out, nil
}

// endpoints lists what containerd 2.x would try for this file, in order,
// without ourselves.
func (f *hostFile) endpoints(base string, proxy netip.AddrPort) ([]Endpoint, error) {
	var out []Endpoint
	for _, name := range f.order {
		if isSelf(name, proxy) {
			continue
		}
		e, err := f.Hosts[name].endpoint(name, base)
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	source, err := f.endpoint(f.Server, base)
	if err != nil {
		return nil, err
	}
	if isSelf(f.Server, proxy) {
		return out, nil
	}
	source.Source = true
	if f.Server == "" {
		// containerd ignores root capabilities without a server.
		source.Pull, source.Resolve = true, true
	}
	return append(out, source), nil
}

// isSelf reports whether a host URL means our own proxy.
func isSelf(host string, proxy netip.AddrPort) bool {
	if !strings.Contains(host, "://") {
		host = "http://" + host
	}
	u, err := url.Parse(host)
	if err != nil || u.Port() != strconv.Itoa(int(proxy.Port())) {
		return false
	}
	return sameLoopback(u.Hostname(), proxy.Addr())
}

func sameLoopback(host string, addr netip.Addr) bool {
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip == addr || ip.IsLoopback() && addr.IsLoopback()
	}
	return host == "localhost" && addr.IsLoopback()
}

// redactURL drops user, query and fragment of a URL that a user wrote.
func redactURL(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return "(unparsable URL)"
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return u.String()
}

// hostOfDir returns the registry that a host directory is for.
func hostOfDir(name string) string {
	if rest, ok := strings.CutSuffix(name, "_"); ok {
		if i := strings.LastIndexByte(rest, '_'); i > 0 {
			if _, err := strconv.ParseUint(rest[i+1:], 10, 16); err == nil {
				return net.JoinHostPort(strings.Trim(rest[:i], "[]"), rest[i+1:])
			}
		}
	}
	return name
}

// dirSpellings lists the directory names containerd looks up for a registry,
// first to last, without _default.
func dirSpellings(host string) []string {
	if i := strings.LastIndexByte(host, ':'); i > 0 {
		return []string{host[:i] + "_" + host[i+1:] + "_", host}
	}
	return []string{host}
}

package upstream

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// Registry is one [[registry]] table of the configuration file. The zero
// value of each field means the default that its comment names.
type Registry struct {
	// Host is the registry as images name it: "docker.io", "reg.example.com:5000".
	Host string `toml:"host"`
	// Upstreams are the places to ask, in order; the last one has the last
	// word on what exists. Default: https on Host itself. A path is a prefix
	// of the repository (https://harbor/proxy asks for /v2/proxy/<repository>),
	// or, if it has a segment "v2", the literal path before the repository.
	Upstreams []string `toml:"upstreams"`
	// Auth is relay (default), node or anonymous.
	Auth string `toml:"auth"`
	// NodeRepositories are globs like Allow: the repositories that auth = "node"
	// is for. The others are relay. Default: all.
	NodeRepositories []string `toml:"node_repositories"`
	// CredentialsFile is a docker config.json, for auth = "node".
	CredentialsFile string `toml:"credentials_file"`
	// CAFile is a PEM bundle trusted in addition to the system's roots.
	CAFile         string `toml:"ca_file"`
	ClientCertFile string `toml:"client_cert_file"`
	ClientKeyFile  string `toml:"client_key_file"`
	SkipVerify     bool   `toml:"skip_verify"`
	// TLS is for those of Upstreams, by their entries there, to which the four
	// fields above do not apply. The file has no key for it: it is imported
	// from a runtime's own configuration, which says such things host by host.
	TLS map[string]TLS `toml:"-"`
	// TokenRealms are hosts (host or host:port) that may hand out this
	// registry's tokens although they share no registrable domain with it.
	TokenRealms []string `toml:"token_realms"`
	// TagTTL overrides upstream.tag_ttl; nil inherits it.
	TagTTL *Duration `toml:"tag_ttl"`
	// Offline is remembered, all or none; OfflineMode has its default.
	Offline string `toml:"offline"`
	// Allow and Deny are repository globs; Allow's default, nil, is everything.
	Allow []string `toml:"allow"`
	Deny  []string `toml:"deny"`
	// ContactUpstream = false never opens a connection; nil is true.
	ContactUpstream *bool `toml:"contact_upstream"`
	// MaxBytesPerSecond bounds this registry's downloads; 0 is no bound.
	MaxBytesPerSecond Bytes `toml:"max_bytes_per_second"`
	// MaxConnections bounds requests under way; 0 is 16.
	MaxConnections int `toml:"max_connections"`
}

// TLS is how one upstream is trusted, and how this node proves who it is. Names of
// files are as in Registry.
type TLS struct {
	CAFiles                       []string // all are trusted
	ClientCertFile, ClientKeyFile string
	SkipVerify                    bool
}

// tls is what holds for an entry of Upstreams.
func (r Registry) tls(entry string) TLS {
	if t, ok := r.TLS[entry]; ok {
		return t
	}
	t := TLS{ClientCertFile: r.ClientCertFile, ClientKeyFile: r.ClientKeyFile, SkipVerify: r.SkipVerify}
	if r.CAFile != "" {
		t.CAFiles = []string{r.CAFile}
	}
	return t
}

const defaultMaxConnections = 16

// Contact says whether upstream may be asked at all.
func (r Registry) Contact() bool { return r.ContactUpstream == nil || *r.ContactUpstream }

// What Registry.Offline can be: who may have what is not public while the registry
// cannot be asked.
const (
	OfflineRemembered = "remembered" // whom it let read before
	OfflineAll        = "all"
	OfflineNone       = "none"
)

// OfflineMode is Offline, or its default: remembered, and all where ContactUpstream is
// false, since such a registry can never be asked.
func (r Registry) OfflineMode() string {
	switch {
	case r.Offline != "":
		return r.Offline
	case !r.Contact():
		return OfflineAll
	}
	return OfflineRemembered
}

// TTL is how long a tag's digest stays good: the table's own tag_ttl, or def.
func (r Registry) TTL(def time.Duration) time.Duration {
	if r.TagTTL == nil {
		return def
	}
	return time.Duration(*r.TagTTL)
}

// Allows says whether repository matches Allow and does not match Deny. In a
// glob, * stands for anything inside one path segment and ** for any number
// of segments.
func (r Registry) Allows(repository string) bool {
	if matchAny(r.Deny, repository) {
		return false
	}
	return len(r.Allow) == 0 || matchAny(r.Allow, repository)
}

// NodeAuth says whether the node's own credential is for repository, which
// every caller on the node may then read. If it is not, and auth is not
// anonymous, callers bring their own.
func (r Registry) NodeAuth(repository string) bool {
	return r.Auth == "node" && (len(r.NodeRepositories) == 0 || matchAny(r.NodeRepositories, repository))
}

func matchAny(globs []string, repository string) bool {
	segments := strings.Split(repository, "/")
	return slices.ContainsFunc(globs, func(g string) bool { return matchSegments(strings.Split(g, "/"), segments) })
}

// matchSegments is the usual two-finger glob match over path segments:
// linear in memory and at worst quadratic in time, whatever the pattern.
func matchSegments(glob, name []string) bool {
	g, n, star, mark := 0, 0, -1, 0
	for n < len(name) {
		switch {
		case g < len(glob) && glob[g] == "**":
			star, mark = g, n
			g++
		case g < len(glob) && matchSegment(glob[g], name[n]):
			g, n = g+1, n+1
		case star >= 0:
			mark++
			g, n = star+1, mark
		default:
			return false
		}
	}
	for g < len(glob) && glob[g] == "**" {
		g++
	}
	return g == len(glob)
}

func matchSegment(glob, segment string) bool {
	ok, err := path.Match(glob, segment)
	return err == nil && ok
}

// Validate returns every problem of the table, joined.
func (r Registry) Validate() error {
	var problems []error
	for _, err := range slices.Concat(r.checkAddresses(), r.checkAccess(), r.checkLimits()) {
		problems = append(problems, fmt.Errorf("registry %q: %w", r.Host, err))
	}
	return errors.Join(problems...)
}

// checkAddresses checks which hosts are asked, and that the client
// certificate is complete.
func (r Registry) checkAddresses() (problems []error) {
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if err := validHost(r.Host); err != nil {
		bad("host: %w", err)
	}
	for _, u := range r.Upstreams {
		if _, err := parseEndpoint(u); err != nil {
			bad("upstreams: %w", err)
		}
	}
	for _, realm := range r.TokenRealms {
		if err := validHost(realm); err != nil {
			bad("token_realms: %w", err)
		}
	}
	if (r.ClientCertFile == "") != (r.ClientKeyFile == "") {
		bad("client_cert_file and client_key_file go together; set both or none")
	}
	return problems
}

// checkAccess checks who may read what.
func (r Registry) checkAccess() (problems []error) {
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if !slices.Contains([]string{"", "relay", "node", "anonymous"}, r.Auth) {
		bad("auth = %q: want relay, node or anonymous", r.Auth)
	}
	if !slices.Contains([]string{"", OfflineRemembered, OfflineAll, OfflineNone}, r.Offline) {
		bad("offline = %q: want remembered, all or none", r.Offline)
	}
	for _, list := range []struct {
		key   string
		globs []string
	}{{"allow", r.Allow}, {"deny", r.Deny}, {"node_repositories", r.NodeRepositories}} {
		for _, g := range list.globs {
			if err := validGlob(g); err != nil {
				bad("%s: %q: %w", list.key, g, err)
			}
		}
	}
	if r.Allow != nil && len(r.Allow) == 0 { // means all to a program, and none to its author
		bad(`allow names no repository: leave it out for all, or write deny = ["**"] for none`)
	}
	if len(r.NodeRepositories) > 0 && r.Auth != "node" {
		bad(`node_repositories has no effect without auth = "node"`)
	}
	if r.CredentialsFile != "" && r.Auth != "node" {
		bad(`credentials_file has no effect without auth = "node"`)
	}
	return problems
}

func (r Registry) checkLimits() (problems []error) {
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if r.MaxConnections < 0 {
		bad("max_connections = %d: want 0 (default) or more", r.MaxConnections)
	}
	if r.MaxBytesPerSecond < 0 {
		bad("max_bytes_per_second = %d: want 0 (no limit) or more", r.MaxBytesPerSecond)
	}
	switch ttl := r.TTL(0); {
	case ttl < 0:
		bad("tag_ttl = %q: want 0 (always ask) or more", ttl)
	case ttl > 0 && ttl < time.Millisecond: // a bare TOML integer is read as nanoseconds, which nobody means
		bad("tag_ttl = %d: write a duration with its unit, such as 10s", int64(*r.TagTTL))
	}
	return problems
}

func validGlob(g string) error {
	if g == "" {
		return errors.New("empty pattern")
	}
	for _, segment := range strings.Split(g, "/") {
		if segment == "" {
			return errors.New("empty path segment")
		}
		if segment != "**" && strings.Contains(segment, "**") {
			return errors.New("** must be a whole path segment")
		}
		if _, err := path.Match(segment, ""); err != nil {
			return err
		}
	}
	return nil
}

// validHost accepts host or host:port as an image name would carry it.
func validHost(host string) error {
	if host == "" {
		return errors.New("empty; write it as images name it, such as docker.io")
	}
	if strings.Contains(host, "*") {
		return fmt.Errorf("%q is a pattern, which no host matches here; write each host by its name", host)
	}
	u, err := url.Parse("//" + host)
	if err != nil || u.Host != host || u.Hostname() == "" {
		return fmt.Errorf("%q is not host or host:port", host)
	}
	if _, port, ok := strings.Cut(host[strings.LastIndex(host, "]")+1:], ":"); ok {
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
			return fmt.Errorf("%q has no valid port", host)
		}
	}
	return nil
}

// Duration is a time.Duration that configuration files write as "10s".
type Duration time.Duration

// UnmarshalText reads Go's duration format; a bare 0 is fine.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as 10s or 5m", text)
	}
	*d = Duration(v)
	return nil
}

// Bytes is a number of bytes that configuration files write as 1048576 or
// "1MiB" (K, M, G, T with i for powers of 1,024 and without for 1,000).
type Bytes int64

// UnmarshalText reads a number with an optional unit: 1048576, 10MiB, 1.5G.
func (b *Bytes) UnmarshalText(text []byte) error {
	n, err := humanize.ParseBytes(strings.TrimSpace(string(text)))
	if err != nil || n > math.MaxInt64 || bytes.ContainsRune(text, ',') { // which stands for thousands there
		return fmt.Errorf("%q is not a size such as 1048576 or 10MiB", text)
	}
	*b = Bytes(n)
	return nil
}

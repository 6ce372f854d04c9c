package agent

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/credentials"
	"github.com/larder-cache/larder/agent/upstream"
)

// Validate reports everything that is wrong with c, as joined [Problem]s.
func (c Config) Validate() error {
	var errs []error
	for _, p := range c.problems(nil) {
		errs = append(errs, p)
	}
	return errors.Join(errs...)
}

// problems checks c; from says where each value came from.
func (c Config) problems(from map[string]string) []*Problem {
	v := validator{from: from}
	v.logs(c.Log)
	v.proxy(c.Proxy)
	v.cache(c.Cache)
	v.upstream(c.Upstream)
	v.node(c.Node)
	v.peer(c.Peer)
	v.hosts(c.Hosts)
	v.absolute("runtime.containerd_socket", c.Runtime.ContainerdSocket)
	v.absolute("runtime.content_dir", c.Runtime.ContentDir)
	if c.Runtime.ContainerdSocket != "" && c.Runtime.ContentDir == "" {
		v.bad("runtime.containerd_socket", c.Runtime.ContainerdSocket, "is of no use without runtime.content_dir (/var/lib/containerd/io.containerd.content.v1.content): content is read from there")
	}
	v.admin(c.Admin)
	if c.Metrics.Listen != "" {
		v.listen("metrics.listen", c.Metrics.Listen)
	}
	v.clashes(c)
	v.registries(c)
	return v.found
}

type validator struct {
	from  map[string]string
	found []*Problem
}

func (v *validator) bad(key, value, reason string, args ...any) {
	v.found = append(v.found, &Problem{Key: key, Value: value, From: v.from[key], Reason: fmt.Sprintf(reason, args...)})
}

func (v *validator) oneOf(key, value string, choices ...string) {
	if !slices.Contains(choices, value) {
		v.bad(key, value, "want one of %s", strings.Join(choices, ", "))
	}
}

func (v *validator) notNegative(key string, d time.Duration) {
	if d < 0 {
		v.bad(key, d.String(), "want 0 or more")
	}
}

// within checks bounds that only a typo exceeds.
func (v *validator) within(key string, n, low, high int) {
	if n < low || n > high {
		v.bad(key, strconv.Itoa(n), "want %d to %d", low, high)
	}
}

func (v *validator) absolute(key, path string) {
	if path != "" && !filepath.IsAbs(path) {
		v.bad(key, path, "want an absolute path")
	}
}

// readable checks a file that must be there at the start, and reports whether one is named
// and can be read.
func (v *validator) readable(key, path string) bool {
	if path == "" {
		return false
	}
	f, err := os.Open(path)
	if err != nil {
		v.bad(key, path, "cannot be read: %v", errors.Unwrap(err))
		return false
	}
	f.Close()
	return true
}

func (v *validator) logs(c LogConfig) {
	v.oneOf("log.level", c.Level, "debug", "info", "warn", "error")
	v.oneOf("log.format", c.Format, "text", "json")
}

// maxFirstByteBudget is what containerd 2.3 gives a mirror for headers.
const maxFirstByteBudget = 30 * time.Second

func (v *validator) proxy(c ProxyConfig) {
	if c.AllowRemote {
		v.listen("proxy.listen", c.Listen)
	} else {
		v.loopback("proxy.listen", c.Listen, "use 127.0.0.1:5050, or set proxy.allow_remote = true if every machine that reaches it may pull what this node may pull")
	}
	if c.FirstByteBudget <= 0 || c.FirstByteBudget > maxFirstByteBudget {
		v.bad("proxy.first_byte_budget", c.FirstByteBudget.String(), "want more than 0 and at most %s: runtimes give up on a mirror that is slower", maxFirstByteBudget)
	}
	v.notNegative("proxy.drain_timeout", c.DrainTimeout)
	if c.DefaultRegistry != "" && !isRegistry(c.DefaultRegistry) {
		v.bad("proxy.default_registry", c.DefaultRegistry, "want a registry as images name it: host or host:port")
	}
}

func (v *validator) admin(c AdminConfig) {
	v.loopback("admin.listen", c.Listen, "use 127.0.0.1:5053; for metrics and probes off the node there is metrics.listen")
}

func (v *validator) cache(c CacheConfig) {
	if c.Dir == "" {
		v.bad("cache.dir", "", "must name a directory, such as /var/lib/larder")
	}
	if strings.HasPrefix(c.MinFree.String(), "100%") {
		v.bad("cache.min_free", c.MinFree.String(), "would leave no room for a single blob; use 20%%")
	}
	v.notNegative("cache.scrub_interval", c.ScrubInterval)
	if c.Replicas < 1 || c.Replicas > maxReplicas {
		v.bad("cache.replicas", strconv.Itoa(c.Replicas), "want 1 (no copies) to %d", maxReplicas)
	}
	v.pins(c.Pins)
}

// maxReplicas is below the number of holders that are told of in the index.
const maxReplicas = 8

func (v *validator) pins(names []string) {
	if len(names) > cache.MaxPins {
		v.bad("cache.pins", strconv.Itoa(len(names))+" images", "want at most %d", cache.MaxPins)
	}
	seen := map[string]bool{}
	for _, name := range names {
		image, err := ParseImage(name)
		switch {
		case err != nil:
			v.bad("cache.pins", name, "want an image as pods name it, such as registry.k8s.io/pause:3.10")
		case seen[image.String()]:
			v.bad("cache.pins", name, "is listed twice")
		}
		seen[image.String()] = true
	}
}

func (v *validator) upstream(c UpstreamConfig) {
	v.notNegative("upstream.tag_ttl", c.TagTTL)
	v.within("upstream.streams_per_blob", c.StreamsPerBlob, 1, 32)
}

// Keys of NodeConfig, as messages name them.
const (
	providerConfigKey = "node.image_credential_provider_config"
	providerBinDirKey = "node.image_credential_provider_bin_dir"
)

// node checks kubelet's plugins as kubelet does: all of them, at the start.
func (v *validator) node(c NodeConfig) {
	switch {
	case c.ImageCredentialProviderConfig == "" && c.ImageCredentialProviderBinDir == "":
		return
	case c.ImageCredentialProviderConfig == "":
		v.bad(providerBinDirKey, c.ImageCredentialProviderBinDir, "is of no use without %s", providerConfigKey)
		return
	case c.ImageCredentialProviderBinDir == "":
		v.bad(providerConfigKey, c.ImageCredentialProviderConfig, "is of no use without %s", providerBinDirKey)
		return
	}
	k, err := credentials.New(c.options())
	for _, err := range unjoin(err) {
		v.bad(providerConfigKey, c.ImageCredentialProviderConfig, "%v", err)
	}
	if err == nil {
		k.Close()
	}
}

// hostPort is a listen address taken apart.
type hostPort struct {
	host string
	addr netip.Addr // zero for every address
	port int
}

// parseListen takes "address:port" or ":port" apart; port 0 is one that the system chooses.
func parseListen(s string) (hostPort, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return hostPort{}, errors.New("want an address and a port, such as 127.0.0.1:5050")
	}
	n, err := strconv.Atoi(port)
	if err != nil || n < 0 || n > 65535 {
		return hostPort{}, errors.New("want a port from 0 to 65535")
	}
	if host == "" {
		return hostPort{port: n}, nil
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return hostPort{}, errors.New("want an IP address and not a name: localhost is ::1 to some programs and 127.0.0.1 to others")
	}
	if addr.IsUnspecified() {
		addr = netip.Addr{}
	}
	return hostPort{host: host, addr: addr, port: n}, nil
}

func (v *validator) listen(key, s string) (hostPort, bool) {
	hp, err := parseListen(s)
	if err != nil {
		v.bad(key, s, "%v", err)
	}
	return hp, err == nil
}

func (v *validator) loopback(key, s, advice string) {
	if hp, ok := v.listen(key, s); ok && !hp.addr.IsLoopback() {
		v.bad(key, s, "is reachable from other machines; %s", advice)
	}
}

// peerName is what package peer and logs can carry; Kubernetes node names of
// up to 200 characters fit.
var peerName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,198}[A-Za-z0-9])?$`)

// maxZone is the longest value of a node's label, which zones are named by.
const maxZone = 63

func (v *validator) peer(c PeerConfig) {
	if !c.Enabled {
		return
	}
	if c.Name != "" && !peerName.MatchString(c.Name) {
		v.bad("peer.name", c.Name, "want letters, digits, dots and dashes, at most 200")
	}
	v.oneOf("peer.upstream_scope", c.UpstreamScope, "cluster", "zone")
	v.within("peer.max_uploads", c.MaxUploads, 1, 1<<16)
	if len(c.Zone) > maxZone || strings.ContainsFunc(c.Zone, func(r rune) bool { return r <= ' ' || r > '~' }) {
		v.bad("peer.zone", c.Zone, "want at most %d printable ASCII characters", maxZone)
	}
	if c.KeyFile != "" {
		if _, err := readKeys(c.KeyFile); err != nil {
			v.bad("peer.key_file", c.KeyFile, "%v", err)
		}
	}
	v.peerAddresses(c)
}

func (v *validator) peerAddresses(c PeerConfig) {
	gossip, ok := v.listen("peer.gossip", c.Gossip)
	data, alsoOK := v.listen("peer.data", c.Data)
	if c.Advertise != "" {
		if addr, err := netip.ParseAddr(c.Advertise); err != nil || addr.IsUnspecified() {
			v.bad("peer.advertise", c.Advertise, "want the IP address at which other nodes reach this one")
		}
	}
	if c.Advertise == "" && gossip.addr.IsValid() && data.addr.IsValid() && gossip.addr != data.addr {
		v.bad("peer.data", c.Data, "other nodes look for it at %s, the address of peer.gossip; name that one, or none, or set peer.advertise", gossip.host)
	}
	for i, j := range c.Join {
		if slices.Index(c.Join, j) < i {
			v.bad("peer.join", j, "is listed twice")
		}
		_, port, err := net.SplitHostPort(j)
		if n, wrong := strconv.ParseUint(port, 10, 16); strings.ContainsAny(j, "/ ") || err == nil && (wrong != nil || n == 0) {
			v.bad("peer.join", j, "want host:port, an IP address or a DNS name")
		}
	}
	if ok && alsoOK && c.KeyFile == "" && !c.Alone() && !onLoopback(c, gossip, data) {
		v.bad("peer.key_file", "", "required, because peers are not all on loopback: write one key with `larder keygen` to a file on every node, or set peer.enabled = false")
	}
}

// onLoopback says that neither the listeners nor the nodes to join are
// reachable from, or on, other machines.
func onLoopback(c PeerConfig, listeners ...hostPort) bool {
	for _, l := range listeners {
		if !l.addr.IsLoopback() {
			return false
		}
	}
	for _, j := range append([]string{c.Advertise}, c.Join...) {
		host, _, err := net.SplitHostPort(j)
		if err != nil {
			host = j
		}
		addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
		if j != "" && (err != nil || !addr.IsLoopback()) {
			return false
		}
	}
	return true
}

func (v *validator) hosts(c HostsConfig) {
	v.absolute("hosts.containerd", c.Containerd)
	v.absolute("hosts.crio", c.CRIO)
	if strings.Contains(c.Containerd, ":") {
		v.bad("hosts.containerd", c.Containerd, "name one directory, the first of containerd's config_path")
	}
	if c.Containerd != "" && c.Containerd == c.CRIO {
		v.bad("hosts.crio", c.CRIO, "is also hosts.containerd; the two runtimes read different directories")
	}
	if len(c.Registries) == 0 && (c.Containerd != "" || c.CRIO != "") {
		v.bad("hosts.registries", "", `names no registry; use ["*"] for all`)
	}
	for i, r := range c.Registries {
		switch {
		case r != "*" && !isRegistry(r):
			v.bad("hosts.registries", r, `want a registry as images name it (docker.io, reg.example.com:5000) or "*"`)
		case r == "index.docker.io": // runtimes read no image's name so
			v.bad("hosts.registries", r, "runtimes take this for docker.io; list that")
		}
		if slices.Index(c.Registries, r) < i {
			v.bad("hosts.registries", r, "is listed twice")
		}
	}
}

// registryName is host or host:port; brackets for IPv6 are left to registries
// that are configured.
var registryName = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*(:[0-9]{1,5})?$`)

func isRegistry(s string) bool {
	host, port, err := net.SplitHostPort(s)
	if err == nil && strings.HasPrefix(s, "[") {
		_, err := netip.ParseAddr(host)
		return err == nil && port != ""
	}
	return registryName.MatchString(s)
}

// clashes finds listeners that cannot both be opened.
func (v *validator) clashes(c Config) {
	listeners := []struct{ key, value string }{
		{"proxy.listen", c.Proxy.Listen}, {"admin.listen", c.Admin.Listen}, {"metrics.listen", c.Metrics.Listen},
	}
	if c.Peer.Enabled {
		listeners = append(listeners, []struct{ key, value string }{{"peer.gossip", c.Peer.Gossip}, {"peer.data", c.Peer.Data}}...)
	}
	for i, a := range listeners {
		for _, b := range listeners[:i] {
			if overlap(a.value, b.value) {
				v.bad(a.key, a.value, "%s has the same port; give each its own", b.key)
			}
		}
	}
}

func overlap(a, b string) bool {
	x, errA := parseListen(a)
	y, errB := parseListen(b)
	if errA != nil || errB != nil || x.port == 0 || x.port != y.port {
		return false
	}
	return x.addr == y.addr || !x.addr.IsValid() || !y.addr.IsValid()
}

func (v *validator) registries(c Config) {
	seen := map[string]bool{}
	for i, r := range c.Registries {
		table := fmt.Sprintf("%s[%d]", registryTable, i)
		for _, err := range unjoin(r.Validate()) {
			v.bad(table, "", "%v", err)
		}
		host := upstream.CanonicalHost(r.Host)
		if seen[host] && host != "" {
			v.bad(table+".host", r.Host, "has a [[registry]] table already; merge the two")
		}
		seen[host] = true
		v.credentials(table, r, c.Node)
		v.certificates(table, r)
	}
}

// certificates checks the files that a registry's connections are made with. Those of a
// running agent may be wrong for a moment, while they are rotated; then the former hold.
func (v *validator) certificates(table string, r upstream.Registry) {
	if v.readable(table+".ca_file", r.CAFile) {
		if pem, err := os.ReadFile(r.CAFile); err != nil || !x509.NewCertPool().AppendCertsFromPEM(pem) {
			v.bad(table+".ca_file", r.CAFile, "holds no certificate; want one or more in PEM")
		}
	}
	cert, key := v.readable(table+".client_cert_file", r.ClientCertFile), v.readable(table+".client_key_file", r.ClientKeyFile)
	if cert && key {
		if _, err := tls.LoadX509KeyPair(r.ClientCertFile, r.ClientKeyFile); err != nil {
			v.bad(table+".client_cert_file", r.ClientCertFile, "is of no use with client_key_file: %v", err)
		}
	}
}

// credentials checks where a registry's node credentials come from.
func (v *validator) credentials(table string, r upstream.Registry, c NodeConfig) {
	if r.CredentialsFile != "" {
		if err := credentials.CheckFile(r.CredentialsFile); err != nil {
			v.bad(table+".credentials_file", r.CredentialsFile, "%v", err)
		}
	} else if r.Auth == "node" && c.ImageCredentialProviderConfig == "" {
		v.bad(table+".auth", r.Auth, "names no credentials: set credentials_file, or %s", providerConfigKey)
	}
}

// unjoin takes a joined error apart.
func unjoin(err error) []error {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}

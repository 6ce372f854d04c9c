package upstream

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/http/httpproxy"
	"golang.org/x/net/publicsuffix"
)

// reach orders addresses by how far inside they lie. A redirect or token
// service may not lie further inside than the registry that named it.
type reach int32

const (
	reachPublic   reach = iota
	reachPrivate        // RFC 1918, unique local, carrier-grade NAT
	reachLoopback       // this node
	reachNever          // link-local, metadata services, multicast, reserved
)

func (r reach) String() string {
	return [...]string{"public", "private", "loopback", "reserved or link-local"}[r]
}

var neverPrefixes = prefixes(
	"0.0.0.0/8", "169.254.0.0/16", "192.0.0.0/24", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
	"::/128", "fe80::/10", "fec0::/10", "ff00::/8", "64:ff9b:1::/48",
	"168.63.129.16/32",   // Azure's wire server, a public address with metadata behind it
	"100.100.100.200/32", // Alibaba's metadata service
	"fd00:ec2::/32",      // AWS's metadata service over IPv6
)

var privatePrefixes = prefixes("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")

func prefixes(list ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(list))
	for i, s := range list {
		out[i] = netip.MustParsePrefix(s)
	}
	return out
}

var (
	nat64   = netip.MustParsePrefix("64:ff9b::/96")
	sixTo4  = netip.MustParsePrefix("2002::/16")
	compat4 = netip.MustParsePrefix("::/96")
)

// reachOf classifies an address, including an IPv4 one embedded in IPv6.
func reachOf(a netip.Addr) reach {
	a = a.WithZone("").Unmap()
	b := a.As16()
	switch {
	case a.IsLoopback():
		return reachLoopback
	case within(a, neverPrefixes):
		return reachNever
	case within(a, privatePrefixes):
		return reachPrivate
	case a.Is6() && (nat64.Contains(a) || compat4.Contains(a)):
		return reachOf(netip.AddrFrom4([4]byte(b[12:16])))
	case a.Is6() && sixTo4.Contains(a):
		return reachOf(netip.AddrFrom4([4]byte(b[2:6])))
	}
	return reachPublic
}

func within(a netip.Addr, list []netip.Prefix) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// literal says whether host is an IP address in any spelling that some
// resolver understands (127.1, 0x7f000001, 2130706433): by the URL standard,
// every name whose last label is a number.
func literal(host string) bool {
	host, _, _ = strings.Cut(host, "%")
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	host = strings.TrimSuffix(host, ".")
	last := host[strings.LastIndexByte(host, '.')+1:]
	if hex, ok := strings.CutPrefix(strings.ToLower(last), "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return last != "" && strings.Trim(last, "0123456789") == ""
}

// insideName says whether resolvers keep a name inside. Such names are
// refused as names because behind a forward proxy nothing else is known.
func insideName(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if !strings.Contains(host, ".") {
		return true // localhost, metadata, a service of the pod's own namespace
	}
	suffixes := []string{".localhost", ".localdomain", ".local", ".internal"}
	return slices.ContainsFunc(suffixes, func(suffix string) bool { return strings.HasSuffix(host, suffix) })
}

// ruling is what one of an endpoint's two transports may connect to.
type ruling struct {
	ep *endpoint
	// foreign: redirects and token services rather than the endpoint itself.
	foreign bool
}

// checkURL is the half of the check that works without DNS, and thus behind
// a forward proxy too.
func (r ruling) checkURL(u *url.URL) error {
	host := u.Hostname()
	if r.trusted(host) {
		return nil
	}
	switch {
	case host == "":
		return fmt.Errorf("%w: no host", ErrRefused)
	case r.ep.c.proxies[dialAddress(u)]:
		return fmt.Errorf("%w: %s is the forward proxy", ErrRefused, u.Host)
	case literal(host):
		return r.checkLiteral(host)
	case insideName(host) && r.limit() == reachPublic:
		return r.refuse(host, "an internal name")
	}
	return nil
}

func (r ruling) checkLiteral(host string) error {
	addr, err := netip.ParseAddr(host)
	if err != nil || !r.ep.reg.configured {
		return r.refuse(host, "an IP address")
	}
	return r.checkAddr(host, addr)
}

// checkAddr is the other half: the address a name turned out to have, seen
// after DNS and before the first packet, so that rebinding a name gains nothing.
func (r ruling) checkAddr(host string, addr netip.Addr) error {
	at := reachOf(addr)
	if r.trusted(host) {
		if !r.foreign {
			r.ep.reach.Store(int32(at))
		}
		return nil
	}
	if at == reachNever || at > r.limit() {
		return r.refuse(host, "at a "+at.String()+" address")
	}
	return nil
}

func (r ruling) limit() reach {
	if !r.ep.reg.configured {
		return reachPublic
	}
	return min(reach(r.ep.reach.Load()), reachLoopback)
}

// trusted hosts are those an operator wrote into this registry's table.
func (r ruling) trusted(host string) bool {
	if !r.ep.reg.configured {
		return false
	}
	if !r.foreign || strings.EqualFold(host, r.ep.hostname()) {
		return true
	}
	own := func(e *endpoint) bool { return strings.EqualFold(host, e.hostname()) }
	return slices.ContainsFunc(r.ep.reg.endpoints, own) || r.ep.reg.realmListed(host, "")
}

func (r ruling) refuse(host, what string) error {
	host = clip(host, maxShownHost)
	if r.foreign {
		return fmt.Errorf("%w: %s sends us to %s, %s; list that host in token_realms of registry %q if this is right",
			ErrRefused, r.ep.addr.host, host, what, r.ep.reg.Host)
	}
	return fmt.Errorf("%w: %s is %s; add a [[registry]] table with this host if this is right", ErrRefused, host, what)
}

// maxShownHost is as long as a name can be in DNS. A redirect may give a longer one.
const maxShownHost = 253

// dialTimeout bounds one TCP connect; a dead address must not eat the time
// that a second upstream needs.
const dialTimeout = 5 * time.Second

// dial connects with the check in the dialer's Control.
func (r ruling) dial(base net.Dialer) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		d := base
		d.Timeout = dialTimeout
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		d.ControlContext = func(_ context.Context, _, resolved string, c syscall.RawConn) error {
			setOptions(c)
			if r.ep.c.proxies[address] {
				return nil
			}
			ap, err := netip.ParseAddrPort(resolved)
			if err != nil {
				return fmt.Errorf("%w: %w", ErrRefused, err)
			}
			return r.checkAddr(host, ap.Addr())
		}
		done := func(error, time.Time) {}
		if !r.foreign {
			done = r.ep.dials.begin(time.Now())
		}
		conn, err := d.DialContext(ctx, network, address)
		done(err, time.Now())
		return conn, err
	}
}

// proxyAddresses are the forward proxies that the environment names.
func proxyAddresses(cfg *httpproxy.Config) map[string]bool {
	set := map[string]bool{}
	for _, s := range []string{cfg.HTTPProxy, cfg.HTTPSProxy} {
		if s == "" {
			continue
		}
		u, err := url.Parse(s)
		if err != nil || u.Host == "" {
			u, err = url.Parse("http://" + s)
		}
		if err == nil {
			set[dialAddress(u)] = true
		}
	}
	return set
}

// dialAddress is host:port as net/http would dial it.
func dialAddress(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// checkRealm decides whether a token service may see this endpoint's
// credentials: the registry's own host or domain, or one that the operator listed.
func (ep *endpoint) checkRealm(u *url.URL) error {
	host := u.Hostname()
	listed := ep.reg.realmListed(host, u.Port())
	switch {
	case host == "" || (u.Scheme != "https" && u.Scheme != "http"):
		return fmt.Errorf("%w: token realm %q is no http(s) URL", ErrRefused, clip(redactURL(u.String()), 128))
	case u.Scheme == "http" && ep.addr.scheme == "https":
		return fmt.Errorf("%w: token realm %s would send credentials in clear", ErrRefused, clip(u.Host, maxShownHost))
	case listed || strings.EqualFold(host, ep.hostname()) || sameSite(host, ep.hostname()) || sameOwner(host, ep.hostname()):
		return nil
	case loopback(host) && loopback(ep.hostname()):
		return nil // two names of this machine
	}
	return fmt.Errorf("%w: token realm %s is not of %s; add it to token_realms of registry %q if this is right",
		ErrRefused, clip(u.Host, maxShownHost), ep.hostname(), ep.reg.Host)
}

// sameOwner says whether the registry's operator is known to have its token service
// under another registrable domain. So far that is Scaleway alone
// (apple/container#2268).
func sameOwner(realm, registry string) bool {
	return strings.EqualFold(realm, "api.scaleway.com") && scalewayRE.MatchString(registry)
}

// Other names below scw.cloud are those of Scaleway's customers.
var scalewayRE = regexp.MustCompile(`^rg\.[a-z0-9-]+\.scw\.cloud$`)

// realmListed says whether token_realms has host, with any port or this one.
func (r *registry) realmListed(host, port string) bool {
	return slices.ContainsFunc(r.TokenRealms, func(realm string) bool {
		return strings.EqualFold(realm, host) || (port != "" && strings.EqualFold(realm, net.JoinHostPort(host, port)))
	})
}

func loopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && addr.Unmap().IsLoopback()
}

// sameSite says whether two names share a registrable domain.
func sameSite(a, b string) bool {
	if literal(a) || literal(b) {
		return strings.EqualFold(a, b)
	}
	sa, errA := publicsuffix.EffectiveTLDPlusOne(strings.ToLower(a))
	sb, errB := publicsuffix.EffectiveTLDPlusOne(strings.ToLower(b))
	return errA == nil && errB == nil && sa == sb
}

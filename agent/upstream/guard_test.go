package upstream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/net/http/httpproxy"

	"github.com/larder-cache/larder/test/logtest"
	"github.com/larder-cache/larder/test/registrytest"
)

func TestReach(t *testing.T) {
	for in, want := range map[string]reach{
		"8.8.8.8": reachPublic, "2606:4700::1111": reachPublic, "100.63.0.1": reachPublic, "172.32.0.1": reachPublic,
		"10.1.2.3": reachPrivate, "172.16.0.1": reachPrivate, "192.168.1.1": reachPrivate, "100.64.0.1": reachPrivate, "fd12::1": reachPrivate,
		"127.0.0.1": reachLoopback, "127.9.9.9": reachLoopback, "::1": reachLoopback, "::ffff:127.0.0.1": reachLoopback,
		"::ffff:10.0.0.1": reachPrivate, "64:ff9b::a00:1": reachPrivate, "64:ff9b::7f00:1": reachLoopback, "2002:a00:1::": reachPrivate,
		"2002:a9fe:a9fe::1": reachNever, "64:ff9b::a9fe:a9fe": reachNever, "::7f00:1": reachLoopback,
		"169.254.169.254": reachNever, "fe80::1": reachNever, "fe80::1%eth0": reachNever, "0.0.0.0": reachNever, "::": reachNever,
		"224.0.0.1": reachNever, "ff02::1": reachNever, "255.255.255.255": reachNever, "fd00:ec2::254": reachNever,
		"168.63.129.16": reachNever, "100.100.100.200": reachNever, "198.18.0.1": reachNever, "0.1.2.3": reachNever,
	} {
		if got := reachOf(netip.MustParseAddr(in)); got != want {
			t.Errorf("%s: %v, want %v", in, got, want)
		}
	}
}

// TestRefusedHosts pins that an image name nobody configured cannot make us
// connect inside, nor to an address in any spelling.
func TestRefusedHosts(t *testing.T) {
	hosts := []string{
		"127.0.0.1", "127.0.0.1:5000", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "8.8.8.8", "[::1]", "[::1]:5000",
		"[2606:4700::1111]", "[fe80::1]", "169.254.169.254", "localhost", "localhost:5000", "LOCALHOST", "x.localhost", "metadata",
		"metadata.google.internal", "kubernetes.default.svc.cluster.local", "registry", "", "a b", "a/b", "evil.test@x", "a.test:0", "a.test:99999",
	}
	for _, behindProxy := range []bool{false, true} {
		reached := atomic.Int32{}
		proxy := serve(t, func(http.ResponseWriter, *http.Request) { reached.Add(1) })
		c := newClient(t, func(cfg *Config) {
			cfg.resolver = answering(t, "127.0.0.1")
			if behindProxy {
				cfg.proxy = &httpproxy.Config{HTTPSProxy: proxy.String(), HTTPProxy: proxy.String()}
			}
		})
		if behindProxy {
			hosts = append(hosts, proxy.Host)
		}
		for _, host := range hosts {
			_, err := c.Resolve(t.Context(), Target{Registry: host, Repository: repo}, "v1", nil)
			if !errors.Is(err, ErrRefused) || IsUnavailable(err) {
				t.Errorf("%q (proxy %t): %v, want refused", host, behindProxy, err)
			}
		}
		if n := reached.Load(); n != 0 {
			t.Errorf("%d requests left through the proxy", n)
		}
	}
}

// TestRefusalIsSaid: a registry inside the network that nobody configured is pulled from past
// the cache, and whoever looks into the log or the status finds what to do; once an hour, and not
// as often as names are made up.
func TestRefusalIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said logtest.Buffer
		c := newClient(t, func(cfg *Config) {
			cfg.Logger = slog.New(slog.NewTextHandler(&said, nil))
		})
		ask := func(host string) {
			_, err := c.Resolve(t.Context(), Target{Registry: host, Repository: repo}, "v1", nil)
			if !errors.Is(err, ErrRefused) {
				t.Fatalf("%v, want refused", err)
			}
		}
		const cure = "add a [[registry]] table with this host"
		for i, want := range []int{1, 1, 2} {
			if i == 2 {
				time.Sleep(time.Hour)
			}
			ask("registry.internal")
			if n := strings.Count(said.String(), cure); n != want {
				t.Errorf("said %d times, want %d:\n%s", n, want, said.String())
			}
		}
		if h := c.Health(); len(h) != 1 || !strings.Contains(h[0].LastError, cure) || h[0].Failures != 0 {
			t.Errorf("%+v", h)
		}
		for i := range 100 {
			ask(fmt.Sprintf("made-up-%d.internal", i))
		}
		if n := strings.Count(said.String(), cure); n > 13 {
			t.Errorf("said %d times", n)
		}
	})
}

// answering is a resolver that knows one list of answers, given in turn, for
// all names: an attacker's.
func answering(t *testing.T, addrs ...string) *net.Resolver {
	t.Helper()
	var asked atomic.Int32
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		client, server := net.Pipe()
		go func() {
			defer server.Close()
			answerDNS(server, func() netip.Addr {
				return netip.MustParseAddr(addrs[min(int(asked.Add(1))-1, len(addrs)-1)])
			})
		}()
		return client, nil
	}}
}

// answerDNS speaks DNS as over TCP until the other end is closed. Questions
// for IPv6 get no answer.
func answerDNS(conn net.Conn, next func() netip.Addr) {
	for {
		var length [2]byte
		if _, err := io.ReadFull(conn, length[:]); err != nil {
			return
		}
		query := make([]byte, binary.BigEndian.Uint16(length[:]))
		if _, err := io.ReadFull(conn, query); err != nil {
			return
		}
		var msg dnsmessage.Message
		if msg.Unpack(query) != nil {
			return
		}
		msg.Response, msg.Additionals = true, nil
		if q := msg.Questions[0]; q.Type == dnsmessage.TypeA {
			msg.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class},
				Body:   &dnsmessage.AResource{A: next().As4()},
			}}
		}
		reply, err := msg.Pack()
		if err != nil {
			return
		}
		if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)); err != nil {
			return
		}
	}
}

// TestNamesThatLeadInside pins the check after DNS: at the first look and
// when a name is bound anew.
func TestNamesThatLeadInside(t *testing.T) {
	for _, addr := range []string{"127.0.0.1", "10.0.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "168.63.129.16"} {
		c := newClient(t, func(cfg *Config) { cfg.resolver = answering(t, addr) })
		_, err := c.Resolve(t.Context(), Target{Registry: "evil.test", Repository: repo}, "v1", nil)
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "[[registry]]") {
			t.Errorf("a name at %s: %v, want refused with advice", addr, err)
		}
		if h := c.Health()[0]; h.Failures != 0 || h.LastError != err.Error() {
			t.Errorf("a name at %s: %d failures, the last %q", addr, h.Failures, h.LastError)
		}
	}
	reg := registrytest.Start(t, registrytest.Options{})
	reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
	at, _ := url.Parse(reg.URL())
	configured := newClient(t, func(cfg *Config) { cfg.resolver = answering(t, "127.0.0.1") },
		Registry{Host: "inside.test", Upstreams: []string{"http://inside.test:" + at.Port()}})
	if _, err := configured.Resolve(t.Context(), Target{Registry: "inside.test", Repository: repo}, "v1", nil); err != nil {
		t.Errorf("the same behind a configured name: %v", err)
	}
}

// TestRedirectsLeadNoFurtherInside redirects from a registry at one reach to a
// place at another.
func TestRedirectsLeadNoFurtherInside(t *testing.T) {
	reached := atomic.Int32{}
	target := serve(t, func(w http.ResponseWriter, _ *http.Request) { reached.Add(1); w.WriteHeader(http.StatusNotFound) })
	cases := []struct {
		name   string
		from   reach // where the endpoint was dialled
		host   string
		listed []string
		ok     bool
	}{
		{name: "public to loopback", from: reachPublic, host: "127.0.0.1"},
		{name: "public to a name at loopback", from: reachPublic, host: "evil.test"},
		{name: "public to localhost", from: reachPublic, host: "localhost"},
		{name: "private to a name at loopback", from: reachPrivate, host: "evil.test"},
		{name: "loopback to loopback", from: reachLoopback, host: "127.0.0.1", ok: true},
		{name: "loopback to a name at loopback", from: reachLoopback, host: "evil.test", ok: true},
		{name: "public to a listed name", from: reachPublic, host: "minio.test", listed: []string{"minio.test"}, ok: true},
		{name: "loopback to metadata", from: reachLoopback, host: "169.254.169.254"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			c := newClient(t, func(cfg *Config) { cfg.resolver = answering(t, "127.0.0.1") },
				Registry{Host: "test", Upstreams: []string{"http://registry.test"}, TokenRealms: tc.listed})
			ep := (*c.configured.Load())["test"].endpoints[0]
			ep.reach.Store(int32(tc.from))
			reached.Store(0)
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+net.JoinHostPort(tc.host, target.Port()), nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := ep.exchange(t.Context(), req, kindBlob, c.cfg.FirstByte)
			if err == nil {
				resp.Body.Close()
			}
			if tc.ok != (err == nil) || (reached.Load() == 1) != tc.ok {
				t.Errorf("%v, reached %d times, want ok = %t", err, reached.Load(), tc.ok)
			}
			if !tc.ok && !errors.Is(err, ErrRefused) {
				t.Errorf("%v, want refused", err)
			}
		})
	}
}

// TestDowngradeRefused pins that https never turns into http on the way.
func TestDowngradeRefused(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{TLS: true})
	reached := false
	plain := serve(t, func(http.ResponseWriter, *http.Request) { reached = true })
	reg.Inject(registrytest.Match{}, registrytest.RedirectTo(plain.String()))
	ca, err := reg.CAFile(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, nil, Registry{Host: "test", Upstreams: []string{reg.URL()}, CAFile: ca})
	if _, err := c.Resolve(t.Context(), target, "v1", nil); !errors.Is(err, ErrRefused) || reached {
		t.Errorf("Resolve: %v, reached %t", err, reached)
	}
}

// TestForwardProxy pins that requests go through a proxy at a private address
// although nothing else there may be dialled.
func TestForwardProxy(t *testing.T) {
	var asked atomic.Value
	proxy := serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.URL.String())
		w.WriteHeader(http.StatusNotFound)
	})
	c := newClient(t, func(cfg *Config) { cfg.proxy = &httpproxy.Config{HTTPProxy: proxy.String()} },
		Registry{Host: "reg.test", Upstreams: []string{"http://reg.test"}})
	_, err := c.Resolve(t.Context(), Target{Registry: "reg.test", Repository: repo}, "v1", nil)
	if got, _ := asked.Load().(string); !IsNotFound(err) || got != "http://reg.test/v2/library/app/manifests/v1" {
		t.Errorf("Resolve: %v, the proxy was asked for %q", err, got)
	}
}

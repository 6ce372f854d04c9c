// Package registrytest is a container registry in the test's own process: real
// HTTP or HTTPS on the loopback address, content from memory or computed where
// it is read, the whole pull side of the distribution specification, counters
// for every request, and faults to order. It is what the tests of this
// repository pull from, and what `larder demo` embeds.
//
//	reg := registrytest.Start(t, registrytest.Options{})
//	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 1, Layers: []int64{1 << 20}})
//	reg.Put("library/app", img, "v1")
//	fault := reg.Inject(registrytest.Match{Kind: registrytest.Blob}, registrytest.Times(1), registrytest.CutAfter(1000))
//	... pull from reg.URL() ...
//	if reg.Count(registrytest.Match{Kind: registrytest.Blob, Method: "GET"}) != 2 { ... }
//
// Nothing can be pushed to it over HTTP. It is no model for a registry that
// must resist anybody.
package registrytest

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// loopback is where all ports listen.
const loopback = "127.0.0.1"

// Options of a Server; the zero value is plain HTTP, open to all, with blobs
// served directly.
type Options struct {
	// Listener is where the registry serves; nil = a free port of 127.0.0.1. The
	// server closes it.
	Listener net.Listener
	// TLS serves HTTPS on all ports, with a certificate of a private CA for the
	// loopback addresses, localhost and Hosts.
	TLS   bool
	Hosts []string
	// ClientCerts refuses TLS clients without a certificate of the CA.
	ClientCerts bool
	Auth        Auth
	// CDN redirects GETs of blobs to a second port. Like a signed URL in an
	// object store, it answers 400 to an Authorization header.
	CDN bool
	// NoReferrers has no referrers API, and serves the fallback tags instead.
	NoReferrers bool
}

// Server is a running registry.
type Server struct {
	opts     Options
	registry *endpoint
	cdn      *endpoint // nil without Options.CDN
	tokens   *endpoint // nil without bearer tokens
	ca       *authority

	store   *store
	ledger  *ledger
	faults  *faults
	gate    *gate
	limits  *limits
	latency atomic.Int64
}

// TB is what Start needs of a *testing.T.
type TB interface {
	Helper()
	Cleanup(func())
	Fatalf(format string, args ...any)
}

// Start is New for tests: it fails the test on an error, and closes the server
// at its end.
func Start(t TB, opts Options) *Server {
	t.Helper()
	s, err := New(opts)
	if err != nil {
		t.Fatalf("start registry: %v", err)
	}
	t.Cleanup(s.Close)
	return s
}

// New starts a server, which serves until Close.
func New(opts Options) (*Server, error) {
	s := &Server{
		opts:   opts,
		store:  &store{repos: map[string]*repository{}},
		ledger: newLedger(),
		faults: &faults{},
		gate:   &gate{Auth: opts.Auth},
		limits: newLimits(),
	}
	config, err := s.tlsConfig()
	if err != nil {
		return nil, err
	}
	if err := s.listen(config); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Server) tlsConfig() (*tls.Config, error) {
	if !s.opts.TLS {
		return nil, nil
	}
	ca, err := newAuthority()
	if err != nil {
		return nil, err
	}
	s.ca = ca
	clients := tls.VerifyClientCertIfGiven
	if s.opts.ClientCerts {
		clients = tls.RequireAndVerifyClientCert
	}
	return ca.serverConfig(s.opts.Hosts, clients)
}

// listen opens the ports that the options ask for.
func (s *Server) listen(config *tls.Config) (err error) {
	open := func(l net.Listener, h http.HandlerFunc) (*endpoint, error) {
		if l == nil {
			if l, err = net.Listen("tcp", loopback+":0"); err != nil {
				return nil, fmt.Errorf("listen: %w", err)
			}
		}
		e := &endpoint{addr: l.Addr().String(), tls: config, handler: h, limits: s.limits}
		e.start(l)
		return e, nil
	}
	if s.opts.Auth.Scheme == Bearer {
		if s.tokens, err = open(nil, s.serveToken); err != nil {
			return err
		}
		s.gate.realm = s.localURL(s.tokens) + "/token"
	}
	if s.opts.CDN {
		if s.cdn, err = open(nil, s.serveCDN); err != nil {
			return err
		}
	}
	s.registry, err = open(s.opts.Listener, s.serveRegistry)
	return err
}

func (s *Server) endpoints() []*endpoint {
	var out []*endpoint
	for _, e := range []*endpoint{s.registry, s.cdn, s.tokens} {
		if e != nil {
			out = append(out, e)
		}
	}
	return out
}

// Close releases everything held, closes all ports and connections, and returns
// when nothing of the server runs any more. It may be called twice.
func (s *Server) Close() {
	for _, e := range s.endpoints() {
		e.stop()
		e.release()
	}
	s.ClearFaults()
}

// Down closes all ports and connections, as if the registry's machine had
// stopped; connecting is refused. The ports stay the server's until Close.
func (s *Server) Down() {
	for _, e := range s.endpoints() {
		e.stop()
		e.keep()
	}
}

// Up opens the same ports again after Down.
func (s *Server) Up() error {
	for _, e := range s.endpoints() {
		if err := e.restart(); err != nil {
			return err
		}
	}
	return nil
}

// Host is host:port of the registry.
func (s *Server) Host() string { return s.registry.addr }

// URL is scheme://host:port of the registry.
func (s *Server) URL() string { return s.url(s.registry) }

// TokenURL is the URL of the token server, "" without one.
func (s *Server) TokenURL() string { return s.gate.realm }

// Ref names an image here: host:port/repo:tag, or with @ for a digest.
func (s *Server) Ref(repo, reference string) string {
	if isDigest(reference) {
		return s.Host() + "/" + repo + "@" + reference
	}
	return s.Host() + "/" + repo + ":" + reference
}

func (s *Server) url(e *endpoint) string {
	if e.tls != nil {
		return "https://" + e.addr
	}
	return "http://" + e.addr
}

// localURL names another port than the registry's: by the name of localhost
// and not by address, so that it is another host for clients (who must not take
// their credentials to a CDN), and because go-containerregistry refuses to be
// sent to loopback addresses.
func (s *Server) localURL(e *endpoint) string {
	return strings.Replace(s.url(e), loopback, "localhost", 1)
}

// SetLatency delays the headers of every answer by d, from now on.
func (s *Server) SetLatency(d time.Duration) { s.latency.Store(int64(d)) }

package upstream

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/net/http/httpproxy"

	"github.com/larder-cache/larder/test/registrytest"
)

var tokens = registrytest.Match{Kind: registrytest.Token}

func withCredential(user, password string) func(*Config) {
	return func(cfg *Config) {
		cfg.Credentials = func(context.Context, CredentialRequest) ([]authn.AuthConfig, error) {
			return []authn.AuthConfig{{Username: user, Password: password}}, nil
		}
	}
}

func TestCredentials(t *testing.T) {
	basic := func(u, p string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(u+":"+p)) }
	users := map[string]string{"ann": "secret"}
	cases := []struct {
		name      string
		auth      registrytest.Auth
		user      string // of the node
		password  string
		forwarded string
		ok        bool
		challenge string // in the error
	}{
		{name: "open", ok: true},
		{name: "bearer, public", auth: registrytest.Auth{Scheme: registrytest.Bearer, Users: users, Anonymous: []string{repo}}, ok: true},
		{name: "bearer, private, nobody", auth: registrytest.Auth{Scheme: registrytest.Bearer, Users: users}, challenge: "Bearer"},
		{name: "bearer, node", auth: registrytest.Auth{Scheme: registrytest.Bearer, Users: users}, user: "ann", password: "secret", ok: true},
		{name: "bearer, node, wrong", auth: registrytest.Auth{Scheme: registrytest.Bearer, Users: users}, user: "ann", password: "guess", challenge: "Bearer"},
		{name: "bearer, forwarded, wrong", auth: registrytest.Auth{Scheme: registrytest.Bearer, Users: users}, forwarded: "Bearer nonsense", challenge: "Bearer"},
		{name: "basic, nobody", auth: registrytest.Auth{Scheme: registrytest.Basic, Users: users}, challenge: "Basic"},
		{name: "basic, node", auth: registrytest.Auth{Scheme: registrytest.Basic, Users: users}, user: "ann", password: "secret", ok: true},
		{name: "basic, node, wrong", auth: registrytest.Auth{Scheme: registrytest.Basic, Users: users}, user: "ann", password: "guess", challenge: "Basic"},
		{name: "basic, forwarded", auth: registrytest.Auth{Scheme: registrytest.Basic, Users: users}, forwarded: basic("ann", "secret"), ok: true},
		{name: "basic, forwarded, wrong", auth: registrytest.Auth{Scheme: registrytest.Basic, Users: users}, forwarded: basic("ann", "x"), challenge: "Basic"},
		{name: "basic, forwarded wins over node", auth: registrytest.Auth{Scheme: registrytest.Basic, Users: users}, user: "ann", password: "secret", forwarded: basic("eve", "x"), challenge: "Basic"},
	}
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{1000}, Opaque: true})
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{Auth: tc.auth})
			reg.Put(repo, img, "v1")
			c := newClient(t, withCredential(tc.user, tc.password), registryOf(reg))
			who := Target{Registry: "test", Repository: repo, Authorization: tc.forwarded}
			_, resolved := c.Resolve(t.Context(), who, "v1", nil)
			_, _, read := c.Manifest(t.Context(), who, "v1", nil)
			fetched := c.Fetch(t.Context(), who, img.Layers[0].Digest, newSink(1024))
			for op, err := range map[string]error{"Resolve": resolved, "Manifest": read, "Fetch": fetched} {
				if tc.ok {
					if err != nil {
						t.Errorf("%s: %v", op, err)
					}
					continue
				}
				e, ok := errors.AsType[*Error](err)
				if !IsUnauthorized(err) || !ok || len(e.Challenge) != 1 || !strings.HasPrefix(e.Challenge[0], tc.challenge) {
					t.Errorf("%s: %v with challenge %q, want unauthorized with %s", op, err, e.Challenge, tc.challenge)
					continue
				}
				if tc.forwarded == "" && strings.Contains(e.Challenge[0], "error=") {
					t.Errorf("%s: challenge %q is not the one an unauthenticated client gets", op, e.Challenge[0])
				}
				for _, secret := range []string{"secret", "guess", tc.forwarded} {
					if secret != "" && strings.Contains(err.Error(), secret) {
						t.Errorf("%s: the error shows a credential: %v", op, err)
					}
				}
			}
			if tc.forwarded != "" && reg.Count(tokens) > 0 {
				t.Error("a token was fetched although the client brought its own credential")
			}
		})
	}
}

// TestNodeCredentialStaysHome pins that a registry which is not marked as
// shared by the whole node never sees the node's credential.
func TestNodeCredentialStaysHome(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "secret"}}})
	reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
	for _, auth := range []string{"", "relay", "anonymous"} {
		c := newClient(t, withCredential("ann", "secret"), Registry{Host: "test", Auth: auth, Upstreams: []string{reg.URL()}})
		if _, err := c.Resolve(t.Context(), target, "v1", nil); !IsUnauthorized(err) {
			t.Errorf("auth = %q: %v", auth, err)
		}
	}
	for _, sent := range reg.Seen(registrytest.Match{}) {
		if sent != "" {
			t.Errorf("sent %q", sent)
		}
	}
}

// TestTokenReuse pins the number of token exchanges: one for each repository,
// whatever is asked of it and by how many at once.
func TestTokenReuse(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: registrytest.Bearer, Anonymous: []string{"library/*"}}})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{1000}})
	repos := []string{"library/a", "library/b", "library/c"}
	for _, r := range repos {
		reg.Put(r, img, "v1")
	}
	c := clientOf(t, reg)
	var all sync.WaitGroup
	for range 8 {
		for _, r := range repos {
			all.Go(func() {
				if _, err := c.Resolve(t.Context(), Target{Registry: "test", Repository: r}, "v1", nil); err != nil {
					t.Error(err)
				}
			})
		}
	}
	all.Wait()
	if n := reg.Count(tokens); n != len(repos) {
		t.Errorf("%d tokens for %d repositories", n, len(repos))
	}
}

// TestTokenExpiry lets tokens die: between requests and in the middle of a blob.
func TestTokenExpiry(t *testing.T) {
	auth := registrytest.Auth{Scheme: registrytest.Bearer, Anonymous: []string{repo}}
	t.Run("in the middle of a blob", func(t *testing.T) {
		for _, cdn := range []bool{false, true} {
			reg := registrytest.Start(t, registrytest.Options{Auth: auth, CDN: cdn})
			d := reg.PutBlob(repo, registrytest.Random(7, blobSize)).Digest
			at := registrytest.Match{Kind: registrytest.Blob, Role: registrytest.Registry}
			if cdn {
				at.Role = registrytest.CDN
			}
			reg.Inject(at, registrytest.CutAfter(300_000), registrytest.Times(2), registrytest.Do(reg.ExpireTokens))
			sink := newSink(256 << 10)
			if err := clientOf(t, reg).Fetch(t.Context(), target, d, sink); err != nil {
				t.Fatalf("cdn %t: %v", cdn, err)
			}
			sink.check(t, d)
			if n := reg.Count(tokens); n != 3 {
				t.Errorf("cdn %t: %d tokens, want 3", cdn, n)
			}
		}
	})
	t.Run("before its end", func(t *testing.T) {
		reg := registrytest.Start(t, registrytest.Options{Auth: auth})
		reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
		c := clientOf(t, reg)
		if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
			t.Fatal(err)
		}
		for _, s := range c.sessions.values() {
			s.mu.Lock()
			s.expires = time.Now()
			s.mu.Unlock()
		}
		reg.ResetCounts()
		if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
			t.Fatal(err)
		}
		if n, refused := reg.Count(tokens), reg.Count(registrytest.Match{Status: 401}); n != 1 || refused != 0 {
			t.Errorf("%d new tokens, want 1; %d requests without a good one", n, refused)
		}
	})
	t.Run("for several requests", func(t *testing.T) { // the second hears of it once the first has a new one
		reg := registrytest.Start(t, registrytest.Options{Auth: auth})
		reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
		c := clientOf(t, reg)
		if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
			t.Fatal(err)
		}
		for _, s := range c.sessions.values() {
			s.mu.Lock()
			s.issued = s.issued.Add(-tokenDoubt)
			s.mu.Unlock()
		}
		manifests := registrytest.Match{Kind: registrytest.Manifest}
		second := reg.Inject(manifests, registrytest.Hold(), registrytest.Status(403), registrytest.Times(1))
		done := make(chan error)
		go func() {
			_, err := c.Resolve(t.Context(), target, "v1", nil)
			done <- err
		}()
		<-second.Held()
		reg.Inject(manifests, registrytest.Status(403), registrytest.Do(reg.ExpireTokens), registrytest.Times(1))
		if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
			t.Errorf("the first: %v", err)
		}
		second.Release()
		if err := <-done; err != nil {
			t.Errorf("the second: %v", err)
		}
		if n := reg.Count(tokens); n != 2 {
			t.Errorf("%d tokens, want 2", n)
		}
	})
	t.Run("token service fails", func(t *testing.T) {
		reg := registrytest.Start(t, registrytest.Options{Auth: auth})
		reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
		reg.Inject(tokens, registrytest.Status(503))
		if _, err := clientOf(t, reg).Resolve(t.Context(), target, "v1", nil); !IsUnavailable(err) || IsUnauthorized(err) {
			t.Errorf("Resolve: %v, want unavailable", err)
		}
	})
}

func TestChallenge(t *testing.T) {
	auth := registrytest.Auth{Scheme: registrytest.Bearer, Users: map[string]string{"ann": "x"}}
	reg := registrytest.Start(t, registrytest.Options{Auth: auth})
	got, err := clientOf(t, reg).Challenge(t.Context(), target, "v1")
	want := fmt.Sprintf("Bearer realm=%q,service=\"registrytest\",scope=\"repository:%s:pull\"", reg.TokenURL(), repo)
	if err != nil || len(got) != 1 || got[0] != want {
		t.Errorf("Challenge = %q, %v; want %q", got, err, want)
	}
	open := registrytest.Start(t, registrytest.Options{})
	if got, err := clientOf(t, open).Challenge(t.Context(), target, "v1"); err != nil || got != nil {
		t.Errorf("Challenge of an open registry = %q, %v", got, err)
	}
	open.Down()
	if _, err := clientOf(t, open).Challenge(t.Context(), target, "v1"); !IsUnavailable(err) {
		t.Errorf("Challenge of a dead registry: %v", err)
	}
}

// serve is an HTTP server for what registrytest has no knob for.
func serve(t *testing.T, h http.HandlerFunc) (base *url.URL) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// TestRealms pins who may be sent a credential.
func TestRealms(t *testing.T) {
	cases := []struct {
		endpoint, realm string
		listed          []string
		ok              bool
	}{
		{"https://registry-1.docker.io", "https://auth.docker.io/token", nil, true},
		{"https://registry.gitlab.com", "https://gitlab.com/jwt/auth", nil, true},
		{"https://quay.io", "https://quay.io/v2/auth", nil, true},
		{"https://rg.fr-par.scw.cloud", "https://api.scaleway.com/registry-internal/v1/token", nil, true},
		{"https://rg.fr-par.scw.cloud", "http://api.scaleway.com/token", nil, false},
		{"https://rg.fr-par.scw.cloud", "https://evil.scaleway.com/token", nil, false},
		{"https://rg.evil.functions.scw.cloud", "https://api.scaleway.com/token", nil, false},
		{"https://reg.example.co.uk", "https://auth.example.co.uk/t", nil, true},
		{"https://a.co.uk", "https://b.co.uk/t", nil, false},
		{"https://reg.example.com", "https://evil.test/t", nil, false},
		{"https://reg.example.com", "https://example.com.evil.test/t", nil, false},
		{"https://reg.example.com", "https://evil.test/t", []string{"evil.test"}, true},
		{"https://reg.example.com", "https://evil.test:8443/t", []string{"evil.test:8443"}, true},
		{"https://reg.example.com", "https://evil.test/t", []string{"evil.test:8443"}, false},
		{"https://reg.example.com", "http://auth.example.com/t", nil, false},
		{"http://reg.example.com", "http://auth.example.com/t", nil, true},
		{"http://10.0.0.1:5000", "http://10.0.0.1:5001/t", nil, true},
		{"http://10.0.0.1:5000", "http://10.0.0.2:5001/t", nil, false},
		{"http://10.0.0.1:5000", "http://10.0.0.2:5001/t", []string{"10.0.0.2"}, true},
		{"https://registry", "https://auth/t", nil, false},
		{"http://127.0.0.1:5000", "http://localhost:5001/t", nil, true},
		{"http://10.0.0.1:5000", "http://localhost:5001/t", nil, false},
		{"https://a.github.io", "https://b.github.io/t", nil, false},
		{"https://reg.example.com", "file:///etc/passwd", nil, false},
		{"https://reg.example.com", "/token", nil, false},
	}
	for _, tc := range cases {
		c := newClient(t, nil, Registry{Host: "test", Upstreams: []string{tc.endpoint}, TokenRealms: tc.listed})
		realm, err := url.Parse(tc.realm)
		if err != nil {
			t.Fatal(err)
		}
		err = (*c.configured.Load())["test"].endpoints[0].checkRealm(realm)
		if (err == nil) != tc.ok || (err != nil && !errors.Is(err, ErrRefused)) {
			t.Errorf("%s may send to %s: %v", tc.endpoint, tc.realm, err)
		}
	}
}

// TestRealmRefused pins that a realm elsewhere sees nothing, and what the
// operator reads then.
func TestRealmRefused(t *testing.T) {
	reached := false
	other := serve(t, func(w http.ResponseWriter, _ *http.Request) { reached = true })
	elsewhere := "http://auth.evil.test:" + other.Port()
	reg := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+elsewhere+`/token"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	c := newClient(t, withCredential("ann", "secret"), Registry{Host: "test", Auth: "node", Upstreams: []string{reg.String()}})
	c.proxyFunc = func(u *url.URL) (*url.URL, error) { // whatever leaves comes to other
		if u.Host == reg.Host {
			return nil, nil
		}
		return other, nil
	}
	_, err := c.Resolve(t.Context(), target, "v1", nil)
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "token_realms") || reached {
		t.Errorf("Resolve: %v, reached %t", err, reached)
	}
}

// TestRefusedRealmIsOneRepositorys: a realm that must not be asked costs the repository
// that named it, and not those of the same registry that need no token.
func TestRefusedRealmIsOneRepositorys(t *testing.T) {
	reg := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/v2/secret/") {
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://auth.example.com/token"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Docker-Content-Digest", digest.FromString("{}").String())
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		fmt.Fprint(w, "{}")
	})
	c := newClient(t, nil, Registry{Host: "test", Upstreams: []string{reg.String()}})
	for _, repository := range []string{"open/app", "secret/app", "open/app", "open/other", "secret/app"} {
		_, err := c.Resolve(t.Context(), Target{Registry: "test", Repository: repository, Anonymous: true}, "v1", nil)
		if open := strings.HasPrefix(repository, "open/"); open && err != nil || !open && !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", repository, err)
		}
	}
}

// TestRedirectLeaks follows redirects to another host and looks at what came there.
func TestRedirectLeaks(t *testing.T) {
	body := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[]}`)
	var got http.Header
	cdn := serve(t, func(w http.ResponseWriter, r *http.Request) {
		got = r.Header.Clone()
		if r.URL.Path == "/fail" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		_, _ = w.Write(body) // the client sees what is missing
	})
	to := "/ok"
	reg := serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, cdn.String()+to+"?X-Amz-Signature=topsecret", http.StatusTemporaryRedirect)
	})
	c := newClient(t, nil, Registry{Host: "test", Upstreams: []string{reg.String()}})
	who := Target{Registry: "test", Repository: repo, Authorization: "Bearer client-token"}
	if _, _, err := c.Manifest(t.Context(), who, "v1", nil); err != nil {
		t.Fatal(err)
	}
	for _, header := range []string{"Authorization", "Referer", "Cookie"} {
		if got.Get(header) != "" {
			t.Errorf("%s: %q reached the other host", header, got.Get(header))
		}
	}
	if got.Get("Accept-Encoding") != "identity" {
		t.Errorf("Accept-Encoding: %q", got.Get("Accept-Encoding"))
	}
	to = "/fail"
	_, _, err := c.Manifest(t.Context(), who, "v1", nil)
	if err == nil || strings.Contains(err.Error(), "topsecret") || strings.Contains(err.Error(), "client-token") {
		t.Errorf("Manifest: %v", err)
	}
	cdn.Host = "127.0.0.1:1" // nobody listens
	_, _, err = c.Manifest(t.Context(), who, "v1", nil)
	if err == nil || strings.Contains(err.Error(), "topsecret") {
		t.Errorf("Manifest: %v", err)
	}
	for _, h := range c.Health() {
		if strings.Contains(h.LastError, "topsecret") {
			t.Errorf("health shows a signed URL: %s", h.LastError)
		}
	}
}

// TestMirrorGetsNoForeignCredential pins that a client's credential goes to the
// registry it is for, and that a mirror's answer does not stand in for its verdict.
func TestMirrorGetsNoForeignCredential(t *testing.T) {
	mirror := registrytest.Start(t, registrytest.Options{})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3})
	mirror.Put(repo, img, "v1")
	origin := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "x"}}})
	origin.Put(repo, img, "v1")
	at, _ := url.Parse(mirror.URL())
	at.Host = "localhost:" + at.Port() // another site than 127.0.0.1
	c := newClient(t, nil, Registry{Host: "test", Upstreams: []string{at.String(), origin.URL()}})
	if _, err := c.Resolve(t.Context(), target, "v1", nil); err != nil {
		t.Fatalf("anonymous: %v", err)
	}
	mirror.ResetCounts()
	_, err := c.Resolve(t.Context(), Target{Registry: "test", Repository: repo, Authorization: "Basic bm90OnJpZ2h0"}, "v1", nil)
	if !IsUnauthorized(err) || mirror.Count(registrytest.Match{}) != 0 {
		t.Errorf("with a credential: %v, %d requests to the mirror", err, mirror.Count(registrytest.Match{}))
	}
}

// TestMirrorIsToldTheRegistry pins ?ns=, path prefix and token scope.
func TestMirrorIsToldTheRegistry(t *testing.T) {
	var paths []string
	var scope string
	var base *url.URL
	base = serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			scope = r.URL.Query().Get("scope")
			fmt.Fprint(w, `{"token":"t"}`)
			return
		}
		if r.Header.Get("Authorization") == "" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+base.String()+`/token"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		paths = append(paths, r.URL.String())
		w.WriteHeader(http.StatusNotFound)
	})
	c := newClient(t, nil, Registry{Host: "docker.io", Upstreams: []string{base.String() + "/proxy"}})
	if _, err := c.Resolve(t.Context(), Target{Registry: "docker.io", Repository: repo}, "v1", nil); !IsNotFound(err) {
		t.Errorf("resolve: %v, want not found", err)
	}
	if len(paths) != 1 || paths[0] != "/v2/proxy/library/app/manifests/v1?ns=docker.io" || scope != "repository:proxy/library/app:pull" {
		t.Errorf("paths %q, scope %q", paths, scope)
	}
	hub := newClient(t, func(cfg *Config) { cfg.proxy = &httpproxy.Config{} })
	reg, err := hub.lookup("index.docker.io")
	if err != nil || reg.endpoints[0].addr.host != "registry-1.docker.io" || reg.endpoints[0].mirrors() {
		t.Errorf("Docker Hub: %+v, %v", reg, err)
	}
}

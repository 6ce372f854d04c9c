package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/test/registrytest"
)

// TestAnonymousHidesTheNode holds that a target may ask as anyone would where
// this node has a credential: or a home would call private what it alone opens
// public.
func TestAnonymousHidesTheNode(t *testing.T) {
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: scheme, Users: map[string]string{"ann": "secret"}, Anonymous: []string{"open/*"}}})
		for _, r := range []string{repo, "open/app"} {
			reg.Put(r, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
		}
		c := newClient(t, withCredential("ann", "secret"), Registry{Host: "test", Auth: "node", Upstreams: []string{reg.URL()}})
		for _, tc := range []struct {
			target Target
			ok     bool
		}{
			{Target{Registry: "test", Repository: repo}, true},
			{Target{Registry: "test", Repository: repo, Anonymous: true}, false},
			{Target{Registry: "test", Repository: "open/app", Anonymous: true}, true},
		} {
			_, err := c.Resolve(t.Context(), tc.target, "v1", nil)
			if ok := err == nil; ok != tc.ok || !ok && !IsUnauthorized(err) {
				t.Errorf("%s, %s, anonymous %t: %v", scheme, tc.target, tc.target.Anonymous, err)
			}
		}
	}
}

// TestForwardedChallengeSaysWhy: the client's own token was refused, and it has
// to read why to get another.
func TestForwardedChallengeSaysWhy(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: registrytest.Bearer, Users: map[string]string{"ann": "secret"}}})
	reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
	c := newClient(t, nil, registryOf(reg))
	for forwarded, says := range map[string]bool{"": false, "Bearer nonsense": true} {
		for range 2 { // the second time the client knows the realm
			_, err := c.Resolve(t.Context(), Target{Registry: "test", Repository: repo, Authorization: forwarded}, "v1", nil)
			e, ok := errors.AsType[*Error](err)
			if !ok || len(e.Challenge) != 1 || strings.Contains(e.Challenge[0], `error="invalid_token"`) != says {
				t.Errorf("%q: %v, challenge %q", forwarded, err, e.Challenge)
			}
		}
	}
}

// TestNothingLongIsKept: a registry, and whoever asks it for one repository after the other,
// fills memories that are bounded in number only with what has a bound itself.
func TestNothingLongIsKept(t *testing.T) {
	long := strings.Repeat("x", 56<<10)
	var at *url.URL
	at = serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			fmt.Fprintf(w, `{"token":%q}`, long)
		case strings.Contains(r.URL.Path, "/bearer/"):
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token"`, at))
			if r.Header.Get("Authorization") != "" { // longer than most servers take
				w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
			}
			w.WriteHeader(http.StatusUnauthorized)
		case strings.Contains(r.URL.Path, "/typed/"):
			w.Header().Set("Content-Type", "application/vnd."+long)
			w.Header().Set("Docker-Content-Digest", digest.FromString("x").String())
			if r.Method == http.MethodGet {
				w.Header().Del("Docker-Content-Digest")
				fmt.Fprintf(w, `{"schemaVersion":2,"mediaType":"application/vnd.%s","layers":[]}`, long)
			}
		default:
			w.Header()["Www-Authenticate"] = []string{`Basic realm="` + long + `"`, `Basic realm="x"`}
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	c := newClient(t, nil, Registry{Host: "test", Auth: "node", Upstreams: []string{at.String()}})
	ask := func(t Target) *Error {
		_, err := c.Resolve(context.Background(), t, "v1", nil)
		e, _ := errors.AsType[*Error](err)
		return e
	}
	for _, credential := range []string{"", "Bearer abc"} {
		e := ask(Target{Registry: "test", Repository: repo, Authorization: credential})
		if e == nil || !slices.Equal(e.Challenge, []string{`Basic realm="x"`}) {
			t.Errorf("credential %q: not the short one of two challenges alone", credential)
		}
	}
	ask(Target{Registry: "test", Repository: "bearer/app"})
	for _, s := range c.sessions.values() {
		if n := len(strings.Join(s.raw, "")) + len(s.token) + len(s.refresh); n > maxChallenge+maxKeptToken {
			t.Errorf("the session of %s keeps %d bytes", s.repository, n)
		}
	}
	if e := ask(Target{Registry: "test", Repository: "typed/app"}); e == nil || !errors.Is(e, ErrBadAnswer) {
		t.Errorf("a media type of %d bytes is one", len(long))
	}
	(*c.configured.Load())["test"].endpoints[0].noteError(errors.New(long), time.Now())
	if n := len(c.Health()[0].LastError); n > 1024 {
		t.Errorf("health keeps an error of %d bytes", n)
	}
}

func TestCheckChallenge(t *testing.T) {
	c := newClient(t, nil, Registry{Host: "reg.example.com"}, Registry{Host: "listed.example.com", TokenRealms: []string{"tokens.test"}})
	for _, tc := range []struct {
		registry  string
		challenge []string
		ok        bool
	}{
		{"reg.example.com", nil, true},
		{"reg.example.com", []string{`Basic realm="x"`}, true},
		{"reg.example.com", []string{`Bearer realm="https://auth.example.com/token",service="x"`}, true},
		{"reg.example.com", []string{`Bearer realm="http://auth.example.com/token"`}, false},
		{"reg.example.com", []string{`Bearer realm="https://evil.test/token"`}, false},
		{"reg.example.com", []string{`Basic realm="x"`, `Bearer realm="https://evil.test/token"`}, false},
		{"reg.example.com", []string{`Basic realm="x", Bearer realm="https://evil.test/token"`}, false},
		{"reg.example.com", []string{`bearer realm="%zz"`}, false},
		{"reg.example.com", []string{`Bearer service="x"`}, false},
		{"listed.example.com", []string{`Bearer realm="https://tokens.test/token"`}, true},
		{"unconfigured.test", []string{`Bearer realm="https://auth.unconfigured.test/token"`}, true},
		{"reg.example.com", []string{`Negotiate`, `NTLM`, `Basic realm="x y, z"`}, true},
		{"reg.example.com", []string{`Negotiate YIIabc/+==, Basic realm="café \"x\"", Bearer realm="https://auth.example.com/token"`}, true},
		{"reg.example.com", []string{`Bearer realm="https://auth.example.com/token", service=x ,error="invalid_token",error_description="No, \"no\""`}, true},
		{"reg.example.com", []string{"Bearer\trealm=\"https://evil.test/token\""}, false},
		{"reg.example.com", []string{"Basic realm=x,\u00a0Bearer realm=\"https://evil.test/token\""}, false},
		{"reg.example.com", []string{`A,A,A,A,A,A,A,A`, `Bearer realm="https://evil.test/token"`}, false},
		{"reg.example.com", []string{`Basic realm="` + strings.Repeat("x", maxChallenge) + `", Bearer realm="https://evil.test/token"`}, false},
		{"reg.example.com", []string{`Basic realm="` + strings.Repeat("x", maxChallenge/2) + `"`, `Basic realm="` + strings.Repeat("x", maxChallenge/2) + `"`}, false},
		{"reg.example.com", []string{`Negotiate, Bearer realm="https://evil.test/token", Realm="https://auth.example.com/token"`}, false},
		{"reg.example.com", []string{`Basic realm="x" Bearer realm="https://evil.test/token"`}, false},
		{"reg.example.com", []string{`Basic realm="x, Bearer realm="https://evil.test/token"`}, false},
		{"reg.example.com", []string{`Basic realm = "x", Bearer realm = "https://evil.test/token"`}, false},
		{"reg.example.com", []string{`a=b Bearer realm="https://evil.test/token"`}, false},
		{"reg.example.com", []string{``}, false},
		{"not a host", []string{`Basic realm="x"`}, false},
	} {
		if err := c.CheckChallenge(tc.registry, tc.challenge); (err == nil) != tc.ok {
			t.Errorf("%s %.200q: %v", tc.registry, tc.challenge, err)
		}
	}
	for _, f := range families {
		if !legible([]string{f.challenge}) {
			t.Errorf("%s: %s is said to be illegible", f.name, f.challenge)
		}
	}
}

// TestTargetPrintsNoCredential: a target may end up in a log line.
func TestTargetPrintsNoCredential(t *testing.T) {
	secret := Target{Registry: "test", Repository: repo, Authorization: "Bearer secret"}
	for _, format := range []string{"%s", "%v", "%+v", "%#v", "%q"} {
		if out := fmt.Sprintf(format, secret); strings.Contains(out, "secret") || !strings.Contains(out, repo) {
			t.Errorf("%s prints %s", format, out)
		}
	}
}

// TestTokenServiceFailsAlone: a token service that is down, or says 429, does not keep a
// client with a token of its own from the registry, and is left alone for a while itself: at
// 429 for as long as it wants, by all that need a token of it.
func TestTokenServiceFailsAlone(t *testing.T) {
	for name, tt := range map[string]struct {
		answer registrytest.Effect
		asked  int // at most
		status int
		again  time.Duration // at least
	}{
		"down":      {registrytest.Status(503), 2 * breakAfter, 0, 0},
		"throttled": {registrytest.TooManyRequests(time.Minute), 1, 429, 50 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: registrytest.Bearer, Users: map[string]string{"ann": "secret"}}})
			reg.Put(repo, registrytest.OCIImage(registrytest.ImageSpec{Seed: 3}), "v1")
			c := newClient(t, withCredential("ann", "secret"), registryOf(reg))
			own := Target{Registry: "test", Repository: repo}
			if _, err := c.Resolve(t.Context(), own, "v1", nil); err != nil {
				t.Fatal(err)
			}
			sent := reg.Seen(registrytest.Match{Kind: registrytest.Manifest, Status: 200})
			f := reg.Inject(tokens, tt.answer)
			for i := range 10 {
				other := Target{Registry: "test", Repository: fmt.Sprintf("other/%d", i)} // each needs a token
				_, err := c.Resolve(t.Context(), other, "v1", nil)
				e, ok := errors.AsType[*Error](err)
				if !ok || !IsUnavailable(err) || tt.status != 0 && e.Status != tt.status || e.RetryAfter < tt.again {
					t.Fatalf("without a token: %v", err)
				}
			}
			if got := f.Hits(); got > tt.asked {
				t.Errorf("the token service was asked %d times", got)
			}
			own.Authorization = sent[len(sent)-1]
			if _, err := c.Resolve(t.Context(), own, "v1", nil); err != nil {
				t.Errorf("with a token: %v", err)
			}
		})
	}
}

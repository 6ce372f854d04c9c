package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/larder-cache/larder/test/registrytest"
)

// keyring is a Config.Credentials that notes what it was asked.
type keyring struct {
	mu      sync.Mutex // guards all below
	list    []authn.AuthConfig
	renewed []authn.AuthConfig // instead of list, once it was told to refresh
	err     error
	asked   []CredentialRequest
}

func (k *keyring) find(_ context.Context, r CredentialRequest) ([]authn.AuthConfig, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked = append(k.asked, r)
	if r.Refresh && k.renewed != nil {
		k.list = k.renewed
	}
	return k.list, k.err
}

func (k *keyring) set(list ...authn.AuthConfig) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.list = list
}

func (k *keyring) use(cfg *Config) { cfg.Credentials = k.find }

func user(name, password string) authn.AuthConfig {
	return authn.AuthConfig{Username: name, Password: password}
}

// basicRegistry takes one user and notes the users that came, "" for nobody.
type basicRegistry struct {
	mu     sync.Mutex // guards all below
	user   string
	public string // this repository is open to all
	hides  bool   // 404 to other users but "old", and of the tag "gone" to all
	came   []string
}

func (b *basicRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	defer b.mu.Unlock()
	name, _, sent := r.BasicAuth()
	b.came = append(b.came, name)
	if b.hides && sent && name != "old" && (name != b.user || strings.HasSuffix(r.URL.Path, "/gone")) {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	if name != b.user && (sent || b.public == "" || !strings.HasPrefix(r.URL.Path, "/v2/"+b.public+"/")) {
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
	w.Write([]byte(`{"schemaVersion":2,"layers":[]}`))
}

// takeCame returns who came since, and forgets it.
func (b *basicRegistry) takeCame() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := strings.Join(b.came, " ")
	b.came = nil
	return out
}

func (b *basicRegistry) admit(user string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.user = user
}

// TestNodeCredentialsInTurn follows which credentials are tried, and in which
// order: as kubelet does, but a refused one is not tried first for every blob.
func TestNodeCredentialsInTurn(t *testing.T) {
	reg := &basicRegistry{user: "bob"}
	at := serve(t, reg.ServeHTTP)
	k := &keyring{list: []authn.AuthConfig{user("ann", "1"), user("bob", "2")}}
	c := newClient(t, k.use, Registry{Host: "test", Auth: "node", Upstreams: []string{at.String()}})
	read := func() error {
		_, _, err := c.Manifest(t.Context(), target, "v1", nil)
		return err
	}
	steps := []struct {
		name   string
		change func()
		want   string // who comes
		fails  bool
	}{
		{name: "first request", want: " ann bob"}, // "": nobody knew that it wants a password
		{name: "refused one last", want: "bob"},
		{name: "a new one first", change: func() { k.set(user("zoe", "3"), user("ann", "1"), user("bob", "2")) }, want: "zoe bob"},
		{name: "none of them", change: func() { reg.admit("eve") }, want: "bob zoe ann ", fails: true},
		{name: "renewed", change: func() { k.renewed = []authn.AuthConfig{user("eve", "4"), user("ann", "1")} }, want: "zoe ann bob eve"},
		{name: "used from then on", want: "eve"},
	}
	for _, s := range steps {
		if s.change != nil {
			s.change()
		}
		if err := read(); IsUnauthorized(err) != s.fails || (err != nil) != s.fails {
			t.Errorf("%s: %v", s.name, err)
		}
		if got := reg.takeCame(); got != s.want {
			t.Errorf("%s: %q came, want %q", s.name, got, s.want)
		}
	}
}

// TestCredentialThatSeesNothing: a registry that hides what a credential may not see
// answers 404 to it. Then the others have their turn, and the one that sees the
// repository comes first from then on, and is believed when something is not there.
func TestCredentialThatSeesNothing(t *testing.T) {
	reg := &basicRegistry{user: "bob", hides: true}
	at := serve(t, reg.ServeHTTP)
	k := &keyring{list: []authn.AuthConfig{user("ann", "1"), user("bob", "2"), user("zoe", "3")}}
	c := newClient(t, k.use, Registry{Host: "test", Auth: "node", Upstreams: []string{at.String()}})
	for _, s := range []struct {
		name, repository, reference string
		change                      func()
		want                        string // who comes
		missing                     bool
	}{
		{name: "first request", repository: repo, reference: "v1", want: " ann bob"},
		{name: "the one that sees it first", repository: repo, reference: "v1", want: "bob"},
		{name: "and its 404 is believed", repository: repo, reference: "gone", want: "bob", missing: true},
		{name: "nobody sees it", repository: "other", reference: "gone", want: "ann bob zoe", missing: true},
		{name: "one that sees nothing and one that is out of date", repository: "third", reference: "v1", want: "ann old bob", change: func() {
			k.set(user("ann", "1"), user("old", "2"))
			k.renewed = []authn.AuthConfig{user("ann", "1"), user("bob", "2")}
		}},
	} {
		if s.change != nil {
			s.change()
		}
		_, _, err := c.Manifest(t.Context(), Target{Registry: "test", Repository: s.repository}, s.reference, nil)
		if IsNotFound(err) != s.missing || (err != nil) != s.missing {
			t.Errorf("%s: %v", s.name, err)
		}
		if got := reg.takeCame(); got != s.want {
			t.Errorf("%s: %q came, want %q", s.name, got, s.want)
		}
	}
	k.set(user("ann", "1"))
	k.err = errors.New("the plugin is broken")
	if _, _, err := c.Manifest(t.Context(), Target{Registry: "test", Repository: "fourth"}, "v1", nil); !IsUnavailable(err) || IsNotFound(err) {
		t.Errorf("one sees nothing, another could not be looked up: %v, want unavailable", err)
	}
}

// TestWrongPasswordIsNotRepeated: what is public is pulled with a wrong credential of this
// node sent once, and not in each request: services lock accounts that do that. A mended
// one is tried at once, and what is no longer public is asked for with all.
func TestWrongPasswordIsNotRepeated(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: registrytest.Bearer, Users: map[string]string{"ann": "secret"}, Anonymous: []string{repo}}})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{1000, 2000, 3000}, Opaque: true})
	reg.Put(repo, img, "v1")
	k := &keyring{list: []authn.AuthConfig{user("ann", "last year's")}}
	c := newClient(t, k.use, registryOf(reg))
	for range 2 {
		if _, _, err := c.Manifest(t.Context(), target, "v1", nil); err != nil {
			t.Fatal(err)
		}
		for _, l := range img.Layers {
			if err := c.Fetch(t.Context(), target, l.Digest, newSink(1024)); err != nil {
				t.Fatal(err)
			}
		}
	}
	wrong := tokens
	wrong.Status = http.StatusUnauthorized
	if n := reg.Count(wrong); n != 1 {
		t.Errorf("a wrong password was sent %d times", n)
	}
	reg.ResetCounts()
	k.set(user("ann", "secret"))
	if _, _, err := c.Manifest(t.Context(), target, "v1", nil); err != nil || reg.Count(tokens) != 1 {
		t.Errorf("the right one: %v, sent %d times", err, reg.Count(tokens))
	}
	k.set(user("ann", "last year's"))
	all := reg.Inject(registrytest.Match{Kind: registrytest.Manifest}, registrytest.Status(403))
	if _, _, err := c.Manifest(t.Context(), target, "v1", nil); !IsUnauthorized(err) || all.Hits() == 0 || reg.Count(wrong) != 1 {
		t.Errorf("no longer public: %v, a wrong password was sent %d times", err, reg.Count(wrong))
	}
}

// TestRefusalIsForgotten holds that a refused credential has another chance.
func TestRefusalIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &session{}
		if !s.noteRefusal(true) || s.noteRefusal(true) || !s.wasRefused() {
			t.Error("a refusal is news once")
		}
		time.Sleep(refusalMemory) // of the bubble
		if s.wasRefused() || !s.noteRefusal(true) {
			t.Error("after a while it is news again")
		}
		if s.noteRefusal(false); s.wasRefused() {
			t.Error("accepted, and still counted as refused")
		}
	})
}

// TestLookupFails holds that a failed look-up is no verdict: what is open to
// all stays so, and of the rest nobody knows.
func TestLookupFails(t *testing.T) {
	reg := &basicRegistry{user: "ann", public: "open/app"}
	at := serve(t, reg.ServeHTTP)
	k := &keyring{err: errors.New("the plugin is broken")}
	c := newClient(t, k.use, Registry{Host: "test", Auth: "node", Upstreams: []string{at.String()}})
	if _, _, err := c.Manifest(t.Context(), Target{Registry: "test", Repository: "open/app"}, "v1", nil); err != nil {
		t.Errorf("public: %v", err)
	}
	reg.takeCame()
	_, _, err := c.Manifest(t.Context(), target, "v1", nil)
	if !IsUnavailable(err) || IsUnauthorized(err) || !strings.Contains(err.Error(), "the plugin is broken") {
		t.Errorf("private: %v, want unavailable", err)
	}
	if got := reg.takeCame(); got != "" { // nobody, once
		t.Errorf("%q came", got)
	}
	k.set(user("ann", "1")) // some, and an error about others
	if _, _, err := c.Manifest(t.Context(), target, "v1", nil); err != nil {
		t.Errorf("with one that was found: %v", err)
	}
}

// TestCredentialNames holds what a credential is looked up by, and that a
// registry's own is not offered to a stranger that stands in for it.
func TestCredentialNames(t *testing.T) {
	cases := []struct {
		registry  string
		upstreams []string
		want      []string // for the first upstream
	}{
		{"docker.io", nil, []string{"docker.io/team/app"}},
		{"reg.test:5000", nil, []string{"reg.test:5000/team/app"}},
		{"docker.io", []string{"https://harbor.test/hub"}, []string{"harbor.test/hub/team/app", "docker.io/team/app"}},
		{"docker.io", []string{"https://1.dkr.ecr.test/docker-hub"}, []string{"1.dkr.ecr.test/docker-hub/team/app", "docker.io/team/app"}},
		{"reg.test", []string{"http://10.0.0.1:5000", "https://reg.test"}, []string{"10.0.0.1:5000/team/app"}},
		{"reg.example.test", []string{"https://eu.example.test", "https://reg.example.test"}, []string{"eu.example.test/team/app", "reg.example.test/team/app"}},
	}
	for _, tc := range cases {
		c := newClient(t, nil, Registry{Host: tc.registry, Auth: "node", Upstreams: tc.upstreams})
		reg, err := c.lookup(tc.registry)
		if err != nil {
			t.Fatal(err)
		}
		if got := reg.endpoints[0].names("team/app"); !slices.Equal(got, tc.want) {
			t.Errorf("%s at %q: %q, want %q", tc.registry, tc.upstreams, got, tc.want)
		}
	}
}

// TestNodeRepositories holds that the node's credential is neither looked up
// nor sent outside node_repositories, for a client's own credential, or where a
// registry redirects.
func TestNodeRepositories(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{CDN: true, Auth: registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "x", "bob": "y"}}})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{40 << 20}, Opaque: true})
	reg.Put("team/app", img, "v1")
	reg.Put("other/app", img, "v1")
	k := &keyring{list: []authn.AuthConfig{user("ann", "x")}}
	c := newClient(t, k.use, Registry{Host: "test", Auth: "node", NodeRepositories: []string{"team/**"}, Upstreams: []string{reg.URL()}})
	if _, err := c.Resolve(t.Context(), Target{Registry: "test", Repository: "other/app"}, "v1", nil); !IsUnauthorized(err) || len(k.asked) > 0 {
		t.Errorf("outside: %v, looked up %d times", err, len(k.asked))
	}
	own := Target{Registry: "test", Repository: "team/app", Authorization: "Basic Ym9iOnk="}
	if _, err := c.Resolve(t.Context(), own, "v1", nil); err != nil || len(k.asked) > 0 {
		t.Errorf("with a credential of its own: %v, looked up %d times", err, len(k.asked))
	}
	sink := newSink(256 << 10)
	if err := c.Fetch(t.Context(), Target{Registry: "test", Repository: "team/app"}, img.Layers[0].Digest, sink); err != nil {
		t.Fatal(err)
	}
	sink.check(t, img.Layers[0].Digest)
	if atCDN := reg.Count(registrytest.Match{Role: registrytest.CDN}); atCDN < 2 || len(k.asked) >= atCDN {
		t.Errorf("%d requests to the CDN, looked up %d times", atCDN, len(k.asked))
	}
}

// TestCredentialChangesMidBlob lets the node's credential change while a blob
// arrives in ranges, as a plugin's does when its cacheDuration ends: from one
// range to the next the new one is used, without a refusal in between.
func TestCredentialChangesMidBlob(t *testing.T) {
	const size = 60 << 20
	users := map[string]string{}
	for i := range 20 {
		users[fmt.Sprint("user", i)] = "x"
	}
	reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{Scheme: registrytest.Basic, Users: users}})
	d := reg.PutBlob(repo, registrytest.Random(11, size)).Digest
	asked := 0
	var mu sync.Mutex // guards asked
	c := newClient(t, func(cfg *Config) {
		cfg.Credentials = func(context.Context, CredentialRequest) ([]authn.AuthConfig, error) {
			mu.Lock()
			defer mu.Unlock()
			asked++
			return []authn.AuthConfig{user(fmt.Sprint("user", min(asked, 19)), "x")}, nil
		}
	}, registryOf(reg))
	sink := newSink(256 << 10)
	if err := c.Fetch(t.Context(), target, d, sink); err != nil {
		t.Fatal(err)
	}
	sink.check(t, d)
	served := reg.Seen(registrytest.Match{Kind: registrytest.Blob, Status: http.StatusPartialContent})
	slices.Sort(served)
	if n := len(slices.Compact(served)); n < 2 {
		t.Errorf("ranges were asked for with %d credentials; the test would show nothing", n)
	}
	if n := reg.Count(registrytest.Match{Status: http.StatusUnauthorized}); n > 1 { // the first, which teaches the scheme
		t.Errorf("%d refusals", n)
	}
}

// TestErrorRepeatsNoSecret: a registry's own words are shown, but not if they
// hold what was sent, in whatever spelling and however they are cut.
func TestErrorRepeatsNoSecret(t *testing.T) {
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://reg.test", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth("ann", "a/b&c")
	for body, want := range map[string]string{
		`{"errors":[{"code":"DENIED","message":"no such user"}]}`:                "DENIED no such user",
		`{"errors":[{"code":"DENIED","message":"a\/b\u0026c is wrong"}]}`:        " ",
		`{"errors":[{"code":"a/b&c","message":"is wrong"}]}`:                     " ",
		`{"errors":[{"code":"DENIED","message":"you sent Basic YW5uOmEvYiZj"}]}`: " ",
		`{"errors":[{"message":"` + strings.Repeat("x", 198) + `a/b&c"}]}`:       " ",
		`{"errors":[]}`: " ",
		`a/b&c`:         " ",
	} {
		code, message := errorCode([]byte(body), carried(req))
		if got := code + " " + message; got != want {
			t.Errorf("%s: %q, want %q", body, got, want)
		}
	}
	req.Header.Del("Authorization")
	if code, _ := errorCode([]byte(`{"errors":[{"code":"DENIED"}]}`), carried(req)); code != "DENIED" {
		t.Errorf("nothing was sent: %q", code)
	}
}

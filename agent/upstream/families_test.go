package upstream

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/test/registrytest"
)

// family is how one kind of registry asks for credentials and takes them. What
// is not said is as in distribution: a refused token is a 401 with a challenge,
// a token service answers 401 to a wrong password and gives a token without
// grants to those who may not pull.
type family struct {
	name     string
	registry string // as images name it
	upstream string // where it is; here http, which the real ones are not
	// challenge is WWW-Authenticate; REPO is the repository with the upstream's
	// path. Basic means that the registry itself takes the password.
	challenge string
	user      string // a name that the registry gives meaning to
	// badToken and badLogin are the statuses for a token that is not good (any
	// more) and for a wrong password, where they are not 401 with a challenge.
	badToken, badLogin int
	// noGrant is the token service's status for a repository the caller may not
	// pull, 0 for a token that grants nothing.
	noGrant   int
	expiresIn int    // 0: it does not say
	field     string // of the token in the answer
	identity  bool   // takes an identity token by POST; others have no POST
	limits    bool   // sends ratelimit headers
	cdn       string // where blobs are redirected to, "" = nowhere
	closed    bool   // nothing is public
	realms    []string
	refused   bool // without those realms, that is
}

// The sources are the registries' documentation and what users logged of them:
// the header lines can be found in issues of clients. Where one is named it
// tells of more than the usual.
var families = []family{
	// docs.docker.com/docker-hub/usage/pulls (limits); a token is needed for public images too.
	{name: "Docker Hub", registry: "docker.io", upstream: "http://registry-1.docker.io", expiresIn: 300, field: "token", identity: true, limits: true,
		challenge: `Bearer realm="http://auth.docker.io/token",service="registry.docker.io",scope="repository:REPO:pull"`,
		cdn:       "production.cloudflare.docker.com"},
	// An unknown token is 403 DENIED without a challenge (renovatebot/renovate#11446), a wrong
	// password 403 at the token service (secureCodeBox/secureCodeBox#2574), a private repository
	// 401 there (openai/tunnel-client#75).
	{name: "GitHub", registry: "ghcr.io", upstream: "http://ghcr.io", field: "token", badToken: 403, badLogin: 403, noGrant: 401,
		challenge: `Bearer realm="http://ghcr.io/token",service="ghcr.io",scope="repository:REPO:pull"`,
		cdn:       "pkg-containers.githubusercontent.com"},
	// Says nothing of its tokens' lives (moby/buildkit#2055).
	{name: "Quay", registry: "quay.io", upstream: "http://quay.io", field: "token",
		challenge: `Bearer realm="http://quay.io/v2/auth",service="quay.io",scope="repository:REPO:pull"`,
		cdn:       "cdn01.quay.io"},
	// The password is a token of 12 hours; past that, 403 DENIED "Your authorization token has
	// expired" (awslabs/amazon-ecr-credential-helper#7); S3 refuses a signed URL with an Authorization.
	{name: "ECR", registry: "123456789012.dkr.ecr.eu-west-1.amazonaws.com", upstream: "http://123456789012.dkr.ecr.eu-west-1.amazonaws.com",
		user: "AWS", badToken: 403, closed: true,
		challenge: `Basic realm="http://123456789012.dkr.ecr.eu-west-1.amazonaws.com/",service="ecr.amazonaws.com"`,
		cdn:       "prod-eu-west-1-starport-layer-bucket.s3.eu-west-1.amazonaws.com"},
	// One scope for all; a token past its time is 400 without a challenge (aws/containers-roadmap#2835).
	{name: "ECR Public", registry: "public.ecr.aws", upstream: "http://public.ecr.aws", user: "AWS", field: "token", badToken: 400, badLogin: 400,
		challenge: `Bearer realm="http://public.ecr.aws/token/",service="public.ecr.aws",scope="aws"`,
		cdn:       "d5l0dvt14r5h8.cloudfront.net"},
	// User _json_key with a service account's key, or oauth2accesstoken
	// (cloud.google.com/artifact-registry/docs/docker/authentication); blobs stay on the host.
	{name: "Artifact Registry", registry: "europe-docker.pkg.dev", upstream: "http://europe-docker.pkg.dev", user: "_json_key", field: "token", expiresIn: 43200,
		challenge: `Bearer realm="http://europe-docker.pkg.dev/v2/token",service="europe-docker.pkg.dev",scope="repository:REPO:pull"`},
	{name: "Container Registry", registry: "gcr.io", upstream: "http://gcr.io", user: "oauth2accesstoken", field: "token", expiresIn: 43200,
		challenge: `Bearer realm="http://gcr.io/v2/token",service="gcr.io",scope="repository:REPO:pull"`,
		cdn:       "storage.googleapis.com"},
	// `az acr login` stores a refresh token as identity token (Azure/acr, docs/AAD-OAuth.md); storage
	// refuses an Authorization (Azure/acr#217).
	{name: "ACR", registry: "acme.azurecr.io", upstream: "http://acme.azurecr.io", user: "00000000-0000-0000-0000-000000000000", field: "access_token", identity: true,
		challenge: `Bearer realm="http://acme.azurecr.io/oauth2/token",service="acme.azurecr.io",scope="repository:REPO:pull"`,
		cdn:       "weumanaged1.blob.core.windows.net"},
	// Header as in google/go-containerregistry#1493; robots are robot$name. A project may stand in
	// for another registry.
	{name: "Harbor", registry: "docker.io", upstream: "http://harbor.example.com/hub", user: "robot$larder", expiresIn: 1800, field: "token",
		challenge: `Bearer realm="http://harbor.example.com/service/token",service="harbor-registry",scope="repository:REPO:pull"`},
	// Its token service is the web server, on another name; 403 to a wrong token (canonical/microk8s#4754);
	// no expires_in.
	{name: "GitLab", registry: "registry.gitlab.com", upstream: "http://registry.gitlab.com", field: "token", badLogin: 403,
		challenge: `Bearer realm="http://gitlab.com/jwt/auth",service="container_registry",scope="repository:REPO:pull"`,
		cdn:       "cdn.registry.gitlab-static.net"},
	{name: "GitLab on two domains", registry: "registry.acme.test", upstream: "http://registry.acme.test", field: "token",
		challenge: `Bearer realm="http://gitlab.corp.test/jwt/auth",service="container_registry",scope="repository:REPO:pull"`,
		realms:    []string{"gitlab.corp.test"}},
	{name: "GitLab on two domains, not listed", registry: "registry.acme.test", upstream: "http://registry.acme.test", field: "token",
		challenge: `Bearer realm="http://gitlab.corp.test/jwt/auth",service="container_registry",scope="repository:REPO:pull"`,
		refused:   true},
	// By repository path and behind a reverse proxy (jfrog.com, "Docker Registry"); older ones ask
	// for the password.
	{name: "Artifactory", registry: "acme.jfrog.io", upstream: "http://acme.jfrog.io/artifactory/api/docker/docker-local/v2", expiresIn: 3600, field: "token",
		challenge: `Bearer realm="http://acme.jfrog.io/artifactory/api/docker/docker-local/v2/token",service="acme.jfrog.io",scope="repository:REPO:pull"`,
		cdn:       "jfrog-prod-euw1-shared-ireland-main.s3.amazonaws.com"},
	{name: "Artifactory, Basic", registry: "docker.acme.test", upstream: "http://docker.acme.test", challenge: `Basic realm="Artifactory Realm"`},
	{name: "Artifactory, both", registry: "docker.acme.test", upstream: "http://docker.acme.test", field: "token",
		challenge: `Bearer realm="http://docker.acme.test/v2/token",service="docker.acme.test",scope="repository:REPO:pull", Basic realm="Artifactory Realm"`},
	// distribution with auth: htpasswd.
	{name: "htpasswd", registry: "registry.example.com:5000", upstream: "http://registry.example.com:5000", closed: true, challenge: `Basic realm="Registry Realm"`},
}

func (f family) basic() bool { return strings.HasPrefix(f.challenge, "Basic") }

const (
	publicRepo  = "open/app"
	privateRepo = "team/app"
)

// internet is every host that a family needs, behind one listener.
type internet struct {
	family
	t     *testing.T
	image *registrytest.Image

	mu         sync.Mutex // guards all below
	password   string
	generation int    // of tokens
	cut        bool   // the next blob body is cut
	onCut      func() // called with mu held
	leaks      []string
	tokens     int
}

// client is a client of f whose every connection ends at n.
func (n *internet) client(credentials func(context.Context, CredentialRequest) ([]authn.AuthConfig, error)) *Client {
	at := serve(n.t, n.ServeHTTP)
	c := newClient(n.t, func(cfg *Config) { cfg.Credentials = credentials },
		Registry{Host: n.registry, Auth: "node", Upstreams: []string{n.upstream}, TokenRealms: n.realms})
	c.proxyFunc = func(*url.URL) (*url.URL, error) { return at, nil }
	return c
}

func (n *internet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n.mu.Lock()
	defer n.mu.Unlock()
	u, err := url.Parse(n.upstream)
	if err != nil {
		n.t.Error(err)
	}
	realm := ""
	if c := parseChallenges([]string{n.challenge})[0]; c.scheme == "bearer" {
		realm = strings.TrimPrefix(c.params["realm"], "http://")
	}
	switch {
	case r.Host+r.URL.Path == realm:
		n.serveToken(w, r)
	case r.Host == u.Host:
		n.serveRegistry(w, r)
	case n.cdn != "" && r.Host == n.cdn:
		n.serveCDN(w, r)
	default:
		n.leaks = append(n.leaks, "asked "+r.Host)
		w.WriteHeader(http.StatusTeapot)
	}
}

// login says who sent a password: nobody is "".
func (n *internet) login(user, password string) (string, bool) {
	return n.user, user == n.user && password == n.password
}

func (n *internet) serveToken(w http.ResponseWriter, r *http.Request) {
	n.tokens++
	user, ok := "", true
	if name, password, sent := r.BasicAuth(); sent {
		user, ok = n.login(name, password)
	}
	scopes := r.URL.Query()["scope"]
	if r.Method == http.MethodPost {
		if !n.identity {
			http.NotFound(w, r)
			return
		}
		if err := r.ParseForm(); err != nil {
			n.t.Error(err)
		}
		scopes = strings.Fields(r.PostForm.Get("scope"))
		user, ok = n.login(n.user, r.PostForm.Get("refresh_token"))
	}
	grant := slices.Contains(scopes, "repository:"+n.repo(publicRepo)+":pull") || user != "" && slices.Contains(scopes, "repository:"+n.repo(privateRepo)+":pull")
	switch {
	case !ok:
		n.deny(w, r, or(n.badLogin, http.StatusUnauthorized))
	case !grant && n.noGrant != 0:
		n.deny(w, r, n.noGrant)
	default:
		body := map[string]any{n.field: fmt.Sprintf("token-%d-%t-%s", n.generation, grant, user)}
		if n.expiresIn > 0 {
			body["expires_in"] = n.expiresIn
		}
		json.NewEncoder(w).Encode(body)
	}
}

func or(status, def int) int {
	if status == 0 {
		return def
	}
	return status
}

// repo is the repository as the registry knows it.
func (n *internet) repo(name string) string {
	a, err := parseEndpoint(n.upstream)
	if err != nil {
		n.t.Error(err)
	}
	return a.prefix + name
}

// deny repeats what was sent, as a careless registry might.
func (n *internet) deny(w http.ResponseWriter, r *http.Request, status int) {
	_, password, _ := r.BasicAuth()
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":"no: %s%s%s"}]}`, r.Header.Get("Authorization"), password, r.PostForm.Get("refresh_token"))
}

func (n *internet) serveRegistry(w http.ResponseWriter, r *http.Request) {
	private := strings.Contains(r.URL.Path, "/"+privateRepo+"/")
	if status := n.authorize(r.Header.Get("Authorization"), private); status != 0 {
		if status == http.StatusUnauthorized {
			repo := n.repo(publicRepo)
			if private {
				repo = n.repo(privateRepo)
			}
			w.Header().Set("WWW-Authenticate", strings.ReplaceAll(n.challenge, "REPO", repo))
		}
		n.deny(w, r, status)
		return
	}
	if n.limits {
		w.Header().Set("Ratelimit-Limit", "100;w=21600")
		w.Header().Set("Ratelimit-Remaining", "76;w=21600")
	}
	if !strings.Contains(r.URL.Path, "/blobs/") {
		root := n.image.Manifests[len(n.image.Manifests)-1]
		w.Header().Set("Content-Type", root.MediaType)
		w.Header().Set("Docker-Content-Digest", root.Digest.String())
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(root.Data))
		return
	}
	if n.cdn != "" {
		http.Redirect(w, r, "http://"+n.cdn+r.URL.Path+"?X-Amz-Signature=signed", http.StatusTemporaryRedirect)
		return
	}
	n.serveBlob(w, r)
}

// authorize is the status of a refusal, 0 if the request may pass.
func (n *internet) authorize(header string, private bool) int {
	scheme, value, _ := strings.Cut(header, " ")
	switch {
	case scheme == "Basic" && strings.Contains(n.challenge, "Basic"):
		raw, _ := base64.StdEncoding.DecodeString(value)
		user, password, _ := strings.Cut(string(raw), ":")
		if _, ok := n.login(user, password); ok {
			return 0
		}
		return or(n.badToken, http.StatusUnauthorized)
	case scheme == "Basic":
		return or(n.badToken, http.StatusUnauthorized)
	case scheme == "Bearer":
		var generation int
		var grant bool
		if k, _ := fmt.Sscanf(value, "token-%d-%t", &generation, &grant); k != 2 || generation != n.generation {
			return or(n.badToken, http.StatusUnauthorized)
		}
		if grant {
			return 0
		}
		return http.StatusUnauthorized
	case n.basic() && !n.closed && !private:
		return 0
	}
	return http.StatusUnauthorized
}

// serveCDN refuses what storage services refuse: two ways of authentication at once.
func (n *internet) serveCDN(w http.ResponseWriter, r *http.Request) {
	if a := r.Header.Get("Authorization"); a != "" {
		n.leaks = append(n.leaks, a)
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	n.serveBlob(w, r)
}

func (n *internet) serveBlob(w http.ResponseWriter, r *http.Request) {
	_, d, _ := strings.Cut(r.URL.Path, "/blobs/")
	c, ok := n.image.Blobs[digest.Digest(d)]
	if !ok {
		http.NotFound(w, r)
		return
	}
	body := content(n.t, c)
	if n.cut && r.Method == http.MethodGet {
		n.cut = false
		n.onCut()
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		w.Write(body[:len(body)/2])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
}

// TestFamilies takes each family through a pull by nobody, with the right, a
// wrong and an expiring credential.
func TestFamilies(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			if f.user == "" {
				f.user = "ann"
			}
			if f.refused {
				n, c := newInternet(t, f, "secret")
				err := n.pull(c, publicRepo)
				if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "token_realms") || n.tokens > 0 {
					t.Errorf("a realm elsewhere: %v, asked %d times", err, n.tokens)
				}
				return
			}
			t.Run("anonymous", f.anonymous)
			t.Run("right", f.right)
			t.Run("wrong", f.wrong)
			t.Run("expiry", f.expiry)
		})
	}
}

// newInternet has the password "secret"; the node has the given one, none if
// that is empty.
func newInternet(t *testing.T, f family, password string) (*internet, *Client) {
	n := &internet{family: f, t: t, password: "secret", image: registrytest.OCIImage(registrytest.ImageSpec{Seed: 5, Layers: []int64{200_000}, Opaque: true})}
	c := n.client(func(_ context.Context, r CredentialRequest) ([]authn.AuthConfig, error) {
		if password == "" {
			return nil, nil
		}
		return []authn.AuthConfig{n.credential(password)}, nil
	})
	t.Cleanup(func() {
		for _, leak := range n.leaks {
			t.Errorf("a host that must not see it: %s", leak)
		}
	})
	return n, c
}

func (n *internet) credential(password string) authn.AuthConfig {
	if n.name == "ACR" {
		return authn.AuthConfig{Username: n.user, IdentityToken: password}
	}
	return authn.AuthConfig{Username: n.user, Password: password}
}

// pull is what a pull asks: tag, manifest, size and bytes of a blob.
func (n *internet) pull(c *Client, repository string) error {
	who := Target{Registry: n.registry, Repository: repository}
	if _, err := c.Resolve(n.t.Context(), who, "v1", nil); err != nil {
		return err
	}
	if _, _, err := c.Manifest(n.t.Context(), who, "v1", nil); err != nil {
		return err
	}
	d := n.image.Layers[0].Digest
	if size, err := c.Stat(n.t.Context(), who, d); err != nil || size != n.image.Layers[0].Size {
		return fmt.Errorf("size %d: %w", size, err)
	}
	sink := newSink(64 << 10)
	if err := c.Fetch(n.t.Context(), who, d, sink); err != nil {
		return err
	}
	sink.check(n.t, d)
	return nil
}

func (f family) anonymous(t *testing.T) {
	n, c := newInternet(t, f, "")
	err := n.pull(c, publicRepo)
	switch {
	case f.closed && !IsUnauthorized(err):
		t.Errorf("public: %v, want unauthorized", err)
	case !f.closed && err != nil:
		t.Errorf("public: %v", err)
	}
	f.checkRefused(n, c)
	if h := c.Health()[0]; f.limits && (h.RateLimit == nil || h.RateLimit.Remaining != 76) {
		t.Errorf("health: %+v", h.RateLimit)
	}
}

// checkRefused holds that a private repository is refused, with the challenge
// that a client without a token gets, and that the error shows no secret.
func (f family) checkRefused(n *internet, c *Client) {
	n.t.Helper()
	who := Target{Registry: n.registry, Repository: privateRepo}
	_, _, manifest := c.Manifest(n.t.Context(), who, "v1", nil)
	want := strings.ReplaceAll(f.challenge, "REPO", f.scopeOf(privateRepo))
	for op, err := range map[string]error{"pull": n.pull(c, privateRepo), "manifest": manifest} {
		if !IsUnauthorized(err) {
			n.t.Errorf("private: %s: %v, want unauthorized", op, err)
			continue
		}
		e, _ := errors.AsType[*Error](err)
		if len(e.Challenge) != 1 || strings.ReplaceAll(e.Challenge[0], " ", "") != strings.ReplaceAll(want, " ", "") {
			n.t.Errorf("%s: challenge %q, want %q", op, e.Challenge, want)
		}
		for _, secret := range []string{"guess", "secret", "token-", "Bearer", base64.StdEncoding.EncodeToString([]byte(n.user + ":"))[:4]} {
			if strings.Contains(err.Error(), secret) {
				n.t.Errorf("%s: shows %q: %v", op, secret, err)
			}
		}
	}
}

func (f family) scopeOf(repository string) string {
	a, _ := parseEndpoint(f.upstream)
	return a.prefix + repository
}

func (f family) right(t *testing.T) {
	n, c := newInternet(t, f, "secret")
	for range 2 { // the second time with what was learned
		if err := n.pull(c, privateRepo); err != nil {
			t.Errorf("private: %v", err)
		}
	}
	if err := n.pull(c, publicRepo); err != nil {
		t.Errorf("public: %v", err)
	}
	if want := map[bool]int{true: 0, false: 2}[f.basic()]; n.tokens != want {
		t.Errorf("%d tokens for two repositories", n.tokens)
	}
}

// wrong also pins that a wrong credential does not close what is open to all.
func (f family) wrong(t *testing.T) {
	n, c := newInternet(t, f, "guess")
	f.checkRefused(n, c)
	if err := n.pull(c, publicRepo); err != nil && !f.closed {
		t.Errorf("public: %v", err)
	}
}

// expiry ends tokens, or the password where there are none, in the middle of a
// blob; the node finds the new password when it looks again.
func (f family) expiry(t *testing.T) {
	n, _ := newInternet(t, f, "")
	node := "secret"
	c := n.client(func(_ context.Context, r CredentialRequest) ([]authn.AuthConfig, error) {
		if r.Refresh {
			n.mu.Lock()
			node = n.password
			n.mu.Unlock()
		}
		return []authn.AuthConfig{n.credential(node)}, nil
	})
	n.cut, n.onCut = true, func() {
		n.generation++
		if f.basic() {
			n.password = "rotated"
		}
		for _, s := range c.sessions.values() { // it lived for some time
			s.mu.Lock()
			s.issued = s.issued.Add(-tokenDoubt)
			s.mu.Unlock()
		}
	}
	if err := n.pull(c, privateRepo); err != nil {
		t.Errorf("private: %v", err)
	}
	if n.cut {
		t.Error("nothing was cut")
	}
}

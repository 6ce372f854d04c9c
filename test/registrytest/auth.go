package registrytest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

// Scheme is how a registry asks for credentials.
type Scheme string

// The schemes of authentication.
const (
	NoAuth Scheme = ""
	Basic  Scheme = "basic"
	Bearer Scheme = "bearer"
)

// Auth says who may pull what.
type Auth struct {
	Scheme Scheme
	// Users are passwords by name.
	Users map[string]string
	// Access lists, by user, the repositories the user may pull, as path.Match
	// patterns; a user who is not in it may pull all.
	Access map[string][]string
	// Anonymous lists the repositories that anybody may pull.
	Anonymous []string
	// TokenLife is how long a token is good (default 5 min).
	TokenLife time.Duration
}

// gate decides who may pull what, and which tokens are good.
type gate struct {
	Auth
	realm string // of the token server

	mu         sync.Mutex        // guards what is below
	generation int               // of tokens; an older one has been revoked
	added      map[string]string // passwords by name, after the start
}

// service is what the registry calls itself in its challenges.
const service = "registrytest"

// ExpireTokens makes all tokens issued so far invalid.
func (s *Server) ExpireTokens() {
	s.gate.mu.Lock()
	defer s.gate.mu.Unlock()
	s.gate.generation++
}

// AddUser makes a user who may pull all.
func (s *Server) AddUser(name, password string) {
	s.gate.mu.Lock()
	defer s.gate.mu.Unlock()
	if s.gate.added == nil {
		s.gate.added = map[string]string{}
	}
	s.gate.added[name] = password
}

// password is the one that a user has to know.
func (g *gate) password(name string) (want string, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if want, ok = g.added[name]; !ok {
		want, ok = g.Users[name]
	}
	return want, ok
}

func (g *gate) current() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.generation
}

// mayPull says whether a user ("" = nobody) may pull from a repository.
func (g *gate) mayPull(user, repo string) bool {
	if matchAny(g.Anonymous, repo) {
		return true
	}
	if user == "" {
		return false
	}
	patterns, restricted := g.Access[user]
	return !restricted || matchAny(patterns, repo)
}

func matchAny(patterns []string, repo string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, repo)
		return ok && err == nil
	})
}

// login returns the user of a name and password.
func (g *gate) login(name, password string) (string, bool) {
	want, ok := g.password(name)
	return name, ok && want == password
}

// token is what a bearer token says, readable by anybody. It has the shape of a
// JWT with a signature that only says who made it: this is a test.
type token struct {
	Issuer     string   `json:"iss"`
	User       string   `json:"sub"`
	Expires    int64    `json:"exp"`
	Issued     int64    `json:"iat"`
	Pull       []string `json:"pull"`
	Generation int      `json:"gen"`
	Serial     int64    `json:"jti"`
}

var jwtHeader = base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"JWT"}`))

func (t token) encode() string {
	return jwtHeader + "." + base64.RawURLEncoding.EncodeToString(mustJSON(t)) + ".c2lnbmF0dXJl"
}

func decodeToken(s string) (t token, ok bool) {
	parts := strings.Split(s, ".")
	if len(parts) != 3 {
		return t, false
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	return t, err == nil && json.Unmarshal(b, &t) == nil && t.Issuer == service
}

// challenge is the WWW-Authenticate header to answer with, "" if the request may
// pass.
func (g *gate) challenge(r *http.Request, repo string) string {
	switch g.Scheme {
	case Basic:
		return g.challengeBasic(r, repo)
	case Bearer:
		return g.challengeBearer(r, repo)
	default:
		return ""
	}
}

func (g *gate) challengeBasic(r *http.Request, repo string) string {
	name, password, sent := r.BasicAuth()
	user, ok := g.login(name, password)
	if ok && (repo == "" || g.mayPull(user, repo)) || !sent && repo != "" && g.mayPull("", repo) {
		return ""
	}
	return fmt.Sprintf("Basic realm=%q", service)
}

func (g *gate) challengeBearer(r *http.Request, repo string) string {
	c := fmt.Sprintf("Bearer realm=%q,service=%q", g.realm, service)
	if repo != "" {
		c += fmt.Sprintf(",scope=\"repository:%s:pull\"", repo)
	}
	raw, sent := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	t, ok := decodeToken(raw)
	switch {
	case !sent:
		return c
	case !ok || t.Generation != g.current() || time.Now().Unix() >= t.Expires:
		return c + `,error="invalid_token"`
	case repo != "" && !slices.Contains(t.Pull, repo):
		return c + `,error="insufficient_scope"`
	default:
		return ""
	}
}

// serveToken is the token server: GET with Basic or without credentials, and
// POST as in OAuth 2 (password and refresh_token), whose refresh tokens are
// "refresh:" and the name of the user.
func (s *Server) serveToken(w http.ResponseWriter, r *http.Request) {
	entry := s.newRequest(TokenServer, r)
	entry.Kind = Token
	s.serve(entry, w, r, func() *answer {
		a := newAnswer(entry)
		user, scopes, ok := s.gate.tokenRequest(r)
		if !ok {
			a.setError(http.StatusUnauthorized, "UNAUTHORIZED", "wrong user or password")
			return a
		}
		a.header.Set("Content-Type", "application/json")
		a.content = Bytes(mustJSON(s.gate.issue(user, scopes)))
		return a
	})
}

// tokenRequest is who asks for which scopes.
func (g *gate) tokenRequest(r *http.Request) (user string, scopes []string, ok bool) {
	if r.Method != http.MethodPost {
		name, password, sent := r.BasicAuth()
		if !sent {
			return "", r.URL.Query()["scope"], true
		}
		user, ok = g.login(name, password)
		return user, r.URL.Query()["scope"], ok
	}
	if err := r.ParseForm(); err != nil {
		return "", nil, false
	}
	scopes = strings.Fields(r.PostForm.Get("scope"))
	if name, refresh := strings.CutPrefix(r.PostForm.Get("refresh_token"), "refresh:"); refresh {
		_, known := g.password(name)
		return name, scopes, known
	}
	user, ok = g.login(r.PostForm.Get("username"), r.PostForm.Get("password"))
	return user, scopes, ok
}

// issue makes a token for what the user may pull of the scopes asked for; like
// Docker Hub it never refuses, but may grant nothing.
func (g *gate) issue(user string, scopes []string) map[string]any {
	life := g.TokenLife
	if life == 0 {
		life = 5 * time.Minute
	}
	now := time.Now()
	t := token{
		Issuer: service, User: user, Generation: g.current(),
		Issued: now.Unix(), Expires: now.Add(life).Unix(), Serial: now.UnixNano(),
	}
	for _, scope := range scopes {
		parts := strings.Split(scope, ":")
		if len(parts) == 3 && parts[0] == "repository" && g.mayPull(user, parts[1]) {
			t.Pull = append(t.Pull, parts[1])
		}
	}
	out := map[string]any{
		"token": t.encode(), "access_token": t.encode(),
		"expires_in": int(life.Seconds()), "issued_at": now.UTC().Format(time.RFC3339),
	}
	if user != "" {
		out["refresh_token"] = "refresh:" + user
	}
	return out
}

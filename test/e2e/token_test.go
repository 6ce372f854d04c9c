package e2e

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"path"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	tokenService = "test registry"
	tokenIssuer  = "test tokens"
)

// tokenServer is the token service of a registry, as its users know it: GET with
// Basic or anonymous, and POST with the password of OAuth 2.
type tokenServer struct {
	t      *testing.T
	ca     *authority
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
	server *http.Server
	addr   string
}

// passwords of those the token server knows.
var passwords = map[string]string{ann.Username: ann.Password, "bob": "hunter2"}

// entitled are the repositories that users may pull, as path.Match has them; ann
// may also push. Nobody is the user "".
var entitled = map[string][]string{"ann": {"*/*"}, "bob": {"b/*", "public/*"}, "": {"public/*"}}

func startTokenServer(t *testing.T, l net.Listener) *tokenServer {
	t.Helper()
	s := &tokenServer{t: t, ca: newAuthority(t, tempDir(t)), key: newKey(t), addr: l.Addr().String()}
	s.cert = s.ca.sign(&x509.Certificate{Subject: pkix.Name{CommonName: tokenIssuer}}, s.key)
	s.server = &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- s.server.Serve(l) }()
	t.Cleanup(func() {
		s.stop()
		<-served
	})
	return s
}

func (s *tokenServer) stop() { s.server.Close() }

// auth is the section of a registry's configuration that sends clients here.
func (s *tokenServer) auth() string {
	return fmt.Sprintf("{token: {realm: %q, service: %q, issuer: %q, rootcertbundle: %q}}",
		"http://"+s.addr+"/token", tokenService, tokenIssuer, s.ca.file)
}

// pusher is ann's Authorization for a repository.
func (s *tokenServer) pusher(repository string) string {
	token, err := s.token(ann.Username, []string{"repository:" + repository + ":pull,push"})
	if err != nil {
		s.t.Fatal(err)
	}
	return "Bearer " + token
}

func (s *tokenServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user, password, sent := r.BasicAuth()
	if r.Method == http.MethodPost {
		user, password, sent = r.PostFormValue("username"), r.PostFormValue("password"), true
	}
	if want, known := passwords[user]; sent && (!known || password != want) {
		http.Error(w, "wrong user or password", http.StatusUnauthorized)
		return
	}
	token, err := s.token(user, strings.Fields(strings.Join(r.Form["scope"], " ")+" "+strings.Join(r.URL.Query()["scope"], " ")))
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": 300}) // the client may be gone
}

// grant is one entry of a token's access claim.
type grant struct {
	Type    string   `json:"type"`
	Name    string   `json:"name"`
	Actions []string `json:"actions"`
}

// grants are what a user gets of the scopes asked for: none is no error.
func grants(user string, scopes []string) (out []grant) {
	for _, scope := range scopes {
		parts := strings.Split(scope, ":")
		if len(parts) != 3 || !slices.ContainsFunc(entitled[user], func(pattern string) bool {
			ok, err := path.Match(pattern, parts[1])
			return ok && err == nil
		}) {
			continue
		}
		g := grant{Type: parts[0], Name: parts[1], Actions: []string{"pull"}}
		if user == ann.Username {
			g.Actions = append(g.Actions, "push")
		}
		out = append(out, g)
	}
	return out
}

// token is a JWT signed with ES256; its x5c header has the certificate of the key.
func (s *tokenServer) token(user string, scopes []string) (string, error) {
	header, err := json.Marshal(map[string]any{"typ": "JWT", "alg": "ES256", "x5c": []string{base64.StdEncoding.EncodeToString(s.cert.Raw)}})
	if err != nil {
		return "", err
	}
	now := time.Now()
	claims, err := json.Marshal(map[string]any{
		"iss": tokenIssuer, "sub": user, "aud": tokenService, "jti": rand.Text(), "access": grants(user, scopes),
		"iat": now.Unix(), "nbf": now.Add(-time.Minute).Unix(), "exp": now.Add(5 * time.Minute).Unix(),
	})
	if err != nil {
		return "", err
	}
	signed := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(claims)
	sum := sha256.Sum256([]byte(signed))
	r, v, err := ecdsa.Sign(rand.Reader, s.key, sum[:])
	if err != nil {
		return "", err
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	v.FillBytes(signature[32:])
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}

package main

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
)

// apiServer is as much of Kubernetes as a Secret is created with. The real one
// is in the tests of a whole cluster.
type apiServer struct {
	*httptest.Server

	mu      sync.Mutex // guards what follows
	secrets map[string]secretObject
	refuse  string
}

func startAPIServer(t *testing.T) *apiServer {
	s := &apiServer{secrets: map[string]secretObject{}}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	return s
}

func (s *apiServer) serve(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	answer := func(code int, message string) {
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind":"Status","message":%q}`, message)
	}
	var secret secretObject
	switch {
	case r.Method != "POST" || r.URL.Path != "/api/v1/namespaces/cache/secrets":
		answer(404, r.Method+" "+r.URL.Path)
	case !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer h."):
		answer(401, "Unauthorized")
	case s.refuse != "":
		answer(403, s.refuse)
	case json.NewDecoder(r.Body).Decode(&secret) != nil || secret.Kind != "Secret":
		answer(400, "no Secret")
	case s.secrets[secret.Metadata.Name].Kind != "":
		answer(409, "already exists")
	default:
		s.secrets[secret.Metadata.Name] = secret
		answer(201, "")
	}
}

// asPod makes this process look like a pod of namespace cache.
func (s *apiServer) asPod(t *testing.T, claims string) string {
	t.Helper()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(u.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", host)
	t.Setenv("KUBERNETES_SERVICE_PORT", port)
	dir := t.TempDir()
	for name, body := range map[string]string{
		"token":     "h." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".s",
		"namespace": "cache\n",
		"ca.crt":    string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const accountClaims = `{"kubernetes.io":{"namespace":"cache","serviceaccount":{"name":"larder-keygen","uid":"7-7"}}}`

// TestCreateSecret holds that the first key stays: a second run, whoever makes
// it, must not cut the cluster in two.
func TestCreateSecret(t *testing.T) {
	s := startAPIServer(t)
	p, err := thisPod(s.asPod(t, accountClaims))
	if err != nil {
		t.Fatal(err)
	}
	first := newKey()
	for i, key := range []string{first, newKey()} {
		created, err := p.createSecret(t.Context(), "larder", key)
		if err != nil || created != (i == 0) {
			t.Fatalf("run %d: created %v, %v", i+1, created, err)
		}
	}
	got := s.secrets["larder"]
	if string(got.Data["key"]) != first+"\n" {
		t.Errorf("the Secret holds %q", got.Data["key"])
	}
	want := []ownerReference{{APIVersion: "v1", Kind: "ServiceAccount", Name: "larder-keygen", UID: "7-7"}}
	if !reflect.DeepEqual(got.Metadata.Owners, want) {
		t.Errorf("owned by %+v, want %+v", got.Metadata.Owners, want)
	}
}

func TestCreateSecretRefused(t *testing.T) {
	s := startAPIServer(t)
	p, err := thisPod(s.asPod(t, `not JSON`))
	if err != nil {
		t.Fatal(err)
	}
	if owners := p.owners(); owners != nil {
		t.Errorf("a token without claims names %v", owners)
	}
	s.refuse = `secrets is forbidden: User "x" cannot create resource "secrets"`
	if _, err := p.createSecret(t.Context(), "larder", newKey()); err == nil || !strings.Contains(err.Error(), s.refuse) {
		t.Errorf("refused with %v", err)
	}
	s.CloseClientConnections()
	s.Close()
	if _, err := p.createSecret(t.Context(), "larder", newKey()); err == nil || strings.Contains(err.Error(), p.token) {
		t.Errorf("an API server that is gone: %v", err)
	}
}

func TestNoPod(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	var stdout, stderr strings.Builder
	if code := run(t.Context(), []string{"keygen", "--secret", "larder"}, &stdout, &stderr); code != exitUsage || !strings.Contains(stderr.String(), "kubectl create secret") {
		t.Errorf("exit code %d, %s", code, stderr.String())
	}
	s := startAPIServer(t)
	dir := s.asPod(t, accountClaims)
	if err := os.Remove(filepath.Join(dir, "token")); err != nil {
		t.Fatal(err)
	}
	if _, err := thisPod(dir); err == nil || !strings.Contains(err.Error(), "automountServiceAccountToken") {
		t.Errorf("without a token: %v", err)
	}
}

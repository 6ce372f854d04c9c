package registrytest_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	. "github.com/larder-cache/larder/test/registrytest"
)

var users = map[string]string{"alice": "a", "bob": "b"}

func TestAccess(t *testing.T) {
	access := Auth{
		Users:     users,
		Access:    map[string][]string{"bob": {"team/b*"}},
		Anonymous: []string{"library/*"},
	}
	for _, scheme := range []Scheme{Basic, Bearer} {
		auth := access
		auth.Scheme = scheme
		s := Start(t, Options{Auth: auth})
		for _, repo := range []string{"library/app", "team/a", "team/b"} {
			s.Put(repo, OCIImage(ImageSpec{Seed: 1, Layers: []int64{10}}), "v1")
		}
		for _, tc := range []struct {
			user, password, repo string
			ok                   bool
		}{
			{"", "", "library/app", true},
			{"", "", "team/a", false},
			{"alice", "a", "team/a", true},
			{"alice", "wrong", "team/a", false},
			{"alice", "a", "library/app", true},
			{"bob", "b", "team/a", false},
			{"bob", "b", "team/b", true},
			{"bob", "b", "library/app", true},
			{"carol", "", "team/a", false},
		} {
			if scheme == Basic && tc.user == "" {
				continue // go-containerregistry pings, which needs a user with Basic
			}
			t.Run(fmt.Sprintf("%s/%s:%s/%s", scheme, tc.user, tc.password, tc.repo), func(t *testing.T) {
				login := authn.Anonymous
				if tc.user != "" {
					login = &authn.Basic{Username: tc.user, Password: tc.password}
				}
				err := pull(t, s, s.Ref(tc.repo, "v1"), login)
				var denied *transport.Error
				if tc.ok && err != nil || !tc.ok && (!errors.As(err, &denied) || denied.StatusCode != http.StatusUnauthorized) {
					t.Errorf("got %v, want ok %v", err, tc.ok)
				}
			})
		}
	}
}

// token asks the token server as containerd does, by POST.
func token(t *testing.T, s *Server, form url.Values) (int, string) {
	t.Helper()
	resp, err := client(t, s).PostForm(s.TokenURL(), form)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var out struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, out.AccessToken
}

func TestTokenByPost(t *testing.T) {
	s := Start(t, Options{Auth: Auth{Scheme: Bearer, Users: users}})
	s.PutManifest("team/a", "x/y", []byte("{}"), "v1")
	scope := "repository:team/a:pull"
	for name, tc := range map[string]struct {
		form url.Values
		want int
	}{
		"password":         {url.Values{"grant_type": {"password"}, "username": {"alice"}, "password": {"a"}, "scope": {scope}}, 200},
		"wrong password":   {url.Values{"grant_type": {"password"}, "username": {"alice"}, "password": {"b"}, "scope": {scope}}, 401},
		"refresh":          {url.Values{"grant_type": {"refresh_token"}, "refresh_token": {"refresh:alice"}, "scope": {scope}}, 200},
		"unknown refresh":  {url.Values{"grant_type": {"refresh_token"}, "refresh_token": {"refresh:carol"}, "scope": {scope}}, 401},
		"no user, no form": {url.Values{}, 401},
	} {
		t.Run(name, func(t *testing.T) {
			code, tok := token(t, s, tc.form)
			if code != tc.want {
				t.Fatalf("status %d, want %d", code, tc.want)
			}
			if code != 200 {
				return
			}
			resp, _, err := get(t, client(t, s), s.URL()+"/v2/team/a/manifests/v1", "Authorization", "Bearer "+tok)
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("with the token: %v, %v", resp, err)
			}
		})
	}
}

// TestExpiry pins the challenges that clients must tell apart: none sent, sent
// but expired, sent but for something else.
func TestExpiry(t *testing.T) {
	s := Start(t, Options{Auth: Auth{Scheme: Bearer, Users: users}})
	d := s.PutBlob("team/a", Random(1, 100))
	s.PutBlobAs("team/b", d.Digest, Random(1, 100))
	_, tok := token(t, s, url.Values{"username": {"alice"}, "password": {"a"}, "scope": {"repository:team/a:pull"}})
	ask := func(repo, authorization string) (int, string) {
		resp, _, err := get(t, client(t, s), s.URL()+"/v2/"+repo+"/blobs/"+d.Digest.String(), "Authorization", authorization)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, resp.Header.Get("WWW-Authenticate")
	}
	want := func(repo, authorization string, code int, hint string) {
		t.Helper()
		got, challenge := ask(repo, authorization)
		if got != code || !strings.Contains(challenge, hint) || hint == "" && strings.Contains(challenge, "error=") {
			t.Errorf("%s with %.10q: %d, %q", repo, authorization, got, challenge)
		}
	}
	want("team/a", "", 401, `scope="repository:team/a:pull"`)
	want("team/a", "Bearer nonsense", 401, "invalid_token")
	want("team/a", "Bearer "+tok, 200, "")
	want("team/b", "Bearer "+tok, 401, "insufficient_scope")
	s.ExpireTokens()
	want("team/a", "Bearer "+tok, 401, "invalid_token")
}

// TestExpiryInTheMiddle is a blob whose connection ends when its token does: the
// rest must be asked for with a new one.
func TestExpiryInTheMiddle(t *testing.T) {
	s := Start(t, Options{Auth: Auth{Scheme: Bearer, Users: users}})
	d := s.PutBlob("team/a", Random(1, 1000))
	_, tok := token(t, s, url.Values{"username": {"alice"}, "password": {"a"}, "scope": {"repository:team/a:pull"}})
	s.Inject(Match{Kind: Blob}, Times(1), Do(s.ExpireTokens), CutAfter(400))
	url := s.URL() + "/v2/team/a/blobs/" + d.Digest.String()
	_, b, err := get(t, client(t, s), url, "Authorization", "Bearer "+tok)
	if len(b) != 400 || err == nil {
		t.Errorf("first: %d bytes, %v", len(b), err)
	}
	resp, _, err := get(t, client(t, s), url, "Authorization", "Bearer "+tok, "Range", "bytes=400-")
	if err != nil || resp.StatusCode != 401 {
		t.Errorf("resumed with the old token: %v, %v", resp, err)
	}
}

// TestFaultsPassOverChallenges pins that "the first blob request" means the
// first that would have been answered.
func TestFaultsPassOverChallenges(t *testing.T) {
	s := Start(t, Options{Auth: Auth{Scheme: Basic, Users: users}})
	late := s.Inject(Match{Kind: Blob}, Times(1), Status(500))
	url := s.URL() + "/v2/team/a/blobs/x"
	for i, tc := range []struct {
		authorization string
		want          int
	}{{"", 401}, {"Basic YWxpY2U6YQ==", 500}, {"Basic YWxpY2U6YQ==", 404}} {
		resp, _, err := get(t, client(t, s), url, "Authorization", tc.authorization)
		if err != nil || resp.StatusCode != tc.want {
			t.Errorf("request %d: %v, %v; want %d", i, resp, err, tc.want)
		}
	}
	if late.Hits() != 1 {
		t.Errorf("hit %d times", late.Hits())
	}
	s.Inject(Match{Kind: Blob}, EvenUnauthorized(), Status(503))
	if resp, _, err := get(t, client(t, s), url); err != nil || resp.StatusCode != 503 {
		t.Errorf("even unauthorized: %v, %v", resp, err)
	}
}

// TestCDNSeesNoCredentials pins both halves: a client that behaves gets its blob
// and its Authorization is not seen; one that does not gets an error.
func TestCDNSeesNoCredentials(t *testing.T) {
	s := Start(t, Options{CDN: true, Auth: Auth{Scheme: Basic, Users: users}})
	d := s.PutBlob("team/a", Random(1, 1000))
	c := client(t, s)
	basic := "Basic YWxpY2U6YQ=="
	resp, b, err := get(t, c, s.URL()+"/v2/team/a/blobs/"+d.Digest.String(), "Authorization", basic)
	if err != nil || len(b) != 1000 {
		t.Fatalf("got %v, %v", resp, err)
	}
	if seen := s.Seen(Match{Role: CDN}); !slices.Equal(seen, []string{""}) {
		t.Errorf("the CDN saw %q", seen)
	}
	if seen := s.Seen(Match{Role: Registry}); !slices.Equal(seen, []string{basic}) {
		t.Errorf("the registry saw %q", seen)
	}
	if n := s.Bytes(Match{Role: CDN}); n != 1000 {
		t.Errorf("the CDN sent %d bytes", n)
	}
	resp, _, err = get(t, c, resp.Request.URL.String(), "Authorization", basic)
	if err != nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("with credentials: %v, %v", resp, err)
	}
}

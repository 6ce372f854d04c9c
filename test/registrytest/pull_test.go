package registrytest_test

import (
	"io"
	"net/http"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	. "github.com/larder-cache/larder/test/registrytest"
)

// client is one whose connections are gone when the test ends.
func client(t *testing.T, s *Server) *http.Client {
	t.Helper()
	c, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

// pull reads everything of an image or index with go-containerregistry, which
// checks every digest and size, and unpacks the layers.
func pull(t *testing.T, s *Server, ref string, auth authn.Authenticator) error {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	desc, err := remote.Get(r, remote.WithAuth(auth), remote.WithTransport(client(t, s).Transport),
		remote.WithRetryStatusCodes(), remote.WithRetryBackoff(remote.Backoff{Steps: 1}))
	if err != nil {
		return err
	}
	if desc.MediaType.IsIndex() {
		index, err := desc.ImageIndex()
		if err != nil {
			return err
		}
		return validate.Index(index)
	}
	img, err := desc.Image()
	if err != nil {
		return err
	}
	return validate.Image(img)
}

func TestPull(t *testing.T) {
	spec := ImageSpec{Seed: 1, Layers: []int64{0, 1, 511, 512, 70_000, 1 << 20}}
	images := map[string]*Image{
		"oci":      OCIImage(spec),
		"docker":   DockerImage(spec),
		"index":    Platforms(spec, false),
		"list":     Platforms(spec, true),
		"no-layer": OCIImage(ImageSpec{Seed: 2}),
	}
	user := map[string]string{"user": "secret"}
	login := &authn.Basic{Username: "user", Password: "secret"}
	for name, tc := range map[string]struct {
		opts Options
		auth authn.Authenticator
	}{
		"plain":            {Options{}, authn.Anonymous},
		"tls":              {Options{TLS: true, ClientCerts: true}, authn.Anonymous},
		"cdn":              {Options{CDN: true}, authn.Anonymous},
		"basic":            {Options{Auth: Auth{Scheme: Basic, Users: user}}, login},
		"bearer":           {Options{Auth: Auth{Scheme: Bearer, Users: user}}, login},
		"bearer anonymous": {Options{Auth: Auth{Scheme: Bearer, Anonymous: []string{"library/*"}}}, authn.Anonymous},
		"everything":       {Options{TLS: true, CDN: true, Auth: Auth{Scheme: Bearer, Users: user}}, login},
	} {
		t.Run(name, func(t *testing.T) {
			s := Start(t, tc.opts)
			for tag, img := range images {
				s.Put("library/app", img, tag)
				if err := pull(t, s, s.Ref("library/app", tag), tc.auth); err != nil {
					t.Errorf("pull %s: %v", tag, err)
				}
			}
			if s.Count(Match{Kind: Blob, Method: http.MethodGet}) == 0 {
				t.Error("no blob was counted")
			}
		})
	}
}

// get returns status, headers and body of one request.
func get(t *testing.T, c *http.Client, url string, header ...string) (*http.Response, []byte, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, body, err
}

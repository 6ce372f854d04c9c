package proxy

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
)

// runtimeDir is a runtime's store of plain files.
type runtimeDir struct {
	dir string
	bad bool // digests do not match
}

func (s *runtimeDir) put(t *testing.T, d digest.Digest, body []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, d.Encoded()), body, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *runtimeDir) Has(d digest.Digest) bool {
	_, err := os.Stat(filepath.Join(s.dir, d.Encoded()))
	return err == nil
}

func (s *runtimeDir) Open(d digest.Digest) (RuntimeBlob, error) {
	file, err := os.Open(filepath.Join(s.dir, d.Encoded()))
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	return &runtimeFile{file, info.Size(), s.bad}, err
}

type openFile = *os.File

type runtimeFile struct {
	openFile
	size int64
	bad  bool
}

var errBadDigest = errors.New("digest does not match")

func (f *runtimeFile) Size() int64            { return f.size }
func (f *runtimeFile) File() (*os.File, bool) { return f.openFile, !f.bad }
func (f *runtimeFile) Ready(context.Context, int64) error {
	if f.bad {
		return errBadDigest
	}
	return nil
}

// TestRuntimeStore: what the runtime holds is served from there, under the usual
// rules, and is not stored twice; a bad copy is no obstacle.
func TestRuntimeStore(t *testing.T) {
	for _, bad := range []bool{false, true} {
		store := &runtimeDir{t.TempDir(), bad}
		n := startNode(t, func(s *setup) { s.proxy.Runtime = store })
		img := n.image(1_000_000)
		layer := img.Layers[0].Digest
		store.put(t, layer, bytesOf(t, img, layer))
		store.put(t, img.Digest, img.Manifests[0].Data)
		want := "runtime"
		if bad {
			want = "upstream"
		} else {
			n.get(manifestPath("v1"))
		}
		for path, body := range map[string][]byte{
			blobPath(layer): bytesOf(t, img, layer), manifestPath(img.Digest.String()): img.Manifests[0].Data,
		} {
			a := n.get(path)
			if a.status != 200 || !bytes.Equal(a.body, body) || a.header.Get(headerSource) != want {
				t.Errorf("bad=%v %s: %d from %s, %d bytes", bad, path, a.status, a.header.Get(headerSource), len(a.body))
			}
		}
		if !bad {
			if a := n.get(blobPath(layer), "Range", "bytes=500-"); a.status != 206 || !bytes.Equal(a.body, bytesOf(t, img, layer)[500:]) {
				t.Errorf("range: %d", a.status)
			}
			if a := n.do("HEAD", blobPath(layer)); a.status != 200 || a.header.Get("Content-Length") != "1000000" {
				t.Errorf("HEAD: %d %v", a.status, a.header)
			}
			if n.cache.Has(layer) || n.registry.Count(registrytest.Match{}) != 1 {
				t.Error("stored twice, or more asked for than what the tag stands for")
			}
		}
	}
	if _, err := (&runtimeDir{dir: t.TempDir()}).Open(digest.FromString("x")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// givenFunc is a source of what the test's registry gives.
type givenFunc func(context.Context, *cache.Fill) error

func (fn givenFunc) Fetch(ctx context.Context, f *cache.Fill) error { return fn(ctx, f) }
func (fn givenFunc) Giver() string                                  { return host }

// TestJoinedFillOfAnotherRepository: who joined a fill that failed for another
// repository's sake is asked for by its own, and does not see what its registry asked
// the other for.
func TestJoinedFillOfAnotherRepository(t *testing.T) {
	const half = 600_000
	for name, comes := range map[string]int{"before the size": -1, "before the first byte": 0, "in the body": half} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t, nil)
			img := n.image(1_000_000)
			d := img.Layers[0].Digest
			whole := bytesOf(t, img, d)
			n.get(manifestPath("v1"))
			started, fail := make(chan struct{}), make(chan struct{})
			go func() {
				r, err := n.cache.Open(context.Background(), d, givenFunc(func(_ context.Context, f *cache.Fill) error {
					if w := f.Writer(cache.Origin{Kind: cache.FromUpstream}); comes >= 0 {
						if err := w.SetSize(int64(len(whole))); err != nil {
							return err
						}
						if _, err := w.WriteAt(whole[:comes], 0); err != nil {
							return err
						}
					}
					close(started)
					<-fail
					return &upstream.Error{Status: http.StatusUnauthorized, Challenge: []string{`Bearer realm="https://auth.test",scope="repository:secret:pull"`}}
				}))
				if err == nil {
					<-fail
					_ = r.Close()
				}
			}()
			<-started
			got := make(chan answer, 1)
			go func() { got <- n.get(blobPath(d)) }()
			await(t, "the request to join", func() bool {
				pulls, fills := n.proxy.Pulls(), n.cache.Fills()
				return len(pulls) == 1 && (comes < 0 || fills[0].Readers == 2) && pulls[0].Offset >= int64(comes)
			})
			close(fail)
			if a := <-got; a.status != 200 || !bytes.Equal(a.body, whole) {
				t.Errorf("status %d, %d bytes, asked for %q", a.status, len(a.body), a.header.Get("WWW-Authenticate"))
			}
		})
	}
}

// TestRefusalOfAnother: nor does he see that if the fill that he turns to then is of another
// repository, too.
func TestRefusalOfAnother(t *testing.T) {
	for joined, status := range map[bool]int{false: 401, true: 404} {
		err := &cache.FillError{Joined: joined, Err: &upstream.Error{Status: http.StatusUnauthorized, Challenge: []string{"Bearer"}}}
		if e := toAPIError(err, KindBlob, true); e.status != status || (len(e.challenge) > 0) == joined {
			t.Errorf("joined %v: status %d, asked for %q", joined, e.status, e.challenge)
		}
	}
}

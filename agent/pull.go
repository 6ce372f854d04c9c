package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/larder-cache/larder/agent/archive"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// Image is an image reference taken apart as the pull API needs it. Its String, in
// full, is its name in pins, tags and archives; ParseImage reads it.
type Image struct {
	Registry   string // "docker.io", "reg.example.com:5000": as upstream.CanonicalHost spells it
	Repository string // "library/nginx"
	Reference  string // tag or digest
}

// ParseImage reads a reference as users write it: nginx, quay.io/a/b:c, a@sha256:...
func ParseImage(s string) (Image, error) {
	ref, err := name.ParseReference(s)
	if err != nil {
		return Image{}, fmt.Errorf("%q is not an image name: %w", s, err)
	}
	registry := upstream.CanonicalHost(ref.Context().RegistryStr())
	return Image{Registry: registry, Repository: ref.Context().RepositoryStr(), Reference: ref.Identifier()}, nil
}

func (i Image) String() string {
	sep := ":"
	if strings.Contains(i.Reference, ":") {
		sep = "@"
	}
	return i.Registry + "/" + i.Repository + sep + i.Reference
}

// manifestTypes is what containerd accepts of a tag, in its order.
var manifestTypes = []string{
	"application/vnd.docker.distribution.manifest.v2+json",
	"application/vnd.docker.distribution.manifest.list.v2+json",
	ocispec.MediaTypeImageManifest,
	ocispec.MediaTypeImageIndex,
	"*/*",
}

// pullStreams is containerd's max_concurrent_downloads.
const pullStreams = 3

// Pulled is one manifest, config or layer that a Puller got.
type Pulled struct {
	Kind   string // manifest, config or layer
	Digest digest.Digest
	Source string // X-Larder-Source
	Bytes  int64
}

// Puller pulls images through a proxy the way containerd does: HEAD and GET the
// manifest, then the blobs, three at a time, verifying digests. It keeps nothing of
// what it reads. If several goroutines use a Puller, its functions must allow that.
// Contexts reach every request and body; nothing else bounds the time.
type Puller struct {
	Proxy  string       // "http://127.0.0.1:5050"
	Client *http.Client // nil = http.DefaultClient
	// Platform chooses from an index: "linux/arm64", "" for this machine's, "all".
	Platform string
	// Instances chooses among several for one platform.
	Instances Instances
	UserAgent string // "" for Go's own
	// NoStale makes Resolve ask the registry, even about a digest, and fail if the
	// registry cannot be asked, or no longer shows it, though the proxy knows what it
	// stood for.
	NoStale bool
	// Manifest, if set, is called for each manifest and index before Pull pulls it. Its
	// error ends the pull.
	Manifest func(digest.Digest) error
	// Choose, if set, is given what a manifest lists (its config and layers, without
	// those of manifests before it) before Pull pulls any of that, and returns what to
	// pull. Its error ends the pull.
	Choose func([]ocispec.Descriptor) ([]ocispec.Descriptor, error)
	// Progress, if set, is called from several goroutines as bytes of a blob
	// arrive; total is its size, -1 while unknown.
	Progress func(d digest.Digest, done, total int64)
	// Done, if set, is called from several goroutines when a part is complete.
	Done func(Pulled)
}

// Resolve asks what an image's reference stands for. A digest stands for itself, and
// nobody is asked unless NoStale is set.
func (p Puller) Resolve(ctx context.Context, image Image) (digest.Digest, error) {
	d, err := p.begin(image).resolve(ctx)
	if err != nil {
		return "", fmt.Errorf("resolve %s: %w", image, err)
	}
	return d, nil
}

func (p Puller) begin(image Image) *pull {
	p.Client = cmp.Or(p.Client, http.DefaultClient)
	return &pull{Puller: p, image: image}
}

// Pull reads the whole image and returns where each part came from, in order of
// completion; with an error, the parts that were complete before it.
func (p Puller) Pull(ctx context.Context, image Image) ([]Pulled, error) {
	run := p.begin(image)
	d, err := run.resolve(ctx)
	if err == nil {
		err = walkImage(ocispec.Descriptor{Digest: d}, selection{p.Platform, p.Instances},
			func(d ocispec.Descriptor) ([]byte, error) { return run.manifest(ctx, d.Digest) },
			func(_ ocispec.Descriptor, _ manifest, blobs []blob) error { return run.blobs(ctx, blobs) })
	}
	if err != nil {
		return run.got, fmt.Errorf("pull %s: %w", image, err)
	}
	return run.got, nil
}

// pull is one Puller.Pull under way.
type pull struct {
	Puller
	image Image

	mu  sync.Mutex // guards got
	got []Pulled
}

func (p *pull) record(one Pulled) {
	p.mu.Lock()
	p.got = append(p.got, one)
	p.mu.Unlock()
	if p.Done != nil {
		p.Done(one)
	}
}

// request asks the proxy. The caller closes the body of the answer, which is 200; any
// other status is an *answerError.
func (p *pull) request(ctx context.Context, method, kind, ref string) (*http.Response, error) {
	u := fmt.Sprintf("%s/v2/%s/%s/%s?ns=%s", p.Proxy, p.image.Repository, kind, ref, url.QueryEscape(p.image.Registry))
	req, err := http.NewRequestWithContext(ctx, method, u, nil)
	if err != nil {
		return nil, err
	}
	if p.UserAgent != "" {
		req.Header.Set("User-Agent", p.UserAgent)
	}
	if kind == "manifests" {
		req.Header.Set("Accept", strings.Join(manifestTypes, ", "))
	}
	if p.NoStale {
		req.Header.Set("Cache-Control", proxy.NoStale)
	}
	resp, err := p.Client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, &answerError{resp.StatusCode, ref, fmt.Sprintf("%s %s %s: %s%s%s", method, kind, ref, resp.Status, ociMessage(resp.Body), privateHint(resp.StatusCode))}
	}
	return resp, nil
}

// answerError is an answer other than success.
type answerError struct {
	status    int
	reference string // what it is about: a tag or digest
	text      string
}

func (e *answerError) Error() string { return e.text }

// privateHint says what to do about an image that the registry shows to nobody
// without a credential: a Puller has none.
func privateHint(status int) string {
	if status != http.StatusUnauthorized {
		return ""
	}
	return "; the image is private: give the node credentials of its own (auth = \"node\"), or let a pod pull it"
}

// ociMessage is what an OCI error body says (distribution specification, "Error Codes"),
// with a separator before it. A body longer than 64 KiB counts as none.
func ociMessage(r io.Reader) string {
	var body struct {
		Errors []struct{ Code, Message string }
	}
	if json.NewDecoder(io.LimitReader(r, 64<<10)).Decode(&body) != nil || len(body.Errors) == 0 {
		return ""
	}
	return fmt.Sprintf(" (%s: %s)", body.Errors[0].Code, body.Errors[0].Message)
}

// resolve is Resolve, whose errors name the image.
func (p *pull) resolve(ctx context.Context) (digest.Digest, error) {
	if d, err := digest.Parse(p.image.Reference); err == nil && !p.NoStale {
		return d, nil
	}
	resp, err := p.request(ctx, http.MethodHead, "manifests", p.image.Reference)
	if err != nil {
		return "", err
	}
	resp.Body.Close()
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	if err != nil {
		return "", fmt.Errorf("resolve %s: no valid Docker-Content-Digest: %w", p.image.Reference, err)
	}
	return d, nil
}

// manifest pulls a manifest or index.
func (p *pull) manifest(ctx context.Context, d digest.Digest) ([]byte, error) {
	if p.Manifest != nil {
		if err := p.Manifest(d); err != nil {
			return nil, err
		}
	}
	body, header, err := p.readManifest(ctx, d)
	if err != nil {
		return nil, err
	}
	p.record(Pulled{Kind: "manifest", Digest: d, Source: header.Get("X-Larder-Source"), Bytes: int64(len(body))})
	return body, nil
}

// readManifest returns the bytes of a manifest or index, which have digest d, and the
// header that they came with.
func (p *pull) readManifest(ctx context.Context, d digest.Digest) ([]byte, http.Header, error) {
	resp, err := p.request(ctx, http.MethodGet, "manifests", d.String())
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, archive.MaxManifest))
	if err != nil {
		return nil, nil, fmt.Errorf("read manifest %s: %w", d, err)
	}
	if d.Algorithm().FromBytes(body) != d {
		return nil, nil, fmt.Errorf("manifest %s: the bytes have another digest", d)
	}
	return body, resp.Header, nil
}

// blobs pulls what a manifest lists, several at a time.
func (p *pull) blobs(ctx context.Context, blobs []blob) error {
	blobs, err := p.choose(blobs)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(pullStreams)
	for _, b := range blobs {
		group.Go(func() error { return p.blob(ctx, b) })
	}
	return group.Wait()
}

// choose leaves out what Choose does.
func (p *pull) choose(blobs []blob) ([]blob, error) {
	if p.Choose == nil || len(blobs) == 0 {
		return blobs, nil
	}
	all := make([]ocispec.Descriptor, len(blobs))
	for i, b := range blobs {
		all[i] = b.Descriptor
	}
	chosen, err := p.Choose(all)
	return slices.DeleteFunc(blobs, func(b blob) bool {
		return !slices.ContainsFunc(chosen, func(d ocispec.Descriptor) bool { return d.Digest == b.Digest })
	}), err
}

// blob reads a blob to its end, and trusts only its digest, no size.
func (p *pull) blob(ctx context.Context, b blob) error {
	resp, err := p.request(ctx, http.MethodGet, "blobs", b.Digest.String())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	verifier := b.Digest.Verifier()
	n, err := io.Copy(verifier, p.counted(resp.Body, b.Digest, resp.ContentLength))
	if err != nil {
		return &cutError{b.Digest, err}
	}
	if !verifier.Verified() {
		return fmt.Errorf("blob %s: the bytes have another digest", b.Digest)
	}
	p.record(Pulled{Kind: b.kind, Digest: b.Digest, Source: resp.Header.Get("X-Larder-Source"), Bytes: n})
	return nil
}

// cutError says that the body of a blob ended before it was whole.
type cutError struct {
	digest digest.Digest
	err    error
}

func (e *cutError) Error() string { return fmt.Sprintf("read blob %s: %v", e.digest, e.err) }
func (e *cutError) Unwrap() error { return e.err }

// counted is r, the bytes of a blob, and tells Progress of them.
func (p *pull) counted(r io.Reader, d digest.Digest, total int64) io.Reader {
	if p.Progress == nil {
		return r
	}
	return &progressReader{r: r, d: d, total: total, progress: p.Progress}
}

// progressReader tells how far a blob has been read.
type progressReader struct {
	r           io.Reader
	d           digest.Digest
	done, total int64
	progress    func(d digest.Digest, done, total int64)
}

func (p *progressReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	if n > 0 {
		p.done += int64(n)
		p.progress(p.d, p.done, p.total)
	}
	return n, err
}

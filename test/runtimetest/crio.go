package runtimetest

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// CRIO is a model of containers/image, on which CRI-O, podman and skopeo stand.
// It is as strict as they are: the source whose manifest could be had is the
// source of everything, and what then fails there fails the pull. It alone does not wait
// before it repeats a request (429, or the rest of a broken body).
type CRIO struct {
	// Sources are tried in order: the mirrors, the registry itself last. Each is
	// host[:port] with a path before the repository, such as
	// "127.0.0.1:5050/docker.io".
	Sources []string
}

// crioAccept is sent with every manifest, in this order.
var crioAccept = []string{
	ocispec.MediaTypeImageManifest,
	images.MediaTypeDockerSchema2Manifest,
	"application/vnd.docker.distribution.manifest.v1+prettyjws",
	"application/vnd.docker.distribution.manifest.v1+json",
	images.MediaTypeDockerSchema2ManifestList,
	ocispec.MediaTypeImageIndex,
}

// Pull fetches repository (such as "library/nginx") at a tag or digest, and
// discards what it gets after checking it.
func (c *CRIO) Pull(ctx context.Context, repository, reference string) (Result, error) {
	rec := &recorder{}
	defer rec.close()
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig:    &tls.Config{InsecureSkipVerify: true}, // insecure = true
		DisableCompression: true,
	}}
	if err := rec.wrap(client); err != nil {
		return Result{}, err
	}
	var result Result
	var errs []error
	for _, source := range c.Sources {
		p := &crioPull{client: client, result: &result}
		m, body, err := p.open(ctx, source+"/"+repository, reference)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", source, err))
			continue
		}
		err = p.copy(ctx, m, body)
		result.Exchanges = rec.take()
		return result, err
	}
	result.Exchanges = rec.take()
	return result, errors.Join(errs...)
}

// crioPull is a pull from one source.
type crioPull struct {
	client *http.Client
	base   string // scheme://host/v2/repository
	result *Result
}

// open finds out the scheme and reads the first manifest.
func (p *crioPull) open(ctx context.Context, name, reference string) (ocispec.Descriptor, []byte, error) {
	host, repository, ok := strings.Cut(name, "/")
	if !ok {
		return ocispec.Descriptor{}, nil, fmt.Errorf("no host in %q", name)
	}
	scheme, err := p.ping(ctx, host)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	p.base = scheme + "://" + host + "/v2/" + repository
	return p.manifest(ctx, reference)
}

// ping tries HTTPS before HTTP, and takes no answer but 200 and 401.
func (p *crioPull) ping(ctx context.Context, host string) (scheme string, err error) {
	var errs []error
	for _, scheme := range []string{"https", "http"} {
		resp, err := p.do(ctx, scheme+"://"+host+"/v2/", nil)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusUnauthorized {
			return scheme, nil
		}
		errs = append(errs, fmt.Errorf("ping: status %d", resp.StatusCode))
	}
	return "", errors.Join(errs...)
}

// do sends one GET, and up to five when told 429.
func (p *crioPull) do(ctx context.Context, url string, header http.Header) (*http.Response, error) {
	const attempts = 5
	for n := 1; ; n++ {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return nil, err
		}
		req.Header = header.Clone()
		resp, err := p.client.Do(req)
		if err != nil || resp.StatusCode != http.StatusTooManyRequests || n == attempts {
			return resp, err
		}
		resp.Body.Close()
	}
}

// maxManifest is what containers/image reads of a manifest.
const maxManifest = 4 << 20

func (p *crioPull) manifest(ctx context.Context, reference string) (ocispec.Descriptor, []byte, error) {
	resp, err := p.do(ctx, p.base+"/manifests/"+reference, http.Header{"Accept": crioAccept})
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return ocispec.Descriptor{}, nil, fmt.Errorf("manifest %s: status %d", reference, resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("manifest %s: %w", reference, err)
	}
	d := ocispec.Descriptor{Digest: digest.FromBytes(body), Size: int64(len(body))}
	if len(body) > maxManifest {
		return d, nil, fmt.Errorf("manifest %s is too large", reference)
	}
	if want := digest.Digest(reference); want.Validate() == nil && want != d.Digest {
		return d, nil, fmt.Errorf("manifest %s has digest %s", reference, d.Digest)
	}
	d.MediaType, _, err = mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil || !slices.Contains(crioAccept, d.MediaType) {
		return d, nil, fmt.Errorf("manifest %s: unknown media type %q is taken for schema 1", reference, d.MediaType)
	}
	return d, body, nil
}

// copy fetches everything a manifest or index names.
func (p *crioPull) copy(ctx context.Context, d ocispec.Descriptor, body []byte) error {
	p.add(d)
	if images.IsIndexType(d.MediaType) {
		return p.copyIndex(ctx, body)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(body, &m); err != nil {
		return fmt.Errorf("decode manifest %s: %w", d.Digest, err)
	}
	for _, blob := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if err := p.blob(ctx, blob); err != nil {
			return fmt.Errorf("blob %s: %w", blob.Digest, err)
		}
		p.add(blob)
	}
	return nil
}

func (p *crioPull) copyIndex(ctx context.Context, body []byte) error {
	var index ocispec.Index
	if err := json.Unmarshal(body, &index); err != nil {
		return fmt.Errorf("decode index: %w", err)
	}
	match := platforms.OnlyStrict(ocispec.Platform{OS: "linux", Architecture: "amd64"})
	for _, child := range index.Manifests {
		if child.Platform == nil || match.Match(*child.Platform) {
			m, body, err := p.manifest(ctx, child.Digest.String())
			if err != nil {
				return err
			}
			return p.copy(ctx, m, body)
		}
	}
	return errors.New("the index has nothing for linux/amd64")
}

func (p *crioPull) add(d ocispec.Descriptor) {
	if p.result.Target.Digest == "" {
		p.result.Target = d
	}
	p.result.Content = append(p.result.Content, d)
	p.result.Bytes += d.Size
}

// resumeProgress is what a connection must have brought for another to be tried
// after the first repetition.
const resumeProgress = 1 << 20

// blob reads a blob, going on by Range where the connection broke.
func (p *crioPull) blob(ctx context.Context, d ocispec.Descriptor) error {
	verifier := d.Digest.Verifier()
	var off int64
	for n := 0; ; n++ {
		read, err := p.readBlob(ctx, d, off, n > 0, verifier)
		off += read
		if err == nil {
			break
		}
		broken := errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET)
		if !broken || n > 0 && read < resumeProgress {
			return err
		}
	}
	if off != d.Size {
		return fmt.Errorf("got %d bytes of %d", off, d.Size)
	}
	if !verifier.Verified() {
		return errors.New("digest does not match")
	}
	return nil
}

// readBlob reads to the end of a connection: the first, or one that goes on from
// off.
func (p *crioPull) readBlob(ctx context.Context, d ocispec.Descriptor, off int64, goOn bool, w io.Writer) (int64, error) {
	header, want := http.Header{}, http.StatusOK
	if goOn {
		header.Set("Range", fmt.Sprintf("bytes=%d-", off))
		want = http.StatusPartialContent
	}
	resp, err := p.do(ctx, p.base+"/blobs/"+d.Digest.String(), header)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != want {
		return 0, fmt.Errorf("status %d, want %d", resp.StatusCode, want)
	}
	if goOn && !goesOn(resp.Header.Get("Content-Range"), off, d.Size) {
		return 0, fmt.Errorf("asked for the rest from %d, got Content-Range %q", off, resp.Header.Get("Content-Range"))
	}
	return io.Copy(w, resp.Body)
}

// goesOn reports whether a Content-Range is exactly the rest from off, its size
// given or "*".
func goesOn(contentRange string, off, size int64) bool {
	rest := fmt.Sprintf("bytes %d-%d/", off, size-1)
	total, ok := strings.CutPrefix(contentRange, rest)
	return ok && (total == "*" || total == fmt.Sprint(size))
}

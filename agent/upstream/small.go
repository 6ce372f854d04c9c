package upstream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	_ "crypto/sha512" // digests of both algorithms of the specification

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// defaultAccept is what containerd's resolver sends.
var defaultAccept = []string{
	"application/vnd.docker.distribution.manifest.v2+json",
	"application/vnd.docker.distribution.manifest.list.v2+json",
	ocispec.MediaTypeImageManifest,
	ocispec.MediaTypeImageIndex,
	"*/*",
}

const (
	// maxManifest is distribution's own limit, and what the specification
	// tells registries to accept at least.
	maxManifest = 4 << 20
	maxPage     = 4 << 20
	// smallTimeout bounds a whole manifest or page: 4 MiB in a minute is slower
	// than any link that could carry the blobs after it.
	smallTimeout = time.Minute
	// maxTries of a small request over all upstreams.
	maxTries = 3
)

// each runs ask on the registry's endpoints in order until one succeeds, and
// again after a pause if that may help. If none does, the error is that of the
// endpoint with the last word.
func (c *Client) each(ctx context.Context, t Target, op string, ask func(context.Context, *endpoint) error) error {
	reg, err := c.lookup(t.Registry)
	if err != nil {
		return &Error{Registry: t.Registry, Repository: t.Repository, Op: op, Err: err}
	}
	for try := 0; ; try++ {
		err := c.pass(ctx, reg, t, ask)
		if err == nil || try+1 == maxTries || !worthRepeating(err) {
			return err
		}
		e, _ := errors.AsType[*Error](err)
		if !pause(ctx, backoff(try, e.RetryAfter)) {
			return err
		}
	}
}

// pass asks each endpoint once.
func (c *Client) pass(ctx context.Context, reg *registry, t Target, ask func(context.Context, *endpoint) error) error {
	order := reg.order(t)
	return firstAnswer(ctx, order, func(ep *endpoint) error {
		attempt, cancel := share(ctx, ep != order[len(order)-1])
		defer cancel()
		return ask(attempt, ep)
	})
}

// firstAnswer asks in this order until one answers or ctx ends. If none does, the error is
// that of the endpoint with the last word, or of the last one asked.
func firstAnswer(ctx context.Context, order []*endpoint, ask func(*endpoint) error) error {
	var verdict error
	final := false // verdict is of the endpoint with the last word
	for _, ep := range order {
		err := ask(ep)
		if err == nil {
			return nil
		}
		if !final {
			verdict, final = err, ep.last
		}
		if ctx.Err() != nil {
			break
		}
	}
	return verdict
}

// share keeps half of the time left for the endpoints after this one.
func share(ctx context.Context, more bool) (context.Context, context.CancelFunc) {
	limit := smallTimeout
	if deadline, ok := ctx.Deadline(); ok && more {
		limit = min(limit, time.Until(deadline)/2)
	}
	return context.WithTimeout(ctx, limit)
}

// worthRepeating: what went wrong may pass within moments. A 429 is not
// repeated: whoever asked can serve what it knows.
func worthRepeating(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && IsUnavailable(err) && e.Status != http.StatusTooManyRequests &&
		!errors.Is(err, ErrNoContact) && !errors.Is(err, ErrCircuitOpen) && !errors.Is(err, errLookup)
}

// pause waits, or says at once that ctx would end before.
func pause(ctx context.Context, d time.Duration) bool {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= d {
		return false
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Resolve finds what ref (a tag or digest) stands for, by HEAD, or by GET if
// the registry's HEAD does not say. A nil accept means containerd's list.
func (c *Client) Resolve(ctx context.Context, t Target, ref string, accept []string) (desc ocispec.Descriptor, err error) {
	q := manifestRequest("resolve", ref, accept)
	err = c.each(ctx, t, q.op, func(ctx context.Context, ep *endpoint) error {
		head := q
		head.method = http.MethodHead
		resp, err := c.send(ctx, ep, t, head)
		if err == nil {
			resp.Body.Close()
			var ok bool
			if desc, ok = headDescriptor(resp.Response, ref); ok {
				return nil
			}
		} else if !unsupported(err) {
			return err
		}
		desc, _, err = c.getManifest(ctx, ep, t, ref, q)
		return err
	})
	return desc, err
}

// unsupported reports whether a registry does not support the request's method.
func unsupported(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && (e.Status == http.StatusMethodNotAllowed || e.Status == http.StatusNotImplemented)
}

// Manifest reads a manifest of at most 4 MiB and verifies its digest. The
// bytes are exactly the registry's.
func (c *Client) Manifest(ctx context.Context, t Target, ref string, accept []string) (desc ocispec.Descriptor, body []byte, err error) {
	q := manifestRequest("manifest", ref, accept)
	err = c.each(ctx, t, q.op, func(ctx context.Context, ep *endpoint) error {
		desc, body, err = c.getManifest(ctx, ep, t, ref, q)
		return err
	})
	return desc, body, err
}

func manifestRequest(op, ref string, accept []string) request {
	if len(accept) == 0 {
		accept = defaultAccept
	}
	return request{op: op, kind: kindManifest, method: http.MethodGet, path: "manifests/" + ref, accept: accept}
}

// headDescriptor reads a descriptor out of headers. ok is false where they do
// not suffice or make no sense, and only the body can tell.
func headDescriptor(resp *http.Response, ref string) (desc ocispec.Descriptor, ok bool) {
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	if err != nil {
		return desc, false
	}
	if want, err := digest.Parse(ref); err == nil && want != d {
		return desc, false
	}
	mt := mediaType(resp.Header.Get("Content-Type"))
	if mt == "" || generic(mt) || resp.ContentLength <= 0 || resp.ContentLength > maxManifest {
		return desc, false
	}
	return ocispec.Descriptor{MediaType: mt, Digest: d, Size: resp.ContentLength}, true
}

// generic media types say nothing about a manifest; the body may.
func generic(mt string) bool {
	switch mt {
	case "application/json", "application/octet-stream", "text/plain", "text/html", "binary/octet-stream":
		return true
	}
	return false
}

func (c *Client) getManifest(ctx context.Context, ep *endpoint, t Target, ref string, q request) (ocispec.Descriptor, []byte, error) {
	resp, body, err := c.small(ctx, ep, t, q, maxManifest)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	desc, err := describeManifest(resp, ref, body)
	if err != nil {
		err = c.describe(fmt.Errorf("%w: %w", ErrBadAnswer, err), ep, t, q)
		ep.noteError(err, time.Now())
		return desc, nil, err
	}
	return desc, body, nil
}

// describeManifest checks that body is a manifest, and the one asked for.
func describeManifest(resp *http.Response, ref string, body []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType(resp.Header.Get("Content-Type")), Size: int64(len(body))}
	if desc.MediaType == "text/html" {
		return desc, errors.New("a web page instead of a manifest")
	}
	inner, ok := manifestType(body)
	if !ok {
		return desc, errors.New("not a JSON manifest")
	}
	if desc.MediaType == "" || generic(desc.MediaType) {
		desc.MediaType = inner
	}
	if desc.MediaType == "" || len(desc.MediaType) > maxMediaType {
		return desc, errors.New("a manifest without a media type")
	}
	want, err := digest.Parse(ref)
	if err != nil { // a tag: the registry's header, if any, is to be held to
		if want, err = digest.Parse(resp.Header.Get("Docker-Content-Digest")); err != nil {
			want = digest.FromBytes(body)
		}
	}
	if got := want.Algorithm().FromBytes(body); got != want {
		return desc, fmt.Errorf("the manifest's digest is %s, not %s", got, want)
	}
	desc.Digest = want
	return desc, nil
}

// manifestType says whether body is a JSON object with a manifest's fields,
// and which media type it names itself.
func manifestType(body []byte) (string, bool) {
	var doc struct {
		SchemaVersion *int            `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Layers        json.RawMessage `json:"layers"`
		Manifests     json.RawMessage `json:"manifests"`
		Errors        json.RawMessage `json:"errors"`
	}
	if json.Unmarshal(body, &doc) != nil || len(bytes.TrimLeft(body, " \t\r\n")) == 0 {
		return "", false
	}
	known := doc.SchemaVersion != nil || doc.MediaType != "" || doc.Layers != nil || doc.Manifests != nil
	if doc.MediaType == "" {
		switch {
		case doc.Manifests != nil:
			doc.MediaType = ocispec.MediaTypeImageIndex
		case doc.Layers != nil:
			doc.MediaType = ocispec.MediaTypeImageManifest
		}
	}
	return doc.MediaType, known && doc.Errors == nil
}

// small sends q and reads its whole body of at most limit bytes, whatever
// Content-Length says.
func (c *Client) small(ctx context.Context, ep *endpoint, t Target, q request, limit int64) (*http.Response, []byte, error) {
	resp, err := c.send(ctx, ep, t, q)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	switch {
	case resp.ContentLength > limit || int64(len(body)) > limit:
		err = fmt.Errorf("%w: larger than %d MiB", ErrBadAnswer, limit>>20)
	case err == nil && resp.StatusCode != http.StatusOK:
		err = fmt.Errorf("%w: status %d", ErrBadAnswer, resp.StatusCode)
	}
	if err != nil {
		return nil, nil, c.describe(err, ep, t, q)
	}
	return resp.Response, body, nil
}

// Stat returns the size of a blob.
func (c *Client) Stat(ctx context.Context, t Target, d digest.Digest) (size int64, err error) {
	err = c.each(ctx, t, "stat", func(ctx context.Context, ep *endpoint) error {
		size, err = c.statAt(ctx, ep, t, d)
		return err
	})
	return size, err
}

// statAt asks by HEAD and, if that does not tell (no length, a web page, or a signed
// redirect that is good only for GET), by a GET of one byte. It does so on a 404 as well:
// as a cache Harbor gives a blob to GET, but denies to HEAD that it is there until it has
// fetched it (goharbor/harbor#22609).
func (c *Client) statAt(ctx context.Context, ep *endpoint, t Target, d digest.Digest) (int64, error) {
	q := request{op: "stat", kind: kindBlob, method: http.MethodHead, path: "blobs/" + d.String()}
	resp, err := c.send(ctx, ep, t, q)
	if err == nil {
		resp.Body.Close()
		if resp.ContentLength >= 0 && resp.StatusCode == http.StatusOK && !webPage(resp.Response) {
			return resp.ContentLength, nil
		}
	} else if !unsupported(err) && !errors.Is(err, ErrBadAnswer) && !IsNotFound(err) {
		return 0, err
	}
	missing := err
	q.method, q.rng = http.MethodGet, "bytes=0-0"
	if resp, err = c.send(ctx, ep, t, q); err != nil {
		if IsNotFound(missing) {
			return 0, missing
		}
		return 0, err
	}
	resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusPartialContent:
		if _, _, total, err := parseContentRange(resp.Header.Get("Content-Range")); err == nil && total >= 0 {
			return total, nil
		}
	case webPage(resp.Response): // whoever takes it for the blob takes a login for leave to read
		return 0, c.describe(fmt.Errorf("%w: a web page instead of a blob", ErrBadAnswer), ep, t, q)
	case resp.ContentLength >= 0:
		return resp.ContentLength, nil
	}
	return 0, c.describe(fmt.Errorf("%w: no size", ErrBadAnswer), ep, t, q)
}

func webPage(resp *http.Response) bool {
	return mediaType(resp.Header.Get("Content-Type")) == "text/html"
}

// Tags reads one page of tags. query is n and last, or what an earlier page's
// Next named, however that registry numbers pages.
func (c *Client) Tags(ctx context.Context, t Target, query string) (Page, error) {
	q := request{op: "tags", kind: kindTag, method: http.MethodGet, path: "tags/list", query: query, accept: []string{"application/json"}}
	return c.page(ctx, t, q)
}

// Referrers reads one page of what refers to d. query holds artifactType and
// whatever an earlier page's Next named. A registry without the API gives a
// not-found error: clients then ask for the fallback tag.
func (c *Client) Referrers(ctx context.Context, t Target, d digest.Digest, query string) (Page, error) {
	q := request{op: "referrers", kind: kindReferrers, method: http.MethodGet, path: "referrers/" + d.String(), query: query, accept: []string{ocispec.MediaTypeImageIndex}}
	page, err := c.page(ctx, t, q)
	// A registry's web interface, or a router that knows no such path.
	if e, ok := errors.AsType[*Error](err); ok && (errors.Is(err, errWebPage) || unsupported(err)) {
		e.Status, e.Err = http.StatusNotFound, errors.New("no referrers API")
	}
	return page, err
}

var errWebPage = fmt.Errorf("%w: a web page instead of a list", ErrBadAnswer)

func (c *Client) page(ctx context.Context, t Target, q request) (page Page, err error) {
	err = c.each(ctx, t, q.op, func(ctx context.Context, ep *endpoint) error {
		resp, body, err := c.small(ctx, ep, t, q, maxPage)
		if err != nil {
			return err
		}
		if webPage(resp) || !json.Valid(body) {
			return c.describe(errWebPage, ep, t, q)
		}
		page = Page{Body: body, ContentType: mediaType(resp.Header.Get("Content-Type")), Next: parseNext(resp.Header.Values("Link")), FiltersApplied: clip(resp.Header.Get("Oci-Filters-Applied"), 128)}
		return nil
	})
	return page, err
}

// Challenge asks for the manifest ref without any credential and returns the
// WWW-Authenticate headers of the 401, unchanged; none if the registry answers
// anyone (even with not-found).
func (c *Client) Challenge(ctx context.Context, t Target, ref string) ([]string, error) {
	q := manifestRequest("challenge", ref, nil)
	q.method, q.bare = http.MethodHead, true
	err := c.each(ctx, Target{Registry: t.Registry, Repository: t.Repository}, q.op, func(ctx context.Context, ep *endpoint) error {
		if !ep.last {
			return &Error{Registry: t.Registry, Op: q.op, Status: http.StatusNotFound}
		}
		resp, err := c.send(ctx, ep, t, q)
		if err == nil {
			resp.Body.Close()
		}
		return err
	})
	if e, ok := errors.AsType[*Error](err); ok && e.Status == http.StatusUnauthorized {
		return e.Challenge, nil
	}
	if IsNotFound(err) {
		return nil, nil
	}
	return nil, err
}

package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

const (
	// pageMemory is how long a page may be served when upstream is down, and
	// maxPages how many are kept; a page is at most maxKeptPage bytes.
	pageMemory  = time.Hour
	maxPages    = 64
	maxKeptPage = 256 << 10
	maxQuery    = 1024
)

// pageKey names one page of tags or referrers.
type pageKey struct {
	cache.Repository
	who    caller // lists differ, and who may see them
	kind   Kind
	digest digest.Digest
	query  string
}

// serveTags relays one page of tags.
func (p *Proxy) serveTags(x *exchange) error {
	query, raw, err := x.query()
	if err != nil {
		return err
	}
	n := query.Get("n")
	count, err := strconv.Atoi(n)
	if n != "" && (err != nil || count < 0) {
		return &apiError{status: http.StatusBadRequest, code: codeUnsupported, message: "n must be a number"}
	}
	t := x.access.target
	page, err := p.page(x, x.pageKey(raw), func(ctx context.Context) (upstream.Page, error) {
		if n != "" && count == 0 {
			return p.noTags(ctx, t)
		}
		return p.upstream.Tags(ctx, t, raw)
	})
	if err != nil {
		return err
	}
	p.sendPage(x, page)
	return nil
}

// noTags answers n=0, which not every registry honors: an empty list, if there is
// such a repository.
func (p *Proxy) noTags(ctx context.Context, t upstream.Target) (upstream.Page, error) {
	if _, err := p.upstream.Tags(ctx, t, "n=1"); err != nil {
		return upstream.Page{}, err
	}
	body, err := json.Marshal(map[string]any{"name": t.Repository, "tags": []string{}})
	return upstream.Page{Body: body, ContentType: "application/json"}, err
}

// query is the request's own, for the registry: without ns, and in one spelling.
func (x *exchange) query() (query url.Values, raw string, err error) {
	query = x.r.URL.Query()
	query.Del("ns")
	if raw = query.Encode(); len(raw) > maxQuery {
		return nil, "", &apiError{status: http.StatusBadRequest, code: codeUnsupported, message: "the query is too long"}
	}
	return query, raw, nil
}

// serveReferrers relays one page of what refers to a digest. A registry without this API
// answers 404, and clients read the tag sha256-<hex> instead (distribution spec, "Referrers
// Tag Schema"). They are told so for every digest, even in an outage: a client that once got
// a list no longer looks for tags.
func (p *Proxy) serveReferrers(x *exchange) error {
	_, raw, err := x.query()
	if err != nil {
		return err
	}
	key := x.pageKey(raw)
	page, err := p.page(x, key, func(ctx context.Context) (upstream.Page, error) {
		page, err := p.upstream.Referrers(ctx, x.access.target, x.route.digest, raw)
		if upstream.IsNotFound(err) {
			p.pages.put(key, upstream.Page{}, pageMemory)
		}
		return page, err
	})
	switch {
	case err != nil:
		return err
	case page.Body == nil:
		return errNoReferrers
	case page.ContentType == "":
		page.ContentType = ocispec.MediaTypeImageIndex
	}
	p.sendPage(x, page)
	return nil
}

func (x *exchange) pageKey(query string) pageKey {
	return pageKey{x.access.repository(), x.access.who, x.route.kind, x.route.digest, query}
}

// page asks upstream for a page, once for all who ask for it now with the same
// credential, within the budget. When upstream cannot be asked it serves the last
// page that it got for that credential. The answer is not kept as a verdict: some
// registries let other callers see lists than read content.
func (p *Proxy) page(x *exchange, key pageKey, ask func(context.Context) (upstream.Page, error)) (upstream.Page, error) {
	ctx, cancel := context.WithTimeoutCause(x.ctx, p.opts.FirstByteBudget*4/5, errBudget)
	defer cancel()
	target := x.access.target
	page, err := p.pageAsks.do(ctx, key, func(ctx context.Context) (upstream.Page, error) {
		ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
		defer cancel()
		page, err := ask(ctx)
		if err == nil && len(page.Body)+len(page.Next) <= maxKeptPage {
			p.pages.put(key, page, pageMemory)
		}
		return page, p.auth.withChallenge(ctx, target, anyTag, err)
	})
	from := sourceUpstream
	switch {
	case err == nil:
		x.access.decision = x.access.yes()
	case upstream.IsUnauthorized(err), upstream.IsNotFound(err):
		err = x.access.refuse(x.route.kind, err)
	case x.ctx.Err() == nil && (ctx.Err() != nil || mayServeStale(err)):
		last, ok := p.pages.get(key)
		stand, in := p.auth.stands(x.access, anyReference)
		if !ok || !in {
			return page, p.auth.unknown(&x.access, err)
		}
		x.access.decision = stand.decision
		page, from, err = last, sourceStale, nil
	}
	x.describe(from, int64(len(page.Body)), 0)
	return page, err
}

// anyReference is nothing that can be imported: a list is about the whole repository.
const anyReference = ""

// anyTag is asked for when only the challenge of a repository is of interest.
const anyTag = "latest"

// sendPage answers with a page; its Link leads back here.
func (p *Proxy) sendPage(x *exchange, page upstream.Page) {
	h := x.Header()
	h.Set("Content-Type", page.ContentType)
	h.Set("Cache-Control", "no-cache")
	if page.FiltersApplied != "" {
		h.Set("OCI-Filters-Applied", page.FiltersApplied)
	}
	if link := x.nextLink(page.Next); link != "" {
		h.Set("Link", link)
	}
	x.serveContent(int64(len(page.Body)), bytes.NewReader(page.Body))
}

// nextLink leads to the next page at the request's own path, under the same
// registry. What upstream says of the query is re-encoded, so nothing in it can
// become another header or another path.
func (x *exchange) nextLink(next string) string {
	if next == "" {
		return ""
	}
	query, err := url.ParseQuery(next)
	if err != nil || len(next) > maxQuery {
		return ""
	}
	query.Del("ns")
	if ns := x.r.URL.Query().Get("ns"); ns != "" {
		query.Set("ns", ns)
	}
	u := url.URL{Path: x.r.URL.Path, RawQuery: query.Encode()}
	return "<" + u.String() + `>; rel="next"`
}

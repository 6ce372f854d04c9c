package upstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
)

// kind is the label of a request in metrics.
type kind string

const (
	kindManifest  kind = "manifest"
	kindBlob      kind = "blob"
	kindTag       kind = "tag"
	kindReferrers kind = "referrers"
	kindToken     kind = "token"
	kindPing      kind = "ping"
)

// request is one question to an endpoint.
type request struct {
	op     string // for errors
	kind   kind
	method string
	path   string // after the repository: "manifests/latest"
	query  string
	accept []string
	rng    string   // Range header, "" = all
	at     *url.URL // where an earlier redirect led; skips the registry
	bulk   bool     // a blob body
	spare  bool     // better not sent than queued
	bare   bool     // without any credential
}

// answer is a 2xx response. Close its Body; what that tells of the
// endpoint's health is settled then.
type answer struct {
	*http.Response
	// moved is the URL at which another host served it, nil if the endpoint
	// did.
	moved *url.URL
}

// send asks ep once, or once for each credential of this node that may help.
// Every error is an *Error.
func (c *Client) send(ctx context.Context, ep *endpoint, t Target, q request) (*answer, error) {
	if c.usesNode(ep, t, q) {
		return c.sendNode(ctx, ep, t, q)
	}
	return c.sendAs(ctx, ep, t, q, c.session(ep, t, authn.AuthConfig{}))
}

// sendAs asks ep as s: admission, authentication (with one more try after a
// 401), redirects, classification.
func (c *Client) sendAs(ctx context.Context, ep *endpoint, t Target, q request, s *session) (*answer, error) {
	wrap := func(err error) error { return c.describe(err, ep, t, q) }
	account := s.fingerprint
	if t.Authorization != "" { // the caller is throttled apart from us, and from others
		account = fingerprint(authn.AuthConfig{RegistryToken: t.Authorization})
	}
	visit, err := ep.enter(ctx, q, account)
	if err != nil {
		return nil, wrap(err)
	}
	began := time.Now()
	resp, moved, err := ep.authenticated(ctx, s, t, q)
	if err != nil {
		err = wrap(err)
		visit.leave(ep.judge(ctx, err, time.Since(began)))
		return nil, err
	}
	if resp.StatusCode < 500 {
		ep.noteAnswer(time.Since(began), time.Now())
	}
	if resp.StatusCode/100 != 2 {
		err := wrap(ep.refusal(resp, s, q.kind, moved))
		if t.Authorization != "" && moved == nil {
			err.(*Error).Challenge = short(resp.Header.Values("WWW-Authenticate")) // it is the client's to read why
		}
		visit.leave(ep.judge(ctx, err, time.Since(began)))
		if resp.StatusCode == http.StatusTooManyRequests && moved == nil {
			ep.pause(pauseKey{bulk: q.bulk, credential: account}, err.(*Error).RetryAfter, time.Now())
		}
		return nil, err
	}
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		resp.Body.Close()
		err := wrap(fmt.Errorf("%w: Content-Encoding %q although identity was asked for", ErrBadAnswer, clip(enc, 32)))
		ep.noteError(err, time.Now())
		visit.leave(failed)
		return nil, err
	}
	if resp.Request.Method == http.MethodHead {
		visit.leave(good)
	}
	resp.Body = &settled{timed: resp.Body.(*timed), visit: visit, wrap: wrap}
	return &answer{resp, moved}, nil
}

// describe makes err the package's *Error, filling in what it lacks.
func (c *Client) describe(err error, ep *endpoint, t Target, q request) error {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		e = &Error{Err: err}
	}
	out := *e
	out.Registry, out.Repository = t.Registry, t.Repository
	out.Op = cmp.Or(out.Op, q.op)
	out.Endpoint = cmp.Or(out.Endpoint, ep.addr.host)
	return &out
}

// judge decides what a failure says of the endpoint. Statuses below 500 are
// answers; our own refusals and cancelled callers say nothing; a deadline does,
// if the endpoint had a fair time.
func (ep *endpoint) judge(ctx context.Context, err error, took time.Duration) outcome {
	e := err.(*Error)
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return neutral
	case errors.Is(err, ErrRefused):
		ep.noteError(err, time.Now())
		ep.refusals.Do(func() {
			ep.c.refusals.Do(func() {
				ep.c.log.Warn("pulls go past Larder: this registry, or where it leads, is not asked", "registry", ep.reg.Host, "err", err)
			})
		})
		return neutral
	case ctx.Err() != nil && took < fairTime:
		return neutral
	case e.Status != 0 && e.Status < 500:
		if e.Status == http.StatusTooManyRequests {
			ep.noteError(err, time.Now())
		}
		return good
	}
	ep.noteError(err, time.Now())
	if e.Op == opToken {
		return neutral // who needs no token is answered
	}
	return failed
}

// fairTime is how long a caller must have waited before its deadline counts
// against the endpoint.
const fairTime = time.Second

// authenticated sends q with the right Authorization.
func (ep *endpoint) authenticated(ctx context.Context, s *session, t Target, q request) (*http.Response, *url.URL, error) {
	auth := t.Authorization
	ours := auth == "" && !q.bare && q.at == nil
	if ours {
		var err error
		if auth, err = s.header(ctx); err != nil {
			return nil, nil, err
		}
	}
	resp, moved, err := ep.follow(ctx, ep.build(ctx, t, q, auth), q)
	if err != nil || !ours || moved != nil || !s.answerable(resp.StatusCode, auth) {
		return resp, moved, err
	}
	next, err := s.answer(ctx, resp.Header.Values("WWW-Authenticate"), auth)
	if err != nil || next == "" {
		if err != nil {
			resp.Body.Close()
			return nil, nil, err
		}
		return resp, nil, nil
	}
	drain(resp.Body)
	return ep.follow(ctx, ep.build(ctx, t, q, next), q)
}

func (ep *endpoint) build(ctx context.Context, t Target, q request, auth string) *http.Request {
	u := q.at
	if u == nil {
		u = &url.URL{Scheme: ep.addr.scheme, Host: ep.addr.host, Path: ep.addr.base + t.Repository + "/" + q.path, RawQuery: q.query}
		if ep.mirrors() {
			v := u.Query()
			v.Set("ns", t.Registry)
			u.RawQuery = v.Encode()
		}
	}
	req := (&http.Request{Method: q.method, URL: u, Host: u.Host, Header: http.Header{}, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}).WithContext(ctx)
	req.Header.Set("User-Agent", ep.c.cfg.UserAgent)
	req.Header.Set("Accept-Encoding", "identity")
	if len(q.accept) > 0 {
		req.Header.Set("Accept", strings.Join(q.accept, ", "))
	}
	if q.rng != "" {
		req.Header.Set("Range", q.rng)
	}
	if auth != "" && q.at == nil {
		req.Header.Set("Authorization", auth)
	}
	return req
}

const maxRedirects = 5

// blobPatience is how many times FirstByte the last of a registry's upstreams has for
// a blob. Some that are caches themselves (Nexus) fetch all of it before they answer,
// and begin anew when they are asked again. A dead path is noticed sooner, see
// setOptions.
const blobPatience = 6

// follow sends req and goes where it is sent. moved is the final URL if that
// is another origin. The credential stays with the endpoint's own origin, and
// once another was visited it is gone for good.
func (ep *endpoint) follow(ctx context.Context, req *http.Request, q request) (resp *http.Response, moved *url.URL, err error) {
	visited := map[string]bool{}
	patience := ep.c.cfg.FirstByte
	if q.bulk && ep.last {
		patience *= blobPatience
	}
	for {
		visited[req.URL.String()] = true
		resp, err = ep.exchange(ctx, req, q.kind, patience)
		if err != nil {
			return nil, nil, err
		}
		if !redirects(resp.StatusCode) {
			if !ep.origin(req.URL) {
				moved = req.URL
			}
			return resp, moved, nil
		}
		location := resp.Header.Get("Location")
		drain(resp.Body)
		target, err := req.URL.Parse(location)
		switch {
		case err != nil || location == "":
			return nil, nil, fmt.Errorf("%w: a redirect without a usable Location", ErrBadAnswer)
		case visited[target.String()]:
			return nil, nil, fmt.Errorf("%w: redirects in a circle at %s", ErrBadAnswer, clip(target.Host, maxShownHost))
		case len(visited) > maxRedirects:
			return nil, nil, fmt.Errorf("%w: more than %d redirects", ErrBadAnswer, maxRedirects)
		case req.URL.Scheme == "https" && target.Scheme == "http" && !ep.reg.plain(target):
			return nil, nil, fmt.Errorf("%w: redirect from https to http at %s", ErrRefused, clip(target.Host, maxShownHost))
		}
		next := req.Clone(ctx)
		next.URL, next.Host = target, target.Host
		if !ep.origin(target) {
			next.Header.Del("Authorization")
		}
		req = next
	}
}

func redirects(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// plain says whether an operator wrote this http origin into upstreams.
func (r *registry) plain(u *url.URL) bool {
	return r.configured && slices.ContainsFunc(r.endpoints, func(ep *endpoint) bool { return ep.origin(u) })
}

func (ep *endpoint) origin(u *url.URL) bool {
	mine := &url.URL{Scheme: ep.addr.scheme, Host: ep.addr.host}
	return u.Scheme == mine.Scheme && strings.EqualFold(dialAddress(u), dialAddress(mine))
}

// settled reports to the endpoint's breaker how a body fares: some progress, its end
// or an early close is good, breaking off before that is not. Progress is reported at
// once: while an endpoint is probed other requests wait, and a blob may take an hour.
type settled struct {
	*timed
	visit *visit
	wrap  func(error) error
	read  int64
}

func (b *settled) Read(p []byte) (int, error) {
	n, err := b.timed.Read(p)
	if b.read += int64(n); b.read >= minProgress {
		b.visit.tell(good)
	}
	if err == nil || err == io.EOF {
		return n, err
	}
	err = b.wrap(err)
	switch {
	case errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
		b.visit.leave(neutral)
		return n, err
	case b.read >= minProgress:
		b.ep.noteError(err, time.Now())
		b.visit.leave(good)
	default:
		b.ep.noteError(err, time.Now())
		b.visit.leave(failed)
	}
	return n, err
}

func (b *settled) Close() error {
	b.visit.leave(good)
	return b.timed.Close()
}

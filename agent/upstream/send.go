package upstream

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
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
	// moved is where another host served it, nil if the endpoint did.
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
	leave, err := ep.enter(ctx, q, account)
	if err != nil {
		return nil, wrap(err)
	}
	began := time.Now()
	resp, moved, err := ep.authenticated(ctx, s, t, q)
	if err != nil {
		err = wrap(err)
		leave(ep.judge(ctx, err, time.Since(began)))
		return nil, err
	}
	if resp.StatusCode < 500 {
		ep.noteAnswer(time.Since(began), time.Now())
	}
	if resp.StatusCode/100 != 2 {
		err := wrap(ep.refusal(resp, s, q.kind, moved))
		if t.Authorization != "" && moved == nil {
			err.(*Error).Challenge = resp.Header.Values("WWW-Authenticate") // it is the client's to read why
		}
		leave(ep.judge(ctx, err, time.Since(began)))
		if resp.StatusCode == http.StatusTooManyRequests && moved == nil {
			ep.pause(pauseKey{q.bulk, account}, err.(*Error).RetryAfter, time.Now())
		}
		return nil, err
	}
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		resp.Body.Close()
		err := wrap(fmt.Errorf("%w: Content-Encoding %q although identity was asked for", ErrBadAnswer, clip(enc, 32)))
		ep.noteError(err, time.Now())
		leave(failed)
		return nil, err
	}
	if resp.Request.Method == http.MethodHead {
		leave(good)
	}
	resp.Body = &settled{ReadCloser: resp.Body, ep: ep, leave: leave, wrap: wrap}
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
	case errors.Is(ctx.Err(), context.Canceled), errors.Is(err, ErrRefused):
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
// and begin anew when they are asked again. A path that is dead is noticed before, see
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
			return nil, nil, fmt.Errorf("%w: redirects in a circle at %s", ErrBadAnswer, target.Host)
		case len(visited) > maxRedirects:
			return nil, nil, fmt.Errorf("%w: more than %d redirects", ErrBadAnswer, maxRedirects)
		case req.URL.Scheme == "https" && target.Scheme == "http" && !ep.reg.plain(target):
			return nil, nil, fmt.Errorf("%w: redirect from https to http at %s", ErrRefused, target.Host)
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
	for _, ep := range r.endpoints {
		if r.configured && ep.origin(u) {
			return true
		}
	}
	return false
}

func (ep *endpoint) origin(u *url.URL) bool {
	mine := &url.URL{Scheme: ep.addr.scheme, Host: ep.addr.host}
	return u.Scheme == mine.Scheme && strings.EqualFold(dialAddress(u), dialAddress(mine))
}

// exchange sends one HTTP request, waits at most limit for its headers and
// counts it. Reads of the body are bounded by Config.Stall, each by itself.
func (ep *endpoint) exchange(ctx context.Context, req *http.Request, k kind, limit time.Duration) (*http.Response, error) {
	if req.URL.Scheme != "http" && req.URL.Scheme != "https" {
		return nil, fmt.Errorf("%w: scheme %q", ErrRefused, clip(req.URL.Scheme, 16))
	}
	trs, err := ep.transport()
	if err != nil {
		return nil, err
	}
	tr, own := trs.foreign, ep.origin(req.URL)
	if own {
		tr = trs.own
	}
	if err := ep.ruling(!own).checkURL(req.URL); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(limit, func() { cancel(fmt.Errorf("%w: no answer within %s", ErrStalled, limit)) })
	resp, err := tr.RoundTrip(req.WithContext(ctx))
	timer.Stop()
	if err != nil {
		err = reason(ctx, err)
		cancel(nil)
		ep.c.metrics.count(ep.reg.label, k, 0)
		return nil, err
	}
	ep.c.metrics.count(ep.reg.label, k, resp.StatusCode)
	ep.noteLimit(resp.Header)
	resp.Body = &timed{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, timer: timer, stall: ep.c.cfg.Stall, ep: ep, bulk: k == kindBlob}
	return resp, nil
}

// reason prefers our own deadline over the "context canceled" it caused.
func reason(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); errors.Is(cause, ErrStalled) {
		return cause
	}
	return err
}

// timed is a response body whose single reads end in time, at the pace of
// the byte-rate limits.
type timed struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer // cancels ctx
	stall  time.Duration
	ep     *endpoint
	bulk   bool
	armed  sync.Once
}

func (b *timed) Read(p []byte) (int, error) {
	// The timer that bounded the headers is done; this one bounds each read.
	b.armed.Do(func() {
		b.timer = time.AfterFunc(b.stall, func() { b.cancel(fmt.Errorf("%w: no byte within %s", ErrStalled, b.stall)) })
	})
	p = p[:min(len(p), burst)]
	b.timer.Reset(b.stall)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	if err != nil && err != io.EOF {
		err = reason(b.ctx, err)
	}
	if n > 0 && b.bulk {
		if werr := b.ep.throttle(b.ctx, n); err == nil {
			err = werr
		}
	}
	return n, err
}

func (b *timed) Close() error {
	b.timer.Stop()
	b.cancel(nil)
	return b.ReadCloser.Close()
}

// throttle waits until n more bytes are within the limits. The bytes have
// been read; the wait holds back the next read, and TCP the sender.
func (ep *endpoint) throttle(ctx context.Context, n int) error {
	if l := ep.reg.limiter; l != nil {
		if err := l.WaitN(ctx, n); err != nil {
			return err
		}
	}
	if l := ep.c.limiter; l != nil {
		return l.WaitN(ctx, n)
	}
	return nil
}

// settled reports to the endpoint's breaker how a body ended: to its end,
// closed early or with some progress is good, broken off before is not.
type settled struct {
	io.ReadCloser
	ep    *endpoint
	leave func(outcome)
	wrap  func(error) error
	read  int64
}

func (b *settled) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.read += int64(n)
	if err == nil || err == io.EOF {
		return n, err
	}
	err = b.wrap(err)
	switch {
	case errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
		b.leave(neutral)
		return n, err
	case b.read >= minProgress:
		b.ep.noteError(err, time.Now())
		b.leave(good)
	default:
		b.ep.noteError(err, time.Now())
		b.leave(failed)
	}
	return n, err
}

func (b *settled) Close() error {
	b.leave(good)
	return b.ReadCloser.Close()
}

// maxErrorBody is plenty for OCI errors and little for a page of HTML.
const maxErrorBody = 8 << 10

// drain reads the rest of a small body so that its connection can be used again.
func drain(body io.ReadCloser) {
	io.CopyN(io.Discard, body, maxErrorBody) //nolint:errcheck // only the connection is at stake
	body.Close()
}

// refusal turns a response that is no 2xx into an *Error.
func (ep *endpoint) refusal(resp *http.Response, s *session, k kind, moved *url.URL) error {
	e := &Error{Status: resp.StatusCode, RetryAfter: parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // what there is
	drain(resp.Body)
	e.Code, e.Message = errorCode(body, carried(resp.Request))
	if moved != nil {
		e.Endpoint = moved.Host
		if k == kindBlob && expired(e.Status) {
			// A CDN's no is about a signed URL, not about the caller or the blob.
			e.Status, e.Err = http.StatusBadGateway, fmt.Errorf("%w: a redirect led to %d", ErrBadAnswer, resp.StatusCode)
		}
		return e // without its challenge: no credential of ours is meant for that host
	}
	e.refused = refuses(e.Status, e.Code, resp.Request)
	if e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden {
		headers := resp.Header.Values("WWW-Authenticate")
		e.Challenge = headers
		if resp.Request.Header.Get("Authorization") != "" {
			e.Challenge = s.pristine(headers)
		}
	}
	return e
}

// refuses says whether an answer is about the Authorization that req carried,
// or its lack. ECR answers 400 with the code DENIED to a password it cannot
// read; to a HEAD it gives no code.
func refuses(status int, code string, req *http.Request) bool {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden:
		return true
	case http.StatusBadRequest:
		return req.Header.Get("Authorization") != "" &&
			(code == "DENIED" || code == "UNAUTHORIZED" || code == "" && req.Method == http.MethodHead)
	}
	return false
}

// expired lists what storage services answer to a signed URL past its time.
func expired(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusGone:
		return true
	}
	return false
}

// carried lists the secrets that req was sent with.
func carried(req *http.Request) (secrets []string) {
	_, secret, _ := strings.Cut(req.Header.Get("Authorization"), " ")
	_, password, _ := req.BasicAuth()
	return slices.DeleteFunc([]string{secret, password}, func(s string) bool { return s == "" })
}

// errorCode reads the first of a registry's errors (distribution-spec, "Error
// codes"), unless it repeats a secret.
func errorCode(body []byte, secrets []string) (code, message string) {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &doc) != nil || len(doc.Errors) == 0 {
		return "", ""
	}
	first := doc.Errors[0]
	for _, s := range secrets {
		if strings.Contains(first.Code+" "+first.Message, s) {
			return "", ""
		}
	}
	return clip(first.Code, 64), clip(first.Message, 200)
}

// noteLimit keeps what Docker Hub says of its pull limit.
func (ep *endpoint) noteLimit(h http.Header) {
	remaining, window, ok := parseRateLimit(h.Get("Ratelimit-Remaining"))
	if !ok {
		return
	}
	total, _, _ := parseRateLimit(h.Get("Ratelimit-Limit"))
	ep.mu.Lock()
	ep.limit = &RateLimit{Limit: total, Remaining: remaining, Window: window}
	ep.mu.Unlock()
	ep.c.metrics.remaining.WithLabelValues(ep.reg.label).Set(float64(remaining))
	if total > 0 {
		ep.c.metrics.allowed.WithLabelValues(ep.reg.label).Set(float64(total))
	}
}

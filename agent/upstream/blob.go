package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
)

// source is one blob of one registry; the streams of a fetch share it.
type source struct {
	c   *Client
	reg *registry
	t   Target
	d   digest.Digest

	mu    sync.Mutex // guards all below
	size  int64      // -1 = unknown
	moved map[*endpoint]*url.URL
}

func (c *Client) newSource(t Target, d digest.Digest, op string) (*source, error) {
	reg, err := c.lookup(t.Registry)
	if err == nil {
		err = d.Validate()
	}
	if err != nil {
		return nil, &Error{Registry: t.Registry, Repository: t.Repository, Op: op, Err: err}
	}
	return &source{c: c, reg: reg, t: t, d: d, size: -1, moved: map[*endpoint]*url.URL{}}, nil
}

// agree holds every answer to the first size that was known.
func (s *source) agree(size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.size >= 0 && s.size != size {
		return &sizeError{size: size, was: s.size}
	}
	s.size = size
	return nil
}

// sizeError says that a registry gives another size for a blob than before, or than
// the caller believes.
type sizeError struct{ size, was int64 }

func (e *sizeError) Error() string {
	return fmt.Sprintf("%v: size %d, but it was %d", ErrBadAnswer, e.size, e.was)
}
func (e *sizeError) Unwrap() error { return ErrBadAnswer }

func (s *source) known() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size
}

func (s *source) redirect(ep *endpoint) *url.URL {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.moved[ep]
}

func (s *source) setRedirect(ep *endpoint, u *url.URL) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.moved[ep] = u
}

// noRanges says whether no endpoint that would be asked takes ranges.
func (s *source) noRanges() bool {
	return !slices.ContainsFunc(s.reg.endpoints, func(ep *endpoint) bool { return ep.ranges.Load() != rangesNo })
}

// stream reads [off, end) of a source in order and recovers by itself: after
// a cut, a stall, an expired token or signed URL it goes on by Range, at the
// next upstream if need be. It gives up after maxIdle tries without progress.
// One goroutine at a time may use it.
type stream struct {
	src   *source
	op    string
	off   int64 // of the next byte Read returns
	end   int64 // -1 = the blob's end
	extra bool  // runs beside another: only useful with ranges and a free slot

	body    io.ReadCloser
	bodyEnd int64 // where body ends
	from    *endpoint
	skip    int64 // bytes of body before off
	gained  int64 // since body was opened
	idle    int   // tries in a row that gained less than minProgress
	avoid   *endpoint
	moving  bool // at least one byte was ever read
	counted bool // by fetch.arrived
}

const (
	// maxIdle tries in a row without progress end a stream: with backoff and
	// stall deadlines that is between half a second and a minute and a half, or
	// more where the registry itself asks for patience (Retry-After).
	maxIdle = 5
	// minProgress is what a try must gain to be worth another of the same kind;
	// without it a registry that cuts after each byte would be asked forever.
	minProgress = 32 << 10
	// cheapSkip is how much of a body may be read in vain because the registry
	// ignored Range, before another upstream is asked instead.
	cheapSkip = 1 << 20
)

var errNoRanges = errors.New("the registry ignores Range")

// Read returns io.EOF at end only, and an *Error when the stream gave up.
func (st *stream) Read(ctx context.Context, p []byte) (int, error) {
	for {
		if st.done() {
			return 0, io.EOF
		}
		if st.body == nil {
			if err := st.ready(ctx); err != nil {
				return 0, err
			}
			continue // the size is known now; off may be the end
		}
		if st.off >= st.bodyEnd { // a registry may answer with less than was asked for
			st.close()
			continue
		}
		n, err := st.read(p)
		if n > 0 {
			return n, nil // an error comes back with the next read
		}
		if err == nil {
			continue
		}
		if err = st.broken(err); !st.again(ctx, err) { // never io.EOF, which says that all is there
			return 0, err
		}
	}
}

// ready opens the body, with all the patience a stream has, unless it is open
// or nothing is left to read.
func (st *stream) ready(ctx context.Context) error {
	for st.body == nil && !st.done() {
		if err := st.open(ctx); err != nil && !st.again(ctx, err) {
			return err
		}
	}
	return nil
}

func (st *stream) done() bool {
	end := st.limit()
	return end >= 0 && st.off >= end
}

// limit is where the stream ends: no later than the blob does; -1 = unknown.
func (st *stream) limit() int64 {
	size := st.src.known()
	if st.end >= 0 && size >= 0 {
		return min(st.end, size)
	}
	return max(st.end, size)
}

// read reads the open body up to end and keeps count.
func (st *stream) read(p []byte) (int, error) {
	if st.skip > 0 {
		n, err := st.body.Read(p[:min(int64(len(p)), st.skip)])
		st.skip -= int64(n)
		return 0, err
	}
	limit := st.bodyEnd
	if st.end >= 0 {
		limit = min(limit, st.end)
	}
	n, err := st.body.Read(p[:min(int64(len(p)), limit-st.off)])
	st.off += int64(n)
	st.gained += int64(n)
	if n > 0 {
		st.moving = true
	}
	if st.gained >= minProgress {
		st.idle = 0
	}
	return n, err
}

// broken closes a body that ended before its time.
func (st *stream) broken(err error) error {
	// Where it broke, the same address might break again; let the registry
	// name another.
	st.src.setRedirect(st.from, nil)
	st.avoid = st.from
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	st.close()
	return st.fail(err)
}

func (st *stream) fail(err error) error {
	ep := st.from
	if ep == nil {
		ep = st.src.reg.final()
	}
	return st.src.c.describe(err, ep, st.src.t, request{op: st.op})
}

func (st *stream) close() {
	if st.body != nil {
		st.body.Close()
		st.body = nil
	}
	st.skip, st.gained = 0, 0
}

// again decides whether to go on after err, and waits before it says yes.
func (st *stream) again(ctx context.Context, err error) bool {
	e, ok := errors.AsType[*Error](err)
	switch {
	case ctx.Err() != nil || !ok || !IsUnavailable(err):
		return false
	case errors.Is(err, ErrNoContact), errors.Is(err, errNoRanges), errors.Is(err, errBusy):
		return false
	case (errors.Is(err, ErrCircuitOpen) || errors.Is(err, errLookup)) && !st.moving:
		return false // fail fast; a reader that already has bytes is worth the wait
	}
	st.idle++
	return st.idle <= maxIdle && pause(ctx, backoff(st.idle-1, e.RetryAfter))
}

// open asks the upstreams for what is left, in order, and keeps the first
// answer that can be used.
func (st *stream) open(ctx context.Context) error {
	var whole *endpoint // ignores Range, which costs more than cheapSkip
	order := st.src.reg.order(st.src.t)
	if len(order) > 1 && order[0] == st.avoid {
		order = append(order[1:len(order):len(order)], order[0])
	}
	most := int64(cheapSkip)
	if len(order) == 1 {
		most = math.MaxInt64
	}
	err := firstAnswer(ctx, order, func(ep *endpoint) error {
		err := st.openAt(ctx, ep, most)
		if errors.Is(err, errNoRanges) && !st.extra {
			whole = ep
		}
		return err
	})
	if err != nil && whole != nil && ctx.Err() == nil { // the last resort: read all of it again for its end
		return st.openAt(ctx, whole, math.MaxInt64)
	}
	return err
}

// openAt keeps the answer of ep unless more than most bytes of it lie before off.
func (st *stream) openAt(ctx context.Context, ep *endpoint, most int64) error {
	resp, err := st.ask(ctx, ep)
	if err != nil {
		return err
	}
	skip, err := st.accept(resp, ep)
	if err == nil && skip > most {
		err = errNoRanges
	}
	if err != nil {
		resp.Body.Close()
		return st.src.c.describe(err, ep, st.src.t, request{op: st.op})
	}
	if resp.moved != nil {
		st.src.setRedirect(ep, resp.moved)
	}
	st.body, st.from, st.skip, st.gained, st.avoid = resp.Body, ep, skip, 0, nil
	return nil
}

// ask sends the request for [off, end) to ep: first where an earlier redirect
// led, if any, and to the registry itself if that fails.
func (st *stream) ask(ctx context.Context, ep *endpoint) (*answer, error) {
	q := request{op: st.op, kind: kindBlob, method: http.MethodGet, path: "blobs/" + st.src.d.String(), bulk: true, spare: st.extra}
	switch end := st.limit(); {
	case end != st.src.known():
		q.rng = fmt.Sprintf("bytes=%d-%d", st.off, end-1)
	case st.off > 0:
		q.rng = fmt.Sprintf("bytes=%d-", st.off)
	}
	resp, err := st.askFor(ctx, ep, q)
	e, ok := errors.AsType[*Error](err)
	switch {
	case !ok || e.Status != http.StatusRequestedRangeNotSatisfiable:
		return resp, err
	case st.off == 0:
		q.rng = "" // nothing of an empty blob can be asked for
		return st.askFor(ctx, ep, q)
	case st.off < st.src.known(): // it ends no later than here
		return nil, st.src.c.describe(&sizeError{size: st.off, was: st.src.known()}, ep, st.src.t, q)
	}
	return nil, err
}

func (st *stream) askFor(ctx context.Context, ep *endpoint, q request) (*answer, error) {
	if q.at = st.src.redirect(ep); q.at != nil {
		resp, err := st.src.c.send(ctx, ep, st.src.t, q)
		if err == nil || ctx.Err() != nil || errors.Is(err, errBusy) {
			return resp, err
		}
		st.src.setRedirect(ep, nil)
		q.at = nil
	}
	return st.src.c.send(ctx, ep, st.src.t, q)
}

// accept checks an answer against what was asked and returns how many of its
// bytes lie before off.
func (st *stream) accept(resp *answer, ep *endpoint) (skip int64, err error) {
	asked := resp.Request.Header.Get("Range") != ""
	switch {
	case resp.StatusCode == http.StatusPartialContent && asked:
		return 0, st.acceptPart(resp, ep)
	case resp.StatusCode != http.StatusOK:
		return 0, fmt.Errorf("%w: status %d to a GET", ErrBadAnswer, resp.StatusCode)
	case asked && (st.off > 0 || st.end < resp.ContentLength): // else: all of it was asked for
		ep.ranges.Store(rangesNo)
		if st.extra {
			return 0, errNoRanges
		}
	}
	if resp.ContentLength < 0 {
		return 0, fmt.Errorf("%w: a blob without Content-Length", ErrBadAnswer)
	}
	if webPage(resp.Response) && st.src.known() != resp.ContentLength {
		return 0, fmt.Errorf("%w: a web page instead of a blob", ErrBadAnswer)
	}
	st.bodyEnd = resp.ContentLength
	return st.off, st.src.agree(resp.ContentLength)
}

// acceptPart checks a 206 to the byte: one that lies would put the right
// bytes in the wrong places.
func (st *stream) acceptPart(resp *answer, ep *endpoint) error {
	start, end, total, err := parseContentRange(resp.Header.Get("Content-Range"))
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrBadAnswer, err)
	case start != st.off:
		return fmt.Errorf("%w: a range from %d instead of %d", ErrBadAnswer, start, st.off)
	case st.end >= 0 && end > st.end:
		return fmt.Errorf("%w: a range to %d instead of %d", ErrBadAnswer, end, st.end)
	case resp.ContentLength >= 0 && resp.ContentLength != end-start:
		return fmt.Errorf("%w: %d bytes for a range of %d", ErrBadAnswer, resp.ContentLength, end-start)
	case total < 0 && st.src.known() < 0:
		return fmt.Errorf("%w: a range of unknown size", ErrBadAnswer)
	case total < 0:
		total = st.src.known()
	}
	if err := st.src.agree(total); err != nil {
		return err
	}
	if end > total {
		return fmt.Errorf("%w: a range past the end", ErrBadAnswer)
	}
	ep.ranges.Store(rangesYes)
	st.bodyEnd = end
	return nil
}

// Blob streams a blob from off to end, -1 for the blob's end. It recovers like Fetch, but keeps
// and verifies nothing. The caller closes body; ctx reaches to its end.
func (c *Client) Blob(ctx context.Context, t Target, d digest.Digest, off, end int64) (body io.ReadCloser, size int64, err error) {
	src, err := c.newSource(t, d, "blob")
	if err != nil {
		return nil, 0, err
	}
	st := &stream{src: src, op: "blob", off: off, end: end}
	if err := st.ready(ctx); err != nil {
		return nil, 0, err
	}
	return &blobBody{ctx, st}, src.known(), nil
}

type blobBody struct {
	ctx context.Context //nolint:containedctx // an io.Reader has no other way to it
	st  *stream
}

func (b *blobBody) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return b.st.Read(b.ctx, p)
}

func (b *blobBody) Close() error {
	b.st.close()
	return nil
}

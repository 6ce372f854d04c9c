package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"syscall"
	"time"
)

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
	var conn net.Conn
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) { conn = got.Conn }})
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
	stall := ep.c.cfg.Stall
	timer = time.AfterFunc(stall, func() { cancel(fmt.Errorf("%w: no byte within %s", ErrStalled, stall)) })
	timer.Stop() // until somebody reads
	resp.Body = &timed{ReadCloser: resp.Body, conn: conn, ctx: ctx, cancel: cancel, timer: timer, stall: stall, ep: ep, bulk: k == kindBlob}
	return resp, nil
}

// reason prefers our own deadline to the "context canceled" that it caused.
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
	conn   net.Conn // it comes over
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer // cancels ctx when a read has taken as long as stall
	stall  time.Duration
	ep     *endpoint
	bulk   bool
	brief  bool // timer is for all reads together, see drain
}

func (b *timed) Read(p []byte) (int, error) {
	p = p[:min(len(p), burst)]
	if !b.brief {
		b.timer.Reset(b.stall)
	}
	n, err := b.ReadCloser.Read(p)
	if !b.brief {
		b.timer.Stop()
	}
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

// unread is how many bytes of the body, or of what follows on its connection, this
// machine has received and nobody has read; 0 if the connection is gone. Any goroutine
// may ask.
func (b *timed) unread() int {
	conn := b.conn
	if over, ok := conn.(interface{ NetConn() net.Conn }); ok { // TLS
		conn = over.NetConn()
	}
	if c, ok := conn.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			return unread(raw)
		}
	}
	return 0
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

// maxErrorBody is plenty for OCI errors and little for a page of HTML.
const maxErrorBody = 16 << 10

// drain reads and closes a small body, so that its connection can be used again. It
// gives the whole as long as a single read has elsewhere, and returns what came.
func drain(body io.ReadCloser) []byte {
	defer body.Close()
	if b, ok := body.(*timed); ok {
		b.brief = true
		b.timer.Reset(b.stall)
	}
	text, _ := io.ReadAll(io.LimitReader(body, maxErrorBody)) // only the connection is at stake
	return text
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

package registrytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

// answer is what a request is about to get. Faults change it before it is sent.
type answer struct {
	request     *Request
	status      int
	header      http.Header
	content     Content
	rangeHeader string // to be honoured; "" = none

	delay       time.Duration
	held        []*Fault
	stallAt     int64 // offsets in the body sent; -1 = never
	stalled     *Fault
	cutAt       int64
	reset       bool
	lengthDelta int64
	shift       int64
	mislabel    int64
	rangeTotal  int64 // -1 = the truth
	omit        []string
	rate        int64
}

func newAnswer(r *Request) *answer {
	return &answer{
		request: r,
		status:  http.StatusOK,
		header:  http.Header{},
		content: Bytes(nil),
		stallAt: -1, cutAt: -1, rangeTotal: -1,
	}
}

// setError makes the answer an error in the words of the specification.
func (a *answer) setError(status int, code, message string) {
	a.status, a.rangeHeader = status, ""
	a.header = http.Header{"Content-Type": {"application/json"}}
	a.content = Bytes(mustJSON(map[string]any{
		"errors": []map[string]string{{"code": code, "message": message}},
	}))
}

// setRedirect keeps no digest: registries send none with a redirect.
func (a *answer) setRedirect(url string) {
	a.status, a.rangeHeader = http.StatusTemporaryRedirect, ""
	a.header = http.Header{"Location": {url}}
	a.content = Bytes(nil)
}

// span is the part of the content to send.
type span struct{ off, n int64 }

// resolveRange turns the range asked for into status, headers and what to send.
func (a *answer) resolveRange() span {
	size := a.content.Size()
	if a.rangeHeader == "" {
		return span{0, size}
	}
	s, ok := parseRange(a.rangeHeader, size)
	if !ok {
		a.setError(http.StatusRequestedRangeNotSatisfiable, "RANGE_INVALID", "no such range")
		a.header.Set("Content-Range", fmt.Sprintf("bytes */%d", size))
		return span{0, a.content.Size()}
	}
	end := s.off + s.n
	s.off = min(max(s.off+a.shift, 0), size-1)
	s.n = min(max(end+a.shift, s.off+1), size) - s.off
	total := size
	if a.rangeTotal >= 0 {
		total = a.rangeTotal
	}
	a.status = http.StatusPartialContent
	from := s.off + a.mislabel
	a.header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, from+s.n-1, total))
	return s
}

// parseRange understands one range (RFC 9110, 14.1.2), which is what registries
// get; anything else is not satisfiable.
func parseRange(header string, size int64) (span, bool) {
	first, last, ok := strings.Cut(strings.TrimPrefix(header, "bytes="), "-")
	if !ok || !strings.HasPrefix(header, "bytes=") || size == 0 {
		return span{}, false
	}
	if first == "" {
		n, err := strconv.ParseInt(last, 10, 64)
		n = min(n, size)
		return span{size - n, n}, err == nil && n > 0
	}
	off, err := strconv.ParseInt(first, 10, 64)
	if err != nil || off < 0 || off >= size {
		return span{}, false
	}
	end := size - 1
	if last != "" {
		if end, err = strconv.ParseInt(last, 10, 64); err != nil || end < off {
			return span{}, false
		}
	}
	return span{off, min(end, size-1) - off + 1}, true
}

// errCut ends an answer that was cut on purpose.
var errCut = errors.New("cut")

// send writes the answer with all its faults.
func (a *answer) send(ctx context.Context, w http.ResponseWriter, l *ledger) {
	if !a.waitForHeaders(ctx) {
		panic(http.ErrAbortHandler)
	}
	s := a.resolveRange()
	for key, values := range a.header {
		w.Header()[key] = values
	}
	claim := max(s.n+a.lengthDelta, 0)
	s.n = min(s.n, claim)
	w.Header().Set("Content-Length", strconv.FormatInt(claim, 10))
	for _, key := range a.omit {
		w.Header().Del(key)
	}
	l.status(a.request, a.status)
	w.WriteHeader(a.status)
	if a.request.Method == http.MethodHead {
		return
	}
	if w.Header().Get("Content-Length") == "" {
		flush(w) // or net/http would count a short body itself
	}
	if err := a.sendBody(ctx, w, l, s); err != nil {
		a.abort(w)
	}
}

// waitForHeaders reports whether the client is still there when headers are due.
func (a *answer) waitForHeaders(ctx context.Context) bool {
	for _, f := range a.held {
		if f.hold(ctx) != nil {
			return false
		}
	}
	if a.delay == 0 {
		return true
	}
	select {
	case <-time.After(a.delay):
		return true
	case <-ctx.Done():
		return false
	}
}

// sendBody ends with an error if the answer must not look complete.
func (a *answer) sendBody(ctx context.Context, w http.ResponseWriter, l *ledger, s span) error {
	limit := newLimiter(a.rate)
	buf := make([]byte, min(copyBuffer, s.n, int64(limit.Burst())))
	for sent := int64(0); ; {
		if sent == a.cutAt {
			flush(w)
			return errCut
		}
		if sent == a.stallAt {
			flush(w)
			if err := a.stalled.hold(ctx); err != nil {
				return err
			}
			a.stallAt = -1
		}
		p := buf[:min(int64(len(buf)), s.n-sent, until(a.stallAt, sent), until(a.cutAt, sent))]
		if len(p) == 0 {
			return nil
		}
		if err := limit.WaitN(ctx, len(p)); err != nil {
			return err
		}
		n, err := a.copyChunk(w, l, p, s.off+sent)
		sent += int64(n)
		if err != nil {
			return err
		}
	}
}

// copyChunk counts bytes before it writes them, so that a client that has them
// finds them counted.
func (a *answer) copyChunk(w io.Writer, l *ledger, p []byte, off int64) (int, error) {
	n, err := a.content.ReadAt(p, off)
	if n < len(p) {
		return 0, fmt.Errorf("read content: %w", err)
	}
	l.bytes(a.request, len(p))
	if n, err = w.Write(p); n < len(p) {
		l.bytes(a.request, n-len(p))
	}
	return n, err
}

// until is how far it is from sent to a mark; far away for one that is not set.
func until(mark, sent int64) int64 {
	if mark < sent {
		return 1 << 62
	}
	return mark - sent
}

func newLimiter(bytesPerSecond int64) *rate.Limiter {
	if bytesPerSecond <= 0 {
		return rate.NewLimiter(rate.Inf, copyBuffer)
	}
	return rate.NewLimiter(rate.Limit(bytesPerSecond), burst(bytesPerSecond))
}

// burst is 10 ms worth of bytes: what a timer that fires late has missed is
// made up for, or one connection would stay far below a high rate.
func burst(bytesPerSecond int64) int {
	return int(min(max(bytesPerSecond/100, 1<<10), 8<<20))
}

func flush(w http.ResponseWriter) {
	// An error means that the client is gone; the next write says so.
	_ = http.NewResponseController(w).Flush()
}

// abort ends the connection: with RST if the fault says so, else with FIN.
func (a *answer) abort(w http.ResponseWriter) {
	if !a.reset {
		panic(http.ErrAbortHandler)
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	setLinger(conn)
	conn.Close()
}

// setLinger makes Close send RST.
func setLinger(conn net.Conn) {
	for {
		inner, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = inner.NetConn()
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails on a closed connection alone
	}
}

// apply lets the faults change the answer, in their order.
func (a *answer) apply(faults []*Fault) {
	for _, f := range faults {
		for _, effect := range f.effects {
			effect(a)
		}
	}
}

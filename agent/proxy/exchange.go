package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/larder-cache/larder/agent/cache"
)

// source is where an answer came from: the value of X-Larder-Source and of the
// label of the metrics.
type source string

const (
	sourceNone     source = "none" // nothing was served: an error, a ping
	sourceDisk     source = "disk"
	sourceRuntime  source = "runtime"
	sourcePeer     source = "peer"
	sourceUpstream source = "upstream"
	sourceStale    source = "stale"
)

const (
	headerSource    = "X-Larder-Source"
	headerNamespace = "Oci-Namespace" // canonical form of OCI-Namespace
	headerDigest    = "Docker-Content-Digest"
)

const (
	// writeChunk and writeTimeout bound how long a client that does not read
	// can hold a connection: 512 KiB must go out in two minutes, 4.3 KB/s,
	// below any link that an image can be pulled over at all. There is no
	// bound on the whole.
	writeChunk   = 512 << 10
	writeTimeout = 2 * time.Minute
	// copyBuffer is for bytes that are in no file.
	copyBuffer = 64 << 10
)

// exchange is one request and its answer. As a http.ResponseWriter it counts,
// stamps the headers that every answer has, and bounds how long each chunk may
// wait for the client. It keeps ReadFrom, so that files go out by sendfile.
type exchange struct {
	http.ResponseWriter
	proxy *Proxy
	r     *http.Request
	// ctx ends with the client, with a deadline of the exchange, or with the
	// server; its cause says which.
	ctx    context.Context
	cancel context.CancelCauseFunc
	access access // from begin on
	own    bool   // see OwnUserAgent
	start  time.Time
	// The next four are used by the handler's goroutine alone.
	status    int
	firstByte time.Duration
	err       error              // why the answer is not what was asked for
	served    prometheus.Counter // of sent bytes; nil before the first

	sent     atomic.Int64 // body bytes
	answered atomic.Bool  // headers are on their way
	overdue  atomic.Int32 // looks of the watchdog that found it so

	mu     sync.Mutex // guards the fields below, which Pulls and the watchdog look at
	route  route      // set by serve alone; the handler and what it starts read it without mu
	source source
	size   int64
	offset int64
}

func (p *Proxy) newExchange(w http.ResponseWriter, r *http.Request) *exchange {
	ctx, cancel := context.WithCancelCause(r.Context())
	return &exchange{
		ResponseWriter: w, proxy: p, r: r, ctx: ctx, cancel: cancel, start: time.Now(),
		route: route{kind: KindOther}, source: sourceNone, own: strings.HasPrefix(r.UserAgent(), OwnUserAgent),
	}
}

// Unwrap is for http.ResponseController.
func (x *exchange) Unwrap() http.ResponseWriter { return x.ResponseWriter }

// WriteHeader stamps and sends the headers.
func (x *exchange) WriteHeader(status int) {
	x.status = status
	x.firstByte = time.Since(x.start)
	h := x.Header()
	if x.route.registry != "" {
		h.Set(headerNamespace, x.route.registry)
	}
	if s := x.sourceLabel(); s != sourceNone && status < 400 {
		h.Set(headerSource, string(s))
	}
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	x.answered.Store(true)
	x.proxy.answers.Add(1)
	x.ResponseWriter.WriteHeader(status)
}

func (x *exchange) Write(b []byte) (int, error) {
	if x.status == 0 {
		x.WriteHeader(http.StatusOK)
	}
	x.extend()
	n, err := x.ResponseWriter.Write(b)
	x.count(int64(n))
	return n, err
}

// ReadFrom sends a body by extents of files and everything else through a
// buffer.
func (x *exchange) ReadFrom(r io.Reader) (int64, error) {
	if limited, ok := r.(*io.LimitedReader); ok {
		if b, ok := limited.R.(*body); ok {
			return b.sendTo(x, limited.N)
		}
	}
	return x.copy(r)
}

func (x *exchange) copy(r io.Reader) (int64, error) {
	buf := buffers.Get().(*[copyBuffer]byte)
	defer buffers.Put(buf)
	return io.CopyBuffer(struct{ io.Writer }{x}, r, buf[:])
}

// sendFile sends n bytes of file from its offset. The connection below sees an
// *io.LimitedReader over an *os.File, which is what sendfile needs.
func (x *exchange) sendFile(file *io.LimitedReader) (int64, error) {
	x.extend()
	below, ok := x.ResponseWriter.(io.ReaderFrom)
	if !ok {
		return x.copy(file)
	}
	n, err := below.ReadFrom(file)
	x.count(n)
	return n, err
}

// serveContent answers with size bytes of body, or the ranges of it that are asked for.
func (x *exchange) serveContent(size int64, body io.ReadSeeker) {
	refuseEmptyRange(x.r, size)
	http.ServeContent(x, x.r, "", time.Time{}, body)
}

// count adds n bytes of the body to the metrics as soon as they are sent, if they go to a
// runtime. At the end of the body would be too late for a chart: a layer can take minutes.
func (x *exchange) count(n int64) {
	x.sent.Add(n)
	if n <= 0 || x.own || x.status >= http.StatusMultipleChoices {
		return
	}
	if x.served == nil {
		x.served = x.proxy.metrics.served.WithLabelValues(string(x.sourceLabel()))
	}
	x.served.Add(float64(n))
}

var buffers = sync.Pool{New: func() any { return new([copyBuffer]byte) }}

// extend moves the write deadline, so that the client has the full time for the
// chunk that is sent next.
func (x *exchange) extend() {
	x.note(http.NewResponseController(x.ResponseWriter).SetWriteDeadline(time.Now().Add(writeTimeout)))
}

// refuseBody ends the connection after the answer if the client announces a body, for which
// net/http would wait without end, and before it answers if the connection is to go on.
func (x *exchange) refuseBody() {
	if x.r.ContentLength == 0 {
		return
	}
	x.Header().Set("Connection", "close")
	x.note(http.NewResponseController(x.ResponseWriter).SetReadDeadline(time.Now().Add(headerTimeout)))
}

// flush sends the headers before there is a body.
func (x *exchange) flush() {
	x.extend()
	x.note(http.NewResponseController(x.ResponseWriter).Flush())
}

// note keeps the first error of the connection.
func (x *exchange) note(err error) {
	if err != nil && !errors.Is(err, http.ErrNotSupported) && x.err == nil {
		x.err = err
	}
}

// within ends the exchange with cause unless stop is called within d.
func (x *exchange) within(d time.Duration, cause error) (stop func()) {
	t := time.AfterFunc(d, func() { x.cancel(cause) })
	return func() { t.Stop() }
}

func (x *exchange) setRoute(rt route) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.route = rt
}

// describe says what is being served, for the headers and for Pulls.
func (x *exchange) describe(s source, size, offset int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.source, x.size, x.offset = s, size, offset
}

// foundAt corrects where what is being served comes from.
func (x *exchange) foundAt(s source) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.source = s
}

func (x *exchange) sourceLabel() source {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.source
}

// sizeToSend is the size of what is being served, 0 if that is not known.
func (x *exchange) sizeToSend() int64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.size
}

// fail answers with err if nothing was answered yet.
func (x *exchange) fail(err error) {
	if cause := context.Cause(x.ctx); cause != nil && errors.Is(err, context.Canceled) {
		err = cause
	}
	x.err = err
	if x.status != 0 {
		return
	}
	e := toAPIError(err, x.route.kind, x.access.relay)
	if e.status == statusClientGone && x.r.Context().Err() == nil {
		e = errShutdown // somebody else's end: only the proxy's own work is cancelled
	}
	if e.status == statusClientGone {
		x.status = e.status
		return
	}
	x.describe(sourceNone, 0, 0)
	writeError(x, e)
}

// bound reports whether the client fails its pull if its next request is refused: one that is
// path-encoded (I5), and containerd that fetches a layer in chunks (inChunks).
func (x *exchange) bound() bool {
	x.mu.Lock()
	rt := x.route
	x.mu.Unlock()
	return rt.content() && (rt.pathEncoded || x.proxy.chunked.has(blobKey{cache.Repository{Registry: rt.registry, Name: rt.repository}, rt.digest}))
}

// cutShort reports a success that was announced and then not delivered.
func (x *exchange) cutShort() bool { return x.err != nil && x.status < 300 && x.status != 0 }

// connKey finds the connection of a request in its context.
type connKey struct{}

// hangUp closes the connection under an exchange whose handler does not
// answer, with FIN, so that the runtime goes on to the registry.
func (x *exchange) hangUp() {
	if conn, ok := x.r.Context().Value(connKey{}).(net.Conn); ok {
		_ = conn.Close() // it may be closed already
	}
}

func (x *exchange) event() Event {
	e := Event{
		Time: x.start, Kind: x.route.kind, Method: x.r.Method, Registry: x.route.registry, Repository: x.route.repository,
		Source: string(x.sourceLabel()), Status: x.status, Bytes: x.sent.Load(), Duration: time.Since(x.start),
		Remote: x.r.RemoteAddr, UserAgent: x.r.UserAgent(), Decision: string(x.access.decision), Err: x.err,
	}
	if x.proxy.opts.Audit != nil {
		e.Caller = x.proxy.auth.fingerprint(x.r.Header.Get("Authorization"))
	}
	if x.route.tag != "" || x.route.digest != "" {
		e.Reference = x.route.reference()
	}
	return e
}

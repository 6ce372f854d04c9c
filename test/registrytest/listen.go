package registrytest

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"
)

// endpoint is one port of the server.
type endpoint struct {
	addr    string
	tls     *tls.Config // nil = plain HTTP
	handler http.Handler
	limits  *limits

	mu   sync.Mutex // guards up and free
	up   *http.Server
	free func()         // lets the port go that nobody listens on; nil = is not kept
	open sync.WaitGroup // one for each connection and for the accept loop
}

// start serves on l until stop.
func (e *endpoint) start(l net.Listener) {
	e.mu.Lock()
	defer e.mu.Unlock()
	l = &limitedListener{l, e}
	if e.tls != nil {
		l = tls.NewListener(l, e.tls)
	}
	srv := &http.Server{
		Handler:  e.handler,
		ErrorLog: log.New(io.Discard, "", 0), // aborted on purpose, mostly
		// No HTTP/2: a cut must be the connection's, and runtimes speak 1.1.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	e.up = srv
	// Serve always ends with an error: that the server was closed.
	e.open.Go(func() { _ = srv.Serve(l) })
}

// stop closes the port and all connections, and waits for their goroutines.
func (e *endpoint) stop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.up != nil {
		_ = e.up.Close() // of a listener: nothing to be done about an error
		e.up = nil
	}
	e.open.Wait()
}

// keep holds the port of a stopped endpoint until it is released.
func (e *endpoint) keep() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.free == nil && e.up == nil {
		e.free, _ = keepPort(e.addr) // else it is as free as any
	}
}

func (e *endpoint) release() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.free != nil {
		e.free()
		e.free = nil
	}
}

// restart opens the same port again.
func (e *endpoint) restart() error {
	e.release()
	l, err := net.Listen("tcp", e.addr)
	if err != nil {
		return fmt.Errorf("listen again: %w", err)
	}
	e.start(l)
	return nil
}

// limits are the byte rates of everything the server sends; 0 = none.
type limits struct {
	perConn atomic.Int64
	uplink  *rate.Limiter
}

func newLimits() *limits {
	return &limits{uplink: rate.NewLimiter(rate.Inf, copyBuffer)}
}

// SetRate limits what the server sends, from now on: perConnection on each
// connection, uplink on all connections together, in bytes per second; 0 = no
// limit.
func (s *Server) SetRate(perConnection, uplink int64) {
	s.limits.perConn.Store(perConnection)
	if uplink <= 0 {
		s.limits.uplink.SetLimit(rate.Inf)
		return
	}
	s.limits.uplink.SetBurst(burst(uplink))
	s.limits.uplink.SetLimit(rate.Limit(uplink))
}

type limitedListener struct {
	net.Listener
	endpoint *endpoint
}

func (l *limitedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.endpoint.open.Add(1)
	ctx, cancel := context.WithCancel(context.Background())
	return &limitedConn{Conn: conn, endpoint: l.endpoint, ctx: ctx, cancel: cancel, own: newLimiter(0)}, nil
}

// limitedConn writes at the server's rates.
type limitedConn struct {
	net.Conn
	endpoint *endpoint
	ctx      context.Context // ends at Close, to wake a Write that waits
	cancel   context.CancelFunc
	closed   sync.Once

	own     *rate.Limiter
	ownRate int64 // what own is set to; used by Write alone
}

// NetConn is the connection below, as in tls.Conn.
func (c *limitedConn) NetConn() net.Conn { return c.Conn }

func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.closed.Do(func() {
		c.cancel()
		c.endpoint.open.Done()
	})
	return err
}

// maxPart is what is written at once, so that connections which share the uplink
// take turns.
const maxPart = 64 << 10

func (c *limitedConn) Write(p []byte) (int, error) {
	if r := c.endpoint.limits.perConn.Load(); r != c.ownRate {
		c.own, c.ownRate = newLimiter(r), r
	}
	uplink := c.endpoint.limits.uplink
	done := 0
	for done < len(p) {
		part := p[done:min(len(p), done+maxPart, done+c.own.Burst(), done+uplink.Burst())]
		if err := c.own.WaitN(c.ctx, len(part)); err != nil {
			return done, err
		}
		if err := uplink.WaitN(c.ctx, len(part)); err != nil {
			return done, err
		}
		n, err := c.Conn.Write(part)
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

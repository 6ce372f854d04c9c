package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"time"
)

const (
	// headerTimeout is for a client to say what it wants.
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 32 << 10
	// cutTime is for handlers to notice that the grace period is over.
	cutTime = 2 * time.Second
	// holdQuiet is longer than a client waits between two requests of one pull, and
	// holdLook how often the proxy looks whether there are any.
	holdQuiet = 2 * time.Second
	holdLook  = 20 * time.Millisecond
	// settleTime is for what hold waits for at the end of the grace period.
	settleTime = 500 * time.Millisecond
)

// server is the listener being served.
type server struct {
	http     *http.Server
	listener net.Listener
	cut      context.CancelCauseFunc // ends all requests
	wedged   atomic.Bool
	draining atomic.Bool // the port is closed on purpose, or soon will be
}

// Serve answers on l, the proxy's one port, until ctx ends: then it lets bodies go on for
// Options.Grace, ends those that are left short of their length, and returns nil when no
// handler runs any more. It closes l as soon as no client needs it (hold). If the watchdog
// closed the port, it returns ErrWedged.
func (p *Proxy) Serve(ctx context.Context, l net.Listener) error {
	s := p.newServer(l)
	p.server.Store(s)
	defer p.server.Store(nil)
	served := make(chan error, 1)
	go func() { served <- s.http.Serve(l) }() // received below
	select {
	case err := <-served:
		return s.ended(err)
	case <-ctx.Done():
	}
	s.draining.Store(true)
	err := s.shutdown(ctx, p.hold(ctx, s))
	<-served //nolint:errcheck // always http.ErrServerClosed
	if s.wedged.Load() {
		return ErrWedged
	}
	return err
}

// hold keeps the port open while there are clients that would take a closed one for the end
// of their pull, for Options.Grace at most, and returns what is left of that.
//
// If they are not through by then, it halts all bodies, and waits until containerd is at the
// end of what it was sent and has asked for the next chunks. It goes on, at the registry, from
// chunks that end short together. If one ends while it is still reading another, it gives that
// one up, and its pull with it.
func (p *Proxy) hold(ctx context.Context, s *server) (left time.Duration) {
	ctx = context.WithoutCancel(ctx)
	s.http.SetKeepAlivesEnabled(false)
	end := time.Now().Add(p.opts.Grace)
	for !s.wedged.Load() && p.needed() {
		left = time.Until(end)
		if left <= 0 {
			p.halted.Store(true)
			_ = sleep(ctx, settleTime) // ctx does not end
			return 0
		}
		_ = sleep(ctx, min(left, holdLook))
	}
	return time.Until(end)
}

// needed reports whether a client that is bound to this proxy is being served, or may yet ask.
func (p *Proxy) needed() bool {
	p.mu.Lock()
	recent := time.Since(p.lastBound) < holdQuiet
	p.mu.Unlock()
	return recent || slices.ContainsFunc(p.underWay(), (*exchange).bound)
}

func (p *Proxy) newServer(l net.Listener) *server {
	base, cut := context.WithCancelCause(context.Background())
	return &server{listener: l, cut: cut, http: &http.Server{
		Handler:           p,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}}
}

// ended explains why serving stopped by itself.
func (s *server) ended(err error) error {
	s.cut(errShutdown)
	if s.wedged.Load() {
		return ErrWedged
	}
	return fmt.Errorf("proxy: serve %s: %w", s.listener.Addr(), err)
}

// shutdown closes the port, and waits for what is under way: first for its end, then, cut
// short, for its handlers.
func (s *server) shutdown(ctx context.Context, grace time.Duration) error {
	ctx = context.WithoutCancel(ctx)
	err := s.wait(ctx, grace)
	s.cut(errShutdown)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.wait(ctx, cutTime)
	}
	if err == nil {
		return nil
	}
	if err := s.http.Close(); err != nil { // clients that do not even read
		return fmt.Errorf("proxy: close %s: %w", s.listener.Addr(), err)
	}
	return nil
}

func (s *server) wait(ctx context.Context, d time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return s.http.Shutdown(ctx)
}

// closePort closes the port and all connections, without waiting for handlers.
func (p *Proxy) closePort() {
	if s := p.server.Load(); s != nil {
		s.wedged.Store(true)
		_ = s.http.Close() // the process ends next
	}
}

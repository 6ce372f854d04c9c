package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
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
)

// server is the listener being served.
type server struct {
	http     *http.Server
	listener net.Listener
	cut      context.CancelCauseFunc // ends all requests
	wedged   atomic.Bool
	draining atomic.Bool // the port is closed on purpose
}

// Serve answers on l, the proxy's one port, until ctx ends: then it closes l, lets bodies go on
// for Options.Grace, ends those that are left short of their length, and returns nil when no
// handler runs any more. If the watchdog closed the port, it returns ErrWedged.
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
	err := s.shutdown(ctx, p.opts.Grace)
	<-served //nolint:errcheck // always http.ErrServerClosed
	if s.wedged.Load() {
		return ErrWedged
	}
	return err
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

// shutdown stops accepting at once, and waits for what is under way: first for
// its end, then, cut short, for its handlers.
func (s *server) shutdown(ctx context.Context, grace time.Duration) error {
	ctx = context.WithoutCancel(ctx)
	s.http.SetKeepAlivesEnabled(false)
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

package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// unconnected is how long a connect waits before its endpoint is taken to be out
	// of reach: a lost SYN is sent again after one second.
	unconnected = 1500 * time.Millisecond
	// unconnectedMemory is how long that stays so after a connect that failed.
	unconnectedMemory = 10 * time.Second
)

// dials knows whether an endpoint's connects get an answer. A network that drops them
// makes each wait for dialTimeout, and breaker counts failed requests: both come too
// late for other nodes that wait for this one and might have a way to the registry. The
// zero value is ready.
type dials struct {
	mu      sync.Mutex // guards all below
	waiting int
	since   time.Time // the first connect since the last that got an answer; zero = none
	failed  time.Time // the last connect that took too long
}

// begin notes a connect; done has to be told how it ended.
func (d *dials) begin(now time.Time) (done func(err error, now time.Time)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.waiting == 0 && now.Sub(d.failed) > unconnectedMemory {
		d.since = time.Time{}
	}
	if d.since.IsZero() {
		d.since = now
	}
	d.waiting++
	return func(err error, end time.Time) { d.end(err, now, end) }
}

func (d *dials) end(err error, begun, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.waiting--
	switch {
	case err != nil && now.Sub(begun) > unconnected:
		d.failed = now
	case errors.Is(err, context.Canceled): // perhaps while the name was looked up
		if d.waiting == 0 && d.failed.IsZero() {
			d.since = time.Time{} // says nothing
		}
	case noRoute(err):
		d.since, d.failed = now.Add(-unconnected), now
	default: // an answer, if only a refusal
		d.since, d.failed = time.Time{}, time.Time{}
		if d.waiting > 0 {
			d.since = now
		}
	}
}

// noRoute reports whether a connect failed on this machine, or before it got to the
// endpoint: others may have a route to it, or a name server that knows it.
func noRoute(err error) bool {
	_, dns := errors.AsType[*net.DNSError](err)
	return dns || errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EHOSTUNREACH)
}

// silent reports whether connects get no answer.
func (d *dials) silent(now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.since.IsZero() || now.Sub(d.since) < unconnected {
		return false
	}
	return d.waiting > 0 || now.Sub(d.failed) < unconnectedMemory
}

// Reaches reports whether this machine gets connections to one of the upstreams of a
// registry, as far as it tried lately. A refusal, and every other error that comes at
// once, counts as an answer, but for a missing route or name. It asks nobody.
func (c *Client) Reaches(host string) bool {
	reg, err := c.lookup(host)
	if err != nil {
		return true // the request will say what is wrong
	}
	now := time.Now()
	return slices.ContainsFunc(reg.endpoints, func(ep *endpoint) bool { return !ep.dials.silent(now) })
}

// Connect tries now to reach one of a registry's upstreams: it asks for the root of its
// API without a credential, and accepts any answer that is not a gateway's. Only
// contact_upstream = false prevents that (ErrNoContact); pauses and breakers do not.
func (c *Client) Connect(ctx context.Context, host string) error {
	reg, err := c.lookup(host)
	if err != nil {
		return err
	}
	if !reg.Contact() {
		return ErrNoContact
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var asked sync.WaitGroup
	var reached atomic.Bool
	errs := make([]error, len(reg.endpoints))
	for i, ep := range reg.endpoints { // all at once: one that is silent must not take the others' time
		asked.Go(func() {
			if errs[i] = ep.connect(ctx); errs[i] == nil {
				reached.Store(true)
				cancel()
			}
		})
	}
	asked.Wait()
	if reached.Load() {
		return nil
	}
	return errors.Join(errs...)
}

func (ep *endpoint) connect(ctx context.Context) error {
	root := &url.URL{Scheme: ep.addr.scheme, Host: ep.addr.host, Path: ep.addr.base}
	req := ep.build(ctx, Target{Registry: ep.reg.Host}, request{method: http.MethodGet, at: root}, "")
	resp, err := ep.exchange(ctx, req, kindPing, ep.c.cfg.FirstByte)
	if err != nil {
		return err
	}
	drain(resp.Body)
	if resp.StatusCode == http.StatusBadGateway || resp.StatusCode == http.StatusGatewayTimeout {
		return fmt.Errorf("%s: %s", ep.addr.host, resp.Status)
	}
	return nil
}

package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

// registry is a Registry with what its requests share.
type registry struct {
	Registry
	label      string              // for metrics: the configured host, or "other"
	configured bool                // by an operator, who may name inside addresses
	endpoints  []*endpoint         // never empty
	slots      *semaphore.Weighted // all requests
	bulk       *semaphore.Weighted // blob bodies: fewer, so that manifests always find a slot
	limiter    *rate.Limiter       // nil = no limit
}

// endpoint is one upstream of a registry.
type endpoint struct {
	c       *Client
	reg     *registry
	addr    address
	tls     TLS
	last    bool // of the registry's upstreams; it has the last word on what exists
	breaker breaker
	tokens  breaker // of the token service
	dials   dials
	reach   atomic.Int32 // reach it was last dialled at
	ranges  atomic.Int32 // rangesUnknown, rangesYes, rangesNo
	active  atomic.Int32 // requests under way

	refusals rate.Sometimes // when the log tells of one

	mu         sync.Mutex // guards all below
	transports *transports
	challenge  challenge // the last one it sent, without scope
	pauses     map[pauseKey]time.Time
	saidPause  time.Time // when the log told of one last: once a minute is enough
	lastErr    string
	lastErrAt  time.Time
	lastOKAt   time.Time
	latency    time.Duration // to headers, moving average
	limit      *RateLimit
}

const (
	rangesUnknown int32 = iota
	rangesYes
	rangesNo
)

// pauseKey: a registry throttles manifests and blobs separately, its token
// service by itself, and each account (session key's credential) separately.
type pauseKey struct {
	bulk       bool
	token      bool
	credential string
}

// Docker Hub goes by several names, and none of them is where its API lives.
var hubNames = []string{"docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"}

const hubName = "docker.io"

// CanonicalHost is the one spelling of a registry's host[:port] by which it is
// looked up: lower case, and docker.io for every name that Docker Hub has.
func CanonicalHost(host string) string {
	host = strings.ToLower(host)
	if slices.Contains(hubNames, host) {
		return hubName
	}
	return host
}

// DefaultUpstream is the one upstream of a registry that has no others; host is
// canonical.
func DefaultUpstream(host string) string {
	if host == hubName {
		host = "registry-1.docker.io"
	}
	return "https://" + host
}

// connections is max_connections with its default.
func (r Registry) connections() int {
	if r.MaxConnections == 0 {
		return defaultMaxConnections
	}
	return r.MaxConnections
}

// bulkShare leaves a quarter of the connections to everything but blobs. With
// one connection there is nothing to share: the blob gets it, and small
// requests may open one more.
func bulkShare(connections int) (slots, bulk int64) {
	if connections == 1 {
		return 2, 1
	}
	n := int64(connections)
	return n, n - max(1, n/4)
}

// burst of the byte-rate limiters: what one read may take at once.
const burst = 256 << 10

func (c *Client) newRegistry(r Registry, configured bool) (*registry, error) {
	slots, bulk := bulkShare(r.connections())
	reg := &registry{
		Registry: r, label: "other", configured: configured,
		slots: semaphore.NewWeighted(slots), bulk: semaphore.NewWeighted(bulk),
	}
	if configured {
		reg.label = r.Host
	}
	if r.MaxBytesPerSecond > 0 {
		reg.limiter = rate.NewLimiter(rate.Limit(r.MaxBytesPerSecond), burst)
	}
	upstreams := r.Upstreams
	if len(upstreams) == 0 {
		upstreams = []string{DefaultUpstream(r.Host)}
	}
	for i, u := range upstreams {
		addr, err := parseEndpoint(u)
		if err != nil {
			return nil, fmt.Errorf("registry %q: %w", r.Host, err)
		}
		reg.endpoints = append(reg.endpoints, &endpoint{
			c: c, reg: reg, addr: addr, tls: r.tls(u), last: i == len(upstreams)-1,
			refusals: rate.Sometimes{Interval: time.Hour},
		})
	}
	return reg, nil
}

// lookup finds the registry of an image name; one that nobody configured is
// https on its own host, and only a few of these are remembered.
func (c *Client) lookup(host string) (*registry, error) {
	host = CanonicalHost(host)
	if reg, ok := (*c.configured.Load())[host]; ok {
		return reg, nil
	}
	if err := validHost(host); err != nil {
		return nil, fmt.Errorf("%w: registry %w", ErrRefused, err)
	}
	made, err := c.newRegistry(Registry{Host: host}, false)
	if err != nil {
		return nil, err
	}
	reg, dropped, full := c.others.get(host, func() *registry { return made })
	if full {
		dropped.closeIdle()
	}
	return reg, nil
}

func (r *registry) closeIdle() {
	for _, ep := range r.endpoints {
		ep.mu.Lock()
		t := ep.transports
		ep.mu.Unlock()
		t.close()
	}
}

func (ep *endpoint) hostname() string {
	host, _, err := net.SplitHostPort(ep.addr.host)
	if err != nil {
		host = ep.addr.host
	}
	return strings.Trim(host, "[]")
}

func (ep *endpoint) ruling(foreign bool) ruling {
	return ruling{ep: ep, foreign: foreign}
}

// mirrors says whether this endpoint stands in for another registry, and so
// needs to be told (?ns=) which one is meant.
func (ep *endpoint) mirrors() bool {
	return ep.reg.Host != "" && CanonicalHost(ep.addr.host) != CanonicalHost(ep.reg.Host)
}

// trustedWith says whether a client's own credential, which is meant for the
// registry, may go to this endpoint: the one with the last word, and those of
// its registrable domain. Others would learn a credential that is not theirs
// and might answer what the registry itself would refuse.
func (ep *endpoint) trustedWith() bool {
	final := ep.reg.final()
	return ep.last || strings.EqualFold(ep.hostname(), final.hostname()) || sameSite(ep.hostname(), final.hostname())
}

// final is the endpoint with the last word on what exists.
func (r *registry) final() *endpoint { return r.endpoints[len(r.endpoints)-1] }

// order lists the endpoints to ask: as configured, those that are known to be
// down last, so that they are asked when nothing else answers.
func (r *registry) order(t Target) []*endpoint {
	var up, down []*endpoint
	for _, ep := range r.endpoints {
		if t.Authorization != "" && !ep.trustedWith() {
			continue
		}
		if _, until := ep.breaker.state(); until.IsZero() {
			up = append(up, ep)
		} else {
			down = append(down, ep)
		}
	}
	return append(up, down...)
}

// pausedFor is how long the registry asked requests of this kind to stay away.
func (ep *endpoint) pausedFor(k pauseKey, now time.Time) time.Duration {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	until, ok := ep.pauses[k]
	if !ok {
		return 0
	}
	if !now.Before(until) {
		delete(ep.pauses, k)
		return 0
	}
	return until.Sub(now)
}

const (
	// pauseDefault follows a 429 without Retry-After.
	pauseDefault = 2 * time.Second
	// pauseMax: Docker Hub's window is hours; it is worth a look every minute.
	pauseMax  = time.Minute
	maxPauses = 64
)

func (ep *endpoint) pause(k pauseKey, d time.Duration, now time.Time) {
	if d <= 0 {
		d = pauseDefault
	}
	d = min(d, pauseMax)
	ep.mu.Lock()
	if ep.pauses == nil || len(ep.pauses) >= maxPauses {
		ep.pauses = map[pauseKey]time.Time{}
	}
	ep.pauses[k] = now.Add(d)
	tell, last := now.Sub(ep.saidPause) >= pauseMax, ep.lastErr
	if tell {
		ep.saidPause = now
	}
	ep.mu.Unlock()
	if tell {
		ep.c.log.Warn("upstream asks for fewer requests and is left alone for a while", "registry", ep.reg.Host, "upstream", ep.addr.host, "duration", d, "err", last)
	}
}

// noteAnswer keeps what `larder status` shows of a request that was answered, even
// by a refusal.
func (ep *endpoint) noteAnswer(took time.Duration, now time.Time) {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	ep.lastOKAt = now
	if ep.latency == 0 {
		ep.latency = took
	}
	ep.latency += (took - ep.latency) / 8
}

func (ep *endpoint) noteError(err error, now time.Time) {
	text := clip(err.Error(), 1024) // an *Error: redacted; it may repeat what came
	ep.mu.Lock()
	defer ep.mu.Unlock()
	ep.lastErr, ep.lastErrAt = text, now
}

// enter admits a request: it refuses while the circuit is open or the registry
// asked for a pause, and waits for a slot; a spare request (one more stream of a
// blob) does not wait. The visit must be left.
func (ep *endpoint) enter(ctx context.Context, q request, credential string) (*visit, error) {
	if !ep.reg.Contact() {
		return nil, &Error{Err: ErrNoContact}
	}
	if wait := ep.pausedFor(pauseKey{bulk: q.bulk, credential: credential}, time.Now()); wait > 0 {
		return nil, &Error{Status: 429, RetryAfter: wait, Err: errPaused}
	}
	if _, until := ep.breaker.state(); time.Now().Before(until) {
		return nil, &Error{RetryAfter: time.Until(until), Err: ErrCircuitOpen}
	}
	release, err := ep.reg.acquire(ctx, q.bulk, q.spare)
	if err != nil {
		return nil, err
	}
	if wait, ok := ep.breaker.allow(time.Now()); !ok {
		release()
		return nil, &Error{RetryAfter: wait, Err: ErrCircuitOpen}
	}
	ep.active.Add(1)
	return &visit{ep: ep, release: release}, nil
}

// visit is a request that was admitted.
type visit struct {
	ep         *endpoint
	release    func() // the slot
	told, left sync.Once
}

// tell records what the request says of the endpoint's health. The first word
// counts.
func (v *visit) tell(o outcome) {
	v.told.Do(func() {
		if v.ep.breaker.done(o, time.Now()) {
			v.ep.logTurn(o)
		}
	})
}

// leave ends the visit, with this word if there was none yet.
func (v *visit) leave(o outcome) {
	v.left.Do(func() {
		v.ep.active.Add(-1)
		v.tell(o)
		v.release()
	})
}

// logTurn tells an operator once when an endpoint fails and once when it is
// back.
func (ep *endpoint) logTurn(o outcome) {
	log := ep.c.log.With("registry", ep.reg.Host, "upstream", ep.addr.host)
	if o == good {
		log.Info("upstream answers again")
		return
	}
	ep.mu.Lock()
	last := ep.lastErr
	ep.mu.Unlock()
	log.Warn("upstream left alone for a while after repeated failures", "err", last)
}

var errPaused = errors.New("waiting as the registry asked")

var errBusy = errors.New("all connections to the registry are in use")

func (r *registry) acquire(ctx context.Context, bulk, spare bool) (release func(), err error) {
	slots := []*semaphore.Weighted{r.slots}
	if bulk {
		slots = []*semaphore.Weighted{r.bulk, r.slots}
	}
	var held []*semaphore.Weighted
	release = func() {
		for _, s := range held {
			s.Release(1)
		}
	}
	for _, s := range slots {
		if !spare {
			err = s.Acquire(ctx, 1)
		} else if !s.TryAcquire(1) {
			err = errBusy
		}
		if err != nil {
			release()
			return nil, err
		}
		held = append(held, s)
	}
	return release, nil
}

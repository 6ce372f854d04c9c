// Package proxy answers the pull side of the OCI distribution API on the
// loopback address: from this node's cache, the runtime's own store, other
// nodes, and only then the registry.
//
// The promise is that a pull through it is never worse than one without it:
// headers come within a budget or an error that sends the runtime to the
// registry does; a body that cannot be finished ends in a way that the runtime
// can go on from; and a process that stopped answering closes its port. A
// table in DESIGN.md says what ends how.
//
// It accepts no pushes, and it is not an open proxy: a registry's name is a
// key that package upstream resolves by its own rules.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// Options configure a Proxy. Cache and Upstream are required; the zero value of
// the others is their default.
type Options struct {
	Cache    *cache.Cache
	Upstream *upstream.Client
	Runtime  RuntimeStore // nil: none
	Swarm    Swarm        // nil: a node alone

	// DefaultRegistry is for requests that name none; "" refuses them.
	DefaultRegistry string
	// FirstByteBudget is how long a request may wait for its headers; default 5 s.
	FirstByteBudget time.Duration
	// StallTimeout is how long a body may wait for its next byte; default 20 s,
	// so that upstream can give up a connection and try another before.
	StallTimeout time.Duration
	// TagTTL is how long a resolved tag is not asked for again; 0 asks always.
	// A registry's own tag_ttl takes precedence.
	TagTTL time.Duration
	// Grace is how long bodies may go on after Serve was told to stop; default 20 s.
	Grace time.Duration
	// Watch says when requests count as unanswered.
	Watch Watch

	Logger     *slog.Logger          // default slog.Default()
	Registerer prometheus.Registerer // nil: not registered
	// VerdictKey is secret and the same after a restart: under it the metadata keeps
	// who was allowed to read what, for offline = "remembered". Nil keeps nothing.
	VerdictKey []byte
	// Pinned says what an image that is pinned on this node has under ref, a tag or
	// a digest of something in the repository. It reads memory alone. Nil: nothing is
	// pinned.
	Pinned func(r cache.Repository, ref string) (p Pinned, ok bool)
	// Audit is called after each exchange, from its goroutine.
	Audit func(Event)
	// Before is called first for each request. Tests wedge the proxy with it.
	Before func(*http.Request)
}

// Pinned is what a pinned image has under a tag or a digest.
type Pinned struct {
	Digest digest.Digest
	// Manifest says that it is one of the image's manifests, not one of its blobs.
	Manifest bool
	// Public says that the registry showed the image to a request without any
	// credential when it last confirmed it. Callers on this node then get it whatever
	// the registry says of the repository later.
	Public bool
}

// Event is one finished exchange.
type Event struct {
	Time       time.Time
	Kind       Kind
	Method     string
	Registry   string
	Repository string
	Reference  string // tag or digest as asked for
	Source     string
	Status     int   // 499: the client went away before an answer
	Bytes      int64 // of the body
	Duration   time.Duration
	Remote     string
	UserAgent  string
	Caller     string // names the credential that came, "" for none; not the credential
	Decision   string // whether the caller may read, and why; "" where nothing was to be decided
	Err        error  // why the answer is not what was asked for
}

// Refused reports whether the caller was refused what it asked for, and not
// merely asked for a credential.
func (e Event) Refused() bool {
	switch decision(e.Decision) {
	case decidedRefused, decidedDenied, decidedUnknown:
		return true
	}
	return false
}

// Challenged reports whether the caller was asked for a credential: how the pull
// of a private image begins.
func (e Event) Challenged() bool { return decision(e.Decision) == decidedChallenged }

// Canary reports whether the request was for the canary image, which belongs to
// nobody.
func (e Event) Canary() bool { return isCanary(e.Registry, e.Repository) }

// Proxy is a http.Handler. Serve puts it on a listener; Run must run beside.
type Proxy struct {
	opts     Options
	log      *slog.Logger
	cache    *cache.Cache
	upstream *upstream.Client
	runtime  RuntimeStore
	swarm    Swarm
	auth     *authorizer
	metrics  *metrics
	canary   *canaryImage

	background *background
	resolves   *flights[tagAsk, resolved]       // what tags stand for
	stats      *flights[statAsk, int64]         // how large blobs are
	pageAsks   *flights[pageKey, upstream.Page] // tags and referrers
	late       *flights[blobKey, struct{}]      // manifests; see learnLate

	fresh       *recent[tagKey, resolved]       // tags that need not be asked for yet
	failed      *recent[blobKey, failure]       // ended short; see I4
	parts       *recent[blobKey, failure]       // read in part before the digest was known; see I4
	chunked     *recent[blobKey, struct{}]      // fetched in chunks
	undelivered *recent[blobKey, struct{}]      // of path-encoded clients; see I5
	deliverable *recent[blobKey, struct{}]      // upstream said it has them
	learned     *recent[blobKey, struct{}]      // manifests whose children are recorded
	listed      *recent[blobKey, int64]         // sizes by what lists them
	again       *recent[digest.Digest, bool]    // sent whole from the cache; whether its copy was doubted since
	pages       *recent[pageKey, upstream.Page] // tags and referrers, for when upstream is down
	canaries    *recent[string, Canary]

	answers    atomic.Int64              // headers sent, ever
	server     atomic.Pointer[server]    // nil unless listening
	halted     atomic.Bool               // bodies go no further and wait to be cut; see hold
	saidUnkept atomic.Pointer[time.Time] // when the log said that there is no room; nil: never

	mu        sync.Mutex             // guards the fields below
	exchanges map[*exchange]struct{} // under way
	lastBound time.Time              // when the last that was bound ended
}

// maxRemembered bounds each of the memories of blobs and tags: some 200 bytes
// an entry.
const maxRemembered = 16 << 10

// New starts nothing.
func New(opts Options) (*Proxy, error) {
	if opts.Cache == nil || opts.Upstream == nil {
		return nil, errors.New("proxy: Cache and Upstream are required")
	}
	if h := opts.DefaultRegistry; h != "" && !validHost(h) {
		return nil, fmt.Errorf("proxy: default_registry %q is not host or host:port", h)
	}
	opts.setDefaults()
	canary, err := newCanaryImage()
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	b := newBackground()
	return &Proxy{
		opts: opts, log: opts.Logger, cache: opts.Cache, upstream: opts.Upstream, runtime: opts.Runtime, swarm: opts.Swarm,
		auth: newAuthorizer(opts, b), metrics: newMetrics(opts.Registerer), canary: canary, background: b,
		resolves:    newFlights[tagAsk, resolved](b),
		stats:       newFlights[statAsk, int64](b),
		pageAsks:    newFlights[pageKey, upstream.Page](b),
		late:        newFlights[blobKey, struct{}](b),
		fresh:       newRecent[tagKey, resolved](maxRemembered),
		failed:      newRecent[blobKey, failure](maxRemembered),
		parts:       newRecent[blobKey, failure](maxRemembered),
		chunked:     newRecent[blobKey, struct{}](maxRemembered),
		undelivered: newRecent[blobKey, struct{}](maxRemembered),
		deliverable: newRecent[blobKey, struct{}](maxRemembered),
		learned:     newRecent[blobKey, struct{}](maxRemembered),
		listed:      newRecent[blobKey, int64](maxRemembered),
		again:       newRecent[digest.Digest, bool](maxRemembered),
		pages:       newRecent[pageKey, upstream.Page](maxPages),
		canaries:    newRecent[string, Canary](maxCanaries),
		exchanges:   map[*exchange]struct{}{},
	}, nil
}

func (o *Options) setDefaults() {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&o.FirstByteBudget, 5 * time.Second}, {&o.StallTimeout, 20 * time.Second}, {&o.Grace, 20 * time.Second},
		{&o.Watch.Interval, time.Second}, {&o.Watch.Timeout, 2 * time.Second}, {&o.Watch.Slack, 5 * time.Second},
	} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Pinned == nil {
		o.Pinned = func(cache.Repository, string) (Pinned, bool) { return Pinned{}, false }
	}
}

// ForgetFacts drops what is remembered of facts in the cache's metadata after these were lost:
// the memory that spares writing them twice would keep them from being written again. Other
// metadata may have taken their place, with a verdictKey of its own; nil keeps the present
// key.
func (p *Proxy) ForgetFacts(verdictKey []byte) {
	p.auth.lasting.use(verdictKey)
	p.fresh.clear()
	p.learned.clear()
	p.auth.verdicts.clear()
	p.auth.members.clear()
	p.auth.told.clear()
}

// Run watches over the proxy until ctx ends, and returns when its goroutines
// are gone. ErrWedged means that requests are no longer answered: the process
// should then end and start anew.
func (p *Proxy) Run(ctx context.Context) error {
	defer p.background.stop()
	return p.watch(ctx)
}

// ServeHTTP answers one request.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := p.newExchange(w, r)
	p.track(x)
	defer p.finish(x)
	if p.opts.Before != nil {
		p.opts.Before(r)
	}
	x.refuseBody()
	if err := p.serve(x); err != nil {
		x.fail(err)
	}
	if x.cutShort() && x.sent.Load() == 0 {
		// Headers alone would use up containerd's retries: better no answer
		// at all, which sends it to the registry.
		panic(http.ErrAbortHandler)
	}
}

// serve handles every request: parse the route, authorize, answer. begin
// authorizes from memory alone; if it remembers no verdict, the function that
// answers must ask the registry before it sends anything.
func (p *Proxy) serve(x *exchange) error {
	if x.r.Method != http.MethodGet && x.r.Method != http.MethodHead {
		return errMethod
	}
	rt, err := parseRoute(x.r.URL, p.opts.DefaultRegistry)
	x.setRoute(rt)
	if err != nil {
		return err
	}
	if x.route.kind == KindPing {
		return servePing(x)
	}
	if isCanary(x.route.registry, x.route.repository) {
		return p.serveCanary(x)
	}
	if x.access, err = p.auth.begin(x.r, &x.route); err != nil {
		return err
	}
	switch x.route.kind {
	case KindManifest:
		return p.serveManifest(x)
	case KindBlob:
		return p.serveBlob(x)
	case KindTags:
		return p.serveTags(x)
	default:
		return p.serveReferrers(x)
	}
}

func servePing(x *exchange) error {
	x.Header().Set("Content-Type", "application/json")
	x.Header().Set("Content-Length", "2")
	x.WriteHeader(http.StatusOK)
	if x.r.Method == http.MethodHead {
		return nil
	}
	_, err := x.Write([]byte("{}"))
	return err
}

func (p *Proxy) track(x *exchange) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.exchanges[x] = struct{}{}
}

func (p *Proxy) finish(x *exchange) {
	x.cancel(context.Canceled)
	bound := x.bound()
	p.mu.Lock()
	delete(p.exchanges, x)
	if bound {
		p.lastBound = time.Now()
	}
	p.mu.Unlock()
	p.metrics.observe(x)
	e := x.event()
	if p.opts.Audit != nil {
		p.opts.Audit(e)
	}
	if !p.log.Enabled(context.Background(), slog.LevelDebug) {
		return // spares a warm hit the boxing of thirteen values
	}
	p.log.Debug("request", "kind", e.Kind, "method", e.Method, "registry", e.Registry, "repository", e.Repository, "reference", e.Reference,
		"source", e.Source, "status", e.Status, "bytes", e.Bytes, "duration", e.Duration, "err", e.Err)
}

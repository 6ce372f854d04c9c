package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/credentials"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/runtimestore"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/hostsconfig"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// Agent is one node. Make it with New, then call Run once, or Close if it is
// never run.
type Agent struct {
	config   Config
	build    Build
	log      *slog.Logger
	registry *prometheus.Registry
	counters *prometheus.Registry // the few counters that are in the status too
	started  time.Time

	listeners   struct{ proxy, admin, metrics net.Listener } // metrics may be nil
	cache       *cache.Cache
	upstream    *upstream.Client
	credentials *credentials.Keychain
	verdictKey  []byte // nil: nobody is remembered
	proxy       *proxy.Proxy
	runtime     *runtimestore.Store    // nil: not a source
	hosts       *hostsconfig.Hosts     // nil: none to manage
	imported    []hostsconfig.Imported // what upstream was last told; set by New, then by importsChanged alone
	swarm       *swarm                 // nil: alone
	pins        *pins
	replicas    *replicas
	audit       *auditLog    // nil: none
	self        *http.Client // to this agent's own proxy
	recent      recentPulls
	events      *events
	findings    atomic.Pointer[DoctorStatus] // nil until the node was examined
	importing   chan struct{}                // holds a token while an archive is imported, or images are forgotten
	patience    time.Duration                // see clientPatience

	state atomic.Int32 // one of the states below

	mu       sync.Mutex // guards hostsErr
	hostsErr error      // why hosts.Run ended, nil while it runs
}

// What an agent does at the moment, for /readyz.
const (
	stateStarting int32 = iota
	stateServing
	stateStopping
)

// Option changes how an agent runs; configuration is in Config.
type Option func(*options)

type options struct {
	log   *slog.Logger
	build Build
	wedge func(*http.Request) // see WithBefore
	watch proxy.Watch         // tests make it impatient
	pins  time.Duration       // see pinDelay
	look  time.Duration       // see replicaInterval
	// patience is clientPatience, shorter in tests.
	patience time.Duration
}

// WithLogger sets the logger; without one the agent is silent.
func WithLogger(log *slog.Logger) Option { return func(o *options) { o.log = log } }

// WithBuild sets what the status reports about the program.
func WithBuild(b Build) Option { return func(o *options) { o.build = b } }

// WithBefore has f called before each request to the proxy is answered. It is for
// tests that wedge an agent: while f blocks, nothing is answered.
func WithBefore(f func(*http.Request)) Option { return func(o *options) { o.wedge = f } }

// New validates the configuration, opens the listeners and the cache, and starts
// nothing. It reads the disk, for as long as that takes. When it fails it leaves
// nothing open, and undoes the host configuration that an earlier agent left behind:
// nobody will serve it now. The error joins each [Problem], if there are any.
func New(c Config, opts ...Option) (*Agent, error) {
	o := options{log: slog.New(slog.DiscardHandler), build: Build{Version: "dev"}, pins: pinDelay, look: replicaInterval, patience: clientPatience}
	for _, opt := range opts {
		opt(&o)
	}
	if err := c.Validate(); err != nil {
		RemoveLeftovers(c, o.log)
		return nil, err
	}
	a := &Agent{config: c, build: o.build, log: o.log, registry: prometheus.NewRegistry(), counters: prometheus.NewRegistry(), started: time.Now(),
		importing: make(chan struct{}, 1), patience: o.patience}
	a.replicas = newReplicas(a, o.look)
	a.events = newEvents(a.sample, a.Status, o.log)
	if err := a.open(o); err != nil {
		RemoveLeftovers(c, o.log)
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// open makes every part, beginning with those that fail most often. Whatever may wait for a
// disk comes before the pull API's port: host files of an agent that was killed may name
// it, and one that accepts and does not answer costs a pull more than one that is closed.
func (a *Agent) open(o options) error {
	a.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if err := a.listen(); err != nil {
		return err
	}
	a.self = &http.Client{Transport: &http.Transport{Proxy: nil, DisableCompression: true}}
	var err error
	if a.cache, err = a.openCache(); err != nil {
		return err
	}
	err = a.openRuntime()
	var taken error
	if a.listeners.proxy, taken = listen("proxy.listen", a.config.Proxy.Listen); taken != nil {
		return errors.Join(err, taken)
	}
	if err = errors.Join(err, a.openHosts()); err != nil {
		return err
	}
	if a.credentials, err = a.openCredentials(); err != nil {
		return err
	}
	if a.upstream, err = a.openUpstream(); err != nil {
		return err
	}
	if a.config.Audit.File != "" {
		a.audit = newAuditLog(a.config.Audit.File, a.log)
		a.registry.MustRegister(a.audit.lost)
	}
	if err = a.openSwarm(); err != nil {
		return err
	}
	if a.proxy, err = a.openProxy(o); err != nil {
		return err
	}
	if err = a.openPins(o.pins); err != nil {
		return err
	}
	a.registry.MustRegister(a.replicas)
	a.counters.MustRegister(a.proxy.ServedBytes(), a.cache.FetchedBytes())
	if a.swarm != nil {
		a.counters.MustRegister(a.swarm.UploadedBytes())
	}
	return nil
}

// listen opens the ports for people, and names every port that is taken, including
// that of the pull API, which is opened later.
func (a *Agent) listen() error {
	pulls, err := listen("proxy.listen", a.config.Proxy.Listen)
	errs := []error{err}
	if err == nil {
		errs = append(errs, pulls.Close())
	}
	a.listeners.admin, err = listen("admin.listen", a.config.Admin.Listen)
	errs = append(errs, err)
	if a.config.Metrics.Listen != "" {
		a.listeners.metrics, err = listen("metrics.listen", a.config.Metrics.Listen)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// listen opens the port that a key names.
func listen(key, addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%s = %q: %w; is another agent running on this node? (`ss -ltnp` says who listens) Stop it, or set another %s", key, addr, err, key)
	case err != nil: // no address of this machine, or a port for root
		return nil, fmt.Errorf("%s = %q: %w; set another %s", key, addr, err, key)
	}
	return l, nil
}

func (a *Agent) openCache() (*cache.Cache, error) {
	c, err := cache.New(cache.Options{
		Dir:           a.config.Cache.Dir,
		MaxBytes:      a.config.Cache.MaxBytes,
		MinFree:       a.config.Cache.MinFree,
		ScrubInterval: a.config.Cache.ScrubInterval,
		Logger:        a.log,
		Registerer:    a.registry,
		Keep:          a.keep,
		Events:        cache.Events{Committed: a.announce, Mismatched: a.cacheMismatched, Removing: a.cacheRemoves, Renewed: a.factsLost},
	})
	if err != nil {
		return nil, fmt.Errorf("cache.dir = %q: %w", a.config.Cache.Dir, err)
	}
	return c, nil
}

func (a *Agent) openUpstream() (*upstream.Client, error) {
	registries := a.config.Registries
	if a.hosts != nil {
		registries = mergeImported(registries, a.imported, a.log)
	}
	client, err := upstream.New(upstream.Config{
		Registries:        registries,
		MaxBytesPerSecond: int64(a.config.Upstream.MaxBytesPerSecond),
		StreamsPerBlob:    a.config.Upstream.StreamsPerBlob,
		UserAgent:         "larder/" + a.build.Version,
		Logger:            a.log,
		Registerer:        a.registry,
		Credentials:       a.nodeCredentials,
	})
	if err != nil {
		return nil, fmt.Errorf("upstream: %w", err)
	}
	return client, nil
}

func (a *Agent) openProxy(o options) (*proxy.Proxy, error) {
	opts := proxy.Options{
		Cache:           a.cache,
		Upstream:        a.upstream,
		DefaultRegistry: a.config.Proxy.DefaultRegistry,
		FirstByteBudget: a.config.Proxy.FirstByteBudget,
		TagTTL:          a.config.Upstream.TagTTL,
		Grace:           max(a.config.Proxy.DrainTimeout, time.Nanosecond), // 0 would be its default
		Watch:           o.watch,
		Logger:          a.log,
		Registerer:      a.registry,
		Before:          o.wedge,
		Pinned:          func(r cache.Repository, ref string) (proxy.Pinned, bool) { return a.pins.pinned(r, ref) },
		Audit:           a.pulled,
	}
	var err error
	if a.verdictKey, err = verdictKey(a.config.Cache.Dir); err != nil {
		a.log.Warn("nobody will be remembered for an outage of a registry", "err", err)
	}
	opts.VerdictKey = a.verdictKey
	if a.runtime != nil {
		opts.Runtime = runtimeSource{a.runtime}
	}
	if a.swarm != nil {
		opts.Swarm = a.swarm
	}
	p, err := proxy.New(opts)
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	return p, nil
}

// pulled is called for each exchange of the proxy.
func (a *Agent) pulled(e proxy.Event) {
	a.recent.record(e)
	if a.audit != nil {
		a.auditPull(e)
	}
}

// ProxyAddr is the address the pull API listens on, host:port: the port that was given
// where proxy.listen asks for port 0.
func (a *Agent) ProxyAddr() string { return a.listeners.proxy.Addr().String() }

// AdminAddr is the address the admin API listens on, in the form of
// ProxyAddr.
func (a *Agent) AdminAddr() string { return a.listeners.admin.Addr().String() }

// Run serves until ctx ends or a part fails, then stops everything in order:
// host configuration first, so that no runtime asks any more, then the proxy
// after a drain, then what the proxy used. It closes the agent. It returns nil if
// ctx has ended and every part stopped in time; one that hangs is left, and reported,
// after proxy.drain_timeout and stopSlack.
func (a *Agent) Run(ctx context.Context) error {
	p := newParts(a.log, a.config.Proxy.DrainTimeout+stopSlack)
	p.start("admin", a.serveAdmin)
	p.start("events", a.events.Run)
	p.start("doctor", a.runDoctor)
	if a.audit != nil {
		p.start("audit", a.audit.Run)
	}
	p.start("cache", a.cache.Run)
	if a.runtime != nil {
		p.start("runtime store", a.runtime.Run)
	}
	if a.swarm != nil {
		p.start("swarm", a.swarm.Run)
	}
	p.start("watchdog", a.proxy.Run)
	p.start("proxy", func(ctx context.Context) error { return a.proxy.Serve(ctx, a.listeners.proxy) })
	p.start("pins", a.pins.Run)
	if a.swarm != nil && a.replicas.others > 0 {
		p.start("replicas", a.replicas.Run)
	}
	if a.hosts != nil {
		p.start("hosts", a.runHosts)
	}
	a.state.Store(stateServing)
	a.log.Info("serving", "version", a.build.Version, "proxy", a.ProxyAddr(), "admin", a.AdminAddr(), "cache", a.config.Cache.Dir)

	var failed error
	select {
	case <-ctx.Done():
		a.log.Info("stopping")
	case failed = <-p.failed:
		a.log.Error("stopping: a part failed", "err", failed)
	}
	a.state.Store(stateStopping)
	return errors.Join(failed, p.stop(), a.Close())
}

// stopSlack is how long a part may take to stop beyond the drain. A part that
// hangs must not keep the process from ending and starting anew.
const stopSlack = 15 * time.Second

// Close releases what New opened. Run does it by itself; it must not run meanwhile.
func (a *Agent) Close() error {
	var errs []error
	for _, l := range []net.Listener{a.listeners.proxy, a.listeners.admin, a.listeners.metrics} {
		if l != nil {
			if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	if a.self != nil {
		a.self.CloseIdleConnections()
	}
	if a.swarm != nil {
		if err := a.swarm.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if a.upstream != nil {
		errs = append(errs, a.upstream.Close())
	}
	if a.credentials != nil {
		a.credentials.Close()
	}
	if a.cache != nil {
		errs = append(errs, a.cache.Close())
	}
	return errors.Join(errs...)
}

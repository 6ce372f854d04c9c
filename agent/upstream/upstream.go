// Package upstream asks registries: it resolves tags, reads manifests and
// fetches blobs, and keeps doing so when registries stall, cut, lie, throttle
// or move, for as long as that is useful and no longer.
//
// It stores nothing. It decides nothing about callers either: a forwarded
// credential is sent as it came, and the registry's verdict is handed back.
package upstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/http/httpproxy"
	"golang.org/x/time/rate"
)

// Target says what a request is about and on whose behalf it is made.
type Target struct {
	Registry   string // as images name it: docker.io, reg.example.com:5000
	Repository string
	// Authorization is a client's own header, forwarded unchanged. "" lets
	// Config.Credentials decide, and without that the request is anonymous.
	Authorization string
	// Anonymous asks as anyone may, even if this node has credentials.
	Anonymous bool
}

// String leaves the credential out, so that no format prints it.
func (t Target) String() string { return t.Registry + "/" + t.Repository }

// GoString is String, for %#v.
func (t Target) GoString() string { return t.String() }

// Config is what New needs. The zero value of each field is its default.
type Config struct {
	Registries        []Registry
	MaxBytesPerSecond int64         // all registries together; 0 = no limit
	StreamsPerBlob    int           // parallel ranges of one blob; default 4
	FirstByte         time.Duration // from request to headers; default 10 s, see blobPatience
	Stall             time.Duration // between bytes of a body; default 15 s
	UserAgent         string        // default "larder"
	Logger            *slog.Logger
	Registerer        prometheus.Registerer
	// Credentials gives this node's own credentials, in the order in which to
	// try them; it may give some and an error. It is called where
	// Registry.NodeAuth is true, before each request, so it should cache. nil =
	// anonymous.
	Credentials func(context.Context, CredentialRequest) ([]authn.AuthConfig, error)

	proxy    *httpproxy.Config // forward proxies; nil = from the environment
	resolver *net.Resolver     // nil = the system's
}

// Sink takes the bytes of one blob; *cache.Writer is one. All methods may be
// called from several goroutines.
type Sink interface {
	SetSize(n int64) error // first call decides
	Size() int64           // -1 = unknown
	// PieceSize is the alignment of ranges: WriteAt accepts bytes at a multiple
	// of it or where the written prefix of a piece ends. Asked once the size is known.
	PieceSize() int64
	// Missing is the first run that is not there yet and ends after off. start is
	// where a write may begin, and may lie before off inside off's piece.
	Missing(off int64) (start, end int64, ok bool)
	// Wanted is the offset that would help a reader most.
	Wanted() int64
	WriteAt(p []byte, off int64) (int, error)
}

// Page is one page of a list that a registry keeps (tags, referrers).
type Page struct {
	Body        []byte // as the registry sent it, at most 4 MiB
	ContentType string
	Next        string // query string of the next page ("n=100&last=x"), "" at the end
	// FiltersApplied is OCI-Filters-Applied, "" if the registry did not filter.
	FiltersApplied string
}

// Health is the state of one endpoint, for `larder status`.
type Health struct {
	Registry    string        `json:"registry"`
	Endpoint    string        `json:"endpoint"`
	State       string        `json:"state"` // unused, ok, failing, unreachable, open, paused, no-contact
	Failures    int           `json:"failures"`
	LastError   string        `json:"last_error,omitempty"`
	LastErrorAt time.Time     `json:"last_error_at,omitzero"`
	LastOKAt    time.Time     `json:"last_ok_at,omitzero"`
	RetryAt     time.Time     `json:"retry_at,omitzero"`    // open, paused: when it is asked again
	Latency     time.Duration `json:"latency_ns"`           // to headers, moving average
	RateLimit   *RateLimit    `json:"rate_limit,omitempty"` // what Docker Hub says is left
	Ranges      string        `json:"ranges"`               // unknown, yes, no
	Connections int           `json:"connections"`          // requests under way
}

// RateLimit is what a registry said of its pull limit.
type RateLimit struct {
	Limit     int64         `json:"limit"`
	Remaining int64         `json:"remaining"`
	Window    time.Duration `json:"window_ns"`
}

// Client is safe for concurrent use. It starts no goroutine that outlives a call.
type Client struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	// configured is keyed by canonical host; a map is never changed once it is
	// here.
	configured atomic.Pointer[map[string]*registry]
	others     *lru[string, *registry]
	sessions   *lru[sessionKey, *session]
	limiter    *rate.Limiter // nil = no limit
	proxyFunc  func(*url.URL) (*url.URL, error)
	proxies    map[string]bool // host:port of the forward proxies in use
	refusals   rate.Sometimes  // of endpoints, when the log tells of one: anybody can name many
}

// maxOthers bounds the registries that clients name without configuration.
const maxOthers = 64

// New checks cfg, reports all problems at once, and opens no connection and
// no file: a missing certificate file fails requests to its registry alone,
// until it is there.
func New(cfg Config) (*Client, error) {
	cfg.StreamsPerBlob = cmp.Or(cfg.StreamsPerBlob, 4)
	cfg.FirstByte = cmp.Or(cfg.FirstByte, 10*time.Second)
	cfg.Stall = cmp.Or(cfg.Stall, 15*time.Second)
	cfg.UserAgent = cmp.Or(cfg.UserAgent, "larder")
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.proxy == nil {
		cfg.proxy = httpproxy.FromEnvironment()
	}
	c := &Client{
		cfg: cfg, log: cfg.Logger,
		others:    newLRU[string, *registry](maxOthers),
		sessions:  newLRU[sessionKey, *session](maxSessions),
		proxyFunc: cfg.proxy.ProxyFunc(), proxies: proxyAddresses(cfg.proxy),
		refusals: rate.Sometimes{First: 10, Interval: time.Minute},
	}
	if cfg.MaxBytesPerSecond > 0 {
		c.limiter = rate.NewLimiter(rate.Limit(cfg.MaxBytesPerSecond), burst)
	}
	configured, err := c.configure(cfg.Registries, nil)
	if err != nil {
		return nil, err
	}
	c.configured.Store(&configured)
	c.metrics, err = newMetrics(cfg.Registerer)
	return c, err
}

// SetRegistries replaces Config.Registries for requests from now on; a request
// under way ends as it began. A registry whose table has not changed keeps its
// connections, its health and its limits. If any table is wrong, all problems
// are returned and nothing changes.
func (c *Client) SetRegistries(list []Registry) error {
	for {
		old := c.configured.Load()
		now, err := c.configure(list, *old)
		if err != nil {
			return err
		}
		if !c.configured.CompareAndSwap(old, &now) {
			continue // somebody else set them meanwhile
		}
		for host, reg := range *old {
			if now[host] != reg {
				reg.closeIdle()
			}
		}
		return nil
	}
}

// configure makes registries, taking those that stay as they are from old.
func (c *Client) configure(list []Registry, old map[string]*registry) (map[string]*registry, error) {
	out := make(map[string]*registry, len(list))
	var problems []error
	for _, r := range list {
		if err := r.Validate(); err != nil {
			problems = append(problems, err)
			continue
		}
		r.Host = CanonicalHost(r.Host)
		if out[r.Host] != nil {
			problems = append(problems, fmt.Errorf("registry %q: configured twice", r.Host))
			continue
		}
		if same := old[r.Host]; same != nil && reflect.DeepEqual(same.Registry, r) {
			out[r.Host] = same
			continue
		}
		reg, err := c.newRegistry(r, true)
		problems = append(problems, err)
		out[r.Host] = reg
	}
	return out, errors.Join(problems...)
}

// Close drops idle connections. Calls under way go on.
func (c *Client) Close() error {
	for _, reg := range c.registries() {
		reg.closeIdle()
	}
	return nil
}

// registries lists the configured ones by name, then the others by last use.
func (c *Client) registries() []*registry {
	var list []*registry
	configured := *c.configured.Load()
	for _, host := range slices.Sorted(maps.Keys(configured)) {
		list = append(list, configured[host])
	}
	return append(list, c.others.values()...)
}

// Policy is the [[registry]] table of host, or the defaults.
func (c *Client) Policy(host string) Registry {
	if reg, ok := (*c.configured.Load())[CanonicalHost(host)]; ok {
		return reg.Registry
	}
	return Registry{Host: CanonicalHost(host)}
}

// Health lists every endpoint that is configured or was used.
func (c *Client) Health() []Health {
	var list []Health
	for _, reg := range c.registries() {
		for _, ep := range reg.endpoints {
			list = append(list, ep.health(time.Now()))
		}
	}
	return list
}

func (ep *endpoint) health(now time.Time) Health {
	failures, until := ep.breaker.state()
	ep.mu.Lock()
	defer ep.mu.Unlock()
	h := Health{
		Registry: ep.reg.Host, Endpoint: ep.addr.scheme + "://" + ep.addr.host + ep.addr.base,
		Failures: failures, LastError: ep.lastErr, LastErrorAt: ep.lastErrAt, LastOKAt: ep.lastOKAt,
		Latency: ep.latency, RateLimit: ep.limit, Connections: int(ep.active.Load()),
		Ranges: [...]string{"unknown", "yes", "no"}[ep.ranges.Load()],
	}
	var paused time.Time
	for _, t := range ep.pauses {
		if t.After(now) && t.After(paused) {
			paused = t
		}
	}
	switch {
	case !ep.reg.Contact():
		h.State = "no-contact"
	case !until.IsZero():
		h.State, h.RetryAt = "open", until
	case !paused.IsZero():
		h.State, h.RetryAt = "paused", paused
	case ep.dials.silent(now):
		h.State = "unreachable"
	case failures > 0:
		h.State = "failing"
	case h.LastOKAt.IsZero():
		h.State = "unused"
	default:
		h.State = "ok"
	}
	return h
}

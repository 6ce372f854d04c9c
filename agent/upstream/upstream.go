// Package upstream asks registries: it resolves tags, reads manifests and
// fetches blobs, and keeps doing so when registries stall, cut, lie, throttle
// or move, for as long as that is useful and no longer.
//
// It stores nothing. It decides nothing about callers either: a forwarded
// credential is sent as it came, and the registry's verdict is handed back.
package upstream

import (
	"context"
	"io"
	"log/slog"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
)

// Target is what a request is about and on whose behalf it is made.
type Target struct {
	Registry   string // as images name it: docker.io, reg.example.com:5000
	Repository string
	// Authorization is a client's own header, forwarded unchanged. "" lets
	// Config.Credentials decide, and without that the request is anonymous.
	Authorization string
}

// Config is what New needs. The zero value of each field is its default.
type Config struct {
	Registries        []Registry
	MaxBytesPerSecond int64         // all registries together; 0 = no limit
	StreamsPerBlob    int           // parallel ranges of one blob; default 4
	FirstByte         time.Duration // from request to headers; default 10 s
	Stall             time.Duration // between bytes of a body; default 15 s
	UserAgent         string        // default "larder"
	Logger            *slog.Logger
	Registerer        prometheus.Registerer
	// Credentials gives this node's own credential for a target, the zero
	// AuthConfig for none. It is asked before each token exchange, so it should
	// cache. nil = anonymous.
	Credentials func(context.Context, Target) (authn.AuthConfig, error)
}

// Sink takes the bytes of one blob; *cache.Writer is one. All methods may be
// called from several goroutines.
type Sink interface {
	SetSize(n int64) error // first call decides
	Size() int64           // -1 = unknown
	// PieceSize is the alignment of ranges: WriteAt accepts bytes at a multiple
	// of it or where the written prefix of a piece ends. Asked once the size is known.
	PieceSize() int64
	// Missing is the first run at or after off that is not there yet.
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
	State       string        `json:"state"` // unused, ok, failing, open, paused, no-contact
	Failures    int           `json:"failures"`
	LastError   string        `json:"last_error,omitempty"`
	LastErrorAt time.Time     `json:"last_error_at,omitzero"`
	LastOKAt    time.Time     `json:"last_ok_at,omitzero"`
	RetryAt     time.Time     `json:"retry_at,omitzero"`    // open, paused: when it is asked again
	Latency     time.Duration `json:"latency_ns"`           // to headers, moving average
	RateLimit   *RateLimit    `json:"rate_limit,omitempty"` // what Docker Hub says is left
	Ranges      string        `json:"ranges"`               // unknown, yes, no
	Streams     int           `json:"connections"`          // requests under way
}

// RateLimit is what a registry said of its pull limit.
type RateLimit struct {
	Limit     int64         `json:"limit"`
	Remaining int64         `json:"remaining"`
	Window    time.Duration `json:"window_ns"`
}

// Client is safe for concurrent use. It starts no goroutine that outlives a call.
type Client struct{ cfg Config }

// New checks cfg and opens no connection.
func New(cfg Config) (*Client, error) { return &Client{cfg}, nil }

// Close drops idle connections. Calls under way go on.
func (c *Client) Close() error { return nil }

func (t Target) unsupported(op string) error {
	return &Error{Registry: t.Registry, Repository: t.Repository, Op: op, Err: ErrNoContact}
}

// Resolve finds what ref (a tag or digest) stands for.
func (c *Client) Resolve(ctx context.Context, t Target, ref string, accept []string) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, t.unsupported("resolve")
}

// Manifest reads a manifest of at most 4 MiB, its digest verified.
func (c *Client) Manifest(ctx context.Context, t Target, ref string, accept []string) (ocispec.Descriptor, []byte, error) {
	return ocispec.Descriptor{}, nil, t.unsupported("manifest")
}

// Stat tells the size of a blob.
func (c *Client) Stat(ctx context.Context, t Target, d digest.Digest) (int64, error) {
	return 0, t.unsupported("stat")
}

// Fetch writes what s misses of a blob and returns when nothing is missing.
func (c *Client) Fetch(ctx context.Context, t Target, d digest.Digest, s Sink) error {
	return t.unsupported("fetch")
}

// Blob streams a blob from off on. The caller closes body; ctx reaches to its end.
func (c *Client) Blob(ctx context.Context, t Target, d digest.Digest, off int64) (body io.ReadCloser, size int64, err error) {
	return nil, 0, t.unsupported("blob")
}

// Tags reads one page of tags: at most n (0 = the registry's choice) after last.
func (c *Client) Tags(ctx context.Context, t Target, n int, last string) (Page, error) {
	return Page{}, t.unsupported("tags")
}

// Referrers reads one page of what refers to d. query holds artifactType and
// whatever a former page's Next named. A registry without the API is a not-found error.
func (c *Client) Referrers(ctx context.Context, t Target, d digest.Digest, query string) (Page, error) {
	return Page{}, t.unsupported("referrers")
}

// Challenge asks upstream for ref without any credential and returns the
// WWW-Authenticate headers of its 401, none if it answers anonymous callers.
func (c *Client) Challenge(ctx context.Context, t Target, ref string) ([]string, error) {
	return nil, t.unsupported("challenge")
}

// Policy is the [[registry]] table of host, or the defaults.
func (c *Client) Policy(host string) Registry { return Registry{Host: host} }

// Health lists every endpoint that is configured or was used.
func (c *Client) Health() []Health { return nil }

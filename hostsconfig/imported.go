package hostsconfig

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"time"
)

// Imported is what a runtime was configured to use for one registry before we
// came: plain data, from which the agent makes its own upstreams.
type Imported struct {
	// Registry is the host[:port] as images name it, "*" for every registry
	// without an entry of its own, or "*.example.com" (CRI-O only; such mirrors
	// are asked without the host).
	Registry string `json:"registry"`
	// Prefix narrows the entry to repositories at or below this path ("" =
	// all). Only CRI-O has such entries. Endpoints with a Base expect the
	// repository name with Prefix taken off.
	Prefix string `json:"prefix,omitempty"`
	// Runtime is "containerd" or "crio".
	Runtime string `json:"runtime"`
	// Blocked: the registry itself must not be contacted (contact_upstream =
	// false); the other endpoints may be.
	Blocked bool `json:"blocked,omitempty"`
	// Endpoints in the order the runtime would try them. The last one is the
	// registry itself (Source) unless Blocked.
	Endpoints []Endpoint `json:"endpoints"`
	// Path is the file this was read from.
	Path string `json:"path"`
}

// Endpoint is one place to ask for a registry's content.
type Endpoint struct {
	// Base is the API root: GET Base + "/" + repository + "/manifests/...".
	// "" with Source means the registry's usual address, whole name.
	Base string `json:"base,omitempty"`
	// Source marks the registry itself, as opposed to a mirror of it.
	Source bool `json:"source,omitempty"`
	// Pull and Resolve: may be asked for content by digest, and for tags.
	Pull    bool `json:"pull"`
	Resolve bool `json:"resolve"`

	CAFiles     []string     `json:"ca_files,omitempty"`
	ClientPairs []ClientPair `json:"client_pairs,omitempty"`
	SkipVerify  bool         `json:"skip_verify,omitempty"`
	AllowHTTP   bool         `json:"allow_http,omitempty"` // plain HTTP if HTTPS fails (CRI-O's insecure)
	// Renames: the runtime asks this endpoint for other repository names, by a
	// rule that Base cannot say. Under its own name an image may be another one.
	Renames     bool          `json:"renames,omitempty"`
	DialTimeout time.Duration `json:"dial_timeout,omitempty"`
	// Header goes on every request to this endpoint and may hold secrets: it is
	// in neither logs nor JSON.
	Header http.Header `json:"-"`
}

// ClientPair is a client certificate. Key is "" when the certificate file
// holds the key as well.
type ClientPair struct {
	Cert string `json:"cert"`
	Key  string `json:"key,omitempty"`
}

// MarshalJSON leaves header and password out.
func (e Endpoint) MarshalJSON() ([]byte, error) {
	type plain Endpoint // without this method
	e.Base = redactURL(e.Base)
	return json.Marshal(plain(e))
}

// LogValue leaves header and password out.
func (e Endpoint) LogValue() slog.Value {
	return slog.GroupValue(slog.String("base", redactURL(e.Base)), slog.Bool("source", e.Source),
		slog.Bool("pull", e.Pull), slog.Bool("resolve", e.Resolve), slog.Int("headers", len(e.Header)))
}

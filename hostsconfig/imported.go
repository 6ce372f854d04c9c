package hostsconfig

import "net/http"

// Imported is what a runtime was configured to use for one registry before we
// came: plain data, from which the agent makes its own upstreams.
type Imported struct {
	// Registry is the host[:port] as images name it, "*" for every registry
	// without an entry of its own, or "*.example.com" (CRI-O only; such mirrors
	// are asked without the host).
	Registry string
	// Prefix narrows the entry to repositories at or below this path ("" =
	// all). Only CRI-O has such entries. Endpoints with a Base expect the
	// repository name with Prefix taken off.
	Prefix string
	// Runtime is "containerd" or "crio".
	Runtime string
	// Blocked: the registry itself must not be contacted (contact_upstream =
	// false); the other endpoints may be.
	Blocked bool
	// Endpoints in the order the runtime would try them. The last one is the
	// registry itself (Source) unless Blocked.
	Endpoints []Endpoint
	// Path is the file this was read from, or containerd's host directory if that has
	// only certificates.
	Path string
}

// Endpoint is one place to ask for a registry's content. Base and Header may hold
// secrets: it is not for logs.
type Endpoint struct {
	// Base is the API root: GET Base + "/" + repository + "/manifests/...".
	// "" with Source means the registry's usual address, whole name.
	Base string
	// Source marks the registry itself, as opposed to a mirror of it.
	Source bool
	// Pull and Resolve: may be asked for content by digest, and for tags.
	Pull    bool
	Resolve bool

	// Paths as this process sees them, absolute; they may not be there.
	CAFiles     []string
	ClientPairs []ClientPair
	SkipVerify  bool
	AllowHTTP   bool // plain HTTP if HTTPS fails (CRI-O's insecure)
	// Renames: the runtime asks this endpoint for other repository names, by a
	// rule that Base cannot express. Under its own name the image there may be a
	// different one.
	Renames bool
	Header  http.Header // goes on every request to this endpoint
}

// ClientPair is a client certificate. Key is "" when the certificate file
// holds the key as well.
type ClientPair struct{ Cert, Key string }

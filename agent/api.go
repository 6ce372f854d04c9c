package agent

import (
	"time"

	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/hostsconfig"
	"github.com/opencontainers/go-digest"
)

// Build says what program this is.
type Build struct {
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	Go      string `json:"go,omitempty"`
}

// Status is the answer of /api/v1/status: this node at one moment.
type Status struct {
	Build
	Node    string    `json:"node"`
	Started time.Time `json:"started"`
	Proxy   string    `json:"proxy"` // host:port of the pull API
	Ready   bool      `json:"ready"`
	Checks  []Check   `json:"checks"`

	Cache CacheStatus `json:"cache"`
	Pins  PinsStatus  `json:"pins"`
	// Replicas is about what would be lost with this node.
	Replicas ReplicasStatus `json:"replicas"`
	Pulls    []proxy.Pull   `json:"pulls"` // on their way to a client of the proxy, oldest first
	Fills    []FillStatus   `json:"fills"` // on their way to this node's disk, oldest first
	// Served are bytes to runtimes by X-Larder-Source, Fetched are bytes by
	// where they came from ("upstream", "peer"); both since the start.
	Served   map[string]int64 `json:"served_bytes"`
	Fetched  map[string]int64 `json:"fetched_bytes"`
	Uploaded int64            `json:"uploaded_bytes"` // to other nodes

	Upstreams []upstream.Health `json:"upstreams"`
	Peers     string            `json:"peers"`   // a line for people: alone and why, or how many members
	Members   []Member          `json:"members"` // by zone, then name; this node included
	Zones     []ZoneStatus      `json:"zones"`   // by name; of the members
	Index     IndexStatus       `json:"index"`
	Hosts     HostsStatus       `json:"hosts"`
	Runtime   RuntimeStatus     `json:"runtime"`
	Recent    []RecentPull      `json:"recent_pulls"` // the latest first
	Doctor    DoctorStatus      `json:"doctor"`
}

// Check is one condition of being ready.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Reason string `json:"reason,omitempty"` // why not
}

// CacheStatus is the disk of this node's cache; all sizes in bytes.
type CacheStatus struct {
	Dir     string `json:"dir"`
	Blobs   int    `json:"blobs"`
	Bytes   int64  `json:"bytes"`
	Limit   int64  `json:"limit_bytes"`    // 0 = none
	Free    int64  `json:"free_bytes"`     // -1 = unknown
	MinFree int64  `json:"min_free_bytes"` // 0 = none
	// Problem says why nothing that is pulled is kept, and what to do.
	Problem string `json:"problem,omitempty"`
}

// FillStatus is one blob that is being fetched.
type FillStatus struct {
	Digest  digest.Digest `json:"digest"`
	Size    int64         `json:"size"`    // -1 while unknown
	Present int64         `json:"present"` // bytes on disk
	Readers int           `json:"readers"`
	Started time.Time     `json:"started"`
	Origins []Origin      `json:"origins"` // of what this process fetched, without their When
}

// Origin is bytes of a blob that came from one place.
type Origin struct {
	Kind  string    `json:"kind"`           // upstream, peer, runtime or import
	Name  string    `json:"name,omitempty"` // registry host or peer name
	Bytes int64     `json:"bytes"`
	When  time.Time `json:"when,omitzero"` // when the blob was whole, or its fill began
}

// Member is one node of the cluster as this one sees it.
type Member struct {
	Name    string `json:"name"`
	Address string `json:"address"` // ip:port for pieces
	Zone    string `json:"zone,omitempty"`
	State   string `json:"state"` // StateAlive...
	Self    bool   `json:"self,omitempty"`
	// Linked says whether this node has a connection with it now. Sent and
	// Received are bytes of blobs since this agent started, to and from it.
	Linked      bool      `json:"linked,omitempty"`
	Sent        int64     `json:"sent_bytes"`
	Received    int64     `json:"received_bytes"`
	BannedUntil time.Time `json:"banned_until,omitzero"`
}

// What a Member's State can be.
const (
	StateAlive       = "alive"
	StateUnreachable = "unreachable" // gossip says it lives
	StateBanned      = "banned"      // until BannedUntil
)

// Interest orders members where not all are shown, the highest first: this
// node, those it has banned or cannot reach, those it deals with, the rest.
func (m Member) Interest() int {
	switch {
	case m.Self:
		return 4
	case !m.BannedUntil.IsZero(), m.State == StateUnreachable:
		return 3
	case m.Linked:
		return 2
	case m.Sent+m.Received > 0:
		return 1
	}
	return 0
}

// ZoneStatus sums up the members of one zone as this node sees them.
type ZoneStatus struct {
	Zone     string `json:"zone"` // "" = members that name none
	Members  int    `json:"members"`
	Linked   int    `json:"linked"`
	Banned   int    `json:"banned"`
	Sent     int64  `json:"sent_bytes"` // by this node, since its start
	Received int64  `json:"received_bytes"`
}

// RecentPull is what the proxy was asked for of one repository in one go: an image.
// Runtimes ask, and so do warm, pin and export. Pulls since the agent's start are
// remembered, the last 20 of them.
type RecentPull struct {
	Registry   string    `json:"registry"`
	Repository string    `json:"repository"`
	Reference  string    `json:"reference"` // tag or digest; "" if no manifest was asked for
	Started    time.Time `json:"started"`
	Ended      time.Time `json:"ended"`                // the last answer so far
	UserAgent  string    `json:"user_agent,omitempty"` // of the client, shortened
	// Served are its bytes by X-Larder-Source.
	Served map[string]int64 `json:"served_bytes"`
	Failed int              `json:"failed"` // answers that were an error, or ended short
	Parts  []PulledPart     `json:"parts"`  // in the order of their first answer, at most 100
	More   int              `json:"more_parts,omitempty"`

	tagMethod string // of the last request for the tag
}

// Trouble is the last of the parts whose last answer was an error, if there is one. That a
// runtime hung up is told only where nothing else is: it does when a part has failed.
func (p RecentPull) Trouble() (part PulledPart, ok bool) {
	for _, one := range p.Parts {
		if one.Error != "" && (!ok || one.Error != hungUp || part.Error == hungUp) {
			part, ok = one, true
		}
	}
	return part, ok
}

// PulledPart is one manifest or blob of a RecentPull, or the tag it began with.
type PulledPart struct {
	Kind      string           `json:"kind"`         // tag, manifest or blob
	Reference string           `json:"reference"`    // tag or digest
	Served    map[string]int64 `json:"served_bytes"` // by X-Larder-Source; a tag has 0 of one
	Seconds   float64          `json:"seconds"`      // that the answers took together
	// Origins are where this node had it from when it was not there: the peers
	// and the registry behind a source of peer or upstream.
	Origins []Origin `json:"origins,omitempty"`
	Error   string   `json:"error,omitempty"` // of the last answer, shortened
}

// DoctorStatus is what `larder doctor` finds by looking at files alone, as far
// as the agent can see the node's. Only a canary pull proves the opposite.
type DoctorStatus struct {
	Checked  time.Time             `json:"checked,omitzero"`
	Findings []hostsconfig.Finding `json:"findings"`
}

// IndexStatus is what this node knows of the blobs of others. A tag that a node
// remembers counts as a blob.
type IndexStatus struct {
	Blobs    int `json:"blobs"`
	Postings int `json:"postings"` // holders, summed over all blobs
	Held     int `json:"held"`     // blobs that this node tells others of
}

// HostsStatus is the host configuration that this agent manages.
type HostsStatus struct {
	Containerd string   `json:"containerd,omitempty"`
	CRIO       string   `json:"crio,omitempty"`
	Registries []string `json:"registries,omitempty"` // to mirror, as configured
	InPlace    bool     `json:"in_place"`
	Problem    string   `json:"problem,omitempty"`
}

// RuntimeStatus is containerd's own store as a source.
type RuntimeStatus struct {
	ContentDir string `json:"content_dir,omitempty"`
	Socket     string `json:"socket,omitempty"`
	Blobs      int    `json:"blobs"`
	Bytes      int64  `json:"bytes"`
	Problem    string `json:"problem,omitempty"`
}

// Explanation is the answer of /api/v1/explain: where every part of one image
// is, and came from. It asks no registry.
type Explanation struct {
	Image    string        `json:"image"`
	Digest   digest.Digest `json:"digest"`             // what the tag stood for when last seen
	Checked  time.Time     `json:"checked,omitzero"`   // when the tag was last asked for
	Parts    []Part        `json:"parts"`              // manifests, configs, layers, in the order of a pull
	Bytes    int64         `json:"bytes"`              // of all parts whose size is known
	Here     int64         `json:"bytes_here"`         // of which on this node
	Platform string        `json:"platform,omitempty"` // as asked for; "" = this node's
}

// Part is one blob of an image.
type Part struct {
	Kind     string        `json:"kind"` // index, manifest, config or layer
	Digest   digest.Digest `json:"digest"`
	Size     int64         `json:"size"` // -1 = unknown
	Platform string        `json:"platform,omitempty"`
	// Where it is now: disk, runtime, arriving, peer or upstream (nowhere near).
	Where   string    `json:"where"`
	Present int64     `json:"present"`           // bytes on this node
	Holders []string  `json:"holders,omitempty"` // peers that have it
	Origins []Origin  `json:"origins"`           // where this node got it from
	Used    time.Time `json:"used,omitzero"`     // last served from the cache
}

// WarmRequest is the body of POST /api/v1/warm.
type WarmRequest struct {
	Images   []string `json:"images"`
	Platform string   `json:"platform,omitempty"` // "" = this node's, "all"
}

// WarmEvent is one line of the answer. Blob events repeat while bytes arrive;
// Done ends an image, with Error if it failed.
type WarmEvent struct {
	Image  string        `json:"image"`
	Digest digest.Digest `json:"digest,omitempty"`
	Kind   string        `json:"kind,omitempty"`   // manifest, config or layer; set with Source
	Bytes  int64         `json:"bytes,omitempty"`  // that have come
	Total  int64         `json:"total,omitempty"`  // its size, -1 while unknown
	Source string        `json:"source,omitempty"` // X-Larder-Source; set when the blob is complete
	Done   bool          `json:"done,omitempty"`
	Error  string        `json:"error,omitempty"`
}

// PinRequest is the body of POST /api/v1/pins. The answer is WarmEvents.
type PinRequest struct {
	Images []string `json:"images"`
}

// PinList is the answer of GET and DELETE /api/v1/pins.
type PinList struct {
	Pins    []Pin  `json:"pins"`              // by name
	Bytes   int64  `json:"bytes"`             // in the cache, what images share counted once
	Limit   int64  `json:"limit_bytes"`       // the most that pins may take; 0 = no limit
	Problem string `json:"problem,omitempty"` // of all of them together, and what to do
}

// Pin is one image that is kept on this node.
type Pin struct {
	Image  string `json:"image"`
	State  string `json:"state"`           // PinHeld...
	Source string `json:"source"`          // config, command or both
	Error  string `json:"error,omitempty"` // of the last try, and what to do
	// Digest is what the image stands for as it is kept, or, while no version of it is
	// whole, what is being fetched; Next is a newer version on its way.
	Digest  digest.Digest `json:"digest,omitempty"`
	Next    digest.Digest `json:"next_digest,omitempty"`
	Public  bool          `json:"public"`  // the registry showed Digest to everybody: it is served here also when it refuses that later
	Bytes   int64         `json:"bytes"`   // of Digest and its signatures
	Present int64         `json:"present"` // of which here
	Since   time.Time     `json:"since"`   // when it was pinned
	// Checked is when the registry said last what it stands for; of a digest, and where
	// the registry is never asked, when this node looked last.
	Checked time.Time `json:"checked,omitzero"`
	Retry   time.Time `json:"retry,omitzero"` // the next try after an Error
}

// What a Pin's State can be.
const (
	PinHeld     = "held"     // all of it is here, and the registry says no other
	PinStale    = "stale"    // all of it is here; Error says why nobody knows, or has, better
	PinFetching = "fetching" // it is not whole, and on its way or about to be
	PinMissing  = "missing"  // it is not whole, and could not be had
	PinForeign  = "foreign"  // it is made for other platforms than this node's alone
)

var pinStates = []string{PinHeld, PinStale, PinFetching, PinMissing, PinForeign}

// PinsStatus sums up the pins; /api/v1/pins lists them.
type PinsStatus struct {
	Images  int            `json:"images"`
	Bytes   int64          `json:"bytes"` // these three as in PinList
	Limit   int64          `json:"limit_bytes"`
	Problem string         `json:"problem,omitempty"`
	States  map[string]int `json:"states"`  // how many are PinHeld..., each of these
	Trouble []Pin          `json:"trouble"` // those with an Error, at most 20
}

// ForgetRequest is the body of POST /api/v1/forget.
type ForgetRequest struct {
	Images []string `json:"images"`
	DryRun bool     `json:"dry_run,omitempty"` // say what would go, and remove nothing
}

// ForgetReport is the answer of POST /api/v1/forget.
type ForgetReport struct {
	DryRun bool        `json:"dry_run"`
	Images []Forgotten `json:"images"` // as asked for
}

// Forgotten is what became of one image, or would; what images have in common counts for the
// first of them. Blobs are manifests too.
type Forgotten struct {
	Image  string        `json:"image"`
	Digest digest.Digest `json:"digest,omitempty"` // what its tag stood for; "" if that was not known
	// Blobs and Bytes went from the cache. Bytes of a fill that failed are not counted.
	Blobs int   `json:"blobs"`
	Bytes int64 `json:"bytes"`
	// Kept and KeptBytes stay, because the images in KeptBy need them.
	Kept      int      `json:"blobs_kept"`
	KeptBytes int64    `json:"bytes_kept"`
	KeptBy    []string `json:"kept_by,omitempty"`
	// Runtime is how many of the others are in containerd's own store.
	Runtime int `json:"blobs_in_runtime"`
	// Parts names all that does not stay, here or not, and Holders the other nodes that say
	// they have some of it.
	Parts   []string `json:"parts"`
	Holders []string `json:"holders,omitempty"`
}

// ReplicasStatus says how much of what this node has is on too few nodes.
type ReplicasStatus struct {
	Wanted  int    `json:"wanted"`            // cache.replicas
	Lacking int    `json:"lacking"`           // blobs and tags that fewer nodes have
	Stuck   int    `json:"stuck"`             // of these: others may not have them, or nobody knows of which repository they are
	Made    int64  `json:"made"`              // copies that others keep because this node asked, since its start
	Problem string `json:"problem,omitempty"` // why one of them could not be copied
}

// ImportEvent is one line of the answer of POST /api/v1/import, whose body is an archive.
// Events of a blob repeat while it is read, Whole ends it; each image has one when it is
// served, or cannot be. Done ends the answer, with Error if anything failed.
type ImportEvent struct {
	Digest digest.Digest `json:"digest,omitempty"` // of a blob
	Bytes  int64         `json:"bytes,omitempty"`  // that were read
	Total  int64         `json:"total,omitempty"`  // its size
	There  bool          `json:"there,omitempty"`  // it was in the cache before
	Whole  bool          `json:"whole,omitempty"`

	Image *ImportedImage `json:"image,omitempty"`
	Done  bool           `json:"done,omitempty"`
	Error string         `json:"error,omitempty"`
}

// ImportedImage says what came of one image of an archive.
type ImportedImage struct {
	Name       string        `json:"name"`
	Digest     digest.Digest `json:"digest"`
	Blobs      int           `json:"blobs"` // manifests too
	Bytes      int64         `json:"bytes"`
	There      int           `json:"blobs_there"` // of which were in the cache before
	BytesThere int64         `json:"bytes_there"`
	Missing    []string      `json:"missing,omitempty"` // platforms that the archive has not, or not whole
	Error      string        `json:"error,omitempty"`   // why it is not served
}

// Canary is the answer of /api/v1/canary: whether a request for the canary
// image with this nonce reached the proxy.
type Canary struct {
	Seen      bool      `json:"seen"`
	At        time.Time `json:"at,omitzero"`        // of the last such request
	Registry  string    `json:"registry,omitempty"` // that it named
	UserAgent string    `json:"user_agent,omitempty"`
}

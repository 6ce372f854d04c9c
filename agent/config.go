// Package agent is one Larder node: it owns the configuration, every
// goroutine, the order in which parts start and stop, and the admin API.
//
// It guarantees that host configuration exists only while the proxy answers,
// so a runtime is never pointed at a port that nobody serves (I1 in
// DESIGN.md).
package agent

import (
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// Config holds every configuration key. It is the single source of the flags,
// the environment variables, the file format and the README's table: a key's
// name is the path of `key` tags joined by dots.
//
// Tags: key = name in its table; default = text as a user would write it;
// shown = what documentation says of a default that is found at run time;
// help = one clause, no full stop.
type Config struct {
	Log      LogConfig      `key:"log"`
	Proxy    ProxyConfig    `key:"proxy"`
	Cache    CacheConfig    `key:"cache"`
	Upstream UpstreamConfig `key:"upstream"`
	Node     NodeConfig     `key:"node"`
	Peer     PeerConfig     `key:"peer"`
	Hosts    HostsConfig    `key:"hosts"`
	Runtime  RuntimeConfig  `key:"runtime"`
	Admin    AdminConfig    `key:"admin"`
	Metrics  MetricsConfig  `key:"metrics"`
	Audit    AuditConfig    `key:"audit"`

	// Registries are the [[registry]] tables, in file order. They have no
	// flags and no environment variables.
	Registries []upstream.Registry
}

// LogConfig is the table [log].
type LogConfig struct {
	Level  string `key:"level" default:"info" help:"debug, info, warn or error"`
	Format string `key:"format" default:"text" help:"text or json"`
}

// ProxyConfig is the table [proxy]: the pull API that runtimes talk to.
type ProxyConfig struct {
	Listen          string        `key:"listen" default:"127.0.0.1:5050" help:"address of the pull API; loopback only, unless proxy.allow_remote"`
	AllowRemote     bool          `key:"allow_remote" default:"false" help:"let proxy.listen be reachable from other machines: whoever reaches it can pull what this node may pull"`
	DefaultRegistry string        `key:"default_registry" default:"" help:"registry for requests that name none (no ns, no registry in the path)"`
	FirstByteBudget time.Duration `key:"first_byte_budget" default:"5s" help:"answer headers within this or fail early, so that the runtime goes direct; a blob that other nodes wait for too gets its headers, and the body waits"`
	DrainTimeout    time.Duration `key:"drain_timeout" default:"20s" help:"on stop, how long pulls in progress may take to finish; keep it below the pod's grace period"`
}

// CacheConfig is the table [cache]: blobs on this node's disk.
type CacheConfig struct {
	Dir           string        `key:"dir" default:"/var/lib/larder" help:"where blobs are kept; may be deleted at any time"`
	MaxBytes      cache.Limit   `key:"max_bytes" default:"20%" help:"most the cache may hold: bytes (50GiB) or a share of the file system (20%); 0 = all that cache.min_free leaves"`
	MinFree       cache.Limit   `key:"min_free" default:"20%" help:"never leave the file system with less free: bytes or a share; 0 = fill it"`
	ScrubInterval time.Duration `key:"scrub_interval" default:"24h" help:"how often every blob is hashed again; 0 = never"`
	Replicas      int           `key:"replicas" default:"2" help:"nodes that are to have each blob and tag that one of them pulled, so that it outlives a node; 1 = make no copies"`
	Pins          []string      `key:"pins" default:"" help:"images that this node always keeps, for its own platform, whatever becomes of their registry"`
}

// UpstreamConfig is the table [upstream]: defaults for every registry.
type UpstreamConfig struct {
	TagTTL            time.Duration `key:"tag_ttl" default:"10s" help:"how long a tag's digest is believed before the registry is asked again; 0 = always ask"`
	MaxBytesPerSecond Size          `key:"max_bytes_per_second" default:"0" help:"this node's download limit from all registries (100MiB); 0 = none"`
	StreamsPerBlob    int           `key:"streams_per_blob" default:"4" help:"parallel ranges for large blobs, where one stream is the limit"`
}

// NodeConfig is the table [node]: where this node's own credentials come from,
// for registries with auth = "node". The keys are named after kubelet's flags.
type NodeConfig struct {
	ImageCredentialProviderConfig string `key:"image_credential_provider_config" default:"" help:"kubelet's --image-credential-provider-config: a file, or a directory of them; for registries with auth = node"`
	ImageCredentialProviderBinDir string `key:"image_credential_provider_bin_dir" default:"" help:"kubelet's --image-credential-provider-bin-dir: where the plugins are"`
}

// PeerConfig is the table [peer]: the other nodes.
type PeerConfig struct {
	Enabled                   bool     `key:"enabled" default:"true" help:"fetch from and serve to other nodes"`
	Name                      string   `key:"name" default:"" shown:"host name" help:"this node's name in the cluster; unique"`
	Gossip                    string   `key:"gossip" default:":5052" help:"listen address for membership and the blob index (TCP and UDP)"`
	Data                      string   `key:"data" default:":5051" help:"listen address for pieces (mutual TLS)"`
	Advertise                 string   `key:"advertise" default:"" shown:"first non-loopback address" help:"IP address other nodes reach this one at; the one that peer.gossip or peer.data names, if any"`
	Join                      []string `key:"join" default:"" help:"host:port or DNS names of other nodes, resolved again and again"`
	KeyFile                   string   `key:"key_file" default:"" help:"file with the cluster key (larder keygen); required unless everything is loopback"`
	Zone                      string   `key:"zone" default:"" help:"failure or network zone; pieces come from the same zone first"`
	Home                      bool     `key:"home" default:"true" help:"this node may fetch blobs from the registry on behalf of others"`
	UpstreamScope             string   `key:"upstream_scope" default:"cluster" help:"cluster: one copy from the registry for all; zone: one copy per zone (sites joined by a WAN)"`
	MaxUploadBytesPerSecond   Size     `key:"max_upload_bytes_per_second" default:"0" help:"limit of what this node sends to others (100MiB); 0 = none"`
	MaxDownloadBytesPerSecond Size     `key:"max_download_bytes_per_second" default:"0" help:"limit of what this node takes from others (100MiB); 0 = none"`
	MaxUploads                int      `key:"max_uploads" default:"64" help:"pieces sent to other nodes at the same time"`
}

// HostsConfig is the table [hosts]: the runtimes' registry configuration.
type HostsConfig struct {
	Containerd          string   `key:"containerd" default:"" help:"containerd's certs.d directory to manage (/etc/containerd/certs.d); empty = none"`
	CRIO                string   `key:"crio" default:"" help:"registries.conf.d directory to manage (/etc/containers/registries.conf.d); empty = none"`
	CRIOReload          bool     `key:"crio_reload" default:"false" help:"send CRI-O SIGHUP after a change, where auto_reload_registries is off; needs root and the node's process namespace"`
	Registries          []string `key:"registries" default:"*" help:"registries to mirror; * = every registry on containerd, the well-known ones on CRI-O"`
	RemoveOnExit        bool     `key:"remove_on_exit" default:"true" help:"restore the host's files when the agent stops"`
	ContainerdColonLink bool     `key:"containerd_colon_link" default:"false" help:"also link the literal two-root path that containerd 2.1+ looks up"`
}

// RuntimeConfig is the table [runtime]: containerd's own store as a source.
type RuntimeConfig struct {
	ContainerdSocket string `key:"containerd_socket" default:"" help:"containerd's socket, to follow what its store holds; empty = off"`
	ContentDir       string `key:"content_dir" default:"" help:"containerd's content store (.../io.containerd.content.v1.content), read only; empty = off"`
}

// AdminConfig is the table [admin].
type AdminConfig struct {
	Listen string `key:"listen" default:"127.0.0.1:5053" help:"health, status API, dashboard and profiles; loopback only"`
}

// MetricsConfig is the table [metrics].
type MetricsConfig struct {
	Listen string `key:"listen" default:"" help:"extra listener for /metrics and the health probes alone; empty = none"`
}

// AuditConfig is the table [audit].
type AuditConfig struct {
	File string `key:"file" default:"" help:"append one JSON line per pull served or refused; rotated; empty = none"`
}

// Default returns the configuration of an agent that is told nothing.
func Default() Config {
	var c Config
	for _, k := range keysOf(&c) {
		if err := k.setText(k.Default); err != nil {
			panic("agent: default of " + k.Name + ": " + err.Error()) // a wrong tag; TestDefaults would have failed
		}
	}
	return c
}

// Alone says that this agent has no peers: they are switched off, or nothing
// about them is configured. The default addresses are reachable from other
// machines, so without a key they stay closed.
func (p PeerConfig) Alone() bool {
	if !p.Enabled {
		return true
	}
	d := Default().Peer
	return p.KeyFile == "" && len(p.Join) == 0 && p.Advertise == "" && p.Gossip == d.Gossip && p.Data == d.Data
}

package hostsconfig

import "io/fs"

// Severity orders findings.
type Severity string

const (
	// Broken: the runtime bypasses the mirror, or cannot pull at all.
	Broken Severity = "error"
	// Degraded: some registries bypass it, or a restart or upgrade will.
	Degraded Severity = "warning"
	// Note: worth knowing; nothing to do now.
	Note Severity = "info"
)

// Finding is one thing that keeps a runtime from using the mirror.
type Finding struct {
	ID       string   `json:"id"` // stable, e.g. "containerd-config-path-unset"
	Severity Severity `json:"severity"`
	Runtime  string   `json:"runtime"`       // "containerd", "crio" or ""
	Where    string   `json:"where"`         // file:line as the host names it, or ""
	What     string   `json:"what"`          // one or two sentences
	Fix      string   `json:"fix,omitempty"` // text to paste: a command or lines of a file
	Docs     string   `json:"docs,omitempty"`
}

// Facts are what cannot be read from files. See [GatherFacts].
type Facts struct {
	// ContainerdVersion is "1.7.27", "2.1.4"..., "" when unknown: then the
	// config version and the directory layout decide.
	ContainerdVersion string
	// PortTaken describes who listens on the proxy's address when it is not
	// Larder; "" when it is, or when nobody does.
	PortTaken string
	// ProxyUp: Larder answers on the proxy's address.
	ProxyUp bool
	// Home is the home directory in CRI-O's environment; "" means /root.
	Home string
}

// DoctorOptions configure [Diagnose].
type DoctorOptions struct {
	// FS is the node's root directory, names without a leading slash. It should
	// also implement fs.ReadLinkFS.
	FS fs.FS
	// Containerd and CRIO are the managed directories as the node names them,
	// "" for none.
	Containerd, CRIO string
	// Config is the runtime's own containerd configuration file as the node
	// names it; "" looks in the places of the known distributions.
	Config     string
	Registries []string
	ProxyAddr  string
	ColonLink  bool
	Facts      Facts
}

// Diagnose is the static half of `larder doctor`: it says why a runtime would
// not use the mirror, and the fix. It is a pure function of the file tree and
// the facts; only a canary pull that the proxy sees proves the opposite.
func Diagnose(opts DoctorOptions) []Finding { return nil }

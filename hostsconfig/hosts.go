// Package hostsconfig points a node's container runtimes at the local proxy,
// and can undo that completely.
//
// For containerd it manages hosts.toml files in a certs.d directory, for CRI-O
// one drop-in in a registries.conf.d directory. What was there before stays in
// force behind the proxy, is offered to the agent as upstreams (see
// [Hosts.Upstreams]), and is restored byte for byte by [Hosts.Remove]. A
// journal beside the managed files makes that true after kill -9 at any moment.
//
// The caller writes nothing before the proxy listens: a dead mirror costs a
// runtime nothing, but there is no reason to send it to one. DESIGN.md beside
// this file has the invariants (I1..) that comments here cite.
package hostsconfig

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options configure [New]. The zero value of every field but ProxyAddr is
// usable; with neither Containerd nor CRIO there is nothing to manage.
type Options struct {
	// Containerd is the certs.d directory to manage, "" for none. It is created
	// when missing and removed again if it was.
	Containerd string
	// Contained: this process runs in a container and sees only the node's files that
	// are mounted. A further root of config_path ("a:b") that is missing here may be on
	// the node, with certificates that a _default of ours would hide and that nobody
	// could carry over.
	// Then no _default is written, and "*" means the well-known registries, unless
	// containerd reads Containerd alone because of ColonLink.
	Contained bool
	// ColonLink also links the literal path "<Containerd>:/etc/docker/certs.d"
	// to Containerd, which containerd 2.1 and later look up by mistake when
	// config_path has two roots. The parent of Containerd must be writable.
	ColonLink bool
	// CRIO is the registries.conf.d directory to manage, "" for none. It is
	// created like Containerd. registries.conf beside it is read, never written.
	CRIO string
	// ReloadCRIO sends SIGHUP to the CRI-O of this node after each change of its
	// drop-in, so that it reads its registries anew. The process must see the
	// node's processes, and be root.
	ReloadCRIO bool
	// Registries are the registries to mirror, as images name them, with "*"
	// for every one on containerd and the well-known ones on CRI-O. Empty
	// means "*".
	Registries []string
	// ProxyAddr is the host:port on which this node's proxy listens. An
	// unspecified host means 127.0.0.1.
	ProxyAddr string
	// RemoveOnExit makes Run undo everything before it returns.
	RemoveOnExit bool
	// PollInterval is how often Run checks the files even without a
	// notification (inotify can be exhausted or miss a mount); default 30 s.
	PollInterval time.Duration
	// OnImport, if set, is called by Run, without locks held, whenever the
	// result of Upstreams has changed.
	OnImport func([]Imported)

	Logger     *slog.Logger          // nil discards
	Registerer prometheus.Registerer // nil leaves the metrics unregistered

	// hiddenRoots are what the function of that name would return; nil calls it. Tests
	// set it, nothing else does.
	hiddenRoots []string
}

// The values of every field and label named runtime.
const (
	containerd = "containerd"
	crio       = "crio"
)

// Action says what a [Change] does to its file.
type Action string

const (
	Create  Action = "create"  // was not there
	Update  Action = "update"  // replaced; the original is in the journal
	Restore Action = "restore" // the original is put back
	Delete  Action = "delete"  // was ours and goes away
	Skip    Action = "skip"    // left alone, for Reason
)

// Change is one file changed, or, from [Hosts.Plan], to be changed.
type Change struct {
	Path    string `json:"path"`
	Runtime string `json:"runtime"` // "containerd" or "crio"
	Action  Action `json:"action"`
	// Reason: why the file is left alone, and what to do; also for a Restore that is
	// made because ours cannot be there.
	Reason string `json:"reason,omitempty"`
	// Diff is a unified diff from what is there to what will be; "" for Skip, and if
	// only the colon link is removed.
	Diff string `json:"diff,omitempty"`
	// ReloadNeeded: the runtime does not read this file by itself. CRI-O does so
	// only on SIGHUP, or at once with auto_reload_registries = true.
	ReloadNeeded bool `json:"reload_needed,omitempty"`
}

// ErrBusy is wrapped by the error of Apply, Remove and Run when another Larder
// process manages the same directory.
var ErrBusy = errors.New("another larder process manages this directory")

// Hosts manages the host configuration of one node. Its methods may be called
// from any goroutine; they take turns.
type Hosts struct {
	opts    Options
	proxy   netip.AddrPort
	log     *slog.Logger
	metrics *metrics

	disk    disk
	limiter *limiter
	proc    string // where processes are looked up; tests have their own

	mu      sync.Mutex            // makes Apply, Remove, Plan and Run take turns; guards what follows
	running bool                  // Run is on
	held    map[string]*managed   // directories that Run keeps locked
	reasons map[string]string     // what was last logged as left alone
	imports map[string][]Imported // what was last read of each directory

	stateMu sync.Mutex // guards state; held for no I/O
	state   error      // see InPlace
}

// New checks the options. It touches no file and starts nothing. It panics if Registerer
// has the metrics of another Hosts.
func New(opts Options) (*Hosts, error) {
	addr, err := proxyAddr(opts.ProxyAddr)
	if err != nil {
		return nil, err
	}
	var problems []error
	for _, dir := range []*string{&opts.Containerd, &opts.CRIO} {
		if *dir == "" {
			continue
		}
		if !filepath.IsAbs(*dir) {
			problems = append(problems, fmt.Errorf("hosts directory %q: must be an absolute path", *dir))
		}
		*dir = filepath.Clean(*dir)
	}
	for _, r := range opts.Registries {
		if err := checkRegistry(r); err != nil {
			problems = append(problems, err)
		}
	}
	if strings.Contains(opts.Containerd, ":") {
		problems = append(problems, fmt.Errorf("hosts.containerd %q: name one directory, the first of config_path", opts.Containerd))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if len(opts.Registries) == 0 {
		opts.Registries = []string{"*"}
	}
	if opts.PollInterval <= 0 {
		opts.PollInterval = defaultPoll
	}
	return &Hosts{
		opts: opts, proxy: addr, log: opts.Logger, metrics: newMetrics(opts.Registerer),
		limiter: newLimiter(), proc: "/proc", held: map[string]*managed{}, reasons: map[string]string{}, imports: map[string][]Imported{},
		state: errNotYet,
	}, nil
}

// registryName is host, host:port or [IPv6]:port. It must not start like our
// own directories, nor be _default.
var registryName = regexp.MustCompile(`^(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?$`)

func checkRegistry(r string) error {
	if r == "*" || registryName.MatchString(r) {
		return nil
	}
	return fmt.Errorf("hosts.registries %q: want a registry as images name it, host or host:port, or \"*\"", r)
}

// proxyAddr parses the listen address of the proxy into the address that a
// runtime on this node dials.
func proxyAddr(s string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("proxy address %q: %w", s, err)
	}
	// localhost may resolve to ::1 first, where the proxy does not listen.
	if host == "" || host == "localhost" {
		host = "127.0.0.1"
	}
	addr, err := netip.ParseAddrPort(net.JoinHostPort(host, port))
	if err != nil || addr.Port() == 0 {
		return netip.AddrPort{}, fmt.Errorf("proxy address %q: want IP address and port", s)
	}
	if addr.Addr().IsUnspecified() {
		addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), addr.Port())
	}
	return addr, nil
}

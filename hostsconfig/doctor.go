package hostsconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

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

// Facts are what cannot be read from files.
type Facts struct {
	// ContainerdVersion is "1.7.27", "2.1.4"..., "" when unknown: then the
	// config version and the directory layout decide.
	ContainerdVersion string
	// PortTaken describes who listens on the proxy's address when it is not
	// Larder; "" when it is, or when nobody does.
	PortTaken string
	// ProxyUp: Larder answers on the proxy's address.
	ProxyUp bool
	// CRIOImages are names of images that CRI-O has, with their registries.
	CRIOImages []string
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
	Config string
	// As in [Options].
	Registries []string
	ProxyAddr  string
	ColonLink  bool
	// SeenOnly makes no finding about a containerd configuration that cannot
	// be seen, as from within a container: it would be a guess.
	SeenOnly bool
	Facts    Facts
}

// Diagnose is the static half of `larder doctor`: it says why a runtime would
// not use the mirror, and the fix. It is a pure function of the file tree and
// the facts; only a canary pull that the proxy sees proves the opposite. The
// worst findings come first.
func Diagnose(opts DoctorOptions) []Finding {
	for _, dir := range []*string{&opts.Containerd, &opts.CRIO} {
		if *dir != "" {
			*dir = path.Clean(*dir)
		}
	}
	if len(opts.Registries) == 0 {
		opts.Registries = []string{"*"}
	}
	d := &doctor{opts: opts, node: node{opts.FS}}
	addr, err := proxyAddr(opts.ProxyAddr)
	if err != nil {
		d.add(Finding{ID: "proxy-address", Severity: Broken, What: err.Error(), Fix: `proxy.listen = "127.0.0.1:5050"`})
		return d.findings
	}
	d.proxy = addr
	d.checkPort()
	if opts.Containerd != "" {
		d.checkContainerd()
	}
	if opts.CRIO != "" {
		d.checkCRIO()
	}
	if opts.Containerd == "" && opts.CRIO == "" {
		d.add(Finding{
			ID: "nothing-managed", Severity: Broken,
			What: "Neither hosts.containerd nor hosts.crio is set, so no runtime is pointed at the proxy.",
			Fix:  "[hosts]\ncontainerd = \"/etc/containerd/certs.d\"    # for containerd\ncrio = \"/etc/containers/registries.conf.d\"    # for CRI-O",
		})
	}
	slices.SortStableFunc(d.findings, func(a, b Finding) int { return rank(a.Severity) - rank(b.Severity) })
	return d.findings
}

func rank(s Severity) int { return slices.Index([]Severity{Broken, Degraded, Note}, s) }

type doctor struct {
	opts     DoctorOptions
	node     node
	proxy    netip.AddrPort
	findings []Finding
}

func (d *doctor) add(f Finding) { d.findings = append(d.findings, f) }

// hostsCommand is the command line of `larder hosts` for the managed directories:
// without them it works only where a configuration file names them.
func (d *doctor) hostsCommand(verb string) string {
	line := "larder hosts " + verb
	if d.opts.Containerd != "" {
		line += " --hosts.containerd " + d.opts.Containerd
	}
	if d.opts.CRIO != "" {
		line += " --hosts.crio " + d.opts.CRIO
	}
	return line
}

// fixByWriting is what to do about a file that Larder would write. A running
// agent does so by itself within a minute, and holds the directory's lock, so
// that `larder hosts apply` is refused: what keeps the agent from it counts.
func (d *doctor) fixByWriting() string {
	if d.opts.Facts.ProxyUp {
		return "larder status    # its line \"hosts\" says why the agent has not written this"
	}
	return d.hostsCommand("apply") + "    # or start the agent"
}

func (d *doctor) checkPort() {
	if d.opts.Facts.PortTaken == "" {
		return
	}
	d.add(Finding{
		ID: "port-taken", Severity: Broken,
		What: fmt.Sprintf("%s is taken by someone else (%s). The agent cannot listen there, and whoever does receives the runtimes' requests, with their credentials.", d.proxy, d.opts.Facts.PortTaken),
		Fix:  "[proxy]\nlisten = \"127.0.0.1:<free port>\"    # in the chart: ports.proxy",
	})
}

// node reads a node's files by absolute path. It resolves symlinks itself, so
// that absolute ones stay on the node when its root is mounted elsewhere.
type node struct{ fs fs.FS }

// maxLinks is the kernel's own limit.
const maxLinks = 40

// resolve returns the name of path in n.fs, symlinks followed.
func (n node) resolve(name string) (string, error) {
	done, rest := "/", path.Clean("/"+name)
	for links := 0; rest != "/" && rest != ""; {
		part, tail, _ := strings.Cut(strings.TrimPrefix(rest, "/"), "/")
		rest = tail
		at := path.Join(done, part)
		target, err := fs.ReadLink(n.fs, fsName(at))
		if err != nil {
			done = at // not a symlink; if it is not there, opening it will say so
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("%s: too many symlinks", name)
		}
		if path.IsAbs(target) {
			done = "/"
		}
		rest = path.Join(target, rest)
	}
	return fsName(done), nil
}

func fsName(abs string) string {
	if abs == "/" {
		return "."
	}
	return strings.TrimPrefix(abs, "/")
}

func (n node) read(name string) ([]byte, error) {
	real, err := n.resolve(name)
	if err != nil {
		return nil, err
	}
	return fs.ReadFile(n.fs, real)
}

func (n node) list(name string) ([]fs.DirEntry, error) {
	real, err := n.resolve(name)
	if err != nil {
		return nil, err
	}
	return fs.ReadDir(n.fs, real)
}

func (n node) isDir(name string) bool {
	real, err := n.resolve(name)
	if err != nil {
		return false
	}
	info, err := fs.Stat(n.fs, real)
	return err == nil && info.IsDir()
}

func (n node) exists(name string) bool {
	real, err := n.resolve(name)
	if err != nil {
		return false
	}
	_, err = fs.Stat(n.fs, real)
	return err == nil
}

// lineOf returns path:line of the first line that matches re, else path.
func lineOf(name string, doc []byte, re *regexp.Regexp) string {
	at := re.FindIndex(doc)
	if at == nil {
		return name
	}
	return fmt.Sprintf("%s:%d", name, bytes.Count(doc[:at[0]], []byte("\n"))+1)
}

// lineOfError adds the line of a TOML error to a path.
func lineOfError(name string, err error) string {
	if decode, ok := errors.AsType[*toml.DecodeError](err); ok {
		row, _ := decode.Position()
		return fmt.Sprintf("%s:%d", name, row)
	}
	return name
}

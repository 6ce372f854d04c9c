package hostsconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const (
	hostsName  = "hosts.toml"
	defaultDir = "_default"
)

// certsDir is what a managed containerd directory, and the roots it hides,
// hold of the user's.
type certsDir struct {
	m *managed
	// roots are the user's host directories by name, for m and then for each
	// hidden root.
	roots []root
	// unseen is a hidden root that may be there and cannot be read, "" for none.
	unseen string
}

type root struct {
	path string
	dirs map[string]bool
}

func readCertsDir(m *managed, hidden []string) (*certsDir, error) {
	c := &certsDir{m: m}
	own, err := hostDirs(m.path)
	if err != nil {
		return nil, err
	}
	for name := range own.dirs {
		theirs, err := m.isUsers(name)
		if err != nil {
			return nil, err
		}
		if !theirs {
			delete(own.dirs, name)
		}
	}
	c.roots = append(c.roots, own)
	for _, path := range hidden {
		r, err := hostDirs(path)
		if err != nil {
			return nil, err
		}
		c.roots = append(c.roots, r)
	}
	return c, nil
}

// hostDirs lists the directories of a root, symlinked ones too.
func hostDirs(path string) (root, error) {
	r := root{path: path, dirs: map[string]bool{}}
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	for _, e := range entries {
		info, err := os.Stat(filepath.Join(path, e.Name()))
		if err == nil && info.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			r.dirs[e.Name()] = true
		}
	}
	return r, nil
}

// isUsers reports whether a host directory would be there without us.
func (m *managed) isUsers(name string) (bool, error) {
	if !slices.Contains(m.journal.Dirs, name) {
		return true, nil
	}
	certs, err := listCerts(m.at(name), "")
	if err != nil || !certs.empty() {
		return true, err
	}
	s, err := m.situate(filepath.Join(name, hostsName))
	return s.original != nil || err != nil, nil // what cannot be read is not ours
}

// listCerts finds what containerd would load from a host directory without
// hosts.toml (loadCertFiles in core/remotes/docker/config/hosts.go). Names are prefixed
// with prefix; certificates without a key beside them have Key "".
func listCerts(dir, prefix string) (certFiles, error) {
	var c certFiles
	entries, err := os.ReadDir(dir)
	if err != nil {
		return c, err
	}
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		if strings.HasSuffix(e.Name(), ".crt") {
			c.ca = append(c.ca, filepath.Join(prefix, e.Name()))
		}
		if stem, ok := strings.CutSuffix(e.Name(), ".cert"); ok {
			pair := ClientPair{Cert: filepath.Join(prefix, e.Name())}
			if _, err := os.Stat(filepath.Join(dir, stem+".key")); err == nil {
				pair.Key = filepath.Join(prefix, stem+".key")
			}
			c.client = append(c.client, pair)
		}
	}
	return c, nil
}

// inForce returns the directory that containerd would use for host without us,
// "" for none: the first root with any of the names (hostDirFromRoots of its CRI
// plugin, hostPaths in remotes/docker/config; of its transfer service, see colonlink.go).
func (c *certsDir) inForce(host string) string {
	for _, r := range c.roots {
		for _, name := range append(dirSpellings(host), defaultDir) {
			if r.dirs[name] {
				return filepath.Join(r.path, name)
			}
		}
	}
	return ""
}

// names lists the host directories to manage.
func (c *certsDir) names(listed []string) []string {
	var out []string
	if slices.Contains(listed, "*") {
		out = append(c.inUse(), defaultDir)
		if !c.refusesDefault() {
			listed = nil // it stands for all others
		}
	}
	for _, host := range mirrored(listed) {
		out = append(out, c.namesOf(host)...)
	}
	slices.Sort(out)
	return c.once(slices.Compact(out))
}

// once leaves one name of each directory, or its hosts.toml would be managed twice: that
// which is no link, if there is one.
func (c *certsDir) once(names []string) []string {
	slices.SortStableFunc(names, func(a, b string) int { return c.m.linkType(a) - c.m.linkType(b) })
	var out []string
	var seen []fs.FileInfo
	for _, name := range names {
		if info, err := os.Stat(c.m.at(name)); err == nil {
			if slices.ContainsFunc(seen, func(o fs.FileInfo) bool { return os.SameFile(o, info) }) {
				continue
			}
			seen = append(seen, info)
		}
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// linkType is 1 for a symlink, else 0.
func (m *managed) linkType(rel string) int {
	if _, err := os.Readlink(m.at(rel)); err != nil {
		return 0
	}
	return 1
}

// inUse lists the host directories in which containerd finds something without us.
func (c *certsDir) inUse() (out []string) {
	for i, r := range c.roots {
		for name := range r.dirs {
			if !c.anySpelling(name, i) {
				out = append(out, name)
			}
		}
		if r.dirs[defaultDir] {
			break // it hides the roots behind it, with or without us
		}
	}
	return out
}

// refusesDefault: a _default of ours would hide what cannot be carried over.
func (c *certsDir) refusesDefault() bool { return c.unseen != "" && !c.roots[0].dirs[defaultDir] }

// anySpelling reports whether a root before i has a directory for the same
// registry.
func (c *certsDir) anySpelling(name string, i int) bool {
	for _, r := range c.roots[:i] {
		for _, s := range dirSpellings(hostOfDir(name)) {
			if r.dirs[s] {
				return true
			}
		}
	}
	return false
}

// namesOf are the directories of one registry: every spelling that is there,
// else the last that containerd tries, because an operator who adds the other
// one later then wins.
func (c *certsDir) namesOf(host string) []string {
	var out []string
	spellings := dirSpellings(host)
	for _, s := range spellings {
		if c.roots[0].dirs[s] {
			out = append(out, s)
		}
	}
	if out == nil {
		return spellings[len(spellings)-1:]
	}
	return out
}

// render builds the hosts.toml of one host directory, and says which mode it gets
// if it is new.
func (c *certsDir) render(name string, original *file, proxy netip.AddrPort) ([]byte, fs.FileMode, error) {
	user := original.content()
	if len(user) > 0 || c.roots[0].dirs[name] {
		certs, err := c.certsOf(name)
		if err != nil {
			return nil, 0, err
		}
		data, err := mergeHosts(user, certs, proxy)
		return data, defaultMode, err
	}
	if name == defaultDir && c.refusesDefault() {
		return nil, 0, fmt.Errorf("it would hide %s, which config_path names too and which cannot be seen from here: mount that (containerd.furtherRoots in the chart); until then only well-known registries are mirrored", c.unseen)
	}
	// A directory of our own would hide the one in force until now.
	dir := c.inForce(hostOfDir(name))
	if dir == "" {
		data, err := mergeHosts(nil, certFiles{}, proxy)
		return data, defaultMode, err
	}
	mode := defaultMode
	if info, err := os.Stat(filepath.Join(dir, hostsName)); err == nil {
		mode &= info.Mode() // it may hold a password
	}
	data, err := c.carryOver(dir, proxy)
	return data, mode, err
}

func (c *certsDir) certsOf(name string) (certFiles, error) {
	if !c.roots[0].dirs[name] {
		return certFiles{}, nil
	}
	return listCerts(c.m.at(name), "")
}

// carryOver renders the contents of dir for use from another directory.
func (c *certsDir) carryOver(dir string, proxy netip.AddrPort) ([]byte, error) {
	data, err := c.userText(dir)
	if err != nil {
		return nil, err
	}
	if _, bad := parseHosts(data); len(data) > 0 && bad == nil {
		if data, err = absolutePaths(data, dir); err != nil {
			return nil, err
		}
		return mergeHosts(data, certFiles{}, proxy)
	}
	// None, or one that containerd ignores in favour of the certificates.
	certs, err := listCerts(dir, dir)
	if err != nil {
		return nil, err
	}
	return mergeHosts(nil, certs, proxy)
}

// userText returns the user's hosts.toml of a host directory in any root.
func (c *certsDir) userText(dir string) ([]byte, error) {
	if filepath.Dir(dir) == c.roots[0].path {
		s, err := c.m.situate(filepath.Join(filepath.Base(dir), hostsName))
		return removeBlock(s.original.content()), err // a link may lead to a file with ours
	}
	f, err := readFile(filepath.Join(dir, hostsName))
	if err != nil || f == nil {
		return nil, err
	}
	return removeBlock(f.data), nil
}

// imported lists what containerd uses without us.
func (c *certsDir) imported(proxy netip.AddrPort) []Imported {
	var out []Imported
	seen := map[string]bool{}
	for _, r := range c.roots {
		for _, name := range slices.Sorted(maps.Keys(r.dirs)) {
			host := hostOfDir(name)
			if seen[host] {
				continue
			}
			if first := dirSpellings(host)[0]; r.dirs[first] {
				name = first
			}
			seen[host] = true // containerd looks for it in no further root
			im, err := c.importDir(filepath.Join(r.path, name), proxy)
			if err != nil || len(im.Endpoints) == 0 {
				continue // containerd ignores such a file as well; Apply reports it
			}
			if im.Registry = host; host == defaultDir {
				im.Registry = "*"
			}
			out = append(out, im)
		}
		if r.dirs[defaultDir] {
			break
		}
	}
	return out
}

func (c *certsDir) importDir(dir string, proxy netip.AddrPort) (Imported, error) {
	im := Imported{Runtime: containerd, Path: dir}
	text, err := c.userText(dir)
	if err != nil {
		return im, err
	}
	if len(text) > 0 {
		if f, err := parseHosts(text); err == nil {
			im.Path = filepath.Join(dir, hostsName)
			im.Endpoints, err = f.endpoints(dir, proxy)
			return im, err
		}
	}
	certs, err := listCerts(dir, dir)
	if err != nil || certs.empty() {
		return im, err
	}
	im.Endpoints = []Endpoint{{Source: true, Pull: true, Resolve: true, CAFiles: certs.ca, ClientPairs: certs.client}}
	return im, nil
}

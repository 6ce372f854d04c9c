package hostsconfig

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"path"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// distribution says where containerd's configuration may be.
type distribution struct {
	config string
	// generated says where the fix goes if config is rewritten at every start.
	generated string
	restart   string
}

// packaged is containerd by itself, as in its own packages, with kubeadm and on the clouds'
// nodes.
var packaged = distribution{"/etc/containerd/config.toml", "", "systemctl restart containerd    # running containers go on"}

// generatedImports are imports that k0s (before 1.36) and Talos write at every start.
var generatedImports = []string{"/run/k0s/containerd-cri.toml", "/etc/cri/conf.d/cri.toml"}

// distributions are searched in this order. Talos has a second containerd, for itself and
// without CRI, in the place of packaged.
var distributions = []distribution{
	{"/var/lib/rancher/k3s/agent/etc/containerd/config.toml", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml.tmpl (config-v3.toml.tmpl for containerd 2.x; a new one begins with {{ template \"base\" . }})", "systemctl restart k3s    # or k3s-agent"},
	{"/var/lib/rancher/rke2/agent/etc/containerd/config.toml", "/var/lib/rancher/rke2/agent/etc/containerd/config.toml.tmpl (config-v3.toml.tmpl for containerd 2.x; a new one begins with {{ template \"base\" . }})", "systemctl restart rke2-agent    # or rke2-server"},
	{"/var/snap/microk8s/current/args/containerd.toml", "/var/snap/microk8s/current/args/containerd-template.toml", "snap restart microk8s.daemon-containerd"},
	{"/etc/k0s/containerd.toml", "", "systemctl restart k0sworker    # or k0scontroller"},
	{"/etc/cri/containerd.toml", "a machine configuration patch that writes /etc/cri/conf.d/20-customization.part", "reboot the node with the new machine configuration"},
	packaged,
	// Flatcar, whose unit names the file in an environment variable.
	{"/usr/share/containerd/config.toml", "/etc/containerd/config.toml, as a copy of /usr/share/containerd/config.toml", "systemctl edit containerd    # [Service] Environment=CONTAINERD_CONFIG=/etc/containerd/config.toml\nsystemctl restart containerd"},
}

// release is a containerd release; versions is what is known of the one that
// runs: it lies between low and high.
type release struct{ major, minor int }

func (r release) less(o release) bool {
	return r.major < o.major || r.major == o.major && r.minor < o.minor
}

type versions struct{ low, high release }

// surely and maybe: is it this release or a later one?
func (v versions) surely(major, minor int) bool { return !v.low.less(release{major, minor}) }
func (v versions) maybe(major, minor int) bool  { return !v.high.less(release{major, minor}) }

func (v versions) String() string {
	if v.low == v.high {
		return fmt.Sprintf("containerd %d.%d", v.low.major, v.low.minor)
	}
	return fmt.Sprintf("containerd %d.%d or later", v.low.major, v.low.minor)
}

// newestConfig is the last version of the configuration file that it reads: ConfigVersion in
// containerd's version/version.go, and ValidateV2 in services/server/config of 1.x. Of
// releases to come nothing is known.
func (v versions) newestConfig() int {
	switch {
	case !v.maybe(2, 0):
		return 2
	case !v.maybe(2, 3):
		return 3
	case v.surely(2, 5):
		return math.MaxInt
	}
	return 4
}

// knownVersions combines the version, when known, with the version of the
// configuration file, which a release refuses when it is newer than itself (1.6 since
// 1.6.33, 1.7 since 1.7.17: before, they take a later one for 2).
func knownVersions(containerdVersion string, configVersion int) versions {
	var r release
	if _, err := fmt.Sscanf(strings.TrimPrefix(containerdVersion, "v"), "%d.%d", &r.major, &r.minor); err == nil {
		return versions{r, r}
	}
	v := versions{release{1, 6}, release{99, 0}}
	switch {
	case configVersion >= 4:
		v.low = release{2, 3}
	case configVersion == 3:
		v.low = release{2, 0}
	}
	return v
}

// criConfig is the merged configuration of containerd's image service.
type criConfig struct {
	dist     distribution
	found    bool
	version  int
	plugins  map[string]any
	files    []string
	main     []byte // the first of files
	versions versions
	// bottlerocket: known by what its templates alone have together (bottlerocket-core-kit,
	// packages/containerd-*), since a pod does not see the node's os-release.
	bottlerocket bool
	// long: a file has settings of the CRI plugin under the name that it has since version 2.
	long  bool
	moved bool // registry settings of the old section are in force in 2.x
	// newest is the highest version that a file states, and newestIn that file.
	newest   int
	newestIn string
	// oldIn is a file with registry settings in the old section that 2.0 to 2.2 do not
	// migrate, and so do not read, "" for none; see migrate.
	oldIn string
	// merged is the version that 2.0 to 2.2 take all files together for.
	merged int
	// where is file:line of the config_path in force.
	where string
	// last is the import that has the last word on config_path, "" if none has, and table
	// the heading to set it under there, "" if it is there already.
	last, table string
}

// Plugin sections that hold the registry settings: before and since 2.0.
const (
	pluginOld = "io.containerd.grpc.v1.cri"
	pluginNew = "io.containerd.cri.v1.images"
)

// loadConfig finds and merges the configuration; nil when it cannot be read.
func (d *doctor) loadConfig() *criConfig {
	c := &criConfig{plugins: map[string]any{}, merged: 3}
	for _, dist := range d.places() {
		if d.node.exists(dist.config) {
			c.dist, c.found = dist, true
			break
		}
	}
	if !c.found {
		return d.configUnseen()
	}
	if doc, err := d.node.read(c.dist.config); err == nil {
		if bytes.HasPrefix(doc, []byte("# k0s_managed=true\n")) {
			c.dist.generated = "/etc/k0s/containerd.d/larder.toml"
		}
		c.bottlerocket = bytes.Contains(doc, []byte(`"/etc/containerd/cri-base.json"`)) && bytes.Contains(doc, []byte(`"localhost/kubernetes/pause:`))
	}
	file, importer, err := d.mergeAll(c)
	if err == nil {
		if !c.versions.maybe(2, 3) {
			c.migrate(c.merged, c.plugins)
		}
		return c
	}
	if d.opts.SeenOnly && (errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist)) { // an import
		return d.configUnseen()
	}
	f := Finding{
		ID: "containerd-config-unreadable", Severity: Broken, Runtime: containerd, Where: lineOfError(file, err),
		What: fmt.Sprintf("containerd's configuration cannot be read: %v.", err),
		Fix:  fmt.Sprintf("containerd --config %s config dump    # says where; correct the file, then: %s", c.dist.config, c.dist.restart),
	}
	switch {
	case errors.Is(err, fs.ErrPermission): // a path that only root may walk
		f.Severity, f.Fix = Degraded, "sudo larder doctor"
	case errors.Is(err, fs.ErrNotExist) && importer != "":
		// `containerd config dump` of 2.x takes this for having no configuration.
		f.Where = d.whereIn([]string{importer}, importsLine)
		f.What = fmt.Sprintf("%s imports %s, which is not there: containerd does not start.", importer, file)
		f.Fix = fmt.Sprintf("touch %s    # or take it out of imports in %s\n# then: %s", file, importer, c.dist.restart)
		if slices.Contains(generatedImports, file) {
			f.Fix = c.dist.restart + "; it makes the file"
		}
	}
	d.add(f)
	return nil
}

// configUnseen is what is known of a containerd without its configuration.
func (d *doctor) configUnseen() *criConfig {
	what := "No containerd configuration file was found, so its defaults are assumed. In a container, the node's root may not be mounted."
	if d.opts.SeenOnly {
		what = "containerd's configuration cannot be read from here, so nothing is known of it: in a container, the node's root may not be mounted."
	}
	d.add(Finding{
		ID: "containerd-config-not-found", Severity: Note, Runtime: containerd, What: what,
		Fix: "larder doctor    # on the node itself, as root", Docs: docsSetup,
	})
	return &criConfig{
		plugins: map[string]any{}, dist: packaged,
		versions: knownVersions(d.opts.Facts.ContainerdVersion, 0),
	}
}

func (d *doctor) places() []distribution {
	if d.opts.Config == "" {
		return distributions
	}
	for _, dist := range distributions {
		if dist.config == d.opts.Config {
			return []distribution{dist}
		}
	}
	return []distribution{{d.opts.Config, packaged.generated, packaged.restart}}
}

// mergeAll adds all files, in containerd's order: what an import imports comes after all
// imports of the file above it. With an error it returns the file that cannot be read, and
// the one that imports that, "" for none.
func (d *doctor) mergeAll(c *criConfig) (file, importer string, err error) {
	importers := map[string]string{c.dist.config: ""}
	for pending := []string{c.dist.config}; len(pending) > 0; {
		file, pending = pending[0], pending[1:]
		imports, err := d.merge(c, file)
		if err != nil {
			return file, importers[file], err
		}
		for _, name := range imports {
			if _, known := importers[name]; !known {
				importers[name] = file
				pending = append(pending, name)
			}
		}
	}
	return "", "", nil
}

// merge adds one file and returns its imports. containerd 1.x replaces the section of
// a plugin as a whole, 2.x merges it key by key.
func (d *doctor) merge(c *criConfig, name string) (imports []string, err error) {
	doc, err := d.node.read(name)
	if err != nil {
		return nil, err
	}
	var f struct {
		Version int            `toml:"version"`
		Imports []string       `toml:"imports"`
		Plugins map[string]any `toml:"plugins"`
	}
	if err := toml.Unmarshal(doc, &f); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(c.files) == 0 {
		c.main, c.version = doc, f.Version
		c.versions = knownVersions(d.opts.Facts.ContainerdVersion, f.Version)
	}
	c.files = append(c.files, name)
	if f.Version > c.newest {
		c.newest, c.newestIn = f.Version, name
	}
	if f.Version >= 2 {
		c.merged = f.Version
	}
	c.long = c.long || f.Plugins[pluginOld] != nil
	if short, ok := f.Plugins["cri"]; ok && f.Version < 2 {
		f.Plugins[pluginOld] = short
	}
	old := table(f.Plugins[pluginOld])["registry"] != nil
	if old && (f.Version >= 3 || !c.versions.maybe(2, 3)) && c.versions.maybe(2, 0) && !c.versions.surely(2, 3) {
		c.oldIn = name
	}
	if c.versions.maybe(2, 3) {
		c.migrate(f.Version, f.Plugins)
	}
	for plugin, section := range f.Plugins {
		if c.versions.maybe(2, 0) {
			c.plugins[plugin] = deepMerge(c.plugins[plugin], section)
		} else {
			c.plugins[plugin] = section
		}
	}
	if configPathLine.Match(doc) {
		c.where = lineOf(name, doc, configPathLine)
	}
	c.settle(name, f.Version, f.Plugins)
	// `containerd config default` prints an import of conf.d since 2.3, but a file
	// that does not name it has none.
	for _, pattern := range f.Imports {
		pattern = absolute(pattern, path.Dir(name))
		if !strings.Contains(pattern, "*") { // "?" and "[" alone make no pattern
			imports = append(imports, pattern)
			continue
		}
		imports = append(imports, d.glob(pattern)...)
	}
	return imports, nil
}

// settle takes note of an import that sets config_path, or, in 1.x, replaces the section
// that it is in.
func (c *criConfig) settle(name string, version int, plugins map[string]any) {
	if name == c.dist.config || slices.Contains(generatedImports, name) {
		return
	}
	_, old := table(plugins[pluginOld], "registry")["config_path"]
	_, recent := table(plugins[pluginNew], "registry")["config_path"]
	if old || recent && c.versions.maybe(2, 0) {
		c.last, c.table = name, ""
		return
	}
	if c.versions.maybe(2, 0) || plugins[pluginOld] == nil {
		return
	}
	c.last, c.table = name, "[plugins.\""+pluginOld+"\".registry]\n"
	if version < 2 {
		c.table = "[plugins.cri.registry]\n"
	}
}

// glob expands a pattern, which may be one in directories too.
func (d *doctor) glob(pattern string) []string {
	dir, base := path.Split(pattern)
	dirs := []string{path.Clean(dir)}
	if strings.ContainsAny(dir, "*?[") {
		dirs = d.glob(path.Clean(dir))
	}
	var out []string
	for _, dir := range dirs {
		entries, err := d.node.list(dir)
		if err != nil {
			continue // containerd takes no match for no import
		}
		for _, e := range entries {
			if ok, err := path.Match(base, e.Name()); err == nil && ok {
				out = append(out, path.Join(dir, e.Name()))
			}
		}
	}
	return out
}

func deepMerge(into, from any) any {
	a, ok := into.(map[string]any)
	b, ok2 := from.(map[string]any)
	if !ok || !ok2 {
		return from
	}
	out := maps.Clone(a)
	for k, v := range b {
		out[k] = deepMerge(a[k], v)
	}
	return out
}

func table(v any, keys ...string) map[string]any {
	for _, k := range keys {
		t, _ := v.(map[string]any)
		v = t[k]
	}
	t, _ := v.(map[string]any)
	return t
}

// migrate does what 2.x does to plugins of an earlier version: the image service's
// settings move, those of the old section before those of the new one, and some only
// with a table of runtimes beside them (migrateConfig in plugins/cri/images).
//
// 2.3 and later do so to each file (LoadConfigWithPlugins in cmd/containerd/server/config).
// 2.0 to 2.2 do it to what they have merged (New in cmd/containerd/server), if the last
// version that a file states is 2; without one they take it for 3.
func (c *criConfig) migrate(version int, files map[string]any) {
	current := 3
	if c.versions.maybe(2, 3) {
		current = 4
	}
	old := table(files[pluginOld])
	if old == nil || version >= current || !c.versions.maybe(2, 0) {
		return
	}
	recent := maps.Clone(table(files[pluginNew]))
	if recent == nil {
		recent = map[string]any{}
	}
	move := func(from map[string]any, keys ...string) {
		for _, key := range keys {
			if v, ok := from[key]; ok {
				recent[key] = v
			}
		}
	}
	move(old, "registry", "max_concurrent_downloads", "image_pull_with_sync_fs")
	if runtime := table(old, "containerd"); runtime["runtimes"] != nil {
		move(runtime, "disable_snapshot_annotations", "discard_unpacked_layers")
	}
	files[pluginNew] = recent
	c.moved = c.moved || old["registry"] != nil
	if !c.versions.maybe(2, 3) {
		c.oldIn = ""
	}
}

// registry is the registry section in force: 1.x knows the old one alone, and 2.x
// has moved that.
func (c *criConfig) registry() map[string]any {
	if !c.versions.maybe(2, 0) {
		return table(c.plugins[pluginOld], "registry")
	}
	return table(c.plugins[pluginNew], "registry")
}

// configPath is config_path as the files set it, "" if they do not.
func (c *criConfig) configPath() string {
	s, _ := c.registry()["config_path"].(string)
	return s
}

// defaultConfigPath is config_path where it is not set, from 2.2 on and without
// registry.mirrors.
const defaultConfigPath = "/etc/containerd/certs.d:" + secondRoot

// localPull returns the setting that makes 2.1 and later pull without the
// transfer service (checkLocalImagePullConfigs in internal/cri/config), or "".
func (c *criConfig) localPull() string {
	t := table(c.plugins[pluginNew])
	for _, key := range []string{"use_local_image_pull", "discard_unpacked_layers", "image_pull_with_sync_fs"} {
		if on, _ := t[key].(bool); on {
			return key + " = true"
		}
	}
	if off, ok := t["disable_snapshot_annotations"].(bool); ok && !off {
		return "disable_snapshot_annotations = false"
	}
	if n, ok := t["max_concurrent_downloads"].(int64); ok && n != 3 {
		return fmt.Sprintf("max_concurrent_downloads = %d", n)
	}
	for _, key := range []string{"configs", "auths"} {
		if len(table(c.registry(), key)) > 0 {
			return "registry." + key
		}
	}
	return ""
}

// readsOneRoot reports whether the node's containerd surely takes a config_path with two
// roots for one name, as its transfer service does. The running version is not known
// here: a file of version 2 may belong to 1.x, which splits the path.
func readsOneRoot(root fs.FS) bool {
	d := &doctor{node: node{root}}
	c := d.loadConfig()
	return c != nil && (!c.found || c.version >= 3 && c.localPull() == "")
}

// splitRoots are the directories of a config_path, at least one. A colon without a
// directory beside it names containerd's working directory, which is nobody's certs.d.
func splitRoots(configPath string) []string {
	roots := slices.DeleteFunc(strings.Split(configPath, ":"), func(r string) bool { return r == "" })
	if len(roots) == 0 {
		return []string{configPath}
	}
	return roots
}

// hiddenRoots are the certs.d directories that a node's containerd looks into
// after dir, and that a _default in dir hides. Where the configuration cannot
// be seen, containerd's own default counts: carrying over what containerd does
// not read costs nothing, losing a registry's CA costs its pulls.
func hiddenRoots(root fs.FS, dir string) []string {
	d := &doctor{node: node{root}, opts: DoctorOptions{Containerd: dir}}
	configPath := defaultConfigPath
	if c := d.loadConfig(); c != nil {
		configPath = cmp.Or(c.configPath(), defaultConfigPath)
	}
	roots := splitRoots(configPath)
	i := slices.IndexFunc(roots, func(r string) bool { return d.sameDir(r, dir) })
	if i < 0 {
		return nil
	}
	return roots[i+1:]
}

// sameDir compares directories of the node, symlinks followed.
func (d *doctor) sameDir(a, b string) bool {
	x, err := d.node.resolve(a)
	if err != nil {
		return false
	}
	y, err := d.node.resolve(b)
	return err == nil && x == y
}

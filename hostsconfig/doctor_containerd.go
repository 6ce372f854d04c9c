package hostsconfig

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
)

const (
	docsSetup    = "https://github.com/containerd/containerd/blob/main/docs/hosts.md"
	docsTwoRoots = "https://github.com/containerd/containerd/issues/12415"
	docsCRI      = "https://github.com/containerd/containerd/blob/main/docs/cri/registry.md"
)

var (
	configPathLine = regexp.MustCompile(`(?m)^[^#\n]*\bconfig_path\s*=`)
	mirrorsLine    = regexp.MustCompile(`(?m)^[^#\n]*\bregistry['"]?\.mirrors|^\s*mirrors\s*=`)
	versionLine    = regexp.MustCompile(`(?m)^\s*version\s*=`)
	oldSectionLine = regexp.MustCompile(`(?m)^[^#\n]*` + regexp.QuoteMeta(pluginOld) + `['"]?\.registry`)
	importsLine    = regexp.MustCompile(`(?m)^\s*imports\s*=`)
	hubSiteLine    = regexp.MustCompile(`(?m)^\s*server\s*=\s*['"](?:` + regexp.QuoteMeta(hubSite) + `|docker\.io)/?(?:v2/?)?['"]`)
	tlsLine        = regexp.MustCompile(`(?m)^[^#\n]*\.tls['"]?\s*\]`)
)

func (d *doctor) checkContainerd() {
	c := d.loadConfig()
	if c == nil {
		return
	}
	if c.found || !d.opts.SeenOnly {
		d.checkVersion(c)
		d.checkNewest(c)
		d.checkOldSection(c)
		d.checkLegacy(c)
		d.checkRoots(c)
		d.checkNotImported(c)
	}
	d.checkHostDirs(c)
}

func (c *criConfig) section() string {
	if c.found && c.unversioned() && !c.long {
		return "[plugins.cri.registry]" // of version 1; 2.x loses one of two that have both names
	}
	if c.oldIn != "" || !c.moved && c.versions.maybe(2, 0) && (c.version >= 3 || c.version == 0 && c.versions.surely(2, 0)) {
		return "[plugins.'" + pluginNew + "'.registry]"
	}
	return "[plugins.\"" + pluginOld + "\".registry]"
}

// fixBottlerocket is in place of an edit, which the next start or change of a setting undoes.
const fixBottlerocket = "# Bottlerocket makes /etc/containerd/config.toml from its settings, and none of them is config_path.\n" +
	"# Releases from February 2026 on set it, with Kubernetes 1.33 or later: update the node."

// fixPath is the text that sets config_path to one directory.
func (c *criConfig) fixPath(dir string) string {
	if c.bottlerocket {
		return fixBottlerocket
	}
	where, setting := c.registryTable()
	place := cmp.Or(c.dist.generated, c.dist.config) + where
	if c.unversioned() && (c.long || !c.found) {
		place += versionTwo
	}
	if c.last != "" {
		place, setting = c.last+", which has the last word", c.table+"  config_path"
	}
	before := ""
	if hosts := c.tlsHosts(); len(hosts) > 0 {
		before = fmt.Sprintf("# only when registry.configs.*.tls (%s) is gone, as said there\n", strings.Join(hosts, ", "))
	}
	return fmt.Sprintf("%s# in %s\n%s = %s\n# then: %s", before, place, setting, tomlString(dir), c.dist.restart)
}

// registryKey is a key of the registry table, or the table inline, in the CRI plugin's.
var registryKey = regexp.MustCompile(`(?m)^[ \t]*((?:[^#\n\[=]*\.)?['"]?registry['"]?)[ \t]*(\.|=[ \t]*\{)`)

// registryTable says how to set config_path where the file has the registry table
// already: a second heading of its name keeps containerd from starting.
func (c *criConfig) registryTable() (where, setting string) {
	setting = c.section() + "\n  config_path"
	line, text := headingLine(c.main, c.section()), "is this heading"
	if at := registryKey.FindSubmatchIndex(c.main); line == 0 && at != nil {
		line = 1 + bytes.Count(c.main[:at[2]], []byte("\n"))
		text, setting = "has the table inline: within its braces", "  config_path"
		if c.main[at[4]] == '.' {
			text, setting = "has a key of this table", "  "+string(c.main[at[2]:at[3]])+".config_path"
		}
	}
	if line == 0 {
		return "", setting
	}
	which := fmt.Sprintf("line %d", line)
	if c.dist.generated != "" {
		which = fmt.Sprintf("what became line %d of %s", line, c.dist.config)
	}
	return fmt.Sprintf(", where %s %s; replace config_path if it is there", which, text), setting
}

// headingLine is the line of a table's heading in doc, however it is quoted; 0 for none.
func headingLine(doc []byte, heading string) int {
	bare := strings.NewReplacer("'", "", `"`, "", " ", "", "\t", "")
	n := 0
	for line := range strings.Lines(string(doc)) {
		n++
		if name, _, ok := strings.Cut(line, "]"); ok && bare.Replace(name)+"]" == bare.Replace(heading) {
			return n
		}
	}
	return 0
}

// unversioned: containerd 1.x takes a file that states no version for one of
// version 1, in which plugins have short names, and passes over all others. 2.3 and
// later read both, 2.0 to 2.2 neither; see criConfig.oldIn.
func (c *criConfig) unversioned() bool { return c.newest < 2 && !c.versions.surely(2, 0) }

const versionTwo = ", as its first line (cri in disabled_plugins is io.containerd.grpc.v1.cri then)\nversion = 2"

// checkVersion reports settings that containerd 1.x passes over.
func (d *doctor) checkVersion(c *criConfig) {
	if !c.unversioned() || !c.long {
		return
	}
	f := Finding{
		ID: "containerd-config-version-missing", Severity: Broken, Runtime: containerd, Where: c.dist.config,
		What: fmt.Sprintf("The file states no version, so %s takes it for version 1, which has no plugin %s, and reads none of its settings.", c.versions, pluginOld),
		Fix:  "# in " + c.dist.config + versionTwo + "\n# then: " + c.dist.restart, Docs: docsSetup,
	}
	if c.versions.maybe(2, 0) {
		f.Severity = Degraded
		f.What = fmt.Sprintf("The file states no version: containerd 1.x takes it for version 1, which has no plugin %s, and reads none of its settings. Which containerd runs here is not known.", pluginOld)
	}
	d.add(f)
}

// checkNewest reports a file of a version that containerd does not start with.
func (d *doctor) checkNewest(c *criConfig) {
	limit, who, hint := c.versions.newestConfig(), c.versions.String(), ", with plugins named as `containerd config default` names them"
	switch {
	case c.newest > limit:
		if c.versions.low != c.versions.high {
			who = "containerd up to 2.4"
		}
		who += fmt.Sprintf(" reads versions up to %d", limit)
		if limit == 2 {
			who += " (1.6 before 1.6.33 and 1.7 before 1.7.17 take it for 2)"
		}
	case c.newest > c.version && c.version > 0 && c.versions.surely(2, 3) && !c.versions.maybe(2, 4):
		// LoadConfigWithPlugins in cmd/containerd/server/config, taken back for 2.4.
		limit, hint = c.version, ""
		who += fmt.Sprintf(" imports no file of a later version than %s has, %d", c.dist.config, limit)
	default:
		return
	}
	d.add(Finding{
		ID: "containerd-config-version-unsupported", Severity: Broken, Runtime: containerd, Where: d.whereIn([]string{c.newestIn}, versionLine),
		What: fmt.Sprintf("The file is of version %d: %s, and does not start with it.", c.newest, who),
		Fix:  fmt.Sprintf("# in %s%s\nversion = %d\n# then: %s", c.newestIn, hint, limit, c.dist.restart), Docs: docsSetup,
	})
}

// checkOldSection reports registry settings that depend on the release: see criConfig.oldIn.
func (d *doctor) checkOldSection(c *criConfig) {
	if c.oldIn == "" {
		return
	}
	f := Finding{
		ID: "containerd-old-section", Severity: Broken, Runtime: containerd, Where: d.whereIn([]string{c.oldIn}, oldSectionLine),
		What: fmt.Sprintf("%s does not read these registry settings of containerd 1.x: the last version that a file states is 3, or none does. From 2.3 on it reads them.", c.versions),
		Fix:  fmt.Sprintf("# in %s, in place of [plugins.%q.registry] or [plugins.cri.registry]\n[plugins.'%s'.registry]\n# then: %s", c.oldIn, pluginOld, pluginNew, c.dist.restart), Docs: docsSetup,
	}
	if c.versions.maybe(2, 3) {
		f.What = fmt.Sprintf("containerd 2.0 to 2.2 do not read the registry settings of %s in a file of version 3; 2.3 and later do. Which containerd runs here is not known.", pluginOld)
	}
	if c.versions.maybe(2, 3) || c.registry() != nil {
		f.Severity = Degraded
	}
	d.add(f)
}

// checkLegacy reports registry settings that exclude config_path.
func (d *doctor) checkLegacy(c *criConfig) {
	configPath := c.configPath()
	if mirrors := table(c.registry(), "mirrors"); len(mirrors) > 0 {
		what := "registry.mirrors is set and config_path is not: containerd uses these mirrors and never looks at hosts.toml."
		if configPath != "" {
			what = "registry.mirrors is set beside config_path: containerd's CRI plugin refuses to load, and the node can start no pod after the next restart."
		}
		fix := c.fixPath(d.rootOr(configPath))
		if !c.bottlerocket {
			fix = c.mirrorsToHosts(mirrors, d.rootOr(configPath)) + "# remove registry.mirrors, and\n" + fix
		}
		d.add(Finding{
			ID: "containerd-registry-mirrors", Severity: Broken, Runtime: containerd, Where: d.whereIn(c.files, mirrorsLine),
			What: what, Fix: fix, Docs: docsCRI,
		})
	}
	for _, host := range c.tlsHosts() {
		d.checkTLS(c, host, configPath)
	}
}

// tlsHosts are the hosts with a registry.configs.HOST.tls.
func (c *criConfig) tlsHosts() []string {
	configs := table(c.registry(), "configs")
	return slices.DeleteFunc(slices.Sorted(maps.Keys(configs)), func(host string) bool { return table(configs, host, "tls") == nil })
}

// checkTLS: beside config_path 1.x refuses registry.configs.*.tls, and 2.x passes
// over it.
func (d *doctor) checkTLS(c *criConfig, host, configPath string) {
	f := Finding{
		ID: "containerd-configs-tls", Severity: Degraded, Runtime: containerd, Where: d.whereIn(c.files, tlsLine), Docs: docsCRI,
		What: fmt.Sprintf("registry.configs.%q.tls has to go before config_path is set: beside it containerd 1.x does not load its CRI plugin, and 2.x passes it over.", host),
		Fix: fmt.Sprintf("# remove the tls table; in %s/%s/hosts.toml instead:\n[host.%s]\n%s",
			d.rootOr(configPath), host, tomlString("https://"+host), c.tlsLines(host)),
	}
	switch {
	case configPath == "":
	case c.versions.surely(2, 0):
		f.What = fmt.Sprintf("registry.configs.%q.tls is set beside config_path: containerd 2.x passes it over.", host)
	default:
		f.Severity = Broken
		f.What = fmt.Sprintf("registry.configs.%q.tls is set beside config_path: containerd's CRI plugin refuses to load.", host)
	}
	d.add(f)
}

// tlsLines says what registry.configs.HOST.tls says in a [host] table.
func (c *criConfig) tlsLines(host string) string {
	tls := table(c.registry(), "configs", host, "tls")
	text := func(key string) string {
		s, _ := tls[key].(string)
		return s
	}
	var b strings.Builder
	if ca := text("ca_file"); ca != "" {
		fmt.Fprintf(&b, "  ca = %s\n", tomlString(ca))
	}
	if cert, key := text("cert_file"), text("key_file"); cert != "" {
		fmt.Fprintf(&b, "  client = [[%s, %s]]\n", tomlString(cert), tomlString(key))
	}
	if skip, _ := tls["insecure_skip_verify"].(bool); skip {
		b.WriteString("  skip_verify = true\n")
	}
	return b.String()
}

// whereIn finds the line of a setting in the last of files that has it.
func (d *doctor) whereIn(files []string, re *regexp.Regexp) string {
	for _, name := range slices.Backward(files) {
		if doc, err := d.node.read(name); err == nil && re.Match(doc) {
			return lineOf(name, doc, re)
		}
	}
	return files[0]
}

// rootOr is the directory for the hosts.toml that a fix has written: the first of config_path,
// which "" leaves to us.
func (d *doctor) rootOr(configPath string) string {
	first, _, _ := strings.Cut(configPath, ":")
	return cmp.Or(first, d.opts.Containerd)
}

// mirrorsToHosts is the shell text that says the same in hosts.toml.
func (c *criConfig) mirrorsToHosts(mirrors map[string]any, root string) string {
	var b strings.Builder
	for _, host := range slices.Sorted(maps.Keys(mirrors)) {
		dir := host
		if host == "*" {
			dir = defaultDir
		}
		fmt.Fprintf(&b, "mkdir -p '%s/%s' && cat > '%s/%s/hosts.toml' <<'EOF'\n", root, dir, root, dir)
		endpoints, _ := table(mirrors, host)["endpoint"].([]any)
		for _, e := range endpoints {
			s, _ := e.(string)
			u, err := url.Parse(s)
			if err != nil || s == "" {
				continue
			}
			fmt.Fprintf(&b, "[host.%s]\n  capabilities = [\"pull\", \"resolve\"]\n", tomlString(s))
			if strings.Trim(u.Path, "/") != "" && !strings.HasSuffix(u.Path, "/v2") {
				b.WriteString("  override_path = true\n") // a mirror's path is the whole path
			}
			b.WriteString(c.tlsLines(u.Host))
		}
		b.WriteString("EOF\n")
	}
	return b.String()
}

// checkNotImported finds a config_path in a drop-in that is not read.
func (d *doctor) checkNotImported(c *criConfig) {
	pattern := path.Join(path.Dir(c.dist.config), "conf.d/*.toml")
	for _, name := range d.glob(pattern) {
		doc, err := d.node.read(name)
		if err != nil || slices.Contains(c.files, name) || !configPathLine.Match(doc) {
			continue
		}
		place := c.dist.config + ", before the first table"
		if importsLine.Match(c.main) {
			place = lineOf(c.dist.config, c.main, importsLine) + ", beside what is in that list"
		}
		fix := fmt.Sprintf("# in %s\nimports = [%s]\n# then: %s", place, tomlString(pattern), c.dist.restart)
		d.add(Finding{
			ID: "containerd-drop-in-not-imported", Severity: Degraded, Runtime: containerd, Where: lineOf(name, doc, configPathLine),
			What: fmt.Sprintf("containerd does not read this file, because %s does not import it.", c.dist.config), Fix: fix, Docs: docsSetup,
		})
	}
}

// MicroK8s writes the revision to config_path. A pod with current mounted does not see that
// it is a link, and has the containerd.toml of the same revision.
const snapCurrent = "/var/snap/microk8s/current/"

var snapRevision = regexp.MustCompile(`^/var/snap/microk8s/x?[0-9]+/`)

// checkRoots compares config_path with our directory.
func (d *doctor) checkRoots(c *criConfig) {
	configPath, where := c.configPath(), c.where
	switch {
	case configPath != "":
	case len(table(c.registry(), "mirrors")) > 0:
		return // checkLegacy has said so
	case c.versions.surely(2, 2):
		configPath, where = defaultConfigPath, c.dist.config
	case c.oldIn != "" && c.registry() == nil:
		return // checkOldSection has said so
	default:
		d.pathUnset(c)
		return
	}
	roots := splitRoots(configPath)
	ours := d.opts.Containerd
	isOurs := func(r string) bool {
		return d.sameDir(r, ours) || d.opts.SeenOnly && snapRevision.ReplaceAllString(r, snapCurrent) == ours
	}
	i := slices.IndexFunc(roots, isOurs)
	if i < 0 {
		f := Finding{
			ID: "containerd-other-directory", Severity: Broken, Runtime: containerd, Where: where,
			What: fmt.Sprintf("containerd looks in %s, but hosts.containerd is %s.", configPath, ours),
			Fix:  fmt.Sprintf("[hosts]\ncontainerd = %s    # in the chart: containerd.certsDir", tomlString(roots[0])), Docs: docsSetup,
		}
		if d.opts.SeenOnly && !d.node.exists(roots[0]) {
			f.Severity = Degraded
			f.What += " Whether a link makes them one cannot be seen from here; larder doctor on the node can."
		}
		d.add(f)
		return
	}
	if strings.Contains(configPath, ":") && d.checkTwoRoots(c, configPath, where) {
		return
	}
	if i > 0 {
		d.add(Finding{
			ID: "containerd-not-first-root", Severity: Degraded, Runtime: containerd, Where: where,
			What: fmt.Sprintf("hosts.containerd %s comes after %s in config_path; directories there hide ours.", ours, roots[0]),
			Fix:  fmt.Sprintf("[hosts]\ncontainerd = %s    # in the chart: containerd.certsDir", tomlString(roots[0])), Docs: docsSetup,
		})
	}
	if len(roots) > 1 {
		d.checkHidden(roots, where)
	}
}

// checkHidden: containerd stops at the first root that has any match, and
// _default matches everything.
func (d *doctor) checkHidden(roots []string, where string) {
	if !d.node.exists(path.Join(roots[0], defaultDir)) {
		d.noDefault(roots, where)
		return
	}
	for _, root := range roots[1:] {
		entries, err := d.node.list(root)
		if err != nil {
			continue // containerd takes a missing root for an empty one
		}
		for _, e := range entries {
			if !d.node.isDir(path.Join(root, e.Name())) || slices.ContainsFunc(dirSpellings(hostOfDir(e.Name())), func(s string) bool { return d.node.exists(path.Join(roots[0], s)) }) {
				continue
			}
			fix := d.fixByWriting()
			if d.opts.Facts.ProxyUp {
				fix += "\n" + seeRoots
			}
			d.add(Finding{
				ID: "containerd-hidden-directory", Severity: Degraded, Runtime: containerd, Where: path.Join(root, e.Name()),
				What: fmt.Sprintf("%s/_default hides this directory and the certificates or mirrors in it (config_path in %s).", roots[0], where),
				Fix:  fix, Docs: docsSetup,
			})
		}
	}
}

const seeRoots = "# an agent in a pod has to see the directory: containerd.furtherRoots of the chart"

// noDefault: an agent that cannot see a further root makes no _default that would hide it.
func (d *doctor) noDefault(roots []string, where string) {
	if !d.opts.Facts.ProxyUp || !slices.Contains(d.opts.Registries, "*") {
		return
	}
	d.add(Finding{
		ID: "containerd-no-default", Severity: Degraded, Runtime: containerd, Where: where,
		What: fmt.Sprintf("The agent runs and %s/_default is not there: well-known registries alone are mirrored. It would hide %s, which the agent may not see.", roots[0], strings.Join(roots[1:], " and ")),
		Fix:  d.fixByWriting() + "\n" + seeRoots, Docs: docsSetup,
	})
}

func (d *doctor) pathUnset(c *criConfig) {
	f := Finding{
		ID: "containerd-config-path-unset", Severity: Broken, Runtime: containerd, Where: c.dist.config,
		What: "config_path is not set, so containerd never looks at hosts.toml; every pull goes straight to the registry.",
		Fix:  c.fixPath(d.opts.Containerd), Docs: docsSetup,
	}
	if c.versions.maybe(2, 2) {
		f.What += " (From 2.2 on its default is two roots, which it does not split either; the fix is the same.)"
	}
	d.add(f)
}

// checkTwoRoots: from 2.1 on, the transfer service takes "a:b" for one name. It reports
// whether containerd surely reads none of the roots: with either fix our directory is the
// only one, whatever its place was.
func (d *doctor) checkTwoRoots(c *criConfig, configPath, where string) (ignored bool) {
	if !c.versions.maybe(2, 1) || d.sameDir(configPath, d.opts.Containerd) && d.node.isDir(configPath) {
		return false
	}
	linked := configPath == path.Clean(d.opts.Containerd)+":"+secondRoot // or would be, with the colon link
	if linked && d.opts.ColonLink && !d.opts.Facts.ProxyUp {
		return false // the agent makes the link when it starts
	}
	fix := d.fixOneRoot(c, splitRoots(configPath))
	if linked {
		fix += "\n# or, without a restart, for Larder:\n[hosts]\ncontainerd_colon_link = true    # in the chart: containerd.colonLink"
	}
	if reason := c.localPull(); reason != "" {
		d.add(Finding{
			ID: "containerd-two-roots-by-luck", Severity: Note, Runtime: containerd, Where: where,
			What: fmt.Sprintf("config_path has two roots, which containerd's transfer service cannot read. It works only because %s makes containerd pull the old way.", reason),
			Fix:  fix, Docs: docsTwoRoots,
		})
		return false
	}
	f := Finding{
		ID: "containerd-two-roots", Severity: Broken, Runtime: containerd, Where: where,
		What: fmt.Sprintf("config_path is %q: %s does not split it and ignores every hosts.toml without a word.", configPath, c.versions),
		Fix:  fix, Docs: docsTwoRoots,
	}
	if !c.versions.surely(2, 1) {
		f.Severity = Degraded
		f.What = fmt.Sprintf("config_path is %q: containerd 2.1 and later do not split it and ignore every hosts.toml without a word. Which containerd runs here is not known.", configPath)
	}
	d.add(f)
	return f.Severity == Broken
}

// fixOneRoot is the text that leaves our directory alone in config_path.
func (d *doctor) fixOneRoot(c *criConfig, roots []string) string {
	ours, before := d.opts.Containerd, ""
	for _, root := range roots {
		if !d.sameDir(root, ours) && (d.opts.SeenOnly || d.node.exists(root)) {
			before += fmt.Sprintf("# first move what is in %s to %s: containerd reads no other then\n", root, ours)
		}
	}
	return before + c.fixPath(ours)
}

// checkHostDirs looks at what containerd finds in our directory.
func (d *doctor) checkHostDirs(c *criConfig) {
	dir := d.opts.Containerd
	entries, err := d.node.list(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return // the agent creates it
	}
	if err != nil {
		d.add(Finding{ID: "containerd-directory-unreadable", Severity: Broken, Runtime: containerd, Where: dir, What: err.Error() + ".", Fix: "chmod 755 " + dir})
		return
	}
	for _, e := range entries {
		name := path.Join(dir, e.Name())
		if !strings.HasPrefix(e.Name(), ".") && d.node.isDir(name) {
			d.checkHostDir(c, name)
		}
	}
}

func (d *doctor) checkHostDir(c *criConfig, dir string) {
	host := hostOfDir(path.Base(dir))
	if host != defaultDir && !covers(d.opts.Registries, host) {
		return
	}
	file := path.Join(dir, hostsName)
	doc, err := d.node.read(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.add(Finding{ID: "containerd-hosts-unreadable", Severity: Degraded, Runtime: containerd, Where: file, What: err.Error() + ".", Fix: "ls -l " + file})
		return
	}
	if len(bytes.TrimSpace(doc)) == 0 {
		d.hidesDefault(dir, host)
		return
	}
	parsed, err := parseHosts(doc)
	if err != nil {
		d.add(Finding{
			ID: "containerd-hosts-unparsable", Severity: Degraded, Runtime: containerd, Where: lineOfError(file, err),
			What: fmt.Sprintf("containerd cannot read this file (%v), logs one error and pulls %s straight from the registry. Larder leaves it alone.", err, host),
			Fix:  "# correct the line above; Larder takes the file up within a minute\n$EDITOR " + file, Docs: docsSetup,
		})
		return
	}
	d.checkDialect(c, file, host, doc, parsed)
	if host == "docker.io" && hubSiteLine.Match(doc) {
		d.add(Finding{
			ID: "containerd-hub-address", Severity: Degraded, Runtime: containerd, Where: lineOf(file, doc, hubSiteLine),
			What: fmt.Sprintf("%q is Docker's web site, which answers a pull with 404: where containerd means to find Docker Hub behind the agent and the mirrors, there is nothing.", hubSite),
			Fix:  "server = \"https://registry-1.docker.io\"", Docs: docsSetup,
		})
	}
	d.checkOrder(file, host, doc, parsed)
	if host == defaultDir {
		d.checkMirrorOfAll(file, doc)
	}
}

// checkMirrorOfAll: a mirror in _default is asked by containerd behind the agent, and
// not by the agent: what it has of which registry, and under which names, no file says.
func (d *doctor) checkMirrorOfAll(file string, doc []byte) {
	order, err := headerOrder(removeBlock(doc)) // an agent of another address is none either
	i := slices.IndexFunc(order, func(name string) bool { return !isSelf(name, d.proxy) })
	if err != nil || i < 0 {
		return
	}
	mirror := redactURL(order[i])
	d.add(Finding{
		ID: "containerd-mirror-of-all", Severity: Note, Runtime: containerd, Where: file,
		What: fmt.Sprintf("%q is a mirror of every registry. The agent asks only those that are named as its upstreams; where the registries themselves cannot be reached, nothing is cached without that.", mirror),
		Fix:  fmt.Sprintf("[[registry]]    # in the chart: registries; one for each registry\nhost = \"docker.io\"\nupstreams = [%s]", tomlString(mirror)),
	})
}

// hidesDefault: a directory without hosts.toml keeps _default from its host.
func (d *doctor) hidesDefault(dir, host string) {
	if !d.opts.Facts.ProxyUp {
		return // the agent will write one
	}
	d.add(Finding{
		ID: "containerd-directory-hides-default", Severity: Degraded, Runtime: containerd, Where: dir,
		What: fmt.Sprintf("This directory has no hosts.toml and hides _default, so %s is not mirrored although the agent runs.", host),
		Fix:  d.fixByWriting(), Docs: docsSetup,
	})
}

var referrersLine = regexp.MustCompile(`(?m)^[^#\n]*capabilities\s*=[^#\n]*referrers`)

// checkDialect reports what some releases read differently.
func (d *doctor) checkDialect(c *criConfig, file, host string, doc []byte, f *hostFile) {
	if referrersLine.Match(doc) && !c.versions.surely(2, 2) {
		d.add(Finding{
			ID: "containerd-referrers-capability", Severity: Degraded, Runtime: containerd, Where: lineOf(file, doc, referrersLine),
			What: fmt.Sprintf("The capability \"referrers\" is unknown before containerd 2.2, which then ignores the whole file: %s would not be mirrored.", host),
			Fix:  "capabilities = [\"pull\", \"resolve\"]", Docs: docsSetup,
		})
	}
	if len(f.Hosts) == 0 && !c.versions.surely(1, 7) {
		d.add(Finding{
			ID: "containerd-no-host-table", Severity: Degraded, Runtime: containerd, Where: file,
			What: "containerd 1.6 refuses a hosts.toml without a [host] table. While the agent runs, ours is in it.",
			Fix:  fmt.Sprintf("[host.%s]", tomlString("https://"+host)), Docs: docsSetup,
		})
	}
	for _, name := range slices.Sorted(maps.Keys(f.Hosts)) {
		if !slices.Contains(f.order, name) && c.versions.maybe(2, 0) {
			d.add(Finding{
				ID: "containerd-inline-host", Severity: Note, Runtime: containerd, Where: file,
				What: fmt.Sprintf("Host %q is written as an inline table or dotted key: containerd 1.x uses it, 2.x ignores it.", redactURL(name)),
				Fix:  fmt.Sprintf("[host.%s]", tomlString(name)), Docs: docsSetup,
			})
		}
	}
}

// checkOrder reports whether we come first, and who we are.
func (d *doctor) checkOrder(file, host string, doc []byte, f *hostFile) {
	at := slices.IndexFunc(f.order, func(name string) bool { return isSelf(name, d.proxy) })
	up := d.opts.Facts.ProxyUp
	finding := Finding{Severity: Degraded, Runtime: containerd, Where: file}
	switch {
	case at == 0 && !up || at < 0 && hasBlock(doc):
		finding.ID = "leftovers"
		finding.What = "A part of Larder's is in this file, but no agent answers at its address. Pulls work (a dead mirror costs nothing), but nothing is cached, and another program could listen there."
		finding.Fix = d.hostsCommand("remove") + "    # or start the agent"
		finding.Where = lineOf(file, doc, regexp.MustCompile("(?m)^"+regexp.QuoteMeta(beginMark)))
	case at < 0 && up:
		finding.ID = "containerd-host-not-mirrored"
		finding.What = fmt.Sprintf("The agent runs, but this file does not name it, and it hides _default: %s is not mirrored.", host)
		finding.Fix = d.fixByWriting()
	case at > 0:
		finding.ID = "containerd-not-first"
		finding.What = fmt.Sprintf("%q comes before the agent and is asked first.", redactURL(f.order[0]))
		finding.Fix = d.fixByWriting()
	default:
		return
	}
	d.add(finding)
}

package hostsconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// dropInName sorts behind what distributions and operators write, because the
// last file that names a prefix wins.
const dropInName = "99-larder.conf"

// wellKnown are the registries that "*" stands for on CRI-O, which has no
// catch-all: a wildcard entry loses the host it matched. Hosts under pkg.dev or
// amazonaws.com cannot be enumerated; name them in hosts.registries.
var wellKnown = []string{
	"docker.io", "gcr.io", "ghcr.io", "icr.io", "mcr.microsoft.com", "nvcr.io", "public.ecr.aws", "quay.io",
	"registry.access.redhat.com", "registry.connect.redhat.com", "registry.gitlab.com", "registry.k8s.io",
	"registry.opensuse.org", "registry.redhat.io", "registry.suse.com", "us.gcr.io", "eu.gcr.io", "asia.gcr.io", "xpkg.upbound.io",
}

// rule is one [[registry]] table of registries.conf. It stays a map so that
// keys of versions to come are carried along.
type rule map[string]any

func (r rule) str(key string) string {
	s, _ := r[key].(string)
	return s
}

func (r rule) flag(key string) bool {
	b, _ := r[key].(bool)
	return b
}

// mirrors returns the mirror tables; validate has made sure of the types.
func (r rule) mirrors() []rule {
	list, _ := r["mirror"].([]any)
	var out []rule
	for _, m := range list {
		if t, ok := m.(map[string]any); ok {
			out = append(out, rule(t))
		}
	}
	return out
}

// parseRegistries reads a registries.conf or drop-in and fails on everything
// that makes containers-image refuse it, which would break every pull
// (loadConfigFile and postProcessRegistries in its pkg/sysregistriesv2).
func parseRegistries(doc []byte) ([]rule, error) {
	var f struct {
		Registry   []map[string]any `toml:"registry"`
		Registries struct {
			Insecure struct {
				Registries []string `toml:"registries"`
			} `toml:"insecure"`
			Block struct {
				Registries []string `toml:"registries"`
			} `toml:"block"`
		} `toml:"registries"` // version 1, read until 2026
	}
	if err := toml.Unmarshal(doc, &f); err != nil {
		return nil, err
	}
	var out []rule
	seen := map[string]bool{}
	add := func(r rule) error {
		if err := normalise(r); err != nil {
			return err
		}
		// Within one file the first of a prefix wins.
		if !seen[r.str("prefix")] {
			seen[r.str("prefix")] = true
			out = append(out, r)
		}
		return nil
	}
	for _, t := range f.Registry {
		if err := add(rule(t)); err != nil {
			return nil, err
		}
	}
	for _, r := range versionOne(f.Registries.Block.Registries, f.Registries.Insecure.Registries) {
		if err := add(r); err != nil {
			return nil, err
		}
	}
	return out, conflicts(out)
}

// versionOne converts the lists of the format's version 1 to a rule for each location.
func versionOne(blocked, insecure []string) []rule {
	byLocation := map[string]rule{}
	get := func(location string) rule {
		if byLocation[location] == nil {
			byLocation[location] = rule{"location": location}
		}
		return byLocation[location]
	}
	for _, l := range blocked {
		get(l)["blocked"] = true
	}
	for _, l := range insecure {
		get(l)["insecure"] = true
	}
	var out []rule
	for _, l := range slices.Sorted(maps.Keys(byLocation)) {
		out = append(out, byLocation[l])
	}
	return out
}

// lowerKeys has the keys in lower case: containers-image reads them in any.
func (r rule) lowerKeys() {
	was := maps.Clone(r)
	for _, key := range slices.Sorted(maps.Keys(was)) { // of two spellings lower case is last, and stays
		delete(r, key)
		r[strings.ToLower(key)] = was[key]
	}
}

// normalise checks a rule like containers-image and fills in its prefix.
func normalise(r rule) error {
	r.lowerKeys()
	for _, key := range []string{"prefix", "location"} {
		if err := trimLocation(r, key); err != nil {
			return err
		}
	}
	prefix, location := r.str("prefix"), r.str("location")
	wildcard := strings.HasPrefix(prefix, "*.")
	switch {
	case prefix == "" && location == "":
		return fmt.Errorf("a registry has neither prefix nor location")
	case prefix == "":
		r["prefix"] = location
	case location == "" && !wildcard:
		return fmt.Errorf("registry %q has no location", prefix)
	case wildcard && strings.ContainsAny(prefix, "/@:"):
		return fmt.Errorf("registry %q: a wildcard has neither port nor path", prefix)
	}
	for _, key := range []string{"insecure", "blocked", "mirror-by-digest-only"} {
		if _, ok := r[key].(bool); r[key] != nil && !ok {
			return fmt.Errorf("registry %q: %s is not true or false", r.str("prefix"), key)
		}
	}
	if r.str("pull-from-mirror") != "" {
		return fmt.Errorf("registry %q: pull-from-mirror belongs to a mirror", r.str("prefix"))
	}
	return normaliseMirrors(r)
}

func normaliseMirrors(r rule) error {
	if r["mirror"] == nil {
		return nil
	}
	if list, ok := r["mirror"].([]any); !ok || len(list) != len(r.mirrors()) {
		return fmt.Errorf("registry %q: mirror is not a list of tables", r.str("prefix"))
	}
	for _, m := range r.mirrors() {
		m.lowerKeys()
		if err := trimLocation(m, "location"); err != nil {
			return err
		}
		if m.str("location") == "" {
			return fmt.Errorf("registry %q: a mirror has no location", r.str("prefix"))
		}
		if _, ok := m["insecure"].(bool); m["insecure"] != nil && !ok {
			return fmt.Errorf("mirror %q: insecure is not true or false", m.str("location"))
		}
		by := m.str("pull-from-mirror")
		if !slices.Contains([]string{"", "all", "digest-only", "tag-only"}, by) {
			return fmt.Errorf("mirror %q: unknown pull-from-mirror %q", m.str("location"), by)
		}
		if by != "" && r.flag("mirror-by-digest-only") {
			return fmt.Errorf("registry %q: mirror-by-digest-only and pull-from-mirror exclude each other", r.str("prefix"))
		}
	}
	return nil
}

func trimLocation(r rule, key string) error {
	if r[key] == nil {
		return nil
	}
	s, ok := r[key].(string)
	if !ok {
		return fmt.Errorf("%s is not a string", key)
	}
	if strings.HasPrefix(s, "http://") || strings.HasPrefix(s, "https://") {
		return fmt.Errorf("%s %q: a scheme is not allowed", key, redactURL(s))
	}
	r[key] = strings.TrimRight(s, "/")
	return nil
}

// conflicts reports two rules of one file that name one location with
// different settings, which containers-image refuses.
func conflicts(rules []rule) error {
	byPlace := map[string]rule{}
	for _, r := range rules {
		if other, ok := byPlace[place(r)]; ok && !agree(r, other) {
			return fmt.Errorf("registry %q is defined twice with different insecure or blocked settings", place(r))
		}
		byPlace[place(r)] = r
	}
	return nil
}

// place is where a rule without mirrors leads: its prefix, if it names no location.
func place(r rule) string {
	if l := r.str("location"); l != "" {
		return l
	}
	return r.str("prefix")
}

func agree(a, b rule) bool {
	return a.flag("insecure") == b.flag("insecure") && a.flag("blocked") == b.flag("blocked")
}

// registriesFile is one file that containers-image reads.
type registriesFile struct {
	path   string
	marked bool // it has a block of ours
	rules  []rule
}

// names reports whether a rule of f is for prefix.
func (f registriesFile) names(prefix string) bool {
	return slices.ContainsFunc(f.rules, func(r rule) bool { return r.str("prefix") == prefix })
}

func readRegistries(path string, doc []byte) (registriesFile, error) {
	rules, err := parseRegistries(doc)
	return registriesFile{path, hasBlock(doc), rules}, err
}

// mergeRules does what containers-image does: a later file replaces the whole rule of a
// prefix. origin is the path of the file that a prefix's rule is from.
func mergeRules(files []registriesFile) (rules map[string]rule, origin map[string]string) {
	rules, origin = map[string]rule{}, map[string]string{}
	for _, f := range files {
		for _, r := range f.rules {
			rules[r.str("prefix")], origin[r.str("prefix")] = r, f.path
		}
	}
	return rules, origin
}

// matchRule returns the rule that containers-image would apply to ref. The
// longest prefix string wins; of two as long, the one that sorts first.
func matchRule(rules map[string]rule, ref string) rule {
	var best rule
	for _, prefix := range slices.Sorted(maps.Keys(rules)) {
		if matchLen(ref, prefix) >= 0 && (best == nil || len(prefix) > len(best.str("prefix"))) {
			best = rules[prefix]
		}
	}
	return best
}

// matchLen returns how much of ref prefix covers, or -1.
func matchLen(ref, prefix string) int {
	n := len(prefix)
	if strings.HasPrefix(prefix, "*.") {
		i := strings.Index(ref, prefix[1:])
		if i < 0 || strings.Contains(ref[:i], "/") {
			return -1
		}
		n = i + len(prefix) - 1
	} else if !strings.HasPrefix(ref, prefix) {
		return -1
	}
	if n < len(ref) && !strings.ContainsRune(":/@", rune(ref[n])) {
		return -1
	}
	return n
}

// dropIn is a rendered 99-larder.conf.
type dropIn struct {
	data []byte
	// left are prefixes without an entry of ours, and why.
	left map[string]string
}

// renderDropIn builds the drop-in from the rules in force without it. listed
// are the configured registries. An entry of ours replaces the whole rule of
// its prefix, so it repeats everything that rule said, behind us (I3).
func renderDropIn(rules map[string]rule, listed []string, proxy netip.AddrPort) (dropIn, error) {
	b := dropInBuilder{rules: rules, proxy: proxy, byPlace: map[string]rule{}, left: map[string]string{}}
	for _, prefix := range slices.Sorted(maps.Keys(rules)) {
		b.existing(prefix, listed)
	}
	for _, host := range mirrored(listed) {
		b.enumerated(host)
	}
	for _, host := range b.hosts {
		b.guard(host)
	}
	slices.SortFunc(b.out, func(x, y rule) int { return strings.Compare(x.str("prefix"), y.str("prefix")) })
	data, err := encodeDropIn(b.out)
	if err != nil {
		return dropIn{}, err
	}
	// A drop-in that containers-image refuses fails every pull on the node.
	if _, err := parseRegistries(data); err != nil {
		return dropIn{}, fmt.Errorf("rendered drop-in: %w", err)
	}
	return dropIn{data: data, left: b.left}, nil
}

// mirrored resolves "*" and sorts.
func mirrored(listed []string) []string {
	var out []string
	for _, r := range listed {
		if r == "*" {
			out = append(out, wellKnown...)
		} else {
			out = append(out, strings.TrimSuffix(r, "/"))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

type dropInBuilder struct {
	rules   map[string]rule
	proxy   netip.AddrPort
	byPlace map[string]rule
	hosts   []string // to guard, when all entries are there
	out     []rule
	left    map[string]string
}

// existing gives an entry to a prefix that has a rule already.
func (b *dropInBuilder) existing(prefix string, listed []string) {
	if !covers(listed, prefix) {
		return
	}
	if strings.HasPrefix(prefix, "*.") {
		b.left[prefix] = "a wildcard entry loses the registry's name; list its registries in hosts.registries"
		return
	}
	b.entry(prefix, b.rules[prefix])
	b.hosts = append(b.hosts, prefix)
}

// enumerated gives an entry to a listed registry that has no rule yet.
func (b *dropInBuilder) enumerated(host string) {
	if b.rules[host] != nil {
		return // existing has seen to it
	}
	b.entry(host, derived(b.rules, host))
	b.hosts = append(b.hosts, host)
}

// usualPorts are those of registries. An image's name can have any other one too, but
// there is no rule for all ports of a host.
var usualPorts = []string{"443", "80", "5000", "5001", "5005", "5050", "5443", "8080", "8081", "8082", "8083", "8443"}

// guard keeps names with a port as they were. The prefix "host" also matches
// "host:5000/x", and its rewrite to our mirror would not parse, which fails the pull:
// such names get a rule of their own, without us.
func (b *dropInBuilder) guard(host string) {
	if strings.ContainsAny(host, "/:") || b.left[host] != "" {
		return
	}
	ports := usualPorts
	if slices.Contains(wellKnown, host) {
		ports = ports[:1]
	}
	for _, port := range ports {
		name := host + ":" + port
		listed := slices.ContainsFunc(b.out, func(r rule) bool { return r.str("prefix") == name })
		if b.rules[name] == nil && !listed {
			b.add(derived(b.rules, name))
		}
	}
}

// covers reports whether prefix lies in one of the listed registries. A port makes another one.
func covers(listed []string, prefix string) bool {
	host, _, _ := strings.Cut(prefix, "/")
	return slices.Contains(listed, "*") || slices.Contains(listed, host)
}

// derived is the rule in force for all of prefix, written for prefix itself.
func derived(rules map[string]rule, prefix string) rule {
	parent := matchRule(rules, prefix)
	if parent == nil {
		return rule{"prefix": prefix, "location": prefix}
	}
	n := matchLen(prefix, parent.str("prefix"))
	out := maps.Clone(parent)
	out["prefix"] = prefix
	if out["location"] = prefix; parent.str("location") != "" {
		out["location"] = parent.str("location") + prefix[n:]
	}
	var mirrors []any
	for _, m := range parent.mirrors() {
		m = maps.Clone(m)
		m["location"] = m.str("location") + prefix[n:]
		mirrors = append(mirrors, map[string]any(m))
	}
	delete(out, "mirror")
	if mirrors != nil {
		out["mirror"] = mirrors
	}
	return out
}

// asked is where the agent asks for what is below prefix. It is told of rules for a whole
// registry alone (agent/imported.go). Where another rule holds for a part of one, that is
// another image, or what must not be asked.
func (b *dropInBuilder) asked(prefix string) string {
	host, rest, _ := strings.Cut(prefix, "/")
	if r := b.rules[host]; r != nil {
		host = place(r)
	}
	if rest == "" {
		return host
	}
	return host + "/" + rest
}

// entry puts our mirror before the mirrors of base.
func (b *dropInBuilder) entry(prefix string, base rule) {
	path, ok := encodePrefix(prefix)
	if !ok {
		b.left[prefix] = "its name cannot be part of an image path"
		return
	}
	told := b.rules[prefix] != nil && !strings.Contains(prefix, "/")
	if asked := b.asked(prefix); !told && (base.flag("blocked") || place(base) != asked) {
		b.left[prefix] = "it is blocked or has another location, and Larder would ask " + asked
		return
	}
	mirrors := []any{map[string]any{"location": b.proxy.String() + "/" + path, "insecure": true}}
	for _, m := range base.mirrors() {
		if isSelf(strings.SplitN(m.str("location"), "/", 2)[0], b.proxy) {
			continue
		}
		m = maps.Clone(m)
		if base.flag("mirror-by-digest-only") {
			m["pull-from-mirror"] = "digest-only" // the same, but not for our mirror
		}
		mirrors = append(mirrors, map[string]any(m))
	}
	if base.flag("blocked") && len(mirrors) == 1 {
		b.left[prefix] = "it is blocked and has no mirror; one from us would lift the block"
		return
	}
	r := maps.Clone(base)
	r["prefix"], r["mirror"] = prefix, mirrors
	if r.str("location") == "" {
		r["location"] = prefix
	}
	delete(r, "mirror-by-digest-only")
	b.add(r)
}

// add takes a rule unless it would make the file invalid.
func (b *dropInBuilder) add(r rule) {
	if other, ok := b.byPlace[place(r)]; ok && !agree(r, other) {
		b.left[r.str("prefix")] = fmt.Sprintf("location %q has other insecure or blocked settings for prefix %q, which one file cannot say", place(r), other.str("prefix"))
		return
	}
	b.byPlace[place(r)] = r
	b.out = append(b.out, r)
}

var pathComponent = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$`)

// encodePrefix turns a prefix into the path below which the proxy serves it:
// "reg.example.com:5000/team" is "reg.example.com_5000/team".
func encodePrefix(prefix string) (string, bool) {
	host, rest, _ := strings.Cut(prefix, "/")
	parts := []string{strings.Replace(host, ":", "_", 1)}
	if rest != "" {
		parts = append(parts, strings.Split(rest, "/")...)
	}
	for _, p := range parts {
		if !pathComponent.MatchString(p) {
			return "", false
		}
	}
	return strings.Join(parts, "/"), true
}

func encodeDropIn(rules []rule) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(blockBegin + "\n")
	list := make([]map[string]any, len(rules))
	for i, r := range rules {
		list[i] = r
	}
	if err := toml.NewEncoder(&b).Encode(map[string]any{"registry": list}); err != nil {
		return nil, err
	}
	b.WriteString(blockEnd + "\n")
	return b.Bytes(), nil
}

// importRules converts the rules in force, without ours, into plain data.
func importRules(rules map[string]rule, origin map[string]string, proxy netip.AddrPort, certs func(host string) certFiles) []Imported {
	var out []Imported
	for _, prefix := range slices.Sorted(maps.Keys(rules)) {
		r := rules[prefix]
		host, rest, _ := strings.Cut(prefix, "/")
		im := Imported{Registry: host, Prefix: rest, Runtime: crio, Blocked: r.flag("blocked"), Path: origin[prefix]}
		for _, m := range r.mirrors() {
			if isSelf(strings.SplitN(m.str("location"), "/", 2)[0], proxy) {
				continue
			}
			e := ruleEndpoint(m, certs)
			digestOnly := m.str("pull-from-mirror") == "digest-only" || r.flag("mirror-by-digest-only")
			e.Pull, e.Resolve = true, !digestOnly
			im.Endpoints = append(im.Endpoints, e)
		}
		if !im.Blocked {
			e := ruleEndpoint(r, certs)
			e.Source, e.Pull, e.Resolve = true, true, true
			if place(r) == prefix {
				e.Base = "" // where the registry always was
			}
			im.Endpoints = append(im.Endpoints, e)
		}
		out = append(out, im)
	}
	return out
}

func ruleEndpoint(r rule, certs func(string) certFiles) Endpoint {
	host, rest, _ := strings.Cut(place(r), "/")
	e := Endpoint{Base: "https://" + host + "/v2", SkipVerify: r.flag("insecure"), AllowHTTP: r.flag("insecure")}
	if rest != "" {
		e.Base += "/" + rest
	}
	c := certs(host)
	e.CAFiles, e.ClientPairs = c.ca, c.client
	return e
}

// registriesPaths names the files containers-image reads, given the managed drop-in
// directory: the first of mains that is there, then all drop-ins by file name. One shadows
// the vendor's of its name. Ours is among them, there or not.
func registriesPaths(dropInDir string, list func(dir string) ([]fs.DirEntry, error)) (mains, dropIns []string, err error) {
	mains = []string{filepath.Join(filepath.Dir(dropInDir), "registries.conf")}
	dirs := []string{dropInDir}
	if root, ok := strings.CutSuffix(dropInDir, "/etc/containers/registries.conf.d"); ok {
		vendor := filepath.Join("/", root, "usr/share/containers/registries.conf")
		mains, dirs = append(mains, vendor), append(dirs, vendor+".d")
	}
	byName := map[string]string{}
	for _, dir := range slices.Backward(dirs) {
		entries, err := list(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, err
		}
		for _, e := range entries {
			if !e.IsDir() && strings.HasSuffix(e.Name(), ".conf") {
				byName[e.Name()] = filepath.Join(dir, e.Name())
			}
		}
	}
	byName[dropInName] = filepath.Join(dropInDir, dropInName)
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		dropIns = append(dropIns, byName[name])
	}
	return mains, dropIns, nil
}

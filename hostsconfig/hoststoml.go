package hostsconfig

import (
	"bytes"
	"cmp"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Our part of a file is between two comment lines, so that it can be found and
// taken out of a file whose journal is lost, or that the user edited around it.
const (
	blockBegin = "# BEGIN larder: managed, removed when the agent stops; edit anything outside"
	blockEnd   = "# END larder"
	// beginMark is what earlier and later versions have in common.
	beginMark = "# BEGIN larder"
)

// certFiles are the certificate files of a host directory, which containerd
// stops reading by itself once there is a hosts.toml. Names are relative to the
// directory of the hosts.toml, or absolute when carried over from elsewhere.
type certFiles struct {
	ca     []string
	client []ClientPair
}

func (c certFiles) empty() bool { return len(c.ca) == 0 && len(c.client) == 0 }

// mergeHosts puts the proxy first in a user's hosts.toml (nil or empty: none)
// and keeps everything else behind it (I3). Certificates are written only when
// the user has no hosts.toml, because otherwise containerd ignores them.
func mergeHosts(user []byte, certs certFiles, proxy netip.AddrPort) ([]byte, error) {
	user, err := dropOurs(user, proxy)
	if err != nil {
		return nil, err
	}
	if len(user) == 0 {
		return []byte(hostsBlock(certs, proxy) + "\n"), nil
	}
	if _, err := parseHosts(user); err != nil {
		return nil, err
	}
	out, err := insertFirst(user, hostsBlock(certFiles{}, proxy))
	if err != nil {
		return nil, err
	}
	return out, checkMerged(user, out, proxy)
}

// hostsBlock is our part, without a line end.
func hostsBlock(certs certFiles, proxy netip.AddrPort) string {
	var b strings.Builder
	fmt.Fprintln(&b, blockBegin)
	// At root level they belong to the registry itself. On our own host they
	// would make containerd try HTTPS first.
	if len(certs.ca) > 0 {
		fmt.Fprintf(&b, "ca = [%s]\n", quoteAll(certs.ca))
	}
	if len(certs.client) > 0 {
		pairs := make([]string, len(certs.client))
		for i, p := range certs.client {
			pairs[i] = "[" + quoteAll([]string{p.Cert, cmp.Or(p.Key, p.Cert)}) + "]"
		}
		fmt.Fprintf(&b, "client = [%s]\n", strings.Join(pairs, ", "))
	}
	// No dial_timeout: containerd 2.0 takes it for a TLS setting and would try
	// HTTPS first, 1.x ignores it, and a dead loopback port refuses at once.
	// No push: containerd would push to the cache if it were left open.
	fmt.Fprintf(&b, "[host.%s]\n  capabilities = [\"pull\", \"resolve\"]\n%s", tomlString("http://"+proxy.String()), blockEnd)
	return b.String()
}

func quoteAll(list []string) string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = tomlString(s)
	}
	return strings.Join(out, ", ")
}

// tomlString encodes a TOML basic string.
func tomlString(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < 0x20 || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// insertFirst puts block before the first table of doc, where root keys end.
//
// Hosts without a table header (host."url".x = .., host = {..}, "url" = {..}
// below [host]) need care: 2.x ignores them, and 1.x tries hosts in the order
// of their lines, with inline tables before all others. So those at root move
// behind the block into a [host] table, which both read as before, and inline
// ones become dotted keys.
func insertFirst(doc []byte, block string) ([]byte, error) {
	exprs, err := outline(doc)
	if err != nil {
		return nil, err
	}
	at := len(doc)
	if i := slices.IndexFunc(exprs, isTable); i >= 0 {
		at = exprs[i].start
	}
	var edits []edit
	var moved strings.Builder
	table := []string(nil)
	for _, e := range exprs {
		switch {
		case isTable(e):
			table = e.key
		case table == nil && e.key[0] == "host":
			edits = append(edits, edit{start: e.start, end: e.end})
			moved.WriteString(hostMembers(doc, e))
		case len(table) == 1 && table[0] == "host" && len(e.key) == 1 && len(e.member.children) > 0:
			edits = append(edits, edit{start: e.start, end: e.end, text: dotted(e.member) + lineTail(doc, e)})
		}
	}
	text := block
	if moved.Len() > 0 {
		text += "\n[host]\n" + strings.TrimSuffix(moved.String(), "\n")
	}
	if at < len(doc) || at == 0 || doc[at-1] == '\n' {
		text += "\n"
	} else {
		// The document ends without a line end; so do we, and removeBlock
		// takes the line end we put before the block out again.
		text = "\n" + text
	}
	edits = append(edits, edit{start: at, end: at, text: text})
	slices.SortStableFunc(edits, func(a, b edit) int { return cmp.Or(a.start-b.start, a.end-b.end) })
	return splice(doc, edits), nil
}

func isTable(e expression) bool { return e.kind != unstable.KeyValue }

// hostMembers renders a root key-value below host as members of [host].
func hostMembers(doc []byte, e expression) string {
	var b strings.Builder
	switch {
	case len(e.key) == 1:
		for _, m := range e.member.children {
			b.WriteString(dotted(m) + "\n")
		}
	case len(e.key) == 2 && len(e.member.children) > 0:
		m := e.member
		m.key, m.parts = e.second, 1
		b.WriteString(dotted(m) + lineTail(doc, e))
	default:
		b.WriteString(strings.TrimSuffix(string(doc[e.tail:e.end]), "\n") + "\n")
	}
	return b.String()
}

// dotted writes a host that is an inline table as dotted keys. An empty one
// cannot be written so.
func dotted(m member) string {
	if m.parts > 1 || len(m.children) == 0 {
		return m.raw
	}
	lines := make([]string, len(m.children))
	for i, c := range m.children {
		lines[i] = m.key + "." + c.raw
	}
	return strings.Join(lines, "\n")
}

// lineTail is what follows a value on its line: a comment and the line end.
func lineTail(doc []byte, e expression) string {
	return strings.TrimRight(string(doc[e.valueEnd:e.end]), "\n") + "\n"
}

// checkMerged proves a merge by reading it again: our host first, everything
// else as in the user's document, in the same order.
func checkMerged(user, merged []byte, proxy netip.AddrPort) error {
	var before, after map[string]any
	if err := toml.Unmarshal(user, &before); err != nil {
		return err
	}
	if err := toml.Unmarshal(merged, &after); err != nil {
		return fmt.Errorf("merged file does not parse: %w", err)
	}
	self := "http://" + proxy.String()
	hosts, _ := after["host"].(map[string]any)
	delete(hosts, self)
	if before["host"] == nil && len(hosts) == 0 {
		delete(after, "host")
	}
	if !reflect.DeepEqual(before, after) {
		return fmt.Errorf("cannot add a host without changing the others")
	}
	was, err := headerOrder(user)
	if err != nil {
		return err
	}
	is, err := headerOrder(merged)
	if err != nil {
		return err
	}
	if !slices.Equal(append([]string{self}, was...), is) {
		return fmt.Errorf("cannot add a host before the others")
	}
	return nil
}

// headerOrder lists the hosts of a hosts.toml as containerd 2.x sees them:
// those with a table header, in file order.
func headerOrder(doc []byte) ([]string, error) {
	exprs, err := outline(doc)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range exprs {
		if e.kind == unstable.Table && len(e.key) > 1 && e.key[0] == "host" && (len(out) == 0 || out[len(out)-1] != e.key[1]) {
			out = append(out, e.key[1])
		}
	}
	return out, nil
}

// hasBlock reports whether doc holds a part of ours, of any version.
func hasBlock(doc []byte) bool { return bytes.Contains(doc, []byte(beginMark)) }

// removeBlock takes our parts out. It undoes insertFirst to the byte unless
// host keys had to move.
func removeBlock(doc []byte) []byte {
	for {
		begin := lineStartOf(doc, beginMark, 0)
		if begin < 0 {
			return doc
		}
		end := lineStartOf(doc, blockEnd, begin)
		if end < 0 {
			// Someone cut off our last line. Ours are the two lines of the host.
			end = ourTableEnd(doc, begin)
		} else {
			end = lineEnd(doc, end)
		}
		if end == len(doc) && begin > 0 && !bytes.HasSuffix(doc, []byte("\n")) {
			begin--
		}
		doc = slices.Concat(doc[:begin], doc[end:])
	}
}

func ourTableEnd(doc []byte, begin int) int {
	at := lineEnd(doc, begin)
	for at < len(doc) {
		line := bytes.TrimSpace(doc[at:lineEnd(doc, at)])
		if !bytes.HasPrefix(line, []byte("[host.\"http://")) && !bytes.HasPrefix(line, []byte("capabilities = [\"pull\", \"resolve\"]")) {
			break
		}
		at = lineEnd(doc, at)
	}
	return at
}

// lineStartOf finds the first line at or after from that begins with prefix.
func lineStartOf(doc []byte, prefix string, from int) int {
	for at := from; at < len(doc); at = lineEnd(doc, at) {
		if bytes.HasPrefix(doc[at:], []byte(prefix)) {
			return at
		}
	}
	return -1
}

// dropOurs removes what earlier runs or hands left of us: marked parts, and
// tables for the very address the proxy listens on, which would be us twice.
func dropOurs(doc []byte, proxy netip.AddrPort) ([]byte, error) {
	doc = removeBlock(doc)
	exprs, err := outline(doc)
	if err != nil {
		return nil, err
	}
	var edits []edit
	inside := false
	for _, e := range exprs {
		if e.kind != unstable.KeyValue {
			inside = e.kind == unstable.Table && len(e.key) > 1 && e.key[0] == "host" && isSelf(e.key[1], proxy)
		}
		if inside {
			edits = append(edits, edit{start: e.start, end: e.end})
		}
	}
	return splice(doc, edits), nil
}

// isSelf reports whether a host URL means our own proxy.
func isSelf(host string, proxy netip.AddrPort) bool {
	if !strings.Contains(host, "://") {
		host = "http://" + host
	}
	u, err := url.Parse(host)
	if err != nil || u.Port() != strconv.Itoa(int(proxy.Port())) {
		return false
	}
	return sameLoopback(u.Hostname(), proxy.Addr())
}

// redactURL drops user, query and fragment of a URL that a user wrote.
func redactURL(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return "(unparsable URL)"
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return u.String()
}

func sameLoopback(host string, addr netip.Addr) bool {
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip == addr || ip.IsLoopback() && addr.IsLoopback()
	}
	return host == "localhost" && addr.IsLoopback()
}

// hostFile is a hosts.toml as containerd reads it.
type hostFile struct {
	hostTable
	Server string               `toml:"server"`
	Hosts  map[string]hostTable `toml:"host"`
	// order is the file order of Hosts that have a header; the others, which
	// only containerd 1.x uses, are not in it.
	order []string
}

type hostTable struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
	Rewrite      any            `toml:"rewrite"` // k3s' and RKE2's containerd alone
}

// parseHosts reads a hosts.toml and fails on everything that makes containerd
// ignore the file.
func parseHosts(doc []byte) (*hostFile, error) {
	var f hostFile
	if err := toml.Unmarshal(doc, &f); err != nil {
		return nil, err
	}
	var err error
	if f.order, err = headerOrder(doc); err != nil {
		return nil, err
	}
	// Only what containerd reads can make it stumble: it decodes inline host
	// tables, but never looks inside.
	for _, name := range f.order {
		if name == "" {
			// containerd overlooks it in first place only, so ours before it
			// would change what it reads.
			return nil, fmt.Errorf("a host without a name")
		}
		if _, err := f.Hosts[name].endpoint(name, "/"); err != nil {
			return nil, fmt.Errorf("host %q: %w", redactURL(name), err)
		}
	}
	if _, err := f.endpoint(f.Server, "/"); err != nil {
		return nil, err
	}
	return &f, nil
}

// endpoint converts a table the way containerd does. base is the directory
// that relative certificate paths start from.
func (t hostTable) endpoint(server, base string) (Endpoint, error) {
	e := Endpoint{}
	if err := t.setBase(&e, server); err != nil {
		return e, err
	}
	if err := t.setCapabilities(&e); err != nil {
		return e, err
	}
	var err error
	if e.CAFiles, err = caPaths(t.CA, base); err != nil {
		return e, err
	}
	if e.ClientPairs, err = clientPairs(t.Client, base); err != nil {
		return e, err
	}
	if e.Header, err = headers(t.Header); err != nil {
		return e, err
	}
	e.SkipVerify = t.SkipVerify != nil && *t.SkipVerify
	t.setRewrite(&e)
	if t.DialTimeout != "" {
		if _, err := time.ParseDuration(t.DialTimeout); err != nil {
			return e, fmt.Errorf("dial_timeout: %w", err)
		}
	}
	return e, nil
}

func (t hostTable) setBase(e *Endpoint, server string) error {
	if server == "" {
		return nil
	}
	if !strings.HasPrefix(server, "http") {
		server = "https://" + server
	}
	u, err := url.Parse(server)
	if err != nil {
		return fmt.Errorf("unparsable URL")
	}
	if u.Path != "" {
		u.Path = path.Clean(u.Path)
	}
	if !strings.HasSuffix(u.Path, "/v2") && !t.OverridePath {
		u.Path += "/v2"
	}
	u.Path, u.RawPath, u.RawQuery, u.Fragment = strings.TrimSuffix(u.Path, "/"), "", "", ""
	e.Base = u.String()
	return nil
}

// everyName are the patterns of a rewrite that put a path before every name.
var everyName = []string{"^(.*)$", "^(.*)", "(.*)$", "(.*)", "^(.+)$", "^(.+)", "(.+)$", "(.+)"}

// rewritePrefix is a replacement that does so.
var rewritePrefix = regexp.MustCompile(`^/?([a-z0-9][a-z0-9._/-]*)/\$(?:1|\{1\})$`)

// setRewrite converts the names that the containerd of k3s and RKE2 asks a host for
// (rewrite in registries.yaml). Asked under the names that images have, Harbor
// answers with its own project "library" where its copy of Docker Hub is meant.
func (t hostTable) setRewrite(e *Endpoint) {
	rules, isTable := t.Rewrite.(map[string]any)
	if t.Rewrite == nil || isTable && len(rules) == 0 {
		return
	}
	for pattern, replacement := range rules {
		text, _ := replacement.(string)
		m := rewritePrefix.FindStringSubmatch(text)
		if len(rules) == 1 && m != nil && e.Base != "" && slices.Contains(everyName, pattern) {
			e.Base += "/" + m[1]
			return
		}
	}
	e.Renames = true
}

func (t hostTable) setCapabilities(e *Endpoint) error {
	if len(t.Capabilities) == 0 {
		e.Pull, e.Resolve = true, true
	}
	for _, c := range t.Capabilities {
		switch strings.ToLower(c) {
		case "pull":
			e.Pull = true
		case "resolve":
			e.Resolve = true
		case "push", "referrers":
		default:
			return fmt.Errorf("unknown capability %q", c)
		}
	}
	return nil
}

func caPaths(v any, base string) ([]string, error) {
	switch ca := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{absolute(ca, base)}, nil
	case []any:
		return absoluteAll(ca, base)
	}
	return nil, fmt.Errorf("ca: want a string or a list of strings")
}

func clientPairs(v any, base string) ([]ClientPair, error) {
	switch client := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []ClientPair{{Cert: absolute(client, base)}}, nil
	case []any:
		var out []ClientPair
		for _, item := range client {
			pair, err := clientPair(item, base)
			if err != nil {
				return nil, err
			}
			out = append(out, pair)
		}
		return out, nil
	}
	return nil, fmt.Errorf("client: want a string or a list")
}

func clientPair(v any, base string) (ClientPair, error) {
	switch p := v.(type) {
	case string:
		return ClientPair{Cert: absolute(p, base)}, nil
	case []any:
		files, err := absoluteAll(p, base)
		if err == nil && len(files) == 2 {
			return ClientPair{Cert: files[0], Key: files[1]}, nil
		}
	}
	return ClientPair{}, fmt.Errorf("client: want pairs of strings")
}

func headers(table map[string]any) (http.Header, error) {
	if table == nil {
		return nil, nil
	}
	out := http.Header{}
	for name, v := range table {
		switch v := v.(type) {
		case string:
			out.Add(name, v)
		case []any:
			for _, item := range v {
				s, ok := item.(string)
				if !ok {
					return nil, fmt.Errorf("header %q: want strings", name)
				}
				out.Add(name, s)
			}
		default:
			return nil, fmt.Errorf("header %q: want a string or a list of strings", name)
		}
	}
	return out, nil
}

func absolute(p, base string) string {
	if filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(base, p)
}

func absoluteAll(list []any, base string) ([]string, error) {
	out := make([]string, len(list))
	for i, v := range list {
		s, ok := v.(string)
		if !ok {
			return nil, fmt.Errorf("want a list of strings")
		}
		out[i] = absolute(s, base)
	}
	return out, nil
}

// absolutePaths rewrites relative certificate paths of a hosts.toml that is
// about to be used from another directory.
func absolutePaths(doc []byte, base string) ([]byte, error) {
	exprs, err := outline(doc)
	if err != nil {
		return nil, err
	}
	var edits []edit
	for _, e := range exprs {
		for _, p := range e.paths {
			if !filepath.IsAbs(p.value) {
				edits = append(edits, edit{start: p.start, end: p.end, text: tomlString(filepath.Join(base, p.value))})
			}
		}
	}
	return splice(doc, edits), nil
}

// endpoints lists what containerd 2.x would try for this file, in order,
// without ourselves.
func (f *hostFile) endpoints(base string, proxy netip.AddrPort) ([]Endpoint, error) {
	var out []Endpoint
	for _, name := range f.order {
		if isSelf(name, proxy) {
			continue
		}
		e, err := f.Hosts[name].endpoint(name, base)
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	source, err := f.endpoint(f.Server, base)
	if err != nil {
		return nil, err
	}
	if isSelf(f.Server, proxy) {
		return out, nil
	}
	source.Source = true
	if f.Server == "" {
		// containerd ignores root capabilities without a server.
		source.Pull, source.Resolve = true, true
	}
	return append(out, source), nil
}

// hostOfDir returns the registry that a host directory is for.
func hostOfDir(name string) string {
	if rest, ok := strings.CutSuffix(name, "_"); ok {
		if i := strings.LastIndexByte(rest, '_'); i > 0 {
			if _, err := strconv.ParseUint(rest[i+1:], 10, 16); err == nil {
				return net.JoinHostPort(strings.Trim(rest[:i], "[]"), rest[i+1:])
			}
		}
	}
	return name
}

// dirSpellings lists the directory names containerd looks up for a registry,
// first to last, without _default.
func dirSpellings(host string) []string {
	if i := strings.LastIndexByte(host, ':'); i > 0 {
		return []string{host[:i] + "_" + host[i+1:] + "_", host}
	}
	return []string{host}
}

package hostsconfig

import (
	"bytes"
	"cmp"
	"fmt"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

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
		if isTable(e) {
			inside = e.kind == unstable.Table && len(e.key) > 1 && e.key[0] == "host" && isSelf(e.key[1], proxy)
		}
		if inside {
			edits = append(edits, edit{start: e.start, end: e.end})
		}
	}
	return splice(doc, edits), nil
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

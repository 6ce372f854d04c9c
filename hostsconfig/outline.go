package hostsconfig

import (
	"bytes"
	"fmt"

	"github.com/pelletier/go-toml/v2/unstable"
)

// expression is one top-level expression of a TOML document with the bytes it
// takes up: whole lines, the line end and a comment behind it included.
type expression struct {
	kind       unstable.Kind // KeyValue, Table or ArrayTable
	key        []string
	start, end int
	// tail is where the second part of the key begins, for KeyValue with a
	// dotted key; valueEnd is where the value ends.
	tail, valueEnd int
	second         string // the second part of the key, as written
	// member is the expression itself, for KeyValue.
	member member
	// paths are the string values below keys named ca or client.
	paths []span
}

// member is a key-value, at top level or in an inline table, as it is written.
type member struct {
	raw, key string
	parts    int      // of the key
	children []member // of an inline table
}

// span is a string value in a document.
type span struct {
	start, end int
	value      string
}

// outline lists the top-level expressions of a document in order.
func outline(doc []byte) ([]expression, error) {
	// unstable.Parser hands out offsets into what it was given, so comments
	// and layout stay the user's; encoding anew would lose both.
	var p unstable.Parser
	p.Reset(doc)
	var out []expression
	for p.NextExpression() {
		e, err := readExpression(&p, doc)
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, p.Error()
}

func readExpression(p *unstable.Parser, doc []byte) (expression, error) {
	n := p.Expression()
	e := expression{kind: n.Kind}
	first, last := -1, 0
	for it := n.Key(); it.Next(); {
		raw := it.Node().Raw
		if first < 0 {
			first = int(raw.Offset)
		} else if e.tail == 0 {
			e.tail = int(raw.Offset)
			e.second = string(p.Raw(raw))
		}
		last = int(raw.Offset + raw.Length)
		e.key = append(e.key, string(it.Node().Data))
	}
	if first < 0 {
		return e, fmt.Errorf("expression without a key")
	}
	if n.Kind == unstable.KeyValue {
		last = int(n.Raw.Offset + n.Raw.Length)
		e.valueEnd = last
		e.member = readMember(p, n)
		e.paths = certPaths(n, nil)
	}
	e.start = bytes.LastIndexByte(doc[:first], '\n') + 1
	e.end = lineEnd(doc, last)
	return e, nil
}

func readMember(p *unstable.Parser, n *unstable.Node) member {
	m := member{raw: string(p.Raw(n.Raw))}
	first, last := -1, 0
	for it := n.Key(); it.Next(); {
		raw := it.Node().Raw
		if first < 0 {
			first = int(raw.Offset)
		}
		last = int(raw.Offset + raw.Length)
		m.parts++
	}
	m.key = string(p.Data()[first:last])
	if n.Value().Kind == unstable.InlineTable {
		for it := n.Value().Children(); it.Next(); {
			m.children = append(m.children, readMember(p, it.Node()))
		}
	}
	return m
}

// lineEnd returns the offset behind the line that holds offset at.
func lineEnd(doc []byte, at int) int {
	if i := bytes.IndexByte(doc[at:], '\n'); i >= 0 {
		return at + i + 1
	}
	return len(doc)
}

// certPaths appends the strings below keys named ca or client, in n and in
// the inline tables of n.
func certPaths(n *unstable.Node, out []span) []span {
	var name string
	for it := n.Key(); it.Next(); {
		name = string(it.Node().Data)
	}
	if name == "ca" || name == "client" {
		return stringSpans(n.Value(), out)
	}
	if n.Value().Kind == unstable.InlineTable {
		for it := n.Value().Children(); it.Next(); {
			out = certPaths(it.Node(), out)
		}
	}
	return out
}

func stringSpans(n *unstable.Node, out []span) []span {
	switch n.Kind {
	case unstable.String:
		start := int(n.Raw.Offset)
		out = append(out, span{start: start, end: start + int(n.Raw.Length), value: string(n.Data)})
	case unstable.Array:
		for it := n.Children(); it.Next(); {
			out = stringSpans(it.Node(), out)
		}
	}
	return out
}

// splice replaces doc[start:end] by text for each edit; edits are in order
// and do not overlap.
func splice(doc []byte, edits []edit) []byte {
	var out []byte
	at := 0
	for _, e := range edits {
		out = append(out, doc[at:e.start]...)
		out = append(out, e.text...)
		at = e.end
	}
	return append(out, doc[at:]...)
}

type edit struct {
	start, end int
	text       string
}

package agent

import (
	"encoding"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/larder-cache/larder/agent/upstream"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// registryTable is the name of the tables that hold upstream.Registry.
const registryTable = "registry"

// toml applies the file name with content body. Values are taken one by one
// from a generic decoding, because decoding into Config would stop at the first
// value of a wrong type.
func (l *loader) toml(name string, body []byte) {
	var tree map[string]any
	if err := toml.Unmarshal(body, &tree); err != nil {
		l.add(syntaxProblem(name, err))
		return
	}
	f := tomlFile{loader: l, name: name, lines: lineIndex(body)}
	for _, table := range slices.Sorted(maps.Keys(tree)) {
		if table == registryTable {
			f.registries(tree[table])
			continue
		}
		f.table(table, tree[table])
	}
}

func syntaxProblem(name string, err error) *Problem {
	if at, ok := errors.AsType[*toml.DecodeError](err); ok {
		row, column := at.Position()
		return &Problem{From: fmt.Sprintf("%s:%d:%d", name, row, column), Reason: "not valid TOML: " + strings.TrimPrefix(at.Error(), "toml: ")}
	}
	return &Problem{From: name, Reason: "not valid TOML: " + strings.TrimPrefix(err.Error(), "toml: ")}
}

// tomlFile is one file while it is applied.
type tomlFile struct {
	*loader
	name  string
	lines map[string]int // "proxy.listen", "registry[0].host" -> line
}

// at is "file:line" of a key; a key inside an inline table has the line of the
// table.
func (f *tomlFile) at(key string) string {
	for k := key; k != ""; {
		for _, written := range []string{k, k + "[0]"} { // [[k]]
			if line, ok := f.lines[written]; ok {
				return fmt.Sprintf("%s:%d", f.name, line)
			}
		}
		k = k[:max(0, strings.LastIndex(k, "."))]
	}
	return f.name
}

func (f *tomlFile) table(table string, v any) {
	if !slices.ContainsFunc(f.keys, func(k boundKey) bool { return strings.HasPrefix(k.Name, table+".") }) {
		f.unknown(table, table, f.names())
		return
	}
	inner, ok := v.(map[string]any)
	if !ok {
		f.add(&Problem{Key: table, From: f.at(table), Reason: fmt.Sprintf("want one table, headed [%s]", table)})
		return
	}
	for _, leaf := range slices.Sorted(maps.Keys(inner)) {
		name := table + "." + leaf
		i := slices.IndexFunc(f.keys, func(k boundKey) bool { return k.Name == name })
		if i < 0 {
			f.unknown(name, name, f.names())
			continue
		}
		f.set(f.keys[i], f.at(name), fmt.Sprint(inner[leaf]), func() error { return f.keys[i].setTOML(inner[leaf]) })
	}
}

// names are what an unknown key may have meant: the keys and their tables.
func (f *tomlFile) names() []string {
	names := []string{registryTable}
	for _, k := range f.keys {
		table, _, _ := strings.Cut(k.Name, ".")
		names = append(names, k.Name, table)
	}
	return names
}

// unknown says which of the known names what is written may be a slip of.
func (f *tomlFile) unknown(key, written string, known []string) {
	reason := "unknown key"
	if near, _ := nearest(written, known); near != "" {
		reason += fmt.Sprintf("; did you mean %s?", near)
	}
	f.add(&Problem{Key: key, From: f.at(key), Reason: reason})
}

func (f *tomlFile) registries(v any) {
	tables, ok := v.([]any)
	if !ok {
		f.add(&Problem{Key: registryTable, From: f.at(registryTable), Reason: "write each registry as a table of its own, headed [[registry]]"})
		return
	}
	for i, table := range tables {
		inner, ok := table.(map[string]any)
		if !ok {
			f.add(&Problem{Key: registryTable, From: f.at(registryTable), Reason: "want tables headed [[registry]]"})
			continue
		}
		f.registry(fmt.Sprintf("%s[%d]", registryTable, i), inner)
	}
}

// registry decodes one table key by key into an upstream.Registry.
func (f *tomlFile) registry(prefix string, inner map[string]any) {
	var r upstream.Registry
	fields := registryFields()
	known := slices.Sorted(maps.Keys(fields))
	for _, leaf := range slices.Sorted(maps.Keys(inner)) {
		name := prefix + "." + leaf
		f.from[name] = f.at(name)
		field, ok := fields[leaf]
		if !ok {
			f.unknown(name, leaf, known)
			continue
		}
		if err := decodeOne(&r, field, leaf, inner[leaf]); err != nil {
			f.add(&Problem{Key: name, Value: fmt.Sprint(inner[leaf]), From: f.at(name), Reason: err.Error()})
		}
	}
	f.from[prefix] = f.at(prefix)
	f.config.Registries = append(f.config.Registries, r)
}

// decodeOne lets go-toml put one value into the field of r with that tag.
func decodeOne(r *upstream.Registry, field reflect.Type, leaf string, v any) error {
	if want := wantedShape(field, v); want != "" {
		return errors.New("want " + want)
	}
	body, err := toml.Marshal(map[string]any{leaf: v})
	if err != nil {
		return fmt.Errorf("cannot be read: %w", err)
	}
	if err := toml.Unmarshal(body, r); err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "toml: "))
	}
	return nil
}

// wantedShape says what a field of a [[registry]] table takes, if v is nothing
// like it: go-toml's own message would name Go types.
func wantedShape(field reflect.Type, v any) string {
	if field.Kind() == reflect.Pointer {
		field = field.Elem()
	}
	_, isString := v.(string)
	_, isNumber := v.(int64)
	_, isBool := v.(bool)
	_, isList := v.([]any)
	_, isText := reflect.New(field).Interface().(encoding.TextUnmarshaler)
	switch {
	case isText:
		if !isString && !isNumber {
			return `a quoted value with its unit, as in "10s" or "10MiB"`
		}
	case field.Kind() == reflect.Slice && !isList:
		return fmt.Sprintf(`a list, as in ["%v"]`, v)
	case field.Kind() == reflect.String && !isString:
		return "a string"
	case field.Kind() == reflect.Bool && !isBool:
		return "true or false, without quotes"
	case field.Kind() == reflect.Int && !isNumber:
		return "a whole number, without quotes"
	}
	return ""
}

// registryFields are the keys of a [[registry]] table and their types.
func registryFields() map[string]reflect.Type {
	out := map[string]reflect.Type{}
	for f := range reflect.TypeFor[upstream.Registry]().Fields() {
		if tag, _, _ := strings.Cut(f.Tag.Get("toml"), ","); tag != "" && tag != "-" {
			out[tag] = f.Type
		}
	}
	return out
}

// lineIndex finds the line of every key and table header. It knows nothing of
// values; a document that does not parse gives what was found so far.
func lineIndex(body []byte) map[string]int {
	lines := map[string]int{}
	var p unstable.Parser
	p.Reset(body)
	table, arrays := "", map[string]int{}
	for p.NextExpression() {
		node := p.Expression()
		if !slices.Contains([]unstable.Kind{unstable.Table, unstable.ArrayTable, unstable.KeyValue}, node.Kind) {
			continue
		}
		path, line := keyPath(&p, node)
		switch node.Kind {
		case unstable.Table:
			table = path
		case unstable.ArrayTable:
			table = fmt.Sprintf("%s[%d]", path, arrays[path])
			arrays[path]++
			path = table
		default:
			path = strings.TrimPrefix(table+"."+path, ".")
		}
		if _, ok := lines[path]; !ok {
			lines[path] = line
		}
	}
	return lines
}

// keyPath is the dotted key of an expression and its line.
func keyPath(p *unstable.Parser, node *unstable.Node) (string, int) {
	var parts []string
	line := 0
	for it := node.Key(); it.Next(); {
		if line == 0 {
			line = p.Shape(it.Node().Raw).Start.Line
		}
		parts = append(parts, string(it.Node().Data))
	}
	return strings.Join(parts, "."), line
}

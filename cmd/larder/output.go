package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"time"
	"unicode"

	"github.com/larder-cache/larder/agent"
	"golang.org/x/term"
)

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// plain makes the strings in v, a pointer, such that a terminal shows them and does not obey
// them: names and errors are the words of registries, archives and peers in the end.
func plain(v any) { plainValue(reflect.ValueOf(v)) }

func plainValue(v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		if v.CanSet() {
			v.SetString(plainText(v.String()))
		}
	case reflect.Pointer:
		if !v.IsNil() {
			plainValue(v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			plainValue(v.Index(i))
		}
	case reflect.Struct:
		for _, field := range v.Fields() {
			plainValue(field)
		}
	}
}

func plainText(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// terminal returns w as a terminal and its width; ok is false for pipes and files.
func terminal(w io.Writer) (width int, ok bool) {
	f, isFile := w.(*os.File)
	if !isFile || !term.IsTerminal(int(f.Fd())) {
		return 0, false
	}
	width, _, err := term.GetSize(int(f.Fd()))
	return max(width, 40), err == nil
}

// style colours words on a terminal, unless NO_COLOR is set (no-color.org), and breaks
// long lines there.
type style struct {
	on    bool
	width int // 0: no terminal
}

func newStyle(w io.Writer) style {
	width, ok := terminal(w)
	return style{on: ok && os.Getenv("NO_COLOR") == "", width: width}
}

// wrap breaks text that begins in a column, between words, and begins each further line
// there.
func (s style) wrap(text string, column int) string {
	var out strings.Builder
	at := column
	for i, word := range strings.Fields(text) {
		switch {
		case i == 0:
		case s.width > 0 && at+1+visible(word) > s.width:
			out.WriteString("\n" + strings.Repeat(" ", column))
			at = column
		default:
			out.WriteString(" ")
			at++
		}
		out.WriteString(word)
		at += visible(word)
	}
	return out.String()
}

func (s style) paint(code, text string) string {
	if !s.on || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s style) good(t string) string { return s.paint("32", t) }
func (s style) warn(t string) string { return s.paint("33", t) }
func (s style) bad(t string) string  { return s.paint("31", t) }
func (s style) bold(t string) string { return s.paint("1", t) }
func (s style) dim(t string) string  { return s.paint("2", t) }

// table prints rows in aligned columns, two spaces apart. Columns whose header
// starts with ">" are right-aligned.
type table struct {
	header []string
	rows   [][]string
	notes  map[int]string // lines below rows, by their number
	indent string
}

func newTable(header ...string) *table { return &table{header: header} }

func (t *table) row(cells ...string) { t.rows = append(t.rows, cells) }

// note puts a line below the last row.
func (t *table) note(text string) {
	if t.notes == nil {
		t.notes = map[int]string{}
	}
	t.notes[len(t.rows)-1] = text
}

func (t *table) print(w io.Writer) {
	titles := make([]string, len(t.header))
	for i, h := range t.header {
		titles[i] = strings.TrimPrefix(h, ">")
	}
	t.write(w, append([][]string{titles}, t.rows...))
}

// printBody prints the rows without the header.
func (t *table) printBody(w io.Writer) { t.write(w, t.rows) }

func (t *table) write(w io.Writer, rows [][]string) {
	widths := make([]int, len(t.header))
	for _, r := range rows {
		for i, c := range r {
			widths[i] = max(widths[i], visible(c))
		}
	}
	for n, r := range rows {
		var line strings.Builder
		for i, c := range r {
			pad := strings.Repeat(" ", widths[i]-visible(c))
			if strings.HasPrefix(t.header[i], ">") {
				line.WriteString(pad + c + "  ")
			} else {
				line.WriteString(c + pad + "  ")
			}
		}
		fmt.Fprintln(w, t.indent+strings.TrimRight(line.String(), " "))
		if note, ok := t.notes[n-(len(rows)-len(t.rows))]; ok { // a header is no row
			fmt.Fprintln(w, t.indent+note)
		}
	}
}

// visible is the width of s without the colour codes of style.
func visible(s string) int {
	n, escape := 0, false
	for _, r := range s {
		switch {
		case r == '\x1b':
			escape = true
		case escape:
			escape = r != 'm'
		default:
			n++
		}
	}
	return n
}

// bar draws done of total in a field of the given width.
func bar(done, total int64, width int) string {
	filled := 0
	if total > 0 {
		filled = int(min(done, total) * int64(width) / total)
	}
	return "[" + strings.Repeat("=", filled) + strings.Repeat(" ", width-filled) + "]"
}

// size is n bytes for people, -1 being unknown.
func size(n int64) string {
	if n < 0 {
		return "?"
	}
	return agent.SizeText(n)
}

// took is a duration to three digits or so.
func took(d time.Duration) string {
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}

// rate is bytes over a duration, in decimal megabytes as networks are sold.
func rate(n int64, d time.Duration) string {
	if d <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f MB/s", float64(n)/1e6/d.Seconds())
}

// ago is how long before now t was, in its largest unit.
func ago(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	d := now.Sub(t)
	switch {
	case d < time.Second:
		return "now"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", int(d.Hours()))
	}
	return fmt.Sprintf("%dd ago", int(d.Hours()/24))
}

// short is a digest for people: algorithm and twelve digits.
func short(digest string) string {
	algorithm, hex, ok := strings.Cut(digest, ":")
	if !ok {
		return digest
	}
	return algorithm + ":" + hex[:min(12, len(hex))]
}

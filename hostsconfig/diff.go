package hostsconfig

import (
	"bytes"
	"fmt"
	"strings"
)

// diffContext is how many unchanged lines surround a change, as in diff -u.
const diffContext = 3

// unifiedDiff returns the difference of two small texts; "" if there is none.
func unifiedDiff(path string, from, to []byte, created, deleted bool) string {
	a, b := splitLines(from), splitLines(to)
	ops := diffLines(a, b)
	var out strings.Builder
	for _, h := range hunks(ops) {
		if out.Len() == 0 {
			fmt.Fprintf(&out, "--- %s\n+++ %s\n", orNull(path, created), orNull(path, deleted))
		}
		writeHunk(&out, ops[h[0]:h[1]])
	}
	return out.String()
}

func orNull(path string, null bool) string {
	if null {
		return "/dev/null"
	}
	return path
}

func splitLines(text []byte) []string {
	var out []string
	for line := range bytes.Lines(text) {
		out = append(out, string(line))
	}
	return out
}

// lineOp is one line of a diff: kept ' ', deleted '-' or added '+', with the
// line numbers from 0 that it has, or would have, on both sides.
type lineOp struct {
	op   byte
	text string
	a, b int
}

// diffLines finds a longest common subsequence. Quadratic, which is fine for
// configuration files; beyond that everything counts as replaced.
func diffLines(a, b []string) []lineOp {
	const limit = 4 << 20
	if len(a)*len(b) > limit {
		return replaceAll(a, b)
	}
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var ops []lineOp
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			ops = append(ops, lineOp{' ', a[i], i, j})
			i, j = i+1, j+1
		case i < len(a) && (j == len(b) || common[i+1][j] >= common[i][j+1]):
			ops = append(ops, lineOp{'-', a[i], i, j})
			i++
		default:
			ops = append(ops, lineOp{'+', b[j], i, j})
			j++
		}
	}
	return ops
}

func replaceAll(a, b []string) []lineOp {
	var ops []lineOp
	for i, s := range a {
		ops = append(ops, lineOp{'-', s, i, 0})
	}
	for j, s := range b {
		ops = append(ops, lineOp{'+', s, len(a), j})
	}
	return ops
}

// hunks returns the ranges of ops to print.
func hunks(ops []lineOp) [][2]int {
	var out [][2]int
	for i, o := range ops {
		if o.op == ' ' {
			continue
		}
		start, end := max(0, i-diffContext), min(len(ops), i+diffContext+1)
		if n := len(out); n > 0 && start <= out[n-1][1] {
			out[n-1][1] = end
		} else {
			out = append(out, [2]int{start, end})
		}
	}
	return out
}

func writeHunk(out *strings.Builder, ops []lineOp) {
	var inA, inB int
	for _, o := range ops {
		if o.op != '+' {
			inA++
		}
		if o.op != '-' {
			inB++
		}
	}
	fmt.Fprintf(out, "@@ -%s +%s @@\n", hunkRange(ops[0].a, inA), hunkRange(ops[0].b, inB))
	for _, o := range ops {
		out.WriteByte(o.op)
		out.WriteString(o.text)
		if !strings.HasSuffix(o.text, "\n") {
			out.WriteString("\n\\ No newline at end of file\n")
		}
	}
}

func hunkRange(start, count int) string {
	if count == 0 {
		return fmt.Sprintf("%d,0", start)
	}
	if count == 1 {
		return fmt.Sprint(start + 1)
	}
	return fmt.Sprintf("%d,%d", start+1, count)
}

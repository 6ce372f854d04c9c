package main

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

// table is the result.
type table struct{ rows []row }

// row is one comparison.
type row struct {
	what, larder, against, ratio, goal, met string
}

// goal is a bound on a value; the zero goal is none.
type goal struct {
	atLeast, atMost float64
}

func (g goal) describe() (string, bool) {
	switch {
	case g.atLeast > 0:
		return fmt.Sprintf(">= %.2f", g.atLeast), true
	case g.atMost > 0:
		return fmt.Sprintf("<= %.2f", g.atMost), true
	}
	return "", false
}

func (g goal) met(v float64) bool {
	return (g.atLeast == 0 || v >= g.atLeast) && (g.atMost == 0 || v <= g.atMost)
}

// compare adds the ratio of larder's value to another's.
func (t *table) compare(what string, larder float64, other string, value float64, g goal, show func(float64) string) {
	ratio := larder / value
	r := row{
		what: what, larder: show(larder), against: other + " " + show(value),
		ratio: fmt.Sprintf("%.2f", ratio),
	}
	r.judge(g, ratio)
	t.rows = append(t.rows, r)
}

// single adds a value that stands alone.
func (t *table) single(what string, value float64, g goal, show func(float64) string) {
	r := row{what: what, larder: show(value)}
	r.judge(g, value)
	if r.goal != "" {
		r.goal = strings.Fields(r.goal)[0] + " " + show(cmp.Or(g.atLeast, g.atMost))
	}
	t.rows = append(t.rows, r)
}

func (r *row) judge(g goal, v float64) {
	text, ok := g.describe()
	if !ok {
		return
	}
	r.goal, r.met = text, "NOT MET"
	if g.met(v) {
		r.met = "met"
	}
}

func (t *table) print(out io.Writer) error {
	fmt.Fprintf(out, "%s\n\n", machine())
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "measured\tlarder\tagainst\tratio\tgoal\t")
	for _, r := range t.rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", r.what, r.larder, r.against, r.ratio, r.goal, r.met)
	}
	return w.Flush()
}

// machine says what the numbers were measured on, and how busy it was: beyond
// its number of processors, the load average is other people's work.
func machine() string {
	var u unix.Utsname
	kernel := "unknown kernel"
	if unix.Uname(&u) == nil {
		kernel = "Linux " + unix.ByteSliceToString(u.Release[:])
	}
	load := "unknown"
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		load, _, _ = strings.Cut(string(b), " ")
	}
	return fmt.Sprintf("%d x %s, %s, %s, load average %s", runtime.NumCPU(), cpuModel(), kernel, runtime.Version(), load)
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), ":")
		if strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func median(v []float64) float64 { return quantile(v, 0.5) }

// quantile of values in any order.
func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(v))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func showRate(v float64) string     { return fmt.Sprintf("%.2f GB/s", v/1e9) }
func showRequests(v float64) string { return fmt.Sprintf("%.0f/s", v) }
func showSeconds(v float64) string  { return fmt.Sprintf("%.2f s", v) }
func showMillis(v float64) string   { return fmt.Sprintf("%.0f ms", v*1e3) }
func showMicros(v float64) string   { return fmt.Sprintf("%.0f us", v*1e6) }
func showMiB(v float64) string      { return fmt.Sprintf("%.0f MiB", v/(1<<20)) }

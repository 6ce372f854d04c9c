package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// smallDemo is a demo that tests have time for.
func smallDemo(nodes int) demoSpec {
	return demoSpec{nodes: nodes, layers: []int64{3 << 20, 200 << 10, 1 << 10}, registryLink: 4e6, nodeLink: 8e6}
}

// inEmptyTemp makes a directory of its own for temporary files, in which
// nothing may be left.
func inEmptyTemp(t *testing.T) {
	t.Helper()
	t.Setenv("TMPDIR", t.TempDir())
	t.Cleanup(func() {
		if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) != 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	})
}

// measured are the numbers of a demo that differ from run to run: times, and
// which node was home of what.
var (
	measured = regexp.MustCompile(`\d+(\.\d+)?m?s\b|\d+ MB/s|\d+\.\d\d x|\d+\.\d [KM]iB|\d+ K?B\b`)
	padding  = regexp.MustCompile(` {2,}`)
)

// TestDemo runs a small storm. What a user reads is in the golden file; the
// numbers are checked here.
func TestDemo(t *testing.T) {
	inEmptyTemp(t)
	var out bytes.Buffer
	if err := runDemo(t.Context(), &out, smallDemo(3)); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	text := out.String()
	copies := regexp.MustCompile(`copies from the registry  1\.0[0-2]\d`)
	if !copies.MatchString(text) {
		t.Errorf("the registry did not send one copy:\n%s", text)
	}
	if !regexp.MustCompile(`warm, registry stopped +node-1 +0 B +0 B +3\.2 MiB`).MatchString(text) {
		t.Errorf("the warm pull was not from disk:\n%s", text)
	}
	if !regexp.MustCompile(`new node, registry stopped +node-4 +0 B +3\.2 MiB +0 B`).MatchString(text) {
		t.Errorf("the new node did not get everything from peers:\n%s", text)
	}
	text = measured.ReplaceAllString(copies.ReplaceAllString(text, "copies from the registry  ONE"), "N")
	text = regexp.MustCompile(`registry +\d+ +\d+ for tag and manifest, .*`).ReplaceAllString(text, "registry R")
	golden(t, "demo", inOrder(padding.ReplaceAllString(text, " ")))
}

// inOrder sorts the lines of the nodes that finished, which is by speed.
func inOrder(text string) string {
	lines := strings.Split(text, "\n")
	first := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "has it after") })
	last := first
	for last < len(lines) && strings.HasPrefix(lines[last], "cold") {
		last++
	}
	slices.Sort(lines[first:last])
	return strings.Join(lines, "\n")
}

// TestDemoBound holds the bounds of the storm for links of a few speeds.
func TestDemoBound(t *testing.T) {
	const size = 100e6
	tests := []struct {
		name   string
		spec   demoSpec
		bound  time.Duration
		direct time.Duration
	}{
		{"the registry's link", demoSpec{nodes: 8, registryLink: 10e6, nodeLink: 10e6}, 10 * time.Second, 80 * time.Second},
		{"all links", demoSpec{nodes: 8, registryLink: 100e6, nodeLink: 10e6}, 4444444 * time.Microsecond, 8 * time.Second},
		{"one node", demoSpec{nodes: 1, registryLink: 10e6, nodeLink: 10e6}, 10 * time.Second, 10 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.spec.bound(size).Round(time.Microsecond); got != tt.bound.Round(time.Microsecond) {
				t.Errorf("bound %s, want %s", got, tt.bound)
			}
			if got := tt.spec.direct(size); got != tt.direct {
				t.Errorf("direct %s, want %s", got, tt.direct)
			}
		})
	}
}

// writer tells when something was printed.
type writer struct {
	bytes.Buffer
	on     string
	notify func()
}

func (w *writer) Write(b []byte) (int, error) {
	if strings.Contains(string(b), w.on) {
		w.notify()
	}
	return w.Buffer.Write(b)
}

// TestDemoStays holds that a demo that stays says where everything is, and
// that Ctrl-C ends it cleanly.
func TestDemoStays(t *testing.T) {
	inEmptyTemp(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &writer{on: "curl", notify: cancel}
	spec := smallDemo(1)
	spec.stay = true
	if err := runDemo(ctx, out, spec); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"larder explain --admin http://127.0.0.1:", "node-1  127.0.0.1:", "node-2  127.0.0.1:"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("does not say %q:\n%s", want, out)
		}
	}
}

// TestDemoInterrupted holds that Ctrl-C in the middle of the storm ends it
// cleanly, too.
func TestDemoInterrupted(t *testing.T) {
	inEmptyTemp(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &writer{on: "Not modelled", notify: cancel}
	var errs bytes.Buffer
	if code := run(ctx, []string{"demo", "--nodes", "2"}, out, &errs); code != exitFailed || !strings.Contains(errs.String(), "nothing is left behind") {
		t.Fatalf("exit %d: %s\n%s", code, errs.String(), out)
	}
	if left, err := filepath.Glob(filepath.Join(os.TempDir(), "larder-demo-*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

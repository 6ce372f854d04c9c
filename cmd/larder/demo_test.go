package main

import (
	"bytes"
	"context"
	"os"
	"regexp"
	"strings"
	"testing"
)

// measured are the numbers of a demo that differ from run to run. A blob that
// is fetched in several ranges costs the registry some bytes more than one
// copy: those under way on a connection that was closed.
var measured = regexp.MustCompile(`\d+(\.\d+)?m?s\b|\d+ MB/s|2\.\d\d copies|\d+ requests`)

var padding = regexp.MustCompile(` {2,}`)

func TestDemo(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	code, out, errs := larder(t, "demo", "--nodes", "2")
	if code != 0 {
		t.Fatalf("exit %d: %s\n%s", code, errs, out)
	}
	golden(t, "demo", padding.ReplaceAllString(measured.ReplaceAllString(out, "N"), " "))
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
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

// TestDemoInterrupted holds that Ctrl-C ends a demo that stays, cleanly.
func TestDemoInterrupted(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &writer{on: "Ctrl-C", notify: cancel}
	var errs bytes.Buffer
	if code := run(ctx, []string{"demo", "--stay"}, out, &errs); code != 0 {
		t.Fatalf("exit %d: %s", code, errs.String())
	}
	if !strings.Contains(out.String(), "larder explain --admin http://127.0.0.1:") {
		t.Errorf("no hint how to look around:\n%s", out)
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

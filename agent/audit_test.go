package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

type auditTestLine struct {
	N int `json:"n"`
}

// TestAuditRotates holds that every line is in exactly one file, in order, and
// that no more than auditKeep old files stay.
func TestAuditRotates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := newAuditLog(path, slog.New(slog.DiscardHandler))
	l.limit = 100
	const lines = 200
	for n := range lines {
		l.record(auditTestLine{n})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Run(ctx); err != nil { // writes what is queued
		t.Fatal(err)
	}
	next := -1
	for i := auditKeep; i >= 0; i-- {
		for _, n := range readAudit(t, l.old(i)) {
			if next >= 0 && n != next {
				t.Fatalf("line %d where %d was due", n, next)
			}
			next = n + 1
		}
	}
	if next != lines {
		t.Errorf("the last line is %d, want %d", next-1, lines-1)
	}
	if _, err := os.Stat(l.old(auditKeep + 1)); err == nil {
		t.Errorf("%s exists", l.old(auditKeep+1))
	}
}

// readAudit is auditLines of a file that was rotated in time.
func readAudit(t *testing.T, path string) []int {
	t.Helper()
	if info, err := os.Stat(path); err != nil || info.Size() > 100 {
		t.Errorf("%s: %v, %v: want at most 100 bytes", path, info, err)
	}
	return auditLines(t, path)
}

func auditLines(t *testing.T, path string) []int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []int
	for s := bufio.NewScanner(f); s.Scan(); {
		var line auditTestLine
		if err := json.Unmarshal(s.Bytes(), &line); err != nil {
			t.Fatalf("%s: %q: %v", path, s.Text(), err)
		}
		out = append(out, line.N)
	}
	return out
}

// TestAuditThatCannotRotate holds that it costs no line, is told once, and ends as soon as
// the file can be renamed.
func TestAuditThatCannotRotate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	var said bytes.Buffer
	l := newAuditLog(path, slog.New(slog.NewTextHandler(&said, nil)))
	l.limit = 100
	// A file cannot take the place of a directory.
	if err := errors.Join(os.WriteFile(l.old(auditKeep-1), nil, 0o600), os.MkdirAll(filepath.Join(l.old(auditKeep), "in the way"), 0o700)); err != nil {
		t.Fatal(err)
	}
	const lines = 60
	for n := range lines {
		if n == 40 {
			if got := auditLines(t, path); len(got) != n {
				t.Errorf("%d lines of %d while it cannot be rotated", len(got), n)
			}
			if err := os.RemoveAll(l.old(auditKeep)); err != nil {
				t.Fatal(err)
			}
		}
		l.write(auditTestLine{n})
	}
	if err := l.close(); err != nil {
		t.Error(err)
	}
	if got := strings.Count(said.String(), "\n"); got != 1 {
		t.Errorf("it was told %d times: %s", got, said.String())
	}
	next := 0
	for i := auditKeep; i >= 0; i-- {
		if _, err := os.Stat(l.old(i)); i > 1 && err != nil {
			continue // there was no need
		}
		for _, n := range auditLines(t, l.old(i)) {
			if n != next {
				t.Fatalf("line %d where %d was due", n, next)
			}
			next = n + 1
		}
	}
	if next != lines {
		t.Errorf("the last line is %d, want %d", next-1, lines-1)
	}
}

// TestAuditAppends holds that a restart goes on in the same file, and that a
// directory that cannot be written costs lines only.
func TestAuditAppends(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	path := filepath.Join(dir, "audit.jsonl")
	l := newAuditLog(path, slog.New(slog.DiscardHandler))
	l.write(auditTestLine{0})
	if !l.sick {
		t.Error("writing into a directory that is not there went well")
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		l = newAuditLog(path, slog.New(slog.DiscardHandler))
		l.write(auditTestLine{n + 1})
		if err := l.close(); err != nil {
			t.Fatal(err)
		}
	}
	if got := readAudit(t, path); len(got) != 2 || got[0] != 1 || got[1] != 2 {
		t.Errorf("lines %v, want [1 2]", got)
	}
}

// TestAuditTellsAtTheStart: who audits learns of a wrong path before the first pull.
func TestAuditTellsAtTheStart(t *testing.T) {
	var said bytes.Buffer
	l := newAuditLog(filepath.Join(t.TempDir(), "gone", "audit.jsonl"), slog.New(slog.NewTextHandler(&said, nil)))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Run(ctx); err != nil {
		t.Error(err)
	}
	if out := said.String(); !strings.Contains(out, "level=ERROR") || !strings.Contains(out, "no such file or directory") {
		t.Errorf("said %q", out)
	}
}

// TestAuditCountsWhatItLacks: lines for a file that cannot be opened are lost until it can.
func TestAuditCountsWhatItLacks(t *testing.T) {
	c := testConfig(t)
	startRegistry(t, &c)
	c.Audit.File = filepath.Join(t.TempDir(), "later", "audit.jsonl")
	a := start(t, c)
	a.pull(t)
	eventually(t, "lines lost", func() error {
		if testutil.ToFloat64(a.audit.lost) == 0 {
			return errors.New("none")
		}
		return nil
	})
	if err := os.Mkdir(filepath.Dir(c.Audit.File), 0o700); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a line", func() error {
		a.pull(t)
		_, err := os.Stat(c.Audit.File)
		return err
	})
	if _, metrics := a.admin(t, "GET", "/metrics", ""); !strings.Contains(metrics, "larder_audit_lines_lost_total ") {
		t.Error("not among the metrics")
	}
}

// TestAuditAfterATornLine: what a full disk or a kill left of a line does not spoil the
// next one.
func TestAuditAfterATornLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	if err := os.WriteFile(path, []byte(`{"n":0}`+"\n"+`{"n":`), 0o600); err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		l := newAuditLog(path, slog.New(slog.DiscardHandler))
		l.write(auditTestLine{n + 2})
		if err := l.close(); err != nil {
			t.Fatal(err)
		}
	}
	const want = `{"n":0}` + "\n" + `{"n":` + "\n" + `{"n":2}` + "\n" + `{"n":3}` + "\n"
	if got, err := os.ReadFile(path); err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
}

// TestAuditToADevice holds that what is no file is not rotated: /dev/stdout is
// everybody's.
func TestAuditToADevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit")
	if err := os.Symlink(os.DevNull, path); err != nil {
		t.Fatal(err)
	}
	l := newAuditLog(path, slog.New(slog.DiscardHandler))
	l.limit = 100
	for n := range 50 {
		if l.write(auditTestLine{n}); l.sick {
			t.Fatalf("line %d is lost", n)
		}
	}
	if err := l.close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(l.old(1)); err == nil {
		t.Error("a device was rotated")
	}
}

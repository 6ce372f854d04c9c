package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/larder-cache/larder/test/logtest"
)

// TestPartsStopInReverse holds the order of stopping, one after the other, and
// that a part which hangs is reported and left.
func TestPartsStopInReverse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newParts(slog.New(slog.DiscardHandler), time.Minute)
		var stopped []string
		hang := make(chan struct{})
		for _, name := range []string{"cache", "hanging", "proxy", "hosts"} {
			p.start(name, func(ctx context.Context) error {
				<-ctx.Done()
				if name == "hanging" {
					<-hang
					return nil
				}
				time.Sleep(time.Second) // of the bubble: others would overtake if they were told to stop as well
				stopped = append(stopped, name)
				return ctx.Err()
			})
		}
		err := p.stop()
		if err == nil || !strings.Contains(err.Error(), "hanging: still busy after 1m0s") {
			t.Errorf("stop: %v", err)
		}
		if want := []string{"hosts", "proxy", "cache"}; !slices.Equal(stopped, want) {
			t.Errorf("stopped %v, want %v", stopped, want)
		}
		close(hang)
	})
}

// TestPartsAsDesigned holds the table of DESIGN.md: an agent that has every part stops them
// in the reverse of the order in which it starts them.
func TestPartsAsDesigned(t *testing.T) {
	design, err := os.ReadFile("DESIGN.md")
	if err != nil {
		t.Fatal(err)
	}
	var want []string // as started
	rows := regexp.MustCompile(`(?m)^\| (\d+) \| ([a-z ]+)[^|]*\| (\d+)`).FindAllStringSubmatch(string(design), -1)
	for i, row := range rows {
		if row[1] != strconv.Itoa(i+1) || row[3] != strconv.Itoa(len(rows)-i) {
			t.Errorf("row %d of the table: started %s, stopped %s", i+1, row[1], row[3])
		}
		want = append(want, strings.TrimSpace(row[2]))
	}
	c := clusterConfigs(t)()
	c.Audit.File = filepath.Join(t.TempDir(), "audit.log")
	c.Runtime.ContentDir = t.TempDir()
	c.Hosts.Containerd = filepath.Join(t.TempDir(), "certs.d")
	c.Metrics.Listen = "127.0.0.1:0"
	var log logtest.Buffer
	if err := start(t, c, WithLogger(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))).stop(t); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, line := range regexp.MustCompile(`msg=stopping part="?([a-z ]+)`).FindAllStringSubmatch(log.String(), -1) {
		got = append(got, line[1])
	}
	slices.Reverse(got)
	if !slices.Equal(got, want) {
		t.Errorf("started\n%q, by DESIGN.md\n%q", got, want)
	}
}

// TestPartsFail holds that the first part that ends by itself is told, with or
// without an error, and that an error while stopping is not lost.
func TestPartsFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newParts(slog.New(slog.DiscardHandler), time.Minute)
		broken := errors.New("broken")
		p.start("late", func(ctx context.Context) error { <-ctx.Done(); return broken })
		p.start("quiet", func(context.Context) error { return nil })
		if err := <-p.failed; err == nil || err.Error() != "quiet: ended unexpectedly" {
			t.Errorf("failed: %v", err)
		}
		p.start("second", func(context.Context) error { return broken })
		synctest.Wait()
		if err := p.stop(); !errors.Is(err, broken) || !strings.Contains(err.Error(), "stop late") {
			t.Errorf("stop: %v", err)
		}
		if err := <-p.failed; !errors.Is(err, broken) {
			t.Errorf("second failure: %v", err)
		}
	})
}

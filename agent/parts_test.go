package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
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

package upstream

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b breaker
		fail := func(n int) {
			for range n {
				b.done(failed, time.Now())
			}
		}
		allowed := func(want bool) {
			t.Helper()
			if _, ok := b.allow(time.Now()); ok != want {
				t.Fatalf("allow = %t, want %t", ok, want)
			}
		}
		fail(breakAfter - 1)
		allowed(true)
		b.done(good, time.Now())
		fail(breakAfter - 1)
		allowed(true) // a success in between started the count anew
		fail(1)
		allowed(false)
		wait, _ := b.allow(time.Now())
		if wait < breakMin/2 || wait > breakMin {
			t.Fatalf("open for %v, want about %v", wait, breakMin)
		}
		<-time.After(wait)
		allowed(true)
		allowed(false) // one probe at a time
		b.done(neutral, time.Now())
		allowed(true) // a cancelled probe makes room for another
		fail(1)
		second, _ := b.allow(time.Now())
		if second < breakMin || second > 2*breakMin {
			t.Fatalf("open for %v after a failed probe, want about %v", second, 2*breakMin)
		}
		fail(10) // requests that were under way
		if again, _ := b.allow(time.Now()); again != second {
			t.Fatalf("late failures moved the pause from %v to %v", second, again)
		}
		<-time.After(second)
		allowed(true)
		b.done(good, time.Now())
		allowed(true)
		allowed(true)
		for range 30 {
			fail(breakAfter)
			wait, ok := b.allow(time.Now())
			if ok || wait > breakMax {
				t.Fatalf("open for %v, want at most %v", wait, breakMax)
			}
			<-time.After(wait)
			allowed(true)
		}
	})
}

func TestBackoff(t *testing.T) {
	var sum [8]time.Duration
	const rounds = 2000
	for range rounds {
		for try := range sum {
			d := backoff(try, 0)
			if limit := min(backoffBase<<try, backoffMax); d < 0 || d >= limit {
				t.Fatalf("try %d: %v, want below %v", try, d, limit)
			}
			sum[try] += d
		}
	}
	for try, s := range sum { // full jitter: half of the bound on average
		mean, want := s/rounds, min(backoffBase<<try, backoffMax)/2
		if mean < want*8/10 || mean > want*12/10 {
			t.Errorf("try %d: mean %v, want about %v", try, mean, want)
		}
	}
	if d := backoff(0, 7*time.Second); d != 7*time.Second {
		t.Errorf("Retry-After of 7s: %v", d)
	}
	if d := backoff(0, time.Hour); d != retryAfterMax {
		t.Errorf("Retry-After of an hour: %v, want %v", d, retryAfterMax)
	}
	if d := backoff(1000, 0); d < 0 || d > backoffMax {
		t.Errorf("try 1000: %v", d)
	}
}

// TestPauseKeepsToTheDeadline pins that nobody sleeps through a caller's
// budget only to find it spent.
func TestPauseKeepsToTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if pause(ctx, 2*time.Second) || time.Since(began) != 0 {
			t.Errorf("a pause beyond the deadline took %v", time.Since(began))
		}
		if !pause(ctx, 500*time.Millisecond) || time.Since(began) != 500*time.Millisecond {
			t.Errorf("a pause within it took %v", time.Since(began))
		}
		go cancel()
		if pause(ctx, 400*time.Millisecond) || time.Since(began) != 500*time.Millisecond {
			t.Error("a cancelled pause went on")
		}
	})
}

// TestPauseIsSaid: the log tells of a registry that throttles, and not of each request that
// it turns away.
func TestPauseIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said bytes.Buffer
		ep := &endpoint{c: &Client{log: slog.New(slog.NewTextHandler(&said, nil))}, reg: &registry{Registry: Registry{Host: "reg.test"}}}
		ep.noteError(errors.New("429 toomanyrequests"), time.Now())
		for minute := range 3 {
			for range 10 {
				ep.pause(pauseKey{}, 0, time.Now())
				ep.pause(pauseKey{bulk: true}, time.Hour, time.Now())
			}
			if n := strings.Count(said.String(), "level=WARN"); n != minute+1 {
				t.Errorf("minute %d: said %d times:\n%s", minute, n, said.String())
			}
			<-time.After(time.Minute)
		}
		if !strings.Contains(said.String(), `registry=reg.test`) || !strings.Contains(said.String(), `duration=2s err="429 toomanyrequests"`) {
			t.Error(said.String())
		}
	})
}

func TestPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ep := &endpoint{c: &Client{log: slog.New(slog.DiscardHandler)}, reg: &registry{}}
		manifests, blobs := pauseKey{credential: "a"}, pauseKey{bulk: true, credential: "a"}
		ep.pause(manifests, 10*time.Second, time.Now())
		if d := ep.pausedFor(manifests, time.Now()); d != 10*time.Second {
			t.Errorf("paused for %v", d)
		}
		if d := ep.pausedFor(blobs, time.Now()); d != 0 {
			t.Errorf("blobs paused for %v with manifests", d)
		}
		ep.pause(blobs, time.Hour, time.Now())
		if d := ep.pausedFor(blobs, time.Now()); d != pauseMax {
			t.Errorf("paused for %v, want %v", d, pauseMax)
		}
		<-time.After(10 * time.Second)
		if d := ep.pausedFor(manifests, time.Now()); d != 0 {
			t.Errorf("still paused for %v", d)
		}
		for i := range 10 * maxPauses {
			ep.pause(pauseKey{credential: string(rune(i))}, time.Second, time.Now())
		}
		if len(ep.pauses) > maxPauses {
			t.Errorf("%d pauses remembered", len(ep.pauses))
		}
	})
}

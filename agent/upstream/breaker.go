package upstream

import (
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// breakAfter consecutive failures, an endpoint is left alone. Five is one
	// pull's worth of tries, so that a blip opens nothing.
	breakAfter = 5
	breakMin   = 2 * time.Second
	breakMax   = time.Minute
)

// outcome is what a request tells about its endpoint's health.
type outcome int

const (
	neutral outcome = iota // cancelled by its caller: says nothing
	good
	failed
)

// breaker keeps an endpoint that is down from costing every request a timeout:
// while it is open requests fail at once and stale tags can be served in time.
type breaker struct {
	mu       sync.Mutex // guards all below
	failures int        // consecutive
	openings int        // consecutive, for the growth of the pause
	until    time.Time  // open until then
	probing  bool       // one request is out to see whether it is back
}

// allow says whether a request may go out now, or else how long it is until
// the next may. Each allowed request must be answered by one call of done.
func (b *breaker) allow(now time.Time) (wait time.Duration, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.until.IsZero():
		return 0, true
	case now.Before(b.until):
		return b.until.Sub(now), false
	case b.probing:
		return time.Second, false
	}
	b.probing = true
	return 0, true
}

// done takes the outcome of an allowed request; turned says that it opened the
// breaker, or closed it again.
func (b *breaker) done(o outcome, now time.Time) (turned bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch o {
	case good:
		turned = !b.until.IsZero()
		b.failures, b.openings, b.until, b.probing = 0, 0, time.Time{}, false
	case neutral:
		b.probing = false
	case failed:
		b.failures++
		if b.failures < breakAfter || now.Before(b.until) {
			return false // requests that were under way when it opened do not lengthen the pause
		}
		turned = b.until.IsZero()
		pause := min(breakMin<<min(b.openings, 10), breakMax)
		b.openings++
		b.probing = false
		// Half to whole, so that the nodes of a cluster do not probe as one.
		b.until = now.Add(pause/2 + rand.N(pause/2))
	}
	return turned
}

// state is for health: consecutive failures, and when an open breaker lets
// the next request out (zero = closed).
func (b *breaker) state() (failures int, until time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.failures, b.until
}

const (
	backoffBase = 100 * time.Millisecond
	backoffMax  = 5 * time.Second
	// retryAfterMax caps what a registry can make a blob wait for.
	retryAfterMax = 30 * time.Second
)

// backoff is exponential with full jitter, and never less than the registry asked for.
func backoff(try int, retryAfter time.Duration) time.Duration {
	d := rand.N(min(backoffBase<<min(try, 10), backoffMax))
	return max(d, min(retryAfter, retryAfterMax))
}

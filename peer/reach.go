package peer

import (
	"context"
	"errors"
	"slices"
	"time"
)

// A home whose connects to upstream get no answer (a firewall, a missing route) leaves
// the blob to the next home before those who wait for it lose their patience.

// reachCheck is how often a home checks whether upstream can be reached at all.
const reachCheck = 250 * time.Millisecond

// errUnreached: another home may have a way to the registry.
var errUnreached = errors.New("the registry cannot be reached from here")

// cutOffError is errUnreached of another member.
type cutOffError struct{ others []string } // that have a way, as it says

func (e *cutOffError) Error() string { return errUnreached.Error() }
func (e *cutOffError) Unwrap() error { return errUnreached }

// whileReached returns a context that ends, with errUnreached as its cause, when this
// node does not reach the registry and leave agrees. leave is called on another
// goroutine until stop is called, and perhaps once more. The caller calls stop.
func (s *Swarm) whileReached(ctx context.Context, registry string, leave func() bool) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	look := func() {
		if !s.reaches(registry) && leave() {
			cancel(errUnreached)
		}
	}
	look()
	s.spawn(func(context.Context) {
		tick := time.NewTicker(reachCheck)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				look()
			case <-ctx.Done():
				return
			}
		}
	})
	return ctx, func() { cancel(nil) }
}

// unreached reports whether a context of whileReached ended because of that.
func unreached(ctx context.Context) bool { return errors.Is(context.Cause(ctx), errUnreached) }

// standAside leaves the blob to others if this node, as a home, would not try the registry now.
// Until it has some of it, it also leaves to them who asks for it, even if it finds out that it
// does reach the registry: homes that each begin by asking the other would wait for each other.
func (x *fetch) standAside() {
	homes, self := x.homes(), x.s.self.Name
	i := placeOf(homes, self)
	if i < 0 || x.last || x.tried[self] || placeOf(x.route(), self) >= 0 {
		return
	}
	x.passOver(homes[i], errUnreached)
	x.b.mu.Lock()
	defer x.b.mu.Unlock()
	x.b.aside = true
}

// standsAside reports whether standAside has left the blob to others.
func (b *blob) standsAside() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.aside && !b.authority
}

// barren reports whether nothing of the blob is here, or has been asked of upstream
// with hope.
func (b *blob) barren(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.haveN == 0 && !b.outlookLocked(now).awaits() // pieces on their way here may not count
}

// more reports whether there is another home to ask than m, if these were asked. The last
// home is the one that keeps trying if there is none, so for all others there is one.
func (x *fetch) more(m string, asked map[string]bool) bool {
	if len(asked)+1 >= maxAsked {
		return false
	}
	other := func(o *Member) bool { return o.Name != m && !asked[o.Name] }
	homes := x.homes()
	return slices.ContainsFunc(x.route(), other) || len(homes) > 0 && homes[len(homes)-1].Name != m
}

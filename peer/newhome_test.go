package peer

import (
	"slices"
	"testing"
	"time"
)

// TestNewHomeAnsweredLate: a node that comes in the middle, and is the best home from then on,
// hears of the home before it later than it waits for that.
func TestNewHomeAnsweredLate(t *testing.T) {
	for _, late := range []time.Duration{0, peekTime + askHomeFor/8} {
		t.Run(late.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := slowSim(12).world(t)
				top := w.top()
				others := slices.DeleteFunc(slices.Clone(w.nodes), func(n *simNode) bool { return n == top })
				for _, n := range others {
					n.s.roster.remove(top.s.self.Name)
					n.late = late
				}
				top.after = 6 * time.Second
				time.AfterFunc(top.after, func() {
					for _, n := range others {
						n.s.roster.set(top.s.self)
					}
				})
				r := w.play(t)
				t.Log(r)
				if r.copies > 1.1 || len(r.failed) > 0 {
					t.Errorf("%v %v", r, r.failed)
				}
			})
		})
	}
}

// TestSilentHomeIsSlow: who is home because the one before it did not answer hears it when it does.
func TestSilentHomeIsSlow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := slowSim(12).world(t)
		top := w.top()
		for _, n := range w.nodes {
			if n != top {
				n.after = 5 * time.Second
			}
		}
		top.late = askHomeFor + askHomeFor/4
		r := w.play(t)
		t.Log(r)
		if r.copies > 1.17 || len(r.failed) > 0 {
			t.Errorf("%v %v", r, r.failed)
		}
	})
}

// TestHomesLostEachOther: two homes that could not reach each other a moment ago fetch no more
// than one copy once they can.
func TestHomesLostEachOther(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := slowSim(12).world(t)
		homes := w.nodes[0].s.roster.homes(sha256Of(w.images[0].digest), "", false)[:2]
		for _, n := range w.nodes {
			for i, m := range homes {
				if n.s.self.Name == m.Name {
					n.s.roster.unreachable(homes[1-i].Name)
				}
			}
		}
		r := w.play(t)
		t.Log(r)
		if r.copies > 1.1 || len(r.failed) > 0 {
			t.Errorf("%v %v", r, r.failed)
		}
	})
}

// TestHomeGoneForAMoment: the network of the home fails for seconds, and the next one goes
// upstream; once it reaches the home again, which gets the blob all the same, it stops.
func TestHomeGoneForAMoment(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := slowSim(12).world(t)
		top := w.top()
		time.AfterFunc(4*time.Second, func() { top.host.cut(2 * time.Second) })
		r := w.play(t)
		t.Log(r)
		if r.copies > 1.3 || len(r.failed) > 0 {
			t.Errorf("%v %v", r, r.failed)
		}
	})
}

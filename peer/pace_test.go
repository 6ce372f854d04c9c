package peer

import (
	"cmp"
	"maps"
	"testing"
	"time"
)

const pacePiece = 256 << 10

// exchange is a node that fetches a blob of 8 pieces, and what a test says of its neighbours.
type exchange struct {
	s *Swarm
	b *blob
	f *memBlob
}

func exchanging(t *testing.T, test func(x exchange)) {
	bubble(t, func(t *testing.T) {
		_, nodes := restWorld(t, baseSim(1, 4))
		s := nodes[0].s
		s.cfg.PieceSize = PieceSize
		x := exchange{s: s, b: s.blob(blobID{key: key{1}})}
		x.f = newMemBlob(x.b.d)
		if err := cmp.Or(x.f.SetSize(8*pacePiece), x.b.begin(x.f, func(error) {}, 0)); err != nil || !x.b.setSize(8*pacePiece) {
			t.Fatal(err)
		}
		test(x)
		x.b.end(nil)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// neighbour has the pieces from first on.
func (x exchange) neighbour(node string, first int) *neighbour {
	l := fuzzLink(x.s, nil)
	l.peer, l.node = node, node
	nb := &neighbour{l: l, size: x.b.size, pieceSize: x.b.pieceSize, have: newBitmap(8), haveN: 8 - first}
	for i := first; i < 8; i++ {
		nb.have.set(i)
	}
	x.b.nbrs[node] = nb
	x.b.countLocked(nb, +1)
	return nb
}

func (x exchange) ask(nb *neighbour, piece int) *request {
	r := &request{blob: x.b, nb: nb, piece: piece, size: pacePiece, sent: time.Now()}
	r.moved.set(r.sent)
	nb.flying++
	x.b.flying++
	x.b.wants[piece] = append(x.b.wants[piece], r)
	return r
}

// gives brings pieces from a neighbour, each after so long.
func (x exchange) gives(nb *neighbour, after time.Duration, pieces ...int) {
	for _, i := range pieces {
		r := x.ask(nb, i)
		time.Sleep(after) // of the bubble
		x.b.took(r, x.b.life, time.Now())
	}
}

// asked is how many neighbours may be asked now.
func (x exchange) asked() int {
	x.b.idleLocked(time.Now())
	return len(x.b.idle)
}

// TestLeftToNeighbours: what neighbours hold is left to them, but not for long if nothing
// comes of it, and again as soon as something does.
func TestLeftToNeighbours(t *testing.T) {
	exchanging(t, func(x exchange) {
		b := x.b
		b.goesUp(true)
		k := &sink{x: &fetch{s: x.s, b: b, f: x.f}, w: x.f.From("")}
		far := &sink{x: k.x, w: k.w, patient: true}
		// left: upstream is to bring nothing of what a neighbour holds, the pieces from 4 on.
		look := func(left bool, when string) {
			t.Helper()
			b.tend(time.Now())
			_, _, more := k.Missing(4 * pacePiece)
			_, _, far := far.Missing(4 * pacePiece)
			if more == left || far != (len(b.nbrs) == 0) {
				t.Errorf("%s: the home gets it from upstream: %t, a helper does: %t", when, more, far)
			}
		}
		look(false, "nobody has any")
		time.Sleep(time.Minute) // of the bubble
		nb := x.neighbour("peer", 4)
		look(true, "a neighbour has half of it")
		time.Sleep(stallRejoin + tendEvery) // of the bubble
		look(true, "it gives nothing, and there is the other half to get")
		if _, err := k.WriteAt(make([]byte, 4*pacePiece), 0); err != nil {
			t.Fatal(err)
		}
		for i := range 4 {
			b.gotLocked(i)
		}
		look(true, "there is not")
		time.Sleep(stallRejoin - tendEvery) // of the bubble
		look(true, "a moment later")
		time.Sleep(2 * tendEvery) // of the bubble
		look(false, "it gives nothing")
		b.moved(pacePiece)
		look(false, "upstream's bytes are not its")
		x.gives(nb, 0, 7)
		look(true, "it gave one")
		time.Sleep(stallRejoin + tendEvery) // of the bubble
		look(false, "and no more")
		b.left(nb.l)
		look(false, "it is gone")
		time.Sleep(time.Minute) // of the bubble
		x.neighbour("peer", 4)
		look(true, "it came back")
	})
}

// TestSlowIsNotCutOff: a neighbour that gives nothing while others do is not asked for a
// while, and stays a neighbour: it may be the blob's home, and what it holds is not lost.
// Where everybody takes long, nobody is slow.
func TestSlowIsNotCutOff(t *testing.T) {
	exchanging(t, func(x exchange) {
		slow, other := x.neighbour("slow", 0), x.neighbour("other", 0)
		late := x.ask(slow, 0)
		x.gives(other, 400*time.Millisecond, 1, 2, 3)
		x.s.tendBlob(x.b, time.Now(), keepBlob)
		if late.gaveUp || len(x.s.bans.list()) > 0 {
			t.Error("who takes three times what others take counts as slow")
		}
		x.gives(other, 400*time.Millisecond, 4, 5, 6)
		x.s.tendBlob(x.b, time.Now(), keepBlob)
		switch _, told := x.s.bans.list()["slow"]; {
		case !late.gaveUp || !told:
			t.Error("it does not count as slow after 2.4 s")
		case x.s.bans.has("slow"):
			t.Error("there is to be no link with who is slow")
		case x.b.nbrs["slow"] != slow || x.b.avail[7] != 2:
			t.Error("it is no neighbour any more")
		case x.asked() != 1 || x.b.idle[0] != other:
			t.Error("it is asked again")
		}
		x.b.busy(x.ask(slow, 7), answer{delay: 5, hint: noHint})
		time.Sleep(banSlow.lasts() - time.Second) // of the bubble
		if x.asked() != 1 {
			t.Error("it is asked before its time")
		}
		time.Sleep(2 * time.Second) // of the bubble
		if x.asked() != 2 {
			t.Error("it is not asked again")
		}
	})
}

// TestSlowOnAnotherLink: who was slow is not asked before its time because the link was made
// anew, or its node has started again.
func TestSlowOnAnotherLink(t *testing.T) {
	exchanging(t, func(x exchange) {
		slow, other := x.neighbour("slow", 0), x.neighbour("other", 0)
		x.ask(slow, 0)
		x.gives(other, 400*time.Millisecond, 1, 2, 3, 4, 5, 6)
		x.s.tendBlob(x.b, time.Now(), keepBlob)
		x.b.left(slow.l)
		l := fuzzLink(x.s, nil)
		l.peer, l.node = "its next start", "slow"
		x.b.opened(l, open{blob: x.b.id, size: x.b.size, pieceSize: x.b.pieceSize, have: slow.have})
		if x.asked() != 1 || x.b.idle[0] != other {
			t.Error("it is asked at once")
		}
		time.Sleep(banSlow.lasts() + time.Second) // of the bubble
		if x.asked() != 2 {
			t.Error("it is not asked again")
		}
	})
}

// TestBansAdd: who was wrong is not let in again because it was slow as well.
func TestBansAdd(t *testing.T) {
	exchanging(t, func(x exchange) {
		x.s.bans.add("peer", banDigest)
		time.Sleep(banDigest.lasts() - time.Second) // of the bubble
		x.s.bans.add("peer", banSlow)
		if time.Sleep(2 * time.Second); !x.s.bans.has("peer") { // of the bubble
			t.Error("a slow ban ended one for a wrong piece")
		}
		time.Sleep(banSlow.lasts()) // of the bubble
		x.s.bans.add("peer", banSlow)
		if x.s.bans.has("peer") || len(x.s.bans.list()) != 1 {
			t.Error("it counts as wrong although that is over")
		}
	})
}

// TestAside: while others wait for what this node gets from upstream, it asks them for less
// of other blobs.
func TestAside(t *testing.T) {
	exchanging(t, func(x exchange) {
		own := x.s.blob(blobID{key: key{2}})
		f := newMemBlob(own.d)
		if err := cmp.Or(f.SetSize(8*pacePiece), own.begin(f, func(error) {}, 0)); err != nil || !own.setSize(8*pacePiece) {
			t.Fatal(err)
		}
		look := func(aside bool, when string) {
			t.Helper()
			x.s.tendBlobs(time.Now())
			if got := x.b.flyLimit() < leastFly; got != aside {
				t.Errorf("%s: it stands aside: %t", when, got)
			}
			if own.flyLimit() < leastFly {
				t.Errorf("%s: what it gets itself stands aside", when)
			}
		}
		look(false, "two blobs of others")
		own.goesUp(true)
		look(false, "nobody waits for its own")
		own.meet(x.neighbour("peer", 0).l)
		look(true, "somebody does")
		own.missing = 0
		look(false, "it is there")
		own.missing = 8
		own.end(nil)
		look(false, "it has ended")
	})
}

// TestLimitHidesNoStall: who may take little waits for that as long as what was asked for
// comes, and no longer: a neighbour that gives nothing is none to wait for.
func TestLimitHidesNoStall(t *testing.T) {
	for name, gives := range map[string]bool{"gives": true, "gives nothing": false} {
		t.Run(name, func(t *testing.T) {
			exchanging(t, func(x exchange) {
				b := x.b
				x.s.budget = newBudget(pacePiece / 6)
				x.neighbour("one", 0)
				var longest time.Duration
				for began := time.Now(); time.Since(began) < 30*time.Second; time.Sleep(tendEvery) { // of the bubble
					now := time.Now()
					b.mu.Lock()
					b.expire(now)
					b.pump(now)
					var asked []*request
					for _, rs := range b.wants {
						asked = append(asked, rs...)
					}
					b.mu.Unlock()
					for _, r := range asked {
						if gives {
							r.moved.set(now.Add(1))
							b.took(r, b.life, now)
						}
					}
					longest = max(longest, b.outlook(now).idle())
				}
				if stalled := longest > stallFetch; stalled == gives {
					t.Errorf("nothing was said to come for %v", longest)
				}
			})
		})
	}
}

// TestLimitIsNotOwed: what a home may not take yet of what neighbours hold, it does not get
// from upstream instead.
func TestLimitIsNotOwed(t *testing.T) {
	exchanging(t, func(x exchange) {
		b := x.b
		b.goesUp(true)
		x.s.budget = newBudget(pacePiece / 4)
		x.neighbour("peer", 0)
		k := &sink{x: &fetch{s: x.s, b: b, f: x.f}, w: x.f.From("")}
		for began := time.Now(); time.Since(began) < 20*time.Second; time.Sleep(tendEvery) { // of the bubble
			b.tend(time.Now())
			b.mu.Lock()
			b.pump(time.Now())
			asked := maps.Clone(b.wants)
			b.mu.Unlock()
			for _, rs := range asked {
				rs[0].moved.set(time.Now().Add(1))
				b.took(rs[0], b.life, time.Now())
			}
			if _, _, more := k.Missing(0); more {
				t.Fatalf("it turns to upstream after %v, with %d pieces", time.Since(began), b.held())
			}
		}
	})
}

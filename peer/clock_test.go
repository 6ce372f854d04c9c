package peer

import (
	"testing"
	"time"
	"unsafe"
)

// stepped is t as it would have been read if somebody had set the clock by d before: what
// the monotonic clock says is the same.
func stepped(t time.Time, d time.Duration) time.Time {
	wall := (*uint64)(unsafe.Pointer(&t)) // 1 bit, 33 of seconds, 30 of nanoseconds
	*wall += uint64(d/time.Second) << 30
	return t
}

// TestClockIsSet: that somebody sets the clock, as NTP does after a start and hypervisors
// do after a move, ends no link and no request; and what is silent is found out as ever.
func TestClockIsSet(t *testing.T) {
	for name, step := range map[string]time.Duration{"ahead": 24 * time.Hour, "back": -24 * time.Hour} {
		n := newTestWorld().node(t, "node-0")
		l := fuzzLink(n.s, nil)
		b := n.s.blob(blobID{key: key{1}})
		if err := b.begin(newMemBlob(b.d), func(error) {}, 0); err != nil || !b.setSize(3<<20) {
			t.Fatal(err)
		}
		whole := newBitmap(b.n)
		whole.set(0)
		b.opened(l, open{blob: b.id, size: b.size, pieceSize: b.pieceSize, have: whole})
		b.mu.Lock()
		b.idleLocked(time.Now())
		if !b.askOne(0, nil, time.Now()) {
			t.Fatal("nothing is asked")
		}
		b.mu.Unlock()
		look := func(later time.Duration, gone bool) {
			t.Helper()
			now := stepped(time.Now().Add(later), step)
			b.mu.Lock()
			b.expire(now)
			asked, idle := b.flying, b.outlookLocked(now).quiet()
			b.mu.Unlock()
			l.tend(now, idleLink)
			if (asked == 0) != gone || l.over() != gone || idle > later+time.Second || idle < later {
				t.Errorf("clock set %s, %v later: %d pieces asked for, link over %t, nothing came for %v", name, later, asked, l.over(), idle)
			}
		}
		look(time.Millisecond, false)
		look(10*time.Second, true)
	}
}

// TestStoodStill: a process that stood still for seconds, while its machine was moved, takes
// nobody for silent before it has read what came meanwhile. It would count as alone.
func TestStoodStill(t *testing.T) {
	for stood, over := range map[time.Duration]bool{tendEvery: true, silence + time.Second: false} {
		n := newTestWorld().node(t, "node-0")
		n.kill() // it does not look by itself
		l := fuzzLink(n.s, nil)
		n.s.links[l.peer] = l
		now := time.Now()
		l.heard.set(now.Add(-silence - time.Millisecond))
		n.s.tendLinks(now, stood)
		if l.over() != over {
			t.Errorf("%v after it had looked before, a link of which it read nothing for longer than that is over: %t", stood, l.over())
		}
		l.close(errIdle)
	}
}

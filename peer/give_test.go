package peer

import (
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"
)

// uploadsOf makes a node's upload queue with links that never write.
func uploadsOf(t *testing.T) (*uploads, func(b *blob, piece, given int) *upload) {
	t.Helper()
	s := &Swarm{}
	s.uploads = &uploads{s: s, max: 64}
	id := uint32(0)
	return s.uploads, func(b *blob, piece, given int) *upload {
		l := newLink(s, nil, Member{Name: "peer"}, false)
		id++
		return &upload{l: l, blob: b, id: id, piece: piece, size: 256 << 10, given: given, spare: spare}
	}
}

func fill(q *uploads, make func(*blob, int, int) *upload, b *blob) {
	for i := range uploadSlots {
		q.add(make(b, i, 0))
	}
}

// TestUploadOrder pins who is served next when the slots are taken.
func TestUploadOrder(t *testing.T) {
	large, small := &blob{}, &blob{}
	cases := []struct {
		name string
		do   func(q *uploads, mk func(*blob, int, int) *upload) (first *upload)
	}{
		{"a small blob beside a large one", func(q *uploads, mk func(*blob, int, int) *upload) *upload {
			q.add(mk(large, 10, 0))
			q.add(mk(large, 11, 0))
			u := mk(small, 0, 0)
			q.add(u)
			return u
		}},
		{"never given before given", func(q *uploads, mk func(*blob, int, int) *upload) *upload {
			u := mk(large, 11, 0)
			v := mk(large, 10, 1)
			v.spare = 99
			q.add(v)
			q.add(u)
			return u
		}},
		{"the oldest of equals", func(q *uploads, mk func(*blob, int, int) *upload) *upload {
			u := mk(large, 11, 0)
			q.add(u)
			q.add(mk(large, 12, 0))
			return u
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			q, mk := uploadsOf(t)
			*large, *small = blob{}, blob{}
			fill(q, mk, large)
			want := c.do(q, mk)
			q.mu.Lock()
			got := q.queue[q.best()]
			q.mu.Unlock()
			if got != want {
				t.Errorf("piece %d goes first, want %d", got.piece, want.piece)
			}
		})
	}
}

// TestUploadsTurnAway pins that a full node says so at once, and that what was
// never given displaces what was.
func TestUploadsTurnAway(t *testing.T) {
	q, mk := uploadsOf(t)
	b := &blob{}
	fill(q, mk, b)
	for i := range leastQueue {
		if _, ok := q.add(mk(b, 20+i, 0)); !ok {
			t.Fatalf("request %d is turned away from an empty queue", i)
		}
	}
	wait, ok := q.add(mk(b, 30, 0))
	if ok || wait < leastWait || wait > maxWait {
		t.Errorf("a full queue takes more (%v), or says %v", ok, wait)
	}
	if _, ok := q.add(mk(b, 31, spare)); ok {
		t.Error("a piece given before is queued on a busy node")
	}
	q.mu.Lock()
	q.active[0].started = time.Now().Add(-2 * slotTime) // a slow receiver
	before := len(q.active)
	q.mu.Unlock()
	q.tend()
	if len(q.active) != before+1 {
		t.Error("a slow receiver keeps its slot")
	}
}

// TestDeafPeerLeavesPlaces: a peer that asks for many pieces and reads none does not keep
// others from theirs.
func TestDeafPeerLeavesPlaces(t *testing.T) {
	q, mk := uploadsOf(t)
	b := &blob{}
	deaf := newLink(q.s, nil, Member{Name: "deaf"}, false)
	let := 0
	for piece := range q.max {
		u := mk(b, piece, 0)
		u.l = deaf
		if _, ok := q.add(u); ok {
			let++
		}
		q.mu.Lock()
		for _, u := range q.active {
			u.started = time.Now().Add(-2 * slotTime) // it drags on
		}
		q.mu.Unlock()
		q.tend()
	}
	if let != q.max/peerShare {
		t.Errorf("%d of %d places are one peer's, want %d", let, q.max, q.max/peerShare)
	}
	u := mk(b, q.max, 0)
	if _, ok := q.add(u); !ok || !slices.Contains(q.active, u) {
		t.Error("another peer is turned away")
	}
	few := &uploads{s: q.s, max: 4}
	for piece := range few.max {
		u := mk(b, piece, 0)
		u.l = deaf
		if _, ok := few.add(u); !ok {
			t.Errorf("piece %d is turned away by a node of few places that are free", piece)
		}
	}
}

// TestDeafPeerIsLeft: the link to a peer that reads nothing ends, although that says that it
// is there; one that reads slowly keeps it.
func TestDeafPeerIsLeft(t *testing.T) {
	for _, tt := range []struct {
		name  string
		every time.Duration // it reads 16 KiB; 0 = nothing
		stays bool
	}{
		{"reads nothing", 0, false},
		{"reads 2 KB/s", 8 * time.Second, true},
		{"reads 0.6 KB/s", 25 * time.Second, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				_, nodes := restWorld(t, baseSim(1, 4))
				defer nodes[0].s.Close()
				conn, peer := net.Pipe()
				l := newLink(nodes[0].s, conn, Member{Name: startName("peer", 1)}, false)
				var both sync.WaitGroup
				both.Go(l.write)
				both.Go(func() {
					for buf := make([]byte, 16<<10); tt.every > 0; wait(t.Context(), tt.every) {
						if _, err := io.ReadFull(peer, buf); err != nil {
							return
						}
					}
				})
				for range 4 {
					l.send(func(b []byte) []byte { return append(b, make([]byte, chunkSize-1)...) })
					wait(t.Context(), 2*chunkTime)
				}
				if l.over() == tt.stays {
					t.Errorf("the link has ended: %v", !tt.stays)
				}
				l.close(errIdle)
				peer.Close()
				both.Wait()
			})
		})
	}
}

// TestEveryBlobHasItsTurn: the last nodes that need a small blob are let in by nodes whose
// queue is full of pieces of a large one that they never gave, every so many uploads.
func TestEveryBlobHasItsTurn(t *testing.T) {
	q, mk := uploadsOf(t)
	large, small := &blob{}, &blob{}
	fill(q, mk, large)
	const all = 4 * (turns + 1)
	given := 0
	for piece := range all {
		for len(q.queue) < leastQueue {
			if _, ok := q.add(mk(large, 10+piece, 0)); !ok {
				t.Fatal("no room in a queue that is not full")
			}
		}
		if _, ok := q.add(mk(small, 0, 20)); ok {
			given++
		}
		if _, ok := q.add(mk(small, 1, 20)); ok {
			t.Error("it is let in twice")
		}
		q.active[0].off = q.active[0].size
		q.finished(q.active[0])
	}
	if given < 3 || given > 4 {
		t.Errorf("the small blob is let in %d times in %d uploads, want once in %d", given, all, turns+1)
	}
}

// TestCutIsNotGiven: a piece that was asked for and cancelled before its end, or whose
// link ended, is as good as never given. If it counted, a home with a slow uplink, whose
// askers lose their patience, would have nothing left that comes first.
func TestCutIsNotGiven(t *testing.T) {
	n := newTestWorld().node(t, "node-0")
	n.s.limiter = rate.NewLimiter(rate.Every(time.Hour), 1) // nothing leaves
	b := n.s.blob(blobID{key: key{1}})
	if !b.setSize((uploadSlots + leastQueue) * PieceSize(1)) {
		t.Fatal("no pieces")
	}
	if err := b.offer(b.lives(), 0, b.n); err != nil {
		t.Fatal(err)
	}
	l := fuzzLink(n.s, nil)
	b.admit(l.peer, "")
	fresh := func() int { b.mu.Lock(); defer b.mu.Unlock(); return b.fresh }
	for i := range b.n {
		n.s.asked(l, want{id: uint32(i + 1), blob: b.id, piece: uint32(i)})
	}
	if got := fresh(); got != 0 {
		t.Fatalf("%d pieces were never given, want 0", got)
	}
	b.s.uploads.cancel(l, uint32(b.n)) // waits
	b.s.uploads.cancel(l, 1)           // is under way
	l.bulk[0].off = 100
	l.endUpload(l.bulk[0]) // as the writer does
	if got := fresh(); got != 2 {
		t.Errorf("%d pieces count as never given after two were cancelled, want 2", got)
	}
	l.close(errIdle)
	_ = l.settle() // says why it ended; what waits is started on it meanwhile
	b.s.uploads.drop(l)
	if got := fresh(); got != b.n {
		t.Errorf("%d pieces count as never given after the link has ended, want %d", got, b.n)
	}
}

package peer

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// uploads decides whose piece is sent next, over all links and blobs.
//
// Few pieces are under way at once (a piece that arrives whole can be passed
// on; twenty that arrive together come twenty times later), so the rest wait,
// and once the wait exceeds maxWait the asker is told to go elsewhere (I5). A
// transfer that drags on yields its place, so a slow receiver cannot hold the
// node's uplink.
//
// Methods that take no lock run with mu held.
type uploads struct {
	s   *Swarm
	max int

	mu     sync.Mutex // guards the following
	queue  []*upload
	active []*upload
	// lost are uploads whose links had ended when their turn came. They count as given
	// until notGiven, which takes blob.mu and so has to wait for drop (I7). drop comes,
	// and none is added after it: only a link's reader adds, and drop comes after its end.
	lost   []*upload
	vtime  float64 // of the blob served last
	starts uint64  // uploads that were started
	pace   pace    // while busy
}

const (
	uploadSlots = 6
	slotTime    = 250 * time.Millisecond // after this a transfer never counts
	maxWait     = 120 * time.Millisecond // of a request in the queue
	leastQueue  = 4
	peerShare   = 4                    // one peer may have a fourth of the places, of 64 what it asks for of four blobs,
	leastPlaces = 2 * perPeer          // and in any case so many
	leastWait   = 5 * time.Millisecond // told to the askers that are turned away
	spare       = 3                    // uploads under way up to which a piece is given a second time
	spareFresh  = 1                    // the same, while this node has pieces it alone may have
	headStart   = 16                   // pieces of a blob that comes (back) go before those of the others
	turns       = 24                   // uploads of other blobs after which a blob is owed one
)

// upload is one piece on its way to one peer. Only the link's writer touches
// off once the upload has started.
type upload struct {
	l       *link
	blob    *blob
	id      uint32
	piece   int
	size    int
	hinted  bool // a refusal may name a better piece; never if foreign
	foreign bool // for another zone, or a node that gives it to nobody: it does not count as given
	given   int  // times this node has given the piece before
	spare   int  // given pieces are served only while fewer uploads are under way
	asked   time.Time
	started time.Time
	gone    atomic.Bool // cancelled
	batches []*batch    // digests to send ahead
	src     *handle
	off     int // bytes sent
}

// next reads the upload's next bytes into p.
func (u *upload) next(p []byte) (int, error) {
	if u.gone.Load() {
		return 0, errLinkClosed
	}
	if u.src == nil {
		h, err := u.blob.acquire()
		if err != nil {
			return 0, err
		}
		u.src = h
	}
	n := min(len(p), u.size-u.off)
	m, err := u.src.ReadAt(p[:n], int64(u.piece)*u.blob.pieceSize+int64(u.off))
	if m == n {
		return n, nil
	}
	return 0, cmp.Or(err, errShortRead)
}

// add queues an upload, or says how long to wait before asking again. It may displace another
// one, which is then refused. Called by the reader of u's link.
func (q *uploads) add(u *upload) (wait time.Duration, ok bool) {
	q.mu.Lock()
	u.asked = time.Now()
	due := q.due(u.blob)
	if due {
		u.given = 0
	}
	n, full := len(q.queue)+len(q.active), len(q.queue) >= q.limit(u.size)
	displaces := full && q.displaceable(u)
	if n >= q.max || q.of(u.l) >= max(q.max/peerShare, leastPlaces) || !due && (u.given > 0 && n >= u.spare || full && !displaces) {
		wait = q.drain(u.size)
		q.mu.Unlock()
		return wait, false
	}
	var worst *upload
	if displaces {
		worst = q.takeWorst()
		wait = q.drain(u.size)
	}
	q.queue = append(q.queue, u)
	q.dispatchLocked()
	q.mu.Unlock()
	if worst != nil {
		worst.refuse(wait)
	}
	return 0, true
}

// due reports whether the blob had none of the last uploads. Its next one is let in like
// a piece never given: otherwise the last nodes that need a small blob, all of whose
// pieces have been given, are turned away by all for as long as those have pieces of
// large blobs that they never gave.
func (q *uploads) due(b *blob) bool {
	return q.starts-b.turn >= turns && !slices.ContainsFunc(q.queue, func(u *upload) bool { return u.blob == b })
}

// of counts what waits for a peer or is being sent to it. A peer that reads nothing, but
// keeps saying that it is there, must not take all places.
func (q *uploads) of(l *link) (n int) {
	for _, us := range [][]*upload{q.queue, q.active} {
		for _, u := range us {
			if u.l == l {
				n++
			}
		}
	}
	return n
}

// limit is how many pieces of this size may wait.
func (q *uploads) limit(size int) int {
	return max(leastQueue, int(q.pace.rate*maxWait.Seconds()/float64(max(size, 1))))
}

// drain is how long to wait before asking again: until half of what waits is sent, if
// all of it is of this size.
func (q *uploads) drain(size int) time.Duration {
	if q.pace.rate <= 0 {
		return 4 * leastWait
	}
	d := time.Duration(float64(size*len(q.queue)) / q.pace.rate * float64(time.Second) / 2)
	return min(max(d, leastWait), maxWait)
}

// displaceable reports whether something that waits is worth less than u.
func (q *uploads) displaceable(u *upload) bool {
	return slices.ContainsFunc(q.queue, func(w *upload) bool { return w.given > u.given })
}

func (q *uploads) takeWorst() *upload {
	w := 0
	for i, u := range q.queue {
		if u.given > q.queue[w].given {
			w = i
		}
	}
	u := q.queue[w]
	q.queue = slices.Delete(q.queue, w, w+1)
	return u
}

// refuse makes the asker go elsewhere.
func (u *upload) refuse(wait time.Duration) {
	hint := u.blob.refused(u)
	u.l.send(func(b []byte) []byte {
		return answer{id: u.id, delay: uint32(wait.Milliseconds()), hint: hint}.append(b, frameBusy)
	})
}

// load is what haves tell: how many uploads wait here or are being sent, 255 if more.
func (q *uploads) load() byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	return byte(min(len(q.queue)+len(q.active), 255))
}

func (q *uploads) dispatchLocked() {
	now := time.Now()
	for len(q.queue) > 0 && q.free(now) {
		i := q.best()
		u := q.queue[i]
		q.queue = slices.Delete(q.queue, i, i+1)
		u.blob.served += float64(u.size)
		q.vtime = u.blob.served
		q.starts++
		u.blob.turn = q.starts
		u.started = now
		q.pace.resume(now)
		if u.l.start(u) {
			q.active = append(q.active, u)
		} else {
			q.lost = append(q.lost, u)
		}
	}
}

// slotTime is how long a transfer may count: three times what it takes if this
// node's uplink is the limit.
func (q *uploads) slotTime(size int) time.Duration {
	if q.pace.rate <= 0 {
		return slotTime
	}
	return min(time.Duration(3*uploadSlots*float64(size)/q.pace.rate*float64(time.Second)), slotTime)
}

// free reports whether one more transfer may start.
func (q *uploads) free(now time.Time) bool {
	young := 0
	for _, u := range q.active {
		if now.Sub(u.started) < q.slotTime(u.size) {
			young++
		}
	}
	return young < uploadSlots && len(q.active) < q.max
}

// best is the upload to start next: of the blob that was served least, so that
// a large one cannot starve a small one; of its pieces the one given least
// often (I6); of those the oldest. served is a virtual time: a blob that comes
// (back) starts at the present, less headStart pieces.
func (q *uploads) best() int {
	for _, u := range q.queue {
		u.blob.served = max(u.blob.served, q.vtime-headStart*float64(u.size))
	}
	best := 0
	for i, u := range q.queue {
		if q.before(u, q.queue[best]) {
			best = i
		}
	}
	return best
}

func (q *uploads) before(a, b *upload) bool {
	if a.blob != b.blob && a.blob.served != b.blob.served {
		return a.blob.served < b.blob.served
	}
	if a.given != b.given {
		return a.given < b.given
	}
	return a.asked.Before(b.asked)
}

// finished takes an upload off, whether it was sent or not.
func (q *uploads) finished(u *upload) {
	if u.src != nil {
		u.blob.release(u.src)
		u.src = nil
	}
	if u.off < u.size {
		u.blob.notGiven(u)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.active, u)
	if i < 0 {
		return
	}
	q.active = slices.Delete(q.active, i, i+1)
	q.pace.add(u.off, time.Now())
	q.dispatchLocked()
	if len(q.active) == 0 {
		q.pace.pause()
	}
}

// cancel drops what a peer no longer wants.
func (q *uploads) cancel(l *link, id uint32) {
	mine := func(u *upload) bool { return u.l == l && u.id == id }
	q.mu.Lock()
	for _, u := range q.active {
		if mine(u) {
			u.gone.Store(true)
		}
	}
	q.mu.Unlock()
	q.takeOut(mine)
}

// drop forgets what waits for a link that ended.
func (q *uploads) drop(l *link) { q.takeOut(func(u *upload) bool { return u.l == l }) }

// takeOut takes off uploads that were not started.
func (q *uploads) takeOut(which func(*upload) bool) {
	var out []*upload
	take := func(u *upload) bool {
		if which(u) {
			out = append(out, u)
			return true
		}
		return false
	}
	q.mu.Lock()
	q.queue = slices.DeleteFunc(q.queue, take)
	q.lost = slices.DeleteFunc(q.lost, take)
	q.dispatchLocked()
	q.mu.Unlock()
	for _, u := range out {
		u.blob.notGiven(u)
	}
}

// tend starts what fits into places freed by slotTime.
func (q *uploads) tend() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dispatchLocked()
}

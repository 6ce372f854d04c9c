package peer

import (
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	coalesce      = 6 * time.Millisecond // haves pushed together
	maxNeighbours = 40                   // of one blob; more are turned away
	fewNeighbours = 6                    // fewer: ask the home for more
	keepBlob      = 10 * time.Minute     // piece digests of an idle blob
	maxIdleBlobs  = 256
)

var (
	errShortRead = errors.New("short read")
	errNotHere   = errors.New("blob is not here")
)

// blob is one blob as this node's swarm sees it: what is here, who else has
// what, and what is asked of whom. It lives while the node fetches it, while
// neighbours or leases need it, and some minutes longer for its piece digests.
//
// mu is never held across I/O or a call into the node. It may be held while
// taking a link's mu, never the other way round (I7). Methods that end in Locked, and those of
// picker.go, run with it held.
type blob struct {
	s  *Swarm
	id blobID
	d  digest.Digest // of id

	home    meeting       // this node as the blob's home
	served  float64       // guarded by uploads.mu
	turn    uint64        // uploads.starts at its last upload; guarded by uploads.mu
	wake    chan struct{} // for exchange: there may be something to ask for, see poke
	sizedCh chan struct{} // closed once the size is known
	lastUse moment        // somebody fetched it, asked for it or joined; see tendBlob

	mu sync.Mutex // guards the following

	size      int64 // 0 while unknown; it, pieceSize and n are constant from then on
	pieceSize int64
	n         int // pieces

	// What is here. grownCh is closed, and made anew, with each piece that comes, and when
	// all can be given.
	grownCh  chan struct{}
	life     int // goes up whenever all that is here is given up
	here     bitmap
	missing  int
	have     bitmap // here, and the digest is known: can be given
	haveN    int
	sums     []*batch        // by piece
	checked  bitmap          // its bytes are those that were checked by its digest in sums
	resigned []*batch        // by piece, see resignLocked
	bare     []int           // pieces that came here without a digest; some have one since
	signers  map[string]bool // whose batches count, see I2
	scanning bool            // a goroutine hashes the blob in the store
	rotten   bool            // and found that it is not what it should be
	src      *handle         // of the store, see acquire; nil = not open

	// What is given.
	given    []uint16          // how often, by piece
	fresh    int               // pieces of have never given
	hinted   map[int]time.Time // never given, but somebody was pointed to it
	dirty    []int             // newly in have, and neighbours are yet to hear of it
	flushing bool              // a flush is due
	flushed  time.Time         // the last one
	pass     pass              // this node's own
	admitted map[string]string // member: registry whose bytes it may have, see admit

	// Who else takes part, and what is asked of them.
	nbrs   map[string]*neighbour // by member name
	slow   map[string]time.Time  // nodes that were slow with the blob, until when they are not asked
	avail  []uint16              // neighbours that have a piece
	wants  map[int][]*request    // by piece
	flying int                   // requests under way
	cursor int                   // first missing piece a reader waits for
	idle   []*neighbour          // that pump may ask
	// candidates are the pieces that pump may ask for, of one window.
	candidates []candidate
	rng        *rand.Rand
	turned     time.Time // when somebody last closed on us
	unproved   time.Time // when a piece came of somebody whose digests do not count, see learn

	fetchState
	writing int  // pieces on their way into fill
	void    bool // a fetch brought all of it, and upstream had got it wrong, see attempt.go
}

// fetchState is this node's own fetch of a blob, and what is left of it until the next begins.
// blob.mu guards it.
type fetchState struct {
	fill      Fill                    // while fetching
	ahead     int64                   // Want.Ahead
	floor     int                     // with ahead: the piece that is wanted
	stop      context.CancelCauseFunc // of the fetch
	complete  bool                    // it has brought all of the blob
	authority bool                    // bytes here come, or came, straight from upstream: this node signs them
	aside     bool                    // see standAside
	failure   error                   // of this node as home, for leases that come back
	failedAt  time.Time
	sources   map[string]int64 // bytes by node
	helper    helper
	upSince   time.Time // when upstream's first byte came
	upBytes   int64
	pace      pace
	pieceTook time.Duration // smoothed time of a piece, of any neighbour; 0 = none came
	owed      time.Time     // see oweLocked; zero = neighbours do not hold all that is missing
	signs
}

// neighbour is another node that takes part in the blob.
type neighbour struct {
	l         *link
	size      int64 // as it says; 0 = it does not know
	pieceSize int64
	have      bitmap
	haveN     int       // pieces in have
	flying    int       // requests under way
	busy      time.Time // turned away, ask again then
	load      byte
	took      time.Duration // smoothed time of a piece
	price     float64       // see cost, when it was last thought of
	since     time.Time     // of the last piece, or of the request, when something is under way
	last      time.Time     // a piece came
}

// notBefore keeps the neighbour from being asked again until then, or until a later
// time set before.
func (nb *neighbour) notBefore(t time.Time) {
	if t.After(nb.busy) {
		nb.busy = t
	}
}

// request is a piece asked of a neighbour. Only the link's reader touches buf
// and got until the request is off the link.
type request struct {
	blob   *blob
	nb     *neighbour
	id     uint32
	piece  int
	size   int
	sent   time.Time
	moved  moment // last bytes
	buf    []byte
	got    int
	gaveUp bool // guarded by blob.mu
}

// pace measures how fast pieces come.
type pace struct {
	rate  float64 // bytes per second
	bytes float64
	since time.Time
}

func (p *pace) add(n int, now time.Time) {
	if p.since.IsZero() {
		p.since = now
	}
	p.bytes += float64(n)
	if d := now.Sub(p.since).Seconds(); d >= 0.1 {
		r := p.bytes / d
		if p.rate == 0 {
			p.rate = r
		}
		p.rate += (r - p.rate) / 2
		p.bytes, p.since = 0, now
	}
}

// pause keeps idle time out of the measure.
func (p *pace) pause() { p.bytes, p.since = 0, time.Time{} }

func (p *pace) resume(now time.Time) {
	if p.since.IsZero() {
		p.since = now
	}
}

func newBlob(s *Swarm, id blobID, rng *rand.Rand) *blob {
	b := &blob{
		s: s, id: id, d: id.key.digest(),
		wake: make(chan struct{}, 1), sizedCh: make(chan struct{}), grownCh: make(chan struct{}),
		signers: make(map[string]bool), hinted: make(map[int]time.Time), admitted: make(map[string]string),
		nbrs: make(map[string]*neighbour), slow: make(map[string]time.Time), wants: make(map[int][]*request),
		home: meeting{members: make(map[string]*attendee), idle: make(map[string]time.Time)}, rng: rng,
	}
	b.lastUse.set(time.Now())
	return b
}

// poke makes exchange look what it may ask for. It may be called with or without the
// lock.
func (b *blob) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// grown is closed when the next piece comes, or all can be given.
func (b *blob) grown() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.grownCh
}

// newRand is a random source of its own, for callers without the lock.
func (b *blob) newRand() *rand.Rand {
	b.mu.Lock()
	defer b.mu.Unlock()
	return rand.New(rand.NewPCG(b.rng.Uint64(), 0))
}

// setSize makes the tables once the size is known. A different size later is
// ignored here; the fill refuses it.
func (b *blob) setSize(size int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.setSizeLocked(size)
}

func (b *blob) setSizeLocked(size int64) bool {
	if b.size != 0 {
		return b.size == size
	}
	ps := b.s.cfg.PieceSize(size)
	n := pieceCount(size, ps)
	if n == 0 || n > maxPieces {
		return false
	}
	b.size, b.pieceSize, b.n = size, ps, n
	b.emptyLocked()
	b.sums, b.given, b.avail = make([]*batch, n), make([]uint16, n), make([]uint16, n)
	for _, nb := range b.nbrs {
		b.countLocked(nb, +1)
		b.tellLocked(nb)
	}
	close(b.sizedCh)
	return true
}

// emptyLocked makes the tables of what is here anew, with nothing in them. What was
// given, and which members signed, is kept.
func (b *blob) emptyLocked() {
	b.life++
	b.here, b.have, b.checked = newBitmap(b.n), newBitmap(b.n), newBitmap(b.n)
	b.missing, b.haveN, b.fresh, b.cursor = b.n, 0, 0, 0
	b.bare, b.resigned = nil, nil
}

// sized reports the size, 0 while unknown.
func (b *blob) sized() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.size
}

func (b *blob) pieceLen(i int) int {
	return int(min(b.pieceSize, b.size-int64(i)*b.pieceSize))
}

// fits reports whether a neighbour cuts the blob as this node does.
func (b *blob) fits(nb *neighbour) bool { return nb.size == b.size && nb.pieceSize == b.pieceSize }

// countLocked adds what a neighbour has to avail, or takes it away.
func (b *blob) countLocked(nb *neighbour, by int) {
	if b.size == 0 || !b.fits(nb) {
		return
	}
	for i := range b.n {
		if nb.have.has(i) {
			b.avail[i] = uint16(int(b.avail[i]) + by)
		}
	}
}

// tellLocked sends the neighbour what is here.
func (b *blob) tellLocked(nb *neighbour) {
	o := open{blob: b.id, size: b.size, pieceSize: b.pieceSize, pass: b.pass, have: b.have}
	nb.l.send(o.append)
}

// meet makes the peer of a link a neighbour, unless there is no room.
func (b *blob) meet(l *link) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.meetLocked(l) != nil
}

func (b *blob) meetLocked(l *link) *neighbour {
	if nb, ok := b.nbrs[l.peer]; ok && nb.l == l {
		return nb
	}
	// serve tells of a link's end once, by left, under this lock. A neighbour that came
	// after that with a link that is over would stay forever; left sees those that come
	// before.
	if len(b.nbrs) >= maxNeighbours || l.over() {
		return nil
	}
	if old, ok := b.nbrs[l.peer]; ok {
		b.partLocked(old)
	}
	nb := &neighbour{l: l, busy: b.slow[l.node]}
	b.nbrs[l.peer] = nb
	b.tellLocked(nb)
	l.touch()
	return nb
}

// opened takes in what a peer says it holds.
func (b *blob) opened(l *link, o open) {
	b.mu.Lock()
	nb := b.meetLocked(l)
	if nb == nil {
		b.mu.Unlock()
		l.send(func(p []byte) []byte { return appendClose(p, b.id) })
		return
	}
	b.countLocked(nb, -1)
	nb.size, nb.pieceSize, nb.have, nb.haveN = o.size, o.pieceSize, o.have, o.have.count()
	b.countLocked(nb, +1)
	b.lastUse.set(time.Now())
	b.mu.Unlock()
	b.poke()
}

// adopt takes a blob's size from a member that the home vouches for and that
// gives pieces, when the home does not know it (a fill may not, even if an
// earlier one of the blob found it out). From anybody else it would be hearsay.
func (b *blob) adopt(l *link) {
	b.mu.Lock()
	f, nb := b.fill, b.nbrs[l.peer]
	if f == nil || nb == nil || nb.haveN == 0 || nb.size == 0 || !b.signers[l.peer] || b.size != 0 && !b.fits(nb) {
		b.mu.Unlock()
		return
	}
	size, known := nb.size, b.size != 0
	b.mu.Unlock()
	if known && f.Size() >= 0 {
		return
	}
	switch err := b.fix(f, size); {
	case err == nil:
		b.poke()
	case errors.Is(err, errOtherSize):
		b.s.log.Warn("size of a blob differs", "digest", b.d, "peer", l.node, "err", err)
	default: // of the fill, which may have no room, or hold the manifest against it; it is no fault of the peer's
		b.s.log.Debug("size of a blob was not taken", "digest", b.d, "size", size, "err", err)
	}
}

// haves takes in what a neighbour has got since.
func (b *blob) haves(l *link, h have) {
	b.mu.Lock()
	nb := b.nbrs[l.peer]
	if nb == nil || nb.l != l || nb.size == 0 {
		b.mu.Unlock()
		return
	}
	nb.load = h.load
	fits := b.size != 0 && b.fits(nb)
	n := pieceCount(nb.size, nb.pieceSize)
	news := false
	for _, r := range h.runs {
		for i := int(r.first); i < min(int(r.first+r.count), n); i++ {
			if nb.have.has(i) {
				continue
			}
			nb.have.set(i)
			nb.haveN++
			if fits {
				b.avail[i]++
				news = news || !b.here.has(i)
			}
		}
	}
	b.mu.Unlock()
	if news {
		b.poke()
	}
}

// left drops a peer that no longer takes part, and reports whether it did.
func (b *blob) left(l *link) bool {
	b.mu.Lock()
	nb := b.nbrs[l.peer]
	here := nb != nil && nb.l == l
	if here {
		b.partLocked(nb)
	}
	b.mu.Unlock()
	b.poke()
	return here
}

// partLocked removes a neighbour; what was asked of it is asked elsewhere.
func (b *blob) partLocked(nb *neighbour) {
	b.countLocked(nb, -1)
	delete(b.nbrs, nb.l.peer)
	for _, rs := range b.wants {
		for _, r := range slices.Clone(rs) {
			if r.nb == nb {
				b.giveUpLocked(r)
			}
		}
	}
}

// giveUpLocked stops waiting for a request; calling it again does nothing. The buffer is left to
// the collector: the link's reader may be in the middle of reading into it.
func (b *blob) giveUpLocked(r *request) {
	if r.gaveUp {
		return
	}
	r.gaveUp = true
	r.nb.flying--
	b.flying--
	rs := slices.DeleteFunc(b.wants[r.piece], func(o *request) bool { return o == r })
	if len(rs) == 0 {
		delete(b.wants, r.piece)
	} else {
		b.wants[r.piece] = rs
	}
	b.s.flying.Add(int64(-r.size))
	if !r.moved.get().After(r.sent) {
		b.s.budget.giveBack(r.size)
	}
	if r.nb.l.forget(r.id) != nil {
		r.nb.l.send(func(p []byte) []byte { return answer{id: r.id}.append(p, frameCancel) })
	}
}

// failed is called by the link, which has forgotten the request, when it will not be answered:
// the neighbour said that the piece is gone, is busy with other things, or has itself gone.
func (b *blob) failed(r *request, gone bool) {
	b.s.buffers.put(r.buf)
	b.mu.Lock()
	b.giveUpLocked(r)
	if gone && b.nbrs[r.nb.l.peer] == r.nb && r.nb.have.has(r.piece) && b.fits(r.nb) {
		// It said it had the piece. Do not believe it again for this one.
		r.nb.have[r.piece>>3] &^= 0x80 >> (r.piece & 7)
		b.avail[r.piece]--
		r.nb.haveN--
	}
	b.mu.Unlock()
	b.poke()
}

// busy is a neighbour's word that it will not serve this request now.
func (b *blob) busy(r *request, a answer) {
	now := time.Now()
	pause := time.Duration(min(a.delay, 1000)) * time.Millisecond
	b.failed(r, false)
	b.mu.Lock()
	if !b.takeHintLocked(r.nb, a.hint, now) {
		r.nb.notBefore(now.Add(pause))
	}
	b.mu.Unlock()
	time.AfterFunc(pause, b.poke)
}

// takeHintLocked asks a busy neighbour for the piece that it would give at once, if that
// is missing here and not asked for yet.
func (b *blob) takeHintLocked(nb *neighbour, hint uint32, now time.Time) bool {
	if b.fill == nil || hint >= uint32(b.n) {
		return false
	}
	i := int(hint)
	return !b.here.has(i) && b.within(i) && b.wants[i] == nil && nb.flying < perPeer && nb.have.has(i) && b.ask(nb, i, now)
}

// received checks a whole piece and gives it to the fill. It runs on the link's
// reader, so a peer that sends faster than this node can check and write is
// held back by its own connection.
func (b *blob) received(r *request) {
	defer b.s.buffers.put(r.buf)
	now := time.Now()
	b.mu.Lock()
	by, known := b.proofLocked(r.piece)
	f, done, life := b.fill, b.here.has(r.piece), b.life
	b.writing++ // overtaken must not take the fill for untouched
	b.mu.Unlock()
	defer b.wrote()
	switch {
	case f == nil || done:
	case !known:
		b.s.log.Debug("piece came without a digest that counts", "digest", b.d, "peer", r.nb.l.node)
		b.mu.Lock()
		b.unproved = now
		r.nb.notBefore(now.Add(vouchWait))
		b.mu.Unlock()
	default:
		err := b.write(f, r, by)
		if err == nil {
			b.took(r, life, now)
			return
		}
		if errors.Is(err, ErrWrongPiece) {
			b.s.ban(r.nb.l, banDigest)
		} else {
			b.s.log.Warn("piece was not taken", "digest", b.d, "err", err)
		}
	}
	b.mu.Lock()
	b.giveUpLocked(r)
	b.mu.Unlock()
	b.poke()
}

// wrote ends what received began: no byte of the piece is written any more.
func (b *blob) wrote() {
	b.mu.Lock()
	b.writing--
	b.mu.Unlock()
}

// write gives a piece to the fill if it is right.
func (b *blob) write(f Fill, r *request, by proof) error {
	if by.linked {
		return f.WritePiece(r.nb.l.node, r.piece, r.buf, by.from, by.to)
	}
	if sha256.Sum256(r.buf) != by.to {
		return ErrWrongPiece
	}
	_, err := f.From(r.nb.l.node).WriteAt(r.buf, int64(r.piece)*b.pieceSize)
	return err
}

// took notes that a piece is written, unless all that was here has been given up since lives
// returned life: the fill that has it is not that of the fetch under way, if there is one.
func (b *blob) took(r *request, life int, now time.Time) {
	b.mu.Lock()
	defer b.poke()
	defer b.mu.Unlock()
	b.giveUpLocked(r)
	if b.life != life {
		return
	}
	nb := r.nb
	d := now.Sub(r.sent)
	if nb.took == 0 {
		nb.took = d
	}
	nb.took += (d - nb.took) / 4
	if b.pieceTook == 0 {
		b.pieceTook = d
	}
	b.pieceTook += (d - b.pieceTook) / 8
	nb.since = now
	nb.last, b.came = now, now
	if !b.owed.IsZero() {
		b.owed = now
	}
	b.sources[nb.l.node] += int64(r.size)
	b.pace.add(r.size, now)
	for _, twin := range slices.Clone(b.wants[r.piece]) {
		b.giveUpLocked(twin)
	}
	b.gotLocked(r.piece)
	if b.n == 1 {
		b.offerLocked(r.piece) // it matched the blob's own digest
	}
	if !b.authority { // else some of it may have come from upstream at the same time
		b.checked.set(r.piece)
	}
}

// gotLocked notes that a piece is here.
func (b *blob) gotLocked(i int) {
	if b.here.has(i) {
		return
	}
	b.here.set(i)
	b.missing--
	b.growLocked()
	switch {
	case b.ahead > 0: // it is gone in a moment
	case b.sums[i] != nil:
		b.offerLocked(i)
	default:
		b.bare = append(b.bare, i)
	}
}

func (b *blob) growLocked() {
	close(b.grownCh)
	b.grownCh = make(chan struct{})
}

// offerLocked makes a piece that is here and has a digest known to neighbours,
// soon.
func (b *blob) offerLocked(i int) {
	if b.have.has(i) || b.ahead > 0 {
		return
	}
	b.have.set(i)
	b.haveN++
	if b.given[i] == 0 {
		b.fresh++
	}
	if b.wholeLocked() {
		b.growLocked()
	}
	b.dirty = append(b.dirty, i)
	if !b.flushing {
		b.flushing = true
		time.AfterFunc(max(0, coalesce-time.Since(b.flushed)), b.flush)
	}
}

// flush pushes the coalesced haves. A neighbour is not told of what it has
// itself: it could neither ask for it nor count it.
func (b *blob) flush() {
	load := b.s.uploads.load()
	b.mu.Lock()
	defer b.mu.Unlock()
	slices.Sort(b.dirty)
	dirty := b.dirty
	b.dirty, b.flushing, b.flushed = nil, false, time.Now()
	var buf []int
	for _, nb := range b.nbrs {
		buf = buf[:0]
		for _, i := range dirty {
			if !nb.have.has(i) || !b.fits(nb) {
				buf = append(buf, i)
			}
		}
		if runs := runsOf(buf); len(runs) > 0 {
			nb.l.send(have{blob: b.id, load: load, runs: runs}.append)
		}
	}
}

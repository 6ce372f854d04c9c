package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// castagnoli has hardware support on amd64 and arm64: about ten times SHA-256.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// readBlock is the buffer size of everything that reads blobs back to hash
// them.
const readBlock = 128 << 10

// fill is the one running fetch of a blob. It belongs to the cache: clients
// come and go as readers and change nothing for each other (I3).
type fill struct {
	c       *Cache
	digest  digest.Digest
	src     Source
	giver   string // of src
	started time.Time

	sized  chan struct{} // closed when the size and the file are there
	broken chan struct{} // closed when err is set
	done   chan struct{} // closed when the outcome is final and booked

	mu      sync.Mutex // guards everything below; never held across I/O (I10)
	before  int        // mismatches before this fill
	freed   *sync.Cond // a piece is no longer being written, or sizing ended
	sizing  bool       // resume looks for files, or a SetSize makes them
	pieces  *pieces    // nil until sized
	file    *os.File   // nil until sized; closed when refs reaches 0
	refs    int        // the running fill and each open reader
	record  *pieceMap  // nil when the map cannot be written
	busy    map[int]struct{}
	origins map[Origin]int64
	first   Origin              // whose bytes came first
	asked   bool                // the source has been called
	torn    bool                // since then, a claimed piece turned out to be missing
	good    bool                // the whole digest matched: the last piece may be shown
	links   map[int]link        // of whole pieces that the digest has not come to yet
	chain   [][sha256.Size]byte // chaining values at the starts of pieces, as far as the digest has come
	watched bool                // somebody asks for chain
	err     error               // why the fill ended without the blob
	unkept  error               // why a verified blob was not committed
	stop    context.CancelFunc
	readers map[*Reader]struct{}
	waiters map[*waiter]struct{}
	changed chan struct{} // nil while nobody asked for it
}

// givenBy reports whether the bytes are giver's, or come for anybody.
func (f *fill) givenBy(giver string) bool { return giver == "" || giver == f.giver }

// waiter is somebody blocked until the byte at off is there.
type waiter struct {
	off    int64
	view   view
	reader bool          // counts for Wanted
	ready  chan struct{} // buffered: one wake-up is never lost
}

func newFill(c *Cache, d digest.Digest, src Source, mismatches int) *fill {
	f := &fill{
		c: c, digest: d, src: src, giver: giverOf(src), before: mismatches, started: time.Now(), refs: 1, sizing: true,
		sized: make(chan struct{}), broken: make(chan struct{}), done: make(chan struct{}),
		busy: map[int]struct{}{}, origins: map[Origin]int64{}, links: map[int]link{},
		readers: map[*Reader]struct{}{}, waiters: map[*waiter]struct{}{},
	}
	f.freed = sync.NewCond(&f.mu)
	return f
}

// run fetches, verifies and commits. It returns when the source and every
// other goroutine of the fill are gone; the outcome is final (done is closed)
// as soon as it is known, so that a source that lingers delays only Run.
func (f *fill) run(ctx context.Context) {
	defer f.release()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f.mu.Lock()
	f.stop = cancel
	f.mu.Unlock()
	defer context.AfterFunc(ctx, func() { f.fail(ErrClosed) })()

	f.resume()
	var parts sync.WaitGroup
	parts.Go(func() { f.fetch(ctx) })
	parts.Go(f.settleClaims)
	err := f.verify()
	if err == nil {
		cancel()
		f.finish(f.commit(), true)
	} else {
		f.finish(err, false)
	}
	parts.Wait()
}

// fetch runs the source until every byte is there or it gives up. Bytes that
// an earlier process left may be all that is needed, whatever the source says.
func (f *fill) fetch(ctx context.Context) {
	var err error
	for f.lacks() || f.waitClaims() == nil && f.lacks() {
		if err != nil || !f.again() {
			f.fail(f.cut(err))
			return
		}
		if err = f.src.Fetch(ctx, &Fill{f}); ctx.Err() != nil {
			err = ErrClosed // whatever the source made of it
		}
	}
}

// lacks reports whether bytes are missing that nobody has claimed.
func (f *fill) lacks() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return false
	}
	if f.pieces == nil {
		return true
	}
	_, _, missing := f.pieces.missing(0)
	return missing
}

// again reports whether the source is to be called: once, and once more after
// bytes that seemed to be there turned out to be torn.
func (f *fill) again() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	again := !f.asked || f.torn
	f.asked, f.torn = true, false
	return again
}

// cut says why bytes are missing now that the source has ended with err.
func (f *fill) cut(err error) error {
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pieces == nil {
		return fmt.Errorf("source ended without a size: %w", io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("source ended after %d of %d bytes: %w", f.pieces.bytes(), f.pieces.size, io.ErrUnexpectedEOF)
}

// fail ends the fill with err, unless it has ended or all its bytes have been
// verified, and wakes everybody.
func (f *fill) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil || f.good {
		return
	}
	f.err = &FillError{Digest: f.digest, Err: err}
	close(f.broken)
	if f.stop != nil {
		f.stop()
	}
	f.wakeAll()
}

// wakeAll wakes every waiter. f.mu is held.
func (f *fill) wakeAll() {
	for w := range f.waiters {
		w.wake()
	}
	f.freed.Broadcast()
	f.notify()
}

func (w *waiter) wake() {
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

// wake wakes those who wait for a byte in [from, to). f.mu is held.
func (f *fill) wake(from, to int64) {
	for w := range f.waiters {
		if from <= w.off && w.off < to {
			w.wake()
		}
	}
}

// notify wakes those who wait on Changed. f.mu is held.
func (f *fill) notify() {
	if f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
}

// Changed returns a channel that is closed at the next change: the size known,
// a piece complete, a reader blocked or moved on to another piece, the end of
// the fill. Take it before looking, so that no change is missed.
func (f *fill) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.changed == nil {
		f.changed = make(chan struct{})
	}
	return f.changed
}

// Digest returns what is being fetched.
func (f *fill) Digest() digest.Digest { return f.digest }

// SetSize announces the blob's size. The first call decides: room is made on
// disk, and readers get going. It returns an error satisfying ErrNoRoom when
// the disk cannot take the blob. A size that differs from an earlier one, or 0
// for any digest but that of no bytes, fails the fill with ErrSizeMismatch.
// Equal repeats are free.
func (f *fill) SetSize(n int64) error {
	// Nothing could be held back of an empty blob (I2).
	if n < 0 || n == 0 && f.digest != f.digest.Algorithm().FromBytes(nil) {
		err := fmt.Errorf("size %d: %w", n, ErrSizeMismatch)
		f.fail(err)
		return err
	}
	first, err := f.claimSizing(n)
	if !first {
		if errors.Is(err, ErrSizeMismatch) {
			f.fail(err)
		}
		return err
	}
	file, record, err := f.makeIngest(n)
	if err != nil {
		f.adopt(nil, nil, nil)
		f.fail(err)
		return err
	}
	f.adopt(newPieces(n), file, record)
	return nil
}

// claimSizing reports whether the caller is the one that makes room for n
// bytes; otherwise err says whether n agrees with what is known.
func (f *fill) claimSizing(n int64) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.sizing && f.err == nil {
		f.freed.Wait()
	}
	switch {
	case f.err != nil:
		return false, f.err
	case f.pieces == nil:
		f.sizing = true
		return true, nil
	case f.pieces.size != n:
		return false, fmt.Errorf("%d bytes, not %d: %w", n, f.pieces.size, ErrSizeMismatch)
	}
	return false, nil
}

// adopt ends sizing, with the files of a sized fill or with nothing.
func (f *fill) adopt(p *pieces, file *os.File, record *pieceMap) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sizing = false
	if p != nil {
		f.pieces, f.file, f.record = p, file, record
		close(f.sized)
	}
	f.wakeAll()
}

// Size returns the blob's size, -1 while it is unknown.
func (f *fill) Size() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pieces == nil {
		return -1
	}
	return f.pieces.size
}

// PieceSize returns PieceSize of the blob's size, 0 while that is unknown.
func (f *fill) PieceSize() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pieces == nil {
		return 0
	}
	return f.pieces.piece
}

// Pieces returns the number of pieces, 0 while the size is unknown.
func (f *fill) Pieces() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pieces == nil {
		return 0
	}
	return f.pieces.count()
}

// Has reports whether every byte of piece i is on disk. Even if the last piece
// is, readers may not see it yet (I2).
func (f *fill) Has(i int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pieces != nil && i >= 0 && i < f.pieces.count() && f.pieces.full(i)
}

// Missing returns the first run of absent bytes at or after off; ok is false
// when there is none. start is where a write may begin, so it may lie before
// off, inside off's own piece. end is where the next present byte is, or the
// size. Bytes that an earlier process recorded and that are being re-checked
// are not missing.
func (f *fill) Missing(off int64) (start, end int64, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pieces == nil {
		return 0, 0, false
	}
	return f.pieces.missing(off)
}

// ReadAt reads bytes that are there, including those of the last piece: for a
// Source that passes pieces on to others, who check each by a digest of its
// own. It fails with ErrMissing where a byte is not there, and must not be
// called after Fetch has returned.
func (f *fill) ReadAt(p []byte, off int64) (int, error) {
	select {
	case <-f.sized:
	default:
		return 0, ErrMissing
	}
	n, err := f.visible(off, int64(len(p)), viewPieces)
	if err == nil && n < int64(len(p)) {
		err = ErrMissing
	}
	if err != nil {
		return 0, err
	}
	return f.file.ReadAt(p, off)
}

// Wanted returns where bytes are needed most: the lowest offset a reader is
// blocked on, else the slowest reader's cursor, else the first missing byte.
func (f *fill) Wanted() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.wanted()
}

// wanted is Wanted with f.mu held.
func (f *fill) wanted() int64 {
	best := int64(-1)
	lower := func(off int64) {
		if off >= 0 && (best < 0 || off < best) {
			best = off
		}
	}
	for w := range f.waiters {
		if w.reader {
			lower(w.off)
		}
	}
	if best >= 0 {
		return best
	}
	for r := range f.readers {
		if off := r.cursor.Load(); f.pieces != nil && off < f.pieces.size {
			lower(off)
		}
	}
	if best < 0 && f.pieces != nil {
		best, _, _ = f.pieces.missing(0)
	}
	return max(best, 0)
}

// write is WriteAt for one origin. l, if any, is what p was checked by.
func (f *fill) write(p []byte, off int64, from Origin, l *link) (int, error) {
	written := 0
	for {
		n, err := f.writePiece(p[written:], off+int64(written), from, l)
		written += n
		if err != nil || written == len(p) {
			return written, err
		}
	}
}

// writePiece is write for the part of p that belongs to off's piece.
func (f *fill) writePiece(p []byte, off int64, from Origin, l *link) (int, error) {
	g, err := f.grab(p, off)
	if err != nil || len(g.data) == 0 {
		return g.skip, f.reject(err)
	}
	sum := crc32.Update(g.sum, castagnoli, g.data)
	err = f.c.writeBlob(f, g.data, g.off)
	if err == nil && g.full && g.record != nil {
		g.record.put(g.piece, sum)
	}
	f.settleWrite(g, sum, from, l, err)
	if err != nil {
		return g.skip, f.reject(err)
	}
	f.c.metrics.fetched(from.Kind, len(g.data))
	return g.skip + len(g.data), nil
}

// reject fails the fill with a writer's error, unless the mistake is only a
// write in the wrong place.
func (f *fill) reject(err error) error {
	if err != nil && !errors.Is(err, errGap) {
		f.fail(err)
	}
	return err
}

// errGap tells a writer that it must begin earlier in its piece.
var errGap = errors.New("write would leave a gap in its piece")

// grabbed is the exclusive right to append data to one piece.
type grabbed struct {
	piece  int
	skip   int // bytes of the caller's that were there already
	data   []byte
	off    int64 // where data goes
	sum    uint32
	full   bool // data completes the piece
	record *pieceMap
}

// grab waits for its turn at off's piece and takes the part of p that is not
// there yet (I11).
func (f *fill) grab(p []byte, off int64) (grabbed, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.writable(len(p), off); err != nil || len(p) == 0 {
		return grabbed{}, err
	}
	i := f.pieces.at(off)
	for f.occupied(i) {
		f.freed.Wait()
	}
	if f.err != nil {
		return grabbed{}, f.err
	}
	present, end := f.pieces.present(i), f.pieces.start(i)+f.pieces.length(i)
	if off > present {
		return grabbed{}, fmt.Errorf("write %s at %d, piece %d has bytes up to %d: %w", f.digest, off, i, present, errGap)
	}
	mine := p[:min(int64(len(p)), end-off)]
	g := grabbed{piece: i, skip: int(min(present-off, int64(len(mine)))), off: present, sum: f.pieces.sum[i], record: f.record}
	g.data = mine[g.skip:]
	if len(g.data) > 0 {
		g.full = present+int64(len(g.data)) == end
		f.busy[i] = struct{}{}
	}
	return g, nil
}

// occupied reports whether a writer of piece i must wait. f.mu is held.
func (f *fill) occupied(i int) bool {
	_, busy := f.busy[i]
	return f.err == nil && (busy || f.pieces.claimed[i])
}

// writable checks a write of n bytes at off. f.mu is held.
func (f *fill) writable(n int, off int64) error {
	switch {
	case f.err != nil:
		return f.err
	case f.pieces == nil:
		return fmt.Errorf("write %s before its size is known: %w", f.digest, errGap)
	case off < 0 || off > f.pieces.size || int64(n) > f.pieces.size-off:
		return fmt.Errorf("%d bytes at %d of %d: %w", n, off, f.pieces.size, ErrSizeMismatch)
	}
	return nil
}

// settleWrite gives the piece back and shows what was written.
func (f *fill) settleWrite(g grabbed, sum uint32, from Origin, l *link, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.busy, g.piece)
	f.freed.Broadcast()
	if err != nil {
		return
	}
	if f.first == (Origin{}) {
		f.first = from
	}
	f.credit(from, int64(len(g.data)))
	if l != nil && int64(len(g.data)) == f.pieces.length(g.piece) { // else other bytes are in it than were checked
		f.links[g.piece] = *l
	}
	complete := f.pieces.grow(g.piece, int64(len(g.data)), sum)
	f.wake(g.off, g.off+int64(len(g.data)))
	if complete {
		f.notify()
	}
}

// maxOrigins bounds what a fill remembers of where its bytes came from.
const maxOrigins = 64

// credit books n bytes to from. f.mu is held.
func (f *fill) credit(from Origin, n int64) {
	if _, known := f.origins[from]; !known && len(f.origins) >= maxOrigins {
		from.Name = "other"
	}
	f.origins[from] += n
}

// Mismatches returns how many fills of this digest in a row, no longer than ten
// minutes ago, ended with bytes that did not match it. Whoever brought them should
// not be trusted with it now.
func (f *fill) Mismatches() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.before
}

// RaiseMismatches says that at least that many fills of this digest have ended with
// wrong bytes, here or on other nodes, so that a mismatch of this one counts as the
// next.
func (f *fill) RaiseMismatches(times int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before = max(f.before, times)
}

// verify follows the digest along the contiguous prefix as it grows, reading
// back from the page cache what was not checked by links, and returns nil when
// the whole digest matched.
func (f *fill) verify() error {
	select {
	case <-f.sized:
	case <-f.broken:
	}
	p := newPrefix(f)
	for {
		n, err := f.waitPrefix(p.off)
		if err != nil {
			return err
		}
		if n == 0 {
			return f.judge(p.matches())
		}
		if err := p.advance(p.off + n); err != nil {
			f.fail(fmt.Errorf("read back: %w", errors.Join(ErrNoRoom, err)))
			return f.failure()
		}
	}
}

// hashRange feeds n bytes of file at off to h.
func hashRange(h hash.Hash, file io.ReaderAt, buf []byte, off, n int64) error {
	got, err := io.CopyBuffer(h, io.NewSectionReader(file, off, n), buf)
	if err == nil && got < n {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// judge ends the fill by its whole digest. Only then does the last piece show.
func (f *fill) judge(matches bool) error {
	if !matches {
		f.fail(ErrDigestMismatch)
		return f.failure()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return f.err
	}
	f.good = true
	f.wakeAll()
	return nil
}

// failure returns why the fill ended, nil while it has not.
func (f *fill) failure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// waitPrefix waits until the contiguous prefix reaches beyond off and returns
// by how much; 0 when off is the size.
func (f *fill) waitPrefix(off int64) (int64, error) {
	w := &waiter{off: off, ready: make(chan struct{}, 1)}
	for {
		f.mu.Lock()
		delete(f.waiters, w)
		if f.err != nil {
			defer f.mu.Unlock()
			return 0, f.err
		}
		if end := f.pieces.prefix(); end > off || end == f.pieces.size {
			f.mu.Unlock()
			return end - off, nil
		}
		f.waiters[w] = struct{}{}
		f.mu.Unlock()
		<-w.ready
	}
}

// attach makes a reader of a fill that is still alive. The caller holds the
// cache's lock, under which a fill is booked out.
func (f *fill) attach() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil || f.refs == 0 {
		return false
	}
	f.refs++
	return true
}

// release gives back one hold on the fill's file; the last one closes it.
func (f *fill) release() {
	f.mu.Lock()
	f.refs--
	file := f.file
	if f.refs > 0 || file == nil {
		f.mu.Unlock()
		return
	}
	f.file = nil
	f.mu.Unlock()
	if err := file.Close(); err != nil {
		f.c.log.Debug("close fill", "digest", f.digest, "err", err)
	}
}

// enter and leave keep the list of readers whose cursors count.
func (f *fill) enter(r *Reader) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.readers[r] = struct{}{}
	f.notify()
}

func (f *fill) leave(r *Reader) {
	f.mu.Lock()
	delete(f.readers, r)
	f.notify()
	f.mu.Unlock()
	f.release()
}

// moved tells Changed that a reader's cursor went on to another piece.
func (f *fill) moved() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.notify()
}

// visible returns how many bytes, at most limit, a reader may have from off on:
// those present, and not in the last piece (I2) unless it may see that.
func (f *fill) visible(off, limit int64, v view) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil && errors.Is(f.err, ErrDigestMismatch) {
		return 0, f.err
	}
	if n := f.pieces.run(off, limit, f.shows(v)); n > 0 {
		return n, nil
	}
	return 0, f.err
}

// shows reports whether a reader may see the last piece now. f.mu is held.
func (f *fill) shows(v view) bool {
	switch v {
	case viewPieces:
		return true
	case viewPart:
		return f.good || f.pieces.prefix() < f.pieces.start(f.pieces.last())
	default:
		return f.good
	}
}

// await blocks until a reader may have the byte at off.
func (f *fill) await(ctx context.Context, off int64, v view) error {
	w := &waiter{off: off, view: v, reader: true, ready: make(chan struct{}, 1)}
	defer f.forget(w)
	for {
		if n, err := f.visible(off, 1, v); n > 0 || err != nil {
			return err
		}
		if f.enlist(w) {
			continue
		}
		if err := wait(ctx, w.ready); err != nil {
			return err
		}
	}
}

// enlist adds w to the waiters unless what it waits for has come meanwhile.
func (f *fill) enlist(w *waiter) (come bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil || f.pieces.run(w.off, 1, f.shows(w.view)) > 0 {
		return true
	}
	if _, there := f.waiters[w]; !there {
		f.waiters[w] = struct{}{}
		f.notify()
	}
	return false
}

func (f *fill) forget(w *waiter) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.waiters, w)
}

// waitClaims waits until every recorded piece has been re-read.
func (f *fill) waitClaims() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.err == nil && f.pieces != nil && f.pieces.claims > 0 {
		f.freed.Wait()
	}
	return f.err
}

// settleClaims re-reads the pieces that an earlier process recorded, those
// that are wanted first, and keeps the ones whose checksum still holds (I6).
func (f *fill) settleClaims() {
	buf := make([]byte, readBlock)
	for {
		i, from, n, ok := f.nextClaim()
		if !ok {
			return
		}
		sum := crc32.New(castagnoli)
		err := hashRange(sum, f.file, buf, from, n)
		f.settleClaim(i, err == nil, sum.Sum32())
	}
}

func (f *fill) nextClaim() (i int, from, n int64, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil || f.pieces == nil || f.pieces.claims == 0 {
		return 0, 0, 0, false
	}
	i, ok = f.pieces.nextClaim(f.wanted())
	return i, f.pieces.start(i), f.pieces.length(i), ok
}

func (f *fill) settleClaim(i int, read bool, sum uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	good := read && sum == f.pieces.sum[i]
	f.pieces.settle(i, good)
	f.torn = f.torn || !good
	from := f.pieces.start(i)
	f.wake(from, from+f.pieces.length(i))
	f.freed.Broadcast()
	f.notify()
}

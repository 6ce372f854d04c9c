// Package cache keeps content-addressed blobs on a node's disk: it serves the
// blobs it has, lets any number of readers share the one fill of a blob it
// lacks, and shows bytes while they arrive.
//
// The promise: a byte that a Reader returns was either part of a blob whose
// whole digest has matched, or was written by a source that vouched for it. The
// last piece of a blob is not shown before the whole digest matched, except to
// callers that read a part (Reader.ForPart) or check each piece themselves
// (LookupPieces). Nothing here is precious. The directory may be deleted, the
// process killed, the disk filled or torn at any moment: the cache heals,
// forgets or says ErrNoRoom, and never serves garbage. DESIGN.md states the
// invariants.
//
// It is not a content store: what is in it may vanish at any time.
package cache

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// Options configure a Cache. Only Dir is required.
type Options struct {
	// Dir holds everything; it is made if need be, readable only to its owner.
	Dir string
	// MaxBytes bounds blobs and running fills together; the zero Limit does not.
	MaxBytes Limit
	// MinFree is what the cache leaves free on Dir's file system, whoever fills
	// it: it shrinks to nothing rather than be the reason why kubelet evicts
	// pods.
	MinFree Limit
	// ScrubInterval is how long one re-hash of everything takes; 0 means never.
	ScrubInterval time.Duration
	// Logger is slog.Default() if nil, Registerer registers nothing if nil.
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// Keep tells how valuable a blob is. It is called often, without locks, and
	// should not do I/O. Nil means that all are equal.
	Keep func(digest.Digest) KeepHint
	// Events are called without locks, in order for each digest.
	Events Events
}

// KeepHint orders eviction before age does.
type KeepHint int

// What a blob is worth: one that the runtime also holds goes first, the last
// copy in the cluster goes last.
const (
	EvictFirst KeepHint = iota - 1
	Normal
	EvictLast
)

// Events tell others what this node can serve. Nil functions are skipped.
// Removing is called while a pull waits for room, so none of them should wait
// for a network.
type Events struct {
	// Committed is called after a blob has become durable.
	Committed func(d digest.Digest, size int64)
	// Mismatched is called after a fill ended with bytes that do not match its digest,
	// as the latest of that many in a row (see Fill.Mismatches), and before the next
	// begins.
	Mismatched func(d digest.Digest, times int)
	// Removing is called before a blob is unlinked, and the unlink waits for
	// its return: nobody is left believing in a blob that is gone.
	Removing func(d digest.Digest)
	// Renewed is called when another metadata file, most often an empty one, takes the
	// place of the open one: facts that were written have to be written again, and whatever
	// was beside it in the directory may be gone too. Until it returns, Meta knows nothing
	// that is in the file, and no other file takes its place.
	Renewed func()
}

// Cache is the blobs of one directory, which it owns alone.
type Cache struct {
	opts    Options
	dir     layout
	log     *slog.Logger
	metrics *metrics
	meta    *Meta
	// faults is called before each step on disk; an error fails the step. Only
	// tests set it.
	faults  func(step, digest.Digest) error
	statfs  func() (total, free int64, err error)
	syncfs  func() error
	started chan struct{}  // closed when Run begins
	booked  chan struct{}  // says that metadata is to be written soon; buffered
	fills   sync.WaitGroup // running fills; added to under mu while running
	// suspects wait for investigate; buffered
	suspects chan digest.Digest

	mu         sync.Mutex // guards everything below; never held across I/O or callbacks (I10)
	state      state
	runCtx     context.Context // Run's; what fills live by
	blobs      map[digest.Digest]*blob
	lru        *list.List // of *blob, most recently used first; none that is being removed
	filling    map[digest.Digest]*fill
	idle       map[digest.Digest]idleIngest
	pins       map[digest.Digest]int
	mismatches map[digest.Digest]mismatches
	used       int64 // bytes of blobs, idle ingests and reservations
	reserved   int64 // of which running fills, which may not be evicted
	pinned     int64 // of which pinned blobs, which may not either
	unbacked   int64 // of which the file system has not set aside yet
	clock      int64 // seconds; never goes back
}

type state int

const (
	idle state = iota
	running
	stopped
)

// blob is a committed blob.
type blob struct {
	digest digest.Digest
	size   int64
	used   int64         // Cache.clock at the last hit
	dirty  bool          // used is not in the metadata yet
	place  *list.Element // nil while being removed
	givers []string      // those of the metadata that were asked for
	busy   chan struct{} // not nil while being announced or removed; closed after
}

// idleIngest is what is left of a fill after an earlier process ended or a
// source failed.
type idleIngest struct {
	size int64
	when time.Time
	gone chan struct{} // not nil while its files are being deleted; closed after
}

// New opens the cache in opts.Dir and finds out what is there. It starts nothing:
// hits can be served at once, fills wait for Run. The error says what to do when
// the directory cannot be used or belongs to another process.
func New(opts Options) (*Cache, error) {
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	c := &Cache{
		opts: opts, dir: layout(opts.Dir), log: opts.Logger, started: make(chan struct{}), booked: make(chan struct{}, 1),
		suspects: make(chan digest.Digest, maxSuspects),
		blobs:    map[digest.Digest]*blob{}, lru: list.New(), filling: map[digest.Digest]*fill{},
		idle: map[digest.Digest]idleIngest{}, pins: map[digest.Digest]int{}, mismatches: map[digest.Digest]mismatches{},
	}
	c.statfs = func() (int64, int64, error) { return statfs(opts.Dir) }
	c.syncfs = func() error { return syncfs(opts.Dir) }
	if err := c.dir.check(); err != nil {
		return nil, err
	}
	meta, err := openMeta(c.dir.metadata(), opts.Logger)
	if err != nil {
		return nil, err
	}
	c.meta, meta.db.holds, meta.db.renewed = meta, c.Has, opts.Events.Renewed
	c.recover()
	if c.metrics, err = newMetrics(opts.Registerer, c); err != nil {
		return nil, errors.Join(fmt.Errorf("register cache metrics: %w", err), meta.close())
	}
	return c, nil
}

// Run lets fills run, and evicts, scrubs and writes metadata, until ctx ends. Then it ends the
// running fills with ErrClosed (their pieces stay for the next start) and returns when every
// goroutine is gone. It ends by itself, with an error, when the directory was deleted in a way
// that only a new process can recover from. It runs once.
func (c *Cache) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if err := c.start(ctx); err != nil {
		return err
	}
	var parts sync.WaitGroup
	var failed error
	parts.Go(func() { failed = c.tend(ctx); stop() })
	parts.Go(func() { c.scrub(ctx) })
	parts.Go(func() { c.investigate(ctx) })
	<-ctx.Done()
	c.mu.Lock()
	c.state = stopped
	c.mu.Unlock()
	parts.Wait()
	c.fills.Wait()
	c.flush()
	return failed
}

func (c *Cache) start(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != idle {
		return fmt.Errorf("run a cache twice: %w", ErrClosed)
	}
	c.state, c.runCtx = running, ctx
	close(c.started)
	return nil
}

// Close releases the directory. Run must have returned, if it was called.
// Readers stay usable.
func (c *Cache) Close() error {
	c.mu.Lock()
	c.state = stopped
	c.mu.Unlock()
	c.flush()
	return c.meta.close()
}

// Open returns a reader of d. A committed blob is a hit; one that is being filled is joined;
// otherwise src starts THE fill, which outlives this caller and ends only with Run. Open waits,
// until ctx ends, for the size to be known. The reader waits for bytes by the same ctx.
//
// An error satisfies ErrNoRoom when this disk cannot take the blob, or has it from elsewhere
// (ErrForeign), and the blob has to be passed through; and ErrClosed when the cache no longer runs
// (before Run, a fill waits for it). It is a *FillError when the fill failed, and wraps
// fs.ErrNotExist when src is nil and the blob is not here.
func (c *Cache) Open(ctx context.Context, d digest.Digest, src Source) (*Reader, error) {
	if err := checkDigest(d); err != nil {
		return nil, err
	}
	r, f, joined, err := c.find(ctx, d, src)
	if f != nil {
		return f.open(ctx, joined)
	}
	return r, err
}

// find returns a reader of the committed blob, or a hold on the fill to join.
func (c *Cache) find(ctx context.Context, d digest.Digest, src Source) (r *Reader, f *fill, joined bool, err error) {
	giver := giverOf(src)
	for r == nil && f == nil && err == nil {
		var b *blob
		if b, f = c.peek(d, true); f != nil {
			if !f.givenBy(giver) {
				f.release()
				return nil, nil, false, foreign(d)
			}
			return nil, f, true, nil
		}
		if b != nil {
			if !c.gave(b, giver) {
				return nil, nil, false, foreign(d)
			}
			r, err = c.openBlob(ctx, b)
			continue
		}
		if src == nil {
			return nil, nil, false, fmt.Errorf("open %s: %w", d, fs.ErrNotExist)
		}
		if err = wait(ctx, c.started); err != nil {
			break
		}
		var over <-chan struct{}
		if f, over, err = c.startFill(d, src); over != nil {
			err = wait(ctx, over)
		}
	}
	return r, f, false, err
}

// wait waits for done, or returns why ctx ended.
func wait(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// peek looks d up. A hit counts as use if touch.
func (c *Cache) peek(d digest.Digest, touch bool) (*blob, *fill) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b := c.blobs[d]; b != nil {
		if touch && b.place != nil {
			b.used, b.dirty = c.now(), true
			c.lru.MoveToFront(b.place)
		}
		return b, nil
	}
	f := c.filling[d]
	if f == nil || !f.attach() {
		return nil, nil
	}
	if touch {
		c.metrics.joined.Inc()
	}
	return nil, f
}

// now returns a number of seconds that no clock jump takes back. c.mu is held.
func (c *Cache) now() int64 {
	c.clock = max(c.clock, time.Now().Unix())
	return c.clock
}

// openBlob opens a committed blob; it returns neither reader nor error when
// the file turned out to be gone and has been booked out.
func (c *Cache) openBlob(ctx context.Context, b *blob) (*Reader, error) {
	file, err := c.openFile(b)
	switch {
	case err == nil:
		return newReader(b.digest, b.size, nil, file), nil
	case lost(err), errors.Is(err, ErrSizeMismatch):
		c.log.Debug("committed blob is not what it was", "digest", b.digest, "err", err)
		return nil, c.drop(ctx, b, reasonLost)
	}
	return nil, noRoom(err) // out of file descriptors, say
}

// openFile opens b's file if it still has b's size.
func (c *Cache) openFile(b *blob) (*os.File, error) {
	file, err := os.Open(c.dir.blob(b.digest))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", b.digest, err)
	}
	info, err := file.Stat()
	if err == nil && info.Size() != b.size {
		err = ErrSizeMismatch
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", b.digest, errors.Join(err, file.Close()))
	}
	return file, nil
}

// startFill starts a fill of d. When somebody else was faster, or what an earlier fill
// left is still being cleared away (its files must not meet the next one's), it
// returns over, to wait for before trying again.
func (c *Cache) startFill(d digest.Digest, src Source) (f *fill, over <-chan struct{}, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != running || c.runCtx.Err() != nil {
		return nil, nil, fmt.Errorf("fill %s: %w", d, ErrClosed)
	}
	if c.blobs[d] != nil {
		return nil, c.started, nil
	}
	if f := c.filling[d]; f != nil {
		if f.failure() == nil {
			return nil, c.started, nil
		}
		return nil, f.done, nil
	}
	if i := c.idle[d]; i.gone != nil {
		return nil, i.gone, nil
	}
	f = newFill(c, d, src, c.mismatched(d))
	f.refs++ // the caller's
	c.filling[d] = f
	ctx := c.runCtx
	c.fills.Go(func() { f.run(ctx) })
	return f, nil, nil
}

// mismatches is how often in a row, and when last, all bytes of a digest were here
// and did not match it.
type mismatches struct {
	count int
	last  time.Time
}

// mismatchFor is how long a mismatch is remembered: as long as a peer is banned for
// wrong bytes.
const mismatchFor = 10 * time.Minute

// mismatched returns how often d failed verification lately. c.mu is held.
func (c *Cache) mismatched(d digest.Digest) int {
	m := c.mismatches[d]
	if time.Since(m.last) >= mismatchFor {
		return 0
	}
	return m.count
}

// Mismatches returns how many fills of d in a row, no longer than ten minutes ago,
// ended with bytes that did not match it. A caller that heard of a mismatch from a
// reader finds it counted.
func (c *Cache) Mismatches(d digest.Digest) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.filling[d]; f != nil && errors.Is(f.failure(), ErrDigestMismatch) { // not booked yet
		return f.Mismatches() + 1
	}
	return c.mismatched(d)
}

// maxMismatches bounds what wrong bytes can make the cache remember.
const maxMismatches = 1024

// remember notes that d's bytes were wrong for the count-th time.
func (c *Cache) remember(d digest.Digest, count int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for old, m := range c.mismatches {
		if time.Since(m.last) >= mismatchFor || len(c.mismatches) >= maxMismatches {
			delete(c.mismatches, old)
		}
	}
	c.mismatches[d] = mismatches{count, time.Now()}
}

// Lookup returns a reader of d if it is committed, or being filled and its
// size known. It starts nothing, waits for nothing and does not count as use.
func (c *Cache) Lookup(d digest.Digest) (*Reader, bool) {
	if checkDigest(d) != nil {
		return nil, false
	}
	b, f := c.peek(d, false)
	if b != nil {
		file, err := c.openFile(b)
		if err != nil {
			return nil, false
		}
		return newReader(d, b.size, nil, file), true
	}
	if f == nil {
		return nil, false
	}
	select {
	case <-f.sized:
		return newReader(d, f.Size(), f, nil), true
	default:
		f.release()
		return nil, false
	}
}

// LookupPieces is Lookup for callers that check each piece against a digest of
// its own, as other nodes do: the last piece is not held back from them. If it
// were, the end of every blob would have to come from the few nodes that are
// done.
func (c *Cache) LookupPieces(d digest.Digest) (*Reader, bool) {
	r, ok := c.Lookup(d)
	if ok {
		r.view = viewPieces
	}
	return r, ok
}

// Has reports whether d is committed.
func (c *Cache) Has(d digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.blobs[d]
	return b != nil && b.place != nil
}

// Size returns how many bytes d has if it is committed, else 0.
func (c *Cache) Size(d digest.Digest) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.present(d)
}

// Pin keeps d from eviction, now and if it comes later, until as many Unpins.
// The scrub deletes a bad blob, and Remove any blob, pinned or not.
func (c *Cache) Pin(d digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pins[d]++; c.pins[d] == 1 {
		c.pinned += c.present(d)
	}
}

// Unpin undoes one Pin.
func (c *Cache) Unpin(d digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch n := c.pins[d]; {
	case n > 1:
		c.pins[d]--
	case n == 1:
		delete(c.pins, d)
		c.pinned -= c.present(d)
	}
}

// present is Size; those bytes may be evicted if d is not pinned. c.mu is held.
func (c *Cache) present(d digest.Digest) int64 {
	if b := c.blobs[d]; b != nil && b.place != nil {
		return b.size
	}
	return 0
}

// Settled waits until no fill of d runs. When it returns nil, what the fill
// brought is committed or given up; otherwise it returns why ctx ended.
func (c *Cache) Settled(ctx context.Context, d digest.Digest) error {
	c.mu.Lock()
	f := c.filling[d]
	c.mu.Unlock()
	if f == nil {
		return nil
	}
	return wait(ctx, f.done)
}

// Remove withdraws and deletes a committed blob, pinned or not, or what a fill that
// failed has left of one; that nothing is there is no error. A running fill and open
// readers go on.
func (c *Cache) Remove(d digest.Digest) error {
	c.mu.Lock()
	b := c.blobs[d]
	c.mu.Unlock()
	if b == nil {
		c.dropIdle(d)
		return nil
	}
	return c.drop(context.Background(), b, reasonRemoved)
}

// Info describes a committed blob.
type Info struct {
	Digest digest.Digest
	Size   int64
	Used   time.Time // last hit, to the second
	Pinned bool
}

// Walk calls fn for each committed blob, most recently used first, until it
// returns false. It works on a snapshot: fn may call the cache.
func (c *Cache) Walk(fn func(Info) bool) {
	for _, info := range c.list() {
		if !fn(info) {
			return
		}
	}
}

func (c *Cache) list() []Info {
	c.mu.Lock()
	defer c.mu.Unlock()
	infos := make([]Info, 0, c.lru.Len())
	for e := c.lru.Front(); e != nil; e = e.Next() {
		b := e.Value.(*blob)
		infos = append(infos, Info{Digest: b.digest, Size: b.size, Used: time.Unix(b.used, 0), Pinned: c.pins[b.digest] > 0})
	}
	return infos
}

// Progress describes a running fill.
type Progress struct {
	Digest  digest.Digest
	Size    int64 // -1 while unknown
	Present int64 // bytes on disk
	Readers int
	Started time.Time
	Origins map[Origin]int64 // bytes that this process fetched, by origin
}

// Begun reports whether part of d may be here, but not all: a fill is under way, or
// has left something that the next one can continue from.
func (c *Cache) Begun(d digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, idle := c.idle[d]
	return idle || c.filling[d] != nil
}

// Fills describes the running fills.
func (c *Cache) Fills() []Progress {
	c.mu.Lock()
	fills := slices.Collect(maps.Values(c.filling))
	c.mu.Unlock()
	all := make([]Progress, len(fills))
	for i, f := range fills {
		all[i] = f.progress()
	}
	return all
}

// Stats are the cache's numbers at one moment.
type Stats struct {
	Blobs    int
	Bytes    int64 // blobs, running fills at full size, and ingests waiting to be resumed
	Reserved int64 // of which running fills
	Pinned   int64 // of which pinned blobs
	Limit    int64 // MaxBytes in bytes; 0 is none
	Free     int64 // free on the file system; -1 if it cannot be asked
	MinFree  int64
	Fills    int
}

// Stats returns the current numbers.
func (c *Cache) Stats() Stats {
	total, free, err := c.statfs()
	if err != nil {
		free = -1
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return Stats{
		Blobs: len(c.blobs), Bytes: c.used, Reserved: c.reserved, Pinned: c.pinned, Fills: len(c.filling),
		Limit: c.opts.MaxBytes.Of(total), Free: free, MinFree: c.opts.MinFree.Of(total),
	}
}

// Meta returns what the cache remembers besides blobs.
func (c *Cache) Meta() *Meta { return c.meta }

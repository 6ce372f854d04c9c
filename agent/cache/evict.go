package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// reason says why a blob was removed; it is a metric label.
type reason string

const (
	reasonMaxBytes reason = "max_bytes"
	reasonMinFree  reason = "min_free"
	reasonFull     reason = "disk_full" // ENOSPC although min_free had it otherwise
	reasonScrub    reason = "scrub"
	reasonRemoved  reason = "removed"
	reasonLost     reason = "lost" // somebody else deleted or changed the file
)

// statfs returns size and free bytes of the file system that holds dir.
func statfs(dir string) (total, free int64, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, 0, fmt.Errorf("statfs %s: %w", dir, err)
	}
	unit := cmp.Or(s.Frsize, s.Bsize) // of the counts; Bsize is the preferred I/O size
	return int64(s.Blocks) * unit, int64(s.Bavail) * unit, nil
}

// bounds are what the options and the file system allow at one moment, in bytes.
type bounds struct{ limit, minFree, free int64 } // limit: 0 is none

// slackOf is what eviction frees beyond need, for a bound of that many bytes: a full
// cache does not evict for every fill.
func slackOf(bound int64) int64 { return bound / 20 }

// shortage is how many bytes too many there are, by either bound.
type shortage struct {
	overMax, overFree   int64 // <= 0 is none
	slackMax, slackFree int64
	evictable           int64
}

func (s shortage) none() bool { return s.overMax <= 0 && s.overFree <= 0 }

// hopeless says that evicting everything would not be enough.
func (s shortage) hopeless() bool { return max(s.overMax, s.overFree) > s.evictable }

// bounds asks the file system, and makes the directory again if it is gone (I9).
func (c *Cache) bounds() (bounds, error) {
	total, free, err := c.statfs()
	if err != nil {
		if err = c.dir.make(); err == nil {
			total, free, err = c.statfs()
		}
	}
	return bounds{limit: c.opts.MaxBytes.Of(total), minFree: c.opts.MinFree.Of(total), free: free}, err
}

// left is how many more bytes there may be within b. c.mu is held.
func (c *Cache) left(b bounds) int64 {
	left := b.free - c.unbacked - b.minFree
	if b.limit > 0 {
		left = min(left, b.limit-c.used)
	}
	return left
}

// admit compares the books, with n bytes more, to the limits, and reserves the
// n bytes if there is no shortage.
func (c *Cache) admit(n int64) (shortage, error) {
	b, err := c.bounds()
	if err != nil {
		return shortage{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s := shortage{evictable: c.evictable()}
	if b.limit > 0 {
		s.overMax, s.slackMax = c.used+n-b.limit, slackOf(b.limit)
	}
	if b.minFree > 0 {
		s.overFree, s.slackFree = b.minFree+c.unbacked+n-b.free, slackOf(b.minFree)
	}
	if s.none() {
		c.used += n
		c.reserved += n
		c.unbacked += n
	}
	return s, nil
}

// evictable is how many bytes may go. c.mu is held.
func (c *Cache) evictable() int64 { return c.used - c.reserved - c.pinned }

// Room returns for how many bytes of new blobs there is room now, if everything that
// may be evicted goes.
func (c *Cache) Room() (int64, error) {
	b, err := c.bounds()
	if err != nil {
		return 0, fmt.Errorf("room in the cache: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(c.left(b)+c.evictable(), 0), nil
}

// MakeRoom frees n bytes on the cache's file system, beside what MinFree keeps, evicting for
// them if need be and if that can be enough. They are for a file of the caller's own, and not
// set aside. An error satisfies ErrNoRoom.
func (c *Cache) MakeRoom(n int64) error {
	return c.evictFor(n, func() (shortage, error) {
		b, err := c.bounds()
		c.mu.Lock()
		defer c.mu.Unlock()
		return shortage{overFree: b.minFree + c.unbacked + n - b.free, slackFree: slackOf(b.minFree), evictable: c.evictable()}, err
	})
}

// Welcome reports whether a blob of n bytes that was last used then would displace
// nothing that was used later, and nothing that is hinted to be evicted last.
func (c *Cache) Welcome(n int64, used time.Time) bool {
	bounds, err := c.bounds()
	if err != nil {
		return false
	}
	c.mu.Lock()
	room := c.left(bounds)
	var older []*blob
	for e := c.lru.Back(); e != nil && room < n; e = e.Prev() {
		b := e.Value.(*blob)
		if b.used >= used.Unix() {
			break
		}
		if c.pins[b.digest] == 0 {
			older = append(older, b)
		}
	}
	c.mu.Unlock()
	if room < n { // who evicts evicts some more
		n += slackOf(max(bounds.limit, bounds.minFree))
	}
	for _, b := range older {
		if room >= n {
			break
		}
		if c.opts.Keep == nil || c.opts.Keep(b.digest) != EvictLast {
			room += b.size
		}
	}
	return room >= n
}

// Age makes a blob as old as the other node's blob that it is a copy of: it takes that
// one's place in the order of eviction, not the first. It does nothing if the blob is
// older.
func (c *Cache) Age(d digest.Digest, used time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.blobs[d]
	if b == nil || b.place == nil || b.used <= used.Unix() {
		return
	}
	b.used, b.dirty = used.Unix(), true // it may stand among others that are, see touched
	for e := b.place.Next(); e != nil && e.Value.(*blob).used > b.used; e = b.place.Next() {
		c.lru.MoveAfter(b.place, e)
	}
	c.meta.recordUse([]use{{b.digest, b.used, b.size}})
}

// mostEvictions is how often to evict and look again: what readers hold open is not free once
// it is unlinked.
const mostEvictions = 3

// reserve makes room for a fill of n bytes, or returns ErrNoRoom, having
// evicted nothing if that could not have helped. The caller says with backed
// when the file system has set the bytes aside.
func (c *Cache) reserve(n int64) error {
	if n > maxBlob {
		return fmt.Errorf("%d bytes in one blob: %w", n, ErrNoRoom)
	}
	return c.evictFor(n, func() (shortage, error) { return c.admit(n) })
}

// evictFor evicts until there is no shortage of n bytes any more, or returns ErrNoRoom.
func (c *Cache) evictFor(n int64, look func() (shortage, error)) error {
	for range mostEvictions {
		s, err := look()
		if err != nil {
			return noRoom(err)
		}
		if s.none() {
			return nil
		}
		if s.hopeless() || !c.shrink(s) {
			break
		}
	}
	return fmt.Errorf("%d bytes: %w", n, ErrNoRoom)
}

// backed says that the file system set n reserved bytes aside, or never will.
func (c *Cache) backed(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unbacked -= n
}

// unreserve gives a reservation back.
func (c *Cache) unreserve(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.used -= n
	c.reserved -= n
}

// shrink evicts until the shortage is over and some more, and reports whether
// it evicted anything.
func (c *Cache) shrink(s shortage) bool {
	_, before, err := c.statfs()
	var freed int64
	if s.overMax > 0 {
		freed = c.evict(s.overMax+s.slackMax, reasonMaxBytes)
	}
	if over := s.overFree - freed; over > 0 {
		freed += c.evict(over+s.slackFree, reasonMinFree)
	}
	if s.overFree > 0 && freed > 0 && err == nil {
		c.awaitFree(before + freed/10*9) // others write meanwhile
	}
	return freed > 0
}

const (
	// freeLook and freeLooks are how long a file system may take to free what was deleted:
	// XFS does it some milliseconds later.
	freeLook  = 10 * time.Millisecond
	freeLooks = 10
)

// awaitFree returns once the file system has as much free. Looking too early after deleting
// finds no room, and evicts the next blob for it. Some file systems free nothing before they
// commit, unless they are told to; btrfs commits up to 30 s later.
func (c *Cache) awaitFree(enough int64) {
	for range freeLooks {
		if _, free, err := c.statfs(); err != nil || free >= enough {
			return
		}
		<-time.After(freeLook)
	}
	if err := c.syncfs(); err != nil {
		c.log.Debug("sync the cache's file system", "err", err)
	}
}

// syncfs makes the file system that holds dir write all that is pending.
func syncfs(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
}

// relieve evicts n bytes after the disk said that it is full, whatever the
// limits say, unless that could not be enough: a hostile size must not empty
// the cache.
func (c *Cache) relieve(n int64) bool {
	_, free, err := c.statfs()
	if err != nil {
		return false
	}
	c.mu.Lock()
	most := free + c.evictable()
	c.mu.Unlock()
	return n <= most && c.evict(n, reasonFull) > 0
}

// evict deletes idle ingests, then blobs, until n bytes are free or nothing
// more may go, and returns how many it freed.
func (c *Cache) evict(n int64, why reason) int64 {
	freed := c.expire(n, time.Now())
	for _, b := range c.candidates() {
		if freed >= n {
			break
		}
		if gone, err := c.dropNow(b, why); err != nil {
			break // the next unlink would fail as well
		} else if gone {
			freed += b.size
		}
	}
	return freed
}

// candidates returns what may be evicted, in order: by hint, then least
// recently used first.
func (c *Cache) candidates() []*blob {
	all := c.oldest(false)
	if c.opts.Keep == nil {
		return all
	}
	hints := make(map[*blob]KeepHint, len(all))
	for _, b := range all {
		hints[b] = c.opts.Keep(b.digest)
	}
	slices.SortStableFunc(all, func(x, y *blob) int { return cmp.Compare(hints[x], hints[y]) })
	return all
}

// oldest returns the blobs, least recently used first, with or without those
// that are pinned.
func (c *Cache) oldest(pinned bool) []*blob {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]*blob, 0, c.lru.Len())
	for e := c.lru.Back(); e != nil; e = e.Prev() {
		if b := e.Value.(*blob); pinned || c.pins[b.digest] == 0 {
			all = append(all, b)
		}
	}
	return all
}

// drop is dropNow for callers that want b gone: it waits for an event of b
// that is under way, and for another's removal.
func (c *Cache) drop(ctx context.Context, b *blob, why reason) error {
	for {
		gone, err := c.dropNow(b, why)
		if gone || err != nil {
			return err
		}
		c.mu.Lock()
		busy, there := b.busy, c.blobs[b.digest] == b
		c.mu.Unlock()
		if !there {
			return nil
		}
		if busy == nil {
			continue
		}
		if err := wait(ctx, busy); err != nil {
			return err
		}
	}
}

// dropNow withdraws, then unlinks b (I5). It does nothing while another event
// of b is under way, or if an eviction meets a new pin.
func (c *Cache) dropNow(b *blob, why reason) (gone bool, err error) {
	if !c.takeOut(b, why) {
		return false, nil
	}
	if c.opts.Events.Removing != nil {
		c.opts.Events.Removing(b.digest)
	}
	if err := c.do(stepUnlink, b.digest, func() error { return remove(c.dir.blob(b.digest)) }); err != nil {
		c.putBack(b)
		c.log.Warn("delete blob", "digest", b.digest, "err", err)
		return false, noRoom(fmt.Errorf("delete %s: %w", b.digest, err))
	}
	c.mu.Lock()
	delete(c.blobs, b.digest)
	c.mu.Unlock()
	c.settled(b)
	c.meta.forgetUse(b.digest)
	c.metrics.evictions.WithLabelValues(string(why)).Inc()
	c.log.Debug("blob deleted", "digest", b.digest, "bytes", b.size, "reason", why)
	return true, nil
}

// takeOut reserves b for removal: from now on it is not evictable, not
// counted and not Has.
func (c *Cache) takeOut(b *blob, why reason) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	evicting := why == reasonMaxBytes || why == reasonMinFree || why == reasonFull
	if b.busy != nil || c.blobs[b.digest] != b || evicting && c.pins[b.digest] > 0 {
		return false
	}
	b.busy = make(chan struct{})
	c.lru.Remove(b.place)
	b.place = nil
	c.used -= b.size
	if c.pins[b.digest] > 0 {
		c.pinned -= b.size
	}
	return true
}

// putBack undoes takeOut for a blob that could not be deleted.
func (c *Cache) putBack(b *blob) {
	c.mu.Lock()
	b.place, b.dirty = c.lru.PushFront(b), true
	c.used += b.size
	if c.pins[b.digest] > 0 {
		c.pinned += b.size
	}
	c.mu.Unlock()
	if c.opts.Events.Committed != nil {
		c.opts.Events.Committed(b.digest, b.size)
	}
	c.settled(b)
}

// idleFor is how long a fill that failed, or that a stop cut short, waits to
// be resumed. containerd gives its own ingests as long.
const idleFor = 24 * time.Hour

// expire deletes idle ingests, oldest first, until n bytes are free, and all
// that are too old; n < 0 deletes only those.
func (c *Cache) expire(n int64, now time.Time) (freed int64) {
	c.mu.Lock()
	idle := maps.Clone(c.idle)
	c.mu.Unlock()
	byAge := func(x, y digest.Digest) int { return idle[x].when.Compare(idle[y].when) }
	for _, d := range slices.SortedFunc(maps.Keys(idle), byAge) {
		if freed >= n && now.Sub(idle[d].when) < idleFor {
			break
		}
		freed += c.dropIdle(d)
	}
	return freed
}

// dropIdle deletes an idle ingest and returns how many bytes that freed. A fill of the
// same blob uses the same files: one that has begun will take them over, and one that
// comes meanwhile waits until they are gone (see startFill).
func (c *Cache) dropIdle(d digest.Digest) int64 {
	c.mu.Lock()
	i, ok := c.idle[d]
	if !ok || i.gone != nil || c.filling[d] != nil {
		c.mu.Unlock()
		return 0
	}
	i.gone = make(chan struct{})
	c.idle[d] = i
	c.mu.Unlock()
	c.purge(d)
	c.mu.Lock()
	delete(c.idle, d)
	c.used -= i.size
	c.mu.Unlock()
	close(i.gone)
	c.log.Debug("ingest deleted", "digest", d, "bytes", i.size)
	return i.size
}

// takeIdle makes an idle ingest the caller's, which is the fill of d, as a reservation.
func (c *Cache) takeIdle(d digest.Digest) (size int64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, ok := c.idle[d]
	if ok {
		delete(c.idle, d)
		c.reserved += i.size
	}
	return i.size, ok
}

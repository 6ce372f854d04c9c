package cache

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"slices"
	"time"
)

const (
	// tendInterval is how often the cache looks after its bounds and its
	// directory when nothing else makes it: others use the disk too.
	tendInterval = 10 * time.Second
	// flushInterval bounds how much metadata a kill -9 loses, and bookedInterval how
	// much it loses about a committed blob: without its giver the blob is given to
	// nobody while the registry cannot be asked.
	flushInterval  = 2 * time.Second
	bookedInterval = 250 * time.Millisecond
	// useInterval is how often access times are written: they are worth
	// little and change with every hit.
	useInterval = time.Minute
)

// tend keeps the bounds and writes metadata behind until ctx ends. Its error says that
// nothing can be kept here any more.
func (c *Cache) tend(ctx context.Context) error {
	bounds, flush, use := time.Tick(tendInterval), time.NewTicker(flushInterval), time.Tick(useInterval)
	seen := map[string]time.Time{}
	soon, dead := false, false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-bounds:
			c.expire(-1, time.Now())
			c.reconcile(seen)
			c.balance()
			err := c.dir.make()
			gone := errors.Is(err, fs.ErrNotExist)
			if gone && dead { // once is no proof: somebody may be deleting it just now
				return c.dir.explain(err)
			}
			dead = gone
		case <-use:
			c.meta.recordUse(c.touched())
		case <-c.booked:
			if !soon {
				soon = true
				flush.Reset(bookedInterval)
			}
		case <-flush.C:
			c.meta.flush()
			if soon {
				soon = false
				flush.Reset(flushInterval)
			}
		case <-c.meta.db.full:
			c.meta.flush()
		}
	}
}

// balance evicts until the limits hold again, as far as possible.
func (c *Cache) balance() {
	s, err := c.admit(0)
	if err != nil {
		c.log.Warn("cache directory cannot be used", "err", err)
		return
	}
	if !s.none() {
		c.shrink(s)
	}
}

// flush writes access times and whatever else is pending to the metadata.
func (c *Cache) flush() {
	c.meta.recordUse(c.touched())
	c.meta.flush()
}

// touched returns the blobs used since the last call. Use moves a blob to the
// front, so they are the front of the list.
func (c *Cache) touched() []use {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []use
	for e := c.lru.Front(); e != nil; e = e.Next() {
		b := e.Value.(*blob)
		if !b.dirty {
			break
		}
		b.dirty = false
		all = append(all, use{b.digest, b.used, b.size})
	}
	return all
}

// reconcile books out blobs and idle ingests that somebody deleted behind the
// cache's back (I9). It looks closer only at directories that changed since
// they were last seen.
func (c *Cache) reconcile(seen map[string]time.Time) {
	changed := false
	dirs := []string{c.dir.ingests()}
	for a := range algorithms {
		dirs = append(dirs, c.dir.blobs(a))
	}
	for _, dir := range dirs {
		var when time.Time
		if info, err := os.Stat(dir); err == nil {
			when = info.ModTime()
		}
		changed = changed || !seen[dir].Equal(when)
		seen[dir] = when
	}
	if !changed {
		return
	}
	for _, b := range c.oldest(true) {
		if gone(c.dir.blob(b.digest)) {
			_, _ = c.dropNow(b, reasonLost) // it logs
		}
	}
	c.mu.Lock()
	idle := slices.Collect(maps.Keys(c.idle))
	c.mu.Unlock()
	for _, d := range idle {
		if gone(c.dir.ingest(d)) {
			c.dropIdle(d)
		}
	}
}

func gone(path string) bool {
	_, err := os.Lstat(path)
	return err != nil && lost(err)
}

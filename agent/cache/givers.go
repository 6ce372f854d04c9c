package cache

import (
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
)

// maxGivers bounds what one blob remembers in memory; the metadata has the rest.
const maxGivers = 8

func foreign(d digest.Digest) error {
	return fmt.Errorf("open %s: %w: %w", d, ErrNoRoom, ErrForeign)
}

// gave reports whether giver has given all of b once; "" is anybody.
func (c *Cache) gave(b *blob, giver string) bool {
	if giver == "" || c.knowsGiver(b, giver) {
		return true
	}
	if !c.meta.Given(b.digest, giver) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(b.givers) < maxGivers && !slices.Contains(b.givers, giver) {
		b.givers = append(b.givers, giver)
	}
	return true
}

func (c *Cache) knowsGiver(b *blob, giver string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Contains(b.givers, giver)
}

// GivenBy reports whether giver has once given all of d, even if d has been
// evicted since, or is the giver of the fill of d that runs now.
func (c *Cache) GivenBy(d digest.Digest, giver string) bool {
	c.mu.Lock()
	b, f := c.blobs[d], c.filling[d]
	c.mu.Unlock()
	switch {
	case b != nil:
		return c.gave(b, giver)
	case f != nil && f.giver == giver:
		return true
	}
	return c.meta.Given(d, giver)
}

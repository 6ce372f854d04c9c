package cache

import (
	"cmp"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

const (
	// maxScrubRate bounds what the scrub takes from pulls; minScrubRate bounds
	// how long it holds a file open.
	maxScrubRate = 50 << 20
	minScrubRate = 1 << 20
)

// scrub re-hashes every committed blob once per ScrubInterval until ctx ends.
// The end of each blob is remembered, so that the last ones get their turn
// despite restarts.
func (c *Cache) scrub(ctx context.Context) {
	interval := c.opts.ScrubInterval
	for interval > 0 && ctx.Err() == nil {
		next := time.After(max(interval, time.Second)) // an empty cache is done at once
		c.scrubAll(ctx, interval)
		select {
		case <-next:
		case <-ctx.Done():
		}
	}
}

// scrubAll does the rest of one pass, spread over interval.
func (c *Cache) scrubAll(ctx context.Context, interval time.Duration) {
	all := c.oldest(true)
	var bytes int64
	for _, b := range all {
		bytes += b.size
	}
	slices.SortFunc(all, func(x, y *blob) int { return cmp.Compare(x.digest, y.digest) })
	// A fifth faster than needed: blobs come during the pass.
	speed := float64(bytes) * 1.2 / interval.Seconds()
	limit := rate.NewLimiter(rate.Limit(min(max(speed, minScrubRate), maxScrubRate)), readBlock)
	place := digest.Digest(c.meta.scrubbed())
	for _, b := range all {
		if b.digest <= place {
			continue
		}
		c.scrubBlob(ctx, b, limit)
		if ctx.Err() != nil {
			return
		}
		c.meta.setScrubbed(string(b.digest))
	}
	c.meta.setScrubbed("")
}

// maxSuspects bounds the blobs that wait to be read again before their turn.
const maxSuspects = 64

// Suspect has a committed blob read again soon, and deleted if it is bad, because
// something speaks against it. It waits for nothing; if there are too many at once,
// the last are left to the scrub.
func (c *Cache) Suspect(d digest.Digest) {
	select {
	case c.suspects <- d:
	default:
	}
}

// investigate reads suspects until ctx ends.
func (c *Cache) investigate(ctx context.Context) {
	limit := rate.NewLimiter(maxScrubRate, readBlock)
	for {
		select {
		case d := <-c.suspects:
			c.mu.Lock()
			b := c.blobs[d]
			c.mu.Unlock()
			if b != nil {
				c.scrubBlob(ctx, b, limit)
			}
		case <-ctx.Done():
			return
		}
	}
}

// scrubBlob re-hashes b and deletes it if it is bad. A disk that cannot read
// it back makes it as bad as wrong bytes do; running out of descriptors does
// not.
func (c *Cache) scrubBlob(ctx context.Context, b *blob, limit *rate.Limiter) {
	err := c.rehash(ctx, b, limit)
	switch {
	case err == nil, ctx.Err() != nil:
	case lost(err):
		_, _ = c.dropNow(b, reasonLost) // it logs
	case !errors.Is(err, ErrDigestMismatch) && !errors.Is(err, unix.EIO):
		c.log.Warn("scrub cannot read a blob", "digest", b.digest, "err", err)
	default:
		// It was right when it was committed: its origins are for those who compare nodes.
		from, _ := c.meta.Fetched(b.digest)
		c.log.Warn("scrub found a bad blob", "digest", b.digest, "bytes", b.size, "origins", sources(from.Size, from.Origins), "err", err)
		c.metrics.corruptions.Inc()
		_ = c.drop(ctx, b, reasonScrub)
	}
}

// rehash reads b's file at the scrub's pace and compares its digest.
func (c *Cache) rehash(ctx context.Context, b *blob, limit *rate.Limiter) error {
	file, err := os.Open(c.dir.blob(b.digest))
	if err != nil {
		return err
	}
	defer file.Close()
	h := b.digest.Algorithm().Hash()
	buf := make([]byte, readBlock)
	for {
		if err := pace(ctx, limit); err != nil {
			return err
		}
		n, err := io.ReadFull(file, buf)
		h.Write(buf[:n])
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			if digest.NewDigest(b.digest.Algorithm(), h) != b.digest {
				return ErrDigestMismatch
			}
			return nil
		case err != nil:
			return err
		}
	}
}

// pace waits for the next block's turn. (Limiter.Wait gives up before a
// deadline, which the caller could not tell from a bad blob.)
func pace(ctx context.Context, limit *rate.Limiter) error {
	select {
	case <-time.After(limit.ReserveN(time.Now(), readBlock).Delay()):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

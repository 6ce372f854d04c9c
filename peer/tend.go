package peer

import (
	"context"
	"time"
)

// tendEvery is how often links, blobs and uploads are looked after: what the clock decides (a
// silent peer, a slow request, a lease) may be late by as much.
const tendEvery = 100 * time.Millisecond

// tend does what has to be done on a timer.
func (s *Swarm) tend(ctx context.Context) {
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for last := time.Now(); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now := time.Now()
		s.tendLinks(now, now.Sub(last))
		last = now
		s.tendBlobs(now)
		s.uploads.tend()
		s.traffic.tend(s.roster.view.Load().all)
		s.tendWays(now)
	}
}

func (s *Swarm) tendBlobs(now time.Time) {
	blobs := s.allBlobs()
	awaited := false
	for _, b := range blobs {
		s.tendBlob(b, now, keepFor(len(blobs), b.sized() != 0 || b.isVoid()))
		awaited = b.awaited() || awaited
	}
	s.awaited.Store(awaited)
}

// tendLinks looks after links, for the first time in so long. If this process stood still
// meanwhile, as when its machine is moved, nobody was silent: what came is yet to be read.
func (s *Swarm) tendLinks(now time.Time, since time.Duration) {
	links := s.allLinks()
	for _, l := range links {
		if since > silence/2 {
			l.heard.set(now)
		}
		l.tend(now, idleFor(len(links)))
	}
}

// idleFor is how long an idle link is kept: a home in a storm meets everybody
// once, and most of them never again.
func idleFor(links int) time.Duration {
	switch {
	case links > maxLinks/2:
		return idleLink / 40
	case links > maxLinks/4:
		return idleLink / 10
	}
	return idleLink
}

// keepFor is how long an idle blob is kept: for its piece digests, if there are any, or from when
// it became void. Others may name any number of blobs, and the table must not fill with names.
func keepFor(blobs int, known bool) time.Duration {
	switch {
	case !known && blobs > maxBlobs/2:
		return askHomeFor
	case !known || blobs > maxIdleBlobs:
		return idleLink
	}
	return keepBlob
}

func (s *Swarm) tendBlob(b *blob, now time.Time, keep time.Duration) {
	slow, idle := b.tend(now)
	for _, node := range slow {
		s.bans.add(node, banSlow)
	}
	if b.home.expire(now) > 0 {
		return
	}
	if idle > idleLink {
		b.letGo()
		b.forgetGiven()
	}
	if idle > keep && !b.isHashed() && !s.remembers(b) {
		s.dropBlob(b, now.Add(-keep))
	}
}

// dropBlob forgets a blob, unless somebody has used it since.
func (s *Swarm) dropBlob(b *blob, since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blobs[b.id] == b && b.lastUse.get().Before(since) {
		delete(s.blobs, b.id)
	}
}

// remembers reports whether b is void and a later attempt known: then it must
// not be forgotten first.
func (s *Swarm) remembers(b *blob) (later bool) {
	if b.isVoid() && b.id.attempt < lastAttempt {
		s.ifBlob(blobID{b.id.key, b.id.attempt + 1}, func(*blob) { later = true })
	}
	return later
}

// isHashed reports whether a goroutine hashes the blob, or waits for its turn: it would open the
// file of a blob that nobody knows any more, for good.
func (b *blob) isHashed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.scanning
}

// awaited reports whether this node gets the blob from upstream and others wait for it.
func (b *blob) awaited() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fill != nil && b.authority && b.missing > 0 && len(b.nbrs) > 0
}

// tend gives up slow requests, keeps links in use, and reports for how long
// nobody needed the blob.
func (b *blob) tend(now time.Time) (slow []string, idle time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	slow = b.expire(now)
	b.oweLocked(now)
	if b.fill != nil {
		b.lastUse.set(now)
		for _, nb := range b.nbrs {
			nb.l.used.set(now)
		}
		b.poke()
	}
	return slow, now.Sub(b.lastUse.get())
}

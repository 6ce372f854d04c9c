package peer

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// Whether a blob makes progress: by bytes that came, by what a home said, or by what
// this node has asked of upstream. A node that gives up too soon fetches what is
// already on its way to it.

const (
	// A home's word that it gets bytes is as good as a byte for wordTime: a slow registry
	// is not a dead one, and behind a poor uplink a piece may take long. A home that has
	// given nothing by then cannot, or does not want to. The next one has to give
	// something before those who wait here lose their patience, see Coming.
	wordTime = 30 * time.Second
	// sourceTime is the same for a home that waits for another which gets the blob
	// already: it has to go upstream before those who wait for it turn to the next.
	sourceTime = wordTime / 2
)

// Coming reports whether the blob is on its way here: bytes of it came within the last
// seconds, or a home said that it gets them or awaits the registry's answer. A caller
// that waits for a byte of it does better to go on waiting than to ask the registry
// too. A home that is no longer believed was heard from a moment ago, and the next one
// may need as long to begin. ours means that this node gets it from upstream for
// others. It blocks on nothing.
func (s *Swarm) Coming(d digest.Digest) (coming, ours bool) {
	k, err := parseKey(d.String())
	if err != nil {
		return false, false
	}
	for attempt := range lastAttempt + 1 {
		s.ifBlob(blobID{k, byte(attempt)}, func(b *blob) { coming, ours = b.coming(time.Now()) })
		if coming {
			break
		}
	}
	return coming, ours
}

// look reports for how long neither bytes came nor a home's word that is to be
// believed, and how many neighbours there are.
func (b *blob) look(now time.Time) (idle time.Duration, neighbours int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	last := b.cameLocked()
	if b.word.After(last) && b.believesLocked(now, last, wordTime) {
		last = b.word
	}
	return now.Sub(last), len(b.nbrs)
}

// quiet is how long no byte has come.
func (b *blob) quiet(now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return now.Sub(b.cameLocked())
}

// talks reports whether a home keeps saying that it gets bytes, and none comes.
func (b *blob) talks(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return now.Sub(b.word) < stallFetch && !b.believesLocked(now, b.cameLocked(), wordTime)
}

func (b *blob) coming(now time.Time) (coming, ours bool) {
	alone := len(b.s.roster.view.Load().all) == 1
	b.mu.Lock()
	defer b.mu.Unlock()
	last := b.cameLocked()
	if b.fill != nil && b.authority && !alone && b.triesLocked(now, last) {
		return true, true
	}
	if last.Equal(b.begun) {
		last = time.Time{} // no byte yet
	}
	if b.word.After(last) {
		last = b.word
	}
	return b.fill != nil && now.Sub(last) < stallFetch, b.authority
}

// triesLocked reports whether this node goes upstream with some hope, if the last bytes
// came then: it has asked, and registries that are caches themselves may take long to
// answer; or there was a byte, and it tries to continue where an uplink failed for a
// moment. A registry that cannot be reached in the first place has not been asked.
func (b *blob) triesLocked(now, last time.Time) bool {
	if last.Equal(b.begun) || b.askedAt.After(last) {
		last = b.askedAt
	}
	return b.authority && now.Sub(last) < wordTime
}

// cameLocked is when the last bytes came, or would have come but for this node's own
// limit.
func (b *blob) cameLocked() time.Time {
	if b.saving.After(b.progress) {
		return b.movedLocked(b.saving)
	}
	return b.movedLocked(b.progress)
}

// movedLocked is when the last bytes of a piece under way came, or last if that is later.
func (b *blob) movedLocked(last time.Time) time.Time {
	for _, rs := range b.wants {
		for _, r := range rs {
			if t := r.moved.get(); t.After(r.sent) && t.After(last) {
				last = t
			}
		}
	}
	return last
}

// believesLocked reports whether a home's word, which counts for that long, still
// does, if the last bytes came then.
func (b *blob) believesLocked(now, last time.Time, long time.Duration) bool {
	if b.heeded.After(last) {
		last = b.heeded
	}
	return now.Sub(last) < long
}

// trusts reports whether a source's word counts, for a home that waits for it.
func (b *blob) trusts(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.believesLocked(now, b.cameLocked(), sourceTime)
}

// told notes a home's word that it, or the source that it waits for, got bytes at
// that time.
func (b *blob) told(at time.Time, source bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.word = at
	if source {
		b.sourceWord = at
	}
}

// moves reports whether bytes of the blob came here lately, or a source said that they
// come there: a home that came later waits for the one before it, and those who ask it
// have to know. The word of a home that is no source goes no further, or two homes
// that wait for each other would believe each other forever.
func (b *blob) moves(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	last := b.cameLocked()
	return b.fill != nil && (now.Sub(last) < stallRejoin || b.triesLocked(now, last) ||
		now.Sub(b.sourceWord) < 2*stallRejoin && b.believesLocked(now, last, sourceTime))
}

// heed begins to believe a home, for as long as if bytes had just come.
func (b *blob) heed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.heeded = time.Now()
}

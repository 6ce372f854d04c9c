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
	alone := len(s.roster.view.Load().all) == 1
	for attempt := range lastAttempt + 1 {
		s.ifBlob(blobID{k, byte(attempt)}, func(b *blob) {
			o := b.outlook(time.Now())
			coming, ours = o.coming(alone), o.authority
		})
		if coming {
			break
		}
	}
	return coming, ours
}

// signs are the signs that a fetch makes progress, or none. blob.mu guards them.
type signs struct {
	begun      time.Time // the fetch
	came       time.Time // last piece, or bytes of one, or begun
	saving     time.Time // when budget last kept this node from asking for a piece while none was under way
	word       time.Time // when a home said last that it, or a source, gets bytes
	sourceWord time.Time // when one said so that goes upstream itself
	heeded     time.Time // since when that home is asked
	asked      time.Time // when upstream got the last request
}

// outlook is what the signs say at one moment. In it, came counts bytes of a piece under way,
// and what would have come but for this node's own limit.
type outlook struct {
	signs
	now        time.Time
	fetching   bool
	authority  bool
	neighbours int
}

func (b *blob) outlook(now time.Time) outlook {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.outlookLocked(now)
}

func (b *blob) outlookLocked(now time.Time) outlook {
	o := outlook{signs: b.signs, now: now, fetching: b.fill != nil, authority: b.authority, neighbours: len(b.nbrs)}
	if o.saving.After(o.came) {
		o.came = o.saving
	}
	o.came = b.movedLocked(o.came)
	return o
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

// quiet is how long no byte has come.
func (o outlook) quiet() time.Duration { return o.now.Sub(o.came) }

// idle is for how long neither bytes came nor a home's word that is to be believed.
func (o outlook) idle() time.Duration {
	if o.believes(wordTime) {
		return min(o.quiet(), o.now.Sub(o.word))
	}
	return o.quiet()
}

// talks reports whether a home keeps saying that it gets bytes, and none comes.
func (o outlook) talks() bool { return o.now.Sub(o.word) < stallFetch && !o.believes(wordTime) }

// trusts reports whether a source's word counts, for a home that waits for it.
func (o outlook) trusts() bool { return o.believes(sourceTime) }

// believes reports whether a home's word, which counts for that long after bytes came or it was
// asked first, still does.
func (o outlook) believes(long time.Duration) bool {
	return o.quiet() < long || o.now.Sub(o.heeded) < long
}

// awaits reports whether upstream was asked, and may still answer: registries that are caches
// themselves may take long. One that cannot be reached in the first place has not been asked.
func (o outlook) awaits() bool { return o.authority && o.now.Sub(o.asked) < wordTime }

// tries reports whether this node goes upstream with some hope: it awaits the answer, or there
// was a byte, and it tries to continue where an uplink failed for a moment.
func (o outlook) tries() bool {
	return o.awaits() || o.authority && o.came.After(o.begun) && o.quiet() < wordTime
}

// moves reports whether bytes of the blob came here lately, or a source said that they
// come there: a home that came later waits for the one before it, and those who ask it
// have to know. The word of a home that is no source goes no further, or two homes
// that wait for each other would believe each other forever.
func (o outlook) moves() bool {
	return o.fetching && (o.quiet() < stallRejoin || o.tries() ||
		o.now.Sub(o.sourceWord) < 2*stallRejoin && o.trusts())
}

// coming is Coming; alone: there is no other member.
func (o outlook) coming(alone bool) bool {
	return o.fetching && (!alone && o.tries() || o.came.After(o.begun) && o.quiet() < stallFetch || o.now.Sub(o.word) < stallFetch)
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

// heed begins to believe a home, for as long as if bytes had just come.
func (b *blob) heed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.heeded = time.Now()
}

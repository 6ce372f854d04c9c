package peer

import (
	"context"
	"errors"
	"time"

	"github.com/opencontainers/go-digest"
)

// A blob whose bytes are all here but do not match its digest is fetched once more
// in common. To the swarm, that second attempt is another blob with the same
// homes, so that nothing of the first gets into it. A node at which an attempt is
// void knows that its bytes are wrong: it takes no further part in it, and as home
// sends those who ask for it to the next attempt.

const (
	// verdictWait is how long a node that comes with a later attempt waits for the
	// end of this node's own fill, which is probably about to find out too. The
	// asker waits for askHomeFor.
	verdictWait = time.Second
	verdictLook = 20 * time.Millisecond
)

var (
	errEarlier = errors.New("an earlier attempt is under way here")
	// errBehind ends an attempt of which no byte is here: there is a later one.
	errBehind = errors.New("the bytes of this attempt are wrong")
	errNoMore = errors.New("the bytes of each attempt were wrong here")
)

// attempt is the first attempt, from least on, that is not void here.
func (s *Swarm) attempt(k key, least int) int {
	for least <= lastAttempt && s.knowsVoid(blobID{k, byte(least)}) {
		least++
	}
	return least
}

func (s *Swarm) knowsVoid(id blobID) (void bool) {
	s.ifBlob(id, func(b *blob) { void = b.isVoid() })
	return void
}

// earlier are the attempts before one.
func (id blobID) earlier() (out []blobID) {
	for a := range id.attempt {
		out = append(out, blobID{id.key, a})
	}
	return out
}

// Void says that all bytes of a blob were here and did not match its digest, for
// that many fills in a row: as many attempts are void. This node gives nothing
// more of them. It blocks on nothing.
func (s *Swarm) Void(d digest.Digest, attempts int) {
	k, err := parseKey(d.String())
	if err != nil {
		return
	}
	for _, id := range (blobID{k, byte(min(attempts, lastAttempt+1))}).earlier() {
		s.blob(id).annul()
	}
}

// supersede voids the attempts before one that another node was let in to. If this
// node is itself in an earlier one, that gets a moment to end. If it holds the
// blob, the earlier attempts continue too: what one node got wrong, others may have
// got right.
func (s *Swarm) supersede(ctx context.Context, id blobID) error {
	ctx, cancel := context.WithTimeout(ctx, verdictWait)
	defer cancel()
	for _, e := range id.earlier() {
		b, err := s.guestBlob(e)
		if err != nil {
			return err
		}
		for s.undecided(b) && ctx.Err() == nil {
			wait(ctx, verdictLook)
		}
		if b.active() {
			return errEarlier
		}
		if !s.index.holds(prefixOf(b.id.key)) {
			b.annul()
		}
	}
	return nil
}

// undecided reports whether this node is fetching the blob, or has all of it and the
// store has not yet said that it is right (Announce) or wrong (Void).
func (s *Swarm) undecided(b *blob) bool {
	b.mu.Lock()
	fetching, complete := b.keepsLocked(), b.complete && !b.void
	b.mu.Unlock()
	return fetching || complete && !s.index.holds(prefixOf(b.id.key))
}

// annul makes an attempt void.
func (b *blob) annul() {
	b.mu.Lock()
	again := b.void
	b.void = true
	b.mu.Unlock()
	b.lastUse.set(time.Now())
	if !again {
		b.withdraw()
	}
}

func (b *blob) isVoid() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.void
}

// overtaken ends this node's fetch in b, if there is one: a home says that the
// attempt is void, or (home is not set) a member whose digests count has the blob of
// a later one. A node that has nothing yet starts over if there is a next attempt, or else
// may get the blob by another home. Otherwise its bytes are as wrong as the home's, which
// only a home may say.
func (b *blob) overtaken(home, next bool) {
	b.mu.Lock()
	f, stop := b.fill, b.stop
	b.mu.Unlock()
	if f == nil {
		return
	}
	fresh := untouched(f)
	b.mu.Lock()
	fresh = fresh && b.writing == 0 && b.missing == b.n
	end := b.fill == f && !b.authority && (fresh && next || !fresh && home)
	if end && fresh {
		b.fill = nil // no byte comes from now on
	}
	b.mu.Unlock()
	switch {
	case end && fresh:
		stop(errBehind)
	case end:
		stop(ErrVoid)
	}
}

// untouched reports whether a fill has no byte yet.
func untouched(f Fill) bool {
	size := f.Size()
	if size < 0 {
		return true
	}
	start, end, _ := f.Missing(0)
	return start == 0 && end == size
}

// pointOn tells a member that came with an attempt that is void here about the
// next, if that can be given here.
func (s *Swarm) pointOn(l *link, o open) {
	next := blobID{o.blob.key, byte(s.attempt(o.blob.key, int(o.blob.attempt)))}
	if next.attempt == o.blob.attempt || next.attempt > lastAttempt {
		return
	}
	s.ifBlob(next, func(b *blob) {
		if s.good(o.pass, o.blob.key, l.peer) {
			b.admit(l.peer, o.pass.registry)
		}
		if b.whole() && b.lets(l.peer) {
			b.meet(l)
		}
	})
}

// pointedOn takes in that a member has a blob of which this node is in an earlier
// attempt.
func (s *Swarm) pointedOn(l *link, o open) {
	for _, e := range o.blob.earlier() {
		s.ifBlob(e, func(b *blob) {
			if b.counts(l.peer) && o.have.count() > 0 {
				b.overtaken(false, true)
			}
		})
	}
}

// counts reports whether a member's piece digests do.
func (b *blob) counts(member string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.signers[member]
}

package peer

import "time"

// Whether a piece is given to the node that asks for it, and what that counts for. given[i] is how
// often piece i had been given at the time of the request; what comes to nothing (refused,
// cancelled, cut) is taken back, so that I6 is about what has left this node.

// hintTime is how long a hint keeps others from the same one.
const hintTime = 30 * time.Millisecond

// asked answers a request for a piece: it is queued, or the asker hears at once
// that it should go elsewhere (I5). A member that was not let in gets nothing
// (I9).
func (s *Swarm) asked(l *link, w want) {
	var u *upload
	if b := s.knownBlob(w.blob); b != nil && b.lets(l.peer) {
		u = b.grant(l, w)
	}
	if u == nil {
		l.send(func(p []byte) []byte { return answer{id: w.id, hint: noHint}.append(p, frameGone) })
		return
	}
	l.touch()
	if wait, ok := s.uploads.add(u); !ok {
		u.refuse(wait)
	}
}

// grant makes the upload of a piece that is here, and counts it as given.
func (b *blob) grant(l *link, w want) *upload {
	home := b.home.count() > 0
	b.mu.Lock()
	defer b.mu.Unlock()
	i := int(w.piece)
	if b.void || b.size == 0 || i >= b.n || !b.have.has(i) {
		return nil
	}
	u := &upload{l: l, blob: b, id: w.id, piece: i, size: b.pieceLen(i), given: int(b.given[i]), spare: spare}
	if w.needDigest && b.n > 1 {
		u.batches = b.batchesLocked(i)
	}
	b.lastUse.set(time.Now())
	only := b.mayBeOnlyLocked()
	switch {
	case l.zone != b.s.cfg.Zone && !only:
		// Another zone has its own home; what this one spares is for nobody else.
		u.foreign, u.spare = true, spareFresh
		u.given = max(u.given, 1)
		return u
	case b.fresh > 0 && (home || only):
		u.spare, u.hinted = spareFresh, true
	}
	if w.passing { // what is given there is given no further
		u.foreign, u.hinted, u.given = true, false, max(u.given, 1)
		return u
	}
	if b.given[i] == 0 {
		b.fresh--
		delete(b.hinted, i)
	}
	b.given[i]++
	return u
}

// mayBeOnlyLocked reports whether this node may have pieces that nobody else has
// yet (I6): it fetches from upstream, or held the blob before.
func (b *blob) mayBeOnlyLocked() bool { return b.authority || b.wholeLocked() }

// refused takes back that a piece was given, and finds a better one.
func (b *blob) refused(u *upload) (hint uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	hint = noHint
	if u.hinted && u.given > 0 {
		hint = b.hintLocked(u.l)
	}
	b.notGivenLocked(u)
	return hint
}

// notGiven takes back that a piece was given: the peer cancelled it, or its link ended.
func (b *blob) notGiven(u *upload) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.notGivenLocked(u)
}

func (b *blob) notGivenLocked(u *upload) {
	if u.foreign || b.given[u.piece] == 0 { // it did not count, or it counts anew, see forgetGiven
		return
	}
	b.given[u.piece]--
	if b.given[u.piece] == 0 && b.have.has(u.piece) {
		b.fresh++
	}
}

// hintLocked is a piece never given that the asker lacks and to which nobody
// else has just been pointed.
func (b *blob) hintLocked(l *link) uint32 {
	nb := b.nbrs[l.peer]
	if nb == nil {
		return noHint
	}
	now := time.Now()
	for i, n := b.n-1, 0; i >= 0 && n < window; i-- {
		if !b.have.has(i) || b.given[i] > 0 || nb.have.has(i) {
			continue
		}
		n++
		if now.Sub(b.hinted[i]) > hintTime {
			b.hinted[i] = now
			return uint32(i)
		}
	}
	return noHint
}

// forgetGiven starts a new count: what was given to an earlier storm says
// nothing about the next.
func (b *blob) forgetGiven() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.given)
	clear(b.hinted)
	b.fresh = b.haveN
}

package peer

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// Which pieces are asked of whom. All of this runs with blob.mu held.

const (
	window     = 64                     // pieces from the cursor among which a neighbour is asked for the rarest first
	urgentN    = 2                      // first missing pieces: may be asked twice
	perPeer    = 4                      // requests under way at one neighbour
	leisure    = 2 * perPeer            // requests at a neighbour that has time for more
	nearTime   = 250 * time.Millisecond // a piece from a neighbour that other zones are spared for
	leastFly   = 10                     // requests under way in all, however slow pieces come
	mostFly    = 32
	asideShare = 4                      // of them, while others wait for what this node gets from upstream
	flyFor     = 400 * time.Millisecond // requests under way cover so much time
	maxFlyByte = 24 << 20               // piece buffers of the whole node
	pieceTime  = time.Second            // a piece that moves no byte for so long is asked elsewhere
	twinTimes  = 6                      // an urgent piece is asked twice after so many times what pieces take,
	twinAfter  = 300 * time.Millisecond // but not before,
	twinFirst  = time.Second            // nor before that while none came
)

// pump asks for as many pieces as may be under way.
func (b *blob) pump(now time.Time) {
	if b.fill == nil || b.size == 0 || b.missing == 0 {
		return
	}
	limit := b.flyLimit()
	b.idleLocked(now)
	b.pumpUrgent(now)
	for from := 0; b.flying < limit && from < b.n && len(b.idle) > 0; {
		from = b.findCandidates(from)
		for b.flying < limit && b.askEach(limit, now) {
		}
	}
}

// idleLocked lists the neighbours that may be asked: none of another zone while one of this
// zone has all of the blob and time for it, and is not slow.
func (b *blob) idleLocked(now time.Time) {
	b.idle = b.idle[:0]
	near := false
	for _, nb := range b.nbrs {
		if now.Before(nb.busy) || !b.fits(nb) {
			continue
		}
		near = near || b.isNear(nb) && nb.haveN == b.n && nb.load <= leisure && nb.takes(now) <= nearTime
		if nb.flying < perPeer {
			b.idle = append(b.idle, nb)
		}
	}
	if near {
		b.idle = slices.DeleteFunc(b.idle, func(nb *neighbour) bool { return !b.isNear(nb) })
	}
}

// isNear reports whether a neighbour is of this node's zone.
func (b *blob) isNear(nb *neighbour) bool { return nb.l.zone == b.s.cfg.Zone }

// askEach goes once through the neighbours, starting with the one likely to deliver
// first, asks each for the rarest candidate that it has, and reports whether any was
// asked.
//
// The neighbour is chosen before the piece. The other way round, all ask the few who
// have the rarest pieces, most of them in vain, while others have nothing to send: of 20
// nodes at 20 Mbit/s uplinks were used to 83 %, whatever the limits on requests and
// uploads were.
func (b *blob) askEach(limit int, now time.Time) (asked bool) {
	b.idle = slices.DeleteFunc(b.idle, func(nb *neighbour) bool { return nb.flying >= perPeer })
	if len(b.candidates) == 0 {
		return false
	}
	for _, nb := range b.idle {
		nb.price = b.cost(nb, now)
	}
	slices.SortFunc(b.idle, func(a, z *neighbour) int { return cmp.Compare(a.price, z.price) })
	for _, nb := range b.idle {
		if b.flying >= limit {
			break
		}
		i := slices.IndexFunc(b.candidates, func(c candidate) bool { return nb.have.has(c.piece) })
		if i >= 0 && b.ask(nb, b.candidates[i].piece, now) {
			b.candidates = slices.Delete(b.candidates, i, i+1)
			asked = true
		}
	}
	return asked
}

// flyLimit is how many requests may be under way: enough for flyFor at the present
// pace. A home's link first brings what only this node gets: with 20 nodes at 20
// Mbit/s, the home of the largest layer, which like all others asked neighbours for the
// other two, had a third of its link for the registry, and all waited for that.
func (b *blob) flyLimit() int {
	n := 2 * leastFly
	if b.pace.rate > 0 {
		n = int(b.pace.rate * flyFor.Seconds() / float64(b.pieceSize))
	}
	n = min(max(n, leastFly), mostFly)
	if b.s.awaited.Load() && !b.authority {
		n /= asideShare
	}
	return n
}

// pumpUrgent asks for the pieces that a reader waits for, and asks again when
// the first answer takes longer than such answers do.
func (b *blob) pumpUrgent(now time.Time) {
	for i, n := b.cursor, 0; i < b.n && n < urgentN && b.within(i); i++ { // what lies before the cursor is not urgent
		if b.here.has(i) {
			continue
		}
		n++
		rs := b.wants[i]
		switch {
		case len(rs) == 0:
			b.askOne(i, nil, now)
		case len(rs) == 1 && now.Sub(rs[0].sent) > b.twinWait(rs[0].nb):
			b.askOne(i, rs[0].nb, now)
		}
	}
}

// twinWait is how long to wait before a piece asked of a neighbour is asked of another
// one too.
func (b *blob) twinWait(nb *neighbour) time.Duration {
	if b.pieceTook == 0 {
		return twinFirst
	}
	return max(twinTimes*b.usual(nb), twinAfter)
}

// usual is how long a piece from the neighbour may take, by what it and the others took. A
// node whose own slow link is full waits long for everybody: by each neighbour's time
// alone, 20 nodes at 20 Mbit/s took others for slow 60 to 140 times in a storm.
func (b *blob) usual(nb *neighbour) time.Duration { return max(nb.took, b.pieceTook) }

type candidate struct {
	piece int
	rare  uint32 // availability, then chance
}

// findCandidates lists the pieces of one window, rarest first, and returns where the
// next window begins; from counts from the cursor, around the end.
func (b *blob) findCandidates(from int) (next int) {
	c := b.candidates[:0]
	for n := 0; from < b.n && n < window; from++ {
		i := (b.cursor + from) % b.n
		if !b.within(i) {
			from = b.n
			break
		}
		if b.here.has(i) {
			continue
		}
		n++
		if b.avail[i] > 0 && b.wants[i] == nil {
			c = append(c, candidate{i, uint32(b.avail[i])<<16 | b.rng.Uint32()>>16})
		}
	}
	slices.SortFunc(c, func(a, z candidate) int { return cmp.Compare(a.rare, z.rare) })
	b.candidates = c
	return from
}

// within reports whether a piece may be asked for yet, see Want.Ahead.
func (b *blob) within(i int) bool {
	return b.ahead == 0 || i >= b.floor && int64(i-b.floor)*b.pieceSize < b.ahead
}

// askOne asks the neighbour likely to deliver the piece first, except one.
// Chance breaks ties.
func (b *blob) askOne(piece int, except *neighbour, now time.Time) bool {
	var best *neighbour
	for _, nb := range b.idle {
		if nb == except || nb.flying >= perPeer || !nb.have.has(piece) {
			continue
		}
		if nb.price = b.cost(nb, now); best == nil || nb.price < best.price {
			best = nb
		}
	}
	return best != nil && b.ask(best, piece, now)
}

// ask asks the neighbour for a piece, unless the node has as much under way as it has
// memory for, may take no more now, or the neighbour's link has ended. There is always
// memory for one piece of a blob, so that none starves.
func (b *blob) ask(nb *neighbour, piece int, now time.Time) bool {
	size := b.pieceLen(piece)
	if b.flying > 0 && b.s.flying.Load()+int64(size) > maxFlyByte {
		return false
	}
	if !b.s.budget.take(size, now) {
		if b.flying == 0 { // else it is a neighbour that this node waits for
			b.saving = now
		}
		return false
	}
	r := &request{blob: b, nb: nb, piece: piece, size: size, sent: now}
	r.moved.set(now)
	_, known := b.proofLocked(piece)
	if !nb.l.request(r, want{blob: b.id, piece: uint32(piece), needDigest: !known, passing: b.ahead > 0}) {
		b.s.budget.giveBack(size)
		return false
	}
	if nb.flying++; nb.flying == 1 {
		nb.since = now
	}
	b.flying++
	b.s.flying.Add(int64(size))
	b.wants[piece] = append(b.wants[piece], r)
	return true
}

// cost estimates how long a neighbour takes: what is under way there (our
// requests, and by its own word others'), times how long it took before.
func (b *blob) cost(nb *neighbour, now time.Time) float64 {
	took := nb.takes(now).Seconds()
	if took == 0 {
		took = 0.02 // seconds: nobody is passed over because nothing is known of him
	}
	c := (1 + float64(nb.flying) + float64(nb.load)/4) * (took + 0.005)
	if !b.isNear(nb) {
		c *= 4
	}
	return c * (1 + b.rng.Float64()/2)
}

// takes is how long a piece takes from the neighbour: the smoothed time or, if
// longer, the age of what is under way there. 0 = not known.
func (nb *neighbour) takes(now time.Time) time.Duration {
	if nb.flying > 0 {
		return max(nb.took, now.Sub(nb.since))
	}
	return nb.took
}

// queueTime is how long a piece may wait at a neighbour behind as many others
// as it lets in, if its uplink is like this node's pace.
func (b *blob) queueTime(size int) time.Duration {
	const ahead, slowest = 2 * (uploadSlots + leastQueue), 1 << 20
	rate := max(b.pace.rate/ahead, slowest)
	return time.Duration(float64(size) / rate * float64(time.Second))
}

// expire gives up requests that move no bytes, and reports the nodes that kept theirs while
// others delivered: those are slow, and not asked for a while. If nobody delivered, the
// fault is probably on this side.
func (b *blob) expire(now time.Time) (slow []string) {
	for _, rs := range b.wants {
		for _, r := range slices.Clone(rs) {
			limit := max(pieceTime, 4*b.usual(r.nb)) + b.queueTime(r.size)
			if now.Sub(r.moved.get()) < limit {
				continue
			}
			until := now.Add(limit)
			if r.nb.last.Before(r.sent) && now.Sub(b.came) < limit/2 {
				until = now.Add(banSlow.lasts())
				b.slowLocked(r.nb.l.node, now, until)
				if !slices.Contains(slow, r.nb.l.node) {
					slow = append(slow, r.nb.l.node)
				}
			}
			r.nb.notBefore(until)
			b.giveUpLocked(r)
		}
	}
	return slow
}

// slowLocked keeps a node from being asked before until, on whatever link.
func (b *blob) slowLocked(node string, now, until time.Time) {
	maps.DeleteFunc(b.slow, func(_ string, until time.Time) bool { return now.After(until) })
	b.slow[node] = until
}

package peer

import (
	"io"
	"time"
)

// sink is the fill as the node's upstream client sees it.
type sink struct {
	x *fetch
	w io.WriterAt
	// patient: what neighbours hold is left to them whether they give it or not.
	patient bool
}

func (k *sink) SetSize(n int64) error {
	if err := k.x.f.SetSize(n); err != nil {
		return err
	}
	k.x.b.setSize(n)
	return nil
}

func (k *sink) Asked() { k.x.b.asks() }

func (k *sink) Size() int64   { return k.x.f.Size() }
func (k *sink) Wanted() int64 { return k.x.f.Wanted() }

// WriteAt counts as progress before a piece is whole: pieces of 8 MiB may take
// seconds each.
func (k *sink) WriteAt(p []byte, off int64) (int, error) {
	n, err := k.w.WriteAt(p, off)
	if n > 0 {
		k.x.b.moved(n)
	}
	return n, err
}

func (b *blob) moved(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.came = time.Now()
	if b.upBytes += int64(n); b.upSince.IsZero() {
		b.upSince = b.came
	}
}

func (b *blob) asks() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = time.Now()
}

// Missing leaves out pieces that neighbours hold or are sending, unless nothing else is
// missing and they give none. That is checked each time: otherwise a home whose neighbours
// paused for a moment would fetch all the rest itself.
func (k *sink) Missing(off int64) (start, end int64, ok bool) {
	for {
		start, end, ok = k.x.f.Missing(off)
		if !ok || !k.patient && k.x.b.overdue(time.Now()) {
			return start, end, ok
		}
		s, e := k.x.b.lost(start, end)
		if s < e {
			return s, e, true
		}
		off = end
	}
}

// oweLocked notes since when neighbours hold all that this node, as home, lacks, and give nothing.
func (b *blob) oweLocked(now time.Time) {
	switch {
	case b.fill == nil || !b.authority || !b.owedLocked():
		b.owed = time.Time{}
	case b.owed.IsZero():
		b.owed = now
	case b.saving.After(b.owed): // it is this node's own limit
		b.owed = b.movedLocked(b.saving)
	default:
		b.owed = b.movedLocked(b.owed)
	}
}

// owedLocked reports whether something is missing here, and neighbours hold or send all of it.
func (b *blob) owedLocked() bool {
	for i := range b.n {
		if !b.here.has(i) && !b.elsewhereLocked(i) {
			return false
		}
	}
	return b.missing > 0
}

// overdue reports whether neighbours do not deliver what they hold.
func (b *blob) overdue(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.owed.IsZero() && now.Sub(b.movedLocked(b.owed)) > stallRejoin
}

// lost returns the first run within [start, end) that no neighbour has.
func (b *blob) lost(start, end int64) (int64, int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size == 0 {
		return start, end
	}
	skip := func(off int64, elsewhere bool) int64 {
		for i := int(off / b.pieceSize); off < end && i < b.n && b.elsewhereLocked(i) == elsewhere; i++ {
			off = int64(i+1) * b.pieceSize
		}
		return min(off, end)
	}
	start = skip(start, true)
	return start, skip(start, false)
}

// elsewhereLocked reports whether a neighbour holds or sends a piece.
func (b *blob) elsewhereLocked(i int) bool { return b.avail[i] > 0 || b.wants[i] != nil }

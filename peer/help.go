package peer

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A home whose way to the registry is slow but steady sets the pace for everybody, and nothing
// stalls. It lets another node that takes part, if possible a home of the blob, fetch from the far
// end for as long as both together are faster than it was alone: they are where this node's way is
// slow or the registry limits each client, and not where they share an uplink. What they fetch is
// disjoint except for what is under way where they meet.

const (
	helpAfter  = 3 * time.Second  // of upstream's bytes, before a home knows its pace
	helpWorth  = 10 * time.Second // at least, that the rest takes at this pace
	helpTrial  = 4 * time.Second  // until it is clear whether help brings anything
	helpMemory = 10 * time.Minute
	// helpLeast is the pace of a home behind an uplink that is poor for everybody: readers
	// need all of it at the near end.
	helpLeast = 256 << 10
	// Help pays if both together are helpGain as fast as the home was and this is no less
	// fast than helpShare: else they share something. Where that is the home's own link,
	// which also brings it what the helper got, both are far faster.
	helpGain    = 1.25
	helpShare   = 0.85
	helpGainFar = 3
	// helpClose is how much a home gets by itself meanwhile: a helper that has come
	// this near would fetch what the home has asked for.
	helpClose = 2 * time.Second
)

// helper is the member that helps this node, which is the home.
type helper struct {
	name   string    // of the member; "" = nobody helps
	since  time.Time // when it was appointed
	seen   time.Time // when it asked last; it does at least each renewEvery
	before float64   // bytes per second, of this node alone
	// What this node had from upstream then, and the helper as helper.
	ours, theirs int64
}

// pays reports whether the help was worth it, by what came from upstream in all.
func (h *helper) pays(ours, theirs int64, took time.Duration) bool {
	own := float64(ours-h.ours) / took.Seconds() / h.before
	together := own + float64(theirs-h.theirs)/took.Seconds()/h.before
	return together >= helpGainFar || together >= helpGain && own >= helpShare
}

// wantsHelp decides whether a member that joins, and has fetched that many bytes as
// helper before, is to help now. If so it returns the pace of this node alone in bytes
// per second, otherwise 0. What a home of the blob signs counts everywhere at once;
// another member is taken only where no home takes part.
func (b *blob) wantsHelp(member, registry string, fetched int64) int64 {
	now := time.Now()
	may := !b.s.ways.helpFails(registry, now) && (b.s.mayBeHome(b.id.key, member) || !b.homesMeet())
	rate, inVain := b.appoint(may, member, fetched, now)
	if inVain {
		b.s.log.Debug("help brings nothing", "digest", b.d, "registry", registry, "peer", member)
		b.s.ways.helpFailed(registry, now)
	}
	if rate > 0 {
		b.vouch([]string{member})
	}
	return rate
}

// homesMeet reports whether another home of the blob takes part.
func (b *blob) homesMeet() bool {
	homes := append(b.s.roster.homes(b.id.key, "", false), b.s.roster.homes(b.id.key, b.s.cfg.Zone, true)...)
	b.home.mu.Lock()
	defer b.home.mu.Unlock()
	return slices.ContainsFunc(homes, func(m *Member) bool { return b.home.members[m.Name] != nil })
}

// appoint decides that under the lock. inVain: the member helped, and it was not worth it.
func (b *blob) appoint(may bool, member string, fetched int64, now time.Time) (rate int64, inVain bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := &b.helper
	if h.name != "" && h.name != member && now.Sub(h.seen) > 2*renewEvery {
		*h = helper{} // it is gone
	}
	own := b.upstreamRateLocked(now)
	switch {
	case !may || b.fill == nil || !b.authority || own < helpLeast || b.leftLocked() < own*helpWorth.Seconds():
		if h.name == member {
			*h = helper{}
		}
		return 0, false
	case h.name == "":
		*h = helper{name: member, since: now, before: own, ours: b.upBytes, theirs: fetched}
	case h.name != member:
		return 0, false
	case now.Sub(h.since) > helpTrial && !h.pays(b.upBytes, fetched, now.Sub(h.since)):
		inVain = fetched > h.theirs // else it did not begin
		*h = helper{}
		return 0, inVain
	}
	h.seen = now
	return int64(h.before), false
}

// upstreamRateLocked is how many bytes a second came from upstream; 0 = too early to
// tell.
func (b *blob) upstreamRateLocked(now time.Time) float64 {
	if b.upSince.IsZero() || now.Sub(b.upSince) < helpAfter {
		return 0
	}
	return float64(b.upBytes) / now.Sub(b.upSince).Seconds()
}

// leftLocked is about how many bytes are missing here.
func (b *blob) leftLocked() float64 { return float64(b.missing) * float64(b.pieceSize) }

// helpFailed notes that two nodes get no more from a registry than one.
func (w *ways) helpFailed(registry string, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.vain) >= maxWays {
		clear(w.vain)
	}
	w.vain[registry] = now
}

func (w *ways) helpFails(registry string, now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return now.Sub(w.vain[registry]) < helpMemory
}

// helping is what a node does as helper.
type helping struct {
	stop  context.CancelFunc
	done  chan struct{} // closed when its goroutine touches the fill no more
	bytes atomic.Int64  // from upstream
	// enough: the run under way is the last one. Half of it would be an island.
	enough atomic.Bool
}

// help begins to help the home, which gets rate bytes a second by itself, continues
// to, or with 0 stops.
func (x *fetch) help(ctx context.Context, rate int64) {
	if rate <= 0 || !x.b.caughtUp(float64(rate)*helpClose.Seconds()) {
		if x.helping != nil {
			x.helping.enough.Store(true)
		}
		return
	}
	if x.helping != nil {
		if !closed(x.helping.done) {
			return
		}
		x.endHelp() // and there is more to do
	}
	ctx, stop := context.WithCancel(ctx)
	h := &helping{stop: stop, done: make(chan struct{})}
	x.helping = h
	x.s.log.Debug("helping the home", "digest", x.w.Digest, "peer", x.joined, "rate", rate)
	x.b.goesUp(true)
	go func() {
		defer close(h.done)
		far := &farSink{sink: sink{x: x, w: x.f.From(""), patient: true}, h: h, near: rate * int64(helpClose/time.Second), from: x.f.Size(), run: min(rate, farRun)}
		if err := x.up(ctx, far); err != nil && ctx.Err() == nil {
			x.s.log.Debug("help failed", "digest", x.w.Digest, "err", err)
		}
		if err := x.b.scan(x.f); err != nil { // while this node still signs what came from upstream
			x.s.log.Debug("help is not signed", "digest", x.w.Digest, "err", err)
		}
		x.b.goesUp(false)
	}()
}

// endHelp returns when no more bytes of the help will come.
func (x *fetch) endHelp() {
	if x.helping == nil {
		return
	}
	x.helping.stop()
	<-x.helping.done
	x.helped += x.helping.bytes.Load()
	x.helping = nil
}

// fetched is how many bytes this node has fetched as helper.
func (x *fetch) fetched() int64 {
	if x.helping == nil {
		return x.helped
	}
	return x.helped + x.helping.bytes.Load()
}

// caughtUp reports whether at most that many of the bytes missing here are at
// neighbours: otherwise it is not the home that sets the pace.
func (b *blob) caughtUp(most float64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	behind := 0
	for i := range b.n {
		if !b.here.has(i) && b.avail[i] > 0 {
			behind++
		}
	}
	return b.n > 0 && float64(behind)*float64(b.pieceSize) <= most
}

// farSink shows upstream the far end of what nobody has, and when that is there what
// comes before it, until it is near the home. So when the home's stream gets there, it
// is at its end: it would read through an island.
type farSink struct {
	sink
	h    *helping
	near int64 // bytes that the home is left with

	mu    sync.Mutex // guards the following
	from  int64
	run   int64     // bytes of a run
	begun time.Time // the run
}

const (
	// farRun is the first run, or what the home gets in a second if that is less; runs
	// that take less than a second are doubled.
	farRun     = 1 << 20
	farRunMost = 64 << 20
)

// Wanted is where to begin.
func (k *farSink) Wanted() int64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.from
}

func (k *farSink) WriteAt(p []byte, off int64) (int, error) {
	n, err := k.sink.WriteAt(p, off)
	k.h.bytes.Add(int64(n))
	return n, err
}

func (k *farSink) Missing(off int64) (start, end int64, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		start, end, ok = k.sink.Missing(max(off, k.from))
		if ok || off > k.from {
			return start, end, ok
		}
		first, _, more := k.sink.Missing(0)
		if !more || k.from-first <= k.near || k.h.enough.Load() {
			return 0, 0, false
		}
		now := time.Now()
		if now.Sub(k.begun) < time.Second {
			k.run = min(2*k.run, farRunMost)
		}
		k.begun = now
		piece := k.x.b.pieceSize // constant by now
		k.from = max(k.from-min(k.run, (k.from-first)/2), first+1)
		k.from = max(k.from/piece*piece, first)
	}
}

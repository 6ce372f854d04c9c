package upstream

import "time"

const (
	tick = 50 * time.Millisecond
	// window is the time over which throughput is measured. Where no more than a few packets
	// come in it, it is longer: until it has a chunk, or is slowWindow.
	window     = 150 * time.Millisecond
	slowWindow = 1500 * time.Millisecond
	// settle is how long new streams come up to speed before they are measured.
	settle = 100 * time.Millisecond
	// gain is what twice the streams must bring to stay, and what one stream's
	// throughput still grows by in a window while it is not steady.
	gain = 1.2
	// trialWindows is how often new streams are measured before they are given
	// up: a single window may hold nothing but their connections' slow start.
	trialWindows = 4
	// worthwhile is how long a blob must still take for one more stream.
	worthwhile = time.Second
	// tooSlow is how long a claim must still take for another stream to be tried on its far
	// end. That costs what is under way behind there, and is how a blob of no more than
	// firstRun gets more than one stream.
	tooSlow = 30 * time.Second
	// soonEnough is how long a stream may take for a piece if another is to be started.
	soonEnough = 10 * time.Second
	// hungry ticks in a row with a reader far from any stream start one there;
	// after starved ticks, if no more streams are allowed, one moves there.
	// That costs what its connection holds, and mostly another comes free
	// sooner.
	hungry  = 3
	starved = 20
)

// meter measures throughput over windows.
type meter struct {
	since time.Time // start of the window; zero = before the first byte
	base  int64     // bytes at its start
}

// restart begins a window at or after now.
func (m *meter) restart(at time.Time, bytes int64) { m.since, m.base = at, bytes }

// read is the throughput in bytes/s of a window that is over.
func (m *meter) read(now time.Time, bytes int64) (rate float64, ok bool) {
	elapsed := now.Sub(m.since)
	if elapsed < 0 { // settling
		m.base = bytes
	}
	if elapsed < window || elapsed < slowWindow && bytes-m.base < chunk {
		return 0, false
	}
	rate = float64(bytes-m.base) / elapsed.Seconds()
	m.restart(now, bytes)
	return rate, true
}

// steer decides, once a tick, how many more streams should start now.
func (f *fetch) steer(now time.Time) (start int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.running == 0 || f.fatal || f.src.noRanges() {
		return 0
	}
	if start = f.feed(); start == 0 {
		start = f.widen(now)
	}
	return start
}

// more counts n streams that are about to start.
func (f *fetch) more(n int) int {
	f.running += n
	f.opening += n
	f.target = max(f.target, f.running)
	return n
}

// feed serves a reader that is far from every stream, as after a seek: it gets
// a stream of its own, or in the end the furthest claim makes way.
func (f *fetch) feed() (start int) {
	piece := max(f.sink.PieceSize(), 1)
	off, _, ok := f.missing(max(f.sink.Wanted(), 0) / piece * piece)
	if !ok || f.near(off) {
		f.starving = 0
		return 0
	}
	f.starving++
	another := f.running < f.src.c.cfg.StreamsPerBlob && !f.alone
	if f.starving < hungry || (!another && f.starving < starved) {
		return 0
	}
	f.starving = 0
	for cl := range f.claims { // let the claim that covers it end before it
		if cl.off < off && off < cl.end {
			cl.end = max(off/piece*piece, cl.off)
		}
	}
	if another {
		return f.more(1)
	}
	var farthest *claim
	for cl := range f.claims {
		if farthest == nil || cl.off > farthest.off {
			farthest = cl
		}
	}
	if farthest != nil { // its stream claims again, and finds off first
		farthest.end, farthest.left = farthest.off, true
	}
	return 0
}

// near says whether a stream will be at off within about a second.
func (f *fetch) near(off int64) bool {
	reach := max(int64(f.rate)/int64(max(f.running, 1)), segmentMin)
	for cl := range f.claims {
		if cl.off <= off && off < cl.end && off-cl.off <= reach {
			return true
		}
	}
	return false
}

// widen measures, and doubles the streams as long as that pays.
func (f *fetch) widen(now time.Time) (start int) {
	if f.bytes == 0 {
		return 0
	}
	if f.opening > 0 || f.meter.since.IsZero() {
		at := now
		if f.opening > 0 {
			at = now.Add(settle)
		}
		f.meter.restart(at, f.bytes)
		return 0
	}
	rate, ok := f.meter.read(now, f.bytes)
	if !ok {
		return 0
	}
	last, best := f.last, max(f.last, rate)
	f.last = rate
	if f.trial > 0 && rate < gain*f.rate {
		if f.trial--; f.trial == 0 {
			f.frozen, f.target = true, f.before
		}
		return 0
	}
	// What one window lost to a hiccup must not count as gained in the next.
	steady := f.trial > 0 || (last > 0 && rate <= gain*last)
	f.rate, f.trial = best, 0
	if f.frozen || !steady || !f.worth(rate, now) {
		return 0
	}
	add := min(f.running, f.src.c.cfg.StreamsPerBlob-f.running)
	if add <= 0 {
		return 0
	}
	f.before, f.trial = f.running, trialWindows
	return f.more(add)
}

// worth says whether enough is left for another stream, unclaimed or of a claim that is too
// slow, and each piece comes soon enough. Streams share a poor uplink: what came first in 10 s then comes with what
// follows it in 20, and nobody can use half a piece. A stream may also gain what it
// takes from other nodes' (measured: three blobs on 2 Mbit/s went to nine streams, and
// no piece of 1 MiB was whole after 30 s).
func (f *fetch) worth(rate float64, now time.Time) bool {
	soon := rate/float64(max(f.running, 1))*soonEnough.Seconds() >= float64(f.sink.PieceSize())
	return soon && float64(f.remaining()) >= rate*worthwhile.Seconds() &&
		(f.unclaimed() >= 2*segmentMin || f.slowest(tooSlow, now) != nil)
}

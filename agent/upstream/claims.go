package upstream

import "time"

const (
	// firstRun is what the first request asks for at most. One stream brings
	// it sooner than it takes to tell whether more would help, or is slow enough
	// that there is time.
	firstRun = 16 << 20
	// Later requests ask for segmentTime's worth of bytes: so few of them that
	// the pauses between do not matter, and so little each that neither a reader
	// elsewhere nor the blob's end waits long for one to be over.
	segmentTime = 3 * time.Second
	segmentMin  = 4 << 20
	segmentMax  = 64 << 20 // where throughput is not known, or several share
	// slowEnd is how much longer a claim must take before an idle stream
	// takes half of it away, which costs what is under way.
	slowEnd = 4 * time.Second
	// farAway is how much may be fetched in vain because someone else brought
	// it, before a new request is worth its cost.
	farAway = 8 << 20
)

// claim is the run [off, end) that one stream works on: one request, which
// is read to its end (see I7).
type claim struct {
	off, end int64
	left     bool      // end was moved here for a reader somewhere else
	start    int64     // off when the answer came
	since    time.Time // when it came; zero = not yet
	body     *settled  // of the answer; nil = not yet
}

// remaining is how long cl will take at its own pace; 0 = cannot be told yet.
func (cl *claim) remaining(now time.Time) time.Duration {
	elapsed := now.Sub(cl.since)
	if cl.since.IsZero() || elapsed < window {
		return 0
	}
	rate := float64(max(cl.off-cl.start, 1)) / elapsed.Seconds()
	return time.Duration(min(float64(cl.end-cl.off)/rate, 1e6) * float64(time.Second))
}

// claim finds work for st; nil means that st is done, and no longer counts.
func (f *fetch) claim(st *stream) *claim {
	f.mu.Lock()
	defer f.mu.Unlock()
	cl, ok := f.next(st)
	// Three times the blob means that the sink loses what it is given.
	if !ok || f.fatal || (st.extra && f.running > f.target) || f.bytes > 3*f.src.known()+segmentMax {
		f.arrived(st)
		f.running--
		return nil
	}
	f.claims[cl] = struct{}{}
	return cl
}

// next is what st's body still holds, then a segment of the first free run
// from where a reader wants one, then of the first at all, then the far half
// of a claim that would take too long.
func (f *fetch) next(st *stream) (*claim, bool) {
	piece := max(f.sink.PieceSize(), 1)
	if cl, ok := f.rest(st, piece); ok {
		return cl, true
	}
	wanted := max(f.sink.Wanted(), 0) / piece * piece
	off, end, ok := f.free(wanted)
	if !ok && wanted > 0 {
		off, end, ok = f.free(0)
	}
	if !ok {
		return f.split(st, piece, time.Now())
	}
	size := f.segment(f.src.known() - off)
	if f.onTrial(st) {
		size = min(size, f.trialSize())
	}
	cut := (off + size + piece - 1) / piece * piece
	if cut+segmentMin < end { // no crumbs
		end = cut
	}
	return &claim{off: off, end: end}, true
}

// rest is what comes next in the body that st has open.
func (f *fetch) rest(st *stream, piece int64) (*claim, bool) {
	if st.body == nil || st.off >= st.bodyEnd {
		return nil, false
	}
	off, end, ok := f.free(st.off)
	if !ok || !f.reaches(st, off) {
		return nil, false
	}
	return &claim{off: off, end: min(end, (st.bodyEnd+piece-1)/piece*piece)}, true
}

// segment is what one stream claims at a time, with left bytes from there to
// the blob's end: less towards the end, so that all streams end together, but
// enough to be worth a request.
func (f *fetch) segment(left int64) int64 {
	switch {
	case f.single() || (f.bytes == 0 && left <= firstRun):
		return left
	case f.bytes == 0:
		return firstRun
	}
	most := int64(segmentMax)
	if f.rate > 0 {
		most = int64(f.rate / float64(f.target) * segmentTime.Seconds())
	}
	if f.target == 1 && (f.frozen || float64(left) < f.rate*worthwhile.Seconds()) { // nobody to share with
		return max(most, segmentMax)
	}
	return max(min(most, segmentMax, left/int64(2*max(f.target, 2))), segmentMin)
}

// onTrial reports whether st has yet to prove its worth.
func (f *fetch) onTrial(st *stream) bool { return st.extra && f.trial > 0 }

// trialSize is what a stream on trial claims: it brings that even if it does not help.
// Behind a poor uplink segmentMin would take a minute, during which what readers wait
// for comes at half the pace.
func (f *fetch) trialSize() int64 {
	return int64(f.rate / float64(f.target) * segmentTime.Seconds())
}

// single says that there is only ever one stream, which may then as well ask
// for everything at once.
func (f *fetch) single() bool { return f.src.c.cfg.StreamsPerBlob == 1 || f.src.noRanges() }

// missing is the sink's, with nothing past the end.
func (f *fetch) missing(from int64) (off, end int64, ok bool) {
	if from >= f.src.known() {
		return 0, 0, false
	}
	off, end, ok = f.sink.Missing(from)
	return off, end, ok && end > max(off, from)
}

// free is the first run that ends after from, is missing and not claimed.
func (f *fetch) free(from int64) (off, end int64, ok bool) {
	for {
		off, end, ok = f.missing(from)
		if !ok {
			return 0, 0, false
		}
		next, covered := from, false
		for cl := range f.claims {
			switch {
			case cl.off <= off && off < cl.end:
				next, covered = max(next, cl.end), true
			case off < cl.off && cl.off < end:
				end = cl.off
			}
		}
		switch {
		case next > from:
			from = next
		case covered:
			return 0, 0, false
		default:
			return off, end, true
		}
	}
}

// heldUp reports whether this node is the one that is slow to take what comes: another
// stream would not bring it sooner, and what is on its way would be lost (see I7). Where
// twenty agents shared two busy cores, homes without this check were sent up to 46 MB
// for 40.
func (cl *claim) heldUp() bool { return cl.body != nil && cl.body.unread() >= behind }

// behind is how many bytes wait for a reader that does not keep up. One that does leaves
// none for longer than it takes to wake it; how many wait for the other is the kernel's
// choice, with a small receive buffer as few as 5.7 KB.
const behind = 4 << 10

// slowest is the claim that would take longest, if that is longer than longest.
func (f *fetch) slowest(longest time.Duration, now time.Time) (slowest *claim) {
	for cl := range f.claims {
		if t := cl.remaining(now); t > longest && !cl.heldUp() {
			slowest, longest = cl, t
		}
	}
	return slowest
}

// split takes the far half of the claim that would take longest, or as much of it as st may
// have on trial.
func (f *fetch) split(st *stream, piece int64, now time.Time) (*claim, bool) {
	slowest := f.slowest(slowEnd, now)
	if slowest == nil {
		return nil, false
	}
	size := (slowest.end - slowest.off) / 2
	if f.onTrial(st) {
		size = min(size, f.trialSize())
	}
	from := (slowest.end - size) / piece * piece
	if from <= slowest.off {
		return nil, false
	}
	cl := &claim{off: from, end: slowest.end}
	slowest.end = from
	return cl, true
}

// unclaimed is how many missing bytes no stream is working on.
func (f *fetch) unclaimed() int64 {
	n := f.remaining()
	for cl := range f.claims {
		n -= max(cl.end-cl.off, 0)
	}
	return max(n, 0)
}

func (f *fetch) remaining() (n int64) {
	for from := int64(0); ; {
		off, end, ok := f.missing(from)
		if !ok {
			return n
		}
		n += end - max(off, from)
		from = end
	}
}

package upstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// chunk is the size of one write to the sink: few calls, and few bytes
	// that a reader waits for.
	chunk = 256 << 10
	// A second stream must have something to do: below parallelMin of
	// remaining bytes one is done sooner than the measurement.
	parallelMin = 16 << 20
	segmentMin  = 8 << 20
	segmentMax  = 64 << 20
	// splitMin is the smallest remainder that is worth breaking a connection for.
	splitMin = 4 * segmentMin
	// gain is what one more stream must add to stay.
	gain = 1.2
	// window is the time over which throughput is measured; half of it passes
	// first, for the new stream to come up to speed.
	window = 400 * time.Millisecond
	tick   = 50 * time.Millisecond
	// trialWindows is how often a new stream is measured before it is given up:
	// a single window may hold nothing but its connection's slow start.
	trialWindows = 2
	// hungry ticks in a row with a reader far from any stream move one there.
	hungry = 3
)

var buffers = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// fetch brings one blob into one sink. Its streams claim disjoint missing
// runs; steer, on the caller's goroutine, decides how many there are.
type fetch struct {
	src  *source
	sink Sink
	stop context.CancelCauseFunc

	mu      sync.Mutex // guards all below; the sink is asked under it, it never calls back
	claims  map[*claim]struct{}
	running int   // streams
	target  int   // streams that should be
	frozen  bool  // no more streams: one more did not help, or could not be had
	bytes   int64 // written
	err     error // why the last stream that failed did
	fatal   bool  // err is the sink's; no stream can go on

	// Only steer uses these.
	since    time.Time // start of the window; zero = before the first byte
	base     int64     // bytes at its start
	rate     float64   // last measured, bytes/s
	trial    int       // windows in which the newest stream may yet prove its worth
	starving int
}

// claim is the run [off, end) that one stream works on.
type claim struct{ off, end int64 }

// Fetch writes what s misses of a blob and returns when nothing is missing,
// or an *Error when every stream gave up; an error of s ends it as it is,
// wrapped. It waits for its own goroutines. Digests are the sink's business.
func (c *Client) Fetch(ctx context.Context, t Target, d digest.Digest, s Sink) error {
	src, err := c.newSource(t, d, "fetch")
	if err != nil {
		return err
	}
	src.size = s.Size()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f := &fetch{src: src, sink: s, stop: cancel, claims: map[*claim]struct{}{}, target: 1}
	first := &stream{src: src, op: "fetch", end: -1}
	defer first.close()
	if err := f.learnSize(ctx, first); err != nil {
		return err
	}
	return f.run(ctx, first)
}

// learnSize opens the first stream where the sink's size is not known yet:
// the answer that brings the size brings the bytes too.
func (f *fetch) learnSize(ctx context.Context, st *stream) error {
	if f.sink.Size() >= 0 {
		return nil
	}
	if err := st.ready(ctx); err != nil {
		return err
	}
	if err := f.sink.SetSize(f.src.known()); err != nil {
		return f.sinkError(err)
	}
	return nil
}

func (f *fetch) sinkError(err error) error {
	return fmt.Errorf("write blob %s: %w", f.src.d, err)
}

func (f *fetch) run(ctx context.Context, first *stream) error {
	var streams sync.WaitGroup
	ended := make(chan struct{}, f.src.c.cfg.StreamsPerBlob)
	start := func(st *stream) {
		streams.Go(func() {
			f.work(ctx, st)
			ended <- struct{}{}
		})
	}
	f.running = 1
	start(first)
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for running := 1; running > 0; {
		select {
		case <-ended:
			running--
		case now := <-ticker.C:
			if f.steer(now) {
				running++
				start(&stream{src: f.src, op: "fetch", end: -1, extra: true})
			}
		}
	}
	streams.Wait()
	return f.result(ctx)
}

func (f *fetch) result(ctx context.Context) error {
	_, _, missing := f.sink.Missing(0)
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.fatal:
		return f.err
	case !missing:
		return nil
	case f.err != nil:
		return f.err
	}
	return f.sinkError(cmp.Or(ctx.Err(), errors.New("it keeps missing what it was given")))
}

// work is one stream's life: claim, pull, claim again.
func (f *fetch) work(ctx context.Context, st *stream) {
	defer st.close()
	for {
		cl := f.claim(st)
		if cl == nil {
			return
		}
		err := f.pull(ctx, st, cl)
		f.release(cl)
		if err != nil {
			f.fail(err)
			return
		}
	}
}

// fail ends one stream. Others go on with what it leaves, unless the sink is
// what failed.
func (f *fetch) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.running--
	f.frozen = true
	f.target = max(1, f.running)
	_, upstream := errors.AsType[*Error](err)
	if upstream && (errors.Is(err, errNoRanges) || errors.Is(err, errBusy)) {
		return
	}
	if !f.fatal {
		f.err = err
	}
	if !upstream {
		f.fatal = true
		f.stop(err)
	}
}

func (f *fetch) release(cl *claim) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.claims, cl)
}

// claim finds work for st; nil means that it is done, and it no longer counts.
func (f *fetch) claim(st *stream) *claim {
	f.mu.Lock()
	defer f.mu.Unlock()
	cl, ok := f.next(st)
	// Three times the blob means that the sink loses what it is given.
	if !ok || f.fatal || (st.extra && f.running > f.target) || f.bytes > 3*f.src.known()+segmentMin {
		f.running--
		return nil
	}
	f.claims[cl] = struct{}{}
	return cl
}

// next is the first free run from where a reader wants one, then from the
// start, then the far half of the largest claim.
func (f *fetch) next(st *stream) (*claim, bool) {
	piece := max(f.sink.PieceSize(), 1)
	size := f.src.known()
	wanted := max(f.sink.Wanted(), 0) / piece * piece
	off, end, ok := f.free(wanted)
	if !ok && wanted > 0 {
		off, end, ok = f.free(0)
	}
	if !ok {
		return f.split(piece)
	}
	if f.target > 1 || st.extra {
		if cut := (off + segment(size-off, max(f.target, 2))) / piece * piece; cut > off {
			end = min(end, cut)
		}
	}
	return &claim{off, end}, true
}

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
		next := from
		for cl := range f.claims {
			switch {
			case cl.off <= off && off < cl.end:
				next = max(next, cl.end)
			case off < cl.off && cl.off < end:
				end = cl.off
			}
		}
		switch {
		case next > from:
			from = next
		case f.covered(off):
			return 0, 0, false
		default:
			return off, end, true
		}
	}
}

func (f *fetch) covered(off int64) bool {
	for cl := range f.claims {
		if cl.off <= off && off < cl.end {
			return true
		}
	}
	return false
}

// split takes the far half of the largest claim, if that is worth a connection.
func (f *fetch) split(piece int64) (*claim, bool) {
	var largest *claim
	for cl := range f.claims {
		if largest == nil || cl.end-cl.off > largest.end-largest.off {
			largest = cl
		}
	}
	if largest == nil || largest.end-largest.off < splitMin {
		return nil, false
	}
	middle := (largest.off + (largest.end-largest.off)/2) / piece * piece
	cl := &claim{middle, largest.end}
	largest.end = middle
	return cl, true
}

// pull brings one claim in, as far as the claim still goes while it does.
func (f *fetch) pull(ctx context.Context, st *stream, cl *claim) error {
	f.aim(st, cl)
	if err := st.ready(ctx); err != nil { // before a buffer: many may wait here
		return err
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	check := st.off + 4*chunk
	for {
		left := f.left(cl)
		if left <= 0 {
			return nil
		}
		n, err := st.Read(ctx, (*buf)[:min(int64(chunk), left)])
		if n > 0 {
			if err := f.write(cl, (*buf)[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		// Someone else may fill the same blob: do not fetch what is there.
		if st.off >= check {
			check = st.off + 4*chunk
			if off, _, ok := f.sink.Missing(st.off); !ok || off > st.off+segmentMin {
				return nil
			}
		}
	}
}

// aim points st at a claim. A body that is open at the right place goes on:
// after the claim of the first stream was cut short and no other took the rest.
func (f *fetch) aim(st *stream, cl *claim) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if st.body == nil || st.off != cl.off || st.bodyEnd < cl.end {
		st.close()
		st.off = cl.off
	}
	st.end = cl.end
}

func (f *fetch) left(cl *claim) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return cl.end - cl.off
}

func (f *fetch) write(cl *claim, p []byte) error {
	n, err := f.sink.WriteAt(p, cl.off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return f.sinkError(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	cl.off += int64(n)
	f.bytes += int64(n)
	return nil
}

// steer decides, once a tick, whether one more stream should start now.
func (f *fetch) steer(now time.Time) (start bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.running == 0 || f.fatal || f.src.noRanges() {
		return false
	}
	return f.feed() || f.widen(now)
}

// feed looks after a reader that is far from every stream, as after a seek: it
// gets a stream of its own, or the newest claim makes way.
func (f *fetch) feed() (start bool) {
	piece := max(f.sink.PieceSize(), 1)
	off, _, ok := f.missing(max(f.sink.Wanted(), 0) / piece * piece)
	if !ok || f.near(off) {
		f.starving = 0
		return false
	}
	if f.starving++; f.starving < hungry {
		return false
	}
	f.starving = 0
	for cl := range f.claims { // let the claim that covers it end before it
		if cl.off < off && off < cl.end {
			cl.end = max(off/piece*piece, cl.off)
		}
	}
	if f.running < f.src.c.cfg.StreamsPerBlob && !f.frozen {
		f.running++
		f.target = max(f.target, f.running)
		return true
	}
	var farthest *claim
	for cl := range f.claims {
		if farthest == nil || cl.off > farthest.off {
			farthest = cl
		}
	}
	if farthest != nil {
		farthest.end = farthest.off // its stream claims again, and finds off first
	}
	return false
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

// widen measures, and starts one more stream where the last one paid.
func (f *fetch) widen(now time.Time) (start bool) {
	if f.bytes == 0 || f.frozen {
		return false
	}
	if f.since.IsZero() {
		f.since, f.base = now, f.bytes
		return false
	}
	elapsed := now.Sub(f.since)
	if elapsed < 0 { // settling
		f.base = f.bytes
		return false
	}
	if elapsed < window {
		return false
	}
	rate := float64(f.bytes-f.base) / elapsed.Seconds()
	f.since, f.base = now, f.bytes
	if f.trial > 0 && rate < gain*f.rate {
		if f.trial--; f.trial == 0 {
			f.frozen = true
			f.target = max(1, f.running-1)
		}
		return false
	}
	f.rate, f.trial = rate, 0
	if f.running >= f.src.c.cfg.StreamsPerBlob || f.remaining() < parallelMin {
		return false
	}
	if f.running == 1 {
		f.shorten()
	}
	f.since, f.trial = now.Add(window/2), trialWindows
	f.running++
	f.target = f.running
	return true
}

// shorten makes the first stream's claim, which reaches to the blob's end, one
// segment long: the rest is everyone's.
func (f *fetch) shorten() {
	piece := max(f.sink.PieceSize(), 1)
	for cl := range f.claims {
		cut := (cl.off + segment(cl.end-cl.off, 2) + piece - 1) / piece * piece
		cl.end = min(cl.end, cut)
	}
}

// segment is what one of several streams claims at a time: less towards the
// end, so that all end together, but enough to be worth a request.
func segment(left int64, streams int) int64 {
	return min(max(left/int64(2*streams), segmentMin), segmentMax)
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

// noRanges says whether no endpoint that would be asked takes ranges.
func (s *source) noRanges() bool {
	for _, ep := range s.reg.endpoints {
		if ep.ranges.Load() != rangesNo {
			return false
		}
	}
	return true
}

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

// chunk is the size of one write to the sink: few calls, and few bytes that a
// reader waits for.
const chunk = 256 << 10

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
	opening int   // of them, extra ones that have no answer yet
	target  int   // streams that should be
	frozen  bool  // more streams do not help, or cannot be had
	alone   bool  // cannot be had
	bytes   int64 // written
	err     error // why the last stream that failed did
	fatal   bool  // err is the sink's; no stream can go on
	meter   meter
	rate    float64 // measured, bytes/s, the better of two windows; 0 = not yet

	// Only steer uses these.
	last     float64 // window's rate
	trial    int     // windows in which the newest streams may yet prove their worth
	before   int     // streams without them
	starving int     // ticks
}

// Fetch writes what s lacks of a blob. It returns nil when nothing is missing, an
// *Error when every stream gave up; an error of s ends it and is wrapped. If the
// size is not what s believed, s is told, for the next try. It waits for its own
// goroutines. Digests are the sink's business.
func (c *Client) Fetch(ctx context.Context, t Target, d digest.Digest, s Sink) error {
	src, err := c.newSource(t, d, "fetch")
	if err != nil {
		return err
	}
	src.size = s.Size()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f := &fetch{src: src, sink: s, stop: cancel, claims: map[*claim]struct{}{}, target: 1, frozen: c.cfg.StreamsPerBlob == 1}
	first := &stream{src: src, op: "fetch", end: -1}
	defer first.close()
	if err := f.learnSize(ctx, first); err != nil {
		return err
	}
	err = f.run(ctx, first)
	if differs, ok := errors.AsType[*sizeError](err); ok {
		_ = s.SetSize(differs.size) // its error is what err says
	}
	return err
}

// learnSize opens the first stream where the sink's size is not known yet: the
// answer that brings the size brings the bytes too. It asks for no more than
// one stream should bring, which is all of most blobs (see I7).
func (f *fetch) learnSize(ctx context.Context, st *stream) error {
	if f.sink.Size() >= 0 {
		return nil
	}
	if !f.single() {
		st.end = firstRun
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
			for range f.steer(now) {
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
		if f.release(cl) {
			st.close()
		}
		if err != nil && f.fail(st, err) {
			return
		}
	}
}

// fail reports whether err ends a stream. Others go on with what it leaves,
// unless the sink is what failed. A spare one that is alone by now stays: it
// may wait for a slot, and read what it does not need.
func (f *fetch) fail(st *stream, err error) (ends bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.arrived(st)
	f.frozen, f.alone = true, true
	_, upstream := errors.AsType[*Error](err)
	spare := upstream && (errors.Is(err, errNoRanges) || errors.Is(err, errBusy))
	if spare && st.extra && f.running == 1 {
		st.extra = false
		return false
	}
	f.running--
	f.target = max(1, f.running)
	if spare {
		return true
	}
	if !f.fatal {
		f.err = err
	}
	if !upstream {
		f.fatal = true
		f.stop(err)
	}
	return true
}

// arrived counts st among the streams that have an answer, or never will.
func (f *fetch) arrived(st *stream) {
	if st.extra && !st.counted {
		st.counted = true
		f.opening--
	}
}

// release gives a claim back and returns whether its stream is to abandon its
// body for a reader somewhere else.
func (f *fetch) release(cl *claim) (leave bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.claims, cl)
	return cl.left
}

// pull fetches one claim, as far as the claim still reaches meanwhile.
func (f *fetch) pull(ctx context.Context, st *stream, cl *claim) error {
	f.aim(st, cl)
	if err := st.ready(ctx); err != nil { // before a buffer: many may wait here
		return err
	}
	f.begin(st, cl)
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	check := st.off + 4*chunk
	for {
		left := f.end(cl) - cl.off
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
			off, _, ok := f.sink.Missing(st.off)
			end := f.end(cl)
			if !ok || off > st.off+farAway || off >= end && end > st.off+cheapSkip {
				return nil
			}
		}
	}
}

// aim points st at a claim. A body that is open at the right place is kept, as
// is one a little before it if reading on costs less than closing it might.
func (f *fetch) aim(st *stream, cl *claim) {
	f.mu.Lock()
	defer f.mu.Unlock()
	st.end = cl.end
	if f.reaches(st, cl.off) {
		st.skip += cl.off - st.off
	} else {
		st.close()
	}
	st.off = cl.off
}

// reaches says whether st's open body is the way to get what is at off.
func (f *fetch) reaches(st *stream, off int64) bool {
	return st.body != nil && st.off <= off && off < st.bodyEnd && (off-st.off <= cheapSkip || f.src.noRanges())
}

// begin notes that the answer for cl is there.
func (f *fetch) begin(st *stream, cl *claim) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.arrived(st)
	cl.start, cl.since = cl.off, time.Now()
	cl.body, _ = st.body.(*settled)
}

func (f *fetch) end(cl *claim) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return cl.end
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

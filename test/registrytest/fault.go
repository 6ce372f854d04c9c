package registrytest

import (
	"context"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Fault is something that goes wrong with the requests it was injected for.
type Fault struct {
	match        Match
	skip, times  int
	unauthorized bool
	effects      []func(*answer)

	released    chan struct{}
	releaseOnce sync.Once
	held        chan struct{}
	heldOnce    sync.Once
	remove      func()

	hits atomic.Int64
	seen int // guarded by the mutex of faults
}

// Effect is one property of a Fault.
type Effect func(*Fault)

// Inject makes every matching request suffer all effects, from now on until
// Remove. A request may suffer several faults; they apply in the order of their
// injection. Requests that are about to be challenged for credentials are
// passed over, and not counted by Skip and Times, unless EvenUnauthorized is
// among the effects.
func (s *Server) Inject(m Match, effects ...Effect) *Fault {
	f := &Fault{match: m, released: make(chan struct{}), held: make(chan struct{})}
	for _, e := range effects {
		e(f)
	}
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	s.faults.list = append(s.faults.list, f)
	f.remove = func() { s.faults.removeOne(f) }
	return f
}

// ClearFaults removes and releases all faults.
func (s *Server) ClearFaults() {
	for _, f := range s.faults.all() {
		f.Remove()
	}
}

// Remove ends the fault for later requests and releases those it holds.
func (f *Fault) Remove() {
	f.remove()
	f.Release()
}

// Release lets requests go on that Hold or StallAfter stopped, now and later.
func (f *Fault) Release() { f.releaseOnce.Do(func() { close(f.released) }) }

// Held is closed as soon as one request is stopped by Hold or StallAfter.
func (f *Fault) Held() <-chan struct{} { return f.held }

// Hits is how many requests have suffered the fault.
func (f *Fault) Hits() int { return int(f.hits.Load()) }

// hold blocks until the fault is released or the client is gone.
func (f *Fault) hold(ctx context.Context) error {
	f.heldOnce.Do(func() { close(f.held) })
	select {
	case <-f.released:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

type faults struct {
	mu   sync.Mutex // guards list and seen of each
	list []*Fault
}

// take returns the faults that r suffers, and counts them.
func (fs *faults) take(r *Request, challenged bool) []*Fault {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	var out []*Fault
	for _, f := range fs.list {
		if !f.match.matches(r) || challenged && !f.unauthorized {
			continue
		}
		f.seen++
		if f.seen <= f.skip || f.times > 0 && f.Hits() == f.times {
			continue
		}
		f.hits.Add(1)
		out = append(out, f)
	}
	return out
}

func (fs *faults) removeOne(f *Fault) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.list = slices.DeleteFunc(fs.list, func(g *Fault) bool { return g == f })
}

func (fs *faults) all() []*Fault {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return slices.Clone(fs.list)
}

func onAnswer(e func(*answer)) Effect {
	return func(f *Fault) { f.effects = append(f.effects, e) }
}

// Skip lets n matching requests pass first.
func Skip(n int) Effect { return func(f *Fault) { f.skip = n } }

// Times ends the fault after n requests have suffered it.
func Times(n int) Effect { return func(f *Fault) { f.times = n } }

// EvenUnauthorized strikes requests without sufficient credentials too.
func EvenUnauthorized() Effect { return func(f *Fault) { f.unauthorized = true } }

// Do calls fn when a request suffers the fault, before it is answered.
func Do(fn func()) Effect { return onAnswer(func(*answer) { fn() }) }

// Status answers with a status and an error body instead; header is pairs of
// key and value.
func Status(code int, header ...string) Effect {
	return onAnswer(func(a *answer) {
		a.setError(code, "UNKNOWN", "injected fault")
		for i := 0; i+1 < len(header); i += 2 {
			a.header.Set(header[i], header[i+1])
		}
	})
}

// TooManyRequests is status 429; after < 0 leaves Retry-After out.
func TooManyRequests(after time.Duration) Effect {
	return onAnswer(func(a *answer) {
		a.setError(http.StatusTooManyRequests, "TOOMANYREQUESTS", "injected fault")
		if after >= 0 {
			a.header.Set("Retry-After", strconv.Itoa(int(after.Seconds())))
		}
	})
}

// Delay waits before sending headers, unless the client leaves.
func Delay(d time.Duration) Effect {
	return onAnswer(func(a *answer) { a.delay += d })
}

// Hold sends no headers until Release or until the client leaves.
func Hold() Effect {
	return func(f *Fault) { f.effects = append(f.effects, func(a *answer) { a.held = append(a.held, f) }) }
}

// StallAfter sends n bytes of the body, and the rest only after Release.
func StallAfter(n int64) Effect {
	return func(f *Fault) { f.effects = append(f.effects, func(a *answer) { a.stallAt, a.stalled = n, f }) }
}

// CutAfter closes the connection properly (FIN) after n bytes of the body,
// short of Content-Length.
func CutAfter(n int64) Effect {
	return onAnswer(func(a *answer) { a.cutAt = n })
}

// ResetAfter resets the connection (RST) after n bytes of the body.
func ResetAfter(n int64) Effect {
	return onAnswer(func(a *answer) { a.cutAt, a.reset = n, true })
}

// CorruptAt flips the bits of the byte at an offset of the blob or manifest,
// wherever the answer begins.
func CorruptAt(off int64) Effect {
	return onAnswer(func(a *answer) { a.content = &corrupt{a.content, off} })
}

// ContentLength claims a length of delta bytes more or less than there are. With
// more, the connection is closed at the end; with less, the rest is not sent.
func ContentLength(delta int64) Effect {
	return onAnswer(func(a *answer) { a.lengthDelta = delta })
}

// IgnoreRange answers 200 and the whole to a Range request.
func IgnoreRange() Effect {
	return onAnswer(func(a *answer) { a.rangeHeader = "" })
}

// ShiftRange answers a Range request with another range that begins delta bytes
// later or earlier, and says so in Content-Range.
func ShiftRange(delta int64) Effect {
	return onAnswer(func(a *answer) { a.shift = delta })
}

// MislabelRange sends what was asked for with a Content-Range that is delta
// bytes off.
func MislabelRange(delta int64) Effect {
	return onAnswer(func(a *answer) { a.mislabel = delta })
}

// RangeTotal makes Content-Range claim another size of the whole.
func RangeTotal(n int64) Effect {
	return onAnswer(func(a *answer) { a.rangeTotal = n })
}

// RedirectLoop redirects the request to itself, forever.
func RedirectLoop() Effect {
	return onAnswer(func(a *answer) { a.setRedirect(a.request.Path) })
}

// RedirectTo redirects to a URL of the test's choice.
func RedirectTo(url string) Effect {
	return onAnswer(func(a *answer) { a.setRedirect(url) })
}

// HTML answers 200 with a web page, as captive portals do.
func HTML() Effect {
	return Body("text/html; charset=utf-8", Bytes([]byte("<!DOCTYPE html><html><body><h1>Please log in</h1></body></html>\n")))
}

// Body answers 200 with something else, without a digest.
func Body(contentType string, c Content) Effect {
	return onAnswer(func(a *answer) {
		a.status, a.content, a.rangeHeader = http.StatusOK, c, ""
		a.header = http.Header{"Content-Type": {contentType}}
	})
}

// Oversized answers with n bytes of what begins like the manifest asked for;
// n < 0 is without end and without Content-Length.
func Oversized(n int64) Effect {
	return onAnswer(func(a *answer) {
		head := Bytes([]byte(`{"schemaVersion":2,`))
		size := n
		if n < 0 {
			size = 1 << 62
			a.omit = append(a.omit, "Content-Length")
		}
		a.content = concat{head, fill{' ', size - head.Size()}}
		a.rangeHeader = ""
	})
}

// Omit leaves out headers, such as Docker-Content-Digest or Content-Length.
func Omit(header ...string) Effect {
	return onAnswer(func(a *answer) { a.omit = append(a.omit, header...) })
}

// Header sets a header.
func Header(key, value string) Effect {
	return onAnswer(func(a *answer) { a.header.Set(key, value) })
}

// Gzip sends the body with Content-Encoding gzip, whether asked for or not.
func Gzip() Effect {
	return onAnswer(func(a *answer) {
		a.content = newStoredGzip(a.content)
		a.header.Set("Content-Encoding", "gzip")
	})
}

// Rate limits the body of each answer to so many bytes per second.
func Rate(bytesPerSecond int64) Effect {
	return onAnswer(func(a *answer) { a.rate = bytesPerSecond })
}

// corrupt is content with one byte flipped.
type corrupt struct {
	Content
	at int64
}

func (c *corrupt) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.Content.ReadAt(p, off)
	if i := c.at - off; i >= 0 && i < int64(n) {
		p[i] ^= 0xff
	}
	return n, err
}

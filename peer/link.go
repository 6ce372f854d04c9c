package peer

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	silence     = 2 * time.Second        // a peer not heard of for so long is gone
	pingEvery   = 500 * time.Millisecond // below silence by enough for a lost second
	idleLink    = 20 * time.Second       // a link without a common blob, a piece or a question is closed
	connectTime = 500 * time.Millisecond // for TCP; a blackholed member costs no more
	helloTime   = silence                // for TLS and the first frame, on a loaded node
	maxOut      = 1 << 20                // control bytes that wait for a peer that does not read
	maxLinks    = 2048
	maxCalls    = 64 // questions of one peer being answered
)

// link is the one connection between two nodes, whoever dialed. Control frames overtake
// piece bytes at the next chunk; there is one reader and one writer goroutine, and nobody
// else touches the connection except to close it.
//
// mu may be taken under any other lock, and none is taken under it (I7). So send, request,
// start, forget and close, which only leave word, may be called with locks held.
//
// A link ends in this order, each step once: close, from anywhere, wakes reader and writer;
// run waits for both; settle fails what the link still owed; serve tells uploads and blobs.
// Until then blobs may hold a link that is over, and what they leave with it is dropped.
type link struct {
	s       *Swarm
	peer    string // member name
	node    string
	zone    string
	dialed  bool
	conn    net.Conn
	records *recordConn  // under conn; nil without TLS
	heard   moment       // last bytes from the peer, of whatever frame
	spoke   atomic.Bool  // there were any
	deaf    atomic.Bool  // the reader does something else than to read, see attend
	used    moment       // last time a blob or a call needed the link
	asked   atomic.Int32 // questions being answered
	done    chan struct{}
	wake    chan struct{} // for the writer: there may be something to write
	traffic *traffic      // with the node, over all links

	mu     sync.Mutex           // guards the following
	out    []byte               // control frames
	spare  []byte               // for the next out
	bulk   []*upload            // granted by uploads, sent in order
	calls  map[uint32]chan call // by id; a place for the answer in each
	wants  map[uint32]*request  // by id: pieces that are to come
	nextID uint32               // of requests and calls, by this end
	lastTx time.Time            // when the writer took something
	closed error                // why; nil while it lives
}

var (
	errLinkClosed = errors.New("link closed")
	errSilent     = errors.New("peer is silent")
	errBacklog    = errors.New("peer does not read")
	errReplaced   = errors.New("replaced by the peer's own link")
	errIdle       = errors.New("idle")
	errBanned     = errors.New("peer is banned")
	errManyLinks  = errors.New("too many links")
)

// moment is a time held by an atomic, by the monotonic clock: others set the wall clock,
// and no peer is silent because of that.
type moment struct{ since atomic.Int64 } // clockStart, nanoseconds

var clockStart = time.Now()

func (m *moment) set(t time.Time) { m.since.Store(int64(t.Sub(clockStart))) }
func (m *moment) get() time.Time  { return clockStart.Add(time.Duration(m.since.Load())) }

// heardConn notes when bytes arrive, so that a peer in the middle of a long
// frame is not silent.
type heardConn struct {
	net.Conn
	l *link
}

func (c heardConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.l.heard.set(time.Now())
		c.l.spoke.Store(true)
	}
	return n, err
}

func newLink(s *Swarm, conn net.Conn, m Member, dialed bool) *link {
	l := &link{
		s: s, peer: m.Name, node: m.Node, zone: m.Zone, dialed: dialed, conn: conn, traffic: s.traffic.with(m.Node),
		done: make(chan struct{}), calls: make(map[uint32]chan call), wants: make(map[uint32]*request),
		wake: make(chan struct{}, 1), lastTx: time.Now(),
	}
	if tc, ok := conn.(*tls.Conn); ok {
		l.records, _ = tc.NetConn().(*recordConn)
	}
	now := time.Now()
	l.heard.set(now)
	l.used.set(now)
	return l
}

// over reports whether the link has ended.
func (l *link) over() bool { return closed(l.done) }

// closed reports whether a channel on which nothing is sent is closed.
func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (l *link) touch() { l.used.set(time.Now()) }

// send queues control frames; it never blocks. Frames to a closed link are
// dropped: every blob is told of its end anyway.
func (l *link) send(put func([]byte) []byte) {
	l.mu.Lock()
	if l.closed == nil {
		l.out = put(l.out)
	}
	over := len(l.out) > maxOut
	l.mu.Unlock()
	if over {
		l.close(errBacklog)
		return
	}
	l.poke()
}

func (l *link) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// close ends the link, once. It never blocks. The reader's goroutine then tells everyone.
func (l *link) close(why error) {
	l.mu.Lock()
	first := l.closed == nil
	if first {
		l.closed = why
	}
	l.mu.Unlock()
	if first {
		close(l.done)
		hangUp(l.conn)
	}
}

// hangUp closes a connection without TLS's goodbye, which could block for
// seconds on a peer that does not read; close is called with locks held (I7).
func hangUp(c net.Conn) {
	if tc, ok := c.(*tls.Conn); ok {
		c = tc.NetConn()
	}
	_ = c.Close() // there is nobody left to tell
}

// run serves the link until it ends and returns why.
func (l *link) run() error {
	var writer sync.WaitGroup
	writer.Go(l.write)
	err := l.read()
	if errors.Is(err, errWire) {
		l.s.log.Warn("peer banned", "peer", l.node, "reason", string(banProtocol), "err", err)
		l.s.bans.add(l.node, banProtocol)
	}
	l.close(fmt.Errorf("%w: %w", errLinkClosed, err))
	writer.Wait()
	return l.settle()
}

// settle fails what the link still owed.
func (l *link) settle() error {
	l.mu.Lock()
	wants, calls, bulk, why := l.wants, l.calls, l.bulk, l.closed
	l.wants, l.calls, l.bulk, l.out = nil, nil, nil, nil
	l.mu.Unlock()
	for _, c := range calls {
		close(c)
	}
	for _, r := range wants {
		r.blob.failed(r, false)
	}
	for _, u := range bulk {
		l.s.uploads.finished(u)
	}
	return why
}

func (l *link) read() error {
	br := bufio.NewReaderSize(heardConn{l.conn, l}, 8<<10)
	var small [1024]byte
	for {
		var h [frameHeader]byte
		if _, err := io.ReadFull(br, h[:]); err != nil {
			return err
		}
		t, n, err := parseHeader(h)
		if err != nil {
			return err
		}
		if t == frameData {
			err = l.readData(br, n)
		} else {
			p := small[:]
			if n > len(p) {
				p = make([]byte, n)
			}
			if _, err = io.ReadFull(br, p[:n]); err == nil {
				l.attend(func() { err = l.s.handle(l, t, p[:n]) })
			}
		}
		if err != nil {
			return err
		}
	}
}

// readData puts piece bytes where they were asked for, and drops those that
// nobody waits for any more.
func (l *link) readData(br *bufio.Reader, n int) error {
	if n < dataHead {
		return errWire
	}
	var h [dataHead]byte
	if _, err := io.ReadFull(br, h[:]); err != nil {
		return err
	}
	id, off := binary.BigEndian.Uint32(h[:]), int(binary.BigEndian.Uint32(h[4:]))
	n -= dataHead
	l.mu.Lock()
	r := l.wants[id]
	l.mu.Unlock()
	if r == nil {
		_, err := br.Discard(n)
		return err
	}
	if off != r.got || n > r.size-r.got || n == 0 {
		return fmt.Errorf("%w: bytes %d+%d of a piece of %d, expected %d", errWire, off, n, r.size, r.got)
	}
	if r.buf == nil {
		r.buf = l.s.buffers.get(r.size)
	}
	if _, err := io.ReadFull(br, r.buf[r.got:r.got+n]); err != nil {
		return err
	}
	r.got += n
	r.moved.set(time.Now())
	l.traffic.received.Add(int64(n))
	if r.got == r.size && l.forget(id) != nil {
		l.attend(func() { r.blob.received(r) })
	}
	return nil
}

// attend does what the reader has to do with a frame. If that takes long, as to write a piece to
// a slow disk, the peer was not silent meanwhile: what came is yet to be read.
func (l *link) attend(f func()) {
	began := time.Now()
	l.deaf.Store(true)
	f()
	if now := time.Now(); now.Sub(began) > silence/2 {
		l.heard.set(now)
	}
	l.deaf.Store(false)
}

// forget takes a request off the link; nil if it is not there any more. So of reader, blob and
// settle, which may all want to end it, one does.
func (l *link) forget(id uint32) *request {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.wants[id]
	delete(l.wants, id)
	return r
}

// request asks the peer for a piece; false if the link has ended.
func (l *link) request(r *request, w want) bool {
	l.mu.Lock()
	if l.closed != nil {
		l.mu.Unlock()
		return false
	}
	l.nextID++
	r.id, w.id = l.nextID, l.nextID
	l.wants[r.id] = r
	l.out = w.append(l.out)
	l.mu.Unlock()
	l.touch()
	l.poke()
	return true
}

// next blocks until there is something to write. It returns control frames, or
// else the upload whose turn it is.
func (l *link) next() (ctl []byte, u *upload, ok bool) {
	for {
		l.mu.Lock()
		if l.closed != nil {
			l.mu.Unlock()
			return nil, nil, false
		}
		if ctl = l.controlLocked(); ctl == nil && len(l.bulk) > 0 {
			u, l.lastTx = l.bulk[0], time.Now()
		}
		l.mu.Unlock()
		if ctl != nil || u != nil {
			return ctl, u, true
		}
		select {
		case <-l.wake:
		case <-l.done:
		}
	}
}

func (l *link) write() {
	for {
		ctl, u, ok := l.next()
		if !ok {
			return
		}
		var err error
		if u != nil {
			err = l.writeChunk(u)
		} else {
			err = l.putControl(ctl)
		}
		if err != nil {
			l.close(fmt.Errorf("%w: %w", errLinkClosed, err))
			return
		}
	}
}

// limit waits for the upload budget while control frames go on being sent: otherwise
// the peer would take this node for dead.
func (l *link) limit(n int) error {
	if l.s.limiter == nil {
		return nil
	}
	t := time.NewTimer(l.s.limiter.ReserveN(time.Now(), n).Delay())
	defer t.Stop()
	for {
		select {
		case <-t.C:
			return nil
		case <-l.done:
			return errLinkClosed
		case <-l.wake:
			ctl := l.control()
			if len(ctl) == 0 {
				continue
			}
			if err := l.putControl(ctl); err != nil {
				return err
			}
		}
	}
}

// control takes the waiting control frames, if there are any.
func (l *link) control() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.controlLocked()
}

func (l *link) controlLocked() (ctl []byte) {
	if len(l.out) > 0 {
		ctl, l.out, l.spare = l.out, l.spare[:0], nil
		l.lastTx = time.Now()
	}
	return ctl
}

// putControl writes control frames, and keeps their buffer for the next ones unless it is large.
func (l *link) putControl(ctl []byte) error {
	err := l.put(ctl)
	if cap(ctl) <= 64<<10 {
		l.mu.Lock()
		l.spare = ctl[:0]
		l.mu.Unlock()
	}
	return err
}

// writeChunk sends the next bytes of an upload. Bytes that cannot be read make
// the piece gone, not the link.
func (l *link) writeChunk(u *upload) error {
	b := l.s.chunks.Get().(*[]byte)
	defer l.s.chunks.Put(b)
	n, err := u.next((*b)[frameHeader+dataHead:])
	if err != nil {
		l.endUpload(u)
		l.send(func(b []byte) []byte { return answer{id: u.id}.append(b, frameGone) })
		return nil
	}
	if err := l.limit(n); err != nil {
		return err
	}
	putDataHead(*b, u.id, uint32(u.off), n)
	if err := l.put((*b)[:frameHeader+dataHead+n]); err != nil {
		return err
	}
	u.off += n
	l.sent(n)
	if u.off == u.size {
		l.endUpload(u)
	}
	return nil
}

// sent counts bytes of blobs.
func (l *link) sent(n int) {
	l.traffic.sent.Add(int64(n))
	l.s.metrics.uploaded.Add(float64(n))
}

func (l *link) endUpload(u *upload) {
	l.mu.Lock()
	if len(l.bulk) > 0 && l.bulk[0] == u {
		l.bulk = l.bulk[1:]
	}
	l.mu.Unlock()
	l.touch()
	l.s.uploads.finished(u)
}

// start hands the link an upload; false if the link is closed.
func (l *link) start(u *upload) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed != nil {
		return false
	}
	for _, t := range u.batches {
		l.out = t.append(l.out)
	}
	l.bulk = append(l.bulk, u)
	l.poke()
	return true
}

// call asks the peer and waits for the answer; errLinkClosed if the link ends first. If the
// caller does not wait that long, the answer is lost.
func (l *link) call(ctx context.Context, method byte, body []byte) (call, error) {
	answer := make(chan call, 1)
	l.mu.Lock()
	if l.closed != nil {
		l.mu.Unlock()
		return call{}, errLinkClosed
	}
	l.nextID++
	id := l.nextID
	l.calls[id] = answer
	l.out = call{id: id, method: method, body: body}.append(l.out, frameCall)
	l.mu.Unlock()
	l.touch()
	l.poke()
	defer func() {
		l.mu.Lock()
		delete(l.calls, id)
		l.mu.Unlock()
	}()
	select {
	case a, ok := <-answer:
		if !ok {
			return call{}, errLinkClosed
		}
		return a, nil
	case <-ctx.Done():
		return call{}, ctx.Err()
	}
}

// answered gives an answer to whoever asked.
func (l *link) answered(a call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c, ok := l.calls[a.id]; ok {
		delete(l.calls, a.id) // there is one
		c <- a
	}
}

// tend pings a quiet link and closes a silent or idle one.
func (l *link) tend(now time.Time, idle time.Duration) {
	if !l.deaf.Load() && now.Sub(l.heard.get()) > silence {
		l.close(errSilent)
		return
	}
	l.mu.Lock()
	quiet := now.Sub(l.lastTx) >= pingEvery && len(l.out) == 0
	works := len(l.bulk)+len(l.wants)+len(l.calls) > 0 || l.asked.Load() > 0
	l.mu.Unlock()
	if !works && now.Sub(l.used.get()) > idle {
		l.close(errIdle)
		return
	}
	if quiet {
		l.send(appendPing)
	}
}

package peer

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// simNet is a Network in memory whose hosts have an uplink and a downlink of
// some bandwidth, and whose paths have a latency. Piece bytes are charged scale
// times, so that a simulated piece may be small in memory; everything else is
// charged as it is. A host's transfers share its links chunk by chunk.
type simNet struct {
	latency time.Duration
	scale   int64
	fifo    bool // uplinks are first in, first out as well

	mu    sync.Mutex
	hosts map[string]*simHost

	frames, control, data atomic.Int64 // control writes and their bytes, piece bytes as charged
}

type simHost struct {
	net    *simNet
	addr   simAddr
	accept chan net.Conn
	dead   chan struct{}
	once   sync.Once
	apart  atomic.Bool // see cut

	mu       sync.Mutex
	up, down float64 // bytes per second
	upFree   time.Time
	downFree time.Time
	conns    map[*simConn]bool
}

type simAddr string

func (simAddr) Network() string  { return "sim" }
func (a simAddr) String() string { return string(a) }

func newSimNet(latency time.Duration, scale int64) *simNet {
	return &simNet{latency: latency, scale: scale, hosts: make(map[string]*simHost)}
}

// host adds a host; it is the Network of one node.
func (n *simNet) host(addr string, up, down float64) *simHost {
	h := &simHost{net: n, addr: simAddr(addr), accept: make(chan net.Conn, 4096), dead: make(chan struct{}),
		up: up, down: down, conns: make(map[*simConn]bool)}
	n.mu.Lock()
	n.hosts[addr] = h
	n.mu.Unlock()
	return h
}

func (h *simHost) Listen(string) (net.Listener, error) { return h, nil }
func (h *simHost) Addr() net.Addr                      { return h.addr }
func (h *simHost) Close() error                        { h.kill(); return nil }

func (h *simHost) Accept() (net.Conn, error) {
	select {
	case c := <-h.accept:
		return c, nil
	case <-h.dead:
		return nil, net.ErrClosed
	}
}

// kill ends the host and every connection, as a killed process does.
func (h *simHost) kill() {
	h.once.Do(func() { close(h.dead) })
	h.hangUp()
}

// cut ends every connection of the host; for so long nobody can make another.
func (h *simHost) cut(d time.Duration) {
	h.apart.Store(true)
	time.AfterFunc(d, func() { h.apart.Store(false) })
	h.hangUp()
}

func (h *simHost) hangUp() {
	h.mu.Lock()
	conns := h.conns
	h.conns = make(map[*simConn]bool)
	h.mu.Unlock()
	for c := range conns {
		c.Close()
	}
}

var errRefused = errors.New("connection refused")

func (h *simHost) DialContext(ctx context.Context, addr string) (net.Conn, error) {
	h.net.mu.Lock()
	to := h.net.hosts[addr]
	h.net.mu.Unlock()
	wait(ctx, 2*h.net.latency)
	if to != nil && (h.apart.Load() || to.apart.Load()) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if to == nil {
		return nil, errRefused
	}
	select {
	case <-to.dead:
		return nil, errRefused
	default:
	}
	a, b := h.net.pipe(h, to)
	select {
	case to.accept <- b:
		return a, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (n *simNet) pipe(a, b *simHost) (*simConn, *simConn) {
	ab, ba := newSimHalf(n, a, b), newSimHalf(n, b, a)
	ca, cb := &simConn{in: ba, out: ab, host: a}, &simConn{in: ab, out: ba, host: b}
	for _, c := range []*simConn{ca, cb} {
		c.host.mu.Lock()
		c.host.conns[c] = true
		c.host.mu.Unlock()
	}
	return ca, cb
}

// simHalf is one direction of a connection.
type simHalf struct {
	net      *simNet
	from, to *simHost

	mu     sync.Mutex
	cond   *sync.Cond
	segs   []*simSeg // written, not yet delivered, in order
	data   int       // of segs, with piece bytes
	buf    []byte
	closed bool
}

type simSeg struct {
	b     []byte
	data  bool
	ready bool
}

func newSimHalf(n *simNet, from, to *simHost) *simHalf {
	h := &simHalf{net: n, from: from, to: to}
	h.cond = sync.NewCond(&h.mu)
	return h
}

const simInFlight = 2 // chunks that one connection has under way, as with TCP_NOTSENT_LOWAT

func (h *simHalf) write(p []byte) (int, error) {
	seg := &simSeg{b: append([]byte(nil), p...), data: p[0] == byte(frameData)}
	h.mu.Lock()
	for seg.data && h.data >= simInFlight && !h.closed {
		h.cond.Wait()
	}
	if h.closed {
		h.mu.Unlock()
		return 0, io.ErrClosedPipe
	}
	h.segs = append(h.segs, seg)
	if seg.data {
		h.data++
	}
	h.mu.Unlock()
	const head = frameHeader + dataHead
	n := int64(len(p))
	if seg.data {
		n = int64(len(p)-head)*h.net.scale + head
		h.net.data.Add(n)
	} else {
		h.net.frames.Add(1)
		h.net.control.Add(n)
	}
	// The sender's uplink has a fair queue, as Linux hosts have where systemd sets
	// fq_codel: a few control frames need not wait for other connections' piece
	// bytes. The receiver's downlink is a switch's port: first in, first out.
	through := h.from.charge(n, true)
	if !seg.data && !h.net.fifo {
		through = 0
	}
	time.AfterFunc(through+h.net.latency, func() {
		time.AfterFunc(h.to.charge(n, false), func() { h.arrive(seg) })
	})
	return len(p), nil
}

// charge takes n bytes of a host's link and returns when they are through.
func (h *simHost) charge(n int64, up bool) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	rate, free := h.down, &h.downFree
	if up {
		rate, free = h.up, &h.upFree
	}
	now := time.Now()
	if free.Before(now) {
		*free = now
	}
	*free = free.Add(time.Duration(float64(n) / rate * float64(time.Second)))
	return free.Sub(now)
}

func (h *simHalf) arrive(seg *simSeg) {
	h.mu.Lock()
	defer h.mu.Unlock()
	seg.ready = true
	for len(h.segs) > 0 && h.segs[0].ready {
		s := h.segs[0]
		h.segs = h.segs[1:]
		h.buf = append(h.buf, s.b...)
		if s.data {
			h.data--
		}
	}
	h.cond.Broadcast()
}

func (h *simHalf) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.buf) == 0 {
		if h.closed {
			return 0, io.EOF
		}
		h.cond.Wait()
	}
	n := copy(p, h.buf)
	h.buf = h.buf[n:]
	if len(h.buf) == 0 {
		h.buf = nil
	}
	return n, nil
}

func (h *simHalf) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	h.cond.Broadcast()
}

// simConn is one end.
type simConn struct {
	in, out *simHalf
	host    *simHost
}

func (c *simConn) Read(p []byte) (int, error)  { return c.in.read(p) }
func (c *simConn) Write(p []byte) (int, error) { return c.out.write(p) }

func (c *simConn) Close() error {
	c.out.close()
	c.in.close()
	c.host.mu.Lock()
	delete(c.host.conns, c)
	c.host.mu.Unlock()
	return nil
}

func (c *simConn) LocalAddr() net.Addr              { return c.host.addr }
func (c *simConn) RemoteAddr() net.Addr             { return c.out.to.addr }
func (c *simConn) SetDeadline(time.Time) error      { return nil }
func (c *simConn) SetReadDeadline(time.Time) error  { return nil }
func (c *simConn) SetWriteDeadline(time.Time) error { return nil }

package peer

import (
	"context"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// notSent is how much unsent data of a link the kernel takes. More would put
// haves and requests behind that many piece bytes, and would count a piece as
// given long before it has left.
const notSent = 128 << 10

// A lost packet is sent again after rtoMin and a round trip, and from then on at least
// every rtoMax; by default Linux waits 200 ms, doubling each time. The ends of thirty
// links that lost 30 % of packets each way heard nothing for two seconds 77 times in a
// minute, 40 times with linear timeouts alone, 5 times with all three.
const rtoMin, rtoMax = 50 * time.Millisecond, time.Second

func setOptions(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSent)
		// Kernels before 6.15 know only the first of these. Nothing depends on them.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_THIN_LINEAR_TIMEOUTS, 1)
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_RTO_MIN_US, int(rtoMin.Microseconds()))
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_RTO_MAX_MS, int(rtoMax.Milliseconds()))
	}); e != nil {
		return e
	}
	return err
}

func (tcp) Listen(addr string) (net.Listener, error) {
	c := net.ListenConfig{Control: setOptions}
	l, err := c.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, err
	}
	return listener{l.(*net.TCPListener)}, nil
}

// listener sets the options of each connection. From its listener a connection
// inherits only the first.
type listener struct{ *net.TCPListener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	if raw, err := c.SyscallConn(); err == nil {
		_ = setOptions("", "", raw) // those that are not inherited are no more than a help
	}
	return c, nil
}

func (tcp) DialContext(ctx context.Context, addr string) (net.Conn, error) {
	d := net.Dialer{Control: setOptions}
	return d.DialContext(ctx, "tcp", addr)
}

// gaveUp reports whether the dialing side has hung up already. The kernel keeps
// such connections for accept.
func gaveUp(c net.Conn) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	const closed, closeWait = 7, 8 // TCP_CLOSE, TCP_CLOSE_WAIT: of the kernel's tcp_states.h
	gone := false
	if e := raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		gone = err == nil && (info.State == closeWait || info.State == closed)
	}); e != nil {
		return true
	}
	return gone
}

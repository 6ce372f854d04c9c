package peer

import (
	"context"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// notSent is how much the kernel takes of a link before it is sent. More would
// put haves and requests behind that much of piece bytes, and would count a
// piece as given long before it has left.
const notSent = 128 << 10

func setNotSent(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSent)
	}); e != nil {
		return e
	}
	return err
}

func (tcp) Listen(addr string) (net.Listener, error) {
	// Connections inherit the option from their listener.
	c := net.ListenConfig{Control: setNotSent}
	return c.Listen(context.Background(), "tcp", addr)
}

func (tcp) DialContext(ctx context.Context, addr string) (net.Conn, error) {
	d := net.Dialer{Control: setNotSent}
	return d.DialContext(ctx, "tcp", addr)
}

// gaveUp reports whether who dialed has hung up already. The kernel keeps such
// connections for accept.
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

package upstream

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// unanswered is how long sent data, or a keep-alive probe, may stay without an
// acknowledgement. After that the path is dead: a registry that only takes its time
// acknowledges at once.
const unanswered = 10 * time.Second

// setOptions sets what a connection can do without.
func setOptions(c syscall.RawConn) {
	_ = c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unanswered.Milliseconds()))
	})
}

// unread is how many bytes came on a connection and wait in the kernel to be read.
func unread(c syscall.RawConn) (n int) {
	_ = c.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }) // 0 if it cannot be told
	return n
}

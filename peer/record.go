package peer

import (
	"net"
	"sync"
	"time"
)

// chunkTime is how long the peer may take to read a chunk. A peer that reads less than 1
// KB/s, even through a poor uplink that 40 peers share, gets no piece before it asks for it
// elsewhere.
const chunkTime = time.Minute

// recordConn lies under a TLS connection and gathers the records of one write,
// which Go cuts to 16 KiB each, into one write to the kernel: a chunk of a
// piece is then one system call and one wake-up instead of five.
type recordConn struct {
	net.Conn

	mu   sync.Mutex // guards the following
	held *[]byte    // between hold and flush
}

// records recycles the buffers, so that idle links have none.
var records = sync.Pool{New: func() any { b := make([]byte, 0, chunkSize+4<<10); return &b }}

func (c *recordConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held == nil {
		return c.Conn.Write(p) // the handshake, and answers to key updates
	}
	*c.held = append(*c.held, p...)
	return len(p), nil
}

// hold makes writes wait for flush.
func (c *recordConn) hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = records.Get().(*[]byte)
}

func (c *recordConn) flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.held
	c.held = nil
	_, err := c.Conn.Write(*b)
	*b = (*b)[:0]
	records.Put(b)
	return err
}

// put writes frames to the link's connection.
func (l *link) put(p []byte) error {
	// A peer may go on to say that it is there, and read nothing. A connection that cannot have
	// the deadline fails the write.
	_ = l.conn.SetWriteDeadline(time.Now().Add(time.Duration(1+len(p)/chunkSize) * chunkTime))
	if l.records == nil {
		_, err := l.conn.Write(p)
		return err
	}
	l.records.hold()
	_, err := l.conn.Write(p)
	if e := l.records.flush(); err == nil {
		err = e
	}
	return err
}

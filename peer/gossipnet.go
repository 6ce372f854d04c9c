package peer

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	gossipBuffer  = 2 << 20                // of the kernel, for packets: a burst while this process gets no processor
	largestPacket = 64 << 10               // of UDP
	bindTries     = 10                     // to find a port that is free for TCP and UDP
	listenPause   = 100 * time.Millisecond // after an error
	// memberlist gathers up to 20 MiB of a stream before it knows whether a member sent them.
	// Members send 0.2 kB for each member.
	maxInbound = 64 << 20 // bytes of all such streams
)

// gossipNet carries memberlist's packets over UDP and its streams over TCP, on
// one port. memberlist's own transport reads each packet into 64 KiB of its
// own, which live as long as one of up to 1,024 of its messages waits; here a
// packet takes as much as arrived. And this one counts what it carries.
type gossipNet struct {
	tcp     *net.TCPListener
	udp     *net.UDPConn
	packets chan *memberlist.Packet
	streams chan net.Conn
	done    chan struct{}
	once    sync.Once
	tasks   sync.WaitGroup

	sent, received atomic.Int64 // bytes of payload

	places chan struct{} // one for each stream that others opened; the listener has the next
	held   atomic.Int64  // bytes that came on these
}

var _ memberlist.NodeAwareTransport = (*gossipNet)(nil)

// newGossipNet binds a port, any if it is zero, on host or, if that is empty, on
// every address of IPv4 and IPv6. What comes waits in the kernel until listen.
func newGossipNet(host string, port int) (*gossipNet, error) {
	n := &gossipNet{packets: make(chan *memberlist.Packet), streams: make(chan net.Conn), done: make(chan struct{}),
		places: make(chan struct{}, maxStrangers)}
	tries := 1
	if port == 0 {
		tries = bindTries
	}
	var err error
	for range tries {
		if err = n.bind(host, port); err == nil {
			return n, nil
		}
	}
	return nil, err
}

func (n *gossipNet) bind(host string, port int) error {
	ip := net.ParseIP(host)
	if ip == nil && host != "" {
		return fmt.Errorf("%q is not an IP address", host)
	}
	var err error
	if n.tcp, err = net.ListenTCP("tcp", &net.TCPAddr{IP: ip, Port: port}); err != nil {
		return err
	}
	if n.udp, err = net.ListenUDP("udp", &net.UDPAddr{IP: ip, Port: n.port()}); err != nil {
		n.tcp.Close()
		return err
	}
	_ = n.udp.SetReadBuffer(gossipBuffer) // the kernel gives what it allows
	return nil
}

// listen takes what comes until Shutdown.
func (n *gossipNet) listen() {
	n.tasks.Go(n.listenTCP)
	n.tasks.Go(n.listenUDP)
}

func (n *gossipNet) port() int { return n.tcp.Addr().(*net.TCPAddr).Port }

func (n *gossipNet) listenUDP() {
	buf := make([]byte, largestPacket)
	for {
		size, from, err := n.udp.ReadFromUDPAddrPort(buf)
		at := time.Now()
		if err != nil {
			if closed(n.done) {
				return
			}
			n.pause()
			continue
		}
		if size == 0 {
			continue // memberlist expects a byte
		}
		n.received.Add(int64(size))
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		p := &memberlist.Packet{Buf: append([]byte(nil), buf[:size]...), From: net.UDPAddrFromAddrPort(from), Timestamp: at}
		select {
		case n.packets <- p:
		case <-n.done:
			return
		}
	}
}

func (n *gossipNet) listenTCP() {
	for n.place() {
		conn, err := n.tcp.Accept()
		if err != nil {
			<-n.places
			if closed(n.done) {
				return
			}
			n.pause()
			continue
		}
		in := &strangeConn{countedConn: countedConn{conn, n}}
		select {
		case n.streams <- in:
		case <-n.done:
			in.Close()
			return
		}
	}
}

// place waits until there are fewer than maxStrangers streams; meanwhile the kernel's
// queue holds others back. It returns false at the end.
func (n *gossipNet) place() bool {
	select {
	case n.places <- struct{}{}:
		return true
	case <-n.done:
		return false
	}
}

// pause follows an error of the kernel's.
func (n *gossipNet) pause() {
	select {
	case <-time.After(listenPause):
	case <-n.done:
	}
}

// FinalAdvertiseAddr implements memberlist.Transport.
func (n *gossipNet) FinalAdvertiseAddr(ip string, _ int) (net.IP, int, error) {
	a, err := netip.ParseAddr(ip)
	if err != nil {
		return nil, 0, fmt.Errorf("address told to others: %w", err)
	}
	return a.Unmap().AsSlice(), n.port(), nil
}

// WriteTo implements memberlist.Transport.
func (n *gossipNet) WriteTo(p []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, err
	}
	size, err := n.udp.WriteToUDPAddrPort(p, to)
	n.sent.Add(int64(size))
	return time.Now(), err
}

// WriteToAddress implements memberlist.NodeAwareTransport.
func (n *gossipNet) WriteToAddress(p []byte, to memberlist.Address) (time.Time, error) {
	return n.WriteTo(p, to.Addr)
}

// PacketCh implements memberlist.Transport.
func (n *gossipNet) PacketCh() <-chan *memberlist.Packet { return n.packets }

// DialTimeout implements memberlist.Transport.
func (n *gossipNet) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	conn, err := net.DialTimeout("tcp", addr, timeout)
	if err != nil {
		return nil, err
	}
	return countedConn{conn, n}, nil
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (n *gossipNet) DialAddressTimeout(to memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return n.DialTimeout(to.Addr, timeout)
}

// StreamCh implements memberlist.Transport.
func (n *gossipNet) StreamCh() <-chan net.Conn { return n.streams }

// Shutdown implements memberlist.Transport. It returns once nothing listens any
// more, and may be called again.
func (n *gossipNet) Shutdown() error {
	n.once.Do(func() {
		close(n.done)
		n.tcp.Close()
		n.udp.Close()
	})
	n.tasks.Wait()
	return nil
}

// countedConn is a stream whose bytes count.
type countedConn struct {
	net.Conn
	n *gossipNet
}

func (c countedConn) Read(p []byte) (int, error) {
	got, err := c.Conn.Read(p)
	c.n.received.Add(int64(got))
	return got, err
}

func (c countedConn) Write(p []byte) (int, error) {
	put, err := c.Conn.Write(p)
	c.n.sent.Add(int64(put))
	return put, err
}

// strangeConn is a stream that somebody else opened, perhaps not a member. memberlist
// closes it after at most gossipTimeout.
type strangeConn struct {
	countedConn
	got  atomic.Int64
	once sync.Once
}

var errInbound = errors.New("too many bytes of those who may be strangers")

func (c *strangeConn) Read(p []byte) (int, error) {
	if c.n.held.Load() >= maxInbound {
		return 0, errInbound
	}
	got, err := c.countedConn.Read(p)
	c.got.Add(int64(got))
	c.n.held.Add(int64(got))
	return got, err
}

func (c *strangeConn) Close() error {
	c.once.Do(func() {
		c.n.held.Add(-c.got.Load())
		<-c.n.places
	})
	return c.countedConn.Close()
}

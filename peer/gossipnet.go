package peer

import (
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
)

// gossipNet carries memberlist's packets by UDP and its streams by TCP, on one
// port. memberlist's own transport reads each packet into 64 KiB of its own,
// which live for as long as one of up to 1,024 messages of it waits; here a
// packet is as large as it came. And this one counts what it carries.
type gossipNet struct {
	tcp     *net.TCPListener
	udp     *net.UDPConn
	packets chan *memberlist.Packet
	streams chan net.Conn
	done    chan struct{}
	once    sync.Once
	tasks   sync.WaitGroup

	sent, received atomic.Int64 // bytes of payload
}

var _ memberlist.NodeAwareTransport = (*gossipNet)(nil)

// newGossipNet binds a port, any if it is zero, on host or, if that is empty, on
// every address of IPv4 and IPv6; and begins to listen.
func newGossipNet(host string, port int) (*gossipNet, error) {
	n := &gossipNet{packets: make(chan *memberlist.Packet), streams: make(chan net.Conn), done: make(chan struct{})}
	tries := 1
	if port == 0 {
		tries = bindTries
	}
	var err error
	for range tries {
		if err = n.bind(host, port); err == nil {
			n.tasks.Go(n.listenTCP)
			n.tasks.Go(n.listenUDP)
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

func (n *gossipNet) port() int { return n.tcp.Addr().(*net.TCPAddr).Port }

func (n *gossipNet) listenUDP() {
	buf := make([]byte, largestPacket)
	for {
		size, from, err := n.udp.ReadFromUDPAddrPort(buf)
		at := time.Now()
		if err != nil {
			if n.over() {
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
	for {
		conn, err := n.tcp.Accept()
		if err != nil {
			if n.over() {
				return
			}
			n.pause()
			continue
		}
		select {
		case n.streams <- countedConn{conn, n}:
		case <-n.done:
			conn.Close()
			return
		}
	}
}

// pause follows an error of the kernel's.
func (n *gossipNet) pause() {
	select {
	case <-time.After(listenPause):
	case <-n.done:
	}
}

func (n *gossipNet) over() bool {
	select {
	case <-n.done:
		return true
	default:
		return false
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

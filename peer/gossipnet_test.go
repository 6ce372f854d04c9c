package peer

import (
	"bytes"
	"io"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

// listening is a transport on any port of host.
func listening(t *testing.T, host string) *gossipNet {
	t.Helper()
	n, err := newGossipNet(host, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Shutdown() })
	n.listen()
	return n
}

// TestGossipNet sends a packet and a stream from one port to another: a packet
// takes no more memory than it has bytes, and all bytes count on both sides.
func TestGossipNet(t *testing.T) {
	nets := make([]*gossipNet, 2)
	for i := range nets {
		nets[i] = listening(t, "127.0.0.1")
	}
	from, to := nets[0], nets[1]
	addr := memberlist.Address{Addr: to.tcp.Addr().String()}

	for _, p := range []string{"", "packet"} { // what is empty is not handed on
		if _, err := from.WriteToAddress([]byte(p), addr); err != nil {
			t.Fatal(err)
		}
	}
	p := <-to.PacketCh()
	if string(p.Buf) != "packet" || cap(p.Buf) > 16 || p.From.String() != from.udp.LocalAddr().String() {
		t.Errorf("packet %q in %d bytes from %v", p.Buf, cap(p.Buf), p.From)
	}

	out, err := from.DialAddressTimeout(addr, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	in := <-to.StreamCh()
	long := bytes.Repeat([]byte{1}, 1<<20)
	go func() { _, _ = out.Write(long); out.Close() }() // the reader sees what is missing
	if got, err := io.ReadAll(in); err != nil || !bytes.Equal(got, long) {
		t.Errorf("%d bytes of the stream, %v", len(got), err)
	}
	in.Close()
	waitFor(t, func() bool { return from.sent.Load() == 6+1<<20 && to.received.Load() == 6+1<<20 })

	ip, port, err := to.FinalAdvertiseAddr("::ffff:10.0.0.1", 0)
	if err != nil || !ip.Equal(net.IPv4(10, 0, 0, 1)) || len(ip) != net.IPv4len || port != to.port() {
		t.Errorf("others are told %v port %d, %v", ip, port, err)
	}
}

// TestGossipNetEverywhere: without a host both families reach the node, and it them.
func TestGossipNetEverywhere(t *testing.T) {
	n := listening(t, "")
	for _, host := range []string{"127.0.0.1", "::1"} {
		other := listening(t, host)
		if _, err := other.WriteTo([]byte("there"), net.JoinHostPort(host, strconv.Itoa(n.port()))); err != nil {
			t.Fatal(err)
		}
		p := <-n.PacketCh()
		if got := p.From.String(); got != other.udp.LocalAddr().String() {
			t.Errorf("packet of %s comes from %s", other.udp.LocalAddr(), got)
		}
		if _, err := n.WriteTo([]byte("back"), p.From.String()); err != nil {
			t.Fatal(err)
		}
		if p := <-other.PacketCh(); string(p.Buf) != "back" {
			t.Errorf("%s gets %q", host, p.Buf)
		}
	}
}

// TestGossipNetStops ends a transport of which nobody takes what came.
func TestGossipNetStops(t *testing.T) {
	n := listening(t, "127.0.0.1")
	if _, err := n.WriteTo([]byte("to itself"), n.tcp.Addr().String()); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", n.tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	waitFor(t, func() bool { return n.received.Load() > 0 })
	for range 2 {
		if err := n.Shutdown(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := newGossipNet("127.0.0.1.nip", 0); err == nil {
		t.Error("a name was taken for an address")
	}
}

// TestGossipNetStrangers: whoever reaches the port can neither open any number of streams
// nor send any number of bytes, all of which memberlist would hold until it knows that
// they are of no member.
func TestGossipNetStrangers(t *testing.T) {
	n := listening(t, "127.0.0.1")
	dial := func() net.Conn {
		c, err := net.Dial("tcp", n.tcp.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	const each = 20 << 20 // memberlist takes as much
	var taken []net.Conn
	held := 0
	for range 6 {
		c := dial()
		go func() { _, _ = c.Write(make([]byte, each)) }() // may fail
		in := <-n.StreamCh()
		got, _ := io.CopyN(io.Discard, in, each)
		held += int(got)
		taken = append(taken, in)
	}
	if held > maxInbound+1<<20 || held < maxInbound-1<<20 {
		t.Errorf("%d bytes are held of strangers, want %d", held, maxInbound)
	}
	for len(taken) < maxStrangers {
		dial()
		taken = append(taken, <-n.StreamCh())
	}
	c := dial()
	if _, err := c.Write([]byte("member")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-n.StreamCh():
		t.Fatal("there is no end of streams")
	default:
	}
	for _, in := range taken {
		in.Close()
		in.Close() // counts once
	}
	in := <-n.StreamCh()
	got := make([]byte, 6)
	if _, err := io.ReadFull(in, got); err != nil || string(got) != "member" {
		t.Errorf("after that a member says %q, %v", got, err)
	}
	in.Close()
	if held := n.held.Load(); held != 0 || len(n.places) > 1 { // the listener has one
		t.Errorf("%d bytes and %d places are held of nobody", held, len(n.places))
	}
}

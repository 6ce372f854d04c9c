package peer

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// TestOneNameThatHangs: a name in Join whose server does not answer keeps no other from
// being looked up.
func TestOneNameThatHangs(t *testing.T) {
	ctx, over := context.WithCancel(context.Background())
	var dialing sync.Mutex // net goes on looking up when resolve has given up: no Go after Wait
	var served sync.WaitGroup
	t.Cleanup(func() {
		dialing.Lock()
		over()
		dialing.Unlock()
		served.Wait()
	})
	s, err := New(Config{Name: "node", Data: "127.0.0.1:0", Gossip: "127.0.0.1:5052", Join: []string{"hangs.test.", "answers.test.:7000", "127.0.0.9"}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.resolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		dialing.Lock()
		defer dialing.Unlock()
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		ours, theirs := net.Pipe()
		served.Go(func() { nameServer(ctx, theirs) })
		return ours, nil
	}}
	got, err := s.resolve(t.Context())
	if want := [][]string{nil, {"127.0.0.7:7000"}, {"127.0.0.9:5052"}}; !slices.EqualFunc(got, want, slices.Equal) {
		t.Errorf("resolved to %v, want %v", got, want)
	}
	if e, ok := errors.AsType[*net.DNSError](err); !ok || !e.IsTimeout {
		t.Errorf("of the one that hangs it is said: %v", err)
	}
}

// nameServer answers one question, as over TCP, unless it is about the name that hangs;
// then it waits until who asks hangs up, or ctx ends.
func nameServer(ctx context.Context, c net.Conn) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return
	}
	var m dnsmessage.Message
	q := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, q); err != nil || m.Unpack(q) != nil {
		return
	}
	m.Header.Response, m.Additionals = true, nil
	switch name := m.Questions[0].Name; {
	case name.String() == "hangs.test.":
		_, _ = io.Copy(io.Discard, c)
		return
	case m.Questions[0].Type == dnsmessage.TypeA:
		m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET},
			Body: &dnsmessage.AResource{A: [4]byte{127, 0, 0, 7}}}}
	}
	a, err := m.Pack()
	if err != nil {
		return
	}
	_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...))
}

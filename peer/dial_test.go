package peer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// losing is a Network that loses the first tries to connect.
type losing struct {
	*simHost
	lost  int32
	tries atomic.Int32
	open  atomic.Int32
}

type openConn struct {
	net.Conn
	open *atomic.Int32
}

func (c openConn) Close() error { c.open.Add(-1); return nil }

func (n *losing) DialContext(ctx context.Context, addr string) (net.Conn, error) {
	if n.tries.Add(1) <= n.lost {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if addr == "refuses" {
		return nil, errRefused
	}
	n.open.Add(1)
	return openConn{open: &n.open}, nil
}

// TestDialAnew pins that a lost packet does not make a member seem dead, and that
// neither a refusal nor a member that is really gone costs more time than it did.
func TestDialAnew(t *testing.T) {
	for _, tt := range []struct {
		name  string
		lost  int32
		addr  string
		took  time.Duration
		tries int32
		err   error
	}{
		{"at once", 0, "there", 0, 1, nil},
		{"one lost", 1, "there", dialAgain, 2, nil},
		{"two lost", 2, "there", 2 * dialAgain, 3, nil},
		{"refused", 0, "refuses", 0, 1, errRefused},
		{"gone", 99, "there", connectTime, dialTries, context.DeadlineExceeded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := &losing{lost: tt.lost}
				ctx, cancel := context.WithTimeout(t.Context(), connectTime)
				defer cancel()
				begun := time.Now()
				conn, err := dialAnew(ctx, n, tt.addr)
				if took := time.Since(begun); took != tt.took || !errors.Is(err, tt.err) {
					t.Errorf("%v after %v, want %v after %v", err, took, tt.err, tt.took)
				}
				if conn != nil {
					conn.Close()
				}
				if n.tries.Load() != tt.tries || n.open.Load() != 0 {
					t.Errorf("%d tries, %d connections left; want %d, 0", n.tries.Load(), n.open.Load(), tt.tries)
				}
			})
		})
	}
}

// counting is a Network that counts what it has open of those it dialed.
type counting struct {
	tcp
	open *atomic.Int32
}

type countedDial struct {
	net.Conn
	close func()
}

func (c countedDial) Close() error { c.close(); return c.Conn.Close() }

func (n counting) DialContext(ctx context.Context, addr string) (net.Conn, error) {
	conn, err := n.tcp.DialContext(ctx, addr)
	if err != nil {
		return nil, err
	}
	n.open.Add(1)
	return countedDial{conn, sync.OnceFunc(func() { n.open.Add(-1) })}, nil
}

// TestFullOfLinks: a node that has as many links as it may have does not take those whom it
// dials then for dead, nor itself for alone, and keeps no connection of them.
func TestFullOfLinks(t *testing.T) {
	w := newTestWorld()
	var open atomic.Int32
	full, other := w.node(t, "full", func(c *Config) { c.Network = counting{open: &open} }), w.node(t, "other")
	meet(full, other)
	conn, end := net.Pipe()
	defer end.Close()
	full.s.mu.Lock()
	for i := range maxLinks {
		name := startName(fmt.Sprint("more-", i), 1)
		full.s.links[name] = newLink(full.s, conn, Member{Name: name}, false)
	}
	full.s.mu.Unlock()
	m, _ := full.s.roster.get(other.s.self.Name)
	if _, err := full.s.connect(t.Context(), m); !errors.Is(err, errManyLinks) {
		t.Fatalf("connect: %v", err)
	}
	if full.s.roster.isDown(m.Name) {
		t.Error("who was reached counts as gone")
	}
	if n := open.Load(); n != 0 {
		t.Errorf("%d connections stay open", n)
	}
}

// oneWay is a network in which this node reaches nobody, and others reach it; ready is closed
// when it dials.
type oneWay struct {
	tcp
	ready chan struct{}
	once  *sync.Once
}

func (n oneWay) DialContext(ctx context.Context, _ string) (net.Conn, error) {
	n.once.Do(func() { close(n.ready) })
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestDialedMeanwhile: who waits for a dial that fails gets the link that the member has made
// meanwhile, and the member does not count as unreachable.
func TestDialedMeanwhile(t *testing.T) {
	network := oneWay{ready: make(chan struct{}), once: new(sync.Once)}
	s := newTestWorld().node(t, "node-0", func(c *Config) { c.Network = network }).s
	theirs := fuzzLink(s, nil)
	m := Member{Name: theirs.peer, Node: theirs.node}
	s.roster.set(m)
	go func() {
		<-network.ready
		if err := s.attach(theirs); err != nil {
			t.Error(err)
		}
	}()
	l, err := s.connect(t.Context(), &m)
	if l != theirs || err != nil || s.roster.isDown(m.Name) {
		t.Errorf("link %p, want %p: %v; unreachable: %v", l, theirs, err, s.roster.isDown(m.Name))
	}
	s.serve(theirs)
}

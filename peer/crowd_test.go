package peer

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// TestThousandKnock has a thousand nodes dial one home at the same moment, as at
// the start of a storm, over real TCP and TLS, and ask it something. All of them
// are in this process, so a node has a thousandth of its processors, and the home
// no more.
func TestThousandKnock(t *testing.T) {
	count := 1000
	if testing.Short() {
		count = 100
	}
	w := newTestWorld()
	home := w.node(t, "home")
	var dialers []*testNode
	for i := range count {
		dialers = append(dialers, w.node(t, fmt.Sprintf("node-%04d", i)))
	}
	t.Cleanup(func() { killAll(dialers) })
	idle := memory()
	began, cpu := time.Now(), processorTime(t)
	took := make([]time.Duration, count)
	var all sync.WaitGroup
	var again atomic.Int64
	for i, n := range dialers {
		all.Go(func() {
			tries := n.knockAt(t, home)
			again.Add(int64(tries - 1))
			took[i] = time.Since(began)
		})
	}
	all.Wait()
	cpu = processorTime(t) - cpu
	links := len(home.s.allLinks()) // many of them are not kept for long
	slices.Sort(took)
	t.Logf("%d nodes knock at once: half of them are answered after %v, all after %v; %d had to try again; %v of processor for each link, both ends; %.1f kB an idle end",
		count, took[count/2].Round(time.Millisecond), took[count-1].Round(time.Millisecond), again.Load(),
		(cpu / time.Duration(count)).Round(time.Microsecond), float64(memory()-idle)/1000/float64(2*links))
}

// knockAt asks the home until it answers, with pauses as of a node that could not
// reach its home, and returns how many times that took.
func (n *testNode) knockAt(t *testing.T, home *testNode) (tries int) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		tries++
		var d Descriptor
		_, err := n.s.askMember(ctx, &home.s.self, methodResolve, Reference{Registry: "r", Repository: "app", Tag: "v1"}, &d)
		switch {
		case err == nil && d.Digest == digest.FromString("v1"):
			return tries
		case ctx.Err() != nil:
			t.Errorf("%s was never answered: %v", n.s.self.Node, err)
			return tries
		}
		wait(ctx, rand.N(keepDown))
	}
}

// memory is what live objects and stacks take.
func memory() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// BenchmarkHandshake is one link's handshake, both ends, over loopback.
func BenchmarkHandshake(b *testing.B) {
	n := &testNode{t: nil, world: newTestWorld()}
	make1 := func(name string) *Swarm {
		s, err := New(Config{Name: name, Keys: [][]byte{testKey}, Data: "127.0.0.1:0", Store: n, Origin: n})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { s.Close() })
		return s
	}
	from, to := make1("from"), make1("to")
	greeted := make(chan net.Conn)
	for b.Loop() {
		go func() {
			raw, err := to.listener.Accept()
			if err == nil {
				raw, _, err = to.greet(b.Context(), raw)
			}
			if err != nil {
				b.Error(err)
			}
			greeted <- raw
		}()
		l, err := from.reach(b.Context(), &to.self)
		if err != nil {
			b.Fatal(err)
		}
		ctl, _, _ := l.next()
		if err := l.put(ctl); err != nil {
			b.Fatal(err)
		}
		(<-greeted).Close()
		l.close(errIdle)
	}
}

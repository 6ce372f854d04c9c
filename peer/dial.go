package peer

import (
	"context"
	"net"
	"sync"
	"time"
)

// A connection that does not come is tried again beside the first try: the kernel
// repeats a lost SYN only after a second, and by then the member counts as gone.
// Where 30 % of packets are lost each way, half of single tries fail within
// connectTime, and an eighth of three at a time.
const (
	dialAgain = 150 * time.Millisecond
	dialTries = 3
)

type dialTry struct {
	conn net.Conn
	err  error
}

// dialAnew returns the first outcome of up to dialTries tries, even if it is a
// refusal. It returns when all of them have ended.
func dialAnew(ctx context.Context, n Network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	var tries sync.WaitGroup
	first := make(chan dialTry)
	try := func() {
		conn, err := n.DialContext(ctx, addr)
		select {
		case first <- dialTry{conn, err}:
		case <-ctx.Done():
			if err == nil {
				conn.Close()
			}
		}
	}
	defer tries.Wait()
	defer cancel()
	again := time.NewTicker(dialAgain)
	defer again.Stop()
	tries.Go(try)
	for left := dialTries - 1; ; {
		select {
		case d := <-first:
			return d.conn, d.err
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-again.C:
			if left > 0 {
				left--
				tries.Go(try)
			}
		}
	}
}

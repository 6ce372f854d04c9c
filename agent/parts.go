package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"
)

// parts are the running pieces of an agent, in the order in which they were
// started. They stop in reverse order, one after the other: whoever uses a
// part is gone before the part is. One goroutine starts and stops them.
type parts struct {
	log     *slog.Logger
	timeout time.Duration // for each part to stop
	running []*part
	failed  chan error // the first part that ended by itself; capacity 1
}

// part is one running piece. Its context does not descend from the agent's:
// the order of stopping is decided by stop alone.
type part struct {
	name   string
	cancel context.CancelFunc
	done   chan struct{}
	err    error // after done
}

func newParts(log *slog.Logger, timeout time.Duration) *parts {
	return &parts{log: log, timeout: timeout, failed: make(chan error, 1)}
}

// start runs a part. A part that returns before it is told to stops the agent.
func (p *parts) start(name string, run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	one := &part{name: name, cancel: cancel, done: make(chan struct{})}
	p.running = append(p.running, one)
	go func() {
		defer close(one.done)
		err := run(ctx)
		if ctx.Err() != nil {
			if !errors.Is(err, context.Canceled) {
				one.err = err
			}
			return
		}
		if err == nil {
			err = errors.New("ended unexpectedly")
		}
		select {
		case p.failed <- fmt.Errorf("%s: %w", name, err):
		default: // another part was first; the agent is stopping already
		}
	}()
}

// stop ends every part, last started first, and waits for each; one that does
// not end in time is left behind and reported.
func (p *parts) stop() error {
	var errs []error
	for _, one := range slices.Backward(p.running) {
		p.log.Debug("stopping", "part", one.name)
		one.cancel()
		select {
		case <-one.done:
		case <-time.After(p.timeout):
			errs = append(errs, fmt.Errorf("stop %s: still busy after %s", one.name, p.timeout))
			continue
		}
		if one.err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", one.name, one.err))
		}
	}
	p.running = nil
	return errors.Join(errs...)
}

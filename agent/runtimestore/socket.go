package runtimestore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
)

// topics are the events that tell of content, whatever the namespace.
var topics = []string{
	`topic~="/content/"`,
	`topic~="/images/"`, // all there is before containerd 2.1, when content appears
}

const (
	// socketPatience is for how long containerd may be away, as it is when it restarts,
	// before that is told.
	socketPatience = 10 * time.Second
	// servingTimeout is for a containerd that is there to say that it serves.
	servingTimeout = 10 * time.Second
)

// silence is what has kept the store from listening to containerd of late.
type silence struct {
	since time.Time // zero while it listens
	told  string
}

// listen is watchSocket, and says what keeps it from that, once for each reason: a socket
// with another name would be missed by nobody.
func (s *Store) listen(ctx context.Context) error {
	err := s.watchSocket(ctx)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if s.silence.since.IsZero() {
		s.silence.since = time.Now()
	}
	if why := err.Error(); time.Since(s.silence.since) >= socketPatience && why != s.silence.told {
		s.silence.told = why
		s.log.Warn("containerd does not answer: what runtime.content_dir has is served all the same, and the registry is asked who may have it; check runtime.containerd_socket",
			"socket", s.opts.Socket, "err", err)
	}
	return err
}

// watchSocket turns containerd's events into hints until the connection breaks.
func (s *Store) watchSocket(ctx context.Context) error {
	// The client below waits for a socket that is not there, and never says so.
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", s.opts.Socket)
	if err != nil {
		return err
	}
	_ = conn.Close() // nothing was sent
	c, err := client.New(s.opts.Socket)
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := serving(ctx, c); err != nil {
		return err
	}
	s.silence = silence{}
	envelopes, errs := c.Subscribe(ctx, topics...)
	s.log.Info("listening to containerd", "socket", s.opts.Socket)
	s.hints.addAll() // for what changed before
	due, hurried := time.NewTimer(0), true
	defer due.Stop()
	for {
		select {
		case <-due.C:
			if err := s.tellSources(ctx, c); err != nil {
				s.log.Debug("cannot read the labels of containerd's content", "err", err)
			}
			due.Reset(s.every) // a label that is added later makes no event
			hurried = false
		case e := <-envelopes:
			s.hint(e)
			if !hurried {
				due.Reset(sourcesPause)
				hurried = true
			}
		case err := <-errs:
			return fmt.Errorf("events of containerd: %w", err)
		}
	}
}

// serving waits until containerd is up.
func serving(ctx context.Context, c *client.Client) error {
	ctx, cancel := context.WithTimeout(ctx, servingTimeout)
	defer cancel()
	ok, err := c.IsServing(ctx)
	if err != nil {
		return fmt.Errorf("ask whether it serves: %w", err)
	}
	if !ok {
		return errors.New("it does not serve yet")
	}
	return nil
}

// hint says where an event makes it worth to look.
func (s *Store) hint(e *events.Envelope) {
	payload, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		s.hints.addAll()
		return
	}
	switch event := payload.(type) {
	case *apievents.ContentCreate:
		s.hints.add(digest.Digest(event.Digest))
	case *apievents.ContentDelete:
		s.hints.add(digest.Digest(event.Digest))
	default:
		s.hints.addAll()
	}
}

package runtimestore

import (
	"context"
	"errors"
	"fmt"
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

// watchSocket turns containerd's events into hints until the connection breaks.
func (s *Store) watchSocket(ctx context.Context) error {
	c, err := client.New(s.opts.Socket)
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Waits until containerd is up.
	if ok, err := c.IsServing(ctx); err != nil || !ok {
		return fmt.Errorf("containerd is not serving: %w", errors.Join(err, ctx.Err()))
	}
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

package peer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Questions between members, and their answers. Join, permit, resolve, may, keep and way are JSON,
// so that fields can be added; delta and snapshot are binary. The numbers are on the wire.

// Methods of calls.
const (
	methodJoin byte = iota + 1
	methodPermit
	methodResolve
	methodMay
	methodDelta
	methodSnapshot
	methodKeep
	methodWay
)

// Statuses of answers.
const (
	statusOK byte = iota
	statusFailed
	statusBusy
	statusRefused // a Refusal follows as JSON
	statusCutOff  // errUnreached; names of members that have a way may follow as JSON
)

// Refusal is upstream's own answer to a home, as another node can give it to
// its client. Origin returns it; Resolve and May pass it on.
type Refusal struct {
	Status    int      // of HTTP
	Text      string   // for people
	Challenge []string `json:",omitempty"` // WWW-Authenticate; from another node, so to be checked
}

// short bounds what goes over the wire.
func (r *Refusal) short() Refusal {
	out := Refusal{Status: r.Status, Text: truncate(r.Text)}
	for _, c := range r.Challenge[:min(len(r.Challenge), maxChallenges)] {
		if len(c) <= maxChallengeLen { // half a challenge is none
			out.Challenge = append(out.Challenge, c)
		}
	}
	return out
}

const (
	maxText         = 256 // bytes of text for people
	maxChallenges   = 4
	maxChallengeLen = 2 << 10
)

func (r *Refusal) Error() string { return r.Text }

// remoteError is what a peer said went wrong.
type remoteError struct{ text string }

func (e *remoteError) Error() string { return e.text }

// ask calls a method whose answer is one JSON value.
func (l *link) ask(ctx context.Context, method byte, q, a any) error {
	c, err := l.call(ctx, method, marshal(q))
	if err != nil {
		return err
	}
	return c.into(a, l.node)
}

// askPage calls a method of the index, whose answers are binary; any status but OK is ErrBusy.
func (l *link) askPage(ctx context.Context, method byte, q []byte) ([]byte, error) {
	c, err := l.call(ctx, method, q)
	if err == nil && c.method != statusOK {
		err = ErrBusy
	}
	return c.body, err
}

// into reads an answer of a node.
func (m call) into(a any, node string) error {
	switch m.method {
	case statusOK:
		return json.Unmarshal(m.body, a)
	case statusBusy:
		return ErrBusy
	case statusCutOff:
		cut := new(cutOffError)
		_ = json.Unmarshal(m.body, &cut.others) // an older node names nobody
		return cut
	case statusRefused:
		refusal := new(Refusal)
		if err := json.Unmarshal(m.body, refusal); err != nil {
			return err
		}
		return refusal
	}
	return &remoteError{fmt.Sprintf("peer %s: %s", node, truncate(string(m.body)))}
}

// askMember links with a member and asks it; l is the link that was last asked over, if there was
// one. Two nodes that dial each other at once lose one of the links, perhaps the one asked over;
// the other is there a moment later.
func (s *Swarm) askMember(ctx context.Context, m *Member, method byte, q, a any) (l *link, err error) {
	for try := range askTries {
		wait(ctx, time.Duration(try)*askPause)
		l, err = s.connect(ctx, m)
		if err == nil {
			err = l.ask(ctx, method, q, a)
		}
		if !errors.Is(err, errLinkClosed) && !errors.Is(err, errReplaced) {
			break
		}
	}
	return l, err
}

const (
	askTries = 4
	askPause = 20 * time.Millisecond
)

// called starts the answer to a question, while the reader goes on. The answer's context
// ends with the answer or with Run, but not with the link: others may wait for the same.
func (s *Swarm) called(l *link, c call) {
	if l.asked.Add(1) > maxCalls {
		l.asked.Add(-1)
		l.send(call{id: c.id, method: statusBusy}.reply)
		return
	}
	l.touch()
	s.spawn(func(ctx context.Context) {
		defer l.asked.Add(-1)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		status, body := outcome(s.answer(ctx, l, c))
		l.touch() // or the link might be idle before the answer is sent
		l.send(call{id: c.id, method: status, body: body}.reply)
	})
}

// outcome is how an answer, or why there is none, goes to the asker; call.into reads it.
func outcome(body []byte, err error) (byte, []byte) {
	refusal, refused := errors.AsType[*Refusal](err)
	switch {
	case errors.Is(err, ErrBusy):
		return statusBusy, nil
	case errors.Is(err, errUnreached):
		return statusCutOff, body
	case refused:
		return statusRefused, marshal(refusal.short())
	case err != nil:
		return statusFailed, []byte(truncate(err.Error()))
	case len(body) > maxPayload-64:
		return statusFailed, []byte("answer too long")
	}
	return statusOK, body
}

func (m call) reply(b []byte) []byte { return m.append(b, frameReply) }

// answer answers one question.
func (s *Swarm) answer(ctx context.Context, l *link, c call) ([]byte, error) {
	switch c.method {
	case methodJoin:
		return answerAs(c.body, func(a joinAsk) (joinReply, error) { return s.joined(ctx, l, a) })
	case methodPermit:
		return answerAs(c.body, func(a permitAsk) (permitReply, error) { return s.permitted(l, a) })
	case methodKeep:
		return answerAs(c.body, func(a Copy) (struct{}, error) { return s.keeps(ctx, a) })
	case methodResolve, methodMay, methodWay:
		r, err := decode[Reference](c.body)
		if err != nil {
			return nil, err
		}
		b, err := s.answerSmall(ctx, c.method, r)
		if errors.Is(err, errUnreached) {
			b = marshal(s.listed(r.Registry))
		}
		return b, err
	case methodDelta:
		q, err := parseDeltaAsk(c.body)
		if err != nil {
			return nil, err
		}
		return s.index.delta(q).append(nil), nil
	case methodSnapshot:
		q, err := parsePageAsk(c.body)
		if err != nil {
			return nil, err
		}
		return s.index.page(q), nil
	}
	return nil, fmt.Errorf("method %d is unknown", c.method)
}

func answerAs[Q, A any](body []byte, f func(Q) (A, error)) ([]byte, error) {
	q, err := decode[Q](body)
	if err != nil {
		return nil, err
	}
	a, err := f(q)
	if err != nil {
		return nil, err
	}
	return marshal(a), nil
}

// decode reads a call's body; it is at most one frame long.
func decode[T any](body []byte) (T, error) {
	var v T
	if err := json.Unmarshal(body, &v); err != nil {
		return v, fmt.Errorf("%w: %w", errWire, err)
	}
	return v, nil
}

// truncate bounds text for people that goes over the wire, or came from there.
func truncate(s string) string { return s[:min(len(s), maxText)] }

package peer

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"time"
)

// What is too small for a swarm still counts against a registry's rate limit: tags,
// and whether a repository is public. Their home asks upstream once for
// everybody, and remembers the answer.

const (
	questionTime = 4 * time.Second // a home may take so long; then the next one is asked
	errorMemory  = time.Second     // a failure is told to those who ask at the same time
	publicTTL    = 10 * time.Minute
	maxAnswers   = 16384
)

// Resolve asks the tag's home what it stands for. It fails when no home
// answers, or with the home's own error; the caller then asks upstream itself.
func (s *Swarm) Resolve(ctx context.Context, r Reference) (Descriptor, error) {
	var d Descriptor
	err := s.consult(ctx, methodResolve, r, &d)
	return d, err
}

// Public asks the repository's home whether upstream shows it to anyone.
func (s *Swarm) Public(ctx context.Context, r Reference) (bool, error) {
	var p publicReply
	r.Tag, r.Accept, r.Authorization = "", nil, ""
	err := s.consult(ctx, methodPublic, r, &p)
	return p.Public, err
}

type publicReply struct{ Public bool }

// subject is what a question is about. The credential is part of it: an answer
// is only for those who may ask.
func (r Reference) subject(method byte) key {
	return sha256.Sum256([]byte(strings.Join([]string{
		string(rune(method)), r.Registry, r.Repository, r.Tag, strings.Join(r.Accept, ","), r.Authorization}, "\x00")))
}

// home is what decides a question's homes.
func (r Reference) home() key {
	return sha256.Sum256([]byte(strings.Join([]string{r.Registry, r.Repository, r.Tag}, "\x00")))
}

// consult asks the homes of a subject, in order. This node may be one of them.
func (s *Swarm) consult(ctx context.Context, method byte, r Reference, out any) error {
	ctx, stop, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer stop()
	k := r.home()
	for _, m := range s.roster.view.Load().homes(k, s.cfg.Zone, s.cfg.ZoneScope) {
		if m.Name == s.self.Name {
			return s.decide(ctx, method, r, out)
		}
		if s.roster.isDown(m.Name) {
			continue
		}
		err = s.question(ctx, m, method, r, out)
		if err == nil || answered(err) || ctx.Err() != nil {
			return err
		}
		s.log.Debug("home did not answer", "peer", m.Node, "err", err)
	}
	return s.decide(ctx, method, r, out)
}

// answered reports whether a home said no, rather than nothing.
func answered(err error) bool {
	_, remote := errors.AsType[*remoteError](err)
	_, refused := errors.AsType[*Refusal](err)
	return remote || refused
}

func (s *Swarm) question(ctx context.Context, m *Member, method byte, r Reference, out any) error {
	ctx, cancel := context.WithTimeout(ctx, questionTime)
	defer cancel()
	_, err := s.askMember(ctx, m, method, r, out)
	return err
}

func (s *Swarm) decide(ctx context.Context, method byte, r Reference, out any) error {
	b, err := s.answerSmall(ctx, method, r)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, out)
}

// answers remembers what upstream said, and makes those who ask at the same
// time wait for one question.
type answers struct {
	mu    sync.Mutex // guards byKey
	byKey map[key]*remembered
}

type remembered struct {
	done  chan struct{}
	until time.Time // set before done is closed
	body  []byte
	err   error
}

// answerSmall answers as the home.
func (s *Swarm) answerSmall(ctx context.Context, method byte, r Reference) ([]byte, error) {
	a, mine := s.answers.claim(r.subject(method), time.Now())
	if mine {
		// The question outlives whoever asked first: the others wait for it too.
		s.spawn(func(ctx context.Context) {
			ctx, cancel := context.WithTimeout(ctx, questionTime)
			defer cancel()
			a.body, a.err = s.askUpstream(ctx, method, r)
			a.until = time.Now().Add(s.remember(method, a.err))
			close(a.done)
		})
	}
	select {
	case <-a.done:
		return a.body, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *Swarm) remember(method byte, err error) time.Duration {
	switch {
	case err != nil:
		return errorMemory
	case method == methodPublic:
		return publicTTL
	}
	return s.cfg.TagTTL
}

func (s *Swarm) askUpstream(ctx context.Context, method byte, r Reference) ([]byte, error) {
	if method == methodPublic {
		p, err := s.cfg.Origin.Public(ctx, r)
		return marshal(publicReply{p}), err
	}
	d, err := s.cfg.Origin.Resolve(ctx, r)
	return marshal(d), err
}

// claim returns the answer to a subject, and whether the caller has to find it.
func (a *answers) claim(k key, now time.Time) (*remembered, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r, ok := a.byKey[k]; ok {
		select {
		case <-r.done:
			if now.Before(r.until) {
				return r, false
			}
		default:
			return r, false
		}
	}
	a.makeRoomLocked(now)
	r := &remembered{done: make(chan struct{})}
	a.byKey[k] = r
	return r, true
}

func (a *answers) makeRoomLocked(now time.Time) {
	if len(a.byKey) < maxAnswers {
		return
	}
	for k, r := range a.byKey {
		select {
		case <-r.done:
			if now.After(r.until) || len(a.byKey) >= maxAnswers {
				delete(a.byKey, k)
			}
		default:
		}
	}
}

package peer

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// What is too small for a swarm still counts against a registry's rate limit:
// tags, and who may read a repository. A repository's home asks upstream once for
// everybody, and remembers the answer.

const (
	questionTime = 4 * time.Second  // a home may take so long; then the next one is asked
	originTime   = 2 * time.Second  // of it upstream may take for anyone's question, if somebody may remember the answer
	betterTime   = time.Second      // other homes may take, once one has said what it remembers
	witnessMost  = 3                // members that are asked what they remember
	errorMemory  = time.Second      // a failure, a verdict or what is stale is told to those who ask at the same time
	grantMemory  = time.Minute      // what a tag stands for, said to a credential, is a verdict on that
	publicMemory = 10 * time.Minute // said to anyone, it is one on the repository
	maxAnswers   = 16384
)

// Resolve asks the tag's homes what it stands for, until one has the answer from
// upstream; else it returns what one of them knows (Stale). It fails when no home
// knows anything, or with upstream's own *Refusal; the caller may then ask
// upstream itself. Each home may take questionTime. A question put to a home
// continues there after ctx ends: others may wait for the same.
func (s *Swarm) Resolve(ctx context.Context, r Reference) (Descriptor, error) {
	var best Descriptor
	err := s.consult(ctx, methodResolve, r, func(b []byte) (enough bool, err error) {
		var d Descriptor
		if err := json.Unmarshal(b, &d); err != nil {
			return false, fmt.Errorf("resolve: read a home's answer: %w", err)
		}
		if best.Digest == "" || !d.Stale {
			best = d
		}
		return !d.Stale, nil
	})
	return best, err
}

// May asks the repository's homes whether upstream lets the asker read what r names, until
// one knows: nil is yes; so is ErrImported, but for that alone; a *Refusal is no. Other
// errors mean that nobody knows now. age is how long ago upstream said yes. It takes as
// long as Resolve.
func (s *Swarm) May(ctx context.Context, r Reference) (age time.Duration, err error) {
	var l leave
	err = s.consult(ctx, methodMay, r, func(b []byte) (enough bool, err error) {
		if err := json.Unmarshal(b, &l); err != nil {
			return false, fmt.Errorf("may: read a home's answer: %w", err)
		}
		return true, nil
	})
	if err == nil && l.Imported {
		return 0, ErrImported
	}
	return max(l.Age, 0), err
}

// leave is the yes to May.
type leave struct {
	Imported bool          `json:",omitempty"` // see ErrImported
	Age      time.Duration `json:",omitempty"` // of upstream's word
}

// subject is what a question is about. The credential is part of it: an answer
// is only for those who may ask.
func (r Reference) subject(method byte) key {
	return sha256.Sum256([]byte(strings.Join([]string{
		string(rune(method)), r.Registry, r.Repository, r.Tag, strings.Join(r.Accept, ","), r.Authorization,
		strconv.FormatBool(r.Node), strconv.FormatBool(r.Blob), strconv.FormatBool(r.Known), strconv.FormatBool(r.Stored), strconv.FormatBool(r.Memory)}, "\x00")))
}

// entry is the digest under which the index knows who has what r names, or
// remembers the tag.
func (r Reference) entry() digest.Digest {
	if d, err := digest.Parse(r.Tag); err == nil {
		return d
	}
	return digest.FromString("larder tag\x00" + r.Registry + "\x00" + r.Repository + "\x00" + r.Tag)
}

// Remember says that this node knows what a tag stood for: homes ask it while
// upstream cannot be asked. As with a blob, the index tells others.
func (s *Swarm) Remember(r Reference) { s.Announce(r.entry()) }

// Forget takes Remember back.
func (s *Swarm) Forget(r Reference) { s.Withdraw(r.entry()) }

// home decides a question's homes: the same for everything that concerns a
// repository, so that the answer that resolved a tag is also the one that lets the
// asker have its blobs.
func (r Reference) home() key {
	return sha256.Sum256([]byte(r.Registry + "\x00" + r.Repository))
}

// consult asks the homes of a subject, in order, until take has enough; if none
// of them can be reached, this node decides. A home that cannot ask upstream is
// no reason to give up: a node that has just joined may be home of a tag it
// never saw, and the one that was home before it knows.
func (s *Swarm) consult(ctx context.Context, method byte, r Reference, take func(b []byte) (enough bool, err error)) error {
	ctx, stop, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer stop()
	var failed error
	taken, reached := false, false
	asked := make(map[string]bool)
	homes := func() []*Member {
		return s.around(s.roster.homes(r.home(), s.cfg.Zone, s.cfg.ZoneScope), r.home(), r.Registry)
	}
	next := func() *Member { return nextOf(homes(), asked) }
	for m := next(); m != nil; m = next() {
		asked[m.Name] = true
		stop := s.ahead(m, homes())
		b, err := s.put(ctx, m, method, r)
		stop()
		switch {
		case err == nil:
			if enough, err := take(b); enough || err != nil {
				return err
			}
			if !taken { // the caller can go on with that; the others may not take as long again
				taken = true
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, betterTime)
				defer cancel()
			}
		case refused(err):
			return err
		case ctx.Err() != nil && taken:
			return nil
		case ctx.Err() != nil:
			return err
		default:
			s.log.Debug("home has no answer", "peer", m.Node, "err", err)
			failed, reached = err, reached || m.Name == s.self.Name || answered(err)
		}
	}
	switch {
	case taken:
		return nil
	case reached:
		return failed
	}
	b, err := s.answerSmall(ctx, method, r)
	if err == nil {
		_, err = take(b)
	}
	return err
}

// refused reports whether upstream itself said no, for good.
func refused(err error) bool {
	r, ok := errors.AsType[*Refusal](err)
	return ok && r.Status < 500 && r.Status != http.StatusTooManyRequests
}

// answered reports whether a home said why it has no answer, rather than
// nothing.
func answered(err error) bool {
	_, remote := errors.AsType[*remoteError](err)
	_, refused := errors.AsType[*Refusal](err)
	return remote || refused || errors.Is(err, errUnreached)
}

// put asks one home, and notes if it does not reach the registry.
func (s *Swarm) put(ctx context.Context, m *Member, method byte, r Reference) ([]byte, error) {
	if m.Name == s.self.Name {
		return s.answerSmall(ctx, method, r)
	}
	ctx, cancel := context.WithTimeout(ctx, questionTime)
	defer cancel()
	var b json.RawMessage
	_, err := s.askMember(ctx, m, method, r, &b)
	if cut, ok := errors.AsType[*cutOffError](err); ok {
		s.cutOff(m.Name, r.Registry, cut.others)
	}
	return b, err
}

// answers remembers what upstream said, and makes those who ask at the same
// time wait for one question.
type answers struct {
	mu    sync.Mutex          // guards byKey
	byKey map[key]*remembered // by subject; at most maxAnswers, but for those that are being found
}

// remembered is an answer, or one that is yet to be found. The rest is set before done is closed,
// by who claimed it, and constant from then on.
type remembered struct {
	done  chan struct{}
	until time.Time // that it counts
	body  []byte    // JSON of a Descriptor or of a leave
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
			var ttl time.Duration
			a.body, ttl, a.err = s.find(ctx, method, r)
			a.until = time.Now().Add(ttl)
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

// find asks upstream and, if upstream cannot be asked, those who may remember.
// It also says how long to remember the answer.
func (s *Swarm) find(ctx context.Context, method byte, r Reference) ([]byte, time.Duration, error) {
	witnesses := s.witnesses(r)
	octx, cancel := ctx, context.CancelFunc(func() {})
	if len(witnesses) > 0 && r.Authorization == "" && !r.Node { // a credential is hardly ever remembered elsewhere
		octx, cancel = context.WithTimeout(ctx, originTime)
	}
	defer cancel()
	if !r.Memory {
		var stop func()
		octx, stop = s.whileReached(octx, r.Registry, func() bool { return true })
		defer stop()
	}
	body, ttl, err := s.askUpstream(octx, method, r)
	if err == nil || refused(err) {
		return body, ttl, err
	}
	switch _, told := errors.AsType[*Refusal](err); {
	case unreached(octx):
		err = errUnreached
	case !told && !r.Memory:
		s.doubt(r.Registry)
	}
	r.Memory = true
	for _, m := range witnesses {
		b, werr := s.put(ctx, m, method, r)
		if werr == nil || refused(werr) {
			return b, errorMemory, werr
		}
		s.log.Debug("member remembers nothing", "peer", m.Node, "err", werr)
	}
	return body, ttl, err
}

// witnesses are members that, by the index, have what r names or remember the
// tag. The homes of a repository need not be among them: members come and go.
func (s *Swarm) witnesses(r Reference) (out []*Member) {
	k, err := parseKey(r.entry().String())
	if r.Memory || err != nil {
		return nil
	}
	for _, name := range s.index.holders(prefixOf(k), s.cfg.Zone, witnessMost) {
		if m, ok := s.roster.get(name); ok && !s.roster.isDown(name) {
			out = append(out, m)
		}
	}
	return out
}

func (s *Swarm) askUpstream(ctx context.Context, method byte, r Reference) ([]byte, time.Duration, error) {
	if method == methodWay {
		if err := s.giveWay(ctx, r.Registry); err != nil {
			return nil, wayAgain, err
		}
		return marshal(leave{}), wayCheck, nil
	}
	if method == methodMay { // the node itself knows for how long to remember it
		age, err := s.cfg.Origin.May(ctx, r)
		if errors.Is(err, ErrImported) {
			return marshal(leave{Imported: true}), errorMemory, nil
		}
		return marshal(leave{Age: age}), errorMemory, err
	}
	d, err := s.cfg.Origin.Resolve(ctx, r)
	if err != nil {
		return nil, errorMemory, err
	}
	keep := publicMemory
	switch {
	case d.Stale:
		keep = errorMemory
	case r.Authorization != "" || r.Node:
		keep = grantMemory
	}
	return marshal(d), min(keep, s.cfg.TagTTL(r.Registry)), nil
}

// claim returns the answer to a subject, and whether the caller has to find it.
func (a *answers) claim(k key, now time.Time) (*remembered, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r, ok := a.byKey[k]; ok && (!closed(r.done) || now.Before(r.until)) {
		return r, false
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
		if closed(r.done) && (now.After(r.until) || len(a.byKey) >= maxAnswers) {
			delete(a.byKey, k)
		}
	}
}

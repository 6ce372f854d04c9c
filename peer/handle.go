package peer

import (
	"context"
	"errors"
	"time"
)

// What a peer says is handled here, on the reader of its link: a peer that makes it wait holds
// up its own frames and nobody else's. Questions are answered on goroutines of their own
// (called).

// handle takes one frame, whose payload p the reader may reuse afterwards. An error ends
// the link, and errWire bans the peer.
func (s *Swarm) handle(l *link, t frameType, p []byte) error {
	switch t {
	case framePing, frameHello:
		return nil
	case frameOpen:
		return handleAs(parseOpen, p, func(o open) { s.opened(l, o) })
	case frameHave:
		return handleAs(parseHave, p, func(h have) { s.ifBlob(h.blob, func(b *blob) { b.haves(l, h); b.adopt(l) }) })
	case frameClose:
		return handleAs(parseClose, p, func(id blobID) { s.ifBlob(id, func(b *blob) { b.turnedAwayBy(l) }) })
	case frameRequest:
		return handleAs(parseWant, p, func(w want) { s.asked(l, w) })
	case frameCancel:
		return handleAs(parseAnswer, p, func(a answer) { s.uploads.cancel(l, a.id) })
	case frameBusy, frameGone:
		return handleAs(parseAnswer, p, func(a answer) { s.denied(l, t, a) })
	case frameDigests:
		return handleAs(parseBatch, p, func(d *batch) { s.ifBlob(d.blob, func(b *blob) { b.learn(d) }) })
	case frameCall:
		return handleAs(parseCall, p, func(c call) { s.called(l, c) })
	case frameReply:
		return handleAs(parseCall, p, l.answered)
	}
	return errWire
}

func handleAs[T any](parse func([]byte) (T, error), p []byte, f func(T)) error {
	v, err := parse(p)
	if err == nil {
		f(v)
	}
	return err
}

// ifBlob calls f, without a lock, if the blob is known: what is said of others leaves no trace.
func (s *Swarm) ifBlob(id blobID, f func(*blob)) {
	if b := s.knownBlob(id); b != nil {
		f(b)
	}
}

// opened takes in that a peer takes part in a blob, which may be one that this
// node holds and has not thought of since.
func (s *Swarm) opened(l *link, o open) {
	b := s.blobHere(o.blob)
	if b == nil {
		l.send(func(p []byte) []byte { return appendClose(p, o.blob) })
		s.pointedOn(l, o)
		return
	}
	if s.good(o.pass, o.blob.key, l.peer) {
		b.admit(l.peer, o.pass.registry)
	}
	if !s.takesPart(b, l.peer) {
		// It would ask in vain; let it look elsewhere now. An open that is turned
		// away gets no open in return: two nodes that have nothing for each other
		// would go on like that forever.
		b.left(l)
		l.send(func(p []byte) []byte { return appendClose(p, o.blob) })
		s.pointOn(l, o)
		s.pointedOn(l, o)
		return
	}
	b.opened(l, o)
	if o.have.count() > 0 {
		b.adopt(l)
	}
}

// blobHere is the blob if this node has to do with it, or could have: its store
// holds it. Opening any other blob leaves no trace, or a peer could fill the
// table in which a home needs room for those who join.
func (s *Swarm) blobHere(id blobID) *blob {
	if b := s.knownBlob(id); b != nil {
		return b
	}
	stored, ok := s.cfg.Store.Lookup(id.key.digest())
	if !ok {
		return nil
	}
	stored.Close()
	b, _ := s.guestBlob(id) // nil if there are too many
	return b
}

// takesPart reports whether this node has a reason to be a member's neighbour: it
// fetches the blob, others meet here for it, or it has something to give.
func (s *Swarm) takesPart(b *blob, member string) bool {
	if b.isVoid() {
		return false
	}
	if b.active() {
		return true
	}
	there := b.offered() > 0 || s.seedFromStore(b) == nil
	return b.home.count() > 0 || b.active() || there && b.lets(member)
}

// denied takes in that a request of ours will not be answered, or not yet.
func (s *Swarm) denied(l *link, t frameType, a answer) {
	switch r := l.forget(a.id); {
	case r == nil:
	case t == frameBusy:
		r.blob.busy(r, a)
	default:
		r.blob.failed(r, true)
	}
}

// seedFromStore offers a blob that the store holds whole. Hashing happens in
// the background.
func (s *Swarm) seedFromStore(b *blob) error {
	b.mu.Lock()
	busy, passing, rotten := b.scanning || b.keepsLocked(), b.fill != nil, b.rotten
	b.mu.Unlock()
	switch {
	case busy:
		return nil
	case passing:
		return errNotHere // what is offered would count as what the fetch has
	case rotten:
		return errWrongBlob
	}
	h, err := b.acquire()
	if err != nil {
		return err
	}
	defer b.release(h)
	if h.Size() <= 0 || !b.setSize(h.Size()) || !hasAll(h, b.n) {
		b.letGo()
		return errNotHere
	}
	b.mu.Lock()
	start, size, life := !b.scanning, b.size, b.life
	b.scanning = true
	b.mu.Unlock()
	if start {
		s.spawn(func(ctx context.Context) {
			err := s.hashing(ctx, size, func() error { return b.seed(life) })
			b.lastUse.set(time.Now()) // whoever asks next need not wait for it again
			b.mu.Lock()
			b.scanning = false
			b.rotten = errors.Is(err, errWrongBlob) && b.life == life // else it is the next fill's
			rotten := b.rotten
			b.mu.Unlock()
			if rotten {
				b.withdraw()
			}
			if err != nil && !errors.Is(err, errNotHere) && ctx.Err() == nil {
				s.log.Warn("blob is not offered", "digest", b.d, "err", err)
			}
		})
	}
	return nil
}

// hashersAtOnce bounds how many blobs are read from disk to be hashed: a peer may
// ask for all of them. As many again may be larger than verifyFirst; these take
// minutes, and those who wait for the others have no such patience.
const hashersAtOnce = 2

func (s *Swarm) hashing(ctx context.Context, size int64, f func() error) error {
	places := s.hashers
	if size > verifyFirst {
		places = s.bigHashers
	}
	select {
	case places <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-places }()
	return f()
}

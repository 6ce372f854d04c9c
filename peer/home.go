package peer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// Being a home: a node that asks to join is let in and told whom to meet, and if the blob is
// not on its way yet, gather starts it through the node's own fill, which ends up in asHome
// of upstream.go. Nothing here waits for bytes, except for the few of a blob that fits into
// the answer.

const (
	lease      = 30 * time.Second
	maxLeases  = 20000                  // of one blob
	introduce  = 10                     // neighbours named to one that joins; links count for both sides
	homeDegree = 24                     // neighbours a home keeps for itself
	sizeWait   = 300 * time.Millisecond // an answer waits so long for the size
	inlineMax  = 16 << 10               // blobs up to this ride in the answer
	failMemory = 3 * time.Second
	resumeWait = 150 * time.Millisecond // a new home listens for what the swarm has
)

// meeting is what a node keeps about a blob as its home: who takes part. It stands
// in for a tracker. Its lock is never taken under blob.mu, nor the other way round.
type meeting struct {
	mu        sync.Mutex // guards the following
	members   map[string]*attendee
	names     []string             // of members, in no order
	permitted time.Time            // when somebody was last let fetch from upstream beside this node
	doubted   time.Time            // when somebody last came with pieces: another home was here before, and is likely gone
	relied    time.Time            // when another home was last told that this node gets the blob
	idle      map[string]time.Time // homes that somebody waited for in vain, and when he said so
}

type attendee struct {
	until time.Time // its lease
	at    int       // index in names
	named int       // how often it was introduced to others
	zone  string
}

// join notes that a member takes part and returns whom it should meet.
func (m *meeting) join(name, zone string, rng *rand.Rand) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := m.introduceLocked(name, zone, rng)
	a := m.members[name]
	if a == nil && len(m.names) < maxLeases {
		a = &attendee{at: len(m.names), zone: zone}
		m.members[name] = a
		m.names = append(m.names, name)
	}
	if a != nil {
		a.until = time.Now().Add(lease)
	}
	return out
}

// early reports whether a member is one of the first of several that meet here.
func (m *meeting) early(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	a := m.members[name]
	return a != nil && a.at < introduce && len(m.names) > 1
}

// introduceLocked picks neighbours. Of two drawn at random it takes the one
// named less often, which keeps degrees even although early members are there
// for all the draws; the same zone is preferred.
func (m *meeting) introduceLocked(self, zone string, rng *rand.Rand) (out []string) {
	now := time.Now()
	taken := map[string]bool{self: true}
	for tries := 0; len(out) < introduce && tries < 6*introduce && len(m.names) > 0; tries++ {
		var best string
		for range 2 {
			n := m.names[rng.IntN(len(m.names))]
			a := m.members[n]
			if taken[n] || now.After(a.until) || (a.zone != zone && tries < 4*introduce) {
				continue
			}
			if best == "" || a.named < m.members[best].named {
				best = n
			}
		}
		if best != "" {
			taken[best] = true
			m.members[best].named++
			out = append(out, best)
		}
	}
	return out
}

// doubt reports when somebody last came here because the home above is gone; zero if
// nobody did.
func (m *meeting) doubt() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.doubted
}

// reliedOn reports whether another home has been told since t that this node gets the blob.
func (m *meeting) reliedOn(t time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.relied.After(t)
}

func (m *meeting) rely(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.relied = now
}

// count is how many meet here.
func (m *meeting) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.names)
}

func (m *meeting) forget(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forgetLocked(name)
}

func (m *meeting) forgetLocked(name string) {
	a, ok := m.members[name]
	if !ok {
		return
	}
	last := m.names[len(m.names)-1]
	m.names[a.at], m.members[last].at = last, a.at
	m.names = m.names[:len(m.names)-1]
	delete(m.members, name)
}

// expire drops leases that ran out and reports how many are left.
func (m *meeting) expire(now time.Time) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range slices.Clone(m.names) {
		if now.After(m.members[n].until) {
			m.forgetLocked(n)
		}
	}
	return len(m.names)
}

// permit allows one more fetch of the blob from upstream, unless there was one within
// lease.
func (m *meeting) permit(now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now.Sub(m.permitted) <= lease {
		return false
	}
	m.permitted = now
	return true
}

// joinAsk is what a node that misses a blob sends to its home, first to join
// and then to renew its lease.
type joinAsk struct {
	Digest        string
	Registry      string `json:",omitempty"`
	Repository    string `json:",omitempty"`
	Authorization string `json:",omitempty"`
	Node          bool   `json:",omitempty"`
	Pass          bool   `json:",omitempty"` // wanted: it has none of this home
	Manifest      bool   `json:",omitempty"`
	Attempt       int    `json:",omitempty"`
	Have          int    `json:",omitempty"` // pieces
	Size          int64  `json:",omitempty"` // see Want
	Helped        int64  `json:",omitempty"` // bytes that it fetched from upstream, see Help
	Stalled       bool   `json:",omitempty"` // those named so far do not deliver
	Peek          bool   `json:",omitempty"` // do not turn to upstream for it: from another home, or see Want.Held
	More          bool   `json:",omitempty"` // there is another home to ask
	// Idle are homes that said they get the blob, and gave nothing: the home that is
	// asked instead must not wait for them in its turn.
	Idle []string `json:",omitempty"`
}

// joinReply is all that a node needs to take part: one round trip. Piece
// digests travel with the pieces (I2).
type joinReply struct {
	Size    int64    `json:",omitempty"` // 0 = the home does not know yet
	Meet    []string `json:",omitempty"` // members to link with
	Vouch   []string `json:",omitempty"` // whose piece digests count
	Stay    bool     `json:",omitempty"` // the home itself is a neighbour
	Body    []byte   `json:",omitempty"` // all of a small blob
	Moving  bool     `json:",omitempty"` // the home, or the source that it waits for, got bytes lately
	Source  bool     `json:",omitempty"` // the home goes upstream itself, or has all of it
	Holders []string `json:",omitempty"` // to a peek: who of Meet should have all of it
	Attempt int      `json:",omitempty"` // more than that of the question: come back with this one
	Help    int64    `json:",omitempty"` // fetch from the far end too: the home's own pace, bytes per second
	Refused string   `json:",omitempty"` // ask the next home: why
	CutOff  bool     `json:",omitempty"` // refused, because the home does not reach the registry
	Ways    []string `json:",omitempty"` // with CutOff: members that do
	Pass    []byte   `json:",omitempty"` // the signature of a pass, see pass; also when refused
}

func (a joinAsk) want(b *blob) Want {
	w := Want{Digest: b.d, Registry: a.Registry, Repository: a.Repository, Manifest: a.Manifest, Authorization: a.Authorization, Node: a.Node}
	if a.Size > 0 && a.Size <= maxBlobSize {
		w.Size = a.Size
	}
	return w
}

// joined answers a node that misses a blob. The order counts: leave first, for nothing may be
// told to a node that has none (I9), then the attempt (I10), and the pass before gather, so
// that it is obtained even from a home that cannot help.
func (s *Swarm) joined(ctx context.Context, l *link, ask joinAsk) (joinReply, error) {
	id, err := parseBlobID(ask.Digest, ask.Attempt)
	if err != nil {
		return joinReply{}, err
	}
	b, err := s.guestBlob(id)
	if err != nil {
		return joinReply{}, err
	}
	if err := s.cfg.Origin.Admit(ctx, ask.want(b)); err != nil {
		return joinReply{Refused: truncate(err.Error())}, nil
	}
	if err := s.supersede(ctx, id); err != nil {
		return joinReply{Refused: truncate(err.Error())}, nil
	}
	if b.isVoid() {
		return b.over(), nil
	}
	b.admit(l.peer, ask.Registry)
	b.note(l, ask)
	reply := joinReply{Meet: b.home.join(l.peer, l.zone, b.newRand())}
	if ask.Pass {
		p := s.sign(b.id.key, ask.Registry, l.peer)
		reply.Pass = p.sig[:]
	}
	holders := s.holders(b.id.key, l.zone, !s.cfg.ZoneScope)
	holders = slices.DeleteFunc(holders, func(n string) bool { return n == l.peer })
	if err := s.gather(ctx, b, ask, len(holders) > 0); err != nil {
		if errors.Is(err, errForeign) || errors.Is(err, errUnreached) {
			b.home.forget(l.peer) // nothing for it meets here
		}
		reply.Refused, reply.CutOff = truncate(err.Error()), errors.Is(err, errUnreached)
		if reply.CutOff {
			reply.Ways = s.listed(ask.Registry)
		}
		return reply, nil
	}
	reply.Meet = append(append(reply.Meet, holders...), s.abroad(b, l)...)
	reply.Vouch = b.vouched(holders)
	b.awaitSize(ctx)
	if b.active() || b.offered() > 0 {
		// The size of a file that is still to be checked is no more than a guess.
		reply.Size = b.sized()
	}
	reply.Source = b.source()
	if ask.Peek {
		reply.Holders = holders
		if reply.Source {
			b.home.rely(time.Now())
		}
	}
	reply.Moving = b.outlook(time.Now()).moves()
	if b.lets(l.peer) {
		reply.Body = b.inline()
		l.sent(len(reply.Body))
	}
	if reply.Body == nil {
		reply.Stay = b.stay(l)
	}
	if reply.Stay && !ask.Peek {
		reply.Help = b.wantsHelp(l.peer, ask.Registry, ask.Helped)
	}
	return reply, nil
}

// abroad is whom some of those that meet here should meet in other zones when the zone's
// home has all of the blob: it asks no home of the cluster, so nothing else links this zone
// with the others, and each of these would get its copy from this node.
func (s *Swarm) abroad(b *blob, l *link) (names []string) {
	if s.cfg.ZoneScope || l.zone != s.cfg.Zone || !b.whole() || !b.home.early(l.peer) {
		return nil
	}
	for _, m := range s.roster.homes(b.id.key, "", false) {
		if m.Name == s.self.Name {
			return nil // they all turn to it
		}
		names = append(names, m.Name)
	}
	return names
}

// over answers a node that comes to a home with an attempt that is void there.
func (b *blob) over() joinReply {
	reply := joinReply{Attempt: b.s.attempt(b.id.key, int(b.id.attempt))}
	if reply.Attempt > lastAttempt {
		reply.Refused = errNoMore.Error()
	}
	return reply
}

// note keeps what an asker tells about the swarm's past.
func (b *blob) note(l *link, ask joinAsk) {
	b.lastUse.set(time.Now())
	b.home.mu.Lock()
	defer b.home.mu.Unlock()
	if ask.Have > 0 && b.home.members[l.peer] == nil {
		b.home.doubted = time.Now()
	}
	for _, name := range ask.Idle {
		if _, ok := b.s.roster.get(name); ok && len(b.home.idle) < 2*homesPerBlob && name != b.s.self.Name {
			b.home.idle[name] = time.Now()
		}
	}
}

// idlers are the homes that others have lately waited for in vain.
func (m *meeting) idlers(now time.Time) (names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.idle, func(_ string, at time.Time) bool { return now.Sub(at) > lease })
	return slices.Collect(maps.Keys(m.idle))
}

// gather makes sure that the blob is here, on its way, or held by somebody.
func (s *Swarm) gather(ctx context.Context, b *blob, ask joinAsk, held bool) error {
	ours := func() error { // what is here may be the bytes of another registry
		if s.cfg.Store.Gives(b.d, ask.Registry) {
			return nil
		}
		return errForeign
	}
	// Others may have a way to the registry where this node has none.
	unreached := func() bool {
		return (ask.More || ask.Peek) && b.barren(time.Now()) && (b.standsAside() || !s.reaches(ask.Registry))
	}
	others := held && !ask.Stalled
	if b.keeps() {
		switch {
		case ask.Peek && !held && b.waits():
			return errNothing
		case !others && unreached():
			return errUnreached
		}
		return ours()
	}
	if b.whole() {
		return ours()
	}
	switch err := s.seedFromStore(b); {
	case err == nil:
		return ours()
	case errors.Is(err, errWrongBlob):
		return err // the store would serve it again: another home must fetch it
	}
	switch {
	case others:
		return nil
	case ask.Peek:
		return errNothing
	case unreached():
		return errUnreached
	}
	if err := b.recentFailure(); err != nil {
		return err
	}
	if err := s.cfg.Origin.Fill(ctx, ask.want(b)); err != nil {
		return fmt.Errorf("home %s: %w", s.self.Node, err)
	}
	return nil
}

// source reports whether all of the blob is here, even if still to be hashed, or is
// coming here from upstream.
func (b *blob) source() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.wholeLocked() || b.scanning || b.fill != nil && b.authority
}

// waits reports whether all this node has of the blob is hope: it fetches none
// of it from upstream and has no piece yet.
func (b *blob) waits() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.authority && b.haveN == 0
}

var errNothing = errors.New("nothing of it here")

// stay makes the asker a neighbour of the home while there is room. There is more
// room for other homes of the blob: one may have to help.
func (b *blob) stay(l *link) bool {
	room := homeDegree
	if b.s.mayBeHome(b.id.key, l.peer) {
		room = maxNeighbours
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.nbrs[l.peer]; !ok && len(b.nbrs) >= room {
		return false
	}
	return b.meetLocked(l) != nil
}

// inline returns the whole of a small blob that is here.
func (b *blob) inline() []byte {
	b.mu.Lock()
	size, whole := b.size, b.n == 1 && b.haveN == 1
	b.mu.Unlock()
	if size <= 0 || size > inlineMax || !whole {
		return nil
	}
	h, err := b.acquire()
	if err != nil {
		return nil
	}
	defer b.release(h)
	p := make([]byte, size)
	if m, _ := h.ReadAt(p, 0); int64(m) < size {
		return nil
	}
	return p
}

// awaitSize waits for the size to be known; for a blob that fits into the
// answer also for its bytes.
func (b *blob) awaitSize(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, sizeWait)
	defer cancel()
	select {
	case <-b.sizedCh:
	case <-ctx.Done():
	}
	if size := b.sized(); size > 0 && size <= inlineMax {
		b.awaitWhole(ctx)
	}
}

// awaitWhole waits until every piece can be given.
func (b *blob) awaitWhole(ctx context.Context) {
	for {
		grown := b.grown() // before the look: the piece may come in between
		if b.whole() {
			return
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return
		}
	}
}

// vouched is whose batches are to count for an asker, which may not have room for all: those that
// are in use come first, and then the holders that it is to meet.
func (b *blob) vouched(holders []string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	signed := b.signedLocked()
	first, last := []string{b.s.self.Name}, []string(nil)
	for n := range b.signers {
		switch {
		case slices.Contains(holders, n):
		case signed[n]:
			first = append(first, n)
		default:
			last = append(last, n)
		}
	}
	return slices.Concat(first, holders, last)
}

func (b *blob) active() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fill != nil
}

// keeps reports whether the blob is being fetched and will be here.
func (b *blob) keeps() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.keepsLocked()
}

func (b *blob) keepsLocked() bool { return b.fill != nil && b.ahead == 0 }

func (b *blob) offered() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.haveN
}

// whole reports whether every piece can be given.
func (b *blob) whole() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.wholeLocked()
}

func (b *blob) wholeLocked() bool { return b.n > 0 && b.haveN == b.n }

// recentFailure keeps a home whose fetch just failed from trying again for
// every node that asks.
func (b *blob) recentFailure() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if time.Since(b.failedAt) > failMemory {
		return nil
	}
	return b.failure
}

// permitAsk asks a home whether this node may fetch from upstream although it
// is not the home.
type permitAsk struct {
	Digest  string
	Attempt int `json:",omitempty"`
}

type permitReply struct{ Granted bool }

// permitted answers a node that wants to go upstream beside this one (I4). Its digests
// count from then on.
func (s *Swarm) permitted(l *link, ask permitAsk) (permitReply, error) {
	id, err := parseBlobID(ask.Digest, ask.Attempt)
	if err != nil {
		return permitReply{}, err
	}
	b, err := s.guestBlob(id)
	if err != nil {
		return permitReply{}, err
	}
	ok := b.home.permit(time.Now())
	if ok {
		b.vouch([]string{l.peer})
	}
	return permitReply{ok}, nil
}

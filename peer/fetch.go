package peer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// One fetch, from Fetch to its end. Three goroutines work on it, and all are gone when fetch
// returns: run, here and in upstream.go, finds a home or is one, and checks every lookAgain
// whether there is still progress; watch tells the blob what changed in the fill; exchange
// asks neighbours for pieces (picker.go). What neighbours send is written by the readers of
// their links (blob.received), and the three learn of it through blob.grown and blob.wake.

const (
	renewEvery  = lease / 3
	lookAgain   = 100 * time.Millisecond // how often a fetch looks at its own progress
	askHomeFor  = 2 * time.Second        // a home that takes longer to answer is silent
	stallRejoin = 2 * time.Second        // without progress: ask the home again, or the next one
	stallFetch  = 5 * time.Second        // without progress: fetch from upstream
	vouchWait   = 500 * time.Millisecond // between questions whose piece digests count
)

// Fetch completes a fill from the swarm. If this node is the blob's home, and nobody in
// the swarm has the blob, it fetches it with up; otherwise up is called only when neither
// peers nor homes make progress and a home permits it.
//
// It returns nil when every byte is in the fill (the caller then checks the whole
// digest), or else an error: why ctx ended; ErrNotRunning; ErrUnsupported; ErrDistrusted,
// ErrRefused, ErrStalled or what up returned, after which the caller should fetch what is
// missing from upstream by itself (I3); or ErrVoid, after which that would be in vain. A
// second Fetch of the same blob at the same time is an error. Once it has returned,
// nothing writes into the fill any more except at most one piece per link that was
// already under way.
func (s *Swarm) Fetch(ctx context.Context, w Want, f Fill, up Upstream) error {
	k, err := parseKey(w.Digest.String())
	if err != nil {
		return err
	}
	ctx, stop, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer stop()
	if k == sha256.Sum256(nil) {
		return f.SetSize(0) // nothing to give, and a size of 0 means unknown on the wire
	}
	for {
		attempt := s.attempt(k, w.Attempt)
		s.Void(w.Digest, attempt)
		if attempt > lastAttempt {
			return ErrDistrusted
		}
		w.Attempt = attempt
		f.Attempt(attempt)
		if err := s.fetch(ctx, w, s.blob(blobID{k, byte(attempt)}), f, up); !errors.Is(err, errBehind) {
			return err
		}
		w.Attempt++
	}
}

// fetch is one attempt.
func (s *Swarm) fetch(ctx context.Context, w Want, b *blob, f Fill, up Upstream) error {
	ctx, cancel := context.WithCancelCause(ctx)
	if err := b.begin(f, cancel, w.Ahead); err != nil {
		cancel(nil)
		return err
	}
	var tasks sync.WaitGroup
	tasks.Go(func() { b.watch(ctx, f) })
	tasks.Go(func() { b.exchange(ctx, f) })
	x := &fetch{s: s, b: b, w: w, f: f, up: up, tried: make(map[string]bool)}
	err := x.run(ctx)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	cancel(nil)
	tasks.Wait()
	b.end(err)
	if err != nil {
		return fmt.Errorf("swarm %s: %w", w.Digest, err)
	}
	if w.Ahead == 0 {
		s.spawn(b.settle)
	}
	return nil
}

// begin makes f the fill of the blob, and forgets what an earlier fetch left, except who
// signed what and what was given. errBehind: the attempt is void.
func (b *blob) begin(f Fill, stop context.CancelCauseFunc, ahead int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.fill != nil:
		return fmt.Errorf("fetch %s: already under way", b.d)
	case b.void:
		return errBehind
	}
	now := time.Now()
	b.fetchState = fetchState{fill: f, stop: stop, ahead: ahead, sources: make(map[string]int64), signs: signs{begun: now, came: now, heeded: now}}
	b.rotten = false
	b.emptyLocked()
	return nil
}

// end detaches the fill and gives up what is still asked for.
func (b *blob) end(err error) {
	b.mu.Lock()
	for _, rs := range b.wants {
		for _, r := range slices.Clone(rs) {
			b.giveUpLocked(r)
		}
	}
	kept := b.ahead == 0
	b.fill, b.stop, b.complete = nil, nil, err == nil && kept
	b.lastUse.set(time.Now())
	b.ahead, b.floor = 0, 0
	if err != nil && kept {
		b.failure, b.failedAt = err, time.Now()
	}
	b.mu.Unlock()
	if err != nil || !kept {
		b.withdraw()
	}
	b.letGo()
}

// settle waits for the store to commit the blob, and then offers all of it.
func (b *blob) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	life := b.lives()
	h, err := b.acquire()
	if err != nil {
		return
	}
	defer b.release(h)
	err = awaitPieces(ctx, h, b.n)
	for todo := range slices.Chunk(b.unsigned(), maxBatch) {
		if err == nil {
			err = b.sign(h, life, todo)
		}
	}
	if err == nil {
		err = b.offer(life, 0, b.n)
	}
	if err != nil {
		b.s.log.Debug("blob is not offered", "digest", b.d, "err", err)
	}
}

// awaitPieces waits until all pieces are in the store.
func awaitPieces(ctx context.Context, src Blob, n int) error {
	for {
		changed := src.Changed()
		if hasAll(src, n) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func hasAll(src Blob, n int) bool {
	for i := range n {
		if !src.Has(i) {
			return false
		}
	}
	return n > 0
}

// watch passes what changes in the fill on to the blob. Changed is asked for before the
// look: a piece may come in between.
func (b *blob) watch(ctx context.Context, f Fill) {
	for {
		changed := f.Changed()
		if err := b.scan(f); err != nil {
			b.s.log.Warn("piece digests cannot be made", "digest", b.d, "err", err)
		}
		b.moveCursor(f.Wanted())
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (b *blob) moveCursor(off int64) {
	b.mu.Lock()
	if b.size != 0 {
		at := min(max(int(off/b.pieceSize), 0), b.n-1)
		b.cursor = b.firstMissing(at)
		if b.ahead > 0 {
			b.floor = at
		}
	}
	b.mu.Unlock()
	b.poke()
}

// firstMissing is the first missing piece at or after i, or else of the blob.
func (b *blob) firstMissing(i int) int {
	for j := range b.n {
		if p := (i + j) % b.n; !b.here.has(p) {
			return p
		}
	}
	return 0
}

// exchange asks neighbours for pieces until ctx ends.
func (b *blob) exchange(ctx context.Context, f Fill) {
	for {
		select {
		case <-b.wake:
		case <-ctx.Done():
			return
		}
		if f.Size() < 0 {
			continue // it takes no piece yet, although an earlier fetch found the size out; watch wakes
		}
		b.mu.Lock()
		b.pump(time.Now())
		b.mu.Unlock()
	}
}

// fetch is one attempt of a Fetch. Only the goroutine of run changes it.
type fetch struct {
	s  *Swarm
	b  *blob
	w  Want
	f  Fill
	up Upstream

	joined   string // the home that answered
	joinedAt time.Time
	rejoined time.Time     // when it was asked last, whether it answered or not
	renew    time.Duration // how long the lease is left to itself
	homeLink *link         // while the home is a neighbour
	tried    map[string]bool
	late     <-chan peekAnswer // of the last peek
	yielded  bool              // to a source that answered late
	idle     []string          // of tried: said that they get the blob, and gave nothing
	left     []string          // of tried: have no way to the registry, and left it to others
	last     bool              // nobody else may have one: who is asked now keeps trying
	refused  error
	helping  *helping // the home; nil = not now
	helped   int64    // bytes, before
}

func (x *fetch) whole() bool {
	_, _, missing := x.f.Missing(0)
	return x.f.Size() >= 0 && !missing
}

// run finds the home, and goes on until the fill is whole.
func (x *fetch) run(ctx context.Context) error {
	defer x.endHelp()
	if size := x.f.Size(); size >= 0 {
		x.b.setSize(size)
	}
	for ctx.Err() == nil && !x.whole() {
		if err := x.step(ctx); err != nil && !x.whole() {
			return err
		}
	}
	if x.whole() {
		return nil // even if the fill, which has its last byte, ended ctx before this was noticed
	}
	return ctx.Err()
}

// step finds a home, or is one, and exchanges pieces until that has to change.
func (x *fetch) step(ctx context.Context) error {
	for _, name := range x.b.home.idlers(time.Now()) {
		x.tried[name] = true
	}
	x.standAside()
	for m := x.next(x.tried); m != nil; m = x.next(x.tried) {
		if m.Name == x.s.self.Name && x.w.Ahead > 0 {
			x.tried[m.Name] = true // the next home gets it
			continue
		}
		if m.Name == x.s.self.Name {
			err := x.asHome(ctx)
			if !errors.Is(err, errUnreached) {
				return err
			}
			x.passOver(m, err)
			continue
		}
		stop := x.s.ahead(m, x.route())
		err := x.join(ctx, m, false)
		stop()
		if err == nil {
			x.b.heed()
			return x.takePart(ctx)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		x.passOver(m, err)
	}
	if m := x.lastLeft(); m != nil && !x.last { // those it was left to have no way either, or are gone
		x.last = true
		delete(x.tried, m.Name)
		return nil
	}
	// Nobody else is left. A home that answered, but could not help, still
	// keeps count of who goes upstream.
	if !x.permit(ctx) {
		return x.refusal()
	}
	x.last = true
	return x.asHome(ctx)
}

// passOver notes why a home does not get the blob; the next one is asked.
func (x *fetch) passOver(m *Member, why error) {
	x.s.log.Debug("home did not help", "digest", x.w.Digest, "peer", m.Node, "err", why)
	x.tried[m.Name] = true
	if errors.Is(why, errUnreached) {
		x.left = append(x.left, m.Name)
	}
	x.refused = errors.Join(x.refused, why)
}

// refusal says that no home can get the blob, and why, if one said so.
func (x *fetch) refusal() error {
	if x.refused == nil {
		return ErrRefused
	}
	return fmt.Errorf("%w: %w", ErrRefused, x.refused)
}

// lastLeft is the last home that left the blob to others; nil if none did. All nodes
// arrive at the same one.
func (x *fetch) lastLeft() *Member {
	for _, m := range slices.Backward(x.homes()) {
		if slices.Contains(x.left, m.Name) {
			return m
		}
	}
	return nil
}

// next is the home to ask now; nil once those that count have been asked.
func (x *fetch) next(asked map[string]bool) *Member { return nextOf(x.route(), asked) }

// route lists the homes to ask, in order; this node itself, where it stands in the
// list, is the one that goes upstream. The homes of the zone come first; a zone's
// first home goes on to the cluster's (I4). Homes that are cut off from the registry
// are left out if somebody else is known to have a way.
func (x *fetch) route() []*Member { return x.s.around(x.homes(), x.b.id.key, x.w.Registry) }

func (x *fetch) homes() []*Member {
	r := x.s.roster
	zone := r.homes(x.b.id.key, x.s.cfg.Zone, true)
	if x.s.cfg.ZoneScope {
		return zone
	}
	if i := placeOf(zone, x.s.self.Name); i >= 0 {
		zone = zone[:i] // the cluster's may name this node again
	}
	return append(zone, r.homes(x.b.id.key, "", false)...)
}

// join asks a home, takes in what it says, and links with those it names.
func (x *fetch) join(ctx context.Context, m *Member, stalled bool) error {
	asked := time.Now()
	cctx, cancel := context.WithTimeout(ctx, askHomeFor)
	defer cancel()
	l, reply, err := x.askHome(cctx, m, joinAsk{Stalled: stalled, Peek: x.w.Held, Idle: x.idle})
	if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) && !x.merelyLate(err, m.Name, asked) {
		x.s.unreached(m.Name)
	}
	if err != nil {
		return err
	}
	if err := x.accept(m, l, reply); err != nil {
		return err
	}
	if x.w.Ahead == 0 {
		x.help(ctx, min(reply.Help, maxBlobSize)) // whatever the home says
	}
	return nil
}

// askHome sends ask, completed with what the blob is, and returns the answer of
// a home that can help.
func (x *fetch) askHome(ctx context.Context, m *Member, ask joinAsk) (l *link, reply joinReply, err error) {
	ask.Digest, ask.Registry, ask.Repository, ask.Manifest = x.w.Digest.String(), x.w.Registry, x.w.Repository, x.w.Manifest
	ask.Attempt, ask.Size = x.w.Attempt, x.w.Size
	ask.Authorization, ask.Node, ask.Have = x.w.Authorization, x.w.Node, x.b.held()
	if x.w.Ahead > 0 {
		ask.Have = 0 // for others
	}
	ask.Pass = !x.b.passFrom(m.Name, x.w.Registry)
	if !ask.Peek { // which other goroutines do, and may still when the fetch has gone on
		ask.More, ask.Helped = !x.last && x.more(m.Name, x.tried), x.fetched()
	}
	l, err = x.s.askMember(ctx, m, methodJoin, ask, &reply)
	x.takePass(m, reply.Pass)
	switch {
	case err == nil && reply.Attempt > x.w.Attempt:
		err = errBehind
		if reply.Attempt > lastAttempt {
			err = errNoMore
		}
		x.b.overtaken(true, reply.Attempt <= lastAttempt)
	case err == nil && reply.Refused != "":
		err = errors.New(reply.Refused)
		if reply.CutOff {
			x.s.cutOff(m.Name, x.w.Registry, reply.Ways)
			err = errUnreached
		}
	}
	return l, reply, err
}

// accept follows the answer of the home that this fetch goes by.
func (x *fetch) accept(m *Member, l *link, reply joinReply) error {
	met, err := x.follow(m, l, reply)
	if err != nil {
		return err
	}
	x.joined, x.joinedAt, x.homeLink = m.Name, time.Now(), nil
	if met {
		x.homeLink = l
	}
	return nil
}

// follow takes in what a home says, on any goroutine. met: the home is a neighbour.
func (x *fetch) follow(m *Member, l *link, reply joinReply) (met bool, err error) {
	if reply.Size != 0 {
		if reply.Size < 0 || reply.Size > maxBlobSize {
			x.s.ban(l, banProtocol)
			return false, fmt.Errorf("home says %d bytes", reply.Size)
		}
		if err := x.b.fix(x.f, reply.Size); err != nil {
			return false, fmt.Errorf("home %s: %w", m.Node, err)
		}
	}
	x.b.vouch(append(reply.Vouch[:min(len(reply.Vouch), maxSigners)], m.Name))
	x.b.admit(m.Name, x.w.Registry)
	if len(reply.Body) > 0 {
		return false, x.inline(l, reply.Body)
	}
	met = reply.Stay && x.b.meet(l)
	if reply.Moving {
		x.b.told(time.Now().Add(-stallRejoin/2), reply.Source)
	}
	for _, name := range reply.Meet[:min(len(reply.Meet), 4*introduce)] {
		x.s.spawn(func(ctx context.Context) { x.meet(ctx, name) })
	}
	return met, nil
}

var errOtherSize = errors.New("another size is known")

// fix takes a size that another node told. A fill that knows better keeps its
// own: giving a wrong one to SetSize would end it.
func (b *blob) fix(f Fill, size int64) error {
	if known := f.Size(); known >= 0 && known != size {
		return fmt.Errorf("says %d bytes, not %d: %w", size, known, errOtherSize)
	}
	if err := f.SetSize(size); err != nil {
		return err
	}
	if !b.setSize(size) {
		return fmt.Errorf("says %d bytes: %w", size, ErrUnsupported)
	}
	return nil
}

// meet links with a neighbour.
func (x *fetch) meet(ctx context.Context, name string) {
	m, ok := x.s.roster.get(name)
	if !ok || name == x.s.self.Name || !x.b.active() {
		return
	}
	if l, err := x.s.connect(ctx, m); err == nil {
		x.b.meet(l)
	}
}

// inline takes a small blob that came with the answer (inlineMax). It needs no signature:
// its digest proves it.
func (x *fetch) inline(l *link, body []byte) error {
	l.traffic.received.Add(int64(len(body)))
	if key(sha256.Sum256(body)) != x.b.id.key {
		x.s.ban(l, banDigest)
		return errWrongBlob
	}
	if err := x.b.fix(x.f, int64(len(body))); err != nil { // the home may have learned the size last
		return fmt.Errorf("home %s: %w", l.node, err)
	}
	_, err := x.f.From(l.node).WriteAt(body, 0)
	return err
}

// takePart waits while neighbours deliver. It returns nil when there is another
// step to take.
func (x *fetch) takePart(ctx context.Context) error {
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	x.rejoined, x.renew = time.Now(), renewEvery
	if x.s.mayBeHome(x.b.id.key, x.s.self.Name) {
		x.renew /= 2 // this node may be needed, see help
	}
	for !x.whole() {
		select {
		case <-x.b.grown():
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		now := time.Now()
		x.b.rest(now)
		o := x.b.outlook(now)
		idle := o.idle()
		switch {
		case o.talks():
			x.s.log.Debug("home gives nothing", "digest", x.w.Digest, "peer", x.joined)
			x.tried[x.joined], x.idle = true, append(x.idle, x.joined)
			return nil // the next home
		case o.quiet() > stallRejoin && slices.Contains(x.b.home.idlers(now), x.joined):
			return nil // others came here as to the next home
		case idle > stallFetch:
			return x.ownFetch(ctx, idle)
		}
		forsaken := x.b.forsaken(x.joinedAt)
		if forsaken || x.asksAgain(o) {
			x.rejoined = now
			if !x.rejoin(ctx, forsaken || idle > stallRejoin/2 || o.neighbours == 0) {
				return nil // the next home
			}
		}
	}
	return nil
}

// rest keeps time from counting as a stall when the reader of a fill that is not kept takes
// nothing and all that may be asked for is here.
func (b *blob) rest(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ahead == 0 || b.size == 0 {
		return
	}
	for i := b.floor; i < b.n && b.within(i); i++ {
		if !b.here.has(i) {
			return
		}
	}
	b.came = now
}

// asksAgain reports whether there is a reason to ask the home once more.
func (x *fetch) asksAgain(o outlook) bool {
	since := o.now.Sub(x.rejoined)
	switch {
	case o.now.Sub(x.joinedAt) > x.renew:
	case x.homeLink != nil && x.homeLink.over(): // it was a neighbour and is gone
	case x.b.home.doubt().After(x.joinedAt): // others came here as to the next home
	case o.idle() > stallRejoin && since > stallRejoin:
	case o.neighbours == 0 && since > lookAgain:
	case o.neighbours < fewNeighbours && since > time.Second:
	case since > vouchWait && x.b.unprovedAfter(x.rejoined):
	default:
		return false
	}
	return true
}

// unprovedAfter reports whether pieces have come since from somebody whom the home did
// not vouch for: it may have let him fetch from upstream meanwhile.
func (b *blob) unprovedAfter(t time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.unproved.After(t)
}

// rejoin renews the lease and asks for more neighbours; false if the home is one no longer.
func (x *fetch) rejoin(ctx context.Context, stalled bool) bool {
	m, ok := x.s.roster.get(x.joined)
	if !ok {
		return false
	}
	err := x.join(ctx, m, stalled)
	if err == nil || x.merelyLate(err, m.Name, x.rejoined) {
		return true
	}
	x.passOver(m, err)
	return false
}

// merelyLate reports whether a home that was asked then has not answered in time, but has
// been heard from, and pieces come. On a slow link an answer may take longer than
// askHomeFor; a node that then turned to the next home might itself be that, and fetch
// from upstream as well (in one of ten storms of 20 nodes at 20 Mbit/s, 1.1 to 1.3
// copies).
func (x *fetch) merelyLate(err error, home string, asked time.Time) bool {
	return errors.Is(err, context.DeadlineExceeded) && x.b.outlook(time.Now()).idle() < stallRejoin && x.s.heardSince(home, asked)
}

// held is how many pieces are here.
func (b *blob) held() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.n - b.missing
}

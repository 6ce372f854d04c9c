package peer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	renewEvery  = 10 * time.Second
	lookAgain   = 100 * time.Millisecond // how often a fetch looks at its own progress
	askHomeFor  = 2 * time.Second        // a home that takes longer to answer is silent
	stallRejoin = 2 * time.Second        // without progress: ask the home again, or the next one
	stallFetch  = 5 * time.Second        // without progress: fetch from upstream
	permitWait  = time.Second
	vouchWait   = 500 * time.Millisecond  // between questions whose piece digests count
	peekTime    = 1500 * time.Millisecond // a home waits so long for others that seem to be there before it goes upstream
	giveUpAfter = 20 * time.Second        // without progress and without a permit
	youngFor    = time.Hour               // a home that began before this node may still get a blob

	// A home's word that it gets bytes is as good as a byte for wordTime: a slow registry
	// is not a dead one, and a piece may take long behind a poor uplink. A home that has
	// given nothing by then cannot, or does not want to. The next one has to give
	// something before those who wait here have lost their patience, see Coming.
	wordTime = 30 * time.Second
	// sourceTime is the same for a home that waits for another one which gets the blob
	// already: it has to go upstream before those who wait for it turn to the next.
	sourceTime = wordTime / 2
)

// Fetch completes a fill from the swarm. If this node is the blob's home, and
// nobody in the swarm has the blob, it fetches it with up; else up is called
// only when neither peers nor homes make progress and a home permits it.
//
// It returns when every byte is in the fill (the caller then checks the whole
// digest), when ctx ends, or with an error; then the caller should fetch what
// is missing from upstream by itself. A second Fetch of the same blob at the
// same time is an error.
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
	if err := b.begin(f, cancel); err != nil {
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
	if err == nil {
		s.spawn(b.settle)
		return nil
	}
	return fmt.Errorf("swarm %s: %w", w.Digest, err)
}

// begin makes f the fill of the blob.
func (b *blob) begin(f Fill, stop context.CancelCauseFunc) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.fill != nil:
		return fmt.Errorf("fetch %s: already under way", b.d)
	case b.void:
		return errBehind
	}
	b.fill, b.stop, b.complete = f, stop, false
	b.authority, b.rotten = false, false
	b.failure = nil
	b.begun = time.Now()
	b.progress, b.heeded = b.begun, b.begun
	b.word, b.sourceWord = time.Time{}, time.Time{}
	b.pace = pace{}
	b.upSince, b.upBytes, b.helper = time.Time{}, 0, helper{}
	clear(b.sources)
	if b.size != 0 {
		b.here, b.have, b.missing, b.haveN = newBitmap(b.n), newBitmap(b.n), b.n, 0
		b.cursor, b.fresh, b.bare = 0, 0, nil
	}
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
	b.fill, b.stop, b.lastUse, b.complete = nil, nil, time.Now(), err == nil
	b.mu.Unlock()
	if err != nil {
		b.fail(err)
		b.withdraw()
	}
	b.letGo()
}

// settle waits for the store to commit the blob, and then offers all of it.
func (b *blob) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	h, err := b.acquire()
	if err != nil {
		return
	}
	defer b.release(h)
	err = awaitPieces(ctx, h, b.n)
	for todo := range slices.Chunk(b.unsigned(), maxBatch) {
		if err == nil {
			err = b.sign(todo)
		}
	}
	if err == nil {
		b.offer(0, b.n)
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

// watch brings what changes in the fill to the blob.
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
		b.cursor = b.firstMissing(min(max(int(off/b.pieceSize), 0), b.n-1))
	}
	b.mu.Unlock()
	b.poke()
}

// firstMissing is the first missing piece at or after i, or else of all.
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
		b.mu.Lock()
		b.pump(time.Now())
		b.mu.Unlock()
	}
}

// fetch is one call of Fetch.
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
	idle     []string // of tried: said that they get the blob, and gave nothing
	left     []string // of tried: have no way to the registry, and left it to others
	last     bool     // nobody else may have one: who is asked now keeps trying
	refused  error
	helping  *helping // the home; nil = not now
	helped   int64    // bytes, before
}

// Coming reports whether the blob is on its way here: bytes of it came within the
// last seconds, or a home said that it gets them, or waits for the registry's answer.
// Who waits for a byte of it does better to go on waiting than to ask the registry too.
// A home that is believed no longer was heard of a moment ago, and the next one may
// need as long to begin. Ours means that this node gets it from upstream for others.
func (s *Swarm) Coming(d digest.Digest) (coming, ours bool) {
	k, err := parseKey(d.String())
	if err != nil {
		return false, false
	}
	for attempt := range lastAttempt + 1 {
		s.ifBlob(blobID{k, byte(attempt)}, func(b *blob) { coming, ours = b.coming(time.Now()) })
		if coming {
			break
		}
	}
	return coming, ours
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

// step finds a home, or is one, and exchanges until that has to change.
func (x *fetch) step(ctx context.Context) error {
	for _, name := range x.b.home.idlers(time.Now()) {
		x.tried[name] = true
	}
	for m := x.next(x.tried); m != nil; m = x.next(x.tried) {
		if m.Name == x.s.self.Name {
			err := x.asHome(ctx)
			if !errors.Is(err, errUnreached) {
				return err
			}
			x.tried[m.Name], x.left = true, append(x.left, m.Name)
			x.refused = errors.Join(x.refused, err)
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
		x.s.log.Debug("home did not help", "digest", x.w.Digest, "peer", m.Node, "err", err)
		x.tried[m.Name] = true
		if errors.Is(err, errUnreached) {
			x.left = append(x.left, m.Name)
		}
		x.refused = errors.Join(x.refused, err)
	}
	if m := x.lastLeft(); m != nil && !x.last { // those it was left to have no way either, or are gone
		x.last = true
		delete(x.tried, m.Name)
		return nil
	}
	// Nobody else is left. A home that answered, but could not help, still
	// keeps count of who goes upstream.
	if !x.permit(ctx) {
		return fmt.Errorf("%w: %w", ErrRefused, x.refused)
	}
	x.last = true
	return x.asHome(ctx)
}

// lastLeft is the last home that left the blob to others; nil if none did. All nodes come
// to the same one.
func (x *fetch) lastLeft() *Member {
	for _, m := range slices.Backward(x.homes()) {
		if slices.Contains(x.left, m.Name) {
			return m
		}
	}
	return nil
}

// next is the home to ask now; nil once those that count were asked.
func (x *fetch) next(asked map[string]bool) *Member { return nextOf(x.route(), asked) }

// route lists the homes to ask, in order; this node itself, where it stands in
// the list, is the one that goes upstream. The homes of the zone come first; a
// zone's first home goes on to the cluster's (I4). Who is cut off from the registry is
// left out if somebody else is known to have a way.
func (x *fetch) route() []*Member { return x.s.around(x.homes(), x.b.k, x.w.Registry) }

func (x *fetch) homes() []*Member {
	r := x.s.roster
	zone := r.homes(x.b.k, x.s.cfg.Zone, true)
	if x.s.cfg.ZoneScope {
		return zone
	}
	for i, m := range zone {
		if m.Name == x.s.self.Name {
			// The zone's homes before this one, then the cluster's, which may
			// name this node again.
			return append(zone[:i:i], r.homes(x.b.k, "", false)...)
		}
	}
	return append(zone, r.homes(x.b.k, "", false)...)
}

// join asks a home, takes what it says, and links with whom it names.
func (x *fetch) join(ctx context.Context, m *Member, stalled bool) error {
	l, reply, err := x.askHome(ctx, m, joinAsk{Stalled: stalled, Peek: x.w.Held, Idle: x.idle})
	if err != nil {
		return err
	}
	if err := x.accept(ctx, m, l, reply); err != nil {
		return err
	}
	x.help(ctx, min(reply.Help, maxBlobSize)) // whatever the home says
	return nil
}

// askHome sends ask, completed with what the blob is, and returns the answer of
// a home that can help.
func (x *fetch) askHome(ctx context.Context, m *Member, ask joinAsk) (l *link, reply joinReply, err error) {
	ask.Digest, ask.Registry, ask.Repository, ask.Manifest = x.w.Digest.String(), x.w.Registry, x.w.Repository, x.w.Manifest
	ask.Attempt, ask.Size = x.w.Attempt, x.w.Size
	ask.Authorization, ask.Node, ask.Have = x.w.Authorization, x.w.Node, x.b.held()
	ask.Pass = !x.b.passFrom(m.Name, x.w.Registry)
	if !ask.Peek { // which other goroutines do, and may still when the fetch has gone on
		ask.More, ask.Helped = !x.last && x.more(m.Name, x.tried), x.fetched()
	}
	cctx, cancel := context.WithTimeout(ctx, askHomeFor)
	defer cancel()
	l, err = x.s.askMember(cctx, m, methodJoin, ask, &reply)
	x.takePass(m, reply.Pass)
	switch {
	case err == nil && reply.Attempt > x.w.Attempt && reply.Attempt <= lastAttempt:
		x.b.overtaken(true)
		err = errBehind
	case err == nil && reply.Refused != "":
		err = errors.New(reply.Refused)
		if reply.CutOff {
			x.s.cutOff(m.Name, x.w.Registry, reply.Ways)
			err = errUnreached
		}
	case ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded):
		x.s.unreached(m.Name)
	}
	return l, reply, err
}

// accept follows a home's answer.
func (x *fetch) accept(ctx context.Context, m *Member, l *link, reply joinReply) error {
	if reply.Size != 0 {
		if reply.Size < 0 || reply.Size > maxBlobSize {
			x.s.ban(l, banProtocol)
			return fmt.Errorf("home says %d bytes", reply.Size)
		}
		if err := x.b.fix(x.f, reply.Size); err != nil {
			return fmt.Errorf("home %s: %w", m.Node, err)
		}
	}
	x.b.vouch(append(reply.Vouch[:min(len(reply.Vouch), maxSigners)], m.Name))
	x.b.admit(m.Name, x.w.Registry)
	x.joined, x.joinedAt = m.Name, time.Now()
	if len(reply.Body) > 0 {
		return x.inline(l, reply.Body)
	}
	x.homeLink = nil
	if reply.Stay && x.b.meet(l) {
		x.homeLink = l
	}
	if reply.Moving {
		x.b.told(time.Now().Add(-stallRejoin/2), reply.Source)
	}
	for _, name := range reply.Meet[:min(len(reply.Meet), 4*introduce)] {
		x.s.spawn(func(ctx context.Context) { x.meet(ctx, name) })
	}
	return nil
}

// fix takes a size that another node told. A fill that knows better keeps its
// own: a wrong one given to SetSize would end it.
func (b *blob) fix(f Fill, size int64) error {
	if known := f.Size(); known >= 0 && known != size {
		return fmt.Errorf("says %d bytes, not %d", size, known)
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

// inline takes a small blob that came with the answer.
func (x *fetch) inline(l *link, body []byte) error {
	if key(sha256.Sum256(body)) != x.b.k {
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
	if x.s.mayBeHome(x.b.k, x.s.self.Name) {
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
		idle, neighbours := x.b.look(now)
		switch {
		case x.b.talks(now):
			x.s.log.Debug("home gives nothing", "digest", x.w.Digest, "peer", x.joined)
			x.tried[x.joined], x.idle = true, append(x.idle, x.joined)
			return nil // the next home
		case x.b.quiet(now) > stallRejoin && slices.Contains(x.b.home.idlers(now), x.joined):
			return nil // others came here as to the next home
		case idle > stallFetch:
			return x.ownFetch(ctx, idle)
		}
		forsaken := x.b.forsaken(x.joinedAt)
		if forsaken || x.asksAgain(now, idle, neighbours) {
			x.rejoined = now
			if err := x.rejoin(ctx, forsaken || idle > stallRejoin/2 || neighbours == 0); err != nil {
				return nil // the next home
			}
		}
	}
	return nil
}

// asksAgain reports whether there is a reason to ask the home once more.
func (x *fetch) asksAgain(now time.Time, idle time.Duration, neighbours int) bool {
	since := now.Sub(x.rejoined)
	switch {
	case now.Sub(x.joinedAt) > x.renew:
	case x.homeLink != nil && x.homeLink.over(): // it was a neighbour and is gone
	case x.b.home.doubt().After(x.joinedAt): // others came here as to the next home
	case idle > stallRejoin && since > stallRejoin:
	case neighbours == 0 && since > lookAgain:
	case neighbours < fewNeighbours && since > time.Second:
	case since > vouchWait && x.b.unprovedAfter(x.rejoined):
	default:
		return false
	}
	return true
}

// unprovedAfter reports whether pieces came since of somebody whom the home did not vouch
// for: it may have let him fetch from upstream meanwhile.
func (b *blob) unprovedAfter(t time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.unproved.After(t)
}

// rejoin renews the lease and asks for more neighbours.
func (x *fetch) rejoin(ctx context.Context, stalled bool) error {
	m, ok := x.s.roster.get(x.joined)
	if !ok {
		return errLinkClosed
	}
	err := x.join(ctx, m, stalled)
	if err != nil {
		x.tried[m.Name] = true
	}
	return err
}

// asHome fetches from upstream what nobody in the swarm has.
func (x *fetch) asHome(ctx context.Context) error {
	x.s.log.Debug("fetching as home", "digest", x.w.Digest, "peer", x.s.self.Node)
	if err := x.fromSwarm(ctx); err != nil || x.whole() {
		return err
	}
	x.b.home.mu.Lock()
	resumed := x.b.home.resumed
	x.b.home.mu.Unlock()
	if resumed {
		wait(ctx, resumeWait)
	}
	return x.upstream(ctx)
}

// fromSwarm tries, before upstream, those who may have the blob: holders that
// the index knows, and the other homes. One of these was the first home until
// this node came, or believes that it is; it knows what the index does not say
// yet (I4).
func (x *fetch) fromSwarm(ctx context.Context) error {
	begun := time.Now()
	holders := x.s.holders(x.b.k, x.s.cfg.Zone)
	x.b.vouch(holders)
	source, named := x.peek(ctx) // first: it brings the pass that holders want to see
	for _, name := range holders {
		x.s.spawn(func(ctx context.Context) { x.meet(ctx, name) })
	}
	holders = append(holders, named...)
	for peeked := time.Now(); ctx.Err() == nil && !x.whole(); wait(ctx, lookAgain) {
		// The index names the dead until gossip has noticed; the links already have.
		holders = slices.DeleteFunc(holders, x.s.roster.isGone)
		idle, _ := x.b.look(time.Now())
		if !source && len(holders) == 0 || x.b.forsaken(begun) {
			return nil
		}
		if min(idle, time.Since(peeked)) <= stallRejoin/2 {
			continue
		}
		if !source || idle > stallFetch || !x.b.trusts(time.Now()) {
			return nil
		}
		source, _ = x.peek(ctx) // it may be hashing what it has, or wait for upstream
		peeked = time.Now()
	}
	return ctx.Err()
}

// peek asks the other homes at the same time, and reports whether any of them
// has the blob or gets it from upstream, and who they say holds it. One that
// merely takes part becomes a neighbour, and Sink.Missing leaves out what it has.
func (x *fetch) peek(ctx context.Context) (source bool, holders []string) {
	ctx, cancel := context.WithTimeout(ctx, peekTime)
	defer cancel()
	type answer struct {
		m     *Member
		l     *link
		reply joinReply
		err   error
	}
	homes, ask := x.otherHomes(), joinAsk{Peek: true, Idle: x.idle}
	answers := make(chan answer, len(homes))
	for _, m := range homes {
		x.s.spawn(func(context.Context) {
			l, reply, err := x.askHome(ctx, m, ask)
			answers <- answer{m, l, reply, err}
		})
	}
	for range homes {
		select {
		case a := <-answers:
			if a.err == nil && x.accept(ctx, a.m, a.l, a.reply) == nil {
				source = source || a.reply.Source
				holders = append(holders, a.reply.Holders[:min(len(a.reply.Holders), namedHolders)]...)
			}
		case <-ctx.Done():
			return source, holders
		}
	}
	return source, holders
}

// otherHomes are the members that are, or lately were, homes of the blob.
func (x *fetch) otherHomes() (out []*Member) {
	homes := x.s.roster.homes(x.b.k, x.s.cfg.Zone, true)
	if !x.s.cfg.ZoneScope {
		homes = append(homes, x.s.roster.homes(x.b.k, "", false)...)
	}
	if epoch := x.s.self.Epoch; time.Since(time.UnixMilli(int64(epoch))) < youngFor {
		homes = append(homes, x.s.roster.elders(x.b.k, x.s.cfg.Zone, x.s.cfg.ZoneScope, epoch)...)
	}
	homes = append(homes, x.s.withWay(x.b.k, x.w.Registry)...)
	for _, m := range homes {
		known := slices.ContainsFunc(out, func(o *Member) bool { return o.Name == m.Name })
		if m.Name != x.s.self.Name && !known && !x.tried[m.Name] {
			out = append(out, m)
		}
	}
	return out
}

// upstream fetches until the fill is whole: first what no neighbour has, then,
// if neighbours do not deliver what they have, everything. It fails with errUnreached
// if it could not begin, and there is another home to do it.
func (x *fetch) upstream(ctx context.Context) error {
	x.endHelp()
	x.b.goesUp(true)
	asked, last := maps.Clone(x.tried), x.last
	leave := func() bool { return !last && x.b.barren(time.Now()) && x.more(x.s.self.Name, asked) }
	ctx, stop := x.s.whileReached(ctx, x.w.Registry, leave)
	defer stop()
	sink := &sink{x: x, w: x.f.From("")}
	for !x.whole() {
		err := ctx.Err()
		if err == nil {
			err = x.up(ctx, sink)
		}
		if err != nil && unreached(ctx) {
			x.b.goesUp(false)
			return errUnreached
		}
		if err != nil {
			if ctx.Err() == nil && !x.w.Held {
				x.s.doubt(x.w.Registry)
			}
			return err
		}
		if x.whole() {
			break
		}
		wait(ctx, lookAgain)
		idle, _ := x.b.look(time.Now())
		sink.all = idle > stallRejoin
	}
	return nil
}

// goesUp notes whether this node is to get the blob from upstream.
func (b *blob) goesUp(yes bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.authority, b.askedAt = yes, time.Time{}
}

// ownFetch goes upstream beside the home, if a home permits it or none answers.
func (x *fetch) ownFetch(ctx context.Context, idle time.Duration) error {
	if x.permit(ctx) {
		x.s.log.Info("swarm stalls, fetching from upstream", "digest", x.w.Digest)
		if err := x.upstream(ctx); !errors.Is(err, errUnreached) {
			return err
		}
	}
	if idle > giveUpAfter {
		return ErrStalled
	}
	wait(ctx, permitWait)
	return nil
}

func (x *fetch) permit(ctx context.Context) bool {
	if x.w.Held {
		return false
	}
	asked := make(map[string]bool)
	for m := x.next(asked); m != nil; m = x.next(asked) {
		asked[m.Name] = true
		if m.Name == x.s.self.Name {
			return x.b.home.permit(time.Now())
		}
		cctx, cancel := context.WithTimeout(ctx, permitWait)
		var reply permitReply
		_, err := x.s.askMember(cctx, m, methodPermit, permitAsk{x.w.Digest.String(), x.w.Attempt}, &reply)
		cancel()
		if err == nil {
			return reply.Granted
		}
	}
	return true
}

// held is how many pieces are here.
func (b *blob) held() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.n - b.missing
}

// look reports for how long nothing came, nor a home's word that is to be believed,
// and how many neighbours there are.
func (b *blob) look(now time.Time) (idle time.Duration, neighbours int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	last := b.cameLocked()
	if b.word.After(last) && b.believesLocked(now, last, wordTime) {
		last = b.word
	}
	return now.Sub(last), len(b.nbrs)
}

// quiet is for how long no byte came.
func (b *blob) quiet(now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return now.Sub(b.cameLocked())
}

// talks reports whether a home goes on to say that it gets bytes, and none comes.
func (b *blob) talks(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return now.Sub(b.word) < stallFetch && !b.believesLocked(now, b.cameLocked(), wordTime)
}

func (b *blob) coming(now time.Time) (coming, ours bool) {
	alone := len(b.s.roster.view.Load().all) == 1
	b.mu.Lock()
	defer b.mu.Unlock()
	last := b.cameLocked()
	if b.fill != nil && b.authority && !alone && b.triesLocked(now, last) {
		return true, true
	}
	if last.Equal(b.begun) {
		last = time.Time{} // no byte yet
	}
	if b.word.After(last) {
		last = b.word
	}
	return b.fill != nil && now.Sub(last) < stallFetch, b.authority
}

// triesLocked reports whether this node goes upstream with some hope, if the last bytes
// came then: it has asked, and registries that are caches themselves may take long to
// answer; or there was a byte, and it tries to go on where an uplink failed for a moment.
// A registry that cannot be reached in the first place has not been asked.
func (b *blob) triesLocked(now, last time.Time) bool {
	if last.Equal(b.begun) || b.askedAt.After(last) {
		last = b.askedAt
	}
	return b.authority && now.Sub(last) < wordTime
}

// cameLocked is when the last bytes came.
func (b *blob) cameLocked() time.Time {
	last := b.progress
	for _, rs := range b.wants {
		for _, r := range rs {
			if t := r.moved.get(); t.After(r.sent) && t.After(last) {
				last = t
			}
		}
	}
	return last
}

// believesLocked reports whether a home's word still counts that does for so long, if
// the last bytes came then.
func (b *blob) believesLocked(now, last time.Time, long time.Duration) bool {
	if b.heeded.After(last) {
		last = b.heeded
	}
	return now.Sub(last) < long
}

// trusts reports whether a source's word counts, for a home that waits for it.
func (b *blob) trusts(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.believesLocked(now, b.cameLocked(), sourceTime)
}

// told notes a home's word that it, or the source that it waits for, got bytes then.
func (b *blob) told(at time.Time, source bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.word = at
	if source {
		b.sourceWord = at
	}
}

// moves reports whether bytes of the blob came here lately, or a source said that they
// come there: a home that came later waits for the one before it, and who asks it has
// to know. The word of one that is no source goes no further, else two homes that wait
// for each other would believe each other for ever.
func (b *blob) moves(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	last := b.cameLocked()
	return b.fill != nil && (now.Sub(last) < stallRejoin || b.triesLocked(now, last) ||
		now.Sub(b.sourceWord) < 2*stallRejoin && b.believesLocked(now, last, sourceTime))
}

// heed begins to believe a home.
func (b *blob) heed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.heeded = time.Now()
}

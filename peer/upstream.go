package peer

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"
)

// How a node goes upstream: as home, after checking whether somebody has the blob or gets
// it already; or beside a home that does not deliver, by permit.

const (
	permitWait  = time.Second
	peekTime    = 1500 * time.Millisecond // a home waits so long for others that seem to be there before it goes upstream
	peekLast    = 10 * time.Second        // and hears them while it does
	peekAgain   = time.Second             // between attempts to reach one, whose network may have failed for a moment
	giveUpAfter = 20 * time.Second        // without progress, and without a permit or a registry
	youngFor    = time.Hour               // a home that began before this node may still get a blob
)

// asHome gets the blob for all who ask this node as its home. Where each zone fetches its own
// copy, holders in other zones are asked only if upstream fails: the line to them is the one
// to spare.
func (x *fetch) asHome(ctx context.Context) error {
	x.s.log.Debug("fetching as home", "digest", x.w.Digest, "peer", x.s.self.Node)
	if !x.s.cfg.ZoneScope || !x.s.cfg.Origin.Reaches(x.w.Registry) {
		return x.bring(ctx, true)
	}
	err := x.bring(ctx, false)
	if err == nil || ctx.Err() != nil || errors.Is(err, errUnreached) || len(x.s.holders(x.b.id.key, x.s.cfg.Zone, true)) == 0 {
		return err
	}
	x.b.goesUp(false)
	return x.bring(ctx, true)
}

// bring fetches from upstream what nobody in the swarm has, or nobody in the zone unless far.
func (x *fetch) bring(ctx context.Context, far bool) error {
	begun := time.Now()
	for {
		if err := x.fromSwarm(ctx, far); err != nil || x.whole() {
			return err
		}
		if !x.b.home.doubt().IsZero() {
			wait(ctx, resumeWait)
		}
		if err := x.upUnlessYielded(ctx, begun); !errors.Is(err, errYielded) {
			return err
		}
	}
}

var errYielded = errors.New("another home gets it already")

// upUnlessYielded is upstream while other homes are heard whose answers are late. If one of
// them is a source, it ends with errYielded: once, and if other homes have been told since
// begun that this one is, only for a better one. Else two could wait for each other.
func (x *fetch) upUnlessYielded(ctx context.Context, begun time.Time) error {
	uctx, cancel := context.WithCancelCause(ctx)
	may, source := !x.yielded, ""
	var hearing sync.WaitGroup
	hearing.Go(func() {
		for {
			select {
			case a := <-x.late:
				if x.heard(a) && a.reply.Source && may && (!x.b.home.reliedOn(begun) || x.isBetter(a.m)) {
					source = a.m.Name
					cancel(errYielded)
				}
			case <-uctx.Done():
				return
			}
		}
	})
	err := x.upstream(uctx)
	cancel(nil)
	hearing.Wait()
	if err == nil || source == "" || ctx.Err() != nil || x.whole() {
		return err
	}
	x.yielded = true
	delete(x.tried, source)
	if err := x.b.scan(x.f); err != nil { // while this node still signs what came from upstream
		x.s.log.Debug("what came from upstream is not signed", "digest", x.w.Digest, "err", err)
	}
	x.s.log.Debug("another home gets it already", "digest", x.w.Digest, "peer", source)
	x.b.goesUp(false)
	return errYielded
}

// isBetter reports whether a member comes before this node among the homes.
func (x *fetch) isBetter(m *Member) bool {
	homes := x.s.roster.view.Load().homes(x.b.id.key, "", false, nil)
	at, own := placeOf(homes, m.Name), placeOf(homes, x.s.self.Name)
	return at >= 0 && (own < 0 || at < own)
}

// fromSwarm tries, before upstream, those who may have the blob: holders that
// the index knows, and the other homes. One of these was the first home until
// this node came, or believes that it is; it knows what the index does not say
// yet (I4). Holders in other zones are asked only if far.
func (x *fetch) fromSwarm(ctx context.Context, far bool) error {
	begun := time.Now()
	holders := x.s.holders(x.b.id.key, x.s.cfg.Zone, far)
	x.b.vouch(holders)
	source, named := x.yielded, []string(nil)
	if !source {
		source, named = x.peek(ctx, far) // first: it brings the pass that holders want to see
	}
	for _, name := range holders {
		x.s.spawn(func(ctx context.Context) { x.meet(ctx, name) })
	}
	holders = append(holders, named...)
	for peeked := time.Now(); ctx.Err() == nil && !x.whole(); wait(ctx, lookAgain) {
		// The index names the dead until gossip has noticed; the links already have.
		holders = slices.DeleteFunc(holders, x.s.roster.isGone)
		o := x.b.outlook(time.Now())
		if !source && len(holders) == 0 || x.b.forsaken(begun) {
			return nil
		}
		if min(o.idle(), time.Since(peeked)) <= stallRejoin/2 {
			continue
		}
		if !source || o.idle() > stallFetch || !o.trusts() {
			return nil
		}
		source, _ = x.peek(ctx, far) // it may be hashing what it has, or wait for upstream
		peeked = time.Now()
	}
	return ctx.Err()
}

// peekAnswer is what a home said to a peek.
type peekAnswer struct {
	m     *Member
	l     *link
	reply joinReply
	err   error
}

// heard takes in what a home said to a peek; false if it has nothing.
func (x *fetch) heard(a peekAnswer) bool {
	if a.err != nil {
		return false
	}
	_, err := x.follow(a.m, a.l, a.reply)
	return err == nil
}

// peek asks the other homes at the same time. It reports whether any of them has
// the blob or gets it from upstream, and which members they say hold it. One that
// merely takes part becomes a neighbour, and Sink.Missing leaves out what it has.
// It does not wait for homes that were passed over: they seem to be gone, though they may
// only be slow.
func (x *fetch) peek(ctx context.Context, far bool) (source bool, holders []string) {
	homes, ask := x.otherHomes(far), joinAsk{Peek: true, Idle: x.idle}
	all := append(slices.Clone(homes), x.passedOver(homes, far)...)
	answers := make(chan peekAnswer, len(all))
	for _, m := range all {
		x.s.spawn(func(context.Context) {
			ctx, cancel := context.WithTimeout(ctx, peekLast)
			defer cancel()
			for {
				l, reply, err := x.askHome(ctx, m, ask)
				select {
				case answers <- peekAnswer{m, l, reply, err}:
				case <-ctx.Done():
				}
				if l != nil || !x.b.active() || ctx.Err() != nil {
					return
				}
				wait(ctx, peekAgain)
			}
		})
	}
	x.late = answers
	soon, cancel := context.WithTimeout(ctx, peekTime)
	defer cancel()
	for len(homes) > 0 {
		select {
		case a := <-answers:
			if x.heard(a) {
				source = source || a.reply.Source
				holders = append(holders, a.reply.Holders[:min(len(a.reply.Holders), namedHolders)]...)
			}
			homes = slices.DeleteFunc(homes, func(m *Member) bool { return m == a.m })
		case <-soon.Done():
			return source, holders
		}
	}
	return source, holders
}

// otherHomes are the members that are, or lately were, homes of the blob; of all zones if far:
// in a zone of one node nobody else could give it a pass.
func (x *fetch) otherHomes(far bool) (out []*Member) {
	homes := x.s.roster.homes(x.b.id.key, x.s.cfg.Zone, true)
	if far {
		homes = append(homes, x.s.roster.homes(x.b.id.key, "", false)...)
	}
	if epoch := x.s.self.Epoch; time.Since(time.UnixMilli(int64(epoch))) < youngFor {
		homes = append(homes, x.s.roster.elders(x.b.id.key, x.s.cfg.Zone, x.s.cfg.ZoneScope, epoch)...)
	}
	homes = append(homes, x.s.withWay(x.b.id.key, x.w.Registry)...)
	for _, m := range homes {
		if m.Name != x.s.self.Name && placeOf(out, m.Name) < 0 && !x.tried[m.Name] {
			out = append(out, m)
		}
	}
	return out
}

// passedOver are the homes beside others that did not answer or help, or could not be reached
// a moment ago; not those that said they get the blob, and gave nothing, or have no way to it.
func (x *fetch) passedOver(others []*Member, far bool) (out []*Member) {
	idle := make(map[string]bool)
	for _, name := range slices.Concat(x.b.home.idlers(time.Now()), x.idle, x.left) {
		idle[name] = true
	}
	v := x.s.roster.view.Load()
	homes := v.homes(x.b.id.key, x.s.cfg.Zone, true, idle)
	if far {
		homes = append(homes, v.homes(x.b.id.key, "", false, idle)...)
	}
	for _, m := range homes {
		if m.Name != x.s.self.Name && placeOf(others, m.Name) < 0 && placeOf(out, m.Name) < 0 {
			out = append(out, m)
		}
	}
	return out
}

// upstream fetches until the fill is whole: what no neighbour has, and while neighbours
// do not deliver what they have, everything. It fails with errUnreached if it could not
// begin, and there is another home to do it.
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
			if ctx.Err() != nil || !x.b.promised(time.Now()) {
				return err
			}
			x.s.log.Debug("no help from upstream, waiting for neighbours", "digest", x.w.Digest, "err", err)
			wait(ctx, permitWait)
			continue
		}
		if x.whole() {
			break
		}
		wait(ctx, lookAgain)
	}
	return nil
}

// promised reports whether neighbours hold or send all that is missing, and may still give
// it: as long as they have pieces of large blobs that they never gave, they turn away
// nodes that ask for the last pieces of a small one.
func (b *blob) promised(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.owedLocked() && b.outlookLocked(now).quiet() < giveUpAfter
}

// goesUp notes whether this node is to get the blob from upstream.
func (b *blob) goesUp(yes bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.authority, b.asked = yes, time.Time{}
}

// ownFetch goes upstream beside the home, if a home permits it or none answers.
func (x *fetch) ownFetch(ctx context.Context, idle time.Duration) error {
	if x.w.Ahead > 0 {
		return ErrStalled
	}
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

// permit asks for leave to go upstream beside the home: the first home that answers decides; if
// none does, this node may. A fetch that keeps nothing, or wants only what others have, never may.
func (x *fetch) permit(ctx context.Context) bool {
	if x.w.Held || x.w.Ahead > 0 {
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

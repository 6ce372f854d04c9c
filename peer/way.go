package peer

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Where only some members have a way to a registry, none of a blob's homes may have one. So
// a member without a way looks for others that have one. These say so in the index, like
// holders of a blob, and stand in for the homes that are cut off: the best of them by rank,
// so that all nodes turn to the same ones. In a cluster where everybody always had a way
// nobody asks, and the index knows nothing of it. An entry stays until its node fails to
// reach the registry, or was not asked for a day: a member that is cut off and pulls keeps
// asking one of those listed now and then. So the more are cut off, the more stay listed,
// and the last one stays while anybody is.

const (
	wayAgain  = 10 * time.Second // a node that is cut off looks for a way no more often,
	wayRarely = 2 * time.Minute  // and up to this, twice as long each time, if nobody has one
	wayCheck  = 2 * time.Second  // if somebody has, it looks so often whether that is still so
	wayRenew  = time.Minute      // and asks one of those that it knows so often, which then stay listed
	wayKept   = 24 * time.Hour   // since somebody asked; many clusters pull little but once a day
	wayTime   = 3 * time.Second  // for one member to try, less than questionTime, so that it can still say that it was in vain
	wayAsked  = 64               // members that are asked each time
	wayAtOnce = 8                // of them, at the same time
	keepCut   = keepDown         // a member that said it is cut off is passed over; it says so at once
	keepTold  = 30 * time.Second // whom it named instead counts; by then the index knows
	maxCut    = 4096
	maxWays   = 256 // registries
)

// ways is what this node knows about who reaches which registry, and whether two get more than one.
type ways struct {
	mu     sync.Mutex           // guards the following
	cut    map[access]time.Time // other members without a way, until when
	sure   map[string]bool      // registries that this node reached when it tried, and did not fail to reach since
	ours   map[string]time.Time // those of which it has told others, and when one of them asked last
	sought map[string]seeking   // by registry
	told   map[string]hearsay   // by registry
	vain   map[string]time.Time // registries from which two nodes got no more than one, and when
}

// hearsay is who has a way to a registry, according to a member that has none.
type hearsay struct {
	names []string
	until time.Time // that counts
}

// access is a member's to a registry; member is its name.
type access struct{ member, registry string }

// seeking is when this node may look again for a way to a registry.
type seeking struct {
	pause   time.Duration
	next    time.Time
	renewed time.Time // when it asked a member last that it knew to have one
}

func newWays() *ways {
	return &ways{cut: make(map[access]time.Time), sure: make(map[string]bool), ours: make(map[string]time.Time),
		sought: make(map[string]seeking), told: make(map[string]hearsay), vain: make(map[string]time.Time)}
}

// wayTo is what the index calls a way to a registry.
func wayTo(registry string) uint64 {
	return prefixOf(sha256.Sum256([]byte("larder way\x00" + registry)))
}

// reaches reports, at once, whether this node should try the registry for those who
// wait. Where others are known to have a way, it has to be sure of its own: finding
// out that an answer does not come takes longer than asking them. If it should not
// try, it looks for a way in the background.
func (s *Swarm) reaches(registry string) bool {
	switch {
	case !s.cfg.Origin.Reaches(registry):
		s.loseWay(registry)
	case s.ways.isSure(registry), len(s.withWay(key{}, registry)) == 0:
		return true
	}
	s.doubt(registry)
	return false
}

// doubt makes this node check, in the background, whether it reaches a registry, and if
// not, who does. It is called after any failure there, whatever the reason: a firewall may
// refuse connections in the registry's name.
func (s *Swarm) doubt(registry string) {
	if s.ways.maySeek(registry, time.Now()) {
		s.spawn(func(ctx context.Context) { s.seekWay(ctx, registry) })
	}
}

func (w *ways) isSure(registry string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sure[registry] || w.givesLocked(registry)
}

// givesLocked reports whether this node has told others that it has a way.
func (w *ways) givesLocked(registry string) bool { return !w.ours[registry].IsZero() }

// loseWay takes back what this node said of its way to a registry.
func (s *Swarm) loseWay(registry string) {
	w := s.ways
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.sure, registry)
	s.takeBackLocked(registry)
}

func (s *Swarm) takeBackLocked(registry string) {
	if s.ways.givesLocked(registry) {
		delete(s.ways.ours, registry)
		s.index.drop(wayTo(registry))
	}
}

// tendWays takes back the ways that nobody has asked about for long.
func (s *Swarm) tendWays(now time.Time) {
	w := s.ways
	w.mu.Lock()
	defer w.mu.Unlock()
	for registry, asked := range w.ours {
		if now.Sub(asked) > wayKept {
			s.takeBackLocked(registry)
		}
	}
}

// cutOff notes that another member does not reach a registry, and who does according to
// its index: that of a node that has just started does not know yet.
func (s *Swarm) cutOff(member, registry string, others []string) {
	w := s.ways
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if len(w.cut) >= maxCut {
		maps.DeleteFunc(w.cut, func(_ access, until time.Time) bool { return now.After(until) })
	}
	if len(w.cut) < maxCut && member != s.self.Name {
		w.cut[access{member, registry}] = now.Add(keepCut)
	}
	maps.DeleteFunc(w.told, func(_ string, h hearsay) bool { return now.After(h.until) })
	if h, ok := w.told[registry]; ok { // what a member says of itself outlasts hearsay
		h.names = slices.DeleteFunc(h.names, func(name string) bool { return name == member })
		w.told[registry] = h
	}
	var names []string
	for _, name := range others[:min(len(others), homesPerBlob)] {
		if m, live := s.roster.get(name); live && name != s.self.Name && !now.Before(w.cut[access{name, registry}]) {
			names = append(names, m.Name)
		}
	}
	if len(names) > 0 && len(w.told) < maxWays {
		w.told[registry] = hearsay{names, now.Add(keepTold)}
	}
}

// listed is who has a way to a registry by the index, as far as not found to have lost
// it: named to a node that asked this one in vain. Hearsay goes no further, or two nodes
// could tell it to each other forever.
func (s *Swarm) listed(registry string) []string {
	names := s.index.holders(wayTo(registry), s.cfg.Zone, maxHolders)
	names = slices.DeleteFunc(names, func(name string) bool { return s.roster.isGone(name) || s.isCut(name, registry) })
	return names[:min(len(names), homesPerBlob)]
}

// isCut reports whether a member should not be asked to try a registry while another
// one has a way.
func (s *Swarm) isCut(member, registry string) bool {
	if member == s.self.Name {
		return !s.reaches(registry)
	}
	s.ways.mu.Lock()
	defer s.ways.mu.Unlock()
	return time.Now().Before(s.ways.cut[access{member, registry}])
}

// maySeek reports whether it is time to look for a way, and notes that this is
// done.
func (w *ways) maySeek(registry string, now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	k, known := w.sought[registry]
	if now.Before(k.next) {
		return false
	}
	if !known && len(w.sought) >= maxWays {
		maps.DeleteFunc(w.sought, func(_ string, k seeking) bool { return now.After(k.next) })
		if len(w.sought) >= maxWays {
			return false
		}
	}
	if now.Sub(k.next) > wayRarely { // nobody needed one for long
		k.pause = 0
	}
	k.pause = min(max(2*k.pause, wayAgain), wayRarely)
	k.next = now.Add(k.pause)
	w.sought[registry] = k
	return true
}

// found says that somebody has a way, if only this node.
func (w *ways) found(registry string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sought[registry] = seeking{next: time.Now().Add(wayCheck), renewed: w.sought[registry].renewed}
}

// mayRenew reports whether it is time to ask a member that is known to have a way, and
// notes that this is done.
func (w *ways) mayRenew(registry string, now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	k := w.sought[registry]
	if now.Sub(k.renewed) < wayRenew {
		return false
	}
	k.renewed = now
	w.sought[registry] = k
	return true
}

// around puts members that have a way to the registry in the place of homes that
// have none. Where nobody is known to have one, the homes stay.
func (s *Swarm) around(homes []*Member, k key, registry string) []*Member {
	stand := s.withWay(k, registry)
	if len(stand) == 0 {
		return homes
	}
	homes = slices.DeleteFunc(slices.Clone(homes), func(m *Member) bool { return s.isCut(m.Name, registry) })
	return append(homes, stand...)
}

// withWay is who has a way to the registry, by the index or hearsay, in the order in which
// they stand in for homes of k.
func (s *Swarm) withWay(k key, registry string) (out []*Member) {
	w := s.ways
	names := s.index.holders(wayTo(registry), s.cfg.Zone, maxHolders)
	w.mu.Lock()
	if w.givesLocked(registry) {
		names = append(names, s.self.Name)
	}
	now := time.Now()
	if h := w.told[registry]; now.Before(h.until) {
		names = slices.Concat(names, h.names)
		slices.Sort(names)
		names = slices.Compact(names)
	}
	names = slices.DeleteFunc(names, func(name string) bool { return now.Before(w.cut[access{name, registry}]) })
	w.mu.Unlock()
	for _, name := range names {
		if m, live := s.roster.get(name); live && m.Home && !s.roster.isDown(name) {
			out = append(out, m)
		}
	}
	seed := binary.BigEndian.Uint64(k[:])
	far := func(m *Member) int {
		if s.cfg.ZoneScope && m.Zone != s.cfg.Zone { // a site's own line first
			return 1
		}
		return 0
	}
	slices.SortFunc(out, func(a, b *Member) int {
		return cmp.Or(cmp.Compare(far(a), far(b)), cmp.Compare(mix(seed^b.rank), mix(seed^a.rank)))
	})
	return out[:min(len(out), homesPerBlob)]
}

// seekWay checks whether this node reaches the registry and, if not and nobody is
// known who does, asks others.
func (s *Swarm) seekWay(ctx context.Context, registry string) {
	reached := s.cfg.Origin.Reaches(registry) && s.tryWay(ctx, registry) == nil
	if !reached {
		s.loseWay(registry)
	}
	var by key
	binary.BigEndian.PutUint64(by[:], rand.Uint64())
	known := s.withWay(by, registry)
	if reached || len(known) > 0 || s.askWay(ctx, registry) {
		s.ways.found(registry)
	}
	if !reached && len(known) > 0 && s.ways.mayRenew(registry, time.Now()) {
		s.askOneWay(ctx, known[0], registry)
	}
}

// askWay asks others until one has a way to the registry, leaving those that had
// none a moment ago for last. A member that has one tells all; see giveWay.
func (s *Swarm) askWay(ctx context.Context, registry string) bool {
	var members, cut []*Member
	all := s.roster.view.Load().all
	for _, i := range rand.Perm(len(all)) {
		switch m := all[i]; {
		case m.Name == s.self.Name || !m.Home || s.roster.isDown(m.Name):
		case s.isCut(m.Name, registry):
			cut = append(cut, m)
		default:
			members = append(members, m)
		}
	}
	members = append(members, cut...)
	var found atomic.Bool
	for some := range slices.Chunk(members[:min(len(members), wayAsked)], wayAtOnce) {
		var asked sync.WaitGroup
		for _, m := range some {
			asked.Go(func() {
				if s.askOneWay(ctx, m, registry) {
					found.Store(true)
				}
			})
		}
		asked.Wait()
		if found.Load() || ctx.Err() != nil {
			break
		}
	}
	return found.Load()
}

func (s *Swarm) askOneWay(ctx context.Context, m *Member, registry string) bool {
	_, err := s.put(ctx, m, methodWay, Reference{Registry: registry, Memory: true})
	s.log.Debug("asked for a way to the registry", "registry", registry, "peer", m.Node, "err", err)
	return err == nil
}

// tryWay tries to reach the registry.
func (s *Swarm) tryWay(ctx context.Context, registry string) error {
	ctx, cancel := context.WithTimeout(ctx, wayTime)
	defer cancel()
	if err := s.cfg.Origin.Connect(ctx, registry); err != nil {
		return err
	}
	w := s.ways
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.sure[registry] && len(w.sure) >= maxWays { // what is forgotten is tried once more
		for other := range w.sure {
			delete(w.sure, other)
			break
		}
	}
	w.sure[registry] = true
	return nil
}

// giveWay tries to reach the registry for a member that does not; if it
// succeeds, all may know.
func (s *Swarm) giveWay(ctx context.Context, registry string) error {
	if !s.self.Home {
		return errNothing
	}
	if err := s.tryWay(ctx, registry); err != nil {
		return fmt.Errorf("%w: %w", errUnreached, err)
	}
	w := s.ways
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.ours) < maxWays || w.givesLocked(registry) {
		w.ours[registry] = time.Now()
		s.index.hold(wayTo(registry))
	}
	return nil
}

package peer

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// How a node finds the others: it knocks at the addresses that Config.Join leads to, for
// as long as it runs.

const (
	rejoinEvery  = 20 * time.Second // with some chance added
	rejoinFirst  = time.Second      // doubling up to rejoinEvery
	rejoinAtOnce = 2                // unknown addresses tried each time
	// How often gossip tells of a member follows from how many are known, so of those that
	// start together somebody may not hear until a full exchange up to 30 s later: one time in
	// ten in a cluster of fewer than fewMembers, and 1 of 20 that started at once. So a node
	// exchanges all it knows in its first rounds, with each of the few or with some of the many.
	fewMembers    = 10
	greetAtOnce   = 2 // of the many
	greetRounds   = 3 // of rejoin; the third is 3 to 6 s after the start
	aloneRounds   = 4 // of rejoin without any other member are told of: 7 to 14 s after the start
	lookupTimeout = 5 * time.Second
)

// rejoin tries addresses that are no members, again and again: DNS changes, and
// a healed partition stays split unless somebody knocks.
func (g *gossip) rejoin(ctx context.Context) {
	pause := rejoinFirst
	for round := 0; ctx.Err() == nil; round++ {
		names, unresolved := g.s.resolve(ctx)
		addrs := g.unknown(names)
		rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
		unanswered := g.knock(ctx, addrs[:min(len(addrs), rejoinAtOnce)])
		if round == 0 {
			close(g.tried)
		}
		g.noteAlone(cmp.Or(unanswered, unresolved))
		if round < greetRounds {
			_ = g.knock(ctx, g.greet()) // of members, which does not make this node one without
		}
		wait(ctx, pause+rand.N(pause))
		pause = min(2*pause, rejoinEvery)
	}
}

// knock exchanges all that is known of the members with each address, and returns why
// one of them did not.
func (g *gossip) knock(ctx context.Context, addrs []string) (failed error) {
	for _, a := range addrs {
		if ctx.Err() != nil {
			return nil
		}
		if _, err := g.list.Join([]string{a}); err != nil {
			g.s.log.Debug("nobody joined", "peer", a, "err", err)
			failed = cmp.Or(errors.Unwrap(err), err) // of one address, without the list around it
		}
	}
	return failed
}

// noteAlone keeps why a node that is to have peers has none: by itself that is no fault, and
// only who set it up can tell. Others may have yet to start, or start anew.
func (g *gossip) noteAlone(why error) {
	g.mu.Lock()
	if why == nil || len(g.addrs) > 1 {
		g.alone, g.aloneFor = nil, 0
	} else {
		g.alone, g.aloneFor = why, g.aloneFor+1
	}
	tell := g.aloneFor == aloneRounds
	g.mu.Unlock()
	if tell {
		g.s.log.Warn("no other node answers; this one fetches all from the registries", "err", why)
	}
}

// whyAlone is what keeps this node from having peers, nil if it has some or is to have none.
func (g *gossip) whyAlone() error {
	if g == nil { // a test without
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.addrs) > 1 || g.aloneFor < aloneRounds {
		return nil
	}
	return g.alone
}

// greet is the addresses of all other members, if they are few, or of some.
func (g *gossip) greet() (addrs []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for name, a := range g.addrs { // in an order of chance
		if len(g.addrs) >= fewMembers && len(addrs) == greetAtOnce {
			break
		}
		if name != g.s.self.Name {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// unknown is the addresses of each name that no member announces. A member announces one
// address and a name may have two for it: if all of one family belong to members, so do
// those of the other family.
func (g *gossip) unknown(names [][]string) (out []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	known := slices.Collect(maps.Values(g.addrs))
	for _, addrs := range names {
		var members, strangers [2][]string // by family
		for _, a := range addrs {
			of := &strangers
			if slices.Contains(known, a) {
				of = &members
			}
			family := strings.Count(a, "[") // 1 in [IPv6]:port
			of[family] = append(of[family], a)
		}
		for family, some := range strangers {
			if other := 1 - family; len(members[other]) == 0 || len(strangers[other]) > 0 {
				out = append(out, some...)
			}
		}
	}
	return out
}

// resolve turns each name in Join into addresses; err is about one that has none. Names are looked
// up at the same time: one whose server is dead takes all the time there is.
func (s *Swarm) resolve(ctx context.Context) (found [][]string, unresolved error) {
	_, port, _ := net.SplitHostPort(s.cfg.Gossip)
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	found = make([][]string, len(s.cfg.Join))
	errs := make([]error, len(s.cfg.Join))
	var names sync.WaitGroup
	for i, j := range s.cfg.Join {
		host, p, err := net.SplitHostPort(j)
		if err != nil {
			host, p = j, port
		}
		names.Go(func() { found[i], errs[i] = s.lookUp(ctx, host, p) })
	}
	names.Wait()
	return found, cmp.Or(errs...)
}

func (s *Swarm) lookUp(ctx context.Context, host, port string) (addrs []string, err error) {
	ips, err := s.resolver.LookupIPAddr(ctx, host)
	if err != nil {
		s.log.Debug("name of peers does not resolve", "peer", host, "err", err)
	}
	for _, ip := range ips {
		addrs = append(addrs, net.JoinHostPort(ip.IP.String(), port))
	}
	return addrs, err
}

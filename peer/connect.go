package peer

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"
)

// How links come and go: dial or welcome makes one, by a handshake in which each side proves who
// it is (I1); attach makes it the only link with its peer; serve runs it and cleans up after it.

// dialing is a link that several callers may wait for.
type dialing struct {
	done chan struct{} // closed once l or err is set
	l    *link
	err  error
}

// accept takes links from others.
func (s *Swarm) accept(ctx context.Context) {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				s.log.Warn("peers cannot be accepted", "err", err)
				wait(ctx, 100*time.Millisecond)
				continue
			}
			return
		}
		select {
		case s.strangers <- struct{}{}: // else the kernel's queue holds them back
		case <-ctx.Done():
			conn.Close()
			return
		}
		s.tasks.Go(func() { s.welcome(ctx, conn) }) // after Run's end too, which closes it
	}
}

// wait sleeps, unless ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// maxStrangers bounds connections that have not said who they are; each has
// helloTime to do so.
const maxStrangers = 512

var errGaveUp = errors.New("who dialed did not wait")

// welcome finds out who dialed and serves the link until it ends.
func (s *Swarm) welcome(ctx context.Context, raw net.Conn) {
	var m Member
	conn, err := raw, errGaveUp
	if !gaveUp(raw) { // else a home that is late would be later for those who still wait
		conn, m, err = s.greet(ctx, raw)
	}
	<-s.strangers
	if err != nil {
		raw.Close()
		s.log.Debug("connection refused", "peer", raw.RemoteAddr(), "err", err)
		return
	}
	l := newLink(s, conn, m, false)
	if err := s.attach(l); err != nil {
		l.close(err)
		return
	}
	s.serve(l)
}

// greet does the handshake of the accepting side. A stranger gets a TLS alert
// and nothing else (I1).
func (s *Swarm) greet(ctx context.Context, raw net.Conn) (net.Conn, Member, error) {
	ctx, cancel := context.WithTimeout(ctx, helloTime)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	conn := raw
	var name string
	var pub ed25519.PublicKey
	if s.trust != nil {
		tc := tls.Server(&recordConn{Conn: raw}, s.trust.config())
		if err := tc.HandshakeContext(ctx); err != nil {
			return nil, Member{}, fmt.Errorf("handshake: %w", err)
		}
		var err error
		if name, pub, err = identity(tc); err != nil {
			return nil, Member{}, err
		}
		conn = tc
	}
	h, err := readHello(conn)
	if err != nil {
		return nil, Member{}, err
	}
	m, err := s.identified(h, name, pub)
	return conn, m, err
}

// identified is the member behind a hello, checked against its certificate and
// against what gossip says.
func (s *Swarm) identified(h hello, name string, pub ed25519.PublicKey) (Member, error) {
	if s.trust != nil && h.name != name {
		return Member{}, errNotMember
	}
	node, epoch, ok := cutStart(h.name)
	if !ok || h.name == s.self.Name {
		return Member{}, errNotMember
	}
	if s.bans.has(node) {
		return Member{}, errBanned
	}
	m := Member{Name: h.name, Node: node, Zone: h.zone, Epoch: epoch, Key: pub}
	if known, ok := s.roster.get(h.name); ok {
		if s.trust != nil && !known.Key.Equal(pub) {
			return Member{}, errNotMember
		}
		m = *known
	}
	return m, nil
}

func readHello(c net.Conn) (hello, error) {
	var b [frameHeader + 1 + 2*(1+maxName)]byte
	if _, err := io.ReadFull(c, b[:frameHeader]); err != nil {
		return hello{}, err
	}
	t, n, err := parseHeader([frameHeader]byte(b[:frameHeader]))
	if err != nil || t != frameHello || n > len(b) {
		return hello{}, errWire
	}
	if _, err := io.ReadFull(c, b[:n]); err != nil {
		return hello{}, err
	}
	return parseHello(b[:n])
}

// connect returns the link to a member, dialing if there is none. A dial continues after ctx
// ends: others may wait for it, and it is worth knowing whether the member can be reached.
func (s *Swarm) connect(ctx context.Context, m *Member) (*link, error) {
	l, d, err := s.linkOrDial(m)
	if l != nil || err != nil {
		return l, err
	}
	select {
	case <-d.done:
		return d.l, d.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// linkOrDial returns the link to a member, or the dialing that is under way or begins now.
func (s *Swarm) linkOrDial(m *Member) (*link, *dialing, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.links[m.Name]; l != nil && !l.over() {
		return l, nil, nil
	}
	if d := s.dialing[m.Name]; d != nil {
		return nil, d, nil
	}
	switch {
	case s.run == nil:
		return nil, nil, ErrNotRunning
	case s.bans.has(m.Node):
		return nil, nil, errBanned
	}
	d := &dialing{done: make(chan struct{})}
	s.dialing[m.Name] = d
	s.spawnLocked(func(ctx context.Context) { s.dial(ctx, m, d) })
	return nil, d, nil
}

// aheadAfter is how long a link with a home may take before those after it are dialed.
const aheadAfter = 500 * time.Millisecond

// ahead links with the members that would be asked after home if home itself cannot be
// reached by then: whether they can be reached is then known when it matters.
func (s *Swarm) ahead(home *Member, next []*Member) (stop func()) {
	t := time.AfterFunc(aheadAfter, func() {
		if home.Name == s.self.Name || s.linkWith(home.Name) != nil {
			return
		}
		for _, m := range next {
			if m.Name != s.self.Name {
				s.spawn(func(ctx context.Context) { _, _ = s.connect(ctx, m) }) // noted in the roster
			}
		}
	})
	return func() { t.Stop() }
}

// unreached notes that a member could not be reached.
func (s *Swarm) unreached(name string) {
	if s.hears() {
		s.roster.notAlone()
	}
	if apart := s.roster.unreachable(name); apart > 0 {
		s.log.Warn("no other node can be reached, so none is asked for now; is peer.data open to them?", "data", s.self.Addr, "pause", apart)
	}
}

// hears reports whether bytes of any member came just now. All speak each pingEvery; if they fell
// silent together, none was heard for at least silence less that.
func (s *Swarm) hears() bool {
	now := time.Now()
	return slices.ContainsFunc(s.allLinks(), func(l *link) bool { return !l.over() && now.Sub(l.heard.get()) < silence-2*pingEvery })
}

// heardSince reports whether bytes of a member came since t, on a link that is still there.
func (s *Swarm) heardSince(name string, t time.Time) bool {
	l := s.linkWith(name)
	return l != nil && !l.over() && l.heard.get().After(t)
}

// mute notes that a member has hung up without a word: it speaks another version of the
// protocol, or bans this node, and others have to be homes in its place. Or both dialed
// at once, the other side keeps its own link, and that one is here a moment later: two
// nodes that take each other for unreachable would both be home (seen on a busy
// machine: a blob was fetched twice).
func (s *Swarm) mute(ctx context.Context, name string) {
	wait(ctx, muteWait)
	if s.linkWith(name) == nil && ctx.Err() == nil {
		s.unreached(name)
	}
}

const muteWait = 250 * time.Millisecond

// dial makes a link and serves it until it ends.
func (s *Swarm) dial(ctx context.Context, m *Member, d *dialing) {
	l, err := s.reach(ctx, m)
	reached := err == nil
	if reached {
		if err = s.attach(l); err == nil {
			s.dialed(m, d, l, nil)
			s.serve(l)
			return
		}
		l.close(err) // which is not the member's fault
	}
	// The other side dialed at the same time, and its link stays, or came where this one did not.
	if l = s.linkWith(m.Name); l != nil && !l.over() {
		s.dialed(m, d, l, nil)
		return
	}
	if !reached && ctx.Err() == nil {
		s.unreached(m.Name)
	}
	s.dialed(m, d, nil, err)
}

func (s *Swarm) dialed(m *Member, d *dialing, l *link, err error) {
	d.l, d.err = l, err
	s.mu.Lock()
	delete(s.dialing, m.Name)
	s.mu.Unlock()
	close(d.done)
}

// reach dials, proves who it is, and checks whom it reached. The other side sends no hello:
// its certificate says enough. Without a key, on loopback, nobody checks.
func (s *Swarm) reach(ctx context.Context, m *Member) (*link, error) {
	tctx, cancel := context.WithTimeout(ctx, connectTime)
	raw, err := dialAnew(tctx, s.cfg.Network, m.Addr)
	cancel()
	if err != nil {
		return nil, fmt.Errorf("link with %s: %w", m.Node, err)
	}
	conn := raw
	if s.trust != nil {
		hctx, cancel := context.WithTimeout(ctx, helloTime)
		defer cancel()
		tc := tls.Client(&recordConn{Conn: raw}, s.trust.config())
		if err := tc.HandshakeContext(hctx); err != nil {
			raw.Close()
			return nil, fmt.Errorf("link with %s: %w", m.Node, err)
		}
		name, pub, err := identity(tc)
		if err != nil || name != m.Name || !m.Key.Equal(pub) {
			raw.Close()
			return nil, fmt.Errorf("link with %s: %w", m.Node, errNotMember)
		}
		conn = tc
	}
	l := newLink(s, conn, *m, true)
	l.send(hello{name: s.self.Name, zone: s.self.Zone}.append)
	return l, nil
}

// attach makes l the link to its peer. Two nodes that dial each other at once
// keep the link that the smaller name dialed:
//
//  1. a and b dial each other, and each attaches what it dialed; blobs meet over both.
//  2. Each accepts the other's. a, the smaller, turns that away (errReplaced). b puts it in
//     the place of its own, which it closes with errReplaced.
//  3. If b accepted before it had attached its own, attach turns that away, and dial
//     takes the one that is there.
//  4. What b's own link was needed for goes on over the other: serve hands blobs to the heir,
//     askMember asks again. b may see the end of its own before a's has come: mute waits
//     for that.
func (s *Swarm) attach(l *link) error {
	s.mu.Lock()
	old, err := s.attachLocked(l)
	s.mu.Unlock()
	if old != nil {
		old.close(errReplaced)
	}
	return err
}

func (s *Swarm) attachLocked(l *link) (old *link, err error) {
	if s.run == nil {
		return nil, ErrNotRunning
	}
	if len(s.links) >= maxLinks {
		return nil, errManyLinks
	}
	old = s.links[l.peer]
	if old != nil && !old.over() && old.dialed != l.dialed {
		mineStays := s.self.Name < l.peer
		if old.dialed == mineStays {
			return nil, errReplaced
		}
	}
	s.links[l.peer] = l
	return old, nil
}

// serve runs an attached link and cleans up after it.
func (s *Swarm) serve(l *link) {
	s.roster.reachable(l.peer)
	err := l.run()
	s.mu.Lock()
	if s.links[l.peer] == l {
		delete(s.links, l.peer)
	}
	heir := s.links[l.peer]
	s.mu.Unlock()
	s.uploads.drop(l)
	silent := errors.Is(err, errSilent) && heir == nil // else it is back
	switch {
	case silent:
		s.unreached(l.peer)
	case l.dialed && !l.spoke.Load() && heir == nil && !errors.Is(err, errReplaced):
		s.spawn(func(ctx context.Context) { s.mute(ctx, l.peer) })
	}
	for _, b := range s.allBlobs() {
		if silent {
			b.home.forget(l.peer)
		}
		if b.left(l) && heir != nil {
			b.meet(heir)
		}
	}
	s.log.Debug("link ended", "peer", l.node, "err", err)
}

// ban stops using a peer for a while.
func (s *Swarm) ban(l *link, why banReason) {
	s.log.Warn("peer banned", "peer", l.node, "reason", string(why))
	s.bans.add(l.node, why)
	l.close(errBanned)
}

package peer

import (
	"context"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// Who the members are. memberlist does the work; what it reports goes by note and inbox to serve,
// and from there to the roster and the index, in the order in which it came: what a member says
// counts only once it is known who it is. join.go is how the first others are found.

const (
	gossipLabel   = "larder/1"       // separates this protocol from other users of memberlist
	reclaimAfter  = 30 * time.Second // a dead member's name may come back from another address
	gossipTimeout = 5 * time.Second
	leaveTimeout  = time.Second
	inboxSize     = 1024 // index messages not yet looked at; more are dropped and fetched later
	maxQueued     = 512  // index messages not yet passed on
)

// gossip is the swarm's membership: a memberlist and its delegates.
//
// memberlist calls the event methods with its own lock held and NotifyMsg from
// the one goroutine that handles packets. So none of them calls back into
// memberlist, blocks, or does work that grows with the cluster: they leave
// notes that serve takes up.
type gossip struct {
	s     *Swarm
	list  *memberlist.Memberlist
	net   *gossipNet
	queue *memberlist.TransmitLimitedQueue
	lines *slogWriter
	inbox chan []byte
	tried chan struct{} // closed after the first attempt to join
	wake  chan struct{} // for serve: there are notes

	mu    sync.Mutex // guards the following
	notes []note
	addrs map[string]string // of gossip, by member name, this node's included
	// alone is why Join led to no other member, aloneFor for how many rounds of rejoin.
	alone    error
	aloneFor int
}

// note is a change of the members, in the order in which they happened.
type note struct {
	m    Member
	left bool
}

func newGossip(s *Swarm) *gossip {
	g := &gossip{s: s, lines: &slogWriter{log: s.log}, inbox: make(chan []byte, inboxSize), wake: make(chan struct{}, 1), tried: make(chan struct{}),
		addrs: make(map[string]string)}
	g.queue = &memberlist.TransmitLimitedQueue{NumNodes: g.audience, RetransmitMult: 2}
	return g
}

// audience determines the number of retransmissions: 2 log10(N+1), rounded up,
// is 2 among ten nodes, and then each of them misses one message in eight.
// Small clusters can afford the 8 of a large one.
func (g *gossip) audience() int { return max(len(g.s.roster.view.Load().all), 1000) }

// bind binds the gossip port.
func (g *gossip) bind() error {
	host, port, err := splitAddr(g.s.cfg.Gossip)
	if err != nil {
		return fmt.Errorf("gossip address %q: %w", g.s.cfg.Gossip, err)
	}
	if g.net, err = newGossipNet(host, port); err != nil {
		return noPort("peer.gossip", g.s.cfg.Gossip, err)
	}
	return nil
}

// start starts memberlist on the gossip port.
func (g *gossip) start() error {
	host, _, _ := splitAddr(g.s.cfg.Gossip) // it is bound
	cfg, err := g.config(host)
	if err != nil {
		_ = g.net.Shutdown() // never fails
		return err
	}
	g.net.listen()
	cfg.Transport, cfg.BindPort = g.net, g.net.port()
	if g.list, err = memberlist.Create(cfg); err != nil {
		_ = g.net.Shutdown() // never fails
		return fmt.Errorf("start gossip on %s: %w", g.s.cfg.Gossip, err)
	}
	return nil
}

func (g *gossip) config(bound string) (c *memberlist.Config, err error) {
	s := g.s
	c = memberlist.DefaultLANConfig()
	c.Name = s.self.Name
	data, _, _ := net.SplitHostPort(s.cfg.Data) // it is bound already
	if c.AdvertiseAddr, err = advertised(s.cfg.Advertise, bound, data); err != nil {
		return nil, err
	}
	c.Label = gossipLabel
	c.TCPTimeout = gossipTimeout
	c.DeadNodeReclaimTime = reclaimAfter
	c.EnableCompression = false // our messages are digests: LZW only costs
	if s.cfg.probe > 0 {
		c.ProbeInterval, c.ProbeTimeout = s.cfg.probe, s.cfg.probe/2
	}
	c.Delegate, c.Events = g, g
	c.Logger = log.New(g.lines, "", 0)
	if s.trust != nil {
		if c.Keyring, err = memberlist.NewKeyring(s.trust.gossip, s.trust.gossip[0]); err != nil {
			return nil, fmt.Errorf("gossip keys: %w", err)
		}
	}
	return c, nil
}

// splitAddr splits a listen address. No host means every address, of IPv6 too.
func splitAddr(addr string) (host string, port int, err error) {
	host, p, err := net.SplitHostPort(addr)
	if err == nil && p != "" {
		port, err = strconv.Atoi(p)
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	return host, port, err
}

// advertised is the address others use: as configured, or the first one bound, or one
// that is not loopback, of IPv4 if there is one.
func advertised(want string, bound ...string) (string, error) {
	if want != "" {
		return want, nil
	}
	for _, b := range bound {
		if ip, err := netip.ParseAddr(b); err == nil && !ip.IsUnspecified() {
			return b, nil
		}
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", fmt.Errorf("list addresses: %w", err)
	}
	found := "127.0.0.1"
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		switch {
		case !ok || !n.IP.IsGlobalUnicast():
		case n.IP.To4() != nil:
			return n.IP.String(), nil
		default:
			found = n.IP.String()
		}
	}
	return found, nil
}

// run keeps the membership until ctx ends.
func (g *gossip) run(ctx context.Context) {
	var tasks sync.WaitGroup
	tasks.Go(func() { g.serve(ctx) })
	tasks.Go(func() { g.rejoin(ctx) })
	<-ctx.Done()
	if err := g.list.Leave(leaveTimeout); err != nil {
		g.s.log.Debug("leaving was not heard", "err", err)
	}
	if err := g.list.Shutdown(); err != nil {
		g.s.log.Warn("gossip did not stop", "err", err)
	}
	g.lines.stop()
	tasks.Wait()
}

// serve takes up what the delegates noted.
func (g *gossip) serve(ctx context.Context) {
	for {
		select {
		case <-g.wake:
			g.settle()
		case p := <-g.inbox:
			g.settle() // what is said comes after who says it
			g.s.index.heard(p)
		case <-ctx.Done():
			return
		}
	}
}

// settle brings noted changes to the roster, all with one copy of it.
func (g *gossip) settle() {
	g.mu.Lock()
	notes := g.notes
	g.notes = nil
	g.mu.Unlock()
	if len(notes) == 0 {
		return
	}
	var joined []Member
	for _, n := range notes {
		if !n.left {
			joined = append(joined, n.m)
			continue
		}
		joined = slices.DeleteFunc(joined, func(m Member) bool { return m.Name == n.m.Name })
		g.s.roster.remove(n.m.Name)
		g.s.index.fell(n.m.Name)
	}
	if len(joined) > 0 {
		g.s.roster.set(joined...)
		g.s.index.joined(joined)
	}
	g.s.metrics.members.Set(float64(len(g.s.roster.view.Load().all)))
}

// NodeMeta implements memberlist.Delegate.
func (g *gossip) NodeMeta(int) []byte { return g.s.self.meta() }

// NotifyMsg implements memberlist.Delegate. What does not fit into the inbox is
// missed like a lost packet.
func (g *gossip) NotifyMsg(p []byte) {
	if len(p) > 1+maxSlots*vectorEntry {
		return
	}
	select {
	case g.inbox <- slices.Clone(p):
	default:
	}
}

// GetBroadcasts implements memberlist.Delegate.
func (g *gossip) GetBroadcasts(overhead, limit int) [][]byte {
	return g.queue.GetBroadcasts(overhead, limit)
}

// LocalState implements memberlist.Delegate: a vector of how far the index
// knows each member, 12 bytes each.
func (g *gossip) LocalState(bool) []byte { return g.s.index.vector() }

// MergeRemoteState implements memberlist.Delegate. The vector goes the same way
// as messages; the first byte tells them apart.
func (g *gossip) MergeRemoteState(p []byte, _ bool) { g.NotifyMsg(p) }

// NotifyJoin implements memberlist.EventDelegate.
func (g *gossip) NotifyJoin(n *memberlist.Node) { g.note(n, false) }

// NotifyUpdate implements memberlist.EventDelegate.
func (g *gossip) NotifyUpdate(n *memberlist.Node) { g.note(n, false) }

// NotifyLeave implements memberlist.EventDelegate.
func (g *gossip) NotifyLeave(n *memberlist.Node) { g.note(n, true) }

// note leaves word of a change. memberlist writes to its Nodes at any time, and
// only here, in its callbacks, may they be read.
func (g *gossip) note(n *memberlist.Node, left bool) {
	ip, _ := netip.AddrFromSlice(n.Addr)
	m, err := parseMember(n.Name, ip, n.Meta)
	if err != nil {
		g.s.log.Debug("member ignored", "err", err)
	}
	g.mu.Lock()
	if left {
		delete(g.addrs, n.Name)
	} else {
		g.addrs[n.Name] = n.Address()
	}
	if err == nil && n.Name != g.s.self.Name {
		g.notes = append(g.notes, note{m, left})
	}
	g.mu.Unlock()
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// ownAddr is addr, on which this node listens, as others are told it: they get the IP address
// of gossip, because the one listened on may be any.
func (g *gossip) ownAddr(addr string) string {
	if g == nil {
		return addr
	}
	g.mu.Lock()
	own, known := g.addrs[g.s.self.Name]
	g.mu.Unlock()
	if !known {
		return addr
	}
	host, _, _ := net.SplitHostPort(own)
	_, port, _ := net.SplitHostPort(addr)
	return net.JoinHostPort(host, port)
}

// broadcast is one index message on its way.
type broadcast []byte

var _ memberlist.UniqueBroadcast = broadcast(nil)

func (broadcast) Invalidates(memberlist.Broadcast) bool { return false }
func (b broadcast) Message() []byte                     { return b }
func (broadcast) Finished()                             {}
func (broadcast) UniqueBroadcast()                      {}

// tell queues an index message for the next gossip rounds.
func (g *gossip) tell(p []byte) {
	g.queue.QueueBroadcast(broadcast(p))
	if g.queue.NumQueued() > maxQueued {
		g.queue.Prune(maxQueued)
	}
}

// slogWriter takes memberlist's log lines. It knows four levels, and what it
// calls an error is a peer that does not answer. After stop it drops them:
// memberlist's Shutdown does not wait for its probes, which would write to a
// log whose owner is gone.
type slogWriter struct {
	mu  sync.Mutex // guards log, and lets stop wait for a line being written
	log *slog.Logger
}

func (w *slogWriter) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = slog.New(slog.DiscardHandler)
}

func (w *slogWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	line := strings.TrimSpace(string(p))
	level := slog.LevelDebug
	if rest, ok := strings.CutPrefix(line, "[ERR] "); ok {
		line, level = rest, slog.LevelInfo
		if strings.Contains(rest, "Decrypt packet failed") || strings.Contains(rest, "unacceptable label") {
			level = slog.LevelDebug // any stranger can make us say this
		}
	}
	w.log.Log(context.Background(), level, "gossip", "detail", line)
	return len(p), nil
}

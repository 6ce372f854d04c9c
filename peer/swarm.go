package peer

import (
	"context"
	"crypto/ed25519"
	crand "crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

// Swarm is this node's part in the swarm. Its methods may be called by several
// goroutines.
type Swarm struct {
	cfg      Config
	log      *slog.Logger
	metrics  *metrics
	self     Member
	signer   ed25519.PrivateKey
	trust    *trust // nil on loopback without a key
	listener net.Listener
	roster   *roster
	bans     *bans
	uploads  *uploads
	index    *index
	gossip   *gossip // nil without a gossip address
	answers  answers
	limiter  *rate.Limiter // nil = none
	buffers  buffers
	chunks   sync.Pool
	chunk    int // piece bytes in one frame
	scratch  scratch
	flying   atomic.Int64 // bytes of pieces asked for

	strangers chan struct{} // a place each
	hashers   chan struct{} // likewise

	tasks sync.WaitGroup // every goroutine but Run's own

	mu      sync.Mutex // guards the following
	run     context.Context
	links   map[string]*link // by member name
	dialing map[string]*dialing
	blobs   map[key]*blob
	rng     *rand.Rand
}

type dialing struct {
	done chan struct{}
	l    *link
	err  error
}

// New makes a swarm and binds its listeners, so that every error of the
// configuration shows at once; nothing runs before Run.
func New(cfg Config) (*Swarm, error) {
	cfg = cfg.withDefaults()
	if err := checkKeys(cfg); err != nil {
		return nil, err
	}
	if cfg.Name == "" || len(cfg.Name) > maxName-12 {
		return nil, fmt.Errorf("peer name %.64q: want 1 to %d bytes", cfg.Name, maxName-12)
	}
	if len(cfg.Zone) > maxZone {
		return nil, fmt.Errorf("peer zone %.64q: want at most %d bytes", cfg.Zone, maxZone)
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("swarm metrics: %w", err)
	}
	s := &Swarm{
		cfg: cfg, log: cfg.Logger, metrics: m, roster: newRoster(), bans: &bans{m: m, until: make(map[string]time.Time)},
		strangers: make(chan struct{}, maxStrangers), hashers: make(chan struct{}, hashersAtOnce),
		links: make(map[string]*link), dialing: make(map[string]*dialing), blobs: make(map[key]*blob),
	}
	s.index = newIndex(s)
	s.answers.byKey = make(map[key]*remembered)
	if cfg.Gossip != "" {
		s.gossip = newGossip(s)
	}
	s.uploads = &uploads{s: s, max: cfg.MaxUploads}
	s.chunk = chunkSize
	s.chunks.New = func() any { b := make([]byte, frameHeader+dataHead+s.chunk); return &b }
	if cfg.MaxUploadBytesPerSecond > 0 {
		s.limiter = rate.NewLimiter(rate.Limit(cfg.MaxUploadBytesPerSecond), 4*chunkSize)
	}
	return s, s.identify()
}

// identify makes this start's name, key and credentials, and binds the data port.
func (s *Swarm) identify() error {
	seed := s.cfg.Seed
	if seed == 0 {
		var b [8]byte
		crand.Read(b[:])
		seed = binary.BigEndian.Uint64(b[:])
	}
	s.rng = rand.New(rand.NewPCG(seed, hash64(s.cfg.Name)))
	_, signer, err := ed25519.GenerateKey(nil)
	if err != nil {
		return fmt.Errorf("make signing key: %w", err)
	}
	s.signer = signer
	// Milliseconds keep two starts apart and the later one larger.
	epoch := uint64(time.Now().UnixMilli()) & (1<<44 - 1)
	s.self = Member{Name: startName(s.cfg.Name, epoch), Node: s.cfg.Name, Zone: s.cfg.Zone, Epoch: epoch, Home: s.cfg.Home,
		Key: signer.Public().(ed25519.PublicKey)}
	if len(s.cfg.Keys) > 0 {
		if s.trust, err = newTrust(s.cfg.Keys, s.self.Name, signer); err != nil {
			return err
		}
	}
	if s.listener, err = s.cfg.Network.Listen(s.cfg.Data); err != nil {
		return fmt.Errorf("listen for peers: %w", err)
	}
	s.self.Addr = s.listener.Addr().String()
	s.roster.set(s.self)
	s.metrics.members.Set(1)
	return nil
}

// Run serves peers until ctx ends, and returns when every goroutine of the
// swarm, those of Fetch included, is gone.
func (s *Swarm) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if s.gossip != nil {
		if err := s.gossip.start(); err != nil {
			s.listener.Close()
			return err
		}
	}
	s.mu.Lock()
	s.run = ctx
	s.mu.Unlock()
	s.spawn(s.accept)
	s.spawn(s.tend)
	s.spawn(s.index.run)
	if s.gossip != nil {
		s.spawn(s.gossip.run)
	}
	<-ctx.Done()
	s.mu.Lock()
	s.run = nil
	links := s.links
	s.links = make(map[string]*link)
	s.mu.Unlock()
	s.listener.Close()
	for _, l := range links {
		l.close(ErrNotRunning)
	}
	s.tasks.Wait()
	for _, b := range s.allBlobs() {
		b.letGo()
	}
	return nil
}

// Close releases what New bound, for a Swarm that was never run.
func (s *Swarm) Close() error { return s.listener.Close() }

// enter joins a caller's context with Run's.
func (s *Swarm) enter(ctx context.Context) (context.Context, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.run == nil {
		return nil, nil, ErrNotRunning
	}
	s.tasks.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.run, cancel)
	return ctx, func() { stop(); cancel(); s.tasks.Done() }, nil
}

// spawn runs f until Run ends; it does nothing when Run has ended.
func (s *Swarm) spawn(f func(context.Context)) {
	s.mu.Lock()
	ctx := s.run
	if ctx != nil {
		s.tasks.Add(1)
	}
	s.mu.Unlock()
	if ctx == nil {
		return
	}
	go func() {
		defer s.tasks.Done()
		f(ctx)
	}()
}

// after runs f, which must not block, in d.
func (s *Swarm) after(d time.Duration, f func()) { time.AfterFunc(d, f) }

func (s *Swarm) now() time.Time { return time.Now() }

func (s *Swarm) newRandLocked() *rand.Rand {
	return rand.New(rand.NewPCG(s.rng.Uint64(), s.rng.Uint64()))
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
		s.spawn(func(ctx context.Context) { s.welcome(ctx, conn) })
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

// welcome finds out who dialed and serves the link until it ends.
func (s *Swarm) welcome(ctx context.Context, raw net.Conn) {
	conn, m, err := s.greet(ctx, raw)
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
	node, _, ok := cutStart(h.name)
	if !ok || h.name == s.self.Name {
		return Member{}, errNotMember
	}
	if s.bans.has(node) {
		return Member{}, errBanned
	}
	m := Member{Name: h.name, Node: node, Zone: h.zone, Epoch: h.epoch, Key: pub}
	if known, ok := s.roster.get(h.name); ok {
		if s.trust != nil && !known.Key.Equal(pub) {
			return Member{}, errNotMember
		}
		m = *known
	}
	return m, nil
}

func readHello(c net.Conn) (hello, error) {
	var b [frameHeader + 10 + 2*(maxName+1)]byte
	if err := readFull(c, b[:frameHeader]); err != nil {
		return hello{}, err
	}
	t, n, err := parseHeader([frameHeader]byte(b[:frameHeader]))
	if err != nil || t != frameHello || n > len(b) {
		return hello{}, errWire
	}
	if err := readFull(c, b[:n]); err != nil {
		return hello{}, err
	}
	return parseHello(b[:n])
}

// connect returns the link to a member, dialing if there is none.
func (s *Swarm) connect(ctx context.Context, m *Member) (*link, error) {
	s.mu.Lock()
	if l := s.links[m.Name]; l != nil && !l.over() {
		s.mu.Unlock()
		return l, nil
	}
	d := s.dialing[m.Name]
	if d == nil {
		if s.run == nil || s.bans.has(m.Node) {
			s.mu.Unlock()
			return nil, errBanned
		}
		d = &dialing{done: make(chan struct{})}
		s.dialing[m.Name] = d
		s.tasks.Add(1)
		run := s.run
		go func() {
			defer s.tasks.Done()
			s.dial(run, m, d)
		}()
	}
	s.mu.Unlock()
	select {
	case <-d.done:
		return d.l, d.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// dial makes a link and serves it until it ends.
func (s *Swarm) dial(ctx context.Context, m *Member, d *dialing) {
	l, err := s.reach(ctx, m)
	if err == nil {
		err = s.attach(l)
		if errors.Is(err, errReplaced) {
			// The other side dialed at the same time, and its link stays.
			l.close(err)
			s.mu.Lock()
			l = s.links[m.Name]
			s.mu.Unlock()
			if l != nil {
				s.dialed(m, d, l, nil)
				return
			}
		}
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, errReplaced) {
		s.roster.unreachable(m.Name)
	}
	s.dialed(m, d, l, err)
	if err == nil {
		s.serve(l)
	}
}

func (s *Swarm) dialed(m *Member, d *dialing, l *link, err error) {
	d.l, d.err = l, err
	s.mu.Lock()
	delete(s.dialing, m.Name)
	s.mu.Unlock()
	close(d.done)
}

// reach dials, proves who it is, and checks whom it reached. It does not wait for the
// other side's hello: the certificate says enough.
func (s *Swarm) reach(ctx context.Context, m *Member) (*link, error) {
	tctx, cancel := context.WithTimeout(ctx, connectTime)
	raw, err := s.cfg.Network.DialContext(tctx, m.Addr)
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
	l.send(hello{version: wireVersion, epoch: s.self.Epoch, name: s.self.Name, zone: s.self.Zone}.append)
	return l, nil
}

// attach makes l the link to its peer. Two nodes that dial each other at once
// keep the link that the smaller name dialed.
func (s *Swarm) attach(l *link) error {
	old, err := s.attachLocked(l)
	if old != nil {
		old.close(errReplaced)
	}
	return err
}

func (s *Swarm) attachLocked(l *link) (old *link, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.run == nil {
		return nil, ErrNotRunning
	}
	if len(s.links) >= maxLinks {
		return nil, errMembers
	}
	old = s.links[l.peer]
	if old != nil && old.dialed != l.dialed {
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
	silent := errors.Is(err, errSilent)
	if silent {
		s.roster.unreachable(l.peer)
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

// handle takes one frame. An error ends the link.
func (s *Swarm) handle(l *link, t frameType, p []byte) error {
	switch t {
	case framePing, frameHello:
		return nil
	case frameOpen:
		return handleAs(parseOpen, p, func(o open) error { return s.opened(l, o) })
	case frameHave:
		return handleAs(parseHave, p, func(h have) error { s.ifBlob(h.blob, func(b *blob) { b.haves(l, h); b.adopt(l) }); return nil })
	case frameClose:
		if len(p) != len(key{}) {
			return errWire
		}
		s.ifBlob(key(p), func(b *blob) { b.left(l) })
		return nil
	case frameRequest:
		return handleAs(parseWant, p, func(w want) error { return s.asked(l, w) })
	case frameCancel:
		return handleAs(parseAnswer, p, func(a answer) error { s.uploads.cancel(l, a.id); return nil })
	case frameBusy, frameGone:
		return handleAs(parseAnswer, p, func(a answer) error { s.denied(l, t, a); return nil })
	case frameDigests:
		return handleAs(parseBatch, p, func(d *batch) error { s.ifBlob(d.blob, func(b *blob) { b.learn(d) }); return nil })
	case frameCall:
		return handleAs(parseCall, p, func(c call) error { return s.called(l, c) })
	case frameReply:
		return handleAs(parseCall, p, l.answered)
	}
	return errWire
}

func handleAs[T any](parse func([]byte) (T, error), p []byte, f func(T) error) error {
	v, err := parse(p)
	if err != nil {
		return err
	}
	return f(v)
}

func (s *Swarm) ifBlob(k key, f func(*blob)) {
	s.mu.Lock()
	b := s.blobs[k]
	s.mu.Unlock()
	if b != nil {
		f(b)
	}
}

// opened takes in that a peer takes part in a blob, which may be one that this
// node holds and has not thought of since.
func (s *Swarm) opened(l *link, o open) error {
	b, err := s.guestBlob(o.blob)
	if err != nil {
		l.send(func(p []byte) []byte { return appendClose(p, o.blob) })
		return nil
	}
	b.opened(l, o)
	if o.have.count() > 0 {
		b.adopt(l)
	}
	if !b.active() && b.offered() == 0 {
		if s.seedFromStore(b) != nil && !b.active() && b.offered() == 0 && !b.isHome() {
			b.left(l)
			l.send(func(p []byte) []byte { return appendClose(p, o.blob) })
		}
	}
	return nil
}

func (s *Swarm) asked(l *link, w want) error {
	s.mu.Lock()
	b := s.blobs[w.blob]
	s.mu.Unlock()
	if b == nil {
		l.send(func(p []byte) []byte { return answer{id: w.id}.append(p, frameGone) })
		return nil
	}
	b.asked(l, w)
	return nil
}

func (s *Swarm) denied(l *link, t frameType, a answer) {
	r := l.forget(a.id)
	if r == nil {
		return
	}
	if t == frameBusy {
		r.blob.busy(r, a)
		return
	}
	r.blob.failed(r, failGone)
}

// seedFromStore offers a blob that the store holds whole. Hashing happens in the
// background.
func (s *Swarm) seedFromStore(b *blob) error {
	b.mu.Lock()
	busy, rotten := b.scanning || b.fill != nil, b.rotten
	b.mu.Unlock()
	switch {
	case busy:
		return nil
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
	start := !b.scanning
	b.scanning = true
	b.mu.Unlock()
	if start {
		s.spawn(func(ctx context.Context) {
			err := s.hashing(ctx, b.seed)
			b.mu.Lock()
			b.scanning = false
			b.rotten = errors.Is(err, errWrongBlob)
			b.mu.Unlock()
			if err != nil {
				s.log.Warn("blob is not offered", "digest", b.d, "err", err)
			}
		})
	}
	return nil
}

// hashersAtOnce bounds how many blobs are read from disk to be hashed: a peer may ask for
// all of them.
const hashersAtOnce = 2

func (s *Swarm) hashing(ctx context.Context, f func() error) error {
	select {
	case s.hashers <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.hashers }()
	return f()
}

// blob returns the state of a blob, made if there is none.
func (s *Swarm) blob(k key) *blob {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blobs[k]
	if b == nil {
		b = newBlob(s, k, s.newRandLocked())
		s.blobs[k] = b
	}
	return b
}

// maxBlobs bounds blobs that other nodes speak of.
const maxBlobs = 16384

var errManyBlobs = errors.New("too many blobs at once")

// guestBlob is blob for a digest that another node named.
func (s *Swarm) guestBlob(k key) (*blob, error) {
	s.mu.Lock()
	full := s.blobs[k] == nil && len(s.blobs) >= maxBlobs
	s.mu.Unlock()
	if full {
		return nil, errManyBlobs
	}
	return s.blob(k), nil
}

func (s *Swarm) allBlobs() []*blob {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*blob, 0, len(s.blobs))
	for _, b := range s.blobs {
		out = append(out, b)
	}
	return out
}

func (s *Swarm) allLinks() []*link {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*link, 0, len(s.links))
	for _, l := range s.links {
		out = append(out, l)
	}
	return out
}

const tendEvery = 100 * time.Millisecond

// tend does what has to be done by the clock.
func (s *Swarm) tend(ctx context.Context) {
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now := time.Now()
		links := s.allLinks()
		for _, l := range links {
			l.tend(now, idleFor(len(links)))
		}
		blobs := s.allBlobs()
		for _, b := range blobs {
			s.tendBlob(b, now, keepFor(len(blobs)))
		}
		s.uploads.tend()
	}
}

// idleFor is how long an idle link is kept: a home in a storm meets everybody
// once, and most of them never again.
func idleFor(links int) time.Duration {
	switch {
	case links > maxLinks/2:
		return idleLink / 40
	case links > maxLinks/4:
		return idleLink / 10
	}
	return idleLink
}

// keepFor is how long the piece digests of an idle blob are kept.
func keepFor(blobs int) time.Duration {
	if blobs > maxIdleBlobs {
		return idleLink
	}
	return keepBlob
}

func (s *Swarm) tendBlob(b *blob, now time.Time, keep time.Duration) {
	slow, idle := b.tend(now)
	for _, l := range slow {
		s.bans.add(l.node, banSlow)
		b.left(l)
		l.send(func(p []byte) []byte { return appendClose(p, b.k) })
	}
	if b.home.expire(now) > 0 {
		return
	}
	if idle > idleLink {
		b.letGo()
		b.forgetGiven()
	}
	if idle > keep || (idle > idleLink && b.sized() == 0) {
		s.mu.Lock()
		if s.blobs[b.k] == b {
			delete(s.blobs, b.k)
		}
		s.mu.Unlock()
	}
}

// tend gives up slow requests, keeps links in use, and reports for how long
// nobody needed the blob.
func (b *blob) tend(now time.Time) (slow []*link, idle time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	slow = b.expire(now)
	if b.fill != nil {
		b.lastUse = now
		for _, nb := range b.nbrs {
			nb.l.used.Store(now.UnixNano())
		}
		b.poke()
	}
	return slow, now.Sub(b.lastUse)
}

// mayBeHome reports whether a member is among the blob's homes, of any zone it may
// be in, as this node sees the members.
func (s *Swarm) mayBeHome(k key, name string) bool {
	v := s.roster.view.Load()
	for _, m := range v.homes(k, "", false) {
		if m.Name == name {
			return true
		}
	}
	for _, m := range v.homes(k, s.cfg.Zone, true) {
		if m.Name == name {
			return true
		}
	}
	return false
}

func (s *Swarm) signingKey(name string) ed25519.PublicKey {
	if name == s.self.Name {
		return s.self.Key
	}
	return s.roster.key(name)
}

// holders are live members known to hold the whole blob.
func (s *Swarm) holders(k key, zone string) []string {
	return s.index.holders(prefixOf(k), zone, namedHolders)
}

// limit waits for the upload budget.
func (s *Swarm) limit(done <-chan struct{}, n int) error {
	if s.limiter == nil {
		return nil
	}
	r := s.limiter.ReserveN(time.Now(), n)
	t := time.NewTimer(r.Delay())
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-done:
		return errLinkClosed
	}
}

func parseKey(d string) (key, error) {
	algo, enc, ok := cutDigest(d)
	if !ok || algo != string(digest.SHA256) || len(enc) != 64 {
		return key{}, fmt.Errorf("digest %.80q: %w", d, ErrUnsupported)
	}
	var k key
	if _, err := hex.Decode(k[:], []byte(enc)); err != nil {
		return key{}, fmt.Errorf("digest %.80q: %w", d, ErrUnsupported)
	}
	return k, nil
}

// buffers recycles pieces; most of a node's memory in a storm is here.
type buffers struct{ pool sync.Pool }

func (p *buffers) get(n int) []byte {
	if b, ok := p.pool.Get().(*[]byte); ok && cap(*b) >= n {
		return (*b)[:n]
	}
	return make([]byte, n)
}

func (p *buffers) put(b []byte) {
	if cap(b) > 0 {
		p.pool.Put(&b)
	}
}

// scratch recycles candidate lists.
type scratch struct{ pool sync.Pool }

func (p *scratch) get() []candidate {
	if c, ok := p.pool.Get().(*[]candidate); ok {
		return (*c)[:0]
	}
	return make([]candidate, 0, window)
}

func (p *scratch) put(c []candidate) { p.pool.Put(&c) }

func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("peer: message cannot be encoded: " + err.Error()) // only our own structs come here
	}
	return b
}

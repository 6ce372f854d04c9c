package peer

import (
	"context"
	"crypto/ed25519"
	crand "crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

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
	ways     *ways
	bans     *bans
	uploads  *uploads
	awaited  atomic.Bool // others wait for a blob that this node gets from upstream; set by tendBlobs
	index    *index
	traffic  traffics
	gossip   *gossip // nil without a gossip address
	answers  answers
	limiter  *rate.Limiter // nil = none
	budget   *budget       // nil = none
	buffers  buffers
	chunks   sync.Pool
	chunk    int          // piece bytes in one frame: chunkSize, less in simulations
	flying   atomic.Int64 // bytes of pieces asked for, of all blobs; bounded by maxFlyByte

	resolver *net.Resolver // of the names in Config.Join

	// Semaphores: a holder of a place has put something in.
	strangers  chan struct{} // connections in their handshake, see maxStrangers
	hashers    chan struct{} // blobs that are read to be hashed, see hashersAtOnce
	bigHashers chan struct{} // likewise, of those above verifyFirst

	tasks sync.WaitGroup // every goroutine but Run's own

	mu      sync.Mutex          // guards the following; for its order with other locks see I7
	run     context.Context     // Run's; nil before it and after it
	links   map[string]*link    // by member name, from attach until serve ends; some may be over
	dialing map[string]*dialing // likewise
	blobs   map[blobID]*blob    // bounded by maxBlobs, but for what this node itself fetches or finds void
	rng     *rand.Rand
}

// New makes a swarm and binds its ports, so that configuration errors show at once;
// nothing runs before Run. The caller ends it with Run, or with Close if it does not
// get that far.
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
		cfg: cfg, log: cfg.Logger, metrics: m, resolver: net.DefaultResolver, roster: newRoster(), ways: newWays(), bans: &bans{m: m, until: make(map[string]ban)},
		strangers: make(chan struct{}, maxStrangers), hashers: make(chan struct{}, hashersAtOnce), bigHashers: make(chan struct{}, hashersAtOnce),
		links: make(map[string]*link), dialing: make(map[string]*dialing), blobs: make(map[blobID]*blob),
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
	s.budget = newBudget(cfg.MaxDownloadBytesPerSecond)
	if err := s.identify(); err != nil {
		return nil, err
	}
	if s.gossip != nil {
		if err := s.gossip.bind(); err != nil {
			s.listener.Close()
			return nil, err
		}
	}
	return s, nil
}

// noPort says what to do when the port that a key of the agent's configuration names
// cannot be had.
func noPort(key, addr string, err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%s = %q: %w; is another agent running on this node? (`ss -ltunp` says who listens) Stop it, or set another %s", key, addr, err, key)
	}
	return fmt.Errorf("%s = %q: %w; set another %s", key, addr, err, key)
}

// identify makes this start's name, key and credentials, and binds the data
// port.
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
		return noPort("peer.data", s.cfg.Data, err)
	}
	s.self.Addr = s.listener.Addr().String()
	s.roster.self = s.self.Name
	s.roster.set(s.self)
	s.metrics.members.Set(1)
	return nil
}

// Run serves peers until ctx ends. It returns when every goroutine of the
// swarm, including those of Fetch, is gone and what New bound is released. It
// is called once. It fails only if gossip does not start.
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
func (s *Swarm) Close() error {
	if s.gossip != nil {
		_ = s.gossip.net.Shutdown() // never fails
	}
	return s.listener.Close()
}

// enter joins a caller's context with Run's; Run waits until the returned function
// is called.
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

// spawn runs f on a goroutine that Run waits for, with Run's context; once Run has
// ended it does nothing. So a caller that waits for what f does must wait for a
// context too.
func (s *Swarm) spawn(f func(context.Context)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spawnLocked(f)
}

func (s *Swarm) spawnLocked(f func(context.Context)) {
	if ctx := s.run; ctx != nil {
		s.tasks.Go(func() { f(ctx) })
	}
}

func (s *Swarm) newRandLocked() *rand.Rand {
	return rand.New(rand.NewPCG(s.rng.Uint64(), s.rng.Uint64()))
}

// blob returns the state of a blob, made if there is none. It is in use from now on, so that
// tendBlob does not drop it just before its fetch begins.
func (s *Swarm) blob(id blobID) *blob {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blobLocked(id)
	b.lastUse.set(time.Now())
	return b
}

func (s *Swarm) blobLocked(id blobID) *blob {
	b := s.blobs[id]
	if b == nil {
		b = newBlob(s, id, s.newRandLocked())
		s.blobs[id] = b
	}
	return b
}

// maxBlobs bounds the blobs that other nodes speak of. Each takes 3 KB, and garbage
// collection as much again.
const maxBlobs = 4096

var errManyBlobs = errors.New("too many blobs at once")

// guestBlob is blob for one that another node named.
func (s *Swarm) guestBlob(id blobID) (*blob, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blobs[id] == nil && len(s.blobs) >= maxBlobs {
		return nil, errManyBlobs
	}
	return s.blobLocked(id), nil
}

// knownBlob is the state of a blob, nil if there is none.
func (s *Swarm) knownBlob(id blobID) *blob {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blobs[id]
}

// linkWith is the link to a member, nil if there is none; it may have ended.
func (s *Swarm) linkWith(member string) *link {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.links[member]
}

func (s *Swarm) allBlobs() []*blob {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.AppendSeq(make([]*blob, 0, len(s.blobs)), maps.Values(s.blobs))
}

func (s *Swarm) allLinks() []*link {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.AppendSeq(make([]*link, 0, len(s.links)), maps.Values(s.links))
}

// mayBeHome reports whether a member is among the blob's homes, of the cluster or of this
// node's zone, as this node sees the members. Whether it can be reached now does not
// matter: what it signed counts all the same (I2).
func (s *Swarm) mayBeHome(k key, name string) bool {
	v := s.roster.view.Load()
	homes := append(v.homes(k, "", false, nil), v.homes(k, s.cfg.Zone, true, nil)...)
	return slices.ContainsFunc(homes, func(m *Member) bool { return m.Name == name })
}

// holders are live members known to hold the whole blob, those of the zone first; the
// others only if far.
func (s *Swarm) holders(k key, zone string, far bool) []string {
	names := s.index.holders(prefixOf(k), zone, namedHolders)
	if far {
		return names
	}
	return slices.DeleteFunc(names, func(name string) bool {
		m, live := s.roster.get(name)
		return !live || m.Zone != zone
	})
}

// parseKey is the key of a digest; ErrUnsupported if that is no SHA-256.
func parseKey(d string) (key, error) {
	enc, ok := strings.CutPrefix(d, "sha256:")
	b, err := hex.DecodeString(enc)
	if !ok || err != nil || len(b) != len(key{}) {
		return key{}, fmt.Errorf("digest %.80q: %w", d, ErrUnsupported)
	}
	return key(b), nil
}

// parseBlobID is parseKey for a blob that another node asks about.
func parseBlobID(d string, attempt int) (blobID, error) {
	k, err := parseKey(d)
	if err == nil && (attempt < 0 || attempt > lastAttempt) {
		err = fmt.Errorf("attempt %d at a blob: %w", attempt, ErrUnsupported)
	}
	return blobID{k, byte(attempt)}, err
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

// marshal is the JSON of a message.
func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("peer: message cannot be encoded: " + err.Error()) // only our own structs come here
	}
	return b
}

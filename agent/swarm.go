package agent

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http/httptrace"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/runtimestore"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/peer"
)

// swarm is the one place where package peer meets the rest of the agent: it
// gives the proxy a source, the peers a view of this node's blobs and a way to
// the registry, and the status API the members. A nil *swarm is a node alone.
type swarm struct {
	*peer.Swarm
	agent   *Agent
	passing atomic.Int64 // bytes of memory promised to what passes through, see Through
}

// openSwarm makes the swarm, unless this node is to be alone. The proxy exists
// after it; nothing calls back before Run.
func (a *Agent) openSwarm() error {
	c := a.config.Peer
	if c.Alone() {
		return peer.RegisterLone(a.registry)
	}
	var keys [][]byte
	if c.KeyFile != "" {
		var err error
		if keys, err = readKeys(c.KeyFile); err != nil {
			return fmt.Errorf("peer.key_file = %q: %w", c.KeyFile, err)
		}
	}
	s := &swarm{agent: a}
	var err error
	s.Swarm, err = peer.New(peer.Config{
		Name: a.nodeName(), Zone: shortZone(c.Zone), Home: c.Home, ZoneScope: c.UpstreamScope == "zone",
		Keys: keys, Gossip: c.Gossip, Data: c.Data, Advertise: c.Advertise, Join: c.Join,
		MaxUploads: c.MaxUploads, MaxUploadBytesPerSecond: int64(c.MaxUploadBytesPerSecond),
		MaxDownloadBytesPerSecond: int64(c.MaxDownloadBytesPerSecond),
		TagTTL:                    func(registry string) time.Duration { return a.upstream.Policy(registry).TTL(a.config.Upstream.TagTTL) },
		PieceSize:                 cache.PieceSize,
		Store:                     swarmStore{a}, Origin: swarmOrigin{s}, Logger: a.log, Registerer: a.registry,
	})
	if err != nil {
		return fmt.Errorf("peer: %w", err)
	}
	a.swarm = s
	return nil
}

// gossipZone is how many bytes of a zone gossip carries.
const gossipZone = 29

// shortZone makes a zone fit into gossip. Peers compare zones and never take
// them apart, so the end of a long one may be a digest of the whole.
func shortZone(zone string) string {
	if len(zone) <= gossipZone {
		return zone
	}
	sum := sha256.Sum256([]byte(zone))
	end := "~" + hex.EncodeToString(sum[:4])
	return zone[:gossipZone-len(end)] + end
}

// Run serves peers, after telling them of every blob and tag that is known here already.
func (s *swarm) Run(ctx context.Context) error {
	s.agent.cache.Walk(func(i cache.Info) bool {
		s.Announce(i.Digest)
		return ctx.Err() == nil
	})
	if s.agent.runtime != nil {
		s.agent.runtime.Walk(func(d digest.Digest, _ int64) bool {
			s.Announce(d)
			return ctx.Err() == nil
		})
	}
	s.rememberTags()
	return s.Swarm.Run(ctx)
}

func (s *swarm) rememberTags() {
	for r, tags := range s.agent.proxy.Tags() {
		for _, tag := range tags {
			s.Remember(upstream.Target{Registry: r.Registry, Repository: r.Name}, tag)
		}
	}
}

// Fetch fills f from the swarm: the proxy's way to other nodes.
func (s *swarm) Fetch(ctx context.Context, t upstream.Target, kind proxy.Kind, f *cache.Fill) error {
	return s.fetch(ctx, t, kind, f, false, func(ctx context.Context, into peer.Sink) error {
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteRequest: func(r httptrace.WroteRequestInfo) {
			if r.Err == nil {
				into.Asked()
			}
		}})
		return s.agent.proxy.FetchUpstream(ctx, t, kind, f.Digest(), homeSink{into, f})
	})
}

// errHeld ends a copy that would have to turn to the registry.
var errHeld = errors.New("copies are fetched from other nodes alone")

// FetchHeld is Fetch without the registry.
func (s *swarm) FetchHeld(ctx context.Context, t upstream.Target, kind proxy.Kind, f *cache.Fill) error {
	return s.fetch(ctx, t, kind, f, true, func(context.Context, peer.Sink) error { return errHeld })
}

// fetch fills f from other nodes, or by up where this node is the one to ask the registry;
// held keeps all of them from it. A blob that the swarm has found to be wrong as a whole is
// cache.ErrDigestMismatch, as if it had come whole.
func (s *swarm) fetch(ctx context.Context, t upstream.Target, kind proxy.Kind, f *cache.Fill, held bool, up peer.Upstream) error {
	want := peer.Want{
		Digest: f.Digest(), Registry: t.Registry, Repository: t.Repository,
		Manifest: kind == proxy.KindManifest, Authorization: t.Authorization, Node: asNode(t), Attempt: f.Mismatches(),
		Size: s.agent.proxy.Listed(t, f.Digest()), Held: held,
	}
	err := s.Swarm.Fetch(ctx, want, swarmFill{f, t.Registry, want.Size}, up)
	if errors.Is(err, peer.ErrVoid) {
		err = fmt.Errorf("%w: %w", cache.ErrDigestMismatch, err)
	}
	return err
}

// asNode reports whether t is asked for with a node's own credentials.
func asNode(t upstream.Target) bool { return t.Authorization == "" && !t.Anonymous }

// Resolve asks the repository's home.
func (s *swarm) Resolve(ctx context.Context, t upstream.Target, tag string, accept []string) (ocispec.Descriptor, error) {
	d, err := s.Swarm.Resolve(ctx, peer.Reference{
		Registry: t.Registry, Repository: t.Repository, Tag: tag, Accept: accept, Authorization: t.Authorization, Node: asNode(t),
	})
	found := ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
	if err == nil && d.Stale {
		return ocispec.Descriptor{}, &proxy.StaleTag{Descriptor: found}
	}
	return found, answerOf(t, "resolve", err)
}

// May asks the repository's home.
func (s *swarm) May(ctx context.Context, t upstream.Target, q proxy.Question) (age time.Duration, err error) {
	age, err = s.Swarm.May(ctx, peer.Reference{
		Registry: t.Registry, Repository: t.Repository, Tag: q.Reference, Blob: q.Blob, Known: q.Known, Stored: q.Stored,
		Authorization: t.Authorization, Node: asNode(t),
	})
	if errors.Is(err, peer.ErrImported) {
		return 0, proxy.ErrImported
	}
	return age, answerOf(t, "authorize", err)
}

// Holds reports whether some other node says that it has d.
func (s *swarm) Holds(d digest.Digest) bool { return len(s.Holders(d)) > 0 }

// Remember says that this node knows what a tag stood for, and Forget that it does not.
func (s *swarm) Remember(t upstream.Target, tag string) { s.Swarm.Remember(tagOf(t, tag)) }
func (s *swarm) Forget(t upstream.Target, tag string)   { s.Swarm.Forget(tagOf(t, tag)) }

func tagOf(t upstream.Target, tag string) peer.Reference {
	return peer.Reference{Registry: t.Registry, Repository: t.Repository, Tag: tag}
}

// answerOf turns a home's refusal back into the registry's own.
func answerOf(t upstream.Target, op string, err error) error {
	if r, ok := errors.AsType[*peer.Refusal](err); ok {
		return &upstream.Error{Registry: t.Registry, Repository: t.Repository, Op: op, Status: r.Status, Challenge: r.Challenge, Err: r}
	}
	return err
}

// swarmOrigin is how a home turns to the registry for others.
type swarmOrigin struct{ *swarm }

var _ peer.Origin = swarmOrigin{}

// targetOf is what another node asks about, on behalf of the caller that it
// names.
func targetOf(registry, repository, authorization string, node bool) upstream.Target {
	return upstream.Target{Registry: registry, Repository: repository, Authorization: authorization, Anonymous: authorization == "" && !node}
}

func wanted(w peer.Want) (upstream.Target, proxy.Kind) {
	kind := proxy.KindBlob
	if w.Manifest {
		kind = proxy.KindManifest
	}
	return targetOf(w.Registry, w.Repository, w.Authorization, w.Node), kind
}

// Fill starts this node's own fill of a blob, for a caller that was admitted,
// and does not wait for it.
func (o swarmOrigin) Fill(_ context.Context, w peer.Want) error {
	t, kind := wanted(w)
	return o.agent.proxy.Prefetch(t, kind, w.Digest, w.Size)
}

// Resolve asks the registry what a tag stands for. When that cannot be asked,
// it says what this node knows.
func (o swarmOrigin) Resolve(ctx context.Context, r peer.Reference) (peer.Descriptor, error) {
	t := targetOf(r.Registry, r.Repository, r.Authorization, r.Node)
	if r.Memory {
		d, err := o.agent.proxy.RememberedFor(t, r.Tag, r.Accept)
		return peer.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, Stale: true}, refusalOf(err)
	}
	d, stale, err := o.agent.proxy.ResolveFor(ctx, t, r.Tag, r.Accept)
	return peer.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, Stale: stale}, refusalOf(err)
}

// May asks the registry whether it lets the asker read what r names.
func (o swarmOrigin) May(ctx context.Context, r peer.Reference) (age time.Duration, err error) {
	t := targetOf(r.Registry, r.Repository, r.Authorization, r.Node)
	q := proxy.Question{Reference: r.Tag, Blob: r.Blob, Known: r.Known, Stored: r.Stored}
	if r.Memory {
		return 0, refusalOf(o.agent.proxy.MayByMemory(t, q))
	}
	age, err = o.agent.proxy.MayFor(ctx, t, q)
	return age, refusalOf(err)
}

// Admit asks whether another node's caller may have the blob.
func (o swarmOrigin) Admit(ctx context.Context, w peer.Want) error {
	t, kind := wanted(w)
	return o.agent.proxy.Admit(ctx, t, kind, w.Digest)
}

// Reaches reports whether this node gets connections to the registry.
func (o swarmOrigin) Reaches(registry string) bool { return o.agent.upstream.Reaches(registry) }

// Connect tries to reach the registry.
func (o swarmOrigin) Connect(ctx context.Context, registry string) error {
	return o.agent.upstream.Connect(ctx, registry)
}

// Keep fetches what another node asks this one to keep.
func (o swarmOrigin) Keep(ctx context.Context, c peer.Copy) error {
	return refusalOf(o.agent.replicas.keep(ctx, c))
}

// refusalOf keeps, of the registry's answer or an operator's rule, what another node
// needs to give its client the same answer.
func refusalOf(err error) error {
	if errors.Is(err, proxy.ErrImported) {
		return peer.ErrImported
	}
	if e, ok := errors.AsType[*upstream.Error](err); ok && e.Status != 0 {
		return &peer.Refusal{Status: e.Status, Text: e.Error(), Challenge: e.Challenge}
	}
	return err
}

// swarmStore shows peers what this node has: its cache, running fills
// included, and the runtime's own store.
type swarmStore struct{ *Agent }

var _ peer.Store = swarmStore{}

// Lookup opens a blob for peers.
func (s swarmStore) Lookup(d digest.Digest) (peer.StoredBlob, bool) {
	if r, ok := s.cache.LookupPieces(d); ok {
		return piecesOf{r}, true
	}
	if s.runtime == nil {
		return nil, false
	}
	b, err := s.runtime.Open(d)
	if err != nil {
		return nil, false
	}
	return runtimePieces{b}, true
}

// Gives reports whether a blob may be given to callers that may have what
// registry gives.
func (s swarmStore) Gives(d digest.Digest, registry string) bool { return s.proxy.Gives(d, registry) }

// piecesOf is a cache's reader as peers see it.
type piecesOf struct{ *cache.Reader }

func (p piecesOf) Has(i int) bool { return p.HasPiece(i) }

// runtimePieces is a blob of the runtime's store as peers see it: all of it is
// there, and the end of it once its digest has matched.
type runtimePieces struct{ *runtimestore.Blob }

func (p runtimePieces) Has(i int) bool {
	return i >= 0 && int64(i)*cache.PieceSize(p.Size()) < p.Size()
}

// Changed is nil: nothing will change.
func (p runtimePieces) Changed() <-chan struct{} { return nil }

// swarmFill is a fill as the swarm sees it.
type swarmFill struct {
	*cache.Fill
	registry string
	listed   int64 // size by the manifest; 0 if unknown
}

var _ peer.Fill = swarmFill{}

// SetSize takes a member's word, but not against the manifest's: a wrong size would
// end the fill, on every node that believed the same home.
func (f swarmFill) SetSize(n int64) error {
	if f.listed > 0 && f.Size() < 0 && n != f.listed {
		return fmt.Errorf("%d bytes, not %d as listed: %w", n, f.listed, cache.ErrSizeMismatch)
	}
	return f.Fill.SetSize(n)
}

// homeSink is the swarm's view of a fill as upstream wants it.
type homeSink struct {
	peer.Sink
	fill *cache.Fill
}

var _ upstream.Sink = homeSink{}

func (s homeSink) PieceSize() int64 { return s.fill.PieceSize() }

// SetSize takes the registry's word, whatever the manifest says.
func (s homeSink) SetSize(n int64) error {
	if err := s.fill.SetSize(n); err != nil {
		return err
	}
	return s.Sink.SetSize(n)
}

// From labels bytes with the node they came from; "" is the registry.
func (f swarmFill) From(node string) io.WriterAt {
	if node == "" {
		return f.Writer(cache.Origin{Kind: cache.FromUpstream, Name: f.registry})
	}
	return f.Writer(cache.Origin{Kind: cache.FromPeer, Name: node})
}

// Attempt counts a mismatch of the fill as the one after those that made earlier attempts void.
func (f swarmFill) Attempt(n int) { f.RaiseMismatches(n) }

// WritePiece takes a member's piece that the cache finds right.
func (f swarmFill) WritePiece(node string, piece int, p []byte, from, to [sha256.Size]byte) error {
	err := f.Writer(cache.Origin{Kind: cache.FromPeer, Name: node}).WritePiece(piece, p, from, to)
	if errors.Is(err, cache.ErrLink) {
		err = fmt.Errorf("%w: %w", peer.ErrWrongPiece, err)
	}
	return err
}

// announce and withdraw tell the swarm what comes and goes. A blob that the
// cache and the runtime both hold is withdrawn when the last of them loses it.
func (a *Agent) announce(d digest.Digest, _ int64) {
	if a.swarm != nil {
		a.swarm.Announce(d)
	}
}

func (a *Agent) cacheMismatched(d digest.Digest, times int) {
	if a.swarm != nil {
		a.swarm.Void(d, times)
	}
}

// factsLost is called when the cache's metadata was deleted, most often with all that is
// beside it, or is another directory's.
func (a *Agent) factsLost() {
	if a.proxy == nil { // not yet, while the cache is opened
		return
	}
	a.keepVerdictKey()
	a.proxy.ForgetFacts(a.verdictKey)
}

func (a *Agent) cacheRemoves(d digest.Digest) {
	a.pins.lost(d)
	// Knows, not Has: of what the index of the runtime's store never had, runtimeRemoved is not told.
	if a.swarm != nil && (a.runtime == nil || !a.runtime.Knows(d)) {
		a.swarm.Withdraw(d)
	}
}

func (a *Agent) runtimeRemoved(d digest.Digest) {
	if a.swarm != nil && !a.cache.Has(d) {
		a.swarm.Withdraw(d)
	}
}

// few reports whether fewer other nodes than that are known to hold d.
func (s *swarm) few(d digest.Digest, others int) bool {
	return s != nil && s.Others(peer.Copy{Want: peer.Want{Digest: d}}) < others
}

// check waits, for readiness, until the first attempt to join was made; a lone
// node is ready whatever its result.
func (s *swarm) check() error {
	select {
	case <-s.Joined():
		return nil
	default:
		return errors.New("no attempt to join other nodes was made yet")
	}
}

// status is what the swarm knows at this moment; a lone node knows nothing.
func (s *swarm) status() peer.Status {
	if s == nil {
		return peer.Status{}
	}
	return s.Status()
}

// Members lists the cluster as this node sees it, this node included, by zone
// and name; none when it is alone.
func (a *Agent) Members() []Member { return membersOf(a.swarm.status()) }

// membersOf is Members, of a status.
func membersOf(st peer.Status) []Member {
	links := make(map[string]bool, len(st.Links))
	for _, l := range st.Links {
		links[l.Node] = true
	}
	out := make([]Member, 0, len(st.Members))
	for _, m := range st.Members {
		moved := st.Traffic[m.Node]
		one := Member{Name: m.Node, Address: m.Addr, Zone: m.Zone, State: StateAlive, Self: m.Name == st.Self.Name,
			Linked: links[m.Node], Sent: moved.Sent, Received: moved.Received}
		if st.Unreachable[m.Name] {
			one.State = StateUnreachable
		}
		if until, banned := st.Banned[m.Node]; banned {
			one.State, one.BannedUntil = StateBanned, until
		}
		out = append(out, one)
	}
	slices.SortFunc(out, func(a, b Member) int {
		return cmp.Or(strings.Compare(a.Zone, b.Zone), byNumber(a.Name, b.Name))
	})
	return out
}

// zonesOf sums up members, which are ordered by zone.
func zonesOf(members []Member) []ZoneStatus {
	out := []ZoneStatus{}
	for _, m := range members {
		if len(out) == 0 || out[len(out)-1].Zone != m.Zone {
			out = append(out, ZoneStatus{Zone: m.Zone})
		}
		z := &out[len(out)-1]
		z.Members++
		z.Sent += m.Sent
		z.Received += m.Received
		if m.Linked {
			z.Linked++
		}
		if !m.BannedUntil.IsZero() {
			z.Banned++
		}
	}
	return out
}

// byNumber orders node-2 before node-10.
func byNumber(a, b string) int {
	stem := func(s string) string { return strings.TrimRight(s, "0123456789") }
	return cmp.Or(strings.Compare(stem(a), stem(b)), cmp.Compare(len(a), len(b)), strings.Compare(a, b))
}

// holders names the nodes that say they have d.
func (s *swarm) holders(d digest.Digest) []string {
	if s == nil {
		return nil
	}
	return s.Holders(d)
}

// describe is one line for `larder status`.
func (s *swarm) describe(p PeerConfig, st peer.Status) string {
	switch {
	case !p.Enabled:
		return "off (peer.enabled = false)"
	case s == nil:
		return "alone (no peer.key_file and no peer.join)"
	}
	if st.Alone != nil {
		return fmt.Sprintf("alone: no other node answers (%v); is its TCP and UDP port open, and the key the same?", st.Alone)
	}
	members := CountText(len(st.Members), "member")
	if len(st.Members) == 1 {
		members = "no other member so far"
	}
	line := fmt.Sprintf("%s, %s, %d blobs and tags in the index", members, CountText(len(st.Links), "link"), st.Index.Blobs)
	if len(st.Banned) > 0 {
		line += fmt.Sprintf(", %d banned", len(st.Banned))
	}
	return line
}

const (
	keyLength = 32 // bytes, as `larder keygen` makes them
	// maxKeys is one more than a roll needs: the new key, the old, and one that a
	// node was forgotten with.
	maxKeys = 3
)

// readKeys reads peer.key_file: a key in base64 on each line, the one to use
// first, then those still accepted while a roll is under way. Errors never
// repeat what is in the file.
func readKeys(path string) ([][]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", errors.Unwrap(err))
	}
	defer f.Close()
	var keys [][]byte
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(key) != keyLength {
			return nil, fmt.Errorf("line %d is not %d bytes in base64; write the file with `larder keygen`", n, keyLength)
		}
		keys = append(keys, key)
	}
	switch err := lines.Err(); {
	case err != nil:
		return nil, fmt.Errorf("cannot be read: %w", err)
	case len(keys) == 0:
		return nil, errors.New("holds no key; write one with `larder keygen`")
	case len(keys) > maxKeys:
		return nil, fmt.Errorf("holds more than %d keys; keep the new one, and the old one while it is rolled", maxKeys)
	}
	return keys, nil
}

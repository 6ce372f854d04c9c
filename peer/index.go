package peer

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Bounds of the index. It is a hint: what does not fit is not known.
const (
	shardCount   = 4096
	maxIndexed   = 1 << 19 // blobs
	maxPostings  = 4 << 20
	enoughCopies = 64        // holders known of a blob: more are not announced
	enoughZone   = 16        // of them in the announcer's zone
	maxHolders   = 96        // kept per blob
	maxSlots     = 1<<16 - 1 // members a posting can name
	namedHolders = 8         // told to one who asks
	tombstone    = 2 * time.Minute
)

// index knows who holds which whole blobs: the first eight bytes of a digest lead to the
// numbers of the members that announced it. What this node itself holds is not in it but in
// own, which has a lock of its own; nobody takes both.
//
// It is fed by gossip (announce.go), by deltas of members of which something was missed
// (delta.go), and by a snapshot where much was missed (snapshot.go). run does everything
// that takes time.
//
// A posting is two bytes. A member's death is one mark on its slot, which lookups honour at
// once; its postings are swept later, and only then is the slot's number reused. Lookups do
// no I/O.
type index struct {
	s       *Swarm
	begun   time.Time // constant
	adopted time.Time // last snapshot; only run touches it

	mu       sync.RWMutex // guards the following
	shards   [shardCount]map[uint64][]uint16
	blobs    int
	postings int
	slots    []slot
	free     []uint16          // slots whose numbers no posting has any more
	byID     map[uint64]uint16 // member id to slot
	sweep    int               // next shard to sweep
	sweeping map[uint16]bool   // whose postings the sweep under way drops
	behind   int               // members that more was heard of than is known
	settled  bool              // knows what others have, as far as it ever does

	own own
}

// slot is one member (one start of one node).
type slot struct {
	id    uint64 // hash of the member's name
	name  string // empty while not a member
	zone  string
	seq   uint32    // next operation expected of it
	known uint32    // the highest heard of; larger than seq means a gap
	since uint32    // seq when the first page of all that it holds was made
	posts int32     // postings, with those that a sweep under way has dropped
	ahead []said    // what came before that which it follows
	fell  time.Time // when its member died, while name is empty
	asked time.Time // last delta fetch, or when the gap was first seen; zero = none
}

// said is a run of a member's operations.
type said struct {
	first uint32
	ops   []op
}

func (s said) end() uint32 { return s.first + uint32(len(s.ops)) }

func newIndex(s *Swarm) *index {
	now := time.Now()
	return &index{s: s, byID: make(map[uint64]uint16), begun: now, own: own{held: make(map[uint64]bool), looked: now}}
}

// prefixOf is what the index knows a digest by. Two that share it are taken for one: asking a
// holder of the other costs a moment.
func prefixOf(k key) uint64 { return binary.BigEndian.Uint64(k[:]) }

func shardOf(p uint64) int { return int(p >> 52) }

// memberID stands for a member in messages. It covers the start, so that a
// restart voids what the node said before (a new epoch).
func memberID(name string) uint64 { return hash64(name) }

// joined makes room for members; what they said before is dropped (applyLocked), and made up
// for by a delta.
func (x *index) joined(ms []Member) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, m := range ms {
		x.joinedLocked(memberID(m.Name), m)
	}
}

func (x *index) joinedLocked(id uint64, m Member) {
	i, known := x.byID[id]
	switch {
	case known: // it had been taken for dead
		s := &x.slots[i]
		s.name, s.zone, s.fell = m.Name, m.Zone, time.Time{}
		if x.sweep > 0 && x.sweeping[i] { // of what it said a part is swept: it is asked for all of it
			delete(x.sweeping, i)
			x.voidLocked(map[uint16]bool{i: true})
			s.known, s.seq, s.ahead = max(s.known, s.seq), 0, nil
		}
		return
	case len(x.free) > 0:
		i = x.free[len(x.free)-1]
		x.free = x.free[:len(x.free)-1]
	case len(x.slots) < maxSlots:
		i = uint16(len(x.slots))
		x.slots = append(x.slots, slot{})
	default:
		return // what it holds is not known
	}
	x.slots[i] = slot{id: id, name: m.Name, zone: m.Zone}
	x.byID[id] = i
}

// fell marks a dead member.
func (x *index) fell(name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if i, ok := x.byID[memberID(name)]; ok {
		x.slots[i].name, x.slots[i].fell = "", time.Now()
	}
}

// postLocked adds or removes one posting.
func (x *index) postLocked(p uint64, i uint16, add bool) {
	sh := x.shards[shardOf(p)]
	hs := sh[p]
	at := slices.Index(hs, i)
	switch {
	case add && at < 0:
		if len(hs) >= maxHolders || x.slots[i].posts >= maxOwn || x.postings >= maxPostings || (hs == nil && x.blobs >= maxIndexed) {
			return
		}
		if sh == nil {
			sh = make(map[uint64][]uint16)
			x.shards[shardOf(p)] = sh
		}
		if hs == nil {
			x.blobs++
		}
		sh[p] = append(grow(hs), i)
		x.postings++
		x.slots[i].posts++
	case !add && at >= 0:
		hs[at] = hs[len(hs)-1]
		x.cutLocked(sh, p, hs[:len(hs)-1], 1)
		x.slots[i].posts--
	}
}

// grow makes room for one more, in steps that waste less than doubling does.
func grow(hs []uint16) []uint16 {
	if len(hs) < cap(hs) {
		return hs
	}
	n := make([]uint16, len(hs), len(hs)+max(2, len(hs)/4))
	copy(n, hs)
	return n
}

// dropLocked removes members' postings from a shard.
func (x *index) dropLocked(sh map[uint64][]uint16, members map[uint16]bool) {
	for p, hs := range sh {
		kept := slices.DeleteFunc(hs, func(i uint16) bool { return members[i] })
		if gone := len(hs) - len(kept); gone > 0 {
			x.cutLocked(sh, p, kept, gone)
		}
	}
}

func (x *index) cutLocked(sh map[uint64][]uint16, p uint64, hs []uint16, gone int) {
	x.postings -= gone
	if len(hs) == 0 {
		delete(sh, p)
		x.blobs--
		return
	}
	sh[p] = hs
}

// holders returns live members, at most n, those of the zone first, in random
// order.
func (x *index) holders(p uint64, zone string, n int) []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	hs := x.shards[shardOf(p)][p]
	if len(hs) == 0 {
		return nil
	}
	var near, far []string
	start := rand.IntN(len(hs))
	for j := range hs {
		s := &x.slots[hs[(start+j)%len(hs)]]
		switch {
		case s.name == "":
		case s.zone == zone:
			near = append(near, s.name)
		default:
			far = append(far, s.name)
		}
		if len(near) >= n {
			break
		}
	}
	near = append(near, far...)
	return near[:min(len(near), n)]
}

// counts reports how many live holders of a blob are known.
func (x *index) counts(p uint64, zone string) (all, inZone int) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for _, i := range x.shards[shardOf(p)][p] {
		s := &x.slots[i]
		if s.name == "" {
			continue
		}
		all++
		if s.zone == zone {
			inZone++
		}
	}
	return all, inZone
}

// sweepSome drops the postings of the dead, a part of the shards at a time, and
// frees slots whose postings are all gone.
func (x *index) sweepSome(now time.Time, shards int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	dead := x.deadLocked(now)
	if len(dead) == 0 { // or all of them are back, see joinedLocked
		x.sweep = 0
		return
	}
	for range shards {
		x.dropLocked(x.shards[x.sweep], dead)
		if x.sweep++; x.sweep == shardCount {
			x.sweep = 0
			x.freeLocked(dead)
			return
		}
	}
}

// deadLocked is the members that fell before the sweep under way began, so that
// each of them is swept from every shard.
func (x *index) deadLocked(now time.Time) map[uint16]bool {
	if x.sweep > 0 {
		return x.sweeping
	}
	dead := make(map[uint16]bool)
	for i := range x.slots {
		if s := &x.slots[i]; s.name == "" && s.id != 0 && now.Sub(s.fell) > tombstone {
			dead[uint16(i)] = true
		}
	}
	x.sweeping = dead
	return dead
}

func (x *index) freeLocked(dead map[uint16]bool) {
	for i := range dead {
		if s := &x.slots[i]; s.name == "" {
			delete(x.byID, s.id)
			x.slots[i] = slot{}
			x.free = append(x.free, i)
		}
	}
}

// Holders names the nodes that say they hold a blob, as far as this one knows, those of its zone
// first; itself is not among them. For a digest that is not SHA-256, none are known.
func (s *Swarm) Holders(d digest.Digest) []string {
	k, err := parseKey(d.String())
	if err != nil {
		return nil
	}
	var nodes []string
	for _, name := range s.index.holders(prefixOf(k), s.cfg.Zone, maxHolders) {
		if node, _, ok := cutStart(name); ok {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

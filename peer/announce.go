package peer

import (
	"cmp"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// What this node tells everybody about itself: hold and drop note it, ripen decides what is
// worth saying, messages packs it, and heard takes in what others say. A member's operations are
// numbered from 0 since its start and applied in that order.

const (
	announceMost  = 30 * time.Second      // the longest random delay before an announcement
	announceNode  = 10 * time.Millisecond // of it per member
	batchEvery    = 500 * time.Millisecond
	maxMessage    = 1100 // bytes; memberlist drops silently what does not fit 1,400 with its own
	messageHead   = 1 + 8 + 4
	opSize        = 9
	opsPerMessage = (maxMessage - messageHead) / opSize
	logSize       = 4096    // own operations kept for deltas
	maxOwn        = 1 << 17 // blobs of one node
	maxAhead      = 8
	settleLeast   = 10 * time.Second // after its start a node may still hear of what it missed
	settleMost    = time.Minute
	lookOver      = 5 * time.Minute // after which blobs with few known holders are announced after all
	indexMessage  = 1               // type byte; see indexVector
)

// own is what this node holds and what it has said about it.
type own struct {
	mu      sync.Mutex      // guards the following
	held    map[uint64]bool // by prefix: whether it was announced
	due     []waiting
	pending []op      // announced, not yet in a message
	log     []op      // the last operations, ending before seq; at least logSize of them, if there were so many
	seq     uint32    // of the next operation
	looked  time.Time // when what was not worth announcing was last made due again, see lookOver
}

// waiting is an announcement that is due then.
type waiting struct {
	at     time.Time
	most   time.Duration // that it could have had to wait
	prefix uint64
}

// wait is when to announce a blob, if by then not many are known to have it.
func (x *index) wait(now time.Time, p uint64) waiting {
	most := min(announceMost, time.Duration(len(x.s.roster.view.Load().all))*announceNode)
	return waiting{now.Add(rand.N(most + 1)), most, p}
}

// op is one change of what a member holds.
type op struct {
	add    bool
	prefix uint64
}

func appendOp(b []byte, o op) []byte {
	return binary.BigEndian.AppendUint64(append(b, flag(o.add, 1)), o.prefix)
}

func (c *cursor) op() op { return op{add: c.u8()&1 != 0, prefix: c.u64()} }

// Announce says that this node holds the blob, in its cache or in its runtime's
// store. Others hear of it after a random delay, and only if few holders are
// known by then. It blocks on nothing; what is announced before Run is told
// once Run runs.
func (s *Swarm) Announce(d digest.Digest) {
	if k, err := parseKey(d.String()); err == nil {
		s.index.hold(prefixOf(k))
	}
}

// hold notes that this node has what a prefix stands for, if that is news.
func (x *index) hold(p uint64) {
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	if _, known := x.own.held[p]; known || len(x.own.held) >= maxOwn {
		return
	}
	x.own.held[p] = false
	x.own.due = append(x.own.due, x.wait(time.Now(), p))
}

// Withdraw says that this node is about to lose the blob, or has lost it. It blocks on
// nothing. When it returns, neighbours have been told, and no request for a piece is granted
// unless the store still has the blob and somebody asks for it anew. What was granted before
// is sent if the store can open it, and otherwise refused as gone.
func (s *Swarm) Withdraw(d digest.Digest) {
	k, err := parseKey(d.String())
	if err != nil {
		return
	}
	for attempt := range byte(lastAttempt + 1) {
		s.ifBlob(blobID{k, attempt}, func(b *blob) { b.withdraw(); b.forgetSums() })
	}
	s.index.drop(prefixOf(k))
}

// drop takes hold back.
func (x *index) drop(p uint64) {
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	announced := x.own.held[p]
	delete(x.own.held, p)
	if announced {
		x.own.sayLocked(op{prefix: p})
	}
}

// holds reports whether this node said, or will say, that it holds a blob.
func (x *index) holds(p uint64) bool {
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	_, held := x.own.held[p]
	return held
}

// sayLocked numbers an operation and queues it for the next message.
func (o *own) sayLocked(p op) {
	o.pending = append(o.pending, p)
	o.log = append(o.log, p)
	if len(o.log) > 2*logSize {
		o.log = slices.Clone(o.log[len(o.log)-logSize:])
	}
	o.seq++
}

// run keeps the index until ctx ends.
func (x *index) run(ctx context.Context) {
	tick := time.NewTicker(batchEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now := time.Now()
		x.ripen(now)
		for _, m := range x.messages() {
			x.tell(m)
		}
		x.sweepSome(now, shardCount/16)
		x.chase(now)
		x.gauge()
	}
}

func (x *index) gauge() {
	x.mu.RLock()
	defer x.mu.RUnlock()
	x.s.metrics.blobs.Set(float64(x.blobs))
	x.s.metrics.holders.Set(float64(x.postings))
}

// ripen announces what has waited long enough and is still worth a message. After a start
// that can be judged only when this node has met the others and knows what they have:
// otherwise each node that restarts would tell all others about all its blobs.
func (x *index) ripen(now time.Time) {
	x.mu.Lock()
	newcomer := !x.settled && x.behind >= manyLate
	x.settled = x.settled || !newcomer && now.Sub(x.begun) > settleLeast || now.Sub(x.begun) > settleMost
	x.mu.Unlock()
	x.own.mu.Lock()
	var ripe []uint64
	var due []waiting
	for _, w := range x.own.due {
		if now.Before(w.at) || newcomer && now.Sub(w.at) < announceMost {
			due = append(due, w)
		} else if again := x.wait(now, w.prefix); again.most > 2*w.most {
			due = append(due, again)
		} else {
			ripe = append(ripe, w.prefix)
		}
	}
	x.own.due = due
	if now.Sub(x.own.looked) > lookOver {
		x.own.looked = now
		for p, announced := range x.own.held {
			if !announced {
				x.own.due = append(x.own.due, waiting{now.Add(rand.N(lookOver)), lookOver, p})
			}
		}
	}
	x.own.mu.Unlock()
	for _, p := range ripe {
		if all, zone := x.counts(p, x.s.cfg.Zone); all < enoughCopies && zone < enoughZone {
			x.say(p)
		}
	}
}

func (x *index) say(p uint64) {
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	if announced, held := x.own.held[p]; held && !announced {
		x.own.held[p] = true
		x.own.sayLocked(op{add: true, prefix: p})
	}
}

// messages packs pending operations.
func (x *index) messages() (out [][]byte) {
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	first := x.own.seq - uint32(len(x.own.pending))
	for ops := range slices.Chunk(x.own.pending, opsPerMessage) {
		out = append(out, appendMessage(nil, memberID(x.s.self.Name), first, ops))
		first += uint32(len(ops))
	}
	x.own.pending = nil
	return out
}

func appendMessage(b []byte, id uint64, first uint32, ops []op) []byte {
	b = append(b, indexMessage)
	b = binary.BigEndian.AppendUint64(b, id)
	b = binary.BigEndian.AppendUint32(b, first)
	for _, o := range ops {
		b = appendOp(b, o)
	}
	return b
}

func parseMessage(p []byte) (id uint64, first uint32, ops []op, err error) {
	c := cursor{b: p}
	if c.u8() != indexMessage {
		return 0, 0, nil, errWire
	}
	id, first = c.u64(), c.u32()
	if c.bad || len(c.b) == 0 || len(c.b)%opSize != 0 || len(c.b)/opSize > opsPerMessage || first > first+uint32(len(c.b)/opSize) {
		return 0, 0, nil, errWire
	}
	for len(c.b) > 0 {
		ops = append(ops, c.op())
	}
	return id, first, ops, c.done()
}

func (x *index) tell(p []byte) {
	if x.s.gossip != nil {
		x.s.gossip.tell(p)
	}
}

// heard takes in a gossiped message and passes on what is new: memberlist does
// not re-broadcast messages that are not its own.
func (x *index) heard(p []byte) {
	if len(p) > 0 && p[0] == indexVector {
		x.compare(p)
		return
	}
	id, first, ops, err := parseMessage(p)
	if err != nil || id == memberID(x.s.self.Name) {
		return
	}
	x.mu.Lock()
	news := x.applyLocked(id, first, ops)
	x.mu.Unlock()
	if news {
		x.tell(p)
	}
}

// applyLocked takes operations of a member and reports whether they were news.
// Those that come too early wait for what they follow: an addition overtaken by
// its own removal would otherwise stay forever.
func (x *index) applyLocked(id uint64, first uint32, ops []op) bool {
	i, ok := x.byID[id]
	if !ok {
		return false
	}
	s := &x.slots[i]
	got := said{first, ops}
	if got.end() <= s.seq || slices.ContainsFunc(s.ahead, func(a said) bool { return a.first <= first && got.end() <= a.end() }) {
		return false
	}
	further := got.end() > s.known
	s.known = max(s.known, got.end())
	if first > s.seq {
		if len(s.ahead) >= maxAhead {
			return further // what is known is all that tells news from an echo
		}
		s.ahead = append(s.ahead, got)
		slices.SortFunc(s.ahead, func(a, b said) int { return cmp.Compare(a.first, b.first) })
		return true
	}
	x.followLocked(i, got)
	return true
}

// followLocked files operations that begin at or before what is expected, and
// then those that waited for them.
func (x *index) followLocked(i uint16, got said) {
	s := &x.slots[i]
	for {
		if skip := s.seq - got.first; got.first <= s.seq && int(skip) < len(got.ops) {
			for _, o := range got.ops[skip:] {
				x.postLocked(o.prefix, i, o.add)
			}
			s.seq = got.end()
		}
		if len(s.ahead) == 0 || s.ahead[0].first > s.seq {
			return
		}
		got, s.ahead = s.ahead[0], s.ahead[1:]
	}
}

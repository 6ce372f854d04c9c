package peer

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	announceMost  = 30 * time.Second      // the longest random delay before an announcement
	announceNode  = 10 * time.Millisecond // of it per member
	batchEvery    = 500 * time.Millisecond
	maxMessage    = 1100 // bytes; memberlist drops silently what does not fit 1,400 with its own
	messageHead   = 1 + 8 + 4
	opSize        = 9
	opsPerMessage = (maxMessage - messageHead) / opSize
	opsPerPage    = (maxPayload - 1024) / opSize
	logSize       = 4096    // own operations kept for deltas
	maxOwn        = 1 << 17 // blobs of this node
	maxAhead      = 8
	vectorEntry   = 12
	deltaPause    = 3 * time.Second // gossip mostly closes a gap by itself
	deltasAtOnce  = 4
	maxPatience   = 4                // times deltaPause
	settleLeast   = 10 * time.Second // after its start a node may still hear of what it missed
	settleMost    = time.Minute
	lookOver      = 5 * time.Minute // after which blobs with few known holders are announced after all
	indexMessage  = 1               // type bytes
	indexVector   = 2
)

// own is what this node holds and what it said of it.
type own struct {
	mu      sync.Mutex // guards the following; index.mu may be held while taking it, not the reverse
	held    map[uint64]*holding
	due     []waiting
	pending []op // announced, not yet in a message
	log     []op // the last operations, ending before seq
	seq     uint32
	looked  time.Time
}

type holding struct{ announced bool }

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

// Announce says that this node holds the blob: in its cache, or in its
// runtime's store. Others hear of it after a random delay, and only if not many
// holders are known by then.
func (s *Swarm) Announce(d digest.Digest) {
	k, err := parseKey(d.String())
	if err != nil {
		return
	}
	x := s.index
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	p := prefixOf(k)
	if x.own.held[p] != nil || len(x.own.held) >= maxOwn {
		return
	}
	x.own.held[p] = &holding{}
	x.own.due = append(x.own.due, x.wait(time.Now(), p))
}

// Withdraw says that this node is about to lose the blob. It returns once no
// new upload of it can start; call it before the file is unlinked.
func (s *Swarm) Withdraw(d digest.Digest) {
	k, err := parseKey(d.String())
	if err != nil {
		return
	}
	for attempt := range byte(lastAttempt + 1) {
		s.ifBlob(blobID{k, attempt}, func(b *blob) { b.withdraw() })
	}
	x := s.index
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	p := prefixOf(k)
	h := x.own.held[p]
	delete(x.own.held, p)
	if h != nil && h.announced {
		x.own.sayLocked(op{prefix: p})
	}
}

// holds reports whether this node said, or will say, that it holds a blob.
func (x *index) holds(p uint64) bool {
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	return x.own.held[p] != nil
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

// ripen announces what waited long enough and is still worth a message. After a start
// that can be said when this node has met the others, and knows what they have: else each
// node that restarts would tell all others of all its blobs.
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
		for p, h := range x.own.held {
			if !h.announced {
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
	if h := x.own.held[p]; h != nil && !h.announced {
		h.announced = true
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
// Those that come too early wait for what they follow: an addition that
// overtakes its removal would otherwise stay for ever.
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
	s.known = max(s.known, got.end())
	if first > s.seq {
		if len(s.ahead) < maxAhead {
			s.ahead = append(s.ahead, got)
			slices.SortFunc(s.ahead, func(a, b said) int { return cmp.Compare(a.first, b.first) })
		}
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

// vector is (member, next operation) of everybody, for anti-entropy.
func (x *index) vector() []byte {
	x.own.mu.Lock()
	seq := x.own.seq
	x.own.mu.Unlock()
	x.mu.RLock()
	defer x.mu.RUnlock()
	b := make([]byte, 1, 1+(len(x.slots)+1)*vectorEntry)
	b[0] = indexVector
	add := func(id uint64, seq uint32) {
		b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(b, id), seq)
	}
	add(memberID(x.s.self.Name), seq)
	for i := range x.slots {
		if s := &x.slots[i]; s.name != "" && s.seq > 0 {
			add(s.id, s.seq)
		}
	}
	return b
}

// compare notes who is said to have said more than this node heard.
func (x *index) compare(p []byte) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for c := (cursor{b: p[1:]}); len(c.b) >= vectorEntry; {
		id, seq := c.u64(), c.u32()
		if i, ok := x.byID[id]; ok {
			x.slots[i].known = max(x.slots[i].known, seq)
		}
	}
}

// chase fetches deltas from members that this node missed something of. While it
// is behind many, gossip is in full flow and will close most of the gaps.
func (x *index) chase(now time.Time) {
	x.mu.Lock()
	var late []string
	behind, total := 0, 0
	patience := time.Duration(min(1+x.behind/manyLate, maxPatience))
	for i := range x.slots {
		s := &x.slots[i]
		if s.name == "" || s.known <= s.seq {
			continue
		}
		behind++
		if s.asked.IsZero() {
			s.asked = now // wait once before asking
		}
		pause := deltaPause + rand.N(deltaPause)
		if now.Sub(s.asked) > pause {
			total++
		}
		if now.Sub(s.asked) > patience*pause && len(late) < deltasAtOnce {
			s.asked = now
			late = append(late, s.name)
		}
	}
	x.behind = behind
	x.mu.Unlock()
	if x.bootstrap(now, total) {
		return
	}
	for _, name := range late {
		x.s.spawn(func(ctx context.Context) {
			if err := x.catchUp(ctx, name); err != nil {
				x.s.log.Debug("index delta not fetched", "peer", name, "err", err)
			}
		})
	}
}

// delta is a member's answer to a number: its operations from there on, or with
// whole set everything it announced, from the given position of its sorted
// blobs.
type delta struct {
	whole bool
	more  bool
	seq   uint32 // what the asker knows after this page
	next  uint64 // with whole and more: ask from here
	ops   []op
}

func (d delta) append(b []byte) []byte {
	b = append(b, flag(d.whole, 1)|flag(d.more, 2))
	b = binary.BigEndian.AppendUint32(b, d.seq)
	b = binary.BigEndian.AppendUint64(b, d.next)
	for _, o := range d.ops {
		b = appendOp(b, o)
	}
	return b
}

func parseDelta(p []byte) (delta, error) {
	c := cursor{b: p}
	f := c.u8()
	d := delta{whole: f&1 != 0, more: f&2 != 0, seq: c.u32(), next: c.u64()}
	if c.bad || len(c.b)%opSize != 0 || len(c.b)/opSize > opsPerPage {
		return delta{}, errWire
	}
	for len(c.b) > 0 {
		d.ops = append(d.ops, c.op())
	}
	return d, c.done()
}

// delta answers from the log, or with everything when the log is too short.
func (x *index) delta(seq uint32, from uint64) delta {
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	o := &x.own
	oldest := o.seq - uint32(len(o.log))
	if from == 0 && seq >= oldest && seq <= o.seq {
		ops := o.log[seq-oldest:]
		n := min(len(ops), opsPerPage)
		return delta{more: n < len(ops), seq: seq + uint32(n), ops: slices.Clone(ops[:n])}
	}
	var all []uint64
	for p, h := range o.held {
		if h.announced && p >= from {
			all = append(all, p)
		}
	}
	slices.Sort(all)
	d := delta{whole: true, seq: o.seq}
	for _, p := range all[:min(len(all), opsPerPage)] {
		d.ops = append(d.ops, op{add: true, prefix: p})
	}
	if len(all) > opsPerPage {
		d.more, d.next = true, all[opsPerPage]
	}
	return d
}

var errDelta = errors.New("member's delta makes no progress")

// maxPages bounds one catching up.
const maxPages = 1024

// catchUp asks a member for what it said since.
func (x *index) catchUp(ctx context.Context, name string) error {
	m, ok := x.s.roster.get(name)
	if !ok {
		return nil
	}
	l, err := x.s.connect(ctx, m)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var from uint64
	for range maxPages {
		seq, ok := x.expects(name)
		if !ok {
			return nil
		}
		q := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, seq), from)
		var d delta
		err := l.call(ctx, methodDelta, q, func(c call) (err error) {
			if c.method != statusOK {
				return ErrBusy
			}
			d, err = parseDelta(c.body)
			return err
		})
		if err != nil {
			return err
		}
		x.merge(name, d, from == 0)
		if !d.more {
			return nil
		}
		if d.whole && d.next <= from || !d.whole && d.seq <= seq {
			return errDelta
		}
		from = d.next
	}
	return errDelta
}

func (x *index) expects(name string) (uint32, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	i, ok := x.byID[memberID(name)]
	if !ok {
		return 0, false
	}
	return x.slots[i].seq, true
}

// merge files a page of a delta. The first page of a whole set voids what was
// known of the member.
func (x *index) merge(name string, d delta, first bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	i, ok := x.byID[memberID(name)]
	if !ok {
		return
	}
	s := &x.slots[i]
	if d.whole && first && s.known > 0 && s.seq > 0 {
		x.voidLocked(i)
	}
	if !d.whole {
		x.followLocked(i, said{d.seq - uint32(len(d.ops)), d.ops})
	} else {
		for _, o := range d.ops {
			x.postLocked(o.prefix, i, o.add)
		}
		if !d.more && d.seq > s.seq {
			s.seq = d.seq
			x.followLocked(i, said{first: s.seq})
		}
	}
	s.known = max(s.known, s.seq)
	if !d.more {
		// The member itself knows best what it said; a vector that claimed more lied.
		s.known, s.asked = s.seq, time.Time{}
	}
}

// voidLocked drops a member's postings.
func (x *index) voidLocked(i uint16) {
	for _, sh := range x.shards {
		for p, hs := range sh {
			if at := slices.Index(hs, i); at >= 0 {
				hs[at] = hs[len(hs)-1]
				x.cutLocked(sh, p, hs[:len(hs)-1], 1)
			}
		}
	}
}

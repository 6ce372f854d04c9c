package peer

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"time"
)

// What gossip did not bring is found by comparing how far nodes know each member, and
// fetched from that member itself.

const (
	indexVector  = 2 // type byte, beside indexMessage
	vectorEntry  = 12
	deltaPause   = 3 * time.Second // gossip mostly closes a gap by itself
	maxPatience  = 4               // times deltaPause
	deltasAtOnce = 4
	opsPerPage   = (maxPayload - 1024) / opSize
	maxPages     = 1024 // of one catching up
)

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

// compare notes which members are said to have told more than this node has
// heard.
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

// chase fetches deltas from members of which this node missed something. While
// it is behind many, gossip is in full flow and will close most of the gaps.
func (x *index) chase(now time.Time) {
	x.mu.Lock()
	var late []string
	behind, total := 0, 0
	patience := time.Duration(min(1+x.behind/manyLate, maxPatience))
	for i := range x.slots {
		s := &x.slots[i]
		if s.name == "" || s.known <= s.seq {
			s.asked = time.Time{}
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

// deltaAsk asks a member for its operations from seq on, or for what follows a page of
// everything it announced (delta.whole): from is that page's next, else 0.
type deltaAsk struct {
	seq  uint32
	from uint64
}

func (q deltaAsk) append(b []byte) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(b, q.seq), q.from)
}

func parseDeltaAsk(p []byte) (deltaAsk, error) {
	c := cursor{b: p}
	q := deltaAsk{seq: c.u32(), from: c.u64()}
	return q, c.done()
}

// delta is the answer: operations from the requested number on, or with whole set
// everything the member announced, from the given position of its sorted blobs.
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
func (x *index) delta(q deltaAsk) delta {
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	o := &x.own
	oldest := o.seq - uint32(len(o.log))
	if q.from == 0 && q.seq >= oldest && q.seq <= o.seq {
		ops := o.log[q.seq-oldest:]
		n := min(len(ops), opsPerPage)
		return delta{more: n < len(ops), seq: q.seq + uint32(n), ops: slices.Clone(ops[:n])}
	}
	var all []uint64
	for p, announced := range o.held {
		if announced && p >= q.from {
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

var errNoProgress = errors.New("member's pages make no progress")

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
		body, err := l.askPage(ctx, methodDelta, deltaAsk{seq, from}.append(nil))
		if err != nil {
			return err
		}
		d, err := parseDelta(body)
		if err != nil {
			return err
		}
		x.merge(name, d, from == 0)
		if !d.more {
			return nil
		}
		if d.whole && d.next <= from || !d.whole && d.seq <= seq {
			return errNoProgress
		}
		from = d.next
	}
	return errNoProgress
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
	if d.whole && first {
		s.since = d.seq
		if s.posts > 0 {
			x.voidLocked(map[uint16]bool{i: true})
		}
	}
	if !d.whole {
		x.followLocked(i, said{d.seq - uint32(len(d.ops)), d.ops})
	} else {
		for _, o := range d.ops {
			x.postLocked(o.prefix, i, o.add)
		}
		if !d.more && s.since > s.seq { // what was said since then may belong to a page before this one
			s.seq = s.since
			x.followLocked(i, said{first: s.seq})
		}
	}
	s.known = max(s.known, s.seq)
	if !d.more {
		// The member itself knows best what it said; a vector that claimed more lied.
		s.known, s.asked = max(s.seq, d.seq), time.Time{}
	}
}

// voidLocked drops members' postings. It looks at every posting there is.
func (x *index) voidLocked(members map[uint16]bool) {
	if len(members) == 0 {
		return
	}
	for i := range members {
		x.slots[i].posts = 0
	}
	for _, sh := range x.shards {
		x.dropLocked(sh, members)
	}
}

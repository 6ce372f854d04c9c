package peer

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"time"
)

const (
	manyLate     = 16              // members missed: one snapshot is cheaper than so many deltas
	snapshotIdle = 2 * time.Minute // between snapshots
	pageBytes    = 48 << 10        // about; a page has to fit into one frame
	memberEntry  = 2 + 8 + 4
)

// A snapshot is the index of another node, page by page: first which members
// its slot numbers stand for and how far it knows them, then shard after shard.
// Prefixes of digests are random, so compressing it would gain nothing.
const (
	pageMembers byte = iota
	pageShards
)

// pageAsk asks for one page.
type pageAsk struct {
	kind byte
	from uint16
}

func (q pageAsk) append(b []byte) []byte {
	return binary.BigEndian.AppendUint16(append(b, q.kind), q.from)
}

func parsePageAsk(p []byte) (pageAsk, error) {
	c := cursor{b: p}
	q := pageAsk{kind: c.u8(), from: uint16(c.u16())}
	if q.kind > pageShards {
		return pageAsk{}, errWire
	}
	return q, c.done()
}

// page answers: the next page begins at next, 0 when there is none.
func (x *index) page(q pageAsk) []byte {
	x.mu.RLock()
	defer x.mu.RUnlock()
	b := make([]byte, 2, pageBytes+4096)
	var next int
	if q.kind == pageMembers {
		b, next = x.memberPageLocked(b, int(q.from))
	} else {
		b, next = x.shardPageLocked(b, int(q.from))
	}
	binary.BigEndian.PutUint16(b, uint16(next))
	return b
}

func (x *index) memberPageLocked(b []byte, from int) ([]byte, int) {
	for i := from; i < len(x.slots); i++ {
		if len(b) > pageBytes {
			return b, i
		}
		if s := &x.slots[i]; s.name != "" {
			b = binary.BigEndian.AppendUint16(b, uint16(i))
			b = binary.BigEndian.AppendUint64(b, s.id)
			b = binary.BigEndian.AppendUint32(b, s.seq)
		}
	}
	return b, 0
}

func (x *index) shardPageLocked(b []byte, from int) ([]byte, int) {
	for i := from; i < shardCount; i++ {
		if len(b) > pageBytes/2 && i > from {
			return b, i
		}
		for p, hs := range x.shards[i] {
			if len(b) > pageBytes {
				break // more blobs in one shard than a page holds are not told
			}
			b = append(binary.BigEndian.AppendUint64(b, p), byte(len(hs)))
			for _, h := range hs {
				b = binary.BigEndian.AppendUint16(b, h)
			}
		}
	}
	return b, 0
}

// indexed is a member of the index, and posting says who holds a blob, as pages have
// them.
type indexed struct {
	slot uint16
	id   uint64
	seq  uint32
}

type posting struct {
	prefix uint64
	slots  []uint16
}

func parseMembersPage(p []byte) (next uint16, ms []indexed, err error) {
	c := cursor{b: p}
	next = uint16(c.u16())
	if c.bad || len(c.b)%memberEntry != 0 {
		return 0, nil, errWire
	}
	for len(c.b) > 0 {
		ms = append(ms, indexed{uint16(c.u16()), c.u64(), c.u32()})
	}
	return next, ms, c.done()
}

func parseShardsPage(p []byte) (next uint16, ps []posting, err error) {
	c := cursor{b: p}
	next = uint16(c.u16())
	for len(c.b) > 0 && !c.bad {
		t := posting{prefix: c.u64()}
		for range c.u8() {
			t.slots = append(t.slots, uint16(c.u16()))
		}
		ps = append(ps, t)
	}
	return next, ps, c.done()
}

// adopt fetches the index of another member: which members its numbers stand for and how far
// it knows them, then all postings. Only at the end is it noted that this node knows them as
// far, because only then it does.
func (x *index) adopt(ctx context.Context, m *Member) error {
	l, err := x.s.connect(ctx, m)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	who := make(map[uint16]indexed)
	err = x.pages(ctx, l, pageMembers, func(p []byte) (uint16, error) {
		next, ms, err := parseMembersPage(p)
		for _, m := range ms {
			who[m.slot] = m
		}
		return next, err
	})
	if err != nil {
		return err
	}
	x.adoptMembers(who)
	err = x.pages(ctx, l, pageShards, func(p []byte) (uint16, error) {
		next, ps, err := parseShardsPage(p)
		x.adoptPostings(ps, who)
		return next, err
	})
	if err == nil {
		x.adoptSeqs(who)
	}
	return err
}

// pages asks for page after page; each must begin after the one before.
func (x *index) pages(ctx context.Context, l *link, kind byte, take func([]byte) (uint16, error)) error {
	for from := uint16(0); ; {
		body, err := l.askPage(ctx, methodSnapshot, pageAsk{kind, from}.append(nil))
		if err != nil {
			return err
		}
		next, err := take(body)
		if err != nil || next == 0 {
			return err
		}
		if next <= from {
			return errNoProgress
		}
		from = next
	}
}

// adoptMembers forgets what was known of members that the snapshot knows further: what they took
// back since is no part of it.
func (x *index) adoptMembers(who map[uint16]indexed) {
	x.mu.Lock()
	defer x.mu.Unlock()
	void := make(map[uint16]bool)
	for _, m := range who {
		if i, ok := x.byID[m.id]; ok && x.slots[i].posts > 0 && x.slots[i].seq < m.seq {
			void[i] = true
			x.slots[i].seq = 0
		}
	}
	x.voidLocked(void)
}

func (x *index) adoptPostings(ps []posting, who map[uint16]indexed) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, p := range ps {
		for _, s := range p.slots {
			m, ok := who[s]
			if !ok {
				continue
			}
			if i, ok := x.byID[m.id]; ok && x.slots[i].seq <= m.seq {
				x.postLocked(p.prefix, i, true)
			}
		}
	}
}

func (x *index) adoptSeqs(who map[uint16]indexed) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, m := range who {
		if i, ok := x.byID[m.id]; ok {
			s := &x.slots[i]
			s.seq = max(s.seq, m.seq)
			s.known = max(s.known, s.seq)
			x.followLocked(i, said{first: s.seq})
		}
	}
}

// bootstrap takes a snapshot when too many members were missed; it reports
// whether one is on its way or just came.
func (x *index) bootstrap(now time.Time, late int) bool {
	if late < manyLate {
		return false
	}
	if now.Sub(x.adopted) < snapshotIdle {
		return now.Sub(x.adopted) < 2*deltaPause
	}
	all := x.s.roster.view.Load().all
	m := all[rand.IntN(len(all))]
	if m.Name == x.s.self.Name {
		return true // the next round draws another
	}
	x.adopted = now
	x.s.spawn(func(ctx context.Context) {
		if err := x.adopt(ctx, m); err != nil {
			x.s.log.Debug("index not adopted", "peer", m.Node, "err", err)
		}
	})
	return true
}

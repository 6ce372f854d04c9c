package peer

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Status is a snapshot for people. Building it takes locks briefly; nothing in
// it is shared with the swarm.
type Status struct {
	Self    Member
	Members []Member // this node included, by name
	Links   []LinkStatus
	Blobs   []BlobStatus // being fetched or given, and those that members meet for here
	// Banned is until when, by node: no link with it or, if merely slow, a blob is not
	// asked of it.
	Banned map[string]time.Time
	// Unreachable are members, by Name, that this node could not reach a moment ago. It
	// asks them nothing for some seconds, or longer if it reached nobody at all.
	Unreachable map[string]bool
	// Alone is why Config.Join led to no other member, while there is none.
	Alone   error
	Traffic map[string]Traffic // by node, members or not, since this one started
	Index   IndexStatus
	Uploads int // pieces being sent or queued
}

// LinkStatus is a connection with another node.
type LinkStatus struct {
	Node, Zone string
	Dialed     bool // by this node
}

// Traffic is bytes of pieces that went to and came from one node.
type Traffic struct{ Sent, Received int64 }

// BlobStatus is this node's part in one attempt at one blob (I10), so a digest may appear
// twice.
type BlobStatus struct {
	Digest       digest.Digest
	Size         int64 // 0 while unknown
	Pieces, Here int
	Fetching     bool
	Neighbours   int
	InFlight     int
	Rate         float64          // bytes per second from peers, while some came
	From         map[string]int64 // bytes of pieces by node, of this fetch or the last one
	Members      int              // that meet here, if this node is the home
}

// IndexStatus is the size of the index. A tag that a member remembers counts as a
// blob (see Swarm.Remember): members announce both in the same way.
type IndexStatus struct {
	Blobs, Postings int
	Held            int // blobs this node said it holds, or will say
}

// Status returns what the swarm looks like from here.
func (s *Swarm) Status() Status {
	self := s.self
	self.Addr = s.gossip.ownAddr(self.Addr)
	st := Status{Self: self, Index: s.index.status(), Banned: s.bans.list(), Unreachable: s.roster.downNow(), Alone: s.gossip.whyAlone(),
		Traffic: s.traffic.list(), Uploads: int(s.uploads.load())}
	for _, m := range s.roster.view.Load().all {
		if m.Name == self.Name {
			m = &self
		}
		st.Members = append(st.Members, *m)
	}
	for _, l := range s.allLinks() {
		st.Links = append(st.Links, LinkStatus{Node: l.node, Zone: l.zone, Dialed: l.dialed})
	}
	slices.SortFunc(st.Links, func(a, b LinkStatus) int { return cmp.Compare(a.Node, b.Node) })
	for _, b := range s.allBlobs() {
		if bs := b.status(); bs.Fetching || bs.Neighbours > 0 || bs.Members > 0 {
			st.Blobs = append(st.Blobs, bs)
		}
	}
	slices.SortFunc(st.Blobs, func(a, b BlobStatus) int { return cmp.Compare(a.Digest, b.Digest) })
	return st
}

func (b *blob) status() BlobStatus {
	meeting := b.home.count()
	b.mu.Lock()
	defer b.mu.Unlock()
	return BlobStatus{Digest: b.d, Size: b.size, Pieces: b.n, Here: b.n - b.missing, Fetching: b.fill != nil,
		Neighbours: len(b.nbrs), InFlight: b.flying, Rate: b.pace.rate, From: maps.Clone(b.sources), Members: meeting}
}

func (x *index) status() IndexStatus {
	x.mu.RLock()
	st := IndexStatus{Blobs: x.blobs, Postings: x.postings}
	x.mu.RUnlock()
	x.own.mu.Lock()
	defer x.own.mu.Unlock()
	st.Held = len(x.own.held)
	return st
}

// Joined is closed once the first attempt to join others was made, whatever its
// outcome; a lone node is ready too.
func (s *Swarm) Joined() <-chan struct{} {
	if s.gossip == nil {
		done := make(chan struct{})
		close(done)
		return done
	}
	return s.gossip.tried
}

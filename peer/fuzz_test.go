package peer

import (
	"bytes"
	"net/netip"
	"testing"
)

// FuzzFrames feeds every parser of link frames; what parses must survive a
// round trip, so that a relay cannot be made to say something else.
func FuzzFrames(f *testing.F) {
	f.Add(byte(frameHello), hello{version: wireVersion, name: "a", zone: "z"}.append(nil)[frameHeader:])
	f.Add(byte(frameOpen), open{size: 3 << 20, pieceSize: 256 << 10, have: bitmap{0xff, 0xf0}}.append(nil)[frameHeader:])
	f.Add(byte(frameOpen), open{size: 1, pieceSize: 1, pass: pass{registry: "r", signer: "a"}, have: bitmap{0x80}}.append(nil)[frameHeader:])
	f.Add(byte(frameHave), have{load: 3, runs: []run{{0, 4}, {9, 1}}}.append(nil)[frameHeader:])
	f.Add(byte(frameRequest), want{id: 1, piece: 2, needDigest: true}.append(nil)[frameHeader:])
	f.Add(byte(frameBusy), answer{id: 1, delay: 2, hint: 3}.append(nil, frameBusy)[frameHeader:])
	f.Add(byte(frameDigests), (&batch{signer: "a", pieceSize: 1, pieces: []pieceDigest{{piece: 1}}}).append(nil)[frameHeader:])
	f.Add(byte(frameCall), call{id: 1, method: 2, body: []byte("{}")}.append(nil, frameCall)[frameHeader:])
	f.Fuzz(func(t *testing.T, kind byte, p []byte) {
		if len(p) > maxPayload {
			return
		}
		back := roundTrip(frameType(kind%byte(frameLast)), p)
		if back != nil && !bytes.Equal(back[frameHeader:], p) && !lossy(frameType(kind%byte(frameLast))) {
			t.Errorf("%x became %x", p, back[frameHeader:])
		}
	})
}

// lossy frames have bits that mean nothing.
func lossy(t frameType) bool {
	return t == frameOpen || t == frameRequest || t == frameCall || t == frameReply
}

func roundTrip(t frameType, p []byte) []byte {
	switch t {
	case frameHello:
		if v, err := parseHello(p); err == nil {
			return v.append(nil)
		}
	case frameOpen:
		if v, err := parseOpen(p); err == nil {
			return v.append(nil)
		}
	case frameHave:
		if v, err := parseHave(p); err == nil {
			return v.append(nil)
		}
	case frameRequest:
		if v, err := parseWant(p); err == nil {
			return v.append(nil)
		}
	case frameCancel, frameBusy, frameGone:
		if v, err := parseAnswer(p); err == nil {
			return v.append(nil, t)
		}
	case frameDigests:
		if v, err := parseBatch(p); err == nil {
			return v.append(nil)
		}
	case frameCall, frameReply:
		if v, err := parseCall(p); err == nil {
			return v.append(nil, t)
		}
	}
	return nil
}

// FuzzLink feeds a whole connection to a node's frame handling.
func FuzzLink(f *testing.F) {
	k := key{1}
	s := open{blob: k, size: 1 << 20, pieceSize: 256 << 10, have: bitmap{0xf0}}.append(nil)
	s = have{blob: k, runs: []run{{0, 4}}}.append(s)
	s = want{id: 1, blob: k}.append(s)
	s = call{id: 1, method: methodJoin, body: marshal(joinAsk{Digest: "sha256:00"})}.append(s, frameCall)
	s = answer{id: 1}.append(s, frameBusy)
	f.Add(s)
	w := newTestWorld()
	n := &testNode{world: w}
	sw, err := New(Config{Name: "x", Data: "127.0.0.1:0", Store: n, Origin: n})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { sw.Close() })
	f.Fuzz(func(t *testing.T, in []byte) {
		sim := newSimNet(0, 1)
		ours, _ := sim.pipe(sim.host("a", 1e9, 1e9), sim.host("b", 1e9, 1e9))
		ours.in.buf, ours.in.closed = bytes.Clone(in), true
		l := newLink(sw, ours, Member{Name: "peer~00000000000", Node: "peer"}, false)
		if err := l.read(); err == nil {
			t.Error("a connection that ended goes on")
		}
		l.close(errLinkClosed)
		for _, b := range sw.allBlobs() {
			b.left(l)
			if len(b.nbrs) > maxNeighbours {
				t.Errorf("%d neighbours", len(b.nbrs))
			}
		}
		clear(sw.blobs)
	})
}

// FuzzGossip feeds what comes by gossip and as answers about the index.
func FuzzGossip(f *testing.F) {
	f.Add(appendMessage(nil, 1, 0, []op{{true, 2}}))
	f.Add(delta{whole: true, seq: 3, ops: []op{{true, 1}}}.append(nil))
	f.Add(pageAsk{pageShards, 3}.append(nil))
	f.Add(Member{Addr: "1.2.3.4:5", Home: true, Zone: "z", Key: make([]byte, 32)}.meta())
	f.Fuzz(func(t *testing.T, p []byte) {
		s := &Swarm{self: Member{Name: "self~00000000000"}}
		x := newIndex(s)
		x.joined([]Member{{Name: "peer~00000000001"}})
		x.byID[1] = 0
		x.heard(p)
		x.compare(append([]byte{indexVector}, p...))
		if d, err := parseDelta(p); err == nil {
			x.merge("peer~00000000001", d, true)
		}
		if q, err := parsePageAsk(p); err == nil && q.kind > pageShards {
			t.Errorf("page of kind %d", q.kind)
		}
		if _, ms, err := parseMembersPage(p); err == nil && len(ms)*memberEntry > len(p) {
			t.Errorf("%d members in %d bytes", len(ms), len(p))
		}
		if _, ps, err := parseShardsPage(p); err == nil {
			x.adoptPostings(ps, map[uint16]membersPage{0: {id: 1, seq: 9}})
		}
		if m, err := parseMember("node~00000000001", netip.MustParseAddr("1.2.3.4"), p); err == nil && len(m.meta()) > metaMax {
			t.Errorf("meta of %d bytes", len(m.meta()))
		}
		if x.postings > opsPerPage || x.postings < 0 || x.blobs < 0 {
			t.Errorf("%d postings of %d blobs", x.postings, x.blobs)
		}
	})
}

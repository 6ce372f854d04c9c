package peer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// FuzzFrames feeds every parser of link frames; what parses must survive a
// round trip, so that a relay cannot be made to say something else.
func FuzzFrames(f *testing.F) {
	f.Add(byte(frameHello), hello{name: "a", zone: "z"}.append(nil)[frameHeader:])
	f.Add(byte(frameOpen), open{size: 3 << 20, pieceSize: 256 << 10, have: bitmap{0xff, 0xf0}}.append(nil)[frameHeader:])
	f.Add(byte(frameOpen), open{size: 1, pieceSize: 1, pass: pass{registry: "r", signer: "a"}, have: bitmap{0x80}}.append(nil)[frameHeader:])
	f.Add(byte(frameOpen), open{blob: blobID{attempt: 1}}.append(nil)[frameHeader:])
	f.Add(byte(frameClose), appendClose(nil, blobID{attempt: 1})[frameHeader:])
	f.Add(byte(frameHave), have{load: 3, runs: []run{{0, 4}, {9, 1}}}.append(nil)[frameHeader:])
	f.Add(byte(frameRequest), want{id: 1, piece: 2, needDigest: true}.append(nil)[frameHeader:])
	f.Add(byte(frameBusy), answer{id: 1, delay: 2, hint: 3}.append(nil, frameBusy)[frameHeader:])
	f.Add(byte(frameDigests), (&batch{signer: "a", pieceSize: 1, pieces: []pieceDigest{{piece: 1}}}).append(nil)[frameHeader:])
	f.Add(byte(frameDigests), (&batch{blob: blobID{attempt: 1}, signer: "a", pieceSize: 1, linked: true, pieces: []pieceDigest{{piece: 1}}}).append(nil)[frameHeader:])
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
	case framePing:
		if len(p) == 0 {
			return appendPing(nil)
		}
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
	case frameClose:
		if v, err := parseClose(p); err == nil {
			return appendClose(nil, v)
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
	s := open{blob: blobID{key: k}, size: 1 << 20, pieceSize: 256 << 10, have: bitmap{0xf0}}.append(nil)
	s = have{blob: blobID{key: k}, runs: []run{{0, 4}}}.append(s)
	s = want{id: 1, blob: blobID{key: k}}.append(s)
	s = call{id: 1, method: methodJoin, body: marshal(joinAsk{Digest: "sha256:00"})}.append(s, frameCall)
	s = answer{id: 1}.append(s, frameBusy)
	s = open{blob: blobID{k, 1}, size: 1 << 20, pieceSize: 256 << 10, have: bitmap{0xf0}}.append(s)
	s = appendClose(s, blobID{k, 1})
	f.Add(s)
	_, sw := fuzzNode(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		l := fuzzLink(sw, in)
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

// fuzzNode is a node that does not run, with a registry that is down.
func fuzzNode(f *testing.F) (*testNode, *Swarm) {
	n := &testNode{world: newTestWorld(), blobs: make(map[digest.Digest]*memBlob), refuse: errRegistryDown}
	s, err := New(Config{Name: "x", Data: "127.0.0.1:0", Store: n, Origin: n})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	return n, s
}

// fuzzLink is a link with a peer that said in and hung up.
func fuzzLink(s *Swarm, in []byte) *link {
	sim := newSimNet(0, 1)
	ours, _ := sim.pipe(sim.host("a", 1e9, 1e9), sim.host("b", 1e9, 1e9))
	ours.in.buf, ours.in.closed = bytes.Clone(in), true
	return newLink(s, ours, Member{Name: "peer~00000000000", Node: "peer"}, false)
}

// FuzzQuestions asks a node anything; what it answers it could read itself.
func FuzzQuestions(f *testing.F) {
	n, s := fuzzNode(f)
	held := n.world.add(1000, 1)
	n.give(held)
	missed := digest.FromString("missed")
	for _, d := range []digest.Digest{held, missed, "sha256:00"} {
		f.Add(methodJoin, marshal(joinAsk{Digest: d.String(), Registry: "r", Repository: "a", Have: 3, Pass: true}))
		f.Add(methodJoin, marshal(joinAsk{Digest: d.String(), Peek: true, Stalled: true, Manifest: true}))
		f.Add(methodJoin, marshal(joinAsk{Digest: d.String(), Attempt: 1}))
		f.Add(methodPermit, marshal(permitAsk{Digest: d.String(), Attempt: 1}))
	}
	f.Add(methodResolve, marshal(Reference{Registry: "r", Repository: "a", Tag: "v1", Accept: []string{"x"}}))
	f.Add(methodMay, marshal(Reference{Registry: "r", Repository: "a", Tag: held.String(), Blob: true, Node: true}))
	f.Add(methodKeep, marshal(Copy{Want: Want{Digest: missed, Registry: "r", Repository: "a", Size: 7}, Idle: time.Hour}))
	f.Add(methodKeep, marshal(Copy{Want: Want{Registry: "r", Repository: "a"}, Tag: "v1", Stands: Descriptor{Digest: held}}))
	f.Add(methodDelta, deltaAsk{}.append(nil))
	f.Add(methodSnapshot, pageAsk{pageMembers, 0}.append(nil))
	f.Add(methodSnapshot, pageAsk{pageShards, 3}.append(nil))
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // nobody waits
	s.index.say(1)
	f.Fuzz(func(t *testing.T, method byte, body []byte) {
		l := fuzzLink(s, nil)
		defer l.close(errLinkClosed)
		got, err := s.answer(ctx, l, call{method: method, body: body})
		if err == nil && !readable(method, body, got) {
			t.Errorf("%q to method %d is answered %q", body, method, got)
		}
		for _, b := range s.allBlobs() {
			b.left(l)
		}
		clear(s.blobs)
		clear(s.answers.byKey)
	})
}

// readable reports whether an asker understands an answer.
func readable(method byte, question, got []byte) bool {
	var err error
	switch method {
	case methodJoin:
		err = call{body: got}.into(&joinReply{}, "")
	case methodPermit:
		err = call{body: got}.into(&permitReply{}, "")
	case methodResolve:
		err = call{body: got}.into(&Descriptor{}, "")
	case methodKeep:
		err = call{body: got}.into(&struct{}{}, "")
	case methodDelta:
		_, err = parseDelta(got)
	case methodSnapshot:
		if question[0] == pageMembers {
			_, _, err = parseMembersPage(got)
		} else {
			_, _, err = parseShardsPage(got)
		}
	}
	return err == nil && len(got) <= maxPayload-64
}

// FuzzAnswers has a home answer a node that fetches with anything. Its fill gets
// no byte that is not of the blob.
func FuzzAnswers(f *testing.F) {
	_, s := fuzzNode(f)
	blob := []byte("blob")
	k := key(sha256.Sum256(blob))
	f.Add(statusOK, marshal(joinReply{Size: 4, Body: blob, Pass: make([]byte, 64)}))
	f.Add(statusOK, marshal(joinReply{Size: 4, Body: []byte("glob")}))
	f.Add(statusOK, marshal(joinReply{Size: 1 << 40, Meet: []string{"a~00000000000", "x"}, Vouch: []string{"b~00000000000"}, Stay: true, Moving: true}))
	f.Add(statusOK, marshal(joinReply{Refused: "no"}))
	f.Add(statusOK, marshal(permitReply{Granted: true}))
	f.Add(statusOK, marshal(Descriptor{MediaType: "m", Digest: digest.FromBytes(blob), Size: 4}))
	f.Add(statusRefused, marshal(Refusal{Status: 401, Text: "no", Challenge: []string{"Basic"}}))
	f.Add(statusFailed, []byte("why"))
	f.Fuzz(func(t *testing.T, status byte, body []byte) {
		answer := call{method: status, body: body}
		_ = answer.into(&permitReply{}, "peer") // an error is as good as a value
		_ = answer.into(&Descriptor{}, "peer")
		var reply joinReply
		if answer.into(&reply, "peer") != nil {
			return
		}
		l := fuzzLink(s, nil)
		defer l.close(errLinkClosed)
		fill := &hollowFill{want: blob, size: -1}
		m := &Member{Name: l.peer, Node: l.node}
		x := &fetch{s: s, b: newBlob(s, blobID{key: k}, s.newRandLocked()), w: Want{Registry: "r"}, f: fill}
		x.takePass(m, reply.Pass)
		err := x.accept(m, l, reply)
		if fill.wrong {
			t.Errorf("%q brought wrong bytes", body)
		}
		if err == nil && len(x.b.vouched(nil)) > maxSigners+1 {
			t.Errorf("%d members may sign", len(x.b.vouched(nil)))
		}
		x.b.left(l)
		clear(s.bans.until)
	})
}

// hollowFill knows its size and what it should get, and holds nothing.
type hollowFill struct {
	want  []byte
	size  int64
	wrong bool
}

func (h *hollowFill) Size() int64                         { return h.size }
func (h *hollowFill) Attempt(int)                         {}
func (h *hollowFill) Has(int) bool                        { return false }
func (h *hollowFill) ReadAt([]byte, int64) (int, error)   { return 0, io.EOF }
func (h *hollowFill) Changed() <-chan struct{}            { return nil }
func (h *hollowFill) SetSize(n int64) error               { h.size = n; return nil }
func (h *hollowFill) Missing(int64) (a, b int64, ok bool) { return 0, h.size, true }
func (h *hollowFill) Wanted() int64                       { return 0 }
func (h *hollowFill) From(string) io.WriterAt             { return h }

func (h *hollowFill) WriteAt(p []byte, off int64) (int, error) {
	if off != 0 || !bytes.Equal(p, h.want) {
		h.wrong = true
	}
	return len(p), nil
}

func (h *hollowFill) WritePiece(string, int, []byte, [32]byte, [32]byte) error { return ErrWrongPiece }
func (h *hollowFill) Chain(int) (v [32]byte, ok bool)                          { return v, false }

// FuzzGossip feeds what comes by gossip and as answers about the index.
func FuzzGossip(f *testing.F) {
	f.Add(appendMessage(nil, 1, 0, []op{{true, 2}}))
	f.Add(delta{whole: true, seq: 3, ops: []op{{true, 1}}}.append(nil))
	f.Add(pageAsk{pageShards, 3}.append(nil))
	full, _ := bareIndex(3)
	full.postLocked(7, 0, true)
	full.postLocked(7, 2, true)
	f.Add(full.page(pageAsk{pageMembers, 0}))
	f.Add(full.page(pageAsk{pageShards, 0}))
	f.Add(full.vector())
	f.Add(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64([]byte{indexVector}, 1), 9))
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
			x.adoptPostings(ps, map[uint16]indexed{0: {id: 1, seq: 9}})
		}
		if m, err := parseMember("node~00000000001", netip.MustParseAddr("1.2.3.4"), p); err == nil && len(m.meta()) > metaMax {
			t.Errorf("meta of %d bytes", len(m.meta()))
		}
		if x.postings > opsPerPage || x.postings < 0 || x.blobs < 0 {
			t.Errorf("%d postings of %d blobs", x.postings, x.blobs)
		}
	})
}

package peer

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	goflag "flag"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

var update = goflag.Bool("update", false, "rewrite golden files")

// spoken is a message as nodes of this version say it. again reads it and says it once more;
// nil for what is signed and never read.
type spoken struct {
	name  string
	wire  []byte
	again func(p []byte) ([]byte, error)
}

func frame(name string, wire []byte) spoken { return spoken{"frame: " + name, wire, againFrame} }

// againFrame has the parser of its type read a frame, which is the link's reader for data.
func againFrame(p []byte) ([]byte, error) {
	t, n, err := parseHeader([frameHeader]byte(p))
	if err != nil || t != frameData {
		return roundTrip(t, p[frameHeader:]), err
	}
	r := &request{id: 1, size: 100, got: 2}
	l := &link{s: &Swarm{}, wants: map[uint32]*request{1: r}, traffic: &traffic{}}
	if err := l.readData(bufio.NewReader(bytes.NewReader(p[frameHeader:])), n); err != nil {
		return nil, err
	}
	return dataFrame(1, 2, r.buf[2:r.got]), nil
}

func dataFrame(id, off uint32, piece []byte) []byte {
	b := make([]byte, frameHeader+dataHead)
	putDataHead(b, id, off, len(piece))
	return append(b, piece...)
}

// body is the JSON of a question or an answer.
func body[T any](name string, v T) spoken {
	return spoken{name, marshal(v), func(p []byte) ([]byte, error) {
		v, err := decode[T](p)
		return marshal(v), err
	}}
}

// language is one of each message that a node sends to another one.
func language() []spoken {
	id := blobID{key{1, 2, 3}, 1}
	who := pass{registry: "r", signer: "home~00000000001", sig: [64]byte{4, 5}}
	known := pieceDigest{6, key{7}}
	linked := &batch{blob: id, pieceSize: 1 << 18, signer: "home~00000000001", linked: true, from: key{8}, pieces: []pieceDigest{known}, sig: [64]byte{9}}
	loose := &batch{blob: id, pieceSize: 1 << 18, signer: "home~00000000001", pieces: []pieceDigest{known}, sig: [64]byte{9}}
	want1 := Want{Digest: id.key.digest(), Registry: "r", Repository: "a", Manifest: true, Size: 5, Authorization: "x", Attempt: 1, Held: true, Node: true}
	stands := Descriptor{MediaType: "m", Digest: id.key.digest(), Size: 5, Stale: true}
	member := Member{Name: "node~00000000002", Addr: "1.2.3.4:5051", Zone: "z", Home: true, Key: bytes.Repeat([]byte{3}, ed25519.PublicKeySize)}
	x, _ := bareIndex(3)
	x.slots[1].seq = 9
	x.postLocked(7, 0, true)
	x.postLocked(7, 2, true)
	return []spoken{
		frame("hello", hello{name: "node~00000000001", zone: "z"}.append(nil)),
		frame("ping", appendPing(nil)),
		frame("open", open{blob: id, size: 3 << 18, pieceSize: 1 << 18, pass: who, have: bitmap{0xa0}}.append(nil)),
		frame("open, size unknown", open{blob: id}.append(nil)),
		frame("have", have{blob: id, load: 3, runs: []run{{1, 2}, {5, 1}}}.append(nil)),
		frame("close", appendClose(nil, id)),
		frame("request", want{id: 1, blob: id, piece: 2, needDigest: true}.append(nil)),
		frame("request, passing", want{id: 1, blob: id, piece: 2, passing: true}.append(nil)),
		frame("cancel", answer{id: 1}.append(nil, frameCancel)),
		frame("busy", answer{id: 1, delay: 20, hint: 3}.append(nil, frameBusy)),
		frame("gone", answer{id: 1, hint: noHint}.append(nil, frameGone)),
		frame("digests, linked", linked.append(nil)),
		frame("digests", loose.append(nil)),
		{"signed digests", linked.signed(), nil},
		{"signed pass", who.signed(id.key, "node~00000000002"), nil},
		frame("data", dataFrame(1, 2, []byte("bytes"))),
		frame("call", call{id: 1, method: methodWay, body: []byte("{}")}.append(nil, frameCall)),
		frame("reply", call{id: 1, method: statusCutOff, body: []byte("{}")}.reply(nil)),

		body("join", joinAsk{Digest: "sha256:0", Registry: "r", Repository: "a", Authorization: "x", Node: true, Pass: true, Manifest: true,
			Attempt: 1, Have: 2, Size: 3, Helped: 4, Stalled: true, Peek: true, More: true, Idle: []string{"i"}}),
		body("join's answer", joinReply{Size: 1, Meet: []string{"m"}, Vouch: []string{"v"}, Stay: true, Body: []byte("b"), Moving: true, Source: true,
			Holders: []string{"h"}, Attempt: 1, Help: 2, Refused: "no", CutOff: true, Ways: []string{"w"}, Pass: []byte("p")}),
		body("permit", permitAsk{Digest: "sha256:0", Attempt: 1}),
		body("permit's answer", permitReply{Granted: true}),
		body("resolve, may, way", Reference{Registry: "r", Repository: "a", Tag: "v1", Blob: true, Known: true, Stored: true, Memory: true,
			Accept: []string{"m"}, Authorization: "x", Node: true}),
		body("resolve's answer", stands),
		body("may's answer", leave{Imported: true, Age: time.Minute}),
		body("keep", Copy{Want: want1, Tag: "v1", Stands: stands, Idle: time.Hour}),
		body("refusal", Refusal{Status: 401, Text: "no", Challenge: []string{"Basic"}}),
		body("cut off", []string{"w"}),

		{"delta's question", deltaAsk{5, 6}.append(nil), func(p []byte) ([]byte, error) {
			q, err := parseDeltaAsk(p)
			return q.append(nil), err
		}},
		{"delta", delta{whole: true, more: true, seq: 1, next: 2, ops: []op{{true, 3}, {false, 4}}}.append(nil), func(p []byte) ([]byte, error) {
			d, err := parseDelta(p)
			return d.append(nil), err
		}},
		{"snapshot's question", pageAsk{pageShards, 3}.append(nil), func(p []byte) ([]byte, error) {
			q, err := parsePageAsk(p)
			return q.append(nil), err
		}},
		{"snapshot of members", x.page(pageAsk{pageMembers, 0}), func(p []byte) ([]byte, error) {
			_, ms, err := parseMembersPage(p)
			y, _ := bareIndex(len(ms))
			for _, m := range ms {
				y.slots[m.slot].id, y.slots[m.slot].seq = m.id, m.seq
			}
			return y.page(pageAsk{pageMembers, 0}), err
		}},
		{"snapshot of holders", x.page(pageAsk{pageShards, 0}), func(p []byte) ([]byte, error) {
			_, ps, err := parseShardsPage(p)
			y, _ := bareIndex(3)
			for _, posted := range ps {
				for _, i := range posted.slots {
					y.postLocked(posted.prefix, i, true)
				}
			}
			return y.page(pageAsk{pageShards, 0}), err
		}},
		{"index message", appendMessage(nil, 1, 2, []op{{true, 3}, {false, 4}}), func(p []byte) ([]byte, error) {
			id, first, ops, err := parseMessage(p)
			return appendMessage(nil, id, first, ops), err
		}},
		{"index vector", x.vector(), func(p []byte) ([]byte, error) {
			y, _ := bareIndex(3)
			y.compare(p)
			for i := range y.slots {
				y.slots[i].seq = y.slots[i].known
			}
			return y.vector(), nil
		}},
		{"NodeMeta", member.meta(), func(p []byte) ([]byte, error) {
			m, err := parseMember(member.Name, netip.MustParseAddr("1.2.3.4"), p)
			return m.meta(), err
		}},
	}
}

// TestWireIsAsItWas: what nodes say to each other is what the nodes of this wireVersion always
// said. From the first release on who changes a frame, a gossip message or NodeMeta raises
// wireVersion (and metaVersion, gossipLabel: gossip has no hello). A JSON field may be added
// if an older node does right to ignore it.
func TestWireIsAsItWas(t *testing.T) {
	file := fmt.Sprintf("testdata/wire-%d.txt", wireVersion)
	said := language()
	if *update {
		var out strings.Builder
		for _, m := range said {
			fmt.Fprintf(&out, "%s: %s\n", m.name, printed(m.wire))
		}
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(golden), "\n"), "\n")
	if len(lines) != len(said) {
		t.Fatalf("%s has %d messages, want %d", file, len(lines), len(said))
	}
	frames := make(map[frameType]bool)
	for i, m := range said {
		was := unprinted(strings.TrimPrefix(lines[i], m.name+": "))
		if !bytes.Equal(was, m.wire) {
			t.Errorf("%s\nis now %s\nand was %s\nSee the comment of this test before -update.", m.name, printed(m.wire), printed(was))
			continue
		}
		if m.again != nil {
			if got, err := m.again(was); err != nil || !bytes.Equal(got, was) {
				t.Errorf("%s: its parser reads %s, %v", m.name, printed(got), err)
			}
		}
		if strings.HasPrefix(m.name, "frame: ") {
			frames[frameType(was[0])] = true
		}
	}
	for k := frameHello; k < frameLast; k++ {
		if !frames[k] {
			t.Errorf("no frame of type %d is in %s", k, file)
		}
	}
}

// printed is JSON as it is, and anything else in hexadecimal.
func printed(p []byte) string {
	if json.Valid(p) {
		return string(p)
	}
	return hex.EncodeToString(p)
}

// unprinted undoes printed; a line that is neither is a message that nobody says.
func unprinted(s string) []byte {
	if p, err := hex.DecodeString(s); err == nil {
		return p
	}
	return []byte(s)
}

package peer

import (
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"

	"github.com/opencontainers/go-digest"
)

// A frame is one type byte, three length bytes (big endian) and a payload. All
// integers on the wire are big endian. A reader refuses a frame before it
// allocates memory for it.
const (
	frameHeader = 4
	chunkSize   = 64 << 10          // piece bytes in one frameData
	maxPayload  = chunkSize + 4<<10 // of any frame
	maxPieces   = 1 << 18           // a bitmap of 32 KiB; 2 TiB in pieces of 8 MiB
	maxRuns     = 4096              // runs in one frameHave
	maxBatch    = 64                // pieces in one signed batch
	maxName     = 255               // bytes in a member's name
	maxBlobSize = int64(maxPieces) * 8 << 20
)

type frameType byte

const (
	frameHello   frameType = iota + 1
	framePing              // nothing: "I am here"
	frameOpen              // blob, size, piece size, pass, bitmap: take part in a blob
	frameHave              // blob, load, runs of pieces that are newly here
	frameClose             // blob: no longer takes part
	frameRequest           // request id, blob, piece, flags
	frameCancel            // an answer: nobody waits for the request any more
	frameBusy              // an answer: not now
	frameGone              // an answer: not here (any more)
	frameDigests           // signed batch of piece digests
	frameData              // request id, offset in the piece, bytes
	frameCall              // call id, method, body
	frameReply             // call id, status, body
	frameLast
)

var (
	errWire    = errors.New("malformed frame")
	errVersion = errors.New("another version of the protocol")
)

// key is a SHA-256, the only kind of digest the swarm speaks of.
type key [32]byte

func (k key) digest() digest.Digest { return digest.NewDigestFromBytes(digest.SHA256, k[:]) }

// lastAttempt is the last attempt at a blob that the swarm makes together.
const lastAttempt = 1

// blobID is a blob as nodes speak of it: by its digest and by whose bytes they mean.
// The attempt is 0 until the bytes that upstream gave did not match the digest;
// those of the next attempt then have nothing to do with them. On the wire it is one
// byte after the digest.
type blobID struct {
	key     key
	attempt byte
}

func (id blobID) append(b []byte) []byte { return append(append(b, id.key[:]...), id.attempt) }

// appendFrame appends a frame whose payload put appends.
func appendFrame(b []byte, t frameType, put func([]byte) []byte) []byte {
	at := len(b)
	b = append(b, byte(t), 0, 0, 0)
	b = put(b)
	n := len(b) - at - frameHeader
	b[at+1], b[at+2], b[at+3] = byte(n>>16), byte(n>>8), byte(n)
	return b
}

// parseHeader returns a frame's type and the length of its payload.
func parseHeader(h [frameHeader]byte) (frameType, int, error) {
	t, n := frameType(h[0]), int(h[1])<<16|int(h[2])<<8|int(h[3])
	if t == 0 || t >= frameLast || n > maxPayload {
		return 0, 0, fmt.Errorf("%w: type %d of %d bytes", errWire, t, n)
	}
	return t, n, nil
}

// cursor reads a payload. After the first short read every further read yields
// zero values; the caller checks done once, at the end.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) take(n int) []byte {
	if c.bad || n < 0 || n > len(c.b) {
		c.bad = true
		return nil
	}
	p := c.b[:n]
	c.b = c.b[n:]
	return p
}

func (c *cursor) u8() byte {
	if p := c.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (c *cursor) u16() int {
	if p := c.take(2); p != nil {
		return int(binary.BigEndian.Uint16(p))
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if p := c.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if p := c.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

func (c *cursor) key() (k key) {
	copy(k[:], c.take(len(k)))
	return k
}

func (c *cursor) blob() blobID {
	id := blobID{c.key(), c.u8()}
	c.bad = c.bad || id.attempt > lastAttempt
	return id
}

func (c *cursor) str() string { return string(c.take(int(c.u8()))) }

// done reports whether the payload was long enough and used up.
func (c *cursor) done() error {
	if c.bad || len(c.b) != 0 {
		return errWire
	}
	return nil
}

func appendStr(b []byte, s string) []byte {
	s = s[:min(len(s), maxName)]
	return append(append(b, byte(len(s))), s...)
}

// hello is the first frame from the dialing side. On TLS links the certificate
// decides who speaks; the name must agree with it.
type hello struct {
	name string
	zone string
}

// wireVersion goes up, from the first release on, with every change that an older node
// would not understand (see TestWireIsAsItWas, which has each message as it is now). Nodes
// of two versions do not link, and nobody is banned for it: while a cluster is upgraded,
// the old and the new nodes are a swarm each, and each costs the registry a copy.
const wireVersion = 1

func (h hello) append(b []byte) []byte {
	return appendFrame(b, frameHello, func(b []byte) []byte {
		b = append(b, wireVersion)
		return appendStr(appendStr(b, h.name), h.zone)
	})
}

func parseHello(p []byte) (hello, error) {
	c := cursor{b: p}
	if v := c.u8(); !c.bad && v != wireVersion {
		return hello{}, fmt.Errorf("%w: %d, this node's is %d", errVersion, v, wireVersion)
	}
	h := hello{name: c.str(), zone: c.str()}
	if err := c.done(); err != nil {
		return hello{}, err
	}
	if h.name == "" {
		return hello{}, errWire
	}
	return h, nil
}

// open says that the sender takes part in a blob, what it holds of it, and by
// whose leave it may have the rest. A sender that does not know the size yet sends
// zero and no bitmap.
type open struct {
	blob      blobID
	size      int64
	pieceSize int64
	pass      pass
	have      bitmap
}

func (o open) append(b []byte) []byte {
	return appendFrame(b, frameOpen, func(b []byte) []byte {
		b = o.blob.append(b)
		b = binary.BigEndian.AppendUint64(b, uint64(o.size))
		b = binary.BigEndian.AppendUint32(b, uint32(o.pieceSize))
		return append(o.pass.append(b), o.have...)
	})
}

func parseOpen(p []byte) (open, error) {
	c := cursor{b: p}
	o := open{blob: c.blob(), size: int64(c.u64()), pieceSize: int64(c.u32()), pass: c.pass()}
	if c.bad || o.size < 0 || o.size > maxBlobSize {
		return open{}, errWire
	}
	if o.size == 0 {
		return o, c.done()
	}
	n := pieceCount(o.size, o.pieceSize)
	if n == 0 || n > maxPieces {
		return open{}, errWire
	}
	o.have = bitmap(append([]byte(nil), c.take((n+7)/8)...))
	o.have.clip(n)
	return o, c.done()
}

// have lists pieces that the sender can now give, as runs, and how many uploads
// wait at the sender or are being sent, 255 if more.
type have struct {
	blob blobID
	load byte
	runs []run
}

type run struct{ first, count uint32 }

func (h have) append(b []byte) []byte {
	return appendFrame(b, frameHave, func(b []byte) []byte {
		b = append(h.blob.append(b), h.load)
		for _, r := range h.runs[:min(len(h.runs), maxRuns)] {
			b = binary.BigEndian.AppendUint32(b, r.first)
			b = binary.BigEndian.AppendUint32(b, r.count)
		}
		return b
	})
}

func parseHave(p []byte) (have, error) {
	c := cursor{b: p}
	h := have{blob: c.blob(), load: c.u8()}
	if c.bad || len(c.b)%8 != 0 || len(c.b)/8 > maxRuns {
		return have{}, errWire
	}
	h.runs = make([]run, 0, len(c.b)/8)
	for len(c.b) > 0 {
		r := run{first: c.u32(), count: c.u32()}
		if r.count == 0 || r.first >= maxPieces || r.count > maxPieces-r.first {
			return have{}, errWire
		}
		h.runs = append(h.runs, r)
	}
	return h, c.done()
}

// runsOf compresses sorted piece numbers.
func runsOf(pieces []int) []run {
	var out []run
	for _, p := range pieces {
		if n := len(out); n > 0 && int(out[n-1].first+out[n-1].count) == p {
			out[n-1].count++
			continue
		}
		out = append(out, run{first: uint32(p), count: 1})
	}
	return out
}

// want asks for one piece. needDigest asks for the signed batch that holds its
// digest, to be sent ahead of the bytes. A node that is passing gives the piece
// to nobody else.
type want struct {
	id         uint32 // of the request, by the link; answers and data name it
	blob       blobID
	piece      uint32
	needDigest bool
	passing    bool
}

func (w want) append(b []byte) []byte {
	return appendFrame(b, frameRequest, func(b []byte) []byte {
		b = binary.BigEndian.AppendUint32(b, w.id)
		b = w.blob.append(b)
		b = binary.BigEndian.AppendUint32(b, w.piece)
		return append(b, flag(w.needDigest, 1)|flag(w.passing, 2))
	})
}

func parseWant(p []byte) (want, error) {
	c := cursor{b: p}
	w := want{id: c.u32(), blob: c.blob(), piece: c.u32()}
	flags := c.u8()
	w.needDigest, w.passing = flags&1 != 0, flags&2 != 0
	if w.piece >= maxPieces {
		return want{}, errWire
	}
	return w, c.done()
}

func flag(on bool, bit byte) byte {
	if on {
		return bit
	}
	return 0
}

// answer is the payload of frameCancel, frameGone and frameBusy, all of 12 bytes. The delay
// and the hint, a piece that the sender would give at once, mean something only in the last.
type answer struct {
	id    uint32
	delay uint32 // milliseconds
	hint  uint32 // piece, or noHint
}

const noHint = ^uint32(0)

func (a answer) append(b []byte, t frameType) []byte {
	return appendFrame(b, t, func(b []byte) []byte {
		b = binary.BigEndian.AppendUint32(b, a.id)
		b = binary.BigEndian.AppendUint32(b, a.delay)
		return binary.BigEndian.AppendUint32(b, a.hint)
	})
}

func parseAnswer(p []byte) (answer, error) {
	c := cursor{b: p}
	a := answer{id: c.u32(), delay: c.u32(), hint: c.u32()}
	return a, c.done()
}

func appendPing(b []byte) []byte {
	return appendFrame(b, framePing, func(b []byte) []byte { return b })
}

func appendClose(b []byte, id blobID) []byte { return appendFrame(b, frameClose, id.append) }

func parseClose(p []byte) (blobID, error) {
	c := cursor{b: p}
	id := c.blob()
	return id, c.done()
}

// batch is a list of piece digests signed by an authority (the blob's home, or
// a member that holds the whole verified blob). A node that took a piece by it
// passes it on unchanged, so a relay cannot forge it (I2).
type batch struct {
	blob      blobID
	pieceSize uint32
	signer    string
	// linked: the pieces follow each other, and their sums are SHA-256's chaining
	// values at their ends, on the way from the value from, at the start of the
	// first, to the blob's digest. Otherwise each sum is its piece's own SHA-256.
	linked bool
	from   key
	pieces []pieceDigest
	sig    [ed25519.SignatureSize]byte
}

type pieceDigest struct {
	piece uint32
	sum   key
}

// signed returns the bytes under the signature.
func (t *batch) signed() []byte {
	return t.appendBody([]byte("larder piece digests 3\x00"))
}

func (t *batch) appendBody(b []byte) []byte {
	b = t.blob.append(b)
	b = binary.BigEndian.AppendUint32(b, t.pieceSize)
	b = append(appendStr(b, t.signer), flag(t.linked, 1))
	if t.linked {
		b = append(b, t.from[:]...)
	}
	for _, p := range t.pieces {
		b = append(binary.BigEndian.AppendUint32(b, p.piece), p.sum[:]...)
	}
	return b
}

func (t *batch) append(b []byte) []byte {
	return appendFrame(b, frameDigests, func(b []byte) []byte { return t.appendBody(append(b, t.sig[:]...)) })
}

func parseBatch(p []byte) (*batch, error) {
	c := cursor{b: p}
	t := &batch{}
	copy(t.sig[:], c.take(len(t.sig)))
	t.blob, t.pieceSize, t.signer = c.blob(), c.u32(), c.str()
	kind := c.u8()
	if t.linked = kind == 1; t.linked {
		t.from = c.key()
	}
	if c.bad || kind > 1 || len(c.b) == 0 || len(c.b)%36 != 0 || len(c.b)/36 > maxBatch {
		return nil, errWire
	}
	t.pieces = make([]pieceDigest, 0, len(c.b)/36)
	for len(c.b) > 0 {
		d := pieceDigest{piece: c.u32(), sum: c.key()}
		if n := len(t.pieces); d.piece >= maxPieces || t.linked && n > 0 && d.piece != t.pieces[n-1].piece+1 {
			return nil, errWire
		}
		t.pieces = append(t.pieces, d)
	}
	return t, c.done()
}

// proof of a piece; the batch must list it.
func (t *batch) proof(piece int) (p proof, ok bool) {
	for i, d := range t.pieces {
		if int(d.piece) != piece {
			continue
		}
		p = proof{linked: t.linked, from: t.from, to: d.sum}
		if i > 0 {
			p.from = t.pieces[i-1].sum
		}
		return p, true
	}
	return p, false
}

// dataHead precedes the bytes of a frameData.
const dataHead = 8

// putDataHead writes the header of a frameData of n bytes at off of a piece to the first
// frameHeader+dataHead bytes of b.
func putDataHead(b []byte, id, off uint32, n int) {
	p := dataHead + n
	b[0], b[1], b[2], b[3] = byte(frameData), byte(p>>16), byte(p>>8), byte(p)
	binary.BigEndian.PutUint32(b[4:], id)
	binary.BigEndian.PutUint32(b[8:], off)
}

// call is a question, or its answer. Between the method and the body is a byte that
// means nothing.
type call struct {
	id     uint32
	method byte // of a question; the status of an answer
	body   []byte
}

func (m call) append(b []byte, t frameType) []byte {
	return appendFrame(b, t, func(b []byte) []byte {
		b = binary.BigEndian.AppendUint32(b, m.id)
		b = append(b, m.method, 0)
		return append(b, m.body...)
	})
}

func parseCall(p []byte) (call, error) {
	c := cursor{b: p}
	m := call{id: c.u32(), method: c.u8()}
	_ = c.u8() // see above
	if c.bad {
		return call{}, errWire
	}
	m.body = append([]byte(nil), c.b...)
	return m, nil
}

// bitmap holds one bit per piece, the lowest piece in the highest bit of the
// first byte.
type bitmap []byte

func newBitmap(n int) bitmap { return make(bitmap, (n+7)/8) }

func (b bitmap) has(i int) bool { return i>>3 < len(b) && b[i>>3]&(0x80>>(i&7)) != 0 }

func (b bitmap) set(i int) { b[i>>3] |= 0x80 >> (i & 7) }

// clip clears the bits past n.
func (b bitmap) clip(n int) {
	if n&7 != 0 && len(b) == (n+7)/8 && len(b) > 0 {
		b[len(b)-1] &= byte(0xff) << (8 - n&7)
	}
}

func (b bitmap) count() (n int) {
	for _, x := range b {
		n += bits.OnesCount8(x)
	}
	return n
}

// pieceCount returns 0 for sizes that make no sense.
func pieceCount(size, pieceSize int64) int {
	if size <= 0 || pieceSize <= 0 || size > maxBlobSize {
		return 0
	}
	n := (size + pieceSize - 1) / pieceSize
	if n > math.MaxInt32 {
		return 0
	}
	return int(n)
}

package cache

import (
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"

	"github.com/opencontainers/go-digest"
)

// A blob's SHA-256 is a chain: from one 64-byte block to the next it carries 32
// bytes, its chaining value. Pieces are whole blocks, so with the values at a
// piece's two ends the piece can be checked alone, by the very pass that
// computes the blob's digest over it: a chain of links from the initial value
// to the digest proves the whole, and nothing is hashed twice. To find other
// bytes for a link is to find a second preimage of SHA-256's compression
// function.

// ErrLink is returned for a piece whose bytes do not lead from the one chaining
// value to the other.
var ErrLink = errors.New("piece does not continue the digest")

// chainStart is SHA-256's initial value, at the start of every blob.
var chainStart = chainValue(sha256.New())

// link is what a piece's writer knew and the piece was checked by.
type link struct{ from, to [sha256.Size]byte }

// Go marshals a running SHA-256 as "sha\x03", the chaining value, a block that
// is not full, and the number of bytes so far; TestChainValue holds it to FIPS
// 180-4.
const (
	stateMagic = "sha\x03"
	stateSize  = len(stateMagic) + sha256.Size + sha256.BlockSize + 8
)

// chainValue is where h has arrived; what it took must be whole blocks.
func chainValue(h hash.Hash) (v [sha256.Size]byte) {
	var room [stateSize]byte
	state, err := h.(encoding.BinaryAppender).AppendBinary(room[:0])
	if err != nil || len(state) != stateSize {
		panic(fmt.Sprintf("cache: SHA-256 with a state of %d bytes: %v", len(state), err)) // not this Go's
	}
	copy(v[:], state[len(stateMagic):])
	return v
}

// resume is a SHA-256 that has taken off bytes, all in whole blocks, and
// arrived at v.
func resume(v [sha256.Size]byte, off int64) hash.Hash {
	state := append(make([]byte, 0, stateSize), stateMagic...)
	state = append(append(state, v[:]...), make([]byte, sha256.BlockSize)...)
	state = binary.BigEndian.AppendUint64(state, uint64(off))
	h := sha256.New()
	if err := h.(encoding.BinaryUnmarshaler).UnmarshalBinary(state); err != nil {
		panic("cache: SHA-256 does not take its own state: " + err.Error()) // not this Go's
	}
	return h
}

// CheckPiece returns nil if p, all of piece i of a blob of that size, leads SHA-256 from
// one chaining value to the other or, as the last piece, from the first to the blob's
// digest. Otherwise the error is ErrLink.
func CheckPiece(d digest.Digest, size int64, i int, p []byte, from, to [sha256.Size]byte) error {
	off := int64(i) * PieceSize(size)
	left := size - off
	if d.Algorithm() != digest.SHA256 || i < 0 || left <= 0 || int64(len(p)) != min(left, PieceSize(size)) {
		return fmt.Errorf("%d bytes for piece %d of %s: %w", len(p), i, d, ErrLink)
	}
	h := resume(from, off)
	h.Write(p)
	follows := int64(len(p)) == left && digest.NewDigest(digest.SHA256, h) == d ||
		int64(len(p)) < left && chainValue(h) == to
	if !follows {
		return fmt.Errorf("piece %d of %s: %w", i, d, ErrLink)
	}
	return nil
}

// WritePiece writes all of piece i, which need not be trusted: from and to are
// SHA-256's chaining values at its start and end (the initial value before the
// first piece; to is ignored for the last one, which must lead to the blob's
// digest). Bytes that do not lead from the one to the other are refused with
// ErrLink. The values themselves are believed only as far as they join up with
// those of the pieces before; a piece whose values do not is hashed again when
// its turn comes. Otherwise it is like WriteAt.
func (w *Writer) WritePiece(i int, p []byte, from, to [sha256.Size]byte) error {
	f := w.fill
	if f.Pieces() == 0 {
		return fmt.Errorf("write %s before its size is known: %w", f.digest, errGap)
	}
	if err := CheckPiece(f.digest, f.Size(), i, p, from, to); err != nil {
		return err
	}
	_, err := f.write(p, int64(i)*f.PieceSize(), w.origin, &link{from, to})
	return err
}

// Chain returns SHA-256's chaining value at the start of piece i, once every
// byte before it is on disk and hashed; Changed tells when that may be. With the
// values at both ends of a piece others can check it alone (see WritePiece).
func (f *fill) Chain(i int) (v [sha256.Size]byte, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watched = true
	if f.digest.Algorithm() != digest.SHA256 || i < 0 || i >= len(f.chain) {
		return v, false
	}
	return f.chain[i], true
}

// prove notes the chaining value at the start of the next piece.
func (f *fill) prove(v [sha256.Size]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.chain = append(f.chain, v)
	if f.watched {
		f.notify()
	}
}

// prefix is the digest's way along the blob: at the start of a piece that is
// linked to those before, it jumps; everywhere else it reads.
type prefix struct {
	f      *fill
	buf    []byte
	off    int64
	hash   hash.Hash // nil at the start of a piece, if it has come there by a link
	at     [sha256.Size]byte
	chains bool // the digest is a SHA-256
	whole  bool // the last link has led to the digest
}

func newPrefix(f *fill) *prefix {
	p := &prefix{f: f, buf: make([]byte, readBlock), chains: f.digest.Algorithm() == digest.SHA256, at: chainStart}
	if p.chains {
		f.prove(chainStart)
	} else {
		p.hash = f.digest.Algorithm().Hash()
	}
	return p
}

// advance takes in the next bytes: all of a linked piece, or those of the piece
// at off that lie before end.
func (p *prefix) advance(end int64) error {
	i, next := p.f.pieceAt(p.off)
	if p.chains && p.hash == nil && end >= next {
		if l, ok := p.f.takeLink(i); ok && l.from == p.at {
			p.arrive(next, l.to)
			return nil
		}
	}
	if p.hash == nil {
		p.hash = resume(p.at, p.off)
	}
	end = min(end, next)
	if err := hashRange(p.hash, p.f.file, p.buf, p.off, end-p.off); err != nil {
		return err
	}
	if p.off = end; p.chains && end == next && end < p.f.Size() {
		v := chainValue(p.hash)
		p.hash = nil
		p.arrive(end, v)
	}
	return nil
}

func (p *prefix) arrive(off int64, v [sha256.Size]byte) {
	p.off, p.at = off, v
	if off == p.f.Size() {
		p.whole = true
		return
	}
	p.f.prove(v)
}

// matches reports, at the end, whether the digest is the blob's.
func (p *prefix) matches() bool {
	if p.hash == nil && !p.whole {
		p.hash = resume(p.at, p.off) // the empty blob
	}
	return p.whole || digest.NewDigest(p.f.digest.Algorithm(), p.hash) == p.f.digest
}

// pieceAt names the piece at off and says where it ends.
func (f *fill) pieceAt(off int64) (i int, end int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i = f.pieces.at(off)
	return i, f.pieces.start(i) + f.pieces.length(i)
}

// takeLink returns, once, what piece i was checked by, if all of it was.
func (f *fill) takeLink(i int) (link, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, ok := f.links[i]
	delete(f.links, i)
	return l, ok
}

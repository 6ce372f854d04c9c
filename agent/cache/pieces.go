package cache

import "math/bits"

const (
	minPiece = 256 << 10
	maxPiece = 8 << 20
	// piecesPerBlob is how many pieces a blob of up to 8 GiB has at most.
	piecesPerBlob = 1024
	// maxBlob bounds what a hostile size can make the cache reserve: 1 TiB
	// is 131,072 pieces, about 5 MiB of state (see I8).
	maxBlob = 1 << 40
)

// PieceSize returns the size of all pieces but the last of a blob of size
// bytes: size/1024 rounded up to a power of two, between 256 KiB and 8 MiB.
// Every node computes the same.
func PieceSize(size int64) int64 {
	if size <= piecesPerBlob*minPiece {
		return minPiece
	}
	share := uint64(size+piecesPerBlob-1) / piecesPerBlob
	return min(int64(1)<<bits.Len64(share-1), maxPiece)
}

// pieceCount returns how many pieces a blob of size bytes has.
func pieceCount(size int64) int {
	ps := PieceSize(size)
	return int((size + ps - 1) / ps)
}

// pieces knows which bytes of a blob are on disk. A piece grows by appending,
// so one number per piece is enough: 9 bytes a piece (I8).
// It does no I/O and no locking.
type pieces struct {
	size, piece int64
	have        []uint32 // bytes present at the start of each piece
	sum         []uint32 // CRC-32C of those bytes, or of a claimed piece's record
	claimed     []bool   // recorded by an earlier process, not yet re-read (I6)
	claims      int
	complete    int
	first       int // the first piece that is not complete
}

func newPieces(size int64) *pieces {
	n := pieceCount(size)
	return &pieces{size: size, piece: PieceSize(size),
		have: make([]uint32, n), sum: make([]uint32, n), claimed: make([]bool, n)}
}

func (p *pieces) count() int          { return len(p.have) }
func (p *pieces) at(off int64) int    { return int(off / p.piece) }
func (p *pieces) start(i int) int64   { return int64(i) * p.piece }
func (p *pieces) length(i int) int64  { return min(p.piece, p.size-p.start(i)) }
func (p *pieces) present(i int) int64 { return p.start(i) + int64(p.have[i]) }
func (p *pieces) full(i int) bool     { return int64(p.have[i]) == p.length(i) }
func (p *pieces) last() int           { return len(p.have) - 1 }

// prefix returns the end of the run of present bytes that starts at 0.
func (p *pieces) prefix() int64 {
	if p.first == p.count() {
		return p.size
	}
	return p.present(p.first)
}

// run returns how many bytes, at most limit, are present from off on. The last
// piece counts only if it may be shown.
func (p *pieces) run(off, limit int64, showLast bool) int64 {
	end := off
	for i := p.at(off); i < p.count() && end-off < limit; i++ {
		if i == p.last() && !showLast {
			break
		}
		if p.present(i) > end {
			end = p.present(i)
		}
		if !p.full(i) {
			break
		}
	}
	return min(end-off, limit)
}

// grow adds n bytes with the running checksum sum to piece i and reports
// whether that completed it.
func (p *pieces) grow(i int, n int64, sum uint32) bool {
	p.have[i] += uint32(n)
	p.sum[i] = sum
	if !p.full(i) {
		return false
	}
	p.complete++
	for p.first < p.count() && p.full(p.first) {
		p.first++
	}
	return true
}

// claim marks piece i as recorded on disk with checksum sum.
func (p *pieces) claim(i int, sum uint32) {
	p.claimed[i], p.sum[i] = true, sum
	p.claims++
}

// settle turns a claim into a present piece, or into a missing one.
func (p *pieces) settle(i int, good bool) {
	p.claimed[i] = false
	p.claims--
	if good {
		p.grow(i, p.length(i), p.sum[i])
		return
	}
	p.sum[i] = 0
}

// missing returns the first run of absent bytes that ends after off. start is
// where a write may begin, and so may lie before off inside off's piece.
func (p *pieces) missing(off int64) (start, end int64, ok bool) {
	if off >= p.size {
		return 0, 0, false // at() would name the last piece
	}
	for i := p.at(max(off, 0)); i < p.count(); i++ {
		if p.full(i) || p.claimed[i] {
			if ok {
				return start, end, true
			}
			continue
		}
		if ok && p.have[i] > 0 {
			return start, end, true
		}
		if !ok {
			start, ok = p.present(i), true
		}
		end = p.start(i) + p.length(i)
	}
	return start, end, ok
}

// nextClaim returns the first claimed piece at or after that of off, wrapping
// around once.
func (p *pieces) nextClaim(off int64) (int, bool) {
	n := p.count()
	for k := range n {
		if i := (p.at(off) + k) % n; p.claimed[i] {
			return i, true
		}
	}
	return 0, false
}

// bytes returns how many bytes are present in all.
func (p *pieces) bytes() int64 {
	var n int64
	for _, h := range p.have {
		n += int64(h)
	}
	return n
}

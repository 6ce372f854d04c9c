package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
)

// The piece map beside an ingest says which pieces are there, so that a fill
// goes on after a restart. All numbers are little-endian.
//
//	0   8  magic "LARDERPM"
//	8   4  version, 2
//	12  4  CRC-32C of bytes 16 to 192
//	16  8  blob size
//	24  8  piece size
//	32  2  length of the digest
//	34  .. digest, zero-padded to 176
//	176 16 of SHA-256 over the giver's name
//	192    one record a piece: CRC-32C of the piece, then a check over it
//
// A record is one 8-byte write after its piece's bytes were written. Nothing
// orders the two on disk and nothing is synced: after a power loss a record
// may be there without its bytes. That is why the bytes are re-read (I6).
const (
	mapMagic   = "LARDERPM"
	mapVersion = 2
	mapDigest  = 34
	mapGiver   = 176
	mapHeader  = 192
	mapRecord  = 8
)

// pieceMap is the open map of a running fill.
type pieceMap struct{ file *os.File }

// put records that piece i is complete. An error costs only that the piece is
// fetched again after a restart, so it is not reported.
func (m *pieceMap) put(i int, sum uint32) {
	_, _ = m.file.WriteAt(encodeRecord(i, sum), mapHeader+int64(i)*mapRecord)
}

// encodeRecord returns the record of piece i. The check tells a record from a
// hole, from garbage, and from another piece's record.
func encodeRecord(i int, sum uint32) []byte {
	b := binary.LittleEndian.AppendUint32(make([]byte, 0, mapRecord), sum)
	return binary.LittleEndian.AppendUint32(b, recordCheck(i, sum))
}

func recordCheck(i int, sum uint32) uint32 {
	var b [8]byte
	binary.LittleEndian.PutUint32(b[:], uint32(i))
	binary.LittleEndian.PutUint32(b[4:], sum)
	return crc32.Checksum(b[:], castagnoli) ^ 0x4c415244
}

// encodeMapHeader returns the header of the map of a blob.
func encodeMapHeader(d digest.Digest, size int64, giver string) []byte {
	b := make([]byte, mapHeader)
	copy(b, mapMagic)
	binary.LittleEndian.PutUint32(b[8:], mapVersion)
	binary.LittleEndian.PutUint64(b[16:], uint64(size))
	binary.LittleEndian.PutUint64(b[24:], uint64(PieceSize(size)))
	binary.LittleEndian.PutUint16(b[32:], uint16(len(d)))
	copy(b[mapDigest:mapGiver], d)
	copy(b[mapGiver:], hashGiver(giver))
	binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(b[16:], castagnoli))
	return b
}

func hashGiver(giver string) []byte {
	sum := sha256.Sum256([]byte(giver))
	return sum[:mapHeader-mapGiver]
}

var errMap = errors.New("not a piece map")

// decodeMapHeader reads a header and returns the digest and size it is for.
func decodeMapHeader(b []byte) (digest.Digest, int64, error) {
	if len(b) < mapHeader || string(b[:8]) != mapMagic {
		return "", 0, errMap
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != mapVersion {
		return "", 0, fmt.Errorf("version %d: %w", v, errMap)
	}
	if crc32.Checksum(b[16:mapHeader], castagnoli) != binary.LittleEndian.Uint32(b[12:]) {
		return "", 0, fmt.Errorf("bad checksum: %w", errMap)
	}
	size := int64(binary.LittleEndian.Uint64(b[16:]))
	if size < 0 || size > maxBlob || int64(binary.LittleEndian.Uint64(b[24:])) != PieceSize(size) {
		return "", 0, fmt.Errorf("bad sizes: %w", errMap)
	}
	n := int(binary.LittleEndian.Uint16(b[32:]))
	if n > mapGiver-mapDigest {
		return "", 0, fmt.Errorf("bad digest: %w", errMap)
	}
	d := digest.Digest(b[mapDigest : mapDigest+n])
	return d, size, checkDigest(d)
}

// readMap reads a whole map and claims in p what it records, if that came from
// giver. The caller compares the size; records beyond the pieces are ignored.
func readMap(r io.Reader, want digest.Digest, giver string) (*pieces, error) {
	header := make([]byte, mapHeader)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, fmt.Errorf("read piece map: %w", err)
	}
	d, size, err := decodeMapHeader(header)
	if err != nil {
		return nil, err
	}
	if d != want {
		return nil, fmt.Errorf("map of %s: %w", d, errMap)
	}
	if !bytes.Equal(header[mapGiver:], hashGiver(giver)) {
		return nil, fmt.Errorf("bytes of another giver: %w", errMap)
	}
	p := newPieces(size)
	records := make([]byte, p.count()*mapRecord)
	n, err := io.ReadFull(r, records)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("read piece map: %w", err)
	}
	for i := range n / mapRecord {
		rec := records[i*mapRecord:]
		sum := binary.LittleEndian.Uint32(rec)
		if binary.LittleEndian.Uint32(rec[4:]) == recordCheck(i, sum) {
			p.claim(i, sum)
		}
	}
	return p, nil
}

package registrytest

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"

	"github.com/opencontainers/go-digest"
)

// Content is what a blob is made of: bytes at any offset and their number.
// It is read by many requests at once. *bytes.Reader and *io.SectionReader are
// Contents.
type Content interface {
	io.ReaderAt
	Size() int64
}

// Bytes is the content b.
func Bytes(b []byte) Content { return bytes.NewReader(b) }

// Random is size incompressible bytes that depend on the seed alone. They are
// computed where they are read, so that a blob of many GiB takes no memory.
func Random(seed uint64, size int64) Content {
	key := make([]byte, aes.BlockSize)
	binary.LittleEndian.PutUint64(key, seed)
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // only for a key of another length
	}
	return &random{block: block, size: size}
}

// random is the key stream of AES in counter mode, which can be entered at any
// block and runs at several GB/s.
type random struct {
	block cipher.Block
	size  int64
}

func (r *random) Size() int64 { return r.size }

func (r *random) ReadAt(p []byte, off int64) (int, error) {
	p, err := clip(p, off, r.size)
	if len(p) == 0 {
		return 0, err
	}
	var iv [aes.BlockSize]byte
	binary.BigEndian.PutUint64(iv[8:], uint64(off/aes.BlockSize))
	stream := cipher.NewCTR(r.block, iv[:])
	var lead [aes.BlockSize]byte
	stream.XORKeyStream(lead[:off%aes.BlockSize], lead[:off%aes.BlockSize])
	clear(p)
	stream.XORKeyStream(p, p)
	return len(p), err
}

// clip shortens p to what lies before size, with io.EOF if that is less than
// all of it.
func clip(p []byte, off, size int64) ([]byte, error) {
	if left := max(size-off, 0); int64(len(p)) > left {
		return p[:left], io.EOF
	}
	return p, nil
}

// concat is several contents one after the other.
type concat []Content

func (c concat) Size() int64 {
	var n int64
	for _, part := range c {
		n += part.Size()
	}
	return n
}

func (c concat) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for _, part := range c {
		if off >= part.Size() {
			off -= part.Size()
			continue
		}
		n, err := part.ReadAt(p[done:], off)
		done += n
		if done == len(p) {
			return done, nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return done, err
		}
		off = 0
	}
	return done, io.EOF
}

// fill is size times the same byte.
type fill struct {
	b    byte
	size int64
}

func (f fill) Size() int64 { return f.size }

func (f fill) ReadAt(p []byte, off int64) (int, error) {
	p, err := clip(p, off, f.size)
	for i := range p {
		p[i] = f.b
	}
	return len(p), err
}

// Sizes of the parts of a gzip file made of stored blocks (RFC 1951, 3.2.4 and
// RFC 1952, 2.3).
const (
	gzipHeader  = 10
	gzipTrailer = 8
	storedHead  = 5
	storedBlock = 65535
)

// storedGzip wraps c as a gzip file whose blocks are stored, not compressed:
// every offset of the file is known without writing it.
type storedGzip struct {
	c       Content
	trailer [gzipTrailer]byte
}

func newStoredGzip(c Content) *storedGzip {
	g := &storedGzip{c: c}
	sum := crc32.NewIEEE()
	mustCopy(sum, c)
	binary.LittleEndian.PutUint32(g.trailer[:4], sum.Sum32())
	binary.LittleEndian.PutUint32(g.trailer[4:], uint32(c.Size()))
	return g
}

// blocks is at least one: a file without a final block is not valid.
func (g *storedGzip) blocks() int64 {
	return max(1, (g.c.Size()+storedBlock-1)/storedBlock)
}

func (g *storedGzip) Size() int64 {
	return gzipHeader + g.blocks()*storedHead + g.c.Size() + gzipTrailer
}

func (g *storedGzip) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) && off < g.Size() {
		n, err := g.readPart(p[done:], off)
		done += n
		off += int64(n)
		if err != nil {
			return done, err
		}
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

// readPart reads from the one part of the file that holds off.
func (g *storedGzip) readPart(p []byte, off int64) (int, error) {
	if off < gzipHeader {
		return copy(p, "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"[off:]), nil
	}
	if tail := off - (g.Size() - gzipTrailer); tail >= 0 {
		return copy(p, g.trailer[tail:]), nil
	}
	i, in := (off-gzipHeader)/(storedHead+storedBlock), (off-gzipHeader)%(storedHead+storedBlock)
	start := i * storedBlock
	length := min(storedBlock, g.c.Size()-start)
	if in < storedHead {
		head := [storedHead]byte{}
		if i == g.blocks()-1 {
			head[0] = 1
		}
		binary.LittleEndian.PutUint16(head[1:], uint16(length))
		binary.LittleEndian.PutUint16(head[3:], ^uint16(length))
		return copy(p, head[in:]), nil
	}
	in -= storedHead
	n, err := g.c.ReadAt(p[:min(int64(len(p)), length-in)], start+in)
	if errors.Is(err, io.EOF) && n > 0 {
		err = nil
	}
	return n, err
}

// sum is the SHA-256 digest of c.
func sum(c Content) digest.Digest {
	d := digest.Canonical.Digester()
	mustCopy(d.Hash(), c)
	return d.Digest()
}

// mustCopy copies all of c; contents are computed, or the test's own, and a
// hash takes everything.
func mustCopy(w io.Writer, c Content) {
	buf := make([]byte, min(copyBuffer, c.Size()))
	if _, err := io.CopyBuffer(w, io.NewSectionReader(c, 0, c.Size()), buf); err != nil {
		panic(err)
	}
}

// copyBuffer is large enough for the cost of entering the random stream not to
// show.
const copyBuffer = 256 << 10

package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestChainValue pins Go's way of marshalling a SHA-256 to the standard: the
// chaining value after a message with its padding is the message's digest.
func TestChainValue(t *testing.T) {
	block := append([]byte("abc"), 0x80)
	block = append(block, make([]byte, sha256.BlockSize-8-len(block))...)
	block = binary.BigEndian.AppendUint64(block, 24)
	h := sha256.New()
	h.Write(block)
	if got, want := chainValue(h), sha256.Sum256([]byte("abc")); got != want {
		t.Errorf("after the padded message: %x, want %x", got, want)
	}
	body, d := content(7, 3*minPiece+17)
	h = sha256.New()
	h.Write(body[:2*minPiece])
	h = resume(chainValue(h), 2*minPiece)
	h.Write(body[2*minPiece:])
	if got := digest.NewDigest(digest.SHA256, h); got != d {
		t.Errorf("resumed: %s, want %s", got, d)
	}
}

// chainOf is the chaining value at the start of each piece, and a last one that
// means nothing.
func chainOf(body []byte) (chain [][sha256.Size]byte) {
	h := sha256.New()
	for off := 0; off < len(body); off += minPiece {
		chain = append(chain, chainValue(h))
		h.Write(body[off:min(off+minPiece, len(body))])
	}
	return append(chain, [sha256.Size]byte{})
}

func pieceOf(body []byte, i int) []byte { return body[i*minPiece : min((i+1)*minPiece, len(body))] }

// garble changes a byte on disk, behind the cache's back.
func garble(t *testing.T, c *Cache, d digest.Digest, off int64) {
	t.Helper()
	file, err := os.OpenFile(c.dir.ingest(d), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var b [1]byte
	if _, err := file.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := file.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

var somePeer = Origin{FromPeer, "node-7"}

// TestLinkedPieces writes pieces in any order, each checked by its links, some
// of them with links that do not join up, some in two parts. What is linked is
// not read again, which shows in that nobody notices a change on disk; what is
// not linked is.
func TestLinkedPieces(t *testing.T) {
	const n = 9
	body, d := content(11, (n-1)*minPiece+4321)
	chain := chainOf(body)
	elsewhere := func(i int) link { // a right way between wrong places
		l := link{from: [sha256.Size]byte{byte(i)}}
		h := resume(l.from, int64(i)*minPiece)
		h.Write(pieceOf(body, i))
		l.to = chainValue(h)
		return l
	}
	cases := []struct {
		name    string
		link    func(i int) link
		split   int // piece whose first half comes from elsewhere
		garbled int // piece changed on disk
		want    error
	}{
		{"all linked", func(i int) link { return link{chain[i], chain[i+1]} }, -1, -1, nil},
		{"linked pieces are not read", func(i int) link { return link{chain[i], chain[i+1]} }, -1, 4, nil},
		{"some do not join", func(i int) link {
			if i == 3 || i == 6 {
				return elsewhere(i)
			}
			return link{chain[i], chain[i+1]}
		}, -1, -1, nil},
		{"those are read", func(i int) link {
			if i == 3 || i == 6 {
				return elsewhere(i)
			}
			return link{chain[i], chain[i+1]}
		}, -1, 6, ErrDigestMismatch},
		{"half of one from elsewhere", func(i int) link { return link{chain[i], chain[i+1]} }, 2, -1, nil},
		{"which is read", func(i int) link { return link{chain[i], chain[i+1]} }, 2, 2, ErrDigestMismatch},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			c := start(t, Options{})
			m, f, r := begin(t, c, d, int64(len(body)))
			w := f.Writer(somePeer)
			if tc.split >= 0 {
				put(t, f, body, tc.split*minPiece, tc.split*minPiece+1000)
			}
			order := rand.New(rand.NewPCG(1, 1)).Perm(n - 1)
			for k := range order {
				order[k]++
			}
			order = append(order, 0) // last: until then the digest stands still
			for _, i := range order {
				if i == 0 && tc.garbled >= 0 {
					garble(t, c, d, int64(tc.garbled)*minPiece+77)
				}
				l := tc.link(i)
				if err := w.WritePiece(i, pieceOf(body, i), l.from, l.to); err != nil {
					t.Fatal(err)
				}
			}
			m.end <- nil
			got, err := io.ReadAll(r)
			if !errors.Is(err, tc.want) || err == nil && tc.garbled < 0 && !bytes.Equal(got, body) {
				t.Errorf("read %d bytes, %v; want %v", len(got), err, tc.want)
			}
		})
	}
}

// TestWrongPieces offers bytes that their links refuse, and at last some that
// only the whole digest can.
func TestWrongPieces(t *testing.T) {
	body, d := content(12, 3*minPiece+4321)
	chain := chainOf(body)
	c := start(t, Options{})
	m, f, r := begin(t, c, d, int64(len(body)))
	w := f.Writer(somePeer)
	if err := (&Fill{newFill(c, d, m, 0)}).Writer(somePeer).WritePiece(0, pieceOf(body, 0), chain[0], chain[1]); err == nil || errors.Is(err, ErrLink) {
		t.Errorf("a right piece before the size is known: %v", err)
	}
	for i := range 4 {
		wrong := bytes.Clone(pieceOf(body, i))
		wrong[5] ^= 1
		if err := w.WritePiece(i, wrong, chain[i], chain[i+1]); !errors.Is(err, ErrLink) {
			t.Errorf("piece %d with a wrong byte: %v", i, err)
		}
		if err := w.WritePiece(i, pieceOf(body, i)[1:], chain[i], chain[i+1]); !errors.Is(err, ErrLink) {
			t.Errorf("piece %d without its first byte: %v", i, err)
		}
		if f.Has(i) {
			t.Errorf("piece %d was taken", i)
		}
	}
	wrong := bytes.Clone(pieceOf(body, 1))
	wrong[5] ^= 1
	h := resume(chain[1], minPiece)
	h.Write(wrong)
	if err := w.WritePiece(1, wrong, chain[1], chainValue(h)); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 2, 3} {
		if err := w.WritePiece(i, pieceOf(body, i), chain[i], chain[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	m.end <- nil
	if _, err := io.ReadAll(r); !errors.Is(err, ErrDigestMismatch) {
		t.Errorf("read: %v", err)
	}
}

// TestChainOfAFill is what a node that fetches from the registry can tell
// others: the values come as the digest comes along.
func TestChainOfAFill(t *testing.T) {
	body, d := content(13, 3*minPiece+4321)
	chain := chainOf(body)
	c := start(t, Options{})
	_, f, _ := begin(t, c, d, int64(len(body)))
	await := func(i int) {
		t.Helper()
		for {
			changed := f.Changed()
			if got, ok := f.Chain(i); ok {
				if got != chain[i] {
					t.Errorf("at piece %d: %x, want %x", i, got, chain[i])
				}
				return
			}
			<-changed
		}
	}
	await(0)
	put(t, f, body, 2*minPiece, 3*minPiece)
	put(t, f, body, 0, minPiece)
	await(1)
	if _, ok := f.Chain(2); ok {
		t.Error("the chain goes on over a piece that is missing")
	}
	put(t, f, body, minPiece, 2*minPiece)
	await(2)
	await(3)
	put(t, f, body, 3*minPiece, len(body))
	settle(c, d)
	if _, ok := f.Chain(4); ok {
		t.Error("a value after the end")
	}
}

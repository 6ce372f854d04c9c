package agent

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/peer"
)

func newPassage(d digest.Digest, listed, at int64) *passage {
	done := make(chan struct{})
	close(done)
	return &passage{digest: d, listed: listed, at: at, size: -1, pieces: make(map[int][]byte), changed: make(chan struct{}), cancel: func() {}, done: done}
}

// TestPassage reads what comes in any order, keeps nothing that was read, and takes only what
// is a piece and right.
func TestPassage(t *testing.T) {
	const size, at = 600 << 10, 300 << 10 // three pieces, from within the second on
	content := bytes.Repeat([]byte("larder"), size/6)
	p := newPassage(digest.FromBytes(content), 0, at)
	ps := cache.PieceSize(size)
	piece := func(i int64) []byte { return content[i*ps : min((i+1)*ps, size)] }
	var v [sha256.Size]byte
	if err := p.WritePiece("n", 2, piece(2), v, v); err == nil || errors.Is(err, peer.ErrWrongPiece) {
		t.Errorf("a piece before the size: %v", err)
	}
	if err := p.SetSize(size); err != nil {
		t.Fatal(err)
	}
	if err := p.SetSize(size + 1); !errors.Is(err, cache.ErrSizeMismatch) {
		t.Errorf("another size: %v", err)
	}
	if err := p.WritePiece("n", 2, piece(2), v, v); !errors.Is(err, peer.ErrWrongPiece) {
		t.Errorf("a piece that does not lead to the digest: %v", err)
	}
	if _, err := p.From("n").WriteAt(piece(2)[1:], 2*ps+1); err == nil {
		t.Error("half a piece was taken")
	}
	missing := func(wantStart, wantEnd int64) {
		t.Helper()
		if start, end, ok := p.Missing(0); start != wantStart || end != wantEnd || ok != (start < size) {
			t.Errorf("missing %d to %d, %v", start, end, ok)
		}
	}
	missing(ps, size)
	for _, i := range []int64{2, 0, 1} { // the piece before what is read is not kept
		if _, err := p.From("n").WriteAt(piece(i), i*ps); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			missing(ps, 2*ps)
		}
	}
	missing(3*ps, size)
	if len(p.pieces) != 2 {
		t.Errorf("%d pieces are kept", len(p.pieces))
	}
	p.end(nil)
	got, err := io.ReadAll(iotest.OneByteReader(p))
	if err != nil || !bytes.Equal(got, content[at:]) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	if len(p.pieces) != 0 || p.Wanted() != size {
		t.Errorf("%d pieces are left, %d is wanted", len(p.pieces), p.Wanted())
	}
}

// TestPassageBreaksOff: who reads hears why nothing comes any more, after what came.
func TestPassageBreaksOff(t *testing.T) {
	p := newPassage(digest.FromString("x"), 0, 0)
	if err := p.SetSize(600 << 10); err != nil {
		t.Fatal(err)
	}
	first := make([]byte, cache.PieceSize(600<<10))
	if _, err := p.From("n").WriteAt(first, 0); err != nil {
		t.Fatal(err)
	}
	gone := errors.New("nobody has it any more")
	go p.end(gone)
	if got, err := io.ReadAll(p); !errors.Is(err, gone) || len(got) != len(first) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

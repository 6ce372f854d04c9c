package cache

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestPieceSize(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct{ size, want int64 }{
		{0, minPiece}, {1, minPiece}, {256 * mib, minPiece}, {256*mib + 1, 512 << 10}, {512 * mib, 512 << 10},
		{400 * mib, 512 << 10}, {1 << 30, 1 * mib}, {4 << 30, 4 * mib}, {8 << 30, 8 * mib}, {20 << 30, 8 * mib}, {maxBlob, 8 * mib},
	} {
		if got := PieceSize(tt.size); got != tt.want {
			t.Errorf("PieceSize(%d) = %d, want %d", tt.size, got, tt.want)
		}
	}
}

// TestPiecesAgainstModel compares the piece state with a plain bitmap under
// random growth.
func TestPiecesAgainstModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	const size = 3*minPiece + 1234
	p := newPieces(size)
	model := make([]bool, size)
	for range 40 {
		i := rnd.IntN(p.count())
		n := min(rnd.Int64N(minPiece)+1, p.length(i)-int64(p.have[i]))
		from := p.present(i)
		if n > 0 {
			p.grow(i, n, 0)
		}
		for k := from; k < from+n; k++ {
			model[k] = true
		}
		off := rnd.Int64N(size)
		if got, want := p.run(off, size, true), run1(model, off); got != want {
			t.Fatalf("run(%d) = %d, want %d", off, got, want)
		}
		if got, want := p.prefix(), run1(model, 0); got != want {
			t.Fatalf("prefix = %d, want %d", got, want)
		}
		checkMissing(t, p, model, off)
	}
}

// run1 returns how many bytes are present from off on.
func run1(model []bool, off int64) int64 {
	if i := bytes.IndexByte(boolBytes(model[off:]), 0); i >= 0 {
		return int64(i)
	}
	return int64(len(model)) - off
}

func boolBytes(all []bool) []byte {
	out := make([]byte, len(all))
	for i, b := range all {
		if b {
			out[i] = 1
		}
	}
	return out
}

// checkMissing checks the contract of Missing: the run is absent, it may be
// written from its start, and nothing absent lies between off and it.
func checkMissing(t *testing.T, p *pieces, model []bool, off int64) {
	t.Helper()
	start, end, ok := p.missing(off)
	if !ok {
		if run1(model, off) != p.size-off {
			t.Fatalf("missing(%d) overlooks a hole", off)
		}
		return
	}
	if start >= end || model[start] || model[end-1] {
		t.Fatalf("missing(%d) = %d..%d, which is not absent", off, start, end)
	}
	if start != p.present(p.at(start)) {
		t.Fatalf("missing(%d) starts at %d, where no write may begin", off, start)
	}
	if start > off && run1(model, off) < start-off {
		t.Fatalf("missing(%d) = %d overlooks a hole before it", off, start)
	}
}

// TestMissingEnds: who asks from the end of each run on must come to an end,
// also where the last piece is short and absent.
func TestMissingEnds(t *testing.T) {
	p := newPieces(2*minPiece + 10)
	if start, end, ok := p.missing(p.size); ok {
		t.Errorf("missing(size) = %d..%d", start, end)
	}
}

func TestHoldBackOfTheLastPiece(t *testing.T) {
	p := newPieces(2*minPiece + 10)
	for i := range p.count() {
		p.grow(i, p.length(i), 0)
	}
	if got := p.run(0, p.size, false); got != 2*minPiece {
		t.Errorf("%d bytes shown before the digest matched, want %d", got, 2*minPiece)
	}
	if got := p.run(2*minPiece, 10, false); got != 0 {
		t.Errorf("%d bytes of the last piece shown", got)
	}
}

func TestCheckDigest(t *testing.T) {
	hex := strings.Repeat("0a", 32)
	for name, tt := range map[string]struct {
		d  string
		ok bool
	}{
		"sha256":             {"sha256:" + hex, true},
		"sha512":             {"sha512:" + hex + hex, true},
		"empty":              {"", false},
		"no hex":             {"sha256:", false},
		"short":              {"sha256:" + hex[1:], false},
		"long":               {"sha256:" + hex + "0", false},
		"upper case":         {"sha256:" + strings.ToUpper(hex), false},
		"path escape":        {"sha256:" + strings.Repeat("../", 21) + "x", false},
		"slash inside":       {"sha256:/" + hex[1:], false},
		"NUL":                {"sha256:\x00" + hex[1:], false},
		"unknown algorithm":  {"md5:" + hex[:32], false},
		"algorithm escape":   {"../sha256:" + hex, false},
		"sha512 with 64":     {"sha512:" + hex, false},
		"sha384 is no layer": {"sha384:" + hex + hex[:32], false},
	} {
		if got := checkDigest(digest.Digest(tt.d)) == nil; got != tt.ok {
			t.Errorf("%s: checkDigest = %v, want %v", name, got, tt.ok)
		}
	}
}

func TestParseLimit(t *testing.T) {
	for in, want := range map[string]Limit{
		"0": {}, "20%": Percent(20), " 12.5 % ": Percent(12.5), "50GiB": Bytes(50 << 30), "1.5Gi": Bytes(3 << 29),
		"500MB": Bytes(500e6), "10k": Bytes(10e3), "1gib": Bytes(1 << 30), "1048576": Bytes(1 << 20), "7B": Bytes(7), "1TiB": Bytes(1 << 40), "0%": {},
	} {
		got, err := ParseLimit(in)
		if err != nil || got != want {
			t.Errorf("ParseLimit(%q) = %v, %v; want %v", in, got, err, want)
		}
		if again, err := ParseLimit(got.String()); err != nil || again != got {
			t.Errorf("%q prints as %q, which reads back as %v, %v", in, got, again, err)
		}
	}
	for _, in := range []string{"", "%", "101%", "-1", "-5GiB", "GiB", "1e3", "NaN", "inf", "0x10", "5 apples", "99999999TiB", "1.2.3", "1,5GiB"} {
		if got, err := ParseLimit(in); err == nil {
			t.Errorf("ParseLimit(%q) = %v, want an error", in, got)
		}
	}
}

func FuzzParseLimit(f *testing.F) {
	for _, s := range []string{"20%", "50GiB", "1.5Gi", "0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseLimit(s)
		if err != nil {
			return
		}
		if l.Of(1<<40) < 0 {
			t.Errorf("%q is negative", s)
		}
		if again, err := ParseLimit(l.String()); err != nil || again != l {
			t.Errorf("%q prints as %q, which reads back as %v, %v", s, l, again, err)
		}
	})
}

func FuzzCheckDigest(f *testing.F) {
	f.Add("sha256:" + strings.Repeat("0a", 32))
	f.Fuzz(func(t *testing.T, s string) {
		d := digest.Digest(s)
		if checkDigest(d) != nil {
			return
		}
		if err := d.Validate(); err != nil {
			t.Errorf("accepted %q: %v", s, err)
		}
		if strings.ContainsAny(layout("x").blob(d)[len("x/blobs/"):], "\\.\x00") {
			t.Errorf("%q makes the path %q", s, layout("x").blob(d))
		}
	})
}

// FuzzPieceMap feeds foreign bytes to the parser of maps on disk: whatever it
// accepts must be within the blob, and written again must read the same.
func FuzzPieceMap(f *testing.F) {
	_, d := content(1, 10)
	whole := append(encodeMapHeader(d, 3*minPiece, ""), encodeRecord(0, 7)...)
	whole = append(whole, make([]byte, mapRecord)...)
	f.Add(append(whole, encodeRecord(2, 9)...))
	f.Add(whole[:mapHeader-1])
	f.Add(encodeMapHeader(d, maxBlob, ""))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := readMap(bytes.NewReader(b), d, "")
		if err != nil {
			return
		}
		out := encodeMapHeader(d, p.size, "")
		claims := 0
		for i, claimed := range p.claimed {
			record := make([]byte, mapRecord)
			if claimed {
				claims++
				record = encodeRecord(i, p.sum[i])
			}
			out = append(out, record...)
		}
		again, err := readMap(bytes.NewReader(out), d, "")
		if err != nil || claims != p.claims || again.claims != p.claims || again.size != p.size {
			t.Errorf("%d claims of %d bytes read back as %+v, %v", p.claims, p.size, again, err)
		}
	})
}

func TestPieceMapRefusesOtherMaps(t *testing.T) {
	_, d := content(1, 10)
	_, other := content(2, 10)
	good := encodeMapHeader(d, 2*minPiece, "")
	change := func(i int) []byte {
		b := bytes.Clone(good)
		b[i] ^= 1
		return b
	}
	for name, b := range map[string][]byte{
		"empty": {}, "truncated": good[:100], "magic": change(0), "version": change(8),
		"size": change(16), "checksum": change(12), "digest": change(40), "other blob": encodeMapHeader(other, 2*minPiece, ""),
	} {
		if _, err := readMap(bytes.NewReader(b), d, ""); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	records := append(good, encodeRecord(1, 5)...) // of piece 1, where that of piece 0 belongs
	if p, err := readMap(bytes.NewReader(records), d, ""); err != nil || p.claims != 0 {
		t.Errorf("another piece's record: %d claims, %v", p.claims, err)
	}
}

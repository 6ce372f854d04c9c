package cache

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Source brings the bytes of a blob that the cache lacks.
type Source interface {
	// Fetch announces the blob's size, then writes every missing byte
	// through f's writers, in any order of pieces and from any number of
	// goroutines, and returns when it has or cannot.
	//
	// ctx ends when the cache stops or the fill is over, never because a
	// client hung up; Fetch must then return soon, because Run waits for it.
	// A Fetch that returns nil before all bytes are there fails the fill
	// with io.ErrUnexpectedEOF. Fetch may be called again, after it returned
	// nil, when bytes found on disk at a resume turned out to be torn.
	Fetch(ctx context.Context, f *Fill) error
}

// Given is a Source whose bytes are somebody's to give: a registry's. Its blobs
// are hits only for callers with a Source of a giver that has given all of them
// once (I12), so that a digest by itself opens nothing.
type Given interface {
	Source
	Giver() string
}

// giverOf returns "", which is anybody, for a Source without a giver.
func giverOf(src Source) string {
	if g, ok := src.(Given); ok {
		return g.Giver()
	}
	return ""
}

// SourceFunc is a Source made of a function, without a giver.
type SourceFunc func(ctx context.Context, f *Fill) error

// Fetch calls fn.
func (fn SourceFunc) Fetch(ctx context.Context, f *Fill) error { return fn(ctx, f) }

// OriginKind says what kind of place bytes came from.
type OriginKind string

// The kinds of places. Writers are made with all but the last; a Reader of a
// blob that was already whole reports FromDisk.
const (
	FromUpstream OriginKind = "upstream"
	FromPeer     OriginKind = "peer"
	FromRuntime  OriginKind = "runtime"
	FromImport   OriginKind = "import" // an archive
	FromDisk     OriginKind = "disk"
)

// Origin is a place that bytes came from. Name is the peer's name or the
// registry's host; it is kept for explain and never becomes a metric label.
type Origin struct {
	Kind OriginKind
	Name string
}

// Fill is the one running fetch of a blob, as its Source sees it. All methods
// may be called from many goroutines.
type Fill struct{ *fill }

// Writer returns a writer into the fill for bytes that came from origin.
func (f *Fill) Writer(origin Origin) *Writer { return &Writer{fill: f.fill, origin: origin} }

// Writer writes one origin's bytes into a fill. It has all of Fill's methods
// that a transfer needs, and holds nothing that needs closing.
type Writer struct {
	*fill
	origin Origin
}

// WriteAt adds TRUSTED bytes at off: readers see them at once, except those of
// the last piece, which wait until the whole digest matches (I2). Within a
// piece bytes are appended: off must not lie beyond the bytes that its piece
// already has (see Missing); what is already there is skipped, never
// overwritten. p may span pieces. Concurrent writers of one piece take turns.
//
// Bytes beyond the size fail the fill with ErrSizeMismatch; a disk that
// cannot take them, even after evicting, fails it with ErrNoRoom. After the
// fill has ended, WriteAt returns its error.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) { return w.write(p, off, w.origin, nil) }

func (o Origin) String() string { return strings.TrimSpace(string(o.Kind) + " " + o.Name) }

// mostSources is how many origins a line of the log names.
const mostSources = 4

// sources names the origins of size bytes for the log, largest first. Bytes without an
// origin were found on disk.
func sources(size int64, from map[Origin]int64) string {
	bytes := maps.Clone(from)
	for _, n := range from {
		size -= n
	}
	if len(from) > 0 && size > 0 {
		bytes[Origin{Kind: FromDisk}] += size
	}
	var names []string
	for _, o := range slices.SortedFunc(maps.Keys(bytes), func(x, y Origin) int {
		return cmp.Or(cmp.Compare(bytes[y], bytes[x]), cmp.Compare(x.String(), y.String()))
	}) {
		names = append(names, o.String())
	}
	switch more := len(names) - mostSources; {
	case len(names) == 0:
		return "unknown"
	case more > 0:
		return fmt.Sprintf("%s and %d more", strings.Join(names[:mostSources], ", "), more)
	}
	return strings.Join(names, ", ")
}

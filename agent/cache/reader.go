package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

// Reader reads one blob, whole or still being filled, across the commit, an
// eviction and the loss of the cache directory. It is what http.ServeContent
// wants. Like an os.File it has one cursor and is for one goroutine at a time;
// ReadAt, Ready, HasPiece, Changed and Complete may be called from many. It
// must be closed.
//
// A reader from Open waits for missing bytes until the context given to Open
// ends; a reader from Lookup returns ErrMissing instead. When the fill fails,
// bytes that were there can still be read, followed by its *FillError, except
// after ErrDigestMismatch, which ends every read at once.
type Reader struct {
	digest digest.Digest
	size   int64
	ctx    context.Context // nil: never wait
	fill   *fill           // nil: the blob was whole at Open
	joined bool            // fill was somebody else's; see FillError.Joined
	shared *os.File        // the fill's file, for reads at an offset
	own    *os.File        // this reader's own open file; for a fill, from the first Extent on
	pos    int64
	cursor atomic.Int64 // reported to the fill; -1 before the first read
	closed atomic.Bool
	view   view
}

// view is what a reader sees of the last piece of a running fill.
type view int8

const (
	viewWhole  view = iota // nothing, before the whole digest matched
	viewPart               // what is there, as long as bytes before it are missing
	viewPieces             // what is there
)

var (
	_ io.ReadSeekCloser = (*Reader)(nil)
	_ io.ReaderAt       = (*Reader)(nil)
)

// Size returns the blob's size; it is known from the start.
func (r *Reader) Size() int64 { return r.size }

// Origin says where the bytes come from: FromDisk if the blob was whole at
// Open, else where the first bytes of its fill came from; the zero Origin
// while there are none (so ask after Ready).
func (r *Reader) Origin() Origin {
	if r.fill == nil {
		return Origin{Kind: FromDisk}
	}
	r.fill.mu.Lock()
	defer r.fill.mu.Unlock()
	return r.fill.first
}

// Complete reports whether every byte can be read now: the whole digest has
// matched.
func (r *Reader) Complete() bool {
	if r.fill == nil {
		return true
	}
	r.fill.mu.Lock()
	defer r.fill.mu.Unlock()
	return r.fill.good
}

// HasPiece reports whether all of piece i can be read now.
func (r *Reader) HasPiece(i int) bool {
	if i < 0 || i >= pieceCount(r.size) {
		return false
	}
	if r.fill == nil {
		return true
	}
	ps := PieceSize(r.size)
	off := int64(i) * ps
	want := min(ps, r.size-off)
	n, _ := r.fill.visible(off, want, r.view)
	return n == want
}

// Changed returns a channel that is closed when HasPiece, Complete or Err may
// answer differently; for a blob that was whole at Open it is nil and never
// closed.
func (r *Reader) Changed() <-chan struct{} {
	if r.fill == nil {
		return nil
	}
	return r.fill.Changed()
}

// Err returns the *FillError of the fill this reader joined; nil while it runs
// and after it succeeded.
func (r *Reader) Err() error {
	if r.fill == nil {
		return nil
	}
	return toldTo(r.joined, r.fill.failure())
}

// ForPart says that the caller reads a part of the blob. Lazy pulls begin with a table at
// the end: if the last piece were held back, they would wait for the whole blob. It is
// shown while bytes before it are missing.
func (r *Reader) ForPart() {
	if r.view == viewWhole {
		r.view = viewPart
	}
}

// Ready blocks until a byte at off can be read, and returns nil; it does so at
// once if off is the size. Otherwise it returns ctx's cause or the fill's
// error. The fill learns that off is wanted.
func (r *Reader) Ready(ctx context.Context, off int64) error {
	if r.closed.Load() {
		return os.ErrClosed
	}
	if r.fill == nil || off >= r.size {
		return nil
	}
	return toldTo(r.joined, r.fill.await(ctx, off, r.view))
}

// Extent returns a file and the number n of bytes that can be read from it at
// off without waiting, for sendfile of a blob that is still being filled. n ==
// 0 means that nothing is there yet (see Ready), or that off is the size. The
// file belongs to this reader alone, is closed by Close, and its offset is the
// caller's to set. The fill learns that the cursor is at off.
func (r *Reader) Extent(off int64) (file *os.File, n int64, err error) {
	if r.closed.Load() {
		return nil, 0, os.ErrClosed
	}
	if off < 0 || off > r.size {
		return nil, 0, fmt.Errorf("extent at %d of %d bytes: %w", off, r.size, errOffset)
	}
	if err := r.reopen(); err != nil {
		return nil, 0, err
	}
	if r.fill == nil {
		return r.own, r.size - off, nil
	}
	r.report(off)
	n, err = r.fill.visible(off, r.size-off, r.view)
	return r.own, n, toldTo(r.joined, err)
}

// reopen gives the reader an open file of its own, whose offset it shares with
// nobody. The path through /proc works whatever happened to the name.
func (r *Reader) reopen() error {
	if r.own != nil {
		return nil
	}
	own, err := reopen(r.shared)
	if err != nil {
		return fmt.Errorf("reopen %s: %w", r.digest, err)
	}
	r.own = own
	return nil
}

// Read reads at the cursor. It returns what is there rather than wait for all
// of p.
func (r *Reader) Read(p []byte) (int, error) {
	n, err := r.readSome(p, r.pos)
	r.pos += int64(n)
	return n, err
}

// ReadAt fills p from off, waiting for what is missing.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	read := 0
	for read < len(p) {
		n, err := r.readSome(p[read:], off+int64(read))
		read += n
		if err != nil {
			return read, err
		}
	}
	return read, nil
}

// readSome reads at least one byte at off, or says why not.
func (r *Reader) readSome(p []byte, off int64) (int, error) {
	switch {
	case r.closed.Load():
		return 0, os.ErrClosed
	case off < 0:
		return 0, fmt.Errorf("read at %d: %w", off, errOffset)
	case off >= r.size:
		return 0, io.EOF
	case len(p) == 0:
		return 0, nil
	}
	p = p[:min(int64(len(p)), r.size-off)]
	if r.fill == nil {
		return r.readFile(r.own, p, off)
	}
	r.report(off)
	n, err := r.waitSome(off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	return r.readFile(r.shared, p[:n], off)
}

// waitSome returns how many of want bytes at off can be read, at least one.
func (r *Reader) waitSome(off, want int64) (int64, error) {
	for {
		n, err := r.fill.visible(off, want, r.view)
		if n > 0 || err != nil {
			return n, toldTo(r.joined, err)
		}
		if r.ctx == nil {
			return 0, ErrMissing
		}
		if err := r.fill.await(r.ctx, off, r.view); err != nil {
			return 0, toldTo(r.joined, err)
		}
	}
}

// readFile reads all of p, which is known to be there; a file that turns out
// shorter lost bytes on disk.
func (r *Reader) readFile(file *os.File, p []byte, off int64) (int, error) {
	n, err := file.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return n, fmt.Errorf("read %s: %w", r.digest, err)
	}
	return n, nil
}

// report tells the fill where this reader is, at most once a piece.
func (r *Reader) report(off int64) {
	if r.ctx == nil {
		return
	}
	before := r.cursor.Swap(off)
	if ps := PieceSize(r.size); before < 0 || before/ps != off/ps {
		r.fill.moved()
	}
}

var errOffset = errors.New("offset out of range")

// Seek sets the cursor; the fill learns of it at the next read.
func (r *Reader) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += r.pos
	case io.SeekEnd:
		offset += r.size
	}
	if offset < 0 || whence < io.SeekStart || whence > io.SeekEnd {
		return 0, fmt.Errorf("seek to %d, whence %d: %w", offset, whence, errOffset)
	}
	r.pos = offset
	return offset, nil
}

// Close releases the blob. It does not stop the fill. A second Close returns
// os.ErrClosed.
func (r *Reader) Close() error {
	if r.closed.Swap(true) {
		return os.ErrClosed
	}
	var err error
	if r.own != nil {
		err = r.own.Close()
	}
	if r.fill != nil {
		r.fill.leave(r)
	}
	return err
}

// newReader makes a reader of file, or of a sized fill that the caller is
// attached to; it waits for nothing until it is given a context.
func newReader(d digest.Digest, size int64, f *fill, file *os.File) *Reader {
	r := &Reader{digest: d, size: size, fill: f, own: file}
	if f != nil {
		r.shared = f.file
	}
	r.cursor.Store(-1)
	return r
}

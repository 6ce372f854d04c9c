package runtimestore

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
)

// held is how many bytes at the end of a blob wait for its digest; blobs up to
// this size wait as a whole. To hash so much takes a few milliseconds, and a
// runtime that lacks it can commit nothing.
const held = 4 << 20

// Blob is an open blob. Its methods may be called at once from anywhere, but
// not after Close; Close ends reads that wait.
type Blob struct {
	file    *os.File
	size    int64
	pending *verification // nil = the file was known to be good

	closeOnce sync.Once
	closed    chan struct{}
}

// Size is the number of bytes.
func (b *Blob) Size() int64 { return b.size }

// File is the file itself once its digest has matched, with a file offset that
// is the caller's to use. It is closed by Close.
func (b *Blob) File() (f *os.File, ok bool) {
	if b.pending == nil {
		return b.file, true
	}
	select {
	case <-b.pending.done:
		return b.file, b.pending.err == nil
	default:
		return nil, false
	}
}

// Ready returns once a byte at off can be read without waiting, or never will
// be (then with the reason).
func (b *Blob) Ready(ctx context.Context, off int64) error {
	if b.pending == nil || off < b.size-held || off >= b.size {
		return nil
	}
	select {
	case <-b.pending.done:
		return b.pending.err
	case <-b.closed:
		return os.ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ReadAt waits for the digest where p reaches into the last bytes. If it does
// not match, it reads up to these and returns the error.
func (b *Blob) ReadAt(p []byte, off int64) (int, error) {
	if b.pending == nil || off+int64(len(p)) <= b.size-held {
		return b.file.ReadAt(p, off)
	}
	free := 0
	if n := b.size - held - off; n > 0 {
		var err error
		if free, err = b.file.ReadAt(p[:n], off); err != nil {
			return free, err
		}
	}
	if err := b.Ready(context.Background(), max(off, b.size-held)); err != nil {
		return free, fmt.Errorf("read the end of a blob: %w", err)
	}
	n, err := b.file.ReadAt(p[free:], off+int64(free))
	return free + n, err
}

// Close closes the file.
func (b *Blob) Close() error {
	b.closeOnce.Do(func() { close(b.closed) })
	return b.file.Close()
}

var _ io.ReaderAt = (*Blob)(nil)

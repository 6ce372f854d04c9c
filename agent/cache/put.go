package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
)

// PutFile commits content that can be read more than once. It is checked first;
// ErrDigestMismatch leaves no trace. If a fill of d runs, the content completes it.
// PutFile waits, until ctx ends, for Run and for the commit. ErrNoRoom says that the
// disk did not take it; a *FillError says that a fill under way failed for reasons of
// its own, so another PutFile may fare better.
func (c *Cache) PutFile(ctx context.Context, d digest.Digest, origin Origin, content *io.SectionReader) error {
	if err := checkDigest(d); err != nil {
		return err
	}
	if err := check(d, content); err != nil {
		return fmt.Errorf("put %s: %w", d, err)
	}
	src := SourceFunc(func(_ context.Context, f *Fill) error { return copyMissing(f.Writer(origin), content) })
	r, f, _, err := c.find(ctx, d, src)
	if err != nil {
		return fmt.Errorf("put %s: %w", d, err)
	}
	if r != nil {
		return r.Close()
	}
	defer f.release()
	if err := copyMissing((&Fill{f}).Writer(origin), content); err != nil {
		return fmt.Errorf("put %s: %w", d, err)
	}
	return f.outcome(ctx)
}

// outcome waits until the fill's end is booked, and returns why there is no blob.
func (f *fill) outcome(ctx context.Context) error {
	if err := wait(ctx, f.done); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return cmp.Or(f.err, f.unkept)
}

// check reads all of content, from its beginning.
func check(d digest.Digest, content *io.SectionReader) error {
	v := d.Verifier()
	if _, err := io.Copy(v, io.NewSectionReader(content, 0, content.Size())); err != nil {
		return err
	}
	if !v.Verified() {
		return ErrDigestMismatch
	}
	return nil
}

// copyMissing writes content where bytes are missing.
func copyMissing(w *Writer, content *io.SectionReader) error {
	if err := w.SetSize(content.Size()); err != nil {
		return err
	}
	buf := make([]byte, min(readBlock, content.Size()))
	for {
		start, end, ok := w.Missing(0)
		if !ok {
			return nil
		}
		p := buf[:min(int64(len(buf)), end-start)]
		if _, err := content.ReadAt(p, start); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if _, err := w.WriteAt(p, start); err != nil {
			return err
		}
	}
}

// ErrPresent says that a blob is in the cache, or on its way there.
var ErrPresent = errors.New("is here or on its way already")

// PutStream commits size bytes of r, which can be read only once. Nobody sees them before
// they all match: a wrong stream is ErrDigestMismatch and leaves nothing, and neither
// does one that breaks off. If d is here or being filled it returns ErrPresent and has
// read nothing: bytes that nobody has checked do not go into a fill that others read
// from. Other errors, and what it waits for, are those of PutFile; waiting for r is up to
// r.
func (c *Cache) PutStream(ctx context.Context, d digest.Digest, origin Origin, size int64, r io.Reader) error {
	if err := checkDigest(d); err != nil {
		return err
	}
	if err := wait(ctx, c.started); err != nil {
		return err
	}
	src := stream{fed: make(chan struct{})}
	f, over, err := c.startFill(d, src)
	switch {
	case over != nil:
		return fmt.Errorf("put %s: %w", d, ErrPresent)
	case err != nil:
		return err
	}
	defer f.release()
	err = feedStream((&Fill{f}).Writer(origin), d, size, r)
	if err != nil {
		f.fail(errStream) // not with err: that the stream was wrong says nothing of what others give
	}
	close(src.fed)
	booked := f.outcome(context.WithoutCancel(ctx)) // soon: all bytes are there, or it failed
	if err != nil {
		return fmt.Errorf("put %s: %w", d, err)
	}
	return booked
}

var errStream = errors.New("the stream that should fill it failed")

// stream is the Source of a fill that PutStream writes. It has no giver, so callers
// that come with one do not join it.
type stream struct{ fed chan struct{} }

// unchecked reports whether f's bytes come from a stream.
func (f *fill) unchecked() bool {
	_, ok := f.src.(stream)
	return ok
}

// Fetch waits for the writer.
func (s stream) Fetch(ctx context.Context, _ *Fill) error { return wait(ctx, s.fed) }

// feedStream writes size bytes of r, the last of them once all match.
func feedStream(w *Writer, d digest.Digest, size int64, r io.Reader) error {
	if err := w.SetSize(size); err != nil {
		return err
	}
	v := d.Verifier()
	buf := make([]byte, readBlock)
	for off := int64(0); off < size; {
		p := buf[:min(readBlock, size-off)]
		if _, err := io.ReadFull(r, p); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read %d of %d bytes: %w", off, size, err)
		}
		_, _ = v.Write(p) // a hash never fails
		if off+int64(len(p)) == size && !v.Verified() {
			return ErrDigestMismatch
		}
		if _, err := w.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/larder-cache/larder/agent/cache"
)

// content is a blob's bytes at one place. It is for one goroutine at a time.
type content interface {
	io.Closer
	source() source
	size() int64
	// ready waits until a byte at off can be read. off is below the size.
	ready(ctx context.Context, off int64) error
	// extent is a file and how many bytes can be read from it at off without
	// waiting. Without a file there is none, and read is the way.
	extent(off int64) (*os.File, int64, error)
	// read reads at least one byte at off, which is ready, or fails.
	read(p []byte, off int64) (int, error)
}

// cached is a blob in the cache, whole or still being filled.
type cached struct{ *cache.Reader }

func (c cached) source() source {
	switch c.Origin().Kind {
	case cache.FromDisk:
		return sourceDisk
	case cache.FromPeer:
		return sourcePeer
	case cache.FromRuntime:
		return sourceRuntime
	}
	return sourceUpstream
}
func (c cached) size() int64                                { return c.Size() }
func (c cached) ready(ctx context.Context, off int64) error { return c.Ready(ctx, off) }
func (c cached) extent(off int64) (*os.File, int64, error)  { return c.Extent(off) }
func (c cached) read(p []byte, off int64) (int, error) {
	if _, err := c.Seek(off, io.SeekStart); err != nil {
		return 0, err
	}
	return c.Read(p)
}

// forPart lets c show what is there of a blob to a client that wants a part
// of it.
func forPart(c content) {
	switch c := c.(type) {
	case cached:
		c.ForPart()
	case *promised:
		c.part = true
	}
}

// held is a blob in the runtime's own store.
type held struct{ RuntimeBlob }

func (h held) source() source { return sourceRuntime }
func (h held) size() int64    { return h.Size() }
func (h held) ready(ctx context.Context, off int64) error {
	err := h.Ready(ctx, off)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", errRuntime, err)
	}
	return err
}
func (h held) extent(off int64) (*os.File, int64, error) {
	file, ok := h.File()
	if !ok {
		return nil, 0, nil
	}
	return file, h.Size() - off, nil
}
func (h held) read(p []byte, off int64) (int, error) {
	n, err := h.ReadAt(p[:min(int64(len(p)), h.Size()-off)], off)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", errRuntime, err)
	}
	return n, err
}

// promised is a blob that is being opened, of the size that its manifest lists.
type promised struct {
	length int64
	part   bool
	opened chan struct{} // closed once the next two are set
	at     content
	err    error
}

// place is where the blob is; nil while it is being opened.
func (c *promised) place() (content, error) {
	select {
	case <-c.opened:
	default:
		return nil, nil
	}
	if c.err == nil && c.at.size() != c.length {
		return nil, fmt.Errorf("%w: %d bytes, but the manifest says %d", cache.ErrSizeMismatch, c.at.size(), c.length)
	}
	return c.at, c.err
}

func (c *promised) size() int64 { return c.length }

func (c *promised) source() source {
	if at, err := c.place(); at != nil && err == nil {
		return at.source()
	}
	return sourceNone
}

func (c *promised) ready(ctx context.Context, off int64) error {
	select {
	case <-c.opened:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	at, err := c.place()
	if err != nil {
		return err
	}
	if c.part {
		forPart(at)
	}
	return at.ready(ctx, off)
}

func (c *promised) extent(off int64) (*os.File, int64, error) {
	at, err := c.place()
	if at == nil || err != nil {
		return nil, 0, err
	}
	return at.extent(off)
}

func (c *promised) read(p []byte, off int64) (int, error) { return c.at.read(p, off) } // it is ready

// Close waits for the end of opening, which the caller has cancelled.
func (c *promised) Close() error {
	<-c.opened
	if c.err != nil {
		return nil
	}
	return c.at.Close()
}

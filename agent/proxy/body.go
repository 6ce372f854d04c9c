package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/larder-cache/larder/agent/upstream"
)

// body is one blob as http.ServeContent reads it, wherever its bytes are. It
// waits no longer than the stall deadline for a byte, or than the swarm's deadline
// while coming says that it is on its way, and changes to another place in the
// middle of the blob when heal has one.
type body struct {
	x      *exchange
	stall  time.Duration
	swarm  time.Duration
	coming func() (coming, ours bool)
	// heal finds another place for the bytes from off on, or returns err.
	heal func(err error, off int64) (content, error)

	mu   sync.Mutex // guards the fields below: a multi-range answer reads from a goroutine that outlives ServeContent
	at   content
	off  int64
	part bool // the client wants a part, and does not wait for the whole digest
	// chunk: the client fetches the blob in chunks, and this is not the first; see inChunks.
	chunk bool
	late  bool  // the headers go out before the first byte is there
	err   error // why bytes could not be had
}

func (b *body) Seek(offset int64, whence int) (int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch whence {
	case io.SeekCurrent:
		offset += b.off
	case io.SeekEnd:
		offset += b.at.size()
	}
	if offset < 0 {
		return 0, fmt.Errorf("seek to %d: %w", offset, os.ErrInvalid)
	}
	b.off = offset
	return offset, nil
}

// Read serves multi-range answers; single ranges go through sendTo.
func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.off >= b.at.size() {
		return 0, io.EOF
	}
	if err := b.await(); err != nil {
		return 0, err
	}
	n, err := b.at.read(p, b.off)
	b.off += int64(n)
	return n, b.note(err)
}

// await returns when a byte at the cursor can be read. It is called with mu held.
func (b *body) await() error {
	err := b.until(b.ready, func() (stop func()) { return b.x.within(b.stall, errStalled) })
	if err == nil && b.late {
		b.late = false
		b.x.foundAt(b.at.source())
	}
	return err
}

// until calls ready for one place after another until it returns nil or no place
// is left. bound bounds the search for the next.
func (b *body) until(ready func() error, bound func() (stop func())) error {
	for {
		err := ready()
		if err == nil {
			return nil
		}
		stop := bound()
		next, err := b.heal(err, b.off)
		stop()
		if err != nil {
			return b.note(err)
		}
		_ = b.at.Close() // was only read
		b.at = next
	}
}

// comingLook is how often a wait longer than the stall deadline asks whether the
// byte is still on its way.
const comingLook = time.Second

// ready bounds the wait by the stall deadline; by the swarm's while coming.
func (b *body) ready() error {
	err := b.readyWithin(b.stall, errStalled)
	for begun := time.Now(); errors.Is(err, errStalled); err = b.readyWithin(comingLook, errStalled) {
		if coming, _ := b.coming(); !coming || time.Since(begun) >= b.swarm-b.stall {
			b.x.cancel(err)
			break
		}
	}
	return err
}

// readyWithin waits for the byte at the cursor, and returns cause if d passes before.
// Unlike exchange.within it ends nothing then.
func (b *body) readyWithin(d time.Duration, cause error) error {
	ctx, stop := context.WithTimeoutCause(b.x.ctx, d, cause)
	defer stop()
	if b.part {
		forPart(b.at)
	}
	return b.at.ready(ctx, b.off)
}

// note keeps the first error that was not the client's.
func (b *body) note(err error) error {
	if err != nil && b.err == nil {
		b.err = err
	}
	return err
}

// readyAt waits until then for the first byte of an answer and says where it comes
// from. A byte that is on its way from another node by then is taken for granted: a
// client that got an error instead would ask the registry, from which that node gets
// it already, and so would every node's. So is the byte of a chunk, also if it cannot be
// had; but a client that is to bring credentials is told so.
func (b *body) readyAt(off int64, then time.Time) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.off = off
	coming, ours := false, false
	err := b.until(func() error {
		err := b.readyWithin(time.Until(then), errBudget)
		if !errors.Is(err, errBudget) {
			return err
		}
		coming, ours = b.coming()
		if b.late = coming || b.chunk; b.late {
			return nil
		}
		b.x.cancel(err)
		return err
	}, func() (stop func()) { return b.x.within(time.Until(then), errBudget) })
	switch {
	case err != nil && b.chunk && !upstream.IsUnauthorized(err):
		b.late = true // sendTo meets it again, and ends the body
	case err != nil:
		return err
	}
	from := b.at.source()
	switch {
	case ours:
		from = sourceUpstream
	case coming:
		from = sourcePeer
	}
	b.x.describe(from, b.at.size(), off)
	return nil
}

// sendTo sends n bytes from the cursor on, from files where there are files.
func (b *body) sendTo(x *exchange, n int64) (int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.late {
		x.flush()
	}
	var sent int64
	for sent < n {
		if x.proxy.halted.Load() {
			x.flush() // no answer at all would end a pull in chunks
			<-x.ctx.Done()
			return sent, b.note(context.Cause(x.ctx))
		}
		m, err := b.sendSome(x, n-sent)
		sent += m
		b.off += m
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// sendSome sends at least one byte and at most limit, or fails.
func (b *body) sendSome(x *exchange, limit int64) (int64, error) {
	file, n, err := b.at.extent(b.off)
	if err != nil || n == 0 {
		// Nothing is there, or the fill is over: await says which, and heals.
		if err := b.await(); err != nil {
			return 0, err
		}
		if file, n, err = b.at.extent(b.off); err != nil {
			return 0, b.note(err)
		}
	}
	if n = min(n, limit, writeChunk); file == nil || n <= smallSend {
		return b.sendBuffered(x, limit)
	}
	if _, err := file.Seek(b.off, io.SeekStart); err != nil {
		return 0, b.note(err)
	}
	sent, err := x.sendFile(&io.LimitedReader{R: file, N: n})
	if errors.Is(err, syscall.EIO) { // of the disk: a connection has none
		_ = b.note(err)
	}
	if err == nil && sent < n {
		err = b.note(io.ErrUnexpectedEOF) // the file lost bytes
	}
	return sent, err
}

// smallSend is the size up to which a copy beats sendfile: net/http sends the
// headers and the first 512 bytes before it, so a small answer costs two more
// system calls (measured: 48 against 44 µs of processor time for 4 KiB).
const smallSend = 32 << 10

func (b *body) sendBuffered(x *exchange, limit int64) (int64, error) {
	buf := buffers.Get().(*[copyBuffer]byte)
	defer buffers.Put(buf)
	n, err := b.at.read(buf[:min(limit, copyBuffer)], b.off)
	if err != nil {
		return 0, b.note(err)
	}
	n, err = x.Write(buf[:n])
	return int64(n), err
}

// failure is why bytes could not be had, nil if all that were asked for could.
func (b *body) failure() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// Close ends what still reads and lets go of the blob.
func (b *body) Close() error {
	b.x.cancel(context.Canceled)
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.at.Close()
}

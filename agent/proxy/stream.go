package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

const (
	// heldTail is how much of the end of a passed-through blob is kept back
	// until its digest has matched: enough that no runtime can finish a wrong
	// blob, and little enough memory for many at once.
	heldTail = 256 << 10
	// streamRetries is how often in a row a stream is opened again without a
	// byte of progress.
	streamRetries = 3
	streamBackoff = 250 * time.Millisecond
)

// stream reads a blob from other nodes, else straight from upstream, and keeps it
// nowhere: for a node whose disk has no room. Read from 0 to the end it is verified,
// with its tail held back until then; read from anywhere else only the runtime can
// verify it.
type stream struct {
	ctx      context.Context // of all requests; ends with cancel
	cancel   context.CancelCauseFunc
	swarm    Swarm // nil: not, or no longer, from other nodes
	upstream *upstream.Client
	target   upstream.Target
	digest   digest.Digest
	total    int64                       // 0: not known yet
	until    func(off int64) int64       // where what the client wants from off on ends; total is known
	whole    func()                      // called when all of it came and was right
	passed   func(cache.OriginKind, int) // called for bytes that came

	body     io.ReadCloser // nil: to be opened at next
	peers    bool          // body is from other nodes
	next     int64         // offset of the next byte of body
	stop     int64         // where body ends
	verifier digest.Verifier
	buf      []byte // read and not yet taken; it ends at next
	room     []byte // backs buf
}

func (s *stream) source() source {
	if s.peers {
		return sourcePeer
	}
	return sourceUpstream
}
func (s *stream) size() int64                           { return s.total }
func (s *stream) extent(int64) (*os.File, int64, error) { return nil, 0, nil }

// reposition makes off the next byte, and forgets what was hashed.
func (s *stream) reposition(off int64) {
	s.drop()
	s.buf, s.next, s.verifier = nil, off, nil
	if off == 0 && s.end() < 0 {
		s.verifier = s.digest.Verifier()
	}
}

// end is where what the client wants from the next byte on ends, -1 for the blob's end.
func (s *stream) end() int64 {
	if s.total == 0 {
		return -1
	}
	if end := s.until(s.next); end < s.total {
		return end
	}
	return -1
}

// open asks for the blob from next on.
func (s *stream) open() error {
	end := s.end()
	body, size, err := s.ask(end)
	if err != nil {
		return err
	}
	if s.total != 0 && size != s.total {
		_ = body.Close()
		return fmt.Errorf("stream %s: %w", s.digest, cache.ErrSizeMismatch)
	}
	s.body, s.total, s.stop = body, size, size
	if end >= 0 && !s.peers {
		s.stop = end
	}
	return nil
}

// ask asks other nodes once, then upstream if they do not have the blob, or no more
// of it.
func (s *stream) ask(end int64) (body io.ReadCloser, size int64, err error) {
	if s.swarm != nil {
		body, size, err = s.swarm.Through(s.ctx, s.target, KindBlob, s.digest, s.next)
		if s.peers = err == nil; s.peers || s.ctx.Err() != nil {
			return body, size, err
		}
		s.swarm = nil
	}
	return s.upstream.Blob(s.ctx, s.target, s.digest, s.next, end)
}

// broke closes the body, which failed, for another one from the same offset on.
func (s *stream) broke() {
	s.drop()
	if s.peers {
		s.swarm, s.peers = nil, false
	}
}

// ready waits until a byte at off may be shown. If ctx ends first, so does the stream.
func (s *stream) ready(ctx context.Context, off int64) error {
	if off >= s.next-int64(len(s.buf)) && off < s.next {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { s.cancel(context.Cause(ctx)) })
	defer stop()
	err := s.readAhead(off)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (s *stream) readAhead(off int64) error {
	if len(s.buf) > 0 || off != s.next {
		s.reposition(off)
	}
	for failures := 0; len(s.buf) == 0; {
		err := s.fill()
		if err == nil {
			continue
		}
		if failures++; failures > streamRetries || !s.mayRetry(err) {
			return err
		}
		if err := sleep(s.ctx, streamBackoff<<failures); err != nil {
			return err
		}
	}
	return nil
}

func (s *stream) mayRetry(err error) bool {
	return s.ctx.Err() == nil && !errors.Is(err, cache.ErrDigestMismatch) && !errors.Is(err, cache.ErrSizeMismatch) &&
		!upstream.IsNotFound(err) && !upstream.IsUnauthorized(err)
}

// fill reads the next bytes that may be shown: some, or the whole tail once it
// is verified.
func (s *stream) fill() error {
	if s.verifier == nil && s.next == s.stop { // the client wants more
		s.drop()
	}
	if s.body == nil {
		if err := s.open(); err != nil {
			return err
		}
	}
	if s.verifier == nil {
		return s.readSome(s.stop)
	}
	if tail := max(0, s.total-heldTail); s.next < tail {
		return s.readSome(tail)
	}
	return s.readTail()
}

// readSome reads at least one byte below end.
func (s *stream) readSome(end int64) error {
	s.grow(copyBuffer)
	n, err := s.body.Read(s.room[:min(copyBuffer, end-s.next)])
	s.came(n)
	s.take(s.room[:n])
	if n > 0 {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	s.broke()
	return fmt.Errorf("stream %s: %w", s.digest, err)
}

func (s *stream) readTail() error {
	s.grow(heldTail)
	tail := s.room[:s.total-s.next]
	n, err := io.ReadFull(s.body, tail)
	s.came(n)
	if err != nil {
		s.broke() // and read it again from s.next
		return fmt.Errorf("stream %s: %w", s.digest, err)
	}
	s.take(tail)
	if !s.verifier.Verified() {
		s.buf = nil
		return fmt.Errorf("stream %s: %w", s.digest, cache.ErrDigestMismatch)
	}
	s.whole()
	return nil
}

// came counts bytes of the body.
func (s *stream) came(n int) {
	from := cache.FromUpstream
	if s.peers {
		from = cache.FromPeer
	}
	s.passed(from, n)
}

func (s *stream) take(p []byte) {
	if s.verifier != nil {
		_, _ = s.verifier.Write(p) // a hash never fails
	}
	s.buf = p
	s.next += int64(len(p))
}

func (s *stream) grow(n int) {
	if len(s.room) < n {
		s.room = make([]byte, n)
	}
}

func (s *stream) read(p []byte, off int64) (int, error) {
	start := s.next - int64(len(s.buf))
	n := copy(p, s.buf[off-start:])
	s.buf = s.buf[off-start+int64(n):]
	return n, nil
}

func (s *stream) drop() {
	if s.body != nil {
		_ = s.body.Close() // was only read
		s.body = nil
	}
}

func (s *stream) Close() error {
	s.drop()
	s.cancel(nil)
	return nil
}

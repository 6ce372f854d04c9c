package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/peer"
)

const (
	// passAhead is how much of a blob that this node has no room for is kept in memory,
	// in bytes: what neighbours give meanwhile.
	passAhead = 4 << 20
	// maxPassing bounds that of all blobs together.
	maxPassing = 32 << 20
	// passWait is how long other nodes may take for the first byte, unless they get it.
	passWait = 2 * time.Second
)

var (
	errPassing = errors.New("too many blobs pass through this node")
	errNotSoon = errors.New("other nodes do not give it soon")
)

// Through brings a blob from other nodes past the cache.
func (s *swarm) Through(ctx context.Context, t upstream.Target, kind proxy.Kind, d digest.Digest, off int64) (io.ReadCloser, int64, error) {
	listed := s.agent.proxy.Listed(t, d)
	ahead := max(passAhead, 2*cache.PieceSize(listed))
	if s.passing.Add(ahead) > maxPassing {
		s.passing.Add(-ahead)
		return nil, 0, errPassing
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &passage{digest: d, listed: listed, at: off, size: -1, pieces: make(map[int][]byte), changed: make(chan struct{}), cancel: cancel, done: make(chan struct{})}
	want := peer.Want{
		Digest: d, Registry: t.Registry, Repository: t.Repository, Manifest: kind == proxy.KindManifest,
		Authorization: t.Authorization, Node: asNode(t), Size: listed, Ahead: ahead,
	}
	go func() {
		defer close(p.done)
		defer s.passing.Add(-ahead)
		p.end(s.Swarm.Fetch(ctx, want, p, func(context.Context, peer.Sink) error { return errHeld }))
	}()
	if err := p.begun(ctx, func() bool { coming, _ := s.Coming(d); return coming }); err != nil {
		_ = p.Close()
		return nil, 0, err
	}
	return p, p.Size(), nil
}

// passage is a blob on its way through this node: a fill of which only the pieces about to
// be read are here, in memory. Read is for one goroutine, everything else for any.
type passage struct {
	digest digest.Digest
	listed int64 // size by the manifest; 0 if unknown
	cancel context.CancelFunc
	done   chan struct{} // closed after the fetch

	mu      sync.Mutex // guards the following
	size    int64
	at      int64 // of the next byte that is read
	pieces  map[int][]byte
	changed chan struct{}
	ended   bool
	err     error // why, if not all of it came
}

var _ peer.Fill = (*passage)(nil)

// begun waits for the first byte.
func (p *passage) begun(ctx context.Context, coming func() bool) error {
	again := time.NewTicker(passWait)
	defer again.Stop()
	for {
		ready, changed, err := p.look()
		if ready || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-again.C:
			if !coming() {
				return errNotSoon
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// look reports whether the next byte is here, else what to wait for.
func (p *passage) look() (ready bool, changed <-chan struct{}, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.size >= 0 && (p.at >= p.size || p.pieces[p.pieceAt(p.at)] != nil):
		return true, nil, nil
	case p.ended && p.err == nil:
		return false, nil, io.ErrUnexpectedEOF
	}
	return false, p.changed, p.err
}

func (p *passage) pieceAt(off int64) int { return int(off / cache.PieceSize(p.size)) }

// Read waits for bytes.
func (p *passage) Read(b []byte) (int, error) {
	for {
		ready, changed, err := p.look()
		if err != nil {
			return 0, err
		}
		if ready {
			return p.take(b)
		}
		<-changed
	}
}

// take copies what is here, and lets a piece go once all of it is read.
func (p *passage) take(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.at >= p.size {
		return 0, io.EOF
	}
	i := p.pieceAt(p.at)
	piece := p.pieces[i]
	n := copy(b, piece[p.at-int64(i)*cache.PieceSize(p.size):])
	if p.at += int64(n); p.at == p.size || p.pieceAt(p.at) != i {
		delete(p.pieces, i)
		p.notify()
	}
	return n, nil
}

// Close ends the fetch.
func (p *passage) Close() error {
	p.cancel()
	<-p.done
	return nil
}

func (p *passage) end(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended, p.err = true, err
	p.notify()
}

func (p *passage) notify() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// Changed is closed when the next piece is read, or here.
func (p *passage) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// Size is -1 while unknown.
func (p *passage) Size() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.size
}

// SetSize takes a member's word, but not against the manifest's.
func (p *passage) SetSize(n int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := max(p.size, p.listed); known > 0 && n != known || n < p.at {
		return fmt.Errorf("%d bytes, not %d: %w", n, known, cache.ErrSizeMismatch)
	}
	if p.size < 0 {
		p.size = n
		p.notify()
	}
	return nil
}

// Missing is the first run at or after off that has not come. What was read has
// come.
func (p *passage) Missing(off int64) (start, end int64, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.size < 0 {
		return 0, 0, true
	}
	ps := cache.PieceSize(p.size)
	start = max(off, p.at) / ps * ps
	for start < p.size && p.pieces[int(start/ps)] != nil {
		start += ps
	}
	for end = start; end < p.size && p.pieces[int(end/ps)] == nil; end += ps {
	}
	return start, min(end, p.size), start < p.size
}

// Wanted is the position of the reader.
func (p *passage) Wanted() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.at
}

// WritePiece takes a member's piece that is right.
func (p *passage) WritePiece(_ string, i int, b []byte, from, to [sha256.Size]byte) error {
	size := p.Size()
	if size < 0 {
		return errors.New("a piece before the size")
	}
	if err := cache.CheckPiece(p.digest, size, i, b, from, to); err != nil {
		return fmt.Errorf("%w: %w", peer.ErrWrongPiece, err)
	}
	_, err := p.WriteAt(b, int64(i)*cache.PieceSize(size))
	return err
}

// From is the way in for whole pieces that were checked.
func (p *passage) From(string) io.WriterAt { return p }

// WriteAt takes a whole piece.
func (p *passage) WriteAt(b []byte, off int64) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if ps := cache.PieceSize(p.size); p.size < 0 || off%ps != 0 || int64(len(b)) != min(ps, p.size-off) {
		return 0, fmt.Errorf("%d bytes at %d of %s are no piece", len(b), off, p.digest)
	}
	if i := p.pieceAt(off); off+int64(len(b)) > p.at && p.pieces[i] == nil {
		p.pieces[i] = append([]byte(nil), b...)
		p.notify()
	}
	return len(b), nil
}

// Has is false: nothing of a passage is given to others.
func (p *passage) Has(int) bool { return false }

// ReadAt is not asked, see Has.
func (p *passage) ReadAt([]byte, int64) (int, error) { return 0, errHeld }

// Chain is not known: pieces are checked one by one.
func (p *passage) Chain(int) (v [sha256.Size]byte, ok bool) { return v, false }

// Attempt does not matter: a passage is one attempt, and the proxy's to begin again.
func (p *passage) Attempt(int) {}

package peer

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// holding makes a lone node that holds a blob of 20 pieces, with which nothing has been done for
// that long.
func holding(t *testing.T, idle time.Duration) (n *restNode, b *blob, stop func()) {
	w, nodes := restWorld(t, baseSim(1, 20))
	stop = running(t, nodes)
	n = nodes[0]
	n.start(wantOf(w))
	n.fills.Wait()
	wait(t.Context(), idle)
	return n, n.s.blob(blobID{key: mustKey(t, w.images[0].digest)}), stop
}

const (
	closedAfter    = idleLink + time.Second // the blob's file
	forgottenAfter = keepBlob + time.Minute // the blob, with its piece digests
)

// hashedAnew makes a node that hashes what it holds again, which takes three seconds. A second
// later the test goes on.
func hashedAnew(t *testing.T) (n *restNode, b *blob, stop func()) {
	n, b, stop = holding(t, forgottenAfter)
	n.disk = 150 * time.Millisecond
	if err := n.s.seedFromStore(b); err != nil {
		t.Fatal(err)
	}
	wait(t.Context(), time.Second)
	return n, b, stop
}

func wantOf(w *simWorld) Want {
	return Want{Digest: w.images[0].digest, Registry: "registry.test", Repository: "app"}
}

// TestLostWhileHashed: a blob that the node loses while it hashes it is not offered afterwards. As
// home it would have nobody fetch the blob, and give none of it.
func TestLostWhileHashed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, b, stop := hashedAnew(t)
		n.lose(b.d)
		wait(t.Context(), 10*time.Second)
		if b.offered() > 0 || b.source() {
			t.Errorf("%d pieces of a lost blob are offered", b.offered())
		}
		stop()
	})
}

// TestFetchedWhileHashed: what was hashed before a fetch began is not taken for its bytes. It would
// ask nobody for them.
func TestFetchedWhileHashed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, b, stop := hashedAnew(t)
		n.lose(b.d)
		f := restFill{&simBlob{simImage: n.w.images[0], size: -1, changed: make(chan struct{})}, n, func() {}}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		err := n.s.Fetch(ctx, wantOf(n.w), f, func(ctx context.Context, _ Sink) error {
			wait(ctx, 9*time.Second)
			if b.held() > 0 {
				t.Errorf("%d pieces count as here, and none came", b.held())
			}
			<-ctx.Done()
			return ctx.Err()
		})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		stop()
	})
}

// TestRottenThenRight: a node that had wrong bytes of a blob, lost them and has the right ones,
// which its runtime fetched by itself, gives these.
func TestRottenThenRight(t *testing.T) {
	w := newTestWorld()
	n := w.node(t, "node-0")
	d := w.add(1<<20, 1)
	b := n.s.blob(blobID{key: mustKey(t, d)})
	n.taint = func(_ digest.Digest, p []byte, _ int64) { p[0] ^= 1 }
	n.give(d)
	if err := n.s.seedFromStore(b); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return errors.Is(n.s.seedFromStore(b), errWrongBlob) })
	n.s.Withdraw(d)
	n.taint = nil
	n.give(d)
	if err := n.s.seedFromStore(b); err != nil {
		t.Fatal(err)
	}
	waitFor(t, b.whole)
}

// TestForgottenBeforeHashed: a blob whose turn to be hashed comes late, when nobody has asked for
// it lately, is hashed for those who ask next, and its file is closed.
func TestForgottenBeforeHashed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, b, stop := holding(t, forgottenAfter)
		for i := range maxIdleBlobs + 1 { // so that idle ones are soon forgotten
			n.s.blob(blobID{key: key{1, byte(i >> 8), byte(i)}})
		}
		for range hashersAtOnce {
			n.s.hashers <- struct{}{}
		}
		if err := n.s.seedFromStore(b); err != nil {
			t.Fatal(err)
		}
		wait(t.Context(), idleLink+time.Second)
		for range hashersAtOnce {
			<-n.s.hashers
		}
		wait(t.Context(), time.Second)
		if b := n.s.knownBlob(b.id); b == nil || !b.whole() {
			t.Error("what was hashed is forgotten")
		}
		wait(t.Context(), 2*keepBlob)
		if open := n.open.Load(); open != 0 {
			t.Errorf("%d files are open", open)
		}
		stop()
	})
}

// slowFill lets something happen before it takes a piece of a peer.
type slowFill struct {
	*memBlob
	meanwhile func()
}

func (f slowFill) From(node string) io.WriterAt {
	f.meanwhile()
	return f.memBlob.From(node)
}

// TestWrittenTooLate: a piece that was being written when its fetch failed does not count as here,
// neither for others nor for the fetch that began meanwhile, which would never ask for it.
func TestWrittenTooLate(t *testing.T) {
	for _, again := range []bool{false, true} {
		exchanging(t, func(x exchange) {
			b, left := x.b, errors.New("the client left")
			b.end(left)
			f := slowFill{x.f, func() {
				b.end(left)
				if !again {
					return
				}
				if err := b.begin(newMemBlob(b.d), func(error) {}, 0); err != nil {
					t.Error(err)
				}
			}}
			if err := b.begin(f, func(error) {}, 0); err != nil {
				t.Fatal(err)
			}
			piece := make([]byte, pacePiece)
			sums := b.newBatch()
			sums.pieces = []pieceDigest{{3, sha256.Sum256(piece)}}
			b.publish(sums)
			r := x.ask(x.neighbour("peer", 0), 3)
			r.buf = piece
			b.received(r)
			if !x.f.Has(3) {
				t.Error("the piece was not written")
			}
			if b.held() != 0 || b.offered() != 0 {
				t.Errorf("fetched again: %t: %d pieces count as here, %d are offered", again, b.held(), b.offered())
			}
		})
	}
}

// TestWholeWhilePassing: a blob that passes through a node while its store gets it another way is
// still asked for: what the store has is not what the fetch has.
func TestWholeWhilePassing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, b, stop := holding(t, forgottenAfter)
		passes := passedBlob{&simBlob{simImage: n.w.images[0], size: -1, changed: make(chan struct{})}, time.Time{}}
		if err := b.begin(passes, func(error) {}, simAhead); err != nil {
			t.Fatal(err)
		}
		if err := n.s.seedFromStore(b); !errors.Is(err, errNotHere) {
			t.Error(err)
		}
		wait(t.Context(), 10*time.Second)
		if b.held() > 0 {
			t.Errorf("%d pieces count as here, and none came", b.held())
		}
		b.end(nil)
		if err := n.s.seedFromStore(b); err != nil {
			t.Error(err)
		}
		wait(t.Context(), 10*time.Second)
		if !b.whole() {
			t.Error("it is not offered afterwards")
		}
		stop()
	})
}

// slowStore lets something happen while it opens a blob.
type slowStore struct {
	Store
	meanwhile func()
}

func (s slowStore) Lookup(d digest.Digest) (StoredBlob, bool) {
	b, ok := s.Store.Lookup(d)
	s.meanwhile()
	return b, ok
}

// TestLostWhileOpened: the file of a blob that the node loses while it opens it is closed again:
// the next fetch would give from it.
func TestLostWhileOpened(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, b, stop := holding(t, closedAfter)
		n.s.cfg.Store = slowStore{n, func() { n.lose(b.d) }}
		h, err := b.acquire()
		if err == nil {
			b.release(h)
		}
		if open := n.open.Load(); !errors.Is(err, errNotHere) || open != 0 {
			t.Errorf("%d files are open: %v", open, err)
		}
		stop()
	})
}

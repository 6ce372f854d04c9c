package peer

import (
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
)

// verifyFirst is the size up to which a node that holds a whole blob, but not
// its piece digests, hashes all of it before it signs the first one. Larger
// blobs are signed as they are read, or the first piece would come seconds
// late; the last one waits for the whole digest in any case.
const verifyFirst = 512 << 20

const maxSigners = 32

var errWrongBlob = errors.New("blob does not match its digest")

// learn takes in a signed batch (I2). Batches that are known, not signed by
// somebody who counts, or cut otherwise are dropped.
func (b *blob) learn(t *batch) {
	b.mu.Lock()
	fresh := b.size != 0 && int64(t.pieceSize) == b.pieceSize && b.newsLocked(t)
	vouched := b.signers[t.signer]
	b.mu.Unlock()
	if !fresh || !(vouched || b.s.mayBeHome(b.k, t.signer)) {
		return
	}
	pub := b.s.signingKey(t.signer)
	if len(pub) != ed25519.PublicKeySize || !ed25519.Verify(pub, t.signed(), t.sig[:]) {
		b.s.log.Debug("piece digests with a bad signature", "digest", b.d, "peer", t.signer)
		return
	}
	b.mu.Lock()
	b.signers[t.signer] = true
	b.knowLocked(t)
	b.mu.Unlock()
}

func (b *blob) newsLocked(t *batch) bool {
	for _, p := range t.pieces {
		if int(p.piece) < b.n && b.sums[p.piece] == nil {
			return true
		}
	}
	return false
}

// knowLocked files a batch. What came first stays: two authorities can only
// differ if one of them is wrong, and then the whole digest decides.
func (b *blob) knowLocked(t *batch) {
	for _, p := range t.pieces {
		i := int(p.piece)
		if i >= b.n || b.sums[i] != nil {
			continue
		}
		b.sums[i] = t
		if b.here.has(i) {
			b.offerLocked(i)
		}
	}
}

// vouch makes the batches of these members count.
func (b *blob) vouch(names []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, n := range names {
		if len(b.signers) < maxSigners {
			b.signers[n] = true
		}
	}
}

// scan notes which pieces have come by other roads than neighbours (upstream,
// or an earlier start), and signs their digests if this node may.
func (b *blob) scan(src Blob) error {
	if size := src.Size(); size > 0 {
		b.setSize(size)
	}
	for {
		news, sign := b.scanLocked(src)
		if len(news) == 0 {
			return nil
		}
		if sign {
			if err := b.sign(news); err != nil {
				return err
			}
		}
		b.mu.Lock()
		for _, i := range news {
			b.gotLocked(i)
		}
		b.progress = b.s.now()
		b.mu.Unlock()
		b.poke()
	}
}

// scanLocked returns up to a batch of pieces that are newly here.
func (b *blob) scanLocked(src Blob) (news []int, sign bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := 0; i < b.n && len(news) < maxBatch; i++ {
		if !b.here.has(i) && src.Has(i) {
			news = append(news, i)
		}
	}
	return news, b.authority
}

// sign reads pieces back from the store, so that what is signed is what will be
// served, and files the batch.
func (b *blob) sign(pieces []int) error {
	h, err := b.acquire()
	if err != nil {
		return nil // a blob that is not kept cannot be given either
	}
	defer b.release(h)
	t := &batch{blob: b.k, pieceSize: uint32(b.pieceSize), signer: b.s.self.Name}
	for _, i := range pieces {
		sum := sha256.New()
		if err := b.hashPiece(h, i, sum); err != nil {
			return err
		}
		t.pieces = append(t.pieces, pieceDigest{uint32(i), key(sum.Sum(nil))})
	}
	b.s.seal(t)
	b.mu.Lock()
	b.knowLocked(t)
	b.mu.Unlock()
	return nil
}

func (b *blob) hashPiece(r io.ReaderAt, i int, w io.Writer) error {
	_, err := io.Copy(w, io.NewSectionReader(r, int64(i)*b.pieceSize, int64(b.pieceLen(i))))
	return err
}

// seal signs a batch with this node's key.
func (s *Swarm) seal(t *batch) { copy(t.sig[:], ed25519.Sign(s.signer, t.signed())) }

// seed makes a blob that is whole in the store something neighbours can be
// given: pieces without a known digest are hashed and signed.
func (b *blob) seed() error {
	h, err := b.acquire()
	if err != nil {
		return err
	}
	defer b.release(h)
	if h.Size() <= 0 || !b.setSize(h.Size()) {
		return errNotHere
	}
	todo := b.unsigned()
	if len(todo) == 0 {
		b.offer(0, b.n)
		return nil
	}
	return b.signWhole(h)
}

// unsigned lists pieces whose digest is not known.
func (b *blob) unsigned() (todo []int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.n {
		if b.sums[i] == nil && b.n > 1 {
			todo = append(todo, i)
		}
	}
	return todo
}

// signWhole hashes the blob from end to end: every piece, and the whole.
func (b *blob) signWhole(h *handle) error {
	whole := sha256.New()
	var pending []*batch
	offered := 0
	t := b.newBatch()
	for i := range b.n {
		if err := b.hashInto(h, i, whole, t); err != nil {
			return err
		}
		if len(t.pieces) < maxBatch && i < b.n-1 {
			continue
		}
		pending = append(pending, t)
		t = b.newBatch()
		if b.size > verifyFirst && i < b.n-1 {
			b.publish(pending)
			b.offer(offered, i+1)
			pending, offered = nil, i+1
		}
	}
	if key(whole.Sum(nil)) != b.k {
		b.withdraw()
		return errWrongBlob
	}
	b.publish(pending)
	b.offer(offered, b.n)
	return nil
}

func (b *blob) newBatch() *batch {
	return &batch{blob: b.k, pieceSize: uint32(b.pieceSize), signer: b.s.self.Name}
}

func (b *blob) hashInto(r io.ReaderAt, i int, whole hash.Hash, t *batch) error {
	one := sha256.New()
	if err := b.hashPiece(r, i, io.MultiWriter(whole, one)); err != nil {
		return err
	}
	t.pieces = append(t.pieces, pieceDigest{uint32(i), key(one.Sum(nil))})
	return nil
}

func (b *blob) publish(ts []*batch) {
	for _, t := range ts {
		b.s.seal(t)
		b.mu.Lock()
		b.knowLocked(t)
		b.mu.Unlock()
	}
}

// offer makes the pieces [from, to) of a blob in the store available.
func (b *blob) offer(from, to int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := from; i < to; i++ {
		b.gotLocked(i)
		b.offerLocked(i)
	}
}

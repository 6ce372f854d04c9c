package peer

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"slices"
	"time"
)

// Piece digests: how they are made, from what is read back from the store (sign, signWhole) or
// what the fill's own digest has passed (link), and whose digests count (learn). See "Piece
// digests" in DESIGN.md.

// verifyFirst is the size up to which a node that holds a whole blob, but not its
// piece digests, hashes all of it before it signs the first one. Larger blobs are
// signed as they are read, or the first piece would come seconds late; the last one
// waits for the whole digest in any case. A later attempt, which follows wrong
// bytes, is in no such hurry.
const verifyFirst = 512 << 20

// maxSigners bounds the members whose batches count on a home's word, per blob. Homes, and
// signers of a batch that was taken, come on top.
const maxSigners = 32

// proof is what a piece is checked by: where SHA-256 has to arrive. It starts
// at the beginning of the piece, from the value carried over from the pieces
// before (linked) or from nothing.
type proof struct {
	linked   bool
	from, to key
}

// chainStart is SHA-256's initial value.
var chainStart = chainValue(sha256.New())

// chainValue is what SHA-256 carries on from the whole blocks that h has taken.
// Go marshals it after four bytes of magic; the cache's TestChainValue holds it
// to the standard.
func chainValue(h hash.Hash) key {
	state, err := h.(encoding.BinaryAppender).AppendBinary(nil)
	if err != nil || len(state) < 4+len(key{}) {
		panic(fmt.Sprintf("peer: SHA-256 with a state of %d bytes: %v", len(state), err)) // not this Go's
	}
	return key(state[4:])
}

// proofLocked is what a piece is to be checked by, if that is known.
func (b *blob) proofLocked(i int) (p proof, ok bool) {
	switch {
	case b.n == 1:
		return proof{linked: true, from: chainStart, to: b.id.key}, true
	case i >= len(b.sums) || b.sums[i] == nil:
		return p, false
	}
	return b.sums[i].proof(i)
}

var errWrongBlob = errors.New("blob does not match its digest")

// learn takes in a signed batch (I2). It drops batches that are known, that are
// signed by somebody whose digests do not count, or that are cut differently.
func (b *blob) learn(t *batch) {
	b.mu.Lock()
	fresh := b.size != 0 && int64(t.pieceSize) == b.pieceSize && b.newsLocked(t)
	vouched := b.signers[t.signer]
	b.mu.Unlock()
	if !fresh || !(vouched || b.s.mayBeHome(b.id.key, t.signer)) {
		return
	}
	pub := b.s.roster.key(t.signer)
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

// knowLocked files a batch. What came first stays: two authorities can only differ if
// one of them is wrong, and then the whole digest decides. But what this node has read
// itself counts more than what somebody else signed and nothing was checked by.
func (b *blob) knowLocked(t *batch) {
	own := t.signer == b.s.self.Name
	for _, p := range t.pieces {
		i := int(p.piece)
		if i >= b.n || b.sums[i] != nil && !(own && b.unsignedLocked(i)) {
			continue
		}
		b.sums[i] = t
		if b.here.has(i) {
			b.offerLocked(i)
		}
	}
}

// signedLocked is the members whose batches are in use.
func (b *blob) signedLocked() map[string]bool {
	signed := make(map[string]bool)
	for _, t := range b.sums {
		if t != nil {
			signed[t.signer] = true
		}
	}
	return signed
}

// vouch makes the batches of these members count. Where there is no room for all, those make it that
// are no longer members and have signed nothing that is in use.
func (b *blob) vouch(names []string) {
	b.mu.Lock()
	if len(b.signers)+len(names) > maxSigners {
		signed := b.signedLocked()
		maps.DeleteFunc(b.signers, func(n string, _ bool) bool {
			_, live := b.s.roster.get(n)
			return !live && !signed[n]
		})
	}
	for _, n := range names {
		if len(b.signers) < maxSigners {
			b.signers[n] = true
		}
	}
	var links []*link
	if b.size == 0 {
		for _, nb := range b.nbrs {
			links = append(links, nb.l)
		}
	}
	b.mu.Unlock()
	for _, l := range links {
		b.adopt(l) // what it told before it counted
	}
}

// scan notes which pieces have come other than from neighbours (from upstream,
// or at an earlier start), and signs their digests if this node may.
func (b *blob) scan(f Fill) error {
	if size := f.Size(); size > 0 {
		b.setSize(size)
	}
	if b.find(f) {
		b.poke()
	}
	for {
		next, loose := b.toSign()
		if t := b.link(f, next); t != nil {
			b.publish(t)
			continue
		}
		if len(loose) == 0 {
			return nil
		}
		switch err := b.signHere(loose); {
		case errors.Is(err, errNotHere):
			return nil // a blob that is not kept cannot be given either
		case err != nil:
			return err
		}
	}
}

// find notes the pieces that are newly here, and reports whether there are any.
func (b *blob) find(f Fill) (news bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.n {
		if !b.here.has(i) && f.Has(i) {
			b.gotLocked(i)
			news = true
		}
	}
	if news {
		b.came = time.Now()
	}
	return news
}

// toSign lists pieces whose digests this node has to sign: the next ones of
// those before which nothing is missing, for which the fill has, or will have,
// chaining values; and some that are loose. The last piece is always loose: linked,
// it has to lead to the blob's digest, and if upstream's bytes are wrong anywhere
// before, everybody would take this node's last piece for a lie and ban it.
func (b *blob) toSign() (next, loose []int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.authority {
		return nil, nil
	}
	b.bare = slices.DeleteFunc(b.bare, func(i int) bool { return b.sums[i] != nil || b.have.has(i) })
	slices.Sort(b.bare)
	gap := b.n
	if b.missing > 0 {
		gap = b.firstMissing(0)
	}
	for _, i := range b.bare {
		switch {
		case (i > gap || i == b.n-1) && len(loose) < maxBatch:
			loose = append(loose, i)
		case i < gap && i < b.n-1 && len(next) < maxBatch && (len(next) == 0 || next[len(next)-1] == i-1):
			next = append(next, i)
		}
	}
	return next, loose
}

// link makes a batch of those of the pieces that the fill's digest has passed;
// nil if there are none. The pieces follow each other, and none is the last.
func (b *blob) link(f Fill, pieces []int) *batch {
	if len(pieces) == 0 {
		return nil
	}
	t := b.newBatch()
	from, ok := f.Chain(pieces[0])
	t.linked, t.from = true, from
	for _, i := range pieces {
		end, passed := f.Chain(i + 1)
		if !ok || !passed {
			break
		}
		t.pieces = append(t.pieces, pieceDigest{uint32(i), end})
	}
	if len(t.pieces) == 0 {
		return nil
	}
	return t
}

// signHere signs pieces that have just come.
func (b *blob) signHere(pieces []int) error {
	life := b.lives()
	h, err := b.acquire()
	if err != nil {
		return err
	}
	defer b.release(h)
	return b.sign(h, life, pieces)
}

// sign reads pieces back from the store, so that what is signed is what will be
// served, and files the batch. life is what lives returned before r was acquired.
func (b *blob) sign(r io.ReaderAt, life int, pieces []int) error {
	t := b.newBatch()
	for _, i := range pieces {
		sum := sha256.New()
		if err := b.hashPiece(r, i, sum); err != nil {
			return err
		}
		t.pieces = append(t.pieces, pieceDigest{uint32(i), key(sum.Sum(nil))})
	}
	if b.n == 1 { // its digest is the blob's own, and needs no signature
		if t.pieces[0].sum != b.id.key {
			return errWrongBlob
		}
		return b.offer(life, 0, 1)
	}
	b.publish(t)
	return nil
}

// hashPiece fails with errWrongBlob where the file is cut short: a digest of the rest of a
// piece would make those who know it ban whoever gives the right bytes.
func (b *blob) hashPiece(r io.ReaderAt, i int, w io.Writer) error {
	n, err := io.Copy(w, io.NewSectionReader(r, int64(i)*b.pieceSize, int64(b.pieceLen(i))))
	if err == nil && n < int64(b.pieceLen(i)) {
		return fmt.Errorf("%w: %w in piece %d", errWrongBlob, errShortRead, i)
	}
	return err
}

// seal signs a batch with this node's key.
func (s *Swarm) seal(t *batch) { copy(t.sig[:], ed25519.Sign(s.signer, t.signed())) }

// seed makes a blob that is whole in the store available to neighbours: pieces
// without a known digest are hashed and signed. life is as in offer.
func (b *blob) seed(life int) error {
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
		return b.offer(life, 0, b.n)
	}
	return b.signWhole(h, life)
}

// unsigned lists the pieces that this node has to sign.
func (b *blob) unsigned() (todo []int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.n {
		if b.n > 1 && b.unsignedLocked(i) || b.n == 1 && b.haveN == 0 {
			todo = append(todo, i)
		}
	}
	return todo
}

// unsignedLocked reports whether a piece's digest is unknown, or is somebody else's word
// about bytes that came here another way, such as from upstream: if he was wrong, this
// node would be banned for the right bytes.
func (b *blob) unsignedLocked(i int) bool {
	t := b.sums[i]
	return t == nil || t.signer != b.s.self.Name && !b.checked.has(i)
}

// batchesLocked are the batches that hold a piece's digest: as they came, and if somebody
// else signed, once more by this node. Where that signer does not count, because he has
// left or is no longer home to those who came later, this node does as a holder of the
// whole blob.
func (b *blob) batchesLocked(i int) []*batch {
	t := b.sums[i]
	if t == nil {
		return nil
	}
	if t.signer != b.s.self.Name && b.checked.has(i) && b.fill == nil && b.wholeLocked() && b.s.index.holds(prefixOf(b.id.key)) {
		return []*batch{t, b.resignLocked(i)}
	}
	return []*batch{t}
}

// resignLocked signs again what another member signed of a piece and its neighbours in the
// batch, as far as they were checked by that batch when they were written.
func (b *blob) resignLocked(i int) *batch {
	if b.resigned == nil {
		b.resigned = make([]*batch, b.n)
	}
	if b.resigned[i] != nil {
		return b.resigned[i]
	}
	t, own := b.sums[i], b.newBatch()
	same := func(j int) bool { return j >= 0 && j < b.n && b.sums[j] == t && b.checked.has(j) }
	first := i
	for same(first - 1) {
		first--
	}
	for j := first; same(j); j++ {
		p, _ := t.proof(j) // t is filed under what it lists
		if j == first {
			own.linked, own.from = p.linked, p.from
		}
		own.pieces = append(own.pieces, pieceDigest{uint32(j), p.to})
		b.resigned[j] = own
	}
	b.s.seal(own)
	return own
}

// signWhole hashes the blob from end to end.
func (b *blob) signWhole(h *handle, life int) error {
	whole := sha256.New()
	var pending []*batch
	offered := 0
	t := b.newLinks(whole)
	for i := range b.n {
		if b.lives() != life {
			return errNotHere
		}
		if err := b.hashInto(h, i, whole, t); err != nil {
			return err
		}
		if len(t.pieces) < maxBatch && i < b.n-1 {
			continue
		}
		pending = append(pending, t)
		t = b.newLinks(whole)
		if b.size > verifyFirst && b.id.attempt == 0 && i < b.n-1 {
			if err := b.offer(life, offered, i+1, pending...); err != nil {
				return err
			}
			pending, offered = nil, i+1
		}
	}
	if key(whole.Sum(nil)) != b.id.key {
		return errWrongBlob
	}
	return b.offer(life, offered, b.n, pending...)
}

func (b *blob) newBatch() *batch {
	return &batch{blob: b.id, pieceSize: uint32(b.pieceSize), signer: b.s.self.Name}
}

// newLinks begins a batch of linked pieces where whole has arrived.
func (b *blob) newLinks(whole hash.Hash) *batch {
	t := b.newBatch()
	t.linked, t.from = true, chainValue(whole)
	return t
}

// hashInto adds the next piece to whole, and to t.
func (b *blob) hashInto(r io.ReaderAt, i int, whole hash.Hash, t *batch) error {
	if err := b.hashPiece(r, i, whole); err != nil {
		return err
	}
	end := b.id.key
	if i < b.n-1 {
		end = chainValue(whole)
	}
	t.pieces = append(t.pieces, pieceDigest{uint32(i), end})
	return nil
}

// publish signs a batch and files it.
func (b *blob) publish(t *batch) {
	b.s.seal(t)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.knowLocked(t)
}

// offer makes the pieces [from, to) of a blob in the store available, by batches that it
// signs. It fails with errNotHere if the blob was given up since lives returned life: reading
// takes a while, and what was read then is gone.
func (b *blob) offer(life, from, to int, ts ...*batch) error {
	for _, t := range ts {
		b.s.seal(t)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.life != life {
		return errNotHere
	}
	for _, t := range ts {
		b.knowLocked(t)
	}
	for i := from; i < to; i++ {
		b.gotLocked(i)
		b.offerLocked(i)
	}
	return nil
}

// lives is how often all that was here has been given up.
func (b *blob) lives() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.life
}

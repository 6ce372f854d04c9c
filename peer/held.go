package peer

// handle is an open blob of the store, shared by uploads and hashing.
type handle struct {
	StoredBlob
	refs int // guarded by blob.mu; it is closed with the last one
}

// acquire opens the blob in the store; the caller must call release. The blob keeps a
// reference of its own, so that the next piece opens nothing, until letGo. errNotHere: the
// store does not have it, or has it of another attempt.
func (b *blob) acquire() (*handle, error) {
	b.mu.Lock()
	if b.void { // what the store has now may be of the next attempt
		b.mu.Unlock()
		return nil, errNotHere
	}
	if h := b.src; h != nil {
		h.refs++
		b.mu.Unlock()
		return h, nil
	}
	life := b.life
	b.mu.Unlock()
	sb, ok := b.s.cfg.Store.Lookup(b.d)
	if !ok {
		return nil, errNotHere
	}
	b.mu.Lock()
	if h := b.src; h != nil { // somebody was faster
		h.refs++
		b.mu.Unlock()
		sb.Close()
		return h, nil
	}
	if b.life != life || b.void { // the next fetch would give from what is gone
		b.mu.Unlock()
		sb.Close()
		return nil, errNotHere
	}
	h := &handle{StoredBlob: sb, refs: 2} // the blob's own and the caller's
	b.src = h
	b.mu.Unlock()
	return h, nil
}

func (b *blob) release(h *handle) {
	b.mu.Lock()
	h.refs--
	last := h.refs == 0
	b.mu.Unlock()
	if last {
		h.Close()
	}
}

// letGo closes the blob's own handle; uploads under way keep theirs.
func (b *blob) letGo() {
	b.mu.Lock()
	h := b.src
	b.src = nil
	b.mu.Unlock()
	if h != nil {
		b.release(h)
	}
}

// forgetSums forgets the digests of the pieces, none of which is here any more, and whether they
// were wrong. The next bytes may differ, if upstream gives wrong ones, and whoever passes them
// on, this node included, would be taken for a liar.
func (b *blob) forgetSums() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fill == nil {
		clear(b.sums)
		b.bare, b.rotten = nil, false
	}
}

// withdraw tells neighbours that the blob is no longer to be had here.
func (b *blob) withdraw() {
	b.mu.Lock()
	for _, nb := range b.nbrs {
		nb.l.send(func(p []byte) []byte { return appendClose(p, b.id) })
		b.partLocked(nb)
	}
	if b.size != 0 && b.fill == nil {
		b.emptyLocked()
		b.authority, b.complete = false, false
	}
	b.mu.Unlock()
	b.letGo()
}

package peer

import (
	"crypto/ed25519"
	"errors"
	"time"
)

// pass says that a home let a member have a blob that a registry gives (I9). It
// names the start of the member and is worth nothing to others. It does not
// expire: a member that may have the bytes now keeps them anyway, and the node
// that it is for checks its own callers every time.
type pass struct {
	registry string // as images name it; whose bytes the blob may be
	signer   string // member; "" = no pass
	sig      [ed25519.SignatureSize]byte
}

// signed is what the signer signs: that member may have what the registry gives of blob k.
func (p pass) signed(k key, member string) []byte {
	b := append([]byte("larder pass 1\x00"), k[:]...)
	return appendStr(appendStr(b, p.registry), member)
}

func (p pass) append(b []byte) []byte {
	b = appendStr(appendStr(b, p.registry), p.signer)
	if p.signer == "" {
		return b
	}
	return append(b, p.sig[:]...)
}

func (c *cursor) pass() (p pass) {
	p.registry, p.signer = c.str(), c.str()
	if p.signer != "" {
		copy(p.sig[:], c.take(len(p.sig)))
	}
	return p
}

// sign makes a pass for a member.
func (s *Swarm) sign(k key, registry, member string) pass {
	p := pass{registry: registry, signer: s.self.Name}
	copy(p.sig[:], ed25519.Sign(s.signer, p.signed(k, member)))
	return p
}

// good reports whether a member shows a valid pass of its own. Nobody can let
// himself in.
func (s *Swarm) good(p pass, k key, member string) bool {
	if p.signer == "" || p.signer == member {
		return false
	}
	pub := s.roster.key(p.signer)
	return len(pub) == ed25519.PublicKeySize && ed25519.Verify(pub, p.signed(k, member), p.sig[:])
}

// admit notes that a member may have what registry gives of the blob: this node
// let it in as home, or it showed a pass, or it is the home to which this node
// gave its own credential.
func (b *blob) admit(member, registry string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, known := b.admitted[member]; !known && len(b.admitted) >= maxLeases {
		for other := range b.admitted { // likely a start that is long over; else it comes with its pass, or to join, again
			delete(b.admitted, other)
			break
		}
	}
	b.admitted[member] = registry
}

// lets reports whether a member may be given pieces of the blob as it is here:
// that depends on whose bytes these are.
func (b *blob) lets(member string) bool {
	b.mu.Lock()
	registry, ok := b.admitted[member]
	b.mu.Unlock()
	return ok && b.s.cfg.Store.Gives(b.d, registry)
}

// turnedAwayBy notes that a member closes: it has no more of the blob, or none
// for us.
func (b *blob) turnedAwayBy(l *link) {
	b.mu.Lock()
	b.turned = time.Now()
	b.mu.Unlock()
	b.left(l)
}

// forsaken reports whether somebody has closed on us since then, and none of
// those left has anything: then the home has to look for another source.
func (b *blob) forsaken(since time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.turned.After(since) {
		return false
	}
	for _, nb := range b.nbrs {
		if nb.haveN > 0 {
			return false
		}
	}
	return true
}

// show keeps this node's own pass, and tells the neighbours it has already met.
func (b *blob) show(p pass) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pass = p
	for _, nb := range b.nbrs {
		b.tellLocked(nb)
	}
}

// passFrom reports whether this node has a pass of a member for registry.
func (b *blob) passFrom(signer, registry string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pass.signer == signer && b.pass.registry == registry
}

// errForeign: another home, or the registry, has to give it.
var errForeign = errors.New("what is here was given by another registry")

// takePass keeps the pass that came with a home's answer.
func (x *fetch) takePass(m *Member, sig []byte) {
	p := pass{registry: x.w.Registry, signer: m.Name}
	if copy(p.sig[:], sig) == len(p.sig) {
		x.b.show(p)
	}
}

package proxy

import (
	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// stands returns what holds for a caller that asks for a reference while the
// registry cannot be asked, and whether that lets it in: a verdict that is still
// good, else what offline says.
func (a *authorizer) stands(acc access, reference string) (access, bool) {
	if v, ok := a.verdicts.get(acc.key()); ok && !v.decision.allows() {
		return acc, false
	}
	return acc, acc.decision.allows() || a.offline(&acc, reference)
}

// standsHere is stands for a caller of this node, which may also have a public pin.
// Other nodes' callers may not (A12).
func (a *authorizer) standsHere(acc access, reference string) (access, bool) {
	if stand, in := a.stands(acc, reference); in {
		return stand, true
	}
	return a.shownPin(acc, reference)
}

// offline changes acc to what holds for a reference while the registry cannot be
// asked, and reports whether that lets the caller in.
func (a *authorizer) offline(acc *access, reference string) bool {
	if a.wasPublic(acc.repository()) {
		acc.asAnyone(decidedPublic)
		return true
	}
	switch mode := a.upstream.Policy(acc.target.Registry).OfflineMode(); {
	case mode == upstream.OfflineAll:
		acc.decision = decidedOffline
	case mode == upstream.OfflineRemembered && a.lasting.has(acc):
		acc.decision = decidedRemembered
	case a.meta.Imported(acc.repository(), reference):
		acc.asAnyone(decidedImported)
	}
	return acc.decision.allows()
}

// wasPublic reports whether a repository was public by the registry's last word.
func (a *authorizer) wasPublic(r cache.Repository) bool {
	if v, ok := a.verdicts.get(verdictKey{r, anyone}); ok {
		return v.public()
	}
	_, ok := a.meta.Verdict(r, cache.Anyone)
	return ok
}

// asAnyone lets the caller in by what holds for everybody: its credential goes nowhere.
func (a *access) asAnyone(d decision) {
	a.decision = d
	if a.who != theNode {
		a.who, a.target.Authorization, a.target.Anonymous = anyone, "", true
	}
}

// forOne reports whether a leave holds for one question, and not for the repository.
func (a *access) forOne() bool {
	return a.decision == decidedImported || a.decision == decidedPinned
}

// shownPin returns what holds for a caller of this node that asks for something pinned
// here, and whether that lets it in whatever the registry says: the registry showed it
// to everybody when it last confirmed it (A12).
func (a *authorizer) shownPin(acc access, ref string) (access, bool) {
	if p, ok := a.pinned(acc.repository(), ref); !ok || !p.Public {
		return acc, false
	}
	acc.asAnyone(decidedPinned)
	return acc, true
}

// keeps returns what holds for a caller of this node that asks for something the registry
// does not give, no being its answer, and whether that lets the caller in: it does if the
// thing is pinned here and was public. If it was not public, and no is only a 404, the
// caller gets it if it may read the repository, or if by the registry's last word that was
// public, or the node's: a 404 revokes no earlier yes (A2); a refusal does (A4). The leave
// is for this one thing.
func (a *authorizer) keeps(acc access, q Question, no error) (access, bool) {
	if !a.pins(acc.repository(), q) {
		return acc, false
	}
	v, ok := a.verdicts.get(acc.key())
	refused := ok && !v.decision.allows() || upstream.IsUnauthorized(no)
	if refused || !acc.decision.allows() {
		if stand, in := a.shownPin(acc, q.Reference); in || refused {
			return stand, in
		}
	}
	switch {
	case acc.decision.allows():
	case a.wasPublic(acc.repository()):
		acc.asAnyone(decidedPinned)
	case acc.who == theNode && (a.upstream.Policy(acc.target.Registry).OfflineMode() == upstream.OfflineAll || a.lasting.knows(&acc)):
	default:
		return acc, false
	}
	acc.decision = decidedPinned
	return acc, true
}

// pins reports whether what a question is about is pinned, as the kind that is asked for.
func (a *authorizer) pins(r cache.Repository, q Question) bool {
	p, ok := a.pinned(r, q.Reference)
	return ok && (q.Blob || p.Manifest)
}

// open reports whether a caller about which nothing is known may have a reference while
// the registry cannot be asked, because it was imported, or is pinned and was public.
func (a *authorizer) open(acc *access, reference string) bool {
	stand, in := a.standsHere(*acc, reference)
	if in && stand.forOne() {
		*acc = stand
		return true
	}
	return false
}

// wasOpen returns nil if a repository was public by the registry's last word,
// ErrImported if an operator gave this reference in it to everybody, and
// errNotKnownHere otherwise.
func (a *authorizer) wasOpen(r cache.Repository, reference string) error {
	switch {
	case a.wasPublic(r):
		return nil
	case a.meta.Imported(r, reference):
		return ErrImported
	}
	return errNotKnownHere
}

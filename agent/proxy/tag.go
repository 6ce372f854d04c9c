package proxy

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// tagKey names one of the two answers that a tag can have.
type tagKey struct {
	cache.Repository
	tag   string
	lists bool // the client accepts lists
	// accept is set for a client that accepts none of the types that the others get.
	// It is a digest, since a client may name any number of types.
	accept digest.Digest
}

// tagAsk is the question to the registry, on somebody's behalf.
type tagAsk struct {
	tagKey
	who caller
}

// resolved is what a tag stands for.
type resolved struct {
	desc  ocispec.Descriptor
	stale bool // last known: upstream could not be asked
	shown bool // upstream said so to a question without any credential
}

// complete says whether a HEAD can be answered without the manifest.
func (r resolved) complete() bool { return r.desc.Size > 0 && r.desc.MediaType != "" }

const (
	// resolveTimeout ends a question to upstream for which nobody waits any
	// more.
	resolveTimeout = 30 * time.Second
	// notListed marks, in the metadata, the answer for clients that take no
	// lists. No tag contains a '#'.
	notListed = "#one"
)

// tagQuery is what a client asks about a tag.
type tagQuery struct {
	tag     string
	accept  []string // media types; empty means any
	current bool     // what the registry says now, or why it does not
}

func queryOf(x *exchange) tagQuery {
	return tagQuery{tag: x.route.tag, accept: accepted(x.r.Header), current: current(x.r)}
}

// current reports whether a request asks for what the registry says now:
// "Cache-Control: stale-if-error=0" (RFC 5861, section 4).
func current(r *http.Request) bool { return r.Header.Get("Cache-Control") == NoStale }

// NoStale is the Cache-Control of a request for which an error is better than what a
// tag once stood for.
const NoStale = "stale-if-error=0"

// resolve finds what a tag stands for: from memory within tag_ttl, else by asking
// upstream once for all callers that wait, else, if upstream cannot say, what was
// known last. A registry's no is believed at once, except for what is pinned, see
// keeps. The answer is also the verdict on a caller that has none yet.
func (p *Proxy) resolve(ctx context.Context, acc *access, q tagQuery) (resolved, error) {
	key := tagKey{Repository: acc.repository(), tag: q.tag, lists: acceptsLists(q.accept)}
	usual := q
	usual.accept = key.accepts()
	found, err := p.resolveKey(ctx, acc, key, usual)
	if err != nil || acceptable(q.accept, found.desc.MediaType) {
		return found, err
	}
	key.accept = digest.FromString(strings.Join(q.accept, ","))
	found, err = p.resolveKey(ctx, acc, key, q)
	if err == nil && !acceptable(q.accept, found.desc.MediaType) {
		err = errUnacceptable
	}
	return found, err
}

func (k tagKey) accepts() []string {
	if k.lists {
		return acceptAll
	}
	return acceptOne
}

// resolveKey is resolve for one of the tag's answers.
func (p *Proxy) resolveKey(ctx context.Context, acc *access, key tagKey, q tagQuery) (resolved, error) {
	if acc.decision == decidedPinned { // a moment ago he was refused all else
		if pinned, ok := p.pinned(key); ok && pinned.shown {
			return pinned, nil
		}
		return resolved{}, errUnacceptable
	}
	if found, ok := p.fresh.get(key); ok && p.suffices(acc, q, found) {
		return found, nil
	}
	if !q.current {
		return p.resolveOrRecall(ctx, acc, key, q.accept)
	}
	found, err := p.askTag(ctx, *acc, key, q.accept)
	if err == nil && found.stale {
		err = errStale
	}
	return found, acc.conclude(err)
}

// resolveOrRecall asks the registry what a tag stands for and, if that cannot say, says
// what it stood for.
func (p *Proxy) resolveOrRecall(ctx context.Context, acc *access, key tagKey, accept []string) (resolved, error) {
	wait := ctx
	former, known := p.lastKnown(key)
	if _, in := p.auth.standsHere(*acc, former.desc.Digest.String()); in && known { // then upstream gets the larger part of the budget, the manifest the rest
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeoutCause(ctx, p.opts.FirstByteBudget*3/5, errBudget)
		defer cancel()
	}
	found, err := p.askTag(wait, *acc, key, accept)
	switch {
	case err == nil && !found.stale:
		acc.decision = acc.yes()
		return found, nil
	case upstream.IsUnauthorized(err), upstream.IsNotFound(err):
		return p.resolvePinned(acc, key, err)
	case ctx.Err() != nil:
		return resolved{}, cmp.Or(err, context.Cause(ctx))
	case err != nil && !errors.Is(err, errBudget) && !mayServeStale(err):
		return resolved{}, err
	}
	if known {
		if last, in := p.recall(acc, key, former); in {
			return last, nil
		}
	}
	return p.resolveStale(ctx, acc, key, found, err)
}

// recall returns what a tag stands for by what is known now, since another caller may have
// been told meanwhile, or, if this caller may not have that, what it stood for before the
// registry was asked in vain. It reports whether the caller may have either.
func (p *Proxy) recall(acc *access, key tagKey, former resolved) (resolved, bool) {
	newest, known := p.lastKnown(key)
	if !known { // it is gone
		return resolved{}, false
	}
	if stand, in := p.auth.standsHere(*acc, newest.desc.Digest.String()); in {
		*acc = stand
		// Callers that come within the next tag_ttl need not wait too.
		p.fresh.add(key, newest, p.tagTTL(key.Registry))
		return newest, true
	}
	stand, in := p.auth.standsHere(*acc, former.desc.Digest.String())
	if in {
		*acc = stand
	}
	return former, in
}

// suffices reports whether what is remembered of a tag answers a query. A query for
// what is current, made as anyone, needs what the registry said to anyone.
func (p *Proxy) suffices(acc *access, q tagQuery, found resolved) bool {
	if q.current && (found.stale || acc.who == anyone && !found.shown) {
		return false
	}
	return acc.decision.allows() || found.stale && p.auth.open(acc, found.desc.Digest.String())
}

// resolvePinned answers when the registry does not give a tag: with what is pinned
// under it here, if the caller may have that, else with the registry's own no.
func (p *Proxy) resolvePinned(acc *access, key tagKey, err error) (resolved, error) {
	pinned, ok := p.pinned(key)
	stand, in := p.auth.keeps(*acc, Question{Reference: pinned.desc.Digest.String()}, err)
	if !ok || !in {
		return resolved{}, acc.refuse(KindManifest, err)
	}
	*acc = stand
	if upstream.IsNotFound(err) { // a refusal is about this caller; others may get another answer
		p.fresh.add(key, pinned, p.tagTTL(key.Registry))
	}
	return pinned, nil
}

// pinned is what a tag stands for by a pin.
func (p *Proxy) pinned(key tagKey) (resolved, bool) {
	pin, ok := p.opts.Pinned(key.Repository, key.tag)
	if !ok || key.accept != "" {
		return resolved{}, false
	}
	m, _ := p.cache.Meta().Manifest(pin.Digest)
	return resolved{desc: ocispec.Descriptor{MediaType: m.MediaType, Digest: pin.Digest}, stale: true, shown: pin.Public}, true
}

// confirm asks whether the registry shows the caller a manifest now: a client that
// wants no stale answer wants no verdict from memory either.
func (p *Proxy) confirm(ctx context.Context, acc *access, d digest.Digest) error {
	asker, key := *acc, tagKey{Repository: acc.repository(), tag: d.String(), lists: true}
	_, err := p.resolves.do(ctx, tagAsk{key, acc.who}, func(ctx context.Context) (resolved, error) {
		ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
		defer cancel()
		_, err := p.resolveRemote(ctx, asker.target, key.tag, acceptAll)
		if _, stale := errors.AsType[*StaleTag](err); stale {
			return resolved{}, errStale
		}
		err = p.auth.withChallenge(ctx, asker.target, key.tag, err)
		p.auth.learn(&asker, Question{Reference: key.tag}, 0, err)
		return resolved{}, err
	})
	return acc.conclude(err)
}

// resolveStale answers while the registry cannot be asked and this node does not
// know enough by itself: it has no verdict for the caller, or does not know the
// tag. found is what another node says the tag was, err why there is nothing
// better.
func (p *Proxy) resolveStale(ctx context.Context, acc *access, key tagKey, found resolved, err error) (resolved, error) {
	if last, known := p.lastKnown(key); err != nil && known {
		found, err = last, nil
	}
	if !acc.decision.allows() {
		q := Question{Reference: key.tag, Known: true}
		if err == nil { // what the tag was may be open where the repository is not
			q.Reference = found.desc.Digest.String()
		}
		if err := p.auth.ask(ctx, acc, KindManifest, q); err != nil {
			return resolved{}, err
		}
	}
	return found, err
}

// mayServeStale reports whether nobody knows better. A registry that refuses
// the caller does.
func mayServeStale(err error) bool {
	return upstream.IsUnavailable(err) || errors.Is(err, context.DeadlineExceeded)
}

// askTag asks upstream, once for all who ask the same now, and remembers the answer even if
// nobody waits for it any more.
func (p *Proxy) askTag(ctx context.Context, asker access, key tagKey, accept []string) (resolved, error) {
	return p.resolves.do(ctx, tagAsk{key, asker.who}, func(ctx context.Context) (resolved, error) {
		return p.learnTag(ctx, asker, key, accept)
	})
}

func (p *Proxy) learnTag(ctx context.Context, acc access, key tagKey, accept []string) (resolved, error) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	desc, err := p.askForTag(ctx, acc.target, key, accept)
	if old, ok := errors.AsType[*StaleTag](err); ok {
		return p.believe(key, old.Descriptor), nil
	}
	err = p.auth.withChallenge(ctx, acc.target, key.tag, err)
	p.auth.learn(&acc, Question{Reference: key.tag}, 0, err)
	if err != nil {
		if upstream.IsNotFound(err) && acc.decision.allows() { // to strangers registries say so of what they hide
			p.forgetTag(key)
		}
		return resolved{}, err
	}
	return p.remember(acc.target, key, desc), nil
}

// askForTag waits out a short pause that the registry asks for only if nothing is known of
// the tag, which would be the answer at once.
func (p *Proxy) askForTag(ctx context.Context, t upstream.Target, key tagKey, accept []string) (desc ocispec.Descriptor, err error) {
	if _, known := p.lastKnown(key); known {
		return p.resolveRemote(ctx, t, key.tag, accept)
	}
	err = p.auth.patiently(ctx, func() error {
		var err error
		desc, err = p.resolveRemote(ctx, t, key.tag, accept)
		return err
	})
	return desc, err
}

// remember keeps what upstream says that a tag stands for.
func (p *Proxy) remember(t upstream.Target, key tagKey, desc ocispec.Descriptor) resolved {
	p.auth.enlist(t, KindManifest, desc)
	p.auth.say(t, desc.Digest)
	p.list(t, desc)
	desc.MediaType = bareType(desc.MediaType)
	if !ofManifest(desc.MediaType) {
		desc.MediaType = "" // the manifest's own bytes say it better
	}
	if key.accept == "" {
		p.keepTag(key, cache.Tag{Descriptor: desc, Checked: time.Now()})
	}
	found := resolved{desc: desc, shown: t.Anonymous}
	p.fresh.put(key, found, p.tagTTL(key.Registry))
	return found
}

// StaleTag is the error of [Swarm.Resolve] when upstream cannot be asked: what
// the tag stood for when a node asked last.
type StaleTag struct{ ocispec.Descriptor }

func (e *StaleTag) Error() string {
	return "the registry cannot be asked; the tag was " + e.Digest.String()
}

// believe takes another node's word for what a tag was, for tag_ttl. It stays known
// here, in case that node leaves too. If this node has its own knowledge, the word is only
// for a caller that may not have that: a node that knows an older state must not undo an
// import here, or what the registry has told another caller meanwhile.
func (p *Proxy) believe(key tagKey, desc ocispec.Descriptor) resolved {
	p.auth.enlist(key.target(), KindManifest, desc)
	found := resolved{desc: desc, stale: true}
	if _, known := p.lastKnown(key); known {
		return found
	}
	if key.accept == "" {
		p.keepTag(key, cache.Tag{Descriptor: desc})
	}
	p.fresh.add(key, found, p.tagTTL(key.Registry))
	return found
}

func (p *Proxy) resolveRemote(ctx context.Context, t upstream.Target, tag string, accept []string) (ocispec.Descriptor, error) {
	if p.swarm != nil {
		desc, err := p.swarm.Resolve(ctx, t, tag, accept)
		err = p.auth.believable(t.Registry, err)
		_, stale := errors.AsType[*StaleTag](err)
		if err == nil || stale || final(err) {
			return desc, err
		}
		p.log.Debug("swarm gave up on a tag", "registry", t.Registry, "repository", t.Repository, "err", err)
	}
	return p.upstream.Resolve(ctx, t, tag, accept)
}

func (p *Proxy) tagTTL(registry string) time.Duration {
	return p.upstream.Policy(registry).TTL(p.opts.TagTTL)
}

// lastKnown is what a tag stands for while the registry cannot be asked. A pin goes
// before what was known last, because all of its image is here. If the registry must
// never be asked, what was known last goes first: somebody brought it.
func (p *Proxy) lastKnown(key tagKey) (resolved, bool) {
	if key.accept != "" {
		return resolved{}, false
	}
	pinned, held := p.pinned(key)
	if held && p.upstream.Policy(key.Registry).Contact() {
		return pinned, true
	}
	if tag, ok := p.cache.Meta().Tag(key.Repository, key.stored()); ok {
		return resolved{desc: tag.Descriptor, stale: true}, true
	}
	return pinned, held
}

func (p *Proxy) forgetTag(key tagKey) {
	p.fresh.forget(key)
	if key.accept == "" {
		p.cache.Meta().DeleteTag(key.Repository, key.stored())
		if _, known := p.lastKnown(key.other()); !known && p.swarm != nil {
			p.swarm.Forget(key.target(), key.tag)
		}
	}
}

func (p *Proxy) keepTag(key tagKey, tag cache.Tag) {
	p.cache.Meta().SetTag(key.Repository, key.stored(), tag)
	if p.swarm != nil {
		p.swarm.Remember(key.target(), key.tag)
	}
}

// Tags lists the tags that are known here, except those of the last seconds.
func (p *Proxy) Tags() map[cache.Repository][]string {
	tags := map[cache.Repository][]string{}
	p.cache.Meta().WalkTags(func(r cache.Repository, tag string) bool {
		known := tags[r]
		// The keys are in order, and no tag has a character below "#": the other answer
		// of a tag, see notListed, comes right behind it.
		if tag = strings.TrimSuffix(tag, notListed); len(known) == 0 || known[len(known)-1] != tag {
			tags[r] = append(known, tag)
		}
		return true
	})
	return tags
}

// KnownTag is what a tag stood for when this node heard of it last.
func (p *Proxy) KnownTag(r cache.Repository, tag string) (cache.Tag, bool) {
	for _, stored := range []string{tag, tag + notListed} {
		if known, ok := p.cache.Meta().Tag(r, stored); ok {
			return known, true
		}
	}
	return cache.Tag{}, false
}

// TagDigests are what a tag stood for when this node heard of it last: more than one if
// clients that accept no lists are told another.
func (p *Proxy) TagDigests(r cache.Repository, tag string) (out []digest.Digest) {
	for _, stored := range []string{tag, tag + notListed} {
		if known, ok := p.cache.Meta().Tag(r, stored); ok && !slices.Contains(out, known.Descriptor.Digest) {
			out = append(out, known.Descriptor.Digest)
		}
	}
	return out
}

// ForgetTag has this node know nothing of a tag, as if nobody had pulled it here.
func (p *Proxy) ForgetTag(r cache.Repository, tag string) {
	key := tagKey{Repository: r, tag: tag}
	p.forgetTag(key)
	p.forgetTag(key.other())
}

func (k tagKey) target() upstream.Target {
	return upstream.Target{Registry: k.Registry, Repository: k.Name}
}

// other is the other answer that the tag can have.
func (k tagKey) other() tagKey {
	k.lists = !k.lists
	return k
}

func (k tagKey) stored() string {
	if k.lists {
		return k.tag
	}
	return k.tag + notListed
}

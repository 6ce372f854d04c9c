package proxy

import (
	"net"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// The giver of a blob is the registry, or other source, that once gave this node all of its
// bytes. A digest by itself opens nothing: what is on disk from one registry is no answer
// for another that only names it.

// Gives reports whether a caller that may read from registry may have d: the
// registry once gave this node these bytes, or they are public. It consults
// memory only and asks nobody.
func (p *Proxy) Gives(d digest.Digest, registry string) bool {
	if p.cache.GivenBy(d, registry) || p.cache.GivenBy(d, RuntimeGiver(registry)) {
		return true
	}
	_, shown := p.auth.shown(d)
	return shown
}

// RuntimeGiver is the giver in the metadata of a blob that the container
// runtime has from a registry. The runtime does not tell the registry's port.
func RuntimeGiver(registry string) string {
	if host, _, err := net.SplitHostPort(registry); err == nil {
		registry = host
	}
	return "runtime " + registry
}

// copyGiver is the giver of what was copied from the runtime's store for images of a
// registry when nobody knows which registry gave it to the runtime: callers on this
// node may have the copy as they had the original, other nodes may not.
func copyGiver(registry string) string { return "copied " + registry }

// gaveHere is Gives for callers on this node, and returns the giver: registry itself if
// there is none.
func (p *Proxy) gaveHere(d digest.Digest, registry string) (giver string, ok bool) {
	if p.cache.GivenBy(d, registry) {
		return registry, true
	}
	for _, giver := range [...]string{RuntimeGiver(registry), copyGiver(registry)} {
		if p.cache.GivenBy(d, giver) {
			return giver, true
		}
	}
	if giver, ok := p.auth.shown(d); ok {
		return giver, true
	}
	return registry, false
}

func (p *Proxy) gives(d digest.Digest, registry string) bool {
	_, ok := p.gaveHere(d, registry)
	return ok
}

// Holds reports whether d is committed in this node's cache for callers on this node
// that may read from registry: the runtime's store does not count.
func (p *Proxy) Holds(d digest.Digest, registry string) bool {
	return p.cache.Has(d) && p.gives(d, registry)
}

// mayTakeRuntime reports whether a caller that may read what the target's
// registry gives may also have the runtime's copy of d. If it is known which
// registry d came from, that must be the target's. If nothing is known, the proxy
// does as containerd does, which lets all images of the node share a blob.
func (p *Proxy) mayTakeRuntime(t upstream.Target, d digest.Digest) bool {
	return p.gives(d, t.Registry) || !p.cache.Meta().Given(d, cache.AnyGiver)
}

// lookup is cache.Lookup, limited to what may be had for the target's registry.
func (p *Proxy) lookup(t upstream.Target, d digest.Digest) (*cache.Reader, bool) {
	if !p.gives(d, t.Registry) {
		return nil, false
	}
	return p.cache.Lookup(d)
}

// giver is the name under which the cache is asked for d; it hits only if that
// giver gave d. It is the target's registry, unless d is here and gives allows it
// for another reason: then it is that other giver.
func (p *Proxy) giver(t upstream.Target, d digest.Digest) string {
	if !p.cache.Has(d) {
		return t.Registry
	}
	giver, _ := p.gaveHere(d, t.Registry)
	return giver
}

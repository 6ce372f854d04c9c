package proxy

import (
	"cmp"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Pull is one blob or manifest that is being sent to a runtime.
type Pull struct {
	Digest     digest.Digest `json:"digest"` // "" for a tag that is being resolved
	Registry   string        `json:"registry"`
	Repository string        `json:"repository"`
	Reference  string        `json:"reference"`
	Size       int64         `json:"size"`   // 0 until it is known
	Offset     int64         `json:"offset"` // how far the runtime has got
	Source     string        `json:"source"` // "none" until the first byte
	Started    time.Time     `json:"started"`
}

// Pulls lists what is under way, the oldest first.
func (p *Proxy) Pulls() []Pull {
	var out []Pull
	for _, x := range p.underWay() {
		if pull, ok := x.pull(); ok {
			out = append(out, pull)
		}
	}
	slices.SortFunc(out, func(a, b Pull) int { return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.Digest, b.Digest)) })
	return out
}

func (p *Proxy) underWay() []*exchange {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]*exchange, 0, len(p.exchanges))
	for x := range p.exchanges {
		out = append(out, x)
	}
	return out
}

func (x *exchange) pull() (Pull, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	rt := x.route
	if !rt.content() {
		return Pull{}, false
	}
	return Pull{
		Digest: rt.digest, Registry: rt.registry, Repository: rt.repository, Reference: rt.reference(),
		Size: x.size, Offset: min(x.offset+x.sent.Load(), max(x.size, x.offset)), Source: string(x.source), Started: x.start,
	}, true
}

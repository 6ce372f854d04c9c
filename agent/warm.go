package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/larder-cache/larder/agent/proxy"
)

// warm pulls one image through this node's own proxy and reports to out; what
// it returns is the image's last event.
func (a *Agent) warm(ctx context.Context, image Image, req WarmRequest, name string, out *eventStream) WarmEvent {
	puller := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.self, Platform: req.Platform, Instances: a.config.Hosts.instances(), UserAgent: proxy.OwnUserAgent + "warm"}
	out.follow(&puller, name)
	parts, err := puller.Pull(ctx, image)
	if err != nil {
		return WarmEvent{Image: name, Done: true, Error: err.Error() + a.trouble(image, err)}
	}
	if err := a.kept(ctx, parts); err != nil {
		return WarmEvent{Image: name, Done: true, Error: err.Error()}
	}
	return WarmEvent{Image: name, Done: true}
}

// kept says which parts of a pull are not on this node once all of it is settled: what
// there is no room for is passed through, and what came first may have been evicted for
// what came last.
func (a *Agent) kept(ctx context.Context, parts []Pulled) error {
	var lost, all int64
	for _, p := range parts {
		if err := a.cache.Settled(ctx, p.Digest); err != nil {
			return fmt.Errorf("fetched, and not known to be kept: %w", err)
		}
		all += p.Bytes
	}
	for _, p := range parts {
		if !a.cache.Has(p.Digest) && !a.inRuntime(p.Digest) {
			lost += p.Bytes
		}
	}
	if lost == 0 {
		return nil
	}
	why := "there was no room for them, or the disk failed; see cache.max_bytes, cache.min_free and the agent's log"
	if problem := cacheProblem(a.cache.Stats()); problem != "" {
		why = "the cache " + problem
	}
	return fmt.Errorf("fetched, but %s of %s are not kept: %s", SizeText(lost), SizeText(all), why)
}

// trouble is why the proxy did not give what err, of a Puller, is about, each reason after a
// separator, "" if it gave it: an answer to HEAD has no text, and the client of one that has
// begun is told nothing more.
func (a *Agent) trouble(image Image, err error) string {
	cut, isCut := errors.AsType[*cutError](err)
	answer, isAnswer := errors.AsType[*answerError](err)
	registry := a.upstreamTrouble(image.Registry)
	reference := ""
	switch {
	case isCut:
		reference = cut.digest.String()
	case isAnswer && registry == "": // else it says the same
		reference = answer.reference
	}
	why := a.recent.trouble(image, reference)
	if why == "" || why == hungUp {
		return registry
	}
	return ": " + why + registry
}

// upstreamTrouble is what is wrong with the endpoints of a registry now, each
// after a separator: the answers of the proxy do not say.
func (a *Agent) upstreamTrouble(registry string) string {
	var b strings.Builder
	for _, h := range a.upstream.Health() {
		if h.Registry == registry && (h.Failures > 0 || h.State == "paused") && h.LastError != "" {
			b.WriteString("; " + h.LastError)
		}
	}
	return b.String()
}

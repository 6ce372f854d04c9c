package agent

import (
	"context"
	"strings"

	"github.com/larder-cache/larder/agent/upstream"
)

// warm pulls one image through this node's own proxy and reports to out; what
// it returns is the image's last event.
func (a *Agent) warm(ctx context.Context, image Image, req WarmRequest, name string, out *eventStream) WarmEvent {
	puller := Puller{Proxy: "http://" + a.ProxyAddr(), Client: a.self, Platform: req.Platform}
	out.follow(&puller, name)
	if _, err := puller.Pull(ctx, image); err != nil {
		return WarmEvent{Image: name, Done: true, Error: err.Error() + a.upstreamTrouble(image.Registry)}
	}
	return WarmEvent{Image: name, Done: true}
}

// upstreamTrouble is what is wrong with the endpoints of a registry now, each
// after a separator: the answers of the proxy do not say.
func (a *Agent) upstreamTrouble(registry string) string {
	var b strings.Builder
	for _, h := range a.upstream.Health() {
		if h.Registry == upstream.CanonicalHost(registry) && h.Failures > 0 && h.LastError != "" {
			b.WriteString("; " + h.LastError)
		}
	}
	return b.String()
}

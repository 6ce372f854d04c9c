package agent

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/larder-cache/larder/agent/upstream"
	"github.com/opencontainers/go-digest"
)

// progressEvery limits how often a blob's progress is told.
const progressEvery = 100 * time.Millisecond

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

// eventStream writes events as lines of JSON.
type eventStream struct {
	// mu guards all below: events come from several goroutines. It is held
	// while writing, so that lines do not mix.
	mu       sync.Mutex
	enc      *json.Encoder
	http     *http.ResponseController
	patience time.Duration
	told     map[digest.Digest]time.Time
}

// clientPatience is how long a client of an event stream may take nothing of it, or send
// nothing of an archive: longer than somebody looks at a terminal that he has stopped, or
// than `larder export` asks for manifests before it writes to a pipe.
const clientPatience = 5 * time.Minute

func (a *Agent) newEventStream(w http.ResponseWriter) *eventStream {
	return &eventStream{enc: json.NewEncoder(w), http: http.NewResponseController(w), patience: a.patience, told: map[digest.Digest]time.Time{}}
}

// follow has a puller tell of what it pulls under an image's name.
func (s *eventStream) follow(p *Puller, name string) {
	p.Progress = func(d digest.Digest, done, total int64) {
		s.progress(d, WarmEvent{Image: name, Digest: d, Bytes: done, Total: total})
	}
	p.Done = func(p Pulled) {
		s.send(WarmEvent{Image: name, Kind: p.Kind, Digest: p.Digest, Bytes: p.Bytes, Total: p.Bytes, Source: p.Source})
	}
}

// progress sends an event about a blob unless that was told of a moment ago.
func (s *eventStream) progress(d digest.Digest, event any) {
	if s.due(d) {
		s.send(event)
	}
}

func (s *eventStream) due(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if now.Sub(s.told[d]) < progressEvery {
		return false
	}
	s.told[d] = now
	return true
}

// send writes one event. A client that hung up, or takes nothing for too long, ends the
// request's context, which is noticed elsewhere.
func (s *eventStream) send(event any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.http.SetWriteDeadline(time.Now().Add(s.patience))
	_ = s.enc.Encode(event)
	_ = s.http.Flush()
	_ = s.http.SetWriteDeadline(time.Time{}) // it must not outlive the answer
}

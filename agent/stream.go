package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// clientPatience is how long a client may read nothing of an event stream, or send
	// nothing of an archive: longer than somebody leaves a terminal paused, or than
	// `larder export` asks for manifests before it writes to a pipe.
	clientPatience = 5 * time.Minute
	// progressEvery limits how often a blob's progress is told.
	progressEvery = 100 * time.Millisecond
)

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

func (a *Agent) newEventStream(w http.ResponseWriter) *eventStream {
	return &eventStream{enc: json.NewEncoder(w), http: http.NewResponseController(w), patience: a.patience, told: map[digest.Digest]time.Time{}}
}

// follow has a puller report what it pulls, under an image's name.
func (s *eventStream) follow(p *Puller, name string) {
	p.Progress = func(d digest.Digest, done, total int64) {
		s.progress(d, WarmEvent{Image: name, Digest: d, Bytes: done, Total: total})
	}
	p.Done = func(p Pulled) {
		s.send(WarmEvent{Image: name, Kind: p.Kind, Digest: p.Digest, Bytes: p.Bytes, Total: p.Bytes, Source: p.Source})
	}
}

// progress sends an event about a blob unless the last one was a moment ago.
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

// patientBody is the body of a request whose client may take any time, as long as it
// sends something: one that hangs must not keep others from importing.
type patientBody struct {
	body     io.Reader
	http     *http.ResponseController
	patience time.Duration
}

func (b *patientBody) Read(p []byte) (int, error) {
	if err := b.http.SetReadDeadline(time.Now().Add(b.patience)); err != nil {
		return 0, err
	}
	n, err := b.body.Read(p)
	if err != nil { // at the end the server goes on reading, for the client to hang up
		_ = b.http.SetReadDeadline(time.Time{})
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("nothing more of the archive came for %s", b.patience)
	}
	return n, err
}

package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"
)

const (
	// sampleEvery is how often counters are read, and how often listeners hear
	// something: what a client takes for silence is a few times longer.
	sampleEvery = 2 * time.Second
	// keepSamples is ten minutes, some 60 KB.
	keepSamples = 300
	// maxListeners is far more than people look at one node, and few enough that
	// what is built for each tick stays cheap to send.
	maxListeners = 16
	// listenerBehind is how many ticks a listener may lag before it is dropped;
	// it can come back, and then gets everything again.
	listenerBehind = 5
	// eventTimeout is how long one event may take to be written.
	eventTimeout = listenerBehind * sampleEvery
	// maxShownMembers bounds the members in an event; those that this node deals
	// with come first. /api/v1/status has all.
	maxShownMembers = 256
)

// Sample is what the counters of a node said at one moment; the difference of
// two is a rate. Counters start at zero with the agent.
type Sample struct {
	Time     time.Time        `json:"time"`
	Served   map[string]int64 `json:"served_bytes"`   // to runtimes, by X-Larder-Source
	Fetched  map[string]int64 `json:"fetched_bytes"`  // by where they came from: upstream, peer
	Uploaded int64            `json:"uploaded_bytes"` // to other nodes
}

// Opening is the first event of /api/v1/events, named "opening": the samples of
// the last ten minutes, oldest first, and the status.
type Opening struct {
	Interval float64           `json:"interval_seconds"` // between samples
	Samples  []json.RawMessage `json:"samples"`          // of Sample
	Status   Status            `json:"status"`
}

// Tick is each later event, named "tick". It has a status only if that is not
// what it was before.
type Tick struct {
	Sample json.RawMessage `json:"sample"`
	Status json.RawMessage `json:"status,omitempty"`
}

// events tells what this node does to whoever listens at /api/v1/events. One
// sampler serves all of them; while nobody listens it reads a handful of
// counters every two seconds, which it keeps so that a chart has a past when
// somebody comes.
type events struct {
	sample func() Sample // reads memory alone
	status func() Status // may look at the disk
	log    *slog.Logger

	mu        sync.Mutex // guards the fields below; not held while sampling, building or writing
	samples   []json.RawMessage
	listeners map[*listener]struct{}
	joined    bool // somebody since the last tick
	over      bool
}

// listener is one client of the stream.
type listener struct {
	frames chan []byte // closed when the listener is dropped
}

func newEvents(sample func() Sample, status func() Status, log *slog.Logger) *events {
	return &events{sample: sample, status: status, log: log, listeners: map[*listener]struct{}{}}
}

// Run samples until ctx ends, and ends every stream then.
func (e *events) Run(ctx context.Context) error {
	ticks := time.NewTicker(sampleEvery)
	defer ticks.Stop()
	var last []byte // status that was told
	for {
		last = e.tick(last)
		select {
		case <-ticks.C:
		case <-ctx.Done():
			e.end()
			return nil
		}
	}
}

// tick keeps one sample and sends it to the listeners, with the status unless
// all of them know it.
func (e *events) tick(last []byte) (status []byte) {
	t := Tick{Sample: e.encode(e.sample())}
	watched, joined := e.watched()
	if watched {
		if status = e.encode(e.shown()); joined || !bytes.Equal(status, last) {
			t.Status = status
		}
	}
	frame := e.frame("tick", t)
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.samples) == keepSamples {
		e.samples = slices.Delete(e.samples, 0, 1)
	}
	e.samples = append(e.samples, t.Sample)
	for l := range e.listeners {
		select {
		case l.frames <- frame:
		default:
			e.dropLocked(l)
		}
	}
	return status
}

// watched says whether somebody listens, and whether somebody has joined since
// the last call.
func (e *events) watched() (watched, joined bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	joined, e.joined = e.joined, false
	return len(e.listeners) > 0, joined
}

// end drops all listeners, and those that come later.
func (e *events) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.over = true
	for l := range e.listeners {
		e.dropLocked(l)
	}
}

func (e *events) dropLocked(l *listener) {
	if _, ok := e.listeners[l]; ok {
		delete(e.listeners, l)
		close(l.frames)
	}
}

func (e *events) drop(l *listener) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.dropLocked(l)
}

var (
	errTooManyListeners = errors.New("too many clients listen already")
	errEventsOver       = errors.New("the agent is stopping")
)

// listen adds a listener, which gets every sample that is not in past.
func (e *events) listen() (l *listener, past []json.RawMessage, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.over:
		return nil, nil, errEventsOver
	case len(e.listeners) == maxListeners:
		return nil, nil, errTooManyListeners
	}
	l = &listener{frames: make(chan []byte, listenerBehind)}
	e.listeners[l], e.joined = struct{}{}, true
	return l, slices.Clone(e.samples), nil
}

// ServeHTTP streams events until the client goes, falls behind, or the agent
// stops.
func (e *events) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l, past, err := e.listen()
	if err != nil {
		w.Header().Set("Retry-After", "10")
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer e.drop(l)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Connection", "close") // its write deadline must not outlive it
	if r.Method == http.MethodHead {
		return
	}
	out := http.NewResponseController(w)
	next, more := e.frame("opening", Opening{Interval: sampleEvery.Seconds(), Samples: past, Status: e.shown()}), true
	for more && send(w, out, next) == nil {
		select {
		case next, more = <-l.frames:
		case <-r.Context().Done():
			more = false
		}
	}
}

func send(w http.ResponseWriter, out *http.ResponseController, frame []byte) error {
	if err := out.SetWriteDeadline(time.Now().Add(eventTimeout)); err != nil {
		return err
	}
	if _, err := w.Write(frame); err != nil {
		return err
	}
	return out.Flush()
}

// shown is the status as events tell it.
func (e *events) shown() Status {
	s := e.status()
	if len(s.Members) > maxShownMembers {
		slices.SortStableFunc(s.Members, func(a, b Member) int { return b.Interest() - a.Interest() })
		s.Members = s.Members[:maxShownMembers]
	}
	return s
}

// frame is one event of a stream; JSON has no line breaks. A client that loses
// the stream comes back after two seconds.
func (e *events) frame(event string, data any) []byte {
	return fmt.Appendf(nil, "retry: 2000\nevent: %s\ndata: %s\n\n", event, e.encode(data))
}

func (e *events) encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		e.log.Error("event cannot be told", "err", err) // a fault of this program
		return []byte("null")
	}
	return b
}

// sample reads the counters.
func (a *Agent) sample() Sample {
	counted := a.counted()
	s := Sample{
		Time: time.Now().UTC().Truncate(time.Millisecond), Served: map[string]int64{}, Fetched: counted["larder_fetched_bytes_total"],
		Uploaded: counted["larder_uploaded_bytes_total"][""],
	}
	maps.Copy(s.Served, counted["larder_served_bytes_total"]) // which is not there before the first byte
	delete(s.Served, "none")                                  // runtimes' pings
	return s
}

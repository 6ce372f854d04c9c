package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/prometheus/client_golang/prometheus"
)

func (a *Agent) servePins(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, a.Pins())
}

// servePin pins images and reports how they come, as serveWarm does. All of them are
// pinned before the first is fetched: who hangs up stops nothing.
func (a *Agent) servePin(w http.ResponseWriter, r *http.Request) {
	var req PinRequest
	images, ok := readImages(w, r, &req, &req.Images)
	if !ok {
		return
	}
	pinned, err := a.pins.addAll(images)
	if err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	defer a.pins.hurry()
	_ = a.pins.sync(r.Context()) // follow tells
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := a.newEventStream(w)
	for i, p := range pinned {
		out.send(a.pins.follow(r.Context(), p, req.Images[i], out))
	}
}

func (a *Agent) serveUnpin(w http.ResponseWriter, r *http.Request) {
	images, err := parseImages(r.URL.Query()["image"])
	if err == nil && len(images) == 0 {
		err = errors.New("want ?image=")
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err = a.pins.remove(images); err == nil {
		err = a.pins.sync(r.Context())
	}
	switch {
	case errors.Is(err, errNotPinned):
		http.Error(w, err.Error(), http.StatusNotFound)
	case err != nil:
		http.Error(w, err.Error(), http.StatusConflict)
	default:
		writeJSON(w, http.StatusOK, a.Pins())
	}
}

// readImages reads the body of a request that is about images into req, of which names is
// the field with theirs. A form in a web page cannot send its type without asking first.
// It answers what is not acceptable.
func readImages(w http.ResponseWriter, r *http.Request, req any, names *[]string) ([]Image, bool) {
	if !hasType(r, "application/json") {
		http.Error(w, "want Content-Type: application/json", http.StatusUnsupportedMediaType)
		return nil, false
	}
	body := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxImagesRequest))
	body.DisallowUnknownFields() // a misspelled dry_run would remove images
	if err := body.Decode(req); err != nil {
		http.Error(w, "want {\"images\": [...]}: "+err.Error(), http.StatusBadRequest)
		return nil, false
	}
	images, err := parseImages(*names)
	if err == nil && len(images) == 0 { // most likely under another key
		err = errors.New("want {\"images\": [...]}: there is none")
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return nil, false
	}
	return images, true
}

// maxImagesRequest is room for hundreds of image names.
const maxImagesRequest = 64 << 10

func parseImages(names []string) ([]Image, error) {
	images := make([]Image, len(names))
	for i, s := range names {
		var err error
		if images[i], err = ParseImage(s); err != nil {
			return nil, err
		}
	}
	return images, nil
}

// asked is a pin that a request is about.
type asked struct {
	*pin
	added bool // by it
}

// addAll pins all of the images, or none. What is new waits for the request that asks
// for it, until hurry.
func (s *pins) addAll(images []Image) ([]asked, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	added := map[string]bool{}
	for _, image := range images {
		if name := image.String(); s.images[name] == nil {
			added[name] = true
		}
	}
	if len(added) > 0 && len(s.images)+len(added) > cache.MaxPins {
		return nil, errTooManyPins
	}
	out := make([]asked, len(images))
	for i, image := range images {
		p, added := s.add(image)
		out[i] = asked{p, added}
	}
	return out, nil
}

// hurry leaves to the workers what has not been looked at yet.
func (s *pins) hurry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.images {
		if p.held == nil && p.tries == 0 {
			p.due = time.Now()
		}
	}
	s.wake()
}

// follow fetches one image that was asked for and tells out how it comes; what it
// returns is the image's last event. An image that was never had, and that nobody can
// have as things are, is not pinned: most likely its name is wrong.
func (s *pins) follow(ctx context.Context, p asked, name string, out *eventStream) WarmEvent {
	err := s.claim(ctx, p.pin)
	if err == nil {
		err = s.lookAfter(ctx, p.pin, func(puller *Puller) { out.follow(puller, name) })
	}
	last := WarmEvent{Image: name, Done: true}
	switch forgotten := s.sync(ctx); {
	case err == nil && forgotten != nil:
		last.Error = fmt.Sprintf("pinned until the agent ends: %v", forgotten)
	case err == nil:
	case errors.Is(err, errUnpinned):
		last.Error = err.Error()
	case definite(err) && s.forget(p):
		last.Error = "not pinned: " + err.Error()
	default:
		last.Error = fmt.Sprintf("pinned, and the agent goes on trying: %v", err)
	}
	return last
}

// sync waits until what is pinned is known for the next start.
func (s *pins) sync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pinSync)
	defer cancel()
	return s.agent.cache.Meta().Sync(ctx)
}

// pinSync is far more than the two fsyncs take that it is for.
const pinSync = 5 * time.Second

// forget takes back that a request pinned an image, if that was news and the image was
// never whole here.
func (s *pins) forget(p asked) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !p.added || p.held != nil || s.images[p.name] != p.pin {
		return false
	}
	s.drop(p.pin)
	return true
}

// maxShownPins bounds the pins in a status; those with problems are shown.
const maxShownPins = 20

// pinsStatus sums up the pins.
func (a *Agent) pinsStatus() PinsStatus {
	list := a.Pins()
	out := PinsStatus{Images: len(list.Pins), Bytes: list.Bytes, Limit: list.Limit, Problem: list.Problem, States: a.pins.count(), Trouble: []Pin{}}
	for _, p := range list.Pins {
		if p.Error != "" && p.State != PinForeign && len(out.Trouble) < maxShownPins {
			out.Trouble = append(out.Trouble, p)
		}
	}
	return out
}

// pinMetrics tells Prometheus of the pins.
type pinMetrics struct{ *pins }

var (
	pinnedBytesDesc = prometheus.NewDesc("larder_pinned_bytes", "Bytes of pinned images in the cache, which are not evicted.", nil, nil)
	pinnedDesc      = prometheus.NewDesc("larder_pins", "Pinned images, by state.", []string{"state"}, nil)
)

func (m pinMetrics) Describe(descs chan<- *prometheus.Desc) {
	descs <- pinnedBytesDesc
	descs <- pinnedDesc
}

func (m pinMetrics) Collect(metrics chan<- prometheus.Metric) {
	metrics <- prometheus.MustNewConstMetric(pinnedBytesDesc, prometheus.GaugeValue, float64(m.present()))
	for state, n := range m.count() {
		metrics <- prometheus.MustNewConstMetric(pinnedDesc, prometheus.GaugeValue, float64(n), state)
	}
}

// count counts pins by state.
func (s *pins) count() map[string]int {
	counts := map[string]int{}
	for _, state := range pinStates {
		counts[state] = 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.images {
		counts[p.state()]++
	}
	return counts
}

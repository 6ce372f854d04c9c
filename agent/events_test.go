package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/larder-cache/larder/test/registrytest"
)

// stream is a client of /api/v1/events.
type stream struct {
	body  io.ReadCloser
	lines *bufio.Scanner
}

// listen opens a stream; it ends with the test.
func (r *running) listen(t *testing.T) *stream {
	t.Helper()
	resp, err := r.events1(t)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("%d %v", resp.StatusCode, resp.Header)
	}
	s := &stream{resp.Body, bufio.NewScanner(resp.Body)}
	s.lines.Buffer(nil, 8<<20)
	return s
}

func (r *running) events1(t *testing.T) (*http.Response, error) {
	resp, err := r.client.Get("http://" + r.AdminAddr() + "/api/v1/events")
	if err == nil {
		t.Cleanup(func() { resp.Body.Close() })
	}
	return resp, err
}

// next reads one event into v, which must be of that name.
func (s *stream) next(t *testing.T, name string, v any) {
	t.Helper()
	event := ""
	for s.lines.Scan() {
		line := s.lines.Text()
		if e, ok := strings.CutPrefix(line, "event: "); ok {
			event = e
		}
		data, ok := strings.CutPrefix(line, "data: ")
		if !ok {
			continue
		}
		if err := json.Unmarshal([]byte(data), v); err != nil || event != name {
			t.Fatalf("event %q, want %q: %v\n%.300s", event, name, err, data)
		}
		return
	}
	t.Fatalf("the stream ended: %v", s.lines.Err())
}

// tick is a Tick as its readers see it.
type tick struct {
	Sample Sample
	Status *Status
}

// TestEvents holds that a listener is told what was, and then what changes: a
// layer counts while it moves, and not at its end.
func TestEvents(t *testing.T) {
	c := testConfig(t)
	reg, img := startRegistry(t, &c)
	layer := img.Layers[0]
	const first = 100 << 10
	fault := reg.Inject(registrytest.Match{Kind: registrytest.Blob, Reference: layer.Digest.String()}, registrytest.StallAfter(first))
	a := start(t, c)
	eventually(t, "a first sample", func() error {
		a.events.mu.Lock()
		defer a.events.mu.Unlock()
		if len(a.events.samples) == 0 {
			return errors.New("none yet")
		}
		return nil
	})
	s := a.listen(t)
	var opening struct {
		Interval float64 `json:"interval_seconds"`
		Samples  []Sample
		Status   Status
	}
	s.next(t, "opening", &opening)
	if opening.Status.Node != "node-1" || opening.Interval != 2 || len(opening.Samples) == 0 || opening.Samples[0].Time.IsZero() {
		t.Fatalf("opening: %+v", opening)
	}

	got := make(chan error, 1)
	go func() {
		_, err := a.readBlob(layer.Digest)
		got <- err
	}()
	<-fault.Held()
	moving := func(e tick) bool {
		return e.Sample.Served["upstream"] > 0 && e.Status != nil && len(e.Status.Pulls) == 1 && e.Status.Pulls[0].Digest == layer.Digest
	}
	e := s.await(t, moving)
	if n := e.Sample.Served["upstream"]; n > first || n != e.Status.Served["upstream"] {
		t.Errorf("served %d of %d bytes that have come, the status says %d", n, first, e.Status.Served["upstream"])
	}
	fault.Release()
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	last := e.Status
	e = s.await(t, func(e tick) bool {
		if e.Status != nil {
			last = e.Status
		}
		return e.Sample.Served["upstream"] == layer.Size && last.Served["upstream"] == layer.Size && len(last.Pulls) == 0 && len(last.Recent) == 1
	})
	if e.Sample.Fetched["upstream"] != layer.Size || last.Fetched["upstream"] != layer.Size {
		t.Errorf("in the end: %+v, %+v", e.Sample, last)
	}
}

func (s *stream) await(t *testing.T, ok func(tick) bool) tick {
	t.Helper()
	for range 30 { // a minute
		var e tick
		s.next(t, "tick", &e)
		if ok(e) {
			return e
		}
	}
	t.Fatal("not told in a minute")
	return tick{}
}

func (e *events) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.listeners)
}

func (e *events) awaitListeners(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d listeners", n), func() error {
		if got := e.count(); got != n {
			return fmt.Errorf("%d listeners", got)
		}
		return nil
	})
}

// TestListenersAreBounded holds that there is a limit, that one who leaves is
// noticed, and that the place is free then.
func TestListenersAreBounded(t *testing.T) {
	a := start(t, testConfig(t))
	var all []*stream
	for range maxListeners {
		all = append(all, a.listen(t))
	}
	resp, err := a.events1(t)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("one too many: %d %v", resp.StatusCode, resp.Header)
	}
	all[0].body.Close()
	a.events.awaitListeners(t, maxListeners-1)
	var opening Opening
	a.listen(t).next(t, "opening", &opening)
}

// TestEventsEndAtShutdown holds that open streams do not delay a stop.
func TestEventsEndAtShutdown(t *testing.T) {
	a := start(t, testConfig(t))
	s := a.listen(t)
	var opening Opening
	s.next(t, "opening", &opening)
	begin := time.Now()
	if err := a.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	if took := time.Since(begin); took > adminGrace+5*time.Second { // a busy machine's seconds
		t.Errorf("stopping took %s", took)
	}
	for s.lines.Scan() { // what was on its way
	}
	if err := s.lines.Err(); err != nil {
		t.Errorf("the stream did not end properly: %v", err)
	}
}

// testEvents counts how often it is asked for a status, which is i-th each time
// that change says so.
func testEvents() (e *events, built, change *atomic.Int64) {
	built, change = new(atomic.Int64), new(atomic.Int64)
	e = newEvents(func() Sample { return Sample{Time: time.Now()} }, func() Status {
		built.Add(1)
		return Status{Uploaded: change.Load()}
	}, slog.New(slog.DiscardHandler))
	return e, built, change
}

// run runs e in a bubble until the returned function is called.
func (e *events) run(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- e.Run(ctx) }()
	synctest.Wait()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestNobodyListens holds that the past is kept for ten minutes, and no status
// is built for nobody.
func TestNobodyListens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, built, _ := testEvents()
		stop := e.run(t)
		time.Sleep(time.Hour)
		stop()
		if n := built.Load(); n != 0 {
			t.Errorf("%d statuses were built", n)
		}
		if len(e.samples) != keepSamples || cap(e.samples) > 2*keepSamples {
			t.Errorf("%d samples are kept in room for %d, want %d", len(e.samples), cap(e.samples), keepSamples)
		}
		var oldest Sample
		if err := json.Unmarshal(e.samples[0], &oldest); err != nil || time.Since(oldest.Time) > 10*time.Minute {
			t.Errorf("the oldest is %s old: %v", time.Since(oldest.Time), err)
		}
		if _, _, err := e.listen(); !errors.Is(err, errEventsOver) {
			t.Errorf("after the end: %v", err)
		}
	})
}

// TestOneStatusForAll holds that listeners share what is built, that a status
// is told again only when it changes, and to who comes new.
func TestOneStatusForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, built, change := testEvents()
		stop := e.run(t)
		defer stop()
		var all []*listener
		for range maxListeners {
			l, _, err := e.listen()
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, l)
		}
		ticks := func() (with []bool) {
			time.Sleep(sampleEvery)
			synctest.Wait()
			for _, l := range all {
				with = append(with, strings.Contains(string(<-l.frames), `"status"`))
			}
			return slices.Compact(with)
		}
		for i, want := range []bool{true, false, true, false} {
			if i == 2 {
				change.Add(1)
			}
			if got := ticks(); !slices.Equal(got, []bool{want}) {
				t.Errorf("tick %d has a status: %v, want %v", i, got, want)
			}
		}
		if n := built.Load(); n != 4 {
			t.Errorf("4 ticks built %d statuses", n)
		}
		e.drop(all[0])
		all[0], _, _ = e.listen()
		if got := ticks(); !slices.Equal(got, []bool{true}) {
			t.Errorf("with a new listener: %v", got)
		}
	})
}

// TestSlowListenersAreDropped holds that one who does not read costs nobody else
// anything, and is gone after a few ticks.
func TestSlowListenersAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _, _ := testEvents()
		stop := e.run(t)
		defer stop()
		slow, _, _ := e.listen()
		quick, _, _ := e.listen()
		for range listenerBehind + 1 {
			time.Sleep(sampleEvery)
			synctest.Wait()
			<-quick.frames
		}
		if e.count() != 1 {
			t.Errorf("%d listeners, want the quick one alone", e.count())
		}
		frames := 0
		for range slow.frames { // closed
			frames++
		}
		if frames != listenerBehind {
			t.Errorf("%d frames waited, want %d", frames, listenerBehind)
		}
	})
}

// stuckWriter is a client that does not read: a write ends at its deadline.
type stuckWriter struct {
	httptest.ResponseRecorder
	deadline time.Time
}

func (w *stuckWriter) SetWriteDeadline(t time.Time) error {
	w.deadline = t
	return nil
}

func (w *stuckWriter) Write([]byte) (int, error) {
	time.Sleep(time.Until(w.deadline)) // of the bubble
	return 0, errors.New("i/o timeout")
}

// TestStuckReader holds that the stream of a client that never reads ends.
func TestStuckReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _, _ := testEvents()
		stop := e.run(t)
		defer stop()
		begin := time.Now()
		e.ServeHTTP(&stuckWriter{}, httptest.NewRequest("GET", "/api/v1/events", nil))
		if took := time.Since(begin); took > eventTimeout || e.count() != 0 {
			t.Errorf("it took %s, %d listeners are left", took, e.count())
		}
	})
}

// TestEventsOfALargeCluster holds that an event names those that matter.
func TestEventsOfALargeCluster(t *testing.T) {
	members := make([]Member, 5000)
	for i := range members {
		members[i] = Member{Name: fmt.Sprintf("node-%d", i), State: "alive", Self: i == 4000, Linked: i >= 4900}
	}
	members[3000].BannedUntil = time.Now().Add(time.Minute)
	e := newEvents(nil, func() Status { return Status{Members: members} }, nil)
	got := e.shown().Members
	if len(got) != maxShownMembers || !got[0].Self || got[1].Name != "node-3000" || !got[101].Linked || got[102].Linked {
		t.Errorf("%d members, first %+v", len(got), got[:3])
	}
}

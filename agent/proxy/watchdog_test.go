package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/larder-cache/larder/test/registrytest"
)

// wedge blocks every handler from the moment it is switched on, until the test ends.
type wedge struct {
	on   atomic.Bool
	free chan struct{}
}

func newWedge(t *testing.T) *wedge {
	w := &wedge{free: make(chan struct{})}
	t.Cleanup(func() { close(w.free) })
	return w
}

func (w *wedge) before(*http.Request) {
	if w.on.Load() {
		<-w.free
	}
}

// TestWedge: when every handler blocks, the port closes within seconds, the
// process is told, and a pull that had begun goes to the registry.
func TestWedge(t *testing.T) {
	w := newWedge(t)
	n := startNode(t, func(s *setup) {
		s.proxy.Before = w.before
		s.proxy.Watch = Watch{Interval: 100 * time.Millisecond, Timeout: 200 * time.Millisecond}
		s.proxy.Logger = slog.New(slog.DiscardHandler) // what is freed at the end may still log after it
	})
	n.image()
	w.on.Store(true)
	begin := time.Now()
	if _, err := n.containerd().Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
		t.Errorf("the pull did not go direct: %v", err)
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("the pull took %s", d)
	}
	for _, ended := range []chan error{n.ran, n.served} {
		if err := <-ended; !errors.Is(err, ErrWedged) {
			t.Errorf("ended with %v, want ErrWedged", err)
		}
	}
	if conn, err := net.Dial("tcp", n.addr); err == nil {
		_ = conn.Close()
		t.Error("the port is still open")
	}
}

// TestOneStuckRequest: it is hung up on; the others and the port live.
func TestOneStuckRequest(t *testing.T) {
	stuck := make(chan struct{})
	n := startNode(t, func(s *setup) {
		s.proxy.FirstByteBudget = 50 * time.Millisecond
		s.proxy.Watch = Watch{Interval: 20 * time.Millisecond, Slack: 50 * time.Millisecond}
		s.proxy.Before = func(r *http.Request) {
			if strings.Contains(r.URL.Path, "stuck") {
				<-stuck
			}
		}
	})
	t.Cleanup(func() { close(stuck) })
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+n.addr+"/v2/stuck/manifests/x?ns="+host, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := n.client.Do(req)
	if err == nil {
		_ = resp.Body.Close()
		t.Errorf("answered %d", resp.StatusCode)
	}
	if a := n.get("/v2/"); a.status != 200 {
		t.Errorf("ping: %d", a.status)
	}
}

// TestStoppedIsNotWedged: a process that was stopped for a while finds many requests overdue,
// none of which is stuck. They are answered, and what is stuck is found at the next look.
func TestStoppedIsNotWedged(t *testing.T) {
	const requests = wedgedRequests + 1
	came, awake := make(chan struct{}, requests), make(chan struct{})
	n := startNode(t, func(s *setup) {
		s.proxy.FirstByteBudget = time.Nanosecond
		s.proxy.Watch = Watch{Interval: time.Hour, Slack: time.Nanosecond} // looks are this test's
		s.proxy.Before = func(*http.Request) {
			came <- struct{}{}
			<-awake
		}
	})
	failed := make(chan error, requests)
	for range requests {
		go func() {
			resp, err := n.client.Get("http://" + n.addr + "/v2/" + repo + "/manifests/v1?ns=" + host)
			if err == nil {
				err = resp.Body.Close()
			}
			failed <- err
		}()
		<-came
	}
	if overdue := n.proxy.dropOverdue(); overdue != 0 {
		t.Errorf("%d count at the first look", overdue)
	}
	close(awake)
	for range requests {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
}

// TestSlowIsNotStuck: no request is overdue before its own deadline has ended it.
func TestSlowIsNotStuck(t *testing.T) {
	const budget, slack = 30 * time.Second, 5 * time.Second // the longest budget that there may be
	for _, rt := range []route{{kind: KindManifest}, {kind: KindBlob}, {kind: KindManifest, pathEncoded: true}, {kind: KindBlob, pathEncoded: true}} {
		p := &Proxy{opts: Options{FirstByteBudget: budget, Watch: Watch{Slack: slack}}, log: slog.New(slog.DiscardHandler), exchanges: map[*exchange]struct{}{}}
		x := p.newExchange(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil))
		defer x.cancel(nil)
		x.setRoute(rt)
		p.track(x)
		deadline := p.patience(rt.pathEncoded)
		if rt.kind == KindManifest {
			deadline = p.manifestPatience(rt.pathEncoded)
		}
		for waited, want := range map[time.Duration]int{deadline: 0, deadline + slack + time.Second: 1} {
			x.start = time.Now().Add(-waited)
			x.overdue.Store(1) // at the look before, it seems
			if got := p.dropOverdue(); got != want {
				t.Errorf("%s, path %t: after %s of %s: %d overdue, want %d", rt.kind, rt.pathEncoded, waited, deadline, got, want)
			}
		}
	}
}

// TestBusyIsNotWedged: a probe that is late while others are answered says nothing.
func TestBusyIsNotWedged(t *testing.T) {
	probes := make(chan struct{}, 1000)
	n := startNode(t, func(s *setup) {
		s.proxy.Watch = Watch{Interval: 5 * time.Millisecond, Timeout: 20 * time.Millisecond}
		s.proxy.Before = func(r *http.Request) {
			if r.UserAgent() == "larder-watchdog" {
				probes <- struct{}{}
				<-r.Context().Done()
			}
		}
	})
	for range 6 {
		<-probes
		if a := n.get("/v2/"); a.status != 200 {
			t.Fatal(a.status)
		}
	}
	select {
	case err := <-n.ran:
		t.Errorf("the watchdog gave up: %v", err)
	default:
	}
}

// TestSIGTERM: bodies that can finish within the grace period do; others end
// short, so that containerd takes the rest from the registry in the same pull.
func TestSIGTERM(t *testing.T) {
	t.Run("finishes", func(t *testing.T) {
		n := startNode(t, func(s *setup) {
			s.upstream.Stall, s.proxy.StallTimeout, s.proxy.Grace = time.Minute, time.Minute, time.Minute
		})
		img := n.image(3_000_000)
		d := img.Layers[0].Digest
		f := n.registry.Inject(registrytest.Match{Reference: d.String()}, registrytest.StallAfter(1_500_000))
		resp := n.open(t.Context(), "GET", blobPath(d))
		defer resp.Body.Close()
		<-f.Held()
		n.stop()
		await(t, "the port to close", func() bool {
			conn, err := net.Dial("tcp", n.addr)
			if err == nil {
				_ = conn.Close()
			}
			return err != nil
		})
		f.Remove()
		body, err := io.ReadAll(resp.Body)
		if err != nil || !bytes.Equal(body, bytesOf(t, img, d)) {
			t.Errorf("%d bytes, %v", len(body), err)
		}
		if err := <-n.served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Run("falls back", func(t *testing.T) {
		n := startNode(t, func(s *setup) {
			s.upstream.Stall, s.proxy.StallTimeout, s.proxy.Grace = time.Minute, time.Minute, 100*time.Millisecond
		})
		d := n.image(3_000_000).Layers[0].Digest
		f := n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.Times(1), registrytest.StallAfter(1_500_000))
		pulled := make(chan error, 1)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		go func() {
			_, err := n.containerd().Pull(ctx, host+"/"+repo+":v1", nil)
			pulled <- err
		}()
		<-f.Held()
		n.stop()
		if err := <-n.served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if err := <-pulled; err != nil {
			t.Errorf("the pull did not go on from the registry: %v", err)
		}
	})
}

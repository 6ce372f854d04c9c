package upstream

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestDials: connects that wait for an answer, and what came of those before.
func TestDials(t *testing.T) {
	type event struct {
		at   time.Duration
		ends int // of the connects begun so far, by number; 0 = another one begins
		err  error
	}
	timeout := &net.OpError{Op: "dial", Err: context.DeadlineExceeded}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	_, lookupGivenUp := new(net.Resolver).LookupHost(canceled, "registry.test")
	const begins = 0
	for name, tc := range map[string]struct {
		events []event
		silent map[time.Duration]bool
	}{
		"none":    {nil, map[time.Duration]bool{0: false, time.Hour: false}},
		"waiting": {[]event{{0, begins, nil}}, map[time.Duration]bool{time.Second: false, 2 * time.Second: true, time.Hour: true}},
		"answered": {[]event{{0, begins, nil}, {2 * time.Second, 1, nil}},
			map[time.Duration]bool{2 * time.Second: false, 9 * time.Second: false}},
		"refused": {[]event{{0, begins, nil}, {time.Second, 1, syscall.ECONNREFUSED}},
			map[time.Duration]bool{2 * time.Second: false, 9 * time.Second: false}},
		"no route": {[]event{{0, begins, nil}, {time.Millisecond, 1, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ENETUNREACH)}}},
			map[time.Duration]bool{time.Second: true, 9 * time.Second: true, 11 * time.Second: false}},
		"no name": {[]event{{0, begins, nil}, {time.Millisecond, 1, &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", IsNotFound: true}}}},
			map[time.Duration]bool{time.Second: true, 9 * time.Second: true, 11 * time.Second: false}},
		"given up while the name was looked up": {[]event{{0, begins, nil}, {time.Millisecond, 1, &net.OpError{Op: "dial", Err: lookupGivenUp}}},
			map[time.Duration]bool{time.Second: false, 9 * time.Second: false}},
		"no route, then one": {[]event{{0, begins, nil}, {0, 1, syscall.EHOSTUNREACH}, {time.Second, begins, nil}, {time.Second, 2, nil}},
			map[time.Duration]bool{time.Second: false}},
		"timed out": {[]event{{0, begins, nil}, {5 * time.Second, 1, timeout}},
			map[time.Duration]bool{6 * time.Second: true, 14 * time.Second: true, 16 * time.Second: false}},
		"tried again": {[]event{{0, begins, nil}, {5 * time.Second, 1, timeout}, {6 * time.Second, begins, nil}},
			map[time.Duration]bool{6 * time.Second: true, time.Minute: true}},
		"tried again late": {[]event{{0, begins, nil}, {5 * time.Second, 1, timeout}, {20 * time.Second, begins, nil}},
			map[time.Duration]bool{21 * time.Second: false, 22 * time.Second: true}},
		"back": {[]event{{0, begins, nil}, {5 * time.Second, 1, timeout}, {6 * time.Second, begins, nil}, {7 * time.Second, 2, nil}},
			map[time.Duration]bool{7 * time.Second: false, time.Minute: false}},
		"one of two": {[]event{{0, begins, nil}, {time.Second, begins, nil}, {1100 * time.Millisecond, 2, nil}},
			map[time.Duration]bool{2 * time.Second: false, 3 * time.Second: true}},
		"called off": {[]event{{0, begins, nil}, {time.Second, 1, context.Canceled}, {2 * time.Second, begins, nil}},
			map[time.Duration]bool{3 * time.Second: false, 4 * time.Second: true}},
		"called off late": {[]event{{0, begins, nil}, {2 * time.Second, 1, context.Canceled}},
			map[time.Duration]bool{3 * time.Second: true, 13 * time.Second: false}},
	} {
		for at, want := range tc.silent {
			var d dials
			var done []func(error, time.Time)
			start := time.Now()
			for _, e := range tc.events {
				switch {
				case e.at > at:
				case e.ends == begins:
					done = append(done, d.begin(start.Add(e.at)))
				default:
					done[e.ends-1](e.err, start.Add(e.at))
				}
			}
			if got := d.silent(start.Add(at)); got != want {
				t.Errorf("%s: after %v silent is %t", name, at, got)
			}
		}
	}
}

// TestReaches: a registry with two upstreams is out of reach when neither answers.
func TestReaches(t *testing.T) {
	c, err := New(Config{Registries: []Registry{{Host: "a.test", Upstreams: []string{"http://one.a.test", "http://two.a.test"}}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	reg, err := c.lookup("a.test")
	if err != nil {
		t.Fatal(err)
	}
	for i, ep := range reg.endpoints {
		if !c.Reaches("a.test") {
			t.Errorf("out of reach while %d upstreams are not tried", len(reg.endpoints)-i)
		}
		ep.dials.begin(time.Now().Add(-time.Minute))
	}
	if c.Reaches("a.test") {
		t.Error("nobody answers, and it is within reach")
	}
	for _, h := range c.Health() {
		if h.State != "unreachable" {
			t.Errorf("%s is %s", h.Endpoint, h.State)
		}
	}
	if !c.Reaches("b.test") || !c.Reaches("no host") {
		t.Error("a registry that was not tried is out of reach")
	}
	reg.endpoints[0].dials.end(errors.New("refused"), time.Now(), time.Now())
	if !c.Reaches("a.test") {
		t.Error("one answers, and it is out of reach")
	}
}

// TestConnect: any answer of a registry will do, but not a gateway's in its place; no
// credential goes along, and an operator's contact_upstream = false stands.
func TestConnect(t *testing.T) {
	var status, asked atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.URL.Path != "/v2/" || r.Header.Get("Authorization") != "" {
			t.Errorf("%s with Authorization %q", r.URL, r.Header.Get("Authorization"))
		}
		w.WriteHeader(int(status.Load()))
	}))
	t.Cleanup(srv.Close)
	no := false
	c, err := New(Config{Registries: []Registry{
		{Host: "a.test", Upstreams: []string{"http://127.0.0.1:1", srv.URL}},
		{Host: "never.test", Upstreams: []string{srv.URL}, ContactUpstream: &no},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	for code, ok := range map[int32]bool{200: true, 401: true, 404: true, 500: true, 503: true, 502: false, 504: false} {
		status.Store(code)
		if err := c.Connect(t.Context(), "a.test"); (err == nil) != ok {
			t.Errorf("%d: %v", code, err)
		}
	}
	before := asked.Load()
	if err := c.Connect(t.Context(), "never.test"); !errors.Is(err, ErrNoContact) || asked.Load() != before {
		t.Errorf("contact_upstream = false: %v, %d requests", err, asked.Load()-before)
	}
	if err := c.Connect(t.Context(), "127.0.0.1:1"); err == nil {
		t.Error("an address inside was connected to")
	}
}

// TestConnectPassesSilence: an upstream that does not answer leaves the next one time to.
func TestConnectPassesSilence(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(srv.Close)
	c, err := New(Config{Registries: []Registry{{Host: "a.test", Upstreams: []string{"http://" + silent.Addr().String(), srv.URL}}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := c.Connect(ctx, "a.test"); err != nil {
		t.Errorf("the first upstream is silent, and nobody asks the second: %v", err)
	}
}

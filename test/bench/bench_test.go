package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestHammer pins that the client of the benchmark reads what there is, and takes
// nothing else for success.
func TestHammer(t *testing.T) {
	body := bytes.Repeat([]byte("x"), 3<<20)
	for name, tc := range map[string]struct {
		handler http.HandlerFunc
		ok      bool
	}{
		"body": {func(w http.ResponseWriter, r *http.Request) {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
		}, true},
		"empty":   {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "0") }, true},
		"404":     {http.NotFound, false},
		"chunked": {func(w http.ResponseWriter, _ *http.Request) { write(w, body) }, false},
		"cut": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "10")
			write(w, body[:5])
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(tc.handler)
			defer s.Close()
			l, err := hammer(t.Context(), s.Listener.Addr().String(), "/", 4, 3, 0)
			if (err == nil) != tc.ok {
				t.Fatalf("got %v", err)
			}
			if !tc.ok {
				return
			}
			if l.requests != 12 || len(l.firstBytes) != 12 || name == "body" && l.bytes != 12*int64(len(body)) {
				t.Errorf("%d requests, %d bytes", l.requests, l.bytes)
			}
		})
	}
}

// write ignores that a client may be gone.
func write(w io.Writer, b []byte) { _, _ = w.Write(b) }

func TestHammerEndsWithItsContext(t *testing.T) {
	arrived, done := make(chan struct{}), make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { close(arrived); <-done }))
	defer s.Close()
	defer close(done)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-arrived; cancel() }()
	if _, err := hammer(ctx, s.Listener.Addr().String(), "/", 1, 1, 0); err == nil {
		t.Error("no error")
	}
}

func TestTable(t *testing.T) {
	var tab table
	tab.compare("a", 3e9, "nginx", 2e9, goal{atLeast: 0.9}, showRate)
	tab.compare("b", 3, "direct", 2, goal{atMost: 1.05}, showSeconds)
	tab.compare("c", 3, "nginx", 2, goal{}, showRequests)
	tab.single("d", 100<<20, goal{atMost: 96 << 20}, showMiB)
	var out strings.Builder
	if err := tab.print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"a 3.00 GB/s nginx 2.00 GB/s 1.50 >= 0.90 met",
		"b 3.00 s direct 2.00 s 1.50 <= 1.05 NOT MET",
		"c 3/s nginx 2/s 1.50",
		"d 100 MiB <= 96 MiB NOT MET",
	} {
		if !strings.Contains(strings.Join(strings.Fields(out.String()), " "), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func TestQuantile(t *testing.T) {
	v := []float64{5, 1, 4, 2, 3}
	for q, want := range map[float64]float64{0: 1, 0.5: 3, 0.99: 5, 1: 5} {
		if got := quantile(v, q); got != want {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
	if quantile(nil, 0.5) != 0 {
		t.Error("quantile of nothing")
	}
}

// TestProcess starts this test binary as a child, whose memory and processor
// time must be found.
func TestProcess(t *testing.T) {
	if os.Getenv("BENCH_TEST_CHILD") != "" {
		for end := time.Now().Add(100 * time.Millisecond); time.Now().Before(end); {
			_ = bytes.Repeat([]byte("x"), 1<<20)
		}
		t.Fatal(http.ListenAndServe(os.Getenv("BENCH_TEST_CHILD"), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
	}
	addr, err := freeAddr()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("BENCH_TEST_CHILD", addr)
	p, err := start(t.Context(), t.TempDir(), os.Args[0], "-test.run=TestProcess")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.await(t.Context(), "http://"+addr); err != nil {
		t.Fatal(err)
	}
	if m, err := p.peakMemory(); err != nil || m < 1<<20 || m > 1<<30 {
		t.Errorf("peak memory %v, %v", m, err)
	}
	if c, err := p.cpuTime(); err != nil || c <= 0 || c > 60 {
		t.Errorf("processor time %v, %v", c, err)
	}
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	if err := p.await(t.Context(), "http://"+addr); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("await after the end: %v", err)
	}
}

func TestStartOfWhatIsNotThere(t *testing.T) {
	_, err := start(t.Context(), t.TempDir(), "/no/such/binary")
	if err == nil || !strings.Contains(err.Error(), "make deps") {
		t.Errorf("got %v", err)
	}
}

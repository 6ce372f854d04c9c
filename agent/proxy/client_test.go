package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/larder-cache/larder/test/registrytest"
)

// belowSpy is a connection's ResponseWriter that notes what ReadFrom was given.
type belowSpy struct {
	*httptest.ResponseRecorder
	files, others int
}

func (s *belowSpy) ReadFrom(r io.Reader) (int64, error) {
	limited, ok := r.(*io.LimitedReader)
	if ok {
		_, ok = limited.R.(*os.File)
	}
	if ok {
		s.files++
	} else {
		s.others++
	}
	return io.Copy(s.ResponseRecorder, r)
}

// TestSendfile pins that the connection is handed the file itself, for hits and
// for blobs that are still coming; net then sends it without a copy.
func TestSendfile(t *testing.T) {
	n := startNode(t, nil)
	img := n.image(3_000_000)
	d := img.Layers[0].Digest
	for _, name := range []string{"cold", "warm"} {
		for _, header := range []string{"", "bytes=100-"} {
			r := httptest.NewRequest("GET", blobPath(d), nil)
			if header != "" {
				r.Header.Set("Range", header)
			}
			w := &belowSpy{ResponseRecorder: httptest.NewRecorder()}
			n.proxy.ServeHTTP(w, r)
			want := bytesOf(t, img, d)
			if header != "" {
				want = want[100:]
			}
			if w.files == 0 || w.others != 0 || !bytes.Equal(w.Body.Bytes(), want) {
				t.Errorf("%s %q: %d files, %d others, %d bytes", name, header, w.files, w.others, w.Body.Len())
			}
		}
		await(t, "commit", func() bool { return n.cache.Has(d) })
	}
}

// rawGet writes a request by hand and returns the connection after the headers.
func rawGet(t *testing.T, n *node, path string) (*net.TCPConn, *bufio.Reader, *http.Response) {
	t.Helper()
	conn, err := net.Dial("tcp", n.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn), r, resp
}

// TestFINNotRST: a body that cannot be finished ends with FIN on the wire; RST
// would fail the pull without failover.
func TestFINNotRST(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.upstream.Stall, s.upstream.StreamsPerBlob = time.Minute, 1
		s.proxy.StallTimeout = 200 * time.Millisecond
	})
	d := n.image(3_000_000).Layers[0].Digest
	n.registry.Inject(registrytest.Match{Reference: d.String()}, registrytest.StallAfter(1_000_000))
	_, r, resp := rawGet(t, n, blobPath(d))
	got, err := io.Copy(io.Discard, r)
	if resp.StatusCode != 200 || resp.ContentLength != 3_000_000 || got == 0 || got >= 3_000_000 {
		t.Errorf("status %d, %d of %d bytes", resp.StatusCode, got, resp.ContentLength)
	}
	if err != nil { // io.Copy reports no EOF: nil is FIN
		t.Errorf("the connection ended with %v (RST: %v)", err, errors.Is(err, syscall.ECONNRESET))
	}
}

// TestClientHangsUp: one client's fate does not decide the fill's.
func TestClientHangsUp(t *testing.T) {
	n := startNode(t, nil)
	n.registry.SetRate(8<<20, 0)
	d := n.image(4_000_000).Layers[0].Digest
	ctx, cancel := context.WithCancel(t.Context())
	resp := n.open(ctx, "GET", blobPath(d))
	if _, err := io.ReadFull(resp.Body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	cancel()
	_ = resp.Body.Close()
	await(t, "the fill to end well", func() bool { return n.cache.Has(d) })
	await(t, "the request to end", func() bool { return len(n.proxy.Pulls()) == 0 })
	if n.proxy.failed.has(keyOf(n.target(), d)) {
		t.Error("a client that hung up counts as a failure of the blob")
	}
}

// TestOverlappingRanges: sixteen at once on a blob that is only coming, in one
// download.
func TestOverlappingRanges(t *testing.T) {
	n := startNode(t, func(s *setup) { s.upstream.StreamsPerBlob = 1 })
	n.registry.SetRate(8<<20, 0)
	img := n.image(4_000_000)
	d := img.Layers[0].Digest
	want := bytesOf(t, img, d)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			from := i * 200_000
			a := n.get(blobPath(d), "Range", fmt.Sprintf("bytes=%d-", from))
			if a.status != 206 || !bytes.Equal(a.body, want[from:]) {
				t.Errorf("from %d: status %d, %d bytes, %v", from, a.status, len(a.body), a.err)
			}
		})
	}
	wg.Wait()
	if got := n.registry.Bytes(registrytest.Match{Reference: d.String()}); got > 5_000_000 {
		t.Errorf("%d bytes from upstream for a blob of 4,000,000", got)
	}
}

// TestContainerdInChunks: a client that asks for parallel open-ended ranges and
// hangs up on each.
func TestContainerdInChunks(t *testing.T) {
	n := startNode(t, nil)
	n.image(6_000_000)
	c := n.containerd()
	c.ChunkSize = 1 << 20
	if _, err := c.Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
		t.Fatal(err)
	}
	if got := n.registry.Bytes(registrytest.Match{Kind: registrytest.Blob}); got > 7_500_000 {
		t.Errorf("%d bytes from upstream", got)
	}
}

// TestContainerdInChunksWaits: containerd takes an error status to a chunk after the first
// for the end of its pull (core/remotes/docker/fetcher.go, dockerFetcher.open), so a
// registry that says nothing for longer than the budget must not bring one.
func TestContainerdInChunksWaits(t *testing.T) {
	const budget = 300 * time.Millisecond
	n := startNode(t, func(s *setup) {
		s.proxy.FirstByteBudget, s.proxy.StallTimeout, s.upstream.StreamsPerBlob = budget, 10*time.Second, 1
	})
	d := n.image(6_000_000).Layers[0].Digest
	f := n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.Times(1), registrytest.StallAfter(1_500_000))
	go func() {
		<-f.Held()
		time.AfterFunc(3*budget, f.Release)
	}()
	c := n.containerd()
	c.ChunkSize = 1 << 20
	if _, err := c.Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
		t.Fatal(err)
	}
}

// TestChunkOfAFillThatFails: nor must a download that fails while a chunk waits for it bring
// one. The body ends short, and who then asks for the rest is sent to the registry.
func TestChunkOfAFillThatFails(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.proxy.FirstByteBudget, s.proxy.StallTimeout, s.upstream.StreamsPerBlob = 10*time.Second, 10*time.Second, 1
	})
	d := n.image(6_000_000).Layers[0].Digest
	get := registrytest.Match{Reference: d.String(), Method: "GET"}
	n.registry.Inject(get, registrytest.Times(1), registrytest.CutAfter(1_500_000))
	gone := n.registry.Inject(get, registrytest.Skip(1), registrytest.Hold(), registrytest.Status(404))
	var first, second answer
	var wg sync.WaitGroup
	wg.Go(func() { first = n.get(blobPath(d), "Range", "bytes=0-") })
	<-gone.Held()
	wg.Go(func() { second = n.get(blobPath(d), "Range", "bytes=3000000-") })
	await(t, "the chunk to wait", func() bool { return n.cache.Fills()[0].Readers == 2 })
	gone.Release()
	wg.Wait()
	for name, a := range map[string]answer{"first": first, "second": second} {
		if a.status != 206 || a.err == nil {
			t.Errorf("%s chunk: status %d, %d bytes, %v", name, a.status, len(a.body), a.err)
		}
	}
	if a := n.get(blobPath(d), "Range", "bytes=3000000-"); a.status != 503 {
		t.Errorf("the rest: status %d, %d bytes", a.status, len(a.body))
	}
}

// TestChunksWithAnEnd: a chunk that names its end is no lazy pull's part, which may be shown
// before the digest is known: containerd reads all of the layer.
func TestChunksWithAnEnd(t *testing.T) {
	n := startNode(t, nil)
	d := n.image(6_000_000).Layers[0].Digest
	n.registry.SetRate(0, 6_000_000)
	n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.CorruptAt(10))
	first := n.open(t.Context(), "GET", blobPath(d), "Range", "bytes=0-")
	defer first.Body.Close()
	if a := n.get(blobPath(d), "Range", "bytes=5999949-5999999"); a.status != 206 || a.err == nil {
		t.Errorf("the end of wrong bytes: status %d, %d bytes", a.status, len(a.body))
	}
}

// TestLazyPull: a client that pulls lazily reads the table at the end of a layer first,
// and does not wait for all of it.
func TestLazyPull(t *testing.T) {
	n := startNode(t, func(s *setup) { s.proxy.FirstByteBudget = 3 * time.Second })
	img := n.image(60_000_000, 60_000_001)
	n.registry.SetRate(0, 2_000_000) // half a minute for each layer
	for i, path := range []string{blobPath(img.Layers[0].Digest), pathBlob(img.Layers[1].Digest)} {
		d := img.Layers[i].Digest
		want := bytesOf(t, img, d)
		for _, header := range []string{"bytes=-51", "bytes=-1000,30000000-30000050", "bytes=0-50,30000000-30000050,-51"} {
			begin := time.Now()
			a := n.get(path, "Range", header)
			if a.status != 206 || a.err != nil || !bytes.Contains(a.body, want[len(want)-51:]) {
				t.Errorf("%s, %s: status %d, %d bytes, %v", path, header, a.status, len(a.body), a.err)
			}
			if took := time.Since(begin); took > 10*time.Second || n.cache.Has(d) {
				t.Errorf("%s, %s: took %s", path, header, took)
			}
		}
		if i == 0 { // who goes on with a whole blob does
			checkOCIError(t, n.get(path, "Range", "bytes=59999949-"), 503, "UNAVAILABLE")
		}
	}
}

// TestWrongBytesInParts: who got a blob in parts, its end before its digest was known,
// takes the end from the registry when he comes again because the bytes were wrong.
func TestWrongBytesInParts(t *testing.T) {
	n := startNode(t, nil)
	d := n.image(6_000_000).Layers[0].Digest
	n.registry.SetRate(0, 6_000_000)
	n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.CorruptAt(10))
	if a := n.get(blobPath(d), "Range", "bytes=-51"); a.status != 206 || a.err != nil {
		t.Fatalf("status %d, %v", a.status, a.err)
	}
	await(t, "the digest", func() bool { return n.cache.Mismatches(d) > 0 })
	checkOCIError(t, n.get(blobPath(d), "Range", "bytes=-51"), 503, "UNAVAILABLE")
}

// TestWrongBytesInPathParts: a path-encoded client that got a blob in parts is sent to
// the registry when the bytes were wrong, like one whose body was cut.
func TestWrongBytesInPathParts(t *testing.T) {
	n := startNode(t, nil)
	d := n.image(6_000_000).Layers[0].Digest
	n.registry.SetRate(0, 6_000_000)
	n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.CorruptAt(10))
	if a := n.get(pathManifest("v1")); a.status != 200 {
		t.Fatalf("status %d", a.status)
	}
	if a := n.get(pathBlob(d), "Range", "bytes=-51"); a.status != 206 || a.err != nil {
		t.Fatalf("status %d, %v", a.status, a.err)
	}
	await(t, "the digest", func() bool { return n.cache.Mismatches(d) > 0 })
	checkOCIError(t, n.get(pathManifest("v1")), 404, "MANIFEST_UNKNOWN")
}

// slowWriter is a client that stops reading: a write waits until the deadline.
type slowWriter struct {
	http.ResponseWriter
	deadline time.Time
	reads    time.Duration // how long the client takes for a chunk
}

func (w *slowWriter) SetWriteDeadline(t time.Time) error { w.deadline = t; return nil }

func (w *slowWriter) ReadFrom(r io.Reader) (int64, error) {
	if left := time.Until(w.deadline); left < w.reads {
		time.Sleep(left) // the bubble's clock
		return 0, os.ErrDeadlineExceeded
	}
	time.Sleep(w.reads) // the bubble's clock
	return io.Copy(io.Discard, r)
}

// TestSlowClients: there is no bound on the whole, and one on each chunk.
func TestSlowClients(t *testing.T) {
	const size = 8 << 20
	file, err := os.Create(t.TempDir() + "/blob")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		reads time.Duration
		ok    bool
	}{{time.Millisecond, true}, {writeTimeout - time.Second, true}, {writeTimeout + time.Second, false}, {24 * time.Hour, false}} {
		synctest.Test(t, func(t *testing.T) {
			x := &exchange{proxy: &Proxy{metrics: newMetrics(nil)}, ResponseWriter: &slowWriter{reads: tc.reads}, r: httptest.NewRequest("GET", "/", nil)}
			x.ctx, x.cancel = context.WithCancelCause(t.Context())
			b := &body{x: x, stall: time.Second, at: wholeFile{file, size}}
			begin := time.Now()
			sent, err := x.ReadFrom(&io.LimitedReader{R: b, N: size})
			if ok := err == nil && sent == size; ok != tc.ok {
				t.Errorf("a chunk in %s: sent %d, %v", tc.reads, sent, err)
			}
			if !tc.ok && time.Since(begin) > writeTimeout {
				t.Errorf("held for %s", time.Since(begin))
			}
			if b.failure() != nil {
				t.Errorf("a client's slowness counts as the blob's: %v", b.failure())
			}
		})
	}
}

// wholeFile is content in a file.
type wholeFile struct {
	file *os.File
	n    int64
}

func (w wholeFile) source() source                            { return sourceDisk }
func (w wholeFile) size() int64                               { return w.n }
func (w wholeFile) ready(context.Context, int64) error        { return nil }
func (w wholeFile) extent(off int64) (*os.File, int64, error) { return w.file, w.n - off, nil }
func (w wholeFile) read(p []byte, off int64) (int, error)     { return w.file.ReadAt(p, off) }
func (w wholeFile) Close() error                              { return nil }

// TestPulls: what status shows of a download under way.
func TestPulls(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.upstream.Stall, s.upstream.StreamsPerBlob = time.Minute, 1
		s.proxy.StallTimeout = time.Minute
	})
	d := n.image(3_000_000).Layers[0].Digest
	f := n.registry.Inject(registrytest.Match{Reference: d.String()}, registrytest.StallAfter(1_500_000))
	resp := n.open(t.Context(), "GET", blobPath(d))
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 1_000_000)); err != nil {
		t.Fatal(err)
	}
	var p Pull
	await(t, "what was read is counted, which it is once the write has returned", func() bool {
		pulls := n.proxy.Pulls()
		if len(pulls) == 1 {
			p = pulls[0]
		}
		return p.Offset >= 1_000_000
	})
	if p.Digest != d || p.Registry != host || p.Repository != repo || p.Size != 3_000_000 || p.Source != "upstream" || p.Started.IsZero() {
		t.Errorf("%+v", p)
	}
	f.Remove()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Error(err)
	}
}

// TestCountersAddUp: what clients got is what the metrics and the audit say.
func TestCountersAddUp(t *testing.T) {
	var mu sync.Mutex
	var events []Event
	n := startNode(t, func(s *setup) {
		s.proxy.Audit = func(e Event) {
			mu.Lock()
			defer mu.Unlock()
			if !strings.HasPrefix(e.UserAgent, OwnUserAgent) { // the watchdog's
				events = append(events, e)
			}
		}
	})
	img := n.image(1_000_000)
	d := img.Layers[0].Digest
	received := 0
	for _, path := range []string{manifestPath("v1"), blobPath(d), blobPath(d), manifestPath("none"), "/v2/UPPER/manifests/x?ns=" + host} {
		if a := n.get(path); a.status == 200 {
			received += len(a.body)
		}
	}
	await(t, "the last event", func() bool { mu.Lock(); defer mu.Unlock(); return len(events) == 5 })
	mu.Lock()
	defer mu.Unlock()
	var audited int64
	for _, e := range events {
		if e.Status == 200 {
			audited += e.Bytes
		}
		if e.Duration <= 0 || e.Remote == "" || e.Method != "GET" || e.Status != 200 && e.Err == nil {
			t.Errorf("%+v", e)
		}
	}
	var counted float64
	for _, s := range []source{sourceDisk, sourceUpstream} {
		counted += testutil.ToFloat64(n.proxy.metrics.served.WithLabelValues(string(s)))
	}
	if int64(counted) != int64(received) || audited != int64(received) {
		t.Errorf("received %d, counted %v, audited %d", received, counted, audited)
	}
	if got := testutil.CollectAndCount(n.proxy.metrics.requests); got < 4 {
		t.Errorf("%d series of requests", got)
	}
}

// pipes is a listener whose connections are net.Pipe, for a bubble's clock.
type pipes struct{ conns chan net.Conn }

func (l pipes) Accept() (net.Conn, error) {
	c, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (l pipes) Close() error   { return nil }
func (l pipes) Addr() net.Addr { return &net.UnixAddr{Net: "pipe"} }

// onPipe runs test in a bubble, with a connection to a proxy that only answers pings.
func onPipe(t *testing.T, test func(t *testing.T, conn net.Conn)) {
	synctest.Test(t, func(t *testing.T) {
		p := &Proxy{log: slog.New(slog.DiscardHandler), metrics: newMetrics(nil), exchanges: map[*exchange]struct{}{}}
		l := pipes{make(chan net.Conn, 1)}
		s := p.newServer(l)
		served := make(chan error, 1)
		go func() { served <- s.http.Serve(l) }()
		here, there := net.Pipe()
		l.conns <- there
		defer func() {
			_ = here.Close()
			close(l.conns)
			<-served
		}()
		test(t, here)
	})
}

// TestBodyThatNeverComes: a request that announces a body and sends none is answered all the
// same, and its connection ends.
func TestBodyThatNeverComes(t *testing.T) {
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPut} {
		onPipe(t, func(t *testing.T, conn net.Conn) {
			if _, err := fmt.Fprintf(conn, "%s /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n", method); err != nil {
				t.Fatal(err)
			}
			if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
				t.Fatal(err)
			}
			from := bufio.NewReader(conn)
			resp, err := http.ReadResponse(from, &http.Request{Method: method})
			if err != nil {
				t.Fatalf("%s: %v", method, err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Errorf("%s: %v", method, err)
			}
			if _, err := from.ReadByte(); !errors.Is(err, io.EOF) {
				t.Errorf("%s: the connection goes on: %v", method, err)
			}
		})
	}
}

package registrytest_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	. "github.com/larder-cache/larder/test/registrytest"
)

const repo = "library/app"

// blobSize is more than a socket buffers, so that the ends of long answers are
// really reached by the client alone.
const blobSize = 1<<20 + 17

// outcome is what a client saw of one request.
type outcome struct {
	status int
	header http.Header
	body   []byte
	err    error // of the body
}

// TestFaults injects one fault each into a registry with one blob and looks at
// what a plain HTTP client gets.
func TestFaults(t *testing.T) {
	blob := readAll(t, Random(7, blobSize))
	flipped := bytes.Clone(blob)
	flipped[1000] ^= 0xff
	for name, tc := range map[string]struct {
		effects []Effect
		ranged  string
		want    func(*testing.T, outcome)
	}{
		"none":               {nil, "", body(200, blob)},
		"none, range":        {nil, "bytes=10-19", partial("bytes 10-19/1048593", blob[10:20])},
		"none, open range":   {nil, "bytes=1048590-", partial("bytes 1048590-1048592/1048593", blob[1048590:])},
		"none, suffix range": {nil, "bytes=-3", partial("bytes 1048590-1048592/1048593", blob[1048590:])},
		"none, past the end": {nil, "bytes=1048593-", status(416)},
		"none, backwards":    {nil, "bytes=500-0", status(416)},
		"status":             {[]Effect{Status(503, "Retry-After", "7")}, "", all(status(503), header("Retry-After", "7"))},
		"429":                {[]Effect{TooManyRequests(3 * time.Second)}, "", all(status(429), header("Retry-After", "3"))},
		"429 without a hint": {[]Effect{TooManyRequests(-1)}, "", all(status(429), header("Retry-After", ""))},
		"cut":                {[]Effect{CutAfter(5000)}, "", broken(io.ErrUnexpectedEOF, blob[:5000])},
		"cut, no byte":       {[]Effect{CutAfter(0)}, "", broken(io.ErrUnexpectedEOF, nil)},
		"cut in a range":     {[]Effect{CutAfter(5)}, "bytes=100-199", broken(io.ErrUnexpectedEOF, blob[100:105])},
		"reset":              {[]Effect{ResetAfter(5000)}, "", broken(syscall.ECONNRESET, blob[:5000])},
		"corrupt":            {[]Effect{CorruptAt(1000)}, "", body(200, flipped)},
		"corrupt in a range": {[]Effect{CorruptAt(1000)}, "bytes=990-1009", partial("bytes 990-1009/1048593", flipped[990:1010])},
		"corrupt elsewhere":  {[]Effect{CorruptAt(1000)}, "bytes=0-9", partial("bytes 0-9/1048593", blob[:10])},
		"length too long":    {[]Effect{ContentLength(10)}, "", broken(io.ErrUnexpectedEOF, blob)},
		"length too short":   {[]Effect{ContentLength(-10)}, "", body(200, blob[:blobSize-10])},
		"range ignored":      {[]Effect{IgnoreRange()}, "bytes=10-19", body(200, blob)},
		"range shifted":      {[]Effect{ShiftRange(5)}, "bytes=10-19", partial("bytes 15-24/1048593", blob[15:25])},
		"range mislabelled":  {[]Effect{MislabelRange(5)}, "bytes=10-19", partial("bytes 15-24/1048593", blob[10:20])},
		"wrong total":        {[]Effect{RangeTotal(99)}, "bytes=10-19", partial("bytes 10-19/99", blob[10:20])},
		"web page":           {[]Effect{HTML()}, "", all(status(200), header("Content-Type", "text/html; charset=utf-8"), header("Docker-Content-Digest", ""))},
		"no digest":          {[]Effect{Omit("Docker-Content-Digest")}, "", all(body(200, blob), header("Docker-Content-Digest", ""))},
		"no length":          {[]Effect{Omit("Content-Length")}, "", all(body(200, blob), header("Content-Length", ""))},
		"other header":       {[]Effect{Header("Content-Type", "x/y")}, "", all(body(200, blob), header("Content-Type", "x/y"))},
		"gzip":               {[]Effect{Gzip()}, "", gunzips(blob)},
		"two faults":         {[]Effect{CorruptAt(1000), CutAfter(2000)}, "", broken(io.ErrUnexpectedEOF, flipped[:2000])},
	} {
		t.Run(name, func(t *testing.T) {
			s := Start(t, Options{})
			d := s.PutBlob(repo, Bytes(blob))
			s.Inject(Match{Kind: Blob}, tc.effects...)
			tc.want(t, fetch(t, s, "/v2/"+repo+"/blobs/"+d.Digest.String(), tc.ranged))
		})
	}
}

// fetch does one GET without any retry.
func fetch(t *testing.T, s *Server, path, ranged string) outcome {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if ranged != "" {
		req.Header.Set("Range", ranged)
	}
	resp, err := client(t, s).Do(req)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return outcome{resp.StatusCode, resp.Header, b, err}
}

func readAll(t *testing.T, c Content) []byte {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(c, 0, c.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func all(checks ...func(*testing.T, outcome)) func(*testing.T, outcome) {
	return func(t *testing.T, o outcome) {
		for _, check := range checks {
			check(t, o)
		}
	}
}

func status(want int) func(*testing.T, outcome) {
	return func(t *testing.T, o outcome) {
		if o.status != want || o.err != nil {
			t.Errorf("got status %d, error %v; want %d", o.status, o.err, want)
		}
	}
}

func header(key, want string) func(*testing.T, outcome) {
	return func(t *testing.T, o outcome) {
		if got := o.header.Get(key); got != want {
			t.Errorf("%s is %q, want %q", key, got, want)
		}
	}
}

func body(code int, want []byte) func(*testing.T, outcome) {
	return all(status(code), func(t *testing.T, o outcome) {
		if !bytes.Equal(o.body, want) {
			t.Errorf("got %d other bytes than the %d expected", len(o.body), len(want))
		}
	})
}

func partial(contentRange string, want []byte) func(*testing.T, outcome) {
	return all(body(206, want), header("Content-Range", contentRange))
}

func broken(wantErr error, want []byte) func(*testing.T, outcome) {
	return func(t *testing.T, o outcome) {
		if !errors.Is(o.err, wantErr) || !bytes.Equal(o.body, want) {
			t.Errorf("got %d bytes and %v; want %d and %v", len(o.body), o.err, len(want), wantErr)
		}
	}
}

func gunzips(want []byte) func(*testing.T, outcome) {
	return all(header("Content-Encoding", "gzip"), func(t *testing.T, o outcome) {
		r, err := gzip.NewReader(bytes.NewReader(o.body))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(b, want) {
			t.Errorf("unzipped to %d bytes, error %v", len(b), err)
		}
	})
}

func TestFaultScope(t *testing.T) {
	s := Start(t, Options{})
	img := OCIImage(ImageSpec{Seed: 1, Layers: []int64{100}})
	s.Put(repo, img, "v1")
	s.Put("other", img, "v1")
	blob := img.Layers[0].Digest.String()
	f := s.Inject(Match{Kind: Blob, Repository: repo, Reference: blob, Method: http.MethodGet}, Skip(1), Times(2), Status(500))
	for i, step := range []struct {
		path string
		want int
	}{
		{"/v2/" + repo + "/manifests/v1", 200},   // another kind
		{"/v2/other/blobs/" + blob, 200},         // another repository
		{"/v2/" + repo + "/blobs/" + blob, 200},  // skipped
		{"/v2/" + repo + "/blobs/" + blob, 500},  // first
		{"/v2/" + repo + "/manifests/v1", 200},   // another kind
		{"/v2/" + repo + "/blobs/" + blob, 500},  // second
		{"/v2/" + repo + "/blobs/" + blob, 200},  // used up
		{"/v2/" + repo + "/blobs/sha256:1", 404}, // another digest
	} {
		if o := fetch(t, s, step.path, ""); o.status != step.want {
			t.Errorf("step %d, %s: got %d, want %d", i, step.path, o.status, step.want)
		}
	}
	if f.Hits() != 2 {
		t.Errorf("fault hit %d times", f.Hits())
	}
}

func TestHeadIsRefused(t *testing.T) {
	s := Start(t, Options{})
	s.Put(repo, OCIImage(ImageSpec{Seed: 1}), "v1")
	s.Inject(Match{Kind: Manifest, Method: http.MethodHead}, Status(http.StatusMethodNotAllowed))
	c := client(t, s)
	resp, err := c.Head(s.URL() + "/v2/" + repo + "/manifests/v1")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 405 {
		t.Errorf("HEAD got %d", resp.StatusCode)
	}
	if o := fetch(t, s, "/v2/"+repo+"/manifests/v1", ""); o.status != 200 {
		t.Errorf("GET got %d", o.status)
	}
	if s.Count(Match{Method: "HEAD", Status: 405}) != 1 || s.Count(Match{Kind: Manifest}) != 2 {
		t.Errorf("counted wrongly: %+v", s.Requests(Match{}))
	}
}

// TestHold pins that a held request gets nothing at all before its release, and
// that Held tells when it has arrived.
func TestHold(t *testing.T) {
	s := Start(t, Options{})
	f := s.Inject(Match{Kind: Ping}, Hold())
	got := make(chan int, 1)
	go func() { got <- fetch(t, s, "/v2/", "").status }()
	<-f.Held()
	select {
	case code := <-got:
		t.Fatalf("answered %d while held", code)
	default:
	}
	f.Release()
	if code := <-got; code != 200 {
		t.Errorf("got %d after release", code)
	}
}

func TestHoldEndsWithTheClient(t *testing.T) {
	s := Start(t, Options{})
	f := s.Inject(Match{Kind: Ping}, Hold())
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL()+"/v2/", nil)
	if err != nil {
		t.Fatal(err)
	}
	gone := make(chan error, 1)
	c := client(t, s)
	go func() {
		resp, err := c.Do(req)
		if err == nil {
			resp.Body.Close()
		}
		gone <- err
	}()
	<-f.Held()
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("client got %v", err)
	}
	// Close, in the cleanup, would hang if the handler still did.
}

func TestStall(t *testing.T) {
	s := Start(t, Options{})
	d := s.PutBlob(repo, Random(1, blobSize))
	f := s.Inject(Match{Kind: Blob}, StallAfter(3000))
	resp, err := client(t, s).Get(s.URL() + "/v2/" + repo + "/blobs/" + d.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	first := make([]byte, 3000)
	if _, err := io.ReadFull(resp.Body, first); err != nil {
		t.Fatalf("before the stall: %v", err)
	}
	<-f.Held()
	if n := s.Bytes(Match{Kind: Blob}); n != 3000 {
		t.Errorf("%d bytes sent before the stall", n)
	}
	f.Release()
	if n, err := io.Copy(io.Discard, resp.Body); n != blobSize-3000 || err != nil {
		t.Errorf("after the stall: %d bytes, %v", n, err)
	}
}

func TestDelay(t *testing.T) {
	s := Start(t, Options{})
	s.SetLatency(30 * time.Millisecond)
	s.Inject(Match{}, Delay(20*time.Millisecond))
	start := time.Now()
	fetch(t, s, "/v2/", "")
	if d := time.Since(start); d < 50*time.Millisecond {
		t.Errorf("answered after %v", d)
	}
}

func TestRedirects(t *testing.T) {
	s := Start(t, Options{})
	c := client(t, s)
	s.Inject(Match{Kind: Manifest}, RedirectLoop())
	if _, _, err := get(t, c, s.URL()+"/v2/"+repo+"/manifests/v1"); err == nil || !strings.Contains(err.Error(), "10 redirects") {
		t.Errorf("circle: %v", err)
	}
	s.Inject(Match{Kind: Tags}, RedirectTo(s.URL()+"/v2/"))
	resp, b, err := get(t, c, s.URL()+"/v2/"+repo+"/tags/list")
	if err != nil || string(b) != "{}" {
		t.Errorf("redirected to %v, %q, %v", resp, b, err)
	}
}

func TestOversizedManifest(t *testing.T) {
	s := Start(t, Options{})
	s.Put(repo, OCIImage(ImageSpec{Seed: 1}), "v1")
	for name, size := range map[string]int64{"1 GiB": 1 << 30, "endless": -1} {
		t.Run(name, func(t *testing.T) {
			f := s.Inject(Match{Kind: Manifest}, Oversized(size))
			defer f.Remove()
			resp, err := client(t, s).Get(s.URL() + "/v2/" + repo + "/manifests/v1")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.ContentLength != size || resp.Header.Get("Content-Type") != ocispec.MediaTypeImageManifest {
				t.Errorf("length %d, type %q", resp.ContentLength, resp.Header.Get("Content-Type"))
			}
			if n, err := io.CopyN(io.Discard, resp.Body, 32<<20); err != nil {
				t.Errorf("ended after %d bytes: %v", n, err)
			}
		})
	}
}

// TestRates measures with wide margins: a limit that is ignored is wrong by
// orders of magnitude.
func TestRates(t *testing.T) {
	const size, limit = 300_000, 1_000_000
	for name, set := range map[string]func(*Server){
		"per answer":     func(s *Server) { s.Inject(Match{Kind: Blob}, Rate(limit)) },
		"per connection": func(s *Server) { s.SetRate(limit, 0) },
		"uplink":         func(s *Server) { s.SetRate(0, limit) },
	} {
		t.Run(name, func(t *testing.T) {
			s := Start(t, Options{})
			d := s.PutBlob(repo, Random(1, size))
			set(s)
			start := time.Now()
			fetch(t, s, "/v2/"+repo+"/blobs/"+d.Digest.String(), "")
			if took := time.Since(start); took < 200*time.Millisecond || took > 3*time.Second {
				t.Errorf("%d bytes at %d bytes/s took %v", size, limit, took)
			}
		})
	}
}

// TestDownAndUp: nobody else answers at the ports of a server that is down.
func TestDownAndUp(t *testing.T) {
	s := Start(t, Options{CDN: true})
	d := s.PutBlob(repo, Random(1, 100))
	url := s.URL() + "/v2/" + repo + "/blobs/" + d.Digest.String()
	s.Down()
	s.Down() // changes nothing
	if l, err := net.Listen("tcp", s.Host()); err == nil {
		l.Close()
		t.Error("the port of a server that is down was somebody else's")
	}
	if _, _, err := get(t, client(t, s), url); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("while down: %v", err)
	}
	if err := s.Up(); err != nil {
		t.Fatal(err)
	}
	if _, b, err := get(t, client(t, s), url); err != nil || len(b) != 100 {
		t.Errorf("after Up: %d bytes, %v", len(b), err)
	}
	s.Down()
	s.Close()
	l, err := net.Listen("tcp", s.Host())
	if err != nil {
		t.Fatalf("after Close: %v", err)
	}
	l.Close()
}

// TestCloseReleases pins that Close does not wait for a client that is held in
// the middle of a body.
func TestCloseReleases(t *testing.T) {
	s := Start(t, Options{})
	d := s.PutBlob(repo, Random(1, blobSize))
	f := s.Inject(Match{Kind: Blob}, StallAfter(1))
	resp, err := client(t, s).Get(s.URL() + "/v2/" + repo + "/blobs/" + d.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	<-f.Held()
	s.Close()
	if _, err := io.ReadAll(resp.Body); err == nil {
		t.Error("the body ended well")
	}
}

func TestCounts(t *testing.T) {
	s := Start(t, Options{})
	d := s.PutBlob(repo, Random(1, 1000))
	path := "/v2/" + repo + "/blobs/" + d.Digest.String()
	fetch(t, s, path, "")
	fetch(t, s, path, "bytes=0-99")
	fetch(t, s, "/v2/"+repo+"/blobs/nothing", "")
	for name, tc := range map[string]struct {
		m        Match
		requests int
		bytes    int64
	}{
		"digest": {Match{Reference: d.Digest.String()}, 2, 1100},
		"200":    {Match{Status: 200}, 1, 1000},
		"206":    {Match{Kind: Blob, Status: 206}, 1, 100},
		"none":   {Match{Kind: Manifest}, 0, 0},
		"role":   {Match{Role: CDN}, 0, 0},
	} {
		if n, b := s.Count(tc.m), s.Bytes(tc.m); n != tc.requests || b != tc.bytes {
			t.Errorf("%s: %d requests, %d bytes; want %d, %d", name, n, b, tc.requests, tc.bytes)
		}
	}
	if err := s.Wait(t.Context(), Match{Status: 404}, 1); err != nil {
		t.Error(err)
	}
	requests := s.Requests(Match{Status: 206})
	if len(requests) != 1 || requests[0].Header.Get("Range") != "bytes=0-99" || requests[0].Bytes != 100 {
		t.Errorf("listed %+v", requests)
	}
	s.ResetCounts()
	if s.Count(Match{}) != 0 || len(s.Requests(Match{})) != 0 {
		t.Error("counts are not reset")
	}
}

func TestWaitGivesUp(t *testing.T) {
	s := Start(t, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Wait(ctx, Match{}, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestPushIsRefused(t *testing.T) {
	s := Start(t, Options{})
	resp, err := client(t, s).Post(s.URL()+"/v2/"+repo+"/blobs/uploads/", "", strings.NewReader(""))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed || resp.Header.Get("Allow") != "GET, HEAD" {
		t.Errorf("got %s, Allow %q", strconv.Itoa(resp.StatusCode), resp.Header.Get("Allow"))
	}
}

package upstream

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/test/registrytest"
)

const blobSize = 1<<20 + 12345

var blobGet = registrytest.Match{Kind: registrytest.Blob, Method: http.MethodGet}

// TestBlobFaults orders one misfortune after the other from a registry and
// states how Fetch ends: with the right bytes, or with which kind of error.
func TestBlobFaults(t *testing.T) {
	t.Parallel()
	type faults = []registrytest.Effect
	few, always := registrytest.Times(2), registrytest.Times(0)
	cases := []struct {
		name    string
		fault   faults
		options registrytest.Options
		wrong   func(error) bool // nil: the bytes arrive
		most    int              // GETs of the blob at most; 0 = not checked
	}{
		{name: "none", most: 1},
		{name: "cut twice", fault: faults{registrytest.CutAfter(100_000), few}, most: 3},
		{name: "cut before the first byte", fault: faults{registrytest.CutAfter(0), few}, most: 3},
		{name: "cut after each 100 kB, always", fault: faults{registrytest.CutAfter(100_000), always}},
		{name: "cut before the first byte, always", fault: faults{registrytest.CutAfter(0), always}, wrong: IsUnavailable, most: maxIdle + 1},
		{name: "a byte at a time, always", fault: faults{registrytest.CutAfter(1), always}, wrong: IsUnavailable, most: maxIdle + 1},
		{name: "reset in the body", fault: faults{registrytest.ResetAfter(200_000), few}},
		{name: "stall in the body", fault: faults{registrytest.StallAfter(200_000), few}, most: 3},
		{name: "stall in the body, always", fault: faults{registrytest.StallAfter(0), always}, wrong: IsUnavailable},
		{name: "no headers", fault: faults{registrytest.Hold(), few}, most: 3},
		{name: "500 twice", fault: faults{registrytest.Status(500), few}, most: 3},
		{name: "503 always", fault: faults{registrytest.Status(503), always}, wrong: IsUnavailable, most: maxIdle + 1},
		{name: "404", fault: faults{registrytest.Status(404), always}, wrong: IsNotFound, most: 1},
		{name: "403", fault: faults{registrytest.Status(403), always}, wrong: IsUnauthorized, most: 1},
		{name: "429 once", fault: faults{registrytest.TooManyRequests(time.Second), registrytest.Times(1)}, most: 2},
		{name: "web page", fault: faults{registrytest.HTML(), always}, wrong: IsUnavailable},
		{name: "gzip", fault: faults{registrytest.Gzip(), always}, wrong: IsUnavailable},
		{name: "redirect circle", fault: faults{registrytest.RedirectLoop(), always}, wrong: IsUnavailable},
		{name: "no length", fault: faults{registrytest.Omit("Content-Length"), registrytest.IgnoreRange(), always}, wrong: IsUnavailable},
		{name: "no length but Content-Range", fault: faults{registrytest.Omit("Content-Length"), always}, most: 1},
		{name: "no length, ends after 1000 bytes, then none, always", fault: faults{registrytest.ContentLength(1000 - blobSize), registrytest.Omit("Content-Length"), always}, wrong: IsUnavailable, most: maxIdle + 1},
		{name: "through a CDN", options: registrytest.Options{CDN: true}},
		{name: "cut at the CDN", options: registrytest.Options{CDN: true}, fault: faults{registrytest.CutAfter(100_000), few}},
		{name: "signed URL expired", options: registrytest.Options{CDN: true}, fault: faults{registrytest.Status(403), registrytest.Times(1)}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			reg := registrytest.Start(t, tc.options)
			d := reg.PutBlob(repo, registrytest.Random(7, blobSize)).Digest
			match := blobGet
			if tc.options.CDN {
				match.Role = registrytest.CDN
			}
			if tc.fault != nil {
				reg.Inject(match, tc.fault...)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			reg.Inject(match, registrytest.Skip(100), registrytest.Do(cancel)) // whoever asks forever
			sink := newSink(256 << 10)
			err := clientOf(t, reg).Fetch(ctx, target, d, sink)
			switch {
			case tc.wrong == nil && err != nil:
				t.Fatalf("Fetch: %v", err)
			case tc.wrong == nil:
				sink.check(t, d)
			case !tc.wrong(err):
				t.Fatalf("Fetch: error %v is of another kind", err)
			}
			if n := reg.Count(match); tc.most > 0 && n > tc.most {
				t.Errorf("%d GETs, want at most %d", n, tc.most)
			}
		})
	}
}

// TestRangeLies cuts the first body, and lies about the range that follows.
func TestRangeLies(t *testing.T) {
	t.Parallel()
	cases := []struct {
		name  string
		fault registrytest.Effect
		cut   int64
		ok    bool
	}{
		{"ignored near the start", registrytest.IgnoreRange(), 100_000, true},
		{"ignored far from the start", registrytest.IgnoreRange(), 1<<20 + 9000, true},
		{"shifted", registrytest.ShiftRange(4096), 100_000, false},
		{"shifted back", registrytest.ShiftRange(-4096), 100_000, false},
		{"mislabelled", registrytest.MislabelRange(1), 100_000, false},
		{"another total", registrytest.RangeTotal(blobSize + 1), 100_000, false},
		{"total less than the range", registrytest.RangeTotal(5), 100_000, false},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			reg := registrytest.Start(t, registrytest.Options{})
			d := reg.PutBlob(repo, registrytest.Random(7, blobSize)).Digest
			reg.Inject(blobGet, registrytest.CutAfter(tc.cut), registrytest.Times(1))
			reg.Inject(blobGet, tc.fault, registrytest.Skip(1))
			sink := newSink(256 << 10)
			err := clientOf(t, reg).Fetch(t.Context(), target, d, sink)
			if tc.ok {
				if err != nil {
					t.Fatal(err)
				}
				sink.check(t, d)
				return
			}
			if !IsUnavailable(err) {
				t.Fatalf("Fetch: %v, want unavailable", err)
			}
			want := content(t, registrytest.Random(7, blobSize))
			for i, have := range sink.have { // nothing wrong was written
				at := int64(i) * sink.piece
				if string(sink.data[at:at+have]) != string(want[at:at+have]) {
					t.Fatalf("piece %d has wrong bytes", i)
				}
			}
		})
	}
}

// TestDrippingAnswers pins that a blob waits no longer for the end of an error's or a
// redirect's body than for one byte (I3).
func TestDrippingAnswers(t *testing.T) {
	body := content(t, registrytest.Random(7, blobSize))
	for _, tc := range []struct {
		status int
		ends   func(error) bool
	}{
		{http.StatusNotFound, IsNotFound},
		{http.StatusTemporaryRedirect, func(err error) bool { return err == nil }},
	} {
		t.Run(strconv.Itoa(tc.status), func(t *testing.T) {
			t.Parallel()
			base := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/storage" {
					http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
					return
				}
				w.Header().Set("Location", "/storage")
				w.WriteHeader(tc.status)
				for tick := time.Tick(50 * time.Millisecond); ; {
					_, _ = w.Write([]byte(" ")) // the client may be gone
					w.(http.Flusher).Flush()
					select {
					case <-tick:
					case <-r.Context().Done():
						return
					}
				}
			})
			c := newClient(t, nil, Registry{Host: "test", Upstreams: []string{base.String()}})
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			err := c.Fetch(ctx, target, digest.FromBytes(body), newSink(256<<10))
			if !tc.ends(err) || ctx.Err() != nil {
				t.Errorf("Fetch: %v, in time: %t", err, ctx.Err() == nil)
			}
		})
	}
}

// TestManifestFaults does for Manifest and Resolve what TestBlobFaults does for Fetch.
func TestManifestFaults(t *testing.T) {
	t.Parallel()
	type faults = []registrytest.Effect
	get := registrytest.Match{Kind: registrytest.Manifest}
	once, always := registrytest.Times(1), registrytest.Times(0)
	cases := []struct {
		name     string
		fault    faults
		wrong    func(error) bool
		resolves bool // Resolve succeeds although Manifest does not
	}{
		{name: "none"},
		{name: "500 once", fault: faults{registrytest.Status(500), once}},
		{name: "cut once", fault: faults{registrytest.CutAfter(10), once}},
		{name: "404", fault: faults{registrytest.Status(404), always}, wrong: IsNotFound},
		{name: "401", fault: faults{registrytest.Status(401), always}, wrong: IsUnauthorized},
		{name: "403", fault: faults{registrytest.Status(403), always}, wrong: IsUnauthorized},
		{name: "429", fault: faults{registrytest.TooManyRequests(time.Minute), always}, wrong: IsUnavailable},
		{name: "503", fault: faults{registrytest.Status(503), always}, wrong: IsUnavailable},
		{name: "web page", fault: faults{registrytest.HTML(), always}, wrong: IsUnavailable},
		{name: "gzip", fault: faults{registrytest.Gzip(), always}, wrong: IsUnavailable, resolves: false},
		{name: "corrupt once", fault: faults{registrytest.CorruptAt(20), once}},
		{name: "corrupt", fault: faults{registrytest.CorruptAt(20), always}, wrong: IsUnavailable, resolves: true},
		{name: "1 GiB", fault: faults{registrytest.Oversized(1 << 30), always}, wrong: IsUnavailable},
		{name: "endless", fault: faults{registrytest.Oversized(-1), always}, wrong: IsUnavailable},
		{name: "no headers", fault: faults{registrytest.Hold(), once}},
		{name: "no digest header", fault: faults{registrytest.Omit("Docker-Content-Digest"), always}},
		{name: "no length", fault: faults{registrytest.Omit("Content-Length"), always}},
		{name: "no type", fault: faults{registrytest.Omit("Content-Type"), always}},
		{name: "redirect circle", fault: faults{registrytest.RedirectLoop(), always}, wrong: IsUnavailable},
	}
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{1000}})
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			reg := registrytest.Start(t, registrytest.Options{})
			reg.Put(repo, img, "v1")
			c := clientOf(t, reg)
			for _, ref := range []string{"v1", img.Digest.String()} {
				fault := &registrytest.Fault{}
				if tc.fault != nil {
					fault = reg.Inject(get, tc.fault...)
				}
				desc, body, err := c.Manifest(t.Context(), target, ref, nil)
				if tc.wrong != nil {
					if !tc.wrong(err) {
						t.Fatalf("Manifest(%s): error %v is of another kind", ref, err)
					}
				} else if err != nil || desc.Digest != img.Digest || desc.MediaType != img.MediaType || desc.Size != int64(len(body)) {
					t.Fatalf("Manifest(%s) = %v, %v", ref, desc, err)
				}
				desc, err = c.Resolve(t.Context(), target, ref, nil)
				switch {
				case tc.wrong == nil || tc.resolves:
					if err != nil || desc.Digest != img.Digest || desc.Size != img.Size || desc.MediaType != img.MediaType {
						t.Fatalf("Resolve(%s) = %v, %v", ref, desc, err)
					}
				case !tc.wrong(err) && !IsUnavailable(err): // the breaker may be open by now
					t.Fatalf("Resolve(%s): error %v is of another kind", ref, err)
				}
				if tc.fault != nil {
					fault.Remove()
				}
			}
		})
	}
}

// TestHeadRefused pins that a registry which does not do HEAD is asked by GET.
func TestHeadRefused(t *testing.T) {
	for _, status := range []int{http.StatusMethodNotAllowed, http.StatusNotImplemented} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			img := registrytest.DockerImage(registrytest.ImageSpec{Seed: 4, Layers: []int64{1000}})
			reg.Put(repo, img, "v1")
			reg.Inject(registrytest.Match{Method: http.MethodHead}, registrytest.Status(status))
			c := clientOf(t, reg)
			if desc, err := c.Resolve(t.Context(), target, "v1", nil); err != nil || desc.Digest != img.Digest {
				t.Errorf("Resolve = %v, %v", desc, err)
			}
			if n, err := c.Stat(t.Context(), target, img.Layers[0].Digest); err != nil || n != img.Layers[0].Size {
				t.Errorf("Stat = %d, %v; want %d", n, err, img.Layers[0].Size)
			}
		})
	}
}

// TestBlobStream pins that pass-through streams mend themselves too.
func TestBlobStream(t *testing.T) {
	t.Parallel()
	reg := registrytest.Start(t, registrytest.Options{CDN: true})
	d := reg.PutBlob(repo, registrytest.Random(7, blobSize)).Digest
	reg.Inject(registrytest.Match{Role: registrytest.CDN}, registrytest.CutAfter(300_000), registrytest.Times(3))
	want := content(t, registrytest.Random(7, blobSize))
	for _, off := range []int64{0, 1, 500_000, blobSize - 1, blobSize} {
		body, size, err := clientOf(t, reg).Blob(t.Context(), target, d, off, -1)
		if off == blobSize {
			if err == nil {
				body.Close()
				t.Error("Blob at the end: no error, want one: there is no range to ask for")
			}
			continue
		}
		if err != nil || size != blobSize {
			t.Fatalf("Blob at %d: size %d, %v", off, size, err)
		}
		got, err := io.ReadAll(body)
		body.Close()
		if err != nil || string(got) != string(want[off:]) {
			t.Fatalf("Blob at %d: %d bytes, %v", off, len(got), err)
		}
	}
}

// TestCallerGivesUp pins that a caller's cancellation ends a fetch at once and
// is not held against the registry.
func TestCallerGivesUp(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	d := reg.PutBlob(repo, registrytest.Random(7, blobSize)).Digest
	c := newClient(t, func(cfg *Config) { cfg.Stall, cfg.FirstByte = time.Hour, time.Hour }, registryOf(reg))
	for range breakAfter + 1 {
		fault := reg.Inject(blobGet, registrytest.StallAfter(1000))
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-fault.Held(); cancel() }()
		if err := c.Fetch(ctx, target, d, newSink(256<<10)); err == nil || IsUnavailable(err) {
			t.Fatalf("Fetch: %v, want the cancellation", err)
		}
		cancel()
		fault.Remove()
	}
	if err := c.Fetch(t.Context(), target, d, newSink(256<<10)); err != nil {
		t.Fatal(err)
	}
}

// TestEmptyBlob pins that a blob without bytes arrives although no range of it
// can be asked for, and that this says nothing of the registry's ranges.
func TestEmptyBlob(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	d := digest.FromBytes(nil)
	reg.PutBlobAs(repo, d, registrytest.Bytes(nil))
	c, sink := clientOf(t, reg), newSink(256<<10)
	if err := c.Fetch(t.Context(), target, d, sink); err != nil || sink.Size() != 0 {
		t.Fatalf("Fetch: size %d, %v", sink.Size(), err)
	}
	if ranges := c.Health()[0].Ranges; ranges == "no" {
		t.Error("the registry is said to ignore ranges")
	}
}

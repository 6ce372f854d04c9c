package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/logtest"
	"github.com/larder-cache/larder/test/registrytest"
)

// TestFaults is the matrix of what a registry does wrong against what a real
// containerd makes of the mirror's answer. The registry is broken only for the
// proxy's first requests (times), or for all of them - containerd, which goes
// to the same registry, then fails as it would have without a mirror.
func TestFaults(t *testing.T) {
	blob := registrytest.Match{Kind: registrytest.Blob}
	large := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{2_000_000}, Opaque: true}).Layers[0].Digest.String()
	layer := registrytest.Match{Kind: registrytest.Blob, Method: http.MethodGet, Reference: large}
	manifests := registrytest.Match{Kind: registrytest.Manifest}
	times := registrytest.Times
	for name, tc := range map[string]struct {
		match   registrytest.Match
		effects []registrytest.Effect
		options registrytest.Options
	}{
		"nothing":                       {match: registrytest.Match{Kind: registrytest.Other}, effects: []registrytest.Effect{registrytest.Status(500)}},
		"blob 500 for a while":          {match: blob, effects: []registrytest.Effect{times(3), registrytest.Status(500)}},
		"blob 429 for a while":          {match: blob, effects: []registrytest.Effect{times(3), registrytest.TooManyRequests(0)}},
		"manifest 503 once":             {match: manifests, effects: []registrytest.Effect{times(1), registrytest.Status(503)}},
		"manifest 429 once":             {match: manifests, effects: []registrytest.Effect{times(1), registrytest.TooManyRequests(30 * time.Second)}},
		"cut at 0 once":                 {match: layer, effects: []registrytest.Effect{times(1), registrytest.CutAfter(0)}},
		"cut in the body once":          {match: layer, effects: []registrytest.Effect{times(1), registrytest.CutAfter(700_000)}},
		"cut in every body":             {match: layer, effects: []registrytest.Effect{registrytest.CutAfter(700_000)}},
		"reset in the body once":        {match: layer, effects: []registrytest.Effect{times(1), registrytest.ResetAfter(700_000)}},
		"stall before headers once":     {match: layer, effects: []registrytest.Effect{times(1), registrytest.Hold()}},
		"stall in the body once":        {match: layer, effects: []registrytest.Effect{times(1), registrytest.StallAfter(700_000)}},
		"corrupt once":                  {match: layer, effects: []registrytest.Effect{times(1), registrytest.CorruptAt(1_900_000)}},
		"size lie once, more":           {match: layer, effects: []registrytest.Effect{times(1), registrytest.ContentLength(1000)}},
		"size lie once, less":           {match: layer, effects: []registrytest.Effect{times(1), registrytest.ContentLength(-1000)}},
		"ranges ignored":                {match: layer, effects: []registrytest.Effect{registrytest.IgnoreRange()}},
		"wrong 206 once":                {match: layer, effects: []registrytest.Effect{times(2), registrytest.ShiftRange(7)}},
		"mislabelled 206 once":          {match: layer, effects: []registrytest.Effect{times(2), registrytest.MislabelRange(7)}},
		"redirect circle once":          {match: layer, effects: []registrytest.Effect{times(1), registrytest.RedirectLoop()}},
		"web page instead of blob once": {match: layer, effects: []registrytest.Effect{times(1), registrytest.HTML()}},
		"endless manifest once":         {match: manifests, effects: []registrytest.Effect{times(1), registrytest.Oversized(-1)}},
		"1 GiB manifest once":           {match: manifests, effects: []registrytest.Effect{times(1), registrytest.Oversized(1 << 30)}},
		"behind a CDN":                  {match: registrytest.Match{Kind: registrytest.Other}, effects: []registrytest.Effect{registrytest.Status(500)}, options: registrytest.Options{CDN: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startNode(t, func(s *setup) { s.registry = tc.options })
			n.image(2_000_000)
			n.registry.Inject(tc.match, tc.effects...)
			begin := time.Now()
			r, err := n.containerd().Pull(t.Context(), host+"/"+repo+":v1", nil)
			if err != nil {
				// A wrong byte that reached the runtime ends this pull, as it would
				// have without a mirror; it must not end the next.
				t.Logf("first pull: %v", err)
				if _, err := n.containerd().Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
					t.Errorf("second pull: %v", err)
				}
				if name != "corrupt once" {
					t.Errorf("first pull: %v", err)
				}
			}
			if d := time.Since(begin); d > 15*time.Second {
				t.Errorf("took %s", d)
			}
			for _, e := range r.Exchanges {
				if strings.Contains(e.URL, n.addr) && (e.Status == http.StatusTooManyRequests || e.Status >= 300 && e.Status < 400) {
					t.Errorf("relayed %d", e.Status)
				}
			}
		})
	}
}

// TestFallback is the matrix for a registry that is broken for the proxy and for
// good, and works for the runtime: containerd must go on there in the same pull,
// whatever had been sent, and soon.
func TestFallback(t *testing.T) {
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 7, Layers: []int64{2_000_000}, Opaque: true})
	layer := registrytest.Match{Kind: registrytest.Blob, Method: http.MethodGet, Reference: img.Layers[0].Digest.String()}
	blobs := registrytest.Match{Kind: registrytest.Blob}
	manifests := registrytest.Match{Kind: registrytest.Manifest}
	type effects = []registrytest.Effect
	for name, tc := range map[string]struct {
		match   registrytest.Match
		effects effects
		pulls   int // until one succeeds
	}{
		"all 500":                     {registrytest.Match{}, effects{registrytest.Status(500)}, 1},
		"all 404":                     {registrytest.Match{}, effects{registrytest.Status(404)}, 1},
		"all 401":                     {registrytest.Match{}, effects{registrytest.Status(401)}, 1},
		"all 403":                     {registrytest.Match{}, effects{registrytest.Status(403)}, 1},
		"all 429":                     {registrytest.Match{}, effects{registrytest.TooManyRequests(time.Minute)}, 1},
		"nothing answers":             {registrytest.Match{}, effects{registrytest.Hold()}, 1},
		"all redirect in circles":     {registrytest.Match{}, effects{registrytest.RedirectLoop()}, 1},
		"all web pages":               {registrytest.Match{}, effects{registrytest.HTML()}, 1},
		"manifests corrupt":           {manifests, effects{registrytest.CorruptAt(10)}, 1},
		"manifests without end":       {manifests, effects{registrytest.Oversized(-1)}, 1},
		"manifests cut":               {manifests, effects{registrytest.CutAfter(10)}, 1},
		"blobs 404":                   {blobs, effects{registrytest.Status(404)}, 1},
		"blobs 429":                   {blobs, effects{registrytest.TooManyRequests(time.Minute)}, 1},
		"blobs never answer":          {blobs, effects{registrytest.Hold()}, 1},
		"blobs stall at 0":            {layer, effects{registrytest.StallAfter(0)}, 1},
		"blobs stall in the body":     {layer, effects{registrytest.StallAfter(700_000)}, 1},
		"blobs are cut at 0":          {layer, effects{registrytest.CutAfter(0)}, 1},
		"blobs are cut then 404":      {layer, effects{registrytest.CutAfter(700_000), registrytest.IgnoreRange()}, 1},
		"blobs are larger than told":  {layer, effects{registrytest.ContentLength(-1000)}, 1},
		"blobs are smaller than told": {layer, effects{registrytest.ContentLength(1000)}, 1},
		"last piece corrupt":          {layer, effects{registrytest.CorruptAt(1_900_000)}, 1},
		"early piece corrupt":         {layer, effects{registrytest.CorruptAt(10)}, 3}, // the second is fetched anew
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startNode(t, func(s *setup) { s.proxy.StallTimeout = 1500 * time.Millisecond; s.proxy.FirstByteBudget = time.Second })
			n.put(img)
			n.registry.Inject(tc.match, tc.effects...)
			direct := registrytest.Start(t, registrytest.Options{})
			direct.Put(repo, img, "v1")
			c := n.containerdTo(direct.URL())
			begin := time.Now()
			for try := 1; ; try++ {
				_, err := c.Pull(t.Context(), host+"/"+repo+":v1", nil)
				if err == nil {
					break
				}
				if try == tc.pulls {
					t.Fatalf("pull %d: %v", try, err)
				}
			}
			if d := time.Since(begin); d > 12*time.Second {
				t.Errorf("took %s", d)
			}
		})
	}
}

// TestCorruptOnce holds P4: what the registry sent wrong once never completes at a
// client, and is not what the next client gets; what is left of it after that is
// for the registry to give, and so is all of it when it was wrong twice.
func TestCorruptOnce(t *testing.T) {
	n := startNode(t, nil)
	img := n.image(3_000_000)
	d := img.Layers[0].Digest
	n.registry.SetRate(0, 20_000_000) // the body begins before anybody can know
	f := n.registry.Inject(registrytest.Match{Reference: d.String()}, registrytest.CorruptAt(10))
	for range 2 {
		a := n.get(blobPath(d))
		if a.status == 200 && a.err == nil {
			t.Fatal("a wrong blob was delivered whole")
		}
		if a.status != 200 {
			t.Fatalf("status %d", a.status)
		}
		checkOCIError(t, n.get(blobPath(d), "Range", "bytes=2990000-"), 503, "UNAVAILABLE")
	}
	checkOCIError(t, n.get(blobPath(d)), 503, "UNAVAILABLE")
	f.Remove()
	await(t, "the true bytes", func() bool {
		n.proxy.failed.forget(keyOf(n.target(), d))
		a := n.get(blobPath(d))
		return a.status == 200 && a.err == nil && bytes.Equal(a.body, bytesOf(t, img, d))
	})
}

// TestAnewAfterWrongBytes: the next pull of what the registry sent wrong once is served,
// and so is the rest of a body that ended early because of it.
func TestAnewAfterWrongBytes(t *testing.T) {
	n := startNode(t, nil)
	img := n.image(3_000_000)
	d := img.Layers[0].Digest
	n.registry.SetRate(0, 20_000_000) // the body begins before anybody can know
	n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.Times(1), registrytest.CorruptAt(10))
	if a := n.get(blobPath(d)); a.status != 200 || a.err == nil {
		t.Fatalf("status %d, %v", a.status, a.err)
	}
	want := bytesOf(t, img, d)
	if a := n.get(blobPath(d), "Range", "bytes=1000000-"); a.status != 206 || a.err != nil || !bytes.Equal(a.body, want[1_000_000:]) {
		t.Errorf("the rest: status %d, %d bytes, %v", a.status, len(a.body), a.err)
	}
	if a := n.get(blobPath(d)); a.status != 200 || a.err != nil || !bytes.Equal(a.body, want) {
		t.Errorf("again: status %d, %d bytes, %v", a.status, len(a.body), a.err)
	}
}

// TestStallInTheBody holds the way out of DESIGN: what is there, then FIN, then
// 503 at once to the Range that follows, without a question to upstream.
func TestStallInTheBody(t *testing.T) {
	const stall = time.Second // one wait for it would show in the time of the refusals
	n := startNode(t, func(s *setup) {
		s.upstream.Stall = 30 * time.Second
		s.upstream.StreamsPerBlob = 1
		s.proxy.StallTimeout = stall
	})
	img := n.image(3_000_000)
	d := img.Layers[0].Digest
	f := n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.StallAfter(1_000_000))
	a := n.get(blobPath(d))
	if a.status != 200 || !errors.Is(a.err, io.ErrUnexpectedEOF) || !bytes.Equal(a.body, bytesOf(t, img, d)[:len(a.body)]) || len(a.body) == 0 {
		t.Fatalf("status %d, %d bytes, %v; want 200 cut short by FIN", a.status, len(a.body), a.err)
	}
	asked := n.registry.Count(registrytest.Match{})
	begin := time.Now()
	for range 3 {
		checkOCIError(t, n.get(blobPath(d), "Range", "bytes=1000000-"), 503, "UNAVAILABLE")
	}
	if time.Since(begin) > stall || n.registry.Count(registrytest.Match{}) != asked {
		t.Errorf("the refusal took %s and %d requests", time.Since(begin), n.registry.Count(registrytest.Match{})-asked)
	}
	f.Remove()
	await(t, "the fill to go on in the background", func() bool { return n.cache.Has(d) })
	if a := n.get(blobPath(d), "Range", "bytes=1000000-"); a.status != 206 || !bytes.Equal(a.body, bytesOf(t, img, d)[1_000_000:]) {
		t.Errorf("after the fill: status %d", a.status)
	}
}

// TestFirstByteBudget: no headers without a byte; an error within the budget, and
// the download goes on.
func TestFirstByteBudget(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.upstream.FirstByte, s.upstream.Stall = 30*time.Second, 30*time.Second
		s.proxy.FirstByteBudget = 200 * time.Millisecond
	})
	img := n.image(3_000_000)
	d := img.Layers[0].Digest
	n.get(manifestPath("v1"))
	for name, effect := range map[string]registrytest.Effect{"headers": registrytest.Hold(), "body": registrytest.StallAfter(0)} {
		f := n.registry.Inject(registrytest.Match{Reference: d.String()}, effect)
		begin := time.Now()
		checkOCIError(t, n.get(blobPath(d)), 503, "UNAVAILABLE")
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("%s: answered after %s", name, d)
		}
		f.Remove()
		await(t, "the fill to go on", func() bool { return n.cache.Has(d) })
		if err := n.cache.Remove(d); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNoRoom: a node whose disk takes nothing still delivers, verified, and
// does not deliver the end of what is wrong.
func TestNoRoom(t *testing.T) {
	full := func(s *setup) { s.cache.MaxBytes = cache.Bytes(1) }
	t.Run("whole", func(t *testing.T) {
		n := startNode(t, full)
		img := n.image(3_000_000, 1000)
		for _, l := range img.Layers {
			want := bytesOf(t, img, l.Digest)
			if a := n.get(blobPath(l.Digest)); a.status != 200 || a.err != nil || !bytes.Equal(a.body, want) || a.header.Get(headerSource) != "upstream" {
				t.Errorf("%d bytes: status %d, %v", l.Size, a.status, a.err)
			}
			if a := n.get(blobPath(l.Digest), "Range", "bytes=500-"); a.status != 206 || !bytes.Equal(a.body, want[500:]) {
				t.Errorf("range of %d bytes: status %d", l.Size, a.status)
			}
		}
		if a := n.get(manifestPath("v1")); a.status != 200 || a.header.Get(headerDigest) != img.Digest.String() {
			t.Errorf("manifest: %d", a.status)
		}
		if _, err := n.containerd().Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
			t.Error(err)
		}
	})
	t.Run("cut", func(t *testing.T) {
		n := startNode(t, full)
		img := n.image(3_000_000)
		d := img.Layers[0].Digest
		n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.Times(2), registrytest.CutAfter(1_000_000))
		if a := n.get(blobPath(d)); a.err != nil || !bytes.Equal(a.body, bytesOf(t, img, d)) {
			t.Errorf("status %d, %v", a.status, a.err)
		}
	})
	t.Run("corrupt", func(t *testing.T) {
		n := startNode(t, full)
		img := n.image(3_000_000)
		d := img.Layers[0].Digest
		n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.CorruptAt(10))
		a := n.get(blobPath(d))
		if a.err == nil || int64(len(a.body)) != 3_000_000-heldTail {
			t.Errorf("%d bytes of a wrong blob, %v", len(a.body), a.err)
		}
		checkOCIError(t, n.get(blobPath(d), "Range", "bytes=2900000-"), 503, "UNAVAILABLE")
	})
}

// TestNoRoomAsksOnce: where the cache has no room, the bytes that a client asks for are
// asked for once, and no others.
func TestNoRoomAsksOnce(t *testing.T) {
	n := startNode(t, func(s *setup) { s.cache.MaxBytes = cache.Bytes(1) })
	img := n.image(3_000_000, 3_000_001)
	gets := func(d digest.Digest) int {
		return n.registry.Count(registrytest.Match{Reference: d.String(), Method: "GET"})
	}
	unlisted := img.Layers[1].Digest
	for i, want := range []int{2, 1} { // the first finds out how large it is
		before := gets(unlisted)
		if a := n.get(blobPath(unlisted), "Range", "bytes=2000000-"); a.status != 206 || !bytes.Equal(a.body, bytesOf(t, img, unlisted)[2_000_000:]) {
			t.Errorf("status %d, %d bytes", a.status, len(a.body))
		}
		if got := gets(unlisted) - before; got != want {
			t.Errorf("request %d for a blob of unknown size: %d GETs, want %d", i, got, want)
		}
	}
	n.get(manifestPath(img.Digest.String()))
	d := img.Layers[0].Digest
	for i, r := range []string{"", "bytes=2000000-", "bytes=10-19", "bytes=-7"} {
		if a := n.get(blobPath(d), "Range", r); a.err != nil || a.status/100 != 2 {
			t.Errorf("%q: status %d, %v", r, a.status, a.err)
		}
		if got := gets(d); got != i+1 {
			t.Errorf("%q: %d GETs so far, want %d", r, got, i+1)
		}
	}
	for _, r := range []string{"bytes=1000000-1000009", "bytes=0-9", "bytes=0-9,1000000-1000009,10-19,2999000-"} {
		m := registrytest.Match{Reference: d.String()}
		before := n.registry.Bytes(m)
		a := n.get(blobPath(d), "Range", r)
		if a.status != 206 || a.err != nil || !bytes.Contains(a.body, bytesOf(t, img, d)[1_000_000:1_000_010]) && r != "bytes=0-9" {
			t.Errorf("%q: status %d, %d bytes, %v", r, a.status, len(a.body), a.err)
		}
		if got := n.registry.Bytes(m) - before; got > int64(len(a.body)) {
			t.Errorf("%q: %d bytes of the registry for an answer of %d", r, got, len(a.body))
		}
	}
	// As home of it this node must say so at once: others would wait for it.
	if err := n.proxy.Prefetch(n.target(), KindBlob, d, 0); !errors.Is(err, cache.ErrNoRoom) {
		t.Errorf("Prefetch: %v", err)
	}
}

// TestNoRoomFromPeers: what passes the cache by comes from other nodes, and the rest from the
// registry where those break off. No runtime can finish what they got wrong.
func TestNoRoomFromPeers(t *testing.T) {
	for _, tt := range []struct {
		name   string
		swarm  func(right []byte) io.Reader // nil: nobody has it
		source string
		gets   int
		short  bool
	}{
		{name: "all of it", swarm: func(b []byte) io.Reader { return bytes.NewReader(b) }, source: "peer"},
		{name: "a part", swarm: func(b []byte) io.Reader { return bytes.NewReader(b[:1_000_000]) }, source: "peer", gets: 1},
		{name: "not the end", swarm: func(b []byte) io.Reader { return bytes.NewReader(b[:len(b)-100]) }, source: "peer", gets: 1},
		{name: "nothing", source: "upstream", gets: 1},
		{name: "wrong bytes", swarm: func(b []byte) io.Reader { return bytes.NewReader(make([]byte, len(b))) }, source: "peer", short: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			swarm := &swarmFunc{}
			n := startNode(t, func(s *setup) { s.cache.MaxBytes, s.proxy.Swarm = cache.Bytes(1), swarm })
			img := n.image(3_000_000)
			d := img.Layers[0].Digest
			right := bytesOf(t, img, d)
			n.get(manifestPath(img.Digest.String())) // tells the size
			if tt.swarm != nil {
				swarm.through = func(off int64) (io.ReadCloser, int64, error) {
					return io.NopCloser(tt.swarm(right[off:])), int64(len(right)), nil
				}
			}
			a := n.get(blobPath(d))
			if got := a.header.Get(headerSource); a.status != 200 || got != tt.source {
				t.Errorf("status %d from %q, want it from %q", a.status, got, tt.source)
			}
			if short := len(a.body) < len(right) && errors.Is(a.err, io.ErrUnexpectedEOF); short != tt.short || !short && !bytes.Equal(a.body, right) {
				t.Errorf("%d of %d bytes, %v", len(a.body), len(right), a.err)
			}
			if got := n.registry.Count(registrytest.Match{Reference: d.String(), Method: "GET"}); got != tt.gets {
				t.Errorf("%d GETs, want %d", got, tt.gets)
			}
		})
	}
}

// TestNoRoomWaitsForNoByteForEver: what passes the cache by keeps to the same deadlines.
func TestNoRoomWaitsForNoByteForEver(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.upstream.FirstByte, s.upstream.Stall = 30*time.Second, 30*time.Second
		s.proxy.FirstByteBudget, s.proxy.StallTimeout = 300*time.Millisecond, 300*time.Millisecond
		s.cache.MaxBytes = cache.Bytes(1)
	})
	img := n.image(3_000_000)
	d := img.Layers[0].Digest
	n.get(manifestPath("v1"))
	for name, effect := range map[string]registrytest.Effect{"headers": registrytest.Hold(), "body": registrytest.StallAfter(0)} {
		f := n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, effect)
		begin := time.Now()
		checkOCIError(t, n.get(blobPath(d)), 503, "UNAVAILABLE")
		if d := time.Since(begin); d > 3*time.Second {
			t.Errorf("%s: answered after %s", name, d)
		}
		f.Remove()
		n.proxy.failed.forget(keyOf(n.target(), d))
	}
	n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.StallAfter(1_000_000))
	begin := time.Now()
	a := n.get(blobPath(d))
	if took := time.Since(begin); a.status != 200 || !errors.Is(a.err, io.ErrUnexpectedEOF) || len(a.body) == 0 || took > 3*time.Second {
		t.Errorf("status %d, %d bytes, %v after %s; want 200 cut short by FIN", a.status, len(a.body), a.err, took)
	}
}

// TestHealWithinBudget: the runtime's copy turns out to be bad. The registry is asked
// instead, and has no more than what is left of the budget.
func TestHealWithinBudget(t *testing.T) {
	store := &runtimeDir{t.TempDir(), true}
	n := startNode(t, func(s *setup) {
		s.upstream.FirstByte, s.upstream.Stall = 30*time.Second, 30*time.Second
		s.proxy.FirstByteBudget, s.proxy.Runtime = 300*time.Millisecond, store
	})
	img := n.image(3_000_000)
	d := img.Layers[0].Digest
	n.get(manifestPath(img.Digest.String()))
	store.put(t, d, bytesOf(t, img, d))
	n.registry.Inject(registrytest.Match{Reference: d.String(), Method: "GET"}, registrytest.Hold())
	begin := time.Now()
	checkOCIError(t, n.get(blobPath(d)), 503, "UNAVAILABLE")
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("answered after %s", took)
	}
}

// TestNoRoomInTheMiddle: the disk fills up while a body is under way; the rest
// comes past it.
func TestNoRoomInTheMiddle(t *testing.T) {
	part := make(chan struct{})
	swarm := &swarmFunc{}
	n := startNode(t, func(s *setup) { s.proxy.Swarm = swarm })
	img := n.image(3_000_000)
	d := img.Layers[0].Digest
	want := bytesOf(t, img, d)
	swarm.fetch = func(_ context.Context, f *cache.Fill) error {
		w := f.Writer(cache.Origin{Kind: cache.FromPeer, Name: "other"})
		if err := w.SetSize(int64(len(want))); err != nil {
			return err
		}
		if _, err := w.WriteAt(want[:1_000_000], 0); err != nil {
			return err
		}
		<-part
		return cache.ErrNoRoom
	}
	resp := n.open(t.Context(), "GET", blobPath(d))
	defer resp.Body.Close()
	head := make([]byte, 1_000_000)
	if _, err := io.ReadFull(resp.Body, head); err != nil {
		t.Fatal(err)
	}
	close(part)
	rest, err := io.ReadAll(resp.Body)
	if err != nil || !bytes.Equal(append(head, rest...), want) || resp.Header.Get(headerSource) != "peer" {
		t.Errorf("%d bytes, %v, from %s", len(rest), err, resp.Header.Get(headerSource))
	}
}

// TestUpstreamDown: what is here is served, what is not is an error that sends
// the runtime on, quickly.
func TestUpstreamDown(t *testing.T) {
	n := startNode(t, nil)
	img := n.image(2_000_000)
	c := n.containerd()
	if _, err := c.Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
		t.Fatal(err)
	}
	await(t, "commit", func() bool { return n.cache.Has(img.Layers[0].Digest) })
	n.registry.Down()
	if err := c.Wipe(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
		t.Errorf("warm pull with the registry down: %v", err)
	}
	checkOCIError(t, n.get(manifestPath("v2")), 503, "UNAVAILABLE")
}

// TestTokenExpiry: the registry's tokens run out in the middle of a blob.
func TestTokenExpiry(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.policy.TokenRealms = []string{"localhost"}
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Bearer, Anonymous: []string{"library/*"}}
		s.upstream.StreamsPerBlob = 1
	})
	img := n.image(3_000_000)
	d := img.Layers[0].Digest
	n.registry.Inject(registrytest.Match{Reference: d.String()}, registrytest.Times(1), registrytest.Do(n.registry.ExpireTokens), registrytest.CutAfter(1_000_000))
	if a := n.get(blobPath(d)); a.err != nil || !bytes.Equal(a.body, bytesOf(t, img, d)) {
		t.Errorf("status %d, %v", a.status, a.err)
	}
}

// TestPrivateRepository: a client that names its registry by ns gets the
// registry's challenge; one that cannot answer it goes to the registry on 404, and so
// does every client of a registry that is only ever asked anonymously.
func TestPrivateRepository(t *testing.T) {
	for _, auth := range []string{"", "relay", "anonymous"} {
		n := startNode(t, func(s *setup) {
			s.policy.Auth = auth
			s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"u": "p"}}
		})
		img := n.image()
		d := img.Layers[0].Digest
		for range 2 { // asked, and from memory
			for _, a := range []answer{n.get(manifestPath("v1")), n.get(manifestPath(img.Digest.String())), n.get(blobPath(d)), n.get("/v2/" + repo + "/tags/list?ns=" + host)} {
				want := 401
				if auth == "anonymous" {
					want = 404
				}
				if challenge := a.header.Get("WWW-Authenticate"); a.status != want || (challenge == `Basic realm="registrytest"`) != (want == 401) {
					t.Errorf("auth = %q: status %d, challenge %q", auth, a.status, challenge)
				}
			}
			checkOCIError(t, n.get(pathManifest("v1")), 404, "MANIFEST_UNKNOWN")
			checkOCIError(t, n.get(pathManifest(img.Digest.String())), 404, "MANIFEST_UNKNOWN")
			checkOCIError(t, n.get(pathBlob(d)), 404, "BLOB_UNKNOWN")
		}
	}
}

// TestWebPageIsNoVerdict: a web page that a registry answers with, while it is maintained
// or to who has not logged in, says of nothing that anybody may read it. What a caller
// with a credential has brought here is no one else's then, nor afterwards.
func TestWebPageIsNoVerdict(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "x"}}
	})
	img := n.image(1000)
	n.whole(img, "Authorization", "Basic YW5uOng=")
	maintained := n.registry.Inject(registrytest.Match{}, registrytest.EvenUnauthorized(), registrytest.HTML())
	for _, fault := range []*registrytest.Fault{maintained, nil} {
		for _, d := range []digest.Digest{img.Layers[0].Digest, img.Digest} {
			for _, path := range []string{blobPath(d), manifestPath(d.String())} {
				if a := n.get(path); a.status == 200 {
					t.Errorf("%s without a credential, maintained: %v: %d", path, fault != nil, a.status)
				}
			}
		}
		if fault != nil {
			fault.Remove()
		}
	}
}

// TestSizeLieOutlivesNoFill: what a fill left that believed a wrong size does not keep
// the blob from coming once the registry tells the right one.
func TestSizeLieOutlivesNoFill(t *testing.T) {
	for _, size := range []int64{3_000_000, 3 << 20} { // in the middle of a piece, and where one ends
		t.Run(fmt.Sprint(size), func(t *testing.T) { sizeLieOutlivesNoFill(t, size) })
	}
}

func sizeLieOutlivesNoFill(t *testing.T, size int64) {
	n := startNode(t, nil)
	img := n.image(size)
	d := img.Layers[0].Digest
	lie := n.registry.Inject(registrytest.Match{Kind: registrytest.Blob, Reference: d.String()}, registrytest.RangeTotal(4_000_000))
	if a := n.get(blobPath(d)); a.err == nil && a.status == 200 {
		t.Fatalf("%d bytes of a blob whose size is a lie", len(a.body))
	}
	await(t, "the fill to end", func() bool { return len(n.cache.Fills()) == 0 })
	lie.Remove()
	for range 2 { // the first may find out
		n.proxy.failed.forget(keyOf(n.target(), d))
		n.get(blobPath(d))
		await(t, "the fill to end", func() bool { return len(n.cache.Fills()) == 0 })
	}
	if !n.cache.Has(d) {
		t.Error("the blob never comes into the cache")
	}
}

// TestNoRoomIsSaid: pulls go on as ever where the cache keeps nothing, so that the log has
// to say so; once an hour, and not of what is no matter of the disk.
func TestNoRoomIsSaid(t *testing.T) {
	var said logtest.Buffer
	n := startNode(t, func(s *setup) {
		s.cache.MaxBytes = cache.Bytes(1)
		s.proxy.Logger = slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelWarn}))
	})
	img := n.image(3_000_000, 1000)
	d := img.Layers[0].Digest
	n.proxy.sayUnkept(n.target(), d, fmt.Errorf("%w: %w", cache.ErrNoRoom, cache.ErrForeign))
	for i, want := range []int{1, 1, 2} {
		if i == 2 {
			n.proxy.saidUnkept.Store(new(time.Now().Add(-unkeptEvery)))
		}
		for _, path := range []string{manifestPath(img.Digest.String()), blobPath(d), blobPath(img.Layers[1].Digest)} {
			if a := n.get(path); a.status != 200 || a.err != nil {
				t.Fatalf("status %d, %v", a.status, a.err)
			}
		}
		if got := strings.Count(said.String(), "passed through and not kept"); got != want {
			t.Errorf("pull %d: said %d times, want %d:\n%s", i, got, want, said.String())
		}
	}
	if n := testutil.ToFloat64(n.proxy.metrics.unkept); n != 9 {
		t.Errorf("%v are counted, want three for each of three pulls", n)
	}
	if !strings.Contains(said.String(), "max_bytes=1 ") {
		t.Errorf("nothing about the limit:\n%s", said.String())
	}
}

// TestRefusedAddress: an answer that this node's configuration prevents says what was
// refused, and which key allows it. "The registry's answer cannot be used" sent people to
// the registry, which nobody had asked.
func TestRefusedAddress(t *testing.T) {
	n := startNode(t, nil)
	d := n.image().Digest
	n.registry.Inject(registrytest.Match{Repository: repo}, registrytest.RedirectTo("http://169.254.169.254/x"))
	for path, want := range map[string][]string{
		"/v2/" + repo + "/manifests/v1?ns=10.1.2.3:5000": {"10.1.2.3", "[[registry]]"},
		"/v2/10.1.2.3_5000/" + repo + "/manifests/v1":    {"10.1.2.3", "[[registry]]"},
		manifestPath("v1"):       {"169.254.169.254", "token_realms", host},
		manifestPath(d.String()): {"169.254.169.254", "token_realms", host},
	} {
		a := n.get(path)
		var body struct{ Errors []struct{ Message string } }
		if err := json.Unmarshal(a.body, &body); err != nil || len(body.Errors) != 1 {
			t.Fatalf("%s: %v: %s", path, err, a.body)
		}
		for _, w := range want {
			if a.status != 502 || !strings.Contains(body.Errors[0].Message, w) {
				t.Errorf("%s: status %d, %s; it lacks %s", path, a.status, body.Errors[0].Message, w)
			}
		}
	}
}

// TestRefusedAddressIsNotShown: a pod does not learn where this node's DNS finds a name.
func TestRefusedAddressIsNotShown(t *testing.T) {
	err := &upstream.Error{Op: "resolve", Registry: "git.corp", Err: &net.OpError{
		Op: "dial", Net: "tcp", Addr: &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3), Port: 443},
		Err: fmt.Errorf("%w: git.corp is at a private address", upstream.ErrRefused),
	}}
	if e := toAPIError(err, KindManifest, true); e.status != 502 || e.message != "refused: git.corp is at a private address" {
		t.Errorf("%d %s", e.status, e.message)
	}
}

// TestThrottled: while a registry wants to be left alone for longer than a runtime waits,
// requests that need it are answered at once, so that the runtime goes on, and the registry
// hears of none of them. If it wants a moment, they get what they asked for after that.
func TestThrottled(t *testing.T) {
	for name, tc := range map[string]struct {
		after  time.Duration
		status int
		atMost time.Duration
	}{
		"for long":     {20 * time.Second, 503, time.Second},
		"for a moment": {time.Second, 200, 4 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startNode(t, func(s *setup) { s.proxy.FirstByteBudget = 4 * time.Second })
			img := n.image()
			n.registry.Inject(registrytest.Match{}, registrytest.Times(1), registrytest.TooManyRequests(tc.after))
			paths := []string{
				manifestPath("v1"), pathManifest("v1"), manifestPath(img.Digest.String()), blobPath(img.Layers[0].Digest), pathBlob(img.Layers[0].Digest),
			}
			for _, path := range paths {
				begun := time.Now()
				a := n.get(path)
				if took := time.Since(begun); a.status != tc.status || took > tc.atMost {
					t.Errorf("%s: status %d after %s", path, a.status, took)
				}
				if got := n.registry.Count(registrytest.Match{}); tc.status != 200 && got != 1 {
					t.Errorf("%s: %d requests upstream, want the first alone", path, got)
				}
			}
		})
	}
}

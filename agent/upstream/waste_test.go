package upstream

import (
	"strconv"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/test/registrytest"
)

// TestNothingSentInVain pins what a blob costs its registry: one copy, because
// no connection is closed under way (I7). The client's own limit is the hard
// case: what waits for it fills socket buffers, and all of that would be lost.
func TestNothingSentInVain(t *testing.T) {
	image := []int64{40e6, 12e6, 1.5e6}
	// jumps is a reader that is never where a stream is.
	jumps := func(m *memorySink) {
		m.at = func(written int64) { m.wanted = written / 6e6 * 37e6 % m.size }
	}
	cases := []struct {
		name            string
		sizes           []int64
		perConn, uplink int64
		client          int64
		known           bool // sizes, before the first request
		reader          func(*memorySink)
		fault           []registrytest.Effect
		atMost          float64 // copies; 0 = 1, to the byte
	}{
		{name: "image", sizes: image},
		{name: "image, each connection limited", sizes: image, perConn: 12e6},
		{name: "image, uplink limited", sizes: image, uplink: 50e6},
		{name: "image, client limited", sizes: image, client: 40e6},
		{name: "image of known sizes, client limited", sizes: image, client: 40e6, known: true},
		{name: "image, cut", sizes: image, client: 40e6, fault: []registrytest.Effect{registrytest.CutAfter(7e6), registrytest.Times(3)}},
		{name: "large", sizes: []int64{500e6}},
		{name: "large, client limited", sizes: []int64{500e6}, client: 300e6},
		{name: "seeks, each connection limited", sizes: []int64{100e6}, perConn: 15e6, reader: jumps, atMost: 1.02},
		{name: "seeks, client limited", sizes: []int64{100e6}, client: 50e6, reader: jumps, atMost: 1.02},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			reg := registrytest.Start(t, registrytest.Options{})
			reg.SetRate(tc.perConn, tc.uplink)
			reg.Inject(blobGet, tc.fault...)
			c := newClient(t, func(cfg *Config) { cfg.MaxBytesPerSecond = tc.client; cfg.Stall = 5 * time.Second }, registryOf(reg))
			total := int64(0)
			done := make(chan error, len(tc.sizes))
			for i, size := range tc.sizes {
				total += size
				d := digest.FromString(tc.name + strconv.Itoa(i)) // nobody looks
				reg.PutBlobAs(repo, d, registrytest.Random(uint64(i), size))
				sink := newSink(256 << 10)
				sink.discard = true
				if tc.known {
					sink.SetSize(size)
				}
				if tc.reader != nil {
					tc.reader(sink)
				}
				go func(d digest.Digest) { done <- c.Fetch(t.Context(), target, d, sink) }(d)
			}
			for range tc.sizes {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			reg.Close() // its counters lag behind what a client has read
			sent := reg.Bytes(blobGet)
			t.Logf("%.4f copies (%d bytes in vain), %d requests over %d connections", float64(sent)/float64(total), sent-total, reg.Count(blobGet), connections(reg))
			if float64(sent) > max(tc.atMost, 1)*float64(total) {
				t.Errorf("the registry sent %d bytes for %d, want at most %.2f times as many", sent, total, max(tc.atMost, 1))
			}
		})
	}
}

package upstream

import (
	"io"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/test/registrytest"
)

// BenchmarkFetch fetches 500 MB from a registry with limits. of-straight is the
// time as a share of what a plain GET takes in the same run, ms-to-4 the time
// from the first request to the first on a fourth connection; 0 = there was none.
func BenchmarkFetch(b *testing.B) {
	const size = 500e6
	for _, bc := range []struct {
		name            string
		perConn, uplink int64
		latency         time.Duration
	}{
		{name: "each connection limited", perConn: 20e6},
		{name: "each connection limited, 50 ms away", perConn: 20e6, latency: 50 * time.Millisecond},
		{name: "uplink limited", uplink: 100e6},
		{name: "uplink limited, 50 ms away", uplink: 100e6, latency: 50 * time.Millisecond},
		{name: "no limit"},
	} {
		b.Run(bc.name, func(b *testing.B) {
			reg := registrytest.Start(b, registrytest.Options{})
			reg.SetRate(bc.perConn, bc.uplink)
			reg.SetLatency(bc.latency)
			d := digest.FromString(strconv.Itoa(size))
			reg.PutBlobAs(repo, d, registrytest.Random(1, size))
			c := newClient(b, nil, registryOf(reg))
			straight := plainGet(b, newClient(b, nil, registryOf(reg)), d)
			b.SetBytes(size)
			b.ResetTimer()
			for b.Loop() {
				reg.ResetCounts()
				sink := newSink(2 << 20)
				sink.discard = true
				if err := c.Fetch(b.Context(), target, d, sink); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed())/float64(b.N)/float64(straight), "of-straight")
			b.ReportMetric(float64(toFour(reg).Milliseconds()), "ms-to-4")
			b.ReportMetric(float64(reg.Count(blobGet)), "requests")
			b.ReportMetric(float64(reg.Bytes(blobGet))/size, "copies")
		})
	}
}

// plainGet is how long one request for all of d takes.
func plainGet(b *testing.B, c *Client, d digest.Digest) time.Duration {
	b.Helper()
	began := time.Now()
	body, size, err := c.Blob(b.Context(), target, d, 0, -1)
	if err != nil {
		b.Fatal(err)
	}
	defer body.Close()
	if n, err := io.Copy(io.Discard, body); err != nil || n != size {
		b.Fatalf("read %d of %d bytes, %v", n, size, err)
	}
	return time.Since(began)
}

// toFour is 0 if there never were four connections.
func toFour(reg *registrytest.Server) time.Duration {
	var seen []string
	list := reg.Requests(blobGet)
	for _, r := range list {
		if !slices.Contains(seen, r.RemoteAddr) {
			seen = append(seen, r.RemoteAddr)
		}
		if len(seen) == 4 {
			return r.Start.Sub(list[0].Start)
		}
	}
	return 0
}

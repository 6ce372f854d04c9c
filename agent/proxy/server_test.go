package proxy

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
)

// TestDrainingIsNotWedged pins that a port that was closed to drain is not probed:
// the watchdog took the refused connection for a wedged proxy and cut the bodies
// off that were to finish within the grace period.
func TestDrainingIsNotWedged(t *testing.T) {
	c, err := cache.New(cache.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	up, err := upstream.New(upstream.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	arrived, release := make(chan struct{}), make(chan struct{})
	p, err := New(Options{
		Cache: c, Upstream: up,
		Watch: Watch{Interval: 5 * time.Millisecond},
		Before: func(r *http.Request) {
			if r.Header.Get("Test") == "slow" {
				close(arrived)
				<-release
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	watching, stopWatching := context.WithCancel(t.Context())
	serving, stopServing := context.WithCancel(t.Context())
	watched, served, answered := make(chan error, 1), make(chan error, 1), make(chan error, 1)
	go func() { watched <- p.Run(watching) }()
	go func() { served <- p.Serve(serving, l) }()
	go func() { answered <- slowPing(t.Context(), l.Addr().String()) }()

	<-arrived
	stopServing()
	select {
	case err := <-watched:
		t.Errorf("the watchdog gave up while the proxy drained: %v", err)
		watched <- err
	case <-time.After(200 * time.Millisecond): // 40 probes
	}
	close(release)
	if err := <-answered; err != nil {
		t.Errorf("request under way when draining began: %v", err)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	stopWatching()
	if err := <-watched; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func slowPing(ctx context.Context, addr string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/v2/", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Test", "slow")
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// gate is a client's network that lets so many bytes in and then no more until it is opened.
type gate struct {
	left atomic.Int64
	shut chan struct{} // closed when all of them are in
	open chan struct{} // closed by the test
	once sync.Once
}

func newGate(bytes int64) *gate {
	g := &gate{shut: make(chan struct{}), open: make(chan struct{})}
	g.left.Store(bytes)
	return g
}

func (g *gate) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	return gatedConn{conn, g}, err
}

type gatedConn struct {
	net.Conn
	gate *gate
}

func (c gatedConn) Read(p []byte) (int, error) {
	if c.gate.left.Load() <= 0 {
		c.gate.once.Do(func() { close(c.gate.shut) })
		<-c.gate.open
	}
	n, err := c.Conn.Read(p)
	c.gate.left.Add(-int64(n))
	return n, err
}

// TestStopInAPull: containerd's pull that is under way at SIGTERM ends well, whether it can
// be finished within the grace period or not. In chunks it does not survive a refused
// connection.
func TestStopInAPull(t *testing.T) {
	for _, chunk := range []int{0, 1 << 20} {
		for name, tc := range map[string]struct {
			grace  time.Duration
			direct bool
		}{"in time": {time.Minute, false}, "too long": {200 * time.Millisecond, true}} {
			t.Run(fmt.Sprint(name, chunk), func(t *testing.T) {
				t.Parallel()
				n := startNode(t, func(s *setup) { s.proxy.Grace = tc.grace })
				img := n.image(24_000_000)
				layer := registrytest.Match{Reference: img.Layers[0].Digest.String()}
				n.get(blobPath(img.Layers[0].Digest))
				direct := registrytest.Start(t, registrytest.Options{})
				direct.Put(repo, img, "v1")
				g := newGate(6_000_000)
				c := n.containerdTo(direct.URL())
				c.ChunkSize, c.Dial = chunk, g.dial
				pulled := make(chan error, 1)
				go func() {
					_, err := c.Pull(t.Context(), host+"/"+repo+":v1", nil)
					pulled <- err
				}()
				<-g.shut
				s := n.proxy.server.Load()
				n.stop()
				await(t, "the stop", s.draining.Load)
				if chunk > 0 && tc.direct {
					await(t, "the end of the grace period", n.proxy.halted.Load)
				} else if tc.direct {
					n.served <- <-n.served
				}
				close(g.open)
				if err := <-pulled; err != nil {
					t.Error(err)
				}
				if got := direct.Bytes(layer) > 0; got != tc.direct {
					t.Errorf("anything from the registry: %v", got)
				}
				if err := <-n.served; err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestStopInAPathPull: CRI-O's next blob after SIGTERM must come from here too.
func TestStopInAPathPull(t *testing.T) {
	n := startNode(t, func(s *setup) { s.proxy.Grace = time.Minute })
	layer := n.image(3_000_000, 1_000_000).Layers[0].Digest.String()
	f := n.registry.Inject(registrytest.Match{Reference: layer, Method: "GET"}, registrytest.Times(1), registrytest.StallAfter(1_500_000))
	pulled := make(chan error, 1)
	go func() {
		_, err := n.crio().Pull(t.Context(), repo, "v1")
		pulled <- err
	}()
	<-f.Held()
	s := n.proxy.server.Load()
	n.stop()
	await(t, "the stop", s.draining.Load)
	f.Release()
	if err := <-pulled; err != nil {
		t.Error(err)
	}
	if err := <-n.served; err != nil {
		t.Error(err)
	}
}

// TestStopIsBounded: no client holds up a stop for longer than the grace period and what a
// cut takes, whether it reads nothing, says nothing or asks again and again.
func TestStopIsBounded(t *testing.T) {
	const grace = 300 * time.Millisecond
	for name, path := range map[string]func(digest.Digest) string{"ns": blobPath, "path": pathBlob} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startNode(t, func(s *setup) { s.proxy.Grace = grace })
			d := n.image(30_000_000).Layers[0].Digest
			n.get(blobPath(d))
			rawGet(t, n, path(d))
			open := n.open(t.Context(), "GET", path(d), "Range", "bytes=0-")
			defer open.Body.Close()
			silent, err := net.Dial("tcp", n.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer silent.Close()
			asking := make(chan struct{})
			go func() {
				defer close(asking)
				for n.attempt(pathManifest("v1")).err == nil {
				}
			}()
			begin := time.Now()
			n.stop()
			if err := <-n.served; err != nil {
				t.Error(err)
			}
			if took := time.Since(begin); took > grace+settleTime+2*cutTime+5*time.Second {
				t.Errorf("took %s", took)
			}
			<-asking
		})
	}
}

// TestEndedQuestionIsNoAnswer: a client whose question to the registry was ended, and
// who is still there, is sent to the registry. Nothing at all would become net/http's
// empty 200, which a runtime takes for a manifest.
func TestEndedQuestionIsNoAnswer(t *testing.T) {
	for _, what := range []string{"tag", "blob", "tags"} {
		t.Run(what, func(t *testing.T) {
			n := startNode(t, nil)
			path := map[string]string{
				"tag": manifestPath("v1"), "blob": blobPath(n.image(10).Layers[0].Digest), "tags": "/v2/" + repo + "/tags/list?ns=" + host,
			}[what]
			held := n.registry.Inject(registrytest.Match{}, registrytest.Hold())
			defer held.Release()
			got := make(chan answer, 1)
			go func() { got <- n.get(path) }()
			if err := n.registry.Wait(t.Context(), registrytest.Match{}, 1); err != nil {
				t.Fatal(err)
			}
			n.proxy.background.stop() // as the end of Run does
			if a := <-got; a.status != 503 {
				t.Errorf("status %d with %d bytes", a.status, len(a.body))
			}
		})
	}
}

package proxy

import (
	"context"
	"net"
	"net/http"
	"testing"
	"time"

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

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
	"go.uber.org/goleak"
)

var update = flag.Bool("update", false, "rewrite golden files")

// asMain makes the test binary behave as larder itself, for tests that need a
// process of its own to kill.
const asMain = "LARDER_TEST_AS_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asMain) != "" {
		os.Unsetenv(asMain)
		main()
		return
	}
	for _, entry := range os.Environ() { // of the machine that tests
		if name, _, _ := strings.Cut(entry, "="); strings.HasPrefix(name, "LARDER_") && name != "LARDER_TOOLS_BIN" {
			os.Unsetenv(name)
		}
	}
	// memberlist's last probes outlive its Shutdown by some milliseconds.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/hashicorp/memberlist.(*Memberlist).triggerFunc"))
}

// larder runs one command line.
func larder(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

// golden compares got with a file under testdata; -update rewrites it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (rewrite it with -update):\n--- got\n%s--- want\n%s", path, got, want)
	}
}

// loopbackPort is what differs from run to run.
var loopbackPort = regexp.MustCompile(`127\.0\.0\.1:\d+`)

// stable replaces what differs from run to run.
func stable(s string, pairs ...string) string {
	s = strings.NewReplacer(pairs...).Replace(s)
	return loopbackPort.ReplaceAllString(s, "127.0.0.1:PORT")
}

const (
	testHost  = "registry.example.test"
	testImage = testHost + "/team/app:v1"
)

// node is a real agent in this process and the registry behind it.
type node struct {
	*agent.Agent
	admin    string
	registry *registrytest.Server
	image    *registrytest.Image
}

// startNode runs an agent until the test ends.
func startNode(t *testing.T, change func(*agent.Config)) *node {
	t.Helper()
	n := &node{registry: registrytest.Start(t, registrytest.Options{})}
	n.image = registrytest.OCIImage(registrytest.ImageSpec{Seed: 3, Layers: []int64{200 << 10, 1 << 10}})
	n.registry.Put("team/app", n.image, "v1")
	c := agent.Default()
	c.Proxy.Listen, c.Admin.Listen = "127.0.0.1:0", "127.0.0.1:0"
	c.Cache.Dir = filepath.Join(t.TempDir(), "cache")
	c.Peer.Enabled, c.Peer.Name = false, "node-1"
	c.Registries = []upstream.Registry{{Host: testHost, Upstreams: []string{n.registry.URL()}}}
	c.Cache.MinFree = cache.Bytes(0)
	if change != nil {
		change(&c)
	}
	var err error
	if n.Agent, err = agent.New(c, agent.WithBuild(agent.Build{Version: "v1.2.3"})); err != nil {
		t.Fatal(err)
	}
	n.admin = "http://" + n.AdminAddr()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	eventually(t, "ready", func() error {
		if s := n.Status(); !s.Ready {
			return errors.New("not ready")
		}
		return nil
	})
	return n
}

// eventually waits for a condition that something else brings about.
func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not %s: %v", what, err)
		}
	}
}

// nonces are the tags of canary images.
var nonces = regexp.MustCompile(`canary:[a-z0-9]+`)

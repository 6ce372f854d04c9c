package runtimestore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestIndexFollowsContainerd(t *testing.T) {
	f := newFixture(t)
	before := f.commit(t, pattern(10))
	run(t, f.store)
	f.expect(t, change{before, 10})
	after := f.commit(t, pattern(20))
	f.expect(t, change{after, 20})
	if got := walk(f.store); !maps.Equal(got, map[digest.Digest]int64{before: 10, after: 20}) {
		t.Errorf("walked over %v", got)
	}
	if err := f.containerd.Delete(t.Context(), before); err != nil {
		t.Fatal(err)
	}
	f.expect(t, change{before, -1})
	if got := walk(f.store); !maps.Equal(got, map[digest.Digest]int64{after: 20}) {
		t.Errorf("walked over %v", got)
	}
	if f.store.Knows(before) || !f.store.Knows(after) {
		t.Error("known is what was deleted, or not what is there")
	}
}

func walk(s *Store) map[digest.Digest]int64 {
	out := map[digest.Digest]int64{}
	s.Walk(func(d digest.Digest, size int64) bool {
		out[d] = size
		return true
	})
	return out
}

func TestWalkStops(t *testing.T) {
	f := newFixture(t)
	f.commit(t, pattern(10))
	f.commit(t, pattern(20))
	f.store.rescan()
	calls := 0
	f.store.Walk(func(digest.Digest, int64) bool { calls++; return false })
	if calls != 1 {
		t.Errorf("called %d times", calls)
	}
}

// TestDirectoryComesAndGoes is a node where containerd is installed after the
// agent, and later set up anew.
func TestDirectoryComesAndGoes(t *testing.T) {
	f := newFixture(t)
	must(t, os.RemoveAll(f.dir))
	run(t, f.store)
	f.setUpContainerd(t)
	d := f.commit(t, pattern(10))
	f.expect(t, change{d, 10})
	must(t, os.RemoveAll(f.dir))
	f.expect(t, change{d, -1})
	f.setUpContainerd(t)
	d = f.commit(t, pattern(20))
	f.expect(t, change{d, 20})
}

func TestProblem(t *testing.T) {
	f := newFixture(t)
	f.store.rescan()
	if err := f.store.Problem(); err != nil {
		t.Errorf("an empty store: %v", err)
	}
	must(t, os.RemoveAll(f.dir))
	f.store.rescan()
	f.store.rescan()
	if err := f.store.Problem(); err == nil || !strings.Contains(err.Error(), "runtime.content_dir") {
		t.Errorf("no store: %v", err)
	}
	must(t, os.MkdirAll(filepath.Join(f.dir, "io.containerd.content.v1.content"), 0o755))
	f.store.rescan()
	if err := f.store.Problem(); err == nil || !strings.Contains(err.Error(), "set runtime.content_dir to "+f.dir+"/io.containerd.content.v1.content") {
		t.Errorf("containerd's root: %v", err)
	}
	f.commit(t, pattern(10))
	f.store.rescan()
	if err := f.store.Problem(); err != nil {
		t.Errorf("a store: %v", err)
	}
	if n := strings.Count(f.logged.String(), "is not used"); n != 2 {
		t.Errorf("logged %d times:\n%s", n, f.logged)
	}
	denied := explain(f.dir, &fs.PathError{Op: "open", Path: f.dir, Err: fs.ErrPermission})
	if !errors.Is(denied, fs.ErrPermission) || !strings.Contains(denied.Error(), "CAP_DAC_READ_SEARCH") {
		t.Errorf("denied: %v", denied)
	}
}

func TestTooManyHintsBecomeARescan(t *testing.T) {
	h := newHints()
	for i := range maxHints + 10 {
		h.add(digest.FromString(fmt.Sprint(i)))
	}
	digests, all := h.take()
	if !all || len(digests) > maxHints {
		t.Errorf("%d hints, all %v", len(digests), all)
	}
	if digests, all = h.take(); all || len(digests) != 0 {
		t.Errorf("left %d hints, all %v", len(digests), all)
	}
}

// daemon is what the store needs of a containerd: health, events, and what a library has.
type daemon struct {
	eventsapi.UnimplementedEventsServer
	server     *grpc.Server
	subscribed chan []string
	send       chan *types.Envelope
}

func startDaemon(t *testing.T, socket string, content *library) *daemon {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{server: grpc.NewServer(), subscribed: make(chan []string, 1), send: make(chan *types.Envelope)}
	eventsapi.RegisterEventsServer(d.server, d)
	contentapi.RegisterContentServer(d.server, libraryContent{library: content})
	namespacesapi.RegisterNamespacesServer(d.server, libraryNamespaces{})
	grpc_health_v1.RegisterHealthServer(d.server, health.NewServer())
	done := make(chan error)
	go func() { done <- d.server.Serve(l) }()
	t.Cleanup(func() {
		d.server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *daemon) Subscribe(req *eventsapi.SubscribeRequest, stream eventsapi.Events_SubscribeServer) error {
	d.subscribed <- req.Filters
	for {
		select {
		case e := <-d.send:
			if err := stream.Send(e); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (d *daemon) publish(t *testing.T, namespace, topic string, event any) {
	t.Helper()
	payload, err := typeurl.MarshalAny(event)
	if err != nil {
		t.Fatal(err)
	}
	d.send <- &types.Envelope{Namespace: namespace, Topic: topic, Event: typeurl.MarshalProto(payload)}
}

// TestSocket hides the blobs from inotify: without a file's change, an event
// alone makes the store look again. It goes on after a restart of containerd.
func TestSocket(t *testing.T) {
	f := newFixture(t)
	socket := filepath.Join(t.TempDir(), "containerd.sock")
	f.store = f.newStore(t, socket)
	d := f.commit(t, pattern(10))
	run(t, f.store) // containerd is not up yet
	f.expect(t, change{d, 10})

	first := startDaemon(t, socket, newLibrary())
	if got := <-first.subscribed; len(got) != len(topics) {
		t.Errorf("subscribed to %q", got)
	}
	f.forget(d)
	first.publish(t, "k8s.io", "/content/create", &apievents.ContentCreate{Digest: d.String(), Size: 10})
	f.expect(t, change{d, 10})
	f.forget(d)
	first.publish(t, "moby", "/images/create", &apievents.ImageCreate{Name: "x"})
	f.expect(t, change{d, 10})

	first.server.Stop()
	second := startDaemon(t, socket, newLibrary())
	<-second.subscribed
	must(t, os.Remove(f.path(d)))
	f.expect(t, change{d, -1})
	second.publish(t, "k8s.io", "/content/delete", &apievents.ContentDelete{Digest: d.String()})
	d = f.commit(t, pattern(30))
	f.expect(t, change{d, 30})
}

// TestSocketThatDoesNotAnswer: one that stays away is told once, and again when the reason is
// another one or when it was there in between; containerd's restarts are not.
func TestSocketThatDoesNotAnswer(t *testing.T) {
	f := newFixture(t)
	socket := filepath.Join(t.TempDir(), "containerd.sock")
	synctest.Test(t, func(t *testing.T) {
		s := f.newStore(t, socket)
		ctx, cancel := context.WithCancel(t.Context())
		var listener sync.WaitGroup
		listener.Go(func() { s.retry(ctx, "listen to containerd", s.listen) })
		told := func(after time.Duration, want int, why string) {
			t.Helper()
			time.Sleep(after)
			synctest.Wait()
			got := f.logged.String()
			if n := strings.Count(got, "level=WARN"); n != want || !strings.Contains(got, why) {
				t.Errorf("%d warnings, want %d with %q:\n%s", n, want, why, got)
			}
		}
		told(5*time.Second, 0, "")
		told(time.Hour, 1, "no such file or directory")
		must(t, os.WriteFile(socket, nil, 0o600))
		told(time.Hour, 2, "connection refused")
		if !strings.Contains(f.logged.String(), "runtime.containerd_socket") || !strings.Contains(f.logged.String(), "runtime.content_dir") {
			t.Error("it does not say which key to set, or what goes on")
		}
		cancel()
		listener.Wait()
	})
}

// forget makes the index miss a blob that is there, as if every other hint had
// been lost.
func (f *fixture) forget(d digest.Digest) {
	f.store.index.mu.Lock()
	defer f.store.index.mu.Unlock()
	delete(f.store.index.sizes, d)
}

func TestHintsOfEvents(t *testing.T) {
	d := digest.FromString("x")
	for name, tc := range map[string]struct {
		event any
		all   bool
	}{
		"create": {&apievents.ContentCreate{Digest: d.String()}, false},
		"delete": {&apievents.ContentDelete{Digest: d.String()}, false},
		"image":  {&apievents.ImageDelete{Name: "x"}, true},
		"alien":  {nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			envelope := &events.Envelope{Event: &anypb.Any{TypeUrl: "nobody/knows"}}
			if tc.event != nil {
				var err error
				envelope.Event, err = typeurl.MarshalAny(tc.event)
				must(t, err)
			}
			f.store.hint(envelope)
			digests, all := f.store.hints.take()
			if _, ok := digests[d]; all != tc.all || ok == tc.all {
				t.Errorf("look at %v, all %v", digests, all)
			}
		})
	}
}

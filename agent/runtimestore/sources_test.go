package runtimestore

import (
	"context"
	"maps"
	"path/filepath"
	"sync"
	"testing"

	apievents "github.com/containerd/containerd/api/events"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/opencontainers/go-digest"
)

// library is the content of a containerd by its API, the same in two namespaces.
type library struct {
	mu     sync.Mutex // guards labels
	labels map[digest.Digest]map[string]string
}

func newLibrary() *library { return &library{labels: map[digest.Digest]map[string]string{}} }

// from labels content as containerd's pull from a registry does.
func (l *library) from(d digest.Digest, registry string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.labels[d] == nil {
		l.labels[d] = map[string]string{"containerd.io/gc.root": "now"}
	}
	l.labels[d][sourceLabel+registry] = "team/app,library/app"
}

type libraryContent struct {
	contentapi.UnimplementedContentServer
	*library
}

func (l libraryContent) List(_ *contentapi.ListContentRequest, stream contentapi.Content_ListServer) error {
	var out contentapi.ListContentResponse
	l.mu.Lock()
	for d, labels := range l.labels {
		out.Info = append(out.Info, &contentapi.Info{Digest: d.String(), Labels: maps.Clone(labels)})
	}
	l.mu.Unlock()
	return stream.Send(&out)
}

type libraryNamespaces struct {
	namespacesapi.UnimplementedNamespacesServer
}

func (libraryNamespaces) List(context.Context, *namespacesapi.ListNamespacesRequest) (*namespacesapi.ListNamespacesResponse, error) {
	return &namespacesapi.ListNamespacesResponse{Namespaces: []*namespacesapi.Namespace{{Name: "k8s.io"}, {Name: "moby"}}}, nil
}

type sourced struct {
	digest   digest.Digest
	registry string
}

// runSourced runs a store beside a containerd with that content, and returns what it is
// told of registries.
func runSourced(t *testing.T, content *library, hurry bool) (*daemon, <-chan sourced) {
	t.Helper()
	f := newFixture(t)
	socket := filepath.Join(t.TempDir(), "containerd.sock")
	told := make(chan sourced)
	f.store = f.newStore(t, socket)
	if hurry {
		f.store.every = rescanInterval / 1000
	}
	f.store.opts.Events.Sourced = func(d digest.Digest, registry string) {
		select {
		case told <- sourced{d, registry}:
		case <-t.Context().Done():
		}
	}
	d := startDaemon(t, socket, content)
	run(t, f.store)
	<-d.subscribed
	return d, told
}

// TestSources: what the labels say is told when the socket answers, and all of it again
// after an event: who was told may have lost it.
func TestSources(t *testing.T) {
	a, content := digest.FromString("a"), newLibrary()
	content.from(a, "docker.io")
	content.from(digest.FromString("b"), "") // a label that names none
	d, told := runSourced(t, content, false)
	for _, when := range []string{"at the start", "after an event"} {
		for range 2 { // namespaces
			if got := <-told; got != (sourced{a, "docker.io"}) {
				t.Errorf("%s: told %v", when, got)
			}
		}
		d.publish(t, "k8s.io", "/images/create", &apievents.ImageCreate{Name: "x"})
	}
}

// TestSourcesAddedLater: containerd makes no event of a label that it adds to content that
// it has, as when another image comes to share it.
func TestSourcesAddedLater(t *testing.T) {
	a, content := digest.FromString("a"), newLibrary()
	content.from(a, "docker.io")
	_, told := runSourced(t, content, true)
	<-told
	content.from(a, "quay.io")
	for got := range told {
		if got.registry == "quay.io" {
			break
		}
	}
}

package runtimestore

import (
	"context"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
)

const (
	// sourceLabel is what containerd's pull adds to the content of an image, with
	// the registry's host and, as value, its repositories (core/remotes/docker/handler.go).
	sourceLabel = "containerd.io/distribution.source."
	// sourcesPause gathers the events of one pull, and spares containerd.
	sourcesPause = time.Second
	// sourcesTimeout is far more than thousands of blobs take.
	sourcesTimeout = 20 * time.Second
)

// sources tells of the registries that blobs came from, each once.
type sources struct {
	sourced func(digest.Digest, string)
	told    map[digest.Digest]map[string]bool
}

func newSources(sourced func(digest.Digest, string)) *sources {
	return &sources{sourced: sourced, told: map[digest.Digest]map[string]bool{}}
}

// read goes through the content of all of containerd's namespaces.
func (s *sources) read(ctx context.Context, c *client.Client) error {
	if s.sourced == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, sourcesTimeout)
	defer cancel()
	names, err := c.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	seen := make(map[digest.Digest]map[string]bool, len(s.told))
	for _, name := range names {
		err := c.ContentStore().Walk(namespaces.WithNamespace(ctx, name), func(info content.Info) error {
			s.take(seen, info)
			return nil
		})
		if err != nil {
			return err
		}
	}
	s.told = seen // what is gone need not be remembered
	return nil
}

func (s *sources) take(seen map[digest.Digest]map[string]bool, info content.Info) {
	for label := range info.Labels {
		host, ok := strings.CutPrefix(label, sourceLabel)
		if !ok || host == "" {
			continue
		}
		if seen[info.Digest] == nil {
			seen[info.Digest] = map[string]bool{}
		}
		if !s.told[info.Digest][host] && !seen[info.Digest][host] {
			s.sourced(info.Digest, host)
		}
		seen[info.Digest][host] = true
	}
}

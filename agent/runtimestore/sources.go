package runtimestore

import (
	"context"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
)

// sourceLabel is what containerd's pull adds to the content of an image, with the
// registry's host and, as value, its repositories (core/remotes/docker/handler.go).
const sourceLabel = "containerd.io/distribution.source."

const (
	// sourcesPause gathers the events of one pull, and spares containerd.
	sourcesPause = time.Second
	// sourcesTimeout is far more than thousands of blobs take.
	sourcesTimeout = 20 * time.Second
)

// tellSources goes through the content of all of containerd's namespaces.
func (s *Store) tellSources(ctx context.Context, c *client.Client) error {
	if s.opts.Events.Sourced == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, sourcesTimeout)
	defer cancel()
	names, err := c.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		err := c.ContentStore().Walk(namespaces.WithNamespace(ctx, name), func(info content.Info) error {
			for label := range info.Labels {
				if host, ok := strings.CutPrefix(label, sourceLabel); ok && host != "" {
					s.opts.Events.Sourced(info.Digest, host)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

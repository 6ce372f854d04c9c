package proxy

import (
	"context"
	"errors"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

var errNoSwarm = errors.New("nobody there")

// swarmFunc is a swarm of one function; without it nobody has anything.
type swarmFunc struct {
	fetch func(context.Context, *cache.Fill) error
}

func (s *swarmFunc) Fetch(ctx context.Context, _ upstream.Target, kind Kind, f *cache.Fill) error {
	if s.fetch == nil || kind != KindBlob {
		return errNoSwarm
	}
	return s.fetch(ctx, f)
}

func (s *swarmFunc) Resolve(context.Context, upstream.Target, string, []string) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, errNoSwarm
}

func (n *node) target() upstream.Target { return upstream.Target{Registry: host, Repository: repo} }

package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
)

// ErrImported is leave for one question: an operator gave its subject to everybody in
// this cluster, and the registry cannot be asked. It opens nothing else of the
// repository (A11).
var ErrImported = errors.New("imported by an operator")

// Import is an image that an operator brought.
type Import struct {
	Registry   string // as images name it: "docker.io"
	Repository string
	Tag        string // "": by digest alone
	Root       ocispec.Descriptor
	// Manifests are Root and those below it, Blobs what they list. All of it is in the
	// cache, and was in what the operator brought.
	Manifests []ocispec.Descriptor
	Blobs     []ocispec.Descriptor
}

// Denied returns nil unless the operator's own allow and deny keep a repository from
// being served here.
func (p *Proxy) Denied(registry, repository string) error {
	if p.upstream.Policy(registry).Allows(repository) {
		return nil
	}
	return errDeniedHere
}

// importBatch is how many digests' facts are written before they are waited for: the
// metadata takes no more than some thousand at once.
const importBatch = 500

// Import has an image served from now on: under its own name, to everybody while
// its registry cannot be asked (A11). The tag comes last, once all else is
// durable. After an error the tag is what it was.
func (p *Proxy) Import(ctx context.Context, i Import) error {
	if err := p.Denied(i.Registry, i.Repository); err != nil {
		return err
	}
	if err := p.writeFacts(ctx, i); err != nil {
		return fmt.Errorf("import: %w", err)
	}
	return nil
}

func (p *Proxy) writeFacts(ctx context.Context, i Import) error {
	meta, r := p.cache.Meta(), cache.Repository{Registry: i.Registry, Name: i.Repository}
	facts := meta.Begin()
	for _, m := range i.Manifests {
		meta.SetManifest(m.Digest, cache.Manifest{MediaType: m.MediaType})
	}
	for n, d := range slices.Concat(i.Manifests, i.Blobs) {
		p.undelivered.forget(blobKey{r, d.Digest})
		if n < len(i.Manifests) {
			meta.AddManifests(r, d)
		} else {
			meta.AddMembers(r, d)
		}
		meta.SetSaid(r, d.Digest)
		meta.AddGiver(d.Digest, i.Registry)
		meta.SetImported(r, d.Digest.String())
		if n%importBatch == importBatch-1 {
			if err := facts.Sync(ctx); err != nil {
				return err
			}
		}
	}
	if err := facts.Sync(ctx); err != nil || i.Tag == "" {
		return err
	}
	p.setTag(r, i)
	return facts.Sync(ctx)
}

// setTag makes the image the last that is known of its tag; the registry, if it can be
// asked, says better at the next pull. An index is no answer for clients that take no
// lists.
func (p *Proxy) setTag(r cache.Repository, i Import) {
	key := tagKey{Repository: r, tag: i.Tag, lists: true}
	keys := []tagKey{key}
	if len(i.Manifests) == 1 {
		keys = append(keys, key.other())
	}
	for _, key := range keys {
		p.keepTag(key, cache.Tag{Descriptor: i.Root})
		p.fresh.forget(key)
	}
}

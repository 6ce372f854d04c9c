package agent

import (
	"context"
	"fmt"
	"io"
	"net/http"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/archive"
)

// Export pulls images and writes them to w as an OCI image layout in a tar, each under
// its full name and byte for byte, with shared parts once. An index is written as it is,
// with the content of p.Platform alone. The same images make the same bytes. After an
// error what w got is useless. It does not close w, and keeps only manifests in memory.
// p.Manifest and p.Choose are not called.
func (p Puller) Export(ctx context.Context, images []Image, w io.Writer) error {
	var plans []*exported
	for _, image := range images {
		plan, err := p.plan(ctx, image)
		if statusOf(err) == http.StatusServiceUnavailable {
			return fmt.Errorf("export %s: the registry does not answer, `larder status` has its last error: %w", image, err)
		}
		if err != nil {
			return fmt.Errorf("export %s: %w", image, err)
		}
		plans = append(plans, plan)
	}
	var roots []archive.Root
	for _, plan := range plans {
		plan.root.Name, plan.root.Descriptor = plan.image.String(), plan.parts[0].Descriptor
		roots = append(roots, plan.root)
	}
	out, err := archive.NewWriter(w, roots)
	if err != nil {
		return err
	}
	for _, plan := range plans {
		if err := plan.write(ctx, out); err != nil {
			return fmt.Errorf("export %s: %w", plan.image, err)
		}
	}
	return out.Close()
}

// exported is an image on its way into an archive.
type exported struct {
	*pull
	parts []blob // the root first
	root  archive.Root
}

// plan reads the manifests of an image.
func (p Puller) plan(ctx context.Context, image Image) (*exported, error) {
	e := &exported{pull: p.begin(image)}
	root, err := e.resolve(ctx)
	if err != nil {
		return nil, err
	}
	read := func(d ocispec.Descriptor) ([]byte, error) {
		body, header, err := e.readManifest(ctx, d.Digest)
		if err != nil {
			return nil, err
		}
		desc := ocispec.Descriptor{MediaType: header.Get("Content-Type"), Digest: d.Digest, Size: int64(len(body))}
		e.parts = append(e.parts, blob{desc, "manifest"})
		return body, nil
	}
	return e, walkImage(ocispec.Descriptor{Digest: root}, selection{p.Platform, p.Instances}, read, e.add)
}

// add plans what a manifest lists.
func (e *exported) add(_ ocispec.Descriptor, m manifest, blobs []blob) error {
	e.parts = append(e.parts, blobs...)
	e.simple(m)
	return nil
}

// simple makes the first image that can be run the one for programs that know no
// indexes.
func (e *exported) simple(m manifest) {
	runs := m.Config.MediaType == ocispec.MediaTypeImageConfig || m.Config.MediaType == dockerConfig
	if e.root.Config != "" || !runs {
		return
	}
	var layers []digest.Digest
	for _, l := range m.Layers {
		if len(l.URLs) > 0 {
			return // it would not be in the archive
		}
		layers = append(layers, l.Digest)
	}
	e.root.Config, e.root.Layers = m.Config.Digest, layers
}

// dockerConfig is OCI's application/vnd.oci.image.config.v1+json as Docker names it.
const dockerConfig = "application/vnd.docker.container.image.v1+json"

// write pulls the parts, one after the other as a tar wants them.
func (e *exported) write(ctx context.Context, out *archive.Writer) error {
	for _, part := range e.parts {
		if out.Has(part.Digest) {
			continue
		}
		if err := e.writePart(ctx, part, out); err != nil {
			return err
		}
	}
	return nil
}

// writePart pulls a part into the archive. The size that its header needs is the manifest's
// word; out refuses bytes of another.
func (e *exported) writePart(ctx context.Context, part blob, out *archive.Writer) error {
	kind := "blobs"
	if part.kind == "manifest" {
		kind = "manifests"
	}
	resp, err := e.request(ctx, http.MethodGet, kind, part.Digest.String())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := out.Blob(part.Digest, part.Size, e.counted(resp.Body, part.Digest, part.Size)); err != nil {
		return err
	}
	e.record(Pulled{Kind: part.kind, Digest: part.Digest, Source: resp.Header.Get("X-Larder-Source"), Bytes: part.Size})
	return nil
}

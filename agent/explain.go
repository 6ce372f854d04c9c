package agent

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/larder-cache/larder/agent/archive"
	"github.com/larder-cache/larder/agent/cache"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var errUnknownImage = errors.New("not known on this node")

// Explain says where each part of an image is and came from, for one platform
// ("" = this node's) or "all", of several instances what this node's runtimes pull. It asks no registry and no other node: what never passed
// this one is an error.
func (a *Agent) Explain(image Image, platform string) (Explanation, error) {
	e := explainer{agent: a, image: image, fills: map[digest.Digest]cache.Progress{}, used: map[digest.Digest]time.Time{}}
	e.out = Explanation{Image: image.String(), Platform: platform}
	for _, f := range a.cache.Fills() {
		e.fills[f.Digest] = f
	}
	a.cache.Walk(func(i cache.Info) bool {
		e.used[i.Digest] = i.Used
		return true
	})
	err := e.root()
	if err == nil {
		err = walkImage(ocispec.Descriptor{Digest: e.out.Digest}, selection{platform, a.config.Hosts.instances()}, e.read, e.visit)
	}
	if _, foreign := errors.AsType[*platformError](err); foreign {
		err = fmt.Errorf("%w; try --platform all", err)
	}
	if err != nil && !errors.Is(err, errNothing) {
		return Explanation{}, fmt.Errorf("%s: %w", image, err)
	}
	for _, p := range e.out.Parts {
		e.out.Bytes += max(0, p.Size)
		e.out.Here += p.Present
	}
	return e.out, nil
}

// explainer is one Explain under way.
type explainer struct {
	agent *Agent
	image Image
	fills map[digest.Digest]cache.Progress // arriving
	used  map[digest.Digest]time.Time      // last hits of what is on disk
	out   Explanation
}

// root finds the digest that the image stands for.
func (e *explainer) root() error {
	if d, err := digest.Parse(e.image.Reference); err == nil {
		e.out.Digest = d
		return nil
	}
	repo := cache.Repository{Registry: e.image.Registry, Name: e.image.Repository}
	if tag, ok := e.agent.proxy.KnownTag(repo, e.image.Reference); ok {
		e.out.Digest, e.out.Checked = tag.Descriptor.Digest, tag.Checked
		return nil
	}
	pinned, ok := e.agent.pins.pinned(repo, e.image.Reference) // also when its registry has it no more
	if !ok {
		if why := e.trouble(); why != "" {
			return fmt.Errorf("%w: its last pull failed: %s", errUnknownImage, why)
		}
		return fmt.Errorf("%w: nobody pulled this tag through it; try `larder warm %s`", errUnknownImage, e.image)
	}
	e.out.Digest = pinned.Digest
	return nil
}

// trouble is why the last pull of what was asked for failed, "" if it did not.
func (e *explainer) trouble() string {
	return e.agent.recent.trouble(e.image, e.image.Reference)
}

// read returns a manifest that is on this node. The root must be, or be arriving; another
// may be of a platform that nobody pulled here.
func (e *explainer) read(d ocispec.Descriptor) ([]byte, error) {
	body, err := e.agent.readManifest(d.Digest)
	if err == nil {
		return body, nil
	}
	if len(e.out.Parts) > 0 {
		e.add("manifest", d)
		return nil, errNotBelow
	}
	if fill, arriving := e.fills[d.Digest]; arriving {
		d.Size = fill.Size
		e.add("manifest", d)
		return nil, errNotBelow
	}
	if why := e.trouble(); why != "" {
		return nil, fmt.Errorf("the manifest %s is %w: its last pull failed: %s", d.Digest, errUnknownImage, why)
	}
	return nil, fmt.Errorf("the manifest %s is %w; try `larder warm %s`", d.Digest, errUnknownImage, e.image)
}

// visit adds a manifest or index and its blobs.
func (e *explainer) visit(d ocispec.Descriptor, m manifest, blobs []blob) error {
	kind := "manifest"
	if m.isIndex() {
		kind = "index"
	}
	e.add(kind, d)
	for _, b := range blobs {
		e.add(b.kind, b.Descriptor)
	}
	return nil
}

// readManifest returns the bytes of a manifest that is on this node.
func (a *Agent) readManifest(d digest.Digest) ([]byte, error) {
	r, ok := a.cache.Lookup(d)
	if !ok {
		return a.readRuntime(d, archive.MaxManifest)
	}
	defer r.Close()
	if r.Size() > archive.MaxManifest {
		return nil, errors.New("too large for a manifest")
	}
	return io.ReadAll(r)
}

// add says where a part is: of several places the nearest.
func (e *explainer) add(kind string, d ocispec.Descriptor) {
	p := Part{Kind: kind, Digest: d.Digest, Size: d.Size, Where: "upstream", Origins: []Origin{}, Used: e.used[d.Digest]}
	if d.Platform != nil {
		p.Platform = platforms.Format(*d.Platform)
	}
	fill, arriving := e.fills[d.Digest]
	switch {
	case e.agent.cache.Has(d.Digest):
		p.Where, p.Present = "disk", d.Size
	case e.agent.inRuntime(d.Digest):
		p.Where, p.Present = "runtime", d.Size
	case arriving:
		p.Where, p.Present = "arriving", fill.Present
		p.Origins = originsOf(cache.Fetched{Origins: fill.Origins, When: fill.Started})
	default:
		if p.Holders = e.agent.swarm.holders(d.Digest); len(p.Holders) > 0 {
			p.Where = "peer"
		}
	}
	if f, ok := e.agent.cache.Meta().Fetched(d.Digest); ok && len(p.Origins) == 0 {
		p.Origins = originsOf(f)
	}
	e.out.Parts = append(e.out.Parts, p)
}

// originsOf lists origins, the one with most bytes first.
func originsOf(f cache.Fetched) []Origin {
	out := make([]Origin, 0, len(f.Origins))
	for from, n := range f.Origins {
		out = append(out, Origin{Kind: string(from.Kind), Name: from.Name, Bytes: n, When: f.When})
	}
	slices.SortFunc(out, func(a, b Origin) int {
		return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), strings.Compare(a.Name, b.Name))
	})
	return out
}

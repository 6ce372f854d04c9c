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
// ("" = this node's) or "all". It asks no registry: what never passed this
// node is an error.
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
	if err := e.root(); err != nil {
		return Explanation{}, err
	}
	if err := e.manifest(ocispec.Descriptor{Digest: e.out.Digest, Size: -1}); err != nil {
		return Explanation{}, err
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
			return fmt.Errorf("%s: %w: its last pull failed: %s", e.image, errUnknownImage, why)
		}
		return fmt.Errorf("%s: %w: nobody pulled this tag through it; try `larder warm %s`", e.image, errUnknownImage, e.image)
	}
	e.out.Digest = pinned.Digest
	return nil
}

// trouble is why the last pull of what was asked for failed, "" if it did not.
func (e *explainer) trouble() string {
	return e.agent.recent.trouble(e.image, e.image.Reference)
}

// manifest adds a manifest or index and what is below it, each once: indexes of
// indexes could name one another more often than could ever be told.
func (e *explainer) manifest(d ocispec.Descriptor) error {
	if e.has(d.Digest) {
		return nil
	}
	body, err := e.agent.readManifest(d.Digest)
	if err != nil {
		if why := e.trouble(); len(e.out.Parts) == 0 && why != "" {
			return fmt.Errorf("%s: the manifest %s is %w: its last pull failed: %s", e.image, d.Digest, errUnknownImage, why)
		}
		if len(e.out.Parts) == 0 {
			return fmt.Errorf("%s: the manifest %s is %w; try `larder warm %s`", e.image, d.Digest, errUnknownImage, e.image)
		}
		e.add("manifest", d) // of a platform nobody pulled here
		return nil
	}
	m, err := parseManifest(body)
	if err != nil {
		return fmt.Errorf("%s: manifest %s: %w", e.image, d.Digest, err)
	}
	d.Size = int64(len(body))
	if !m.isIndex() {
		e.add("manifest", d)
		for _, b := range m.blobs() {
			e.add(b.kind, b.Descriptor)
		}
		return nil
	}
	e.add("index", d)
	chosen, err := m.choose(e.out.Platform)
	if _, foreign := errors.AsType[*platformError](err); foreign {
		return fmt.Errorf("%s: %w; try --platform all", e.image, err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", e.image, err)
	}
	for _, child := range chosen {
		if err := e.manifest(child); err != nil {
			return err
		}
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

func (e *explainer) has(d digest.Digest) bool {
	return slices.ContainsFunc(e.out.Parts, func(p Part) bool { return p.Digest == d })
}

func (e *explainer) add(kind string, d ocispec.Descriptor) {
	if e.has(d.Digest) {
		return // shared by two platforms
	}
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

package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/peer"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// These say what to do.
var (
	errArriving  = errors.New("is being fetched: try again when that has ended; `larder status` shows it")
	errImporting = errors.New("an import, or another forget, is under way: try again when it has ended")
)

func (a *Agent) serveForget(w http.ResponseWriter, r *http.Request) {
	var req ForgetRequest
	images, ok := readImages(w, r, &req, &req.Images)
	if !ok {
		return
	}
	report, err := a.Forget(r.Context(), images, req.DryRun)
	switch {
	case errors.Is(err, errPinned), errors.Is(err, errPinnedByConfig), errors.Is(err, errArriving), errors.Is(err, errImporting):
		http.Error(w, err.Error(), http.StatusConflict)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	default:
		writeJSON(w, http.StatusOK, report)
	}
}

// Forget removes images from this node's cache, all of them or none: what the manifests here
// say they are, without what another image here needs. A tag is what it stood for when this
// node heard of it last; a digest may be that of any part, and takes the tags of its repository
// with it. Nobody else is asked or told. For an hour no other node's copy of what is removed
// is kept here. An error from the disk leaves a part, which the next Forget finds.
func (a *Agent) Forget(ctx context.Context, images []Image, dry bool) (ForgetReport, error) {
	if err := a.pins.spares(images); err != nil {
		return ForgetReport{}, err
	}
	if !dry {
		select {
		case a.importing <- struct{}{}: // what an import finds here must not go before its image counts
			defer func() { <-a.importing }()
		default:
			return ForgetReport{}, errImporting
		}
	}
	_ = a.pins.sync(ctx) // else the tags of the last seconds keep nothing
	f := a.newForgetter(images)
	for i := range images {
		if err := f.walk(i); err != nil {
			return ForgetReport{}, fmt.Errorf("forget %s: %w", images[i], err)
		}
	}
	f.spare()
	for _, fill := range a.cache.Fills() {
		if f.goes(fill.Digest) {
			return ForgetReport{}, fmt.Errorf("a part of %s %w", images[f.of[fill.Digest]], errArriving)
		}
	}
	report := ForgetReport{DryRun: dry, Images: f.report()}
	if dry {
		return report, nil
	}
	if err := f.remove(ctx); err != nil {
		return ForgetReport{}, fmt.Errorf("forget: a part is left, or may come back; run it again: %w", err)
	}
	for _, one := range report.Images {
		a.log.Info("image forgotten", "image", one.Image, "digest", one.Digest, "blobs", one.Blobs, "bytes", one.Bytes)
	}
	return report, nil
}

// forgetter is one Forget under way.
type forgetter struct {
	agent  *Agent
	images []Image
	tags   map[digest.Digest][]Image // known here, by what they stand for
	signed map[digest.Digest][]Image // tags of signatures, by what is signed

	roots []digest.Digest                   // of images; "" where unknown
	parts []digest.Digest                   // of all images, each after a manifest that lists it
	of    map[digest.Digest]int             // the first image that each part is of
	below map[digest.Digest][]digest.Digest // what a part lists, and its signatures
	going map[Image]digest.Digest           // tags to forget; those of signatures with what is signed
	kept  map[digest.Digest]bool            // parts that others need
	by    []map[string]bool                 // who needs parts of an image: a name, or the digest of a manifest
}

func (a *Agent) newForgetter(images []Image) *forgetter {
	f := &forgetter{
		agent: a, images: images, tags: map[digest.Digest][]Image{}, signed: map[digest.Digest][]Image{},
		roots: make([]digest.Digest, len(images)), of: map[digest.Digest]int{}, below: map[digest.Digest][]digest.Digest{},
		going: map[Image]digest.Digest{}, kept: map[digest.Digest]bool{}, by: make([]map[string]bool, len(images)),
	}
	for r, tags := range a.proxy.Tags() {
		for _, tag := range tags {
			t := Image{Registry: r.Registry, Repository: r.Name, Reference: tag}
			for _, d := range a.proxy.TagDigests(r, tag) {
				f.tags[d] = append(f.tags[d], t)
			}
			if subject, ok := subjectOf(tag); ok {
				f.signed[subject] = append(f.signed[subject], t)
			}
		}
	}
	return f
}

// subjectOf is what a tag of signatures is about: cosign's sha256-<hex>.sig, .att and .sbom,
// and the distribution spec's "Referrers Tag Schema", sha256-<hex>.
func subjectOf(tag string) (digest.Digest, bool) {
	name, _, _ := strings.Cut(tag, ".")
	algorithm, hex, ok := strings.Cut(name, "-")
	d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hex)
	return d, ok && d.Validate() == nil
}

// walk finds the parts of the i-th image and of its signatures.
func (f *forgetter) walk(i int) error {
	image := f.images[i]
	f.by[i] = map[string]bool{}
	roots := f.agent.proxy.TagDigests(image.place(), image.Reference)
	if d, err := digest.Parse(image.Reference); err == nil {
		roots = []digest.Digest{d}
		for _, t := range f.tags[d] {
			if t.in(image.place()) {
				f.going[t] = ""
			}
		}
	} else {
		f.going[image] = ""
	}
	var subjects []digest.Digest // parts of an image before, in another repository, too
	for n, root := range roots {
		if n == 0 {
			f.roots[i] = root
		}
		parts, err := f.walkFrom(i, root)
		if err != nil {
			return err
		}
		subjects = append(subjects, parts...)
	}
	for _, subject := range subjects {
		for _, t := range f.signed[subject] {
			if !t.in(image.place()) {
				continue
			}
			if _, named := f.going[t]; !named {
				f.going[t] = subject
			}
			for _, root := range f.agent.proxy.TagDigests(t.place(), t.Reference) {
				f.below[subject] = append(f.below[subject], root)
				if _, err := f.walkFrom(i, root); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// walkFrom adds a manifest and all that it lists, as far as that is known here, and returns
// them; a root may be a blob.
func (f *forgetter) walkFrom(i int, root digest.Digest) (parts []digest.Digest, err error) {
	add := func(d digest.Digest) {
		parts = append(parts, d)
		if _, known := f.of[d]; !known {
			f.of[d] = i
			f.parts = append(f.parts, d)
		}
	}
	read := func(d ocispec.Descriptor) ([]byte, error) {
		add(d.Digest)
		body, m, err := f.agent.manifestHere(d.Digest)
		if err != nil {
			return nil, errNotBelow
		}
		f.below[d.Digest] = append(f.below[d.Digest], m.lists()...)
		return body, nil
	}
	visit := func(_ ocispec.Descriptor, m manifest, _ []blob) error {
		if !m.isIndex() {
			for _, d := range m.lists() {
				add(d)
			}
		}
		return nil
	}
	err = walkImage(ocispec.Descriptor{Digest: root}, selection{platform: "all"}, read, visit)
	if errors.Is(err, errNothing) {
		err = nil
	}
	return parts, err
}

// manifestHere reads what is on this node, and not on its way.
func (a *Agent) manifestHere(d digest.Digest) (body []byte, m manifest, err error) {
	if a.cache.Begun(d) {
		return nil, m, errUnknownImage
	}
	if body, err = a.readManifest(d); err == nil {
		m, err = parseManifest(body)
	}
	return body, m, err
}

// lists are the digests that a manifest lists, including layers that have URLs elsewhere:
// they may be here all the same.
func (m manifest) lists() (out []digest.Digest) {
	for _, d := range slices.Concat(m.Manifests, []ocispec.Descriptor{m.Config}, m.Layers) {
		if d.Digest != "" {
			out = append(out, d.Digest)
		}
	}
	return out
}

// spare finds which parts others need: other tags, pins, imports under way, and manifests in
// the cache that are not parts themselves. It keeps none of these in memory: a cache may
// have a hundred thousand.
func (f *forgetter) spare() {
	for d, tags := range f.tags {
		for _, t := range tags {
			if _, going := f.going[t]; !going {
				f.keep(d, t.String())
			}
		}
	}
	var pinned []digest.Digest
	f.agent.cache.Walk(func(info cache.Info) bool {
		if info.Pinned {
			pinned = append(pinned, info.Digest)
		}
		_, part := f.of[info.Digest]
		if _, known := f.agent.cache.Meta().Manifest(info.Digest); part || !known {
			return true
		}
		by := info.Digest.String()
		if tags := f.tags[info.Digest]; len(tags) > 0 {
			by = tags[0].String()
		}
		if _, m, err := f.agent.manifestHere(info.Digest); err == nil {
			for _, d := range m.lists() {
				f.keep(d, by)
			}
		}
		return true
	})
	for _, d := range pinned {
		if f.goes(d) { // no name is known of who needs it
			f.keep(d, "what is pinned or being imported")
		}
	}
	maps.DeleteFunc(f.going, func(_ Image, subject digest.Digest) bool { return f.kept[subject] })
}

// keep has d and what is below it stay, if it is a part.
func (f *forgetter) keep(d digest.Digest, by string) {
	i, part := f.of[d]
	if !part {
		return
	}
	f.by[i][by] = true
	if f.kept[d] {
		return
	}
	f.kept[d] = true
	for _, below := range f.below[d] {
		f.keep(below, by)
	}
}

// goes reports whether d is a part that nobody needs.
func (f *forgetter) goes(d digest.Digest) bool {
	_, part := f.of[d]
	return part && !f.kept[d]
}

// report counts what goes and what stays.
func (f *forgetter) report() []Forgotten {
	out, holders := make([]Forgotten, len(f.images)), make([]map[string]bool, len(f.images))
	names := f.names()
	for i, image := range f.images {
		out[i] = Forgotten{Image: image.String(), Digest: f.roots[i], Parts: []string{}}
		holders[i] = map[string]bool{}
		for by := range f.by[i] {
			if name, ok := names[digest.Digest(by)]; ok {
				by = name
			}
			out[i].KeptBy = append(out[i].KeptBy, by)
		}
		slices.Sort(out[i].KeptBy)
	}
	for _, d := range f.parts {
		i, size := f.of[d], f.agent.cache.Size(d)
		one, here := &out[i], f.agent.cache.Has(d) || f.agent.cache.Begun(d)
		switch {
		case here && f.kept[d]:
			one.Kept++
			one.KeptBytes += size
		case here:
			one.Blobs++
			one.Bytes += size
		}
		if f.kept[d] {
			continue
		}
		part := f.images[i]
		part.Reference = d.String()
		one.Parts = append(one.Parts, part.String())
		if f.agent.inRuntime(d) {
			one.Runtime++
		}
		for _, node := range f.agent.swarm.holders(d) {
			holders[i][node] = true
		}
	}
	for i := range out {
		out[i].Holders = slices.Sorted(maps.Keys(holders[i]))
	}
	return out
}

// names finds a repository for the manifests that need parts and have no tag, so that they
// can be forgotten too.
func (f *forgetter) names() map[digest.Digest]string {
	names := map[digest.Digest]string{}
	f.agent.cache.Meta().WalkMembers(func(r cache.Repository, d digest.Digest) bool {
		if slices.ContainsFunc(f.by, func(by map[string]bool) bool { return by[d.String()] }) {
			names[d] = Image{Registry: r.Registry, Repository: r.Name, Reference: d.String()}.String()
		}
		return true
	})
	return names
}

// remove deletes what goes. Whatever stops it midway, what is left can be found from what
// the image's name stands for: a manifest goes after what it lists, and tags go last.
func (f *forgetter) remove(ctx context.Context) error {
	meta := f.agent.cache.Meta()
	facts := meta.Begin()
	gone := slices.DeleteFunc(slices.Clone(f.parts), func(d digest.Digest) bool { return f.kept[d] })
	for _, d := range gone {
		meta.SetForgotten(d)
	}
	for t := range f.going {
		meta.SetForgotten(peer.Copy{Want: peer.Want{Registry: t.Registry, Repository: t.Repository}, Tag: t.Reference}.Entry())
	}
	for _, d := range slices.Backward(gone) {
		if err := f.agent.cache.Remove(d); err != nil {
			return err
		}
	}
	for t := range f.going {
		f.agent.proxy.ForgetTag(t.place(), t.Reference)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pinSync)
	defer cancel()
	return facts.Sync(ctx)
}

package agent

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/opencontainers/go-digest"
)

const (
	maxRecent      = 20  // what fits on a screen
	maxRecentParts = 100 // few images have more; with maxRecent, 2 MB at the very most
	// pullGap is the longest pause within one pull: longer than a runtime
	// unpacks between two layers.
	pullGap = 30 * time.Second
	// maxErrorText and maxUserAgent, in bytes, keep what clients and registries write
	// within the bound above, and on a line.
	maxErrorText = 500
	maxUserAgent = 80
)

// recentPulls remembers the last images that were pulled. A runtime asks for
// manifests and blobs and never says which belong together, so requests of one
// client for one repository without a long pause count as one image.
type recentPulls struct {
	mu   sync.Mutex // guards what is below; not held while looking anything up
	list []*RecentPull
	// containerd is the version of the runtime that asked last, "" while none did.
	containerd string
}

// record adds one exchange of the proxy.
func (r *recentPulls) record(e proxy.Event) {
	content := e.Kind == proxy.KindManifest || e.Kind == proxy.KindBlob && e.Method == http.MethodGet
	if !content || e.Reference == "" || e.Registry == "" || e.Method == http.MethodHead && e.UserAgent == pinUserAgent {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if v, ok := strings.CutPrefix(e.UserAgent, "containerd/"); ok {
		r.containerd = v
	}
	if e.Canary() { // of the doctor, who says himself what became of it
		return
	}
	client := shorten(e.UserAgent, maxUserAgent)
	i := slices.IndexFunc(r.list, func(p *RecentPull) bool {
		return p.Repository == e.Repository && p.Registry == e.Registry && p.UserAgent == client
	})
	if i < 0 || !r.list[i].goesOn(e) {
		r.list = slices.Insert(r.list, 0, newRecentPull(e))
		r.list = r.list[:min(len(r.list), maxRecent)]
		i = 0
	}
	r.list[i].add(e)
}

// trouble is the error of the newest answer about a tag or digest in an image's
// repository, "" if it was no error or nobody asked.
func (r *recentPulls) trouble(image Image, reference string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.list { // the newest of a repository first
		if p.Registry != image.Registry || p.Repository != image.Repository {
			continue
		}
		for _, part := range p.Parts {
			if part.Reference == reference {
				return part.Error
			}
		}
	}
	return ""
}

// containerdVersion is the version that containerd gave in its last request,
// "" if it made none.
func (r *recentPulls) containerdVersion() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.containerd
}

// all copies what is remembered, the latest answer first, with the origins of
// what had to be fetched.
func (r *recentPulls) all(fetched func(digest.Digest) (cache.Fetched, bool)) []RecentPull {
	out := []RecentPull{}
	for _, p := range r.pulls() {
		r.findOrigins(p, fetched)
		out = append(out, r.copy(p))
	}
	slices.SortStableFunc(out, func(a, b RecentPull) int { return b.Ended.Compare(a.Ended) })
	return out
}

func (r *recentPulls) pulls() []*RecentPull {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list)
}

// findOrigins looks up, once for each part that came from elsewhere, who sent
// it; the cache knows when the blob is whole.
func (r *recentPulls) findOrigins(p *RecentPull, fetched func(digest.Digest) (cache.Fetched, bool)) {
	for i, d := range r.withoutOrigins(p) {
		if f, ok := fetched(d); ok {
			r.mu.Lock()
			p.Parts[i].Origins = originsOf(f)
			r.mu.Unlock()
		}
	}
}

func (r *recentPulls) withoutOrigins(p *RecentPull) map[int]digest.Digest {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[int]digest.Digest{}
	for i, part := range p.Parts {
		if part.Kind != partTag && part.Origins == nil && part.Served["peer"]+part.Served["upstream"] > 0 {
			out[i] = digest.Digest(part.Reference)
		}
	}
	return out
}

func (r *recentPulls) copy(p *RecentPull) RecentPull {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := *p
	out.Served = maps.Clone(p.Served)
	out.Parts = slices.Clone(p.Parts)
	for i := range out.Parts {
		out.Parts[i].Served = maps.Clone(out.Parts[i].Served)
	}
	return out
}

func newRecentPull(e proxy.Event) *RecentPull {
	return &RecentPull{
		Registry: e.Registry, Repository: e.Repository, Started: e.Time, Served: map[string]int64{}, Parts: []PulledPart{},
		UserAgent: shorten(e.UserAgent, maxUserAgent),
	}
}

const (
	partTag      = "tag"
	partManifest = "manifest"
	partBlob     = "blob"
)

func partKind(e proxy.Event) string {
	switch {
	case e.Kind == proxy.KindBlob:
		return partBlob
	case strings.Contains(e.Reference, ":"):
		return partManifest
	}
	return partTag
}

// goesOn says whether e belongs to the same pull: not after a long pause, nor
// when a manifest is asked for once more after blobs were.
func (p *RecentPull) goesOn(e proxy.Event) bool {
	if e.Time.Sub(p.Ended) > pullGap {
		return false
	}
	kind := partKind(e)
	if p.endedByTag(kind, e.Method) {
		return false
	}
	tagged := p.Reference != "" && !strings.Contains(p.Reference, ":")
	if kind == partTag && tagged && e.Reference != p.Reference {
		return false
	}
	again := kind == partTag || kind == partManifest && p.part(kind, e.Reference) >= 0
	return !again || p.part(partBlob, "") < 0
}

// endedByTag says whether the tag failed, and what comes now is of another pull.
// containerd, which asks for tags by HEAD, may go on here after such a failure: it gets
// the digest from the registry, then the content from whom has it. A HEAD for a manifest
// by its digest is a pull by digest even so. Others take all from one place.
func (p *RecentPull) endedByTag(kind, method string) bool {
	i := p.part(partTag, "")
	if i < 0 || p.Parts[i].Error == "" || kind == partTag {
		return false
	}
	return p.tagMethod != http.MethodHead || kind == partManifest && method == http.MethodHead
}

// part finds a part, -1 if there is none; "" is any of that kind.
func (p *RecentPull) part(kind, reference string) int {
	for i := range p.Parts { // it is asked for each request, and a part is large to copy
		if p.Parts[i].Kind == kind && (reference == "" || p.Parts[i].Reference == reference) {
			return i
		}
	}
	return -1
}

func (p *RecentPull) add(e proxy.Event) {
	kind := partKind(e)
	if kind == partTag || kind == partManifest && p.Reference == "" {
		p.Reference = e.Reference
	}
	if kind == partTag {
		p.tagMethod = e.Method
	}
	if ended := e.Time.Add(e.Duration); ended.After(p.Ended) {
		p.Ended = ended
	}
	failed := (e.Err != nil || e.Status >= http.StatusBadRequest) && !e.Challenged()
	if failed {
		p.Failed++
	}
	served := e.Status < http.StatusMultipleChoices
	if served && e.Bytes > 0 {
		p.Served[e.Source] += e.Bytes
	}
	i := p.part(kind, e.Reference)
	if i < 0 && len(p.Parts) == maxRecentParts {
		p.More++
		return
	}
	if i < 0 {
		i = len(p.Parts)
		p.Parts = append(p.Parts, PulledPart{Kind: kind, Reference: e.Reference, Served: map[string]int64{}})
	}
	part := &p.Parts[i]
	part.Seconds += e.Duration.Seconds()
	if served && (e.Bytes > 0 || kind == partTag) {
		part.Served[e.Source] += e.Bytes
	}
	part.Error = ""
	if failed {
		part.Error = shorten(failure(e), maxErrorText)
	}
}

// hungUp is what failure says of a client that went away, see RecentPull.Trouble.
const hungUp = "the runtime hung up"

// failure says what went wrong with an exchange.
func failure(e proxy.Event) string {
	switch {
	case errors.Is(e.Err, context.Canceled):
		return hungUp
	case e.Err != nil:
		return e.Err.Error()
	}
	return cmp.Or(http.StatusText(e.Status), "failed")
}

// shorten cuts s to at most limit bytes, between characters.
func shorten(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit-3], "") + "..."
}

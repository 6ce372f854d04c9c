package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// refresh asks what a pin's name stands for now, and makes sure that all of it is here.
// A newer version replaces the held one only once it is whole. If the registry cannot be
// asked, or the version cannot be had, the held one stays, and is still repaired.
func (s *pins) refresh(ctx context.Context, p *pin, follow func(*Puller)) error {
	d, err := s.resolve(ctx, p)
	if err == nil {
		err = s.bring(ctx, p, d, follow)
	}
	held, _ := s.heldBy(p)
	if held == "" && d == "" && !definite(err) {
		held = s.remembered(ctx, p)
	}
	if err != nil && held != "" && held != d {
		if mend := s.bring(ctx, p, held, follow); mend != nil {
			err = mend
		}
	}
	s.examine(p, err == nil)
	return cmp.Or(err, s.sign(ctx, p, err == nil))
}

// heldBy is the held version of p, "" if there is none, and whether it is public.
func (s *pins) heldBy(p *pin) (d digest.Digest, public bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.held == nil {
		return "", false
	}
	return p.held.digest, p.held.public
}

func (s *pins) puller() Puller {
	return Puller{Proxy: "http://" + s.agent.ProxyAddr(), Client: s.agent.self, Instances: s.agent.config.Hosts.instances(), UserAgent: pinUserAgent}
}

// pinUserAgent marks what is asked for a pin. Its questions about tags are no pulls.
const pinUserAgent = proxy.OwnUserAgent + "pin"

// resolve finds what p's name stands for.
func (s *pins) resolve(ctx context.Context, p *pin) (digest.Digest, error) {
	d, err := digest.Parse(p.image.Reference)
	if err == nil {
		s.inquire(ctx, p, d)
	} else if d, err = s.ask(ctx, p); err != nil {
		return "", s.explainTag(p, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.checked = time.Now()
	return d, nil
}

// ask asks for the registry's own answer, which a pinned image outlives: its error says
// what the proxy would gloss over. For a registry that must never be asked, what is known
// here is all there is.
func (s *pins) ask(ctx context.Context, p *pin) (digest.Digest, error) {
	policy := s.agent.upstream.Policy(p.image.Registry)
	puller := s.puller()
	puller.NoStale = policy.Contact()
	d, err := puller.Resolve(ctx, p.image)
	if err == nil && puller.NoStale {
		s.confirm(p, d, !policy.NodeAuth(p.image.Repository))
	}
	return d, err
}

// inquire asks whether an image that is pinned by digest is public, unless that is
// known or of no use: nothing else about it can change.
func (s *pins) inquire(ctx context.Context, p *pin, d digest.Digest) {
	if held, public := s.heldBy(p); held == d && public || s.agent.upstream.Policy(p.image.Registry).NodeAuth(p.image.Repository) {
		return
	}
	if _, err := s.ask(ctx, p); err != nil {
		s.agent.log.Debug("the registry does not confirm a pinned image", "image", p.name, "err", err)
	}
}

// confirm notes that the registry says p stands for d, and to whom: in answer to a
// question without any credential, or to one with the node's own. Nothing else makes a
// version public, and only another such answer takes that back.
func (s *pins) confirm(p *pin, d digest.Digest, public bool) {
	v, err := s.versionOf(p, d)
	if err != nil {
		return // unpinned meanwhile
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v.public = public
}

// remembered is what p's tag stood for when somebody last knew, or what was imported: a
// start while its registry cannot be asked. It is "" if nobody knows.
func (s *pins) remembered(ctx context.Context, p *pin) digest.Digest {
	d, err := s.puller().Resolve(ctx, p.image)
	if err != nil {
		s.agent.log.Debug("nothing is known of a pinned image", "image", p.name, "err", err)
		return ""
	}
	return d
}

// bring makes version d of p whole, and makes it the held one.
func (s *pins) bring(ctx context.Context, p *pin, d digest.Digest, follow func(*Puller)) error {
	v, err := s.versionOf(p, d)
	if err != nil {
		return err
	}
	fetched := !v.all || len(s.lacking(p.image, v)) > 0
	if fetched {
		if err := s.fetch(ctx, p, v, follow); err != nil {
			return s.explainVersion(p, d, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.images[p.name] != p {
		return errUnpinned
	}
	newer := p.next == v // what the last try lacked may have come with somebody's pull
	if newer {
		s.letGo(p.held)
		p.held, p.next = v, nil
		s.save(p) // the signatures may take long
	}
	if newer || fetched {
		s.agent.log.Info("image is pinned", "image", p.name, "digest", d)
	}
	return nil
}

// versionOf is the version of p that is d: the held one, or the next.
func (s *pins) versionOf(p *pin, d digest.Digest) (*version, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.images[p.name] != p {
		return nil, errUnpinned
	}
	switch {
	case p.held != nil && p.held.digest == d:
		return p.held, nil
	case p.next == nil || p.next.digest != d:
		s.letGo(p.next)
		p.next = newVersion(d)
	}
	return p.next, nil
}

// fetch pulls what is missing of a version through this node's proxy, as a runtime
// would, and makes sure that the cache has all of it.
func (s *pins) fetch(ctx context.Context, p *pin, v *version, follow func(*Puller)) error {
	puller := s.puller()
	puller.Manifest = func(d digest.Digest) error { return s.admit(p, v, []ocispec.Descriptor{{Digest: d}}) }
	puller.Choose = func(parts []ocispec.Descriptor) ([]ocispec.Descriptor, error) { return s.plan(p, v, parts) }
	if follow != nil {
		follow(&puller)
	}
	image := p.image
	image.Reference = v.digest.String()
	if _, err := puller.Pull(ctx, image); err != nil {
		return err
	}
	s.list(v)
	for _, d := range s.lacking(p.image, v) {
		if err := s.settle(ctx, p, d); err != nil {
			return err
		}
	}
	if !v.all {
		return &notKeptError{v.digest}
	}
	return nil
}

// settle waits for the commit of what was pulled. What came from the runtime's store,
// where it could vanish, is copied.
func (s *pins) settle(ctx context.Context, p *pin, d digest.Digest) error {
	if err := s.agent.cache.Settled(ctx, d); err != nil {
		return err
	}
	if s.agent.proxy.Holds(d, p.image.Registry) {
		return nil
	}
	err := s.agent.proxy.CopyRuntime(ctx, p.image.Registry, d)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, cache.ErrNoRoom) {
		return &notKeptError{d}
	}
	return err
}

// notKeptError names a blob that could be pulled but is not in the cache.
type notKeptError struct{ digest digest.Digest }

func (e *notKeptError) Error() string {
	return fmt.Sprintf("%s was pulled, and could not be kept: is the disk full, or read-only? The agent's log says more", e.digest)
}

const (
	// maxPinnedParts is several times what images have: runtimes refuse more than
	// some 127 layers.
	maxPinnedParts = 1000
	// maxPartSize keeps sums of the sizes that registries claim in range.
	maxPartSize = 1 << 44
)

// plan pins what a manifest of v lists before any of it is fetched, unless there is no
// room, and returns what is not here yet.
func (s *pins) plan(p *pin, v *version, parts []ocispec.Descriptor) (missing []ocispec.Descriptor, err error) {
	var bytes int64
	for _, d := range parts {
		if !s.agent.proxy.Holds(d.Digest, p.image.Registry) {
			missing = append(missing, d)
			bytes += partSize(d)
		}
	}
	if err := s.admit(p, v, parts); err != nil {
		return nil, err
	}
	if room, err := s.agent.cache.Room(); err != nil || bytes > room {
		s.giveUp(p, v)
		return nil, cmp.Or(err, error(&noRoomError{fmt.Sprintf("%s are missing, and the disk has room for %s beside what is pinned: free it, or lower cache.min_free", SizeText(bytes), SizeText(room))}))
	}
	return missing, nil
}

// admit holds parts of v, unless all pins together would take too much.
func (s *pins) admit(p *pin, v *version, parts []ocispec.Descriptor) error {
	stats := s.agent.cache.Stats()
	limit := pinLimit(stats)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.images[p.name] != p {
		return errUnpinned
	}
	var total int64
	for d, part := range s.parts {
		total += max(part.size, s.agent.cache.Size(d)) // a manifest may say less than there was to fetch
	}
	count := len(v.parts)
	for _, d := range parts {
		if s.parts[d.Digest] == nil {
			total += partSize(d)
		}
		if _, held := v.parts[d.Digest]; !held {
			count++
		}
	}
	switch {
	case count > maxPinnedParts:
		return &noRoomError{fmt.Sprintf("the image has more than %d parts", maxPinnedParts)}
	case limit > 0 && total > limit:
		return &noRoomError{fmt.Sprintf("with it, pins would take %s of the %s that cache.max_bytes leaves to them: raise it, or unpin others", SizeText(total), SizeText(limit))}
	}
	for _, d := range parts {
		size := partSize(d)
		if known := s.parts[d.Digest]; known != nil {
			size = cmp.Or(known.size, size)
		}
		s.hold(v, d.Digest, size)
	}
	return nil
}

func partSize(d ocispec.Descriptor) int64 { return min(max(d.Size, 0), maxPartSize) }

// giveUp lets go of a version that cannot be had now, unless it is the held one.
func (s *pins) giveUp(p *pin, v *version) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.next == v {
		s.letGo(v)
		v.all = false // or nothing would be lacking
	}
}

// noRoomError says why an image cannot be pinned.
type noRoomError struct{ text string }

func (e *noRoomError) Error() string { return e.text }

// list holds all parts of a version that its manifests on this node list.
func (s *pins) list(v *version) {
	parts, all := s.agent.listImage(v.digest)
	s.mu.Lock()
	defer s.mu.Unlock()
	v.images = nil
	for d, part := range parts {
		s.hold(v, d, part.size)
		v.parts[d] = part.manifest
		if part.image {
			v.images = append(v.images, d)
		}
	}
	v.all = all
}

// lacking are the parts of a version that this node's cache does not have, for those who
// pull the image.
func (s *pins) lacking(image Image, v *version) (out []digest.Digest) {
	s.mu.Lock()
	parts := slices.Collect(maps.Keys(v.parts))
	s.mu.Unlock()
	for _, d := range parts {
		if r, ok := s.agent.cache.Lookup(d); ok {
			whole := r.Complete()
			r.Close()
			if whole && s.agent.proxy.Holds(d, image.Registry) {
				continue
			}
		}
		out = append(out, d)
	}
	return out
}

// examine notes whether all of the held version is here. If that is what the image
// stands for now, no other is wanted: the tag may have moved and come back.
func (s *pins) examine(p *pin, current bool) {
	s.mu.Lock()
	v := p.held
	s.mu.Unlock()
	whole := v != nil && v.all && len(s.lacking(p.image, v)) == 0
	s.mu.Lock()
	defer s.mu.Unlock()
	p.whole = whole
	if current {
		s.letGo(p.next)
		p.next = nil
	}
}

// listedPart is a part of an image as its manifests tell of it.
type listedPart struct {
	size     int64
	manifest bool
	image    bool // a manifest that is no index
}

// listImage lists what an image is for this node's platform and runtimes, as far as its manifests are
// on this node; all says whether they are.
func (a *Agent) listImage(root digest.Digest) (parts map[digest.Digest]listedPart, all bool) {
	parts = map[digest.Digest]listedPart{}
	err := walkImage(ocispec.Descriptor{Digest: root}, selection{"", a.config.Hosts.instances()},
		func(d ocispec.Descriptor) ([]byte, error) { return a.readManifest(d.Digest) },
		func(d ocispec.Descriptor, m manifest, blobs []blob) error {
			parts[d.Digest] = listedPart{d.Size, true, !m.isIndex()}
			for _, b := range blobs {
				parts[b.Digest] = listedPart{size: partSize(b.Descriptor)}
			}
			return nil
		})
	return parts, err == nil
}

// explainTag turns an error about what a tag stands for into what the user should
// know and do.
func (s *pins) explainTag(p *pin, err error) error {
	d, public := s.heldBy(p)
	held := d != ""
	switch status := statusOf(err); {
	case held && status == http.StatusNotFound:
		return fmt.Errorf("the registry has it no more, so it is kept and served as it was; `larder unpin %s` lets it go: %w", p.name, err)
	case held && refused(status) && public:
		return fmt.Errorf("the registry shows it to this node no more: it was made private, or deleted with its repository. It was public, so it is kept and served to all of this node as it was; `larder unpin %s` ends that: %w", p.name, err)
	case held && refused(status):
		return fmt.Errorf("the registry shows it to this node no more: it was made private, or deleted with its repository. It was never seen to be public, so it is kept, and served to those alone whom the registry lets read it; `larder unpin %s` lets it go: %w", p.name, err)
	}
	return s.withTrouble(p, err)
}

// explainVersion does the same for an error about the bytes of a version.
func (s *pins) explainVersion(p *pin, d digest.Digest, err error) error {
	status := statusOf(err)
	final := status == http.StatusNotFound || refused(status)
	switch held, _ := s.heldBy(p); {
	case final && held == d:
		return fmt.Errorf("a part of it was lost on this node, and neither the registry nor another node gives it: %w", err)
	case held != "" && held != d:
		err = fmt.Errorf("it stands for another image now, which is not whole yet, so the former is kept: %w", err)
	}
	return s.withTrouble(p, err)
}

// withTrouble adds what keeps the registry's answer away.
func (s *pins) withTrouble(p *pin, err error) error {
	if status := statusOf(err); status == 0 || refused(status) { // which says what to do
		return err
	}
	return fmt.Errorf("%w%s", err, s.agent.trouble(p.image, err))
}

// statusOf is the status of the answer behind an error, 0 if there is none.
func statusOf(err error) int {
	if answer, ok := errors.AsType[*answerError](err); ok {
		return answer.status
	}
	return 0
}

func refused(status int) bool {
	return status == http.StatusUnauthorized || status == http.StatusForbidden
}

// definite reports whether trying again soon is pointless: somebody has to do
// something first.
func definite(err error) bool {
	if status := statusOf(err); status != 0 {
		return status == http.StatusNotFound || refused(status)
	}
	_, noRoom := errors.AsType[*noRoomError](err)
	_, notKept := errors.AsType[*notKeptError](err)
	_, platform := errors.AsType[*platformError](err)
	return noRoom || notKept || platform || errors.Is(err, errNothing)
}

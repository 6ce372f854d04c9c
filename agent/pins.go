package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/opencontainers/go-digest"
)

const (
	// pinDelay spreads the first check of pins on nodes that start together; the
	// swarm makes one copy of what they fetch in any case.
	pinDelay = 10 * time.Second
	// pinInterval is how often a tag is asked for again, and how long a registry's
	// own no is believed. All nodes together ask the registry once in tag_ttl.
	pinInterval = 10 * time.Minute
	// pinBackoff is the first pause after a failure; it doubles up to pinInterval.
	pinBackoff = 5 * time.Second
	// pinHeal gathers blobs that are lost together.
	pinHeal = time.Second
	// pinWorkers lets a small image pass a large one.
	pinWorkers = 2
	// pinShare of cache.max_bytes is the most that pins may take. If they took all of
	// it, everything else would pass through the cache, and a storm would cost one
	// copy per node.
	pinShare = 0.8
)

// pins keeps images on this node: it fetches them through the node's own proxy, and
// protects their blobs from eviction. Of each image it keeps the last version that
// was whole, until a newer one is.
type pins struct {
	agent *Agent
	delay time.Duration // see pinDelay

	mu     sync.Mutex // guards everything below, the pins' fields too; not held across I/O
	images map[string]*pin
	parts  map[digest.Digest]*pinnedPart
	woken  chan struct{} // closed, and made anew, when something is due sooner than it was
}

// pin is one image that is kept.
type pin struct {
	name    string // Image.String()
	image   Image
	config  bool      // named by cache.pins
	command bool      // asked for by somebody
	since   time.Time // when it was pinned

	held    *version  // the last that was whole; nil while there is none
	whole   bool      // all of held is here
	next    *version  // what is being fetched in its place
	checked time.Time // see Pin.Checked
	failure error     // of the last try
	tries   int       // in vain, since the last success
	due     time.Time // when it is looked after next

	stop context.CancelFunc // not nil while somebody looks after it
	idle chan struct{}      // closed when he has
	hurt bool               // a part was lost since he began
}

// version is an image that a name has stood for.
type version struct {
	digest digest.Digest
	// parts are its manifests (true; complete once the version is held), config and
	// layers (false), as far as they are known.
	parts map[digest.Digest]bool
	all   bool // all parts are known
	// images are its manifests that are no index; signatures those that were found of
	// them, by tag, parts of no version's whole.
	images            []digest.Digest
	signatures        map[string]*version
	firstAsked, asked time.Time // when the registry said which signatures there are
	// public says that the registry showed it to a request without any credential when
	// it last confirmed it. A later refusal does not change that.
	public bool
}

// pinnedPart is a blob that versions have in common.
type pinnedPart struct {
	size     int64 // bytes, as listed until it is here
	versions int   // that hold it
}

func newVersion(d digest.Digest) *version {
	return &version{digest: d, parts: map[digest.Digest]bool{}, signatures: map[string]*version{}}
}

// openPins loads what the configuration names and what was pinned before, so that
// none of it is evicted meanwhile. It starts nothing.
func (a *Agent) openPins(delay time.Duration) error {
	s := &pins{agent: a, delay: delay, images: map[string]*pin{}, parts: map[digest.Digest]*pinnedPart{}, woken: make(chan struct{})}
	stored := a.cache.Meta().PinnedImages()
	for _, name := range a.config.Cache.Pins {
		image, err := ParseImage(name)
		if err != nil {
			return fmt.Errorf("cache.pins: %w", err)
		}
		s.restore(image, true, stored[image.String()])
		delete(stored, image.String())
	}
	for name, record := range stored {
		if image, err := ParseImage(name); err == nil && record.Command {
			s.restore(image, false, record)
		} else {
			a.cache.Meta().DeletePinnedImage(name) // no longer in the configuration
		}
	}
	a.pins = s
	if problem := s.problem(a.cache.Stats()); problem != "" {
		a.log.Warn("pinned images need attention", "problem", problem)
	}
	return a.registry.Register(pinMetrics{s})
}

// restore adds one image and holds what is known of its last version.
func (s *pins) restore(image Image, config bool, record cache.PinnedImage) {
	now := time.Now()
	p := &pin{
		name: image.String(), image: image, config: config, command: record.Command, checked: record.Checked,
		since: record.Since, due: now.Add(pinInterval),
	}
	if p.since.IsZero() {
		p.since = now
	}
	if record.Digest != "" {
		p.held = newVersion(record.Digest)
		p.held.public = record.Public
		s.list(p.held)
		for tag, d := range record.Signatures {
			of := newVersion(d)
			s.list(of)
			p.held.signatures[tag] = of
		}
		p.whole = p.held.all && len(s.lacking(p.image, p.held)) == 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images[p.name] = p
	s.save(p)
}

// save remembers p over a restart. mu is held.
func (s *pins) save(p *pin) {
	record := cache.PinnedImage{Since: p.since, Checked: p.checked, Command: p.command}
	if p.held != nil {
		record.Digest, record.Public, record.Signatures = p.held.digest, p.held.public, map[string]digest.Digest{}
		for tag, of := range p.held.signatures {
			record.Signatures[tag] = of.digest
		}
	}
	s.agent.cache.Meta().SetPinnedImage(p.name, record)
}

// hold pins a part of a version. Its size is as known so far. mu is held.
func (s *pins) hold(v *version, d digest.Digest, size int64) {
	part := s.parts[d]
	if part == nil {
		part = &pinnedPart{}
		s.parts[d] = part
		s.agent.cache.Pin(d)
	}
	if _, held := v.parts[d]; !held {
		v.parts[d] = false
		part.versions++
	}
	part.size = size
}

// letGo undoes all holds of a version and its signatures; nil has none. mu is held.
func (s *pins) letGo(v *version) {
	for _, one := range v.withSignatures() {
		for d := range one.parts {
			part := s.parts[d]
			if part.versions--; part.versions == 0 {
				delete(s.parts, d)
				s.agent.cache.Unpin(d)
			}
		}
		clear(one.parts)
		clear(one.signatures)
	}
}

// errUnpinned ends work on an image that is no longer pinned.
var errUnpinned = errors.New("unpinned meanwhile")

// errTooManyPins says what to do instead.
var errTooManyPins = fmt.Errorf("no more than %d images can be pinned: unpin others first", cache.MaxPins)

// add pins an image by command; the caller sees to fetching it. It
// reports whether the pin is new. mu is held.
func (s *pins) add(image Image) (p *pin, added bool) {
	p = s.images[image.String()]
	if p == nil {
		p = &pin{name: image.String(), image: image, since: time.Now(), due: time.Now().Add(pinInterval)}
		s.images[p.name] = p
		added = true
	}
	p.command = true
	s.save(p)
	return p, added
}

// remove unpins images, all of them or none.
func (s *pins) remove(images []Image) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var problems []error
	for _, image := range images {
		switch p := s.images[image.String()]; {
		case p == nil:
			problems = append(problems, fmt.Errorf("%s %w; `larder pin` lists what is", image, errNotPinned))
		case p.config:
			problems = append(problems, fmt.Errorf("%s %w: take it out there, and start the agent again", image, errPinnedByConfig))
		}
	}
	if len(problems) > 0 {
		return errors.Join(problems...)
	}
	for _, image := range images {
		if p := s.images[image.String()]; p != nil { // named twice
			s.drop(p)
		}
	}
	return nil
}

// spares returns nil if none of the images is pinned: by its name, or by a tag that is held as
// its digest.
func (s *pins) spares(images []Image) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var problems []error
	for _, image := range images {
		for _, p := range s.images {
			same := p.held != nil && p.held.digest.String() == image.Reference && p.image.in(image.place())
			switch {
			case p.name != image.String() && !same:
			case p.config:
				problems = append(problems, fmt.Errorf("%s %w: take it out there, and start the agent again", p.name, errPinnedByConfig))
			default:
				problems = append(problems, fmt.Errorf("%s %w: `larder unpin %s` first", p.name, errPinned, p.name))
			}
		}
	}
	return errors.Join(problems...)
}

var (
	errPinned         = errors.New("is pinned")
	errNotPinned      = errors.New("is not pinned")
	errPinnedByConfig = errors.New("is pinned by cache.pins in the configuration")
)

// drop forgets a pin. mu is held.
func (s *pins) drop(p *pin) {
	delete(s.images, p.name)
	s.agent.cache.Meta().DeletePinnedImage(p.name)
	s.letGo(p.held)
	s.letGo(p.next)
	if p.stop != nil {
		p.stop()
	}
}

// wake tells workers that something is due sooner than it was. mu is held.
func (s *pins) wake() {
	close(s.woken)
	s.woken = make(chan struct{})
}

// lost says that the cache is about to delete d although it is pinned: it was bad, or
// somebody deleted it. It will be fetched again.
func (s *pins) lost(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.parts[d] == nil {
		return
	}
	soon := time.Now().Add(pinHeal)
	for _, p := range s.images {
		if _, in := p.part(d); in {
			p.hurt = true
			if _, needed := p.held.parts[d]; needed {
				p.whole = false
			}
			if p.due.After(soon) {
				p.due = soon
			}
		}
	}
	s.wake()
}

// part reports whether d is held for p, and whether as a manifest. mu is held.
func (p *pin) part(d digest.Digest) (manifest, in bool) {
	for _, one := range p.held.withSignatures() {
		if manifest, in = one.parts[d]; in {
			break
		}
	}
	return manifest, in
}

// pinned is proxy.Options.Pinned: what is held under a tag, or as part of an image.
func (s *pins) pinned(r cache.Repository, ref string) (found proxy.Pinned, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if strings.Contains(ref, ":") {
		return s.pinnedPart(r, digest.Digest(ref))
	}
	p := s.images[Image{Registry: r.Registry, Repository: r.Name, Reference: ref}.String()]
	if p == nil || p.held == nil {
		return s.pinnedSignatures(r, ref)
	}
	return proxy.Pinned{Digest: p.held.digest, Manifest: true, Public: p.held.public}, true
}

// pinnedPart is pinned for a digest, which several images may have. mu is held.
func (s *pins) pinnedPart(r cache.Repository, d digest.Digest) (found proxy.Pinned, ok bool) {
	if s.parts[d] == nil {
		return found, false
	}
	for _, p := range s.images {
		if manifest, in := p.part(d); in && p.image.in(r) {
			found.Digest, found.Manifest, found.Public, ok = d, found.Manifest || manifest, found.Public || p.held.public, true
		}
	}
	return found, ok
}

// place is the repository of the image.
func (i Image) place() cache.Repository {
	return cache.Repository{Registry: i.Registry, Name: i.Repository}
}

// in reports whether the image is of the repository.
func (i Image) in(r cache.Repository) bool {
	return i.Repository == r.Name && i.Registry == r.Registry
}

// Run looks after the pins until ctx ends. It begins once this node has had its chance
// to find others: before that, it would fetch a copy of its own.
func (s *pins) Run(ctx context.Context) error {
	if s.agent.swarm != nil {
		select {
		case <-s.agent.swarm.Joined():
		case <-ctx.Done():
			return nil
		}
	}
	s.spread()
	var workers sync.WaitGroup
	for range pinWorkers {
		workers.Go(func() { s.work(ctx) })
	}
	workers.Wait()
	return nil
}

// spread makes due what nobody has looked at since the start.
func (s *pins) spread() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.images {
		if p.tries == 0 && p.stop == nil {
			p.due = time.Now().Add(rand.N(max(s.delay, 1)))
		}
	}
}

// work looks after whatever is due, one image at a time.
func (s *pins) work(ctx context.Context) {
	for ctx.Err() == nil {
		p, due, woken := s.take()
		if p != nil {
			_ = s.lookAfter(ctx, p, nil) // the pin has it
			continue
		}
		wait := time.NewTimer(time.Until(due))
		select {
		case <-wait.C:
		case <-woken:
		case <-ctx.Done():
		}
		wait.Stop()
	}
}

// take begins and returns the pin that has been due longest, or returns when the next
// will be due.
func (s *pins) take() (p *pin, due time.Time, woken <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	due = time.Now().Add(pinInterval)
	for _, one := range s.images {
		if one.stop == nil && one.due.Before(due) {
			p, due = one, one.due
		}
	}
	if p == nil || due.After(time.Now()) {
		return nil, due, s.woken
	}
	p.begin()
	return p, due, nil
}

// begin marks p as looked after, until lookAfter ends. mu is held.
func (p *pin) begin() {
	p.idle, p.hurt = make(chan struct{}), false
	p.stop = func() {} // until lookAfter has a better one
}

// claim is take for one pin: it waits until nobody else is working on it.
func (s *pins) claim(ctx context.Context, p *pin) error {
	for {
		s.mu.Lock()
		gone, busy, idle := s.images[p.name] != p, p.stop != nil, p.idle
		if !gone && !busy {
			p.begin()
		}
		s.mu.Unlock()
		switch {
		case gone:
			return errUnpinned
		case !busy:
			return nil
		}
		select {
		case <-idle:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// lookAfter brings a pin that was begun up to date, and notes how that went. follow, if
// not nil, is given each puller before it pulls.
func (s *pins) lookAfter(ctx context.Context, p *pin, follow func(*Puller)) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	s.mu.Lock()
	p.stop = stop
	s.mu.Unlock()
	err := s.refresh(ctx, p, follow)
	s.mu.Lock()
	defer s.mu.Unlock()
	p.stop = nil
	close(p.idle)
	if s.images[p.name] != p {
		s.letGo(p.held)
		s.letGo(p.next)
		return errUnpinned
	}
	s.note(p, err, ctx.Err() != nil)
	s.wake() // it may be due before what workers wait for
	return err
}

// note keeps how a try went, and when the next is due. mu is held.
func (s *pins) note(p *pin, err error, stopped bool) {
	now := time.Now()
	if stopped { // which is nobody's failure
		p.due = now
		return
	}
	s.log(p, err)
	p.failure = err
	pause := pinInterval
	if err == nil {
		p.tries = 0
	} else if p.tries++; !definite(err) {
		pause = min(pinBackoff<<min(p.tries-1, 10), pinInterval)
	}
	if p.hurt {
		pause = pinHeal
	}
	p.due = now.Add(pause*9/10 + rand.N(pause/5))
	s.save(p)
}

// log reports only changes.
func (s *pins) log(p *pin, err error) {
	switch {
	case err != nil && (p.failure == nil || p.failure.Error() != err.Error()):
		s.agent.log.Warn("pinned image cannot be brought up to date", "image", p.name, "held", p.whole, "err", err)
	case err == nil && p.failure != nil:
		s.agent.log.Info("pinned image is up to date again", "image", p.name, "digest", p.held.digest)
	}
}

// Pins lists what is pinned, by name.
func (a *Agent) Pins() PinList {
	s := a.pins
	stats := a.cache.Stats()
	out := PinList{Pins: []Pin{}, Bytes: s.present(), Limit: pinLimit(stats), Problem: s.problem(stats)}
	arriving := map[digest.Digest]int64{}
	for _, f := range a.cache.Fills() {
		arriving[f.Digest] = f.Present
	}
	s.mu.Lock()
	for _, p := range s.images {
		out.Pins = append(out.Pins, s.describe(p, arriving))
	}
	s.mu.Unlock()
	slices.SortFunc(out.Pins, func(a, b Pin) int { return cmp.Compare(a.Image, b.Image) })
	return out
}

// describe returns the state of p. mu is held.
func (s *pins) describe(p *pin, arriving map[digest.Digest]int64) Pin {
	out := Pin{Image: p.name, State: p.state(), Source: p.source(), Since: p.since, Checked: p.checked}
	if p.failure != nil {
		out.Error, out.Retry = p.failure.Error(), p.due
	}
	v := cmp.Or(p.held, p.next)
	if v == nil {
		return out
	}
	out.Digest, out.Public = v.digest, p.held != nil && v.public
	if p.held != nil && p.next != nil {
		out.Next = p.next.digest
	}
	for _, one := range v.withSignatures() {
		for d := range one.parts {
			out.Bytes += s.parts[d].size
			if s.agent.cache.Has(d) {
				out.Present += s.parts[d].size
			} else {
				out.Present += arriving[d]
			}
		}
	}
	return out
}

func (p *pin) state() string {
	switch {
	case p.whole && p.failure == nil:
		return PinHeld
	case p.whole:
		return PinStale
	case p.failure == nil:
		return PinFetching
	}
	if _, foreign := errors.AsType[*platformError](p.failure); foreign {
		return PinForeign
	}
	return PinMissing
}

func (p *pin) source() string {
	switch {
	case p.config && p.command:
		return "both"
	case p.config:
		return "config"
	}
	return "command"
}

// pinLimit is the most that pins may take, in bytes; 0 is no limit.
func pinLimit(stats cache.Stats) int64 { return int64(float64(stats.Limit) * pinShare) }

// present is how many bytes of what is pinned are here. The cache's own number includes
// what an import keeps from eviction until its end.
func (s *pins) present() (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d := range s.parts {
		n += s.agent.cache.Size(d)
	}
	return n
}

// problem says what is wrong with the pins as a whole, "" if nothing is.
func (s *pins) problem(stats cache.Stats) string {
	limit, present := pinLimit(stats), s.present()
	switch evictable := stats.Bytes - stats.Reserved - present; {
	case limit > 0 && present > limit:
		return fmt.Sprintf("pins hold %s, more than the %s that cache.max_bytes leaves to them: unpin images or raise it; what else is pulled is hardly cached",
			SizeText(present), SizeText(limit))
	case present > 0 && evictable <= 0 && stats.Free >= 0 && stats.Free < stats.MinFree:
		return fmt.Sprintf("%s are free on the disk, less than cache.min_free, and only pins are left in the cache: unpin images or free the disk, before kubelet evicts pods",
			SizeText(stats.Free))
	}
	return ""
}

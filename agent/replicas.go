package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/peer"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// replicaInterval is how often a node checks what only it has. What it finds twice
	// in a row is copied: by then others have what a rollout brings.
	replicaInterval = 20 * time.Second
	// replicaFresh is how recently something must have been used to be new, with perhaps
	// no copy yet. Anything older had its copy: the node that has it is likely restarting,
	// and comes back with it. Else a new version of the agent, rolled out node by node,
	// would have each node copy everything that the one before it holds.
	replicaFresh = 2 * time.Minute
	// replicaGrace is how long that node may take to come back; a reboot takes
	// less.
	replicaGrace = 10 * time.Minute
	// replicaRound is how long copies are made before the node looks again: what is
	// new goes before what is left of a large loss.
	replicaRound = time.Minute
	// replicaBackoff is the first pause after nobody would keep something; it doubles up
	// to replicaPatience, which is also how long a registry's no is believed.
	replicaBackoff  = 15 * time.Second
	replicaPatience = time.Hour
	// replicaRest is the longest pause after a copy. It is as long as the copy took, so
	// that copying never takes more than half of the time.
	replicaRest = time.Minute
	// replicaWorkers is how many copies a node fetches for others at once.
	replicaWorkers = 2
)

// replicas sees to it that what this node has is not lost with it: the blobs and tags
// that fewer nodes have than cache.replicas says. It asks others to fetch them, and
// fetches what others ask it to. Nobody is in charge of a blob: all nodes that have it
// ask the same others, which have it after the first request.
type replicas struct {
	agent    *Agent
	others   int // that are to have what this node has; 0 = none need
	interval time.Duration
	fetching chan struct{} // holds a token for each copy that is fetched for another node

	mu      sync.Mutex // guards what is below; not held across calls
	lone    map[digest.Digest]*lone
	refused map[cache.Repository]refusal
	made    map[string]float64 // copies asked for, by result
}

// lone is what too few nodes have.
type lone struct {
	peer.Copy           // without a Repository while none is known
	due       time.Time // when others are asked
	tries     int       // in vain
	places    int       // repositories that others may have it from; 1 until that was looked up
	problem   error     // of the last try
}

// refusal is the registry's no to other nodes for the content of a repository.
type refusal struct {
	until time.Time // nobody is asked
	times int       // that it had something no more, or hides it: several say what 401 says
}

// mostMissing is how many things a registry may lack before their repository counts as
// hidden from other nodes. What others say they have is no answer from the registry.
const mostMissing = 3

// Results of copies, as the metric names them.
const (
	replicaMade   = "made"
	replicaFailed = "failed"
)

func newReplicas(a *Agent, interval time.Duration) *replicas {
	return &replicas{
		agent: a, others: a.config.Cache.Replicas - 1, interval: interval, fetching: make(chan struct{}, replicaWorkers),
		lone: map[digest.Digest]*lone{}, refused: map[cache.Repository]refusal{},
		made: map[string]float64{replicaMade: 0, replicaFailed: 0},
	}
}

// Run looks and asks until ctx ends.
func (r *replicas) Run(ctx context.Context) error {
	for pause(ctx, r.interval*9/10+rand.N(r.interval/5)) {
		r.look(time.Now())
		r.round(ctx, time.Now())
	}
	return nil
}

// round has copies made of what is due.
func (r *replicas) round(ctx context.Context, now time.Time) {
	begun := time.Now()
	for _, one := range r.take(now) {
		if !r.calm(ctx) || time.Since(begun) > replicaRound {
			return
		}
		if r.agent.swarm.Others(one.Copy) >= r.others || !r.mayAsk(one.Copy) {
			continue // the next look decides
		}
		start := time.Now()
		r.spread(ctx, one.Copy)
		pause(ctx, min(time.Since(start), replicaRest))
	}
}

// pause waits; it reports false once ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	wait := time.NewTimer(d)
	defer wait.Stop()
	select {
	case <-wait.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// calm waits until nothing is pulled through this node: pulls go before copies.
func (r *replicas) calm(ctx context.Context) bool {
	for len(r.agent.proxy.Pulls()) > 0 {
		if !pause(ctx, time.Second) {
			break
		}
	}
	return ctx.Err() == nil
}

// look finds out what too few nodes have now.
func (r *replicas) look(now time.Time) {
	found := r.find(now)
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.DeleteFunc(r.lone, func(d digest.Digest, _ *lone) bool { _, still := found[d]; return !still })
	maps.DeleteFunc(r.refused, func(_ cache.Repository, no refusal) bool { return now.After(no.until) })
	for d, c := range found {
		if known := r.lone[d]; known != nil {
			known.Copy = c
			continue
		}
		wait := replicaGrace
		if c.Idle < replicaFresh {
			wait = r.interval / 2 // the next look decides
		}
		r.lone[d] = &lone{Copy: c, due: now.Add(wait), places: 1}
	}
}

// find lists what too few nodes have, each under the name that the index has for it.
func (r *replicas) find(now time.Time) map[digest.Digest]peer.Copy {
	a, found := r.agent, map[digest.Digest]peer.Copy{}
	note := func(c peer.Copy) {
		// Nodes share nothing that is named by another algorithm, and do not know who has it.
		if entry := c.Entry(); entry.Algorithm() == digest.SHA256 && a.swarm.Others(c) < r.others && !a.cache.Meta().Forgotten(entry) {
			found[entry] = c
		}
	}
	if a.runtime != nil {
		a.runtime.Walk(func(d digest.Digest, size int64) bool {
			note(peer.Copy{Want: peer.Want{Digest: d, Size: size}, Idle: replicaFresh})
			return true
		})
	}
	idle := map[digest.Digest]time.Duration{}
	a.cache.Walk(func(i cache.Info) bool {
		idle[i.Digest] = max(now.Sub(i.Used), 0)
		note(peer.Copy{Want: peer.Want{Digest: i.Digest, Size: i.Size}, Idle: idle[i.Digest]})
		return true
	})
	for repository, tags := range a.proxy.Tags() {
		for _, tag := range tags {
			last, known := a.proxy.KnownTag(repository, tag)
			stands := last.Descriptor
			since, here := idle[stands.Digest]
			if !here {
				since, here = replicaFresh, a.inRuntime(stands.Digest) || a.swarm.Holds(stands.Digest)
			}
			if known && here { // else it leads nowhere
				note(peer.Copy{Want: peer.Want{Registry: repository.Registry, Repository: repository.Name}, Tag: tag, Idle: since,
					Stands: peer.Descriptor{MediaType: stands.MediaType, Digest: stands.Digest, Size: stands.Size}})
			}
		}
	}
	return found
}

// take returns what is due: first what did not fail before, of that what is new, and of
// that the smallest, for without its manifests no image starts.
func (r *replicas) take(now time.Time) []lone {
	r.mu.Lock()
	due := map[digest.Digest]lone{}
	for d, one := range r.lone {
		if !now.Before(one.due) {
			due[d] = *one
		}
	}
	r.mu.Unlock()
	if len(due) == 0 {
		return nil
	}
	r.locate(due)
	return slices.SortedFunc(maps.Values(due), func(a, b lone) int {
		return cmp.Or(cmp.Compare(a.tries, b.tries), cmp.Compare(min(a.Idle, replicaFresh), min(b.Idle, replicaFresh)),
			cmp.Compare(a.Size, b.Size), cmp.Compare(a.Entry(), b.Entry()))
	})
}

// locate gives each blob to copy a repository under which it may be asked for, each time
// another if there are several. It leaves out, until later, blobs that have none.
func (r *replicas) locate(due map[digest.Digest]lone) {
	places := map[digest.Digest][]cache.Repository{}
	r.agent.cache.Meta().WalkMembers(func(repository cache.Repository, d digest.Digest) bool {
		if c, in := due[d]; in && c.Tag == "" {
			places[d] = append(places[d], repository)
		}
		return true
	})
	for d, c := range due {
		if c.Tag != "" {
			places[d] = []cache.Repository{{Registry: c.Registry, Name: c.Repository}}
		}
		open := slices.DeleteFunc(places[d], func(place cache.Repository) bool {
			c.Registry, c.Repository = place.Registry, place.Name
			return !r.mayAsk(c.Copy)
		})
		r.note(d, len(open))
		if len(open) == 0 {
			delete(due, d)
			continue
		}
		place := open[c.tries%len(open)]
		c.Registry, c.Repository = place.Registry, place.Name
		c.Manifest = r.agent.cache.Meta().MemberManifest(place, d)
		c.Node = r.agent.upstream.Policy(c.Registry).NodeAuth(c.Repository)
		due[d] = c
	}
}

// mayAsk reports whether others could have what c names.
func (r *replicas) mayAsk(c peer.Copy) bool {
	r.mu.Lock()
	no := r.refused[cache.Repository{Registry: c.Registry, Name: c.Repository}]
	r.mu.Unlock()
	return no.times < mostMissing && r.agent.upstream.Policy(c.Registry).Allows(c.Repository) &&
		(c.Tag != "" || r.agent.proxy.Gives(c.Digest, c.Registry))
}

// note keeps in how many repositories others may have d from. More may become known: a
// manifest that lists it, the end of an import.
func (r *replicas) note(d digest.Digest, places int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if one := r.lone[d]; one != nil {
		one.places = places
	}
}

// spread asks others to keep one thing, and notes how that went.
func (r *replicas) spread(ctx context.Context, c peer.Copy) {
	_, err := r.agent.swarm.Keep(ctx, c, r.others)
	if ctx.Err() != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.lone[c.Entry()]
	if one == nil {
		return
	}
	place := cache.Repository{Registry: c.Registry, Name: c.Repository}
	if err == nil {
		r.made[replicaMade]++
		delete(r.lone, c.Entry()) // the index knows before the next look
		return
	}
	if errors.Is(err, peer.ErrBusy) {
		return // the next look tries again
	}
	one.due = time.Now().Add(min(replicaBackoff<<min(one.tries, 10), replicaPatience))
	one.tries++
	if no, answered := errors.AsType[*peer.Refusal](err); answered {
		times := r.refused[place].times + 1
		switch {
		case refused(no.Status):
			times = mostMissing
			err = fmt.Errorf("%s/%s is private, and other nodes have no credentials of their own for it: %w", c.Registry, c.Repository, err)
		case no.Status == http.StatusNotFound && one.tries >= one.places: // in each of them
			one.due = time.Now().Add(replicaPatience)
		}
		r.refused[place] = refusal{time.Now().Add(replicaPatience), times}
	}
	r.made[replicaFailed]++
	one.problem = err
}

var (
	errNoReplicas = errors.New("cache.replicas has this node keep no copies for others")
	errForgotten  = errors.New("`larder forget` removed it there within the last hour")
)

// keepTime is far longer than a copy takes on any usable link.
const keepTime = time.Hour

// keep fetches what another node asks this one to keep, if that evicts nothing that was
// used later. It goes on after ctx, the asker's patience, has ended. peer.ErrBusy says
// that it may be asked again soon.
func (r *replicas) keep(ctx context.Context, c peer.Copy) error {
	a := r.agent
	if r.others < 1 {
		return errNoReplicas
	}
	if len(a.proxy.Pulls()) > 0 {
		return peer.ErrBusy
	}
	forgotten := func() bool {
		return a.cache.Meta().Forgotten(c.Entry()) || c.Tag != "" && a.cache.Meta().Forgotten(c.Stands.Digest)
	}
	if c.Tag != "" {
		if forgotten() {
			return errForgotten
		}
		t, _ := wanted(c.Want)
		stands := ocispec.Descriptor{MediaType: c.Stands.MediaType, Digest: c.Stands.Digest, Size: c.Stands.Size}
		if err := a.proxy.KeepTag(ctx, t, c.Tag, stands); err != nil || !forgotten() {
			return err
		}
		a.proxy.ForgetTag(cache.Repository{Registry: c.Registry, Name: c.Repository}, c.Tag) // while the registry was asked
		return errForgotten
	}
	if (a.cache.Has(c.Digest) || a.inRuntime(c.Digest)) && a.proxy.Gives(c.Digest, c.Registry) {
		return nil
	}
	if forgotten() {
		return errForgotten
	}
	if !a.cache.Welcome(c.Size, time.Now().Add(-c.Idle)) {
		return fmt.Errorf("%d bytes: %w", c.Size, cache.ErrNoRoom)
	}
	select {
	case r.fetching <- struct{}{}:
	default:
		return peer.ErrBusy
	}
	kept := make(chan error, 1)
	go func() {
		defer func() { <-r.fetching }()
		kept <- r.fetch(context.WithoutCancel(ctx), c)
	}()
	select {
	case err := <-kept:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// fetch makes a copy that is as old as its original. It ends with the cache at the latest.
func (r *replicas) fetch(ctx context.Context, c peer.Copy) error {
	ctx, cancel := context.WithTimeout(ctx, keepTime)
	defer cancel()
	used := time.Now().Add(-c.Idle)
	t, kind := wanted(c.Want)
	if err := r.agent.proxy.Keep(ctx, t, kind, c.Digest, c.Size); err != nil {
		return err
	}
	r.agent.cache.Age(c.Digest, used)
	if r.agent.cache.Meta().Forgotten(c.Digest) { // while it came
		return errors.Join(errForgotten, r.agent.cache.Remove(c.Digest))
	}
	return nil
}

// status sums up for people.
func (r *replicas) status() ReplicasStatus {
	s := ReplicasStatus{Wanted: r.others + 1}
	if r.agent.swarm == nil {
		return s
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s.Lacking, s.Made = len(r.lone), int64(r.made[replicaMade])
	for _, one := range r.lone {
		if one.places == 0 {
			s.Stuck++
		}
		if one.problem != nil && (s.Problem == "" || one.problem.Error() < s.Problem) {
			s.Problem = one.problem.Error()
		}
	}
	return s
}

var (
	loneDesc     = prometheus.NewDesc("larder_replicas_lacking", "Blobs and tags on this node that fewer nodes have than cache.replicas says.", nil, nil)
	replicasDesc = prometheus.NewDesc("larder_replicas_total", "Copies that this node asked others to keep, by result.", []string{"result"}, nil)
)

// Describe and Collect tell Prometheus.
func (r *replicas) Describe(descs chan<- *prometheus.Desc) {
	descs <- loneDesc
	descs <- replicasDesc
}

func (r *replicas) Collect(metrics chan<- prometheus.Metric) {
	r.mu.Lock()
	defer r.mu.Unlock()
	metrics <- prometheus.MustNewConstMetric(loneDesc, prometheus.GaugeValue, float64(len(r.lone)))
	for result, n := range r.made {
		metrics <- prometheus.MustNewConstMetric(replicasDesc, prometheus.CounterValue, n, result)
	}
}

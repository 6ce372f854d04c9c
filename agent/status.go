package agent

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/upstream"
)

// Status describes this node at this moment. It asks the file system for its room, and
// may be called at any time from any goroutine.
func (a *Agent) Status() Status {
	checks := a.checks()
	totals := a.sample()
	stats := a.cache.Stats()
	peers := a.swarm.status()
	members := membersOf(peers)
	return Status{
		Build: a.build, Node: a.nodeName(), Started: a.started, Proxy: a.ProxyAddr(),
		Ready: allOK(checks), Checks: checks,
		Cache: CacheStatus{
			Dir: a.config.Cache.Dir, Blobs: stats.Blobs, Bytes: stats.Bytes,
			Limit: stats.Limit, Free: stats.Free, MinFree: stats.MinFree, Problem: cacheProblem(stats),
		},
		Pins:      a.pinsStatus(),
		Replicas:  a.replicas.status(),
		Pulls:     append([]proxy.Pull{}, a.proxy.Pulls()...),
		Fills:     a.fills(),
		Served:    totals.Served,
		Fetched:   totals.Fetched,
		Uploaded:  totals.Uploaded,
		Upstreams: append([]upstream.Health{}, a.upstream.Health()...),
		Peers:     a.swarm.describe(a.config.Peer, peers),
		Members:   members,
		Zones:     zonesOf(members),
		Index:     IndexStatus{Blobs: peers.Index.Blobs, Postings: peers.Index.Postings, Held: peers.Index.Held},
		Hosts:     a.hostsStatus(),
		Runtime:   a.runtimeStatus(),
		Recent:    a.recent.all(a.cache.Meta().Fetched),
		Doctor:    a.doctorStatus(),
	}
}

// cacheProblem says why the cache keeps nothing new, "" if it can. What fills have
// reserved counts as evictable: it is, once they are whole.
func cacheProblem(s cache.Stats) string {
	switch {
	case s.Free < 0 || s.Free+s.Bytes-s.Pinned > s.MinFree:
		return ""
	case s.MinFree == 0:
		return "keeps nothing new: the disk is full; free some of it"
	}
	return fmt.Sprintf("keeps nothing new: cache.min_free keeps %s free, and the disk has %s; free more of it, or lower cache.min_free",
		SizeText(s.MinFree), SizeText(s.Free))
}

// nodeName is peer.name, or the name of the host.
func (a *Agent) nodeName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	return cmp.Or(a.config.Peer.Name, host)
}

// fills lists the running fills, oldest first.
func (a *Agent) fills() []FillStatus {
	out := []FillStatus{}
	for _, f := range a.cache.Fills() {
		out = append(out, FillStatus{
			Digest: f.Digest, Size: f.Size, Present: f.Present, Readers: f.Readers, Started: f.Started,
			Origins: originsOf(cache.Fetched{Origins: f.Origins}),
		})
	}
	slices.SortFunc(out, func(a, b FillStatus) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.Digest, b.Digest))
	})
	return out
}

// counted adds up each counter that the status tells by its one label: what
// /metrics says and what the status says cannot differ.
func (a *Agent) counted() map[string]map[string]int64 {
	families, err := a.counters.Gather()
	if err != nil {
		a.log.Debug("gather counters", "err", err)
	}
	out := map[string]map[string]int64{}
	for _, f := range families {
		sums := map[string]int64{}
		for _, m := range f.GetMetric() {
			value := ""
			for _, l := range m.GetLabel() {
				value = l.GetValue()
			}
			sums[value] += int64(m.GetCounter().GetValue())
		}
		out[f.GetName()] = sums
	}
	return out
}

func allOK(checks []Check) bool {
	return !slices.ContainsFunc(checks, func(c Check) bool { return !c.OK })
}

// checks are the conditions of being ready.
func (a *Agent) checks() []Check {
	check := func(name string, err error) Check {
		if err != nil {
			return Check{Name: name, Reason: err.Error()}
		}
		return Check{Name: name, OK: true}
	}
	out := []Check{check("proxy", a.proxyCheck()), check("cache", a.cacheCheck())}
	if a.hosts != nil {
		out = append(out, check("hosts", a.hostsInPlace()))
	}
	if a.swarm != nil {
		out = append(out, check("peers", a.swarm.check()))
	}
	return out
}

func (a *Agent) proxyCheck() error {
	switch a.state.Load() {
	case stateStarting:
		return errors.New("not listening yet")
	case stateStopping:
		return errors.New("stopping")
	}
	return nil
}

func (a *Agent) cacheCheck() error {
	if a.cache.Stats().Free < 0 {
		return fmt.Errorf("the file system of %s cannot be read", a.config.Cache.Dir)
	}
	return nil
}

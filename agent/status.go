package agent

import (
	"cmp"
	"os"
	"slices"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/upstream"
)

// Status describes this node at this moment.
func (a *Agent) Status() Status {
	checks := a.checks()
	served := a.sum("larder_served_bytes_total", "source")
	delete(served, "none") // error bodies and pings
	stats := a.cache.Stats()
	return Status{
		Build: a.build, Node: a.nodeName(), Started: a.started, Proxy: a.ProxyAddr(),
		Ready: allOK(checks), Checks: checks,
		Cache: CacheStatus{
			Dir: a.config.Cache.Dir, Blobs: stats.Blobs, Bytes: stats.Bytes,
			Limit: stats.Limit, Free: stats.Free, MinFree: stats.MinFree,
		},
		Pulls:     append([]proxy.Pull{}, a.proxy.Pulls()...),
		Fills:     a.fills(),
		Served:    served,
		Fetched:   a.sum("larder_fetched_bytes_total", "from"),
		Uploaded:  a.sum("larder_uploaded_bytes_total", "")[""],
		Upstreams: append([]upstream.Health{}, a.upstream.Health()...),
		Peers:     a.swarm.describe(a.config.Peer),
		Members:   append([]Member{}, a.Members()...),
		Index:     a.indexStatus(),
		Hosts:     a.hostsStatus(),
		Runtime:   a.runtimeStatus(),
	}
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

// sum adds up a counter of our own by one of its labels: what /metrics says
// and what the status says cannot differ.
func (a *Agent) sum(name, label string) map[string]int64 {
	out := map[string]int64{}
	families, err := a.registry.Gather()
	if err != nil {
		a.log.Debug("gather metrics", "err", err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			key := ""
			for _, l := range m.GetLabel() {
				if l.GetName() == label {
					key = l.GetValue()
				}
			}
			out[key] += int64(m.GetCounter().GetValue())
		}
	}
	return out
}

func (a *Agent) hostsStatus() HostsStatus {
	s := HostsStatus{Containerd: a.config.Hosts.Containerd, CRIO: a.config.Hosts.CRIO}
	if a.hosts == nil {
		return s
	}
	if err := a.hostsInPlace(); err != nil {
		s.Problem = err.Error()
	}
	s.InPlace = s.Problem == ""
	return s
}

func allOK(checks []Check) bool {
	return !slices.ContainsFunc(checks, func(c Check) bool { return !c.OK })
}

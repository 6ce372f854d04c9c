package agent

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/peer"
	"github.com/larder-cache/larder/test/registrytest"
)

// newCluster runs n agents on loopback that know each other and one registry.
// The config of one more is returned.
func newCluster(t *testing.T, n int) (nodes []*running, reg *registrytest.Server, img *registrytest.Image, next func() Config) {
	t.Helper()
	var registries Config
	reg, img = startRegistry(t, &registries)
	next = clusterConfigs(t, registries.Registries...)
	return startCluster(t, n, next), reg, img, next
}

// clusterConfigs makes the configurations of nodes that find each other.
func clusterConfigs(t *testing.T, registries ...upstream.Registry) (next func() Config) {
	t.Helper()
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte(base64.StdEncoding.EncodeToString(make([]byte, 32))+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	first, made := ownAddr(t), 0
	return func() Config {
		c := testConfig(t)
		made++
		c.Registries = registries
		c.Peer.Enabled, c.Peer.Name, c.Peer.KeyFile = true, fmt.Sprintf("node-%d", made), key
		c.Peer.Gossip, c.Peer.Join = ownAddr(t), []string{first}
		if made == 1 {
			c.Peer.Gossip, c.Peer.Join = first, nil
		}
		host, _, _ := net.SplitHostPort(c.Peer.Gossip)
		c.Peer.Data = net.JoinHostPort(host, "0")
		return c
	}
}

func startCluster(t *testing.T, n int, next func() Config, opts ...Option) (nodes []*running) {
	t.Helper()
	for range n {
		nodes = append(nodes, start(t, next(), opts...))
	}
	for _, node := range nodes {
		node.awaitMembers(t, n)
	}
	return nodes
}

func (r *running) awaitMembers(t *testing.T, n int) {
	t.Helper()
	eventually(t, "a cluster", func() error {
		if got := len(r.Members()); got != n {
			return fmt.Errorf("%d of %d members", got, n)
		}
		return nil
	})
}

// hosts numbers the loopback addresses that this process has given out.
var hosts atomic.Uint32

// ownAddr is an address for gossip, which must be told where others listen before
// they do. Nobody else's connections come from its host, nor are listeners on all
// addresses given its port: one that was free a moment ago may be taken by then.
func ownAddr(t *testing.T) string {
	t.Helper()
	n := hosts.Add(1)
	pid := os.Getpid()
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:%d", 2+pid%250, n>>8&0xff, n&0xff, 10000+pid%20000))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// TestAloneIsTold: a node that is to have peers and finds none says why, where people look;
// one with another key is no peer.
func TestAloneIsTold(t *testing.T) {
	next := clusterConfigs(t)
	first, second, gone, stranger := next(), next(), next(), next()
	gone.Peer.Join = []string{ownAddr(t)}
	stranger.Peer.KeyFile = filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(stranger.Peer.KeyFile, []byte(base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("k"), 32))), 0o600); err != nil {
		t.Fatal(err)
	}
	with := []*running{start(t, first)}
	if peers, want := with[0].Status().Peers, "no other member so far, 0 links, 0 blobs and tags in the index"; peers != want {
		t.Errorf("the first of a cluster: %q, want %q", peers, want)
	}
	with = append(with, start(t, second))
	without := map[string]*running{gone.Peer.Join[0]: start(t, gone), stranger.Peer.Join[0]: start(t, stranger)}
	for addr, node := range without {
		eventually(t, "told", func() error {
			if peers := node.Status().Peers; !strings.HasPrefix(peers, "alone: no other node answers (") || !strings.Contains(peers, addr) {
				return errors.New(peers)
			}
			return nil
		})
	}
	for _, node := range with {
		if peers := node.Status().Peers; !strings.HasPrefix(peers, "2 members, ") {
			t.Error(peers)
		}
	}
}

// TestStormCostsOneCopy defends P2: nodes that pull the same image at once cost
// the registry one copy and one request per blob, manifest and tag; and a node
// that comes when the registry is gone gets all of it from the others.
func TestStormCostsOneCopy(t *testing.T) {
	const n = 5
	nodes, reg, img, next := newCluster(t, n)
	var pulls sync.WaitGroup
	for _, node := range nodes {
		pulls.Go(func() { node.pull(t) })
	}
	pulls.Wait()
	if code, body := nodes[0].admin(t, "GET", "/", ""); code != 200 || !strings.Contains(body, "node-5") || !strings.Contains(body, "linked") {
		t.Errorf("the page does not show the members: %d %s", code, body)
	}
	for d := range img.Blobs {
		if got := reg.Count(registrytest.Match{Kind: registrytest.Blob, Reference: d.String()}); got != 1 {
			t.Errorf("the registry was asked %d times for %s", got, d)
		}
	}
	if got := reg.Count(registrytest.Match{Kind: registrytest.Manifest}); got > 2 {
		t.Errorf("%d requests for one tag and one manifest", got)
	}

	reg.Down()
	late := start(t, next())
	late.awaitMembers(t, n+1)
	got := sources(late.pull(t))
	if got["peer"] == 0 || got["upstream"] != 0 {
		t.Errorf("the late node was served %v", got)
	}
	late.settle(t)
	code, body := late.admin(t, "GET", "/api/v1/explain?image="+testImage.String(), "")
	if code != 200 || !strings.Contains(body, `"node-`) {
		t.Errorf("explain names no peer: %d %s", code, body)
	}
}

// TestEachZoneFetchesItsOwn: with sites joined by a WAN one of them asks the registry for what
// another has. Only when the registry is gone it comes from there.
func TestEachZoneFetchesItsOwn(t *testing.T) {
	_, reg, img, next := newCluster(t, 0)
	members := 0
	add := func(zone string) *running {
		c := next()
		c.Peer.Zone, c.Peer.UpstreamScope = zone, "zone"
		node := start(t, c)
		members++
		node.awaitMembers(t, members)
		return node
	}
	pull := func(node *running) map[string]int64 {
		got := sources(node.pull(t))
		node.settle(t)
		return got
	}
	knows := func(node *running) { // who has the image
		tag := peer.Copy{Want: peer.Want{Registry: testRegistry, Repository: "team/app"}, Tag: "v1"}
		for _, d := range append(slices.Collect(maps.Keys(img.Blobs)), img.Digest, tag.Entry()) {
			eventually(t, "known holders", func() error {
				if len(node.swarm.Holders(d)) == 0 {
					return fmt.Errorf("none of %s", d)
				}
				return nil
			})
		}
	}
	a, b, neighbour := add("a"), add("b"), add("b")
	pull(a)
	knows(b)
	pull(b)
	pull(neighbour)
	for d := range img.Blobs {
		if got := reg.Count(registrytest.Match{Kind: registrytest.Blob, Method: "GET", Reference: d.String()}); got != 2 {
			t.Errorf("the registry was asked %d times for %s by two zones", got, d)
		}
	}
	for _, z := range a.Status().Zones {
		if z.Sent+z.Received > 0 {
			t.Errorf("between the zones: %+v", z)
		}
	}

	reg.Down()
	late := add("c")
	knows(late)
	if got := pull(late); got["peer"] == 0 || got["upstream"] != 0 {
		t.Errorf("with the registry down the third zone was served %v", got)
	}
}

// TestNoRoomPullsFromPeers: a node whose disk has no room costs the registry no more than one
// that has, not as the home of what it pulls either, and pulls when the registry is gone.
func TestNoRoomPullsFromPeers(t *testing.T) {
	nodes, reg, _, next := newCluster(t, 2)
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 8, Layers: []int64{9 << 20, 300 << 10, 5 << 10}})
	reg.Put("team/app", img, "v1")
	for range 2 {
		c := next()
		c.Cache.MinFree = cache.Percent(99.999)
		nodes = append(nodes, start(t, c))
	}
	for _, node := range nodes {
		node.awaitMembers(t, len(nodes))
	}
	full := nodes[2:]
	var pulls sync.WaitGroup
	for _, node := range nodes {
		pulls.Go(func() { node.pull(t) })
	}
	pulls.Wait()
	for d := range img.Blobs {
		if got := reg.Count(registrytest.Match{Kind: registrytest.Blob, Reference: d.String()}); got != 1 {
			t.Errorf("the registry was asked %d times for %s", got, d)
		}
	}
	nodes[0].settle(t)
	reg.Down()
	for _, node := range full {
		if got := sources(node.pull(t)); got["peer"] < 9<<20 || got["upstream"] != 0 {
			t.Errorf("a full node was served %v", got)
		}
		eventually(t, "free of promises", func() error { // the client has the last byte before the handler ends
			if got := node.swarm.passing.Load(); got != 0 {
				return fmt.Errorf("%d bytes are still promised", got)
			}
			return nil
		})
	}
}

// TestPathStormCostsNoMore: nodes whose runtime goes nowhere else once it has a manifest, as
// CRI-O, have to know that the registry has each blob. It is asked once for all of them.
func TestPathStormCostsNoMore(t *testing.T) {
	nodes, reg, img, _ := newCluster(t, 4)
	var pulls sync.WaitGroup
	for _, node := range nodes {
		pulls.Go(func() {
			if err := node.pullByPath(t, img); err != nil {
				t.Error(err)
			}
		})
	}
	pulls.Wait()
	for d := range img.Blobs {
		for _, method := range []string{"HEAD", "GET"} {
			if got := reg.Count(registrytest.Match{Kind: registrytest.Blob, Reference: d.String(), Method: method}); got > 1 {
				t.Errorf("%d times %s %s", got, method, d)
			}
		}
	}
}

// TestNewNodesKnowOldTags holds that nodes that come while the registry is down
// pull by tag: with a tag_ttl of zero nothing is remembered but as stale, and
// which node is a tag's home changes with each that comes.
func TestNewNodesKnowOldTags(t *testing.T) {
	nodes, reg, _, next := newCluster(t, 1)
	nodes[0].pull(t)
	nodes[0].settle(t)
	reg.Down()
	for n := 2; n <= 4; n++ {
		c := next()
		c.Upstream.TagTTL = 0
		late := start(t, c)
		late.awaitMembers(t, n)
		if got := sources(late.pull(t)); got["upstream"] != 0 || got["peer"] == 0 {
			t.Errorf("node %d was served %v", n, got)
		}
	}
}

// TestTagTTLOfARegistry holds that its own tag_ttl is what a home goes by, too.
func TestTagTTLOfARegistry(t *testing.T) {
	var c Config
	reg, img := startRegistry(t, &c)
	c.Registries[0].TagTTL = new(upstream.Duration) // always asked
	next := clusterConfigs(t, c.Registries...)
	nodes := startCluster(t, 2, func() Config {
		c := next()
		c.Upstream.TagTTL = time.Hour
		return c
	})
	for _, want := range []*registrytest.Image{img, registrytest.OCIImage(registrytest.ImageSpec{Seed: 8, Layers: []int64{10 << 10}})} {
		reg.Put("team/app", want, "v1")
		for _, n := range nodes {
			n.sameAs(t, "team/app", want.Descriptor)
		}
	}
}

// TestReadyWithoutOthers holds that a node is not ready before it tried to join
// the others, and is once it did, whatever came of it: a lone node must serve.
func TestReadyWithoutOthers(t *testing.T) {
	_, _, _, next := newCluster(t, 0)
	next() // the first node's, which is never started
	c := next()
	a, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.swarm.check(); err == nil {
		t.Error("ready before it tried to join anybody")
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	lone := start(t, next())
	eventually(t, "ready", func() error {
		if status, body := lone.admin(t, "GET", "/readyz", ""); status != 200 {
			return errors.New(body)
		}
		return nil
	})
	if got := lone.Status().Checks; !slices.Contains(got, Check{Name: "peers", OK: true}) {
		t.Errorf("checks %+v", got)
	}
}

// TestShortZone holds that every value a node's label can have is a zone: the
// agent is told it by Kubernetes, and must not fail to start because of it.
func TestShortZone(t *testing.T) {
	long := strings.Repeat("z", maxZone-1)
	for _, zone := range []string{"", "eu-central-1a", "northamerica-northeast1-a", strings.Repeat("z", gossipZone), long + "a", long + "b"} {
		short := shortZone(zone)
		if len(short) > gossipZone || len(zone) <= gossipZone && short != zone {
			t.Errorf("%q becomes %q", zone, short)
		}
		if _, err := peer.New(peer.Config{Name: "n", Zone: short, Store: swarmStore{}, Origin: swarmOrigin{}}); err != nil {
			t.Errorf("%q: %v", zone, err)
		}
	}
	if shortZone(long+"a") == shortZone(long+"b") {
		t.Error("two zones become one")
	}
}

// TestMembersOf holds the order, and what is told of links and bans.
func TestMembersOf(t *testing.T) {
	until := time.Now().Add(time.Minute)
	st := peer.Status{
		Self: peer.Member{Name: "node-10~x", Node: "node-10"},
		Members: []peer.Member{
			{Name: "node-10~x", Node: "node-10", Zone: "a"}, {Name: "node-2~x", Node: "node-2", Zone: "a", Addr: "10.0.0.2:5051"},
			{Name: "node-1~x", Node: "node-1", Zone: "b"}, {Name: "node-3~x", Node: "node-3", Zone: "b"},
		},
		Unreachable: map[string]bool{"node-1~x": true, "node-3~x": true},
		Links:       []peer.LinkStatus{{Node: "node-2"}},
		Banned:      map[string]time.Time{"node-1": until},
		Traffic:     map[string]peer.Traffic{"node-2": {Sent: 1, Received: 2}, "node-1": {Sent: 3}},
	}
	want := []Member{
		{Name: "node-2", Zone: "a", Address: "10.0.0.2:5051", State: "alive", Linked: true, Sent: 1, Received: 2},
		{Name: "node-10", Zone: "a", State: "alive", Self: true},
		{Name: "node-1", Zone: "b", State: "banned", BannedUntil: until, Sent: 3},
		{Name: "node-3", Zone: "b", State: "unreachable"},
	}
	got := membersOf(st)
	if !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	zones := []ZoneStatus{{Zone: "a", Members: 2, Linked: 1, Sent: 1, Received: 2}, {Zone: "b", Members: 2, Banned: 1, Sent: 3}}
	if got := zonesOf(got); !slices.Equal(got, zones) {
		t.Errorf("zones %+v, want %+v", got, zones)
	}
}

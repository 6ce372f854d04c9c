package peer

import (
	"cmp"
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Member is one start of one node, as it described itself.
type Member struct {
	Name  string // Node~Epoch, see startName; unique
	Node  string // survives restarts
	Zone  string
	Addr  string            // of the data port, host:port
	Epoch uint64            // of this start: its time by the node's clock, milliseconds since 1970
	Home  bool              // may be a home
	Key   ed25519.PublicKey // for its signatures and its certificate, made anew with each start

	rank uint64 // hash of Node
}

// metaMax bounds NodeMeta: a change of it floods the cluster, and it rides on
// every alive message.
const metaMax = 64

// A NodeMeta is a byte of version and flags, the data port, the signing key,
// and the rest is the zone: 35 bytes and up to 29. The epoch is in the name.
const metaVersion, maxZone = 1, metaMax - 35

func (m Member) meta() []byte {
	_, port, _ := net.SplitHostPort(m.Addr)
	n, _ := strconv.ParseUint(port, 10, 16)
	b := []byte{metaVersion<<4 | flag(m.Home, 1)}
	b = binary.BigEndian.AppendUint16(b, uint16(n))
	b = append(b, m.Key...)
	return append(b, m.Zone...)
}

// parseMember reads what gossip says of a member.
func parseMember(name string, ip netip.Addr, meta []byte) (Member, error) {
	node, epoch, ok := cutStart(name)
	c := cursor{b: meta}
	head, port := c.u8(), c.u16()
	m := Member{Name: name, Node: node, Epoch: epoch, Home: head&1 != 0}
	m.Key = append(ed25519.PublicKey(nil), c.take(ed25519.PublicKeySize)...)
	if c.bad || head>>4 != metaVersion || port == 0 || !ok || len(c.b) > maxZone || !ip.IsValid() {
		return Member{}, fmt.Errorf("member %.64q: %w", name, errWire)
	}
	m.Zone = string(c.b)
	m.Addr = netip.AddrPortFrom(ip.Unmap(), uint16(port)).String()
	return m, nil
}

// startName separates two starts of one node: a name that memberlist has seen
// die under another address stays unusable for a while. The epoch has 11 hexadecimal digits.
func startName(node string, epoch uint64) string {
	return fmt.Sprintf("%s~%011x", node, epoch)
}

func cutStart(name string) (node string, epoch uint64, ok bool) {
	i := len(name) - 12
	if i <= 0 || name[i] != '~' || len(name) > maxName {
		return "", 0, false
	}
	epoch, err := strconv.ParseUint(name[i+1:], 16, 44)
	return name[:i], epoch, err == nil
}

// roster is the live members. Reads of view take no lock; which members are down is under mu,
// beneath which no other lock is taken.
type roster struct {
	self string // this node's name
	view atomic.Pointer[view]

	mu     sync.Mutex // serialises writers; guards the following
	fallen map[string]fallen
	down   map[string]time.Time // members this node could not reach, until when
	// When it reaches nobody, the fault is probably on its own side (a firewall,
	// full-size packets that get lost), and to find that out again for every blob
	// would cost a pull seconds each time. So it counts as alone for a while.
	strikes map[string]bool // members not reached, with nobody reached in between
	struck  time.Time       // the last time
	alone   time.Time       // until when nobody is asked
	apart   time.Duration   // for how long, the last time
}

// fallen is a member that died lately: what it signed is still to be checked.
type fallen struct {
	key ed25519.PublicKey
	at  time.Time
}

// view is immutable. Each change of the members copies it, so it is one list: ten
// thousand members join in ten thousand copies.
type view struct {
	all []*Member // sorted by name
}

func newRoster() *roster {
	r := &roster{fallen: make(map[string]fallen), down: make(map[string]time.Time), strikes: make(map[string]bool)}
	r.view.Store(&view{})
	return r
}

const (
	keepFallen = 10 * time.Minute // digests signed by a dead home stay good
	maxFallen  = 4096
	keepDown   = 5 * time.Second // an unreachable member is not asked again before

	mostStrikes  = 6           // so many, or all others: this node is alone
	strikeMemory = time.Minute // with more between them they say nothing
	leastAlone   = 10 * time.Second
	mostAlone    = 2 * time.Minute // it is doubled up to this
)

// set adds or replaces members.
func (r *roster) set(ms ...Member) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := &view{slices.Clone(r.view.Load().all)}
	for _, m := range ms {
		m.rank = hash64(m.Node)
		v.put(&m)
		delete(r.fallen, m.Name)
		delete(r.down, m.Name)
	}
	if len(v.all) <= mostStrikes+1 { // perhaps it is the one that could not be reached
		r.endAloneLocked()
	}
	r.view.Store(v)
}

func (r *roster) remove(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.view.Load()
	i, ok := old.find(name)
	if !ok {
		return
	}
	maps.DeleteFunc(r.fallen, func(_ string, f fallen) bool { return time.Since(f.at) > keepFallen })
	if len(r.fallen) < maxFallen {
		r.fallen[name] = fallen{old.all[i].Key, time.Now()}
	}
	delete(r.down, name)
	delete(r.strikes, name)
	r.view.Store(&view{slices.Delete(slices.Clone(old.all), i, i+1)})
}

func (v *view) find(name string) (at int, found bool) {
	return slices.BinarySearchFunc(v.all, name, func(m *Member, name string) int { return cmp.Compare(m.Name, name) })
}

// put adds or replaces a member of a view that nobody else sees yet.
func (v *view) put(m *Member) {
	i, found := v.find(m.Name)
	if found {
		v.all[i] = m
		return
	}
	v.all = slices.Insert(v.all, i, m)
}

func (r *roster) get(name string) (*Member, bool) {
	v := r.view.Load()
	i, ok := v.find(name)
	if !ok {
		return nil, false
	}
	return v.all[i], true
}

// key returns the signing key of a member that is alive or died lately; it may be this
// node.
func (r *roster) key(name string) ed25519.PublicKey {
	if m, ok := r.get(name); ok {
		return m.Key
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.fallen[name].key
}

// unreachable keeps a member from being chosen as home for a while: the data path
// does not wait for gossip to notice a death. If that makes this node count as
// alone, it returns for how long.
func (r *roster) unreachable(name string) (alone time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, live := r.get(name); !live {
		return 0
	}
	now := time.Now()
	if now.After(r.down[name]) {
		alone = r.strikeLocked(name, now)
	}
	r.down[name] = now.Add(keepDown)
	return alone
}

func (r *roster) strikeLocked(name string, now time.Time) (alone time.Duration) {
	if now.Sub(r.struck) > strikeMemory && now.Sub(r.alone) > strikeMemory {
		clear(r.strikes)
		r.apart = 0
	}
	r.strikes[name], r.struck = true, now
	if len(r.strikes) < min(mostStrikes, len(r.view.Load().all)-1) || now.Before(r.alone) {
		return 0
	}
	r.apart = min(max(2*r.apart, leastAlone), mostAlone)
	r.alone = now.Add(r.apart)
	return r.apart
}

// reachable says that a member was reached, or reached this node.
func (r *roster) reachable(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.down, name)
	r.endAloneLocked()
}

// notAlone says that others are heard, whoever cannot be reached.
func (r *roster) notAlone() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endAloneLocked()
}

func (r *roster) endAloneLocked() {
	clear(r.strikes)
	r.apart, r.alone = 0, time.Time{}
}

func (r *roster) isDown(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	return now.Before(r.down[name]) || now.Before(r.alone) && name != r.self
}

// homes is view.homes without those that this node cannot reach now: when all of
// a blob's homes die at once, the next best must be the same for everybody, or
// each node would go upstream for itself until gossip has noticed.
func (r *roster) homes(k key, zone string, zoned bool) []*Member {
	return r.view.Load().homes(k, zone, zoned, r.downNow())
}

// elders are the members that were homes before a node of this epoch came. Where
// several come at once, as an autoscaler brings them, none of a blob's homes may have
// been there before, while a former home still gets the blob behind a poor uplink.
func (r *roster) elders(k key, zone string, zoned bool, epoch uint64) []*Member {
	v, without := r.view.Load(), r.downNow()
	for _, m := range v.all {
		if m.Epoch >= epoch {
			without[m.Name] = true
		}
	}
	return v.homes(k, zone, zoned, without)
}

// homeBut is the best home that is not in without; nil if there is none.
func (r *roster) homeBut(k key, zone string, zoned bool, without map[string]bool) *Member {
	passed := r.downNow()
	maps.Copy(passed, without)
	if homes := r.view.Load().homes(k, zone, zoned, passed); len(homes) > 0 {
		return homes[0]
	}
	return nil
}

// downNow is the members that cannot be reached now, as isDown has it.
func (r *roster) downNow() map[string]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	out := make(map[string]bool)
	if now.Before(r.alone) {
		for _, m := range r.view.Load().all {
			if m.Name != r.self {
				out[m.Name] = true
			}
		}
		return out
	}
	for name, until := range r.down {
		if now.Before(until) {
			out[name] = true
		}
	}
	return out
}

// isGone reports whether a member no longer exists, or cannot be reached now.
func (r *roster) isGone(name string) bool {
	_, live := r.get(name)
	return !live || r.isDown(name)
}

const (
	// homesPerBlob is how many homes a blob has at a time.
	homesPerBlob = 3
	// maxAsked is how many members a node asks as homes, including those that turn
	// out to be dead, before it relies on itself.
	maxAsked = 2 * homesPerBlob
)

// placeOf is where a member stands in a list; -1 if it does not.
func placeOf(ms []*Member, name string) int {
	return slices.IndexFunc(ms, func(m *Member) bool { return m.Name == name })
}

// nextOf is the first of homes that was not asked yet; nil once enough were.
func nextOf(homes []*Member, asked map[string]bool) *Member {
	if len(asked) >= maxAsked {
		return nil
	}
	for _, m := range homes {
		if !asked[m.Name] {
			return m
		}
	}
	return nil
}

// homes returns the best members for a blob by rendezvous hashing: all of the
// cluster, or those of one zone. Every node that sees the same members returns
// the same list, and a change of one member moves only that member's blobs. The
// best of the cluster is also the best of its own zone, so a zone's home is one
// hop from the cluster's. Members in without are passed over.
func (v *view) homes(k key, zone string, zoned bool, without map[string]bool) []*Member {
	type scored struct {
		m     *Member
		score uint64
	}
	seed := binary.BigEndian.Uint64(k[:])
	var top [homesPerBlob]scored
	for _, m := range v.all {
		if !m.Home || (zoned && m.Zone != zone) || without[m.Name] {
			continue
		}
		s := scored{m, mix(seed ^ m.rank)}
		for i := range top {
			if top[i].m == nil || s.score > top[i].score || (s.score == top[i].score && s.m.Name < top[i].m.Name) {
				s, top[i] = top[i], s
			}
			if s.m == nil {
				break
			}
		}
	}
	var out []*Member
	for _, t := range top {
		if t.m != nil {
			out = append(out, t.m)
		}
	}
	return out
}

func hash64(s string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(s))
	return mix(h.Sum64())
}

// mix is the finaliser of splitmix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

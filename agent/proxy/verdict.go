package proxy

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"hash"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

const (
	// publicLife is how long "anyone may read it" holds, verdictLife how long a yes
	// to a credential does (A3).
	publicLife  = 10 * time.Minute
	verdictLife = 5 * time.Minute
	// refusalLife lets a corrected secret work at once; challengeLife is
	// longer, because a client that gets a challenge comes back with a
	// credential.
	refusalLife   = 2 * time.Second
	challengeLife = 30 * time.Second
	// outageLife is how long other callers are spared the wait for a registry
	// that does not answer.
	outageLife = 5 * time.Second
	// rememberFor bounds offline = "remembered".
	rememberFor = 7 * 24 * time.Hour
)

// caller is who asks, as memories know it: anyone, whoever is on this node, or
// the HMAC of a credential (A6).
type caller [sha256.Size]byte

var (
	anyone  = caller{}
	theNode = caller{1}
)

// verdictKey is what a verdict is about.
type verdictKey struct {
	cache.Repository
	who caller
}

// verdict is the registry's answer to somebody, while it holds.
type verdict struct {
	decision decision
	refusal  *upstream.Error // nil if decision allows
	said     time.Time       // by the registry, if that let the caller in
}

// public says that it is the registry's word about anyone, not an operator's
// setting for outages.
func (v verdict) public() bool { return v.decision == decidedPublic }

// keyed makes HMACs under one key.
type keyed struct {
	key  []byte
	pool sync.Pool // of hash.Hash
}

func newKeyed(key []byte) *keyed {
	k := &keyed{key: key}
	k.pool.New = func() any { return hmac.New(sha256.New, k.key) }
	return k
}

// newSecret is a key that nobody else will ever know.
func newSecret() []byte {
	key := make([]byte, sha256.Size)
	rand.Read(key)
	return key
}

// sum is the HMAC of text. It keeps nothing of it.
func (k *keyed) sum(text string) (out caller) {
	h := k.pool.Get().(hash.Hash)
	defer k.pool.Put(h)
	h.Reset()
	_, _ = io.WriteString(h, text) // a hash never fails
	h.Sum(out[:0])
	return out
}

// fingerprint names a credential in the audit log, "" for none.
func (k *keyed) fingerprint(credential string) string {
	if credential == "" {
		return ""
	}
	sum := k.sum("audit\x00" + credential)
	return hex.EncodeToString(sum[:6])
}

// lasting keeps, across restarts, who was allowed to read what (A6): a name
// for the node, HMACs for credentials. Without a key it keeps nothing.
type lasting struct {
	meta *cache.Meta
	keys atomic.Pointer[keyed] // nil: nothing is kept
}

// use makes key the one under which credentials are kept, as they are in meta; nil
// changes nothing.
func (m *lasting) use(key []byte) {
	if key != nil {
		m.keys.Store(newKeyed(key))
	}
}

// name is under which somebody is kept, "" if not at all.
func (m *lasting) name(a *access) string {
	keys := m.keys.Load()
	switch {
	case keys == nil || a.who == anyone:
		return ""
	case a.who == theNode:
		return "node"
	}
	sum := keys.sum("verdict\x00" + a.target.Authorization)
	return hex.EncodeToString(sum[:])
}

// put keeps a yes, unless the credential will be worth nothing soon.
func (m *lasting) put(a *access) {
	end, known := tokenEnd(a.target.Authorization)
	if name := m.name(a); name != "" && !(known && time.Until(end) < verdictLife) {
		m.meta.SetVerdict(a.repository(), name)
	}
}

// has reports whether the same caller was let in recently enough, with what
// still counts.
func (m *lasting) has(a *access) bool {
	name := m.name(a)
	if name == "" {
		return false
	}
	if end, known := tokenEnd(a.target.Authorization); known && !time.Now().Before(end) {
		return false
	}
	when, ok := m.meta.Verdict(a.repository(), name)
	// From the future: a clock was wrong. The registry's next yes corrects
	// it.
	return ok && time.Since(when).Abs() < rememberFor
}

// knows reports whether the registry's last answer to the same caller was yes,
// however long ago that was.
func (m *lasting) knows(a *access) bool {
	name := m.name(a)
	if name == "" {
		return false
	}
	_, ok := m.meta.Verdict(a.repository(), name)
	return ok
}

func (m *lasting) forget(a *access) {
	if name := m.name(a); name != "" {
		m.meta.DeleteVerdict(a.repository(), name)
	}
}

// maxToken bounds how much of a token is read; those of registries are 1 to 5 KB.
const maxToken = 16 << 10

// tokenEnd reads when a bearer token ends, if it is a JWT and says so (RFC 7519,
// 4.1.4). Nothing of it is verified, so it may only shorten what is believed (A3).
func tokenEnd(authorization string) (end time.Time, ok bool) {
	scheme, token, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "bearer") || len(token) > maxToken {
		return end, false
	}
	_, rest, _ := strings.Cut(token, ".")
	claims, _, signed := strings.Cut(rest, ".")
	if !signed {
		return end, false
	}
	body, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(claims, "="))
	var doc struct {
		Expires *float64 `json:"exp"`
	}
	if err != nil || json.Unmarshal(body, &doc) != nil || doc.Expires == nil {
		return end, false
	}
	// Far enough from the limits of time.Time, whatever the token says.
	return time.Unix(int64(min(max(*doc.Expires, 0), 1<<40)), 0), true
}

// lifeOf is how long a yes to a credential holds that the registry said age ago.
func lifeOf(authorization string, age time.Duration) time.Duration {
	life := max(verdictLife-age, 0)
	end, ok := tokenEnd(authorization)
	if !ok {
		return life
	}
	return min(life, max(time.Until(end), 0))
}

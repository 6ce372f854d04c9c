package proxy

import (
	"encoding/base64"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/larder-cache/larder/test/runtimetest"
)

func jwt(claims string) string {
	return "Bearer e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".c2ln"
}

func TestTokenEnd(t *testing.T) {
	for authorization, want := range map[string]int64{ // 0: it does not say
		"":                                   0,
		"Bearer":                             0,
		"Bearer opaque":                      0,
		"Bearer a.b":                         0,
		"Bearer a.%%.c":                      0,
		"Basic " + jwt(`{"exp":5}`)[7:]:      0,
		jwt(`{}`):                            0,
		jwt(`{"exp":"soon"}`):                0,
		jwt(`{"exp":null}`):                  0,
		jwt(`not json`):                      0,
		jwt(`{"exp":1234567890}`):            1234567890,
		jwt(`{"exp":1234567890.9}`):          1234567890,
		jwt(`{"sub":"x","exp":1.5e9}`):       1500000000,
		jwt(`{"exp":1e300}`):                 1 << 40,
		"bearer " + jwt(`{"exp":7}`)[7:]:     7,
		jwt(`{"exp":9}`) + "=":               9,
		jwt(strings.Repeat(" ", maxToken)):   0,
		jwt(`{"exp":1}`) + ".a.jwe.has.five": 1,
	} {
		end, ok := tokenEnd(authorization)
		if ok != (want != 0) || ok && end.Unix() != want {
			t.Errorf("%.60q ends at %d, %t; want %d", authorization, end.Unix(), ok, want)
		}
	}
	if end, ok := tokenEnd(jwt(`{"exp":-1e300}`)); !ok || end.Unix() != 0 {
		t.Errorf("a token that ended before time began: %v, %t", end, ok)
	}
}

// TestLifeOfAVerdict: what a token says of itself can only shorten.
func TestLifeOfAVerdict(t *testing.T) {
	for name, tc := range map[string]struct {
		ends     time.Duration
		min, max time.Duration
	}{
		"in a year":     {365 * 24 * time.Hour, verdictLife, verdictLife},
		"in a minute":   {time.Minute, 50 * time.Second, time.Minute},
		"a minute ago":  {-time.Minute, 0, 0},
		"this very now": {0, 0, time.Second},
	} {
		token := jwt(fmt.Sprintf(`{"exp":%d}`, time.Now().Add(tc.ends).Unix()))
		if got := lifeOf(token, 0); got < tc.min || got > tc.max {
			t.Errorf("%s: %s", name, got)
		}
	}
	for _, opaque := range []string{"Basic dTpw", "Bearer opaque", ""} {
		if got := lifeOf(opaque, 0); got != verdictLife {
			t.Errorf("%q: %s", opaque, got)
		}
		if got := lifeOf(opaque, time.Minute); got != verdictLife-time.Minute {
			t.Errorf("%q, a minute ago: %s", opaque, got)
		}
		if got := lifeOf(opaque, time.Hour); got != 0 {
			t.Errorf("%q, an hour ago: %s", opaque, got)
		}
	}
}

func FuzzTokenEnd(f *testing.F) {
	for _, s := range []string{"", "Bearer a.b.c", jwt(`{"exp":1}`), jwt(`{"exp":-1e300}`), "Basic dTpw"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, authorization string) {
		end, ok := tokenEnd(authorization)
		if ok && (end.Unix() < 0 || end.Unix() > 1<<40) {
			t.Errorf("ends at %d", end.Unix())
		}
		if life := lifeOf(authorization, 0); life < 0 || life > verdictLife {
			t.Errorf("lives for %s", life)
		}
	})
}

// TestKeyedSumsAreApart: HMACs of one key for different uses, and of different
// keys, have nothing to do with each other, and are the same each time.
func TestKeyedSumsAreApart(t *testing.T) {
	a, b := newKeyed(newSecret()), newKeyed(newSecret())
	if again := a.sum("x"); again != a.sum("x") || again == a.sum("y") || again == b.sum("x") {
		t.Error("sums")
	}
	sum := a.sum("verdict\x00x")
	if f := a.fingerprint("x"); len(f) != 12 || strings.HasPrefix(fmt.Sprintf("%x", sum), f) {
		t.Errorf("the audit log's %s is the beginning of what is kept", f)
	}
	if a.fingerprint("") != "" {
		t.Error("nobody has a fingerprint")
	}
}

// TestChallengeOfAnotherNode: a challenge that would have a client send its password
// to strangers is not believed from another node; the registry's own is relayed.
func TestChallengeOfAnotherNode(t *testing.T) {
	const evil = `Bearer realm="https://evil.example.net/token",service="x"`
	refusal := &upstream.Error{Status: http.StatusUnauthorized, Challenge: []string{evil}}
	swarm := &swarmFunc{
		may:     func(upstream.Target, Question) error { return refusal },
		resolve: func(string) (ocispec.Descriptor, error) { return ocispec.Descriptor{}, refusal },
	}
	n := startNode(t, func(s *setup) {
		s.proxy.Swarm = swarm
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Bearer, Users: map[string]string{"ann": "secret"}}
	})
	img := n.image(1000)
	for _, path := range []string{manifestPath("v1"), manifestPath(img.Digest.String()), blobPath(img.Layers[0].Digest)} {
		a := n.get(path)
		if got := a.header.Get("WWW-Authenticate"); a.status != 401 || !strings.Contains(got, n.registry.TokenURL()) || len(a.header.Values("WWW-Authenticate")) != 1 {
			t.Errorf("%s: %d with %q", path, a.status, got)
		}
	}
}

// TestTokenEndsInABlob: the client's token runs out in the middle of a blob. The
// client is asked for another, and the blob goes on where it was.
func TestTokenEndsInABlob(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Bearer, Users: map[string]string{"ann": "secret"}}
	})
	img := n.image(40 << 20) // more than one request brings
	d := img.Layers[0].Digest
	blob := registrytest.Match{Kind: registrytest.Blob, Method: "GET", Reference: d.String()}
	n.registry.Inject(blob, registrytest.Times(1), registrytest.Do(n.registry.ExpireTokens))
	c := n.containerdTo("http://127.0.0.1:1") // nothing behind the proxy
	if _, err := c.Pull(t.Context(), host+"/"+repo+":v1", &runtimetest.Auth{Username: "ann", Password: "secret"}); err != nil {
		t.Fatal(err)
	}
	if got := n.registry.Bytes(blob); got > 60<<20 {
		t.Errorf("%d bytes from the registry", got)
	}
	refused := blob
	refused.Status = 401
	if n.registry.Count(refused) == 0 {
		t.Error("no token ended in the blob")
	}
}

// TestDecisionsAreCounted: each question about a repository is one decision, and
// every label is there from the start.
func TestDecisionsAreCounted(t *testing.T) {
	n := startNode(t, func(s *setup) {
		s.policy.Deny = []string{"denied"}
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "secret"}, Anonymous: []string{"open"}}
	})
	img := n.image(1000)
	n.registry.Put("open", img, "v1")
	count := func() map[string]float64 {
		out := map[string]float64{}
		families, err := n.metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() != "larder_auth_decisions_total" {
				continue
			}
			for _, m := range f.GetMetric() {
				out[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			}
		}
		return out
	}
	if got := count(); len(got) != len(decisions) {
		t.Errorf("labels at the start: %v", got)
	}
	secret := []string{"Authorization", "Basic " + base64.StdEncoding.EncodeToString([]byte("ann:secret"))}
	n.get("/v2/")
	n.get(manifestPath("v1"))
	n.get(manifestPath("v1"), secret...)
	n.get(blobPath(img.Layers[0].Digest), secret...)
	n.get(blobPath(img.Layers[0].Digest), "Authorization", "Basic bm8=")
	n.get("/v2/open/manifests/v1?ns=" + host)
	n.get("/v2/denied/manifests/v1?ns=" + host)
	n.registry.Down()
	n.get(blobPath(img.Layers[0].Digest), "Authorization", "Basic bm9ib2R5")
	want := map[string]float64{"challenged": 1, "granted": 2, "refused": 1, "public": 1, "denied": 1, "unknown": 1, "node": 0, "remembered": 0, "offline": 0, "pinned": 0, "imported": 0}
	if got := count(); !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestANoEndsWhatIsUnderWay pins a race: while one question to the registry goes
// unanswered, another is answered no. What was remembered before is then worth
// nothing to the first either (A4).
func TestANoEndsWhatIsUnderWay(t *testing.T) {
	asked, release := make(chan struct{}), make(chan struct{})
	var slow digest.Digest
	swarm := &swarmFunc{may: func(_ upstream.Target, q Question) error {
		if q.Reference != slow.String() {
			return &upstream.Error{Status: http.StatusForbidden}
		}
		close(asked)
		<-release
		return errNoSwarm
	}}
	n := startNode(t, func(s *setup) {
		s.proxy.VerdictKey = newSecret()
		s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "secret"}}
	})
	img := n.image(1000, 2000)
	slow = img.Layers[0].Digest
	secret := []string{"Authorization", "Basic " + base64.StdEncoding.EncodeToString([]byte("ann:secret"))}
	for _, path := range []string{manifestPath("v1"), blobPath(slow), blobPath(img.Layers[1].Digest)} {
		if a := n.get(path, secret...); a.status != 200 {
			t.Fatalf("%s: %d", path, a.status)
		}
	}
	acc := access{target: upstream.Target{Registry: host, Repository: repo}}
	n.proxy.auth.present(&acc, secret[1])
	n.proxy.auth.verdicts.forget(acc.key()) // as if five minutes had passed
	n.proxy.auth.swarm = swarm
	n.registry.Down()
	if !n.proxy.auth.lasting.has(&acc) {
		t.Fatal("not remembered; the test shows nothing")
	}
	got := make(chan answer, 1)
	go func() { got <- n.get(blobPath(slow), secret...) }()
	<-asked
	if a := n.get(blobPath(img.Layers[1].Digest), secret...); a.status != 403 {
		t.Errorf("the registry says no: %d", a.status)
	}
	close(release)
	if a := <-got; a.status/100 == 2 {
		t.Errorf("served after a no: %d", a.status)
	}
}

// TestRememberedFromTheFuture: a yes from a clock that was ahead is not remembered for
// as long as the clock was wrong. (A bubble's clock is decades behind the test's.)
func TestRememberedFromTheFuture(t *testing.T) {
	c, err := cache.New(cache.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	memory := lasting{meta: c.Meta()}
	memory.use(newSecret())
	acc := access{target: upstream.Target{Registry: host, Repository: repo, Authorization: "Basic eDp5"}, who: caller{2}}
	memory.put(&acc)
	if !memory.has(&acc) {
		t.Fatal("a yes is not remembered")
	}
	synctest.Test(t, func(t *testing.T) {
		if memory.has(&acc) {
			t.Error("a yes of years from now is believed")
		}
	})
}

// TestHeadIsRefusedToOne: a token that ended is its caller's matter. Who asks for the same
// blob at the same time with a good one gets his own answer.
func TestHeadIsRefusedToOne(t *testing.T) {
	n := startNode(t, func(s *setup) { s.proxy.FirstByteBudget, s.upstream.FirstByte = 10*time.Second, 10*time.Second })
	img := smallImage(1000)
	layer := img.Layers[0]
	var ended atomic.Bool
	var once sync.Once
	held, release := make(chan struct{}), make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ann := r.Header.Get("Authorization") == "Bearer ann"
		switch {
		case r.Header.Get("Authorization") == "" || ann && ended.Load():
			if ann {
				once.Do(func() { close(held) })
				<-release
			}
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		case strings.HasSuffix(r.URL.Path, layer.Digest.String()):
			w.Header().Set("Content-Length", strconv.FormatInt(layer.Size, 10))
		default:
			w.Header().Set("Content-Type", img.MediaType)
			_, _ = w.Write(img.Manifests[0].Data)
		}
	}))
	defer srv.Close()
	if err := n.proxy.upstream.SetRegistries([]upstream.Registry{{Host: host, Upstreams: []string{srv.URL}}}); err != nil {
		t.Fatal(err)
	}
	ann, bob := []string{"Authorization", "Bearer ann"}, []string{"Authorization", "Bearer bob"}
	for _, who := range [][]string{ann, bob} {
		if a := n.get(manifestPath("v1"), who...); a.status != 200 {
			t.Fatalf("%s: %d %s", who[1], a.status, a.body)
		}
	}
	ended.Store(true)
	refused := make(chan int)
	go func() { refused <- n.do("HEAD", blobPath(layer.Digest), ann...).status }()
	<-held
	if a := n.do("HEAD", blobPath(layer.Digest), bob...); a.status != 200 {
		t.Errorf("bob: %d", a.status)
	}
	close(release)
	if got := <-refused; got != 401 {
		t.Errorf("ann: %d, want 401", got)
	}
	askers := map[caller]bool{}
	for _, authorization := range []string{"", "", "Bearer ann", "Bearer ann", "Bearer bob"} {
		askers[n.proxy.auth.askedAs(upstream.Target{Anonymous: authorization == "", Authorization: authorization})] = true
	}
	if len(askers) != 3 {
		t.Errorf("%d questions of 3 callers", len(askers))
	}
}

// TestLeaveOfAnOutageIsNoVerdict: what an operator lets in while the registry is down is
// no word of the registry's to other nodes, which would keep it when that is back.
func TestLeaveOfAnOutageIsNoVerdict(t *testing.T) {
	for mode, who := range map[string][]string{upstream.OfflineAll: nil, upstream.OfflineRemembered: ann} {
		t.Run(mode, func(t *testing.T) {
			n := startNode(t, func(s *setup) {
				s.proxy.VerdictKey, s.policy.Offline = newSecret(), mode
				s.registry.Auth = registrytest.Auth{Scheme: registrytest.Basic, Users: map[string]string{"ann": "x"}}
			})
			img := n.image(1000)
			path := manifestPath(img.Digest.String())
			if a := n.get(path, ann...); a.status != 200 {
				t.Fatalf("%d", a.status)
			}
			acc := access{target: upstream.Target{Registry: host, Repository: repo, Anonymous: true}}
			if who != nil {
				n.proxy.auth.present(&acc, who[1])
			}
			n.proxy.auth.verdicts.forget(acc.key()) // as if five minutes had passed
			n.registry.Down()
			if a := n.get(path, who...); a.status != 200 {
				t.Fatalf("down: %d", a.status)
			}
			if v, _ := n.proxy.auth.verdicts.get(acc.key()); !v.decision.allows() {
				t.Fatal("no leave is remembered; the test shows nothing")
			}
			for _, known := range []bool{false, true} {
				q := Question{Reference: img.Digest.String(), Known: known}
				if _, err := n.proxy.MayFor(t.Context(), acc.target, q); err == nil || upstream.IsUnauthorized(err) {
					t.Errorf("known %t: another node is told %v, want that nobody knows", known, err)
				}
			}
		})
	}
}

// TestAYesGetsNoYounger: what another node has heard of the registry some time ago holds
// here for the rest of its life, and is passed on as what it is.
func TestAYesGetsNoYounger(t *testing.T) {
	const age = 4 * time.Minute
	for life, who := range map[time.Duration][]string{publicLife: nil, verdictLife: ann} {
		n := startNode(t, func(s *setup) {
			s.proxy.Swarm = &swarmFunc{mayAge: age, may: func(upstream.Target, Question) error { return nil }}
		})
		img := n.image(1000)
		if a := n.get(manifestPath(img.Digest.String()), who...); a.status != 200 {
			t.Fatalf("%d", a.status)
		}
		acc := access{target: upstream.Target{Registry: host, Repository: repo, Anonymous: true}}
		if who != nil {
			n.proxy.auth.present(&acc, who[1])
		}
		if got, err := n.proxy.MayFor(t.Context(), acc.target, Question{Reference: "v1", Known: true}); err != nil || got < age || got > age+time.Minute {
			t.Errorf("of %s: %v, %s ago, want %s", life, err, got, age)
		}
		holds := n.proxy.auth.verdicts
		holds.mu.Lock()
		until := holds.items[acc.key()].Value.(remembered[verdictKey, verdict]).until
		holds.mu.Unlock()
		if left := time.Until(until); left > life-age || left < life-age-time.Minute {
			t.Errorf("of %s: holds for %s more", life, left)
		}
	}
}

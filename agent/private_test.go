package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
	"github.com/larder-cache/larder/test/runtimetest"
)

// The repositories of the tests: ann may read a, bob b, and anybody c.
const (
	repoA = "team/a"
	repoB = "team/b"
	repoC = "open/c"
)

// private is a registry with private repositories, and nodes before it.
type private struct {
	t      *testing.T
	scheme registrytest.Scheme
	reg    *registrytest.Server
	images map[string]*registrytest.Image // by repository
	nodes  []*running
	next   func() Config
	change func(*Config)
	tokens map[string]string // credentials that clients hold on to
}

// newPrivate starts the registry and n nodes with a budget of 1.5 s for headers.
func newPrivate(t *testing.T, scheme registrytest.Scheme, n int, change func(*Config), opts ...Option) *private {
	t.Helper()
	p := &private{t: t, scheme: scheme, change: change, images: map[string]*registrytest.Image{}, tokens: map[string]string{}}
	p.reg = registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{
		Scheme: scheme, Users: map[string]string{"ann": "HUSH-ann", "bob": "HUSH-bob"},
		Access: map[string][]string{"ann": {repoA}, "bob": {repoB}}, Anonymous: []string{"open/*"},
		TokenLife: time.Hour, // longer than a verdict holds
	}})
	for i, repo := range []string{repoA, repoB, repoC} {
		p.images[repo] = registrytest.OCIImage(registrytest.ImageSpec{Seed: 40 + uint64(i), Layers: []int64{300 << 10, 2 << 10}, Opaque: true})
		p.reg.Put(repo, p.images[repo], "v1")
		p.reg.Put(repo, registrytest.Artifact(p.images[repo].Descriptor, "application/vnd.example.sbom", 50+uint64(i)), "sbom")
	}
	p.next = clusterConfigs(t, upstream.Registry{Host: testRegistry, Upstreams: []string{p.reg.URL()}})
	p.nodes = startCluster(t, n, p.config, opts...)
	return p
}

// config is that of one more node.
func (p *private) config() Config {
	c := p.next()
	c.Proxy.FirstByteBudget, c.Upstream.TagTTL = 1500*time.Millisecond, 0
	if p.change != nil {
		p.change(&c)
	}
	return c
}

func basicAuth(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// token gets a token for a repository as clients do; the service gives one to
// anybody, which may open nothing.
func (p *private) token(user, password, repo string) string {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.t.Context(), "GET", p.reg.TokenURL()+"?service=registrytest&scope="+url.QueryEscape("repository:"+repo+":pull"), nil)
	if err != nil {
		p.t.Fatal(err)
	}
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	var doc struct{ Token string }
	if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil || doc.Token == "" {
		p.t.Fatalf("token for %s: %s, %v", user, resp.Status, err)
	}
	return "Bearer " + doc.Token
}

// caller is somebody who asks, with the credential for a repository that he has.
type caller struct {
	name string
	auth func(p *private, repo string) string
}

// nobody brings no credential, ann and bob their own, the others what is no good.
var (
	nobody  = caller{"nobody", func(*private, string) string { return "" }}
	ann     = user("ann", "HUSH-ann")
	bob     = user("bob", "HUSH-bob")
	guesser = caller{"guesser", func(p *private, _ string) string {
		if p.scheme == registrytest.Bearer {
			return "Bearer HUSH-made-up"
		}
		return basicAuth("ann", "HUSH-guess")
	}}
	// anybody is a client without a secret: it gets what the token service gives
	// to anyone.
	anybody = caller{"anybody", func(p *private, repo string) string {
		if p.scheme == registrytest.Basic {
			return ""
		}
		return p.token("", "", repo)
	}}
	expired = caller{"expired", func(p *private, _ string) string { return p.tokens["expired"] }}
)

func user(name, password string) caller {
	return caller{name, func(p *private, repo string) string {
		if p.scheme == registrytest.Basic {
			return basicAuth(name, password)
		}
		key := name + " " + repo
		if p.tokens[key] == "" {
			p.tokens[key] = p.token(name, password, repo)
		}
		return p.tokens[key]
	}}
}

// expire makes the credential of the caller expired.
func (p *private) expire() {
	if p.scheme == registrytest.Basic {
		p.tokens["expired"] = basicAuth("ann", "HUSH-last-year's")
		return
	}
	p.tokens["expired"] = p.token("ann", "HUSH-ann", repoA)
	p.reg.ExpireTokens()
}

// question is one request of the pull API, at any place that answers it.
type question struct {
	name, method, path string
	header             []string
}

// questions are all routes to what an image is, under any repository's name.
func questions(repo string, img *registrytest.Image) []question {
	layer := img.Layers[0].Digest.String()
	base := "/v2/" + repo
	return []question{
		{"HEAD tag", "HEAD", base + "/manifests/v1", nil},
		{"GET tag", "GET", base + "/manifests/v1", nil},
		{"HEAD digest", "HEAD", base + "/manifests/" + img.Digest.String(), nil},
		{"GET digest", "GET", base + "/manifests/" + img.Digest.String(), nil},
		{"HEAD blob", "HEAD", base + "/blobs/" + layer, nil},
		{"GET blob", "GET", base + "/blobs/" + layer, nil},
		{"Range", "GET", base + "/blobs/" + layer, []string{"Range", "bytes=1000-1999"}},
		{"Range beyond", "GET", base + "/blobs/" + layer, []string{"Range", "bytes=999999999-"}},
		{"small blob", "GET", base + "/blobs/" + img.Layers[1].Digest.String(), nil},
		{"referrers", "GET", base + "/referrers/" + img.Digest.String(), nil},
		{"tags", "GET", base + "/tags/list", nil},
	}
}

// reply is what matters of an answer.
type reply struct {
	status    int
	body      [sha256.Size]byte // of a success
	length    string
	digest    string
	challenge string
	source    string
}

func (r reply) ok() bool { return r.status/100 == 2 }

// same compares with the registry's own answer.
func (r reply) same(own reply) bool {
	if r.status != own.status || r.challenge != own.challenge {
		return false
	}
	return !r.ok() || r.body == own.body && (r.length == own.length || own.length == "") && (own.digest == "" || r.digest == own.digest)
}

func (r reply) String() string { return fmt.Sprintf("%d %s %q", r.status, r.source, r.challenge) }

// send sends a question as it is. The caller closes the body.
func (p *private) send(base string, q question, authorization string) *http.Response {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.t.Context(), q.method, base+q.path, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	for i := 0; i < len(q.header); i += 2 {
		req.Header.Set(q.header[i], q.header[i+1])
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		p.t.Fatalf("%s: %v", q.name, err)
	}
	return resp
}

// ask asks a place, for a node with the registry's name.
func (p *private) ask(base string, q question, authorization string) reply {
	p.t.Helper()
	if base != p.reg.URL() {
		q.path += "?ns=" + testRegistry
	}
	resp := p.send(base, q, authorization)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatalf("%s: %v", q.name, err)
	}
	r := reply{status: resp.StatusCode, length: resp.Header.Get("Content-Length"), digest: resp.Header.Get("Docker-Content-Digest"),
		challenge: strings.Join(resp.Header.Values("WWW-Authenticate"), ";"), source: resp.Header.Get("X-Larder-Source")}
	if r.ok() {
		r.body = sha256.Sum256(body)
	}
	if bytes.Contains(body, []byte("HUSH")) {
		p.t.Errorf("%s: the answer shows a credential: %s", q.name, body)
	}
	return r
}

func (p *private) at(node int) string { return "http://" + p.nodes[node].ProxyAddr() }

// pull asks a node for all of an image, at first without a credential, as clients
// do, and waits until it is kept.
func (p *private) pull(node int, who caller, repo string) {
	p.t.Helper()
	p.ask(p.at(node), questions(repo, p.images[repo])[0], "")
	for _, q := range questions(repo, p.images[repo]) {
		if r := p.ask(p.at(node), q, who.auth(p, repo)); !r.ok() && r.status != 416 {
			p.t.Fatalf("%s may not %s of %s: %v", who.name, q.name, repo, r)
		}
	}
	p.nodes[node].settle(p.t)
}

// upstreamState is how the registry is while it is asked.
type upstreamState struct {
	name string
	set  func(p *private) (undo func())
}

var (
	stateUp   = upstreamState{"up", func(*private) func() { return func() {} }}
	stateSlow = upstreamState{"slow", func(p *private) func() {
		p.reg.SetLatency(250 * time.Millisecond)
		return func() { p.reg.SetLatency(0) }
	}}
	state5xx = upstreamState{"5xx", func(p *private) func() {
		return p.reg.Inject(registrytest.Match{}, registrytest.EvenUnauthorized(), registrytest.Status(503)).Remove
	}}
	stateDown = upstreamState{"down", func(p *private) func() {
		p.reg.Down()
		return func() {
			if err := p.reg.Up(); err != nil {
				p.t.Fatal(err)
			}
		}
	}}
)

// TestWhoMayReadWhat is the matrix: caller x where the image is x route x state of the
// registry, for both schemes. What is expected is computed from the registry's
// own answer to the same question with the same credential:
//
//   - up: exactly that answer, challenge included;
//   - slow: that, or an error that sends the client to the registry;
//   - failing or down: that for a caller who had a verdict and for what is public, if
//     it was here; never a success that the registry would not have given.
func TestWhoMayReadWhat(t *testing.T) {
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		for _, warmth := range []struct {
			name   string
			nodes  int
			warm   int // node that has pulled; -1 = none
			states []upstreamState
		}{
			{"cold", 1, -1, []upstreamState{stateUp}},
			{"cold, slow", 1, -1, []upstreamState{stateSlow}},
			{"cold, failing", 1, -1, []upstreamState{state5xx}},
			{"cold, down", 1, -1, []upstreamState{stateDown}},
			{"warm here", 1, 0, []upstreamState{stateUp, stateSlow, state5xx, stateDown}},
			{"warm on a peer", 2, 1, []upstreamState{stateUp, stateSlow, state5xx, stateDown}},
		} {
			t.Run(string(scheme)+"/"+warmth.name, func(t *testing.T) {
				t.Parallel()
				p := newPrivate(t, scheme, warmth.nodes, func(c *Config) {
					if scheme == registrytest.Bearer { // then tags are known from others' questions, too
						c.Upstream.TagTTL = time.Minute
					}
				})
				p.expire()
				own := p.ownAnswers()
				if warmth.warm >= 0 {
					p.pull(warmth.warm, ann, repoA)
					p.pull(warmth.warm, nobody, repoC)
				}
				m := matrix{private: p, own: own, verdict: map[string]bool{}}
				for _, state := range warmth.states {
					undo := state.set(p)
					m.cells(state, warmth.warm >= 0)
					undo()
				}
				if works := !strings.Contains(warmth.name, ","); works != (m.given > 0) && warmth.name != "cold, slow" || m.refused == 0 {
					t.Errorf("%d questions, %d given, %d refused", m.asked, m.given, m.refused)
				}
				t.Logf("%d questions, %d given, %d refused", m.asked, m.given, m.refused)
			})
		}
	}
}

// callers, the right one last: what the others meet is cold or on the peer.
var callers = []caller{nobody, guesser, bob, expired, ann}

// ownAnswers are the registry's, by caller, repository and route.
func (p *private) ownAnswers() map[string]reply {
	own := map[string]reply{}
	for _, who := range append(callers, anybody) {
		for _, repo := range []string{repoA, repoC} {
			for _, q := range questions(repo, p.images[repo]) {
				own[who.name+" "+repo+" "+q.name] = p.ask(p.reg.URL(), q, who.auth(p, repo))
			}
		}
	}
	return own
}

type matrix struct {
	*private
	own                   map[string]reply
	verdict               map[string]bool // who was let read a repository by node 0
	asked, given, refused int
}

func (m *matrix) cells(state upstreamState, warm bool) {
	for _, who := range callers {
		for _, repo := range []string{repoA, repoC} {
			for _, q := range questions(repo, m.images[repo]) {
				m.cell(state, warm, who, repo, q)
			}
		}
	}
}

func (m *matrix) cell(state upstreamState, warm bool, who caller, repo string, q question) {
	m.t.Helper()
	own := m.own[who.name+" "+repo+" "+q.name]
	if repo == repoC && !own.ok() {
		own = m.own[anybody.name+" "+repo+" "+q.name] // he may read it without the credential that is no good
	}
	got := m.ask(m.at(0), q, who.auth(m.private, repo))
	m.asked++
	if got.ok() {
		m.given++
	} else {
		m.refused++
	}
	bad := func(want string) {
		m.t.Errorf("%s, %s, %s of %s: %v, but the registry says %v; want %s", state.name, who.name, q.name, repo, got, own, want)
	}
	standing := m.verdict[who.name+" "+repo] || repo == repoC && m.verdict[nobody.name+" "+repo]
	switch {
	case got.ok() && !got.same(own):
		bad("no success that the registry does not give")
	case state.name == "up" && !got.same(own):
		bad("the same")
	case state.name == "slow" && !got.same(own) && got.status != http.StatusServiceUnavailable:
		bad("the same, or 503")
	case (state.name == "5xx" || state.name == "down") && warm && standing && !got.same(own):
		bad("the same, for the caller is known and the image is here")
	}
	if got.ok() && (state.name == "up" || state.name == "slow") {
		m.verdict[who.name+" "+repo] = true
	}
}

// TestOneDoorDoesNotOpenAnother: who may read a cannot read what is in b by asking for
// it in a: on a hit, on a miss, on another node, by any route; and the registry of
// his own that lists it is of no use to him. The registry's own answer is the measure.
func TestOneDoorDoesNotOpenAnother(t *testing.T) {
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		t.Run(string(scheme), func(t *testing.T) {
			evil := registrytest.Start(t, registrytest.Options{})
			p := newPrivate(t, scheme, 2, func(c *Config) {
				c.Registries = append(slices.Clone(c.Registries), upstream.Registry{Host: "evil.example.test", Upstreams: []string{evil.URL()}})
			})
			secret := p.images[repoB]
			// The manifest of b in another registry, without the blobs that it lists.
			p.listed(evil, "mirror/b", secret)
			for _, place := range []string{"miss", "on a peer", "hit"} {
				switch place {
				case "on a peer":
					p.pull(1, bob, repoB)
				case "hit":
					p.pull(0, bob, repoB)
				}
				p.pull(0, ann, repoA)
				for _, q := range questions(repoA, secret) {
					if strings.HasSuffix(q.name, "tag") || q.name == "tags" {
						continue // these are a's own
					}
					for _, who := range []caller{ann, bob, nobody} {
						own := p.ask(p.reg.URL(), q, who.auth(p, repoA))
						got := p.ask(p.at(0), q, who.auth(p, repoA))
						if !got.same(own) || got.ok() && q.name != "referrers" {
							t.Errorf("%s, %s, %s: %v, but the registry says %v", place, who.name, q.name, got, own)
						}
					}
				}
				for _, q := range questions("mirror/b", secret) {
					r := p.askOther("evil.example.test", q)
					if r.ok() && strings.Contains(q.name, "blob") || r.ok() && q.name == "Range" {
						t.Errorf("%s: %s of another registry that lists it: %v", place, q.name, r)
					}
				}
			}
		})
	}
}

// listed publishes an image's manifest without its blobs.
func (p *private) listed(reg *registrytest.Server, repo string, img *registrytest.Image) {
	bare := *img
	bare.Blobs = map[digest.Digest]registrytest.Content{}
	reg.Put(repo, &bare, "theirs")
}

// TestListedElsewhere: a registry that takes, or gives, a manifest without a look at what
// it lists opens by that nothing of another repository, wherever that is cached.
func TestListedElsewhere(t *testing.T) {
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		t.Run(string(scheme), func(t *testing.T) {
			p := newPrivate(t, scheme, 3, nil)
			secret := p.images[repoB]
			p.listed(p.reg, repoA, secret)
			p.pull(1, bob, repoB)
			for _, node := range p.nodes {
				eventually(t, "told of by the index", func() error {
					for _, blob := range secret.Layers {
						if !node.cache.Has(blob.Digest) && !node.swarm.Holds(blob.Digest) {
							return fmt.Errorf("%s is unknown", blob.Digest)
						}
					}
					return nil
				})
			}
			for node := range p.nodes {
				if node == 2 {
					p.pull(2, bob, repoB)
				}
				tag := question{"GET tag", "GET", "/v2/" + repoA + "/manifests/theirs", nil}
				if r := p.ask(p.at(node), tag, ann.auth(p, repoA)); !r.ok() {
					t.Fatalf("node %d: %v", node, r)
				}
				for _, blob := range secret.Layers {
					q := question{"GET blob", "GET", "/v2/" + repoA + "/blobs/" + blob.Digest.String(), nil}
					if r := p.ask(p.at(node), q, ann.auth(p, repoA)); r.status != 404 {
						t.Errorf("node %d gives %s: %v", node, blob.Digest, r)
					}
				}
			}
		})
	}
}

// askOther asks node 0 about another registry.
func (p *private) askOther(host string, q question) reply {
	p.t.Helper()
	q.path += "?ns=" + host
	req, err := http.NewRequestWithContext(p.t.Context(), q.method, p.at(0)+q.path, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	for i := 0; i < len(q.header); i += 2 {
		req.Header.Set(q.header[i], q.header[i+1])
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		p.t.Fatal(err)
	}
	return reply{status: resp.StatusCode, source: resp.Header.Get("X-Larder-Source")}
}

// TestGivenOnceIsEnough: the same content in two registries is two registries'
// content; when the second has given it, what is here serves both.
func TestGivenOnceIsEnough(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 1, nil)
	other := registrytest.Start(t, registrytest.Options{})
	img := p.images[repoB]
	other.Put("mirror/b", img, "v1")
	c := p.config()
	c.Registries = append(slices.Clone(c.Registries), upstream.Registry{Host: "other.example.test", Upstreams: []string{other.URL()}})
	p.nodes = []*running{start(t, c)}
	p.pull(0, bob, repoB)
	blob := question{"GET blob", "GET", "/v2/mirror/b/blobs/" + img.Layers[0].Digest.String(), nil}
	tag := question{"GET tag", "GET", "/v2/mirror/b/manifests/v1", nil}
	gets := registrytest.Match{Kind: registrytest.Blob, Method: "GET"}
	p.askOther("other.example.test", tag)
	for i, want := range []string{"upstream", "disk"} {
		if r := p.askOther("other.example.test", blob); !r.ok() || r.source != want || other.Count(gets) != 1 {
			t.Errorf("request %d: %v, want it from %s; %d GETs", i, r, want, other.Count(gets))
		}
	}
}

// TestPeersGiveWhatIsPrivate: a node whose caller may read an image gets it from its
// peer and not from the registry, and refuses the stranger all the same.
func TestPeersGiveWhatIsPrivate(t *testing.T) {
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		t.Run(string(scheme), func(t *testing.T) {
			p := newPrivate(t, scheme, 3, nil)
			p.pull(1, ann, repoA)
			gets := registrytest.Match{Kind: registrytest.Blob, Method: "GET"}
			before := p.reg.Count(gets)
			from := map[string]int{}
			for _, q := range questions(repoA, p.images[repoA]) {
				if r := p.ask(p.at(0), q, nobody.auth(p, repoA)); r.status != 401 {
					t.Errorf("%s without a credential: %v", q.name, r)
				}
				if strings.HasPrefix(q.name, "GET blob") || q.name == "small blob" || q.name == "GET digest" {
					from[p.ask(p.at(0), q, ann.auth(p, repoA)).source]++
				}
			}
			// What node 0 fetched for node 1, as its home, is on its own disk.
			if from["disk"]+from["peer"] != 3 || from["peer"] == 0 || p.reg.Count(gets) != before {
				t.Errorf("manifest and blobs from %v, and %d from the registry", from, p.reg.Count(gets)-before)
			}
		})
	}
}

// authorized are requests that carried a credential of the caller's own.
func (p *private) authorized(m registrytest.Match) (n int, credentials map[string]int) {
	credentials = map[string]int{}
	for _, sent := range p.reg.Seen(m) {
		if sent != "" {
			n++
			credentials[sent]++
		}
	}
	return n, credentials
}

// storm has all nodes pull an image at the same moment, with containerd's own
// resolver and what kubelet would pass.
func (p *private) storm(repo string, auth *runtimetest.Auth) {
	p.t.Helper()
	var pulls sync.WaitGroup
	for i, n := range p.nodes {
		c := p.containerd(n)
		pulls.Go(func() {
			if _, err := c.Pull(p.t.Context(), testRegistry+"/"+repo+":v1", auth); err != nil {
				p.t.Errorf("node %d: %v", i, err)
			}
		})
	}
	pulls.Wait()
}

// containerd has a node as its mirror, and nothing behind it: what the node does
// not give fails the pull.
func (p *private) containerd(n *running) *runtimetest.Containerd {
	p.t.Helper()
	certs := p.t.TempDir()
	dir := filepath.Join(certs, testRegistry)
	toml := "server = \"http://127.0.0.1:1\"\n\n[host.\"http://" + n.ProxyAddr() + "\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(toml), 0o644)); err != nil {
		p.t.Fatal(err)
	}
	return &runtimetest.Containerd{CertsDir: certs, Root: filepath.Join(p.t.TempDir(), "content")}
}

// TestWhatASecretCosts pins the requests of a cold storm: O(1) for a public image
// on a registry that gives nothing without a token, and for a private one besides
// that one HEAD for each credential.
func TestWhatASecretCosts(t *testing.T) {
	n := 20
	if testing.Short() {
		n = 6
	}
	heads := registrytest.Match{Role: registrytest.Registry, Kind: registrytest.Manifest, Method: "HEAD"}
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		t.Run(string(scheme), func(t *testing.T) {
			p := newPrivate(t, scheme, n, func(c *Config) {
				c.Upstream.TagTTL = time.Minute
				c.Proxy.FirstByteBudget = 10 * time.Second // twenty agents and their clients share this machine
			})
			p.storm(repoC, nil)
			if got := p.reg.Count(registrytest.Match{Role: registrytest.Registry, Repository: repoC}); got > 10 {
				t.Errorf("public: %d requests at the registry, want a few", got)
			}
			if got := p.reg.Count(registrytest.Match{Role: registrytest.TokenServer}); got > 6 {
				t.Errorf("public: %d at the token service", got)
			}
			p.once(repoC)

			p.reg.ResetCounts()
			p.storm(repoA, &runtimetest.Auth{Username: "ann", Password: "HUSH-ann"})
			inA := heads
			inA.Repository = repoA
			total, credentials := p.authorized(inA)
			for _, times := range credentials {
				if times > 1 {
					t.Errorf("private: %d HEADs for one credential", times)
				}
			}
			// containerd gets two tokens for a pull; "anyone" has some as well, of which each home makes its own.
			if want := map[registrytest.Scheme]int{registrytest.Basic: 1, registrytest.Bearer: 2*n + 3}[scheme]; len(credentials) > want {
				t.Errorf("private: %d credentials, want at most %d", len(credentials), want)
			}
			if bare := p.reg.Count(inA) - total; bare > 6 {
				t.Errorf("private: %d HEADs without a credential", bare)
			}
			p.once(repoA)
		})
	}
}

// once fails if the registry gave something of a repository more than once.
func (p *private) once(repo string) {
	p.t.Helper()
	for _, d := range append(slices.Collect(maps.Keys(p.images[repo].Blobs)), p.images[repo].Digest) {
		given := 0
		for _, status := range []int{200, 206} {
			given += p.reg.Count(registrytest.Match{Repository: repo, Reference: d.String(), Method: "GET", Status: status})
		}
		if given != 1 {
			p.t.Errorf("%s: %d answers with %s", repo, given, d)
		}
	}
}

// TestWarmSaysWhatIsPrivate: who warms a private image is told what to do.
func TestWarmSaysWhatIsPrivate(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 1, nil)
	_, err := Puller{Proxy: p.at(0), Client: p.nodes[0].client}.Pull(t.Context(), Image{Registry: testRegistry, Repository: repoA, Reference: "v1"})
	if err == nil || !strings.Contains(err.Error(), `auth = "node"`) {
		t.Errorf("%v", err)
	}
}

package agent

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/logtest"
	"github.com/larder-cache/larder/test/registrytest"
)

// offline sets what a registry's table says of outages.
func offline(mode string) func(*Config) {
	return func(c *Config) {
		c.Registries = slices.Clone(c.Registries)
		c.Registries[0].Offline = mode
	}
}

// lone starts one agent that can be restarted on its directory.
func (p *private) lone(opts ...Option) (restart func()) {
	c := p.config()
	p.nodes = []*running{start(p.t, c, opts...)}
	return func() {
		if err := p.nodes[0].stop(p.t); err != nil {
			p.t.Fatal(err)
		}
		p.nodes[0] = start(p.t, c, opts...)
	}
}

// content are the routes whose answers are kept on disk: manifests and blobs.
func content(repo string, img *registrytest.Image) []question {
	return slices.DeleteFunc(questions(repo, img), func(q question) bool {
		return q.name == "referrers" || q.name == "tags" || q.name == "Range beyond"
	})
}

// TestOffline holds what private content is served to whom while the registry is
// down, and after a restart during that: by mode, scheme and caller.
func TestOffline(t *testing.T) {
	const served, asked, unknown = 2, 401, 503 // 2xx, the registry's challenge, go direct
	for _, tc := range []struct {
		mode    string
		scheme  registrytest.Scheme
		nobody  int // after the restart, for private content
		guesser int
		ann     int
	}{
		{"", registrytest.Basic, asked, unknown, served},
		{"remembered", registrytest.Basic, asked, unknown, served},
		{"remembered", registrytest.Bearer, unknown, unknown, served}, // with the very token that was good before
		{"all", registrytest.Basic, served, served, served},
		{"all", registrytest.Bearer, served, served, served},
		{"none", registrytest.Basic, unknown, unknown, unknown},
		{"none", registrytest.Bearer, unknown, unknown, unknown},
	} {
		t.Run(fmt.Sprintf("%q, %s", tc.mode, tc.scheme), func(t *testing.T) {
			t.Parallel()
			p := newPrivate(t, tc.scheme, 0, offline(tc.mode))
			restart := p.lone()
			p.pull(0, ann, repoA)
			p.pull(0, nobody, repoC)
			p.pull(0, bob, repoB)
			p.reg.Down()
			p.want("the registry is down", ann, repoA, served) // by the verdict in memory, in every mode
			restart()
			p.want("restarted", nobody, repoA, tc.nobody)
			p.want("restarted", guesser, repoA, tc.guesser)
			p.want("restarted", ann, repoA, tc.ann)
			p.want("restarted", nobody, repoC, served)
			// What may be served of a is not what is in b.
			for _, q := range questions(repoA, p.images[repoB]) {
				if strings.Contains(q.name, "tag") || q.name == "referrers" {
					continue
				}
				if r := p.ask(p.at(0), q, ann.auth(p, repoA)); r.ok() {
					t.Errorf("%s of b in a: %v", q.name, r)
				}
			}
		})
	}
}

// TestRememberedInANewDirectory: who is let in after somebody has deleted the cache
// directory is remembered over a restart, as before.
func TestRememberedInANewDirectory(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 0, nil)
	restart := p.lone()
	dir := p.nodes[0].config.Cache.Dir
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "made anew", func() error {
		_, err := os.Stat(filepath.Join(dir, "metadata.db"))
		return err
	})
	p.pull(0, ann, repoA)
	p.reg.Down()
	restart()
	p.want("after the restart", ann, repoA, 2)
	p.want("after the restart", guesser, repoA, 503)
}

// TestRememberedInAMountedDirectory: where a directory of another time, with a key of its
// own, takes the place of the cache's, who is let in then is remembered as well.
func TestRememberedInAMountedDirectory(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 0, nil)
	restart := p.lone()
	dir, meta := p.nodes[0].config.Cache.Dir, func() *cache.Meta { return p.nodes[0].cache.Meta() }
	p.pull(0, ann, repoA)
	if err := p.nodes[0].stop(t); err != nil {
		t.Fatal(err)
	}
	move := func(from, to string) {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	move(dir, dir+".other")
	p.nodes[0] = start(t, p.nodes[0].config)
	move(dir, dir+".hidden")
	move(dir+".other", dir)
	eventually(t, "what the mounted directory knows", func() error {
		if _, ok := meta().Tag(cache.Repository{Registry: testRegistry, Name: repoA}, "v1"); !ok {
			return errors.New("the tag is not known")
		}
		return nil
	})
	p.pull(0, bob, repoB)
	p.reg.Down()
	restart()
	p.want("after the restart", bob, repoB, 2)
	p.want("after the restart", ann, repoA, 2)
}

// want asks node 0 for all content of a repository. class is a status, or 2 for
// a success.
func (p *private) want(when string, who caller, repo string, class int) {
	p.t.Helper()
	for _, q := range content(repo, p.images[repo]) {
		r := p.ask(p.at(0), q, who.auth(p, repo))
		if r.status != class && r.status/100 != class {
			p.t.Errorf("%s: %s of %s for %s: %v, want %d", when, q.name, repo, who.name, r, class)
		}
		if when == "restarted" && class == 401 && (!strings.HasPrefix(r.challenge, "Basic ") || strings.Contains(r.challenge, "Bearer")) {
			p.t.Errorf("%s: the challenge %q cannot be answered now", when, r.challenge)
		}
	}
}

// TestNoContact: a registry that may never be asked has no verdicts; what is here
// is for everybody, unless the operator says otherwise.
func TestNoContact(t *testing.T) {
	for mode, class := range map[string]int{"": 2, "all": 2, "remembered": 503, "none": 503} {
		p := newPrivate(t, registrytest.Basic, 0, nil)
		c := p.config()
		p.nodes = []*running{start(t, c)}
		p.pull(0, ann, repoA)
		if err := p.nodes[0].stop(t); err != nil {
			t.Fatal(err)
		}
		c.Registries = slices.Clone(c.Registries)
		c.Registries[0].ContactUpstream, c.Registries[0].Offline = new(false), mode
		p.nodes = []*running{start(t, c)}
		p.want("no contact, offline = "+mode, guesser, repoA, class)
	}
}

// TestRevoked: a no of the registry ends what was granted, in memory and what would
// be remembered, at once and for good.
func TestRevoked(t *testing.T) {
	for _, status := range []int{401, 403} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			p := newPrivate(t, registrytest.Basic, 0, nil)
			restart := p.lone()
			p.pull(0, ann, repoA)
			p.pull(0, nobody, repoC)
			f := p.reg.Inject(registrytest.Match{}, registrytest.Status(status))
			for _, c := range []struct {
				who  caller
				repo string
			}{{ann, repoA}, {nobody, repoC}} {
				tag := content(c.repo, p.images[c.repo])[0]
				if r := p.ask(p.at(0), tag, c.who.auth(p, c.repo)); r.status != status {
					t.Fatalf("%s of %s: %v", tag.name, c.repo, r)
				}
				p.want("revoked", c.who, c.repo, status)
			}
			f.Remove()
			p.reg.Down()
			for _, when := range []string{"down", "restarted"} {
				for _, q := range content(repoA, p.images[repoA]) {
					if r := p.ask(p.at(0), q, ann.auth(p, repoA)); r.ok() {
						t.Errorf("%s: %s of what was revoked: %v", when, q.name, r)
					}
				}
				for _, q := range content(repoC, p.images[repoC]) {
					if r := p.ask(p.at(0), q, ""); r.ok() {
						t.Errorf("%s: %s of what is public no more: %v", when, q.name, r)
					}
				}
				restart()
			}
		})
	}
}

// TestTokensEnd: a verdict ends with the token, which the registry is asked about
// again then.
func TestTokensEnd(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: registrytest.Auth{
		Scheme: registrytest.Bearer, Users: map[string]string{"ann": "HUSH-ann"}, TokenLife: 3 * time.Second,
	}})
	p := &private{t: t, scheme: registrytest.Bearer, reg: reg, tokens: map[string]string{}, images: map[string]*registrytest.Image{
		repoA: registrytest.OCIImage(registrytest.ImageSpec{Seed: 41, Layers: []int64{1000, 10}, Opaque: true})}}
	reg.Put(repoA, p.images[repoA], "v1")
	p.next = clusterConfigs(t, upstream.Registry{Host: testRegistry, Upstreams: []string{reg.URL()}})
	p.lone()
	blob := questions(repoA, p.images[repoA])[5]
	token := ann.auth(p, repoA)
	heads := registrytest.Match{Method: "HEAD"}
	for range 5 {
		if r := p.ask(p.at(0), blob, token); !r.ok() {
			t.Fatalf("%v", r)
		}
	}
	if got := reg.Count(heads); got != 1 {
		t.Errorf("%d HEADs for one token", got)
	}
	eventually(t, "refused when the token has ended", func() error {
		r := p.ask(p.at(0), blob, token)
		if r.ok() {
			return fmt.Errorf("%v", r)
		}
		if r.status != 401 || !strings.Contains(r.challenge, `error="invalid_token"`) {
			t.Fatalf("%v", r)
		}
		return nil
	})
	if reg.Count(heads) < 2 {
		t.Error("nobody asked the registry again")
	}
}

// TestTokenServiceDown: a challenge that nobody could answer is not sent, and who
// has a token already is served.
func TestTokenServiceDown(t *testing.T) {
	for mode, class := range map[string]int{"remembered": 503, "all": 2} {
		p := newPrivate(t, registrytest.Bearer, 0, offline(mode))
		restart := p.lone()
		p.pull(0, ann, repoA)
		token := ann.auth(p, repoA)
		p.reg.Inject(registrytest.Match{Role: registrytest.TokenServer}, registrytest.Status(503))
		restart()
		p.want("token service down, "+mode, nobody, repoA, class)
		for _, q := range questions(repoA, p.images[repoA]) {
			if r := p.ask(p.at(0), q, token); !r.ok() && r.status != 416 {
				t.Errorf("%s with a token: %v", q.name, r)
			}
		}
	}
}

// pathEncoded asks as CRI-O and podman do: the registry is in the path.
func (p *private) pathEncoded(q question, authorization string) reply {
	p.t.Helper()
	q.path = "/v2/" + testRegistry + strings.TrimPrefix(q.path, "/v2")
	resp := p.send(p.at(0), q, authorization)
	resp.Body.Close()
	return reply{status: resp.StatusCode, challenge: resp.Header.Get("WWW-Authenticate")}
}

// TestPathEncodedClients: they send a mirror no credential, so what is private is
// 404 from the manifest on, cached or not, and never a challenge.
func TestPathEncodedClients(t *testing.T) {
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		p := newPrivate(t, scheme, 1, nil)
		for _, when := range []string{"cold", "warm"} {
			for _, authorization := range []string{"", "Basic Og=="} { // with nothing, and with an empty name and password
				for _, q := range questions(repoA, p.images[repoA]) {
					if r := p.pathEncoded(q, authorization); r.status != 404 || r.challenge != "" {
						t.Errorf("%s, %s, %s: %v", scheme, when, q.name, r)
					}
				}
				for _, q := range content(repoC, p.images[repoC]) {
					if r := p.pathEncoded(q, authorization); !r.ok() {
						t.Errorf("%s, %s, %s of what is public: %v", scheme, when, q.name, r)
					}
				}
			}
			p.pull(0, ann, repoA)
		}
	}
}

// TestHomesWithCredentials: a home that can open a repository with its own
// credentials makes it public for nobody: a node that relays asks its own callers for
// theirs, and nodes that share are let in by homes that share.
func TestHomesWithCredentials(t *testing.T) {
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		t.Run(string(scheme), func(t *testing.T) {
			made := 0
			p := newPrivate(t, scheme, 0, func(c *Config) {
				if made++; made == 1 {
					return // the first node relays
				}
				file := filepath.Join(t.TempDir(), "config.json")
				replace(t, file, `{"auths":{"`+testRegistry+`":{"username":"root","password":"HUSH-root"}}}`)
				c.Registries = slices.Clone(c.Registries)
				c.Registries[0].Auth, c.Registries[0].CredentialsFile = "node", file
			})
			p.reg.AddUser("root", "HUSH-root")
			var repos []string
			for i := range 6 { // of which each node is home of some
				repo := fmt.Sprintf("team/n%d", i)
				p.images[repo] = registrytest.OCIImage(registrytest.ImageSpec{Seed: 80 + uint64(i), Layers: []int64{300 << 10, 1 << 10}, Opaque: true})
				p.reg.Put(repo, p.images[repo], "v1")
				repos = append(repos, repo)
			}
			p.nodes = startCluster(t, 3, p.config)
			for _, repo := range repos {
				for _, when := range []string{"cold", "warm elsewhere"} {
					for _, q := range questions(repo, p.images[repo]) {
						if r := p.ask(p.at(0), q, ""); r.status != 401 {
							t.Errorf("%s, %s of %s at the node that relays: %v", when, q.name, repo, r)
						}
					}
					p.pull(1, nobody, repo)
				}
				p.pull(2, nobody, repo)
				gets := registrytest.Match{Repository: repo, Kind: registrytest.Blob, Method: "GET", Status: 200}
				if got := p.reg.Count(gets); got > 2 {
					t.Errorf("%s: %d GETs of two blobs", repo, got)
				}
			}
		})
	}
}

// TestNothingShowsASecret plants credentials of every kind, makes everything go
// wrong that can, and looks for them wherever somebody could.
func TestNothingShowsASecret(t *testing.T) {
	for _, scheme := range []registrytest.Scheme{registrytest.Basic, registrytest.Bearer} {
		t.Run(string(scheme), func(t *testing.T) {
			logged := &logtest.Buffer{}
			audit := filepath.Join(t.TempDir(), "audit.jsonl")
			p := newPrivate(t, scheme, 2, func(c *Config) { c.Audit.File = audit }, WithLogger(slog.New(slog.NewTextHandler(logged, &slog.HandlerOptions{Level: slog.LevelDebug}))))
			p.expire()
			ask := func() {
				for _, who := range callers {
					for _, repo := range []string{repoA, repoB} {
						for _, q := range questions(repo, p.images[repo]) {
							for i := range p.nodes {
								p.ask(p.at(i), q, who.auth(p, repo))
							}
						}
					}
				}
			}
			ask()
			f := p.reg.Inject(registrytest.Match{}, registrytest.EvenUnauthorized(), registrytest.Status(500))
			ask()
			f.Remove()
			p.reg.Down()
			ask()
			p.ask(p.at(0), questions(repoA, p.images[repoA])[5], basicAuth("eve", "HUSH-eve"))

			secrets := p.secrets()
			shown := func(where, text string) {
				for _, s := range secrets {
					if strings.Contains(text, s) {
						t.Errorf("%s shows %.60q", where, s)
					}
				}
			}
			for _, n := range p.nodes {
				n.settle(t)
				for _, path := range []string{"/metrics", "/api/v1/status", "/api/v1/explain?image=" + testRegistry + "/" + repoA + ":v1", "/",
					"/debug/pprof/goroutine?debug=1", "/debug/pprof/goroutine?debug=2", "/debug/pprof/heap?debug=1", "/debug/pprof/cmdline"} {
					_, body := n.admin(t, "GET", path, "")
					shown(path, body)
				}
				if err := n.stop(t); err != nil {
					t.Fatal(err)
				}
				p.grep(n.config.Cache.Dir, shown)
			}
			shown("the log", logged.String())
			p.grep(filepath.Dir(audit), shown)
			p.checkAudit(audit)
		})
	}
}

// secrets are what no place may show: passwords, headers and tokens, in the forms
// that they have on the way.
func (p *private) secrets() []string {
	out := []string{"HUSH", base64.StdEncoding.EncodeToString([]byte("ann:HUSH-ann")), base64.StdEncoding.EncodeToString([]byte("bob:HUSH-bob"))}
	for _, t := range p.tokens {
		_, token, _ := strings.Cut(t, " ")
		out = append(out, token)
	}
	return out
}

// grep looks into every file below a directory.
func (p *private) grep(dir string, shown func(where, text string)) {
	p.t.Helper()
	files := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		files++
		body, err := os.ReadFile(path)
		shown(path, string(body))
		return err
	})
	if err != nil || files == 0 {
		p.t.Errorf("%s: %d files, %v", dir, files, err)
	}
}

// checkAudit holds what the audit log says of who asked.
func (p *private) checkAudit(path string) {
	p.t.Helper()
	body, err := os.ReadFile(path)
	if err != nil {
		p.t.Fatal(err)
	}
	decided, callers := map[string]int{}, map[string]bool{}
	for line := range bytes.Lines(body) {
		var l auditLine
		if err := json.Unmarshal(line, &l); err != nil {
			p.t.Fatalf("%s: %v", line, err)
		}
		decided[l.Decision]++
		callers[l.Caller] = true
		if l.Decision == "granted" && len(l.Caller) != 12 {
			p.t.Errorf("a pull without its caller: %s", line)
		}
	}
	for _, want := range []string{"granted", "refused", "unknown"} {
		if decided[want] == 0 {
			p.t.Errorf("no line says %s: %v", want, decided)
		}
	}
	if decided["challenged"] > 0 || len(callers) < 4 {
		p.t.Errorf("decisions %v, callers %v", decided, callers)
	}
}

// TestListsAreTheirs: a list that one caller got is served to that caller alone when
// the registry is down.
func TestListsAreTheirs(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 0, nil)
	p.lone()
	lists := questions(repoA, p.images[repoA])[9:]
	for _, q := range append(content(repoA, p.images[repoA]), lists...) {
		if r := p.ask(p.at(0), q, ann.auth(p, repoA)); !r.ok() {
			t.Fatalf("%s: %v", q.name, r)
		}
	}
	p.reg.Down()
	for _, q := range lists {
		if r := p.ask(p.at(0), q, ann.auth(p, repoA)); !r.ok() || r.source != "stale" {
			t.Errorf("%s for ann: %v", q.name, r)
		}
		for _, who := range []caller{nobody, guesser, bob} {
			if r := p.ask(p.at(0), q, who.auth(p, repoA)); r.ok() {
				t.Errorf("%s for %s: %v", q.name, who.name, r)
			}
		}
	}
}

// TestTagsThatNoHomeKnows: a node that was alone has pulled images; then others come,
// which become the homes of most of these repositories, and the registry goes. The
// others pull by tag what one node remembers, and the registry showed to anyone.
func TestTagsThatNoHomeKnows(t *testing.T) {
	p := newPrivate(t, registrytest.Basic, 1, nil)
	repos := []string{repoC}
	for i := range 7 { // the first node is a home of some, but hardly of all
		repo := fmt.Sprintf("open/more%d", i)
		p.images[repo] = registrytest.OCIImage(registrytest.ImageSpec{Seed: 60 + uint64(i), Layers: []int64{10 << 10, 1 << 10}, Opaque: true})
		p.reg.Put(repo, p.images[repo], "v1")
		repos = append(repos, repo)
	}
	known := 0
	for _, repo := range repos {
		p.pull(0, nobody, repo)
		known += 2 + len(p.images[repo].Layers) // the tag and the manifest, and what pull asks for
	}
	p.pull(0, ann, repoA)
	for range 7 {
		p.nodes = append(p.nodes, start(t, p.config()))
	}
	for _, n := range p.nodes {
		n.awaitMembers(t, len(p.nodes))
	}
	for _, n := range p.nodes[1:] {
		eventually(t, "knows what the first has", func() error {
			if got := n.swarm.Status().Index.Blobs; got < known {
				return fmt.Errorf("%d of %d", got, known)
			}
			return nil
		})
	}
	p.reg.Down()
	for i, repo := range repos {
		for _, q := range content(repo, p.images[repo]) {
			if q.name == "HEAD blob" {
				continue // no runtime asks for the size of what it lacks; the registry alone can tell
			}
			if r := p.ask(p.at(1+i%7), q, ""); !r.ok() {
				t.Errorf("%s of %s at %s: %v", q.name, repo, p.nodes[1+i%7].config.Peer.Name, r)
			}
		}
	}
	for _, who := range []caller{nobody, guesser, bob, ann} {
		if r := p.ask(p.at(3), content(repoA, p.images[repoA])[0], who.auth(p, repoA)); r.ok() {
			t.Errorf("%s got a private tag from a node that has not let him in: %v", who.name, r)
		}
	}
}

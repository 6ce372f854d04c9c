package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Those who pull, as kubelet hands on their pull secrets: without a server.
var (
	asAnn   = &cri.AuthConfig{Username: ann.Username, Password: ann.Password}
	asBob   = &cri.AuthConfig{Username: "bob", Password: passwords["bob"]}
	asWrong = &cri.AuthConfig{Username: ann.Username, Password: "wrong"}
)

// strangers may read nothing that is private.
var strangers = map[string]*cri.AuthConfig{"nobody": nil, "wrong password": asWrong}

// given counts the answers of the agent that had something of an image in them.
func (a *agent) given() (n float64) {
	a.t.Helper()
	for _, kind := range []string{"blob", "manifest"} {
		for _, code := range []string{"200", "206"} {
			n += a.metric("larder_requests_total", fmt.Sprintf("kind=%q", kind), fmt.Sprintf("code=%q", code))
		}
	}
	return n
}

// private is one node, an agent on it, and a registry that asks for credentials.
type private struct {
	t *testing.T
	c *containerd
	r *registry
	a *agent
}

// try pulls as somebody, for as long as a pull may take.
func (p *private) try(ref string, auth *cri.AuthConfig) error {
	ctx, cancel := context.WithTimeout(p.t.Context(), pullTimeout)
	defer cancel()
	return p.c.pull(ctx, ref, auth)
}

// refused: the pull fails, and nothing of an image left the agent for it.
func (p *private) refused(what, ref string, auth *cri.AuthConfig) {
	p.t.Helper()
	before := p.a.given()
	if err := p.try(ref, auth); err == nil {
		p.t.Errorf("%s pulled %s", what, ref)
		p.c.remove(ref)
	}
	if after := p.a.given(); after != before {
		p.t.Errorf("%s was refused %s, but got %v answers from the agent", what, ref, after-before)
	}
}

// pulled: the pull works, through the agent. It returns what the registry saw.
func (p *private) pulled(what, ref string, auth *cri.AuthConfig) accessList {
	p.t.Helper()
	start := time.Now()
	before := p.a.given()
	seen := p.r.during(func() {
		if err := p.try(ref, auth); err != nil {
			p.t.Fatalf("%s: pull %s: %v", what, ref, err)
		}
	})
	p.t.Logf("%-8s %s: %v, %d blob requests at the registry, %d by containerd itself", what, ref,
		time.Since(start).Round(time.Millisecond), len(blobReads(seen)), len(byRuntime(seen)))
	wantThroughAgent(p.t, what, seen)
	if p.a.given() < before+float64(len(ordinarySizes)+2) {
		p.t.Errorf("%s: the agent did not give the whole image", what)
	}
	p.c.remove(ref)
	return seen
}

// names are those of an image, by tag and by digest.
func names(host string, img pushed) []string {
	return []string{host + "/" + img.repository + ":" + img.tag, host + "/" + img.repository + "@" + img.digest.String()}
}

// lifecycle: strangers are refused before and after ann has pulled, whichever way
// they name the image; what ann pulls again is not asked for again.
func (p *private) lifecycle(img pushed) {
	p.t.Helper()
	for _, ref := range names(p.r.addr, img) {
		for who, auth := range strangers {
			p.refused(who+", cold", ref, auth)
		}
	}
	if seen := p.pulled("cold", names(p.r.addr, img)[0], asAnn); len(blobReads(seen)) < len(ordinarySizes)+1 {
		p.t.Errorf("cold: want each blob from the registry, it saw %v", seen)
	}
	for _, ref := range names(p.r.addr, img) {
		if blobs := blobReads(p.pulled("warm", ref, asAnn)); len(blobs) > 0 {
			p.t.Errorf("warm: want no blob request, the registry saw %v", blobs)
		}
		for who, auth := range strangers {
			p.refused(who+", warm", ref, auth)
		}
	}
	p.closed(img)
}

// closed asks the agent for what it holds, as no runtime does: straight for a blob
// or manifest, all or part of it, with no credential and with a wrong one.
func (p *private) closed(img pushed) {
	p.t.Helper()
	for _, path := range []string{"/blobs/" + img.layers[0].String(), "/manifests/" + img.digest.String(), "/manifests/" + img.tag} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			for _, authorization := range []string{"", basic(authn.Basic{Username: ann.Username, Password: "wrong"}), "Bearer x.y.z"} {
				p.wantUnauthorized(method, "/v2/"+img.repository+path, authorization)
			}
		}
	}
}

func (p *private) wantUnauthorized(method, path, authorization string) {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.t.Context(), method, "http://"+p.a.proxy+path+"?ns="+p.r.addr, http.NoBody)
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Range", "bytes=0-9")
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := p.r.client().Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusUnauthorized || resp.Header.Get("WWW-Authenticate") == "" {
		p.t.Errorf("%s %s with %q: %s %v %.100s %v, want 401 and a challenge", method, path, authorization, resp.Status, resp.Header, body, err)
	}
}

// outage: the registry is gone, and so is what the agent had in memory. By
// offline mode, ann can pull what she pulled before, or not, and so can strangers.
func (p *private) outage(ref string, annMay map[string]bool) {
	p.t.Helper()
	for _, mode := range []string{"remembered", "none", "all"} {
		p.a.stop()
		p.a = startAgent(p.t, agentOptions{containerd: p.c, cacheDir: p.a.dir,
			config: registryTable(p.r.addr, p.r) + fmt.Sprintf("offline = %q\n", mode)})
		before := p.a.given()
		switch err := p.try(ref, asAnn); {
		case (err == nil) != annMay[mode]:
			p.t.Errorf("offline = %q: ann's pull: %v", mode, err)
		case err == nil:
			p.c.remove(ref)
		case p.a.given() > before:
			p.t.Errorf("offline = %q: ann was refused, and got something", mode)
		}
		for who, auth := range strangers {
			if mode != "all" {
				p.refused(who+", offline = "+mode, ref, auth)
			} else if err := p.try(ref, auth); err != nil {
				p.t.Errorf("offline = %q: %s: %v", mode, who, err)
			} else {
				p.c.remove(ref)
			}
		}
	}
}

func newPrivate(t *testing.T, v containerdVersion, r *registry) *private {
	t.Helper()
	c := startContainerd(t, v)
	return &private{t: t, c: c, r: r, a: startAgent(t, agentOptions{containerd: c, config: registryTable(r.addr, r)})}
}

// TestPrivateBasic is a node's life with images behind passwords.
func TestPrivateBasic(t *testing.T) {
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			p := newPrivate(t, v, startPrivateRegistry(t, distV3))
			img, ref := p.r.pushPrivate("a/app", 700)
			p.lifecycle(img)
			p.r.stop()
			p.outage(ref, map[string]bool{"remembered": true, "all": true})
		})
	}
}

// TestPrivateToken is the same with tokens, which are new for each pull: so none is
// remembered. Here users differ in what they may read, and some of it is public.
func TestPrivateToken(t *testing.T) {
	for _, v := range containerdVersions {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			tokens := startTokenServer(t, listen(t))
			p := newPrivate(t, v, startGuarded(t, distV3, net.JoinHostPort("127.0.0.1", strconv.Itoa(freePort(t))), tokens.auth(), tokens.pusher))
			mine, ref := p.r.pushPrivate("a/app", 710)
			_, bobs := p.r.pushPrivate("b/app", 720)
			_, public := p.r.pushPrivate("public/app", 730)
			p.lifecycle(mine)
			p.pulled("bob's", bobs, asBob)
			p.refused("bob", ref, asBob)
			p.pulled("public", public, nil)
			if blobs := blobReads(p.pulled("public", public, nil)); len(blobs) > 0 {
				t.Errorf("public, warm: the registry saw %v", blobs)
			}
			p.r.stop()
			tokens.stop()
			p.outage(ref, map[string]bool{"all": true})
			p.pulled("public", public, nil)
		})
	}
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestPrivateNodes: what one node has pulled, another gives to those whom the
// registry lets in, and the registry is asked for nothing else.
func TestPrivateNodes(t *testing.T) {
	c := newClusterOf(t, func(h host) *registry {
		tokens := startTokenServer(t, h.listen(t, "5001"))
		return startGuarded(t, distV3.on(t, h), net.JoinHostPort(h.addr, "5000"), tokens.auth(), tokens.pusher)
	})
	img, _ := c.r.pushPrivate("a/app", 740)
	c.startAgents(func(*node) []string { return nil })
	for i, n := range c.nodes {
		p := &private{t: t, c: n.c, r: c.r, a: n.a}
		for _, ref := range names(clusterImages, img) {
			for who, auth := range strangers {
				p.refused(who+" on "+n.name, ref, auth)
			}
			p.refused("bob on "+n.name, ref, asBob)
			for _, a := range p.pulled(n.name, ref, asAnn) {
				if i > 0 && a.method != http.MethodHead && strings.Contains(a.path, "/a/app/") {
					t.Errorf("%s: want nothing but HEAD at the registry, it saw %v", n.name, a)
				}
			}
		}
	}
}

// TestPrivateCRIODirect: podman and skopeo send a mirror no credential. It has
// nothing private for them, and they go to the registry with their own.
func TestPrivateCRIODirect(t *testing.T) {
	t.Parallel()
	needRoot(t)
	home, r := tempDir(t), startPrivateRegistry(t, distV3)
	dropIns := writeContainersConfig(t, home, r)
	_, ref := r.pushPrivate("a/app", 750)
	login := filepath.Join(home, ".docker", "config.json")
	a := startAgent(t, agentOptions{crio: dropIns, config: registryTable(r.addr, r), flags: []string{"--hosts.registries", r.addr}})
	for _, client := range []imageClient{newPodman(t), newSkopeo(t)} {
		writeFile(t, login, "{}")
		if _, err := client.pull(t, home, ref); err == nil {
			t.Errorf("%s pulled without a password", client.name)
		}
		writeFile(t, login, fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, r.addr, strings.TrimPrefix(basic(ann), "Basic ")))
		absent := a.metric("larder_requests_total", `code="404"`)
		seen := r.during(func() {
			if out, err := client.pull(t, home, ref); err != nil {
				t.Errorf("%s: %v\n%s", client.name, err, out)
			}
		})
		if len(byRuntime(blobReads(seen))) < len(ordinarySizes)+1 {
			t.Errorf("%s: want every blob straight from the registry, it saw %v", client.name, seen)
		}
		if now := a.metric("larder_requests_total", `code="404"`); now == absent {
			t.Errorf("%s did not ask the agent; the test shows nothing", client.name)
		}
	}
	if n := a.given(); n > 0 {
		t.Errorf("the agent gave %v answers to clients without credentials", n)
	}
}

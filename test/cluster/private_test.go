package cluster

import (
	"context"
	"net/http"
	"sync"
	"testing"

	"github.com/larder-cache/larder/test/registrytest"
	"github.com/larder-cache/larder/test/runtimetest"
)

// costNodes is enough that a request for each node stands out from one for all.
const costNodes = 5

// guarded is a cluster whose registry gives public/app to anybody, and private/app
// to two users.
func guarded(t *testing.T, scheme registrytest.Scheme) *cluster {
	t.Helper()
	c := newCluster(t, options{nodes: costNodes, layers: []int64{2 * mb, 1 * mb}, short: true, auth: registrytest.Auth{
		Scheme: scheme, Users: map[string]string{"ann": "secret", "bob": "hunter2"}, Anonymous: []string{"public/*"},
	}})
	for _, repo := range []string{"public/app", "private/app"} {
		c.reg.Put(repo, c.img, "1")
	}
	return c
}

// pullAs pulls on all nodes in the same moment.
func (c *cluster) pullAs(repo string, auth *runtimetest.Auth) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	var pulls sync.WaitGroup
	for _, n := range c.nodes {
		pulls.Go(func() {
			if _, err := n.containerd().Pull(ctx, registryName+"/"+repo+":1", auth); err != nil {
				c.t.Errorf("%s: pull %s: %v", n.name, repo, err)
			}
		})
	}
	pulls.Wait()
	for _, n := range c.nodes {
		if err := n.containerd().Wipe(); err != nil {
			c.t.Error(err)
		}
	}
}

// asked counts requests at the registry for a repository, by what they ask for, and
// logs them.
func (c *cluster) asked(phase, repo string) map[string]int {
	out := map[string]int{}
	for _, r := range c.reg.Requests(registrytest.Match{Role: registrytest.Registry, Repository: repo}) {
		who := " as nobody"
		if r.Header.Get("Authorization") != "" {
			who = " with a credential"
		}
		out[r.Method+" "+string(r.Kind)+who]++
	}
	c.t.Logf("%s, %d nodes: %v", phase, len(c.nodes), out)
	c.reg.ResetCounts()
	return out
}

// total is how many requests there were.
func total(asked map[string]int) (n int) {
	for _, times := range asked {
		n += times
	}
	return n
}

// TestCostOfPublic: whether a repository is public is one question for all nodes,
// and the same that resolves its tag.
func TestCostOfPublic(t *testing.T) {
	for name, scheme := range map[string]registrytest.Scheme{"open": registrytest.NoAuth, "guarded": registrytest.Basic} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := guarded(t, scheme)
			c.pullAs("public/app", nil)
			cold := c.asked("public, cold", "public/app")
			for _, method := range []string{http.MethodHead, http.MethodGet} {
				if n := cold[method+" manifest as nobody"]; n != 1 {
					t.Errorf("%d times %s of a manifest, want 1: %v", n, method, cold)
				}
			}
			// A blob may come in several ranges, but not in one for each node.
			if most := 2 + 2*len(c.img.Blobs); total(cold) > most {
				t.Errorf("%v, want at most %d requests", cold, most)
			}
			c.pullAs("public/app", nil)
			if warm := c.asked("public, warm", "public/app"); total(warm) > 0 {
				t.Errorf("warm: %v, want nothing", warm)
			}
			c.finish()
		})
	}
}

// TestCostOfPrivate: one HEAD for each credential and repository, whatever the
// number of nodes, and one that finds out that it is private.
func TestCostOfPrivate(t *testing.T) {
	t.Parallel()
	c := guarded(t, registrytest.Basic)
	const credentialed = http.MethodHead + " manifest with a credential"
	for who, password := range map[string]string{"ann": "secret", "bob": "hunter2"} {
		auth := &runtimetest.Auth{Username: who, Password: password}
		c.pullAs("private/app", auth)
		first := c.asked(who+", first", "private/app")
		if first[credentialed] != 1 {
			t.Errorf("%s: %d HEADs, want 1: %v", who, first[credentialed], first)
		}
		c.pullAs("private/app", auth)
		if again := c.asked(who+", again", "private/app"); again[credentialed] > 0 {
			t.Errorf("%s, again: %v, want no HEAD with the credential", who, again)
		}
	}
	c.finish()
}

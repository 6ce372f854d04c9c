package proxy

import (
	"bytes"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/test/registrytest"
)

// asBefore takes from a cache's metadata what versions did not write that knew of a
// member of a repository only that it is one.
func asBefore(t *testing.T, dir string) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(dir, "metadata.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bolt.Tx) error {
		var later [][]byte
		members := tx.Bucket([]byte("members"))
		err := members.ForEach(func(k, _ []byte) error {
			if bytes.Count(k, []byte{0}) > 2 {
				later = append(later, bytes.Clone(k))
			}
			return nil
		})
		for _, k := range later {
			if err == nil {
				err = members.Delete(k)
			}
		}
		if len(later) == 0 {
			t.Error("nothing is new: this test shows nothing")
		}
		if err == nil {
			err = tx.Bucket([]byte("state")).Delete([]byte("marked"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestUpgradeStaysWarm: what the version before has cached is served as it was, although
// that one wrote down less: also by digest, and while the registry cannot be asked.
func TestUpgradeStaysWarm(t *testing.T) {
	never := new(bool)
	for name, tc := range map[string]struct {
		change func(*setup)
		before func(*node)
		down   bool
	}{
		"the registry is down":    {down: true},
		"it is never to be asked": {change: func(s *setup) { s.policy.ContactUpstream = never }, down: true},
		"it is there":             {},
		"imported, it is down":    {down: true, before: func(n *node) { n.forgetPublic() }},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			img := smallImage(100_000)
			t.Run("before", func(t *testing.T) {
				n := startNode(t, func(s *setup) { s.cache.Dir = dir })
				n.put(img)
				n.whole(img)
				if tc.before != nil {
					n.cache.Meta().SetImported(testRepository, img.Digest.String())
					for d := range img.Blobs {
						n.cache.Meta().SetImported(testRepository, d.String())
					}
					tc.before(n)
				}
			})
			asBefore(t, dir)
			n := startNode(t, func(s *setup) {
				s.cache.Dir = dir
				if tc.change != nil {
					tc.change(s)
				}
			})
			n.put(img)
			if tc.down {
				n.registry.Down()
			}
			if _, err := n.containerd().Pull(t.Context(), host+"/"+repo+":v1", nil); err != nil {
				t.Error(err)
			}
			for _, path := range []string{manifestPath(img.Digest.String()), pathManifest(img.Digest.String()), manifestPath("v1"), pathManifest("v1")} {
				if a := n.get(path); a.status != 200 || !bytes.Equal(a.body, img.Manifests[0].Data) {
					t.Errorf("%s: %d %s", path, a.status, a.body)
				}
			}
			for d := range img.Blobs {
				for _, path := range []string{blobPath(d), pathBlob(d)} {
					if a := n.get(path); a.status != 200 || a.header.Get(headerSource) != "disk" {
						t.Errorf("%s: %d from %s", path, a.status, a.header.Get(headerSource))
					}
				}
			}
			if got := n.registry.Count(registrytest.Match{Method: "GET"}); got != 0 {
				t.Errorf("%d requests for bytes that are here", got)
			}
		})
	}
}

func (n *node) forgetPublic() {
	n.cache.Meta().DeleteVerdict(testRepository, cache.Anyone)
}

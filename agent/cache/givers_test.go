package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// from is a Source with a giver.
type from struct {
	Source
	giver string
}

func (s from) Giver() string { return s.giver }

// opens reports whether Open gives a reader, and insists that a refusal says
// what the caller can do.
func opens(t *testing.T, c *Cache, body []byte, giver string) bool {
	t.Helper()
	d := digest.FromBytes(body)
	r, err := c.Open(t.Context(), d, from{all(body), giver})
	if err == nil {
		return r.Close() == nil
	}
	if !errors.Is(err, ErrForeign) || !errors.Is(err, ErrNoRoom) {
		t.Errorf("%q: %v", giver, err)
	}
	return false
}

// TestGivers pins I12 for committed blobs: who gave is asked of the blob, of the
// metadata, and after a restart.
func TestGivers(t *testing.T) {
	dir := t.TempDir()
	c := open(t, Options{Dir: dir})
	stop := run(t, c)
	body, d := content(1, 3*minPiece)
	mustRead(t, c, d, from{all(body), "a.test"})
	settle(c, d)
	if !opens(t, c, body, "a.test") || !opens(t, c, body, "") || opens(t, c, body, "b.test") {
		t.Error("a.test gave it, b.test did not")
	}
	c.Meta().AddGiver(d, "b.test")
	stop()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}

	c = start(t, Options{Dir: dir})
	for giver, want := range map[string]bool{"a.test": true, "b.test": true, "c.test": false, "": true} {
		if got := opens(t, c, body, giver); got != want {
			t.Errorf("after a restart %q opens: %t", giver, got)
		}
		if got := c.GivenBy(d, giver); got != want {
			t.Errorf("after a restart GivenBy(%q) = %t", giver, got)
		}
	}
	if err := c.Remove(d); err != nil {
		t.Fatal(err)
	}
	if !c.GivenBy(d, "a.test") || c.GivenBy(d, "c.test") {
		t.Error("who gave is forgotten with the blob")
	}
}

// TestGiversOfAFill pins I12 while bytes arrive, and for what a broken fill left:
// a source of another giver has to bring all of it again.
func TestGiversOfAFill(t *testing.T) {
	c := start(t, Options{})
	body, d := content(2, 4*minPiece)
	m := newManual()
	opened := make(chan *Reader)
	go func() {
		r, err := c.Open(context.Background(), d, from{m, "a.test"})
		if err != nil {
			t.Error(err)
		}
		opened <- r
	}()
	f := <-m.fills
	if err := f.SetSize(int64(len(body))); err != nil {
		t.Fatal(err)
	}
	r := <-opened
	defer r.Close()
	put(t, f, body, 0, 2*minPiece)
	if !opens(t, c, body, "a.test") || opens(t, c, body, "b.test") || !c.GivenBy(d, "a.test") || c.GivenBy(d, "b.test") {
		t.Error("a.test gives it now, b.test does not")
	}
	m.end <- io.ErrUnexpectedEOF
	settle(c, d)
	if c.GivenBy(d, "a.test") {
		t.Error("half of it counts as given")
	}

	var missing int64
	other := SourceFunc(func(_ context.Context, f *Fill) error {
		if err := f.SetSize(int64(len(body))); err != nil {
			return err
		}
		for start, end, ok := f.Missing(0); ok; start, end, ok = f.Missing(end) {
			missing += end - start
		}
		return feed(f.Writer(Origin{FromUpstream, "b.test"}), body)
	})
	if got := mustRead(t, c, d, from{other, "b.test"}); !bytes.Equal(got, body) || missing != int64(len(body)) {
		t.Errorf("b.test had to bring %d of %d bytes", missing, len(body))
	}
}

// TestFactsOutliveARestart holds what is remembered of repositories.
func TestFactsOutliveARestart(t *testing.T) {
	dir := t.TempDir()
	c := open(t, Options{Dir: dir})
	_, d := content(3, 1)
	r := Repository{"reg.test", "team/app"}
	m := c.Meta()
	m.SetShown(d, r)
	m.SetVerdict(r, Anyone)
	m.SetVerdict(r, "alice")
	m.SetVerdict(r, "bob")
	m.DeleteVerdict(r, "bob")
	m.SetChallenge(r, []string{`Basic realm="x"`})
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	m = open(t, Options{Dir: dir}).Meta()
	if got, ok := m.Shown(d); !ok || got != r {
		t.Errorf("shown in %v, %t", got, ok)
	}
	for who, want := range map[string]bool{Anyone: true, "alice": true, "bob": false, "eve": false} {
		if _, ok := m.Verdict(r, who); ok != want {
			t.Errorf("verdict for %q: %t", who, ok)
		}
	}
	if got := m.Challenge(r); len(got) != 1 || got[0] != `Basic realm="x"` {
		t.Errorf("challenge %q", got)
	}
	if other := (Repository{"reg.test", "team"}); m.Challenge(other) != nil {
		t.Error("a challenge of a repository that never had one")
	}
}

// TestDeletionsAreNeverDropped: a verdict that was taken back must not come back
// because the disk is slow.
func TestDeletionsAreNeverDropped(t *testing.T) {
	c := open(t, Options{})
	m, r := c.Meta(), Repository{"reg.test", "app"}
	m.SetVerdict(r, "alice")
	for i := range maxPending + 10 {
		_, d := content(uint64(i%60000), 1+i/60000)
		m.SetManifest(d, Manifest{MediaType: "x"})
	}
	m.DeleteVerdict(r, "alice")
	if _, ok := m.Verdict(r, "alice"); ok {
		t.Error("still there")
	}
}

// pruneBlobs forgets as many facts of each kind as n blobs have that one repository has told of.
func pruneBlobs(t *testing.T, db *database, n int) {
	t.Helper()
	err := db.bolt.Update(func(tx *bolt.Tx) error {
		for name, keys := range map[bucket]int{bucketGivers: 2, bucketManifests: 1, bucketMembers: 2, bucketShown: 1} {
			if _, err := prune(tx.Bucket([]byte(name)), n*keys, db.age(name)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestFactsOfBlobsThatAreHereGoLast: what was pulled through a node over months does not
// push out who gave what it still has, however long ago that was.
func TestFactsOfBlobsThatAreHereGoLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, Options{})
		stop := run(t, c)
		here := fillUp(t, c, 2, 1000)
		stop() // from here on nobody else flushes
		m, r := c.Meta(), Repository{"a.test", "team/app"}
		known := func(d digest.Digest) (n int) {
			_, manifest := m.Manifest(d)
			_, shown := m.Shown(d)
			for _, fact := range []bool{m.Given(d, "a.test"), manifest, m.Member(r, d), m.Said(r, d), shown} {
				if fact {
					n++
				}
			}
			return n
		}
		learn := func(d digest.Digest) {
			m.AddGiver(d, "a.test")
			m.SetManifest(d, Manifest{"a/b"})
			m.AddMembers(r, ocispec.Descriptor{Digest: d})
			m.SetSaid(r, d)
			m.SetShown(d, r)
			<-time.After(time.Second)
		}
		gone := make([]digest.Digest, 6)
		for i, d := range here {
			learn(d)
			for j := range gone[:3] {
				_, gone[3*i+j] = content(uint64(3*i+j), 10)
				learn(gone[3*i+j])
			}
		}
		// forget forgets n blobs, and reports of how many all is known still.
		forget := func(n int) (of [2]int) {
			t.Helper()
			m.flush()
			pruneBlobs(t, m.db, n)
			for i, ds := range [][]digest.Digest{here, gone} {
				for _, d := range ds {
					of[i] += known(d) / 5
				}
			}
			return of
		}
		if of := forget(5); of != [2]int{2, 1} || known(gone[5]) != 5 {
			t.Errorf("all is known of %d that are here, and of %d that are not", of[0], of[1])
		}
		if of := forget(2); of != [2]int{1, 0} || known(here[1]) != 5 {
			t.Errorf("all is known of %d that are here, and of %d that are not", of[0], of[1])
		}
	})
}

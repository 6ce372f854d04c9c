package cluster

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"testing"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/agent/archive"
)

// bundle is the cluster's image in an archive.
func (c *cluster) bundle() []byte {
	c.t.Helper()
	var out bytes.Buffer
	w, err := archive.NewWriter(&out, []archive.Root{{Name: c.refs[0], Descriptor: c.img.Descriptor}})
	if err != nil {
		c.t.Fatal(err)
	}
	for _, m := range c.img.Manifests {
		if err := w.Blob(m.Digest, m.Size, bytes.NewReader(m.Data)); err != nil {
			c.t.Fatal(err)
		}
	}
	for d, b := range c.img.Blobs {
		if err := w.Blob(d, b.Size(), io.NewSectionReader(b, 0, b.Size())); err != nil {
			c.t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		c.t.Fatal(err)
	}
	return out.Bytes()
}

// importTar sends an archive to a node; read is called with each event, and ends the
// reading with false. The error is the agent's.
func (n *node) importTar(body io.Reader, read func(agent.ImportEvent) bool) error {
	client := &http.Client{Transport: &http.Transport{DialContext: n.dial, DisableKeepAlives: true}}
	resp, err := client.Post("http://"+n.adminAddr()+"/api/v1/import", "application/x-tar", body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for dec := json.NewDecoder(resp.Body); ; {
		var e agent.ImportEvent
		if err := dec.Decode(&e); err != nil {
			return err
		}
		if e.Error != "" {
			return fmt.Errorf("%s", e.Error)
		}
		if !read(e) || e.Done {
			return nil
		}
	}
}

// TestImport: with the registry gone, one node imports an image and all pull it. The node
// is killed in the middle of the archive, when all content is there but the tag, and right
// after it has said that all is done.
func TestImport(t *testing.T) {
	t.Parallel()
	c := newCluster(t, options{nodes: 4, layers: []int64{4 * mb, 1 * mb}, short: true, sent: -1})
	c.reg.Down()
	first, others := c.nodes[0], c.nodes[1:]
	body := c.bundle()
	unknown := func(when string) {
		t.Helper()
		if _, err := first.containerd().Pull(t.Context(), c.refs[0], nil); err == nil {
			t.Fatalf("%s: the tag is known", when)
		}
	}
	for when, most := range map[string]int{"killed in a blob": len(body) / 2, "killed before the end": len(body) - 512} {
		r, w := io.Pipe()
		sent := make(chan error, 1)
		go func() {
			sent <- first.importTar(r, func(agent.ImportEvent) bool { return true })
			r.Close()
		}()
		if _, err := w.Write(body[:most]); err != nil {
			t.Fatal(err)
		}
		first.kill()
		w.CloseWithError(io.ErrUnexpectedEOF)
		if err := <-sent; err == nil {
			t.Errorf("%s: imported", when)
		}
		first.up()
		unknown(when)
	}
	if err := first.importTar(bytes.NewReader(body), func(agent.ImportEvent) bool { return true }); err != nil {
		t.Fatal(err)
	}
	first.kill()
	first.up()
	c.awaitMembers()
	c.pull(others...).wait(20) // as often as it takes until gossip has told
	c.pull(first).wait(1)
	first.kill()
	late := c.add()
	late.join = []string{others[0].gossip()}
	late.up()
	late.rest()
	c.pull(late).wait(20)
	first.up()
	c.awaitMembers()
	c.finish()
}

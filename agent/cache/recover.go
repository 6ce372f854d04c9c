package cache

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// recover books what is on disk. It looks at names and sizes only, so that a
// start takes a stat per blob; bytes of ingests are re-read when their fill is
// resumed (I6), those of blobs by the scrub. Nothing that it finds is fatal.
func (c *Cache) recover() {
	now := time.Now()
	var found []*blob
	for a := range algorithms {
		for _, e := range c.entries(c.dir.blobs(a)) {
			if b := c.recoverBlob(a, e, now); b != nil {
				found = append(found, b)
			}
		}
	}
	slices.SortFunc(found, func(x, y *blob) int {
		return cmp.Or(cmp.Compare(x.used, y.used), cmp.Compare(x.digest, y.digest))
	})
	c.mu.Lock()
	for _, b := range found {
		b.place = c.lru.PushFront(b)
		c.blobs[b.digest] = b
		c.used += b.size
		c.clock = max(c.clock, b.used)
	}
	c.mu.Unlock()
	c.recoverIngests(now)
}

// entries lists a directory; one that cannot be read is as good as empty.
func (c *Cache) entries(dir string) []fs.DirEntry {
	all, err := os.ReadDir(dir)
	if err != nil {
		c.log.Warn("read cache directory", "err", err)
	}
	return all
}

// recoverBlob books one file of blobs/. Files that cannot be what their name
// says are deleted; names that are not ours are left alone.
func (c *Cache) recoverBlob(a digest.Algorithm, e fs.DirEntry, now time.Time) *blob {
	d, ok := digestOf(e.Name())
	if !ok || d.Algorithm() != a {
		return nil
	}
	info, err := e.Info()
	if err != nil {
		return nil
	}
	last, known := c.meta.lastUse(d)
	switch {
	case !info.Mode().IsRegular(),
		info.Size() == 0 && d != a.FromBytes(nil),
		known && info.Size() != last.size:
		c.log.Warn("deleting a blob that cannot be whole", "digest", d, "bytes", info.Size())
		if err := os.RemoveAll(c.dir.blob(d)); err != nil {
			c.log.Warn("delete blob", "digest", d, "err", err)
		}
		return nil
	}
	b := &blob{digest: d, size: info.Size(), used: last.when}
	if !known {
		b.used = info.ModTime().Unix()
		c.meta.recordUse([]use{{d, b.used, b.size}})
	}
	// A time from a clock that ran ahead must not keep a blob forever.
	b.used = min(b.used, now.Unix())
	return b
}

// recoverIngests books the fills that can be resumed and deletes the rest.
func (c *Cache) recoverIngests(now time.Time) {
	for _, e := range c.entries(c.dir.ingests()) {
		hex, isMap := strings.CutSuffix(e.Name(), mapExt)
		d, ours := digestOf(hex)
		switch {
		case !ours && strings.HasPrefix(e.Name(), probePrefix):
			_ = remove(filepath.Join(c.dir.ingests(), e.Name()))
		case !ours:
		case isMap:
			c.recoverIngest(d, now)
		default:
			if _, err := os.Lstat(c.dir.ingestMap(d)); errors.Is(err, fs.ErrNotExist) {
				c.purge(d)
			}
		}
	}
}

// recoverIngest books one resumable fill.
func (c *Cache) recoverIngest(d digest.Digest, now time.Time) {
	size, when, err := c.inspectIngest(d)
	if err != nil || c.blobs[d] != nil || now.Sub(when) > idleFor {
		c.log.Debug("ingest is not resumable", "digest", d, "err", err)
		c.purge(d)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if when.After(now) {
		when = now
	}
	c.idle[d] = idleIngest{size: size, when: when}
	c.used += size
}

// inspectIngest reads the header of d's map and compares it with the file.
func (c *Cache) inspectIngest(d digest.Digest) (size int64, when time.Time, err error) {
	file, err := os.Open(c.dir.ingestMap(d))
	if err != nil {
		return 0, when, err
	}
	defer file.Close()
	header := make([]byte, mapHeader)
	if _, err := io.ReadFull(file, header); err != nil {
		return 0, when, fmt.Errorf("read piece map: %w", err)
	}
	owner, size, err := decodeMapHeader(header)
	if err != nil {
		return 0, when, err
	}
	info, err := os.Lstat(c.dir.ingest(d))
	if err != nil {
		return 0, when, err
	}
	if owner != d || !info.Mode().IsRegular() || info.Size() != size {
		return 0, when, errMap
	}
	return size, info.ModTime(), nil
}

package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// step names a change on disk, for fault injection.
type step string

const (
	stepCreate   step = "create"
	stepAllocate step = "allocate"
	stepWrite    step = "write"
	stepVerified step = "verified"
	stepSync     step = "sync"
	stepRename   step = "rename"
	stepSyncDir  step = "sync directory"
	stepMap      step = "unlink map"
	stepBooked   step = "booked"
	stepUnlink   step = "unlink"
	stepPurge    step = "purge"
)

// at is called before each step.
func (c *Cache) at(s step, d digest.Digest) error {
	if c.faults == nil {
		return nil
	}
	return c.faults(s, d)
}

// do runs one step on disk.
func (c *Cache) do(s step, d digest.Digest, change func() error) error {
	err := c.at(s, d)
	if err == nil && change != nil {
		err = change()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", s, err)
	}
	return nil
}

// noRoom marks a disk's error as one to pass through.
func noRoom(err error) error {
	if err == nil || errors.Is(err, ErrNoRoom) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrNoRoom, err)
}

// makeIngest reserves n bytes and makes the files of a fill.
func (f *fill) makeIngest(n int64) (*os.File, *pieceMap, error) {
	c, d := f.c, f.digest
	if err := c.reserve(n); err != nil {
		return nil, nil, err
	}
	file, err := c.createIngest(d, n)
	if diskFull(err) && c.relieve(n) {
		file, err = c.createIngest(d, n)
	}
	c.backed(n)
	if err != nil {
		c.unreserve(n)
		return nil, nil, noRoom(fmt.Errorf("ingest %s: %w", d, err))
	}
	if f.unchecked() {
		return file, nil, nil // nothing of it is worth a resume
	}
	return file, c.createMap(d, n, f.giver), nil
}

// createIngest makes the data file at its full size. Blocks are set aside now,
// so that a full disk shows before a client is promised the first byte.
func (c *Cache) createIngest(d digest.Digest, n int64) (*os.File, error) {
	var file *os.File
	err := c.do(stepCreate, d, func() (err error) {
		file, err = c.create(c.dir.ingest(d))
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := c.do(stepAllocate, d, func() error { return allocate(file, n) }); err != nil {
		return nil, errors.Join(err, file.Close(), remove(file.Name()))
	}
	return file, nil
}

// create makes a file, and its directory if that is gone (I9).
func (c *Cache) create(path string) (*os.File, error) {
	const flags = os.O_RDWR | os.O_CREATE | os.O_TRUNC
	file, err := os.OpenFile(path, flags, ingestMode)
	if !errors.Is(err, fs.ErrNotExist) {
		return file, err
	}
	if err := c.dir.make(); err != nil {
		return nil, err
	}
	return os.OpenFile(path, flags, ingestMode)
}

// allocate gives file n bytes of real blocks or, on file systems that cannot
// (NFS, ZFS), of holes.
func allocate(file *os.File, n int64) error {
	if n == 0 {
		return nil
	}
	err := error(unix.EINTR) // of any signal, such as those of a CPU profile
	for errors.Is(err, unix.EINTR) {
		err = unix.Fallocate(int(file.Fd()), 0, 0, n)
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return file.Truncate(n)
	}
	return err
}

// createMap makes the piece map. A fill without one merely cannot be resumed,
// so small blobs have none and an error is only logged.
func (c *Cache) createMap(d digest.Digest, n int64, giver string) *pieceMap {
	if pieceCount(n) < 2 {
		return nil
	}
	file, err := c.create(c.dir.ingestMap(d))
	if err == nil {
		if _, err = file.WriteAt(encodeMapHeader(d, n, giver), 0); err != nil {
			err = errors.Join(err, file.Close())
		}
	}
	if err != nil {
		c.log.Warn("fill will not be resumable", "digest", d, "err", err)
		return nil
	}
	return &pieceMap{file: file}
}

// writeBlob writes a fill's bytes; a full disk gets one eviction and one retry.
func (c *Cache) writeBlob(f *fill, p []byte, off int64) error {
	err := c.writeFile(f, p, off)
	if diskFull(err) && c.relieve(int64(len(p))) {
		err = c.writeFile(f, p, off)
	}
	return noRoom(err)
}

func (c *Cache) writeFile(f *fill, p []byte, off int64) error {
	return c.do(stepWrite, f.digest, func() error {
		_, err := f.file.WriteAt(p, off)
		return err
	})
}

// resume takes over what an earlier fill of the same blob, from the same giver
// (I12), left on disk. Its pieces count only after they have been re-read (I6),
// which does not delay the source. SetSize, which uses the same files, waits.
func (f *fill) resume() {
	size, ok := f.c.takeIdle(f.digest)
	if !ok {
		f.adopt(nil, nil, nil)
		return
	}
	file, record, p, err := f.openIngest(size)
	if err != nil {
		f.c.log.Debug("ingest is not resumable", "digest", f.digest, "err", err)
		f.c.purge(f.digest)
		f.c.unreserve(size)
	}
	f.adopt(p, file, record)
}

// openIngest opens the files of an idle ingest of size bytes.
func (f *fill) openIngest(size int64) (*os.File, *pieceMap, *pieces, error) {
	if f.unchecked() {
		return nil, nil, nil, errors.New("a stream resumes nothing") // its bytes would be recorded beside those of others
	}
	c, d := f.c, f.digest
	record, err := os.OpenFile(c.dir.ingestMap(d), os.O_RDWR, 0)
	if err != nil {
		return nil, nil, nil, err
	}
	p, err := readMap(record, d, f.giver)
	if err != nil {
		return nil, nil, nil, errors.Join(err, record.Close())
	}
	file, err := reopenIngest(c.dir.ingest(d))
	if err != nil {
		return nil, nil, nil, errors.Join(err, record.Close())
	}
	info, err := file.Stat()
	if err == nil && (info.Size() != size || p.size != size) {
		err = fmt.Errorf("ingest of %d bytes, not %d: %w", info.Size(), size, errMap)
	}
	if err != nil {
		return nil, nil, nil, errors.Join(err, record.Close(), file.Close())
	}
	return file, &pieceMap{file: record}, p, nil
}

// reopenIngest opens the data of an ingest. A process that was killed while commit
// waited for the disk has left it read-only.
func reopenIngest(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrPermission) && os.Chmod(path, ingestMode) == nil {
		file, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	return file, err
}

// purge deletes the files of an ingest.
func (c *Cache) purge(d digest.Digest) {
	err := c.do(stepPurge, d, func() error { return errors.Join(remove(c.dir.ingestMap(d)), remove(c.dir.ingest(d))) })
	if err != nil {
		c.log.Warn("delete ingest", "digest", d, "err", err)
	}
}

// commit makes a verified fill a blob: bytes durable before the name, the
// name durable before anybody is told (I4).
func (f *fill) commit() error {
	c, d := f.c, f.digest
	steps := []struct {
		step   step
		change func() error
	}{
		{stepVerified, nil},
		{stepSync, func() error { return errors.Join(f.file.Chmod(blobMode), f.file.Sync()) }},
		{stepRename, func() error { return c.rename(c.dir.ingest(d), c.dir.blob(d)) }},
		{stepSyncDir, func() error { return syncDir(c.dir.blobs(d.Algorithm())) }},
		{stepMap, func() error { return remove(c.dir.ingestMap(d)) }},
	}
	for _, s := range steps {
		if err := c.do(s.step, d, s.change); err != nil {
			return fmt.Errorf("commit %s: %w", d, err)
		}
	}
	return nil
}

// rename moves a file into a directory, which it makes again if need be (I9).
func (c *Cache) rename(from, to string) error {
	err := os.Rename(from, to)
	if errors.Is(err, fs.ErrNotExist) && c.dir.make() == nil {
		err = os.Rename(from, to)
	}
	return err
}

// finish books the outcome: a blob, an ingest to be resumed, or nothing.
// verified says that readers have, or will have, every byte whatever err is.
func (f *fill) finish(err error, verified bool) {
	size, keep := f.drain(verified)
	switch {
	case err == nil:
		f.c.book(f, size)
	case verified:
		// The rename may have happened; no other blob has this name now.
		err = errors.Join(err, remove(f.c.dir.blob(f.digest)))
		f.c.log.Warn("blob was served but not kept", "digest", f.digest, "err", err)
		f.mu.Lock()
		f.unkept = noRoom(err)
		f.mu.Unlock()
		f.c.abandon(f, size, false)
	default:
		f.c.abandon(f, size, keep)
	}
	close(f.done)
}

// drain waits until nothing of this fill touches its files any more, and
// closes the map. keep says whether the ingest is worth a resume.
func (f *fill) drain(verified bool) (size int64, keep bool) {
	f.mu.Lock()
	for f.sizing || len(f.busy) > 0 {
		f.freed.Wait()
	}
	record, p, err := f.record, f.pieces, f.err
	f.record = nil
	f.mu.Unlock()
	if p == nil {
		return 0, false
	}
	if record != nil {
		_ = record.file.Close()
	}
	final := errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrSizeMismatch) || errors.Is(err, ErrNoRoom)
	return p.size, !verified && !final && record != nil && p.complete+p.claims > 0
}

// book makes a committed fill a blob and tells the others.
func (c *Cache) book(f *fill, size int64) {
	b := &blob{digest: f.digest, size: size, dirty: true, busy: make(chan struct{}), givers: []string{f.giver}}
	c.mu.Lock()
	b.used = c.now()
	b.place = c.lru.PushFront(b)
	c.blobs[f.digest] = b
	if c.pins[f.digest] > 0 {
		c.pinned += size
	}
	delete(c.filling, f.digest)
	delete(c.mismatches, f.digest)
	c.reserved -= size
	c.mu.Unlock()
	_ = c.at(stepBooked, f.digest)
	c.meta.recordFill(f.digest, size, f.fetched())
	if f.giver != "" {
		c.meta.AddGiver(f.digest, f.giver)
	}
	select {
	case c.booked <- struct{}{}:
	default: // it is to be written soon already
	}
	if c.opts.Events.Committed != nil {
		c.opts.Events.Committed(f.digest, size)
	}
	c.settled(b)
	c.log.Debug("blob committed", "digest", f.digest, "bytes", size)
}

// settled ends the time in which only one event of b may be under way.
func (c *Cache) settled(b *blob) {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(b.busy)
	b.busy = nil
}

// fetched returns a copy of the bytes by origin.
func (f *fill) fetched() map[Origin]int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.origins)
}

// abandon books out a fill that made no blob.
func (c *Cache) abandon(f *fill, size int64, keep bool) {
	if !keep {
		c.purge(f.digest)
	}
	if errors.Is(f.failure(), ErrDigestMismatch) {
		c.mismatch(f, size)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.filling, f.digest)
	c.reserved -= size
	if keep {
		c.idle[f.digest] = idleIngest{size: size, when: f.started}
	} else {
		c.used -= size
	}
}

// mismatch counts a fill whose bytes were wrong, and tells the others.
func (c *Cache) mismatch(f *fill, size int64) {
	times := f.Mismatches() + 1
	c.metrics.corruptions.Inc()
	c.log.Warn("fetched blob does not match its digest", "digest", f.digest, "bytes", size, "source", sources(size, f.fetched()))
	c.remember(f.digest, times)
	if c.opts.Events.Mismatched != nil {
		c.opts.Events.Mismatched(f.digest, times)
	}
}

// open makes a reader of a fill that the caller is attached to, once its size
// is known.
func (f *fill) open(ctx context.Context, joined bool) (*Reader, error) {
	var err error
	select {
	case <-f.sized:
		r := newReader(f.digest, f.Size(), f, nil)
		r.ctx, r.joined = ctx, joined
		f.enter(r)
		return r, nil
	case <-f.broken:
		err = toldTo(joined, f.failure())
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	f.release()
	return nil, err
}

// progress describes the fill.
func (f *fill) progress() Progress {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := Progress{Digest: f.digest, Size: -1, Readers: len(f.readers), Started: f.started, Origins: maps.Clone(f.origins)}
	if f.pieces != nil {
		p.Size, p.Present = f.pieces.size, f.pieces.bytes()
	}
	return p
}

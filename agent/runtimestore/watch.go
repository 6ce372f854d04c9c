package runtimestore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/opencontainers/go-digest"
)

// rescanInterval is how long a change can stay unnoticed if every hint is lost.
const rescanInterval = time.Minute

// Run keeps the index until ctx ends, then stops verifications and waits for
// them. It returns nil: a store that cannot be read is a Problem, not a failure.
// It may be called once.
func (s *Store) Run(ctx context.Context) error {
	var watchers sync.WaitGroup
	watchers.Go(func() { s.retry(ctx, "watch the runtime's store", s.watchDir) })
	if s.opts.Socket != "" {
		watchers.Go(func() { s.retry(ctx, "listen to containerd", s.listen) })
	}
	s.keepIndex(ctx)
	watchers.Wait()
	s.shutdown()
	return nil
}

func (s *Store) shutdown() {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	close(s.stop)
	s.hashing.Wait()
}

// keepIndex follows the hints. It alone changes the index.
func (s *Store) keepIndex(ctx context.Context) {
	tick := time.NewTicker(s.every)
	defer tick.Stop()
	s.rescan()
	for {
		select {
		case <-s.hints.wake:
		case <-tick.C:
			s.hints.addAll()
		case <-ctx.Done():
			return
		}
		digests, all := s.hints.take()
		if all {
			s.rescan()
			continue
		}
		for d := range digests {
			size, ok := s.look(d)
			s.index.set(d, size, ok)
		}
	}
}

// rescan compares the index with the directory. Where the directory cannot be
// read for now, the index stays; where it is not there or not ours to read, the
// index is empty.
func (s *Store) rescan() {
	found, err := s.list()
	s.note(err)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		return
	}
	for d := range s.index.all() {
		if _, ok := found[d]; !ok {
			s.index.set(d, 0, false)
		}
	}
	for d, size := range found {
		s.index.set(d, size, true)
	}
}

// list reads the directory.
func (s *Store) list() (map[digest.Digest]int64, error) {
	root, err := os.OpenRoot(s.opts.ContentDir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	dir, err := root.Open(blobsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, s.emptyOrWrong(root)
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	found := make(map[digest.Digest]int64, len(names))
	for _, name := range names {
		d := digest.NewDigestFromEncoded(digest.SHA256, name)
		if size, ok := s.look(d); ok {
			found[d] = size
		}
	}
	return found, nil
}

// emptyOrWrong tells a store without a blob from a directory that is no store.
func (s *Store) emptyOrWrong(root *os.Root) error {
	const plugin = "io.containerd.content.v1.content"
	if _, err := root.Lstat(plugin); err == nil {
		return fmt.Errorf("%w: %s is containerd's root; set runtime.content_dir to %s",
			fs.ErrNotExist, s.opts.ContentDir, filepath.Join(s.opts.ContentDir, plugin))
	}
	return nil
}

// note keeps the problem that a scan met, and logs it when it is news.
func (s *Store) note(err error) {
	problem := explain(s.opts.ContentDir, err)
	s.mu.Lock()
	before := s.problem
	s.problem = problem
	s.mu.Unlock()
	switch {
	case problem != nil && (before == nil || before.Error() != problem.Error()):
		s.log.Error("the runtime's store is not used as a source", "err", problem)
	case problem == nil && before != nil:
		s.log.Info("the runtime's store can be read again")
	}
}

// explain says what to do about an error of a scan.
func explain(dir string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: containerd lets only root read its store; run as uid 0 or with CAP_DAC_READ_SEARCH", err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: check that runtime.content_dir (%s) is containerd's content directory and is mounted", err, dir)
	default:
		return err
	}
}

// retry calls watch again and again, with pauses from 1 s to 30 s, shorter after
// a call that went well for a while.
func (s *Store) retry(ctx context.Context, what string, watch func(context.Context) error) {
	const shortest, longest = time.Second, 30 * time.Second
	pause := shortest
	for ctx.Err() == nil {
		start := time.Now()
		err := watch(ctx)
		if ctx.Err() != nil {
			return
		}
		s.log.Debug("cannot "+what+", trying again", "err", err)
		if time.Since(start) > longest {
			pause = shortest
		}
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-ctx.Done():
		}
		pause = min(2*pause, longest)
	}
}

// watchDir turns changes of the directory into hints until the directory goes
// away or a watch cannot be had.
func (s *Store) watchDir(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer w.Close()
	dir := filepath.Join(s.opts.ContentDir, blobsDir)
	if err := w.Add(dir); err != nil {
		return err
	}
	s.hints.addAll() // for what changed before
	for {
		select {
		case e := <-w.Events:
			if e.Name == dir && e.Has(fsnotify.Remove|fsnotify.Rename) {
				s.hints.addAll()
				return errors.New("the directory was removed")
			}
			s.hints.add(digest.NewDigestFromEncoded(digest.SHA256, filepath.Base(e.Name)))
		case err := <-w.Errors: // an overflow, most likely
			s.log.Debug("lost sight of the runtime's store, scanning it", "err", err)
			s.hints.addAll()
		case <-ctx.Done():
			return nil
		}
	}
}

// hints are where to look. They are few: too many become a rescan.
type hints struct {
	wake chan struct{} // holds one if there is something to take

	mu      sync.Mutex // guards everything below
	digests map[digest.Digest]struct{}
	all     bool
}

// maxHints is where looking at each takes about as long as a rescan.
const maxHints = 1 << 10

func newHints() *hints {
	return &hints{wake: make(chan struct{}, 1), digests: map[digest.Digest]struct{}{}}
}

func (h *hints) add(d digest.Digest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.digests) >= maxHints {
		h.all = true
	}
	if !h.all {
		h.digests[d] = struct{}{}
	}
	h.signal()
}

func (h *hints) addAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all = true
	h.signal()
}

// signal wakes the one who takes, if it is not woken already.
func (h *hints) signal() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

func (h *hints) take() (digests map[digest.Digest]struct{}, all bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	digests, all = h.digests, h.all
	h.digests, h.all = map[digest.Digest]struct{}{}, false
	return digests, all
}

// index is what the runtime holds, as told to others.
type index struct {
	events Events

	mu    sync.Mutex // guards sizes
	sizes map[digest.Digest]int64
}

// set takes note of a blob's presence and reports a change. One goroutine calls
// it.
func (x *index) set(d digest.Digest, size int64, present bool) {
	x.mu.Lock()
	old, had := x.sizes[d]
	if present {
		x.sizes[d] = size
	} else {
		delete(x.sizes, d)
	}
	x.mu.Unlock()
	if had && (!present || old != size) && x.events.Removed != nil {
		x.events.Removed(d)
	}
	if present && (!had || old != size) && x.events.Added != nil {
		x.events.Added(d, size)
	}
}

func (x *index) has(d digest.Digest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	_, ok := x.sizes[d]
	return ok
}

// all is a copy.
func (x *index) all() map[digest.Digest]int64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return maps.Clone(x.sizes)
}

package hostsconfig

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	defaultPoll = 30 * time.Second
	// settle lets a writer finish: editors and configuration tools change a
	// file in several steps.
	settle = 200 * time.Millisecond
	// maxSettle bounds the wait for someone who never stops writing.
	maxSettle = 2 * time.Second
	// removeGrace bounds the removal at exit, when the context is over.
	removeGrace = 20 * time.Second
)

// Run applies, then watches the managed directories and repairs drift until
// ctx ends. With RemoveOnExit it takes everything back before it returns, also
// when ctx has ended. It returns an error only if another process manages a
// directory, or if taking back failed; what else goes wrong is retried and in
// [Hosts.InPlace].
func (h *Hosts) Run(ctx context.Context) error {
	if err := h.hold(ctx); err != nil {
		h.setState(err)
		return errors.Join(err, h.unhold())
	}
	w := newWatcher(h)
	defer w.close()
	imports := h.pass(ctx, w, nil, false)
	timer := time.NewTimer(h.opts.PollInterval)
	defer timer.Stop()
	var dirty time.Time // first event since the last pass
	for {
		select {
		case <-ctx.Done():
			return h.finish(ctx)
		case ev := <-w.events():
			if !w.relevant(ev) {
				continue
			}
			if dirty.IsZero() {
				dirty = time.Now()
			}
			if time.Since(dirty) < maxSettle {
				timer.Reset(settle)
			}
			continue
		case err := <-w.errors():
			// An overflow says that events are missing; look at everything.
			h.log.Warn("watching host files", "err", err)
			timer.Reset(settle)
			continue
		case <-timer.C:
		}
		dirty = time.Time{}
		imports = h.pass(ctx, w, imports, true)
		timer.Reset(h.nextLook())
	}
}

// nextLook is the poll interval, or sooner if a repair was put off.
func (h *Hosts) nextLook() time.Duration {
	if wait, ok := h.limiter.next(); ok {
		return min(max(wait, settle), h.opts.PollInterval)
	}
	return h.opts.PollInterval
}

// pass applies once and tells OnImport what changed. Directories are watched
// before they are read, so that no change falls between, and again afterwards
// for those that were made.
func (h *Hosts) pass(ctx context.Context, w *watcher, before []Imported, repair bool) []Imported {
	w.renew()
	h.mu.Lock()
	_, err := h.apply(ctx, repair)
	imports := h.upstreams()
	h.mu.Unlock()
	if ctx.Err() == nil {
		h.setState(err)
		if err != nil {
			h.log.Warn("host configuration not in place", "err", err)
		}
	}
	w.renew()
	if h.opts.OnImport != nil && !reflect.DeepEqual(before, imports) {
		h.opts.OnImport(imports)
	}
	return imports
}

// hold locks the directories for as long as Run lasts.
func (h *Hosts) hold(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.running = true
	for _, d := range h.directories() {
		_, _, err := h.lock(ctx, d)
		if errors.Is(err, ErrBusy) {
			return explain(d, err)
		}
		if err != nil {
			h.log.Error("host directory cannot be managed yet; pulls go direct", "runtime", d.runtime, "path", d.path, "err", err)
		}
	}
	return nil
}

func (h *Hosts) unhold() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.running = false
	var problems []error
	for path, m := range h.held {
		problems = append(problems, m.release())
		delete(h.held, path)
	}
	return errors.Join(problems...)
}

func (h *Hosts) finish(ctx context.Context) error {
	if !h.opts.RemoveOnExit {
		return h.unhold()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeGrace)
	defer cancel()
	_, err := h.Remove(ctx)
	return errors.Join(err, h.unhold())
}

// watcher follows the directories that matter. Without inotify (128 instances
// per user is a common limit) its channels stay silent and polling is all.
type watcher struct {
	hosts  *Hosts
	fs     *fsnotify.Watcher
	polled map[string]bool // directories of which it was said that they are not watched
}

func newWatcher(h *Hosts) *watcher {
	fs, err := fsnotify.NewWatcher()
	if err != nil {
		h.log.Warn("no file notifications; host files are polled", "interval", h.opts.PollInterval, "err", err)
		return &watcher{hosts: h}
	}
	return &watcher{hosts: h, fs: fs, polled: map[string]bool{}}
}

func (w *watcher) events() <-chan fsnotify.Event {
	if w.fs == nil {
		return nil
	}
	return w.fs.Events
}

func (w *watcher) errors() <-chan error {
	if w.fs == nil {
		return nil
	}
	return w.fs.Errors
}

func (w *watcher) close() {
	if w.fs != nil {
		_ = w.fs.Close() // nothing depends on it any more
	}
}

// relevant leaves out our own journal and temporary files.
func (w *watcher) relevant(ev fsnotify.Event) bool {
	name := filepath.Base(ev.Name)
	return name != journalDir && !strings.HasPrefix(name, tempPrefix) && !strings.HasSuffix(filepath.Dir(ev.Name), "/"+journalDir)
}

// renew adds directories that came; those that went drop out by themselves.
// Adding one twice is harmless.
func (w *watcher) renew() {
	if w.fs == nil {
		return
	}
	for _, dir := range w.hosts.watched() {
		err := w.fs.Add(dir)
		failed := err != nil && !errors.Is(err, os.ErrNotExist)
		if failed && !w.polled[dir] {
			w.hosts.log.Warn("directory is polled, not watched", "path", dir, "err", err)
		}
		w.polled[dir] = failed
	}
}

// watched lists the managed directories, host directories, and where
// registries.conf and hidden roots are.
func (h *Hosts) watched() []string {
	var out []string
	for _, d := range h.directories() {
		// The parent shows when the directory itself is replaced.
		out = append(out, filepath.Dir(d.path), d.path)
		if d.runtime == crio {
			continue
		}
		for _, path := range append([]string{d.path}, h.hiddenRoots()...) {
			r, err := hostDirs(path)
			if err != nil {
				continue // the pass reports it
			}
			out = append(out, path)
			for name := range r.dirs {
				out = append(out, filepath.Join(path, name))
			}
		}
	}
	return out
}

// limiter spaces the repairs of one file, so that two programs that both
// insist on their version do not keep the node busy: each repair soon after
// the last doubles the wait, and a quiet time resets it.
type limiter struct {
	mu    sync.Mutex // guards files
	files map[string]*backoff
}

type backoff struct {
	last time.Time
	wait time.Duration
	put  bool // a repair has been put off in this pass
}

const (
	minBackoff = time.Second
	maxBackoff = 5 * time.Minute
)

func newLimiter() *limiter { return &limiter{files: map[string]*backoff{}} }

// begin starts a pass: it puts off anew what is still to be repaired.
func (l *limiter) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range l.files {
		b.put = false
	}
}

// allow reports whether path may be repaired now, and counts it if so; if not, next is when.
func (l *limiter) allow(path string) (next time.Time, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.files[path]
	now := time.Now()
	switch {
	case b == nil || now.Sub(b.last) > 2*max(b.wait, time.Minute):
		b = &backoff{wait: minBackoff}
		l.files[path] = b
	case now.Sub(b.last) < b.wait:
		b.put = true
		return b.last.Add(b.wait), false
	default:
		b.wait = min(2*b.wait, maxBackoff)
	}
	b.last, b.put = now, false
	return time.Time{}, true
}

// next is the time until the first repair that was put off may be made.
func (l *limiter) next() (time.Duration, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var first time.Time
	for _, b := range l.files {
		if at := b.last.Add(b.wait); b.put && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return time.Until(first), !first.IsZero()
}

package hostsconfig

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// step is one file to change: what is there, and what shall be.
type step struct {
	s      situation
	want   []byte
	mode   fs.FileMode // see install
	change Change
	quiet  bool // only the journal changes
	drift  bool // someone undid what we had done
}

// Apply puts the host configuration in place and returns what it changed; a second
// Apply changes nothing. Files that cannot be understood are left alone and
// reported as Skip. An error for one file does not stop the others. It waits for
// other methods to end, and for the disk. Once ctx has ended no further file is
// begun; the changes made by then are returned with the error.
func (h *Hosts) Apply(ctx context.Context) ([]Change, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	changes, err := h.apply(ctx, false)
	h.setState(err)
	return changes, err
}

// Remove undoes everything and returns what it changed. It needs only the
// directories: other options that Apply had do not matter. While Run of the
// same Hosts is active it does not last: end that Run instead. It waits, and
// obeys ctx, like Apply; what it leaves then, another Remove finds.
func (h *Hosts) Remove(ctx context.Context) ([]Change, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	changes, err := h.change(func(d directory) ([]Change, error) { return h.removeFrom(ctx, d) })
	h.setState(errRemoved)
	return changes, err
}

// Plan returns what Apply would change, and changes nothing. It takes no lock on the
// directories: if another process is at work it may see a change half made.
func (h *Hosts) Plan(ctx context.Context) ([]Change, error) {
	return h.foresee(func(m *managed) ([]Change, error) {
		steps, err := h.plan(ctx, m)
		link := m.planUnlink
		if h.linksColon(m) {
			link = m.planLink
		}
		return append(visible(steps), link()...), err
	})
}

// PlanRemove returns what Remove would change, and changes nothing.
func (h *Hosts) PlanRemove(ctx context.Context) ([]Change, error) {
	return h.foresee(func(m *managed) ([]Change, error) {
		rels, err := m.taken()
		var steps []step
		for _, rel := range rels {
			steps = append(steps, m.planRestore(rel))
		}
		return append(visible(steps), m.planUnlink()...), errors.Join(err, ctx.Err())
	})
}

// OtherProxies are the addresses of proxies, other than ProxyAddr, that the entries in
// place were written for.
func (h *Hosts) OtherProxies() []string {
	var out []string
	_, _ = h.foresee(func(m *managed) ([]Change, error) { // Plan reports the errors
		if p := m.journal.Proxy; p != "" && p != h.proxy.String() && !slices.Contains(out, p) {
			out = append(out, p)
		}
		return nil, nil
	})
	return out
}

// foresee gathers the changes that plan finds in each directory, opened for
// reading only.
func (h *Hosts) foresee(plan func(*managed) ([]Change, error)) ([]Change, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var changes []Change
	var problems []error
	for _, d := range h.directories() {
		m, err := peek(d.path, d.runtime)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		c, err := plan(m)
		changes, problems = append(changes, c...), append(problems, err)
	}
	return changes, errors.Join(problems...)
}

// visible are the changes of steps that change more than the journal.
func visible(steps []step) []Change {
	var out []Change
	for _, st := range steps {
		if !st.quiet {
			out = append(out, st.change)
		}
	}
	return out
}

var (
	errRemoved = errors.New("the host configuration has been removed")
	errNotYet  = errors.New("the host configuration has not been applied yet")
)

// InPlace returns nil if the last Apply, or the last repair by Run, left the
// host configuration in place. It reads no file.
func (h *Hosts) InPlace() error {
	h.stateMu.Lock()
	defer h.stateMu.Unlock()
	return h.state
}

func (h *Hosts) setState(err error) {
	h.stateMu.Lock()
	defer h.stateMu.Unlock()
	h.state = err
}

type directory struct{ path, runtime string }

func (h *Hosts) directories() []directory {
	var out []directory
	if h.opts.Containerd != "" {
		out = append(out, directory{h.opts.Containerd, containerd})
	}
	if h.opts.CRIO != "" {
		out = append(out, directory{h.opts.CRIO, crio})
	}
	return out
}

// lock opens a directory, or returns the one that Run holds. Caller holds mu.
func (h *Hosts) lock(ctx context.Context, d directory) (m *managed, done func() error, err error) {
	if m := h.held[d.path]; m != nil {
		// While a link is away it will be back, perhaps to something else.
		if m.holds(m.named) || missing(m.named) && m.holds(m.path) {
			if err = m.load(); err != nil {
				err = m.recover() // as with one that is found damaged
			}
			return m, func() error { return nil }, err
		}
		delete(h.held, d.path)
		if err := errors.Join(h.leave(ctx, m), m.release()); err != nil {
			h.log.Warn("host directory was replaced, and not all of the former one is given back", "runtime", d.runtime, "path", m.path, "err", err)
		}
	}
	m, err = open(d.path, d.runtime, h.proxy.String(), h.disk)
	if err != nil {
		return nil, nil, err
	}
	if h.running {
		h.held[d.path] = m
		return m, func() error { return nil }, nil
	}
	return m, m.release, nil
}

// leave restores a directory that is no longer the configured one. A link to it may
// lead elsewhere now, as MicroK8s' "current" does after an update; a directory that
// was replaced, journal and all, no longer has anything of ours.
func (h *Hosts) leave(ctx context.Context, m *managed) error {
	if !m.holds(m.path) {
		return nil
	}
	if err := m.load(); err != nil {
		return err
	}
	_, err := h.removeAll(ctx, m)
	return err
}

// explain adds what to do to errors that have one cause.
func explain(d directory, err error) error {
	switch {
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("hosts.%s: %w; mount %s read-write, or do not set the key", d.runtime, err, d.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("hosts.%s: %w; run as a user who may write %s", d.runtime, err, d.path)
	}
	return fmt.Errorf("hosts.%s: %w", d.runtime, err)
}

// change does work in each directory, and tells CRI-O of it. Caller holds mu.
func (h *Hosts) change(work func(d directory) ([]Change, error)) ([]Change, error) {
	var changes []Change
	var problems []error
	for _, d := range h.directories() {
		c, err := work(d)
		changes = append(changes, c...)
		if err != nil {
			problems = append(problems, explain(d, err))
		}
	}
	h.reloadAfter(changes)
	return changes, errors.Join(problems...)
}

// apply does the work of Apply, and of a repair by Run. Caller holds mu.
func (h *Hosts) apply(ctx context.Context, repair bool) ([]Change, error) {
	h.limiter.begin()
	return h.change(func(d directory) ([]Change, error) {
		m, done, err := h.lock(ctx, d)
		if err != nil {
			return nil, err
		}
		changes, err := h.applyDir(ctx, m, repair)
		return changes, errors.Join(err, done())
	})
}

func (h *Hosts) applyDir(ctx context.Context, m *managed, repair bool) ([]Change, error) {
	steps, err := h.plan(ctx, m)
	problems := []error{err}
	var changes []Change
	for _, st := range steps {
		if err := ctx.Err(); err != nil {
			return changes, errors.Join(append(problems, err)...)
		}
		if repair && st.drift {
			if next, ok := h.limiter.allow(st.change.Path); !ok {
				problems = append(problems, fmt.Errorf("%s: something keeps changing this file; next repair at %s", st.change.Path, next.Format("15:04:05")))
				continue
			}
		}
		if err := h.perform(m, st); err != nil {
			problems = append(problems, err)
			continue
		}
		h.report(m, st, repair)
		if !st.quiet {
			changes = append(changes, st.change)
		}
	}
	link := m.unlinkColon
	if h.linksColon(m) {
		link = m.linkColon
	}
	c, err := link()
	return append(changes, c...), errors.Join(append(problems, err)...)
}

func (h *Hosts) linksColon(m *managed) bool { return h.opts.ColonLink && m.runtime == containerd }

func (h *Hosts) perform(m *managed, st step) error {
	switch st.change.Action {
	case Skip:
		return nil
	case Restore, Delete:
		return m.restore(st.s)
	}
	if dir := filepath.Dir(st.s.rel); dir != "." {
		if err := m.ensureDir(dir); err != nil {
			return err
		}
	}
	return m.install(st.s, st.want, st.mode)
}

// report logs and counts one step that has been taken. A file that is left
// alone is logged once per reason.
func (h *Hosts) report(m *managed, st step, repair bool) {
	path := st.change.Path
	if st.change.Action == Skip {
		if h.reasons[path] != st.change.Reason {
			h.reasons[path] = st.change.Reason
			h.log.Warn("host file left alone", "runtime", m.runtime, "path", path, "err", st.change.Reason)
		}
		return
	}
	delete(h.reasons, path)
	if repair && st.drift {
		h.metrics.repaired.WithLabelValues(m.runtime).Inc()
		h.log.Warn("host file repaired after a change by someone else", "runtime", m.runtime, "path", path)
		return
	}
	if st.quiet {
		return
	}
	message := "host file written"
	if st.change.Action == Restore || st.change.Action == Delete {
		message = "host file given back"
	}
	h.log.Info(message, "runtime", m.runtime, "path", path, "action", string(st.change.Action))
}

// plan compares the files with what they shall be.
func (h *Hosts) plan(ctx context.Context, m *managed) ([]step, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	rels, render, err := h.targets(m)
	if err != nil {
		return nil, err
	}
	var steps []step
	for _, rel := range rels {
		if st := h.planFile(m, rel, render); st != nil {
			steps = append(steps, *st)
		}
	}
	for _, rel := range m.entries() {
		if slices.Contains(rels, rel) {
			continue
		}
		steps = append(steps, m.planRestore(rel))
	}
	return steps, nil
}

func (h *Hosts) hiddenRoots() []string {
	if h.opts.hiddenRoots != nil {
		return h.opts.hiddenRoots
	}
	return hiddenRoots(os.DirFS("/"), h.opts.Containerd)
}

// renderFunc returns the content of a file, and the most that its mode may be if that is
// from elsewhere.
type renderFunc func(rel string, original *file) ([]byte, fs.FileMode, error)

// targets lists the files to manage and how to render them.
func (h *Hosts) targets(m *managed) ([]string, renderFunc, error) {
	if m.runtime == crio {
		return []string{dropInName}, func(_ string, original *file) ([]byte, fs.FileMode, error) {
			data, err := h.renderCRIO(m, original)
			return data, defaultMode, err
		}, nil
	}
	hidden := h.hiddenRoots()
	c, err := readCertsDir(m, hidden)
	if err != nil {
		return nil, nil, err
	}
	if i := slices.IndexFunc(hidden, missing); i >= 0 && h.opts.Contained {
		linkAlone := h.opts.ColonLink && (h.opts.hiddenRoots != nil || readsOneRoot(os.DirFS("/")))
		if !linkAlone {
			c.unseen = hidden[i]
		}
	}
	var rels []string
	for _, name := range c.names(h.opts.Registries) {
		rels = append(rels, filepath.Join(name, hostsName))
	}
	return rels, func(rel string, original *file) ([]byte, fs.FileMode, error) {
		return c.render(filepath.Dir(rel), original, h.proxy)
	}, nil
}

// planFile returns nil if the file is as it shall be.
func (h *Hosts) planFile(m *managed, rel string, render renderFunc) *step {
	s, err := m.situate(rel)
	if err != nil {
		return m.skip(rel, err)
	}
	want, mode, err := render(rel, s.original)
	if err != nil {
		if m.runtime == containerd && (s.ours || s.rewritten) {
			// Ours around something that no longer parses: give the user's back.
			// On CRI-O it is another file that does not parse, and ours stays.
			st := m.planRestore(rel)
			st.change.Reason = err.Error()
			return &st
		}
		return m.skip(rel, err)
	}
	known := m.journal.Files[rel] != nil
	mode &= m.modeBehind(s.original, rel)
	st := &step{s: s, want: want, mode: mode, quiet: s.holds(want, mode), drift: known && !s.ours}
	if st.quiet && known && !s.unsaved {
		return nil
	}
	st.change = Change{Path: m.at(rel), Runtime: m.runtime, Action: Update, ReloadNeeded: m.runtime == crio}
	if s.current == nil {
		st.change.Action = Create
	}
	st.change.Diff = unifiedDiff(m.at(rel), s.current.content(), want, s.current == nil, false)
	return st
}

func (m *managed) skip(rel string, err error) *step {
	return &step{s: situation{rel: rel}, change: Change{Path: m.at(rel), Runtime: m.runtime, Action: Skip, Reason: err.Error()}}
}

// planRestore is the step that gives one file back.
func (m *managed) planRestore(rel string) step {
	s, err := m.situate(rel)
	if err != nil {
		return *m.skip(rel, err)
	}
	if m.lost(rel) {
		s.original = nil
	}
	st := step{s: s, quiet: !s.reverts()}
	st.change = Change{Path: m.at(rel), Runtime: m.runtime, Action: Restore, ReloadNeeded: m.runtime == crio}
	if s.original == nil {
		st.change.Action = Delete
	}
	st.change.Diff = unifiedDiff(m.at(rel), s.current.content(), s.original.content(), s.current == nil, s.original == nil)
	return st
}

func (h *Hosts) removeFrom(ctx context.Context, d directory) ([]Change, error) {
	if m := h.held[d.path]; m == nil || !m.holds(m.path) { // what is held is there, though a link to it may be away
		if there, err := hasTraces(d); err != nil || !there {
			return nil, err
		}
	}
	m, _, err := h.lock(ctx, d)
	if err != nil {
		return nil, err
	}
	delete(h.held, d.path)
	changes, err := h.removeAll(ctx, m)
	return changes, errors.Join(err, m.release())
}

// removeAll gives back everything in a directory, and then the directory.
func (h *Hosts) removeAll(ctx context.Context, m *managed) ([]Change, error) {
	rels, err := m.taken()
	if err != nil {
		return nil, err
	}
	var changes []Change
	var problems []error
	for _, rel := range rels {
		if err := ctx.Err(); err != nil {
			return changes, err
		}
		st := m.planRestore(rel)
		if err := h.perform(m, st); err != nil {
			problems = append(problems, err)
			continue
		}
		if st.change.Action == Skip {
			problems = append(problems, fmt.Errorf("%s: cannot be restored: %s", st.change.Path, st.change.Reason))
		}
		h.report(m, st, false)
		if !st.quiet {
			changes = append(changes, st.change)
		}
	}
	c, err := m.unlinkColon()
	changes = append(changes, c...)
	if err := errors.Join(append(problems, err)...); err != nil {
		return changes, err
	}
	return changes, m.close()
}

// hasTraces reports whether there is anything of ours in a directory, so that
// Remove leaves no trace where there was none.
func hasTraces(d directory) (bool, error) {
	if err := (&managed{path: d.path}).clearSiblings(); err != nil {
		return false, err
	}
	if _, err := os.Stat(d.path); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	m, err := peek(d.path, d.runtime)
	if err != nil {
		return false, err
	}
	if _, err := os.Lstat(m.at(journalDir)); err == nil {
		return true, nil
	}
	stale, err := m.staleFiles()
	return len(stale) > 0, err
}

// taken lists the files to give back: those of the journal, then strays.
func (m *managed) taken() ([]string, error) {
	stale, err := m.staleFiles()
	return append(m.entries(), stale...), err
}

// staleFiles lists files with a part of ours that no journal knows of.
func (m *managed) staleFiles() ([]string, error) {
	candidates := []string{dropInName}
	if m.runtime == containerd {
		candidates = nil
		r, err := hostDirs(m.path)
		if err != nil {
			return nil, err
		}
		for name := range r.dirs {
			candidates = append(candidates, filepath.Join(name, hostsName))
		}
		slices.Sort(candidates)
	}
	var out []string
	for _, rel := range candidates {
		f, err := readFile(m.at(rel))
		// A host directory can have several names.
		known := slices.ContainsFunc(append(m.entries(), out...), func(other string) bool { return same(m.at(other), m.at(rel)) })
		if err == nil && f != nil && f.link == "" && hasBlock(f.data) && !known {
			out = append(out, rel)
		}
	}
	return out, nil
}

// Upstreams returns what the runtimes were configured to use before us, in
// the order of their precedence. It reads the files and may be called before
// Apply. What cannot be read is logged, and is what it was when it last could.
func (h *Hosts) Upstreams() []Imported {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.upstreams()
}

func (h *Hosts) upstreams() []Imported {
	var out []Imported
	for _, d := range h.directories() {
		list, err := h.importFrom(d)
		if err != nil {
			// CRI-O goes on with what it has read: with the mirrors, and the blocks.
			h.log.Warn("existing host configuration not imported", "runtime", d.runtime, "path", d.path, "err", err)
			list = h.imports[d.path]
		}
		h.imports[d.path] = list
		out = append(out, list...)
	}
	return out
}

func (h *Hosts) importFrom(d directory) ([]Imported, error) {
	m, err := peek(d.path, d.runtime)
	if err != nil {
		return nil, err
	}
	if d.runtime == crio {
		s, err := m.situate(dropInName)
		if err != nil {
			return nil, err
		}
		return h.importCRIO(m, s.original)
	}
	c, err := readCertsDir(m, h.hiddenRoots())
	if err != nil {
		return nil, err
	}
	return c.imported(h.proxy), nil
}

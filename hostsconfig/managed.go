package hostsconfig

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Names below a managed directory. It is beside the files it protects so that
// it is on their file system and outlives the cache directory.
const (
	journalDir  = ".larder"
	journalName = "journal.json"
	// badName keeps a journal that could not be read. While it is there no
	// backup is ever deleted.
	badName  = "journal.bad"
	lockName = "lock"
	// A directory that we create or remove as a whole has these names while it
	// is incomplete.
	newSuffix     = ".larder-new"
	removedSuffix = ".larder-removed"
)

// managed is one managed directory: the only thing that changes files in it.
type managed struct {
	path    string // without symlinks
	named   string // as configured
	runtime string
	proxy   string
	disk    disk
	journal *journal
	lock    *os.File // held while open; nil when reading only
	keepAll bool     // a bad journal is kept: delete no backup
}

func (m *managed) at(rel ...string) string {
	return filepath.Join(append([]string{m.path}, rel...)...)
}

func (m *managed) backup(name string) string { return m.at(journalDir, name) }

// peek opens a directory for reading only; it need not exist.
func peek(path, runtime string) (*managed, error) {
	m := &managed{path: path, named: path, runtime: runtime}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		m.path = real
	}
	if err := m.load(); err != nil && errors.Is(err, fs.ErrPermission) {
		return nil, err
	}
	return m, nil
}

// open locks a directory for changes, creates it if it is missing, and clears
// what a crash left half done.
func open(path, runtime, proxy string, d disk) (*managed, error) {
	m := &managed{path: path, named: path, runtime: runtime, proxy: proxy, disk: d}
	if err := m.clearSiblings(); err != nil {
		return nil, err
	}
	if err := m.create(); err != nil {
		return nil, fmt.Errorf("create %s: %w", path, err)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	m.path = real
	if err := d.makeDir(m.at(journalDir)); err != nil {
		return nil, fmt.Errorf("make a journal in %s (must be writable): %w", path, err)
	}
	if err := m.acquire(); err != nil {
		return nil, err
	}
	if err := m.recover(); err != nil {
		return nil, errors.Join(err, m.release())
	}
	return m, nil
}

// acquire takes the directory's lock, which the kernel drops with the process.
func (m *managed) acquire() error {
	for range 10 {
		f, err := os.OpenFile(m.backup(lockName), os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			_ = f.Close() // never locked
			if errors.Is(err, syscall.EWOULDBLOCK) {
				return m.busy()
			}
			return fmt.Errorf("lock %s: %w", m.path, err)
		}
		// The previous holder may have removed the file we hold a lock on.
		m.lock = f
		if m.holds(m.path) {
			return nil
		}
		_ = f.Close() // a lock on a file nobody else can find
	}
	return fmt.Errorf("lock %s: the lock file keeps vanishing", m.path)
}

func (m *managed) busy() error {
	who := ""
	var j journal
	if data, err := os.ReadFile(m.backup(journalName)); err == nil && json.Unmarshal(data, &j) == nil {
		who = ", for the proxy at " + j.Proxy
	}
	return fmt.Errorf("%s%s: %w; stop it first", m.path, who, ErrBusy)
}

// holds reports whether our lock is the one that others would find in dir.
func (m *managed) holds(dir string) bool {
	if m.lock == nil {
		return false
	}
	ours, err := m.lock.Stat()
	if err != nil {
		return false
	}
	theirs, err := os.Stat(filepath.Join(dir, journalDir, lockName))
	return err == nil && os.SameFile(ours, theirs)
}

func (m *managed) release() error {
	if m.lock == nil {
		return nil
	}
	err := m.lock.Close()
	m.lock = nil
	return err
}

// recover loads the journal and removes what no entry names: backups made
// before their entry was, and temporary files.
func (m *managed) recover() error {
	if err := m.load(); err != nil {
		if err := m.disk.rename(m.backup(journalName), m.backup(badName)); err != nil {
			return err
		}
		m.journal = newJournal()
	}
	_, err := os.Lstat(m.backup(badName))
	m.keepAll = err == nil
	if m.journal.Proxy != m.proxy {
		m.journal.Proxy = m.proxy
		if err := m.save(); err != nil {
			return err
		}
	}
	return m.sweep()
}

func (m *managed) sweep() error {
	used := map[string]bool{journalName: true, badName: true, lockName: true}
	dirs := map[string]bool{m.at(): true}
	for rel, e := range m.journal.Files {
		used[e.Backup] = true
		dirs[filepath.Dir(m.at(rel))] = true
	}
	entries, err := os.ReadDir(m.at(journalDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		temp := strings.HasPrefix(e.Name(), tempPrefix)
		if used[e.Name()] || m.keepAll && !temp {
			continue
		}
		if err := removeIfThere(m.backup(e.Name())); err != nil {
			return err
		}
	}
	for dir := range dirs {
		if err := sweepTemps(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// create makes the managed directory, with the journal that says so, appear in
// one rename, so that there is never one without the other.
func (m *managed) create() error {
	if _, err := os.Stat(m.path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	top, levels := m.path, 1
	for {
		if _, err := os.Lstat(filepath.Dir(top)); err == nil {
			break
		}
		top, levels = filepath.Dir(top), levels+1
	}
	rest, err := filepath.Rel(top, m.path)
	if err != nil {
		return err
	}
	temp := top + newSuffix
	dir := temp
	if err := m.disk.makeDir(dir); err != nil {
		return err
	}
	for _, part := range append(strings.Split(rest, "/"), journalDir) {
		dir = filepath.Join(dir, part)
		if part == "." {
			continue
		}
		if err := m.disk.makeDir(dir); err != nil {
			return err
		}
	}
	fresh := managed{path: filepath.Join(temp, rest), disk: m.disk, journal: newJournal()}
	fresh.journal.Proxy, fresh.journal.Levels = m.proxy, levels
	if err := fresh.save(); err != nil {
		return err
	}
	err = m.disk.rename(temp, top)
	if _, there := os.Stat(m.path); err != nil && there == nil {
		return os.RemoveAll(temp) // someone else was first
	}
	return err
}

// ensureDir creates a directory below the managed one.
func (m *managed) ensureDir(rel string) error {
	if _, err := os.Stat(m.at(rel)); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !slices.Contains(m.journal.Dirs, rel) {
		m.journal.Dirs = append(m.journal.Dirs, rel)
		if err := m.save(); err != nil {
			return err
		}
	}
	return m.disk.makeDir(m.at(rel))
}

// close gives up a directory in which nothing is managed any more: directories
// we created, the journal and the lock file go. The lock itself stays with the
// caller.
func (m *managed) close() error {
	for _, rel := range slices.Backward(m.journal.Dirs) {
		if _, err := m.disk.removeDir(m.at(rel)); err != nil {
			return err
		}
	}
	if m.keepAll {
		return fmt.Errorf("%s: its journal was unreadable, so the originals in it are kept; check them and delete the directory", m.at(journalDir))
	}
	gone, err := m.removeWhole()
	if err != nil || gone {
		return err
	}
	for _, name := range []string{journalName, lockName} {
		if err := m.disk.remove(m.backup(name)); err != nil {
			return err
		}
	}
	_, err = m.disk.removeDir(m.at(journalDir))
	return err
}

// removeWhole removes the managed directory itself as far as we created it and
// nobody else uses it; again in one rename, because the journal inside is what
// says that the directory is ours to remove.
func (m *managed) removeWhole() (bool, error) {
	for levels := m.journal.Levels; levels > 0; levels-- {
		top := m.path
		for range levels - 1 {
			top = filepath.Dir(top)
		}
		if !onlyChain(top, m.path) {
			continue
		}
		err := m.disk.rename(top, top+removedSuffix)
		if errors.Is(err, syscall.EBUSY) {
			continue // a mount point stays
		}
		if err != nil {
			return false, err
		}
		if rest, err := filepath.Rel(top, m.path); err != nil || !onlyChain(top+removedSuffix, filepath.Join(top+removedSuffix, rest)) {
			return false, m.disk.rename(top+removedSuffix, top) // someone came in between
		}
		return true, os.RemoveAll(top + removedSuffix)
	}
	return false, nil
}

// onlyChain reports whether top holds nothing but the path down to the
// managed directory, and that nothing but the journal.
func onlyChain(top, managedDir string) bool {
	for dir := managedDir; ; dir = filepath.Dir(dir) {
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			return false
		}
		if dir == top {
			break
		}
	}
	_, err := os.Stat(filepath.Join(managedDir, journalDir))
	return err == nil
}

// clearSiblings removes what a crash left of create and removeWhole.
func (m *managed) clearSiblings() error {
	for top := m.path; top != filepath.Dir(top); top = filepath.Dir(top) {
		for _, suffix := range []string{newSuffix, removedSuffix} {
			if _, err := os.Lstat(top + suffix); errors.Is(err, fs.ErrNotExist) {
				continue // a container's read-only root would refuse to remove even this
			}
			if err := os.RemoveAll(top + suffix); err != nil {
				return err
			}
		}
	}
	return nil
}

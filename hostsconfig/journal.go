package hostsconfig

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
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

// journal says what to give back. It is written, and durable, before the
// change it describes is made (I1).
type journal struct {
	Version int    `json:"version"`
	Proxy   string `json:"proxy"` // whose entries these are, for people
	// Levels is how many levels of the managed directory's own path we created.
	Levels int `json:"levels,omitempty"`
	// Dirs are directories we created, relative, parents first.
	Dirs []string `json:"dirs,omitempty"`
	// Link is the second root of the colon link, "" without one; LinkDirs are
	// the directories created for it, as they follow the managed path.
	Link     string   `json:"link,omitempty"`
	LinkDirs []string `json:"link_dirs,omitempty"`

	Files map[string]*entry `json:"files"`
}

// entry is one file we replaced or created; see the states in DESIGN.md.
type entry struct {
	// Sum identifies the user's original, "" when there was none.
	Sum string `json:"sum,omitempty"`
	// Backup is the original's name below journalDir, "" when there was none.
	Backup string `json:"backup,omitempty"`
	// Ours are the sums of what we wrote, or may have written before a crash.
	Ours []string `json:"ours"`
}

const journalVersion = 1

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

func newJournal() *journal { return &journal{Version: journalVersion, Files: map[string]*entry{}} }

func (m *managed) load() error {
	m.journal = newJournal()
	f, err := readFile(m.backup(journalName))
	if err != nil || f == nil {
		return err
	}
	j := newJournal()
	if err := json.Unmarshal(f.data, j); err != nil {
		return fmt.Errorf("journal %s: %w", m.backup(journalName), err)
	}
	if j.Version != journalVersion {
		return fmt.Errorf("journal %s: version %d is not %d", m.backup(journalName), j.Version, journalVersion)
	}
	if !j.local() {
		return fmt.Errorf("journal %s: it names files elsewhere", m.backup(journalName))
	}
	m.journal = j
	return nil
}

// local reports whether all names stay in the managed directory: what is in
// the journal is deleted, by root.
func (j *journal) local() bool {
	for rel, e := range j.Files {
		if e == nil || !filepath.IsLocal(rel) || e.Backup != "" && (!filepath.IsLocal(e.Backup) || e.Backup != filepath.Base(e.Backup)) {
			return false
		}
	}
	for _, dir := range j.Dirs {
		if !filepath.IsLocal(dir) {
			return false
		}
	}
	// The link's directories follow the managed path as in "certs.d:/etc".
	for _, dir := range append(slices.Clone(j.LinkDirs), ":"+j.Link) {
		rest, ok := strings.CutPrefix(dir, ":")
		if !ok || rest != "" && (rest[0] != '/' || rest != filepath.Clean(rest)) {
			return false
		}
	}
	return true
}

func (m *managed) save() error {
	data, err := json.MarshalIndent(m.journal, "", "  ")
	if err != nil {
		return err
	}
	if err := m.disk.write(m.backup(journalName), append(data, '\n'), nil); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	return nil
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

// situation is what is at a managed path and whose it is.
type situation struct {
	rel     string
	current *file
	// original is what the user wants there without us; nil is nothing.
	original *file
	// unsaved: the original is not in the journal yet. It is the current file,
	// or, if rewritten, was taken out of it.
	unsaved   bool
	rewritten bool
	// ours: the current file is, to the byte, what we wrote.
	ours bool
	// mode is for a file of ours where there was none.
	mode fs.FileMode
}

// situate tells the user's files from ours by content, never by time (I2).
func (m *managed) situate(rel string) (situation, error) {
	s := situation{rel: rel}
	var err error
	if s.current, err = readFile(m.at(rel)); err != nil {
		return s, err
	}
	e := m.journal.Files[rel]
	switch {
	case e != nil && s.current == nil:
		s.original, err = m.original(rel)
	case e != nil && slices.Contains(e.Ours, s.current.sum()):
		s.ours = true
		s.original, err = m.original(rel)
	case e != nil && s.current.sum() == e.Sum:
		s.original = s.current
		s.unsaved = !same(m.at(rel), m.backup(e.Backup))
	case s.current != nil && s.current.link == "" && hasBlock(s.current.data): // we write no symlinks
		s.takeOut()
	default:
		s.original = s.current
		s.unsaved = s.current != nil || e != nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		// Someone deleted the backup; what is left of it is in our file.
		err = nil
		if s.current != nil {
			s.takeOut()
		}
	}
	return s, err
}

// takeOut makes the original what is left of the current file without us.
func (s *situation) takeOut() {
	s.unsaved, s.rewritten = true, true
	if data := removeBlock(s.current.data); len(data) > 0 {
		f := *s.current
		f.data, f.link = data, ""
		s.original = &f
	}
}

// original reads an entry's backup.
func (m *managed) original(rel string) (*file, error) {
	e := m.journal.Files[rel]
	if e.Backup == "" {
		return nil, nil
	}
	info, err := os.Lstat(m.backup(e.Backup))
	if err != nil {
		return nil, err
	}
	if info.Mode()&fs.ModeSymlink == 0 {
		return readFile(m.backup(e.Backup))
	}
	// A relative target counts from where the link was.
	target, err := os.Readlink(m.backup(e.Backup))
	if err != nil {
		return nil, err
	}
	f, err := readFile(absolute(target, filepath.Dir(m.at(rel))))
	if err != nil {
		return nil, err
	}
	if f == nil {
		f = &file{} // it leads nowhere now, and is the user's all the same
	}
	f.link = target
	return f, nil
}

// errRaced: the file changed between reading and replacing it.
var errRaced = errors.New("changed while it was being replaced; the next pass takes it up")

// install makes data the content of s.rel. See DESIGN.md for the states.
func (m *managed) install(s situation, data []byte) error {
	old := m.journal.Files[s.rel]
	e := &entry{Ours: []string{sumOf(data)}}
	if old != nil {
		e.Sum, e.Backup = old.Sum, old.Backup
		if s.ours {
			e.Ours = append(e.Ours, s.current.sum())
		}
	}
	if s.unsaved || old == nil {
		if err := m.keep(s, e); err != nil {
			return err
		}
	}
	if old == nil || !sameEntry(old, e) {
		m.journal.Files[s.rel] = e
		if err := m.save(); err != nil {
			return err
		}
		if old != nil && old.Backup != e.Backup {
			if err := m.discard(old); err != nil {
				return err
			}
		}
	}
	if s.current != nil && s.current.link == "" && string(s.current.data) == string(data) {
		return nil
	}
	if !unchanged(m.at(s.rel), s.current) {
		return fmt.Errorf("%s: %w", m.at(s.rel), errRaced)
	}
	like := s.original
	if s.current != nil {
		like = s.current
	}
	if like == nil || like.link != "" { // a link's own mode says nothing
		like = &file{mode: s.mode & m.modeBehind(like, s.rel), uid: -1, gid: -1}
	}
	return m.disk.write(m.at(s.rel), data, like)
}

// modeBehind is the mode of what a link at rel leads to; all bits if there is none.
func (m *managed) modeBehind(link *file, rel string) fs.FileMode {
	if link != nil {
		if info, err := os.Stat(absolute(link.link, filepath.Dir(m.at(rel)))); err == nil {
			return info.Mode()
		}
	}
	return fs.ModePerm
}

func sameEntry(a, b *entry) bool {
	for _, sum := range b.Ours {
		if !slices.Contains(a.Ours, sum) {
			return false
		}
	}
	return a.Sum == b.Sum && a.Backup == b.Backup
}

// keep saves the original of s and names it in e.
func (m *managed) keep(s situation, e *entry) error {
	e.Sum, e.Backup = s.original.sum(), ""
	if s.original == nil {
		return nil
	}
	e.Backup = m.backupName()
	if s.rewritten {
		return m.disk.write(m.backup(e.Backup), s.original.data, s.original)
	}
	return m.disk.copyTo(m.at(s.rel), m.backup(e.Backup))
}

func (m *managed) backupName() string {
	return strings.TrimSuffix(strings.TrimPrefix(filepath.Base(tempName("")), tempPrefix), ".tmp") + ".orig"
}

func (m *managed) discard(e *entry) error {
	if e.Backup == "" || m.keepAll {
		return nil
	}
	return m.disk.remove(m.backup(e.Backup))
}

// unchanged reports whether path is still the file that was read.
func unchanged(path string, f *file) bool {
	info, err := os.Lstat(path)
	if f == nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	if err != nil {
		return false
	}
	now := newFile(info)
	return now.inode == f.inode && now.device == f.device && now.mtime.Equal(f.mtime)
}

// restore gives s.rel back to the user and forgets it.
func (m *managed) restore(s situation) error {
	e := m.journal.Files[s.rel]
	if err := m.giveBack(s, e); err != nil {
		return err
	}
	if e == nil {
		return nil
	}
	// Without the file an empty directory of ours would still hide _default, and further
	// roots of config_path.
	if dir := filepath.Dir(s.rel); s.original == nil && slices.Contains(m.journal.Dirs, dir) {
		gone, err := m.disk.removeDir(m.at(dir))
		if err != nil {
			return err
		}
		if gone {
			m.journal.Dirs = slices.DeleteFunc(m.journal.Dirs, func(name string) bool { return name == dir })
		}
	}
	delete(m.journal.Files, s.rel)
	if err := m.save(); err != nil {
		return err
	}
	return m.discard(e)
}

// reverts reports whether giveBack would change anything.
func (s situation) reverts() bool {
	return s.rewritten || s.ours || s.current == nil && s.original != nil
}

func (m *managed) giveBack(s situation, e *entry) error {
	switch {
	case !s.reverts():
		return nil // the user's latest is in place
	case s.original == nil:
		return m.disk.remove(m.at(s.rel))
	case s.rewritten:
		return m.disk.write(m.at(s.rel), s.original.data, s.original)
	default:
		return m.disk.copyTo(m.backup(e.Backup), m.at(s.rel))
	}
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

// lost reports whether the user removed the directory that rel was in.
func (m *managed) lost(rel string) bool {
	dir := filepath.Dir(rel)
	return missing(m.at(dir)) && !slices.Contains(m.journal.Dirs, dir)
}

// forget drops an entry whose directory the user removed.
func (m *managed) forget(rel string) error {
	e := m.journal.Files[rel]
	delete(m.journal.Files, rel)
	if err := m.save(); err != nil {
		return err
	}
	return m.discard(e)
}

// entries lists the journal's files in order.
func (m *managed) entries() []string { return slices.Sorted(maps.Keys(m.journal.Files)) }

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

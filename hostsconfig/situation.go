package hostsconfig

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

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
}

// situate tells the user's files from ours by content, never by time (I2).
func (m *managed) situate(rel string) (situation, error) {
	s := situation{rel: rel}
	var err error
	if s.current, err = readFile(m.at(rel)); err != nil {
		return s, err
	}
	if dir := filepath.Dir(m.at(rel)); s.current == nil && missing(dir) {
		if target, err := os.Readlink(dir); err == nil {
			// What it leads to may be mounted later, with our file in it.
			return s, fmt.Errorf("%s leads to %s, which is not there: mount that, or delete the link", dir, target)
		}
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
		s.original, s.unsaved = s.current, true
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
	f, err := readFile(m.behind(rel, target))
	if err != nil {
		return nil, err
	}
	if f == nil {
		f = &file{} // it leads nowhere now, and is the user's all the same
	}
	f.link = target
	return f, nil
}

// behind is where a link at rel leads to. It is not cleaned: the directory of rel may be a
// link as well, and ".." is then the parent of what that leads to.
func (m *managed) behind(rel, target string) string {
	if filepath.IsAbs(target) {
		return target
	}
	return filepath.Dir(m.at(rel)) + "/" + target
}

// errRaced: the file changed between reading and replacing it.
var errRaced = errors.New("changed while it was being replaced, so it is left alone; the next attempt takes it up")

// borrowed: what we write there is from elsewhere, where it may be readable for few.
func (s situation) borrowed() bool { return s.original == nil || s.original.link != "" }

// holds reports whether data is in place, and no more readable than mode if it is borrowed.
func (s situation) holds(data []byte, mode fs.FileMode) bool {
	return s.current.holds(data) && (!s.borrowed() || s.current.mode&^mode == 0)
}

// install makes data the content of s.rel, by the five steps of DESIGN.md. mode bounds that
// of borrowed content.
func (m *managed) install(s situation, data []byte, mode fs.FileMode) error {
	if err := m.enter(s, data); err != nil { // steps 1 to 3
		return err
	}
	if s.holds(data, mode) {
		return nil
	}
	if !unchanged(m.at(s.rel), s.current) { // step 4
		return fmt.Errorf("%s: %w", m.at(s.rel), errRaced)
	}
	like := cmp.Or(s.current, s.original)
	if s.borrowed() {
		limited := file{mode: fs.ModePerm, uid: -1, gid: -1}
		if like != nil && like.link == "" { // a link's own mode says nothing
			limited = *like
		}
		limited.mode &= mode
		like = &limited
	}
	return m.disk.write(m.at(s.rel), data, like) // step 5
}

// enter has the journal know s.rel before data is written there: the original is saved and
// named beside the sum of data, and a former backup discarded.
func (m *managed) enter(s situation, data []byte) error {
	old := m.journal.Files[s.rel]
	e := &entry{Ours: []string{sumOf(data)}}
	if old != nil {
		e.Sum, e.Backup = old.Sum, old.Backup
		if s.ours {
			e.Ours = append(e.Ours, s.current.sum())
		}
	}
	if s.unsaved {
		if err := m.keep(s, e); err != nil {
			return err
		}
	}
	m.journal.Files[s.rel] = e
	if err := m.save(); err != nil {
		return err
	}
	if old == nil || old.Backup == e.Backup {
		return nil
	}
	return m.discard(old)
}

// modeBehind is the mode of what a link at rel leads to; all bits if there is none.
func (m *managed) modeBehind(link *file, rel string) fs.FileMode {
	if link != nil {
		if info, err := os.Stat(m.behind(rel, link.link)); err == nil {
			return info.Mode()
		}
	}
	return fs.ModePerm
}

// keep saves the original of s and names it in e.
func (m *managed) keep(s situation, e *entry) error {
	e.Sum, e.Backup = s.original.sum(), ""
	if s.original == nil {
		return nil
	}
	e.Backup = randomName() + ".orig"
	if s.rewritten {
		return m.disk.write(m.backup(e.Backup), s.original.data, s.original)
	}
	return m.disk.copyTo(m.at(s.rel), m.backup(e.Backup))
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

// giveBack puts the original of s in place, or nothing where there was none. The journal
// still names it: a crash before restore's save finds the user's file.
func (m *managed) giveBack(s situation, e *entry) error {
	switch {
	case !s.reverts():
		return nil // the user's latest is in place
	case !unchanged(m.at(s.rel), s.current):
		return fmt.Errorf("%s: %w", m.at(s.rel), errRaced)
	case s.original == nil:
		return m.disk.remove(m.at(s.rel))
	case s.rewritten:
		return m.disk.write(m.at(s.rel), s.original.data, s.original)
	default:
		return m.disk.copyTo(m.backup(e.Backup), m.at(s.rel))
	}
}

// lost reports whether the user removed the directory that rel was in.
func (m *managed) lost(rel string) bool {
	dir := filepath.Dir(rel)
	return missing(m.at(dir)) && !slices.Contains(m.journal.Dirs, dir)
}

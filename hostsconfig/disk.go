package hostsconfig

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// disk is every change to the file system this package makes, one crash-safe
// step at a time (I1).
type disk struct {
	// step is called before each change; an error stands for a crash. Tests
	// set it, nothing else does.
	step func(op, path string) error
	// unsynced leaves out fsync, for tests that kill no kernel.
	unsynced bool
}

func (d disk) before(op, path string) error {
	if d.step == nil {
		return nil
	}
	return d.step(op, path)
}

// file is what is at a path: a regular file or a symlink, with what a restore
// must bring back. A nil *file means nothing is there.
type file struct {
	data   []byte
	link   string // target, for a symlink; data is then what it leads to
	mode   fs.FileMode
	uid    int
	gid    int
	mtime  time.Time
	device uint64
	inode  uint64
}

// maxConfig bounds what is read into memory. Real files have a few KiB.
const maxConfig = 4 << 20

// readFile reads path, following symlinks for the content. It returns nil if
// nothing is there; a symlink that leads nowhere is an error.
func readFile(path string) (*file, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := newFile(info)
	if info.Mode()&fs.ModeSymlink != 0 {
		if f.link, err = os.Readlink(path); err != nil {
			return nil, err
		}
		if info, err = os.Stat(path); err != nil {
			return nil, fmt.Errorf("symlink %s leads nowhere this process can see: %w", path, err)
		}
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	if info.Size() > maxConfig {
		return nil, fmt.Errorf("%s has %d bytes, more than a configuration file can have", path, info.Size())
	}
	f.data, err = os.ReadFile(path)
	return f, err
}

func newFile(info fs.FileInfo) *file {
	f := &file{mode: info.Mode().Perm(), mtime: info.ModTime(), uid: -1, gid: -1}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		f.uid, f.gid = int(st.Uid), int(st.Gid)
		f.device, f.inode = uint64(st.Dev), st.Ino //nolint:unconvert // narrower on other systems
	}
	return f
}

func (f *file) sum() string {
	if f == nil {
		return ""
	}
	if f.link != "" {
		return "link:" + f.link
	}
	return sumOf(f.data)
}

// content is what is at the path, nil for nothing.
func (f *file) content() []byte {
	if f == nil {
		return nil
	}
	return f.data
}

// holds reports whether there is a regular file with that content.
func (f *file) holds(data []byte) bool {
	return f != nil && f.link == "" && bytes.Equal(f.data, data)
}

func sumOf(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

// tempPrefix starts the name of every temporary file. The names end in .tmp,
// because whatever ends in .conf is read by CRI-O and in .crt by containerd.
const tempPrefix = ".larder-"

func tempName(dir string) string {
	return filepath.Join(dir, tempPrefix+randomName()+".tmp")
}

func randomName() string { return strings.ToLower(rand.Text()[:10]) }

// defaultMode is for files that did not exist before us.
const defaultMode = fs.FileMode(0o644)

// write replaces path by data in one step: a reader sees the old file or the new
// one, even after a power cut. like gives mode and owner; nil means defaultMode.
func (d disk) write(path string, data []byte, like *file) error {
	temp := tempName(filepath.Dir(path))
	if err := d.before("write", temp); err != nil {
		return err
	}
	if err := d.writeSynced(temp, data, like); err != nil {
		return errors.Join(err, removeIfThere(temp))
	}
	return d.moveInto(temp, path)
}

func (d disk) writeSynced(temp string, data []byte, like *file) (err error) {
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(data); err != nil {
		return err
	}
	mode := defaultMode
	if like != nil {
		mode = like.mode
		// Best effort: without the right to give files away ours stays ours.
		if err := f.Chown(like.uid, like.gid); err != nil && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if d.unsynced {
		return nil
	}
	return f.Sync()
}

// moveInto renames temp to path and makes the rename durable.
func (d disk) moveInto(temp, path string) error {
	if err := d.before("rename", path); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return errors.Join(err, removeIfThere(temp))
	}
	return d.syncDir(filepath.Dir(path))
}

// copyTo makes path a second name of src, as the same inode where the file
// system can: then a restore gives back owner, times, labels and ACLs as well,
// and an edit in place that races with us is not lost. Elsewhere it copies.
func (d disk) copyTo(src, path string) error {
	temp := tempName(filepath.Dir(path))
	if err := d.before("link", temp); err != nil {
		return err
	}
	if err := os.Link(src, temp); err != nil {
		if err := d.copyFile(src, temp); err != nil {
			return errors.Join(err, removeIfThere(temp))
		}
	}
	return d.moveInto(temp, path)
}

func (d disk) copyFile(src, dst string) error {
	f, err := readFile(src)
	if err != nil {
		return err
	}
	if f == nil {
		return fmt.Errorf("copy %s: %w", src, fs.ErrNotExist)
	}
	if f.link != "" {
		return os.Symlink(f.link, dst)
	}
	if err := d.writeSynced(dst, f.data, f); err != nil {
		return err
	}
	return os.Chtimes(dst, time.Time{}, f.mtime)
}

func missing(path string) bool {
	_, err := os.Stat(path)
	return errors.Is(err, fs.ErrNotExist)
}

func same(a, b string) bool {
	x, err := os.Lstat(a)
	if err != nil {
		return false
	}
	y, err := os.Lstat(b)
	return err == nil && os.SameFile(x, y)
}

func (d disk) remove(path string) error {
	if err := d.before("remove", path); err != nil {
		return err
	}
	if err := removeIfThere(path); err != nil {
		return err
	}
	return d.syncDir(filepath.Dir(path))
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeDir removes a directory if it is empty, and says whether it is gone.
func (d disk) removeDir(path string) (bool, error) {
	if err := d.before("rmdir", path); err != nil {
		return false, err
	}
	// unlinkat directly: os.Remove would try unlink first and hide ENOTEMPTY.
	switch err := syscall.Rmdir(path); {
	case err == nil:
		return true, d.syncDir(filepath.Dir(path))
	case errors.Is(err, syscall.ENOENT):
		return true, nil
	case errors.Is(err, syscall.ENOTEMPTY), errors.Is(err, syscall.EEXIST), errors.Is(err, syscall.EBUSY), errors.Is(err, syscall.ENOTDIR):
		return false, nil // someone else's now, or a mount point
	default:
		return false, &fs.PathError{Op: "rmdir", Path: path, Err: err}
	}
}

func (d disk) makeDir(path string) error {
	if err := d.before("mkdir", path); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	// The umask must not hide a certs.d from a runtime with another user.
	if err := os.Chmod(path, 0o755); err != nil {
		return err
	}
	return d.syncDir(filepath.Dir(path))
}

func (d disk) symlink(target, path string) error {
	if err := d.before("symlink", path); err != nil {
		return err
	}
	if err := os.Symlink(target, path); err != nil {
		return err
	}
	return d.syncDir(filepath.Dir(path))
}

func (d disk) rename(from, to string) error {
	if err := d.before("rename", to); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return d.syncDir(filepath.Dir(to))
}

// syncDir makes a change of a directory's entries durable. Some file systems
// cannot sync directories; they order metadata themselves.
func (d disk) syncDir(path string) error {
	if d.unsynced {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() // read only
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOTSUP) {
		return err
	}
	return nil
}

// sweepTemps removes what a crash left of write and copyTo in dir.
func sweepTemps(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) && strings.HasSuffix(e.Name(), ".tmp") {
			if err := removeIfThere(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

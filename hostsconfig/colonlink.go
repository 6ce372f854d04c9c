package hostsconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// secondRoot is what containerd 2.2 and the EKS images have behind the colon
// of config_path.
const secondRoot = "/etc/docker/certs.d"

// The transfer service of containerd 2.1 and later does not split config_path:
// it looks for the literal directory "a:b". A symlink of that name, to a,
// makes it work without a restart (containerd issues 12415, 12636, 12808).

func (m *managed) colonPath(second string) string { return m.named + ":" + second }

// colonTarget is relative, to be right in the node's root and in a container
// that sees it elsewhere.
func (m *managed) colonTarget(second string) string {
	target, _ := filepath.Rel(filepath.Dir(m.colonPath(second)), m.named) // both are absolute
	return target
}

// planLink returns the change that linkColon would make, if any.
func (m *managed) planLink() []Change {
	path := m.colonPath(secondRoot)
	if real, err := filepath.EvalSymlinks(path); err == nil && real == m.path {
		return nil
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return []Change{{
			Path: path, Runtime: m.runtime, Action: Skip,
			Reason: "something else is at this path; remove it, or set hosts.containerd_colon_link = false",
		}}
	}
	diff := fmt.Sprintf("--- /dev/null\n+++ %s\n@@ -0,0 +1 @@\n+symlink to %s\n", path, m.colonTarget(secondRoot))
	return []Change{{Path: path, Runtime: m.runtime, Action: Create, Diff: diff}}
}

// planUnlink returns the change that unlinkColon would make, if any.
func (m *managed) planUnlink() []Change {
	if m.journal.Link == "" {
		return nil
	}
	path := m.colonPath(m.journal.Link)
	if target, err := os.Readlink(path); err != nil || target != m.colonTarget(m.journal.Link) {
		return nil // not ours any more
	}
	return []Change{{Path: path, Runtime: m.runtime, Action: Delete}}
}

func (m *managed) linkColon() ([]Change, error) {
	changes := m.planLink()
	if len(changes) == 0 || changes[0].Action == Skip {
		return changes, nil
	}
	dirs := []string{":"}
	for dir := filepath.Dir(secondRoot); dir != "/"; dir = filepath.Dir(dir) {
		dirs = slices.Insert(dirs, 1, ":"+dir) // parents first
	}
	dirs = slices.DeleteFunc(dirs, func(dir string) bool { return !missing(m.named + dir) })
	for _, dir := range dirs {
		if !slices.Contains(m.journal.LinkDirs, dir) {
			m.journal.LinkDirs = append(m.journal.LinkDirs, dir)
		}
	}
	m.journal.Link = secondRoot
	if err := m.save(); err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		if err := m.disk.makeDir(m.named + dir); err != nil {
			return nil, err
		}
	}
	if err := m.disk.symlink(m.colonTarget(secondRoot), m.colonPath(secondRoot)); err != nil {
		return nil, err
	}
	return changes, nil
}

// unlinkColon removes the link if it is still ours, and its directories.
func (m *managed) unlinkColon() ([]Change, error) {
	if m.journal.Link == "" {
		return nil, nil
	}
	changes := m.planUnlink()
	for _, c := range changes {
		if err := m.disk.remove(c.Path); err != nil {
			return nil, err
		}
	}
	for _, dir := range slices.Backward(m.journal.LinkDirs) {
		if _, err := m.disk.removeDir(m.named + dir); err != nil {
			return nil, err
		}
	}
	m.journal.Link, m.journal.LinkDirs = "", nil
	return changes, m.save()
}

package hostsconfig

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

// journal says what to restore. It is written, and durable, before the change
// it describes is made (I1).
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

// entries lists the journal's files in order.
func (m *managed) entries() []string { return slices.Sorted(maps.Keys(m.journal.Files)) }

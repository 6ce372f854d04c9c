package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestVerdictKey holds that the key stays the same, is nobody else's to read, and
// is replaced when it was, or when it is no key.
func TestVerdictKey(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, verdictKeyFile)
	must := func() []byte {
		t.Helper()
		key, err := verdictKey(dir)
		if err != nil || len(key) != verdictKeySize {
			t.Fatalf("%d bytes, %v", len(key), err)
		}
		info, err := os.Lstat(path)
		if err != nil || info.Mode() != 0o600 {
			t.Fatalf("file: %v, %v", info, err)
		}
		return key
	}
	first := must()
	if !bytes.Equal(must(), first) {
		t.Error("another key at the second start")
	}
	for name, spoil := range map[string]func() error{
		"readable by others": func() error { return os.Chmod(path, 0o640) },
		"torn":               func() error { return os.Truncate(path, 5) },
		"empty":              func() error { return os.Truncate(path, 0) },
		"a link":             func() error { _ = os.Remove(path); return os.Symlink("/dev/zero", path) },
		"gone":               func() error { return os.Remove(path) },
		"half written":       func() error { _ = os.Remove(path); return os.WriteFile(path+".new", []byte("x"), 0o644) },
	} {
		before := must()
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(must(), before) {
			t.Errorf("%s: the key is still used", name)
		}
	}
	if _, err := verdictKey(filepath.Join(dir, "missing")); err == nil {
		t.Error("no error where nothing can be written")
	}
}

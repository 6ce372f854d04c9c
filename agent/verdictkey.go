package agent

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	// verdictKeyFile, in the cache directory, holds the key under which the
	// metadata keeps who was allowed to read what. Without it those facts are
	// noise.
	verdictKeyFile = "verdicts.key"
	// verdictKeySize is in bytes, as many as HMAC-SHA-256 makes use of.
	verdictKeySize = 32
)

var errNoVerdictKey = errors.New("not a key")

// verdictKey reads the key, or makes one. A key that others may have read is
// no longer secret: it is replaced, and what was remembered under it is lost.
func verdictKey(dir string) ([]byte, error) {
	path := filepath.Join(dir, verdictKeyFile)
	key, err := readVerdictKey(path)
	if err == nil {
		return key, nil
	}
	if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errNoVerdictKey) {
		return nil, fmt.Errorf("read the key of verdicts: %w", err)
	}
	key = make([]byte, verdictKeySize)
	rand.Read(key)
	if err := writeVerdictKey(path, key); err != nil {
		return nil, fmt.Errorf("keep a key for verdicts: %w", err)
	}
	return key, nil
}

// keepVerdictKey puts the key back if somebody has deleted it: else what is remembered
// from now on would be noise after a restart. If the directory is a different one, with a
// key of its own, that key is used from now on: the facts there are kept under it, and a
// refusal has to find the yes that it ends.
func (a *Agent) keepVerdictKey() {
	path := filepath.Join(a.config.Cache.Dir, verdictKeyFile)
	key, err := readVerdictKey(path)
	switch {
	case err == nil:
		a.verdictKey = key
		return
	case a.verdictKey == nil:
		return
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errNoVerdictKey):
		err = writeVerdictKey(path, a.verdictKey)
	}
	if err != nil {
		a.log.Warn("nobody will be remembered over a restart", "err", err)
	}
}

// readVerdictKey takes what writeVerdictKey makes: a regular file of that size, which nobody
// else may read.
func readVerdictKey(path string) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 || info.Size() != verdictKeySize {
		return nil, errNoVerdictKey
	}
	return os.ReadFile(path)
}

// writeVerdictKey makes the file whole or not at all.
func writeVerdictKey(path string, key []byte) error {
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(key)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

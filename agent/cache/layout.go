package cache

import (
	_ "crypto/sha256" // digest.Algorithm.Hash finds them by registration
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	dirMode    = 0o700 // private images are in here
	ingestMode = 0o600
	blobMode   = 0o444
	mapExt     = ".map"
	// probePrefix names the file that proves that files can be made.
	probePrefix = "probe-"
)

// algorithms are those of the OCI image specification, with the length of
// their hex form. The lengths differ, so a bare hex name is unambiguous.
var algorithms = map[digest.Algorithm]int{digest.SHA256: 64, digest.SHA512: 128}

// checkDigest accepts registered algorithms in canonical form only. Everything
// that becomes a path has passed it.
func checkDigest(d digest.Digest) error {
	algorithm, hex, _ := strings.Cut(string(d), ":")
	if n := algorithms[digest.Algorithm(algorithm)]; n == 0 || len(hex) != n || strings.Trim(hex, "0123456789abcdef") != "" {
		return fmt.Errorf("%q: %w", shorten(string(d)), ErrInvalidDigest)
	}
	return nil
}

// shorten keeps hostile strings out of logs.
func shorten(s string) string {
	if len(s) > 160 {
		return s[:160] + "..."
	}
	return s
}

// digestOf is the way back from a file name; ok is false for foreign names.
func digestOf(hex string) (d digest.Digest, ok bool) {
	for algorithm, n := range algorithms {
		if len(hex) == n {
			d = digest.NewDigestFromEncoded(algorithm, hex)
			return d, checkDigest(d) == nil
		}
	}
	return "", false
}

// layout is where things are below the cache directory:
//
//	blobs/sha256/<hex>   committed, read-only (I1)
//	ingest/<hex>         a fill's bytes, at their final offsets
//	ingest/<hex>.map     which of its pieces are there (see pieceMap)
//	metadata.db          see Meta
type layout string

func (l layout) blobs(a digest.Algorithm) string {
	return filepath.Join(string(l), "blobs", a.String())
}
func (l layout) blob(d digest.Digest) string {
	return filepath.Join(l.blobs(d.Algorithm()), d.Encoded())
}
func (l layout) ingests() string                  { return filepath.Join(string(l), "ingest") }
func (l layout) ingest(d digest.Digest) string    { return filepath.Join(l.ingests(), d.Encoded()) }
func (l layout) ingestMap(d digest.Digest) string { return l.ingest(d) + mapExt }
func (l layout) metadata() string                 { return filepath.Join(string(l), "metadata.db") }

// make creates the directories; it is called again whenever they turn out to
// be gone (I9).
func (l layout) make() error {
	dirs := []string{l.ingests()}
	for a := range algorithms {
		dirs = append(dirs, l.blobs(a))
	}
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, dirMode); err != nil {
			return err
		}
	}
	return nil
}

// check makes the directories and proves that files can be made in them. Lack of room is
// no error: room may come, and the cache may have to make it.
func (l layout) check() error {
	err := l.make()
	if err == nil {
		var probe *os.File
		if probe, err = os.CreateTemp(l.ingests(), probePrefix); err == nil {
			err = errors.Join(probe.Close(), os.Remove(probe.Name()))
		}
	}
	if err == nil || diskFull(err) {
		return nil
	}
	return l.explain(err)
}

// explain says what to do when the directory cannot be used.
func (l layout) explain(err error) error {
	hint := "choose another directory with cache.dir"
	switch {
	case errors.Is(err, fs.ErrPermission):
		hint = fmt.Sprintf("let user %d write there (chown %d %s), or %s", os.Getuid(), os.Getuid(), l, hint)
	case errors.Is(err, unix.EROFS):
		hint = "its file system is mounted read-only: remount it, or " + hint
	case errors.Is(err, fs.ErrNotExist): // parents are made, so it is there, and nothing can be made in it
		hint = "if it was deleted where it is mounted from, mount it anew, which a restart of its container does; else " + hint
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EEXIST):
		hint = "a file is in the way: move it, or " + hint
	}
	return fmt.Errorf("cache directory %s cannot be used: %w; %s", l, err, hint)
}

// syncDir makes renames and unlinks in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// reopen opens f's file again, with an offset of its own, even after its name
// is gone.
func reopen(f *os.File) (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

// diskFull reports whether evicting something may help.
func diskFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// lost reports whether err says that a file is gone.
func lost(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) }

// remove unlinks what is there; that nothing is there is no error.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !lost(err) {
		return err
	}
	return nil
}

package credentials

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
)

// maxFile is more than a Kubernetes secret can hold.
const maxFile = 4 << 20

// dockerConfig is what of a config.json is about credentials.
type dockerConfig struct {
	auths      map[string]authn.AuthConfig // as keyed there, none empty
	helpers    map[string]string           // by canonical host
	credsStore string
}

// parseDockerConfig reads a config.json. Its error shows nothing of the body.
func parseDockerConfig(body []byte) (*dockerConfig, error) {
	var doc struct {
		Auths       map[string]json.RawMessage `json:"auths"`
		CredHelpers map[string]string          `json:"credHelpers"`
		CredsStore  string                     `json:"credsStore"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		return nil, jsonProblem(err)
	}
	c := &dockerConfig{auths: map[string]authn.AuthConfig{}, helpers: map[string]string{}, credsStore: doc.CredsStore}
	for key, raw := range doc.Auths {
		var a authn.AuthConfig // its UnmarshalJSON decodes auth as kubelet does
		if json.Unmarshal(raw, &a) != nil {
			return nil, fmt.Errorf("auths: the entry %q is malformed", key[strings.LastIndexByte(key, '@')+1:])
		}
		a.Auth = "" // it is in Username and Password
		if a != (authn.AuthConfig{}) {
			c.auths[key] = a
		}
	}
	for _, host := range slices.Sorted(maps.Keys(doc.CredHelpers)) { // of two for one host, always the same
		c.helpers[canonicalKey(host)] = doc.CredHelpers[host]
	}
	return c, nil
}

// jsonProblem says where JSON is wrong, and not what stands there.
func jsonProblem(err error) error {
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("not valid JSON at byte %d", e.Offset)
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Errorf("%s is of a wrong type", cmp.Or(e.Field, "the whole"))
	}
	return errors.New("not valid JSON")
}

// helper is the credential helper for name, "" if none, and what to ask it
// for. Docker knows helpers by host alone.
func (c *dockerConfig) helper(name string) (helper, server string) {
	server, _, _ = strings.Cut(name, "/")
	helper, ok := c.helpers[server]
	if !ok {
		helper = c.credsStore
	}
	return helper, server
}

// CheckFile says what is wrong with a docker config.json. It runs no helper.
func CheckFile(path string) error {
	_, err := readDockerConfig(path)
	return err
}

func readDockerConfig(path string) (*loaded, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("docker config: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("docker config: %w", err)
	}
	// Within the resolution of its time a file may change unseen.
	l := &loaded{info: info, settled: time.Since(info.ModTime()) > settleTime}
	body, err := readBounded(f)
	if err == nil {
		l.config, err = parseDockerConfig(body)
	}
	return l, wrap(err, "docker config %s", path)
}

// readBounded reads a file of at most maxFile bytes.
func readBounded(f *os.File) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(body) > maxFile {
		err = fmt.Errorf("larger than %d MiB", maxFile>>20)
	}
	return body, err
}

// settleTime is longer than any file system's steps of modification times.
const settleTime = 2 * time.Second

// dockerFile is one config.json, read again whenever it may have changed: the
// check is a stat, which follows the links that Kubernetes swaps in a volume.
type dockerFile struct {
	path string
	last atomic.Pointer[loaded]
}

// loaded is a file as it was read.
type loaded struct {
	info    fs.FileInfo
	settled bool
	config  *dockerConfig
}

func (l *loaded) current(info fs.FileInfo) bool {
	return l != nil && l.settled && os.SameFile(l.info, info) && l.info.Size() == info.Size() && l.info.ModTime().Equal(info.ModTime())
}

// load is the file's content. A file that was good and is malformed now was
// caught while it was written, or edited badly: what it said before holds. One
// that is gone holds nothing.
func (f *dockerFile) load(log *slog.Logger) (*dockerConfig, error) {
	info, err := os.Stat(f.path)
	if err != nil {
		f.last.Store(nil)
		return nil, fmt.Errorf("docker config: %w", err)
	}
	last := f.last.Load()
	if last.current(info) {
		return last.config, nil
	}
	now, err := readDockerConfig(f.path)
	switch {
	case err == nil:
	case now == nil || last == nil:
		return nil, err
	default:
		if now.settled {
			log.Warn("keeping the credentials that a file held before", "err", err)
		}
		now.config = last.config
	}
	f.last.Store(now)
	return now.config, nil
}

package runtimestore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

var (
	// errMismatch makes a bad blob absent.
	errMismatch = fmt.Errorf("%w: the file does not match its digest", fs.ErrNotExist)
	errStopped  = errors.New("the runtime's store has been stopped")
	errChanged  = errors.New("the file changed while it was hashed")
)

// verification is the one hashing of a file that is under way, shared by all who
// have it open. It goes on when they leave: the next one needs it.
type verification struct {
	done chan struct{}
	err  error // valid once done is closed
}

// verify joins or starts the verification of f.
func (s *Store) verify(id file, f *os.File) (*verification, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return nil, errStopped
	}
	if v := s.running[id]; v != nil {
		return v, nil
	}
	own, err := duplicate(f)
	if err != nil {
		return nil, err
	}
	v := &verification{done: make(chan struct{})}
	s.running[id] = v
	s.hashing.Go(func() {
		defer own.Close()
		v.err = s.hash(id, own)
		s.settle(id, v)
	})
	return v, nil
}

// duplicate is another descriptor of the same open file, which outlives both the
// blob's being closed and its name.
func duplicate(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, dupErr := -1, error(nil)
	err = raw.Control(func(orig uintptr) { fd, dupErr = unix.FcntlInt(orig, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, os.NewSyscallError("dup", dupErr)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// hash reads the whole file in constant memory.
func (s *Store) hash(id file, f *os.File) error {
	verifier := id.digest.Verifier()
	if err := s.copy(verifier, io.NewSectionReader(f, 0, id.size)); err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if identify(id.digest, info) != id {
		return errChanged
	}
	if !verifier.Verified() {
		return errMismatch
	}
	return nil
}

// copy ends early when the store stops.
func (s *Store) copy(w io.Writer, r io.Reader) error {
	buf := make([]byte, 256<<10)
	for {
		select {
		case <-s.stop:
			return errStopped
		default:
		}
		n, err := r.Read(buf)
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// settle remembers the outcome and tells those who wait. Failures to read are
// not remembered: they say nothing about the bytes.
func (s *Store) settle(id file, v *verification) {
	switch {
	case v.err == nil:
		s.verified.put(id, true)
	case errors.Is(v.err, errMismatch):
		s.verified.put(id, false)
		s.log.Error("a blob of the runtime does not match its digest, its disk may be failing; remove the image to have it pulled again",
			"digest", id.digest, "bytes", id.size)
		s.hints.add(id.digest)
	case !errors.Is(v.err, errStopped):
		s.log.Warn("cannot verify a blob of the runtime", "digest", id.digest, "err", v.err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.running, id)
	close(v.done)
}

// memo remembers which files are good and which are bad: at least the last
// memoSize of them, in two generations.
type memo struct {
	mu       sync.Mutex // guards everything below
	new, old map[file]bool
}

// memoSize is more blobs than a node holds images' worth of, and about 1 MiB.
const memoSize = 1 << 13

func (m *memo) get(id file) (good, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	good, known = m.new[id]
	if known {
		return good, true
	}
	if good, known = m.old[id]; known {
		m.putLocked(id, good) // used: keep it for another generation
	}
	return good, known
}

func (m *memo) put(id file, good bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.putLocked(id, good)
}

func (m *memo) putLocked(id file, good bool) {
	if m.new == nil || len(m.new) >= memoSize {
		m.new, m.old = make(map[file]bool), m.new
	}
	m.new[id] = good
}

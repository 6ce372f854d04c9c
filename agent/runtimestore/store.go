// Package runtimestore reads blobs straight from the files of containerd's
// content store: what the runtime holds need not be fetched, nor be stored a
// second time. It never writes.
//
// # What is promised
//
// The last bytes of a blob (see held) are not read from it before the SHA-256 of
// the very file, found by device, inode, size and time of modification, has
// matched its name once. Smaller blobs, which manifests are, are never seen
// unverified. A file that does not match is logged once and absent from then on.
//
// Only committed content is seen: files under blobs/sha256 that are regular, not
// empty and without write permission, which containerd takes away right after
// the rename that commits. Symbolic links are not followed out of the directory,
// and a link in place of a blob is refused. Ingests are never looked at.
//
// Content may be deleted while it is read; an open file survives that.
// containerd may stop, restart or be replaced: the files are served all the
// while.
//
// # What is there
//
// The directory is the truth, and it holds the content of all of containerd's
// namespaces. Has and Open look at it each time. For Walk, Knows and Events the store
// keeps an index, which hints bring up to date: changes of the directory
// (inotify), events of containerd over its socket, if one is given, and a
// rescan now and then. A hint only says where to look, so that one that is
// lost, late or doubled does no harm. /content/create exists from containerd 2.1
// on; before that an image event makes a rescan.
//
// Reading needs no more than the directory, mounted read-only: containerd makes
// its root 0700, so uid 0 or CAP_DAC_READ_SEARCH is needed. The socket is as good
// as root on the node. It adds certainty where inotify watches have run out, and
// it alone tells which registries a blob came from, for the store itself is
// shared by all images.
//
// # Rejected
//
// Content over containerd's gRPC API (slow, and gone while containerd restarts);
// its metadata database (locked by containerd); hard links into a directory of
// our own (another mount point is another device), which would make the runtime's
// disk usage ours.
package runtimestore

import (
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
)

// Options of a Store.
type Options struct {
	// ContentDir is the root of containerd's content store, such as
	// /var/lib/containerd/io.containerd.content.v1.content. It need not exist yet.
	ContentDir string
	// Socket is containerd's, "" = none.
	Socket string
	// Events are called from Run, Added and Removed one at a time; a change may be
	// reported late but not twice.
	Events Events
	Logger *slog.Logger // nil = discard
}

// Events tell others what the runtime holds. Nil functions are skipped.
type Events struct {
	Added   func(d digest.Digest, size int64)
	Removed func(d digest.Digest)
	// Sourced is called for a registry, without its port, that an image of the
	// runtime came from and that d is part of; only with a Socket, from a goroutine
	// of its own, and again for all of them whenever containerd may know more.
	Sourced func(d digest.Digest, registry string)
}

// Store is a container runtime's content, read-only.
type Store struct {
	opts     Options
	log      *slog.Logger
	verified *memo
	index    *index
	hints    *hints

	every   time.Duration // rescanInterval; shorter in tests
	hashing sync.WaitGroup
	stop    chan struct{} // closed when Run ends
	silence silence       // of the one goroutine that listens to containerd

	mu      sync.Mutex // guards everything below
	running map[file]*verification
	stopped bool
	problem error
}

// New checks the options; it starts nothing and does not touch the directory.
func New(opts Options) (*Store, error) {
	if !filepath.IsAbs(opts.ContentDir) {
		return nil, fmt.Errorf("runtime content directory %q is not an absolute path", opts.ContentDir)
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	return &Store{
		opts:     opts,
		log:      opts.Logger,
		verified: &memo{},
		index:    &index{events: opts.Events, sizes: map[digest.Digest]int64{}},
		hints:    newHints(),
		every:    rescanInterval,
		stop:     make(chan struct{}),
		running:  map[file]*verification{},
	}, nil
}

// Open opens a blob. The error wraps fs.ErrNotExist if the runtime does not hold
// it, or holds it with other bytes than its digest asks for. Before Run and while
// it runs; not after.
func (s *Store) Open(d digest.Digest) (*Blob, error) {
	f, id, err := s.openFile(d)
	if err != nil {
		return nil, fmt.Errorf("open %s in the runtime's store: %w", d, err)
	}
	b := &Blob{file: f, size: id.size, closed: make(chan struct{})}
	good, known := s.verified.get(id)
	if !known {
		b.pending, err = s.verify(id, f)
	} else if !good {
		err = errMismatch
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open %s in the runtime's store: %w", d, err)
	}
	return b, nil
}

// Has reports whether Open would find the blob, as far as is known without
// reading it.
func (s *Store) Has(d digest.Digest) bool {
	_, ok := s.look(d)
	return ok
}

// Knows is Has by the index: it looks at no file, and may lag behind the directory by
// moments.
func (s *Store) Knows(d digest.Digest) bool { return s.index.has(d) }

// look returns the size of a blob if it may be served.
func (s *Store) look(d digest.Digest) (size int64, ok bool) {
	name, err := blobName(d)
	if err != nil {
		return 0, false
	}
	root, err := os.OpenRoot(s.opts.ContentDir)
	if err != nil {
		return 0, false
	}
	defer root.Close()
	info, err := root.Lstat(name)
	if err != nil || !committed(info) {
		return 0, false
	}
	good, known := s.verified.get(identify(d, info))
	return info.Size(), good || !known
}

// openFile opens a blob's file if it is what a committed blob looks like.
func (s *Store) openFile(d digest.Digest) (*os.File, file, error) {
	name, err := blobName(d)
	if err != nil {
		return nil, file{}, err
	}
	root, err := os.OpenRoot(s.opts.ContentDir)
	if err != nil {
		return nil, file{}, err
	}
	defer root.Close()
	// Lstat first, for Root follows links inside of itself; and no waiting for the
	// writer of a pipe that was put in the blob's place since.
	before, err := root.Lstat(name)
	if err != nil {
		return nil, file{}, err
	}
	if !committed(before) {
		return nil, file{}, fmt.Errorf("%w: mode %v and %d bytes are not those of a committed blob", fs.ErrNotExist, before.Mode(), before.Size())
	}
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, file{}, err
	}
	after, err := f.Stat()
	if err == nil && (!committed(after) || !os.SameFile(before, after)) {
		err = fmt.Errorf("%w: the file was replaced while it was opened", fs.ErrNotExist)
	}
	if err != nil {
		f.Close()
		return nil, file{}, err
	}
	return f, identify(d, after), nil
}

// committed reports whether a file looks as containerd's commit leaves it:
// regular, not empty, and without permission to write.
func committed(info fs.FileInfo) bool {
	return info.Mode().IsRegular() && info.Size() > 0 && info.Mode().Perm()&0o222 == 0
}

// blobsDir is where committed blobs are, below ContentDir. Blobs named by other
// algorithms than SHA-256 are not served.
const blobsDir = "blobs/sha256"

func blobName(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
		return "", fmt.Errorf("%w: %q is not a SHA-256 digest", fs.ErrNotExist, d)
	}
	return blobsDir + "/" + d.Encoded(), nil
}

// file identifies the bytes that were verified: any change of a blob's file
// changes one of these.
type file struct {
	digest   digest.Digest
	dev, ino uint64
	size     int64
	mtime    int64 // nanoseconds
}

func identify(d digest.Digest, info fs.FileInfo) file {
	id := file{digest: d, size: info.Size(), mtime: info.ModTime().UnixNano()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		id.dev, id.ino = st.Dev, st.Ino
	}
	return id
}

// Problem is why the store cannot be read at present and what to do about it;
// nil if it can. It is known from the first scan of Run on.
func (s *Store) Problem() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.problem
}

// Walk calls fn for the blobs of the index, in no order, until it returns false.
// The index is empty before Run and may lag behind the directory by moments.
func (s *Store) Walk(fn func(d digest.Digest, size int64) bool) {
	for d, size := range s.index.all() {
		if !fn(d, size) {
			return
		}
	}
}

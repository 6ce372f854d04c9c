package cache

import (
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

var (
	// ErrNoRoom says that this node's disk cannot take the blob: the cache
	// is full of things that may not be evicted, or the disk is full,
	// read-only or failing. The caller passes the blob through unkept.
	ErrNoRoom = errors.New("no room in the cache")
	// ErrForeign comes with ErrNoRoom: the blob is here, or on its way, but
	// from givers other than the caller's source. What that source gives may be
	// the same, and has to come from there.
	ErrForeign = errors.New("given by somebody else")
	// ErrDigestMismatch says that a blob's bytes were complete and wrong. They
	// are gone; the next Open starts over (see Fill.Mismatches).
	ErrDigestMismatch = errors.New("content does not match its digest")
	// ErrSizeMismatch says that two sources, or a source and its own bytes,
	// disagree about a blob's size.
	ErrSizeMismatch = errors.New("size differs from the one announced")
	// ErrClosed ends fills when Run's context does, and is returned for new
	// ones from then on.
	ErrClosed = errors.New("cache has stopped")
	// ErrInvalidDigest is returned for anything but sha256 and sha512
	// digests in lower-case hex, before a path is made of it.
	ErrInvalidDigest = errors.New("invalid digest")
	// ErrMissing is returned by a Reader from Lookup for bytes that a fill
	// has not brought yet; such a reader does not wait.
	ErrMissing = errors.New("bytes are not here yet")
)

// FillError says why the one fill of a blob ended without it. Err is the
// source's own error, one of this package's, or ErrClosed when the cache
// stopped. Every reader that joined the fill gets the same.
type FillError struct {
	Digest digest.Digest
	Err    error
	// Joined says, when Open or a Reader from there returns it, that the fill was somebody
	// else's: the caller's own source, with its own credentials, was not asked, so another
	// Open may fare better.
	Joined bool
}

// toldTo returns the error of a fill as a caller that joined it should see it.
func toldTo(joined bool, err error) error {
	if fe, ok := errors.AsType[*FillError](err); ok && joined {
		return &FillError{Digest: fe.Digest, Err: fe.Err, Joined: true}
	}
	return err
}

func (e *FillError) Error() string { return fmt.Sprintf("fill %s: %v", e.Digest, e.Err) }
func (e *FillError) Unwrap() error { return e.Err }

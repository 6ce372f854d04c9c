package peer

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// Config is what a Swarm is made from. Name, Store and Origin are required; with
// zero values for the rest it is a lone node.
type Config struct {
	// Name is the node's name, at most 243 bytes. It decides which blobs the
	// node is home of, so it should survive a restart.
	Name string
	// Zone groups nodes with cheap links between them; at most 29 bytes.
	Zone string
	// Home says whether this node may fetch from upstream for others.
	Home bool
	// ZoneScope makes each zone fetch its own copy from upstream.
	ZoneScope bool

	// Keys are the cluster's secrets, 32 bytes each. The first one signs and
	// encrypts; all are accepted, so that a key can be rolled. Without keys New
	// refuses every address that is not loopback.
	Keys [][]byte

	// Gossip and Data are listen addresses (host:port); with an empty Gossip the node
	// stays alone, and an empty Data is some port on loopback. Advertise is the IP
	// address told to others; if empty, it is the one bound, for Gossip or else for
	// Data, or the first that is not loopback. Join lists hosts, with or without a
	// port; names are looked up again for as long as Run runs.
	Gossip, Data, Advertise string
	Join                    []string

	// MaxUploads bounds pieces being sent or queued, 64 if zero; MaxUploadBytesPerSecond is
	// a token bucket over all of them, 0 = none. MaxDownloadBytesPerSecond bounds the
	// pieces that this node asks others for, 0 = none.
	MaxUploads                int
	MaxUploadBytesPerSecond   int64
	MaxDownloadBytesPerSecond int64
	// TagTTL is how long, at most, a home answers Resolve for a registry's tags from
	// memory: the answer is a verdict on the asker, which ends after a minute for a
	// credential and after ten for anyone. With 0, or without TagTTL, only those who ask at
	// the same time share an answer. It is called as Origin is, and must not block.
	TagTTL func(registry string) time.Duration

	// Both are called by many goroutines, and never with a lock of the swarm held (I7).
	Store  Store
	Origin Origin

	Logger     *slog.Logger          // nil discards
	Registerer prometheus.Registerer // nil leaves metrics unregistered

	// Network carries links; nil is TCP. PieceSize must be the cache's own
	// formula; nil is [PieceSize]. Seed makes choices repeatable in simulations; 0
	// takes a random one.
	Network   Network
	PieceSize func(size int64) int64
	Seed      uint64

	// probe is how often gossip checks whether a member is alive; memberlist's
	// second if zero. Tests with hundreds of members on a few processors cannot tell
	// dead members from those that wait for their turn.
	probe time.Duration
}

// Network is what links run over. The package lays mutual TLS over what it returns if there
// are Keys. DialContext is called up to three times at once for one link (see dialAnew); its
// ctx may end as soon as it has returned. Closing a connection must end its reads and writes
// that are under way.
type Network interface {
	Listen(addr string) (net.Listener, error)
	DialContext(ctx context.Context, addr string) (net.Conn, error)
}

// Blob is a blob of this node, whole or growing. Every method may be called by
// several goroutines; none may call back into the Swarm.
type Blob interface {
	// Size is -1 while unknown.
	Size() int64
	// Has reports whether piece i (see [PieceSize]) is here and trusted.
	Has(piece int) bool
	// ReadAt reads bytes of pieces that Has; for others it fails or blocks.
	io.ReaderAt
	// Changed is closed at the next change of any of the above.
	Changed() <-chan struct{}
}

// Fill is a blob this node is fetching.
type Fill interface {
	Blob
	// SetSize decides the size; a different one later is an error that ends the
	// fill. A size that the node knows to be wrong is refused and changes nothing.
	SetSize(int64) error
	// Missing returns the first missing run at or after off.
	Missing(off int64) (start, end int64, ok bool)
	// Wanted is the lowest offset a reader waits for, else the slowest reader's
	// position, else the first missing byte.
	Wanted() int64
	// From returns a writer for trusted bytes, by where they came from: a
	// member's node name, or "" for upstream.
	From(node string) io.WriterAt
	// WritePiece takes all of a piece from a member, if its bytes lead SHA-256 from
	// one chaining value to the other; those of the last piece must lead to the
	// blob's digest instead. Otherwise the error is ErrWrongPiece.
	WritePiece(node string, piece int, p []byte, from, to [sha256.Size]byte) error
	// Attempt says which attempt the fill is (see Want). It may be later than its
	// Want said, if other nodes have found the bytes of that one to be wrong.
	Attempt(n int)
	// Chain returns the chaining value at the start of a piece, once all bytes
	// before it are here and hashed. Changed covers it too.
	Chain(piece int) (v [sha256.Size]byte, ok bool)
}

// Store is this node's cache as peers may see it.
type Store interface {
	// Lookup opens a blob that is here or being filled; it never starts a fill
	// and does not count as a reader (it must not move Fill.Wanted).
	Lookup(d digest.Digest) (StoredBlob, bool)
	// Gives reports whether a blob, as it is here or on its way, may be given to
	// those who may have what registry gives: its bytes are that registry's, or
	// anybody's. It is called for each piece and must not block.
	Gives(d digest.Digest, registry string) bool
}

// StoredBlob is a Blob that must be closed. It is closed once, after the last call of
// its other methods has returned.
type StoredBlob interface {
	Blob
	io.Closer
}

// Want names what a node lacks and how upstream knows it.
type Want struct {
	Digest     digest.Digest
	Registry   string // as images name it
	Repository string
	Manifest   bool // Digest is a manifest's
	// Size is the blob's, according to the manifest or tag that led to it; 0 if unknown.
	// Nobody has verified it: it overrules another member's word, not upstream's.
	Size int64
	// Authorization is the client's credential for upstream, "" for none. It is
	// sent to homes over TLS, kept in memory only, and never logged.
	Authorization string
	// Attempt is how many fills of the blob have lately, in a row, ended with bytes
	// that did not match its digest. The swarm makes a second attempt at a blob;
	// after that Fetch returns ErrDistrusted.
	Attempt int
	// Held: only what other nodes have counts. No home turns to upstream for it.
	Held bool `json:",omitempty"`
	// Ahead, if not 0, says that the fill keeps nothing: it takes pieces that begin less than
	// that many bytes after the wanted one. Nobody is given any of it, and meanwhile this
	// node is no home of the blob and does not turn to upstream for it; where others do not
	// deliver, Fetch fails.
	Ahead int64 `json:"-"`
	// Node: the repository is one that nodes open with their own credentials. A
	// home that has none for it must say no.
	Node bool
}

// String leaves the credential out, so that no format prints it.
func (w Want) String() string { return w.Digest.String() + " of " + w.Registry + "/" + w.Repository }

// GoString is String, for %#v.
func (w Want) GoString() string { return w.String() }

// Reference names something in a repository, and on whose behalf it is asked
// about: the credential in Authorization, the nodes' own (Node), or anyone.
type Reference struct {
	Registry, Repository string
	Tag                  string // or a digest
	Blob                 bool   // Tag is a blob's digest
	// Known: no need to find out whether it belongs to the repository.
	Known bool
	// Stored: the question is whether upstream has it; that it is known to belong to the
	// repository is no answer.
	Stored bool `json:",omitempty"`
	// Memory: only what this node remembers counts; it is not the one to ask upstream.
	Memory        bool
	Accept        []string
	Authorization string
	Node          bool
}

// String leaves the credential out, so that no format prints it.
func (r Reference) String() string { return r.Registry + "/" + r.Repository + ":" + r.Tag }

// GoString is String, for %#v.
func (r Reference) GoString() string { return r.String() }

// Descriptor is what a tag stands for.
type Descriptor struct {
	MediaType string
	Digest    digest.Digest
	Size      int64
	// Stale: upstream could not be asked; the tag stood for this when it was last asked.
	Stale bool `json:",omitempty"`
}

// Origin is how a home makes its own node turn to upstream.
type Origin interface {
	// Fill starts, or joins, the node's fill of the blob and returns without
	// waiting for it. That fill calls Swarm.Fetch, which finds that this node is
	// the home. An error (no room, denied) makes the asker try the next home.
	// ctx ends when the asker has its answer; the fill must outlive it.
	Fill(ctx context.Context, w Want) error
	// Resolve asks upstream what a tag stands for or, if upstream cannot be asked,
	// says what this node knows of it (Stale). For a Reference with Memory,
	// Resolve and May ask nobody, and fail if this node does not know or must not
	// tell.
	Resolve(ctx context.Context, r Reference) (Descriptor, error)
	// May returns nil if upstream lets the asker read what r names, and how long ago it
	// said so; a *Refusal if not; ErrImported if upstream cannot be asked and an
	// operator gave it to everybody. Other errors mean that nobody knows now.
	May(ctx context.Context, r Reference) (age time.Duration, err error)
	// Admit is May for another node that wants a blob from this one as its home. It
	// should not take longer than a second: the asker waits two for the whole answer.
	Admit(ctx context.Context, w Want) error
	// Reaches reports, at once, whether the node gets connections to a registry, as far
	// as it tried lately. A home that does not lets the next one try.
	Reaches(registry string) bool
	// Connect tries to reach a registry, without any credential; nil if it answered.
	Connect(ctx context.Context, registry string) error
	// Keep fetches a copy of what another node has, or may be about to lose, and returns
	// once it is here. An error makes the asker turn to another node.
	Keep(ctx context.Context, c Copy) error
}

// Sink takes a blob from upstream. It is the fill seen through the swarm: Missing
// leaves out what peers are about to deliver, so that a new home fetches only what
// the swarm has lost. What is Missing may grow or shrink at any time. Methods may be
// called by several goroutines.
type Sink interface {
	// Asked says that upstream has a request for the blob and has not answered
	// yet.
	Asked()
	SetSize(int64) error
	Size() int64
	Missing(off int64) (start, end int64, ok bool)
	Wanted() int64
	WriteAt(p []byte, off int64) (int, error)
}

// Upstream fetches into the sink from the registry until nothing is Missing, or ctx ends.
// It returns only when it will not touch the sink any more. Calls of one Fetch never
// overlap; there is another one if more is Missing later.
type Upstream func(ctx context.Context, into Sink) error

var (
	// ErrImported is leave to read what was asked about, and nothing else in its
	// repository: an operator gave it, and upstream cannot be asked.
	ErrImported = errors.New("imported by an operator")
	// ErrWrongPiece means that a piece does not match its digest.
	ErrWrongPiece = errors.New("piece does not match its digest")
	// ErrUnsupported means that the swarm cannot carry this blob.
	ErrUnsupported = errors.New("blob cannot be swarmed")
	// ErrDistrusted means that the bytes the swarm lately gave under this digest were
	// wrong more than once (see Want.Attempt); fetch it from upstream alone.
	ErrDistrusted = errors.New("swarm is distrusted for this blob")
	// ErrVoid means that what is in the fill is likely wrong, as the same bytes were
	// elsewhere: the fill should fail as one whose digest did not match.
	ErrVoid = errors.New("bytes of this blob were found to be wrong elsewhere")
	// ErrNotRunning means that Run has not started or has ended.
	ErrNotRunning = errors.New("swarm is not running")
	// ErrRefused means that no home could get the blob and none permits this node
	// to try for the swarm.
	ErrRefused = errors.New("homes cannot get the blob")
	// ErrStalled means that neither peers nor homes made progress, and this node got
	// no permit to fetch from upstream for the swarm.
	ErrStalled = errors.New("swarm made no progress")
)

// PieceSize is the piece size of a blob: the size over 1024, rounded up to a
// power of two, no less than 256 KiB and no more than 8 MiB.
func PieceSize(size int64) int64 {
	const least, most = 256 << 10, 8 << 20
	p := int64(least)
	for p < most && p*1024 < size {
		p <<= 1
	}
	return p
}

func (c Config) withDefaults() Config {
	c.Data = cmp.Or(c.Data, "127.0.0.1:0")
	c.MaxUploads = cmp.Or(c.MaxUploads, 64)
	if c.TagTTL == nil {
		c.TagTTL = func(string) time.Duration { return 0 }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.PieceSize == nil {
		c.PieceSize = PieceSize
	}
	if c.Network == nil {
		c.Network = tcp{}
	}
	return c
}

// tcp is the Network of real nodes.
type tcp struct{}

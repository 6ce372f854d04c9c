package cache

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// bucket is a kind of fact.
type bucket string

const (
	bucketTags      bucket = "tags"
	bucketManifests bucket = "manifests"
	bucketMembers   bucket = "members"
	bucketFetched   bucket = "fetched"
	bucketUsed      bucket = "used"
	bucketState     bucket = "state"
	bucketGivers    bucket = "givers"
	bucketShown     bucket = "shown"
	bucketPublic    bucket = "public"
	bucketVerdicts  bucket = "verdicts"
	bucketChallenge bucket = "challenges"
	bucketPins      bucket = "pins"
	bucketImports   bucket = "imports" // repositories
	bucketImported  bucket = "imported"
	bucketForgotten bucket = "forgotten"
)

// capacity bounds each bucket: what registries and clients make the cache
// remember must not grow without end. 200,000 members are about 40 MB of file.
var capacity = map[bucket]int{
	bucketTags: 20_000, bucketManifests: 100_000, bucketMembers: 200_000,
	bucketFetched: 100_000, bucketUsed: 200_000, bucketState: 100,
	bucketGivers: 200_000, bucketShown: 200_000, bucketPublic: 20_000, bucketVerdicts: 20_000, bucketChallenge: 5_000,
	bucketImports: 20_000, bucketImported: 200_000, bucketForgotten: 20_000,
	bucketPins: 2 * MaxPins, // so that none is pruned
}

// ofBlob says which part of a key is the blob that facts of a kind are about. Without
// these facts nobody may have what is on this disk while its registry cannot be asked,
// so those of blobs that are here go last.
var ofBlob = map[bucket]int{bucketGivers: 0, bucketShown: 0, bucketManifests: 0, bucketMembers: 2}

const (
	// maxPending bounds what waits to be written. Beyond it facts are dropped, but
	// no deletions, because a fact that no longer holds may be somebody's
	// permission, and no pins, which somebody wants and which are few.
	maxPending = 16 << 10
	// enoughPending asks for a flush ahead of time.
	enoughPending = 1 << 10
	// stampLen is the time that precedes each value, for pruning.
	stampLen = 8
)

// database is a bbolt file that may fail: the file can be deleted, torn or
// truncated at any moment, and then a new one takes its place. Writes collect in
// memory, so that no pull waits for an fsync; one goroutine at a time flushes.
type database struct {
	path string
	log  *slog.Logger
	full chan struct{} // asks the owner to flush; buffered
	// holds reports whether the owner has a blob; it is called in transactions. Nil means
	// none.
	holds func(digest.Digest) bool
	// renewed is called when another file has taken the place of the open one. Nil is
	// not called.
	renewed func()
	// fault is why a write fails; nil except in tests.
	fault error
	// replacing serializes those who found the file broken or gone, and is the only
	// lock held while it is made anew.
	replacing sync.Mutex

	mu      sync.Mutex // guards the fields below; not held in transactions
	bolt    *bolt.DB   // nil when even a new file could not be made
	file    os.FileInfo
	count   map[bucket]int
	pending map[bucket]map[string][]byte // nil value: deleted
	writing map[bucket]map[string][]byte // what flush is writing
	waiting int
	lost    int       // facts that were dropped, and flushes that failed
	next    *flushing // the flush that writes what is pending
	said    string    // the last complaint, not to be repeated every few seconds
}

// flushing is one flush, to be waited for.
type flushing struct {
	done chan struct{} // closed when the others are set
	err  error
	lost int // database.lost when it began
}

func newFlushing() *flushing { return &flushing{done: make(chan struct{})} }

// errLost is returned to those who wait for a flush: something of theirs may be
// missing.
var errLost = errors.New("facts were lost: too many at once, or the disk took no writes")

// errCorrupt is what bbolt's panics and faults become.
var errCorrupt = errors.New("metadata file is corrupt")

// openDatabase opens or makes the file. The only error is that another process
// holds it; whatever else is wrong, a new file or none at all will do.
func openDatabase(path string, log *slog.Logger) (*database, error) {
	db := &database{path: path, log: log, full: make(chan struct{}, 1), pending: map[bucket]map[string][]byte{}, next: newFlushing()}
	opened, err := db.open()
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("cache directory %s is used by another process: stop that one, or choose another directory with cache.dir", filepath.Dir(path))
	}
	if err != nil {
		opened = db.replace(err)
	}
	db.bolt = opened
	return db, nil
}

// open opens the file and counts what is in it.
func (db *database) open() (opened *bolt.DB, err error) {
	err = guard(func() error {
		opened, err = bolt.Open(db.path, 0o600, &bolt.Options{
			Timeout: time.Second, NoFreelistSync: true, FreelistType: bolt.FreelistMapType,
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	count := map[bucket]int{}
	marked := false
	err = guard(func() error {
		complete := false
		err := opened.View(func(tx *bolt.Tx) error {
			complete = tally(tx, count)
			state := tx.Bucket([]byte(bucketState))
			marked = state == nil || state.Get(keyMarked) != nil
			return nil
		})
		if err != nil || complete {
			return err // so that a start writes nothing, whatever room the disk has
		}
		return opened.Update(func(tx *bolt.Tx) error { return cmp.Or(db.fault, makeBuckets(tx)) })
	})
	if err != nil {
		if !errors.Is(err, errCorrupt) { // else see replace
			_ = guard(opened.Close)
		}
		return nil, err
	}
	file, _ := os.Stat(db.path)
	db.mu.Lock()
	defer db.mu.Unlock()
	db.file, db.count = file, count
	if !marked {
		db.enqueueLocked(bucketState, string(keyMarked), stampNow())
	}
	return opened, nil
}

// keyMarked is the state whose stamp says since when members that are manifests are
// marked as such: 0 in a file made by a version that marks them. Earlier versions
// did not.
var keyMarked = []byte("marked")

// marks reports whether a member stamped at that time would be marked.
func (db *database) marks(stamped []byte) bool {
	since, ok := db.stamped(bucketState, keyMarked)
	return ok && stamp(stamped) > stamp(since)
}

// stampNow is the stamp of what is written now.
func stampNow() []byte { return binary.BigEndian.AppendUint64(nil, uint64(time.Now().Unix())) }

// tally counts what is in each bucket, and reports whether all buckets are there.
func tally(tx *bolt.Tx, count map[bucket]int) (complete bool) {
	complete = true
	for name := range capacity {
		b := tx.Bucket([]byte(name))
		if b == nil {
			complete = false
			continue
		}
		count[name] = b.Stats().KeyN
	}
	return complete
}

func makeBuckets(tx *bolt.Tx) error {
	fresh := tx.Bucket([]byte(bucketState)) == nil
	for name := range capacity {
		if _, err := tx.CreateBucketIfNotExists([]byte(name)); err != nil {
			return err
		}
	}
	if !fresh {
		return nil
	}
	return tx.Bucket([]byte(bucketState)).Put(keyMarked, make([]byte, stampLen))
}

// spared reports whether err is no evidence against the file: the disk takes no
// writes now, this process has no descriptors left, or another one has the file.
func spared(err error) bool {
	healthy := []error{unix.ENOSPC, unix.EDQUOT, unix.EROFS, unix.EMFILE, unix.ENFILE, unix.ENOMEM, bolterrors.ErrTimeout}
	return slices.ContainsFunc(healthy, func(one error) bool { return errors.Is(err, one) })
}

// replace starts over with an empty file, unless the old one is spared. The corrupt one
// is unlinked but not closed: bbolt may have panicked with its locks held, and Close
// would wait for them forever. The new file has a lock of its own.
func (db *database) replace(why error) *bolt.DB {
	if spared(why) {
		db.complain(why, why)
		return nil
	}
	err := remove(db.path)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(db.path), dirMode)
	}
	var opened *bolt.DB
	if err == nil {
		opened, err = db.open()
	}
	db.complain(why, err)
	return opened
}

// complain logs what happened to the file, once.
func (db *database) complain(why, err error) {
	message := "cache metadata starts anew"
	if err != nil {
		message, why = "cache runs without metadata", err
	}
	db.mu.Lock()
	again := db.said == message+why.Error() && err != nil
	db.said = message + why.Error()
	db.mu.Unlock()
	if !again {
		db.log.Warn(message, "err", why)
	}
}

// guard turns panics, and faults on a truncated mapping, into errCorrupt.
func guard(transaction func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errCorrupt, p)
		}
	}()
	return transaction()
}

// run runs one transaction. An error that a healthy file cannot give replaces
// the file (see spared).
func (db *database) run(transaction func(*bolt.DB) error) error {
	db.mu.Lock()
	opened := db.bolt
	db.mu.Unlock()
	if opened == nil {
		return bolterrors.ErrDatabaseNotOpen
	}
	err := guard(func() error { return transaction(opened) })
	if err != nil && !errors.Is(err, bolterrors.ErrDatabaseNotOpen) && !spared(err) {
		db.renew(opened, err)
	}
	return err
}

// renew replaces broken, and reports false if somebody else has. If no file was open, or
// a different one than is now at the path, that one may be good and was only out of
// reach.
func (db *database) renew(broken *bolt.DB, why error) bool {
	db.replacing.Lock()
	defer db.replacing.Unlock()
	db.mu.Lock()
	mine := db.bolt == broken
	if mine {
		db.bolt = nil
	}
	db.mu.Unlock()
	if !mine {
		return false
	}
	var opened *bolt.DB
	if broken == nil || errors.Is(why, errExchanged) {
		opened, why = db.open()
	}
	if opened == nil {
		opened = db.replace(why)
	}
	if opened != nil && db.renewed != nil {
		db.renewed()
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	db.bolt = opened
	return true
}

// get returns the value of k, which the caller may keep.
func (db *database) get(b bucket, k []byte) (v []byte, ok bool) {
	stamped, ok := db.stamped(b, k)
	if !ok {
		return nil, false
	}
	return stamped[stampLen:], true
}

// stamped is get with the time before the value.
func (db *database) stamped(b bucket, k []byte) (v []byte, ok bool) {
	if len(k) == 0 {
		return nil, false
	}
	if v, known := db.recent(b, k); known {
		return v, v != nil
	}
	_ = db.run(func(opened *bolt.DB) error {
		return opened.View(func(tx *bolt.Tx) error {
			if stored := tx.Bucket([]byte(b)).Get(k); len(stored) >= stampLen {
				v, ok = bytes.Clone(stored), true
			}
			return nil
		})
	})
	return v, ok
}

// walk calls f with the keys that are in the file, until it returns false.
func (db *database) walk(b bucket, f func(k []byte) bool) {
	_ = db.run(func(opened *bolt.DB) error {
		return opened.View(func(tx *bolt.Tx) error {
			c := tx.Bucket([]byte(b)).Cursor()
			k, _ := c.First()
			for k != nil && f(k) {
				k, _ = c.Next()
			}
			return nil
		})
	})
}

// recent returns what was put or deleted and is not in the file yet.
func (db *database) recent(b bucket, k []byte) (v []byte, known bool) {
	db.mu.Lock()
	defer db.mu.Unlock()
	for _, from := range []map[bucket]map[string][]byte{db.pending, db.writing} {
		if stored, ok := from[b][string(k)]; ok {
			return stored, true
		}
	}
	return nil, false
}

func (db *database) put(b bucket, k, v []byte) {
	db.enqueue(b, k, append(stampNow(), v...))
}

func (db *database) delete(b bucket, k []byte) { db.enqueue(b, k, nil) }

func (db *database) enqueue(b bucket, k, stamped []byte) {
	db.mu.Lock()
	defer db.mu.Unlock()
	if len(k) == 0 {
		return
	}
	if db.waiting >= maxPending && stamped != nil && b != bucketPins {
		db.lost++
		return
	}
	db.enqueueLocked(b, string(k), stamped)
	if db.waiting >= enoughPending {
		db.hurry()
	}
}

// hurry asks the owner to flush.
func (db *database) hurry() {
	select {
	case db.full <- struct{}{}:
	default:
	}
}

// losses is how much was lost so far, for sync.
func (db *database) losses() int {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.lost
}

// sync waits until a flush has written what was put before, or ctx ends, and reports
// whatever was lost since there were that many losses. Somebody must be there to
// flush.
func (db *database) sync(ctx context.Context, losses int) error {
	db.mu.Lock()
	next := db.next
	db.mu.Unlock()
	db.hurry()
	if err := wait(ctx, next.done); err != nil {
		return err
	}
	if next.err == nil && next.lost != losses {
		return errLost
	}
	return next.err
}

// enqueueLocked is called with mu held.
func (db *database) enqueueLocked(b bucket, k string, stamped []byte) {
	if db.pending[b] == nil {
		db.pending[b] = map[string][]byte{}
	}
	db.pending[b][k] = stamped
	db.waiting++
}

// flush writes what is pending, in one transaction, and heals a file that was
// deleted. Only one goroutine at a time may call it. If something cannot be
// written, new facts are lost, and deletions are tried again by the next flush.
func (db *database) flush() {
	db.heal()
	db.mu.Lock()
	now := db.next
	db.next, now.lost = newFlushing(), db.lost
	defer close(now.done)
	if db.waiting == 0 {
		db.mu.Unlock()
		return
	}
	db.writing, db.pending, db.waiting = db.pending, map[bucket]map[string][]byte{}, 0
	count := maps.Clone(db.count)
	db.mu.Unlock()
	err := db.run(func(opened *bolt.DB) error {
		return opened.Update(func(tx *bolt.Tx) error { return db.write(tx, count) })
	})
	var undone map[bucket][]string
	if err != nil {
		db.log.Debug("write cache metadata", "err", err)
		undone = db.undeleted()
	}
	now.err = err
	db.mu.Lock()
	defer db.mu.Unlock()
	db.writing = nil
	if err == nil {
		db.count = count
	} else {
		db.lost++
	}
	for name, keys := range undone {
		for _, k := range keys {
			if _, newer := db.pending[name][k]; !newer {
				db.enqueueLocked(name, k, nil)
			}
		}
	}
}

// undeleted lists what db.writing deletes and the file still has, or may have while it cannot
// be opened: no more than the file can hold, however many deletions of unknown keys callers
// cause.
func (db *database) undeleted() map[bucket][]string {
	keys := map[bucket][]string{}
	list := func(has func(name bucket, k string) bool) {
		for name, facts := range db.writing {
			for k, stamped := range facts {
				if stamped == nil && len(keys[name]) < capacity[name] && has(name, k) {
					keys[name] = append(keys[name], k)
				}
			}
		}
	}
	err := db.run(func(opened *bolt.DB) error {
		return opened.View(func(tx *bolt.Tx) error {
			list(func(name bucket, k string) bool { return tx.Bucket([]byte(name)).Get([]byte(k)) != nil })
			return nil
		})
	}) // a file that cannot be read either is replaced by an empty one
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		list(func(bucket, string) bool { return true })
	}
	return keys
}

// write stores db.writing, which nobody changes meanwhile.
func (db *database) write(tx *bolt.Tx, count map[bucket]int) error {
	if db.fault != nil {
		return db.fault
	}
	for name, facts := range db.writing {
		b := tx.Bucket([]byte(name))
		grown, err := apply(b, facts)
		if err != nil {
			return err
		}
		if count[name] += grown; count[name] > capacity[name] {
			gone, err := prune(b, count[name]-capacity[name]*9/10, db.age(name))
			if err != nil {
				return err
			}
			count[name] -= gone
		}
	}
	return nil
}

// apply puts facts into b, and deletes those that are nil; it returns by how many keys b grew.
func apply(b *bolt.Bucket, facts map[string][]byte) (grown int, err error) {
	for _, k := range slices.Sorted(maps.Keys(facts)) { // in order, so that pages are touched once
		known := b.Get([]byte(k)) != nil
		switch stamped := facts[k]; {
		case stamped != nil:
			err = b.Put([]byte(k), stamped)
			if !known {
				grown++
			}
		case known:
			err = b.Delete([]byte(k))
			grown--
		}
		if err != nil {
			return 0, err
		}
	}
	return grown, nil
}

// held makes the age of a fact greater than that of any other.
const held = 1 << 63

// age returns what orders a bucket's facts for pruning: when they were written, with those
// about blobs that are here after all others.
func (db *database) age(name bucket) func(k, v []byte) uint64 {
	part, ok := ofBlob[name]
	if !ok || db.holds == nil {
		return func(_, v []byte) uint64 { return stamp(v) }
	}
	return func(k, v []byte) uint64 {
		parts := bytes.Split(k, []byte{0})
		if len(parts) > part && db.holds(digest.Digest(parts[part])) {
			return held | stamp(v)
		}
		return stamp(v)
	}
}

// prune deletes the n oldest keys of b.
func prune(b *bolt.Bucket, n int, age func(k, v []byte) uint64) (gone int, err error) {
	ages := make([]uint64, 0, n)
	err = b.ForEach(func(k, v []byte) error {
		ages = append(ages, age(k, v))
		return nil
	})
	if err != nil || len(ages) == 0 {
		return 0, err
	}
	slices.Sort(ages)
	youngest := ages[min(n, len(ages))-1]
	var old [][]byte
	err = b.ForEach(func(k, v []byte) error {
		if len(old) < n && age(k, v) <= youngest {
			old = append(old, bytes.Clone(k))
		}
		return nil
	})
	for _, k := range old {
		err = errors.Join(err, b.Delete(k))
	}
	return len(old), err
}

func stamp(v []byte) uint64 {
	if len(v) < stampLen {
		return 0
	}
	return binary.BigEndian.Uint64(v)
}

// heal opens what the path leads to when that is no longer the open file, or a new file: a
// disk may have been mounted late, or a directory moved away and back.
func (db *database) heal() {
	db.mu.Lock()
	opened, file := db.bolt, db.file
	db.mu.Unlock()
	now, err := os.Stat(db.path)
	if err == nil && file != nil && os.SameFile(now, file) && opened != nil {
		return
	}
	why := errDeleted
	if err == nil {
		why = errExchanged
	}
	if db.renew(opened, why) && opened != nil {
		_ = guard(opened.Close) // healthy, only nameless
	}
}

var (
	errDeleted   = errors.New("metadata file was deleted")
	errExchanged = errors.New("another metadata file took its place")
)

// close flushes nothing; the owner has.
func (db *database) close() error {
	db.mu.Lock()
	opened := db.bolt
	db.bolt = nil
	db.mu.Unlock()
	if opened == nil {
		return nil
	}
	if err := guard(opened.Close); err != nil {
		return fmt.Errorf("close cache metadata: %w", err)
	}
	return nil
}

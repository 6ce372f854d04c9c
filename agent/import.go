package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-cache/larder/agent/archive"
	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
)

// tarType is the Content-Type of an archive: a form in a web page cannot send it
// without asking first.
const tarType = "application/x-tar"

// serveImport puts the images of an archive, the body, into the cache.
func (a *Agent) serveImport(w http.ResponseWriter, r *http.Request) {
	if !hasType(r, tarType) {
		http.Error(w, "want Content-Type: "+tarType, http.StatusUnsupportedMediaType)
		return
	}
	name := r.URL.Query().Get("name")
	if _, err := ParseImage(name); name != "" && err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := a.roomFor(r.ContentLength); err != nil {
		http.Error(w, err.Error(), http.StatusInsufficientStorage)
		return
	}
	out := a.newEventStream(w)
	// Events go out while the body still comes in.
	if err := out.http.EnableFullDuplex(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	body := &patientBody{body: r.Body, http: out.http, patience: a.patience}
	last := ImportEvent{Done: true}
	if err := newImporter(r.Context(), a, name, out, r.ContentLength).run(body); err != nil {
		last.Error = err.Error()
	}
	out.send(last)
	// Closing the connection while a client still sends its body, be it what follows the end
	// of the tar, may cost it the answer. It hangs up once it has read that.
	_, _ = io.Copy(io.Discard, body)
}

// roomFor refuses an archive of n bytes, -1 if unknown, that the cache could not take
// if it were empty but for what is pinned. A compressed one may still be too large.
func (a *Agent) roomFor(n int64) error {
	room, err := a.cache.Room()
	if err == nil && n > room {
		err = fmt.Errorf("the archive has %s; %w", SizeText(n), a.noRoom(room))
	}
	return err
}

// noRoom says why there is room for no more than so many bytes, and what to do.
func (a *Agent) noRoom(room int64) error {
	s := a.cache.Stats()
	limit := "none"
	if s.Limit > 0 {
		limit = SizeText(s.Limit)
	}
	return fmt.Errorf("the cache can take %s: cache.max_bytes is %s, the disk has %s free, of which cache.min_free keeps %s; raise the one or free the other",
		SizeText(room), limit, SizeText(s.Free), SizeText(s.MinFree))
}

// importer is one import under way, and the archive.Store that its content goes to.
type importer struct {
	ctx    context.Context // the request's
	agent  *Agent
	name   string // that the one image is to have; "" = its own
	length int64  // of the archive; -1 = unknown
	out    *eventStream

	read    int64 // bytes of content so far
	content map[digest.Digest]arrival
	used    map[digest.Digest]bool // by images that were imported
}

// arrival is one blob or manifest of the archive. It is pinned until the end: what comes
// later must not take its room.
type arrival struct {
	size  int64
	there bool // before this import
}

var _ archive.Store = (*importer)(nil)

func newImporter(ctx context.Context, a *Agent, name string, out *eventStream, length int64) *importer {
	return &importer{ctx: ctx, agent: a, name: name, length: length, out: out, content: map[digest.Digest]arrival{}, used: map[digest.Digest]bool{}}
}

// run imports what is whole, when its turn has come: an import that fails removes
// what it brought, on which no other may count.
func (in *importer) run(body io.Reader) error {
	select {
	case in.agent.importing <- struct{}{}:
		defer func() { <-in.agent.importing }()
	case <-in.ctx.Done():
		return context.Cause(in.ctx)
	}
	defer in.close()
	return in.archive(body)
}

// archive has every image served that can be. Each image has its own error.
func (in *importer) archive(body io.Reader) error {
	images, err := archive.Read(body, in)
	if err != nil {
		return err
	}
	if err := in.rename(images); err != nil {
		return err
	}
	failed := 0
	for _, i := range images {
		if in.ctx.Err() != nil { // nobody is left to tell of the others
			return context.Cause(in.ctx)
		}
		report := in.adopt(i)
		if report.Error != "" {
			failed++
		}
		in.out.send(ImportEvent{Image: &report})
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d images were not imported", failed, len(images))
	}
	return nil
}

// close lets go of what was pinned, and of content that no image came to use.
func (in *importer) close() {
	for d, arrived := range in.content {
		in.agent.cache.Unpin(d)
		if arrived.there || in.used[d] || in.agent.cache.Meta().Given(d, cache.AnyGiver) {
			continue
		}
		if err := in.agent.cache.Remove(d); err != nil {
			in.agent.log.Warn("content of an archive is left in the cache", "digest", d, "err", err)
		}
	}
}

// rename gives the one image the name that was asked for.
func (in *importer) rename(images []archive.Image) error {
	if in.name == "" {
		return nil
	}
	for _, i := range images {
		if i.Root.Digest != images[0].Root.Digest {
			return errManyNames(len(images))
		}
	}
	for n := range images {
		images[n].Name = in.name
	}
	return nil
}

func errManyNames(n int) error {
	return fmt.Errorf("the archive has %d images; a name can be given to one alone", n)
}

// Index ends an import that cannot yield anything, before the content is
// read.
func (in *importer) Index(names []string) error {
	var errs []error
	for _, name := range names {
		if in.name != "" {
			name = in.name
		}
		if _, err := in.target(name); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) == len(names) {
		return errors.Join(errs...)
	}
	return nil
}

// target is what an image is served as.
func (in *importer) target(name string) (Image, error) {
	if name == "" {
		return Image{}, errors.New("an image of the archive has no full name in its annotations; give it one with --name")
	}
	image, err := ParseImage(name)
	if err != nil {
		return image, err
	}
	if err := in.agent.proxy.Denied(image.Registry, image.Repository); err != nil {
		return image, fmt.Errorf("%s: %w (allow and deny of registry %q)", image, err, image.Registry)
	}
	return image, nil
}

// adopt has one image served.
func (in *importer) adopt(i archive.Image) ImportedImage {
	report := ImportedImage{Name: i.Name, Digest: i.Root.Digest, Missing: i.Missing}
	if err := in.serve(i, &report); err != nil {
		report.Error = err.Error()
	}
	return report
}

// serve hands an image to the proxy, if it may have its name and all of it is still here.
func (in *importer) serve(i archive.Image, report *ImportedImage) error {
	image, err := in.target(i.Name)
	if err != nil {
		return err
	}
	report.Name = image.String()
	if i.Err != nil {
		return i.Err
	}
	served := proxy.Import{Registry: image.Registry, Repository: image.Repository, Tag: image.Reference,
		Root: i.Root, Manifests: i.Manifests, Blobs: i.Blobs}
	if d, err := digest.Parse(image.Reference); err == nil {
		if served.Tag = ""; d != i.Root.Digest {
			return fmt.Errorf("the archive has %s under this name", i.Root.Digest)
		}
	}
	all := slices.Concat(i.Manifests, i.Blobs)
	for _, d := range all {
		if !in.agent.cache.Has(d.Digest) {
			return fmt.Errorf("the cache has lost %s again; is its disk failing?", d.Digest)
		}
	}
	if err := in.agent.proxy.Import(in.ctx, served); err != nil {
		return err
	}
	in.count(all, report)
	return nil
}

func (in *importer) count(ds []ocispec.Descriptor, report *ImportedImage) {
	for _, d := range ds {
		arrived := in.content[d.Digest]
		in.used[d.Digest] = true
		report.Blobs++
		report.Bytes += arrived.size
		if arrived.there {
			report.There++
			report.BytesThere += arrived.size
		}
	}
}

// Put keeps a blob. Even if the cache has it already, the archive's copy is checked
// against its digest: its images may be served with these bytes only because the archive
// has them.
func (in *importer) Put(d digest.Digest, size int64, r io.Reader) error {
	_, again := in.content[d]
	if !again {
		in.agent.cache.Pin(d)
		in.content[d] = arrival{size: size, there: in.agent.cache.Has(d)}
	}
	if err := in.put(d, size, &progressReader{r: r, d: d, total: size, progress: in.progress}); err != nil {
		return in.explain(err, size)
	}
	if !again {
		in.read += size
		in.out.send(ImportEvent{Digest: d, Bytes: size, Total: size, There: in.content[d].there, Whole: true})
	}
	return nil
}

// put keeps a blob of the archive, or compares it with the one that is here or on its way.
func (in *importer) put(d digest.Digest, size int64, r io.Reader) error {
	origin := cache.Origin{Kind: cache.FromImport}
	err := in.agent.cache.PutStream(in.ctx, d, origin, size, r)
	if !errors.Is(err, cache.ErrPresent) {
		return err
	}
	if in.agent.cache.Has(d) {
		return compare(d, size, r)
	}
	// Somebody fetches it now: what the archive has goes there once it has been checked.
	spool, err := in.spool(size, r)
	if err != nil {
		return err
	}
	defer spool.Close()
	return in.putFile(d, origin, io.NewSectionReader(spool, 0, size))
}

// putFile tries again where a fetch that was under way failed; by the third time that is
// no coincidence.
func (in *importer) putFile(d digest.Digest, origin cache.Origin, content *io.SectionReader) error {
	var err error
	for range 3 {
		err = in.agent.cache.PutFile(in.ctx, d, origin, content)
		if _, failed := errors.AsType[*cache.FillError](err); !failed || errors.Is(err, cache.ErrNoRoom) {
			break
		}
	}
	return err
}

// compare reads size bytes of r, which are to have digest d.
func compare(d digest.Digest, size int64, r io.Reader) error {
	v := d.Verifier()
	if _, err := io.CopyN(v, r, size); err != nil {
		return err
	}
	if !v.Verified() {
		return cache.ErrDigestMismatch
	}
	return nil
}

// Add keeps content whose digest is known only at its end.
func (in *importer) Add(size int64, r io.Reader) (digest.Digest, error) {
	sum := digest.Canonical.Digester()
	spool, err := in.spool(size, io.TeeReader(r, sum.Hash()))
	if err != nil {
		return "", in.explain(err, size)
	}
	defer spool.Close()
	d := sum.Digest()
	return d, in.Put(d, size, io.NewSectionReader(spool, 0, size))
}

// spool keeps bytes in a nameless file beside the cache, which vanishes with its last
// descriptor, whatever happens.
func (in *importer) spool(size int64, r io.Reader) (*os.File, error) {
	if err := in.agent.cache.MakeRoom(size); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(in.agent.config.Cache.Dir, "import-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if _, err := io.CopyN(f, r, size); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// explain says of a full cache how much is needed: all of a plain archive, else what is
// known so far.
func (in *importer) explain(err error, size int64) error {
	switch {
	case errors.Is(err, cache.ErrDigestMismatch):
		return errors.New("the bytes have another digest: the archive is damaged")
	case !errors.Is(err, cache.ErrNoRoom):
		return err
	}
	need := "at least " + SizeText(in.read+size)
	if in.length > in.read+size {
		need = "about " + SizeText(in.length)
	}
	room, rerr := in.agent.cache.Room()
	if rerr != nil {
		return errors.Join(err, rerr)
	}
	return fmt.Errorf("%w: %s are needed; beside the %s that are in, %w", cache.ErrNoRoom, need, SizeText(in.read), in.agent.noRoom(room))
}

// Get reads a manifest back, as long as somebody waits for that.
func (in *importer) Get(d digest.Digest) ([]byte, error) {
	if in.ctx.Err() != nil {
		return nil, context.Cause(in.ctx)
	}
	body, err := in.agent.readManifest(d)
	if errors.Is(err, fs.ErrNotExist) {
		err = errors.New("the cache has lost it; is its disk failing?")
	}
	return body, err
}

// progress tells how far a blob has been read.
func (in *importer) progress(d digest.Digest, done, total int64) {
	if done < total {
		in.out.progress(d, ImportEvent{Digest: d, Bytes: done, Total: total})
	}
}

// hasType reports whether a request's body is of a media type.
func hasType(r *http.Request, mediaType string) bool {
	kind, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(kind), mediaType)
}

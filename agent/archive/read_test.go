package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// memory is a Store that keeps all in memory, and at most so many bytes.
type memory struct {
	left  int // bytes that fit
	blobs map[digest.Digest][]byte
	names []string
	gets  int
}

var errFull = errors.New("full")

func (m *memory) Put(d digest.Digest, size int64, r io.Reader) error {
	got, err := m.Add(size, r)
	if err == nil && got != d {
		delete(m.blobs, got)
		err = errors.New("other bytes")
	}
	return err
}

func (m *memory) Add(size int64, r io.Reader) (digest.Digest, error) {
	if size > int64(m.left) {
		return "", errFull
	}
	m.left -= int(size)
	var b bytes.Buffer
	if _, err := io.CopyN(&b, r, size); err != nil {
		return "", err
	}
	d := digest.FromBytes(b.Bytes())
	m.blobs[d] = b.Bytes()
	return d, nil
}

func (m *memory) Get(d digest.Digest) ([]byte, error) {
	m.gets++
	if b, ok := m.blobs[d]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("asked for %s, which it never got", d)
}

func (m *memory) Index(names []string) error {
	m.names = names
	return nil
}

// entry of a tar as a test writes it.
type entry struct {
	name string
	body []byte
	kind byte
	link string
	size int64 // if not that of body
}

func blobEntry(body []byte) entry { return entry{name: blobName(digest.FromBytes(body)), body: body} }

func jsonEntry(t testing.TB, name string, v any) entry {
	t.Helper()
	return entry{name: name, body: marshal(t, v)}
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Linkname: e.link, Size: int64(len(e.body)), Mode: 0o644}
		if e.kind == 0 {
			h.Typeflag = tar.TypeReg
		}
		if e.size != 0 {
			h.Size = e.size
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.body); err != nil {
			t.Fatal(err)
		}
		if e.size > int64(len(e.body)) {
			return b.Bytes() // breaks off
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func descriptor(mediaType string, body []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
}

// sample is an image of one layer.
type sample struct {
	config, layer, manifest []byte
	desc                    ocispec.Descriptor
}

func newSample(t testing.TB, seed string) sample {
	s := sample{layer: []byte("layer " + seed)}
	s.config = marshal(t, ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(s.layer)}}})
	s.manifest = marshal(t, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest,
		Config: descriptor(ocispec.MediaTypeImageConfig, s.config), Layers: []ocispec.Descriptor{descriptor(ocispec.MediaTypeImageLayer, s.layer)}})
	s.desc = descriptor(ocispec.MediaTypeImageManifest, s.manifest)
	return s
}

func (s sample) blobs() []entry {
	return []entry{blobEntry(s.layer), blobEntry(s.config), blobEntry(s.manifest)}
}

func index(roots ...ocispec.Descriptor) ocispec.Index {
	return ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: roots}
}

const name = "docker.io/library/app:v1"

func read(body []byte) ([]Image, *memory, error) {
	m := &memory{left: 64 << 20, blobs: map[digest.Digest][]byte{}}
	images, err := Read(bytes.NewReader(body), m)
	return images, m, err
}

// TestRead holds what of good archives is found, in any order of entries, compressed or
// not.
func TestRead(t *testing.T) {
	s, other := newSample(t, "one"), newSample(t, "two")
	rooted := jsonEntry(t, "index.json", index(named(s.desc, name)))
	amd, arm := s.desc, other.desc
	amd.Platform, arm.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}, &ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	many := marshal(t, index(amd, arm))
	manyRoot := jsonEntry(t, "./index.json", index(named(descriptor(ocispec.MediaTypeImageIndex, many), name)))
	first := tarOf(t, append([]entry{rooted}, s.blobs()...)...)
	for what, tc := range map[string]struct {
		body      []byte
		name      string
		manifests int
		blobs     int
		missing   []string
	}{
		"index first":          {first, name, 1, 2, nil},
		"index last":           {tarOf(t, append(s.blobs(), rooted)...), name, 1, 2, nil},
		"gzip":                 {compressed(t, first, func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }), name, 1, 2, nil},
		"zstd":                 {compressed(t, first, func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z }), name, 1, 2, nil},
		"a blob twice":         {tarOf(t, append(slices.Concat(s.blobs(), s.blobs()), rooted)...), name, 1, 2, nil},
		"both platforms":       {tarOf(t, append(slices.Concat(s.blobs(), other.blobs()), blobEntry(many), manyRoot)...), name, 3, 4, nil},
		"one platform of two":  {tarOf(t, append(s.blobs(), blobEntry(many), manyRoot)...), name, 2, 2, []string{"linux/arm64/v8"}},
		"a platform in part":   {tarOf(t, append(s.blobs(), other.blobs()[0], other.blobs()[2], blobEntry(many), manyRoot)...), name, 2, 2, []string{"linux/arm64/v8"}},
		"unknown entries":      {tarOf(t, append(s.blobs(), rooted, entry{name: "README", body: []byte("x")}, entry{name: "blobs/md5/x", body: []byte("x")}, entry{name: "fifo", kind: tar.TypeFifo})...), name, 1, 2, nil},
		"no name":              {tarOf(t, append(s.blobs(), jsonEntry(t, "index.json", index(s.desc)))...), "", 1, 2, nil},
		"a tag is no name":     {tarOf(t, append(s.blobs(), jsonEntry(t, "index.json", index(refnamed(s.desc, "team/app:v1"))))...), "", 1, 2, nil},
		"skopeo's name":        {tarOf(t, append(s.blobs(), jsonEntry(t, "index.json", index(refnamed(s.desc, "quay.io/a/b:v1"))))...), "quay.io/a/b:v1", 1, 2, nil},
		"docker save":          {dockerTar(t, s, []string{"app:v1"}, "0123/layer.tar"), "app:v1", 1, 2, nil},
		"docker save, linked":  {tarOf(t, entry{name: "a/layer.tar", body: s.layer}, entry{name: "b/layer.tar", kind: tar.TypeSymlink, link: "../a/layer.tar"}, entry{name: "c.json", body: s.config}, dockerJSON(t, []string{"app:v1"}, "c.json", "b/layer.tar")), "app:v1", 1, 2, nil},
		"docker save, no name": {dockerTar(t, s, nil, "x.tar"), "", 1, 2, nil},
		"docker 25, both":      {tarOf(t, append(s.blobs(), rooted, dockerJSON(t, []string{"app:v1"}, blobName(digest.FromBytes(s.config)), blobName(digest.FromBytes(s.layer))))...), name, 1, 2, nil},
		"a blob of sha384":     {tarOf(t, append(s.blobs(), rooted, entry{name: blobName(digest.SHA384.FromBytes(s.layer)), body: s.layer})...), name, 1, 2, nil},
		"blobs, docker's json": {tarOf(t, append(s.blobs(), dockerJSON(t, []string{"app:v1"}, blobName(digest.FromBytes(s.config)), blobName(digest.FromBytes(s.layer))))...), "app:v1", 1, 2, nil},
	} {
		t.Run(what, func(t *testing.T) {
			images, m, err := read(tc.body)
			if err != nil || len(images) != 1 {
				t.Fatalf("%d images, %v", len(images), err)
			}
			i := images[0]
			if i.Err != nil || i.Name != tc.name || len(i.Manifests) != tc.manifests || len(i.Blobs) != tc.blobs || !slices.Equal(i.Missing, tc.missing) {
				t.Errorf("%+v", i)
			}
			for _, d := range slices.Concat(i.Manifests, i.Blobs) {
				if body, err := m.Get(d.Digest); err != nil || int64(len(body)) != d.Size || d.MediaType == "" {
					t.Errorf("%+v: %v", d, err)
				}
			}
		})
	}
}

func refnamed(d ocispec.Descriptor, ref string) ocispec.Descriptor {
	d.Annotations = map[string]string{ocispec.AnnotationRefName: ref}
	return d
}

func compressed(t *testing.T, body []byte, by func(io.Writer) io.WriteCloser) []byte {
	t.Helper()
	var b bytes.Buffer
	w := by(&b)
	if _, err := w.Write(body); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func dockerJSON(t testing.TB, tags []string, config string, layers ...string) entry {
	return jsonEntry(t, "manifest.json", []dockerImage{{Config: config, RepoTags: tags, Layers: layers}})
}

func dockerTar(t testing.TB, s sample, tags []string, layer string) []byte {
	return tarOf(t, entry{name: layer, body: s.layer}, entry{name: "c.json", body: s.config}, dockerJSON(t, tags, "c.json", layer))
}

// TestHostile holds what becomes of archives that somebody made to do harm, or that are
// broken: an error that says what, in bounded time and memory, and no image.
func TestHostile(t *testing.T) {
	s := newSample(t, "one")
	rooted := jsonEntry(t, "index.json", index(named(s.desc, name)))
	with := func(more ...entry) []byte {
		return tarOf(t, append(slices.Concat(s.blobs(), []entry{rooted}), more...)...)
	}
	self := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString("self"), Size: 4}
	deep := s.desc
	var chain []entry
	for range maxDepth + 1 {
		body := marshal(t, index(deep))
		deep = descriptor(ocispec.MediaTypeImageIndex, body)
		chain = append(chain, blobEntry(body))
	}
	lied := s.desc
	lied.Size++
	large := bytes.Repeat([]byte(" "), MaxManifest+1)
	for what, tc := range map[string]struct {
		body []byte
		want string
	}{
		"empty":                       {nil, "nothing in it"},
		"no tar":                      {bytes.Repeat([]byte("x"), 4096), "no tar"},
		"short and no tar":            {[]byte("FROM scratch\n"), "no tar; it takes one with images in it, as `larder export` or `docker save` write it, plain or compressed with gzip or zstd"},
		"cut off in a header":         {tarOf(t, s.blobs()...)[:512+512*((len(s.layer)+511)/512)+100], "entry 1: the archive ends too early (unexpected EOF): copy or write it anew"},
		"gzip of nothing":             {[]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}, "no tar"},
		"zstd of a huge window":       {[]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0, 0, 0}, "window"},
		"path escapes":                {with(entry{name: "../../etc/passwd", body: []byte("x")}), "leads out"},
		"path escapes from inside":    {with(entry{name: "blobs/sha256/../../../x", body: []byte("x")}), "leads out"},
		"absolute path":               {with(entry{name: "/etc/passwd", body: []byte("x")}), "leads out"},
		"wrong bytes":                 {tarOf(t, entry{name: blobName(s.desc.Digest), body: []byte("x")}, rooted), "other bytes"},
		"blob is a symlink":           {tarOf(t, entry{name: blobName(s.desc.Digest), kind: tar.TypeSymlink, link: "/etc/passwd"}, rooted), "not in the archive"},
		"blob is a hard link":         {tarOf(t, entry{name: blobName(s.desc.Digest), kind: tar.TypeLink, link: "/etc/passwd"}, rooted), "not in the archive"},
		"blob is a device":            {tarOf(t, entry{name: blobName(s.desc.Digest), kind: tar.TypeBlock}, rooted), "not in the archive"},
		"no index":                    {tarOf(t, s.blobs()...), "neither index.json"},
		"empty index":                 {tarOf(t, jsonEntry(t, "index.json", index())), "neither index.json"},
		"index twice":                 {with(rooted), "index.json is in it twice"},
		"index is no JSON":            {tarOf(t, entry{name: "index.json", body: []byte("{")}), "index.json"},
		"index too large":             {tarOf(t, entry{name: "index.json", body: large}), "4194305 bytes"},
		"index cut off":               {tarOf(t, entry{name: "index.json", body: []byte("{"), size: 100}), "EOF"},
		"blob cut off":                {tarOf(t, entry{name: blobName(s.desc.Digest), body: []byte("x"), size: 1 << 20}), "EOF"},
		"digest that is a path":       {tarOf(t, jsonEntry(t, "index.json", index(ocispec.Descriptor{Digest: "sha256:../../x"}))), "sha256:../../x"},
		"digest of no algorithm":      {tarOf(t, jsonEntry(t, "index.json", index(ocispec.Descriptor{Digest: "x"}))), "invalid checksum digest format"},
		"digest that nobody knows":    {tarOf(t, jsonEntry(t, "index.json", index(ocispec.Descriptor{Digest: "blake3:00"}))), "other than sha256 and sha512"},
		"nothing of the image":        {tarOf(t, rooted), "not in the archive"},
		"a layer missing":             {tarOf(t, s.blobs()[1], s.blobs()[2], rooted), "not in the archive"},
		"no platform whole":           {tarOf(t, append(chain[:1:1], jsonEntry(t, "index.json", index(named(descriptor("", chain[0].body), name))))...), "no platform"},
		"manifest too large":          {tarOf(t, blobEntry(large), jsonEntry(t, "index.json", index(descriptor("", large)))), "more than 4194304"},
		"manifest is no JSON":         {tarOf(t, blobEntry([]byte("x")), jsonEntry(t, "index.json", index(descriptor("", []byte("x"))))), "invalid character"},
		"manifest of nothing":         {tarOf(t, blobEntry([]byte("{}")), jsonEntry(t, "index.json", index(descriptor("", []byte("{}"))))), "no manifest"},
		"indexes without end":         {tarOf(t, append(slices.Concat(s.blobs(), chain), jsonEntry(t, "index.json", index(named(deep, name))))...), "deep"},
		"size lies":                   {tarOf(t, append(s.blobs(), jsonEntry(t, "index.json", index(lied)))...), "as listed"},
		"names itself":                {tarOf(t, blobEntry(marshal(t, index(self))), jsonEntry(t, "index.json", index(named(descriptor("", marshal(t, index(self))), name)))), "no platform"},
		"one name, two images":        {tarOf(t, jsonEntry(t, "index.json", index(named(s.desc, name), named(self, name)))), "name of two images"},
		"docker: file missing":        {tarOf(t, entry{name: "c.json", body: s.config}, dockerJSON(t, nil, "c.json", "gone.tar")), "gone.tar"},
		"docker: link out":            {tarOf(t, entry{name: "c.json", body: s.config}, entry{name: "l.tar", kind: tar.TypeSymlink, link: "/etc/passwd"}, dockerJSON(t, nil, "c.json", "l.tar")), "not in it"},
		"docker: links in a circle":   {tarOf(t, entry{name: "c.json", body: s.config}, entry{name: "a.tar", kind: tar.TypeSymlink, link: "b.tar"}, entry{name: "b.tar", kind: tar.TypeSymlink, link: "a.tar"}, dockerJSON(t, nil, "c.json", "a.tar")), "not in it"},
		"docker: file twice":          {tarOf(t, entry{name: "c.json", body: s.config}, entry{name: "c.json", body: s.config}), "twice"},
		"docker: other layer":         {tarOf(t, entry{name: "c.json", body: s.config}, entry{name: "l.tar", body: []byte("x")}, dockerJSON(t, nil, "c.json", "l.tar")), "as the configuration says"},
		"docker: layers miscounted":   {tarOf(t, entry{name: "c.json", body: s.config}, dockerJSON(t, nil, "c.json")), "1 layers"},
		"docker: config outside":      {tarOf(t, dockerJSON(t, nil, "../../etc/passwd")), "not in it"},
		"docker: config is no JSON":   {tarOf(t, entry{name: "c.json", body: []byte("x")}, dockerJSON(t, nil, "c.json")), "configuration"},
		"docker: manifest.json twice": {tarOf(t, dockerJSON(t, nil, "c"), dockerJSON(t, nil, "c")), "twice"},
		"names without end":           {tarOf(t, entry{name: strings.Repeat("n", maxName+1)}), "name has more than"},
	} {
		t.Run(what, func(t *testing.T) {
			images, _, err := read(tc.body)
			if err == nil {
				for _, i := range images {
					err = errors.Join(err, i.Err)
				}
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

// TestWork: what a small archive can have read back and listed has a bound, however often
// it names the same.
func TestWork(t *testing.T) {
	s := newSample(t, "one")
	repeat := func(d ocispec.Descriptor, n int) []ocispec.Descriptor {
		return slices.Repeat([]ocispec.Descriptor{d}, n)
	}
	absent := marshal(t, index(repeat(ocispec.Descriptor{Digest: digest.FromString("absent")}, 20)...))
	nested := marshal(t, index(append(repeat(descriptor("", absent), 200), s.desc)...))
	names := func(root ocispec.Descriptor, n int) entry {
		var roots []ocispec.Descriptor
		for i := range n {
			roots = append(roots, named(root, fmt.Sprintf("%s-%d", name, i)))
		}
		return jsonEntry(t, "index.json", index(roots...))
	}
	// Indexes that differ, over one that is as large as can be.
	padded := append(marshal(t, index(s.desc)), bytes.Repeat([]byte(" "), MaxManifest-1000)...)
	over := s.blobs()
	var roots []ocispec.Descriptor
	for i := range 40 {
		body := marshal(t, index(descriptor(fmt.Sprint(i), padded)))
		over, roots = append(over, blobEntry(body)), append(roots, named(descriptor("", body), fmt.Sprintf("%s-%d", name, i)))
	}
	over = append(over, blobEntry(padded), jsonEntry(t, "index.json", index(roots...)))
	config := append(bytes.Clone(s.config), bytes.Repeat([]byte(" "), MaxManifest-1000)...)
	var docker []dockerImage
	for i := range 40 {
		docker = append(docker, dockerImage{Config: "c.json", RepoTags: []string{fmt.Sprint("a:", i)}, Layers: []string{"l.tar"}})
	}
	// A manifest of many blobs.
	broad := ocispec.Manifest{Config: descriptor("", s.config)}
	wide := s.blobs()
	for i := range 256 {
		body := []byte(fmt.Sprint("layer ", i))
		wide, broad.Layers = append(wide, blobEntry(body)), append(broad.Layers, descriptor("", body))
	}
	root := marshal(t, broad)
	wide = append(wide, blobEntry(root), names(descriptor("", root), maxImages))
	for what, tc := range map[string]struct {
		body []byte
		gets int
		want string // "": all is well
	}{
		"an index named often":   {tarOf(t, append(s.blobs(), blobEntry(absent), blobEntry(nested), names(descriptor("", nested), 1))...), 3, ""},
		"an image of many names": {tarOf(t, append(s.blobs(), names(s.desc, 1000))...), 1, ""},
		"a shared large index":   {tarOf(t, over...), 3*maxDocuments/MaxManifest + 3, "in all"},
		"a shared configuration": {tarOf(t, entry{name: "c.json", body: config}, entry{name: "l.tar", body: s.layer}, jsonEntry(t, "manifest.json", docker)), maxDocuments/MaxManifest + 1, "in all"},
		"many names of much":     {tarOf(t, wide...), 1, "in all"},
	} {
		t.Run(what, func(t *testing.T) {
			images, m, err := read(tc.body)
			for _, i := range images {
				err = errors.Join(err, i.Err)
			}
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("%.200s, want %q", fmt.Sprint(err), tc.want)
			}
			if m.gets > tc.gets {
				t.Errorf("%d documents were read, want at most %d", m.gets, tc.gets)
			}
		})
	}
}

// TestSizeListedWithAName: an image that is known to be whole is held against the size that
// each of its names comes with.
func TestSizeListedWithAName(t *testing.T) {
	s := newSample(t, "one")
	lied := named(s.desc, name+"-2")
	lied.Size++
	images, _, err := read(tarOf(t, append(s.blobs(), jsonEntry(t, "index.json", index(named(s.desc, name), lied)))...))
	if err != nil || len(images) != 2 || images[0].Err != nil || !errors.Is(images[1].Err, ErrInvalid) {
		t.Errorf("%+v, %v", images, err)
	}
}

// TestEntriesWithoutEnd: a tar may have only so many, however small.
func TestEntriesWithoutEnd(t *testing.T) {
	pipe, w := io.Pipe()
	go func() {
		out := tar.NewWriter(w)
		var err error
		for n := 0; err == nil; n++ {
			err = out.WriteHeader(&tar.Header{Name: fmt.Sprint("x", n), Typeflag: tar.TypeReg})
		}
	}()
	_, err := Read(pipe, &memory{left: 64 << 20, blobs: map[digest.Digest][]byte{}})
	pipe.Close()
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "more than 65536 entries") {
		t.Error(err)
	}
}

// TestStoreFails: what the store says ends the reading, and can be told.
func TestStoreFails(t *testing.T) {
	s := newSample(t, "one")
	for what, body := range map[string][]byte{"oci": tarOf(t, s.blobs()...), "docker": dockerTar(t, s, nil, "l.tar")} {
		if _, err := Read(bytes.NewReader(body), &memory{left: 3, blobs: map[digest.Digest][]byte{}}); !errors.Is(err, errFull) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// FuzzRead: whatever an archive's own files say, nothing panics, and no image is called
// whole whose content was not handed on. $M, $L and $C stand for the digests of the
// manifest, a layer and a configuration, which a fuzzer would not hit. (Tars themselves
// are read by archive/tar.)
func FuzzRead(f *testing.F) {
	layer := []byte("layer")
	config := marshal(f, ocispec.Image{RootFS: ocispec.RootFS{DiffIDs: []digest.Digest{digest.FromBytes(layer)}}})
	manifest := `{"schemaVersion":2,"config":{"digest":"$C"},"layers":[{"digest":"$L"},{"digest":"$L","urls":["x"]}]}`
	f.Add(`{"manifests":[{"digest":"$M","annotations":{"io.containerd.image.name":"a/b:c"}}]}`, manifest, "", "l.tar", "a")
	f.Add(`{"manifests":[{"digest":"$M"}]}`, `{"manifests":[{"digest":"$M"},{"digest":"$L","platform":{"os":"linux"}}]}`, "", "l.tar", "a")
	f.Add("", manifest, `[{"Config":"c.json","RepoTags":["a:b"],"Layers":["x/l.tar"]}]`, "x/l.tar", "../l.tar")
	f.Fuzz(func(t *testing.T, index, manifest, docker, name, link string) {
		if len(name)+len(link) > 150 || strings.ContainsRune(name+link, 0) {
			return // no tar has such a header
		}
		names := strings.NewReplacer("$L", string(digest.FromBytes(layer)), "$C", string(digest.FromBytes(config)))
		manifest = names.Replace(manifest)
		entries := []entry{blobEntry(layer), blobEntry(config), blobEntry([]byte(manifest)), {name: "c.json", body: config}, {name: "l.tar", body: layer},
			{name: name, kind: tar.TypeSymlink, link: link}}
		if index != "" {
			entries = append(entries, entry{name: "index.json", body: []byte(strings.ReplaceAll(index, "$M", string(digest.FromString(manifest))))})
		}
		if docker != "" {
			entries = append(entries, entry{name: "manifest.json", body: []byte(docker)})
		}
		images, m, err := read(tarOf(t, entries...))
		if err != nil {
			return
		}
		for _, i := range images {
			if i.Err == nil {
				checkWhole(t, i, m)
			}
		}
	})
}

func checkWhole(t *testing.T, i Image, m *memory) {
	t.Helper()
	if !slices.ContainsFunc(i.Manifests, func(d ocispec.Descriptor) bool { return d.Digest == i.Root.Digest }) {
		t.Errorf("the root %s is not among %v", i.Root.Digest, i.Manifests)
	}
	for _, d := range slices.Concat(i.Manifests, i.Blobs) {
		if kept, err := m.Get(d.Digest); err != nil || d.Digest.Algorithm().FromBytes(kept) != d.Digest {
			t.Errorf("%s: %v", d.Digest, err)
		}
	}
}

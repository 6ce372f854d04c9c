package registrytest_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	. "github.com/larder-cache/larder/test/registrytest"
)

// TestContentAnywhere reads contents piecewise at odd offsets, where block
// borders go wrong.
func TestContentAnywhere(t *testing.T) {
	for name, c := range map[string]Content{
		"random": Random(3, 200_003),
		"layer":  firstLayer(ImageSpec{Seed: 3, Layers: []int64{140_001}}),
		"empty":  firstLayer(ImageSpec{Seed: 3, Layers: []int64{0}}),
	} {
		t.Run(name, func(t *testing.T) {
			whole := readAll(t, c)
			if int64(len(whole)) != c.Size() {
				t.Fatalf("read %d bytes of %d", len(whole), c.Size())
			}
			if err := iotest.TestReader(io.NewSectionReader(c, 0, c.Size()), whole); err != nil {
				t.Error(err)
			}
			for off := int64(0); off < c.Size(); off += 997 {
				p := make([]byte, 1009)
				n, err := c.ReadAt(p, off)
				if want := whole[off:min(int64(len(whole)), off+1009)]; !bytes.Equal(p[:n], want) || n < len(p) && !errors.Is(err, io.EOF) {
					t.Fatalf("at %d: %d bytes, %v", off, n, err)
				}
			}
		})
	}
}

func firstLayer(spec ImageSpec) Content {
	img := OCIImage(spec)
	return img.Blobs[img.Layers[0].Digest]
}

func TestRandomDependsOnSeed(t *testing.T) {
	if !bytes.Equal(readAll(t, Random(1, 100)), readAll(t, Random(1, 1000))[:100]) {
		t.Error("the size changes the bytes")
	}
	if bytes.Equal(readAll(t, Random(1, 100)), readAll(t, Random(2, 100))) {
		t.Error("two seeds make the same bytes")
	}
}

// TestLargeBlobTakesNoMemory serves the end of 5 GiB. A digest is not needed for
// it, so that nothing reads the whole.
func TestLargeBlobTakesNoMemory(t *testing.T) {
	const size = 5 << 30
	s := Start(t, Options{})
	d := digest.FromString("stands for the real one")
	s.PutBlobAs(repo, d, Random(1, size))
	o := fetch(t, s, "/v2/"+repo+"/blobs/"+d.String(), "bytes=5368709110-")
	partial("bytes 5368709110-5368709119/5368709120", o.body)(t, o)
	if len(o.body) != 10 {
		t.Errorf("got %d bytes", len(o.body))
	}
}

func TestLayersUnpack(t *testing.T) {
	spec := ImageSpec{Seed: 9, Layers: []int64{0, 512, 100_000}}
	img := OCIImage(spec)
	var config ocispec.Image
	if err := json.Unmarshal(readAll(t, img.Blobs[manifestOf(t, img).Config.Digest]), &config); err != nil {
		t.Fatal(err)
	}
	for i, layer := range img.Layers {
		zr, err := gzip.NewReader(bytes.NewReader(readAll(t, img.Blobs[layer.Digest])))
		if err != nil {
			t.Fatal(err)
		}
		archive, err := io.ReadAll(zr)
		if err != nil {
			t.Fatal(err)
		}
		if digest.FromBytes(archive) != config.RootFS.DiffIDs[i] {
			t.Errorf("layer %d does not match its diff ID", i)
		}
		tr := tar.NewReader(bytes.NewReader(archive))
		h, err := tr.Next()
		if err != nil || h.Size != spec.Layers[i] {
			t.Fatalf("layer %d: %+v, %v", i, h, err)
		}
		if n, err := io.Copy(io.Discard, tr); n != h.Size || err != nil {
			t.Errorf("layer %d: %d bytes, %v", i, n, err)
		}
		if _, err := tr.Next(); err != io.EOF {
			t.Errorf("layer %d has no end: %v", i, err)
		}
	}
}

func manifestOf(t *testing.T, img *Image) ocispec.Manifest {
	t.Helper()
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Manifests[len(img.Manifests)-1].Data, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestImagesAreDeterministic(t *testing.T) {
	spec := ImageSpec{Seed: 5, Layers: []int64{1000}}
	if a, b := Platforms(spec, true), Platforms(spec, true); a.Digest != b.Digest {
		t.Error("equal specs make different images")
	}
	other := spec
	other.Seed++
	if a, b := OCIImage(spec), OCIImage(other); a.Layers[0].Digest == b.Layers[0].Digest || a.Digest == b.Digest {
		t.Error("seeds do not matter")
	}
}

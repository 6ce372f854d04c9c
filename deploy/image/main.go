// Command image makes the container image of Larder without a container engine:
// one OCI archive with an index of all platforms, that containerd, podman and
// Docker load. It needs no network, and the same binaries give the same bytes.
//
// The image has three files: the static binary, the certificate authorities that
// registries are verified with, and the list of what is built into the binary (an
// SBOM in CycloneDX, which is also written beside the archive). The authorities
// are those of the module golang.org/x/crypto/x509roots, Mozilla's list: go.sum
// pins them, where a build machine has whatever its distribution shipped last.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	var o options
	flag.StringVar(&o.name, "name", "", "name of the image, with a tag")
	flag.StringVar(&o.version, "version", "dev", "version to label the image with")
	flag.StringVar(&o.out, "out", "dist/larder-image.tar", "the archive to write; SBOMs go beside it")
	flag.Int64Var(&o.most, "max-bytes", 40e6, "fail if the files of one platform are larger than this")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: image -name NAME:TAG [flags] BINARY...")
		flag.PrintDefaults()
	}
	flag.Parse()
	o.binaries = flag.Args()
	if err := o.run(); err != nil {
		fmt.Fprintln(os.Stderr, "image: "+err.Error())
		os.Exit(1)
	}
}

type options struct {
	name, version, out string
	most               int64
	binaries           []string // one for each platform
}

func (o options) run() error {
	if _, tag, ok := strings.Cut(filepath.Base(o.name), ":"); !ok || tag == "" || len(o.binaries) == 0 {
		return fmt.Errorf("want -name NAME:TAG and a binary for each platform")
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	var images []v1.Image
	for _, path := range o.binaries {
		b, err := readBinary(path)
		if err != nil {
			return err
		}
		img, err := o.image(b)
		if err != nil {
			return fmt.Errorf("make the image of %s: %w", path, err)
		}
		images = append(images, img)
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        img,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: b.os, Architecture: b.arch}},
		})
	}
	if err := writeArchive(o.out, o.name, index, images[0]); err != nil {
		return fmt.Errorf("write %s: %w", o.out, err)
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	fmt.Printf("%s: %s@%s\n", o.out, o.name, digest)
	return nil
}

// image makes one platform's image, and writes its SBOM beside the archive.
func (o options) image(b binary) (v1.Image, error) {
	sbom, err := b.sbom(o.version)
	if err != nil {
		return nil, err
	}
	stem := strings.TrimSuffix(o.out, filepath.Ext(o.out))
	if err := os.WriteFile(fmt.Sprintf("%s-%s-%s.cdx.json", stem, b.os, b.arch), sbom, 0o644); err != nil {
		return nil, err
	}
	// The authorities change least often, so they are the first layer.
	layers := [][]file{
		{{"etc/ssl/certs/ca-certificates.crt", 0o644, authorities()}},
		{{"usr/bin/larder", 0o755, b.data}, {"usr/share/sbom/larder.cdx.json", 0o644, sbom}},
	}
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	var size int64
	for _, files := range layers {
		layer, err := layerOf(files)
		if err != nil {
			return nil, err
		}
		if img, err = mutate.Append(img, mutate.Addendum{
			Layer:   layer,
			History: v1.History{CreatedBy: "deploy/image", Comment: files[0].name},
		}); err != nil {
			return nil, err
		}
		for _, f := range files {
			size += int64(len(f.data))
		}
	}
	if img, err = mutate.ConfigFile(img, o.config(img, b)); err != nil {
		return nil, err
	}
	packed, err := packedSize(img)
	if err != nil {
		return nil, err
	}
	fmt.Printf("%s/%s: %.1f MB to pull, %.1f MB of files\n", b.os, b.arch, float64(packed)/1e6, float64(size)/1e6)
	if size > o.most {
		return nil, fmt.Errorf("%d bytes of files, which is more than %d", size, o.most)
	}
	return img, nil
}

// config is what runtimes read: an unprivileged user by default, because most
// commands need no more; the DaemonSet asks for root, and the chart says why.
func (o options) config(img v1.Image, b binary) *v1.ConfigFile {
	c, err := img.ConfigFile()
	if err != nil {
		panic(err) // of an image in memory
	}
	c = c.DeepCopy()
	c.OS, c.Architecture = b.os, b.arch
	c.Config.Entrypoint, c.Config.Cmd = []string{"/usr/bin/larder"}, []string{"agent"}
	c.Config.User = "65532:65532"
	c.Config.Env = []string{"PATH=/usr/bin"}
	c.Config.Labels = map[string]string{
		"org.opencontainers.image.title":       "larder",
		"org.opencontainers.image.description": "A node-level image cache for Kubernetes",
		"org.opencontainers.image.source":      "https://github.com/larder-cache/larder",
		"org.opencontainers.image.version":     o.version,
	}
	return c
}

func packedSize(img v1.Image) (int64, error) {
	m, err := img.Manifest()
	if err != nil {
		return 0, err
	}
	n := m.Config.Size
	for _, l := range m.Layers {
		n += l.Size
	}
	return n, nil
}

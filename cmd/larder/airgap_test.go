package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/test/registrytest"
)

// apart is a node that may reach no registry.
func apart(t *testing.T) *node {
	return startNode(t, func(c *agent.Config) {
		c.Registries = []upstream.Registry{{Host: testHost, ContactUpstream: new(false)}}
	})
}

// TestExportAndImport carries an image in a file from a node that reaches the registry to
// one that does not, as a user would.
func TestExportAndImport(t *testing.T) {
	from, to := startNode(t, nil), apart(t)
	file := filepath.Join(t.TempDir(), "bundle.tar")
	code, out, errs := larder(t, "export", testImage, "-o", file, "--platform", "linux/amd64", "--admin", from.admin)
	if code != 0 || !strings.Contains(out, "1 image, ") || strings.Count(out, " from upstream") < 3 { // the manifest is read twice
		t.Fatalf("export: exit %d: %s%s", code, out, errs)
	}
	only(t, filepath.Dir(file), "bundle.tar")
	code, out, errs = larder(t, "import", file, "--admin", to.admin)
	want := testImage + ": imported: " + from.image.Digest.String() + ", 4 blobs, 2"
	if code != 0 || !strings.Contains(out, want) || strings.Count(out, " from the archive") != 4 {
		t.Fatalf("import: exit %d: %s%s", code, out, errs)
	}
	code, out, errs = larder(t, "warm", testImage, "--platform", "linux/amd64", "--admin", to.admin)
	if code != 0 || !strings.Contains(out, "from disk") || strings.Contains(out, "upstream") {
		t.Errorf("pull: exit %d: %s%s", code, out, errs)
	}
	code, out, _ = larder(t, "explain", testImage, "--platform", "linux/amd64", "--admin", to.admin)
	if code != 0 || strings.Count(out, "import") < 4 {
		t.Errorf("explain: exit %d: %s", code, out)
	}
	code, out, errs = larder(t, "import", file, "--name", testHost+"/other/name:v2", "--admin", to.admin)
	if code != 0 || !strings.Contains(out, testHost+"/other/name:v2: imported") || !strings.Contains(out, "of which 4 (") || strings.Count(out, "was here already") != 4 {
		t.Errorf("import under another name: exit %d: %s%s", code, out, errs)
	}
}

// TestExportForAnyRuntime: CRI-O in the cluster that imports takes another instance of an
// image than containerd, so both are in the archive.
func TestExportForAnyRuntime(t *testing.T) {
	from, to := startNode(t, nil), apart(t)
	gzip := registrytest.OCIImage(registrytest.ImageSpec{Seed: 21, Layers: []int64{20 << 10}})
	zstd := registrytest.OCIImage(registrytest.ImageSpec{Seed: 22, Layers: []int64{10 << 10}})
	zstd.Annotations = map[string]string{"io.github.containers.compression.zstd": "true"}
	index := registrytest.Index(gzip, zstd)
	from.registry.Put("team/app", index, "twice")
	image, file := testHost+"/team/app:twice", filepath.Join(t.TempDir(), "bundle.tar")
	if code, _, errs := larder(t, "export", image, "-o", file, "--platform", "linux/amd64", "--admin", from.admin); code != 0 {
		t.Fatalf("export: exit %d: %s", code, errs)
	}
	code, out, errs := larder(t, "import", file, "--admin", to.admin)
	if want := image + ": imported: " + index.Digest.String() + ", 7 blobs, "; code != 0 || !strings.Contains(out, want) {
		t.Errorf("import: exit %d: %s%s", code, out, errs)
	}
}

// TestExportWithoutReader: an export goes on when nobody reads its progress any more, and
// leaves the archive and nothing else.
func TestExportWithoutReader(t *testing.T) {
	from, file := startNode(t, nil), filepath.Join(t.TempDir(), "bundle.tar")
	progress, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "export", testImage, "-o", file, "--platform", "linux/amd64", "--admin", from.admin)
	cmd.Env, cmd.Stdout = append(os.Environ(), asMain+"=1"), stdout
	progress.Close()
	if err := errors.Join(cmd.Run(), stdout.Close()); err != nil {
		t.Error(err)
	}
	only(t, filepath.Dir(file), "bundle.tar")
}

// TestExportToPipe: standard output has the archive and nothing else, and standard input
// takes it.
func TestExportToPipe(t *testing.T) {
	from, to := startNode(t, nil), apart(t)
	code, out, errs := larder(t, "export", testImage, "-o", "-", "--platform", "linux/amd64", "--admin", from.admin)
	if code != 0 || !strings.Contains(errs, "1 image, ") {
		t.Fatalf("export: exit %d: %s", code, errs)
	}
	root := newRoot()
	var answer bytes.Buffer
	root.SetArgs([]string{"import", "-", "--admin", to.admin})
	root.SetIn(strings.NewReader(out))
	root.SetOut(&answer)
	if err := root.ExecuteContext(t.Context()); err != nil || !strings.Contains(answer.String(), testImage+": imported") {
		t.Errorf("import: %v\n%s", err, answer.String())
	}
}

// TestImportOfWhatCannotBeRead: a disk that fails is not taken for an agent that does.
func TestImportOfWhatCannotBeRead(t *testing.T) {
	from, to := startNode(t, nil), apart(t)
	_, archive, _ := larder(t, "export", testImage, "-o", "-", "--platform", "linux/amd64", "--admin", from.admin)
	for _, n := range []int{0, len(archive) / 2} {
		root := newRoot()
		root.SetArgs([]string{"import", "-", "--admin", to.admin})
		root.SetIn(io.MultiReader(strings.NewReader(archive[:n]), iotest.ErrReader(errors.New("input/output error"))))
		if err := root.ExecuteContext(t.Context()); err == nil || err.Error() != "-: input/output error" {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

// silent is an archive of which nothing comes until free is closed.
type silent struct{ read, free chan struct{} }

func (s silent) Read([]byte) (int, error) {
	close(s.read)
	<-s.free
	return 0, io.EOF
}

// TestImportInterrupted: Ctrl-C ends an import that waits for its archive.
func TestImportInterrupted(t *testing.T) {
	n, in := apart(t), silent{make(chan struct{}), make(chan struct{})}
	defer close(in.free)
	ctx, cancel := context.WithCancel(t.Context())
	root := newRoot()
	root.SetArgs([]string{"import", "-", "--admin", n.admin})
	root.SetIn(in)
	ended := make(chan error, 1)
	go func() { ended <- root.ExecuteContext(ctx) }()
	<-in.read
	cancel()
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "interrupted; nothing of this file was imported") {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on")
	}
}

// TestExportLeavesNothing: a file has all of it or is what it was.
func TestExportLeavesNothing(t *testing.T) {
	n := startNode(t, nil)
	fault := n.registry.Inject(registrytest.Match{Kind: registrytest.Blob}, registrytest.StallAfter(100))
	dir := t.TempDir()
	file := filepath.Join(dir, "bundle.tar")
	if err := os.WriteFile(file, []byte("last week's"), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out, errs bytes.Buffer
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, []string{"export", testImage, "-o", file, "--admin", n.admin, "--platform", "linux/amd64"}, &out, &errs)
	}()
	eventually(t, "fetching", func() error {
		if len(n.Status().Fills) == 0 {
			return errors.New("no fill runs")
		}
		return nil
	})
	cancel()
	if code := <-code; code != exitFailed || !strings.Contains(errs.String(), "interrupted; nothing was written") {
		t.Errorf("exit %d: %s", code, errs.String())
	}
	fault.Remove()
	fault.Release()
	code2, _, errs2 := larder(t, "export", testImage, testHost+"/team/gone:v1", "-o", file, "--admin", n.admin, "--platform", "linux/amd64")
	if code2 != exitFailed || !strings.Contains(errs2, "team/gone") {
		t.Errorf("exit %d: %s", code2, errs2)
	}
	only(t, dir, "bundle.tar")
	if got, err := os.ReadFile(file); err != nil || string(got) != "last week's" {
		t.Errorf("%q, %v", got, err)
	}
}

// only holds that a directory has one file.
func only(t *testing.T, dir, name string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != name {
		t.Errorf("%v, %v", entries, err)
	}
}

// TestAirGapMistakes holds that an error says what to do.
func TestAirGapMistakes(t *testing.T) {
	from := startNode(t, nil)
	small := startNode(t, func(c *agent.Config) { c.Cache.MaxBytes = cache.Bytes(10_000) })
	cutOff := startNode(t, func(c *agent.Config) { c.Registries[0].Upstreams = []string{"http://127.0.0.1:1"} })
	dir := t.TempDir()
	file, text := filepath.Join(dir, "bundle.tar"), filepath.Join(dir, "text")
	if code, _, errs := larder(t, "export", testImage, "-o", file, "--platform", "linux/amd64", "--admin", from.admin); code != 0 {
		t.Fatal(errs)
	}
	if err := os.WriteFile(text, bytes.Repeat([]byte("text "), 1000), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		args []string
		code int
		want string
	}{
		"no output":          {[]string{"export", "nginx"}, exitUsage, "-o FILE"},
		"no image":           {[]string{"export", "-o", "x"}, exitUsage, "larder export --help"},
		"bad image":          {[]string{"export", "-o", "x", "a b"}, exitUsage, "not an image name"},
		"no such directory":  {[]string{"export", "-o", filepath.Join(dir, "gone", "x"), testImage, "--admin", from.admin}, exitFailed, "no such file"},
		"no registry":        {[]string{"export", "-o", "x", testImage, "--admin", cutOff.admin}, exitFailed, "`larder status` has its last error"},
		"no file":            {[]string{"import"}, exitUsage, "larder import --help"},
		"no such file":       {[]string{"import", filepath.Join(dir, "gone")}, exitFailed, "no such file"},
		"a directory":        {[]string{"import", dir, "--admin", from.admin}, exitFailed, "tar -C " + dir + " -c . | larder import -"},
		"no archive":         {[]string{"import", text, "--admin", from.admin}, exitFailed, "no tar"},
		"one name for files": {[]string{"import", "a", "b", "--name", "nginx"}, exitUsage, "one file"},
		"bad name":           {[]string{"import", "a", "--name", "a b"}, exitUsage, "not an image name"},
		"no room":            {[]string{"import", file, "--admin", small.admin}, exitFailed, "cache.max_bytes is 9.8 KiB"},
		"no agent":           {[]string{"import", file, "--admin", "127.0.0.1:1"}, exitFailed, "is it running"},
	} {
		code, out, errs := larder(t, tc.args...)
		if code != tc.code || !strings.Contains(errs, tc.want) {
			t.Errorf("%s: exit %d, want %d with %q:\n%s%s", name, code, tc.code, tc.want, out, errs)
		}
	}
}

package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// run is what every test of one `go test` shares, written by TestMain alone.
var run struct {
	dir    string // holds everything the tests write; removed at the end
	larder string // the binary under test
	wedged string // the same, with a way to wedge it; see test/wedged
}

// raceEnv, when "1", builds the programs under test with the race detector.
const raceEnv = "LARDER_E2E_RACE"

func TestMain(m *testing.M) { os.Exit(mainCode(m)) }

func mainCode(m *testing.M) int {
	// Unix socket paths end at 107 bytes, so t.TempDir (which spells out the
	// test's name) is too long for containerd's.
	dir, err := os.MkdirTemp("", "larder-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	run.dir = dir
	code := 1
	if err := build(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
	} else {
		code = m.Run()
	}
	if err := cleanUp(dir); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: left behind:", err)
		return 1
	}
	return code
}

// build makes the programs under test.
func build() error {
	run.larder, run.wedged = filepath.Join(run.dir, "larder"), filepath.Join(run.dir, "wedged")
	args := []string{"build"}
	if os.Getenv(raceEnv) == "1" {
		args = append(args, "-race")
	}
	larder := exec.Command("go", append(args, "-o", run.larder, "./cmd/larder")...)
	wedged := exec.Command("go", append(args, "-o", run.wedged, "./test/wedged")...)
	for _, cmd := range []*exec.Cmd{larder, wedged} {
		cmd.Dir = filepath.Join("..", "..")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", cmd, err, out)
		}
	}
	return nil
}

// cleanUp removes dir, and reports mounts and processes that outlived the tests.
func cleanUp(dir string) error {
	var errs []error
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 1 && strings.HasPrefix(fields[1], dir) {
			errs = append(errs, fmt.Errorf("mount %s", fields[1]))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...) // removing dir would reach through the mounts
	}
	return os.RemoveAll(dir)
}

// tempDir is a short-named directory that lives as long as the test.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(run.dir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return dir
}

// unavailable ends the test: in CI a missing tool is a failure, elsewhere the
// test says what it lacks.
func unavailable(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("not available, and CI skips nothing: "+format, args...)
	}
	t.Skipf("NOT RUN: "+format, args...)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		unavailable(t, "root is needed to run containerd and podman")
	}
}

// needTool finds a program that `make deps` installs.
func needTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		unavailable(t, "%s is missing: run `make deps` as root", name)
	}
	return path
}

// builtDirEnv lists the directories of tools that `make e2e` had built.
const builtDirEnv = "LARDER_TOOLS_BIN"

// needBuilt finds a program that test/tools/install.sh builds.
func needBuilt(t *testing.T, name string) string {
	t.Helper()
	dirs := filepath.SplitList(os.Getenv(builtDirEnv))
	if len(dirs) == 0 {
		unavailable(t, "%s is not set: run the tests with `make e2e`", builtDirEnv)
	}
	for _, dir := range dirs {
		if path := filepath.Join(dir, name); isFile(path) {
			return path
		}
	}
	unavailable(t, "no %s in %v", name, dirs)
	return ""
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// eventually waits until check returns nil. It gives up at the deadline, or when
// check says errEnded, with check's last error.
func eventually(t *testing.T, within time.Duration, what string, check func() error) {
	t.Helper()
	if err := poll(within, check); err != nil {
		t.Fatalf("%s: not within %v: %v", what, within, err)
	}
}

func poll(within time.Duration, check func() error) error {
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		if errors.Is(err, errEnded) {
			return err
		}
		select {
		case <-deadline.C:
			return err
		case <-tick.C:
		}
	}
}

package cluster

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/log"
	"go.uber.org/goleak"
)

// larder is the program under test, built once.
var larder string

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "larder-cluster-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	larder = filepath.Join(dir, "larder")
	args := []string{"build", "-o", larder}
	if os.Getenv("LARDER_CLUSTER_RACE") != "" {
		args = append(args, "-race")
	}
	if out, err := exec.Command("go", append(args, "../../cmd/larder")...).CombinedOutput(); err != nil {
		return 1, fmt.Errorf("build larder: %w: %s", err, out)
	}
	// containerd warns of a file system without fs-verity, which few have.
	if err := log.SetLevel("error"); err != nil {
		return 1, err
	}
	// The tests mostly wait; busy bounds those that do not.
	flag.Parse()
	if err := flag.Set("test.parallel", "64"); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// patience is how long anything may take before a test gives up: a busy
// machine is no bug.
const patience = 90 * time.Second

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() error) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatalf("not %s: %v", what, err)
		case <-deadline:
			t.Fatalf("not %s: %v", what, err)
		}
	}
}

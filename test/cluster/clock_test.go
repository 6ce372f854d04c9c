package cluster

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestClocksApart runs agents whose clocks are hours apart. A Go program takes
// the time from the kernel's page without a call that could be caught, so the
// clock is set in the program: it is built with another time.Now.
func TestClocksApart(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("one day is enough for -short")
	}
	program := buildWithClock(t)
	var env [][]string
	for _, off := range []string{"-26h", "0s", "7h", "-40m", "8761h"} {
		env = append(env, []string{clockVariable + "=" + off})
	}
	c := newCluster(t, options{program: program, env: env})
	c.pull(c.nodes...).wait(1)
	c.sentAtMost(1.02)
	c.reg.Down()
	late := c.add()
	late.env = []string{clockVariable + "=-3h"}
	late.up()
	late.rest()
	c.awaitMembers()
	c.pull(late).wait(1)
	c.checkClocks()
	c.finish()
}

// checkClocks fails if the agents agree on the time: nothing was tested.
func (c *cluster) checkClocks() {
	c.t.Helper()
	first, last := c.nodes[0].status().Started, c.nodes[4].status().Started
	if last.Sub(first).Hours() < 24*365 {
		c.t.Errorf("started at %v and %v", first, last)
	}
}

// clockVariable says by how much a program of buildWithClock is off.
const clockVariable = "LARDER_TEST_CLOCK"

// buildWithClock builds larder with a time package that reads clockVariable.
func buildWithClock(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(strings.TrimSpace(string(out)), "src", "time")
	text, err := os.ReadFile(filepath.Join(root, "time.go"))
	if err != nil {
		t.Fatal(err)
	}
	const now = "sec, nsec, mono := runtimeNow()\n"
	if n := strings.Count(string(text), now); n != 1 {
		t.Fatalf("%q is %d times in time.go; this test has to learn what Go does now", now, n)
	}
	dir := t.TempDir()
	write := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return name
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {
		filepath.Join(root, "time.go"): write("time.go", strings.Replace(string(text), now, now+"\tsec += skew\n", 1)),
		filepath.Join(root, "skew.go"): write("skew.go", skewSource),
	}})
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "larder")
	build := exec.Command("go", "build", "-overlay", write("overlay.json", string(overlay)), "-o", program, "../../cmd/larder")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	return program
}

const skewSource = `package time

import "syscall"

var skew = func() int64 {
	text, _ := syscall.Getenv("` + clockVariable + `")
	d, err := ParseDuration(text)
	if err != nil {
		panic(err)
	}
	return int64(d / Second)
}()
`

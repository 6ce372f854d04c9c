package hostsconfig

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// crioEnv makes the test binary stand in for CRI-O; see TestReload.
const crioEnv = "LARDER_HOSTSCONFIG_CRIO"

// crioMain says so on each SIGHUP, until its input ends.
func crioMain() bool {
	if os.Getenv(crioEnv) == "" {
		return false
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	go func() {
		for range hup {
			fmt.Println("reloaded")
		}
	}()
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin) // ends with the parent
	fmt.Println("ended")
	return true
}

// startCRIO runs a process that the kernel knows as crio, and returns what it
// says, a line at a time, and what ends it.
func startCRIO(t *testing.T) (line func() string, end func()) {
	t.Helper()
	self, err := os.ReadFile(os.Args[0])
	must(t, err)
	program := filepath.Join(t.TempDir(), "crio")
	must(t, os.WriteFile(program, self, 0o755))
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), crioEnv+"=1")
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	lines := bufio.NewScanner(stdout)
	line = func() string {
		lines.Scan()
		return lines.Text()
	}
	if got := line(); got != "ready" {
		t.Fatalf("the process said %q", got)
	}
	return line, func() {
		must(t, stdin.Close())
		for l := line(); l != "ended"; l = line() {
			t.Errorf("said %q at its end", l)
		}
		must(t, cmd.Wait())
	}
}

// TestReload holds that CRI-O is told of a change, and of nothing else.
func TestReload(t *testing.T) {
	line, end := startCRIO(t)
	defer end()
	h := newHosts(t, Options{CRIO: filepath.Join(t.TempDir(), "registries.conf.d"), ProxyAddr: testProxy, ReloadCRIO: true})
	apply(t, h)
	if got := line(); got != "reloaded" {
		t.Errorf("after Apply: %q", got)
	}
	if changes := apply(t, h); len(changes) > 0 {
		t.Errorf("a second Apply changed %v", changes)
	}
	remove(t, h)
	if got := line(); got != "reloaded" {
		t.Errorf("after Remove: %q", got)
	}
}

// TestReloadIsAsked holds that nobody is sent a signal by default, nor for
// containerd, which needs none.
func TestReloadIsAsked(t *testing.T) {
	_, end := startCRIO(t)
	defer end() // reports a reload
	apply(t, newHosts(t, Options{CRIO: filepath.Join(t.TempDir(), "registries.conf.d"), ProxyAddr: testProxy}))
	apply(t, newHosts(t, Options{Containerd: filepath.Join(t.TempDir(), "certs.d"), ProxyAddr: testProxy, ReloadCRIO: true}))
}

// TestNoCRIO holds that whoever asked for reloads is told why there are none.
func TestNoCRIO(t *testing.T) {
	var log bytes.Buffer
	h := newHosts(t, Options{CRIO: filepath.Join(t.TempDir(), "registries.conf.d"), ProxyAddr: testProxy, ReloadCRIO: true,
		Logger: slog.New(slog.NewTextHandler(&log, nil))})
	h.proc = t.TempDir()
	apply(t, h)
	if !strings.Contains(log.String(), "hostPID: true") {
		t.Errorf("logged: %s", log.String())
	}
}

func TestIsCRIO(t *testing.T) {
	uid := fmt.Sprintf("Uid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", os.Geteuid())
	for _, tt := range []struct {
		name, status string
		want         bool
	}{
		{"CRI-O", "Name:\tcrio\n" + uid + "NSpid:\t812\n", true},
		{"in a container", "Name:\tcrio\n" + uid + "NSpid:\t812\t1\n", false},
		{"its monitor", "Name:\tconmon\n" + uid + "NSpid:\t812\n", false},
		{"another user's", "Name:\tcrio\nUid:\t99999\t99999\t99999\t99999\nNSpid:\t812\n", false},
		{"an old kernel", "Name:\tcrio\n" + uid, false},
		{"cut short", "Name:\tcr", false},
		{"empty", "", false},
	} {
		if got := isCRIO([]byte(tt.status)); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

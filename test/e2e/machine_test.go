package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// machine is a host that has a name, processes and file systems of its own too:
// what runs on it finds a private /etc, /run, /var/lib and /var/log, all in memory,
// and otherwise the files of the real machine. When its first process ends, the
// kernel ends all others, shims and containers included, and nothing is left; so
// it does if the tests were killed.
type machine struct {
	host
	t     *testing.T
	name  string
	root  string      // the machine's files, as the tests see them
	etc   string      // what of /etc is not the real machine's, as the tests see it
	tasks chan func() // run on the thread that lives on the machine
}

// boot is the machine's first process. Its arguments are the machine's name and an
// empty directory.
const boot = `set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755,size=4g "$1" "$2"
mkdir "$2/etc" "$2/work"
mount -t overlay -o "lowerdir=/etc,upperdir=$2/etc,workdir=$2/work" overlay /etc
for dir in /run /var/lib /var/log; do
	mkdir -p "$2$dir"
	mount --bind "$2$dir" $dir
done
mount -t proc proc /proc
# kubelet sets these, and they are not the machine's own.
for file in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
	mkdir -p "$2/sys/${file%/*}"
	cat /proc/sys/$file >"$2/sys/$file"
	mount --bind "$2/sys/$file" /proc/sys/$file
done
mount --make-rshared /
touch /run/booted
trap exit TERM
while :; do sleep 3600 & wait; done # for any child: orphans are this process's
`

func newMachine(t *testing.T, h host, name string) *machine {
	t.Helper()
	m := &machine{host: h, t: t, name: name, tasks: make(chan func())}
	m.live()
	if err := m.do(m.enter); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	files := tempDir(t)
	cmd := exec.Command("sh", "-c", boot, "sh", name, files)
	first := startProcessBy(t, name, cmd, func() error { return m.do(cmd.Start) })
	m.root = filepath.Join("/proc", strconv.Itoa(first.cmd.Process.Pid), "root")
	m.etc = m.path(filepath.Join(files, "etc"))
	eventually(t, 10*time.Second, name+" boots", func() error {
		_, err := os.Stat(m.path("/run/booted"))
		return errors.Join(first.dead(), err)
	})
	return m
}

// live keeps a thread for the machine until the test ends. What the thread starts
// dies with it, and it is never used for anything else.
func (m *machine) live() {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread()
		for task := range m.tasks {
			task()
		}
	}()
	m.t.Cleanup(func() { close(m.tasks); <-ended })
}

// enter takes the thread to the host's network and gives it the rest of what a
// machine has; a process that it starts then is the machine's first.
func (m *machine) enter() error {
	if err := unix.Setns(int(m.space.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("new namespaces: %w", err)
	}
	return unix.Sethostname([]byte(m.name))
}

// do runs f on the machine's thread.
func (m *machine) do(f func() error) error {
	result := make(chan error)
	m.tasks <- func() { result <- f() }
	return <-result
}

// start runs cmd on the machine. It has no parent there, as after the parent's
// death, so that is not what may end it; the end of the first process is.
func (m *machine) start(name string, cmd *exec.Cmd) *process {
	m.t.Helper()
	return startProcessBy(m.t, m.name+"-"+name, cmd, func() error {
		cmd.SysProcAttr = nil
		return m.do(cmd.Start)
	})
}

// path is where the tests find a file of the machine.
func (m *machine) path(file string) string { return filepath.Join(m.root, file) }

// run runs a program on the machine to its end.
func (m *machine) run(name string, args ...string) error {
	cmd := exec.Command(name, args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	err := m.do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("%s: %s: %w\n%s", m.name, cmd, err, &out)
	}
	return nil
}

// newCgroup makes a cgroup in every hierarchy, and removes it and those below it
// when the test ends.
func newCgroup(t *testing.T, name string) (path string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	path = "/" + filepath.Base(run.dir) + "-" + name
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || (fields[2] != "cgroup" && fields[2] != "cgroup2") {
			continue
		}
		dir := filepath.Join(fields[1], path)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			eventually(t, 30*time.Second, "cgroups are removed", func() error { return removeCgroups(dir) })
		})
	}
	return path
}

func removeCgroups(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroups(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(dir)
}

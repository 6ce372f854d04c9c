package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// process is a child whose output goes to a file, which is printed if the test
// fails. It ends with the test at the latest.
type process struct {
	t    *testing.T
	name string
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when the child has been waited for
	err  error         // what Wait returned; read after done
}

// startProcess runs cmd, whose Stdout and Stderr it sets.
func startProcess(t *testing.T, name string, cmd *exec.Cmd) *process {
	t.Helper()
	return startProcessBy(t, name, cmd, cmd.Start)
}

// startProcessBy is startProcess with a way of its own to start cmd.
func startProcessBy(t *testing.T, name string, cmd *exec.Cmd, start func() error) *process {
	t.Helper()
	log, err := os.CreateTemp(run.dir, name+"-*.log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	// A test binary that is killed takes its children along.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	p := &process{t: t, name: name, cmd: cmd, log: log.Name(), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = cmd.Wait()
	}()
	t.Cleanup(p.end)
	return p
}

// offline is an environment in which nothing reaches beyond this machine: what is
// not on loopback goes to a proxy that does not exist.
func offline() []string {
	const nowhere = "http://127.0.0.1:1"
	return append(os.Environ(), "HTTP_PROXY="+nowhere, "HTTPS_PROXY="+nowhere, "NO_PROXY=", "no_proxy=")
}

// end stops a child that the test left running and prints the log of a failed
// test.
func (p *process) end() {
	if p.alive() {
		if err := p.stop(30 * time.Second); err != nil {
			p.t.Errorf("%s: %v", p.name, err)
		}
	}
	if p.t.Failed() {
		p.t.Logf("last lines of %s:\n%s", p.name, tail(p.output(), 16<<10))
	}
}

func (p *process) alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// stop sends SIGTERM and waits; a child that does not end in time is killed and
// that is an error.
func (p *process) stop(within time.Duration) error {
	if err := p.signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(within):
		p.kill()
		return fmt.Errorf("still running %v after SIGTERM", within)
	}
}

// kill is kill -9: the child gets no chance to clean up.
func (p *process) kill() {
	_ = p.signal(syscall.SIGKILL) // fails only if it has ended already
	<-p.done
}

func (p *process) signal(s syscall.Signal) error {
	err := p.cmd.Process.Signal(s)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

func (p *process) output() []byte {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return []byte(err.Error())
	}
	return b
}

// errEnded ends a wait: what ended will never answer.
var errEnded = errors.New("ended")

// dead is errEnded once the child has ended.
func (p *process) dead() error {
	if p.alive() {
		return nil
	}
	return fmt.Errorf("%s %w: %s", p.name, errEnded, p.cmd.ProcessState)
}

func tail(b []byte, n int) []byte {
	if len(b) <= n {
		return b
	}
	b = b[len(b)-n:]
	if i := bytes.IndexByte(b, '\n'); i >= 0 {
		b = b[i+1:]
	}
	return b
}

// ports remembers what freePort gave out, so that parallel tests never get one
// twice.
var ports struct {
	sync.Mutex
	given map[int]bool
}

// freePort finds a loopback port that nothing listens on, for programs that
// cannot report a port of their own choice.
func freePort(t *testing.T) int {
	t.Helper()
	ports.Lock()
	defer ports.Unlock()
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		l.Close()
		if ports.given == nil {
			ports.given = map[int]bool{}
		}
		if !ports.given[port] {
			ports.given[port] = true
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

func writeFile(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

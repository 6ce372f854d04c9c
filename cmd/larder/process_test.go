package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/test/logtest"
	"github.com/larder-cache/larder/test/registrytest"
)

// process is a `larder agent` of its own.
type process struct {
	cmd    *exec.Cmd
	stderr logtest.Buffer
	output io.Writer // in place of stderr, if set
	done   chan struct{}
	err    error // of Wait, after done

	dir, certs, proxy, admin string
}

// freePort finds a port that nobody uses at the moment.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// newProcess prepares an agent with a directory and ports of its own, that
// knows reg as testHost.
func newProcess(t *testing.T, reg *registrytest.Server) *process {
	t.Helper()
	p := &process{dir: t.TempDir(), proxy: freePort(t), admin: freePort(t)}
	p.certs = filepath.Join(p.dir, "certs.d")
	config := fmt.Sprintf("[cache]\ndir = %q\nmin_free = 0\n[peer]\nenabled = false\n[hosts]\ncontainerd = %q\n[[registry]]\nhost = %q\nupstreams = [%q]\n",
		filepath.Join(p.dir, "cache"), p.certs, testHost, reg.URL())
	if err := os.WriteFile(p.config(), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *process) config() string { return filepath.Join(p.dir, "larder.toml") }

// start runs the agent; the test's end kills it.
func (p *process) start(t *testing.T, args ...string) {
	t.Helper()
	p.stderr = logtest.Buffer{}
	args = append([]string{"agent", "--config", p.config(), "--proxy.listen", p.proxy, "--admin.listen", p.admin, "--proxy.drain_timeout=10s"}, args...)
	p.cmd = exec.Command(os.Args[0], args...)
	p.cmd.Env = append(os.Environ(), asMain+"=1")
	if p.cmd.Stderr = &p.stderr; p.output != nil {
		p.cmd.Stderr = p.output
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	p.done = done
	go func() {
		defer close(done)
		p.err = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // it may have ended
		<-done
		if t.Failed() {
			t.Logf("the agent said:\n%s", p.stderr.String())
		}
	})
}

func (p *process) ready(t *testing.T) {
	t.Helper()
	eventually(t, "ready", func() error {
		resp, err := noKeepAlive.Get("http://" + p.admin + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}

// noKeepAlive leaves no goroutines behind.
var noKeepAlive = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// exited waits for the end and returns the exit code, -1 for a signal.
func (p *process) exited(t *testing.T) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the agent does not end")
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) pull(t *testing.T) error {
	t.Helper()
	image, err := agent.ParseImage(testImage)
	if err != nil {
		t.Fatal(err)
	}
	_, err = agent.Puller{Proxy: "http://" + p.proxy, Client: noKeepAlive, Platform: "linux/amd64"}.Pull(t.Context(), image)
	return err
}

func processRegistry(t *testing.T) (*registrytest.Server, *registrytest.Image) {
	t.Helper()
	reg := registrytest.Start(t, registrytest.Options{})
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: 5, Layers: []int64{6 << 20, 1 << 10}})
	reg.Put("team/app", img, "v1")
	return reg, img
}

// TestSIGTERM holds that an agent told to stop takes back the host files, lets
// a body under way finish, and exits 0.
func TestSIGTERM(t *testing.T) {
	reg, img := processRegistry(t)
	p := newProcess(t, reg)
	p.start(t)
	p.ready(t)
	if _, err := os.Stat(filepath.Join(p.certs, "_default", "hosts.toml")); err != nil {
		t.Fatal(err)
	}
	layer := img.Layers[0]
	fault := reg.Inject(registrytest.Match{Kind: registrytest.Blob, Reference: layer.Digest.String()}, registrytest.StallAfter(1<<20))
	resp, err := noKeepAlive.Get("http://" + p.proxy + "/v2/team/app/blobs/" + layer.Digest.String() + "?ns=" + testHost)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "taken back", func() error { // before the body is through
		if _, err := os.Stat(p.certs); err == nil {
			return errors.New("host files are there")
		}
		return nil
	})
	fault.Release()
	verifier := layer.Digest.Verifier()
	if n, err := io.Copy(verifier, resp.Body); err != nil || !verifier.Verified() {
		t.Errorf("the body under way: %d of %d bytes, %v", n, layer.Size, err)
	}
	if code := p.exited(t); code != 0 {
		t.Errorf("exit %d", code)
	}
}

// TestTerminalGoesAway holds that an agent whose terminal is closed, twice as shells
// do, or whose log nobody reads any more, takes back the host files all the same.
func TestTerminalGoesAway(t *testing.T) {
	tests := map[string]func(p *process, log io.Closer) error{
		"closed": func(p *process, _ io.Closer) error {
			return errors.Join(p.cmd.Process.Signal(syscall.SIGHUP), p.cmd.Process.Signal(syscall.SIGHUP))
		},
		"tee is gone": func(p *process, log io.Closer) error {
			return errors.Join(log.Close(), p.cmd.Process.Signal(os.Interrupt))
		},
	}
	for name, leave := range tests {
		t.Run(name, func(t *testing.T) {
			reg, _ := processRegistry(t)
			p := newProcess(t, reg)
			log, stderr, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer log.Close()
			p.output = stderr
			p.start(t)
			stderr.Close()
			p.ready(t)
			if _, err := os.Stat(p.certs); err != nil {
				t.Fatal(err)
			}
			if err := leave(p, log); err != nil {
				t.Fatal(err)
			}
			if code := p.exited(t); code != 0 {
				t.Errorf("exit %d: %v", code, p.err)
			}
			if _, err := os.Stat(p.certs); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("host configuration is left: %v", err)
			}
		})
	}
}

// TestKill9 holds P7: killed in the middle of a blob, the agent starts again
// on what it left, and the blob is served whole. What it left in the host's
// files is taken back by `larder hosts remove`.
func TestKill9(t *testing.T) {
	reg, img := processRegistry(t)
	p := newProcess(t, reg)
	p.start(t)
	p.ready(t)
	layer := img.Layers[0]
	fault := reg.Inject(registrytest.Match{Kind: registrytest.Blob, Reference: layer.Digest.String()}, registrytest.StallAfter(4<<20))
	resp, err := noKeepAlive.Get("http://" + p.proxy + "/v2/team/app/blobs/" + layer.Digest.String() + "?ns=" + testHost)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, resp.Body, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	p.exited(t)
	resp.Body.Close()
	fault.Remove()
	fault.Release()
	if _, err := os.Stat(filepath.Join(p.certs, "_default", "hosts.toml")); err != nil {
		t.Fatalf("a killed agent can take nothing back: %v", err)
	}
	p.start(t)
	p.ready(t)
	if err := p.pull(t); err != nil {
		t.Errorf("after the restart: %v", err)
	}
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	p.exited(t)
	if code, out, errs := larder(t, "hosts", "remove", "--hosts.containerd", p.certs); code != 0 || !strings.Contains(out, "_default/hosts.toml") {
		t.Errorf("hosts remove: exit %d\n%s%s", code, out, errs)
	}
	if _, err := os.Stat(p.certs); err == nil {
		t.Error("hosts remove left the directory")
	}
}

// TestStartsThatFail holds that the process ends at once, says what to do, and
// leaves no host configuration that names a port nobody serves.
func TestStartsThatFail(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	tests := []struct {
		name string
		args []string
		code int
		want []string
	}{
		{"port taken", []string{"--proxy.listen", taken.Addr().String()}, exitFailed, []string{"proxy.listen", "address already in use", "ss -ltnp"}},
		{"cache directory unwritable", []string{"--cache.dir", "/proc/larder"}, exitFailed, []string{"cache.dir", "/proc/larder"}},
		{"port out of range", []string{"--proxy.listen", "127.0.0.1:70000"}, exitUsage, []string{"proxy.listen", "65535"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			reg, _ := processRegistry(t)
			p := newProcess(t, reg)
			p.start(t, "--hosts.remove_on_exit=false")
			p.ready(t)
			if err := p.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			p.exited(t)
			p.start(t, tt.args...)
			if code := p.exited(t); code != tt.code {
				t.Errorf("exit %d, want %d", code, tt.code)
			}
			for _, w := range tt.want {
				if !strings.Contains(p.stderr.String(), w) {
					t.Errorf("stderr does not say %q", w)
				}
			}
			if _, err := os.Stat(p.certs); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("host configuration is left: %v", err)
			}
		})
	}
}

// TestRunningOutOfDisk holds that a node without room still serves.
func TestRunningOutOfDisk(t *testing.T) {
	reg, _ := processRegistry(t)
	p := newProcess(t, reg)
	p.start(t, "--cache.min_free=99%")
	p.ready(t)
	for range 2 {
		if err := p.pull(t); err != nil {
			t.Errorf("a pull with a full disk: %v", err)
		}
	}
}

// TestKill9WhilePinning: killed in the middle of the first fetch of an image that was
// pinned by command, the agent goes on by itself when it is started again.
func TestKill9WhilePinning(t *testing.T) {
	t.Parallel()
	reg, img := processRegistry(t)
	p := newProcess(t, reg)
	p.start(t)
	p.ready(t)
	fault := reg.Inject(registrytest.Match{Kind: registrytest.Blob, Reference: img.Layers[0].Digest.String()}, registrytest.StallAfter(4<<20))
	pinned := make(chan int, 1)
	go func() {
		code, _, _ := larder(t, "pin", testImage, "--admin", p.admin)
		pinned <- code
	}()
	<-fault.Held()
	eventually(t, "remembered", func() error { // within two seconds
		body, err := os.ReadFile(filepath.Join(p.dir, "cache", "metadata.db"))
		if err == nil && !bytes.Contains(body, []byte(testImage)) {
			err = errors.New("not yet")
		}
		return err
	})
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	p.exited(t)
	if code := <-pinned; code != exitFailed {
		t.Errorf("pin ends with exit %d", code)
	}
	fault.Remove()
	p.start(t)
	eventually(t, "held", func() error {
		code, out, errs := larder(t, "pin", "--admin", p.admin)
		if code != 0 || !strings.Contains(out, "  held  ") || !strings.Contains(out, "  command\n") {
			return errors.New(out + errs)
		}
		return nil
	})
	reg.Down()
	if err := p.pull(t); err != nil {
		t.Error(err)
	}
}

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// node is a larder agent, a process of its own.
type node struct {
	larder, name string
	args         []string
	log          string
	proxy        string // host:port
	admin        string // URL

	cmd  *exec.Cmd // nil: not running
	done chan struct{}
	err  error // of the process, after done
}

// newNode chooses ports, so that a node that is started again has the same.
func newNode(larder, dir, name string, args ...string) (*node, error) {
	proxy, err := freeAddr()
	admin, err2 := freeAddr()
	if err := errors.Join(err, err2); err != nil {
		return nil, err
	}
	return &node{
		larder: larder, name: name, log: filepath.Join(dir, name+".log"), proxy: proxy, admin: "http://" + admin,
		args: append([]string{
			"agent", "--proxy.listen", proxy, "--admin.listen", admin, "--peer.name", name, "--cache.dir", filepath.Join(dir, name),
			"--cache.min_free", "0", "--cache.max_bytes", "1GiB", "--proxy.drain_timeout", "1s",
		}, args...),
	}, nil
}

// start runs the node and returns once it is ready.
func (n *node) start(ctx context.Context) error {
	out, err := os.OpenFile(n.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()                                                      // the child has its own
	n.cmd, n.done = exec.Command(n.larder, n.args...), make(chan struct{}) // stop ends it, not ctx
	n.cmd.Stdout, n.cmd.Stderr = out, out
	if err := n.cmd.Start(); err != nil {
		n.cmd = nil
		return fmt.Errorf("start %s: %w", n.name, err)
	}
	go func() {
		n.err = n.cmd.Wait()
		close(n.done)
	}()
	return n.await(ctx)
}

func (n *node) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		code, err := n.readiness(ctx)
		if code == http.StatusOK {
			return nil
		}
		select {
		case <-n.done:
			return fmt.Errorf("%s ended: %w\n%s", n.name, cmp.Or(n.err, errors.New("status 0")), n.output())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready (%d): %w\n%s", n.name, code, cmp.Or(err, ctx.Err()), n.output())
		case <-tick.C:
		}
	}
}

func (n *node) readiness(ctx context.Context) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.admin+"/readyz", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// stop ends the node, which must take no longer than its parts need: streams of
// events that are open must not hold it up.
func (n *node) stop() error {
	if n.cmd == nil {
		return nil
	}
	begin := time.Now()
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-n.done:
		n.cmd = nil
	case <-time.After(time.Minute):
		return errors.Join(fmt.Errorf("%s does not stop\n%s", n.name, n.output()), n.cmd.Process.Kill())
	}
	if took := time.Since(begin); n.err == nil && took > stopTime {
		return fmt.Errorf("%s took %s to stop", n.name, took)
	}
	if n.err != nil {
		return fmt.Errorf("%s: %w\n%s", n.name, n.err, n.output())
	}
	return nil
}

// stopTime is generous to a busy machine; a stream that is waited for costs the
// agent more.
const stopTime = 10 * time.Second

func (n *node) output() string {
	b, err := os.ReadFile(n.log)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

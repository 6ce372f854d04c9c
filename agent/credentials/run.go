package credentials

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"syscall"
	"time"
)

const (
	// runTimeout is kubelet's limit for a plugin.
	runTimeout = time.Minute
	// maxOutput of a program; a token of a cloud has some kilobytes.
	maxOutput = 1 << 20
	// waitDelay is for what a killed program left holding its output.
	waitDelay = 2 * time.Second
)

// command is one run of a program.
type command struct {
	path  string
	args  []string
	env   []string
	stdin []byte
}

// run returns what the program printed, also if it failed. It and the programs
// it started are killed when ctx ends. Its standard error is dropped.
func run(ctx context.Context, c command) ([]byte, error) {
	out := &bounded{left: maxOutput}
	cmd := exec.CommandContext(ctx, c.path, c.args...)
	cmd.Env, cmd.Stdin, cmd.Stdout = c.env, bytes.NewReader(c.stdin), out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = waitDelay
	err := cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // it ended well, and left a child behind that holds its output
	}
	switch {
	case out.over:
		return nil, fmt.Errorf("it printed more than %d KiB", maxOutput>>10)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return nil, fmt.Errorf("it did not end within %s", runTimeout)
	}
	return out.buf.Bytes(), err
}

// bounded is a buffer that fails instead of growing without end. It does not
// embed one: that would have a ReadFrom, which io.Copy prefers to Write.
type bounded struct {
	buf  bytes.Buffer
	left int
	over bool
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		b.over = true
		return 0, errors.New("too much output")
	}
	return b.buf.Write(p)
}

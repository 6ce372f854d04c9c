// Command page tests the page at admin.listen in a real browser. It starts the
// larder binary as three nodes, one under load, its peer, and one that nobody
// uses, with a registry in front, and has page.test.js look at them in headless
// Chromium. Names and errors that the nodes are given hold markup: none of it
// may be taken for any.
//
// It needs chromium and node, which `make deps` installs, and playwright-core,
// which test/tools/install.sh does; `make page-test` runs all of it. All
// traffic stays on loopback.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "page:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	larder := flag.String("larder", "bin/larder", "the larder binary")
	modules := flag.String("modules", "", "directory with node_modules in it")
	script := flag.String("script", "test/page/page.test.js", "what to run with node")
	keep := flag.Bool("keep", false, "keep the screenshots and logs, and say where; a failed run does so anyway")
	stay := flag.Bool("stay", false, "run no test; serve until interrupted, to look at the page by hand")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "larder-page-")
	if err != nil {
		return err
	}
	defer func() {
		if err == nil && !*keep {
			err = os.RemoveAll(dir)
			return
		}
		fmt.Println("screenshots and logs are in", dir)
	}()
	c, err := startCluster(ctx, *larder, dir)
	defer func() { err = errors.Join(err, c.close()) }()
	if err != nil {
		return err
	}
	if *stay {
		fmt.Printf("under load: %s\nits peer:   %s\nidle:       %s\n", c.busy.admin, c.peer.admin, c.idle.admin)
		<-ctx.Done()
		return nil
	}
	return c.look(ctx, *script, *modules)
}

// look runs the browser's part of the test.
func (c *cluster) look(ctx context.Context, script, modules string) error {
	control := &http.Server{Handler: c.control(ctx), ReadHeaderTimeout: time.Second}
	listener, err := listenLoopback()
	if err != nil {
		return err
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = control.Serve(listener) }) // ends with Close alone
	defer serving.Wait()
	defer control.Close() // its only client is gone

	shots := filepath.Join(c.dir, "shots")
	if err := os.Mkdir(shots, 0o755); err != nil {
		return err
	}
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		return fmt.Errorf("%w (make deps installs it)", err)
	}
	cmd := exec.CommandContext(ctx, "node", script)
	cmd.Env = append(os.Environ(), "BUSY="+c.busy.admin, "PEER="+c.peer.admin, "IDLE="+c.idle.admin,
		"CONTROL=http://"+listener.Addr().String(), "SHOTS="+shots, "CHROMIUM="+chromium, "NODE_PATH="+filepath.Join(modules, "node_modules"))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", script, err)
	}
	return nil
}

// control lets the script say what happens next.
func (c *cluster) control(ctx context.Context) http.Handler {
	mux := http.NewServeMux()
	answer := func(path string, do func() error) {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, _ *http.Request) {
			if err := do(); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
			}
		})
	}
	answer("/stop-load", c.stopLoad)
	answer("/stop-idle", c.idle.stop)
	answer("/start-idle", func() error { return c.idle.start(ctx) })
	answer("/pull-long-tag", func() error { return c.pullLongTag(ctx) })
	answer("/pull-from-nowhere", func() error { return c.pullFromNowhere(ctx) })
	return mux
}

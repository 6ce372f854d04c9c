package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a server under test: a child of this program.
type process struct {
	cmd  *exec.Cmd
	log  string // path of what it printed
	done chan error
}

func start(ctx context.Context, dir, name string, args ...string) (*process, error) {
	p := &process{log: filepath.Join(dir, filepath.Base(name)+".log"), done: make(chan error, 1)}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close() // the child has its own
	p.cmd = exec.CommandContext(ctx, name, args...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = 30 * time.Second
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w (make deps installs it)", name, err)
	}
	go func() { p.done <- p.cmd.Wait() }()
	return p, nil
}

// stop ends the process and waits for it.
func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case err := <-p.done:
		p.done <- err
		return nil // how it ended is in its log
	case <-time.After(30 * time.Second):
		return errors.Join(fmt.Errorf("%s does not stop", p.cmd.Path), p.cmd.Process.Kill())
	}
}

// await returns once a URL answers with 200.
func (p *process) await(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		code, err := status(ctx, url)
		if code == http.StatusOK {
			return nil
		}
		select {
		case ended := <-p.done:
			p.done <- ended
			return fmt.Errorf("%s ended: %w\n%s", p.cmd.Path, cmp.Or(ended, errors.New("status 0")), p.output())
		case <-ctx.Done():
			return fmt.Errorf("%s answers %s with %d: %w\n%s", p.cmd.Path, url, code, cmp.Or(err, ctx.Err()), p.output())
		case <-tick.C:
		}
	}
}

func status(ctx context.Context, url string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

func (p *process) output() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// peakMemory is the largest resident set so far, in bytes.
func (p *process) peakMemory() (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
			return kib * 1024, err
		}
	}
	return 0, errors.New("no VmHWM in /proc")
}

// cpuTime is what the process and its children have used so far, in seconds.
// Unlike elapsed time it does not depend on what else the machine is doing.
func (p *process) cpuTime() (float64, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	pid, ticks := strconv.Itoa(p.cmd.Process.Pid), 0.0
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // ended meanwhile
		}
		// pid (name, which may hold anything) state ppid ... utime stime: proc(5)
		_, rest, _ := strings.Cut(string(b[max(0, strings.LastIndex(string(b), ")")):]), " ")
		fields := strings.Fields(rest)
		if len(fields) < 13 || fields[1] != pid && name != "/proc/"+pid+"/stat" {
			continue
		}
		user, err1 := strconv.ParseFloat(fields[11], 64)
		system, err2 := strconv.ParseFloat(fields[12], 64)
		if err := errors.Join(err1, err2); err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		ticks += user + system
	}
	const ticksPerSecond = 100 // of every Linux there is
	return ticks / ticksPerSecond, nil
}

// freeAddr is a port of 127.0.0.1 that was free a moment ago.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// agent is a running `larder agent`.
type agent struct {
	server // its proxy
	admin  string
}

// registryName is the registry as the images of the benchmark name it.
const registryName = "registry.test"

// startAgent runs an agent with an empty cache that knows one upstream.
func (b *bench) startAgent(ctx context.Context, upstream string) (*agent, error) {
	dir, err := os.MkdirTemp(b.dir, "agent-")
	if err != nil {
		return nil, err
	}
	a := &agent{}
	if a.addr, err = freeAddr(); err != nil {
		return nil, err
	}
	if a.admin, err = freeAddr(); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "larder.toml")
	text := fmt.Sprintf("[[registry]]\nhost = %q\nupstreams = [%q]\n", registryName, upstream)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	a.process, err = start(ctx, dir, b.larder, "agent", "--config", config,
		"--proxy.listen", a.addr, "--admin.listen", a.admin,
		"--cache.dir", filepath.Join(dir, "cache"), "--cache.max_bytes", "30GiB", "--cache.min_free", "1GiB",
		"--peer.enabled=false")
	if err != nil {
		return nil, err
	}
	b.children = append(b.children, a.process)
	return a, a.await(ctx, "http://"+a.admin+"/readyz")
}

const nginxConf = `daemon off;
%s
pid %[2]s/nginx.pid;
error_log %[2]s/nginx-error.log warn;
worker_processes auto;
events { worker_connections 1024; }
http {
	access_log off;
	sendfile on;
	tcp_nopush on;
	keepalive_requests 1000000000;
	default_type application/octet-stream;
	client_body_temp_path %[2]s/t1;
	proxy_temp_path %[2]s/t2;
	fastcgi_temp_path %[2]s/t3;
	uwsgi_temp_path %[2]s/t4;
	scgi_temp_path %[2]s/t5;
	server { listen %[3]s; root %[2]s/root; }
}
`

// server is anything else that serves.
type server struct {
	*process
	addr string
}

// startNginx serves the files below the returned root.
func (b *bench) startNginx(ctx context.Context) (s server, root string, err error) {
	dir, err := os.MkdirTemp(b.dir, "nginx-")
	if err != nil {
		return s, "", err
	}
	if s.addr, err = freeAddr(); err != nil {
		return s, "", err
	}
	user := ""
	if os.Getuid() == 0 {
		user = "user root;" // or its workers could not enter the directory
	}
	conf := filepath.Join(dir, "nginx.conf")
	root = filepath.Join(dir, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return s, "", err
	}
	if err := os.WriteFile(filepath.Join(root, "up"), []byte("up\n"), 0o644); err != nil {
		return s, "", err
	}
	if err := os.WriteFile(conf, fmt.Appendf(nil, nginxConf, user, dir, s.addr), 0o644); err != nil {
		return s, "", err
	}
	if s.process, err = start(ctx, dir, b.nginx, "-c", conf, "-p", dir); err != nil {
		return s, "", err
	}
	b.children = append(b.children, s.process)
	return s, root, s.await(ctx, "http://"+s.addr+"/up")
}

const registryConf = `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %q}}
http: {addr: %q}
`

func (b *bench) startRegistry(ctx context.Context) (s server, err error) {
	dir, err := os.MkdirTemp(b.dir, "registry-")
	if err != nil {
		return s, err
	}
	if s.addr, err = freeAddr(); err != nil {
		return s, err
	}
	conf := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(conf, fmt.Appendf(nil, registryConf, filepath.Join(dir, "data"), s.addr), 0o644); err != nil {
		return s, err
	}
	if s.process, err = start(ctx, dir, b.registry, "serve", conf); err != nil {
		return s, err
	}
	b.children = append(b.children, s.process)
	return s, s.await(ctx, "http://"+s.addr+"/v2/")
}

// cpuProfile writes a CPU profile of the agent under a load to the directory asked
// for, if one was.
func (b *bench) cpuProfile(ctx context.Context, a *agent, name string, work func(context.Context) error) error {
	if b.profile == "" {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	saved := make(chan error, 1)
	go func() {
		saved <- save(ctx, "http://"+a.admin+"/debug/pprof/profile?seconds=5", filepath.Join(b.profile, name+".pprof"))
	}()
	for {
		select {
		case err := <-saved:
			return err
		default:
		}
		if err := work(ctx); err != nil {
			return errors.Join(err, <-saved)
		}
	}
}

func save(ctx context.Context, url, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, resp.Body)
	return errors.Join(err, f.Close())
}

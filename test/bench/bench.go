package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/larder-cache/larder/test/registrytest"
	"github.com/larder-cache/larder/test/runtimetest"
)

// bench is one run of the program.
type bench struct {
	settings
	dir      string // ours alone, in settings.dir
	upstream *registrytest.Server
	children []*process
	seed     uint64
	table    table
}

func newBench(ctx context.Context, s settings) (_ *bench, err error) {
	b := &bench{settings: s}
	if b.dir, err = os.MkdirTemp(s.dir, "larder-bench-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			b.close()
		}
	}()
	if b.profile != "" {
		if err := os.MkdirAll(b.profile, 0o755); err != nil {
			return nil, err
		}
	}
	if b.larder == "" {
		b.larder = filepath.Join(b.dir, "larder")
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", b.larder, "github.com/larder-cache/larder/cmd/larder")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build larder: %w\n%s", err, out)
		}
	}
	b.upstream, err = registrytest.New(registrytest.Options{})
	return b, err
}

func (b *bench) close() {
	for _, p := range b.children {
		b.end(p)
	}
	if b.upstream != nil {
		b.upstream.Close()
	}
	if b.keep {
		fmt.Fprintln(os.Stderr, "left", b.dir)
	} else if err := os.RemoveAll(b.dir); err != nil {
		fmt.Fprintln(os.Stderr, "bench: clean up:", err)
	}
}

// end stops a server. One that does not stop is worth a line, not the results.
func (b *bench) end(p *process) {
	if err := p.stop(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
}

// scale shrinks sizes and times for a quick run.
func (b *bench) scale(n int64) int64 {
	if b.quick {
		return n / 10
	}
	return n
}

const repository = "bench/app"

// image makes a new one, with one layer, and puts it into the upstream registry.
func (b *bench) image(layer int64) *registrytest.Image {
	b.seed++
	img := registrytest.OCIImage(registrytest.ImageSpec{Seed: b.seed, Layers: []int64{layer}})
	b.upstream.Put(repository, img, fmt.Sprintf("v%d", b.seed))
	return img
}

// path is the same for all servers; only the agent looks at the query.
func path(kind, reference string) string {
	return "/v2/" + repository + "/" + kind + "/" + reference + "?ns=" + registryName
}

// export writes an image as files for nginx.
func export(root string, img *registrytest.Image) error {
	write := func(kind string, d ocispec.Descriptor, c registrytest.Content) error {
		p := filepath.Join(root, "v2", repository, kind, d.Digest.String())
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		f, err := os.Create(p)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, io.NewSectionReader(c, 0, c.Size()))
		return errors.Join(err, f.Close())
	}
	for d, c := range img.Blobs {
		if err := write("blobs", ocispec.Descriptor{Digest: d}, c); err != nil {
			return err
		}
	}
	for _, m := range img.Manifests {
		if err := write("manifests", m, registrytest.Bytes(m.Data)); err != nil {
			return err
		}
	}
	return nil
}

// push copies an image from the upstream registry to another.
func (b *bench) push(ctx context.Context, addr string, img *registrytest.Image) error {
	from, err := name.NewDigest(b.upstream.Ref(repository, img.Digest.String()))
	if err != nil {
		return err
	}
	to, err := name.NewDigest(addr + "/" + repository + "@" + img.Digest.String())
	if err != nil {
		return err
	}
	i, err := remote.Image(from, remote.WithContext(ctx))
	if err != nil {
		return err
	}
	return remote.Write(to, i, remote.WithContext(ctx))
}

// warm brings a path into the agent's cache and waits until it is committed:
// from then on it comes without the upstream.
func (b *bench) warm(ctx context.Context, a *agent, path string) error {
	if err := readAll(ctx, a.addr, path); err != nil {
		return err
	}
	return a.await(ctx, "http://"+a.addr+path)
}

// result is one turn of a contender.
type result struct {
	perSecond float64
	cpu       float64 // processor seconds of the server for each unit
}

// contender has its turn.
type contender func(context.Context) (result, error)

// measured makes a contender of a load on a server, in the units that count
// says.
func measured(s server, put func(context.Context) (load, error), count func(load) float64) contender {
	return func(ctx context.Context) (result, error) {
		before, err := s.cpuTime()
		if err != nil {
			return result{}, err
		}
		l, err := put(ctx)
		if err != nil {
			return result{}, err
		}
		after, err := s.cpuTime()
		return result{perSecond: count(l) / l.took.Seconds(), cpu: (after - before) / count(l)}, err
	}
}

// turns runs each contender once per round, one after the other, and returns the
// medians of each.
func (b *bench) turns(ctx context.Context, contenders ...contender) ([]result, error) {
	perSecond, cpu := make([][]float64, len(contenders)), make([][]float64, len(contenders))
	for range b.rounds {
		for i, contender := range contenders {
			r, err := contender(ctx)
			if err != nil {
				return nil, err
			}
			perSecond[i], cpu[i] = append(perSecond[i], r.perSecond), append(cpu[i], r.cpu)
		}
	}
	medians := make([]result, len(contenders))
	for i := range medians {
		medians[i] = result{median(perSecond[i]), median(cpu[i])}
	}
	fmt.Fprintf(os.Stderr, "  %.4g\n", perSecond)
	return medians, nil
}

// throughput compares the warm hit of a large blob with nginx.
func (b *bench) throughput(ctx context.Context) error {
	img := b.image(b.scale(500e6))
	p := path("blobs", img.Layers[0].Digest.String())
	a, err := b.startAgent(ctx, b.upstream.URL())
	if err != nil {
		return err
	}
	defer b.end(a.process)
	nginx, root, err := b.startNginx(ctx)
	if err != nil {
		return err
	}
	if err := export(root, img); err != nil {
		return err
	}
	for _, addr := range []string{a.addr, a.addr, nginx.addr} {
		if err := readAll(ctx, addr, p); err != nil {
			return err
		}
	}
	for _, conns := range []int{1, 4} {
		read := func(s server) contender {
			return measured(s, func(ctx context.Context) (load, error) {
				return hammer(ctx, s.addr, p, conns, 8/conns, 0)
			}, func(l load) float64 { return float64(l.bytes) })
		}
		v, err := b.turns(ctx, read(a.server), read(nginx))
		if err != nil {
			return err
		}
		title := fmt.Sprintf("warm 500 MB blob, %d readers", conns)
		b.table.compare(title, v[0].perSecond, "nginx", v[1].perSecond, goal{atLeast: 0.9}, showRate)
		b.table.compare(title+", processor time per GB", v[0].cpu*1e9, "nginx", v[1].cpu*1e9, goal{}, showMillis)
	}
	return b.cpuProfile(ctx, a, "throughput", func(ctx context.Context) error { return readAll(ctx, a.addr, p) })
}

// requests compares how many small answers a second there are.
func (b *bench) requests(ctx context.Context) error {
	img := b.image(4 << 10)
	t, err := b.trio(ctx, img)
	if err != nil {
		return err
	}
	defer b.end(t.agent.process)
	const conns = 32
	for _, what := range []struct{ kind, name, path string }{
		{"blob", "4 KiB blob", path("blobs", img.Layers[0].Digest.String())},
		{"manifest", "manifest", path("manifests", img.Digest.String())},
	} {
		ask := func(s server) contender {
			return measured(s, func(ctx context.Context) (load, error) {
				return hammer(ctx, s.addr, what.path, conns, 0, time.Duration(b.scale(int64(3*time.Second))))
			}, func(l load) float64 { return float64(l.requests) })
		}
		v, err := b.turns(ctx, ask(t.agent.server), ask(t.nginx), ask(t.registry))
		if err != nil {
			return err
		}
		title := fmt.Sprintf("%s, %d connections", what.name, conns)
		for i, other := range []string{"nginx", "docker-registry"} {
			b.table.compare(title, v[0].perSecond, other, v[i+1].perSecond, goal{}, showRequests)
			b.table.compare(title+", processor time", v[0].cpu, other, v[i+1].cpu, goal{}, showMicros)
		}
		err = b.cpuProfile(ctx, t.agent, what.kind+"-requests", func(ctx context.Context) error {
			_, err := hammer(ctx, t.agent.addr, what.path, conns, 0, time.Second)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// trio is an agent, nginx and docker-registry that all have one image.
type trio struct {
	agent           *agent
	nginx, registry server
}

func (b *bench) trio(ctx context.Context, img *registrytest.Image) (t trio, err error) {
	if t.agent, err = b.startAgent(ctx, b.upstream.URL()); err != nil {
		return t, err
	}
	var root string
	if t.nginx, root, err = b.startNginx(ctx); err != nil {
		return t, err
	}
	if t.registry, err = b.startRegistry(ctx); err != nil {
		return t, err
	}
	if err := errors.Join(export(root, img), b.push(ctx, t.registry.addr, img)); err != nil {
		return t, err
	}
	for _, p := range []string{path("blobs", img.Layers[0].Digest.String()), path("manifests", img.Digest.String())} {
		if err := b.warm(ctx, t.agent, p); err != nil {
			return t, err
		}
	}
	return t, nil
}

// firstByte compares how long the first byte takes, one request at a time: warm,
// and cold with what the detour adds to asking the registry itself.
func (b *bench) firstByte(ctx context.Context) error {
	img := b.image(4 << 10)
	t, err := b.trio(ctx, img)
	if err != nil {
		return err
	}
	defer b.end(t.agent.process)
	p := path("blobs", img.Layers[0].Digest.String())
	n := int(b.scale(5000))
	var larder, nginx, registry []float64
	for range b.rounds {
		for _, c := range []struct {
			addr string
			to   *[]float64
		}{{t.agent.addr, &larder}, {t.nginx.addr, &nginx}, {t.registry.addr, &registry}} {
			l, err := hammer(ctx, c.addr, p, 1, n, 0)
			if err != nil {
				return err
			}
			*c.to = append(*c.to, l.firstBytes...)
		}
	}
	b.firstByteRows("first byte, warm", larder, "nginx", nginx)
	b.firstByteRows("first byte, warm", larder, "docker-registry", registry)
	return b.coldFirstByte(ctx, t.agent)
}

func (b *bench) firstByteRows(what string, larder []float64, other string, values []float64) {
	for _, q := range []struct {
		name string
		q    float64
	}{{"p50", 0.5}, {"p99", 0.99}} {
		b.table.compare(what+", "+q.name, quantile(larder, q.q), other, quantile(values, q.q), goal{}, showMicros)
	}
}

// coldFirstByte asks for blobs that nobody has asked for, each once.
func (b *bench) coldFirstByte(ctx context.Context, a *agent) error {
	var larder, direct []float64
	for range b.scale(500) {
		for _, c := range []struct {
			addr string
			to   *[]float64
		}{{a.addr, &larder}, {b.upstream.Host(), &direct}} {
			first, err := b.coldRequest(ctx, c.addr)
			if err != nil {
				return err
			}
			*c.to = append(*c.to, first...)
		}
	}
	b.firstByteRows("first byte, cold 1 MiB", larder, "direct", direct)
	return b.cpuProfile(ctx, a, "cold-first-byte", func(ctx context.Context) error {
		_, err := b.coldRequest(ctx, a.addr)
		return err
	})
}

// coldRequest asks a server for a blob that is new to everybody.
func (b *bench) coldRequest(ctx context.Context, addr string) (firstByte []float64, err error) {
	b.seed++
	d := b.upstream.PutBlob(repository, registrytest.Random(b.seed, 1<<20))
	l, err := hammer(ctx, addr, path("blobs", d.Digest.String()), 1, 1, 0)
	return l.firstBytes, err
}

// cold compares pulls through an agent that has nothing yet with pulls straight
// from the registry, by containerd's own code, which hashes and stores.
func (b *bench) cold(ctx context.Context) error {
	for _, c := range []struct {
		name            string
		perConn, uplink int64
		size            int64
		goal            goal
	}{
		{"cold pull, 500 MB, no limit", 0, 0, 500e6, goal{atMost: 1.05}},
		{"cold pull, 500 MB, registry at 2.5 Gbit/s", 0, 312e6, 500e6, goal{atMost: 1.05}},
		{"cold pull, 500 MB, registry at 1 Gbit/s", 0, 125e6, 500e6, goal{atMost: 1.05}},
		{"cold pull, 200 MB, 20 MB/s a connection", 20e6, 0, 200e6, goal{atMost: 0.4}},
	} {
		b.upstream.SetRate(c.perConn, c.uplink)
		err := b.coldPulls(ctx, c.name, b.scale(c.size), c.goal)
		b.upstream.SetRate(0, 0)
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) coldPulls(ctx context.Context, what string, size int64, g goal) error {
	a, err := b.startAgent(ctx, b.upstream.URL())
	if err != nil {
		return err
	}
	defer b.end(a.process)
	through := fmt.Sprintf("server = %q\n\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", b.upstream.URL(), "http://"+a.addr)
	straight := fmt.Sprintf("server = %q\n", b.upstream.URL())
	// Registry and client are this process: without a limit, and with few
	// processors, the ratio is how much work there is rather than how long it waits.
	pull := func(hosts string) contender {
		return func(ctx context.Context) (result, error) {
			before, err := b.cpuTime(a)
			if err != nil {
				return result{}, err
			}
			seconds, err := b.coldPull(ctx, size, hosts)
			if err != nil {
				return result{}, err
			}
			after, err := b.cpuTime(a)
			return result{perSecond: 1 / seconds, cpu: after - before}, err
		}
	}
	v, err := b.turns(ctx, pull(through), pull(straight))
	if err != nil {
		return err
	}
	b.table.compare(what, 1/v[0].perSecond, "direct", 1/v[1].perSecond, g, showSeconds)
	b.table.compare(what+", processor time of all", v[0].cpu, "direct", v[1].cpu, goal{}, showSeconds)
	return b.cpuProfile(ctx, a, fmt.Sprintf("cold-%d", len(b.table.rows)), func(ctx context.Context) error {
		_, err := b.coldPull(ctx, size, through)
		return err
	})
}

// cpuTime is what an agent, and this process with the registry and the client in
// it, have used so far, in seconds.
func (b *bench) cpuTime(a *agent) (float64, error) {
	var own unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &own); err != nil {
		return 0, err
	}
	agents, err := a.cpuTime()
	return agents + float64(own.Utime.Nano()+own.Stime.Nano())/1e9, err
}

// coldPull pulls a new image into a new store with one hosts.toml. What earlier
// pulls left to be written is written first.
func (b *bench) coldPull(ctx context.Context, size int64, hosts string) (seconds float64, err error) {
	b.image(size)
	dir, err := os.MkdirTemp(b.dir, "pull-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	host := filepath.Join(dir, "certs.d", registryName)
	if err := os.MkdirAll(host, 0o755); err != nil {
		return 0, err
	}
	if err := os.WriteFile(filepath.Join(host, "hosts.toml"), []byte(hosts), 0o644); err != nil {
		return 0, err
	}
	c := &runtimetest.Containerd{CertsDir: filepath.Dir(host), Root: filepath.Join(dir, "content")}
	unix.Sync()
	start := time.Now()
	_, err = c.Pull(ctx, fmt.Sprintf("%s/%s:v%d", registryName, repository, b.seed), nil)
	return time.Since(start).Seconds(), err
}

// memory is the peak of the agent's resident set while one large blob passes
// through it to many readers at once.
func (b *bench) memory(ctx context.Context) error {
	const readers = 8
	b.seed++
	d := b.upstream.PutBlob(repository, registrytest.Random(b.seed, b.scale(5<<30)))
	a, err := b.startAgent(ctx, b.upstream.URL())
	if err != nil {
		return err
	}
	defer b.end(a.process)
	idle, err := a.peakMemory()
	if err != nil {
		return err
	}
	if _, err := hammer(ctx, a.addr, path("blobs", d.Digest.String()), readers, 1, 0); err != nil {
		return err
	}
	peak, err := a.peakMemory()
	if err != nil {
		return err
	}
	b.table.single("resident memory, idle", idle, goal{}, showMiB)
	b.table.single(fmt.Sprintf("peak memory, 5 GiB to %d readers", readers), peak, goal{atMost: 96 << 20}, showMiB)
	return nil
}

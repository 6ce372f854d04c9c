package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// registryKind is one of the registries that images are pulled from.
type registryKind struct {
	name string
	tls  bool
	bin  func(*testing.T) string
	dial dialer // how the tests reach it; nil = on loopback
}

var (
	docker28 = registryKind{name: "docker-registry-2.8", bin: func(t *testing.T) string { return needTool(t, "docker-registry") }}
	distV3   = registryKind{name: "distribution-3-http", bin: func(t *testing.T) string { return needBuilt(t, "registry") }}
	distTLS  = registryKind{name: "distribution-3-tls", tls: true, bin: func(t *testing.T) string { return needBuilt(t, "registry") }}
)

var registryKinds = []registryKind{docker28, distV3, distTLS}

// registry is a running registry. Its port and content survive stop and start.
type registry struct {
	t      *testing.T
	kind   registryKind
	addr   string // 127.0.0.1:port
	caFile string // "" without TLS
	config string
	// greets is the status of GET /v2/ without credentials.
	greets int
	// pusher is the Authorization of ann for a repository, where one is needed.
	pusher func(repository string) string
	proc   *process
	// earlier holds the logs of processes that were stopped.
	earlier []byte
}

func startRegistry(t *testing.T, kind registryKind) *registry {
	t.Helper()
	dir := tempDir(t)
	r := &registry{t: t, kind: kind, greets: http.StatusOK, addr: net.JoinHostPort("127.0.0.1", strconv.Itoa(freePort(t)))}
	tlsConfig := ""
	if kind.tls {
		ca := newAuthority(t, dir)
		cert, key := ca.issue(dir, "tls", server("registry", "127.0.0.1"))
		r.caFile = ca.file
		tlsConfig = fmt.Sprintf("  tls:\n    certificate: %s\n    key: %s\n", cert, key)
	}
	r.config = writeFile(t, filepath.Join(dir, "config.yml"), fmt.Sprintf(`version: 0.1
log:
  level: warn
storage:
  filesystem:
    rootdirectory: %s
http:
  addr: %s
%s`, filepath.Join(dir, "storage"), r.addr, tlsConfig))
	r.start()
	return r
}

// startGuarded runs a registry that asks for credentials as auth says, the section
// of its configuration, and lets in pusher.
func startGuarded(t *testing.T, kind registryKind, addr, auth string, pusher func(repository string) string) *registry {
	t.Helper()
	dir := tempDir(t)
	r := &registry{t: t, kind: kind, greets: http.StatusUnauthorized, pusher: pusher, addr: addr}
	r.config = writeFile(t, filepath.Join(dir, "config.yml"), fmt.Sprintf(`version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: %s}}
http: {addr: %s}
auth: %s
`, filepath.Join(dir, "storage"), r.addr, auth))
	r.start()
	return r
}

// on is a registry whose failures belong to a subtest.
func (r registry) on(t *testing.T) *registry {
	r.t = t
	return &r
}

func (r *registry) start() {
	r.t.Helper()
	cmd := exec.Command(r.kind.bin(r.t), "serve", r.config)
	cmd.Env = append(cmd.Environ(), "OTEL_TRACES_EXPORTER=none")
	r.proc = startProcess(r.t, r.kind.name, cmd)
	eventually(r.t, 30*time.Second, "registry answers", func() error { return errors.Join(r.proc.dead(), r.ping("ready")) })
}

func (r *registry) stop() {
	r.t.Helper()
	r.proc.kill() // a registry has nothing to clean up, and distribution waits for idle connections
	r.earlier = append(r.earlier, r.proc.output()...)
}

func (r *registry) url() string {
	if r.kind.tls {
		return "https://" + r.addr
	}
	return "http://" + r.addr
}

func (r *registry) client() *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: r.transport()}
}

func (r *registry) transport() http.RoundTripper {
	tr := &http.Transport{DisableKeepAlives: true, DialContext: r.kind.dial}
	if r.caFile != "" {
		tr.TLSClientConfig = &tls.Config{RootCAs: certPool(r.t, r.caFile)}
	}
	return tr
}

func (r *registry) ping(mark string) error {
	resp, err := r.client().Get(r.url() + "/v2/?mark=" + mark)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != r.greets {
		return fmt.Errorf("GET /v2/: %s", resp.Status)
	}
	return nil
}

// access is one line of a registry's own access log.
type access struct {
	method, path, agent string
	status              int
	bytes               int64 // of the body
}

func (a access) String() string {
	return fmt.Sprintf("%s %s %d %s", a.method, a.path, a.status, a.agent)
}

// accessList is requests in the order in which a registry answered them.
type accessList []access

// String shows the first few, one in a line.
func (l accessList) String() string {
	const shown = 8
	var b strings.Builder
	fmt.Fprintf(&b, "%d requests", len(l))
	for i, a := range l {
		if i == shown {
			b.WriteString("\n\t...")
			break
		}
		fmt.Fprintf(&b, "\n\t%s", a)
	}
	return b.String()
}

// accessLine matches the combined log format that both registries print.
var accessLine = regexp.MustCompile(`(?m)^\S+ - \S+ \[[^\]]+\] "([A-Z]+) (\S+) HTTP/[0-9.]+" (\d+) (\d+) "[^"]*" "([^"]*)"`)

// accesses is everything this registry was asked for so far. It first asks for
// something itself and waits to see that in the log, so that whatever was
// answered before this call is in the result.
func (r *registry) accesses() accessList {
	r.t.Helper()
	if !r.proc.alive() {
		return parseAccesses(r.earlier)
	}
	mark := strconv.FormatInt(time.Now().UnixNano(), 36)
	if err := r.ping(mark); err != nil {
		r.t.Fatalf("registry: %v", err)
	}
	var log []byte
	eventually(r.t, 10*time.Second, "access log is flushed", func() error {
		log = append(append([]byte(nil), r.earlier...), r.proc.output()...)
		if !strings.Contains(string(log), "mark="+mark) {
			return errors.New("own request is not in the log")
		}
		return nil
	})
	return parseAccesses(log)
}

func parseAccesses(log []byte) accessList {
	var all accessList
	for _, m := range accessLine.FindAllSubmatch(log, -1) {
		status, _ := strconv.Atoi(string(m[3])) // the pattern matches digits only
		bytes, _ := strconv.ParseInt(string(m[4]), 10, 64)
		all = append(all, access{method: string(m[1]), path: string(m[2]), status: status, bytes: bytes, agent: string(m[5])})
	}
	return all
}

// during is what the registry was asked for while do ran.
func (r *registry) during(do func()) accessList {
	r.t.Helper()
	before := len(r.accesses())
	do()
	return r.accesses()[before:]
}

// blobReads are the requests that moved, or asked about, a blob's bytes.
func blobReads(all accessList) accessList {
	var blobs accessList
	for _, a := range all {
		if strings.Contains(a.path, "/blobs/") && (a.method == http.MethodGet || a.method == http.MethodHead) {
			blobs = append(blobs, a)
		}
	}
	return blobs
}

// byRuntime are the requests a runtime sent itself, without Larder between.
func byRuntime(all accessList) accessList {
	var direct accessList
	for _, a := range all {
		for _, agent := range []string{"containerd/", "containers/", "skopeo/", "libpod/"} {
			if strings.HasPrefix(a.agent, agent) {
				direct = append(direct, a)
				break
			}
		}
	}
	return direct
}

// wantThroughAgent fails if a runtime asked the registry itself.
func wantThroughAgent(t *testing.T, what string, seen accessList) {
	t.Helper()
	if direct := byRuntime(seen); len(direct) > 0 {
		t.Errorf("%s: went past the agent: %v", what, direct)
	}
}

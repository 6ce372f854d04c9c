package hostsconfig

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func testCA(tb testing.TB) []byte {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(tb, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour), IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(tb, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

var errCrash = errors.New("crash")

// crashAt makes everything from the n-th change on fail, as if the process had
// died there: not even cleaning up works.
func crashAt(n int) (disk, *int) {
	count := 0
	return disk{unsynced: true, step: func(string, string) error {
		if count++; count > n {
			return errCrash
		}
		return nil
	}}, &count
}

// crashTree has every kind of file we touch.
var crashTree = tree{
	"certs.d/docker.io/hosts.toml":            "# mine\n[host.\"https://m.x\"]\n",
	"certs.d/reg.x/ca.crt":                    "not really",
	"certs.d/link.x/hosts.toml":               "-> ../../shared.toml",
	"certs.d/bad.x/hosts.toml":                "bad",
	"certs.d/stale.x/hosts.toml":              "[host.\"http://127.0.0.1:5050\"]\n",
	"shared.toml":                             "server = \"https://s.x\"\n",
	"containers/registries.conf":              "unqualified-search-registries = [\"docker.io\"]\n",
	"containers/registries.conf.d/50-a.conf":  "[[registry]]\nlocation = \"quay.io\"\n[[registry.mirror]]\nlocation = \"m.x\"\n",
	"containers/registries.conf.d/README.txt": "hello",
}

func crashOptions(dir string) Options {
	return Options{
		Containerd: filepath.Join(dir, "certs.d"), CRIO: filepath.Join(dir, "containers/registries.conf.d"),
		ColonLink: true, ProxyAddr: testProxy,
	}
}

// TestCrashAnywhere dies before every single change that Apply and Remove
// make, then checks that the next process can go either way (I1).
func TestCrashAnywhere(t *testing.T) {
	trees := map[string]tree{
		"full": crashTree,
		// Nothing there at all: the directories themselves are ours.
		"empty": {"shared.toml": ""},
	}
	for name, have := range trees {
		t.Run(name, func(t *testing.T) {
			steps := countSteps(t, have)
			stride := 1
			if testing.Short() {
				stride = 5
			}
			for n := 0; n < steps; n += stride {
				crashOnce(t, have, n)
			}
		})
	}
}

func countSteps(t *testing.T, have tree) int {
	dir := t.TempDir()
	have.write(t, dir)
	h := newHosts(t, crashOptions(dir))
	d, count := crashAt(1 << 30)
	h.disk = d
	apply(t, h)
	remove(t, h)
	if *count < 20 {
		t.Fatalf("only %d steps seen", *count)
	}
	return *count
}

func crashOnce(t *testing.T, have tree, n int) {
	t.Helper()
	for _, next := range []string{"remove", "apply", "apply on another port"} {
		dir := t.TempDir()
		have.write(t, dir)
		before := snapshot(t, dir)
		h := newHosts(t, crashOptions(dir))
		h.disk, _ = crashAt(n)
		if _, err := h.Apply(t.Context()); err == nil {
			_, _ = h.Remove(t.Context()) // dies somewhere inside
		}
		opts := crashOptions(dir)
		if next == "apply on another port" {
			opts.ProxyAddr = "127.0.0.1:6060"
		}
		h = newHosts(t, opts)
		h.disk.unsynced = true
		if next != "remove" {
			apply(t, h)
			want := "http://" + opts.ProxyAddr + "/v2 pull,resolve"
			if got := containerdHosts(t, opts.Containerd, "docker.io"); got[0] != want {
				t.Errorf("step %d, then %s: first host is %s", n, next, got[0])
			}
		}
		remove(t, h)
		wantSame(t, fmt.Sprintf("crash before step %d, then %s: not restored", n, next), before, snapshot(t, dir))
		if t.Failed() {
			t.FailNow()
		}
	}
}

// TestCrashOnUpgrade dies anywhere while one configuration replaces another:
// a new port, other registries, no link.
func TestCrashOnUpgrade(t *testing.T) {
	upgrade := func(t *testing.T, n int) (done bool) {
		dir := t.TempDir()
		crashTree.write(t, dir)
		before := snapshot(t, dir)
		opts := crashOptions(dir)
		h := newHosts(t, opts)
		h.disk.unsynced = true
		apply(t, h)
		next := opts
		next.ProxyAddr, next.ColonLink, next.Registries = "127.0.0.1:6060", false, []string{"docker.io", "new.x:5000"}
		h = newHosts(t, next)
		h.disk, _ = crashAt(n)
		_, err := h.Apply(t.Context())
		h = newHosts(t, opts)
		h.disk.unsynced = true
		if n%2 == 0 {
			apply(t, h)
		}
		remove(t, h)
		wantSame(t, fmt.Sprintf("crash before step %d of the upgrade: not restored", n), before, snapshot(t, dir))
		return err == nil
	}
	stride := 1
	if testing.Short() {
		stride = 3
	}
	for n := 0; !upgrade(t, n); n += stride {
		if t.Failed() || n > 1000 {
			t.Fatalf("after %d steps", n)
		}
	}
}

// TestStepFails: one change that the disk refuses is reported, and costs the user nothing,
// though those after it are made.
func TestStepFails(t *testing.T) {
	stride := 1
	if testing.Short() {
		stride = 3
	}
	for n := 0; ; n += stride {
		dir := t.TempDir()
		crashTree.write(t, dir)
		before := snapshot(t, dir)
		h := newHosts(t, crashOptions(dir))
		count, failed := 0, ""
		h.disk = disk{unsynced: true, step: func(op, path string) error {
			if count++; count == n+1 {
				failed = op + " " + path
				return syscall.ENOSPC
			}
			return nil
		}}
		_, applied := h.Apply(t.Context())
		_, removed := h.Remove(t.Context())
		if failed == "" {
			return
		}
		if !errors.Is(errors.Join(applied, removed), syscall.ENOSPC) {
			t.Errorf("%s failed, and Apply said %v, Remove %v", failed, applied, removed)
		}
		remove(t, h)
		wantSame(t, failed+" failed: not restored", before, snapshot(t, dir))
		if t.Failed() {
			return
		}
	}
}

// childEnv makes the test binary apply and remove forever; see TestKill.
const childEnv = "LARDER_HOSTSCONFIG_CHILD"

func childMain() bool {
	dir := os.Getenv(childEnv)
	if dir == "" {
		return false
	}
	h, err := New(crashOptions(dir))
	for err == nil {
		if _, err = h.Apply(context.Background()); err == nil {
			_, err = h.Remove(context.Background())
		}
		fmt.Println("round") // tells the parent that the work has begun
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
	return true
}

// TestKill sends a real SIGKILL at arbitrary moments.
func TestKill(t *testing.T) {
	rounds := 40
	if testing.Short() {
		rounds = 4
	}
	for i := range rounds {
		dir := t.TempDir()
		crashTree.write(t, dir)
		before := snapshot(t, dir)
		killRound(t, dir, time.Duration(i*i)*137*time.Microsecond)
		h := newHosts(t, crashOptions(dir))
		if i%2 == 0 {
			apply(t, h)
		}
		remove(t, h)
		wantSame(t, "not restored after SIGKILL", before, snapshot(t, dir))
	}
}

func killRound(t *testing.T, dir string, after time.Duration) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Errorf("child: %v", err)
	}
	<-time.After(after)
	must(t, cmd.Process.Kill())
	if err := cmd.Wait(); err == nil {
		t.Error("child ended by itself")
	}
}

package credentials

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// program writes a shell script. Between a write and its close no other test's
// fork may copy the descriptor, or the kernel calls the program busy.
func program(t testing.TB, dir, name, body string) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	write(t, filepath.Join(dir, name), "#!/bin/sh\n"+body)
	if err := os.Chmod(filepath.Join(dir, name), 0o755); err != nil {
		t.Fatal(err)
	}
}

func write(t testing.TB, path, body string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
}

// runs counts the lines that programs appended to dir/runs.
func runs(t testing.TB, dir string) int {
	t.Helper()
	body, err := os.ReadFile(filepath.Join(dir, "runs"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Count(string(body), "\n")
}

func newKeychain(t testing.TB, o Options) *Keychain {
	t.Helper()
	k, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

// users names what was found: "ann:secret ann2:x", tokens as "<token>:x".
func users(list []authn.AuthConfig) string {
	var out []string
	for _, a := range list {
		switch {
		case a.IdentityToken != "":
			out = append(out, "<identity>:"+a.IdentityToken)
		case a.RegistryToken != "":
			out = append(out, "<registry>:"+a.RegistryToken)
		default:
			out = append(out, a.Username+":"+a.Password)
		}
	}
	return strings.Join(out, " ")
}

// find is Find that may not fail.
func find(t testing.TB, k *Keychain, r Request) string {
	t.Helper()
	list, err := k.Find(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return users(list)
}

func names(list ...string) Request { return Request{Names: list} }

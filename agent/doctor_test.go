package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/hostsconfig"
)

// TestDoctorInTheAgent holds that the agent finds what `larder doctor` finds in
// the files, once its own are in place.
func TestDoctorInTheAgent(t *testing.T) {
	c := testConfig(t)
	c.Hosts.Containerd, c.Hosts.CRIO = t.TempDir(), t.TempDir()
	t.Setenv("HOME", t.TempDir()) // of whoever started the agent, which is not CRI-O's
	if err := os.MkdirAll(filepath.Join(os.Getenv("HOME"), ".config/containers/registries.conf.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(c.Hosts.Containerd, "broken.example", "hosts.toml")
	if err := errors.Join(os.Mkdir(filepath.Dir(bad), 0o755), os.WriteFile(bad, []byte("no TOML"), 0o644)); err != nil {
		t.Fatal(err)
	}
	a := start(t, c)
	eventually(t, "examined", func() error {
		d := a.Status().Doctor
		found := slices.IndexFunc(d.Findings, func(f hostsconfig.Finding) bool { return f.ID == "containerd-hosts-unparsable" })
		if d.Checked.IsZero() || found < 0 {
			return fmt.Errorf("%+v", d)
		}
		return nil
	})
	for _, f := range a.Status().Doctor.Findings {
		if f.ID == "containerd-host-not-mirrored" || f.ID == "leftovers" {
			t.Errorf("the agent's own files are a finding: %+v", f)
		}
		if strings.HasPrefix(f.Where, os.Getenv("HOME")) {
			t.Errorf("the agent's home is a finding: %+v", f)
		}
	}
	first := a.Status().Doctor.Checked
	a.recent.record(proxy.Event{Kind: proxy.KindManifest, Registry: "docker.io", Repository: "app", Reference: "v1", UserAgent: "containerd/v1.7.27"})
	eventually(t, "examined again, with the version known", func() error {
		if now := a.Status().Doctor.Checked; !now.After(first) {
			return errors.New("not again")
		}
		return nil
	})
}

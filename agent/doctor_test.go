package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/hostsconfig"
)

// TestDoctorInTheAgent holds that the agent finds what `larder doctor` finds in
// the files, once its own are in place.
func TestDoctorInTheAgent(t *testing.T) {
	c := testConfig(t)
	c.Hosts.Containerd = t.TempDir()
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

package agent

import (
	"context"
	"os"
	"time"

	"github.com/larder-cache/larder/hostsconfig"
)

const (
	// doctorPatience is how long host files may take to be written at the start
	// before the node is looked at all the same.
	doctorPatience = 30 * time.Second
	// doctorEvery is for what somebody edits by hand; it reads some dozen files.
	doctorEvery = 10 * time.Minute
	// doctorLook is how often something is looked for that makes a new
	// examination worth while; it costs nothing.
	doctorLook = time.Second
)

// runDoctor examines the node's files once the host files are in place, and
// again every ten minutes and when another containerd has asked for something.
func (a *Agent) runDoctor(ctx context.Context) error {
	look := time.NewTicker(doctorLook)
	defer look.Stop()
	var checked time.Time
	var version string
	for {
		settled := a.hosts == nil || a.hostsInPlace() == nil || time.Since(a.started) > doctorPatience
		now := a.recent.containerdVersion()
		if settled && (time.Since(checked) > doctorEvery || now != version) {
			a.findings.Store(a.examine(now))
			checked, version = time.Now(), now
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// examine looks at the files of the node, as far as they can be seen from here.
func (a *Agent) examine(containerdVersion string) *DoctorStatus {
	h := a.config.Hosts
	findings := hostsconfig.Diagnose(hostsconfig.DoctorOptions{
		FS: os.DirFS("/"), Containerd: h.Containerd, CRIO: h.CRIO, Registries: h.Registries, ProxyAddr: a.ProxyAddr(),
		ColonLink: h.ContainerdColonLink, SeenOnly: true,
		Facts: hostsconfig.Facts{ContainerdVersion: containerdVersion, ProxyUp: true},
	})
	for i, f := range findings {
		if f.ID == "nothing-managed" {
			findings[i].Severity = hostsconfig.Note // somebody may have written the host files by hand
		}
	}
	return &DoctorStatus{Checked: time.Now(), Findings: append([]hostsconfig.Finding{}, findings...)}
}

// doctorStatus is what the last examination found.
func (a *Agent) doctorStatus() DoctorStatus {
	if s := a.findings.Load(); s != nil {
		return *s
	}
	return DoctorStatus{Findings: []hostsconfig.Finding{}}
}

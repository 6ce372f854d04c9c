package e2e

import (
	"slices"
	"testing"
)

// twoRoots is what containerd 2.2 and some distributions set by default.
func twoRoots(c *containerdConfig) { c.configPath += ":/etc/docker/certs.d" }

// TestDoctor lets `larder doctor` look at real runtimes: it must find what makes
// each bypass the mirror, and prove the opposite by a pull that the proxy saw.
// Whatever it says, an image pulled afterwards must agree.
func TestDoctor(t *testing.T) {
	tests := []struct {
		name    string
		version containerdVersion
		vary    func(*containerdConfig)
		flags   []string
		finding string // an ID that must be among the findings
		ok      bool
	}{
		{name: "one root", version: containerd2, ok: true},
		{name: "two roots", version: containerd2, vary: twoRoots, finding: "containerd-two-roots"},
		{name: "two roots with the colon link", version: containerd2, vary: twoRoots, flags: []string{"--hosts.containerd_colon_link"}, ok: true},
		{name: "two roots by luck", version: containerd2, ok: true, finding: "containerd-two-roots-by-luck",
			vary: func(c *containerdConfig) { twoRoots(c); c.discardUnpacked = true }},
		{name: "config_path unset", version: containerd2, vary: func(c *containerdConfig) { c.configPath = "" }, finding: "containerd-other-directory"},
		{name: "one root before 2.0", version: containerd16, ok: true},
		{name: "two roots before 2.0", version: containerd16, vary: twoRoots, ok: true},
		{name: "config_path unset before 2.0", version: containerd16, vary: func(c *containerdConfig) { c.configPath = "" }, finding: "containerd-config-path-unset"},
	}
	r := startRegistry(t, docker28)
	img := r.push(ociImage, "examined", 97)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			vary := tt.vary
			if vary == nil {
				vary = func(*containerdConfig) {}
			}
			c := startContainerd(t, tt.version, vary)
			a := startAgent(t, agentOptions{containerd: c, config: registryTable(r.addr, r), flags: tt.flags})
			args := append([]string{"doctor", "--json", "--runtime-config", c.configFile, "--socket", c.socket(),
				"--admin", "http://" + a.admin, "--proxy.listen", a.proxy, "--hosts.containerd", c.certs}, tt.flags...)
			out, code := larder(t, args...)
			report := decode[doctorReport](t, out)
			if report.OK != tt.ok || (code == 0) != tt.ok {
				t.Errorf("ok = %t, exit %d; want ok = %t", report.OK, code, tt.ok)
			}
			if len(report.Runtimes) != 1 || (report.Runtimes[0].Canary == "seen") != tt.ok {
				t.Errorf("canary: %+v; want it seen: %t", report.Runtimes, tt.ok)
			}
			if got := report.ids(); tt.finding != "" && !slices.Contains(got, tt.finding) {
				t.Errorf("findings %v, want %s among them", got, tt.finding)
			}
			t.Logf("ok %t, canary %q, findings %v", report.OK, report.Runtimes, report.ids())
			ref := r.addr + "/examined:" + img.tag
			c.mustPull(ref)
			if through := a.metric("larder_requests_total", `kind="blob"`) > 0; through != tt.ok {
				t.Errorf("a pull went through the agent: %t; the doctor said %t", through, tt.ok)
			}
		})
	}
}

type doctorReport struct {
	OK       bool `json:"ok"`
	Findings []struct {
		ID, Severity, Where, What, Fix string
	} `json:"findings"`
	Runtimes []struct {
		Name, Version, Canary, Detail string
	} `json:"runtimes"`
}

func (r doctorReport) ids() []string {
	var ids []string
	for _, f := range r.Findings {
		ids = append(ids, f.ID)
	}
	return ids
}

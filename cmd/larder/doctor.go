package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/hostsconfig"
	"github.com/spf13/cobra"
)

func newDoctor() *cobra.Command {
	d := doctor{}
	var config configFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Find what makes a runtime bypass the cache, and the exact fix",
		Long: `Look for everything that makes a runtime bypass the mirror without a word, then
prove the opposite: let the real runtime pull a canary image, and see whether
the request arrives at the agent. Exit code 1 if the runtime would not use the
mirror.`,
		Example: `  larder doctor
  larder doctor --json | jq -r '.findings[].fix'
  larder doctor --root /host --socket /host/run/containerd/containerd.sock`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if d.config, err = config.load(cmd); err != nil {
				return err
			}
			d.admin.listen = d.config.Admin.Listen
			report := d.run(cmd.Context())
			plain(&report)
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), report)
			} else {
				printReport(cmd.OutOrStdout(), report)
			}
			if err == nil && !report.OK {
				err = errFindings
			}
			return err
		},
	}
	d.admin.bind(cmd)
	cmd.Flags().StringVar(&d.root, "root", "/", "where the node's file system is, for a doctor in a container")
	cmd.Flags().StringSliceVar(&d.sockets, "socket", nil, "CRI sockets of the runtimes (default: the known places)")
	cmd.Flags().StringVar(&d.runtimeConfig, "runtime-config", "", "containerd's configuration file (default: the known places)")
	cmd.Flags().BoolVar(&d.skipCanary, "skip-canary", false, "look at files alone, pull nothing")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	config.bind(cmd, "hosts", "proxy")
	return cmd
}

// doctor examines one node.
type doctor struct {
	admin         adminFlags
	config        agent.Config
	root          string
	sockets       []string
	runtimeConfig string
	skipCanary    bool

	report doctorReport
	// Of an agent whose admin API does not answer: whether it serves pulls all the
	// same, or who else listens on its address, "" for nobody.
	serving  bool
	stranger string
}

// doctorReport is what `larder doctor --json` prints.
type doctorReport struct {
	OK       bool                  `json:"ok"`
	Findings []hostsconfig.Finding `json:"findings"`
	Runtimes []runtimeReport       `json:"runtimes"`
	Agent    string                `json:"agent,omitempty"` // version, "" if it does not answer
}

// runtimeReport is one runtime and what became of its canary.
type runtimeReport struct {
	Socket  string `json:"socket"`
	Name    string `json:"name,omitempty"`
	Version string `json:"version,omitempty"`
	Canary  string `json:"canary"` // seen, not-seen or skipped
	Detail  string `json:"detail,omitempty"`
}

func canarySeen(r runtimeReport) bool { return r.Canary == "seen" }

func (d *doctor) find(f hostsconfig.Finding) { d.report.Findings = append(d.report.Findings, f) }

func (d *doctor) run(ctx context.Context) doctorReport {
	d.report = doctorReport{Findings: []hostsconfig.Finding{}, Runtimes: []runtimeReport{}}
	status := d.agentStatus(ctx)
	runtimes := d.connect(ctx)
	opts := d.options(ctx, status, runtimes)
	d.report.Findings = append(d.report.Findings, hostsconfig.Diagnose(opts)...)
	d.privateImages(opts.CRIO != "")
	for _, r := range runtimes {
		d.report.Runtimes = append(d.report.Runtimes, d.canary(ctx, r, status != nil, canaryRegistry(opts.Registries)))
		_ = r.close() // it was only asked
	}
	d.secondRuntimes()
	d.report.OK = !slices.ContainsFunc(d.report.Findings, func(f hostsconfig.Finding) bool { return f.Severity == hostsconfig.Broken })
	return d.report
}

// agentStatus asks the agent; what it manages goes before what this command
// was configured with.
func (d *doctor) agentStatus(ctx context.Context) *agent.Status {
	api, err := d.admin.api()
	var s agent.Status
	if err == nil {
		err = api.get(ctx, "/api/v1/status", &s)
	}
	if err != nil {
		why := err.Error()
		if u, ok := errors.AsType[*unreachableError](err); ok {
			why = u.base + ": " + u.why.Error()
		}
		d.noAgent(ctx, why)
		return nil
	}
	d.report.Agent = s.Version
	for _, c := range s.Checks {
		if !c.OK {
			d.find(hostsconfig.Finding{ID: "agent-not-ready", Severity: hostsconfig.Broken, What: fmt.Sprintf("The agent is not ready: %s: %s.", c.Name, c.Reason)})
		}
	}
	if s.Cache.Problem != "" {
		d.find(hostsconfig.Finding{ID: "cache-no-room", Severity: hostsconfig.Degraded, Where: s.Cache.Dir,
			What: "The cache " + s.Cache.Problem + ". What no other node has costs the registry what it would without Larder.",
			Fix:  "df -h " + s.Cache.Dir + "   # what is left; see cache.min_free"})
	}
	own := d.config.Hosts
	if s.Hosts.Containerd == "" && s.Hosts.CRIO == "" && own.Containerd+own.CRIO != "" { // else it is found below
		d.find(hostsconfig.Finding{ID: "hosts-not-managed", Severity: hostsconfig.Broken, What: "The agent manages no runtime's configuration, although this command's names one.",
			Fix: "larder agent --hosts.containerd /etc/containerd/certs.d    # or --hosts.crio, or the file that --config names here"})
	}
	return &s
}

// adminElsewhere is the finding that there is an agent, and no more is known of it.
const adminElsewhere = "agent-admin-elsewhere"

// noAgent says what a silent admin API means: no agent, or one whose admin API
// is elsewhere.
func (d *doctor) noAgent(ctx context.Context, why string) {
	addr := d.config.Proxy.Listen
	if d.serving, d.stranger = whoAnswers(ctx, addr); d.serving {
		d.find(hostsconfig.Finding{ID: adminElsewhere, Severity: hostsconfig.Broken,
			What: "An agent serves pulls at " + addr + ", but not its admin API where it was looked for (" + why + "), so nothing more is known of it.",
			Fix:  "larder doctor --admin http://HOST:PORT   # admin.listen of that agent, or --config with its file"})
		return
	}
	d.find(hostsconfig.Finding{ID: "agent-down", Severity: hostsconfig.Broken, What: "The agent does not answer, so pulls go straight to the registry (" + why + ").",
		Fix: "larder agent   # or say where it is with --admin; in Kubernetes: kubectl -n larder get pods -o wide"})
}

// connect reaches the runtimes of this node.
func (d *doctor) connect(ctx context.Context) []*criRuntime {
	sockets := d.sockets
	if len(sockets) == 0 {
		sockets = findSockets(d.root)
	}
	var out []*criRuntime
	found := 0
	for _, s := range sockets {
		r, err := dialRuntime(ctx, s)
		if errors.Is(err, errNoCRI) {
			d.find(hostsconfig.Finding{ID: "runtime-without-cri", Severity: hostsconfig.Note, Where: s,
				What: "This containerd offers no CRI, so no kubelet uses it: the plugin is disabled, as in Docker's, or was refused for its configuration.",
				Fix:  "journalctl -u containerd | grep cri   # says why, should it be the kubelet's"})
			continue
		}
		found++
		if err != nil {
			d.find(hostsconfig.Finding{ID: "runtime-unreachable", Severity: hostsconfig.Degraded, Where: s,
				What: "The runtime cannot be asked: " + err.Error() + ".", Fix: socketFix(ctx, s)})
			continue
		}
		out = append(out, r)
	}
	if found == 0 {
		d.find(hostsconfig.Finding{ID: "runtime-not-found", Severity: hostsconfig.Degraded,
			What: "No runtime's CRI socket was found, so nothing is proven by a pull.", Fix: "larder doctor --socket /path/to/containerd.sock"})
	}
	return out
}

// socketFix says what to do about a socket behind which no runtime answered.
func socketFix(ctx context.Context, socket string) string {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	switch {
	case err == nil:
		_ = conn.Close() // nothing was said
		return "journalctl -u containerd   # or crio, k3s, k0sworker: something listens there, and is no runtime that answers"
	case errors.Is(err, fs.ErrPermission):
		return "sudo larder doctor   # the socket belongs to root"
	case errors.Is(err, fs.ErrNotExist):
		return "larder doctor --socket /path/to/containerd.sock   # there is none at that path"
	}
	return "systemctl status containerd   # or crio, k3s, k0sworker: nothing listens there"
}

// options gathers the facts for the static findings.
func (d *doctor) options(ctx context.Context, status *agent.Status, runtimes []*criRuntime) hostsconfig.DoctorOptions {
	h := d.config.Hosts
	opts := hostsconfig.DoctorOptions{
		FS: os.DirFS(d.root), Containerd: h.Containerd, CRIO: h.CRIO, Config: d.runtimeConfig,
		Registries: h.Registries, ProxyAddr: d.config.Proxy.Listen, ColonLink: h.ContainerdColonLink,
	}
	if status != nil {
		opts.ProxyAddr = status.Proxy
		opts.Containerd = cmp.Or(status.Hosts.Containerd, opts.Containerd)
		opts.CRIO = cmp.Or(status.Hosts.CRIO, opts.CRIO)
		if len(status.Hosts.Registries) > 0 { // `helm test` has no configuration to say so
			opts.Registries = status.Hosts.Registries
		}
	}
	opts.Containerd, opts.CRIO = d.onNode(opts.Containerd), d.onNode(opts.CRIO)
	for _, r := range runtimes {
		if r.name == "containerd" {
			opts.Facts.ContainerdVersion = strings.TrimPrefix(r.version, "v")
		} else if opts.CRIO != "" {
			opts.Facts.CRIOImages = append(opts.Facts.CRIOImages, r.images(ctx)...)
		}
	}
	opts.Facts.ProxyUp, opts.Facts.PortTaken = status != nil || d.serving, d.stranger
	return opts
}

// privateImages says what becomes of private images where no registry's are the
// node's own: only containerd shows a mirror the pod's credentials.
func (d *doctor) privateImages(crio bool) {
	shared := func(r upstream.Registry) bool { return r.Auth == "node" }
	if !crio || slices.ContainsFunc(d.config.Registries, shared) {
		return
	}
	d.find(hostsconfig.Finding{ID: "crio-private-images", Severity: hostsconfig.Note, Runtime: "crio",
		What: "CRI-O and podman send a mirror no credentials, so private images are pulled straight from their registries.",
		Fix:  "# in /etc/larder/larder.toml, for what every pod on the node may read\n[[registry]]\nhost = \"registry.example.com\"\nauth = \"node\"\ncredentials_file = \"/etc/larder/registry/config.json\""})
}

// onNode is how the node itself names path: an agent in a container knows its
// directories below the mount of the node's root.
func (d *doctor) onNode(path string) string {
	if rest, ok := strings.CutPrefix(path, strings.TrimSuffix(d.root, "/")+"/"); ok {
		return "/" + rest
	}
	return path
}

// whoAnswers asks at the proxy's address for what only Larder has, the canary
// image. It returns whether that is there, or else describes who listens, "" for
// nobody.
func whoAnswers(ctx context.Context, addr string) (larder bool, stranger string) {
	if !listening(ctx, addr) {
		return false, ""
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, "http://"+addr+"/v2/larder.invalid/canary/manifests/doctor?ns=docker.io", nil)
	if err != nil {
		return false, "a program that is not asked: " + err.Error()
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return false, "a program that does not speak HTTP"
	}
	_ = resp.Body.Close() // only the headers count
	if resp.Header.Get("X-Larder-Source") != "" {
		return true, ""
	}
	return false, strings.TrimSpace("an HTTP server " + resp.Header.Get("Server"))
}

// canaryTimeout is for a pull of a few hundred bytes; containerd gives a dead
// mirror 30 s by itself.
const canaryTimeout = time.Minute

// canary lets r pull an image of registry that only the proxy can serve.
func (d *doctor) canary(ctx context.Context, r *criRuntime, agentUp bool, registry string) runtimeReport {
	out := runtimeReport{Socket: r.socket, Name: r.name, Version: r.version, Canary: "skipped"}
	if d.skipCanary || !agentUp {
		return out
	}
	nonce := strings.ToLower(rand.Text())
	image := registry + "/larder.invalid/canary:" + nonce
	ctx, cancel := context.WithTimeout(ctx, canaryTimeout)
	defer cancel()
	pullErr := r.pull(ctx, image)
	var seen agent.Canary
	api, err := d.admin.api()
	if err == nil {
		err = api.get(context.WithoutCancel(ctx), "/api/v1/canary?"+url.Values{"nonce": {nonce}}.Encode(), &seen)
	}
	switch {
	case seen.Seen && pullErr == nil:
		out.Canary, out.Detail = "seen", seen.UserAgent
	case seen.Seen:
		out.Canary, out.Detail = "seen", pullErr.Error()
		d.find(hostsconfig.Finding{ID: "canary-failed", Severity: hostsconfig.Broken, Runtime: r.name, Where: r.socket,
			What: "The runtime asked the mirror for the canary image and could not pull it: " + pullErr.Error() + "."})
	default:
		out.Canary = "not-seen"
		if err = cmp.Or(err, pullErr); err != nil {
			out.Detail = err.Error()
		}
		d.find(hostsconfig.Finding{ID: canaryNotSeen, Severity: hostsconfig.Broken, Runtime: r.name, Where: r.socket,
			What: "A pull of " + image + " did not come through the mirror: the runtime goes straight to the registry.",
			Fix:  canaryFix(d.report.Findings, r.name)})
	}
	return out
}

// canaryNotSeen is the finding that a runtime went past the mirror.
const canaryNotSeen = "canary-not-seen"

// secondRuntimes: a runtime that goes past the mirror is an error unless another
// one of the node uses it. Docker's containerd beside CRI-O or k3s pulls for no
// kubelet, and a kubelet has one runtime.
func (d *doctor) secondRuntimes() {
	if !slices.ContainsFunc(d.report.Runtimes, canarySeen) {
		return
	}
	for i, f := range d.report.Findings {
		if f.ID != canaryNotSeen {
			continue
		}
		f.Severity = hostsconfig.Degraded
		f.What += " Another runtime of this node uses the mirror; this counts only if the kubelet uses this one."
		f.Fix = "kubectl get node NODE -o jsonpath='{.status.nodeInfo.containerRuntimeVersion}'   # says which one that is"
		d.report.Findings[i] = f
	}
}

// canaryFix points at the finding that explains the bypass, if there is one.
func canaryFix(findings []hostsconfig.Finding, runtime string) string {
	if slices.ContainsFunc(findings, func(f hostsconfig.Finding) bool { return f.Severity == hostsconfig.Broken && f.Fix != "" }) {
		return "fix the findings above, then run larder doctor again"
	}
	if runtime == "cri-o" {
		return "systemctl reload crio   # it reads its registries anew, then run larder doctor again"
	}
	return "systemctl restart containerd   # it reads config_path at its start alone, then run larder doctor again"
}

// canaryRegistry is a registry that the runtime is told to mirror: docker.io
// unless only others are listed.
func canaryRegistry(listed []string) string {
	if len(listed) == 0 || slices.Contains(listed, "*") || slices.Contains(listed, "docker.io") {
		return "docker.io"
	}
	return listed[0]
}

func printReport(w io.Writer, r doctorReport) {
	st := newStyle(w)
	severities := map[hostsconfig.Severity]func(string) string{hostsconfig.Broken: st.bad, hostsconfig.Degraded: st.warn, hostsconfig.Note: st.dim}
	for _, f := range r.Findings {
		text := f.What
		if f.Where != "" {
			text += " (" + f.Where + ")"
		}
		fmt.Fprintf(w, "%s  %s\n", severities[f.Severity](fmt.Sprintf("%-7s", f.Severity)), st.wrap(text, 9))
		for i, line := range strings.Split(f.Fix, "\n") {
			switch {
			case f.Fix == "":
			case i == 0:
				fmt.Fprintln(w, "    fix: ", line)
			default:
				fmt.Fprintln(w, "         ", line)
			}
		}
	}
	for _, rt := range r.Runtimes {
		name := strings.TrimSpace(rt.Name + " " + rt.Version)
		switch rt.Canary {
		case "seen":
			fmt.Fprintf(w, "%s  %s at %s pulls through the mirror: the canary was seen\n", st.good("ok     "), name, rt.Socket)
		case "skipped":
			fmt.Fprintf(w, "%s  %s at %s: no canary was pulled, nothing is proven\n", st.dim("info   "), name, rt.Socket)
		}
	}
	colour := st.good
	if !r.OK {
		colour = st.bad
	}
	fmt.Fprintln(w, colour(r.verdict()))
}

// verdict sums up. An agent that serves pulls, and cannot be asked for more, may well be
// used.
func (r doctorReport) verdict() string {
	proof := func(f hostsconfig.Finding) bool { return f.Severity == hostsconfig.Broken && f.ID != adminElsewhere }
	switch {
	case slices.ContainsFunc(r.Findings, proof):
		return "This node's runtime would not use the mirror."
	case !r.OK:
		return "Whether this node's runtime uses the mirror is not known."
	case !slices.ContainsFunc(r.Runtimes, canarySeen):
		return "Nothing was found that keeps this node's runtime from the mirror. No pull has proven that it uses it."
	}
	return "This node's runtime uses the mirror."
}

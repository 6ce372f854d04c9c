package deploy

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/larder-cache/larder/agent"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"
)

func TestLint(t *testing.T) {
	for name, file := range presets(t) {
		if out, err := helm(t, "lint", "--strict", chartDir, "-f", file); err != nil || strings.Contains(out, "[WARNING]") {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// TestManifestsAreTheChart holds that the plain manifests are what the chart
// makes; `make manifest` writes them.
func TestManifestsAreTheChart(t *testing.T) {
	for _, name := range []string{"larder", "doctor", "cleanup"} {
		cmd := exec.Command(deployDir+"/manifest.sh", name)
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("LARDER_TOOLS_BIN")+":"+os.Getenv("PATH"))
		want, err := cmd.Output()
		if err != nil {
			t.Fatalf("manifest.sh %s: %v", name, err)
		}
		have, err := os.ReadFile(filepath.Join(deployDir, name+".yaml"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(have, want) {
			t.Errorf("deploy/%s.yaml is not what the chart makes; run: make manifest", name)
		}
		o := parse(t, string(have))
		if len(o.secrets) > 0 {
			t.Errorf("deploy/%s.yaml has a Secret: a key in a public file is no key", name)
		}
	}
}

// TestPresets holds what must be true of every install.
func TestPresets(t *testing.T) {
	for name, file := range presets(t) {
		t.Run(name, func(t *testing.T) {
			text := render(t, "-f", file)
			o := parse(t, text)
			if len(o.daemonSets) != 1 || len(o.services) != 1 {
				t.Fatalf("%d DaemonSets, %d Services", len(o.daemonSets), len(o.services))
			}
			d := o.daemonSets[0]
			c := loadConfig(t, o, d)
			checkNetwork(t, o, d, c)
			checkConfined(t, d)
			checkRights(t, o, d)
			checkVolumes(t, d, c)
			checkSelection(t, o, d)
			checkStop(t, d, c)
		})
	}
}

// loadConfig reads the configuration as the agent in the pod would.
func loadConfig(t *testing.T, o *objects, d *appsv1.DaemonSet) agent.Config {
	t.Helper()
	dir := t.TempDir()
	file, key := filepath.Join(dir, "larder.toml"), filepath.Join(dir, "key")
	text := o.config(t)
	// The key is where the Secret is mounted, which is not here.
	const mounted = `key_file = "/run/secrets/larder/key"`
	if peering := strings.Contains(text, "key_file"); peering && !strings.Contains(text, mounted) {
		t.Errorf("larder.toml lacks %s", mounted)
	}
	text = strings.Replace(text, mounted, "key_file = "+strconv.Quote(key), 1)
	for name, body := range map[string]string{file: text, key: base64.StdEncoding.EncodeToString(make([]byte, 32))} {
		if err := os.WriteFile(name, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := agent.Load(agent.Sources{File: file, Environ: environ(t, agentOf(d))})
	if err != nil {
		t.Fatalf("the agent does not take this configuration:\n%v\n%s", err, text)
	}
	return c
}

// environ is what kubelet makes of a container's variables.
func environ(t *testing.T, c *corev1.Container) []string {
	t.Helper()
	fields := map[string]string{
		"spec.nodeName": "node-1.example.com", "status.hostIP": "10.0.0.1",
		"metadata.labels['topology.kubernetes.io/zone']": "northamerica-northeast1-a",
	}
	var out []string
	for _, e := range c.Env {
		value := e.Value
		if e.ValueFrom != nil {
			var known bool
			if value, known = fields[e.ValueFrom.FieldRef.FieldPath]; !known {
				t.Errorf("%s: kubelet knows no %s", e.Name, e.ValueFrom.FieldRef.FieldPath)
			}
		}
		out = append(out, e.Name+"="+value)
	}
	return out
}

// checkNetwork: what is for this node listens on loopback, and the scheduler
// knows of every port.
func checkNetwork(t *testing.T, o *objects, d *appsv1.DaemonSet, c agent.Config) {
	t.Helper()
	spec := d.Spec.Template.Spec
	if !spec.HostNetwork || spec.DNSPolicy != corev1.DNSClusterFirstWithHostNet {
		t.Errorf("hostNetwork %v with dnsPolicy %s", spec.HostNetwork, spec.DNSPolicy)
	}
	if c.Metrics.Listen != "" {
		t.Errorf("metrics are open at %s without having been asked for", c.Metrics.Listen)
	}
	var declared []string
	for _, p := range agentOf(d).Ports {
		if at := fmt.Sprintf("%s:%d", p.HostIP, p.HostPort); slices.Contains(declared, at) {
			t.Errorf("%s is declared twice, and merged by its number alone", at)
		}
		if p.HostPort != p.ContainerPort {
			t.Errorf("port %s: hostPort %d, containerPort %d", p.Name, p.HostPort, p.ContainerPort)
		}
		declared = append(declared, fmt.Sprintf("%s:%d", p.HostIP, p.HostPort))
	}
	for _, listen := range []string{c.Proxy.Listen, c.Admin.Listen, c.Peer.Data, c.Peer.Gossip} {
		if !slices.Contains(declared, listen) {
			t.Errorf("%s is not declared: %v", listen, declared)
		}
	}
	for name, probe := range map[string]*corev1.Probe{"startup": agentOf(d).StartupProbe, "liveness": agentOf(d).LivenessProbe, "readiness": agentOf(d).ReadinessProbe} {
		if probe.HTTPGet.Host != "127.0.0.1" || probe.HTTPGet.Port.StrVal != "admin" {
			t.Errorf("the %s probe does not reach admin.listen: %+v", name, probe.HTTPGet)
		}
	}
	s := o.services[0]
	// Without a dot, because with ndots 1 a name that has one is asked for as it is
	// first, outside the cluster, where some resolvers answer every name.
	want := net.JoinHostPort(s.Name, strconv.Itoa(int(s.Spec.Ports[0].Port)))
	if o := spec.DNSConfig.Options[0]; o.Name != "ndots" || *o.Value != "1" {
		t.Errorf("%s %s", o.Name, *o.Value)
	}
	if !slices.Equal(c.Peer.Join, []string{want}) || s.Spec.ClusterIP != corev1.ClusterIPNone || !s.Spec.PublishNotReadyAddresses {
		t.Errorf("joins %v; the Service is %s, %+v", c.Peer.Join, want, s.Spec)
	}
	if c.Peer.Name != "node-1.example.com" || c.Peer.Advertise != "10.0.0.1" || c.Peer.Zone != "northamerica-northeast1-a" {
		t.Errorf("the node is %q at %q in zone %q", c.Peer.Name, c.Peer.Advertise, c.Peer.Zone)
	}
}

// checkConfined: root, and of root's powers none but over its own files.
func checkConfined(t *testing.T, d *appsv1.DaemonSet) {
	t.Helper()
	s := agentOf(d).SecurityContext
	if *s.RunAsUser != 0 || s.Privileged != nil || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem ||
		!slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(s.Capabilities.Add) > 0 ||
		s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("security context %+v", s)
	}
	spec := d.Spec.Template.Spec
	if spec.HostPID || spec.HostIPC {
		t.Error("sees the node's processes")
	}
	if spec.PriorityClassName != "system-node-critical" || !slices.Equal(spec.Tolerations, []corev1.Toleration{{Operator: corev1.TolerationOpExists}}) {
		t.Errorf("priority %q, tolerations %+v", spec.PriorityClassName, spec.Tolerations)
	}
	limit := agentOf(d).Resources.Limits.Memory().Value()
	var heap string
	for _, e := range agentOf(d).Env {
		if e.Name == "GOMEMLIMIT" {
			heap = e.Value
		}
	}
	mib, err := strconv.ParseInt(strings.TrimSuffix(heap, "MiB"), 10, 64)
	if err != nil || mib<<20 < limit/2 || mib<<20 > limit*9/10 {
		t.Errorf("GOMEMLIMIT %q with a limit of %d bytes", heap, limit)
	}
}

// checkRights: the agent cannot talk to the API server.
func checkRights(t *testing.T, o *objects, d *appsv1.DaemonSet) {
	t.Helper()
	spec := d.Spec.Template.Spec
	if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		t.Error("the pod gets a token")
	}
	if !slices.ContainsFunc(o.serviceAccounts, func(a *corev1.ServiceAccount) bool {
		return a.Name == spec.ServiceAccountName && !*a.AutomountServiceAccountToken
	}) {
		t.Errorf("no ServiceAccount %s without a token", spec.ServiceAccountName)
	}
	for _, b := range o.roleBindings {
		for _, s := range b.Subjects {
			if s.Name == spec.ServiceAccountName {
				t.Errorf("the agent's account has the role %s", b.RoleRef.Name)
			}
		}
	}
}

// checkVolumes: everything the agent is told to use is mounted, where it is on
// the node, and writable only if it is written to.
func checkVolumes(t *testing.T, d *appsv1.DaemonSet, c agent.Config) {
	t.Helper()
	sources := map[string]string{}
	for _, v := range d.Spec.Template.Spec.Volumes {
		sources[v.Name] = ""
		if v.HostPath != nil {
			sources[v.Name] = v.HostPath.Path
		}
	}
	mounts := map[string]bool{} // path -> writable
	for _, m := range agentOf(d).VolumeMounts {
		from, ok := sources[m.Name]
		if !ok || from != "" && from != m.MountPath {
			t.Errorf("volume %s is %q on the node and %s in the pod", m.Name, from, m.MountPath)
		}
		delete(sources, m.Name)
		mounts[m.MountPath] = !m.ReadOnly
	}
	for name := range sources {
		t.Errorf("volume %s is mounted nowhere", name)
	}
	writable := func(p string) bool {
		for ; p != "/"; p = path.Dir(p) {
			if w, ok := mounts[p]; ok {
				return w
			}
		}
		return false
	}
	for _, dir := range []string{c.Cache.Dir, c.Hosts.Containerd, c.Hosts.CRIO} {
		if dir != "" && !writable(dir) {
			t.Errorf("%s cannot be written to: %v", dir, mounts)
		}
	}
	if dir := c.Runtime.ContentDir; dir != "" {
		if w, ok := mounts[dir]; !ok || w {
			t.Errorf("%s: mounted %v, writable %v", dir, ok, w)
		}
	}
	most := []string{c.Cache.Dir, path.Dir(c.Hosts.Containerd), c.Hosts.Containerd, c.Hosts.CRIO}
	for p, w := range mounts {
		if w && !slices.Contains(most, p) {
			t.Errorf("%s is writable", p)
		}
	}
}

// checkSelection: the DaemonSet and the Service find the agents and nobody else.
func checkSelection(t *testing.T, o *objects, d *appsv1.DaemonSet) {
	t.Helper()
	selector := labels.SelectorFromSet(d.Spec.Selector.MatchLabels)
	if !selector.Matches(labels.Set(d.Spec.Template.Labels)) || !maps.Equal(o.services[0].Spec.Selector, d.Spec.Selector.MatchLabels) {
		t.Errorf("pods %v, DaemonSet %v, Service %v", d.Spec.Template.Labels, d.Spec.Selector.MatchLabels, o.services[0].Spec.Selector)
	}
	for _, p := range o.pods {
		if selector.Matches(labels.Set(p.Labels)) {
			t.Errorf("the DaemonSet would adopt pod %s", p.Name)
		}
	}
	for _, j := range o.jobs {
		if selector.Matches(labels.Set(j.Spec.Template.Labels)) {
			t.Errorf("the DaemonSet would adopt the pods of Job %s", j.Name)
		}
	}
}

// TestEveryRootIsSeen holds that the pods see every directory from which containerd of a
// distribution reads hosts.toml: one that they do not see costs the nodes _default, or
// the registries in it their certificates.
func TestEveryRootIsSeen(t *testing.T) {
	const both = "/etc/containerd/certs.d:/etc/docker/certs.d"
	configPaths := map[string]string{ // of the distribution's containerd
		"aks":          "/etc/containerd/certs.d",
		"bottlerocket": "/etc/containerd/certs.d",
		"containerd":   "/etc/containerd/certs.d",
		"crio":         "",
		"eks":          both,
		"gke":          "/etc/containerd/hosts.d",
		"k0s":          "/etc/k0s/containerd.d/certs.d",
		"k3s":          "/var/lib/rancher/k3s/agent/etc/containerd/certs.d",
		"kind":         both, // containerd's own default, which counts as discard_unpacked_layers is set
		"microk8s":     "/var/snap/microk8s/current/args/certs.d",
		"rke2":         "/var/lib/rancher/rke2/agent/etc/containerd/certs.d",
		"talos":        "/etc/cri/conf.d/hosts",
	}
	for name, file := range presets(t) {
		configPath, known := configPaths[name]
		if !known {
			t.Errorf("%s: which config_path has it?", name)
		}
		o := parse(t, render(t, "-f", file))
		roots := filepath.SplitList(configPath)
		if dir := loadConfig(t, o, o.daemonSets[0]).Hosts.Containerd; len(roots) > 0 && dir != roots[0] {
			t.Errorf("%s: manages %s, and containerd reads %s first", name, dir, roots[0])
		}
		for _, root := range roots {
			if !slices.ContainsFunc(agentOf(o.daemonSets[0]).VolumeMounts, func(m corev1.VolumeMount) bool {
				return m.MountPath == root || m.MountPath == path.Dir(root)
			}) {
				t.Errorf("%s: containerd reads %s, which the pod does not see", name, root)
			}
		}
	}
}

// restoreGrace is what the agent may need beside the drain to restore the
// node's files.
const restoreGrace = 20

func checkStop(t *testing.T, d *appsv1.DaemonSet, c agent.Config) {
	t.Helper()
	if grace := *d.Spec.Template.Spec.TerminationGracePeriodSeconds; float64(grace) < c.Proxy.DrainTimeout.Seconds()+restoreGrace {
		t.Errorf("%d s of grace for a drain of %s", grace, c.Proxy.DrainTimeout)
	}
	if !c.Hosts.RemoveOnExit {
		t.Error("the node's files would stay")
	}
}

// TestKeyOfItsOwn holds that each install has another key, of the length that
// the agent wants.
func TestKeyOfItsOwn(t *testing.T) {
	seen := map[string]bool{}
	for range 2 {
		o := parse(t, render(t, "--set", "key.generate=helm"))
		if len(o.secrets) != 1 {
			t.Fatalf("%d Secrets", len(o.secrets))
		}
		key, err := base64.StdEncoding.DecodeString(string(o.secrets[0].Data["key"]))
		if err != nil || len(key) != 32 || seen[string(key)] {
			t.Errorf("key of %d bytes, %v", len(key), err)
		}
		seen[string(key)] = true
		v := o.daemonSets[0].Spec.Template.Spec.Volumes[1]
		if v.Secret.SecretName != o.secrets[0].Name || v.Secret.Items[0].Key != "key" {
			t.Errorf("mounts %+v", v.Secret)
		}
	}
}

// TestFilesArriveWhole holds that the PrometheusRule is the rule file, and that
// Grafana gets the dashboard.
func TestFilesArriveWhole(t *testing.T) {
	o := parse(t, render(t, "--set", "metrics.enabled=true,metrics.prometheusRule.enabled=true,metrics.dashboard.enabled=true"))
	dashboard, err := os.ReadFile(chartDir + "/files/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(o.configMaps, func(c *corev1.ConfigMap) bool { return c.Data["larder.json"] == string(dashboard) }) {
		t.Error("no ConfigMap holds the dashboard as it is")
	}
	file, err := os.ReadFile(chartDir + "/files/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var want any
	if err := yaml.Unmarshal(file, &want); err != nil {
		t.Fatal(err)
	}
	have, err := json.Marshal(o.others[0].Object["spec"])
	if err != nil {
		t.Fatal(err)
	}
	if wanted, err := json.Marshal(want); err != nil || string(have) != string(wanted) {
		t.Errorf("%v\n%s\n%s", err, have, wanted)
	}
}

// TestPlainManifest holds what the plain manifest adds: the namespace, and the
// Job that makes the key without the agents having any right.
func TestPlainManifest(t *testing.T) {
	body, err := os.ReadFile(deployDir + "/larder.yaml")
	if err != nil {
		t.Fatal(err)
	}
	o := parse(t, string(body))
	if len(o.namespaces) != 1 || o.namespaces[0].Labels["pod-security.kubernetes.io/enforce"] != "privileged" {
		t.Fatalf("namespaces %+v", o.namespaces)
	}
	if !strings.HasPrefix(string(body[bytes.Index(body, []byte("apiVersion")):]), "apiVersion: v1\nkind: Namespace") {
		t.Error("the namespace must come first")
	}
	if len(o.daemonSets) != 1 || len(o.jobs) != 1 || len(o.roles) != 1 || len(o.quotas) != 1 {
		t.Fatalf("%d DaemonSets, %d Jobs, %d Roles, %d quotas", len(o.daemonSets), len(o.jobs), len(o.roles), len(o.quotas))
	}
	d, job := o.daemonSets[0], o.jobs[0].Spec.Template.Spec
	checkRights(t, o, d)
	checkSelection(t, o, d)
	loadConfig(t, o, d)
	if r := o.roles[0].Rules; len(r) != 1 || !slices.Equal(r[0].Resources, []string{"secrets"}) || !slices.Equal(r[0].Verbs, []string{"create"}) {
		t.Errorf("the Job may %+v", r)
	}
	secret := d.Spec.Template.Spec.Volumes[1].Secret.SecretName
	if args := job.Containers[0].Args; !slices.Equal(args, []string{"keygen", "--secret", secret}) {
		t.Errorf("the Job runs %v, and the agents want the Secret %s", args, secret)
	}
	if s := job.Containers[0].SecurityContext; !*s.RunAsNonRoot || job.HostNetwork || len(job.Volumes) > 0 {
		t.Errorf("the Job is more than a pod of anybody: %+v", s)
	}
	if agents := d.Spec.Template.Spec; !reflect.DeepEqual(job.Affinity, agents.Affinity) || !reflect.DeepEqual(job.Tolerations, agents.Tolerations) {
		t.Errorf("the Job tolerates every node, and its affinity is %+v, the agents' %+v", job.Affinity, agents.Affinity)
	}
	if ttl := o.jobs[0].Spec.TTLSecondsAfterFinished; ttl != nil {
		t.Errorf("the Job is deleted %d s after it has ended: Argo CD calls the application OutOfSync then, and Flux makes the Job anew, forever", *ttl)
	}
	if image := agentOf(d).Image; image != job.Containers[0].Image || !strings.HasSuffix(image, ":"+d.Labels["app.kubernetes.io/version"]) {
		t.Errorf("images %s and %s", image, job.Containers[0].Image)
	}
}

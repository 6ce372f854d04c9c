package deploy

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

const credentialProviders = `{"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1", "providers": [
	{"name": "ecr-credential-provider", "matchImages": ["*.dkr.ecr.*.amazonaws.com"], "defaultCacheDuration": "12h", "apiVersion": "credentialprovider.kubelet.k8s.io/v1"}]}`

// TestSwitches holds that each value changes what it is for: with it the text
// is there, without it is not.
func TestSwitches(t *testing.T) {
	plain := render(t)
	// The agent looks at these when it starts, so they exist.
	apart := t.TempDir()
	together := filepath.Join(apart, "bin")
	for _, file := range []string{filepath.Join(together, "config.json"), filepath.Join(apart, "etc", "config.json")} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(credentialProviders), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	plugin := filepath.Join(together, "ecr-credential-provider")
	if err := os.WriteFile(plugin, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	providers := func(config, bin string) []string {
		return []string{"config.node.image_credential_provider_config=" + config, "config.node.image_credential_provider_bin_dir=" + bin,
			"registries[0].host=r.example.com", "registries[0].auth=node", "registries[0].node_repositories={base/**}"}
	}
	for _, tt := range []struct {
		name string
		set  []string // key=value of --set
		want []string // regular expressions that match with, and not without
		gone []string // the other way
	}{
		{name: "image tag", set: []string{"image.tag=v9"}, want: []string{`image: ghcr.io/larder-cache/larder:v9\n`}},
		{name: "image digest", set: []string{"image.digest=sha256:" + strings.Repeat("a", 64), "image.repository=reg.example.com/larder"}, want: []string{`image: reg.example.com/larder@sha256:a{64}\n`}},
		{name: "pull policy", set: []string{"image.pullPolicy=Never"}, want: []string{`imagePullPolicy: Never`}, gone: []string{`imagePullPolicy: IfNotPresent`}},
		{name: "pull secrets", set: []string{"imagePullSecrets[0].name=regcred"}, want: []string{`imagePullSecrets:\n +- name: regcred`}},
		{name: "certs.d elsewhere", set: []string{"containerd.certsDir=/opt/c/certs.d"}, want: []string{`containerd = "/opt/c/certs.d"`, `path: /opt/c, type: Directory}`}, gone: []string{`/etc/containerd`}},
		{name: "certs.d alone", set: []string{"containerd.mount=directory"}, want: []string{`mountPath: /etc/containerd, readOnly: true}`, `name: certs-d, mountPath: /etc/containerd/certs.d}`, `path: /etc/containerd/certs.d, type: DirectoryOrCreate`}},
		{name: "further roots", set: []string{"containerd.furtherRoots={/etc/docker/certs.d}"}, want: []string{`mountPath: /etc/docker/certs.d, readOnly: true`}},
		{name: "colon link", set: []string{"containerd.colonLink=true"}, want: []string{`containerd_colon_link = true`}},
		{name: "no content store", set: []string{"containerd.root="}, gone: []string{`content_dir`, `name: content`}},
		{name: "socket", set: []string{"containerd.socket=/run/k3s/containerd/containerd.sock"}, want: []string{`containerd_socket = "/run/k3s/containerd/containerd.sock"`, `mountPath: /run/k3s/containerd, readOnly: true`}},
		{name: "CRI-O alone", set: []string{"containerd.enabled=false", "crio.enabled=true"}, want: []string{`crio = "/etc/containers/registries.conf.d"`, `mountPath: /etc/containers, readOnly: true`}, gone: []string{`/etc/containerd`, `content_dir`}},
		{name: "both runtimes", set: []string{"crio.enabled=true"}, want: []string{`containerd = "/etc/containerd/certs.d"\n +crio = "/etc/containers/registries.conf.d"`}},
		{name: "CRI-O reload", set: []string{"crio.enabled=true", "crio.reload=true"}, want: []string{`hostPID: true`, `crio_reload = true`, `appArmorProfile: {type: Unconfined}`}},
		{name: "reload without CRI-O", set: []string{"crio.reload=true"}, want: nil},
		{name: "cache elsewhere", set: []string{"cache.hostPath=/data/larder"}, want: []string{`dir = "/data/larder"`, `mountPath: /data/larder}`, `path: /data/larder, type: DirectoryOrCreate`}, gone: []string{`/var/lib/larder`}},
		{name: "a key of one's own", set: []string{"key.existingSecret=mine", "key.existingSecretKey=k"}, want: []string{`secretName: mine, defaultMode: 0400, items: \[{key: k, path: key}\]`}, gone: []string{`kind: Job\n`, `keygen`}},
		{name: "a key from Helm", set: []string{"key.generate=helm"}, want: []string{`kind: Secret\n`}, gone: []string{`kind: Job\n`, `kind: RoleBinding\n`}},
		{name: "no peers", set: []string{"config.peer.enabled=false"}, want: []string{`\[peer\]\n +enabled = false`}, gone: []string{`kind: Job\n`, `kind: Service\n`, `containerPort: 5051`, `key_file`, `/run/secrets/larder`}},
		{name: "one zone", set: []string{"peer.zone=site-a"}, want: []string{`name: LARDER_PEER_ZONE\n +value: "site-a"`}, gone: []string{`metadata.labels\['topology`}},
		{name: "zones", set: []string{"peer.zones={Rack_A,b}"}, want: []string{`name: larder-rack-a\n`, `topology.kubernetes.io/zone: "Rack_A"`, `name: larder-b\n`, `topology.kubernetes.io/zone: "b"`, `value: "b"`}, gone: []string{`metadata.labels\['topology`}},
		{name: "ports", set: []string{"ports.proxy=6050", "ports.admin=6053"}, want: []string{`listen = "127.0.0.1:6050"`, `listen = "127.0.0.1:6053"`, `containerPort: 6050, hostPort: 6050`, `http://127.0.0.1:6053`}, gone: []string{`5050`, `5053`}},
		{name: "the port of what is off", set: []string{"ports.proxy=5054", "config.peer.enabled=false", "ports.admin=5052"}, want: []string{`listen = "127.0.0.1:5054"`, `listen = "127.0.0.1:5052"`}},
		{name: "audit", set: []string{"audit.enabled=true"}, want: []string{`file = "/var/log/larder/audit.log"`, `mountPath: /var/log/larder}`}},
		{name: "metrics", set: []string{"metrics.enabled=true"}, want: []string{`\[metrics\]\n +listen = ":5054"`, `name: metrics, containerPort: 5054`, `targetPort: metrics`}},
		{name: "ServiceMonitor", set: []string{"metrics.enabled=true", "metrics.serviceMonitor.enabled=true", "metrics.serviceMonitor.labels.release=prom"}, want: []string{`kind: ServiceMonitor`, `release: prom`}},
		{name: "PodMonitor", set: []string{"metrics.enabled=true", "metrics.podMonitor.enabled=true", "metrics.podMonitor.interval=15s"}, want: []string{`kind: PodMonitor`, `interval: 15s`}},
		{name: "alerts", set: []string{"metrics.enabled=true", "metrics.prometheusRule.enabled=true"}, want: []string{`kind: PrometheusRule`, `alert: LarderCorruptionFound`}},
		{name: "dashboard", set: []string{"metrics.enabled=true", "metrics.dashboard.enabled=true"}, want: []string{`grafana_dashboard: "1"`, `larder.json: \|`}},
		{name: "another priority", set: []string{"priorityClassName=mine"}, want: []string{`priorityClassName: mine`}, gone: []string{`kind: ResourceQuota`, `system-node-critical`}},
		{name: "no quota", set: []string{"criticalPodsQuota=false"}, gone: []string{`kind: ResourceQuota`}},
		{name: "doctor on a node", set: []string{"doctor.node=n1"}, want: []string{`nodeName: "n1"`}},
		{name: "zones of nodes that nothing else selects", set: []string{`nodeSelector.kubernetes\.io/os=null`, "peer.zones={a}"}, want: []string{`nodeSelector:\n +topology.kubernetes.io/zone: "a"`}},
		{name: "cleanup", set: []string{"cleanup.nodes={n1,n2}"}, want: []string{`name: larder-cleanup-n2`, `--hosts.containerd=/etc/containerd/certs.d`}},
		{name: "grace", set: []string{"terminationGracePeriodSeconds=90"}, want: []string{`terminationGracePeriodSeconds: 90`}},
		{name: "a drain in decimals", set: []string{"config.proxy.drain_timeout=0.5m", "terminationGracePeriodSeconds=50"}, want: []string{`drain_timeout = "0.5m"`}},
		{name: "memory", set: []string{"resources.limits.memory=512Mi"}, want: []string{`value: 409MiB`}, gone: []string{`819MiB`}},
		{name: "names", set: []string{"fullnameOverride=cache"}, want: []string{`"cache-peers:5052"`, `secretName: cache,`}, gone: []string{`larder-peers`}},
		{name: "labels", set: []string{"labels.team=a", "podLabels.x=b", "podAnnotations.note=c"}, want: []string{`team: a`, `x: b`, `note: c`}},
		{name: "more volumes", set: []string{"volumes[0].name=ca", "volumes[0].secret.secretName=ca", "volumeMounts[0].name=ca", "volumeMounts[0].mountPath=/etc/ca"}, want: []string{`mountPath: /etc/ca`, `secretName: ca\n`}},
		{name: "variables", set: []string{"env[0].name=GOGC", "env[0].value=off"}, want: []string{`- name: GOGC\n`}},
		{name: "configuration", set: []string{"config.cache.max_bytes=100GiB", "config.upstream.max_bytes_per_second=107374182400", "config.hosts.registries={docker.io,quay.io}", "config.log.level=debug"},
			want: []string{`max_bytes = "100GiB"`, `max_bytes_per_second = 107374182400\n`, `registries = \["docker.io","quay.io"\]`, `level = "debug"`}},
		{name: "pins", set: []string{"config.cache.pins={registry.k8s.io/pause:3.10,quay.io/cilium/cilium:v1.18.2}"},
			want: []string{`\[cache\]\n +dir = "/var/lib/larder"\n +pins = \["registry.k8s.io/pause:3.10","quay.io/cilium/cilium:v1.18.2"\]`}},
		{name: "credential provider plugins", set: providers(together+"/config.json", together),
			want: []string{`name: credential-provider-0, mountPath: ` + together + `, readOnly: true`, `path: ` + together + `, type: Directory`, `node_repositories = \["base/\*\*"\]`}},
		{name: "credential provider plugins apart", set: providers(apart+"/etc/config.json", together+"/"),
			want: []string{`name: credential-provider-0, mountPath: ` + apart + `/etc, readOnly: true`, `name: credential-provider-1, mountPath: ` + together + `, readOnly: true`}},
		{name: "registries", set: []string{"registries[0].host=docker.io", "registries[0].upstreams={https://a.example.com}", "registries[0].max_connections=4"}, want: []string{`\[\[registry\]\]\n +host = "docker.io"\n +max_connections = 4\n +upstreams = \["https://a.example.com"\]`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var args []string
			for _, s := range tt.set {
				args = append(args, "--set", s)
			}
			text := render(t, args...)
			for _, w := range tt.want {
				re := regexp.MustCompile(w)
				if re.MatchString(plain) || !re.MatchString(text) {
					t.Errorf("%q: without %v, with %v", w, re.MatchString(plain), re.MatchString(text))
				}
			}
			for _, g := range tt.gone {
				re := regexp.MustCompile(g)
				if !re.MatchString(plain) || re.MatchString(text) {
					t.Errorf("%q: without %v, with %v", g, re.MatchString(plain), re.MatchString(text))
				}
			}
			o := parse(t, text)
			for _, d := range o.daemonSets {
				loadConfig(t, o, d)
			}
		})
	}
}

// TestJobNames holds that a Job's name is short enough, as it is a label of its pods: the
// names of nodes and releases may be longer.
func TestJobNames(t *testing.T) {
	const node = "ip-192-168-123-234.ap-northeast-1.compute.internal"
	text := render(t, "--set", "fullnameOverride="+strings.Repeat("long-", 10)+"er,key.generate=cluster,cleanup.nodes={"+node+",n1}")
	text += "\n---\n" + cleanupOf(t, node)
	jobs := parse(t, text).jobs
	seen := map[string]bool{}
	for _, j := range jobs {
		if problems := validation.IsValidLabelValue(j.Name); len(problems) > 0 || seen[j.Name] {
			t.Errorf("a Job %q (seen before: %v): %v", j.Name, seen[j.Name], problems)
		}
		seen[j.Name] = true
	}
	if len(jobs) != 4 || jobs[3].Spec.Template.Spec.NodeName != node {
		t.Errorf("%d Jobs", len(jobs))
	}
}

// TestKeyJobIsReplaced holds that a change of the pod that makes the key is another Job,
// for the API server refuses to change one, and that nothing else is.
func TestKeyJobIsReplaced(t *testing.T) {
	job := func(set ...string) *batchv1.Job {
		args := []string{"--set", "key.generate=cluster"}
		for _, s := range set {
			args = append(args, "--set", s)
		}
		return parse(t, render(t, args...)).jobs[0]
	}
	before := job()
	for set, changes := range map[string]bool{
		"image.tag=v9": true, "image.pullPolicy=Always": true, "imagePullSecrets[0].name=regcred": true,
		"nodeSelector.pool=a": true, "tolerations[0].key=a": true, "resources.limits.memory=2Gi": false, "labels.team=a": false,
	} {
		after := job(set)
		if reflect.DeepEqual(after.Spec, before.Spec) == changes || (after.Name == before.Name) == changes {
			t.Errorf("%s: from Job %s to %s", set, before.Name, after.Name)
		}
	}
}

// TestCleanupEnds holds that the Jobs end, and go, on nodes that lack the directory too.
func TestCleanupEnds(t *testing.T) {
	for _, j := range parse(t, cleanupOf(t, "n1")).jobs {
		if j.Spec.ActiveDeadlineSeconds == nil || j.Spec.TTLSecondsAfterFinished == nil {
			t.Errorf("Job %s is there forever where its pod cannot start", j.Name)
		}
	}
}

// TestNodeNames holds that a node may have a name that YAML takes for a number, which
// the API server refuses.
func TestNodeNames(t *testing.T) {
	const node = "1234567890"
	text := render(t, "--set-string", "doctor.node="+node+",cleanup.nodes={"+node+"}") + "\n---\n" + cleanupOf(t, node)
	if n := strings.Count(text, `nodeName: "`+node+`"`); n != 3 {
		t.Errorf("%d of 3 pods name their node as a text", n)
	}
}

// cleanupOf runs the loop in the head of cleanup.yaml for one node.
func cleanupOf(t *testing.T, node string) string {
	t.Helper()
	manifest, err := os.ReadFile(filepath.Join(deployDir, "cleanup.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	_, command, _ := strings.Cut(string(manifest), "#     sed ")
	command, _, found := strings.Cut(command, " | kubectl apply")
	if !found {
		t.Fatal("cleanup.yaml does not say how to use it")
	}
	cmd := exec.Command("sh", "-c", "sed "+command)
	cmd.Dir, cmd.Env = deployDir, append(os.Environ(), "node="+node)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return string(out)
}

// TestConfigurationRestarts holds that a change of the configuration rolls the
// agents, which read it at their start alone, and that nothing else does.
func TestConfigurationRestarts(t *testing.T) {
	sum := func(args ...string) string {
		return parse(t, render(t, args...)).daemonSets[0].Spec.Template.Annotations["checksum/config"]
	}
	before := sum()
	if before == "" || sum("--set", "doctor.node=n1") != before || sum("--set", "config.log.level=debug") == before {
		t.Error("checksum/config does not follow the configuration")
	}
}

// TestKubeSystem holds that in kube-system no quota is made, which might bind
// what others run there.
func TestKubeSystem(t *testing.T) {
	if o := parse(t, render(t, "--namespace", "kube-system")); len(o.quotas) > 0 || o.daemonSets[0].Namespace != "kube-system" {
		t.Errorf("quotas %+v", o.quotas)
	}
}

// TestOldClusters holds that AppArmor is told the way that the cluster knows.
func TestOldClusters(t *testing.T) {
	o := parse(t, render(t, "--kube-version", "1.28.0", "--set", "crio.enabled=true", "--set", "crio.reload=true"))
	d := o.daemonSets[0]
	if agentOf(d).SecurityContext.AppArmorProfile != nil || d.Spec.Template.Annotations["container.apparmor.security.beta.kubernetes.io/larder"] != "unconfined" {
		t.Errorf("annotations %v", d.Spec.Template.Annotations)
	}
}

// TestRefused holds that what cannot work is refused before it is installed,
// with a message that names the value.
func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  []string
		want string
	}{
		{"a slip", []string{"containerd.certDir=/x"}, "certDir"},
		{"an unknown key", []string{"config.cache.max_byte=1"}, "max_byte"},
		{"a key that is the chart's", []string{"config.proxy.listen=0.0.0.0:80"}, "listen"},
		{"two directories", []string{"containerd.certsDir=/etc/containerd/certs.d:/etc/docker/certs.d"}, "certsDir"},
		{"a relative path", []string{"cache.hostPath=larder"}, "hostPath"},
		{"a port that is none", []string{"ports.proxy=99999"}, "proxy"},
		{"a port twice", []string{"metrics.enabled=true", "ports.metrics=5051"}, "ports.data and ports.metrics are both 5051"},
		{"a wrong type", []string{"metrics.enabled=yes"}, "enabled"},
		{"a wrong level", []string{"config.log.level=loud"}, "level"},
		{"a wrong size", []string{"config.cache.max_bytes=lots"}, "max_bytes"},
		{"a wrong duration", []string{"config.upstream.tag_ttl=10"}, "tag_ttl"},
		{"a registry without a host", []string{"registries[0].ca_file=/x"}, "host"},
		{"a memory limit that GOMEMLIMIT cannot be made from", []string{"resources.limits.memory=1e9"}, "memory"},
		{"a digest that is none", []string{"image.digest=sha256:abc"}, "digest"},
		{"no runtime", []string{"containerd.enabled=false"}, "set containerd.enabled or crio.enabled"},
		{"a monitor and no metrics", []string{"metrics.podMonitor.enabled=true"}, "metrics.enabled"},
		{"alerts and no metrics", []string{"metrics.prometheusRule.enabled=true"}, "metrics.prometheusRule needs metrics.enabled"},
		{"a dashboard and no metrics", []string{"metrics.dashboard.enabled=true"}, "metrics.dashboard needs metrics.enabled"},
		{"a link beside a directory that is not mounted", []string{"containerd.colonLink=true", "containerd.mount=directory"}, "containerd.mount"},
		{"no time to restore", []string{"terminationGracePeriodSeconds=30"}, "at least 40"},
		{"a longer drain", []string{"config.proxy.drain_timeout=1m30s"}, "at least 110"},
		{"a drain in decimals", []string{"config.proxy.drain_timeout=1.0h1.5m0.5s"}, "at least 3711"},
		{"an old cluster", nil, "kubeVersion"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var args []string
			for _, s := range tt.set {
				args = append(args, "--set", s)
			}
			if tt.set == nil {
				args = []string{"--kube-version", "1.24.0"}
			}
			if _, err := template(t, args...); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want it to name %q", err, tt.want)
			}
		})
	}
}

// TestNotes renders what `helm install` prints.
func TestNotes(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want []string
	}{
		{nil, []string{"on every node", "rollout status ds/larder", "/etc/containerd/certs.d", "helm test larder", "5051", "metrics.enabled=true"}},
		{[]string{"-f", chartDir + "/presets/crio.yaml"}, []string{"auto_reload_registries"}},
		{[]string{"--set", "peer.zones={a,b}"}, []string{"nodes of a, b", "ds/larder-a"}},
	} {
		out, err := helm(t, append([]string{"install", "larder", chartDir, "--namespace", "larder", "--dry-run=client"}, tt.args...)...)
		_, notes, _ := strings.Cut(out, "NOTES:")
		for _, w := range tt.want {
			if err != nil || !strings.Contains(notes, w) {
				t.Errorf("%v: no %q in the notes (%v)\n%s", tt.args, w, err, notes)
			}
		}
	}
}

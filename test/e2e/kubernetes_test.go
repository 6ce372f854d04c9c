package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// kubernetes is a control plane on a host of its own and the nodes that have
// joined it, each a machine with containerd and kubelet.
type kubernetes struct {
	t       *testing.T
	network *network
	control host
	dir     string // certificates, kubeconfigs and etcd's data
	ca      *authority
	admin   string // kubeconfig of a member of system:masters
	nodes   []*kubeNode

	kubectlBin, helmBin string // run on the control plane's host
}

// sandboxImage is the image that a node needs for any pod at all.
const sandboxImage = "pause.test/pause:1"

// kubeNode is a node of a cluster.
type kubeNode struct {
	*machine
	zone    string
	cgroup  string
	before  string // what it had changed in /etc before it joined
	kubelet *process
}

// newKubernetes starts a control plane: etcd, the API server, the scheduler, the
// controllers and CoreDNS, which holds no other record than the cluster's.
func newKubernetes(t *testing.T) *kubernetes {
	t.Helper()
	k := &kubernetes{t: t, network: newNetwork(t), dir: tempDir(t)}
	k.control = k.network.attach()
	k.ca = newAuthority(t, k.dir)
	k.admin = k.kubeconfig("admin", "system:masters")
	k.kubectlBin = k.control.program(t, needBuilt(t, "kubectl"))
	k.helmBin = k.control.program(t, needBuilt(t, "helm"))
	etcd := k.run("etcd", "--data-dir", filepath.Join(k.dir, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380", "--log-level", "warn")
	api := k.startAPI()
	eventually(t, 60*time.Second, "the API server is ready", func() error {
		_, err := k.try(k.kubectlBin, "get", "--raw", "/readyz")
		return errors.Join(etcd.dead(), api.dead(), err)
	})
	k.run("kube-controller-manager", "--kubeconfig", k.admin, "--leader-elect=false",
		"--service-account-private-key-file", k.file("sa.key"), "--root-ca-file", k.ca.file)
	k.run("kube-scheduler", "--kubeconfig", k.admin, "--leader-elect=false")
	k.run("coredns", "-conf", writeFile(t, k.file("Corefile"), fmt.Sprintf(
		".:53 {\n  bind %s\n  errors\n  kubernetes cluster.local {\n    kubeconfig %s\n  }\n}\n", k.control.addr, k.admin)))
	return k
}

func (k *kubernetes) startAPI() *process {
	k.t.Helper()
	tls, tlsKey := k.ca.issue(k.dir, "apiserver", server("kube-apiserver", k.control.addr, "127.0.0.1", "10.96.0.1"))
	kubelet, kubeletKey := k.ca.issue(k.dir, "kubelet-client", client("kube-apiserver", "system:masters"))
	tokens := writeKey(k.t, k.file("sa.key"), newKey(k.t))
	return k.run("kube-apiserver", "--etcd-servers", "http://127.0.0.1:2379",
		"--bind-address", k.control.addr, "--advertise-address", k.control.addr,
		"--tls-cert-file", tls, "--tls-private-key-file", tlsKey, "--client-ca-file", k.ca.file,
		"--kubelet-preferred-address-types", "InternalIP", "--kubelet-client-certificate", kubelet, "--kubelet-client-key", kubeletKey,
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", tokens, "--service-account-signing-key-file", tokens,
		"--service-cluster-ip-range", "10.96.0.0/16",
		"--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction")
}

// run runs a program of the control plane.
func (k *kubernetes) run(name string, args ...string) *process {
	k.t.Helper()
	cmd := exec.Command(k.control.program(k.t, needBuilt(k.t, name)), args...)
	cmd.Dir = k.dir // kube-apiserver writes certificates to its working directory
	return startProcess(k.t, name, cmd)
}

func (k *kubernetes) file(name string) string { return filepath.Join(k.dir, name) }

// kubeconfig lets a user, who belongs to groups, reach the API server.
func (k *kubernetes) kubeconfig(user string, groups ...string) string {
	k.t.Helper()
	name := strings.ReplaceAll(user, ":", "-")
	cert, key := k.ca.issue(k.dir, name, client(user, groups...))
	return writeFile(k.t, k.file(name+".kubeconfig"), fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://%s:6443", certificate-authority: %s}}]
users: [{name: user, user: {client-certificate: %s, client-key: %s}}]
contexts: [{name: test, context: {cluster: test, user: user}}]
current-context: test
`, k.control.addr, k.ca.file, cert, key))
}

// kubectl runs kubectl as the administrator; it must succeed.
func (k *kubernetes) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	return must(t)(k.try(k.kubectlBin, args...))
}

// helm runs helm as the administrator; it must succeed.
func (k *kubernetes) helm(t *testing.T, args ...string) string {
	t.Helper()
	return must(t)(k.try(k.helmBin, args...))
}

func must(t *testing.T) func(string, error) string {
	return func(out string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
}

// try runs a program as the administrator and returns what it prints.
func (k *kubernetes) try(bin string, args ...string) (string, error) {
	cmd := exec.Command(bin, args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	cmd.Env = append(cmd.Environ(), "KUBECONFIG="+k.admin, "HOME="+k.dir,
		"PATH="+filepath.Dir(k.kubectlBin)+":"+filepath.Dir(k.helmBin)+":"+os.Getenv("PATH"))
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s%s", filepath.Base(bin), strings.Join(args, " "), err, out, &errs)
	}
	return string(out), err
}

// apply is `kubectl apply` of a manifest.
func (k *kubernetes) apply(t *testing.T, manifest string) {
	t.Helper()
	k.kubectl(t, "apply", "-f", writeFile(t, filepath.Join(tempDir(t), "manifest.yaml"), manifest))
}

// join adds a node that has these images, archives for `ctr images import`, and
// knows these registries by the names that images give them. It does not wait until the node is ready.
func (k *kubernetes) join(registries map[string]*registry, images ...string) *kubeNode {
	k.t.Helper()
	name := fmt.Sprintf("node-%d", len(k.nodes)+1)
	cgroup := newCgroup(k.t, name) // first, for it goes when the machine's processes are gone
	n := &kubeNode{machine: newMachine(k.t, k.network.attach(), name), cgroup: cgroup}
	n.zone = fmt.Sprintf("zone-%d", 1+len(k.nodes)%2)
	k.nodes = append(k.nodes, n)
	n.startContainerd(k.t, fmt.Sprintf("10.79.%d.0/24", len(k.nodes)))
	for name, r := range registries {
		writeHostsTOML(k.t, n.path("/etc/containerd/certs.d"), name, r)
	}
	for _, image := range images {
		n.ctr(k.t, "images", "import", image)
	}
	n.before = snapshot(k.t, n.etc)
	n.startKubelet(k)
	n.startProxy(k)
	return n
}

// startContainerd runs containerd where packages have it. Pods reach services and
// hosts, but not the pods of other nodes, which would take a route on every node.
func (n *kubeNode) startContainerd(t *testing.T, pods string) {
	t.Helper()
	bin := needBuilt(t, "containerd")
	writeFile(t, n.path("/etc/cni/net.d/10-bridge.conflist"), fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "pods", "plugins": [
		{"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipMasq": true, "ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]]}}]}`, pods))
	config := writeFile(t, n.path("/etc/containerd/config.toml"), fmt.Sprintf(`version = 3
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = [%q]
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = %q
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "/etc/containerd/certs.d"
`, filepath.Dir(needBuilt(t, "bridge")), sandboxImage))
	cmd := exec.Command(bin, "--config", strings.TrimPrefix(config, n.root))
	cmd.Env = append(cmd.Environ(), "PATH="+filepath.Dir(bin)+":"+os.Getenv("PATH")) // its shim, not the distribution's
	p := n.start("containerd", cmd)
	eventually(t, 60*time.Second, "containerd answers", func() error {
		return errors.Join(p.dead(), n.run(needBuilt(t, "ctr"), "version"))
	})
}

// ctr runs ctr on what belongs to kubelet; it must succeed.
func (n *kubeNode) ctr(t *testing.T, args ...string) {
	t.Helper()
	if err := n.run(needBuilt(t, "ctr"), append([]string{"--namespace", "k8s.io"}, args...)...); err != nil {
		t.Fatal(err)
	}
}

// startKubelet lets the machine join the cluster.
func (n *kubeNode) startKubelet(k *kubernetes) {
	k.t.Helper()
	config := writeFile(k.t, n.path("/var/lib/kubelet/config.yaml"), fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {x509: {clientCAFile: %s}}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDomain: cluster.local
clusterDNS: [%s]
volumePluginDir: /var/lib/kubelet/volume-plugins
cgroupDriver: cgroupfs
cgroupRoot: %s
failCgroupV1: false # it is what old machines have
failSwapOn: false
oomScoreAdj: 0 # without CAP_SYS_RESOURCE it may not be lowered
`, k.ca.file, k.control.addr, n.cgroup))
	n.kubelet = n.start("kubelet", exec.Command(needBuilt(k.t, "kubelet"), "--config", strings.TrimPrefix(config, n.root),
		"--kubeconfig", k.kubeconfig("system:node:"+n.name, "system:nodes"), "--node-ip", n.addr,
		"--node-labels", "topology.kubernetes.io/zone="+n.zone))
}

// startProxy gives the machine's pods the cluster's services.
func (n *kubeNode) startProxy(k *kubernetes) {
	k.t.Helper()
	config := writeFile(k.t, n.path("/var/lib/kube-proxy/config.yaml"), fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: %s}
mode: iptables
clusterCIDR: 10.79.0.0/16
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s} # the kernel's
oomScoreAdj: 0
`, k.kubeconfig("system:kube-proxy")))
	n.start("kube-proxy", exec.Command(needBuilt(k.t, "kube-proxy"), "--config", strings.TrimPrefix(config, n.root)))
}

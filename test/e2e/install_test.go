package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// installation is Larder on a cluster, and the registries from which the cluster's
// pods have their images.
type installation struct {
	k       *kubernetes
	r       *registry
	link    host // the registry's
	private *registry
	images  []string // what a node has before it joins: Larder's image and that of sandboxes
	program string   // what the pods run
	pushes  int      // so that every image is another
	first   app
}

// privateImages is the name under which images of the private registry go.
const privateImages = "private.test"

// app is what runs an image once on every node.
type app struct {
	name   string
	image  string
	secret string // the pods' imagePullSecret; "" = none
}

// proxyAddr is where runtimes find the agent of their node.
const proxyAddr = "127.0.0.1:5050"

// deployDir holds the chart and the plain manifest.
var deployDir = filepath.Join("..", "..", "deploy")

// TestKubernetes is the life of an installation, in order: from one command to
// none of it left, on a real control plane with real kubelets.
func TestKubernetes(t *testing.T) {
	i := newInstallation(t)
	steps := []struct {
		name   string
		before func() // on the cluster, for all further steps
		run    func(*testing.T)
	}{
		{"plain manifest", nil, i.plainManifest},
		{"one copy", nil, i.oneCopy},
		{"new node while the registry is down", func() { i.r.stop(); i.join() }, i.newNode},
		{"rolling restart", i.r.start, i.rollingRestart},
		{"private image", nil, i.privateImage},
		{"delete", nil, i.deletePlain},
		{"presets", nil, i.presets},
		{"helm", nil, i.helm},
		{"dead node", nil, i.deadNode},
		{"cleanup", func() { i.k.nodes[0].startKubelet(i.k) }, i.cleanup},
	}
	for _, s := range steps {
		if s.before != nil {
			s.before()
		}
		if !t.Run(s.name, s.run) {
			i.report(t)
			return
		}
	}
}

func newInstallation(t *testing.T) *installation {
	t.Helper()
	i := &installation{k: newKubernetes(t), program: filepath.Join(tempDir(t), "pause")}
	image, err := filepath.Abs(filepath.Join("..", "..", "dist", "larder-image.tar"))
	if err == nil {
		_, err = os.Stat(image)
	}
	if err != nil {
		unavailable(t, "%v: run the tests with `make e2e-k8s`", err)
	}
	command(t, "go", "build", "-o", i.program, "./pause")
	i.images = []string{image, saveImage(t, sandboxImage, buildProgram(t, i.program, 1, 1))}
	i.link = i.k.network.attach()
	i.r, i.private = startRegistryOn(t, i.link), startPrivateRegistryOn(t, i.k.network.attach())
	for range clusterSize {
		i.join()
	}
	return i
}

// join adds a node.
func (i *installation) join() {
	i.k.join(map[string]*registry{clusterImages: i.r, privateImages: i.private}, i.images...)
}

// plainManifest is the one command: the agents start, have the same key, and tell
// their nodes' runtimes of themselves.
func (i *installation) plainManifest(t *testing.T) {
	t.Log(i.k.kubectl(t, "apply", "-f", filepath.Join(deployDir, "larder.yaml")))
	i.awaitAgents(t, i.k.nodes...)
	for _, n := range i.k.nodes {
		if snapshot(t, n.etc) == n.before {
			t.Errorf("%s: no host configuration; what comes next proves nothing", n.name)
		}
	}
}

// wantCalm: no agent has died or has called for an operator.
func (i *installation) wantCalm(t *testing.T) {
	t.Helper()
	restarts := i.k.kubectl(t, "--namespace", "larder", "get", "pods", "--selector", agents, "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount}")
	if strings.Trim(restarts, "0 ") != "" {
		t.Errorf("agents were restarted: %s", restarts)
	}
	logs := i.k.kubectl(t, "--namespace", "larder", "logs", "--selector", agents, "--prefix", "--tail", "-1")
	for line := range strings.Lines(logs) {
		if strings.Contains(line, `"level":"ERROR"`) || strings.Contains(line, "panic") {
			t.Errorf("an agent logged %s", line)
		}
	}
}

// awaitAgents waits until there is an agent on each of these nodes and each knows
// all of them and its own zone.
func (i *installation) awaitAgents(t *testing.T, nodes ...*kubeNode) {
	t.Helper()
	eventually(t, 90*time.Second, "every node has an agent that knows the others", func() error {
		for _, n := range nodes {
			out, err := i.larder(n, "status", "--json")
			if err != nil {
				return err
			}
			if s := decode[agentStatus](t, out); !s.Ready || len(s.Members) != len(nodes) || s.zone() != n.zone {
				return fmt.Errorf("%s: %s", n.name, out)
			}
		}
		return nil
	})
	i.k.kubectl(t, "--namespace", "larder", "rollout", "status", "daemonset/larder", "--timeout", "60s")
}

// agentStatus is what the tests want of `larder status --json`.
type agentStatus struct {
	Ready   bool
	Members []struct {
		Zone string
		Self bool
	}
}

// zone is the agent's own.
func (s agentStatus) zone() string {
	for _, m := range s.Members {
		if m.Self {
			return m.Zone
		}
	}
	return ""
}

// agents selects the pods of the DaemonSet.
const agents = "app.kubernetes.io/name=larder"

// larder runs a command in the agent's container on a node.
func (i *installation) larder(n *kubeNode, args ...string) (string, error) {
	pod, err := i.k.try(i.k.kubectlBin, "--namespace", "larder", "get", "pods", "--selector", agents, "--field-selector", "spec.nodeName="+n.name, "-o", "name")
	if err == nil && pod == "" {
		err = fmt.Errorf("no agent on %s", n.name)
	}
	if err != nil {
		return "", err
	}
	return i.k.try(i.k.kubectlBin, append([]string{"--namespace", "larder", "exec", strings.TrimSpace(pod), "--", "larder"}, args...)...)
}

// push makes a new app with layers of these sizes.
func (i *installation) push(t *testing.T, sizes ...int) (app, pushed) {
	t.Helper()
	return i.pushTo(t, i.r, clusterImages, sizes...)
}

func (i *installation) pushTo(t *testing.T, r *registry, host string, sizes ...int) (app, pushed) {
	t.Helper()
	i.pushes++
	name := fmt.Sprintf("app-%d", i.pushes)
	image := r.on(t).pushImage(name, buildProgram(t, i.program, uint64(1000*i.pushes), sizes...))
	return app{name: name, image: host + "/" + image.repository + ":" + image.tag}, image
}

// deploy runs an app and waits until all its pods run.
func (i *installation) deploy(t *testing.T, a app) {
	t.Helper()
	i.k.apply(t, a.manifest(len(i.k.nodes)))
	i.k.kubectl(t, "rollout", "status", "deployment/"+a.name, "--timeout", "120s")
}

func (a app) manifest(nodes int) string {
	secrets := "[]"
	if a.secret != "" {
		secrets = "[{name: " + a.secret + "}]"
	}
	return fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      affinity:
        podAntiAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            - {topologyKey: kubernetes.io/hostname, labelSelector: {matchLabels: {app: %[1]s}}}
      imagePullSecrets: %[3]s
      containers: [{name: app, image: %[4]q, imagePullPolicy: Always}]
`, a.name, nodes, secrets, a.image)
}

// oneCopy starts a Deployment with a pod on each node: the registry gives every
// byte once.
func (i *installation) oneCopy(t *testing.T) {
	var image pushed
	i.first, image = i.push(t, 4<<10, 300<<10, 12<<20)
	i.wantOneCopy(t, image, i.r.on(t).during(func() { i.deploy(t, i.first) }))
}

// wantOneCopy: the registry gave agents each byte of an image once.
func (i *installation) wantOneCopy(t *testing.T, image pushed, seen accessList) {
	t.Helper()
	var bytes int64
	for _, b := range blobReads(seen) {
		bytes += b.bytes
	}
	t.Logf("%d bytes of %d from the registry", bytes, image.size)
	if bytes < image.size || bytes > image.size*11/10 {
		t.Errorf("%d nodes took %d bytes from the registry, want one copy, %d: %v", len(i.k.nodes), bytes, image.size, seen)
	}
	// A kubelet that may not read the pod's secret yet, as the API server's node authorizer
	// has it for a moment, pulls without: the agent refuses that, and the registry after it.
	refused := func(a access) bool { return a.status == http.StatusUnauthorized }
	if direct := slices.DeleteFunc(byRuntime(seen), refused); len(direct) > 0 {
		t.Errorf("containerd went past the agent: %v", direct)
	}
}

// newNode: a node that has just joined runs what the others run, from them alone.
func (i *installation) newNode(t *testing.T) {
	i.awaitAgents(t, i.k.nodes...)
	i.deploy(t, i.first)
	n := i.k.nodes[len(i.k.nodes)-1]
	parts := origins(t, must(t)(i.larder(n, "explain", "--json", i.first.image)))
	for what, from := range parts {
		for _, origin := range from {
			if !strings.HasPrefix(origin, "peer node-") {
				t.Errorf("%s got %s from %q, want a peer", n.name, what, origin)
			}
		}
	}
	if len(parts) < 6 { // the manifest, the config and four layers
		t.Errorf("%s knows %d parts only: %v", n.name, len(parts), parts)
	}
	i.wantCalm(t)
}

// rollingRestart replaces every agent.
func (i *installation) rollingRestart(t *testing.T) {
	i.pullDuring(t, func() error {
		_, err := i.k.try(i.k.kubectlBin, "--namespace", "larder", "rollout", "restart", "daemonset/larder")
		return errors.Join(err, i.rolled())
	})
	i.wantCalm(t)
}

// rolled waits until every agent is the DaemonSet's newest.
func (i *installation) rolled() error {
	_, err := i.k.try(i.k.kubectlBin, "--namespace", "larder", "rollout", "status", "daemonset/larder", "--timeout", "120s")
	return err
}

// pullDuring pulls images on all nodes, one after the other and without a pause, until
// change returns: no pull may fail, and no runtime be told of a port that refuses.
func (i *installation) pullDuring(t *testing.T, change func() error) {
	t.Helper()
	// So that a pull takes a second, and some agent stops in the middle of one.
	i.link.command(t, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "100mbit", "burst", "256kb", "latency", "50ms")
	defer i.link.command(t, "tc", "qdisc", "del", "dev", "eth0", "root")
	failed := func() string {
		return i.k.kubectl(t, "get", "events", "--field-selector", "reason=Failed", "-o", `jsonpath={range .items[*]}{.metadata.name}: {.message}{"\n"}{end}`)
	}
	before, failedBefore, pulls := i.r.on(t).accesses(), failed(), 0
	ended := make(chan struct{})
	var changing sync.WaitGroup
	defer changing.Wait()
	changing.Go(func() {
		defer close(ended)
		if err := change(); err != nil {
			t.Error(err)
		}
	})
	for _, n := range i.k.nodes {
		changing.Go(func() { n.wantNoDeadMirror(t, ended) })
	}
	for pulling := true; pulling; pulls++ {
		a, _ := i.push(t, 12<<20)
		i.deploy(t, a)
		i.k.kubectl(t, "delete", "deployment", a.name)
		pulling = !closed(ended)
	}
	direct := byRuntime(blobReads(i.r.on(t).accesses()[len(before):]))
	t.Logf("%d images on %d nodes meanwhile; of the blobs, containerd fetched %d itself", pulls, len(i.k.nodes), len(direct))
	if now := failed(); now != failedBefore {
		t.Errorf("pulls failed:\n%s\nbefore:\n%s", now, failedBefore)
	}
}

// wantNoDeadMirror looks, until ended is closed, whether the node's runtime is told of a
// port that refuses. Two looks in a row count: one may have begun before an agent stopped
// and ended after the next one started. And it must have been told of one at some time.
func (n *kubeNode) wantNoDeadMirror(t *testing.T, ended <-chan struct{}) {
	told := func() bool {
		body, err := os.ReadFile(n.path("/etc/containerd/certs.d/_default/hosts.toml"))
		return err == nil && strings.Contains(string(body), proxyAddr)
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	ever := false
	for dead := 0; !closed(ended); <-tick.C {
		before := told()
		ever = ever || before
		conn, err := n.dial(t.Context(), "tcp", proxyAddr)
		if err == nil {
			conn.Close()
		}
		if err == nil || !before || !told() {
			dead = 0
		} else if dead++; dead == 2 {
			t.Errorf("%s: hosts.toml names %s: %v", n.name, proxyAddr, err)
			return
		}
	}
	if !ever {
		t.Errorf("%s: hosts.toml never named %s", n.name, proxyAddr)
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// privateImage: pods that have the secret get the image, once for all nodes; pods
// that do not are refused, though every node has it.
func (i *installation) privateImage(t *testing.T) {
	i.k.kubectl(t, "create", "secret", "docker-registry", "private", "--docker-server", privateImages,
		"--docker-username", ann.Username, "--docker-password", ann.Password)
	a, image := i.pushTo(t, i.private, privateImages, 4<<10, 300<<10, 12<<20)
	stranger := app{name: "stranger", image: a.image}
	a.secret = "private"
	i.wantOneCopy(t, image, i.private.on(t).during(func() { i.deploy(t, a) }))

	i.k.apply(t, stranger.manifest(len(i.k.nodes)))
	eventually(t, 60*time.Second, "every node refuses the stranger", func() error {
		said := i.k.kubectl(t, "get", "pods", "--selector", "app=stranger",
			"-o", `jsonpath={range .items[*]}{.status.phase}: {.status.containerStatuses[*].state.waiting.reason}{"\n"}{end}`)
		if n := len(regexp.MustCompile(`(?m)^Pending: (ErrImagePull|ImagePullBackOff)$`).FindAllString(said, -1)); n != len(i.k.nodes) {
			return fmt.Errorf("%s", said)
		}
		return nil
	})
	i.k.kubectl(t, "delete", "deployment", stranger.name)
	i.wantCalm(t)
}

// deletePlain removes what plainManifest has made; every node must be as it was.
func (i *installation) deletePlain(t *testing.T) {
	i.pullDuring(t, func() error {
		_, err := i.k.try(i.k.kubectlBin, "delete", "-f", filepath.Join(deployDir, "larder.yaml"), "--timeout", "90s")
		return err
	})
	i.wantUntouched(t, i.k.nodes...)
	a, image := i.push(t, 4<<10)
	seen := i.r.on(t).during(func() { i.deploy(t, a) })
	if direct := byRuntime(blobReads(seen)); len(direct) < len(image.layers)*len(i.k.nodes) {
		t.Errorf("without Larder, want every node to fetch every layer itself: %v", seen)
	}
}

// presets: the API server accepts every preset of the chart, field by field.
func (i *installation) presets(t *testing.T) {
	presets, err := filepath.Glob(filepath.Join(deployDir, "chart", "presets", "*.yaml"))
	if err != nil || len(presets) == 0 {
		t.Fatalf("no presets: %v", err)
	}
	// What a dry run makes is not there for the pod that needs it.
	i.k.kubectl(t, "create", "namespace", "presets")
	i.k.kubectl(t, "--namespace", "presets", "create", "serviceaccount", "larder")
	for _, preset := range presets {
		t.Run(filepath.Base(preset), func(t *testing.T) {
			manifest := i.k.helm(t, "template", "larder", filepath.Join(deployDir, "chart"), "--namespace", "presets", "--values", preset)
			file := writeFile(t, filepath.Join(tempDir(t), "manifest.yaml"), manifest)
			t.Log(i.k.kubectl(t, "apply", "--dry-run=server", "--validate=strict", "-f", file))
		})
	}
}

// helm installs the chart, tests it with its own test, upgrades it, which keeps the key
// and takes the last node out, and takes that back.
func (i *installation) helm(t *testing.T) {
	release, chart := []string{"--namespace", "larder", "--wait", "--timeout", "120s"}, filepath.Join(deployDir, "chart")
	i.k.helm(t, append([]string{"install", "larder", chart, "--create-namespace"}, release...)...)
	i.awaitAgents(t, i.k.nodes...)
	t.Log(i.k.helm(t, "test", "larder", "--namespace", "larder", "--logs"))
	i.second(t)

	key, last := i.key(t), len(i.k.nodes)-1
	for _, n := range i.k.nodes[:last] {
		i.k.kubectl(t, "label", "node", n.name, "larder=yes")
	}
	i.pullDuring(t, func() error {
		_, err := i.k.try(i.k.helmBin, append([]string{"upgrade", "larder", chart, "--set-string", "nodeSelector.larder=yes"}, release...)...)
		return errors.Join(err, i.rolled())
	})
	i.awaitAgents(t, i.k.nodes[:last]...)
	i.wantUntouched(t, i.k.nodes[last])
	i.pullDuring(t, func() error {
		_, err := i.k.try(i.k.helmBin, append([]string{"rollback", "larder", "1"}, release...)...)
		return errors.Join(err, i.rolled())
	})
	i.awaitAgents(t, i.k.nodes...)
	if i.key(t) != key {
		t.Error("the upgrade or its rollback changed the cluster key")
	}
	i.wantCalm(t)
}

// deadNode: an agent dies with its node, and before the node comes back the chart is
// removed.
func (i *installation) deadNode(t *testing.T) {
	n := i.k.nodes[0]
	id := i.k.kubectl(t, "--namespace", "larder", "get", "pods", "--selector", agents, "--field-selector", "spec.nodeName="+n.name,
		"-o", "jsonpath={.items[*].status.containerStatuses[*].containerID}")
	n.kubelet.kill()
	n.ctr(t, "tasks", "kill", "--signal", "SIGKILL", strings.TrimPrefix(id, "containerd://"))
	i.k.helm(t, "uninstall", "larder", "--namespace", "larder")
	i.k.kubectl(t, "--namespace", "larder", "delete", "pods", "--field-selector", "spec.nodeName="+n.name, "--force", "--grace-period", "0")
	i.wantUntouched(t, i.k.nodes[1:]...)
	if snapshot(t, n.etc) == n.before {
		t.Error("the dead agent left nothing; what comes next proves nothing")
	}
}

// cleanup does what the head of cleanup.yaml tells people to do.
func (i *installation) cleanup(t *testing.T) {
	manifest, err := os.ReadFile(filepath.Join(deployDir, "cleanup.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	command := strings.Join(regexp.MustCompile(`(?m)^#   .*$`).FindAllString(string(manifest), -1), "\n")
	t.Log(must(t)(i.k.try("sh", "-c", "cd "+deployDir+"\n"+strings.ReplaceAll(command, "#", ""))))
	i.k.kubectl(t, "--namespace", "kube-system", "wait", "--for=condition=Complete", "jobs", "--selector", "app.kubernetes.io/name=larder-cleanup", "--timeout", "90s")
	i.wantUntouched(t, i.k.nodes...)
}

// key is the cluster key.
func (i *installation) key(t *testing.T) string {
	t.Helper()
	key := i.k.kubectl(t, "--namespace", "larder", "get", "secret", "larder", "-o", "jsonpath={.data.key}")
	if key == "" {
		t.Error("no cluster key")
	}
	return key
}

// second: another installation beside the first one does not start, and says why.
func (i *installation) second(t *testing.T) {
	i.k.helm(t, "install", "other", filepath.Join(deployDir, "chart"), "--namespace", "other", "--create-namespace")
	defer i.k.helm(t, "uninstall", "other", "--namespace", "other", "--wait")
	eventually(t, 30*time.Second, "each pod is Pending and says why", func() error {
		said := i.k.kubectl(t, "--namespace", "other", "get", "pods",
			"-o", `jsonpath={range .items[*]}{.status.phase}: {.status.conditions[*].message}{"\n"}{end}`)
		why := regexp.MustCompile(`(?m)^Pending: .*1 node\(s\) didn't have free ports for the requested pod ports`)
		if n := len(why.FindAllString(said, -1)); n != len(i.k.nodes) {
			return fmt.Errorf("%s", said)
		}
		return nil
	})
	i.awaitAgents(t, i.k.nodes...)
}

// wantUntouched: there is no agent on these nodes, nor a trace of one in /etc.
func (i *installation) wantUntouched(t *testing.T, nodes ...*kubeNode) {
	t.Helper()
	for _, n := range nodes {
		i.k.kubectl(t, "wait", "--for=delete", "pods", "--all-namespaces", "--selector", agents,
			"--field-selector", "spec.nodeName="+n.name, "--timeout", "60s")
		if after := snapshot(t, n.etc); after != n.before {
			t.Errorf("%s: /etc is\n%s\nwant what was there before the agent:\n%s", n.name, after, n.before)
		}
	}
}

// report shows the cluster after a failure; the processes' logs follow.
func (i *installation) report(t *testing.T) {
	for _, args := range [][]string{
		{"get", "nodes,pods,daemonsets,deployments", "--all-namespaces", "-o", "wide"},
		{"get", "events", "--all-namespaces", "--field-selector", "type!=Normal"},
		{"describe", "pods", "--namespace", "larder"},
		{"logs", "--namespace", "larder", "--selector", agents, "--prefix", "--tail", "100"},
	} {
		out, err := i.k.try(i.k.kubectlBin, args...)
		t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, tail([]byte(out), 16<<10))
	}
}

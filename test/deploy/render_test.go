package deploy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	k8syaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

const (
	deployDir = "../../deploy"
	chartDir  = deployDir + "/chart"
)

// presets are the values files beside the chart, by name.
func presets(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob(chartDir + "/presets/*.yaml")
	if err != nil || len(files) < 9 {
		t.Fatalf("%d presets, %v", len(files), err)
	}
	out := map[string]string{}
	for _, f := range files {
		out[strings.TrimSuffix(filepath.Base(f), ".yaml")] = f
	}
	return out
}

// helm runs Helm as on a machine that has never seen it.
func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	bin := os.Getenv("LARDER_TOOLS_BIN")
	if bin == "" {
		t.Fatal("LARDER_TOOLS_BIN is not set; run `make deploy-test`, which builds Helm")
	}
	home := t.TempDir()
	cmd := exec.Command(filepath.Join(bin, "helm"), args...)
	cmd.Env = append(os.Environ(), "HOME="+home, "KUBECONFIG="+filepath.Join(home, "none"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = errors.New(strings.TrimSpace(stderr.String()))
	}
	return string(out), err
}

func template(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return helm(t, append([]string{"template", "larder", chartDir, "--namespace", "larder"}, args...)...)
}

// render is template for values that must be good.
func render(t *testing.T, args ...string) string {
	t.Helper()
	text, err := template(t, args...)
	if err != nil {
		t.Fatalf("helm template %s: %v", strings.Join(args, " "), err)
	}
	return text
}

// objects is a manifest, read by the types of the API; an unknown field is an error.
type objects struct {
	daemonSets      []*appsv1.DaemonSet
	jobs            []*batchv1.Job
	pods            []*corev1.Pod
	services        []*corev1.Service
	secrets         []*corev1.Secret
	configMaps      []*corev1.ConfigMap
	serviceAccounts []*corev1.ServiceAccount
	quotas          []*corev1.ResourceQuota
	namespaces      []*corev1.Namespace
	roles           []*rbacv1.Role
	roleBindings    []*rbacv1.RoleBinding
	others          []*unstructured.Unstructured // of the Prometheus operator
}

func parse(t *testing.T, manifest string) *objects {
	t.Helper()
	var o objects
	docs := k8syaml.NewYAMLReader(bufio.NewReader(strings.NewReader(manifest)))
	for {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return &o
		}
		if err == nil {
			err = o.add(doc)
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
	}
}

func (o *objects) add(doc []byte) error {
	var meta metav1.TypeMeta
	if err := yaml.Unmarshal(doc, &meta); err != nil || meta.Kind == "" {
		return err // comments alone
	}
	switch meta.APIVersion + " " + meta.Kind {
	case "apps/v1 DaemonSet":
		return decode(doc, &o.daemonSets)
	case "batch/v1 Job":
		return decode(doc, &o.jobs)
	case "v1 Pod":
		return decode(doc, &o.pods)
	case "v1 Service":
		return decode(doc, &o.services)
	case "v1 Secret":
		return decode(doc, &o.secrets)
	case "v1 ConfigMap":
		return decode(doc, &o.configMaps)
	case "v1 ServiceAccount":
		return decode(doc, &o.serviceAccounts)
	case "v1 ResourceQuota":
		return decode(doc, &o.quotas)
	case "v1 Namespace":
		return decode(doc, &o.namespaces)
	case "rbac.authorization.k8s.io/v1 Role":
		return decode(doc, &o.roles)
	case "rbac.authorization.k8s.io/v1 RoleBinding":
		return decode(doc, &o.roleBindings)
	case "monitoring.coreos.com/v1 ServiceMonitor", "monitoring.coreos.com/v1 PodMonitor", "monitoring.coreos.com/v1 PrometheusRule":
		u := &unstructured.Unstructured{}
		o.others = append(o.others, u)
		return yaml.Unmarshal(doc, &u.Object)
	}
	return fmt.Errorf("an object of kind %s %s", meta.APIVersion, meta.Kind)
}

func decode[T any](doc []byte, list *[]*T) error {
	object := new(T)
	*list = append(*list, object)
	return yaml.UnmarshalStrict(doc, object)
}

// agent is the one container of a DaemonSet.
func agentOf(d *appsv1.DaemonSet) *corev1.Container { return &d.Spec.Template.Spec.Containers[0] }

// config is the larder.toml of a manifest.
func (o *objects) config(t *testing.T) string {
	t.Helper()
	i := slices.IndexFunc(o.configMaps, func(c *corev1.ConfigMap) bool { return c.Data["larder.toml"] != "" })
	if i < 0 {
		t.Fatal("no larder.toml")
	}
	return o.configMaps[i].Data["larder.toml"]
}

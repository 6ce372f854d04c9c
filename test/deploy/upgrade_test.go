package deploy

import (
	"encoding/json"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/version"
)

// TestUpgradeKeepsTheKey renders the chart for a cluster that has the Secret
// already. The cluster is as much of an API server as Helm's lookup asks; the
// tests of a whole cluster do it with the real one.
func TestUpgradeKeepsTheKey(t *testing.T) {
	for _, tt := range []struct {
		name string
		data map[string][]byte
		keep bool
	}{
		{"a key", map[string][]byte{"key": []byte("c29tZSBrZXk=\nYW5vdGhlcg==\n")}, true}, // two, while it is rolled
		{"a Secret without a key", map[string][]byte{"other": []byte("x")}, false},
		{"an empty Secret", nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			secret := &corev1.Secret{Data: tt.data, ObjectMeta: metav1.ObjectMeta{Name: "larder", Namespace: "larder",
				Labels:      map[string]string{"app.kubernetes.io/managed-by": "Helm"},
				Annotations: map[string]string{"meta.helm.sh/release-name": "larder", "meta.helm.sh/release-namespace": "larder"}}}
			o := parse(t, render(t, "--dry-run=server", "--disable-openapi-validation", "--kubeconfig", serveSecret(t, secret)))
			if len(o.secrets) != 1 {
				t.Fatalf("%d Secrets", len(o.secrets))
			}
			got := string(o.secrets[0].Data["key"])
			if (got == string(tt.data["key"])) != tt.keep || got == "" {
				t.Errorf("the key becomes %q", got)
			}
		})
	}
}

// TestKeyIsNotDeleted holds that an upgrade does not delete the Secret of its release
// where the agents go on with it: after it they would have another key, or none.
func TestKeyIsNotDeleted(t *testing.T) {
	own := map[string]string{"meta.helm.sh/release-name": "larder", "meta.helm.sh/release-namespace": "larder"}
	kept := map[string]string{"helm.sh/resource-policy": "keep"}
	maps.Copy(kept, own)
	for _, tt := range []struct {
		name  string
		notes map[string]string
		value string
		bad   bool
	}{
		{"a Job from now on", own, "key.generate=cluster", true},
		{"the same Secret as one's own", own, "key.existingSecret=larder", true},
		{"kept", kept, "key.generate=cluster", false},
		{"kept as one's own", kept, "key.existingSecret=larder", false},
		{"made by the Job", nil, "key.generate=cluster", false},
		{"of another release", map[string]string{"meta.helm.sh/release-name": "other"}, "key.existingSecret=larder", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "larder", Namespace: "larder", Annotations: tt.notes}}
			_, err := template(t, "--dry-run=server", "--disable-openapi-validation", "--kubeconfig", serveSecret(t, secret), "--set", tt.value)
			if bad := err != nil && strings.Contains(err.Error(), "annotate secret larder helm.sh/resource-policy=keep"); bad != tt.bad || !bad && err != nil {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestWhoMakesTheKey holds that no rendering makes another key than the one before: a Helm
// that asks no cluster cannot know what is there.
func TestWhoMakesTheKey(t *testing.T) {
	asks := []string{"--dry-run=server", "--disable-openapi-validation", "--kubeconfig", serveSecret(t, nil)}
	if o := parse(t, render(t, asks...)); len(o.secrets) != 1 || len(o.jobs) != 0 {
		t.Errorf("with a cluster without a key: %d Secrets and %d Jobs", len(o.secrets), len(o.jobs))
	}
	text := render(t)
	if o := parse(t, text); len(o.secrets) != 0 || len(o.jobs) != 1 {
		t.Errorf("without a cluster: %d Secrets and %d Jobs", len(o.secrets), len(o.jobs))
	}
	if again := render(t); again != text {
		t.Error("rendered again, it is another text")
	}
}

func resources(group string, kinds ...string) metav1.APIResourceList {
	list := metav1.APIResourceList{TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: group}
	for _, k := range kinds {
		list.APIResources = append(list.APIResources, metav1.APIResource{Name: strings.ToLower(k) + "s", Kind: k, Namespaced: true, Verbs: []string{"get"}})
	}
	return list
}

func group(name string) metav1.APIGroup {
	return metav1.APIGroup{Name: name, Versions: []metav1.GroupVersionForDiscovery{{GroupVersion: name + "/v1", Version: "v1"}}}
}

// serveSecret is a cluster whose namespace has that Secret or, with nil, none; it returns
// the path of a kubeconfig.
func serveSecret(t *testing.T, secret *corev1.Secret) string {
	t.Helper()
	list := corev1.SecretList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "SecretList"}}
	if secret != nil {
		secret.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}
		list.Items = append(list.Items, *secret)
	}
	answers := map[string]any{
		"/version": version.Info{Major: "1", Minor: "36", GitVersion: "v1.36.0"},
		"/api":     metav1.APIVersions{TypeMeta: metav1.TypeMeta{Kind: "APIVersions"}, Versions: []string{"v1"}},
		"/apis": metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}, Groups: []metav1.APIGroup{
			group("apps"), group("batch"), group("rbac.authorization.k8s.io")}},
		"/api/v1":                            resources("v1", "Secret", "ConfigMap", "Service", "ServiceAccount", "ResourceQuota", "Pod"),
		"/apis/apps/v1":                      resources("apps/v1", "DaemonSet"),
		"/apis/batch/v1":                     resources("batch/v1", "Job"),
		"/apis/rbac.authorization.k8s.io/v1": resources("rbac.authorization.k8s.io/v1", "Role", "RoleBinding"),
		"/api/v1/namespaces/larder/secrets":  list,
	}
	if secret != nil {
		answers["/api/v1/namespaces/larder/secrets/"+secret.Name] = secret
	}
	asked := false
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = asked || strings.HasSuffix(r.URL.Path, "/secrets/larder")
		answer, ok := answers[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(func() {
		s.Close()
		if !asked {
			t.Error("Helm never asked for the Secret")
		}
	})
	config := filepath.Join(t.TempDir(), "kubeconfig")
	body := `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c"}}],"clusters":[{"name":"c","cluster":{"server":"` + s.URL + `"}}]}`
	if err := os.WriteFile(config, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	return config
}

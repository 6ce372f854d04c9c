package e2e

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
)

// htpasswd lets in ann with the password "secret" (bcrypt).
const htpasswd = "ann:$2a$04$dZaAod92/h6WQD.tuTVWQeQnfSPUcVwDnRwEASO.RGvMylNZkaLRq\n"

// startPrivateRegistry runs a registry that lets in ann alone.
func startPrivateRegistry(t *testing.T, kind registryKind) *registry {
	t.Helper()
	return startGuarded(t, kind, net.JoinHostPort("127.0.0.1", strconv.Itoa(freePort(t))), annAlone(t), basicAnn)
}

// annAlone is the section auth of such a registry's configuration.
func annAlone(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf("{htpasswd: {realm: test, path: %s}}", writeFile(t, filepath.Join(tempDir(t), "htpasswd"), htpasswd))
}

func basicAnn(string) string { return basic(ann) }

// ann is who may read what private registries hold.
var ann = authn.Basic{Username: "ann", Password: "secret"}

// basic is the Authorization header that such a client sends.
func basic(b authn.Basic) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(b.Username+":"+b.Password))
}

// authorized sends all requests with one Authorization. The library that pushes
// would find tokens by itself, but not from a service on loopback.
type authorized struct {
	authorization string
	base          http.RoundTripper
}

func (a authorized) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", a.authorization)
	return a.base.RoundTrip(r)
}

// pushPrivate pushes an ordinary image as ann. The returned name is that of its
// tag, at the registry's own address.
func (r *registry) pushPrivate(repository string, seed uint64) (img pushed, name string) {
	r.t.Helper()
	img = r.pushImage(repository, buildImage(r.t, ociImage, runtime.GOARCH, seed, ordinarySizes))
	return img, r.addr + "/" + repository + ":" + tag
}

// writeProgram writes a shell script. It is written under another name, so that
// no process that is being started meanwhile holds it open for writing.
func writeProgram(t *testing.T, path, body string) {
	t.Helper()
	writeFile(t, path+".new", "#!/bin/sh\n"+body)
	if err := errors.Join(os.Chmod(path+".new", 0o755), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

// TestNodeCredentials pulls private images with runtimes that have no
// credential, by the node's own: from each source, with containerd over CRI and
// with podman and skopeo, which never send a mirror one. Repositories that are not
// marked, and all of them once the agent is gone, stay closed.
func TestNodeCredentials(t *testing.T) {
	t.Parallel()
	needRoot(t)
	clients := []imageClient{newPodman(t), newSkopeo(t)}
	r := startPrivateRegistry(t, docker28)
	_, marked := r.pushPrivate("team/app", 40)
	_, other := r.pushPrivate("other/app", 41)
	for _, source := range []string{"file", "helper", "plugin"} {
		t.Run(source, func(t *testing.T) {
			home, bin := tempDir(t), tempDir(t)
			dropIns := writeContainersConfig(t, home, r)
			c := startContainerd(t, containerdVersions[0])
			writeHostsTOML(t, c.certs, r.addr, r)
			config := registryTable(r.addr, r) + "auth = \"node\"\nnode_repositories = [\"team/**\"]\n"
			file := filepath.Join(bin, "config.json")
			switch source {
			case "file":
				writeFile(t, file, fmt.Sprintf(`{"auths": {"%s/team": {"username": "ann", "password": "secret"}}}`, r.addr))
				config += fmt.Sprintf("credentials_file = %q\n", file)
			case "helper":
				writeProgram(t, filepath.Join(bin, "docker-credential-acme"), `cat >/dev/null; echo '{"Username": "ann", "Secret": "secret"}'`)
				writeFile(t, file, `{"credsStore": "acme"}`)
				config += fmt.Sprintf("credentials_file = %q\n", file)
			case "plugin":
				writeProgram(t, filepath.Join(bin, "acme"), fmt.Sprintf(`cat >/dev/null
echo '{"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1", "cacheKeyType": "Registry", "auth": {"%s": {"username": "ann", "password": "secret"}}}'
`, r.addr))
				file = writeFile(t, filepath.Join(bin, "config.yaml"), fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: acme
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ["%s"]
  defaultCacheDuration: 12h
`, r.addr))
				config = fmt.Sprintf("[node]\nimage_credential_provider_config = %q\nimage_credential_provider_bin_dir = %q\n", file, bin) + config
			}
			pulls := func(ref string) (worked []string) {
				for _, client := range clients {
					if _, err := client.pull(t, home, ref); err == nil {
						worked = append(worked, client.name)
					}
				}
				ctx, cancel := context.WithTimeout(t.Context(), pullTimeout)
				defer cancel()
				if err := c.pull(ctx, ref, nil); err == nil {
					worked = append(worked, c.version.name)
					c.remove(ref)
				}
				return worked
			}
			a := startAgent(t, agentOptions{containerd: c, crio: dropIns, config: config,
				flags: []string{"--hosts.registries", r.addr}, env: []string{"PATH=" + bin + ":" + os.Getenv("PATH")}})
			for _, phase := range []string{"cold", "warm"} {
				if worked := pulls(marked); len(worked) != len(clients)+1 {
					t.Errorf("%s: only %v could pull", phase, worked)
				}
			}
			if worked := pulls(other); len(worked) > 0 {
				t.Errorf("%v could pull what is not marked", worked)
			}
			a.stop()
			if worked := pulls(marked); len(worked) > 0 {
				t.Errorf("%v could pull without the agent; the test shows nothing", worked)
			}
		})
	}
}

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// htpasswd lets in ann with the password "secret" (bcrypt).
const htpasswd = "ann:$2a$04$dZaAod92/h6WQD.tuTVWQeQnfSPUcVwDnRwEASO.RGvMylNZkaLRq\n"

// startPrivateRegistry runs a registry that lets in ann alone. What of the
// returned registry asks without a password is of no use.
func startPrivateRegistry(t *testing.T) *registry {
	t.Helper()
	dir := tempDir(t)
	r := &registry{t: t, kind: docker28, addr: net.JoinHostPort("127.0.0.1", strconv.Itoa(freePort(t)))}
	r.config = writeFile(t, filepath.Join(dir, "config.yml"), fmt.Sprintf(`version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: %s}}
http: {addr: %s}
auth: {htpasswd: {realm: test, path: %s}}
`, filepath.Join(dir, "storage"), r.addr, writeFile(t, filepath.Join(dir, "htpasswd"), htpasswd)))
	r.proc = startProcess(t, r.kind.name, exec.Command(r.kind.bin(t), "serve", r.config))
	eventually(t, 30*time.Second, "registry answers", func() error {
		resp, err := r.client().Get(r.url() + "/v2/")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode != http.StatusUnauthorized {
				err = errors.New(resp.Status)
			}
		}
		return errors.Join(r.proc.dead(), err)
	})
	return r
}

// pushPrivate is push with ann's password; it returns the image's name.
func (r *registry) pushPrivate(repository string, seed uint64) string {
	r.t.Helper()
	ref, err := name.ParseReference(r.addr+"/"+repository+":v1", name.Insecure)
	if err == nil {
		image := buildImage(r.t, ociImage, runtime.GOARCH, seed, ordinarySizes)
		err = remote.Write(ref, image, remote.WithTransport(r.transport()), remote.WithAuth(&authn.Basic{Username: "ann", Password: "secret"}))
	}
	if err != nil {
		r.t.Fatalf("push %s: %v", repository, err)
	}
	return ref.String()
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
	r := startPrivateRegistry(t)
	marked, other := r.pushPrivate("team/app", 40), r.pushPrivate("other/app", 41)
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

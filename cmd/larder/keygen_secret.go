package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// serviceAccountDir is where kubelet puts a pod's credentials for the API.
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// pod is the way to the API server of a pod that has a service account. One
// request is all that is ever made, so no Kubernetes client is built in.
type pod struct {
	base, token, namespace string
	client                 *http.Client
}

// thisPod finds its way as every in-cluster client does
// (kubernetes.io/docs/tasks/run-application/access-api-from-pod).
func thisPod(dir string) (*pod, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, usageError{errors.New("--secret works in a pod of a Kubernetes cluster; elsewhere pipe `larder keygen` into kubectl create secret")}
	}
	read := func(name string) (string, error) {
		body, err := os.ReadFile(filepath.Join(dir, name))
		return strings.TrimSpace(string(body)), err
	}
	token, err := read("token")
	namespace, err2 := read("namespace")
	authority, err3 := read("ca.crt")
	if err := cmp.Or(err, err2, err3); err != nil {
		return nil, fmt.Errorf("this pod has no service account token (automountServiceAccountToken: true): %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(authority)) {
		return nil, fmt.Errorf("%s holds no certificate", filepath.Join(dir, "ca.crt"))
	}
	return &pod{
		base: "https://" + net.JoinHostPort(host, port), token: token, namespace: namespace,
		// The API server is reached directly: it is inside the cluster, a proxy is not.
		client: &http.Client{Timeout: apiTimeout, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}},
	}, nil
}

// apiTimeout is for one small request; the Job that asks tries again.
const apiTimeout = 10 * time.Second

type secretObject struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   secretMeta        `json:"metadata"`
	Type       string            `json:"type"`
	Data       map[string][]byte `json:"data"`
}

type secretMeta struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels"`
	Owners []ownerReference  `json:"ownerReferences,omitempty"`
}

type ownerReference struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Name       string `json:"name"`
	UID        string `json:"uid"`
}

// createSecret stores key under the name key, and reports whether it did: a
// Secret that exists is never looked at, let alone changed.
func (p *pod) createSecret(ctx context.Context, name, key string) (bool, error) {
	body, err := json.Marshal(secretObject{
		APIVersion: "v1", Kind: "Secret", Type: "Opaque",
		Metadata: secretMeta{Name: name, Labels: map[string]string{"app.kubernetes.io/name": "larder"}, Owners: p.owners()},
		Data:     map[string][]byte{"key": []byte(key + "\n")},
	})
	if err != nil {
		return false, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.base+"/api/v1/namespaces/"+p.namespace+"/secrets", bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	req.Header.Set("Authorization", "Bearer "+p.token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := p.client.Do(req)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close() // it was read
	switch resp.StatusCode {
	case http.StatusCreated:
		return true, nil
	case http.StatusConflict:
		return false, nil
	}
	return false, errors.New(statusMessage(resp))
}

// maxStatus is room for any message of the API server.
const maxStatus = 64 << 10

// statusMessage is what the API server says of a request that failed.
func statusMessage(resp *http.Response) string {
	var status struct{ Message string }
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxStatus)) // the code says enough
	if json.Unmarshal(body, &status) != nil || status.Message == "" {
		return "the API server answers " + resp.Status
	}
	return status.Message
}

// owners is the service account, as its token names it: when that is deleted,
// so is what it made. A token that does not name one makes a Secret of its own.
func (p *pod) owners() []ownerReference {
	parts := strings.Split(p.token, ".")
	if len(parts) != 3 {
		return nil
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Kubernetes struct {
			Account struct{ Name, UID string } `json:"serviceaccount"`
		} `json:"kubernetes.io"`
	}
	if err != nil || json.Unmarshal(body, &claims) != nil || claims.Kubernetes.Account.UID == "" {
		return nil
	}
	a := claims.Kubernetes.Account
	return []ownerReference{{APIVersion: "v1", Kind: "ServiceAccount", Name: a.Name, UID: a.UID}}
}

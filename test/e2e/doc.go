// Package e2e tests a Larder node as its users run it: the larder binary, real
// containerd 1.6 and 2.x over CRI, podman and skopeo, and real registries whose
// own access logs say what reached them. Everything runs as child processes on
// loopback addresses, or in network namespaces, and below one temporary directory.
//
// It needs root (containerd mounts file systems), the Debian packages that
// `make deps` installs, and the tools that test/tools/install.sh builds. With
// CI=true a missing one fails the run; elsewhere the tests that need it say so
// and are skipped.
//
// TestKubernetes, which `make e2e-k8s` runs alone, is the life of an installation on
// a real control plane and real kubelets, on machines made of namespaces.
package e2e

// Package deploy tests what installs Larder in a cluster: the Helm chart with
// its presets and switches, and the plain manifests made from it. Helm renders,
// the types of the Kubernetes API read the result, and the agent's own loader
// reads the configuration in it.
//
// `make deploy-test` runs it with Helm from test/tools/deploy. It is a module of
// its own because nothing else needs the Kubernetes types.
package deploy

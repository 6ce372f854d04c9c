#!/usr/bin/env bash
# Prints a manifest made from the chart, for those who want no Helm:
#
#   manifest.sh larder    the install
#   manifest.sh doctor    a pod that checks a node
#   manifest.sh cleanup   a Job that takes back what a killed agent left on a node
set -euo pipefail
cd "$(dirname "$0")"

# render leaves out what is Helm's own, and blank lines beyond one.
render() {
	helm template larder chart "$@" |
		sed -e '/helm\.sh\//d' -e '/^  annotations:$/d' -e 's/managed-by: Helm/managed-by: kubectl/' -e '/^# Source: /d' -e 's/ *$//' |
		awk 'NF { if (blank) print ""; print; blank = 0; next } { blank = 1 }'
}

case ${1:?usage: manifest.sh larder|doctor|cleanup} in
larder)
	cat <<-'EOF'
		# Larder on every node of a cluster that runs containerd:
		#
		#   kubectl apply -f larder.yaml
		#
		# The Job in it makes the key with which the agents recognise each other; they wait
		# for it. To bring a key of your own, make the Secret before, and the Job keeps it:
		#
		#   kubectl create namespace larder
		#   kubectl -n larder create secret generic larder --from-literal=key="$(head -c 32 /dev/urandom | base64)"
		#
		# The Job cannot be changed. To apply this again with another image, delete it before:
		#
		#   kubectl -n larder delete jobs -l app.kubernetes.io/name=larder
		#
		# Made from the chart by `make manifest`. For other runtimes and paths use the chart,
		# with one of its presets.
		apiVersion: v1
		kind: Namespace
		metadata:
		  name: larder
		  labels:
		    # An agent of the node needs hostNetwork and hostPath.
		    pod-security.kubernetes.io/enforce: privileged
	EOF
	render --namespace larder --skip-tests --set key.generate=cluster
	;;
doctor)
	cat <<-'EOF'
		# Checks one node, and says what to do:
		#
		#   kubectl apply -f doctor.yaml
		#   kubectl -n larder logs -f pod/larder-doctor
		#   kubectl delete -f doctor.yaml
		#
		# Made from the chart, whose `helm test` it is, by `make manifest`.
	EOF
	render --namespace larder --show-only templates/tests/doctor.yaml
	;;
cleanup)
	cat <<-'EOF'
		# Takes back what a killed agent left in the registry configuration of node NODE. On
		# every node, after Larder was deleted:
		#
		#   for node in $(kubectl get nodes -o jsonpath='{.items[*].metadata.name}'); do
		#     sed "s/-NODE/-$(echo $node | cksum | cut -d ' ' -f 1)/; s/NODE/$node/" cleanup.yaml | kubectl apply -f -; done
		#
		# Where an agent runs, it changes nothing. Made from the chart by `make manifest`.
	EOF
	render --namespace kube-system --set 'cleanup.nodes={NODE}' --show-only templates/cleanup.yaml
	;;
esac

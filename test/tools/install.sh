#!/usr/bin/env bash
# Builds the pinned tools that the tests run against (see each set's go.mod for the
# versions) and prints the directory that holds them.
#
#   install.sh runtimes   containerd 2.x, ctr, its shim and the distribution registry
#   install.sh kubernetes a control plane, kubelet, kubectl, CNI plugins and CoreDNS
#   install.sh lint       golangci-lint
#   install.sh deploy     helm
#
# The directory lies outside the tree and is named after everything that decides
# its content, so a second run builds nothing and two checkouts can share it.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")"

set_name=${1:?usage: install.sh runtimes|kubernetes|lint|deploy}
case $set_name in
runtimes) module=. ;;
kubernetes | lint | deploy) module=$set_name ;;
*) echo "install.sh: unknown set $set_name" >&2; exit 2 ;;
esac

cd "$module"
cache=${LARDER_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-tools}
key=$( (cat go.mod go.sum */*.go; go env GOVERSION GOOS GOARCH) | sha256sum | cut -c1-16)
dir=$cache/$set_name-$key

if [ ! -d "$dir" ]; then
	mkdir -p "$cache"
	tmp=$(mktemp -d "$cache/.build-XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	echo "building the $set_name tools into $dir (once; a few minutes)" >&2
	ldflags='-s -w'
	if [ "$set_name" = kubernetes ]; then
		# The version that clients and charts ask for is a matter of the linker.
		version=$(awk '$1 == "k8s.io/kubernetes" {print $2}' go.mod)
		IFS=. read -r major minor _ <<<"${version#v}"
		git=k8s.io/component-base/version.git
		ldflags+=" -X ${git}Version=$version -X ${git}Major=$major -X ${git}Minor=$minor"
	fi
	GOBIN=$tmp CGO_ENABLED=0 go install -ldflags "$ldflags" tool >&2
	# Another build may have been first; its result is the same.
	mv -T "$tmp" "$dir" 2>/dev/null || [ -d "$dir" ]
fi
echo "$dir"

#!/usr/bin/env bash
# Installs the pinned tools that the tests run against (see each set's go.mod, or
# package.json, for the versions) and prints the directory that holds them.
#
#   install.sh runtimes   containerd 2.x, ctr, its shim, the distribution registry and
#                         the distribution specification's conformance suite
#   install.sh kubernetes a control plane, kubelet, kubectl, CNI plugins and CoreDNS
#   install.sh lint       golangci-lint
#   install.sh deploy     helm
#   install.sh page       node_modules of the page's test (see ../page/package.json)
#
# The directory lies outside the tree and is named after everything that decides
# its content, so a second run builds nothing and two checkouts can share it.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")"

set_name=${1:?usage: install.sh runtimes|kubernetes|lint|deploy|page}
case $set_name in
runtimes) module=. ;;
kubernetes | lint | deploy) module=$set_name ;;
page) module=../page ;;
*) echo "install.sh: unknown set $set_name" >&2; exit 2 ;;
esac

cd "$module"
cache=${LARDER_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-tools}
case $set_name in
page) decides() { cat package.json; node --version; } ;;
*) decides() { cat go.mod go.sum */*.go; go env GOVERSION GOOS GOARCH; } ;;
esac
key=$(decides | sha256sum | cut -c1-16)
dir=$cache/$set_name-$key

# What kubectl and Helm ask a cluster for, its version, is a matter of the linker.
kubernetes_version() {
	local version major minor git=k8s.io/component-base/version.git
	version=$(awk '$1 == "k8s.io/kubernetes" {print $2}' go.mod)
	IFS=. read -r major minor _ <<<"${version#v}"
	echo "-X ${git}Version=$version -X ${git}Major=$major -X ${git}Minor=$minor"
}

go_tools() { GOBIN=$1 CGO_ENABLED=0 go install -ldflags "-s -w ${2:-}" tool; }

# package.json has the exact version; a lock would name a registry's host.
node_modules() {
	local version
	version=$(node -p 'require("./package.json").dependencies["playwright-core"]')
	npm install --prefix "$1" --no-package-lock --no-save --ignore-scripts --no-audit --no-fund "playwright-core@$version"
}

if [ ! -d "$dir" ]; then
	mkdir -p "$cache"
	tmp=$(mktemp -d "$cache/.build-XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	echo "building the $set_name tools into $dir (once; a few minutes)" >&2
	case $set_name in
	page) node_modules "$tmp" >&2 ;;
	kubernetes) go_tools "$tmp" "$(kubernetes_version)" >&2 ;;
	*) go_tools "$tmp" >&2 ;;
	esac
	# Another build may have been first; its result is the same.
	mv -T "$tmp" "$dir" 2>/dev/null || [ -d "$dir" ]
fi
echo "$dir"

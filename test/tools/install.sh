#!/usr/bin/env bash
# Builds the pinned tools that the tests run against (see go.mod and lint/go.mod
# for the versions) and prints the directory that holds them.
#
#   install.sh runtimes   containerd 2.x, ctr, its shim and the distribution registry
#   install.sh lint       golangci-lint
#   install.sh page       node_modules of the page's test (see ../page/package.json)
#
# The directory lies outside the tree and is named after everything that decides
# its content, so a second run builds nothing and two checkouts can share it.
set -euo pipefail
cd "$(dirname "$0")"

set_name=${1:?usage: install.sh runtimes|lint|page}
case $set_name in
runtimes) module=. ;;
lint) module=lint ;;
page) module=../page ;;
*) echo "install.sh: unknown set $set_name" >&2; exit 2 ;;
esac

cd "$module"
cache=${LARDER_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-tools}
case $set_name in
page) decides() { cat package.json; node --version; } ;;
*) decides() { cat go.mod go.sum; go env GOVERSION GOOS GOARCH; } ;;
esac
key=$(decides | sha256sum | cut -c1-16)
dir=$cache/$set_name-$key

if [ ! -d "$dir" ]; then
	mkdir -p "$cache"
	tmp=$(mktemp -d "$cache/.build-XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	echo "building the $set_name tools into $dir (once; a few minutes)" >&2
	case $set_name in
	# package.json has the exact version; a lock would name a registry's host.
	page) npm install --prefix "$tmp" --no-package-lock --no-save --ignore-scripts --no-audit --no-fund "playwright-core@$(node -p 'require("./package.json").dependencies["playwright-core"]')" >&2 ;;
	*) GOBIN=$tmp CGO_ENABLED=0 go install tool >&2 ;;
	esac
	# Another build may have been first; its result is the same.
	mv -T "$tmp" "$dir" 2>/dev/null || [ -d "$dir" ]
fi
echo "$dir"

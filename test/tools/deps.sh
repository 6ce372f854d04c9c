#!/usr/bin/env bash
# Installs what the tests run against, as root with apt; otherwise names what is
# missing and which tests cannot run without it. Packages are looked for by their
# commands, so that a machine with, say, Docker's containerd keeps it.
set -euo pipefail

# command, package, what needs it
needs='
gcc             gcc             the race detector
containerd      containerd      e2e: containerd from the distribution
runc            runc            e2e: containerd
docker-registry docker-registry e2e: pulling from a 2.8 registry
podman          podman          e2e: the CRI-O drop-in
skopeo          skopeo          e2e: the CRI-O drop-in
mkfs.ext4       e2fsprogs       e2e: a disk that hangs
mount           mount           e2e: a disk that hangs
nginx           nginx-light     benchmarks: throughput beside nginx
chromium        chromium        the page at admin.listen, in a browser
node            nodejs          the page at admin.listen, in a browser
npm             npm             the page at admin.listen, in a browser
ip              iproute2        storms in network namespaces
iptables        iptables        partitions between namespaces
'
PATH=$PATH:/usr/sbin:/sbin # a user's PATH has no daemons in it

packages=()
report=
while read -r cmd pkg why; do
	[ -n "$cmd" ] || continue
	command -v "$cmd" >/dev/null && continue
	packages+=("$pkg")
	report+="  $cmd (package $pkg): $why"$'\n'
done <<<"$needs"
# gcc alone cannot link: the C library's headers are a package of their own.
if [ ! -e /usr/include/stdio.h ]; then
	packages+=(libc6-dev)
	report+="  C headers (package libc6-dev): the race detector"$'\n'
fi

if [ ${#packages[@]} -gt 0 ]; then
	if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		export DEBIAN_FRONTEND=noninteractive
		apt-get update -qq
		# Never at the cost of something that is installed already.
		apt-get install -y -qq --no-remove --no-install-recommends "${packages[@]}"
		exit 0
	fi
	printf 'MISSING, and only root can install them (make deps, Debian or Ubuntu):\n%s' "$report"
	[ "${CI:-}" != true ] || exit 1
fi
if [ "$(id -u)" != 0 ]; then
	echo 'NOT ROOT: the end-to-end tests with containerd and podman will not run.'
	[ "${CI:-}" != true ] || exit 1
fi

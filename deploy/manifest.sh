#!/usr/bin/env bash
# Prints deploy/larder.yaml, made from the chart, for those who want no Helm.
set -euo pipefail
cd "$(dirname "$0")"

cat manifest-head.yaml
helm template larder chart --namespace larder --set key.generate=none |
	sed -e '/helm\.sh\/chart:/d' -e 's/managed-by: Helm/managed-by: kubectl/' -e '/^# Source: /d' -e 's/ *$//'

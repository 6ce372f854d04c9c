{{- define "larder.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- define "larder.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else if contains (include "larder.name" .) .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "larder.name" .) | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "larder.selector" -}}
app.kubernetes.io/name: {{ include "larder.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "larder.labels" -}}
{{ include "larder.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "larder.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The headless Service through which nodes find each other. */}}
{{- define "larder.peers" -}}
{{- include "larder.fullname" . }}-peers
{{- end -}}

{{- define "larder.secretName" -}}
{{- default (include "larder.fullname" .) .Values.key.existingSecret -}}
{{- end -}}

{{/*
The Go heap's soft limit: four fifths of the container's, in bytes. What is
above it is for stacks, the runtime, and the page cache that the kernel takes back.
The downward API could give the whole limit, but no share of it.
*/}}
{{- define "larder.gomemlimit" -}}
{{- $limit := .Values.resources.limits.memory -}}
{{- $n := regexFind "^[0-9]+" $limit | int64 -}}
{{- if hasSuffix "Gi" $limit -}}{{- $n = mul $n 1024 -}}{{- end -}}
{{- printf "%dMiB" (div (mul $n 4) 5) -}}
{{- end -}}

{{/* A duration like 20s, 1m30s, 1.5m or 500ms in whole seconds, rounded up. */}}
{{- define "larder.seconds" -}}
{{- $ms := 0.0 -}}
{{- range regexFindAll "[0-9.]+(ms|s|m|h)" . -1 -}}
{{- $n := regexFind "^[0-9.]+" . | float64 -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- $ms = addf $ms (mulf $n (get (dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000) $unit)) -}}
{{- end -}}
{{- div (add (ceil $ms | int) 999) 1000 -}}
{{- end -}}

{{/* One value as TOML. A number in values is a float to Helm, and no key of ours is one. */}}
{{- define "larder.toml.value" -}}
{{- if kindIs "float64" . -}}{{- int64 . -}}{{- else -}}{{- toJson . -}}{{- end -}}
{{- end -}}

{{- define "larder.toml.table" -}}
{{- range $key, $value := . }}
{{ $key }} = {{ include "larder.toml.value" $value }}
{{- end }}
{{- end -}}

{{/* The agent's configuration: what the chart decides, and what .Values.config adds to it. */}}
{{- define "larder.toml" -}}
{{- $ports := .Values.ports -}}
{{- $own := dict
  "log" (dict "format" "json")
  "proxy" (dict "listen" (printf "127.0.0.1:%v" $ports.proxy))
  "admin" (dict "listen" (printf "127.0.0.1:%v" $ports.admin))
  "cache" (dict "dir" .Values.cache.hostPath)
  "peer" (dict)
  "hosts" (dict)
  "runtime" (dict)
-}}
{{- /* A name without a dot is asked for below the cluster's search domains alone, with the pod's
own namespace first. With ndots 1 any other goes to the resolvers of the outside first, and some
of these have an answer to every name. */ -}}
{{- if include "larder.peering" . -}}
{{- $_ := set $own "peer" (dict "gossip" (printf ":%v" $ports.gossip) "data" (printf ":%v" $ports.data)
  "join" (list (printf "%s:%v" (include "larder.peers" .) $ports.gossip))
  "key_file" "/run/secrets/larder/key") -}}
{{- end -}}
{{- if .Values.containerd.enabled -}}
{{- $_ := set $own.hosts "containerd" .Values.containerd.certsDir -}}
{{- if .Values.containerd.colonLink -}}{{- $_ := set $own.hosts "containerd_colon_link" true -}}{{- end -}}
{{- with .Values.containerd.root -}}{{- $_ := set $own.runtime "content_dir" (printf "%s/io.containerd.content.v1.content" .) -}}{{- end -}}
{{- with .Values.containerd.socket -}}{{- $_ := set $own.runtime "containerd_socket" . -}}{{- end -}}
{{- end -}}
{{- if .Values.crio.enabled -}}
{{- $_ := set $own.hosts "crio" .Values.crio.dropInDir -}}
{{- if .Values.crio.reload -}}{{- $_ := set $own.hosts "crio_reload" true -}}{{- end -}}
{{- end -}}
{{- if .Values.metrics.enabled -}}{{- $_ := set $own "metrics" (dict "listen" (printf ":%v" $ports.metrics)) -}}{{- end -}}
{{- if .Values.audit.enabled -}}{{- $_ := set $own "audit" (dict "file" (printf "%s/audit.log" .Values.audit.hostPath)) -}}{{- end -}}
{{- range $table, $keys := mergeOverwrite $own (deepCopy .Values.config) }}
{{- if $keys }}
[{{ $table }}]
{{- include "larder.toml.table" $keys }}
{{ end }}
{{- end }}
{{- range .Values.registries }}
[[registry]]
{{- include "larder.toml.table" . }}
{{ end }}
{{- end -}}

{{/* Whether this release's agents work together: "true" or nothing. */}}
{{- define "larder.peering" -}}
{{- if dig "peer" "enabled" true .Values.config -}}true{{- end -}}
{{- end -}}

{{/*
Who makes the key: "helm" or "cluster". A Helm that asks the cluster gets a list of the
namespace's Secrets, if only an empty one, which it may read since it keeps its releases
there. One that asks nobody (Argo CD, `helm template`) gets nothing at all, and so would
not find a key that is there.
*/}}
{{- define "larder.key.generate" -}}
{{- if ne .Values.key.generate "auto" -}}
{{- .Values.key.generate -}}
{{- else if lookup "v1" "Secret" .Release.Namespace "" -}}
helm
{{- else -}}
cluster
{{- end -}}
{{- end -}}

{{/*
Helm deletes what its release made and the chart has no more. The Secret that it made is
such a thing once the key comes from elsewhere, but by the same name: the agents would have
another key after the next restart, each at its time, or none.
*/}}
{{- define "larder.keepKey" -}}
{{- $name := include "larder.fullname" . -}}
{{- $other := or .Values.key.existingSecret (eq (include "larder.key.generate" .) "cluster") -}}
{{- if and (include "larder.peering" .) $other (eq $name (include "larder.secretName" .)) -}}
{{- $notes := dig "metadata" "annotations" dict (lookup "v1" "Secret" .Release.Namespace $name) -}}
{{- if and (eq (get $notes "meta.helm.sh/release-name") .Release.Name) (ne (get $notes "helm.sh/resource-policy") "keep") -}}
{{- fail (printf "Helm would delete the Secret %s, which has the agents' key; first: kubectl -n %s annotate secret %s helm.sh/resource-policy=keep" $name .Release.Namespace $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The pod of the Job that makes the key. */}}
{{- define "larder.keygen.pod" -}}
metadata:
  labels:
    app.kubernetes.io/name: {{ include "larder.name" . }}-keygen
spec:
  serviceAccountName: {{ include "larder.fullname" . }}-keygen
  automountServiceAccountToken: true
  restartPolicy: OnFailure
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  nodeSelector:
    {{- toYaml .Values.nodeSelector | nindent 4 }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  tolerations:
    {{- toYaml .Values.tolerations | nindent 4 }}
  containers:
    - name: keygen
      image: {{ include "larder.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [keygen, --secret, {{ include "larder.fullname" . }}]
      resources:
        requests: {cpu: 10m, memory: 32Mi}
        limits: {memory: 64Mi}
      securityContext:
        runAsNonRoot: true # the image says who; OpenShift wants to choose
        readOnlyRootFilesystem: true
        allowPrivilegeEscalation: false
        capabilities: {drop: [ALL]}
        seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* The node's directories that the agent writes registry configuration to. */}}
{{- define "larder.hosts.mounts" -}}
{{- with .Values.containerd }}
{{- if .enabled }}
{{- if eq .mount "parent" }}
- {name: containerd-config, mountPath: {{ dir .certsDir }}}
{{- else }}
- {name: containerd-config, mountPath: {{ dir .certsDir }}, readOnly: true}
- {name: certs-d, mountPath: {{ .certsDir }}}
{{- end }}
{{- range $n, $root := .furtherRoots }}
- {name: certs-d-{{ $n }}, mountPath: {{ $root }}, readOnly: true}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.crio }}
{{- if .enabled }}
- {name: containers-config, mountPath: {{ dir .dropInDir }}, readOnly: true}
- {name: registries-conf-d, mountPath: {{ .dropInDir }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* Their volumes. */}}
{{- define "larder.hosts.volumes" -}}
{{- with .Values.containerd }}
{{- if .enabled }}
- name: containerd-config
  hostPath: {path: {{ dir .certsDir }}, type: Directory}
{{- if eq .mount "directory" }}
- name: certs-d
  hostPath: {path: {{ .certsDir }}, type: DirectoryOrCreate}
{{- end }}
{{- range $n, $root := .furtherRoots }}
- name: certs-d-{{ $n }}
  hostPath: {path: {{ $root }}, type: DirectoryOrCreate}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.crio }}
{{- if .enabled }}
- name: containers-config
  hostPath: {path: {{ dir .dropInDir }}, type: Directory}
- name: registries-conf-d
  hostPath: {path: {{ .dropInDir }}, type: DirectoryOrCreate}
{{- end }}
{{- end }}
{{- end -}}

{{/* Directories of the node's credential provider plugins, each once. */}}
{{- define "larder.credentialDirs" -}}
{{- $dirs := list -}}
{{- with dig "node" "image_credential_provider_config" "" .Values.config }}{{ $dirs = append $dirs (dir .) }}{{ end -}}
{{- with dig "node" "image_credential_provider_bin_dir" "" .Values.config }}{{ $dirs = append $dirs (clean .) }}{{ end -}}
{{- uniq $dirs | toYaml -}}
{{- end -}}

{{/* What cannot work, said before anything is installed. */}}
{{- define "larder.validate" -}}
{{- if not (or .Values.containerd.enabled .Values.crio.enabled) -}}
{{- fail "no runtime to point at Larder: set containerd.enabled or crio.enabled" -}}
{{- end -}}
{{- if not .Values.metrics.enabled -}}
{{- range list "serviceMonitor" "podMonitor" "prometheusRule" "dashboard" -}}
{{- if (get $.Values.metrics .).enabled -}}
{{- fail (printf "metrics.%s needs metrics.enabled, which opens ports.metrics on the node: without it Prometheus cannot reach the agents" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.containerd.colonLink (eq .Values.containerd.mount "directory") -}}
{{- fail "containerd.colonLink makes a link beside certsDir: set containerd.mount to parent" -}}
{{- end -}}
{{- $used := .Values.ports -}}
{{- if not .Values.metrics.enabled -}}{{- $used = omit $used "metrics" -}}{{- end -}}
{{- if not (include "larder.peering" .) -}}{{- $used = omit $used "data" "gossip" -}}{{- end -}}
{{- $taken := dict -}}
{{- range $name, $port := $used -}}
{{- $key := toString $port -}}
{{- with get $taken $key -}}
{{- fail (printf "ports.%s and ports.%s are both %s: every port of the agent needs its own" . $name $key) -}}
{{- end -}}
{{- $_ := set $taken $key $name -}}
{{- end -}}
{{- $drain := include "larder.seconds" (dig "proxy" "drain_timeout" "20s" .Values.config) | int -}}
{{- if lt (int .Values.terminationGracePeriodSeconds) (add $drain 20 | int) -}}
{{- fail (printf "terminationGracePeriodSeconds must be at least %d: config.proxy.drain_timeout, and 20 s to restore the node's files" (add $drain 20)) -}}
{{- end -}}
{{- end -}}

{{/* The name of the workload. */}}
{{- define "optcache.name" -}}
{{- .Values.fullnameOverride | default (ternary "coredns" "node-local-dns" (eq .Values.role "clusterDNS")) -}}
{{- end }}

{{- define "optcache.app" -}}
{{- .Values.k8sAppLabelOverride | default (ternary "kube-dns" "node-local-dns" (eq .Values.role "clusterDNS")) -}}
{{- end }}

{{- define "optcache.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "optcache.name" .) -}}
{{- end }}

{{/* The name of the ConfigMap, which is "base" in deploy/kubernetes: that of kubeadm or node-cache stays as it is. */}}
{{- define "optcache.configMap" -}}
{{- ternary .base (printf "%s-optcache" .root.Values.fullnameOverride) (empty .root.Values.fullnameOverride) -}}
{{- end }}

{{- define "optcache.role" -}}
system:{{ include "optcache.name" . }}
{{- end }}

{{- define "optcache.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* Labels of each object, beside those that it has in deploy/kubernetes. */}}
{{- define "optcache.labels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.customLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The metadata of an object of the chart's own: (dict "root" $ "name" "suffix"). */}}
{{- define "optcache.metadata" -}}
name: {{ include "optcache.name" .root }}{{ .suffix }}
namespace: {{ .namespace | default .root.Release.Namespace }}
labels:
  {{- include "optcache.labels" .root | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .root.Values.customAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Server blocks of .Values.servers. */}}
{{- define "optcache.servers" -}}
{{- range .Values.servers }}
{{- $port := .port }}
{{- range $i, $z := .zones | default (list (dict "zone" ".")) }}{{ if $i }} {{ end }}{{ $z.scheme | default "" }}{{ $z.zone | default "." }}:{{ $port }}{{ end }} {
{{- range .plugins }}
    {{ .name }}{{ with .parameters }} {{ . }}{{ end }}{{ with .configBlock }} {
        {{- . | trim | nindent 8 }}
    }{{ end }}
{{- end }}
}{{ "\n\n" }}
{{- end }}
{{- end }}

{{- define "optcache.corefile" -}}
{{- if .root.Values.servers -}}
{{ include "optcache.servers" .root | trim }}{{ "\n" }}
{{- else -}}
{{ .text }}
{{- end -}}
{{ with .root.Values.extraServers }}{{ "\n" }}{{ . | trimSuffix "\n" }}{{ "\n" }}{{ end }}
{{- end }}

{{/* Ports of .Values.servers, as a container or a service has them, and not twice: a list in "ports". */}}
{{- define "optcache.ports" -}}
{{- $seen := dict }}
{{- range .root.Values.servers }}
{{- $port := .port }}
{{- $servicePort := .servicePort | default .port }}
{{- range .zones | default (list (dict "zone" ".")) }}
{{- $protocols := list "UDP" "TCP" }}
{{- if has (.scheme | default "dns://") (list "tls://" "https://" "grpc://") }}{{ $protocols = list "TCP" }}{{ end }}
{{- range $protocols }}
{{- $name := printf "%s-%v" (lower .) $port }}
{{- if not (hasKey $seen $name) }}
{{- $_ := set $seen $name true }}
{{- if $.service }}
- {name: {{ $name }}, port: {{ $servicePort }}, protocol: {{ . }}, targetPort: {{ $port }}}
{{- else }}
- {name: {{ $name }}, containerPort: {{ $port }}, protocol: {{ . }}}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Replaces the ports of DNS in a container or a service by those of the servers: (dict "root" $ "of" object "service" bool). */}}
{{- define "optcache.setPorts" -}}
{{- if .root.Values.servers }}
{{- $ports := include "optcache.ports" . | fromYamlArray }}
{{- range .of.ports }}
{{- if not (hasPrefix "dns" .name) }}{{ $ports = append $ports . }}{{ end }}
{{- end }}
{{- $_ := set .of "ports" $ports }}
{{- end }}
{{- end }}

{{/* Changes a Deployment or DaemonSet by the values: (dict "root" $ "object" object). */}}
{{- define "optcache.workload" -}}
{{- $root := .root }}
{{- $v := .root.Values }}
{{- $spec := .object.spec }}
{{- $pod := $spec.template.spec }}
{{- if eq .object.kind "Deployment" }}
{{- if not (kindIs "invalid" $v.replicaCount) }}{{ $_ := set $spec "replicas" (int $v.replicaCount) }}{{ end }}
{{- with $v.rollingUpdate }}{{ $_ := set $spec.strategy "rollingUpdate" . }}{{ end }}
{{- else }}
{{- with $v.rollingUpdate }}{{ $_ := set $spec.updateStrategy "rollingUpdate" . }}{{ end }}
{{- end }}
{{- $app := include "optcache.app" $root }}
{{- $_ := set $spec.selector.matchLabels "k8s-app" $app }}
{{- $meta := $spec.template.metadata }}
{{- $_ := set $meta "labels" (mergeOverwrite (dict) $v.podLabels $meta.labels (dict "k8s-app" $app)) }}
{{- $_ := set $meta "annotations" (mergeOverwrite (dict) ($meta.annotations | default dict) $v.podAnnotations) }}
{{- $_ := set $pod "serviceAccountName" (include "optcache.serviceAccount" $root) }}
{{- range $key := list "priorityClassName" "affinity" "nodeSelector" "tolerations" "topologySpreadConstraints" }}
{{- with get $v $key }}{{ $_ := set $pod $key . }}{{ end }}
{{- end }}
{{- if and (not $v.affinity) (ne $app "kube-dns") $pod.affinity }}
{{- $_ := set $pod "affinity" ($pod.affinity | toYaml | replace "kube-dns" $app | fromYaml) }}
{{- end }}
{{- if not (kindIs "invalid" $v.terminationGracePeriodSeconds) }}
{{- $_ := set $pod "terminationGracePeriodSeconds" (int $v.terminationGracePeriodSeconds) }}
{{- end }}
{{- with $v.image.pullSecrets }}
{{- $secrets := list }}
{{- range . }}{{ $secrets = append $secrets (dict "name" .) }}{{ end }}
{{- $_ := set $pod "imagePullSecrets" $secrets }}
{{- end }}
{{- range concat ($pod.initContainers | default list) $pod.containers }}
{{- $_ := set . "imagePullPolicy" $v.image.pullPolicy }}
{{- if and .command $v.nodeLocal.clusterIP }}
{{- $words := list }}
{{- range .command }}{{ $words = append $words (ternary (printf "%s,%s" . $v.nodeLocal.clusterIP) . (hasPrefix "-localip=" .)) }}{{ end }}
{{- $_ := set . "command" $words }}
{{- end }}
{{- if eq .image "coredns-optcache" }}{{ $_ := set . "image" (include "optcache.image" $root) }}{{ end }}
{{- end }}
{{- $c := first $pod.containers }}
{{- if $c.ports }}{{ include "optcache.setPorts" (dict "root" $root "of" $c "service" false) }}{{ end }}
{{- with $v.resources }}{{ $_ := set $c "resources" . }}{{ end }}
{{- with $v.env }}{{ $_ := set $c "env" (concat ($c.env | default list) .) }}{{ end }}
{{- with $v.extraVolumeMounts }}{{ $_ := set $c "volumeMounts" (concat $c.volumeMounts .) }}{{ end }}
{{- range $pod.volumes }}
{{- if and .configMap (hasSuffix "-optcache" (.configMap | default dict).name) }}{{ $_ := set .configMap "name" (include "optcache.configMap" (dict "root" $root "base" .configMap.name)) }}{{ end }}
{{- if and (eq .name "cache") .emptyDir $v.snapshot.sizeLimit }}{{ $_ := set .emptyDir "sizeLimit" $v.snapshot.sizeLimit }}{{ end }}
{{- end }}
{{- with $v.extraVolumes }}{{ $_ := set $pod "volumes" (concat $pod.volumes .) }}{{ end }}
{{- end }}

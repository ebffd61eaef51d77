{{- define "dindpool.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 48 | trimSuffix "-" }}
{{- end }}

{{/* At most 48 characters: names of pods and labels have room for what is appended. */}}
{{- define "dindpool.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- $name = .Values.fullnameOverride }}
{{- else if contains $name .Release.Name }}
{{- $name = .Release.Name }}
{{- else }}
{{- $name = printf "%s-%s" .Release.Name $name }}
{{- end }}
{{- $name | trunc 48 | trimSuffix "-" }}
{{- end }}

{{/* The Deployment of the daemons, and all that is theirs. */}}
{{- define "dindpool.dind" -}}
{{ include "dindpool.fullname" . }}-dind
{{- end }}

{{- define "dindpool.admin" -}}
{{ include "dindpool.fullname" . }}-admin
{{- end }}

{{/* Not empty where preStop hooks ask the proxy: the name of the Secret with their token. */}}
{{- define "dindpool.prestop" -}}
{{- if and .Values.dind.prestop.enabled (not .Values.dind.lifecycle) }}
{{- .Values.dind.prestop.existingSecret | default (printf "%s-prestop" (include "dindpool.fullname" .)) }}
{{- end }}
{{- end }}

{{- define "dindpool.serviceAccount" -}}
{{- default (ternary (include "dindpool.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{/* Labels that select pods never change: (dict "root" $ "component" "proxy") */}}
{{- define "dindpool.selector" -}}
app.kubernetes.io/name: {{ include "dindpool.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "dindpool.labels" -}}
{{ include "dindpool.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels of pods: none that changes with the chart's version, or an update of the chart would replace the daemons. */}}
{{- define "dindpool.podLabels" -}}
{{ include "dindpool.selector" . }}
{{- with merge (dict) .labels .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Name, namespace, labels and annotations of an object:
     (dict "root" $ "component" "proxy" "name" … "labels" … "annotations" … "namespace" …) */}}
{{- define "dindpool.metadata" -}}
name: {{ .name }}
namespace: {{ .namespace | default .root.Release.Namespace }}
labels:
  {{- include "dindpool.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* An image: (dict "image" .Values.image "tag" .Chart.AppVersion) */}}
{{- define "dindpool.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .tag }}
{{- end }}
{{- end }}

{{/* What pods of proxy and daemons have in common, from their part of the values. */}}
{{- define "dindpool.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{/* The constraints that were given, or one that spreads the pods over nodes: (dict "root" $ "component" … "given" …) */}}
{{- define "dindpool.spread" -}}
topologySpreadConstraints:
{{- if .given }}
  {{- toYaml .given | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "dindpool.selector" . | nindent 8 }}
{{- end }}
{{- end }}

{{/* A duration of the configuration (500ms, 30s, 5m, 2h) in whole seconds, rounded up. */}}
{{- define "dindpool.seconds" -}}
{{- $number := regexFind "^[0-9.]+" . | float64 }}
{{- $unit := regexFind "[a-z]+$" . }}
{{- ceil (mulf $number (get (dict "ms" 0.001 "s" 1.0 "m" 60.0 "h" 3600.0) $unit)) | int64 }}
{{- end }}

{{/* How long the pod of the proxy may take to go; of several, it first waits until another one decides. */}}
{{- define "dindpool.grace" -}}
{{- if kindIs "invalid" .Values.proxy.terminationGracePeriodSeconds }}
{{- $delay := include "dindpool.seconds" (.Values.config.shutdown_delay | default "5s") | int64 }}
{{- $grace := include "dindpool.seconds" (.Values.config.shutdown_grace | default "10m") | int64 }}
{{- $lease := ternary (include "dindpool.seconds" (.Values.config.lease_duration | default "15s") | int64) 0 (gt (int .Values.proxy.replicas) 1) }}
{{- add $delay $grace $lease 15 }}
{{- else }}
{{- .Values.proxy.terminationGracePeriodSeconds | int64 }}
{{- end }}
{{- end }}

{{/* A value in TOML. Numbers of YAML are floats for Helm, and there are none in the file. */}}
{{- define "dindpool.toml" -}}
{{- if kindIs "float64" . }}{{ int64 . }}{{ else }}{{ toJson . }}{{ end }}
{{- end }}

{{/* The Secret with the certificate of the pool; empty without TLS. */}}
{{- define "dindpool.tls" -}}
{{- if .Values.tls.certManager.enabled }}{{ include "dindpool.fullname" . }}-tls{{ else }}{{ .Values.tls.existingSecret }}{{ end }}
{{- end }}

{{/* Values that contradict each other, which a schema cannot tell in words. */}}
{{- define "dindpool.check" -}}
{{- if and .Values.scaler.enabled (not (kindIs "invalid" .Values.dind.replicas)) }}
{{- fail "dind.replicas: dindpool itself decides how many daemons there are; say scaler.min and scaler.max, or scaler.enabled=false" }}
{{- end }}
{{- if gt (int .Values.scaler.min) (int .Values.scaler.max) }}
{{- fail (printf "scaler.min, scaler.max: %d to %d daemons are no pool" (int .Values.scaler.min) (int .Values.scaler.max)) }}
{{- end }}
{{- if and .Values.monitoring.serviceMonitor.enabled .Values.monitoring.podMonitor.enabled }}
{{- fail "monitoring: with both serviceMonitor and podMonitor everything would be scraped twice" }}
{{- end }}
{{- if and .Values.tls.certManager.enabled .Values.tls.existingSecret }}
{{- fail "tls: either existingSecret or certManager.enabled" }}
{{- end }}
{{- if and .Values.tls.certManager.enabled (not .Values.tls.certManager.issuerRef.name) }}
{{- fail "tls.certManager.issuerRef.name: name the Issuer that is to make the certificate" }}
{{- end }}
{{- if and (not (include "dindpool.tls" .)) (or .Values.tls.identify (eq .Values.tls.plain "refused")) }}
{{- fail "tls: identify and plain=refused need a certificate: say tls.existingSecret or tls.certManager" }}
{{- end }}
{{- $ports := list (int .Values.service.port) }}
{{- range .Values.proxy.extraListeners }}
{{- if or (has (int .port) $ports) (has (int .port) (list 9375 9376)) }}
{{- fail (printf "proxy.extraListeners: port %d of %s is in use already" (int .port) .name) }}
{{- end }}
{{- if has .name (list "docker" "admin" "prestop") }}
{{- fail (printf "proxy.extraListeners: the name %s is in use already" .name) }}
{{- end }}
{{- $ports = append $ports (int .port) }}
{{- end }}
{{- range .Values.dind.extraVolumeMounts }}
{{- if hasPrefix "/var/lib/docker/" (printf "%s/" (trimSuffix "/" .mountPath)) }}
{{- fail (printf "dind.extraVolumeMounts: %s is each daemon's own, and two daemons on one directory destroy each other's data; say dind.storage" .mountPath) }}
{{- end }}
{{- end }}
{{- range .Values.dind.extraArgs }}
{{- if or (hasPrefix "--data-root" .) (hasPrefix "-g" .) }}
{{- fail (printf "dind.extraArgs: %s: a daemon's data are in /var/lib/docker, on a volume of its own; say dind.storage" .) }}
{{- end }}
{{- end }}
{{- if and .Values.service.nodePort (eq .Values.service.type "ClusterIP") }}
{{- fail "service.nodePort: a ClusterIP has none; say service.type=NodePort or LoadBalancer" }}
{{- end }}
{{- end }}

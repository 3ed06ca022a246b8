{{/* Names, labels and the parts that router and workers share. */}}

{{- define "tandem.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What never changes in the life of a release: selectors. Call with (list . "component"). */}}
{{- define "tandem.selector" -}}
{{- $top := index . 0 -}}
app.kubernetes.io/name: {{ default $top.Chart.Name $top.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ $top.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Labels of objects, not of pods: the chart's version in a pod's labels would restart every pool at each upgrade. */}}
{{- define "tandem.labels" -}}
{{- $top := index . 0 -}}
{{ include "tandem.selector" . }}
app.kubernetes.io/part-of: tandem
app.kubernetes.io/managed-by: {{ $top.Release.Service }}
app.kubernetes.io/version: {{ $top.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" $top.Chart.Name $top.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Image of a part: its own fields over `image`. Call with (list . .Values.PART). */}}
{{- define "tandem.image" -}}
{{- $top := index . 0 -}}
{{- $own := (index . 1).image -}}
{{- $repository := default $top.Values.image.repository $own.repository -}}
{{- if $own.digest -}}
{{ $repository }}@{{ $own.digest }}
{{- else if $own.tag -}}
{{ $repository }}:{{ $own.tag }}
{{- else if $top.Values.image.digest -}}
{{ $repository }}@{{ $top.Values.image.digest }}
{{- else -}}
{{ $repository }}:{{ default $top.Chart.AppVersion $top.Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "tandem.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "tandem.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- define "tandem.cluster" -}}
{{ default (printf "%s-%s" .Release.Namespace .Release.Name) .Values.cluster }}
{{- end -}}

{{/* etcd endpoints, comma-separated. */}}
{{- define "tandem.etcd" -}}
{{- if .Values.etcd.bundled.enabled -}}
http://{{ include "tandem.fullname" . }}-etcd:2379
{{- else -}}
{{ join "," .Values.etcd.endpoints }}
{{- end -}}
{{- end -}}

{{/* Flags, mounts and volumes for an etcd with TLS and users. The Secrets are files: nothing secret on a command line. */}}
{{- define "tandem.etcdArgs" -}}
- --etcd={{ include "tandem.etcd" . }}
{{- if .Values.etcd.tls.secretName }}
- --etcd-ca=/etc/tandem/etcd-tls/ca.crt
{{- if .Values.etcd.tls.clientCertificate }}
- --etcd-cert=/etc/tandem/etcd-tls/tls.crt
- --etcd-key=/etc/tandem/etcd-tls/tls.key
{{- end }}
{{- end }}
{{- if .Values.etcd.auth.user }}
- --etcd-user={{ .Values.etcd.auth.user }}
- --etcd-password-file=/etc/tandem/etcd-auth/password
{{- end }}
{{- end -}}

{{- define "tandem.etcdMounts" -}}
{{- if .Values.etcd.tls.secretName }}
- {name: etcd-tls, mountPath: /etc/tandem/etcd-tls, readOnly: true}
{{- end }}
{{- if .Values.etcd.auth.user }}
- {name: etcd-auth, mountPath: /etc/tandem/etcd-auth, readOnly: true}
{{- end }}
{{- end -}}

{{- define "tandem.etcdVolumes" -}}
{{- with .Values.etcd.tls.secretName }}
- {name: etcd-tls, secret: {secretName: {{ . | quote }}, defaultMode: 0440}}
{{- end }}
{{- if .Values.etcd.auth.user }}
- {name: etcd-auth, secret: {secretName: {{ .Values.etcd.auth.secretName | quote }}, defaultMode: 0440}}
{{- end }}
{{- end -}}

{{/* What every pod has. Call with (list . PART). */}}
{{- define "tandem.podCommon" -}}
{{- $top := index . 0 -}}
{{- $part := index . 1 -}}
serviceAccountName: {{ include "tandem.serviceAccount" $top }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "tandem.podSecurity" $top | nindent 2 }}
{{- with $top.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $part.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $part.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $part.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $part.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "tandem.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.user }}
runAsGroup: {{ .Values.security.group }}
fsGroup: {{ .Values.security.group }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "tandem.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Spread over nodes or zones, among the pods of one component. Call with (list . PART "component"). */}}
{{- define "tandem.spread" -}}
{{- $top := index . 0 -}}
{{- $component := index . 2 -}}
{{- with (index . 1).topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - {{ toYaml . | nindent 4 | trim }}
    {{- if not (hasKey . "labelSelector") }}
    labelSelector:
      matchLabels:
        {{- include "tandem.selector" (list $top $component) | nindent 8 }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* A port's /health and /live. Call with (dict "startupSeconds" N). Readiness follows a drain within a few seconds. */}}
{{- define "tandem.probes" -}}
{{- $scheme := .scheme | default "HTTP" -}}
startupProbe:
  httpGet: {path: /health, port: tandem, scheme: {{ $scheme }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ div (add .startupSeconds 1) 2 | max 1 }}
readinessProbe:
  httpGet: {path: /health, port: tandem, scheme: {{ $scheme }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /live, port: tandem, scheme: {{ $scheme }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{/* The Secret of the client API, for the router and for who looks at it. */}}
{{- define "tandem.routerTlsMounts" -}}
{{- if .Values.router.tls.secretName }}
- {name: router-tls, mountPath: /etc/tandem/router-tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "tandem.routerTlsVolumes" -}}
{{- with .Values.router.tls.secretName }}
- {name: router-tls, secret: {secretName: {{ . | quote }}, defaultMode: 0440}}
{{- end }}
{{- end -}}

{{/* The Secret of a part's cluster certificate. Call with (list . "prefill"). */}}
{{- define "tandem.clusterSecret" -}}
{{- $top := index . 0 -}}
{{- $part := index . 1 -}}
{{- index $top.Values.clusterTls.secrets $part | default (printf "%s-%s-cluster" (include "tandem.fullname" $top) $part) -}}
{{- end -}}

{{/* Flags, mounts and volumes of mutual TLS in the cluster. Mounts and volumes: call with (list . "prefill"). */}}
{{- define "tandem.clusterArgs" -}}
{{- if .Values.clusterTls.enabled }}
- --cluster-cert=/etc/tandem/cluster-tls/tls.crt
- --cluster-key=/etc/tandem/cluster-tls/tls.key
- --cluster-ca=/etc/tandem/cluster-tls/ca.crt
{{- end }}
{{- end -}}

{{- define "tandem.clusterMounts" -}}
{{- if .Values.clusterTls.enabled }}
- {name: cluster-tls, mountPath: /etc/tandem/cluster-tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "tandem.clusterVolumes" -}}
{{- $top := index . 0 -}}
{{- if $top.Values.clusterTls.enabled }}
- {name: cluster-tls, secret: {secretName: {{ include "tandem.clusterSecret" . | quote }}, defaultMode: 0440}}
{{- end }}
{{- end -}}

{{- define "tandem.traceArgs" -}}
{{- with .Values.tracing.endpoint }}
- --otlp-endpoint={{ . }}
- --trace-ratio={{ $.Values.tracing.ratio }}
{{- end }}
{{- end -}}

{{/* What counts a pool's workers: an HPA on a metric of theirs, or KEDA. Call with (list . "prefill"). */}}

{{/* `helm template` without a cluster lists every version that helm knows, so Kubernetes' own version is asked too. */}}
{{- define "tandem.hpaVersion" -}}
{{ and (.Capabilities.APIVersions.Has "autoscaling/v2") (semverCompare ">=1.23.0-0" .Capabilities.KubeVersion.Version) | ternary "autoscaling/v2" "autoscaling/v2beta2" }}
{{- end -}}

{{- define "tandem.poolMetric" -}}
{{ eq . "prefill" | ternary "tandem_queued_tokens" "tandem_sequences" }}
{{- end -}}

{{- define "tandem.autoscaler" -}}
{{- $top := index . 0 -}}
{{- $role := index . 1 -}}
{{- $scaling := (index $top.Values $role).autoscaling -}}
{{- $name := printf "%s-%s" (include "tandem.fullname" $top) $role -}}
{{- if eq $scaling.mode "hpa" }}
---
apiVersion: {{ include "tandem.hpaVersion" $top }}
kind: HorizontalPodAutoscaler
metadata:
  name: {{ $name }}
  namespace: {{ $top.Release.Namespace }}
  labels:
    {{- include "tandem.labels" (list $top $role) | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ $name }}}
  minReplicas: {{ $scaling.minReplicas }}
  maxReplicas: {{ $scaling.maxReplicas }}
  behavior:
    scaleDown:
      stabilizationWindowSeconds: {{ $scaling.scaleDownSeconds }}
  metrics:
    {{- with $scaling.metrics }}
    {{- toYaml . | nindent 4 }}
    {{- else }}
    {{- if $top.Values.planner.enabled }}
    # The gauge is the number of workers: each is worth 1
    - type: External
      external:
        metric:
          name: tandem_planner_workers
          selector: {matchLabels: {pool: {{ $role }}}}
        target:
          type: AverageValue
          averageValue: "1"
    {{- else }}
    - type: Pods
      pods:
        metric:
          name: {{ include "tandem.poolMetric" $role }}
        target:
          type: AverageValue
          averageValue: {{ $scaling.target | toString | quote }}
    {{- end }}
    {{- end }}
{{- else if eq $scaling.mode "keda" }}
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ $name }}
  namespace: {{ $top.Release.Namespace }}
  labels:
    {{- include "tandem.labels" (list $top $role) | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ $name }}}
  minReplicaCount: {{ $scaling.minReplicas }}
  maxReplicaCount: {{ $scaling.maxReplicas }}
  pollingInterval: {{ $scaling.pollingSeconds }}
  cooldownPeriod: {{ $scaling.scaleDownSeconds }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        scaleDown:
          stabilizationWindowSeconds: {{ $scaling.scaleDownSeconds }}
  triggers:
    {{- with $scaling.triggers }}
    {{- toYaml . | nindent 4 }}
    {{- else }}
    {{- if $top.Values.planner.enabled }}
    - type: external
      metadata:
        scalerAddress: {{ include "tandem.fullname" $top }}-planner.{{ $top.Release.Namespace }}:{{ $top.Values.planner.port }}
        pool: {{ $role }}
    {{- else }}
    - type: prometheus
      metricType: AverageValue
      metadata:
        serverAddress: {{ $scaling.prometheus }}
        query: sum({{ include "tandem.poolMetric" $role }}{namespace="{{ $top.Release.Namespace }}", pod=~"{{ $name }}-.*"})
        threshold: {{ $scaling.target | toString | quote }}
    {{- end }}
    {{- end }}
{{- end }}
{{- end -}}

{{/* A pool of workers: Deployment, PodDisruptionBudget, autoscaler, PodMonitor. Call with (list . "prefill"). */}}
{{- define "tandem.pool" -}}
{{- $top := index . 0 -}}
{{- $role := index . 1 -}}
{{- $pool := index $top.Values $role -}}
{{- $name := printf "%s-%s" (include "tandem.fullname" $top) $role -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  namespace: {{ $top.Release.Namespace }}
  labels:
    {{- include "tandem.labels" (list $top $role) | nindent 4 }}
spec:
  {{- if eq $pool.autoscaling.mode "off" }}
  replicas: {{ $pool.replicas }}
  {{- end }}
  selector:
    matchLabels:
      {{- include "tandem.selector" (list $top $role) | nindent 6 }}
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxSurge: {{ $pool.maxSurge }}
      maxUnavailable: {{ $pool.maxUnavailable }}
  template:
    metadata:
      labels:
        {{- include "tandem.selector" (list $top $role) | nindent 8 }}
        llm-d.ai/role: {{ $role }}
        {{- with $pool.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $pool.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "tandem.podCommon" (list $top $pool) | nindent 6 }}
      {{- include "tandem.spread" (list $top $pool $role) | nindent 6 }}
      {{- with $pool.runtimeClassName }}
      runtimeClassName: {{ . }}
      {{- end }}
      {{- if $pool.hostNetwork }}
      hostNetwork: true
      dnsPolicy: ClusterFirstWithHostNet
      {{- end }}
      # The drain, and what leaving the registry and closing connections may take beside it
      terminationGracePeriodSeconds: {{ add $pool.drainSeconds 10 }}
      {{- include "tandem.modelInit" $top | nindent 6 }}
      containers:
        - name: {{ $role }}
          image: {{ include "tandem.image" (list $top $pool) }}
          imagePullPolicy: {{ $top.Values.image.pullPolicy }}
          args:
            {{- include "tandem.poolArgs" (list $top $role) | nindent 12 }}
          env:
            - name: POD_NAME
              valueFrom: {fieldRef: {fieldPath: metadata.name}}
            - name: POD_IP
              valueFrom: {fieldRef: {fieldPath: status.podIP}}
            - {name: XDG_CACHE_HOME, value: /cache}
            {{- with $pool.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: tandem, containerPort: {{ $pool.port }}, protocol: TCP}
          {{- include "tandem.probes" (dict "startupSeconds" $pool.startupSeconds "scheme" ($top.Values.clusterTls.enabled | ternary "HTTPS" "HTTP")) | nindent 10 }}
          securityContext:
            {{- include "tandem.containerSecurity" $top | nindent 12 }}
              {{- if $pool.rdma.enabled }}
              add: [IPC_LOCK]
              {{- end }}
          {{- include "tandem.poolResources" $pool | nindent 10 }}
          volumeMounts:
            - {name: tmp, mountPath: /tmp}
            - {name: cache, mountPath: /cache}
            {{- include "tandem.modelMount" $top | nindent 12 }}
            {{- include "tandem.etcdMounts" $top | nindent 12 }}
            {{- include "tandem.clusterMounts" $top | nindent 12 }}
      volumes:
        - {name: tmp, emptyDir: {}}
        - {name: cache, emptyDir: {}}
        {{- include "tandem.modelVolume" $top | nindent 8 }}
        {{- include "tandem.etcdVolumes" $top | nindent 8 }}
        {{- include "tandem.clusterVolumes" (list $top $role) | nindent 8 }}
{{- include "tandem.pdb" (list $top $pool $role) }}
{{- include "tandem.autoscaler" (list $top $role) }}
{{- end -}}

{{- define "tandem.poolArgs" -}}
{{- $top := index . 0 -}}
{{- $role := index . 1 -}}
{{- $pool := index $top.Values $role -}}
{{- if $pool.roleSwitch }}
- worker
- --role=auto
- --start-as={{ $role }}
{{- else }}
- {{ $role }}
{{- end }}
- --log={{ $top.Values.log.filter }}
{{- if $top.Values.log.json }}
- --log-json
{{- end }}
{{ include "tandem.modelArgs" $top }}
{{ include "tandem.etcdArgs" $top }}
{{- include "tandem.clusterArgs" $top }}
- --cluster={{ include "tandem.cluster" $top }}
- --listen=0.0.0.0:{{ $pool.port }}
- --advertise=$(POD_IP):{{ $pool.port }}
- --name=$(POD_NAME)
{{- with $pool.zone }}
- --zone={{ . }}
{{- end }}
- --device={{ $pool.device }}
- --kv-mib={{ $pool.kvMib }}
- --block-tokens={{ $pool.blockTokens | default $top.Values.engine.blockTokens }}
- --kv-dtype={{ $pool.kvDtype | default $top.Values.engine.kvDtype }}
{{- if not $pool.rdma.require }}
- --kv-wire={{ $top.Values.engine.kvWire }}
{{- end }}
{{- with $top.Values.engine.quantize }}
- --quantize={{ . }}
{{- end }}
{{- if $pool.threads }}
- --threads={{ $pool.threads }}
{{- end }}
{{- if $pool.stepTokens }}
- --step-tokens={{ $pool.stepTokens }}
{{- end }}
{{- if $pool.chunkTokens }}
- --chunk-tokens={{ $pool.chunkTokens }}
{{- end }}
- --strategy={{ $top.Values.strategy }}
- --slo-itl-ms={{ $top.Values.sloItlMs }}
- --transport={{ $pool.rdma.enabled | ternary "rdma" "tcp" }}
{{- if $pool.rdma.enabled }}
{{- with $pool.rdma.devices }}
- --rdma-device={{ join "," . }}
{{- end }}
- --gpudirect={{ $pool.rdma.gpudirect }}
{{- if $pool.rdma.require }}
- --require-rdma
{{- end }}
{{- if $top.Values.clusterTls.enabled }}
- --allow-plain-rdma
{{- end }}
{{- end }}
- --max-sequences={{ $pool.maxSequences }}
- --max-waiting={{ $pool.maxWaiting }}
- --lease-seconds={{ $pool.leaseSeconds }}
- --progress-seconds={{ $pool.progressSeconds }}
- --drain-seconds={{ $pool.drainSeconds }}
{{- include "tandem.traceArgs" $top }}
{{- with $pool.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The pool's resources, and its GPU: a worker drives one. */}}
{{- define "tandem.poolResources" -}}
{{- $limits := deepCopy (default dict .resources.limits) -}}
{{- if eq .device "cuda" -}}
{{- $_ := set $limits .gpuResource 1 -}}
{{- end -}}
{{- $resources := merge (dict "limits" $limits) (omit .resources "limits") -}}
{{- if not $limits -}}
{{- $resources = omit $resources "limits" -}}
{{- end -}}
{{- with $resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Call with (list . PART "component"). */}}
{{- define "tandem.pdb" -}}
{{- $top := index . 0 -}}
{{- $part := index . 1 -}}
{{- $component := index . 2 -}}
{{- if $part.pdb.enabled }}
---
apiVersion: {{ and ($top.Capabilities.APIVersions.Has "policy/v1") (semverCompare ">=1.21.0-0" $top.Capabilities.KubeVersion.Version) | ternary "policy/v1" "policy/v1beta1" }}
kind: PodDisruptionBudget
metadata:
  name: {{ include "tandem.fullname" $top }}-{{ $component }}
  namespace: {{ $top.Release.Namespace }}
  labels:
    {{- include "tandem.labels" (list $top $component) | nindent 4 }}
spec:
  maxUnavailable: {{ $part.pdb.maxUnavailable }}
  selector:
    matchLabels:
      {{- include "tandem.selector" (list $top $component) | nindent 6 }}
{{- end }}
{{- end -}}

{{/* Values that fit the schema and not each other: refused here, with what to do. */}}
{{- define "tandem.validate" -}}
{{- if and .Values.etcd.bundled.enabled .Values.etcd.endpoints -}}
{{- fail "etcd.endpoints and etcd.bundled.enabled=true: choose one; with an etcd of yours set etcd.bundled.enabled=false" -}}
{{- end -}}
{{- if not (or .Values.etcd.bundled.enabled .Values.etcd.endpoints) -}}
{{- fail "no etcd: set etcd.bundled.enabled=true (trials) or etcd.endpoints=[http://host:2379]" -}}
{{- end -}}
{{- range .Values.etcd.endpoints -}}
{{- if and (hasPrefix "https://" .) (not $.Values.etcd.tls.secretName) -}}
{{- fail (printf "etcd.endpoints: %s needs etcd.tls.secretName, a Secret with ca.crt" .) -}}
{{- end -}}
{{- if and (not (hasPrefix "https://" .)) $.Values.etcd.tls.secretName -}}
{{- fail (printf "etcd.tls.secretName is set, but the endpoint %s is not https://" .) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.etcd.bundled.enabled (or .Values.etcd.tls.secretName .Values.etcd.auth.user) -}}
{{- fail "etcd.tls and etcd.auth are for an etcd of yours: set etcd.bundled.enabled=false and etcd.endpoints" -}}
{{- end -}}
{{- if and .Values.router.tls.clients (not .Values.router.tls.secretName) -}}
{{- fail "router.tls.clients needs router.tls.secretName" -}}
{{- end -}}
{{- $tls := .Values.clusterTls -}}
{{- if and $tls.certManager.enabled (not $tls.enabled) -}}
{{- fail "clusterTls.certManager.enabled needs clusterTls.enabled=true" -}}
{{- end -}}
{{- if and $tls.certManager.enabled (not $tls.certManager.issuerRef.name) -}}
{{- fail "clusterTls.certManager needs issuerRef.name, an Issuer or ClusterIssuer of the cluster's own authority" -}}
{{- end -}}
{{- if and $tls.enabled (not $tls.certManager.enabled) -}}
{{- range $part := list "router" "prefill" "decode" -}}
{{- if not (index $tls.secrets $part) -}}
{{- fail (printf "clusterTls.secrets.%s: name a Secret with tls.crt, tls.key and ca.crt, or set clusterTls.certManager.enabled=true" $part) -}}
{{- end -}}
{{- end -}}
{{- if and (or .Values.planner.enabled .Values.monitoring.enabled) (not $tls.secrets.reader) -}}
{{- fail "clusterTls.secrets.reader: the planner and Prometheus read workers' metrics with it" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.apiKeys.secretName .Values.planner.enabled (not .Values.apiKeys.plannerSecretName) -}}
{{- fail "apiKeys.plannerSecretName: the planner needs an API key too; name a Secret whose key `key` is one" -}}
{{- end -}}
{{- if and .Values.apiKeys.plannerSecretName (not .Values.apiKeys.secretName) -}}
{{- fail "apiKeys.plannerSecretName needs apiKeys.secretName" -}}
{{- end -}}
{{- if ne (empty .Values.etcd.auth.user) (empty .Values.etcd.auth.secretName) -}}
{{- fail "etcd.auth: user and secretName belong together" -}}
{{- end -}}
{{- if and .Values.networkPolicy.egress (eq .Values.model.source "init") -}}
{{- fail "networkPolicy.egress=true would cut off the download of model.source=init: use another source or egress=false" -}}
{{- end -}}
{{- if and (eq .Values.model.source "init") (eq (dir .Values.model.path) "/") -}}
{{- fail "model.path needs a folder above it with model.source=init, such as /models/NAME" -}}
{{- end -}}
{{- if and .Values.router.autoscaling.enabled (gt (int .Values.router.autoscaling.minReplicas) (int .Values.router.autoscaling.maxReplicas)) -}}
{{- fail "router.autoscaling: minReplicas is above maxReplicas" -}}
{{- end -}}
{{- if and .Values.planner.enabled (eq (int .Values.decode.autoscaling.minReplicas) 0) -}}
{{- fail "decode.autoscaling.minReplicas must be at least 1 with the planner: every request ends on a decode worker" -}}
{{- end -}}
{{- if .Values.planner.switchRoles -}}
{{- if not .Values.planner.enabled -}}
{{- fail "planner.switchRoles needs planner.enabled=true" -}}
{{- end -}}
{{- if not (or .Values.prefill.roleSwitch .Values.decode.roleSwitch) -}}
{{- fail "planner.switchRoles needs a pool whose workers may change: prefill.roleSwitch or decode.roleSwitch" -}}
{{- end -}}
{{- if or (ne .Values.prefill.autoscaling.mode "off") (ne .Values.decode.autoscaling.mode "off") -}}
{{- fail "planner.switchRoles is for pools of fixed sizes: set both autoscaling.mode to \"off\"" -}}
{{- end -}}
{{- end -}}
{{- range $role := list "prefill" "decode" -}}
{{- $pool := index $.Values $role -}}
{{- $scaling := $pool.autoscaling -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "%s.autoscaling: minReplicas is above maxReplicas" $role) -}}
{{- end -}}
{{- if and (eq $scaling.mode "hpa") (eq (int $scaling.minReplicas) 0) -}}
{{- fail (printf "%s.autoscaling: an HPA cannot count from 0; set minReplicas to 1 or mode to keda" $role) -}}
{{- end -}}
{{- if and (eq $scaling.mode "keda") (eq (int $scaling.minReplicas) 0) (not $scaling.triggers) (not $.Values.planner.enabled) -}}
{{- fail (printf "%s.autoscaling: with minReplicas 0 the default trigger, a metric of the pool's own workers, would never wake it; give triggers, or planner.enabled=true" $role) -}}
{{- end -}}
{{- if and (eq (toString $pool.maxSurge) "0") (eq (toString $pool.maxUnavailable) "0") -}}
{{- fail (printf "%s: maxSurge and maxUnavailable cannot both be 0" $role) -}}
{{- end -}}
{{- if and (eq $.Values.engine.quantize "fp8") (ne $pool.device "cuda") -}}
{{- fail (printf "engine.quantize=fp8 needs device cuda, and %s.device is %s" $role $pool.device) -}}
{{- end -}}
{{- if and (not $pool.rdma.enabled) (or $pool.rdma.require $pool.rdma.devices) -}}
{{- fail (printf "%s.rdma.require and .devices: rdma.require needs %s.rdma.enabled=true" $role $role) -}}
{{- end -}}
{{- if and $.Values.clusterTls.enabled $pool.rdma.enabled (not $pool.rdma.allowPlain) -}}
{{- fail (printf "%s.rdma: what RDMA writes is not encrypted; with clusterTls set %s.rdma.allowPlain=true to accept that, or rdma.enabled=false" $role $role) -}}
{{- end -}}
{{- if and (eq $pool.device "cuda") (gt (int $pool.threads) 0) -}}
{{- fail (printf "%s.threads is for device cpu" $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}

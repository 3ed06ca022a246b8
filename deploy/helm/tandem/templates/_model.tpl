{{/* Where the model comes from: volume, mount, init container. */}}

{{- define "tandem.modelArgs" -}}
- --model={{ .Values.model.path }}
{{- with .Values.model.name }}
- --model-name={{ . }}
{{- end }}
{{- end -}}

{{- define "tandem.modelVolume" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "pvc" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ required "model.source is pvc: name the claim in model.pvc.claimName" $model.pvc.claimName }}
    readOnly: true
{{- else if eq $model.source "hostPath" }}
- name: model
  hostPath:
    path: {{ required "model.source is hostPath: name the node's folder in model.hostPath.path" $model.hostPath.path }}
    type: Directory
{{- else if eq $model.source "init" }}
- name: model
  emptyDir:
    sizeLimit: {{ $model.init.sizeLimit }}
{{- end }}
{{- end -}}

{{- define "tandem.modelMount" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "init" }}
- name: model
  mountPath: {{ dir $model.path }}
  readOnly: true
{{- else if ne $model.source "image" }}
- name: model
  mountPath: {{ $model.path }}
  readOnly: true
  {{- if and (eq $model.source "pvc") $model.pvc.subPath }}
  subPath: {{ $model.pvc.subPath }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "tandem.modelInit" -}}
{{- $init := .Values.model.init -}}
{{- if eq .Values.model.source "init" }}
initContainers:
  - name: model
    image: {{ required "model.source is init: name the image that downloads in model.init.image" $init.image }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    {{- with $init.command }}
    command:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $init.args }}
    args:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    env:
      - {name: TANDEM_MODEL, value: {{ .Values.model.path | quote }}}
      - {name: HOME, value: /tmp}
      {{- with $init.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    securityContext:
      {{- include "tandem.containerSecurity" . | nindent 6 }}
    {{- with $init.resources }}
    resources:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    volumeMounts:
      - {name: model, mountPath: {{ dir .Values.model.path }}}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end -}}

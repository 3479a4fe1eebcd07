{{- define "vllm-batch.name" -}}
{{ .Release.Name | replace "." "-" | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Labels of the pods of one kind: (dict "kind" "gateway" "root" $). */}}
{{- define "vllm-batch.selector" -}}
app.kubernetes.io/name: vllm-batch
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .kind }}
{{- end }}

{{- define "vllm-batch.labels" -}}
{{ include "vllm-batch.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{/* Refuses values that could not work, or would be open to everyone. */}}
{{- define "vllm-batch.check" -}}
{{- if not .Values.database.existingSecret }}
{{- fail "database.existingSecret is required: the Secret with the URL of Postgres" }}
{{- end }}
{{- if and .Values.tls.existingSecret (not .Values.tls.serverName) }}
{{- fail "tls.serverName is required with tls.existingSecret: pods are called by their addresses" }}
{{- end }}
{{- if not (or .Values.networkPolicy.enabled (and .Values.tls.existingSecret .Values.tokens.existingSecret)) }}
{{- fail "everyone could call: enable networkPolicy, or set tls.existingSecret and tokens.existingSecret" }}
{{- end }}
{{- if gt (int .Values.workers.drainTimeoutS) 80 }}
{{- fail "workers.drainTimeoutS must be at most 80: supervisord kills a worker that takes longer than 90 s to stop" }}
{{- end }}
{{- with .Values.workers.autoscaling }}
{{- if not (has .kind (list "none" "keda" "hpa")) }}
{{- fail "workers.autoscaling.kind must be none, keda or hpa" }}
{{- end }}
{{- if lt (int .minReplicas) 1 }}
{{- fail "workers.autoscaling.minReplicas must be at least 1: without a worker gateways refuse new work" }}
{{- end }}
{{- if lt (int .maxReplicas) (int .minReplicas) }}
{{- fail "workers.autoscaling.maxReplicas must be at least minReplicas" }}
{{- end }}
{{- if and (eq .kind "keda") (not .prometheus) }}
{{- fail "workers.autoscaling.prometheus is required for keda: the URL of Prometheus" }}
{{- end }}
{{- end }}
{{- end }}

{{/*
Probes of a gRPC server, or of a service of it: (dict "port" 50051 "program" "gateway" "service" "" "root" $). The
kubelet's gRPC probes speak no TLS.
*/}}
{{- define "vllm-batch.probe" -}}
{{- if .root.Values.tls.existingSecret -}}
exec:
  command: [.venv/bin/python, -m, scripts.probe, {{ .program }}{{ with .service }}, {{ . }}{{ end }}]
timeoutSeconds: 10
{{- else -}}
grpc: {port: {{ .port }}{{ with .service }}, service: {{ . }}{{ end }}}
timeoutSeconds: 5
{{- end }}
{{- end }}

{{/* Pod settings that all kinds share: (dict "kind" "gateway" "root" $ "values" .Values.gateway). */}}
{{- define "vllm-batch.pod" -}}
enableServiceLinks: false
automountServiceAccountToken: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  seccompProfile: {type: RuntimeDefault}
  {{- range $name, $value := .root.Values.podSecurityContext }}
  {{- if not (kindIs "invalid" $value) }}
  {{ $name }}: {{ $value | int64 }}
  {{- end }}
  {{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "vllm-batch.selector" . | nindent 8 }}
{{- end }}

{{/* Container settings that all kinds share. */}}
{{- define "vllm-batch.container" -}}
image: "{{ .root.Values.image.repository }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}"
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
workingDir: /opt/vllm-batch
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
resources: {{- toYaml .values.resources | nindent 2 }}
{{- end }}

{{- define "vllm-batch.env" -}}
# The address at which the other pods reach this one.
- name: BATCH_HOST
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: BATCH_METRICS_HOST
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: DATABASE_URL
  valueFrom: {secretKeyRef: {name: {{ .root.Values.database.existingSecret }}, key: {{ .root.Values.database.key }}}}
{{- if and .root.Values.database.gatewayKey (ne .kind "worker") }}
- name: BATCH_GATEWAY_DATABASE_URL
  valueFrom: {secretKeyRef: {name: {{ .root.Values.database.existingSecret }}, key: {{ .root.Values.database.gatewayKey }}}}
{{- end }}
{{- if .root.Values.tls.existingSecret }}
- {name: BATCH_SERVER_CERT, value: /etc/vllm-batch/tls/tls.crt}
- {name: BATCH_SERVER_KEY, value: /etc/vllm-batch/tls/tls.key}
- {name: BATCH_TLS_CA, value: /etc/vllm-batch/tls/ca.crt}
- {name: BATCH_TLS_SERVER_NAME, value: {{ .root.Values.tls.serverName | quote }}}
{{- end }}
{{- if .root.Values.tokens.existingSecret }}
- {name: BATCH_TOKEN_HASHES, value: /etc/vllm-batch/tokens/hashes}
{{- end }}
{{- if not (and .root.Values.tls.existingSecret .root.Values.tokens.existingSecret) }}
# The NetworkPolicy keeps strangers away.
- {name: BATCH_ALLOW_INSECURE, value: "true"}
{{- end }}
{{- with .root.Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "vllm-batch.mounts" -}}
- {name: home, mountPath: /var/lib/vllm-batch}
- {name: tmp, mountPath: /tmp}
{{- if .root.Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/vllm-batch/tls, readOnly: true}
{{- end }}
{{- if .root.Values.tokens.existingSecret }}
- {name: tokens, mountPath: /etc/vllm-batch/tokens, readOnly: true}
{{- end }}
{{- end }}

{{- define "vllm-batch.volumes" -}}
- {name: home, emptyDir: {}}
- {name: tmp, emptyDir: {}}
{{- if .root.Values.tls.existingSecret }}
- {name: tls, secret: {secretName: {{ .root.Values.tls.existingSecret }}, defaultMode: 0440}}
{{- end }}
{{- if .root.Values.tokens.existingSecret }}
- {name: tokens, secret: {secretName: {{ .root.Values.tokens.existingSecret }}, defaultMode: 0440}}
{{- end }}
{{- end }}

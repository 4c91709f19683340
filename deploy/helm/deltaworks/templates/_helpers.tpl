{{- define "deltaworks.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "deltaworks.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: gateway
{{- end -}}

{{- define "deltaworks.labels" -}}
{{ include "deltaworks.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "deltaworks.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end -}}

{{- define "deltaworks.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "deltaworks.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "deltaworks.check" -}}
{{- if and (not .Values.store.shared) (or .Values.autoscaling.enabled (gt (int .Values.replicaCount) 1)) -}}
{{- fail "more than one replica needs a store that servers share: name it in [store] of settings, and set store.shared" -}}
{{- end -}}
{{- if and (or .Values.auth.apiKeys .Values.auth.adminKeys) (not .Values.auth.secretName) -}}
{{- fail "auth.apiKeys and auth.adminKeys are keys of the Secret auth.secretName, which is not set" -}}
{{- end -}}
{{- if regexMatch "(?m)^\\s*(api|admin)_keys\\s*=" .Values.settings -}}
{{- fail "settings become a ConfigMap, which is no place for keys: put them into a Secret, auth.secretName" -}}
{{- end -}}
{{- end -}}

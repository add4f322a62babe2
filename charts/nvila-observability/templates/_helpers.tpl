{{/*
Chart name, or what replaces it.
*/}}
{{- define "nvila-observability.name" -}}
{{- default .Chart.Name .Values.nameOverride }}
{{- end }}

{{/*
Prefix of every resource's name. A longer one is refused instead of cut, because two long names could be cut to the same
one.
*/}}
{{- define "nvila-observability.fullname" -}}
{{- $name := include "nvila-observability.name" . }}
{{- $full := printf "%s-%s" .Release.Name $name }}
{{- if contains $name .Release.Name }}
{{- $full = .Release.Name }}
{{- end }}
{{- $full = default $full .Values.fullnameOverride }}
{{- if gt (len $full) 45 }}
{{- fail (printf "name %q has %d characters, at most 45 fit beside the parts' names: set fullnameOverride" $full (len $full)) }}
{{- end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) }}
{{- fail (printf "name %q must start with a letter and hold only a-z, 0-9 and -: set fullnameOverride" $full) }}
{{- end }}
{{- $full }}
{{- end }}

{{/*
Labels of every resource.
*/}}
{{- define "nvila-observability.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/name: {{ include "nvila-observability.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: nvila
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/*
Namespaces in which NVILA runs, as a YAML list.
*/}}
{{- define "nvila-observability.namespaces" -}}
{{- toYaml (default (list .Release.Namespace) .Values.namespaces) }}
{{- end }}

{{/*
The same as a regular expression, for the rules.
*/}}
{{- define "nvila-observability.namespacePattern" -}}
{{- join "|" (default (list .Release.Namespace) .Values.namespaces) }}
{{- end }}

{{/*
Refuse what needs the Prometheus operator where it is not. Takes `root` and `what`, the value that asks for it.
*/}}
{{- define "nvila-observability.requireOperator" -}}
{{- if not (.root.Capabilities.APIVersions.Has "monitoring.coreos.com/v1") }}
{{- fail (printf "%s needs the API monitoring.coreos.com/v1, which this cluster does not have: install the Prometheus operator, or turn the value off. Rendering without a cluster: add --api-versions monitoring.coreos.com/v1" .what) }}
{{- end }}
{{- end }}

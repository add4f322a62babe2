{{/*
Refuse values that contradict each other. Every template that needs an address comes through here.
*/}}
{{- define "nvila-platform.validate" -}}
{{- $s3 := list }}
{{- range $mode := list "seaweedfs" "minio" "external" }}
{{- if (index $.Values.s3 $mode).enabled }}
{{- $s3 = append $s3 (printf "s3.%s.enabled" $mode) }}
{{- end }}
{{- end }}
{{- if gt (len $s3) 1 }}
{{- fail (printf "%s are on together: artifacts live in one place, turn on one of them only" (join " and " $s3)) }}
{{- end }}
{{- if not $s3 }}
{{- fail "no S3 service is on: turn on one of s3.seaweedfs.enabled, s3.minio.enabled and s3.external.enabled" }}
{{- end }}
{{- if and .Values.s3.external.enabled (not .Values.s3.external.endpoint) }}
{{- fail "s3.external.enabled needs s3.external.endpoint: set it to host or host:port" }}
{{- end }}
{{- if not .Values.s3.existingSecret }}
{{- fail (printf "s3.existingSecret is empty: kubectl -n %s create secret generic nvila-s3 --from-literal=%s=... --from-literal=%s=..., and name it" .Release.Namespace .Values.s3.accessKeyKey .Values.s3.secretKeyKey) }}
{{- end }}
{{- if .Values.mlflow.enabled }}
{{- if .Values.mlflow.externalUri }}
{{- fail "mlflow.externalUri and mlflow.enabled are on together: there is one registry, set mlflow.enabled=false or empty the address" }}
{{- end }}
{{- if eq .Values.postgres.bundled.enabled .Values.postgres.external.enabled }}
{{- fail "exactly one of postgres.bundled.enabled and postgres.external.enabled must be on" }}
{{- end }}
{{- if and .Values.postgres.external.enabled (not .Values.postgres.external.host) }}
{{- fail "postgres.external.enabled needs postgres.external.host: set it to the database's host name" }}
{{- end }}
{{- if not .Values.postgres.existingSecret }}
{{- fail (printf "postgres.existingSecret is empty: kubectl -n %s create secret generic nvila-postgres --from-literal=%s=..., and name it" .Release.Namespace .Values.postgres.passwordKey) }}
{{- end }}
{{- range $argument := .Values.mlflow.extraArgs }}
{{- $flag := first (splitList "=" $argument) }}
{{- $value := get (dict "--static-prefix" "mlflow.staticPrefix" "--host" "nothing: it is 0.0.0.0" "--port" "mlflow.port" "--workers" "mlflow.workers" "--artifacts-destination" "s3.bucket and mlflow.artifactPrefix" "--allowed-hosts" "mlflow.allowedHosts" "--cors-allowed-origins" "mlflow.allowedOrigins") $flag }}
{{- if $value }}
{{- fail (printf "mlflow.extraArgs has %s, which probes and clients would not follow: set %s" $flag $value) }}
{{- end }}
{{- end }}
{{- else if not .Values.mlflow.externalUri }}
{{- fail "mlflow.enabled is off and mlflow.externalUri is empty: name the MLflow that pipelines shall use" }}
{{- end }}
{{- end }}

{{/*
Whether an S3 service is part of the release.
*/}}
{{- define "nvila-platform.s3InRelease" -}}
{{- if not .Values.s3.external.enabled }}true{{ end }}
{{- end }}

{{/*
Whether a database is part of the release.
*/}}
{{- define "nvila-platform.postgresInRelease" -}}
{{- if and .Values.mlflow.enabled .Values.postgres.bundled.enabled }}true{{ end }}
{{- end }}

{{/*
`host:port` of the S3 service, and its address with a scheme.
*/}}
{{- define "nvila-platform.s3Endpoint" -}}
{{- include "nvila-platform.validate" . }}
{{- if include "nvila-platform.s3InRelease" . }}
{{- printf "%s-s3.%s.svc:%v" (include "nvila-platform.fullname" .) .Release.Namespace .Values.s3.port }}
{{- else }}
{{- .Values.s3.external.endpoint }}
{{- end }}
{{- end }}

{{- define "nvila-platform.s3Secure" -}}
{{- and .Values.s3.external.enabled .Values.s3.external.secure }}
{{- end }}

{{- define "nvila-platform.s3Url" -}}
{{- printf "%s://%s" (ternary "https" "http" (eq (include "nvila-platform.s3Secure" .) "true")) (include "nvila-platform.s3Endpoint" .) }}
{{- end }}

{{/*
Address of MLflow for everybody in the cluster.
*/}}
{{- define "nvila-platform.mlflowUri" -}}
{{- include "nvila-platform.validate" . }}
{{- if .Values.mlflow.enabled }}
{{- printf "http://%s-mlflow.%s.svc:%v%s" (include "nvila-platform.fullname" .) .Release.Namespace .Values.mlflow.port .Values.mlflow.staticPrefix }}
{{- else }}
{{- .Values.mlflow.externalUri }}
{{- end }}
{{- end }}

{{- define "nvila-platform.postgresHost" -}}
{{- if .Values.postgres.external.enabled }}
{{- .Values.postgres.external.host }}
{{- else }}
{{- printf "%s-postgres.%s.svc" (include "nvila-platform.fullname" .) .Release.Namespace }}
{{- end }}
{{- end }}

{{- define "nvila-platform.postgresPort" -}}
{{- ternary .Values.postgres.external.port 5432 .Values.postgres.external.enabled }}
{{- end }}

{{/*
The two S3 credentials as variables. Takes `root`, and the names `access` and `secret` of the variables.
*/}}
{{- define "nvila-platform.s3Credentials" -}}
- name: {{ .access }}
  valueFrom:
    secretKeyRef:
      name: {{ .root.Values.s3.existingSecret }}
      key: {{ .root.Values.s3.accessKeyKey }}
- name: {{ .secret }}
  valueFrom:
    secretKeyRef:
      name: {{ .root.Values.s3.existingSecret }}
      key: {{ .root.Values.s3.secretKeyKey }}
{{- end }}

{{/*
Namespace of the pipelines, and of the InferenceServices that they make.
*/}}
{{- define "nvila-platform.pipelinesNamespace" -}}
{{- default .Release.Namespace .Values.pipelines.namespace }}
{{- end }}

{{- define "nvila-platform.servingNamespace" -}}
{{- default (include "nvila-platform.pipelinesNamespace" .) .Values.pipelines.rbac.servingNamespace }}
{{- end }}

{{/*
Refuse a part whose API the cluster does not have. Takes `root`, `api` and `what`, the value that asks for it.
*/}}
{{- define "nvila-platform.requireApi" -}}
{{- if not (.root.Capabilities.APIVersions.Has .api) }}
{{- fail (printf "%s needs the API %s, which this cluster does not have: install it, or turn the value off. Rendering without a cluster: add --api-versions %s" .what .api .api) }}
{{- end }}
{{- end }}

{{/*
Host names that MLflow answers to: the service's own, those of a gateway, this machine's behind a forwarded port, and
private addresses. MLflow compares an entry with the whole Host header, port included, unless it has a `*`.
*/}}
{{- define "nvila-platform.mlflowHosts" -}}
{{- $service := printf "%s-mlflow" (include "nvila-platform.fullname" .) }}
{{- $hosts := list }}
{{- range $name := list $service (printf "%s.%s" $service .Release.Namespace) (printf "%s.%s.svc" $service .Release.Namespace) (printf "%s.%s.svc.cluster.local" $service .Release.Namespace) }}
{{- $hosts = append $hosts (printf "%s:%v" $name $.Values.mlflow.port) }}
{{- end }}
{{- /* kubectl port-forward takes any port of this machine. */}}
{{- $hosts = concat $hosts (list "localhost" "localhost:*" "127.0.0.1" "127.0.0.1:*") }}
{{- $hosts = concat $hosts (list "10.*" "192.168.*") }}
{{- range $second := untilStep 16 32 1 }}
{{- $hosts = append $hosts (printf "172.%d.*" $second) }}
{{- end }}
{{- join "," (concat $hosts .Values.mlflow.allowedHosts) }}
{{- end }}

{{/*
Origins whose pages may change something. Without one named, MLflow refuses what its own pages send through a gateway.
*/}}
{{- define "nvila-platform.mlflowOrigins" -}}
{{- $origins := list }}
{{- range .Values.mlflow.allowedHosts }}
{{- $origins = append $origins (printf "https://%s" .) }}
{{- end }}
{{- join "," (concat $origins .Values.mlflow.allowedOrigins | uniq) }}
{{- end }}

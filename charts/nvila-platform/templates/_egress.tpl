{{/*
What MLflow and the jobs may reach. Takes `root` and `component`.
*/}}
{{- define "nvila-platform.egress" -}}
{{- $root := .root }}
# Names.
- ports:
    - protocol: UDP
      port: 53
    - protocol: TCP
      port: 53
  to:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: kube-system
{{- if ne .component "upload" }}
# The S3 service.
{{- if include "nvila-platform.s3InRelease" $root }}
- ports:
    - protocol: TCP
      port: {{ $root.Values.s3.port }}
  to:
    - podSelector:
        matchLabels:
          {{- include "nvila-platform.selectorLabels" (dict "root" $root "component" "s3") | nindent 10 }}
{{- else }}
- ports:
    {{- range $root.Values.networkPolicy.externalS3Ports }}
    - protocol: TCP
      port: {{ . }}
    {{- end }}
  {{- include "nvila-platform.externalPeers" $root | nindent 2 }}
{{- end }}
{{- end }}
{{- if eq .component "mlflow" }}
# The database.
- ports:
    - protocol: TCP
      port: {{ include "nvila-platform.postgresPort" $root }}
  {{- if include "nvila-platform.postgresInRelease" $root }}
  to:
    - podSelector:
        matchLabels:
          {{- include "nvila-platform.selectorLabels" (dict "root" $root "component" "postgres") | nindent 10 }}
  {{- else }}
  {{- include "nvila-platform.externalPeers" $root | nindent 2 }}
  {{- end }}
{{- end }}
{{- if eq .component "upload" }}
# The API of Kubeflow Pipelines. A policy sees the pod behind a service, whose port is the service's there.
- ports:
    - protocol: TCP
      port: {{ include "nvila-platform.kfpPort" $root }}
{{- end }}
{{- with $root.Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/*
Peers outside the cluster; nothing when any will do.
*/}}
{{- define "nvila-platform.externalPeers" -}}
{{- with .Values.networkPolicy.externalCidrs }}
to:
  {{- range . }}
  - ipBlock:
      cidr: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/*
Port of the address of Kubeflow Pipelines.
*/}}
{{- define "nvila-platform.kfpPort" -}}
{{- $endpoint := .Values.pipelines.upload.endpoint }}
{{- $host := (urlParse $endpoint).host }}
{{- if contains ":" $host }}
{{- regexFind "[0-9]+$" $host }}
{{- else }}
{{- ternary 443 80 (hasPrefix "https://" $endpoint) }}
{{- end }}
{{- end }}

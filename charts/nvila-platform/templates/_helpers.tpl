{{/*
Chart name, or what replaces it.
*/}}
{{- define "nvila-platform.name" -}}
{{- default .Chart.Name .Values.nameOverride }}
{{- end }}

{{/*
Prefix of every resource's name.

A StatefulSet's pods carry `<name>-<hash>` as a label, which holds 63 characters: 40 are left beside our own endings. A
longer name is refused instead of cut, because two long names could be cut to the same one.
*/}}
{{- define "nvila-platform.fullname" -}}
{{- $name := include "nvila-platform.name" . }}
{{- $full := printf "%s-%s" .Release.Name $name }}
{{- if contains $name .Release.Name }}
{{- $full = .Release.Name }}
{{- end }}
{{- $full = default $full .Values.fullnameOverride }}
{{- if gt (len $full) 40 }}
{{- fail (printf "name %q has %d characters, at most 40 fit into labels: set fullnameOverride" $full (len $full)) }}
{{- end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) }}
{{- fail (printf "name %q must start with a letter and hold only a-z, 0-9 and -: set fullnameOverride" $full) }}
{{- end }}
{{- $full }}
{{- end }}

{{/*
Labels that never change between versions of a release. Takes `root` and `component`.
*/}}
{{- define "nvila-platform.selectorLabels" -}}
app.kubernetes.io/name: {{ include "nvila-platform.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/*
Labels of pods. No chart version here: it would restart every pod on an upgrade that changes nothing else.
*/}}
{{- define "nvila-platform.podLabels" -}}
{{ include "nvila-platform.selectorLabels" . }}
app.kubernetes.io/part-of: nvila
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/*
Labels of every other resource.
*/}}
{{- define "nvila-platform.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{ include "nvila-platform.podLabels" . }}
{{- end }}

{{/*
Image reference, by digest where one is given, otherwise by tag; the chart's own choices are pinned besides, whatever
registry they come from: a mirror keeps digests. Takes `root`, `image` and `path`, its key in the values.
*/}}
{{- define "nvila-platform.image" -}}
{{- if eq .image.tag "latest" }}
{{- fail (printf "%s.tag \"latest\" names another image tomorrow: give a version, or set %s.digest" .path .path) }}
{{- end }}
{{- $registry := default .root.Values.global.imageRegistry .image.registry }}
{{- $name := .image.repository }}
{{- if $registry }}
{{- $name = printf "%s/%s" $registry $name }}
{{- end }}
{{- if .image.digest }}
{{- printf "%s@%s" $name .image.digest }}
{{- else }}
{{- $tag := default .root.Chart.AppVersion .image.tag }}
{{- $digest := "" }}
{{- range $pinned, $of := .root.Files.Get "files/image-digests.yaml" | fromYaml }}
{{- if eq (regexReplaceAll "^[^/]+/" $pinned "") (printf "%s:%s" $.image.repository $tag) }}
{{- $digest = printf "@%s" $of }}
{{- end }}
{{- end }}
{{- printf "%s:%s%s" $name $tag $digest }}
{{- end }}
{{- end }}

{{/*
Pull secrets of the chart and of its umbrella, as a YAML list; empty when there are none.
*/}}
{{- define "nvila-platform.imagePullSecrets" -}}
{{- range concat .Values.global.imagePullSecrets .Values.imagePullSecrets | uniq }}
- name: {{ . }}
{{- end }}
{{- end }}

{{/*
Security context of a container: the `restricted` pod security standard with a read-only root.
*/}}
{{- define "nvila-platform.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/*
What every pod spec starts with. Takes `root`, `user` for an image whose user is not ours, and `part`, the values of a part
that may say for itself where it runs.
*/}}
{{- define "nvila-platform.podSpec" -}}
{{- $part := default dict .part }}
serviceAccountName: {{ include "nvila-platform.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with include "nvila-platform.imagePullSecrets" .root }}
imagePullSecrets:
  {{- . | trim | nindent 2 }}
{{- end }}
securityContext:
  {{- if .user }}
  runAsNonRoot: true
  runAsUser: {{ .user }}
  runAsGroup: {{ .user }}
  fsGroup: {{ .user }}
  # A large volume is not walked through at every start.
  fsGroupChangePolicy: OnRootMismatch
  {{- else }}
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with default .root.Values.nodeSelector $part.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with default .root.Values.tolerations $part.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with default .root.Values.affinity $part.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
Name of the account that the pods run under.
*/}}
{{- define "nvila-platform.serviceAccountName" -}}
{{- $own := ternary (include "nvila-platform.fullname" .) "default" .Values.serviceAccount.create }}
{{- default $own .Values.serviceAccount.name }}
{{- end }}

{{/*
Certificates that MLflow and the jobs trust: the variables that their libraries read, the mount and the volume. Empty
where the image's own are taken.
*/}}
{{- define "nvila-platform.caEnv" -}}
{{- if .Values.trustedCertificates.existingConfigMap }}
{{- range list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "AWS_CA_BUNDLE" }}
- name: {{ . }}
  value: {{ include "nvila-platform.caFile" $ }}
{{- end }}
{{- end }}
{{- end }}

{{- define "nvila-platform.caFile" -}}
{{- $own := printf "/etc/nvila/ca/%s" .Values.trustedCertificates.key }}
{{- ternary $own "/etc/ssl/certs/ca-certificates.crt" (not (empty .Values.trustedCertificates.existingConfigMap)) }}
{{- end }}

{{- define "nvila-platform.caMount" -}}
{{- if .Values.trustedCertificates.existingConfigMap }}
- name: ca
  mountPath: /etc/nvila/ca
  readOnly: true
{{- end }}
{{- end }}

{{- define "nvila-platform.caVolume" -}}
{{- with .Values.trustedCertificates.existingConfigMap }}
- name: ca
  configMap:
    name: {{ . }}
{{- end }}
{{- end }}

{{/*
How the bundled database is asked whether it takes connections, over TCP: while initdb runs, only the socket answers.
*/}}
{{- define "nvila-platform.postgresProbe" -}}
exec:
  command:
    - pg_isready
    - --host=127.0.0.1
    - --username={{ .Values.postgres.user }}
    - --dbname={{ .Values.postgres.database }}
{{- end }}

{{/*
Claim of a StatefulSet's volume. Its labels cannot change later, so they are the selector's. Takes `root`, `component`
and `persistence`.
*/}}
{{- define "nvila-platform.claim" -}}
- metadata:
    name: data
    labels:
      {{- include "nvila-platform.selectorLabels" . | nindent 6 }}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with .persistence.storageClass }}
    storageClassName: {{ . }}
    {{- end }}
    resources:
      requests:
        storage: {{ .persistence.size }}
{{- end }}

{{/*
A container of ours that runs a Python file of this chart. Takes `root` and `file`.
*/}}
{{- define "nvila-platform.script" -}}
image: {{ include "nvila-platform.image" (dict "root" .root "image" .root.Values.image "path" "image") }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: [python, -c]
args:
  - |
    {{- .root.Files.Get (printf "files/%s" .file) | nindent 4 }}
{{- end }}

{{/*
Requests and limits of the small scripts.
*/}}
{{- define "nvila-platform.scriptResources" -}}
requests:
  cpu: 50m
  memory: 128Mi
limits:
  cpu: 500m
  memory: 256Mi
{{- end }}

{{/*
Where S3 is and who we are there, as the project's own settings name it.
*/}}
{{- define "nvila-platform.s3Env" -}}
- name: NVILA_S3_ENDPOINT
  value: {{ include "nvila-platform.s3Endpoint" . | quote }}
- name: NVILA_S3_SECURE
  value: {{ include "nvila-platform.s3Secure" . | quote }}
{{ include "nvila-platform.s3Credentials" (dict "root" . "access" "NVILA_S3_ACCESS_KEY" "secret" "NVILA_S3_SECRET_KEY") }}
{{- end }}

{{/*
Refuse when a namespace lacks a secret or a key of it. Takes `root`, `name`, `value`, the value that names it, `keys`, and
`namespace`, the release's by default. Only with a cluster: without one a lookup gives nothing, with one at least an empty
list. Helm reads the secrets of the release's namespace anyhow, so there it needs no more rights than an installation.
*/}}
{{- define "nvila-platform.requireSecret" -}}
{{- $namespace := default .root.Release.Namespace .namespace }}
{{- if lookup "v1" "Secret" $namespace "" }}
{{- $make := printf "kubectl -n %s create secret generic %s" $namespace .name }}
{{- range .keys }}
{{- $make = printf "%s --from-literal=%s=..." $make . }}
{{- end }}
{{- $found := lookup "v1" "Secret" $namespace .name }}
{{- if not $found }}
{{- fail (printf "%s names secret %q, which namespace %s does not have: %s; or set checkSecrets=false where something makes it later" .value .name $namespace $make) }}
{{- end }}
{{- range .keys }}
{{- if not (hasKey (default dict $found.data) .) }}
{{- fail (printf "%s names secret %q, which has no key %q: make it anew, %s" $.value $.name . $make) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

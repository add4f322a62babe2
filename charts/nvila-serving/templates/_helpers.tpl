{{/*
Chart name, or what replaces it.
*/}}
{{- define "nvila-serving.name" -}}
{{- default .Chart.Name .Values.nameOverride }}
{{- end }}

{{/*
Name of every resource, of the InferenceService and so of the model in requests.

KServe labels pods with `isvc.<name>-predictor`, and a label value holds 63 characters: 48 are left. A longer name is
refused instead of cut, because two long names could be cut to the same one.
*/}}
{{- define "nvila-serving.fullname" -}}
{{- $name := include "nvila-serving.name" . }}
{{- $full := printf "%s-%s" .Release.Name $name }}
{{- if contains $name .Release.Name }}
{{- $full = .Release.Name }}
{{- end }}
{{- $full = default $full .Values.fullnameOverride }}
{{- if gt (len $full) 48 }}
{{- fail (printf "name %q has %d characters, at most 48 fit into KServe's labels: set fullnameOverride" $full (len $full)) }}
{{- end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) }}
{{- fail (printf "name %q must start with a letter and hold only a-z, 0-9 and -: set fullnameOverride" $full) }}
{{- end }}
{{- $full }}
{{- end }}

{{/*
Labels that never change between versions of a release.
*/}}
{{- define "nvila-serving.selectorLabels" -}}
app.kubernetes.io/name: {{ include "nvila-serving.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/*
Labels of resources whose labels reach the pods. No chart version here: it would restart every pod on an upgrade that
changes nothing else.
*/}}
{{- define "nvila-serving.podLabels" -}}
{{ include "nvila-serving.selectorLabels" . }}
app.kubernetes.io/part-of: nvila
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/*
Labels of every other resource.
*/}}
{{- define "nvila-serving.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{ include "nvila-serving.podLabels" . }}
{{- end }}

{{/*
Labels that KServe itself puts on the pods of the InferenceService.
*/}}
{{- define "nvila-serving.predictorLabels" -}}
serving.kserve.io/inferenceservice: {{ include "nvila-serving.fullname" . }}
component: predictor
{{- end }}

{{/*
Name of the runtime. One of the whole cluster is told from those of other namespaces by the release's.
*/}}
{{- define "nvila-serving.runtimeName" -}}
{{- $name := include "nvila-serving.fullname" . }}
{{- if .Values.runtime.clusterWide }}
{{- $name = printf "%s-%s" .Release.Namespace $name }}
{{- if gt (len $name) 63 }}
{{- fail (printf "runtime.clusterWide makes the name %q, which has %d characters, at most 63 fit: set fullnameOverride" $name (len $name)) }}
{{- end }}
{{- end }}
{{- $name }}
{{- end }}

{{/*
"true" in the Knative mode of KServe, else empty.
*/}}
{{- define "nvila-serving.knative" -}}
{{- if eq .Values.deploymentMode "Knative" }}true{{ end }}
{{- end }}

{{/*
Refuse what a mode of KServe cannot do.
*/}}
{{- define "nvila-serving.checkMode" -}}
{{- $scaling := .Values.autoscaling }}
{{- if include "nvila-serving.knative" . }}
{{- if not (.Capabilities.APIVersions.Has "serving.knative.dev/v1") }}
{{- fail "deploymentMode Knative needs the API serving.knative.dev/v1, which this cluster does not have: install Knative Serving, or set deploymentMode=Standard. Rendering without a cluster: add --api-versions serving.knative.dev/v1" }}
{{- end }}
{{- range list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- if get $.Values . }}
{{- fail (printf "deploymentMode Knative leaves the place of pods to Knative, and %s is set: leave it out, or set deploymentMode=Standard" .) }}
{{- end }}
{{- end }}
{{- if eq $scaling.class "keda" }}
{{- fail "autoscaling.class keda scales Deployments, and Knative scales its own: set autoscaling.class=hpa and autoscaling.knative, or deploymentMode=Standard" }}
{{- end }}
{{- if and (not $scaling.enabled) (eq (int $scaling.minReplicas) 0) }}
{{- fail "autoscaling.minReplicas is 0 and autoscaling.enabled is off, which would be no pods for ever: raise it to 1, or set autoscaling.enabled=true" }}
{{- end }}
{{- if and .Values.route.enabled (not .Values.endpoint.service.name) }}
{{- fail "route.enabled needs a service with pods behind it, and Knative's leads to its gateway: set endpoint.service.name, .namespace and .host to those of that gateway" }}
{{- end }}
{{- end }}
{{- end }}

{{/*
Name of the service that leads to the endpoint.
*/}}
{{- define "nvila-serving.serviceName" -}}
{{- $service := .Values.endpoint.service }}
{{- if and (not .Values.endpoint.create) (not $service.name) }}
{{- fail "endpoint.create is off, and `nvila deploy` leaves a service for each revision: set endpoint.service.name, .namespace and .host to those of KServe's gateway, or turn off route.enabled and tests.enabled" }}
{{- end }}
{{- if and (not $service.name) (or $service.namespace $service.host) }}
{{- fail "endpoint.service.namespace and .host belong to a service that is named: set endpoint.service.name too" }}
{{- end }}
{{- default (printf "%s-predictor" (include "nvila-serving.fullname" .)) $service.name }}
{{- end }}

{{/*
Image reference: by digest where one is given, otherwise by tag.
*/}}
{{- define "nvila-serving.image" -}}
{{- if eq .Values.image.tag "latest" }}
{{- fail "image.tag \"latest\" names another image tomorrow: give a version, or set image.digest" }}
{{- end }}
{{- if and .Values.image.variant (or .Values.image.tag .Values.image.digest) }}
{{- fail "image.variant chooses among the chart's own tags: leave image.tag and image.digest empty, or the variant" }}
{{- end }}
{{- $registry := default .Values.global.imageRegistry .Values.image.registry }}
{{- $path := .Values.image.repository }}
{{- if $registry }}
{{- $path = printf "%s/%s" $registry $path }}
{{- end }}
{{- if .Values.image.digest }}
{{- printf "%s@%s" $path .Values.image.digest }}
{{- else }}
{{- $own := ternary (printf "%s-%s" .Chart.AppVersion .Values.image.variant) .Chart.AppVersion (not (empty .Values.image.variant)) }}
{{- printf "%s:%s" $path (default $own .Values.image.tag) }}
{{- end }}
{{- end }}

{{/*
Pull secrets of the chart and of its umbrella, as a YAML list; empty when there are none.
*/}}
{{- define "nvila-serving.imagePullSecrets" -}}
{{- range concat .Values.global.imagePullSecrets .Values.imagePullSecrets | uniq }}
- name: {{ . }}
{{- end }}
{{- end }}

{{/*
Name of the service account. Secrets hang on an account that this chart makes: on a foreign one they would be ignored.
*/}}
{{- define "nvila-serving.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "nvila-serving.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- if .Values.serviceAccount.secrets }}
{{- fail "serviceAccount.secrets needs serviceAccount.create: add the secrets to your own account, or let the chart make one" }}
{{- end }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/*
Security context of a container: the `restricted` pod security standard with a read-only root.
*/}}
{{- define "nvila-serving.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/*
Security context of a pod.
*/}}
{{- define "nvila-serving.podSecurityContext" -}}
{{ toYaml .Values.podSecurityContext }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/*
Arguments of the server that come of values, as a YAML list.
*/}}
{{- define "nvila-serving.serverArgs" -}}
{{- $closed := or .Values.access.existingSecret .Values.access.trustedHeader }}
{{- if and (not .Values.playground.enabled) (not $closed) }}
{{- fail "playground.enabled off is production, which lets nobody in without a key: set access.existingSecret or access.trustedHeader" }}
{{- end }}
{{- if and .Values.access.requestsPerMinute (not $closed) }}
{{- fail "access.requestsPerMinute counts callers: set access.existingSecret or access.trustedHeader, which tell them apart" }}
{{- end }}
{{- if and .Values.media.networks (not .Values.media.hosts) }}
{{- fail "media.networks are where media.hosts may be: name the hosts too" }}
{{- end }}
{{- if .Values.access.existingSecret }}
- --api-keys
- {{ printf "/etc/nvila/access/%s" .Values.access.secretKey | quote }}
{{- end }}
{{- with .Values.access.trustedHeader }}
- --trusted-header
- {{ . | quote }}
{{- end }}
{{- with .Values.access.requestsPerMinute }}
- --rate-limit
- {{ . | quote }}
{{- end }}
{{- if not .Values.playground.enabled }}
- --production
{{- end }}
{{- range .Values.media.hosts }}
- --media-host
- {{ . | quote }}
{{- end }}
{{- range .Values.media.networks }}
- --media-network
- {{ . | quote }}
{{- end }}
{{- with .Values.media.store }}
- --media-store
- {{ . | quote }}
{{- end }}
{{- if .Values.drift.existingConfigMap }}
- --drift
- {{ printf "/etc/nvila/drift/%s" .Values.drift.configMapKey | quote }}
- --drift-share
- {{ .Values.drift.share | quote }}
{{- end }}
{{- end }}

{{/*
Annotations of the pods: those of the values, and which model it is. Empty when there are none.
*/}}
{{- define "nvila-serving.podAnnotations" -}}
{{- with .Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- if .Values.model.version }}
nvila.dev/model-version: {{ .Values.model.version | quote }}
nvila.dev/model-digest: {{ .Values.model.digest | quote }}
{{- end }}
{{- end }}

{{/*
Refuse when the release's namespace lacks a secret or a key of it. Takes `root`, `name`, `value`, the value that names it,
and `keys`. Only with a cluster: without one a lookup gives nothing, with one at least an empty list. Helm reads the
namespace's secrets anyhow, so it needs no more rights than an installation.
*/}}
{{- define "nvila-serving.requireSecret" -}}
{{- $namespace := .root.Release.Namespace }}
{{- if lookup "v1" "Secret" $namespace "" }}
{{- $make := printf "kubectl -n %s create secret generic %s" $namespace .name }}
{{- range .keys }}
{{- $make = printf "%s --from-file=%s=..." $make . }}
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

{{/*
Alert rules. Each has a runbook of its name in docs/runbooks.
*/}}
{{- define "nvila-observability.alerts" -}}
{{- $in := printf "namespace=~%q" (include "nvila-observability.namespacePattern" .) -}}
{{- $at := .Values.rules.thresholds -}}
- name: nvila-serving.alerts
  rules:
    - alert: NvilaServerDown
      expr: up{ {{- $in }},inferenceservice!=""} == 0
      for: 5m
      {{- include "nvila-observability.alert" (dict "root" . "name" "NvilaServerDown" "severity" "critical"
        "summary" "Pod {{ $labels.pod }} of model {{ $labels.inferenceservice }} does not answer."
        "description" "Prometheus has not reached its /metrics for five minutes.") | nindent 6 }}
    - alert: NvilaFirstTokenSlow
      expr: model:nvila_time_to_first_token_seconds:p95_5m > {{ $at.firstTokenSeconds }}
      for: 10m
      {{- include "nvila-observability.alert" (dict "root" . "name" "NvilaFirstTokenSlow" "severity" "warning"
        "summary" "Model {{ $labels.model_name }} takes long to begin its answers."
        "description" "5 of 100 requests wait {{ $value | humanizeDuration }} or more for the first token.") | nindent 6 }}
    - alert: NvilaErrorsHigh
      expr: model:nvila_errors:ratio_rate5m > {{ $at.errorRatio }}
      for: 10m
      {{- include "nvila-observability.alert" (dict "root" . "name" "NvilaErrorsHigh" "severity" "critical"
        "summary" "Model {{ $labels.model_name }} rejects or loses requests."
        "description" "{{ $value | humanizePercentage }} of the requests end in an error or are given up.") | nindent 6 }}
    - alert: NvilaQueueLong
      expr: nvila:num_requests_waiting{ {{- $in -}} } > {{ $at.waitingRequests }}
      for: 10m
      {{- include "nvila-observability.alert" (dict "root" . "name" "NvilaQueueLong" "severity" "warning"
        "summary" "Requests queue up for model {{ $labels.model_name }}."
        "description" "{{ $value }} requests wait in pod {{ $labels.pod }}.") | nindent 6 }}
- name: nvila-training.alerts
  rules:
    - alert: NvilaTrainingStalled
      # Between stages nothing is trained, so it takes longer than that to count.
      expr: |-
        sum by (namespace, trainjob) (increase(nvila_train_steps_total{ {{- $in -}} }[15m])) == 0
        and sum by (namespace, trainjob) (nvila_train_remaining_seconds{ {{- $in -}} }) > 0
      for: 15m
      {{- include "nvila-observability.alert" (dict "root" . "name" "NvilaTrainingStalled" "severity" "critical"
        "summary" "Training {{ $labels.trainjob }} makes no steps."
        "description" "The process answers, but has not finished a step for half an hour.") | nindent 6 }}
    - alert: NvilaTrainingStepsSkipped
      expr: stage:nvila_train_skipped_steps:ratio_rate15m > {{ $at.skippedStepsRatio }}
      for: 15m
      {{- include "nvila-observability.alert" (dict "root" . "name" "NvilaTrainingStepsSkipped" "severity" "critical"
        "summary" "Training {{ $labels.trainjob }} throws steps away in stage {{ $labels.stage }}."
        "description" "The loss or gradient of {{ $value | humanizePercentage }} of the steps is no number.") | nindent 6 }}
    - alert: NvilaTrainingWaitsForData
      expr: stage:nvila_train_data_wait:ratio_rate5m > {{ $at.dataWaitRatio }}
      for: 30m
      {{- include "nvila-observability.alert" (dict "root" . "name" "NvilaTrainingWaitsForData" "severity" "warning"
        "summary" "Training {{ $labels.trainjob }} waits for data in stage {{ $labels.stage }}."
        "description" "{{ $value | humanizePercentage }} of the time goes into waiting.") | nindent 6 }}
- name: nvila-drift.alerts
  rules:
    - alert: NvilaTrafficDrifted
      expr: max by (namespace, model_name, feature) (nvila:drift_psi{ {{- $in -}} }) > {{ $at.driftIndex }}
      for: 1h
      {{- include "nvila-observability.alert" (dict "root" . "name" "NvilaTrafficDrifted" "severity" "info"
        "summary" "Traffic of {{ $labels.model_name }} is not what the model was evaluated on: {{ $labels.feature }}."
        "description" "Its population stability index is {{ $value | printf \"%.2f\" }}.") | nindent 6 }}
- name: nvila-platform.alerts
  rules:
    - alert: NvilaTrackingFails
      expr: |-
        sum by (namespace) (rate(mlflow_http_request_total{ {{- $in }},status=~"5.."}[5m]))
        / (sum by (namespace) (rate(mlflow_http_request_total{ {{- $in -}} }[5m])) > 0) > {{ $at.errorRatio }}
      for: 10m
      {{- include "nvila-observability.alert" (dict "root" . "name" "NvilaTrackingFails" "severity" "warning"
        "summary" "MLflow in {{ $labels.namespace }} fails."
        "description" "{{ $value | humanizePercentage }} of its answers are errors of its own.") | nindent 6 }}
{{- end }}

{{/*
Labels and annotations of an alert. Takes `root`, `name`, `severity`, `summary` and `description`.
*/}}
{{- define "nvila-observability.alert" -}}
labels:
  severity: {{ .severity }}
  {{- with .root.Values.rules.alertLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  summary: {{ .summary | quote }}
  description: {{ .description | quote }}
  runbook_url: {{ printf "%s/%s.md" (trimSuffix "/" .root.Values.rules.runbooks) .name | quote }}
{{- end }}

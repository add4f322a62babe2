{{/*
Recording rules: what dashboards and alerts both ask for. Names are level:metric:operations.
*/}}
{{- define "nvila-observability.recordings" -}}
{{- $in := printf "namespace=~%q" (include "nvila-observability.namespacePattern" .) -}}
- name: nvila-serving.rules
  rules:
    - record: model:nvila_requests:rate5m
      expr: sum by (namespace, model_name) (rate(nvila:request_success_total{ {{- $in -}} }[5m]))
    - record: model:nvila_rejected:rate5m
      expr: sum by (namespace, model_name) (rate(nvila:request_rejected_total{ {{- $in -}} }[5m]))
    - record: model:nvila_aborted:rate5m
      expr: sum by (namespace, model_name) (rate(nvila:request_success_total{ {{- $in }},finished_reason="abort"}[5m]))
    # Without requests there is no share: nothing is divided by nothing. A model that never rejected has no such series.
    - record: model:nvila_errors:ratio_rate5m
      expr: |-
        (
          (model:nvila_rejected:rate5m or model:nvila_requests:rate5m * 0) + model:nvila_aborted:rate5m
        )
        / ((model:nvila_requests:rate5m + (model:nvila_rejected:rate5m or model:nvila_requests:rate5m * 0)) > 0)
    - record: model:nvila_time_to_first_token_seconds:p95_5m
      expr: |-
        histogram_quantile(0.95,
          sum by (namespace, model_name, le) (rate(nvila:time_to_first_token_seconds_bucket{ {{- $in -}} }[5m])))
    - record: model:nvila_e2e_request_latency_seconds:p95_5m
      expr: |-
        histogram_quantile(0.95,
          sum by (namespace, model_name, le) (rate(nvila:e2e_request_latency_seconds_bucket{ {{- $in -}} }[5m])))
    - record: model:nvila_generation_tokens:rate5m
      expr: sum by (namespace, model_name) (rate(nvila:generation_tokens_total{ {{- $in -}} }[5m]))
- name: nvila-training.rules
  rules:
    - record: stage:nvila_train_data_wait:ratio_rate5m
      expr: |-
        sum by (namespace, trainjob, stage) (rate(nvila_train_data_wait_seconds_total{ {{- $in -}} }[5m]))
        / (sum by (namespace, trainjob, stage) (rate(nvila_train_step_seconds_total{ {{- $in -}} }[5m])) > 0)
    - record: stage:nvila_train_skipped_steps:ratio_rate15m
      expr: |-
        sum by (namespace, trainjob, stage) (rate(nvila_train_skipped_steps_total{ {{- $in -}} }[15m]))
        / (sum by (namespace, trainjob, stage) (rate(nvila_train_steps_total{ {{- $in -}} }[15m])) > 0)
    - record: trainjob:nvila_train_gpu_hours:sum
      expr: sum by (namespace, trainjob) (nvila_train_gpu_seconds_total{ {{- $in -}} }) / 3600
{{- end }}

"""The manifest of an InferenceService, and the revision that its pods are made of.

A revision is a model's version with everything around it: image, arguments, resources. Its name tells both, because
KServe calls a Deployment by it, so that two revisions can run side by side and one of them become the stable one
without a restart.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nvila.errors import ConfigError
from nvila_platform.cluster import serving_runtime
from nvila_platform.cluster.serving_runtime import Mode, plain, runtime_spec
from nvila_platform.cluster.serving_values import ServingValues

API_VERSION = "serving.kserve.io/v1beta1"
ENDPOINT_LABEL = "nvila.dev/endpoint"
MODEL, VERSION, DIGEST = "nvila.dev/model", "nvila.dev/model-version", "nvila.dev/model-digest"
# Of a predictor, what says how many pods there are: a canary has a fixed number.
SCALING = ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "autoScaling", "containerConcurrency")

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_LETTERS = 63
_DIGEST_LETTERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """A version of a model with everything that its pods are made of.

    Args:
        name: Of the revision, such as `v7-1a2b3c`.
        model: Address of the version, `models:/nvila/7`.
        version: Its number.
        digest: Digest of its files.
        runtime: Name of the ServingRuntime.
        predictor: The predictor of the InferenceService.
        scaler: Who scales: `hpa`, `keda`, `none`; empty in Knative mode, where Knative does.
        mode: Of KServe.
        scrape: Whether KServe marks the pods for Prometheus.
    """

    name: str
    model: str
    version: str
    digest: str
    runtime: str
    predictor: dict[str, Any]
    scaler: str
    mode: Mode
    scrape: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Revision:
        """Rebuild a revision from its JSON form."""
        return cls(**found)


def check_name(name: str) -> str:
    """Return the name of an endpoint.

    Raises:
        ConfigError: KServe could not name pods after it.
    """
    # As the chart's; a revision's name has to fit too, which is looked at when there is one.
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name an endpoint", "use small letters, digits and -, a letter first")
    return name


def build(
    endpoint: str, namespace: str, values: ServingValues, mode: Mode, model: str
) -> tuple[Revision, dict[str, Any]]:
    """Return the revision that values make, and its ServingRuntime.

    Args:
        endpoint: Name of the InferenceService, and of the model in requests.
        namespace: Where it is; queries name it.
        values: What the pods shall be; `model` in them names version and storage.
        mode: Of KServe.
        model: Address of the version.

    Raises:
        ConfigError: The names are too long for KServe's labels, or the mode cannot do what the values say.
    """
    _check_mode(values, mode)
    spec = runtime_spec(values, mode)
    # By content: a new image is another runtime, so the pods of the old revision stay as they are.
    runtime = f"{endpoint}-{_short(spec)}"
    predictor = _predictor(endpoint, namespace, values, mode, runtime, model)
    name = f"v{values.model.version}-{_short([spec, predictor])}"
    if len(f"isvc.{endpoint}-{name}-predictor") > _LABEL_LETTERS:
        room = _LABEL_LETTERS - len(f"isvc.-{name}-predictor")
        raise ConfigError(
            f"name {endpoint!r} has {len(endpoint)} characters", f"at most {room} fit into KServe's labels"
        )
    revision = Revision(
        name=name,
        model=model,
        version=values.model.version,
        digest=values.model.digest,
        runtime=runtime,
        predictor=predictor,
        scaler=scaler_of(values) if mode == "Standard" else "",
        mode=mode,
        scrape=values.metrics.scrape,
    )
    return revision, {
        "apiVersion": serving_runtime.API_VERSION,
        "kind": "ServingRuntime",
        "metadata": {"name": runtime, "labels": labels(endpoint, values)},
        "spec": spec,
    }


def inference_service(
    endpoint: str, revision: Revision, common: Mapping[str, str], *, canary: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Return an InferenceService that serves a revision.

    Args:
        endpoint: Its name.
        revision: What gets the traffic that no canary gets.
        common: Labels; they reach the pods, so they are the same for all revisions.
        canary: Entries of `spec.canary`.
    """
    annotations: dict[str, str] = {"serving.kserve.io/deploymentMode": revision.mode}
    if revision.scaler:
        annotations["serving.kserve.io/autoscalerClass"] = revision.scaler
    if revision.scrape:
        annotations["serving.kserve.io/enable-prometheus-scraping"] = "true"
    predictor = dict(revision.predictor)
    if revision.mode == "Standard":
        predictor["name"] = revision.name
    spec: dict[str, Any] = {"predictor": predictor}
    if canary:
        spec["canary"] = list(canary)
    return {
        "apiVersion": API_VERSION,
        "kind": "InferenceService",
        "metadata": {"name": endpoint, "labels": dict(common), "annotations": annotations},
        "spec": spec,
    }


def labels(endpoint: str, values: ServingValues) -> dict[str, str]:
    """Return the labels of everything that belongs to an endpoint."""
    own = {
        "app.kubernetes.io/name": "nvila-serving",
        "app.kubernetes.io/instance": endpoint,
        "app.kubernetes.io/part-of": "nvila",
        "app.kubernetes.io/managed-by": "nvila",
        ENDPOINT_LABEL: endpoint,
    }
    return own | dict(values.common_labels)


def scaler_of(values: ServingValues) -> str:
    """Return KServe's name of what scales the pods."""
    return values.autoscaling.scaler if values.autoscaling.enabled else "none"


def _predictor(
    endpoint: str, namespace: str, values: ServingValues, mode: Mode, runtime: str, model: str
) -> dict[str, Any]:
    version = values.model
    marks = {VERSION: version.version, DIGEST: version.digest} if version.version else {}
    annotations = dict(values.pod_annotations) | marks | ({MODEL: model} if model else {})
    predictor: dict[str, Any] = {
        **({"annotations": annotations} if annotations else {}),
        **({"labels": marks | {DIGEST: version.digest[:_DIGEST_LETTERS]}} if marks else {}),
        **_scaling(endpoint, namespace, values, mode),
        "serviceAccountName": _account(endpoint, values),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "model": {
            "modelFormat": {"name": version.format, "version": version.format_version},
            "protocolVersion": "v2",
            "runtime": runtime,
            "storageUri": version.storage_uri,
            **({"args": ["--version", version.version, "--digest", version.digest]} if version.version else {}),
        },
    }
    return predictor | (_placement(endpoint, values) if mode == "Standard" else {})


def _scaling(endpoint: str, namespace: str, values: ServingValues, mode: Mode) -> dict[str, Any]:
    scaling = values.autoscaling
    found: dict[str, Any] = {
        "minReplicas": scaling.min_replicas,
        "maxReplicas": scaling.max_replicas if scaling.enabled else scaling.min_replicas,
    }
    if mode == "Knative":
        found |= {"scaleMetric": scaling.knative.metric, "scaleTarget": scaling.knative.target}
        return found | {"containerConcurrency": scaling.knative.concurrency}
    if scaler_of(values) == "hpa":
        found |= {"scaleMetric": scaling.metric, "scaleTarget": scaling.target_utilization}
    elif scaler_of(values) == "keda":
        found["autoScaling"] = _keda(endpoint, namespace, values)
    return found


def _keda(endpoint: str, namespace: str, values: ServingValues) -> dict[str, Any]:
    keda = values.autoscaling.keda
    # KServe gives KEDA no type, which means AverageValue, and reads `value`; one that minds the type reads the other.
    target = {"type": "AverageValue", "value": plain(keda.target), "averageValue": plain(keda.target)}
    policy = {"type": "Percent", "value": keda.scale_down.percent_per_minute, "periodSeconds": 60}
    source = {
        "backend": "prometheus",
        "serverAddress": keda.server_address,
        "query": keda.query or load_query(keda.metric, endpoint, namespace),
    }
    return {
        "behavior": {
            "scaleDown": {
                "stabilizationWindowSeconds": keda.scale_down.stabilization_seconds,
                "policies": [policy],
            }
        },
        "metrics": [{"type": "External", "external": {"metric": source, "target": target}}],
    }


def load_query(metric: str, endpoint: str, namespace: str) -> str:
    """Return the PromQL of what KEDA scales on: a sum over the pods, which it divides by their number.

    It is the mean of two minutes. By the latest scrape alone the pods would follow every chance crowd of requests
    (benchmarks/serving/autoscaling.py). Without requests there is no percentile, which is 0 to the autoscaler.
    """
    of = f'{{namespace="{namespace}",model_name="{endpoint}"}}'
    first = f"rate(nvila:time_to_first_token_seconds_bucket{of}[2m])"
    return {
        "requests": f"avg_over_time(sum(nvila:num_requests_running{of} + nvila:num_requests_waiting{of})[2m:15s])",
        "visual_load": f"avg_over_time(sum(nvila:visual_load_tokens{of})[2m:15s])",
        "ttft": f"(histogram_quantile(0.95, sum by (le) ({first})) >= 0 or vector(0))"
        f" * count(nvila:num_requests_running{of})",
    }[metric]


def _placement(endpoint: str, values: ServingValues) -> dict[str, Any]:
    """Return what Knative takes only with flags of it: where pods run and how they stop."""
    context = values.pod_security_context.model_dump(by_alias=True) | {"seccompProfile": {"type": "RuntimeDefault"}}
    found: dict[str, Any] = {
        "terminationGracePeriodSeconds": values.server.termination_grace_period_seconds,
        "securityContext": context,
        "priorityClassName": values.priority_class_name,
        "runtimeClassName": values.runtime_class_name,
        "nodeSelector": dict(values.node_selector),
        "tolerations": [dict(one) for one in values.tolerations],
        "affinity": dict(values.affinity),
        "topologySpreadConstraints": [dict(one) for one in values.topology_spread_constraints] or [_spread(endpoint)],
    }
    return {key: value for key, value in found.items() if value}


def _spread(endpoint: str) -> dict[str, Any]:
    """Prefer one pod a node."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {
            "matchLabels": {"serving.kserve.io/inferenceservice": endpoint, "component": "predictor"},
        },
    }


def _account(endpoint: str, values: ServingValues) -> str:
    account = values.service_account
    return account.name or (endpoint if account.create else "default")


def _check_mode(values: ServingValues, mode: Mode) -> None:
    scaling = values.autoscaling
    if mode == "Knative":
        placed = [
            name
            for name, value in (
                ("nodeSelector", values.node_selector),
                ("tolerations", values.tolerations),
                ("affinity", values.affinity),
                ("topologySpreadConstraints", values.topology_spread_constraints),
                ("priorityClassName", values.priority_class_name),
                ("runtimeClassName", values.runtime_class_name),
            )
            if value
        ]
        if placed:
            raise ConfigError(f"Knative places pods itself, {placed[0]} is set", "leave it out, or use --mode standard")
        if scaling.scaler == "keda":
            raise ConfigError("autoscaling.class keda scales Deployments, Knative its own", "use --mode standard")
        if not scaling.enabled and scaling.min_replicas == 0:
            # To Knative 0 is no bound, which would be the opposite of what was said.
            raise ConfigError("autoscaling.minReplicas is 0 and autoscaling.enabled is off", "raise it to 1")
    elif scaling.min_replicas == 0 and not (scaling.scaler == "keda" and scaling.keda.query):
        raise ConfigError(
            "autoscaling.minReplicas is 0, and nothing would bring a first pod",
            "raise it to 1, use --mode knative, or give keda a query that counts without pods (autoscaling.keda.query)",
        )


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]

"""The manifest of a ServingRuntime: the container that serves a model, whichever model that is.

The same as charts/nvila-serving renders: tests/charts/test_deploy_and_chart.py compares the two over many values.
"""

from __future__ import annotations

from typing import Any, Literal

import nvila
from nvila_platform.cluster.serving_values import Probe, ServingValues

Mode = Literal["Standard", "Knative"]

API_VERSION = "serving.kserve.io/v1alpha1"
_READY, _LIVE = "/v2/health/ready", "/v2/health/live"


def runtime_spec(values: ServingValues, mode: Mode) -> dict[str, Any]:
    """Return the `spec` of the ServingRuntime."""
    spec: dict[str, Any] = {
        "annotations": {"prometheus.kserve.io/port": str(values.server.port), "prometheus.kserve.io/path": "/metrics"},
        "multiModel": False,
        "protocolVersions": ["v1", "v2"],
        "supportedModelFormats": [
            {"name": values.model.format, "version": values.model.format_version, "autoSelect": False}
        ],
    }
    secrets = dict.fromkeys((*values.shared.image_pull_secrets, *values.image_pull_secrets))
    if secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in secrets]
    spec["containers"] = [_container(values, mode)]
    spec["volumes"] = _volumes(values)
    return spec


def container_security() -> dict[str, Any]:
    """Return the security context of a container within the `restricted` pod security standard."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container(values: ServingValues, mode: Mode) -> dict[str, Any]:
    server = values.server
    standard = mode == "Standard"
    container: dict[str, Any] = {
        "name": "kserve-container",
        "image": _image(values),
        "imagePullPolicy": values.image.pull_policy,
        "command": ["nvila"],
        "args": _arguments(values),
        "env": [{"name": "HOME", "value": "/tmp"}, *map(dict, server.extra_env)],  # noqa: S108  # the scratch volume
        # Knative takes the names of protocols alone.
        "ports": [{"name": "http" if standard else "http1", "containerPort": server.port, "protocol": "TCP"}],
        **_probes(values, standard),
        "resources": {"requests": dict(values.resources.requests), "limits": dict(values.resources.limits)},
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  # the scratch volume
            *({"name": name, "mountPath": f"/etc/nvila/{path}", "readOnly": True} for name, path in _mounts(values)),
            *map(dict, server.extra_volume_mounts),
        ],
    }
    if standard and server.drain_seconds:
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": server.drain_seconds}}}
    if not standard:
        # Knative refuses the pod's own security context unless a flag of it is on.
        context = values.pod_security_context
        container["securityContext"] |= {"runAsUser": context.run_as_user, "runAsGroup": context.run_as_group}
    return container


def _image(values: ServingValues) -> str:
    image = values.image
    registry = image.registry or values.shared.image_registry
    path = f"{registry}/{image.repository}" if registry else image.repository
    own = "-".join(part for part in (nvila.__version__, image.variant) if part)
    return f"{path}@{image.digest}" if image.digest else f"{path}:{image.tag or own}"


def _arguments(values: ServingValues) -> list[str]:
    access, media, drift = values.access, values.media, values.drift
    words = ["serve", "--model-dir", "/mnt/models", "--host", "0.0.0.0", "--port", str(values.server.port)]  # noqa: S104  # in a pod
    words += ["--name", "{{.Name}}"]  # filled by KServe with the InferenceService's name
    if access.existing_secret:
        words += ["--api-keys", f"/etc/nvila/access/{access.secret_key}"]
    if access.trusted_header:
        words += ["--trusted-header", access.trusted_header]
    if access.requests_per_minute:
        words += ["--rate-limit", str(access.requests_per_minute)]
    if not values.playground.enabled:
        words.append("--production")
    words += [word for host in media.hosts for word in ("--media-host", host)]
    words += [word for network in media.networks for word in ("--media-network", network)]
    if media.store:
        words += ["--media-store", media.store]
    if drift.existing_config_map:
        words += ["--drift", f"/etc/nvila/drift/{drift.config_map_key}", "--drift-share", plain(drift.share)]
    return [*words, *values.server.extra_args]


def _probes(values: ServingValues, standard: bool) -> dict[str, Any]:
    def probe(path: str, times: Probe) -> dict[str, Any]:
        return {"httpGet": {"path": path, "port": values.server.port}, **times.model_dump(by_alias=True)}

    found = {"readinessProbe": probe(_READY, values.probes.readiness)}
    if standard:
        found["startupProbe"] = probe(_READY, values.probes.startup)
        found["livenessProbe"] = probe(_LIVE, values.probes.liveness)
    # In Knative mode a probe of liveness would restart a container that still loads its model, because nothing waits
    # for the start there; the revision's own progress deadline does.
    return found


def _mounts(values: ServingValues) -> list[tuple[str, str]]:
    mounts = [("api-keys", "access")] if values.access.existing_secret else []
    return [*mounts, ("drift", "drift")] if values.drift.existing_config_map else mounts


def _volumes(values: ServingValues) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {"sizeLimit": values.server.tmp_size_limit}}]
    if values.access.existing_secret:
        volumes.append({"name": "api-keys", "secret": {"secretName": values.access.existing_secret}})
    if values.drift.existing_config_map:
        volumes.append({"name": "drift", "configMap": {"name": values.drift.existing_config_map}})
    return [*volumes, *map(dict, values.server.extra_volumes)]


def plain(number: float) -> str:
    """Return a number as the chart prints it: 4 instead of 4.0."""
    return f"{number:g}"

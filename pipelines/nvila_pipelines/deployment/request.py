"""What a deployment is made of: a registered version, values of its pods, and how it shall be rolled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import ConfigError, GateError
from nvila.yaml_text import parse_yaml
from nvila_platform.registry import REGISTRY, resolve, version_tags

if TYPE_CHECKING:
    from nvila.evaluation.policy import Policy
    from nvila_platform.cluster.serving_runtime import Mode
    from nvila_platform.cluster.serving_values import ServingValues
    from nvila_platform.registry import ModelVersion
    from nvila_platform.settings import Settings

DEFAULT_STEPS = (10, 50, 100)
# What the registry says is not for a person to say otherwise: answers carry it as their origin.
_FROM_REGISTRY = ("version", "digest")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployRequest:
    """What `nvila deploy` was asked for.

    Args:
        model: `models:/NAME@ALIAS`, `NAME@ALIAS` or `NAME/3`.
        endpoint: Name of the endpoint; empty for the model's.
        namespace: Empty for the kubeconfig's, or this pod's.
        values: File of values, as charts/nvila-serving takes it.
        overrides: `dotted.key=value` words.
        mode: Of KServe.
        policy: Its section `live` judges the steps; None moves all traffic when the pods are ready.
        prometheus: Address that it is judged by.
        steps: Shares of the traffic in percent.
        interval_s: How long each is watched.
        timeout_s: Longest wait for pods and for requests.
        alias: Alias that the version gets in the end.
    """

    model: str
    endpoint: str = ""
    namespace: str = ""
    values: Path | None = None
    overrides: Sequence[str] = ()
    mode: Mode = "Standard"
    policy: Policy | None = None
    prometheus: str = ""
    steps: Sequence[int] = ()
    interval_s: float = 120.0
    timeout_s: float = 900.0
    alias: str = "champion"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A version of the registry, as far as a deployment needs it.

    Args:
        version: The version.
        warnings: What whoever deploys it should know.
    """

    version: ModelVersion
    warnings: tuple[str, ...]


def find_version(settings: Settings, model: str) -> Registered:
    """Look a version up and at what is known about it.

    Raises:
        ConfigError: There is none.
        GateError: The gate refused it.
        InfrastructureError: The registry failed.
    """
    from nvila_pipelines.evaluation.gate import REASON_TAG, STATE_TAG
    from nvila_platform.model_card import version_warning

    version = resolve(settings, model if model.startswith(REGISTRY) else f"{REGISTRY}{model}")
    tags = version_tags(settings, version)
    if tags.get(STATE_TAG) == "refused":
        raise GateError(
            f"the gate refused {version.model_uri}: {tags.get(REASON_TAG, '')}",
            "deploy another version, or judge again",
        )
    licence = version_warning(tags)
    warnings = [f"{version.model_uri}: {licence}"] if licence is not None else []
    if STATE_TAG not in tags:
        warnings.append(f"no gate has judged {version.model_uri}: nvila gate {version.model_uri} --policy FILE")
    return Registered(version=version, warnings=tuple(warnings))


def serving_values(request: DeployRequest, version: ModelVersion) -> tuple[ServingValues, list[str]]:
    """Return the values of a deployment, and the sections of the file that only the chart uses.

    Raises:
        ConfigError: A value is wrong, or the model's files are where no cluster could get them.
    """
    from nvila_platform.cluster.serving_values import CHART_ONLY, parse_values

    raw = _read(request.values) if request.values is not None else {}
    where = str(request.values) if request.values is not None else "values"
    for word in request.overrides:
        _override(raw, word)
    model = raw.setdefault("model", {})
    if isinstance(model, dict):
        for key in _FROM_REGISTRY:
            if model.get(key):
                raise ConfigError(f"{where}: model.{key} comes from the registry", "leave it out")
        model |= {"version": str(version.version), "digest": version.digest}
        model.setdefault("storageUri", version.uri)
        if "://" not in str(model["storageUri"]) or str(model["storageUri"]).startswith("file:"):
            raise ConfigError(
                f"{version.model_uri} is in the folder {model['storageUri']}, which a cluster cannot read",
                "keep artifacts in S3 (NVILA_STORE_URI=s3://...), or name a copy: model.storageUri=pvc://CLAIM/PATH",
            )
    mode = raw.pop("deploymentMode", request.mode)
    if mode != request.mode:
        raise ConfigError(
            f"{where}: deploymentMode is {mode}, and --mode is {request.mode.lower()}",
            "say the same in both: --mode knative, or deploymentMode: Standard",
        )
    unused = [key for key in CHART_ONLY if raw.pop(key, None) is not None]
    return parse_values(raw, where), unused


def steps_of(text: str) -> tuple[int, ...]:
    """Return shares written as `10,50,100`.

    Raises:
        ConfigError: They are no growing percentages.
    """
    parts = [part.strip() for part in text.split(",")]
    steps = [int(part) if part.isascii() and part.isdecimal() else 0 for part in parts]
    if not all(0 < step <= 100 for step in steps) or steps != sorted(set(steps)):
        raise ConfigError(f"--steps {text} are no growing percentages", "write --steps 10,50,100")
    return tuple(steps)


def check_rollout(request: DeployRequest) -> None:
    """Make sure that what shall be judged can be.

    Raises:
        ConfigError: A policy has no limits for it, nothing judges the steps, or there are no metrics to judge by.
    """
    if request.policy is None:
        if request.steps:
            raise ConfigError("--steps need something that decides about the next one", "add --policy FILE")
        return
    if request.policy.live is None:
        raise ConfigError("the policy has no section 'live'", "add live: {max_error_rate: 0.02, ttft_p95_ms: 1000}")
    if not request.prometheus:
        raise ConfigError("no Prometheus is named to judge by", "set NVILA_PROMETHEUS_URL, or add --prometheus URL")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"the values {path} cannot be read: {e}", "check the path") from e
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no values", "write KEY: VALUE, as charts/nvila-serving/values.yaml does")
    return raw or {}


def _override(raw: dict[str, Any], word: str) -> None:
    dotted, separator, text = word.partition("=")
    if not separator or not dotted.strip():
        raise ConfigError(f"'{word}' is no value", "write KEY=VALUE, such as autoscaling.maxReplicas=8")
    *sections, last = dotted.strip().split(".")
    place = raw
    for section in sections:
        found = place.setdefault(section, {})
        if not isinstance(found, dict):
            raise ConfigError(f"{word}: {section} is a value, not a section", f"set {section}=...")
        place = found
    place[last] = parse_yaml(text, where=word)

"""Values of a deployment: the keys and defaults of charts/nvila-serving, as far as they are about the model's pods.

A file that `helm install` takes is taken here too. What it says about resources that only the chart makes is listed in
`CHART_ONLY`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.alias_generators import to_camel

from nvila.errors import ConfigError, nearest

# Made by the chart alone; a deployment leaves them as they are.
CHART_ONLY = (
    "nameOverride",
    "fullnameOverride",
    "checkSecrets",
    "commonAnnotations",
    "endpoint",
    "extraObjects",
    "route",
    "runtime",
    "networkPolicy",
    "podDisruptionBudget",
    "tests",
)

Name = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)


class Shared(_Values):
    """Values that an umbrella chart shares."""

    image_registry: str = ""
    image_pull_secrets: tuple[Name, ...] = ()


class Image(_Values):
    """The serving image."""

    registry: str = ""
    repository: Annotated[str, Field(min_length=1)] = "nvila/serve"
    tag: Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$")] = ""
    variant: Literal["", "cpu"] = ""
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"


class Model(_Values):
    """The model to serve."""

    storage_uri: str = "pvc://nvila-models/champion"
    format: Annotated[str, Field(min_length=1)] = "nvila"
    format_version: str = "1"
    version: str = ""
    digest: str = ""


class Server(_Values):
    """The `nvila serve` process."""

    port: Annotated[int, Field(ge=1024, le=65535)] = 8080
    extra_args: tuple[str, ...] = ()
    extra_env: tuple[dict[str, Any], ...] = ()
    extra_volumes: tuple[dict[str, Any], ...] = ()
    extra_volume_mounts: tuple[dict[str, Any], ...] = ()
    drain_seconds: Count = 5
    termination_grace_period_seconds: Positive = 60
    tmp_size_limit: str = "1Gi"


class Access(_Values):
    """Who may ask."""

    existing_secret: Name = ""
    secret_key: str = "api-keys"  # noqa: S105  # the name of a key in a secret
    trusted_header: str = ""
    requests_per_minute: Count = 0


class Playground(_Values):
    """The page at `/playground`."""

    enabled: bool = True


class Media(_Values):
    """Media that requests name instead of sending them."""

    hosts: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    store: str = ""


class Drift(_Values):
    """Comparing traffic with the evaluation set."""

    existing_config_map: Name = ""
    config_map_key: str = "drift.json"
    share: Annotated[float, Field(gt=0, le=1)] = 0.1


class Resources(_Values):
    """Requests and limits of the container."""

    requests: dict[str, int | float | str] = {"cpu": "1", "memory": "2Gi"}
    limits: dict[str, int | float | str] = {"cpu": "2", "memory": "4Gi"}

    @field_validator("requests", "limits", mode="before")
    @classmethod
    def _merged(cls, given: Any, info: ValidationInfo) -> Any:
        """Add the defaults of what is not given, as helm does; null takes one away."""
        default = cls.model_fields[str(info.field_name)].default
        if not isinstance(given, Mapping):
            return given
        return {key: value for key, value in {**default, **given}.items() if value is not None}


class ScaleDown(_Values):
    """How pods are taken away."""

    stabilization_seconds: Count = 300
    percent_per_minute: Annotated[int, Field(ge=1, le=100)] = 20


class Keda(_Values):
    """Scaling by what Prometheus sees."""

    server_address: str = ""
    metric: Literal["requests", "visual_load", "ttft"] = "requests"
    query: str = ""
    target: Annotated[float, Field(gt=0)] = 4
    scale_down: ScaleDown = ScaleDown()


class Knative(_Values):
    """Scaling by Knative, of a deployment in that mode.

    Args:
        metric: What is measured.
        target: Value of it at which a pod is added.
        concurrency: Requests that one pod gets at a time; 0 for any number.
    """

    metric: Literal["concurrency", "rps"] = "concurrency"
    target: Positive = 4
    concurrency: Count = 0


class Autoscaling(_Values):
    """How many pods serve the model."""

    enabled: bool = True
    scaler: Annotated[Literal["hpa", "keda"], Field(alias="class")] = "hpa"
    min_replicas: Count = 1
    max_replicas: Positive = 4
    metric: Literal["cpu", "memory"] = "cpu"
    target_utilization: Annotated[int, Field(ge=1, le=100)] = 80
    keda: Keda = Keda()
    knative: Knative = Knative()


class Probe(_Values):
    """Times of one probe."""

    period_seconds: Positive
    timeout_seconds: Positive
    failure_threshold: Positive


class Startup(Probe):
    """The probe that waits for the model."""

    period_seconds: Positive = 5
    timeout_seconds: Positive = 3
    failure_threshold: Positive = 120


class Readiness(Probe):
    """The probe that takes a pod out of the load balancer."""

    period_seconds: Positive = 5
    timeout_seconds: Positive = 3
    failure_threshold: Positive = 3


class Liveness(Probe):
    """The probe that restarts a container."""

    period_seconds: Positive = 10
    timeout_seconds: Positive = 5
    failure_threshold: Positive = 6


class Probes(_Values):
    """Times of the three probes."""

    startup: Startup = Startup()
    readiness: Readiness = Readiness()
    liveness: Liveness = Liveness()


class ServiceAccount(_Values):
    """The identity of the pods. A deployment makes none: `create` says that the chart made the one of its name."""

    create: bool = False
    name: Name = ""
    annotations: dict[str, str] = {}
    secrets: tuple[Name, ...] = ()


class PodSecurityContext(_Values):
    """Security context of the pod."""

    run_as_non_root: Literal[True] = True
    run_as_user: Positive = 10001
    run_as_group: Positive = 10001
    fs_group: Positive = 10001


class Metrics(_Values):
    """The server's Prometheus metrics."""

    scrape: bool = True


class ServingValues(_Values):
    """Everything that a deployment can be told; the keys are those of the chart."""

    shared: Annotated[Shared, Field(alias="global")] = Shared()
    image: Image = Image()
    image_pull_secrets: tuple[Name, ...] = ()
    model: Model = Model()
    server: Server = Server()
    access: Access = Access()
    playground: Playground = Playground()
    media: Media = Media()
    drift: Drift = Drift()
    resources: Resources = Resources()
    autoscaling: Autoscaling = Autoscaling()
    probes: Probes = Probes()
    service_account: ServiceAccount = ServiceAccount()
    pod_security_context: PodSecurityContext = PodSecurityContext()
    metrics: Metrics = Metrics()
    common_labels: dict[str, str] = {}
    pod_annotations: dict[str, str] = {}
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, Any], ...] = ()
    affinity: dict[str, Any] = {}
    topology_spread_constraints: tuple[dict[str, Any], ...] = ()
    priority_class_name: str = ""
    runtime_class_name: Name = ""


def parse_values(raw: Mapping[str, Any], where: str) -> ServingValues:
    """Validate values and the rules between them; those in `CHART_ONLY` have been taken out.

    Raises:
        ConfigError: With the key, what is wrong with it and the nearest one.
    """
    try:
        values = ServingValues.model_validate(raw)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: there is no value '{place}'", _nearest(first["loc"])) from e
        problem = f"{where}: {place} is {first['input']!r}: {first['msg'].lower()}"
        # A number of YAML forgets how it was written: 1.20 is 1.2, which is another image.
        quote = first["type"] == "string_type" and isinstance(first["input"], int | float)
        hint = "quote it, as in image.tag='\"1.20\"'" if quote else "charts/nvila-serving/README.md lists the values"
        raise ConfigError(problem, hint) from e
    _check(values, where)
    return values


def _nearest(place: tuple[int | str, ...]) -> str:
    found: type[BaseModel] = ServingValues
    for part in place[:-1]:
        field = {one.alias: one for one in found.model_fields.values()}.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        found = field.annotation
    return nearest(str(place[-1]), [str(one.alias) for one in found.model_fields.values()])


def _check(values: ServingValues, where: str) -> None:
    """Apply the rules that the chart's templates apply."""
    scaling, server, access = values.autoscaling, values.server, values.access
    closed = bool(access.existing_secret or access.trusted_header)
    rules = (
        (
            bool(values.image.variant and (values.image.tag or values.image.digest)),
            "image.variant chooses among the chart's own tags, and image.tag or image.digest is set",
            "leave out one of them",
        ),
        (values.image.tag == "latest", "image.tag is latest, which is another image tomorrow", "give a version"),
        (
            scaling.enabled and scaling.max_replicas < scaling.min_replicas,
            f"autoscaling.maxReplicas is {scaling.max_replicas}, under minReplicas {scaling.min_replicas}",
            "raise it",
        ),
        (
            scaling.enabled and scaling.scaler == "keda" and not scaling.keda.server_address,
            "autoscaling.class is keda, and autoscaling.keda.serverAddress is empty",
            "set it to the address of Prometheus",
        ),
        (
            server.termination_grace_period_seconds <= server.drain_seconds,
            f"server.terminationGracePeriodSeconds leaves nothing after server.drainSeconds {server.drain_seconds}",
            "raise it",
        ),
        (
            not values.playground.enabled and not closed,
            "playground.enabled is off, which is production, and nobody needs a key",
            "set access.existingSecret or access.trustedHeader",
        ),
        (
            bool(access.requests_per_minute) and not closed,
            "access.requestsPerMinute counts callers, and nothing tells them apart",
            "set access.existingSecret or access.trustedHeader",
        ),
        (
            bool(values.media.networks) and not values.media.hosts,
            "media.networks are where media.hosts may be, and there are none",
            "name the hosts too",
        ),
    )
    for broken, problem, hint in rules:
        if broken:
            raise ConfigError(f"{where}: {problem}", hint)

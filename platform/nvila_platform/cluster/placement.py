"""What the nodes of a job are given: the part of a profile that goes with the job to the cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvila.errors import ConfigError

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[EPTGMK]i?)?$")]
Image = Annotated[str, Field(pattern=r"^[^\s@:]+(:[0-9]+/[^\s@:]+)?(:[^\s@:/]+|@sha256:[0-9a-f]{64})$")]
ResourceName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\s]+$")]
_DAY_S = 86_400
# How the PodMonitor of charts/nvila-observability finds the pods in which a model is trained, and where it asks them.
WATCHED = {"nvila.dev/metrics": "training"}
METRICS_ADDRESS = "0.0.0.0:9464"  # all addresses of the pod


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Toleration(_Strict):
    """As Kubernetes writes it."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class JobPlacement(_Strict):
    """The nodes of a training job.

    Args:
        image: Container image with the `nvila` command, torch and DeepSpeed.
        nodes: How many.
        gpus: GPUs of each node, with one process each; 0 takes the number of processes from the recipe.
        gpu_type: Resource that they are, such as `nvidia.com/gpu`.
        cpu: Cores of each node, such as `32`.
        memory: Memory of each node, such as `256Gi`.
        node_selector: Labels that a node must have.
        tolerations: Taints that it may have, such as those of spot nodes.
        secrets: Secrets whose keys become variables: `{s3: {access-key: NVILA_S3_ACCESS_KEY}}`.
        config_maps: The same of config maps.
        env: Plain variables.
        claims: Persistent volume claims and where they are mounted, on the step and on every node.
        shm_gib: Size of /dev/shm, through which NCCL and data loaders talk.
        queue: LocalQueue of Kueue.
        runtime: ClusterTrainingRuntime that starts the command.
        service_account: Of the nodes' pods; None leaves the runtime's.
        namespace: Of the job; None takes the step's own.
        pending_timeout_s: How long the job may wait for nodes, beyond the time in a queue.
    """

    image: Image
    nodes: Annotated[int, Field(ge=1, le=10_000)] = 1
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    gpu_type: str = "nvidia.com/gpu"
    cpu: Quantity | None = None
    memory: Quantity | None = None
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    secrets: dict[str, dict[str, str]] = {}
    config_maps: dict[str, dict[str, str]] = {}
    env: dict[str, str] = {}
    claims: dict[ResourceName, AbsolutePath] = {}
    shm_gib: Annotated[float, Field(gt=0)] | None = None
    queue: ResourceName | None = None
    runtime: ResourceName = "torch-distributed"
    service_account: ResourceName | None = None
    namespace: ResourceName | None = None
    pending_timeout_s: Annotated[int, Field(gt=0)] = _DAY_S

    @classmethod
    def from_json(cls, text: str, *, nodes: int | None = None, gpus: int | None = None) -> JobPlacement:
        """Read what `model_dump_json` wrote, and lay over it what was chosen for this run.

        Args:
            text: A placement as JSON.
            nodes: Instead of the placement's.
            gpus: Instead of the placement's.

        Raises:
            ConfigError: A field is wrong; the message names it.
        """
        chosen = {name: value for name, value in (("nodes", nodes), ("gpus", gpus)) if value is not None}
        try:
            placement = cls.model_validate_json(text)
            return cls.model_validate(placement.model_dump() | chosen)
        except ValidationError as e:
            first = e.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the placement"
            shown = f" {first['input']!r}" if first["type"] not in ("missing", "json_invalid") else ""
            raise ConfigError(
                f"training job: {field}{shown}: {first['msg']}", "mend it in the profile, or in the run's parameters"
            ) from e

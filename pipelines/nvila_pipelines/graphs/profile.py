"""Where the tasks of a graph run: one profile says resources, placement, secrets, limits and retries of every step.

A profile is part of the compiled pipeline. Without one, tasks ask for nothing, which is what one machine wants.
"""

# No torch, no kfp at import: profiles are read by the command, too.
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvila.errors import ConfigError, nearest
from nvila_pipelines.components.image import IMAGE
from nvila_platform.cluster.placement import (
    WATCHED,
    AbsolutePath,
    Image,
    JobPlacement,
    Quantity,
    ResourceName,
    Toleration,
)

if TYPE_CHECKING:
    from kfp.dsl import PipelineTask

TASKS = (
    "check", "data", "curate", "train", "quantize", "evaluate", "gate", "register", "serve",
    "tune-model", "quantize-model", "evaluate-model", "gate-model", "promote",
    "deploy-model", "finish",
)  # fmt: skip
TRAIN = "train"
# In their own process, unless a job does.
_TRAINING = (TRAIN, "tune-model")
_SHM = "dshm"
# The first task checks what training will be given.
_TOLD_OF_JOB = ("check", TRAIN)
_OF_NODES = ("cpu", "memory", "gpus", "node_selector", "tolerations", "shm_gib")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Placement(_Strict):
    """What one task asks for.

    Args:
        image: Container image instead of the graph's own, from a registry that the cluster reaches.
        cpu: Cores, such as `8`.
        memory: Memory, such as `64Gi`.
        gpus: GPUs of the task's pod.
        gpu_type: Resource that they are, such as `nvidia.com/gpu`.
        node_selector: Labels that the node must have.
        tolerations: Taints that it may have, such as those of spot nodes.
        secrets: Secrets whose keys become variables: `{s3: {access-key: NVILA_S3_ACCESS_KEY}}`.
        config_maps: The same of config maps: `{nvila-platform-settings: {NVILA_STORE_URI: NVILA_STORE_URI}}`.
        env: Plain variables, such as NVILA_STORE_URI.
        shm_gib: Size of /dev/shm, which torch's data loaders use.
        timeout_s: Longest time of the task.
        retries: How often a task that failed for a passing reason (exit code 75) tries again.
        claims: Persistent volume claims and where they are mounted: `{nvila-workspace: /data}`.
        launcher: `trainjob` runs the training itself as a Kubeflow TrainJob, whose nodes get what this placement asks
            for; the task only follows it. `train` alone has a choice.
        nodes: Nodes of the job.
        queue: LocalQueue of Kueue that admits it.
        runtime: ClusterTrainingRuntime that starts it.
        service_account: Of its pods.
        pending_timeout_s: How long it may wait for nodes, beyond the time in a queue.
    """

    image: Image | None = None
    cpu: Quantity | None = None
    memory: Quantity | None = None
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_type: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    secrets: dict[str, dict[str, str]] = {}
    config_maps: dict[str, dict[str, str]] = {}
    env: dict[str, str] = {}
    shm_gib: Annotated[float, Field(gt=0)] | None = None
    timeout_s: Annotated[int, Field(gt=0)] | None = None
    retries: Annotated[int, Field(ge=0, le=20)] = 0
    claims: dict[ResourceName, AbsolutePath] = {}
    launcher: Literal["local", "trainjob"] = "local"
    nodes: Annotated[int, Field(ge=1)] = 1
    queue: ResourceName | None = None
    runtime: ResourceName = JobPlacement.model_fields["runtime"].default
    service_account: ResourceName | None = None
    pending_timeout_s: Annotated[int, Field(gt=0)] = JobPlacement.model_fields["pending_timeout_s"].default


class Profile(_Strict):
    """Placements by task; what a task leaves out it takes from `defaults`."""

    defaults: Placement = Placement()
    tasks: dict[str, Placement] = {}

    def of(self, task: str) -> Placement:
        """Return what a task asks for."""
        own = self.tasks.get(task)
        if own is None:
            return self.defaults
        return self.defaults.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})

    def job(self) -> JobPlacement | None:
        """Return the nodes of training, or None when it runs in the task itself."""
        placement = self.of(TRAIN)
        if placement.launcher == "local":
            return None
        fields = set(JobPlacement.model_fields) & set(Placement.model_fields)
        values = placement.model_dump(include=fields, exclude={"image"})
        return JobPlacement.model_validate(values | {"image": placement.image or IMAGE})

    def place(self, task: PipelineTask, name: str) -> PipelineTask:
        """Put a task of a graph where the profile says, and return it.

        Kubeflow's own cache is off for every task: it knows neither our code nor what data and aliases mean now, nor
        whether an artifact is still there. The store does, and finished work is taken from there.
        """
        task.set_caching_options(False)
        placement, job = self.of(name), self.job()
        if job is not None and name in _TOLD_OF_JOB:
            task.set_env_variable("NVILA_TRAIN_JOB", job.model_dump_json(exclude_defaults=True))
        if job is not None and name == TRAIN:
            # What it asks for goes to the nodes; the task that follows them needs no GPU.
            placement = placement.model_copy(update={field: getattr(self.defaults, field) for field in _OF_NODES})
        if placement.image is not None:
            task.set_container_image(placement.image)
        if placement.cpu is not None:
            task.set_cpu_request(placement.cpu).set_cpu_limit(placement.cpu)
        if placement.memory is not None:
            task.set_memory_request(placement.memory).set_memory_limit(placement.memory)
        if placement.gpus:
            task.set_accelerator_type(placement.gpu_type).set_accelerator_limit(placement.gpus)
        for variable, value in placement.env.items():
            task.set_env_variable(variable, value)
        if placement.retries:
            task.set_env_variable("NVILA_TASK_RETRIES", str(placement.retries))
        _on_kubernetes(task, placement)
        if name in _TRAINING and self != NOWHERE and (job is None or name != TRAIN):
            from kfp import kubernetes

            # Whether or not anybody watches: training offers /metrics where the settings say so.
            for key, value in WATCHED.items():
                kubernetes.add_pod_label(task, key, value)
        return task


NOWHERE = Profile()


def read_profile(path: Path) -> Profile:
    """Read a profile from YAML.

    Raises:
        ConfigError: It cannot be read, or a field is wrong; the message names it.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        profile = Profile.model_validate(raw or {})
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(f"profile {path}: {field}: {first['msg']}", "see docs/pipelines.md for the fields") from e
    except (OSError, yaml.YAMLError) as e:
        raise ConfigError(f"profile {path} cannot be read: {e}", "name a YAML file") from e
    for name in profile.tasks:
        if name not in TASKS:
            raise ConfigError(f"profile {path}: there is no task '{name}'", nearest(name, TASKS))
    for name, placement in (("defaults", profile.defaults), *(("tasks." + n, p) for n, p in profile.tasks.items())):
        if placement.launcher == "trainjob" and name != f"tasks.{TRAIN}":
            raise ConfigError(f"profile {path}: {name}.launcher is trainjob", f"only tasks.{TRAIN} can be a job")
    return profile


def _on_kubernetes(task: PipelineTask, placement: Placement) -> None:
    wanted: dict[str, Any] = {
        "labels": placement.node_selector,
        "tolerations": placement.tolerations,
        "secrets": placement.secrets,
        "config_maps": placement.config_maps,
        "shm": placement.shm_gib,
        "timeout": placement.timeout_s,
        "claims": placement.claims,
    }
    if not any(wanted.values()):
        return
    from kfp import kubernetes

    for key, value in placement.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for one in placement.tolerations:
        kubernetes.add_toleration(task, key=one.key, operator=one.operator, value=one.value, effect=one.effect)
    for secret, keys in placement.secrets.items():
        kubernetes.use_secret_as_env(task, secret, dict(keys))
    for config_map, keys in placement.config_maps.items():
        kubernetes.use_config_map_as_env(task, config_map, dict(keys))
    if placement.shm_gib is not None:
        size = f"{int(placement.shm_gib * 1024)}Mi"
        kubernetes.empty_dir_mount(task, volume_name=_SHM, mount_path="/dev/shm", medium="Memory", size_limit=size)  # noqa: S108  # where torch looks for it
    for claim, path in placement.claims.items():
        kubernetes.mount_pvc(task, pvc_name=claim, mount_path=path)
    if placement.timeout_s is not None:
        kubernetes.set_timeout(task, placement.timeout_s)

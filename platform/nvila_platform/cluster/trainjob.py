"""The manifest of a Kubeflow TrainJob: one command on several nodes, under the runtime `torch-distributed`.

The runtime starts the command once on every node, with the variables that torchrun reads (PET_NNODES, PET_NODE_RANK,
PET_NPROC_PER_NODE, PET_MASTER_ADDR ...); torchrun then starts the processes of the node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvila.errors import ConfigError

API_VERSION = "trainer.kubeflow.org/v1alpha1"
RUNTIME = "torch-distributed"
MANAGER = "nvila.dev/job"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# What the runtime calls its job and the container in it.
NODE = "node"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_GPU = "nvidia.com/gpu"
_SHM = "dshm"
_TORCHRUN = ("torchrun", "--no-python")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJobSpec:
    """What a job needs.

    Args:
        name: Of the resource.
        image: Container image with the `nvila` command.
        command: What torchrun runs: a program and its arguments.
        num_nodes: Nodes.
        processes_per_node: Processes of each node; one for every GPU.
        gpus: GPUs of each node.
        cpu: Cores of each node, as Kubernetes writes them: `8`, `500m`.
        memory: Memory of each node: `32Gi`.
        env: Plain variables.
        secrets: Names of secrets whose keys become variables, by variable: `{"NVILA_S3_SECRET_KEY": ("s3", "secret")}`.
        claims: Persistent volume claims and where they are mounted; every node must see the same files.
        namespace: None leaves it to whoever submits.
        runtime: Name of the ClusterTrainingRuntime.
        launcher: What the runtime starts on every node, before the command.
        gpu_type: Resource that the GPUs are.
        config_maps: The same as `secrets`, of config maps.
        node_selector: Labels that a node must have.
        tolerations: Taints that it may have, as Kubernetes writes them.
        shm_gib: Size of /dev/shm; None leaves the 64 MiB that a container gets.
        queue: LocalQueue of Kueue that admits the job.
        service_account: Of the pods; None leaves the runtime's.
        grace_s: Time between SIGTERM and SIGKILL on a node; None leaves Kubernetes' 30 seconds.
        annotations: Of the job.
        pod_labels: Of the nodes' pods.

    Raises:
        ConfigError: A name or a number cannot be used.
    """

    name: str
    image: str
    command: Sequence[str]
    num_nodes: int
    processes_per_node: int = 1
    gpus: int = 0
    cpu: str | None = None
    memory: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    claims: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = None
    runtime: str = RUNTIME
    launcher: Sequence[str] = _TORCHRUN
    gpu_type: str = _GPU
    config_maps: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, str]] = ()
    shm_gib: float | None = None
    queue: str | None = None
    service_account: str | None = None
    grace_s: int | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    pod_labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} cannot name a job", "use up to 63 small letters, digits and -")
        for label, number in (("num_nodes", self.num_nodes), ("processes_per_node", self.processes_per_node)):
            if number < 1:
                raise ConfigError(f"{label}={number} of job '{self.name}' is not positive", "use 1 or more")
        for claim, path in self.claims.items():
            if not _NAME.fullmatch(claim) or not path.startswith("/"):
                raise ConfigError(f"claim {claim!r} at {path!r} cannot be mounted", "write NAME=/absolute/path")
        if ":" not in self.image.rpartition("/")[2] and "@" not in self.image:
            raise ConfigError(f"image {self.image!r} has no tag and no digest", "name the version that shall run")


def train_job(spec: TrainJobSpec) -> dict[str, Any]:
    """Return the manifest."""
    labels = {"app.kubernetes.io/part-of": "nvila"} | ({} if spec.queue is None else {QUEUE_LABEL: spec.queue})
    metadata: dict[str, Any] = {"name": spec.name, "labels": labels}
    if spec.namespace is not None:
        metadata["namespace"] = spec.namespace
    if spec.annotations:
        metadata["annotations"] = dict(spec.annotations)
    trainer: dict[str, Any] = {
        "image": spec.image,
        "command": list(spec.launcher),
        "args": list(spec.command),
        "numNodes": spec.num_nodes,
        "numProcPerNode": spec.processes_per_node,
    }
    if env := _variables(spec):
        trainer["env"] = env
    if resources := _resources(spec):
        # Two mappings, since one would be printed as an alias of the other.
        trainer["resourcesPerNode"] = {"requests": resources, "limits": dict(resources)}
    job: dict[str, Any] = {"runtimeRef": {"name": spec.runtime}, "trainer": trainer}
    if pod := _pod(spec):
        replicated = {"name": NODE, "template": {"spec": {"template": pod}}}
        patch = {"template": {"spec": {"replicatedJobs": [replicated]}}}
        job["runtimePatches"] = [{"manager": MANAGER, "trainingRuntimeSpec": patch}]
    return {"apiVersion": API_VERSION, "kind": "TrainJob", "metadata": metadata, "spec": job}


def _variables(spec: TrainJobSpec) -> list[dict[str, Any]]:
    plain = [{"name": name, "value": value} for name, value in sorted(spec.env.items())]
    referred = [
        {"name": name, "valueFrom": {kind: {"name": holder, "key": key}}}
        for kind, holders in (("configMapKeyRef", spec.config_maps), ("secretKeyRef", spec.secrets))
        for name, (holder, key) in sorted(holders.items())
    ]
    return [*plain, *referred]


def _resources(spec: TrainJobSpec) -> dict[str, str]:
    wanted = {"cpu": spec.cpu, "memory": spec.memory, spec.gpu_type: str(spec.gpus) if spec.gpus else None}
    return {name: value for name, value in wanted.items() if value is not None}


def _pod(spec: TrainJobSpec) -> dict[str, Any]:
    """Return what is patched into the template of the runtime's pods."""
    volumes: list[dict[str, Any]] = [
        {"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in spec.claims
    ]
    mounts = [{"name": claim, "mountPath": path} for claim, path in spec.claims.items()]
    if spec.shm_gib is not None:
        size = f"{int(spec.shm_gib * 1024)}Mi"
        volumes.append({"name": _SHM, "emptyDir": {"medium": "Memory", "sizeLimit": size}})
        mounts.append({"name": _SHM, "mountPath": "/dev/shm"})  # noqa: S108  # where torch and NCCL look for it
    pod: dict[str, Any] = {
        "volumes": volumes,
        "containers": [{"name": NODE, "volumeMounts": mounts}] if mounts else [],
        "nodeSelector": dict(spec.node_selector),
        "tolerations": [dict(one) for one in spec.tolerations],
        "serviceAccountName": spec.service_account,
        "terminationGracePeriodSeconds": spec.grace_s,
    }
    patch: dict[str, Any] = {
        "metadata": {"labels": dict(spec.pod_labels)} if spec.pod_labels else {},
        "spec": {name: value for name, value in pod.items() if value},
    }
    return {name: value for name, value in patch.items() if value}

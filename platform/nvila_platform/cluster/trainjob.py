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
MANAGER = "nvila.dev/curate"
# What the runtime calls its job and the container in it.
_NODE = "node"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_GPU = "nvidia.com/gpu"


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
    metadata: dict[str, Any] = {"name": spec.name, "labels": {"app.kubernetes.io/part-of": "nvila"}}
    if spec.namespace is not None:
        metadata["namespace"] = spec.namespace
    trainer: dict[str, Any] = {
        "image": spec.image,
        "command": ["torchrun", "--no-python"],
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
    if spec.claims:
        job["runtimePatches"] = [_mounts(spec)]
    return {"apiVersion": API_VERSION, "kind": "TrainJob", "metadata": metadata, "spec": job}


def _variables(spec: TrainJobSpec) -> list[dict[str, Any]]:
    plain = [{"name": name, "value": value} for name, value in sorted(spec.env.items())]
    secret = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": holder, "key": key}}}
        for name, (holder, key) in sorted(spec.secrets.items())
    ]
    return [*plain, *secret]


def _resources(spec: TrainJobSpec) -> dict[str, str]:
    wanted = {"cpu": spec.cpu, "memory": spec.memory, _GPU: str(spec.gpus) if spec.gpus else None}
    return {name: value for name, value in wanted.items() if value is not None}


def _mounts(spec: TrainJobSpec) -> dict[str, Any]:
    """Patch the claims into the pods of the runtime."""
    pod = {
        "volumes": [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in spec.claims],
        "containers": [
            {
                "name": _NODE,
                "volumeMounts": [{"name": claim, "mountPath": path} for claim, path in spec.claims.items()],
            }
        ],
    }
    replicated = {"name": _NODE, "template": {"spec": {"template": {"spec": pod}}}}
    return {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}}}

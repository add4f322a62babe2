"""The manifest of a TrainJob: what it says, and that the definition of the resource accepts it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from nvila.errors import ConfigError
from nvila_platform.cluster.trainjob import TrainJobSpec, train_job

if TYPE_CHECKING:
    from tests.charts.crd_validation import CrdSchemas


def spec(**changed: Any) -> TrainJobSpec:
    values: dict[str, Any] = {
        "name": "curate-llava",
        "image": "registry.example.org/nvila:0.1.0",
        "command": ["nvila", "curate", "/data/llava.jsonl"],
        "num_nodes": 4,
    }
    return TrainJobSpec(**(values | changed))


FULL = {
    "processes_per_node": 8,
    "gpus": 8,
    "cpu": "32",
    "memory": "256Gi",
    "env": {"NVILA_TRACKING_URI": "http://mlflow:5000"},
    "secrets": {"NVILA_S3_SECRET_KEY": ("s3", "secret-key")},
    "claims": {"datasets": "/data", "results": "/out"},
    "namespace": "nvila",
}


def test_the_command_runs_under_torchrun_on_every_node() -> None:
    manifest = train_job(spec(**FULL))
    assert manifest["metadata"] == {
        "name": "curate-llava",
        "namespace": "nvila",
        "labels": {"app.kubernetes.io/part-of": "nvila"},
    }
    assert manifest["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    trainer = manifest["spec"]["trainer"]
    assert (trainer["command"], trainer["args"]) == (
        ["torchrun", "--no-python"],
        ["nvila", "curate", "/data/llava.jsonl"],
    )
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": "8"}
    assert trainer["env"] == [
        {"name": "NVILA_TRACKING_URI", "value": "http://mlflow:5000"},
        {"name": "NVILA_S3_SECRET_KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "secret-key"}}},
    ]


def test_claims_are_mounted_into_the_runtimes_container() -> None:
    patch = train_job(spec(**FULL))["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    pod = patch["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]] == ["datasets", "results"]
    assert pod["containers"][0]["volumeMounts"] == [
        {"name": "datasets", "mountPath": "/data"},
        {"name": "results", "mountPath": "/out"},
    ]


def test_what_is_not_asked_for_is_not_there() -> None:
    manifest = train_job(spec())
    assert "namespace" not in manifest["metadata"]
    assert "runtimePatches" not in manifest["spec"]
    assert {"env", "resourcesPerNode"}.isdisjoint(manifest["spec"]["trainer"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "Curate"}, "'Curate' cannot name a job"),
        ({"name": "9-lives"}, "'9-lives' cannot name a job"),
        ({"num_nodes": 0}, "num_nodes=0 of job"),
        ({"processes_per_node": 0}, "processes_per_node=0 of job"),
        ({"claims": {"data": "relative"}}, "claim 'data' at 'relative'"),
        ({"image": "registry:5000/nvila"}, "has no tag and no digest"),
    ],
)
def test_what_the_cluster_would_refuse_is_refused_here(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(**changed)


@pytest.mark.parametrize("changed", [{}, FULL], ids=["least", "full"])
def test_the_definition_accepts_the_manifest(changed: dict[str, Any], crds: CrdSchemas) -> None:
    manifest = train_job(spec(**changed))
    assert crds.errors(manifest) == []
    manifest["spec"]["trainer"]["nodes"] = 4
    assert crds.errors(manifest) != []

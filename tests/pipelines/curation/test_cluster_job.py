"""`nvila curate --nodes`: the manifest that it prints runs the same command on every node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from nvila_pipelines.cli import build_parser, main
from nvila_platform.cluster.client import JobStatus

if TYPE_CHECKING:
    from tests.charts.crd_validation import CrdSchemas

WORDS = ["/data/llava.jsonl", "--small", "/models/a", "--large", "models:/nvila@champion", "--out", "/out/llava v1"]
JOB = [*WORDS, "--nodes", "4", "--image", "registry.example.org/nvila:0.1.0"]


def printed(capsys: Any, *words: str) -> Any:
    assert main(["curate", *JOB, *words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_job_runs_the_command_that_was_typed(capsys: Any) -> None:
    options = ["--dtype", "bf16", "--sequential", "--keep-rate", "0.3", "--keep-rate", "chart=0.8", "--max-bad", "1%"]
    manifest = printed(
        capsys, *options, "--gpus", "8", "--memory", "256Gi", "--claim", "data=/data", "--claim", "out=/out"
    )
    assert manifest["metadata"]["name"] == "curate-llava-v1"
    trainer = manifest["spec"]["trainer"]
    assert trainer["args"][:3] == ["nvila", "curate", "/data/llava.jsonl"]
    assert trainer["args"][-2:] == ["--log-format", "json"]
    # What the nodes are told parses to what was told here.
    told = vars(build_parser().parse_args(trainer["args"][1:]))
    typed = vars(build_parser().parse_args(["curate", *WORDS, *options, "--log-format", "json"]))
    assert told == typed
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["resourcesPerNode"]["requests"] == {"memory": "256Gi", "nvidia.com/gpu": "8"}
    assert len(manifest["spec"]["runtimePatches"]) == 1


def test_the_definition_of_the_resource_accepts_what_is_printed(capsys: Any, crds: CrdSchemas) -> None:
    words = ["--gpus", "8", "--cpu", "32", "--memory", "256Gi", "--claim", "data=/data", "--namespace", "team"]
    for manifest in (printed(capsys), printed(capsys, *words, "--dtype", "bf16", "--keep-rate", "chart=0.8")):
        assert crds.errors(manifest) == []
        manifest["spec"]["trainer"]["numProcPerNode"] = "many"
        assert crds.errors(manifest) != []


def test_nodes_get_the_addresses_that_they_can_reach(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(capsys)["spec"]["trainer"]["env"] == [{"name": "NVILA_EXPERIMENT", "value": "nvila"}]
    monkeypatch.setenv("NVILA_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("NVILA_S3_ENDPOINT", "minio:9000")
    monkeypatch.setenv("NVILA_S3_SECRET_KEY", "hidden")
    monkeypatch.setenv("NVILA_METRICS_ADDRESS", "0.0.0.0:9464")
    env = {one["name"]: one["value"] for one in printed(capsys)["spec"]["trainer"]["env"]}
    assert env == {
        "NVILA_TRACKING_URI": "http://mlflow:5000",
        "NVILA_EXPERIMENT": "nvila",
        "NVILA_S3_ENDPOINT": "minio:9000",
        "NVILA_S3_SECURE": "true",
        "NVILA_METRICS_ADDRESS": "0.0.0.0:9464",
    }
    # One that only this machine reaches says nothing to Prometheus in a cluster.
    monkeypatch.setenv("NVILA_METRICS_ADDRESS", "9464")
    assert "NVILA_METRICS_ADDRESS" not in {one["name"] for one in printed(capsys)["spec"]["trainer"]["env"]}


def test_nothing_is_made_by_printing(capsys: Any, tmp_path: Path) -> None:
    printed(capsys, "--job-name", "mine", "--namespace", "team")
    assert not list(tmp_path.iterdir())


def test_a_job_is_submitted_as_it_would_be_printed(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[Any] = []

    class Client:
        def submit(self, manifest: Any) -> JobStatus:
            submitted.append(manifest)
            return JobStatus(name=manifest["metadata"]["name"], namespace="team", state="Created")

    expected = printed(capsys)
    monkeypatch.setattr("nvila_platform.cluster.client.ClusterClient", Client)
    assert main(["curate", *JOB, "--submit"]) == 0
    assert "kubectl get trainjob curate-llava-v1 -n team" in capsys.readouterr().out
    assert main(["curate", *JOB, "--submit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"job": "curate-llava-v1", "namespace": "team", "state": "Created"}
    assert submitted == [expected, expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2"], "a job needs a data set"),
        ([*WORDS, "--nodes", "2"], "a job needs --image"),
        ([*WORDS, "--image", "x:1"], "--image is about a job of a cluster"),
        ([*JOB, "--processes", "2"], "--processes is for one machine"),
        ([*JOB, "--dry-run"], "--dry-run is for one machine"),
        ([*JOB, "--claim", "data"], "--claim 'data' names no path"),
        ([*JOB, "--keep-rate", "2"], "--keep-rate '2'"),
        ([*JOB, "--job-name", "A B"], "'A B' cannot name a job"),
    ],
)
def test_wrong_use_is_one_line_with_a_fix(words: list[str], message: str, capsys: Any) -> None:
    assert main(["curate", *words]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert message in first
    assert second.startswith("  fix: ")

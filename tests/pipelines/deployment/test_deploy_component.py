"""The task `deploy_model` of the pipelines, as a pod runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila_pipelines.components.deploy_model import deploy_model
from nvila_platform.mlflow_backend import connect

if TYPE_CHECKING:
    from tests.pipelines.deployment.conftest import World


class Result:
    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.metadata: dict[str, Any] = {}

    def text(self) -> str:
        return Path(self.path).read_text(encoding="utf-8")


Task = Callable[..., tuple[bool, Result, Result, Result]]


@pytest.fixture
def task(deployed: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Run the component's body in this process; its parent is not watched."""
    for name, value in deployed.settings.to_env().items():
        if value:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("NVILA_PROMETHEUS_URL", deployed.prometheus)
    monkeypatch.setattr("nvila_pipelines.steps.component.die_with_parent", lambda *_: None)
    monkeypatch.setattr("nvila_pipelines.steps.component.die_with", lambda _: None)
    monkeypatch.setenv("NVILA_RUNNER_PID", str(os.getpid()))

    def run(
        policy: str, *options: str, alias: str = "champion", job: tuple[str, str] = ("", "")
    ) -> tuple[bool, Result, Result, Result]:
        found = [Result(tmp_path / "task" / name) for name in ("metrics", "report", "result")]
        words = ["--timeout", "5", "--interval", "1", *options]
        serves = deploy_model.python_func("models:/eye/2", "eye", alias, policy, words, *job, *found)
        return bool(serves), found[0], found[1], found[2]

    return run


def test_a_policy_with_limits_of_a_rollout_takes_steps(deployed: World, task: Task) -> None:
    serves, metrics, report, result = task("live: {max_error_rate: 0.05}", "--steps", "20")
    assert serves is True
    assert deployed.weights() == [-1, 0, 20, -1]
    assert json.loads(result.text())["state"] == "promoted"
    assert metrics.metadata == {"live requests": 100.0, "live error rate": 0.0}
    assert "| 20 % | live error rate | 0.0 | 0.05 | passed |" in report.text()
    assert "models:/eye/2 promoted on eye" in report.text()


def test_a_revision_that_was_taken_back_is_an_answer(deployed: World, task: Task) -> None:
    deployed.users.of["-v2-"] = {"failed": 40}
    serves, _, report, result = task("live: {max_error_rate: 0.05}", "--steps", "20")
    assert serves is False
    assert json.loads(result.text())["state"] == "rolled back"
    assert "**no**" in report.text()
    assert deployed.aliases()["champion"] == 1


def test_a_policy_of_a_gate_alone_moves_all_traffic(deployed: World, task: Task) -> None:
    serves, metrics, report, _ = task("tasks: {easy_vqa: {min_score: 0.9}}", alias="candidate")
    assert serves is True
    assert deployed.weights() == [-1, 0, -1]
    assert metrics.metadata == {}
    assert report.text() == "## models:/eye/2 promoted on eye\n"
    assert deployed.aliases() == {"candidate": 2, "champion": 1}


def test_a_task_that_cannot_go_on_fails(deployed: World, task: Task) -> None:
    deployed.cluster.groups = set()
    with pytest.raises(SystemExit) as stopped:
        task("")
    assert stopped.value.code == 1


def test_a_rollout_is_a_run_below_that_of_its_pipeline(deployed: World, task: Task) -> None:
    serves, *_ = task("", job=("release-x", "1"))
    assert serves is True
    client = connect(deployed.settings)
    experiment = client.get_experiment_by_name(deployed.settings.experiment)
    assert experiment is not None
    query = "tags.`nvila.run_id` = 'release-x-1'"
    runs = client.search_runs([experiment.experiment_id], query, order_by=["start_time ASC"])
    assert [run.info.run_name for run in runs] == ["release-x-1", "deploy"]
    assert runs[0].data.tags["nvila.kfp_run_id"] == "1"
    assert runs[1].data.tags["mlflow.parentRunId"] == runs[0].info.run_id

"""What MLflow holds of tasks that run in pods of their own, and of the run that they belong to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.pipelines.conftest import Result

from nvila.errors import DataError
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.check import check_run
from nvila_pipelines.steps.component import run_component
from nvila_pipelines.steps.context import StepContext
from nvila_pipelines.steps.finish import finish_run
from nvila_pipelines.steps.pipeline_job import PipelineJob
from nvila_pipelines.steps.table import StepSpec
from nvila_platform.mlflow_backend import connect
from nvila_platform.settings import Settings


@pytest.fixture
def pod(task: Settings, migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A task whose steps write one file; all pods share the workspace."""

    def work(context: StepContext) -> dict[str, float]:
        (context.out_dir / "out.txt").write_text("done", encoding="utf-8")
        return {"samples": 3.0}

    monkeypatch.setattr(StepSpec, "load", lambda self: work)
    monkeypatch.delenv("NVILA_RUNNER_PID")
    task.workspace.mkdir(parents=True, exist_ok=True)
    shutil.copy(migrated_database, task.workspace / "mlflow.db")
    return task


def runs_of(settings: Settings, parent: bool) -> list[Any]:
    client = connect(settings)
    experiment = client.get_experiment_by_name(settings.experiment)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
    return [run for run in found if ("mlflow.parentRunId" not in run.data.tags) == parent]


def test_a_task_is_a_run_below_that_of_the_pipeline_and_the_end_sums_up(
    pod: Settings, micro: Recipe, tmp_path: Path
) -> None:
    results = {name: Result(tmp_path / name) for name in ("data", "curated", "metrics", "report")}
    shown = results["metrics"], results["report"]
    check_run(micro.to_json(), [], {}, PipelineJob(name="x", id="7"), "nightly")
    run_component("data", micro.to_json(), "nightly", {}, results["data"], *shown)
    run_component("curate", micro.to_json(), "nightly", {"data": results["data"].path}, results["curated"], *shown)
    # The task is tried again by Kubeflow, and finds its work done.
    run_component("data", micro.to_json(), "nightly", {}, results["data"], *shown)
    finish_run("nightly", "COMPLETE", "", followed=True)
    (parent,) = runs_of(pod, parent=True)
    tasks = runs_of(pod, parent=False)
    assert [run.info.run_name for run in tasks] == ["data", "curate", "data"]
    assert {run.data.tags["mlflow.parentRunId"] for run in tasks} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *tasks)} == {"FINISHED"}
    assert [run.data.metrics["samples"] for run in tasks] == [3.0] * 3
    digest = json.loads(Path(results["data"].path).read_text())["digest"]
    assert tasks[0].data.tags["nvila.digest"] == digest
    assert [one.dataset.name for one in tasks[1].inputs.dataset_inputs] == ["data for curation"]
    assert ["nvila.reused" in run.data.tags for run in tasks] == [False, False, True]
    worked = sum(run.data.metrics["core_hours"] for run in tasks[:2])
    assert parent.data.metrics["lifecycle/core_hours"] == pytest.approx(worked)
    assert parent.data.tags["nvila.kfp_run_id"] == "7"


def test_a_task_that_fails_is_a_failed_run(
    pod: Settings, micro: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(context: StepContext) -> dict[str, float]:
        raise DataError("the file is damaged", "fetch it again")

    monkeypatch.setattr(StepSpec, "load", lambda self: broken)
    results = [Result(tmp_path / name) for name in ("data", "metrics", "report")]
    with pytest.raises(SystemExit):
        run_component("data", micro.to_json(), "nightly", {}, *results)
    (failed,) = runs_of(pod, parent=False)
    assert failed.info.status == "FAILED"
    # Kubeflow does not say what failed.
    finish_run("nightly", "FAILED", "")
    (parent,) = runs_of(pod, parent=True)
    assert parent.info.status == "FAILED"
    assert parent.data.tags["nvila.failure"] == "did not finish: data"
    assert json.loads((pod.workspace / "runs/nightly/outcome.json").read_text())["message"] == "did not finish: data"
    assert "nvila.digest" not in failed.data.tags

"""What MLflow holds of tasks that run in pods of their own, and of the run that they belong to."""

from __future__ import annotations

import json
import math
import os
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
from nvila_platform.telemetry import EventLog
from nvila_platform.training.history import HISTORY_FILE


@pytest.fixture
def pod(task: Settings, migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A task whose steps write one file; all pods share the workspace."""

    def work(context: StepContext) -> dict[str, float]:
        (context.out_dir / "out.txt").write_text("done", encoding="utf-8")
        for done in (1, 2, 3):
            context.reporter.progress("align", done, 3, {"loss": 4.0 / done, "norm": math.inf})
        context.reporter.notice("looked at everything")
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


def told(text: str) -> list[dict[str, Any]]:
    """The lines of progress and the notices in a pod's log."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in lines if "phase" in line or "notice" in line]


def test_a_pod_tells_its_log_and_mlflow_how_the_step_goes_on(
    pod: Settings, micro: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = pod.workspace / "runs" / "nightly" / "events.jsonl"
    with EventLog(log, step="data") as earlier:
        earlier.progress("align", 1, 3, {"loss": 9.0})
    with EventLog(log, step="train") as other:
        run_component("data", micro.to_json(), "nightly", {}, *(Result(tmp_path / name) for name in "abc"))
        other.notice("a step of another pod")
    lines = told(capsys.readouterr().err)
    assert {line["step"] for line in lines} == {"data"}
    # Lines are thinned to one a second, the first and the last of a phase always come.
    progress = [(line["phase"], line["done"]) for line in lines if "phase" in line and line["done"] != 2]
    assert progress == [("start", 0), ("align", 1), ("align", 3), ("finished", 1)]
    assert lines[1]["metrics"] == {"loss": 4.0, "norm": None}
    assert [line["notice"] for line in lines if "notice" in line] == ["looked at everything"]
    (run,) = runs_of(pod, parent=False)
    client = connect(pod)
    history = client.get_metric_history(run.info.run_id, "align/loss")
    assert [(point.step, point.value) for point in history] == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3))]
    assert not [name for name in run.data.metrics if name.startswith(("finished/", "align/norm"))]
    assert [one.path for one in client.list_artifacts(run.info.run_id)] == ["report.md"]


def test_training_in_a_pod_leaves_its_curves_in_mlflow(
    pod: Settings, micro: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = {"attempt": 1, "stage": "align", "seconds": 1.0, "usage": {}}
    lines = [json.dumps(point | {"step": n, "values": {"tokens_per_second": 10.0 * n}}) for n in (1, 2, 3)]

    def work(context: StepContext) -> dict[str, float]:
        (context.out_dir / HISTORY_FILE).write_text("\n".join(lines), encoding="utf-8")
        losses = [{"stage": "align", "step": n, "loss": 1.0 / n, "loss_smooth": 1.0 / n} for n in (1, 2, 3)]
        (context.out_dir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in losses))
        return {}

    monkeypatch.setattr(StepSpec, "load", lambda self: work)
    report = Result(tmp_path / "report")
    run_component("train", micro.to_json(), "nightly", {}, Result(tmp_path / "a"), Result(tmp_path / "b"), report)
    (run,) = runs_of(pod, parent=False)
    client = connect(pod)
    assert [one.path for one in client.list_artifacts(run.info.run_id)] == ["plots", "report.html"]
    plots = [one.path for one in client.list_artifacts(run.info.run_id, "plots")]
    assert plots == ["plots/loss-align.svg", "plots/speed-align.svg"]
    kept = client.download_artifacts(run.info.run_id, "report.html", str(tmp_path))
    assert Path(kept).read_text() == Path(report.path).read_text()


def test_a_task_of_a_run_on_this_machine_leaves_the_telling_to_its_watcher(
    pod: Settings, micro: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NVILA_RUNNER_PID", str(os.getpid()))
    run_component("data", micro.to_json(), "nightly", {}, *(Result(tmp_path / name) for name in "abc"))
    assert told(capsys.readouterr().err) == []
    assert connect(pod).get_experiment_by_name(pod.experiment) is None


@pytest.mark.parametrize("parent", ["0" * 32, None], ids=["tracked", "without MLflow"])
def test_processes_of_training_know_the_pipelines_run(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: str | None
) -> None:
    """Below which they open one of their own, with NVILA_TRACK_TRAINING=direct."""
    given: dict[str, str] = {}

    class Launcher:
        def run(self, module: str, args: list[str], *, env: dict[str, str], **_: Any) -> None:
            given.update(env)
            raise DataError("enough", "")

    monkeypatch.setattr("nvila_pipelines.training.nodes.open_launcher", lambda *_: Launcher())
    with pytest.raises(DataError):
        bench.run("train", {"data": tmp_path, "selection": tmp_path}, tracking_run=parent)
    assert given.get("MLFLOW_RUN_ID") == parent


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

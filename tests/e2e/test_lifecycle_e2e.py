"""The whole lifecycle as `nvila run` runs it: every step a real one, through the compiled pipeline and kfp's runner."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila_pipelines.steps.table import STEPS
from nvila_platform.settings import Settings

# Minutes on a busy machine; under one on a quiet one.
pytestmark = pytest.mark.timeout(600)

Make = Callable[[], Any]
LONG = "train.stages.instruct.steps=100"


@pytest.fixture(scope="module")
def home(make_workspace: Make) -> Any:
    """A workspace in which the lifecycle ran once."""
    workspace = make_workspace()
    workspace.run("run")
    return workspace


@pytest.fixture(scope="module")
def summary(home: Any) -> dict[str, Any]:
    found: dict[str, Any] = home.commands[0].json
    return found


def test_the_run_ends_with_its_numbers(home: Any, summary: dict[str, Any]) -> None:
    assert summary["passed"] is True
    assert set(summary["steps"]) == set(STEPS)
    assert all(seconds > 0 for seconds in summary["steps"].values())
    assert summary["served"]["asked"] == 4
    assert summary["model"].startswith("models:/micro")
    assert 0 < summary["accuracy"]["majority"] <= summary["accuracy"]["text_majority"]
    assert home.phases(summary["run_id"]) == dict.fromkeys(STEPS, "finished")


def test_the_run_leaves_its_files_in_the_workspace_and_nothing_else(home: Any, summary: dict[str, Any]) -> None:
    run = home.path / "runs" / summary["run_id"]
    for name in ("events.jsonl", "recipe.yaml", "pipeline.yaml", "report.html", "summary.json"):
        assert (run / name).stat().st_size > 0, name
    assert json.loads((run / "summary.json").read_text(encoding="utf-8")) == summary
    assert Path(summary["report"]) == run / "report.html"
    left = {path.name for path in home.path.iterdir()}
    assert left <= {
        "artifacts",
        "cache",
        "logs",
        "mlartifacts",
        "mlflow.db",
        "mlflow.db.lock",
        "runs",
        "tracking-buffer",
    }
    assert {path.name for path in home.path.parent.iterdir()} == {home.path.name}
    assert not list((home.path / "artifacts" / "damaged").glob("*"))


def test_the_served_answers_came_from_the_registered_model(home: Any, summary: dict[str, Any]) -> None:
    lines = (home.artifact("serve") / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    assert len({answer["image"] for answer in answers}) == 4
    assert all(answer["request_id"] and answer["seconds"] > 0 for answer in answers)
    # The server answers what the evaluation of the same model had predicted, which stops after eight words.
    text = (home.artifact("evaluate-quantized") / "predictions.jsonl").read_text(encoding="utf-8")
    predicted = {line["id"]: line["prediction"] for line in map(json.loads, text.splitlines())}
    served = [" ".join(answer["prediction"].split()[:8]) for answer in answers]
    assert served == [predicted[answer["id"]] for answer in answers]


def test_mlflow_has_the_run_its_steps_and_the_version(home: Any, summary: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    settings = Settings.load(home.path, {})
    client = MlflowClient(settings.tracking_uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "nvila"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {summary["run_id"], *STEPS}
    parent = runs[summary["run_id"]]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for step in STEPS:
        assert runs[step].data.tags["mlflow.parentRunId"] == parent.info.run_id, step
    history = client.get_metric_history(runs["train"].info.run_id, "instruct/loss")
    # The first and the last step always; those between at most five times a second.
    steps = [point.step for point in history]
    assert (steps[0], steps[-1]) == (1, 3)
    assert steps == sorted(set(steps))
    assert parent.data.metrics["evaluate-wide/accuracy"] == summary["accuracy"]["wide"]
    assert runs["train"].data.params["train.precision"] == "fp8"

    version = client.get_model_version_by_alias("micro", "candidate")
    assert str(version.version) == "1"
    assert version.tags["nvila.digest"] == home.digest("quantize")
    assert version.tags["nvila.gate"] == home.digest("gate")
    assert version.tags["nvila.lineage.train"] == home.digest("train")
    assert version.tags["nvila.lineage.data"] == home.digest("data")
    assert version.run_id == parent.info.run_id


def test_the_report_shows_the_run(home: Any, summary: dict[str, Any]) -> None:
    text = Path(summary["report"]).read_text(encoding="utf-8")
    assert summary["run_id"] in text
    assert home.digest("quantize")[:12] in text
    assert "<img" in text


@pytest.mark.slow
def test_the_second_run_reuses_everything_but_the_registration(home: Any) -> None:
    again = home.run("run").json
    expected = {name: "finished" if name == "register" else "reused" for name in STEPS}
    assert home.phases(again["run_id"]) == expected
    assert [name for name, seconds in again["steps"].items() if seconds] == ["register"]
    # The same artifact is the same version.
    registrations = [json.loads(path.read_text()) for path in home.path.glob("artifacts/register/*/registered.json")]
    assert [record["version"] for record in registrations] == [1, 1]


@pytest.mark.slow
def test_a_refused_model_is_reported_and_neither_registered_nor_served(home: Any) -> None:
    command = home.start("run", "gate.min_accuracy=1.0")
    assert command.finish() == 1
    assert command.json["passed"] is False
    assert command.json["model"] == ""
    assert command.json["served"] == {}
    phases = home.phases(command.json["run_id"])
    assert phases["gate"] == "finished"
    assert {"register", "serve"} & set(phases) == set()
    assert command.error[0] == "error: the gate refused the model, nothing was registered"
    assert command.json["report"] in command.error[1]
    refused = [check for check in command.json["checks"] if not check["passed"]]
    assert [check["name"] for check in refused] == ["accuracy"]
    report = Path(command.json["report"]).read_text(encoding="utf-8")
    assert "accuracy" in report
    assert re.search(r"refused", report, re.IGNORECASE)


@pytest.mark.slow
def test_a_damaged_model_is_named_and_made_again_with_the_same_digest(make_workspace: Make) -> None:
    workspace = make_workspace()
    before = workspace.run("train").json["digest"]
    weights = workspace.artifact("train") / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert workspace.run("train").json["digest"] == before
    assert bytes(content) != weights.read_bytes()
    (aside,) = (workspace.path / "artifacts" / "damaged").iterdir()
    assert (aside / "model" / "model.safetensors").read_bytes() == bytes(content)
    notices = [event["notice"] for event in workspace.events() if "notice" in event]
    assert any("model/model.safetensors: sha256" in notice and "moved aside" in notice for notice in notices)


@pytest.mark.slow
def test_a_killed_training_is_one_line_and_goes_on_to_the_same_weights(make_workspace: Make) -> None:
    workspace, uninterrupted = make_workspace(), make_workspace()
    command = workspace.start("run", LONG)
    workspace.wait_for(step="train", phase="instruct")
    (process,) = workspace.processes("nvila_pipelines.steps.train_process")
    os.kill(process, signal.SIGKILL)
    assert command.finish() == 75
    assert command.error[0] == "error: nvila_pipelines.steps.train_process was killed by SIGKILL"
    assert command.error[1].startswith("  fix: often: out of memory; run it again to resume")
    assert command.json["error"]["code"] == "infrastructure"
    assert workspace.processes() == []

    again = workspace.run("run", LONG).json
    phases = workspace.phases(again["run_id"])
    assert {name: phases[name] for name in ("data", "curate", "train")} == {
        "data": "reused",
        "curate": "reused",
        "train": "finished",
    }
    notices = [event["notice"] for event in workspace.events(again["run_id"]) if "notice" in event]
    assert "stage vision is already trained; going on from it" in notices
    assert uninterrupted.run("train", LONG).json["digest"] == workspace.digest("train")
    assert again["passed"]


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_alive(make_workspace: Make) -> None:
    workspace = make_workspace()
    command = workspace.start("run", "train.stages.instruct.steps=100000")
    workspace.wait_for(step="train", phase="instruct")
    assert workspace.processes("nvila_pipelines.steps.train_process")
    command.process.kill()
    command.finish()
    deadline = time.monotonic() + 30
    while workspace.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workspace.processes() == []


@pytest.mark.slow
def test_two_runs_at_once_finish_and_share_the_work(make_workspace: Make) -> None:
    workspace = make_workspace()
    commands = [workspace.start("run") for _ in range(2)]
    for command in commands:
        assert command.finish() == 0, command.err
    phases = [workspace.phases(command.json["run_id"]) for command in commands]
    for step in STEPS:
        both = sorted(found[step] for found in phases)
        assert both == (["finished", "finished"] if step == "register" else ["finished", "reused"]), step
    assert len(list(workspace.path.glob("artifacts/train/*/manifest.json"))) == 1
    registrations = list(workspace.path.glob("artifacts/register/*/registered.json"))
    assert [json.loads(path.read_text())["version"] for path in registrations] == [1, 1]


@pytest.mark.slow
def test_without_mlflow_everything_runs_but_the_registration_fails_loudly(home: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = home.start("run", "train.stages.instruct.steps=4", NVILA_TRACKING_URI=address)
    assert command.finish() == 75
    assert re.match(r"error: registering 'micro' failed: ", command.error[0])
    assert address in command.error[1]
    runs = sorted(home.path.glob("runs/*"), key=lambda path: path.stat().st_ctime)
    phases = home.phases(runs[-1].name)
    assert (
        phases["train"] == phases["quantize"] == phases["evaluate-wide"] == phases["evaluate-quantized"] == "finished"
    )
    # Of an untrained model's answers the gate may have seen the same before.
    assert phases["gate"] in ("finished", "reused")
    assert "serve" not in phases
    assert list((home.path / "tracking-buffer").iterdir())


@pytest.mark.slow
def test_a_workspace_that_is_a_file_is_refused(make_workspace: Make) -> None:
    workspace = make_workspace()
    workspace.path.write_text("", encoding="utf-8")
    command = workspace.start("run")
    assert command.finish() == 2
    assert command.error[0] == f"error: workspace {workspace.path} is a file"

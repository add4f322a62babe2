"""Tracking against real MLflow: batches, nesting, outages and several processes on one database."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvila_platform import mlflow_backend, tracking
from nvila_platform.mlflow_ui import start_ui
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef
from nvila_platform.tracking import Tracker, open_tracker
from nvila_platform.tracking_buffer import BufferFile, Event, RunSpec, batches
from nvila_platform.tracking_datasets import DatasetInput
from nvila_platform.tracking_metrics import clean_name

CLOSE_S = 60.0

WRITER = """
import sys, time
from pathlib import Path
from nvila_platform.settings import Settings
from nvila_platform.tracking import open_tracker
start = time.monotonic()
tracker = open_tracker(Settings.load(Path(sys.argv[1]), {}), sys.argv[2])
for step in range(300):
    tracker.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step=step)
blocked_s = time.monotonic() - start
tracker.log_params({"writer": sys.argv[2]})
tracker.close(timeout_s=120)
print(blocked_s)
"""


def _client(settings: Settings) -> Any:
    return mlflow_backend.connect(settings)


def _runs(settings: Settings) -> dict[str, Any]:
    client = _client(settings)
    experiment = client.get_experiment_by_name(settings.experiment)
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])} if experiment else {}


def _buffers(settings: Settings) -> list[Path]:
    return sorted((settings.workspace / "tracking-buffer").glob("*"))


def _unreachable(settings: Settings) -> Settings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return replace(settings, tracking_uri=f"http://127.0.0.1:{probe.getsockname()[1]}")


def _close(tracker: Tracker) -> None:
    tracker.close(timeout_s=CLOSE_S)


def test_tracker_records_a_run(tracked: Settings, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("<p>fine</p>")
    with open_tracker(tracked, "train", tags={"nvila.digest": "abc"}) as tracker:
        tracker.log_params({"model": {"width": 64, "name": "tiny"}, "long": "x" * 9000})
        tracker.log_metrics({"loss": 0.5, "acc@1 (%)": 3}, step=1)
        tracker.log_metrics({"loss": math.nan}, step=2)
        tracker.log_artifact(report)
        tracker.set_tags({"stage": "align"})
        assert tracker.wait_run_id(CLOSE_S) == tracker.run_id == tracker.handle
    run = _runs(tracked)["train"]
    assert run.info.run_id == tracker.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "64"
    assert len(run.data.params["long"]) == 6000
    assert run.data.metrics["acc_1 ___"] == 3
    history = _client(tracked).get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == [1, 2]
    assert run.data.tags["stage"] == "align"
    assert run.data.tags["nvila.digest"] == "abc"
    assert _buffers(tracked) == []
    saved = tracked.workspace / "mlartifacts" / run.info.run_id / "artifacts" / "report.html"
    assert saved.read_text() == "<p>fine</p>"


def test_tracker_batches_metrics_within_the_limit(tracked: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    sizes: list[int] = []
    send = MlflowClient.log_batch

    def counting(self: MlflowClient, run_id: str, metrics: Any = (), **other: Any) -> None:
        sizes.append(len(metrics))
        send(self, run_id, metrics=metrics, **other)

    monkeypatch.setattr(MlflowClient, "log_batch", counting)
    tracker = open_tracker(tracked, "many")
    for step in range(700):
        tracker.log_metrics({"a": step, "b": step, "c": step}, step=step)
    tracker.log_params({f"p{i}": i for i in range(250)})
    _close(tracker)
    assert sum(sizes) == 2100
    assert max(sizes) <= 1000
    assert len(sizes) <= 8
    run = _runs(tracked)["many"]
    assert run.data.metrics["c"] == 699
    assert len(run.data.params) == 250


def test_refused_value_leaves_the_rest(tracked: Settings, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    tracker = open_tracker(tracked, "picky")
    tracker.log_params({"lr": 1, "seed": 7})
    tracker.set_tags({"first": "sent"})  # another kind, so that the two sets of parameters are two requests
    tracker.log_params({"lr": 2, "width": 64, "depth": 2})
    tracker.log_metrics({"loss": 1.0, "text": "high"})  # type: ignore[dict-item]
    tracker.log_artifact(tmp_path / "never-written")
    _close(tracker)
    run = _runs(tracked)["picky"]
    assert run.data.params == {"lr": "1", "seed": "7", "width": "64", "depth": "2"}
    assert run.data.metrics == {"loss": 1.0}
    assert run.info.status == "FINISHED"
    assert _buffers(tracked) == []
    notices = [r.getMessage() for r in caplog.records if r.name.startswith("nvila") and r.levelno >= logging.WARNING]
    assert len(notices) == 3
    assert "never-written is gone" in notices[2]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_context_decides_the_status(tracked: Settings, error: BaseException | None, status: str) -> None:
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), open_tracker(tracked, "run"):
        if error:
            raise error
    assert _runs(tracked)["run"].info.status == status


def test_children_nest_under_id_handle_and_environment(tracked: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = open_tracker(tracked, "parent")
    early = open_tracker(tracked, "by-handle", parent_run_id=parent.handle)
    parent_id = parent.wait_run_id(CLOSE_S)
    late = open_tracker(tracked, "by-id", parent_run_id=parent_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", str(parent_id))
    given = open_tracker(tracked, "by-environment")
    for tracker in (early, late, given, parent):
        _close(tracker)
    runs = _runs(tracked)
    assert "mlflow.parentRunId" not in runs["parent"].data.tags
    for name in ("by-handle", "by-id", "by-environment"):
        assert runs[name].data.tags["mlflow.parentRunId"] == parent_id


def test_outage_at_open_is_replayed_by_the_next_tracker(tracked: Settings, caplog: pytest.LogCaptureFixture) -> None:
    away = _unreachable(tracked)
    parent = open_tracker(away, "parent")
    child = open_tracker(away, "child", parent_run_id=parent.handle)
    child.log_params({"lr": 1})
    for step in range(5):
        child.log_metrics({"loss": 5 - step}, step=step)
    _close(child)
    _close(parent)
    assert parent.run_id is None
    assert len(_buffers(tracked)) == 2
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 2  # one for each tracker
    assert "tracking at http://127.0.0.1" in warnings[0]

    _close(open_tracker(tracked, "next"))
    assert _buffers(tracked) == []
    runs = _runs(tracked)
    assert set(runs) == {"parent", "child", "next"}
    assert runs["child"].data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id
    assert runs["child"].data.params == {"lr": "1"}
    assert runs["child"].info.status == "FINISHED"
    history = _client(tracked).get_metric_history(runs["child"].info.run_id, "loss")
    assert [(p.step, p.value) for p in history] == [(0, 5), (1, 4), (2, 3), (3, 2), (4, 1)]


def test_server_killed_in_the_middle(tracked: Settings) -> None:
    """The run goes on, and what followed the outage is added to the same run later."""
    _close(open_tracker(tracked, "first"))  # so that the experiment keeps its files in the workspace
    with start_ui(tracked, port=0) as server:
        remote = replace(tracked, tracking_uri=server.url)
        tracker = open_tracker(remote, "train")
        tracker.log_metrics({"loss": 2}, step=1)
        run_id = tracker.wait_run_id(CLOSE_S)
        deadline = time.monotonic() + CLOSE_S
        while not _client(tracked).get_run(run_id).data.metrics and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
    start = time.monotonic()
    tracker.log_metrics({"loss": 1}, step=2)
    tracker.log_artifact(tracked.workspace / "mlflow.db")
    tracker.close("FAILED", timeout_s=CLOSE_S)
    assert time.monotonic() - start < 10
    assert len(_buffers(tracked)) == 1
    assert _client(tracked).get_run(run_id).info.status == "RUNNING"

    _close(open_tracker(tracked, "next"))
    assert _buffers(tracked) == []
    run = _client(tracked).get_run(run_id)
    assert run.info.status == "FAILED"
    assert set(_runs(tracked)) == {"first", "train", "next"}
    assert (tracked.workspace / "mlartifacts" / str(run_id) / "artifacts" / "mlflow.db").exists()
    history = _client(tracked).get_metric_history(run_id, "loss")
    assert [(p.step, p.value) for p in history] == [(1, 2), (2, 1)]


def test_tracking_that_comes_back_is_used_again(
    tracked: Settings, migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_RETRY_S", 0.1)
    database = tmp_path / "volume" / "mlflow.db"
    database.parent.write_text("a file where the volume will be")
    settings = replace(tracked, tracking_uri=f"sqlite:///{database}")
    tracker = open_tracker(settings, "train")
    tracker.log_metrics({"loss": 2}, step=1)
    deadline = time.monotonic() + CLOSE_S
    while not _buffers(tracked) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tracker.run_id is None
    database.parent.unlink()
    database.parent.mkdir()
    shutil.copy(migrated_database, database)
    assert tracker.wait_run_id(CLOSE_S)
    tracker.log_metrics({"loss": 1}, step=2)
    _close(tracker)
    assert _buffers(tracked) == []
    history = _client(settings).get_metric_history(tracker.run_id, "loss")
    assert [(p.step, p.value) for p in history] == [(1, 2), (2, 1)]


def test_close_keeps_what_a_silent_server_did_not_take(tracked: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = replace(tracked, tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker = open_tracker(settings, "train")
        tracker.log_metrics({"loss": 1})
        start = time.monotonic()
        tracker.close(timeout_s=0.2)
        assert time.monotonic() - start < 2
    (path,) = _buffers(tracked)
    kinds = [json.loads(line).get("kind") for line in path.read_text().splitlines()]
    assert kinds == [None, "metrics", "close"]


def test_replay_leaves_out_damage_and_finishes_what_was_killed(tracked: Settings) -> None:
    folder = tracked.workspace / "tracking-buffer"
    buffer = BufferFile.create(folder, RunSpec(name="killed", experiment=tracked.experiment))
    buffer.append([Event(kind="metrics", values={"loss": 1.5}, step=3, time_ms=1_000)])
    with buffer.path.open("a") as file:
        file.write('{"kind": "metrics", "valu')
    held = BufferFile.create(folder, RunSpec(name="alive", experiment=tracked.experiment))
    buffer.close()
    (folder / "0-unreadable.jsonl").write_text("not json\n")
    later = BufferFile.create(folder, RunSpec(name="unplaced", experiment="elsewhere", opened_ns=1))
    _client(tracked).create_experiment("elsewhere", "mlflow-artifacts:/0")  # files of it need a server
    later.append([Event(kind="artifact", values={"path": str(tracked.workspace / "mlflow.db")})])
    later.close()

    _close(open_tracker(tracked, "next"))
    run = _runs(tracked)["killed"]
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"loss": 1.5}
    assert [path.name for path in _buffers(tracked)] == ["0-unreadable.rejected", later.path.name, held.path.name]
    held.close()


def test_workspace_that_cannot_be_written_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ws").write_text("a file")
    tracker = open_tracker(Settings.load(tmp_path / "ws", {}), "train")
    tracker.log_metrics({"loss": 1})
    _close(tracker)
    assert "events of run train are lost" in caplog.text


@pytest.mark.slow
def test_processes_share_a_new_database_and_never_wait(tmp_path: Path) -> None:
    """Both migrate at once, write at once, and neither is held up by the seconds that takes."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        for name in ("one", "two")
    ]
    outputs = [writer.communicate(timeout=150) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], outputs
    assert all(float(out) < 1.0 for out, _ in outputs)
    assert [err for _, err in outputs] == ["", ""]
    settings = Settings.load(tmp_path, {})
    runs = _runs(settings)
    assert set(runs) == {"one", "two"}
    for name, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.params == {"writer": name}
        assert len(_client(settings).get_metric_history(run.info.run_id, "loss")) == 300
    assert _buffers(settings) == []
    assert {p.name for p in tmp_path.iterdir()} <= {"mlflow.db", "mlflow.db.lock"}


def test_interrupted_migration_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.new").write_bytes(b"half a database")
    (tmp_path / "mlflow.db.new-journal").write_bytes(b"and its journal")
    settings = Settings.load(tmp_path, {})
    mlflow_backend.prepare_database(settings)
    default = _client(settings).search_experiments()[0]
    assert default.artifact_location.startswith(str(tmp_path / "mlartifacts"))
    assert not list(tmp_path.glob("*.new*"))


def test_locked_database_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_backend, "_LOCK_DELAYS_S", (0.0, 0.0))
    answers: list[Exception | str] = [RuntimeError("(sqlite3) database is locked"), RuntimeError("database is locked")]

    def call() -> str:
        answer = answers.pop(0) if answers else "done"
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert mlflow_backend.retrying(call) == "done"
    answers = [RuntimeError("no such table")]
    with pytest.raises(RuntimeError, match="no such table"):
        mlflow_backend.retrying(call)


def test_foreign_server_counts_as_an_outage() -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    page = MlflowException("API request to endpoint /api failed with error code 404 != 200", RESOURCE_DOES_NOT_EXIST)
    assert not mlflow_backend.is_rejection(page)
    assert mlflow_backend.is_rejection(MlflowException("Run with id=x not found", RESOURCE_DOES_NOT_EXIST))


NAMES = {
    "train/loss": "train/loss",
    "acc@1 (%)": "acc_1 ___",
    "/a//b/": "a/b",
    "../x": "_/x",
    "": "unnamed",
    "x" * 300: "x" * 250,
}


@pytest.mark.parametrize(("name", "clean"), NAMES.items())
def test_names_become_acceptable(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_changed_names_are_taken_by_mlflow(tracked: Settings) -> None:
    tracker = open_tracker(tracked, "names")
    tracker.log_metrics(dict.fromkeys(NAMES, 1.0))
    tracker.log_params(dict.fromkeys(NAMES, 1.0))
    tracker.set_tags(dict.fromkeys(NAMES, 1.0))
    _close(tracker)
    data = _runs(tracked)["names"].data
    for kind in (data.metrics, data.params, data.tags):
        assert set(NAMES.values()) <= set(kind)


def test_batches_keep_order_and_size() -> None:
    metric = Event(kind="metrics", values={f"m{i}": 0.0 for i in range(400)})
    tag = Event(kind="tags", values={"a": "b"})
    sizes = [[event.kind for event in batch] for batch in batches([metric, metric, metric, tag, metric])]
    assert sizes == [["metrics"] * 2, ["metrics"], ["tags"], ["metrics"]]


def test_passwords_stay_out_of_notices() -> None:
    assert mlflow_backend.without_password("https://me:secret@host/x") == "https://host/x"


def test_data_sets_are_inputs_of_the_run_also_after_an_outage(tracked: Settings) -> None:
    ref = ArtifactRef(step="curate", key="1" * 64, digest="2" * 64, uri="s3://models/curate")
    inputs = [DatasetInput.of(ref, "training", {"samples": 20.0}), DatasetInput.of(ref, "evaluation", {})]
    for settings, name in ((_unreachable(tracked), "cut off"), (tracked, "later")):
        tracker = open_tracker(settings, name)
        tracker.log_datasets(inputs)
        _close(tracker)
    found = {name: run.inputs.dataset_inputs for name, run in _runs(tracked).items()}
    for logged in (found["cut off"], found["later"]):
        assert {(one.dataset.name, tag.value) for one in logged for tag in one.tags} == {
            ("curate for training", "training"),
            ("curate for evaluation", "evaluation"),
        }
        dataset = logged[0].dataset
        assert dataset.digest == "2" * 36
        assert json.loads(dataset.source) == {"uri": ref.uri, "digest": ref.digest}
    assert {one.dataset.profile for one in found["later"]} <= {'{"samples": 20.0}', "{}"}


def test_a_data_set_that_another_run_makes_at_the_same_moment_is_no_outage(
    tracked: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    log_inputs = MlflowClient.log_inputs
    failed: list[Any] = []

    def race(self: MlflowClient, *args: Any) -> None:
        if not failed:
            failed.append(args)
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id")
        log_inputs(self, *args)

    monkeypatch.setattr(MlflowClient, "log_inputs", race)
    ref = ArtifactRef(step="curate", key="1" * 64, digest="2" * 64, uri="s3://models/curate")
    tracker = open_tracker(tracked, "second")
    tracker.log_datasets([DatasetInput.of(ref, "training", {"samples": 20.0})])
    _close(tracker)
    (run,) = _runs(tracked).values()
    assert failed
    assert [one.dataset.name for one in run.inputs.dataset_inputs] == ["curate for training"]
    assert run.info.status == "FINISHED"
    assert "is out" not in caplog.text

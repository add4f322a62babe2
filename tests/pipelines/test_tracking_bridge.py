"""From events to MLflow: nested runs, metrics, the run's id for the registry, and an outage that nobody feels."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from nvila_pipelines import tracking_bridge
from nvila_pipelines.lifecycle import new_run
from nvila_pipelines.recipe import Recipe
from nvila_pipelines.steps.runner import RunContext
from nvila_pipelines.tracking_bridge import TrackingBridge
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef
from nvila_platform.telemetry import Event
from nvila_platform.tracking_datasets import DatasetInput

NewRun = Callable[[], RunContext]


def event(step: str, phase: str, done: int = 0, notice: str = "", **metrics: float) -> Event:
    return Event(
        time="2026-11-22T20:00:00+00:00", step=step, phase=phase, done=done, total=9, metrics=metrics, notice=notice
    )


@dataclass
class Recorded:
    """Stands in for a tracker and keeps what it was told."""

    name: str
    parent: str | None
    run_id: str | None = None
    told: list[tuple[str, Any]] = field(default_factory=list)
    handle: str = "pending:parent"

    def log_params(self, params: dict[str, Any]) -> None:
        self.told.append(("params", params))

    def log_metrics(self, metrics: dict[str, float], step: int = 0) -> None:
        self.told.append((f"metrics {step}", metrics))

    def log_artifact(self, path: Path) -> None:
        self.told.append(("artifact", path))

    def log_datasets(self, datasets: list[DatasetInput]) -> None:
        self.told += [("dataset", (one.name, one.context, one.digest)) for one in datasets]

    def set_tags(self, tags: dict[str, Any]) -> None:
        self.told.append(("tags", tags))

    def finish(self, status: str) -> None:
        self.told.append(("finish", status))

    def close(self, status: str, timeout_s: float) -> None:
        assert timeout_s > 0, "a tracker that is closed without time leaves its run to the next command"
        self.told.append(("close", status))


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    opened: list[Recorded] = []

    def open_tracker(settings: Settings, name: str, parent_run_id: str | None = None, tags: object = None) -> Recorded:
        opened.append(Recorded(name, parent_run_id))
        return opened[-1]

    monkeypatch.setattr(tracking_bridge, "open_tracker", open_tracker)
    return opened


@pytest.fixture
def bridge(trackers: list[Recorded], micro: Recipe, new_context: NewRun) -> TrackingBridge:
    return TrackingBridge(new_context(), micro)


def test_a_step_is_a_nested_run_with_its_part_of_the_recipe(bridge: TrackingBridge, trackers: list[Recorded]) -> None:
    bridge.add(event("gate", "start"))
    assert [(tracker.name, tracker.parent) for tracker in trackers[1:]] == [("gate", "pending:parent")]
    assert trackers[0].told == [("params", {"recipe": "micro", "seed": 0})]
    (params,) = trackers[1].told
    assert set(params[1]) == {"gate", "register.name"}


def test_progress_becomes_points_and_the_end_becomes_totals(bridge: TrackingBridge, trackers: list[Recorded]) -> None:
    for found in (
        event("train", "start"),
        event("train", "instruct", 5, loss=0.5, broken=float("nan")),
        event("train", "", notice="stage base is already trained"),
        event("train", "finished", 1, loss_instruct=0.25),
    ):
        bridge.add(found)
    # Ended when the step ended, closed when there is time to wait.
    assert trackers[1].told[-1] == ("finish", "FINISHED")
    bridge.close("FINISHED")
    assert trackers[1].told[1:] == [
        ("metrics 5", {"instruct/loss": 0.5}),
        ("metrics 0", {"loss_instruct": 0.25}),
        ("finish", "FINISHED"),
        ("close", "FINISHED"),
    ]
    assert trackers[0].told[1:] == [("metrics 0", {"train/loss_instruct": 0.25}), ("close", "FINISHED")]


def test_a_reused_step_opens_no_run(bridge: TrackingBridge, trackers: list[Recorded]) -> None:
    bridge.add(event("train", "reused", 1, loss=0.5))
    bridge.add(event("data", "", notice="process 7 is working on it; waiting"))
    assert len(trackers) == 1


def test_open_steps_end_as_the_run_ends(bridge: TrackingBridge, trackers: list[Recorded]) -> None:
    bridge.add(event("data", "finished", 1))
    bridge.add(event("train", "start"))
    bridge.close("FAILED")
    assert ("finish", "FINISHED") in trackers[1].told
    assert ("finish", "FINISHED") not in trackers[2].told
    assert [tracker.told[-1] for tracker in trackers] == [("close", "FAILED")] * 3


def test_the_run_id_is_left_for_the_registry_once_it_is_known(
    trackers: list[Recorded], micro: Recipe, new_context: NewRun
) -> None:
    run = new_context()
    bridge = TrackingBridge(run, micro)
    bridge.add(event("data", "start"))
    assert run.tracking_run() is None
    trackers[0].run_id = "abc123"
    bridge.add(event("data", "load"))
    assert run.tracking_run() == "abc123"


def test_the_report_goes_to_the_parent_run(bridge: TrackingBridge, trackers: list[Recorded], tmp_path: Path) -> None:
    bridge.log_report(tmp_path / "report.html")
    assert trackers[0].told[-1] == ("artifact", tmp_path / "report.html")


@pytest.fixture
def out_of_order(settings: Settings) -> Iterator[Settings]:
    """Settings whose MLflow is at a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        # Bound and not listening: connections are refused and nobody else gets the port.
        yield replace(settings, tracking_uri=f"http://127.0.0.1:{probe.getsockname()[1]}")


def test_an_outage_is_buffered_and_costs_little(out_of_order: Settings, micro: Recipe) -> None:
    run = new_run(micro, out_of_order)
    began = time.monotonic()
    bridge = TrackingBridge(run, micro)
    for step in ("data", "curate"):
        bridge.add(event(step, "start"))
        bridge.add(event(step, "finished", 1, loss=0.5))
    assert time.monotonic() - began < 5
    bridge.close("FINISHED")
    assert run.tracking_run() is None
    names = [path.name for path in (out_of_order.workspace / "tracking-buffer").iterdir()]
    assert len([name for name in names if "-data-" in name or "-curate-" in name]) == 2
    assert len(names) == 3


def test_a_finished_run_is_complete_in_mlflow_when_the_bridge_is_closed(settings: Settings, micro: Recipe) -> None:
    from mlflow import MlflowClient

    run = new_run(micro, settings)
    bridge = TrackingBridge(run, micro)
    for step in ("data", "serve"):
        bridge.add(event(step, "start"))
        bridge.add(event(step, "ask", 3, seconds=0.5))
        bridge.add(event(step, "finished", 1, asked=4.0))
    # The database is made on first use, which on a busy machine takes longer than closing waits.
    assert bridge._parent.wait_run_id(120)
    bridge.add(event("data", "reused"))
    bridge.close("FINISHED")
    client = MlflowClient(settings.tracking_uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "nvila"]
    runs = {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {run.run_id, "data", "serve"}
    assert {found.info.status for found in runs.values()} == {"FINISHED"}
    parent = runs[run.run_id].info.run_id
    assert run.tracking_run() == parent
    for step in ("data", "serve"):
        assert runs[step].data.tags["mlflow.parentRunId"] == parent
        assert runs[step].data.metrics == {"ask/seconds": 0.5, "asked": 4.0}
    assert not list((settings.workspace / "tracking-buffer").glob("*"))


def test_what_the_steps_used_together_goes_to_the_parent(bridge: TrackingBridge, trackers: list[Recorded]) -> None:
    for step, hours in (("data", 1.0), ("curate", 2.0)):
        bridge.add(event(step, "start"))
        bridge.add(event(step, "finished", 1, core_hours=hours, loss=5.0))
    bridge.add(event("train", "reused", 1, core_hours=100.0))
    bridge.close("FAILED")
    assert ("metrics 0", {"lifecycle/core_hours": 3.0}) in trackers[0].told


def test_tags_go_to_the_parent(bridge: TrackingBridge, trackers: list[Recorded]) -> None:
    bridge.set_tags({"nvila.gate.state": "refused"})
    assert trackers[0].told[-1] == ("tags", {"nvila.gate.state": "refused"})


def test_a_step_names_the_data_that_it_reads_and_the_run_names_each_once(
    trackers: list[Recorded], micro: Recipe, new_context: NewRun
) -> None:
    run = new_context()
    bridge = TrackingBridge(run, micro)
    for step in ("data", "curate", "train", "quantize", "evaluate-wide", "evaluate-quantized", "gate"):
        bridge.add(event(step, "start"))
        run.record(ArtifactRef(step=step, key="1" * 64, digest=f"{step:a<64}"[:64], uri=f"file:///{step}"))
        bridge.add(event(step, "finished", 1))
    data, selection = f"{'data':a<64}", f"{'curate':a<64}"
    parent, *steps = trackers
    told = {one.name: [value for kind, value in one.told if kind == "dataset"] for one in steps}
    assert told["data"] == told["gate"] == []
    assert told["curate"] == [("data for curation", "curation", data)]
    assert told["train"] == [("data for training", "training", data), ("curate for training", "training", selection)]
    assert told["quantize"] == [("data for calibration", "calibration", data)]
    assert told["evaluate-wide"] == told["evaluate-quantized"] == [("data for evaluation", "evaluation", data)]
    contexts = [value[1] for kind, value in parent.told if kind == "dataset"]
    assert contexts == ["curation", "training", "training", "calibration", "evaluation"]


def test_the_load_of_the_machine_goes_to_the_run_and_to_open_steps(
    bridge: TrackingBridge, trackers: list[Recorded]
) -> None:
    bridge.add(event("data", "start"))
    bridge.add(event("data", "finished", 1))
    bridge.add(event("curate", "start"))
    bridge.log_load({"system/cpu_utilization_percentage": 50.0}, 3)
    told = {one.name for one in trackers if ("metrics 3", {"system/cpu_utilization_percentage": 50.0}) in one.told}
    assert told == {trackers[0].name, "curate"}

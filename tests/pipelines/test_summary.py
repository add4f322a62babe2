"""The summary: numbers from the directories of the steps, also from a run that the gate stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila_pipelines.recipe import Recipe
from nvila_pipelines.run_record import RunRecord
from nvila_pipelines.steps.runner import RunContext
from nvila_pipelines.summary import summarize
from nvila_platform.artifacts import utc_now, write_manifest
from nvila_platform.telemetry import Event

FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "evaluate-wide": ("results.json", {"accuracy": 0.98}),
    "evaluate-quantized": (
        "results.json",
        {"accuracy": 0.97, "baselines": {"majority": 0.37, "text_majority": 0.67}},
    ),
    "quantize": ("sizes.json", {"wide": {"total": 10}, "quantized": {"total": 4}}),
    "gate": ("verdict.json", {"passed": True, "checks": [{"name": "accuracy", "passed": True}]}),
    "serve": (
        "serve.json",
        {"asked": 50, "right": 49, "p50_ms": 8.0, "p95_ms": 9.0, "model": "models:/nvila@champion"},
    ),
}


def test_usage_is_that_of_the_steps_that_this_run_did(
    artifacts: dict[str, Path], micro: Recipe, new_context: Callable[[], RunContext]
) -> None:
    for step, directory in artifacts.items():
        metrics = {"core_hours": 2.0, "cost_usd": 0.5, "core_hours_align": 1.0, "loss": 0.1}
        about: dict[str, Any] = {"config": {}, "inputs": {}, "code_version": "v", "started_at": utc_now()}
        write_manifest(directory, step=step, key="0" * 64, metrics=metrics, **about)
    seconds = {"quantize": 3.0, "gate": 1.0, "serve": 0.0}
    found = summarize(new_context(), micro, artifacts, seconds, 4.0).to_dict()
    assert found["usage"] == {"core_hours": 4.0, "cost_usd": 1.0}


@pytest.fixture
def artifacts(tmp_path: Path) -> dict[str, Path]:
    for step, (name, content) in FILES.items():
        (tmp_path / "made" / step).mkdir(parents=True)
        (tmp_path / "made" / step / name).write_text(json.dumps(content), encoding="utf-8")
    return {step: tmp_path / "made" / step for step in FILES}


def test_the_numbers_of_a_whole_run(
    artifacts: dict[str, Path], micro: Recipe, new_context: Callable[[], RunContext]
) -> None:
    run = new_context()
    found = summarize(run, micro, artifacts, {"data": 1.5}, 3.14159).to_dict()
    assert found["accuracy"] == {"majority": 0.37, "text_majority": 0.67, "wide": 0.98, "quantized": 0.97}
    assert found["served"] == {"asked": 50, "right": 49, "p50_ms": 8.0, "p95_ms": 9.0}
    assert found["model"] == "models:/nvila@champion"
    assert found["passed"] is True
    assert found["checks"] == [{"name": "accuracy", "passed": True}]
    assert found["sizes"] == FILES["quantize"][1]
    assert found["steps"] == {"data": 1.5}
    assert found["usage"] == {}
    assert found["seconds"] == 3.1
    assert found["recipe"] == micro.to_dict()
    assert found["report"] == str(run.directory / "report.html")
    assert found["versions"]["torch"]
    assert found["versions"]["python"]
    assert found["hardware"]["cores"] >= 1
    json.dumps(found)


def test_a_refused_run_has_a_verdict_and_no_model(
    artifacts: dict[str, Path], micro: Recipe, new_context: Callable[[], RunContext]
) -> None:
    (artifacts["gate"] / "verdict.json").write_text(json.dumps({"passed": False, "checks": []}), encoding="utf-8")
    del artifacts["serve"]
    found = summarize(new_context(), micro, artifacts, {}, 1.0)
    assert (found.passed, found.model, dict(found.served)) == (False, "", {})
    assert found.accuracy["quantized"] == 0.97


def test_a_run_without_results_is_not_passed(micro: Recipe, new_context: Callable[[], RunContext]) -> None:
    found = summarize(new_context(), micro, {}, {}, 1.0)
    assert found.passed is False
    assert found.accuracy == {"majority": 0.0, "text_majority": 0.0, "wide": 0.0, "quantized": 0.0}


def test_finished_sets_the_final_time(micro: Recipe, new_context: Callable[[], RunContext]) -> None:
    assert summarize(new_context(), micro, {}, {}, 1.0).finished(12.345).seconds == 12.3


def event(step: str, phase: str, second: int, notice: str = "") -> Event:
    return Event(time=f"2026-11-22T20:00:{second:02d}.500+00:00", step=step, phase=phase, notice=notice)


def test_the_record_times_a_step_from_its_first_event_to_its_end() -> None:
    record = RunRecord()
    for found in (
        event("data", "start", 1),
        event("curate", "", 2, notice="waiting"),
        event("data", "finished", 4),
        event("curate", "start", 5),
        event("curate", "small", 6),
        event("train", "reused", 7),
        event("gate", "start", 8),
    ):
        record.add(found)
    assert record.seconds == {"data": 3.0, "train": 0.0}
    record.add(event("curate", "finished", 9))
    assert record.seconds["curate"] == 4.0


def test_a_step_done_within_a_millisecond_is_not_taken_for_a_reused_one() -> None:
    record = RunRecord()
    record.add(event("gate", "start", 1))
    record.add(event("gate", "finished", 1))
    assert record.seconds["gate"] > 0

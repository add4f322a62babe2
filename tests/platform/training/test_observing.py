"""What sinks are told of a training run, when, and what a broken one can do to it."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from nvila.training.config import TrainConfig
from nvila_platform.mlflow_backend import connect
from nvila_platform.pipeline_runs import parent_run
from nvila_platform.settings import Settings
from nvila_platform.telemetry import EventLog, ProgressView, parse_event
from nvila_platform.training import TrainingObserver, observe_training
from nvila_platform.training.history import HISTORY_FILE, HistorySink, read_history
from nvila_platform.training.meter import StageMeter
from nvila_platform.training.sinks import BaseSink, ProgressSink

if TYPE_CHECKING:
    from tests.platform.training.conftest import Heard, MakeRecord, MakeStart

    from nvila.training.observer import StepRecord

PLAIN = Settings.load(environ={})
PRICED = Settings.load(environ={"NVILA_PRICE_PER_CORE_HOUR": "1", "NVILA_WATTS_PER_CORE": "10"})


class Broken(BaseSink):
    """Raises at the second step."""

    def __init__(self) -> None:
        self.seen = 0

    def on_step(self, meter: StageMeter, record: StepRecord, values: Mapping[str, float]) -> None:
        self.seen += 1
        if self.seen == 2:
            raise RuntimeError("the disk is gone")


def test_progress_holds_what_a_person_wants_to_know(heard: Heard, record: MakeRecord, start: MakeStart) -> None:
    observer = TrainingObserver(
        [ProgressSink(heard, interval_s=0)], PRICED, peak_flops=1e6, flops={"align": lambda record: 2e5}
    )
    observer.on_stage_start(start())
    observer.on_step(record(1, loss=4.0))
    observer.on_step(record(2, loss=2.0, skipped=True))
    observer.on_stage_end("align")
    (phase, done, total, first), (_, _, _, second), (_, end, _, used) = heard.events
    assert (phase, done, total, end) == ("align", 1, 10, 10)
    assert {name: first[name] for name in ("loss", "tokens_per_second", "samples_per_second", "mfu")} == {
        "loss": 4.0, "tokens_per_second": 2000, "samples_per_second": 20, "mfu": pytest.approx(0.4),
    }  # fmt: skip
    assert first["memory_gib"] > 0.01
    assert first["data_share"] == pytest.approx(0.2)
    assert second["loss"] == pytest.approx(3.9)
    assert second["skipped_steps"] == 1
    assert set(used) == {"core_hours", "energy_kwh_estimated", "cost_usd"}


def test_time_left_is_that_of_the_rest_of_the_stage(record: MakeRecord, start: MakeStart) -> None:
    meter = StageMeter(start(), PLAIN)
    assert meter.values() == {}
    meter.add(record(4))
    assert meter.values()["seconds_left"] == pytest.approx(3.0)


def test_peak_is_that_of_all_processes(record: MakeRecord, start: MakeStart) -> None:
    meter = StageMeter(start(world_size=4), PLAIN, peak_flops=1e6, flops=lambda record: 2e5)
    meter.add(record())
    assert meter.values()["mfu"] == pytest.approx(0.1)


def test_values_that_are_no_numbers_are_left_out(record: MakeRecord, start: MakeStart) -> None:
    meter = StageMeter(start(), PLAIN)
    meter.add(record(loss=math.inf, grad_norm=math.nan, seconds=0.0))
    assert set(meter.values()) == {"lr_scale", "skipped_steps", "memory_gib"}
    meter.add(record(loss=3.0))
    assert meter.values()["loss"] == 3.0


def test_fast_steps_are_thinned_but_skipped_and_last_ones_always_told(
    heard: Heard, record: MakeRecord, start: MakeStart
) -> None:
    observer = TrainingObserver([ProgressSink(heard, interval_s=60)], PLAIN)
    observer.on_stage_start(start())
    for step in range(1, 11):
        observer.on_step(record(step, skipped=step == 5))
    assert [done for _, done, _, _ in heard.events] == [1, 5, 10]
    observer.on_stage_start(start("vision"))
    for step in range(1, 4):
        observer.on_step(record(step, stage="vision"))
    assert [(stage, done) for stage, done, _, _ in heard.events[3:]] == [("vision", 1)]


def test_steps_outside_a_stage_are_ignored(heard: Heard, record: MakeRecord) -> None:
    observer = TrainingObserver([ProgressSink(heard)], PLAIN)
    observer.on_step(record())
    observer.on_stage_end("align")
    assert heard.events == []


def test_broken_sink_is_left_out_and_training_goes_on(
    heard: Heard, record: MakeRecord, start: MakeStart, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    with TrainingObserver([broken, ProgressSink(heard, interval_s=0)], PLAIN) as observer:
        observer.on_stage_start(start())
        for step in range(1, 6):
            observer.on_step(record(step))
    assert broken.seen == 2
    assert len(heard.events) == 5
    assert [one.getMessage() for one in caplog.records] == ["Broken is left out of this training run"]


def test_a_step_costs_microseconds(record: MakeRecord, start: MakeStart, tmp_path: Path) -> None:
    """Ten times what it takes on a quiet machine; a step of training takes milliseconds at the least."""
    sinks = [ProgressSink(EventLog(tmp_path / "events.jsonl")), HistorySink(tmp_path / "history.jsonl")]
    with TrainingObserver(sinks, PLAIN) as observer:
        observer.on_stage_start(start(steps=10**6))
        records = [record(step, steps=10**6) for step in range(1, 2001)]
        began = time.perf_counter()
        for one in records:
            observer.on_step(one)
        assert (time.perf_counter() - began) / len(records) < 200e-6


def test_history_joins_attempts(record: MakeRecord, start: MakeStart, tmp_path: Path) -> None:
    path = tmp_path / HISTORY_FILE
    for first, last in ((1, 6), (4, 10)):
        with TrainingObserver([HistorySink(path, interval_s=0)], PRICED) as observer:
            observer.on_stage_start(start(first_step=first - 1))
            time.sleep(0.01)
            for step in range(first, last + 1):
                observer.on_step(record(step, loss=float(first), skipped=step == 5))
            if last == 10:
                observer.on_stage_end("align")
        with path.open("a") as out:
            out.write('{"stage": "al\n')
    (history,) = read_history(path).values()
    assert [point.step for point in history.points] == list(range(1, 11))
    assert [point.values["loss_step"] for point in history.points] == [1.0] * 3 + [4.0] * 7
    assert [point.step for point in history.points if "skipped" in point.values] == [5]
    times = [point.seconds for point in history.points]
    assert times == sorted(times)
    # Times are kept in milliseconds.
    assert times[3] > times[2] + 0.009
    assert set(history.usage) == {"core_hours", "energy_kwh_estimated", "cost_usd"}


def test_missing_history_has_no_stages(tmp_path: Path) -> None:
    assert read_history(tmp_path / "none") == {}


def test_settings_decide_who_is_told(
    heard: Heard, config: TrainConfig, record: MakeRecord, start: MakeStart, tmp_path: Path
) -> None:
    settings = Settings.load(tmp_path, {"NVILA_PEAK_TFLOPS": "0.001"})
    with observe_training(config, settings, out_dir=tmp_path, reporter=heard) as observer:
        observer.on_stage_start(start())
        observer.on_step(record())
        observer.on_notice("a notice")
    assert heard.notices == []
    assert 0 < heard.events[0][3]["mfu"] < 1
    assert list(read_history(tmp_path / HISTORY_FILE)) == ["align"]
    assert not (tmp_path / "mlflow.db").exists()


def test_training_that_tracks_itself_sends_every_step_below_the_pipelines_run(
    heard: Heard, config: TrainConfig, record: MakeRecord, start: MakeStart, tmp_path: Path,
    tracked: Settings, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = replace(tracked, track_training="direct")
    parent = parent_run(settings, "nightly")
    assert parent is not None
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    with observe_training(config, settings, out_dir=tmp_path, reporter=heard) as observer:
        observer.on_stage_start(start())
        for step in (1, 2, 3):
            observer.on_step(record(step, loss=4.0 / step))
    client = connect(settings)
    experiment = client.get_experiment_by_name(settings.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert (run.info.run_name, run.info.status) == ("train", "FINISHED")
    assert run.data.params["align.steps"] == "10"
    history = client.get_metric_history(run.info.run_id, "align/loss_step")
    assert [(point.step, point.value) for point in history] == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3))]


def test_without_a_known_peak_there_is_no_mfu(
    heard: Heard, config: TrainConfig, record: MakeRecord, start: MakeStart, tmp_path: Path
) -> None:
    with observe_training(config, Settings.load(tmp_path, {}), out_dir=tmp_path, reporter=heard) as one:
        one.on_stage_start(start())
        one.on_step(record())
    assert "mfu" not in heard.events[0][3]


def test_decoder_without_a_formula_is_named(heard: Heard, config: TrainConfig, tmp_path: Path) -> None:
    other = replace(config, model=replace(config.model, language={"model_type": "gpt2"}))
    settings = Settings.load(tmp_path, {"NVILA_PEAK_TFLOPS": "1"})
    observe_training(other, settings, out_dir=tmp_path, reporter=heard).close()
    assert heard.notices == ["no MFU: there is no formula for the operations of a decoder of type 'gpt2'"]


def test_history_that_cannot_be_written_is_a_notice(heard: Heard, config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / HISTORY_FILE).mkdir()
    observe_training(config, Settings.load(tmp_path, {}), out_dir=tmp_path, reporter=heard).close()
    assert len(heard.notices) == 1
    assert "no history" in heard.notices[0]


def test_terminal_shows_the_names_that_people_use(record: MakeRecord, start: MakeStart, tmp_path: Path) -> None:
    out = io.StringIO()
    with ProgressView(Console(file=out, width=160, force_terminal=True), format="text") as view:
        observer = TrainingObserver([ProgressSink(view.reporter("train"))], PLAIN)
        observer.on_stage_start(start())
        observer.on_step(record(10))
    for text in ("loss 2", "tok/s 2,000", "samples/s 20.0", "mem ", " GiB"):
        assert text in out.getvalue()
    assert "grad_norm" not in out.getvalue()


def test_event_log_takes_the_values(record: MakeRecord, start: MakeStart, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, step="train") as log, TrainingObserver([ProgressSink(log)], PLAIN) as observer:
        observer.on_stage_start(start())
        observer.on_step(record())
    event = parse_event(path.read_text().splitlines()[0])
    assert event is not None
    assert (event.phase, event.done) == ("align", 1)
    assert {"loss", "tokens_per_second", "samples_per_second", "memory_gib"} <= set(event.metrics)

"""Training tracked by a real MLflow that is dead, slow or silent, or dies: no step waits, nothing is lost or twice."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from nvila_platform import mlflow_backend, tracking
from nvila_platform.mlflow_ui import start_ui
from nvila_platform.settings import Settings
from nvila_platform.tracking import Tracker, open_tracker
from nvila_platform.tracking_buffer import Event, Outbox
from nvila_platform.training import TrainingObserver
from nvila_platform.training.sinks import TrackingSink

if TYPE_CHECKING:
    from tests.platform.training.conftest import MakeRecord, MakeStart

CLOSE_S = 60.0
LIMIT = 200


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let little wait in memory, and an outage be over soon."""
    monkeypatch.setattr(tracking, "Outbox", lambda: Outbox(LIMIT))
    monkeypatch.setattr(tracking, "_RETRY_S", 0.2)


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """An address that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def observed(tracker: Tracker, start: MakeStart, steps: int) -> Iterator[TrainingObserver]:
    observer = TrainingObserver([TrackingSink(tracker)], Settings.load(environ={}))
    observer.on_stage_start(start(steps=steps))
    yield observer
    observer.on_stage_end("align")


def steps_of(settings: Settings, run_name: str) -> tuple[Counter[int], Any]:
    """Count the points of a run's loss by step."""
    client = mlflow_backend.connect(settings)
    experiment = client.get_experiment_by_name(settings.experiment)
    assert experiment is not None
    runs = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == run_name]
    assert len(runs) == 1
    history = client.get_metric_history(runs[0].info.run_id, "align/loss_step")
    return Counter(point.step for point in history), runs[0]


def wait_until(truth: Callable[[], bool]) -> None:
    deadline = time.monotonic() + CLOSE_S
    while not truth():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def once(steps: int) -> Counter[int]:
    return Counter(range(1, steps + 1))


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("kind", ["silent", "closed"])
def test_server_that_never_answers(
    kind: str, tracked: Settings, record: MakeRecord, start: MakeStart, request: pytest.FixtureRequest
) -> None:
    """Dead or silent from the start and for ever: memory stays bounded, and the next run brings all of it."""
    away = replace(tracked, tracking_uri=request.getfixturevalue(kind))
    tracker = open_tracker(away, "train")
    with observed(tracker, start, 500) as observer:
        for step in range(1, 501):
            observer.on_step(record(step, steps=500))
            assert tracker._outbox.waiting_values <= LIMIT + 20
    tracker.close(timeout_s=0.2)
    assert tracker.run_id is None
    next_one = open_tracker(tracked, "next")
    next_one.close(timeout_s=CLOSE_S)
    counted, run = steps_of(tracked, "train")
    assert counted == once(500)
    assert run.info.status == "FINISHED"
    assert list((tracked.workspace / "tracking-buffer").glob("*")) == []


@pytest.mark.usefixtures("bounded")
def test_slow_server_gets_everything_through_the_disk(tracked: Settings, record: MakeRecord, start: MakeStart) -> None:
    """A step takes microseconds here and a request milliseconds, so most events cannot wait in memory."""
    tracker = open_tracker(tracked, "train")
    spilled = False
    with observed(tracker, start, 1000) as observer:
        for step in range(1, 1001):
            observer.on_step(record(step, steps=1000))
            spilled = spilled or tracker._buffer is not None
    tracker.close(timeout_s=CLOSE_S)
    assert spilled
    counted, run = steps_of(tracked, "train")
    assert counted == once(1000)
    assert run.info.status == "FINISHED"
    assert "align/core_hours" in run.data.metrics
    assert run.data.params["align.parameters"] == "7"
    assert list((tracked.workspace / "tracking-buffer").glob("*")) == []


@pytest.mark.slow
@pytest.mark.usefixtures("bounded")
def test_server_that_dies_and_comes_back(tracked: Settings, record: MakeRecord, start: MakeStart) -> None:
    """Killed in the middle, back at the same address before the end: one run, every step once."""
    server = start_ui(tracked, port=0)
    remote = replace(tracked, tracking_uri=server.url)
    port = int(server.url.rpartition(":")[2])
    tracker = open_tracker(remote, "train")
    with observed(tracker, start, 90) as observer:
        for step in range(1, 31):
            observer.on_step(record(step, steps=90))
        run_id = tracker.wait_run_id(CLOSE_S)
        time.sleep(1.0)
        os.killpg(server.pid, signal.SIGKILL)
        server.stop()
        for step in range(31, 61):
            observer.on_step(record(step, steps=90))
        wait_until(lambda: tracker._buffer is not None)
        wait_until(lambda: is_free(port))
        with start_ui(tracked, port=port):
            for step in range(61, 91):
                observer.on_step(record(step, steps=90))
            wait_until(lambda: tracker._buffer is None)
            observer.on_stage_end("align")
            tracker.close(timeout_s=CLOSE_S)
    counted, run = steps_of(tracked, "train")
    assert counted == once(90)
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert list((tracked.workspace / "tracking-buffer").glob("*")) == []


def test_end_of_a_run_is_kept_even_when_nothing_else_fits() -> None:
    outbox = Outbox(max_values=2)
    value = Event(kind="metrics", values={"a": 1.0, "b": 2.0})
    assert outbox.put(value)
    assert not outbox.put(value)
    assert outbox.waiting_values == 2
    outbox.finish(Event(kind="close", values={"status": "FINISHED"}))
    outbox.finish(Event(kind="close", values={"status": "FAILED"}))
    assert [event.kind for event in outbox.peek()] == ["metrics", "close"]
    outbox.drop(1)
    assert outbox.waiting_values == 1
    assert outbox.put(value), "what follows the end is ignored"
    assert [event.values["status"] for event in outbox.abandon()] == ["FINISHED"]
    assert outbox.waiting_values == 0

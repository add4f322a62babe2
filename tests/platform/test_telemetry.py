"""Logs, event logs, following and the progress view."""

from __future__ import annotations

import io
import json
import logging
import math
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from nvila.errors import ConfigError
from nvila_platform.settings import LogFormat
from nvila_platform.telemetry import (
    Event,
    EventLog,
    ProgressView,
    TeeReporter,
    configure_logging,
    follow,
    parse_event,
)


@contextmanager
def bare_root() -> Iterator[logging.Logger]:
    """The root logger as a fresh process has it; no fixture, pytest adds its own handlers after those."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        yield root
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name in ("nvila", "nvila_platform", "nvila_pipelines"):
            logging.getLogger(name).setLevel(logging.NOTSET)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_logs_carry_context_and_exceptions() -> None:
    out = io.StringIO()
    log = logging.getLogger("nvila.training")
    with bare_root():
        configure_logging("json", context={"run_id": "r1", "rank": "0"}, stream=out)
        log.info("loss %.1f", 0.5, extra={"step": "train"})
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("failed")
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "nvila.training",
        "message": "loss 0.5",
        "run_id": "r1",
        "rank": "0",
        "step": "train",
    }
    assert "ValueError: broken" in second["exception"]


@pytest.mark.parametrize(
    ("format", "terminal", "is_json"),
    [("auto", True, False), ("auto", False, True), ("text", False, False), ("json", True, True)],
)
def test_the_log_format_follows_the_terminal_unless_told(format: LogFormat, terminal: bool, is_json: bool) -> None:
    out = Terminal() if terminal else io.StringIO()
    with bare_root():
        configure_logging(format, stream=out)
        logging.getLogger("nvila").warning("hello")
    assert out.getvalue().startswith("{") is is_json
    assert "hello" in out.getvalue()


def test_other_libraries_are_quiet_and_a_second_call_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    with bare_root():
        configure_logging("text", "DEBUG", stream=first)
        configure_logging("text", "DEBUG", stream=second)
        logging.getLogger("nvila_platform.store").debug("ours")
        logging.getLogger("urllib3").info("theirs")
        logging.getLogger("torchao.kernel.intmm").warning("no triton here")
        logging.getLogger("torchao").error("broken")
    assert first.getvalue() == ""
    assert "ours" in second.getvalue()
    assert "theirs" not in second.getvalue()
    assert "triton" not in second.getvalue()
    assert "broken" in second.getvalue()


def test_a_host_that_logs_already_keeps_its_handlers() -> None:
    host = logging.NullHandler()
    with bare_root() as root:
        root.addHandler(host)
        configure_logging("json", "DEBUG")
        assert root.handlers == [host]
        assert logging.getLogger("nvila").level == logging.DEBUG


def test_events_are_one_json_line_each(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "r1" / "events.jsonl"
    with EventLog(path, "train") as log:
        log.progress("align", 1, 10, {"loss": 0.5, "norm": math.inf})
        log.notice("fell back to bf16")
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first.pop("time") <= second.pop("time")
    metrics = {"loss": 0.5, "norm": None}
    assert first == {"step": "train", "phase": "align", "done": 1, "total": 10, "metrics": metrics}
    assert second == {"step": "train", "notice": "fell back to bf16"}


def append_many(path: Path, step: str) -> None:
    with EventLog(path, step) as log:
        for done in range(300):
            log.progress("phase" * 20, done, 300, {"loss": 0.5})


def test_lines_of_two_processes_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=append_many, args=(path, step)) for step in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    events = [parse_event(line) for line in path.read_text().splitlines()]
    assert None not in events
    assert len(events) == 600


def test_events_that_cannot_be_written_never_stop_the_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(tmp_path / "events.jsonl", "train")
    log.close()
    log.close()
    for done in range(3):
        log.progress("align", done, 3)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["progress events cannot be written"]


def test_an_event_log_in_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "ws").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write"):
        EventLog(tmp_path / "ws" / "events.jsonl")


def test_following_sees_every_event_of_a_file_that_comes_later(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    done = threading.Event()

    def write() -> None:
        time.sleep(0.05)
        with EventLog(path, "train") as log:
            for number in range(5):
                log.progress("align", number, 5)
                time.sleep(0.01)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = [event.done for event in follow(path, done.is_set, poll_s=0.01)]
    writer.join()
    assert seen == [0, 1, 2, 3, 4]


def test_what_was_written_before_the_stop_is_still_seen(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def stop() -> bool:
        with EventLog(path, "train") as log:
            log.notice("last words")
        return True

    assert [event.notice for event in follow(path, stop)] == ["last words"]


def test_broken_and_half_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, "train") as log:
        log.notice("one")
    with path.open("a") as out:
        out.write('[1]\n{"step": 3\nnull\n{"unknown": 1}\n')
    with EventLog(path, "train") as log:
        log.progress("align", 1, 2, {"loss": math.nan})
    with path.open("a") as out:
        out.write('{"time": "half a li')
    events = list(follow(path, lambda: True))
    assert [event.notice for event in events] == ["one", ""]
    assert math.isnan(events[1].metrics["loss"])


def at(second: int, done: int, *, phase: str = "align", total: int = 100) -> Event:
    stamp = f"2026-01-01T00:00:{second:02}+00:00"
    return Event(time=stamp, step="train", phase=phase, done=done, total=total, metrics={"loss": 0.25})


def test_without_a_terminal_the_view_writes_json_lines_with_time_left() -> None:
    out = io.StringIO()
    with ProgressView(Console(file=out), interval_s=3600) as view:
        for second, done in [(0, 0), (5, 10), (10, 20), (50, 100)]:
            view.show(at(second, done))
        view.show(at(51, 0, phase="vision", total=0))
        view.show(Event(time="", step="train", notice="a notice"))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line.get("phase"), line.get("done")) for line in lines] == [
        ("align", 0),
        ("align", 100),
        ("vision", 0),
        (None, None),
    ]
    assert (lines[1]["per_second"], lines[1]["seconds_left"]) == (2.0, 0.0)
    assert lines[3]["notice"] == "a notice"


def test_the_time_left_follows_the_rate_of_the_phase() -> None:
    out = io.StringIO()
    with ProgressView(Console(file=out), interval_s=0) as view:
        view.show(at(0, 50))
        view.show(at(10, 60))
    last = json.loads(out.getvalue().splitlines()[-1])
    assert (last["per_second"], last["seconds_left"]) == (1.0, 40.0)


def test_on_a_terminal_the_view_draws_bars() -> None:
    out = Terminal()
    console = Console(file=out, force_terminal=True, width=140, color_system=None)
    with ProgressView(console) as view:
        view.show(at(0, 0))
        view.show(at(5, 40))
        time.sleep(0.3)  # the bars are drawn ten times a second
        view.reporter("train").notice("half [way]")
        view.show(at(6, 1, phase="vision [2/4]", total=0))
        view.show(Event(time="", step="curate", phase="score", done=1, total=2))
    text = out.getvalue()
    for expected in ("align", "40/100", "8.0/s", "loss 0.25", "train: half [way]", "vision [2/4]", "curate", "1/2"):
        assert expected in text, expected
    assert "{" not in text


def test_json_is_written_on_a_terminal_when_asked() -> None:
    out = Terminal()
    with ProgressView(Console(file=out, force_terminal=True), format="json") as view:
        view.reporter("train").progress("align", 1, 2)
    assert json.loads(out.getvalue())["done"] == 1


def test_a_tee_passes_everything_on(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with EventLog(paths[0], "train") as one, EventLog(paths[1], "train") as two:
        tee = TeeReporter(one, two)
        tee.progress("align", 1, 2, {"loss": 1})
        tee.notice("hello")
    for path in paths:
        events = list(follow(path, lambda: True))
        assert [(event.done, event.notice) for event in events] == [(1, ""), (0, "hello")]

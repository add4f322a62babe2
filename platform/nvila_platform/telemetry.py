"""Logs, the event log of a run, and the view that draws it.

A step writes its progress as JSON lines into the run's event log; whoever watches the run, in this process or another,
follows that file. So the view never depends on how the step's process was started.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from nvila.progress import Reporter
from nvila_platform.artifacts import storage_errors, utc_now
from nvila_platform.settings import LogFormat

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

logger = logging.getLogger(__name__)

_OURS = ("nvila", "nvila_platform", "nvila_pipelines")
# They warn on import of kernels for hardware that is not there, and of their own deprecations.
_NOISY = ("torch.utils._pytree", "torchao")
_CONTEXT = ("run_id", "step", "rank", "request_id")
# What of training fits beside a bar: its name there, and how it is written. JSON lines hold everything.
_TRAINING: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", "{:.4g}".format),
    "tokens_per_second": ("tok/s", "{:,.0f}".format),
    "samples_per_second": ("samples/s", "{:,.1f}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "memory_gib": ("mem", "{:.2f} GiB".format),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of an event log: progress of a phase, or a notice."""

    time: str
    step: str
    phase: str = ""
    done: int = 0
    total: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    notice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; numbers that JSON cannot hold become null."""
        if self.notice:
            return {"time": self.time, "step": self.step, "notice": self.notice}
        metrics = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        return {
            "time": self.time,
            "step": self.step,
            "phase": self.phase,
            "done": self.done,
            "total": self.total,
            "metrics": metrics,
        }


def configure_logging(
    format: LogFormat = "auto",
    level: int | str = logging.INFO,
    *,
    context: Mapping[str, str] | None = None,
    stream: TextIO | None = None,
) -> None:
    """Send the log records of this process to standard error; for entry points only.

    When the host program has set up logging already, only the level of our loggers is set.

    Args:
        format: "text", "json" (one object a line), or "auto": text on a terminal.
        level: Level of our own loggers; other libraries log from WARNING on.
        context: Fields put on every record: run_id, step, rank.
        stream: Stands in for standard error.
    """
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    if root.handlers:
        return
    out = sys.stderr if stream is None else stream
    as_text = format == "text" or (format == "auto" and out.isatty())
    added = _Handler(out)
    added.setFormatter(_TextFormatter() if as_text else _JsonFormatter(dict(context or {})))
    root.addHandler(added)
    root.setLevel(logging.WARNING)


class EventLog:
    """A reporter that appends events to a file, which several processes may share.

    Args:
        path: The JSON-lines file, created when missing.
        step: Name put on every event.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path, step: str = "") -> None:
        self.step = step
        self._failed = False
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # With O_APPEND a line goes out in one write, so lines of several processes never mix.
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Append a progress event."""
        values = {name: float(value) for name, value in (metrics or {}).items()}
        self.append(Event(time=utc_now(), step=self.step, phase=phase, done=done, total=total, metrics=values))

    def notice(self, text: str) -> None:
        """Append a notice."""
        self.append(Event(time=utc_now(), step=self.step, notice=text))

    def append(self, event: Event) -> None:
        """Append any event; a write that fails is logged once and never stops the step."""
        line = json.dumps(event.to_dict(), ensure_ascii=False, separators=(",", ":")) + "\n"
        try:
            os.write(self._descriptor, line.encode())
        except OSError as e:
            if not self._failed:
                logger.warning("progress events cannot be written: %s", e)
            self._failed = True

    def close(self) -> None:
        """Close the file; closing twice is nothing to do."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def follow(path: Path, stop: Callable[[], bool], *, poll_s: float = 0.1, start: int = 0) -> Iterator[Event]:
    """Yield the events of a log as they are written.

    Args:
        path: May be missing at first.
        stop: Asked when nothing new is there; once it says True, what was written until then is still yielded.
        poll_s: Time between two looks at the file.
        start: Bytes of the file that are passed over.
    """
    offset, rest = start, b""
    stopping = False
    while True:
        chunk = _read_from(path, offset)
        offset += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            event = parse_event(line)
            if event is not None:
                yield event
        if chunk:
            continue
        if stopping:
            return
        # One more look after the stop: the last event may have come between the look and the question.
        stopping = stop()
        if not stopping:
            time.sleep(poll_s)


def parse_event(line: bytes | str) -> Event | None:
    """Parse one line of an event log; None when a crash left it broken."""
    try:
        raw = json.loads(line)
        metrics = {name: math.nan if value is None else float(value) for name, value in raw.pop("metrics", {}).items()}
        return Event(**raw, metrics=metrics)
    except (ValueError, TypeError, AttributeError):
        return None


class TeeReporter:
    """Passes every event on to several reporters."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Pass the progress on."""
        for reporter in self._reporters:
            reporter.progress(phase, done, total, metrics)

    def notice(self, text: str) -> None:
        """Pass the notice on."""
        for reporter in self._reporters:
            reporter.notice(text)


class ProgressView:
    """Draws events: bars on a terminal, JSON lines otherwise.

    Args:
        console: Where to draw; None means standard error.
        format: "json" writes JSON lines on a terminal too, "text" draws without one.
        interval_s: Least time between two JSON lines of one phase; its first and last event are always written.

    Example:
        >>> with ProgressView() as view:
        ...     view.reporter("train").progress("align", 1, 10)
    """

    def __init__(self, console: Console | None = None, *, format: LogFormat = "auto", interval_s: float = 1.0) -> None:
        from rich.console import Console

        self._console = console if console is not None else Console(stderr=True)
        self._interval_s = interval_s
        bars = format == "text" or (format == "auto" and self._console.is_terminal)
        self._progress = _bars(self._console) if bars else None
        self._clocks: dict[str, _Clock] = {}
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, event: Event) -> None:
        """Draw one event."""
        if self._progress is None:
            self._write(event)
        elif event.notice:
            self._progress.console.print(f"{event.step}: {event.notice}", markup=False, highlight=False)
        else:
            self._draw(self._progress, event)

    def reporter(self, step: str) -> Reporter:
        """Return a reporter for a step that runs in this process."""
        return _ViewReporter(self, step)

    def _draw(self, progress: Progress, event: Event) -> None:
        total = event.total or None
        task = self._tasks.get(event.step)
        clock = self._clocks.get(event.step)
        if task is None:
            task = self._tasks[event.step] = progress.add_task(event.step, total=total, phase="", rate="", metrics="")
        if clock is None or clock.phase != event.phase:
            clock = self._clocks[event.step] = _Clock(event)
            progress.reset(task, total=total)
        rate = clock.rate(event).get("per_second")
        shown, per_second = _shown(event.metrics), "" if rate is None else f"{rate:,.1f}/s"
        progress.update(task, completed=event.done, total=total, phase=event.phase, rate=per_second, metrics=shown)

    def _write(self, event: Event) -> None:
        record = event.to_dict()
        if not event.notice:
            clock = self._clocks.get(event.step)
            if clock is None or clock.phase != event.phase:
                clock = self._clocks[event.step] = _Clock(event)
            elif event.done < event.total and time.monotonic() - clock.written < self._interval_s:
                return
            clock.written = time.monotonic()
            record |= clock.rate(event)
        self._console.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._console.file.flush()


class _Clock:
    """Measures one phase of one step by the events' own times, so that a replayed log shows the same rates."""

    def __init__(self, first: Event) -> None:
        self.phase = first.phase
        self.written = 0.0
        self._start, self._done = _seconds(first), first.done

    def rate(self, event: Event) -> dict[str, float]:
        seconds, done = _seconds(event) - self._start, event.done - self._done
        if seconds <= 0 or done <= 0:
            return {}
        rate = done / seconds
        return {"per_second": round(rate, 3), "seconds_left": round(max(0, event.total - event.done) / rate, 1)}


class _ViewReporter:
    def __init__(self, view: ProgressView, step: str) -> None:
        self._view = view
        self._step = step

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        values = dict(metrics or {})
        self._view.show(Event(time=utc_now(), step=self._step, phase=phase, done=done, total=total, metrics=values))

    def notice(self, text: str) -> None:
        self._view.show(Event(time=utc_now(), step=self._step, notice=text))


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that a second configuration replaces the first."""


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S")


class _JsonFormatter(logging.Formatter):
    def __init__(self, context: Mapping[str, str]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._context,
        }
        fields |= {name: getattr(record, name) for name in _CONTEXT if hasattr(record, name)}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def _shown(metrics: Mapping[str, float]) -> str:
    if "tokens_per_second" not in metrics:
        return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    chosen = ((label, form(metrics[name])) for name, (label, form) in _TRAINING.items() if name in metrics)
    return "  ".join(f"{label} {text}" for label, text in chosen)


def _read_from(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as log:
            log.seek(offset)
            return log.read()
    except FileNotFoundError:
        return b""


def _seconds(event: Event) -> float:
    try:
        return datetime.fromisoformat(event.time).timestamp()
    except ValueError:
        return 0.0


def _bars(console: Console) -> Progress:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description:<9} {task.fields[phase]:<12}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]:>9}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[metrics]}", markup=False),
        console=console,
    )

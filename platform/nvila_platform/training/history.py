"""The history of a training run beside its outputs: how fast it was, what it used, how its gradients went.

Times differ from run to run while weights do not, so this is no output: the file's name begins with a dot and its bytes
are in no digest.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.training.observer import StepRecord
from nvila_platform.cost import summed
from nvila_platform.training.meter import StageMeter
from nvila_platform.training.sinks import BaseSink

logger = logging.getLogger(__name__)

HISTORY_FILE = ".history.jsonl"


class HistorySink(BaseSink):
    """Appends a line for a step now and then, for every skipped one and for the last one.

    Args:
        path: The file; what earlier attempts left in it stays.
        interval_s: Least time between two lines.
    """

    def __init__(self, path: Path, interval_s: float = 0.5) -> None:
        self.interval_s = interval_s
        self._attempt = time.time_ns()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def on_step(self, meter: StageMeter, record: StepRecord, values: Mapping[str, float]) -> None:
        """Write a line."""
        self._write(meter, record.step, {**values, **({"skipped": 1.0} if record.skipped else {})})

    def on_stage_end(self, meter: StageMeter) -> None:
        """Write what the stage used in the end."""
        self._write(meter, meter.start.steps, {})

    def close(self, failed: bool) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _write(self, meter: StageMeter, step: int, values: Mapping[str, float]) -> None:
        line = {
            "attempt": self._attempt,
            "stage": meter.start.stage,
            "step": step,
            "seconds": round(meter.elapsed_s, 3),
            "values": {name: float(f"{value:.6g}") for name, value in values.items()},
            "usage": meter.usage().metrics(),
        }
        os.write(self._descriptor, (json.dumps(line, separators=(",", ":")) + "\n").encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One line: the stage's step, the time that its attempts took until then, and what was measured."""

    step: int
    seconds: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageHistory:
    """One stage over all attempts.

    Args:
        points: In order of steps; where a later attempt repeated steps, its points stand.
        usage: What all attempts together used, as `Usage.metrics` names it; repeated work was paid for, too.
    """

    points: tuple[Point, ...]
    usage: Mapping[str, float]


def read_history(path: Path) -> dict[str, StageHistory]:
    """Read a history by stage, in the order of training; a missing file has no stages, a broken line is left out."""
    attempts: dict[str, dict[int, list[dict[str, Any]]]] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    for text in lines:
        try:
            line = json.loads(text)
            attempts.setdefault(str(line["stage"]), {}).setdefault(int(line["attempt"]), []).append(line)
        except (ValueError, KeyError, TypeError):
            logger.debug("%s holds a broken line: %.80r", path, text)
    return {stage: _joined(list(of_stage.values())) for stage, of_stage in attempts.items()}


def _joined(attempts: Sequence[Sequence[Mapping[str, Any]]]) -> StageHistory:
    points: list[Point] = []
    before = 0.0
    for lines in attempts:
        first = min(int(line["step"]) for line in lines)
        points = [point for point in points if point.step < first]
        points += [
            Point(step=int(line["step"]), seconds=before + float(line["seconds"]), values=line["values"])
            for line in lines
            if line["values"]
        ]
        before += float(lines[-1]["seconds"])
    return StageHistory(points=tuple(points), usage=summed(lines[-1]["usage"] for lines in attempts))

"""The file of metrics beside a trained model, and the progress line."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from nvila.progress import SILENT, Reporter
from nvila.training.observer import StageStart, StepRecord


@dataclass(slots=True)
class MetricsLog:
    """Appends one JSON line for every reported step and tells the reporter about every step.

    A step has one line, also when a run that was killed goes on from before it. Skipped steps have none: there is
    nothing to plot.

    Args:
        path: The file.
        every: A line for every so many steps, and one for the last.
        reporter: Receives progress with a smoothed loss, and notices.
    """

    path: Path
    every: int = 20
    reporter: Reporter = SILENT
    smooth_loss: float = field(default=math.nan)
    _tokens: int = 0
    _seconds: float = 0.0

    def on_stage_start(self, start: StageStart) -> None:
        """Forget the stage before, and the lines of steps that come again."""
        if start.first_step == 0:
            self.smooth_loss = math.nan
        self._tokens, self._seconds = 0, 0.0
        # Lines count steps from 0, so the first step of a resumed stage is one that comes again.
        drop_lines(self.path, start.stage, start.first_step)

    def on_step(self, record: StepRecord) -> None:
        """Write and report a step."""
        self._tokens += record.tokens
        self._seconds += record.seconds
        if not record.skipped:
            before = self.smooth_loss
            self.smooth_loss = record.loss if math.isnan(before) else 0.95 * before + 0.05 * record.loss
        shown = {
            "loss": round(self.smooth_loss, 5),
            "tokens_per_second": round(self._tokens / max(self._seconds, 1e-9)),
        }
        step, last = record.step - 1, record.step == record.steps
        if (step % self.every == 0 and not record.skipped) or (last and not math.isnan(self.smooth_loss)):
            line = {
                "stage": record.stage,
                "step": step,
                "loss": self.smooth_loss if record.skipped else record.loss,
                "loss_smooth": shown["loss"],
                "lr_scale": record.lr_scale,
                "tokens_per_second": shown["tokens_per_second"],
            }
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
        if not math.isnan(self.smooth_loss):
            self.reporter.progress(record.stage, record.step, record.steps, shown)

    def on_notice(self, text: str) -> None:
        """Report a line."""
        self.reporter.notice(text)

    def on_stage_end(self, stage: str) -> None:
        """Nothing is left to do."""


def drop_lines(path: Path, stage: str, first: int) -> None:
    """Remove the lines of a stage from a step on, and a last line that was cut while it was written.

    Args:
        path: JSON lines with `stage` and `step`; may be missing.
        stage: The stage.
        first: The first step whose lines go.
    """
    if not path.is_file():
        return
    kept = [text for text in path.read_text(encoding="utf-8").splitlines(True) if _stays(text, stage, first)]
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _stays(text: str, stage: str, first: int) -> bool:
    try:
        line = json.loads(text)
    except ValueError:
        return False
    return bool(line["stage"] != stage or line["step"] < first)

"""Whether a training stage is well: skipped steps, loss spikes, waiting for data."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from nvila.errors import NvilaError
from nvila.training.config import HealthConfig
from nvila.training.observer import StepRecord

# Steps that a loss is compared with, and how many of them are enough to know what is usual.
_LOSS_WINDOW, _ENOUGH_LOSSES = 64, 16
# The median distance from the median of a normal distribution is this share of its standard deviation.
_MEDIAN_DEVIATION = 0.6745
# Losses that hardly move would make a spike of every twitch.
_LEAST_SPREAD = 0.01
# Steps over which waiting for data is summed.
_STALL_WINDOW = 50


@dataclass(slots=True)
class Health:
    """Follows the steps of one stage.

    Args:
        config: Thresholds and budgets.
    """

    config: HealthConfig
    skipped: int = 0
    skipped_in_row: int = 0
    applied: int = 0
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=_LOSS_WINDOW))
    _seconds: list[float] = field(default_factory=list)
    _waits: list[float] = field(default_factory=list)

    def observe(self, record: StepRecord) -> list[str]:
        """Take a step into account.

        Returns:
            Notices, one line each.

        Raises:
            NvilaError: More steps were skipped than the configuration bears.
        """
        stalled = self._stall(record)
        if record.skipped:
            self.skipped += 1
            self.skipped_in_row += 1
            self._check_budget(record)
            return [*stalled, _skip_notice(record)]
        self.skipped_in_row = 0
        self.applied += 1
        return [*stalled, *self._spike(record)]

    def finish(self, stage: str) -> None:
        """Check the stage as a whole.

        Raises:
            NvilaError: Every step of it was skipped.
        """
        if self.skipped and not self.applied:
            raise NvilaError(f"stage '{stage}': every step was skipped, nothing was learned", _hint(stage))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed stage must know, in JSON form."""
        return {
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "applied": self.applied,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.skipped, self.skipped_in_row = state["skipped"], state["skipped_in_row"]
        self.applied = state["applied"]
        self._losses.extend(state["losses"])

    def _check_budget(self, record: StepRecord) -> None:
        for name, count in (("max_skipped_in_row", self.skipped_in_row), ("max_skipped", self.skipped)):
            limit = getattr(self.config, name)
            if count > limit:
                raise NvilaError(
                    f"stage '{record.stage}' step {record.step}: the loss is {record.loss} and the gradient norm "
                    f"{record.grad_norm}; {count} skipped steps are more than train.health.{name}={limit}",
                    _hint(record.stage),
                )

    def _spike(self, record: StepRecord) -> list[str]:
        found: list[str] = []
        threshold = self.config.spike_threshold
        if threshold is not None and len(self._losses) >= _ENOUGH_LOSSES:
            usual = median(self._losses)
            spread = median(abs(loss - usual) for loss in self._losses) / _MEDIAN_DEVIATION
            score = (record.loss - usual) / max(spread, _LEAST_SPREAD * abs(usual), 1e-12)
            if score > threshold:
                found = [
                    f"stage {record.stage} step {record.step}: the loss jumped to {record.loss:.4g}, {score:.0f} "
                    f"standard deviations above the {usual:.4g} of the steps before"
                ]
        self._losses.append(record.loss)
        return found

    def _stall(self, record: StepRecord) -> list[str]:
        self._seconds.append(record.seconds)
        self._waits.append(record.data_seconds)
        if len(self._seconds) < _STALL_WINDOW:
            return []
        share = sum(self._waits) / max(sum(self._seconds), 1e-9)
        self._seconds, self._waits = [], []
        if self.config.stall_share is None or share <= self.config.stall_share:
            return []
        return [
            f"stage {record.stage}: {share:.0%} of the last {_STALL_WINDOW} steps was spent waiting for data; "
            "use more loader workers or a faster disk"
        ]


def write_skipped(path: Path, record: StepRecord, ids: Sequence[str]) -> None:
    """Append the samples of a skipped step to a JSON lines file."""
    # Not finite numbers have no JSON form.
    line = {"stage": record.stage, "step": record.step, "loss": str(record.loss), "grad_norm": str(record.grad_norm)}
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line | {"ids": list(ids)}) + "\n")


def _skip_notice(record: StepRecord) -> str:
    return (
        f"stage {record.stage} step {record.step}: skipped, the loss is {record.loss:.4g} and the gradient norm "
        f"{record.grad_norm:.4g}; its samples are in skipped.jsonl"
    )


def _hint(stage: str) -> str:
    return f"look at the samples in skipped.jsonl, or lower stages.{stage}.lr"

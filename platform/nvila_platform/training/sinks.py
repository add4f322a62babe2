"""Where measurements of training go: the run's event log, and MLflow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from nvila.progress import Reporter
from nvila.training.observer import StepRecord
from nvila_platform.training.meter import StageMeter

if TYPE_CHECKING:
    from nvila_platform.tracking import Tracker

logger = logging.getLogger(__name__)

# The reader of a progress line measures the time left itself, and draws no line for a step's own loss.
_NOT_SHOWN = frozenset({"seconds_left", "loss_step"})


class StepSink(Protocol):
    """Takes measurements. One that raises is heard once and then left alone.

    Attributes:
        interval_s: Least time between two steps that it is told of; skipped and last steps always come.
    """

    interval_s: float

    def on_stage_start(self, meter: StageMeter) -> None:
        """A stage begins or goes on."""

    def on_step(self, meter: StageMeter, record: StepRecord, values: Mapping[str, float]) -> None:
        """A step ended; `values` is what `StageMeter.values` says now."""

    def on_notice(self, text: str) -> None:
        """Something is worth reading."""

    def on_stage_end(self, meter: StageMeter) -> None:
        """The stage has finished."""

    def close(self, failed: bool) -> None:
        """Training has ended."""


class BaseSink:
    """Does nothing; sinks override what concerns them."""

    interval_s = 0.0

    def on_stage_start(self, meter: StageMeter) -> None:
        """Ignore it."""

    def on_step(self, meter: StageMeter, record: StepRecord, values: Mapping[str, float]) -> None:
        """Ignore it."""

    def on_notice(self, text: str) -> None:
        """Ignore it."""

    def on_stage_end(self, meter: StageMeter) -> None:
        """Ignore it."""

    def close(self, failed: bool) -> None:
        """Ignore it."""


class ProgressSink(BaseSink):
    """Progress events, from which come the bars of a terminal, the JSON lines of a pod, and the metrics in MLflow.

    Notices are not repeated here: whoever trains has a reporter of its own for them.

    Args:
        reporter: Usually the run's event log.
        interval_s: Steps of milliseconds are thinned to what a person can read and a database can take.
    """

    def __init__(self, reporter: Reporter, interval_s: float = 0.2) -> None:
        self.interval_s = interval_s
        self._reporter = reporter

    def on_step(self, meter: StageMeter, record: StepRecord, values: Mapping[str, float]) -> None:
        """Report the step."""
        shown = {name: value for name, value in values.items() if name not in _NOT_SHOWN}
        self._reporter.progress(record.stage, record.step, record.steps, shown)

    def on_stage_end(self, meter: StageMeter) -> None:
        """Report what the stage used."""
        start = meter.start
        self._reporter.progress(start.stage, start.steps, start.steps, meter.usage().metrics())


class TrackingSink(BaseSink):
    """Every step into an MLflow run of this process's own.

    Args:
        tracker: Takes values without ever waiting for a server.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def on_stage_start(self, meter: StageMeter) -> None:
        """Note what is trained."""
        start = meter.start
        self._tracker.log_params(
            {start.stage: {"steps": start.steps, "parameters": start.parameters, "world_size": start.world_size}}
        )

    def on_step(self, meter: StageMeter, record: StepRecord, values: Mapping[str, float]) -> None:
        """Queue the values."""
        self._tracker.log_metrics({f"{record.stage}/{name}": value for name, value in values.items()}, record.step)

    def on_stage_end(self, meter: StageMeter) -> None:
        """Queue what the stage used."""
        start = meter.start
        used = {f"{start.stage}/{name}": value for name, value in meter.usage().metrics().items()}
        self._tracker.log_metrics(used, start.steps)

    def close(self, failed: bool) -> None:
        """End the run; what a dead server did not take stays on disk for the next tracker."""
        self._tracker.close("FAILED" if failed else "FINISHED")

"""What follows a tuning: its history, prices and speed, the tracking server, and signals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvila.progress import Reporter
    from nvila.training.interrupts import StopRequest
    from nvila.training.observer import StageObserver, StageStart, StepRecord
    from nvila_pipelines.tuning.preparing import Prepared
    from nvila_platform.settings import Settings
    from nvila_platform.tracking import Tracker

_TRACK_EVERY = 10


@contextmanager
def watching(
    prepared: Prepared, out: Path, settings: Settings, reporter: Reporter, tracker: Tracker
) -> Iterator[tuple[Sequence[StageObserver], StopRequest]]:
    """Give observers and the request to stop for one tuning."""
    from nvila.training.interrupts import watched_signals
    from nvila_platform.training import observe_training
    from nvila_platform.training.backup import backed_up

    config = prepared.tune.train_config(prepared.config, prepared.data.train.name)
    with (
        backed_up(settings, out, reporter.notice),
        observe_training(config, settings, out_dir=out, reporter=reporter) as observer,
        watched_signals() as stop,
    ):
        yield (observer, _Tracked(tracker)), stop


@contextmanager
def signals_only() -> Iterator[tuple[Sequence[StageObserver], StopRequest]]:
    """Give a process that is not the first one its request to stop; the first one speaks for all."""
    from nvila.training.interrupts import watched_signals

    with watched_signals() as stop:
        yield (), stop


class _Tracked:
    """Every tenth step into MLflow."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def on_stage_start(self, start: StageStart) -> None:
        self._tracker.log_params({"planned_steps": start.steps, "trained_parameters": start.parameters})

    def on_step(self, record: StepRecord) -> None:
        if record.step % _TRACK_EVERY == 0 or record.step == record.steps:
            values = {"loss": record.loss, "grad_norm": record.grad_norm, "lr_scale": record.lr_scale}
            self._tracker.log_metrics({f"tune/{name}": value for name, value in values.items()}, step=record.step)

    def on_notice(self, text: str) -> None:
        pass

    def on_stage_end(self, stage: str) -> None:
        pass

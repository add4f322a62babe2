"""The part of a tuning that takes long: the sweep over ratios and the run itself, here or in several processes."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila_pipelines.processes import run_watched
from nvila_pipelines.tuning.preparing import Prepared, tune_config
from nvila_pipelines.tuning.request import AUTO, TuneRequest
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila.progress import Reporter
    from nvila.tuning.ratio import RatioTrial
    from nvila.tuning.run import Tuned
    from nvila_platform.telemetry import ProgressView
    from nvila_platform.tracking import Tracker

SCRATCH = ".processes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training made.

    Args:
        prepared: The preparation, with the rates that were taken.
        tuned: The run.
        trials: Ratios that were tried; none where the ratio was given.
    """

    prepared: Prepared
    tuned: Tuned
    trials: list[RatioTrial]


def train(
    request: TuneRequest,
    prepared: Prepared,
    digest: str,
    out: Path,
    settings: Settings,
    reporter: Reporter,
    tracker: Tracker | None,
) -> Trained:
    """Try ratios if asked to, and tune; what is finished is read. Under torchrun every process calls it.

    Args:
        request: What is asked for.
        prepared: Data and settings.
        digest: Of the base.
        out: Where everything goes.
        settings: Of the platform.
        reporter: Receives progress; of the first process.
        tracker: Told losses; of the first process.
    """
    from nvila.tuning.ratio import best_trial
    from nvila.tuning.run import tune

    trials = _sweep(request, prepared, digest, out, reporter) if request.ratio == AUTO else []
    if trials:
        rates = tune_config(request, prepared.config, prepared.data, best_trial(trials).ratio).rates
        prepared = replace(prepared, tune=replace(prepared.tune, rates=rates))
    options: dict[str, Any] = {}
    if tracker is not None:
        options["on_loss"] = lambda found: tracker.log_metrics({"tune/held_out_loss": found.loss}, step=found.step)
    with _watching(prepared, out, settings, reporter, tracker) as (observers, stop):
        tuned = tune(
            prepared.tune,
            request.model,
            digest,
            prepared.data,
            out,
            merged=request.merge,
            device=request.device,
            reporter=reporter,
            observers=observers,
            stop=stop,
            **options,
        )
    return Trained(prepared=prepared, tuned=tuned, trials=trials)


def train_in_processes(
    request: TuneRequest,
    prepared: Prepared,
    digest: str,
    out: Path,
    settings: Settings,
    view: ProgressView,
    tracking: str,
) -> None:
    """Train in several processes of this machine, which leave what `train` then finds finished.

    Args:
        request: What is asked for.
        prepared: Data and settings.
        digest: Of the base.
        out: Where everything goes.
        settings: Of the platform.
        view: Draws what they report.
        tracking: The run in MLflow that theirs belongs to.

    Raises:
        InfrastructureError: They were asked to stop; the same command goes on.
        NvilaError: What the first process that failed raised.
    """
    from nvila.tuning.run import MODEL_FOLDER

    if (out / MODEL_FOLDER).is_dir():
        return
    scratch = out / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    # As it was planned here: memory that is free may be another amount when they look.
    fixed = replace(
        request,
        micro_batch_tokens=prepared.tune.micro_batch_tokens,
        gradient_checkpointing=prepared.tune.gradient_checkpointing,
    )
    events = scratch / "events.jsonl"
    fixed.save(scratch / "order.json", events=str(events), out=str(out), digest=digest, tracking=tracking)
    run_watched(
        "nvila_pipelines.tuning.work",
        scratch / "order.json",
        events=events,
        processes=request.processes,
        threads=max(1, (os.cpu_count() or 1) // request.processes),
        settings=settings,
        view=view,
    )


def ratio_text(trials: list[RatioTrial]) -> str:
    """Return a line about the ratio that was taken."""
    from nvila.tuning.ratio import best_trial

    best = best_trial(trials)
    return f"--lr-ratio auto: {best.ratio:g} has the lowest held-out loss, {best.loss:.4f}"


def _sweep(request: TuneRequest, prepared: Prepared, digest: str, out: Path, reporter: Reporter) -> list[RatioTrial]:
    from nvila.tuning.ratio import sweep_ratios

    return sweep_ratios(
        prepared.tune,
        lambda ratio: tune_config(request, prepared.config, prepared.data, ratio).rates,
        request.model,
        digest,
        prepared.data,
        out / ".sweep",
        device=request.device,
        reporter=reporter,
    )


def _watching(prepared: Prepared, out: Path, settings: Settings, reporter: Reporter, tracker: Tracker | None) -> Any:
    """Give observers and the request to stop; there is nothing to watch in a run that is finished."""
    from nvila.tuning.run import MODEL_FOLDER
    from nvila_pipelines.tuning.watching import signals_only, watching

    if (out / MODEL_FOLDER).is_dir():
        return nullcontext(((), None))
    if tracker is None:
        return signals_only()
    return watching(prepared, out, settings, reporter, tracker)

"""Which ratio of learning rates to take: a short run with each, measured on the held-out split (table 6)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nvila.errors import ConfigError
from nvila.progress import SILENT, PrefixedReporter, Reporter
from nvila.training.config import PartName
from nvila.training.processes import barrier, rank
from nvila.tuning.config import TuneConfig
from nvila.tuning.data import TuneData
from nvila.tuning.methods import RATIOS

# A trial is so much of the whole run, within bounds: enough for the rates to show, cheap enough to do four times.
_SHARE, _LEAST, _MOST = 0.25, 20, 500


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioTrial:
    """A short run with one ratio.

    Args:
        ratio: Rate of the language model over that of the tower.
        loss: Lowest held-out loss.
        steps: Steps of the run.
    """

    ratio: float
    loss: float
    steps: int


def sweep_ratios(
    config: TuneConfig,
    rates: Callable[[float], Mapping[PartName, float]],
    base: Path,
    digest: str,
    data: TuneData,
    directory: Path,
    *,
    ratios: Sequence[float] = RATIOS,
    device: str = "cpu",
    reporter: Reporter = SILENT,
) -> list[RatioTrial]:
    """Try every ratio for a short time; a finished trial is not done again.

    Args:
        config: The run to come.
        rates: Gives the rates of a ratio.
        base: Folder of the base.
        digest: Its digest.
        data: The data, with a held-out split.
        directory: Folder of the trials.
        ratios: What to try.
        device: Where to run.
        reporter: Receives progress.

    Raises:
        ConfigError: There is no held-out split, or the vision tower does not learn.
    """
    from nvila.tuning.run import tune

    if data.held_out is None:
        raise ConfigError("--lr-ratio auto needs a held-out split", "give --held-out a share above 0")
    if len(rates(1.0)) < 2 or "vision" not in rates(1.0):
        raise ConfigError(
            "--lr-ratio auto compares rates of the vision tower, which is frozen", "tune it, such as with --vision ln"
        )
    steps = _trial_steps(config, data)
    trials = []
    for number, ratio in enumerate(ratios):
        folder = directory / f"ratio-{ratio:g}"
        done = folder / "trial.json"
        if not done.is_file():
            trial_config = replace(
                config, rates=dict(rates(ratio)), steps=steps, eval_every=max(1, steps // 4), patience=None
            )
            tuned = tune(
                trial_config,
                base,
                digest,
                data,
                folder,
                device=device,
                reporter=PrefixedReporter(reporter, f"ratio {ratio:g} ({number + 1}/{len(ratios)})"),
            )
            assert tuned.best is not None
            trial = RatioTrial(ratio=ratio, loss=tuned.best.loss, steps=steps)
            if rank() == 0:
                done.write_text(json.dumps(asdict(trial)), encoding="utf-8")
                shutil.rmtree(tuned.directory)
            barrier()
        trials.append(RatioTrial(**json.loads(done.read_text(encoding="utf-8"))))
    return trials


def best_trial(trials: Sequence[RatioTrial]) -> RatioTrial:
    """Return the trial with the lowest loss; of equal ones the first."""
    return min(trials, key=lambda trial: trial.loss)


def _trial_steps(config: TuneConfig, data: TuneData) -> int:
    feed = data.feed(config)
    try:
        whole = config.steps or feed.steps_in(config.epochs)
    finally:
        feed.close()
    return min(whole, max(_LEAST, min(_MOST, round(_SHARE * whole))))

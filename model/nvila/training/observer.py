"""What a training stage tells about itself while it runs.

The loop measures; observers decide what becomes of it: a progress line, a metrics file, a tracking server, a scrape
endpoint. An observer is called between steps, so it must be quick and must never raise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStart:
    """A stage is about to train.

    Args:
        stage: Its name.
        steps: Optimizer steps it takes in all.
        first_step: Steps that are behind it already, more than 0 after a resume.
        parameters: Number of trained parameters.
        world_size: Processes that train together.
    """

    stage: str
    steps: int
    first_step: int
    parameters: int
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step, over all processes unless said otherwise.

    Args:
        stage: Name of the stage.
        step: Steps behind it, counted from 1.
        steps: Steps of the stage.
        loss: Mean over all supervised tokens of the step.
        grad_norm: Global norm before clipping; NaN where the backend does not tell.
        lr_scale: Share of every part's peak learning rate.
        tokens: Positions without padding.
        samples: Conversations.
        images: Tiles and frames that went through the vision tower.
        seconds: Wall time of the whole step on this process.
        data_seconds: How much of it was spent waiting for data.
        skipped: The step was thrown away because its loss or gradient was not finite.
    """

    stage: str
    step: int
    steps: int
    loss: float
    grad_norm: float
    lr_scale: float
    tokens: int
    samples: int
    images: int
    seconds: float
    data_seconds: float
    skipped: bool = False


class StageObserver(Protocol):
    """Follows the stages of a training run."""

    def on_stage_start(self, start: StageStart) -> None:
        """Take note of a stage that begins or goes on."""

    def on_step(self, record: StepRecord) -> None:
        """Take note of a finished step."""

    def on_notice(self, text: str) -> None:
        """Take note of one line worth reading: a skipped step, a loss spike, a fallback."""

    def on_stage_end(self, stage: str) -> None:
        """Take note of a stage that has finished."""

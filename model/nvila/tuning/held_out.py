"""The loss on held-out samples: measured while a model is tuned, to keep the best weights and to stop in time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nvila.data.collation import collate
from nvila.data.feeding import BatchFeed
from nvila.errors import NvilaError
from nvila.progress import SILENT, Reporter
from nvila.training.config import PrecisionConfig
from nvila.training.loop import model_inputs
from nvila.training.precision import autocast
from nvila.training.processes import barrier, rank, total

LOSSES_FILE = "held-out.jsonl"
BEST_FILE = ".best.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutLoss:
    """The loss after so many steps; a mean over all held-out tokens."""

    step: int
    loss: float


@torch.no_grad()
def held_out_loss(
    model: nn.Module, feed: BatchFeed, pad_token_id: int, precision: PrecisionConfig, *, flat: bool = False
) -> float:
    """Return the mean loss of all supervised tokens of one pass over held-out samples, the same on every process.

    Args:
        model: Is put into evaluation mode and back.
        feed: This process's share of the samples; stands at its beginning again afterwards.
        pad_token_id: Id at padded positions.
        precision: Of the forward pass.
        flat: Join the rows of a batch to one without padding, as training does.
    """
    device = next(model.parameters()).device
    training, start = model.training, feed.state_dict()
    summed = count = 0.0
    model.eval()
    try:
        for _ in range(feed.steps_in(1)):
            for rows in next(feed):
                batch = collate(rows, pad_token_id)
                if not batch.num_supervised:
                    continue
                inputs = model_inputs(batch, feed.tensors(batch.images, batch.videos), flat=flat)
                with autocast(precision, device.type):
                    loss = model(**{name: _on(device, value) for name, value in inputs.items()}).loss
                summed += float(loss) * batch.num_supervised
                count += batch.num_supervised
    finally:
        model.train(training)
        feed.load_state_dict(start)
    summed, count = total([summed, count])
    return summed / count if count else math.nan


@dataclass(slots=True, kw_only=True)
class EarlyStopping:
    """Keeps the best weights by held-out loss, and ends a stage that no longer gets better.

    What was measured stands in a file, so that an interrupted run goes on with it. All processes measure, the first one
    writes.

    Args:
        model: The model that is tuned.
        loss: Measures it.
        directory: Folder of the losses and of the best weights.
        every: Steps between two looks; there is always one at the end.
        patience: Looks without a better loss after which training ends; None never ends it.
        min_gain: How much lower a loss must be to count as better.
        notice: Told one line about every look.
    """

    model: nn.Module
    loss: Callable[[], float]
    directory: Path
    every: int
    patience: int | None = 3
    min_gain: float = 0.0
    reporter: Reporter = SILENT
    on_loss: Callable[[HeldOutLoss], None] = field(default=lambda found: None)
    found: list[HeldOutLoss] = field(init=False, default_factory=list)

    def begin(self, first_step: int) -> None:
        """Go on behind a step; a new run measures the base first."""
        self.found = [one for one in read_losses(self.directory) if one.step <= first_step]
        barrier()
        self._write()
        if not self.found:
            self._look(0)

    def after_step(self, step: int, steps: int) -> bool:
        """Measure if it is time; return whether training should end."""
        if step % self.every and step != steps:
            return False
        self._look(step)
        since = sum(1 for one in self.found if one.step > self.best.step)
        if self.patience is None or since < self.patience:
            return False
        if step < steps:
            self.reporter.notice(
                f"stopped early after step {step} of {steps}: the held-out loss was best at step {self.best.step}"
            )
        return True

    @property
    def best(self) -> HeldOutLoss:
        """The earliest of the lowest losses."""
        best = self.found[0]
        for one in self.found[1:]:
            if one.loss < best.loss - self.min_gain:
                best = one
        return best

    @torch.no_grad()
    def restore_best(self) -> HeldOutLoss:
        """Put the best weights back into the model."""
        barrier()
        stored = load_file(self.directory / BEST_FILE)
        for name, parameter in _trained(self.model).items():
            parameter.copy_(stored[name])
        return self.best

    def _look(self, step: int) -> None:
        value = self.loss()
        if not math.isfinite(value):
            raise NvilaError(f"the held-out loss after step {step} is {value}", "use lower learning rates")
        self.found.append(HeldOutLoss(step=step, loss=value))
        if self.best.step == step and rank() == 0:
            partial = self.directory / f"{BEST_FILE}.partial"
            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(self.model).items()}
            save_file(tensors, partial)
            os.replace(partial, self.directory / BEST_FILE)
        # After the weights: a best one whose weights are not there would be lost.
        self._write()
        self.on_loss(self.found[-1])

    def _write(self) -> None:
        if rank() != 0:
            return
        partial = self.directory / f".{LOSSES_FILE}.partial"
        partial.write_text(
            "".join(json.dumps({"step": one.step, "loss": one.loss}) + "\n" for one in self.found), encoding="utf-8"
        )
        os.replace(partial, self.directory / LOSSES_FILE)


def read_losses(directory: Path) -> list[HeldOutLoss]:
    """Return what was measured so far."""
    path = directory / LOSSES_FILE
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [HeldOutLoss(step=int(line["step"]), loss=float(line["loss"])) for line in lines]


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _on(device: torch.device, value: Tensor | int) -> Tensor | int:
    return value.to(device) if isinstance(value, Tensor) else value

"""The training loop of one stage."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvila.data.collation import PREFIX_SEGMENT, Batch, collate
from nvila.data.packing import flatten
from nvila.training.augmentation import random_shift
from nvila.training.batches import BatchSource, MicroBatch
from nvila.training.checkpoints import Checkpoints
from nvila.training.config import StageConfig, TrainConfig
from nvila.training.engine import StepOutcome, TrainEngine
from nvila.training.health import Health, write_skipped
from nvila.training.interrupts import StopRequest
from nvila.training.media import MediaTensors
from nvila.training.metrics import MetricsLog, drop_lines
from nvila.training.observer import StageObserver, StageStart, StepRecord
from nvila.training.processes import gathered, rank, total, world_size
from nvila.training.validation import Validator


@dataclass(slots=True, kw_only=True)
class StageLoop:
    """Trains one stage, from its beginning or from a checkpoint.

    Args:
        engine: Model and optimizer.
        batches: Gives the data.
        pixels: Gives the pixels of images and videos.
        stage: What to train.
        config: The run.
        pad_token_id: Id at padded positions.
        log: Metrics and progress; its smoothed loss is part of a checkpoint.
        observers: Told about every step, beside the log.
        checkpoints: Where the middle of the stage is saved; None never saves.
        stop: Ends the stage after the step that it came in.
        skipped_path: File that names the samples of skipped steps.
        flat: Join the rows of a batch to one without padding, whose samples the decoder tells apart by their lengths.
        validator: Looks at the model between steps, and may end the stage before its last step.
    """

    engine: TrainEngine
    batches: BatchSource
    pixels: MediaTensors
    stage: StageConfig
    config: TrainConfig
    pad_token_id: int
    log: MetricsLog
    observers: Sequence[StageObserver] = ()
    checkpoints: Checkpoints | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    skipped_path: Path | None = None
    flat: bool = False
    validator: Validator | None = None
    _health: Health = field(init=False)
    _noise: torch.Generator = field(init=False)
    _tokens: int = 0
    _samples: int = 0

    def __post_init__(self) -> None:
        self._health = Health(self.config.health)
        # Ranks see different images and move them differently.
        self._noise = torch.Generator().manual_seed(self.config.seed + 1_000_003 * rank())

    def run(self) -> bool:
        """Train to the end of the stage.

        Returns:
            Whether the processes were asked to stop during the very last step.

        Raises:
            NvilaError: Too many steps were skipped.
            InfrastructureError: The processes were asked to stop; the stage is saved as it is.
        """
        self.engine.module.train()
        first = self._begin()
        stopping = False
        for step in range(first, self.stage.steps):
            begin = time.monotonic()
            rows = next(self.batches)
            batches = [collate(one, self.pad_token_id) for one in rows]
            waited = time.monotonic() - begin
            loss, tiles, loading = self._accumulate(batches)
            lr_scale = learning_rate_scale(step, self.stage)
            outcome = self.engine.step(lr_scale)
            sums = total([loss, *_sizes(batches), float(tiles), float(self.stop.asked), float(self._due_by_time())])
            timing = (time.monotonic() - begin, waited + loading)
            record = self._record(step, sums, outcome, lr_scale, timing)
            self._follow(record, rows)
            stopping = sums[-2] > 0
            ended = self.validator is not None and self.validator.after_step(step + 1, self.stage.steps)
            last = ended or step + 1 == self.stage.steps
            if not last and (stopping or sums[-1] > 0 or self._due_by_step(step + 1)):
                saved = self._save(step + 1)
                if stopping:
                    self.stop.end(
                        f"after step {step + 1} of stage {self.stage.name}" + ("" if saved else ", not saved")
                    )
            if ended:
                break
        self._health.finish(self.stage.name)
        for observer in self._all():
            observer.on_stage_end(self.stage.name)
        return stopping

    def notice(self, text: str) -> None:
        """Tell all observers one line."""
        for observer in self._all():
            observer.on_notice(text)

    def _begin(self) -> int:
        """Go on from a checkpoint if there is one, tell the observers, and return the first step."""
        state = self.checkpoints.restore(self.engine, self._noise) if self.checkpoints else None
        first = 0
        if state is not None:
            first, self._tokens, self._samples = state["step"], state["tokens"], state["samples"]
            self.batches.load_state_dict(state["data"])
            self._health.load_state_dict(state["health"])
            self.log.smooth_loss = math.nan if state["smooth_loss"] is None else state["smooth_loss"]
        if rank() == 0 and self.skipped_path is not None:
            drop_lines(self.skipped_path, self.stage.name, first + 1)
        if self.validator is not None:
            self.validator.begin(first)
        trained = sum(_numel(p) for p in self.engine.module.parameters() if p.requires_grad)
        start = StageStart(
            stage=self.stage.name,
            steps=self.stage.steps,
            first_step=first,
            parameters=trained,
            world_size=world_size(),
        )
        for observer in self._all():
            observer.on_stage_start(start)
        return first

    def _accumulate(self, batches: Sequence[Batch]) -> tuple[float, int, float]:
        """Run forward and backward of all micro-batches.

        Every micro-batch counts as many times as it has supervised tokens, so that a step is the mean over all of them.

        Returns:
            This process's part of that mean, the tiles and frames that the tower saw, and the seconds spent on loading
            them.
        """
        counts = [batch.num_supervised for batch in batches]
        supervised = max(1.0, total([float(sum(counts))])[0])
        part, tiles, loading = 0.0, 0, 0.0
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            begin = time.monotonic()
            media = self.pixels.tensors(batch.images, batch.videos)
            if "pixel_values" in media:
                media["pixel_values"] = random_shift(media["pixel_values"], self.stage.max_shift_pixels, self._noise)
            loading += time.monotonic() - begin
            tiles += num_tiles(media)
            loss = self.engine(**model_inputs(batch, media, flat=self.flat)).loss
            value, weight = float(loss.detach()), count / supervised
            part += value * weight
            # The backend averages over processes. A loss that is no number must not end in a gradient that is one:
            # the gradient carries it to all processes, whose optimizers then leave the step out together.
            weight = weight * world_size() if math.isfinite(value) else math.nan
            self.engine.backward(loss * weight, last=number + 1 == len(batches))
        return part, tiles, loading

    def _record(
        self,
        step: int,
        sums: Sequence[float],
        outcome: StepOutcome,
        lr_scale: float,
        timing: tuple[float, float],
    ) -> StepRecord:
        loss, tokens, samples, images = sums[:4]
        self._tokens += int(tokens)
        self._samples += int(samples)
        return StepRecord(
            stage=self.stage.name,
            step=step + 1,
            steps=self.stage.steps,
            loss=loss,
            grad_norm=outcome.grad_norm,
            lr_scale=lr_scale,
            tokens=int(tokens),
            samples=int(samples),
            images=int(images),
            seconds=timing[0],
            data_seconds=timing[1],
            skipped=not outcome.applied,
        )

    def _follow(self, record: StepRecord, rows: Sequence[MicroBatch]) -> None:
        """Tell everybody who follows the stage about a step."""
        if record.skipped:
            ids = gathered([sample.id for micro in rows for row in micro for sample in row])
            if rank() == 0 and self.skipped_path is not None:
                write_skipped(self.skipped_path, record, [one for part in ids for one in part])
        for observer in self._all():
            observer.on_step(record)
        for text in self._health.observe(record):
            self.notice(text)

    def _save(self, step: int) -> bool:
        if self.checkpoints is None:
            return False
        smooth = self.log.smooth_loss
        state: dict[str, Any] = {
            "tokens": self._tokens,
            "samples": self._samples,
            "data": self.batches.state_dict(),
            "health": self._health.state_dict(),
            "smooth_loss": None if math.isnan(smooth) else smooth,
        }
        return self.checkpoints.save(step, self.engine, self._noise, state)

    def _due_by_time(self) -> bool:
        # Clocks differ; the first process's decides.
        return rank() == 0 and self.checkpoints is not None and self.checkpoints.due_by_time()

    def _due_by_step(self, step: int) -> bool:
        return self.checkpoints is not None and self.checkpoints.due_by_step(step)

    def _all(self) -> list[StageObserver]:
        return [self.log, *self.observers]


def learning_rate_scale(step: int, stage: StageConfig) -> float:
    """Share of the peak learning rate at a step counted from 0: linear warm-up, then decay to zero."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    progress = step / stage.steps
    decay = (1 + math.cos(math.pi * progress)) / 2 if stage.schedule == "cosine" else 1 - progress
    return warm * decay


def model_inputs(batch: Batch, media: Mapping[str, Tensor], *, flat: bool = False) -> dict[str, Tensor | int]:
    """Return the keyword arguments of a training forward pass.

    Args:
        batch: The texts.
        media: Pixels.
        flat: Join the rows to one without padding, if no samples share their beginning.
    """
    if flat and batch.num_samples and not bool((batch.segments == PREFIX_SEGMENT).any()):
        return {**media, **flatten(batch).model_inputs()}
    return {
        **media,
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
    }


def num_tiles(media: Mapping[str, Tensor]) -> int:
    """Return how many tiles and frames the tower sees."""
    return sum(media[name].flatten(0, -4).shape[0] for name in ("pixel_values", "pixel_values_videos") if name in media)


def _sizes(batches: Sequence[Batch]) -> list[float]:
    """Return tokens and samples of this process's batches."""
    return [
        float(sum(batch.num_tokens for batch in batches)),
        float(sum(batch.num_samples for batch in batches)),
    ]


def _numel(parameter: Any) -> int:
    # ZeRO 3 leaves a parameter empty and remembers its size.
    return int(getattr(parameter, "ds_numel", parameter.numel()))

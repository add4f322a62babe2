"""The training loop of one stage."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nvila.data.collation import Batch, collate
from nvila.data.conversation import Encoded
from nvila.errors import NvilaError
from nvila.progress import SILENT, Reporter
from nvila.training.augmentation import random_shift
from nvila.training.config import StageConfig, TrainConfig
from nvila.training.engine import TrainEngine
from nvila.training.media import MediaTensors
from nvila.training.observer import StageObserver, StepRecord
from nvila.training.precision import autocast


@dataclass(slots=True)
class MetricsLog:
    """Appends one JSON line for every reported step and keeps a smoothed loss for the progress line."""

    path: Path
    every: int = 20
    _smooth: float = field(default=math.nan)

    def start(self) -> None:
        """Forget the smoothed loss of the stage before."""
        self._smooth = math.nan

    def add(
        self, stage: str, step: int, loss: float, lr_scale: float, tokens: int, seconds: float, *, last: bool = False
    ) -> dict[str, float]:
        """Record a step and return the metrics worth showing."""
        self._smooth = loss if math.isnan(self._smooth) else 0.95 * self._smooth + 0.05 * loss
        metrics = {"loss": round(self._smooth, 5), "tokens_per_second": round(tokens / max(seconds, 1e-9))}
        if step % self.every == 0 or last:
            line = {"stage": stage, "step": step, "loss": loss, "loss_smooth": metrics["loss"], "lr_scale": lr_scale}
            line["tokens_per_second"] = metrics["tokens_per_second"]
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
        return metrics


def learning_rate_scale(step: int, stage: StageConfig) -> float:
    """Share of the peak learning rate at a step counted from 0: linear warm-up, then decay to zero."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    progress = step / stage.steps
    decay = (1 + math.cos(math.pi * progress)) / 2 if stage.schedule == "cosine" else 1 - progress
    return warm * decay


def run_stage(
    engine: TrainEngine,
    batches: Iterator[list[list[Encoded]]],
    pixels: MediaTensors,
    stage: StageConfig,
    config: TrainConfig,
    *,
    pad_token_id: int,
    log: MetricsLog,
    reporter: Reporter = SILENT,
    observers: Sequence[StageObserver] = (),
) -> None:
    """Train for the steps of one stage.

    Raises:
        NvilaError: The loss became NaN or infinite; raised before the optimizer could spread it.
    """
    engine.module.train()
    log.start()
    # Ranks see different images and move them differently.
    noise = torch.Generator().manual_seed(config.seed + 1_000_003 * int(os.environ.get("RANK", "0")))
    started, tokens = time.monotonic(), 0
    for step in range(stage.steps):
        began = time.monotonic()
        batch = collate(next(batches), pad_token_id)
        media = pixels.tensors(batch.images, batch.videos)
        if "pixel_values" in media:
            media["pixel_values"] = random_shift(media["pixel_values"], stage.max_shift_pixels, noise)
        data_seconds = time.monotonic() - began
        with autocast(config.precision, batch.input_ids.device.type):
            loss = engine(**model_inputs(batch, media)).loss
        scale = global_token_weight(batch)
        value = check_finite(loss, stage.name, step)
        engine.backward(loss * scale)
        lr_scale = learning_rate_scale(step, stage)
        engine.step(lr_scale)
        tokens += batch.num_tokens
        metrics = log.add(
            stage.name, step, value, lr_scale, tokens, time.monotonic() - started, last=step + 1 == stage.steps
        )
        reporter.progress(stage.name, step + 1, stage.steps, metrics)
        # Every process takes part in the sums, whether it has observers or not.
        tokens_now, samples, images = over_all_processes(batch.num_tokens, batch.num_samples, num_tiles(media))
        record = StepRecord(
            stage=stage.name,
            step=step + 1,
            steps=stage.steps,
            loss=value,
            grad_norm=math.nan,
            lr_scale=lr_scale,
            tokens=tokens_now,
            samples=samples,
            images=images,
            seconds=time.monotonic() - began,
            data_seconds=data_seconds,
        )
        for observer in observers:
            observer.on_step(record)


def num_tiles(media: dict[str, Tensor]) -> int:
    """Return how many tiles and frames the tower sees."""
    return sum(media[name].flatten(0, -4).shape[0] for name in ("pixel_values", "pixel_values_videos") if name in media)


def model_inputs(batch: Batch, media: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the keyword arguments of a training forward pass."""
    return media | {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
    }


def global_token_weight(batch: Batch) -> float:
    """Weight that makes the mean over processes the mean over all supervised tokens of the step."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 1.0
    count = torch.tensor([float(batch.num_supervised)])
    torch.distributed.all_reduce(count)
    return batch.num_supervised * world / float(count)


def over_all_processes(*counts: int) -> tuple[int, ...]:
    """Sum counts over all processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return counts
    total = torch.tensor(counts, dtype=torch.int64)
    torch.distributed.all_reduce(total)
    return tuple(int(count) for count in total)


def check_finite(loss: Tensor, stage: str, step: int) -> float:
    """Return the loss as a number.

    Raises:
        NvilaError: It is NaN or infinite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NvilaError(f"stage '{stage}' step {step}: the loss is {value}", f"lower stages.{stage}.lr")
    return value

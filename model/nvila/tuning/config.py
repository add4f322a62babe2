"""What a tuning run is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from nvila.configuration import NVILAConfig
from nvila.errors import ConfigError
from nvila.training.config import (
    Attention,
    CheckpointConfig,
    ModelConfig,
    PartName,
    PrecisionConfig,
    StageConfig,
    Tiling,
    TrainConfig,
)
from nvila.tuning.methods import TuneMethod

STAGE = "tune"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """A tuning run.

    Args:
        method: What is learned.
        rates: Peak learning rate of every part that learns.
        batch_tokens: Positions of a step, the work on tiles included.
        micro_batch_tokens: Positions of one forward pass.
        max_length: Longest sample in positions.
        epochs: Passes over the data.
        steps: Optimizer steps instead; 0 takes as many as `epochs` need.
        warmup_ratio: Share of the steps.
        samples_per_image: At most this many samples of an image share a row, and one encoding of the image.
        max_bad: Largest share of samples that may be unusable.
        eval_every: Steps between two looks at the held-out split; 0 looks ten times.
        patience: Looks without a better loss after which tuning ends; None never does.
        precision: `fp32` or `bf16`; with bf16 what does not learn is kept in it.
        attention: Attention implementation.
        gradient_checkpointing: Compute activations again in the backward pass.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Clipping threshold.
        seed: Of LoRA matrices, the order of the data, and dropout.
        checkpoints: When the middle of the run is saved.
    """

    method: TuneMethod
    rates: Mapping[PartName, float]
    batch_tokens: int
    micro_batch_tokens: int
    max_length: int
    epochs: float = 3.0
    steps: int = 0
    warmup_ratio: float = 0.03
    samples_per_image: int = 1
    max_bad: float = 0.01
    eval_every: int = 0
    patience: int | None = 3
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    attention: Attention = "sdpa"
    gradient_checkpointing: bool = False
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if set(self.rates) != set(self.method.parts):
            raise ConfigError(
                f"rates are given for {', '.join(self.rates) or 'nothing'}, but {', '.join(self.method.parts)} learn",
                "give each part that learns its rate",
            )
        if self.precision.name == "fp8":
            raise ConfigError("precision is fp8", "tune in bf16 or fp32")
        if self.epochs <= 0 and not self.steps:
            raise ConfigError(f"epochs is {self.epochs}", "use more than 0")

    def stage(self, data: str) -> StageConfig:
        """Return the run as a stage of the training loop.

        Args:
            data: Name of the data.
        """
        return StageConfig(
            name=STAGE,
            data=data,
            lr=dict(self.rates),
            steps=self.steps,
            epochs=None if self.steps else self.epochs,
            warmup_ratio=self.warmup_ratio,
            schedule="cosine",
            batch_tokens=self.batch_tokens,
            micro_batch_tokens=self.micro_batch_tokens,
            samples_per_image=self.samples_per_image,
            max_bad=self.max_bad,
            max_length=self.max_length,
        )

    def train_config(self, model: NVILAConfig, data: str) -> TrainConfig:
        """Return the run in the terms of the training loop.

        Args:
            model: Configuration of the base.
            data: Name of the data.
        """
        return TrainConfig(
            model=described(model, self.max_length),
            stages=(self.stage(data),),
            precision=self.precision,
            backend="torch",
            attention=self.attention,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
            gradient_checkpointing=self.gradient_checkpointing,
            checkpoints=self.checkpoints,
        )


def described(model: NVILAConfig, max_length: int) -> ModelConfig:
    """Return a model's configuration in the terms of a recipe."""
    raw: dict[str, Any] = model.to_dict()
    return ModelConfig(
        vision=raw["vision_config"],
        language=raw["text_config"],
        projector=model.mm_projector_type,
        select_layer=model.mm_vision_select_layer,
        max_length=max_length,
        tiling=cast("Tiling", model.image_aspect_ratio),
        min_tiles=model.min_tiles,
        max_tiles=model.max_tiles,
        s2_scales=tuple(model.s2_scales),
        frames=model.num_video_frames,
        pool_sizes=tuple((int(t), int(h), int(w)) for t, h, w in model.video_pool_sizes),
        time_tokens=model.num_time_tokens,
    )

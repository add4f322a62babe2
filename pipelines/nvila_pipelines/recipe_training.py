"""The sections of a recipe about training: stages, what FP8 means, and the run around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from nvila.training.config import (
    PARTS,
    Attention,
    CheckpointConfig,
    Fp8Backend,
    Fp8Config,
    Fp8Format,
    HealthConfig,
    Offload,
    OptimizerName,
    PartName,
    Precision,
    Schedule,
    StageConfig,
    Tiling,
)
from nvila_pipelines.recipe_fields import (
    Count,
    CountOrZero,
    LearningRate,
    Moment,
    PoolSizes,
    Ratio,
    Section,
    Share,
    StageName,
    rule,
)


class LearningRates(Section):
    """Peak learning rate of every trained part; a part without one stays frozen."""

    vision: LearningRate | None = None
    projector: LearningRate | None = None
    language: LearningRate | None = None

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not self.rates():
            raise rule("", "names no part, nothing would be trained", f"name one of {', '.join(PARTS)}")
        return self

    def rates(self) -> dict[PartName, float]:
        """Return the trained parts."""
        given: dict[PartName, float | None] = {
            "vision": self.vision,
            "projector": self.projector,
            "language": self.language,
        }
        return {part: rate for part, rate in given.items() if rate is not None}


class StageSection(Section):
    """One training stage."""

    # Data of the run (captions, selected, text, clips), or a mixture of `data.registry`; null: still to be named.
    data: Annotated[str, Field(min_length=1)] | None = None
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    # Fixes which parts learn, so that a learning rate given to another one is a mistake; None: those with a rate.
    trains: Annotated[tuple[PartName, ...], Field(strict=False, min_length=1)] | None = None
    lr: LearningRates
    images_per_step: Count
    samples_per_image: Count = 1
    warmup_steps: CountOrZero | None = None
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    # "Schedule" is a Literal of nvila: the names live there.
    schedule: Schedule
    max_shift_pixels: CountOrZero = 0
    tiling: Tiling | None = None
    max_length: Count | None = None
    frames: Count | None = None
    pool_sizes: PoolSizes | None = None
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Ratio | None = None
    attention: Attention | None = None

    @model_validator(mode="after")
    def _has_a_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            given = "neither steps nor epochs" if self.steps is None else "both steps and epochs"
            raise rule("", f"has {given}", "give one of them, and null for the other")
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise rule(
                "warmup_ratio", f"and warmup_steps {self.warmup_steps} are both given", "set one of them to null"
            )
        if self.steps is not None and (self.warmup_steps or 0) >= self.steps:
            raise rule(
                "warmup_steps",
                f"is {self.warmup_steps}, which leaves none of the {self.steps} steps at full rate",
                "use fewer warmup_steps",
            )
        return self

    @model_validator(mode="after")
    def _freezes(self) -> Self:
        rates = self.lr.rates()
        for part in PARTS if self.trains is not None else ():
            if part in rates and part not in (self.trains or ()):
                raise rule(
                    f"lr.{part}",
                    f"is {rates[part]:g}, but trains leaves {part} frozen",
                    f"add {part} to trains, or null",
                )
            if part in (self.trains or ()) and part not in rates:
                raise rule(f"lr.{part}", f"is missing, but trains names {part}", "give it a rate")
        return self

    def to_config(self, name: str) -> StageConfig:
        """Return the form that the training loop takes."""
        values: dict[str, Any] = self.model_dump(exclude={"lr", "trains"})
        for field in ("steps", "warmup_steps", "warmup_ratio"):
            values[field] = values[field] or 0
        return StageConfig(name=name, lr=self.lr.rates(), **values | {"data": self.data or ""})


Stages = Annotated[dict[StageName, StageSection], Field(min_length=1)]


def stage_configs(stages: Mapping[str, StageSection]) -> tuple[StageConfig, ...]:
    """Return stages, in order, in the form that the training loop takes."""
    return tuple(stage.to_config(name) for name, stage in stages.items())


class Fp8Section(Section):
    """What precision fp8 means; see `nvila.training.config.Fp8Config`."""

    backend: Fp8Backend = "auto"
    min_features: Count = 3584
    skip: tuple[str, ...] = Field(default=(), strict=False)
    forward: Fp8Format = "e4m3"
    backward: Fp8Format = "e5m2"
    group_size: Count | None = None
    save_activations: bool = False
    activation_group_size: Count = 16

    def to_config(self) -> Fp8Config:
        """Return the form that the training loop takes."""
        return Fp8Config(**self.model_dump())


class CheckpointsSection(Section):
    """When the middle of a stage is saved; see `nvila.training.config.CheckpointConfig`."""

    every_steps: Count | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    keep: Count = 2

    def to_config(self) -> CheckpointConfig:
        """Return the form that the training loop takes."""
        return CheckpointConfig(**self.model_dump())


class HealthSection(Section):
    """What a run bears before it stops; see `nvila.training.config.HealthConfig`."""

    max_skipped_in_row: CountOrZero = 3
    max_skipped: CountOrZero = 20
    spike_threshold: Annotated[float, Field(gt=0)] | None = 10.0
    stall_share: Share | None = 0.5

    def to_config(self) -> HealthConfig:
        """Return the form that the training loop takes."""
        return HealthConfig(**self.model_dump())


class TrainSection(Section):
    """The training run."""

    precision: Precision
    fp8: Fp8Section = Fp8Section()
    backend: Literal["deepspeed", "torch"]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    attention: Attention
    optimizer: OptimizerName = "adamw"
    num_processes: Count
    num_threads: Count | None = None
    # YAML has lists where we have pairs.
    betas: Annotated[tuple[Moment, Moment], Field(strict=False)]
    weight_decay: Ratio
    max_grad_norm: Annotated[float, Field(gt=0)]
    offload: Offload = "none"
    gradient_checkpointing: bool = False
    checkpoints: CheckpointsSection = CheckpointsSection()
    health: HealthSection = HealthSection()
    stages: Stages

    @model_validator(mode="after")
    def _distributes(self) -> Self:
        if self.backend == "torch" and self.num_processes > 1:
            raise rule(
                "backend", f"is torch, one process, but num_processes is {self.num_processes}", "use backend deepspeed"
            )
        if self.offload != "none" and (self.backend == "torch" or self.zero_stage == 0):
            raise rule(
                "offload",
                f"is {self.offload}, which backend {self.backend} with zero_stage {self.zero_stage} cannot do",
                "use backend deepspeed with zero_stage 1 or higher",
            )
        for name, stage in self.stages.items():
            if advice := batch_advice(stage.images_per_step, self.num_processes):
                raise rule(
                    f"stages.{name}.images_per_step",
                    f"is {stage.images_per_step} and cannot be dealt to {self.num_processes} processes",
                    advice,
                )
        return self


def batch_advice(batch: int, processes: int) -> str:
    """Return which batch or number of processes would do, or nothing when these do.

    Example:
        >>> batch_advice(10, 4)
        'use 8 or 12, or 5 processes'
    """
    if batch % processes == 0:
        return ""
    lower, upper = batch - batch % processes, batch - batch % processes + processes
    fewer = max(count for count in range(1, processes) if batch % count == 0)
    more = next((count for count in range(processes + 1, batch + 1) if batch % count == 0), fewer)
    near = more if more - processes < processes - fewer else fewer
    batches = f"{lower} or {upper}" if lower else str(upper)
    return f"use {batches}, or {near} process{'es' if near > 1 else ''}"

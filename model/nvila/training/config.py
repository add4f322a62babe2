"""What a training run is made of. Plain frozen values: the text of a recipe is checked above and converted once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from nvila.errors import ConfigError

PartName = Literal["vision", "projector", "language"]
PARTS: tuple[PartName, ...] = ("vision", "projector", "language")
Precision = Literal["fp32", "bf16", "fp8"]
Schedule = Literal["cosine", "linear"]
Attention = Literal["eager", "sdpa"]
OptimizerName = Literal["adamw", "fp8_adamw"]
Fp8Backend = Literal["auto", "emulated", "torchao", "transformer_engine"]
Fp8Format = Literal["e4m3", "e5m2"]
Offload = Literal["none", "optimizer"]
Tiling = Literal["resize", "pad", "dynamic", "dynamic_s2"]
PoolSize = tuple[int, int, int]
SINGLE_TILE: Tiling = "resize"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModels:
    """Pretrained parts that a model starts from, instead of new weights.

    Args:
        vision: Folder or Hub id of a SigLIP-style vision tower.
        language: Folder or Hub id of a causal language model, with its tokenizer.
    """

    vision: str
    language: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The parts of a new model.

    Args:
        vision: Configuration of the vision tower (`model_type` and its fields).
        language: Configuration of the language model; the vocabulary size follows the tokenizer.
        projector: Projector variant.
        select_layer: Hidden state of the tower that feeds the projector.
        max_length: Longest conversation in tokens.
        tiling: How an image becomes tiles, a name in `nvila.vision.tiling.TILINGS`.
        min_tiles: Fewest tiles that `dynamic` cuts.
        max_tiles: Most tiles that `dynamic` cuts, and `dynamic_s2` at its last scale.
        s2_scales: Sides in pixels of the scales of `dynamic_s2`; empty for 1, 2 and 3 times the tower's image size.
        frames: Frames taken of a video.
        pool_sizes: Temporal, vertical and horizontal pooling of video tokens, one triple a level.
        time_tokens: Tokens that stand for points in time; 0 for none.
        base: Pretrained parts; None starts from new weights.
    """

    vision: Mapping[str, Any]
    language: Mapping[str, Any]
    projector: str
    select_layer: int
    max_length: int
    tiling: Tiling = SINGLE_TILE
    min_tiles: int = 1
    max_tiles: int = 12
    s2_scales: tuple[int, ...] = ()
    frames: int = 8
    pool_sizes: tuple[PoolSize, ...] = ((1, 1, 1),)
    time_tokens: int = 0
    base: BaseModels | None = None

    def media_fields(self) -> dict[str, Any]:
        """Return the fields of `NVILAConfig` that say how images and videos are looked at."""
        return {
            "image_aspect_ratio": self.tiling,
            "min_tiles": self.min_tiles,
            "max_tiles": self.max_tiles,
            "s2_scales": list(self.s2_scales),
            "num_video_frames": self.frames,
            "video_pool_sizes": [list(size) for size in self.pool_sizes],
            "num_time_tokens": self.time_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One training stage (paper, table 8).

    Args:
        name: Folder and metric prefix of the stage.
        data: Which data set of the run feeds it.
        steps: Optimizer steps; 0 takes as many as `epochs` need.
        lr: Peak learning rate of every trained part; a part that is not named stays frozen.
        images_per_step: Rows of a batch over all processes; a row is an image with its samples.
        samples_per_image: At most this many samples of an image go into one row.
        warmup_steps: Linear warm-up; 0 with a `warmup_ratio` takes that share of the steps.
        schedule: Decay after the warm-up, to zero.
        max_shift_pixels: Random translation of the image, the same for all its samples; 0 turns it off.
        epochs: Passes over the data, instead of `steps`.
        warmup_ratio: Share of the steps, instead of `warmup_steps`.
        tiling: `resize` for one tile an image; None cuts images as the model does.
        max_length: Longest conversation in tokens; None takes the model's.
        frames: Frames taken of a video, from this stage on; None keeps what the model has.
        pool_sizes: Pooling of video tokens, likewise.
        max_grad_norm: Clipping threshold; None takes the run's, as for the two below.
        weight_decay: Decoupled weight decay.
        attention: Attention implementation.
    """

    name: str
    data: str
    steps: int = 0
    lr: Mapping[PartName, float]
    images_per_step: int
    samples_per_image: int
    warmup_steps: int = 0
    schedule: Schedule
    max_shift_pixels: int = 0
    epochs: float | None = None
    warmup_ratio: float = 0.0
    tiling: Tiling | None = None
    max_length: int | None = None
    frames: int | None = None
    pool_sizes: tuple[PoolSize, ...] | None = None
    max_grad_norm: float | None = None
    weight_decay: float | None = None
    attention: Attention | None = None

    def __post_init__(self) -> None:
        unknown = set(self.lr) - set(PARTS)
        if unknown or not self.lr:
            raise ConfigError(
                f"stages.{self.name}.lr names {sorted(unknown) or 'no part'}", f"parts are {', '.join(PARTS)}"
            )
        if not self.steps and self.epochs is None:
            raise ConfigError(f"stages.{self.name} has no length", "give steps or epochs")

    def resolved(self, rows: int) -> StageConfig:
        """Return the stage with its steps and its warm-up as numbers.

        Args:
            rows: Images with their samples, or single samples, that one pass over the data has.
        """
        steps = self.steps or max(1, round((self.epochs or 0) * rows / self.images_per_step))
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * steps)
        return replace(self, steps=steps, warmup_steps=warmup, epochs=None, warmup_ratio=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Config:
    """What precision fp8 means.

    Args:
        backend: `auto` takes what the machine has: Transformer Engine, torchao, else the emulation.
        min_features: Linear layers with a smaller side are left alone, as the FP8 gain is lost on them.
        skip: Name patterns (`*.down_proj`) below the language model of layers that are left alone too.
        forward: Format of inputs and weights. The emulation alone takes other formats than the defaults.
        backward: Format of output gradients.
        group_size: Elements of the last axis that share a scale; None is one scale a tensor. Emulation only.
        save_activations: Keep in FP8 what the decoder's layers save for the backward pass.
        activation_group_size: Elements that share a scale in saved activations that enter no matrix product.
    """

    backend: Fp8Backend = "auto"
    min_features: int = 3584
    skip: tuple[str, ...] = ()
    forward: Fp8Format = "e4m3"
    backward: Fp8Format = "e5m2"
    group_size: int | None = None
    save_activations: bool = False
    activation_group_size: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """How matrix products are computed.

    Args:
        name: fp32, bf16, or fp8.
        fp8: What fp8 means; without meaning for the others.
    """

    name: Precision = "fp32"
    fp8: Fp8Config = field(default_factory=Fp8Config)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When the middle of a stage is saved; a stage that is shorter than the interval writes nothing.

    Args:
        every_steps: Save after so many steps; None never does.
        every_minutes: Save when so much time has passed since the last save or the start; None never does.
        keep: How many to keep; the one before the newest is what a damaged newest falls back to.
    """

    every_steps: int | None = None
    every_minutes: float | None = 10.0
    keep: int = 2

    def __post_init__(self) -> None:
        for name, value, least in (("every_steps", self.every_steps, 1), ("keep", self.keep, 1)):
            if value is not None and value < least:
                raise ConfigError(f"train.checkpoints.{name} is {value}", f"use {least} or more")
        if self.every_minutes is not None and self.every_minutes <= 0:
            raise ConfigError(f"train.checkpoints.every_minutes is {self.every_minutes}", "use more than 0, or null")


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """What a training run bears before it stops or says something.

    Args:
        max_skipped_in_row: Steps without a finite loss and gradient that may follow each other.
        max_skipped: Such steps of a stage in all.
        spike_threshold: A loss so many robust standard deviations above the running median is told; None tells none.
        stall_share: Share of the time of recent steps spent waiting for data from which on it is told; None tells none.
    """

    max_skipped_in_row: int = 3
    max_skipped: int = 20
    spike_threshold: float | None = 10.0
    stall_share: float | None = 0.5

    def __post_init__(self) -> None:
        for name in ("max_skipped_in_row", "max_skipped"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.health.{name} is {getattr(self, name)}", "use 0 or more")
        if self.spike_threshold is not None and self.spike_threshold <= 0:
            raise ConfigError(f"train.health.spike_threshold is {self.spike_threshold}", "use more than 0, or null")
        if self.stall_share is not None and not 0 < self.stall_share <= 1:
            raise ConfigError(f"train.health.stall_share is {self.stall_share}", "use a share from 0 to 1, or null")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A whole training run.

    Args:
        model: Parts of the model.
        stages: Stages in order; each starts from the weights of the one before.
        precision: Precision of the language model's linear layers.
        backend: `deepspeed`, or `torch` for a single process without it.
        zero_stage: DeepSpeed ZeRO stage.
        attention: Attention implementation of both towers; on CPU `eager` is the faster one for short sequences.
        optimizer: `adamw`, or `fp8_adamw` with moments in FP8 (a fourth of their memory).
        betas: AdamW moments.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Clipping threshold of the global gradient norm.
        seed: Seeds initialisation, sampling and augmentation.
        offload: `optimizer` keeps its state and its work in main memory (DeepSpeed ZeRO 1 and higher).
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        checkpoints: When the middle of a stage is saved.
        health: What a run bears before it stops.
    """

    model: ModelConfig
    stages: tuple[StageConfig, ...]
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    backend: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: int = 1
    attention: Attention = "sdpa"
    optimizer: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    offload: Offload = "none"
    gradient_checkpointing: bool = False
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        if self.offload != "none" and (self.backend != "deepspeed" or self.zero_stage == 0):
            raise ConfigError(
                f"train.offload={self.offload} needs DeepSpeed and ZeRO, but train.backend is {self.backend} and "
                f"train.zero_stage {self.zero_stage}",
                "use train.backend=deepspeed train.zero_stage=2, or train.offload=none",
            )
        names = [stage.name for stage in self.stages]
        if not names:
            raise ConfigError("train.stages has no stage", "name at least one")
        # Metrics are kept by stage name, so a second stage of that name would take the lines of the first.
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"train.stages has two stages named '{twice[0]}'", "give every stage its own name")

        for stage in self.stages:
            _check_tiling(stage, self.model)

    def for_stage(self, stage: StageConfig) -> TrainConfig:
        """Return the run as a stage sees it: what the stage sets itself replaces the run's own value."""
        own = {name: getattr(stage, name) for name in ("max_grad_norm", "weight_decay", "attention")}
        return replace(self, **{name: value for name, value in own.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that the training process reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TrainConfig:
        """Rebuild what `to_dict` returned."""
        values = dict(raw)
        model = values["model"]
        base = None if model["base"] is None else BaseModels(**model["base"])
        values["model"] = ModelConfig(
            **model
            | {"base": base, "s2_scales": tuple(model["s2_scales"]), "pool_sizes": _pool_sizes(model["pool_sizes"])}
        )
        values["stages"] = tuple(
            StageConfig(**stage | {"pool_sizes": _pool_sizes(stage["pool_sizes"])}) for stage in values["stages"]
        )
        fp8 = values["precision"]["fp8"]
        values["precision"] = PrecisionConfig(
            name=values["precision"]["name"], fp8=Fp8Config(**fp8 | {"skip": tuple(fp8["skip"])})
        )
        values["betas"] = tuple(values["betas"])
        values["checkpoints"] = CheckpointConfig(**values["checkpoints"])
        values["health"] = HealthConfig(**values["health"])
        return cls(**values)


def _pool_sizes(raw: Any) -> tuple[PoolSize, ...] | None:
    """JSON has lists where we have triples."""
    return None if raw is None else tuple((int(t), int(h), int(w)) for t, h, w in raw)


def _check_tiling(stage: StageConfig, model: ModelConfig) -> None:
    """A stage may look at single tiles; any other way of cutting than the model's needs another model."""
    if stage.tiling in (None, SINGLE_TILE, model.tiling):
        return
    where = f"stages.{stage.name}.tiling is {stage.tiling}, model.tiling is {model.tiling}"
    if "dynamic_s2" in (stage.tiling, model.tiling):
        width = model.vision.get("hidden_size")
        raise ConfigError(
            f"{where}: with dynamic_s2 the projector takes all scales side by side, else the {width} channels of one",
            f"use {SINGLE_TILE} or {model.tiling} in the stage, or change model.tiling for all stages",
        )
    raise ConfigError(where, f"use {SINGLE_TILE} or {model.tiling} in the stage")

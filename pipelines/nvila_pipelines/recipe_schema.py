"""The sections of a recipe: which fields there are, of what type, and which values go together.

Strict on purpose: text where a number belongs is an error, not a conversion. Rules that need two fields stand with the
section that has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from nvila.errors import nearest
from nvila.training.config import (
    PARTS,
    Attention,
    CheckpointConfig,
    Fp8Backend,
    Fp8Config,
    Fp8Format,
    HealthConfig,
    ModelConfig,
    Offload,
    OptimizerName,
    PartName,
    Precision,
    Schedule,
    StageConfig,
)

# Names that become folders, registry entries and metric prefixes.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
StageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]
# The names of nvila.vision.projectors.PROJECTORS, which only torch can read; a test holds the two together.
Projector = Literal[
    "identity",
    "linear",
    "mlp2x_gelu",
    "mlp_downsample",
    "mlp_downsample_2x2_fix",
    "mlp_downsample_3x3_fix",
    "mlp_downsample_3x3_s2",
    "mlp_downsample_3x3_s2_new",
]


# What the steps before training make.
OWN_DATA = ("captions", "selected", "text")


def rule(field: str, problem: str, fix: str) -> PydanticCustomError:
    """Return the error of a rule between fields; `field` is the one to blame, relative to the section."""
    return PydanticCustomError("rule", "{field} {problem}", {"field": field, "problem": problem, "fix": fix})


class Section(BaseModel):
    """A mapping of known fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class DataSection(Section):
    """What is learned from."""

    dataset: Literal["easy-vqa"]
    validation_images: Count
    # At most this many images of the training and of the test split; None takes all.
    max_images: Count | None = None

    @model_validator(mode="after")
    def _leaves_training_images(self) -> Self:
        if self.max_images is not None and self.validation_images >= self.max_images:
            raise rule(
                "validation_images",
                f"is {self.validation_images}, which leaves nothing of max_images {self.max_images} to train on",
                "use fewer validation_images or more max_images",
            )
        return self


class VisionSection(Section):
    """The vision tower."""

    model_type: Literal["siglip_vision_model"]
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    image_size: Count
    patch_size: Count
    vision_use_head: bool

    @model_validator(mode="after")
    def _divides(self) -> Self:
        _divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _divisible("image_size", self.image_size, "patch_size", self.patch_size)
        return self


class LanguageSection(Section):
    """The language model; its vocabulary follows the tokenizer."""

    model_type: Literal["qwen2"]
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    tie_word_embeddings: bool
    initializer_range: Annotated[float, Field(gt=0)]
    max_position_embeddings: Count

    @model_validator(mode="after")
    def _divides(self) -> Self:
        _divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _divisible("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        return self


class ModelSection(Section):
    """The parts of a model that starts from new weights."""

    vision: VisionSection
    language: LanguageSection
    projector: Projector
    select_layer: int
    max_length: Count

    @model_validator(mode="after")
    def _fits(self) -> Self:
        # Hidden states: the embeddings and then one a block.
        states = self.vision.num_hidden_layers + 1
        if not -states <= self.select_layer < states:
            raise rule(
                "select_layer",
                f"is {self.select_layer}, none of the {states} hidden states of the vision tower",
                f"use {-states} to {states - 1}; -2 leaves out the last block",
            )
        if self.max_length > self.language.max_position_embeddings:
            raise rule(
                "max_length",
                f"is {self.max_length}, over language.max_position_embeddings {self.language.max_position_embeddings}",
                "lower the one or raise the other",
            )
        return self

    def to_config(self) -> ModelConfig:
        """Return the form that `nvila` builds a model from."""
        return ModelConfig(
            vision=self.vision.model_dump(),
            language=self.language.model_dump(),
            projector=self.projector,
            select_layer=self.select_layer,
            max_length=self.max_length,
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

    # Data of the run (captions, selected, text); with batch_tokens also any data set, path, or mixture of them.
    data: Annotated[str, Field(min_length=1)]
    steps: Count
    lr: LearningRates
    # How much goes into a step: so many images with their samples, or so many positions.
    images_per_step: Count | None = None
    batch_tokens: Count | None = None
    micro_batch_tokens: Count | None = None
    pack: bool = False
    max_bad: Ratio = 0.01
    samples_per_image: Count = 1
    warmup_steps: CountOrZero
    # "Schedule" is a Literal of nvila: the names live there.
    schedule: Schedule
    max_shift_pixels: CountOrZero

    @model_validator(mode="after")
    def _has_a_batch(self) -> Self:
        if (self.images_per_step is None) == (self.batch_tokens is None):
            which = "neither images_per_step nor" if self.batch_tokens is None else "both images_per_step and"
            raise rule("", f"has {which} batch_tokens", "give one of them, and null for the other")
        if self.batch_tokens is not None:
            if (self.micro_batch_tokens or 0) > self.batch_tokens:
                problem = f"is {self.micro_batch_tokens}, more than batch_tokens {self.batch_tokens}"
                raise rule("micro_batch_tokens", problem, f"use at most {self.batch_tokens}")
            return self
        for field in ("micro_batch_tokens", "pack"):
            if getattr(self, field):
                raise rule(field, "needs batch_tokens", "give batch_tokens instead of images_per_step")
        if self.data not in OWN_DATA:
            hint = f"{nearest(self.data, OWN_DATA)}, or give batch_tokens instead of images_per_step"
            raise rule("data", f"is '{self.data}', which only a stage with batch_tokens can read", hint)
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise rule(
                "warmup_steps",
                f"is {self.warmup_steps}, which leaves none of the {self.steps} steps at full rate",
                "use fewer warmup_steps",
            )
        return self

    def to_config(self, name: str) -> StageConfig:
        """Return the form that the training loop takes."""
        values: dict[str, Any] = self.model_dump(exclude={"lr"})
        return StageConfig(name=name, lr=self.lr.rates(), **values | {"images_per_step": self.images_per_step or 0})


Stages = Annotated[dict[StageName, StageSection], Field(min_length=1)]


def stage_configs(stages: Mapping[str, StageSection]) -> tuple[StageConfig, ...]:
    """Return stages, in order, in the form that the training loop takes."""
    return tuple(stage.to_config(name) for name, stage in stages.items())


class ScorerSection(Section):
    """One of the two models that curation compares."""

    model: ModelSection
    stages: Stages


class CurateSection(Section):
    """DeltaLoss curation: what a larger scorer learns and a smaller one does not is worth keeping."""

    keep_rate: Share
    normalize: Literal["none", "token"]
    # Compare a sample with all of its source, or with those of the same question and answer.
    centre: Literal["none", "answer"]
    # Differences of delta below this many nats are ties.
    resolution: Annotated[float, Field(ge=0)]
    # Share of the training images that the scorers learn from.
    fraction: Share
    small: ScorerSection
    large: ScorerSection


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
            if stage.images_per_step is not None and stage.images_per_step % self.num_processes:
                raise rule(
                    f"stages.{name}.images_per_step",
                    f"is {stage.images_per_step} and cannot be dealt to {self.num_processes} processes",
                    "make it a multiple of num_processes",
                )
        return self


class QuantizeSection(Section):
    """Which part becomes smaller and how."""

    vision: Literal["none", "w8a8"]
    language: Literal["none", "w4a16"]
    group_size: Count


class EvaluateSection(Section):
    """What the models are measured on."""

    split: Literal["validation", "test"]
    # Questions that are decoded together.
    batch_size: Count


class GateSection(Section):
    """What a model must reach to be registered."""

    min_accuracy: Ratio
    # By how much the best answers without the image must be beaten.
    min_over_blind: Annotated[float, Field(ge=-1, le=1)] = 0.0
    max_quantized_drop: Ratio


class RegisterSection(Section):
    """Where the model is registered."""

    name: Name
    alias: Literal["candidate", "champion"]


class ServeSection(Section):
    """How the served model is tried."""

    questions: Count


def _divisible(field: str, value: int, by: str, divisor: int) -> None:
    if value % divisor:
        raise rule(field, f"is {value}, no multiple of {by} {divisor}", f"make {field} a multiple of {by}")

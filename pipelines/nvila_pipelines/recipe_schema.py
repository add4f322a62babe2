"""The sections of a recipe: which fields there are, of what type, and which values go together.

Strict on purpose: text where a number belongs is an error, not a conversion. Rules that need two fields stand with the
section that has both.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from nvila.errors import nearest
from nvila.quantization.config import Scheme
from nvila.training.config import BaseModels, ModelConfig, Tiling
from nvila.training.planning.devices import GPUS
from nvila_pipelines.recipe_fields import (
    Count,
    CountOrZero,
    Name,
    PoolSizes,
    Ratio,
    Section,
    Share,
    StageName,
    divisible,
    rule,
)
from nvila_pipelines.recipe_training import Stages

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


class DataSection(Section):
    """What is learned from: a built-in data set with its splits, or data sets of one's own that stages name."""

    dataset: Literal["easy-vqa"] | None = None
    validation_images: CountOrZero = 0
    # At most this many images of the training and of the test split; None takes all.
    max_images: Count | None = None
    # Generated clips of moving shapes beside it, for stages that learn from videos.
    clips: CountOrZero = 0
    # YAML file that gives names to data sets and mixtures; stages then name those.
    registry: str | None = None

    @model_validator(mode="after")
    def _leaves_training_images(self) -> Self:
        if self.max_images is not None and self.validation_images >= self.max_images:
            raise rule(
                "validation_images",
                f"is {self.validation_images}, which leaves nothing of max_images {self.max_images} to train on",
                "use fewer validation_images or more max_images",
            )
        if self.dataset is not None and not self.validation_images:
            raise rule("validation_images", "is 0, but a built-in data set is split", "hold out one image or more")
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
        divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        divisible("image_size", self.image_size, "patch_size", self.patch_size)
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
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    # None: as many as the tokenizer has. A plan needs it where the tokenizer is not at hand.
    vocab_size: Count | None = None

    def to_config(self) -> dict[str, Any]:
        """Return the configuration of the decoder; what is not set is left to its own defaults."""
        values = self.model_dump(exclude={"rope_theta"}, exclude_none=True)
        if self.rope_theta is not None:
            values["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        return values

    @model_validator(mode="after")
    def _divides(self) -> Self:
        divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        divisible("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        return self


class BaseSection(Section):
    """Pretrained parts: folders, or ids of the Hugging Face Hub."""

    vision: Annotated[str, Field(min_length=1)]
    language: Annotated[str, Field(min_length=1)]


class ModelSection(Section):
    """The parts of a model, and how it looks at media; from new weights unless `from` names pretrained ones."""

    model_config = ConfigDict(serialize_by_alias=True)

    vision: VisionSection
    language: LanguageSection
    projector: Projector
    select_layer: int
    max_length: Count
    tiling: Tiling = "resize"
    min_tiles: Count = 1
    max_tiles: Count = 12
    s2_scales: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    frames: Count = 8
    pool_sizes: PoolSizes = ((1, 1, 1),)
    time_tokens: CountOrZero = 0
    base: BaseSection | None = Field(default=None, alias="from")

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
        if self.s2_scales and self.tiling != "dynamic_s2":
            raise rule("s2_scales", f"is given, but tiling is {self.tiling}", "use tiling dynamic_s2 or no s2_scales")
        return self

    def to_config(self) -> ModelConfig:
        """Return the form that `nvila` builds a model from."""
        same = self.model_dump(exclude={"vision", "language", "base"})
        return ModelConfig(
            vision=self.vision.model_dump(),
            language=self.language.to_config(),
            base=None if self.base is None else BaseModels(**self.base.model_dump()),
            **same,
        )


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


class QuantizeSection(Section):
    """Which part becomes smaller and how."""

    vision: Scheme
    language: Scheme
    group_size: Count
    # Samples to calibrate on, and others to measure each part on; 0 calibrates on nothing, which rounds to nearest.
    calibration_samples: CountOrZero = 128
    evaluation_samples: CountOrZero = 512
    # Points of accuracy that a part may lose before it is left wide.
    budget: Annotated[float, Field(ge=0, le=100)] = 1.0
    # Data set, path or mixture to calibrate on; None takes the training and validation split of a built-in set.
    data: str | None = None


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
    # Questions that must have been answered.
    min_samples: Count = 1
    # Least accuracy of single kinds of question.
    min_accuracy_by_source: dict[str, Ratio] = Field(default_factory=dict)
    # Size of the quantized weights; null: no limit.
    max_size_mib: Annotated[float, Field(gt=0)] | None = None
    # Loss against the registered model that `against` names, on the same questions; null: not compared.
    max_live_drop: Ratio | None = None
    against: Literal["candidate", "champion", "previous"] = "champion"


class RegisterSection(Section):
    """Where the model is registered."""

    name: Name
    alias: Literal["candidate", "champion"]
    # Licence of the weights, as the Hugging Face Hub names it; null: what follows from those of the base models.
    licence: Annotated[str, Field(pattern=r"[a-z0-9][a-z0-9.-]*")] | None = None


class ServeSection(Section):
    """How the served model is tried."""

    questions: Count


class AssumedData(Section):
    """What a plan takes the data of a stage to be like; training reads the data itself."""

    # None: unknown, so that a stage measured in epochs has no number of steps.
    samples: Count | None = None
    images: CountOrZero = 1
    image_width: Count = 640
    image_height: Count = 480
    videos: CountOrZero = 0
    # Positions of a sample that are no visual tokens, and how many of them are answers. Unsaid: 120 or what a stage has
    # room for, and half of it.
    text_tokens: Count | None = None
    answer_tokens: Count | None = None

    @model_validator(mode="after")
    def _answers(self) -> Self:
        text, answers = self.text_tokens, self.answer_tokens
        if text is not None and answers is not None and answers > text:
            raise rule("answer_tokens", f"is {answers}, over text_tokens {text}", "lower it")
        return self


class PlanSection(Section):
    """What `nvila train --dry-run` reckons with; nothing that is trained depends on it."""

    gpu: str = "h100"
    gpus: Count = 8
    # Share of the peak that training reaches: model FLOPs utilisation.
    mfu: Share = 0.35
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    currency: str = "USD"
    data: dict[StageName, AssumedData] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _knows_the_gpu(self) -> Self:
        if self.gpu not in GPUS:
            raise rule("gpu", f"is '{self.gpu}'", nearest(self.gpu, GPUS))
        return self

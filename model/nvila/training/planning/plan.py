"""The plan of a training run: what every stage trains, takes and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from nvila.errors import ConfigError
from nvila.training.config import PARTS, ModelConfig, PartName, StageConfig, TrainConfig
from nvila.training.planning.compute import PartWork, fp8_share, gpu_hours, mixed_peak, step_operations, step_seconds
from nvila.training.planning.devices import GIB, Gpu
from nvila.training.planning.memory import MemoryPlan, Share, fitting, memory_plans, query_width
from nvila.training.planning.sizes import (
    PartSizes,
    SampleSize,
    longest_image,
    meta_model,
    nvila_config,
    part_sizes,
    sample_size,
)

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig
    from nvila.modeling import NVILAForConditionalGeneration


@dataclass(frozen=True, slots=True, kw_only=True)
class AssumedSample:
    """What a sample of a stage is taken to be.

    Args:
        samples: Samples of the data; None when unknown.
        images: Width and height of each image.
        videos: Number of videos.
        text_tokens: Positions that are no visual tokens.
        answer_tokens: Those of them that are learned.
    """

    samples: int | None = None
    images: tuple[tuple[int, int], ...] = ((640, 480),)
    videos: int = 0
    text_tokens: int = 120
    answer_tokens: int = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What the run is to be on.

    Args:
        gpu: Kind of GPU.
        gpus: How many.
        memory: Bytes of one, if other than its kind has.
        mfu: Share of the peak that training reaches.
        price_per_gpu_hour: None leaves the cost out.
    """

    gpu: Gpu
    gpus: int
    memory: int | None = None
    mfu: float = 0.35
    price_per_gpu_hour: float | None = None

    @property
    def bytes(self) -> int:
        """Memory of one GPU."""
        return self.memory or int(self.gpu.memory_gib * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What one stage trains, takes and costs; None stands for what the data would have to tell."""

    name: str
    trained: Mapping[PartName, int]
    frozen: Mapping[PartName, int]
    samples_per_step: int
    positions_per_sample: int
    tiles_per_sample: int
    positions_per_step: int
    samples_per_gpu: int
    steps: int | None
    operations_per_step: float
    seconds: float | None
    gpu_hours: float | None
    cost: float | None
    memory: tuple[MemoryPlan, ...]


def plan_training(
    config: TrainConfig, assumed: Mapping[str, AssumedSample], hardware: Hardware
) -> tuple[StagePlan, ...]:
    """Plan every stage of a run; no weights are loaded.

    Raises:
        ConfigError: The GPUs do not divide a batch, or a stage has no room for one image.
    """
    model = meta_model(nvila_config(config.model))
    return tuple(
        _plan_stage(config.for_stage(stage), stage, model, assumed.get(stage.name, AssumedSample()), hardware)
        for stage in config.stages
    )


def check_room(model: ModelConfig, stages: Sequence[StageConfig]) -> None:
    """Check that every stage has room for one image, cut into as many tiles as it may be.

    Raises:
        ConfigError: With both numbers and the fix.
    """
    config = nvila_config(model)
    for stage in stages:
        length, needed = stage.max_length or model.max_length, longest_image(config, stage)
        if needed >= length:
            field = f"stages.{stage.name}.max_length" if stage.max_length else "model.max_length"
            raise ConfigError(
                f"{field} is {length}, too short for one image: up to {needed} positions in stage {stage.name}",
                f"use more than {needed}, fewer model.max_tiles, or tiling resize",
            )


def plan_dict(plan: StagePlan) -> dict[str, Any]:
    """Return the JSON form of a stage's plan."""
    best = fitting(plan.memory)
    memory = [asdict(one) | {"total": one.total, "fits": one.fits} for one in plan.memory]
    chosen = None if best is None else {key: getattr(best, key) for key in ("zero_stage", "offload", "checkpointing")}
    return asdict(plan) | {"memory": memory, "fits": chosen}


def _plan_stage(
    config: TrainConfig,
    stage: StageConfig,
    meta: NVILAForConditionalGeneration,
    assumed: AssumedSample,
    hardware: Hardware,
) -> StagePlan:
    model = cast("NVILAConfig", meta.config)
    sizes = part_sizes(meta, stage, config.precision.fp8.min_features if config.precision.name == "fp8" else 0)
    sample = sample_size(
        model,
        stage,
        images=assumed.images,
        videos=assumed.videos,
        text_tokens=assumed.text_tokens,
        answer_tokens=assumed.answer_tokens,
    )
    _check_batch(stage, hardware.gpus)
    _check_sample(stage, config.model, sample)
    # A row may hold several samples about one image; they share its tokens.
    samples = stage.images_per_step * stage.samples_per_image
    row, rows = _row(sample, stage, assumed), stage.images_per_step // hardware.gpus
    share = Share(
        rows=rows,
        row=row,
        tiles=rows * sample.tiles,
        projected=rows * sample.projected,
        supervised=rows * stage.samples_per_image * sample.supervised,
    )
    operations = _operations(model, sizes, sample, stage, assumed, set(stage.lr))
    steps = stage.steps or (None if assumed.samples is None else stage.resolved(assumed.samples).steps)
    step = step_seconds(operations, gpus=hardware.gpus, peak_tflops=_peak(config, sizes, hardware), mfu=hardware.mfu)
    seconds = None if steps is None else steps * step
    hours = None if seconds is None else gpu_hours(seconds, hardware.gpus)
    price = hardware.price_per_gpu_hour
    return StagePlan(
        name=stage.name,
        trained={part: sum(sizes[part].trained) for part in PARTS},
        frozen={part: sizes[part].total - sum(sizes[part].trained) for part in PARTS},
        samples_per_step=samples,
        positions_per_sample=sample.positions,
        tiles_per_sample=sample.tiles,
        positions_per_step=row * stage.images_per_step,
        samples_per_gpu=samples // hardware.gpus,
        steps=steps,
        operations_per_step=operations,
        seconds=seconds,
        gpu_hours=hours,
        cost=None if hours is None or price is None else hours * price,
        memory=memory_plans(config, stage, model, sizes, share, gpus=hardware.gpus, memory=hardware.bytes),
    )


def _row(sample: SampleSize, stage: StageConfig, assumed: AssumedSample) -> int:
    """Positions of a row: the media once, the text of every sample."""
    return sample.positions + (stage.samples_per_image - 1) * assumed.text_tokens


def _operations(
    model: NVILAConfig,
    sizes: Mapping[PartName, PartSizes],
    sample: SampleSize,
    stage: StageConfig,
    assumed: AssumedSample,
    trained: set[PartName],
) -> float:
    tower, text = model.vision_config, model.text_config
    patches = (tower.image_size // tower.patch_size) ** 2
    rows, tiles = stage.images_per_step, stage.images_per_step * sample.tiles
    row = _row(sample, stage, assumed)
    work: dict[PartName, PartWork] = {
        "vision": PartWork(
            weights=sizes["vision"].weights,
            positions=tiles * patches,
            attention=float(model.num_vision_blocks) * tiles * patches**2 * tower.hidden_size,
        ),
        "projector": PartWork(
            weights=sizes["projector"].weights, positions=rows * sample.projected * model.num_image_tokens
        ),
        "language": PartWork(
            weights=sizes["language"].weights,
            positions=rows * row,
            attention=float(text.num_hidden_layers) * rows * row**2 * query_width(model),
        ),
    }
    supervised = rows * stage.samples_per_image * sample.supervised
    head = PartWork(weights=text.hidden_size * text.vocab_size, positions=supervised)
    return step_operations(work, head, trained)


def _peak(config: TrainConfig, sizes: Mapping[PartName, PartSizes], hardware: Hardware) -> float:
    """Peak of the stage's products: FP8 layers run at their own speed, all others at that of bf16."""
    fp8 = hardware.gpu.fp8_tflops
    if config.precision.name != "fp8" or fp8 is None:
        return hardware.gpu.bf16_tflops
    weights = sum(part.weights for part in sizes.values())
    return mixed_peak(hardware.gpu.bf16_tflops, fp8, fp8_share(sizes["language"].fp8_weights, weights))


def _check_batch(stage: StageConfig, gpus: int) -> None:
    batch = stage.images_per_step
    if batch % gpus:
        lower = batch // gpus * gpus
        near = f"{lower} or {lower + gpus}" if lower else str(gpus)
        raise ConfigError(
            f"stages.{stage.name}.images_per_step is {batch} and cannot be dealt to {gpus} GPUs",
            f"use images_per_step {near}, or plan.gpus={math.gcd(batch, gpus)}",
        )


def _check_sample(stage: StageConfig, model: ModelConfig, sample: SampleSize) -> None:
    length = stage.max_length or model.max_length
    if sample.positions > length:
        raise ConfigError(
            f"plan.data.{stage.name} makes samples of {sample.positions} positions, the stage takes {length}",
            "lower what the plan assumes, or raise max_length",
        )

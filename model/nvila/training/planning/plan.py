"""The plan of a training run: what every stage trains, takes and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from nvila.errors import ConfigError
from nvila.training.config import PARTS, ModelConfig, PartName, StageConfig, TrainConfig
from nvila.training.flops import PartWork, step_operations
from nvila.training.planning.compute import fp8_share, gpu_hours, mixed_peak, step_seconds
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


_USUAL_TEXT, _LEAST_TEXT = 120, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AssumedSample:
    """What a sample of a stage is taken to be.

    Args:
        samples: Samples of the data; None when unknown.
        images: Width and height of each image.
        videos: Number of videos.
        text_tokens: Positions that are no visual tokens; None: 120, or as many as a stage of short rows has room for.
        answer_tokens: Those of them that are learned; None: half of them.
    """

    samples: int | None = None
    images: tuple[tuple[int, int], ...] = ((640, 480),)
    videos: int = 0
    text_tokens: int | None = None
    answer_tokens: int | None = None


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
class _Batch:
    """How the samples of a step are laid out.

    Args:
        units: Images with their samples, or single samples, of all GPUs.
        at_once: Those of them in one forward pass of one GPU.
        units_per_row: How many of them share a row.
        row: Positions of a row.
    """

    units: int
    at_once: int
    units_per_row: int
    row: int

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return math.ceil(self.units / self.units_per_row)

    @property
    def rows_at_once(self) -> int:
        """Rows of one forward pass."""
        return math.ceil(self.at_once / self.units_per_row)


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
    visual = sample_size(model, stage, images=assumed.images, videos=assumed.videos, text_tokens=0, answer_tokens=0)
    room = (stage.max_length or config.model.max_length) - visual.positions
    text = assumed.text_tokens or max(_LEAST_TEXT, min(_USUAL_TEXT, room // stage.samples_per_image))
    sample = replace(
        visual,
        positions=visual.positions + text,
        supervised=text // 2 if assumed.answer_tokens is None else assumed.answer_tokens,
    )
    # The media once, the text of every sample.
    row = sample.positions + (stage.samples_per_image - 1) * text
    batch = _batch(config.model, stage, meta, sample, row, hardware.gpus)
    _check_sample(stage, config.model, sample)
    # A row may hold several samples about one image; they share its tokens.
    samples = batch.units * stage.samples_per_image
    share = Share(
        rows=batch.rows_at_once,
        row=batch.row,
        tiles=batch.at_once * sample.tiles,
        projected=batch.at_once * sample.projected,
        supervised=batch.at_once * stage.samples_per_image * sample.supervised,
    )
    operations = _operations(model, sizes, sample, stage, batch)
    steps = stage.steps or (None if assumed.samples is None else _num_steps(stage, assumed.samples, samples))
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
        positions_per_step=batch.units * row,
        samples_per_gpu=batch.at_once * stage.samples_per_image,
        steps=steps,
        operations_per_step=operations,
        seconds=seconds,
        gpu_hours=hours,
        cost=None if hours is None or price is None else hours * price,
        memory=memory_plans(config, stage, model, sizes, share, gpus=hardware.gpus, memory=hardware.bytes),
    )


def _batch(
    model: ModelConfig, stage: StageConfig, meta: NVILAForConditionalGeneration, sample: SampleSize, row: int, gpus: int
) -> _Batch:
    """Lay out a step; of a token budget as `nvila.data.token_budget` fills it."""
    if stage.batch_tokens is None:
        _check_batch(stage, gpus)
        return _Batch(units=stage.images_per_step, at_once=stage.images_per_step // gpus, units_per_row=1, row=row)
    from nvila.data.stage_data import tile_positions

    # The budget counts the work on tiles as well.
    length, cost = stage.max_length or model.max_length, row + tile_positions(meta) * sample.tiles
    units = stage.batch_tokens // cost
    if units < gpus:
        raise ConfigError(
            f"stages.{stage.name}.batch_tokens is {stage.batch_tokens} and cannot be dealt to {gpus} GPUs: a sample "
            f"of the plan counts for {cost}",
            f"use batch_tokens={gpus * cost} or more" + (f", or plan.gpus={units}" if units else ""),
        )
    micro = stage.micro_batch_tokens or max(stage.batch_tokens // gpus, length)
    if cost > micro:
        raise ConfigError(
            f"stages.{stage.name}.micro_batch_tokens is {micro}, but a sample of the plan counts for {cost}",
            f"use micro_batch_tokens={cost} or more, fewer tiles or fewer samples_per_image",
        )
    shared = stage.pack and stage.samples_per_image == 1
    at_once = min(micro // cost, math.ceil(units / gpus))
    per_row = max(1, min(length // cost, at_once)) if shared else 1
    return _Batch(units=units, at_once=at_once, units_per_row=per_row, row=row * per_row)


def _num_steps(stage: StageConfig, samples: int, samples_per_step: int) -> int:
    if stage.batch_tokens is None:
        return stage.resolved(samples).steps
    return math.ceil((stage.epochs or 0) * samples / samples_per_step)


def _operations(
    model: NVILAConfig,
    sizes: Mapping[PartName, PartSizes],
    sample: SampleSize,
    stage: StageConfig,
    batch: _Batch,
) -> float:
    tower, text = model.vision_config, model.text_config
    patches = (tower.image_size // tower.patch_size) ** 2
    tiles, rows, row = batch.units * sample.tiles, batch.rows, batch.row
    work: dict[PartName, PartWork] = {
        "vision": PartWork(
            weights=sizes["vision"].weights,
            positions=tiles * patches,
            attention=float(model.num_vision_blocks) * tiles * patches**2 * tower.hidden_size,
        ),
        "projector": PartWork(
            weights=sizes["projector"].weights, positions=batch.units * sample.projected * model.num_image_tokens
        ),
        "language": PartWork(
            weights=sizes["language"].weights,
            positions=rows * row,
            attention=float(text.num_hidden_layers) * rows * row**2 * query_width(model),
        ),
    }
    supervised = batch.units * stage.samples_per_image * sample.supervised
    head = PartWork(weights=text.hidden_size * text.vocab_size, positions=supervised)
    return step_operations(work, head, set(stage.lr))


def _peak(config: TrainConfig, sizes: Mapping[PartName, PartSizes], hardware: Hardware) -> float:
    """Peak of the stage's products: FP8 layers run at their own speed, all others at that of bf16."""
    fp8 = hardware.gpu.peak.fp8
    if config.precision.name != "fp8" or fp8 is None:
        return hardware.gpu.peak.bf16
    weights = sum(part.weights for part in sizes.values())
    return mixed_peak(hardware.gpu.peak.bf16, fp8, fp8_share(sizes["language"].fp8_weights, weights))


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

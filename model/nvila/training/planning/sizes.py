"""Sizes that a plan needs, from the configuration of a model: parameters on the meta device, and media of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvila.training.config import PARTS, SINGLE_TILE, ModelConfig, PartName, StageConfig

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig
    from nvila.modeling import NVILAForConditionalGeneration

# Of the tokenizer of a tiny data set, where a recipe leaves the vocabulary to it.
ASSUMED_WORDS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSizes:
    """One part of a model in one stage.

    Args:
        total: Parameters.
        trained: Sizes of the trained tensors.
        weights: Weights of the linear layers that a position goes through, without the head.
        fp8_weights: Those of them that compute in FP8 under precision fp8.
    """

    total: int
    trained: tuple[int, ...]
    weights: int
    fp8_weights: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSize:
    """What a sample of a stage takes.

    Args:
        positions: Positions of the decoder.
        supervised: Those of them that are learned.
        tiles: Tiles and frames that go through the vision tower.
        projected: Tiles that the projector sees: of Dynamic-S2 only those of the last scale, into which all merge.
    """

    positions: int
    supervised: int
    tiles: int
    projected: int


def nvila_config(model: ModelConfig) -> NVILAConfig:
    """Return the configuration of the model that a recipe describes; ids of tokens are left at their defaults.

    Raises:
        ConfigError: A value does not fit another.
    """
    from nvila.configuration import NVILAConfig

    language: dict[str, Any] = {"vocab_size": ASSUMED_WORDS, "bos_token_id": None, "eos_token_id": None}
    return NVILAConfig(
        vision_config=dict(model.vision),
        text_config=language | dict(model.language),
        mm_projector_type=model.projector,
        mm_vision_select_layer=model.select_layer,
        **model.media_fields(),
    )


def meta_model(config: NVILAConfig) -> NVILAForConditionalGeneration:
    """Build a model without memory for its weights."""
    import torch

    from nvila.modeling import NVILAForConditionalGeneration

    with torch.device("meta"):
        model = NVILAForConditionalGeneration(config)
    model.tie_weights()
    return model


def part_sizes(
    model: NVILAForConditionalGeneration, stage: StageConfig, min_features: int = 0
) -> dict[PartName, PartSizes]:
    """Count the parameters of every part as a stage trains them.

    Args:
        model: The model, as `meta_model` builds it; which parameters are frozen is changed.
        stage: Which parts learn.
        min_features: Smallest side of a linear layer that precision fp8 converts; 0 for other precisions.
    """
    from torch import nn

    from nvila.training.run import trained_parts

    trained = {group.name: tuple(p.numel() for p in group.parameters) for group in trained_parts(model, stage)}
    tower = model.model.vision_tower
    modules: dict[PartName, list[nn.Module]] = {
        "vision": [tower],
        "projector": [model.model.mm_projector],
        "language": [model.model.language_model, model.lm_head],
    }
    used: dict[PartName, list[nn.Module]] = {
        "vision": [tower.embeddings, *tower.encoder.layers[: model.config.num_vision_blocks]],
        "projector": [model.model.mm_projector],
        "language": [model.model.language_model],
    }
    sizes: dict[PartName, PartSizes] = {}
    for part in PARTS:
        # A tied head is the embedding and counts once.
        parameters = {id(p): p.numel() for module in modules[part] for p in module.parameters()}
        layers = [one for module in used[part] for one in module.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
        wide = [
            one.weight.numel()
            for one in layers
            if isinstance(one, nn.Linear) and part == "language" and min(one.weight.shape) >= min_features > 0
        ]
        sizes[part] = PartSizes(
            total=sum(parameters.values()),
            trained=trained.get(part, ()),
            weights=sum(one.weight.numel() for one in layers),
            fp8_weights=sum(wide),
        )
    return sizes


def sample_size(
    config: NVILAConfig,
    stage: StageConfig,
    *,
    images: Sequence[tuple[int, int]],
    videos: int,
    text_tokens: int,
    answer_tokens: int,
) -> SampleSize:
    """Count positions and tiles of a sample, as the processor counts them.

    Args:
        config: The model.
        stage: Its tiling, frames and pooling.
        images: Width and height of each image.
        videos: Number of videos.
        text_tokens: Positions that are no visual tokens.
        answer_tokens: Those of them that are learned.
    """
    from nvila.image_processing import NVILAImageProcessor
    from nvila.prompts import MediaTokens

    processor = NVILAImageProcessor.from_config(config)
    tile = processor.tiles_images and stage.tiling != SINGLE_TILE
    frames = stage.frames or config.num_video_frames
    tokens = MediaTokens(
        num_image_tokens=config.num_image_tokens,
        video_pool_sizes=[list(size) for size in stage.pool_sizes or config.video_pool_sizes],
    )
    plans = [processor.plan(*size, tile=tile) for size in images]
    layouts = [tokens.image(plan, tiled=tile) for plan in plans] + [tokens.video(frames)] * videos
    # Every run is closed by an embedded line feed, and a tile of `dynamic` by one in the text as well.
    visual = sum(sum(one.runs) + len(one.runs) * (2 if one.text_after else 1) for one in layouts)
    return SampleSize(
        positions=visual + text_tokens,
        supervised=answer_tokens,
        tiles=sum(plan.num_tiles for plan in plans) + frames * videos,
        projected=sum(plan.num_tiles if plan.block is None else plan.block.num_tiles for plan in plans)
        + frames * videos,
    )


def longest_image(config: NVILAConfig, stage: StageConfig) -> int:
    """Return the most positions that one image takes in a stage."""
    square = config.tile_size
    most = 0
    for columns in range(1, config.max_tiles + 1):
        for rows in range(1, config.max_tiles // columns + 1):
            size = sample_size(
                config, stage, images=[(square * columns, square * rows)], videos=0, text_tokens=0, answer_tokens=0
            )
            most = max(most, size.positions)
    return most

"""Looking into a model: its parts and parameters, and where every position of a prompt comes from.

Parameters are counted on the meta device, so a 15B model is described in a second and without memory. A prompt is
prepared by the model's own processor and its ids are then told apart: nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nvila.errors import CheckpointError, ConfigError, nearest
from nvila.presets import PRESETS

if TYPE_CHECKING:
    from PIL import Image

    from nvila.configuration import NVILAConfig
    from nvila.processing import NVILAProcessor
    from nvila.vision.tiling import TilePlan

Kind = Literal["text", "image", "video"]
DEFAULT_TEXT = "Describe this."


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a model; a tied head belongs to the language model and is counted once."""

    name: str
    detail: str
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """What a model is made of.

    Args:
        source: Preset or folder.
        parts: Vision tower, projector and language model.
        images: How an image becomes tokens, in words.
        videos: How a video becomes tokens, in words.
    """

    source: str
    parts: tuple[Part, ...]
    images: str
    videos: str

    @property
    def parameters(self) -> int:
        """Parameters of all parts."""
        return sum(part.parameters for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain form."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts], "parameters": self.parameters}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRun:
    """Neighbouring positions of one origin.

    Args:
        start: First position.
        visual: Visual tokens.
        text: Ordinary tokens; behind visual ones, the line feed that closes them.
        kind: What it comes from.
        source: Which image, tile or frames, or the text itself.
    """

    start: int
    visual: int
    text: int
    kind: Kind
    source: str

    @property
    def stop(self) -> int:
        """Position behind the last one."""
        return self.start + self.visual + self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """Where the positions of a prompt come from, in order."""

    runs: tuple[TokenRun, ...]

    @property
    def visual(self) -> int:
        """Positions that visual tokens fill."""
        return sum(run.visual for run in self.runs)

    @property
    def text(self) -> int:
        """All other positions."""
        return sum(run.text for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain form."""
        return {
            "total": self.visual + self.text,
            "visual": self.visual,
            "text": self.text,
            "runs": [asdict(run) for run in self.runs],
        }


def load_config(source: str) -> NVILAConfig:
    """Load the configuration of a model folder or of a preset.

    Raises:
        ConfigError: It is neither.
        CheckpointError: The folder holds a model of another layout, or none.
    """
    from nvila.checkpoints.layouts import NVILA, detect_layout
    from nvila.configuration import NVILAConfig

    if source in PRESETS:
        return NVILAConfig.from_preset(source)
    folder = Path(source)
    if not folder.is_dir():
        raise ConfigError(f"'{source}' is no folder and no preset", nearest(source, PRESETS))
    layout = detect_layout(folder)
    if layout != NVILA:
        # The flat layout has the same model type, but keeps its tiling and projector in code.
        raise CheckpointError(
            f"{folder} is a released checkpoint of layout '{layout}'",
            f"convert it first: nvila convert {folder} DST --to {NVILA}",
        )
    return NVILAConfig.from_pretrained(folder)


def load_processor(source: str) -> NVILAProcessor:
    """Load the processor of a model folder or of a preset.

    Raises:
        CheckpointError: The folder has no processor.
    """
    from nvila.assembly import register_auto_classes
    from nvila.processing import NVILAProcessor

    if source in PRESETS:
        return NVILAProcessor.from_preset(source)
    register_auto_classes()
    try:
        return NVILAProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"cannot load a processor from {source}: {e}", "save it beside the weights") from e


def inspect_model(source: str) -> ModelReport:
    """Describe a model folder or a preset; weights are not read.

    Raises:
        ConfigError: It is neither, or its configuration is wrong.
        CheckpointError: The folder holds a model of another layout, or none.
    """
    import torch

    from nvila.modeling import NVILAForConditionalGeneration

    config = load_config(source)
    with torch.device("meta"):
        model = NVILAForConditionalGeneration(config)
    tower, projector = (_count(part.parameters()) for part in (model.model.vision_tower, model.model.mm_projector))
    language = _count(model.parameters()) - tower - projector
    details = (("vision tower", _tower(config), tower), ("projector", _projector(config), projector))
    parts = (*details, ("language model", _language(config), language))
    return ModelReport(
        source=source,
        parts=tuple(Part(name=name, detail=detail, parameters=count) for name, detail, count in parts),
        images=_images(config),
        videos=_videos(config),
    )


def inspect_prompt(
    processor: NVILAProcessor,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    text: str = DEFAULT_TEXT,
) -> PromptReport:
    """Prepare a prompt of images, videos and a text, in this order, and say where its positions come from.

    Args:
        processor: The model's processor.
        images: Anything that the processor reads as an image.
        videos: Anything that it reads as a video.
        text: The user's text.

    Raises:
        DataError: A medium cannot be read.
        ConfigError: The frames of a video cannot be pooled.
    """
    pictures = [processor.image_processor.load(source) for source in images]
    clips = [processor.video_processor.load(source) for source in videos]
    content = [
        *({"type": "image", "image": picture} for picture in pictures),
        *({"type": "video", "video": clip} for clip in clips),
        {"type": "text", "text": text},
    ]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    plans = prompt_plans(processor, pictures)
    names = [name for number, plan in enumerate(plans, 1) for name in _image_names(number, plan)]
    pools = [tuple(size) for size in processor.video_pool_sizes]
    names += [name for number, clip in enumerate(clips, 1) for name in _video_names(number, len(clip.frames), pools)]
    return PromptReport(runs=tuple(_runs(processor, inputs["input_ids"][0].tolist(), names)))


def prompt_plans(processor: NVILAProcessor, pictures: Sequence[Image.Image]) -> list[TilePlan]:
    """Plan the tiles of the images of one prompt: only a single image is cut into several."""
    tile = len(pictures) == 1
    return [processor.image_processor.plan(*picture.size, tile=tile) for picture in pictures]


def _runs(processor: NVILAProcessor, ids: list[int], names: Iterable[str]) -> Iterator[TokenRun]:
    """Walk over runs of placeholders and of text; each run of placeholders takes the next name."""
    tokenizer = processor.tokenizer
    kinds: dict[int, Kind] = {
        tokenizer.convert_tokens_to_ids(processor.image_token): "image",
        tokenizer.convert_tokens_to_ids(processor.video_token): "video",
    }
    closing = len(tokenizer("\n", add_special_tokens=False)["input_ids"])
    pending = iter(names)
    start = counted = 0
    for kind, group in groupby(ids, key=lambda token: kinds.get(token, "text")):
        members = list(group)
        if kind == "text":
            # The line feed that closes a medium was counted with it.
            members, counted = members[counted:], 0
            run = TokenRun(start=start, visual=0, text=len(members), kind=kind, source=tokenizer.decode(members))
        else:
            counted = closing
            run = TokenRun(start=start, visual=len(members), text=closing, kind=kind, source=next(pending))
        if run.stop > start:
            yield run
        start = run.stop


def _image_names(number: int, plan: TilePlan) -> Iterator[str]:
    """Name the runs of placeholders of one image."""
    if plan.block is not None:
        columns, rows = plan.block
        scales = f"merged from {plan.num_tiles} of {len(plan.grids)} scales"
        yield f"image {number}: {columns}x{rows} tiles row by row, {scales}"
    elif plan.num_tiles == 1:
        yield f"image {number}: one tile"
    else:
        grid = plan.grids[0]
        for tile in range(grid.num_tiles):
            row, column = divmod(tile, grid.columns)
            yield f"image {number}: tile {tile + 1} of {grid.num_tiles}, column {column + 1}, row {row + 1}"
        yield f"image {number}: thumbnail"


def _video_names(number: int, frames: int, pools: Sequence[tuple[int, ...]]) -> Iterator[str]:
    """Name the runs of placeholders of one video: its pooled frames, level by level."""
    for pool in pools:
        level = f", level {list(pool)}" if len(pools) > 1 else ""
        for first in range(1, frames + 1, pool[0]):
            last = first + pool[0] - 1
            of = f"frame {first}" if pool[0] == 1 else f"mean of frames {first}-{last}"
            yield f"video {number}: {of} of {frames}{level}"


def _tower(config: NVILAConfig) -> str:
    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    return (
        f"{tower.model_type}: {tower.num_hidden_layers} blocks of width {tower.hidden_size}, "
        f"{config.num_vision_blocks} of them used; tiles of {tower.image_size} pixels, patches of {tower.patch_size}"
        f" -> {side * side} tokens"
    )


def _projector(config: NVILAConfig) -> str:
    merged = f" ({len(config.s2_scales)} scales)" if config.uses_s2 else ""
    widths = f"{config.mm_channels} channels{merged} -> {config.text_config.hidden_size}"
    return f"{config.mm_projector_type}: {widths}, {config.num_image_tokens} tokens a tile"


def _language(config: NVILAConfig) -> str:
    text = config.text_config
    head = "tied head" if config.tie_word_embeddings else "head of its own"
    return (
        f"{text.model_type}: {text.num_hidden_layers} layers of width {text.hidden_size}, "
        f"{text.vocab_size:,} tokens, {head}"
    )


def _images(config: NVILAConfig) -> str:
    closed = f"{config.num_image_tokens} tokens and a line feed"
    if config.image_aspect_ratio == "dynamic":
        most = f"{config.min_tiles} to {config.max_tiles} tiles and a thumbnail"
        return f"dynamic: {most}, {closed} each"
    if config.uses_s2:
        scales = ", ".join(map(str, config.s2_scales))
        fewest = config.tiling.last_scale_min
        return f"dynamic_s2: scales {scales}; {fewest} to {config.max_tiles} tiles of {config.num_image_tokens} tokens"
    return f"{config.image_aspect_ratio}: one tile, {closed}"


def _videos(config: NVILAConfig) -> str:
    side = isqrt(config.num_image_tokens)
    rate = f"{config.fps:g} a second, at most {config.num_video_frames}" if config.fps else str(config.num_video_frames)
    pools = " and ".join(f"{t} frames x {h} x {w} tokens" for t, h, w in config.video_pool_sizes)
    pooled = f", averaged over {pools}" if config.video_pool_sizes != [[1, 1, 1]] else ""
    times = f", {config.num_time_tokens} time tokens" if config.num_time_tokens else ""
    return f"{rate} frames of {side}x{side} tokens{pooled}{times}"


def _count(parameters: Iterable[Any]) -> int:
    return sum(parameter.numel() for parameter in parameters)

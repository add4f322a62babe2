"""The points of a sweep: which tiling, temporal pooling, frames and form of the weights a model can be run at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import isqrt
from typing import Any

from nvila.configuration import NVILAConfig
from nvila.errors import ConfigError, nearest
from nvila.processing import NVILAProcessor
from nvila.vision.temporal import num_video_tokens
from nvila.vision.tiling import TILINGS

Pool = tuple[int, int, int]

STORED = "stored"
# Vision and language scheme of every form besides the stored weights; they are rounded to nearest.
FORMS: dict[str, tuple[str, str]] = {
    "int8": ("int8", "int8"),
    "fp8": ("fp8", "fp8"),
    "w8a8": ("w8a8", "none"),
    "w4a16": ("none", "w4a16"),
    "w8a8+w4a16": ("w8a8", "w4a16"),
}
DEFAULT_FORMS = (STORED, "int8", "w8a8+w4a16")
_POOL = re.compile(r"(\d+)(?:x(\d+)x(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a sweep is asked to try; None takes what is usual for the model.

    Args:
        tilings: Modes, with the most tiles behind a colon: `resize`, `dynamic:12`.
        pools: Blocks of frames and tokens that are averaged.
        frames: Frames of a video.
        forms: `stored` and names in `FORMS`.
    """

    tilings: tuple[str, ...] | None = None
    pools: tuple[Pool, ...] | None = None
    frames: tuple[int, ...] | None = None
    forms: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way to run a model.

    Args:
        tiling: How images are cut; None where the data has none.
        frames: Frames of a video; None where the data has none.
        pool: Pooling of video tokens, likewise.
        form: Of the weights.
    """

    tiling: str | None = None
    frames: int | None = None
    pool: Pool | None = None
    form: str = STORED

    @property
    def name(self) -> str:
        """What people read."""
        frames = None if self.frames is None else f"{self.frames} frames"
        pool = None if self.pool is None else f"pool {spelled(self.pool)}"
        return ", ".join(part for part in (self.tiling, frames, pool, self.form) if part is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A setting that the model or the data does not allow, and why."""

    setting: str
    why: str


def parse_pool(text: str) -> Pool:
    """Read `4`, which pools four frames, or `4x2x2`, which pools cells of tokens too.

    Raises:
        ConfigError: It is neither.
    """
    match = _POOL.fullmatch(text)
    sizes = (int(match[1]), int(match[2] or 1), int(match[3] or 1)) if match else (0, 0, 0)
    if min(sizes) < 1:
        raise ConfigError(
            f"{text!r} is no pooling", "write the frames that are averaged, 4, or frames and cells: 4x2x2"
        )
    return sizes


def spelled(pool: Pool) -> str:
    """Return a pooling as `parse_pool` reads it."""
    return "x".join(map(str, pool))


def plan_points(
    config: NVILAConfig, choices: Choices, *, images: bool, videos: bool, quantized: bool
) -> tuple[list[Point], list[LeftOut]]:
    """Return the points of a model on some data, and what of the choices does not apply.

    Args:
        config: The model's own configuration.
        choices: What to try.
        images: Whether the data has images.
        videos: Whether it has videos.
        quantized: Whether the stored weights are quantized already.

    Raises:
        ConfigError: A choice is malformed, or nothing is left.
    """
    left: list[LeftOut] = []
    tilings = list(_tilings(config, choices, left)) if images else [None]
    if not images and choices.tilings:
        left.append(LeftOut("tiling", "the data has no images"))
    videos_at = list(_videos(config, choices, left)) if videos else [(None, None)]
    if not videos and (choices.frames or choices.pools):
        left.append(LeftOut("frames, pooling", "the data has no videos"))
    forms = list(_forms(choices, quantized, left))
    for other in ("mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix"):
        if other != config.mm_projector_type:
            why = f"the model has weights of {config.mm_projector_type}; add a model trained with the other: --with"
            left.append(LeftOut(f"projector {other}", why))
    points = [
        Point(tiling=tiling, frames=frames, pool=pool, form=form)
        for form, tiling, (frames, pool) in product(forms, tilings, videos_at)
    ]
    if not points:
        raise ConfigError(f"nothing is left to try: {left[0].setting}: {left[0].why}", "name other values")
    return list(dict.fromkeys(points)), left


def applied(point: Point, config: NVILAConfig, processor: NVILAProcessor) -> NVILAProcessor:
    """Set a model's configuration to a point, and return the processor that belongs to it.

    The model reads its configuration when it is called, so the weights stay loaded between points.

    Args:
        point: One of `plan_points` for this model.
        config: The loaded model's configuration; changed in place.
        processor: The model's own processor; left as it is.
    """
    if point.tiling is not None:
        mode, _, tiles = point.tiling.partition(":")
        config.image_aspect_ratio = mode
        if tiles:
            config.max_tiles = int(tiles)
    if point.frames is not None and point.pool is not None:
        config.num_video_frames, config.fps = point.frames, 0.0
        config.video_pool_sizes = [list(point.pool)]
    changed = NVILAProcessor.from_config(config, processor.tokenizer)
    for new, old in (
        (changed.image_processor, processor.image_processor),
        (changed.video_processor, processor.video_processor),
    ):
        new.image_mean, new.image_std = old.image_mean, old.image_std
    return changed


def own_tiling(config: NVILAConfig) -> str:
    """Return the model's own tiling as points name it."""
    mode = str(config.image_aspect_ratio)
    return f"{mode}:{config.max_tiles}" if mode.startswith("dynamic") else mode


def _tilings(config: NVILAConfig, choices: Choices, left: list[LeftOut]) -> Iterator[str]:
    own = own_tiling(config)
    usual: Sequence[str] = ("resize", "dynamic:4", "dynamic:12", own)
    if config.uses_s2:
        usual = (f"dynamic_s2:{config.tiling.last_scale_min}", own)
    for text in dict.fromkeys(choices.tilings or usual):
        mode, _, tiles = text.partition(":")
        if mode not in TILINGS:
            raise ConfigError(f"there is no tiling '{mode}'", nearest(mode, TILINGS))
        if tiles and not (tiles.isascii() and tiles.isdecimal() and int(tiles)):
            raise ConfigError(f"the tiling {text!r} names no number of tiles", "write dynamic:12")
        if (mode == "dynamic_s2") != config.uses_s2:
            takes = f"features of {len(config.s2_scales)} scales" if config.uses_s2 else "features of one scale"
            left.append(LeftOut(f"tiling {text}", f"the projector takes {takes}; add a model trained so: --with"))
            continue
        if mode.startswith("dynamic"):
            text = text if tiles else f"{mode}:{config.max_tiles}"
            try:
                replace(config.tiling, mode=mode, max_tiles=int(text.partition(":")[2]))
            except ConfigError as e:
                left.append(LeftOut(f"tiling {text}", e.message))
                continue
        elif tiles:
            raise ConfigError(f"the tiling {text!r} has one tile", f"write {mode}")
        yield text


def _videos(config: NVILAConfig, choices: Choices, left: list[LeftOut]) -> Iterator[tuple[int, Pool]]:
    own_frames = int(config.num_video_frames)
    frames = choices.frames or tuple(sorted({own_frames, max(1, own_frames // 2), own_frames * 2, own_frames * 4}))
    t, h, w = config.video_pool_sizes[0]
    own: Pool = (t, h, w)
    pools = choices.pools or tuple(dict.fromkeys([own, (1, 1, 1), (4, 1, 1)]))
    if len(config.video_pool_sizes) > 1 and not choices.pools:
        left.append(LeftOut("pooling as trained", "it is a pyramid, and a sweep tries one pooling at a time"))
    side = isqrt(config.num_image_tokens)
    for count, pool in product(frames, pools):
        try:
            num_video_tokens(count, side, [pool])
        except ConfigError as e:
            left.append(LeftOut(f"{count} frames, pool {spelled(pool)}", e.message))
            continue
        yield count, pool


def _forms(choices: Choices, quantized: bool, left: list[LeftOut]) -> Iterator[str]:
    known = (STORED, *FORMS)
    for form in dict.fromkeys(choices.forms or DEFAULT_FORMS):
        if form not in known:
            raise ConfigError(f"there is no form '{form}'", nearest(form, known))
        if quantized and form != STORED:
            left.append(LeftOut(f"form {form}", "the model is quantized already; add its wide form: --with"))
            continue
        yield form

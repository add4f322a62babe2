"""Media of training samples: what they cost before they are read, and their pixels as a stage tiles them.

Everything goes through the functions of the processor, so that training and inference see the same pixels. Tiles are
kept as bytes until a batch is made of them, a fourth of the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nvila.data.images import ImageLimits, image_size
from nvila.data.media_layout import MediaKind, MediaLayout
from nvila.errors import ConfigError, DataError
from nvila.image_processing import NVILAImageProcessor
from nvila.processing import NVILAProcessor
from nvila.vision.tiling import Grid, TilePlan

StageTiling = Literal["none", "resize", "pad", "dynamic", "dynamic_s2"]
MediaSize = tuple[int, ...]
"""Width and height of an image whose tiles depend on them, nothing for other images; the frames of a video."""


@dataclass(frozen=True, slots=True)
class MediaTiles:
    """Decoded tiles of an image or frames of a video.

    Args:
        levels: Bytes of shape (T, 3, size, size).
        block: Grid of the last scale, for an image that was tiled with `dynamic_s2`.
    """

    levels: Tensor
    block: Grid | None = None


def stage_processor(
    processor: NVILAProcessor, *, tiling: StageTiling | None = None, num_frames: int | None = None
) -> NVILAProcessor:
    """Return the processor of a model with the tiling and the number of frames of a stage.

    Args:
        processor: The model's; it is not changed.
        tiling: How images are cut; `none` is one tile an image, None what the model itself does.
        num_frames: Frames of a video; None for the model's own number.

    Raises:
        ConfigError: `dynamic_s2` is asked for where the model has no scales.
    """
    changed = copy.copy(processor)
    images: NVILAImageProcessor = processor.image_processor
    if tiling is not None:
        mode = "resize" if tiling == "none" else tiling
        if mode == "dynamic_s2" and images.image_aspect_ratio != "dynamic_s2":
            raise ConfigError(
                "tiling dynamic_s2 needs a model of several scales, this one is for "
                f"'{images.image_aspect_ratio}' tiling",
                "use tiling dynamic, or a model with image_aspect_ratio dynamic_s2",
            )
        changed.image_processor = copy.copy(images)
        changed.image_processor.image_aspect_ratio = mode
    if num_frames is not None:
        changed.video_processor = copy.copy(processor.video_processor)
        changed.video_processor.num_frames = num_frames
    return changed


class MediaReader:
    """Measures, lays out and decodes media for a processor. Every image is tiled, also of several in a sample.

    Args:
        processor: As `stage_processor` gives it.
    """

    def __init__(self, processor: NVILAProcessor) -> None:
        self._images: NVILAImageProcessor = processor.image_processor
        self._videos = processor.video_processor
        self._tokens = processor.media_tokens
        self._limits = ImageLimits(max_pixels=self._images.max_pixels)

    def measure(self, kind: MediaKind, key: str, read: Callable[[], bytes]) -> MediaSize:
        """Find out what the layout of a medium depends on, reading it only where that is unavoidable.

        Args:
            kind: Image or video.
            key: Its name, for messages.
            read: Gives the encoded bytes.

        Raises:
            DataError: It cannot be read.
        """
        if kind == "image":
            return image_size(read(), f"image '{key}'", self._limits) if self._images.tiles_images else ()
        if self._videos.fps <= 0:
            return (int(self._videos.num_frames),)
        return (len(self._videos.load(read())),)

    def layout(self, kind: MediaKind, size: MediaSize) -> MediaLayout:
        """Lay out a medium.

        Raises:
            ConfigError: The pooling of the model does not divide the frames of a video.
        """
        if kind == "video":
            return self._tokens.video(size[0])
        return self._tokens.image(self._plan(size), tiled=self._images.tiles_images)

    def num_tiles(self, kind: MediaKind, size: MediaSize) -> int:
        """Count the tiles or frames that go through the vision tower."""
        return size[0] if kind == "video" else self._plan(size).num_tiles

    def decode(self, kind: MediaKind, key: str, data: bytes, size: MediaSize) -> MediaTiles:
        """Decode a medium into tiles.

        Raises:
            DataError: It cannot be decoded, or no longer is what was measured.
        """
        try:
            if kind == "video":
                tiles = MediaTiles(self._videos.frame_levels(self._videos.load(data)))
            else:
                image = self._images.load(data)
                plan = self._images.plan(*image.size)
                tiles = MediaTiles(self._images.tile_levels(image, plan), plan.block)
                if self._images.tiles_images and image.size != tuple(size):
                    raise DataError(f"its size is {image.size} and was {tuple(size)}", "index the data again")
        except DataError as e:
            raise DataError(f"{kind} '{key}': {e.message}", e.hint) from e
        if len(tiles.levels) != self.num_tiles(kind, size):
            raise DataError(f"{kind} '{key}' has changed since it was measured", "index the data again")
        return tiles

    def inputs(self, images: Sequence[MediaTiles], videos: Sequence[MediaTiles]) -> dict[str, Tensor]:
        """Make the pixel arguments of `NVILAForConditionalGeneration.forward`; nothing for nothing."""
        inputs: dict[str, Tensor] = {}
        if images:
            inputs["pixel_values"] = self._images.normalise(torch.cat([one.levels for one in images]))
            if self._images.image_aspect_ratio == "dynamic_s2":
                inputs["image_blocks"] = torch.tensor([one.block or (0, 0) for one in images], dtype=torch.long)
        if videos:
            inputs["pixel_values_videos"] = self._videos.normalise(torch.cat([one.levels for one in videos]))
            inputs["video_frames"] = torch.tensor([len(one.levels) for one in videos], dtype=torch.long)
        return inputs

    def check_room(self, max_length: int) -> None:
        """Refuse a length into which not even the smallest image fits.

        Raises:
            ConfigError: With both numbers.
        """
        # A square image of one tile is cut into the fewest.
        side = self._images.tile_size
        plans = [self._images.plan(side, side), self._images.plan(1, 1)] if self._images.tiles_images else [TilePlan()]
        layouts = [self._tokens.image(plan, tiled=self._images.tiles_images) for plan in plans]
        needed = min(sum(layout.runs) + len(layout.runs) * (2 if layout.text_after else 1) for layout in layouts)
        if needed >= max_length:
            raise ConfigError(
                f"max_length is {max_length}, but one image alone takes {needed} positions with tiling "
                f"'{self._images.image_aspect_ratio}'",
                f"use max_length={2 * needed} or more, or tiling none",
            )

    def _plan(self, size: MediaSize) -> TilePlan:
        return self._images.plan(*size) if self._images.tiles_images else TilePlan()

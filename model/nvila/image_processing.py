"""The image processor: images to normalised square tiles, tiled as the model was trained.

Resizing, cutting and scaling are the same steps for every mode, so that a data loader that
keeps tiles as bytes (`nvila.vision.tiling.cut_tiles`) gets the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from nvila.data.images import DEFAULT_LIMITS, load_image
from nvila.errors import DataError
from nvila.vision.tiling import TilePlan, TilingConfig, cut_tiles, plan_tiles

if TYPE_CHECKING:
    from PIL import Image

    from nvila.configuration import NVILAConfig

_Read = TypeVar("_Read")
_HALF = (0.5, 0.5, 0.5)
# Keys of what other image processors save; a SigLIP processor is this one with `resize`.
_SHARED = ("size", "image_mean", "image_std")
_TILED = ("dynamic", "dynamic_s2")


class NVILAImageProcessor(BaseImageProcessor):
    """Makes the tiles of images.

    Args:
        size: `{"height", "width"}` of a tile in pixels, equal to the image size of the tower.
        image_aspect_ratio: How an image becomes tiles, a name in `nvila.vision.tiling.TILINGS`.
        min_tiles: Fewest tiles of `dynamic`.
        max_tiles: Most tiles of `dynamic`, and of the last scale of `dynamic_s2`.
        s2_scales: Scales of `dynamic_s2` in pixels.
        image_mean: Mean of each channel, subtracted after scaling to [0, 1].
        image_std: Standard deviation of each channel.
        max_pixels: Larger images are refused before they are decoded.
        **kwargs: Kept as attributes.
    """

    model_input_names = ["pixel_values", "image_blocks"]  # noqa: RUF012  # declared so by the base class

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_aspect_ratio: str = "resize",
        min_tiles: int = 1,
        max_tiles: int = 12,
        s2_scales: Sequence[int] = (),
        image_mean: Sequence[float] = _HALF,
        image_std: Sequence[float] = _HALF,
        max_pixels: int = DEFAULT_LIMITS.max_pixels,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("image_processor_type", None)
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 448, "width": 448})
        self.image_aspect_ratio = image_aspect_ratio
        self.min_tiles, self.max_tiles = min_tiles, max_tiles
        self.s2_scales = list(s2_scales)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.max_pixels = max_pixels
        self.plan(1, 1)  # checks the values

    @classmethod
    def from_config(cls, config: NVILAConfig) -> NVILAImageProcessor:
        """Build the image processor that belongs to a model."""
        return cls(
            size={"height": config.tile_size, "width": config.tile_size},
            image_aspect_ratio=config.image_aspect_ratio,
            min_tiles=config.min_tiles,
            max_tiles=config.max_tiles,
            s2_scales=config.s2_scales if config.uses_s2 else (),
        )

    @classmethod
    def from_saved(cls, raw: dict[str, Any]) -> NVILAImageProcessor:
        """Rebuild from a saved dict; one of a SigLIP processor gives the `resize` mode."""
        if raw.get("image_processor_type", cls.__name__) != cls.__name__:
            raw = {key: raw[key] for key in _SHARED if key in raw}
        return cls(**raw)

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return int(self.size["height"])

    @property
    def tiling(self) -> TilingConfig:
        """How one image is cut."""
        scales = {"scales": tuple(self.s2_scales)} if self.s2_scales else {}
        return TilingConfig(self.image_aspect_ratio, self.tile_size, self.min_tiles, self.max_tiles, **scales)

    @property
    def tiles_images(self) -> bool:
        """Whether the mode cuts images into more than one tile."""
        return self.image_aspect_ratio in _TILED

    def plan(self, width: int, height: int, *, tile: bool = True) -> TilePlan:
        """Plan the tiles of an image of this size; `tile=False` gives the single tile of prompts with many images."""
        return plan_tiles(width, height, self.tiling if tile else self._single)

    def __call__(  # type: ignore[override]  # the base class takes what its backends take
        self, images: Any, *, tile: bool | Sequence[bool] = True, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Make the tiles of one or more images.

        Args:
            images: Anything `nvila.data.images.load_image` reads, or a list of such.
            tile: Whether to tile, for all images or for each.
            return_tensors: Only "pt".
            **kwargs: Ignored, for callers that pass arguments of other image processors.

        Returns:
            `pixel_values` (T, 3, size, size), and for `dynamic_s2` `image_blocks` (images, 2): columns and rows of
            the last scale, 0 for an image that was not tiled.

        Raises:
            DataError: An image cannot be read.
        """
        sources = list(images) if isinstance(images, list | tuple) else [images]
        tiled = [tile] * len(sources) if isinstance(tile, bool) else list(tile)
        loaded = self.load_all(sources)
        plans = [self.plan(*image.size, tile=one) for image, one in zip(loaded, tiled, strict=True)]
        return BatchFeature(self.tensors(loaded, plans))

    preprocess = __call__

    def load(self, source: Any) -> Image.Image:
        """Read one image as upright RGB.

        Raises:
            DataError: It cannot be read, or has more than `max_pixels`.
        """
        return load_image(source, max_pixels=self.max_pixels)

    def load_all(self, sources: Sequence[Any]) -> list[Image.Image]:
        """Read several images.

        Raises:
            DataError: One cannot be read; the message says which.
        """
        return [
            named(partial(self.load, source), "image", number, len(sources))
            for number, source in enumerate(sources, start=1)
        ]

    def tensors(self, images: Sequence[Image.Image], plans: Sequence[TilePlan]) -> dict[str, Tensor]:
        """Make the model's inputs from RGB images and their plans."""
        data = {"pixel_values": self.pixel_values(images, plans)}
        if self.image_aspect_ratio == "dynamic_s2":
            data["image_blocks"] = torch.tensor([plan.block or (0, 0) for plan in plans], dtype=torch.long)
        return data

    def pixel_values(self, images: Sequence[Image.Image], plans: Sequence[TilePlan]) -> Tensor:
        """Cut RGB images as planned and normalise their tiles to (T, 3, size, size)."""
        return self.normalise(torch.cat([self.tile_levels(*one) for one in zip(images, plans, strict=True)]))

    def tile_levels(self, image: Image.Image, plan: TilePlan) -> Tensor:
        """Cut one RGB image as planned into tiles of bytes (T, 3, size, size), which `normalise` takes."""
        return cut_tiles(image, plan, self._single if _is_single(plan) else self.tiling)

    def normalise(self, tiles_T3HW: Tensor) -> Tensor:
        """Scale bytes to what the tower takes: [-1, 1] with the usual mean and deviation of one half."""
        std = 255 * torch.tensor(self.image_std).view(3, 1, 1)
        offset = torch.tensor(self.image_mean).view(3, 1, 1) / torch.tensor(self.image_std).view(3, 1, 1)
        return tiles_T3HW.float().div_(std).sub_(offset)

    @property
    def _single(self) -> TilingConfig:
        return TilingConfig("pad" if self.image_aspect_ratio == "pad" else "resize", self.tile_size)


def named(read: Callable[[], _Read], kind: str, number: int, count: int) -> _Read:
    """Read one medium of several, and say which it was if that fails."""
    try:
        return read()
    except DataError as e:
        if count == 1:
            raise
        raise DataError(f"{kind} {number} of {count}: {e.message}", e.hint) from e


def flat_images(images: Any) -> list[Any]:
    """Flatten one image, a list of images, or a list of images for every text."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for one in images for image in (one if isinstance(one, list | tuple) else [one])]


def _is_single(plan: TilePlan) -> bool:
    return plan.num_tiles == 1 and plan.block is None

"""Cutting an image into square tiles: which grid fits its shape, and the pixels of every tile.

Four ways (paper section 2.1, spatial scaling): `resize` and `pad` make one tile; `dynamic` (NVILA-Lite) picks the grid
whose shape is nearest to the image's and adds the whole image as a thumbnail; `dynamic_s2` (NVILA) looks at the image
at several scales and lets only the largest one follow its shape. Planning needs the size of the image and no pixels,
which is what makes counting tokens cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nvila.errors import ConfigError, DataError, nearest
from nvila.vision.resampling import levels, resample

if TYPE_CHECKING:
    from PIL import Image

TILINGS = ("resize", "pad", "dynamic", "dynamic_s2")
# The mean of the released image processors, 0.5, as a byte.
PAD_COLOR = (127, 127, 127)


class Grid(NamedTuple):
    """How many tiles an image has across and down."""

    columns: int
    rows: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the grid."""
        return self.columns * self.rows


@dataclass(frozen=True, slots=True)
class TilingConfig:
    """How images are cut.

    Args:
        mode: One of `TILINGS`.
        tile_size: Side of a tile in pixels: the image size of the vision tower.
        min_tiles: Fewest tiles of a `dynamic` grid.
        max_tiles: Most tiles of a `dynamic` grid, and of the last scale of `dynamic_s2`.
        scales: Sides in pixels of the scales of `dynamic_s2`, rising, each a multiple of `tile_size`. The last one
            sets the fewest tiles of the last scale: `(scales[-1] // tile_size) ** 2`.

    Raises:
        ConfigError: A value is out of range or does not fit another.
    """

    mode: str
    tile_size: int
    min_tiles: int = 1
    max_tiles: int = 12
    scales: tuple[int, ...] = (448, 896, 1344)

    def __post_init__(self) -> None:
        if self.mode not in TILINGS:
            raise ConfigError(f"unknown tiling '{self.mode}'", nearest(self.mode, TILINGS))
        if self.tile_size < 1:
            raise ConfigError(f"tile_size is {self.tile_size}", "use the image size of the vision tower")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(
                f"min_tiles {self.min_tiles} and max_tiles {self.max_tiles} leave no grid",
                "use 1 <= min_tiles <= max_tiles",
            )
        if self.mode == "dynamic_s2":
            check_scales(self.scales, self.tile_size)
            if self.last_scale_min > self.max_tiles:
                raise ConfigError(
                    f"the last scale of {self.scales[-1]} pixels needs {self.last_scale_min} tiles of "
                    f"{self.tile_size}, more than max_tiles {self.max_tiles}",
                    f"raise max_tiles to {self.last_scale_min} or more",
                )

    @property
    def last_scale_min(self) -> int:
        """Fewest tiles of the last scale of `dynamic_s2`."""
        return (self.scales[-1] // self.tile_size) ** 2


@dataclass(frozen=True, slots=True)
class TilePlan:
    """The tiles of one image, in the order in which they are cut.

    Args:
        grids: Grids that the whole image is laid on, one after the other: one per scale for `dynamic_s2`; the grid and
            then the thumbnail, `Grid(1, 1)`, for `dynamic` with more than one tile; a single `Grid(1, 1)` otherwise.
        block: Grid of the last scale, for `dynamic_s2` only.
    """

    grids: tuple[Grid, ...] = (Grid(1, 1),)
    block: Grid | None = None

    @property
    def num_tiles(self) -> int:
        """Tiles of the image, over all grids."""
        return sum(grid.num_tiles for grid in self.grids)


def check_scales(scales: tuple[int, ...], tile_size: int) -> None:
    """Check that tiles of `tile_size` cover every scale exactly.

    Raises:
        ConfigError: There are no scales, they do not rise, or one is no multiple of the tile.
    """
    if not scales or list(scales) != sorted(set(scales)) or scales[0] < 1:
        raise ConfigError(f"scales {list(scales)} do not rise", "list at least one scale, smallest first")
    for scale in scales:
        if scale % tile_size:
            raise ConfigError(
                f"scale {scale} is no multiple of the tile of {tile_size} pixels",
                f"use multiples of the tower's image size, such as {tile_size},{2 * tile_size},{3 * tile_size}",
            )


@lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """Return every grid of `min_tiles` to `max_tiles` tiles, fewest tiles first."""
    grids = [
        Grid(columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: (grid.num_tiles, grid.columns)))


def choose_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> Grid:
    """Choose the grid whose shape is nearest to the image's.

    Nearest means the smallest `|width / height - columns / rows|`. Of equally near grids the larger one is taken when
    the image has more than half of its pixels.

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        min_tiles: Fewest tiles.
        max_tiles: Most tiles.
        tile_size: Side of a tile in pixels.

    Raises:
        DataError: The image has no pixels.

    Example:
        >>> choose_grid(1920, 1080, 1, 12, 448)
        Grid(columns=4, rows=2)
    """
    if width < 1 or height < 1:
        raise DataError(f"an image of {width}x{height} pixels cannot be cut", "leave empty images out")
    aspect = width / height
    best, best_distance = Grid(1, 1), float("inf")
    for grid in candidate_grids(min_tiles, max_tiles):
        distance = abs(aspect - grid.columns / grid.rows)
        tie = distance == best_distance and width * height > 0.5 * tile_size**2 * grid.num_tiles
        if distance < best_distance or tie:
            best, best_distance = grid, distance
    return best


def plan_tiles(width: int, height: int, config: TilingConfig) -> TilePlan:
    """Plan the tiles of an image of `width` x `height` pixels.

    Raises:
        DataError: The image has no pixels.
    """
    if config.mode == "dynamic":
        grid = choose_grid(width, height, config.min_tiles, config.max_tiles, config.tile_size)
        return TilePlan((grid, Grid(1, 1)) if grid.num_tiles > 1 else (grid,))
    if config.mode == "dynamic_s2":
        block = choose_grid(width, height, config.last_scale_min, config.max_tiles, config.tile_size)
        sides = [scale // config.tile_size for scale in config.scales[:-1]]
        return TilePlan((*(Grid(side, side) for side in sides), block), block)
    if width < 1 or height < 1:
        raise DataError(f"an image of {width}x{height} pixels cannot be cut", "leave empty images out")
    return TilePlan()


def cut_tiles(image: Image.Image, plan: TilePlan, config: TilingConfig) -> Tensor:
    """Cut an image as planned.

    Every grid of the plan shows the whole image, warped to the grid with bicubic resampling and cut row by row.
    `pad` keeps the shape of the image and fills the rest of the tile with grey.

    Args:
        image: RGB image.
        plan: Result of `plan_tiles` for the size of this image.
        config: The tiling that made the plan.

    Returns:
        Bytes of shape (plan.num_tiles, 3, tile_size, tile_size).

    Raises:
        DataError: The image is not RGB.
    """
    if image.mode != "RGB":
        raise DataError(f"tiles are cut from RGB images, got mode '{image.mode}'", "convert the image to RGB first")
    return cut_levels(levels(image), plan, config)


def cut_levels(levels_HW3: Tensor, plan: TilePlan, config: TilingConfig) -> Tensor:
    """Cut a picture of bytes (height, width, 3) as `cut_tiles` cuts an image."""
    size = config.tile_size
    # numpy places tiles, because torch would wake all its threads for copies this small.
    tiles = np.empty((plan.num_tiles, 3, size, size), np.uint8)
    start = 0
    for grid in plan.grids:
        if config.mode == "pad":
            laid_3HW = _fit(levels_HW3, size)
        else:
            laid_3HW = resample(levels_HW3, grid.columns * size, grid.rows * size)
        # (3, rows, size, columns, size) -> (rows, columns, 3, size, size)
        cells = laid_3HW.numpy().reshape(3, grid.rows, size, grid.columns, size).transpose(1, 3, 0, 2, 4)
        tiles[start : start + grid.num_tiles].reshape(grid.rows, grid.columns, 3, size, size)[:] = cells
        start += grid.num_tiles
    return torch.from_numpy(tiles)


def _fit(levels_HW3: Tensor, size: int) -> Tensor:
    """Centre a picture on a grey tile. Scaled before padding: a strip of 1x20000 would else be padded to 400 MP."""
    longest = max(levels_HW3.shape[:2])
    height, width = (max(1, round(side * size / longest)) for side in levels_HW3.shape[:2])
    tile = torch.tensor(PAD_COLOR, dtype=torch.uint8).view(3, 1, 1).repeat(1, size, size)
    top, left = (size - height) // 2, (size - width) // 2
    tile[:, top : top + height, left : left + width] = resample(levels_HW3, width, height)
    return tile

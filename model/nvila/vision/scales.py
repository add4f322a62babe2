"""Bringing the scales of an image together: features of its tiles become maps, maps become channels (Dynamic-S2).

Images are handled in groups of equal grid, so the cost of a batch grows with its tiles and no loop runs over tokens.

Shape suffixes: B images of a group, T tiles, N tokens of a tile, n its side, R rows of tiles, L columns of tiles,
C channels of the tower, H width of the language model, Y and X sides of a map in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn

from nvila.errors import ConfigError, DataError
from nvila.vision.tiling import Grid, check_scales


def merge_scales(
    features_TNC: Tensor,
    blocks: Sequence[Grid | None],
    scales: Sequence[int],
    tile_size: int,
    output_index: int = -1,
) -> tuple[Tensor, list[Grid]]:
    """Merge the scales of every image into the channels of one grid of tiles (paper section 2.1, Dynamic-S2).

    The tiles of each scale are put together to a map, every map is averaged or repeated to the size of the map at
    `output_index`, the maps are joined along channels, smallest scale first, and the result is cut into tiles again.
    An image that was not tiled has one tile, whose features stand in for all scales.

    Args:
        features_TNC: Features of the tiles of all images in order, tokens of a tile row by row.
        blocks: Grid of the last scale of each image; None for an image (or video frame) of a single tile.
        scales: Sides of the scales in pixels.
        tile_size: Side of a tile in pixels.
        output_index: Which scale sets the size of the result.

    Returns:
        Tiles of shape (T', N, C * len(scales)) and the grid of each image.

    Raises:
        ConfigError: The scales do not fit the tile, or `output_index` names none of them.
        DataError: The tiles are not those that `blocks` describe, or are not square.
    """
    laid = _lay_out(blocks, scales, tile_size, output_index)
    counts = [1 if grids is None else sum(grid.num_tiles for grid in grids) for grids in laid]
    if sum(counts) != len(features_TNC):
        raise DataError(
            f"{len(blocks)} images have {sum(counts)} tiles by their grids, got features of {len(features_TNC)}",
            "pass the pixels and the grids of one call of the processor",
        )
    _side(features_TNC)
    out_grids = [Grid(1, 1) if grids is None else grids[output_index] for grids in laid]
    starts = _starts(counts)
    parts: dict[int, Tensor] = {}
    for grids in dict.fromkeys(laid):
        members = [index for index, other in enumerate(laid) if other == grids]
        group = _gather(features_TNC, [starts[i] for i in members], counts[members[0]])
        merged = group.repeat(1, 1, 1, len(scales)) if grids is None else _merge_group(group, grids, output_index)
        if len(members) == len(blocks):
            return merged.flatten(0, 1), out_grids
        parts.update(zip(members, merged.unbind(0), strict=True))
    if not parts:
        return features_TNC.repeat(1, 1, len(scales)), []
    return torch.cat([parts[index] for index in range(len(blocks))]), out_grids


def tiles_to_raster(projected_TNH: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Reorder projected tokens from tile by tile to row by row over each whole image.

    Args:
        projected_TNH: Projected tiles of all images in order, as `merge_scales` lays them out.
        grids: Grid of each image.

    Returns:
        Tokens of shape (T * N, H), image after image; an image of grid g has `g.num_tiles * N` of them.

    Raises:
        DataError: The tiles are not those that `grids` describe, or are not square.
    """
    counts = [grid.num_tiles for grid in grids]
    if sum(counts) != len(projected_TNH):
        raise DataError(
            f"{len(grids)} images have {sum(counts)} tiles by their grids, got {len(projected_TNH)}",
            "pass the grids that merge_scales returned",
        )
    n = _side(projected_TNH)
    flat = projected_TNH.flatten(0, 1)
    if all(grid.columns == 1 for grid in grids):
        return flat  # tiles below each other are in raster order already
    orders = {grid: _raster_order(grid, n) for grid in set(grids)}
    starts = _starts(counts)
    order = torch.cat([orders[grid] + start * n * n for grid, start in zip(grids, starts, strict=True)])
    return flat.index_select(0, order.to(flat.device))


def merge_tiles(tiles_BTNC: Tensor, grid: Grid) -> Tensor:
    """Lay tiles of n x n tokens on a grid: (B, rows * columns, N, C) to a map (B, rows * n, columns * n, C)."""
    b, _, tokens, c = tiles_BTNC.shape
    n = isqrt(tokens)
    # (B, R, L, n, n, C) -> (B, R, n, L, n, C)
    cells = tiles_BTNC.reshape(b, grid.rows, grid.columns, n, n, c).transpose(2, 3)
    return cells.reshape(b, grid.rows * n, grid.columns * n, c)


def split_tiles(map_BYXC: Tensor, grid: Grid) -> Tensor:
    """Cut a map into the tiles of a grid; the inverse of `merge_tiles`."""
    b, y, x, c = map_BYXC.shape
    n_y, n_x = y // grid.rows, x // grid.columns
    cells = map_BYXC.reshape(b, grid.rows, n_y, grid.columns, n_x, c).transpose(2, 3)
    return cells.reshape(b, grid.num_tiles, n_y * n_x, c)


def _lay_out(
    blocks: Sequence[Grid | None], scales: Sequence[int], tile_size: int, output_index: int
) -> list[tuple[Grid, ...] | None]:
    """Return the grids of all scales of each image; None for a single tile."""
    check_scales(tuple(scales), tile_size)
    if not -len(scales) <= output_index < len(scales):
        raise ConfigError(
            f"s2_resize_output_to_scale_idx {output_index} does not exist among {len(scales)} scales", "use -1"
        )
    fixed = [Grid(scale // tile_size, scale // tile_size) for scale in scales[:-1]]
    return [None if block is None else (*fixed, block) for block in blocks]


def _merge_group(group_BTNC: Tensor, grids: tuple[Grid, ...], output_index: int) -> Tensor:
    tiles = group_BTNC.split([grid.num_tiles for grid in grids], dim=1)
    maps = [merge_tiles(part, grid) for part, grid in zip(tiles, grids, strict=True)]
    y, x = maps[output_index].shape[1:3]
    return split_tiles(torch.cat([_resample(part, y, x) for part in maps], dim=-1), grids[output_index])


def _resample(map_BYXC: Tensor, y: int, x: int) -> Tensor:
    """Average or repeat a map to y x x tokens: adaptive average pooling, which runs in float32."""
    if map_BYXC.shape[1:3] == (y, x):
        return map_BYXC
    # The view keeps channels innermost in memory, which pooling accepts as it is.
    wide = map_BYXC.permute(0, 3, 1, 2).float()
    return nn.functional.adaptive_avg_pool2d(wide, (y, x)).permute(0, 2, 3, 1).to(map_BYXC.dtype)


def _gather(features_TNC: Tensor, starts: list[int], count: int) -> Tensor:
    """Stack runs of `count` tiles: (B, count, N, C); a view when the runs follow each other."""
    first = starts[0]
    if starts == [first + count * i for i in range(len(starts))]:
        _, tokens, c = features_TNC.shape
        return features_TNC[first : first + count * len(starts)].reshape(len(starts), count, tokens, c)
    index = torch.tensor(starts)[:, None] + torch.arange(count)
    return features_TNC[index.to(features_TNC.device)]


def _raster_order(grid: Grid, n: int) -> Tensor:
    """Positions, in a tile-by-tile list of tokens, of the tokens of the image row by row."""
    positions = torch.arange(grid.num_tiles * n * n).view(1, grid.num_tiles, n * n, 1)
    return merge_tiles(positions, grid).flatten()


def _starts(counts: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return starts


def _side(tiles_TNC: Tensor) -> int:
    tokens = tiles_TNC.shape[1]
    n = isqrt(tokens)
    if n * n != tokens:
        raise DataError(f"a tile of {tokens} tokens is not square", "use a tower of square images without extra tokens")
    return n

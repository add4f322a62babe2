from __future__ import annotations

from math import ceil, floor

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.errors import ConfigError, DataError
from nvila.vision.scales import merge_scales, merge_tiles, split_tiles, tiles_to_raster
from nvila.vision.tiling import Grid

Array = npt.NDArray[np.float32]
SCALES = (448, 896, 1344)
GRIDS = st.builds(Grid, st.integers(1, 4), st.integers(1, 4))


def chessboard(tiles: Array, columns: int, rows: int) -> Array:
    n = int(tiles.shape[1] ** 0.5)
    squares = [tile.reshape(n, n, -1) for tile in tiles]
    return np.concatenate(
        [np.concatenate(squares[row * columns : (row + 1) * columns], axis=1) for row in range(rows)], axis=0
    )


def area(source: Array, y: int, x: int) -> Array:
    """Average over the uneven windows floor(i * n / m) .. ceil((i + 1) * n / m), one position at a time."""
    in_y, in_x, c = source.shape
    out = np.zeros((y, x, c), dtype=np.float32)
    for i in range(y):
        for j in range(x):
            window = source[
                floor(i * in_y / y) : ceil((i + 1) * in_y / y), floor(j * in_x / x) : ceil((j + 1) * in_x / x)
            ]
            out[i, j] = window.mean(axis=(0, 1), dtype=np.float64)
    return out


def merged_by_hand(features: Array, grids: list[Grid], output_index: int) -> Array:
    """One image: lay out every scale, resample, join channels and cut, with loops."""
    n = int(features.shape[1] ** 0.5)
    maps, start = [], 0
    for grid in grids:
        maps.append(chessboard(features[start : start + grid.num_tiles], *grid))
        start += grid.num_tiles
    target = grids[output_index]
    joined = np.concatenate([area(part, target.rows * n, target.columns * n) for part in maps], axis=2)
    return np.stack(
        [
            joined[row * n : (row + 1) * n, column * n : (column + 1) * n].reshape(n * n, -1)
            for row in range(target.rows)
            for column in range(target.columns)
        ]
    )


def features_of(tiles: int, n: int = 2, c: int = 3) -> torch.Tensor:
    return torch.randn(tiles, n * n, c, generator=torch.Generator().manual_seed(tiles))


@pytest.mark.parametrize("output_index", [-1, 0, 1, 2])
@pytest.mark.parametrize("block", [Grid(3, 3), Grid(5, 2), Grid(1, 11), Grid(4, 3)])
def test_merging_equals_a_walk_over_every_position(block: Grid, output_index: int) -> None:
    features = features_of(5 + block.num_tiles)
    grids = [Grid(1, 1), Grid(2, 2), block]
    tiles, out = merge_scales(features, [block], SCALES, 448, output_index)
    np.testing.assert_allclose(tiles.numpy(), merged_by_hand(features.numpy(), grids, output_index), atol=1e-6)
    assert out == [grids[output_index]]


def test_uneven_upsampling_averages_neighbours() -> None:
    """64 positions to 160, as for five rows of tiles: the windows overlap and are not all of one width."""
    block = Grid(2, 5)
    features = features_of(5 + 10, n=32, c=1)
    tiles, _ = merge_scales(features, [block], SCALES, 448)
    source = chessboard(features[1:5].numpy(), 2, 2)
    got = chessboard(tiles[..., 1:2].numpy(), *block)
    for row in (0, 1, 2, 77, 159):
        window = source[floor(row * 64 / 160) : ceil((row + 1) * 64 / 160), 10:11]
        np.testing.assert_allclose(got[row, 10], window.mean(axis=(0, 1)), atol=1e-6)


def test_scales_that_are_constant_fill_their_own_channels() -> None:
    values = [1.0] + [2.0] * 4 + [3.0] * 12
    features = torch.tensor(values).view(17, 1, 1).expand(17, 4, 2)
    tiles, _ = merge_scales(features, [Grid(4, 3)], SCALES, 448)
    assert tiles.shape == (12, 4, 6)
    assert (tiles == torch.tensor([1.0, 1, 2, 2, 3, 3])).all()


def test_image_of_one_tile_stands_in_for_every_scale() -> None:
    features = features_of(2)
    tiles, grids = merge_scales(features, [None, None], SCALES, 448)
    assert torch.equal(tiles, torch.cat([features] * 3, dim=-1))
    assert grids == [Grid(1, 1), Grid(1, 1)]


@given(blocks=st.lists(st.none() | st.sampled_from([Grid(3, 3), Grid(5, 2), Grid(2, 5)]), min_size=1, max_size=7))
@settings(max_examples=30, deadline=None)
def test_a_batch_gives_what_its_images_give_alone_in_their_order(blocks: list[Grid | None]) -> None:
    counts = [1 if block is None else 5 + block.num_tiles for block in blocks]
    features = features_of(sum(counts))
    together, grids = merge_scales(features, blocks, SCALES, 448)
    alone = [merge_scales(part, [block], SCALES, 448) for part, block in zip(features.split(counts), blocks)]  # noqa: B905
    assert torch.equal(together, torch.cat([tiles for tiles, _ in alone]))
    assert grids == [grid for _, (grid,) in alone]


@given(grid=GRIDS, n=st.integers(1, 3), b=st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_merge_then_split_is_the_identity(grid: Grid, n: int, b: int) -> None:
    tiles = torch.arange(b * grid.num_tiles * n * n * 2.0).view(b, grid.num_tiles, n * n, 2)
    merged = merge_tiles(tiles, grid)
    np.testing.assert_array_equal(merged[0].numpy(), chessboard(tiles[0].numpy(), *grid))
    assert torch.equal(split_tiles(merged, grid), tiles)


@given(grids=st.lists(GRIDS, max_size=4), n=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_raster_order_runs_over_the_whole_image(grids: list[Grid], n: int) -> None:
    tiles = torch.arange(sum(g.num_tiles for g in grids) * n * n * 1.0).view(-1, n * n, 1)
    expected = [
        chessboard(part.numpy(), *grid).reshape(-1, 1)
        for part, grid in zip(tiles.split([g.num_tiles for g in grids]), grids)  # noqa: B905
    ]
    np.testing.assert_array_equal(tiles_to_raster(tiles, grids).numpy(), np.concatenate([np.zeros((0, 1)), *expected]))


@pytest.mark.parametrize(("block", "tokens"), [((3, 3), 2304), ((5, 2), 2560), ((1, 11), 2816), ((4, 3), 3072)])
def test_image_has_as_many_tokens_as_published(block: tuple[int, int], tokens: int) -> None:
    from nvila.vision.projectors import space_to_channel

    grid = Grid(*block)
    tiles, grids = merge_scales(torch.zeros(5 + grid.num_tiles, 1024, 1), [grid], SCALES, 448)
    assert tiles.shape == (grid.num_tiles, 1024, 3)
    assert tiles_to_raster(space_to_channel(tiles, 2), grids).shape == (tokens, 12)


def test_any_tile_size_and_number_of_scales_works() -> None:
    tiles, grids = merge_scales(features_of(1 + 4 + 16 + 18), [Grid(6, 3)], (32, 64, 128, 128 + 32), 32)
    assert (tiles.shape, grids) == ((18, 4, 12), [Grid(6, 3)])


def test_narrow_types_are_averaged_wide_and_given_back() -> None:
    features = features_of(5 + 9).bfloat16()
    tiles, _ = merge_scales(features, [Grid(3, 3)], SCALES, 448)
    wide, _ = merge_scales(features.float(), [Grid(3, 3)], SCALES, 448)
    assert torch.equal(tiles, wide.bfloat16())


def test_gradient_reaches_every_tile() -> None:
    features = features_of(1 + 15 + 14).requires_grad_()
    tiles, grids = merge_scales(features, [None, Grid(5, 2), Grid(3, 3)], SCALES, 448)
    tiles_to_raster(tiles, grids).square().sum().backward()
    assert features.grad is not None
    assert (features.grad != 0).all()


def test_no_images_give_no_tokens() -> None:
    tiles, grids = merge_scales(torch.zeros(0, 4, 2), [], SCALES, 448)
    assert (tiles.shape, grids) == ((0, 4, 6), [])
    assert tiles_to_raster(tiles, grids).shape == (0, 6)


def test_tiles_that_do_not_belong_to_the_grids_are_refused() -> None:
    with pytest.raises(DataError, match=r"2 images have 15 tiles by their grids, got features of 14"):
        merge_scales(features_of(14), [None, Grid(3, 3)], SCALES, 448)
    with pytest.raises(DataError, match=r"1 images have 9 tiles by their grids, got 8"):
        tiles_to_raster(features_of(8), [Grid(3, 3)])


def test_tiles_that_are_not_square_are_refused() -> None:
    with pytest.raises(DataError, match="a tile of 5 tokens is not square"):
        merge_scales(torch.zeros(1, 5, 2), [None], SCALES, 448)
    with pytest.raises(DataError, match="a tile of 5 tokens is not square"):
        tiles_to_raster(torch.zeros(1, 5, 2), [Grid(1, 1)])


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="scale 448 is no multiple of the tile of 300 pixels"):
        merge_scales(features_of(1), [None], SCALES, 300)
    with pytest.raises(ConfigError, match="s2_resize_output_to_scale_idx 3 does not exist among 3 scales"):
        merge_scales(features_of(1), [None], SCALES, 448, 3)

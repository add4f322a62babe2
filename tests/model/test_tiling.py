from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvila.errors import ConfigError, DataError
from nvila.vision.tiling import (
    PAD_COLOR,
    TILINGS,
    Grid,
    TilePlan,
    TilingConfig,
    candidate_grids,
    choose_grid,
    cut_tiles,
    plan_tiles,
)

LITE = TilingConfig("dynamic", 448)
S2 = TilingConfig("dynamic_s2", 448)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("sizes", "lite_grid", "lite_tiles", "s2_grid", "s2_tiles"),
    [
        ([(336, 336), (448, 448)], (1, 1), 1, (3, 3), 14),
        ([(1000, 1000), (1344, 1344)], (3, 3), 10, (3, 3), 14),
        ([(320, 240), (640, 480), (1024, 768)], (4, 3), 13, (4, 3), 17),
        ([(1920, 1080)], (4, 2), 9, (4, 3), 17),
        ([(2000, 1000)], (4, 2), 9, (5, 2), 15),
    ],
    ids=["small-square", "large-square", "4:3", "16:9", "2:1"],
)
def test_tiles_are_those_that_the_published_models_choose(
    sizes: list[tuple[int, int]],
    lite_grid: tuple[int, int],
    lite_tiles: int,
    s2_grid: tuple[int, int],
    s2_tiles: int,
) -> None:
    for width, height in sizes:
        lite, s2 = plan_tiles(width, height, LITE), plan_tiles(width, height, S2)
        assert (lite.grids[0], lite.num_tiles, lite.block) == (lite_grid, lite_tiles, None)
        assert (s2.block, s2.num_tiles) == (s2_grid, s2_tiles)
        assert s2.grids == ((1, 1), (2, 2), s2_grid)


def test_thumbnail_comes_last_and_only_with_more_than_one_tile() -> None:
    assert plan_tiles(300, 300, LITE) == TilePlan((Grid(1, 1),))
    assert plan_tiles(900, 450, LITE).grids[-1] == Grid(1, 1)


def nearest_grid(width: int, height: int, fewest: int, most: int, size: int) -> tuple[int, int]:
    """The same choice, told as filters: nearest shapes first, then the largest that the area allows."""
    pairs = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if fewest <= i * j <= most]
    distance = {(i, j): abs(width / height - i / j) for i, j in pairs}
    near = sorted((p for p in pairs if distance[p] == min(distance.values())), key=lambda p: p[0] * p[1])
    large_enough = [p for p in near[1:] if 2 * width * height > size * size * p[0] * p[1]]
    return large_enough[-1] if large_enough else near[0]


@given(
    width=st.integers(1, 20000), height=st.integers(1, 20000), fewest=st.integers(1, 9), size=st.sampled_from([56, 448])
)
@settings(max_examples=200, deadline=None)
def test_choice_equals_the_rule_told_another_way(width: int, height: int, fewest: int, size: int) -> None:
    assert choose_grid(width, height, fewest, 12, size) == nearest_grid(width, height, fewest, 12, size)


@pytest.mark.parametrize(
    ("side", "grid"), [(448, (1, 1)), (633, (1, 1)), (634, (2, 2)), (950, (2, 2)), (951, (3, 3)), (5000, (3, 3))]
)
def test_equally_near_grids_are_decided_by_half_of_their_area(side: int, grid: tuple[int, int]) -> None:
    assert choose_grid(side, side, 1, 12, 448) == grid


def test_choice_is_not_symmetric_in_orientation() -> None:
    assert choose_grid(1150, 1000, 1, 12, 448) == (3, 3)
    assert choose_grid(1000, 1150, 1, 12, 448) == (3, 4)


def test_candidates_are_as_many_as_published() -> None:
    assert len(candidate_grids(1, 12)) == 35
    assert len({columns / rows for columns, rows in candidate_grids(1, 12)}) == 29
    assert len(candidate_grids(9, 12)) == 15


@pytest.mark.parametrize("mode", TILINGS)
@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes_are_cut_as_planned(mode: str, size: tuple[int, int]) -> None:
    config = TilingConfig(mode, 28, scales=(28, 56, 84))
    plan = plan_tiles(*size, config)
    tiles = cut_tiles(Image.new("RGB", size, (10, 20, 30)), plan, config)
    assert tiles.shape == (plan.num_tiles, 3, 28, 28)
    assert tiles.dtype == torch.uint8
    if mode != "pad":
        assert torch.equal(tiles, torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand_as(tiles))


def walk(image: Image.Image, grid: Grid, size: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    # Columns first, whatever Pillow thinks is less work.
    laid = image.resize((grid.columns * size, image.height), Image.Resampling.BICUBIC)
    laid = laid.resize((grid.columns * size, grid.rows * size), Image.Resampling.BICUBIC)
    boxes = [
        (column * size, row * size, (column + 1) * size, (row + 1) * size)
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]
    return [np.asarray(laid.crop(box)).transpose(2, 0, 1) for box in boxes]


@pytest.mark.parametrize("mode", ["resize", "dynamic", "dynamic_s2"])
@pytest.mark.parametrize("size", [(70, 40), (31, 90), (84, 84), (16, 16)])
def test_pixels_are_those_of_crops_taken_one_by_one(mode: str, size: tuple[int, int]) -> None:
    config = TilingConfig(mode, 16, scales=(16, 32, 48))
    image = noise(*size)
    plan = plan_tiles(*size, config)
    expected = [tile for grid in plan.grids for tile in walk(image, grid, 16)]
    apart = np.abs(cut_tiles(image, plan, config).numpy().astype(int) - np.stack(expected))
    assert apart.max() <= 2
    assert (apart > 0).mean() < 0.02


def test_untiled_image_of_a_tiling_model_is_one_tile() -> None:
    assert torch.equal(cut_tiles(noise(40, 30), TilePlan(), S2), cut_tiles(noise(40, 30), TilePlan(), LITE))


def test_padding_keeps_the_shape_and_centres_it() -> None:
    config = TilingConfig("pad", 16)
    tiles = cut_tiles(Image.new("RGB", (40, 20), (255, 0, 0)), plan_tiles(40, 20, config), config)
    grey = torch.tensor(PAD_COLOR, dtype=torch.uint8)
    assert (tiles[0, :, :4] == grey.view(3, 1, 1)).all()
    assert (tiles[0, :, 12:] == grey.view(3, 1, 1)).all()
    assert (tiles[0, :, 4:12] == torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)).all()


def test_pixels_can_be_written() -> None:
    tiles = cut_tiles(noise(16, 16), TilePlan(), TilingConfig("resize", 16))
    tiles.zero_()
    assert not tiles.any()


@pytest.mark.parametrize("mode", TILINGS)
def test_image_without_pixels_is_refused(mode: str) -> None:
    with pytest.raises(DataError, match="0x5 pixels cannot be cut"):
        plan_tiles(0, 5, TilingConfig(mode, 448))


def test_image_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(DataError, match=r"mode 'L'.*convert the image to RGB"):
        cut_tiles(Image.new("L", (4, 4)), TilePlan(), LITE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mode": "dynamc", "tile_size": 448}, r"unknown tiling 'dynamc'.*did you mean 'dynamic'"),
        ({"mode": "resize", "tile_size": 0}, "tile_size is 0"),
        ({"mode": "dynamic", "tile_size": 448, "min_tiles": 0}, "min_tiles 0 and max_tiles 12"),
        ({"mode": "dynamic", "tile_size": 448, "min_tiles": 13}, "min_tiles 13 and max_tiles 12"),
        ({"mode": "dynamic_s2", "tile_size": 384}, r"scale 448 is no multiple .* 384.*384,768,1152"),
        ({"mode": "dynamic_s2", "tile_size": 448, "scales": (896, 448)}, "do not rise"),
        ({"mode": "dynamic_s2", "tile_size": 448, "scales": ()}, "do not rise"),
        ({"mode": "dynamic_s2", "tile_size": 448, "max_tiles": 8}, r"needs 9 tiles .* max_tiles 8.*to 9 or more"),
    ],
)
def test_tiling_that_cannot_work_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TilingConfig(**config)  # type: ignore[arg-type]  # wrong on purpose


def test_scales_matter_only_where_they_are_used() -> None:
    assert TilingConfig("dynamic", 384).tile_size == 384

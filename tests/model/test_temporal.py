from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.errors import ConfigError, DataError
from nvila.vision.temporal import (
    fps_indices,
    fps_times,
    frame_indices,
    num_video_tokens,
    pool_frames,
)


@pytest.mark.parametrize(
    ("in_file", "wanted", "indices"),
    [
        (100, 8, [0, 14, 28, 42, 57, 71, 85, 99]),
        (8, 8, list(range(8))),
        (3, 8, [0, 0, 1, 1, 1, 1, 2, 2]),
        (1, 4, [0, 0, 0, 0]),
        (50, 1, [0]),
        (6, 3, [0, 2, 5]),
    ],
    ids=["vector", "all", "short", "one-frame", "one-wanted", "half-to-even"],
)
def test_frames_are_spread_over_the_file(in_file: int, wanted: int, indices: list[int]) -> None:
    assert frame_indices(in_file, wanted) == indices


@given(in_file=st.integers(1, 10**6), wanted=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_frames_exist_rise_and_reach_both_ends(in_file: int, wanted: int) -> None:
    indices = frame_indices(in_file, wanted)
    assert len(indices) == wanted
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert wanted == 1 or indices[-1] == in_file - 1


def test_rate_does_not_stretch_to_the_end() -> None:
    assert fps_times(100.0, 2.0, 5) == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert fps_indices(3000, 30.0, 2.0, 5) == [0, 15, 30, 45, 60]


def test_short_video_gives_fewer_frames() -> None:
    assert fps_times(2.0, 1.0, 8) == [0.0, 1.0]
    assert fps_indices(60, 30.0, 1.0, 8) == [0, 30]
    assert fps_times(0.01, 1.0, 8) == [0.0]


@given(ten_fps=st.integers(1, 300), frames=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_moment_on_a_frame_boundary_shows_that_frame(ten_fps: int, frames: int) -> None:
    """Sampling a file at its own rate gives every frame once, whatever the rate."""
    rate = ten_fps / 10
    assert fps_indices(frames, rate, rate, frames + 5) == list(range(frames))


def test_rate_above_that_of_the_file_repeats_frames() -> None:
    assert fps_indices(3, 1.0, 2.0, 99) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: frame_indices(0, 8), DataError, "no frames"),
        (lambda: frame_indices(10, 0), ConfigError, "num_frames is 0"),
        (lambda: fps_indices(0, 30.0, 1.0, 8), DataError, "no frames"),
        (lambda: fps_indices(10, 0.0, 1.0, 8), DataError, r"rate of 0.0.*fps = 0"),
        (lambda: fps_indices(10, float("nan"), 1.0, 8), DataError, "rate of nan"),
        (lambda: fps_times(10.0, 0.0, 8), ConfigError, "fps is 0.0"),
        (lambda: fps_times(10.0, 1.0, 0), ConfigError, "num_frames is 0"),
    ],
)
def test_request_that_cannot_be_met_is_refused(call: object, error: type[Exception], message: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=message):
        call()


Array = npt.NDArray[np.float64]


def averaged_by_hand(frames: Array, pool: tuple[int, int, int]) -> Array:
    t, h, w = pool
    count, tokens, width = frames.shape
    n = int(tokens**0.5)
    grid = frames.reshape(count, n, n, width)
    return np.array(
        [
            [
                grid[g * t : (g + 1) * t, y * h : (y + 1) * h, x * w : (x + 1) * w].mean(axis=(0, 1, 2))
                for y in range(n // h)
                for x in range(n // w)
            ]
            for g in range(count // t)
        ]
    )


@pytest.mark.parametrize("pool", [(1, 1, 1), (4, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2), (8, 4, 4)])
def test_pooling_averages_blocks_of_time_and_space(pool: tuple[int, int, int]) -> None:
    features = torch.randn(8, 16, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (pooled,) = pool_frames(features, [pool])
    np.testing.assert_allclose(pooled.numpy(), averaged_by_hand(features.numpy(), pool), rtol=0, atol=1e-12)
    assert num_video_tokens(8, 4, [pool], line_feeds=False) == pooled.shape[0] * pooled.shape[1]


def test_no_pooling_changes_nothing() -> None:
    features = torch.randn(3, 9, 2)
    (pooled,) = pool_frames(features, [[1, 1, 1]])
    assert torch.equal(pooled, features)


def test_pyramid_gives_one_part_for_each_size() -> None:
    features = torch.randn(4, 4, 2)
    whole, coarse = pool_frames(features, [[1, 1, 1], [4, 2, 2]])
    assert torch.equal(whole, features)
    torch.testing.assert_close(coarse, features.mean(dim=(0, 1)).view(1, 1, 2))
    assert num_video_tokens(4, 2, [[1, 1, 1], [4, 2, 2]]) == 4 * (4 + 1) + 1 * (1 + 1)


@pytest.mark.parametrize(
    ("frames", "pool", "visual", "positions"),
    [(256, 8, 8192, 8224), (32, 4, 2048, 2056), (32, 1, 8192, 8224), (8, 1, 2048, 2056)],
)
def test_videos_have_as_many_tokens_as_published(frames: int, pool: int, visual: int, positions: int) -> None:
    assert num_video_tokens(frames, 16, [[pool, 1, 1]], line_feeds=False) == visual
    assert num_video_tokens(frames, 16, [[pool, 1, 1]]) == positions


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ([8, 1, 1], r"pool size \[8, 1, 1\] does not divide 12 frames.*a multiple of 8"),
        ([1, 2, 1], r"pool size \[1, 2, 1\] does not divide a frame of 3x3 tokens"),
        ([1, 1, 2], r"pool size \[1, 1, 2\] does not divide a frame of 3x3 tokens"),
        ([0, 1, 1], r"video_pool_sizes \[\[0, 1, 1\]\] are no blocks"),
        ([8, 1], r"video_pool_sizes \[\[8, 1\]\] are no blocks"),
    ],
)
def test_block_that_does_not_divide_is_refused(pool: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pool_frames(torch.zeros(12, 9, 1), [pool])
    with pytest.raises(ConfigError, match=message):
        num_video_tokens(12, 3, [pool])


def test_no_pool_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"video_pool_sizes \[\]"):
        num_video_tokens(8, 4, [])


def test_frame_that_is_not_square_is_refused() -> None:
    with pytest.raises(DataError, match="a frame of 5 tokens is not square"):
        pool_frames(torch.zeros(2, 5, 1), [[1, 1, 1]])

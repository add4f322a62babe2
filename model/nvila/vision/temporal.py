"""Time: which frames of a video are looked at, and how their visual tokens are averaged.

Scale, then compress: many frames are sampled and groups of them pooled after the projector (paper section 2.1,
temporal scaling and compression).

Shape suffixes: T frames, N tokens of a frame, H width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isqrt
from typing import TYPE_CHECKING

import numpy as np

from nvila.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

# A sampled moment k / fps that falls on a frame boundary must not land before it by rounding of floats.
_BOUNDARY = 1e-6


def frame_indices(num_frames_in_file: int, num_frames: int) -> list[int]:
    """Spread `num_frames` evenly over a file, first and last frame included.

    A file with fewer frames gives some of them more than once, so the result always has `num_frames` entries.

    Raises:
        DataError: The file has no frames.
        ConfigError: Fewer than one frame is asked for.

    Example:
        >>> frame_indices(100, 8)
        [0, 14, 28, 42, 57, 71, 85, 99]
    """
    _check_request(num_frames_in_file, num_frames)
    # Half to even, as numpy rounds: the frames that the released models were trained on.
    return [int(index) for index in np.round(np.linspace(0, num_frames_in_file - 1, num_frames))]


def fps_times(duration_s: float, fps: float, num_frames: int) -> list[float]:
    """Return the moments 0, 1/fps, 2/fps ... before the end of a video, in seconds, `num_frames` of them at most.

    Raises:
        ConfigError: `fps` or `num_frames` is not positive.
    """
    if not fps > 0:
        raise ConfigError(f"fps is {fps}", "use a positive rate, or num_frames for even sampling")
    if num_frames < 1:
        raise ConfigError(f"num_frames is {num_frames}", "use 1 or more")
    count = min(num_frames, max(1, ceil(duration_s * fps - _BOUNDARY)))
    return [k / fps for k in range(count)]


def fps_indices(num_frames_in_file: int, file_fps: float, fps: float, num_frames: int) -> list[int]:
    """Sample a file at `fps` frames a second from its start; never more than `num_frames`.

    Unlike `frame_indices` this does not stretch to the end of a long file.

    Args:
        num_frames_in_file: Frames of the file.
        file_fps: Its own rate.
        fps: Rate wanted.
        num_frames: Most frames to return.

    Returns:
        The frame that is on screen at each sampled moment.

    Raises:
        DataError: The file has no frames or no rate.
        ConfigError: `fps` or `num_frames` is not positive.
    """
    _check_request(num_frames_in_file, num_frames)
    if not file_fps > 0:
        raise DataError(f"the video states a rate of {file_fps} frames a second", "sample it evenly: fps = 0")
    times = fps_times(num_frames_in_file / file_fps, fps, num_frames)
    return [min(int(time * file_fps + _BOUNDARY), num_frames_in_file - 1) for time in times]


def pool_frames(features_TNH: Tensor, pool_sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Average the visual tokens of one video over blocks of time and space.

    Args:
        features_TNH: Projected tokens of the frames of one video.
        pool_sizes: Blocks [t, h, w], in frames and tokens; several of them make a pyramid.

    Returns:
        For each pool size a tensor of shape (T / t, N / (h * w), H).

    Raises:
        ConfigError: A block does not divide the frames or the grid of a frame.
        DataError: The frames are not square.
    """
    frames, tokens, width = features_TNH.shape
    n = isqrt(tokens)
    if n * n != tokens:
        raise DataError(f"a frame of {tokens} tokens is not square", "pool before anything is added to the frames")
    pooled = []
    for t, h, w in checked_pool_sizes(pool_sizes):
        _check_divides(frames, n, (t, h, w))
        # (T/t, t, n/h, h, n/w, w, H), averaged over each block
        blocks = features_TNH.reshape(frames // t, t, n // h, h, n // w, w, width)
        pooled.append(blocks.mean(dim=(1, 3, 5)).flatten(1, 2))
    return pooled


def num_video_tokens(
    num_frames: int, grid_side: int, pool_sizes: Sequence[Sequence[int]], *, line_feeds: bool = True
) -> int:
    """Count the positions of one video: its pooled tokens and, unless left out, the line feed after each pooled frame.

    Args:
        num_frames: Frames sampled.
        grid_side: Side of a projected frame in tokens.
        pool_sizes: Blocks [t, h, w].
        line_feeds: Whether line feeds count.

    Raises:
        ConfigError: A block does not divide the frames or the grid of a frame.

    Example:
        >>> num_video_tokens(256, 16, [[8, 1, 1]])
        8224
    """
    total = 0
    for t, h, w in checked_pool_sizes(pool_sizes):
        _check_divides(num_frames, grid_side, (t, h, w))
        total += (num_frames // t) * ((grid_side // h) * (grid_side // w) + line_feeds)
    return total


def checked_pool_sizes(pool_sizes: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Return the pool sizes as triples.

    Raises:
        ConfigError: There are none, or one is not three positive numbers.
    """
    sizes = [tuple(size) for size in pool_sizes]
    if not sizes or any(len(size) != 3 or min(size) < 1 for size in sizes):
        raise ConfigError(
            f"video_pool_sizes {[list(size) for size in sizes]} are no blocks of time and space",
            "list triples of whole numbers [t, h, w] such as [[8, 1, 1]]",
        )
    return [(t, h, w) for t, h, w in sizes]


def _check_request(num_frames_in_file: int, num_frames: int) -> None:
    if num_frames_in_file < 1:
        raise DataError("the video has no frames", "leave it out")
    if num_frames < 1:
        raise ConfigError(f"num_frames is {num_frames}", "use 1 or more")


def _check_divides(num_frames: int, grid_side: int, pool: tuple[int, int, int]) -> None:
    t, h, w = pool
    if num_frames % t:
        raise ConfigError(
            f"pool size {list(pool)} does not divide {num_frames} frames",
            f"sample a multiple of {t} frames or change video_pool_sizes",
        )
    if grid_side % h or grid_side % w:
        raise ConfigError(
            f"pool size {list(pool)} does not divide a frame of {grid_side}x{grid_side} tokens",
            "change video_pool_sizes",
        )

"""Image augmentation on batches of tiles."""

from __future__ import annotations

import torch
from torch import Tensor


def random_shift(tiles_T3HW: Tensor, max_pixels: int, noise: torch.Generator) -> Tensor:
    """Translate every tile by up to `max_pixels` in each direction, repeating the border.

    A tower learns from a few thousand small images where objects are, not only what they are; moving the image by
    less than a patch breaks that.
    """
    if max_pixels == 0 or not len(tiles_T3HW):
        return tiles_T3HW
    t, channels, height, width = tiles_T3HW.shape
    top, left = torch.randint(0, 2 * max_pixels + 1, (2, t), generator=noise) - max_pixels
    rows_TH = (top.unsqueeze(1) + torch.arange(height)).clamp_(0, height - 1)
    columns_TW = (left.unsqueeze(1) + torch.arange(width)).clamp_(0, width - 1)
    tile, channel = torch.arange(t), torch.arange(channels)
    return tiles_T3HW[
        tile[:, None, None, None],
        channel[None, :, None, None],
        rows_TH[:, None, :, None],
        columns_TW[:, None, None, :],
    ]

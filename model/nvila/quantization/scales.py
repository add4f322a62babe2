"""The searches: which scale to fold (AWQ, SmoothQuant) and how far to clip (AWQ).

Shape suffixes: N rows, I inputs, O outputs, G groups, g inputs of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvila.quantization.folding import Fold
from nvila.quantization.schemes import rounded_to_4_bits, row_chunks

NUM_RATIOS = 20
CLIP_STEPS = 20
MAX_SHRINK = 0.5
_TINY = 1e-4


def awq_scale(
    fold: Fold, weights: Sequence[Tensor], mean_abs_I: Tensor, rows_NI: Tensor, group_size: int
) -> tuple[Tensor | None, float]:
    """Search the scale whose rounded product is nearest to the wide one (AWQ, arXiv 2306.00978, section 3.2).

    The scale is the mean magnitude of each channel to a power r, for `NUM_RATIOS` values of r in [0, 1); r = 0 is no
    scaling. The distance is that of the layers' outputs on rows of calibration, relative to their size.

    Args:
        fold: Where the scale moves.
        weights: Weights (O, I) of the layers that read the scaled channels.
        mean_abs_I: Mean magnitude of each input.
        rows_NI: Some inputs.
        group_size: Of the 4-bit grid.

    Returns:
        The scale of each output of the layer before, and the share of the error that is left; None and 1 if no scale
        beats rounding as it is.
    """
    channels = fold.gather(mean_abs_I.float())
    x = rows_NI.float()
    best: Tensor | None = None
    errors = [_product_error(weights, x, torch.ones_like(mean_abs_I, dtype=torch.float32), group_size)]
    least = errors[0]
    for step in range(1, NUM_RATIOS):
        scale_C = channels.clamp(min=_TINY).pow(step / NUM_RATIOS).clamp(min=_TINY)
        scale_C = scale_C / (scale_C.max() * scale_C.min()).sqrt()
        error = _product_error(weights, x, fold.spread(scale_C), group_size)
        if error < least:
            best, least = scale_C, error
    return best, least / errors[0] if errors[0] else 1.0


def smooth_scale(weights: Sequence[Tensor], max_abs_I: Tensor, alpha: float = 0.5) -> Tensor:
    """Share the range of activations with the weights (SmoothQuant, arXiv 2211.10438, equation 4).

    Args:
        weights: Weights (O, I) of the layers that read the channels.
        max_abs_I: Largest magnitude of each input.
        alpha: 1 moves all of an activation's range into the weights, 0 all of the weights' into it.
    """
    largest = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    scale = max_abs_I.float().clamp(min=_TINY).pow(alpha) / largest.clamp(min=_TINY).pow(1 - alpha)
    # A channel that was never seen says nothing about its range.
    return torch.where(max_abs_I > 0, scale.clamp(min=_TINY), torch.ones_like(scale))


@torch.no_grad()
def clip_weight(weight_OI: Tensor, gram_Ggg: Tensor, group_size: int) -> float:
    """Shrink the range of each group to what rounds with the least output error, in place.

    The squared error of a group's share of the output, summed over calibration, is d' X'X d for the weights' errors d;
    so the inputs are needed only as their product.

    Args:
        weight_OI: Weight.
        gram_Ggg: X'X of each group.
        group_size: Of the 4-bit grid.

    Returns:
        Share of groups that were clipped.
    """
    clipped = 0
    for part_oI in row_chunks(weight_OI):
        wide = part_oI.float().unflatten(1, (-1, group_size))
        ends = [wide.amin(2, keepdim=True), wide.amax(2, keepdim=True)]
        least = _clipped_error(wide, ends, gram_Ggg, group_size)
        shrunk = torch.zeros_like(least, dtype=torch.bool)
        # One end after the other: a single wild weight must not cost the other end its range.
        for end in (1, 0):
            whole = ends[end]
            for step in range(1, int(CLIP_STEPS * MAX_SHRINK) + 1):
                tried = list(ends)
                tried[end] = whole * (1 - step / CLIP_STEPS)
                error_OG = _clipped_error(wide, tried, gram_Ggg, group_size)
                better = error_OG < least
                least = torch.where(better, error_OG, least)
                ends[end] = torch.where(better.unsqueeze(2), tried[end], ends[end])
                shrunk |= better
        part_oI.copy_(wide.clamp(*ends).flatten(1).to(part_oI.dtype))
        clipped += int(shrunk.sum())
    return clipped * group_size / weight_OI.numel()


def _clipped_error(wide_OGg: Tensor, ends: Sequence[Tensor], gram_Ggg: Tensor, group_size: int) -> Tensor:
    """Squared output error (O, G) of groups that are clipped to a range and rounded."""
    narrow = wide_OGg.clamp(*ends).flatten(1)
    distance = rounded_to_4_bits(narrow, group_size).unflatten(1, (-1, group_size)).sub_(wide_OGg)
    error_OG: Tensor = (torch.einsum("ogi,gij->ogj", distance, gram_Ggg) * distance).sum(2)
    return error_OG


def _product_error(weights: Sequence[Tensor], x_NI: Tensor, scale_I: Tensor, group_size: int) -> float:
    """Squared distance of the rounded products from the wide ones, relative to their size."""
    total = 0.0
    for weight in weights:
        distance, size = 0.0, 0.0
        for part in row_chunks(weight.detach()):
            wide = part.float()
            rounded = rounded_to_4_bits((wide * scale_I).to(weight.dtype), group_size).float() / scale_I
            distance += float((x_NI @ (rounded - wide).t()).square().sum())
            size += float((x_NI @ wide.t()).square().sum())
        total += distance / size if size else 0.0
    return total

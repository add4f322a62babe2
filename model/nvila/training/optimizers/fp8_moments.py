"""Optimizer moments in FP8 with dynamic range expansion (COAT, arXiv 2410.19313, section 4).

A moment's groups of 128 values use a fraction of the range of E4M3. Before rounding, a group is bent by
`f(x) = sign(x) |x / c|^k` so that its range becomes that of the format; the inverse power shrinks the rounding error
by k again.

Shape suffixes: G groups, E elements of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GROUP_SIZE = 128
# Largest over smallest value that the expanded group shall span: 448^2 / 2 for E4M3. For E5M2 the same construction.
_LOG2_RANGE = {E4M3: 16.614709844115208, E5M2: 30.614709844115207}
# Powers are multiples of 1/16. A group of one magnitude would ask for an infinite one.
_STEPS_OF_K, _MAX_K = 16.0, 64.0
# What is smaller than the largest of its group by more than this counts as zero, and no power leaves fp32.
_MAX_LOG2_RANGE = 100.0


@dataclass(slots=True)
class Fp8Moment:
    """A tensor of moments as FP8 codes with three numbers a group.

    Args:
        codes: FP8 values (G, E); the last group is filled up with zeros.
        scale: Factor of the codes (G, 1), fp32.
        power: k of the group (G, 1); 1 where the range is not expanded.
        centre: c of the group (G, 1), the geometric mean of its extremes; 1 where the range is not expanded.
    """

    codes: Tensor
    scale: Tensor
    power: Tensor
    centre: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes that the moment takes."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.power, self.centre))

    def dequantize(self, numel: int) -> Tensor:
        """Return the first `numel` values as fp32: `sign |q s|^(1/k) c`."""
        scaled_GE = self.codes.float() * self.scale
        return (scaled_GE.sign() * scaled_GE.abs().pow(1 / self.power) * self.centre).flatten()[:numel]


def quantize_moment(
    values: Tensor, *, dtype: torch.dtype = E4M3, group_size: int = GROUP_SIZE, expand: bool = True
) -> Fp8Moment:
    """Round moments to FP8 in groups.

    Zeros stay zeros and do not count for a group's range: the reference means to leave them out, and with them every
    group that holds one would be compressed eightfold.

    Args:
        values: Any shape; consecutive elements form the groups.
        dtype: FP8 format.
        group_size: Elements of a group.
        expand: Expand the range of every group; off is plain scaling by the largest value.
    """
    flat = values.detach().float().flatten()
    x_GE = pad(flat, (0, -len(flat) % group_size)).view(-1, group_size)
    size_GE = x_GE.abs()
    largest_G1 = size_GE.amax(1, keepdim=True)
    empty_G1 = largest_G1 == 0
    if expand:
        power_G1, centre_G1 = _expansion(size_GE, largest_G1, dtype)
    else:
        power_G1, centre_G1 = torch.ones_like(largest_G1), torch.ones_like(largest_G1)
    bent_GE = x_GE.sign() * (size_GE / centre_G1).pow(power_G1)
    top = torch.finfo(dtype).max
    scale_G1 = ((largest_G1 / centre_G1).pow(power_G1) / top).masked_fill_(empty_G1, 1.0)
    # The largest value may exceed the format by the rounding of the division; E5M2 would make it infinite.
    codes_GE = (bent_GE / scale_G1).clamp_(-top, top).to(dtype)
    return Fp8Moment(codes=codes_GE, scale=scale_G1, power=power_G1, centre=centre_G1)


def _expansion(size_GE: Tensor, largest_G1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return power and centre of every group."""
    smallest_G1 = size_GE.masked_fill(size_GE == 0, torch.inf).amin(1, keepdim=True)
    # In logarithms, because the ratio of two fp32 numbers need not be one.
    high_G1 = largest_G1.log2()
    low_G1 = torch.maximum(smallest_G1.log2(), high_G1 - _MAX_LOG2_RANGE)
    k_G1 = torch.floor(_STEPS_OF_K * _LOG2_RANGE[dtype] / (high_G1 - low_G1)) / _STEPS_OF_K
    power_G1 = k_G1.nan_to_num(nan=1.0, posinf=_MAX_K).clamp_(1 / _STEPS_OF_K, _MAX_K)
    centre_G1 = torch.exp2((high_G1 + low_G1) / 2)
    empty_G1 = largest_G1 == 0
    return power_G1.masked_fill_(empty_G1, 1.0), centre_G1.masked_fill_(empty_G1, 1.0)

"""FP8 training on any device, emulated: values are rounded to FP8, products run in the wide type.

The numbers are those of FP8 tensor cores with wide accumulation (COAT, arXiv 2410.19313, and the NVILA recipe):
inputs and weights in E4M3, output gradients in E5M2, one dynamic scale a tensor, all three products of a layer on
rounded operands. Formats and groups of a scale are settings. Neither time nor memory is saved; the point is that FP8
numerics can be trained and tested anywhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_TINY = 1e-10
# Stored mantissa bits and the exponent of the smallest normal number.
_GRIDS = {E4M3: (3, -6), E5M2: (2, -14)}


def round_to_fp8(x: Tensor, dtype: torch.dtype, group_size: int | None = None) -> Tensor:
    """Round a tensor to FP8 with dynamic scales and return it in its own type.

    A scale is `(max|x| + 1e-10) / max(dtype)`, so the largest value lands on the largest FP8 number and nothing
    overflows.

    Args:
        x: Any shape.
        dtype: FP8 format.
        group_size: Elements of the last axis that share a scale; None is one scale for the tensor.
    """
    if group_size is not None and x.shape[-1] > group_size:
        groups = pad(x, (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
        largest = groups.abs().amax(-1, keepdim=True)
        return _round_scaled(groups, largest, dtype).flatten(-2)[..., : x.shape[-1]].contiguous()
    if group_size is not None:
        return _round_scaled(x, x.abs().amax(-1, keepdim=True), dtype)
    low, high = torch.aminmax(x)
    return _round_scaled(x, torch.maximum(-low, high), dtype)


def _round_scaled(x: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    scale = (largest + _TINY) / torch.finfo(dtype).max
    if x.dtype != torch.float32:
        return (x / scale).to(dtype).to(x.dtype) * scale
    return round_to_grid(x / scale, dtype).mul_(scale)


def round_to_grid(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 values in the range of `dtype` to its grid, ties to even.

    Equal to casting there and back, which has no vector code on CPU and takes three times as long: adding and
    subtracting 1.5 * 2^(e + 23 - mantissa bits) makes fp32 round at the last FP8 digit of a value with exponent e.
    """
    mantissa_bits, min_exponent = _GRIDS[dtype]
    exponent = y.view(torch.int32).bitwise_and(0x7F800000).clamp_min_((127 + min_exponent) << 23)
    anchor = exponent.add_(((23 - mantissa_bits) << 23) | 0x400000).view(torch.float32)
    return (y + anchor).sub_(anchor)


@dataclass(frozen=True, slots=True)
class Fp8Rounding:
    """How the operands of a layer are rounded.

    Args:
        forward: Format of inputs and weights.
        backward: Format of output gradients.
        group_size: See `round_to_fp8`.
    """

    forward: torch.dtype = E4M3
    backward: torch.dtype = E5M2
    group_size: int | None = None

    def operand(self, x: Tensor) -> Tensor:
        """Round an input or a weight."""
        return round_to_fp8(x.detach(), self.forward, self.group_size)

    def gradient(self, grad: Tensor) -> Tensor:
        """Round an output gradient."""
        return round_to_fp8(grad, self.backward, self.group_size)


class _LastRounded:
    """Rounds operands and remembers the last result, for as long as that tensor lives unchanged."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Fp8Rounding, Tensor] | None = None

    def __call__(self, x: Tensor, rounding: Fp8Rounding) -> Tensor:
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version and last[2] == rounding:
            return last[3]
        x8 = rounding.operand(x)
        self._last = (weakref.ref(x), x._version, rounding, x8)
        return x8


_DEFAULT = Fp8Rounding()

# Query, key and value take one input, gate and up another: each is rounded once.
_rounded_input = _LastRounded()


class _Fp8Product(torch.autograd.Function):
    """`x @ weight.T` with all three products of training on FP8-rounded operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, x8: Tensor, weight8: Tensor, rounding: Fp8Rounding) -> Tensor:
        ctx.save_for_backward(x8, weight8)
        ctx.rounding = rounding
        return x8 @ weight8.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x8, weight8 = ctx.saved_tensors
        grad8 = ctx.rounding.gradient(grads[0])
        grad_x = grad8 @ weight8 if ctx.needs_input_grad[0] else None
        grad_weight = grad8.flatten(0, -2).t() @ x8.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None, None


class Fp8Linear(nn.Linear):
    """A linear layer that computes in emulated FP8 while training, and as usual in evaluation mode.

    Parameters keep their names and wide values, so checkpoints are those of `nn.Linear`.
    """

    _rounded_frozen: _LastRounded
    _rounding: Fp8Rounding

    @classmethod
    def from_linear(cls, linear: nn.Linear, rounding: Fp8Rounding = _DEFAULT) -> Fp8Linear:
        """Build a layer that shares the parameters of `linear`."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear._parameters["bias"] is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._rounded_frozen, layer._rounding = _LastRounded(), rounding
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if not self.training:
            return super().forward(input)
        rounding = self._rounding
        # Only a frozen weight is remembered: optimizers may write through `.data`, which leaves no new version.
        trained = self.weight.requires_grad
        weight8 = rounding.operand(self.weight) if trained else self._rounded_frozen(self.weight, rounding)
        x8 = _rounded_input(input, rounding)
        y = cast("Tensor", _Fp8Product.apply(input, self.weight, x8, weight8, rounding))
        return y if self._parameters["bias"] is None else y + self.bias


def convert_linears(module: nn.Module, names: Collection[str], rounding: Fp8Rounding = _DEFAULT) -> None:
    """Replace linear layers by `Fp8Linear`, in place.

    Args:
        module: The decoder.
        names: Full names of the layers below it.
        rounding: Formats and groups.
    """
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = cast("nn.Linear", module.get_submodule(name))
        setattr(module.get_submodule(parent), child, Fp8Linear.from_linear(layer, rounding))
